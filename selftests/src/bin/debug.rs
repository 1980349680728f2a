// SPDX-License-Identifier: GPL-2.0

//! The VMM as a debugger of its guest: `KVM_SET_GUEST_DEBUG` and `KVM_EXIT_DEBUG`.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, set_gate, usize_of, PORT};
use selftests::machine::{decode, set_special_pages, Exit, Machine, Mode};
use selftests::mem::Mapping;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const ENABLE: u32 = kb::KVM_GUESTDBG_ENABLE;
const STEP: u32 = ENABLE | kb::KVM_GUESTDBG_SINGLESTEP;
const INT3: u32 = ENABLE | kb::KVM_GUESTDBG_USE_SW_BP;
const HW: u32 = ENABLE | kb::KVM_GUESTDBG_USE_HW_BP;

const DB: u32 = 1;
const BP: u32 = 3;
/// What DR6 has besides reasons.
const DR6: u64 = 0xffff_0ff0;
const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
/// DR7 with nothing enabled.
const DR7: u64 = 0x400;
const TF: u64 = 0x100;
const IF: u64 = 0x200;
const RF: u64 = 0x1_0000;

fn set(m: &Machine, control: u32, registers: [u64; 8]) -> Result<(), sys::Error> {
    let debug = kb::kvm_guest_debug {
        control,
        pad: 0,
        arch: kb::kvm_guest_debug_arch {
            debugreg: registers,
        },
    };
    m.vcpu.fd.ioctl_ref(sys::KVM_SET_GUEST_DEBUG, &debug)?;
    Ok(())
}

fn control(m: &Machine, control: u32) -> Result<(), sys::Error> {
    set(m, control, [0, 0, 0, 0, 0, 0, 0, DR7])
}

/// One breakpoint at `address`, in register `n`; `kind` is the four bits of DR7 for it.
fn breakpoint(m: &Machine, n: usize, address: u64, kind: u64) -> Result<(), sys::Error> {
    let mut registers = [0; 8];
    registers[n] = address;
    registers[7] = DR7 | (2 << (2 * n)) | (kind << (16 + 4 * n));
    set(m, HW, registers)
}

/// Runs to the next exit, which has to be one for the debugger.
fn stop(m: &Machine) -> Result<kb::kvm_debug_exit_arch, Verdict> {
    let reason = m.vcpu.run()?;
    if reason != kb::KVM_EXIT_DEBUG {
        fail!(
            "exit {:x?} instead of the debugger's\n{}",
            decode(&m.vcpu),
            m.describe()
        );
    }
    // SAFETY: The exit's reason says that this is the member.
    Ok(unsafe { m.vcpu.kvm_run().__bindgen_anon_1.debug.arch })
}

/// Steps once; the distance from the start of the code.
fn step(m: &Machine) -> Result<u64, Verdict> {
    let debug = stop(m)?;
    ensure_eq!((debug.exception, debug.dr6), (DB, DR6 | BS), "a step");
    ensure_eq!(debug.pc, m.vcpu.regs()?.rip, "pc and RIP");
    Ok(debug.pc - at::CODE)
}

fn machine(env: &Env, code: &[u8]) -> Result<Machine, Verdict> {
    let m = Machine::new(env, Mode::Long, code)?;
    if m.kvm.capability(kb::KVM_CAP_SET_GUEST_DEBUG) <= 0 {
        skip!("no KVM_CAP_SET_GUEST_DEBUG");
    }
    Ok(m)
}

/// What there is to ask for, and that nothing of it is refused.
fn capabilities(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "hlt");
    let m = machine(env, code())?;
    let all = kb::KVM_GUESTDBG_ENABLE
        | kb::KVM_GUESTDBG_SINGLESTEP
        | kb::KVM_GUESTDBG_USE_HW_BP
        | kb::KVM_GUESTDBG_USE_SW_BP
        | kb::KVM_GUESTDBG_INJECT_BP
        | kb::KVM_GUESTDBG_INJECT_DB
        | kb::KVM_GUESTDBG_BLOCKIRQ;
    ensure_eq!(
        m.kvm.capability(kb::KVM_CAP_SET_GUEST_DEBUG2),
        i32::try_from(all).unwrap_or(0),
        "KVM_CAP_SET_GUEST_DEBUG2"
    );
    // Unknown bits are ignored, as are all without the first.
    control(
        &m,
        !(kb::KVM_GUESTDBG_INJECT_BP | kb::KVM_GUESTDBG_INJECT_DB),
    )?;
    control(&m, STEP & !ENABLE)?;
    ensure_eq!(m.vcpu.regs()?.rflags & TF, 0, "TF");
    m.expect_hlt()
}

/// INT3 is the debugger's, or else the guest's.
fn software_breakpoint(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "int3", "nop", "int3", "hlt");
    let m = machine(env, code())?;
    control(&m, INT3)?;
    for _ in 0..2 {
        let debug = stop(&m)?;
        ensure_eq!((debug.exception, debug.pc), (BP, at::CODE + 1), "INT3");
    }
    ensure_eq!(m.vcpu.regs()?.rip, at::CODE + 1, "RIP");
    m.patch_regs(|r| r.rip += 1)?;
    ensure_eq!(stop(&m)?.pc, at::CODE + 3, "the other INT3");

    // The debugger has found that it was the guest's own.
    control(&m, INT3 | kb::KVM_GUESTDBG_INJECT_BP)?;
    let record = m.expect_exception(3)?;
    ensure_eq!(record.rip, at::CODE + 4, "where the guest's own went on");
    m.expect_hlt()?;

    control(&m, 0)?;
    m.patch_regs(|r| r.rip = at::CODE)?;
    ensure_eq!(m.expect_exception(3)?.rip, at::CODE + 2, "with no debugger");
    Ok(())
}

/// An exception that the debugger injects; not if there is one already.
fn injection(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "nop", "hlt");
    let m = machine(env, code())?;
    control(&m, kb::KVM_GUESTDBG_INJECT_DB)?;
    let r = control(&m, kb::KVM_GUESTDBG_INJECT_DB);
    expect_errno(r, libc::EBUSY, "a second exception")?;
    let r = control(&m, kb::KVM_GUESTDBG_INJECT_BP);
    expect_errno(r, libc::EBUSY, "a second exception")?;
    let dr6 = m.vcpu.debugregs()?.dr6;
    ensure_eq!(m.expect_exception(1)?.rip, at::CODE, "where it came");
    ensure_eq!(m.vcpu.debugregs()?.dr6, dr6, "DR6");
    m.expect_hlt()
}

guest_code!(plain, ".code64",
    "nop",
    "mov [{D}], rax",
    "mov rbx, [{D}]",
    "hlt";
    D = at::DATA,
);

/// Breakpoints on instructions and data, in each register, with what the guest finds in its own.
fn hardware_breakpoints(env: &Env) -> Outcome {
    let m = machine(env, plain())?;
    let own = kb::kvm_debugregs {
        db: [0x1111, 0x2222, 0x3333, 0x4444],
        dr6: DR6 | 8,
        dr7: DR7,
        ..Default::default()
    };
    m.vcpu.set_debugregs(&own)?;
    for n in 0..4 {
        m.patch_regs(|r| (r.rip, r.rflags) = (at::CODE, 2))?;
        breakpoint(&m, n, at::CODE + 1, 0)?;
        for _ in 0..2 {
            let debug = stop(&m)?;
            ensure_eq!(
                (debug.exception, debug.pc, debug.dr6, debug.dr7),
                (DB, at::CODE + 1, DR6 | (1 << n), DR7 | (2 << (2 * n))),
                "an instruction, with DR{n}"
            );
        }
        // Resumed as the architecture has it.
        m.patch_regs(|r| r.rflags |= RF)?;
        m.expect_hlt()?;

        // 8 bytes, written; then read or written.
        for (kind, stops) in [(0b1001, vec![9]), (0b1011, vec![9, 17])] {
            m.patch_regs(|r| r.rip = at::CODE)?;
            breakpoint(&m, n, at::DATA, kind)?;
            for at in stops {
                let debug = stop(&m)?;
                ensure_eq!(
                    (debug.exception, debug.pc, debug.dr6),
                    (DB, at::CODE + at, DR6 | (1 << n)),
                    "data, with DR{n}"
                );
            }
            m.expect_hlt()?;
        }
        ensure_eq!(m.vcpu.debugregs()?, own, "the guest's own registers");
    }
    control(&m, 0)?;
    m.patch_regs(|r| r.rip = at::CODE)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.debugregs()?, own, "the guest's own registers");
    Ok(())
}

guest_code!(
    uses_registers,
    ".code64",
    "mov rax, dr0",
    "mov rbx, dr7",
    "lea rcx, [rip + 2f]",
    "mov dr0, rcx",
    "mov ecx, 0x402",
    "mov dr7, rcx",
    "mov rdx, dr0",
    "mov rsi, dr7",
    "xor edi, edi",
    "mov dr6, rdi",
    "mov rdi, dr6",
    "2: nop",
    "hlt",
);

/// The guest reads and writes its own registers; its breakpoints work when the debugger has gone.
fn guests_own_registers(env: &Env) -> Outcome {
    let m = machine(env, uses_registers())?;
    breakpoint(&m, 0, at::DATA, 0b1011)?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    let nop = r.rip - 2;
    ensure_eq!((r.rax, r.rbx), (0, DR7), "DR0 and DR7 at first");
    ensure_eq!((r.rdx, r.rsi), (nop, DR7 | 2), "DR0 and DR7 as written");
    ensure_eq!(r.rdi, DR6, "DR6 as written");
    control(&m, 0)?;
    m.patch_regs(|r| r.rip = nop)?;
    ensure_eq!(
        m.expect_exception(1)?.rip,
        nop,
        "the guest's own breakpoint"
    );
    ensure_eq!(m.vcpu.debugregs()?.dr6, DR6 | 1, "DR6");
    // And again hidden.
    breakpoint(&m, 3, at::DATA, 0b1011)?;
    m.patch_regs(|r| r.rip = nop)?;
    m.expect_hlt()
}

/// An access to a debug register is the debugger's affair, if it wants that.
fn general_detect(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "mov rax, dr0", "hlt");
    let m = machine(env, code())?;
    set(&m, HW, [0, 0, 0, 0, 0, 0, 0, DR7 | (1 << 13)])?;
    for _ in 0..2 {
        let debug = stop(&m)?;
        ensure_eq!(
            (debug.exception, debug.pc, debug.dr6, debug.dr7),
            (DB, at::CODE + 1, DR6 | BD, DR7 | (1 << 13)),
            "an access"
        );
    }
    ensure_eq!(m.vcpu.debugregs()?.dr6, DR6, "the guest's DR6");
    control(&m, 0)?;
    m.expect_hlt()
}

guest_code!(
    steps,
    ".code64",
    "nop",
    "sti",
    "cli",
    "mov ax, ss",
    "mov ss, ax",
    "nop",
    "cpuid",
    "mov ecx, 0x1b",
    "rdmsr",
    "mov cr3, rdi",
    "mov dr0, rdi",
    "mov rdx, dr6",
    "jmp 2f",
    "nop",
    "2: push rax",
    "pop rax",
    "hlt"
);

/// Where each instruction of [`steps`] ends: that which follows a load of SS belongs to it.
const STEPS: [u64; 14] = [1, 2, 3, 5, 9, 11, 16, 18, 21, 24, 27, 30, 31, 32];

/// Steps over instructions that the processor completes, and over those that the kernel does.
fn single_step(env: &Env) -> Outcome {
    let m = machine(env, steps())?;
    m.patch_regs(|r| r.rdi = at::PML4)?;
    for again in [true, false] {
        m.patch_regs(|r| r.rip = at::CODE)?;
        control(&m, STEP)?;
        for want in STEPS {
            if again {
                control(&m, STEP)?;
            }
            let at = step(&m)?;
            ensure_eq!(at, want, "a step to");
            ensure_eq!(m.vcpu.regs()?.rflags & TF, 0, "TF, at {at:#x}");
            // What is set is not what the debugger wants of the processor.
            if again {
                m.patch_regs(|r| r.r8 += 1)?;
            }
        }
        ensure_eq!(m.vcpu.regs()?.rdx, DR6, "DR6 as the guest reads it");
    }
    control(&m, 0)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rflags & TF, 0, "TF in the end");
    Ok(())
}

/// Runs to a step, or to `other`: KVM loses the step of a store to a device. Returns if it was `other`.
fn step_or(m: &Machine, want: u64, other: &Exit) -> Result<bool, Verdict> {
    if m.vcpu.run()? == kb::KVM_EXIT_DEBUG {
        ensure_eq!(m.vcpu.regs()?.rip - at::CODE, want, "a step to");
        return Ok(false);
    }
    ensure_eq!(decode(&m.vcpu), *other, "what comes after a lost step");
    Ok(true)
}

guest_code!(device_steps, ".code64",
    "out {P}, al",
    "in al, {P}",
    "mov [rdi], eax",
    "mov eax, [rdi]",
    "nop",
    "hlt";
    P = PORT,
);

/// Steps over accesses to devices: the access first, then the step.
fn step_over_devices(env: &Env) -> Outcome {
    let m = machine(env, device_steps())?;
    m.patch_regs(|r| (r.rdi, r.rax) = (at::MMIO, 0x1234_5678))?;
    control(&m, STEP)?;
    m.expect(&Exit::Out {
        port: PORT,
        size: 1,
        data: vec![0x78],
    })?;
    ensure_eq!(step(&m)?, 2, "after OUT");
    m.expect(&Exit::In {
        port: PORT,
        size: 1,
        count: 1,
    })?;
    m.io_reply(&[0x55]);
    ensure_eq!(step(&m)?, 4, "after IN");
    m.expect(&Exit::MmioWrite {
        addr: at::MMIO,
        data: vec![0x55, 0x56, 0x34, 0x12],
    })?;
    let load = Exit::MmioRead {
        addr: at::MMIO,
        len: 4,
    };
    if !step_or(&m, 6, &load)? {
        m.expect(&load)?;
    }
    m.mmio_reply(&[1, 0, 0, 0]);
    ensure_eq!(step(&m)?, 8, "after a load");
    ensure_eq!(m.vcpu.regs()?.rax, 1, "what was loaded");
    // KVM forgets to go on stepping after an instruction that it emulates.
    control(&m, STEP)?;
    ensure_eq!(step(&m)?, 9, "after NOP");
    Ok(())
}

guest_code!(
    string_steps,
    ".code64",
    "rep stosb",
    "mov rdi, rsi",
    "mov ecx, 3",
    "rep stosb",
    "hlt"
);

/// A repeated instruction steps after each iteration, in memory and on a device.
fn step_through_strings(env: &Env) -> Outcome {
    let m = machine(env, string_steps())?;
    m.patch_regs(|r| (r.rdi, r.rsi, r.rcx, r.rax) = (at::DATA, at::MMIO, 3, 7))?;
    control(&m, STEP)?;
    for (at, left) in [(0, 2), (0, 1), (2, 0), (5, 0), (10, 3)] {
        ensure_eq!(step(&m)?, at, "in memory");
        ensure_eq!(m.vcpu.regs()?.rcx, left, "what is left");
    }
    let write = |n| Exit::MmioWrite {
        addr: at::MMIO + n,
        data: vec![7],
    };
    let mut lost = false;
    for n in 0..3 {
        if !lost {
            m.expect(&write(n))?;
        }
        let at = if n < 2 { 10 } else { 12 };
        let next = if n < 2 { write(n + 1) } else { Exit::Hlt };
        lost = step_or(&m, at, &next)?;
        if !lost {
            ensure_eq!(m.vcpu.regs()?.rcx, 2 - n, "what is left");
        }
    }
    Ok(())
}

/// TF is in no register that the VMM reads, and a new RIP does not end the stepping.
fn hidden_flag(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "nop", "nop", "nop", "hlt");
    let m = machine(env, code())?;
    control(&m, STEP)?;
    ensure_eq!(m.vcpu.regs()?.rflags, 2, "RFLAGS");
    m.patch_regs(|r| r.rflags |= 1)?;
    ensure_eq!(step(&m)?, 1, "a step");
    ensure_eq!(m.vcpu.regs()?.rflags, 3, "RFLAGS");
    m.patch_regs(|r| r.rip += 2)?;
    control(&m, STEP)?;
    ensure_eq!(step(&m)?, 4, "a step from elsewhere");
    control(&m, 0)?;
    ensure_eq!(m.vcpu.regs()?.rflags, 3, "RFLAGS");
    m.expect_hlt()
}

/// A stop with an interrupt shadow, where the stepping begins.
fn step_from_shadow(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "nop", "hlt");
    let m = machine(env, code())?;
    for shadow in [kb::KVM_X86_SHADOW_INT_STI, kb::KVM_X86_SHADOW_INT_MOV_SS] {
        control(&m, 0)?;
        m.patch_regs(|r| (r.rip, r.rflags) = (at::CODE, 2 | IF))?;
        let mut events = m.vcpu.events()?;
        events.interrupt.shadow = u8::try_from(shadow).unwrap_or(0);
        events.flags = kb::KVM_VCPUEVENT_VALID_SHADOW;
        m.vcpu.set_events(&events)?;
        control(&m, STEP)?;
        ensure_eq!(step(&m)?, 1, "a step");
        ensure_eq!(step(&m)?, 2, "a step");
    }
    Ok(())
}

guest_code!(interrupted, ".code64", "nop", "nop", "nop", "nop", "hlt");

/// An NMI waits while the debugger wants it to, and comes afterwards.
fn blocked_nmi(env: &Env) -> Outcome {
    let m = machine(env, interrupted())?;
    let blocked = STEP | kb::KVM_GUESTDBG_BLOCKIRQ;
    m.patch_regs(|r| r.rflags |= IF)?;
    control(&m, blocked)?;
    ensure_eq!(step(&m)?, 1, "a step");
    m.vcpu.fd.ioctl(sys::KVM_NMI, 0)?;
    ensure_eq!(step(&m)?, 2, "a step");
    ensure_eq!(step(&m)?, 3, "a step");
    control(&m, ENABLE)?;
    let record = m.expect_exception(2)?;
    ensure_eq!(record.rip, at::CODE + 3, "where the NMI came");
    m.expect_hlt()
}

guest_code!(self_ipi, ".code64",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x400",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x83f",
    "mov eax, 0x41",
    "wrmsr",
    "out {P}, al",
    "sti",
    "nop",
    "nop",
    "nop",
    "cli",
    "out {P}, al",
    "hlt";
    P = PORT,
);

guest_code!(handler, ".code64",
    "push rcx",
    "push rax",
    "push rdx",
    "inc qword ptr [{D}]",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rax",
    "pop rcx",
    "iretq";
    D = at::DATA,
);

/// A machine with interrupt controllers in the kernel.
fn with_irqchip(env: &Env, code: &[u8]) -> Result<Machine, Verdict> {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_SET_GUEST_DEBUG) <= 0 {
        skip!("no KVM_CAP_SET_GUEST_DEBUG");
    }
    let mem = Mapping::new(at::SIZE, false)?;
    let vm = kvm.create_vm()?;
    set_special_pages(&vm)?;
    vm.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0)?;
    vm.set_memory(0, 0, 0, mem.len() as u64, mem.addr() as u64)?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&*kvm.supported_cpuid()?)?;
    let m = Machine { vcpu, vm, kvm, mem };
    m.start(Mode::Long, code)?;
    Ok(m)
}

/// The same of an interrupt with the local APIC in the kernel, which the processor may serve by itself.
fn blocked_apic(env: &Env) -> Outcome {
    let blocked = STEP | kb::KVM_GUESTDBG_BLOCKIRQ;
    let m = with_irqchip(env, self_ipi())?;
    m.mem.write_bytes(usize_of(at::FREE), handler());
    set_gate(&m.mem, 0x41, at::FREE, selftests::guest::sel::CODE64, true);
    m.expect_out(PORT)?;
    control(&m, blocked)?;
    let mut last = 0;
    for _ in 0..5 {
        let at = step(&m)?;
        ensure!(
            at > last && at <= last.max(self_ipi().len() as u64),
            "a step from {last:#x} to {at:#x}"
        );
        last = at;
        ensure_eq!(m.mem.read::<u64>(usize_of(at::DATA)), 0, "interrupts");
    }
    // Back to the NOPs, with no debugger.
    control(&m, 0)?;
    m.patch_regs(|r| (r.rip, r.rflags) = (r.rip - 3, r.rflags | IF))?;
    m.expect_out(PORT)?;
    ensure_eq!(m.mem.read::<u64>(usize_of(at::DATA)), 1, "interrupts");
    // What was in service has ended.
    let mut lapic = kb::kvm_lapic_state::default();
    m.vcpu.fd.ioctl_mut(sys::KVM_GET_LAPIC, &mut lapic)?;
    ensure!(
        (0x100..0x280)
            .step_by(16)
            .all(|r| lapic.regs[r..r + 4] == [0; 4]),
        "something is in service, or requested"
    );
    Ok(())
}

/// In real mode and in compatibility mode the address is a linear one all the same.
fn other_modes(env: &Env) -> Outcome {
    guest_code!(code, ".code16", "nop", "int3", "nop", "hlt");
    let m = Machine::new(env, Mode::Real, code())?;
    if m.kvm.capability(kb::KVM_CAP_SET_GUEST_DEBUG) <= 0 {
        skip!("no KVM_CAP_SET_GUEST_DEBUG");
    }
    m.patch_sregs(|s| (s.cs.base, s.cs.selector) = (at::CODE, 0x100))?;
    m.patch_regs(|r| r.rip = 0)?;
    control(&m, STEP | INT3)?;
    let debug = stop(&m)?;
    ensure_eq!((debug.exception, debug.pc), (DB, at::CODE + 1), "a step");
    let debug = stop(&m)?;
    ensure_eq!((debug.exception, debug.pc), (BP, at::CODE + 1), "INT3");
    ensure_eq!(m.vcpu.regs()?.rip, 1, "RIP");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "debug",
        tests![
            capabilities,
            software_breakpoint,
            injection,
            hardware_breakpoints,
            guests_own_registers,
            general_detect,
            single_step,
            step_over_devices,
            step_through_strings,
            hidden_flag,
            step_from_shadow,
            blocked_nmi,
            blocked_apic,
            other_modes,
        ],
    )
}
