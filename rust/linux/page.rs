// SPDX-License-Identifier: GPL-2.0

//! Single zeroed pages in the kernel's direct map, charged to the caller's cgroup.

use crate::bindings;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU32;
use kernel::prelude::*;

/// Bytes in a page.
pub(crate) const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;

/// The physical address of something that the kernel's allocator made: it is in the direct map.
pub(crate) fn phys_of<T>(place: &T) -> u64 {
    // SAFETY: An address calculation, which reads nothing. (For what is not in the direct map the result
    // is meaningless, and a kernel with CONFIG_DEBUG_VIRTUAL says so.)
    unsafe { bindings::rkvm_virt_to_phys(core::ptr::from_ref(place).cast()) }
}

/// A page of kernel memory that hardware or user space sees too.
///
/// # Invariants
///
/// `va` is a page from the kernel's allocator that nobody else frees.
pub(crate) struct KernelPage {
    va: NonNull<u8>,
}

// SAFETY: The page belongs to nobody's thread.
unsafe impl Send for KernelPage {}
// SAFETY: Shared references only allow volatile accesses of bytes that others may change anyway.
unsafe impl Sync for KernelPage {}

impl KernelPage {
    /// Allocates a zeroed page: ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: May sleep, as every caller may.
        let va = unsafe { bindings::rkvm_alloc_page() }.cast();
        // INVARIANT: The page has just been allocated.
        Ok(Self {
            va: NonNull::new(va).ok_or(ENOMEM)?,
        })
    }

    /// Allocates a zeroed page below 4 GiB: ENOMEM.
    pub(crate) fn new_low() -> Result<Self> {
        // SAFETY: May sleep, as every caller may.
        let va = unsafe { bindings::rkvm_alloc_low_page() }.cast();
        // INVARIANT: The page has just been allocated.
        Ok(Self {
            va: NonNull::new(va).ok_or(ENOMEM)?,
        })
    }

    /// The address in the kernel's direct map.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.va.as_ptr()
    }

    /// The physical address.
    #[inline]
    pub(crate) fn phys(&self) -> u64 {
        // SAFETY: By the invariant the address is in the direct map.
        unsafe { bindings::rkvm_virt_to_phys(self.va.as_ptr().cast()) }
    }

    /// Where a `T` at `offset` is, if it is in the page and aligned.
    #[inline]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let fits = offset <= PAGE_SIZE - size_of::<T>() && offset % align_of::<T>() == 0;
        fits.then(|| self.va.as_ptr().wrapping_add(offset).cast())
    }

    /// Reads a value that someone else may be writing, once. Zero if it is not in the page, or not
    /// aligned.
    #[inline]
    pub(crate) fn read<T: kernel::transmute::FromBytes + Copy + Default>(
        &self,
        offset: usize,
    ) -> T {
        match self.at::<T>(offset) {
            // SAFETY: The place is in the page and aligned, by `at`; any bytes make a `T`.
            Some(place) => unsafe { place.read_volatile() },
            None => T::default(),
        }
    }

    /// Writes a value; nothing if it is not in the page, or not aligned.
    #[inline]
    pub(crate) fn write<T: kernel::transmute::AsBytes + Copy>(&self, offset: usize, value: T) {
        if let Some(place) = self.at::<T>(offset) {
            // SAFETY: The place is in the page and aligned, by `at`.
            unsafe { place.write_volatile(value) };
        }
    }

    /// A word that others may change at the same time, if it is in the page and aligned.
    #[inline]
    pub(crate) fn atomic(&self, offset: usize) -> Option<&AtomicU32> {
        let place = self.at::<u32>(offset)?;
        // SAFETY: The place is in the page and aligned, by `at`, and stays as long as the page. Who
        // else writes there does so by whole words.
        Some(unsafe { AtomicU32::from_ptr(place) })
    }

    /// Copies bytes out, as many as both sides have.
    pub(crate) fn read_bytes(&self, offset: usize, out: &mut [u8]) {
        let len = out.len().min(PAGE_SIZE.saturating_sub(offset));
        // SAFETY: `len` bytes from `offset` are in the page, and `out` has as many.
        unsafe {
            core::ptr::copy_nonoverlapping(
                self.va.as_ptr().wrapping_add(offset),
                out.as_mut_ptr(),
                len,
            )
        };
    }

    /// Copies bytes in, as many as fit.
    pub(crate) fn write_bytes(&self, offset: usize, data: &[u8]) {
        let len = data.len().min(PAGE_SIZE.saturating_sub(offset));
        // SAFETY: `len` bytes from `offset` are in the page, and `data` has as many.
        unsafe {
            core::ptr::copy_nonoverlapping(
                data.as_ptr(),
                self.va.as_ptr().wrapping_add(offset),
                len,
            )
        };
    }
}

impl Drop for KernelPage {
    fn drop(&mut self) {
        // SAFETY: By the invariant the page is ours. If user space has it mapped, the mapping holds
        // a reference of its own, and the page lives on until that is gone.
        unsafe { bindings::rkvm_free_page(self.va.as_ptr().cast()) };
    }
}
