// SPDX-License-Identifier: GPL-2.0

//! Task switches: what is saved and loaded, busy bits and links, and each fault, before and after the point of no return.

mod common;

use common::system::*;
use common::CODE;
use rkvm_x86::emulate::Cause;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::emulate::TaskSwitch;
use rkvm_x86::exception::Fault;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegReg;

const NEW: u64 = 0x6000;
/// JMP SLOT:0 and CALL SLOT:0.
const JMP: &str = "ea000000005000";
const CALL: &str = "9a000000005000";

fn new_tss(m: &mut Machine) {
    m.gdt(SLOT, descriptor(NEW as u32, 0x67, 0x89, 0));
    m.memory.put32(NEW + 0x20, 0x1_4321);
    m.memory.put32(NEW + 0x24, 0x47);
    for i in 0..8 {
        m.memory.put32(NEW + 0x28 + 4 * i, 0x1000_0000 + i as u32);
    }
    m.memory.put32(NEW + 0x38, 0x7000);
    for i in 0..6 {
        m.memory.put32(NEW + 0x48 + 4 * i, DATA0.into());
    }
    m.memory.put32(NEW + 0x4c, CODE0.into());
}

fn machine() -> Machine {
    let mut m = Machine::new(0).with(Gpr::Rbx, 0x1234_5678);
    new_tss(&mut m);
    m
}

fn kind(m: &Machine, selector: u16) -> u64 {
    (m.entry(selector) >> 40) & 15
}

#[test]
fn jump() {
    let mut m = machine().with_flags(Rflags::CF);
    m.done(JMP);
    assert_eq!((m.cpu.rip, m.cpu.rflags.bits()), (0x1_4321, 0x47));
    for (i, r) in Gpr::ALL.into_iter().enumerate().take(8) {
        let want = if r == Gpr::Rsp {
            0x7000
        } else {
            0x1000_0000 + i as u64
        };
        assert_eq!(m.cpu.get(r), want, "{r:?}");
    }
    assert_eq!((m.sel(SegReg::Tr), m.cpu.seg(SegReg::Tr).base), (SLOT, NEW));
    assert_eq!((kind(&m, TR), kind(&m, SLOT)), (9, 11));
    assert_eq!(m.cpu.task_switches, 1);
    assert!(m.cpu.cr0.has(Cr0::TS));
    // What the old one left.
    assert_eq!(m.memory.get32(TSS + 0x20), CODE as u32 + 7);
    assert_eq!(m.memory.get32(TSS + 0x24), 3);
    assert_eq!(m.memory.get32(TSS + 0x34), 0x1234_5678);
    assert_eq!(m.memory.get32(TSS + 0x38), STACK as u32);
    assert_eq!(m.memory.get32(TSS + 0x4c), CODE0.into());
    assert_eq!(m.memory.get32(TSS + 0x5c), DATA0.into());
}

#[test]
fn nesting() {
    let mut m = machine();
    m.done(CALL);
    assert!(m.cpu.rflags.has(Rflags::NT));
    assert_eq!(m.memory.get32(NEW), TR.into());
    assert_eq!((kind(&m, TR), kind(&m, SLOT)), (11, 11));
    // The code segment is flat: IRET from where the test puts it.
    m.done("cf");
    assert_eq!((m.cpu.rip, m.cpu.get(Gpr::Rbx)), (CODE + 7, 0x1234_5678));
    assert_eq!((kind(&m, TR), kind(&m, SLOT)), (11, 9));
    assert_eq!(m.sel(SegReg::Tr), TR);
    assert!(!m.cpu.rflags.has(Rflags::NT));
    assert_eq!(m.memory.get32(NEW + 0x20), CODE as u32 + 1);
    assert_eq!(m.memory.get32(NEW + 0x24) & 0x4000, 0);

    // A link that is none.
    for (link, entry, fault) in [
        (0, 0, ts(0)),
        (0x54, 0, ts(0x54)),
        (0x80, 0, ts(0x80)),
        (SLOT, descriptor(NEW as u32, 0x67, 0x89, 0), ts(SLOT)),
        (SLOT, descriptor(NEW as u32, 0x67, 0x0b, 0), np(SLOT)),
    ] {
        let mut m = machine().with_flags(Rflags::NT);
        if link == SLOT {
            m.gdt(SLOT, entry);
        }
        m.memory.put32(TSS, link.into());
        m.faults("cf", fault);
    }
}

#[test]
fn refusals() {
    for (entry, fault) in [
        (descriptor(NEW as u32, 0x67, 0x8b, 0), gp(SLOT)),
        (descriptor(NEW as u32, 0x67, 0x09, 0), np(SLOT)),
        (descriptor(NEW as u32, 0x66, 0x89, 0), ts(SLOT)),
        (descriptor(NEW as u32, 0x2a, 0x81, 0), ts(SLOT)),
        (gate(OTHER, 0, 0x05, 0), np(SLOT)),
        (gate(OTHER, 0, 0x85, 0), gp(OTHER)),
        (gate(0x54, 0, 0x85, 0), gp(0x54)),
        (gate(0x80, 0, 0x85, 0), gp(0x80)),
    ] {
        for code in [JMP, CALL] {
            let mut m = machine();
            m.gdt(SLOT, entry);
            m.faults(code, fault);
        }
    }
    let mut m = Machine::new(3);
    new_tss(&mut m);
    m.faults(JMP, gp(SLOT));
    let mut m = machine();
    m.gdt(OTHER, gate(SLOT, 0, 0x85, 0));
    m.done("ea000000006000");
    assert_eq!(m.sel(SegReg::Tr), SLOT);
}

/// A fault of the new task: it is there, with what was loaded so far.
#[test]
fn faults_of_the_new_task() {
    // The field of the TSS, the selector there, and the fault.
    let cases = [
        (0x60, SLOT, ts(SLOT)),
        (0x60, 0x54, ts(0x54)),
        (0x4c, 0, ts(0)),
        (0x4c, DATA0, ts(DATA0)),
        (0x4c, CODE3 & !3, ts(CODE3 & !3)),
        (0x50, 0, ts(0)),
        (0x50, DATA3, ts(DATA3 & !3)),
        (0x50, CODE0, ts(CODE0)),
        (0x48, 0x80, ts(0x80)),
        (0x48, TR, ts(TR)),
        (0x54, OTHER, np(OTHER)),
        (0x50, OTHER, ss(OTHER)),
    ];
    for (field, selector, fault) in cases {
        let mut m = machine();
        m.gdt(OTHER, flat(0x13, 0xc));
        m.memory.put32(NEW + field, selector.into());
        assert_eq!(
            m.run(JMP),
            Outcome::Fault(fault),
            "{field:#x} {selector:#x}"
        );
        assert_eq!((m.sel(SegReg::Tr), m.cpu.rip), (SLOT, 0x1_4321));
        assert_eq!(m.memory.get32(TSS + 0x20), CODE as u32 + 7);
        assert_eq!((kind(&m, TR), kind(&m, SLOT)), (9, 11));
    }
    let mut m = machine();
    m.gdt(OTHER, descriptor(0, 0xfff, 0x9b, 4));
    m.memory.put32(NEW + 0x4c, OTHER.into());
    assert_eq!(m.run(JMP), Outcome::Fault(gp(0)), "EIP beyond the limit");
}

#[test]
fn to_user_and_virtual_8086() {
    let mut m = machine();
    for i in 0..6 {
        m.memory.put32(NEW + 0x48 + 4 * i, DATA3.into());
    }
    m.memory.put32(NEW + 0x4c, CODE3.into());
    m.done(JMP);
    assert_eq!(
        (m.cpu.cpl, m.sel(SegReg::Cs), m.sel(SegReg::Ss)),
        (3, CODE3, DATA3)
    );

    let mut m = machine();
    m.memory.put32(NEW + 0x20, 0x100);
    m.memory.put32(NEW + 0x24, 0x2_0002);
    m.memory.put32(NEW + 0x4c, 0x1234);
    m.done(JMP);
    let cs = *m.cpu.seg(SegReg::Cs);
    assert_eq!((cs.selector, cs.base, m.cpu.cpl), (0x1234, 0x12340, 3));
}

#[test]
fn sixteen_bits() {
    let mut m = machine();
    m.gdt(SLOT, descriptor(NEW as u32, 0x2b, 0x81, 0));
    for i in 0..22 {
        m.memory.put(NEW + 2 * i, &[0, 0]);
    }
    m.memory.put(NEW + 0xe, &0x4321u16.to_le_bytes());
    m.memory.put(NEW + 0x10, &2u16.to_le_bytes());
    m.memory.put(NEW + 0x12, &0x1111u16.to_le_bytes());
    m.memory.put(NEW + 0x24, &CODE0.to_le_bytes());
    m.memory.put(NEW + 0x26, &DATA0.to_le_bytes());
    m.done(CALL);
    assert_eq!((m.cpu.rip, m.cpu.get(Gpr::Rax) & 0xffff), (0x4321, 0x1111));
    assert!(m.cpu.seg(SegReg::Fs).attr.unusable());
    assert_eq!((kind(&m, TR), kind(&m, SLOT)), (11, 3));
    m.done("cf");
    assert_eq!((m.cpu.rip, m.cpu.get(Gpr::Rbx)), (CODE + 7, 0x1234_5678));
    assert_eq!((kind(&m, TR), kind(&m, SLOT)), (11, 1));
}

fn switch(m: &mut Machine, switch: TaskSwitch) -> Outcome<common::Lost> {
    Emulator::new().switch_task(&mut m.cpu, &mut m.memory, &switch)
}

#[test]
fn task_gates_of_the_idt() {
    let mut m = machine();
    m.idt(0x40, gate(SLOT, 0, 0x85, 0));
    m.done("cd40");
    assert_eq!(m.sel(SegReg::Tr), SLOT);
    assert_eq!(m.memory.get32(TSS + 0x20), CODE as u32 + 2);
    assert_eq!(m.cpu.get(Gpr::Rsp), 0x7000, "nothing is pushed");

    // As an exit tells it.
    let by_exception = TaskSwitch {
        cause: Cause::Gate(Some(0x1230)),
        selector: SLOT,
        external: true,
        program_vector: None,
        insn_len: 0,
    };
    let mut m = machine();
    m.cpu.rip = 0x1500;
    assert_eq!(switch(&mut m, by_exception), RETIRED);
    assert_eq!((m.cpu.get(Gpr::Rsp), m.stack32(0)), (0x6ffc, 0x1230));
    assert_eq!(m.memory.get32(TSS + 0x20), 0x1500);
    // The faults have EXT.
    let mut m = machine();
    m.memory.put32(NEW + 0x48, 0x80);
    assert_eq!(switch(&mut m, by_exception), Outcome::Fault(ts(0x81)));
    let mut m = machine();
    m.gdt(SLOT, descriptor(NEW as u32, 0x67, 0x8b, 0));
    assert_eq!(switch(&mut m, by_exception), Outcome::Fault(gp(SLOT | 1)));
    // INT n needs the privilege of the gate.
    let mut m = Machine::new(3);
    new_tss(&mut m);
    m.idt(0x40, gate(SLOT, 0, 0x85, 0));
    let by_program = TaskSwitch {
        cause: Cause::Gate(None),
        external: false,
        program_vector: Some(0x40),
        insn_len: 2,
        ..by_exception
    };
    let before = m.clone();
    assert_eq!(switch(&mut m, by_program), Outcome::Fault(gp(0x202)));
    assert_eq!(m.cpu, before.cpu);
}

#[test]
fn memory_that_is_not_plain() {
    // A TSS on a device is not handled, and nothing has changed.
    for page in [TSS >> 12, NEW >> 12] {
        let mut m = machine();
        m.memory.device_pages.push(page);
        let before = m.cpu.clone();
        let (outcome, _) = common::exec(&mut m.cpu, &mut m.memory, JMP, &[0; 8]);
        assert_eq!(outcome, Outcome::Unhandled);
        assert_eq!(m.cpu.gprs, before.gprs);
        assert_eq!(m.cpu.segments, before.segments);
    }
    // Somebody else marks descriptors meanwhile.
    let mut m = machine();
    m.memory.contention = 2;
    m.done(JMP);
    assert_eq!((kind(&m, TR), kind(&m, SLOT)), (9, 11));
    // Real mode has none.
    let mut m = machine();
    m.cpu.cr0 = Cr0::ET;
    m.faults("0f00d8", Fault::UD);
}
