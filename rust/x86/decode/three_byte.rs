// SPDX-License-Identifier: GPL-2.0

//! The opcodes after 0F 38 (SDM vol. 2, table A-4) and 0F 3A (table A-5).

use super::super::insn::DecodeError;
use super::super::insn::Op;
use super::super::insn::Size;
use super::row::Form;
use super::row::Row;
use super::row::Width;
use super::system;
use super::vector;
use super::Decoder;
use super::Prefix;

/// The row of an opcode after 0F 38.
pub(super) fn row_38(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    Ok(match (opcode, d.prefix()) {
        (0xf0, Prefix::None | Prefix::P66) => {
            Row::new(Op::MovBe, Form::RegRm, Width::Full).memory()
        }
        (0xf1, Prefix::None | Prefix::P66) => {
            Row::new(Op::MovBe, Form::RmReg, Width::Full).memory()
        }
        (0xf0, Prefix::F2) => Row::new(
            Op::Crc32(Size::Byte),
            Form::RegRmOf(Size::Byte),
            Width::Wide,
        ),
        (0xf1, Prefix::F2) => {
            let from = d.full_size();
            Row::new(Op::Crc32(from), Form::RegRmOf(from), Width::Wide)
        }
        (0x82, Prefix::P66) => system::invpcid(d),
        (0xf6, Prefix::P66) => Row::new(Op::Adcx, Form::RegRm, Width::Wide),
        (0xf6, Prefix::F3) => Row::new(Op::Adox, Form::RegRm, Width::Wide),
        _ => return vector::row_38(d, opcode),
    })
}

/// The row of an opcode after 0F 3A.
pub(super) fn row_3a(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    vector::row_3a(d, opcode)
}
