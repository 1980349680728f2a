// SPDX-License-Identifier: GPL-2.0

//! What an opcode says: a row of the opcode tables.

use super::super::insn::Op;
use super::super::insn::Size;

/// An opcode's instruction: what it does, where its operands are, and what it demands.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) op: Op,
    pub(super) form: Form,
    pub(super) width: Width,
    /// It can be locked, if its destination is memory.
    pub(super) lockable: bool,
    /// Which kind of operand the ModRM byte has to give.
    pub(super) only: Only,
    /// VEX has a third operand, which other forms do without.
    pub(super) third: bool,
}

impl Row {
    pub(super) const fn new(op: Op, form: Form, width: Width) -> Self {
        Self {
            op,
            form,
            width,
            lockable: false,
            only: Only::Any,
            third: false,
        }
    }

    /// The same, with LOCK allowed for a destination in memory.
    pub(super) const fn lockable(mut self) -> Self {
        self.lockable = true;
        self
    }

    /// The same, with a vector register in VEX.vvvv as third operand.
    pub(super) const fn third(mut self) -> Self {
        self.third = true;
        self
    }

    /// The same, with LOCK allowed if `yes`.
    pub(super) const fn lockable_if(mut self, yes: bool) -> Self {
        self.lockable = yes;
        self
    }

    /// The same, for a register operand only.
    pub(super) const fn register(mut self) -> Self {
        self.only = Only::Register;
        self
    }

    /// The same, for a memory operand only.
    pub(super) const fn memory(mut self) -> Self {
        self.only = Only::Memory;
        self
    }
}

/// What a ModRM byte has to name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Only {
    /// A register or memory.
    Any,
    /// Memory: a register is #UD.
    Memory,
    /// A register: memory is #UD.
    Register,
}

/// The size of an instruction's operands.
#[derive(Clone, Copy)]
pub(super) enum Width {
    /// One byte.
    Byte,
    /// Two, four or eight bytes, by prefixes and mode.
    Full,
    /// Four or eight bytes, by REX.W alone.
    Wide,
    /// That of near branches: as `Full`, but eight bytes in 64-bit code whatever the prefix (AMD differs).
    Near,
    /// That of the stack: as `Full`, but there are no four bytes in 64-bit code.
    Stack,
    /// Two or four bytes, by prefixes and mode but for REX.W.
    Port,
    /// Always the same.
    Fixed(Size),
}

impl Width {
    /// A byte, or what the mode says, by the low bit of the opcode.
    pub(super) const fn of(opcode: u8) -> Self {
        if opcode & 1 == 0 {
            Self::Byte
        } else {
            Self::Full
        }
    }
}

/// Where the operands are: the destination, then the sources.
///
/// `Rm` is what the ModRM byte selects, `Reg` its other register, `Low` the register in the low bits of the opcode, `Acc`
/// the accumulator, `V` the register in VEX.vvvv, `Vec` a vector register in the place of `Reg`.
#[derive(Clone, Copy)]
pub(super) enum Form {
    /// There are none, or none that is encoded.
    None,
    /// A destination.
    Rm,
    /// A source.
    Source,
    /// The accumulator, after a ModRM byte that is a part of the opcode.
    AccModRm,
    /// A register to memory or a register.
    RmReg,
    /// Memory or a register to a register.
    RegRm,
    /// The same with a source of another size.
    RegRmOf(Size),
    /// A constant of the operand size, of four bytes for eight.
    RmImm,
    /// A constant of one byte, sign-extended.
    RmImm8,
    /// A constant of one byte, unsigned.
    RmCount,
    /// The constant one.
    RmOne,
    /// The register CL.
    RmCl,
    /// A constant to the accumulator.
    AccImm,
    /// A destination in the opcode.
    Low,
    /// A source in the opcode.
    LowSource,
    /// A constant of the whole operand size, eight bytes too.
    LowImm,
    /// A constant as source.
    Imm,
    /// A constant of one byte as source, sign-extended.
    Imm8,
    /// An absolute address to the accumulator.
    AccOffset,
    /// The accumulator to an absolute address.
    OffsetAcc,
    /// A segment register to memory or a register.
    RmSeg,
    /// Memory or a register to a segment register.
    SegRm,
    /// The selector and the offset of a far pointer.
    FarPointer,
    /// A constant of one byte as source, unsigned.
    ImmByte,
    /// A control or debug register, by number, to a register.
    GprNumber,
    /// A register to a control or debug register.
    NumberGpr,
    /// There are none: the ModRM byte is a part of the opcode.
    Skip,
    /// Memory or a register, and a constant of the operand size, to a register.
    RegRmImm,
    /// The same with a constant of one byte, sign-extended.
    RegRmImm8,
    /// A register and a constant of one byte to memory or a register.
    RmRegCount,
    /// A register and CL to memory or a register.
    RmRegCl,
    /// The accumulator as both.
    AccAcc,
    /// A register in the opcode and the accumulator.
    LowAcc,
    /// A constant of one byte as source, unsigned.
    Count,
    /// A constant of two bytes as source, unsigned.
    Imm16,
    /// One of two bytes, then one of one byte, unsigned.
    Imm16Count,
    /// A displacement from the next instruction, of one byte.
    Near8,
    /// The same, of two or four bytes.
    Near,
    /// A segment register as source, by the bits of the opcode that PUSH and POP have it in.
    SegSource,
    /// Memory or a register, and a constant of one byte, to a register.
    RegRmCount,
    /// Two registers, one of them `V`, to a third.
    RegVRm,
    /// The same, with `V` as the last.
    RegRmV,
    /// Memory or a register to `V`.
    VRm,
    /// Memory or a vector to a vector.
    VecRm,
    /// A vector to memory or a vector.
    RmVec,
    /// Memory or a general register to a vector.
    VecGpr,
    /// A vector to memory or a general register.
    GprVec,
    /// Memory or a general register to an element of a vector.
    VecGprElement,
    /// An element of a vector to memory or a general register.
    GprVecElement,
    /// Memory or a vector to a part of a vector.
    VecRmElement,
    /// A part of a vector to memory or a vector.
    RmVecElement,
}
