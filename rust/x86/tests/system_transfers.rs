// SPDX-License-Identifier: GPL-2.0

//! Far transfers and interrupts: where they lead, what they push, and each fault.

mod common;

use common::system::*;
use common::TestCpu;
use common::CODE;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Event;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::exception::Fault;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;

/// A far JMP (EA) or CALL (9A) to an offset in a segment.
fn far(opcode: u8, selector: u16, offset: u32) -> String {
    let (o, s) = (offset.to_le_bytes(), selector.to_le_bytes());
    let bytes = [opcode, o[0], o[1], o[2], o[3], s[0], s[1]];
    bytes.iter().fold(String::new(), |mut out, b| {
        out += &format!("{b:02x}");
        out
    })
}

const JMP: u8 = 0xea;
const CALL: u8 = 0x9a;

fn with_slot(cpl: u8, entry: u64) -> Machine {
    let mut m = Machine::new(cpl);
    m.gdt(SLOT, entry);
    m
}

#[test]
fn direct() {
    // Privilege, selector, access byte, and what comes of it.
    let cases = [
        (0, SLOT, 0x9a, None),
        (3, SLOT | 3, 0xfa, None),
        (3, SLOT, 0xfa, None),
        // Conforming: from less privilege, which stays.
        (3, SLOT | 3, 0x9e, None),
        (0, SLOT | 3, 0x9e, None),
        (0, SLOT, 0xfe, Some(gp(SLOT))),
        (0, SLOT | 3, 0x9a, Some(gp(SLOT))),
        (3, SLOT | 3, 0x9a, Some(gp(SLOT))),
        (0, SLOT, 0xfa, Some(gp(SLOT))),
        (0, SLOT, 0x92, Some(gp(SLOT))),
        (0, SLOT, 0x1a, Some(np(SLOT))),
        (0, 0x80, 0, Some(gp(0x80))),
        (0, 0, 0, Some(gp(0))),
        (0, 3, 0, Some(gp(0))),
        // System descriptors that are no targets: LDT, interrupt gate, a busy TSS.
        (0, SLOT, 0x82, Some(gp(SLOT))),
        (0, SLOT, 0x8e, Some(gp(SLOT))),
        (0, SLOT, 0x8b, Some(gp(SLOT))),
    ];
    for (cpl, selector, access, fault) in cases {
        for opcode in [JMP, CALL] {
            let code = far(opcode, selector, 0x1234);
            let mut m = with_slot(cpl, 0);
            if selector & !3 == SLOT {
                m.gdt(SLOT, flat(access, 0xc));
            }
            match fault {
                Some(fault) => m.faults(&code, fault),
                None => {
                    m.done(&code);
                    assert_eq!(m.cpu.rip, 0x1234);
                    let cs = *m.cpu.seg(SegReg::Cs);
                    assert_eq!(cs.selector, SLOT | u16::from(cpl), "RPL is CPL");
                    assert_eq!(m.cpu.cpl, cpl);
                    assert_eq!((m.entry(SLOT) >> 40) & 1, 1, "accessed");
                    if opcode == CALL {
                        assert_eq!(m.cpu.get(Gpr::Rsp), STACK - 8);
                        let old = if cpl == 0 { CODE0 } else { CODE3 };
                        assert_eq!(m.stack32(0), CODE as u32 + 7);
                        assert_eq!(m.stack32(1), old.into());
                    }
                }
            }
        }
    }
    // The limit.
    let small = descriptor(0, 0xfff, 0x9b, 4);
    with_slot(0, small).faults(&far(JMP, SLOT, 0x1000), gp(0));
    with_slot(0, small).faults(&far(CALL, SLOT, 0x1000), gp(0));
}

#[test]
fn between_modes() {
    // From compatibility mode to 64-bit and back.
    let mut m = Machine::long(0);
    m.memory.put32(0x6000, 0x1234);
    m.memory.put(0x6004, &CODE0.to_le_bytes());
    m.cpu.gprs.set(Gpr::Rbx, 0x6000);
    m.done("ff2b");
    let mode = |m: &mut Machine| rkvm_x86::emulate::Cpu::mode(&mut m.cpu);
    assert_eq!(mode(&mut m), CpuMode::Compat32);
    assert_eq!(m.cpu.rip, 0x1234);
    m.done(&far(JMP, WIDE0, 0x5678));
    assert_eq!(mode(&mut m), CpuMode::Long64);
    // L and D exclude each other.
    m.gdt(SLOT, flat(0x9b, 0xe));
    m.memory.put(0x6004, &SLOT.to_le_bytes());
    m.faults("ff2b", gp(SLOT));
    // No task switches and no gates of 16 bits.
    for access in [0x89, 0x85, 0x84] {
        m.gdt(SLOT, descriptor(0x7000, 0x67, access, 0));
        m.faults("ff2b", gp(SLOT));
    }
}

#[test]
fn call_gates() {
    // To the same level.
    let mut m = with_slot(0, gate(CODE0, 0x4321, 0x8c, 0));
    m.done(&far(CALL, SLOT, 0xffff_ffff));
    assert_eq!((m.cpu.rip, m.cpu.get(Gpr::Rsp)), (0x4321, STACK - 8));
    let mut m = with_slot(0, gate(CODE0, 0x4321, 0x8c, 0));
    m.done(&far(JMP, SLOT, 0));
    assert_eq!(m.cpu.rip, 0x4321);

    // To the inside, with two parameters.
    let mut m = with_slot(3, gate(CODE0, 0x4321, 0xec, 2));
    m.memory.put32(STACK, 0xaaaa);
    m.memory.put32(STACK + 4, 0xbbbb);
    m.done(&far(CALL, SLOT | 3, 0));
    assert_eq!((m.cpu.cpl, m.cpu.rip), (0, 0x4321));
    assert_eq!(m.cpu.get(Gpr::Rsp), STACK0 - 24);
    let frame: Vec<u32> = (0..6).map(|i| m.stack32(i)).collect();
    let want = [
        CODE as u32 + 7,
        CODE3.into(),
        0xaaaa,
        0xbbbb,
        STACK as u32,
        DATA3.into(),
    ];
    assert_eq!(frame, want);
    assert_eq!((m.sel(SegReg::Cs), m.sel(SegReg::Ss)), (CODE0, DATA0));
    // And back: RETF 8.
    m.done("ca0800");
    assert_eq!((m.cpu.cpl, m.cpu.rip), (3, CODE + 7));
    assert_eq!(m.cpu.get(Gpr::Rsp), STACK + 8);
    assert_eq!((m.sel(SegReg::Cs), m.sel(SegReg::Ss)), (CODE3, DATA3));

    let call = far(CALL, SLOT | 3, 0);
    for (entry, fault) in [
        (gate(CODE0, 0, 0x8c, 0), gp(SLOT)),
        (gate(CODE0, 0, 0x6c, 0), np(SLOT)),
        (gate(0, 0, 0xec, 0), gp(0)),
        (gate(DATA0, 0, 0xec, 0), gp(DATA0)),
        (gate(0x80, 0, 0xec, 0), gp(0x80)),
    ] {
        with_slot(3, entry).faults(&call, fault);
    }
    // A JMP does not change the level.
    with_slot(3, gate(CODE0, 0, 0xec, 0)).faults(&far(JMP, SLOT | 3, 0), gp(CODE0));
    // What can be wrong with the inner stack.
    let good = gate(CODE0, 0, 0xec, 0);
    for (selector, entry, fault) in [
        (0, 0, ts(0)),
        (OTHER | 3, flat(0x93, 0xc), ts(OTHER)),
        (OTHER, flat(0xf3, 0xc), ts(OTHER)),
        (OTHER, flat(0x91, 0xc), ts(OTHER)),
        (OTHER, flat(0x13, 0xc), ss(OTHER)),
        (0x80, 0, ts(0x80)),
        // It has no room: #SS names it.
        (OTHER, descriptor(0, 0xfff, 0x93, 4), ss(OTHER)),
    ] {
        let mut m = with_slot(3, good);
        m.memory.put32(TSS + 8, u32::from(selector));
        if selector & !3 == OTHER {
            m.gdt(OTHER, entry);
        }
        m.faults(&call, fault);
    }
    let mut m = with_slot(3, good);
    m.cpu.seg(SegReg::Tr).limit = 8;
    m.faults(&call, ts(TR));
}

#[test]
fn call_gate_of_long_mode() {
    let mut m = Machine::long(3).with(Gpr::Rbx, 0x6000);
    m.memory.put(0x6004, &(SLOT | 3).to_le_bytes());
    m.gdt(SLOT, gate(WIDE0, 0x4321, 0xec, 0));
    m.gdt(SLOT + 8, 0x12);
    m.memory.put64(TSS + 4, STACK0);
    m.done("ff1b");
    assert_eq!(m.cpu.rip, 0x12_0000_4321);
    assert_eq!(m.cpu.get(Gpr::Rsp), STACK0 - 32);
    let frame: Vec<u64> = (0..4).map(|i| m.stack64(i)).collect();
    assert_eq!(frame, [CODE + 2, WIDE3.into(), STACK, DATA3.into()]);
    assert!(m.cpu.seg(SegReg::Ss).attr.unusable() && m.cpu.cpl == 0);
    // RETFQ.
    m.done("48cb");
    assert_eq!(
        (m.cpu.cpl, m.cpu.rip, m.cpu.get(Gpr::Rsp)),
        (3, CODE + 2, STACK)
    );
}

fn frame32(m: &mut Machine, words: &[u32]) {
    for (i, word) in words.iter().enumerate() {
        m.memory.put32(STACK + 4 * i as u64, *word);
    }
}

#[test]
fn returns() {
    let cs3 = u32::from(CODE3);
    let ds3 = u32::from(DATA3);
    // RETF: what is on the stack, and what is wrong with it.
    for (words, fault) in [
        ([0x1234, 0, 0, 0], gp(0)),
        ([0x1234, 0x80, 0, 0], gp(0x80)),
        ([0x1234, DATA0.into(), 0, 0], gp(DATA0)),
        ([0x1234, u32::from(CODE0) | 3, 0, 0], gp(CODE0)),
        ([0x1234, u32::from(CODE3) & !3, 0, 0], gp(CODE3 & !3)),
        ([0x1234, cs3, 0, 0], gp(0)),
        ([0x1234, cs3, 0, DATA0.into()], gp(DATA0)),
        ([0x1234, cs3, 0, cs3], gp(CODE3 & !3)),
        ([0x1234, cs3, 0, ds3 & !3], gp(DATA3 & !3)),
    ] {
        let mut m = Machine::new(0);
        frame32(&mut m, &words);
        m.faults("cb", fault);
        m.memory.put32(STACK + 8, 2);
        m.memory.put32(STACK + 12, words[2]);
        m.memory.put32(STACK + 16, words[3]);
        m.faults("cf", fault);
    }
    // Never to more privilege.
    let mut m = Machine::new(3);
    frame32(&mut m, &[0x1234, CODE0.into(), 2]);
    m.faults("cb", gp(CODE0));
    m.faults("cf", gp(CODE0));
    // Outward: the data segments that user mode may not have are gone.
    let mut m = Machine::new(0);
    m.gdt(SLOT, flat(0x9f, 0xc));
    *m.cpu.seg(SegReg::Fs) = loaded(SLOT, flat(0x9f, 0xc));
    *m.cpu.seg(SegReg::Gs) = loaded(DATA3, flat(0xf3, 0xc));
    frame32(&mut m, &[0x1234, cs3, 0x7000, ds3]);
    m.done("cb");
    assert_eq!(
        (m.cpu.cpl, m.cpu.rip, m.cpu.get(Gpr::Rsp)),
        (3, 0x1234, 0x7000)
    );
    assert_eq!(*m.cpu.seg(SegReg::Ds), Segment::NULL);
    assert_eq!(*m.cpu.seg(SegReg::Es), Segment::NULL);
    assert_eq!((m.sel(SegReg::Fs), m.sel(SegReg::Gs)), (SLOT, DATA3));
}

#[test]
fn flags_of_iret() {
    let all = Rflags::NAMED.without(Rflags::VM | Rflags::FIXED);
    let user = Rflags::STATUS
        | Rflags::TF
        | Rflags::DF
        | Rflags::NT
        | Rflags::RF
        | Rflags::AC
        | Rflags::ID;
    let cases = [
        (0, 0, "cf", all),
        (3, 0, "cf", user),
        (3, 3, "cf", user | Rflags::IF),
        (0, 0, "66cf", all.and(Rflags::new(0xffff))),
    ];
    for (cpl, iopl, code, loaded) in cases {
        for new in [all, Rflags::empty()] {
            let mut m = Machine::new(cpl);
            let old = Rflags::new(iopl << 12) | Rflags::FIXED;
            m.cpu.rflags = old;
            let cs = if cpl == 0 { CODE0 } else { CODE3 };
            if code == "cf" {
                frame32(&mut m, &[0x1234, cs.into(), new.bits() as u32]);
            } else {
                frame32(
                    &mut m,
                    &[0x1234 | (u32::from(cs) << 16), new.bits() as u32 & 0xffff],
                );
            }
            m.cpu.nmi_blocked = true;
            m.done(code);
            assert_eq!(
                m.cpu.rflags,
                old.without(loaded) | new.and(loaded),
                "{code} {cpl}"
            );
            assert!(!m.cpu.nmi_blocked);
        }
    }
}

#[test]
fn iret_of_long_mode() {
    // It always has five words.
    let mut m = Machine::long(0);
    for (i, word) in [0x1234, WIDE0.into(), 2, 0x7008, 0].iter().enumerate() {
        m.memory.put64(STACK + 8 * i as u64, *word);
    }
    m.done("48cf");
    assert_eq!((m.cpu.rip, m.cpu.get(Gpr::Rsp)), (0x1234, 0x7008));
    assert!(m.cpu.seg(SegReg::Ss).attr.unusable());
    // To user mode a stack has to be there.
    let mut m = Machine::long(0);
    for (i, word) in [0x1234, WIDE3.into(), 2, 0x7008, 3].iter().enumerate() {
        m.memory.put64(STACK + 8 * i as u64, *word);
    }
    m.faults("48cf", gp(0));
    m.memory.put64(STACK + 32, DATA3.into());
    m.memory.put64(STACK, 1 << 47);
    m.faults("48cf", gp(0));
    m.memory.put64(STACK, 0x1234);
    m.done("48cf");
    assert_eq!((m.cpu.cpl, m.sel(SegReg::Ss)), (3, DATA3));
    // There are no nested tasks.
    Machine::long(0)
        .with_flags(Rflags::NT)
        .faults("48cf", gp(0));
}

#[test]
fn virtual_8086() {
    let mut m = Machine::new(0);
    let flags = 0x2_3202;
    frame32(
        &mut m,
        &[0x1000, 0x123, flags, 0x8000, 0x800, 0x10, 0x20, 0x30, 0x40],
    );
    m.done("cf");
    assert_eq!(
        (m.cpu.cpl, m.cpu.rip, m.cpu.rflags.bits()),
        (3, 0x1000, flags.into())
    );
    let selectors: Vec<u16> = (0..6).map(|i| m.cpu.segments[i].selector).collect();
    assert_eq!(selectors, [0x10, 0x123, 0x800, 0x20, 0x30, 0x40]);
    let ss = *m.cpu.seg(SegReg::Ss);
    assert_eq!((ss.base, ss.limit, ss.attr.dpl()), (0x8000, 0xffff, 3));

    // INT 21h through a gate of the kernel.
    m.idt(0x21, gate(CODE0, 0x4321, 0xee, 0));
    *m.cpu.seg(SegReg::Cs) = Segment {
        base: 0,
        ..*m.cpu.seg(SegReg::Cs)
    };
    m.done("cd21");
    assert_eq!((m.cpu.cpl, m.cpu.rip), (0, 0x4321));
    assert_eq!(m.cpu.get(Gpr::Rsp), STACK0 - 36);
    let frame: Vec<u32> = (0..9).map(|i| m.stack32(i)).collect();
    let want = [
        CODE as u32 + 2,
        0x123,
        flags,
        0x8000,
        0x800,
        0x10,
        0x20,
        0x30,
        0x40,
    ];
    assert_eq!(frame, want);
    assert_eq!(*m.cpu.seg(SegReg::Ds), Segment::NULL);
    assert!(!m.cpu.rflags.has_any(Rflags::VM | Rflags::IF));

    // Without the I/O privilege, INT n and IRET are the monitor's.
    let vm = Machine::new(3).with_flags(Rflags::VM);
    vm.faults("cd21", gp(0));
    vm.faults("cf", gp(0));
    // With VME, the bitmap below that of the ports says whose.
    let mut m = vm.clone();
    m.cpu.cr4 |= Cr4::VME;
    m.memory.put(TSS + 0x66, &[0x88, 0]);
    m.cpu.seg(SegReg::Tr).limit = 0x100;
    m.memory.put32(0x21 * 4, 0x0123_4567);
    for reg in [SegReg::Cs, SegReg::Ss] {
        *m.cpu.seg(reg) = Segment {
            attr: m.cpu.seg(reg).attr.with_db(false),
            limit: 0xffff,
            ..*m.cpu.seg(reg)
        };
    }
    m.done("cd21");
    assert_eq!((m.cpu.rip, m.sel(SegReg::Cs)), (0x4567, 0x123));
    m.memory.put(TSS + 0x68 + 4, &[2]);
    m.cpu.seg(SegReg::Cs).base = 0;
    m.faults("cd21", gp(0));
}

#[test]
fn real_mode() {
    let mut m = Machine::new(0);
    m.cpu = TestCpu::real()
        .with(Gpr::Rsp, 0x8000)
        .with_flags(Rflags::IF);
    m.memory.put32(0x21 * 4, 0x0123_4567);
    m.done("cd21");
    assert_eq!((m.cpu.rip, m.cpu.seg(SegReg::Cs).base), (0x4567, 0x1230));
    assert_eq!(m.memory.get64(0x7ffa) & 0xffff_ffff_ffff, 0x0202_0000_1002);
    assert!(!m.cpu.rflags.has(Rflags::IF));
    let mut memory = m.memory.clone();
    let mut cpu = m.cpu.clone();
    memory.put(0x1230 + 0x4567, &[0xcf]);
    let (outcome, _) = common::run(&mut cpu, &mut memory, &[]);
    assert_eq!(outcome, common::DONE);
    assert_eq!((cpu.rip, cpu.get(Gpr::Rsp)), (0x1002, 0x8000));
    assert!(cpu.rflags.has(Rflags::IF));
    // Beyond the table.
    m.cpu = TestCpu::real();
    m.cpu.idtr.limit = 0x83;
    m.faults("cd21", gp(0x10a));
}

fn deliver(m: &mut Machine, vector: u8, error: Option<u32>) -> Outcome<common::Lost> {
    let event = Event {
        vector,
        error,
        by_program: false,
    };
    Emulator::new().deliver(&mut m.cpu, &mut m.memory, event)
}

#[test]
fn gates() {
    let int = "cd40";
    for (cpl, entry, fault) in [
        (3, gate(CODE0, 0, 0x8e, 0), gp(0x202)),
        (3, gate(CODE0, 0, 0x6e, 0), np(0x202)),
        (0, gate(CODE0, 0, 0x8c, 0), gp(0x202)),
        (0, 0, gp(0x202)),
        (0, gate(0, 0, 0x8e, 0), gp(0)),
        (0, gate(DATA0, 0, 0x8e, 0), gp(DATA0)),
        (0, gate(0x80, 0, 0x8e, 0), gp(0x80)),
        // Not to less privilege.
        (0, gate(CODE3, 0, 0x8e, 0), gp(CODE3 & !3)),
    ] {
        let mut m = Machine::new(cpl);
        m.idt(0x40, entry);
        m.faults(int, fault);
    }
    let mut m = Machine::new(0);
    m.cpu.idtr.limit = 0x206;
    m.faults(int, gp(0x202));

    // Interrupt and trap gates, of 32 and 16 bits.
    for (access, size, keeps_if) in [
        (0xee, 4, false),
        (0xef, 4, true),
        (0xe6, 2, false),
        (0xe7, 2, true),
    ] {
        let mut m = Machine::new(3).with_flags(Rflags::IF | Rflags::NT);
        m.idt(0x40, gate(CODE0, 0x1_4321, access, 0));
        m.done(int);
        assert_eq!(m.cpu.get(Gpr::Rsp), STACK0 - 5 * size);
        assert_eq!(m.cpu.rflags.has(Rflags::IF), keeps_if);
        assert!(!m.cpu.rflags.has(Rflags::NT));
        assert_eq!(m.cpu.rip, if size == 4 { 0x1_4321 } else { 0x4321 });
    }
    // What the program has not asked for comes through any gate, and sets EXT.
    let mut m = Machine::new(3);
    m.idt(13, gate(CODE0, 0x4321, 0x8e, 0));
    assert_eq!(deliver(&mut m, 13, Some(0x1230)), common::DONE);
    let frame: Vec<u32> = (0..6).map(|i| m.stack32(i)).collect();
    assert_eq!(frame[0], 0x1230);
    assert_eq!(frame[5], DATA3.into());
    let mut m = Machine::new(3);
    m.idt(13, gate(0x80, 0x4321, 0x8e, 0));
    assert_eq!(deliver(&mut m, 13, Some(0)), Outcome::Fault(gp(0x81)));
    m.idt(13, gate(CODE0, 0x4321, 0x0e, 0));
    assert_eq!(deliver(&mut m, 13, Some(0)), Outcome::Fault(np(13 * 8 + 3)));
    m.idt(13, gate(CODE0, 0x4321, 0x8e, 0));
    m.memory.put32(TSS + 8, 0x80);
    assert_eq!(deliver(&mut m, 13, Some(0)), Outcome::Fault(ts(0x81)));
}

#[test]
fn gates_of_long_mode() {
    let entry = |m: &mut Machine, selector: u16, access: u8, ist: u8| {
        m.memory
            .put64(IDT + 0x40 * 16, gate(selector, 0x4321, access, ist));
        m.memory.put64(IDT + 0x40 * 16 + 8, 0x12);
    };
    let mut m = Machine::long(0).with(Gpr::Rsp, STACK - 3);
    entry(&mut m, WIDE0, 0x8e, 0);
    m.done("cd40");
    assert_eq!(m.cpu.rip, 0x12_0000_4321);
    assert_eq!(m.cpu.get(Gpr::Rsp), STACK - 16 - 40);
    let frame: Vec<u64> = (0..5).map(|i| m.stack64(i)).collect();
    assert_eq!(frame, [CODE + 2, WIDE0.into(), 2, STACK - 3, DATA0.into()]);
    assert_eq!(m.sel(SegReg::Ss), DATA0, "the same level keeps it");
    // A stack of its own.
    let mut m = Machine::long(0);
    entry(&mut m, WIDE0, 0x8e, 3);
    m.memory.put64(TSS + 0x24 + 16, 0x7777);
    m.done("cd40");
    assert_eq!(m.cpu.get(Gpr::Rsp), 0x7770 - 40);
    // From user mode, and code that is not of 64 bits.
    let mut m = Machine::long(3);
    m.memory.put64(TSS + 4, STACK0);
    entry(&mut m, WIDE0, 0xee, 0);
    m.done("cd40");
    assert_eq!((m.cpu.get(Gpr::Rsp), m.cpu.cpl), (STACK0 - 40, 0));
    let mut m = Machine::long(0);
    entry(&mut m, CODE0, 0x8e, 0);
    m.faults("cd40", gp(CODE0));
    for access in [0x85, 0x86, 0x87] {
        entry(&mut m, WIDE0, access, 0);
        m.faults("cd40", gp(0x202));
    }
    entry(&mut m, WIDE0, 0x8e, 1);
    m.memory.put64(TSS + 0x24, 1 << 47);
    m.faults("cd40", ss(0));
}

#[test]
fn int3_and_into() {
    let mut m = Machine::new(0);
    m.idt(3, gate(CODE0, 0x4321, 0x8e, 0));
    m.idt(4, gate(CODE0, 0x5432, 0x8e, 0));
    let mut other = m.clone();
    m.done("cc");
    assert_eq!((m.cpu.rip, m.stack32(0)), (0x4321, CODE as u32 + 1));
    other.done("ce");
    assert_eq!(other.cpu.rip, CODE + 1);
    let mut other = other.with_flags(Rflags::OF);
    other.done("ce");
    assert_eq!(other.cpu.rip, 0x5432);
    Machine::long(0).faults("ce", Fault::UD);
    // The gate's privilege counts for INT3, and not for INT1.
    let mut m = Machine::new(3);
    m.idt(3, gate(CODE0, 0x4321, 0x8e, 0));
    m.idt(1, gate(CODE0, 0x4321, 0x8e, 0));
    m.faults("cc", gp(0x1a));
    m.done("f1");
}

/// Memory that is not plain: the whole frame is on a device.
#[test]
fn stack_on_device() {
    let mut m = Machine::new(0);
    m.memory.device_pages.push(STACK >> 12);
    m.memory.put(CODE, &[0xcf]);
    m.cpu.rip = CODE;
    let answers = [0x1234, CODE0.into(), 0x246];
    let (outcome, bus) = common::run(&mut m.cpu, &mut m.memory, &answers);
    assert_eq!(outcome, common::DONE);
    let want: Vec<_> = (0..3).map(|i| common::rd(STACK + 4 * i, 4)).collect();
    assert_eq!(bus, want);
    assert_eq!((m.cpu.rip, m.cpu.rflags.bits()), (0x1234, 0x246));
}
