// SPDX-License-Identifier: GPL-2.0

//! Which MSRs a guest may access, as a VMM says (KVM API, KVM_X86_SET_MSR_FILTER): ranges with a bit for each MSR, and what
//! becomes of those that no range has.

use core::ops::Deref;

use super::Msr;

/// Which way a guest accesses an MSR. The values are those of KVM_MSR_FILTER_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Access {
    /// RDMSR.
    Read = 1 << 0,
    /// WRMSR.
    Write = 1 << 1,
}

/// The flags of a range, any of [`Access`].
const RANGE_FLAGS: u32 = Access::Read as u32 | Access::Write as u32;
/// The most words that the bits of a range take (KVM_MSR_FILTER_MAX_BITMAP_SIZE).
const MAX_WORDS: usize = 0x600 / 8;

/// How many words the bits of a range of `count` MSRs take; none if that is too many, or the flags do not do.
#[must_use]
pub fn words(flags: u32, count: u32) -> Option<usize> {
    let words = (count as usize).div_ceil(64);
    (flags != 0 && flags & !RANGE_FLAGS == 0 && words != 0 && words <= MAX_WORDS).then_some(words)
}

/// MSRs in a row, and which of them a guest may access.
///
/// `S` is where the bits are, in words of 64.
#[derive(Clone, Debug)]
pub struct Range<S> {
    flags: u32,
    base: u32,
    count: u32,
    bits: S,
}

impl<S: Deref<Target = [u64]>> Range<S> {
    /// `count` MSRs from `base`, for the accesses in `flags`. MSRs for which `bits` is too short are denied.
    #[must_use]
    pub const fn new(flags: u32, base: u32, count: u32, bits: S) -> Self {
        Self {
            flags,
            base,
            count,
            bits,
        }
    }

    /// What the range says of an access; nothing if it is not about that.
    fn verdict(&self, msr: Msr, access: Access) -> Option<bool> {
        // As in KVM, a range that would go beyond the last number has no MSR at all.
        let end = self.base.wrapping_add(self.count);
        if self.flags & access as u32 == 0 || msr.0 < self.base || msr.0 >= end {
            return None;
        }
        let bit = msr.0.wrapping_sub(self.base);
        let word = self.bits.get((bit / 64) as usize).copied().unwrap_or(0);
        Some((word >> (bit % 64)) & 1 != 0)
    }
}

/// Whether a guest may access an MSR: by the first range that has it, else `default_allow`. The registers of x2APIC mode are
/// never filtered.
#[must_use]
pub fn allows<S: Deref<Target = [u64]>>(
    ranges: &[Range<S>],
    default_allow: bool,
    msr: Msr,
    access: Access,
) -> bool {
    if msr >= Msr::X2APIC_FIRST && msr <= Msr::X2APIC_LAST {
        return true;
    }
    ranges
        .iter()
        .find_map(|range| range.verdict(msr, access))
        .unwrap_or(default_allow)
}
