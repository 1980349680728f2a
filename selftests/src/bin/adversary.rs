// SPDX-License-Identifier: GPL-2.0

//! Guests that do their worst: random bytes as code in each mode, code that faults for ever, code where
//! no memory is. KVM_RUN has to come back in bounded time with an exit that makes sense, and the host
//! and other guests have to be none the worse for it. The seed is printed (`--seed` repeats a run).

use kvm_bindings as kb;
use selftests::guest::{at, descriptor, pte, segment, sel, set_gate, usize_of};
use selftests::host::{interrupting_handler, interval_alarm, patient, Rng};
use selftests::machine::{decode, start_vcpu, Exit, Machine, Mode, MODES};
use selftests::{ensure, fail, guest_code, tests, Env, Outcome, Verdict};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn works(env: &Env) -> Outcome {
    guest_code!(halt, ".code32", "hlt");
    for mode in MODES {
        Machine::new(env, mode, halt())?.expect_hlt()?;
    }
    Ok(())
}

/// The kind of an exit, for the statistics; none if a guest in a valid state must not end so.
fn kind(exit: &Exit) -> Option<&'static str> {
    Some(match exit {
        Exit::Out { .. } | Exit::In { .. } => "io",
        Exit::MmioRead { .. } | Exit::MmioWrite { .. } => "mmio",
        Exit::Hlt => "hlt",
        Exit::Shutdown => "shutdown",
        Exit::Internal { suberror: 1, .. } => "emulation",
        Exit::Internal { .. } => "internal",
        // CR8 writes and hypercalls may be told to userspace.
        // The processor saved a state at an exit that it refuses at the next entry. Real ones do not; the
        // emulated one does (a segment of real mode that is not marked as accessed).
        Exit::FailEntry(_) => "refused",
        Exit::Other(kb::KVM_EXIT_SET_TPR) => "tpr",
        Exit::Other(kb::KVM_EXIT_UNKNOWN) => "unknown",
        _ => return None,
    })
}

/// Runs a guest until it stops by itself, or for `exits` exits or `slices` timer ticks.
fn run_bounded(
    m: &Machine,
    rng: &mut Rng,
    exits: u32,
    slices: u32,
    seen: &mut BTreeMap<&'static str, u32>,
) -> Outcome {
    // Only here: a signal may end other calls as well (KVM_CREATE_VM for one).
    interval_alarm(patient(4));
    let r = run_until(m, rng, exits, slices, seen);
    interval_alarm(0);
    r
}

fn run_until(
    m: &Machine,
    rng: &mut Rng,
    exits: u32,
    slices: u32,
    seen: &mut BTreeMap<&'static str, u32>,
) -> Outcome {
    let (mut n, mut ticks) = (0, 0);
    while n < exits && ticks < slices {
        let start = Instant::now();
        let r = m.vcpu.run();
        ensure!(
            start.elapsed() < Duration::from_millis(patient(2000)),
            "KVM_RUN took {:?}\n{}",
            start.elapsed(),
            m.describe()
        );
        match r {
            Err(e) if e.errno == libc::EINTR => {
                ticks += 1;
                *seen.entry("signal").or_default() += 1;
                continue;
            }
            Err(e) => return Err(Verdict::Fail(format!("{e}\n{}", m.describe()))),
            Ok(_) => n += 1,
        }
        let exit = decode(&m.vcpu);
        let Some(kind) = kind(&exit) else {
            fail!("exit {exit:x?}\n{}", m.describe())
        };
        *seen.entry(kind).or_default() += 1;
        match exit {
            Exit::In { size, count, .. } => {
                let mut data = vec![0; usize::from(size) * count as usize];
                rng.fill(&mut data);
                m.io_reply(&data);
            }
            Exit::MmioRead { .. } => m.mmio_reply(&rng.number().to_le_bytes()),
            Exit::Out { .. } | Exit::MmioWrite { .. } | Exit::Hlt => {}
            Exit::Other(kb::KVM_EXIT_SET_TPR) => {}
            _ => break,
        }
    }
    Ok(())
}

/// Random code at CODE. Its page tables and descriptor tables are real, so that exceptions work.
fn random_code(env: &Env, mode: Mode, rounds: u64) -> Outcome {
    println!("seed {}", env.seed);
    interrupting_handler(libc::SIGALRM)?;
    let mut seen = BTreeMap::new();
    for round in 0..env.fewer(rounds) {
        let mut rng = Rng::new(env.seed.wrapping_mul(1000) + round + ((mode as u64) << 32));
        let mut code = vec![0u8; 0x1000];
        rng.fill(&mut code);
        let m = Machine::new(env, mode, &code)?;
        m.patch_regs(|r| {
            for reg in [
                &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp,
            ] {
                *reg = match rng.below(4) {
                    0 => rng.below(at::SIZE as u64),
                    1 => rng.number(),
                    2 => at::MMIO + rng.below(0x1000),
                    _ => rng.below(0x100),
                };
            }
        })?;
        run_bounded(&m, &mut rng, 30, 3, &mut seen)
            .map_err(|e| Verdict::Fail(format!("round {round} of seed {}: {e:?}", env.seed)))?;
    }
    println!("{mode:?}: {seen:?}");
    works(env)
}

fn random_real(env: &Env) -> Outcome {
    random_code(env, Mode::Real, 60)
}

fn random_protected(env: &Env) -> Outcome {
    random_code(env, Mode::Protected, 60)
}

fn random_paging32(env: &Env) -> Outcome {
    random_code(env, Mode::Paging32, 60)
}

fn random_pae(env: &Env) -> Outcome {
    random_code(env, Mode::Pae, 60)
}

fn random_long(env: &Env) -> Outcome {
    random_code(env, Mode::Long, 60)
}

/// Code made of instructions that exit or change the processor's state, in random order with random
/// operands: far denser in trouble than random bytes.
fn nasty_instructions(env: &Env) -> Outcome {
    const NASTY: [&[u8]; 44] = [
        &[0x0f, 0xa2],             // cpuid
        &[0x0f, 0x30],             // wrmsr
        &[0x0f, 0x32],             // rdmsr
        &[0x0f, 0x22, 0xc0],       // mov cr0, rax
        &[0x0f, 0x22, 0xd8],       // mov cr3, rax
        &[0x0f, 0x22, 0xe0],       // mov cr4, rax
        &[0x0f, 0x20, 0xc3],       // mov rbx, cr0
        &[0x44, 0x0f, 0x22, 0xc0], // mov cr8, rax
        &[0x0f, 0x23, 0xf8],       // mov dr7, rax
        &[0x0f, 0x23, 0xc0],       // mov dr0, rax
        &[0x0f, 0x01, 0xd1],       // xsetbv
        &[0x0f, 0x01, 0xd0],       // xgetbv
        &[0x0f, 0x01, 0xc1],       // vmcall
        &[0x0f, 0x01, 0xc2],       // vmlaunch
        &[0x0f, 0x01, 0xf8],       // swapgs
        &[0x0f, 0x01, 0x10],       // lgdt [rax]
        &[0x0f, 0x01, 0x18],       // lidt [rax]
        &[0x0f, 0x01, 0xf0],       // lmsw ax
        &[0x0f, 0x06],             // clts
        &[0x0f, 0x08],             // invd
        &[0x0f, 0x09],             // wbinvd
        &[0x0f, 0x01, 0x38],       // invlpg [rax]
        &[0x0f, 0x05],             // syscall
        &[0x0f, 0x07],             // sysret
        &[0x0f, 0x34],             // sysenter
        &[0x0f, 0x35],             // sysexit
        &[0x0f, 0x00, 0xd8],       // ltr ax
        &[0x0f, 0x00, 0xd0],       // lldt ax
        &[0x8e, 0xd0],             // mov ss, ax
        &[0x8e, 0xe8],             // mov gs, ax
        &[0x0f, 0xae, 0x28],       // xrstor [rax]
        &[0x0f, 0xc7, 0x18],       // xrstors [rax]
        &[0x0f, 0x01, 0xc8],       // monitor
        &[0x0f, 0x33],             // rdpmc
        &[0x6c],                   // insb
        &[0x6f],                   // outsd
        &[0xf3, 0x6e],             // rep outsb
        &[0xf3, 0xa4],             // rep movsb
        &[0x9d],                   // popf
        &[0xfb],                   // sti
        &[0xfa],                   // cli
        &[0xf4],                   // hlt
        &[0xcd, 0x08],             // int 8
        &[0xcf],                   // iret
    ];
    println!("seed {}", env.seed);
    interrupting_handler(libc::SIGALRM)?;
    let mut seen = BTreeMap::new();
    for round in 0..env.fewer(120) {
        let mut rng = Rng::new(env.seed.wrapping_mul(2000) + round);
        let mode = MODES[round as usize % MODES.len()];
        let mut code = Vec::new();
        while code.len() < 0x400 {
            if rng.below(3) == 0 {
                // mov eax, imm32: an operand for what follows.
                code.push(0xb8);
                let value = match rng.below(6) {
                    0 => rng.number() as u32,
                    1 => 0xc000_0080 + rng.below(8) as u32,
                    2 => 1 << rng.below(32),
                    3 => 0x8001_0033 ^ (1 << rng.below(32)),
                    4 => rng.below(at::SIZE as u64) as u32,
                    _ => rng.below(0x60) as u32,
                };
                code.extend(value.to_le_bytes());
                if rng.below(2) == 0 {
                    code.extend([0x89, 0xc1]); // mov ecx, eax
                }
            }
            code.extend(NASTY[rng.below(NASTY.len() as u64) as usize]);
        }
        let m = Machine::new(env, mode, &code)?;
        m.patch_regs(|r| {
            r.rcx = 0xc000_0080;
            r.rdx = 0x80;
            r.rsi = rng.below(at::SIZE as u64);
            r.rdi = at::MMIO;
        })?;
        // The handler goes on behind the fault, more or less.
        m.resume_at(at::CODE + rng.below(0x400));
        run_bounded(&m, &mut rng, 40, 3, &mut seen)
            .map_err(|e| Verdict::Fail(format!("round {round} of seed {}: {e:?}", env.seed)))?;
    }
    println!("{seen:?}");
    works(env)
}

/// Execution where no memory is.
fn code_in_device_memory(env: &Env) -> Outcome {
    for mode in [Mode::Protected, Mode::Paging32, Mode::Long] {
        let m = Machine::new(env, mode, &[])?;
        start_vcpu(&m.vcpu, mode, at::MMIO)?;
        match m.run()? {
            Exit::Internal { .. } | Exit::Shutdown | Exit::MmioRead { .. } => {}
            other => fail!("exit {other:x?} of code in device memory\n{}", m.describe()),
        }
    }
    // The reset vector of a machine that has no firmware.
    let m = Machine::bare(env, at::SIZE)?;
    match m.run()? {
        Exit::Internal { .. } | Exit::Shutdown | Exit::MmioRead { .. } => {}
        other => fail!(
            "exit {other:x?} at the reset vector without memory\n{}",
            m.describe()
        ),
    }
    works(env)
}

/// No memory at all.
fn no_memory(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    selftests::machine::set_special_pages(&vm)?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.run()?;
    match decode(&vcpu) {
        Exit::Internal { .. } | Exit::Shutdown | Exit::MmioRead { .. } => works(env),
        other => fail!("exit {other:x?} of a VM without memory"),
    }
}

/// Tables in device memory or nowhere: the guest fails alone.
fn tables_in_device_memory(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "ud2", "hlt");
    guest_code!(fault, ".code64", "mov al, [0x40000000]", "hlt");
    type Change = fn(&Machine) -> Outcome;
    let change: [(&str, Change); 4] = [
        ("CR3", |m| Ok(m.patch_sregs(|s| s.cr3 = at::MMIO)?)),
        ("IDT", |m| Ok(m.patch_sregs(|s| s.idt.base = at::MMIO)?)),
        ("GDT", |m| Ok(m.patch_sregs(|s| s.gdt.base = at::MMIO)?)),
        (
            "stack",
            |m| Ok(m.patch_regs(|r| r.rsp = at::MMIO + 0x1000)?),
        ),
    ];
    for (name, change) in change {
        for code in [code(), fault()] {
            let m = Machine::new(env, Mode::Long, code)?;
            m.mem.write(
                usize_of(at::PDPT) + 8,
                (at::MMIO + 0x3000) | pte::P | pte::W,
            );
            change(&m)?;
            let mut rng = Rng::new(env.seed);
            let mut seen = BTreeMap::new();
            interrupting_handler(libc::SIGALRM)?;
            let r = run_bounded(&m, &mut rng, 20, 2, &mut seen);
            r.map_err(|e| Verdict::Fail(format!("{name} in device memory: {e:?}")))?;
            println!("{name}: {seen:?}");
        }
    }
    works(env)
}

/// Faults for ever: an undefined instruction as the handler of undefined instructions, a handler that
/// returns to the fault, a page fault whose handler is on a page that faults.
fn endless_faults(env: &Env) -> Outcome {
    guest_code!(ud, ".code64", "ud2", "hlt");
    guest_code!(again, ".code64", "iretq");
    interrupting_handler(libc::SIGALRM)?;
    let mut seen = BTreeMap::new();
    let mut rng = Rng::new(env.seed);
    for variant in 0..3 {
        let m = Machine::new(env, Mode::Long, ud())?;
        match variant {
            0 => m.mem.write_bytes(usize_of(at::STUBS) + 6 * 16, ud()),
            1 => m.mem.write_bytes(usize_of(at::STUBS) + 6 * 16, again()),
            _ => m.mem.write(usize_of(at::PD), 0x20_0000 | pte::P | pte::PS),
        }
        run_bounded(&m, &mut rng, 20, 5, &mut seen)?;
    }
    println!("{seen:?}");
    works(env)
}

/// An alignment check whose delivery makes an alignment check, and so on: a processor that is left alone
/// with it never comes back (CVE-2015-5307).
fn endless_alignment_checks(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "mov eax, [{D} + 1]", "hlt"; D = at::DATA);
    interrupting_handler(libc::SIGALRM)?;
    let m = Machine::new(env, Mode::Protected, code())?;
    // The handler is on privilege level 3 as well, so that the stack stays what it is: misaligned.
    let code3 = segment(0x43, 11, 1, 0, 3, true);
    m.mem.write(usize_of(at::GDT) + 0x40, descriptor(&code3));
    set_gate(&m.mem, 17, at::CODE, 0x43, false);
    let gate = usize_of(at::IDT) + 17 * 8;
    m.mem.write(gate, m.mem.read::<u64>(gate) | (3 << 45));
    m.patch_sregs(|s| {
        s.cs = code3;
        let data = segment(sel::USER_DATA, 3, 1, 0, 3, true);
        (s.ss, s.ds, s.es) = (data, data, data);
        s.cr0 |= 1 << 18;
    })?;
    m.patch_regs(|r| {
        r.rsp = at::STACK - 3;
        r.rflags |= 1 << 18;
    })?;
    let mut seen = BTreeMap::new();
    run_bounded(&m, &mut Rng::new(env.seed), 10, 4, &mut seen)?;
    println!("{seen:?}");
    works(env)
}

/// A debug exception whose delivery makes a debug exception: a watchpoint where the frame is pushed, on a
/// stack that each delivery begins anew (CVE-2015-8104).
fn endless_debug_exceptions(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "mov byte ptr [{T}], 1", "hlt"; T = at::STACK - 0x100 - 8);
    guest_code!(handler, ".code64", "nop", "nop", "hlt");
    interrupting_handler(libc::SIGALRM)?;
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write(usize_of(at::TSS) + 36, at::STACK - 0x100);
    let gate = usize_of(at::IDT) + 16;
    m.mem.write(gate, m.mem.read::<u64>(gate) | (1 << 32));
    m.mem.write_bytes(usize_of(at::STUBS) + 16, handler());
    let mut d = m.vcpu.debugregs()?;
    d.db[0] = at::STACK - 0x100 - 8;
    d.dr7 = 0x9_0402; // G0, writes, 8 bytes
    m.vcpu.set_debugregs(&d)?;
    let mut seen = BTreeMap::new();
    run_bounded(&m, &mut Rng::new(env.seed), 10, 4, &mut seen)?;
    println!("{seen:?}");
    works(env)
}

/// A loop of the cheapest exits there are must still let signals in.
fn endless_exits(env: &Env) -> Outcome {
    guest_code!(cpuid, ".code64", "2: xor eax, eax", "cpuid", "jmp 2b");
    guest_code!(msr, ".code64", "2: mov ecx, 0x1b", "rdmsr", "jmp 2b");
    guest_code!(pause, ".code64", "2: pause", "jmp 2b");
    guest_code!(cr3, ".code64", "2: mov rax, cr3", "mov cr3, rax", "jmp 2b");
    guest_code!(bad, ".code64", "2: mov ecx, 0x12345678", "rdmsr", "jmp 2b");
    guest_code!(
        handler,
        ".code64",
        "add rsp, 8",
        "add qword ptr [rsp], 2",
        "iretq"
    );
    interrupting_handler(libc::SIGALRM)?;
    for (name, code) in [
        ("CPUID", cpuid()),
        ("RDMSR", msr()),
        ("PAUSE", pause()),
        ("MOV CR3", cr3()),
        ("RDMSR that faults", bad()),
    ] {
        let m = Machine::new(env, Mode::Long, code)?;
        m.mem.write_bytes(usize_of(at::STUBS) + 13 * 16, handler());
        interval_alarm(patient(3));
        for _ in 0..3 {
            let start = Instant::now();
            match m.vcpu.run() {
                Err(e) if e.errno == libc::EINTR => {}
                r => fail!("{name}: {r:?} {:x?}\n{}", decode(&m.vcpu), m.describe()),
            }
            let took = start.elapsed();
            ensure!(
                took < Duration::from_millis(patient(1000)),
                "{name}: the signal took {took:?}"
            );
        }
        interval_alarm(0);
    }
    works(env)
}

fn main() -> ExitCode {
    selftests::tap::main(
        "adversary",
        tests![
            code_in_device_memory,
            no_memory,
            tables_in_device_memory,
            endless_faults,
            endless_alignment_checks,
            endless_debug_exceptions,
            endless_exits,
            random_real,
            random_protected,
            random_paging32,
            random_pae,
            random_long,
            nasty_instructions,
        ],
    )
}
