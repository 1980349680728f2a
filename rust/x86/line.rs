// SPDX-License-Identifier: GPL-2.0

//! Interrupt lines, as the inputs of [`ioapic`](super::ioapic) and [`pic`](super::pic) see them.
//!
//! A line has one [`Signal`], but may have several [`Source`]s that drive it: user space, an eventfd, the timer. It is high as
//! long as any of them holds it high.

/// What a line carries. The models know no polarity: high is asserted, as for KVM_IRQ_LINE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Signal {
    /// Not asserted.
    #[default]
    Low,
    /// Asserted.
    High,
}

impl Signal {
    /// High if `asserted`.
    #[inline]
    #[must_use]
    pub const fn new(asserted: bool) -> Self {
        if asserted {
            Self::High
        } else {
            Self::Low
        }
    }

    /// Whether it is high.
    #[inline]
    #[must_use]
    pub const fn is_high(self) -> bool {
        matches!(self, Self::High)
    }
}

/// What an input takes for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// That the line rises.
    Edge,
    /// That the line is high.
    Level,
}

/// Who drives a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source(u8);

impl Source {
    /// User space, with KVM_IRQ_LINE, and eventfds without a resampler, as in KVM.
    pub const USER: Self = Self(0);
    /// Eventfds with a resampler (KVM_IRQFD_FLAG_RESAMPLE).
    pub const RESAMPLE: Self = Self(1);
    /// The interval timer.
    pub const PIT: Self = Self(2);

    /// Another one, 0 to 63.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < 64 {
            Some(Self(number))
        } else {
            None
        }
    }
}

/// A line and who holds it high.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line(u64);

impl Line {
    /// A line that nobody holds high.
    pub const LOW: Self = Self(0);

    /// Has `source` drive the line; says what it carries then.
    pub fn drive(&mut self, source: Source, signal: Signal) -> Signal {
        let bit = 1u64 << (source.0 & 63);
        match signal {
            Signal::High => self.0 |= bit,
            Signal::Low => self.0 &= !bit,
        }
        self.signal()
    }

    /// What the line carries.
    #[inline]
    #[must_use]
    pub const fn signal(self) -> Signal {
        Signal::new(self.0 != 0)
    }
}

/// What came of a line's being driven, as KVM_IRQ_LINE_STATUS tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The input is masked, or waits for an EOI.
    Ignored,
    /// The request before has not been taken yet: the two are one.
    Coalesced,
    /// A request was made, or the line is low.
    Delivered,
}

impl Outcome {
    /// The `status` of `struct kvm_irq_level`.
    #[must_use]
    pub const fn status(self) -> i32 {
        match self {
            Self::Ignored => -1,
            Self::Coalesced => 0,
            Self::Delivered => 1,
        }
    }
}

/// A set of inputs, 0 to 31.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins(u32);

impl Pins {
    /// No input.
    pub const EMPTY: Self = Self(0);

    /// The inputs whose bits are set.
    #[inline]
    #[must_use]
    pub const fn new(bits: u32) -> Self {
        Self(bits)
    }

    /// One input. None, for a number above 31.
    #[inline]
    #[must_use]
    pub const fn of(pin: u8) -> Self {
        if pin < 32 {
            Self(1 << (pin & 31))
        } else {
            Self::EMPTY
        }
    }

    /// A bit for each input.
    #[inline]
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether there is none.
    #[inline]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the input is one of them.
    #[inline]
    #[must_use]
    pub const fn has(self, pin: u8) -> bool {
        self.0 & Self::of(pin).0 != 0
    }

    /// These and those.
    #[inline]
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These, but not those.
    #[inline]
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl Iterator for Pins {
    type Item = u8;

    /// Takes the lowest one out.
    fn next(&mut self) -> Option<u8> {
        if self.0 == 0 {
            return None;
        }
        // At most 31.
        let pin = self.0.trailing_zeros() as u8;
        self.0 &= self.0.wrapping_sub(1);
        Some(pin)
    }
}
