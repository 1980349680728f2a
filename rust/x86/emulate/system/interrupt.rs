// SPDX-License-Identifier: GPL-2.0

//! Delivery of interrupts and exceptions, through the vector table of real mode or the gates of the IDT (SDM vol. 3, 7.12, 7.14, 22.3).

use super::super::super::exception::Fault;
use super::super::super::exception::Vector;
use super::super::super::insn::system::SystemOp;
use super::super::super::insn::Insn;
use super::super::super::insn::Operand;
use super::super::super::insn::Size;
use super::super::super::paging::GuestMemory;
use super::super::super::regs::Cr4;
use super::super::super::regs::Gpr;
use super::super::super::regs::Rflags;
use super::super::super::segment::CpuMode;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::Cpu;
use super::descriptors::kind;
use super::descriptors::Descriptor;
use super::segments::null_stack;
use super::stack::Stack;
use super::task::Cause;
use super::transfer::Target;
use super::Res;
use super::System;

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The vector.
    pub vector: u8,
    /// The error code, for an exception that has one.
    pub error: Option<u32>,
    /// INT n, INT3 or INTO: the program must have the privilege that the gate asks for.
    pub by_program: bool,
}

/// The error code that names an entry of the IDT.
const fn idt_error(vector: u8) -> u32 {
    ((vector as u32) << 3) | 2
}

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// INT n, INT3, INTO, INT1. RIP is past the instruction.
    pub(super) fn software_interrupt(&mut self, insn: &Insn, op: SystemOp) -> Res<(), M> {
        let vector = match (op, insn.src) {
            (SystemOp::Breakpoint, _) => Vector::BP.0,
            (SystemOp::Overflow, _) if !self.flags.has(Rflags::OF) => return Ok(()),
            (SystemOp::Overflow, _) => Vector::OF.0,
            (SystemOp::DebugTrap, _) => Vector::DB.0,
            (_, Operand::Imm(vector)) => vector as u8,
            _ => return Err(super::Stop::Unhandled),
        };
        if op == SystemOp::Interrupt && self.mode == CpuMode::Vm86 {
            if self.redirected(vector)? {
                return self.virtual_interrupt(vector);
            }
            if self.flags.iopl() < 3 {
                return Err(Fault::gp(0).into());
            }
        }
        self.deliver(Event {
            vector,
            error: None,
            by_program: op != SystemOp::DebugTrap,
        })
    }

    /// Delivers an event between two instructions.
    pub(in super::super) fn deliver_event(&mut self, event: Event) -> Res<(), M> {
        self.deliver(event)?;
        self.commit()
    }

    /// Delivers an event. The return address is the RIP that is put down.
    pub(super) fn deliver(&mut self, event: Event) -> Res<(), M> {
        if !event.by_program {
            self.ext = 1;
        }
        if self.mode.is_real() {
            return self.deliver_real(event.vector);
        }
        let gate = self.interrupt_gate(&event)?;
        if gate.attr().type_() == kind::TASK_GATE {
            return self.switch_task(gate.gate_selector(), Cause::Gate(event.error));
        }
        let target = self.handler(&gate)?;
        let size = self.gate_size(&gate);
        let mut stack = self.handler_stack(&gate, &target)?;
        self.push_frame(&mut stack, size, event.error, target.cpl)?;
        self.go(target, self.entry(&gate))?;
        self.use_pointer(&stack)?;
        let mut cleared = Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM;
        if gate.attr().type_() & 1 == 0 {
            cleared |= Rflags::IF;
        }
        self.flags = self.flags.without(cleared);
        Ok(())
    }

    /// Through a table of far pointers.
    fn deliver_real(&mut self, vector: u8) -> Res<(), M> {
        let at = u64::from(vector) << 2;
        let table = self.run.cpu.idtr();
        if at.wrapping_add(3) > u64::from(table.limit) {
            return Err(Fault::gp(idt_error(vector) | self.ext).into());
        }
        let pointer = self.read_system(table.base.wrapping_add(at), 4)?;
        self.enter_8086(pointer, self.flags)?;
        let cleared = Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF;
        self.flags = self.flags.without(cleared);
        Ok(())
    }

    /// Pushes flags and return address, and goes to the far pointer's 16 and 16 bits.
    pub(super) fn enter_8086(&mut self, pointer: u64, flags: Rflags) -> Res<(), M> {
        let cs = u64::from(self.segment(SegReg::Cs).selector);
        let mut stack = self.stack();
        self.push(&mut stack, Size::Word, flags.bits())?;
        self.push(&mut stack, Size::Word, cs)?;
        self.push(&mut stack, Size::Word, self.rip)?;
        self.go_8086((pointer >> 16) as u16, pointer & 0xffff)?;
        self.use_pointer(&stack)
    }

    /// Checks that the program may use the gate of a vector.
    pub(super) fn check_gate(&mut self, vector: u8) -> Res<(), M> {
        let event = Event {
            vector,
            error: None,
            by_program: true,
        };
        self.interrupt_gate(&event).map(|_| ())
    }

    /// The gate of a vector, checked.
    fn interrupt_gate(&mut self, event: &Event) -> Res<Descriptor, M> {
        let long = self.mode.is_long();
        let error = idt_error(event.vector) | self.ext;
        let entry_size = if long { 16u64 } else { 8 };
        let at = u64::from(event.vector).wrapping_mul(entry_size);
        let table = self.run.cpu.idtr();
        if at.wrapping_add(entry_size).wrapping_sub(1) > u64::from(table.limit) {
            return Err(Fault::gp(error).into());
        }
        let linear = table.base.wrapping_add(at);
        let low = self.read_system(linear, 8)?;
        let high = if long {
            self.read_system(linear.wrapping_add(8), 8)?
        } else {
            0
        };
        let gate = Descriptor { linear, low, high };
        let kind = gate.attr().type_();
        let known = match kind {
            kind::INTERRUPT_GATE | kind::TRAP_GATE => true,
            kind::TASK_GATE | kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 => !long,
            _ => false,
        };
        let permitted = !event.by_program || gate.attr().dpl() >= self.cpl;
        if gate.attr().s() || !known || !permitted {
            return Err(Fault::gp(error).into());
        }
        if !gate.attr().p() {
            return Err(Fault::np(error).into());
        }
        Ok(gate)
    }

    /// The code segment in a gate, checked.
    fn handler(&mut self, gate: &Descriptor) -> Res<Target, M> {
        let selector = gate.gate_selector();
        let code = self.code(selector)?;
        let attr = code.attr();
        let wrong_width = self.mode.is_long() && (!attr.l() || attr.db());
        if attr.dpl() > self.cpl || wrong_width {
            return Err(self.gp(selector).into());
        }
        if !attr.p() {
            return Err(self.np(selector).into());
        }
        let cpl = if code.is_conforming() {
            self.cpl
        } else {
            attr.dpl()
        };
        // Out of virtual-8086 mode it goes to the highest privilege only.
        if self.mode == CpuMode::Vm86 && cpl != 0 {
            return Err(self.gp(selector).into());
        }
        Ok(Target {
            code,
            selector,
            cpl,
        })
    }

    /// The stack that a handler gets.
    fn handler_stack(&mut self, gate: &Descriptor, target: &Target) -> Res<Stack, M> {
        let long = self.mode.is_long();
        let own = if long { gate.gate_stack() } else { 0 };
        let inward = target.cpl < self.cpl;
        if !long {
            return if inward {
                self.inner_stack(target.cpl, 0)
            } else {
                Ok(self.stack())
            };
        }
        let mut stack = if inward || own != 0 {
            self.inner_stack(target.cpl, own)?
        } else {
            Stack {
                pointer: self.run.cpu.gpr(Gpr::Rsp),
                mask: u64::MAX,
                mode: CpuMode::Long64,
                ..self.stack()
            }
        };
        stack.pointer &= !15;
        Ok(stack)
    }

    /// Pushes what a handler returns to.
    fn push_frame(
        &mut self,
        stack: &mut Stack,
        size: Size,
        error: Option<u32>,
        cpl: u8,
    ) -> Res<(), M> {
        let vm86 = self.mode == CpuMode::Vm86;
        let inward = cpl < self.cpl;
        let flags = self.flags.bits();
        if vm86 {
            for reg in [SegReg::Gs, SegReg::Fs, SegReg::Ds, SegReg::Es] {
                let selector = self.segment(reg).selector;
                self.push(stack, size, selector.into())?;
                self.set_segment(reg, Segment::NULL);
            }
        }
        if inward || self.mode.is_long() {
            let selector = self.segment(SegReg::Ss).selector;
            let pointer = self.run.cpu.gpr(Gpr::Rsp);
            self.push(stack, size, selector.into())?;
            self.push(stack, size, pointer)?;
        }
        let cs = self.segment(SegReg::Cs).selector;
        self.push(stack, size, flags)?;
        self.push(stack, size, cs.into())?;
        self.push(stack, size, self.rip)?;
        if let Some(error) = error {
            self.push(stack, size, error.into())?;
        }
        if inward {
            let segment = if self.mode.is_long() {
                null_stack(cpl, cpl.into())
            } else {
                stack.segment
            };
            self.set_segment(SegReg::Ss, segment);
        }
        Ok(())
    }

    /// Whether the program in virtual-8086 mode takes INT n itself: the bitmap before that of the I/O permissions says so.
    fn redirected(&mut self, vector: u8) -> Res<bool, M> {
        if !self.run.paging.cr4.has(Cr4::VME) {
            return Ok(false);
        }
        let tss = self.run.cpu.segment(SegReg::Tr);
        if tss.limit < 0x67 {
            return Err(Fault::gp(0).into());
        }
        let map = self.read_system(tss.base.wrapping_add(0x66), 2)? as u32;
        let at = map.wrapping_sub(32).wrapping_add(u32::from(vector) >> 3) & 0xffff;
        if at > tss.limit {
            return Err(Fault::gp(0).into());
        }
        let byte = self.read_system(tss.base.wrapping_add(at.into()), 1)?;
        Ok((byte >> (vector & 7)) & 1 == 0)
    }

    /// INT n that the program takes itself, with a virtual interrupt flag if it has no right to the real one.
    fn virtual_interrupt(&mut self, vector: u8) -> Res<(), M> {
        let pointer = self.read_system(u64::from(vector) << 2, 4)?;
        let trusted = self.flags.iopl() == 3;
        let pushed = if trusted {
            self.flags
        } else {
            let virtual_if = self.flags.has(Rflags::VIF);
            self.flags
                .with(Rflags::IOPL)
                .with_if(Rflags::IF, virtual_if)
        };
        self.enter_8086(pointer, pushed)?;
        let flag = if trusted { Rflags::IF } else { Rflags::VIF };
        self.flags = self.flags.without(flag | Rflags::TF | Rflags::NT);
        Ok(())
    }

    /// IRET of a program in virtual-8086 mode that has no right to the real interrupt flag: #GP(0), but for a virtual one.
    pub(super) fn return_virtual(&mut self, size: Size) -> Res<(), M> {
        if !self.run.paging.cr4.has(Cr4::VME) || size != Size::Word {
            return Err(Fault::gp(0).into());
        }
        let mut stack = self.stack();
        let offset = self.pop(&mut stack, size)?;
        let selector = self.pop(&mut stack, size)? as u16;
        let popped = Rflags::new(self.pop(&mut stack, size)?);
        let wants_interrupts = popped.has(Rflags::IF);
        if popped.has(Rflags::TF) || wants_interrupts && self.flags.has(Rflags::VIP) {
            return Err(Fault::gp(0).into());
        }
        self.go_8086(selector, offset)?;
        self.use_pointer(&stack)?;
        let loaded = Rflags::STATUS | Rflags::TF | Rflags::DF | Rflags::NT;
        self.flags = (self.flags.without(loaded) | popped.and(loaded))
            .with_if(Rflags::VIF, wants_interrupts);
        Ok(())
    }
}
