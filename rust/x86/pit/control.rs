// SPDX-License-Identifier: GPL-2.0

//! What a control word of the 8254 says of a counter: its mode, its radix, and which bytes of a count are read and written.

use core::num::NonZeroU64;

/// The mode of a counter ("Mode definitions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 0, interrupt on terminal count: OUT rises when the count is over, once.
    TerminalCount,
    /// 1, hardware retriggerable one-shot: OUT is low from a trigger until the count is over.
    OneShot,
    /// 2, rate generator: OUT is low for the last tick of each period.
    RateGenerator,
    /// 3, square wave: OUT is high for the first half of each period.
    SquareWave,
    /// 4, software triggered strobe: OUT is low for one tick when the count is over.
    SoftwareStrobe,
    /// 5, hardware triggered strobe: the same, from a trigger.
    HardwareStrobe,
    /// There was no control word yet.
    Unset,
}

impl Mode {
    /// From bits 1 to 3 of a control word; modes 2 and 3 have two encodings.
    pub(super) const fn from_control(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::TerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::RateGenerator,
            3 | 7 => Self::SquareWave,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    pub(super) const fn from_state(mode: u8) -> Self {
        match mode {
            0..=5 => Self::from_control(mode),
            _ => Self::Unset,
        }
    }

    pub(super) const fn number(self) -> u8 {
        match self {
            Self::TerminalCount => 0,
            Self::OneShot => 1,
            Self::RateGenerator => 2,
            Self::SquareWave => 3,
            Self::SoftwareStrobe => 4,
            Self::HardwareStrobe => 5,
            Self::Unset => 0xff,
        }
    }
}

/// How a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Radix {
    /// Sixteen bits.
    Binary,
    /// Four decimal digits.
    Bcd,
}

impl Radix {
    /// How many ticks an initial count is. Digits above nine count what they would in hexadecimal.
    pub(super) const fn ticks(self, count: u16) -> NonZeroU64 {
        let count = count as u64;
        let (ticks, whole) = match self {
            Self::Binary => (count, 0x1_0000),
            Self::Bcd => (
                (count & 15)
                    .wrapping_add(((count >> 4) & 15).wrapping_mul(10))
                    .wrapping_add(((count >> 8) & 15).wrapping_mul(100))
                    .wrapping_add(((count >> 12) & 15).wrapping_mul(1000)),
                10_000,
            ),
        };
        match NonZeroU64::new(ticks) {
            Some(ticks) => ticks,
            None => match NonZeroU64::new(whole) {
                Some(whole) => whole,
                None => NonZeroU64::MIN,
            },
        }
    }

    /// What a counter shows that has so many ticks left.
    pub(super) const fn shown(self, left: u64) -> u16 {
        match self {
            Self::Binary => left as u16,
            Self::Bcd => {
                let left = left % 10_000;
                let digits = (left % 10)
                    | ((left / 10 % 10) << 4)
                    | ((left / 100 % 10) << 8)
                    | ((left / 1000) << 12);
                digits as u16
            }
        }
    }

    /// What is left of `count` after `gone` ticks, if it goes on below zero.
    pub(super) const fn left(self, count: u64, gone: u64) -> u64 {
        match self {
            Self::Binary => count.wrapping_sub(gone) & 0xffff,
            Self::Bcd => count.wrapping_add(10_000).wrapping_sub(gone % 10_000) % 10_000,
        }
    }
}

/// Which byte of a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Byte {
    /// There was no control word yet; as if it were the low one.
    Unset,
    /// The low one.
    Low,
    /// The high one.
    High,
    /// The low one, and the high one next.
    LowOfWord,
    /// The high one, and the low one next.
    HighOfWord,
}

impl Byte {
    /// From bits 4 and 5 of a control word that is no latch command.
    pub(super) const fn from_control(bits: u8) -> Self {
        Self::from_state(bits & 3)
    }

    pub(super) const fn from_state(state: u8) -> Self {
        match state {
            1 => Self::Low,
            2 => Self::High,
            3 => Self::LowOfWord,
            4 => Self::HighOfWord,
            _ => Self::Unset,
        }
    }

    pub(super) const fn number(self) -> u8 {
        match self {
            Self::Unset => 0,
            Self::Low => 1,
            Self::High => 2,
            Self::LowOfWord => 3,
            Self::HighOfWord => 4,
        }
    }

    pub(super) const fn of(self, count: u16) -> u8 {
        let [low, high] = count.to_le_bytes();
        match self {
            Self::High | Self::HighOfWord => high,
            Self::Unset | Self::Low | Self::LowOfWord => low,
        }
    }

    pub(super) const fn next(self) -> Self {
        match self {
            Self::LowOfWord => Self::HighOfWord,
            Self::HighOfWord => Self::LowOfWord,
            other => other,
        }
    }
}
