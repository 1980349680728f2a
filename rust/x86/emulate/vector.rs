// SPDX-License-Identifier: GPL-2.0

//! Moves of vectors, and the control registers of their units.
//!
//! An instruction either loads a vector register or stores memory. So the registers can be changed at once when memory
//! has been read: nothing can stop the instruction then.

use super::super::exception::Fault;
use super::super::exception::Vector;
use super::super::insn::Insn;
use super::super::insn::Operand;
use super::super::insn::Size;
use super::super::insn::VectorOp;
use super::super::insn::VectorSet;
use super::super::insn::X87Op;
use super::super::paging::GuestMemory;
use super::super::regs::Cr0;
use super::super::regs::Cr4;
use super::super::regs::Gpr;
use super::super::regs::Xcr0;
use super::super::segment::AccessKind;
use super::access::address_mask;
use super::access::Run;
use super::access::Stop;
use super::Cpu;

/// The bits of MXCSR that exist.
const MXCSR_MASK: u32 = 0xffff;
/// The x87's status: an exception is pending.
const STATUS_ES: u16 = 1 << 7;

const fn fault(vector: Vector) -> Fault {
    Fault {
        vector,
        error: None,
        cr2: None,
    }
}

/// The bytes of a vector.
type Bytes = [u8; 32];

fn to_bytes(value: [u64; 4]) -> Bytes {
    let mut bytes = [0; 32];
    for (part, value) in bytes.chunks_exact_mut(8).zip(value) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn from_bytes(bytes: &Bytes) -> [u64; 4] {
    let mut value = [0; 4];
    for (slot, part) in value.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut raw = [0; 8];
        for (to, from) in raw.iter_mut().zip(part) {
            *to = *from;
        }
        *slot = u64::from_le_bytes(raw);
    }
    value
}

/// `len` bytes of `new` into `old` at `at`.
fn replace(old: [u64; 4], at: usize, len: usize, new: [u64; 4]) -> [u64; 4] {
    let mut bytes = to_bytes(old);
    for (to, from) in bytes.iter_mut().skip(at).take(len).zip(to_bytes(new)) {
        *to = from;
    }
    from_bytes(&bytes)
}

impl<C: Cpu, M: GuestMemory> Run<'_, C, M> {
    /// The checks before an instruction on vectors (SDM vol. 3, 14.1, and vol. 2, 2.4).
    fn check_vector(&mut self, set: VectorSet) -> Result<(), Stop<M::Error>> {
        let enabled = match set {
            VectorSet::Mmx => !self.cr0().has(Cr0::EM),
            VectorSet::Sse => !self.cr0().has(Cr0::EM) && self.cr4().has(Cr4::OSFXSR),
            VectorSet::Avx128 | VectorSet::Avx256 => {
                self.cr4().has(Cr4::OSXSAVE)
                    && Xcr0::new(self.cpu().xcr0()).has(Xcr0::SSE | Xcr0::AVX)
            }
        };
        if !enabled {
            return Err(Fault::UD.into());
        }
        if self.cr0().has(Cr0::TS) {
            return Err(fault(Vector::NM).into());
        }
        if set == VectorSet::Mmx {
            self.check_pending()?;
        }
        Ok(())
    }

    /// #MF for an exception that the x87 has pending. Without CR0.NE it would be an interrupt of the chipset's.
    fn check_pending(&mut self) -> Result<(), Stop<M::Error>> {
        if self.cpu().fpu_status() & STATUS_ES == 0 {
            return Ok(());
        }
        if self.cr0().has(Cr0::NE) {
            return Err(fault(Vector::MF).into());
        }
        Err(Stop::Unhandled)
    }

    /// The value of a vector register.
    fn vector_register(&mut self, n: u8, set: VectorSet) -> [u64; 4] {
        match set {
            VectorSet::Mmx => [self.cpu().mmx(n), 0, 0, 0],
            VectorSet::Sse | VectorSet::Avx128 => {
                let [low, high] = self.cpu().xmm(n);
                [low, high, 0, 0]
            }
            VectorSet::Avx256 => self.cpu().ymm(n),
        }
    }

    fn set_vector_register(&mut self, n: u8, set: VectorSet, value: [u64; 4]) {
        let [low, high, ..] = value;
        match set {
            VectorSet::Mmx => self.cpu().set_mmx(n, low),
            VectorSet::Sse => self.cpu().set_xmm(n, [low, high]),
            VectorSet::Avx128 => self.cpu().set_ymm(n, [low, high, 0, 0]),
            VectorSet::Avx256 => self.cpu().set_ymm(n, value),
        }
    }

    /// `len` bytes of an operand. Of a register it is all, or as much as the set has.
    fn vector_value(
        &mut self,
        insn: &Insn,
        operand: Operand,
        set: VectorSet,
        len: u8,
        aligned: bool,
    ) -> Result<[u64; 4], Stop<M::Error>> {
        match operand {
            Operand::Mem(mem) => {
                let offset = self.effective_address(insn, &mem, 0);
                let align = aligned.then_some(len);
                let wide = self.wide_target(mem.seg, offset, len, align, AccessKind::Read)?;
                self.load_wide(&wide)
            }
            Operand::Xmm(n) | Operand::Mmx(n) => Ok(self.vector_register(n, set)),
            other => Ok([self.register(other, Size::Qword)?, 0, 0, 0]),
        }
    }

    /// The first `len` bytes of a value go to an operand; a general register is cleared above, as if four bytes were the
    /// least.
    fn set_vector_value(
        &mut self,
        insn: &Insn,
        operand: Operand,
        set: VectorSet,
        len: u8,
        aligned: bool,
        value: impl FnOnce(&mut Self) -> [u64; 4],
    ) -> Result<(), Stop<M::Error>> {
        match operand {
            Operand::Mem(mem) => {
                let offset = self.effective_address(insn, &mem, 0);
                let align = aligned.then_some(len);
                let wide = self.wide_target(mem.seg, offset, len, align, AccessKind::Write)?;
                let value = value(self);
                self.store_wide(&wide, value)
            }
            Operand::Xmm(n) | Operand::Mmx(n) => {
                let value = replace([0; 4], 0, len.into(), value(self));
                self.set_vector_register(n, set, value);
                Ok(())
            }
            other => {
                let [low, ..] = replace([0; 4], 0, len.into(), value(self));
                self.set_register(other, Size::Qword, low)
            }
        }
    }

    /// What stays of the destination: the third operand's bytes, or its own.
    fn background(
        &mut self,
        insn: &Insn,
        set: VectorSet,
        own: Operand,
    ) -> Result<[u64; 4], Stop<M::Error>> {
        match (insn.src2, own) {
            (Operand::Xmm(n) | Operand::Mmx(n), _)
            | (Operand::None, Operand::Xmm(n) | Operand::Mmx(n)) => {
                Ok(self.vector_register(n, set))
            }
            _ => Err(Stop::Unhandled),
        }
    }

    /// The vector register that an operand has to be.
    fn vector_operand(
        &mut self,
        operand: Operand,
        set: VectorSet,
    ) -> Result<[u64; 4], Stop<M::Error>> {
        match operand {
            Operand::Xmm(n) | Operand::Mmx(n) => Ok(self.vector_register(n, set)),
            _ => Err(Stop::Unhandled),
        }
    }

    pub(super) fn vector(
        &mut self,
        insn: &Insn,
        op: VectorOp,
        set: VectorSet,
    ) -> Result<(), Stop<M::Error>> {
        self.check_vector(set)?;
        let len = set.bytes();
        let size = insn.size.bytes();
        match op {
            VectorOp::Move { aligned } => self.vector_move(insn, set, len, aligned),
            VectorOp::Low => self.vector_move(insn, set, size, false),
            VectorOp::Merge => {
                let new = self.vector_operand(insn.src, set)?;
                let old = self.background(insn, set, insn.dst)?;
                let value = replace(old, 0, size.into(), new);
                self.set_vector_value(insn, insn.dst, set, len, false, |_| value)
            }
            VectorOp::Half { high } => self.vector_half(insn, set, high),
            VectorOp::Broadcast(part) => {
                let new = self.vector_value(insn, insn.src, set, part, false)?;
                let mut value = new;
                for at in (0..len.into()).step_by(usize::from(part.max(1))) {
                    value = replace(value, at, part.into(), new);
                }
                self.set_vector_value(insn, insn.dst, set, len, false, |_| value)
            }
            VectorOp::Insert => {
                let new = self.vector_value(insn, insn.src, set, size, false)?;
                let old = self.background(insn, set, insn.dst)?;
                let at = element_offset(insn, set, size);
                let value = replace(old, at, size.into(), new);
                self.set_vector_value(insn, insn.dst, set, len, false, |_| value)
            }
            VectorOp::Extract => {
                let at = element_offset(insn, set, size);
                let value = part(self.vector_operand(insn.src, set)?, at);
                self.set_vector_value(insn, insn.dst, set, size, false, |_| value)
            }
            VectorOp::Insert128 => {
                let new = self.vector_value(insn, insn.src, set, 16, false)?;
                let old = self.background(insn, set, insn.dst)?;
                let value = replace(old, element_offset(insn, set, 16), 16, new);
                self.set_vector_value(insn, insn.dst, set, len, false, |_| value)
            }
            VectorOp::Extract128 => {
                let at = element_offset(insn, set, 16);
                let value = part(self.vector_operand(insn.src, set)?, at);
                self.set_vector_value(insn, insn.dst, set, 16, false, |_| value)
            }
            VectorOp::MaskStore => self.mask_store(insn, set),
        }
    }

    fn vector_move(
        &mut self,
        insn: &Insn,
        set: VectorSet,
        len: u8,
        aligned: bool,
    ) -> Result<(), Stop<M::Error>> {
        if let Operand::Mem(_) = insn.dst {
            // The address first: to look at an MMX register changes the x87.
            let source = insn.src;
            let (Operand::Xmm(n) | Operand::Mmx(n)) = source else {
                return Err(Stop::Unhandled);
            };
            return self.set_vector_value(insn, insn.dst, set, len, aligned, |run| {
                run.vector_register(n, set)
            });
        }
        let value = self.vector_value(insn, insn.src, set, len, aligned)?;
        self.set_vector_value(insn, insn.dst, set, len, false, |_| value)
    }

    fn vector_half(
        &mut self,
        insn: &Insn,
        set: VectorSet,
        high: bool,
    ) -> Result<(), Stop<M::Error>> {
        let at = if high { 8 } else { 0 };
        if let Operand::Mem(_) = insn.dst {
            let value = part(self.vector_operand(insn.src, set)?, at);
            return self.set_vector_value(insn, insn.dst, set, 8, false, |_| value);
        }
        let new = match insn.src {
            // MOVHLPS and MOVLHPS take the other half.
            Operand::Xmm(n) => part(self.vector_register(n, set), 8usize.wrapping_sub(at)),
            source => self.vector_value(insn, source, set, 8, false)?,
        };
        let old = self.background(insn, set, insn.dst)?;
        let value = replace(old, at, 8, new);
        self.set_vector_value(insn, insn.dst, set, set.bytes(), false, |_| value)
    }

    /// MASKMOVQ and MASKMOVDQU: runs of bytes.
    fn mask_store(&mut self, insn: &Insn, set: VectorSet) -> Result<(), Stop<M::Error>> {
        let data = to_bytes(self.vector_operand(insn.dst, set)?);
        let mask = to_bytes(self.vector_operand(insn.src, set)?);
        let chosen = |at: usize| {
            let inside = at < usize::from(set.bytes());
            inside && mask.get(at).is_some_and(|byte| byte & 0x80 != 0)
        };
        let base = self.gpr(Gpr::Rdi);
        let mut at = 0usize;
        while at < 32 {
            let run = (at..32).take(8).take_while(|&i| chosen(i)).count();
            // As much of the run as an operand can have.
            let size = match run {
                0 => {
                    at = at.wrapping_add(1);
                    continue;
                }
                1 => Size::Byte,
                2..=3 => Size::Word,
                4..=7 => Size::Dword,
                _ => Size::Qword,
            };
            let mut raw = [0; 8];
            for (to, from) in raw.iter_mut().zip(data.iter().skip(at)) {
                *to = *from;
            }
            let offset = base.wrapping_add(at as u64) & address_mask(insn.address_size);
            let target = self.target(insn.string_seg, offset, size, AccessKind::Write)?;
            self.store(target, u64::from_le_bytes(raw) & size.mask(), None)?;
            at = at.wrapping_add(size.bytes().into());
        }
        Ok(())
    }

    pub(super) fn load_mxcsr(&mut self, insn: &Insn, set: VectorSet) -> Result<(), Stop<M::Error>> {
        self.check_vector(set)?;
        let value = self.value(insn, insn.src, Size::Dword)? as u32;
        if value & !MXCSR_MASK != 0 {
            return Err(Fault::gp(0).into());
        }
        self.cpu().set_mxcsr(value);
        Ok(())
    }

    pub(super) fn store_mxcsr(
        &mut self,
        insn: &Insn,
        set: VectorSet,
    ) -> Result<(), Stop<M::Error>> {
        self.check_vector(set)?;
        let value = self.cpu().mxcsr();
        self.assign(insn, insn.dst, Size::Dword, value.into())
    }

    pub(super) fn x87(&mut self, insn: &Insn, op: X87Op) -> Result<(), Stop<M::Error>> {
        let traps = if op == X87Op::Wait {
            self.cr0().has(Cr0::TS | Cr0::MP)
        } else {
            self.cr0().has_any(Cr0::TS | Cr0::EM)
        };
        if traps {
            return Err(fault(Vector::NM).into());
        }
        match op {
            X87Op::LoadControl => {
                self.check_pending()?;
                let value = self.value(insn, insn.src, Size::Word)?;
                self.cpu().set_fpu_control(value as u16);
                Ok(())
            }
            X87Op::StoreControl => {
                let value = self.cpu().fpu_control();
                self.assign(insn, insn.dst, Size::Word, value.into())
            }
            X87Op::StoreStatus => {
                let value = self.cpu().fpu_status();
                self.assign(insn, insn.dst, Size::Word, value.into())
            }
            X87Op::Init => {
                self.cpu().fpu_init();
                Ok(())
            }
            X87Op::Wait => self.check_pending(),
        }
    }
}

/// The bytes of a vector from `at` on.
fn part(value: [u64; 4], at: usize) -> [u64; 4] {
    let mut bytes = [0; 32];
    for (to, from) in bytes.iter_mut().zip(to_bytes(value).iter().skip(at)) {
        *to = *from;
    }
    from_bytes(&bytes)
}

/// Where the element that the instruction names begins, in a vector of elements of `size` bytes.
fn element_offset(insn: &Insn, set: VectorSet, size: u8) -> usize {
    let offset = usize::from(insn.element).wrapping_mul(size.into());
    offset & usize::from(set.bytes()).wrapping_sub(1)
}
