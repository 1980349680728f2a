// SPDX-License-Identifier: GPL-2.0

//! The instructions of the stack, and near branches.

use super::super::exception::Fault;
use super::super::insn::Insn;
use super::super::insn::LoopOp;
use super::super::insn::Operand;
use super::super::insn::Size;
use super::super::paging::GuestMemory;
use super::super::regs::Cr4;
use super::super::regs::Gpr;
use super::super::regs::Rflags;
use super::super::segment::AccessKind;
use super::super::segment::CpuMode;
use super::super::segment::SegReg;
use super::access::Run;
use super::access::Stop;
use super::alu;
use super::Cpu;

const RCX: Operand = Operand::Reg(Gpr::Rcx);
const RBP: Operand = Operand::Reg(Gpr::Rbp);

/// The order in which PUSHA pushes.
const ALL: [Gpr; 8] = [
    Gpr::Rax,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rbx,
    Gpr::Rsp,
    Gpr::Rbp,
    Gpr::Rsi,
    Gpr::Rdi,
];

impl<C: Cpu, M: GuestMemory> Run<'_, C, M> {
    pub(super) fn push(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let value = self.value(insn, insn.src, insn.size)?;
        self.push_value(insn.size, value)
    }

    pub(super) fn pop(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let value = self.pop_value(insn.size)?;
        match insn.dst {
            Operand::Mem(mem) => {
                let offset = self.effective_address(insn, &mem, insn.size.bytes().into());
                let target = self.target(mem.seg, offset, insn.size, AccessKind::Write)?;
                self.store(target, value, None)
            }
            // After the stack pointer: POP RSP ends with the popped value.
            other => self.set_register(other, insn.size, value),
        }
    }

    pub(super) fn push_all(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        for r in ALL {
            // RSP is what it was before the instruction.
            let value = self.gpr(r);
            self.push_value(insn.size, value)?;
        }
        Ok(())
    }

    pub(super) fn pop_all(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        for r in ALL.into_iter().rev() {
            let value = self.pop_value(insn.size)?;
            if r != Gpr::Rsp {
                self.set_register(Operand::Reg(r), insn.size, value)?;
            }
        }
        Ok(())
    }

    /// Whether RFLAGS is out of the reach of virtual-8086 code.
    fn flags_protected(&self) -> bool {
        self.mode() == CpuMode::Vm86 && self.flags().iopl() < 3
    }

    pub(super) fn push_flags(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let mut flags = self.flags().without(Rflags::VM | Rflags::RF);
        if self.flags_protected() {
            if !self.cr4().has(Cr4::VME) || insn.size != Size::Word {
                return Err(Fault::gp(0).into());
            }
            // Virtual-8086 extensions: what the program sees as IF is VIF.
            let on = flags.has(Rflags::VIF);
            flags = flags.with_if(Rflags::IF, on) | Rflags::IOPL;
        }
        self.push_value(insn.size, flags.bits())
    }

    pub(super) fn pop_flags(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let old = self.flags();
        let virtual_if = self.flags_protected();
        if virtual_if && (!self.cr4().has(Cr4::VME) || insn.size != Size::Word) {
            return Err(Fault::gp(0).into());
        }
        let new = Rflags::new(self.pop_value(insn.size)?);
        let mut which = Rflags::STATUS | Rflags::TF | Rflags::DF | Rflags::NT;
        if insn.size != Size::Word {
            which |= Rflags::AC | Rflags::ID;
        }
        let vm86 = self.mode() == CpuMode::Vm86;
        if !vm86 && self.cpl() == 0 {
            which |= Rflags::IOPL;
        }
        let mut old = old;
        if virtual_if {
            let wants = new.has(Rflags::IF);
            if new.has(Rflags::TF) || wants && old.has(Rflags::VIP) {
                return Err(Fault::gp(0).into());
            }
            old = old.with_if(Rflags::VIF, wants);
        } else if vm86 || self.cpl() <= old.iopl() {
            which |= Rflags::IF;
        }
        self.set_flags(old.without(which).with(new & which));
        Ok(())
    }

    pub(super) fn enter(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let room = self.register(insn.src, Size::Word)?;
        let level = self.register(insn.src2, Size::Byte)? & 31;
        let stack = self.stack_size();
        let mut base = self.gpr(Gpr::Rbp);
        self.push_value(insn.size, base)?;
        let frame = self.stack();
        let step = u64::from(insn.size.bytes());
        let start = frame.wrapping_add(step) & stack.mask();
        for _ in 1..level {
            base = base.wrapping_sub(step) & stack.mask();
            // What is pushed is not in memory yet: a frame that lies in itself, which no compiler makes, cannot be read.
            if base.wrapping_add(step) > self.stack() && base < start {
                return Err(Stop::Unhandled);
            }
            let outer = self.read(SegReg::Ss, base, insn.size)?;
            self.push_value(insn.size, outer)?;
        }
        if level > 0 {
            self.push_value(insn.size, frame)?;
        }
        let end = self.stack().wrapping_sub(room) & stack.mask();
        // The new top is not written, but it has to be such that it could be.
        self.target(SegReg::Ss, end, insn.size, AccessKind::Write)?;
        self.set_stack(end);
        let base_size = if insn.size == Size::Word {
            Size::Word
        } else {
            stack
        };
        self.set_register(RBP, base_size, frame)
    }

    pub(super) fn leave(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let frame = self.gpr(Gpr::Rbp) & self.stack_size().mask();
        self.set_stack(frame);
        let value = self.pop_value(insn.size)?;
        self.set_register(RBP, insn.size, value)
    }

    /// Where a near CALL or JMP goes.
    fn destination(&mut self, insn: &Insn) -> Result<u64, Stop<M::Error>> {
        let target = match insn.src {
            Operand::Imm(distance) => self.next_rip(insn).wrapping_add(distance),
            operand => self.value(insn, operand, insn.size)?,
        };
        Ok(target & insn.size.mask())
    }

    pub(super) fn jump(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let target = self.destination(insn)?;
        self.branch(target)
    }

    pub(super) fn call(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        self.jump(insn)?;
        let next = self.next_rip(insn);
        self.push_value(insn.size, next)
    }

    pub(super) fn jump_if(&mut self, insn: &Insn, condition: u8) -> Result<(), Stop<M::Error>> {
        if alu::condition(condition, self.flags()) {
            self.jump(insn)?;
        }
        Ok(())
    }

    pub(super) fn count_and_jump(&mut self, insn: &Insn, op: LoopOp) -> Result<(), Stop<M::Error>> {
        let size = match insn.address_size {
            2 => Size::Word,
            4 => Size::Dword,
            _ => Size::Qword,
        };
        let count = self.register(RCX, size)?;
        let left = count.wrapping_sub(1) & size.mask();
        let zero = self.flags().has(Rflags::ZF);
        let taken = match op {
            LoopOp::Jcxz => count == 0,
            LoopOp::Loop => left != 0,
            LoopOp::Loope => left != 0 && zero,
            LoopOp::Loopne => left != 0 && !zero,
        };
        if taken {
            self.jump(insn)?;
        }
        if op == LoopOp::Jcxz {
            return Ok(());
        }
        self.set_register(RCX, size, left)
    }

    pub(super) fn return_near(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let target = self.pop_value(insn.size)?;
        if let Operand::Imm(more) = insn.src {
            let sp = self.stack().wrapping_add(more);
            self.set_stack(sp);
        }
        self.branch(target)
    }
}
