// SPDX-License-Identifier: GPL-2.0

//! Memslots: which guest frames are backed by which user memory.
//!
//! A set of them does not change: an update makes a new set, which shares what it can with the old,
//! and publishes it as a whole.

use super::log::DirtyLog;
use super::tree::Tree;
use crate::bindings::kvm_userspace_memory_region;
use crate::bindings::KVM_MEM_READONLY;
use crate::linux::mmu_notifier::HvaRange;
use core::ops::Range;
use kernel::prelude::*;
use kernel::sync::Arc;

/// How many memslots a user can give a VM; their numbers are below (KVM_CAP_NR_MEMSLOTS). As many as in KVM:
/// numbers there are 16-bit and signed, and three are KVM's own.
pub(crate) const MAX_SLOTS: u32 = 32764;

/// A memslot.
///
/// # Invariants
///
/// `gfns` and `hvas` are not empty and are as many pages; `hvas` starts and ends with a page.
#[derive(Clone)]
pub(crate) struct Slot {
    /// Its number.
    pub(crate) id: u32,
    /// The user's flags, KVM_MEM_*.
    pub(crate) flags: u32,
    /// The guest frames.
    pub(crate) gfns: Range<u64>,
    /// The user addresses that back them.
    pub(crate) hvas: HvaRange,
    /// The guest must not write: writes are MMIO.
    pub(crate) read_only: bool,
    /// Where the guest's writes are logged, if they are.
    pub(crate) log: Option<DirtyLog>,
    /// It is about to be deleted or moved: the guest's accesses wait.
    pub(crate) leaving: bool,
}

impl Slot {
    /// The slot that the user describes; `None` if anything is not whole pages, or does not fit in
    /// 64 bits, or the size is 0.
    pub(crate) fn new(region: &kvm_userspace_memory_region) -> Option<Self> {
        let size = region.memory_size;
        let gpa = region.guest_phys_addr;
        let hva = region.userspace_addr;
        if size == 0 || (size | gpa | hva) & 0xfff != 0 {
            return None;
        }
        // The last byte's address must fit; a range of gfns then does, even where gpas end at 2^64.
        let last = gpa.checked_add(size.wrapping_sub(1))?;
        // INVARIANT: Both are `size` bytes of whole pages.
        Some(Self {
            id: region.slot,
            flags: region.flags,
            gfns: gpa >> 12..(last >> 12).wrapping_add(1),
            hvas: hva..hva.checked_add(size)?,
            read_only: region.flags & KVM_MEM_READONLY != 0,
            log: None,
            leaving: false,
        })
    }

    /// How many pages it has.
    pub(crate) fn pages(&self) -> u64 {
        self.gfns.end.wrapping_sub(self.gfns.start)
    }

    /// The user address of `gfn`, which is in the slot.
    #[inline]
    pub(crate) fn hva_of(&self, gfn: u64) -> u64 {
        let index = gfn.wrapping_sub(self.gfns.start);
        self.hvas.start.wrapping_add(index << 12)
    }

    /// The frames that any of `hvas` back.
    fn gfns_of(&self, hvas: &HvaRange) -> Option<Range<u64>> {
        let start = hvas.start.max(self.hvas.start);
        let end = hvas.end.min(self.hvas.end);
        if start >= end {
            return None;
        }
        // Both are inside the slot, so nothing wraps.
        let gfn_of =
            |hva: u64| (hva.wrapping_sub(self.hvas.start) >> 12).wrapping_add(self.gfns.start);
        Some(gfn_of(start)..gfn_of(end.wrapping_sub(1)).wrapping_add(1))
    }
}

/// All memslots of a VM at some moment, found by each of the things that one knows of them.
///
/// # Invariants
///
/// Each slot is in all three, by its frames, its user addresses and its number; no two have the same
/// number or a frame in common. `logged` of them have a log.
pub(crate) struct Slots {
    by_gfn: Tree,
    /// Several slots may map the same addresses.
    by_hva: Tree,
    by_id: Tree,
    logged: u32,
}

impl Slots {
    /// No memslot.
    pub(crate) const fn empty() -> Self {
        Self {
            by_gfn: Tree::empty(),
            by_hva: Tree::empty(),
            by_id: Tree::empty(),
            logged: 0,
        }
    }

    /// The slot that has `gfn`.
    #[inline]
    pub(crate) fn find(&self, gfn: u64) -> Option<&Slot> {
        self.by_gfn.find(gfn).map(|slot| &**slot)
    }

    /// Returns if the guest's writes to any of them are logged.
    pub(crate) fn are_logged(&self) -> bool {
        self.logged != 0
    }

    /// The slot with a number.
    pub(crate) fn by_id(&self, id: u32) -> Option<&Slot> {
        self.by_id.find(u64::from(id)).map(|slot| &**slot)
    }

    /// Returns if a slot other than `id` has any of `gfns`.
    pub(crate) fn occupied(&self, gfns: &Range<u64>, id: u32) -> bool {
        self.by_gfn
            .overlapping(gfns.clone())
            .any(|slot| slot.id != id)
    }

    /// Returns if any of `hvas` back a frame.
    #[inline]
    pub(crate) fn maps_any(&self, hvas: &HvaRange) -> bool {
        self.by_hva.any_overlaps(hvas)
    }

    /// The frames that any of `hvas` back: a range for each slot that has some.
    pub(crate) fn gfns_of<'a>(
        &'a self,
        hvas: &'a HvaRange,
    ) -> impl Iterator<Item = Range<u64>> + 'a {
        self.by_hva
            .overlapping(hvas.clone())
            .filter_map(|slot| slot.gfns_of(hvas))
    }

    /// A set where slot `id`, if there is one, is `new`, or is not. ENOMEM.
    ///
    /// `new` overlaps none of the others.
    pub(crate) fn with(&self, id: u32, new: Option<Slot>) -> Result<KBox<Self>> {
        let number = u64::from(id)..u64::from(id).wrapping_add(1);
        let mut next = Self {
            by_gfn: self.by_gfn.share(),
            by_hva: self.by_hva.share(),
            by_id: self.by_id.share(),
            logged: self.logged,
        };
        if let Some(old) = self.by_id.find(number.start) {
            next.by_gfn = next.by_gfn.without(old.gfns.clone(), old)?;
            next.by_hva = next.by_hva.without(old.hvas.clone(), old)?;
            next.by_id = next.by_id.without(number.clone(), old)?;
            next.logged = next.logged.saturating_sub(old.log.is_some().into());
        }
        if let Some(new) = new {
            let new = Arc::new(new, GFP_KERNEL_ACCOUNT)?;
            next.by_gfn = next.by_gfn.with(new.gfns.clone(), &new)?;
            next.by_hva = next.by_hva.with(new.hvas.clone(), &new)?;
            next.by_id = next.by_id.with(number, &new)?;
            next.logged = next.logged.saturating_add(new.log.is_some().into());
        }
        // INVARIANT: What was taken out and put in was so in all three, and counted.
        Ok(KBox::new(next, GFP_KERNEL_ACCOUNT)?)
    }
}
