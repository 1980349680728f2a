// SPDX-License-Identifier: GPL-2.0

//! Eventfds.

use crate::sys::Error;
use crate::vm::Fd;
use std::os::fd::RawFd;

/// An eventfd that does not block.
#[derive(Debug)]
pub struct EventFd {
    fd: Fd,
}

impl EventFd {
    /// One whose counter is 0.
    ///
    /// # Errors
    ///
    /// The failure of `eventfd`.
    pub fn new() -> Result<Self, Error> {
        // SAFETY: Takes numbers only.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last("eventfd"));
        }
        Ok(EventFd { fd: Fd(fd) })
    }

    /// Another descriptor of the same.
    ///
    /// # Errors
    ///
    /// The failure of `dup`.
    pub fn duplicate(&self) -> Result<Self, Error> {
        // SAFETY: Takes a number only.
        let fd = unsafe { libc::dup(self.fd.0) };
        if fd < 0 {
            return Err(Error::last("dup"));
        }
        Ok(EventFd { fd: Fd(fd) })
    }

    /// Its descriptor.
    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.fd.0
    }

    /// Adds 1 to the counter.
    ///
    /// # Errors
    ///
    /// The failure of `write`.
    pub fn signal(&self) -> Result<(), Error> {
        let one = 1u64;
        // SAFETY: The value lives through the call and has the length that is passed.
        let n = unsafe { libc::write(self.fd.0, std::ptr::from_ref(&one).cast(), 8) };
        if n != 8 {
            return Err(Error::last("write of an eventfd"));
        }
        Ok(())
    }

    /// Takes the counter, which is 0 then.
    ///
    /// # Errors
    ///
    /// The failure of `read`; a counter of 0 is none.
    pub fn take(&self) -> Result<u64, Error> {
        let mut count = 0u64;
        // SAFETY: The value lives through the call and has the length that is passed.
        let n = unsafe { libc::read(self.fd.0, std::ptr::from_mut(&mut count).cast(), 8) };
        if n == 8 {
            return Ok(count);
        }
        match Error::last("read of an eventfd") {
            e if e.errno == libc::EAGAIN => Ok(0),
            e => Err(e),
        }
    }

    /// Waits until the counter is not 0, or some milliseconds: whether it is not.
    #[must_use]
    pub fn wait(&self, ms: u64) -> bool {
        let mut p = libc::pollfd {
            fd: self.fd.0,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: One structure, which lives through the call.
        let n = unsafe { libc::poll(&mut p, 1, i32::try_from(ms).unwrap_or(i32::MAX)) };
        n == 1 && p.revents & libc::POLLIN != 0
    }
}
