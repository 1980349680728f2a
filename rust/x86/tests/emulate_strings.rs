// SPDX-License-Identifier: GPL-2.0

//! The emulator: string instructions, their iterations, pointers and limits.

mod common;

use common::*;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::exception::Fault;
use rkvm_x86::regs::Gpr::*;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegReg;

#[test]
fn rep_movs_to_a_device_goes_element_by_element() {
    let mut memory = TestMemory::default();
    memory.put64(0x8000, 0x4444_4444_3333_3333);
    let mut cpu = TestCpu::long()
        .with(Rsi, 0x8000)
        .with(Rdi, DEVICE)
        .with(Rcx, 2);
    let (outcome, bus) = exec(&mut cpu, &mut memory, "f3a5", &[]);
    assert_eq!((outcome, bus), (MORE, vec![wr(DEVICE, 4, 0x3333_3333)]));
    assert_eq!(
        (cpu.get(Rsi), cpu.get(Rdi), cpu.get(Rcx)),
        (0x8004, DEVICE + 4, 1)
    );
    assert_eq!(cpu.rip, CODE);
    let (outcome, bus) = run(&mut cpu, &mut memory, &[]);
    assert_eq!((outcome, bus), (DONE, vec![wr(DEVICE + 4, 4, 0x4444_4444)]));
    assert_eq!(cpu.get(Rcx), 0);
    assert_eq!(cpu.rip, CODE + 2);

    // From a device, downwards.
    let mut cpu = TestCpu::long()
        .with(Rsi, DEVICE + 8)
        .with(Rdi, 0x8008)
        .with(Rcx, 2)
        .with_flags(Rflags::DF);
    assert_eq!(
        exec(&mut cpu, &mut memory, "f348a5", &[5]),
        (MORE, vec![rd(DEVICE + 8, 8)])
    );
    assert_eq!(
        run(&mut cpu, &mut memory, &[6]),
        (DONE, vec![rd(DEVICE, 8)])
    );
    assert_eq!((memory.get64(0x8008), memory.get64(0x8000)), (5, 6));
    assert_eq!((cpu.get(Rsi), cpu.get(Rdi)), (DEVICE - 8, 0x7ff8));

    // From one device to another.
    let mut cpu = TestCpu::long().with(Rsi, DEVICE).with(Rdi, DEVICE + 0x100);
    assert_eq!(
        exec(&mut cpu, &mut memory, "a4", &[0x5a]),
        (DONE, vec![rd(DEVICE, 1), wr(DEVICE + 0x100, 1, 0x5a)])
    );
}

#[test]
fn rep_in_memory_is_bounded() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long()
        .with(Rdi, 0x10000)
        .with(Rax, 0x77)
        .with(Rcx, 3000);
    let mut steps = 0;
    memory.put(CODE, &hex("f3aa"));
    loop {
        let left = cpu.get(Rcx);
        steps += 1;
        match run(&mut cpu, &mut memory, &[]).0 {
            DONE => break,
            outcome => assert_eq!(outcome, MORE),
        }
        assert!(cpu.get(Rcx) < left);
        assert_eq!(cpu.rip, CODE);
    }
    assert!(steps > 1 && steps < 10);
    assert_eq!(cpu.get(Rcx), 0);
    assert_eq!(cpu.get(Rdi), 0x10000 + 3000);
    assert!(memory.ram[0x10000..][..3000].iter().all(|&b| b == 0x77));
    assert_eq!(memory.ram[0x10000 + 3000], 0);

    // No iteration at all.
    let mut cpu = TestCpu::long().with(Rdi, DEVICE);
    assert_eq!(exec(&mut cpu, &mut memory, "f3aa", &[]), (DONE, vec![]));
    assert_eq!(cpu.get(Rdi), DEVICE);
}

#[test]
fn rep_faults_between_iterations() {
    // Two elements before the limit, the third beyond.
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::protected()
        .with(Rdi, 0x7ff8)
        .with(Rcx, 5)
        .with(Rax, 9);
    cpu.seg(SegReg::Es).limit = 0x7fff;
    let (outcome, _) = exec(&mut cpu, &mut memory, "f3ab", &[]);
    assert_eq!(outcome, Outcome::Fault(Fault::gp(0)));
    assert_eq!((cpu.get(Rdi), cpu.get(Rcx), cpu.rip), (0x8000, 3, CODE));
    assert_eq!(memory.get64(0x7ff8), 0x9_0000_0009);
}

#[test]
fn compares_and_scans() {
    let mut memory = TestMemory::default();
    memory.put(0x8000, b"device");
    memory.put(0x9000, b"devote");
    let mut cpu = TestCpu::long()
        .with(Rsi, 0x8000)
        .with(Rdi, 0x9000)
        .with(Rcx, 6);
    assert_eq!(exec(&mut cpu, &mut memory, "f3a6", &[]).0, DONE);
    assert_eq!((cpu.get(Rcx), cpu.get(Rsi)), (2, 0x8004));
    assert!(
        !cpu.rflags.has(Rflags::ZF) && cpu.rflags.has(Rflags::CF),
        "i is less than o"
    );

    let mut cpu = TestCpu::long()
        .with(Rdi, 0x8000)
        .with(Rcx, 100)
        .with(Rax, u64::from(b'i'));
    assert_eq!(exec(&mut cpu, &mut memory, "f2ae", &[]).0, DONE);
    assert_eq!((cpu.get(Rcx), cpu.get(Rdi)), (96, 0x8004));
    assert!(cpu.rflags.has(Rflags::ZF));

    // Both operands of CMPS on devices: two reads, first the source.
    let mut cpu = TestCpu::long().with(Rsi, DEVICE).with(Rdi, DEVICE + 8);
    let (outcome, bus) = exec(&mut cpu, &mut memory, "48a7", &[3, 3]);
    assert_eq!(
        (outcome, bus),
        (DONE, vec![rd(DEVICE, 8), rd(DEVICE + 8, 8)])
    );
    assert!(cpu.rflags.has(Rflags::ZF));

    let mut cpu = TestCpu::long().with(Rsi, DEVICE).with(Rcx, 2);
    assert_eq!(
        exec(&mut cpu, &mut memory, "f3ac", &[0x41]),
        (MORE, vec![rd(DEVICE, 1)])
    );
    assert_eq!(cpu.get(Rax), 0x41);
}

#[test]
fn address_size_of_strings() {
    let mut memory = TestMemory::default();
    memory.put(0x8000, &[0xab]);
    // 32-bit addresses in 64-bit mode: the upper halves are ignored and then cleared.
    let mut cpu = TestCpu::long()
        .with(Rsi, 0xdead_0000_8000)
        .with(Rdi, 0xbeef_0000_9000)
        .with(Rcx, 0xf_0000_0001);
    assert_eq!(exec(&mut cpu, &mut memory, "67f3a4", &[]).0, DONE);
    assert_eq!(
        (cpu.get(Rsi), cpu.get(Rdi), cpu.get(Rcx)),
        (0x8001, 0x9001, 0)
    );
    assert_eq!(memory.ram[0x9000], 0xab);
    // 16-bit ones: they wrap, and the rest is kept.
    let mut cpu = TestCpu::protected()
        .with(Rsi, 0xdead_8000)
        .with(Rdi, 0xbeef_ffff)
        .with(Rcx, 0x7777_0001);
    assert_eq!(exec(&mut cpu, &mut memory, "67f3a4", &[]).0, DONE);
    assert_eq!(
        (cpu.get(Rsi), cpu.get(Rdi), cpu.get(Rcx)),
        (0xdead_8001, 0xbeef_0000, 0x7777_0000)
    );
}
