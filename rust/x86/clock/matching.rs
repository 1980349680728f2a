// SPDX-License-Identifier: GPL-2.0

//! Which counters are meant to be the same.
//!
//! A VMM sets the counters of a VM's vCPUs one after the other, each to what it was when it was read or to 0, and means
//! them to agree. It has no way to say so but by what it writes: values that lie within a second of what the counter
//! written last has come to are taken for the same. (The attribute KVM_VCPU_TSC_OFFSET says it exactly.) Counters that
//! were made the same are one *generation*. A clock that is computed from one of them can be computed from all if every
//! vCPU is of the last generation.

use super::tsc::ns_to_ticks;
use super::tsc::GuestTsc;

/// The moment of a write.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The time.
    pub ns: u64,
    /// The host's counter, on the CPU that writes.
    pub host_tsc: u64,
    /// The counters of the host's CPUs agree.
    pub stable: bool,
}

/// A value that was written, and when.
#[derive(Clone, Copy, Default, Debug)]
struct Written {
    value: u64,
    ns: u64,
    offset: u64,
}

/// The counters of a VM.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counters {
    vcpus: u32,
    /// How many are of this generation, but for the one that began it.
    matched: u32,
    generation: u64,
    first: Written,
    last: Written,
    /// The rate of the counter written last, in kHz; 0 if there was none.
    khz: u32,
    /// The VMM has written one.
    by_vmm: bool,
}

/// What a vCPU has to do with it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Member {
    generation: u64,
    begin: Written,
}

impl Member {
    /// What a counter that runs at `khz` from when its generation began says at the time `ns`.
    #[must_use]
    pub fn ideal(&self, ns: u64, khz: u32) -> u64 {
        let ticks = ns_to_ticks(ns.wrapping_sub(self.begin.ns), khz);
        self.begin.value.wrapping_add(ticks)
    }
}

impl Counters {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Which generation it is.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether all are of one generation.
    #[must_use]
    pub const fn agree(&self) -> bool {
        self.vcpus != 0 && self.matched.wrapping_add(1) == self.vcpus
    }

    /// A vCPU comes, with a counter of `khz`: it starts at 0, or where those that are there have come to. Returns the
    /// counter.
    pub fn join(&mut self, khz: u32, tsc: GuestTsc, now: Moment) -> (Member, GuestTsc) {
        let mut member = Member::default();
        self.vcpus = self.vcpus.saturating_add(1);
        let tsc = self.write_value(&mut member, khz, tsc, 0, now);
        (member, tsc)
    }

    /// The VMM writes `value` to a vCPU's counter. Returns the counter.
    pub fn write(
        &mut self,
        member: &mut Member,
        khz: u32,
        tsc: GuestTsc,
        value: u64,
        now: Moment,
    ) -> GuestTsc {
        let tsc = self.write_value(member, khz, tsc, value, now);
        self.by_vmm = true;
        tsc
    }

    /// The VMM sets a vCPU's offset. Returns the counter.
    pub fn set_offset(
        &mut self,
        member: &mut Member,
        khz: u32,
        tsc: GuestTsc,
        offset: u64,
        now: Moment,
    ) -> GuestTsc {
        let tsc = GuestTsc { offset, ..tsc };
        let matches = self.khz == khz && self.last.offset == offset;
        self.by_vmm = true;
        self.enter(member, khz, tsc, tsc.at(now.host_tsc), now.ns, matches);
        tsc
    }

    /// The host's counter has begun anew, and each guest's was moved by `ticks` to go on nevertheless.
    pub fn host_restarted(&mut self, ticks: u64) {
        for written in [&mut self.first, &mut self.last] {
            written.offset = written.offset.wrapping_add(ticks);
        }
    }

    fn write_value(
        &mut self,
        member: &mut Member,
        khz: u32,
        tsc: GuestTsc,
        value: u64,
        now: Moment,
    ) -> GuestTsc {
        let elapsed = ns_to_ticks(now.ns.wrapping_sub(self.last.ns), khz);
        let expected = self.last.value.wrapping_add(elapsed);
        let second = u64::from(khz).wrapping_mul(1000);
        // A VMM that restores a guest which ran for less than a second does not mean it to agree with what the
        // kernel gave the vCPUs when they were made.
        let close = self.by_vmm
            && value < expected.wrapping_add(second)
            && value.wrapping_add(second) > expected;
        let matches = (value == 0 || close) && self.khz == khz;
        let (value, tsc) = if !matches {
            (value, tsc.saying(value, now.host_tsc))
        } else if now.stable {
            let offset = self.first.offset;
            (value, GuestTsc { offset, ..tsc })
        } else {
            let value = value.wrapping_add(elapsed);
            (value, tsc.saying(value, now.host_tsc))
        };
        self.enter(member, khz, tsc, value, now.ns, matches);
        tsc
    }

    /// Remembers a write; a new generation begins with it unless it `matches`.
    fn enter(
        &mut self,
        member: &mut Member,
        khz: u32,
        tsc: GuestTsc,
        value: u64,
        ns: u64,
        matches: bool,
    ) {
        let written = Written {
            value,
            ns,
            offset: tsc.offset,
        };
        self.last = written;
        self.khz = khz;
        if !matches {
            self.generation = self.generation.wrapping_add(1);
            self.first = written;
            self.matched = 0;
        } else if member.generation != self.generation {
            self.matched = self.matched.saturating_add(1);
        }
        member.generation = self.generation;
        member.begin = self.first;
    }
}
