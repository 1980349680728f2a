// SPDX-License-Identifier: GPL-2.0

//! The opcodes of system instructions, of both maps.

use super::super::insn::system::SystemOp;
use super::super::insn::DecodeError;
use super::super::insn::Op;
use super::super::insn::Size;
use super::super::segment::SegReg;
use super::row::Form;
use super::row::Row;
use super::row::Width;
use super::Decoder;
use super::Prefix;

fn system(op: SystemOp, form: Form, width: Width) -> Row {
    Row::new(Op::System(op), form, width)
}

/// One without operands.
fn plain(op: SystemOp) -> Row {
    system(op, Form::None, Width::Full)
}

const WORD: Width = Width::Fixed(Size::Word);
const BYTE: Width = Width::Byte;

/// An opcode of one byte.
pub(super) fn one_byte(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    use SystemOp as O;
    let full = Width::Full;
    Ok(match opcode {
        0x07 | 0x17 | 0x1f => d.legacy(Ok(system(
            O::PopSegment(by_opcode(opcode)),
            Form::None,
            full,
        )))?,
        0x63 => d.legacy(Ok(system(O::AdjustRpl, Form::RmReg, WORD)))?,
        0x6c | 0x6d => system(O::InString, Form::None, port_width(opcode)),
        0x6e | 0x6f => system(O::OutString, Form::None, port_width(opcode)),
        // MOV to CS is none.
        0x8e if d.ext()? == 1 => return Err(DecodeError::Invalid),
        0x8e => system(O::LoadSegment, Form::SegRm, WORD),
        0x9a => d.legacy(Ok(system(O::FarCall, Form::FarPointer, full)))?,
        // In 64-bit mode these two are VEX prefixes; in others too, if there is no memory operand.
        0xc4 if !d.long() && d.memory()? => far(SegReg::Es),
        0xc5 if !d.long() && d.memory()? => far(SegReg::Ds),
        0xca => system(O::FarReturn, Form::Imm16, full),
        0xcb => system(O::FarReturn, Form::None, full),
        0xcc => plain(O::Breakpoint),
        0xcd => system(O::Interrupt, Form::ImmByte, full),
        0xce => d.legacy(Ok(plain(O::Overflow)))?,
        0xcf => system(O::InterruptReturn, Form::None, full),
        0xe4 | 0xe5 => system(O::In, Form::ImmByte, port_width(opcode)),
        0xe6 | 0xe7 => system(O::Out, Form::ImmByte, port_width(opcode)),
        0xea => d.legacy(Ok(system(O::FarJump, Form::FarPointer, full)))?,
        0xec | 0xed => system(O::In, Form::None, port_width(opcode)),
        0xee | 0xef => system(O::Out, Form::None, port_width(opcode)),
        0xf1 => plain(O::DebugTrap),
        0xf4 => plain(O::Halt),
        0xfa => plain(O::InterruptsOff),
        0xfb => plain(O::InterruptsOn),
        0xff if d.ext()? == 3 => system(O::FarCall, Form::Source, full).memory(),
        0xff if d.ext()? == 5 => system(O::FarJump, Form::Source, full).memory(),
        _ => return Err(DecodeError::Unsupported),
    })
}

/// The segment register of POP.
fn by_opcode(opcode: u8) -> SegReg {
    match (opcode >> 3) & 3 {
        0 => SegReg::Es,
        1 => SegReg::Cs,
        2 => SegReg::Ss,
        _ => SegReg::Ds,
    }
}

/// Ports have no eight bytes.
fn port_width(opcode: u8) -> Width {
    if opcode & 1 == 0 {
        BYTE
    } else {
        Width::Port
    }
}

fn far(seg: SegReg) -> Row {
    system(SystemOp::LoadFar(seg), Form::RegRm, Width::Full).memory()
}

/// An opcode after 0F.
pub(super) fn two_byte(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    use SystemOp as O;
    let full = Width::Full;
    Ok(match opcode {
        0x00 => return group6(d),
        0x01 => return group7(d),
        0x02 => system(O::AccessRights, Form::RegRm, full),
        0x03 => system(O::SegmentLimit, Form::RegRm, full),
        0x05 => plain(O::Syscall),
        0x06 => plain(O::ClearTaskSwitched),
        0x07 => plain(O::Sysret),
        0x08 => plain(O::InvalidateCaches),
        0x09 => plain(O::WriteBackCaches),
        0x20 => system(O::ReadControl, Form::GprNumber, Width::Fixed(Size::Qword)),
        0x21 => system(O::ReadDebug, Form::GprNumber, Width::Fixed(Size::Qword)),
        0x22 => system(O::WriteControl, Form::NumberGpr, Width::Fixed(Size::Qword)),
        0x23 => system(O::WriteDebug, Form::NumberGpr, Width::Fixed(Size::Qword)),
        0x30 => plain(O::WriteMsr),
        0x31 => plain(O::ReadTsc),
        0x32 => plain(O::ReadMsr),
        0x33 => plain(O::ReadCounter),
        0x34 => plain(O::Sysenter),
        0x35 => plain(O::Sysexit),
        0xa1 => system(O::PopSegment(SegReg::Fs), Form::None, Width::Stack),
        0xa2 => plain(O::Identify),
        0xa9 => system(O::PopSegment(SegReg::Gs), Form::None, Width::Stack),
        0xb2 => far(SegReg::Ss),
        0xb4 => far(SegReg::Fs),
        0xb5 => far(SegReg::Gs),
        _ => return Err(DecodeError::Unsupported),
    })
}

/// SLDT, STR, LLDT, LTR, VERR, VERW.
fn group6(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    use SystemOp as O;
    Ok(match d.ext()? {
        0 => system(O::StoreLdt, Form::Rm, Width::Full),
        1 => system(O::StoreTask, Form::Rm, Width::Full),
        2 => system(O::LoadLdt, Form::Source, WORD),
        3 => system(O::LoadTask, Form::Source, WORD),
        4 => system(O::VerifyRead, Form::Source, WORD),
        5 => system(O::VerifyWrite, Form::Source, WORD),
        _ => return Err(DecodeError::Invalid),
    })
}

/// SGDT, SIDT, LGDT, LIDT, SMSW, LMSW, INVLPG, and with a register for memory, many others.
fn group7(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    use SystemOp as O;
    let full = Width::Full;
    let memory = d.memory()?;
    Ok(match d.ext()? {
        0 if memory => system(O::StoreGdt, Form::Rm, full),
        1 if memory => system(O::StoreIdt, Form::Rm, full),
        2 if memory => system(O::LoadGdt, Form::Source, full),
        3 if memory => system(O::LoadIdt, Form::Source, full),
        4 => system(O::StoreMsw, Form::Rm, full),
        6 => system(O::LoadMsw, Form::Source, WORD),
        7 if memory => system(O::InvalidatePage, Form::Source, BYTE),
        _ => return group7_register(d),
    })
}

/// What the group has with a register for memory: each byte is an instruction of its own.
fn group7_register(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    use SystemOp as O;
    let op = match (d.peek()?, d.prefix()) {
        (0xf9, _) => O::ReadTscAux,
        (0xf8, _) if d.long() => O::SwapGs,
        (0xf8, _) => return Err(DecodeError::Invalid),
        (0xc1, Prefix::None) => O::Hypercall,
        // The rest of VMX, of which no guest has any.
        (0xc2..=0xc4, Prefix::None) => return Err(DecodeError::Invalid),
        (0xca, Prefix::None) => O::AccessCheckOn,
        (0xcb, Prefix::None) => O::AccessCheckOff,
        (0xd0, Prefix::None) => O::ReadXcr,
        (0xd1, Prefix::None) => O::WriteXcr,
        _ => return Err(DecodeError::Unsupported),
    };
    Ok(system(op, Form::Skip, Width::Full))
}

/// INVPCID, which has no operand size but that of the mode.
pub(super) fn invpcid(d: &Decoder<'_>) -> Row {
    let size = if d.long() { Size::Qword } else { Size::Dword };
    let width = Width::Fixed(size);
    system(SystemOp::InvalidatePcid, Form::RegRm, width).memory()
}
