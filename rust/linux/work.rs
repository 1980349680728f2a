// SPDX-License-Identifier: GPL-2.0

//! Work that is put off from where nobody may sleep to a thread of the kernel's.

use crate::bindings as own;
use kernel::bindings;
use kernel::prelude::*;
use kernel::types::Opaque;

/// What is done later.
pub(crate) trait OnWork: Send + Sync {
    /// Does it. May sleep.
    fn work(&self);
}

/// A work item with what it works on. It is not running any more when it has been dropped, so the
/// module is there for as long as it runs.
///
/// # Invariants
///
/// `raw` is an initialised work item whose function is [`Self::run`].
#[pin_data(PinnedDrop)]
#[repr(C)]
pub(crate) struct Work<T: OnWork> {
    /// First, so that a pointer to it is a pointer to the whole.
    #[pin]
    raw: Opaque<bindings::work_struct>,
    #[pin]
    target: T,
}

// SAFETY: A work item belongs to no thread.
unsafe impl<T: OnWork> Send for Work<T> {}
// SAFETY: The kernel guards its part of the item; `T` is `Sync`.
unsafe impl<T: OnWork> Sync for Work<T> {}

impl<T: OnWork> Work<T> {
    /// An item that is not queued.
    pub(crate) fn new(target: impl PinInit<T, Error>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            target <- target,
            raw <- Opaque::ffi_init(|slot: *mut bindings::work_struct| {
                // SAFETY: `slot` is memory for a work item that stays where it is.
                // INVARIANT: The function is ours.
                unsafe { own::rkvm_work_init(slot, Some(Self::run)) }
            }),
        }? Error)
    }

    /// Has the work done, once more if it is being done now. Allowed in any context but an NMI's.
    pub(crate) fn queue(&self) {
        // SAFETY: By the invariant the item is initialised; `drop` waits for it.
        unsafe { own::rkvm_work_queue(self.raw.get()) };
    }

    /// Waits until the work is neither queued nor being done. Sleeps; not to be called by the work.
    pub(crate) fn cancel(&self) {
        // SAFETY: By the invariant the item is initialised.
        unsafe { bindings::cancel_work_sync(self.raw.get()) };
    }

    /// What is worked on.
    #[inline]
    pub(crate) fn target(&self) -> &T {
        &self.target
    }

    /// # Safety
    ///
    /// `raw` is the first field of a `Work<T>` that lives until this returns.
    unsafe extern "C" fn run(raw: *mut bindings::work_struct) {
        // SAFETY: By `repr(C)` the item's address is that of the whole.
        let this = unsafe { &*raw.cast::<Self>() };
        this.target.work();
    }
}

#[pinned_drop]
impl<T: OnWork> PinnedDrop for Work<T> {
    fn drop(self: Pin<&mut Self>) {
        self.cancel();
    }
}
