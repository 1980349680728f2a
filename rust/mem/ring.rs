// SPDX-License-Identifier: GPL-2.0

//! A vCPU's dirty ring (KVM API, 8.29): which pages it has written to, one entry a write that was
//! noticed, for user space to harvest.
//!
//! User space maps the ring and can write to it at any time. It owns the entries between the two
//! indices, and says so by flags: DIRTY is ours, RESET is its answer. The indices are not in the ring,
//! so that whatever it writes there stays its own problem.

use crate::bindings::kvm_dirty_gfn;
use crate::linux::file::NewVma;
use crate::linux::page::KernelPage;
use crate::linux::page::PAGE_SIZE;
use core::mem::offset_of;
use core::sync::atomic::fence;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use kernel::prelude::*;

// Bits of an entry's flags. (bindgen does not evaluate the ABI's `_BITUL`.)
/// KVM_DIRTY_GFN_F_DIRTY: the entry is for user space to harvest.
const DIRTY: u32 = 1 << 0;
/// KVM_DIRTY_GFN_F_RESET: user space has harvested it.
const RESET: u32 = 1 << 1;

const ENTRY: usize = size_of::<kvm_dirty_gfn>();
const PER_PAGE: usize = PAGE_SIZE / ENTRY;

/// The most bytes that a ring can have (KVM_CAP_DIRTY_LOG_RING).
pub(crate) const MAX_BYTES: u32 = 65536 * ENTRY as u32;

/// Entries kept for what can be noticed between one look at [`DirtyRing::is_full`] and the next: all
/// that the processor's log holds, and what one exit writes.
const RESERVED: u32 = 512 + 64;

/// A dirty ring.
///
/// # Invariants
///
/// `pages` has `entries` entries, a power of two of them.
pub(crate) struct DirtyRing {
    pages: KVVec<KernelPage>,
    entries: u32,
    /// How many entries have been filled, modulo 2^32. Changed by the vCPU's thread alone.
    filled: AtomicU32,
    /// How many have been reset, modulo 2^32. Changed with the memslots' update mutex held.
    reset: AtomicU32,
}

impl DirtyRing {
    /// Checks a size in bytes: EINVAL if it is not a power of two, or leaves no room beside what is
    /// reserved; E2BIG.
    pub(crate) fn check_size(bytes: u32) -> Result {
        let least = (RESERVED * ENTRY as u32).max(PAGE_SIZE as u32);
        if !bytes.is_power_of_two() || bytes < least {
            return Err(EINVAL);
        }
        if bytes > MAX_BYTES {
            return Err(E2BIG);
        }
        Ok(())
    }

    /// An empty ring of a size that was checked: ENOMEM.
    pub(crate) fn new(bytes: u32) -> Result<Self> {
        let mut pages = KVVec::new();
        for _ in 0..bytes as usize / PAGE_SIZE {
            pages.push(KernelPage::new()?, GFP_KERNEL_ACCOUNT)?;
        }
        // INVARIANT: A power of two of bytes is one of entries.
        Ok(Self {
            pages,
            entries: bytes / ENTRY as u32,
            filled: AtomicU32::new(0),
            reset: AtomicU32::new(0),
        })
    }

    fn entry(&self, index: u32) -> Option<(&KernelPage, usize)> {
        let index = (index & self.entries.wrapping_sub(1)) as usize;
        let page = self.pages.get(index / PER_PAGE)?;
        Some((page, index % PER_PAGE * ENTRY))
    }

    fn used(&self) -> u32 {
        let filled = self.filled.load(Ordering::Relaxed);
        filled.wrapping_sub(self.reset.load(Ordering::Acquire))
    }

    /// Returns if user space must harvest before the vCPU runs on.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.used() >= self.entries.wrapping_sub(RESERVED)
    }

    /// Adds an entry. By the vCPU's thread, which has found the ring not full since its last exit.
    pub(crate) fn push(&self, slot: u32, offset: u64) {
        if self.used() >= self.entries {
            // What is reserved is enough. If it were not, to overwrite what was not harvested would
            // help nobody.
            kernel::pr_warn_once!("a dirty ring has overflown\n");
            return;
        }
        let filled = self.filled.load(Ordering::Relaxed);
        if let Some((page, at)) = self.entry(filled) {
            page.write(at + offset_of!(kvm_dirty_gfn, slot), slot);
            page.write(at + offset_of!(kvm_dirty_gfn, offset), offset);
            // Who sees the flag sees the entry.
            fence(Ordering::Release);
            page.write(at + offset_of!(kvm_dirty_gfn, flags), DIRTY);
        }
        self.filled.store(filled.wrapping_add(1), Ordering::Release);
    }

    /// Takes back, in order, the entries that user space has harvested, and calls `f` for each with
    /// the slot and the offset that it finds there, which may be anything. With the memslots' update
    /// mutex held. Returns how many there were: no more than the ring has.
    pub(crate) fn take_reset(&self, mut f: impl FnMut(u32, u64)) -> u32 {
        let filled = self.filled.load(Ordering::Acquire);
        let first = self.reset.load(Ordering::Relaxed);
        let mut reset = first;
        while reset != filled {
            let Some((page, at)) = self.entry(reset) else {
                break;
            };
            let flags: u32 = page.read(at + offset_of!(kvm_dirty_gfn, flags));
            if flags & RESET == 0 {
                break;
            }
            fence(Ordering::Acquire);
            let slot = page.read(at + offset_of!(kvm_dirty_gfn, slot));
            let offset = page.read(at + offset_of!(kvm_dirty_gfn, offset));
            page.write(at + offset_of!(kvm_dirty_gfn, flags), 0u32);
            f(slot, offset);
            reset = reset.wrapping_add(1);
        }
        // The flags are cleared before the entries can be filled again.
        self.reset.store(reset, Ordering::Release);
        reset.wrapping_sub(first)
    }

    /// Maps the ring, from its page `first` on: EINVAL if the mapping goes beyond, is private or is
    /// executable.
    pub(crate) fn mmap(&self, vma: &NewVma, first: usize) -> Result {
        if !vma.is_shared() || vma.is_executable() {
            return Err(EINVAL);
        }
        for index in 0..vma.pages() {
            let page = first
                .checked_add(index)
                .and_then(|n| self.pages.get(n))
                .ok_or(EINVAL)?;
            vma.insert(index, page)?;
        }
        Ok(())
    }
}
