// SPDX-License-Identifier: GPL-2.0

//! The statistics of VMs and vCPUs: `KVM_GET_STATS_FD`.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::dirty::Memory;
use selftests::guest::{at, PORT};
use selftests::host::{gettid, interrupting_handler, kick, sleep_ms};
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::stats::{pread, Desc, Stats, DESCRIPTOR, HEADER};
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

const GPA: u64 = 0x100_0000;

guest_code!(count, ".code32", "2: inc dword ptr [{D}]", "jmp 2b"; D = at::DATA);
guest_code!(out, ".code32", "2: out {P}, al", "jmp 2b"; P = PORT);

/// A machine and the statistics of its VM and of its vCPU.
fn both(env: &Env, code: &[u8]) -> Result<(Machine, [Stats; 2]), Verdict> {
    let m = Machine::new(env, Mode::Protected, code)?;
    let vm = Stats::open(&m.kvm, &m.vm.fd)?;
    let vcpu = Stats::open(&m.kvm, &m.vcpu.fd)?;
    Ok((m, [vm, vcpu]))
}

/// The bytes of the data: up to the end of the last.
fn data_size(s: &Stats) -> usize {
    let end = |d: &Desc| d.offset as usize + usize::from(d.size) * 8;
    s.list.iter().map(end).max().unwrap_or(0)
}

fn file_size(s: &Stats) -> usize {
    s.header.data_offset as usize + data_size(s)
}

/// Header, id and descriptors are one behind the other, and every descriptor makes sense.
fn layout(env: &Env) -> Outcome {
    let (_m, both) = both(env, count())?;
    // SAFETY: No arguments, no effects.
    let pid = unsafe { libc::getpid() };
    let ids = [format!("kvm-{pid}"), format!("kvm-{pid}/vcpu-0")];
    let names = ["anon_inode:kvm-vm-stats", "anon_inode:kvm-vcpu-stats:0"];
    for ((s, id), name) in both.iter().zip(ids).zip(names) {
        let h = s.header;
        ensure_eq!(s.id, id, "id");
        ensure_eq!(h.flags, 0, "flags of {id}");
        ensure_eq!(h.name_size, 48, "bytes of a name of {id}");
        ensure!(h.id_offset as usize >= HEADER, "{h:?}");
        ensure!(h.desc_offset >= h.id_offset + h.name_size, "{h:?}");
        let end = h.desc_offset + h.num_desc * (DESCRIPTOR as u32 + h.name_size);
        ensure!(h.data_offset >= end, "{h:?}");
        ensure!(h.data_offset % 8 == 0, "{h:?}");
        let mut seen = BTreeSet::new();
        let mut used = BTreeSet::new();
        for d in &s.list {
            ensure!(
                !d.name.is_empty() && seen.insert(d.name.clone()),
                "name of {d:?}"
            );
            let ty = d.flags & kb::KVM_STATS_TYPE_MASK;
            ensure!(ty <= kb::KVM_STATS_TYPE_MAX, "type of {d:?}");
            ensure!(
                d.flags & kb::KVM_STATS_UNIT_MASK <= kb::KVM_STATS_UNIT_MAX,
                "unit of {d:?}"
            );
            ensure!(
                d.flags & kb::KVM_STATS_BASE_MASK <= kb::KVM_STATS_BASE_MAX,
                "base of {d:?}"
            );
            ensure_eq!(d.flags >> 12, 0, "flags of {d:?}");
            let histogram = ty >= kb::KVM_STATS_TYPE_LINEAR_HIST;
            ensure!(d.size >= 1 && (histogram || d.size == 1), "size of {d:?}");
            let linear = ty == kb::KVM_STATS_TYPE_LINEAR_HIST;
            ensure_eq!(linear, d.bucket_size != 0, "bucket of {d:?}");
            ensure!(d.offset % 8 == 0, "offset of {d:?}");
            for i in 0..u32::from(d.size) {
                ensure!(
                    used.insert(d.offset + i * 8),
                    "the data of {d:?} are another's too"
                );
            }
            s.values(d)?;
        }
        // SAFETY: Reads the flags of a descriptor.
        let flags = unsafe { libc::fcntl(s.fd.0, libc::F_GETFD) };
        ensure!(flags & libc::FD_CLOEXEC != 0, "{id} is not close-on-exec");
        let link = std::fs::read_link(format!("/proc/self/fd/{}", s.fd.0)).unwrap_or_default();
        ensure_eq!(link.to_string_lossy(), name, "name of the file");
        println!("{id}: {} statistics, {} bytes", s.list.len(), file_size(s));
    }
    Ok(())
}

/// Whatever part is read, in whatever steps, is that part of the whole; behind the end is nothing.
fn parts(env: &Env) -> Outcome {
    let (_m, both) = both(env, count())?;
    for s in &both {
        let size = file_size(s);
        let all = pread(&s.fd, size + 100, 0)?;
        ensure_eq!(all.len(), size, "bytes of the file");
        let h = s.header;
        for at in [
            1,
            23,
            24,
            25,
            71,
            72,
            73,
            h.desc_offset as usize + 17,
            h.data_offset as usize - 1,
        ] {
            for len in [1, 7, 8, 64, 1000] {
                let got = pread(&s.fd, len, at as u64)?;
                ensure_eq!(got, all[at..(at + len).min(size)], "{len} bytes at {at}");
            }
        }
        let last = pread(&s.fd, 100, size as u64 - 3)?;
        ensure_eq!(last.len(), 3, "bytes read before the end");
        for at in [
            size as u64,
            size as u64 + 1,
            1 << 32,
            1 << 62,
            (1 << 63) - 4096,
        ] {
            ensure_eq!(pread(&s.fd, 8, at)?, [], "bytes at {at:#x}");
        }
        // SAFETY: The calls get a buffer of the length that is passed, or an address that is none.
        unsafe {
            let mut buffer = [0u8; 7];
            let mut read: Vec<u8> = vec![];
            loop {
                let n = libc::read(s.fd.0, buffer.as_mut_ptr().cast(), 7);
                ensure!((0..=7).contains(&n), "read: {n}");
                if n == 0 {
                    break;
                }
                read.extend(&buffer[..n as usize]);
            }
            ensure_eq!(read, all, "what read in small steps gave");
            // It cannot seek, and says so by not moving.
            ensure_eq!(libc::lseek(s.fd.0, 0, libc::SEEK_SET), size as i64, "lseek");
            ensure_eq!(
                libc::pread(s.fd.0, 8 as *mut _, 8, 0),
                -1,
                "pread to a bad address"
            );
            let errno = std::io::Error::last_os_error().raw_os_error();
            ensure_eq!(errno, Some(libc::EFAULT), "errno of it");
            ensure_eq!(libc::write(s.fd.0, buffer.as_ptr().cast(), 7), -1, "write");
        }
        let e = s.fd.ioctl(selftests::sys::KVM_GET_STATS_FD, 0);
        expect_errno(e, libc::ENOTTY, "an ioctl of the file")?;
    }
    Ok(())
}

/// The files outlive the descriptors of VM and vCPU, and a child may read them.
fn after_close(env: &Env) -> Outcome {
    let (m, [vm, vcpu]) = both(env, out())?;
    for _ in 0..50 {
        m.expect_out(PORT)?;
    }
    let exits = vcpu.need("exits")?;
    // SAFETY: The child only reads and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let same = vcpu.need("exits").is_ok_and(|n| n == exits);
        // SAFETY: Ends the child.
        unsafe { libc::_exit(if same { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: Our own child; `status` lives through the call.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    ensure_eq!(status, 0, "status of the child");
    let Machine {
        vcpu: v,
        vm: machine,
        kvm,
        mem,
    } = m;
    drop(v);
    drop(machine);
    drop(kvm);
    drop(mem);
    ensure_eq!(vcpu.need("exits")?, exits, "exits after all was closed");
    for s in [&vm, &vcpu] {
        for d in &s.list {
            s.values(d)?;
        }
    }
    drop(vm);
    ensure_eq!(vcpu.need("exits")?, exits, "exits with only this file open");
    Ok(())
}

/// Each vCPU counts its own exits.
fn exits(env: &Env) -> Outcome {
    let (m, [_vm, first]) = both(env, out())?;
    let second = m.vm.create_vcpu(1)?;
    let second = Stats::open(&m.kvm, &second.fd)?;
    let before = first.need("exits")?;
    for _ in 0..100 {
        m.expect_out(PORT)?;
    }
    let n = first.need("exits")? - before;
    ensure!((100..1000).contains(&n), "{n} exits for 100 outputs");
    ensure_eq!(second.need("exits")?, 0, "exits of a vCPU that never ran");
    if let Some(io) = first.get("io_exits")? {
        ensure!(io >= 100, "{io} exits for I/O");
    }
    Ok(())
}

/// A vCPU's file can be read while it runs.
fn while_running(env: &Env) -> Outcome {
    const SIG: i32 = libc::SIGUSR1;
    interrupting_handler(SIG)?;
    let (m, [vm, vcpu]) = both(env, count())?;
    let (stop, tid) = (AtomicBool::new(false), AtomicI32::new(0));
    std::thread::scope(|scope| -> Outcome {
        let thread = scope.spawn(|| -> Outcome {
            tid.store(gettid(), Ordering::SeqCst);
            while !stop.load(Ordering::SeqCst) {
                match m.vcpu.run() {
                    Err(e) if e.errno == libc::EINTR => {}
                    other => fail!("KVM_RUN: {other:?}"),
                }
            }
            Ok(())
        });
        let mut last = 0;
        let mut body = || -> Outcome {
            for _ in 0..env.fewer(60) {
                let now = vcpu.need("exits")?;
                ensure!(now >= last, "{now} exits after {last}");
                last = now;
                for s in [&vm, &vcpu] {
                    pread(&s.fd, file_size(s), 0)?;
                }
                drop(Stats::open(&m.kvm, &m.vm.fd)?);
                kick(tid.load(Ordering::SeqCst), SIG);
                sleep_ms(1);
            }
            Ok(())
        };
        let r = body();
        stop.store(true, Ordering::SeqCst);
        while !thread.is_finished() {
            kick(tid.load(Ordering::SeqCst), SIG);
            sleep_ms(1);
        }
        thread
            .join()
            .unwrap_or(Err(Verdict::Fail("panic".into())))?;
        r?;
        ensure!(vcpu.need("exits")? > 1, "no exits counted");
        Ok(())
    })
}

// EDI: first page; EBP: pages; ESI: bytes from one to the next.
guest_code!(
    touch,
    ".code32",
    "2: mov edx, edi",
    "mov ecx, ebp",
    "3: inc dword ptr [edx]",
    "add edx, esi",
    "loop 3b",
    "hlt",
    "jmp 2b",
);

fn touched(m: &Machine, n: u64, stride: usize) -> Outcome {
    m.patch_regs(|r| {
        r.rip = at::CODE;
        r.rdi = GPA;
        r.rbp = n;
        r.rsi = stride as u64;
    })?;
    m.expect_hlt()
}

/// `pages_4k` is the number of small pages that are mapped: it follows what the guest touches and
/// what the host takes away. Without EPT a page may bring its neighbours along, in groups of eight: the
/// numbers here are of whole groups.
fn small_pages(env: &Env) -> Outcome {
    let (m, [vm, _vcpu]) = both(env, touch())?;
    let mem = Memory::Small.map(256 * PAGE)?;
    m.vm.set_memory(1, 0, GPA, mem.len() as u64, mem.addr() as u64)?;
    // Code and such are mapped after the first.
    touched(&m, 8, PAGE)?;
    let base = vm.need("pages_4k")? - 8;
    let expect = |n: u64, what: &str| -> Outcome {
        ensure_eq!(vm.need("pages_4k")? - base, n, "pages mapped {what}");
        Ok(())
    };
    for n in [8, 64, 256] {
        touched(&m, n, PAGE)?;
        expect(n, "as they are touched")?;
    }
    touched(&m, 256, PAGE)?;
    expect(256, "when touched again")?;
    mem.advise(10 * PAGE, 20 * PAGE, libc::MADV_DONTNEED)?;
    expect(236, "after MADV_DONTNEED of 20")?;
    touched(&m, 256, PAGE)?;
    expect(256, "when all were touched again")?;
    // SAFETY: A part of the mapping that is not accessed again.
    let r = unsafe { libc::munmap((mem.addr() + 128 * PAGE) as *mut _, 128 * PAGE) };
    ensure_eq!(r, 0, "munmap");
    expect(128, "after munmap of the upper half")?;
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    ensure!(vm.need("pages_4k")? <= base, "after the slot went");
    Ok(())
}

/// The same with large pages.
fn large_pages(env: &Env) -> Outcome {
    let (m, [vm, _vcpu]) = both(env, touch())?;
    let mem = Memory::Hugetlb.map(8 * HUGE)?;
    m.vm.set_memory(1, 0, GPA, mem.len() as u64, mem.addr() as u64)?;
    touched(&m, 1, HUGE)?;
    let base = vm.need("pages_2m")? - 1;
    for n in [1, 3, 8] {
        touched(&m, n, HUGE)?;
        ensure_eq!(vm.need("pages_2m")? - base, n, "large pages mapped");
    }
    ensure_eq!(vm.need("pages_1g")?, 0, "pages of 1 GiB");
    // SAFETY: A part of the mapping that is not accessed again.
    let r = unsafe { libc::munmap((mem.addr() + 4 * HUGE) as *mut _, 4 * HUGE) };
    ensure_eq!(r, 0, "munmap");
    ensure_eq!(vm.need("pages_2m")? - base, 4, "after munmap of half");
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    ensure!(vm.need("pages_2m")? <= base, "after the slot went");
    Ok(())
}

/// Large pages are split where their writes are logged, and come back when no one logs any more.
fn large_pages_and_logging(env: &Env) -> Outcome {
    selftests::dirty::need_logging(env)?;
    let (m, [vm, _vcpu]) = both(env, touch())?;
    let mem = Memory::Hugetlb.map(4 * HUGE)?;
    let (size, hva) = (mem.len() as u64, mem.addr() as u64);
    m.vm.set_memory(1, 0, GPA, size, hva)?;
    touched(&m, 1, HUGE)?;
    let base = vm.need("pages_2m")? - 1;
    for round in 0..3 {
        m.vm.set_memory(1, 0, GPA, size, hva)?;
        touched(&m, 4, HUGE)?;
        ensure_eq!(vm.need("pages_2m")? - base, 4, "large pages, round {round}");
        m.vm.set_memory(1, kb::KVM_MEM_LOG_DIRTY_PAGES, GPA, size, hva)?;
        touched(&m, 4, HUGE)?;
        ensure_eq!(
            vm.need("pages_2m")? - base,
            0,
            "large pages while logging, round {round}"
        );
        let log = selftests::dirty::get_log(&m.vm, 1, mem.len() / PAGE)?;
        let want: Vec<usize> = (0..4).map(|i| i * HUGE / PAGE).collect();
        let got: Vec<usize> = log.pages().collect();
        ensure_eq!(got, want, "the log");
    }
    m.vm.set_memory(1, 0, GPA, size, hva)?;
    touched(&m, 4, HUGE)?;
    ensure_eq!(vm.need("pages_2m")? - base, 4, "large pages after logging");
    Ok(())
}

/// Many files of many VMs: each counts for itself.
fn many(env: &Env) -> Outcome {
    let mut all = vec![];
    for n in 1..=5u64 {
        let (m, [vm, vcpu]) = both(env, touch())?;
        let mem = Mapping::new(64 * PAGE, false)?;
        mem.advise(0, mem.len(), libc::MADV_NOHUGEPAGE)?;
        m.vm.set_memory(1, 0, GPA, mem.len() as u64, mem.addr() as u64)?;
        touched(&m, 1, PAGE)?;
        let base = vm.need("pages_4k")?;
        touched(&m, n * 10, PAGE)?;
        all.push((n, base, m, mem, vm, vcpu));
    }
    for (n, base, _, _, vm, vcpu) in &all {
        ensure_eq!(vm.need("pages_4k")? - base, n * 10 - 1, "pages of VM {n}");
        ensure!(vcpu.need("exits")? > 0, "exits of VM {n}");
    }
    match all[0].2.run()? {
        Exit::Hlt => Ok(()),
        other => fail!("exit {other:x?}"),
    }
}

fn main() -> ExitCode {
    selftests::tap::main(
        "stats",
        tests![
            layout,
            parts,
            after_close,
            exits,
            while_running,
            small_pages,
            large_pages,
            large_pages_and_logging,
            many,
        ],
    )
}
