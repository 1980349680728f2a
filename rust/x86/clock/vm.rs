// SPDX-License-Identifier: GPL-2.0

//! The clock of a VM.
//!
//! It is the host's time and an offset. While all counters agree, and the host's time is computed from its own, the
//! clock is computed from a *master* copy of both, taken at one moment: who has the counter then has the clock, on every
//! vCPU the same, to the nanosecond. Two copies would differ by what their roundings do, so that a time read on one vCPU
//! could come before an earlier one of another: a copy is replaced only while no vCPU runs.

use super::pvclock::NsScale;
use super::pvclock::VcpuTime;
use super::pvclock::TSC_STABLE;
use super::tsc::GuestTsc;
use super::HostTime;

/// The host's counter and its time, of one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Master {
    tsc: u64,
    ns: u64,
}

/// The clock of a VM.
#[derive(Clone, Copy, Debug)]
pub struct VmClock {
    /// What it has more than the host's time.
    offset: u64,
    master: Option<Master>,
    /// Of the host's counter.
    host: NsScale,
}

impl VmClock {
    /// A clock that begins now, on a host whose counter is of `host_khz`.
    #[must_use]
    pub fn new(host_khz: u32, now: &HostTime) -> Self {
        Self {
            offset: now.ns.wrapping_neg(),
            master: None,
            host: NsScale::new(host_khz),
        }
    }

    /// Whether there is a master copy.
    #[must_use]
    pub const fn has_master(&self) -> bool {
        self.master.is_some()
    }

    /// What it says.
    #[must_use]
    pub fn read(&self, now: &HostTime) -> u64 {
        let ns = match self.master {
            Some(master) => self.extrapolate(master, now.tsc),
            None => now.ns,
        };
        ns.wrapping_add(self.offset)
    }

    /// Host time by the master copy.
    const fn extrapolate(&self, master: Master, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(master.tsc);
        master.ns.wrapping_add(self.host.ns(ticks))
    }

    /// Takes the master copy anew, or does without if there `may_be` none. The clock does not go back: should the copy
    /// have been ahead of the host's time, so is the clock from now on. No vCPU runs.
    pub fn renew(&mut self, now: &HostTime, may_be: bool) {
        if let Some(old) = self.master {
            let ahead = self.extrapolate(old, now.tsc).wrapping_sub(now.ns) as i64;
            // More than that is no rounding: the host's counter has leapt.
            if ahead > 0 && ahead < 1_000_000_000 {
                self.offset = self.offset.wrapping_add(ahead as u64);
            }
        }
        self.master = (may_be && now.by_tsc).then_some(Master {
            tsc: now.tsc,
            ns: now.ns,
        });
    }

    /// Forgets the master copy, which the host's counter has nothing to do with any more.
    pub fn host_restarted(&mut self) {
        self.master = None;
    }

    /// Makes it say `clock` now. The master copy, if there is to be one, has just been taken. No vCPU runs.
    pub fn set(&mut self, clock: u64, now: &HostTime) {
        let ns = self.master.map_or(now.ns, |master| master.ns);
        self.offset = clock.wrapping_sub(ns);
    }

    /// When it began, in nanoseconds since 1970.
    #[must_use]
    pub fn epoch(&self, now: &HostTime) -> u64 {
        now.real.wrapping_sub(self.read(now))
    }

    /// The time of a vCPU with this counter.
    #[must_use]
    pub fn vcpu_time(&self, tsc: GuestTsc, now: &HostTime) -> VcpuTime {
        let (host_tsc, ns, flags) = match self.master {
            Some(master) => (master.tsc, master.ns, TSC_STABLE),
            None => (now.tsc, now.ns, 0),
        };
        // That of the counter as it really runs.
        let scale = if tsc.scale.is_unity() {
            self.host
        } else {
            NsScale::new(tsc.scale.guest_khz())
        };
        VcpuTime {
            tsc_timestamp: tsc.at(host_tsc),
            system_time: ns.wrapping_add(self.offset),
            scale,
            flags,
        }
    }
}
