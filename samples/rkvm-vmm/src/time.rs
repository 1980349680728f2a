// SPDX-License-Identifier: GPL-2.0

//! Time as the devices see it: nanoseconds of the host's monotonic clock, in one integer.
//!
//! Devices never read the clock themselves; they are told what time it is, so that tests can tell
//! them whatever they like.

use std::time::Duration;

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub type Nanos = u64;

/// A second, in nanoseconds.
pub const SECOND: Nanos = 1_000_000_000;

/// A millisecond, in nanoseconds.
pub const MILLISECOND: Nanos = 1_000_000;

/// Returns the host's monotonic time.
pub fn now() -> Nanos {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `ts` is a valid, writable timespec. The call cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as Nanos * SECOND + ts.tv_nsec as Nanos
}

/// Returns the host's time of day since 1970-01-01 00:00 UTC.
pub fn time_of_day() -> Duration {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
}
