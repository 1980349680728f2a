// SPDX-License-Identifier: GPL-2.0

//! A mutex that a fatal signal can get a waiter out of.
//!
//! A vCPU's mutex is held for as long as the guest runs. Another thread that waits for it must be
//! killable, and the kernel crate's `Mutex` cannot wait so.

use crate::bindings;
use core::cell::UnsafeCell;
use core::ops::Deref;
use core::ops::DerefMut;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::str::CStr;
use kernel::sync::LockClassKey;
use kernel::types::NotThreadSafe;
use kernel::types::Opaque;
use pin_init::Wrapper;

/// A mutual-exclusion lock around `T`.
///
/// # Invariants
///
/// `raw` is an initialised mutex, and `data` is accessed only by who holds it.
#[pin_data]
pub(crate) struct KillableMutex<T> {
    #[pin]
    raw: Opaque<kernel::bindings::mutex>,
    #[pin]
    data: UnsafeCell<T>,
}

// SAFETY: The mutex hands `T` from thread to thread, which is what `T: Send` allows.
unsafe impl<T: Send> Send for KillableMutex<T> {}
// SAFETY: As above: shared references to the mutex give exclusive access to `T` only.
unsafe impl<T: Send> Sync for KillableMutex<T> {}

impl<T> KillableMutex<T> {
    /// Makes an unlocked mutex.
    pub(crate) fn new(
        data: impl PinInit<T, Error>,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            raw <- Opaque::ffi_init(|slot: *mut kernel::bindings::mutex| {
                // SAFETY: `slot` is valid for writes and pinned; name and key are static.
                unsafe {
                    kernel::bindings::__mutex_init(slot, name.as_char_ptr(), key.as_ptr())
                }
            }),
            // INVARIANT: `raw` has just been initialised.
            data <- UnsafeCell::pin_init(data),
        })
    }

    /// Waits for the mutex: EINTR if the thread is being killed.
    pub(crate) fn lock_killable(&self) -> Result<KillableGuard<'_, T>> {
        // SAFETY: By the invariant the mutex is initialised.
        let error = unsafe { bindings::rkvm_mutex_lock_killable(self.raw.get()) };
        // On the way into each KVM_RUN: asked first, `to_result` is a call.
        if error != 0 {
            to_result(error)?;
        }
        Ok(KillableGuard {
            lock: self,
            _not_send: NotThreadSafe::default(),
        })
    }
}

/// The mutex is held while this lives.
pub(crate) struct KillableGuard<'a, T> {
    lock: &'a KillableMutex<T>,
    _not_send: NotThreadSafe,
}

impl<T> KillableGuard<'_, T> {
    /// The data, pinned as the mutex that holds it is.
    pub(crate) fn as_mut(&mut self) -> Pin<&mut T> {
        // SAFETY: The guard is proof of exclusive access, and the mutex pins what it holds.
        unsafe { Pin::new_unchecked(&mut *self.lock.data.get()) }
    }
}

impl<T> Deref for KillableGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The mutex is held.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: Unpin> DerefMut for KillableGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: The mutex is held, and `T` may be moved.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for KillableGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: The guard is proof that this thread holds the mutex.
        unsafe { kernel::bindings::mutex_unlock(self.lock.raw.get()) };
    }
}
