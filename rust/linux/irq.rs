// SPDX-License-Identifier: GPL-2.0

//! Interrupts and preemption off, as guards.

use crate::bindings;
use core::marker::PhantomData;
use kernel::types::NotThreadSafe;

/// Interrupts are off on this CPU while one of these lives.
///
/// # Invariants
///
/// Interrupts were on when it was made, and are off.
pub(crate) struct IrqsOff(NotThreadSafe);

impl IrqsOff {
    /// Turns interrupts off. They must be on: nobody here nests.
    #[inline]
    pub(crate) fn new() -> Self {
        // SAFETY: Turning interrupts off is allowed anywhere; `drop` turns them on again.
        unsafe { bindings::rkvm_local_irq_disable() };
        // INVARIANT: They have just been turned off.
        Self(PhantomData)
    }
}

impl Drop for IrqsOff {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the invariant interrupts are off and were on when the guard was made.
        unsafe { bindings::rkvm_local_irq_enable() };
    }
}

/// The thread stays on this CPU while one of these lives.
pub(crate) struct PreemptOff(NotThreadSafe);

impl PreemptOff {
    /// Turns preemption off; it nests.
    #[inline]
    pub(crate) fn new() -> Self {
        // SAFETY: Balanced by `drop`.
        unsafe { bindings::rkvm_preempt_disable() };
        Self(PhantomData)
    }

    /// The CPU that the thread is on, and stays on.
    #[inline]
    pub(crate) fn cpu(&self) -> i32 {
        // SAFETY: Reads a per-CPU variable.
        unsafe { bindings::rkvm_smp_processor_id() }
    }

    /// Sends this CPU an interrupt, which ends a guest's run as soon as it has begun.
    pub(crate) fn interrupt_self(&self) {
        // SAFETY: The interrupt makes the CPU look if it must reschedule, no more.
        unsafe { bindings::rkvm_interrupt_self() };
    }
}

impl Drop for PreemptOff {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: Balances `new`.
        unsafe { bindings::rkvm_preempt_enable() };
    }
}

/// Hands a machine check that ended a guest's run to the kernel.
#[cold]
pub(crate) fn machine_check(_irqs: &IrqsOff) {
    // SAFETY: Interrupts are off, as in the exception's own entry.
    unsafe { bindings::rkvm_handle_machine_check() };
}
