// SPDX-License-Identifier: GPL-2.0

//! Events that meet, with a local APIC in the kernel: which comes first (SDM volume 3, table 7-2), and
//! what becomes of one whose delivery is interrupted by an exit.

use kvm_bindings as kb;
use selftests::apic::{self, block, icr, reg, Answer, Chip, Cpu, Guest, Op, State};
use selftests::guest::{at, sel, set_gate, usize_of, Record};
use selftests::machine::{decode, Exit};
use selftests::{ensure, ensure_eq, fail, guest_code, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// The interrupt of tests that need one.
const V: u8 = 0x51;
const IF: u64 = 0x200;
const TF: u64 = 0x100;

// Notes where each interrupt came, for the first sixteen.
guest_code!(
    notes_rip,
    ".code64",
    "mov rcx, gs:[0x10]",
    "dec ecx",
    "and ecx, 15",
    "mov rdx, [rsp + 56]",
    "mov gs:[rcx * 8 + 0x80], rdx",
    "ret",
);

fn ready(env: &Env) -> Result<Guest, Verdict> {
    let g = Guest::new(env, Chip::Split, 2)?;
    for id in 0..2 {
        g.cpu(id).enable_x2apic()?;
    }
    g.hook(0, notes_rip());
    Ok(g)
}

/// Where the `i`th interrupt came, from the start of the test's code.
fn rip(g: &Guest, i: usize) -> u64 {
    let rip: u64 = g.mem.read(usize_of(g.block(0)) + 0x80 + i * 8);
    rip.wrapping_sub(apic::OWN_CODE)
}

fn record(g: &Guest) -> Record {
    g.mem.read(usize_of(at::RECORD))
}

/// Runs `code` on the first vCPU, with more flags.
fn go(g: &Guest, code: &[u8], flags: u64) -> Result<Answer, Verdict> {
    g.mem.write_bytes(usize_of(apic::OWN_CODE), code);
    let c = g.cpu(0);
    c.load_at(apic::OWN_CODE, 0, 0)?;
    let mut r = c.vcpu().regs()?;
    r.rflags |= flags;
    (r.rbx, r.rcx, r.rdx) = (0, 0, 0);
    c.vcpu().set_regs(&r)?;
    c.finish()
}

/// Makes `vector` pending, from the other vCPU, so that no virtualized shorthand takes part.
fn pend(g: &Guest, vector: u8) -> Outcome {
    g.cpu(1).xipi(vector.into(), 0)
}

fn nmi(g: &Guest) -> Outcome {
    g.vcpus[0].fd.ioctl(sys::KVM_NMI, 0)?;
    Ok(())
}

// Goes back to the interpreter with interrupts disabled.
guest_code!(nothing, ".code64", "nop", "nop", "cli", "jmp r15");

/// An NMI comes before an interrupt; both at the instruction that was to be next.
fn nmi_then_interrupt(env: &Env) -> Outcome {
    let g = ready(env)?;
    pend(&g, V)?;
    nmi(&g)?;
    go(&g, nothing(), IF)?;
    ensure_eq!(g.log(0), vec![2, V], "events");
    // Both come before an instruction of the code: behind the output of the interpreter.
    for i in 0..2 {
        ensure_eq!(
            rip(&g, i),
            (at::CODE + 2).wrapping_sub(apic::OWN_CODE),
            "RIP of event {i}"
        );
    }
    Ok(())
}

/// What is pending comes before the next instruction, even if that faults.
fn interrupt_then_fault(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "sti", "nop", "ud2");
    let g = ready(env)?;
    pend(&g, V)?;
    let answer = go(&g, code(), 0)?;
    ensure_eq!(
        answer,
        Answer::Fault {
            vector: 6,
            error: 0
        },
        "answer"
    );
    ensure_eq!(
        (g.log(0), rip(&g, 0)),
        (vec![V], 2),
        "the interrupt, behind the shadow of STI"
    );
    ensure_eq!(record(&g).rip, apic::OWN_CODE + 2, "RIP of #UD");
    // The instruction in the shadow faults: then the fault comes, and the interrupt after it.
    guest_code!(shadow, ".code64", "sti", "ud2");
    g.cpu(0).done(Op::Cli, 0, 0)?;
    g.forget(0);
    pend(&g, V)?;
    let answer = go(&g, shadow(), 0)?;
    ensure_eq!(
        answer,
        Answer::Fault {
            vector: 6,
            error: 0
        },
        "answer"
    );
    ensure_eq!(
        record(&g).rip,
        apic::OWN_CODE + 1,
        "RIP of #UD in the shadow"
    );
    ensure_eq!(g.total(0), 1, "interrupts");
    ensure_eq!(
        rip(&g, 0),
        at::CODE.wrapping_sub(apic::OWN_CODE),
        "RIP, when #UD is handled"
    );
    Ok(())
}

/// An exception that userspace injects comes first, then NMI, then the interrupt.
fn exception_first(env: &Env) -> Outcome {
    let g = ready(env)?;
    let v = &g.vcpus[0];
    pend(&g, V)?;
    nmi(&g)?;
    let mut e = v.events()?;
    e.exception.injected = 1;
    e.exception.nr = 13;
    e.exception.has_error_code = 1;
    e.exception.error_code = 0x18;
    v.set_events(&e)?;
    let answer = go(&g, nothing(), IF)?;
    let want = Answer::Fault {
        vector: 13,
        error: 0x18,
    };
    ensure_eq!(answer, want, "answer");
    ensure_eq!(g.log(0), vec![2, V], "events");
    // The NMI at the first instruction of the exception's handler, or where that leaves NMIs in.
    let first = rip(&g, 0).wrapping_add(apic::OWN_CODE);
    ensure_eq!(first, at::STUBS + 13 * 16, "RIP of the NMI");
    Ok(())
}

/// STI and MOV SS hold an interrupt back for one instruction, one after the other for two.
fn shadows(env: &Env) -> Outcome {
    guest_code!(sti, ".code64", "sti", "inc ebx", "inc ebx", "cli", "jmp r15");
    guest_code!(
        mov_ss,
        ".code64",
        "mov ax, ss",
        "sti",
        "mov ss, ax",
        "inc ebx",
        "inc ebx",
        "cli",
        "jmp r15"
    );
    guest_code!(
        popf,
        ".code64",
        "pushfq",
        "or dword ptr [rsp], 0x200",
        "popfq",
        "inc ebx",
        "cli",
        "jmp r15"
    );
    guest_code!(sti_cli, ".code64", "sti", "cli", "inc ebx", "jmp r15");
    let g = ready(env)?;
    for (code, want) in [
        (sti(), Some(3)),
        (mov_ss(), Some(8)),
        (popf(), Some(9)),
        // With CLI in the shadow there is no place for the interrupt.
        (sti_cli(), None),
    ] {
        g.forget(0);
        pend(&g, V)?;
        go(&g, code, 0)?;
        match want {
            Some(offset) => {
                ensure_eq!(g.log(0), vec![V], "events, expected at {offset}");
                ensure_eq!(rip(&g, 0), offset, "RIP");
            }
            None => ensure_eq!(g.total(0), 0, "interrupts of STI, CLI"),
        }
    }
    g.cpu(0).done(Op::Sti, 0, 0)?;
    ensure_eq!(g.log(0), vec![V], "the one that waited");
    Ok(())
}

/// A trap of the instruction before comes before an interrupt: single step of one that makes it pending.
fn trap_then_interrupt(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ecx, 0x83f",
        "mov eax, 0x51",
        "xor edx, edx",
        "push r8",
        "popfq", // single steps from here: the next instruction is done, and traps
        "wrmsr", // offset 15
        "nop",
        "jmp r15",
    );
    let g = ready(env)?;
    g.mem.write_bytes(usize_of(apic::OWN_CODE), code());
    let c = g.cpu(0);
    c.load_at(apic::OWN_CODE, 0, 0)?;
    let mut r = c.vcpu().regs()?;
    r.r8 = r.rflags | IF | TF;
    c.vcpu().set_regs(&r)?;
    let end = apic::OWN_CODE + code().len() as u64;
    let answer = c.finish()?;
    ensure_eq!(
        answer,
        Answer::Fault {
            vector: 1,
            error: 0
        },
        "answer"
    );
    let trapped = record(&g).rip;
    ensure_eq!(trapped, end - 4, "RIP of the trap: behind WRMSR");
    Ok(())
}

/// Until its IRET an NMI holds further ones back, of which one is kept.
fn nmi_blocking(env: &Env) -> Outcome {
    // Sends two more to itself in the first NMI's handler.
    guest_code!(
        again,
        ".code64",
        "cmp qword ptr gs:[0x10], 1",
        "jne 2f",
        "mov ecx, 0x830",
        "xor edx, edx",
        "mov eax, 0x400",
        "wrmsr",
        "wrmsr",
        "pause",
        "mov rax, gs:[0x10]", // not yet
        "mov gs:[0x98], rax",
        "2: ret",
    );
    let g = ready(env)?;
    g.hook(0, again());
    nmi(&g)?;
    go(&g, nothing(), 0)?;
    g.cpu(0).done(Op::Nop, 0, 0)?;
    let during: u64 = g.mem.read(usize_of(g.block(0)) + 0x98);
    ensure_eq!(during, 1, "NMIs when the first one's handler ended");
    ensure_eq!(g.log(0), vec![2, 2], "NMIs in all");
    ensure_eq!(g.vcpus[0].events()?.nmi.masked, 0, "masked at the end");
    // From the host, while one is being handled.
    g.forget(0);
    let v = &g.vcpus[0];
    let mut e = v.events()?;
    e.nmi.masked = 1;
    v.set_events(&e)?;
    for _ in 0..3 {
        nmi(&g)?;
    }
    go(&g, nothing(), 0)?;
    ensure_eq!(g.total(0), 0, "NMIs while masked");
    let e = v.events()?;
    ensure_eq!(
        (e.nmi.masked, e.nmi.injected, e.nmi.pending),
        (1, 0, 1),
        "masked, injected, pending"
    );
    // An interrupt is none of its business, and its IRET unmasks.
    pend(&g, V)?;
    go(&g, nothing(), IF)?;
    ensure_eq!(g.log(0), vec![V, 2], "events");
    ensure_eq!(v.events()?.nmi.pending, 0, "pending at the end");
    Ok(())
}

/// Some at once, and none masked: one is taken, and another kept.
fn nmis_at_once(env: &Env) -> Outcome {
    let g = ready(env)?;
    for _ in 0..5 {
        nmi(&g)?;
    }
    g.cpu(0).done(Op::Nop, 0, 0)?;
    g.cpu(0).done(Op::Nop, 0, 0)?;
    let n = g.count(0, 2);
    ensure!((1..=2).contains(&n), "{n} NMIs of five at once");
    Ok(())
}

/// A handler that allows interrupts is interrupted by what is above its class, and by nothing else.
fn nested(env: &Env) -> Outcome {
    // In the handler of V sends 0x5f, of the same class, 0x62, above, and 0x33, below.
    guest_code!(
        opens,
        ".code64",
        "cmp eax, 0x51",
        "jne 2f",
        "mov ecx, 0x83f",
        "xor edx, edx",
        "mov eax, 0x5f",
        "wrmsr",
        "mov eax, 0x33",
        "wrmsr",
        "mov eax, 0x62",
        "wrmsr",
        "sti",
        "nop",
        "nop",
        "cli",
        "mov rax, gs:[0x10]",
        "mov gs:[0x98], rax",
        "2: ret",
    );
    let g = ready(env)?;
    g.hook(0, opens());
    pend(&g, V)?;
    go(&g, nothing(), IF)?;
    let during: u64 = g.mem.read(usize_of(g.block(0)) + 0x98);
    ensure_eq!(
        during,
        2,
        "interrupts up to the end of the first one's handler"
    );
    g.cpu(0).done(Op::Sti, 0, 0)?;
    ensure_eq!(g.log(0), vec![V, 0x62, 0x5f, 0x33], "order");
    for r in [reg::IRR, reg::ISR] {
        let s = State::get(&g.vcpus[0])?;
        ensure!(
            (0..=255).all(|v| !s.vector(r, v)),
            "something is left in {r:#x}"
        );
    }
    Ok(())
}

/// The pages that a delivery touches become new pages of the host's, so that each of its accesses may exit.
fn lose_pages(g: &Guest) -> Outcome {
    for page in [
        at::IDT,
        at::STUBS,
        at::COMMON,
        at::RECORD,
        at::GDT,
        apic::STACKS - 0x1000,
        g.block(0),
    ] {
        let offset = usize_of(page);
        let copy = g.mem.read_bytes(offset, 0x1000);
        g.mem.advise(offset, 0x1000, libc::MADV_DONTNEED)?;
        g.mem.write_bytes(offset, &copy);
    }
    Ok(())
}

/// A delivery that exits in its middle is begun again: nothing is lost, nothing comes twice.
fn again_after_exits(env: &Env) -> Outcome {
    guest_code!(undefined, ".code64", "nop", "ud2");
    guest_code!(protection, ".code64", "mov eax, 0x73", "mov ds, ax");
    guest_code!(int_n, ".code64", "int 0x91", "jmp r15");
    guest_code!(int3, ".code64", "nop", "int3");
    let g = ready(env)?;
    let c = g.cpu(0);
    let fault = |vector, error| Answer::Fault { vector, error };
    for round in 0..10 {
        // An NMI: blocked until IRET, and no more then.
        g.forget(0);
        lose_pages(&g)?;
        nmi(&g)?;
        go(&g, nothing(), 0)?;
        ensure_eq!(g.log(0), vec![2], "NMIs in round {round}");
        let e = c.vcpu().events()?;
        ensure_eq!(
            (e.nmi.masked, e.nmi.injected, e.nmi.pending),
            (0, 0, 0),
            "NMI state"
        );
        // Exceptions without and with an error code, and software interrupts.
        for (code, want, offset) in [
            (undefined(), fault(6, 0), 1),
            (protection(), fault(13, 0x70), 5),
            (int3(), fault(3, 0), 2),
        ] {
            let before = record(&g).count;
            lose_pages(&g)?;
            ensure_eq!(go(&g, code, 0)?, want, "exception in round {round}");
            let r = record(&g);
            ensure_eq!(
                (r.count, r.rip),
                (before + 1, apic::OWN_CODE + offset),
                "count, RIP of {want:?}"
            );
        }
        g.forget(0);
        lose_pages(&g)?;
        go(&g, int_n(), 0)?;
        ensure_eq!(
            (g.log(0), rip(&g, 0)),
            (vec![0x91u8], 2),
            "INT 0x91, RIP behind it"
        );
        ensure!(
            !State::get(c.vcpu())?.vector(reg::ISR, 0x91),
            "a software interrupt in service"
        );
    }
    Ok(())
}

/// All at once, through new pages: an NMI and two interrupts, at an instruction that faults.
fn crowd_after_exits(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "sti", "nop", "ud2");
    let g = ready(env)?;
    for round in 0..10 {
        g.forget(0);
        pend(&g, V)?;
        pend(&g, 0xa2)?;
        nmi(&g)?;
        lose_pages(&g)?;
        let answer = go(&g, code(), 0)?;
        ensure_eq!(
            answer,
            Answer::Fault {
                vector: 6,
                error: 0
            },
            "answer in round {round}"
        );
        ensure_eq!(g.log(0), vec![2, 0xa2, V], "events in round {round}");
        g.cpu(0).done(Op::Cli, 0, 0)?;
    }
    Ok(())
}

/// A delivery whose stack is a device: userspace is told, and when it has mended that, the delivery goes
/// on.
fn stack_in_device(env: &Env, pend: impl FnOnce(&Guest) -> Outcome, vector: u8) -> Outcome {
    let g = ready(env)?;
    let v = &g.vcpus[0];
    g.cpu(0).load(Op::Nop, 0, 0)?;
    let mut r = v.regs()?;
    let good = r.rsp;
    r.rflags |= IF;
    r.rsp = at::MMIO + 0x800;
    v.set_regs(&r)?;
    pend(&g)?;
    v.run()?;
    match decode(v) {
        Exit::Internal { suberror, .. } => {
            ensure_eq!(suberror, kb::KVM_INTERNAL_ERROR_DELIVERY_EV, "suberror");
        }
        other => fail!("exit {other:x?} of a delivery with its stack in a device"),
    }
    ensure_eq!(g.total(0), 0, "events");
    let mut r = v.regs()?;
    ensure_eq!(r.rsp, at::MMIO + 0x800, "RSP");
    r.rsp = good;
    v.set_regs(&r)?;
    g.cpu(0).finish()?;
    ensure_eq!(g.log(0), vec![vector], "events when that is mended");
    Ok(())
}

fn nmi_stack_in_device(env: &Env) -> Outcome {
    stack_in_device(env, nmi, 2)
}

/// The same for an interrupt of the APIC's: it is in service once.
fn interrupt_again_after_exits(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    g.acknowledge(0, block::NONE);
    for round in 0..10 {
        g.forget(0);
        pend(&g, V)?;
        lose_pages(&g)?;
        go(&g, nothing(), IF)?;
        ensure_eq!(g.log(0), vec![V], "interrupts in round {round}");
        let s = State::get(c.vcpu())?;
        let bits = (s.vector(reg::IRR, V), s.vector(reg::ISR, V));
        ensure_eq!(bits, (false, true), "pending, in service");
        c.xwrite(reg::EOI, 0)?;
        ensure!(
            !State::get(c.vcpu())?.vector(reg::ISR, V),
            "in service after EOI"
        );
    }
    Ok(())
}

fn interrupt_stack_in_device(env: &Env) -> Outcome {
    stack_in_device(env, |g| pend(g, V), V)
}

/// Makes the gate of `vector` one that is not present.
fn no_gate(g: &Guest, vector: u8) {
    let entry = usize_of(at::IDT) + usize::from(vector) * 16;
    g.mem.write(entry, g.mem.read::<u64>(entry) & !(1 << 47));
}

/// Gates that are not there: #NP with the vector and whether the event came from outside; then #DF, and
/// in the end a triple fault.
fn missing_gates(env: &Env) -> Outcome {
    guest_code!(int_n, ".code64", "int 0x51", "jmp r15");
    let np = |vector: u8, ext: u64| Answer::Fault {
        vector: 11,
        error: (u64::from(vector) << 3) | 2 | ext,
    };
    let g = ready(env)?;
    let c = g.cpu(0);
    no_gate(&g, V);
    no_gate(&g, 2);
    ensure_eq!(go(&g, int_n(), 0)?, np(V, 0), "INT n");
    ensure!(
        !State::get(c.vcpu())?.vector(reg::ISR, V),
        "in service after INT n"
    );
    nmi(&g)?;
    ensure_eq!(go(&g, nothing(), 0)?, np(2, 1), "NMI");
    pend(&g, V)?;
    ensure_eq!(go(&g, nothing(), IF)?, np(V, 1), "interrupt");
    // It has been acknowledged, whatever became of it.
    let s = State::get(c.vcpu())?;
    ensure_eq!(
        (s.vector(reg::IRR, V), s.vector(reg::ISR, V)),
        (false, true),
        "pending, in service"
    );
    c.xwrite(reg::EOI, 0)?;
    c.done(Op::Cli, 0, 0)?;
    no_gate(&g, 11);
    pend(&g, V)?;
    ensure_eq!(
        go(&g, nothing(), IF)?,
        Answer::Fault {
            vector: 8,
            error: 0
        },
        "without #NP's gate"
    );
    c.xwrite(reg::EOI, 0)?;
    c.done(Op::Cli, 0, 0)?;
    no_gate(&g, 8);
    pend(&g, V)?;
    g.cpu(0).load(Op::Sti, 0, 0)?;
    g.vcpus[0].run()?;
    ensure_eq!(decode(&g.vcpus[0]), Exit::Shutdown, "without #DF's gate");
    // With the gates back, and the vCPU as it was, the rest of the VM has not taken harm.
    for v in [V, 2, 11, 8] {
        set_gate(&g.mem, v, at::STUBS + u64::from(v) * 16, sel::CODE64, true);
    }
    g.reset(0)?;
    c.done(Op::Nop, 0, 0)?;
    pend(&g, 0x99)?;
    c.done(Op::Sti, 0, 0)?;
    ensure_eq!(g.count(0, 0x99), 1, "interrupts after the triple fault");
    Ok(())
}

/// KVM_SET_VCPU_EVENTS with a local APIC: an interrupt that was being delivered, an NMI, an INIT.
fn events(env: &Env) -> Outcome {
    let g = ready(env)?;
    let v = &g.vcpus[0];
    // It is no more in IRR, and is in ISR already, as in a VM that was saved in the middle of a delivery.
    let mut e = v.events()?;
    e.interrupt.injected = 1;
    e.interrupt.nr = V;
    v.set_events(&e)?;
    let got = v.events()?;
    ensure_eq!(
        (got.interrupt.injected, got.interrupt.nr),
        (1, V),
        "interrupt"
    );
    pend(&g, 0x72)?;
    go(&g, nothing(), IF)?;
    ensure_eq!(
        g.log(0),
        vec![V, 0x72],
        "events: what was being delivered, then what is pending"
    );
    ensure_eq!(v.events()?.interrupt.injected, 0, "injected afterwards");
    for (injected, pending, masked, want) in [
        (0u8, 1u8, 0u8, 1u64),
        (1, 0, 0, 1),
        (1, 1, 0, 2),
        (0, 1, 1, 0),
        (0, 0, 0, 0),
    ] {
        g.forget(0);
        let mut e = v.events()?;
        e.flags = kb::KVM_VCPUEVENT_VALID_NMI_PENDING;
        (e.nmi.injected, e.nmi.pending, e.nmi.masked) = (injected, pending, masked);
        v.set_events(&e)?;
        go(&g, nothing(), 0)?;
        g.cpu(0).done(Op::Nop, 0, 0)?;
        let got = g.count(0, 2);
        ensure_eq!(
            got,
            want,
            "NMIs of injected {injected}, pending {pending}, masked {masked}"
        );
    }
    // An INIT that was held back by system management mode.
    let ap: Cpu<'_> = g.cpu(1);
    let mut e = ap.vcpu().events()?;
    ensure_eq!(e.smi.latched_init, 0, "latched INIT");
    e.flags = kb::KVM_VCPUEVENT_VALID_SMM;
    e.smi.latched_init = 1;
    ap.vcpu().set_events(&e)?;
    let state = ap.vcpu().mp_state()?.mp_state;
    ensure_eq!(
        state,
        kb::KVM_MP_STATE_INIT_RECEIVED,
        "state with an INIT latched"
    );
    // And one that is taken back.
    g.reset(1)?;
    g.cpu(0).xipi(icr::INIT | icr::ASSERT, 1)?;
    let mut e = ap.vcpu().events()?;
    e.flags = kb::KVM_VCPUEVENT_VALID_SMM;
    e.smi.latched_init = 0;
    ap.vcpu().set_events(&e)?;
    let state = ap.vcpu().mp_state()?.mp_state;
    ensure_eq!(
        state,
        kb::KVM_MP_STATE_RUNNABLE,
        "state with the INIT taken back"
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "priorities",
        tests![
            nmi_then_interrupt,
            interrupt_then_fault,
            exception_first,
            shadows,
            trap_then_interrupt,
            nmi_blocking,
            nmis_at_once,
            nested,
            again_after_exits,
            crowd_after_exits,
            nmi_stack_in_device,
            interrupt_again_after_exits,
            interrupt_stack_in_device,
            missing_gates,
            events,
        ],
    )
}
