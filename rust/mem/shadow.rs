// SPDX-License-Identifier: GPL-2.0

//! Guest memory for shadow page tables: a fault brings the frame as an EPT violation would, and puts the
//! guest's whole translation in; writes by others than the guest's processors are told to the tables.

use super::access::MemError;
use super::fault::slot_of;
use super::fault::Fault;
use super::slots::Slots;
use super::GuestMemory;
use crate::linux::mm;
use crate::linux::mm::HostPages;
use crate::linux::shrinker::Shrinker;
use crate::linux::shrinker::Shrinks;
use crate::linux::srcu::SrcuGuard;
use crate::mmu::ept::Access;
use crate::mmu::page_of;
use crate::mmu::shadow::Around;
use crate::mmu::shadow::AtHand;
use crate::mmu::shadow::ShadowCounts;
use crate::mmu::shadow::ShadowMapped;
use crate::mmu::shadow::ShadowMmu;
use crate::mmu::shadow::ShadowWant;
use crate::mmu::shadow::VcpuShadow;
use crate::mmu::shadow::Writing;
use crate::tlb::VcpuShared;
use crate::x86::paging::Paging;
use core::ops::Deref;
use core::ops::DerefMut;
use core::ops::Range;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::Arc;

/// What a page fault of the guest's comes to that the guest's own tables allow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShadowFault {
    /// As with EPT.
    Fault(Fault),
    /// The tables, the memslots or the host's mappings have changed: walk again.
    Stale,
    /// The access has to be emulated, as it writes to a table of the guest's.
    Table,
    /// The access has to be emulated for another reason.
    Emulate,
}

/// Reads what is at hand.
fn peek(slots: &Slots, gpa: u64, buf: &mut [u8]) -> bool {
    let gfn = gpa >> 12;
    match slots.find(gfn) {
        Some(slot) if !slot.leaving => {
            let hva = slot.hva_of(gfn) | gpa & 0xfff;
            mm::read_user_atomically(hva, buf).is_ok()
        }
        _ => false,
    }
}

impl GuestMemory {
    /// Whether the guest's tables are shadowed.
    #[inline]
    pub(crate) fn is_shadowed(&self) -> bool {
        self.inner.mmu.shadow().is_some()
    }

    /// Runs `f` with the shadow tables, if there are any, and guest memory at hand.
    fn with_shadow<R>(&self, f: impl FnOnce(&ShadowMmu, &Around<'_>, &Slots) -> R) -> Option<R> {
        let shadow = self.inner.mmu.shadow()?;
        let slots = self.inner.slots.read();
        let peek = |gpa: u64, buf: &mut [u8]| peek(&slots, gpa, buf);
        let around = Around {
            vcpus: self.vcpus(),
            peek: &peek,
            find: &|gfns| self.at_hand(&slots, gfns),
        };
        Some(f(shadow, &around, &slots))
    }

    /// Resolves a page fault that the guest's tables allow: ENOMEM. Sleeps. The current task runs in this memory's address
    /// space.
    pub(crate) fn map_shadow(
        &self,
        vcpu_shadow: &VcpuShadow,
        want: &ShadowWant<'_>,
        access: Access,
        vcpu: &VcpuShared,
    ) -> Result<ShadowFault> {
        let gfn = want.walk.translation.gpa >> 12;
        let attempt = self.with_shadow(|shadow, around, slots| {
            let answer =
                |fault: Option<Fault>| fault.map_or(ShadowFault::Stale, ShadowFault::Fault);
            let slot = match slot_of(slots, gfn, access) {
                Ok(slot) => slot,
                Err(fault) => return Ok(answer(fault)),
            };
            let mapping = match self.look_up(slot, gfn, access, want.largest_leaf()) {
                Ok(mapping) => mapping,
                Err(fault) => return Ok(answer(fault)),
            };
            let mark = || {
                if access.write {
                    slot.mark_dirty(gfn, vcpu);
                }
            };
            let changes = self.inner.mmu.changes();
            let mapped = shadow.map(around, changes, vcpu_shadow, mapping, want, mark)?;
            Ok(match mapped {
                ShadowMapped::Done(level) => ShadowFault::Fault(Fault::Mapped(level)),
                ShadowMapped::Stale => ShadowFault::Stale,
                ShadowMapped::Table => ShadowFault::Table,
                ShadowMapped::Emulate => ShadowFault::Emulate,
            })
        });
        attempt.unwrap_or(Ok(ShadowFault::Stale))
    }

    /// What backs consecutive frames, as far as it is at hand and could be written: one that could not might be about to be
    /// replaced by a copy. With the lock of the shadow tables held: who takes it away later waits for that, and finds
    /// what was made of it.
    fn at_hand(&self, slots: &Slots, gfns: Range<u64>) -> Option<AtHand> {
        let slot = slots
            .find(gfns.start)
            .filter(|slot| !slot.leaving && !slot.read_only)?;
        let count = gfns.end.min(slot.gfns.end).wrapping_sub(gfns.start);
        let hva = slot.hva_of(gfns.start);
        let hvas = hva..hva.wrapping_add(count << 12);
        if self.inner.mmu.changes().in_progress(&hvas) || !self.inner.is_current() {
            return None;
        }
        Some(AtHand {
            pages: HostPages::at_hand(hva, count as usize),
            logged: slot.log.is_some(),
        })
    }

    /// Checks all shadow tables, and says what is wrong.
    pub(crate) fn audit_shadow(&self) {
        let right = self.with_shadow(|shadow, around, slots| {
            let host = |gfn: u64| {
                let slot = slots.find(gfn).filter(|slot| !slot.leaving)?;
                let hva = slot.hva_of(gfn);
                if self.inner.mmu.changes().in_progress(&page_of(hva)) {
                    return None;
                }
                mm::host_frame_at_hand(hva)
            };
            shadow.audit(around, &host)
        });
        if right == Some(false) {
            kernel::warn_on!(true);
        }
    }

    /// Loads the root for what the guest has in its registers; what CR3 of the processor is to be: ENOMEM. Sleeps.
    pub(crate) fn load_shadow(&self, vcpu: &mut VcpuShadow, paging: &Paging) -> Result<u64> {
        let nothing = self.inner.mmu.nothing();
        self.with_shadow(|shadow, around, slots| {
            let backed = |gfn| slots.find(gfn).is_some();
            shadow.load(around, vcpu, paging, backed, nothing)
        })
        .unwrap_or(Ok(nothing))
    }

    /// The guest invalidates what its processor knows of an address.
    pub(crate) fn invalidate_shadow(&self, vcpu: &VcpuShadow, linear: u64) {
        self.with_shadow(|shadow, around, _| shadow.invalidate(around, vcpu, linear));
    }

    /// Forgets the tables that a frame was for the guest.
    pub(crate) fn unprotect_shadow(&self, gfn: u64) {
        self.with_shadow(|shadow, around, _| shadow.unprotect(around, gfn));
    }

    /// Forgets all shadow tables: the VMM may have changed the guest's.
    pub(crate) fn forget_shadow(&self) {
        self.with_shadow(|shadow, around, _| shadow.zap_all(around, true));
    }

    /// To be held from before a write until [`GuestMemory::shadow_written`], if the oracle wants to know.
    #[inline]
    pub(super) fn shadow_writing(&self) -> Option<Writing<'_>> {
        let shadow = self.inner.mmu.shadow()?;
        (crate::parameters::mmu_audit() != 0).then(|| shadow.writing())
    }

    /// `len` bytes at `gpa` were written by others than the guest's processors.
    #[inline]
    pub(super) fn shadow_written(&self, gpa: u64, len: u64) {
        if let Some(shadow) = self.inner.mmu.shadow() {
            let around = Around::blind(self.vcpus());
            let (mut at, mut left) = (gpa, len);
            while left != 0 {
                let here = left.min(0x1000 - (at & 0xfff));
                shadow.written(&around, at, here);
                at = at.wrapping_add(here);
                left = left.wrapping_sub(here);
            }
        }
    }

    /// Sets how many pages shadow tables may take, for good.
    pub(crate) fn set_shadow_limit(&self, pages: usize) {
        self.inner.limited.store(true, Ordering::Relaxed);
        self.apply_shadow_limit(pages);
    }

    pub(super) fn apply_shadow_limit(&self, pages: usize) {
        if let Some(shadow) = self.inner.mmu.shadow() {
            shadow.set_limit(&Around::blind(self.vcpus()), pages);
        }
    }

    /// Has the host take shadow pages back when it runs short of memory, as long as the result lives: ENOMEM.
    pub(crate) fn shrinker(this: &Arc<Self>) -> Result<Option<Shrinker<Self>>> {
        match this.is_shadowed() {
            true => Shrinker::register(this.clone()).map(Some),
            false => Ok(None),
        }
    }

    /// What shadow tables there are.
    pub(crate) fn shadow_counts(&self) -> Option<ShadowCounts> {
        self.inner.mmu.shadow().map(ShadowMmu::counts)
    }
}

impl Shrinks for GuestMemory {
    fn count(&self) -> u64 {
        let counts = self.shadow_counts();
        counts.map_or(0, |counts| counts.pages.saturating_add(counts.idle))
    }

    fn scan(&self, nr: u64) -> u64 {
        let around = Around::blind(self.vcpus());
        let shadow = self.inner.mmu.shadow();
        shadow.map_or(0, |shadow| shadow.shrink(&around, nr as usize))
    }
}

/// What a vCPU knows of the shadow tables that it runs on. They are given back with it.
pub(crate) struct VcpuTables {
    memory: Arc<GuestMemory>,
    shadow: KBox<VcpuShadow>,
}

impl VcpuTables {
    /// For a new vCPU, if it is to run on shadow tables: ENOMEM.
    pub(crate) fn new(memory: &Arc<GuestMemory>) -> Result<Option<Self>> {
        if !memory.is_shadowed() {
            return Ok(None);
        }
        Ok(Some(Self {
            memory: memory.clone(),
            shadow: KBox::new(VcpuShadow::new()?, GFP_KERNEL_ACCOUNT)?,
        }))
    }
}

impl Deref for VcpuTables {
    type Target = VcpuShadow;

    #[inline]
    fn deref(&self) -> &VcpuShadow {
        &self.shadow
    }
}

impl DerefMut for VcpuTables {
    #[inline]
    fn deref_mut(&mut self) -> &mut VcpuShadow {
        &mut self.shadow
    }
}

impl Drop for VcpuTables {
    fn drop(&mut self) {
        if let Some(shadow) = self.memory.inner.mmu.shadow() {
            let around = Around::blind(self.memory.vcpus());
            shadow.put_roots(&around, &mut self.shadow);
        }
    }
}

/// Guest memory as a walk of the guest's tables sees it, for a vCPU: with the memslots of one moment, as those that are
/// changed meanwhile wait for it.
pub(crate) struct WalkMemory<'a> {
    memory: &'a GuestMemory,
    vcpu: &'a VcpuShared,
    slots: SrcuGuard<'a, Slots>,
    /// Guest frames of the memslot that was looked at last, and the user address of the first: most tables are in one.
    last: (Range<u64>, u64),
}

impl<'a> WalkMemory<'a> {
    pub(crate) fn new(memory: &'a GuestMemory, vcpu: &'a VcpuShared) -> Self {
        Self {
            memory,
            vcpu,
            slots: memory.inner.slots.read(),
            last: (0..0, 0),
        }
    }

    /// The user address of a guest-physical one, if there is a memslot.
    #[inline]
    fn hva(&mut self, gpa: u64) -> Option<u64> {
        let gfn = gpa >> 12;
        if !self.last.0.contains(&gfn) {
            let slot = self.slots.find(gfn).filter(|slot| !slot.leaving)?;
            self.last = (slot.gfns.clone(), slot.hvas.start);
        }
        let (gfns, start) = &self.last;
        let offset = gfn.wrapping_sub(gfns.start) << 12 | gpa & 0xfff;
        Some(start.wrapping_add(offset))
    }
}

type WalkError = crate::x86::paging::MemoryError<u64>;

fn walk_error(error: MemError, gpa: u64) -> WalkError {
    match error {
        MemError::NoSlot => WalkError::Mmio,
        MemError::Fault => WalkError::Host(gpa),
    }
}

impl crate::x86::paging::GuestMemory for WalkMemory<'_> {
    /// The guest-physical address that cannot be reached.
    type Error = u64;

    #[inline]
    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), WalkError> {
        let hva = self.hva(gpa).ok_or(WalkError::Mmio)?;
        mm::read_user(hva, buf).map_err(|_| WalkError::Host(gpa))
    }

    /// Not asked for by walks.
    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), WalkError> {
        let written = self.memory.write(gpa, data, self.vcpu);
        written.map_err(|e| walk_error(e, gpa))
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, WalkError> {
        let marked = self.memory.mark_entry(gpa, len, old, new, self.vcpu);
        marked.map_err(|e| walk_error(e, gpa))
    }
}
