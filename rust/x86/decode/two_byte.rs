// SPDX-License-Identifier: GPL-2.0

//! The opcodes after 0F (SDM vol. 2, table A-3).

use super::super::insn::BitOp;
use super::super::insn::DecodeError;
use super::super::insn::Op;
use super::super::insn::ScanOp;
use super::super::insn::Size;
use super::row::Form;
use super::row::Row;
use super::row::Width;
use super::system;
use super::vector;
use super::Decoder;
use super::Prefix;

/// The row of an opcode. 38 and 3A do not come here.
pub(super) fn row(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    let width = Width::of(opcode);
    // Of MOVZX and MOVSX.
    let from = if opcode & 1 == 0 {
        Size::Byte
    } else {
        Size::Word
    };
    Ok(match opcode {
        0x0b | 0xb9 | 0xff => return Err(DecodeError::Invalid),
        // There is nothing, or what needs SMM or SMX: GETSEC, RSM.
        0x04
        | 0x0a
        | 0x0c
        | 0x24..=0x27
        | 0x36
        | 0x37
        | 0x39
        | 0x3b..=0x3f
        | 0xa6
        | 0xa7
        | 0xaa => return Err(DecodeError::Invalid),
        // Prefetches, and what is reserved for hints: memory is not touched, nor is a register.
        0x0d | 0x18..=0x1f => Row::new(Op::Nop, Form::Source, Width::Byte),
        0x40..=0x4f => Row::new(Op::Cmov(opcode & 15), Form::RegRm, Width::Full),
        0x80..=0x8f => Row::new(Op::Branch(opcode & 15), Form::Near, Width::Near),
        0x90..=0x9f => Row::new(Op::Set(opcode & 15), Form::Rm, Width::Byte),
        0xa0 | 0xa8 => Row::new(Op::Push, Form::SegSource, Width::Stack),
        0xa3 => bit(BitOp::Test, Form::RmReg),
        0xa4 => double_shift(true, Form::RmRegCount),
        0xa5 => double_shift(true, Form::RmRegCl),
        0xab => bit(BitOp::Set, Form::RmReg),
        0xac => double_shift(false, Form::RmRegCount),
        0xad => double_shift(false, Form::RmRegCl),
        0xae => return group15(d),
        0xaf => Row::new(Op::Imul, Form::RegRm, Width::Full),
        0xb0 | 0xb1 => Row::new(Op::CmpXchg, Form::RmReg, width).lockable(),
        0xb3 => bit(BitOp::Reset, Form::RmReg),
        0xb6 | 0xb7 => Row::new(Op::MovZx(from), Form::RegRmOf(from), Width::Full),
        0xb8 if d.prefix() == Prefix::F3 => scan(ScanOp::Popcnt),
        0xba => {
            let op = match d.ext()? {
                4 => BitOp::Test,
                5 => BitOp::Set,
                6 => BitOp::Reset,
                7 => BitOp::Complement,
                _ => return Err(DecodeError::Invalid),
            };
            bit(op, Form::RmCount)
        }
        0xbb => bit(BitOp::Complement, Form::RmReg),
        0xbc if d.prefix() == Prefix::F3 => scan(ScanOp::Tzcnt),
        0xbc => scan(ScanOp::Bsf),
        0xbd if d.prefix() == Prefix::F3 => scan(ScanOp::Lzcnt),
        0xbd => scan(ScanOp::Bsr),
        0xbe | 0xbf => Row::new(Op::MovSx(from), Form::RegRmOf(from), Width::Full),
        0xc0 | 0xc1 => Row::new(Op::Xadd, Form::RmReg, width).lockable(),
        // MOVNTI is a hint; it takes no other prefix.
        0xc3 if d.prefix() == Prefix::None => Row::new(Op::Mov, Form::RmReg, Width::Wide).memory(),
        0xc3 => return Err(DecodeError::Invalid),
        // The other extensions are RDRAND and its group.
        0xc7 if d.ext()? == 1 && d.memory()? => {
            let op = if d.rex_w() {
                Op::CmpXchg16b
            } else {
                Op::CmpXchg8b
            };
            Row::new(op, Form::Rm, Width::Fixed(Size::Qword)).lockable()
        }
        0xc8..=0xcf => Row::new(Op::ByteSwap, Form::Low, Width::Full),
        0x00..=0x03
        | 0x05..=0x09
        | 0x20..=0x23
        | 0x30..=0x35
        | 0xa1
        | 0xa2
        | 0xa9
        | 0xb2
        | 0xb4
        | 0xb5 => return system::two_byte(d, opcode),
        _ => return vector::row_0f(d, opcode),
    })
}

fn bit(op: BitOp, form: Form) -> Row {
    Row::new(Op::Bit(op), form, Width::Full).lockable_if(op != BitOp::Test)
}

const fn double_shift(left: bool, form: Form) -> Row {
    Row::new(Op::DoubleShift { left }, form, Width::Full)
}

const fn scan(op: ScanOp) -> Row {
    Row::new(Op::Scan(op), Form::RegRm, Width::Full)
}

/// Flushes and fences; the rest of the group saves and restores state.
fn group15(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    let flush = Row::new(Op::Flush, Form::Source, Width::Byte);
    let fence = Row::new(Op::Nop, Form::Source, Width::Byte);
    Ok(match (d.memory()?, d.ext()?, d.prefix()) {
        // CLFLUSH, CLFLUSHOPT, CLWB.
        (true, 7, Prefix::None | Prefix::P66) | (true, 6, Prefix::P66) => flush,
        // LFENCE, MFENCE, SFENCE.
        (false, 5..=7, Prefix::None) => fence,
        (true, 2 | 3, Prefix::None) => return vector::mxcsr(d),
        _ => return Err(DecodeError::Unsupported),
    })
}
