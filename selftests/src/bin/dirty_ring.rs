// SPDX-License-Identifier: GPL-2.0

//! Dirty logging by rings, one a vCPU, which the guest fills and the host harvests.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::dirty::{chase, clear_log, get_log, Bitmap, Guest, Memory, GPA, SLOT};
use selftests::machine::{decode, Exit, Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::ring::{
    capability, enable, map_ring, reset, Entry, Ring, CAPS, DIRTY, ENTRY, RESET,
};
use selftests::sys;
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Bytes of a ring, if a test does not say otherwise: room for the entries that the kernel reserves.
const BYTES: usize = 64 << 10;
/// A guest with rings, its slot logged.
fn guest(
    env: &Env,
    vcpus: usize,
    mem: Mapping,
    bytes: usize,
) -> Result<(Guest, Vec<Ring>), Verdict> {
    let g = Guest::new(env, vcpus, mem, |k, v| enable(k, v, bytes))?;
    g.log(true)?;
    let rings: Result<_, _> = g.vcpus.iter().map(|v| Ring::new(v, bytes)).collect();
    Ok((g, rings?))
}

/// A ring's size is a power of two, and rings are there before vCPUs are.
fn enabling(env: &Env) -> Outcome {
    let kvm = env.open()?;
    capability(&kvm)?;
    for cap in CAPS {
        let max = u64::from(kvm.capability(cap).unsigned_abs());
        if max == 0 {
            continue;
        }
        ensure!(max.is_power_of_two() && max >= PAGE as u64, "size {max:#x}");
        let vm = kvm.create_vm()?;
        for bytes in [0, 1, 16, 2048, 4095, 4097, 3 << 14, max - 1, max - 4096] {
            let r = vm.enable_cap(cap, bytes);
            expect_errno(r, libc::EINVAL, &format!("a ring of {bytes:#x} bytes"))?;
        }
        for bytes in [2 * max, 1 << 31] {
            let r = vm.enable_cap(cap, bytes);
            expect_errno(r, libc::E2BIG, &format!("a ring of {bytes:#x} bytes"))?;
        }
        expect_errno(
            vm.fd.ioctl(sys::KVM_RESET_DIRTY_RINGS, 0),
            libc::EINVAL,
            "reset without rings",
        )?;
        vm.enable_cap(cap, max)?;
        let again = vm.enable_cap(cap, max);
        expect_errno(again, libc::EINVAL, "enabled again")?;
        ensure_eq!(reset(&vm)?, 0, "entries reset without a vCPU");
        let _vcpu = vm.create_vcpu(0)?;
        ensure_eq!(reset(&vm)?, 0, "entries reset of a new vCPU");
        let vm = kvm.create_vm()?;
        let _vcpu = vm.create_vcpu(0)?;
        let late = vm.enable_cap(cap, max);
        expect_errno(late, libc::EINVAL, "enabled after a vCPU")?;
        expect_errno(reset(&vm), libc::EINVAL, "reset without rings")?;
    }
    let with_bitmap = kb::KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP;
    if kvm.capability(with_bitmap) == 0 {
        let vm = kvm.create_vm()?;
        enable(&kvm, &vm, BYTES)?;
        let r = vm.enable_cap(with_bitmap, 0);
        expect_errno(r, libc::EINVAL, "a bitmap beside the rings")?;
    }
    Ok(())
}

/// With rings there is no bitmap, whether the slot is logged or not.
fn no_bitmap(env: &Env) -> Outcome {
    let (g, _rings) = guest(env, 1, Memory::Small.map(64 * PAGE)?, BYTES)?;
    for slot in [SLOT, 0, 9, 0xffff] {
        let r = get_log(&g.vm, slot, 64);
        expect_errno(r, libc::ENXIO, &format!("KVM_GET_DIRTY_LOG of slot {slot}"))?;
        let r = clear_log(&g.vm, slot, 64, &Bitmap::new(64));
        expect_errno(
            r,
            libc::ENXIO,
            &format!("KVM_CLEAR_DIRTY_LOG of slot {slot}"),
        )?;
    }
    Ok(())
}

/// A ring can be mapped shared, to read or to write, not private and not to execute.
fn mapping(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    enable(&kvm, &vm, BYTES)?;
    let v = vm.create_vcpu(0)?;
    let (r, w, x) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    for (prot, flags, ok) in [
        (r | w, libc::MAP_SHARED, true),
        (r, libc::MAP_SHARED, true),
        (r | w, libc::MAP_PRIVATE, false),
        (r, libc::MAP_PRIVATE, false),
        (r | x, libc::MAP_SHARED, false),
        (r | w | x, libc::MAP_SHARED, false),
    ] {
        let what = format!("a mapping with {prot:#x}, {flags:#x}");
        match map_ring(&v, BYTES, prot, flags) {
            Ok(p) => {
                ensure!(ok, "{what} succeeded");
                // SAFETY: The mapping is new; its first word is there.
                let first = unsafe { (p as *const u64).read_volatile() };
                ensure_eq!(first, 0, "the first entry of {what}");
                // SAFETY: Nothing refers to the mapping.
                unsafe { libc::munmap(p as *mut _, BYTES) };
            }
            e if ok => {
                e?;
            }
            // The kernel refuses to execute from such a file before it asks KVM.
            Err(e) if prot & x != 0 && e.errno == libc::EPERM => {}
            e => expect_errno(e, libc::EINVAL, &what)?,
        }
    }
    // A mapping that only begins or ends in the ring is judged as the ring is.
    for (page, pages) in [(60usize, 8usize), (64 + BYTES / PAGE - 1, 4)] {
        // SAFETY: As in `map_ring`.
        let p = unsafe {
            let offset = libc::off_t::try_from(page * PAGE).unwrap_or(0);
            let flags = libc::MAP_PRIVATE;
            libc::mmap(std::ptr::null_mut(), pages * PAGE, r, flags, v.fd.0, offset)
        };
        let errno = std::io::Error::last_os_error().raw_os_error();
        ensure!(
            p == libc::MAP_FAILED && errno == Some(libc::EINVAL),
            "a private mapping of {pages} pages from page {page}: {p:?}, {errno:?}"
        );
    }
    // All pages of the ring are there, and what one mapping writes the other reads.
    let (a, b) = (Ring::new(&v, BYTES)?, Ring::new(&v, BYTES)?);
    for page in 0..BYTES / PAGE {
        let e = Entry {
            flags: 0,
            slot: 7,
            offset: page as u64,
        };
        a.write(page * PAGE / ENTRY, e);
        ensure_eq!(b.read(page * PAGE / ENTRY), e, "page {page} of the ring");
    }
    Ok(())
}

/// Entry for entry, a ring has what its vCPU wrote: each page once until it is reset.
fn entries(env: &Env) -> Outcome {
    for memory in [Memory::Small, Memory::Huge, Memory::Memfd] {
        for vcpus in [1, 2, 4] {
            let (mut g, mut rings) = guest(env, vcpus, memory.map(2 * HUGE)?, BYTES)?;
            for round in 0..env.fewer(10) {
                let what = format!("{memory:?}, {vcpus} vCPUs, round {round}");
                let written = g.burst(150)?;
                let mut log = Bitmap::new(g.pages);
                let mut sum = 0;
                for ring in &mut rings {
                    let (set, n) = ring.harvest(g.pages)?;
                    ensure_eq!(n, set.pages().count(), "{what}: entries and pages");
                    log.add(&set);
                    sum += n;
                }
                log.expect(&written, &what)?;
                if round % 3 == 1 {
                    // What is not reset is not tracked, so nothing comes twice.
                    g.burst(10)?;
                    for ring in &mut rings {
                        let (again, _) = ring.harvest(g.pages)?;
                        sum += again.pages().count();
                        let twice = again.pages().any(|p| log.has(p));
                        ensure!(!twice || vcpus > 1, "{what}: a page twice");
                        log.add(&again);
                    }
                }
                ensure_eq!(reset(&g.vm)?, sum, "{what}: entries reset");
                ensure_eq!(reset(&g.vm)?, 0, "{what}: entries reset again");
            }
        }
    }
    Ok(())
}

/// Only what is harvested is reset, in order: an entry that is left out holds up those behind it.
fn partial_reset(env: &Env) -> Outcome {
    let (mut g, mut rings) = guest(env, 1, Memory::Small.map(256 * PAGE)?, BYTES)?;
    let written = g.burst(60)?.pages().count();
    let ring = &mut rings[0];
    for i in (0..10).chain(15..20) {
        ring.flags(i).store(RESET, Ordering::Release);
    }
    ensure_eq!(reset(&g.vm)?, 10, "entries reset up to the gap");
    ensure_eq!(reset(&g.vm)?, 0, "the gap is still there");
    for i in 0..10 {
        ensure_eq!(
            ring.flags(i).load(Ordering::SeqCst),
            0,
            "flags of entry {i}"
        );
    }
    for i in 10..15 {
        ring.flags(i).store(RESET, Ordering::Release);
    }
    ensure_eq!(reset(&g.vm)?, 10, "the gap and what was behind it");
    ring.next = 20;
    ensure_eq!(ring.harvest(g.pages)?.1, written - 20, "the rest");
    ensure_eq!(reset(&g.vm)?, written - 20, "entries of the rest");
    Ok(())
}

/// A ring that is full stops its vCPU until it is reset; nothing is lost.
fn full(env: &Env) -> Outcome {
    let mem = Memory::Huge.map(4 * HUGE)?;
    let bytes = 16 << 10;
    let (mut g, mut rings) = guest(env, 1, mem, bytes)?;
    let ring = &mut rings[0];
    let mut log = Bitmap::new(g.pages);
    let (mut fulls, mut total) = (0, 0);
    g.allow(0, 4000);
    loop {
        g.vcpus[0].run()?;
        match decode(&g.vcpus[0]) {
            Exit::Hlt => break,
            Exit::Other(kb::KVM_EXIT_DIRTY_RING_FULL) => {}
            other => fail!("exit {other:x?}"),
        }
        fulls += 1;
        // It does not run before there is room.
        for _ in 0..3 {
            let r = g.vcpus[0].run()?;
            ensure_eq!(r, kb::KVM_EXIT_DIRTY_RING_FULL, "exit without a reset");
        }
        let (set, n) = ring.harvest(g.pages)?;
        ensure!(n > 0 && n <= bytes / ENTRY, "{n} entries of a full ring");
        let r = g.vcpus[0].run()?;
        ensure_eq!(r, kb::KVM_EXIT_DIRTY_RING_FULL, "exit before the reset");
        ensure_eq!(reset(&g.vm)?, n, "entries reset");
        total += n;
        log.add(&set);
    }
    let (set, n) = ring.harvest(g.pages)?;
    log.add(&set);
    println!("full {fulls} times, {} entries", total + n);
    ensure!(fulls > 1, "a ring of {bytes} bytes was not full");
    let mut written = Bitmap::new(g.pages);
    g.trace(0).into_iter().for_each(|p| written.set(p));
    log.expect(&written, "all entries")
}

/// vCPUs fill their rings while the host harvests: a copy that follows them ends up equal.
fn running(env: &Env) -> Outcome {
    for (memory, vcpus, bytes) in [
        (Memory::Small, 1, BYTES),
        (Memory::Small, 2, 16 << 10),
        (Memory::Huge, 4, 16 << 10),
        (Memory::Memfd, 2, BYTES),
    ] {
        let (mut g, mut rings) = guest(env, vcpus, memory.map(4 * HUGE)?, bytes)?;
        chase(
            &mut g,
            env.fewer(10).max(4),
            |v| decode(v) == Exit::Other(kb::KVM_EXIT_DIRTY_RING_FULL),
            |g| {
                let mut log = Bitmap::new(g.pages);
                let mut sum = 0;
                for ring in &mut rings {
                    let (set, n) = ring.harvest(g.pages)?;
                    log.add(&set);
                    sum += n;
                }
                ensure_eq!(reset(&g.vm)?, sum, "entries reset");
                Ok(log)
            },
            |_, _| Ok(()),
        )?;
    }
    Ok(())
}

/// Each slot has its number in the entries; one that is not logged has no entries.
fn slots(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "2: inc dword ptr [{G} + 0x3000]",
        "inc dword ptr [{G} + 0x1004000]",
        "inc dword ptr [{G} + 0x2005000]",
        "hlt",
        "jmp 2b";
        G = GPA,
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    // A machine of its own: rings come before the vCPU.
    let vm = m.kvm.create_vm()?;
    enable(&m.kvm, &vm, BYTES)?;
    selftests::machine::set_special_pages(&vm)?;
    vm.set_memory(0, 0, 0, m.mem.len() as u64, m.mem.addr() as u64)?;
    let v = vm.create_vcpu(0)?;
    selftests::machine::start_vcpu(&v, Mode::Protected, selftests::guest::at::CODE)?;
    let mem = Memory::Small.map(64 * PAGE)?;
    let (size, hva) = (mem.len() as u64, mem.addr() as u64);
    for (slot, flags) in [(1, 1), (20, 1), (3, 0)] {
        let gpa = GPA * if slot == 20 { 2 } else { u64::from(slot) };
        vm.set_memory(slot, flags, gpa, size, hva)?;
    }
    let mut ring = Ring::new(&v, BYTES)?;
    for round in 0..5 {
        ensure_eq!(v.run()?, kb::KVM_EXIT_HLT, "exit");
        let mut got: Vec<_> = std::iter::from_fn(|| ring.take())
            .map(|e| (e.slot, e.offset))
            .collect();
        got.sort_unstable();
        ensure_eq!(got, [(1, 3), (20, 4)], "slots and offsets, round {round}");
        ensure_eq!(reset(&vm)?, 2, "entries reset");
    }
    // An entry of a slot that goes before it is reset.
    ensure_eq!(v.run()?, kb::KVM_EXIT_HLT, "exit");
    vm.set_memory(20, 0, 0, 0, 0)?;
    let n = std::iter::from_fn(|| ring.take()).count();
    ensure_eq!(
        (n, reset(&vm)?),
        (2, 2),
        "entries, one of a slot that is gone"
    );
    Ok(())
}

/// What the host writes into entries is the host's affair: a reset names pages that are not there, or
/// others, and no more comes of it than that those are tracked anew, or not.
fn hostile(env: &Env) -> Outcome {
    let (mut g, mut rings) = guest(env, 1, Memory::Huge.map(2 * HUGE)?, BYTES)?;
    let ring = &mut rings[0];
    let pages = g.pages as u64;
    for round in 0..env.fewer(10) {
        g.burst(64)?;
        let filled = |i: &usize| ring.flags(ring.next + i).load(Ordering::Acquire) & DIRTY != 0;
        let n = (0..BYTES / ENTRY).take_while(filled).count();
        for i in 0..n {
            let at = ring.next + i;
            let e = ring.read(at);
            let (slot, offset) = match (i as u64 + round) % 12 {
                0 => (u32::MAX, e.offset),
                1 => (e.slot, u64::MAX),
                2 => (e.slot, pages),
                3 => (e.slot, pages - 1),
                4 => (e.slot | (1 << 16), e.offset),
                5 => (0, 0),
                6 => (0, u64::MAX - 63),
                7 => (0x7fff, 0),
                8 => (e.slot, 1 << 63),
                9 => (e.slot, e.offset ^ 63),
                10 => (e.slot + 1, e.offset),
                _ => (e.slot, e.offset),
            };
            let flags = RESET | ((round as u32) << 2);
            ring.write(
                at,
                Entry {
                    flags,
                    slot,
                    offset,
                },
            );
        }
        ring.next += n;
        ensure_eq!(reset(&g.vm)?, n, "entries reset, round {round}");
    }
    // An honest round still works, for the pages that are still tracked.
    g.log(false)?;
    g.log(true)?;
    let written = g.burst(64)?;
    let (log, n) = ring.harvest(g.pages)?;
    log.expect(&written, "the log after it was turned on anew")?;
    ensure_eq!(reset(&g.vm)?, n, "entries reset");
    // Entries that no one filled are reset when they say so, once around at most in a call that ends.
    for i in 0..BYTES / ENTRY {
        let e = Entry {
            flags: RESET,
            slot: SLOT,
            offset: i as u64 % pages,
        };
        ring.write(ring.next + i, e);
    }
    let r = reset(&g.vm);
    println!("reset of a ring that is full of made-up entries: {r:?}");
    // The in-tree KVM warns, in its log, of a vCPU that goes on with such a ring.
    if env.device != "/dev/kvm" {
        g.allow(0, 64);
        for _ in 0..4 {
            match g.vcpus[0].run() {
                Ok(kb::KVM_EXIT_DIRTY_RING_FULL | kb::KVM_EXIT_HLT) => {}
                other => fail!("KVM_RUN with such a ring: {other:?}"),
            }
        }
    }
    Ok(())
}

/// One thread writes at random into the ring while vCPU and resets go on.
fn scribbled(env: &Env) -> Outcome {
    // The in-tree KVM warns, in its log, of a vCPU that goes on after made-up entries were reset.
    let flags = if env.device == "/dev/kvm" {
        DIRTY
    } else {
        DIRTY | RESET
    };
    let (mut g, rings) = guest(env, 1, Memory::Huge.map(2 * HUGE)?, 16 << 10)?;
    let mut rng = selftests::host::Rng::new(env.seed);
    for _ in 0..env.fewer(300) {
        g.allow(0, 40);
        match g.vcpus[0].run()? {
            kb::KVM_EXIT_DIRTY_RING_FULL | kb::KVM_EXIT_HLT => {}
            other => fail!("exit {other}"),
        }
        g.trace(0);
        for _ in 0..40 {
            let e = Entry {
                flags: rng.number() as u32 & flags,
                slot: if rng.below(2) == 0 {
                    SLOT
                } else {
                    rng.number() as u32
                },
                offset: rng.below(2 * g.pages as u64),
            };
            rings[0].write(rng.below(16 << 10) as usize, e);
        }
        reset(&g.vm)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "dirty_ring",
        tests![
            enabling,
            no_bitmap,
            mapping,
            entries => 40,
            partial_reset,
            full,
            running => 40,
            slots,
            hostile,
            scribbled,
        ],
    )
}
