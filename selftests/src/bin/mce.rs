// SPDX-License-Identifier: GPL-2.0

//! Machine checks: what a VMM sets up and reports, and what its guest finds.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::at;
use selftests::machine::{start_vcpu, Exit, Mode};
use selftests::msr::{Access, MsrGuest};
use selftests::{ensure, ensure_eq, skip, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const CTL_P: u64 = 1 << 8;
const CMCI_P: u64 = 1 << 10;
const SER_P: u64 = 1 << 24;
const LMCE_P: u64 = 1 << 27;

const VALID: u64 = 1 << 63;
const OVERFLOW: u64 = 1 << 62;
const UNCORRECTED: u64 = 1 << 61;
const ENABLED: u64 = 1 << 60;
const SIGNALED: u64 = 1 << 56;

const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
const MCG_EXT_CTL: u32 = 0x4d0;
const FEATURE_CONTROL: u32 = 0x3a;
const CR4_MCE: u64 = 1 << 6;

/// `struct kvm_x86_mce`.
#[derive(Debug, Default, Clone, Copy)]
#[repr(C)]
struct Mce {
    status: u64,
    addr: u64,
    misc: u64,
    mcg_status: u64,
    bank: u8,
    pad1: [u8; 7],
    pad2: [u64; 3],
}

const fn status(bank: u32) -> u32 {
    0x401 + 4 * bank
}

fn supported(env: &Env) -> Result<u64, Verdict> {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_MCE) == 0 {
        skip!("no KVM_CAP_MCE");
    }
    let mut caps = 0u64;
    kvm.fd
        .ioctl_mut(sys::KVM_X86_GET_MCE_CAP_SUPPORTED, &mut caps)?;
    Ok(caps)
}

fn set_up(g: &MsrGuest, cap: u64) -> Result<(), sys::Error> {
    g.m.vcpu.fd.ioctl_ref(sys::KVM_X86_SETUP_MCE, &cap)?;
    Ok(())
}

fn report(g: &MsrGuest, mce: &Mce) -> Result<(), sys::Error> {
    g.m.vcpu.fd.ioctl_ref(sys::KVM_X86_SET_MCE, mce)?;
    Ok(())
}

fn capabilities(env: &Env) -> Outcome {
    let caps = supported(env)?;
    println!("supported: {caps:#x}");
    ensure_eq!(
        caps & (CTL_P | SER_P),
        CTL_P | SER_P,
        "MCG_CTL and recovery"
    );
    let banks = env.open()?.capability(kb::KVM_CAP_MCE);
    ensure_eq!(banks, 32, "banks");
    let g = MsrGuest::new(env)?;
    ensure_eq!(g.read(MCG_CAP)?, Access::Done(32), "MCG_CAP to begin with");
    for bad in [0u64, 33, 0xff, CTL_P, 10 | 1 << 9, 10 | 1 << 63] {
        expect_errno(set_up(&g, bad), libc::EINVAL, "KVM_X86_SETUP_MCE")?;
    }
    expect_errno(
        g.m.vcpu.fd.ioctl(sys::KVM_X86_SETUP_MCE, 16),
        libc::EFAULT,
        "KVM_X86_SETUP_MCE",
    )?;
    ensure_eq!(g.read(MCG_CAP)?, Access::Done(32), "MCG_CAP after errors");
    set_up(&g, caps | 10)?;
    ensure_eq!(g.read(MCG_CAP)?, Access::Done(caps | 10), "MCG_CAP");
    Ok(())
}

/// The registers are those that MCG_CAP says there are.
fn registers(env: &Env) -> Outcome {
    let caps = supported(env)?;
    let g = MsrGuest::new(env)?;
    set_up(&g, 4)?;
    ensure_eq!(g.read(0x400)?, Access::Done(!0), "MC0_CTL");
    ensure_eq!(g.read(status(3))?, Access::Done(0), "MC3_STATUS");
    ensure_eq!(g.read(status(4))?, Access::Refused, "MC4_STATUS of four");
    ensure_eq!(g.read(MCG_CTL)?, Access::Refused, "MCG_CTL without CTL_P");
    ensure_eq!(g.m.vcpu.msr(MCG_CTL)?, Some(0), "MCG_CTL for the VMM");
    ensure_eq!(g.read(0x280)?, Access::Refused, "MC0_CTL2 without CMCI_P");
    ensure_eq!(g.write(status(1), 1)?, Access::Refused, "a status of 1");
    ensure_eq!(g.write(status(1), 0)?, Access::Done(0), "a status of 0");
    ensure!(g.m.vcpu.set_msr(status(1), VALID)?, "a status of the VMM's");
    ensure_eq!(g.read(status(1))?, Access::Done(VALID), "MC1_STATUS");
    ensure_eq!(g.write(0x400, 2)?, Access::Refused, "MC0_CTL of 2");
    set_up(&g, caps | 4)?;
    ensure_eq!(g.read(MCG_CTL)?, Access::Done(!0), "MCG_CTL");
    ensure_eq!(g.write(MCG_CTL, 1)?, Access::Refused, "MCG_CTL of 1");
    ensure_eq!(g.write(MCG_CTL, 0)?, Access::Done(0), "MCG_CTL of 0");
    if caps & CMCI_P != 0 {
        ensure_eq!(g.read(0x283)?, Access::Done(0), "MC3_CTL2");
        ensure_eq!(g.write(0x283, 1 << 29)?, Access::Refused, "a reserved bit");
        let on = 1 << 30 | 1;
        ensure_eq!(g.write(0x283, on)?, Access::Done(on), "MC3_CTL2");
        ensure_eq!(g.write(0x284, 0)?, Access::Refused, "MC4_CTL2 of four");
    }
    Ok(())
}

/// Local machine checks have to be let in by IA32_FEATURE_CONTROL, which firmware locks.
fn local_checks(env: &Env) -> Outcome {
    const LMCE: u64 = 1 << 20;
    if supported(env)? & LMCE_P == 0 {
        skip!("no LMCE");
    }
    let g = MsrGuest::new(env)?;
    set_up(&g, 4)?;
    ensure_eq!(g.read(FEATURE_CONTROL)?, Access::Done(0), "to begin with");
    ensure_eq!(g.write(FEATURE_CONTROL, LMCE)?, Access::Refused, "LMCE");
    set_up(&g, 4 | LMCE_P)?;
    ensure_eq!(g.read(MCG_EXT_CTL)?, Access::Refused, "MCG_EXT_CTL");
    let on = LMCE | 1;
    ensure_eq!(g.write(FEATURE_CONTROL, on)?, Access::Done(on), "LMCE");
    ensure_eq!(g.write(FEATURE_CONTROL, 0)?, Access::Refused, "locked");
    ensure_eq!(g.read(MCG_EXT_CTL)?, Access::Done(0), "MCG_EXT_CTL");
    ensure_eq!(g.write(MCG_EXT_CTL, 1)?, Access::Done(1), "MCG_EXT_CTL");
    ensure_eq!(g.write(MCG_EXT_CTL, 2)?, Access::Refused, "MCG_EXT_CTL");
    Ok(())
}

/// An error that the processor could not correct is #MC; one on top of it, or without CR4.MCE, a shutdown.
fn exceptions(env: &Env) -> Outcome {
    supported(env)?;
    let g = MsrGuest::new(env)?;
    set_up(&g, 10 | CTL_P | SER_P)?;
    let mce = Mce {
        status: VALID | UNCORRECTED | ENABLED | SIGNALED | 0x134,
        addr: 0x1000,
        misc: 0x8c,
        mcg_status: 5,
        bank: 9,
        ..Mce::default()
    };
    expect_errno(
        report(&g, &Mce { bank: 10, ..mce }),
        libc::EINVAL,
        "a bank that is not there",
    )?;
    expect_errno(
        report(&g, &Mce { status: 1, ..mce }),
        libc::EINVAL,
        "no valid error",
    )?;
    start_vcpu(&g.m.vcpu, Mode::Long, at::CODE)?;
    g.m.patch_sregs(|s| s.cr4 |= CR4_MCE)?;
    report(&g, &mce)?;
    let record = g.m.expect_exception(18)?;
    ensure_eq!(record.rip, at::CODE, "RIP");
    ensure_eq!(g.m.vcpu.msr(MCG_STATUS)?, Some(5), "MCG_STATUS");
    ensure_eq!(g.m.vcpu.msr(status(9))?, Some(mce.status), "MC9_STATUS");
    ensure_eq!(g.m.vcpu.msr(status(9) + 1)?, Some(0x1000), "MC9_ADDR");
    ensure_eq!(g.m.vcpu.msr(status(9) + 2)?, Some(0x8c), "MC9_MISC");
    // The handler has dealt with it, and left the error where it is.
    ensure!(g.m.vcpu.set_msr(MCG_STATUS, 0)?, "MCG_STATUS");
    start_vcpu(&g.m.vcpu, Mode::Long, at::CODE)?;
    g.m.patch_sregs(|s| s.cr4 |= CR4_MCE)?;
    report(&g, &mce)?;
    g.m.expect_exception(18)?;
    ensure_eq!(
        g.m.vcpu.msr(status(9))?,
        Some(mce.status | OVERFLOW),
        "MC9_STATUS of two"
    );
    // It is still being handled.
    report(&g, &mce)?;
    g.m.expect(&Exit::Shutdown)?;

    let g = MsrGuest::new(env)?;
    report(&g, &mce)?;
    // Its bank has not been set up, which enables it.
    ensure!(matches!(g.read(MCG_CAP)?, Access::Done(_)), "no exception");
    set_up(&g, 10)?;
    report(&g, &mce)?;
    g.m.expect(&Exit::Shutdown)?;
    Ok(())
}

/// Corrected errors wait to be found.
fn corrected(env: &Env) -> Outcome {
    supported(env)?;
    let g = MsrGuest::new(env)?;
    set_up(&g, 10)?;
    let mce = Mce {
        status: VALID | ENABLED | 1,
        addr: 0x2000,
        bank: 1,
        ..Mce::default()
    };
    report(&g, &mce)?;
    ensure_eq!(g.read(status(1))?, Access::Done(mce.status), "one");
    let second = Mce {
        status: VALID | 2,
        ..mce
    };
    report(&g, &second)?;
    let both = VALID | OVERFLOW | 2;
    ensure_eq!(g.read(status(1))?, Access::Done(both), "another");
    // No action required, and no interrupt for it.
    let quiet = Mce {
        status: VALID | UNCORRECTED | 3,
        ..mce
    };
    report(&g, &quiet)?;
    ensure_eq!(
        g.read(status(1))?,
        Access::Done(quiet.status),
        "a worse one"
    );
    report(&g, &second)?;
    ensure_eq!(
        g.read(status(1))?,
        Access::Done(quiet.status | OVERFLOW),
        "which is not hidden"
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "mce",
        tests![capabilities, registers, local_checks, exceptions, corrected],
    )
}
