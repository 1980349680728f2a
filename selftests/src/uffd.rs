// SPDX-License-Identifier: GPL-2.0

//! Page faults that a program resolves: userfaultfd.

use crate::mem::PAGE;
use crate::sys::Error;
use crate::{skip, Verdict};
use std::os::fd::RawFd;

/// Faults of pages that are not there.
pub const MISSING: u64 = 1;
/// Faults of writes to pages that are protected.
pub const PROTECTED: u64 = 2;

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const EVENT_PAGEFAULT: u8 = 0x12;

/// A fault that waits for its resolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The address of the page.
    pub page: usize,
    /// It was a write.
    pub write: bool,
    /// The page is there, and protected.
    pub protected: bool,
}

/// Memory of this process whose faults wait for [`Uffd::copy`] or [`Uffd::protect`].
#[derive(Debug)]
pub struct Uffd {
    fd: RawFd,
}

impl Uffd {
    /// Has the faults of `modes` in a range wait.
    ///
    /// # Errors
    ///
    /// A skip if the kernel has no such thing, or the failure.
    pub fn new(addr: usize, len: usize, modes: u64) -> Result<Self, Verdict> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: Makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            let e = Error::last("userfaultfd");
            if e.errno == libc::ENOSYS {
                skip!("no userfaultfd");
            }
            return Err(e.into());
        }
        let uffd = Uffd {
            fd: RawFd::try_from(fd).unwrap_or(-1),
        };
        let mut api = [UFFD_API, FEATURE_PAGEFAULT_FLAG_WP, 0];
        uffd.call(UFFDIO_API, &mut api, "UFFDIO_API")?;
        let mut register = [addr as u64, len as u64, modes, 0];
        uffd.call(UFFDIO_REGISTER, &mut register, "UFFDIO_REGISTER")?;
        Ok(uffd)
    }

    fn call<T>(&self, request: u64, arg: &mut T, what: &'static str) -> Result<(), Error> {
        // SAFETY: Callers pass what the request takes, and it lives through the call.
        let r = unsafe { libc::ioctl(self.fd, request, std::ptr::from_mut(arg)) };
        if r < 0 {
            return Err(Error::last(what));
        }
        Ok(())
    }

    /// The next fault, if there is one within `ms` milliseconds.
    ///
    /// # Errors
    ///
    /// The failure of `read`.
    pub fn wait(&self, ms: i32) -> Result<Option<Fault>, Error> {
        let mut poll = libc::pollfd {
            fd: self.fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut message = [0u64; 4];
        // SAFETY: One pollfd, and a message of the length that is passed.
        let n = unsafe {
            libc::poll(&mut poll, 1, ms);
            libc::read(self.fd, message.as_mut_ptr().cast(), 32)
        };
        if n < 0 {
            let e = Error::last("read of userfaultfd");
            return if e.errno == libc::EAGAIN {
                Ok(None)
            } else {
                Err(e)
            };
        }
        if message[0] & 0xff != u64::from(EVENT_PAGEFAULT) {
            return Ok(None);
        }
        Ok(Some(Fault {
            page: usize::try_from(message[2]).unwrap_or(0) & !(PAGE - 1),
            write: message[1] & 1 != 0,
            protected: message[1] & 2 != 0,
        }))
    }

    /// Puts a page where there is none: all its words are `word`. The faults that wait for it go on.
    ///
    /// # Errors
    ///
    /// The failure: EEXIST if there is one.
    pub fn copy(&self, page: usize, word: u64) -> Result<(), Error> {
        let source = vec![word; PAGE / 8];
        let mut copy = [page as u64, source.as_ptr() as u64, PAGE as u64, 0, 0];
        self.call(UFFDIO_COPY, &mut copy, "UFFDIO_COPY")
    }

    /// Protects pages against writes, or not any more: then the faults that wait go on.
    ///
    /// # Errors
    ///
    /// The failure.
    pub fn protect(&self, addr: usize, len: usize, protect: bool) -> Result<(), Error> {
        let mut arg = [addr as u64, len as u64, u64::from(protect)];
        self.call(UFFDIO_WRITEPROTECT, &mut arg, "UFFDIO_WRITEPROTECT")
    }
}

impl Drop for Uffd {
    fn drop(&mut self) {
        // SAFETY: The descriptor is ours. Faults that wait go on without it.
        unsafe { libc::close(self.fd) };
    }
}
