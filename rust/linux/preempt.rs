// SPDX-License-Identifier: GPL-2.0

//! Preempt notifiers: being told when the scheduler takes the thread off its CPU and puts it back.

use super::irq::PreemptOff;
use crate::bindings;
use core::cell::UnsafeCell;
use core::marker::PhantomData;
use kernel::prelude::*;
use kernel::types::Opaque;

/// What follows a thread on and off its CPU.
///
/// Both are called with preemption off, `switched_out` with the run queue's lock held and
/// interrupts off too: neither may sleep. They are called for the thread that registered only, so
/// never while it runs, and take `&self` because that thread may hold a reference.
pub(crate) trait FollowsThread {
    /// The thread is about to run on this CPU.
    fn switched_in(&self, preempt: &PreemptOff);
    /// The thread is about to lose its CPU.
    fn switched_out(&self, preempt: &PreemptOff);
}

/// The scheduler looks for preempt notifiers while one of these lives. Turning that on and off patches
/// the kernel's text, so it is held for as long as a VM lives, not for each run.
pub(crate) struct NotifiersOn(());

impl NotifiersOn {
    /// Turns it on, if nobody else had; sleeps.
    pub(crate) fn new() -> Self {
        // SAFETY: Balanced by `drop`.
        unsafe { bindings::preempt_notifier_inc() };
        Self(())
    }
}

impl Drop for NotifiersOn {
    fn drop(&mut self) {
        // SAFETY: Balances `new`.
        unsafe { bindings::preempt_notifier_dec() };
    }
}

/// A preempt notifier with what it notifies.
///
/// # Invariants
///
/// `notifier` is initialised with operations for `Self`.
#[pin_data]
#[repr(C)]
pub(crate) struct Followed<T: FollowsThread> {
    /// First, so that a pointer to it is a pointer to the whole.
    #[pin]
    notifier: Opaque<bindings::preempt_notifier>,
    ops: UnsafeCell<bindings::preempt_ops>,
    inner: T,
}

// SAFETY: The notifier is linked only while a `Following` guard, bound to its thread, lives.
unsafe impl<T: FollowsThread + Send> Send for Followed<T> {}
// SAFETY: As above.
unsafe impl<T: FollowsThread + Sync> Sync for Followed<T> {}

impl<T: FollowsThread> Followed<T> {
    /// Wraps `inner`; nothing is followed yet.
    pub(crate) fn new(inner: T) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            ops: UnsafeCell::new(bindings::preempt_ops {
                sched_in: Some(Self::sched_in),
                sched_out: Some(Self::sched_out),
            }),
            notifier <- Opaque::ffi_init(|slot: *mut bindings::preempt_notifier| {
                // SAFETY: `this` is being initialised, pinned, and `ops` has been written above;
                // `slot` is its notifier, valid for writes.
                unsafe {
                    let ops = &raw mut (*this.as_ptr()).ops;
                    bindings::rkvm_preempt_notifier_init(slot, ops.cast())
                }
            }),
            inner,
        })
    }

    /// Loads `inner` on this CPU and follows the current thread until the guard is dropped.
    pub(crate) fn follow(&self, _on: &NotifiersOn) -> Following<'_, T> {
        let preempt = PreemptOff::new();
        self.inner.switched_in(&preempt);
        // SAFETY: The notifier is initialised, by the invariant, and is not linked: only the holder
        // of the vCPU's mutex calls this, once at a time. The scheduler looks, says `_on`.
        unsafe { bindings::preempt_notifier_register(self.notifier.get()) };
        Following {
            followed: self,
            _not_send: PhantomData,
        }
    }

    /// # Safety
    ///
    /// `notifier` is the first field of a `Followed<T>` that is alive.
    unsafe extern "C" fn sched_in(notifier: *mut bindings::preempt_notifier, _cpu: i32) {
        // SAFETY: By `repr(C)` the notifier's address is that of the whole.
        let this = unsafe { &*notifier.cast::<Self>() };
        this.inner.switched_in(&PreemptOff::new());
    }

    /// # Safety
    ///
    /// As [`Self::sched_in`].
    unsafe extern "C" fn sched_out(
        notifier: *mut bindings::preempt_notifier,
        _next: *mut kernel::bindings::task_struct,
    ) {
        // SAFETY: By `repr(C)` the notifier's address is that of the whole.
        let this = unsafe { &*notifier.cast::<Self>() };
        this.inner.switched_out(&PreemptOff::new());
    }
}

/// The notifier is registered, and the state loaded, while this lives.
pub(crate) struct Following<'a, T: FollowsThread> {
    followed: &'a Followed<T>,
    _not_send: kernel::types::NotThreadSafe,
}

impl<T: FollowsThread> Following<'_, T> {
    /// What is notified.
    #[inline]
    pub(crate) fn get(&self) -> &T {
        &self.followed.inner
    }
}

impl<T: FollowsThread> Drop for Following<'_, T> {
    fn drop(&mut self) {
        let preempt = PreemptOff::new();
        self.followed.inner.switched_out(&preempt);
        // SAFETY: Registered by `follow` on this thread, which the guard cannot leave.
        unsafe { bindings::preempt_notifier_unregister(self.followed.notifier.get()) };
    }
}
