// SPDX-License-Identifier: GPL-2.0

//! Hardware task switches (SDM vol. 3, chapter 9): what JMP, CALL, IRET and the gates of the IDT do with a TSS.
//!
//! Checks come first; a fault in them finds the old task as it was. Then the old task is saved and the new one's registers are loaded.
//! From there on a fault is one of the new task, before its first instruction.
//!
//! A TSS on a device is [`Stop::Unhandled`]. The trap that the T flag of a TSS asks for is not raised.

use super::super::super::exception::Vector;
use super::super::super::insn::Size;
use super::super::super::paging::GuestMemory;
use super::super::super::regs::Cr0;
use super::super::super::regs::Cr3;
use super::super::super::regs::Gpr;
use super::super::super::regs::Rflags;
use super::super::super::segment::AccessKind;
use super::super::super::segment::CpuMode;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::access::Stop;
use super::super::Cpu;
use super::descriptors::kind;
use super::descriptors::Descriptor;
use super::is_null;
use super::rpl;
use super::stack::pointer_mask;
use super::stack::Stack;
use super::transfer::vm86_segment;
use super::Res;
use super::System;

/// What switches tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// JMP.
    Jump,
    /// CALL: the new task is nested in the old one.
    Call,
    /// IRET, out of a nested task.
    Return,
    /// A task gate in the IDT, with the error code to be pushed: nested as well.
    Gate(Option<u32>),
}

impl Cause {
    /// Whether the new task remembers the old one.
    const fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Gate(_))
    }
}

/// A switch of tasks, as an exit describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// What switches.
    pub cause: Cause,
    /// The selector of the new TSS.
    pub selector: u16,
    /// Whether it is by an event that the program has not asked for: an exception or an interrupt.
    pub external: bool,
    /// For an instruction of the program that came through a gate of the IDT: its vector. The gate has to permit it.
    pub program_vector: Option<u8>,
    /// How long the instruction is that the old task goes on after; zero if it goes on with that at RIP.
    pub insn_len: u8,
}

/// Where a TSS has what. All fields of a register have the same width.
struct Layout {
    size: Size,
    /// The least limit.
    limit: u32,
    ip: u64,
    flags: u64,
    /// The first of the eight general registers.
    registers: u64,
    /// The first segment register, ES, and what is between two of them.
    segments: u64,
    step: u64,
    /// How many there are: no FS and GS in 16 bits.
    count: usize,
    ldt: u64,
}

const TSS32: Layout = Layout {
    size: Size::Dword,
    limit: 0x67,
    ip: 0x20,
    flags: 0x24,
    registers: 0x28,
    segments: 0x48,
    step: 4,
    count: 6,
    ldt: 0x60,
};
const TSS16: Layout = Layout {
    size: Size::Word,
    limit: 0x2b,
    ip: 0xe,
    flags: 0x10,
    registers: 0x12,
    segments: 0x22,
    step: 2,
    count: 4,
    ldt: 0x2a,
};
/// CR3, in the 32-bit one only.
const CR3: u64 = 0x1c;

/// The segment registers, in the order of a TSS.
const SEGMENTS: [SegReg; 6] = [
    SegReg::Es,
    SegReg::Cs,
    SegReg::Ss,
    SegReg::Ds,
    SegReg::Fs,
    SegReg::Gs,
];

impl Layout {
    /// By the type of the descriptor.
    const fn of(type_: u8) -> &'static Self {
        if type_ & 8 != 0 {
            &TSS32
        } else {
            &TSS16
        }
    }

    fn register(&self, r: Gpr) -> u64 {
        self.registers
            .wrapping_add(u64::from(r.number() & 7).wrapping_mul(self.step))
    }

    fn segment(&self, i: usize) -> u64 {
        self.segments
            .wrapping_add((i as u64).wrapping_mul(self.step))
    }
}

/// What a TSS has of a task.
struct Task {
    ip: u64,
    flags: Rflags,
    registers: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    cr3: u64,
}

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// The switch of an exit. RIP is at the instruction.
    pub(in super::super) fn exited_switch(&mut self, switch: &TaskSwitch) -> Res<(), M> {
        if let Some(vector) = switch.program_vector {
            self.check_gate(vector)?;
        }
        self.ext = u32::from(switch.external);
        let next = self.rip.wrapping_add(switch.insn_len.into());
        self.rip = next & self.mode.linear_mask();
        if switch.insn_len != 0 {
            self.flags = self.flags.without(Rflags::RF);
        }
        if switch.cause == Cause::Return {
            self.unblocks_nmi = true;
        }
        self.switch_task(switch.selector, switch.cause)?;
        self.commit()
    }

    /// IRET with NT set: to the task that this one is nested in.
    pub(super) fn return_to_task(&mut self) -> Res<(), M> {
        let tss = self.run.cpu.segment(SegReg::Tr);
        let link = self.read_system(tss.base, 2)? as u16;
        self.switch_task(link, Cause::Return)
    }

    /// Switches to the task of a TSS. RIP, as it is put down, is where the old task goes on.
    pub(super) fn switch_task(&mut self, selector: u16, cause: Cause) -> Res<(), M> {
        let descriptor = self.next_tss(selector, cause)?;
        let new = descriptor.segment(selector);
        let layout = Layout::of(descriptor.attr().type_());
        self.reach(&new, 0, layout.ldt, AccessKind::Read)?;
        self.leave(cause)?;
        let mut busy = descriptor;
        if cause != Cause::Return {
            busy = self.retype(descriptor, descriptor.attr().type_() | 2)?;
        }
        if cause.nests() {
            let old = self.run.cpu.segment(SegReg::Tr).selector;
            let link = self.system_span(new.base, 2, AccessKind::Write)?;
            self.store(link, old.into())?;
        }
        // Nothing can fault from here on, until the new task is there.
        self.write_memory()?;
        let task = self.read_task(&new, layout)?;
        self.become_task(&task, busy.segment(selector), layout, cause);
        match self.enter_task(&task, layout, cause) {
            Err(Stop::Fault(fault)) => {
                // It is the new task's.
                self.stores_len = 0;
                self.commit()?;
                Err(Stop::Fault(fault))
            }
            other => other,
        }
    }

    /// The descriptor of the TSS to switch to, checked.
    fn next_tss(&mut self, selector: u16, cause: Cause) -> Res<Descriptor, M> {
        let returning = cause == Cause::Return;
        let refused = if returning {
            self.ts(selector)
        } else {
            self.gp(selector)
        };
        if selector & 4 != 0 || is_null(selector) {
            return Err(refused.into());
        }
        let descriptor = self.descriptor(selector)?.ok_or(refused)?;
        let fits = match descriptor.attr().type_() {
            kind::TSS_AVAILABLE | kind::TSS16_AVAILABLE => !returning,
            kind::TSS_BUSY | kind::TSS16_BUSY => returning,
            _ => false,
        };
        if descriptor.attr().s() || !fits {
            return Err(refused.into());
        }
        if !descriptor.attr().p() {
            return Err(self.np(selector).into());
        }
        if descriptor.limit() < Layout::of(descriptor.attr().type_()).limit {
            return Err(self.ts(selector).into());
        }
        Ok(descriptor)
    }

    /// Sees to it that a part of a TSS can be accessed, so that no fault comes later.
    fn reach(&mut self, tss: &Segment, first: u64, last: u64, kind: AccessKind) -> Res<(), M> {
        for offset in [first, last] {
            let target = self.system_span(tss.base.wrapping_add(offset), 2, kind)?;
            memory(self.run.load(&target))?;
        }
        Ok(())
    }

    /// Puts down that the old task is saved.
    fn leave(&mut self, cause: Cause) -> Res<(), M> {
        let old = self.run.cpu.segment(SegReg::Tr);
        let layout = Layout::of(old.attr.type_());
        let last = layout.segment(layout.count.wrapping_sub(1));
        self.reach(&old, layout.ip, last, AccessKind::Write)?;
        if !cause.nests() {
            if let Some(descriptor) = self.descriptor(old.selector)? {
                self.retype(descriptor, descriptor.attr().type_() & !2)?;
            }
        }
        let mut flags = self.flags;
        if cause == Cause::Return {
            flags = flags.without(Rflags::NT);
        }
        let rip = self.rip;
        self.save(&old, layout.ip, layout.size, rip)?;
        self.save(&old, layout.flags, layout.size, flags.bits())?;
        for r in Gpr::ALL.into_iter().take(8) {
            let value = self.run.cpu.gpr(r);
            self.save(&old, layout.register(r), layout.size, value)?;
        }
        for (i, reg) in SEGMENTS.into_iter().enumerate().take(layout.count) {
            let selector = self.run.cpu.segment(reg).selector;
            self.save(&old, layout.segment(i), Size::Word, selector.into())?;
        }
        Ok(())
    }

    fn save(&mut self, tss: &Segment, offset: u64, size: Size, value: u64) -> Res<(), M> {
        let linear = tss.base.wrapping_add(offset);
        let target = self.system_span(linear, size.bytes(), AccessKind::Write)?;
        self.store(target, value & size.mask())
    }

    fn load_field(&mut self, tss: &Segment, offset: u64, size: Size) -> Res<u64, M> {
        memory(self.read_system(tss.base.wrapping_add(offset), size.bytes()))
    }

    fn read_task(&mut self, tss: &Segment, layout: &Layout) -> Res<Task, M> {
        let size = layout.size;
        let mut registers = [0; 8];
        for (slot, r) in registers.iter_mut().zip(Gpr::ALL) {
            *slot = self.load_field(tss, layout.register(r), size)?;
        }
        let mut selectors = [0; 6];
        for (i, slot) in selectors.iter_mut().enumerate().take(layout.count) {
            *slot = self.load_field(tss, layout.segment(i), Size::Word)? as u16;
        }
        let cr3 = match size {
            Size::Dword => self.load_field(tss, CR3, size)?,
            _ => 0,
        };
        Ok(Task {
            ip: self.load_field(tss, layout.ip, size)?,
            flags: Rflags::new(self.load_field(tss, layout.flags, size)?),
            registers,
            selectors,
            ldt: self.load_field(tss, layout.ldt, Size::Word)? as u16,
            cr3,
        })
    }

    /// Loads everything that needs no further check.
    fn become_task(&mut self, task: &Task, tss: Segment, layout: &Layout, cause: Cause) {
        let cpu = &mut *self.run.cpu;
        cpu.set_segment(SegReg::Tr, &tss);
        if self.run.paging.cr0.has(Cr0::PG) && layout.size == Size::Dword {
            cpu.set_cr3(Cr3::new(task.cr3));
            self.run.paging.cr3 = Cr3::new(task.cr3);
        }
        cpu.task_switched();
        for (r, value) in Gpr::ALL.into_iter().zip(task.registers) {
            // Of 16 bits, the upper half of the register is not defined.
            cpu.set_gpr(r, value);
        }
        let ldt = Segment {
            selector: task.ldt,
            ..Segment::NULL
        };
        cpu.set_segment(SegReg::Ldtr, &ldt);
        // Where it ends if a segment cannot be loaded: the selectors are the new ones. What CS and SS are is left to them.
        for (reg, selector) in SEGMENTS.into_iter().zip(task.selectors) {
            let hidden = match reg {
                SegReg::Cs | SegReg::Ss => cpu.segment(reg),
                _ => Segment::NULL,
            };
            cpu.set_segment(reg, &Segment { selector, ..hidden });
        }
        self.rip = task.ip;
        self.flags = task.flags.and(Rflags::NAMED).with(Rflags::FIXED);
        if cause.nests() {
            self.flags |= Rflags::NT;
        }
        self.gprs_len = 0;
        self.segments = [None; 8];
    }

    /// Loads the segments of the new task, and gives it the error code of the exception that it handles.
    fn enter_task(&mut self, task: &Task, layout: &Layout, cause: Cause) -> Res<(), M> {
        let vm86 = self.flags.has(Rflags::VM);
        self.mode = if vm86 {
            CpuMode::Vm86
        } else {
            CpuMode::Protected32
        };
        let old_ss = self.segment(SegReg::Ss);
        if vm86 {
            self.cpl = 3;
            for (reg, selector) in SEGMENTS.into_iter().zip(task.selectors) {
                self.set_segment(reg, vm86_segment(selector));
            }
        }
        self.task_ldt(task.ldt)?;
        if !vm86 {
            self.task_segments(&task.selectors, old_ss)?;
        }
        let code = self.segment(SegReg::Cs);
        self.check_offset(self.mode, &code, self.rip)?;
        if let Cause::Gate(Some(error)) = cause {
            let segment = self.segment(SegReg::Ss);
            let mask = pointer_mask(self.mode, &segment);
            let mut stack = Stack {
                segment,
                pointer: self.run.cpu.gpr(Gpr::Rsp) & mask,
                mask,
                mode: self.mode,
                cpl: self.cpl,
                error: self.ext,
            };
            self.push(&mut stack, layout.size, error.into())?;
            self.use_pointer(&stack)?;
        }
        Ok(())
    }

    fn task_ldt(&mut self, selector: u16) -> Res<(), M> {
        if is_null(selector) {
            return Ok(());
        }
        let fault = self.ts(selector);
        if selector & 4 != 0 {
            return Err(fault.into());
        }
        let descriptor = self.descriptor(selector)?.ok_or(fault)?;
        if !descriptor.is_system(kind::LDT) || !descriptor.attr().p() {
            return Err(fault.into());
        }
        self.set_segment(SegReg::Ldtr, descriptor.segment(selector));
        Ok(())
    }

    fn task_segments(&mut self, selectors: &[u16; 6], old_ss: Segment) -> Res<(), M> {
        let [_, cs, ss, ..] = *selectors;
        let cpl = rpl(cs);
        let code = self.task_descriptor(cs)?;
        let dpl = code.attr().dpl();
        let fits = if code.is_conforming() {
            dpl <= cpl
        } else {
            dpl == cpl
        };
        if !code.attr().is_code() || !fits {
            return Err(self.ts(cs).into());
        }
        if !code.attr().p() {
            return Err(self.np(cs).into());
        }
        let code = self.accessed(code)?.segment(cs);
        self.set_segment(SegReg::Cs, code);
        self.cpl = cpl;
        // The privilege level is that of SS, should SS not be what it ought to.
        let provisional = Segment {
            attr: old_ss.attr.with_dpl(cpl),
            ..old_ss
        };
        self.set_segment(SegReg::Ss, provisional);
        let stack = self.task_descriptor(ss)?;
        if !stack.is_writable() || rpl(ss) != cpl || stack.attr().dpl() != cpl {
            return Err(self.ts(ss).into());
        }
        if !stack.attr().p() {
            return Err(self.ss(ss).into());
        }
        let stack = self.accessed(stack)?.segment(ss);
        self.set_segment(SegReg::Ss, stack);
        for (reg, selector) in SEGMENTS.into_iter().zip(*selectors) {
            if matches!(reg, SegReg::Cs | SegReg::Ss) {
                continue;
            }
            let segment = match self.data_segment(selector) {
                Err(Stop::Fault(fault)) if fault.vector == Vector::GP => {
                    return Err(self.ts(selector).into());
                }
                other => other?,
            };
            // Of each segment there is a mark to make; they are few.
            self.write_memory()?;
            self.set_segment(reg, segment);
        }
        Ok(())
    }

    /// A descriptor that the new task cannot do without.
    fn task_descriptor(&mut self, selector: u16) -> Res<Descriptor, M> {
        let fault = self.ts(selector);
        if is_null(selector) {
            return Err(fault.into());
        }
        Ok(self.descriptor(selector)?.ok_or(fault)?)
    }
}

/// A TSS is in memory.
fn memory<T, E>(result: Result<T, Stop<E>>) -> Result<T, Stop<E>> {
    match result {
        Err(Stop::Mmio { .. }) => Err(Stop::Unhandled),
        other => other,
    }
}
