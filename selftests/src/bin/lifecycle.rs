// SPDX-License-Identifier: GPL-2.0

//! Beginnings and ends: VMs that are killed, closed in any order, made and destroyed a thousand times.

use selftests::guest::{at, usize_of};
use selftests::host::{meminfo, open_files, patient, sleep_ms, system_files};
use selftests::machine::{set_special_pages, start_vcpu, Exit, Machine, Mode};
use selftests::mem::{Mapping, PAGE};
use selftests::vm::Fd;
use selftests::{ensure, ensure_eq, fail, guest_code, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

guest_code!(count, ".code32", "2: inc dword ptr [{D}]", "jmp 2b"; D = at::DATA);
guest_code!(halt, ".code32", "2: inc dword ptr [{D}]", "hlt", "jmp 2b"; D = at::DATA);

/// A fresh VM works.
fn works(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, halt())?;
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read::<u32>(usize_of(at::DATA)),
        1,
        "count of a fresh guest"
    );
    Ok(())
}

/// Forks a VMM whose `vcpus` guests count in shared memory for ever; waits until they do.
fn running_vmm(env: &Env, vcpus: usize) -> Result<i32, Verdict> {
    let shared = Mapping::new(at::SIZE, true)?;
    // SAFETY: The child builds its own VM and never returns.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let run = || -> Outcome {
            let kvm = env.open()?;
            let vm = kvm.create_vm()?;
            set_special_pages(&vm)?;
            vm.set_memory(0, 0, 0, shared.len() as u64, shared.addr() as u64)?;
            selftests::guest::write_gdt(&shared);
            shared.write_bytes(usize_of(at::CODE), count());
            std::thread::scope(|scope| {
                for i in 0..vcpus {
                    let vcpu = vm.create_vcpu(i)?;
                    start_vcpu(&vcpu, Mode::Protected, at::CODE)?;
                    scope.spawn(move || loop {
                        if let Err(e) = vcpu.run() {
                            println!("{e}");
                        }
                    });
                }
                Ok(())
            })
        };
        println!("{:?}", run());
        // SAFETY: Ends the child.
        unsafe { libc::_exit(1) };
    }
    for _ in 0..patient(3000) {
        if shared.read::<u32>(usize_of(at::DATA)) > 1000 {
            return Ok(pid);
        }
        sleep_ms(1);
    }
    kill_and_reap(pid, libc::SIGKILL)?;
    fail!("the guest of the child did not begin to count within 3 s")
}

fn kill_and_reap(pid: i32, signal: i32) -> Result<i32, Verdict> {
    // SAFETY: A signal to our own child.
    unsafe { libc::kill(pid, signal) };
    let deadline = std::time::Instant::now() + std::time::Duration::from_millis(patient(5000));
    match selftests::tap::wait_until(pid, deadline) {
        Some(status) => Ok(status),
        None => fail!("the VMM did not end within 5 s of signal {signal}"),
    }
}

fn killed(env: &Env) -> Outcome {
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGABRT, libc::SIGKILL] {
        let pid = running_vmm(env, 1)?;
        let status = kill_and_reap(pid, signal)?;
        ensure!(libc::WIFSIGNALED(status), "wait status {status:#x}");
        ensure_eq!(libc::WTERMSIG(status), signal, "signal that ended the VMM");
        works(env)?;
    }
    Ok(())
}

fn killed_with_threads(env: &Env) -> Outcome {
    for _ in 0..3 {
        let pid = running_vmm(env, 3)?;
        kill_and_reap(pid, libc::SIGKILL)?;
        works(env)?;
    }
    Ok(())
}

/// The VMM's main thread ends the process while a vCPU's thread is in the guest.
fn exit_group(env: &Env) -> Outcome {
    for _ in 0..5 {
        // SAFETY: The child builds its own VM and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let run = || -> Outcome {
                let m = Machine::new(env, Mode::Protected, count())?;
                let address = m.mem.addr() + usize_of(at::DATA);
                std::thread::spawn(move || {
                    let _ = m.vcpu.run();
                });
                // SAFETY: The thread keeps the machine until the process ends.
                while unsafe { (address as *const u32).read_volatile() } < 1000 {
                    sleep_ms(1);
                }
                Ok(())
            };
            let ok = run().is_ok();
            // SAFETY: Ends the child.
            unsafe { libc::_exit(if ok { 17 } else { 1 }) };
        }
        let deadline = std::time::Instant::now() + std::time::Duration::from_millis(patient(5000));
        let status = selftests::tap::wait_until(pid, deadline);
        if status.is_none() {
            kill_and_reap(pid, libc::SIGKILL)?;
        }
        ensure_eq!(status, Some(17 << 8), "wait status of the VMM");
        works(env)?;
    }
    Ok(())
}

/// The descriptors are close-on-exec: another program does not inherit the VM.
fn exec(env: &Env) -> Outcome {
    let before = system_files();
    // SAFETY: The child builds its own VM and becomes another program.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let Ok(m) = Machine::new(env, Mode::Protected, halt()) else {
            // SAFETY: Ends the child.
            unsafe { libc::_exit(3) }
        };
        let _ = m.run();
        // This very program with --list: it ends at once.
        let path = c"/proc/self/exe";
        let args = [path.as_ptr(), c"--list".as_ptr(), std::ptr::null()];
        // SAFETY: Strings with their terminators, and an array that ends with a null pointer.
        unsafe {
            libc::close(1);
            libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
            libc::execv(path.as_ptr(), args.as_ptr());
            libc::_exit(4);
        }
    }
    let mut status = 0;
    // SAFETY: `status` lives through the call.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    ensure_eq!(status, 0, "wait status of the program that took over");
    println!(
        "open files of the system: {before:?}, then {:?}",
        system_files()
    );
    works(env)
}

/// A vCPU keeps its VM alive: the files can be closed in any order.
fn close_orders(env: &Env) -> Outcome {
    for order in 0..6 {
        let m = Machine::new(env, Mode::Protected, halt())?;
        m.expect_hlt()?;
        let Machine { vcpu, vm, kvm, mem } = m;
        let check = |n: u32| -> Outcome {
            ensure_eq!(vcpu.run()?, kvm_bindings::KVM_EXIT_HLT, "exit reason");
            ensure_eq!(mem.read::<u32>(usize_of(at::DATA)), n, "count");
            Ok(())
        };
        match order {
            0 => {
                drop(vm);
                check(2)?;
                drop(kvm);
                check(3)?;
            }
            1 => {
                drop(kvm);
                drop(vm);
                check(2)?;
            }
            2 => {
                drop(vcpu);
                drop(kvm);
                drop(vm);
            }
            3 => {
                drop(vcpu);
                let other = vm.create_vcpu(1)?;
                drop(vm);
                start_vcpu(&other, Mode::Protected, at::CODE)?;
                ensure_eq!(
                    other.run()?,
                    kvm_bindings::KVM_EXIT_HLT,
                    "exit of another vCPU"
                );
            }
            4 => {
                // SAFETY: A second descriptor of the same file.
                let dup = Fd(unsafe { libc::dup(vcpu.fd.0) });
                drop(vm);
                drop(vcpu);
                dup.ioctl(sys::KVM_RUN, 0)?;
                ensure_eq!(mem.read::<u32>(usize_of(at::DATA)), 2, "count");
            }
            _ => {
                drop(mem);
                drop(vm);
                drop(vcpu);
            }
        }
    }
    works(env)
}

/// `kvm_run` stays mapped when the files are closed.
fn mapping_outlives_files(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, halt())?;
    m.expect_hlt()?;
    // SAFETY: A new mapping at an address that the kernel chooses disturbs nothing.
    let p = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let size = m.vcpu.run_size();
        libc::mmap(
            std::ptr::null_mut(),
            size,
            prot,
            libc::MAP_SHARED,
            m.vcpu.fd.0,
            0,
        )
    };
    ensure!(p != libc::MAP_FAILED, "mmap");
    let size = m.vcpu.run_size();
    drop(m);
    let run = p.cast::<kvm_bindings::kvm_run>();
    // SAFETY: The mapping is our own, and as large as the API said.
    unsafe {
        ensure_eq!(
            (*run).exit_reason,
            kvm_bindings::KVM_EXIT_HLT,
            "exit reason"
        );
        (*run).immediate_exit = 1;
        libc::munmap(p, size);
    }
    works(env)
}

/// Creations that fail half-way leave nothing behind.
fn failed_creations(env: &Env) -> Outcome {
    let files = open_files();
    let kvm = env.open()?;
    for _ in 0..50 {
        let _ = kvm.fd.ioctl(sys::KVM_CREATE_VM, 0xffff);
        let vm = kvm.create_vm()?;
        let _ = vm.create_vcpu(usize::MAX);
        let _vcpu = vm.create_vcpu(0)?;
        let _ = vm.create_vcpu(0);
        let _ = vm.set_memory(0, 0, 1, 2, 3);
    }
    drop(kvm);
    ensure_eq!(open_files(), files, "open files");
    Ok(())
}

/// What the kernel holds: each in KiB, files in number.
#[derive(Debug, Clone, Copy)]
struct Usage {
    slab: i64,
    free: i64,
    other: i64,
    files: i64,
}

fn usage() -> Usage {
    // Frees that wait for readers (RCU) get their time; compaction empties the per-CPU lists of pages.
    sleep_ms(60);
    let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
    sleep_ms(20);
    let get = |key| i64::try_from(meminfo(key).unwrap_or(0)).unwrap_or(0);
    Usage {
        slab: get("SUnreclaim"),
        free: get("MemFree") + get("Buffers") + get("Cached"),
        other: get("VmallocUsed") + get("KernelStack") + get("PageTables") + get("Percpu"),
        files: i64::try_from(system_files().unwrap_or(0)).unwrap_or(0),
    }
}

/// How many batches the cycles come in.
const BATCHES: u32 = 4;

/// How many batches more it may take until one does not grow.
const PATIENCE: u32 = 12;

/// Does `body` `warm` times, then `cycles` times in [`BATCHES`] batches, and compares what the kernel
/// holds. What leaks grows in each batch; caches that fill and empty by themselves do not. So a batch's
/// growth counts as far as all batches have it: a KiB of slab a cycle shows, and so does a
/// page in four cycles. As a cache may take its time to fill, there are more batches while all have
/// grown, up to [`PATIENCE`]: a leak grows in those too.
///
/// A debug kernel (`--slow`) holds back what is freed, to catch its use, and looks for leaks by itself:
/// there the cycles are fewer, and growth is only shown.
fn no_growth(env: &Env, warm: u32, cycles: u32, mut body: impl FnMut(u32) -> Outcome) -> Outcome {
    let judge = env.slow < 5;
    let cycles = u32::try_from(env.fewer(cycles.into())).unwrap_or(cycles);
    for i in 0..warm {
        body(i)?;
    }
    let mut samples = vec![usage()];
    let each = cycles / BATCHES;
    for batch in 0..BATCHES + PATIENCE {
        if batch >= BATCHES && (!judge || grown(&samples, each.into()).is_none()) {
            break;
        }
        for i in 0..each {
            body(batch * each + i)?;
        }
        samples.push(usage());
    }
    for s in &samples {
        println!("{s:?}");
    }
    match grown(&samples, each.into()) {
        Some(what) if judge => fail!("{what} or more in each {each} cycles"),
        _ => Ok(()),
    }
}

/// What grew between all samples, which are `each` cycles apart.
fn grown(samples: &[Usage], each: i64) -> Option<String> {
    let least = |growth: fn(&Usage, &Usage) -> i64| {
        samples
            .windows(2)
            .map(|w| growth(&w[0], &w[1]))
            .min()
            .unwrap_or(0)
    };
    let slab = least(|a, b| b.slab - a.slab);
    if slab > each + 16 {
        return Some(format!("slab grew by {slab} KiB"));
    }
    let free = least(|a, b| a.free - b.free);
    if free > each + 64 {
        return Some(format!("free memory shrank by {free} KiB"));
    }
    let other = least(|a, b| b.other - a.other);
    if other > each / 4 + 32 {
        return Some(format!(
            "vmalloc, stacks, tables and per-CPU memory grew by {other} KiB"
        ));
    }
    let files = least(|a, b| b.files - a.files);
    (files > each / 8).then(|| format!("open files grew by {files}"))
}

/// A thousand VMs, one after the other, each of which runs a guest.
fn thousand_cycles(env: &Env) -> Outcome {
    no_growth(env, 50, 1000, |_| {
        let m = Machine::bare(env, 0x30000)?;
        m.start(Mode::Protected, halt())?;
        m.expect_hlt()?;
        ensure_eq!(m.mem.read::<u32>(usize_of(at::DATA)), 1, "count");
        Ok(())
    })
}

/// VMs with several vCPUs, CPUID, slots that change, pages that come and go.
fn rich_cycles(env: &Env) -> Outcome {
    guest_code!(
        walk,
        ".code64",
        "mov ebx, 0x1000000",
        "mov ecx, 64",
        "2: inc dword ptr [rbx]",
        "add ebx, 4096",
        "loop 2b",
        "hlt",
    );
    let memory = Mapping::new(64 * PAGE, false)?;
    memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
    no_growth(env, 20, 160, |i| {
        let m = Machine::new(env, Mode::Long, walk())?;
        let others = [m.vm.create_vcpu(1)?, m.vm.create_vcpu(2)?];
        let size = memory.len() as u64;
        m.vm.set_memory(1, 0, 0x100_0000, size, memory.addr() as u64)?;
        m.expect_hlt()?;
        memory.advise(0, memory.len() / 2, libc::MADV_DONTNEED)?;
        m.vm.set_memory(1, 0, 0x200_0000, size, memory.addr() as u64)?;
        m.vm.set_memory(1, 0, 0, 0, 0)?;
        m.vm.set_memory(2, 0, 0x100_0000, size, memory.addr() as u64)?;
        for v in &others {
            v.set_cpuid(&*m.kvm.supported_cpuid()?)?;
            start_vcpu(v, Mode::Long, at::CODE)?;
            ensure_eq!(
                v.run()?,
                kvm_bindings::KVM_EXIT_HLT,
                "exit of vCPU in cycle {i}"
            );
        }
        Ok(())
    })
}

/// The process that holds the VM is killed, time and again.
fn kill_cycles(env: &Env) -> Outcome {
    no_growth(env, 5, 40, |_| {
        let pid = running_vmm(env, 1)?;
        kill_and_reap(pid, libc::SIGKILL)?;
        Ok(())
    })
}

/// Many VMs live at the same time, and each is its own.
fn many_vms(env: &Env) -> Outcome {
    let mut machines = Vec::new();
    for i in 0..40u32 {
        let m = Machine::bare(env, 0x30000)?;
        m.start(Mode::Protected, halt())?;
        m.mem.write(usize_of(at::DATA), i * 1000);
        machines.push(m);
    }
    for round in 1..=3 {
        for (i, m) in machines.iter().enumerate() {
            ensure_eq!(m.run()?, Exit::Hlt, "exit of VM {i}");
            let got: u32 = m.mem.read(usize_of(at::DATA));
            ensure_eq!(got as usize, i * 1000 + round, "count of VM {i}");
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "lifecycle",
        tests![
            killed,
            killed_with_threads,
            exit_group,
            exec,
            close_orders,
            mapping_outlives_files,
            failed_creations,
            many_vms,
            rich_cycles => 60,
            kill_cycles => 60,
            thousand_cycles => 120,
        ],
    )
}
