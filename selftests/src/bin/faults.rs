// SPDX-License-Identifier: GPL-2.0

//! What a guest's access comes to in each kind of host memory: what is there, what is not, what may
//! not be written, what the hardware lost, and what the host learns of it.

use kvm_bindings as kb;
use selftests::backing::{Backing, Kind};
use selftests::host::{gettid, patient, sleep_ms};
use selftests::machine::Exit;
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::pressure::{frame, pagemap, set, Knob, Ksm};
use selftests::probe::{Access, Probe, GPA};
use selftests::{ensure, ensure_eq, skip, tests, Env, Outcome, Verdict};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};

const OLD: u64 = 0x1111_2222_3333_4444;

/// Reads, writes, reads that become writes, and the host's own writes, at several places.
fn kind_of_memory(env: &Env, kind: Kind) -> Outcome {
    let len = kind.granule().max(2 * HUGE);
    let step = (len / 16).max(PAGE);
    let backing = Backing::new(kind, len, |f| {
        if matches!(kind, Kind::Huge2M | Kind::Huge1G) {
            return Ok(());
        }
        (0..len / step).try_for_each(|i| f.write_all_at(&OLD.to_le_bytes(), (i * step) as u64))
    })?;
    let filled = backing.file.is_some() && kind.granule() == PAGE;
    let first = if filled { OLD } else { 0 };
    let p = Probe::new(env, &backing.memory, 0)?;
    for i in 0..len / step {
        let (at, value) = (i * step, i as u64 + 100);
        let what = format!("{kind:?} at {at:#x}");
        if i % 2 == 0 {
            p.reads(at, first, &what)?;
        }
        p.writes(at, value, &what)?;
        ensure_eq!(
            backing.memory.read::<u64>(at),
            value,
            "the host's view, {what}"
        );
        if backing.file.is_some() && kind.granule() == PAGE {
            let want = if kind.is_private() { OLD } else { value };
            ensure_eq!(backing.read_file(at)?, want, "the file, {what}");
        }
        backing.memory.write(at, value << 8);
        p.reads(at, value << 8, &what)?;
    }
    println!("{kind:?}: {} places", len / step);
    Ok(())
}

fn anonymous(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Small)
}

fn anonymous_huge(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Thp)
}

fn anonymous_shared(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Shared)
}

fn memfd(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Memfd)
}

fn tmpfs_shared(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::TmpfsShared)
}

fn tmpfs_private(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::TmpfsPrivate)
}

fn disk_shared(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::DiskShared)
}

fn disk_private(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::DiskPrivate)
}

fn hugetlb_2m(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Huge2M)
}

fn hugetlb_1g(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Huge1G)
}

/// What the guest writes to a file's page after it was written back is written back too.
fn write_back(env: &Env) -> Outcome {
    let backing = Backing::new(Kind::DiskShared, 16 * PAGE, |_| Ok(()))?;
    let p = Probe::new(env, &backing.memory, 0)?;
    let file = backing
        .file
        .as_ref()
        .ok_or(Verdict::Fail("no file".into()))?;
    let error = |e| Verdict::Fail(format!("the file: {e}"));
    for round in 1..=12u64 {
        let at = (round % 4) as usize * PAGE;
        p.writes(at, round, "a file's page")?;
        file.sync_all().map_err(error)?;
        // Clean now; this is lost if no one learns of it.
        p.writes(at, round + 1000, "after it was written back")?;
        file.sync_all().map_err(error)?;
        backing.memory.advise(0, 16 * PAGE, libc::MADV_PAGEOUT)?;
        set("/proc/sys/vm/drop_caches", "3")?;
        ensure_eq!(
            backing.read_file(at)?,
            round + 1000,
            "the file, round {round}"
        );
        p.reads(at, round + 1000, "after the page was dropped")?;
    }
    Ok(())
}

/// Nothing mapped, and nothing that may be accessed.
fn no_access(env: &Env) -> Outcome {
    let memory = Mapping::new(8 * PAGE, false)?;
    let p = Probe::new(env, &memory, 0)?;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    for touched in [false, true] {
        memory.replace(0, 8 * PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
        if touched {
            p.writes(0, 1, "page 0")?;
            p.writes(PAGE, 2, "page 1")?;
        }
        memory.protect(0, PAGE, libc::PROT_NONE)?;
        memory.unmap(PAGE, PAGE)?;
        for (page, what) in ["PROT_NONE", "a hole"].iter().enumerate() {
            p.fails(page * PAGE, false, what)?;
            p.fails(page * PAGE, true, what)?;
        }
        p.writes(2 * PAGE, 3, "their neighbour")?;
        memory.protect(0, PAGE, rw)?;
        p.reads(0, u64::from(touched), "the page that may be accessed again")?;
        memory.replace(PAGE, PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
        p.reads(PAGE, 0, "the page that is new in the hole")?;
    }
    Ok(())
}

/// Mappings that may only be read: of anonymous memory, of files.
fn read_only_mapping(env: &Env) -> Outcome {
    for kind in [
        Kind::Small,
        Kind::Thp,
        Kind::Memfd,
        Kind::TmpfsPrivate,
        Kind::DiskShared,
    ] {
        let backing = Backing::new(kind, 2 * HUGE, |_| Ok(()))?;
        let p = Probe::new(env, &backing.memory, 0)?;
        let what = format!("{kind:?}, read-only");
        p.writes(0, 5, &what)?;
        backing.memory.protect(0, 2 * HUGE, libc::PROT_READ)?;
        for (at, value) in [(0, 5), (PAGE, 0), (HUGE, 0)] {
            p.fails(at, true, &what)?;
            p.reads(at, value, &what)?;
            p.fails(at, true, &what)?;
            ensure_eq!(
                backing.memory.read::<u64>(at),
                value,
                "the host's view, {what}"
            );
        }
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        backing.memory.protect(0, 2 * HUGE, rw)?;
        p.writes(PAGE, 6, "after it may be written")?;
        ensure_eq!(backing.memory.read::<u64>(PAGE), 6, "the host's view");
    }
    Ok(())
}

/// A read-only memslot: reads are memory, also of what the host may only read; writes are a device's.
fn read_only_slot(env: &Env) -> Outcome {
    for readable in [false, true] {
        let memory = Mapping::new(4 * PAGE, false)?;
        memory.write(0, OLD);
        if readable {
            memory.protect(0, 4 * PAGE, libc::PROT_READ)?;
        }
        let p = Probe::new(env, &memory, kb::KVM_MEM_READONLY)?;
        for (at, value) in [(0, OLD), (PAGE, 0)] {
            p.reads(at, value, "a read-only slot")?;
            let left = Access::Left(Exit::MmioWrite {
                addr: GPA + at as u64,
                data: 7u64.to_le_bytes().to_vec(),
            });
            ensure_eq!(p.access(at, true, 7)?, left, "write to a read-only slot");
            ensure_eq!(p.m.run()?, Exit::Hlt, "the exit after it");
            p.reads(at, value, "after the write")?;
        }
        if !readable {
            memory.write(0, 9u64);
            p.reads(0, 9, "what the host wrote")?;
        }
    }
    Ok(())
}

/// Memory that has no pages: a mapping of physical addresses, here the video BIOS and text memory.
fn physical(env: &Env) -> Outcome {
    let Ok(file) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/mem")
    else {
        skip!("no /dev/mem");
    };
    let map = |at: i64, prot: i32| -> Result<Mapping, Verdict> {
        let m = Mapping::new(4 * PAGE, false)?;
        // SAFETY: Over a mapping that is ours; read as plain bytes.
        let r = unsafe {
            libc::mmap(
                m.addr() as *mut _,
                4 * PAGE,
                prot,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                at,
            )
        };
        ensure!(r as usize == m.addr(), "mmap of /dev/mem at {at:#x}");
        Ok(m)
    };
    let rom = map(0xc_0000, libc::PROT_READ)?;
    let p = Probe::new(env, &rom, 0)?;
    for at in [0, 8, PAGE + 16, 3 * PAGE] {
        p.reads(at, rom.read(at), "the video BIOS")?;
    }
    p.cannot_write(0, "the video BIOS, mapped to be read")?;
    drop(p);
    let text = map(0xb_8000, libc::PROT_READ | libc::PROT_WRITE)?;
    let before: u64 = text.read(0x800);
    text.write(0x800, OLD);
    if text.read::<u64>(0x800) != OLD {
        println!("there is no text memory at 0xb8000");
        return Ok(());
    }
    let p = Probe::new(env, &text, 0)?;
    p.reads(0x800, OLD, "text memory")?;
    p.writes(0x800, OLD + 1, "text memory")?;
    ensure_eq!(
        text.read::<u64>(0x800),
        OLD + 1,
        "text memory, for the host"
    );
    text.protect(0, 4 * PAGE, libc::PROT_READ)?;
    p.cannot_write(0x800, "text memory that may only be read")?;
    ensure_eq!(
        text.read::<u64>(0x800),
        OLD + 1,
        "text memory, for the host"
    );
    text.protect(0, 4 * PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    text.write(0x800, before);
    Ok(())
}

static BUS: (AtomicU32, AtomicI32, AtomicUsize, AtomicI32) = (
    AtomicU32::new(0),
    AtomicI32::new(0),
    AtomicUsize::new(0),
    AtomicI32::new(0),
);

extern "C" fn on_bus(_: i32, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: The kernel passes the signal's information; SIGBUS has an address.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    BUS.1.store(code, Ordering::SeqCst);
    BUS.2.store(addr, Ordering::SeqCst);
    BUS.3.store(gettid(), Ordering::SeqCst);
    BUS.0.fetch_add(1, Ordering::SeqCst);
}

/// A page that the hardware lost: the vCPU's thread gets SIGBUS when its guest touches it.
fn poison(env: &Env) -> Outcome {
    const BUS_MCEERR_AR: i32 = 4;
    // SAFETY: A zeroed structure is a valid one, and the handler touches atomics alone.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction =
            on_bus as extern "C" fn(i32, *const libc::siginfo_t, *const libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
    let memory = Mapping::new(8 * PAGE, false)?;
    memory.advise(0, 8 * PAGE, libc::MADV_NOHUGEPAGE)?;
    let p = Probe::new(env, &memory, 0)?;
    for write in [false, true] {
        let at = (1 + usize::from(write)) * PAGE;
        p.writes(at, OLD, "before")?;
        match memory.advise(at, PAGE, libc::MADV_HWPOISON) {
            Err(e) if e.errno == libc::EINVAL => skip!("the kernel has no memory failures"),
            r => r?,
        }
        // The failure itself may be told already.
        let before = BUS.0.load(Ordering::SeqCst);
        for again in 1..=2 {
            let got = p.access(at, write, 1)?;
            println!("write {write}: {got:x?}");
            ensure_eq!(
                got,
                Access::Failed(libc::EINTR),
                "access of a poisoned page"
            );
            ensure_eq!(BUS.0.load(Ordering::SeqCst), before + again, "signals");
            ensure_eq!(BUS.1.load(Ordering::SeqCst), BUS_MCEERR_AR, "si_code");
            ensure_eq!(BUS.2.load(Ordering::SeqCst), memory.addr() + at, "si_addr");
            ensure_eq!(
                BUS.3.load(Ordering::SeqCst),
                gettid(),
                "the signal's thread"
            );
        }
        p.writes(5 * PAGE, 1, "another page")?;
        memory.replace(at, PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
        p.reads(at, 0, "the page that took its place")?;
    }
    Ok(())
}

/// Pages of two VMs that are equal become one, until one of the VMs writes.
fn merged_pages(env: &Env) -> Outcome {
    const N: usize = 32;
    let ksm = Ksm::new()?;
    let memories = [
        Mapping::new(N * PAGE, false)?,
        Mapping::new(N * PAGE, false)?,
    ];
    let mut probes = Vec::new();
    for m in &memories {
        m.advise(0, m.len(), libc::MADV_NOHUGEPAGE)?;
        probes.push(Probe::new(env, m, 0)?);
        for page in 0..N {
            m.write(page * PAGE + 8, page);
        }
    }
    for round in 1..=3u64 {
        for p in &probes {
            for page in 0..N {
                p.writes(page * PAGE, round, "a page")?;
            }
        }
        for m in &memories {
            m.advise(0, m.len(), libc::MADV_MERGEABLE)?;
        }
        let frames = |page: usize| -> Result<[Option<u64>; 2], Verdict> {
            let of = |m: &Mapping| pagemap(m.addr() + page * PAGE, 1).map(|e| frame(e[0]));
            Ok([of(&memories[0])?, of(&memories[1])?])
        };
        let mut merged = 0;
        for _ in 0..patient(5000) {
            merged = 0;
            for page in 0..N {
                let [a, b] = frames(page)?;
                merged += usize::from(a.is_some() && a == b);
            }
            if merged == N {
                break;
            }
            sleep_ms(2);
        }
        ensure_eq!(merged, N, "pages that were merged");
        // No more merging, so that what is written stays apart.
        ksm.pause()?;
        for page in 0..N {
            let at = page * PAGE;
            let (writer, other) = (page % 2, 1 - page % 2);
            probes[other].reads(at, round, "a merged page")?;
            if page % 3 == 0 {
                probes[writer].reads(at, round, "a merged page")?;
            }
            probes[writer].writes(at, OLD, "a merged page")?;
            probes[writer].reads(at, OLD, "its own page")?;
            probes[other].reads(at, round, "the other's page")?;
            ensure_eq!(memories[other].read::<u64>(at), round, "the host's view");
            ensure_eq!(memories[writer].read::<u64>(at), OLD, "the host's view");
            let [a, b] = frames(page)?;
            ensure!(a != b, "page {page} is one after it was written");
        }
        ksm.go_on()?;
    }
    Ok(())
}

const BITMAP: &str = "/sys/kernel/mm/page_idle/bitmap";

/// A guest's accesses are the host's to see: a page is idle until the guest touches it.
fn idle_pages(env: &Env) -> Outcome {
    for generations in ["0", "7"] {
        let path = "/sys/kernel/mm/lru_gen/enabled";
        let lru = Knob::set(path, generations);
        if lru.is_ok() {
            println!("{path}: {generations}");
        }
        idle_until_touched(env)?;
    }
    Ok(())
}

fn idle_until_touched(env: &Env) -> Outcome {
    let Ok(bitmap) = std::fs::File::options().read(true).write(true).open(BITMAP) else {
        skip!("the kernel has no {BITMAP}");
    };
    let memory = Mapping::new(16 * PAGE, false)?;
    memory.advise(0, 16 * PAGE, libc::MADV_NOHUGEPAGE)?;
    let p = Probe::new(env, &memory, 0)?;
    for page in 0..16 {
        p.writes(page * PAGE, 1, "a page")?;
    }
    // Pages are idle, or not, once they are on the list of pages that are in use.
    set("/proc/sys/vm/drop_caches", "1")?;
    let word_of = |page: usize| -> Result<(u64, u64), Verdict> {
        let entry = pagemap(memory.addr() + page * PAGE, 1)?;
        match frame(entry[0]) {
            Some(pfn) => Ok((pfn / 64 * 8, 1 << (pfn % 64))),
            None => Err(Verdict::Fail(format!("page {page} is not there"))),
        }
    };
    let error = |e| Verdict::Fail(format!("{BITMAP}: {e}"));
    let is_idle = |page: usize| -> Result<bool, Verdict> {
        let (offset, bit) = word_of(page)?;
        let mut word = [0; 8];
        bitmap.read_exact_at(&mut word, offset).map_err(error)?;
        Ok(u64::from_le_bytes(word) & bit != 0)
    };
    for round in 0..5 {
        for page in 0..15 {
            let (offset, bit) = word_of(page)?;
            bitmap
                .write_all_at(&bit.to_le_bytes(), offset)
                .map_err(error)?;
        }
        // A translation that the processor keeps hides accesses, which the kernel accepts. This
        // makes it forget them.
        p.writes(15 * PAGE, round, "a page that goes")?;
        memory.advise(15 * PAGE, PAGE, libc::MADV_DONTNEED)?;
        for page in 0..15 {
            ensure!(is_idle(page)?, "page {page} is not idle, round {round}");
        }
        for page in (0..15).filter(|p| p % 3 == round as usize % 3) {
            if page % 2 == 0 {
                p.reads(page * PAGE, 1, "an idle page")?;
            } else {
                p.writes(page * PAGE, 1, "an idle page")?;
            }
        }
        for page in 0..15 {
            let touched = page % 3 == round as usize % 3;
            ensure_eq!(is_idle(page)?, !touched, "idle, page {page}, round {round}");
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "faults",
        tests![
            anonymous,
            anonymous_huge,
            anonymous_shared,
            memfd,
            tmpfs_shared,
            tmpfs_private,
            disk_shared,
            disk_private,
            hugetlb_2m,
            hugetlb_1g,
            write_back,
            no_access,
            read_only_mapping,
            read_only_slot,
            physical,
            poison,
            merged_pages,
            idle_pages,
        ],
    )
}
