// SPDX-License-Identifier: GPL-2.0

//! The host's memory as seen from a guest's: the frame behind a user address, and plain access to
//! user memory.
//!
//! A frame is found as the CPU would find it, by the mappings of the current task. Nothing here
//! keeps it there: whoever maps it into a guest listens to the address space
//! ([`super::mmu_notifier`]) and checks that nothing changed between the look-up and the mapping.

use crate::bindings as own;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::mm::Mm;
use kernel::prelude::*;

/// A page of the host, with a reference held.
///
/// # Invariants
///
/// `page` is valid and a reference to it is owned.
pub(crate) struct HostPage {
    page: NonNull<bindings::page>,
}

impl HostPage {
    /// Its page frame number.
    #[inline]
    pub(crate) fn pfn(&self) -> u64 {
        // SAFETY: By the invariant.
        unsafe { own::rkvm_page_to_pfn(self.page.as_ptr()) }
    }

    /// Gives the reference back and tells the host that a guest uses the page: that it was accessed,
    /// and, if `dirty`, that it may have been written.
    #[inline]
    pub(crate) fn put_used(self, dirty: bool) {
        let this = core::mem::ManuallyDrop::new(self);
        // SAFETY: By the invariant; the reference goes with `this`, which is not dropped.
        unsafe { own::rkvm_page_put_used(this.page.as_ptr(), dirty) };
    }
}

impl Drop for HostPage {
    fn drop(&mut self) {
        // SAFETY: By the invariant.
        unsafe { own::rkvm_page_put(self.page.as_ptr()) };
    }
}

/// What a user address is backed by.
pub(crate) struct HostFrame {
    /// The page frame number.
    pub(crate) pfn: u64,
    /// The user may write to it through the mapping that was found.
    pub(crate) writable: bool,
    /// It is a device's memory, not to be cached.
    pub(crate) mmio: bool,
    /// The page, if the frame has one that is counted (not in a VM_PFNMAP mapping).
    pub(crate) page: Option<HostPage>,
}

/// Why there is no frame.
pub(crate) enum NoFrame {
    /// A signal is pending.
    Interrupted,
    /// The page had a memory error.
    Poisoned,
    /// Nothing is mapped there, or not with the access wanted.
    BadAddress,
}

/// Takes a page with `get_user_pages_fast_only`: no faults, no sleeping.
#[inline]
fn get_page_fast_writable(hva: u64) -> Option<HostPage> {
    let mut page = core::ptr::null_mut();
    // SAFETY: One page is asked for and there is room for one.
    let got = unsafe {
        bindings::get_user_pages_fast_only(hva as usize, 1, bindings::FOLL_WRITE, &mut page)
    };
    if got != 1 {
        return None;
    }
    // INVARIANT: A reference was taken, and is now the `HostPage`'s.
    NonNull::new(page).map(|page| HostPage { page })
}

/// The frame behind `hva` in the current task's address space, if it is at hand. Does not sleep.
pub(crate) fn host_frame_at_hand(hva: u64) -> Option<u64> {
    let mut page = core::ptr::null_mut();
    // SAFETY: One page is asked for and there is room for one.
    let got = unsafe { bindings::get_user_pages_fast_only(hva as usize, 1, 0, &mut page) };
    if got != 1 {
        return None;
    }
    // INVARIANT: A reference was taken, and is now the `HostPage`'s.
    let page = NonNull::new(page).map(|page| HostPage { page })?;
    Some(page.pfn())
}

/// Pages of the host's, with a reference held to each, which it gives away one by one.
///
/// # Invariants
///
/// `pages` from `next` to `len` are valid, and a reference to each is owned.
pub(crate) struct HostPages<const N: usize> {
    pages: [*mut bindings::page; N],
    next: usize,
    len: usize,
}

impl<const N: usize> HostPages<N> {
    /// Those behind consecutive addresses from `hva` on in the current task's address space that may be written: as many
    /// of the first `count`, which are `N` at most, as are at hand, up to the first that is not. Does not sleep.
    pub(crate) fn at_hand(hva: u64, count: usize) -> Self {
        let mut pages = [core::ptr::null_mut(); N];
        let count = i32::try_from(count.min(N)).unwrap_or(0);
        let flags = bindings::FOLL_WRITE;
        // SAFETY: No more pages are asked for than there is room for.
        let got = unsafe {
            bindings::get_user_pages_fast_only(hva as usize, count, flags, pages.as_mut_ptr())
        };
        // INVARIANT: A reference to each of those was taken.
        Self {
            pages,
            next: 0,
            len: usize::try_from(got).unwrap_or(0),
        }
    }
}

impl<const N: usize> Iterator for HostPages<N> {
    type Item = HostPage;

    #[inline]
    fn next(&mut self) -> Option<HostPage> {
        if self.next >= self.len {
            return None;
        }
        let page = NonNull::new(*self.pages.get(self.next)?)?;
        // INVARIANT: The reference is the `HostPage`'s now, and not counted here any more.
        self.next = self.next.wrapping_add(1);
        Some(HostPage { page })
    }
}

impl<const N: usize> Drop for HostPages<N> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

/// Finds the frame behind `hva` in the current task's address space, faulting it in. Sleeps.
///
/// `write`: it must be writable. `try_write`: prefer a writable mapping even if not `write`, but do
/// not break copy-on-write for it.
pub(crate) fn host_frame(hva: u64, write: bool, try_write: bool) -> Result<HostFrame, NoFrame> {
    let with_page = |page: HostPage, writable| HostFrame {
        pfn: page.pfn(),
        writable,
        mmio: false,
        page: Some(page),
    };
    // Only a writable page may be taken on the fast path: a read-only one might be about to be
    // replaced by a copy, which only the slow path orders itself against.
    if write || try_write {
        if let Some(page) = get_page_fast_writable(hva) {
            return Ok(with_page(page, true));
        }
    }
    let mut flags =
        bindings::FOLL_HWPOISON | bindings::FOLL_HONOR_NUMA_FAULT | bindings::FOLL_INTERRUPTIBLE;
    if write {
        flags |= bindings::FOLL_WRITE;
    }
    let mut page = core::ptr::null_mut();
    // SAFETY: One page is asked for and there is room for one.
    let got = unsafe { bindings::get_user_pages_unlocked(hva as usize, 1, &mut page, flags) };
    if got == 1 {
        if let Some(page) = NonNull::new(page) {
            // INVARIANT: A reference was taken, and is now the `HostPage`'s.
            let page = HostPage { page };
            if !write && try_write {
                if let Some(writable) = get_page_fast_writable(hva) {
                    return Ok(with_page(writable, true));
                }
            }
            return Ok(with_page(page, write));
        }
    }
    match i32::try_from(got).map(|e| Error::from_errno(e.min(-1))) {
        Ok(e) if e == EINTR || e == EAGAIN => Err(NoFrame::Interrupted),
        Ok(e) if e.to_errno() == -(bindings::EHWPOISON as i32) => Err(NoFrame::Poisoned),
        _ => pfnmap_frame(hva, write),
    }
}

/// The frame behind an address of a mapping that has no pages (VM_IO, VM_PFNMAP).
fn pfnmap_frame(hva: u64, write: bool) -> Result<HostFrame, NoFrame> {
    let task = current!();
    let mm = task.mm().ok_or(NoFrame::BadAddress)?;
    let mut faulted = false;
    loop {
        let guard = mm.mmap_read_lock();
        let vma = guard.vma_lookup(hva as usize).ok_or(NoFrame::BadAddress)?;
        if vma.flags() & (bindings::VM_IO | bindings::VM_PFNMAP) == 0 {
            return Err(NoFrame::BadAddress);
        }
        let mut args = bindings::follow_pfnmap_args {
            vma: vma.as_ptr(),
            address: hva as usize,
            ..Default::default()
        };
        // SAFETY: The vma is held by the mmap lock and contains the address.
        if unsafe { bindings::follow_pfnmap_start(&mut args) } == 0 {
            let (pfn, writable) = (args.pfn as u64, args.writable);
            // SAFETY: Started just now.
            unsafe { bindings::follow_pfnmap_end(&mut args) };
            if write && !writable {
                return Err(NoFrame::BadAddress);
            }
            // SAFETY: Any number will do.
            let mmio = unsafe { own::rkvm_pfn_is_mmio(pfn) };
            return Ok(HostFrame {
                pfn,
                writable,
                mmio,
                page: None,
            });
        }
        if faulted {
            return Err(NoFrame::BadAddress);
        }
        let fault_flags = if write {
            bindings::fault_flag_FAULT_FLAG_WRITE
        } else {
            0
        };
        let mut unlocked = false;
        // SAFETY: The current task's mm, locked for reading. If the call had to drop the lock it
        // has taken it again, so the guard tells the truth; `vma` is not used after this.
        let ret = unsafe {
            bindings::fixup_user_fault(mm.as_raw(), hva as usize, fault_flags, &mut unlocked)
        };
        if ret != 0 {
            return Err(NoFrame::BadAddress);
        }
        // A fault that dropped the lock may have been for a mapping that is gone: look again.
        faulted = !unlocked;
        if crate::linux::task::signal_pending() {
            return Err(NoFrame::Interrupted);
        }
    }
}

/// How large the host maps what is at `hva`: 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB.
///
/// The answer is of that moment only. The current task runs in `mm`, or the answer is 1.
#[inline]
pub(crate) fn host_mapping_level(mm: &Mm, hva: u64) -> u8 {
    // SAFETY: `current` is always there, and no other task changes its `mm`.
    if !core::ptr::eq(unsafe { own::rkvm_current_mm() }, mm.as_raw()) {
        return 1;
    }
    // SAFETY: The current task's mm has page tables; the walk is safe against their being freed.
    let level = unsafe { own::rkvm_host_mapping_level(mm.as_raw(), hva) };
    level.clamp(1, 3) as u8
}

/// Tells the current task that it touched poisoned memory: SIGBUS, BUS_MCEERR_AR.
pub(crate) fn send_hwpoison(hva: u64) {
    // SAFETY: Sends a signal to the current task.
    unsafe { own::rkvm_send_hwpoison(hva) };
}

/// Zeroed memory that the kernel has mapped into the address space of the current task, shared so that a `fork()` does not move it.
/// The user can do with it what he likes, as with all of his.
pub(crate) struct UserPages {
    addr: u64,
    size: u64,
}

impl UserPages {
    /// Maps `size` bytes, whole pages: ENOMEM.
    pub(crate) fn map(size: u64) -> Result<Self> {
        // SAFETY: Maps anonymous memory where there is none.
        let addr = unsafe { own::rkvm_user_map(size) };
        if addr < 0 {
            // Whatever it is called: shared memory without an inode is ENOSPC, for instance.
            return Err(ENOMEM);
        }
        Ok(Self {
            addr: addr as u64,
            size,
        })
    }

    /// Where it is.
    pub(crate) fn addr(&self) -> u64 {
        self.addr
    }

    /// Unmaps it again. The current task runs in the same address space as then.
    pub(crate) fn unmap(self) {
        // SAFETY: Unmaps user memory, of which nobody relies on that it is there.
        unsafe { own::rkvm_user_unmap(self.addr, self.size) };
    }
}

/// Returns if `[addr, addr + size)` is user memory for the current task, by its bounds.
pub(crate) fn user_range_ok(addr: u64, size: u64) -> bool {
    // SAFETY: Compares numbers.
    unsafe { own::rkvm_user_range_ok(addr, size) }
}

/// Reads user memory: EFAULT. 1, 2, 4 and 8 bytes, if aligned, are read at once. Sleeps.
#[inline]
pub(crate) fn read_user(addr: u64, buf: &mut [u8]) -> Result {
    // SAFETY: The buffer has that length; the user side is checked.
    kernel::error::to_result(unsafe {
        own::rkvm_user_read(buf.as_mut_ptr().cast(), addr, buf.len() as u64)
    })
}

/// Writes user memory: EFAULT. 1, 2, 4 and 8 bytes, if aligned, are written at once. Sleeps.
#[inline]
pub(crate) fn write_user(addr: u64, data: &[u8]) -> Result {
    // SAFETY: The buffer has that length; the user side is checked.
    kernel::error::to_result(unsafe {
        own::rkvm_user_write(addr, data.as_ptr().cast(), data.len() as u64)
    })
}

/// Writes user memory if it is at hand: EFAULT, also if a page would have to be brought. In any context, with the
/// current task's address space.
#[inline]
pub(crate) fn write_user_atomically(addr: u64, data: &[u8]) -> Result {
    // SAFETY: The buffer has that length; the user side is checked.
    kernel::error::to_result(unsafe {
        own::rkvm_user_write_nofault(addr, data.as_ptr().cast(), data.len() as u64)
    })
}

/// Reads user memory if it is at hand: EFAULT, also if a page would have to be brought. In any context, with the
/// current task's address space. 1, 2, 4 and 8 bytes, if aligned, are read at once, and so is each word of 8 of a multiple of
/// them.
#[inline]
pub(crate) fn read_user_atomically(addr: u64, buf: &mut [u8]) -> Result {
    // SAFETY: The buffer has that length; the user side is checked.
    kernel::error::to_result(unsafe {
        own::rkvm_user_read_nofault(buf.as_mut_ptr().cast(), addr, buf.len() as u64)
    })
}

/// Makes the `len` bytes (1, 2, 4 or 8) of user memory at an aligned address be `new` if they are
/// `old`, atomically; returns if they were. EFAULT, also for another length. Sleeps.
pub(crate) fn cmpxchg_user(addr: u64, len: u8, old: u64, new: u64) -> Result<bool> {
    // SAFETY: The user side is checked.
    let ret = unsafe { own::rkvm_user_cmpxchg(addr, len, old, new) };
    kernel::error::to_result(ret.min(0)).map(|()| ret == 0)
}

/// Lets others run if it is their turn. Not in atomic context.
#[inline]
pub(crate) fn cond_resched() {
    // SAFETY: The caller may sleep.
    unsafe { own::rkvm_cond_resched() };
}
