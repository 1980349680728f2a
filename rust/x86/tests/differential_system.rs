// SPDX-License-Identifier: GPL-2.0

//! System instructions against this machine's processor, as far as user mode can execute them: what it may ask of descriptors, which
//! selectors it may load, where it may jump and return to, and every fault with its error code.
//!
//! The emulator gets a GDT that is made of what LAR and LSL say of the kernel's, and the LDT that the test has made.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;
#[allow(dead_code)]
#[path = "differential/native.rs"]
mod native;

use common::system::descriptor;
use common::system::flat;
use common::system::gate;
use common::system::loaded;
use common::TestCpu;
use common::TestMemory;
use native::State;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::emulate::TableReg;
use rkvm_x86::event::Shadow;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegReg;
use std::arch::asm;

const CODE: u64 = 0xa0000;
const DATA: u64 = 0xa8000;
const LEN: usize = 0x1000;
const AT: u64 = CODE + 0x400;
const STACK: u64 = DATA + 0x800;

const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const LDT: u64 = 0x5000;
const TSS: u64 = 0x6000;

/// Selectors of Linux.
const WIDE: u16 = 0x33;
const NARROW: u16 = 0x23;
const FLAT: u16 = 0x2b;
/// The last of [`ENTRIES`].
const SHORT: u16 = (6 << 3) | 7;

/// The descriptors of the LDT: what modify_ldt(2) is told (limit in bytes), and the access byte and the flags that it makes of it.
const ENTRIES: [(u32, u8, u8); 7] = [
    // Data, 32 bits.
    (1, 0xf3, 4),
    // Read-only data.
    (1 | (1 << 3), 0xf1, 4),
    // Expand-down.
    (1 | (1 << 1), 0xf7, 4),
    // Readable code, 32 bits.
    (1 | (2 << 1), 0xfb, 4),
    // Code that cannot be read.
    (1 | (2 << 1) | (1 << 3), 0xf9, 4),
    // Not present.
    (1 | (1 << 5), 0x73, 4),
    // Readable code, 16 bits.
    (2 << 1, 0xfb, 0),
];
const LIMIT: u32 = 0xf_fff0;

/// What LAR and LSL say of a selector.
fn ask(selector: u16) -> Option<(u32, u32)> {
    let (rights, limit, known): (u32, u32, u8);
    // SAFETY: Questions have no effect.
    unsafe {
        asm!(
            "lar {rights:e}, {selector:e}",
            "setz {known}",
            "lsl {limit:e}, {selector:e}",
            selector = in(reg) u32::from(selector),
            rights = out(reg) rights,
            limit = out(reg) limit,
            known = out(reg_byte) known,
        );
    }
    (known != 0).then_some((rights, limit))
}

fn make_ldt() -> bool {
    (0u32..).zip(ENTRIES).all(|(entry, (flags, ..))| {
        let user_desc = [entry, 0, LIMIT, flags];
        // SAFETY: The structure is four words, and these segments are nobody's.
        unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &user_desc, 16) == 0 }
    })
}

/// The tables that the processor has, in the emulator's memory.
fn tables(memory: &mut TestMemory) {
    // Those that user mode cannot see are the kernel's.
    for (selector, entry) in [
        (0x08, flat(0x9b, 0xc)),
        (0x10, flat(0x9b, 0xa)),
        (0x18, flat(0x93, 0xc)),
        (0x40, descriptor(0, 0x67, 0x8b, 0)),
        (0x50, descriptor(LDT as u32, 0xfff, 0x82, 0)),
    ] {
        memory.put64(GDT + selector, entry);
    }
    for selector in (0..0x80).step_by(8) {
        if let Some((rights, limit)) = ask(selector | 3) {
            let paged = rights & (1 << 23) != 0;
            let limit = if paged { limit >> 12 } else { limit };
            let access = (rights >> 8) as u8;
            let entry = descriptor(0, limit, access, (rights >> 20) as u8 & 15);
            memory.put64(GDT + u64::from(selector), entry);
        }
    }
    for (i, (_, access, flags)) in (0u64..).zip(ENTRIES) {
        memory.put64(LDT + 8 * i, descriptor(0, LIMIT, access, flags));
    }
    // No port is permitted.
    memory.put(TSS + 0x66, &[0x68, 0]);
    for vector in 0..256 {
        memory.put64(IDT + 16 * vector, gate(0x10, 0, 0x8e, 0));
    }
}

fn processor(memory: &TestMemory, cs: u16) -> TestCpu {
    let mut cpu = TestCpu::long();
    let entry = |selector: u16| {
        let table = if selector & 4 == 0 { GDT } else { LDT };
        memory.get64(table + u64::from(selector & !7))
    };
    cpu.cpl = 3;
    cpu.cr0 |= Cr0::AM | Cr0::NE | Cr0::MP;
    cpu.rip = AT;
    cpu.gdtr = TableReg {
        base: GDT,
        limit: 0x7f,
    };
    cpu.idtr = TableReg {
        base: IDT,
        limit: 0xfff,
    };
    *cpu.seg(SegReg::Cs) = loaded(cs, entry(cs));
    for reg in [SegReg::Ss, SegReg::Ds, SegReg::Es] {
        *cpu.seg(reg) = loaded(FLAT, entry(FLAT));
    }
    *cpu.seg(SegReg::Tr) = loaded(0x40, descriptor(TSS as u32, 0x67, 0x8b, 0));
    *cpu.seg(SegReg::Ldtr) = loaded(
        0x50,
        descriptor(LDT as u32, 8 * ENTRIES.len() as u32 - 1, 0x82, 0),
    );
    cpu
}

/// Both, in the same state.
struct Bench {
    memory: TestMemory,
    compared: u32,
    completed: u32,
}

fn native_bytes(address: u64, bytes: &[u8]) {
    // SAFETY: `main` has mapped the pages, and they are written by nobody else now.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
}

impl Bench {
    /// Executes one instruction in the code segment, RAX and what is on the stack given. RBX leads to the stack as well.
    fn compare(&mut self, cs: u16, code: &[u8], rax: u64, stack: &[u8]) {
        let mut cpu = processor(&self.memory, cs);
        cpu.gprs.set(Gpr::Rax, rax);
        cpu.gprs.set(Gpr::Rcx, 0x7777_7777);
        cpu.gprs.set(Gpr::Rdx, 0x80);
        cpu.gprs.set(Gpr::Rbx, STACK);
        cpu.gprs.set(Gpr::Rsp, STACK);
        cpu.rflags = Rflags::FIXED | Rflags::IF | Rflags::TF;
        cpu.rflags |= native::flags() & (Rflags::ID | Rflags::NT);
        let mut page = [0; LEN];
        page[(STACK - DATA) as usize..][..stack.len()].copy_from_slice(stack);
        let mut padded = [0x90; 15];
        padded[..code.len()].copy_from_slice(code);
        self.memory.put(DATA, &page);
        self.memory.put(AT, &padded);
        native_bytes(DATA, &page);
        native_bytes(AT, &padded);
        let before = cpu.clone();
        let what = || format!("{code:02x?} in {cs:#x} with {rax:#x}, stack {stack:02x?}");
        let outcome = Emulator::new().step(&mut cpu, &mut self.memory);
        if matches!(outcome, Outcome::Done(done) if done.shadow != Shadow::None) {
            // There is no trap right after a load of SS.
            return;
        }
        let mut real = State {
            gprs: *before.gprs.as_array(),
            rip: AT,
            rflags: before.rflags.bits(),
            cs,
            ss: FLAT,
            mxcsr: 0x1f80,
            control: 0x37f,
            ..State::default()
        };
        // SAFETY: `main` has prepared this thread. The cases use the two pages, and make no system call.
        unsafe { native::run(&mut real, FLAT) };
        match outcome {
            Outcome::Done(_) => {
                assert_eq!(real.vector, 1, "error {:#x}: {}", real.error, what());
                self.completed += 1;
            }
            Outcome::Fault(fault) => {
                let got = (real.vector, real.error);
                assert_eq!(
                    (fault.vector.0, fault.error.unwrap_or(0)),
                    got,
                    "{}",
                    what()
                );
                assert_eq!(cpu, before);
            }
            other => panic!("{other:?}: {}", what()),
        }
        let width = if cpu.rip == before.rip || cs == WIDE {
            u64::MAX
        } else {
            0xffff_ffff
        };
        for r in Gpr::ALL.into_iter().take(8) {
            let native = real.gprs[usize::from(r.number())];
            assert_eq!(cpu.get(r) & width, native & width, "{r:?}: {}", what());
        }
        assert_eq!(cpu.rip, real.rip, "{}", what());
        let now = (cpu.seg(SegReg::Cs).selector, cpu.seg(SegReg::Ss).selector);
        assert_eq!(now, (real.cs, real.ss), "{}", what());
        let zf = (cpu.rflags & Rflags::ZF).bits();
        assert_eq!(zf, real.rflags & Rflags::ZF.bits(), "{}", what());
        let mut native = [0; LEN];
        // SAFETY: As in `native_bytes`.
        unsafe { std::ptr::copy_nonoverlapping(DATA as *const u8, native.as_mut_ptr(), LEN) };
        assert_eq!(
            self.memory.ram[DATA as usize..][..LEN],
            native,
            "{}",
            what()
        );
        self.compared += 1;
    }
}

/// All selectors of both tables, and beyond them; but for the one whose limit is the number of the CPU.
fn selectors() -> impl Iterator<Item = u16> {
    (0..0x90)
        .chain((0..0x80).map(|s| s | 0x1_00))
        .chain([0x7fff, 0xffff])
        .filter(|s| !(0x78..0x80).contains(s) || s & 4 != 0)
}

fn words(values: &[u64], size: usize) -> Vec<u8> {
    let each = values.iter().flat_map(|v| v.to_le_bytes()[..size].to_vec());
    each.collect()
}

/// LAR, LSL, VERR, VERW, MOV to ES and SS of every selector.
fn questions(bench: &mut Bench) {
    for cs in [WIDE, NARROW, SHORT] {
        for selector in selectors() {
            for code in [
                &[0x0f, 0x02, 0xc8][..],
                &[0x66, 0x0f, 0x02, 0xc8],
                &[0x0f, 0x03, 0xc8],
                &[0x0f, 0x00, 0xe0],
                &[0x0f, 0x00, 0xe8],
                &[0x8e, 0xc0],
                &[0x8e, 0xd0],
            ] {
                bench.compare(cs, code, selector.into(), &[]);
            }
        }
    }
}

/// Far JMP, CALL and RET, and IRET, with every selector.
fn transfers(bench: &mut Bench) {
    for selector in selectors() {
        let target = AT + 8;
        let pointer = words(&[target, selector.into()], 4);
        for code in [&[0xff, 0x2b][..], &[0xff, 0x1b]] {
            bench.compare(WIDE, code, 0, &pointer);
            bench.compare(NARROW, code, 0, &pointer);
        }
        let mut direct = vec![0xea];
        direct.extend((target as u32).to_le_bytes());
        direct.extend(selector.to_le_bytes());
        bench.compare(NARROW, &direct, 0, &[]);
        direct[0] = 0x9a;
        bench.compare(NARROW, &direct, 0, &[]);
        // The same in 16-bit code, with prefixes for operands and addresses of 32 bits.
        for code in [&[0x66, 0x67, 0xff, 0x2b][..], &[0x66, 0x67, 0xff, 0x1b]] {
            bench.compare(SHORT, code, 0, &pointer);
        }
        direct.insert(0, 0x66);
        bench.compare(SHORT, &direct, 0, &[]);
        // IRET leaves the trap flag set.
        let frame = [target, selector.into(), 0x302, STACK, FLAT.into()];
        bench.compare(NARROW, &[0xcb], 0, &words(&frame[..2], 4));
        bench.compare(NARROW, &[0xcf], 0, &words(&frame[..3], 4));
        bench.compare(SHORT, &[0x66, 0xcb], 0, &words(&frame[..2], 4));
        bench.compare(SHORT, &[0x66, 0xcf], 0, &words(&frame[..3], 4));
        // Frames of words lead below 64 KiB.
        let short = [target, selector.into(), 0x302];
        bench.compare(SHORT, &[0xcb], 0, &words(&short[..2], 2));
        bench.compare(SHORT, &[0xcf], 0, &words(&short, 2));
        bench.compare(WIDE, &[0x48, 0xcb], 0, &words(&frame[..2], 8));
        bench.compare(WIDE, &[0x48, 0xcf], 0, &words(&frame, 8));
        bench.compare(WIDE, &[0xcf], 0, &words(&frame, 4));
        // The same for the stack.
        let frame = [target, WIDE.into(), 0x302, STACK, selector.into()];
        if selector & 4 == 0 {
            bench.compare(WIDE, &[0x48, 0xcf], 0, &words(&frame, 8));
        }
    }
}

/// What user mode must not do, and what there is not in a mode.
fn refused(bench: &mut Bench) {
    for code in [
        &[0x0f, 0x01, 0x13][..],
        &[0x0f, 0x01, 0x1b],
        &[0x0f, 0x00, 0xd0],
        &[0x0f, 0x00, 0xd8],
        &[0x0f, 0x01, 0xf0],
        &[0x0f, 0x06],
        &[0x0f, 0x20, 0xc0],
        &[0x0f, 0x20, 0xc8],
        &[0x0f, 0x22, 0xc0],
        &[0x0f, 0x22, 0xe8],
        &[0x0f, 0x21, 0xc0],
        &[0x0f, 0x23, 0xf8],
        &[0x0f, 0x01, 0x3b],
        &[0x0f, 0x30],
        &[0x0f, 0x32],
        &[0x0f, 0x08],
        &[0x0f, 0x09],
        &[0x0f, 0x01, 0xf8],
        &[0xf4],
        &[0xfa],
        &[0xfb],
        &[0xe4, 0x80],
        &[0xe7, 0x80],
        &[0xec],
        &[0xef],
        &[0x6c],
        &[0x6f],
        &[0x8e, 0xc8],
        &[0x8e, 0xf0],
        &[0x06],
        &[0x07],
        &[0x17],
        &[0xce],
    ] {
        bench.compare(WIDE, code, 0x23, &words(&[0x80, 0], 8));
        bench.compare(NARROW, code, 0x23, &words(&[0x80, 0], 8));
        bench.compare(SHORT, code, 0x23, &words(&[0x80, 0], 8));
    }
    // All but what the kernel lets user mode have: INT3, INTO, and the system call.
    for vector in (0x20..=255).filter(|v| *v != 0x80) {
        bench.compare(WIDE, &[0xcd, vector], 0, &[]);
        bench.compare(NARROW, &[0xcd, vector], 0, &[]);
    }
}

/// LES, LSS and POP with every selector; ARPL.
fn legacy(bench: &mut Bench) {
    for selector in selectors() {
        bench.compare(
            NARROW,
            &[0xc4, 0x0b],
            0,
            &words(&[0x1234_5678, selector.into()], 4),
        );
        bench.compare(NARROW, &[0x07], 0, &words(&[selector.into()], 4));
        bench.compare(SHORT, &[0x07], 0, &words(&[selector.into()], 2));
        bench.compare(SHORT, &[0x66, 0x07], 0, &words(&[selector.into()], 4));
        bench.compare(
            SHORT,
            &[0x67, 0xc5, 0x0b],
            0,
            &words(&[0x1234, selector.into()], 2),
        );
        bench.compare(NARROW, &[0x63, 0xc1], selector.into(), &[]);
        bench.compare(NARROW, &[0x63, 0x03], selector.into(), &words(&[0x51], 4));
    }
}

#[test]
fn the_processor_agrees() {
    if !make_ldt() {
        println!("the kernel makes no LDT");
        return;
    }
    native::map(CODE, LEN, true);
    native::map(DATA, LEN, false);
    native::prepare();
    let mut bench = Bench {
        memory: TestMemory::default(),
        compared: 0,
        completed: 0,
    };
    tables(&mut bench.memory);
    questions(&mut bench);
    transfers(&mut bench);
    refused(&mut bench);
    legacy(&mut bench);
    println!("{} compared, {} completed", bench.compared, bench.completed);
    assert!(bench.compared > 5000 && bench.completed > 2000);
}
