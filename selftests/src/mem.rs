// SPDX-License-Identifier: GPL-2.0

//! Host memory that serves as guest memory.

use crate::sys::Error;

/// Bytes in a small page.
pub const PAGE: usize = 4096;
/// Bytes in a large page.
pub const HUGE: usize = 2 << 20;

/// An anonymous mapping, unmapped when dropped.
///
/// Accesses are volatile and unordered: the guest and other threads change the same bytes.
#[derive(Debug)]
pub struct Mapping {
    addr: usize,
    len: usize,
    base: usize,
    reserved: usize,
}

impl Mapping {
    /// Maps `len` bytes, private or shared, aligned to a large page.
    ///
    /// # Errors
    ///
    /// The failure of `mmap`.
    pub fn new(len: usize, shared: bool) -> Result<Self, Error> {
        let reserved = len + HUGE;
        let flags = libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | if shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            };
        // SAFETY: A new mapping at an address that the kernel chooses disturbs nothing.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last("mmap"));
        }
        let base = p as usize;
        let addr = (base + HUGE - 1) & !(HUGE - 1);
        Ok(Mapping {
            addr,
            len,
            base,
            reserved,
        })
    }

    /// Maps `len` bytes with `flags` of `mmap` (and `fd`, or -1), aligned to a large page.
    ///
    /// # Errors
    ///
    /// The failure of `mmap`.
    pub fn with_flags(len: usize, flags: i32, fd: i32) -> Result<Self, Error> {
        let m = Mapping::new(len, false)?;
        // SAFETY: Replaces pages of a mapping that is new and that nothing refers to.
        let p = unsafe {
            libc::mmap(
                m.addr as *mut _,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                fd,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last("mmap"));
        }
        Ok(m)
    }

    /// The address of the first byte.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset + size_of::<T>() <= self.len,
            "offset {offset:#x} is outside of a mapping of {:#x} bytes",
            self.len
        );
        (self.addr + offset) as *mut T
    }

    /// Reads a value at `offset`, which need not be aligned.
    #[must_use]
    pub fn read<T: Copy>(&self, offset: usize) -> T {
        let p: *mut T = self.at(offset);
        if p as usize % align_of::<T>() == 0 {
            // SAFETY: `at` checked the bounds, the address is aligned, and any bytes are a value of
            // the plain types that tests read.
            unsafe { p.read_volatile() }
        } else {
            // SAFETY: As above; no alignment is needed.
            unsafe { p.read_unaligned() }
        }
    }

    /// Writes a value at `offset`, which need not be aligned.
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        let p: *mut T = self.at(offset);
        if p as usize % align_of::<T>() == 0 {
            // SAFETY: `at` checked the bounds and the address is aligned.
            unsafe { p.write_volatile(value) }
        } else {
            // SAFETY: `at` checked the bounds.
            unsafe { p.write_unaligned(value) }
        }
    }

    /// Copies `bytes` to `offset`.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            self.write(offset + i, *b);
        }
    }

    /// Copies `len` bytes from `offset`.
    #[must_use]
    pub fn read_bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        (0..len).map(|i| self.read(offset + i)).collect()
    }

    /// Writes `value` to each byte of `offset..offset + len`.
    pub fn fill(&self, offset: usize, len: usize, value: u8) {
        assert!(offset + len <= self.len, "fill outside of the mapping");
        // SAFETY: The bounds were checked.
        unsafe { std::ptr::write_bytes((self.addr + offset) as *mut u8, value, len) }
    }

    /// Calls `madvise` on a part of the mapping.
    ///
    /// # Errors
    ///
    /// The failure of `madvise`.
    pub fn advise(&self, offset: usize, len: usize, advice: i32) -> Result<(), Error> {
        assert!(offset + len <= self.len, "madvise outside of the mapping");
        // SAFETY: The range is this mapping's; its contents are plain bytes that may change.
        let r = unsafe { libc::madvise((self.addr + offset) as *mut _, len, advice) };
        if r != 0 {
            return Err(Error::last("madvise"));
        }
        Ok(())
    }

    /// Calls `mprotect` on a part of the mapping.
    ///
    /// # Errors
    ///
    /// The failure of `mprotect`.
    pub fn protect(&self, offset: usize, len: usize, prot: i32) -> Result<(), Error> {
        assert!(offset + len <= self.len, "mprotect outside of the mapping");
        // SAFETY: The range is this mapping's; tests touch it only as far as they left it accessible.
        let r = unsafe { libc::mprotect((self.addr + offset) as *mut _, len, prot) };
        if r != 0 {
            return Err(Error::last("mprotect"));
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: The range was mapped by `new` and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base as *mut _, self.reserved) };
    }
}
