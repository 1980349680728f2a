// SPDX-License-Identifier: GPL-2.0

//! More than one vCPU: how they are started, how they halt, and what they can expect of each other.

use kvm_bindings as kb;
use selftests::apic::{self, block, icr, msr, reg, Chip, Guest, Op, State, ENABLED};
use selftests::check::expect_errno;
use selftests::guest::{at, pte, usize_of, PORT};
use selftests::host::{cpus, interrupting_handler, interval_alarm, patient};
use selftests::machine::{self, Exit, Mode};
use selftests::{
    ensure, ensure_eq, fail, guest_code, skip, smp, sys, tests, Env, Outcome, Verdict,
};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

const RUNNABLE: u32 = kb::KVM_MP_STATE_RUNNABLE;
const UNINITIALIZED: u32 = kb::KVM_MP_STATE_UNINITIALIZED;
const INIT_RECEIVED: u32 = kb::KVM_MP_STATE_INIT_RECEIVED;
const HALTED: u32 = kb::KVM_MP_STATE_HALTED;
const SIPI_RECEIVED: u32 = kb::KVM_MP_STATE_SIPI_RECEIVED;

/// The page in which a SIPI starts what the tests have there.
const PAGE: u32 = 0xd4;

fn state(g: &Guest, id: usize) -> Result<u32, Verdict> {
    Ok(g.vcpus[id].mp_state()?.mp_state)
}

fn set_state(g: &Guest, id: usize, mp_state: u32) -> Result<(), sys::Error> {
    g.vcpus[id].set_mp_state(&kb::kvm_mp_state { mp_state })
}

/// What a vCPU is created as, by KVM_SET_BOOT_CPU_ID.
fn created(env: &Env) -> Outcome {
    for chip in [Chip::Split, Chip::Full] {
        for boot in [0usize, 2] {
            let kvm = env.open()?;
            apic::need(&kvm, chip)?;
            let vm = kvm.create_vm()?;
            machine::set_special_pages(&vm)?;
            apic::create(&vm, chip)?;
            vm.fd.ioctl(sys::KVM_SET_BOOT_CPU_ID, boot)?;
            for id in 0..3usize {
                let v = vm.create_vcpu(id)?;
                let want = if id == boot { RUNNABLE } else { UNINITIALIZED };
                ensure_eq!(
                    v.mp_state()?.mp_state,
                    want,
                    "vCPU {id} with boot CPU {boot}"
                );
                let bsp = v.sregs()?.apic_base & msr::BSP != 0;
                ensure_eq!(
                    bsp,
                    id == boot,
                    "BSP flag of vCPU {id} with boot CPU {boot}"
                );
            }
        }
    }
    Ok(())
}

/// KVM_SET_BOOT_CPU_ID and KVM_CAP_MAX_VCPU_ID: what they refuse.
fn ids(env: &Env) -> Outcome {
    let kvm = env.open()?;
    apic::need(&kvm, Chip::Split)?;
    let max = usize::try_from(kvm.capability(kb::KVM_CAP_MAX_VCPU_ID)).unwrap_or(0);
    ensure!(
        kvm.capability(kb::KVM_CAP_SET_BOOT_CPU_ID) > 0,
        "KVM_CAP_SET_BOOT_CPU_ID"
    );
    let vm = kvm.create_vm()?;
    machine::set_special_pages(&vm)?;
    let boot = |id: usize| vm.fd.ioctl(sys::KVM_SET_BOOT_CPU_ID, id);
    let limit = |id: u64| vm.enable_cap(kb::KVM_CAP_MAX_VCPU_ID, id);
    expect_errno(boot(max + 1), libc::EINVAL, "a boot CPU beyond all")?;
    expect_errno(boot(usize::MAX), libc::EINVAL, "boot CPU -1")?;
    boot(7)?;
    expect_errno(limit(max as u64 + 1), libc::EINVAL, "a limit beyond all")?;
    expect_errno(limit(5), libc::EINVAL, "a limit below the boot CPU")?;
    boot(0)?;
    limit(4)?;
    limit(4)?;
    expect_errno(limit(5), libc::EINVAL, "another limit")?;
    expect_errno(boot(5), libc::EINVAL, "a boot CPU beyond the limit")?;
    expect_errno(
        vm.create_vcpu(4).map(|_| ()),
        libc::EINVAL,
        "vCPU 4 with a limit of 4",
    )?;
    let _v = vm.create_vcpu(3)?;
    expect_errno(boot(0), libc::EBUSY, "a boot CPU when there is a vCPU")?;
    Ok(())
}

/// The controllers are created once, and before vCPUs.
fn chips(env: &Env) -> Outcome {
    let kvm = env.open()?;
    apic::need(&kvm, Chip::Split)?;
    let vm = kvm.create_vm()?;
    let split = |pins: u64| vm.enable_cap(kb::KVM_CAP_SPLIT_IRQCHIP, pins);
    expect_errno(split(4097), libc::EINVAL, "too many routes")?;
    split(24)?;
    expect_errno(split(24), libc::EEXIST, "a second time")?;
    expect_errno(split(4097), libc::EINVAL, "too many routes, a second time")?;
    expect_errno(
        vm.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0),
        libc::EEXIST,
        "the other kind",
    )?;
    let late = kvm.create_vm()?;
    machine::set_special_pages(&late)?;
    let vcpu = late.create_vcpu(0)?;
    expect_errno(
        apic::create(&late, Chip::Split),
        libc::EEXIST,
        "split, after a vCPU",
    )?;
    if apic::need(&kvm, Chip::Full).is_ok() {
        expect_errno(
            apic::create(&late, Chip::Full),
            libc::EINVAL,
            "full, after a vCPU",
        )?;
    }
    // What was refused is not there.
    expect_errno(
        set_any(&vcpu, HALTED),
        libc::EINVAL,
        "HALTED without a local APIC",
    )?;
    Ok(())
}

fn set_any(v: &selftests::vm::Vcpu, mp_state: u32) -> Result<(), sys::Error> {
    v.set_mp_state(&kb::kvm_mp_state { mp_state })
}

/// All states can be set and read; SIPI_RECEIVED is INIT_RECEIVED with a SIPI pending.
fn mp_states(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 2)?;
    for id in 0..2 {
        for s in [
            UNINITIALIZED,
            INIT_RECEIVED,
            HALTED,
            RUNNABLE,
            kb::KVM_MP_STATE_AP_RESET_HOLD,
        ] {
            set_state(&g, id, s)?;
            ensure_eq!(state(&g, id)?, s, "state of vCPU {id}");
        }
        set_state(&g, id, HALTED)?;
        for bad in [5u32, 6, 7, 8, 10, 11, 0x8000_0000, u32::MAX] {
            expect_errno(
                set_state(&g, id, bad),
                libc::EINVAL,
                &format!("state {bad:#x}"),
            )?;
        }
        ensure_eq!(state(&g, id)?, HALTED, "state after what was refused");
    }
    let v = &g.vcpus[1];
    let mut e = v.events()?;
    e.flags = kb::KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    e.sipi_vector = 0x9a;
    v.set_events(&e)?;
    ensure_eq!(
        v.events()?.sipi_vector,
        0,
        "sipi_vector, which is never told"
    );
    set_state(&g, 1, SIPI_RECEIVED)?;
    ensure_eq!(state(&g, 1)?, RUNNABLE, "state after SIPI_RECEIVED");
    let cs = v.sregs()?.cs;
    ensure_eq!(
        (cs.selector, cs.base, v.regs()?.rip),
        (0x9a00, 0x9a000, 0),
        "CS:IP"
    );
    Ok(())
}

/// Calls KVM_RUN for some time; the error it ends with.
fn run_for(g: &Guest, id: usize, ms: u64) -> Result<i32, Verdict> {
    interrupting_handler(libc::SIGALRM)?;
    interval_alarm(patient(ms));
    let r = g.vcpus[id].run();
    interval_alarm(0);
    match r {
        Err(e) => Ok(e.errno),
        Ok(_) => fail!(
            "exit {:x?}, expected an error",
            machine::decode(&g.vcpus[id])
        ),
    }
}

/// KVM_RUN of a vCPU that is not started: it waits until a signal, or an INIT, which is EAGAIN.
fn waits_for_init(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 2)?;
    let c = g.cpu(0);
    c.enable()?;
    set_state(&g, 1, UNINITIALIZED)?;
    let v = &g.vcpus[1];
    v.set_immediate_exit(1);
    expect_errno(v.run(), libc::EINTR, "KVM_RUN with immediate_exit")?;
    v.set_immediate_exit(0);
    for _ in 0..3 {
        ensure_eq!(run_for(&g, 1, 3)?, libc::EINTR, "KVM_RUN with a signal");
        ensure_eq!(v.kvm_run().exit_reason, kb::KVM_EXIT_INTR, "exit reason");
    }
    // Neither an interrupt, nor a SIPI without an INIT, starts it.
    c.ipi(0x40, 1)?;
    c.ipi(icr::SIPI | PAGE, 1)?;
    let r = run_for(&g, 1, 5)?;
    ensure!(
        r == libc::EAGAIN || r == libc::EINTR,
        "KVM_RUN after a SIPI: errno {r}"
    );
    ensure_eq!(state(&g, 1)?, UNINITIALIZED, "state after a SIPI");
    ensure_eq!(run_for(&g, 1, 5)?, libc::EINTR, "KVM_RUN after that");
    // INIT is taken by KVM_RUN...
    c.ipi(icr::INIT | icr::ASSERT, 1)?;
    ensure_eq!(run_for(&g, 1, 1000)?, libc::EAGAIN, "KVM_RUN after an INIT");
    ensure_eq!(state(&g, 1)?, INIT_RECEIVED, "state after an INIT");
    ensure_eq!(run_for(&g, 1, 5)?, libc::EINTR, "KVM_RUN without a SIPI");
    ensure_eq!(state(&g, 1)?, INIT_RECEIVED, "state without a SIPI");
    // ...and a SIPI has it run.
    guest_code!(code, ".code16", "mov al, 0x5a", "out {P}, al", "2: jmp 2b"; P = PORT);
    g.mem.write_bytes(PAGE as usize * 0x1000, code());
    c.ipi(icr::SIPI | PAGE, 1)?;
    v.run()?;
    let want = Exit::Out {
        port: PORT,
        size: 1,
        data: vec![0x5a],
    };
    ensure_eq!(machine::decode(v), want, "exit after a SIPI");
    let s = v.sregs()?;
    ensure_eq!(
        (s.cs.selector, s.cs.base),
        (PAGE as u16 * 0x100, u64::from(PAGE) * 0x1000),
        "CS"
    );
    // A second SIPI is not for one that runs.
    c.ipi(icr::SIPI | 0x11, 1)?;
    ensure_eq!(
        run_for(&g, 1, 5)?,
        libc::EINTR,
        "KVM_RUN after a second SIPI"
    );
    ensure_eq!(
        v.sregs()?.cs.selector,
        PAGE as u16 * 0x100,
        "CS after a second SIPI"
    );
    Ok(())
}

/// INIT and SIPI that arrive before anyone looks, in all orders.
fn latched(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 2)?;
    let c = g.cpu(0);
    c.enable()?;
    let init = || c.ipi(icr::INIT | icr::ASSERT, 1);
    let sipi = |page: u32| c.ipi(icr::SIPI | page, 1);
    let cs = || -> Result<u16, Verdict> { Ok(g.vcpus[1].sregs()?.cs.selector) };
    init()?;
    sipi(0x12)?;
    ensure_eq!((state(&g, 1)?, cs()?), (RUNNABLE, 0x1200), "INIT, SIPI");
    sipi(0x13)?;
    ensure_eq!(
        (state(&g, 1)?, cs()?),
        (RUNNABLE, 0x1200),
        "SIPI when it runs"
    );
    init()?;
    ensure_eq!((state(&g, 1)?, cs()?), (INIT_RECEIVED, 0xf000), "INIT");
    init()?;
    ensure_eq!(state(&g, 1)?, INIT_RECEIVED, "INIT, INIT");
    sipi(0x14)?;
    init()?;
    ensure_eq!(state(&g, 1)?, INIT_RECEIVED, "SIPI, INIT");
    sipi(0x15)?;
    sipi(0x16)?;
    ensure_eq!(state(&g, 1)?, RUNNABLE, "SIPI, SIPI");
    ensure!(
        matches!(cs()?, 0x1500 | 0x1600),
        "CS {:#x} after SIPI, SIPI",
        cs()?
    );
    // The end of a level is no INIT.
    c.ipi(icr::INIT | icr::LEVEL, 1)?;
    ensure_eq!(state(&g, 1)?, RUNNABLE, "INIT, de-asserted");
    c.ipi(icr::INIT | icr::LEVEL | icr::ASSERT, 1)?;
    ensure_eq!(state(&g, 1)?, INIT_RECEIVED, "INIT, asserted");
    // To all others; not to the sender.
    set_state(&g, 1, RUNNABLE)?;
    c.ipi(icr::INIT | icr::ASSERT | icr::OTHERS, 0)?;
    ensure_eq!(
        (state(&g, 0)?, state(&g, 1)?),
        (RUNNABLE, INIT_RECEIVED),
        "INIT to all others"
    );
    Ok(())
}

/// What an INIT resets, and what it leaves: SDM volume 3, table 10-1.
fn init_resets(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 2)?;
    for id in [1usize, 0] {
        let (c, v) = (g.cpu(id), &g.vcpus[id]);
        c.enable()?;
        c.write(reg::LVT_ERROR, 0x40)?;
        c.write(reg::LDR, 0x0400_0000)?;
        c.write(reg::TPR, 0x30)?;
        c.ipi(icr::SELF | 0x22, 0)?;
        let (star, sysenter) = (0x0012_0008_0000_0000, 0x18);
        ensure!(
            v.set_msr(0xc000_0081, star)? && v.set_msr(0x174, sysenter)?,
            "MSRs"
        );
        let mut f = v.fpu()?;
        f.xmm[3] = [0xa5; 16];
        v.set_fpu(&f)?;
        let mut d = v.debugregs()?;
        d.db[1] = 0x1234;
        v.set_debugregs(&d)?;
        let base = v.sregs()?.apic_base;
        let mut r = v.regs()?;
        (r.r14, r.rbp, r.rflags) = (5, 6, 0xd7);
        v.set_regs(&r)?;
        let mut s = State::get(v)?;
        s.put_vector(reg::ISR, 0x91);
        s.set(v)?;
        let from = g.cpu(1 - id);
        from.start()?;
        from.write(reg::SVR, ENABLED | 0xff)?;
        from.ipi(icr::INIT | icr::ASSERT, id as u8)?;
        let want = if id == 0 { RUNNABLE } else { INIT_RECEIVED };
        ensure_eq!(state(&g, id)?, want, "state of vCPU {id}");
        let (r, s) = (v.regs()?, v.sregs()?);
        ensure_eq!((r.rip, r.rflags, r.rsp), (0xfff0, 2, 0), "RIP, RFLAGS, RSP");
        ensure_eq!(
            (r.rax, r.rbx, r.rcx, r.rbp, r.r14),
            (0, 0, 0, 0, 0),
            "RAX..R14"
        );
        let signature = v.cpuid()?.find(1, 0).map_or(0, |e| e.eax);
        ensure_eq!(
            r.rdx,
            u64::from(signature),
            "RDX: the processor's signature"
        );
        ensure_eq!(
            (s.cs.selector, s.cs.base, s.cs.limit),
            (0xf000, 0xffff_0000, 0xffff),
            "CS"
        );
        ensure_eq!(
            (s.ss.selector, s.ss.base, s.ds.base, s.gs.base),
            (0, 0, 0, 0),
            "data segments"
        );
        ensure_eq!((s.gdt.base, s.gdt.limit), (0, 0xffff), "GDT");
        ensure_eq!((s.idt.base, s.idt.limit), (0, 0xffff), "IDT");
        // Whether caches are on is kept; the guest had them on.
        ensure_eq!(
            (s.cr0, s.cr2, s.cr3, s.cr4, s.efer),
            (0x10, 0, 0, 0, 0),
            "CR0, 2, 3, 4, EFER"
        );
        let d = v.debugregs()?;
        ensure_eq!(
            (d.db[1], d.dr6, d.dr7),
            (0, 0xffff_0ff0, 0x400),
            "debug registers"
        );
        // Kept.
        ensure_eq!(s.apic_base, base, "IA32_APIC_BASE");
        ensure_eq!(v.msr(0xc000_0081)?, Some(star), "IA32_STAR");
        ensure_eq!(v.msr(0x174)?, Some(sysenter), "IA32_SYSENTER_CS");
        ensure_eq!(v.fpu()?.xmm[3], [0xa5; 16], "XMM3");
        let a = State::get(v)?;
        ensure_eq!(a.reg(reg::ID), (id as u32) << 24, "APIC ID");
        ensure_eq!(a.reg(reg::SVR), 0xff, "SVR");
        ensure_eq!((a.reg(reg::TPR), a.reg(reg::LDR)), (0, 0), "TPR, LDR");
        ensure_eq!(a.reg(reg::LVT_ERROR), apic::MASKED, "LVT error entry");
        ensure!(
            !a.vector(reg::IRR, 0x22) && !a.vector(reg::ISR, 0x91),
            "IRR, ISR"
        );
        g.reset(id)?;
    }
    Ok(())
}

/// A guest that brings its processors up as firmware does: the boot processor in real mode, by x2APIC,
/// INIT and SIPI to all others; each of those counts itself.
fn bring_up(env: &Env) -> Outcome {
    guest_code!(boot, ".code16",
        "mov ecx, 0x1b",
        "rdmsr",
        "or ax, 0x400",
        "wrmsr",
        "mov ecx, 0x830",
        "xor edx, edx",
        "mov eax, 0xc4500",
        "wrmsr",
        "mov eax, 0xc4600 + {S}",
        "wrmsr",
        "wrmsr", // twice, as firmware does
        "2: pause",
        "cmp dword ptr [{D}], 3",
        "jne 2b",
        "out {P}, al",
        "3: jmp 3b";
        S = PAGE, D = at::DATA, P = PORT,
    );
    guest_code!(ap, ".code16",
        "xor ax, ax",
        "mov ds, ax",
        "mov eax, 1",
        "cpuid",
        "shr ebx, 24",
        "inc byte ptr [ebx + {D} + 16]",
        "lock inc dword ptr [{D}]",
        "cli",
        "2: hlt",
        "jmp 2b";
        D = at::DATA,
    );
    for chip in [Chip::Split, Chip::Full] {
        let g = Guest::created(env, chip, 4)?;
        g.mem.write_bytes(usize_of(apic::OWN_CODE), boot());
        g.mem.write_bytes(PAGE as usize * 0x1000, ap());
        machine::start_vcpu(&g.vcpus[0], Mode::Real, apic::OWN_CODE)?;
        smp::run(&g, &[0, 1, 2, 3], false, |t| {
            g.wait("the boot processor", || t.done(0) || t.failed())?;
            ensure!(
                !t.done(1) && !t.done(2) && !t.done(3),
                "a vCPU came to an exit"
            );
            ensure!(
                t.again.load(Ordering::SeqCst) <= 6,
                "EAGAIN more than once a vCPU"
            );
            Ok(())
        })?;
        let counts = g.mem.read_bytes(usize_of(at::DATA) + 16, 5);
        ensure_eq!(
            counts,
            vec![0u8, 1, 1, 1, 0],
            "how often each started, {chip:?}"
        );
        // They halt.
        for id in 1..4 {
            ensure_eq!(state(&g, id)?, HALTED, "state of vCPU {id}, {chip:?}");
        }
    }
    Ok(())
}

/// INIT gets a vCPU out of a loop with interrupts disabled, out of HLT, and SIPI starts it again; many
/// times.
fn restarts(env: &Env) -> Outcome {
    guest_code!(spins, ".code16", "xor ax, ax", "mov ds, ax", "lock inc dword ptr [{D}]", "2: jmp 2b";
        D = at::DATA);
    guest_code!(halts, ".code16", "xor ax, ax", "mov ds, ax", "lock inc dword ptr [{D}]", "2: hlt", "jmp 2b";
        D = at::DATA);
    let g = Guest::new(env, Chip::Split, 2)?;
    let c = g.cpu(0);
    c.enable()?;
    g.mem.write_bytes(PAGE as usize * 0x1000, spins());
    g.mem.write_bytes((PAGE as usize + 1) * 0x1000, halts());
    set_state(&g, 1, UNINITIALIZED)?;
    let rounds = env.fewer(60) as u32;
    smp::run(&g, &[1], false, |t| {
        for k in 0..rounds {
            c.ipi(icr::INIT | icr::ASSERT, 1)?;
            c.ipi(icr::SIPI | (PAGE + k % 2), 1)?;
            g.wait("a start", || {
                g.mem.read::<u32>(usize_of(at::DATA)) > k || t.failed()
            })?;
        }
        Ok(())
    })?;
    ensure_eq!(g.mem.read::<u32>(usize_of(at::DATA)), rounds, "starts");
    Ok(())
}

/// HLT waits in the kernel: for an interrupt that may come, for an NMI, and a signal gets it out for a
/// while.
fn halt(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 2)?;
    let (c, h) = (g.cpu(0), g.cpu(1));
    c.enable()?;
    h.enable()?;
    // With an interrupt pending, and allowed, it does not wait.
    c.ipi(0x41, 1)?;
    h.done(Op::Halt, 0, 0)?;
    ensure_eq!(g.log(1), vec![0x41u8], "vectors");
    // Signals leave it in HLT.
    h.load(Op::Halt, 0, 0)?;
    for _ in 0..3 {
        ensure_eq!(run_for(&g, 1, 3)?, libc::EINTR, "KVM_RUN in HLT");
        ensure_eq!(state(&g, 1)?, HALTED, "state in HLT");
    }
    c.ipi(0x42, 1)?;
    h.finish()?;
    ensure_eq!(g.log(1), vec![0x41u8, 0x42], "vectors");
    // TPR holds an interrupt back in HLT too.
    h.write(reg::TPR, 0x50)?;
    h.load(Op::Halt, 0, 0)?;
    c.ipi(0x43, 1)?;
    ensure_eq!(run_for(&g, 1, 3)?, libc::EINTR, "KVM_RUN in HLT with TPR");
    c.ipi(0x63, 1)?;
    h.finish()?;
    ensure_eq!(g.log(1), vec![0x41u8, 0x42, 0x63], "vectors");
    h.write(reg::TPR, 0)?;
    h.done(Op::Sti, 0, 0)?;
    h.done(Op::Cli, 0, 0)?;
    ensure_eq!(g.log(1), vec![0x41u8, 0x42, 0x63, 0x43], "vectors");
    // With IF = 0 no interrupt wakes it, an NMI does.
    h.load(Op::HaltOnly, 0, 0)?;
    c.ipi(0x44, 1)?;
    ensure_eq!(
        run_for(&g, 1, 3)?,
        libc::EINTR,
        "KVM_RUN in HLT with IF = 0"
    );
    ensure_eq!(state(&g, 1)?, HALTED, "state in HLT with IF = 0");
    c.ipi(icr::NMI, 1)?;
    h.finish()?;
    ensure_eq!(g.log(1), vec![0x41u8, 0x42, 0x63, 0x43, 2], "vectors");
    // KVM_NMI does too.
    h.load(Op::HaltOnly, 0, 0)?;
    ensure_eq!(run_for(&g, 1, 3)?, libc::EINTR, "KVM_RUN in HLT");
    g.vcpus[1].fd.ioctl(sys::KVM_NMI, 0)?;
    h.finish()?;
    ensure_eq!(g.count(1, 2), 2, "NMIs");
    // And so does the host, by the state.
    h.load(Op::HaltOnly, 0, 0)?;
    ensure_eq!(run_for(&g, 1, 3)?, libc::EINTR, "KVM_RUN in HLT");
    set_state(&g, 1, RUNNABLE)?;
    h.finish()?;
    // A vCPU that the host halts waits without an instruction.
    set_state(&g, 1, HALTED)?;
    h.load(Op::Nop, 0, 0)?;
    ensure_eq!(
        run_for(&g, 1, 3)?,
        libc::EINTR,
        "KVM_RUN, halted by the host"
    );
    set_state(&g, 1, RUNNABLE)?;
    h.finish()?;
    Ok(())
}

/// Where the table is that maps `SHARED`.
const TABLE: u64 = 0xd_0000;
/// A page whose mapping changes.
const SHARED: u64 = 0x40_0000;
/// The frames that take turns there.
const FRAMES: u64 = 0x10_0000;
/// The generation that all have seen.
const SEEN: u64 = at::DATA;

// RAX rounds, RDI other vCPUs: maps another frame, whose first word is the round's number; has all others
// invalidate; only then takes the number out of the old frame.
guest_code!(shooter, ".code64",
    "mov r9, rax",
    "xor r10d, r10d",
    "xor r11d, r11d",
    "2:",
    "inc r11",
    "mov r8, r11",
    "and r8d, 1",
    "shl r8d, 12",
    "add r8d, {F}",
    "mov [r8], r11",
    "lea rax, [r8 + 3]",
    "mov [{T}], rax",
    "invlpg [{V}]",
    "add r10, rdi",
    "mov ecx, 0x830",
    "xor edx, edx",
    "mov eax, 0xc0055",
    "wrmsr",
    "3: pause",
    "cmp gs:[0x80], r10",
    "jb 3b",
    "mov [{S}], r11",
    "xor r8d, 0x1000",
    "mov qword ptr [r8], 0",
    "dec r9",
    "jnz 2b",
    "jmp r15";
    F = FRAMES, T = TABLE, V = SHARED, S = SEEN,
);

// Checks for ever that the page is not of a generation before the one that all have seen.
guest_code!(checker, ".code64",
    "sti",
    "2:",
    "mov rax, [{S}]",
    "mov rcx, [{V}]",
    "cmp rcx, rax",
    "jb 3f",
    "inc qword ptr gs:[0x88]",
    "jmp 2b",
    "3: mov gs:[0x90], rax",
    "mov gs:[0x98], rcx",
    "jmp r15";
    V = SHARED, S = SEEN,
);

guest_code!(invalidate, ".code64",
    "cmp eax, 0x55", // not for a spurious interrupt
    "jne 2f",
    "invlpg [{V}]",
    "lock inc qword ptr [{B} + 0x80]",
    "2: ret";
    V = SHARED, B = block::FIRST,
);

fn shoot(env: &Env, n: usize, crowded: bool, hook: &[u8]) -> Outcome {
    let rounds = env.fewer(if crowded || cpus().len() == 1 {
        15
    } else {
        200
    });
    let g = Guest::new(env, Chip::Split, n)?;
    g.mem.write(usize_of(at::PD) + 16, TABLE | pte::P | pte::W);
    g.mem.write(usize_of(TABLE), FRAMES | pte::P | pte::W);
    g.mem.write_bytes(usize_of(apic::OWN_CODE), shooter());
    g.mem
        .write_bytes(usize_of(apic::OWN_CODE) + 0x200, checker());
    for id in 0..n {
        let c = g.cpu(id);
        c.enable_x2apic()?;
        g.hook(id, hook);
        let (code, a) = if id == 0 {
            (apic::OWN_CODE, n as u64 - 1)
        } else {
            (apic::OWN_CODE + 0x200, 0)
        };
        c.load_at(code, a, rounds)?;
    }
    let all: Vec<usize> = (0..n).collect();
    smp::run(&g, &all, crowded, |t| {
        g.wait("the last round", || (0..n).any(|i| t.done(i)) || t.failed())
    })?;
    for id in 1..n {
        let page = usize_of(g.block(id));
        let (seen, got): (u64, u64) = (g.mem.read(page + 0x90), g.mem.read(page + 0x98));
        ensure!(
            seen == 0,
            "vCPU {id} read generation {got} when {seen} was seen by all"
        );
        ensure!(
            g.mem.read::<u64>(page + 0x88) > 0,
            "vCPU {id} did not check"
        );
        ensure_eq!(g.count(id, 0x55), rounds, "interrupts of vCPU {id}");
    }
    Ok(())
}

/// A mapping changes, an interrupt has the others invalidate it: from then on none sees the old page.
fn shootdown(env: &Env) -> Outcome {
    shoot(env, 2, false, invalidate())?;
    shoot(env, 4, false, invalidate())
}

fn shootdown_crowded(env: &Env) -> Outcome {
    shoot(env, 3, true, invalidate())
}

/// More vCPUs than processors that spin for a lock: all get it, and none at the same time.
fn spin_lock(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "2: mov ecx, 1",
        "3: xchg [{L}], ecx",
        "test ecx, ecx",
        "jz 4f",
        "pause",
        "jmp 3b",
        "4: mov rcx, [{L} + 64]",
        "mov edx, 20",
        "5: dec edx",
        "jnz 5b",
        "inc rcx",
        "mov [{L} + 64], rcx",
        "mov dword ptr [{L}], 0",
        "dec rax",
        "jnz 2b",
        "jmp r15";
        L = at::DATA,
    );
    let n = 4;
    let rounds = env.fewer(3000);
    let g = Guest::new(env, Chip::Split, n)?;
    g.mem.write_bytes(usize_of(apic::OWN_CODE), code());
    for id in 0..n {
        g.cpu(id).start()?;
        g.cpu(id).load_at(apic::OWN_CODE, 0, rounds)?;
    }
    let all: Vec<usize> = (0..n).collect();
    smp::run(&g, &all, false, |t| {
        g.wait("all", || t.all_done() || t.failed())
    })?;
    let counted = g.mem.read::<u64>(usize_of(at::DATA) + 64);
    ensure_eq!(counted, rounds * n as u64, "increments under the lock");
    Ok(())
}

/// KVM_CAP_X86_DISABLE_EXITS: which bits, and when.
fn disable_exits(env: &Env) -> Outcome {
    let kvm = env.open()?;
    apic::need(&kvm, Chip::Split)?;
    let known = kvm.capability(kb::KVM_CAP_X86_DISABLE_EXITS);
    ensure!(known >= 0, "KVM_CAP_X86_DISABLE_EXITS is {known}");
    let vm = kvm.create_vm()?;
    machine::set_special_pages(&vm)?;
    let disable = |bits: u64| vm.enable_cap(kb::KVM_CAP_X86_DISABLE_EXITS, bits);
    for bit in 0..64u64 {
        let r = disable(1 << bit);
        if bit < 31 && known & (1 << bit) != 0 {
            ensure!(r.is_ok(), "bit {bit} of {known:#x}: {r:?}");
        } else {
            expect_errno(r, libc::EINVAL, &format!("bit {bit} of {known:#x}"))?;
        }
    }
    let _v = vm.create_vcpu(0)?;
    expect_errno(disable(known as u64), libc::EINVAL, "when there is a vCPU")
}

/// With HLT left to the guest, a vCPU that halts is woken by interrupts and NMIs, and signals get its
/// thread back.
fn halt_in_guest(env: &Env) -> Outcome {
    let kvm = env.open()?;
    apic::need(&kvm, Chip::Split)?;
    let bits = kvm.capability(kb::KVM_CAP_X86_DISABLE_EXITS) as u64;
    if bits & u64::from(kb::KVM_X86_DISABLE_EXITS_HLT) == 0 {
        skip!("HLT exits cannot be disabled");
    }
    let bits = bits & u64::from(kb::KVM_X86_DISABLE_EXITS_HLT | kb::KVM_X86_DISABLE_EXITS_PAUSE);
    let g = Guest::prepared(env, Chip::Split, 2, |vm| {
        Ok(vm.enable_cap(kb::KVM_CAP_X86_DISABLE_EXITS, bits)?)
    })?;
    let (c, h) = (g.cpu(0), g.cpu(1));
    c.enable()?;
    h.enable()?;
    // In a loop, as the emulated machine ends HLT at an interrupt of the host's too; and with IF = 1, as
    // with the guest's IF = 0 that does not end it there, as it would on a processor.
    guest_code!(code, ".code64", "2: sti", "hlt", "pause", "jmp 2b");
    g.mem.write_bytes(usize_of(apic::OWN_CODE), code());
    h.load_at(apic::OWN_CODE, 0, 0)?;
    for _ in 0..3 {
        ensure_eq!(run_for(&g, 1, 3)?, libc::EINTR, "KVM_RUN in HLT");
    }
    smp::run(&g, &[1], false, |t| {
        for k in 1..=50u64 {
            if k % 4 == 0 {
                t.kick(0);
            }
            c.ipi(0x47, 1)?;
            g.wait("an interrupt", || g.count(1, 0x47) >= k || t.failed())?;
            c.ipi(icr::NMI, 1)?;
            g.wait("an NMI", || g.count(1, 2) >= k || t.failed())?;
        }
        Ok(())
    })?;
    ensure_eq!(
        (g.count(1, 0x47), g.count(1, 2)),
        (50, 50),
        "interrupts and NMIs"
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "smp",
        tests![
            created,
            ids,
            chips,
            mp_states,
            waits_for_init,
            latched,
            init_resets,
            bring_up,
            restarts,
            halt,
            shootdown,
            shootdown_crowded,
            spin_lock,
            disable_exits,
            halt_in_guest,
        ],
    )
}
