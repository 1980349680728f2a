// SPDX-License-Identifier: GPL-2.0

//! Eventfds: to signal them, and to be called when one is signalled.

use crate::bindings as own;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::error::from_err_ptr;
use kernel::error::to_result;
use kernel::fs::file::LocalFile;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::types::Opaque;

/// A reference to an eventfd. Its file may be gone.
///
/// # Invariants
///
/// Holds a reference to the context.
#[derive(PartialEq, Eq)]
pub(crate) struct EventFd(NonNull<bindings::eventfd_ctx>);

// SAFETY: A reference to a context belongs to no thread.
unsafe impl Send for EventFd {}
// SAFETY: The context has a lock of its own.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// The eventfd with a descriptor: EBADF; EINVAL if it is something else.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        let file = file(fd)?;
        Self::of(&file)
    }

    fn of(file: &LocalFile) -> Result<Self> {
        // SAFETY: The file lives during the call.
        let raw = from_err_ptr(unsafe { bindings::eventfd_ctx_fileget(file.as_ptr()) })?;
        // INVARIANT: The function has taken a reference for us.
        Ok(Self(NonNull::new(raw).ok_or(EINVAL)?))
    }

    /// Adds one to its counter and wakes who waits. Does not sleep; must not be called by who was
    /// woken by an eventfd, within that.
    #[inline]
    pub(crate) fn signal(&self) {
        // SAFETY: By the invariant the context lives.
        unsafe { bindings::eventfd_signal_mask(self.0.as_ptr(), 0) };
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: By the invariant the reference is ours to give up.
        unsafe { bindings::eventfd_ctx_put(self.0.as_ptr()) };
    }
}

fn file(fd: i32) -> Result<ARef<LocalFile>> {
    LocalFile::fget(fd as u32).map_err(|_| EBADF)
}

/// Who is told what happens to an eventfd. Both are called with interrupts off and inside the
/// eventfd's lock: neither may sleep, nor signal an eventfd.
pub(crate) trait OnEvent: Send + Sync {
    /// It was signalled. May also be called when it is first followed, without the lock.
    fn signalled(&self);
    /// Its file is gone, so nobody will signal it from user space any more.
    fn closed(&self);
}

/// An eventfd that is followed: whoever signals it calls `T`, and nobody else is told.
///
/// # Invariants
///
/// `entry` is in the eventfd's wait queue, with [`Self::wake`] for its function.
#[pin_data(PinnedDrop)]
#[repr(C)]
pub(crate) struct Follower<T: OnEvent> {
    /// First, so that a pointer to it is a pointer to the whole.
    #[pin]
    entry: Opaque<bindings::wait_queue_entry>,
    eventfd: EventFd,
    target: T,
}

// SAFETY: The entry is guarded by the queue's lock.
unsafe impl<T: OnEvent> Send for Follower<T> {}
// SAFETY: As above; `T` is `Sync`.
unsafe impl<T: OnEvent> Sync for Follower<T> {}

impl<T: OnEvent> Follower<T> {
    /// Follows the eventfd with a descriptor: EBADF, EINVAL if it is something else; EBUSY if
    /// somebody follows it already. If it has been signalled before, `target` is called at once.
    pub(crate) fn new(fd: i32, target: T) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let file = file(fd)?;
            let eventfd = EventFd::of(&file)?;
            Ok(try_pin_init!(&this in Self {
                eventfd,
                target,
                // The last one: the function may be called at once, and finds the rest.
                entry <- Opaque::try_ffi_init(move |slot: *mut bindings::wait_queue_entry| {
                    // SAFETY: The file lives, `slot` is memory for an entry that stays where it is
                    // until `drop` takes it out of the queue.
                    // INVARIANT: In the queue unless it fails.
                    let result = unsafe {
                        own::rkvm_eventfd_follow(file.as_ptr().cast(), slot, Some(Self::wake))
                    };
                    to_result(result)?;
                    if result > 0 {
                        // SAFETY: `target` has been initialised above; what is called now takes
                        // it by shared references only.
                        unsafe { (*this.as_ptr()).target.signalled() };
                    }
                    Ok::<(), Error>(())
                }),
            }? Error))
        })
    }

    /// The eventfd.
    pub(crate) fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    /// Who is called.
    pub(crate) fn target(&self) -> &T {
        &self.target
    }

    /// # Safety
    ///
    /// `entry` is the first field of a `Follower<T>` in the queue of its eventfd, whose lock is held.
    unsafe extern "C" fn wake(
        entry: *mut bindings::wait_queue_entry,
        _mode: u32,
        _flags: i32,
        key: *mut core::ffi::c_void,
    ) -> i32 {
        // SAFETY: By `repr(C)` the entry's address is that of the whole, which lives until it has
        // taken the entry out, for which it needs the lock.
        let this = unsafe { &*entry.cast::<Self>() };
        // SAFETY: The key is what the kernel passed.
        let news = unsafe { own::rkvm_eventfd_news(key) };
        let mut count = 0;
        let signalled = news & own::RKVM_EVENTFD_SIGNALLED != 0;
        if signalled {
            // SAFETY: The context lives and its lock is held.
            unsafe { bindings::eventfd_ctx_do_read(this.eventfd.0.as_ptr(), &mut count) };
            this.target.signalled();
        }
        if news & own::RKVM_EVENTFD_CLOSED != 0 {
            this.target.closed();
        }
        // An exclusive waiter that was woken: nobody else is.
        i32::from(signalled)
    }
}

#[pinned_drop]
impl<T: OnEvent> PinnedDrop for Follower<T> {
    fn drop(self: Pin<&mut Self>) {
        let mut count = 0;
        // Takes the lock under which `wake` is called: it does not run any more afterwards.
        // SAFETY: By the invariants the context lives and the entry is in its queue.
        unsafe {
            bindings::eventfd_ctx_remove_wait_queue(
                self.eventfd.0.as_ptr(),
                self.entry.get(),
                &mut count,
            )
        };
    }
}
