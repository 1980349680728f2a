// SPDX-License-Identifier: GPL-2.0

//! The timer of the local APIC (SDM vol. 3, 12.5.4): arithmetic over the caller's clocks.
//!
//! The counter runs on nanoseconds, of which a bus cycle takes a fixed number; the deadline is a value of the guest's time-stamp
//! counter. The caller arms something of its own for [`Timer::next_expiry`] and calls [`Timer::expire`] when that goes off; to be early or
//! late is no error. How often a periodic timer may go off is the caller's to limit as well.

use super::regs::Lvt;
use super::regs::TimerModes;
use core::num::NonZeroU64;

/// The two clocks, read when they are needed.
pub trait Clock {
    /// Nanoseconds since some moment; never backwards.
    fn ns(&self) -> u64;
    /// The guest's time-stamp counter.
    fn tsc(&self) -> u64;
}

/// One moment of the two clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Nanoseconds.
    pub ns: u64,
    /// The guest's time-stamp counter.
    pub tsc: u64,
}

impl Clock for Now {
    fn ns(&self) -> u64 {
        self.ns
    }

    fn tsc(&self) -> u64 {
        self.tsc
    }
}

/// How long a cycle of the bus takes, in nanoseconds (KVM_CAP_X86_APIC_BUS_CYCLES_NS).
///
/// # Invariants
///
/// Not 0, and the longest period, of `u32::MAX` cycles divided by 128, fits into 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusPeriod(NonZeroU64);

impl BusPeriod {
    const MAX: u64 = u64::MAX / (128 * u32::MAX as u64);

    /// A cycle of one nanosecond, a bus of 1 GHz: what KVM has.
    pub const DEFAULT: Self = Self(NonZeroU64::MIN);

    /// A cycle of so many nanoseconds, if it is neither 0 nor too long.
    #[must_use]
    pub const fn new(ns: u64) -> Option<Self> {
        match NonZeroU64::new(ns) {
            // INVARIANT: just checked.
            Some(ns) if ns.get() <= Self::MAX => Some(Self(ns)),
            _ => None,
        }
    }

    /// In nanoseconds.
    #[must_use]
    pub const fn ns(self) -> u64 {
        self.0.get()
    }
}

impl Default for BusPeriod {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// By how much the counter divides the bus: a power of two from 1 to 128 (SDM vol. 3, figure 12-10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divide(u8);

impl Divide {
    /// The bits of the register that say so.
    pub const MASK: u32 = 0xb;

    /// What the register says.
    #[must_use]
    pub const fn new(tdcr: u32) -> Self {
        let code = (tdcr & 3) | ((tdcr >> 1) & 4);
        // 0 is 2, and so on up to 6, which is 128; and 7 is 1.
        Self(((code + 1) & 7) as u8)
    }

    /// The exponent: 0 to 7.
    const fn shift(self) -> u32 {
        (self.0 & 7) as u32
    }

    /// The divisor.
    #[must_use]
    pub const fn divisor(self) -> u32 {
        1 << self.shift()
    }
}

impl Default for Divide {
    fn default() -> Self {
        Self::new(0)
    }
}

/// What the timer does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimerMode {
    /// Count down once.
    #[default]
    OneShot,
    /// Count down, and begin again.
    Periodic,
    /// Wait for a value of the time-stamp counter.
    TscDeadline,
    /// An encoding that is reserved: nothing.
    Reserved,
}

impl TimerMode {
    /// The mode in bits 18:17 of the timer's LVT entry; without the deadline mode, bit 18 is no part of it.
    #[must_use]
    pub const fn new(lvt: Lvt, modes: TimerModes) -> Self {
        let bits = (lvt.bits() >> 17) & 3;
        match (bits, modes) {
            (0, _) | (2, TimerModes::Counters) => Self::OneShot,
            (1, _) | (3, TimerModes::Counters) => Self::Periodic,
            (2, TimerModes::WithTscDeadline) => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// When the timer goes off, and by which clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// In nanoseconds of the caller's clock.
    Ns(u64),
    /// At this value of the guest's time-stamp counter, or beyond.
    Tsc(u64),
}

/// What [`Timer::expire`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// It is not armed.
    Stopped,
    /// It is too early.
    Pending(Deadline),
    /// It has gone off: once, however many periods passed. `next` is when it will again.
    Fired {
        /// The end of the period that runs now; none but in periodic mode.
        next: Option<Deadline>,
    },
}

/// The timer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timer {
    bus: BusPeriod,
    mode: TimerMode,
    divide: Divide,
    /// The initial count.
    initial: u32,
    /// When the counter reaches 0, in nanoseconds. None if it stands at 0.
    target: Option<u64>,
    /// The deadline of [`TimerMode::TscDeadline`], or 0.
    deadline: u64,
}

impl Timer {
    /// A timer that stands still.
    #[must_use]
    pub fn new(bus: BusPeriod) -> Self {
        Self {
            bus,
            ..Self::default()
        }
    }

    /// The mode.
    #[must_use]
    pub const fn mode(&self) -> TimerMode {
        self.mode
    }

    /// The initial count.
    #[must_use]
    pub const fn initial(&self) -> u32 {
        self.initial
    }

    /// IA32_TSC_DEADLINE: 0 if nothing is armed or the mode is another.
    #[must_use]
    pub const fn deadline(&self) -> u64 {
        self.deadline
    }

    /// The nanoseconds that the counter takes for one step.
    fn step(&self) -> NonZeroU64 {
        let ns = self.bus.0.get().wrapping_shl(self.divide.shift());
        NonZeroU64::new(ns).unwrap_or(NonZeroU64::MIN)
    }

    /// The nanoseconds that it takes for `count` steps.
    fn span(&self, count: u32) -> u64 {
        self.step().get().saturating_mul(u64::from(count))
    }

    /// Stops it and forgets all but mode and divisor.
    pub fn disarm(&mut self) {
        self.initial = 0;
        self.target = None;
        self.deadline = 0;
    }

    /// The LVT entry got a mode.
    ///
    /// The deadline and the counter are two timers: a change from one to the other disarms. Between one-shot and periodic the counter
    /// runs on, as in KVM: what it does at 0 is asked when it gets there.
    pub fn set_mode(&mut self, mode: TimerMode) {
        let is_deadline = |mode| matches!(mode, TimerMode::TscDeadline);
        if is_deadline(self.mode) != is_deadline(mode) {
            self.disarm();
        }
        if matches!(mode, TimerMode::Reserved) {
            self.target = None;
        }
        self.mode = mode;
    }

    /// Writes the initial count: the counter begins there, or stops if it is 0. In the deadline mode the write is ignored.
    pub fn start(&mut self, count: u32, now_ns: u64) {
        self.restore(count, count, now_ns);
    }

    /// Sets the initial count, and the counter to a value of its own, for a state that a VMM restores.
    ///
    /// A counter that stands at 0 has gone off. Whether the interrupt was seen is not in the state: one-shot, it goes off at once, and
    /// periodic, it begins a period. One above the initial count begins there. (As KVM does.)
    pub fn restore(&mut self, initial: u32, current: u32, now_ns: u64) {
        let counts = match self.mode {
            TimerMode::TscDeadline => return,
            TimerMode::Reserved => false,
            TimerMode::OneShot | TimerMode::Periodic => initial != 0,
        };
        let left = if current == 0 && matches!(self.mode, TimerMode::Periodic) {
            initial
        } else {
            current.min(initial)
        };
        self.initial = initial;
        self.target = if counts {
            Some(now_ns.saturating_add(self.span(left)))
        } else {
            None
        };
    }

    /// Writes IA32_TSC_DEADLINE: arms it, or disarms it with 0. In another mode the write is ignored.
    pub fn set_deadline(&mut self, tsc: u64) {
        if matches!(self.mode, TimerMode::TscDeadline) {
            self.deadline = tsc;
        }
    }

    /// Writes the divide configuration. The count stays what it is, and goes on at the new speed.
    pub fn set_divide(&mut self, divide: Divide, now_ns: u64) {
        if let Some(target) = self.target {
            let left = u128::from(target.saturating_sub(now_ns));
            let left = (left << divide.shift()) >> self.divide.shift();
            let left = u64::try_from(left).unwrap_or(u64::MAX);
            self.target = Some(now_ns.saturating_add(left));
        }
        self.divide = divide;
    }

    /// What is left of the count: the steps that have begun.
    #[must_use]
    pub fn current_count(&self, now_ns: u64) -> u32 {
        let Some(target) = self.target else {
            return 0;
        };
        let left = match (target.checked_sub(now_ns), self.mode) {
            (Some(left), _) if left > 0 => left,
            (_, TimerMode::Periodic) => self.end_of_period(target, now_ns).wrapping_sub(now_ns),
            _ => 0,
        };
        let step = self.step();
        let count = (left / step).wrapping_add(u64::from(left % step != 0));
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
    }

    /// The first end of a period after `now_ns`, where one was at `target`, not later than that.
    fn end_of_period(&self, target: u64, now_ns: u64) -> u64 {
        let period = NonZeroU64::new(self.span(self.initial)).unwrap_or(NonZeroU64::MIN);
        let into = now_ns.saturating_sub(target) % period;
        now_ns.saturating_add(period.get().wrapping_sub(into))
    }

    /// When it goes off.
    #[must_use]
    pub const fn next_expiry(&self) -> Option<Deadline> {
        match (self.mode, self.target) {
            (TimerMode::TscDeadline, _) if self.deadline != 0 => Some(Deadline::Tsc(self.deadline)),
            (TimerMode::OneShot | TimerMode::Periodic, Some(target)) => Some(Deadline::Ns(target)),
            _ => None,
        }
    }

    /// Goes off if it is time to. Periods that nobody saw pass leave one expiry, and the periods to come end where they would have.
    pub fn expire(&mut self, clock: &impl Clock) -> Expiry {
        match self.next_expiry() {
            None => Expiry::Stopped,
            Some(Deadline::Tsc(tsc)) => {
                if clock.tsc() < tsc {
                    return Expiry::Pending(Deadline::Tsc(tsc));
                }
                self.deadline = 0;
                Expiry::Fired { next: None }
            }
            Some(Deadline::Ns(target)) => {
                let now_ns = clock.ns();
                if now_ns < target {
                    return Expiry::Pending(Deadline::Ns(target));
                }
                self.target = match self.mode {
                    TimerMode::Periodic => Some(self.end_of_period(target, now_ns)),
                    _ => None,
                };
                Expiry::Fired {
                    next: self.target.map(Deadline::Ns),
                }
            }
        }
    }
}
