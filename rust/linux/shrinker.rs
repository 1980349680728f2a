// SPDX-License-Identifier: GPL-2.0

//! Objects that can be given back when the host runs short of memory.

use crate::bindings as own;
use core::ffi::c_void;
use core::ptr::NonNull;
use kernel::prelude::*;
use kernel::sync::Arc;

/// What has such objects.
pub(crate) trait Shrinks: Send + Sync + 'static {
    /// How many there are.
    fn count(&self) -> u64;
    /// Frees up to so many; returns how many. Called in a thread that wants memory, with none of our spinlocks held.
    fn scan(&self, nr: u64) -> u64;
}

/// A shrinker, registered.
///
/// # Invariants
///
/// `raw` is registered with the address of what `object` holds.
pub(crate) struct Shrinker<T: Shrinks> {
    raw: NonNull<own::shrinker>,
    _object: Arc<T>,
}

// SAFETY: The kernel lets any thread free a shrinker; the object is Send and Sync.
unsafe impl<T: Shrinks> Send for Shrinker<T> {}
// SAFETY: A shared reference gives nothing.
unsafe impl<T: Shrinks> Sync for Shrinker<T> {}

impl<T: Shrinks> Shrinker<T> {
    /// Registers one: ENOMEM. Sleeps.
    pub(crate) fn register(object: Arc<T>) -> Result<Self> {
        let data = core::ptr::from_ref(&*object).cast_mut().cast();
        // SAFETY: `data` is the `T` in `object`, which the result holds: it is dropped after the shrinker is freed, and
        // that waits for the callbacks.
        let raw = unsafe { own::rkvm_shrinker_register(data, Some(Self::count), Some(Self::scan)) };
        // INVARIANT: Registered just now.
        Ok(Self {
            raw: NonNull::new(raw).ok_or(ENOMEM)?,
            _object: object,
        })
    }

    /// # Safety
    ///
    /// `data` points to a `T`.
    unsafe extern "C" fn count(data: *const c_void) -> u64 {
        // SAFETY: By the above.
        unsafe { &*data.cast::<T>() }.count()
    }

    /// # Safety
    ///
    /// `data` points to a `T`.
    unsafe extern "C" fn scan(data: *const c_void, nr: u64) -> u64 {
        // SAFETY: By the above.
        unsafe { &*data.cast::<T>() }.scan(nr)
    }
}

impl<T: Shrinks> Drop for Shrinker<T> {
    fn drop(&mut self) {
        // SAFETY: By the invariant it is registered, and it is freed this once. `_object` is dropped after this.
        unsafe { own::rkvm_shrinker_free(self.raw.as_ptr()) };
    }
}
