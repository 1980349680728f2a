// SPDX-License-Identifier: GPL-2.0

//! The vCPU's time-stamp counter: its frequency, its value, its offset.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::at;
use selftests::machine::{Machine, Mode};
use selftests::sys;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

guest_code!(halt, ".code32", "2: hlt", "jmp 2b");

fn machine(env: &Env, mode: Mode) -> Result<Machine, Verdict> {
    Ok(Machine::new(env, mode, halt())?)
}

fn tsc_khz(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected)?;
    let khz = m.vcpu.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?;
    ensure!(khz > 0, "KVM_GET_TSC_KHZ says {khz}");
    let other = usize::try_from(khz).unwrap_or(0) / 2;
    let r = m.vcpu.fd.ioctl(sys::KVM_SET_TSC_KHZ, other);
    if m.kvm.capability(kb::KVM_CAP_TSC_CONTROL) > 0 {
        r?;
        let got = m.vcpu.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?;
        ensure_eq!(
            usize::try_from(got).unwrap_or(0),
            other,
            "frequency after it was set"
        );
        let r = m.vcpu.fd.ioctl(sys::KVM_SET_TSC_KHZ, 0xffff_ffff);
        expect_errno(r, libc::EINVAL, "4 THz")?;
    }
    m.vcpu.fd.ioctl(sys::KVM_SET_TSC_KHZ, 0)?;
    ensure_eq!(
        m.vcpu.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?,
        khz,
        "frequency after 0 was set"
    );
    m.expect_hlt()?;
    Ok(())
}

/// The TSC is a register of the guest: what is written goes on counting.
fn tsc_value(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "hlt"
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let start = 0x1234_0000_0000u64;
    ensure!(m.vcpu.set_msr(0x10, start)?, "write of IA32_TSC");
    m.expect_hlt()?;
    let guest = m.vcpu.regs()?.rax;
    let Some(after) = m.vcpu.msr(0x10)? else {
        fail!("IA32_TSC cannot be read")
    };
    // A minute of the fastest counter there is.
    let limit = start + 60 * 10_000_000_000;
    ensure!(
        start <= guest && guest <= after && after < limit,
        "TSC was set to {start:#x}, the guest read {guest:#x}, then it was {after:#x}"
    );
    Ok(())
}

/// The offset of the TSC is an attribute: it is what was set, and the guest's counter has it more.
fn tsc_offset(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "hlt"
    );
    let m = Machine::new(env, Mode::Long, code())?;
    if m.kvm.capability(kb::KVM_CAP_VCPU_ATTRIBUTES) <= 0 {
        skip!("no KVM_CAP_VCPU_ATTRIBUTES");
    }
    let value = AtomicU64::new(0);
    let mut attr = kb::kvm_device_attr {
        group: kb::KVM_VCPU_TSC_CTRL,
        attr: kb::KVM_VCPU_TSC_OFFSET.into(),
        addr: value.as_ptr().addr() as u64,
        ..Default::default()
    };
    let ioctls = [
        sys::KVM_HAS_DEVICE_ATTR,
        sys::KVM_GET_DEVICE_ATTR,
        sys::KVM_SET_DEVICE_ATTR,
    ];
    for (group, number) in [(1, 0), (0, 1), (u32::MAX, u64::MAX)] {
        let other = kb::kvm_device_attr {
            group,
            attr: number,
            ..attr
        };
        for ioctl in ioctls {
            let r = m.vcpu.fd.ioctl_ref(ioctl, &other);
            expect_errno(r, libc::ENXIO, &format!("attribute {group}, {number}"))?;
        }
    }
    m.vcpu.fd.ioctl_ref(ioctls[0], &attr)?;
    for offset in [0, 1u64 << 44, 0u64.wrapping_sub(1 << 44)] {
        value.store(offset, Ordering::Relaxed);
        m.vcpu.fd.ioctl_ref(ioctls[2], &attr)?;
        value.store(1, Ordering::Relaxed);
        m.vcpu.fd.ioctl_ref(ioctls[1], &attr)?;
        ensure_eq!(value.load(Ordering::Relaxed), offset, "the offset");
        // SAFETY: RDTSC reads a counter.
        let before = unsafe { core::arch::x86_64::_rdtsc() };
        m.patch_regs(|r| r.rip = at::CODE)?;
        m.expect_hlt()?;
        // SAFETY: As above.
        let after = unsafe { core::arch::x86_64::_rdtsc() };
        let guest = m.vcpu.regs()?.rax.wrapping_sub(offset);
        ensure!(
            before <= guest && guest <= after,
            "with an offset of {offset:#x}, the guest's {guest:#x} is not from {before:#x} to {after:#x}"
        );
    }
    attr.addr = 1 << 62;
    for ioctl in &ioctls[1..] {
        let r = m.vcpu.fd.ioctl_ref(*ioctl, &attr);
        expect_errno(r, libc::EFAULT, "no memory")?;
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main("tsc", tests![tsc_khz, tsc_value, tsc_offset])
}
