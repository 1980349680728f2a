// SPDX-License-Identifier: GPL-2.0

//! Stacks: the one in use, and that which a change of privilege brings.

use super::super::super::exception::Fault;
use super::super::super::insn::Size;
use super::super::super::paging::GuestMemory;
use super::super::super::paging::PageAccess;
use super::super::super::regs::Cr0;
use super::super::super::regs::Gpr;
use super::super::super::regs::Rflags;
use super::super::super::segment::linearize;
use super::super::super::segment::AccessKind;
use super::super::super::segment::CpuMode;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::access::Target;
use super::super::Cpu;
use super::Res;
use super::System;

/// A stack with its pointer.
#[derive(Clone, Copy)]
pub(super) struct Stack {
    pub(super) segment: Segment,
    pub(super) pointer: u64,
    /// The bits of the pointer that count.
    pub(super) mask: u64,
    /// The mode in which it is accessed.
    pub(super) mode: CpuMode,
    /// The privilege with which it is accessed.
    pub(super) cpl: u8,
    /// The error code if it is too small: zero, but for one that is not in use yet.
    pub(super) error: u32,
}

/// The bits of a stack pointer that count.
pub(super) fn pointer_mask(mode: CpuMode, stack: &Segment) -> u64 {
    if mode.is_64bit() {
        u64::MAX
    } else if stack.attr.db() {
        0xffff_ffff
    } else {
        0xffff
    }
}

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// The stack in use.
    pub(super) fn stack(&mut self) -> Stack {
        let segment = self.run.cpu.segment(SegReg::Ss);
        let mask = pointer_mask(self.mode, &segment);
        Stack {
            segment,
            pointer: self.run.cpu.gpr(Gpr::Rsp) & mask,
            mask,
            mode: self.mode,
            cpl: self.cpl,
            error: 0,
        }
    }

    fn stack_target(
        &mut self,
        stack: &Stack,
        pointer: u64,
        size: Size,
        kind: AccessKind,
    ) -> Res<Target, M> {
        let la57 = self.run.paging.la57();
        let len = size.bytes();
        let linear = linearize(
            stack.mode,
            la57,
            SegReg::Ss,
            &stack.segment,
            pointer & stack.mask,
            len.into(),
            kind,
        )
        .map_err(|_| Fault::ss(stack.error))?;
        let misaligned = linear & u64::from(len).wrapping_sub(1) != 0;
        let checked = stack.cpl == 3 && self.run.flags.has(Rflags::AC) && self.cr0().has(Cr0::AM);
        if misaligned && checked {
            return Err(Fault::ac().into());
        }
        let access = PageAccess::explicit(kind, stack.cpl);
        self.span(linear, len, stack.mode.linear_mask(), access)
    }

    /// Reads what is `above` bytes above the top of the stack.
    pub(super) fn peek(&mut self, stack: &Stack, above: u64, size: Size) -> Res<u64, M> {
        let at = stack.pointer.wrapping_add(above);
        let target = self.stack_target(stack, at, size, AccessKind::Read)?;
        self.run.load(&target)
    }

    /// Pops a value.
    pub(super) fn pop(&mut self, stack: &mut Stack, size: Size) -> Res<u64, M> {
        let value = self.peek(stack, 0, size)?;
        stack.pointer = stack.pointer.wrapping_add(size.bytes().into()) & stack.mask;
        Ok(value)
    }

    /// Puts down a push.
    pub(super) fn push(&mut self, stack: &mut Stack, size: Size, value: u64) -> Res<(), M> {
        let at = stack.pointer.wrapping_sub(size.bytes().into()) & stack.mask;
        let target = self.stack_target(stack, at, size, AccessKind::Write)?;
        stack.pointer = at;
        self.store(target, value & size.mask())
    }

    /// Puts down that this is where the stack pointer is now.
    pub(super) fn use_pointer(&mut self, stack: &Stack) -> Res<(), M> {
        let old = self.gpr(Gpr::Rsp);
        let new = match stack.mask {
            0xffff => old & !0xffff | stack.pointer & 0xffff,
            mask => stack.pointer & mask,
        };
        self.set_gpr(Gpr::Rsp, new)
    }
}
