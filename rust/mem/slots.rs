// SPDX-License-Identifier: GPL-2.0

//! Memslots: which guest frames are backed by which user memory.
//!
//! A set of them does not change: an update makes a new set and publishes it as a whole.

use crate::linux::mmu_notifier::HvaRange;
use core::ops::Range;
use kernel::prelude::*;

/// How many memslots a VM can have; their numbers are below (KVM_CAP_NR_MEMSLOTS).
pub(crate) const MAX_SLOTS: u32 = 1024;

/// A memslot.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    /// Its number.
    pub(crate) id: u32,
    /// The user's flags, KVM_MEM_*.
    pub(crate) flags: u32,
    /// The first guest frame.
    pub(crate) base_gfn: u64,
    /// How many frames; at least one. `base_gfn + pages` is no overflow.
    pub(crate) pages: u64,
    /// The user address of the first frame. `hva + pages * 4096` is no overflow.
    pub(crate) hva: u64,
    /// The guest must not write: writes are MMIO.
    pub(crate) read_only: bool,
    /// It is about to be deleted or moved: the guest's accesses wait.
    pub(crate) leaving: bool,
}

impl Slot {
    /// The guest frames.
    #[inline]
    pub(crate) fn gfns(&self) -> Range<u64> {
        self.base_gfn..self.base_gfn + self.pages
    }

    /// The user addresses.
    #[inline]
    pub(crate) fn hvas(&self) -> HvaRange {
        self.hva..self.hva + (self.pages << 12)
    }

    /// The user address of `gfn`, which is in the slot.
    #[inline]
    pub(crate) fn hva_of(&self, gfn: u64) -> u64 {
        self.hva + (gfn.wrapping_sub(self.base_gfn) << 12)
    }

    /// The frames that any of `hvas` back.
    fn gfns_of(&self, hvas: &HvaRange) -> Option<Range<u64>> {
        let own = self.hvas();
        let start = hvas.start.max(own.start);
        let end = hvas.end.min(own.end);
        if start >= end {
            return None;
        }
        let first = (start - self.hva) >> 12;
        let last = (end - 1 - self.hva) >> 12;
        Some(self.base_gfn + first..self.base_gfn + last + 1)
    }
}

/// All memslots of a VM at some moment.
///
/// # Invariants
///
/// `list` is sorted by `base_gfn`, and no two slots overlap.
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
        let after = self.list.partition_point(|slot| slot.base_gfn <= gfn);
        let slot = self.list.get(after.checked_sub(1)?)?;
        (gfn < slot.gfns().end).then_some(slot)
    }

    /// The slot with a number.
    pub(crate) fn by_id(&self, id: u32) -> Option<&Slot> {
        self.list.iter().find(|slot| slot.id == id)
    }

    /// Returns if a slot other than `id` has any of `gfns`.
    pub(crate) fn occupied(&self, gfns: &Range<u64>, id: u32) -> bool {
        self.list.iter().any(|slot| {
            let own = slot.gfns();
            slot.id != id && own.start < gfns.end && gfns.start < own.end
        })
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
        let room = self.list.len() + 1;
        let mut list = KVVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
        let mut new = new;
        for slot in self.list.iter().filter(|slot| slot.id != id) {
            if let Some(before) = new.take_if(|new| new.base_gfn < slot.base_gfn) {
                list.push(before, GFP_KERNEL_ACCOUNT)?;
            }
            list.push(*slot, GFP_KERNEL_ACCOUNT)?;
        }
        if let Some(last) = new {
            list.push(last, GFP_KERNEL_ACCOUNT)?;
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
