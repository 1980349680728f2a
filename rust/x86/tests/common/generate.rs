// SPDX-License-Identifier: GPL-2.0

//! Instructions made at random, and states from which they work on known memory.

use super::TestCpu;
use super::TestMemory;
use rkvm_x86::emulate::Cpu;
use rkvm_x86::insn::Insn;
use rkvm_x86::insn::MemRef;
use rkvm_x86::insn::Op;
use rkvm_x86::insn::Operand;
use rkvm_x86::insn::VectorOp;
use rkvm_x86::regs::Gpr;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;

/// What instructions work on: four pages, addressed around the middle.
pub const DATA: u64 = 0x4e000;
pub const DATA_LEN: usize = 0x4000;
pub const MIDDLE: u64 = DATA + DATA_LEN as u64 / 2;
/// Where the code is.
pub const CODE: u64 = 0x80000;

/// A generator of numbers that is the same every time (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A number of some length: small ones and extremes are where the bugs are.
    pub fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.next() >> self.below(64),
            1 => (self.next() >> self.below(64)).wrapping_neg(),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            _ => self.next(),
        }
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Opcodes after 0F 38, 0F 3A and in VEX that are worth more than chance gives them.
const OPCODES_38: &[u8] = &[0xf0, 0xf1, 0xf6, 0xf7, 0x2a, 0xf2, 0xf3, 0xf5];
const OPCODES_3A: &[u8] = &[0x14, 0x15, 0x16, 0x17, 0x20, 0x22, 0xf0];
const OPCODES_VEX: &[(u8, u8)] = &[
    (1, 0x10),
    (1, 0x11),
    (1, 0x12),
    (1, 0x13),
    (1, 0x16),
    (1, 0x17),
    (1, 0x28),
    (1, 0x29),
    (1, 0x2b),
    (1, 0x6e),
    (1, 0x6f),
    (1, 0x7e),
    (1, 0x7f),
    (1, 0xae),
    (1, 0xc4),
    (1, 0xd6),
    (1, 0xe7),
    (1, 0xf0),
    (1, 0xf7),
    (2, 0x18),
    (2, 0x19),
    (2, 0x1a),
    (2, 0x2a),
    (2, 0x58),
    (2, 0x59),
    (2, 0x5a),
    (2, 0x78),
    (2, 0x79),
    (2, 0xf2),
    (2, 0xf3),
    (2, 0xf5),
    (2, 0xf6),
    (2, 0xf7),
    (3, 0x14),
    (3, 0x15),
    (3, 0x16),
    (3, 0x17),
    (3, 0x18),
    (3, 0x19),
    (3, 0x20),
    (3, 0x22),
    (3, 0x38),
    (3, 0x39),
    (3, 0xf0),
];

/// Bytes of an instruction: prefixes, an opcode, and noise for the rest.
pub fn bytes(random: &mut Random, mode: CpuMode) -> Vec<u8> {
    let mut b = Vec::new();
    let vex = random.one_in(9);
    let rare = if vex { 40 } else { 1 };
    for (prefix, odds) in [
        (0xf0, 12),
        (0x66, 4),
        (0x67, 5),
        (0xf3, 6),
        (0xf2, 10),
        (0x2e, 30),
        (0x36, 30),
    ] {
        if random.one_in(odds * rare) {
            b.push(prefix);
        }
    }
    if mode.is_64bit() && random.one_in(2 * rare) {
        b.push(0x40 | random.below(16) as u8);
    }
    let any = random.next() as u8;
    if vex {
        let (map, opcode) = random.pick(OPCODES_VEX);
        let extended = if mode.is_64bit() { 0xff } else { 0x3f };
        let inverted = !(random.next() as u8 & random.next() as u8 & extended);
        let mut last = random.next() as u8;
        if random.one_in(2) {
            // No third register.
            last |= 0x78;
        }
        if random.one_in(2) {
            last &= 0x7f;
        }
        if map == 1 && random.one_in(2) {
            b.extend([0xc5, last | inverted & 0x80, opcode]);
        } else {
            b.extend([0xc4, inverted & 0xe0 | map, last, opcode]);
        }
    } else {
        match random.below(20) {
            0 => b.extend([0x0f, 0x38, random.pick(OPCODES_38)]),
            1 => b.extend([0x0f, 0x3a, random.pick(OPCODES_3A)]),
            2..=8 => b.extend([0x0f, any]),
            _ => b.push(any),
        }
    }
    let mut noise = random.next().to_le_bytes();
    let [modrm, second, ..] = &mut noise;
    match b.as_slice() {
        // One extension of eight is known, of memory or of any.
        [.., 0x0f, 0xc7] => *modrm = *modrm & 0x87 | 8,
        // ENTER: a frame that the data has room for.
        [.., 0xc8] => *second &= 0xf,
        [0xc4, .., 0xf3] => *modrm = *modrm & 0xc7 | 8 << random.below(2),
        [0xc4, .., 0xae] | [.., 0x0f, 0xae] => *modrm = *modrm & 0x8f | 0x10,
        _ => {}
    }
    b.extend(noise);
    b.extend(random.next().to_le_bytes());
    b
}

pub fn memory_operand(insn: &Insn) -> Option<MemRef> {
    [insn.dst, insn.src, insn.src2]
        .into_iter()
        .find_map(|operand| match operand {
            Operand::Mem(m) => Some(m),
            _ => None,
        })
}

/// The bits of an address.
pub fn address_mask(insn: &Insn) -> u64 {
    match insn.address_size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn base_of(cpu: &mut TestCpu, seg: SegReg) -> u64 {
    if cpu.mode().is_64bit() {
        0
    } else {
        cpu.segments[seg as usize].base
    }
}

/// Where a memory operand is in its segment.
pub fn offset(insn: &Insn, m: &MemRef, cpu: &TestCpu) -> u64 {
    let mut address = m.disp;
    if m.rip_relative {
        address = address.wrapping_add(cpu.rip + u64::from(insn.len));
    }
    if let Some(b) = m.base {
        address = address.wrapping_add(cpu.get(b));
    }
    if let Some(i) = m.index {
        address = address.wrapping_add(cpu.get(i) << m.scale);
    }
    address & address_mask(insn)
}

/// Gives the registers values with which the instruction works on the data. Says false if there are none.
pub fn aim(random: &mut Random, insn: &Insn, cpu: &mut TestCpu) -> bool {
    // Those have tests of their own.
    if matches!(insn.op, Op::System(_)) {
        return false;
    }
    let long = cpu.mode().is_64bit();
    let width = if long { u64::MAX } else { 0xffff_ffff };
    for r in Gpr::ALL {
        let value = random.value() & width;
        cpu.gprs.set(r, value);
    }
    let mask = address_mask(insn);
    let stray = random.next() & !mask & width;
    let target = MIDDLE - 0x100 + random.below(0x200);
    let near = |random: &mut Random, cpu: &mut TestCpu, r, seg| {
        let at = MIDDLE - 0x100 + random.below(0x200);
        let offset = at.wrapping_sub(base_of(cpu, seg)) & mask;
        cpu.gprs.set(r, offset | stray);
    };
    match insn.op {
        Op::String(_) => {
            near(random, cpu, Gpr::Rsi, insn.string_seg);
            near(random, cpu, Gpr::Rdi, SegReg::Es);
            // RCX of zero with 32-bit addresses clears the upper half on some processors only.
            cpu.gprs.set(Gpr::Rcx, (1 + random.below(20)) | stray);
        }
        Op::Vector(VectorOp::MaskStore, _) => near(random, cpu, Gpr::Rdi, insn.string_seg),
        Op::Xlat => near(random, cpu, Gpr::Rbx, insn.string_seg),
        _ => {}
    }
    let stack_base = base_of(cpu, SegReg::Ss);
    let stack = MIDDLE + 0x400 + random.below(0x100) - stack_base;
    cpu.gprs.set(Gpr::Rsp, stack);
    if matches!(insn.op, Op::Enter | Op::Leave) {
        cpu.gprs.set(Gpr::Rbp, stack - 0x100 + random.below(0x200));
    }
    let Some(m) = memory_operand(insn) else {
        return true;
    };
    let bit_index = match (insn.op, insn.src) {
        (Op::Bit(_), Operand::Reg(r)) => Some(r),
        _ => None,
    };
    if let Some(r) = bit_index {
        let index = random.below(1 << 13).wrapping_sub(1 << 12) & width;
        cpu.gprs.set(r, index);
    }
    if let Some(i) = m.index {
        cpu.gprs.set(i, random.below(32));
    }
    let segment = base_of(cpu, m.seg);
    let wanted = target.wrapping_sub(segment);
    let fixed = bit_index == m.base && m.base.is_some();
    match m.base {
        Some(b) if !fixed && b != Gpr::Rsp => {
            let other = if m.index == Some(b) {
                0
            } else {
                m.index.map_or(0, |i| cpu.get(i) << m.scale)
            };
            let mut base = wanted.wrapping_sub(other).wrapping_sub(m.disp);
            if m.index == Some(b) {
                base = wanted.wrapping_sub(m.disp) / (1 + (1 << m.scale));
            }
            cpu.gprs.set(b, (base & mask) | stray);
        }
        _ => {}
    }
    if bit_index.is_some() && bit_index == m.index {
        return false;
    }
    // Whatever was possible, it has to be in the data.
    let address = offset(insn, &m, cpu).wrapping_add(segment);
    insn.op == Op::Lea || (DATA + 0x800..DATA + DATA_LEN as u64 - 0x800).contains(&address)
}

/// Writes a displacement that leads to the data, where no register can: RIP-relative and absolute addresses. These have the last bytes
/// before the immediate.
pub fn patch(random: &mut Random, bytes: &mut [u8], insn: &Insn, cpu: &mut TestCpu) {
    let Some(m) = memory_operand(insn) else {
        return;
    };
    if m.base.is_some() && m.base != Some(Gpr::Rsp) {
        return;
    }
    let old = (m.disp as u32).to_le_bytes();
    let target = (MIDDLE - 0x80 + random.below(0x100)).wrapping_sub(base_of(cpu, m.seg));
    let new = if m.rip_relative {
        target.wrapping_sub(cpu.rip + u64::from(insn.len))
    } else if m.base.is_some() {
        random.below(0x100)
    } else {
        target
    };
    let len = usize::from(insn.len);
    let width = if insn.address_size == 2 { 2 } else { 4 };
    if let Some(at) = bytes[..len]
        .windows(width)
        .rposition(|w| w == &old[..width])
    {
        bytes[at..at + width].copy_from_slice(&(new as u32).to_le_bytes()[..width]);
    }
}

/// Puts what the destination holds into the accumulator.
pub fn make_equal(insn: &Insn, cpu: &mut TestCpu, memory: &TestMemory) {
    let Operand::Mem(m) = insn.dst else {
        return;
    };
    if [m.base, m.index]
        .iter()
        .flatten()
        .any(|r| matches!(r, Gpr::Rax | Gpr::Rdx))
        || m.rip_relative
    {
        return;
    }
    let address = offset(insn, &m, cpu).wrapping_add(base_of(cpu, m.seg));
    if !(DATA..DATA + DATA_LEN as u64 - 16).contains(&address) {
        return;
    }
    let value = memory.get64(address);
    match insn.op {
        Op::CmpXchg8b => {
            cpu.gprs.set(Gpr::Rax, value & 0xffff_ffff);
            cpu.gprs.set(Gpr::Rdx, value >> 32);
        }
        Op::CmpXchg16b => {
            cpu.gprs.set(Gpr::Rax, value);
            cpu.gprs.set(Gpr::Rdx, memory.get64(address + 8));
        }
        _ => cpu.gprs.set(Gpr::Rax, value & 0xffff_ffff),
    }
}
