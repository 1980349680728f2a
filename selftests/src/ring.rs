// SPDX-License-Identifier: GPL-2.0

//! Dirty rings: one a vCPU, which the guest fills and the host harvests.

use crate::dirty::{Bitmap, SLOT};
use crate::mem::PAGE;
use crate::sys::{self, Error};
use crate::vm::{Kvm, Vcpu, Vm};
use crate::{ensure, ensure_eq, skip, Outcome, Verdict};
use kvm_bindings as kb;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of an entry: flags, slot, offset.
pub const ENTRY: usize = 16;
/// An entry's flag: the kernel filled it.
pub const DIRTY: u32 = 1;
/// An entry's flag: the host is done with it.
pub const RESET: u32 = 2;

/// The capabilities that enable rings, and the one that tests use if there is a choice.
pub const CAPS: [u32; 2] = [
    kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    kb::KVM_CAP_DIRTY_LOG_RING,
];

/// The capability that is there, and the most bytes a ring may have.
///
/// # Errors
///
/// Skips if there is none.
pub fn capability(kvm: &Kvm) -> Result<(u32, u64), Verdict> {
    for cap in CAPS {
        let max = kvm.capability(cap);
        if max > 0 {
            return Ok((cap, max.unsigned_abs().into()));
        }
    }
    skip!("no dirty rings");
}

/// Enables rings of so many bytes on a VM that has no vCPU yet.
///
/// # Errors
///
/// What the kernel answered; skips if there are none.
pub fn enable(kvm: &Kvm, vm: &Vm, bytes: usize) -> Outcome {
    let (cap, _) = capability(kvm)?;
    Ok(vm.enable_cap(cap, bytes as u64)?)
}

/// An entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Entry {
    /// [`DIRTY`], [`RESET`].
    pub flags: u32,
    /// The slot.
    pub slot: u32,
    /// The page in it.
    pub offset: u64,
}

/// A vCPU's ring, as the host sees it.
#[derive(Debug)]
pub struct Ring {
    address: usize,
    bytes: usize,
    /// The next entry to harvest.
    pub next: usize,
}

/// Maps a vCPU's ring.
///
/// # Errors
///
/// What the kernel answered.
pub fn map_ring(v: &Vcpu, bytes: usize, prot: i32, flags: i32) -> Result<usize, Error> {
    let offset = kb::KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE;
    // SAFETY: A new mapping at an address that the kernel chooses disturbs nothing.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            prot,
            flags,
            v.fd.0,
            libc::off_t::try_from(offset).unwrap_or(0),
        )
    };
    if p == libc::MAP_FAILED {
        return Err(Error::last("mmap of a ring"));
    }
    Ok(p as usize)
}

impl Ring {
    /// The ring of a vCPU.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn new(v: &Vcpu, bytes: usize) -> Result<Self, Error> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        Ok(Ring {
            address: map_ring(v, bytes, prot, libc::MAP_SHARED)?,
            bytes,
            next: 0,
        })
    }

    /// Where an entry is.
    #[must_use]
    pub fn at(&self, index: usize) -> *mut Entry {
        (self.address + index * ENTRY % self.bytes) as *mut Entry
    }

    /// The flags of an entry.
    #[must_use]
    pub fn flags(&self, index: usize) -> &AtomicU32 {
        // SAFETY: The word is within the mapping, which lives as long as `self`; kernel and tests
        // access it as a whole.
        unsafe { AtomicU32::from_ptr(self.at(index).cast()) }
    }

    /// An entry.
    #[must_use]
    pub fn read(&self, index: usize) -> Entry {
        let flags = self.flags(index).load(Ordering::Acquire);
        // SAFETY: The entry is within the mapping.
        let e = unsafe { self.at(index).read_volatile() };
        Entry { flags, ..e }
    }

    /// Writes an entry, as the host must not.
    pub fn write(&self, index: usize, e: Entry) {
        // SAFETY: The entry is within the mapping.
        unsafe { self.at(index).write_volatile(e) };
    }

    /// Takes the next entry, if the kernel filled it, and leaves it to be reset.
    pub fn take(&mut self) -> Option<Entry> {
        let e = self.read(self.next);
        if e.flags & DIRTY == 0 {
            return None;
        }
        self.flags(self.next).store(RESET, Ordering::Release);
        self.next += 1;
        Some(e)
    }

    /// Takes all entries; the set of their pages, and how many there were.
    ///
    /// # Errors
    ///
    /// A failure, if one is none.
    pub fn harvest(&mut self, pages: usize) -> Result<(Bitmap, usize), Verdict> {
        let mut set = Bitmap::new(pages);
        let mut n = 0;
        while let Some(e) = self.take() {
            ensure_eq!(
                (e.flags, e.slot),
                (DIRTY, SLOT),
                "flags and slot of entry {n}"
            );
            ensure!(
                e.offset < pages as u64,
                "offset {:#x} of entry {n}",
                e.offset
            );
            set.set(e.offset as usize);
            n += 1;
        }
        Ok((set, n))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: Mapped by `new`; no reference into it outlives `self`.
        unsafe { libc::munmap(self.address as *mut _, self.bytes) };
    }
}

/// `KVM_RESET_DIRTY_RINGS`: how many entries are free again.
///
/// # Errors
///
/// What the kernel answered.
pub fn reset(vm: &Vm) -> Result<usize, Error> {
    let n = vm.fd.ioctl(sys::KVM_RESET_DIRTY_RINGS, 0)?;
    Ok(usize::try_from(n).unwrap_or(0))
}
