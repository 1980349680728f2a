// SPDX-License-Identifier: GPL-2.0

//! The registers of descriptor tables, and what asks about a descriptor without using it.

use super::super::super::exception::Fault;
use super::super::super::insn::Insn;
use super::super::super::insn::Operand;
use super::super::super::insn::Size;
use super::super::super::paging::GuestMemory;
use super::super::super::regs::Cr4;
use super::super::super::regs::Rflags;
use super::super::super::segment::is_canonical;
use super::super::super::segment::AccessKind;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::access::address_mask;
use super::super::access::Stop;
use super::super::Cpu;
use super::super::TableReg;
use super::descriptors::kind;
use super::descriptors::Descriptor;
use super::is_null;
use super::rpl;
use super::Res;
use super::System;

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// #GP(0) for user mode, if it shall not learn where the tables are.
    pub(super) fn need_umip(&self) -> Res<(), M> {
        if self.cpl != 0 && self.run.paging.cr4.has(Cr4::UMIP) {
            return Err(Fault::gp(0).into());
        }
        Ok(())
    }

    /// The offsets of the limit and of the base in the operand of LGDT and its siblings, and the size of the base.
    fn table_operand(&mut self, insn: &Insn, operand: Operand) -> Res<(SegReg, [u64; 2], Size), M> {
        let Operand::Mem(mem) = operand else {
            return Err(Stop::Unhandled);
        };
        let at = self.run.effective_address(insn, &mem, 0);
        let base = at.wrapping_add(2) & address_mask(insn.address_size);
        let size = if self.mode.is_64bit() {
            Size::Qword
        } else {
            Size::Dword
        };
        Ok((mem.seg, [at, base], size))
    }

    /// SGDT and SIDT.
    pub(super) fn store_table(&mut self, insn: &Insn, idt: bool) -> Res<(), M> {
        self.need_umip()?;
        let (seg, [limit_at, base_at], size) = self.table_operand(insn, insn.dst)?;
        let table = if idt {
            self.run.cpu.idtr()
        } else {
            self.run.cpu.gdtr()
        };
        let limit = self
            .run
            .target(seg, limit_at, Size::Word, AccessKind::Write)?;
        let base = self.run.target(seg, base_at, size, AccessKind::Write)?;
        self.store(limit, table.limit.into())?;
        self.store(base, table.base & size.mask())
    }

    /// LGDT and LIDT.
    pub(super) fn load_table(&mut self, insn: &Insn, idt: bool) -> Res<(), M> {
        self.need_cpl0()?;
        let (seg, [limit_at, base_at], size) = self.table_operand(insn, insn.src)?;
        let limit = self.run.read(seg, limit_at, Size::Word)? as u16;
        let mut base = self.run.read(seg, base_at, size)?;
        if size == Size::Qword {
            if !is_canonical(base, self.run.paging.la57()) {
                return Err(Fault::gp(0).into());
            }
        } else if insn.size == Size::Word {
            // As the 286 had it.
            base &= 0xff_ffff;
        }
        let table = Some(TableReg { base, limit });
        if idt {
            self.idtr = table;
        } else {
            self.gdtr = table;
        }
        Ok(())
    }

    /// SLDT and STR.
    pub(super) fn store_selector(&mut self, insn: &Insn, reg: SegReg) -> Res<(), M> {
        self.need_protected()?;
        self.need_umip()?;
        let selector = self.run.cpu.segment(reg).selector;
        self.give(insn, insn.dst, selector.into())
    }

    /// The descriptor for LLDT or LTR.
    fn system_segment(&mut self, selector: u16) -> Res<Descriptor, M> {
        if selector & 4 != 0 {
            return Err(self.gp(selector).into());
        }
        Ok(self.descriptor(selector)?.ok_or(self.gp(selector))?)
    }

    /// With the upper half of the base that it has in long mode.
    fn with_base(&mut self, selector: u16, descriptor: Descriptor) -> Res<Descriptor, M> {
        let whole = self
            .widened(selector, descriptor)?
            .ok_or(self.gp(selector))?;
        if !is_canonical(whole.base(), self.run.paging.la57()) {
            return Err(self.gp(selector).into());
        }
        Ok(whole)
    }

    /// LLDT.
    pub(super) fn load_ldt(&mut self, insn: &Insn) -> Res<(), M> {
        self.need_protected()?;
        self.need_cpl0()?;
        let selector = self.word(insn, insn.src)?;
        if is_null(selector) {
            let none = Segment {
                selector,
                ..Segment::NULL
            };
            self.set_segment(SegReg::Ldtr, none);
            return Ok(());
        }
        let descriptor = self.system_segment(selector)?;
        if !descriptor.is_system(kind::LDT) {
            return Err(self.gp(selector).into());
        }
        if !descriptor.attr().p() {
            return Err(self.np(selector).into());
        }
        let descriptor = self.with_base(selector, descriptor)?;
        self.set_segment(SegReg::Ldtr, descriptor.segment(selector));
        Ok(())
    }

    /// LTR.
    pub(super) fn load_task(&mut self, insn: &Insn) -> Res<(), M> {
        self.need_protected()?;
        self.need_cpl0()?;
        let selector = self.word(insn, insn.src)?;
        if is_null(selector) {
            return Err(Fault::gp(0).into());
        }
        let descriptor = self.system_segment(selector)?;
        let fits = descriptor.is_system(kind::TSS_AVAILABLE)
            || descriptor.is_system(kind::TSS16_AVAILABLE) && !self.mode.is_long();
        if !fits {
            return Err(self.gp(selector).into());
        }
        if !descriptor.attr().p() {
            return Err(self.np(selector).into());
        }
        let descriptor = self.with_base(selector, descriptor)?;
        let busy = self.retype(descriptor, descriptor.attr().type_() | 2)?;
        self.set_segment(SegReg::Tr, busy.segment(selector));
        Ok(())
    }

    /// A descriptor that the program may know of: for LAR, LSL, VERR and VERW.
    fn visible(&mut self, selector: u16) -> Res<Option<Descriptor>, M> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(descriptor) = self.descriptor(selector)? else {
            return Ok(None);
        };
        let dpl = descriptor.attr().dpl();
        let hidden = dpl < self.cpl || dpl < rpl(selector);
        if hidden && !descriptor.is_conforming() {
            return Ok(None);
        }
        self.widened(selector, descriptor)
    }

    /// Puts down ZF, and if it is set, the register of LAR or LSL.
    fn answer(&mut self, insn: &Insn, value: Option<u64>) -> Res<(), M> {
        self.flags = self.flags.with_if(Rflags::ZF, value.is_some());
        match (value, insn.dst) {
            (Some(value), Operand::Reg(r)) => self.set_gpr_part(r, insn.size, value),
            _ => Ok(()),
        }
    }

    /// LAR.
    pub(super) fn access_rights(&mut self, insn: &Insn) -> Res<(), M> {
        self.need_protected()?;
        let selector = self.word(insn, insn.src)?;
        let long = self.mode.is_long();
        let rights = self.visible(selector)?.and_then(|descriptor| {
            let known = match descriptor.attr().type_() {
                _ if descriptor.attr().s() => true,
                kind::LDT | kind::TSS_AVAILABLE | kind::TSS_BUSY | kind::CALL_GATE => true,
                kind::TSS16_AVAILABLE | kind::TSS16_BUSY | kind::CALL_GATE16 | kind::TASK_GATE => {
                    !long
                }
                _ => false,
            };
            known.then_some((descriptor.low >> 32) & 0x00ff_ff00)
        });
        self.answer(insn, rights)
    }

    /// LSL.
    pub(super) fn segment_limit(&mut self, insn: &Insn) -> Res<(), M> {
        self.need_protected()?;
        let selector = self.word(insn, insn.src)?;
        let long = self.mode.is_long();
        let limit = self.visible(selector)?.and_then(|descriptor| {
            let known = match descriptor.attr().type_() {
                _ if descriptor.attr().s() => true,
                kind::LDT | kind::TSS_AVAILABLE | kind::TSS_BUSY => true,
                kind::TSS16_AVAILABLE | kind::TSS16_BUSY => !long,
                _ => false,
            };
            known.then_some(descriptor.limit().into())
        });
        self.answer(insn, limit)
    }

    /// VERR and VERW.
    pub(super) fn verify(&mut self, insn: &Insn, kind: AccessKind) -> Res<(), M> {
        self.need_protected()?;
        let selector = self.word(insn, insn.src)?;
        let allowed = self.visible(selector)?.is_some_and(|descriptor| {
            if kind == AccessKind::Write {
                descriptor.is_writable()
            } else {
                descriptor.is_readable()
            }
        });
        self.flags = self.flags.with_if(Rflags::ZF, allowed);
        Ok(())
    }

    /// ARPL.
    pub(super) fn adjust_rpl(&mut self, insn: &Insn) -> Res<(), M> {
        self.need_protected()?;
        let wanted = self.run.register(insn.src, Size::Word)? as u16;
        let old = self.word(insn, insn.dst)?;
        let raise = rpl(old) < rpl(wanted);
        self.flags = self.flags.with_if(Rflags::ZF, raise);
        let new = if raise { old & !3 | wanted & 3 } else { old };
        if raise || matches!(insn.dst, Operand::Mem(_)) {
            self.give(insn, insn.dst, new.into())?;
        }
        Ok(())
    }
}
