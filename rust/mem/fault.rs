// SPDX-License-Identifier: GPL-2.0

//! The guest has touched what EPT does not map, or not so: find out what is there, and map it.

use super::slots::Slot;
use super::slots::Slots;
use super::GuestMemory;
use crate::linux::mm;
use crate::linux::mm::HostFrame;
use crate::linux::mm::NoFrame;
use crate::linux::page::KernelPage;
use crate::linux::task::signal_pending;
use crate::linux::unsupported;
use crate::mmu::ept::Access;
use crate::mmu::ept::Level;
use crate::mmu::page_of;
use crate::mmu::Mapped;
use crate::mmu::Mapping;
use crate::tlb::VcpuShared;
use core::ops::Range;
use kernel::prelude::*;

/// What an EPT violation comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// It is mapped, by a leaf of at least this level: the guest may go on.
    Mapped(Level),
    /// There is no memslot, or a read-only one is to be written.
    Mmio,
    /// A signal is pending: KVM_RUN ends with EINTR.
    Interrupted,
    /// The page behind this host address had a memory error.
    HwPoison(u64),
    /// The user has nothing mapped at this host address, or not with the access that is needed:
    /// KVM_RUN ends with EFAULT.
    BadHva(u64),
}

/// The slot that a fault is in; else the answer to it, or none if the slot is going.
pub(super) fn slot_of(slots: &Slots, gfn: u64, access: Access) -> Result<&Slot, Option<Fault>> {
    let Some(slot) = slots.find(gfn) else {
        return Err(Some(Fault::Mmio));
    };
    if slot.leaving {
        return Err(None);
    }
    if access.write && slot.read_only {
        return Err(Some(Fault::Mmio));
    }
    Ok(slot)
}

impl GuestMemory {
    /// Resolves an EPT violation of `vcpu` at `gpa`: ENOMEM. Sleeps. The current task runs in this
    /// memory's address space, or the answer is [`Fault::BadHva`].
    pub(crate) fn map(&self, gpa: u64, access: Access, vcpu: &VcpuShared) -> Result<Fault> {
        let gfn = gpa >> 12;
        loop {
            if let Some(fault) = self.try_map(gfn, access, vcpu)? {
                return Ok(fault);
            }
            // The memslot is being moved, or the host is changing its mappings. It would be of no
            // use to hurry; and neither waits for this thread.
            if signal_pending() {
                return Ok(Fault::Interrupted);
            }
            mm::cond_resched();
        }
    }

    /// One attempt; `None` if something changed meanwhile.
    fn try_map(&self, gfn: u64, access: Access, vcpu: &VcpuShared) -> Result<Option<Fault>> {
        let slots = self.inner.slots.read();
        let slot = match slot_of(&slots, gfn, access) {
            Ok(slot) => slot,
            Err(answer) => return Ok(answer),
        };
        let mmu = &self.inner.mmu;
        // With the MMU lock held the thread is not preempted: the mark does not come long after others
        // may write to the page.
        let mark = || {
            if access.write {
                slot.mark_dirty(gfn, vcpu);
            }
        };
        if slot.log.is_some() && access.write && mmu.write_again(gfn, mark) {
            return Ok(Some(Fault::Mapped(Level::Page4K)));
        }
        let mapping = match self.look_up(slot, gfn, access, mmu.format().max_leaf) {
            Ok(mapping) => mapping,
            Err(answer) => return Ok(answer),
        };
        let mapped = mmu.map(mapping, mark)?;
        Ok(match mapped {
            Mapped::Done(level) => Some(Fault::Mapped(level)),
            Mapped::Stale => None,
        })
    }

    /// What is to be mapped at a frame of a slot, by a leaf that is no larger than `largest`; else the answer to the fault, or
    /// none if something is changing.
    pub(super) fn look_up(
        &self,
        slot: &Slot,
        gfn: u64,
        access: Access,
        largest: Level,
    ) -> Result<Mapping, Option<Fault>> {
        let mmu = &self.inner.mmu;
        let hva = slot.hva_of(gfn);
        // Before the look-up: see mmu/invalidation.rs.
        let noted = mmu.changes().sequence();
        if mmu.changes().in_progress(&page_of(hva)) {
            return Err(None);
        }
        // A frame of another address space would be one that nobody tells us about.
        if !self.inner.is_current() {
            return Err(Some(Fault::BadHva(hva)));
        }
        let mut frame = match mm::host_frame(hva, access.write, !slot.read_only) {
            Ok(frame) => frame,
            Err(NoFrame::Interrupted) => return Err(Some(Fault::Interrupted)),
            Err(NoFrame::Poisoned) => return Err(Some(Fault::HwPoison(hva))),
            Err(NoFrame::BadAddress) => return Err(Some(Fault::BadHva(hva))),
        };
        frame.writable &= !slot.read_only;
        Ok(Mapping {
            gfn,
            level: self.leaf_level(slot, gfn, &frame, access, largest),
            frame,
            hva,
            noted,
            access,
            logged: slot.log.is_some(),
        })
    }

    /// Maps a page of the kernel's at a guest frame that no memslot has; returns if so. ENOMEM. Should a
    /// memslot come to have it, the page is unmapped. It stays as long as this memory.
    pub(crate) fn map_own(&self, gfn: u64, page: &KernelPage) -> Result<bool> {
        // Only EPT can tell the guest's accesses to it from others.
        if self.inner.mmu.shadow().is_some() {
            return Ok(false);
        }
        // Who adds a memslot waits for this section, and unmaps the page after that.
        let slots = self.inner.slots.read();
        if slots.find(gfn).is_some() {
            return Ok(false);
        }
        let mmu = &self.inner.mmu;
        let mapping = Mapping {
            gfn,
            level: Level::Page4K,
            frame: HostFrame {
                pfn: page.phys() >> 12,
                writable: true,
                mmio: false,
                page: None,
            },
            // The user's mappings have nothing to do with it, and none is here.
            hva: 0,
            noted: mmu.changes().sequence(),
            access: Access::READ_WRITE,
            logged: false,
        };
        // If the host is changing that very address, the guest asks again.
        mmu.map(mapping, || {})?;
        Ok(true)
    }

    /// Maps what backs the guest-physical addresses `range`, whole pages, as a read of the guest's
    /// would, but does not mark it accessed. What is done is taken off the start of `range`.
    ///
    /// If nothing could be done: EINTR; ENOENT if there is no memslot; EFAULT if the user has nothing
    /// mapped there; ENOMEM. Sleeps. The current task runs in this memory's address space.
    pub(crate) fn map_ahead(&self, range: &mut Range<u64>, vcpu: &VcpuShared) -> Result {
        if self.inner.mmu.shadow().is_some() {
            return Err(unsupported());
        }
        let first = range.start;
        while range.start < range.end {
            if let Err(e) = self.map_leaf_ahead(range, vcpu) {
                return if range.start == first { Err(e) } else { Ok(()) };
            }
            mm::cond_resched();
        }
        Ok(())
    }

    /// One leaf of [`Self::map_ahead`].
    fn map_leaf_ahead(&self, range: &mut Range<u64>, vcpu: &VcpuShared) -> Result {
        if signal_pending() {
            return Err(EINTR);
        }
        match self.map(range.start, Access::NONE, vcpu)? {
            Fault::Mapped(level) => {
                // The leaf may begin before the range and end after it.
                let last = range.start | level.mask() << 12 | 0xfff;
                range.start = last.saturating_add(1).min(range.end);
                Ok(())
            }
            Fault::Mmio => Err(ENOENT),
            Fault::Interrupted => Err(EINTR),
            Fault::HwPoison(hva) => {
                mm::send_hwpoison(hva);
                Err(EINTR)
            }
            Fault::BadHva(_) => Err(EFAULT),
        }
    }

    /// The largest leaf for `gfn`, but no larger than `largest`, all of whose frames are in the slot and are mapped by the
    /// host with one entry, in the same place of the leaf.
    fn leaf_level(
        &self,
        slot: &Slot,
        gfn: u64,
        frame: &HostFrame,
        access: Access,
        largest: Level,
    ) -> Level {
        // Writes are logged by the small page.
        if largest == Level::Page4K
            || frame.page.is_none()
            || slot.log.is_some()
            || access.exec && self.inner.mmu.format().nx_huge
        {
            return Level::Page4K;
        }
        let hva = slot.hva_of(gfn);
        let host = Level::from_number(mm::host_mapping_level(self.inner.mm(), hva));
        let mut level = host.min(largest);
        let gfns = &slot.gfns;
        while let Some(below) = level.below() {
            let mask = level.mask();
            let first = gfn & !mask;
            let inside = first >= gfns.start && gfns.end.wrapping_sub(first) > mask;
            let aligned = ((gfn ^ hva >> 12) | (gfn ^ frame.pfn)) & mask == 0;
            if inside && aligned {
                break;
            }
            level = below;
        }
        level
    }
}
