// SPDX-License-Identifier: GPL-2.0

//! `rwlock_t`: many readers or one writer, none of whom sleeps.
//!
//! The readers see `&T`, the writer `&mut T`; what a `T` lets its readers change (atomics) and what
//! only its writer may (the methods that take `&mut self`) is then the lock's rule, and the
//! compiler's to keep.

use crate::bindings as own;
use core::cell::UnsafeCell;
use core::ops::Deref;
use core::ops::DerefMut;
use kernel::bindings;
use kernel::prelude::*;
use kernel::types::NotThreadSafe;
use kernel::types::Opaque;

/// A value under a `rwlock_t`. All locks made here share one lockdep class.
#[pin_data]
pub(crate) struct RwLock<T> {
    #[pin]
    raw: Opaque<bindings::rwlock_t>,
    data: UnsafeCell<T>,
}

// SAFETY: The lock hands the value from thread to thread, which `T: Send` allows.
unsafe impl<T: Send> Send for RwLock<T> {}
// SAFETY: Readers on several threads share `&T` (`T: Sync`); the writer has `&mut T` (`T: Send`).
unsafe impl<T: Send + Sync> Sync for RwLock<T> {}

impl<T> RwLock<T> {
    /// A lock around `data`.
    pub(crate) fn new(data: T) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: The slot is memory for a `rwlock_t` that stays where it is.
            raw <- Opaque::ffi_init(|slot| unsafe { own::rkvm_rwlock_init(slot) }),
            data: UnsafeCell::new(data),
        })
    }

    /// Takes the lock for reading. Spins; may be taken with interrupts on only, as nobody takes it
    /// in an interrupt.
    #[inline]
    pub(crate) fn read(&self) -> ReadGuard<'_, T> {
        // SAFETY: The lock is initialised: there is no other way to a `&Self`.
        unsafe { own::rkvm_read_lock(self.raw.get()) };
        // INVARIANT: Taken just now.
        ReadGuard {
            lock: self,
            _here: NotThreadSafe,
        }
    }

    /// Takes the lock for writing. Spins.
    #[inline]
    pub(crate) fn write(&self) -> WriteGuard<'_, T> {
        // SAFETY: As in `read`.
        unsafe { own::rkvm_write_lock(self.raw.get()) };
        // INVARIANT: Taken just now.
        WriteGuard {
            lock: self,
            _here: NotThreadSafe,
        }
    }
}

/// The lock, held for reading.
///
/// # Invariants
///
/// This thread holds `lock` for reading.
#[must_use = "the lock is released at once"]
pub(crate) struct ReadGuard<'a, T> {
    lock: &'a RwLock<T>,
    _here: NotThreadSafe,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: By the invariant there is no writer, so no `&mut T`, while the guard lives.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the invariant the lock is held for reading, and by this thread.
        unsafe { own::rkvm_read_unlock(self.lock.raw.get()) };
    }
}

/// The lock, held for writing.
///
/// # Invariants
///
/// This thread holds `lock` for writing.
#[must_use = "the lock is released at once"]
pub(crate) struct WriteGuard<'a, T> {
    lock: &'a RwLock<T>,
    _here: NotThreadSafe,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: By the invariant nobody else has a reference of any kind.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: By the invariant nobody else has a reference of any kind.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the invariant the lock is held for writing, and by this thread.
        unsafe { own::rkvm_write_unlock(self.lock.raw.get()) };
    }
}
