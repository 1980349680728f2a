// SPDX-License-Identifier: GPL-2.0

//! The pair of PICs in the kernel: their state, their ports, and interrupts that come by way of LINT0.

use kvm_bindings as kb;
use selftests::host::Rng;
use selftests::irq::{
    self, how, line, line_status, pic, set_pic, vm_with, wait_for, Chips, Guest, APIC,
};
use selftests::machine::Exit;
use selftests::stats::Stats;
use selftests::vm::Vm;
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xa0;
/// Where the master's vectors begin, and the slave's.
const BASE: u8 = 0x40;
const BASE2: u8 = 0x48;

/// LVT LINT0 of the local APIC.
const LINT0: u64 = APIC + 0x350;
const EXTINT: u32 = 0x700;
const MASKED: u32 = 0x1_0000;

/// Initialises a PIC as an operating system does.
fn init(g: &Guest, port: u16, base: u8, icw4: u8) -> Outcome {
    g.out8(port, 0x11)?;
    g.out8(port + 1, base)?;
    g.out8(port + 1, if port == MASTER { 4 } else { 2 })?;
    g.out8(port + 1, icw4)
}

/// A guest with both PICs initialised, nothing masked. Its handlers do no EOI.
fn guest(env: &Env) -> Result<Guest, Verdict> {
    let g = Guest::new(env, Chips::Full, 1)?;
    g.set_how(0, 0);
    init(&g, MASTER, BASE, 1)?;
    init(&g, SLAVE, BASE2, 1)?;
    Ok(g)
}

fn pulse(vm: &Vm, gsi: u32) -> Result<i32, Verdict> {
    let s = line_status(vm, gsi, 1)?;
    line(vm, gsi, 0)?;
    Ok(s)
}

/// What the vCPU takes when it looks.
fn taken(g: &Guest) -> Result<Vec<u8>, Verdict> {
    g.forget(0);
    g.window(0)?;
    Ok(g.log(0))
}

/// The state of new ones, and each byte of it.
fn state(env: &Env) -> Outcome {
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    for (id, elcr_mask) in [(0, 0xf8), (1, 0xde)] {
        let want = kb::kvm_pic_state {
            elcr_mask,
            ..Default::default()
        };
        ensure_eq!(pic(&vm, id)?, want, "new PIC {id}");
    }
    let mut rng = Rng::new(env.seed);
    for _ in 0..10 {
        let mut byte = || rng.number() as u8;
        let mut states = vec![];
        for id in 0..2 {
            let state = kb::kvm_pic_state {
                last_irr: byte(),
                irr: byte(),
                // Nothing is to happen.
                imr: 0xff,
                isr: byte(),
                priority_add: byte() & 7,
                irq_base: byte() & 0xf8,
                read_reg_select: byte() & 1,
                poll: byte() & 1,
                special_mask: byte() & 1,
                init_state: byte() & 3,
                auto_eoi: byte() & 1,
                rotate_on_auto_eoi: byte() & 1,
                special_fully_nested_mode: byte() & 1,
                init4: byte() & 1,
                elcr: byte() & if id == 0 { 0xf8 } else { 0xde },
                elcr_mask: if id == 0 { 0xf8 } else { 0xde },
            };
            set_pic(&vm, id, state)?;
            states.push(state);
        }
        for id in 0..2 {
            ensure_eq!(pic(&vm, id)?, states[id as usize], "PIC {id}");
        }
    }
    Ok(())
}

/// Nonsense in the state is kept or put right, and does no harm.
fn senseless_state(env: &Env) -> Outcome {
    let g = guest(env)?;
    let mut rng = Rng::new(env.seed);
    for _ in 0..env.fewer(40) {
        for id in 0..2 {
            let mut p = kb::kvm_pic_state::default();
            // SAFETY: The structure is bytes, any of which may have any value.
            let bytes: &mut [u8; 16] = unsafe { &mut *std::ptr::from_mut(&mut p).cast() };
            rng.fill(bytes);
            // A vector that is none of the processor's own exceptions.
            p.irq_base |= 0x40;
            set_pic(&g.vm, id, p)?;
        }
        g.forget(0);
        for gsi in 0..16 {
            pulse(&g.vm, gsi)?;
        }
        // A level, or automatic EOI, may come again and again: only so often may the guest look.
        g.begin(0, &[0xfb, 0x90, 0x90, 0xfa, 0xc3], |_| {})?; // sti; nop; nop; cli; ret
        g.set_how(0, how::REPORT);
        for _ in 0..20 {
            match g.run(0)? {
                Exit::Out {
                    port: irq::PORT_ACK,
                    ..
                } => {}
                Exit::Out { .. } => break,
                other => fail!("exit {other:x?}"),
            }
        }
        g.restart(0)?;
    }
    // Still as good as new, once initialised. The slave first: what it asks for is the master's to keep.
    g.set_how(0, 0);
    for id in [1, 0] {
        set_pic(&g.vm, id, kb::kvm_pic_state::default())?;
    }
    for (port, base) in [(SLAVE, BASE2), (MASTER, BASE)] {
        init(&g, port, base, 1)?;
    }
    taken(&g)?;
    pulse(&g.vm, 5)?;
    ensure_eq!(taken(&g)?, [BASE + 5], "vectors");
    Ok(())
}

/// What the initialisation words leave, and the ports read.
fn ports(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    for (id, port, elcr) in [(0, MASTER, 0x4d0), (1, SLAVE, 0x4d1)] {
        g.out8(port, 0x11)?;
        ensure_eq!(pic(&g.vm, id)?.init_state, 1, "state behind ICW1");
        // The lowest bits of the base are the lines'.
        g.out8(port + 1, 0x6f)?;
        g.out8(port + 1, 4)?;
        ensure_eq!(pic(&g.vm, id)?.init_state, 3, "state behind ICW3");
        g.out8(port + 1, 0x13)?;
        let p = pic(&g.vm, id)?;
        let got = (p.irq_base, p.init_state, p.init4, p.auto_eoi);
        ensure_eq!(got, (0x68, 0, 1, 1), "base, state, ICW4, automatic EOI");
        ensure_eq!(p.special_fully_nested_mode, 1, "special fully nested mode");
        // Without ICW4.
        g.out8(port, 0x10)?;
        g.out8(port + 1, 0x70)?;
        g.out8(port + 1, 4)?;
        let p = pic(&g.vm, id)?;
        let got = (p.irq_base, p.init_state, p.init4, p.auto_eoi);
        ensure_eq!(got, (0x70, 0, 0, 0), "the same without ICW4");
        ensure_eq!(p.special_fully_nested_mode, 0, "special fully nested mode");

        g.out8(port + 1, 0xa5)?;
        ensure_eq!(g.in8(port + 1)?, 0xa5, "mask");
        ensure_eq!(pic(&g.vm, id)?.imr, 0xa5, "mask");
        g.out8(port + 1, 0xff)?;
        // The request register first, the one in service once asked for, and back.
        let mut p = pic(&g.vm, id)?;
        (p.irr, p.isr) = (0x12, 0x48);
        set_pic(&g.vm, id, p)?;
        ensure_eq!(g.in8(port)?, 0x12, "request register");
        g.out8(port, 0x0b)?;
        ensure_eq!(g.in8(port)?, 0x48, "in-service register");
        g.out8(port, 0x08)?;
        ensure_eq!(g.in8(port)?, 0x48, "in-service register, still");
        g.out8(port, 0x0a)?;
        ensure_eq!(g.in8(port)?, 0x12, "request register");
        // Special mask mode: on, unchanged, off.
        g.out8(port, 0x68)?;
        g.out8(port, 0x28)?;
        ensure_eq!(pic(&g.vm, id)?.special_mask, 1, "special mask");
        g.out8(port, 0x48)?;
        ensure_eq!(pic(&g.vm, id)?.special_mask, 0, "special mask");
        // Lines 0, 1 and 2 of the one, 0 and 5 of the other are never levels.
        g.out8(elcr, 0xff)?;
        let want = if id == 0 { 0xf8 } else { 0xde };
        ensure_eq!(g.in8(elcr)?, want, "edge and level");
        ensure_eq!(pic(&g.vm, id)?.elcr, want, "edge and level");
        g.out8(elcr, 0)?;
        // A new start forgets the mask and what is pending as an edge.
        g.out8(port, 0x11)?;
        let p = pic(&g.vm, id)?;
        ensure_eq!(
            (p.imr, p.irr, p.read_reg_select),
            (0, 0, 0),
            "at a new start"
        );
        (0..3).try_for_each(|_| g.out8(port + 1, 1))?;
    }
    Ok(())
}

guest_code!(in16, ".code64", "mov eax, -1", "in ax, dx", "ret");
guest_code!(out16, ".code64", "out dx, ax", "ret");

/// Accesses of two bytes: nothing within the two ports of a PIC, an exit if they leave them.
fn widths(env: &Env) -> Outcome {
    let g = guest(env)?;
    g.out8(MASTER + 1, 0x5a)?;
    g.out8(SLAVE + 1, 0xa5)?;
    for port in [MASTER, SLAVE, 0x4d0] {
        g.exec(0, out16(), |r| (r.rdx, r.rax) = (port.into(), 0xf8f8))?;
        let r = g.exec(0, in16(), |r| r.rdx = port.into())?;
        ensure_eq!(r.rax & 0xffff, 0, "two bytes of port {port:#x}");
    }
    ensure_eq!(
        (g.in8(MASTER + 1)?, g.in8(SLAVE + 1)?),
        (0x5a, 0xa5),
        "masks"
    );
    ensure_eq!((g.in8(0x4d0)?, g.in8(0x4d1)?), (0, 0), "edge and level");
    for port in [MASTER - 1, MASTER + 1, SLAVE + 1, 0x4d1] {
        g.begin(0, out16(), |r| (r.rdx, r.rax) = (port.into(), 0xf8f8))?;
        let want = Exit::Out {
            port,
            size: 2,
            data: vec![0xf8; 2],
        };
        ensure_eq!(g.run(0)?, want, "exit");
        g.finish(0, &mut |_| Ok(()))?;
    }
    Ok(())
}

/// An edge of each line, with its vector; the eight of the slave by way of line 2.
fn delivery(env: &Env) -> Outcome {
    let g = guest(env)?;
    for gsi in 0..16u32 {
        if gsi == 2 {
            continue;
        }
        let slave = gsi >= 8;
        let eoi = if slave { how::SLAVE } else { 0 } | how::MASTER;
        g.set_how(0, eoi);
        // The I/O APIC has it masked, so the PIC is all that takes it.
        ensure_eq!(pulse(&g.vm, gsi)?, 1, "GSI {gsi}: status");
        let base = if slave { BASE2 - 8 } else { BASE };
        ensure_eq!(taken(&g)?, [base + gsi as u8], "GSI {gsi}: vectors");
        ensure_eq!(taken(&g)?, [], "GSI {gsi}: vectors, again");
        let isr = (pic(&g.vm, 0)?.isr, pic(&g.vm, 1)?.isr);
        ensure_eq!(isr, (0, 0), "GSI {gsi}: in service at the end");
    }
    Ok(())
}

/// What the calls say of masked, pending and level lines.
fn status(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    // An edge that is requested already is coalesced; a level while the line is high, too. Whether the
    // line falls, is taken by the I/O APIC as well.
    ensure_eq!(line_status(vm, 5, 1)?, 1, "an edge");
    ensure_eq!(line_status(vm, 5, 1)?, 1, "no edge");
    ensure_eq!(line_status(vm, 5, 0)?, 2, "falls");
    ensure_eq!(line_status(vm, 5, 1)?, 0, "an edge, requested already");
    line(vm, 5, 0)?;
    ensure_eq!(taken(&g)?, [BASE + 5], "vectors");
    g.out8(MASTER, 0x20)?;
    g.out8(0x4d0, 1 << 6)?;
    ensure_eq!(line_status(vm, 6, 1)?, 1, "a level");
    ensure_eq!(line_status(vm, 6, 1)?, 0, "the same level");
    ensure_eq!(line_status(vm, 6, 0)?, 2, "falls");
    g.out8(MASTER + 1, 1 << 7)?;
    ensure_eq!(line_status(vm, 7, 1)?, -1, "masked");
    ensure_eq!(line_status(vm, 7, 0)?, 1, "falls, masked");
    Ok(())
}

/// The lower line first; no line below one in service; an EOI lets the next come.
fn priorities(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    for gsi in [7, 4, 12, 9, 1] {
        pulse(vm, gsi)?;
    }
    ensure_eq!(taken(&g)?, [BASE + 1], "vectors");
    g.out8(MASTER, 0x20)?;
    ensure_eq!(taken(&g)?, [BASE2 + 1], "vectors: line 9 is line 2");
    pulse(vm, 3)?;
    ensure_eq!(taken(&g)?, [], "vectors: 3 is below 2");
    pulse(vm, 0)?;
    ensure_eq!(taken(&g)?, [BASE], "vectors: 0 is above 2");
    let isr = (pic(vm, 0)?.isr, pic(vm, 1)?.isr);
    ensure_eq!(isr, (0b101, 0b10), "in service");
    g.out8(MASTER, 0x20)?;
    ensure_eq!(pic(vm, 0)?.isr, 0b100, "in service: the highest has ended");
    // The slave's next waits for both EOIs.
    g.out8(SLAVE, 0x20)?;
    ensure_eq!(taken(&g)?, [], "vectors: the master's EOI is missing");
    g.out8(MASTER, 0x20)?;
    ensure_eq!(taken(&g)?, [BASE2 + 4], "vectors: line 12");
    g.out8(SLAVE, 0x20)?;
    // A specific EOI.
    g.out8(MASTER, 0x62)?;
    ensure_eq!(taken(&g)?, [BASE + 3], "vectors");
    g.out8(MASTER, 0x64)?;
    ensure_eq!(pic(vm, 0)?.isr, 0b1000, "in service: an EOI of another");
    g.out8(MASTER, 0x63)?;
    ensure_eq!(taken(&g)?, [BASE + 4], "vectors");
    g.out8(MASTER, 0x20)?;
    ensure_eq!(taken(&g)?, [BASE + 7], "vectors");
    g.out8(MASTER, 0x20)?;
    ensure_eq!(
        (pic(vm, 0)?.isr, pic(vm, 1)?.isr),
        (0, 0),
        "in service at the end"
    );
    Ok(())
}

/// Priorities that rotate, by command and by EOI; automatic EOI.
fn rotation(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    // 4 is the lowest, 5 the highest.
    g.out8(MASTER, 0xc4)?;
    ensure_eq!(pic(vm, 0)?.priority_add, 5, "the highest");
    for gsi in [0, 4, 6] {
        pulse(vm, gsi)?;
    }
    ensure_eq!(taken(&g)?, [BASE + 6], "vectors");
    // An EOI that makes what it ends the lowest.
    g.out8(MASTER, 0xa0)?;
    ensure_eq!(pic(vm, 0)?.priority_add, 7, "the highest");
    ensure_eq!(taken(&g)?, [BASE], "vectors");
    g.out8(MASTER, 0xe0)?;
    ensure_eq!(pic(vm, 0)?.priority_add, 1, "the highest");
    ensure_eq!(taken(&g)?, [BASE + 4], "vectors");
    g.out8(MASTER, 0x20)?;
    // Automatic EOI, and rotation with it.
    init(&g, MASTER, BASE, 3)?;
    g.out8(MASTER, 0x80)?;
    for gsi in [3, 5] {
        pulse(vm, gsi)?;
    }
    ensure_eq!(taken(&g)?, [BASE + 3, BASE + 5], "vectors without EOI");
    let p = pic(vm, 0)?;
    ensure_eq!((p.isr, p.priority_add), (0, 6), "in service, the highest");
    g.out8(MASTER, 0)?;
    pulse(vm, 1)?;
    ensure_eq!(taken(&g)?, [BASE + 1], "vectors");
    ensure_eq!(pic(vm, 0)?.priority_add, 6, "the highest: no rotation");
    Ok(())
}

/// The mask holds an edge back and does not lose it; a level counts only as long as it is high.
fn masks_and_levels(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    g.out8(MASTER + 1, 1 << 5)?;
    pulse(vm, 5)?;
    ensure_eq!(taken(&g)?, [], "vectors while masked");
    g.out8(MASTER + 1, 0)?;
    ensure_eq!(taken(&g)?, [BASE + 5], "vectors once unmasked");
    g.out8(MASTER, 0x20)?;
    // The master's mask of line 2 is that of all of the slave.
    g.out8(MASTER + 1, 1 << 2)?;
    pulse(vm, 10)?;
    ensure_eq!(taken(&g)?, [], "vectors: the slave is masked");
    g.out8(MASTER + 1, 0)?;
    ensure_eq!(taken(&g)?, [BASE2 + 2], "vectors: it is not");
    g.out8(SLAVE, 0x20)?;
    g.out8(MASTER, 0x20)?;

    for (elcr, gsi, vector) in [(0x4d0, 5, BASE + 5), (0x4d1, 10, BASE2 + 2)] {
        g.out8(elcr, 1 << (gsi & 7))?;
        g.set_how(0, how::SLAVE | how::MASTER | how::REPORT);
        g.forget(0);
        line(vm, gsi, 1)?;
        let mut left = 4;
        g.window_with(0, &mut |_| {
            left -= 1;
            if left == 0 {
                line(vm, gsi, 0)?;
            }
            Ok(())
        })?;
        ensure_eq!(
            g.log(0),
            [vector; 4],
            "vectors: the level stayed three times"
        );
        g.set_how(0, 0);
        // High and low again before anyone looked: as if nothing had been.
        if gsi < 8 {
            pulse(vm, gsi)?;
            ensure_eq!(taken(&g)?, [], "vectors: a level that is gone");
            ensure_eq!(pic(vm, 0)?.irr, 0, "request register");
        }
    }
    Ok(())
}

/// A request that is gone when the processor asks for its vector: line 7, and nothing is in service.
fn spurious(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    // The slave has told the master, and its line falls then.
    g.out8(0x4d1, 1 << 3)?;
    pulse(vm, 11)?;
    ensure_eq!(taken(&g)?, [BASE2 + 7], "vectors: spurious at the slave");
    let isr = (pic(vm, 0)?.isr, pic(vm, 1)?.isr);
    ensure_eq!(isr, (0b100, 0), "in service: only the master knows of it");
    g.out8(MASTER, 0x20)?;
    ensure_eq!(taken(&g)?, [], "vectors behind the EOI");
    Ok(())
}

/// With OCW3's poll bit, the next read takes the interrupt in the processor's place.
fn poll(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    g.out8(MASTER, 0x0c)?;
    ensure_eq!(g.in8(MASTER)?, 7, "poll: nothing there");
    pulse(vm, 6)?;
    pulse(vm, 3)?;
    g.out8(MASTER, 0x0c)?;
    ensure_eq!(g.in8(MASTER)?, 0x83, "poll: line 3");
    ensure_eq!(pic(vm, 0)?.poll, 0, "poll bit behind it");
    ensure_eq!(g.in8(MASTER)?, 1 << 6, "request register: no poll");
    // By the data sheet, what was polled is in service. KVM has ended it already.
    g.out8(MASTER, 0x20)?;
    g.out8(MASTER, 0x0c)?;
    ensure_eq!(g.in8(MASTER)?, 0x86, "poll: line 6");
    g.out8(MASTER, 0x20)?;
    ensure_eq!(taken(&g)?, [], "vectors: all was polled");
    pulse(vm, 13)?;
    g.out8(SLAVE, 0x0c)?;
    ensure_eq!(g.in8(SLAVE)?, 0x85, "poll: line 5 of the slave");
    ensure_eq!(taken(&g)?, [], "vectors: nothing is left at the master");
    Ok(())
}

/// With special fully nested mode, a higher line of the slave interrupts a lower one.
fn nested(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    pulse(vm, 12)?;
    ensure_eq!(taken(&g)?, [BASE2 + 4], "vectors");
    pulse(vm, 9)?;
    ensure_eq!(taken(&g)?, [], "vectors: line 2 is in service");
    init(&g, SLAVE, BASE2, 1)?;
    init(&g, MASTER, BASE, 0x11)?;
    for id in 0..2 {
        let mut p = pic(vm, id)?;
        (p.irr, p.isr) = (0, 0);
        set_pic(vm, id, p)?;
    }
    taken(&g)?;
    pulse(vm, 12)?;
    ensure_eq!(taken(&g)?, [BASE2 + 4], "vectors, special fully nested");
    pulse(vm, 9)?;
    ensure_eq!(taken(&g)?, [BASE2 + 1], "vectors: the higher one");
    pulse(vm, 14)?;
    ensure_eq!(taken(&g)?, [], "vectors: the lower one");
    Ok(())
}

/// LINT0 lets the PIC through as ExtINT, and not if it is masked or something else. The APIC has no
/// part in it: neither its being enabled, nor its priority, nor an EOI.
fn lint0(env: &Env) -> Outcome {
    let g = guest(env)?;
    let vm = &g.vm;
    g.set_how(0, how::MASTER);
    ensure_eq!(g.read(0, LINT0)?, EXTINT, "LINT0 of the first vCPU, new");
    for (lvt, passes) in [
        (EXTINT | MASKED, false),
        (EXTINT, true),
        (0x30, false),
        (EXTINT | 0x31, true),
    ] {
        g.write(0, LINT0, lvt)?;
        pulse(vm, 5)?;
        let got = taken(&g)?;
        let want: &[u8] = if passes { &[BASE + 5] } else { &[] };
        ensure_eq!(got, want, "LINT0 {lvt:#x}: vectors");
        if !passes {
            // It waits at the PIC.
            g.write(0, LINT0, EXTINT)?;
            ensure_eq!(taken(&g)?, [BASE + 5], "vectors once LINT0 lets them");
        }
    }
    // The highest priority at the APIC, and an APIC that is disabled by software.
    g.write(0, APIC + 0x80, 0xff)?;
    pulse(vm, 5)?;
    ensure_eq!(taken(&g)?, [BASE + 5], "vectors with TPR 0xff");
    g.write(0, APIC + 0xf0, 0xff)?;
    // That has masked LINT0.
    ensure_eq!(
        g.read(0, LINT0)? & MASKED,
        MASKED,
        "LINT0 of a disabled APIC"
    );
    pulse(vm, 5)?;
    ensure_eq!(taken(&g)?, [], "vectors");
    g.write(0, APIC + 0xf0, 0x1ff)?;
    g.write(0, LINT0, EXTINT)?;
    ensure_eq!(taken(&g)?, [BASE + 5], "vectors of the APIC enabled again");
    for (offset, name) in [(0x100, "ISR"), (0x200, "IRR")] {
        let bits = g.read(0, APIC + offset + 0x10 * u64::from(BASE / 32))?;
        ensure_eq!(bits, 0, "{name} of the APIC");
    }
    Ok(())
}

/// Without an APIC, as IA32_APIC_BASE says, there is no LINT0, and the PIC has the processor for itself.
fn no_apic(env: &Env) -> Outcome {
    let g = guest(env)?;
    g.write(0, LINT0, EXTINT | MASKED)?;
    pulse(&g.vm, 5)?;
    ensure_eq!(taken(&g)?, [], "vectors with LINT0 masked");
    let mut s = g.vcpus[0].sregs()?;
    s.apic_base &= !(1 << 11);
    g.vcpus[0].set_sregs(&s)?;
    ensure_eq!(taken(&g)?, [BASE + 5], "vectors without an APIC");
    g.out8(MASTER, 0x20)?;
    pulse(&g.vm, 6)?;
    g.halt(0)?;
    ensure_eq!(g.log(0), [BASE + 5, BASE + 6], "vectors, halted");
    Ok(())
}

/// The vCPU whose LINT0 is open gets them, be it halted or running. One that is halted and does not take
/// them sleeps on.
fn wakes(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    let stats = [
        Stats::open(&g.kvm, &g.vcpus[0].fd)?,
        Stats::open(&g.kvm, &g.vcpus[1].fd)?,
    ];
    init(&g, MASTER, BASE, 1)?;
    let n = env.fewer(50);
    for (owner, code) in [(0, irq::idle()), (1, irq::idle()), (1, irq::spin())] {
        for id in 0..2 {
            g.set_how(id, how::MASTER);
            g.forget(id);
            g.write(
                id,
                LINT0,
                if id == owner { EXTINT } else { EXTINT | MASKED },
            )?;
        }
        g.running(code, |_| {
            let mut woken = 0;
            for round in 1..=n {
                pulse(&g.vm, 6)?;
                let what = format!("interrupt {round} of vCPU {owner}");
                wait_for(&what, || g.count(owner, BASE + 6) == round)?;
                // Until its EOI another would be one with it.
                wait_for("the EOI", || pic(&g.vm, 0).is_ok_and(|p| p.isr == 0))?;
                if round == 2 {
                    woken = stats[1 - owner].need("halt_wakeup")?;
                }
            }
            woken = stats[1 - owner].need("halt_wakeup")? - woken;
            ensure!(woken <= n / 4, "the other woke up {woken} times in {n}");
            Ok(())
        })?;
        ensure_eq!(g.seen(1 - owner), 0, "interrupts of the other");
    }
    Ok(())
}

/// A line that the PIC and the I/O APIC both have: each of them sends its own.
fn both(env: &Env) -> Outcome {
    let g = guest(env)?;
    irq::set_entry(&g.vm, 5, 0x81)?;
    ensure_eq!(pulse(&g.vm, 5)?, 2, "status");
    let mut got = taken(&g)?;
    got.sort_unstable();
    ensure_eq!(got, [BASE + 5, 0x81], "vectors");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "pic",
        tests![
            state,
            senseless_state,
            ports,
            widths,
            delivery,
            status,
            priorities,
            rotation,
            masks_and_levels,
            spurious,
            poll,
            nested,
            lint0,
            no_apic,
            wakes,
            both,
        ],
    )
}
