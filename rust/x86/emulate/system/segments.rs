// SPDX-License-Identifier: GPL-2.0

//! Loading segment registers: MOV, POP and the far pointers (SDM vol. 2, MOV; vol. 3, 6.6 and 6.7).

use super::super::super::event::Shadow;
use super::super::super::exception::Fault;
use super::super::super::insn::Insn;
use super::super::super::insn::Operand;
use super::super::super::insn::Size;
use super::super::super::paging::GuestMemory;
use super::super::super::segment::SegAttr;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::access::Stop;
use super::super::Cpu;
use super::is_null;
use super::rpl;
use super::Res;
use super::System;

/// The attributes of all segments in virtual-8086 mode: those of real mode, at privilege level 3.
pub(super) const VM86: SegAttr = SegAttr::REAL_MODE.with_dpl(3);

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// What a register of real or virtual-8086 mode holds after it was loaded.
    pub(super) fn segment_8086(&mut self, reg: SegReg, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        if self.flags_vm() {
            return Segment {
                selector,
                base,
                limit: 0xffff,
                attr: VM86,
            };
        }
        let old = self.run.cpu.segment(reg);
        if old.attr.unusable() {
            // Protected mode has left a null selector: there is nothing that could go on.
            return Segment::real_mode(selector);
        }
        // In real mode limit and attributes stay: what was set in protected mode goes on.
        Segment {
            selector,
            base,
            ..old
        }
    }

    fn flags_vm(&self) -> bool {
        self.mode == super::CpuMode::Vm86
    }

    /// Puts down that a segment register other than CS is loaded.
    pub(super) fn load_segment(&mut self, reg: SegReg, selector: u16) -> Res<(), M> {
        if !self.protected() {
            let segment = self.segment_8086(reg, selector);
            self.set_segment(reg, segment);
            return Ok(());
        }
        let segment = if reg == SegReg::Ss {
            self.stack_segment(selector)?
        } else {
            self.data_segment(selector)?
        };
        self.set_segment(reg, segment);
        Ok(())
    }

    /// What DS, ES, FS or GS holds after it was loaded.
    pub(super) fn data_segment(&mut self, selector: u16) -> Res<Segment, M> {
        if is_null(selector) {
            return Ok(Segment {
                selector,
                ..Segment::NULL
            });
        }
        let descriptor = self.descriptor(selector)?.ok_or(self.gp(selector))?;
        if !descriptor.is_readable() {
            return Err(self.gp(selector).into());
        }
        let dpl = descriptor.attr().dpl();
        if !descriptor.is_conforming() && (rpl(selector) > dpl || self.cpl > dpl) {
            return Err(self.gp(selector).into());
        }
        if !descriptor.attr().p() {
            return Err(self.np(selector).into());
        }
        Ok(self.accessed(descriptor)?.segment(selector))
    }

    fn stack_segment(&mut self, selector: u16) -> Res<Segment, M> {
        if is_null(selector) {
            // 64-bit code needs no stack segment, but for user mode.
            if self.mode.is_64bit() && self.cpl != 3 && rpl(selector) == self.cpl {
                return Ok(null_stack(self.cpl, selector));
            }
            return Err(Fault::gp(0).into());
        }
        let descriptor = self.descriptor(selector)?.ok_or(self.gp(selector))?;
        let fits = descriptor.is_writable()
            && rpl(selector) == self.cpl
            && descriptor.attr().dpl() == self.cpl;
        if !fits {
            return Err(self.gp(selector).into());
        }
        if !descriptor.attr().p() {
            return Err(self.ss(selector).into());
        }
        Ok(self.accessed(descriptor)?.segment(selector))
    }

    /// MOV to a segment register.
    pub(super) fn mov_to_segment(&mut self, insn: &Insn) -> Res<(), M> {
        let Operand::Seg(reg) = insn.dst else {
            return Err(Stop::Unhandled);
        };
        let selector = self.word(insn, insn.src)?;
        self.load_segment(reg, selector)?;
        if reg == SegReg::Ss {
            self.shadow = Shadow::MovSs;
        }
        Ok(())
    }

    /// LDS, LES, LFS, LGS, LSS.
    pub(super) fn load_far(&mut self, insn: &Insn, reg: SegReg) -> Res<(), M> {
        let (Operand::Mem(mem), Operand::Reg(dst)) = (insn.src, insn.dst) else {
            return Err(Stop::Unhandled);
        };
        let (selector, offset) = self.far_pointer(insn, &mem)?;
        self.load_segment(reg, selector)?;
        self.set_gpr_part(dst, insn.size, offset)
    }

    /// Reads a selector and an offset of the operand size.
    pub(super) fn far_pointer(
        &mut self,
        insn: &Insn,
        mem: &super::super::super::insn::MemRef,
    ) -> Res<(u16, u64), M> {
        let at = self.run.effective_address(insn, mem, 0);
        let mask = super::super::access::address_mask(insn.address_size);
        let after = at.wrapping_add(insn.size.bytes().into()) & mask;
        let offset = self.run.read(mem.seg, at, insn.size)?;
        let selector = self.run.read(mem.seg, after, Size::Word)?;
        Ok((selector as u16, offset))
    }

    /// POP of a segment register.
    pub(super) fn pop_segment(&mut self, insn: &Insn, reg: SegReg) -> Res<(), M> {
        let mut stack = self.stack();
        let selector = self.peek(&stack, 0, Size::Word)? as u16;
        stack.pointer = stack.pointer.wrapping_add(insn.size.bytes().into()) & stack.mask;
        self.load_segment(reg, selector)?;
        if reg == SegReg::Ss {
            self.shadow = Shadow::MovSs;
        }
        // The pointer is that of the old stack's size.
        self.use_pointer(&stack)
    }
}

/// SS with a null selector: it has nothing but the privilege level.
pub(super) fn null_stack(cpl: u8, selector: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        attr: SegAttr::NULL.with_dpl(cpl),
    }
}
