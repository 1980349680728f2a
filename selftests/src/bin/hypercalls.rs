// SPDX-License-Identifier: GPL-2.0

//! Hypercalls: who may make them, what they do, and the instruction that makes them.

use kvm_bindings as kb;
use selftests::apic::{icr, Chip, Guest, Op, OWN_CODE};
use selftests::guest::{at, pte, usize_of, Record, PORT_EXCEPTION};
use selftests::machine::{Exit, Machine, Mode};
use selftests::{
    ensure, ensure_eq, fail, guest_code, skip, smp, sys, tests, Env, Outcome, Verdict,
};
use std::process::ExitCode;

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;
const MAP_GPA_RANGE: u64 = 12;

const EPERM: i64 = -1;
const EINVAL: i64 = -22;
const ENOSYS: i64 = -1000;

/// KVM's features.
const LEAF: u32 = 0x4000_0001;

/// The vector of tests that need one.
const V: u32 = 0x51;

guest_code!(call64, ".code64", "mov rsi, rdi", "vmcall", "jmp r15");

/// Loads a hypercall of vCPU `id`.
fn load(g: &Guest, id: usize, number: u64, args: [u64; 4]) -> Outcome {
    g.cpu(id).start()?;
    g.mem.write_bytes(usize_of(OWN_CODE), call64());
    let mut r = g.vcpus[id].regs()?;
    (r.rsi, r.rax) = (OWN_CODE, number);
    [r.rbx, r.rcx, r.rdx, r.rdi] = args;
    g.vcpus[id].set_regs(&r)?;
    Ok(())
}

/// Has vCPU `id` make a hypercall; what it returns.
fn call(g: &Guest, id: usize, number: u64, args: [u64; 4]) -> Result<i64, Verdict> {
    load(g, id, number, args)?;
    g.cpu(id).finish()?;
    Ok(g.vcpus[id].regs()?.rax as i64)
}

guest_code!(call_once, ".code64", "vmcall", "hlt");
guest_code!(call_once32, ".code32", "vmcall", "hlt");

/// A machine that makes a hypercall; its RAX.
fn simple(env: &Env, mode: Mode, number: u64) -> Result<u64, Verdict> {
    let code = if mode == Mode::Long {
        call_once()
    } else {
        call_once32()
    };
    let m = Machine::new(env, mode, code)?;
    m.patch_regs(|r| r.rax = number)?;
    m.expect_hlt()?;
    Ok(m.vcpu.regs()?.rax)
}

/// What no hypercall has is refused, in as many bits as the mode has; one that does nothing does it.
fn unknown(env: &Env) -> Outcome {
    for number in [0, 2, 99, 0x1_0000_0001, u64::MAX] {
        let rax = simple(env, Mode::Long, number)?;
        ensure_eq!(rax as i64, ENOSYS, "hypercall {number:#x}");
    }
    let rax = simple(env, Mode::Protected, 99)?;
    ensure_eq!(
        rax,
        u64::from(0u32.wrapping_sub(1000)),
        "RAX of 32-bit code"
    );
    ensure_eq!(simple(env, Mode::Long, VAPIC_POLL_IRQ)?, 0, "poll");
    // Only the low half counts.
    ensure_eq!(
        simple(env, Mode::Protected, VAPIC_POLL_IRQ)?,
        0,
        "poll of 32-bit code"
    );
    Ok(())
}

/// User mode has none.
fn user_mode(env: &Env) -> Outcome {
    use selftests::guest::sel;
    guest_code!(user, ".code64", "vmcall", "mov dx, 0x80", "out dx, al");
    let m = Machine::new(env, Mode::Long, user())?;
    m.patch_sregs(|s| {
        s.cs.selector = sel::USER_CODE64;
        s.cs.dpl = 3;
        for seg in [&mut s.ss, &mut s.ds, &mut s.es] {
            seg.selector = sel::USER_DATA;
            seg.dpl = 3;
        }
    })?;
    // Ports are its own.
    m.patch_regs(|r| {
        r.rflags |= 3 << 12;
        r.rax = VAPIC_POLL_IRQ;
    })?;
    m.expect_out(0x80)?;
    ensure_eq!(m.vcpu.regs()?.rax as i64, EPERM, "RAX");
    Ok(())
}

/// Without the features in CPUID, a VMM that has it enforced keeps the guest from them.
fn enforced(env: &Env) -> Outcome {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID) != 1 {
        skip!("no KVM_CAP_ENFORCE_PV_FEATURE_CPUID");
    }
    let calls = [KICK_CPU, SEND_IPI, SCHED_YIELD];
    let g = Guest::new(env, Chip::Split, 2)?;
    let mut none = g.kvm.supported_cpuid()?;
    for e in none.list_mut() {
        if e.function == LEAF {
            e.eax = 0;
        }
    }
    g.vcpus[1].set_cpuid(&none)?;
    for number in calls {
        ensure_eq!(call(&g, 1, number, [0; 4])?, 0, "{number}, not enforced");
    }
    for enforce in [1, 0] {
        let cap = kb::kvm_enable_cap {
            cap: kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
            args: [enforce, 0, 0, 0],
            ..Default::default()
        };
        g.vcpus[0].fd.ioctl_ref(sys::KVM_ENABLE_CAP, &cap)?;
        g.vcpus[1].fd.ioctl_ref(sys::KVM_ENABLE_CAP, &cap)?;
        for number in calls {
            ensure_eq!(call(&g, 0, number, [0; 4])?, 0, "{number}, announced");
            let want = if enforce == 1 { ENOSYS } else { 0 };
            ensure_eq!(
                call(&g, 1, number, [0; 4])?,
                want,
                "{number}, not announced"
            );
        }
    }
    // Another capability is none of a vCPU's, and this one has no flags.
    for (cap, flags) in [
        (kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1),
        (kb::KVM_CAP_SPLIT_IRQCHIP, 0),
    ] {
        let cap = kb::kvm_enable_cap {
            cap,
            flags,
            ..Default::default()
        };
        match g.vcpus[0].fd.ioctl_ref(sys::KVM_ENABLE_CAP, &cap) {
            Err(e) if e.errno == libc::EINVAL => {}
            r => fail!("KVM_ENABLE_CAP: {r:?}"),
        }
    }
    Ok(())
}

/// A guest of `n` vCPUs that take interrupts.
fn guest(env: &Env, n: usize, x2apic: bool) -> Result<Guest, Verdict> {
    let g = Guest::new(env, Chip::Split, n)?;
    for id in 0..n {
        let c = g.cpu(id);
        if x2apic {
            c.enable_x2apic()?;
        } else {
            c.enable()?;
        }
        c.done(Op::Sti, 0, 0)?;
    }
    Ok(g)
}

/// KVM_HC_SEND_IPI: a bit for each, from some ID on.
fn send_ipi(env: &Env) -> Outcome {
    for x2apic in [false, true] {
        let g = guest(env, 4, x2apic)?;
        let check = |args: [u64; 4], want: i64, who: &[usize]| -> Outcome {
            ensure_eq!(call(&g, 0, SEND_IPI, args)?, want, "{args:x?}");
            for id in 0..4 {
                g.cpu(id).done(Op::Nop, 0, 0)?;
                let vector = if args[3] & 0x700 == 0x400 { 2 } else { V as u8 };
                let n = u64::from(who.contains(&id));
                ensure_eq!(g.total(id), n, "interrupts of {id} after {args:x?}");
                ensure_eq!(g.count(id, vector), n, "that of {args:x?} to {id}");
                g.forget(id);
            }
            Ok(())
        };
        let v = u64::from(V);
        check([0b1111, 0, 0, v], 4, &[0, 1, 2, 3])?;
        check([0b0110, 0, 0, v], 2, &[1, 2])?;
        check([0b0011, 0, 2, v], 2, &[2, 3])?;
        check([!0, !0, 0, v], 4, &[0, 1, 2, 3])?;
        check([0, 0, 0, v], 0, &[])?;
        // Nobody is there.
        check([!0 << 4, !0, 0, v], 0, &[])?;
        check([!0, !0, 4, v], 0, &[])?;
        check([!0, 0, 0xff, v], 0, &[])?;
        check([1, 0, 0xffff_ffff, v], 0, &[])?;
        check([0b1110, 0, 0, u64::from(icr::NMI)], 3, &[1, 2, 3])?;
        check([1 << 3, 0, 0, u64::from(icr::LOWEST | V)], 1, &[3])?;
        // Whom it is for is said otherwise.
        for command in [icr::LOGICAL, icr::SELF, icr::ALL, icr::OTHERS] {
            check([0xf, 0, 0, u64::from(command | V)], EINVAL, &[])?;
        }
    }
    Ok(())
}

/// KVM_HC_KICK_CPU ends a HLT, interrupts or not: the one that is, or the next.
fn kick(env: &Env) -> Outcome {
    let g = guest(env, 2, false)?;
    for id in 0..2 {
        g.cpu(id).done(Op::Cli, 0, 0)?;
    }
    // It is remembered, once.
    for _ in 0..3 {
        ensure_eq!(call(&g, 0, KICK_CPU, [0, 1, 0, 0])?, 0, "kick");
        g.cpu(1).done(Op::HaltOnly, 0, 0)?;
    }
    g.cpu(1).load(Op::HaltOnly, 0, 0)?;
    g.cpu(1).stays(20)?;
    for _ in 0..20 {
        g.cpu(1).load(Op::HaltOnly, 0, 0)?;
        load(&g, 0, KICK_CPU, [0, 1, 0, 0])?;
        smp::run(&g, &[0, 1], false, |t| {
            g.wait("the kicked", || t.all_done())
        })?;
        ensure_eq!(g.vcpus[0].regs()?.rax, 0, "kick");
    }
    // Nobody, and everybody's ID, which is nobody's here.
    for id in [2u64, 0xff, 0xffff_ffff, 0x1_0000_0000 | 7] {
        ensure_eq!(call(&g, 0, KICK_CPU, [0, id, 0, 0])?, 0, "kick of {id:#x}");
    }
    Ok(())
}

guest_code!(kicker, ".code64",
    // Wakes the other whenever it has come once further, until it has been often enough.
    "2: mov ebp, {N}",
    "3: mov eax, {K}", "mov ecx, 1", "vmcall",
    "4: pause", "cmp qword ptr [{D}], rbx", "je 4b",
    "mov rbx, [{D}]",
    "dec ebp", "jnz 3b",
    "jmp r15";
    N = 300, K = KICK_CPU, D = at::DATA
);
guest_code!(sleeper, ".code64",
    "mov ebp, {N}", "2: hlt", "inc qword ptr [{D}]", "dec ebp", "jnz 2b", "jmp r15";
    N = 300, D = at::DATA
);

/// A vCPU that halts again and again, and one that wakes it: no kick is lost.
fn kicks(env: &Env) -> Outcome {
    for crowded in [true, false] {
        let g = guest(env, 2, true)?;
        g.mem.write_bytes(usize_of(OWN_CODE), kicker());
        g.mem.write_bytes(usize_of(OWN_CODE) + 0x200, sleeper());
        let mut r = g.vcpus[0].regs()?;
        (r.rsi, r.rbx) = (OWN_CODE, 0);
        g.vcpus[0].set_regs(&r)?;
        g.cpu(1).load_at(OWN_CODE + 0x200, 0, 0)?;
        smp::run(&g, &[0, 1], crowded, |t| g.wait("kicks", || t.all_done()))?;
        ensure_eq!(g.mem.read::<u64>(usize_of(at::DATA)), 300, "wake-ups");
    }
    Ok(())
}

/// KVM_HC_SCHED_YIELD, to itself, to one that does not run, to nobody.
fn sched_yield(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 2)?;
    for id in [0, 1, 2, 0xff, 0xffff_ffff, u64::MAX] {
        ensure_eq!(
            call(&g, 0, SCHED_YIELD, [id, 0, 0, 0])?,
            0,
            "yield to {id:#x}"
        );
    }
    Ok(())
}

/// What `kvm_run` says of a hypercall.
fn exit(g: &Guest) -> Result<(u64, [u64; 6], u64), Verdict> {
    g.vcpus[0].run()?;
    let run = g.vcpus[0].kvm_run();
    ensure_eq!(run.exit_reason, kb::KVM_EXIT_HYPERCALL, "exit reason");
    // SAFETY: The exit reason tells which member is valid; it is of integers.
    let (h, flags) = unsafe {
        let h = run.__bindgen_anon_1.hypercall;
        (h, h.__bindgen_anon_1.flags)
    };
    Ok((h.nr, h.args, flags))
}

/// KVM_HC_MAP_GPA_RANGE goes to a VMM that wants it, and comes back with its answer.
fn map_gpa_range(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let mask = g.kvm.capability(kb::KVM_CAP_EXIT_HYPERCALL);
    if mask == 0 {
        skip!("no KVM_CAP_EXIT_HYPERCALL");
    }
    ensure_eq!(mask, 1 << MAP_GPA_RANGE, "KVM_CAP_EXIT_HYPERCALL");
    let args = [0x1000, 3, 0x10, 0];
    ensure_eq!(call(&g, 0, MAP_GPA_RANGE, args)?, ENOSYS, "not asked for");
    for bad in [1, 1 << SEND_IPI, 1 << 13, 1 << 63, u64::MAX] {
        match g.vm.enable_cap(kb::KVM_CAP_EXIT_HYPERCALL, bad) {
            Err(e) if e.errno == libc::EINVAL => {}
            r => fail!("KVM_CAP_EXIT_HYPERCALL of {bad:#x}: {r:?}"),
        }
    }
    g.vm.enable_cap(kb::KVM_CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)?;
    for bad in [
        [0x1001, 1, 0, 0],
        [0x1000, 0, 0, 0],
        [0xffff_ffff_ffff_f000, u64::MAX, 0, 0],
    ] {
        ensure_eq!(call(&g, 0, MAP_GPA_RANGE, bad)?, EINVAL, "{bad:x?}");
    }
    for answer in [None, Some(0u64), Some(5), Some(u64::MAX)] {
        load(&g, 0, MAP_GPA_RANGE, args)?;
        let (number, told, flags) = exit(&g)?;
        ensure_eq!(number, MAP_GPA_RANGE, "number");
        ensure_eq!(told[..3], args[..3], "arguments");
        ensure_eq!(flags, 1, "flags: 64-bit code");

        if let Some(answer) = answer {
            g.vcpus[0].kvm_run_mut().__bindgen_anon_1.hypercall.ret = answer;
        }
        g.cpu(0).finish()?;
        ensure_eq!(g.vcpus[0].regs()?.rax, answer.unwrap_or(0), "RAX");
    }
    g.vm.enable_cap(kb::KVM_CAP_EXIT_HYPERCALL, 0)?;
    ensure_eq!(call(&g, 0, MAP_GPA_RANGE, args)?, ENOSYS, "not any more");
    Ok(())
}

guest_code!(vmmcall, ".code64", "mov eax, 1", "vmmcall", "hlt");
guest_code!(undefined, ".code64", "ud2", "hlt");

/// Whether the processor's own is VMCALL.
fn is_intel(m: &Machine) -> Result<bool, Verdict> {
    let cpuid = m.kvm.supported_cpuid()?;
    Ok(cpuid
        .find(0, 0)
        .is_some_and(|e| e.ebx == u32::from_le_bytes(*b"Genu")))
}

/// VMMCALL becomes VMCALL, if the VMM does not mind; another undefined instruction stays one.
fn other_instruction(env: &Env) -> Outcome {
    let code = usize_of(at::CODE) + 5;
    let m = Machine::new(env, Mode::Long, vmmcall())?;
    if !is_intel(&m)? {
        skip!("VMMCALL is the processor's own");
    }
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read_bytes(code, 3),
        vec![0x0f, 0x01, 0xc1],
        "the code"
    );
    ensure_eq!(m.vcpu.regs()?.rax, 0, "RAX");

    let m = Machine::new(env, Mode::Long, undefined())?;
    let r = m.expect_exception(6)?;
    ensure_eq!(r.rip, at::CODE, "RIP of UD2");

    let quirks = kb::KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
    let m = Machine::new(env, Mode::Long, vmmcall())?;
    m.vm.enable_cap(kb::KVM_CAP_DISABLE_QUIRKS, u64::from(quirks))?;
    for n in 1..=3 {
        let r: Record = m.expect_exception(6)?;
        ensure_eq!((r.rip, r.count), (at::CODE + 5, n), "#UD");
        ensure_eq!(
            m.mem.read_bytes(code, 3),
            vec![0x0f, 0x01, 0xd9],
            "the code"
        );
        m.patch_regs(|r| r.rip = at::CODE)?;
        m.start(Mode::Long, vmmcall())?;
    }
    Ok(())
}

/// Code that the guest may not write is a page fault, as if it had written; on a page of its own each.
fn read_only_code(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, vmmcall())?;
    if !is_intel(&m)? {
        skip!("VMMCALL is the processor's own");
    }
    let page = 0x18_0000u64;
    // The second 2 MiB by pages of 4 KiB would do as well; here the first is mapped again, elsewhere.
    let alias = 0x40_0000u64;
    m.mem.write(
        usize_of(at::PD + (alias >> 21) * 8),
        pte::P | pte::PS | pte::U,
    );
    m.mem.write_bytes(usize_of(page), vmmcall());
    m.patch_regs(|r| r.rip = alias + page)?;
    match m.run()? {
        Exit::Out {
            port: PORT_EXCEPTION,
            ..
        } => {}
        other => fail!("exit {other:x?}"),
    }
    let r = m.record();
    ensure_eq!((r.vector, r.error), (14, 3), "exception {r:x?}");
    ensure_eq!(
        (r.rip, r.cr2),
        (alias + page + 5, alias + page + 5),
        "where"
    );
    let left = m.mem.read_bytes(usize_of(page) + 5, 3);
    ensure!(left == [0x0f, 0x01, 0xd9], "the code is {left:x?}");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "hypercalls",
        tests![
            unknown,
            user_mode,
            enforced,
            send_ipi,
            kick,
            kicks,
            sched_yield,
            map_gpa_range,
            other_instruction,
            read_only_code,
        ],
    )
}
