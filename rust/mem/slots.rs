// SPDX-License-Identifier: GPL-2.0

//! Memslots: which guest frames are backed by which user memory.
//!
//! A set of them does not change: an update makes a new set and publishes it as a whole.

use super::log::DirtyLog;
use crate::bindings::kvm_userspace_memory_region;
use crate::bindings::KVM_MEM_READONLY;
use crate::linux::mmu_notifier::HvaRange;
use core::ops::Range;
use kernel::prelude::*;

/// How many memslots a VM can have; their numbers are below (KVM_CAP_NR_MEMSLOTS).
pub(crate) const MAX_SLOTS: u32 = 1024;

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

/// All memslots of a VM at some moment.
///
/// # Invariants
///
/// `list` is sorted by `gfns`, and no two slots overlap.
pub(crate) struct Slots {
    list: KVVec<Slot>,
    /// Counts the sets.
    pub(crate) generation: u64,
}

impl Slots {
    /// No memslot.
    pub(crate) const fn empty() -> Self {
        Self {
            list: KVVec::new(),
            generation: 0,
        }
    }

    /// The slot that has `gfn`.
    #[inline]
    pub(crate) fn find(&self, gfn: u64) -> Option<&Slot> {
        let after = self.list.partition_point(|slot| slot.gfns.start <= gfn);
        let slot = self.list.get(after.checked_sub(1)?)?;
        (gfn < slot.gfns.end).then_some(slot)
    }

    /// All slots, by guest frame.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.list.iter()
    }

    /// The slot with a number.
    pub(crate) fn by_id(&self, id: u32) -> Option<&Slot> {
        self.list.iter().find(|slot| slot.id == id)
    }

    /// Returns if a slot other than `id` has any of `gfns`.
    pub(crate) fn occupied(&self, gfns: &Range<u64>, id: u32) -> bool {
        self.list
            .iter()
            .any(|slot| slot.id != id && slot.gfns.start < gfns.end && gfns.start < slot.gfns.end)
    }

    /// The frames that any of `hvas` back: a range for each slot that has some.
    pub(crate) fn gfns_of<'a>(
        &'a self,
        hvas: &'a HvaRange,
    ) -> impl Iterator<Item = Range<u64>> + Clone + 'a {
        self.list.iter().filter_map(|slot| slot.gfns_of(hvas))
    }

    /// A copy where slot `id`, if there is one, is `new`, or is not. ENOMEM.
    ///
    /// `new` overlaps none of the others.
    pub(crate) fn with(&self, id: u32, new: Option<Slot>) -> Result<KBox<Self>> {
        let room = self.list.len().saturating_add(1);
        let mut list = KVVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
        // There is room for all, so this does not fail.
        let mut push = |slot| list.push_within_capacity(slot).map_err(|_| ENOMEM);
        let mut new = new;
        for slot in self.list.iter().filter(|slot| slot.id != id) {
            if let Some(before) = new.take_if(|new| new.gfns.start < slot.gfns.start) {
                push(before)?;
            }
            push(slot.clone())?;
        }
        if let Some(last) = new {
            push(last)?;
        }
        // INVARIANT: `self.list` was sorted, and `new` was put before the first that comes after.
        Ok(KBox::new(
            Self {
                list,
                generation: self.generation.wrapping_add(1),
            },
            GFP_KERNEL_ACCOUNT,
        )?)
    }
}
