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

/// The rate for vCPUs to come is the VM's; it cannot be set any more when there are some.
fn tsc_khz_of_vm(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let host = vm.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?;
    if kvm.capability(kb::KVM_CAP_VM_TSC_CONTROL) <= 0 {
        skip!("no KVM_CAP_VM_TSC_CONTROL");
    }
    let other = host / 2;
    vm.fd
        .ioctl(sys::KVM_SET_TSC_KHZ, usize::try_from(other).unwrap_or(0))?;
    ensure_eq!(vm.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?, other, "of the VM");
    let r = vm.fd.ioctl(sys::KVM_SET_TSC_KHZ, 0x7fff_ffff);
    expect_errno(r, libc::EINVAL, "2 THz")?;
    let vcpu = vm.create_vcpu(0)?;
    ensure_eq!(
        vcpu.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?,
        other,
        "of the vCPU"
    );
    let r = vm.fd.ioctl(sys::KVM_SET_TSC_KHZ, 0);
    expect_errno(r, libc::EINVAL, "when there is a vCPU")?;
    ensure_eq!(vm.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?, other, "after that");
    // One that is hardly another is taken, and is none.
    let close = host + host / 10_000;
    vcpu.fd
        .ioctl(sys::KVM_SET_TSC_KHZ, usize::try_from(close).unwrap_or(0))?;
    ensure_eq!(
        vcpu.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?,
        close,
        "a close one"
    );
    Ok(())
}

/// The counter runs at the rate that is set, for the guest and for the VMM.
fn tsc_scaled(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "2: rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "mov rsi, rax",
        "mov ecx, 0x10",
        "rdmsr",
        "shl rdx, 32",
        "or rax, rdx",
        "mov rdi, rax",
        "hlt",
        "jmp 2b"
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let host = usize::try_from(m.vcpu.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?).unwrap_or(0);
    // Without the processor's help it is set forward at exits, and cannot be slower.
    let slower = m.kvm.capability(kb::KVM_CAP_TSC_CONTROL) > 0;
    if !slower {
        let r = m.vcpu.fd.ioctl(sys::KVM_SET_TSC_KHZ, host / 2);
        expect_errno(r, libc::EINVAL, "a slower one")?;
    }
    for khz in [host * 2, host / 2, host * 7 / 3, host / 50, host * 50, host] {
        if khz < host && !slower {
            continue;
        }
        m.vcpu.fd.ioctl(sys::KVM_SET_TSC_KHZ, khz)?;
        ensure!(m.vcpu.set_msr(0x10, 1 << 40)?, "write of IA32_TSC");
        let mut seen = vec![];
        for _ in 0..3 {
            let before = selftests::host::rdtsc();
            m.expect_hlt()?;
            let r = m.vcpu.regs()?;
            let Some(vmm) = m.vcpu.msr(0x10)? else {
                fail!("IA32_TSC cannot be read")
            };
            ensure!(
                1 << 40 <= r.rsi && r.rsi <= r.rdi && r.rdi <= vmm,
                "{khz} kHz: RDTSC {:x}, RDMSR {:x}, KVM_GET_MSRS {vmm:x}",
                r.rsi,
                r.rdi
            );
            seen.push((before, r.rsi, vmm, selftests::host::rdtsc()));
            selftests::host::sleep_ms(20);
        }
        for pair in seen.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            // What the host has had at least and at most between the two, in the guest's ticks.
            let (khz, host) = (khz as u64, host as u64);
            let least = (b.0 - a.3) * khz / host;
            let most = (b.3 - a.0) * khz / host;
            for ticks in [b.1 - a.1, b.2 - a.2] {
                ensure!(
                    least * 999 / 1000 <= ticks && ticks <= most * 1001 / 1000 + 1,
                    "{khz} kHz: {ticks} ticks, not from {least} to {most}"
                );
            }
        }
    }
    Ok(())
}

/// Which values are taken to be meant as one for all vCPUs.
fn tsc_agreement(env: &Env) -> Outcome {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_VCPU_ATTRIBUTES) <= 0 {
        skip!("no KVM_CAP_VCPU_ATTRIBUTES");
    }
    let vm = kvm.create_vm()?;
    let (a, b) = (vm.create_vcpu(0)?, vm.create_vcpu(1)?);
    let value = AtomicU64::new(0);
    let attr = kb::kvm_device_attr {
        group: kb::KVM_VCPU_TSC_CTRL,
        attr: kb::KVM_VCPU_TSC_OFFSET.into(),
        addr: value.as_ptr().addr() as u64,
        ..Default::default()
    };
    let offset = |vcpu: &selftests::vm::Vcpu| -> Result<u64, Verdict> {
        vcpu.fd.ioctl_ref(sys::KVM_GET_DEVICE_ATTR, &attr)?;
        Ok(value.load(Ordering::Relaxed))
    };
    let second = 1000 * u64::try_from(a.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?).unwrap_or(0);
    let set = |vcpu: &selftests::vm::Vcpu, value: u64| -> Outcome {
        ensure!(vcpu.set_msr(0x10, value)?, "write of IA32_TSC");
        Ok(())
    };
    ensure_eq!(offset(&b)?, offset(&a)?, "at first");
    // The first value is meant; those that are close to it are the same.
    let base = 1 << 40;
    set(&a, base)?;
    ensure!(offset(&b)? != offset(&a)?, "after one was set");
    for close in [base, base + second / 4, base - second / 4, 0] {
        set(&b, close)?;
        ensure_eq!(offset(&b)?, offset(&a)?, "after {close:#x}");
    }
    for far in [base + 100 * second, base, base - 100 * second] {
        set(&b, far)?;
        ensure!(offset(&b)? != offset(&a)?, "after {far:#x}");
        set(&a, far)?;
        ensure_eq!(offset(&b)?, offset(&a)?, "after {far:#x} for both");
    }
    // One that is made now is like the others.
    let c = vm.create_vcpu(2)?;
    ensure_eq!(offset(&c)?, offset(&a)?, "of a third");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "tsc",
        tests![
            tsc_khz,
            tsc_khz_of_vm,
            tsc_value,
            tsc_offset,
            tsc_scaled,
            tsc_agreement
        ],
    )
}
