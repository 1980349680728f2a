// SPDX-License-Identifier: GPL-2.0

//! A spinlock that interrupt handlers take too: interrupts are off while it is held.

use crate::bindings as own;
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::ops::Deref;
use core::ops::DerefMut;
use kernel::bindings;
use kernel::prelude::*;
use kernel::str::CStr;
use kernel::sync::LockClassKey;
use kernel::types::NotThreadSafe;
use kernel::types::Opaque;

/// A value under a `raw_spinlock_t`.
#[pin_data]
pub(crate) struct IrqSpinLock<T> {
    #[pin]
    raw: Opaque<bindings::raw_spinlock_t>,
    data: UnsafeCell<T>,
}

// SAFETY: The lock hands the value from thread to thread, which `T: Send` allows.
unsafe impl<T: Send> Send for IrqSpinLock<T> {}
// SAFETY: As above: who shares the lock gets at the value one at a time.
unsafe impl<T: Send> Sync for IrqSpinLock<T> {}

impl<T> IrqSpinLock<T> {
    /// A lock around `data`. `key` is its lockdep class.
    pub(crate) fn new(
        data: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: The slot is memory for a lock that stays where it is; name and key are static.
            raw <- Opaque::ffi_init(move |slot| unsafe {
                own::rkvm_raw_spin_init(slot, name.as_char_ptr(), key.as_ptr())
            }),
            data: UnsafeCell::new(data),
        })
    }

    /// Takes the lock, and turns interrupts off until it is released. Spins; allowed in any context
    /// but an NMI's.
    #[inline]
    pub(crate) fn lock(&self) -> IrqSpinGuard<'_, T> {
        // SAFETY: The lock is initialised: there is no other way to a `&Self`.
        let flags = unsafe { own::rkvm_raw_spin_lock_irqsave(self.raw.get()) };
        // INVARIANT: Taken just now.
        IrqSpinGuard {
            lock: self,
            flags,
            _here: NotThreadSafe,
        }
    }
}

/// The lock, held.
///
/// # Invariants
///
/// This thread holds `lock`, and `flags` is what taking it returned.
#[must_use = "the lock is released at once"]
pub(crate) struct IrqSpinGuard<'a, T> {
    lock: &'a IrqSpinLock<T>,
    flags: usize,
    _here: NotThreadSafe,
}

impl<T> Deref for IrqSpinGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: By the invariant nobody else has a reference.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for IrqSpinGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: By the invariant nobody else has a reference.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for IrqSpinGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the invariant this thread holds the lock, and these are the flags.
        unsafe { own::rkvm_raw_spin_unlock_irqrestore(self.lock.raw.get(), self.flags) };
    }
}

/// Such a lock in a static, where lockdep's part of it cannot be made before the module is loaded.
///
/// # Invariants
///
/// By the time of `lock`, `init` has been called.
pub(crate) struct StaticIrqLock<T>(UnsafeCell<MaybeUninit<IrqSpinLock<T>>>);

// SAFETY: `init` comes before all else, says the contract of `new`; then it is an `IrqSpinLock`.
unsafe impl<T: Send> Sync for StaticIrqLock<T> {}

impl<T> StaticIrqLock<T> {
    /// A lock that is to be initialised.
    ///
    /// # Safety
    ///
    /// [`Self::init`] is called, and returns, before [`Self::lock`] is called.
    pub(crate) const unsafe fn new() -> Self {
        // INVARIANT: By the contract.
        Self(UnsafeCell::new(MaybeUninit::uninit()))
    }

    /// Makes it a lock around `data`. `key` is its lockdep class.
    ///
    /// # Safety
    ///
    /// Nobody else calls this or holds the lock meanwhile.
    pub(crate) unsafe fn init(
        &'static self,
        data: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) {
        let slot = self.0.get().cast::<IrqSpinLock<T>>();
        // SAFETY: The slot is memory for a lock, is the caller's for now, and never moves.
        let Ok(()) = unsafe { IrqSpinLock::new(data, name, key).__pinned_init(slot) };
    }

    /// As [`IrqSpinLock::lock`].
    #[inline]
    pub(crate) fn lock(&'static self) -> IrqSpinGuard<'static, T> {
        // SAFETY: It is initialised, by the invariant.
        unsafe { (*self.0.get()).assume_init_ref() }.lock()
    }
}
