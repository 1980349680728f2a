// SPDX-License-Identifier: GPL-2.0

//! Loading segment and table registers, and asking about descriptors: each rule and each fault.

mod common;

use common::system::*;
use common::TestCpu;
use common::TestMemory;
use common::CODE;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::emulate::TableReg;
use rkvm_x86::event::Shadow;
use rkvm_x86::exception::Fault;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;

/// MOV ES, AX.
const MOV_ES: &str = "8ec0";
/// MOV SS, AX.
const MOV_SS: &str = "8ed0";

fn load(cpl: u8, selector: u16, entry: u64) -> Machine {
    let mut m = Machine::new(cpl).with(Gpr::Rax, selector.into());
    m.gdt(selector, entry);
    m
}

#[test]
fn data_segments() {
    // Privilege, selector, access byte, and what comes of it.
    let cases = [
        (0, SLOT, 0x92, None),
        (0, SLOT, 0x90, None),
        (0, SLOT, 0x9a, None),
        (0, SLOT | 3, 0xf2, None),
        (3, SLOT | 3, 0xf2, None),
        (3, SLOT, 0xf2, None),
        // A conforming segment is everybody's.
        (3, SLOT | 3, 0x9e, None),
        // Code that cannot be read, a system segment.
        (0, SLOT, 0x98, Some(gp(SLOT))),
        (0, SLOT, 0x82, Some(gp(SLOT))),
        // Too little privilege, of the program or of the selector.
        (3, SLOT | 3, 0x92, Some(gp(SLOT))),
        (3, SLOT, 0x92, Some(gp(SLOT))),
        (0, SLOT | 3, 0x92, Some(gp(SLOT))),
        // Not present; privilege is looked at before.
        (0, SLOT, 0x12, Some(np(SLOT))),
        (3, SLOT | 3, 0x12, Some(gp(SLOT))),
    ];
    for (cpl, selector, access, fault) in cases {
        let entry = descriptor(0x12_3456, 0x789, access, 4);
        let mut m = load(cpl, selector, entry);
        match fault {
            Some(fault) => m.faults(MOV_ES, fault),
            None => {
                m.done(MOV_ES);
                let accessed = entry | (1 << 40);
                assert_eq!(*m.cpu.seg(SegReg::Es), loaded(selector, accessed));
                assert_eq!(m.entry(selector), accessed);
                assert_eq!(m.cpu.rip, CODE + 2);
            }
        }
    }
    // Beyond the table, and in an LDT that is not there.
    Machine::new(0)
        .with(Gpr::Rax, 0x80)
        .faults(MOV_ES, gp(0x80));
    Machine::new(0)
        .with(Gpr::Rax, 0x84)
        .faults(MOV_ES, gp(0x84));
    for null in 0..4 {
        let mut m = Machine::new(3).with(Gpr::Rax, null);
        m.done(MOV_ES);
        let want = Segment {
            selector: null as u16,
            ..Segment::NULL
        };
        assert_eq!(*m.cpu.seg(SegReg::Es), want);
    }
}

#[test]
fn local_table() {
    let mut m = Machine::new(0).with(Gpr::Rax, 0xc);
    let entry = flat(0x92, 0xc);
    m.memory.put64(LDT + 8, entry);
    *m.cpu.seg(SegReg::Ldtr) = loaded(SLOT, descriptor(LDT as u32, 0xf, 0x82, 0));
    m.done(MOV_ES);
    assert_eq!(m.sel(SegReg::Es), 0xc);
    m.cpu.gprs.set(Gpr::Rax, 0x14);
    m.faults(MOV_ES, gp(0x14));
}

#[test]
fn stack_segments() {
    let cases = [
        (0, SLOT, 0x92, None),
        (3, SLOT | 3, 0xf2, None),
        (0, SLOT | 3, 0x92, Some(gp(SLOT))),
        (0, SLOT, 0xf2, Some(gp(SLOT))),
        (3, SLOT, 0xf2, Some(gp(SLOT))),
        // Read-only, code.
        (0, SLOT, 0x90, Some(gp(SLOT))),
        (0, SLOT, 0x9a, Some(gp(SLOT))),
        (0, SLOT, 0x12, Some(ss(SLOT))),
        (0, 0, 0, Some(gp(0))),
        (3, 3, 0, Some(gp(0))),
    ];
    for (cpl, selector, access, fault) in cases {
        let mut m = load(cpl, selector, flat(access, 0xc));
        match fault {
            Some(fault) => m.faults(MOV_SS, fault),
            None => {
                let outcome = m.run(MOV_SS);
                let Outcome::Done(done) = outcome else {
                    panic!("{outcome:?}");
                };
                assert_eq!(done.shadow, Shadow::MovSs);
                assert_eq!(m.sel(SegReg::Ss), selector);
            }
        }
    }
    // 64-bit code has no need of one, but for user mode.
    let mut m = Machine::long(0).with(Gpr::Rax, 0);
    m.done(MOV_SS);
    assert!(m.cpu.seg(SegReg::Ss).attr.unusable());
    Machine::long(3).with(Gpr::Rax, 3).faults(MOV_SS, gp(0));
    Machine::long(0).with(Gpr::Rax, 1).faults(MOV_SS, gp(0));
}

#[test]
fn real_and_virtual_8086() {
    let mut cpu = TestCpu::real().with(Gpr::Rax, 0x1234);
    let mut memory = TestMemory::default();
    // What was loaded in protected mode goes on.
    cpu.seg(SegReg::Es).limit = u32::MAX;
    common::exec(&mut cpu, &mut memory, MOV_ES, &[]);
    let es = *cpu.seg(SegReg::Es);
    assert_eq!(
        (es.selector, es.base, es.limit),
        (0x1234, 0x12340, u32::MAX)
    );

    let mut m = Machine::new(3)
        .with(Gpr::Rax, 0x1234)
        .with_flags(Rflags::VM);
    m.done(MOV_ES);
    let es = *m.cpu.seg(SegReg::Es);
    assert_eq!((es.selector, es.base, es.limit), (0x1234, 0x12340, 0xffff));
    assert_eq!(es.attr.dpl(), 3);
    // MOV CS is none, in any mode.
    m.faults("8ec8", Fault::UD);
}

#[test]
fn pops_and_far_pointers() {
    let mut m = Machine::new(0);
    m.memory.put32(STACK, 0xffff_0000 | u32::from(SLOT));
    m.gdt(SLOT, flat(0x93, 0xc));
    m.done("07");
    assert_eq!(m.sel(SegReg::Es), SLOT);
    assert_eq!(m.cpu.get(Gpr::Rsp), STACK + 4);
    let mut m = Machine::long(0);
    m.memory.put64(STACK, 0);
    m.done("0fa1");
    assert_eq!(m.cpu.get(Gpr::Rsp), STACK + 8);
    assert!(m.cpu.seg(SegReg::Fs).attr.unusable());
    // A fault leaves the pointer alone.
    let mut m = Machine::new(0);
    m.memory.put32(STACK, 0x88);
    m.faults("07", gp(0x88));

    // LES EAX, [ECX].
    let mut m = Machine::new(0).with(Gpr::Rcx, 0x6000);
    m.memory.put32(0x6000, 0x1234_5678);
    m.memory.put(0x6004, &DATA3.to_le_bytes());
    m.done("c401");
    assert_eq!(m.cpu.get(Gpr::Rax), 0x1234_5678);
    assert_eq!(m.sel(SegReg::Es), DATA3);
    m.memory.put(0x6004, &TR.to_le_bytes());
    m.faults("c401", gp(TR));
    // LSS has no shadow.
    m.memory.put(0x6004, &DATA0.to_le_bytes());
    assert_eq!(m.run("0fb221"), common::DONE);
    assert_eq!(m.cpu.get(Gpr::Rsp), 0x1234_5678);
}

/// Somebody else sets the accessed bit, or keeps changing it.
#[test]
fn accessed_bit() {
    let mut m = load(0, SLOT, flat(0x92, 0xc));
    m.memory.contention = 3;
    m.done(MOV_ES);
    assert_eq!(m.entry(SLOT), flat(0x93, 0xc));
    let mut m = load(0, SLOT, flat(0x93, 0xc));
    let writes = m.memory.writes;
    m.done(MOV_ES);
    assert_eq!(m.memory.writes, writes, "it was set");
}

#[test]
fn table_registers() {
    let mut m = Machine::new(0).with(Gpr::Rcx, 0x6000);
    m.done("0f0101");
    assert_eq!(m.memory.get64(0x6000), (GDT << 16) | 0x7f);
    m.memory.put64(0x6000, 0x1122_3344_5566);
    m.done("0f0111");
    let want = TableReg {
        base: 0x1122_3344,
        limit: 0x5566,
    };
    assert_eq!(m.cpu.gdtr, want);
    m.done("660f0119");
    assert_eq!(m.cpu.idtr.base, 0x22_3344);

    let mut m = Machine::long(0).with(Gpr::Rcx, 0x6000);
    m.done("0f0109");
    assert_eq!(m.memory.get64(0x6002), IDT);
    m.memory.put64(0x6002, 1 << 47);
    m.faults("0f0111", gp(0));
    // At CPL 3 they are read, if they may be, and not loaded.
    let mut m = Machine::new(3).with(Gpr::Rcx, 0x6000);
    m.faults("0f0111", gp(0));
    m.done("0f0101");
    m.cpu.cr4 |= Cr4::UMIP;
    for code in ["0f0101", "0f0109", "0f0001", "0f0009", "0f0121"] {
        m.faults(code, gp(0));
    }
}

/// LLDT AX and LTR AX.
#[test]
fn system_segments() {
    let ldt = descriptor(LDT as u32, 0xff, 0x82, 0);
    let tss = descriptor(0x6000, 0x67, 0x89, 0);
    let lldt = "0f00d0";
    let ltr = "0f00d8";
    let mut m = load(0, SLOT, ldt);
    m.done(lldt);
    assert_eq!(*m.cpu.seg(SegReg::Ldtr), loaded(SLOT, ldt));
    let mut m = load(0, SLOT, tss);
    m.done(ltr);
    assert_eq!(*m.cpu.seg(SegReg::Tr), loaded(SLOT, tss | (2 << 40)));
    assert_eq!(m.entry(SLOT), tss | (2 << 40), "busy");
    let mut m = Machine::new(0).with(Gpr::Rax, 0);
    m.done(lldt);
    assert!(m.cpu.seg(SegReg::Ldtr).attr.unusable());
    m.faults(ltr, gp(0));

    for (code, entry, fault) in [
        (lldt, tss, gp(SLOT)),
        (lldt, flat(0x92, 0xc), gp(SLOT)),
        (lldt, ldt & !(1 << 47), np(SLOT)),
        (ltr, ldt, gp(SLOT)),
        (ltr, tss | (2 << 40), gp(SLOT)),
        (ltr, tss & !(1 << 47), np(SLOT)),
    ] {
        load(0, SLOT, entry).faults(code, fault);
    }
    for code in [lldt, ltr] {
        load(3, SLOT, ldt).faults(code, gp(0));
        Machine::new(0).with(Gpr::Rax, 0x54).faults(code, gp(0x54));
        Machine::new(0).with(Gpr::Rax, 0x80).faults(code, gp(0x80));
        Machine::new(3)
            .with_flags(Rflags::VM)
            .faults(code, Fault::UD);
    }
    // In long mode they have sixteen bytes.
    let mut m = Machine::long(0).with(Gpr::Rax, SLOT.into());
    m.gdt(SLOT, tss);
    m.gdt(SLOT + 8, 0xffff_8000);
    m.done(ltr);
    assert_eq!(m.cpu.seg(SegReg::Tr).base, 0xffff_8000_0000_6000);
    let mut m = Machine::long(0).with(Gpr::Rax, SLOT.into());
    m.gdt(SLOT, tss);
    m.gdt(SLOT + 8, 0x8000);
    m.faults(ltr, gp(SLOT));
    m.gdt(SLOT + 8, 1 << 40);
    m.faults(ltr, gp(SLOT));
    m.cpu.gdtr.limit = SLOT + 8;
    m.gdt(SLOT + 8, 0);
    m.faults(ltr, gp(SLOT));
}

/// LAR, LSL, VERR and VERW of AX.
#[test]
fn questions() {
    // Privilege, selector, access byte; then LAR, LSL, VERR, VERW.
    let cases = [
        (0, SLOT, 0x92, [true, true, true, true]),
        (0, SLOT, 0x90, [true, true, true, false]),
        (0, SLOT, 0x9a, [true, true, true, false]),
        (0, SLOT, 0x98, [true, true, false, false]),
        (3, SLOT | 3, 0x92, [false; 4]),
        (0, SLOT | 3, 0x92, [false; 4]),
        (3, SLOT | 3, 0x9e, [true, true, true, false]),
        (0, SLOT, 0x82, [true, true, false, false]),
        (0, SLOT, 0x89, [true, true, false, false]),
        (0, SLOT, 0x8b, [true, true, false, false]),
        (0, SLOT, 0x81, [true, true, false, false]),
        (0, SLOT, 0x8c, [true, false, false, false]),
        (0, SLOT, 0x85, [true, false, false, false]),
        (0, SLOT, 0x8e, [false; 4]),
        (0, SLOT, 0x88, [false; 4]),
        (0, 0, 0x92, [false; 4]),
        (0, 0x80, 0x92, [false; 4]),
    ];
    for (cpl, selector, access, answers) in cases {
        for (code, answer) in ["0f02c8", "0f03c8", "0f00e0", "0f00e8"].iter().zip(answers) {
            let entry = descriptor(0, 0x1_2345, access, 8);
            let mut m = Machine::new(cpl).with(Gpr::Rax, selector.into());
            if !matches!(selector, 0 | 0x80) {
                m.gdt(selector, entry);
            }
            m.cpu.gprs.set(Gpr::Rcx, 0x77);
            m.done(code);
            assert_eq!(
                m.cpu.rflags.has(Rflags::ZF),
                answer,
                "{code} {access:#x} {selector:#x} at {cpl}"
            );
            let want = match (*code, answer) {
                ("0f02c8", true) => (entry >> 32) & 0xff_ff00,
                ("0f03c8", true) => 0x1234_5fff,
                _ => 0x77,
            };
            assert_eq!(m.cpu.get(Gpr::Rcx), want, "{code} {access:#x}");
        }
    }
    // ARPL CX, AX.
    let mut m = Machine::new(0).with(Gpr::Rax, 3).with(Gpr::Rcx, 0x51);
    m.done("63c1");
    assert_eq!(m.cpu.get(Gpr::Rcx), 0x53);
    assert!(m.cpu.rflags.has(Rflags::ZF));
    m.done("63c1");
    assert!(!m.cpu.rflags.has(Rflags::ZF));
    for code in ["0f02c8", "0f03c8", "0f00e0", "0f00e8", "63c1"] {
        Machine::new(3)
            .with_flags(Rflags::VM)
            .faults(code, Fault::UD);
    }
}
