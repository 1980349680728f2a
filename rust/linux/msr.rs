// SPDX-License-Identifier: GPL-2.0

//! The host's MSRs, XCR0 and CPUID.

use crate::bindings;
use core::arch::asm;
use kernel::error::to_result;
use kernel::prelude::*;

/// Reads an MSR that may not exist: EIO then.
pub(crate) fn read_safe(msr: u32) -> Result<u64> {
    let mut value = 0;
    // SAFETY: `value` is valid for writes; the helper recovers from the fault of a missing MSR.
    to_result(unsafe { bindings::rkvm_rdmsr_safe(msr, &mut value) })?;
    Ok(value)
}

/// Reads an MSR.
///
/// # Safety
///
/// The MSR exists on every CPU of this machine.
#[inline]
pub(crate) unsafe fn read(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: By the caller the MSR exists; reading one has no effect on memory.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high,
             options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
///
/// The MSR exists on every CPU of this machine, takes the value without a fault, and holding the
/// value until the old one is written back does the kernel no harm.
#[inline]
pub(crate) unsafe fn write(msr: u32, value: u64) {
    // SAFETY: As the caller promises.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags));
    }
}

/// The time-stamp counter, in ticks of the host.
#[inline]
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: RDTSC exists on every 64-bit CPU.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Executes CPUID: EAX, EBX, ECX, EDX.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut regs = [0; 4];
    // SAFETY: The helper writes four words.
    unsafe { bindings::rkvm_cpuid(leaf, subleaf, regs.as_mut_ptr()) };
    regs
}

/// The frequency of the host's time-stamp counter, in kHz.
pub(crate) fn tsc_khz() -> u32 {
    // SAFETY: Reads a variable of the kernel that is set at boot.
    unsafe { bindings::rkvm_tsc_khz() }
}

/// The host's XCR0, or 0 if the host does not use XSAVE.
pub(crate) fn host_xcr0() -> u64 {
    // SAFETY: XGETBV is executed only with CR4.OSXSAVE set.
    unsafe {
        if bindings::rkvm_host_osxsave() {
            bindings::rkvm_xgetbv()
        } else {
            0
        }
    }
}

/// Loads XCR0.
///
/// # Safety
///
/// The host uses XSAVE, the value is valid for this CPU, interrupts are off, and the host's value is
/// back before they are on again.
#[inline]
pub(crate) unsafe fn xsetbv(value: u64) {
    // SAFETY: As the caller promises.
    unsafe { bindings::rkvm_xsetbv(value) };
}

/// Writes back and invalidates the caches of every CPU.
pub(crate) fn wbinvd_all() {
    // SAFETY: WBINVD loses nothing; interrupts are on in every caller, as the IPI demands.
    unsafe { bindings::rkvm_wbinvd_all() };
}
