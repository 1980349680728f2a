// SPDX-License-Identifier: GPL-2.0

//! Transfers of control to another segment: JMP, CALL, RET and IRET (SDM vol. 2, under their names; vol. 3, 6.8).

use super::super::super::exception::Fault;
use super::super::super::insn::Insn;
use super::super::super::insn::Operand;
use super::super::super::insn::Size;
use super::super::super::paging::GuestMemory;
use super::super::super::regs::Rflags;
use super::super::super::segment::is_canonical;
use super::super::super::segment::CpuMode;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::access::Stop;
use super::super::Cpu;
use super::descriptors::kind;
use super::descriptors::Descriptor;
use super::is_null;
use super::rpl;
use super::segments::null_stack;
use super::segments::VM86;
use super::stack::pointer_mask;
use super::stack::Stack;
use super::task::Cause;
use super::Res;
use super::System;

/// A code segment that was found fit, and the privilege level that it brings.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) code: Descriptor,
    pub(super) selector: u16,
    pub(super) cpl: u8,
}

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// The mode that a code segment brings.
    pub(super) fn mode_of(&self, code: &Descriptor) -> CpuMode {
        let attr = code.attr();
        match (self.mode.is_long(), attr.l(), attr.db()) {
            (true, true, _) => CpuMode::Long64,
            (true, false, true) => CpuMode::Compat32,
            (true, false, false) => CpuMode::Compat16,
            (false, _, true) => CpuMode::Protected32,
            (false, _, false) => CpuMode::Protected16,
        }
    }

    /// The operand of a far JMP or CALL.
    fn destination(&mut self, insn: &Insn) -> Res<(u16, u64), M> {
        match (insn.dst, insn.src) {
            (Operand::Imm(selector), Operand::Imm(offset)) => {
                Ok((selector as u16, offset & insn.size.mask()))
            }
            (_, Operand::Mem(mem)) => self.far_pointer(insn, &mem),
            _ => Err(Stop::Unhandled),
        }
    }

    /// The code segment that a selector means; #GP if it is none.
    pub(super) fn code(&mut self, selector: u16) -> Res<Descriptor, M> {
        if is_null(selector) {
            return Err(Fault::gp(self.ext).into());
        }
        let code = self.descriptor(selector)?.ok_or(self.gp(selector))?;
        if !code.attr().is_code() {
            return Err(self.gp(selector).into());
        }
        Ok(code)
    }

    /// A code segment whose D and L bits exclude each other: #GP if both are set in long mode.
    fn check_width(&self, code: &Descriptor, selector: u16) -> Res<(), M> {
        let attr = code.attr();
        if self.mode.is_long() && attr.l() && attr.db() {
            return Err(self.gp(selector).into());
        }
        Ok(())
    }

    /// Puts down that execution goes on in this segment at this offset.
    pub(super) fn go(&mut self, target: Target, offset: u64) -> Res<(), M> {
        let code = self.accessed(target.code)?;
        let selector = target.selector & !3 | u16::from(target.cpl);
        let segment = code.segment(selector);
        self.check_offset(self.mode_of(&code), &segment, offset)?;
        self.set_segment(SegReg::Cs, segment);
        self.cpl = target.cpl;
        self.rip = offset;
        Ok(())
    }

    /// #GP(0) if there can be no code at an offset.
    pub(super) fn check_offset(&self, mode: CpuMode, code: &Segment, offset: u64) -> Res<(), M> {
        let fits = if mode.is_64bit() {
            is_canonical(offset, self.run.paging.la57())
        } else {
            offset <= u64::from(code.limit)
        };
        if fits {
            Ok(())
        } else {
            Err(Fault::gp(self.ext).into())
        }
    }

    /// A transfer in real or virtual-8086 mode.
    pub(super) fn go_8086(&mut self, selector: u16, offset: u64) -> Res<(), M> {
        let code = self.segment_8086(SegReg::Cs, selector);
        self.check_offset(self.mode, &code, offset)?;
        self.set_segment(SegReg::Cs, code);
        self.rip = offset;
        Ok(())
    }

    /// Checks a code segment that a JMP or CALL names itself.
    fn direct(&mut self, code: Descriptor, selector: u16) -> Res<Target, M> {
        self.check_width(&code, selector)?;
        let dpl = code.attr().dpl();
        let allowed = if code.is_conforming() {
            dpl <= self.cpl
        } else {
            rpl(selector) <= self.cpl && dpl == self.cpl
        };
        if !allowed {
            return Err(self.gp(selector).into());
        }
        if !code.attr().p() {
            return Err(self.np(selector).into());
        }
        Ok(Target {
            code,
            selector,
            cpl: self.cpl,
        })
    }

    /// The system descriptor that a JMP or CALL names, if the caller may use it.
    fn gate(&mut self, descriptor: Descriptor, selector: u16) -> Res<Descriptor, M> {
        let kind = descriptor.attr().type_();
        let known = if self.mode.is_long() {
            kind == kind::CALL_GATE
        } else {
            matches!(
                kind,
                kind::TSS16_AVAILABLE
                    | kind::CALL_GATE16
                    | kind::TASK_GATE
                    | kind::TSS_AVAILABLE
                    | kind::CALL_GATE
            )
        };
        let dpl = descriptor.attr().dpl();
        if !known || dpl < self.cpl || dpl < rpl(selector) {
            return Err(self.gp(selector).into());
        }
        let gate = self
            .widened(selector, descriptor)?
            .ok_or(self.gp(selector))?;
        if !gate.attr().p() {
            return Err(self.np(selector).into());
        }
        Ok(gate)
    }

    /// The code segment in a call gate.
    fn gate_target(&mut self, gate: &Descriptor, call: bool) -> Res<Target, M> {
        let selector = gate.gate_selector();
        let code = self.code(selector)?;
        let attr = code.attr();
        if self.mode.is_long() && (!attr.l() || attr.db()) {
            return Err(self.gp(selector).into());
        }
        let inward = call && !code.is_conforming();
        let allowed = if inward || code.is_conforming() {
            attr.dpl() <= self.cpl
        } else {
            attr.dpl() == self.cpl
        };
        if !allowed {
            return Err(self.gp(selector).into());
        }
        if !attr.p() {
            return Err(self.np(selector).into());
        }
        let cpl = if inward { attr.dpl() } else { self.cpl };
        Ok(Target {
            code,
            selector,
            cpl,
        })
    }

    /// JMP to another segment.
    pub(super) fn far_jump(&mut self, insn: &Insn) -> Res<(), M> {
        let (selector, offset) = self.destination(insn)?;
        if !self.protected() {
            return self.go_8086(selector, offset);
        }
        if is_null(selector) {
            return Err(Fault::gp(0).into());
        }
        let descriptor = self.descriptor(selector)?.ok_or(self.gp(selector))?;
        if descriptor.attr().is_code() {
            let target = self.direct(descriptor, selector)?;
            return self.go(target, offset);
        }
        if descriptor.attr().s() {
            return Err(self.gp(selector).into());
        }
        let gate = self.gate(descriptor, selector)?;
        match gate.attr().type_() {
            kind::CALL_GATE | kind::CALL_GATE16 => {
                let target = self.gate_target(&gate, false)?;
                self.go(target, self.entry(&gate))
            }
            kind::TASK_GATE => self.switch_task(gate.gate_selector(), Cause::Jump),
            _ => self.switch_task(selector, Cause::Jump),
        }
    }

    /// The offset in a gate, as wide as the gate is.
    pub(super) fn entry(&self, gate: &Descriptor) -> u64 {
        match self.gate_size(gate) {
            Size::Word => gate.gate_offset() & 0xffff,
            Size::Qword => gate.gate_offset(),
            _ => gate.gate_offset() & 0xffff_ffff,
        }
    }

    /// The size of what is pushed on the way through a gate.
    pub(super) fn gate_size(&self, gate: &Descriptor) -> Size {
        if self.mode.is_long() {
            Size::Qword
        } else if gate.attr().type_() & 8 != 0 {
            Size::Dword
        } else {
            Size::Word
        }
    }

    /// CALL to another segment.
    pub(super) fn far_call(&mut self, insn: &Insn) -> Res<(), M> {
        let (selector, offset) = self.destination(insn)?;
        let old_cs = u64::from(self.run.cpu.segment(SegReg::Cs).selector);
        let next = self.rip;
        if !self.protected() {
            let mut stack = self.stack();
            self.push(&mut stack, insn.size, old_cs)?;
            self.push(&mut stack, insn.size, next)?;
            self.go_8086(selector, offset)?;
            return self.use_pointer(&stack);
        }
        if is_null(selector) {
            return Err(Fault::gp(0).into());
        }
        let descriptor = self.descriptor(selector)?.ok_or(self.gp(selector))?;
        if descriptor.attr().is_code() {
            let target = self.direct(descriptor, selector)?;
            let mut stack = self.stack();
            self.push(&mut stack, insn.size, old_cs)?;
            self.push(&mut stack, insn.size, next)?;
            self.go(target, offset)?;
            return self.use_pointer(&stack);
        }
        if descriptor.attr().s() {
            return Err(self.gp(selector).into());
        }
        let gate = self.gate(descriptor, selector)?;
        match gate.attr().type_() {
            kind::CALL_GATE | kind::CALL_GATE16 => self.call_gate(&gate),
            kind::TASK_GATE => self.switch_task(gate.gate_selector(), Cause::Call),
            _ => self.switch_task(selector, Cause::Call),
        }
    }

    fn call_gate(&mut self, gate: &Descriptor) -> Res<(), M> {
        let target = self.gate_target(gate, true)?;
        let size = self.gate_size(gate);
        let old_cs = u64::from(self.run.cpu.segment(SegReg::Cs).selector);
        let next = self.rip;
        let old = self.stack();
        let mut stack = old;
        if self.mode.is_long() {
            // The gate's code is 64-bit, whatever called it.
            stack.mode = CpuMode::Long64;
            stack.mask = u64::MAX;
            stack.pointer = self.run.cpu.gpr(super::Gpr::Rsp);
        }
        if target.cpl < self.cpl {
            stack = self.inner_stack(target.cpl, 0)?;
            let old_ss = u64::from(self.run.cpu.segment(SegReg::Ss).selector);
            let old_pointer = self.run.cpu.gpr(super::Gpr::Rsp);
            self.push(&mut stack, size, old_ss)?;
            self.push(&mut stack, size, old_pointer)?;
            let step = u64::from(size.bytes());
            let parameters = if self.mode.is_long() {
                0
            } else {
                gate.gate_parameters()
            };
            for i in (0..u64::from(parameters)).rev() {
                let parameter = self.peek(&old, i.wrapping_mul(step), size)?;
                self.push(&mut stack, size, parameter)?;
            }
            self.set_segment(SegReg::Ss, stack.segment);
        }
        self.push(&mut stack, size, old_cs)?;
        self.push(&mut stack, size, next)?;
        self.go(target, self.entry(gate))?;
        self.use_pointer(&stack)
    }

    /// The stack that the TSS has for a privilege level, or in long mode, for the number of an interrupt's own stack if that is not
    /// zero.
    pub(super) fn inner_stack(&mut self, cpl: u8, own: u8) -> Res<Stack, M> {
        let tss = self.run.cpu.segment(SegReg::Tr);
        let level = u32::from(cpl);
        if self.mode.is_long() {
            let at = match own {
                0 => level.wrapping_mul(8).wrapping_add(4),
                own => u32::from(own).wrapping_mul(8).wrapping_add(0x1c),
            };
            if at.wrapping_add(7) > tss.limit {
                return Err(self.ts(tss.selector).into());
            }
            let pointer = self.read_system(tss.base.wrapping_add(at.into()), 8)?;
            if !is_canonical(pointer, self.run.paging.la57()) {
                return Err(Fault::ss(self.ext).into());
            }
            return Ok(Stack {
                segment: null_stack(cpl, cpl.into()),
                pointer,
                mask: u64::MAX,
                mode: CpuMode::Long64,
                cpl,
                error: self.ext,
            });
        }
        let wide = tss.attr.type_() & 8 != 0;
        let (at, len) = if wide {
            (level.wrapping_mul(8).wrapping_add(4), 4u8)
        } else {
            (level.wrapping_mul(4).wrapping_add(2), 2)
        };
        let selector_at = at.wrapping_add(len.into());
        if selector_at.wrapping_add(1) > tss.limit {
            return Err(self.ts(tss.selector).into());
        }
        let pointer = self.read_system(tss.base.wrapping_add(at.into()), len)?;
        let selector = self.read_system(tss.base.wrapping_add(selector_at.into()), 2)? as u16;
        if is_null(selector) {
            return Err(self.ts(selector).into());
        }
        let descriptor = self.descriptor(selector)?.ok_or(self.ts(selector))?;
        let fits =
            rpl(selector) == cpl && descriptor.attr().dpl() == cpl && descriptor.is_writable();
        if !fits {
            return Err(self.ts(selector).into());
        }
        if !descriptor.attr().p() {
            return Err(self.ss(selector).into());
        }
        let segment = self.accessed(descriptor)?.segment(selector);
        let mode = CpuMode::Protected32;
        let mask = pointer_mask(mode, &segment);
        Ok(Stack {
            segment,
            pointer: pointer & mask,
            mask,
            mode,
            cpl,
            error: super::selector_error(selector) | self.ext,
        })
    }

    /// Checks a code segment that is returned to.
    fn returned_to(&mut self, selector: u16) -> Res<Target, M> {
        let code = self.code(selector)?;
        let cpl = rpl(selector);
        let dpl = code.attr().dpl();
        self.check_width(&code, selector)?;
        let allowed = if code.is_conforming() {
            dpl <= cpl
        } else {
            dpl == cpl
        };
        if cpl < self.cpl || !allowed {
            return Err(self.gp(selector).into());
        }
        if !code.attr().p() {
            return Err(self.np(selector).into());
        }
        Ok(Target {
            code,
            selector,
            cpl,
        })
    }

    /// The stack segment that is returned to.
    fn returned_stack(&mut self, selector: u16, target: &Target) -> Res<Segment, M> {
        let cpl = target.cpl;
        if is_null(selector) {
            if self.mode_of(&target.code).is_64bit() && cpl != 3 && rpl(selector) == cpl {
                return Ok(null_stack(cpl, selector));
            }
            return Err(Fault::gp(0).into());
        }
        let descriptor = self.descriptor(selector)?.ok_or(self.gp(selector))?;
        let fits =
            rpl(selector) == cpl && descriptor.is_writable() && descriptor.attr().dpl() == cpl;
        if !fits {
            return Err(self.gp(selector).into());
        }
        if !descriptor.attr().p() {
            return Err(self.ss(selector).into());
        }
        Ok(self.accessed(descriptor)?.segment(selector))
    }

    /// Goes back to a less privileged level, or in 64-bit mode to any, with a stack of its own. `dropped` is added to its pointer.
    fn go_outward(
        &mut self,
        target: Target,
        offset: u64,
        selector: u16,
        pointer: u64,
        dropped: u64,
    ) -> Res<(), M> {
        let segment = self.returned_stack(selector, &target)?;
        let outward = target.cpl > self.cpl;
        self.go(target, offset)?;
        self.set_segment(SegReg::Ss, segment);
        let mask = pointer_mask(self.mode_of(&target.code), &segment);
        let stack = Stack {
            segment,
            pointer: pointer.wrapping_add(dropped) & mask,
            mask,
            mode: self.mode,
            cpl: target.cpl,
            error: 0,
        };
        self.use_pointer(&stack)?;
        if outward {
            self.drop_privileged_segments();
        }
        Ok(())
    }

    /// Empties the data segment registers that the new level may not have.
    fn drop_privileged_segments(&mut self) {
        for reg in [SegReg::Es, SegReg::Ds, SegReg::Fs, SegReg::Gs] {
            let old = self.segment(reg);
            let conforming = old.attr.is_code() && old.attr.type_() & 4 != 0;
            if !old.attr.unusable() && !conforming && old.attr.dpl() < self.cpl {
                self.set_segment(reg, Segment::NULL);
            }
        }
    }

    /// RET from another segment.
    pub(super) fn far_return(&mut self, insn: &Insn) -> Res<(), M> {
        let dropped = match insn.src {
            Operand::Imm(count) => count & 0xffff,
            _ => 0,
        };
        let mut stack = self.stack();
        let offset = self.pop(&mut stack, insn.size)?;
        let selector = self.pop(&mut stack, insn.size)? as u16;
        if !self.protected() {
            self.go_8086(selector, offset)?;
            stack.pointer = stack.pointer.wrapping_add(dropped) & stack.mask;
            return self.use_pointer(&stack);
        }
        let target = self.returned_to(selector)?;
        stack.pointer = stack.pointer.wrapping_add(dropped) & stack.mask;
        if target.cpl == self.cpl {
            self.go(target, offset)?;
            return self.use_pointer(&stack);
        }
        let pointer = self.pop(&mut stack, insn.size)?;
        let stack_selector = self.pop(&mut stack, insn.size)? as u16;
        self.go_outward(target, offset, stack_selector, pointer, dropped)
    }

    /// IRET.
    pub(super) fn interrupt_return(&mut self, insn: &Insn) -> Res<(), M> {
        self.unblocks_nmi = true;
        if !self.protected() {
            return self.return_8086(insn.size);
        }
        if self.flags.has(Rflags::NT) {
            if self.mode.is_long() {
                return Err(Fault::gp(0).into());
            }
            return self.return_to_task();
        }
        let mut stack = self.stack();
        let offset = self.pop(&mut stack, insn.size)?;
        let selector = self.pop(&mut stack, insn.size)? as u16;
        let popped = Rflags::new(self.pop(&mut stack, insn.size)?);
        let to_vm86 = insn.size == Size::Dword && popped.has(Rflags::VM) && self.cpl == 0;
        if to_vm86 && !self.mode.is_long() {
            return self.return_to_vm86(&mut stack, selector, offset, popped);
        }
        let old_cpl = self.cpl;
        let target = self.returned_to(selector)?;
        if target.cpl > old_cpl || self.mode.is_64bit() {
            let pointer = self.pop(&mut stack, insn.size)?;
            let stack_selector = self.pop(&mut stack, insn.size)? as u16;
            self.go_outward(target, offset, stack_selector, pointer, 0)?;
        } else {
            self.go(target, offset)?;
            self.use_pointer(&stack)?;
        }
        self.load_flags(popped, insn.size, old_cpl);
        Ok(())
    }

    /// Puts down the flags that IRET may load at a privilege level.
    pub(super) fn load_flags(&mut self, new: Rflags, size: Size, cpl: u8) {
        let mut loaded = Rflags::STATUS
            .with(Rflags::TF)
            .with(Rflags::DF)
            .with(Rflags::NT);
        if size != Size::Word {
            loaded |= Rflags::RF | Rflags::AC | Rflags::ID;
        }
        if cpl <= self.run.flags.iopl() {
            loaded |= Rflags::IF;
        }
        if cpl == 0 {
            loaded |= Rflags::IOPL;
            if size != Size::Word {
                loaded |= Rflags::VIF | Rflags::VIP;
            }
        }
        self.flags = self.flags.without(loaded) | new.and(loaded);
    }

    /// IRET in real and virtual-8086 mode.
    fn return_8086(&mut self, size: Size) -> Res<(), M> {
        let vm86 = self.mode == CpuMode::Vm86;
        if vm86 && self.flags.iopl() < 3 {
            return self.return_virtual(size);
        }
        let mut stack = self.stack();
        let offset = self.pop(&mut stack, size)?;
        let selector = self.pop(&mut stack, size)? as u16;
        let popped = Rflags::new(self.pop(&mut stack, size)?);
        self.go_8086(selector, offset)?;
        self.use_pointer(&stack)?;
        // Virtual-8086 mode cannot change the I/O privilege level; VM, VIF and VIP are out of reach for both.
        let mut loaded = Rflags::STATUS | Rflags::TF | Rflags::IF | Rflags::DF | Rflags::NT;
        if !vm86 {
            loaded |= Rflags::IOPL;
        }
        if size != Size::Word {
            loaded |= Rflags::RF | Rflags::AC | Rflags::ID;
        }
        self.flags = self.flags.without(loaded) | popped.and(loaded);
        Ok(())
    }

    /// IRET to virtual-8086 mode.
    fn return_to_vm86(
        &mut self,
        stack: &mut Stack,
        selector: u16,
        offset: u64,
        popped: Rflags,
    ) -> Res<(), M> {
        if offset > 0xffff {
            return Err(Fault::gp(0).into());
        }
        let pointer = self.pop(stack, Size::Dword)?;
        for reg in [SegReg::Ss, SegReg::Es, SegReg::Ds, SegReg::Fs, SegReg::Gs] {
            let selector = self.pop(stack, Size::Dword)? as u16;
            self.set_segment(reg, vm86_segment(selector));
        }
        self.set_segment(SegReg::Cs, vm86_segment(selector));
        self.set_gpr(super::Gpr::Rsp, pointer & 0xffff_ffff)?;
        self.rip = offset;
        self.cpl = 3;
        self.load_flags(popped, Size::Dword, 0);
        self.flags |= Rflags::VM;
        Ok(())
    }
}

/// A segment of virtual-8086 mode.
pub(super) const fn vm86_segment(selector: u16) -> Segment {
    Segment {
        selector,
        base: (selector as u64) << 4,
        limit: 0xffff,
        attr: VM86,
    }
}
