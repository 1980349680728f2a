// SPDX-License-Identifier: GPL-2.0

//! Host memory that serves as guest memory.

use crate::sys::Error;

/// Bytes in a small page.
pub const PAGE: usize = 4096;
/// Bytes in a large page.
pub const HUGE: usize = 2 << 20;

/// A mapping, unmapped when dropped.
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
        let how = if shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        Self::with(
            len,
            HUGE,
            how | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
        )
    }

    /// Maps `len` bytes with the `flags` of `mmap`, from the start of the file `fd` if that is not
    /// negative, aligned to `align` (a power of two of at least a page).
    ///
    /// # Errors
    ///
    /// The failure of `mmap`.
    pub fn with(len: usize, align: usize, flags: i32, fd: i32) -> Result<Self, Error> {
        let reserved = len + align;
        let hole = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: A new mapping at an address that the kernel chooses disturbs nothing.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, hole, -1, 0) };
        if p == libc::MAP_FAILED {
            return Err(Error::last("mmap"));
        }
        let base = p as usize;
        let m = Mapping {
            addr: (base + align - 1) & !(align - 1),
            len,
            base,
            reserved,
        };
        m.replace(0, len, flags, fd)?;
        Ok(m)
    }

    /// Maps something else over a part of the mapping: the file `fd` from `offset` on if it is not
    /// negative.
    ///
    /// # Errors
    ///
    /// The failure of `mmap`.
    pub fn replace(&self, offset: usize, len: usize, flags: i32, fd: i32) -> Result<(), Error> {
        assert!(offset + len <= self.len, "mmap outside of the mapping");
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_FIXED;
        // SAFETY: The range is this mapping's or, in `with`, its reservation's.
        let p = unsafe {
            libc::mmap(
                (self.addr + offset) as *mut _,
                len,
                prot,
                flags,
                fd,
                if fd < 0 { 0 } else { offset as libc::off_t },
            )
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last("mmap"));
        }
        Ok(())
    }

    /// Unmaps a part of the mapping. What accesses it then is killed.
    ///
    /// # Errors
    ///
    /// The failure of `munmap`.
    pub fn unmap(&self, offset: usize, len: usize) -> Result<(), Error> {
        assert!(offset + len <= self.len, "munmap outside of the mapping");
        // SAFETY: The range is this mapping's; tests touch it only once it is back.
        if unsafe { libc::munmap((self.addr + offset) as *mut _, len) } != 0 {
            return Err(Error::last("munmap"));
        }
        Ok(())
    }

    /// Moves a part of the mapping to `to` in `other`, which loses what is there; the place it leaves
    /// is unmapped, or with `keep` becomes empty.
    ///
    /// # Errors
    ///
    /// The failure of `mremap`.
    pub fn remap(
        &self,
        offset: usize,
        len: usize,
        other: &Mapping,
        to: usize,
        keep: bool,
    ) -> Result<(), Error> {
        assert!(offset + len <= self.len && to + len <= other.len);
        let target = (other.addr + to) as *mut libc::c_void;
        let flags = libc::MREMAP_MAYMOVE
            | libc::MREMAP_FIXED
            | if keep { libc::MREMAP_DONTUNMAP } else { 0 };
        // SAFETY: Both ranges are the mappings'; tests touch them only where they left something.
        let p = unsafe { libc::mremap((self.addr + offset) as *mut _, len, len, flags, target) };
        if p != target {
            return Err(Error::last("mremap"));
        }
        Ok(())
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

/// Opens the process's memory as a file: reads and writes of it disregard protection.
fn own_memory() -> Result<libc::c_int, Error> {
    static FD: std::sync::OnceLock<libc::c_int> = std::sync::OnceLock::new();
    // SAFETY: The path is a string with its terminator.
    let open = || unsafe { libc::open(c"/proc/self/mem".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    match *FD.get_or_init(open) {
        fd if fd >= 0 => Ok(fd),
        _ => Err(Error::last("open of /proc/self/mem")),
    }
}

/// Reads this process's memory by way of the kernel: where nothing is mapped that is an error (EIO),
/// not a signal.
///
/// # Errors
///
/// The failure of `pread`.
pub fn peek(addr: usize, data: &mut [u8]) -> Result<(), Error> {
    let fd = own_memory()?;
    // SAFETY: The buffer has the length that is passed.
    let n = unsafe {
        libc::pread(
            fd,
            data.as_mut_ptr().cast(),
            data.len(),
            addr as libc::off_t,
        )
    };
    if n < 0 || n.unsigned_abs() != data.len() {
        return Err(Error::last("pread of /proc/self/mem"));
    }
    Ok(())
}

/// Whether [`poke`] may write to private mappings that are read-only: kernels can be configured, or
/// told (`proc_mem.force_override=always`), to allow it.
#[must_use]
pub fn can_force() -> bool {
    static CAN: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *CAN.get_or_init(|| {
        Mapping::new(PAGE, false).is_ok_and(|m| {
            m.protect(0, PAGE, libc::PROT_READ).is_ok() && poke(m.addr(), &[1]).is_ok()
        })
    })
}

/// Writes this process's memory by way of the kernel.
///
/// # Errors
///
/// The failure of `pwrite`.
pub fn poke(addr: usize, data: &[u8]) -> Result<(), Error> {
    let fd = own_memory()?;
    // SAFETY: The buffer has the length that is passed; what is written is memory that the caller
    // accesses by volatile reads and writes.
    let n = unsafe { libc::pwrite(fd, data.as_ptr().cast(), data.len(), addr as libc::off_t) };
    if n < 0 || n.unsigned_abs() != data.len() {
        return Err(Error::last("pwrite of /proc/self/mem"));
    }
    Ok(())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: The range was mapped by `new` and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base as *mut _, self.reserved) };
    }
}
