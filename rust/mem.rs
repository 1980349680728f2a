// SPDX-License-Identifier: GPL-2.0

//! Guest memory: user memory that the user has told us is a guest's, in memslots.
//!
//! There is one [`GuestMemory`] for each VM. It answers the guest's EPT violations ([`fault`]), the
//! host's own accesses to guest memory ([`access`]), and the host's calls when it changes the
//! mappings of that user memory ([`notify`]).
//!
//! It belongs to the address space of the task that made it. Whatever touches user memory must run
//! in that address space; the files' ioctls see to it, and answer EIO otherwise.

pub(crate) mod access;
pub(crate) mod cached;
pub(crate) mod devices;
pub(crate) mod fault;
pub(crate) mod log;
mod notify;
pub(crate) mod private;
pub(crate) mod ring;
pub(crate) mod shadow;
mod slots;
mod tree;

pub(crate) use slots::MAX_SLOTS;

use crate::bindings::kvm_userspace_memory_region;
use crate::bindings::KVM_MEM_LOG_DIRTY_PAGES;
use crate::bindings::KVM_MEM_READONLY;
use crate::linux::mm::user_range_ok;
use crate::linux::mmu_notifier::Listening;
use crate::linux::srcu::SrcuCell;
use crate::mmu::caps::PagingCaps;
use crate::mmu::ept::Level;
use crate::mmu::Mmu;
use crate::tlb::VcpuSet;
use crate::x86::apic::base::DEFAULT_ADDRESS;
use core::ops::Range;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::new_mutex;
use kernel::sync::Mutex;
use log::LogMode;
use slots::Slot;
use slots::Slots;

/// The most pages that a memslot can have, as in KVM: dirty bitmaps count them in 31 bits.
const MAX_PAGES: u64 = (1 << 31) - 1;

/// The memory of one VM.
#[pin_data]
pub(crate) struct GuestMemory {
    #[pin]
    inner: Listening<Inner>,
}

/// What the notifier's callbacks reach too.
#[pin_data]
struct Inner {
    /// Held to change `slots`.
    #[pin]
    update: Mutex<()>,
    #[pin]
    slots: SrcuCell<Slots>,
    /// Odd while a set of memslots is being published, and moved on by 2 each time: who remembers
    /// something of the memslots knows by it whether that still holds. See [`devices`] and [`cached`].
    version: AtomicU64,
    #[pin]
    mmu: Mmu,
    log: LogMode,
    /// Pages in all slots.
    pages: AtomicU64,
    /// The VMM has said how many pages shadow tables may take.
    limited: AtomicBool,
}

impl GuestMemory {
    /// Memory without a memslot, in the current task's address space: ENOMEM, EINTR if killed.
    pub(crate) fn new(caps: PagingCaps) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- Listening::new(try_pin_init!(Inner {
                update <- new_mutex!((), "rkvm_memslots"),
                slots <- SrcuCell::new(KBox::new(Slots::empty(), GFP_KERNEL_ACCOUNT)?),
                version: AtomicU64::new(0),
                mmu <- Mmu::new(caps),
                log: LogMode::new(),
                pages: AtomicU64::new(0),
                limited: AtomicBool::new(false),
            }? Error)),
        }? Error)
    }

    /// The EPT pointer for the VMCS, if there is EPT. Does not change.
    #[inline]
    pub(crate) fn eptp(&self) -> Option<u64> {
        self.inner.mmu.eptp()
    }

    /// The vCPUs that use this memory.
    #[inline]
    pub(crate) fn vcpus(&self) -> &VcpuSet {
        self.inner.mmu.vcpus()
    }

    /// How many leaves of 4 KiB, 2 MiB and 1 GiB there are, and how many tables.
    pub(crate) fn mapped(&self) -> ([u64; 3], u64) {
        const SIZES: [Level; 3] = [Level::Page4K, Level::Page2M, Level::Page1G];
        if let Some(counts) = self.shadow_counts() {
            return ([counts.small, counts.large, 0], counts.pages);
        }
        self.inner
            .mmu
            .with_counts(|counts| (SIZES.map(|size| counts.leaves(size)), counts.tables()))
    }

    /// Returns if the current task runs in this memory's address space.
    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        self.inner.is_current()
    }

    /// KVM_SET_USER_MEMORY_REGION: makes, moves or, if the size is 0, deletes a memslot.
    ///
    /// EINVAL: misaligned or out of bounds; a flag that is not supported; a change of anything but
    /// the place or the logging of a slot that is there; deletion of one that is not. EEXIST: another
    /// slot is in the way. ENOMEM.
    ///
    /// When it returns, nothing uses what was there before.
    pub(crate) fn set_region(&self, region: &kvm_userspace_memory_region) -> Result {
        let new = self.check_region(region)?;
        self.set_slot(region.slot, new)
    }

    /// The same, with a slot that has been checked, or none.
    fn set_slot(&self, id: u32, mut new: Option<Slot>) -> Result {
        let inner = &*self.inner;
        let _update = inner.update.lock();
        let (old, next) = {
            let slots = inner.slots.read();
            let old = slots.by_id(id).cloned();
            match (&old, &new) {
                (None, None) => return Err(EINVAL),
                (Some(old), Some(new)) => {
                    if new.hvas != old.hvas || new.read_only != old.read_only {
                        return Err(EINVAL);
                    }
                    if new.gfns == old.gfns && new.flags == old.flags {
                        return Ok(());
                    }
                }
                _ => {}
            }
            if let Some(new) = &mut new {
                if slots.occupied(&new.gfns, new.id) {
                    return Err(EEXIST);
                }
                new.log = inner.log_of(new, old.as_ref())?;
            }
            (old, slots.with(id, new.clone())?)
        };
        match (old, new) {
            (Some(old), Some(new)) if old.gfns == new.gfns => self.change_logging(&new, next),
            (old, new) => {
                let size = |slot: &Option<Slot>| slot.as_ref().map_or(0, Slot::pages);
                let (went, came) = (size(&old), size(&new));
                inner.replace_slot(old, next)?;
                self.count_pages(went, came);
                if let Some(new) = new {
                    // A page of the kernel's may have been here.
                    inner.zap_own(&new.gfns);
                }
            }
        }
        Ok(())
    }

    /// So many pages have gone, and so many have come. Shadow tables may take 2 % of them, as in KVM, unless the
    /// VMM has said how many.
    fn count_pages(&self, went: u64, came: u64) {
        let inner = &*self.inner;
        // With `update` held.
        let before = inner.pages.load(Ordering::Relaxed);
        let pages = before.wrapping_sub(went).wrapping_add(came);
        inner.pages.store(pages, Ordering::Relaxed);
        if !inner.limited.load(Ordering::Relaxed) {
            self.apply_shadow_limit((pages / 50) as usize);
        }
    }

    /// How many frames a guest can have: gfns are below.
    fn gfn_limit(&self) -> u64 {
        self.inner.mmu.format().gfn_limit
    }

    /// The slot that the user describes, with what can be said without knowing the others; none if
    /// it is to be deleted. EINVAL.
    fn check_region(&self, region: &kvm_userspace_memory_region) -> Result<Option<Slot>> {
        let size = region.memory_size;
        let gpa = region.guest_phys_addr;
        let hva = region.userspace_addr;
        if region.flags & !(KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES) != 0
            || (size | gpa | hva) & 0xfff != 0
            || !user_range_ok(hva, size)
            || region.slot >= MAX_SLOTS
            || size >> 12 > MAX_PAGES
        {
            return Err(EINVAL);
        }
        if size == 0 {
            return Ok(None);
        }
        let slot = Slot::new(region).ok_or(EINVAL)?;
        if slot.gfns.end > self.gfn_limit() {
            return Err(EINVAL);
        }
        Ok(Some(slot))
    }
}

impl Inner {
    /// Unmaps what [`GuestMemory::map_own`] may have mapped in these frames.
    fn zap_own(&self, gfns: &Range<u64>) {
        let own = DEFAULT_ADDRESS >> 12;
        if gfns.contains(&own) {
            self.mmu.zap(core::iter::once(own..own + 1), true);
        }
    }

    /// Publishes `next`. `old`, if any, is a slot that is not in it any more as it was: nothing uses
    /// it when this returns. With `update` held. ENOMEM, and then nothing has changed.
    fn replace_slot(&self, old: Option<Slot>, next: KBox<Slots>) -> Result {
        if let Some(old) = old {
            // While there can be entries made from the slot, the notifier must find it. So it goes
            // in two steps: first no more entries are made, then what there is is zapped.
            let gfns = old.gfns.clone();
            let leaving = Slot {
                leaving: true,
                ..old
            };
            let between = self.slots.read().with(leaving.id, Some(leaving))?;
            self.publish(between);
            self.mmu.zap_slot(gfns);
        }
        self.publish(next);
        Ok(())
    }

    /// Publishes a set of memslots and waits until nobody uses the one before. With `update` held, and
    /// as the last step of a change.
    fn publish(&self, next: KBox<Slots>) {
        // Whoever uses a logged slot must find the vCPUs logging; the other way round, it costs only
        // time.
        let logging = next.are_logged();
        if logging {
            self.set_logging(true);
        }
        // Odd before anybody can see the new set. The exchange of the sets is a full barrier, and
        // the release orders the new number after it.
        self.version.fetch_add(1, Ordering::SeqCst);
        drop(self.slots.replace(next));
        self.version.fetch_add(1, Ordering::Release);
        if !logging {
            self.set_logging(false);
        }
    }
}
