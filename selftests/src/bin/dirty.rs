// SPDX-License-Identifier: GPL-2.0

//! Dirty logging by bitmap: `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::dirty::{
    chase, clear_log_at, get_log, get_log_at, need_logging, Bitmap, Guest, Memory, Protect, GPA,
    PROTECT, SLOT,
};
use selftests::host::Rng;
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::sys;
use selftests::vm::Vm;
use selftests::{ensure, ensure_eq, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const LOG: u32 = kb::KVM_MEM_LOG_DIRTY_PAGES;
/// Memory of guests that run while the log is read: so much that few pages are written twice, and what
/// is lost stays lost.
const RUNNING: usize = 2 * HUGE;

/// A VM with a logged slot of `pages` pages, with no vCPU.
fn logged(env: &Env, pages: usize, protect: Protect) -> Result<(Vm, Mapping), Verdict> {
    need_logging(env)?;
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    protect.enable(&kvm, &vm)?;
    let mem = Mapping::new(pages * PAGE, false)?;
    vm.set_memory(SLOT, LOG, GPA, (pages * PAGE) as u64, mem.addr() as u64)?;
    Ok((vm, mem))
}

/// Which slots have a log.
fn slots(env: &Env) -> Outcome {
    let (vm, mem) = logged(env, 64, Protect::Get)?;
    let (size, hva) = (mem.len() as u64, mem.addr() as u64);
    ensure_eq!(
        get_log(&vm, SLOT, 64)?.words,
        [0],
        "log of a slot that no one wrote"
    );
    let none =
        |slot: u32, errno: i32, what: &str| expect_errno(get_log(&vm, slot, 64), errno, what);
    none(SLOT + 1, libc::ENOENT, "a slot that is not there")?;
    vm.set_memory(SLOT, 0, GPA, size, hva)?;
    none(SLOT, libc::ENOENT, "a slot whose log was turned off")?;
    vm.set_memory(SLOT, LOG, GPA, size, hva)?;
    get_log(&vm, SLOT, 64)?;
    // A slot that moves keeps its log.
    vm.set_memory(SLOT, LOG, 2 * GPA, size, hva)?;
    get_log(&vm, SLOT, 64)?;
    vm.set_memory(SLOT, 0, 0, 0, 0)?;
    none(SLOT, libc::ENOENT, "a slot that was deleted")?;
    vm.set_memory(SLOT, 0, GPA, size, hva)?;
    none(SLOT, libc::ENOENT, "a slot that came back without a log")?;
    let kvm = env.open()?;
    let slots = u32::try_from(kvm.capability(kb::KVM_CAP_NR_MEMSLOTS)).unwrap_or(0);
    none(slots - 1, libc::ENOENT, "the last slot, which is not there")?;
    none(slots + 16, libc::EINVAL, "a number beyond the last slot")?;
    none(0xffff, libc::EINVAL, "slot 0xffff")?;
    let spaces = kvm.capability(kb::KVM_CAP_MULTI_ADDRESS_SPACE).max(1);
    let beyond = u32::try_from(spaces).unwrap_or(1) << 16;
    none(
        beyond | SLOT,
        libc::EINVAL,
        "an address space that is not there",
    )?;
    none((0xffff << 16) | SLOT, libc::EINVAL, "address space 0xffff")?;
    expect_errno(
        vm.fd.ioctl(sys::KVM_GET_DIRTY_LOG, 8),
        libc::EFAULT,
        "bad address of the argument",
    )
}

/// A read-only slot may be logged; nothing is ever in its log.
fn readonly_slot(env: &Env) -> Outcome {
    need_logging(env)?;
    guest_code!(code, ".code32", "mov eax, [{G}]", "mov [{G}], ebx", "hlt"; G = GPA);
    let m = Machine::new(env, Mode::Protected, code())?;
    if m.kvm.capability(kb::KVM_CAP_READONLY_MEM) <= 0 {
        skip!("no KVM_CAP_READONLY_MEM");
    }
    let mem = Mapping::new(PAGE, false)?;
    let flags = LOG | kb::KVM_MEM_READONLY;
    m.vm.set_memory(SLOT, flags, GPA, PAGE as u64, mem.addr() as u64)?;
    m.expect(&Exit::MmioWrite {
        addr: GPA,
        data: vec![0; 4],
    })?;
    m.expect_hlt()?;
    ensure_eq!(
        get_log(&m.vm, SLOT, 1)?.words,
        [0],
        "log of a read-only slot"
    );
    Ok(())
}

/// The bitmap is whole words of 64 pages, and what is behind the last page is 0; not a byte more is
/// written.
fn bitmap_size(env: &Env) -> Outcome {
    for pages in [1, 63, 64, 65, 100, 128, 1000] {
        let (vm, _mem) = logged(env, pages, Protect::InitiallySet)?;
        let words = pages.div_ceil(64);
        let buffer = Mapping::new(2 * PAGE, false)?;
        buffer.fill(0, PAGE, 0x5a);
        buffer.protect(PAGE, PAGE, libc::PROT_NONE)?;
        let at = PAGE - words * 8;
        get_log_at(&vm, SLOT, buffer.addr() + at)?;
        let got: Vec<u64> = (0..words).map(|i| buffer.read(at + i * 8)).collect();
        ensure_eq!(got, Bitmap::full(pages).words, "the log of {pages} pages");
        ensure_eq!(
            buffer.read::<u64>(at - 8),
            0x5a5a_5a5a_5a5a_5a5a,
            "the word before"
        );
        get_log_at(&vm, SLOT, buffer.addr())?;
        let behind: u64 = buffer.read(words * 8);
        ensure!(
            behind == 0x5a5a_5a5a_5a5a_5a5a || words * 8 >= at,
            "the word behind was written: {behind:#x}"
        );
        let r = get_log_at(&vm, SLOT, buffer.addr() + at + 8);
        expect_errno(r, libc::EFAULT, "a buffer that is a word too short")?;
    }
    Ok(())
}

/// A bad buffer changes nothing where the log is reset by hand; and breaks nothing elsewhere.
fn bad_buffers(env: &Env) -> Outcome {
    need_logging(env)?;
    for protect in PROTECT {
        let mut g = Guest::new(env, 1, Memory::Small.map(64 * PAGE)?, |k, v| {
            protect.enable(k, v)
        })?;
        g.log(true)?;
        g.harvest(protect)?;
        let written = g.burst(40)?;
        for address in [8, 0x7fff_ffff_f000, 0xffff_8000_0000_0000, usize::MAX - 7] {
            expect_errno(
                get_log_at(&g.vm, SLOT, address),
                libc::EFAULT,
                &format!("log to {address:#x}, {protect:?}"),
            )?;
            if protect != Protect::Get {
                expect_errno(
                    clear_log_at(&g.vm, SLOT, 0, 64, address),
                    libc::EFAULT,
                    &format!("clear from {address:#x}"),
                )?;
            }
        }
        let log = g.harvest(protect)?;
        if protect != Protect::Get {
            log.expect(&written, "the log after calls with bad buffers")?;
        }
        let written = g.burst(40)?;
        g.harvest(protect)?.expect(&written, "the next log")?;
    }
    Ok(())
}

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: what may be enabled.
fn manual_capability(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let cap = kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let value = kvm.capability(cap);
    if value <= 0 {
        skip!("no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
    }
    ensure_eq!(value, 3, "value of the capability");
    let vm = kvm.create_vm()?;
    for bits in [2, 4, 5, 7, 1 << 31, 1 << 32, u64::MAX] {
        let r = vm.enable_cap(cap, bits);
        expect_errno(r, libc::EINVAL, &format!("argument {bits:#x}"))?;
    }
    let flags = kb::kvm_enable_cap {
        cap,
        flags: 1,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    let r = vm.fd.ioctl_ref(sys::KVM_ENABLE_CAP, &flags);
    expect_errno(r, libc::EINVAL, "flags")?;
    let r = vm.fd.ioctl(sys::KVM_ENABLE_CAP, 8);
    expect_errno(r, libc::EFAULT, "bad address of the argument")?;
    let old = kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT;
    ensure_eq!(kvm.capability(old), 0, "the capability that was withdrawn");
    expect_errno(
        vm.enable_cap(old, 1),
        libc::EINVAL,
        "the one that was withdrawn",
    )?;
    // None of it took effect: a log is not full at first.
    let mem = Mapping::new(64 * PAGE, false)?;
    let size = mem.len() as u64;
    vm.set_memory(0, LOG, 0, size, mem.addr() as u64)?;
    ensure_eq!(get_log(&vm, 0, 64)?.words, [0], "a log before");
    // It can be changed at any time, back too, and counts for logs that begin later.
    vm.enable_cap(cap, 3)?;
    vm.set_memory(1, LOG, GPA, size, mem.addr() as u64)?;
    ensure_eq!(get_log(&vm, 0, 64)?.words, [0], "a log that was there");
    ensure_eq!(
        get_log(&vm, 1, 64)?.words,
        [u64::MAX],
        "a log that began full"
    );
    ensure_eq!(
        get_log(&vm, 1, 64)?.words,
        [u64::MAX],
        "the same, once more"
    );
    vm.enable_cap(cap, 1)?;
    vm.set_memory(2, LOG, 2 * GPA, size, mem.addr() as u64)?;
    ensure_eq!(get_log(&vm, 2, 64)?.words, [0], "a log that began empty");
    vm.enable_cap(cap, 0)?;
    ensure_eq!(
        get_log(&vm, 1, 64)?.words,
        [u64::MAX],
        "reset by reading again"
    );
    ensure_eq!(get_log(&vm, 1, 64)?.words, [0], "after that");
    Ok(())
}

/// Which ranges `KVM_CLEAR_DIRTY_LOG` takes: from a multiple of 64, for a multiple of 64 or to the
/// end.
fn clear_ranges(env: &Env) -> Outcome {
    const PAGES: usize = 200;
    let (vm, mem) = logged(env, PAGES, Protect::InitiallySet)?;
    let none = [0u64; 64];
    let address = none.as_ptr() as usize;
    for (first, n, errno) in [
        (0, 200, 0),
        (0, 64, 0),
        (0, 128, 0),
        (64, 64, 0),
        (64, 136, 0),
        (192, 8, 0),
        (0, 0, 0),
        (192, 0, 0),
        (1, 64, libc::EINVAL),
        (63, 137, libc::EINVAL),
        (65, 64, libc::EINVAL),
        (0, 1, libc::EINVAL),
        (0, 63, libc::EINVAL),
        (0, 199, libc::EINVAL),
        (0, 201, libc::EINVAL),
        (0, 256, libc::EINVAL),
        (64, 192, libc::EINVAL),
        (192, 7, libc::EINVAL),
        (192, 64, libc::EINVAL),
        (256, 0, libc::EINVAL),
        (256, 64, libc::EINVAL),
        (0, u32::MAX, libc::EINVAL),
        (64, u32::MAX & !63, libc::EINVAL),
        (1 << 32, 64, libc::EINVAL),
        (1 << 63, 64, libc::EINVAL),
        (0u64.wrapping_sub(64), 64, libc::EINVAL),
        (0u64.wrapping_sub(64), 128, libc::EINVAL),
    ] {
        let what = format!("{n} pages from {first:#x} of {PAGES}");
        match clear_log_at(&vm, SLOT, first, n, address) {
            Ok(()) if errno == 0 => {}
            r => expect_errno(r, errno, &what)?,
        }
    }
    let log = get_log(&vm, SLOT, PAGES)?;
    log.expect(&Bitmap::full(PAGES), "after clears of nothing")?;
    let bad = |slot, errno, what: &str| {
        expect_errno(clear_log_at(&vm, slot, 0, 64, address), errno, what)
    };
    bad(SLOT + 1, libc::ENOENT, "a slot that is not there")?;
    bad(0xffff, libc::EINVAL, "slot 0xffff")?;
    bad((0xffff << 16) | SLOT, libc::EINVAL, "address space 0xffff")?;
    let r = vm.fd.ioctl(sys::KVM_CLEAR_DIRTY_LOG, 8);
    expect_errno(r, libc::EFAULT, "bad address of the argument")?;
    // Bits behind the last page are ignored, and what is not named stays.
    let ones = [u64::MAX; 4];
    clear_log_at(&vm, SLOT, 192, 8, ones.as_ptr() as usize)?;
    let mut want = Bitmap::full(PAGES);
    want.words[3] = 0;
    get_log(&vm, SLOT, PAGES)?.expect(&want, "after a clear of the last pages")?;
    clear_log_at(&vm, SLOT, 64, 64, [0xff00u64].as_ptr() as usize)?;
    want.words[1] = !0xff00;
    get_log(&vm, SLOT, PAGES)?.expect(&want, "after a clear of eight pages")?;
    clear_log_at(&vm, SLOT, 0, 200, ones.as_ptr() as usize)?;
    get_log(&vm, SLOT, PAGES)?.expect(&Bitmap::new(PAGES), "after a clear of all")?;
    vm.set_memory(SLOT, 0, GPA, mem.len() as u64, mem.addr() as u64)?;
    bad(SLOT, libc::ENOENT, "a slot without log")
}

/// Round after round, the log is exactly what the guests wrote.
fn exact(env: &Env, memory: Memory) -> Outcome {
    need_logging(env)?;
    let mut rng = Rng::new(env.seed);
    for protect in PROTECT {
        for vcpus in [1, 2, 4] {
            let what = format!("{memory:?}, {protect:?}, {vcpus} vCPUs");
            let mut g = Guest::new(env, vcpus, memory.map(2 * HUGE)?, |k, v| {
                protect.enable(k, v)
            })?;
            // Some pages are mapped already, in large pages perhaps, when logging begins.
            g.burst(200)?;
            g.log(true)?;
            let first = g.harvest(protect)?;
            let want = match protect {
                Protect::InitiallySet => Bitmap::full(g.pages),
                _ => Bitmap::new(g.pages),
            };
            first.expect(&want, &format!("{what}: the first log"))?;
            for round in 0..env.fewer(10) {
                let n = 1 + rng.below(200) as u32;
                let written = g.burst(n)?;
                let what = format!("{what}: round {round}");
                g.harvest(protect)?.expect(&written, &what)?;
            }
            g.harvest(protect)?
                .expect(&Bitmap::new(g.pages), "nothing was written")?;
        }
    }
    Ok(())
}

fn exact_small(env: &Env) -> Outcome {
    exact(env, Memory::Small)
}

fn exact_huge(env: &Env) -> Outcome {
    exact(env, Memory::Huge)
}

fn exact_hugetlb(env: &Env) -> Outcome {
    exact(env, Memory::Hugetlb)
}

fn exact_memfd(env: &Env) -> Outcome {
    exact(env, Memory::Memfd)
}

/// Bits that are not cleared stay; cleared ones come back with the next write only.
fn clear_some(env: &Env) -> Outcome {
    need_logging(env)?;
    for memory in [Memory::Small, Memory::Huge] {
        let mut rng = Rng::new(env.seed ^ 5);
        let mut g = Guest::new(env, 2, memory.map(2 * HUGE)?, |k, v| {
            Protect::InitiallySet.enable(k, v)
        })?;
        g.log(true)?;
        let mut dirty = Bitmap::full(g.pages);
        for round in 0..env.fewer(30) {
            let log = get_log(&g.vm, SLOT, g.pages)?;
            log.expect(&dirty, &format!("{memory:?}: round {round}"))?;
            // A range of the log, and in it any bits: set ones, clear ones.
            let words = g.pages as u64 / 64;
            let first = rng.below(words);
            let n = rng.below(words - first) + 1;
            let bits: Vec<u64> = (0..n).map(|_| rng.number() | rng.number()).collect();
            clear_log_at(
                &g.vm,
                SLOT,
                first * 64,
                n as u32 * 64,
                bits.as_ptr() as usize,
            )?;
            for (i, b) in bits.iter().enumerate() {
                dirty.words[first as usize + i] &= !b;
            }
            dirty.add(&g.burst(1 + rng.below(60) as u32)?);
        }
    }
    Ok(())
}

/// While vCPUs write, a copy that follows the log ends up equal.
fn running(env: &Env, memory: Memory) -> Outcome {
    need_logging(env)?;
    for protect in PROTECT {
        for vcpus in [1, 2, 4] {
            println!("{protect:?}, {vcpus} vCPUs");
            let mut g = Guest::new(env, vcpus, memory.map(RUNNING)?, |k, v| {
                protect.enable(k, v)
            })?;
            g.log(true)?;
            chase(
                &mut g,
                env.fewer(4).max(2),
                |_| false,
                |g| Ok(g.harvest(protect)?),
                |_, _| Ok(()),
            )?;
        }
    }
    Ok(())
}

fn running_small(env: &Env) -> Outcome {
    running(env, Memory::Small)
}

fn running_huge(env: &Env) -> Outcome {
    running(env, Memory::Huge)
}

/// Pages that are taken away from the guest and that keep what is in them.
fn disturb(g: &Guest, round: u64, offset: usize, len: usize) -> Result<Option<i32>, Verdict> {
    const MADV_COLLAPSE: i32 = 25;
    match round % 5 {
        0 => {
            let _ = g.mem.advise(offset, len, libc::MADV_PAGEOUT);
        }
        1 => g.mem.protect(offset, len, libc::PROT_READ)?,
        2 => {
            // SAFETY: The child only waits for its end.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                // SAFETY: As above.
                unsafe {
                    libc::pause();
                    libc::_exit(0);
                }
            }
            return Ok(Some(pid));
        }
        3 => {
            let _ = g.mem.advise(0, g.mem.len(), MADV_COLLAPSE);
        }
        _ => g.mem.protect(offset, len, libc::PROT_NONE)?,
    }
    Ok(None)
}

/// Ends what [`disturb`] began.
fn recover(g: &Guest, child: Option<i32>) -> Outcome {
    if let Some(pid) = child {
        // SAFETY: Our own child; `status` lives through the call.
        unsafe {
            let mut status = 0;
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, &mut status, 0);
        }
    }
    g.mem
        .protect(0, g.mem.len(), libc::PROT_READ | libc::PROT_WRITE)?;
    Ok(())
}

fn range(rng: &mut Rng, pages: usize) -> (usize, usize) {
    let first = rng.below(pages as u64) as usize;
    let n = 1 + rng.below((pages - first) as u64) as usize;
    (first * PAGE, n * PAGE)
}

/// The host takes pages from under the log: nothing is lost from it.
fn pressure(env: &Env) -> Outcome {
    need_logging(env)?;
    for (memory, protect) in [
        (Memory::Small, Protect::Get),
        (Memory::Huge, Protect::Clear),
        (Memory::Huge, Protect::InitiallySet),
        (Memory::Memfd, Protect::Get),
    ] {
        let mut rng = Rng::new(env.seed ^ 9);
        let mut g = Guest::new(env, 2, memory.map(2 * HUGE)?, |k, v| protect.enable(k, v))?;
        g.log(true)?;
        g.harvest(protect)?;
        for round in 0..env.fewer(15).max(10) {
            // Before the log is read, and after it.
            let mut written = g.burst(1 + rng.below(100) as u32)?;
            let (offset, len) = range(&mut rng, g.pages);
            let child = disturb(&g, round, offset, len)?;
            if child.is_none() {
                recover(&g, None)?;
            }
            written.add(&g.burst(1 + rng.below(100) as u32)?);
            if child.is_some() {
                recover(&g, child)?;
            }
            if round % 3 == 0 {
                g.mem.advise(offset, len, libc::MADV_DONTNEED)?;
            }
            let log = g.harvest(protect)?;
            let what = format!("{memory:?}, {protect:?}: round {round}");
            log.expect(&written, &what)?;
            let child = disturb(&g, round + 1, offset, len)?;
            recover(&g, child)?;
        }
    }
    Ok(())
}

/// The same while the vCPUs run.
fn pressure_running(env: &Env) -> Outcome {
    need_logging(env)?;
    for (memory, protect) in [
        (Memory::Small, Protect::Get),
        (Memory::Huge, Protect::Clear),
        (Memory::Memfd, Protect::InitiallySet),
    ] {
        let mut rng = Rng::new(env.seed ^ 11);
        let mut g = Guest::new(env, 2, memory.map(RUNNING)?, |k, v| protect.enable(k, v))?;
        g.log(true)?;
        chase(
            &mut g,
            env.fewer(5).max(2),
            |_| false,
            |g| Ok(g.harvest(protect)?),
            |g, round| {
                let (offset, len) = range(&mut rng, g.pages);
                let child = disturb(g, round, offset, len)?;
                recover(g, child)
            },
        )?;
    }
    Ok(())
}

/// Logging ends and begins anew: what is written in between is not in the log.
fn off_and_on(env: &Env) -> Outcome {
    need_logging(env)?;
    for memory in [Memory::Small, Memory::Huge] {
        for protect in PROTECT {
            let mut g = Guest::new(env, 2, memory.map(2 * HUGE)?, |k, v| protect.enable(k, v))?;
            for round in 0..env.fewer(5) {
                g.log(true)?;
                let what = format!("{memory:?}, {protect:?}: round {round}");
                let first = g.harvest(protect)?;
                let want = match protect {
                    Protect::InitiallySet => Bitmap::full(g.pages),
                    _ => Bitmap::new(g.pages),
                };
                first.expect(&want, &format!("{what}, the first log"))?;
                let written = g.burst(150)?;
                g.harvest(protect)?.expect(&written, &what)?;
                // Dirty pages whose log no one reads.
                g.burst(50)?;
                g.log(false)?;
                g.burst(150)?;
            }
        }
    }
    Ok(())
}

/// Logging begins and ends while vCPUs write: they go on, and each log has what was written while it
/// was on.
fn toggled_while_running(env: &Env) -> Outcome {
    need_logging(env)?;
    for protect in PROTECT {
        let mut g = Guest::new(env, 2, Memory::Huge.map(RUNNING)?, |k, v| {
            protect.enable(k, v)
        })?;
        let all = g.pages;
        let mut phase = 0;
        chase(
            &mut g,
            env.fewer(10).max(4),
            |_| false,
            |g| {
                phase += 1;
                match phase % 4 {
                    // What was written while it was off is in no log: all has to be copied.
                    1 => g.log(true)?,
                    2 | 3 => return Ok(g.harvest(protect)?),
                    _ => g.log(false)?,
                }
                Ok(Bitmap::full(all))
            },
            |_, _| Ok(()),
        )?;
    }
    Ok(())
}

/// Two slots are logged by themselves, and one that shows the same host memory knows nothing of
/// writes through the other.
fn several_slots(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "2: inc dword ptr [{G} + 0x3000]",
        "inc dword ptr [{G} + 0x1004000]",
        "inc dword ptr [{G} + 0x2005000]",
        "hlt",
        "jmp 2b";
        G = GPA,
    );
    need_logging(env)?;
    let m = Machine::new(env, Mode::Protected, code())?;
    let mem = Memory::Small.map(64 * PAGE)?;
    let (size, hva) = (mem.len() as u64, mem.addr() as u64);
    for (slot, flags) in [(1, LOG), (2, LOG), (3, 0)] {
        m.vm.set_memory(slot, flags, GPA * u64::from(slot), size, hva)?;
    }
    for _ in 0..5 {
        m.expect_hlt()?;
        ensure_eq!(get_log(&m.vm, 1, 64)?.words, [1 << 3], "log of slot 1");
        ensure_eq!(get_log(&m.vm, 2, 64)?.words, [1 << 4], "log of slot 2");
        expect_errno(get_log(&m.vm, 3, 64), libc::ENOENT, "log of slot 3")?;
    }
    // A slot that is deleted takes its log along.
    m.expect_hlt()?;
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    m.vm.set_memory(1, LOG, GPA, size, hva)?;
    ensure_eq!(get_log(&m.vm, 1, 64)?.words, [0], "log of a new slot 1");
    ensure_eq!(get_log(&m.vm, 2, 64)?.words, [1 << 4], "log of slot 2");
    m.expect_hlt()?;
    // One that moves keeps it.
    m.vm.set_memory(2, LOG, GPA * 8, size, hva)?;
    ensure_eq!(
        get_log(&m.vm, 2, 64)?.words,
        [1 << 4],
        "log of slot 2, moved"
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "dirty",
        tests![
            slots,
            readonly_slot,
            bitmap_size,
            bad_buffers,
            manual_capability,
            clear_ranges,
            exact_small => 60,
            exact_huge => 60,
            exact_hugetlb => 60,
            exact_memfd => 60,
            clear_some,
            running_small => 60,
            running_huge => 60,
            pressure => 40,
            pressure_running => 40,
            off_and_on,
            toggled_while_running,
            several_slots,
        ],
    )
}
