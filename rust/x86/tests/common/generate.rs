// SPDX-License-Identifier: GPL-2.0

//! Instructions made at random, and states from which they work on known memory.

use super::TestCpu;
use super::TestMemory;
use rkvm_x86::insn::Insn;
use rkvm_x86::insn::MemRef;
use rkvm_x86::insn::Op;
use rkvm_x86::insn::Operand;
use rkvm_x86::regs::Gpr;

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
}

pub const ONE_BYTE: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x50, 0x58, 0x63, 0x68, 0x6a, 0x80, 0x81, 0x83, 0x84, 0x85,
    0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8c, 0x8d, 0x8f, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa,
    0xab, 0xac, 0xad, 0xae, 0xaf, 0xb0, 0xb8, 0xc0, 0xc1, 0xc6, 0xc7, 0xd0, 0xd1, 0xd2, 0xd3, 0xf6,
    0xf7, 0xfe, 0xff,
];

pub const TWO_BYTE: &[u8] = &[
    0x40, 0x90, 0xa3, 0xab, 0xb3, 0xbb, 0xba, 0xaf, 0xb0, 0xb1, 0xb6, 0xb7, 0xbe, 0xbf, 0xc0, 0xc1,
    0xc3, 0xc7, 0x38, 0xae,
];

/// Bytes of an instruction: prefixes, an opcode from the tables, and noise for the rest.
pub fn bytes(random: &mut Random) -> Vec<u8> {
    let mut b = Vec::new();
    for (prefix, odds) in [
        (0xf0, 6),
        (0x66, 4),
        (0x67, 5),
        (0xf3, 5),
        (0xf2, 8),
        (0x2e, 20),
    ] {
        if random.one_in(odds) {
            b.push(prefix);
        }
    }
    if random.one_in(2) {
        b.push(0x40 | random.below(16) as u8);
    }
    let pick = |random: &mut Random, table: &[u8]| table[random.below(table.len() as u64) as usize];
    if random.one_in(3) {
        b.push(0x0f);
        let mut opcode = pick(random, TWO_BYTE);
        if matches!(opcode, 0x40 | 0x90) {
            opcode |= random.below(16) as u8;
        }
        b.push(opcode);
        if opcode == 0x38 {
            b.push(0xf0 | random.below(2) as u8);
        }
    } else {
        let mut opcode = pick(random, ONE_BYTE);
        match opcode {
            0x00..=0x05 => opcode |= (random.below(8) as u8) << 3,
            0x50 | 0x58 | 0xb0 | 0xb8 => opcode |= random.below(8) as u8,
            _ => {}
        }
        b.push(opcode);
    }
    let noise = random.next().to_le_bytes();
    b.extend(noise);
    b.extend(random.next().to_le_bytes());
    b
}

pub fn memory_operand(insn: &Insn) -> Option<MemRef> {
    match (insn.dst, insn.src) {
        (Operand::Mem(m), _) | (_, Operand::Mem(m)) => Some(m),
        _ => None,
    }
}

/// Gives the registers values with which the instruction works on the data. Says false if there are none.
pub fn aim(random: &mut Random, insn: &Insn, cpu: &mut TestCpu) -> bool {
    for r in Gpr::ALL {
        let value = random.value();
        cpu.gprs.set(r, value);
    }
    let narrow = insn.address_size == 4;
    let stray = if narrow { random.next() << 32 } else { 0 };
    let target = MIDDLE - 0x100 + random.below(0x200);
    if let Op::String(_) = insn.op {
        let source = MIDDLE - 0x100 + random.below(0x200);
        cpu.gprs.set(Gpr::Rsi, source | stray);
        cpu.gprs.set(Gpr::Rdi, target | stray);
        // RCX of zero with 32-bit addresses clears the upper half on some processors only.
        cpu.gprs.set(Gpr::Rcx, (1 + random.below(20)) | stray);
    }
    let stack = MIDDLE + 0x400 + random.below(0x100);
    cpu.gprs.set(Gpr::Rsp, stack);
    let Some(m) = memory_operand(insn) else {
        return true;
    };
    let bit_index = match (insn.op, insn.src) {
        (Op::Bit(_), Operand::Reg(r)) => Some(r),
        _ => None,
    };
    if let Some(r) = bit_index {
        let index = random.below(1 << 13).wrapping_sub(1 << 12);
        cpu.gprs.set(r, index);
    }
    if let Some(i) = m.index {
        cpu.gprs.set(i, random.below(32));
    }
    let fixed = bit_index == m.base && m.base.is_some();
    match m.base {
        Some(b) if !fixed && b != Gpr::Rsp => {
            let other = if m.index == Some(b) {
                0
            } else {
                m.index.map_or(0, |i| cpu.get(i) << m.scale)
            };
            let mut base = target.wrapping_sub(other).wrapping_sub(m.disp);
            if m.index == Some(b) {
                base = target.wrapping_sub(m.disp) / (1 + (1 << m.scale));
            }
            cpu.gprs.set(b, base.wrapping_add(stray));
        }
        _ => {}
    }
    if bit_index.is_some() && bit_index == m.index {
        return false;
    }
    // Whatever was possible, it has to be in the data.
    let mut address = m.disp;
    if m.rip_relative {
        address = address.wrapping_add(CODE + u64::from(insn.len));
    }
    if let Some(b) = m.base {
        address = address.wrapping_add(cpu.get(b));
    }
    if let Some(i) = m.index {
        address = address.wrapping_add(cpu.get(i) << m.scale);
    }
    if narrow {
        address &= 0xffff_ffff;
    }
    insn.op == Op::Lea || (DATA + 0x800..DATA + DATA_LEN as u64 - 0x800).contains(&address)
}

/// Writes a displacement that leads to the data, where no register can: RIP-relative and absolute addresses. These have the last four
/// bytes before the immediate.
pub fn patch(random: &mut Random, bytes: &mut [u8], insn: &Insn) {
    let Some(m) = memory_operand(insn) else {
        return;
    };
    if m.base.is_some() && m.base != Some(Gpr::Rsp) {
        return;
    }
    let old = (m.disp as u32).to_le_bytes();
    let target = MIDDLE - 0x80 + random.below(0x100);
    let new = if m.rip_relative {
        target.wrapping_sub(CODE + u64::from(insn.len))
    } else if m.base.is_some() {
        random.below(0x100)
    } else {
        target
    };
    let len = usize::from(insn.len);
    if let Some(at) = bytes[..len].windows(4).rposition(|w| w == old) {
        bytes[at..at + 4].copy_from_slice(&(new as u32).to_le_bytes());
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
    let mut address = m.disp;
    address = address.wrapping_add(m.base.map_or(0, |b| cpu.get(b)));
    address = address.wrapping_add(m.index.map_or(0, |i| cpu.get(i) << m.scale));
    let value = memory.get64(address & 0xffff_ffff);
    cpu.gprs.set(Gpr::Rax, value);
    if insn.op == Op::CmpXchg8b {
        cpu.gprs.set(Gpr::Rax, value & 0xffff_ffff);
        cpu.gprs.set(Gpr::Rdx, value >> 32);
    }
}
