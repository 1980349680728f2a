// SPDX-License-Identifier: GPL-2.0

//! Interrupting other CPUs.

use crate::bindings;
use kernel::cpumask::CpumaskVar;

/// Interrupts `cpu`, whatever number that is, and does not wait for it. Not this CPU, and none that
/// is offline. Any context.
#[inline]
pub(crate) fn kick(cpu: i32) {
    // SAFETY: Checks the number; the interrupt makes the CPU look if it must reschedule.
    unsafe { bindings::rkvm_kick_cpu(cpu) };
}

/// Interrupts the CPUs of `mask`, but this one, waits until each has taken the interrupt, and
/// empties the mask. Does not sleep; interrupts must be on (with them off, two CPUs could wait for
/// each other: the kernel warns).
#[inline]
pub(crate) fn interrupt_and_wait(mask: &mut CpumaskVar) {
    // SAFETY: A valid mask, and nobody else uses it.
    unsafe { bindings::rkvm_ipi_and_wait(mask.as_raw()) };
}
