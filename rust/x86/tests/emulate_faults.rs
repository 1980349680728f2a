// SPDX-License-Identifier: GPL-2.0

//! The emulator: instructions that fault, code that is not there, hosts that fail.

mod common;

use common::*;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Hint;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::exception::Fault;
use rkvm_x86::exception::PfError;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr3;
use rkvm_x86::regs::Gpr::*;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegAttr;
use rkvm_x86::segment::SegReg;

/// An instruction, what to do to the processor first, and the fault.
type Case = (&'static str, fn(&mut TestCpu), Fault);

#[test]
fn faults_change_nothing() {
    let mut memory = TestMemory::default();
    let cases: [Case; 6] = [
        // Not canonical: #GP, and #SS through the stack.
        ("488b07", |c| c.gprs.set(Rdi, 1 << 47), Fault::gp(0)),
        ("488b4500", |c| c.gprs.set(Rbp, 1 << 63), Fault::ss(0)),
        ("50", |c| c.gprs.set(Rsp, (1 << 47) + 16), Fault::ss(0)),
        // The last byte is on the other side.
        ("488b07", |c| c.gprs.set(Rdi, (1 << 47) - 4), Fault::gp(0)),
        // Alignment checks at CPL 3.
        (
            "488b07",
            |c| {
                c.gprs.set(Rdi, 0x8001);
                c.cpl = 3;
                c.cr0 |= Cr0::AM;
                c.rflags |= Rflags::AC;
            },
            Fault::ac(),
        ),
        ("f00b07", |_| {}, Fault::UD),
    ];
    for (code, prepare, fault) in cases {
        let mut cpu = TestCpu::long();
        prepare(&mut cpu);
        memory.put(CODE, &hex(code));
        cpu.rip = CODE;
        let before = cpu.clone();
        assert_eq!(
            run(&mut cpu, &mut memory, &[]),
            (Outcome::Fault(fault), vec![]),
            "{code}"
        );
        assert_eq!(cpu, before, "{code}");
    }
    // Protected mode: limits and types.
    let cases: [Case; 6] = [
        (
            "8b07",
            |c| c.seg(SegReg::Ds).attr = SegAttr::NULL,
            Fault::gp(0),
        ),
        (
            "8b4500",
            |c| c.seg(SegReg::Ss).attr = SegAttr::NULL,
            Fault::ss(0),
        ),
        ("8b07", |c| c.seg(SegReg::Ds).limit = 0x8002, Fault::gp(0)),
        (
            "8907",
            |c| c.seg(SegReg::Ds).attr = SegAttr::REAL_MODE.with_type(1),
            Fault::gp(0),
        ),
        ("2e8907", |_| {}, Fault::gp(0)),
        (
            "2e8b07",
            |c| c.seg(SegReg::Cs).attr = SegAttr::RESET_CODE.with_type(9).with_db(true),
            Fault::gp(0),
        ),
    ];
    for (code, prepare, fault) in cases {
        let mut cpu = TestCpu::protected().with(Rdi, 0x8000).with(Rbp, 0x8000);
        prepare(&mut cpu);
        assert_eq!(
            exec(&mut cpu, &mut memory, code, &[]).0,
            Outcome::Fault(fault),
            "{code}"
        );
    }
}

/// 64-bit mode with page tables at 0x40000: identity, 2 MiB pages, but 4 KiB pages for the first 2 MiB.
fn paged(memory: &mut TestMemory) -> TestCpu {
    let (pml4, pdpt, pd, pt) = (0x40000, 0x41000, 0x42000, 0x43000);
    memory.put64(pml4, pdpt | 7);
    memory.put64(pdpt, pd | 7);
    memory.put64(pd, pt | 7);
    for i in 0..512 {
        memory.put64(pt + 8 * i, (i << 12) | 7);
    }
    for i in 1..512 {
        memory.put64(pd + 8 * i, (i << 21) | 0x87);
    }
    let mut cpu = TestCpu::long();
    cpu.cr0 |= Cr0::PG | Cr0::WP;
    cpu.cr3 = Cr3::new(pml4);
    cpu
}

#[test]
fn page_faults() {
    let mut memory = TestMemory::default();
    let mut cpu = paged(&mut memory);
    memory.put64(0x43000 + 8 * 9, 0);
    // The second half of the access is on a page that is not there.
    cpu.gprs.set(Rdi, 0x8ffc);
    let (outcome, _) = exec(&mut cpu, &mut memory, "488907", &[]);
    assert_eq!(outcome, Outcome::Fault(Fault::page(0x9000, PfError::W)));
    assert_eq!(memory.get32(0x8ffc), 0, "nothing was written");
    // A read-modify-write needs the right to write from the start.
    memory.put64(0x43000 + 8 * 9, 0x9000 | 5);
    cpu.gprs.set(Rdi, 0x9000);
    let (outcome, _) = exec(&mut cpu, &mut memory, "f00107", &[]);
    let error = PfError::W | PfError::P;
    assert_eq!(outcome, Outcome::Fault(Fault::page(0x9000, error)));
    assert_eq!(exec(&mut cpu, &mut memory, "8b07", &[]).0, DONE);
    // A device through the tables.
    memory.put64(0x43000 + 8 * 9, DEVICE | 3);
    cpu.gprs.set(Rdi, 0x9010);
    let (outcome, bus) = exec(&mut cpu, &mut memory, "8b07", &[3]);
    assert_eq!((outcome, bus), (DONE, vec![rd(DEVICE + 0x10, 4)]));
}

#[test]
fn fetches_cross_pages_only_when_they_must() {
    let mut memory = TestMemory::default();
    let mut cpu = paged(&mut memory).with(Rdi, DEVICE);
    // The instruction ends with the page; the next page does not exist.
    memory.put64(0x43000 + 8 * 2, 0);
    memory.put(0x1ffe, &hex("8b07"));
    cpu.rip = 0x1ffe;
    assert_eq!(run(&mut cpu, &mut memory, &[]), (DONE, vec![rd(DEVICE, 4)]));
    // It goes on there: the fault is of the second page.
    memory.put(0x1ffe, &hex("8b87"));
    cpu.rip = 0x1ffe;
    let fault = Fault::page(0x2000, PfError::empty());
    assert_eq!(run(&mut cpu, &mut memory, &[]).0, Outcome::Fault(fault));
    // The next page is mapped elsewhere.
    memory.put64(0x43000 + 8 * 2, 0x5000 | 7);
    memory.put(0x5000, &hex("00010000"));
    assert_eq!(
        run(&mut cpu, &mut memory, &[]),
        (DONE, vec![rd(DEVICE + 0x100, 4)])
    );
    assert_eq!(cpu.rip, 0x2004);
    // Code on a device is not emulated.
    cpu.rip = DEVICE;
    assert_eq!(run(&mut cpu, &mut memory, &[]).0, Outcome::Unhandled);
    // Past the limit of the segment.
    let mut cpu = TestCpu::protected().with(Rdi, DEVICE);
    cpu.seg(SegReg::Cs).limit = 0x1fff;
    cpu.rip = 0x1fff;
    memory.put(0x1fff, &hex("8b07"));
    assert_eq!(
        run(&mut cpu, &mut memory, &[]).0,
        Outcome::Fault(Fault::gp(0))
    );
}

#[test]
fn hints_save_the_walk() {
    let mut memory = TestMemory::default();
    let mut cpu = paged(&mut memory).with(Rdi, 0x9010).with(Rax, 1);
    memory.put(CODE, &hex("8907"));
    cpu.rip = CODE;
    let mut emulator = Emulator::new();
    // The tables say otherwise, which shows who was asked.
    let hint = Hint {
        linear: 0x9ff0,
        gpa: DEVICE + 0x5ff0,
        write: true,
        table: false,
    };
    emulator.set_hint(hint);
    let (_, bus) = run_with(&mut emulator, &mut cpu, &mut memory, &[]);
    assert_eq!(bus, [wr(DEVICE + 0x5010, 4, 1)]);
    // It is for one instruction.
    cpu.rip = CODE;
    let (_, bus) = run_with(&mut emulator, &mut cpu, &mut memory, &[]);
    assert_eq!(bus, []);
    // A read says nothing about the right to write.
    cpu.rip = CODE;
    emulator.set_hint(Hint {
        write: false,
        ..hint
    });
    let (_, bus) = run_with(&mut emulator, &mut cpu, &mut memory, &[]);
    assert_eq!(bus, []);
}

#[test]
fn tables_are_not_filled() {
    for (code, table, done) in [
        ("f348ab", false, true),
        ("f348ab", true, false),
        ("f348a5", true, false),
        ("48ab", true, true),
        ("488907", true, true),
        ("f0480107", true, true),
    ] {
        let mut memory = TestMemory::default();
        let mut cpu = TestCpu::long()
            .with(Rdi, 0x9000)
            .with(Rsi, 0xa000)
            .with(Rcx, 4)
            .with(Rax, 1);
        memory.put(CODE, &hex(code));
        cpu.rip = CODE;
        let mut emulator = Emulator::new();
        emulator.set_hint(Hint {
            linear: 0x9000,
            gpa: 0x9000,
            write: true,
            table,
        });
        let outcome = emulator.step(&mut cpu, &mut memory);
        assert_eq!(matches!(outcome, Outcome::Done(_)), done, "{code}");
        assert_eq!(cpu.rip != CODE, done, "{code}");
        if !done {
            assert_eq!(outcome, Outcome::Unhandled, "{code}");
            assert_eq!(cpu.gprs.get(Rcx), 4, "{code}");
        }
    }
}

#[test]
fn the_host_fails() {
    let mut memory = TestMemory {
        lost_page: Some(8),
        ..TestMemory::default()
    };
    let mut cpu = TestCpu::long().with(Rdi, 0x8000);
    for code in ["8b07", "8907", "f00107"] {
        let before = cpu.gprs;
        assert_eq!(
            exec(&mut cpu, &mut memory, code, &[]).0,
            Outcome::Host(Lost),
            "{code}"
        );
        assert_eq!((cpu.gprs, cpu.rip), (before, CODE));
    }
}

#[test]
fn unhandled_instructions_tell_their_bytes() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long().with(Rdi, DEVICE);
    memory.put(CODE, &hex("0f5807"));
    cpu.rip = CODE;
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, &mut memory), Outcome::Unhandled);
    assert!(emulator.insn_bytes().starts_with(&hex("0f5807")));
    assert_eq!(emulator.insn_bytes().len(), 15);
}

/// A device that has answered is not asked again when the memory is there at last.
#[test]
fn another_try_for_lost_memory() {
    for (code, before) in [("a5", DONE), ("f3a5", MORE)] {
        let mut emulator = Emulator::new();
        let mut memory = TestMemory {
            lost_page: Some(8),
            ..TestMemory::default()
        };
        memory.put(CODE, &hex(code));
        let mut cpu = TestCpu::long()
            .with(Rsi, DEVICE)
            .with(Rdi, 0x8000)
            .with(Rcx, 2);
        cpu.rip = CODE;
        let lost = (Outcome::Host(Lost), vec![rd(DEVICE, 4)]);
        let first = run_with(&mut emulator, &mut cpu, &mut memory, &[0x1234_5678]);
        assert_eq!(first, lost, "{code}");
        assert!(emulator.in_progress());
        assert_eq!(emulator.step(&mut cpu, &mut memory), Outcome::Host(Lost));
        assert_eq!((cpu.rip, cpu.get(Rsi), cpu.get(Rcx)), (CODE, DEVICE, 2));

        memory.lost_page = None;
        let then = run_with(&mut emulator, &mut cpu, &mut memory, &[]);
        assert_eq!(then, (before, vec![]), "{code}");
        assert_eq!(memory.get32(0x8000), 0x1234_5678);
        assert_eq!((cpu.get(Rsi), cpu.get(Rdi)), (DEVICE + 4, 0x8004));
    }

    // Without an answer there is nothing to keep.
    let mut emulator = Emulator::new();
    let mut memory = TestMemory {
        lost_page: Some(CODE >> 12),
        ..TestMemory::default()
    };
    let mut cpu = TestCpu::long();
    assert_eq!(emulator.step(&mut cpu, &mut memory), Outcome::Host(Lost));
    assert!(!emulator.in_progress());
}
