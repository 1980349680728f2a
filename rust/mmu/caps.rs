// SPDX-License-Identifier: GPL-2.0

//! How this machine can translate guest-physical addresses: by tables of its own (EPT), or only by
//! the tables that it would use without a guest, which have to shadow the guest's.

use super::ept::EptCaps;

/// What a backend has.
#[derive(Clone, Copy)]
pub(crate) enum PagingCaps {
    /// A second stage of translation.
    Ept(EptCaps),
    /// None: the processor is given shadow page tables.
    Shadow(ShadowCaps),
}

/// What shadow page tables may use.
#[derive(Clone, Copy)]
pub(crate) struct ShadowCaps {
    /// The host's physical-address width (CPUID 0x8000_0008 EAX bits 7:0): the guest's addresses end
    /// there too.
    pub(crate) phys_bits: u8,
    /// Large pages must not be executable (the iTLB-multihit erratum).
    pub(crate) nx_huge: bool,
}
