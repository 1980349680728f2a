// SPDX-License-Identifier: GPL-2.0

//! The emulator against the processor that the test runs on.
//!
//! Instructions are made at random: any opcode that the decoder knows, or says is none, with every addressing form, in 64-bit, 32-bit
//! and 16-bit code. Each is executed twice from the same state: by the processor, with memory at low addresses, and by the emulator, in
//! a memory with the same contents at the same addresses. General and vector registers, flags (those that the SDM defines), RIP and
//! data have to agree, and if it faults, so does the other, with the same vector and error code.
//!
//! SEED and CASES choose other instructions and how many.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;
#[path = "differential/native.rs"]
mod native;

use common::generate::*;
use common::TestCpu;
use common::TestMemory;
use native::State;
use rkvm_x86::decode::decode;
use rkvm_x86::emulate::Cpu;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::exception::Vector;
use rkvm_x86::insn::AluOp;
use rkvm_x86::insn::BcdOp;
use rkvm_x86::insn::BmiOp;
use rkvm_x86::insn::DecodeError;
use rkvm_x86::insn::Insn;
use rkvm_x86::insn::Op;
use rkvm_x86::insn::Operand;
use rkvm_x86::insn::Rep;
use rkvm_x86::insn::ScanOp;
use rkvm_x86::insn::ShiftOp;
use rkvm_x86::insn::Size;
use rkvm_x86::insn::StringOp;
use rkvm_x86::insn::VectorOp;
use rkvm_x86::insn::VectorSet;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;
use std::collections::BTreeMap;
use std::slice;
use std::sync::Mutex;

/// There is one processor state to be replaced, and one memory.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Where the instruction is: not at the start of the page, so that short jumps stay in it.
const AT: u64 = CODE + 0x400;
/// Selectors of Linux.
const USER_CS: u16 = 0x33;
const USER32_CS: u16 = 0x23;
const USER_DS: u16 = 0x2b;
/// The base of the data segments of 16-bit code, whose limit is where the data ends.
const BASE16: u64 = 0x48000;

/// The flags that go in and are compared.
const FLAGS: Rflags = Rflags::STATUS.with(Rflags::DF);

fn data() -> &'static mut [u8] {
    // SAFETY: The test has mapped it; nobody holds the slice while the processor writes.
    unsafe { slice::from_raw_parts_mut(DATA as *mut u8, DATA_LEN) }
}

fn code() -> &'static mut [u8] {
    // SAFETY: As in `data`.
    unsafe { slice::from_raw_parts_mut(AT as *mut u8, 32) }
}

/// What the test runs with.
struct Setup {
    mode: CpuMode,
    cs: u16,
    ds: u16,
    cpu: TestCpu,
}

impl Setup {
    fn new(mode: CpuMode) -> Option<Self> {
        let mut cpu = TestCpu::long();
        cpu.cpl = 3;
        cpu.cr0 |= Cr0::AM | Cr0::NE | Cr0::MP;
        cpu.rip = AT;
        let (mut cs, mut ds) = (USER_CS, USER_DS);
        match mode {
            CpuMode::Compat32 => {
                cs = USER32_CS;
                let attr = cpu.seg(SegReg::Cs).attr;
                cpu.seg(SegReg::Cs).attr = attr.with_l(false).with_db(true);
                for seg in SegReg::ALL.into_iter().filter(|&s| s != SegReg::Cs) {
                    let attr = cpu.seg(seg).attr;
                    cpu.seg(seg).attr = attr.with_db(true);
                }
            }
            CpuMode::Compat16 => {
                let limit = DATA + DATA_LEN as u64 - 1 - BASE16;
                cs = native::segment(0, CODE as u32, 0xffff, true)?;
                ds = native::segment(1, BASE16 as u32, limit as u32, false)?;
                cpu.rip = AT - CODE;
                for seg in SegReg::ALL {
                    let s = cpu.seg(seg);
                    s.base = BASE16;
                    s.limit = limit as u32;
                    s.attr = s.attr.with_db(false).with_l(false).with_g(false);
                }
                cpu.seg(SegReg::Cs).base = CODE;
                cpu.seg(SegReg::Cs).limit = 0xffff;
            }
            _ => {}
        }
        assert_eq!(cpu.mode(), mode);
        let own = selectors();
        for (seg, selector) in SegReg::ALL.into_iter().zip(own) {
            cpu.seg(seg).selector = selector;
        }
        for seg in [SegReg::Ds, SegReg::Es, SegReg::Ss] {
            cpu.seg(seg).selector = ds;
        }
        cpu.seg(SegReg::Cs).selector = cs;
        Some(Self { mode, cs, ds, cpu })
    }
}

fn selectors() -> [u16; 6] {
    let (fs, gs): (u16, u16);
    // SAFETY: Reading a selector has no effect.
    unsafe {
        std::arch::asm!("mov {0:x}, fs", "mov {1:x}, gs", out(reg) fs, out(reg) gs);
    }
    [0, 0, 0, 0, fs, gs]
}

/// Whether this processor has the instruction, and does with it what the SDM says.
fn comparable(insn: &Insn, code: &[u8], mode: CpuMode) -> bool {
    let branch = matches!(
        insn.op,
        Op::Call | Op::Jump | Op::Branch(_) | Op::Loop(_) | Op::Return
    );
    // AMD's have 16-bit branches in 64-bit code.
    if branch && mode.is_64bit() && code.contains(&0x66) {
        return false;
    }
    // With a repeat prefix, AMD's LOOPcc look at another condition.
    if matches!(insn.op, Op::Loop(_)) && insn.rep != Rep::None {
        return false;
    }
    // Outside of 64-bit code VEX.W is ignored, but not by AMD's.
    let general = matches!(
        insn.op,
        Op::Vector(VectorOp::Low | VectorOp::Insert | VectorOp::Extract, _)
    );
    if general && !mode.is_64bit() && code.contains(&0xc4) {
        return false;
    }
    // FS and GS belong to the test's own thread.
    let operand = memory_operand(insn).map(|m| m.seg);
    let other = matches!(
        insn.op,
        Op::String(_) | Op::Xlat | Op::Vector(VectorOp::MaskStore, _)
    );
    let fs_gs = |seg| matches!(seg, SegReg::Fs | SegReg::Gs);
    if operand.is_some_and(fs_gs) || other && fs_gs(insn.string_seg) {
        return false;
    }
    macro_rules! has {
        ($feature:tt) => {
            std::arch::is_x86_feature_detected!($feature)
        };
    }
    match insn.op {
        // It is said to need a segment that can be written, also where nothing changes.
        Op::Arpl => memory_operand(insn).is_none_or(|m| m.seg != SegReg::Cs),
        Op::MovBe => has!("movbe"),
        // MOVSXD with 16 bits: AMD's read 32.
        Op::MovSx(Size::Word) => insn.size != Size::Word,
        // CLFLUSHOPT and CLWB are not on every processor.
        Op::Flush => !code.contains(&0x66),
        Op::Crc32(_) => has!("sse4.2"),
        Op::Scan(ScanOp::Popcnt) => has!("popcnt"),
        Op::Scan(ScanOp::Tzcnt) => has!("bmi1"),
        Op::Scan(ScanOp::Lzcnt) => has!("lzcnt"),
        Op::Adcx | Op::Adox => has!("adx"),
        Op::Bmi(BmiOp::Andn | BmiOp::Bextr | BmiOp::Blsr | BmiOp::Blsmsk | BmiOp::Blsi) => {
            has!("bmi1")
        }
        Op::Bmi(_) | Op::Mulx => has!("bmi2"),
        Op::CmpXchg16b => has!("cmpxchg16b"),
        Op::Vector(_, VectorSet::Avx128 | VectorSet::Avx256) => has!("avx2"),
        Op::Vector(..) => has!("sse4.1"),
        Op::LoadMxcsr(set) | Op::StoreMxcsr(set) => set == VectorSet::Sse || has!("avx"),
        // Some take a register for an invalid operand.
        Op::Nop => !code.contains(&0x0d),
        _ => true,
    }
}

/// The flags that the SDM defines after the instruction.
fn defined_flags(insn: &Insn, cpu: &TestCpu) -> Rflags {
    let all = FLAGS;
    match insn.op {
        Op::Alu(AluOp::And | AluOp::Or | AluOp::Xor) | Op::Test => all.without(Rflags::AF),
        Op::Imul | Op::Mul { .. } => Rflags::CF | Rflags::OF | Rflags::DF,
        Op::Div { .. } => Rflags::DF,
        Op::Bit(_) => Rflags::CF | Rflags::ZF | Rflags::DF,
        Op::Scan(ScanOp::Bsf | ScanOp::Bsr) => Rflags::ZF | Rflags::DF,
        Op::Scan(ScanOp::Tzcnt | ScanOp::Lzcnt) => Rflags::ZF | Rflags::CF | Rflags::DF,
        Op::Bmi(op) => match op {
            BmiOp::Bextr => Rflags::ZF | Rflags::CF | Rflags::OF | Rflags::DF,
            _ => all.without(Rflags::AF | Rflags::PF),
        },
        Op::Bcd(BcdOp::Aaa | BcdOp::Aas) => Rflags::CF | Rflags::AF | Rflags::DF,
        Op::Bcd(BcdOp::Aam | BcdOp::Aad) => Rflags::SF | Rflags::ZF | Rflags::PF | Rflags::DF,
        Op::Bcd(_) => all.without(Rflags::OF),
        Op::Shift(_) | Op::DoubleShift { .. } => {
            let count = match (insn.op, insn.src, insn.src2) {
                (Op::Shift(_), Operand::Imm(n), _) | (_, _, Operand::Imm(n)) => n,
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
            let to_the_end = matches!(insn.op, Op::Shift(ShiftOp::Shl | ShiftOp::Shr));
            if to_the_end && count >= bits {
                flags = flags.without(Rflags::CF);
            }
            flags
        }
        _ => all,
    }
}

/// Whether the result is one that the SDM leaves open.
fn open_result(insn: &Insn, cpu: &TestCpu) -> bool {
    match insn.op {
        Op::ByteSwap => insn.size == Size::Word,
        Op::DoubleShift { .. } => {
            let count = match insn.src2 {
                Operand::Imm(n) => n,
                _ => cpu.get(Gpr::Rcx),
            };
            insn.size == Size::Word && count & 31 > 16
        }
        _ => false,
    }
}

fn state_of(cpu: &TestCpu, setup: &Setup) -> State {
    State {
        gprs: *cpu.gprs.as_array(),
        rip: cpu.rip,
        rflags: cpu.rflags.bits(),
        cs: setup.cs,
        ss: setup.ds,
        ymm: cpu.fpu.ymm,
        mmx: cpu.fpu.mmx,
        mxcsr: cpu.fpu.mxcsr,
        control: cpu.fpu.control,
        status: cpu.fpu.status,
        ..State::default()
    }
}

/// Random vector registers, and sometimes an x87 exception that is pending.
fn fill_fpu(random: &mut Random, cpu: &mut TestCpu) {
    for part in cpu.fpu.ymm.iter_mut().flatten() {
        *part = random.next();
    }
    cpu.fpu.mmx.iter_mut().for_each(|r| *r = random.next());
    cpu.fpu.mxcsr = 0x1f80 | random.below(64) as u32;
    if random.one_in(16) {
        cpu.fpu.control = 0x340 | random.below(64) as u16;
        cpu.fpu.status = random.below(64) as u16;
        if cpu.fpu.status & !cpu.fpu.control & 0x3f != 0 {
            cpu.fpu.status |= 0x8080;
        }
    }
}

/// What came of a case.
enum Came {
    /// There was nothing to compare.
    Skipped,
    /// The two agree: on what, whether it has a memory operand, and how it ended.
    Agreed(Option<(Op, bool)>, &'static str),
}

/// Whether there may be a MOV to or from a control register, or VERR or VERW.
fn is_locked_by_amd(bytes: &[u8]) -> bool {
    bytes
        .windows(2)
        .any(|pair| matches!(pair, [0x0f, 0x00 | 0x20 | 0x22]))
}

/// One instruction on both.
fn compare(random: &mut Random, memory: &mut TestMemory, setup: &Setup) -> Came {
    let mut bytes = bytes(random, setup.mode);
    let mut cpu = setup.cpu.clone();
    let insn = match decode(&bytes, setup.mode) {
        // Some are system calls. They have a test of their own.
        Ok(insn) if matches!(insn.op, Op::System(_)) => return Came::Skipped,
        Ok(insn) => {
            patch(random, &mut bytes, &insn, &mut cpu);
            Some(decode(&bytes, setup.mode).expect("only a displacement was changed"))
        }
        // AMD's have CR8 there, and ignore the prefix.
        Err(DecodeError::Invalid) if bytes.contains(&0xf0) && is_locked_by_amd(&bytes) => {
            return Came::Skipped;
        }
        Err(DecodeError::Invalid) => None,
        Err(_) => return Came::Skipped,
    };
    bytes.truncate(15);
    if let Some(insn) = &insn {
        if !comparable(insn, &bytes[..insn.len.into()], setup.mode) {
            return Came::Skipped;
        }
        let aimed = aim(random, insn, &mut cpu);
        if insn.op == Op::Enter && !matches!(insn.src, Operand::Imm(..0x1000)) {
            return Came::Skipped;
        }
        if !aimed || random.one_in(30) {
            if !astray(random, insn, &mut cpu) {
                return Came::Skipped;
            }
        }
        if matches!(insn.op, Op::Div { .. }) && random.one_in(2) {
            // Let the quotient fit sometimes.
            let rdx = cpu.get(Gpr::Rdx);
            cpu.gprs.set(Gpr::Rdx, rdx >> 60);
            let rax = cpu.get(Gpr::Rax);
            cpu.gprs.set(Gpr::Rax, rax & !0xf000);
        }
        if matches!(insn.op, Op::CmpXchg | Op::CmpXchg8b | Op::CmpXchg16b) && random.one_in(2) {
            make_equal(insn, &mut cpu, memory);
        }
    } else {
        aim_nothing(random, &mut cpu);
    }
    cpu.rflags = Rflags::new(random.next()) & FLAGS | Rflags::FIXED | Rflags::IF | Rflags::TF;
    if random.one_in(10) {
        cpu.rflags |= Rflags::AC;
    }
    // The kernel lets a signal's handler change most flags, but not these, which POPF has left.
    cpu.rflags |= native::flags() & (Rflags::ID | Rflags::NT);
    let unordered = |op| {
        matches!(
            op,
            Op::Vector(VectorOp::MaskStore, _)
                | Op::Vector(_, VectorSet::Avx256)
                | Op::String(StringOp::Cmps | StringOp::Movs)
                | Op::Call
                | Op::Return
        )
    };
    if insn.is_some_and(|insn| unordered(insn.op)) {
        // What an access is here, or which fault comes first, is the processor's own.
        cpu.rflags = cpu.rflags.without(Rflags::AC);
    }
    fill_fpu(random, &mut cpu);

    memory.put(AT, &bytes);
    code()[..bytes.len()].copy_from_slice(&bytes);
    let before = cpu.clone();
    let mut emulator = Emulator::new();
    let outcome = emulator.step(&mut cpu, memory);
    if matches!(outcome, Outcome::Unhandled) {
        assert!(insn.is_none() || insn.is_some_and(|i| matches!(i.op, Op::Enter)));
        return Came::Skipped;
    }
    let mut real = state_of(&before, setup);
    // SAFETY: The registers lead the instruction to the data or to where nothing is mapped, and the decoder knows no system call.
    unsafe { native::run(&mut real, setup.ds) };
    let what = || format!("{:?} {bytes:02x?} {insn:?}\n{before:x?}", setup.mode);
    let agreed = match outcome {
        // The emulator has no page tables here, and a flush reads nothing.
        Outcome::Done(_)
            if real.vector == Vector::PF.0 && insn.is_some_and(|insn| insn.op == Op::Flush) =>
        {
            "went astray"
        }
        Outcome::Done(done) => {
            assert!(done.single_step);
            let state = (real.vector, real.error, real.cr2);
            assert_eq!(real.vector, 1, "{state:x?} {}", what());
            let insn = insn.as_ref().expect("it was decoded");
            if !open_result(insn, &before) {
                same(&cpu, &real, defined_flags(insn, &before), setup, &what);
            }
            "completed"
        }
        // AMD's have one bit of MXCSR more.
        Outcome::Fault(fault)
            if fault.vector == Vector::GP && real.vector == 1 && real.mxcsr & (1 << 17) != 0 =>
        {
            "had MXCSR.MM"
        }
        Outcome::Fault(fault) => {
            // Of #SS for no address and #GP for one that is not aligned, a processor may find either first.
            let aligned = VectorOp::Move { aligned: true };
            let expected = match insn.map(|insn| insn.op) {
                Some(Op::CmpXchg16b) => Vector::GP,
                Some(Op::Vector(op, _)) if op == aligned => Vector::GP,
                _ => fault.vector,
            };
            let vector = if fault.vector == Vector::SS && real.vector == expected.0 {
                expected
            } else {
                fault.vector
            };
            assert_eq!(
                (real.vector, real.error),
                (vector.0, fault.error.unwrap_or(0)),
                "{:#x} {}",
                real.cr2,
                what()
            );
            assert_eq!(before, cpu);
            same(&cpu, &real, FLAGS, setup, &what);
            if insn.is_some_and(|insn| matches!(insn.op, Op::Enter | Op::PushAll)) {
                // What was pushed before stays.
                memory.put(DATA, data());
            }
            "faulted"
        }
        // There is nothing in the emulator's memory, nor in the processor's.
        Outcome::MmioRead { .. } | Outcome::MmioWrite { .. } => {
            assert_eq!(real.vector, Vector::PF.0, "{outcome:?} {}", what());
            memory.put(DATA, data());
            "went astray"
        }
        other => panic!("{other:?} {}", what()),
    };
    let emulated = &memory.ram[DATA as usize..][..DATA_LEN];
    let open = insn.is_some_and(|insn| open_result(&insn, &before));
    if open {
        memory.put(DATA, data());
    } else if emulated != data() {
        let at = emulated.iter().zip(data()).position(|(a, b)| a != b);
        let at = at.unwrap_or(0) & !7;
        let (is, should) = (&emulated[at..][..16], &data()[at..][..16]);
        panic!("data at {at:#x}: {is:02x?}, real {should:02x?}\n{}", what());
    }
    let form = |insn: Insn| (insn.op, memory_operand(&insn).is_some());
    Came::Agreed(insn.map(form), agreed)
}

/// Registers that no instruction is to use.
fn aim_nothing(random: &mut Random, cpu: &mut TestCpu) {
    for r in Gpr::ALL {
        let value = 0x1000 + random.below(0x1000);
        cpu.gprs.set(r, value);
    }
}

/// Lets the memory operand miss: to where nothing is mapped, over an end of the data, or to no address at all.
fn astray(random: &mut Random, insn: &Insn, cpu: &mut TestCpu) -> bool {
    let Some(m) = memory_operand(insn) else {
        return !matches!(
            insn.op,
            Op::String(_) | Op::Vector(VectorOp::MaskStore, _) | Op::Xlat
        );
    };
    if insn.op == Op::Lea {
        return true;
    }
    if let (Some(b), false) = (m.base, m.index == m.base) {
        let miss = match random.below(4) {
            0 => DATA + DATA_LEN as u64 - random.below(40),
            1 => DATA - random.below(40),
            2 if insn.address_size == 8 => random.next() | (1 << 62),
            _ => 0x20_0000 + random.below(0x1000_0000),
        };
        let base = if cpu.mode().is_64bit() {
            0
        } else {
            cpu.segments[m.seg as usize].base
        };
        let now = offset(insn, &m, cpu).wrapping_add(base);
        let width = if cpu.mode().is_64bit() {
            u64::MAX
        } else {
            0xffff_ffff
        };
        let value = cpu.get(b).wrapping_add(miss.wrapping_sub(now)) & width;
        cpu.gprs.set(b, value);
    }
    if matches!(insn.op, Op::Bit(_)) && matches!(insn.src, Operand::Reg(r) if Some(r) == m.base) {
        return false;
    }
    let base = if cpu.mode().is_64bit() {
        0
    } else {
        cpu.segments[m.seg as usize].base
    };
    let at = offset(insn, &m, cpu).wrapping_add(base);
    // What is above is the test's own; what is around the code is for code.
    let canonical = at < 1 << 47 || at >= (1u64 << 47).wrapping_neg();
    let own = canonical && at >= 1 << 31;
    !own && !(CODE - 0x2000..CODE + 0x3000).contains(&at)
}

fn same(cpu: &TestCpu, real: &State, flags: Rflags, setup: &Setup, what: &dyn Fn() -> String) {
    let width = if setup.mode.is_64bit() {
        u64::MAX
    } else {
        0xffff_ffff
    };
    for r in Gpr::ALL {
        let (emulated, native) = (cpu.get(r), real.gprs[usize::from(r.number())]);
        assert_eq!(
            emulated & width,
            native & width,
            "{r:?}: emulated {emulated:#x}, real {native:#x}\n{}",
            what()
        );
    }
    assert_eq!(cpu.rip, real.rip, "{}", what());
    let native = Rflags::new(real.rflags) & flags;
    assert_eq!(cpu.rflags & flags, native, "{}", what());
    for (i, (emulated, native)) in cpu.fpu.ymm.iter().zip(&real.ymm).enumerate() {
        if setup.mode.is_64bit() || i < 8 {
            assert_eq!(emulated, native, "ymm{i} {}", what());
        }
    }
    assert_eq!(cpu.fpu.mmx, real.mmx, "{}", what());
    assert_eq!(cpu.fpu.mxcsr, real.mxcsr, "{}", what());
    assert_eq!(cpu.fpu.control, real.control, "{}", what());
    // The stack's top moves with MMX, and nobody can see it before EMMS.
    assert_eq!(cpu.fpu.status & 0xff, real.status & 0xff, "{}", what());
}

fn cases(mode: CpuMode, share: u64) -> Option<BTreeMap<String, u64>> {
    let setup = Setup::new(mode)?;
    let number = |name: &str| std::env::var(name).ok().map(|s| s.parse::<u64>().unwrap());
    let seed = number("SEED").unwrap_or(1);
    let count = number("CASES").unwrap_or(400_000) / share;
    println!("{mode:?}: SEED={seed}, {count} cases");
    let mut random = Random(seed.max(1));
    let mut memory = TestMemory {
        device_pages: (0..256)
            .filter(|page| *page != CODE >> 12 && !(DATA >> 12..(DATA >> 12) + 4).contains(page))
            .collect(),
        ..TestMemory::default()
    };
    for chunk in data().chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
    memory.put(DATA, data());
    let mut compared = BTreeMap::new();
    let mut ends = BTreeMap::new();
    for _ in 0..count {
        if let Came::Agreed(op, end) = compare(&mut random, &mut memory, &setup) {
            let name = op.map_or("Invalid".to_string(), |(op, _)| format!("{op:?}"));
            if let (Some((_, false)), "completed") = (op, end) {
                *compared.entry(in_registers(&name)).or_insert(0) += 1;
            }
            *compared.entry(name).or_insert(0) += 1;
            *ends.entry(end).or_insert(0u64) += 1;
        }
    }
    println!("{ends:?}\n{compared:?}");
    Some(compared)
}

fn prepare() {
    native::map(DATA, DATA_LEN, false);
    native::map(CODE, 0x1000, true);
    native::prepare();
}

/// Gives the memory back to the next test.
fn finish() {
    for (address, len) in [(DATA, DATA_LEN), (CODE, 0x1000)] {
        // SAFETY: `prepare` mapped it, and nothing uses it any more.
        unsafe { libc::munmap(address as *mut libc::c_void, len) };
    }
}

fn run(mode: CpuMode, share: u64) -> Option<BTreeMap<String, u64>> {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    prepare();
    let compared = std::panic::catch_unwind(|| cases(mode, share));
    finish();
    compared.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What has a form without memory operand, in all code.
const IN_REGISTERS: &[&str] = &[
    "Mov",
    "MovZx(Byte)",
    "MovZx(Word)",
    "MovSx(Byte)",
    "MovSx(Word)",
    "Xchg",
    "Xadd",
    "CmpXchg",
    "Alu(Add)",
    "Alu(Or)",
    "Alu(Adc)",
    "Alu(Sbb)",
    "Alu(And)",
    "Alu(Sub)",
    "Alu(Xor)",
    "Alu(Cmp)",
    "Test",
    "Not",
    "Neg",
    "Inc",
    "Dec",
    "Imul",
    "Mul { signed: false }",
    "Mul { signed: true }",
    "Div { signed: false }",
    "Div { signed: true }",
    "Shift(Rol)",
    "Shift(Ror)",
    "Shift(Rcl)",
    "Shift(Rcr)",
    "Shift(Shl)",
    "Shift(Shr)",
    "Shift(Sar)",
    "DoubleShift { left: true }",
    "DoubleShift { left: false }",
    "Bit(Test)",
    "Bit(Set)",
    "Bit(Reset)",
    "Bit(Complement)",
    "Scan(Bsf)",
    "Scan(Bsr)",
    "ByteSwap",
    "SignToRdx",
    "Sahf",
    "Lahf",
    "Flag(Cmc)",
    "Flag(Clc)",
    "Flag(Stc)",
    "Flag(Cld)",
    "Flag(Std)",
    "Cmov(4)",
    "Set(9)",
    "Push",
    "Pop",
    "PushFlags",
    "PopFlags",
    "Enter",
    "Leave",
    "Call",
    "Jump",
    "Return",
    "Branch(0)",
    "Branch(5)",
    "Branch(15)",
    "Loop(Loop)",
    "Loop(Loope)",
    "Loop(Loopne)",
    "Loop(Jcxz)",
    "Nop",
];

/// The same, in 32- and 16-bit code only.
const IN_REGISTERS_LEGACY: &[&str] = &[
    "Bcd(Daa)", "Bcd(Das)", "Bcd(Aaa)", "Bcd(Aas)", "Bcd(Aam)", "Bcd(Aad)", "Salc", "PushAll",
    "PopAll",
];

fn in_registers(name: &str) -> String {
    format!("{name}, registers")
}

/// Each of these was met without a memory operand, and completed.
fn met_in_registers(compared: &BTreeMap<String, u64>, kinds: &[&str]) {
    for kind in kinds {
        let met = compared.get(&in_registers(kind)).copied();
        assert!(met.unwrap_or(0) > 0, "{kind}: {compared:?}");
    }
}

#[test]
fn the_processor_agrees_in_64_bit_code() {
    let compared = run(CpuMode::Long64, 1).unwrap();
    // Each kind was met, and not once.
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
        "Shift(Rcl)",
        "Bit(Complement)",
        "CmpXchg",
        "CmpXchg8b",
        "CmpXchg16b",
        "Div { signed: true }",
        "DoubleShift { left: true }",
        "Scan(Lzcnt)",
        "Crc32(Byte)",
        "Bmi(Pdep)",
        "Mulx",
        "PopFlags",
        "Enter",
        "Leave",
        "Branch(7)",
        "Loop(Loop)",
        "Xlat",
        "X87(LoadControl)",
        "LoadMxcsr(Sse)",
        "Vector(Move { aligned: true }, Sse)",
        "Vector(Move { aligned: false }, Avx256)",
        "Vector(Low, Mmx)",
        "Vector(Half { high: true }, Avx128)",
        "Vector(MaskStore, Sse)",
        "Vector(Insert, Sse)",
        "Vector(Extract, Avx128)",
        "Xadd",
        "Imul",
        "Cmov(4)",
        "Set(9)",
        "Push",
        "Pop",
        "Call",
        "Jump",
        "Return",
        "String(Cmps)",
        "String(Movs)",
        "Invalid",
    ];
    met_in_registers(&compared, IN_REGISTERS);
    for kind in kinds {
        assert!(
            compared.get(kind).is_some_and(|&n| n >= 5),
            "{kind}: {compared:?}"
        );
    }
}

#[test]
fn the_processor_agrees_in_32_bit_code() {
    let compared = run(CpuMode::Compat32, 2).unwrap();
    met_in_registers(&compared, IN_REGISTERS);
    met_in_registers(&compared, IN_REGISTERS_LEGACY);
}

#[test]
fn the_processor_agrees_in_16_bit_code() {
    let Some(compared) = run(CpuMode::Compat16, 2) else {
        println!("the kernel makes no 16-bit segments");
        return;
    };
    met_in_registers(&compared, IN_REGISTERS);
    met_in_registers(&compared, IN_REGISTERS_LEGACY);
}
