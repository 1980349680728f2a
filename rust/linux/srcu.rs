// SPDX-License-Identifier: GPL-2.0

//! Sleepable RCU around one pointer: readers never wait and may sleep, a writer publishes a new
//! value and waits until nobody reads the old one.

use crate::bindings as own;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::Ordering;
use kernel::bindings;
use kernel::prelude::*;
use kernel::types::NotThreadSafe;
use kernel::types::Opaque;

/// A value that is read under SRCU and replaced as a whole. All cells made here share one lockdep
/// class.
///
/// # Invariants
///
/// `current` came from [`KBox::into_raw`], and whoever takes it out of the cell frees it only after
/// a grace period of `srcu`.
#[pin_data(PinnedDrop)]
pub(crate) struct SrcuCell<T> {
    #[pin]
    srcu: Opaque<bindings::srcu_struct>,
    current: AtomicPtr<T>,
    _owns: PhantomData<KBox<T>>,
}

// SAFETY: The cell owns its value, and `srcu_struct` belongs to no thread.
unsafe impl<T: Send> Send for SrcuCell<T> {}
// SAFETY: Readers share `&T` (`T: Sync`); values pass from one thread to another (`T: Send`).
unsafe impl<T: Send + Sync> Sync for SrcuCell<T> {}

impl<T> SrcuCell<T> {
    /// A cell that holds `value`: ENOMEM.
    pub(crate) fn new(value: KBox<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            srcu <- Opaque::try_ffi_init(|slot| {
                // SAFETY: The slot is memory for an `srcu_struct` that stays where it is.
                kernel::error::to_result(unsafe { own::rkvm_srcu_init(slot) })
            }),
            // INVARIANT: From a box, and nobody else has it. (The last field that can matter: if
            // `srcu` fails, `value` is dropped as the box that it still is.)
            current: AtomicPtr::new(KBox::into_raw(value)),
            _owns: PhantomData,
        }? Error)
    }

    /// Reads the value of this moment: it stays until the guard goes. May sleep meanwhile.
    #[inline]
    pub(crate) fn read(&self) -> SrcuGuard<'_, T> {
        // SAFETY: `srcu` is initialised.
        let index = unsafe { own::rkvm_srcu_read_lock(self.srcu.get()) };
        // Acquire: what was written before the value was published is seen through it.
        let value = self.current.load(Ordering::Acquire);
        // INVARIANT: Loaded inside the critical section, so by the cell's invariant it is not freed
        // before the section ends.
        SrcuGuard {
            cell: self,
            // SAFETY: By the cell's invariant the pointer came from a box, so it is not null.
            value: unsafe { NonNull::new_unchecked(value) },
            index,
            _here: NotThreadSafe,
        }
    }

    /// Publishes `new`, waits until no reader has the old value, and returns that. Sleeps; to call
    /// it with a guard of this cell alive would wait for ever.
    pub(crate) fn replace(&self, new: KBox<T>) -> KBox<T> {
        // Release: a reader that sees the pointer sees the value; acquire, for the old one.
        let old = self.current.swap(KBox::into_raw(new), Ordering::AcqRel);
        // SAFETY: `srcu` is initialised, and the caller may sleep.
        unsafe { bindings::synchronize_srcu_expedited(self.srcu.get()) };
        // SAFETY: By the invariant the pointer came from a box; the swap made it ours alone, and
        // readers that had loaded it before are gone since the grace period.
        unsafe { KBox::from_raw(old) }
    }
}

#[pinned_drop]
impl<T> PinnedDrop for SrcuCell<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Initialised; guards borrow the cell, so there is no reader left.
        unsafe { bindings::cleanup_srcu_struct(self.srcu.get()) };
        let value = self.current.load(Ordering::Relaxed);
        // SAFETY: By the invariant it came from a box, and there is nobody else to free it.
        drop(unsafe { KBox::from_raw(value) });
    }
}

/// A read-side critical section and the value read in it.
///
/// # Invariants
///
/// This thread is in the section of `cell.srcu` that `index` names, and `value` was loaded in it.
pub(crate) struct SrcuGuard<'a, T> {
    cell: &'a SrcuCell<T>,
    value: NonNull<T>,
    index: i32,
    _here: NotThreadSafe,
}

impl<T> Deref for SrcuGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: By the invariants of the guard and the cell the value is not freed while the
        // section lasts, and published values are only ever shared.
        unsafe { self.value.as_ref() }
    }
}

impl<T> Drop for SrcuGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the invariant this thread is in that section.
        unsafe { own::rkvm_srcu_read_unlock(self.cell.srcu.get(), self.index) };
    }
}
