// SPDX-License-Identifier: GPL-2.0

//! Faults that the host asks for (`KVM_PRE_FAULT_MEMORY`), and what `KVM_RUN` says of those that it
//! cannot serve.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::dirty::Memory;
use selftests::guest::at;
use selftests::host::{interrupting_handler, interval_alarm};
use selftests::machine::{Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::stats::Stats;
use selftests::sys;
use selftests::vm::PreFault;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const GPA: u64 = 0x100_0000;
const P: u64 = PAGE as u64;

fn range(gpa: u64, size: u64) -> PreFault {
    PreFault {
        gpa,
        size,
        ..Default::default()
    }
}

guest_code!(touch, ".code32",
    "2: mov ecx, ebp",
    "mov edx, {G}",
    "3: mov eax, [edx]",
    "inc dword ptr [edx + 4]",
    "add edx, 4096",
    "loop 3b",
    "hlt",
    "jmp 2b";
    G = GPA,
);

/// A machine, with `mem` at [`GPA`].
fn machine(env: &Env, mem: &Mapping) -> Result<Machine, Verdict> {
    let m = Machine::new(env, Mode::Protected, touch())?;
    if m.kvm.capability(kb::KVM_CAP_PRE_FAULT_MEMORY) <= 0 {
        skip!("no KVM_CAP_PRE_FAULT_MEMORY");
    }
    m.vm.set_memory(1, 0, GPA, mem.len() as u64, mem.addr() as u64)?;
    Ok(m)
}

fn touch_all(m: &Machine, mem: &Mapping) -> Outcome {
    let pages = mem.len() / PAGE;
    let before: Vec<u32> = (0..pages).map(|p| mem.read(p * PAGE + 4)).collect();
    m.patch_regs(|r| {
        r.rip = at::CODE;
        r.rbp = pages as u64;
    })?;
    m.expect_hlt()?;
    for (p, n) in before.iter().enumerate() {
        ensure_eq!(mem.read::<u32>(p * PAGE + 4), n + 1, "count in page {p}");
    }
    Ok(())
}

/// The range has to be whole pages, at least one, and not wrap; nothing of it changes on an error.
fn arguments(env: &Env) -> Outcome {
    let mem = Memory::Small.map(16 * PAGE)?;
    let m = machine(env, &mem)?;
    for (gpa, size, flags) in [
        (GPA, 0, 0),
        (GPA + 1, P, 0),
        (GPA + 0x800, P, 0),
        (GPA, P + 1, 0),
        (GPA, 1, 0),
        (GPA, 0xfff, 0),
        (GPA, P, 1),
        (GPA, P, 1 << 63),
        (GPA, P, u64::MAX),
        (u64::MAX - 0xfff, P, 0),
        (u64::MAX - 0xfff, 2 * P, 0),
        (GPA, u64::MAX - 0xfff, 0),
        (GPA, 0u64.wrapping_sub(GPA), 0),
        (1 << 63, 1 << 63, 0),
    ] {
        let mut r = PreFault {
            flags,
            ..range(gpa, size)
        };
        let before = r;
        expect_errno(
            m.vcpu.pre_fault(&mut r),
            libc::EINVAL,
            &format!("{before:x?}"),
        )?;
        ensure_eq!(r, before, "the range after EINVAL");
    }
    expect_errno(
        m.vcpu.fd.ioctl(sys::KVM_PRE_FAULT_MEMORY, 8),
        libc::EFAULT,
        "bad address of the argument",
    )?;
    // A structure that can be read and not written: the faults happen, the answer is EFAULT.
    let page = Mapping::new(PAGE, false)?;
    page.write(0, range(GPA, P));
    page.protect(0, PAGE, libc::PROT_READ)?;
    let r = m.vcpu.fd.ioctl(sys::KVM_PRE_FAULT_MEMORY, page.addr());
    expect_errno(r, libc::EFAULT, "an argument that cannot be written")?;
    touch_all(&m, &mem)
}

/// A range that is there is done as a whole, whatever the memory is, and in as many calls as one
/// likes.
fn whole_ranges(env: &Env) -> Outcome {
    for memory in [Memory::Small, Memory::Huge, Memory::Memfd, Memory::Hugetlb] {
        let mem = memory.map(4 * HUGE)?;
        let m = machine(env, &mem)?;
        let size = mem.len() as u64;
        for (from, len) in [
            (5 * P, P),
            (5 * P, 7 * P),
            (0, size),
            (size - P, P),
            (0, size),
        ] {
            let mut r = range(GPA + from, len);
            m.vcpu.pre_fault(&mut r)?;
            let want = range(GPA + from + len, 0);
            ensure_eq!(r, want, "{memory:?}: what is left of {len:#x} bytes");
        }
        touch_all(&m, &mem)?;
    }
    Ok(())
}

/// What was faulted in is mapped: the guest has no faults there any more.
fn mapped(env: &Env) -> Outcome {
    let mem = Memory::Small.map(64 * PAGE)?;
    let m = machine(env, &mem)?;
    let stats = Stats::open(&m.kvm, &m.vm.fd)?;
    let base = stats.need("pages_4k")?;
    m.vcpu.pre_fault(&mut range(GPA + 8 * P, 40 * P))?;
    ensure_eq!(
        stats.need("pages_4k")? - base,
        40,
        "pages mapped by 40 pages of a range"
    );
    m.vcpu.pre_fault(&mut range(GPA, 64 * P))?;
    ensure_eq!(stats.need("pages_4k")? - base, 64, "pages mapped by all");
    // With memory that no one has touched yet: the host's pages come with it.
    let mem = Mapping::new(HUGE, false)?;
    mem.advise(0, HUGE, libc::MADV_NOHUGEPAGE)?;
    m.vm.set_memory(2, 0, 2 * GPA, HUGE as u64, mem.addr() as u64)?;
    let base = stats.need("pages_4k")?;
    m.vcpu.pre_fault(&mut range(2 * GPA, HUGE as u64))?;
    ensure_eq!(
        stats.need("pages_4k")? - base,
        512,
        "pages mapped of new memory"
    );
    // Large pages at once.
    let mem = Memory::Hugetlb.map(2 * HUGE)?;
    m.vm.set_memory(3, 0, 4 * GPA, mem.len() as u64, mem.addr() as u64)?;
    let base = stats.need("pages_2m")?;
    let mut r = range(4 * GPA + 3 * P, 2 * P);
    m.vcpu.pre_fault(&mut r)?;
    ensure_eq!(
        r,
        range(4 * GPA + 5 * P, 0),
        "what is left within a large page"
    );
    ensure_eq!(stats.need("pages_2m")? - base, 1, "large pages mapped");
    Ok(())
}

/// Where no slot is, it is ENOENT; what is before that is done.
fn holes(env: &Env) -> Outcome {
    let mem = Memory::Small.map(16 * PAGE)?;
    let m = machine(env, &mem)?;
    let end = GPA + 16 * P;
    for (from, size) in [(end, P), (end, 64 * P), (GPA - P, 2 * P), (1 << 38, P)] {
        let mut r = range(from, size);
        expect_errno(m.vcpu.pre_fault(&mut r), libc::ENOENT, &format!("{r:x?}"))?;
        ensure_eq!(r, range(from, size), "the range after ENOENT");
    }
    let mut r = range(end - 3 * P, 10 * P);
    m.vcpu.pre_fault(&mut r)?;
    ensure_eq!(r, range(end, 7 * P), "what is left behind the slot");
    expect_errno(m.vcpu.pre_fault(&mut r), libc::ENOENT, "the rest")?;
    ensure_eq!(r, range(end, 7 * P), "what is left after ENOENT");
    // Another slot there, and the rest is done.
    let more = Memory::Small.map(16 * PAGE)?;
    m.vm.set_memory(2, 0, end, 16 * P, more.addr() as u64)?;
    m.vcpu.pre_fault(&mut r)?;
    ensure_eq!(r, range(end + 7 * P, 0), "what is left with a slot there");
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    let gone = m.vcpu.pre_fault(&mut range(GPA, P));
    expect_errno(gone, libc::ENOENT, "a slot that was deleted")
}

/// Where the host has no memory, it is EFAULT; what is before that is done.
fn host_holes(env: &Env) -> Outcome {
    let mem = Memory::Small.map(16 * PAGE)?;
    let m = machine(env, &mem)?;
    mem.protect(10 * PAGE, PAGE, libc::PROT_NONE)?;
    let mut r = range(GPA, 16 * P);
    m.vcpu.pre_fault(&mut r)?;
    ensure_eq!(
        r,
        range(GPA + 10 * P, 6 * P),
        "what is left before PROT_NONE"
    );
    expect_errno(m.vcpu.pre_fault(&mut r), libc::EFAULT, "PROT_NONE")?;
    ensure_eq!(r, range(GPA + 10 * P, 6 * P), "the range after EFAULT");
    mem.protect(10 * PAGE, PAGE, libc::PROT_READ)?;
    m.vcpu.pre_fault(&mut r)?;
    ensure_eq!(
        r,
        range(GPA + 16 * P, 0),
        "what is left with memory to read"
    );
    mem.protect(10 * PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    touch_all(&m, &mem)?;
    // SAFETY: A page of the mapping that is not accessed again.
    let unmapped = unsafe { libc::munmap((mem.addr() + 12 * PAGE) as *mut _, PAGE) };
    ensure_eq!(unmapped, 0, "munmap");
    let mut r = range(GPA + 12 * P, P);
    expect_errno(m.vcpu.pre_fault(&mut r), libc::EFAULT, "unmapped memory")
}

/// Memory that is only there to read: as a slot, and in the host.
fn readonly(env: &Env) -> Outcome {
    let mem = Memory::Small.map(16 * PAGE)?;
    let m = machine(env, &mem)?;
    let rom = Memory::Small.map(16 * PAGE)?;
    rom.protect(0, rom.len(), libc::PROT_READ)?;
    m.vm.set_memory(2, kb::KVM_MEM_READONLY, 2 * GPA, 16 * P, rom.addr() as u64)?;
    let mut r = range(2 * GPA, 16 * P);
    m.vcpu.pre_fault(&mut r)?;
    ensure_eq!(
        r,
        range(2 * GPA + 16 * P, 0),
        "what is left of a read-only slot"
    );
    Ok(())
}

/// A signal ends the call: with 0 and what is left if anything was done, with EINTR if nothing was.
fn signal(env: &Env) -> Outcome {
    let bytes = (env.fewer(160) as usize) << 20;
    let mem = Mapping::new(bytes, false)?;
    mem.advise(0, bytes, libc::MADV_NOHUGEPAGE)?;
    let m = machine(env, &mem)?;
    interrupting_handler(libc::SIGALRM)?;
    interval_alarm(2);
    let mut r = range(GPA, bytes as u64);
    let (mut partial, mut nothing) = (0, 0);
    while r.size > 0 {
        let before = r;
        match m.vcpu.pre_fault(&mut r) {
            Ok(()) => {
                ensure!(
                    r.gpa > before.gpa && r.gpa + r.size == GPA + bytes as u64,
                    "{r:x?}"
                );
                partial += u32::from(r.size > 0);
            }
            Err(e) if e.errno == libc::EINTR => {
                ensure_eq!(r, before, "the range after EINTR");
                nothing += 1;
            }
            Err(e) => fail!("{e} at {r:x?}"),
        }
    }
    interval_alarm(0);
    println!("{partial} times a part, {nothing} times nothing");
    ensure!(partial > 0, "no signal came during the call");
    Ok(())
}

/// One vCPU runs while another's memory, which is the same, is faulted in: no harm to either.
fn beside_a_guest(env: &Env) -> Outcome {
    let mem = Memory::Huge.map(4 * HUGE)?;
    let m = machine(env, &mem)?;
    let second = m.vm.create_vcpu(1)?;
    std::thread::scope(|scope| -> Outcome {
        let thread = scope.spawn(|| -> Outcome {
            for _ in 0..env.fewer(20) {
                touch_all(&m, &mem)?;
            }
            Ok(())
        });
        for _ in 0..env.fewer(40) {
            second.pre_fault(&mut range(GPA, mem.len() as u64))?;
            std::thread::yield_now();
        }
        thread.join().unwrap_or(Err(Verdict::Fail("panic".into())))
    })
}

/// What `kvm_run` says after EFAULT. The in-tree KVM says nothing of memory that the host does not have,
/// in this version; whoever says something says which page it was.
fn expect_memory_fault(m: &Machine, gpa: u64, what: &str) -> Outcome {
    expect_errno(m.vcpu.run(), libc::EFAULT, what)?;
    let run = m.vcpu.kvm_run();
    match run.exit_reason {
        kb::KVM_EXIT_MEMORY_FAULT => {
            // SAFETY: The exit reason tells that this member is valid.
            let f = unsafe { run.__bindgen_anon_1.memory_fault };
            ensure_eq!(
                (f.gpa, f.size, f.flags),
                (gpa, P, 0),
                "{what}: gpa, size and flags"
            );
        }
        kb::KVM_EXIT_UNKNOWN => {}
        other => fail!("{what}: exit reason {other}"),
    }
    Ok(())
}

/// Reads, writes and fetches where the host has nothing, or not what is needed.
fn memory_fault(env: &Env) -> Outcome {
    guest_code!(read, ".code32", "2: mov eax, [{G} + 0x3004]", "hlt", "jmp 2b"; G = GPA);
    guest_code!(write, ".code32", "2: mov [{G} + 0x3004], eax", "hlt", "jmp 2b"; G = GPA);
    guest_code!(fetch, ".code32", "2: mov eax, {G} + 0x3004", "call eax", "hlt", "jmp 2b"; G = GPA);
    guest_code!(across, ".code32", "2: mov [{G} + 0x2ffe], eax", "hlt", "jmp 2b"; G = GPA);
    for memory in [Memory::Small, Memory::Huge, Memory::Memfd] {
        for (name, code, protection) in [
            ("read", read as fn() -> &'static [u8], libc::PROT_NONE),
            ("write", write, libc::PROT_NONE),
            ("write to what may be read", write, libc::PROT_READ),
            ("fetch", fetch, libc::PROT_NONE),
            ("write across pages", across, libc::PROT_NONE),
        ] {
            let mem = memory.map(HUGE)?;
            let m = Machine::new(env, Mode::Protected, code())?;
            if m.kvm.capability(kb::KVM_CAP_MEMORY_FAULT_INFO) <= 0 {
                skip!("no KVM_CAP_MEMORY_FAULT_INFO");
            }
            mem.write(0x3004, 0xc3u8); // ret
            m.vm.set_memory(1, 0, GPA, HUGE as u64, mem.addr() as u64)?;
            let what = format!("{memory:?}: {name}");
            for _ in 0..2 {
                m.expect_hlt()?;
                mem.protect(3 * PAGE, PAGE, protection)?;
                expect_memory_fault(&m, GPA + 3 * P, &what)?;
                expect_memory_fault(&m, GPA + 3 * P, &format!("{what}, again"))?;
                mem.protect(3 * PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
                // The guest goes on where it was.
                m.expect_hlt()?;
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "prefault",
        tests![
            arguments,
            whole_ranges,
            mapped,
            holes,
            host_holes,
            readonly,
            signal,
            beside_a_guest,
            memory_fault,
        ],
    )
}
