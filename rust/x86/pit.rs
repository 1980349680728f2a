// SPDX-License-Identifier: GPL-2.0

//! The interval timer (8254) of a PC, and the port of the speaker that is wired to it.
//!
//! Counter 0 makes the interrupt: IRQ 0 is its OUT. Counter 1 refreshed memory once. Counter 2 makes the speaker's tone, and has a
//! gate that the guest moves; the gates of the others are tied high.
//!
//! No time passes in here. Each access gets `now`, in nanoseconds of a clock that does not go back, and whoever has a timer asks
//! [`Pit::next_expiry`] and arms it. What becomes of ticks that a guest is late for is in [`reinject`].
//!
//! References are to the headings of the 8254 data sheet. KVM's timer is simpler: it knows neither decimal counters nor held ones,
//! and interrupts once where a one-shot on counter 0 waits for a trigger that never comes.

pub mod clock;
pub mod reinject;

mod channel;
mod control;

pub use channel::PitChannelState;
pub use control::Mode;
pub use control::Radix;

use super::bits::bit_flags;
use super::line::Signal;
use channel::Channel;
use channel::Written;
use control::Byte;

bit_flags! {
    /// The flags of `struct kvm_pit_state2`.
    pub struct Flags(u32) {
        /// The HPET has taken the place of counter 0, which does not interrupt.
        HPET_LEGACY = 1 << 0;
        /// The speaker gets the tone: bit 1 of its port.
        SPEAKER_DATA_ON = 1 << 1;
    }
}

/// The state that KVM_GET_PIT2 and KVM_SET_PIT2 carry, in the layout of `struct kvm_pit_state2`. That of KVM_GET_PIT and
/// KVM_SET_PIT has the counters only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PitState2 {
    /// The counters.
    pub channels: [PitChannelState; 3],
    /// [`Flags`].
    pub flags: u32,
    /// Zero.
    pub reserved: [u32; 9],
}

/// One of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// IRQ 0.
    Irq,
    /// Memory refresh.
    Refresh,
    /// The speaker.
    Speaker,
}

impl Counter {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Irq, Self::Refresh, Self::Speaker];
}

/// The registers, by their ports. They have eight bits: a wider read has zeros above, and a wider write loses the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// A counter.
    Counter(Counter),
    /// Control words. Reads as zero.
    Control,
}

impl Port {
    /// The register with this port.
    #[must_use]
    pub const fn new(port: u16) -> Option<Self> {
        Some(match port {
            0x40 => Self::Counter(Counter::Irq),
            0x41 => Self::Counter(Counter::Refresh),
            0x42 => Self::Counter(Counter::Speaker),
            0x43 => Self::Control,
            _ => return None,
        })
    }
}

/// The port of the speaker, [`Pit::read_speaker`] and [`Pit::write_speaker`].
pub const SPEAKER_PORT: u16 = 0x61;

/// Whether a change concerns the timer of counter 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Timer {
    /// It does not.
    Unchanged,
    /// Ask [`Pit::next_expiry`] again, and forget the ticks that are on their way ([`reinject::Reinject::reset`]).
    Changed,
}

/// When counter 0 interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// The next time, on the clock of `now`.
    pub at: u64,
    /// How long it is from one to the next, in ns, rounded up; none if there will be only one. It can be less than a microsecond:
    /// who arms a timer by it keeps it from taking the host's whole time.
    pub period: Option<u64>,
}

/// The timer of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pit {
    channels: [Channel; 3],
    flags: Flags,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// The timer before its first control word: nothing counts.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            channels: [
                Channel::new(Signal::High),
                Channel::new(Signal::High),
                Channel::new(Signal::Low),
            ],
            flags: Flags::empty(),
        }
    }

    fn channel(&self, counter: Counter) -> &Channel {
        let [irq, refresh, speaker] = &self.channels;
        match counter {
            Counter::Irq => irq,
            Counter::Refresh => refresh,
            Counter::Speaker => speaker,
        }
    }

    fn channel_mut(&mut self, counter: Counter) -> &mut Channel {
        let [irq, refresh, speaker] = &mut self.channels;
        match counter {
            Counter::Irq => irq,
            Counter::Refresh => refresh,
            Counter::Speaker => speaker,
        }
    }

    /// The flags.
    #[must_use]
    pub const fn flags(&self) -> Flags {
        self.flags
    }

    /// What the OUT of a counter carries.
    #[must_use]
    pub fn out(&self, counter: Counter, now: u64) -> Signal {
        self.channel(counter).out(now)
    }

    /// Reads a register.
    pub fn read(&mut self, port: Port, now: u64) -> u8 {
        match port {
            Port::Counter(counter) => self.channel_mut(counter).read(now),
            Port::Control => 0,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, port: Port, value: u8, now: u64) -> Timer {
        match port {
            Port::Counter(counter) => {
                match (counter, self.channel_mut(counter).write(value, now)) {
                    (Counter::Irq, Written::Timing) => Timer::Changed,
                    _ => Timer::Unchanged,
                }
            }
            Port::Control => self.control(value, now),
        }
    }

    /// "Control word format": a counter in bits 6 and 7, bytes in 4 and 5, a mode in 1 to 3, decimal in 0.
    fn control(&mut self, value: u8, now: u64) -> Timer {
        let counter = match value >> 6 {
            0 => Counter::Irq,
            1 => Counter::Refresh,
            2 => Counter::Speaker,
            _ => {
                self.read_back(value, now);
                return Timer::Unchanged;
            }
        };
        let channel = self.channel_mut(counter);
        let access = Byte::from_control(value >> 4);
        if access == Byte::Unset {
            channel.latch_count(now);
            return Timer::Unchanged;
        }
        let radix = if value & 1 == 0 {
            Radix::Binary
        } else {
            Radix::Bcd
        };
        channel.control(access, Mode::from_control(value >> 1), radix);
        match counter {
            Counter::Irq => Timer::Changed,
            Counter::Refresh | Counter::Speaker => Timer::Unchanged,
        }
    }

    /// "Read-back command": the counters whose bits are set among 1 to 3, their counts if bit 5 is clear, their statuses if
    /// bit 4 is.
    fn read_back(&mut self, value: u8, now: u64) {
        for (bit, channel) in [2, 4, 8].into_iter().zip(&mut self.channels) {
            if value & bit == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                channel.latch_count(now);
            }
            if value & 0x10 == 0 {
                channel.latch_status(now);
            }
        }
    }

    /// Reads port 61h: the gate of counter 2 (bit 0), whether the speaker gets its tone (1), the refresh of memory, which toggles (4),
    /// and the OUT of counter 2 (5).
    #[must_use]
    pub fn read_speaker(&self, now: u64) -> u8 {
        let speaker = self.channel(Counter::Speaker);
        // Every 15 us on a PC: 2^14 ns are near enough, and are KVM's.
        let refresh = ((now >> 14) & 1) as u8;
        u8::from(speaker.gate().is_high())
            | (u8::from(self.flags.has(Flags::SPEAKER_DATA_ON)) << 1)
            | (refresh << 4)
            | (u8::from(speaker.out(now).is_high()) << 5)
    }

    /// Writes port 61h: bits 0 and 1.
    pub fn write_speaker(&mut self, value: u8, now: u64) {
        self.flags = self.flags.with_if(Flags::SPEAKER_DATA_ON, value & 2 != 0);
        self.channel_mut(Counter::Speaker)
            .set_gate(Signal::new(value & 1 != 0), now);
    }

    /// When counter 0 interrupts next, after `now`: when its OUT rises. Never, in the place of an HPET.
    #[must_use]
    pub fn next_expiry(&self, now: u64) -> Option<Expiry> {
        if self.flags.has(Flags::HPET_LEGACY) {
            return None;
        }
        let channel = self.channel(Counter::Irq);
        Some(Expiry {
            at: channel.next_rise(now)?,
            period: channel.period(),
        })
    }

    /// How often counter 0 interrupted after `from` and not after `to`, for a timer that comes late. Of a time before the counter
    /// was last programmed nothing is known.
    #[must_use]
    pub fn expiries(&self, from: u64, to: u64) -> u64 {
        if self.flags.has(Flags::HPET_LEGACY) {
            return 0;
        }
        let channel = self.channel(Counter::Irq);
        channel.rises(to).saturating_sub(channel.rises(from))
    }

    /// The state, for KVM_GET_PIT2 and KVM_GET_PIT.
    #[must_use]
    pub fn state(&self) -> PitState2 {
        let [irq, refresh, speaker] = &self.channels;
        PitState2 {
            channels: [irq.state(), refresh.state(), speaker.state()],
            flags: self.flags.bits(),
            reserved: [0; 9],
        }
    }

    /// Sets the state (KVM_SET_PIT2). Any will do. The counters begin anew, as in KVM.
    pub fn set_state(&mut self, state: &PitState2, now: u64) -> Timer {
        self.flags = Flags::new(state.flags);
        self.set_channels(&state.channels, now)
    }

    /// Sets the counters only (KVM_SET_PIT). The gates that are tied high stay so.
    pub fn set_channels(&mut self, channels: &[PitChannelState; 3], now: u64) -> Timer {
        for ((counter, channel), state) in Counter::ALL
            .into_iter()
            .zip(&mut self.channels)
            .zip(channels)
        {
            let gate = match counter {
                Counter::Irq | Counter::Refresh => Signal::High,
                Counter::Speaker => Signal::new(state.gate != 0),
            };
            channel.set_state(state, gate, now);
        }
        Timer::Changed
    }
}
