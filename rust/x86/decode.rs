// SPDX-License-Identifier: GPL-2.0

//! The instruction decoder: bytes in, [`Insn`] out (SDM vol. 2, chapter 2 and appendix A).
//!
//! It has no state and touches no memory, so that a caller with too few bytes asks again with more.
//!
//! Prefixes are taken here. Then a table says what the opcode means: [`one_byte`], [`two_byte`] after 0F, [`three_byte`]
//! after 0F 38 and 0F 3A, [`vector`] for those of them that move vectors, [`vex`] for those that only VEX has. A table is a `match` whose arms are [`row::Row`]s: what the instruction does ([`Op`](
//! super::insn::Op)), where its operands are ([`row::Form`]), how wide they are ([`row::Width`]) and what it demands. An arm may look
//! at prefixes, the mode and, without taking it, the ModRM byte. [`operands`] then takes the bytes that the form asks for.
//!
//! So an opcode is added by an arm in its table; an `Op` if there is none that fits, with what it does in the emulator; and a `Form` if
//! its operands are where no other's are.

mod one_byte;
mod operands;
mod row;
mod system;
mod three_byte;
mod two_byte;
mod vector;
mod vex;

use self::row::Row;
use self::vex::Vex;
use super::insn::DecodeError;
use super::insn::Insn;
use super::insn::Operand;
use super::insn::Rep;
use super::insn::MAX_INSN_LEN;
use super::segment::CpuMode;
use super::segment::SegReg;

/// Decodes the instruction at the start of `bytes`.
///
/// # Errors
///
/// See [`DecodeError`].
pub fn decode(bytes: &[u8], mode: CpuMode) -> Result<Insn, DecodeError> {
    Decoder::new(bytes, mode).instruction()
}

const REX_B: u8 = 1;
const REX_X: u8 = 2;
const REX_R: u8 = 4;
const REX_W: u8 = 8;

/// The prefix that is a part of some opcodes. F2 and F3 win over 66.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Prefix {
    None,
    P66,
    F3,
    F2,
}

struct Decoder<'a> {
    bytes: &'a [u8],
    /// How many were taken: at most [`MAX_INSN_LEN`].
    pos: usize,
    mode: CpuMode,
    /// The REX prefix, or zero.
    rex: u8,
    operand_override: bool,
    lock: bool,
    rep: Rep,
    seg: Option<SegReg>,
    address_size: u8,
    /// The last byte of the opcode.
    opcode: u8,
    /// The VEX prefix.
    vex: Option<Vex>,
}

impl<'a> Decoder<'a> {
    fn new(bytes: &'a [u8], mode: CpuMode) -> Self {
        Self {
            bytes,
            pos: 0,
            mode,
            rex: 0,
            operand_override: false,
            lock: false,
            rep: Rep::None,
            seg: None,
            address_size: mode.address_size(),
            opcode: 0,
            vex: None,
        }
    }

    /// The next byte, not taken.
    fn peek(&self) -> Result<u8, DecodeError> {
        if self.pos >= MAX_INSN_LEN {
            return Err(DecodeError::TooLong);
        }
        self.bytes
            .get(self.pos)
            .copied()
            .ok_or(DecodeError::Truncated)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte = self.peek()?;
        self.pos = self.pos.wrapping_add(1);
        Ok(byte)
    }

    /// A little-endian number of `len` bytes, 1 to 8, zero-extended.
    fn number(&mut self, len: u8) -> Result<u64, DecodeError> {
        let mut raw = [0; 8];
        for slot in raw.iter_mut().take(usize::from(len)) {
            *slot = self.byte()?;
        }
        Ok(u64::from_le_bytes(raw))
    }

    /// For the tables: whether the code is 64-bit.
    fn long(&self) -> bool {
        self.mode.is_64bit()
    }

    /// For the tables: what is no instruction in 64-bit code.
    fn legacy(&self, row: Result<Row, DecodeError>) -> Result<Row, DecodeError> {
        if self.long() {
            Err(DecodeError::Invalid)
        } else {
            row
        }
    }

    /// For the tables: the register field of the ModRM byte that follows, an extension of the opcode.
    fn ext(&self) -> Result<u8, DecodeError> {
        Ok((self.peek()? >> 3) & 7)
    }

    /// For the tables: whether the ModRM byte that follows, a part of the opcode, is this.
    fn modrm_is(&self, byte: u8) -> Result<bool, DecodeError> {
        Ok(self.peek()? == byte)
    }

    /// For the tables: whether the ModRM byte that follows selects memory.
    fn memory(&self) -> Result<bool, DecodeError> {
        Ok(self.peek()? >> 6 != 3)
    }

    /// For the tables: the prefix that is a part of the opcode.
    fn prefix(&self) -> Prefix {
        if let Some(vex) = self.vex {
            return vex.prefix;
        }
        match (self.rep, self.operand_override) {
            (Rep::Repne, _) => Prefix::F2,
            (Rep::Repe, _) => Prefix::F3,
            (Rep::None, true) => Prefix::P66,
            (Rep::None, false) => Prefix::None,
        }
    }

    /// For the tables: whether there is a REX.W.
    fn rex_w(&self) -> bool {
        self.rex & REX_W != 0
    }

    /// For the tables: whether there is a REX.B.
    fn rex_b(&self) -> bool {
        self.rex & REX_B != 0
    }

    /// Takes the prefixes and the first byte of the opcode.
    fn prefixes(&mut self) -> Result<u8, DecodeError> {
        loop {
            let byte = self.byte()?;
            match byte {
                0x26 => self.legacy_segment(SegReg::Es),
                0x2e => self.legacy_segment(SegReg::Cs),
                0x36 => self.legacy_segment(SegReg::Ss),
                0x3e => self.legacy_segment(SegReg::Ds),
                0x64 => self.seg = Some(SegReg::Fs),
                0x65 => self.seg = Some(SegReg::Gs),
                0x66 => self.operand_override = true,
                0x67 => {
                    self.address_size = match self.mode.address_size() {
                        2 => 4,
                        4 => 2,
                        _ => 4,
                    };
                }
                0xf0 => self.lock = true,
                0xf2 => self.rep = Rep::Repne,
                0xf3 => self.rep = Rep::Repe,
                0x40..=0x4f if self.long() => {
                    self.rex = byte;
                    continue;
                }
                opcode => return Ok(opcode),
            }
            // A REX prefix counts only right before the opcode.
            self.rex = 0;
        }
    }

    /// In 64-bit mode the prefixes of the four segments without a base are ignored: they do not even cancel another.
    fn legacy_segment(&mut self, seg: SegReg) {
        if !self.long() {
            self.seg = Some(seg);
        }
    }

    /// Takes the rest of the opcode and finds its row.
    fn row(&mut self) -> Result<Row, DecodeError> {
        self.opcode = self.prefixes()?;
        if self.vex_follows()? {
            return self.vex_row();
        }
        if self.opcode != 0x0f {
            return one_byte::row(self, self.opcode);
        }
        self.opcode = self.byte()?;
        match self.opcode {
            0x38 => {
                self.opcode = self.byte()?;
                three_byte::row_38(self, self.opcode)
            }
            0x3a => {
                self.opcode = self.byte()?;
                three_byte::row_3a(self, self.opcode)
            }
            opcode => two_byte::row(self, opcode),
        }
    }

    fn instruction(&mut self) -> Result<Insn, DecodeError> {
        let row = self.row()?;
        let size = self.size(row.width);
        let operands = self.operands(&row, size)?;
        if self.lock && !(row.lockable && matches!(operands.dst, Operand::Mem(_))) {
            return Err(DecodeError::Invalid);
        }
        Ok(Insn {
            op: row.op,
            len: self.pos as u8,
            size,
            address_size: self.address_size,
            lock: self.lock,
            rep: self.rep,
            rex: self.rex != 0,
            dst: operands.dst,
            src: operands.src,
            src2: operands.src2,
            element: operands.element,
            string_seg: self.seg.unwrap_or(SegReg::Ds),
        })
    }
}
