// SPDX-License-Identifier: GPL-2.0

//! The clock of the timer: 1193182 Hz, from nanoseconds and back, without 128-bit division.

/// Ticks in a second: a third of the colour subcarrier's, rounded as guests round it. (KVM has one less.)
pub const FREQUENCY: u64 = 1_193_182;

const NS_PER_SEC: u64 = 1_000_000_000;

/// How many ticks there are in `ns` nanoseconds, without the one that has begun. No input overflows.
#[must_use]
pub const fn ticks(ns: u64) -> u64 {
    // The product of a remainder is below 2^51, that of a quotient below 2^55.
    let whole = (ns / NS_PER_SEC).wrapping_mul(FREQUENCY);
    let part = (ns % NS_PER_SEC).wrapping_mul(FREQUENCY) / NS_PER_SEC;
    whole.wrapping_add(part)
}

/// The first nanosecond at which [`ticks`] gives `ticks`; the end of time if there is none.
#[must_use]
pub const fn nanoseconds(ticks: u64) -> u64 {
    let whole = (ticks / FREQUENCY).saturating_mul(NS_PER_SEC);
    let part = (ticks % FREQUENCY)
        .wrapping_mul(NS_PER_SEC)
        .div_ceil(FREQUENCY);
    whole.saturating_add(part)
}
