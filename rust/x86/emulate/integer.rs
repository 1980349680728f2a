// SPDX-License-Identifier: GPL-2.0

//! Integer instructions with operands of their own: products, quotients, decimal digits, tables, bounds.

use super::super::exception::Fault;
use super::super::exception::Vector;
use super::super::insn::BcdOp;
use super::super::insn::BmiOp;
use super::super::insn::FlagOp;
use super::super::insn::Insn;
use super::super::insn::Operand;
use super::super::insn::ScanOp;
use super::super::insn::Size;
use super::super::paging::GuestMemory;
use super::super::regs::Gpr;
use super::super::regs::Rflags;
use super::access::address_mask;
use super::access::Run;
use super::access::Stop;
use super::arith;
use super::Cpu;

const RAX: Operand = Operand::Reg(Gpr::Rax);
const RDX: Operand = Operand::Reg(Gpr::Rdx);
const AH: Operand = Operand::High(Gpr::Rax);

/// The flags that SAHF and LAHF move.
const AH_FLAGS: Rflags = Rflags::STATUS.without(Rflags::OF);

impl<C: Cpu, M: GuestMemory> Run<'_, C, M> {
    /// Where the upper half of a double-width value is.
    fn upper(size: Size) -> Operand {
        if size == Size::Byte {
            AH
        } else {
            RDX
        }
    }

    pub(super) fn multiply(&mut self, insn: &Insn, signed: bool) -> Result<(), Stop<M::Error>> {
        let size = insn.size;
        let b = self.value(insn, insn.src, size)?;
        let a = self.register(RAX, size)?;
        let (low, high) = arith::multiply(signed, size, a, b);
        let flags = arith::multiply_flags(signed, size, low, high, self.flags());
        self.set_flags(flags);
        self.set_register(RAX, size, low)?;
        self.set_register(Self::upper(size), size, high)
    }

    pub(super) fn divide(&mut self, insn: &Insn, signed: bool) -> Result<(), Stop<M::Error>> {
        let size = insn.size;
        let divisor = self.value(insn, insn.src, size)?;
        let low = self.register(RAX, size)?;
        let high = self.register(Self::upper(size), size)?;
        let (quotient, remainder) =
            arith::divide(signed, size, high, low, divisor).ok_or(Fault::DE)?;
        self.set_register(RAX, size, quotient)?;
        self.set_register(Self::upper(size), size, remainder)
    }

    /// MULX.
    pub(super) fn multiply_plain(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let size = insn.size;
        let b = self.value(insn, insn.src2, size)?;
        let a = self.register(RDX, size)?;
        let (low, high) = arith::multiply(false, size, a, b);
        // If both are the same register, it gets the upper half.
        self.set_register(insn.src, size, low)?;
        self.set_register(insn.dst, size, high)
    }

    pub(super) fn double_shift(&mut self, insn: &Insn, left: bool) -> Result<(), Stop<M::Error>> {
        let b = self.register(insn.src, insn.size)?;
        let count = self.register(insn.src2, Size::Byte)?;
        self.modify(insn, |a, flags| {
            arith::double_shift(left, insn.size, a, b, count, flags)
        })
    }

    pub(super) fn scan(&mut self, insn: &Insn, op: ScanOp) -> Result<(), Stop<M::Error>> {
        let value = self.value(insn, insn.src, insn.size)?;
        let (result, flags) = arith::scan(op, insn.size, value, self.flags());
        self.set_flags(flags);
        match result {
            Some(result) => self.set_register(insn.dst, insn.size, result),
            None => Ok(()),
        }
    }

    pub(super) fn crc32(&mut self, insn: &Insn, from: Size) -> Result<(), Stop<M::Error>> {
        let value = self.value(insn, insn.src, from)?;
        let crc = self.register(insn.dst, Size::Dword)?;
        self.set_register(insn.dst, Size::Qword, arith::crc32c(crc, from, value))
    }

    /// ADCX and ADOX: an addition whose carry is in and out of one flag.
    pub(super) fn add_carry(&mut self, insn: &Insn, carry: Rflags) -> Result<(), Stop<M::Error>> {
        let size = insn.size;
        let b = self.value(insn, insn.src, size)?;
        let a = self.register(insn.dst, size)?;
        let sum = u128::from(a)
            .wrapping_add(u128::from(b))
            .wrapping_add(u128::from(self.flags().has(carry)));
        let flags = self.flags().with_if(carry, sum >> (size.bits() & 127) != 0);
        self.set_flags(flags);
        self.set_register(insn.dst, size, sum as u64)
    }

    pub(super) fn bmi(&mut self, insn: &Insn, op: BmiOp) -> Result<(), Stop<M::Error>> {
        let a = self.value(insn, insn.src, insn.size)?;
        let b = match insn.src2 {
            Operand::None => 0,
            operand => self.value(insn, operand, insn.size)?,
        };
        let (result, flags) = arith::bmi(op, insn.size, a, b, self.flags());
        self.set_flags(flags);
        self.set_register(insn.dst, insn.size, result)
    }

    /// CWD, CDQ, CQO.
    pub(super) fn sign_to_rdx(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let minus = self.register(RAX, insn.size)? & insn.size.sign_bit() != 0;
        self.set_register(RDX, insn.size, if minus { u64::MAX } else { 0 })
    }

    pub(super) fn xlat(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let index = self.register(RAX, Size::Byte)?;
        let offset = self.gpr(Gpr::Rbx).wrapping_add(index) & address_mask(insn.address_size);
        let value = self.read(insn.string_seg, offset, Size::Byte)?;
        self.set_register(RAX, Size::Byte, value)
    }

    pub(super) fn sahf(&mut self) -> Result<(), Stop<M::Error>> {
        let ah = Rflags::new(self.register(AH, Size::Byte)?);
        let flags = self.flags().without(AH_FLAGS).with(ah & AH_FLAGS);
        self.set_flags(flags);
        Ok(())
    }

    pub(super) fn lahf(&mut self) -> Result<(), Stop<M::Error>> {
        let ah = self.flags() & AH_FLAGS | Rflags::FIXED;
        self.set_register(AH, Size::Byte, ah.bits())
    }

    pub(super) fn change_flag(&mut self, op: FlagOp) -> Result<(), Stop<M::Error>> {
        let flags = self.flags();
        let flags = match op {
            FlagOp::Cmc => flags.diff(Rflags::CF),
            FlagOp::Clc => flags.without(Rflags::CF),
            FlagOp::Stc => flags.with(Rflags::CF),
            FlagOp::Cld => flags.without(Rflags::DF),
            FlagOp::Std => flags.with(Rflags::DF),
        };
        self.set_flags(flags);
        Ok(())
    }

    pub(super) fn salc(&mut self) -> Result<(), Stop<M::Error>> {
        let carry = self.flags().has(Rflags::CF);
        self.set_register(RAX, Size::Byte, if carry { 0xff } else { 0 })
    }

    pub(super) fn bcd(&mut self, insn: &Insn, op: BcdOp) -> Result<(), Stop<M::Error>> {
        let base = match insn.src {
            Operand::Imm(base) => base as u8,
            _ => 0,
        };
        let ax = self.register(RAX, Size::Word)? as u16;
        let (ax, flags) = arith::bcd(op, ax, base, self.flags()).ok_or(Fault::DE)?;
        self.set_flags(flags);
        self.set_register(RAX, Size::Word, ax.into())
    }

    pub(super) fn bound(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let Operand::Mem(mem) = insn.src else {
            return Err(Stop::Unhandled);
        };
        let size = insn.size;
        let signed = |value: u64| size.sign_extend(value) as i64;
        let index = signed(self.register(insn.dst, size)?);
        let offset = self.effective_address(insn, &mem, 0);
        let next = offset.wrapping_add(size.bytes().into()) & address_mask(insn.address_size);
        let lower = signed(self.read(mem.seg, offset, size)?);
        let upper = signed(self.read(mem.seg, next, size)?);
        if (lower..=upper).contains(&index) {
            return Ok(());
        }
        Err(Fault {
            vector: Vector::BR,
            error: None,
            cr2: None,
        }
        .into())
    }

    pub(super) fn arpl(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let wanted = self.register(insn.src, Size::Word)? & 3;
        self.modify(insn, |selector, flags| {
            let raise = selector & 3 < wanted;
            let flags = flags.with_if(Rflags::ZF, raise);
            (
                if raise {
                    selector & !3 | wanted
                } else {
                    selector
                },
                flags,
            )
        })
    }
}
