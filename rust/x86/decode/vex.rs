// SPDX-License-Identifier: GPL-2.0

//! VEX: a prefix that holds the opcode map, other prefixes and a third register (SDM vol. 2, 2.3), and what is general about it.

use super::super::insn::BmiOp;
use super::super::insn::DecodeError;
use super::super::insn::Op;
use super::super::insn::Rep;
use super::row::Form;
use super::row::Row;
use super::row::Width;
use super::vector;
use super::Decoder;
use super::Prefix;
use super::REX_B;
use super::REX_R;
use super::REX_W;
use super::REX_X;

/// A VEX prefix. Its R, X, B and W are where a REX prefix would be.
#[derive(Clone, Copy)]
pub(super) struct Vex {
    /// The prefix that it stands for.
    pub(super) prefix: Prefix,
    /// The third register.
    pub(super) register: u8,
    /// The vector length: 256 bits.
    pub(super) long: bool,
    /// W, which 32-bit code has too.
    pub(super) w: bool,
}

impl Decoder<'_> {
    /// Whether the byte just taken begins a VEX prefix. Outside of 64-bit mode it is LES or LDS, unless what would be their
    /// ModRM byte named a register.
    pub(super) fn vex_follows(&self) -> Result<bool, DecodeError> {
        if !matches!(self.opcode, 0xc4 | 0xc5) {
            return Ok(false);
        }
        Ok(self.long() || !self.mode.is_8086() && !self.memory()?)
    }

    /// Takes a VEX prefix and the opcode after it.
    pub(super) fn vex_row(&mut self) -> Result<Row, DecodeError> {
        if self.rex != 0 || self.prefix() != Prefix::None || self.operand_override || self.lock {
            return Err(DecodeError::Invalid);
        }
        let short = self.opcode == 0xc5;
        let first = self.byte()?;
        let (map, second) = if short {
            (1, first & 0x7f)
        } else {
            (first & 31, self.byte()?)
        };
        // R, X and B are inverted; the short form has R alone.
        let mut rex = 0;
        for (bit, rex_bit) in [(0x80, REX_R), (0x40, REX_X), (0x20, REX_B)] {
            if first & bit == 0 && (!short || bit == 0x80) {
                rex |= rex_bit;
            }
        }
        let w = second & 0x80 != 0;
        if self.long() {
            self.rex = rex | if w { REX_W } else { 0 };
        }
        self.vex = Some(Vex {
            prefix: match second & 3 {
                0 => Prefix::None,
                1 => Prefix::P66,
                2 => Prefix::F3,
                _ => Prefix::F2,
            },
            register: !(second >> 3) & 15,
            long: second & 4 != 0,
            w,
        });
        self.rep = Rep::None;
        self.opcode = self.byte()?;
        let row = match map {
            1 if self.opcode == 0xae && matches!(self.ext()?, 2 | 3) => vector::mxcsr(self),
            1 => vector::row_0f(self, self.opcode),
            2 => general_38(self, self.opcode),
            3 if self.opcode == 0xf0 => rorx(self),
            3 => vector::row_3a(self, self.opcode),
            _ => Err(DecodeError::Unsupported),
        }?;
        // A third register that the instruction has no use for is not to be named.
        let used = row.third || matches!(row.form, Form::RegVRm | Form::RegRmV | Form::VRm);
        if !used && self.vex.is_some_and(|vex| vex.register != 0) {
            return Err(DecodeError::Invalid);
        }
        Ok(row)
    }

    /// Whether VEX says 256 bits.
    pub(super) fn vex_long(&self) -> bool {
        self.vex.is_some_and(|vex| vex.long)
    }
}

/// The general registers' opcodes of VEX after 0F 38.
fn general_38(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    let (op, form) = match (opcode, d.prefix()) {
        (0xf2, Prefix::None) => (BmiOp::Andn, Form::RegVRm),
        (0xf3, Prefix::None) => match d.ext()? {
            1 => (BmiOp::Blsr, Form::VRm),
            2 => (BmiOp::Blsmsk, Form::VRm),
            3 => (BmiOp::Blsi, Form::VRm),
            _ => return Err(DecodeError::Invalid),
        },
        (0xf5, Prefix::None) => (BmiOp::Bzhi, Form::RegRmV),
        (0xf5, Prefix::F3) => (BmiOp::Pext, Form::RegVRm),
        (0xf5, Prefix::F2) => (BmiOp::Pdep, Form::RegVRm),
        (0xf6, Prefix::F2) if d.vex_long() => return Err(DecodeError::Invalid),
        (0xf6, Prefix::F2) => return Ok(Row::new(Op::Mulx, Form::RegVRm, Width::Wide)),
        (0xf7, Prefix::None) => (BmiOp::Bextr, Form::RegRmV),
        (0xf7, Prefix::P66) => (BmiOp::Shlx, Form::RegRmV),
        (0xf7, Prefix::F3) => (BmiOp::Sarx, Form::RegRmV),
        (0xf7, Prefix::F2) => (BmiOp::Shrx, Form::RegRmV),
        _ => return vector::row_38(d, opcode),
    };
    if d.vex_long() {
        return Err(DecodeError::Invalid);
    }
    Ok(Row::new(Op::Bmi(op), form, Width::Wide))
}

fn rorx(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    if d.prefix() != Prefix::F2 || d.vex_long() {
        return Err(DecodeError::Invalid);
    }
    Ok(Row::new(
        Op::Bmi(BmiOp::Rorx),
        Form::RegRmCount,
        Width::Wide,
    ))
}
