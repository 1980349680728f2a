// SPDX-License-Identifier: GPL-2.0

//! The machine sleeps, wakes up, or goes down for good: the last CPU's part in it.
//!
//! The other CPUs have gone offline before a sleep, and come back after it: see [`super::cpu`].

use super::cpu::PerCpuHold;
use crate::bindings;
use core::ffi::c_void;
use core::marker::PhantomData;
use kernel::prelude::*;
use kernel::types::Opaque;

/// What is held on every CPU is released on the last one before the machine sleeps, acquired again when
/// it wakes up, and released on all when it shuts down, restarts or starts another kernel.
///
/// When the machine goes down, threads are not stopped before: they go on without what was held.
///
/// # Invariants
///
/// `callbacks` are registered, with the functions of `T`.
#[pin_data(PinnedDrop)]
pub(crate) struct PowerState<T: PerCpuHold> {
    #[pin]
    callbacks: Opaque<bindings::syscore>,
    _hold: PhantomData<fn() -> T>,
}

// SAFETY: The registration belongs to no thread.
unsafe impl<T: PerCpuHold> Send for PowerState<T> {}
// SAFETY: There is nothing to be done with a reference.
unsafe impl<T: PerCpuHold> Sync for PowerState<T> {}

impl<T: PerCpuHold> PowerState<T> {
    const OPS: &'static bindings::syscore_ops = &bindings::syscore_ops {
        suspend: Some(Self::suspend),
        resume: Some(Self::resume),
        shutdown: Some(Self::shutdown),
    };

    /// Registers the callbacks. What they are about is held already: see
    /// [`HotplugState`](super::cpu::HotplugState). EBUSY if the machine is going down.
    pub(crate) fn register() -> impl PinInit<Self, Error> {
        // INVARIANT: The initialiser registers them.
        try_pin_init!(Self {
            callbacks <- Opaque::try_ffi_init(|slot: *mut bindings::syscore| {
                // SAFETY: The slot is memory for the structure, which stays where it is until `drop`;
                // the functions are of this module and need no data.
                unsafe {
                    slot.write(bindings::syscore {
                        ops: Self::OPS,
                        ..Default::default()
                    });
                    bindings::register_syscore(slot);
                }
                // Either the callback comes, or this is seen.
                // SAFETY: Reads the state of the system.
                if unsafe { bindings::rkvm_machine_goes_down() } {
                    // SAFETY: Registered just now.
                    unsafe { bindings::unregister_syscore(slot) };
                    return Err(EBUSY);
                }
                Ok(())
            }),
            _hold: PhantomData,
        })
    }

    /// # Safety
    ///
    /// Called by the kernel on the last CPU, with interrupts off.
    unsafe extern "C" fn suspend(_data: *mut c_void) -> i32 {
        T::release();
        T::sleeps();
        0
    }

    /// # Safety
    ///
    /// As [`suspend`](Self::suspend).
    unsafe extern "C" fn resume(_data: *mut c_void) {
        T::woke();
        if T::acquire().is_err() {
            pr_err!("this CPU woke up without what it had before\n");
        }
    }

    /// # Safety
    ///
    /// Called by the kernel with interrupts on, once all devices are shut down.
    unsafe extern "C" fn shutdown(_data: *mut c_void) {
        // SAFETY: The function may be called in interrupt context.
        unsafe { bindings::rkvm_shut_down_cpus(Some(Self::shutdown_cpu)) };
    }

    /// # Safety
    ///
    /// Called on each CPU, with interrupts off.
    unsafe extern "C" fn shutdown_cpu(_data: *mut c_void) {
        T::release();
    }
}

#[pinned_drop]
impl<T: PerCpuHold> PinnedDrop for PowerState<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the invariant they are registered.
        unsafe { bindings::unregister_syscore(self.callbacks.get()) };
    }
}
