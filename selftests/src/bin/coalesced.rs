// SPDX-License-Identifier: GPL-2.0

//! Zones whose writes are coalesced: they go to a ring which the host reads when it likes, and the
//! guest goes on.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, usize_of, PORT};
use selftests::host::{sleep_ms, Rng};
use selftests::machine::{decode, start_vcpu, Exit, Machine, Mode};
use selftests::mem::{Mapping, PAGE};
use selftests::sys::{self, Error};
use selftests::vm::{Vcpu, Vm};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Entries of a ring; one of them is always free.
const MAX: u32 = ((PAGE - 8) / 24) as u32;

/// What an entry says of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    addr: u64,
    pio: bool,
    data: Vec<u8>,
}

fn memory(addr: u64, data: &[u8]) -> Write {
    Write {
        addr,
        pio: false,
        data: data.to_vec(),
    }
}

fn port(number: u16, data: &[u8]) -> Write {
    Write {
        addr: number.into(),
        pio: true,
        data: data.to_vec(),
    }
}

/// The ring, in the mapping of a vCPU.
struct Ring(usize);

impl Ring {
    fn of(m: &Machine) -> Result<Self, Verdict> {
        Self::in_mapping(&m.vcpu, offset(m)?)
    }

    fn in_mapping(v: &Vcpu, page: usize) -> Result<Self, Verdict> {
        ensure!(
            (page + 1) * PAGE <= v.run_size(),
            "the ring is outside of the mapping"
        );
        Ok(Ring(v.run_addr() + page * PAGE))
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: The ring lies in the mapping of a vCPU, which the test keeps.
        unsafe { AtomicU32::from_ptr(self.0 as *mut u32) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: As above.
        unsafe { AtomicU32::from_ptr((self.0 + 4) as *mut u32) }
    }

    fn entry(&self, index: u32) -> Write {
        // SAFETY: As above; MAX entries fit into the page.
        let e = unsafe {
            let p = (self.0 + 8) as *const kb::kvm_coalesced_mmio;
            p.add((index % MAX) as usize).read_volatile()
        };
        // SAFETY: Both members are the same integer.
        let pio = unsafe { e.__bindgen_anon_1.pio };
        Write {
            addr: e.phys_addr,
            pio: pio != 0,
            data: e.data[..(e.len as usize).min(8)].to_vec(),
        }
    }

    /// Takes the oldest entry.
    fn take(&self) -> Option<Write> {
        let first = self.first().load(Ordering::SeqCst);
        if first == self.last().load(Ordering::SeqCst) {
            return None;
        }
        let e = self.entry(first);
        self.first().store((first + 1) % MAX, Ordering::SeqCst);
        Some(e)
    }

    fn all(&self) -> Vec<Write> {
        std::iter::from_fn(|| self.take()).collect()
    }
}

/// The page of a vCPU's mapping in which the ring is; skips if there is none.
fn offset(m: &Machine) -> Result<usize, Verdict> {
    match usize::try_from(m.kvm.capability(kb::KVM_CAP_COALESCED_MMIO)) {
        Ok(n) if n > 0 => Ok(n),
        _ => skip!("no KVM_CAP_COALESCED_MMIO"),
    }
}

fn need_ports(m: &Machine) -> Outcome {
    if m.kvm.capability(kb::KVM_CAP_COALESCED_PIO) <= 0 {
        skip!("no KVM_CAP_COALESCED_PIO");
    }
    Ok(())
}

fn zone(addr: u64, size: u32, pio: u32) -> kb::kvm_coalesced_mmio_zone {
    kb::kvm_coalesced_mmio_zone {
        addr,
        size,
        __bindgen_anon_1: kb::kvm_coalesced_mmio_zone__bindgen_ty_1 { pio },
    }
}

fn register(vm: &Vm, addr: u64, size: u32, pio: u32) -> Result<(), Error> {
    let z = zone(addr, size, pio);
    vm.fd.ioctl_ref(sys::KVM_REGISTER_COALESCED_MMIO, &z)?;
    Ok(())
}

fn unregister(vm: &Vm, addr: u64, size: u32, pio: u32) -> Result<(), Error> {
    let z = zone(addr, size, pio);
    vm.fd.ioctl_ref(sys::KVM_UNREGISTER_COALESCED_MMIO, &z)?;
    Ok(())
}

/// Runs from the start with RDI at an address, to HLT, without another exit.
fn to_hlt(m: &Machine, rdi: u64) -> Outcome {
    restart(m, rdi)?;
    m.expect_hlt()
}

fn restart(m: &Machine, rdi: u64) -> Outcome {
    m.patch_regs(|r| {
        r.rip = at::CODE;
        r.rdi = rdi;
    })?;
    Ok(())
}

/// What the calls take and refuse.
fn arguments(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    offset(&m)?;
    for pio in [2, 3, u32::MAX] {
        let what = format!("pio {pio:#x}");
        expect_errno(register(&m.vm, at::MMIO, 16, pio), libc::EINVAL, &what)?;
        expect_errno(unregister(&m.vm, at::MMIO, 16, pio), libc::EINVAL, &what)?;
    }
    for call in [
        sys::KVM_REGISTER_COALESCED_MMIO,
        sys::KVM_UNREGISTER_COALESCED_MMIO,
    ] {
        expect_errno(
            m.vm.fd.ioctl(call, 8),
            libc::EFAULT,
            "bad address of the argument",
        )?;
    }
    // None is there, and none need be.
    unregister(&m.vm, at::MMIO, 16, 0)?;
    for (addr, size) in [
        (0, 0),
        (u64::MAX, 1),
        (u64::MAX - 7, 8),
        (u64::MAX, u32::MAX),
        (0, u32::MAX),
    ] {
        register(&m.vm, addr, size, 0)?;
        unregister(&m.vm, addr, size, 0)?;
    }
    m.expect_hlt()
}

/// Writes of all sizes, one by one, with nothing before or behind their data.
fn sizes(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov rax, 0x8877665544332211",
        "mov [rdi], al",
        "mov [rdi + 2], ax",
        "mov [rdi + 4], eax",
        "mov [rdi + 8], rax",
        "mov byte ptr [rdi + 1], 0x5a",
        "mov dword ptr [rdi + 12], 0x12345678",
        "mov ecx, 3",
        "lea rdi, [rdi + 16]",
        "rep stosd",
        "mov esi, {D}",
        "movsb",
        "movsq",
        "mov ecx, 2",
        "rep movsw",
        "hlt";
        D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let ring = Ring::of(&m)?;
    m.mem.write_bytes(usize_of(at::DATA), b"abcdefghijklm");
    let base = at::MMIO + 0x100;
    register(&m.vm, base, 0x100, 0)?;
    to_hlt(&m, base)?;
    let rax = 0x8877_6655_4433_2211u64.to_le_bytes();
    let want = vec![
        memory(base, &rax[..1]),
        memory(base + 2, &rax[..2]),
        memory(base + 4, &rax[..4]),
        memory(base + 8, &rax),
        memory(base + 1, &[0x5a]),
        memory(base + 12, &[0x78, 0x56, 0x34, 0x12]),
        memory(base + 16, &rax[..4]),
        memory(base + 20, &rax[..4]),
        memory(base + 24, &rax[..4]),
        memory(base + 28, b"a"),
        memory(base + 29, b"bcdefghi"),
        memory(base + 37, b"jk"),
        memory(base + 39, b"lm"),
    ];
    ensure_eq!(ring.all(), want, "the ring");
    // Without the zone, all of them are exits.
    unregister(&m.vm, base, 0x100, 0)?;
    restart(&m, base)?;
    for w in want {
        m.expect(&Exit::MmioWrite {
            addr: w.addr,
            data: w.data,
        })?;
    }
    m.expect_hlt()?;
    ensure_eq!(ring.all(), [], "the ring without a zone");
    Ok(())
}

/// Ports are zones too: each element of a string by itself.
fn ports(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov eax, 0x44332211",
        "out {P}, al",
        "out {P}, ax",
        "mov edx, {P} + 1",
        "out dx, eax",
        "mov esi, {D}",
        "mov edx, {P}",
        "outsb",
        "mov ecx, 3",
        "rep outsw",
        "in al, {P}",
        "hlt";
        D = at::DATA, P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let ring = Ring::of(&m)?;
    need_ports(&m)?;
    m.mem.write_bytes(usize_of(at::DATA), b"abcdefg");
    register(&m.vm, PORT.into(), 8, 1)?;
    // The same number as memory is another zone.
    register(&m.vm, 0x4000_0000, 8, 0)?;
    restart(&m, 0)?;
    m.expect(&Exit::In {
        port: PORT,
        size: 1,
        count: 1,
    })?;
    m.io_reply(&[9]);
    m.expect_hlt()?;
    let want = [
        port(PORT, &[0x11]),
        port(PORT, &[0x11, 0x22]),
        port(PORT + 1, &[0x11, 0x22, 0x33, 0x44]),
        port(PORT, b"a"),
        port(PORT, b"bc"),
        port(PORT, b"de"),
        port(PORT, b"fg"),
    ];
    ensure_eq!(ring.all(), want, "the ring");
    // A zone of memory at the port's number is none of its writes.
    unregister(&m.vm, PORT.into(), 8, 1)?;
    register(&m.vm, PORT.into(), 8, 0)?;
    restart(&m, 0)?;
    m.expect(&Exit::Out {
        port: PORT,
        size: 1,
        data: vec![0x11],
    })
}

guest_code!(store4, ".code64", "mov dword ptr [rdi], 0x44332211", "hlt");

const WORD: [u8; 4] = [0x11, 0x22, 0x33, 0x44];

/// Whether a write of four bytes at `addr` is coalesced.
fn coalesced(m: &Machine, ring: &Ring, addr: u64) -> Result<bool, Verdict> {
    restart(m, addr)?;
    match m.run()? {
        Exit::Hlt => {
            ensure_eq!(ring.all(), [memory(addr, &WORD)], "the ring");
            Ok(true)
        }
        Exit::MmioWrite { addr: a, data } => {
            ensure_eq!((a, &data[..]), (addr, &WORD[..]), "the exit");
            ensure_eq!(ring.all(), [], "the ring, at an exit");
            m.expect_hlt()?;
            Ok(false)
        }
        other => fail!("exit {other:x?}\n{}", m.describe()),
    }
}

/// A write has to be in the zone as a whole.
fn borders(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, store4())?;
    let ring = Ring::of(&m)?;
    let base = at::MMIO + 0x2000;
    register(&m.vm, base + 0x100, 0x20, 0)?;
    for (offset, want) in [
        (0xf0, false),
        (0xfc, false),
        (0xfd, false),
        (0xff, false),
        (0x100, true),
        (0x101, true),
        (0x11c, true),
        (0x11d, false),
        (0x11f, false),
        (0x120, false),
        (0x1100, false),
    ] {
        let got = coalesced(&m, &ring, base + offset)?;
        ensure_eq!(
            got,
            want,
            "coalesced at offset {offset:#x} of 0x100 to 0x11f"
        );
    }
    // Neighbours are not one zone.
    register(&m.vm, base + 0x120, 0x20, 0)?;
    for (offset, want) in [
        (0x11c, true),
        (0x11e, false),
        (0x120, true),
        (0x13c, true),
        (0x13e, false),
    ] {
        let got = coalesced(&m, &ring, base + offset)?;
        ensure_eq!(got, want, "coalesced at offset {offset:#x} of two zones");
    }
    // A write across two pages is two.
    register(&m.vm, base + 0xff0, 0x10, 0)?;
    restart(&m, base + 0xffe)?;
    m.expect(&Exit::MmioWrite {
        addr: base + 0x1000,
        data: WORD[2..].to_vec(),
    })?;
    m.expect_hlt()?;
    ensure_eq!(
        ring.all(),
        [memory(base + 0xffe, &WORD[..2])],
        "the first of two pages"
    );
    Ok(())
}

/// A read of a zone is an exit, and so is that of an instruction which writes what it read.
fn reads(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov eax, [rdi]",
        "or dword ptr [rdi], 0x100",
        "hlt"
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let ring = Ring::of(&m)?;
    register(&m.vm, at::MMIO, 0x1000, 0)?;
    restart(&m, at::MMIO + 8)?;
    for value in [7u32, 0x1001] {
        m.expect(&Exit::MmioRead {
            addr: at::MMIO + 8,
            len: 4,
        })?;
        m.mmio_reply(&value.to_le_bytes());
        ensure_eq!(ring.all(), [], "the ring at a read");
    }
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 7, "what was read");
    let want = [memory(at::MMIO + 8, &0x1101u32.to_le_bytes())];
    ensure_eq!(ring.all(), want, "what was written");
    Ok(())
}

// EDI: the zone; writes EAX counting from 1 to EBP.
guest_code!(
    sequence,
    ".code64",
    "xor eax, eax",
    "2: inc eax",
    "mov [rdi], eax",
    "cmp eax, ebp",
    "jb 2b",
    "hlt",
);

/// When the ring is full, writes are exits, until the host has taken some.
fn overflow(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, sequence())?;
    let ring = Ring::of(&m)?;
    register(&m.vm, at::MMIO, 0x1000, 0)?;
    m.patch_regs(|r| r.rbp = 600)?;
    restart(&m, at::MMIO)?;
    let word = |n: u32| n.to_le_bytes().to_vec();
    let mut next = 1;
    for (took, room) in [(0, MAX - 1), (1, 1), (5, 5), (MAX - 1, MAX - 1)] {
        for n in 0..took {
            let e = ring.take();
            ensure!(e.is_some(), "entry {n} of {took}");
        }
        next += room;
        m.expect(&Exit::MmioWrite {
            addr: at::MMIO,
            data: word(next),
        })?;
        next += 1;
        // Still full.
        m.expect(&Exit::MmioWrite {
            addr: at::MMIO,
            data: word(next),
        })?;
        next += 1;
    }
    let all = ring.all();
    ensure_eq!(all.len(), MAX as usize - 1, "entries of a full ring");
    for (i, w) in all.iter().rev().enumerate() {
        let want = memory(at::MMIO, &word(next - 3 - i as u32));
        ensure_eq!(*w, want, "entry {i} from the end");
    }
    Ok(())
}

/// Zones come and go: of several, each by itself; and to take one away means all that have it inside.
fn several(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, store4())?;
    let ring = Ring::of(&m)?;
    let at = |i: u64| at::MMIO + i * 0x800;
    for i in [5, 1, 9, 3, 7] {
        register(&m.vm, at(i), 0x40, 0)?;
    }
    for i in 0..11 {
        let got = coalesced(&m, &ring, at(i) + 0x10)?;
        ensure_eq!(got, i % 2 == 1, "zone {i} of 1, 3, 5, 7, 9");
    }
    for gone in [5u64, 1, 9, 3, 7] {
        unregister(&m.vm, at(gone), 0x40, 0)?;
        ensure!(
            !coalesced(&m, &ring, at(gone))?,
            "zone {gone} is still there"
        );
    }
    for i in 0..11 {
        ensure!(!coalesced(&m, &ring, at(i))?, "zone {i} is still there");
    }
    // A range that is more than the zone takes nothing away, one that is less does.
    register(&m.vm, at(2), 0x40, 0)?;
    unregister(&m.vm, at(2), 0x41, 0)?;
    unregister(&m.vm, at(2) - 1, 0x40, 0)?;
    unregister(&m.vm, at(2), 0x40, 1)?;
    ensure!(coalesced(&m, &ring, at(2))?, "the zone is gone");
    unregister(&m.vm, at(2) + 4, 4, 0)?;
    ensure!(!coalesced(&m, &ring, at(2))?, "the zone is still there");
    // Twice the same: both go at once.
    register(&m.vm, at(2), 0x40, 0)?;
    register(&m.vm, at(2), 0x40, 0)?;
    ensure!(coalesced(&m, &ring, at(2))?, "one of two");
    unregister(&m.vm, at(2), 0x40, 0)?;
    ensure!(!coalesced(&m, &ring, at(2))?, "one of two is still there");
    Ok(())
}

/// There may be a thousand zones on each bus.
fn limit(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, store4())?;
    let ring = Ring::of(&m)?;
    for i in 0..1000 {
        register(&m.vm, at::MMIO + i * 16, 8, 0)?;
    }
    let more = register(&m.vm, at::MMIO + 16000, 8, 0);
    expect_errno(more, libc::ENOSPC, "zone 1001")?;
    for i in [0, 1, 499, 998, 999] {
        ensure!(coalesced(&m, &ring, at::MMIO + i * 16)?, "zone {i}");
        ensure!(
            !coalesced(&m, &ring, at::MMIO + i * 16 + 8)?,
            "behind zone {i}"
        );
    }
    if m.kvm.capability(kb::KVM_CAP_COALESCED_PIO) > 0 {
        register(&m.vm, PORT.into(), 8, 1)?;
    }
    unregister(&m.vm, at::MMIO + 500 * 16, 8, 0)?;
    register(&m.vm, at::MMIO + 16000, 8, 0)?;
    ensure!(
        coalesced(&m, &ring, at::MMIO + 16000)?,
        "a zone in the place of one that went"
    );
    Ok(())
}

/// Runs a vCPU of [`two_vcpus`] to HLT; the values of the writes that were exits.
fn writes_that_exit(v: &Vcpu, done: &AtomicBool) -> Result<Vec<u32>, Verdict> {
    let mut exits = vec![];
    let r = loop {
        match v.run().map(|_| decode(v)) {
            Ok(Exit::MmioWrite { data, .. }) if data.len() == 4 => {
                exits.push(u32::from_le_bytes([data[0], data[1], data[2], data[3]]));
            }
            Ok(Exit::Hlt) => break Ok(exits),
            Ok(other) => break Err(Verdict::Fail(format!("exit {other:x?}"))),
            Err(e) => break Err(e.into()),
        }
    };
    done.store(true, Ordering::SeqCst);
    r
}

/// Two vCPUs write at once: each write is in the ring or an exit, once, and those of a vCPU are in
/// order.
fn two_vcpus(env: &Env) -> Outcome {
    let n = env.fewer(3000) as u32;
    let m = Machine::new(env, Mode::Long, sequence())?;
    let page = offset(&m)?;
    let second = m.vm.create_vcpu(1)?;
    let ring = Ring::of(&m)?;
    let other = Ring::in_mapping(&second, page)?;
    register(&m.vm, at::MMIO, 0x10, 0)?;
    let vcpus = [&m.vcpu, &second];
    second.set_cpuid(&*m.kvm.supported_cpuid()?)?;
    for (i, v) in vcpus.iter().enumerate() {
        start_vcpu(v, Mode::Long, at::CODE)?;
        let mut r = v.regs()?;
        r.rdi = at::MMIO + i as u64 * 8;
        r.rbp = n.into();
        v.set_regs(&r)?;
    }
    let (done, done2) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut seen = vec![vec![0u32; n as usize + 1]; 2];
    std::thread::scope(|scope| -> Outcome {
        let a = scope.spawn(|| writes_that_exit(&m.vcpu, &done));
        let b = scope.spawn(|| writes_that_exit(&second, &done2));
        let mut last = [0, 0];
        let mut rng = Rng::new(env.seed);
        let mut drain = || -> Outcome {
            // Through either mapping: it is one ring.
            for w in if rng.below(2) == 0 { &ring } else { &other }.all() {
                let vcpu = usize_of((w.addr - at::MMIO) / 8) % 2;
                ensure_eq!(w.data.len(), 4, "bytes of {w:x?}");
                let value = u32::from_le_bytes([w.data[0], w.data[1], w.data[2], w.data[3]]);
                ensure!(
                    value > last[vcpu] && value <= n,
                    "{value} after {}",
                    last[vcpu]
                );
                last[vcpu] = value;
                seen[vcpu][value as usize] += 1;
            }
            Ok(())
        };
        let mut r = Ok(());
        while !(done.load(Ordering::SeqCst) && done2.load(Ordering::SeqCst)) {
            r = r.and_then(|()| drain());
            // Long enough for the ring to become full now and then.
            sleep_ms(5);
        }
        r?;
        drain()?;
        for (i, t) in [a, b].into_iter().enumerate() {
            let exits = t.join().unwrap_or(Err(Verdict::Fail("panic".into())))?;
            println!("vCPU {i}: {} of {n} writes were exits", exits.len());
            exits.iter().for_each(|v| seen[i][*v as usize] += 1);
        }
        Ok(())
    })?;
    for (vcpu, s) in seen.iter().enumerate() {
        for (value, times) in s.iter().enumerate().skip(1) {
            ensure_eq!(
                *times,
                1,
                "times that write {value} of vCPU {vcpu} was seen"
            );
        }
    }
    Ok(())
}

/// The host may write anything to the ring's indices: a write goes to where `last` says, if that is an
/// entry and not full, and else it is an exit. The guest's memory and the next VM know nothing of it.
fn hostile(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, store4())?;
    let ring = Ring::of(&m)?;
    register(&m.vm, at::MMIO, 0x1000, 0)?;
    let mut rng = Rng::new(env.seed);
    let edge = |rng: &mut Rng| match rng.below(4) {
        0 => [0, 1, MAX - 1, MAX, MAX + 1, u32::MAX][rng.below(6) as usize],
        1 => rng.number() as u32,
        _ => rng.below(u64::from(MAX)) as u32,
    };
    for _ in 0..env.fewer(600) {
        let (first, last) = (edge(&mut rng), edge(&mut rng));
        ring.first().store(first, Ordering::SeqCst);
        ring.last().store(last, Ordering::SeqCst);
        let what = format!("first {first:#x}, last {last:#x}");
        restart(&m, at::MMIO + 8)?;
        let fits = last < MAX && (last + 1) % MAX != first;
        match m.run()? {
            Exit::Hlt => {
                ensure!(fits, "{what}: coalesced");
                let now = ring.last().load(Ordering::SeqCst);
                ensure_eq!(now, (last + 1) % MAX, "{what}: the new last");
                ensure_eq!(
                    ring.entry(last),
                    memory(at::MMIO + 8, &WORD),
                    "{what}: the entry"
                );
            }
            Exit::MmioWrite { .. } => {
                ensure!(!fits, "{what}: an exit");
                m.expect_hlt()?;
                ensure_eq!(ring.last().load(Ordering::SeqCst), last, "{what}: last");
            }
            other => fail!("{what}: exit {other:x?}"),
        }
        ensure_eq!(ring.first().load(Ordering::SeqCst), first, "{what}: first");
    }
    // Scribbled all over while a guest writes.
    m.start(Mode::Long, sequence())?;
    m.patch_regs(|r| r.rbp = 3000)?;
    restart(&m, at::MMIO)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        scope.spawn(|| {
            let mut rng = Rng::new(7);
            while !done.load(Ordering::SeqCst) {
                ring.first().store(edge(&mut rng), Ordering::SeqCst);
                ring.last().store(edge(&mut rng), Ordering::SeqCst);
                std::thread::yield_now();
            }
        });
        let r = loop {
            match m.run() {
                Ok(Exit::MmioWrite { .. }) => {}
                Ok(Exit::Hlt) => break Ok(()),
                other => break Err(Verdict::Fail(format!("exit {other:x?}"))),
            }
        };
        done.store(true, Ordering::SeqCst);
        r
    })
}

// For each of EBP pages from EDI: read, write, read.
guest_code!(
    touch,
    ".code64",
    "2: mov eax, [rdi]",
    "mov [rdi + 4], ebp",
    "mov ebx, [rdi + 4]",
    "out {P}, eax",
    "hlt",
    "add rdi, 4096",
    "dec ebp",
    "jnz 2b",
    "hlt";
    P = PORT,
);

/// One page of [`touch`]: as a device, or as memory at `mem`.
fn touch_page(
    m: &Machine,
    gpa: u64,
    mem: Option<(&Mapping, usize)>,
    count: u32,
    what: &str,
) -> Outcome {
    match mem {
        None => {
            m.expect(&Exit::MmioRead { addr: gpa, len: 4 })?;
            m.mmio_reply(&0x5150u32.to_le_bytes());
            m.expect(&Exit::MmioWrite {
                addr: gpa + 4,
                data: count.to_le_bytes().to_vec(),
            })?;
            m.expect(&Exit::MmioRead {
                addr: gpa + 4,
                len: 4,
            })?;
            m.mmio_reply(&count.to_le_bytes());
            ensure_eq!(m.expect_out(PORT)?, 0x5150, "{what}: read of the device");
        }
        Some((mem, offset)) => {
            let want: u32 = mem.read(offset);
            ensure_eq!(m.expect_out(PORT)?, want.into(), "{what}: read of memory");
            ensure_eq!(
                mem.read::<u32>(offset + 4),
                count,
                "{what}: write to memory"
            );
        }
    }
    m.expect_hlt()
}

/// Where a device was found, time and again, there may be memory next, and then a device once more.
fn devices_and_slots(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, touch())?;
    let mem = Mapping::new(16 * PAGE, false)?;
    let base = at::MMIO;
    for round in 0..env.fewer(12) as u32 {
        for i in 0..16 {
            mem.write(i * PAGE, 0xabc0_0000 + round * 16 + i as u32);
        }
        // None, all, the first half in a slot of its own, every second one.
        let there: fn(u64) -> bool = match round % 4 {
            0 => |_| false,
            1 => |_| true,
            2 => |i| i < 8,
            _ => |i| i % 2 == 0,
        };
        for i in (0..16).filter(|i| there(*i)) {
            let hva = mem.addr() as u64 + i * 4096;
            m.vm.set_memory(10 + i as u32, 0, base + i * 4096, 4096, hva)?;
        }
        for again in 0..2 {
            m.patch_regs(|r| {
                r.rip = at::CODE;
                r.rdi = base;
                r.rbp = 16;
            })?;
            for i in 0..16u64 {
                let page = there(i).then_some((&mem, usize_of(i) * PAGE));
                let what = format!("round {round}.{again}, page {i}");
                touch_page(&m, base + i * 4096, page, 16 - i as u32, &what)?;
            }
            m.expect_hlt()?;
        }
        for i in (0..16).filter(|i| there(*i)) {
            m.vm.set_memory(10 + i as u32, 0, 0, 0, 0)?;
        }
    }
    Ok(())
}

/// Devices at very many addresses, all of them found again: what the kernel remembers of them is
/// bounded, and never wrong.
fn many_devices(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, touch())?;
    let n = env.fewer(300);
    for _ in 0..2 {
        m.patch_regs(|r| {
            r.rip = at::CODE;
            r.rdi = at::MMIO;
            r.rbp = n;
        })?;
        for i in 0..n {
            let gpa = at::MMIO + i * 4096;
            touch_page(&m, gpa, None, (n - i) as u32, &format!("page {i}"))?;
        }
        m.expect_hlt()?;
    }
    // One of them becomes memory; its neighbours stay.
    let mem = Mapping::new(PAGE, false)?;
    let k = n / 2;
    m.vm.set_memory(10, 0, at::MMIO + k * 4096, 4096, mem.addr() as u64)?;
    m.patch_regs(|r| {
        r.rip = at::CODE;
        r.rdi = at::MMIO;
        r.rbp = n;
    })?;
    for i in 0..n {
        let page = (i == k).then_some((&mem, 0));
        let gpa = at::MMIO + i * 4096;
        touch_page(&m, gpa, page, (n - i) as u32, &format!("page {i} at last"))?;
    }
    m.expect_hlt()
}

fn main() -> ExitCode {
    selftests::tap::main(
        "coalesced",
        tests![
            arguments,
            sizes,
            ports,
            borders,
            reads,
            overflow,
            several,
            limit,
            two_vcpus,
            hostile,
            devices_and_slots,
            many_devices,
        ],
    )
}
