// SPDX-License-Identifier: GPL-2.0

//! String port I/O in chunks.

mod common;

use common::*;
use rkvm_x86::exception::Fault;
use rkvm_x86::exception::PfError;
use rkvm_x86::insn::Size;
use rkvm_x86::io::IoError;
use rkvm_x86::io::StringIo;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr3;
use rkvm_x86::regs::Gpr::*;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegReg;

const OUTS: StringIo = StringIo {
    input: false,
    size: Size::Byte,
    rep: true,
    address_size: 8,
    seg: SegReg::Ds,
};
const INS: StringIo = StringIo {
    input: true,
    ..OUTS
};

/// How many elements one exit takes, and whether that was all.
fn count(io: &StringIo, cpu: &mut TestCpu, max: u32) -> (u32, bool) {
    let t = io
        .prepare(cpu, &mut TestMemory::default(), max)
        .unwrap()
        .unwrap();
    (t.count(), t.finish(cpu))
}

#[test]
fn output_and_input() {
    let mut memory = TestMemory::default();
    memory.put(0x8000, b"to the port!");
    let mut cpu = TestCpu::long().with(Rsi, 0x8000).with(Rcx, 12);
    let t = OUTS.prepare(&mut cpu, &mut memory, 1024).unwrap().unwrap();
    assert_eq!((t.count(), t.bytes()), (12, 12));
    let mut data = [0; 12];
    t.gather(&mut memory, &mut data).unwrap();
    assert_eq!(&data, b"to the port!");
    assert!(t.finish(&mut cpu));
    assert_eq!((cpu.get(Rsi), cpu.get(Rcx)), (0x800c, 0));
    assert_eq!(OUTS.prepare(&mut cpu, &mut memory, 1024), Ok(None));

    let words = StringIo {
        size: Size::Word,
        ..INS
    };
    let mut cpu = TestCpu::long().with(Rdi, 0x9000).with(Rcx, 3);
    let t = words.prepare(&mut cpu, &mut memory, 1024).unwrap().unwrap();
    assert_eq!((t.count(), t.bytes()), (3, 6));
    t.scatter(&mut memory, b"abcdefgh").unwrap();
    assert_eq!(
        &memory.ram[0x9000..][..8],
        b"abcdef\0\0",
        "no more than was asked for"
    );
    assert!(t.finish(&mut cpu));
    assert_eq!((cpu.get(Rdi), cpu.get(Rcx)), (0x9006, 0));

    // Without REP it is one, and RCX is not touched.
    let mut cpu = TestCpu::long().with(Rsi, 0x8000).with(Rcx, 7);
    let once = StringIo {
        rep: false,
        size: Size::Dword,
        ..OUTS
    };
    assert_eq!(count(&once, &mut cpu, 1024), (1, true));
    assert_eq!((cpu.get(Rsi), cpu.get(Rcx)), (0x8004, 7));
}

#[test]
fn chunks() {
    // The page, the caller's room, and what is left.
    let mut cpu = TestCpu::long().with(Rsi, 0x8ff0).with(Rcx, 5000);
    assert_eq!(count(&OUTS, &mut cpu, 1024), (16, false));
    assert_eq!(count(&OUTS, &mut cpu, 1024), (1024, false));
    assert_eq!(count(&OUTS, &mut cpu, 4096), (3072, false));
    assert_eq!(count(&OUTS, &mut cpu, 4096), (888, true));
    assert_eq!((cpu.get(Rsi), cpu.get(Rcx)), (0x8ff0 + 5000, 0));
    // Down, one at a time.
    let mut cpu = TestCpu::long()
        .with(Rsi, 0x8004)
        .with(Rcx, 2)
        .with_flags(Rflags::DF);
    let dwords = StringIo {
        size: Size::Dword,
        ..OUTS
    };
    assert_eq!(count(&dwords, &mut cpu, 1024), (1, false));
    assert_eq!(count(&dwords, &mut cpu, 1024), (1, true));
    assert_eq!(cpu.get(Rsi), 0x7ffc);
    // Room for less than one is room for one.
    let mut cpu = TestCpu::long().with(Rsi, 0x8000).with(Rcx, 2);
    assert_eq!(count(&dwords, &mut cpu, 3), (1, false));
}

#[test]
fn some_of_the_elements() {
    let mut cpu = TestCpu::long().with(Rsi, 0x8000).with(Rcx, 5);
    let words = StringIo {
        size: Size::Word,
        ..OUTS
    };
    let t = words
        .prepare(&mut cpu, &mut TestMemory::default(), 1024)
        .unwrap()
        .unwrap();
    assert_eq!((t.first(0), t.first(6)), (None, None));
    assert_eq!(t.first(5), Some(t));
    let some = t.first(2).unwrap();
    assert_eq!((some.count(), some.bytes()), (2, 4));
    assert!(!some.finish(&mut cpu));
    assert_eq!((cpu.get(Rsi), cpu.get(Rcx)), (0x8004, 3));
}

#[test]
fn an_element_across_pages() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long()
        .with(Rsi, 0x8ffe)
        .with(Rdi, 0x9ffd)
        .with(Rcx, 9);
    memory.put(0x8ffe, &[1, 2, 3, 4]);
    let dwords = StringIo {
        size: Size::Dword,
        ..OUTS
    };
    let t = dwords
        .prepare(&mut cpu, &mut memory, 1024)
        .unwrap()
        .unwrap();
    assert_eq!(t.count(), 1);
    let mut data = [0; 4];
    t.gather(&mut memory, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    let t = StringIo {
        input: true,
        ..dwords
    }
    .prepare(&mut cpu, &mut memory, 1024)
    .unwrap()
    .unwrap();
    t.scatter(&mut memory, &[5, 6, 7, 8]).unwrap();
    assert_eq!(memory.ram[0x9ffd..][..4], [5, 6, 7, 8]);
    // Three bytes and a half words' worth in the page: the whole ones first.
    let mut cpu = TestCpu::long().with(Rsi, 0x8ff7).with(Rcx, 9);
    assert_eq!(count(&dwords, &mut cpu, 1024), (2, false));
    assert_eq!(count(&dwords, &mut cpu, 1024), (1, false));
    assert_eq!(count(&dwords, &mut cpu, 1024), (6, true));
}

#[test]
fn address_sizes() {
    // Sixteen bits wrap, after as many as there are.
    let words = StringIo {
        address_size: 2,
        ..OUTS
    };
    let mut cpu = TestCpu::real()
        .with(Rsi, 0xdead_fffc)
        .with(Rcx, 0xbeef_0006);
    assert_eq!(count(&words, &mut cpu, 1024), (4, false));
    assert_eq!((cpu.get(Rsi), cpu.get(Rcx)), (0xdead_0000, 0xbeef_0002));
    assert_eq!(count(&words, &mut cpu, 1024), (2, true));
    assert_eq!((cpu.get(Rsi), cpu.get(Rcx)), (0xdead_0002, 0xbeef_0000));
    // Thirty-two clear what is above.
    let dwords = StringIo {
        address_size: 4,
        ..OUTS
    };
    let mut cpu = TestCpu::long()
        .with(Rsi, 0xdead_0000_8000)
        .with(Rcx, 0xf_0000_0002);
    assert_eq!(count(&dwords, &mut cpu, 1), (1, false));
    assert_eq!((cpu.get(Rsi), cpu.get(Rcx)), (0x8001, 1));
}

#[test]
fn segments() {
    let mut memory = TestMemory::default();
    // OUTS takes an override, INS does not.
    let mut cpu = TestCpu::protected()
        .with(Rsi, 0x10)
        .with(Rdi, 0x10)
        .with(Rcx, 1);
    cpu.seg(SegReg::Gs).base = 0x8000;
    cpu.seg(SegReg::Es).base = 0x9000;
    memory.put(0x8010, &[7]);
    let mut data = [0];
    let gs = StringIo {
        seg: SegReg::Gs,
        address_size: 4,
        ..OUTS
    };
    let t = gs.prepare(&mut cpu, &mut memory, 1024).unwrap().unwrap();
    t.gather(&mut memory, &mut data).unwrap();
    assert_eq!(data, [7]);
    let t = StringIo { input: true, ..gs }
        .prepare(&mut cpu, &mut memory, 1024)
        .unwrap()
        .unwrap();
    t.scatter(&mut memory, &[8]).unwrap();
    assert_eq!(memory.ram[0x9010], 8);
    // The element that passes the limit is the one that faults.
    let io = StringIo {
        address_size: 4,
        size: Size::Dword,
        ..OUTS
    };
    let mut cpu = TestCpu::protected().with(Rsi, 0x8000).with(Rcx, 9);
    cpu.seg(SegReg::Ds).limit = 0x8008;
    assert_eq!(count(&io, &mut cpu, 1024), (1, false));
    assert_eq!(count(&io, &mut cpu, 1024), (1, false));
    let r = io.prepare(&mut cpu, &mut memory, 1024);
    assert_eq!(r, Err(IoError::Fault(Fault::gp(0))));
    assert_eq!(cpu.get(Rcx), 7);
}

#[test]
fn faults() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long()
        .with(Rsi, 0x8000)
        .with(Rdi, 0x8000)
        .with(Rcx, 9);
    cpu.cr0 |= Cr0::PG | Cr0::WP;
    cpu.cr3 = Cr3::new(0x40000);
    memory.put64(0x40000, 0x41007);
    memory.put64(0x41000, 0x42007);
    // Read-only.
    memory.put64(0x42000, 0x85);
    assert_eq!(
        OUTS.prepare(&mut cpu, &mut memory, 1024)
            .unwrap()
            .unwrap()
            .count(),
        9
    );
    let r = INS.prepare(&mut cpu, &mut memory, 1024);
    let error = PfError::P | PfError::W;
    assert_eq!(r, Err(IoError::Fault(Fault::page(0x8000, error))));
    // Not memory.
    let mut cpu = TestCpu::long().with(Rsi, DEVICE).with(Rcx, 9);
    let t = OUTS.prepare(&mut cpu, &mut memory, 1024).unwrap().unwrap();
    assert_eq!(t.gather(&mut memory, &mut [0; 9]), Err(IoError::Mmio));
    memory.lost_page = Some(8);
    cpu.gprs.set(Rsi, 0x8000);
    let t = OUTS.prepare(&mut cpu, &mut memory, 1024).unwrap().unwrap();
    assert_eq!(t.gather(&mut memory, &mut [0; 9]), Err(IoError::Host(Lost)));
}

/// The count may change while the data is on its way.
#[test]
fn a_count_that_was_lowered() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long().with(Rdi, 0x9000).with(Rcx, 3);
    let t = INS.prepare(&mut cpu, &mut memory, 1024).unwrap().unwrap();
    assert_eq!(t.limited(&mut cpu), Some(t));
    let mut more = TestCpu::long().with(Rdi, 0x9000).with(Rcx, 8192);
    assert_eq!(t.limited(&mut more), Some(t));
    let mut cpu = TestCpu::long().with(Rdi, 0x9000).with(Rcx, 1);
    let one = t.limited(&mut cpu).unwrap();
    one.scatter(&mut memory, b"abc").unwrap();
    assert_eq!(&memory.ram[0x9000..][..3], b"a\0\0");
    assert!(one.finish(&mut cpu));
    assert_eq!((cpu.get(Rdi), cpu.get(Rcx)), (0x9001, 0));
    assert_eq!(t.limited(&mut cpu), None);
    // Only what the address size counts with.
    let short = StringIo {
        address_size: 2,
        ..INS
    };
    let mut cpu = TestCpu::long().with(Rdi, 0x9000).with(Rcx, 0x1_0002);
    let t = short.prepare(&mut cpu, &mut memory, 1024).unwrap().unwrap();
    assert_eq!(t.count(), 2);
    let mut cpu = TestCpu::long().with(Rdi, 0x9000).with(Rcx, 0x1_0000);
    assert_eq!(t.limited(&mut cpu), None);
}
