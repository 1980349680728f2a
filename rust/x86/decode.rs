// SPDX-License-Identifier: GPL-2.0

//! The instruction decoder: bytes in, [`Insn`] out (SDM vol. 2, chapter 2 and appendix A).
//!
//! It knows the instructions with which compilers access memory. It has no state and touches no memory, so that a caller
//! with too few bytes asks again with more.

use super::insn::AluOp;
use super::insn::BitOp;
use super::insn::DecodeError;
use super::insn::Insn;
use super::insn::MemRef;
use super::insn::Op;
use super::insn::Operand;
use super::insn::Rep;
use super::insn::ShiftOp;
use super::insn::Size;
use super::insn::StringOp;
use super::insn::MAX_INSN_LEN;
use super::regs::Gpr;
use super::segment::CpuMode;
use super::segment::SegReg;

/// Decodes the instruction at the start of `bytes`.
///
/// # Errors
///
/// See [`DecodeError`].
pub fn decode(bytes: &[u8], mode: CpuMode) -> Result<Insn, DecodeError> {
    let mut d = Decoder::new(bytes, mode);
    let insn = d.instruction()?;
    Ok(Insn {
        len: d.pos as u8,
        ..insn
    })
}

const REX_B: u8 = 1;
const REX_X: u8 = 2;
const REX_R: u8 = 4;
const REX_W: u8 = 8;

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
}

/// A ModRM byte with what follows it.
#[derive(Clone, Copy)]
struct ModRm {
    /// The register field with REX.R.
    reg: u8,
    /// The register field alone: the extension of the opcode.
    ext: u8,
    rm: Rm,
}

#[derive(Clone, Copy)]
enum Rm {
    /// The register field with REX.B.
    Reg(u8),
    Mem(MemRef),
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
        }
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        if self.pos >= MAX_INSN_LEN {
            return Err(DecodeError::TooLong);
        }
        let byte = *self.bytes.get(self.pos).ok_or(DecodeError::Truncated)?;
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

    /// A signed number of this size, extended to 64 bits.
    fn signed(&mut self, size: Size) -> Result<u64, DecodeError> {
        Ok(size.sign_extend(self.number(size.bytes())?))
    }

    /// The immediate of an instruction with this operand size: of eight bytes only four are given.
    fn immediate(&mut self, size: Size) -> Result<u64, DecodeError> {
        match size {
            Size::Qword => self.signed(Size::Dword),
            other => self.signed(other),
        }
    }

    /// The operand size of instructions that have no byte form.
    fn wide(&self) -> Size {
        if self.rex & REX_W != 0 {
            return Size::Qword;
        }
        match (self.mode.operand_size(), self.operand_override) {
            (2, false) | (4, true) => Size::Word,
            _ => Size::Dword,
        }
    }

    /// The operand size by the low bit of the opcode.
    fn size_of(&self, opcode: u8) -> Size {
        if opcode & 1 == 0 {
            Size::Byte
        } else {
            self.wide()
        }
    }

    /// The operand size of stack instructions: 64-bit code has no 32-bit form.
    fn stack_size(&self) -> Size {
        match (self.mode.is_64bit(), self.wide()) {
            (true, Size::Dword) => Size::Qword,
            (_, size) => size,
        }
    }

    fn register(&self, number: u8, size: Size) -> Operand {
        if size == Size::Byte && self.rex == 0 && (4..8).contains(&number) {
            return Operand::High(Gpr::from_number(number & 3));
        }
        Operand::Reg(Gpr::from_number(number))
    }

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
                0x40..=0x4f if self.mode.is_64bit() => {
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
        if !self.mode.is_64bit() {
            self.seg = Some(seg);
        }
    }

    fn modrm(&mut self) -> Result<ModRm, DecodeError> {
        let byte = self.byte()?;
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

    fn rm_operand(&self, m: ModRm, size: Size) -> Operand {
        match m.rm {
            Rm::Reg(number) => self.register(number, size),
            Rm::Mem(mem) => Operand::Mem(mem),
        }
    }

    /// Puts an instruction together; `len` is set at the end. LOCK is for those that change memory and can be locked.
    fn build(
        &self,
        op: Op,
        size: Size,
        dst: Operand,
        src: Operand,
        lockable: bool,
    ) -> Result<Insn, DecodeError> {
        if self.lock && !(lockable && matches!(dst, Operand::Mem(_))) {
            return Err(DecodeError::Invalid);
        }
        Ok(Insn {
            op,
            len: 0,
            size,
            address_size: self.address_size,
            lock: self.lock,
            rep: self.rep,
            rex: self.rex != 0,
            dst,
            src,
            string_seg: self.seg.unwrap_or(SegReg::Ds),
        })
    }

    fn instruction(&mut self) -> Result<Insn, DecodeError> {
        let opcode = self.prefixes()?;
        let long = self.mode.is_64bit();
        match opcode {
            0x0f => self.two_byte(),
            // ADD, OR, ADC, SBB, AND, SUB, XOR, CMP.
            0x00..=0x3f if opcode & 7 < 6 => {
                let op = AluOp::from_number(opcode >> 3);
                let lockable = op != AluOp::Cmp && opcode & 7 < 2;
                self.two_operands(Op::Alu(op), opcode & 7, lockable)
            }
            0x00..=0x3f => Err(self.unsupported_unless(long)),
            // INC, DEC; in 64-bit mode these are REX prefixes.
            0x40..=0x4f => {
                let op = if opcode < 0x48 { Op::Inc } else { Op::Dec };
                let size = self.wide();
                let dst = self.register(opcode & 7, size);
                self.build(op, size, dst, Operand::None, false)
            }
            0x50..=0x5f => self.push_pop_register(opcode),
            0x63 if long => {
                let m = self.modrm()?;
                let size = self.wide();
                let dst = self.register(m.reg, size);
                // With a 16-bit operand size the source has 16 bits too: nothing is extended.
                let from = if size == Size::Word {
                    Size::Word
                } else {
                    Size::Dword
                };
                let src = self.rm_operand(m, from);
                self.build(Op::MovSx(from), size, dst, src, false)
            }
            0x68 | 0x6a => {
                let size = self.stack_size();
                let imm = if opcode == 0x68 {
                    self.immediate(size)?
                } else {
                    self.signed(Size::Byte)?
                };
                self.build(Op::Push, size, Operand::None, Operand::Imm(imm), false)
            }
            0x69 | 0x6b => {
                // The three-operand IMUL has no place in Insn.
                Err(DecodeError::Unsupported)
            }
            0x80..=0x83 => self.group1(opcode),
            0x84 | 0x85 => self.two_operands(Op::Test, opcode & 1, false),
            0x86 | 0x87 => self.two_operands(Op::Xchg, opcode & 1, true),
            0x88..=0x8b => self.two_operands(Op::Mov, opcode & 3, false),
            0x8c => self.mov_from_segment(),
            0x8d => {
                let m = self.modrm()?;
                let size = self.wide();
                let Rm::Mem(_) = m.rm else {
                    return Err(DecodeError::Invalid);
                };
                let dst = self.register(m.reg, size);
                self.build(Op::Lea, size, dst, self.rm_operand(m, size), false)
            }
            0x8f => {
                let m = self.modrm()?;
                if m.ext != 0 {
                    // XOP of AMD.
                    return Err(DecodeError::Unsupported);
                }
                let size = self.stack_size();
                self.build(
                    Op::Pop,
                    size,
                    self.rm_operand(m, size),
                    Operand::None,
                    false,
                )
            }
            0xa0..=0xa3 => self.mov_absolute(opcode),
            0xa4..=0xa7 | 0xaa..=0xaf => self.string(opcode),
            0xa8 | 0xa9 => {
                let size = self.size_of(opcode);
                let imm = self.immediate(size)?;
                self.build(
                    Op::Test,
                    size,
                    Operand::Reg(Gpr::Rax),
                    Operand::Imm(imm),
                    false,
                )
            }
            0xb0..=0xbf => self.mov_immediate(opcode),
            0xc0 | 0xc1 | 0xd0..=0xd3 => self.group2(opcode),
            0xc6 | 0xc7 => {
                let m = self.modrm()?;
                if m.ext != 0 {
                    // XABORT and XBEGIN, or nothing.
                    return Err(DecodeError::Unsupported);
                }
                let size = self.size_of(opcode);
                let dst = self.rm_operand(m, size);
                let imm = self.immediate(size)?;
                self.build(Op::Mov, size, dst, Operand::Imm(imm), false)
            }
            0xf6 | 0xf7 => self.group3(opcode),
            0xfe | 0xff => self.group45(opcode),
            _ => Err(DecodeError::Unsupported),
        }
    }

    /// What is left of the first quarter: PUSH and POP of segments and the decimal adjustments, gone from 64-bit mode.
    fn unsupported_unless(&self, long: bool) -> DecodeError {
        if long {
            DecodeError::Invalid
        } else {
            DecodeError::Unsupported
        }
    }

    /// The usual six forms: rm,reg of bytes; rm,reg; reg,rm of bytes; reg,rm; AL,imm8; eAX,imm.
    fn two_operands(&mut self, op: Op, form: u8, lockable: bool) -> Result<Insn, DecodeError> {
        let size = self.size_of(form);
        if form >= 4 {
            let imm = self.immediate(size)?;
            return self.build(op, size, Operand::Reg(Gpr::Rax), Operand::Imm(imm), false);
        }
        let m = self.modrm()?;
        let reg = self.register(m.reg, size);
        let rm = self.rm_operand(m, size);
        if form < 2 {
            self.build(op, size, rm, reg, lockable)
        } else {
            self.build(op, size, reg, rm, false)
        }
    }

    fn push_pop_register(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        let number = (opcode & 7) | if self.rex & REX_B != 0 { 8 } else { 0 };
        let size = self.stack_size();
        let reg = Operand::Reg(Gpr::from_number(number));
        if opcode < 0x58 {
            self.build(Op::Push, size, Operand::None, reg, false)
        } else {
            self.build(Op::Pop, size, reg, Operand::None, false)
        }
    }

    fn group1(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        if opcode == 0x82 && self.mode.is_64bit() {
            return Err(DecodeError::Invalid);
        }
        let m = self.modrm()?;
        let size = self.size_of(opcode);
        let dst = self.rm_operand(m, size);
        let imm = if opcode == 0x83 {
            self.signed(Size::Byte)?
        } else {
            self.immediate(size)?
        };
        let op = AluOp::from_number(m.ext);
        self.build(Op::Alu(op), size, dst, Operand::Imm(imm), op != AluOp::Cmp)
    }

    fn group2(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        let m = self.modrm()?;
        let size = self.size_of(opcode);
        let op = match m.ext {
            0 => ShiftOp::Rol,
            1 => ShiftOp::Ror,
            4 | 6 => ShiftOp::Shl,
            5 => ShiftOp::Shr,
            7 => ShiftOp::Sar,
            _ => return Err(DecodeError::Unsupported),
        };
        let dst = self.rm_operand(m, size);
        let src = match opcode {
            0xc0 | 0xc1 => Operand::Imm(self.number(1)?),
            0xd0 | 0xd1 => Operand::Imm(1),
            _ => Operand::Reg(Gpr::Rcx),
        };
        self.build(Op::Shift(op), size, dst, src, false)
    }

    fn group3(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        let m = self.modrm()?;
        let size = self.size_of(opcode);
        let dst = self.rm_operand(m, size);
        match m.ext {
            0 | 1 => {
                let imm = self.immediate(size)?;
                self.build(Op::Test, size, dst, Operand::Imm(imm), false)
            }
            2 => self.build(Op::Not, size, dst, Operand::None, true),
            3 => self.build(Op::Neg, size, dst, Operand::None, true),
            _ => Err(DecodeError::Unsupported),
        }
    }

    fn group45(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        let m = self.modrm()?;
        let size = self.size_of(opcode);
        match m.ext {
            0 => self.build(Op::Inc, size, self.rm_operand(m, size), Operand::None, true),
            1 => self.build(Op::Dec, size, self.rm_operand(m, size), Operand::None, true),
            6 if opcode == 0xff => {
                let size = self.stack_size();
                self.build(
                    Op::Push,
                    size,
                    Operand::None,
                    self.rm_operand(m, size),
                    false,
                )
            }
            7 => Err(DecodeError::Invalid),
            _ if opcode == 0xfe => Err(DecodeError::Invalid),
            _ => Err(DecodeError::Unsupported),
        }
    }

    fn mov_from_segment(&mut self) -> Result<Insn, DecodeError> {
        let m = self.modrm()?;
        let seg = *SegReg::ALL
            .get(usize::from(m.ext))
            .filter(|seg| !matches!(seg, SegReg::Ldtr | SegReg::Tr))
            .ok_or(DecodeError::Invalid)?;
        // Memory takes 16 bits, whatever the operand size.
        let size = match m.rm {
            Rm::Mem(_) => Size::Word,
            Rm::Reg(_) => self.wide(),
        };
        self.build(
            Op::Mov,
            size,
            self.rm_operand(m, size),
            Operand::Seg(seg),
            false,
        )
    }

    fn mov_absolute(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        let size = self.size_of(opcode);
        let address = self.number(self.address_size)?;
        let mem = Operand::Mem(MemRef {
            seg: self.seg.unwrap_or(SegReg::Ds),
            base: None,
            index: None,
            scale: 0,
            disp: address,
            rip_relative: false,
        });
        let rax = Operand::Reg(Gpr::Rax);
        if opcode < 0xa2 {
            self.build(Op::Mov, size, rax, mem, false)
        } else {
            self.build(Op::Mov, size, mem, rax, false)
        }
    }

    fn mov_immediate(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        let number = (opcode & 7) | if self.rex & REX_B != 0 { 8 } else { 0 };
        let size = if opcode < 0xb8 {
            Size::Byte
        } else {
            self.wide()
        };
        // The one instruction with eight bytes of immediate.
        let imm = self.number(size.bytes())?;
        self.build(
            Op::Mov,
            size,
            self.register(number, size),
            Operand::Imm(imm),
            false,
        )
    }

    fn string(&mut self, opcode: u8) -> Result<Insn, DecodeError> {
        let op = match opcode & !1 {
            0xa4 => StringOp::Movs,
            0xa6 => StringOp::Cmps,
            0xaa => StringOp::Stos,
            0xac => StringOp::Lods,
            _ => StringOp::Scas,
        };
        let size = self.size_of(opcode);
        self.build(Op::String(op), size, Operand::None, Operand::None, false)
    }

    fn two_byte(&mut self) -> Result<Insn, DecodeError> {
        let opcode = self.byte()?;
        match opcode {
            0x38 => self.three_byte_38(),
            0x40..=0x4f => {
                let m = self.modrm()?;
                let size = self.wide();
                let dst = self.register(m.reg, size);
                let src = self.rm_operand(m, size);
                self.build(Op::Cmov(opcode & 15), size, dst, src, false)
            }
            0x90..=0x9f => {
                let m = self.modrm()?;
                let dst = self.rm_operand(m, Size::Byte);
                self.build(Op::Set(opcode & 15), Size::Byte, dst, Operand::None, false)
            }
            0xa3 => self.bit_register(BitOp::Test),
            0xab => self.bit_register(BitOp::Set),
            0xb3 => self.bit_register(BitOp::Reset),
            0xbb => self.bit_register(BitOp::Complement),
            0xba => {
                let m = self.modrm()?;
                let op = match m.ext {
                    4 => BitOp::Test,
                    5 => BitOp::Set,
                    6 => BitOp::Reset,
                    7 => BitOp::Complement,
                    _ => return Err(DecodeError::Invalid),
                };
                let size = self.wide();
                let dst = self.rm_operand(m, size);
                let imm = Operand::Imm(self.number(1)?);
                self.build(Op::Bit(op), size, dst, imm, op != BitOp::Test)
            }
            0xae => self.group15(),
            0xaf => {
                let m = self.modrm()?;
                let size = self.wide();
                let dst = self.register(m.reg, size);
                let src = self.rm_operand(m, size);
                self.build(Op::Imul, size, dst, src, false)
            }
            0xb0 | 0xb1 => self.two_operands(Op::CmpXchg, opcode & 1, true),
            0xb6 | 0xb7 | 0xbe | 0xbf => {
                let m = self.modrm()?;
                let from = if opcode & 1 == 0 {
                    Size::Byte
                } else {
                    Size::Word
                };
                let size = self.wide();
                let op = if opcode < 0xb8 {
                    Op::MovZx(from)
                } else {
                    Op::MovSx(from)
                };
                let dst = self.register(m.reg, size);
                self.build(op, size, dst, self.rm_operand(m, from), false)
            }
            0xc0 | 0xc1 => self.two_operands(Op::Xadd, opcode & 1, true),
            0xc3 => {
                // MOVNTI: a hint, memory only, no other prefix.
                let m = self.modrm()?;
                let size = if self.rex & REX_W != 0 {
                    Size::Qword
                } else {
                    Size::Dword
                };
                if !matches!(m.rm, Rm::Mem(_)) || self.operand_override || self.rep != Rep::None {
                    return Err(DecodeError::Invalid);
                }
                let src = self.register(m.reg, size);
                self.build(Op::Mov, size, self.rm_operand(m, size), src, false)
            }
            0xc7 => {
                let m = self.modrm()?;
                if m.ext != 1 || !matches!(m.rm, Rm::Mem(_)) || self.rex & REX_W != 0 {
                    // RDRAND and its group, or CMPXCHG16B.
                    return Err(DecodeError::Unsupported);
                }
                let dst = self.rm_operand(m, Size::Qword);
                self.build(Op::CmpXchg8b, Size::Qword, dst, Operand::None, true)
            }
            0x0b | 0xb9 | 0xff => Err(DecodeError::Invalid),
            _ => Err(DecodeError::Unsupported),
        }
    }

    fn three_byte_38(&mut self) -> Result<Insn, DecodeError> {
        let opcode = self.byte()?;
        if !matches!(opcode, 0xf0 | 0xf1) || self.rep != Rep::None {
            return Err(DecodeError::Unsupported);
        }
        let m = self.modrm()?;
        let size = self.wide();
        let Rm::Mem(_) = m.rm else {
            return Err(DecodeError::Invalid);
        };
        let reg = self.register(m.reg, size);
        let mem = self.rm_operand(m, size);
        if opcode == 0xf0 {
            self.build(Op::MovBe, size, reg, mem, false)
        } else {
            self.build(Op::MovBe, size, mem, reg, false)
        }
    }

    fn bit_register(&mut self, op: BitOp) -> Result<Insn, DecodeError> {
        let m = self.modrm()?;
        let size = self.wide();
        let dst = self.rm_operand(m, size);
        let src = self.register(m.reg, size);
        self.build(Op::Bit(op), size, dst, src, op != BitOp::Test)
    }

    /// CLFLUSH, CLFLUSHOPT and CLWB; the rest of the group saves and restores FPU state.
    fn group15(&mut self) -> Result<Insn, DecodeError> {
        let m = self.modrm()?;
        let flush = match m.ext {
            7 => true,
            6 => self.operand_override,
            _ => false,
        };
        if !flush || self.rep != Rep::None || !matches!(m.rm, Rm::Mem(_)) {
            return Err(DecodeError::Unsupported);
        }
        let src = self.rm_operand(m, Size::Byte);
        self.build(Op::Flush, Size::Byte, Operand::None, src, false)
    }
}
