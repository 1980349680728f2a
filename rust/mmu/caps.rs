// SPDX-License-Identifier: GPL-2.0

//! What the processor can do for a guest's address translation: what a backend tells the MMU.

use super::ept::EptCaps;

/// How guests' addresses are translated.
#[derive(Clone, Copy)]
pub(crate) enum PagingCaps {
    /// In two stages: by the guest's own tables, and by ours.
    Ept(EptCaps),
    /// In one, by tables of ours that shadow the guest's.
    Shadow(ShadowCaps),
}

/// What shadow tables may use.
#[derive(Clone, Copy)]
pub(crate) struct ShadowCaps {
    /// The host's physical-address width.
    pub(crate) phys_bits: u8,
    /// Pages can be made not executable. EFER.NXE is set in the hardware then, whatever the guest's says.
    pub(crate) nx: bool,
    /// Leaves of 1 GiB.
    pub(crate) page_1g: bool,
}
