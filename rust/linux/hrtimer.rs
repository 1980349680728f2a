// SPDX-License-Identifier: GPL-2.0

//! High-resolution timers that call back from the interrupt.
//!
//! The kernel crate's timers are handed over when they start and given back when they are cancelled.
//! Those here stay with their owner, who arms them anew as often as the guest asks.

use crate::bindings as own;
use kernel::bindings;
use kernel::prelude::*;
use kernel::types::Opaque;

/// What happens when a timer expires.
pub(crate) trait OnExpiry: Send + Sync + 'static {
    /// Called with interrupts off, at or after the time that was set. `now_ns` is that of
    /// CLOCK_MONOTONIC; what is returned, if anything, is when to expire again.
    fn expired(&self, now_ns: u64) -> Option<u64>;
}

/// A timer and what it is for.
pub(crate) struct HrTimer<T: OnExpiry>(Pin<KBox<Inner<T>>>);

/// # Invariants
///
/// `timer` is initialised, and its function is [`Inner::expire`].
#[pin_data(PinnedDrop)]
#[repr(C)]
struct Inner<T: OnExpiry> {
    /// First, so that a pointer to it is a pointer to the whole.
    #[pin]
    timer: Opaque<bindings::hrtimer>,
    target: T,
}

// SAFETY: The kernel's timer functions lock for themselves, and a callback may run anywhere: it gets
// `&T`, which is `Sync`.
unsafe impl<T: OnExpiry> Send for Inner<T> {}
// SAFETY: As above.
unsafe impl<T: OnExpiry> Sync for Inner<T> {}

/// Nanoseconds of CLOCK_MONOTONIC.
#[inline]
pub(crate) fn now() -> u64 {
    // SAFETY: Reads a clock; allowed in every context.
    (unsafe { bindings::ktime_get() }) as u64
}

impl<T: OnExpiry> HrTimer<T> {
    /// A timer that is not armed: ENOMEM.
    pub(crate) fn new(target: T) -> Result<Self> {
        let inner = KBox::try_pin_init(
            try_pin_init!(Inner {
                // INVARIANT: Initialised with that function.
                timer <- Opaque::ffi_init(|slot: *mut bindings::hrtimer| {
                    // SAFETY: The slot is memory for a timer that stays where it is.
                    unsafe { own::rkvm_hrtimer_setup(slot, Some(Inner::<T>::expire)) }
                }),
                target,
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )?;
        Ok(Self(inner))
    }

    /// Has it expire at `expires_ns` of CLOCK_MONOTONIC, and not when it was to before. In any context
    /// but its own callback.
    pub(crate) fn arm(&self, expires_ns: u64) {
        let expires = i64::try_from(expires_ns).unwrap_or(i64::MAX);
        // SAFETY: By the invariant the timer is initialised.
        unsafe { own::rkvm_hrtimer_start(self.0.timer.get(), expires) };
    }

    /// Has it not expire, and waits for a callback that runs. Not in the callback, nor with a lock held
    /// that it takes.
    pub(crate) fn cancel(&self) {
        // SAFETY: By the invariant the timer is initialised.
        unsafe { bindings::hrtimer_cancel(self.0.timer.get()) };
    }
}

impl<T: OnExpiry> Inner<T> {
    /// # Safety
    ///
    /// `timer` is the first field of an `Inner<T>` that is alive.
    unsafe extern "C" fn expire(timer: *mut bindings::hrtimer) -> bindings::hrtimer_restart {
        // SAFETY: By `repr(C)` the timer's address is that of the whole, which waits for callbacks
        // before it goes.
        let this = unsafe { &*timer.cast::<Self>() };
        match this.target.expired(now()) {
            Some(next) => {
                let next = i64::try_from(next).unwrap_or(i64::MAX);
                // SAFETY: In the timer's own callback, where its expiry may be changed.
                unsafe { own::rkvm_hrtimer_set_expires(timer, next) };
                bindings::hrtimer_restart_HRTIMER_RESTART
            }
            None => bindings::hrtimer_restart_HRTIMER_NORESTART,
        }
    }
}

#[pinned_drop]
impl<T: OnExpiry> PinnedDrop for Inner<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the invariant the timer is initialised. No callback runs after this.
        unsafe { bindings::hrtimer_cancel(self.timer.get()) };
    }
}
