// SPDX-License-Identifier: GPL-2.0

//! Interrupting other CPUs.

use crate::bindings;
use kernel::cpumask::CpumaskVar;

/// Interrupts the CPUs of `mask`, but this one, waits until each has taken the interrupt, and
/// empties the mask. Does not sleep; interrupts must be on (with them off, two CPUs could wait for
/// each other: the kernel warns).
#[inline]
pub(crate) fn interrupt_and_wait(mask: &mut CpumaskVar) {
    // SAFETY: A valid mask, and nobody else uses it.
    unsafe { bindings::rkvm_ipi_and_wait(mask.as_raw()) };
}
