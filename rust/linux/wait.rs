// SPDX-License-Identifier: GPL-2.0

//! One thread that sleeps until others give it a reason.

use crate::bindings as own;
use core::sync::atomic::AtomicU32;
use kernel::prelude::*;
use kernel::types::Opaque;

/// Where a thread sleeps; one at a time.
#[pin_data]
pub(crate) struct Sleeper {
    #[pin]
    wait: Opaque<own::rcuwait>,
}

// SAFETY: The kernel's own accesses are atomic.
unsafe impl Send for Sleeper {}
// SAFETY: As above: any thread may wake. Should two sleep, against what `sleep_until` asks, the pointer
// to one of them is overwritten, and that one is not woken; the pointer is read under RCU, so the task
// behind it is alive.
unsafe impl Sync for Sleeper {}

impl Sleeper {
    /// Nobody sleeps.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            wait <- Opaque::ffi_init(|slot: *mut own::rcuwait| {
                // SAFETY: The slot is memory for the structure.
                unsafe { own::rkvm_rcuwait_init(slot) }
            }),
        })
    }

    /// Sleeps until `word` has one of the bits in `mask` or the thread has a signal. By one thread at a
    /// time. Who sets a bit calls [`wake`](Self::wake) after that.
    pub(crate) fn sleep_until(&self, word: &AtomicU32, mask: u32) {
        // SAFETY: Both live as long as the call; the word is read atomically.
        unsafe { own::rkvm_rcuwait_sleep(self.wait.get(), word.as_ptr(), mask) };
    }

    /// Wakes the thread, if one sleeps; returns if so. In any context.
    #[inline]
    pub(crate) fn wake(&self) -> bool {
        // SAFETY: Initialised by `new`.
        unsafe { own::rcuwait_wake_up(self.wait.get()) != 0 }
    }
}
