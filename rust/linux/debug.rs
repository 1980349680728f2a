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

/// Loads a guest's DR0 to DR3 and DR6; DR7 is the VMCS's.
///
/// Breakpoints are disarmed, so that the addresses have no effect on the host.
#[inline]
pub(crate) fn load_guest(dr: &[u64; 4], dr6: u64) {
    // SAFETY: With DR7 clear the address registers and the status are just storage.
    unsafe { bindings::rkvm_set_debugregs(dr.as_ptr(), dr6) };
}

/// Reads DR0 to DR3 and DR6 as the guest left them.
#[inline]
pub(crate) fn save_guest(dr: &mut [u64; 4], dr6: &mut u64) {
    // SAFETY: Four words and one are written.
    unsafe { bindings::rkvm_get_debugregs(dr.as_mut_ptr(), dr6) };
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
