// SPDX-License-Identifier: GPL-2.0

//! The moves of MMX, SSE and AVX: the same opcodes, with and without VEX.

use super::super::insn::DecodeError;
use super::super::insn::Op;
use super::super::insn::Size;
use super::super::insn::VectorOp;
use super::super::insn::VectorSet;
use super::row::Form;
use super::row::Row;
use super::row::Width;
use super::Decoder;
use super::Prefix;

const MOVE: VectorOp = VectorOp::Move { aligned: false };
const ALIGNED: VectorOp = VectorOp::Move { aligned: true };
const LOW_HALF: VectorOp = VectorOp::Half { high: false };
const HIGH_HALF: VectorOp = VectorOp::Half { high: true };
const DWORD: Width = Width::Fixed(Size::Dword);
const QWORD: Width = Width::Fixed(Size::Qword);

impl Decoder<'_> {
    /// The set that an XMM or YMM register belongs to here.
    fn set(&self) -> VectorSet {
        match (&self.vex, self.vex_long()) {
            (None, _) => VectorSet::Sse,
            (Some(_), false) => VectorSet::Avx128,
            (Some(_), true) => VectorSet::Avx256,
        }
    }

    /// A row for vectors of any length.
    fn any_length(&self, op: VectorOp, form: Form, width: Width) -> Result<Row, DecodeError> {
        Ok(Row::new(Op::Vector(op, self.set()), form, width))
    }

    /// A row for a part of sixteen bytes, where VEX must not say more.
    fn short(&self, op: VectorOp, form: Form, width: Width) -> Result<Row, DecodeError> {
        if self.vex_long() {
            return Err(DecodeError::Invalid);
        }
        self.any_length(op, form, width)
    }

    /// A row for a scalar, where what VEX says of the length does not matter.
    fn scalar(&self, op: VectorOp, form: Form, width: Width) -> Result<Row, DecodeError> {
        let set = match self.set() {
            VectorSet::Avx256 => VectorSet::Avx128,
            other => other,
        };
        Ok(Row::new(Op::Vector(op, set), form, width))
    }

    /// A row of MMX, which VEX has not.
    fn mmx(&self, op: VectorOp, form: Form, width: Width) -> Result<Row, DecodeError> {
        if self.vex.is_some() {
            return Err(DecodeError::Invalid);
        }
        Ok(Row::new(Op::Vector(op, VectorSet::Mmx), form, width))
    }

    /// A row that only VEX has, with W clear.
    fn avx(&self, op: VectorOp, form: Form, width: Width) -> Result<Row, DecodeError> {
        match self.vex {
            None => Err(DecodeError::Unsupported),
            Some(vex) if vex.w => Err(DecodeError::Invalid),
            Some(_) => self.any_length(op, form, width),
        }
    }
}

/// The row of an opcode after 0F.
pub(super) fn row_0f(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    use Prefix::None as Np;
    use Prefix::F2;
    use Prefix::F3;
    use Prefix::P66;
    let full = Width::Full;
    match (opcode, d.prefix()) {
        // MOVUPS, MOVUPD.
        (0x10, Np | P66) => d.any_length(MOVE, Form::VecRm, full),
        (0x11, Np | P66) => d.any_length(MOVE, Form::RmVec, full),
        // MOVSS, MOVSD.
        (0x10, F3) => scalar_load(d, DWORD),
        (0x10, F2) => scalar_load(d, QWORD),
        (0x11, F3) => scalar_store(d, DWORD),
        (0x11, F2) => scalar_store(d, QWORD),
        // MOVLPS, MOVLPD, MOVHPS, MOVHPD; without memory MOVHLPS and MOVLHPS.
        (0x12, Np) => Ok(d.short(LOW_HALF, Form::VecRm, QWORD)?.third()),
        (0x12, P66) => Ok(d.short(LOW_HALF, Form::VecRm, QWORD)?.third().memory()),
        (0x16, Np) => Ok(d.short(HIGH_HALF, Form::VecRm, QWORD)?.third()),
        (0x16, P66) => Ok(d.short(HIGH_HALF, Form::VecRm, QWORD)?.third().memory()),
        (0x13, Np | P66) => Ok(d.short(LOW_HALF, Form::RmVec, QWORD)?.memory()),
        (0x17, Np | P66) => Ok(d.short(HIGH_HALF, Form::RmVec, QWORD)?.memory()),
        // MOVAPS, MOVAPD, MOVNTPS, MOVNTPD.
        (0x28, Np | P66) => d.any_length(ALIGNED, Form::VecRm, full),
        (0x29, Np | P66) => d.any_length(ALIGNED, Form::RmVec, full),
        (0x2b, Np | P66) => Ok(d.any_length(ALIGNED, Form::RmVec, full)?.memory()),
        // MOVD and MOVQ with a general register.
        (0x6e, Np) => d.mmx(VectorOp::Low, Form::VecGpr, Width::Wide),
        (0x6e, P66) => d.short(VectorOp::Low, Form::VecGpr, Width::Wide),
        (0x7e, Np) => d.mmx(VectorOp::Low, Form::GprVec, Width::Wide),
        (0x7e, P66) => d.short(VectorOp::Low, Form::GprVec, Width::Wide),
        // MOVQ.
        (0x7e, F3) => d.short(VectorOp::Low, Form::VecRm, QWORD),
        (0xd6, P66) => d.short(VectorOp::Low, Form::RmVec, QWORD),
        (0x6f, Np) => d.mmx(MOVE, Form::VecRm, QWORD),
        (0x7f, Np) => d.mmx(MOVE, Form::RmVec, QWORD),
        // MOVDQA, MOVDQU.
        (0x6f, P66) => d.any_length(ALIGNED, Form::VecRm, full),
        (0x6f, F3) => d.any_length(MOVE, Form::VecRm, full),
        (0x7f, P66) => d.any_length(ALIGNED, Form::RmVec, full),
        (0x7f, F3) => d.any_length(MOVE, Form::RmVec, full),
        // PINSRW.
        (0xc4, Np) => d.mmx(
            VectorOp::Insert,
            Form::VecGprElement,
            Width::Fixed(Size::Word),
        ),
        (0xc4, P66) => Ok(d
            .short(
                VectorOp::Insert,
                Form::VecGprElement,
                Width::Fixed(Size::Word),
            )?
            .third()),
        // MOVNTQ, MOVNTDQ, LDDQU.
        (0xe7, Np) => Ok(d.mmx(MOVE, Form::RmVec, QWORD)?.memory()),
        (0xe7, P66) => Ok(d.any_length(ALIGNED, Form::RmVec, full)?.memory()),
        (0xf0, F2) => Ok(d.any_length(MOVE, Form::VecRm, full)?.memory()),
        // MASKMOVQ, MASKMOVDQU.
        (0xf7, Np) => Ok(d.mmx(VectorOp::MaskStore, Form::VecRm, QWORD)?.register()),
        (0xf7, P66) => Ok(d.short(VectorOp::MaskStore, Form::VecRm, QWORD)?.register()),
        _ => Err(DecodeError::Unsupported),
    }
}

/// From memory the rest is cleared; from a register it is another's, or stays.
fn scalar_load(d: &Decoder<'_>, width: Width) -> Result<Row, DecodeError> {
    if d.memory()? {
        return d.scalar(VectorOp::Low, Form::VecRm, width);
    }
    Ok(d.scalar(VectorOp::Merge, Form::VecRm, width)?.third())
}

fn scalar_store(d: &Decoder<'_>, width: Width) -> Result<Row, DecodeError> {
    if d.memory()? {
        return d.scalar(VectorOp::Low, Form::RmVec, width);
    }
    Ok(d.scalar(VectorOp::Merge, Form::RmVec, width)?.third())
}

/// LDMXCSR and STMXCSR.
pub(super) fn mxcsr(d: &Decoder<'_>) -> Result<Row, DecodeError> {
    if d.prefix() != Prefix::None || d.vex_long() {
        return Err(DecodeError::Invalid);
    }
    let (op, form) = if d.ext()? == 2 {
        (Op::LoadMxcsr(d.set()), Form::Source)
    } else {
        (Op::StoreMxcsr(d.set()), Form::Rm)
    };
    Ok(Row::new(op, form, DWORD).memory())
}

/// The row of an opcode after 0F 38.
pub(super) fn row_38(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    if d.prefix() != Prefix::P66 {
        return Err(DecodeError::Unsupported);
    }
    let full = Width::Full;
    match opcode {
        // VBROADCASTSS, VBROADCASTSD, VBROADCASTF128.
        0x18 => d.avx(VectorOp::Broadcast(4), Form::VecRm, full),
        0x19 if d.vex_long() => d.avx(VectorOp::Broadcast(8), Form::VecRm, full),
        0x1a if d.vex_long() => Ok(d.avx(VectorOp::Broadcast(16), Form::VecRm, full)?.memory()),
        // MOVNTDQA.
        0x2a => Ok(d.any_length(ALIGNED, Form::VecRm, full)?.memory()),
        // VPBROADCASTD, VPBROADCASTQ, VBROADCASTI128, VPBROADCASTB, VPBROADCASTW.
        0x58 => d.avx(VectorOp::Broadcast(4), Form::VecRm, full),
        0x59 => d.avx(VectorOp::Broadcast(8), Form::VecRm, full),
        0x5a if d.vex_long() => Ok(d.avx(VectorOp::Broadcast(16), Form::VecRm, full)?.memory()),
        0x78 => d.avx(VectorOp::Broadcast(1), Form::VecRm, full),
        0x79 => d.avx(VectorOp::Broadcast(2), Form::VecRm, full),
        _ => Err(DecodeError::Unsupported),
    }
}

/// The row of an opcode after 0F 3A.
pub(super) fn row_3a(d: &Decoder<'_>, opcode: u8) -> Result<Row, DecodeError> {
    if d.prefix() != Prefix::P66 {
        return Err(DecodeError::Unsupported);
    }
    let byte = Width::Byte;
    let word = Width::Fixed(Size::Word);
    match opcode {
        // PEXTRB, PEXTRW, PEXTRD and PEXTRQ, EXTRACTPS.
        0x14 => d.short(VectorOp::Extract, Form::GprVecElement, byte),
        0x15 => d.short(VectorOp::Extract, Form::GprVecElement, word),
        0x16 => d.short(VectorOp::Extract, Form::GprVecElement, Width::Wide),
        0x17 => d.short(VectorOp::Extract, Form::GprVecElement, DWORD),
        // PINSRB, PINSRD and PINSRQ.
        0x20 => Ok(d
            .short(VectorOp::Insert, Form::VecGprElement, byte)?
            .third()),
        0x22 => Ok(d
            .short(VectorOp::Insert, Form::VecGprElement, Width::Wide)?
            .third()),
        // VINSERTF128, VEXTRACTF128, VINSERTI128, VEXTRACTI128.
        0x18 | 0x38 if d.vex_long() => Ok(d
            .avx(VectorOp::Insert128, Form::VecRmElement, Width::Full)?
            .third()),
        0x19 | 0x39 if d.vex_long() => d.avx(VectorOp::Extract128, Form::RmVecElement, Width::Full),
        _ => Err(DecodeError::Unsupported),
    }
}
