// SPDX-License-Identifier: GPL-2.0

//! The interval timer (KVM_CREATE_PIT2): a high-resolution timer of the host's that pulses GSI 0.
//!
//! The model and the ticks that are on their way are in [`PitState`], which belongs to the VM's
//! interrupts: the ends of the timer's own are among what they hear of. [`Pit`] is what the guest's
//! accesses reach, and has the host's timer.

use super::Irqs;
use crate::linux::hrtimer;
use crate::linux::hrtimer::HrTimer;
use crate::linux::hrtimer::OnExpiry;
use crate::x86::line::Source;
use crate::x86::pit;
use crate::x86::pit::reinject::Policy;
use crate::x86::pit::reinject::Reinject;
use crate::x86::pit::reinject::Tick;
use crate::x86::pit::PitChannelState;
use crate::x86::pit::PitState2;
use crate::x86::pit::Port;
use crate::x86::pit::Timer;
use core::sync::atomic::Ordering;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::Mutex;

/// The timer's GSI.
pub(super) const GSI: u32 = 0;

/// The shortest time between two interrupts, in ns, as in KVM by default: a guest must not have the
/// host do nothing else.
const MIN_PERIOD: u64 = 200_000;
/// And how long the host has for itself after a tick at least, in nanoseconds.
const MIN_PAUSE: u64 = 100_000;

/// The timer, and what it has yet to interrupt for.
pub(super) struct PitState {
    chip: pit::Pit,
    reinject: Reinject,
    /// Until when expiries have been counted, in ns.
    counted: u64,
}

impl PitState {
    /// A timer that does not count.
    pub(super) const fn new() -> Self {
        Self {
            chip: pit::Pit::new(),
            reinject: Reinject::new(),
            counted: 0,
        }
    }

    /// How often it expired since this was last asked. What is faster than it may be counts once.
    fn count(&mut self, now: u64) -> u64 {
        let expiries = self.chip.expiries(self.counted, now);
        let period = self.chip.next_expiry(now).and_then(|next| next.period);
        self.counted = now;
        match period {
            Some(period) if period < MIN_PERIOD => expiries.min(1),
            _ => expiries,
        }
    }

    /// When to look next, in ns.
    fn next(&self, now: u64) -> Option<u64> {
        let next = self.chip.next_expiry(now)?;
        Some(match next.period {
            Some(period) if period < MIN_PERIOD => next.at.max(now.saturating_add(MIN_PERIOD)),
            _ => next.at,
        })
    }
}

impl Irqs {
    fn pit_interrupt(&self) {
        self.pulse(GSI, Source::PIT);
        self.apics.watchdog();
    }

    /// The guest has acknowledged the timer's interrupt.
    pub(super) fn pit_acknowledged(&self) {
        let tick = self.pit.lock().reinject.acknowledged();
        if tick == Tick::Pulse {
            self.pit_interrupt();
        }
    }

    /// The guest has unmasked an input of the timer's: what it missed meanwhile, it did not want.
    pub(super) fn pit_unmasked(&self) {
        self.pit.lock().reinject.reset();
    }
}

/// What the host's timer does.
struct Expired(Arc<Irqs>);

impl OnExpiry for Expired {
    fn expired(&self, now: u64) -> Option<u64> {
        let (tick, next) = {
            let mut state = self.0.pit.lock();
            let expiries = state.count(now);
            (state.reinject.expired(expiries), state.next(now))
        };
        if tick == Tick::Pulse {
            self.0.pit_interrupt();
        }
        // The host has a life of its own between two ticks: where one takes long, for three times as
        // long. What is late is counted with the next.
        let end = hrtimer::now();
        let pause = end.saturating_sub(now).saturating_mul(3).max(MIN_PAUSE);
        next.map(|at| at.max(end.saturating_add(pause)))
    }
}

/// The timer of a VM, with the host's.
#[pin_data]
pub(crate) struct Pit {
    irqs: Arc<Irqs>,
    timer: HrTimer<Expired>,
    /// The port of the speaker is there too.
    speaker: bool,
    /// Held to program the timer, as what is armed has to be what the model says last.
    #[pin]
    program: Mutex<()>,
}

impl Pit {
    /// A timer that does not count, with the port of the speaker if so wished: ENOMEM. There must be
    /// one only for these interrupts.
    pub(crate) fn new(irqs: Arc<Irqs>, speaker: bool) -> Result<Arc<Self>> {
        let timer = HrTimer::new(Expired(irqs.clone()))?;
        let pit = Arc::pin_init(
            try_pin_init!(Self {
                irqs,
                timer,
                speaker,
                program <- new_mutex!((), "rkvm_pit_program"),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?;
        pit.wait_for_ends(true);
        Ok(pit)
    }

    /// Whether the ends of its interrupts are to be told.
    fn wait_for_ends(&self, wait: bool) {
        self.irqs.pit_waits.store(wait, Ordering::Relaxed);
        self.irqs.apics.rescan();
    }

    /// Changes the timer by `f`. May sleep.
    fn change(&self, f: impl FnOnce(&mut pit::Pit, u64) -> Timer) {
        let _program = self.program.lock();
        let changed = f(&mut self.irqs.pit.lock().chip, hrtimer::now());
        if changed == Timer::Unchanged {
            return;
        }
        // It may expire once more, by what it is now. After that nobody arms it but us.
        self.timer.cancel();
        let next = {
            let mut state = self.irqs.pit.lock();
            let now = hrtimer::now();
            state.reinject.reset();
            state.counted = now;
            state.next(now)
        };
        if let Some(next) = next {
            self.timer.arm(next);
        }
    }

    /// The guest reads a register.
    pub(crate) fn read(&self, port: Port) -> u8 {
        self.irqs.pit.lock().chip.read(port, hrtimer::now())
    }

    /// The guest writes a register. May sleep.
    pub(crate) fn write(&self, port: Port, value: u8) {
        self.change(|chip, now| chip.write(port, value, now));
    }

    /// Whether the port of the speaker is there.
    pub(crate) fn has_speaker(&self) -> bool {
        self.speaker
    }

    /// The guest reads the port of the speaker.
    pub(crate) fn read_speaker(&self) -> u8 {
        self.irqs.pit.lock().chip.read_speaker(hrtimer::now())
    }

    /// The guest writes the port of the speaker.
    pub(crate) fn write_speaker(&self, value: u8) {
        let mut state = self.irqs.pit.lock();
        state.chip.write_speaker(value, hrtimer::now());
    }

    /// KVM_GET_PIT2 and KVM_GET_PIT.
    pub(crate) fn state(&self) -> PitState2 {
        self.irqs.pit.lock().chip.state()
    }

    /// KVM_SET_PIT2.
    pub(crate) fn set_state(&self, state: &PitState2) {
        self.change(|chip, now| chip.set_state(state, now));
    }

    /// KVM_SET_PIT.
    pub(crate) fn set_channels(&self, channels: &[PitChannelState; 3]) {
        self.change(|chip, now| chip.set_channels(channels, now));
    }

    /// KVM_REINJECT_CONTROL: whether ticks that the guest was too slow for are sent later, or lost.
    pub(crate) fn set_reinject(&self, reinject: bool) {
        let policy = if reinject {
            Policy::Reinject
        } else {
            Policy::Discard
        };
        let _program = self.program.lock();
        self.irqs.pit.lock().reinject.set_policy(policy);
        self.wait_for_ends(reinject);
    }
}
