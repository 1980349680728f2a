// SPDX-License-Identifier: GPL-2.0

//! Interrupting other CPUs.

use super::irq::PreemptOff;
use crate::bindings;
use kernel::cpu::CpuId;
use kernel::cpumask::CpumaskVar;

/// Interrupts the CPUs of `mask`, but this one, waits until each has taken the interrupt, and
/// empties the mask. Does not sleep; interrupts must be on (with them off, two CPUs could wait for
/// each other: the kernel warns).
#[inline]
pub(crate) fn interrupt_and_wait(mask: &mut CpumaskVar) {
    // SAFETY: A valid mask, and nobody else uses it.
    unsafe { bindings::rkvm_ipi_and_wait(mask.as_raw()) };
}

/// Has a CPU leave the guest that it runs, if it does. The CPU is online: who calls was not preempted
/// since it ran the guest. In any context.
#[inline]
pub(crate) fn interrupt(cpu: CpuId, _preempt: &PreemptOff) {
    // SAFETY: The CPU looks if it must reschedule, no more.
    unsafe { bindings::rkvm_interrupt_cpu(cpu.as_u32() as i32) };
}

/// Tells a CPU that runs a guest that interrupts have been posted for it; outside of a guest, the CPU
/// counts it and goes on. The CPU is online, as above. In any context.
#[inline]
pub(crate) fn post_interrupt(cpu: CpuId, _preempt: &PreemptOff) {
    // SAFETY: The kernel has a handler for the vector.
    unsafe { bindings::rkvm_post_interrupt(cpu.as_u32() as i32) };
}
