// SPDX-License-Identifier: GPL-2.0

//! The host's clocks, as guests' are made of them.

use crate::bindings;
use crate::x86::clock::HostTime;
use kernel::error::to_result;
use kernel::ffi::c_void;
use kernel::prelude::*;
use kernel::sync::Arc;

/// What the clocks say. In any context but while timekeeping is suspended.
pub(crate) fn now() -> HostTime {
    let mut time = bindings::rkvm_host_time::default();
    // SAFETY: `time` is valid for writes.
    unsafe { bindings::rkvm_host_time(&mut time) };
    HostTime {
        ns: time.ns,
        real: time.real,
        tsc: time.tsc,
        by_tsc: time.by_tsc,
    }
}

/// Whether the time-stamp counters of all CPUs agree.
pub(crate) fn tsc_is_stable() -> bool {
    // SAFETY: Reads a variable of the kernel.
    unsafe { bindings::rkvm_tsc_is_stable() }
}

/// Who wants to know that the host tells the time by another clock.
pub(crate) trait OnSourceChange: Send + Sync + 'static {
    /// It began or ceased to tell it by the time-stamp counter. May sleep.
    fn source_changed(&self);
}

/// While it lives, somebody is told.
///
/// # Invariants
///
/// The kernel side calls [`Self::changed`] with the address of what `target` holds.
pub(crate) struct SourceWatch<T: OnSourceChange> {
    target: Arc<T>,
}

impl<T: OnSourceChange> SourceWatch<T> {
    /// Begins to watch: EBUSY if somebody does so already.
    pub(crate) fn new(target: Arc<T>) -> Result<Self> {
        // SAFETY: `drop` ends it, and waits for calls that are under way, before what `target` holds can go.
        to_result(unsafe {
            bindings::rkvm_host_time_watch(Some(Self::changed), (&raw const *target).cast())
        })?;
        // INVARIANT: Just now.
        Ok(Self { target })
    }

    /// What is told.
    pub(crate) fn target(&self) -> &Arc<T> {
        &self.target
    }

    /// # Safety
    ///
    /// `target` is the address of a `T` that lives until this returns.
    unsafe extern "C" fn changed(target: *const c_void) {
        // SAFETY: By the caller.
        unsafe { &*target.cast::<T>() }.source_changed();
    }
}

impl<T: OnSourceChange> Drop for SourceWatch<T> {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is something to end.
        unsafe { bindings::rkvm_host_time_unwatch() };
    }
}
