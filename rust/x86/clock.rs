// SPDX-License-Identifier: GPL-2.0

//! Guest time: a time-stamp counter that runs at a rate of its own, and the clock that a guest computes from it.
//!
//! | module | what |
//! |---|---|
//! | [`tsc`] | the guest's counter from the host's: a rate and an offset |
//! | [`matching`] | which vCPUs' counters are meant to be the same |
//! | [`pvclock`] | nanoseconds from a counter, and the structures by which a guest does the same |
//! | [`vm`] | the clock of a VM, which all of its vCPUs share |
//!
//! All times are in nanoseconds, all counters in ticks; both wrap at 2^64.

pub mod matching;
pub mod pvclock;
pub mod tsc;
pub mod vm;

/// What the host's clocks said at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct HostTime {
    /// Since the host's boot, sleep included, at the hardware's own rate: CLOCK_MONOTONIC_RAW and what was slept.
    pub ns: u64,
    /// CLOCK_REALTIME.
    pub real: u64,
    /// The time-stamp counter.
    pub tsc: u64,
    /// The other two are of exactly that moment of the counter: the host tells the time by it.
    pub by_tsc: bool,
}
