// SPDX-License-Identifier: GPL-2.0

//! Doing something on every CPU, now and as CPUs come and go.

use super::irq::IrqsOff;
use crate::bindings;
use kernel::prelude::*;

/// What must be held on every CPU that is online and awake.
pub(crate) trait PerCpuHold: 'static {
    /// Called on a CPU that is coming up or waking up, and on each at the beginning. It cannot leave the
    /// CPU, and may not sleep. An error keeps a CPU from coming up.
    fn acquire() -> Result;
    /// Called on a CPU that goes down or to sleep, and on each at the end, with interrupts off. More than
    /// once when the machine goes down.
    fn release();
    /// The machine goes to sleep. Called on the last CPU, with interrupts off, after [`release`](Self::release).
    fn sleeps() {}
    /// The machine woke up, or did not sleep after all. Called on the first CPU, with interrupts off, before
    /// [`acquire`](Self::acquire).
    fn woke() {}
}

/// A CPU-hotplug state.
///
/// A CPU that goes down is told of it while threads are still there that have to be moved. None of
/// them executes anything on that CPU any more, but the scheduler may switch to one, to move it away.
/// (The state at which they all have gone, `CPUHP_AP_KVM_ONLINE`, is KVM's, and can be used once only.)
///
/// # Invariants
///
/// `state` is a registered state with the callbacks of `T`.
pub(crate) struct HotplugState<T: PerCpuHold> {
    state: i32,
    _hold: core::marker::PhantomData<fn() -> T>,
}

impl<T: PerCpuHold> HotplugState<T> {
    /// Acquires on every online CPU; the first refusal undoes what was done and is returned.
    pub(crate) fn register() -> Result<Self> {
        // SAFETY: The callbacks are functions of this module, which outlives the registration by
        // the lifetime of `Self`.
        let ret = unsafe { bindings::rkvm_cpuhp_setup(Some(Self::online), Some(Self::offline)) };
        if ret < 0 {
            return Err(Error::from_errno(ret));
        }
        // INVARIANT: Registered just now.
        Ok(Self {
            state: ret,
            _hold: core::marker::PhantomData,
        })
    }

    /// # Safety
    ///
    /// Called by the hotplug machinery, on the CPU that is coming up.
    unsafe extern "C" fn online(_cpu: u32) -> i32 {
        T::acquire().map_or_else(|e| e.to_errno(), |()| 0)
    }

    /// # Safety
    ///
    /// Called by the hotplug machinery, on the CPU that is going down.
    unsafe extern "C" fn offline(_cpu: u32) -> i32 {
        let _irqs = IrqsOff::new();
        T::release();
        0
    }
}

impl<T: PerCpuHold> Drop for HotplugState<T> {
    fn drop(&mut self) {
        // SAFETY: By the invariant the state is registered.
        unsafe { bindings::rkvm_cpuhp_remove(self.state) };
    }
}

/// Calls `f` with `arg` on `cpu` with interrupts off there, and waits for it. A CPU that is not
/// online is left alone.
///
/// # Safety
///
/// `f` may be called with `arg` on another CPU, in interrupt context.
pub(crate) unsafe fn call_on(
    cpu: i32,
    f: unsafe extern "C" fn(*mut core::ffi::c_void),
    arg: *mut core::ffi::c_void,
) {
    // SAFETY: As the caller promises. The error is that of a CPU that is offline.
    unsafe { bindings::rkvm_on_cpu(cpu, Some(f), arg) };
}

/// Returns if a guest may put its CPU to sleep with MWAIT and the host's timers go on meanwhile.
pub(crate) fn guest_may_mwait() -> bool {
    // SAFETY: Reads what the kernel found out of the processor.
    unsafe { bindings::rkvm_guest_may_mwait() }
}
