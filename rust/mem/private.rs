// SPDX-License-Identifier: GPL-2.0

//! Memslots that are not the user's: pages that the processor needs in a guest's memory, backed by user memory all the
//! same, which the kernel maps.

use super::slots::Slot;
use super::slots::MAX_SLOTS;
use super::GuestMemory;
use crate::bindings::kvm_userspace_memory_region;
use crate::linux::mm;
use crate::linux::mm::UserPages;
use kernel::prelude::*;

/// What such a memslot is for. The numbers are those that the user's leave.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Private {
    /// The task-state segment of virtual-8086 mode.
    TaskState = MAX_SLOTS,
    /// A table that maps each linear address to itself.
    IdentityMap = MAX_SLOTS + 1,
}

/// A memslot of this kind, to be given to [`GuestMemory::remove_private`].
pub(crate) struct PrivateSlot {
    kind: Private,
    pages: UserPages,
}

impl PrivateSlot {
    /// Writes to it, at an offset: EFAULT if the user has unmapped it.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result {
        mm::write_user(self.pages.addr().wrapping_add(offset), data)
    }
}

impl GuestMemory {
    /// Makes a memslot of zeroes at `gpa`: EEXIST if another is in the way, EINVAL if there is no such
    /// address, ENOMEM. The current task runs in this memory's address space.
    pub(crate) fn add_private(&self, kind: Private, gpa: u64, size: u64) -> Result<PrivateSlot> {
        let pages = UserPages::map(size)?;
        let region = kvm_userspace_memory_region {
            slot: kind as u32,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: pages.addr(),
        };
        let added = match Slot::new(&region) {
            Some(slot) if slot.gfns.end <= self.gfn_limit() => {
                self.set_slot(region.slot, Some(slot))
            }
            _ => Err(EINVAL),
        };
        match added {
            Ok(()) => Ok(PrivateSlot { kind, pages }),
            Err(e) => {
                pages.unmap();
                Err(e)
            }
        }
    }

    /// Takes it away. If the current task does not run in this memory's address space, nobody needs to: that
    /// has gone, or goes with its process.
    pub(crate) fn remove_private(&self, slot: PrivateSlot) {
        if self.is_current() && self.set_slot(slot.kind as u32, None).is_ok() {
            slot.pages.unmap();
        }
    }
}
