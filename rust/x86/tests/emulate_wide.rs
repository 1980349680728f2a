// SPDX-License-Identifier: GPL-2.0

//! Instructions with more than eight bytes of memory, or with several operands there: vectors, stack frames, CMPXCHG16B.

mod common;

use common::*;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::exception::Fault;
use rkvm_x86::exception::Vector;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Gpr::*;
use rkvm_x86::regs::Rflags;

fn fault(vector: Vector) -> Outcome<Lost> {
    Outcome::Fault(Fault {
        vector,
        error: None,
        cr2: None,
    })
}

fn cpu() -> TestCpu {
    let mut cpu = TestCpu::long().with(Rdi, DEVICE);
    cpu.fpu.ymm[1] = [0x1111, 0x2222, 0x3333, 0x4444];
    cpu
}

#[test]
fn vectors_go_in_pieces_of_eight() {
    let mut memory = TestMemory::default();
    let mut cpu = cpu();
    // MOVUPS [RDI], XMM1.
    let (end, bus) = exec(&mut cpu, &mut memory, "0f110f", &[]);
    assert_eq!(end, DONE);
    assert_eq!(bus, [wr(DEVICE, 8, 0x1111), wr(DEVICE + 8, 8, 0x2222)]);
    // MOVUPS XMM1, [RDI]: what is above stays.
    let (end, bus) = exec(&mut cpu, &mut memory, "0f100f", &[5, 6]);
    assert_eq!(end, DONE);
    assert_eq!(bus, [rd(DEVICE, 8), rd(DEVICE + 8, 8)]);
    assert_eq!(cpu.fpu.ymm[1], [5, 6, 0x3333, 0x4444]);
    // VMOVUPS XMM1, [RDI]: it does not.
    exec(&mut cpu, &mut memory, "c5f8100f", &[7, 8]);
    assert_eq!(cpu.fpu.ymm[1], [7, 8, 0, 0]);
    // VMOVUPS YMM1, [RDI].
    let (end, bus) = exec(&mut cpu, &mut memory, "c5fc100f", &[1, 2, 3, 4]);
    assert_eq!((end, bus.len()), (DONE, 4));
    assert_eq!(cpu.fpu.ymm[1], [1, 2, 3, 4]);
}

#[test]
fn a_vector_across_memory_and_a_device() {
    let mut memory = TestMemory::default();
    let mut cpu = cpu().with(Rdi, DEVICE - 4);
    // VMOVUPS [RDI], YMM1.
    let (end, bus) = exec(&mut cpu, &mut memory, "c5fc110f", &[]);
    assert_eq!(end, DONE);
    assert_eq!(memory.get32(DEVICE - 4), 0x1111);
    assert_eq!(
        bus,
        [
            wr(DEVICE, 4, 0),
            wr(DEVICE + 4, 8, 0x2222),
            wr(DEVICE + 12, 8, 0x3333),
            wr(DEVICE + 20, 8, 0x4444),
        ]
    );
    // VMOVUPS YMM1, [RDI]: no register changes before the last piece has come.
    memory.put(CODE, &hex("c5fc100f"));
    cpu.rip = CODE;
    let before = cpu.clone();
    let mut emulator = Emulator::new();
    for (i, (gpa, len)) in [
        (DEVICE, 4),
        (DEVICE + 4, 8),
        (DEVICE + 12, 8),
        (DEVICE + 20, 8),
    ]
    .into_iter()
    .enumerate()
    {
        let outcome = emulator.step(&mut cpu, &mut memory);
        assert_eq!(outcome, Outcome::MmioRead { gpa, len });
        assert_eq!(cpu, before);
        emulator.complete_read([i as u8; 8]);
    }
    assert_eq!(emulator.step(&mut cpu, &mut memory), DONE);
    assert_eq!(cpu.fpu.ymm[1][0], 0x1111);
    assert_eq!(cpu.fpu.ymm[1][3], 0x0303_0303_0303_0303);
}

#[test]
fn what_is_switched_off_is_not_executed() {
    let mut memory = TestMemory::default();
    let check = |memory: &mut TestMemory, code, vector, change: fn(&mut TestCpu)| {
        let mut cpu = cpu();
        change(&mut cpu);
        let before = cpu.clone();
        let (end, bus) = exec(&mut cpu, memory, code, &[]);
        assert_eq!(end, fault(vector), "{code}");
        assert!(bus.is_empty());
        assert_eq!(cpu.gprs, before.gprs);
    };
    let (sse, avx, mmx) = ("0f110f", "c5fc110f", "0f7f0f");
    let (fnstcw, fldcw) = ("d93f", "d92f");
    for code in [sse, avx, mmx, fnstcw, "0fae1f"] {
        check(&mut memory, code, Vector::NM, |cpu| cpu.cr0 |= Cr0::TS);
    }
    for code in [sse, mmx] {
        check(&mut memory, code, Vector::UD, |cpu| cpu.cr0 |= Cr0::EM);
    }
    check(&mut memory, fnstcw, Vector::NM, |cpu| cpu.cr0 |= Cr0::EM);
    check(&mut memory, sse, Vector::UD, |cpu| {
        cpu.cr4 = cpu.cr4.without(Cr4::OSFXSR);
    });
    check(&mut memory, avx, Vector::UD, |cpu| {
        cpu.cr4 = cpu.cr4.without(Cr4::OSXSAVE);
    });
    check(&mut memory, avx, Vector::UD, |cpu| cpu.fpu.xcr0 = 3);
    for code in [mmx, fldcw, "9b"] {
        check(&mut memory, code, Vector::MF, |cpu| {
            cpu.cr0 |= Cr0::NE;
            cpu.fpu.status = 0x8081;
        });
    }
    // FWAIT looks at TS only with MP.
    check(&mut memory, "9b", Vector::NM, |cpu| {
        cpu.cr0 |= Cr0::TS | Cr0::MP;
    });
}

#[test]
fn aligned_moves_of_what_is_not_aligned() {
    let mut memory = TestMemory::default();
    for code in [
        "0f284f08",
        "0f294f08",
        "660f6f4f08",
        "c5fd6f4f10",
        "660fe74f08",
    ] {
        let mut cpu = cpu();
        let (end, bus) = exec(&mut cpu, &mut memory, code, &[]);
        assert_eq!(
            (end, bus.len()),
            (Outcome::Fault(Fault::gp(0)), 0),
            "{code}"
        );
    }
}

/// A page fault in the last piece comes before anything is asked of the device.
#[test]
fn no_access_before_a_fault() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::protected().with(Rdi, DEVICE);
    cpu.cr4 |= Cr4::OSFXSR;
    cpu.seg(rkvm_x86::segment::SegReg::Ds).limit = DEVICE as u32 + 14;
    let (end, bus) = exec(&mut cpu, &mut memory, "0f100f", &[]);
    assert_eq!((end, bus.len()), (Outcome::Fault(Fault::gp(0)), 0));
}

#[test]
fn compare_exchange_of_sixteen_bytes() {
    let mut memory = TestMemory::default();
    // LOCK CMPXCHG16B [RDI].
    let code = "f0480fc70f";
    let equal = cpu().with(Rax, 1).with(Rdx, 2).with(Rbx, 3).with(Rcx, 4);
    let mut cpu = equal.clone();
    let (end, bus) = exec(&mut cpu, &mut memory, code, &[1, 2]);
    assert_eq!(end, DONE);
    assert_eq!(bus[..2], [rd(DEVICE, 8), rd(DEVICE + 8, 8)]);
    assert_eq!(bus[2..], [wr(DEVICE, 8, 3), wr(DEVICE + 8, 8, 4)]);
    assert!(cpu.rflags.has(Rflags::ZF));
    let mut cpu = equal.clone();
    let (end, bus) = exec(&mut cpu, &mut memory, code, &[1, 7]);
    assert_eq!(end, DONE);
    assert_eq!(bus[2..], [wr(DEVICE, 8, 1), wr(DEVICE + 8, 8, 7)]);
    assert_eq!((cpu.get(Rax), cpu.get(Rdx)), (1, 7));
    assert!(!cpu.rflags.has(Rflags::ZF));
    let mut cpu = equal.with(Rdi, DEVICE + 8);
    let (end, bus) = exec(&mut cpu, &mut memory, code, &[]);
    assert_eq!((end, bus.len()), (Outcome::Fault(Fault::gp(0)), 0));
}

/// PUSHA and POPA: eight accesses, in the order of the processor's.
#[test]
fn all_registers_on_a_device() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::protected().with(Rsp, DEVICE + 0x100);
    for (i, r) in [Rax, Rcx, Rdx, Rbx].into_iter().enumerate() {
        cpu.gprs.set(r, i as u64 + 1);
    }
    let (end, bus) = exec(&mut cpu, &mut memory, "60", &[]);
    assert_eq!((end, bus.len()), (DONE, 8));
    assert_eq!(bus[0], wr(DEVICE + 0xfc, 4, 1));
    assert_eq!(bus[4], wr(DEVICE + 0xec, 4, DEVICE + 0x100));
    assert_eq!(cpu.get(Rsp), DEVICE + 0xe0);
    let (end, bus) = exec(&mut cpu, &mut memory, "61", &[8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!((end, bus.len()), (DONE, 8));
    assert_eq!((cpu.get(Rdi), cpu.get(Rax)), (8, 1));
    assert_eq!(cpu.get(Rsp), DEVICE + 0x100);
}

/// CALL through a device, to a stack on it.
#[test]
fn a_call_of_devices() {
    let mut memory = TestMemory::default();
    let mut cpu = cpu().with(Rsp, DEVICE + 0x800);
    let (end, bus) = exec(&mut cpu, &mut memory, "ff17", &[0x1234]);
    assert_eq!(end, DONE);
    assert_eq!(bus, [rd(DEVICE, 8), wr(DEVICE + 0x7f8, 8, CODE + 2)]);
    assert_eq!(cpu.rip, 0x1234);
    // To where no code can be: the stack stays.
    let mut cpu = self::cpu().with(Rsp, DEVICE + 0x800);
    let (end, bus) = exec(&mut cpu, &mut memory, "ff17", &[1 << 60]);
    assert_eq!((end, bus.len()), (Outcome::Fault(Fault::gp(0)), 1));
    assert_eq!(cpu.get(Rsp), DEVICE + 0x800);
}

/// MASKMOVDQU writes the bytes that it is to, and no others.
#[test]
fn masked_bytes() {
    let mut memory = TestMemory::default();
    let mut cpu = cpu();
    cpu.fpu.ymm[2] = [0x8000_8080_0000_0080, 0x8080_8080_8080_8080, 0, 0];
    cpu.fpu.ymm[1] = [0x1716_1514_1312_1110, 0x2726_2524_2322_2120, 0, 0];
    let (end, bus) = exec(&mut cpu, &mut memory, "660ff7ca", &[]);
    assert_eq!(end, DONE);
    assert_eq!(
        bus,
        [
            wr(DEVICE, 1, 0x10),
            wr(DEVICE + 4, 2, 0x1514),
            wr(DEVICE + 7, 8, 0x2625_2423_2221_2017),
            wr(DEVICE + 15, 1, 0x27),
        ]
    );
}
