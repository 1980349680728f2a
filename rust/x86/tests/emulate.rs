// SPDX-License-Identifier: GPL-2.0

//! The emulator: device accesses, their order and their splitting, restarts, faults, string instructions.

mod common;

use common::*;
use rkvm_x86::emulate::Completion;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Gpr::*;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;

/// An instruction in 64-bit mode with RDI at the device: what it ended with.
fn device(code: &str, rax: u64, answers: &[u64]) -> (TestCpu, Vec<Bus>) {
    let mut cpu = TestCpu::long().with(Rdi, DEVICE).with(Rax, rax);
    let mut memory = TestMemory::default();
    let (outcome, bus) = exec(&mut cpu, &mut memory, code, answers);
    assert_eq!(outcome, DONE, "{code}");
    assert_eq!(cpu.rip, CODE + hex(code).len() as u64, "{code}");
    (cpu, bus)
}

#[test]
fn loads_of_every_width() {
    let old = 0x1111_2222_3333_4444;
    let answer = 0xf1f2_f3f4_f5f6_f7f8;
    for (code, len, rax) in [
        ("8a07", 1, 0x1111_2222_3333_44f8),
        ("8a27", 1, 0x1111_2222_3333_f844),
        ("668b07", 2, 0x1111_2222_3333_f7f8),
        ("8b07", 4, 0xf5f6_f7f8),
        ("488b07", 8, answer),
        ("0fb607", 1, 0xf8),
        ("660fb607", 1, 0x1111_2222_3333_00f8),
        ("480fb607", 1, 0xf8),
        ("0fb707", 2, 0xf7f8),
        ("480fb707", 2, 0xf7f8),
        ("0fbe07", 1, 0xffff_fff8),
        ("660fbe07", 1, 0x1111_2222_3333_fff8),
        ("480fbe07", 1, 0xffff_ffff_ffff_fff8),
        ("0fbf07", 2, 0xffff_f7f8),
        ("480fbf07", 2, 0xffff_ffff_ffff_f7f8),
        ("486307", 4, 0xffff_ffff_f5f6_f7f8),
        ("6307", 4, 0xf5f6_f7f8),
        ("0f38f007", 4, 0xf8f7_f6f5),
        ("660f38f007", 2, 0x1111_2222_3333_f8f7),
        ("480f38f007", 8, 0xf8f7_f6f5_f4f3_f2f1),
        ("a00000100000000000", 1, 0x1111_2222_3333_44f8),
        ("a10000100000000000", 4, 0xf5f6_f7f8),
        ("48a10000100000000000", 8, answer),
    ] {
        let (cpu, bus) = device(code, old, &[answer]);
        assert_eq!(bus, [rd(DEVICE, len)], "{code}");
        assert_eq!(cpu.get(Rax), rax, "{code}: {:#x}", cpu.get(Rax));
        assert_eq!(cpu.rflags, Rflags::FIXED);
    }
}

#[test]
fn stores_of_every_width() {
    let rax = 0xf1f2_f3f4_f5f6_f7f8;
    for (code, len, data) in [
        ("8807", 1, 0xf8),
        ("8827", 1, 0xf7),
        ("668907", 2, 0xf7f8),
        ("8907", 4, 0xf5f6_f7f8),
        ("488907", 8, rax),
        ("0fc307", 4, 0xf5f6_f7f8),
        ("480fc307", 8, rax),
        ("c6075a", 1, 0x5a),
        ("66c7075aa5", 2, 0xa55a),
        ("c707785634f2", 4, 0xf234_5678),
        ("48c707785634f2", 8, 0xffff_ffff_f234_5678),
        ("0f38f107", 4, 0xf8f7_f6f5),
        ("480f38f107", 8, 0xf8f7_f6f5_f4f3_f2f1),
        ("a20000100000000000", 1, 0xf8),
        ("48a30000100000000000", 8, rax),
        ("8c1f", 2, 8),
        ("0f9407", 1, 0),
        ("0f9507", 1, 1),
    ] {
        let (cpu, bus) = device(code, rax, &[]);
        assert_eq!(bus, [wr(DEVICE, len, data)], "{code}");
        assert_eq!(cpu.get(Rax), rax);
    }
}

#[test]
fn read_modify_write() {
    let cf = Rflags::CF;
    let zf_pf = Rflags::ZF | Rflags::PF;
    for (code, rax, read, written, flags) in [
        ("0107", 1, 0x41, 0x42, Rflags::PF),
        ("0107", 1, 0xffff_ffff, 0, cf | zf_pf | Rflags::AF),
        ("0907", 0x80, 1, 0x81, Rflags::PF),
        ("2107", 0xf0, 0x0f, 0, zf_pf),
        (
            "2907",
            1,
            0,
            0xffff_ffff,
            cf | Rflags::AF | Rflags::SF | Rflags::PF,
        ),
        ("3107", 0xff, 0xff, 0, zf_pf),
        ("f717", 0, 0x0f, 0xffff_fff0, Rflags::empty()),
        (
            "f71f",
            0,
            1,
            0xffff_ffff,
            cf | Rflags::AF | Rflags::SF | Rflags::PF,
        ),
        (
            "ff07",
            0,
            0x7fff_ffff,
            0x8000_0000,
            Rflags::OF | Rflags::SF | Rflags::AF | Rflags::PF,
        ),
        ("ff0f", 0, 1, 0, zf_pf),
        ("830f01", 0, 0x10, 0x11, Rflags::PF),
        ("f00fba2f05", 0, 0, 0x20, Rflags::empty()),
        ("0fba3705", 0, 0x20, 0, cf),
        ("0fba3f00", 0, 1, 0, cf),
        ("c12704", 0, 0x0123_4567, 0x1234_5670, Rflags::empty()),
        ("d12f", 0, 3, 1, cf),
    ] {
        let (cpu, bus) = device(code, rax, &[read]);
        assert_eq!(bus, [rd(DEVICE, 4), wr(DEVICE, 4, written)], "{code}");
        assert_eq!(cpu.rflags, flags | Rflags::FIXED, "{code}");
    }
    // These only look.
    for code in [
        "3907",
        "3b07",
        "8507",
        "833f01",
        "f70701000000",
        "0fba2705",
        "0fa307",
    ] {
        let (_, bus) = device(code, 1, &[1]);
        assert_eq!(bus, [rd(DEVICE, 4)], "{code}");
    }
}

#[test]
fn exchange() {
    let (cpu, bus) = device("8707", 0x1_0000_0005, &[7]);
    assert_eq!(bus, [rd(DEVICE, 4), wr(DEVICE, 4, 5)]);
    assert_eq!(cpu.get(Rax), 7);

    let (cpu, bus) = device("f00fc107", 5, &[7]);
    assert_eq!(bus, [rd(DEVICE, 4), wr(DEVICE, 4, 12)]);
    assert_eq!(cpu.get(Rax), 7);

    // CMPXCHG writes either way.
    let mut memory = TestMemory::default();
    for (rax, read, written, rax_after, equal) in [(7, 7, 9, 7, true), (8, 7, 7, 7, false)] {
        let mut cpu = TestCpu::long()
            .with(Rdi, DEVICE)
            .with(Rax, rax)
            .with(Rcx, 9);
        let (outcome, bus) = exec(&mut cpu, &mut memory, "f00fb10f", &[read]);
        assert_eq!(outcome, DONE);
        assert_eq!(bus, [rd(DEVICE, 4), wr(DEVICE, 4, written)]);
        assert_eq!(cpu.get(Rax), rax_after);
        assert_eq!(cpu.rflags.has(Rflags::ZF), equal);
    }
}

#[test]
fn compare_exchange_8b() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long().with(Rdi, 0x8000).with(Rbx, 3).with(Rcx, 4);
    memory.put64(0x8000, 0x2_0000_0001);
    assert_eq!(exec(&mut cpu, &mut memory, "f00fc70f", &[]).0, DONE);
    assert!(!cpu.rflags.has(Rflags::ZF));
    assert_eq!((cpu.get(Rdx), cpu.get(Rax)), (2, 1));
    assert_eq!(exec(&mut cpu, &mut memory, "f00fc70f", &[]).0, DONE);
    assert!(cpu.rflags.has(Rflags::ZF));
    assert_eq!(memory.get64(0x8000), 0x4_0000_0003);
}

#[test]
fn conditional_moves_always_read() {
    for (flags, rax) in [(Rflags::empty(), 0x3333_4444), (Rflags::ZF, 9)] {
        let mut cpu = TestCpu::long()
            .with(Rdi, DEVICE)
            .with(Rax, 0x1111_2222_3333_4444)
            .with_flags(flags);
        let (outcome, bus) = exec(&mut cpu, &mut TestMemory::default(), "0f4407", &[9]);
        assert_eq!((outcome, bus), (DONE, vec![rd(DEVICE, 4)]));
        assert_eq!(cpu.get(Rax), rax);
    }
}

#[test]
fn nothing_changes_before_the_read_returns() {
    let mut cpu = TestCpu::long().with(Rdi, DEVICE).with(Rax, 1);
    cpu.rip = CODE;
    let mut memory = TestMemory::default();
    memory.put(CODE, &hex("0107"));
    let (cpu0, memory0) = (cpu.clone(), memory.clone());
    let mut emulator = Emulator::new();
    for _ in 0..3 {
        // Asked again, it asks again.
        let outcome = emulator.step(&mut cpu, &mut memory);
        assert_eq!(
            outcome,
            Outcome::MmioRead {
                gpa: DEVICE,
                len: 4
            }
        );
        assert!(emulator.in_progress());
    }
    assert_eq!((&cpu, &memory), (&cpu0, &memory0));
    emulator.complete_read([41, 0, 0, 0, 9, 9, 9, 9]);
    let outcome = emulator.step(&mut cpu, &mut memory);
    let data = [42, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        outcome,
        Outcome::MmioWrite {
            gpa: DEVICE,
            data,
            len: 4
        }
    );
    // By the time the write is handed out the instruction is over.
    assert_eq!(cpu.rip, CODE + 2);
    assert!(emulator.in_progress());
    assert_eq!(emulator.step(&mut cpu, &mut memory), DONE);
    assert!(!emulator.in_progress());

    // A value that nobody asked for does nothing.
    emulator.complete_read([1; 8]);
    assert!(!emulator.in_progress());
}

#[test]
fn an_abort_forgets() {
    let mut cpu = TestCpu::long().with(Rdi, DEVICE);
    let mut memory = TestMemory::default();
    memory.put(CODE, &hex("8b07"));
    cpu.rip = CODE;
    let mut emulator = Emulator::new();
    emulator.step(&mut cpu, &mut memory);
    emulator.complete_read([7; 8]);
    emulator.abort();
    assert!(!emulator.in_progress());
    let (outcome, bus) = run_with(&mut emulator, &mut cpu, &mut memory, &[5]);
    assert_eq!((outcome, bus), (DONE, vec![rd(DEVICE, 4)]));
    assert_eq!(cpu.get(Rax), 5);
}

#[test]
fn accesses_split_at_pages() {
    // Five bytes of one device page and three of the next.
    let at = DEVICE + 0xffb;
    let mut cpu = TestCpu::long().with(Rdi, at);
    let mut memory = TestMemory::default();
    let (outcome, bus) = exec(
        &mut cpu,
        &mut memory,
        "488b07",
        &[0x55_4433_2211, 0x88_7766],
    );
    assert_eq!(outcome, DONE);
    assert_eq!(bus, [rd(at, 5), rd(DEVICE + 0x1000, 3)]);
    assert_eq!(cpu.get(Rax), 0x8877_6655_4433_2211);

    let (outcome, bus) = exec(&mut cpu, &mut memory, "488907", &[]);
    assert_eq!(outcome, DONE);
    assert_eq!(
        bus,
        [wr(at, 5, 0x55_4433_2211), wr(DEVICE + 0x1000, 3, 0x88_7766)]
    );

    // The last byte of memory and the first of the device.
    let at = RAM - 1;
    memory.put(at, &[0xaa]);
    let mut cpu = TestCpu::long().with(Rdi, at).with(Rax, 0x0102);
    let (outcome, bus) = exec(&mut cpu, &mut memory, "668b0f", &[0xbb]);
    assert_eq!((outcome, bus), (DONE, vec![rd(DEVICE, 1)]));
    assert_eq!(cpu.get(Rcx), 0xbbaa);
    let (outcome, bus) = exec(&mut cpu, &mut memory, "668907", &[]);
    assert_eq!((outcome, bus), (DONE, vec![wr(DEVICE, 1, 1)]));
    assert_eq!(memory.ram[at as usize], 2);
}

#[test]
fn read_only_memory_is_read_as_memory_and_written_as_a_device() {
    let mut memory = TestMemory {
        rom_page: Some(8),
        ..TestMemory::default()
    };
    memory.put32(0x8000, 40);
    let mut cpu = TestCpu::long().with(Rdi, 0x8000).with(Rax, 2);
    for code in ["0107", "f00107"] {
        let (outcome, bus) = exec(&mut cpu, &mut memory, code, &[]);
        assert_eq!((outcome, bus), (DONE, vec![wr(0x8000, 4, 42)]), "{code}");
        assert_eq!(memory.get32(0x8000), 40);
    }
}

#[test]
fn locked_instructions_compare() {
    let mut memory = TestMemory::default();
    memory.put32(0x8000, 40);
    let mut cpu = TestCpu::long().with(Rdi, 0x8000).with(Rax, 2);
    memory.contention = 3;
    assert_eq!(exec(&mut cpu, &mut memory, "f00107", &[]).0, DONE);
    assert_eq!((memory.get32(0x8000), memory.contention), (42, 0));

    // For ever: the guest is to try again.
    memory.contention = u32::MAX;
    let before = cpu.clone();
    assert_eq!(exec(&mut cpu, &mut memory, "f00107", &[]).0, MORE);
    assert_eq!(cpu.gprs, before.gprs);
    assert_eq!(cpu.rip, CODE);
    // Without LOCK nobody compares; XCHG does always.
    assert_eq!(exec(&mut cpu, &mut memory, "0107", &[]).0, DONE);
    assert_eq!(exec(&mut cpu, &mut memory, "8707", &[]).0, MORE);
    memory.contention = 0;
    // Not aligned: the plain way.
    cpu.gprs.set(Rdi, 0x8ffe);
    assert_eq!(exec(&mut cpu, &mut memory, "f00107", &[]).0, DONE);
    assert_eq!(memory.get32(0x8ffe), 2);
}

#[test]
fn stack_operands() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long().with(Rdi, DEVICE).with(Rsp, 0x9000);
    let (outcome, bus) = exec(&mut cpu, &mut memory, "ff37", &[0x1122_3344_5566_7788]);
    assert_eq!((outcome, bus), (DONE, vec![rd(DEVICE, 8)]));
    assert_eq!(cpu.get(Rsp), 0x8ff8);
    assert_eq!(memory.get64(0x8ff8), 0x1122_3344_5566_7788);
    let (outcome, bus) = exec(&mut cpu, &mut memory, "8f07", &[]);
    assert_eq!(
        (outcome, bus),
        (DONE, vec![wr(DEVICE, 8, 0x1122_3344_5566_7788)])
    );
    assert_eq!(cpu.get(Rsp), 0x9000);

    // POP [RSP+8] has the address after the pop; POP RSP ends with the value.
    memory.put64(0x9000, 77);
    let (outcome, _) = exec(&mut cpu, &mut memory, "8f442408", &[]);
    assert_eq!(outcome, DONE);
    assert_eq!(memory.get64(0x9010), 77);
    cpu.gprs.set(Rsp, 0x9000);
    assert_eq!(exec(&mut cpu, &mut memory, "5c", &[]).0, DONE);
    assert_eq!(cpu.get(Rsp), 77);
    // PUSH RSP stores the value before.
    cpu.gprs.set(Rsp, 0x9000);
    assert_eq!(exec(&mut cpu, &mut memory, "54", &[]).0, DONE);
    assert_eq!(memory.get64(0x8ff8), 0x9000);

    // A 16-bit stack wraps at 64 KiB and keeps the upper half of ESP.
    let mut cpu = TestCpu::protected()
        .with(Rsp, 0xdead_0000)
        .with(Rax, 0x1234_5678);
    *cpu.seg(SegReg::Ss) = Segment::real_mode(0);
    assert_eq!(exec(&mut cpu, &mut memory, "50", &[]).0, DONE);
    assert_eq!(cpu.get(Rsp), 0xdead_fffc);
    assert_eq!(memory.get32(0xfffc), 0x1234_5678);
}

#[test]
fn bit_strings_reach_beyond_the_operand() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::long().with(Rdi, 0x8000);
    for (bit, byte, mask) in [
        (0i64, 0i64, 1u8),
        (39, 4, 0x80),
        (-1, -1, 0x80),
        (-33, -5, 0x80),
        (64, 8, 1),
    ] {
        cpu.gprs.set(Rcx, bit as u64);
        let at = (0x8000 + byte) as usize;
        assert_eq!(exec(&mut cpu, &mut memory, "480fab0f", &[]).0, DONE);
        assert_eq!(memory.ram[at], mask, "{bit}");
        assert!(!cpu.rflags.has(Rflags::CF));
        assert_eq!(exec(&mut cpu, &mut memory, "0fb30f", &[]).0, DONE);
        assert_eq!(memory.ram[at], 0, "{bit}");
        assert!(cpu.rflags.has(Rflags::CF));
    }
    // A constant stays inside.
    assert_eq!(exec(&mut cpu, &mut memory, "0fba2f21", &[]).0, DONE);
    assert_eq!(memory.get64(0x8000), 2);
}

#[test]
fn addresses() {
    let mut memory = TestMemory::default();
    // RIP-relative: from the next instruction, immediate included.
    memory.put32(CODE + 0x10a, 0);
    let mut cpu = TestCpu::long();
    assert_eq!(
        exec(&mut cpu, &mut memory, "c7050001000078563412", &[]).0,
        DONE
    );
    assert_eq!(memory.get32(CODE + 0x10a), 0x1234_5678);
    // FS has a base in 64-bit mode, DS has none.
    cpu.seg(SegReg::Fs).base = 0x8000;
    cpu.seg(SegReg::Ds).base = 0x7000;
    cpu.gprs.set(Rdi, 0x20);
    cpu.gprs.set(Rax, 5);
    assert_eq!(exec(&mut cpu, &mut memory, "648907", &[]).0, DONE);
    assert_eq!(memory.get32(0x8020), 5);
    assert_eq!(exec(&mut cpu, &mut memory, "8907", &[]).0, DONE);
    assert_eq!(memory.get32(0x20), 5);
    // LEA does not care for segments.
    assert_eq!(exec(&mut cpu, &mut memory, "64488d4701", &[]).0, DONE);
    assert_eq!(cpu.get(Rax), 0x21);
    // Real mode: base and a 16-bit offset that wraps.
    let mut cpu = TestCpu::real()
        .with(Rbx, 0x1_fff0)
        .with(Rsi, 0x20)
        .with(Rax, 0xbeef);
    *cpu.seg(SegReg::Ds) = Segment::real_mode(0x800);
    assert_eq!(exec(&mut cpu, &mut memory, "8900", &[]).0, DONE);
    assert_eq!(memory.get32(0x8010), 0xbeef);
    // 32-bit addresses wrap at four gigabytes.
    let mut cpu = TestCpu::protected().with(Rdi, 0xffff_fff0).with(Rax, 0x77);
    assert_eq!(exec(&mut cpu, &mut memory, "894730", &[]).0, DONE);
    assert_eq!(memory.get32(0x20), 0x77);
}

#[test]
fn flags_that_completion_touches() {
    let mut memory = TestMemory::default();
    // RF goes, TF is reported, and each iteration of a repeated instruction traps.
    let mut cpu = TestCpu::long()
        .with(Rdi, DEVICE)
        .with_flags(Rflags::RF | Rflags::TF);
    let (outcome, _) = exec(&mut cpu, &mut memory, "8b07", &[]);
    let traced = |retired| {
        Outcome::Done(Completion {
            retired,
            single_step: true,
            shadow: rkvm_x86::event::Shadow::None,
        })
    };
    assert_eq!(outcome, traced(true));
    assert!(!cpu.rflags.has(Rflags::RF) && cpu.rflags.has(Rflags::TF));
    let mut cpu = TestCpu::long()
        .with(Rdi, 0x8000)
        .with(Rcx, 2)
        .with_flags(Rflags::TF);
    assert_eq!(exec(&mut cpu, &mut memory, "f3aa", &[]).0, traced(false));
    assert_eq!(cpu.get(Rcx), 1);
    assert_eq!(run(&mut cpu, &mut memory, &[]).0, traced(true));
}

#[test]
fn instruction_pointers_wrap() {
    let mut memory = TestMemory::default();
    let mut cpu = TestCpu::protected().with(Rdi, DEVICE);
    // The code segment's base brings the top of the segment into memory.
    cpu.seg(SegReg::Cs).base = 0x2000;
    cpu.rip = 0xffff_fffe;
    memory.put(0x1ffe, &hex("8b07"));
    assert_eq!(run(&mut cpu, &mut memory, &[]).0, DONE);
    assert_eq!(cpu.rip, 0);
}

#[test]
fn every_register_is_reached() {
    let mut memory = TestMemory::default();
    for r in Gpr::ALL {
        let rex = 0x48 | ((r.number() >> 3) << 2);
        let code = [rex, 0x8b, ((r.number() & 7) << 3) | 5, 0, 0, 0x10, 0];
        let mut cpu = TestCpu::long();
        cpu.rip = 0x1000 - 7;
        memory.put(cpu.rip, &code);
        // The displacement leads past the RAM: RIP is 0x1000 then.
        let value = 0x0123_4567_89ab_cdef ^ u64::from(r.number());
        let (outcome, bus) = run(&mut cpu, &mut memory, &[value]);
        assert_eq!((outcome, bus), (DONE, vec![rd(DEVICE + 0x1000, 8)]));
        for other in Gpr::ALL {
            assert_eq!(cpu.get(other), if other == r { value } else { 0 });
        }
    }
}

/// The last instruction is not decoded again, and one that only looks like it is.
#[test]
fn the_same_instruction_again() {
    let mut emulator = Emulator::new();
    let mut memory = TestMemory::default();
    let mut write = |cpu: TestCpu, code: &str, want: Bus| {
        let mut cpu = cpu.with(Rdi, DEVICE).with(Rax, 0x1122_3344_5566_7788);
        memory.put(CODE, &hex(code));
        cpu.rip = CODE;
        let (outcome, bus) = run_with(&mut emulator, &mut cpu, &mut memory, &[]);
        assert_eq!((outcome, bus), (DONE, vec![want]), "{code}");
        cpu.rip - CODE
    };
    let (byte, dword) = (wr(DEVICE, 1, 0x88), wr(DEVICE, 4, 0x5566_7788));
    for _ in 0..3 {
        assert_eq!(write(TestCpu::long(), "c60701 90", wr(DEVICE, 1, 1)), 3);
    }
    // Behind it is what is behind it; an operand that changes is another instruction.
    assert_eq!(write(TestCpu::long(), "c60701 cc", wr(DEVICE, 1, 1)), 3);
    assert_eq!(write(TestCpu::long(), "c60702 cc", wr(DEVICE, 1, 2)), 3);
    assert_eq!(write(TestCpu::long(), "8807", byte), 2);
    assert_eq!(write(TestCpu::long(), "8907", dword), 2);
    // The same bytes in another mode are not the same instruction.
    let code: String = DEVICE.to_le_bytes()[..4]
        .iter()
        .fold("8905".into(), |code, b| format!("{code}{b:02x}"));
    let relative = wr(DEVICE + CODE + 6, 4, 0x5566_7788);
    for _ in 0..2 {
        assert_eq!(write(TestCpu::long(), &code, relative), 6);
        assert_eq!(write(TestCpu::protected(), &code, dword), 6);
    }
}
