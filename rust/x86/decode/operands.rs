// SPDX-License-Identifier: GPL-2.0

//! Operands: what the bytes after the opcode select, form by form.

use super::super::insn::DecodeError;
use super::super::insn::MemRef;
use super::super::insn::Op;
use super::super::insn::Operand;
use super::super::insn::Size;
use super::super::insn::VectorSet;
use super::super::regs::Gpr;
use super::super::segment::SegReg;
use super::row::Form;
use super::row::Only;
use super::row::Row;
use super::row::Width;
use super::Decoder;
use super::REX_B;
use super::REX_R;
use super::REX_W;
use super::REX_X;

/// The operands of an instruction.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) dst: Operand,
    pub(super) src: Operand,
    pub(super) src2: Operand,
    pub(super) element: u8,
}

const RAX: Operand = Operand::Reg(Gpr::Rax);

/// A ModRM byte with what follows it.
#[derive(Clone, Copy)]
struct ModRm {
    /// The register field with REX.R.
    reg: u8,
    /// The register field alone.
    ext: u8,
    rm: Rm,
}

#[derive(Clone, Copy)]
enum Rm {
    /// The register field with REX.B.
    Reg(u8),
    Mem(MemRef),
}

impl Decoder<'_> {
    /// A signed number of this size, extended to 64 bits.
    fn signed(&mut self, size: Size) -> Result<u64, DecodeError> {
        Ok(size.sign_extend(self.number(size.bytes())?))
    }

    /// The immediate of an instruction with this operand size: of eight bytes only four are given.
    fn immediate(&mut self, size: Size) -> Result<Operand, DecodeError> {
        let given = match size {
            Size::Qword => Size::Dword,
            other => other,
        };
        Ok(Operand::Imm(self.signed(given)?))
    }

    /// The operand size of instructions that have no byte form.
    pub(super) fn full_size(&self) -> Size {
        if self.rex & REX_W != 0 {
            return Size::Qword;
        }
        match (self.mode.operand_size(), self.operand_override) {
            (2, false) | (4, true) => Size::Word,
            _ => Size::Dword,
        }
    }

    /// The operand size that a row means.
    pub(super) fn size(&self, width: Width) -> Size {
        match width {
            Width::Byte => Size::Byte,
            Width::Full => self.full_size(),
            Width::Wide if self.rex & REX_W != 0 => Size::Qword,
            Width::Wide => Size::Dword,
            Width::Near if self.mode.is_64bit() => Size::Qword,
            Width::Near => self.full_size(),
            Width::Stack => match (self.mode.is_64bit(), self.full_size()) {
                (true, Size::Dword) => Size::Qword,
                (_, size) => size,
            },
            Width::Port => match self.full_size() {
                Size::Word => Size::Word,
                _ => Size::Dword,
            },
            Width::Fixed(size) => size,
        }
    }

    /// The register with this number, of 0 to 15.
    fn register(&self, number: u8, size: Size) -> Operand {
        if size == Size::Byte && self.rex == 0 && (4..8).contains(&number) {
            return Operand::High(Gpr::from_number(number & 3));
        }
        Operand::Reg(Gpr::from_number(number))
    }

    /// The register in the low bits of the opcode.
    fn low_register(&self, size: Size) -> Operand {
        let high = if self.rex & REX_B != 0 { 8 } else { 0 };
        self.register(self.opcode & 7 | high, size)
    }

    fn rm_operand(&self, m: ModRm, size: Size) -> Operand {
        match m.rm {
            Rm::Reg(number) => self.register(number, size),
            Rm::Mem(mem) => Operand::Mem(mem),
        }
    }

    /// What the ModRM byte selects, a general register being a whole one.
    fn rm_general(&self, m: ModRm) -> Operand {
        self.rm_operand(m, Size::Qword)
    }

    fn rm_vector(&self, row: &Row, m: ModRm) -> Operand {
        match m.rm {
            Rm::Reg(number) => self.vector(row, number),
            Rm::Mem(mem) => Operand::Mem(mem),
        }
    }

    /// The vector register with this number. The eight MMX registers have no more for REX to reach.
    fn vector(&self, row: &Row, number: u8) -> Operand {
        match row.op {
            Op::Vector(_, VectorSet::Mmx) => Operand::Mmx(number & 7),
            _ => Operand::Xmm(number & 15),
        }
    }

    /// The general register in VEX.vvvv.
    fn third_register(&self) -> Operand {
        Operand::Reg(Gpr::from_number(self.vex_register()))
    }

    /// The vector register in VEX.vvvv, if there is a VEX prefix.
    fn third_vector(&self) -> Operand {
        match self.vex {
            Some(_) => Operand::Xmm(self.vex_register()),
            None => Operand::None,
        }
    }

    fn vex_register(&self) -> u8 {
        let number = self.vex.map_or(0, |vex| vex.register);
        if self.mode.is_64bit() {
            number & 15
        } else {
            number & 7
        }
    }

    /// Takes the bytes that a row's form asks for.
    pub(super) fn operands(&mut self, row: &Row, size: Size) -> Result<Operands, DecodeError> {
        let none = Operand::None;
        let mut src2 = Operand::None;
        let mut element = 0;
        let (dst, src) = match row.form {
            Form::None => (none, none),
            Form::Rm => (self.rm(row, size)?, none),
            Form::Source => (none, self.rm(row, size)?),
            Form::AccModRm => {
                self.modrm(row.only)?;
                (RAX, none)
            }
            Form::RmReg => {
                let m = self.modrm(row.only)?;
                (self.rm_operand(m, size), self.register(m.reg, size))
            }
            Form::RegRm => {
                let m = self.modrm(row.only)?;
                (self.register(m.reg, size), self.rm_operand(m, size))
            }
            Form::RegRmOf(from) => {
                let m = self.modrm(row.only)?;
                (self.register(m.reg, size), self.rm_operand(m, from))
            }
            Form::RmImm => (self.rm(row, size)?, self.immediate(size)?),
            Form::RmImm8 => (self.rm(row, size)?, self.immediate(Size::Byte)?),
            Form::RmCount => (self.rm(row, size)?, Operand::Imm(self.number(1)?)),
            Form::RmOne => (self.rm(row, size)?, Operand::Imm(1)),
            Form::RmCl => (self.rm(row, size)?, Operand::Reg(Gpr::Rcx)),
            Form::AccImm => (RAX, self.immediate(size)?),
            Form::Low => (self.low_register(size), none),
            Form::LowSource => (none, self.low_register(size)),
            Form::LowImm => {
                let value = self.number(size.bytes())?;
                (self.low_register(size), Operand::Imm(value))
            }
            Form::Imm => (none, self.immediate(size)?),
            Form::Imm8 => (none, self.immediate(Size::Byte)?),
            Form::AccOffset => (RAX, self.offset()?),
            Form::OffsetAcc => (self.offset()?, RAX),
            Form::RmSeg => {
                let m = self.modrm(row.only)?;
                (self.rm_operand(m, size), segment_register(m.ext)?)
            }
            Form::SegRm => {
                let m = self.modrm(row.only)?;
                (segment_register(m.ext)?, self.rm_operand(m, size))
            }
            Form::FarPointer => {
                let offset = self.number(size.bytes())?;
                let selector = self.number(2)?;
                (Operand::Imm(selector), Operand::Imm(offset))
            }
            Form::ImmByte => (none, Operand::Imm(self.number(1)?)),
            Form::GprNumber => {
                let (number, gpr) = self.number_and_gpr()?;
                (gpr, number)
            }
            Form::NumberGpr => self.number_and_gpr()?,
            Form::Skip => {
                self.number(1)?;
                (none, none)
            }
            Form::RegRmImm => {
                let m = self.modrm(row.only)?;
                let rm = self.rm_operand(m, size);
                src2 = self.immediate(size)?;
                (self.register(m.reg, size), rm)
            }
            Form::RegRmImm8 => {
                let m = self.modrm(row.only)?;
                let rm = self.rm_operand(m, size);
                src2 = self.immediate(Size::Byte)?;
                (self.register(m.reg, size), rm)
            }
            Form::RmRegCount => {
                let m = self.modrm(row.only)?;
                src2 = Operand::Imm(self.number(1)?);
                (self.rm_operand(m, size), self.register(m.reg, size))
            }
            Form::RmRegCl => {
                let m = self.modrm(row.only)?;
                src2 = Operand::Reg(Gpr::Rcx);
                (self.rm_operand(m, size), self.register(m.reg, size))
            }
            Form::AccAcc => (RAX, RAX),
            Form::LowAcc => (self.low_register(size), RAX),
            Form::Count => (none, Operand::Imm(self.number(1)?)),
            Form::Imm16 => (none, Operand::Imm(self.number(2)?)),
            Form::Imm16Count => {
                let first = self.number(2)?;
                src2 = Operand::Imm(self.number(1)?);
                (none, Operand::Imm(first))
            }
            Form::Near8 => (none, self.immediate(Size::Byte)?),
            Form::Near => (none, self.immediate(size)?),
            Form::RegRmCount => {
                let m = self.modrm(row.only)?;
                src2 = Operand::Imm(self.number(1)?);
                (self.register(m.reg, size), self.rm_operand(m, size))
            }
            Form::RegVRm => {
                let m = self.modrm(row.only)?;
                src2 = self.rm_operand(m, size);
                (self.register(m.reg, size), self.third_register())
            }
            Form::RegRmV => {
                let m = self.modrm(row.only)?;
                src2 = self.third_register();
                (self.register(m.reg, size), self.rm_operand(m, size))
            }
            Form::VRm => (self.third_register(), self.rm(row, size)?),
            Form::VecRm => {
                let m = self.modrm(row.only)?;
                (self.vector(row, m.reg), self.rm_vector(row, m))
            }
            Form::RmVec => {
                let m = self.modrm(row.only)?;
                (self.rm_vector(row, m), self.vector(row, m.reg))
            }
            Form::VecGpr => {
                let m = self.modrm(row.only)?;
                (self.vector(row, m.reg), self.rm_general(m))
            }
            Form::GprVec => {
                let m = self.modrm(row.only)?;
                (self.rm_general(m), self.vector(row, m.reg))
            }
            Form::VecGprElement => {
                let m = self.modrm(row.only)?;
                element = self.byte()?;
                (self.vector(row, m.reg), self.rm_general(m))
            }
            Form::GprVecElement => {
                let m = self.modrm(row.only)?;
                element = self.byte()?;
                (self.rm_general(m), self.vector(row, m.reg))
            }
            Form::VecRmElement => {
                let m = self.modrm(row.only)?;
                element = self.byte()?;
                (self.vector(row, m.reg), self.rm_vector(row, m))
            }
            Form::RmVecElement => {
                let m = self.modrm(row.only)?;
                element = self.byte()?;
                (self.rm_vector(row, m), self.vector(row, m.reg))
            }
            Form::SegSource => (none, segment_register((self.opcode >> 3) & 7)?),
        };
        if row.third {
            src2 = self.third_vector();
        }
        Ok(Operands {
            dst,
            src,
            src2,
            element,
        })
    }

    fn rm(&mut self, row: &Row, size: Size) -> Result<Operand, DecodeError> {
        let m = self.modrm(row.only)?;
        Ok(self.rm_operand(m, size))
    }

    /// The number of a control or debug register and a general register: whatever the mode bits of the ModRM byte say.
    fn number_and_gpr(&mut self) -> Result<(Operand, Operand), DecodeError> {
        let byte = self.number(1)? as u8;
        let number = (byte >> 3) & 7 | if self.rex & REX_R != 0 { 8 } else { 0 };
        let gpr = byte & 7 | if self.rex & REX_B != 0 { 8 } else { 0 };
        Ok((
            Operand::Imm(number.into()),
            Operand::Reg(Gpr::from_number(gpr)),
        ))
    }

    /// An absolute address, as wide as addresses are.
    fn offset(&mut self) -> Result<Operand, DecodeError> {
        let address = self.number(self.address_size)?;
        Ok(Operand::Mem(MemRef {
            seg: self.seg.unwrap_or(SegReg::Ds),
            base: None,
            index: None,
            scale: 0,
            disp: address,
            rip_relative: false,
        }))
    }

    fn modrm(&mut self, only: Only) -> Result<ModRm, DecodeError> {
        let byte = self.byte()?;
        let refused = match only {
            Only::Any => false,
            Only::Memory => byte >> 6 == 3,
            Only::Register => byte >> 6 != 3,
        };
        if refused {
            return Err(DecodeError::Invalid);
        }
        let ext = (byte >> 3) & 7;
        let rm = byte & 7;
        let reg = ext | if self.rex & REX_R != 0 { 8 } else { 0 };
        let rm = match byte >> 6 {
            3 => Rm::Reg(rm | if self.rex & REX_B != 0 { 8 } else { 0 }),
            mod_ if self.address_size == 2 => Rm::Mem(self.memory16(mod_, rm)?),
            mod_ => Rm::Mem(self.memory32(mod_, rm)?),
        };
        Ok(ModRm { reg, ext, rm })
    }

    fn displacement(&mut self, mod_: u8, full: Size) -> Result<u64, DecodeError> {
        match mod_ {
            0 => Ok(0),
            1 => self.signed(Size::Byte),
            _ => self.signed(full),
        }
    }

    fn memory16(&mut self, mod_: u8, rm: u8) -> Result<MemRef, DecodeError> {
        let (base, index) = match rm {
            0 => (Some(Gpr::Rbx), Some(Gpr::Rsi)),
            1 => (Some(Gpr::Rbx), Some(Gpr::Rdi)),
            2 => (Some(Gpr::Rbp), Some(Gpr::Rsi)),
            3 => (Some(Gpr::Rbp), Some(Gpr::Rdi)),
            4 => (Some(Gpr::Rsi), None),
            5 => (Some(Gpr::Rdi), None),
            6 if mod_ == 0 => (None, None),
            6 => (Some(Gpr::Rbp), None),
            _ => (Some(Gpr::Rbx), None),
        };
        let disp = if base.is_none() {
            self.signed(Size::Word)?
        } else {
            self.displacement(mod_, Size::Word)?
        };
        Ok(MemRef {
            seg: self.segment_for(base),
            base,
            index,
            scale: 0,
            disp,
            rip_relative: false,
        })
    }

    fn memory32(&mut self, mod_: u8, rm: u8) -> Result<MemRef, DecodeError> {
        let mut index = None;
        let mut scale = 0;
        let mut base_number = rm;
        let has_sib = rm == 4;
        if has_sib {
            let sib = self.byte()?;
            scale = sib >> 6;
            let number = ((sib >> 3) & 7) | if self.rex & REX_X != 0 { 8 } else { 0 };
            // The number of RSP says that there is no index; R12 is one.
            if number != 4 {
                index = Some(Gpr::from_number(number));
            }
            base_number = sib & 7;
        }
        let mut rip_relative = false;
        let (base, disp) = if base_number == 5 && mod_ == 0 {
            // No base; without an SIB byte, 64-bit code has RIP there.
            rip_relative = !has_sib && self.mode.is_64bit();
            (None, self.signed(Size::Dword)?)
        } else {
            let high = if self.rex & REX_B != 0 { 8 } else { 0 };
            let disp = self.displacement(mod_, Size::Dword)?;
            (Some(Gpr::from_number(base_number | high)), disp)
        };
        Ok(MemRef {
            seg: self.segment_for(base),
            base,
            index,
            scale,
            disp,
            rip_relative,
        })
    }

    fn segment_for(&self, base: Option<Gpr>) -> SegReg {
        match (self.seg, base) {
            (Some(seg), _) => seg,
            (None, Some(Gpr::Rbp | Gpr::Rsp)) => SegReg::Ss,
            (None, _) => SegReg::Ds,
        }
    }
}

/// The segment register with this number.
fn segment_register(number: u8) -> Result<Operand, DecodeError> {
    let seg = match number {
        0 => SegReg::Es,
        1 => SegReg::Cs,
        2 => SegReg::Ss,
        3 => SegReg::Ds,
        4 => SegReg::Fs,
        5 => SegReg::Gs,
        _ => return Err(DecodeError::Invalid),
    };
    Ok(Operand::Seg(seg))
}
