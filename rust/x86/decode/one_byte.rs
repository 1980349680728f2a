// SPDX-License-Identifier: GPL-2.0

//! The opcodes of one byte (SDM vol. 2, table A-2).

use super::super::insn::AluOp;
use super::super::insn::BcdOp;
use super::super::insn::DecodeError;
use super::super::insn::FlagOp;
use super::super::insn::LoopOp;
use super::super::insn::Op;
use super::super::insn::ShiftOp;
use super::super::insn::Size;
use super::super::insn::StringOp;
use super::super::insn::X87Op;
use super::row::Form;
use super::row::Row;
use super::row::Width;
use super::system;
use super::Decoder;

/// The row of an opcode. 0F, prefixes and VEX do not come here.
pub(super) fn row(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    let width = Width::of(opcode);
    Ok(match opcode {
        0x00..=0x3f if opcode & 7 < 6 => {
            let op = AluOp::from_number(opcode >> 3);
            six_forms(Op::Alu(op), opcode).lockable_if(op != AluOp::Cmp && opcode & 7 < 2)
        }
        0x07 | 0x17 | 0x1f => return system::one_byte(d, opcode),
        // Gone from 64-bit mode: PUSH and POP of segments, the decimal adjustments.
        0x06 | 0x0e | 0x16 | 0x1e => {
            return d.legacy(Ok(Row::new(Op::Push, Form::SegSource, Width::Stack)))
        }
        0x27 => return d.legacy(Ok(bcd(BcdOp::Daa))),
        0x2f => return d.legacy(Ok(bcd(BcdOp::Das))),
        0x37 => return d.legacy(Ok(bcd(BcdOp::Aaa))),
        0x3f => return d.legacy(Ok(bcd(BcdOp::Aas))),
        0x00..=0x3f => return d.legacy(Err(DecodeError::Unsupported)),
        // In 64-bit mode these are REX prefixes.
        0x40..=0x47 => Row::new(Op::Inc, Form::Low, Width::Full),
        0x48..=0x4f => Row::new(Op::Dec, Form::Low, Width::Full),
        0x50..=0x57 => Row::new(Op::Push, Form::LowSource, Width::Stack),
        0x58..=0x5f => Row::new(Op::Pop, Form::Low, Width::Stack),
        0x60 => return d.legacy(Ok(Row::new(Op::PushAll, Form::None, Width::Full))),
        0x61 => return d.legacy(Ok(Row::new(Op::PopAll, Form::None, Width::Full))),
        // With a register it is EVEX, as in 64-bit mode, but nothing in 8086 code, and so is VEX.
        0x62 | 0xc4 | 0xc5 if d.mode.is_8086() && !d.memory()? => return Err(DecodeError::Invalid),
        0x62 if !d.long() && d.memory()? => Row::new(Op::Bound, Form::RegRm, Width::Full),
        0x63 if d.long() => {
            // With a 16-bit operand size the source has 16 bits too: nothing is extended.
            let from = match d.full_size() {
                Size::Word => Size::Word,
                _ => Size::Dword,
            };
            Row::new(Op::MovSx(from), Form::RegRmOf(from), Width::Full)
        }
        0x63 if d.mode.is_8086() => return Err(DecodeError::Invalid),
        0x63 => Row::new(Op::Arpl, Form::RmReg, Width::Fixed(Size::Word)),
        0x68 => Row::new(Op::Push, Form::Imm, Width::Stack),
        0x69 => Row::new(Op::Imul, Form::RegRmImm, Width::Full),
        0x6a => Row::new(Op::Push, Form::Imm8, Width::Stack),
        0x6b => Row::new(Op::Imul, Form::RegRmImm8, Width::Full),
        0x70..=0x7f => Row::new(Op::Branch(opcode & 15), Form::Near8, Width::Near),
        0x80..=0x83 => return group1(d, opcode),
        0x84 | 0x85 => Row::new(Op::Test, Form::RmReg, width),
        0x86 | 0x87 => Row::new(Op::Xchg, Form::RmReg, width).lockable(),
        0x88 | 0x89 => Row::new(Op::Mov, Form::RmReg, width),
        0x8a | 0x8b => Row::new(Op::Mov, Form::RegRm, width),
        // Memory takes 16 bits, whatever the operand size.
        0x8c if d.memory()? => Row::new(Op::Mov, Form::RmSeg, Width::Fixed(Size::Word)),
        0x8c => Row::new(Op::Mov, Form::RmSeg, Width::Full),
        0x8d => Row::new(Op::Lea, Form::RegRm, Width::Full).memory(),
        // The other extensions are XOP, of AMD.
        0x8f if d.ext()? == 0 => Row::new(Op::Pop, Form::Rm, Width::Stack),
        0x90 if !d.rex_b() => Row::new(Op::Nop, Form::None, Width::Full),
        0x90..=0x97 => Row::new(Op::Xchg, Form::LowAcc, Width::Full),
        0x98 => {
            let half = match d.full_size() {
                Size::Byte | Size::Word => Size::Byte,
                Size::Dword => Size::Word,
                Size::Qword => Size::Dword,
            };
            Row::new(Op::MovSx(half), Form::AccAcc, Width::Full)
        }
        0x99 => Row::new(Op::SignToRdx, Form::None, Width::Full),
        0x9b => Row::new(Op::X87(X87Op::Wait), Form::None, Width::Byte),
        0x9c => Row::new(Op::PushFlags, Form::None, Width::Stack),
        0x9d => Row::new(Op::PopFlags, Form::None, Width::Stack),
        0x9e => Row::new(Op::Sahf, Form::None, Width::Byte),
        0x9f => Row::new(Op::Lahf, Form::None, Width::Byte),
        0xa0 | 0xa1 => Row::new(Op::Mov, Form::AccOffset, width),
        0xa2 | 0xa3 => Row::new(Op::Mov, Form::OffsetAcc, width),
        0xa4 | 0xa5 => Row::new(Op::String(StringOp::Movs), Form::None, width),
        0xa6 | 0xa7 => Row::new(Op::String(StringOp::Cmps), Form::None, width),
        0xa8 | 0xa9 => Row::new(Op::Test, Form::AccImm, width),
        0xaa | 0xab => Row::new(Op::String(StringOp::Stos), Form::None, width),
        0xac | 0xad => Row::new(Op::String(StringOp::Lods), Form::None, width),
        0xae | 0xaf => Row::new(Op::String(StringOp::Scas), Form::None, width),
        0xb0..=0xb7 => Row::new(Op::Mov, Form::LowImm, Width::Byte),
        // The one instruction with eight bytes of immediate.
        0xb8..=0xbf => Row::new(Op::Mov, Form::LowImm, Width::Full),
        0xc0 | 0xc1 => return group2(d, opcode, Form::RmCount),
        0xc2 => Row::new(Op::Return, Form::Imm16, Width::Near),
        0xc3 => Row::new(Op::Return, Form::None, Width::Near),
        // The other extensions are XABORT and XBEGIN, or nothing.
        0xc6 | 0xc7 if d.ext()? == 0 => Row::new(Op::Mov, Form::RmImm, width),
        0xc8 => Row::new(Op::Enter, Form::Imm16Count, Width::Stack),
        0xc9 => Row::new(Op::Leave, Form::None, Width::Stack),
        0xd0 | 0xd1 => return group2(d, opcode, Form::RmOne),
        0xd2 | 0xd3 => return group2(d, opcode, Form::RmCl),
        0xd4 => return d.legacy(Ok(Row::new(Op::Bcd(BcdOp::Aam), Form::Count, Width::Byte))),
        0xd5 => return d.legacy(Ok(Row::new(Op::Bcd(BcdOp::Aad), Form::Count, Width::Byte))),
        0xd6 => return d.legacy(Ok(Row::new(Op::Salc, Form::None, Width::Byte))),
        0xd7 => Row::new(Op::Xlat, Form::None, Width::Byte),
        0xd9 | 0xdb | 0xdd | 0xdf => return x87(d, opcode),
        0xe0 => Row::new(Op::Loop(LoopOp::Loopne), Form::Near8, Width::Near),
        0xe1 => Row::new(Op::Loop(LoopOp::Loope), Form::Near8, Width::Near),
        0xe2 => Row::new(Op::Loop(LoopOp::Loop), Form::Near8, Width::Near),
        0xe3 => Row::new(Op::Loop(LoopOp::Jcxz), Form::Near8, Width::Near),
        0xe8 => Row::new(Op::Call, Form::Near, Width::Near),
        0xe9 => Row::new(Op::Jump, Form::Near, Width::Near),
        0xeb => Row::new(Op::Jump, Form::Near8, Width::Near),
        0xf5 => flag(FlagOp::Cmc),
        0xf6 | 0xf7 => return group3(d, opcode),
        0xf8 => flag(FlagOp::Clc),
        0xf9 => flag(FlagOp::Stc),
        0xfc => flag(FlagOp::Cld),
        0xfd => flag(FlagOp::Std),
        0xfe => return group4(d),
        0xff => return group5(d),
        _ => return system::one_byte(d, opcode),
    })
}

/// The usual six: rm,reg of bytes; rm,reg; reg,rm of bytes; reg,rm; AL,imm8; eAX,imm.
fn six_forms(op: Op, opcode: u8) -> Row {
    let form = match opcode & 7 {
        0 | 1 => Form::RmReg,
        2 | 3 => Form::RegRm,
        _ => Form::AccImm,
    };
    Row::new(op, form, Width::of(opcode))
}

const fn bcd(op: BcdOp) -> Row {
    Row::new(Op::Bcd(op), Form::None, Width::Byte)
}

/// The x87's instructions that move none of its numbers.
fn x87(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    let row = |op, form| Row::new(Op::X87(op), form, Width::Fixed(Size::Word));
    Ok(match (opcode, d.memory()?, d.ext()?, d.peek()?) {
        (0xd9, true, 5, _) => row(X87Op::LoadControl, Form::Source),
        (0xd9, true, 7, _) => row(X87Op::StoreControl, Form::Rm),
        (0xdb, false, _, 0xe3) => row(X87Op::Init, Form::Source),
        (0xdd, true, 7, _) => row(X87Op::StoreStatus, Form::Rm),
        (0xdf, false, _, 0xe0) => row(X87Op::StoreStatus, Form::AccModRm),
        _ => return Err(DecodeError::Unsupported),
    })
}

const fn flag(op: FlagOp) -> Row {
    Row::new(Op::Flag(op), Form::None, Width::Byte)
}

fn group1(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    if opcode == 0x82 && d.long() {
        return Err(DecodeError::Invalid);
    }
    let op = AluOp::from_number(d.ext()?);
    let form = if opcode == 0x83 {
        Form::RmImm8
    } else {
        Form::RmImm
    };
    Ok(Row::new(Op::Alu(op), form, Width::of(opcode)).lockable_if(op != AluOp::Cmp))
}

fn group2(d: &Decoder<'_>, opcode: u8, form: Form) -> Result<Row, DecodeError> {
    let op = match d.ext()? {
        0 => ShiftOp::Rol,
        1 => ShiftOp::Ror,
        2 => ShiftOp::Rcl,
        3 => ShiftOp::Rcr,
        4 | 6 => ShiftOp::Shl,
        5 => ShiftOp::Shr,
        _ => ShiftOp::Sar,
    };
    Ok(Row::new(Op::Shift(op), form, Width::of(opcode)))
}

fn group3(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    let width = Width::of(opcode);
    Ok(match d.ext()? {
        0 | 1 => Row::new(Op::Test, Form::RmImm, width),
        2 => Row::new(Op::Not, Form::Rm, width).lockable(),
        3 => Row::new(Op::Neg, Form::Rm, width).lockable(),
        4 => Row::new(Op::Mul { signed: false }, Form::Source, width),
        5 => Row::new(Op::Mul { signed: true }, Form::Source, width),
        6 => Row::new(Op::Div { signed: false }, Form::Source, width),
        _ => Row::new(Op::Div { signed: true }, Form::Source, width),
    })
}

fn group4(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    Ok(match d.ext()? {
        0 => Row::new(Op::Inc, Form::Rm, Width::Byte).lockable(),
        1 => Row::new(Op::Dec, Form::Rm, Width::Byte).lockable(),
        _ => return Err(DecodeError::Invalid),
    })
}

fn group5(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    Ok(match d.ext()? {
        0 => Row::new(Op::Inc, Form::Rm, Width::Full).lockable(),
        1 => Row::new(Op::Dec, Form::Rm, Width::Full).lockable(),
        2 => Row::new(Op::Call, Form::Source, Width::Near),
        4 => Row::new(Op::Jump, Form::Source, Width::Near),
        6 => Row::new(Op::Push, Form::Source, Width::Stack),
        7 => return Err(DecodeError::Invalid),
        3 | 5 => return system::one_byte(d, 0xff),
        _ => return Err(DecodeError::Unsupported),
    })
}
