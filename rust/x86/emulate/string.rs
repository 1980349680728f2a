// SPDX-License-Identifier: GPL-2.0

//! String instructions, an iteration at a time.

use super::super::insn::AluOp;
use super::super::insn::Insn;
use super::super::insn::Operand;
use super::super::insn::Rep;
use super::super::insn::Size;
use super::super::insn::StringOp;
use super::super::paging::GuestMemory;
use super::super::regs::Gpr;
use super::super::regs::Rflags;
use super::super::segment::AccessKind;
use super::super::segment::SegReg;
use super::access::address_mask;
use super::access::Run;
use super::access::Stop;
use super::alu;
use super::Cpu;

const RAX: Operand = Operand::Reg(Gpr::Rax);
const RCX: Operand = Operand::Reg(Gpr::Rcx);
const RSI: Operand = Operand::Reg(Gpr::Rsi);
const RDI: Operand = Operand::Reg(Gpr::Rdi);

impl<C: Cpu, M: GuestMemory> Run<'_, C, M> {
    /// Carries out one iteration. Says whether it was the last.
    pub(super) fn string(&mut self, insn: &Insn, op: StringOp) -> Result<bool, Stop<M::Error>> {
        let mask = address_mask(insn.address_size);
        let repeated = insn.rep != Rep::None;
        let count = self.gpr(Gpr::Rcx) & mask;
        if repeated && count == 0 {
            self.commit(insn, true)?;
            return Ok(true);
        }

        let size = insn.size;
        let source = self.gpr(Gpr::Rsi) & mask;
        let destination = self.gpr(Gpr::Rdi) & mask;
        let (uses_source, uses_destination, compares) = match op {
            StringOp::Movs => {
                let value = self.read(insn.string_seg, source, size)?;
                self.string_store(destination, size, value)?;
                (true, true, false)
            }
            StringOp::Stos => {
                let value = self.register(RAX, size)?;
                self.string_store(destination, size, value)?;
                (false, true, false)
            }
            StringOp::Lods => {
                let value = self.read(insn.string_seg, source, size)?;
                self.set_register(RAX, size, value)?;
                (true, false, false)
            }
            StringOp::Cmps => {
                let a = self.read(insn.string_seg, source, size)?;
                let b = self.read(SegReg::Es, destination, size)?;
                self.string_compare(size, a, b);
                (true, true, true)
            }
            StringOp::Scas => {
                let a = self.register(RAX, size)?;
                let b = self.read(SegReg::Es, destination, size)?;
                self.string_compare(size, a, b);
                (false, true, true)
            }
        };

        let width = u64::from(size.bytes());
        let step = if self.flags().has(Rflags::DF) {
            width.wrapping_neg()
        } else {
            width
        };
        let pointer = match insn.address_size {
            2 => Size::Word,
            4 => Size::Dword,
            _ => Size::Qword,
        };
        if uses_source {
            self.set_register(RSI, pointer, source.wrapping_add(step))?;
        }
        if uses_destination {
            self.set_register(RDI, pointer, destination.wrapping_add(step))?;
        }
        let mut last = true;
        if repeated {
            let left = count.wrapping_sub(1);
            self.set_register(RCX, pointer, left)?;
            let equal = self.flags().has(Rflags::ZF);
            let ended = compares && equal == (insn.rep == Rep::Repne);
            last = left == 0 || ended;
        }
        self.commit(insn, last)?;
        Ok(last)
    }

    fn string_store(&mut self, offset: u64, size: Size, value: u64) -> Result<(), Stop<M::Error>> {
        let target = self.target(SegReg::Es, offset, size, AccessKind::Write)?;
        self.store(target, value, None)
    }

    fn string_compare(&mut self, size: Size, a: u64, b: u64) {
        let (_, flags) = alu::alu(AluOp::Cmp, size, a, b, self.flags());
        self.set_flags(flags);
    }
}
