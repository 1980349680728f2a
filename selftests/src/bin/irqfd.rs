// SPDX-License-Identifier: GPL-2.0

//! Eventfds that are interrupts: KVM_IRQFD.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::eventfd::EventFd;
use selftests::host::{open_files, patient, pin, sleep_ms, system_files};
use selftests::irq::redirect::{LEVEL, MASKED, REMOTE_IRR};
use selftests::irq::{
    self, entry, how, irqfd, line, line_status, pic, route, set_entry, to_msi, to_pin, vm_with,
    wait_for, Chips, Guest, APIC, IOAPIC,
};
use selftests::sys;
use selftests::vm::{Fd, Vm};
use selftests::{ensure, ensure_eq, fail, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const DEASSIGN: u32 = kb::KVM_IRQFD_FLAG_DEASSIGN;
const RESAMPLE: u32 = kb::KVM_IRQFD_FLAG_RESAMPLE;

/// A GSI that no PIC shares.
const GSI: u32 = 20;
const OTHER: u32 = 21;

fn assign(vm: &Vm, fd: &EventFd, gsi: u32) -> Outcome {
    Ok(irqfd(vm, fd.raw(), gsi, 0, None)?)
}

fn assign_level(vm: &Vm, fd: &EventFd, gsi: u32, resample: &EventFd) -> Outcome {
    Ok(irqfd(vm, fd.raw(), gsi, 0, Some(resample.raw()))?)
}

fn deassign(vm: &Vm, fd: &EventFd, gsi: u32) -> Outcome {
    Ok(irqfd(vm, fd.raw(), gsi, DEASSIGN, None)?)
}

/// A file that is no eventfd.
fn null() -> Result<Fd, Verdict> {
    // SAFETY: A string with its terminator.
    let fd = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    ensure!(fd >= 0, "open of /dev/null");
    Ok(Fd(fd))
}

/// Has a vCPU look until it took an interrupt: an injection may be a worker's to do.
fn until_seen(g: &Guest, n: u64, what: &str) -> Outcome {
    for _ in 0..patient(400) {
        g.window(0)?;
        if g.seen(0) >= n {
            break;
        }
        sleep_ms(1);
    }
    // If there is one too many, it comes soon.
    sleep_ms(2);
    g.window(0)?;
    ensure_eq!(g.seen(0), n, "{what}: interrupts, {:x?}", g.log(0));
    Ok(())
}

/// What the call refuses.
fn arguments(env: &Env) -> Outcome {
    let (kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    let (fd, resample) = (EventFd::new()?, EventFd::new()?);
    let null = null()?;
    let none = kvm.create_vm()?;
    let split = kvm.create_vm()?;
    irq::create(&split, Chips::Split(24))?;
    expect_errno(vm.fd.ioctl(sys::KVM_IRQFD, 8), libc::EFAULT, "no address")?;
    for flags in [4, 8, 1 << 31, 4 | DEASSIGN, u32::MAX] {
        let what = format!("flags {flags:#x}");
        expect_errno(irqfd(&vm, fd.raw(), GSI, flags, None), libc::EINVAL, &what)?;
        expect_errno(irqfd(&none, -1, GSI, flags, None), libc::EINVAL, &what)?;
    }
    for bad in [-1, 9999, i32::MAX] {
        let what = format!("descriptor {bad}");
        expect_errno(irqfd(&vm, bad, GSI, 0, None), libc::EBADF, &what)?;
        expect_errno(irqfd(&vm, bad, GSI, DEASSIGN, None), libc::EBADF, &what)?;
        let r = irqfd(&vm, fd.raw(), GSI, 0, Some(bad));
        expect_errno(r, libc::EBADF, &format!("{what} to resample"))?;
        expect_errno(irqfd(&none, bad, GSI, DEASSIGN, None), libc::EBADF, &what)?;
    }
    for bad in [null.0, vm.fd.0, kvm.fd.0] {
        expect_errno(irqfd(&vm, bad, GSI, 0, None), libc::EINVAL, "no eventfd")?;
        expect_errno(
            irqfd(&vm, bad, GSI, DEASSIGN, None),
            libc::EINVAL,
            "no eventfd",
        )?;
        let r = irqfd(&vm, fd.raw(), GSI, 0, Some(bad));
        expect_errno(r, libc::EINVAL, "no eventfd to resample")?;
    }
    // Without controllers, whatever the descriptor is. To resample takes an I/O APIC.
    expect_errno(
        irqfd(&none, fd.raw(), GSI, 0, None),
        libc::EINVAL,
        "no irqchip",
    )?;
    expect_errno(
        irqfd(&none, -1, GSI, 0, None),
        libc::EINVAL,
        "no irqchip, no file",
    )?;
    let r = irqfd(&split, fd.raw(), GSI, 0, Some(resample.raw()));
    expect_errno(r, libc::EINVAL, "to resample, split")?;
    // None of that was assigned: it can be now. What is not assigned can be taken away.
    irqfd(&none, fd.raw(), GSI, DEASSIGN, None)?;
    deassign(&vm, &fd, GSI)?;
    assign(&vm, &fd, GSI)?;
    deassign(&vm, &fd, GSI)?;
    assign_level(&vm, &fd, GSI, &resample)?;
    irqfd(&vm, fd.raw(), GSI, DEASSIGN | RESAMPLE, Some(-1))?;
    // A GSI may have no route yet, and never get one.
    for gsi in [24, 4095, 4096, u32::MAX] {
        assign(&split, &fd, gsi)?;
        fd.signal()?;
        deassign(&split, &fd, gsi)?;
    }
    Ok(())
}

/// An eventfd is one interrupt's, of all VMs; a GSI may have any number of them.
fn busy(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let (_kvm, other, _mem) = vm_with(env, Chips::Full)?;
    set_entry(&g.vm, GSI as usize, 0x60)?;
    let (a, b, resample) = (EventFd::new()?, EventFd::new()?, EventFd::new()?);
    assign(&g.vm, &a, GSI)?;
    let again = |vm: &Vm, gsi, r: Option<i32>, what: &str| {
        expect_errno(irqfd(vm, a.raw(), gsi, 0, r), libc::EBUSY, what)
    };
    again(&g.vm, GSI, None, "the same again")?;
    again(&g.vm, OTHER, None, "another GSI")?;
    again(
        &g.vm,
        OTHER,
        Some(resample.raw()),
        "another GSI, to resample",
    )?;
    again(&other, GSI, None, "another VM")?;
    // Another descriptor of the same eventfd is the same.
    let twin = a.duplicate()?;
    expect_errno(
        irqfd(&g.vm, twin.raw(), OTHER, 0, None),
        libc::EBUSY,
        "a twin",
    )?;
    // Taking away what is not the one leaves it.
    deassign(&g.vm, &a, OTHER)?;
    deassign(&other, &a, GSI)?;
    again(&g.vm, OTHER, None, "still")?;
    assign(&g.vm, &b, GSI)?;
    a.signal()?;
    until_seen(&g, 1, "the first eventfd")?;
    b.signal()?;
    until_seen(&g, 2, "the second one")?;
    deassign(&g.vm, &twin, GSI)?;
    a.signal()?;
    assign(&other, &twin, GSI)?;
    b.signal()?;
    until_seen(&g, 3, "once the first is another VM's")
}

/// By all kinds of route: an edge, a level, a message, the PIC.
fn delivery(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    route(
        &g.vm,
        &[
            to_pin(GSI, 2, 20),
            to_pin(OTHER, 2, 21),
            to_msi(30, APIC, 0x62),
            to_pin(5, 0, 5),
            to_pin(31, 2, 22),
            to_pin(31, 0, 6),
        ],
    )?;
    set_entry(&g.vm, 20, 0x60)?;
    set_entry(&g.vm, 21, 0x61 | LEVEL)?;
    set_entry(&g.vm, 22, 0x64)?;
    for (port, value) in [(0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 3)] {
        g.out8(port, value)?;
    }
    let mut seen = 0;
    for (what, gsi, vectors) in [
        ("an edge", GSI, vec![0x60]),
        ("a level, as a pulse", OTHER, vec![0x61]),
        ("a message", 30, vec![0x62]),
        ("the PIC", 5, vec![0x45]),
        ("two controllers", 31, vec![0x46, 0x64]),
    ] {
        let fd = EventFd::new()?;
        assign(&g.vm, &fd, gsi)?;
        for round in 0..5 {
            // An EOI of the APIC when it was the PIC's ends nothing.
            fd.signal()?;
            seen += vectors.len() as u64;
            until_seen(&g, seen, &format!("{what}, round {round}"))?;
            ensure_eq!(fd.take()?, 0, "{what}: the counter: it was taken");
        }
        let mut log = g.log(0);
        let mut got = log.split_off(log.len() - vectors.len());
        got.sort_unstable();
        ensure_eq!(got, vectors, "{what}: vectors");
        deassign(&g.vm, &fd, gsi)?;
        fd.signal()?;
        sleep_ms(2);
        until_seen(&g, seen, &format!("{what}, deassigned"))?;
        ensure_eq!(fd.take()?, 1, "{what}: the counter of an eventfd again");
    }
    Ok(())
}

/// An eventfd that has been signalled already when it is assigned is one interrupt.
fn signalled_before(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    route(&g.vm, &[to_pin(GSI, 2, 20), to_msi(30, APIC, 0x62)])?;
    set_entry(&g.vm, 20, 0x60)?;
    let mut seen = 0;
    for gsi in [GSI, 30] {
        let fd = EventFd::new()?;
        (0..3).try_for_each(|_| fd.signal())?;
        assign(&g.vm, &fd, gsi)?;
        seen += 1;
        until_seen(&g, seen, "signalled three times before")?;
        fd.signal()?;
        seen += 1;
        until_seen(&g, seen, "once more")?;
    }
    Ok(())
}

/// Many signals before the guest looks are one interrupt.
fn coalesced(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Split(24), 1)?;
    route(&g.vm, &[to_msi(30, APIC, 0x62)])?;
    let fd = EventFd::new()?;
    assign(&g.vm, &fd, 30)?;
    (0..50).try_for_each(|_| fd.signal())?;
    until_seen(&g, 1, "fifty signals")
}

/// Resampling: the line stays up until the EOI, which signals the other eventfd.
fn resample(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let bits = 0x61 | LEVEL;
    set_entry(&g.vm, GSI as usize, bits)?;
    let (fd, eoi) = (EventFd::new()?, EventFd::new()?);
    assign_level(&g.vm, &fd, GSI, &eoi)?;
    g.set_how(0, 0);
    for round in 1..=3 {
        fd.signal()?;
        until_seen(&g, round, "a level")?;
        ensure_eq!(entry(&g.vm, GSI as usize)?, bits | REMOTE_IRR, "entry");
        ensure_eq!(irq::ioapic(&g.vm)?.irr, 1 << GSI, "lines: it stays up");
        ensure_eq!(eoi.take()?, 0, "EOIs before the EOI");
        g.write(0, APIC + 0xb0, 0)?;
        ensure!(eoi.wait(patient(1000)), "no signal at the EOI");
        ensure_eq!(eoi.take()?, 1, "EOIs");
        ensure_eq!(irq::ioapic(&g.vm)?.irr, 0, "lines: it fell");
        g.window(0)?;
        ensure_eq!(g.seen(0), round, "interrupts behind the EOI");
    }
    // Signalled again before the EOI: it is up already, and the EOI lowers it.
    fd.signal()?;
    until_seen(&g, 4, "a level")?;
    fd.signal()?;
    sleep_ms(5);
    g.write(0, APIC + 0xb0, 0)?;
    ensure!(eoi.wait(patient(1000)), "no signal at the EOI");
    ensure_eq!(eoi.take()?, 1, "EOIs");
    until_seen(&g, 4, "a level raised twice")?;
    // The line of userspace is another source: the EOI does not lower it.
    fd.signal()?;
    until_seen(&g, 5, "a level")?;
    line(&g.vm, GSI, 1)?;
    g.write(0, APIC + 0xb0, 0)?;
    until_seen(&g, 6, "the level of userspace")?;
    line(&g.vm, GSI, 0)?;
    g.write(0, APIC + 0xb0, 0)?;
    until_seen(&g, 6, "no level any more")?;
    eoi.take()?;
    // Deassigned, its line falls.
    fd.signal()?;
    until_seen(&g, 7, "a level")?;
    deassign(&g.vm, &fd, GSI)?;
    ensure_eq!(irq::ioapic(&g.vm)?.irr, 0, "lines of one that is gone");
    g.write(0, APIC + 0xb0, 0)?;
    ensure_eq!(eoi.take()?, 0, "EOIs once it is gone");
    until_seen(&g, 7, "at the end")
}

/// Several that share a level: each is told of an EOI, and the line is theirs together.
fn resample_shared(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    set_entry(&g.vm, GSI as usize, 0x61 | LEVEL)?;
    g.set_how(0, 0);
    let mut fds = vec![];
    for _ in 0..3 {
        let (fd, eoi) = (EventFd::new()?, EventFd::new()?);
        assign_level(&g.vm, &fd, GSI, &eoi)?;
        fds.push((fd, eoi));
    }
    for round in 0..3 {
        fds[round].0.signal()?;
        until_seen(&g, round as u64 + 1, "a level")?;
        g.write(0, APIC + 0xb0, 0)?;
        for (i, (_, eoi)) in fds.iter().enumerate() {
            ensure!(eoi.wait(patient(1000)), "{i}: no signal at the EOI");
            ensure_eq!(eoi.take()?, 1, "{i}: EOIs");
        }
    }
    // One of them goes: the others' line stays as it is.
    fds[0].0.signal()?;
    until_seen(&g, 4, "a level")?;
    deassign(&g.vm, &fds[0].0, GSI)?;
    ensure_eq!(irq::ioapic(&g.vm)?.irr, 1 << GSI, "lines");
    g.write(0, APIC + 0xb0, 0)?;
    ensure!(fds[1].1.wait(patient(1000)), "no signal at the EOI");
    ensure_eq!(fds[0].1.take()?, 0, "EOIs of one that is gone");
    until_seen(&g, 4, "at the end")
}

/// Resampling by the EOI of a PIC.
fn resample_pic(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    g.set_how(0, 0);
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x40),
        (0x21, 4),
        (0x21, 1),
        (0x4d0, 0x20),
    ] {
        g.out8(port, value)?;
    }
    let (fd, eoi) = (EventFd::new()?, EventFd::new()?);
    assign_level(&g.vm, &fd, 5, &eoi)?;
    for round in 1..=3 {
        fd.signal()?;
        until_seen(&g, round, "a level of the PIC")?;
        ensure_eq!(g.log(0).last().copied(), Some(0x45), "vector");
        ensure_eq!(eoi.take()?, 0, "EOIs before the EOI");
        ensure_eq!(pic(&g.vm, 0)?.irr, 1 << 5, "request register");
        g.out8(0x20, 0x20)?;
        ensure!(eoi.wait(patient(1000)), "no signal at the EOI");
        ensure_eq!(eoi.take()?, 1, "EOIs");
        ensure_eq!(pic(&g.vm, 0)?.irr, 0, "request register behind the EOI");
        until_seen(&g, round, "behind the EOI")?;
    }
    Ok(())
}

/// Levels of a device that raises its line again at each EOI, while its guest runs or is halted.
fn resample_running(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    set_entry(&g.vm, GSI as usize, 0x61 | LEVEL)?;
    let (fd, eoi) = (EventFd::new()?, EventFd::new()?);
    assign_level(&g.vm, &fd, GSI, &eoi)?;
    let mut want = 0;
    for code in [irq::spin(), irq::idle()] {
        g.running(code, |_| {
            for round in 0..env.fewer(100) {
                fd.signal()?;
                ensure!(eoi.wait(patient(3000)), "round {round}: no EOI");
                ensure_eq!(eoi.take()?, 1, "round {round}: EOIs");
                want += 1;
                ensure_eq!(g.count(0, 0x61), want, "round {round}: interrupts");
            }
            Ok(())
        })?;
    }
    ensure_eq!(
        entry(&g.vm, GSI as usize)?,
        0x61 | LEVEL,
        "entry at the end"
    );
    ensure_eq!(irq::ioapic(&g.vm)?.irr, 0, "lines at the end");
    Ok(())
}

/// A level that was masked when it came: unmasked, its owner is asked, and raises it again if it still
/// means it.
fn resample_unmasked(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let set = |bits: u64| {
        g.write(0, IOAPIC, 0x10 + GSI * 2)?;
        g.write(0, IOAPIC + 0x10, bits as u32)
    };
    set(0x61 | LEVEL | MASKED)?;
    g.set_how(0, 0);
    let (fd, eoi) = (EventFd::new()?, EventFd::new()?);
    assign_level(&g.vm, &fd, GSI, &eoi)?;
    fd.signal()?;
    wait_for("the line", || {
        irq::ioapic(&g.vm).is_ok_and(|s| s.irr == 1 << GSI)
    })?;
    set(0x61 | LEVEL)?;
    g.window(0)?;
    ensure_eq!(
        g.seen(0),
        0,
        "interrupts: nobody says that it is still meant"
    );
    ensure!(eoi.wait(patient(1000)), "no signal when unmasked");
    ensure_eq!(eoi.take()?, 1, "signals");
    fd.signal()?;
    until_seen(&g, 1, "raised again")
}

/// An eventfd that is closed is deassigned; so are all when the VM goes.
fn closed(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    set_entry(&g.vm, GSI as usize, 0x60)?;
    for round in 1..=env.fewer(20) {
        let fd = EventFd::new()?;
        assign(&g.vm, &fd, GSI)?;
        fd.signal()?;
        drop(fd);
        // The signal came before the end.
        until_seen(&g, round, "signalled, then closed")?;
    }
    // The level of one that is closed falls. That takes a worker.
    set_entry(&g.vm, OTHER as usize, 0x61 | LEVEL | MASKED)?;
    let (fd, eoi) = (EventFd::new()?, EventFd::new()?);
    assign_level(&g.vm, &fd, OTHER, &eoi)?;
    fd.signal()?;
    let lines = || {
        irq::ioapic(&g.vm)
            .map(|s| (s.irr >> OTHER) & 1)
            .unwrap_or(9)
    };
    wait_for("the line", || lines() == 1)?;
    drop(fd);
    wait_for("the line to fall", || lines() == 0)?;
    // The VM's file is closed: its eventfds are free, though a vCPU's is still open.
    let fd = EventFd::new()?;
    assign(&g.vm, &fd, GSI)?;
    let Guest { vcpus, vm, .. } = g;
    drop(vm);
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    assign(&vm, &fd, GSI)?;
    drop(vcpus);
    Ok(())
}

/// Very many, each its own message.
fn many(env: &Env) -> Outcome {
    const N: u32 = 150;
    let g = Guest::new(env, Chips::Full, 1)?;
    let table: Vec<_> = (0..N).map(|i| to_msi(100 + i, APIC, 0x40 + i)).collect();
    route(&g.vm, &table)?;
    let mut fds = vec![];
    for i in 0..N {
        let fd = EventFd::new()?;
        assign(&g.vm, &fd, 100 + i)?;
        fds.push(fd);
    }
    for (i, fd) in fds.iter().enumerate().rev() {
        fd.signal()?;
        if i % 7 == 0 {
            g.window(0)?;
        }
    }
    until_seen(&g, N.into(), "one each")?;
    for i in 0..N {
        ensure_eq!(g.count(0, 0x40 + i as u8), 1, "interrupts of number {i}");
    }
    for (i, fd) in fds.iter().enumerate() {
        if i % 2 == 0 {
            deassign(&g.vm, fd, 100 + i as u32)?;
        }
    }
    fds.iter().try_for_each(EventFd::signal)?;
    until_seen(&g, u64::from(N + N / 2), "those that are left")
}

/// Sends `rounds` interrupts, waiting for each.
fn count(g: &Guest, fd: &EventFd, id: usize, vector: u8, rounds: u64) -> Outcome {
    let before = g.count(id, vector);
    for round in 1..=rounds {
        fd.signal()?;
        let what = format!("interrupt {round} of {rounds}, vector {vector:#x}");
        wait_for(&what, || g.count(id, vector) == before + round)?;
    }
    Ok(())
}

/// To a vCPU that runs, to one that is halted, and to one that waits for its processor: none is lost.
fn none_lost(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    route(
        &g.vm,
        &[
            to_msi(30, APIC, 0x62),
            to_msi(31, APIC | (1 << 12), 0x63),
            to_pin(GSI, 2, 20),
        ],
    )?;
    set_entry(&g.vm, 20, 0x71)?;
    let fds = [EventFd::new()?, EventFd::new()?, EventFd::new()?];
    for (fd, gsi) in fds.iter().zip([30, 31, GSI]) {
        assign(&g.vm, fd, gsi)?;
    }
    let rounds = env.fewer(150);
    for (what, code, share) in [
        ("halted", irq::idle(), false),
        ("running", irq::spin(), false),
        ("preempted", irq::spin(), true),
    ] {
        let cpus = selftests::host::cpus();
        let before = g.turns(0);
        g.running(code, |threads| {
            if share {
                // Both on one processor, where this thread is, too.
                for t in threads {
                    pin(t.tid(), cpus[0])?;
                }
                pin(0, cpus[0])?;
            }
            let rounds = if share { rounds / 5 } else { rounds };
            for (fd, id, vector) in [(&fds[0], 0, 0x62), (&fds[1], 1, 0x63), (&fds[2], 0, 0x71)] {
                count(&g, fd, id, vector, rounds)
                    .map_err(|e| Verdict::Fail(format!("{what}: {e:?}")))?;
            }
            Ok(())
        })?;
        ensure!(g.turns(0) > before, "{what}: the guest never ran");
    }
    Ok(())
}

/// While an eventfd is signalled, its route changes between two vCPUs and back, and goes away and
/// comes back: each signal that a route was there for arrives once.
fn routes_change(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    let fd = EventFd::new()?;
    let to = |id: u64| [to_msi(30, APIC | (id << 12), 0x62)];
    route(&g.vm, &to(0))?;
    assign(&g.vm, &fd, 30)?;
    let done = AtomicBool::new(false);
    let tables = AtomicU64::new(0);
    g.running(irq::spin(), |_| {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| -> Outcome {
                while !done.load(Ordering::SeqCst) {
                    let n = tables.fetch_add(1, Ordering::SeqCst);
                    route(&g.vm, &to(n % 2))?;
                }
                Ok(())
            });
            let sum = || g.count(0, 0x62) + g.count(1, 0x62);
            let signals = || -> Outcome {
                let mut round = 0;
                while round < env.fewer(100) || tables.load(Ordering::SeqCst) < env.fewer(20) {
                    round += 1;
                    fd.signal()?;
                    wait_for(&format!("interrupt {round}"), || sum() == round)?;
                }
                Ok(())
            };
            let r = signals();
            done.store(true, Ordering::SeqCst);
            other.join().unwrap_or_else(|_| fail!("panic"))?;
            r
        })?;
        // Without a route, a signal is nothing, and is not kept.
        let before = (g.seen(0), g.seen(1));
        route(&g.vm, &[])?;
        fd.signal()?;
        sleep_ms(5);
        ensure_eq!(fd.take()?, 0, "the counter without a route");
        route(&g.vm, &to(1))?;
        sleep_ms(5);
        ensure_eq!((g.seen(0), g.seen(1)), before, "interrupts without a route");
        count(&g, &fd, 1, 0x62, 5)
    })?;
    println!("{} tables", tables.load(Ordering::SeqCst));
    Ok(())
}

/// Assigned and deassigned while others signal it: once the call to deassign has returned, nothing
/// comes any more.
fn deassign_race(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    route(&g.vm, &[to_msi(30, APIC, 0x62), to_pin(GSI, 2, 20)])?;
    set_entry(&g.vm, 20, 0x71)?;
    let (a, b) = (EventFd::new()?, EventFd::new()?);
    let done = AtomicBool::new(false);
    let took = AtomicU64::new(0);
    g.running(irq::spin(), |_| {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| -> Outcome {
                while !done.load(Ordering::SeqCst) {
                    a.signal()?;
                    b.signal()?;
                }
                Ok(())
            });
            let cycles = || -> Outcome {
                for round in 0..env.fewer(25) {
                    let before = g.seen(0);
                    assign(&g.vm, &a, 30)?;
                    assign(&g.vm, &b, GSI)?;
                    wait_for("both", || g.seen(0) >= before + 2)?;
                    deassign(&g.vm, &a, 30)?;
                    deassign(&g.vm, &b, GSI)?;
                    // What was in the APIC by then may still be taken, once the vCPU's thread gets a
                    // CPU: the others have their slices first.
                    wait_for("the APIC to be empty", || {
                        let n = g.seen(0);
                        sleep_ms(25 * u64::from(env.slow));
                        g.seen(0) == n
                    })?;
                    let n = g.seen(0);
                    sleep_ms(5);
                    ensure_eq!(g.seen(0), n, "interrupts once deassigned, round {round}");
                    took.fetch_add(n - before, Ordering::SeqCst);
                }
                Ok(())
            };
            let r = cycles();
            done.store(true, Ordering::SeqCst);
            other.join().unwrap_or_else(|_| fail!("panic"))?;
            r
        })
    })?;
    println!("{} interrupts", took.load(Ordering::SeqCst));
    Ok(())
}

/// VMs that go while their eventfds are signalled; neither files nor descriptors are left.
fn vm_goes(env: &Env) -> Outcome {
    let (files, descriptors) = (system_files(), open_files());
    let fds: Vec<_> = (0..4).map(|_| EventFd::new()).collect::<Result<_, _>>()?;
    let eoi = EventFd::new()?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let other = scope.spawn(|| -> Outcome {
            while !done.load(Ordering::SeqCst) {
                fds.iter().try_for_each(EventFd::signal)?;
                // A guest that has only just begun would come to nothing else.
                std::thread::sleep(Duration::from_micros(300));
            }
            Ok(())
        });
        let cycles = || -> Outcome {
            for round in 0..env.fewer(16) {
                let g = Guest::new(env, Chips::Full, 1)?;
                route(
                    &g.vm,
                    &[
                        to_msi(30, APIC, 0x62),
                        to_pin(GSI, 2, 20),
                        to_pin(OTHER, 2, 21),
                    ],
                )?;
                set_entry(&g.vm, 20, 0x71)?;
                set_entry(&g.vm, 21, 0x72 | LEVEL)?;
                assign(&g.vm, &fds[0], 30)?;
                assign(&g.vm, &fds[1], GSI)?;
                assign_level(&g.vm, &fds[2], OTHER, &eoi)?;
                assign(&g.vm, &fds[3], 4000)?;
                g.window(0)?;
                let Guest { vcpus, vm, .. } = g;
                if round % 2 == 0 {
                    drop((vcpus, vm));
                } else {
                    drop((vm, vcpus));
                }
            }
            Ok(())
        };
        let r = cycles();
        done.store(true, Ordering::SeqCst);
        other.join().unwrap_or_else(|_| fail!("panic"))?;
        r
    })?;
    drop((fds, eoi));
    ensure_eq!(open_files(), descriptors, "descriptors");
    if let Some(before) = files {
        wait_for("the files to go", || {
            system_files().is_some_and(|n| n <= before + 20)
        })?;
    }
    Ok(())
}

/// An eventfd that a guest's write signals and that is the same guest's interrupt: the write comes
/// back as an interrupt, without any exit.
fn chained(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    if g.kvm.capability(kb::KVM_CAP_IOEVENTFD) <= 0 {
        skip!("no KVM_CAP_IOEVENTFD");
    }
    route(&g.vm, &[to_msi(30, APIC, 0x62)])?;
    let fd = EventFd::new()?;
    let io = kb::kvm_ioeventfd {
        addr: 0x123,
        len: 1,
        fd: fd.raw(),
        flags: 1 << kb::kvm_ioeventfd_flag_nr_pio,
        ..Default::default()
    };
    g.vm.fd.ioctl_ref(sys::KVM_IOEVENTFD, &io)?;
    assign(&g.vm, &fd, 30)?;
    for round in 1..=env.fewer(50) {
        g.out8(0x123, round as u8)?;
        until_seen(&g, round, "a write that comes back")?;
        ensure_eq!(fd.take()?, 0, "the counter");
    }
    Ok(())
}

/// Beside an irqfd, its GSI is still a line.
fn beside_lines(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    set_entry(&g.vm, GSI as usize, 0x60)?;
    let fd = EventFd::new()?;
    assign(&g.vm, &fd, GSI)?;
    line(&g.vm, GSI, 1)?;
    until_seen(&g, 1, "the line")?;
    // It is the same source: the pulse of the eventfd finds the line up, and leaves it down.
    fd.signal()?;
    wait_for("the line to fall", || {
        irq::ioapic(&g.vm).is_ok_and(|s| s.irr == 0)
    })?;
    until_seen(&g, 1, "no edge")?;
    ensure_eq!(line_status(&g.vm, GSI, 1)?, 1, "status of the next edge");
    line(&g.vm, GSI, 0)?;
    g.set_how(0, how::APIC);
    until_seen(&g, 2, "the line again")
}

fn main() -> ExitCode {
    selftests::tap::main(
        "irqfd",
        tests![
            arguments,
            busy,
            delivery,
            signalled_before,
            coalesced,
            resample,
            resample_shared,
            resample_pic,
            resample_running,
            resample_unmasked,
            closed,
            many,
            none_lost,
            routes_change,
            deassign_race,
            vm_goes,
            chained,
            beside_lines,
        ],
    )
}
