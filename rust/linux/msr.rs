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

/// Loads XCR0 for a guest, or the host's back. The kernel does not use the FPU while interrupts are
/// off, unless somebody says so; both loads are in one such section.
///
/// A value that the CPU refuses would be a #GP in the kernel: it must come from
/// [`crate::x86::cr::check_xcr0`] with what the host has, or from [`host_xcr0`].
#[inline]
pub(crate) fn load_xcr0(_irqs: &super::irq::IrqsOff, value: u64) {
    // SAFETY: Only `run` calls this, with such values.
    unsafe { bindings::rkvm_xsetbv(value) };
}

/// Loads PKRU for a guest, or the thread's back, and returns what was there. While a guest's is loaded nothing may access user memory.
/// Only on a host that uses protection keys, where [`host_has_pku`].
#[inline]
pub(crate) fn swap_pkru(_irqs: &super::irq::IrqsOff, value: u32) -> u32 {
    // SAFETY: CR4.PKE is set wherever the host uses protection keys; any value is one of PKRU.
    unsafe {
        let old = bindings::rkvm_rdpkru();
        if old != value {
            bindings::rkvm_wrpkru(value);
        }
        old
    }
}

/// Whether the host uses protection keys: CPUID says so of a kernel that has set CR4.PKE.
pub(crate) fn host_has_pku() -> bool {
    const OSPKE: u32 = 1 << 4;
    cpuid(0, 0)[0] >= 7 && cpuid(7, 0)[2] & OSPKE != 0
}

/// The host's IA32_XSS, 0 if the CPU has no XSAVES.
pub(crate) fn host_xss() -> u64 {
    // SAFETY: Reads the MSR only if it exists.
    unsafe { bindings::rkvm_host_xss() }
}
