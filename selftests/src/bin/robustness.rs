// SPDX-License-Identifier: GPL-2.0

//! Nonsense from userspace: random numbers, structures and states. Nothing may crash, hang or be
//! believed. The seed is printed and can be given (`--seed`), so that a failure repeats.

use kvm_bindings as kb;
use selftests::guest::at;
use selftests::host::{interrupting_handler, interval_alarm, patient, Rng};
use selftests::machine::{decode, Exit, Machine, Mode, MODES};
use selftests::mem::Mapping;
use selftests::sys::{self, unnamed};
use selftests::{ensure, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

guest_code!(halt, ".code32", "2: hlt", "jmp 2b");

/// The VM that a test left behind does not matter if a new one works.
fn works(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, halt())?;
    m.expect_hlt()
}

/// An address for an ioctl to use: none, bad, at the edge of what is mapped, or a buffer of garbage.
fn address(rng: &mut Rng, buffer: &Mapping) -> usize {
    match rng.below(8) {
        0 => 0,
        1 => rng.number() as usize,
        2 => 0xffff_8880_0000_0000 + rng.below(1 << 30) as usize,
        // The mapping ends in the middle of the structure.
        3 => buffer.addr() + 0x1000 - 1 - rng.below(64) as usize,
        4 => rng.below(300) as usize,
        _ => {
            let n = 1 + rng.below(512) as usize;
            let mut bytes = vec![0u8; n];
            rng.fill(&mut bytes);
            if rng.below(2) == 0 {
                // Small numbers look more like the real thing.
                for (i, b) in bytes.iter_mut().enumerate() {
                    if i % 4 != 0 {
                        *b = 0;
                    }
                }
            }
            buffer.write_bytes(0, &bytes);
            buffer.addr()
        }
    }
}

/// Whether random arguments would make this call do something that the test's end depends on.
fn leave_out(call: &sys::Ioctl) -> bool {
    // Memory slots over the test's own memory would let a garbage guest write to it.
    call.nr == sys::KVM_SET_USER_MEMORY_REGION.nr
}

fn random_ioctls(env: &Env) -> Outcome {
    println!("seed {}", env.seed);
    interrupting_handler(libc::SIGALRM)?;
    let mut rng = Rng::new(env.seed);
    let pages = Mapping::new(0x2000, false)?;
    // The page behind the buffer is not there.
    pages.protect(0x1000, 0x1000, libc::PROT_NONE)?;
    let mut succeeded = 0;
    for _ in 0..env.fewer(12) {
        let m = Machine::new(env, Mode::Protected, halt())?;
        interval_alarm(patient(10));
        for _ in 0..250 {
            let fd = [&m.kvm.fd, &m.vm.fd, &m.vcpu.fd][rng.below(3) as usize];
            let call = match rng.below(3) {
                0 => sys::ALL[rng.below(sys::ALL.len() as u64) as usize],
                1 => unnamed(
                    rng.below(2) == 0,
                    rng.below(2) == 0,
                    rng.below(256) as u8,
                    rng.below(600) as u16,
                ),
                // Right number and direction, another size.
                _ => {
                    let c = sys::ALL[rng.below(sys::ALL.len() as u64) as usize];
                    sys::Ioctl {
                        nr: c.nr ^ (1 << (16 + rng.below(14))),
                        name: "resized",
                    }
                }
            };
            if leave_out(&call) {
                continue;
            }
            let argument = address(&mut rng, &pages);
            match fd.ioctl(call, argument) {
                // A descriptor that something created.
                Ok(new) if new > 2 && creates(&call) => {
                    succeeded += 1;
                    // SAFETY: The kernel has just returned this descriptor to us.
                    unsafe { libc::close(new) };
                }
                Ok(_) => succeeded += 1,
                Err(_) => {}
            }
        }
        interval_alarm(0);
    }
    println!("{succeeded} calls succeeded");
    works(env)
}

fn creates(call: &sys::Ioctl) -> bool {
    [
        sys::KVM_CREATE_VM.nr,
        sys::KVM_CREATE_VCPU.nr,
        sys::KVM_GET_STATS_FD.nr,
    ]
    .contains(&call.nr)
}

/// Random slots: none, or only what was asked for, can be seen by the guest.
fn random_slots(env: &Env) -> Outcome {
    println!("seed {}", env.seed);
    let mut rng = Rng::new(env.seed ^ 0x510);
    let vm = env.open()?.create_vm()?;
    let memory = Mapping::new(1 << 20, false)?;
    let mut set = 0;
    for _ in 0..3000 {
        let pick = |rng: &mut Rng, usual: u64| match rng.below(6) {
            0 => rng.number(),
            1 => 0,
            2 => u64::MAX - rng.below(0x3000),
            3 => rng.below(1 << 40) & !0xfff,
            _ => usual,
        };
        let slot = if rng.below(5) == 0 {
            rng.number() as u32
        } else {
            rng.below(12) as u32
        };
        let flags = if rng.below(5) == 0 {
            rng.number() as u32
        } else {
            0
        };
        let usual = rng.below(64) << 14;
        let gpa = pick(&mut rng, usual);
        let usual = rng.below(20) << 12;
        let size = pick(&mut rng, usual);
        let hva = pick(&mut rng, memory.addr() as u64);
        if vm.set_memory(slot, flags, gpa, size, hva).is_ok() {
            set += 1;
        }
    }
    println!("{set} slots were set");
    ensure!(set > 100, "hardly any slot was accepted");
    drop(vm);
    works(env)
}

/// What a guest in a random state may end with.
fn sane(exit: &Exit) -> bool {
    match exit {
        Exit::FailEntry(_) => true, // the processor itself refused the state
        Exit::IrqWindow => false,   // no one asked
        Exit::Other(reason) => *reason == kb::KVM_EXIT_UNKNOWN || *reason == kb::KVM_EXIT_SET_TPR,
        _ => true,
    }
}

/// Runs for at most a few exits; each has to be sane.
fn run_some(m: &Machine) -> Result<usize, Verdict> {
    // Only here: a signal may end other calls as well (KVM_CREATE_VM for one).
    interval_alarm(patient(5));
    let r = run_some_exits(m);
    interval_alarm(0);
    r
}

fn run_some_exits(m: &Machine) -> Result<usize, Verdict> {
    for n in 0..4 {
        match m.vcpu.run() {
            Ok(_) => {
                let exit = decode(&m.vcpu);
                ensure!(sane(&exit), "exit {exit:x?}\n{}", m.describe());
                if !matches!(exit, Exit::Out { .. } | Exit::In { .. } | Exit::Hlt) {
                    return Ok(n);
                }
            }
            Err(e) if matches!(e.errno, libc::EINTR | libc::EFAULT | libc::EINVAL) => return Ok(n),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(4)
}

/// Flips bits in the special registers; what is accepted is run.
fn random_sregs(env: &Env) -> Outcome {
    println!("seed {}", env.seed);
    interrupting_handler(libc::SIGALRM)?;
    let mut rng = Rng::new(env.seed ^ 0x53);
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..env.fewer(150) as usize {
        let m = Machine::new(env, MODES[round % MODES.len()], halt())?;
        let good = m.vcpu.sregs()?;
        for _ in 0..4 {
            let mut s = good;
            for _ in 0..1 + rng.below(4) {
                let bit = 1u64 << rng.below(64);
                match rng.below(9) {
                    0 => s.cr0 ^= bit & 0xffff_ffff,
                    1 => s.cr4 ^= bit,
                    2 => s.efer ^= bit & 0xffff,
                    3 => s.cr3 ^= bit,
                    4 => s.cs.base ^= bit,
                    5 => {
                        let segments = [
                            &mut s.cs, &mut s.ds, &mut s.ss, &mut s.tr, &mut s.ldt, &mut s.es,
                        ];
                        let i = rng.below(6) as usize;
                        let seg = segments.into_iter().nth(i);
                        if let Some(seg) = seg {
                            seg.type_ ^= rng.below(16) as u8;
                            seg.l ^= rng.below(2) as u8;
                            seg.db ^= rng.below(2) as u8;
                            seg.dpl ^= rng.below(4) as u8;
                            seg.limit ^= rng.number() as u32;
                        }
                    }
                    6 => s.gdt.base ^= bit,
                    7 => s.interrupt_bitmap[rng.below(4) as usize] |= bit,
                    _ => s.apic_base ^= bit,
                }
            }
            match m.vcpu.set_sregs(&s) {
                Ok(()) => accepted += 1,
                Err(e) if e.errno == libc::EINVAL => refused += 1,
                Err(e) => return Err(e.into()),
            }
            let regs = kb::kvm_regs {
                rip: at::CODE,
                rsp: at::STACK,
                rflags: 2,
                ..Default::default()
            };
            m.vcpu.set_regs(&regs)?;
            run_some(&m)?;
        }
    }
    println!("{accepted} states accepted, {refused} refused");
    ensure!(accepted > 10 && refused > 10, "one side was hardly tested");
    works(env)
}

/// Random registers, events, debug registers, FPU state, XCR0, MSRs, CPUID: accepted or refused, then run.
fn random_state(env: &Env) -> Outcome {
    println!("seed {}", env.seed);
    interrupting_handler(libc::SIGALRM)?;
    let mut rng = Rng::new(env.seed ^ 0x57a7e);
    let mut accepted = 0;
    for round in 0..env.fewer(120) as usize {
        let m = Machine::bare(env, at::SIZE)?;
        let mut c = m.kvm.supported_cpuid()?;
        if rng.below(2) == 0 {
            for _ in 0..20 {
                let i = rng.below(c.nent.into()) as usize;
                let e = &mut c.list_mut()[i];
                let bit = 1 << rng.below(32);
                match rng.below(5) {
                    0 => e.function ^= bit,
                    1 => e.index ^= bit,
                    2 => e.eax ^= bit,
                    3 => e.ebx ^= bit,
                    _ => e.ecx ^= bit,
                }
            }
        }
        accepted += u32::from(m.vcpu.set_cpuid(&c).is_ok());
        // With a nonsensical CPUID, modes may be refused.
        if let Err(e) = m.start(MODES[round % MODES.len()], halt()) {
            ensure!(e.errno == libc::EINVAL, "{e}");
        }
        accepted += u32::from(random_one(&mut rng, &m)?);
        accepted += u32::from(random_one(&mut rng, &m)?);
        run_some(&m)?;
    }
    println!("{accepted} calls accepted");
    ensure!(accepted > 20, "hardly any state was accepted");
    works(env)
}

fn random_one(rng: &mut Rng, m: &Machine) -> Result<bool, Verdict> {
    let ok = match rng.below(8) {
        0 => {
            let mut r = m.vcpu.regs()?;
            r.rflags = rng.number();
            if rng.below(2) == 0 {
                r.rip = rng.number();
            }
            r.rsp = rng.number();
            m.vcpu.set_regs(&r).is_ok()
        }
        1 => {
            let mut e = m.vcpu.events()?;
            e.exception.injected = rng.below(2) as u8;
            e.exception.nr = rng.below(40) as u8;
            e.exception.has_error_code = rng.below(2) as u8;
            e.exception.error_code = rng.number() as u32;
            e.interrupt.injected = rng.below(2) as u8;
            e.interrupt.nr = rng.below(256) as u8;
            e.interrupt.soft = rng.below(2) as u8;
            e.interrupt.shadow = rng.below(4) as u8;
            e.nmi.injected = rng.below(2) as u8;
            e.nmi.pending = rng.below(2) as u8;
            e.nmi.masked = rng.below(2) as u8;
            e.flags = rng.below(16) as u32 & !kb::KVM_VCPUEVENT_VALID_SMM;
            m.vcpu.set_events(&e).is_ok()
        }
        2 => {
            let mut d = m.vcpu.debugregs()?;
            for r in &mut d.db {
                *r = rng.number();
            }
            d.dr6 = rng.number() & 0xffff_ffff;
            d.dr7 = rng.number() & 0xffff_ffff;
            m.vcpu.set_debugregs(&d).is_ok()
        }
        3 => {
            let mut x = m.vcpu.xsave()?;
            for _ in 0..20 {
                x.region[rng.below(1024) as usize] ^= rng.number() as u32;
            }
            m.vcpu.set_xsave(&x).is_ok()
        }
        4 => {
            let mut x = m.vcpu.xcrs()?;
            x.nr_xcrs = rng.below(20) as u32;
            for e in &mut x.xcrs {
                e.xcr = rng.below(3) as u32;
                e.value = rng.number() & 0x3ff;
            }
            m.vcpu.set_xcrs(&x).is_ok()
        }
        5 => {
            let list: Vec<(u32, u64)> = (0..20)
                .map(|_| {
                    let index = match rng.below(4) {
                        0 => rng.number() as u32,
                        1 => 0xc000_0080 + rng.below(0x10) as u32,
                        2 => rng.below(0x300) as u32,
                        _ => 0x480 + rng.below(0x20) as u32,
                    };
                    (index, rng.number())
                })
                .collect();
            let mut ok = false;
            for (index, value) in list {
                ok |= m.vcpu.set_msr(index, value)?;
            }
            ok
        }
        6 => {
            let mut f = m.vcpu.fpu()?;
            for x in &mut f.xmm {
                rng.fill(x);
            }
            f.fcw = rng.number() as u16;
            f.fsw = rng.number() as u16;
            f.mxcsr = rng.number() as u32;
            m.vcpu.set_fpu(&f).is_ok()
        }
        _ => m.vcpu.interrupt(rng.below(300) as u32).is_ok(),
    };
    Ok(ok)
}

/// The VMM scribbles in `kvm_run` between the runs: it is the VMM's page, but the kernel must not
/// trust it.
fn scribbled_run(env: &Env) -> Outcome {
    println!("seed {}", env.seed);
    guest_code!(
        code,
        ".code64",
        "2: in al, 0x80",
        "mov ebx, 0xd0000000",
        "mov rax, [rbx]",
        "mov [rbx + 8], rax",
        "mov esi, 0xa000",
        "mov ecx, 10",
        "mov dx, 0x80",
        "rep outsb",
        "mov edi, 0xa000",
        "mov ecx, 10",
        "rep insb",
        "jmp 2b",
    );
    interrupting_handler(libc::SIGALRM)?;
    let mut rng = Rng::new(env.seed ^ 0x5c);
    for _ in 0..env.fewer(15) {
        let m = Machine::new(env, Mode::Long, code())?;
        interval_alarm(patient(10));
        let size = m.vcpu.run_size();
        for _ in 0..40 {
            match m.vcpu.run() {
                Ok(_) => {}
                Err(e) if matches!(e.errno, libc::EINTR | libc::EINVAL) => {}
                Err(e) => return Err(e.into()),
            }
            let n = 1 + rng.below(40);
            for _ in 0..n {
                // Mostly the exit's own fields.
                let offset = if rng.below(4) == 0 {
                    rng.below(size as u64)
                } else {
                    rng.below(256)
                };
                let p = (m.vcpu.run_addr() + offset as usize) as *mut u8;
                // SAFETY: Within the mapping, of plain bytes.
                unsafe { p.write_volatile(rng.number() as u8) };
            }
            m.vcpu.set_immediate_exit(rng.below(2) as u8);
        }
        interval_alarm(0);
    }
    works(env)
}

/// The lists of variable length, at and over the end of mapped memory.
fn lists_at_the_edge(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, halt())?;
    let pages = Mapping::new(0x2000, false)?;
    pages.protect(0x1000, 0x1000, libc::PROT_NONE)?;
    let end = pages.addr() + 0x1000;
    // The header fits, the entries do not.
    for n in [1u32, 2, 100, 255, 256] {
        pages.write(0xff8, n);
        pages.write(0xffc, 0u32);
        for call in [
            sys::KVM_SET_MSRS,
            sys::KVM_GET_MSRS,
            sys::KVM_SET_CPUID2,
            sys::KVM_GET_CPUID2,
            sys::KVM_GET_SUPPORTED_CPUID,
            sys::KVM_GET_MSR_INDEX_LIST,
        ] {
            pages.write(0xff8, n);
            let fd = if matches!(
                call.name,
                "KVM_GET_SUPPORTED_CPUID" | "KVM_GET_MSR_INDEX_LIST"
            ) {
                &m.kvm.fd
            } else {
                &m.vcpu.fd
            };
            let r = fd.ioctl(call, end - 8);
            let errno = r.as_ref().err().map_or(0, |e| e.errno);
            ensure!(
                matches!(errno, libc::EFAULT | libc::E2BIG),
                "{} of {n} entries that are not there: {r:?}",
                call.name
            );
        }
    }
    // Half a header.
    for call in [sys::KVM_SET_MSRS, sys::KVM_GET_CPUID2, sys::KVM_SET_CPUID2] {
        match m.vcpu.fd.ioctl(call, end - 4) {
            Err(e) if e.errno == libc::EFAULT => {}
            r => fail!("{} with half a header: {r:?}", call.name),
        }
    }
    // Structures that end one byte too late.
    for call in sys::ALL {
        let size = ((call.nr >> 16) & 0x3fff) as usize;
        if size > 8 && size <= 4096 && call.nr & 0xff >= 0x81 {
            let r = m.vcpu.fd.ioctl(*call, end - size + 1);
            let errno = r.as_ref().err().map_or(0, |e| e.errno);
            ensure!(
                matches!(errno, libc::EFAULT | libc::EINVAL | libc::ENOTTY),
                "{} with an argument that is cut off: {r:?}",
                call.name
            );
        }
    }
    m.expect_hlt()
}

fn main() -> ExitCode {
    selftests::tap::main(
        "robustness",
        tests![
            random_ioctls,
            random_slots,
            random_sregs,
            random_state,
            scribbled_run,
            lists_at_the_edge,
        ],
    )
}
