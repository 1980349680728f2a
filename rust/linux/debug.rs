// SPDX-License-Identifier: GPL-2.0

//! Debug registers and the host's DEBUGCTL around guest runs.

use crate::bindings;

/// Whether the host has hardware breakpoints armed on this CPU.
#[inline]
pub(crate) fn host_breakpoints_active() -> bool {
    // SAFETY: Reads a per-CPU variable.
    unsafe { bindings::rkvm_hw_breakpoint_active() }
}

/// Loads the host's breakpoints again.
pub(crate) fn restore_host_breakpoints() {
    // SAFETY: Writes what the kernel believes to be in the registers.
    unsafe { bindings::rkvm_hw_breakpoint_restore() };
}

/// Disarms every breakpoint of this CPU. [`restore_host_breakpoints`] undoes it.
pub(crate) fn disarm() {
    // SAFETY: Without breakpoints less happens, not more.
    unsafe { bindings::rkvm_clear_dr7() };
}

/// Loads a guest's DR0 to DR3, while the host's DR7 arms none; the guest's DR7 is the VMCS's.
#[inline]
pub(crate) fn load_guest(dr: &[u64; 4]) {
    // SAFETY: With no breakpoint armed the address registers are just storage.
    unsafe { bindings::rkvm_set_debugregs(dr.as_ptr()) };
}

/// The host's IA32_DEBUGCTL, which a VM exit clears.
#[inline]
pub(crate) fn host_debugctl() -> u64 {
    // SAFETY: Reads an MSR that every VMX processor has.
    unsafe { bindings::rkvm_get_debugctl() }
}

/// Writes back what [`host_debugctl`] gave.
pub(crate) fn restore_host_debugctl(value: u64) {
    // SAFETY: The value was the MSR's own.
    unsafe { bindings::rkvm_set_debugctl(value) };
}
