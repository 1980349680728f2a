// SPDX-License-Identifier: GPL-2.0

//! Threads that call at the same time: nothing breaks, and what the API orders stays in order.

use selftests::guest::{at, usize_of, PORT};
use selftests::host::{gettid, interrupting_handler, kick, patient, sleep_ms, Rng};
use selftests::machine::{decode, start_vcpu, Exit, Machine, Mode};
use selftests::mem::{Mapping, PAGE};
use selftests::vm::Vcpu;
use selftests::{ensure, ensure_eq, fail, guest_code, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const SIG: i32 = libc::SIGUSR1;
const GPA: u64 = 0x100_0000;

guest_code!(count, ".code32", "2: inc dword ptr [{D}]", "jmp 2b"; D = at::DATA);

fn panicked() -> Verdict {
    Verdict::Fail("a thread panicked".into())
}

/// Whether the time of a test's loop is over.
fn over(start: Instant, ms: u64) -> bool {
    start.elapsed() > Duration::from_millis(patient(ms))
}

/// While one thread is in KVM_RUN, another's calls on the vCPU wait; both get their turns.
fn ioctls_while_running(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "mov eax, 0x11111111",
        "2: mov ecx, 2000",
        "3: loop 3b",
        "inc dword ptr [{D}]",
        "out {P}, al",
        "jmp 2b";
        D = at::DATA, P = PORT,
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let done = AtomicBool::new(false);
    let (m, done) = (&m, &done);
    std::thread::scope(|scope| -> Outcome {
        let runner = scope.spawn(move || -> Outcome {
            while !done.load(Ordering::SeqCst) {
                match m.run()? {
                    Exit::Out { port: PORT, .. } => {}
                    other => fail!("exit {other:x?}\n{}", m.describe()),
                }
            }
            Ok(())
        });
        let start = Instant::now();
        let mut calls = 0u32;
        let mut body = || -> Outcome {
            while !over(start, 300) {
                let r = m.vcpu.regs()?;
                ensure!(
                    r.rax == 0x1111_1111 || r.rip <= at::CODE + 5,
                    "EAX {:#x} at {:#x}",
                    r.rax,
                    r.rip
                );
                let s = m.vcpu.sregs()?;
                m.vcpu.set_sregs(&s)?;
                let f = m.vcpu.fpu()?;
                m.vcpu.set_fpu(&f)?;
                m.vcpu.msr(0x174)?;
                m.vcpu.events()?;
                calls += 1;
            }
            Ok(())
        };
        let r = body();
        done.store(true, Ordering::SeqCst);
        runner.join().unwrap_or(Err(panicked()))?;
        println!("{calls} rounds of calls, the guest counted {}", counted(m));
        ensure!(calls > 2 && counted(m) > 2, "one side starved");
        r
    })
}

fn counted(m: &Machine) -> u32 {
    m.mem.read(usize_of(at::DATA))
}

/// Two threads in KVM_RUN of one vCPU: one at a time, and the guest's count misses nothing.
fn two_threads_run(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "2: inc dword ptr [{D}]", "hlt", "jmp 2b"; D = at::DATA);
    let m = Machine::new(env, Mode::Protected, code())?;
    let m = &m;
    std::thread::scope(|scope| -> Outcome {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(move || -> Outcome {
                    for _ in 0..500 {
                        // The exit reason may be the other thread's already.
                        m.vcpu.run()?;
                    }
                    Ok(())
                })
            })
            .collect();
        for t in threads {
            t.join().unwrap_or(Err(panicked()))?;
        }
        Ok(())
    })?;
    ensure_eq!(counted(m), 1000, "count");
    Ok(())
}

/// A slot comes and goes under a guest that reads it: it is memory or a device, never anything else.
fn slots_change_while_running(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "2: mov eax, [{G}]",
        "mov ebx, [{G} + 0x3000]",
        "mov [{D}], eax",
        "mov [{D} + 4], ebx",
        "inc dword ptr [{D} + 8]",
        "jmp 2b";
        G = GPA, D = at::DATA,
    );
    interrupting_handler(SIG)?;
    let m = Machine::new(env, Mode::Protected, code())?;
    let pages = Mapping::new(4 * PAGE, false)?;
    pages.write(0, 0xaaaa_aaaau32);
    pages.write(0x3000, 0xbbbb_bbbbu32);
    let (done, tid) = (AtomicBool::new(false), AtomicI32::new(0));
    let (devices, memories) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| -> Outcome {
        let runner = scope.spawn(|| -> Outcome {
            tid.store(gettid(), Ordering::SeqCst);
            while !done.load(Ordering::SeqCst) {
                match m.vcpu.run() {
                    Err(e) if e.errno == libc::EINTR => {
                        let got: (u32, u32) = (
                            m.mem.read(usize_of(at::DATA)),
                            m.mem.read(usize_of(at::DATA) + 4),
                        );
                        ensure!(
                            matches!(got.0, 0 | 0xaaaa_aaaa | 0xdddd_dddd)
                                && matches!(got.1, 0 | 0xbbbb_bbbb | 0xdddd_dddd),
                            "the guest read {got:x?}"
                        );
                        memories.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(e) => return Err(e.into()),
                    Ok(_) => match decode(&m.vcpu) {
                        Exit::MmioRead { addr, len: 4 } if addr == GPA || addr == GPA + 0x3000 => {
                            devices.fetch_add(1, Ordering::SeqCst);
                            m.mmio_reply(&[0xdd; 4]);
                        }
                        other => fail!("exit {other:x?}\n{}", m.describe()),
                    },
                }
            }
            Ok(())
        });
        let start = Instant::now();
        let mut changes = 0;
        let mut body = || -> Outcome {
            while !over(start, 300) && !runner.is_finished() {
                m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
                if changes % 4 == 0 {
                    kick(tid.load(Ordering::SeqCst), SIG);
                    sleep_ms(2);
                }
                m.vm.set_memory(1, 0, 0, 0, 0)?;
                changes += 1;
                if changes % 4 == 1 {
                    sleep_ms(2);
                }
            }
            Ok(())
        };
        let r = body();
        done.store(true, Ordering::SeqCst);
        while !runner.is_finished() {
            kick(tid.load(Ordering::SeqCst), SIG);
            sleep_ms(1);
        }
        runner.join().unwrap_or(Err(panicked()))?;
        let (d, k) = (
            devices.load(Ordering::SeqCst),
            memories.load(Ordering::SeqCst),
        );
        println!("{changes} changes, {d} device reads, {k} kicks in memory");
        ensure!(changes > 20 && d > 0, "nothing was tested");
        r
    })
}

/// Two vCPUs of one VM fault the same pages in and add to the same words.
fn vcpus_share_memory(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "mov esi, 2",
        "4: mov edx, {G}",
        "mov ecx, 1024",
        "2: lock inc dword ptr [edx]",
        "add edx, 4096",
        "dec ecx",
        "jnz 2b",
        "dec esi",
        "jnz 4b",
        "hlt";
        G = GPA,
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let pages = Mapping::new(1024 * PAGE, false)?;
    pages.advise(0, pages.len(), libc::MADV_NOHUGEPAGE)?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    let mut vcpus: Vec<Vcpu> = Vec::new();
    for i in 1..4 {
        vcpus.push(m.vm.create_vcpu(i)?);
    }
    std::thread::scope(|scope| -> Outcome {
        let threads: Vec<_> = vcpus
            .iter()
            .map(|v| {
                scope.spawn(move || -> Outcome {
                    start_vcpu(v, Mode::Protected, at::CODE)?;
                    v.run()?;
                    ensure_eq!(decode(v), Exit::Hlt, "exit");
                    Ok(())
                })
            })
            .collect();
        m.expect_hlt()?;
        for t in threads {
            t.join().unwrap_or(Err(panicked()))?;
        }
        Ok(())
    })?;
    for i in 0..1024 {
        ensure_eq!(pages.read::<u32>(i * PAGE), 8, "word in page {i}");
    }
    Ok(())
}

/// Faults race with the pages' removal: the words only ever have values that someone put there.
fn faults_and_removals(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "4: mov edx, {G}",
        "mov ecx, 64",
        "2: mov eax, [edx]",
        "test eax, eax",
        "jz 3f",
        "cmp eax, 0x5aa55aa5",
        "jne 5f",
        "3: mov dword ptr [edx], 0x5aa55aa5",
        "add edx, 4096",
        "loop 2b",
        "inc dword ptr [{D}]",
        "jmp 4b",
        "5: hlt";
        G = GPA, D = at::DATA,
    );
    interrupting_handler(SIG)?;
    let m = Machine::new(env, Mode::Protected, code())?;
    let pages = Mapping::new(64 * PAGE, false)?;
    pages.advise(0, pages.len(), libc::MADV_NOHUGEPAGE)?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    let second = m.vm.create_vcpu(1)?;
    start_vcpu(&second, Mode::Protected, at::CODE)?;
    let done = AtomicBool::new(false);
    let tids = [AtomicI32::new(0), AtomicI32::new(0)];
    std::thread::scope(|scope| -> Outcome {
        let runners: Vec<_> = [&m.vcpu, &second]
            .into_iter()
            .zip(&tids)
            .map(|(v, tid)| {
                let done = &done;
                scope.spawn(move || -> Outcome {
                    tid.store(gettid(), Ordering::SeqCst);
                    while !done.load(Ordering::SeqCst) {
                        match v.run() {
                            Err(e) if e.errno == libc::EINTR => {}
                            Err(e) => return Err(e.into()),
                            Ok(_) => {
                                let rax = v.regs()?.rax;
                                fail!("the guest read {rax:#x}, exit {:x?}", decode(v));
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let start = Instant::now();
        let mut rng = Rng::new(env.seed);
        let mut removals = 0;
        while !over(start, 400) && runners.iter().all(|r| !r.is_finished()) {
            let first = rng.below(64) as usize;
            let n = 1 + rng.below(64 - first as u64) as usize;
            pages.advise(first * PAGE, n * PAGE, libc::MADV_DONTNEED)?;
            removals += 1;
            if removals % 8 == 0 {
                sleep_ms(1);
            }
        }
        done.store(true, Ordering::SeqCst);
        for (r, tid) in runners.into_iter().zip(&tids) {
            while !r.is_finished() {
                kick(tid.load(Ordering::SeqCst), SIG);
                sleep_ms(1);
            }
            r.join().unwrap_or(Err(panicked()))?;
        }
        println!("{removals} removals, {} rounds of the guests", counted(&m));
        ensure!(counted(&m) > 10 && removals > 20, "nothing was tested");
        Ok(())
    })
}

/// The VM's file is closed, and the vCPU's too, by another thread, while the guest runs.
fn close_while_running(env: &Env) -> Outcome {
    interrupting_handler(SIG)?;
    for close_vcpu in [false, true] {
        let Machine { vcpu, vm, kvm, mem } = Machine::new(env, Mode::Protected, count())?;
        let done = AtomicBool::new(false);
        let tid = AtomicI32::new(0);
        // SAFETY: A second descriptor, which is closed below while the call on it goes on.
        let dup = unsafe { libc::dup(vcpu.fd.0) };
        std::thread::scope(|scope| -> Outcome {
            let runner = scope.spawn(|| -> Outcome {
                tid.store(gettid(), Ordering::SeqCst);
                match sys::ioctl(dup, sys::KVM_RUN, 0) {
                    Err(e) if e.errno == libc::EINTR => Ok(()),
                    r => fail!("KVM_RUN: {r:?}"),
                }
            });
            while mem.read::<u32>(usize_of(at::DATA)) < 1000 && !runner.is_finished() {
                sleep_ms(1);
            }
            drop(vm);
            drop(kvm);
            if close_vcpu {
                // SAFETY: Our own descriptor.
                unsafe { libc::close(dup) };
                drop(vcpu);
            }
            let before: u32 = mem.read(usize_of(at::DATA));
            sleep_ms(5);
            let after: u32 = mem.read(usize_of(at::DATA));
            done.store(true, Ordering::SeqCst);
            while !runner.is_finished() {
                kick(tid.load(Ordering::SeqCst), SIG);
                sleep_ms(1);
            }
            runner.join().unwrap_or(Err(panicked()))?;
            ensure!(after > before, "the guest stopped counting at {before}");
            Ok(())
        })?;
        if !close_vcpu {
            // SAFETY: Our own descriptor.
            unsafe { libc::close(dup) };
        }
    }
    Ok(())
}

/// Four threads create the same vCPU: one gets it, the others get EEXIST.
fn create_vcpu_race(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    for id in 0..20usize {
        let won = AtomicU32::new(0);
        std::thread::scope(|scope| -> Outcome {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let (vm, won) = (&vm, &won);
                    scope.spawn(move || -> Outcome {
                        match vm.create_vcpu(id) {
                            Ok(v) => {
                                won.fetch_add(1, Ordering::SeqCst);
                                v.regs()?;
                                Ok(())
                            }
                            Err(e) if e.errno == libc::EEXIST => Ok(()),
                            Err(e) => Err(e.into()),
                        }
                    })
                })
                .collect();
            for t in threads {
                t.join().unwrap_or(Err(panicked()))?;
            }
            Ok(())
        })?;
        ensure_eq!(
            won.load(Ordering::SeqCst),
            1,
            "threads that created vCPU {id}"
        );
    }
    Ok(())
}

/// Threads that each have a VM of their own, all at once.
fn vms_in_threads(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "2: inc dword ptr [{D}]",
        "cpuid",
        "out {P}, al",
        "jmp 2b";
        D = at::DATA, P = PORT,
    );
    std::thread::scope(|scope| -> Outcome {
        let threads: Vec<_> = (0..6u32)
            .map(|_| {
                scope.spawn(move || -> Outcome {
                    for _ in 0..5 {
                        let m = Machine::new(env, Mode::Protected, code())?;
                        for n in 1..=60u32 {
                            m.expect_out(PORT)?;
                            ensure_eq!(counted(&m), n, "count");
                        }
                    }
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

/// NMIs from another thread reach a guest that runs.
fn nmi_from_another_thread(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "2: inc rbx", "jmp 2b");
    let m = Machine::new(env, Mode::Long, code())?;
    // In-tree KVM's KVM_NMI waits for the vCPU like any other call: a kick makes room for it.
    interrupting_handler(SIG)?;
    let tid = AtomicI32::new(0);
    let taken = AtomicU32::new(0);
    std::thread::scope(|scope| -> Outcome {
        let runner = scope.spawn(|| -> Outcome {
            tid.store(gettid(), Ordering::SeqCst);
            while taken.load(Ordering::SeqCst) < 20 {
                match m.vcpu.run() {
                    Err(e) if e.errno == libc::EINTR => std::thread::yield_now(),
                    Err(e) => return Err(e.into()),
                    Ok(_) => match decode(&m.vcpu) {
                        Exit::Out {
                            port: selftests::guest::PORT_EXCEPTION,
                            ..
                        } => {
                            ensure_eq!(m.record().vector, 2, "vector");
                            taken.fetch_add(1, Ordering::SeqCst);
                        }
                        other => fail!("exit {other:x?}\n{}", m.describe()),
                    },
                }
            }
            Ok(())
        });
        let sender = scope.spawn(|| -> Outcome {
            let start = Instant::now();
            while taken.load(Ordering::SeqCst) < 20 && !over(start, 5000) {
                m.vcpu.fd.ioctl(sys::KVM_NMI, 0)?;
                sleep_ms(1);
            }
            Ok(())
        });
        let start = Instant::now();
        while taken.load(Ordering::SeqCst) < 20 && !over(start, 5000) && !runner.is_finished() {
            kick(tid.load(Ordering::SeqCst), SIG);
            sleep_ms(1);
        }
        let n = taken.swap(1000, Ordering::SeqCst);
        while !runner.is_finished() || !sender.is_finished() {
            kick(tid.load(Ordering::SeqCst), SIG);
            sleep_ms(1);
        }
        runner.join().unwrap_or(Err(panicked()))?;
        sender.join().unwrap_or(Err(panicked()))?;
        ensure!(n >= 20, "{n} NMIs taken in 5 s");
        Ok(())
    })
}

fn main() -> ExitCode {
    selftests::tap::main(
        "concurrency",
        tests![
            ioctls_while_running,
            two_threads_run,
            slots_change_while_running,
            vcpus_share_memory,
            faults_and_removals,
            close_while_running,
            create_vcpu_race,
            vms_in_threads,
            nmi_from_another_thread,
        ],
    )
}
