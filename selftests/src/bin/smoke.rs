// SPDX-License-Identifier: GPL-2.0

//! The first things that must work: a real-mode guest, one port output, HLT.

use selftests::guest::{at, usize_of, PORT};
use selftests::machine::{Exit, Machine, Mode};
use selftests::{ensure, ensure_eq, guest_code, tests, Env, Outcome};
use std::process::ExitCode;

guest_code!(hello, ".code16",
    "mov al, 'A'",
    "out {P}, al",
    "mov word ptr [{D}], 0x1234",
    "hlt";
    P = PORT, D = at::DATA,
);

fn device_opens(env: &Env) -> Outcome {
    let kvm = env.open()?;
    ensure_eq!(
        kvm.fd.ioctl(selftests::sys::KVM_GET_API_VERSION, 0)?,
        12,
        "API version"
    );
    Ok(())
}

fn real_mode_pio_hlt(env: &Env) -> Outcome {
    let m = Machine::bare(env, at::SIZE)?;
    m.start(Mode::Real, hello())?;
    m.expect(&Exit::Out {
        port: PORT,
        size: 1,
        data: vec![b'A'],
    })?;
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read::<u16>(usize_of(at::DATA)),
        0x1234,
        "what the guest stored"
    );
    let rip = m.vcpu.regs()?.rip;
    ensure_eq!(rip, at::CODE + hello().len() as u64, "RIP is after HLT");
    Ok(())
}

fn cpuid_exit(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code16",
        "mov ebp, 200",
        "2: xor eax, eax",
        "cpuid",
        "dec ebp",
        "jnz 2b",
        "hlt",
    );
    let m = Machine::new(env, Mode::Real, code())?;
    m.expect_hlt()?;
    let cpuid = m.vcpu.cpuid()?;
    let Some(leaf) = cpuid.find(0, 0) else {
        selftests::fail!("no CPUID leaf 0")
    };
    let r = m.vcpu.regs()?;
    ensure!(
        (r.rax, r.rbx, r.rcx, r.rdx)
            == (
                leaf.eax.into(),
                leaf.ebx.into(),
                leaf.ecx.into(),
                leaf.edx.into()
            ),
        "CPUID leaf 0 in the guest is not what was set:\n{}",
        m.describe()
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main("smoke", tests![device_opens, real_mode_pio_hlt, cpuid_exit])
}
