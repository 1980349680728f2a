// SPDX-License-Identifier: GPL-2.0

//! State that processors have once and guests have each: FPU, debug registers, MSRs. Guests that share
//! a processor, and a guest that changes processors, keep theirs; so does the host.
//!
//! Each guest loads all registers with values of its own, then compares them for as long as it is let.

use selftests::guest::{at, pte, usize_of, PORT};
use selftests::host::{cpus, gettid, interrupting_handler, patient, pin, sleep_ms, Rng};
use selftests::machine::{cr, decode, start_vcpu, Exit, Machine, Mode};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

// What the guest's code finds at DATA.
/// 16 YMM (or XMM) registers as loaded, then as stored.
const VECTORS: usize = at::DATA as usize;
const STORED: usize = VECTORS + 0x200;
/// DR0 to DR3.
const DEBUG: usize = VECTORS + 0x400;
/// Pairs of MSR index and value, ended by an index of 0.
const MSRS: usize = VECTORS + 0x440;
/// How often the guest compared all.
const ROUNDS: usize = VECTORS + 0x600;
/// Not 0: the guest is to halt.
const STOP: usize = VECTORS + 0x608;
const LOAD: usize = 0x2000;
const STORE: usize = 0x2400;
const SIG: i32 = libc::SIGUSR1;

macro_rules! vectors {
    ($load:ident, $store:ident, $mov:literal, $reg:literal, $size:literal) => {
        guest_code!(
            $load,
            ".code64",
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            concat!($mov, " ", $reg, "\\n, [0xa000 + \\n * ", $size, "]"),
            ".endr",
            "ret",
        );
        guest_code!(
            $store,
            ".code64",
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            concat!($mov, " [0xa200 + \\n * ", $size, "], ", $reg, "\\n"),
            ".endr",
            "ret",
        );
    };
}
vectors!(load_sse, store_sse, "movups", "xmm", "16");
vectors!(load_avx, store_avx, "vmovups", "ymm", "32");

// AL tells what differed: 1 vectors, 2 debug registers, 3 an MSR (ECX), 4 CR2, 5 general registers,
// 6 a TSC that went back.
guest_code!(verify, ".code64",
    "mov eax, 0x2000",
    "call rax",
    "mov rax, [{DEBUG}]",
    "mov dr0, rax",
    "mov rax, [{DEBUG} + 8]",
    "mov dr1, rax",
    "mov rax, [{DEBUG} + 16]",
    "mov dr2, rax",
    "mov rax, [{DEBUG} + 24]",
    "mov dr3, rax",
    "mov cr2, rax",
    "mov ebx, {MSRS}",
    "2: mov ecx, [rbx]",
    "jrcxz 3f",
    "mov eax, [rbx + 8]",
    "mov edx, [rbx + 12]",
    "wrmsr",
    "add ebx, 16",
    "jmp 2b",
    "3:",
    "mov r10, [{DEBUG}]",
    "mov r11, [{DEBUG} + 8]",
    "xor r12d, r12d",
    // The loop.
    "4:",
    "mov eax, 0x2400",
    "call rax",
    "mov esi, {VECTORS}",
    "mov edi, {STORED}",
    "mov ecx, 64",
    "repe cmpsq",
    "mov al, 1",
    "jne 9f",
    "mov al, 2",
    "mov rdx, dr0",
    "cmp rdx, [{DEBUG}]",
    "jne 9f",
    "mov rdx, dr1",
    "cmp rdx, [{DEBUG} + 8]",
    "jne 9f",
    "mov rdx, dr2",
    "cmp rdx, [{DEBUG} + 16]",
    "jne 9f",
    "mov rdx, dr3",
    "cmp rdx, [{DEBUG} + 24]",
    "jne 9f",
    "mov ebx, {MSRS}",
    "5: mov ecx, [rbx]",
    "jrcxz 6f",
    "rdmsr",
    "cmp eax, [rbx + 8]",
    "jne 8f",
    "cmp edx, [rbx + 12]",
    "jne 8f",
    "add ebx, 16",
    "jmp 5b",
    "6:",
    "mov al, 4",
    "mov rdx, cr2",
    "cmp rdx, [{DEBUG} + 24]",
    "jne 9f",
    "mov al, 5",
    "cmp r10, [{DEBUG}]",
    "jne 9f",
    "cmp r11, [{DEBUG} + 8]",
    "jne 9f",
    "rdtsc",
    "shl rdx, 32",
    "or rdx, rax",
    "mov al, 6",
    "cmp rdx, r12",
    "jb 9f",
    "mov r12, rdx",
    "inc dword ptr [{ROUNDS}]",
    "cmp dword ptr [{STOP}], 0",
    "je 4b",
    "hlt",
    "jmp 4b",
    "8: mov al, 3",
    "9: out {P}, al",
    "hlt";
    VECTORS = const_of(VECTORS), STORED = const_of(STORED), DEBUG = const_of(DEBUG),
    MSRS = const_of(MSRS), ROUNDS = const_of(ROUNDS), STOP = const_of(STOP), P = PORT,
);

const fn const_of(v: usize) -> u32 {
    v as u32
}

/// A guest that is about to verify values made from `seed`.
fn verifier(env: &Env, seed: u64) -> Result<Machine, Verdict> {
    let m = Machine::new(env, Mode::Long, verify())?;
    let c = m.vcpu.cpuid()?;
    let avx = c.find(1, 0).is_some_and(|e| (e.ecx >> 28) & 1 == 1);
    if avx {
        m.patch_sregs(|s| s.cr4 |= cr::OSXSAVE)?;
        let mut x = m.vcpu.xcrs()?;
        x.xcrs[0].value = 7;
        m.vcpu.set_xcrs(&x)?;
    }
    m.mem
        .write_bytes(LOAD, if avx { load_avx() } else { load_sse() });
    m.mem
        .write_bytes(STORE, if avx { store_avx() } else { store_sse() });
    let mut rng = Rng::new(seed);
    for i in 0..if avx { 64 } else { 32 } {
        m.mem.write(VECTORS + i * 8, rng.number());
    }
    for i in 0..4 {
        m.mem.write(DEBUG + i * 8, rng.number() & 0x7fff_ffff_ffff);
    }
    let rdtscp = c
        .find(0x8000_0001, 0)
        .is_some_and(|e| (e.edx >> 27) & 1 == 1);
    // SYSENTER_*, STAR, LSTAR, CSTAR, FMASK, FS_BASE, KERNEL_GS_BASE.
    let msrs: [u64; 9] = [
        0x174,
        0x175,
        0x176,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
        0xc000_0100,
        0xc000_0102,
    ];
    for (i, index) in msrs.iter().enumerate() {
        let mask = if *index == 0xc000_0084 || *index == 0x174 {
            0xffff
        } else {
            0x7fff_ffff_ffff
        };
        m.mem.write(MSRS + i * 16, *index);
        m.mem.write(MSRS + i * 16 + 8, rng.number() & mask);
    }
    let mut end = MSRS + msrs.len() * 16;
    if rdtscp {
        m.mem.write(end, 0xc000_0103u64);
        m.mem.write(end + 8, rng.number() & 0xffff_ffff);
        end += 16;
    }
    m.mem.write(end, 0u64);
    Ok(m)
}

fn what_differs(m: &Machine, code: u8) -> Verdict {
    let name = match code {
        1 => "vector registers",
        2 => "debug registers",
        3 => "MSR",
        4 => "CR2",
        5 => "general registers",
        6 => "TSC, which went back",
        _ => "?",
    };
    let msr = m.vcpu.regs().map_or(0, |r| r.rcx);
    Verdict::Fail(format!(
        "a guest found its {name} changed (RCX {msr:#x})\n{}",
        m.describe()
    ))
}

/// Runs a verifier until its STOP flag makes it halt. EINTR is fine.
fn run_to_stop(m: &Machine) -> Outcome {
    loop {
        match m.vcpu.run() {
            Err(e) if e.errno == libc::EINTR => {}
            Err(e) => return Err(e.into()),
            Ok(_) => match decode(&m.vcpu) {
                Exit::Hlt => return Ok(()),
                Exit::Out {
                    port: PORT, data, ..
                } => return Err(what_differs(m, data[0])),
                other => fail!("exit {other:x?}\n{}", m.describe()),
            },
        }
    }
}

/// How often this thread was switched away from against its will.
fn preemptions() -> i64 {
    // SAFETY: A zeroed structure is a valid one, which the call fills.
    unsafe {
        let mut u: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &mut u);
        u.ru_nivcsw
    }
}

/// Two VMs take turns on one processor, preempted at any instruction.
fn two_vms_one_cpu(env: &Env) -> Outcome {
    let cpu = cpus()[0];
    let ready = AtomicI32::new(0);
    let counts = std::thread::scope(|scope| -> Result<Vec<(u32, i64)>, Verdict> {
        let threads: Vec<_> = [11u64, 22]
            .into_iter()
            .map(|seed| {
                let ready = &ready;
                scope.spawn(move || -> Result<(u32, i64), Verdict> {
                    pin(0, cpu)?;
                    let m = verifier(env, seed)?;
                    ready.fetch_add(1, Ordering::SeqCst);
                    let before = preemptions();
                    let stopper = StopAfter::new(&m, 400);
                    let r = run_to_stop(&m);
                    drop(stopper);
                    r?;
                    Ok((m.mem.read(ROUNDS), preemptions() - before))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or(Err(panicked())))
            .collect()
    })?;
    for (rounds, switches) in counts {
        println!("{rounds} rounds, preempted {switches} times");
        ensure!(rounds > 50, "a guest compared {rounds} times only");
        ensure!(
            switches > 5,
            "preempted {switches} times only: nothing was tested"
        );
    }
    Ok(())
}

fn panicked() -> Verdict {
    Verdict::Fail("a thread panicked".into())
}

/// Sets a guest's STOP flag when its time is over.
struct StopAfter {
    thread: Option<std::thread::JoinHandle<()>>,
}

impl StopAfter {
    fn new(m: &Machine, ms: u64) -> Self {
        let flag = m.mem.addr() + STOP;
        let thread = std::thread::spawn(move || {
            sleep_ms(patient(ms));
            // SAFETY: The guard joins this thread before the machine goes.
            unsafe { (flag as *mut u32).write_volatile(1) };
        });
        StopAfter {
            thread: Some(thread),
        }
    }
}

impl Drop for StopAfter {
    fn drop(&mut self) {
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

/// Two vCPUs of two VMs run by one thread in turns: no preemption, only exits.
fn two_vms_one_thread(env: &Env) -> Outcome {
    interrupting_handler(libc::SIGALRM)?;
    let (a, b) = (verifier(env, 33)?, verifier(env, 44)?);
    for m in [&a, &b] {
        m.mem.write(STOP, 1u32);
    }
    for round in 0..200 {
        for m in [&a, &b] {
            run_to_stop(m)?;
            ensure_eq!(m.mem.read::<u32>(ROUNDS), round + 1, "rounds");
        }
    }
    Ok(())
}

/// The same with four VMs and signals in between.
fn four_vms_with_signals(env: &Env) -> Outcome {
    interrupting_handler(libc::SIGALRM)?;
    let machines: Result<Vec<_>, _> = (0..4).map(|i| verifier(env, 100 + i)).collect();
    let machines = machines?;
    // Long enough that a guest gets something done, on a slow kernel too.
    selftests::host::interval_alarm(selftests::host::patient(1));
    for turn in 0..80 {
        let m = &machines[turn % 4];
        match m.vcpu.run() {
            Err(e) if e.errno == libc::EINTR => {}
            Err(e) => return Err(e.into()),
            Ok(_) => match decode(&m.vcpu) {
                Exit::Out { data, .. } => return Err(what_differs(m, data[0])),
                other => fail!("exit {other:x?}\n{}", m.describe()),
            },
        }
    }
    selftests::host::interval_alarm(0);
    for (i, m) in machines.iter().enumerate() {
        let rounds: u32 = m.mem.read(ROUNDS);
        ensure!(rounds > 5, "guest {i} compared {rounds} times only");
    }
    Ok(())
}

/// Another thread moves a running vCPU between two processors.
fn moved_between_cpus(env: &Env) -> Outcome {
    let cpus = cpus();
    if cpus.len() < 2 {
        skip!("one processor only");
    }
    let tid = AtomicI32::new(0);
    let done = AtomicBool::new(false);
    let moves = AtomicUsize::new(0);
    std::thread::scope(|scope| -> Outcome {
        let vcpu = scope.spawn(|| -> Result<u32, Verdict> {
            let m = verifier(env, 55)?;
            let other = verifier(env, 66)?;
            tid.store(gettid(), Ordering::SeqCst);
            let stopper = StopAfter::new(&m, 600);
            let r = run_to_stop(&m);
            drop(stopper);
            r?;
            // The other one was loaded nowhere yet, and runs where the first ended.
            other.mem.write(STOP, 1u32);
            run_to_stop(&other)?;
            done.store(true, Ordering::SeqCst);
            Ok(m.mem.read(ROUNDS))
        });
        let mover = scope.spawn(|| -> Outcome {
            while tid.load(Ordering::SeqCst) == 0 && !done.load(Ordering::SeqCst) {
                sleep_ms(1);
            }
            let mut i = 0;
            while !done.load(Ordering::SeqCst) {
                i += 1;
                if pin(tid.load(Ordering::SeqCst), cpus[i % 2]).is_ok() {
                    moves.fetch_add(1, Ordering::SeqCst);
                }
                sleep_ms(2);
            }
            Ok(())
        });
        let r = vcpu.join().unwrap_or(Err(panicked()));
        done.store(true, Ordering::SeqCst);
        let _ = mover.join();
        let rounds = r?;
        println!(
            "{rounds} rounds, moved {} times",
            moves.load(Ordering::SeqCst)
        );
        ensure!(rounds > 50, "the guest compared {rounds} times only");
        ensure!(
            moves.load(Ordering::SeqCst) > 20,
            "too few moves: nothing was tested"
        );
        Ok(())
    })
}

/// Two vCPUs change places between two processors, so that each takes over where the other's state lay.
fn swapped_between_cpus(env: &Env) -> Outcome {
    let cpus = cpus();
    if cpus.len() < 2 {
        skip!("one processor only");
    }
    std::thread::scope(|scope| -> Outcome {
        let threads: Vec<_> = (0..2usize)
            .map(|i| {
                let cpus = &cpus;
                scope.spawn(move || -> Outcome {
                    interrupting_handler(SIG)?;
                    let m = verifier(env, 77 + i as u64)?;
                    m.mem.write(STOP, 1u32);
                    for round in 0..150 {
                        pin(0, cpus[(i + round) % 2])?;
                        run_to_stop(&m)?;
                    }
                    ensure_eq!(m.mem.read::<u32>(ROUNDS), 150, "rounds");
                    Ok(())
                })
            })
            .collect();
        for t in threads {
            t.join().unwrap_or(Err(panicked()))?;
        }
        Ok(())
    })
}

/// A vCPU that one thread began is continued by another, on another processor if there is one.
fn handed_to_another_thread(env: &Env) -> Outcome {
    let cpus = cpus();
    let m = verifier(env, 99)?;
    m.mem.write(STOP, 1u32);
    let m = &m;
    for round in 0..40 {
        std::thread::scope(|scope| -> Outcome {
            let cpu = cpus[round % cpus.len()];
            let t = scope.spawn(move || -> Outcome {
                pin(0, cpu)?;
                run_to_stop(m)
            });
            t.join().unwrap_or(Err(panicked()))
        })?;
    }
    ensure_eq!(m.mem.read::<u32>(ROUNDS), 40, "rounds");
    Ok(())
}

/// The VMM's own vector registers, flags and thread pointer survive KVM_RUN.
fn host_registers(env: &Env) -> Outcome {
    let m = verifier(env, 123)?;
    m.mem.write(STOP, 1u32);
    // SAFETY: Every processor with VMX has CPUID.
    let avx = (unsafe { core::arch::x86_64::__cpuid(1) }.ecx >> 28) & 1 == 1;
    for round in 0..30u64 {
        let mut values = [[0u64; 4]; 4];
        let mut rng = Rng::new(round + 7);
        for v in values.iter_mut().flatten() {
            *v = rng.number();
        }
        let mut after = [[0u64; 4]; 4];
        let ret: i64;
        // SAFETY: Loads registers that are declared as clobbered, makes the system call, stores them.
        unsafe {
            if avx {
                core::arch::asm!(
                    "vmovups ymm0, [r12]",
                    "vmovups ymm5, [r12 + 32]",
                    "vmovups ymm10, [r12 + 64]",
                    "vmovups ymm15, [r12 + 96]",
                    "syscall",
                    "vmovups [r13], ymm0",
                    "vmovups [r13 + 32], ymm5",
                    "vmovups [r13 + 64], ymm10",
                    "vmovups [r13 + 96], ymm15",
                    inout("rax") libc::SYS_ioctl => ret,
                    in("rdi") m.vcpu.fd.0 as i64,
                    in("rsi") sys::KVM_RUN.nr,
                    in("rdx") 0,
                    in("r12") values.as_ptr(),
                    in("r13") after.as_mut_ptr(),
                    out("rcx") _, out("r11") _,
                    out("xmm0") _, out("xmm5") _, out("xmm10") _, out("xmm15") _,
                );
            } else {
                core::arch::asm!(
                    "movups xmm0, [r12]",
                    "movups xmm5, [r12 + 32]",
                    "movups xmm10, [r12 + 64]",
                    "movups xmm15, [r12 + 96]",
                    "syscall",
                    "movups [r13], xmm0",
                    "movups [r13 + 32], xmm5",
                    "movups [r13 + 64], xmm10",
                    "movups [r13 + 96], xmm15",
                    inout("rax") libc::SYS_ioctl => ret,
                    in("rdi") m.vcpu.fd.0 as i64,
                    in("rsi") sys::KVM_RUN.nr,
                    in("rdx") 0,
                    in("r12") values.as_ptr(),
                    in("r13") after.as_mut_ptr(),
                    out("rcx") _, out("r11") _,
                    out("xmm0") _, out("xmm5") _, out("xmm10") _, out("xmm15") _,
                );
                for (a, v) in after.iter_mut().zip(&values) {
                    a[2..].copy_from_slice(&v[2..]);
                }
            }
        }
        ensure_eq!(ret, 0, "KVM_RUN");
        ensure_eq!(decode(&m.vcpu), Exit::Hlt, "exit");
        ensure_eq!(after, values, "the VMM's vector registers in round {round}");
    }
    Ok(())
}

/// What is read and written from outside meets what the guest has, while it is switched out.
fn state_after_preemption(env: &Env) -> Outcome {
    let m = verifier(env, 321)?;
    m.mem.write(STOP, 1u32);
    run_to_stop(&m)?;
    // Another guest dirties the registers of this processor.
    let other = verifier(env, 654)?;
    other.mem.write(STOP, 1u32);
    run_to_stop(&other)?;
    let f = m.vcpu.fpu()?;
    let avx_stride = if m.vcpu.xcrs()?.xcrs[0].value & 4 != 0 {
        32
    } else {
        16
    };
    for i in 0..16 {
        let want: [u8; 16] = m.mem.read(VECTORS + i * avx_stride);
        ensure_eq!(f.xmm[i], want, "XMM{i} for the host");
    }
    let d = m.vcpu.debugregs()?;
    for i in 0..4 {
        ensure_eq!(
            d.db[i],
            m.mem.read::<u64>(DEBUG + i * 8),
            "DR{i} for the host"
        );
    }
    let mut entry = MSRS;
    while m.mem.read::<u64>(entry) != 0 {
        let index = m.mem.read::<u32>(entry);
        let value = m.vcpu.msr(index)?;
        ensure_eq!(
            value,
            Some(m.mem.read::<u64>(entry + 8)),
            "MSR {index:#x} for the host"
        );
        entry += 16;
    }
    run_to_stop(&m)?;
    Ok(())
}

// Reads linear address 4 MiB over and over; what it is depends on who reads.
guest_code!(
    peek,
    ".code64",
    "2: mov eax, [0x400000]",
    "mov ebx, [0x400ffc]",
    "hlt",
    "jmp 2b",
);

/// Points the page at 4 MiB at `page`, by tables at `tables`; CR3 is `tables`.
fn map_page(m: &Machine, tables: u64, page: u64) {
    let bits = pte::P | pte::W;
    let (pdpt, pd, pt) = (tables + 0x1000, tables + 0x2000, tables + 0x3000);
    for (from, to) in [(at::PML4, tables), (at::PDPT, pdpt), (at::PD, pd)] {
        let copy = m.mem.read_bytes(usize_of(from), 0x1000);
        m.mem.write_bytes(usize_of(to), &copy);
    }
    m.mem.write(usize_of(tables), pdpt | bits);
    m.mem.write(usize_of(pdpt), pd | bits);
    m.mem.write(usize_of(pd) + 16, pt | bits);
    m.mem.write(usize_of(pt), page | bits);
}

/// The TLB is one for all: two vCPUs of a VM with tables of their own, and two VMs with the same
/// addresses, each see what is theirs.
fn translations(env: &Env) -> Outcome {
    let machines: Result<Vec<_>, _> = (0..3)
        .map(|_| Machine::new(env, Mode::Long, peek()))
        .collect();
    let machines = machines?;
    let mut vcpus = Vec::new();
    for (i, m) in machines.iter().enumerate() {
        let second = m.vm.create_vcpu(1)?;
        second.set_cpuid(&*m.kvm.supported_cpuid()?)?;
        start_vcpu(&second, Mode::Long, at::CODE)?;
        for (j, vcpu) in [None, Some(second)].into_iter().enumerate() {
            let (tables, page) = (0x30000 + j as u64 * 0x8000, 0x50000 + j as u64 * 0x1000);
            map_page(m, tables, page);
            let value = 0x1000 + i as u32 * 0x10 + j as u32;
            m.mem.write(usize_of(page), value);
            m.mem.write(usize_of(page) + 0xffc, !value);
            let v = vcpu.as_ref().unwrap_or(&m.vcpu);
            let mut s = v.sregs()?;
            s.cr3 = tables;
            v.set_sregs(&s)?;
            vcpus.push((i, vcpu, value));
        }
    }
    for round in 0..100 {
        for (i, vcpu, value) in &vcpus {
            let v = vcpu.as_ref().unwrap_or(&machines[*i].vcpu);
            v.run()?;
            ensure_eq!(decode(v), Exit::Hlt, "exit in round {round}");
            let r = v.regs()?;
            let got = (r.rax as u32, r.rbx as u32);
            ensure_eq!(got, (*value, !value), "what VM {i} read in round {round}");
        }
    }
    Ok(())
}

/// The check can fail: a guest whose registers the host changes must notice.
fn check_of_the_check(env: &Env) -> Outcome {
    type Change = fn(&Machine) -> Outcome;
    let changes: [(u8, Change); 3] = [
        (1, |m| {
            let mut f = m.vcpu.fpu()?;
            f.xmm[9][3] ^= 1;
            Ok(m.vcpu.set_fpu(&f)?)
        }),
        (2, |m| {
            let mut d = m.vcpu.debugregs()?;
            d.db[2] ^= 1;
            Ok(m.vcpu.set_debugregs(&d)?)
        }),
        (3, |m| {
            ensure!(m.vcpu.set_msr(0xc000_0102, 0x1234)?, "KERNEL_GS_BASE");
            Ok(())
        }),
    ];
    for (code, change) in changes {
        let m = verifier(env, 1)?;
        m.mem.write(STOP, 1u32);
        run_to_stop(&m)?;
        change(&m)?;
        m.expect(&Exit::Out {
            port: PORT,
            size: 1,
            data: vec![code],
        })?;
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "isolation",
        tests![
            check_of_the_check,
            translations,
            two_vms_one_thread,
            two_vms_one_cpu,
            four_vms_with_signals,
            moved_between_cpus,
            swapped_between_cpus,
            handed_to_another_thread,
            host_registers,
            state_after_preemption,
        ],
    )
}
