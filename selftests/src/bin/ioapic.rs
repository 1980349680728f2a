// SPDX-License-Identifier: GPL-2.0

//! The I/O APIC in the kernel: its state, its registers, and the lines that lead to it.

use kvm_bindings as kb;
use selftests::host::{kick, Rng};
use selftests::irq::redirect::{to, EXTINT, LEVEL, LOGICAL, LOW, LOWEST, MASKED, NMI, REMOTE_IRR};
use selftests::irq::{
    self, entry, how, ioapic, line, line_status, set_entry, set_ioapic, vm_with, wait_for, Chips,
    Guest, APIC, IOAPIC,
};
use selftests::machine::Exit;
use selftests::sys::{self, Error};
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// Pins that no PIC shares.
const PIN: u32 = 20;
const OTHER: u32 = 21;

fn state(env: &Env) -> Outcome {
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    let s = ioapic(&vm)?;
    ensure_eq!(
        (s.base_address, s.ioregsel, s.id, s.irr),
        (IOAPIC, 0, 0, 0),
        "base, selected register, identity, lines of a new one"
    );
    for pin in 0..24 {
        ensure_eq!(entry(&vm, pin)?, MASKED, "entry {pin} of a new one");
    }
    // Each entry, with all of its bits. Masked, for nothing is to be sent.
    let mut rng = Rng::new(env.seed);
    let mut want = s;
    (want.ioregsel, want.id) = (0x35, 9);
    for e in &mut want.redirtbl {
        e.bits = rng.number() | MASKED;
    }
    set_ioapic(&vm, want)?;
    let got = ioapic(&vm)?;
    ensure_eq!((got.ioregsel, got.id), (0x35, 9), "register and identity");
    for (pin, (g, w)) in got.redirtbl.iter().zip(&want.redirtbl).enumerate() {
        // SAFETY: Each entry is 64 bits.
        let (g, w) = unsafe { (g.bits, w.bits) };
        ensure_eq!(g, w, "entry {pin}");
    }
    // The lines that are up and were not sent.
    want.irr = 0xa5_5a5a;
    set_ioapic(&vm, want)?;
    ensure_eq!(ioapic(&vm)?.irr, 0xa5_5a5a, "lines");
    want.irr = 0;
    set_ioapic(&vm, want)?;
    ensure_eq!(ioapic(&vm)?.irr, 0, "no lines");
    Ok(())
}

/// What KVM_IRQ_LINE_STATUS says.
fn status(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let vm = &g.vm;
    for gsi in [24, 4095, 4096, 0x8000_0000, u32::MAX] {
        line(vm, gsi, 1)?;
        ensure_eq!(line_status(vm, gsi, 1)?, -1, "GSI {gsi:#x}");
        ensure_eq!(line_status(vm, gsi, 0)?, -1, "GSI {gsi:#x}");
    }
    let expect = |what: &str, entry: u64, steps: &[(u32, i32)]| -> Outcome {
        line(vm, PIN, 0)?;
        g.window(0)?;
        set_entry(vm, PIN as usize, entry)?;
        for (i, (level, want)) in steps.iter().enumerate() {
            let got = line_status(vm, PIN, *level)?;
            ensure_eq!(got, *want, "{what}: step {i}, level {level}");
        }
        Ok(())
    };
    expect(
        "edge",
        0x60,
        &[(0, 1), (1, 1), (1, 0), (0, 1), (1, 1), (0, 1)],
    )?;
    g.window(0)?;
    expect(
        "edge, masked",
        0x60 | MASKED,
        &[(1, -1), (1, 0), (0, 1), (1, -1)],
    )?;
    // What waits for its EOI is ignored, not coalesced.
    expect(
        "level",
        0x60 | LEVEL,
        &[(1, 1), (1, -1), (0, 1), (0, 1), (1, -1)],
    )?;
    expect(
        "level, masked",
        0x60 | LEVEL | MASKED,
        &[(1, -1), (1, -1), (0, 1)],
    )?;
    // Any level that is not 0 is high.
    expect(
        "levels",
        0x60,
        &[(2, 1), (1, 0), (u32::MAX, 0), (0, 1), (0x8000_0000, 1)],
    )?;
    line(vm, PIN, 0)?;
    g.window(0)?;
    // An APIC that is disabled takes nothing, but is there.
    g.write(0, APIC + 0xf0, 0xff)?;
    expect("edge, disabled APIC", 0x60, &[(1, 0), (0, 1), (1, 0)])?;
    expect(
        "level, disabled APIC",
        0x60 | LEVEL,
        &[(1, 0), (1, 0), (0, 1)],
    )?;
    let e = entry(vm, PIN as usize)?;
    ensure_eq!(e & REMOTE_IRR, 0, "remote IRR if nobody took it");
    Ok(())
}

/// An edge is one interrupt, and the line has to fall before the next. What came while it was masked
/// is gone.
fn edge(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let vm = &g.vm;
    set_entry(vm, PIN as usize, 0x61)?;
    line(vm, PIN, 1)?;
    ensure_eq!(g.seen(0), 0, "interrupts before it could take them");
    g.window(0)?;
    ensure_eq!(g.log(0), [0x61], "vectors");
    g.window(0)?;
    line(vm, PIN, 1)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x61], "vectors while the line stays high");
    for _ in 0..3 {
        line(vm, PIN, 0)?;
        line(vm, PIN, 1)?;
    }
    g.window(0)?;
    ensure_eq!(g.log(0), [0x61; 2], "vectors: three edges before it looked");
    line(vm, PIN, 0)?;
    set_entry(vm, PIN as usize, 0x61 | MASKED)?;
    line(vm, PIN, 1)?;
    g.window(0)?;
    let select = 0x10 + PIN * 2;
    g.write(0, IOAPIC, select)?;
    g.write(0, IOAPIC + 0x10, 0x61)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x61; 2], "vectors: an edge while masked");
    line(vm, PIN, 0)?;
    line(vm, PIN, 1)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x61; 3], "vectors once unmasked");
    ensure_eq!(entry(vm, PIN as usize)?, 0x61, "entry: no remote IRR");
    Ok(())
}

/// A level is an interrupt after each EOI until the line falls.
fn level(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let vm = &g.vm;
    let bits = 0x62 | LEVEL;
    set_entry(vm, PIN as usize, bits)?;
    g.set_how(0, how::APIC | how::REPORT);
    line(vm, PIN, 1)?;
    ensure_eq!(
        entry(vm, PIN as usize)?,
        bits | REMOTE_IRR,
        "entry when sent"
    );
    let mut left = 5;
    g.window_with(0, &mut |_| {
        left -= 1;
        if left == 0 {
            line(vm, PIN, 0)?;
        }
        Ok(())
    })?;
    ensure_eq!(g.log(0), [0x62; 5], "vectors: four times it stayed high");
    ensure_eq!(entry(vm, PIN as usize)?, bits, "entry at the end");
    g.window(0)?;
    ensure_eq!(g.seen(0), 5, "interrupts while the line is low");

    // Without its EOI there is no other, even if the line falls and rises.
    g.forget(0);
    g.set_how(0, 0);
    line(vm, PIN, 1)?;
    g.window(0)?;
    line(vm, PIN, 0)?;
    line(vm, PIN, 1)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x62], "vectors without EOI");
    ensure_eq!(entry(vm, PIN as usize)?, bits | REMOTE_IRR, "entry then");
    // The I/O APIC has no EOI register of its own: this is of version 0x20.
    g.write(0, IOAPIC + 0x40, 0x62)?;
    ensure_eq!(entry(vm, PIN as usize)?, bits | REMOTE_IRR, "entry then");
    g.write(0, APIC + 0xb0, 0)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x62; 2], "vectors behind the EOI");
    line(vm, PIN, 0)?;
    g.write(0, APIC + 0xb0, 0)?;
    ensure_eq!(entry(vm, PIN as usize)?, bits, "entry at the end");

    // A line that fell before it was looked at is taken nevertheless.
    g.set_how(0, how::APIC);
    line(vm, PIN, 1)?;
    line(vm, PIN, 0)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x62; 3], "vectors: high and low again");
    Ok(())
}

/// Writes of the guest to an entry: masking a level and unmasking it, switching to edge.
fn masking(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let vm = &g.vm;
    let low = 0x10 + PIN * 2;
    let set = |bits: u64| {
        g.write(0, IOAPIC, low)?;
        g.write(0, IOAPIC + 0x10, bits as u32)
    };
    set(0x63 | LEVEL | MASKED)?;
    line(vm, PIN, 1)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [], "vectors while masked");
    g.set_how(0, 0);
    // What is high is sent when it is unmasked.
    set(0x63 | LEVEL)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x63], "vectors once unmasked");
    // Remote IRR and the delivery status are not the guest's to write.
    set(0x63 | LEVEL | (1 << 12))?;
    let want = 0x63 | LEVEL | REMOTE_IRR;
    ensure_eq!(entry(vm, PIN as usize)?, want, "entry once written");
    set(0x63 | LEVEL | MASKED | REMOTE_IRR)?;
    set(0x63 | LEVEL)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x63], "vectors without EOI");
    // To edge and back: remote IRR is forgotten, the way to do an EOI without an EOI register.
    set(0x63 | MASKED)?;
    ensure_eq!(entry(vm, PIN as usize)?, 0x63 | MASKED, "entry as an edge");
    g.write(0, APIC + 0xb0, 0)?;
    set(0x63 | LEVEL)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x63; 2], "vectors once it is a level again");
    // An EOI while it is masked, and then no line.
    set(0x63 | LEVEL | MASKED)?;
    g.write(0, APIC + 0xb0, 0)?;
    ensure_eq!(entry(vm, PIN as usize)?, 0x63 | LEVEL | MASKED, "entry");
    line(vm, PIN, 0)?;
    set(0x63 | LEVEL)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x63; 2], "vectors at the end");
    Ok(())
}

/// Level 1 is high, whatever polarity the entry has.
fn polarity(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    for (pin, bits) in [(PIN, 0x64), (OTHER, 0x65 | LEVEL)] {
        set_entry(&g.vm, pin as usize, bits | LOW)?;
        g.window(0)?;
        line(&g.vm, pin, 1)?;
        line(&g.vm, pin, 0)?;
        g.window(0)?;
    }
    ensure_eq!(g.log(0), [0x64, 0x65], "vectors");
    Ok(())
}

/// Where interrupts go, of two vCPUs, and as what.
fn destinations(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    for id in 0..2 {
        // Flat logical addressing, a bit each.
        g.write(id, APIC + 0xd0, 1 << (24 + id))?;
    }
    let pin = PIN as usize;
    for (what, bits, status, want) in [
        ("vCPU 0", 0x70, 1, (1, 0)),
        ("vCPU 1", 0x70 | to(1), 1, (0, 1)),
        ("all", 0x70 | to(0xff), 2, (1, 1)),
        ("set 1", 0x70 | LOGICAL | to(1), 1, (1, 0)),
        ("set 2", 0x70 | LOGICAL | to(2), 1, (0, 1)),
        ("set 3", 0x70 | LOGICAL | to(3), 2, (1, 1)),
        (
            "lowest priority, set 1",
            0x70 | LOWEST | LOGICAL | to(1),
            1,
            (1, 0),
        ),
        (
            "lowest priority, set 2",
            0x70 | LOWEST | LOGICAL | to(2),
            1,
            (0, 1),
        ),
    ] {
        set_entry(&g.vm, pin, bits)?;
        ensure_eq!(line_status(&g.vm, PIN, 1)?, status, "{what}: status");
        line(&g.vm, PIN, 0)?;
        for id in 0..2 {
            g.window(id)?;
        }
        let got = (g.count(0, 0x70), g.count(1, 0x70));
        ensure_eq!(got, want, "{what}: interrupts of vCPU 0 and 1");
        (0..2).for_each(|id| g.forget(id));
    }
    // Of a set that both are in, lowest priority has one take it.
    set_entry(&g.vm, pin, 0x70 | LOWEST | LOGICAL | to(3))?;
    for round in 1..=4 {
        ensure_eq!(line_status(&g.vm, PIN, 1)?, 1, "lowest priority: status");
        line(&g.vm, PIN, 0)?;
        for id in 0..2 {
            g.window(id)?;
        }
        let sum = g.count(0, 0x70) + g.count(1, 0x70);
        ensure_eq!(sum, round, "lowest priority: interrupts");
    }
    // Nobody there.
    for bits in [
        0x70 | to(7),
        0x70 | LOGICAL | to(0x80),
        0x70 | LOWEST | LOGICAL,
    ] {
        set_entry(&g.vm, pin, bits)?;
        let s = line_status(&g.vm, PIN, 1)?;
        ensure!(s <= 0, "entry {bits:#x}: status {s} for nobody");
        line(&g.vm, PIN, 0)?;
    }
    // An NMI has no vector; there is no EOI.
    (0..2).for_each(|id| g.forget(id));
    set_entry(&g.vm, pin, 0x70 | NMI | to(1))?;
    ensure_eq!(line_status(&g.vm, PIN, 1)?, 1, "NMI: status");
    line(&g.vm, PIN, 0)?;
    for id in 0..2 {
        g.exec(id, &[0x90, 0xc3], |_| {})?; // nop; ret
    }
    ensure_eq!((g.log(0), g.log(1)), (vec![], vec![2]), "NMI: vectors");
    // ExtINT is not for the I/O APIC here: nobody takes it.
    set_entry(&g.vm, pin, 0x70 | EXTINT)?;
    ensure_eq!(line_status(&g.vm, PIN, 1)?, 0, "ExtINT: status");
    g.window(0)?;
    ensure_eq!(g.seen(0), 0, "ExtINT: interrupts");
    Ok(())
}

/// A halted vCPU wakes up.
fn wakes(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    for (id, pin) in [(0, PIN), (1, OTHER)] {
        set_entry(&g.vm, pin as usize, 0x71 | to(id))?;
    }
    g.running(irq::idle(), |_| {
        for round in 1..=env.fewer(50) {
            for (id, pin) in [(0, PIN), (1, OTHER)] {
                line(&g.vm, pin, 1)?;
                line(&g.vm, pin, 0)?;
                let what = format!("interrupt {round} of vCPU {id}");
                wait_for(&what, || g.count(id, 0x71) == round)?;
                wait_for("the way back to HLT", || g.turns(id) >= round)?;
            }
        }
        Ok(())
    })
}

/// A running vCPU is interrupted: each level until the handler had the line lowered, from two threads.
fn interrupts_running(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    set_entry(&g.vm, PIN as usize, 0x72)?;
    set_entry(&g.vm, OTHER as usize, 0x83 | LEVEL)?;
    let n = env.fewer(150);
    g.running(irq::spin(), |_| {
        std::thread::scope(|scope| -> Outcome {
            let other = scope.spawn(|| -> Outcome {
                for _ in 0..n {
                    let before = g.count(0, 0x83);
                    line(&g.vm, OTHER, 1)?;
                    wait_for("a level", || g.count(0, 0x83) >= before + 2)?;
                    line(&g.vm, OTHER, 0)?;
                }
                Ok(())
            });
            let mut r = Ok(());
            for round in 1..=n {
                line(&g.vm, PIN, 1)?;
                line(&g.vm, PIN, 0)?;
                r = wait_for("an edge", || g.count(0, 0x72) == round);
                if r.is_err() {
                    break;
                }
            }
            let o = other.join();
            r?;
            o.unwrap_or_else(|_| fail!("panic"))
        })
    })?;
    ensure_eq!(g.count(0, 0x72), n, "edges");
    ensure!(g.turns(0) > 0, "the guest never ran");
    let e = entry(&g.vm, OTHER as usize)?;
    ensure_eq!(e, 0x83 | LEVEL, "the level's entry at the end");
    Ok(())
}

/// The clock's line, GSI 8, is coalesced until the EOI, for those who ask for the status.
fn clock(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    for id in 0..2 {
        let mut p = irq::pic(&g.vm, id)?;
        p.imr = 0xff;
        irq::set_pic(&g.vm, id, p)?;
    }
    g.set_how(0, 0);
    set_entry(&g.vm, 8, 0x73)?;
    let pulse = || -> Result<i32, Error> {
        let s = line_status(&g.vm, 8, 1)?;
        line_status(&g.vm, 8, 0)?;
        Ok(s)
    };
    ensure_eq!(pulse()?, 1, "the first");
    // kvm-intel takes a vector for ended that is still on its way to a processor that takes interrupts
    // by itself: 1, though it becomes one with the first.
    let second = pulse()?;
    ensure!(second == 0 || second == 1, "the second at once: {second}");
    g.window(0)?;
    ensure_eq!(pulse()?, 0, "behind the delivery, before the EOI");
    g.write(0, APIC + 0xb0, 0)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x73], "vectors");
    ensure_eq!(pulse()?, 1, "behind the EOI");
    g.window(0)?;
    ensure_eq!(g.log(0), [0x73; 2], "vectors");
    Ok(())
}

guest_code!(read8, ".code64", "xor eax, eax", "mov al, [rdi]", "ret");
guest_code!(read16, ".code64", "xor eax, eax", "mov ax, [rdi]", "ret");
guest_code!(read64, ".code64", "mov rax, [rdi]", "ret");
guest_code!(write8, ".code64", "mov [rdi], al", "ret");
guest_code!(write16, ".code64", "mov [rdi], ax", "ret");
guest_code!(write64, ".code64", "mov [rdi], rax", "ret");

/// The I/O APIC's registers as the guest sees them.
fn registers(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let get = |register: u32| {
        g.write(0, IOAPIC, register)?;
        g.read(0, IOAPIC + 0x10)
    };
    let set = |register: u32, value: u32| {
        g.write(0, IOAPIC, register)?;
        g.write(0, IOAPIC + 0x10, value)
    };
    ensure_eq!(get(1)?, 0x17_0011, "version: 24 pins");
    set(1, 0)?;
    ensure_eq!(get(1)?, 0x17_0011, "version, written");
    ensure_eq!((get(0)?, get(2)?), (0, 0), "identity and arbitration");
    set(0, 0xffff_ffff)?;
    ensure_eq!(
        (get(0)?, get(2)?),
        (0x0f00_0000, 0x0f00_0000),
        "identity, arbitration"
    );
    ensure_eq!(ioapic(&g.vm)?.id, 15, "identity");
    set(2, 0)?;
    set(0, 0x0500_0000)?;
    ensure_eq!(
        (get(0)?, get(2)?),
        (0x0500_0000, 0x0500_0000),
        "identity, arbitration"
    );
    for pin in [0, 1, 23] {
        set(0x10 + pin * 2, 0x1_a5b3)?;
        set(0x11 + pin * 2, 0xc300_0000)?;
        let want = (0x1_a5b3 & !(REMOTE_IRR as u32) & !0x1000, 0xc300_0000);
        let got = (get(0x10 + pin * 2)?, get(0x11 + pin * 2)?);
        ensure_eq!(got, want, "entry {pin}");
        let bits = (u64::from(want.1) << 32) | u64::from(want.0);
        ensure_eq!(entry(&g.vm, pin as usize)?, bits, "entry {pin}");
    }
    // Behind the last entry, and between the first registers and the entries, there is nothing.
    let before = ioapic(&g.vm)?;
    for register in [3, 0xf, 0x40, 0x41, 0xff] {
        set(register, 0x1234)?;
        ensure_eq!(get(register)?, u32::MAX, "register {register:#x}");
    }
    let after = ioapic(&g.vm)?;
    for pin in 0..24 {
        // SAFETY: Each entry is 64 bits.
        let (b, a) = unsafe { (before.redirtbl[pin].bits, after.redirtbl[pin].bits) };
        ensure_eq!(a, b, "entry {pin} behind writes to no register");
    }
    // The selection has 8 bits.
    g.write(0, IOAPIC, 0x101)?;
    ensure_eq!(g.read(0, IOAPIC)?, 1, "selection");
    ensure_eq!(g.read(0, IOAPIC + 0x10)?, 0x17_0011, "what it selects");
    // The other addresses of its 256 bytes read as 0.
    for offset in [4, 8, 0x14, 0x20, 0x40, 0xfc] {
        g.write(0, IOAPIC + offset, 0x10)?;
        ensure_eq!(g.read(0, IOAPIC + offset)?, 0, "offset {offset:#x}");
    }
    ensure_eq!(g.read(0, IOAPIC)?, 1, "selection behind all that");
    Ok(())
}

/// Accesses of other sizes, and such as leave the I/O APIC's 256 bytes.
fn widths(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let access = |code: &[u8], address: u64, value: u64| {
        let r = g.exec(0, code, |r| (r.rdi, r.rax) = (address, value))?;
        Ok::<u64, Verdict>(r.rax)
    };
    g.write(0, IOAPIC, 1)?;
    ensure_eq!(access(read8(), IOAPIC + 0x10, 0)?, 0x11, "a byte");
    ensure_eq!(access(read16(), IOAPIC + 0x10, 0)?, 0x11, "two bytes");
    ensure_eq!(
        access(read64(), IOAPIC + 0x10, u64::MAX)?,
        0x17_0011,
        "eight bytes"
    );
    let low = u64::from(0x10 + PIN * 2);
    for (code, value, want) in [
        (write8(), 0x1_0099, 0x99),
        (write16(), 0x1_a0aa, 0xa0aa),
        (write64(), 0x77_0001_00bb, 0x1_00bb),
    ] {
        access(write8(), IOAPIC, low)?;
        access(code, IOAPIC + 0x10, value)?;
        ensure_eq!(entry(&g.vm, PIN as usize)?, want, "entry");
    }
    // Partly or wholly outside: userspace's.
    for (code, address, want) in [
        (write64(), IOAPIC + 0xfc, 8),
        (write8(), IOAPIC + 0x100, 1),
        (write16(), IOAPIC - 1, 2),
        (write8(), IOAPIC - 1, 1),
    ] {
        let value = 0x8877_6655_4433_2211u64;
        g.begin(0, code, |r| (r.rdi, r.rax) = (address, value))?;
        let mut data = vec![];
        while data.len() < want {
            // A write over the end of a page comes as two.
            match g.run(0)? {
                Exit::MmioWrite { addr, data: d } => {
                    ensure_eq!(addr, address + data.len() as u64, "address");
                    data.extend(d);
                }
                // What is left is the I/O APIC's own.
                Exit::Out { .. } if address == IOAPIC - 1 => break,
                other => fail!("write to {address:#x}: exit {other:x?}"),
            }
        }
        ensure_eq!(data, value.to_le_bytes()[..data.len()], "data");
        ensure!(!data.is_empty(), "no exit for {address:#x}");
        if address != IOAPIC - 1 || data.len() == want {
            g.finish(0, &mut |_| Ok(()))?;
        }
    }
    Ok(())
}

/// What is under way goes to another VM with the state of both APICs: the EOI there ends it there.
fn moves(env: &Env) -> Outcome {
    let a = Guest::new(env, Chips::Full, 1)?;
    a.set_how(0, 0);
    set_entry(&a.vm, PIN as usize, 0x74 | LEVEL)?;
    set_entry(&a.vm, OTHER as usize, 0x85 | MASKED)?;
    line(&a.vm, PIN, 1)?;
    line(&a.vm, OTHER, 1)?;
    a.window(0)?;
    ensure_eq!(a.log(0), [0x74], "vectors");
    let state = ioapic(&a.vm)?;
    ensure_eq!((state.irr >> PIN) & 3, 3, "lines");
    let mut lapic = kb::kvm_lapic_state::default();
    a.vcpus[0].fd.ioctl_mut(sys::KVM_GET_LAPIC, &mut lapic)?;

    let b = Guest::new(env, Chips::Full, 1)?;
    b.set_how(0, 0);
    b.vcpus[0].fd.ioctl_ref(sys::KVM_SET_LAPIC, &lapic)?;
    set_ioapic(&b.vm, state)?;
    let want = 0x74 | LEVEL | REMOTE_IRR;
    ensure_eq!(entry(&b.vm, PIN as usize)?, want, "entry");
    b.window(0)?;
    ensure_eq!(b.log(0), [], "vectors: it is in service");
    b.write(0, APIC + 0xb0, 0)?;
    b.window(0)?;
    b.window(0)?;
    ensure_eq!(b.log(0), [0x74], "vectors: the line that came along");
    Ok(())
}

/// An edge that is pending in the state is sent when that is set, if its entry lets it.
fn replayed(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let mut s = ioapic(&g.vm)?;
    s.redirtbl[PIN as usize].bits = 0x75;
    s.redirtbl[OTHER as usize].bits = 0x86 | LEVEL;
    s.irr = (1 << PIN) | (1 << OTHER);
    set_ioapic(&g.vm, s)?;
    // The edge is not pending any more, as it was sent.
    ensure_eq!(ioapic(&g.vm)?.irr, 1 << OTHER, "lines");
    g.set_how(0, how::REPORT | how::APIC);
    g.window_with(0, &mut |v| {
        if v == 0x86 {
            line(&g.vm, OTHER, 0)?;
        }
        Ok(())
    })?;
    ensure_eq!(g.log(0), [0x86, 0x75], "vectors");
    Ok(())
}

/// A level that nobody lowers does not keep the host from its vCPU.
fn storm(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    set_entry(&g.vm, PIN as usize, 0x76 | LEVEL)?;
    g.running(irq::spin(), |threads| {
        line(&g.vm, PIN, 1)?;
        wait_for("a thousand interrupts", || g.count(0, 0x76) > 1000)?;
        let before = threads[0].signals();
        kick(threads[0].tid(), libc::SIGUSR1);
        wait_for("KVM_RUN to end", || threads[0].signals() > before)?;
        line(&g.vm, PIN, 0)?;
        let turns = g.turns(0);
        wait_for("the guest to go on", || g.turns(0) > turns)
    })?;
    let n = g.count(0, 0x76);
    g.window(0)?;
    ensure_eq!(g.count(0, 0x76), n, "interrupts with the line low");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "ioapic",
        tests![
            state,
            registers,
            widths,
            status,
            edge,
            level,
            masking,
            polarity,
            destinations,
            wakes,
            interrupts_running,
            clock,
            moves,
            replayed,
            storm,
        ],
    )
}
