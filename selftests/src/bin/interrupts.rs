// SPDX-License-Identifier: GPL-2.0

//! Interrupts and NMIs that userspace injects, and the windows in which it may.

use kvm_bindings as kb;
use selftests::guest::{at, sel, usize_of, PORT, PORT_EXCEPTION};
use selftests::machine::{Exit, Machine, Mode};
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome};
use std::process::ExitCode;

const IF: u64 = 1 << 9;

guest_code!(spin, ".code64", "2: inc rbx", "jmp 2b");
guest_code!(halt, ".code64", "2: hlt", "inc ebx", "jmp 2b");

fn window(m: &Machine, want: bool) {
    m.vcpu.kvm_run_mut().request_interrupt_window = u8::from(want);
}

fn enable(m: &Machine) -> Outcome {
    m.patch_regs(|r| r.rflags |= IF)?;
    Ok(())
}

/// With IF set, an interrupt is delivered before the next instruction of the guest.
fn delivery(env: &Env) -> Outcome {
    for vector in [0x20u8, 0x80, 0xff] {
        let m = Machine::new(env, Mode::Long, spin())?;
        enable(&m)?;
        m.vcpu.interrupt(vector.into())?;
        let r = m.expect_exception(vector)?;
        ensure_eq!(r.rip, at::CODE, "saved RIP");
        ensure_eq!(r.rflags & IF, IF, "saved IF");
        let regs = m.vcpu.regs()?;
        ensure_eq!(regs.rflags & IF, 0, "IF in the handler");
        ensure_eq!(
            m.vcpu.events()?.interrupt.injected,
            0,
            "pending after the delivery"
        );
        ensure_eq!(m.record().count, 1, "deliveries");
    }
    Ok(())
}

fn delivery_protected(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "2: jmp 2b");
    for mode in [Mode::Protected, Mode::Paging32, Mode::Pae] {
        let m = Machine::new(env, mode, code())?;
        enable(&m)?;
        m.vcpu.interrupt(0x33)?;
        let r = m.expect_exception(0x33)?;
        ensure_eq!(
            (r.rip, r.cs & 0xffff),
            (at::CODE, 0x18),
            "saved RIP and CS in {mode:?}"
        );
    }
    Ok(())
}

fn delivery_real(env: &Env) -> Outcome {
    guest_code!(code, ".code16", "2: jmp 2b");
    guest_code!(handler, ".code16", "inc bx", "out {P}, al", "iret"; P = PORT);
    let m = Machine::new(env, Mode::Real, code())?;
    m.mem.write(0x40 * 4, 0x0020u16);
    m.mem.write(0x40 * 4 + 2, 0x0a00u16);
    m.mem.write_bytes(0xa020, handler());
    m.patch_regs(|r| {
        r.rflags |= IF;
        r.rsp = 0x4000;
    })?;
    for round in 1..=3u64 {
        m.vcpu.interrupt(0x40)?;
        m.expect_out(PORT)?;
        ensure_eq!(m.vcpu.regs()?.rbx & 0xffff, round, "calls of the handler");
        let saved: (u16, u16) = (m.mem.read(0x3ffa), m.mem.read(0x3ffc));
        ensure_eq!(saved, (at::CODE as u16, 0), "saved IP and CS");
        // Let IRET happen, so that IF is set again, before the next one.
        window(&m, true);
        m.expect(&Exit::IrqWindow)?;
        window(&m, false);
    }
    Ok(())
}

/// From privilege level 3 the processor takes the stack of the task state segment.
fn delivery_user(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, spin())?;
    m.patch_sregs(|s| {
        s.cs = selftests::guest::segment(sel::USER_CODE64, 11, 0, 1, 3, true);
        s.ss = selftests::guest::segment(sel::USER_DATA, 3, 1, 0, 3, true);
    })?;
    enable(&m)?;
    m.vcpu.interrupt(0x41)?;
    let r = m.expect_exception(0x41)?;
    ensure_eq!(
        (r.rip, r.cs),
        (at::CODE, u64::from(sel::USER_CODE64)),
        "saved RIP and CS"
    );
    let rsp = m.vcpu.regs()?.rsp;
    let top = at::STACK - 0x1000;
    ensure!(
        rsp < top && rsp > top - 0x100,
        "RSP in the handler is {rsp:#x}"
    );
    Ok(())
}

/// `request_interrupt_window` ends KVM_RUN once the guest can take an interrupt, not before.
fn interrupt_window(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "out {P}, al",
        "mov ebx, 1",
        "sti",
        "mov ebx, 2",
        "mov ebx, 3",
        "2: jmp 2b";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    window(&m, true);
    m.expect_out(PORT)?;
    ensure_eq!(
        m.vcpu.kvm_run().ready_for_interrupt_injection,
        0,
        "ready with IF clear"
    );
    m.expect(&Exit::IrqWindow)?;
    let run = m.vcpu.kvm_run();
    ensure_eq!(
        (run.ready_for_interrupt_injection, run.if_flag),
        (1, 1),
        "ready, IF"
    );
    // STI protects the instruction behind it.
    ensure_eq!(m.vcpu.regs()?.rbx, 2, "EBX when the window opens");
    m.vcpu.interrupt(0x30)?;
    window(&m, false);
    m.expect_exception(0x30)?;
    Ok(())
}

/// With the window open at once, KVM_RUN returns at once.
fn window_already_open(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, spin())?;
    enable(&m)?;
    window(&m, true);
    m.expect(&Exit::IrqWindow)?;
    m.expect(&Exit::IrqWindow)?;
    ensure!(m.vcpu.regs()?.rip < at::CODE + 8, "RIP");
    Ok(())
}

/// MOV SS protects the next instruction as STI does.
fn mov_ss_shadow(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov eax, 0x10",
        "pushfq",
        "or dword ptr [rsp], 0x200",
        "popfq",
        "mov ss, eax",
        "mov ebx, 1",
        "2: jmp 2b",
    );
    // POPF has no shadow, so the window opens right behind it...
    let m = Machine::new(env, Mode::Long, code())?;
    window(&m, true);
    m.expect(&Exit::IrqWindow)?;
    ensure_eq!(m.vcpu.regs()?.rbx, 0, "EBX behind POPF");
    // ...and with the shadow of MOV SS in place, one instruction later.
    let rip = m.vcpu.regs()?.rip;
    m.patch_regs(|r| r.rip = at::CODE + code().len() as u64 - 7)?;
    let mut e = m.vcpu.events()?;
    e.flags = kb::KVM_VCPUEVENT_VALID_SHADOW;
    e.interrupt.shadow = 1;
    m.vcpu.set_events(&e)?;
    m.expect(&Exit::IrqWindow)?;
    ensure_eq!(
        m.vcpu.regs()?.rbx,
        1,
        "EBX behind the protected instruction (popf at {rip:#x})"
    );
    Ok(())
}

/// STI; HLT is the idle loop of all systems: an interrupt after the HLT exit wakes it, and IRET leads
/// behind the HLT.
fn wakes_from_hlt(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "2: cli", "sti", "hlt", "inc ebx", "jmp 2b");
    let m = Machine::new(env, Mode::Long, code())?;
    for round in 0..5u64 {
        m.expect_hlt()?;
        let run = m.vcpu.kvm_run();
        ensure_eq!(
            (run.ready_for_interrupt_injection, run.if_flag),
            (1, 1),
            "at HLT"
        );
        ensure_eq!(m.vcpu.regs()?.rbx, round, "wake-ups");
        m.vcpu.interrupt(0x31)?;
        let r = m.expect_exception(0x31)?;
        ensure_eq!(r.rip, at::CODE + 3, "saved RIP: behind HLT");
    }
    Ok(())
}

/// What a VMM does, 300 times: ask for the window, inject, count.
fn many(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "2: cli",
        "inc r8",
        "out {P}, al",
        "mov ecx, 20",
        "3: loop 3b",
        "sti",
        "nop",
        "jmp 2b";
        P = PORT,
    );
    guest_code!(handler, ".code64", "inc r9", "iretq");
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write_bytes(usize_of(at::STUBS) + 0x400, handler());
    for i in 0..300u64 {
        window(&m, false);
        m.expect_out(PORT)?;
        let r = m.vcpu.regs()?;
        ensure_eq!((r.r8, r.r9), (i + 1, i), "rounds and interrupts so far");
        window(&m, true);
        m.expect(&Exit::IrqWindow)?;
        m.vcpu.interrupt(0x40)?;
    }
    Ok(())
}

/// An interrupt that is queued shows in the state and can be moved to another vCPU with it.
fn migrates(env: &Env) -> Outcome {
    let a = Machine::new(env, Mode::Long, spin())?;
    enable(&a)?;
    a.vcpu.interrupt(0x66)?;
    let e = a.vcpu.events()?;
    ensure_eq!((e.interrupt.injected, e.interrupt.nr), (1, 0x66), "event");
    let b = Machine::new(env, Mode::Long, spin())?;
    enable(&b)?;
    b.vcpu.set_events(&e)?;
    b.expect_exception(0x66)?;
    // The older way: the bitmap in the special registers.
    let c = Machine::new(env, Mode::Long, spin())?;
    enable(&c)?;
    c.vcpu.set_sregs(&a.vcpu.sregs()?)?;
    c.expect_exception(0x66)?;
    Ok(())
}

/// Pages that the delivery needs are not mapped yet: it is repeated, not lost and not doubled.
fn delivery_through_new_pages(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, halt())?;
    for round in 0..10u64 {
        enable(&m)?;
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rbx, round, "wake-ups");
        for page in [
            at::IDT,
            at::STUBS,
            at::COMMON,
            at::RECORD,
            at::GDT,
            at::STACK - 0x1000,
        ] {
            let offset = usize_of(page);
            let copy = m.mem.read_bytes(offset, 0x1000);
            m.mem.advise(offset, 0x1000, libc::MADV_DONTNEED)?;
            m.mem.write_bytes(offset, &copy);
        }
        if round % 2 == 0 {
            m.vcpu.interrupt(0x50)?;
            m.expect_exception(0x50)?;
        } else {
            m.vcpu.fd.ioctl(selftests::sys::KVM_NMI, 0)?;
            m.expect_exception(2)?;
        }
        ensure_eq!(m.record().count, round + 1, "deliveries");
    }
    Ok(())
}

fn nmi(env: &Env) -> Outcome {
    // NMIs do not care for IF.
    let m = Machine::new(env, Mode::Long, spin())?;
    m.vcpu.fd.ioctl(selftests::sys::KVM_NMI, 0)?;
    let r = m.expect_exception(2)?;
    ensure_eq!(r.rip, at::CODE, "saved RIP");
    let e = m.vcpu.events()?.nmi;
    ensure_eq!(
        (e.masked, e.pending, e.injected),
        (1, 0, 0),
        "masked, pending, injected"
    );
    Ok(())
}

/// Between an NMI and its IRET another is held back; of those that came meanwhile one is kept.
fn nmi_blocking(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, halt())?;
    m.vcpu.fd.ioctl(selftests::sys::KVM_NMI, 0)?;
    m.expect_exception(2)?;
    for _ in 0..3 {
        m.vcpu.fd.ioctl(selftests::sys::KVM_NMI, 0)?;
    }
    ensure_eq!(m.record().count, 1, "NMIs taken");
    let r = m.expect_exception(2)?;
    ensure_eq!(r.count, 2, "NMIs taken after the first IRET");
    ensure_eq!(r.rip, at::CODE, "the second comes right behind IRET");
    m.expect_hlt()?;
    ensure_eq!(m.record().count, 2, "NMIs taken in all");
    ensure_eq!(m.vcpu.events()?.nmi.masked, 0, "masked at the end");
    Ok(())
}

/// The mask that userspace sets holds an NMI back until IRET.
fn nmi_mask_from_host(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "nop",
        "out {P}, al",
        "mov rax, rsp",
        "push 0x10",
        "push rax",
        "pushfq",
        "push 0x8",
        "lea rcx, [rip + 2f]",
        "push rcx",
        "iretq",
        "2: inc ebx",
        "hlt";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mut e = m.vcpu.events()?;
    e.nmi.masked = 1;
    m.vcpu.set_events(&e)?;
    m.vcpu.fd.ioctl(selftests::sys::KVM_NMI, 0)?;
    m.expect_out(PORT)?;
    m.expect_exception(2)?;
    ensure_eq!(m.vcpu.regs()?.rbx >> 32, 0, "sanity");
    ensure_eq!(m.record().count, 1, "NMIs taken");
    m.expect_hlt()?;
    Ok(())
}

fn nmi_wakes_from_hlt(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, halt())?;
    m.expect_hlt()?;
    m.vcpu.fd.ioctl(selftests::sys::KVM_NMI, 0)?;
    let r = m.expect_exception(2)?;
    ensure_eq!(r.rip, at::CODE + 1, "saved RIP: behind HLT");
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rbx, 1, "the guest went on");
    Ok(())
}

/// An NMI and an interrupt at once: both arrive, each once.
fn nmi_and_interrupt(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, halt())?;
    enable(&m)?;
    m.vcpu.interrupt(0x77)?;
    m.vcpu.fd.ioctl(selftests::sys::KVM_NMI, 0)?;
    let mut seen = Vec::new();
    loop {
        match m.run()? {
            Exit::Out {
                port: PORT_EXCEPTION,
                ..
            } => seen.push(m.record().vector),
            Exit::Hlt => break,
            other => fail!("exit {other:x?}\n{}", m.describe()),
        }
    }
    seen.sort_unstable();
    ensure_eq!(seen, vec![2, 0x77], "vectors");
    Ok(())
}

/// An exception in the handler of an interrupt, and an interrupt that arrives with a fault pending:
/// neither gets lost.
fn nested(env: &Env) -> Outcome {
    guest_code!(handler, ".code64", "ud2", "iretq");
    let m = Machine::new(env, Mode::Long, halt())?;
    m.mem.write_bytes(usize_of(at::STUBS) + 0x600, handler());
    enable(&m)?;
    m.vcpu.interrupt(0x60)?;
    let r = m.expect_exception(6)?;
    ensure_eq!(
        r.rip,
        at::STUBS + 0x600,
        "RIP of the exception in the handler"
    );
    m.resume_at(at::STUBS + 0x602);
    m.expect_hlt()?;
    Ok(())
}

/// Reading and writing all state between queueing and running changes nothing.
fn survives_state_calls(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, spin())?;
    enable(&m)?;
    m.vcpu.interrupt(0x61)?;
    let (r, s, e) = (m.vcpu.regs()?, m.vcpu.sregs()?, m.vcpu.events()?);
    m.vcpu.set_sregs(&s)?;
    m.vcpu.set_regs(&r)?;
    m.vcpu.set_events(&e)?;
    m.vcpu.set_immediate_exit(1);
    let r = m.vcpu.run();
    ensure!(
        matches!(&r, Err(e) if e.errno == libc::EINTR),
        "immediate exit: {r:?}"
    );
    m.vcpu.set_immediate_exit(0);
    m.expect_exception(0x61)?;
    ensure_eq!(m.record().count, 1, "deliveries");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "interrupts",
        tests![
            delivery,
            delivery_protected,
            delivery_real,
            delivery_user,
            interrupt_window,
            window_already_open,
            mov_ss_shadow,
            wakes_from_hlt,
            many,
            migrates,
            delivery_through_new_pages,
            nmi,
            nmi_blocking,
            nmi_mask_from_host,
            nmi_wakes_from_hlt,
            nmi_and_interrupt,
            nested,
            survives_state_calls,
        ],
    )
}
