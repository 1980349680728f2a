// SPDX-License-Identifier: GPL-2.0

//! One counter of the 8254.
//!
//! It is not counted down; what it shows is computed from when it began. A count is taken at once: the clock or two that the chip
//! needs for it are not modelled, nor that in modes 2 and 3 it finishes the period before.

use super::super::line::Signal;
use super::clock::nanoseconds;
use super::clock::ticks;
use super::control::Byte;
use super::control::Mode;
use super::control::Radix;
use core::num::NonZeroU64;

/// The state of a counter, in the layout of `struct kvm_pit_channel_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PitChannelState {
    /// The initial count as it was written, 65536 for zero.
    pub count: u32,
    /// A count that was latched.
    pub latched_count: u16,
    /// What is left to read of it: 0 nothing, 1 the low byte, 2 the high one, 3 both.
    pub count_latched: u8,
    /// One if a status was latched.
    pub status_latched: u8,
    /// The status.
    pub status: u8,
    /// What is read next: 1 the low byte, 2 the high one, 3 the low and then the high one, 4 the high one of both.
    pub read_state: u8,
    /// What is written next, likewise.
    pub write_state: u8,
    /// The low byte, until the high one is written.
    pub write_latch: u8,
    /// Which bytes the control word chose, as in its bits 4 and 5.
    pub rw_mode: u8,
    /// The mode: 0 to 5, or 255 before the first control word.
    pub mode: u8,
    /// One if it counts in decimal.
    pub bcd: u8,
    /// What the gate carries.
    pub gate: u8,
    /// When it began to count, on the host's clock, in ns. For information: nothing is made of it.
    pub count_load_time: i64,
}

/// A count that waits to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Latched {
    count: u16,
    next: Byte,
}

/// How far an initial count got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// It is not written yet.
    Awaited,
    /// It waits for a trigger.
    Written,
    /// It is counted from.
    Taken,
}

/// Whether the counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// It waits for a count, or for the first trigger.
    Stopped,
    /// The gate holds it after so many nanoseconds.
    Held { elapsed: u64 },
    /// It does, since then.
    Since(u64),
}

/// A counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Channel {
    /// The initial count as it was written.
    count: u16,
    /// The one that is counted from.
    loaded: NonZeroU64,
    load: Load,
    radix: Radix,
    mode: Mode,
    access: Byte,
    read_next: Byte,
    write_next: Byte,
    write_latch: u8,
    latched: Option<Latched>,
    status: Option<u8>,
    gate: Signal,
    run: Run,
}

impl Channel {
    /// A counter without a mode.
    pub(super) const fn new(gate: Signal) -> Self {
        Self {
            count: 0,
            loaded: Radix::Binary.ticks(0),
            load: Load::Awaited,
            radix: Radix::Binary,
            mode: Mode::Unset,
            access: Byte::Unset,
            read_next: Byte::Unset,
            write_next: Byte::Unset,
            write_latch: 0,
            latched: None,
            status: None,
            gate,
            run: Run::Stopped,
        }
    }

    pub(super) const fn gate(&self) -> Signal {
        self.gate
    }

    /// How many ticks it has counted.
    const fn gone(&self, now: u64) -> u64 {
        match self.run {
            Run::Stopped => 0,
            Run::Held { elapsed } => ticks(elapsed),
            Run::Since(start) => ticks(now.saturating_sub(start)),
        }
    }

    /// What it shows.
    fn value(&self, now: u64) -> u16 {
        let n = self.loaded.get();
        let gone = self.gone(now);
        let left = match self.mode {
            Mode::RateGenerator => n.wrapping_sub(gone % self.loaded),
            Mode::SquareWave => {
                // By twos from an even number, once for each half.
                let (into, half) = (gone % self.loaded, n.div_ceil(2));
                let into = if into < half {
                    into
                } else {
                    into.wrapping_sub(half)
                };
                (n & !1).wrapping_sub(into.wrapping_mul(2))
            }
            _ => self.radix.left(n, gone),
        };
        self.radix.shown(left)
    }

    /// What OUT carries.
    pub(super) fn out(&self, now: u64) -> Signal {
        let n = self.loaded.get();
        let gone = self.gone(now);
        Signal::new(match (self.mode, self.run) {
            (Mode::Unset, _) | (Mode::TerminalCount, Run::Stopped) => false,
            (_, Run::Stopped) => true,
            // A gate that falls ends the low phase.
            (Mode::RateGenerator | Mode::SquareWave, Run::Held { .. }) => true,
            (Mode::TerminalCount | Mode::OneShot, _) => gone >= n,
            (Mode::RateGenerator, _) => gone % self.loaded != n.wrapping_sub(1),
            (Mode::SquareWave, _) => gone % self.loaded < n.div_ceil(2),
            (Mode::SoftwareStrobe | Mode::HardwareStrobe, _) => gone != n,
        })
    }

    /// When OUT rises next, in ticks from the start, after `gone` of them.
    fn rise_after(&self, gone: u64) -> Option<u64> {
        let n = self.loaded.get();
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => Some(n),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => Some(n.wrapping_add(1)),
            Mode::RateGenerator | Mode::SquareWave => {
                Some((gone / self.loaded).saturating_add(1).saturating_mul(n))
            }
            Mode::Unset => None,
        }
        .filter(|&rise| rise > gone)
    }

    /// When OUT rises next, after `now`.
    pub(super) fn next_rise(&self, now: u64) -> Option<u64> {
        let Run::Since(start) = self.run else {
            return None;
        };
        let rise = self.rise_after(self.gone(now))?;
        Some(start.saturating_add(nanoseconds(rise)))
    }

    /// How often OUT has risen since the counting began.
    pub(super) fn rises(&self, now: u64) -> u64 {
        let gone = self.gone(now);
        match (self.mode, self.run) {
            (Mode::Unset, _) | (_, Run::Stopped) => 0,
            (Mode::RateGenerator | Mode::SquareWave, _) => gone / self.loaded,
            _ => self.rise_after(gone).is_none().into(),
        }
    }

    /// How long a period is, in the modes that have any.
    pub(super) const fn period(&self) -> Option<u64> {
        match self.mode {
            Mode::RateGenerator | Mode::SquareWave => Some(nanoseconds(self.loaded.get())),
            _ => None,
        }
    }

    /// A control word: the counter stops until it gets a count.
    pub(super) fn control(&mut self, access: Byte, mode: Mode, radix: Radix) {
        self.access = access;
        self.read_next = access;
        self.write_next = access;
        self.mode = mode;
        self.radix = radix;
        self.latched = None;
        self.load = Load::Awaited;
        self.run = Run::Stopped;
    }

    /// Latches what the counter shows, unless something is latched already ("Counter latch command").
    pub(super) fn latch_count(&mut self, now: u64) {
        if self.latched.is_none() && self.access != Byte::Unset {
            self.latched = Some(Latched {
                count: self.value(now),
                next: self.access,
            });
        }
    }

    /// Latches the status, unless one is latched already ("Read-back command"): OUT, null count, bytes, mode, radix.
    pub(super) fn latch_status(&mut self, now: u64) {
        if self.status.is_none() {
            let null = self.load != Load::Taken;
            self.status = Some(
                (u8::from(self.out(now).is_high()) << 7)
                    | (u8::from(null) << 6)
                    | ((self.access.number() & 3) << 4)
                    | ((self.mode.number() & 7) << 1)
                    | u8::from(self.radix == Radix::Bcd),
            );
        }
    }

    /// A read of the counter: the status that is latched, or the count that is, or what it shows.
    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        if let Some(Latched { count, next }) = self.latched {
            self.latched = match next {
                Byte::LowOfWord => Some(Latched {
                    count,
                    next: Byte::High,
                }),
                _ => None,
            };
            return next.of(count);
        }
        let byte = self.read_next;
        self.read_next = byte.next();
        byte.of(self.value(now))
    }

    /// A write of the counter. Says whether that was all of a count, or stopped the counter.
    pub(super) fn write(&mut self, value: u8, now: u64) -> Written {
        let byte = self.write_next;
        self.write_next = byte.next();
        match byte {
            Byte::Unset | Byte::Low => self.set_count(value.into(), now),
            Byte::High => self.set_count(u16::from(value) << 8, now),
            Byte::LowOfWord => {
                self.write_latch = value;
                if self.mode != Mode::TerminalCount {
                    return Written::Nothing;
                }
                // In mode 0 the first byte disables the counting.
                self.run = Run::Stopped;
            }
            Byte::HighOfWord => {
                self.set_count(u16::from_le_bytes([self.write_latch, value]), now);
            }
        }
        Written::Timing
    }

    /// A new initial count. With a trigger (modes 1 and 5) it waits for the next one.
    fn set_count(&mut self, count: u16, now: u64) {
        self.count = count;
        match self.mode {
            Mode::Unset => {}
            Mode::OneShot | Mode::HardwareStrobe => self.load = Load::Written,
            _ => {
                self.run = match self.gate {
                    Signal::High => Run::Since(now),
                    Signal::Low => Run::Held { elapsed: 0 },
                };
                self.take_count();
            }
        }
    }

    fn take_count(&mut self) {
        self.loaded = self.radix.ticks(self.count);
        self.load = Load::Taken;
    }

    /// Has the gate carry a signal ("Gate pin operations").
    pub(super) fn set_gate(&mut self, gate: Signal, now: u64) {
        let before = core::mem::replace(&mut self.gate, gate);
        let rises = !before.is_high() && gate.is_high();
        match self.mode {
            Mode::OneShot | Mode::HardwareStrobe => {
                if rises && self.load != Load::Awaited {
                    self.take_count();
                    self.run = Run::Since(now);
                }
            }
            _ => match (self.run, gate) {
                (Run::Since(start), Signal::Low) => {
                    let elapsed = now.saturating_sub(start);
                    self.run = Run::Held { elapsed };
                }
                (Run::Held { elapsed }, Signal::High) => {
                    self.run = match self.mode {
                        // From the beginning.
                        Mode::RateGenerator | Mode::SquareWave => Run::Since(now),
                        _ => Run::Since(now.saturating_sub(elapsed)),
                    };
                }
                _ => {}
            },
        }
    }

    pub(super) fn state(&self) -> PitChannelState {
        PitChannelState {
            count: match self.count {
                0 => 0x1_0000,
                count => count.into(),
            },
            latched_count: self.latched.map_or(0, |l| l.count),
            count_latched: self.latched.map_or(0, |l| l.next.number()),
            status_latched: self.status.is_some().into(),
            status: self.status.unwrap_or(0),
            read_state: self.read_next.number(),
            write_state: self.write_next.number(),
            write_latch: self.write_latch,
            rw_mode: self.access.number(),
            mode: self.mode.number(),
            bcd: (self.radix == Radix::Bcd).into(),
            gate: self.gate.is_high().into(),
            count_load_time: match self.run {
                Run::Since(start) => start as i64,
                _ => 0,
            },
        }
    }

    /// Takes a state. As in KVM the counter begins anew with its count: what it had counted is not in the state, nor whether
    /// it had been given a count at all.
    pub(super) fn set_state(&mut self, state: &PitChannelState, gate: Signal, now: u64) {
        *self = Self {
            count: 0,
            loaded: self.loaded,
            load: Load::Awaited,
            radix: if state.bcd & 1 == 0 {
                Radix::Binary
            } else {
                Radix::Bcd
            },
            mode: Mode::from_state(state.mode),
            access: Byte::from_control(state.rw_mode),
            read_next: Byte::from_state(state.read_state),
            write_next: Byte::from_state(state.write_state),
            write_latch: state.write_latch,
            latched: match state.count_latched {
                0 => None,
                next => Some(Latched {
                    count: state.latched_count,
                    next: match Byte::from_state(next) {
                        Byte::Unset => Byte::Low,
                        // Which is the last one, whatever it is called.
                        Byte::HighOfWord => Byte::High,
                        next => next,
                    },
                }),
            },
            status: (state.status_latched != 0).then_some(state.status),
            gate,
            run: Run::Stopped,
        };
        // 65536 is zero again.
        self.set_count(state.count as u16, now);
    }
}

/// What came of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// A part of a count.
    Nothing,
    /// When OUT rises may be another time now.
    Timing,
}
