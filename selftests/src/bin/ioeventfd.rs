// SPDX-License-Identifier: GPL-2.0

//! Eventfds that a guest's writes signal, and nobody else notices: KVM_IOEVENTFD.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::eventfd::EventFd;
use selftests::guest::at;
use selftests::host::{open_files, sleep_ms, system_files};
use selftests::irq::{wait_for, Chips, Guest};
use selftests::machine::{decode, Exit};
use selftests::mem::{Mapping, PAGE};
use selftests::sys::{self, Error};
use selftests::vm::{Kvm, Vcpu, Vm};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

const DATAMATCH: u32 = 1 << kb::kvm_ioeventfd_flag_nr_datamatch;
const PIO: u32 = 1 << kb::kvm_ioeventfd_flag_nr_pio;
const DEASSIGN: u32 = 1 << kb::kvm_ioeventfd_flag_nr_deassign;
const VIRTIO_CCW: u32 = 1 << kb::kvm_ioeventfd_flag_nr_virtio_ccw_notify;

/// Nothing else is here.
const MMIO: u64 = at::MMIO + 0x100;
const IOPORT: u64 = 0x1f0;

guest_code!(write8, ".code64", "mov [rdi], al", "ret");
guest_code!(write16, ".code64", "mov [rdi], ax", "ret");
guest_code!(write32, ".code64", "mov [rdi], eax", "ret");
guest_code!(write64, ".code64", "mov [rdi], rax", "ret");
guest_code!(out8, ".code64", "mov edx, edi", "out dx, al", "ret");
guest_code!(out16, ".code64", "mov edx, edi", "out dx, ax", "ret");
guest_code!(out32, ".code64", "mov edx, edi", "out dx, eax", "ret");
guest_code!(in8, ".code64", "mov edx, edi", "in al, dx", "ret");
guest_code!(read32, ".code64", "mov eax, [rdi]", "ret");

/// A place that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    pio: bool,
    addr: u64,
}

const PORT: Place = Place {
    pio: true,
    addr: IOPORT,
};
const MEMORY: Place = Place {
    pio: false,
    addr: MMIO,
};

impl Place {
    fn plus(self, n: u64) -> Self {
        Place {
            addr: self.addr + n,
            ..self
        }
    }

    /// The code that writes so many bytes.
    fn code(self, size: usize) -> &'static [u8] {
        match (self.pio, size) {
            (true, 1) => out8(),
            (true, 2) => out16(),
            (true, _) => out32(),
            (false, 1) => write8(),
            (false, 2) => write16(),
            (false, 4) => write32(),
            (false, _) => write64(),
        }
    }

    fn sizes(self) -> &'static [usize] {
        if self.pio {
            &[1, 2, 4]
        } else {
            &[1, 2, 4, 8]
        }
    }

    fn io(self, fd: i32, len: u32, datamatch: Option<u64>, flags: u32) -> kb::kvm_ioeventfd {
        kb::kvm_ioeventfd {
            datamatch: datamatch.unwrap_or(0),
            addr: self.addr,
            len,
            fd,
            flags: flags
                | if self.pio { PIO } else { 0 }
                | if datamatch.is_some() { DATAMATCH } else { 0 },
            ..Default::default()
        }
    }
}

fn call(vm: &Vm, io: &kb::kvm_ioeventfd) -> Result<(), Error> {
    vm.fd.ioctl_ref(sys::KVM_IOEVENTFD, io)?;
    Ok(())
}

fn assign(vm: &Vm, p: Place, fd: &EventFd, len: u32, data: Option<u64>) -> Result<(), Error> {
    call(vm, &p.io(fd.raw(), len, data, 0))
}

fn deassign(vm: &Vm, p: Place, fd: &EventFd, len: u32, data: Option<u64>) -> Result<(), Error> {
    call(vm, &p.io(fd.raw(), len, data, DEASSIGN))
}

/// Skips if the device does not have them.
fn need(kvm: &Kvm) -> Outcome {
    if kvm.capability(kb::KVM_CAP_IOEVENTFD) <= 0 {
        skip!("no KVM_CAP_IOEVENTFD");
    }
    Ok(())
}

fn guest(env: &Env) -> Result<Guest, Verdict> {
    need(&env.open()?)?;
    Guest::new(env, Chips::None, 1)
}

/// Has the guest write; whether that was no exit.
fn silent(g: &Guest, place: Place, size: usize, value: u64) -> Result<bool, Verdict> {
    g.begin(0, place.code(size), |r| {
        (r.rdi, r.rax) = (place.addr, value)
    })?;
    let data = value.to_le_bytes()[..size].to_vec();
    let exit = if place.pio {
        Exit::Out {
            port: place.addr as u16,
            size: size as u8,
            data,
        }
    } else {
        Exit::MmioWrite {
            addr: place.addr,
            data,
        }
    };
    match g.run(0)? {
        Exit::Out {
            port: selftests::guest::PORT,
            ..
        } => Ok(true),
        got if got == exit => {
            g.finish(0, &mut |_| Ok(()))?;
            Ok(false)
        }
        other => fail!("{size} bytes to {place:x?}: exit {other:x?}"),
    }
}

/// Checks that a write signals `fd`, once, and is no exit.
fn hits(g: &Guest, place: Place, size: usize, value: u64, fd: &EventFd) -> Outcome {
    let quiet = silent(g, place, size, value)?;
    ensure!(quiet, "an exit for {value:#x}, {size} bytes, to {place:x?}");
    ensure_eq!(
        fd.take()?,
        1,
        "signals for {value:#x}, {size} bytes, to {place:x?}"
    );
    Ok(())
}

/// Checks that a write is an exit, and signals none of `fds`.
fn misses(g: &Guest, place: Place, size: usize, value: u64, fds: &[&EventFd]) -> Outcome {
    let quiet = silent(g, place, size, value)?;
    ensure!(
        !quiet,
        "no exit for {value:#x}, {size} bytes, to {place:x?}"
    );
    for fd in fds {
        let n = fd.take()?;
        ensure_eq!(n, 0, "signals for {value:#x}, {size} bytes, to {place:x?}");
    }
    Ok(())
}

fn capabilities(env: &Env) -> Outcome {
    let kvm = env.open()?;
    need(&kvm)?;
    for (cap, name) in [
        (kb::KVM_CAP_IOEVENTFD, "IOEVENTFD"),
        (kb::KVM_CAP_IOEVENTFD_NO_LENGTH, "IOEVENTFD_NO_LENGTH"),
        (kb::KVM_CAP_IOEVENTFD_ANY_LENGTH, "IOEVENTFD_ANY_LENGTH"),
    ] {
        ensure_eq!(kvm.capability(cap), 1, "KVM_CAP_{name}");
    }
    Ok(())
}

/// What the call refuses.
fn arguments(env: &Env) -> Outcome {
    let kvm = env.open()?;
    need(&kvm)?;
    let vm = kvm.create_vm()?;
    let fd = EventFd::new()?;
    expect_errno(
        vm.fd.ioctl(sys::KVM_IOEVENTFD, 8),
        libc::EFAULT,
        "no address",
    )?;
    for place in [PORT, MEMORY] {
        for len in [3, 5, 6, 7, 9, 16, 1 << 31, u32::MAX] {
            let what = format!("length {len:#x}");
            expect_errno(assign(&vm, place, &fd, len, None), libc::EINVAL, &what)?;
            expect_errno(deassign(&vm, place, &fd, len, None), libc::ENOENT, &what)?;
        }
        for flags in [1 << 5, 1 << 31, u32::MAX & !DEASSIGN] {
            let io = place.io(fd.raw(), 4, None, flags);
            expect_errno(call(&vm, &io), libc::EINVAL, &format!("flags {flags:#x}"))?;
        }
        let r = assign(&vm, place, &fd, 0, Some(0));
        expect_errno(r, libc::EINVAL, "data to match without a length")?;
        for bad in [-1, 9999, i32::MIN] {
            for flags in [0, DEASSIGN] {
                let io = place.io(bad, 4, None, flags);
                expect_errno(call(&vm, &io), libc::EBADF, &format!("descriptor {bad}"))?;
            }
        }
        for bad in [vm.fd.0, kvm.fd.0] {
            for flags in [0, DEASSIGN] {
                let io = place.io(bad, 4, None, flags);
                expect_errno(call(&vm, &io), libc::EINVAL, "no eventfd")?;
            }
        }
        // Around the end of all addresses.
        let last = |n: u64| Place {
            addr: u64::MAX - n,
            ..place
        };
        for (n, len, fits) in [
            (0, 0, true),
            (0, 1, false),
            (3, 4, false),
            (7, 8, false),
            (1, 1, true),
            (4, 4, true),
            (8, 8, true),
        ] {
            let what = format!("{len} bytes, {n} before the end");
            let r = assign(&vm, last(n), &fd, len, None);
            if fits {
                r?;
                deassign(&vm, last(n), &fd, len, None)?;
            } else {
                expect_errno(r, libc::EINVAL, &what)?;
            }
            expect_errno(deassign(&vm, last(n), &fd, len, None), libc::ENOENT, &what)?;
        }
    }
    Ok(())
}

/// A notification of another architecture's is refused, or nothing ever comes of it.
fn virtio_ccw(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    let r = call(&g.vm, &MEMORY.io(fd.raw(), 4, None, VIRTIO_CCW));
    // KVM takes it, on a bus that x86 never writes to.
    if r.is_err() {
        expect_errno(r, libc::EINVAL, "a notification by virtio-ccw")?;
    }
    misses(&g, MEMORY, 4, 0, &[&fd])?;
    misses(&g, PORT, 4, 0, &[&fd])
}

/// Each length with each size of write; with any value, with the one that matches, with others.
fn matching(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    let value = 0x8877_6655_4433_2211u64;
    for place in [PORT, MEMORY] {
        for &len in place.sizes() {
            let what = len as u32;
            let mask = u64::MAX >> (64 - 8 * len);
            assign(&g.vm, place, &fd, what, None)?;
            for &size in place.sizes() {
                if size == len {
                    hits(&g, place, size, value, &fd)?;
                    hits(&g, place, size, 0, &fd)?;
                } else {
                    misses(&g, place, size, value, &[&fd])?;
                }
                // At the very address only.
                misses(&g, place.plus(8), size, value, &[&fd])?;
                misses(&g, place.plus(1), 1, value, &[&fd])?;
            }
            deassign(&g.vm, place, &fd, what, None)?;
            misses(&g, place, len, value, &[&fd])?;

            let matched = Some(value & mask);
            assign(&g.vm, place, &fd, what, matched)?;
            for &size in place.sizes() {
                if size == len {
                    hits(&g, place, size, value, &fd)?;
                }
                misses(&g, place, size, value ^ 1, &[&fd])?;
                misses(&g, place, size, value ^ (0x80 << (8 * size - 8)), &[&fd])?;
            }
            deassign(&g.vm, place, &fd, what, matched)?;
            // Data that no write of this length has.
            if len < 8 {
                let wide = (value & mask) | (1 << (8 * len));
                assign(&g.vm, place, &fd, what, Some(wide))?;
                misses(&g, place, len, wide, &[&fd])?;
                deassign(&g.vm, place, &fd, what, Some(wide))?;
            }
        }
    }
    Ok(())
}

/// Without a length, a write of any size, to the very address.
fn any_length(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    for place in [PORT, MEMORY] {
        assign(&g.vm, place, &fd, 0, None)?;
        // The first finds that no slot is there, the others may take a shorter way.
        for _ in 0..3 {
            for &size in place.sizes() {
                hits(&g, place, size, 0xffff_ffff_1234, &fd)?;
            }
        }
        misses(&g, place.plus(1), 1, 0, &[&fd])?;
        misses(&g, place.plus(4), 4, 0, &[&fd])?;
        let below = Place {
            addr: place.addr - 1,
            ..place
        };
        misses(&g, below, 2, 0, &[&fd])?;
        deassign(&g.vm, place, &fd, 0, None)?;
        misses(&g, place, 4, 0, &[&fd])?;
    }
    Ok(())
}

/// Reads are exits. (Not so KVM's of memory without a length, which it takes for writes: that is not
/// asked for here.)
fn reads(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    assign(&g.vm, PORT, &fd, 0, None)?;
    assign(&g.vm, PORT.plus(1), &fd, 1, None)?;
    assign(&g.vm, MEMORY, &fd, 4, None)?;
    for port in [IOPORT, IOPORT + 1] {
        g.begin(0, in8(), |r| r.rdi = port)?;
        let want = Exit::In {
            port: port as u16,
            size: 1,
            count: 1,
        };
        ensure_eq!(g.run(0)?, want, "exit for a port");
        g.vcpus[0].set_io_data(&[0x5a]);
        g.finish(0, &mut |_| Ok(()))?;
        ensure_eq!(g.vcpus[0].regs()?.rax & 0xff, 0x5a, "what was read");
    }
    g.begin(0, read32(), |r| r.rdi = MMIO)?;
    let want = Exit::MmioRead { addr: MMIO, len: 4 };
    ensure_eq!(g.run(0)?, want, "exit for memory");
    g.finish(0, &mut |_| Ok(()))?;
    ensure_eq!(fd.take()?, 0, "signals");
    Ok(())
}

/// What may not be assigned beside what, and what goes by which call.
fn collisions(env: &Env) -> Outcome {
    let g = guest(env)?;
    let (a, b) = (EventFd::new()?, EventFd::new()?);
    for place in [PORT, MEMORY] {
        let refused = |fd, len, data, what: &str| {
            expect_errno(assign(&g.vm, place, fd, len, data), libc::EEXIST, what)
        };
        assign(&g.vm, place, &a, 4, Some(7))?;
        for fd in [&a, &b] {
            refused(fd, 4, Some(7), "the same")?;
            refused(fd, 4, None, "any data beside some")?;
            refused(fd, 0, None, "any length beside some")?;
        }
        // Others that do fit: other data, other lengths, other places.
        assign(&g.vm, place, &b, 4, Some(8))?;
        assign(&g.vm, place, &b, 2, None)?;
        refused(&b, 2, None, "the same without data")?;
        refused(&b, 2, Some(7), "some data beside any")?;
        assign(&g.vm, place, &b, 1, Some(7))?;
        assign(&g.vm, place.plus(2), &a, 2, None)?;
        assign(&g.vm, place.plus(4), &a, 0, None)?;
        refused(&a, 4, Some(8), "the second again")?;
        let r = assign(&g.vm, place.plus(4), &b, 4, Some(1));
        expect_errno(r, libc::EEXIST, "some length beside any")?;
        hits(&g, place, 4, 7, &a)?;
        hits(&g, place, 4, 8, &b)?;
        hits(&g, place, 2, 9, &b)?;
        hits(&g, place, 1, 7, &b)?;
        hits(&g, place.plus(2), 2, 9, &a)?;
        hits(&g, place.plus(4), 2, 9, &a)?;
        misses(&g, place, 4, 9, &[&a, &b])?;
        misses(&g, place, 1, 9, &[&a, &b])?;

        // Each by its very arguments.
        let absent = |fd, len, data, what: &str| {
            expect_errno(deassign(&g.vm, place, fd, len, data), libc::ENOENT, what)
        };
        absent(&b, 4, Some(7), "another eventfd")?;
        absent(&a, 4, Some(9), "other data")?;
        absent(&a, 4, None, "without data")?;
        absent(&a, 2, Some(7), "another length")?;
        absent(&a, 0, None, "without length")?;
        absent(&b, 2, Some(0), "data of one that has none")?;
        let r = deassign(&g.vm, place.plus(1), &a, 4, Some(7));
        expect_errno(r, libc::ENOENT, "another address")?;
        let other = Place {
            pio: !place.pio,
            ..place
        };
        let r = deassign(&g.vm, other, &a, 4, Some(7));
        expect_errno(r, libc::ENOENT, "the other kind")?;
        hits(&g, place, 4, 7, &a)?;
        // By another descriptor of the same eventfd, once.
        deassign(&g.vm, place, &a.duplicate()?, 4, Some(7))?;
        absent(&a, 4, Some(7), "one that is gone")?;
        misses(&g, place, 4, 7, &[&a, &b])?;
        hits(&g, place, 4, 8, &b)?;
        deassign(&g.vm, place, &b, 2, None)?;
        deassign(&g.vm, place, &b, 1, Some(7))?;
        deassign(&g.vm, place, &b, 4, Some(8))?;
        deassign(&g.vm, place.plus(2), &a, 2, None)?;
        deassign(&g.vm, place.plus(4), &a, 0, None)?;
        misses(&g, place.plus(4), 4, 7, &[&a, &b])?;
    }
    Ok(())
}

/// Ports there are 65536 of: what is assigned above them is never written.
fn high_ports(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    assign(&g.vm, PORT.plus(0x1_0000), &fd, 1, None)?;
    misses(&g, PORT, 1, 0, &[&fd])?;
    let last = Place {
        pio: true,
        addr: 0xffff,
    };
    assign(&g.vm, last, &fd, 1, None)?;
    hits(&g, last, 1, 0, &fd)?;
    misses(&g, last, 2, 0, &[&fd])
}

guest_code!(rep_outsb, ".code64", "mov edx, edi", "rep outsb", "ret");
guest_code!(rep_outsd, ".code64", "mov edx, edi", "rep outsd", "ret");
guest_code!(rep_stosd, ".code64", "rep stosd", "ret");
guest_code!(
    movsd,
    ".code64",
    "mov ebx, ecx",
    "2: movsd",
    "sub rdi, 4",
    "dec ebx",
    "jnz 2b",
    "ret"
);
guest_code!(modify, ".code64", "xchg [rdi], eax", "ret");

/// Strings: each element is a write.
fn strings(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    g.mem.fill(0x8_0000, 0x2000, 0x33);
    let exec = |code: &[u8], place: Place, n: u64| {
        g.exec(0, code, |r| {
            r.rdi = place.addr;
            r.rsi = 0x8_0ff0;
            r.rcx = n;
            r.rax = 0x3333_3333;
            r.rflags &= !0x400;
        })
    };
    // A page's end is in the middle.
    for (code, len) in [(rep_outsb(), 1), (rep_outsd(), 4)] {
        for datamatch in [None, Some(0x3333_3333u64 >> (32 - 8 * len))] {
            assign(&g.vm, PORT, &fd, len, datamatch)?;
            let r = exec(code, PORT, 40)?;
            ensure_eq!(
                (r.rcx, r.rsi),
                (0, 0x8_0ff0 + u64::from(40 * len)),
                "RCX, RSI"
            );
            ensure_eq!(fd.take()?, 40, "signals of 40 OUTS of {len} bytes");
            deassign(&g.vm, PORT, &fd, len, datamatch)?;
        }
    }
    assign(&g.vm, MEMORY, &fd, 4, Some(0x3333_3333))?;
    exec(movsd(), MEMORY, 7)?;
    ensure_eq!(fd.take()?, 7, "signals of 7 MOVS");
    for i in 1..6 {
        assign(&g.vm, MEMORY.plus(4 * i), &fd, 4, None)?;
    }
    let r = exec(rep_stosd(), MEMORY, 6)?;
    ensure_eq!((r.rcx, r.rdi), (0, MMIO + 24), "RCX, RDI");
    ensure_eq!(fd.take()?, 6, "signals of 6 STOS");
    // An instruction that reads first: the read is an exit, the write is none.
    g.begin(0, modify(), |r| (r.rdi, r.rax) = (MMIO, 0x3333_3333))?;
    ensure_eq!(
        g.run(0)?,
        Exit::MmioRead { addr: MMIO, len: 4 },
        "exit of XCHG"
    );
    g.finish(0, &mut |_| Ok(()))?;
    ensure_eq!(fd.take()?, 1, "signals of XCHG");
    Ok(())
}

/// A write over the end of a page is two.
fn page_crossing(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    let first = Place {
        pio: false,
        addr: at::MMIO + 0xffe,
    };
    assign(&g.vm, first, &fd, 2, None)?;
    assign(&g.vm, first.plus(2), &fd, 2, None)?;
    let quiet = silent(&g, first, 4, 0x1234_5678)?;
    ensure!(quiet, "an exit");
    ensure_eq!(fd.take()?, 2, "signals");
    Ok(())
}

/// Memory comes first; where it goes, the eventfd is found again.
fn memory_slots(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    let mem = Mapping::new(PAGE, false)?;
    for len in [4, 0] {
        assign(&g.vm, MEMORY, &fd, len, None)?;
        for value in 1..4u32 {
            hits(&g, MEMORY, 4, 1, &fd)?;
            g.vm.set_memory(1, 0, at::MMIO, 4096, mem.addr() as u64)?;
            mem.write(0x100, 0u32);
            let quiet = silent(&g, MEMORY, 4, value.into())?;
            ensure!(quiet, "an exit for memory");
            // Without a length, kvm-intel finds the eventfd first as long as its tables remember that
            // there was no slot. It is one of the two.
            let written = mem.read::<u32>(0x100) == value;
            let signals = fd.take()?;
            ensure!(written || len == 0, "the write did not reach memory");
            ensure_eq!(
                signals,
                u64::from(!written),
                "signals for a write to memory"
            );
            g.vm.set_memory(1, 0, 0, 0, 0)?;
        }
        // Memory that is read-only: a write is a device's.
        let readonly = kb::KVM_MEM_READONLY;
        mem.write(0x100, 0x79u32);
        g.vm.set_memory(1, readonly, at::MMIO, 4096, mem.addr() as u64)?;
        hits(&g, MEMORY, 4, 1, &fd)?;
        ensure_eq!(mem.read::<u32>(0x100), 0x79, "memory that is read-only");
        g.vm.set_memory(1, 0, 0, 0, 0)?;
        hits(&g, MEMORY, 4, 1, &fd)?;
        deassign(&g.vm, MEMORY, &fd, len, None)?;
    }
    Ok(())
}

/// More than there may be devices of other kinds.
fn many(env: &Env) -> Outcome {
    const N: u64 = 1200;
    let g = guest(env)?;
    let fds = [EventFd::new()?, EventFd::new()?];
    for place in [PORT, MEMORY] {
        for i in 0..N {
            // Not in the order of their addresses.
            let k = i * 7 % N;
            assign(&g.vm, place.plus(4 * k), &fds[(k % 2) as usize], 4, None)?;
        }
        for k in [0, 1, 2, 599, 600, N - 2, N - 1] {
            hits(&g, place.plus(4 * k), 4, k, &fds[(k % 2) as usize])?;
        }
        misses(&g, place.plus(4 * N), 4, 0, &[&fds[0], &fds[1]])?;
        for k in 0..N {
            deassign(&g.vm, place.plus(4 * k), &fds[(k % 2) as usize], 4, None)?;
        }
        misses(&g, place, 4, 0, &[&fds[0], &fds[1]])?;
    }
    // There is still room for what counts.
    let zone = kb::kvm_coalesced_mmio_zone {
        addr: MMIO,
        size: 4,
        ..Default::default()
    };
    g.vm.fd.ioctl_ref(sys::KVM_REGISTER_COALESCED_MMIO, &zone)?;
    Ok(())
}

/// The counter has an end, and stays there; the guest does not wait.
fn saturated(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    assign(&g.vm, PORT, &fd, 1, None)?;
    let most = u64::MAX - 1;
    // SAFETY: The value lives through the call and has the length that is passed.
    let n = unsafe { libc::write(fd.raw(), std::ptr::from_ref(&most).cast(), 8) };
    ensure_eq!(n, 8, "bytes written");
    for _ in 0..3 {
        ensure!(silent(&g, PORT, 1, 0)?, "an exit");
    }
    ensure_eq!(fd.take()?, u64::MAX, "the counter");
    hits(&g, PORT, 1, 0, &fd)
}

/// An eventfd that userspace closed stays where it was assigned.
fn closed(env: &Env) -> Outcome {
    let g = guest(env)?;
    let (files, descriptors) = (system_files(), open_files());
    let keep = EventFd::new()?;
    for i in 0..8 {
        let fd = EventFd::new()?;
        assign(&g.vm, PORT.plus(i), &fd, 1, None)?;
        assign(&g.vm, MEMORY.plus(8 * i), &fd, 0, None)?;
        drop(fd);
        ensure!(silent(&g, PORT.plus(i), 1, 0)?, "an exit, port");
        ensure!(silent(&g, MEMORY.plus(8 * i), 4, 0)?, "an exit, memory");
    }
    let r = deassign(&g.vm, PORT, &keep, 1, None);
    expect_errno(r, libc::ENOENT, "another eventfd")?;
    drop((g, keep));
    ensure!(open_files() < descriptors, "descriptors are left");
    if let Some(before) = files {
        wait_for("the files to go", || {
            system_files().is_some_and(|n| n <= before + 10)
        })?;
    }
    Ok(())
}

/// An eventfd and a zone whose writes are coalesced, at one address: a write goes to one of them.
fn beside_zones(env: &Env) -> Outcome {
    let g = guest(env)?;
    let page = g.kvm.capability(kb::KVM_CAP_COALESCED_MMIO);
    if page <= 0 {
        skip!("no KVM_CAP_COALESCED_MMIO");
    }
    let zone = kb::kvm_coalesced_mmio_zone {
        addr: MMIO,
        size: 0x100,
        ..Default::default()
    };
    g.vm.fd.ioctl_ref(sys::KVM_REGISTER_COALESCED_MMIO, &zone)?;
    let last = || {
        let ring = g.vcpus[0].run_addr() + page as usize * PAGE;
        // SAFETY: The ring is in the mapping of the vCPU: its second word is where the next goes.
        unsafe { ((ring + 4) as *const u32).read_volatile() }
    };
    let fd = EventFd::new()?;
    assign(&g.vm, MEMORY.plus(0x10), &fd, 4, Some(1))?;
    let mut coalesced = 0;
    // Other addresses of the zone are not asked for: KVM's search may miss a range that has another
    // within it.
    for value in [1, 2, 1] {
        ensure!(silent(&g, MEMORY.plus(0x10), 4, value)?, "an exit");
        let signals = fd.take()?;
        ensure!(signals == 0 || value == 1, "a signal for {value}");
        coalesced += 1 - signals as u32;
        ensure_eq!(last(), coalesced, "coalesced writes");
    }
    Ok(())
}

// RDI: the address. Writes ECX times, and halts.
guest_code!(
    kicks,
    ".code64",
    "2: mov [rdi], ecx",
    "dec ecx",
    "jnz 2b",
    "hlt",
    "ret"
);
guest_code!(
    kicks_port,
    ".code64",
    "mov edx, edi",
    "2: mov eax, ecx",
    "out dx, eax",
    "dec ecx",
    "jnz 2b",
    "hlt",
    "ret"
);

/// Runs a vCPU to HLT; how many writes were exits.
fn exits(v: &Vcpu) -> Result<u64, Verdict> {
    let mut n = 0;
    loop {
        v.run()?;
        match decode(v) {
            Exit::MmioWrite { addr: MMIO, .. } => n += 1,
            Exit::Out { port, .. } if u64::from(port) == IOPORT => n += 1,
            Exit::Hlt => return Ok(n),
            other => fail!("exit {other:x?}"),
        }
    }
}

/// While the eventfd comes and goes, each write is an exit or a signal: none is lost, none is both.
fn assign_race(env: &Env) -> Outcome {
    let g = guest(env)?;
    let fd = EventFd::new()?;
    let writes = env.fewer(3000);
    for (place, code, len) in [
        (MEMORY, kicks(), 4),
        (MEMORY, kicks(), 0),
        (PORT, kicks_port(), 4),
        (PORT, kicks_port(), 0),
    ] {
        g.begin(0, code, |r| (r.rdi, r.rcx) = (place.addr, writes))?;
        let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let (exits, signals, cycles) = std::thread::scope(|scope| {
            let other = scope.spawn(|| -> Result<(u64, u64), Verdict> {
                let (mut n, mut cycles) = (0, 0);
                while !done.load(Ordering::SeqCst) {
                    assign(&g.vm, place, &fd, len, None)?;
                    begun.store(true, Ordering::SeqCst);
                    n += fd.take()?;
                    if cycles % 4 == 0 {
                        sleep_ms(1);
                    }
                    deassign(&g.vm, place, &fd, len, None)?;
                    n += fd.take()?;
                    let quiet = fd.take()?;
                    ensure_eq!(quiet, 0, "signals of one that is deassigned");
                    cycles += 1;
                }
                Ok((n, cycles))
            });
            // All writes may be over before it is assigned for the first time.
            while !begun.load(Ordering::SeqCst) && !other.is_finished() {
                sleep_ms(1);
            }
            let r = exits(&g.vcpus[0]);
            done.store(true, Ordering::SeqCst);
            let (signals, cycles) = other.join().unwrap_or_else(|_| fail!("panic"))?;
            Ok::<_, Verdict>((r?, signals, cycles))
        })?;
        println!("{place:x?}, length {len}: {exits} exits, {signals} signals, {cycles} cycles");
        ensure_eq!(exits + signals, writes, "writes");
        ensure!(signals > 0, "it was never assigned");
        g.restart(0)?;
    }
    Ok(())
}

/// Two vCPUs write to one eventfd each and to one that they share.
fn two_vcpus(env: &Env) -> Outcome {
    need(&env.open()?)?;
    let g = Guest::new(env, Chips::None, 2)?;
    let (shared, n) = (EventFd::new()?, env.fewer(3000));
    assign(&g.vm, MEMORY, &shared, 4, None)?;
    assign(&g.vm, PORT, &shared, 4, None)?;
    g.begin(0, kicks(), |r| (r.rdi, r.rcx) = (MMIO, n))?;
    g.begin(1, kicks_port(), |r| (r.rdi, r.rcx) = (IOPORT, n))?;
    let mut got = 0;
    std::thread::scope(|scope| -> Outcome {
        let threads: Vec<_> = g.vcpus.iter().map(|v| scope.spawn(|| exits(v))).collect();
        while !threads.iter().all(|t| t.is_finished()) {
            got += shared.take()?;
            sleep_ms(1);
        }
        for t in threads {
            let n = t.join().unwrap_or_else(|_| fail!("panic"))?;
            ensure_eq!(n, 0, "exits");
        }
        Ok(())
    })?;
    got += shared.take()?;
    ensure_eq!(got, 2 * n, "signals");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "ioeventfd",
        tests![
            capabilities,
            arguments,
            virtio_ccw,
            matching,
            any_length,
            reads,
            collisions,
            high_ports,
            strings,
            page_crossing,
            memory_slots,
            many,
            saturated,
            closed,
            beside_zones,
            assign_race,
            two_vcpus,
        ],
    )
}
