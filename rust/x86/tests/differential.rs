// SPDX-License-Identifier: GPL-2.0

//! The emulator against the processor that the test runs on.
//!
//! Instructions are made at random from the opcodes that the decoder knows, with every addressing form. Each is executed twice from the
//! same state: by the processor, in a page of code with a page of data at low addresses, and by the emulator, in a memory with the same
//! contents at the same addresses. Registers, flags (those that the SDM defines) and data have to agree.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::generate::*;
use common::run;
use common::TestCpu;
use common::TestMemory;
use common::DONE;
use common::MORE;
use core::arch::asm;
use rkvm_x86::decode::decode;
use rkvm_x86::insn::AluOp;
use rkvm_x86::insn::Insn;
use rkvm_x86::insn::Op;
use rkvm_x86::insn::Operand;
use rkvm_x86::insn::ShiftOp;
use rkvm_x86::insn::Size;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;
use std::ptr;
use std::slice;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

/// The state that goes in and comes out: see [`on_processor`].
const STATE: u64 = 0x7f000;

fn map(address: u64, len: usize, executable: bool) {
    let prot = libc::PROT_READ | libc::PROT_WRITE | if executable { libc::PROT_EXEC } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let wanted = address as *mut libc::c_void;
    // SAFETY: an anonymous mapping where there is none has no effect on anything else.
    let got = unsafe { libc::mmap(wanted, len, prot, flags, -1, 0) };
    assert_eq!(got, wanted, "{}", std::io::Error::last_os_error());
}

/// The bytes of the instruction that runs, for the handler below.
static RUNNING: [AtomicU8; 16] = [const { AtomicU8::new(0) }; 16];

extern "C" fn report(signal: libc::c_int) {
    let mut text = *b"signal 00 at 00000000000000000000000000000000\n";
    let digit = |n: u8| b"0123456789abcdef"[usize::from(n & 15)];
    text[7] = digit((signal / 10) as u8);
    text[8] = digit((signal % 10) as u8);
    for (i, b) in RUNNING.iter().enumerate() {
        let b = b.load(Ordering::Relaxed);
        text[13 + 2 * i] = digit(b >> 4);
        text[14 + 2 * i] = digit(b);
    }
    // SAFETY: both are allowed in a signal handler; the text is valid for its length.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::_exit(101);
    }
}

/// An instruction that faults ends the test, and says which it was. The handler has a stack of its own, as RSP is the instruction's.
fn catch_faults() {
    let stack = vec![0u8; 1 << 16].leak();
    let stack = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: stack.len(),
    };
    for signal in [
        libc::SIGSEGV,
        libc::SIGILL,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGTRAP,
    ] {
        // SAFETY: all zero is a valid sigaction; the handler only writes and exits; the stack lives for ever.
        unsafe {
            libc::sigaltstack(&stack, ptr::null_mut());
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = report as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_ONSTACK;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
}

fn data() -> &'static mut [u8] {
    // SAFETY: `main` has mapped it; nobody holds the slice while the processor writes.
    unsafe { slice::from_raw_parts_mut(DATA as *mut u8, DATA_LEN) }
}

/// Executes the instruction in the code page from this state.
///
/// At STATE are: the host's stack pointer, the addresses to go to and to come back to, the flags at 0x20, the registers by number from 0x40.
fn on_processor(cpu: &mut TestCpu) {
    let state = STATE as *mut u64;
    // SAFETY: the state page is mapped and ours. The code page holds an instruction that writes to the data only, followed by a jump
    // through the state page. All registers are saved or declared clobbered, and the stack pointer is put back before the stack is used;
    // what the instruction pushes goes to the data.
    unsafe {
        for r in Gpr::ALL {
            state.add(8 + usize::from(r.number())).write(cpu.get(r));
        }
        let flags = (cpu.rflags & (Rflags::STATUS | Rflags::DF)).bits() | 2;
        state.add(4).write(flags);
        state.add(2).write(CODE);
        asm!(
            "push rbx",
            "push rbp",
            "lea rax, [rip + 2f]",
            "mov [0x7f018], rax",
            "push qword ptr [0x7f020]",
            "popfq",
            "mov [0x7f000], rsp",
            "mov rax, [0x7f040]",
            "mov rcx, [0x7f048]",
            "mov rdx, [0x7f050]",
            "mov rbx, [0x7f058]",
            "mov rsp, [0x7f060]",
            "mov rbp, [0x7f068]",
            "mov rsi, [0x7f070]",
            "mov rdi, [0x7f078]",
            "mov r8, [0x7f080]",
            "mov r9, [0x7f088]",
            "mov r10, [0x7f090]",
            "mov r11, [0x7f098]",
            "mov r12, [0x7f0a0]",
            "mov r13, [0x7f0a8]",
            "mov r14, [0x7f0b0]",
            "mov r15, [0x7f0b8]",
            "jmp qword ptr [0x7f010]",
            "2:",
            "mov [0x7f040], rax",
            "mov [0x7f048], rcx",
            "mov [0x7f050], rdx",
            "mov [0x7f058], rbx",
            "mov [0x7f060], rsp",
            "mov [0x7f068], rbp",
            "mov [0x7f070], rsi",
            "mov [0x7f078], rdi",
            "mov [0x7f080], r8",
            "mov [0x7f088], r9",
            "mov [0x7f090], r10",
            "mov [0x7f098], r11",
            "mov [0x7f0a0], r12",
            "mov [0x7f0a8], r13",
            "mov [0x7f0b0], r14",
            "mov [0x7f0b8], r15",
            "mov rsp, [0x7f000]",
            "pushfq",
            "pop qword ptr [0x7f020]",
            "cld",
            "pop rbp",
            "pop rbx",
            out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
        for r in Gpr::ALL {
            cpu.gprs
                .set(r, state.add(8 + usize::from(r.number())).read());
        }
        cpu.rflags = Rflags::new(state.add(4).read());
    }
}

/// Puts the instruction, and the way back, into the code page.
fn place(bytes: &[u8]) {
    let jump = [0xff, 0x24, 0x25, 0x18, 0xf0, 0x07, 0x00];
    // SAFETY: the page is mapped; nothing runs in it now.
    let page = unsafe { slice::from_raw_parts_mut(CODE as *mut u8, 64) };
    page[..bytes.len()].copy_from_slice(bytes);
    page[bytes.len()..][..jump.len()].copy_from_slice(&jump);
    for (i, slot) in RUNNING.iter().enumerate() {
        let byte = bytes.get(i).copied().unwrap_or(0);
        slot.store(byte, Ordering::Relaxed);
    }
}

/// The flags that the SDM defines after the instruction.
fn defined_flags(insn: &Insn, cpu: &TestCpu) -> Rflags {
    let all = Rflags::STATUS | Rflags::DF;
    match insn.op {
        Op::Alu(AluOp::And | AluOp::Or | AluOp::Xor) | Op::Test => all.without(Rflags::AF),
        Op::Imul => Rflags::CF | Rflags::OF | Rflags::DF,
        Op::Bit(_) => Rflags::CF | Rflags::ZF | Rflags::DF,
        Op::Shift(op) => {
            let count = match insn.src {
                Operand::Imm(n) => n,
                _ => cpu.get(Gpr::Rcx),
            } & if insn.size == Size::Qword { 63 } else { 31 };
            let bits = u64::from(insn.size.bits());
            let mut flags = all;
            if count != 0 {
                flags = flags.without(Rflags::AF);
            }
            if count > 1 {
                flags = flags.without(Rflags::OF);
            }
            if matches!(op, ShiftOp::Shl | ShiftOp::Shr) && count >= bits {
                flags = flags.without(Rflags::CF);
            }
            flags
        }
        _ => all,
    }
}

/// One instruction on both. Says whether there was one to compare.
fn compare(
    random: &mut Random,
    memory: &mut TestMemory,
    selectors: &[u16; 6],
    movbe: bool,
) -> Option<Op> {
    let mut code = bytes(random);
    let insn = decode(&code, CpuMode::Long64).ok()?;
    patch(random, &mut code, &insn);
    let insn = decode(&code, CpuMode::Long64).expect("only a displacement was changed");
    code.truncate(usize::from(insn.len));
    match insn.op {
        Op::MovBe if !movbe => return None,
        // CLFLUSHOPT and CLWB are not on every processor.
        Op::Flush if code.contains(&0x66) => return None,
        _ => {}
    }
    let mut cpu = TestCpu::long();
    if !aim(random, &insn, &mut cpu) {
        return None;
    }
    for (seg, selector) in SegReg::ALL.into_iter().zip(selectors) {
        cpu.seg(seg).selector = *selector;
    }
    cpu.rip = CODE;
    let flags = Rflags::STATUS | Rflags::DF;
    cpu.rflags = Rflags::new(random.next()) & flags | Rflags::FIXED;
    if matches!(insn.op, Op::CmpXchg | Op::CmpXchg8b) && random.one_in(2) {
        // Let it succeed sometimes.
        make_equal(&insn, &mut cpu, memory);
    }

    place(&code);
    memory.put(CODE, &code);
    let before = cpu.clone();
    let mut real = cpu.clone();
    on_processor(&mut real);
    let mut steps = 0;
    loop {
        let (outcome, bus) = run(&mut cpu, memory, &[]);
        assert!(bus.is_empty(), "{code:02x?} {insn:?}");
        steps += 1;
        match outcome {
            DONE => break,
            MORE if steps < 10 => {}
            other => panic!("{code:02x?} {insn:?}: {other:?}"),
        }
    }
    assert_eq!(cpu.rip, CODE + code.len() as u64);
    for r in Gpr::ALL {
        assert_eq!(
            cpu.get(r),
            real.get(r),
            "{r:?}: emulated {:#x}, real {:#x}\n{code:02x?} {insn:?}\n{before:x?}",
            cpu.get(r),
            real.get(r)
        );
    }
    let mask = defined_flags(&insn, &before);
    assert_eq!(
        cpu.rflags & mask,
        real.rflags & mask,
        "{code:02x?} {insn:?}\n{before:x?}"
    );
    let emulated = &memory.ram[DATA as usize..][..DATA_LEN];
    if emulated != data() {
        let at = emulated.iter().zip(data()).position(|(a, b)| a != b);
        panic!("data at {:#x?}\n{code:02x?} {insn:?}\n{before:x?}", at);
    }
    Some(insn.op)
}

fn selectors() -> [u16; 6] {
    let (es, cs, ss, ds, fs, gs): (u16, u16, u16, u16, u16, u16);
    // SAFETY: reading a selector has no effect.
    unsafe {
        asm!("mov {0:x}, es", "mov {1:x}, cs", "mov {2:x}, ss", out(reg) es, out(reg) cs, out(reg) ss);
        asm!("mov {0:x}, ds", "mov {1:x}, fs", "mov {2:x}, gs", out(reg) ds, out(reg) fs, out(reg) gs);
    }
    [es, cs, ss, ds, fs, gs]
}

#[test]
fn the_processor_agrees() {
    map(DATA, DATA_LEN, false);
    map(STATE, 0x1000, false);
    map(CODE, 0x1000, true);
    catch_faults();
    let seed = std::env::var("SEED").map_or(1, |s| s.parse().unwrap());
    let count = std::env::var("CASES").map_or(300_000, |s| s.parse().unwrap());
    let mut random = Random(seed);
    let mut memory = TestMemory::default();
    for chunk in data().chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
    memory.put(DATA, data());
    let selectors = selectors();
    let movbe = std::arch::is_x86_feature_detected!("movbe");
    let mut compared = std::collections::BTreeMap::new();
    for _ in 0..count {
        if let Some(op) = compare(&mut random, &mut memory, &selectors, movbe) {
            *compared.entry(format!("{op:?}")).or_insert(0u32) += 1;
        }
    }
    println!("{compared:#?}");
    // Each kind was met, and often.
    let kinds = [
        "Mov",
        "MovZx(Byte)",
        "MovSx(Dword)",
        "Lea",
        "Xchg",
        "Alu(Adc)",
        "Test",
        "Not",
        "Neg",
        "Inc",
        "Dec",
        "Shift(Sar)",
        "Bit(Complement)",
        "CmpXchg",
        "CmpXchg8b",
        "Xadd",
        "Imul",
        "Cmov(4)",
        "Set(9)",
        "Push",
        "Pop",
        "String(Cmps)",
        "String(Movs)",
        "Flush",
    ];
    for kind in kinds {
        assert!(
            compared.get(kind).is_some_and(|&n| n >= 20),
            "{kind}: {compared:?}"
        );
    }
}
