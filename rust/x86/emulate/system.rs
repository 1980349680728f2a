// SPDX-License-Identifier: GPL-2.0

//! System instructions: segments and their descriptors, far control transfers, interrupts, tasks, tables, ports.
//!
//! They change more than others do, and may fault late: a far return reads two stacks and three descriptors before it is known
//! whether it is allowed. So there is a [`System`] above the [`Run`]: it shows the processor with the changes that were put down so
//! far, and makes them all when nothing can go wrong any more. A hardware task switch alone has a point of no return in its middle
//! ([`task`]).
//!
//! What concerns neither memory nor these registers - ports, MSRs, control registers, HLT - is not done here. The privilege is checked,
//! and the rest is asked for with a [`Service`], which the caller carries out like an exit of the processor by that instruction.

mod control;
mod descriptors;
pub(super) mod interrupt;
mod ports;
mod segments;
mod stack;
mod syscall;
mod tables;
pub(super) mod task;
mod transfer;

use super::super::event::Shadow;
use super::super::exception::Fault;
use super::super::insn::system::SystemOp;
use super::super::insn::Insn;
use super::super::insn::Op;
use super::super::insn::Operand;
use super::super::insn::Size;
use super::super::paging::GuestMemory;
use super::super::paging::PageAccess;
use super::super::paging::PAGE_OFFSET;
use super::super::paging::PAGE_SIZE;
use super::super::regs::Cr0;
use super::super::regs::Gpr;
use super::super::regs::Rflags;
use super::super::segment::is_canonical;
use super::super::segment::AccessKind;
use super::super::segment::CpuMode;
use super::super::segment::SegReg;
use super::super::segment::Segment;
use super::access::Part;
use super::access::Run;
use super::access::Stop;
use super::access::Target;
use super::Cpu;
use super::Service;
use super::TableReg;

/// What comes of a step of an instruction.
type Res<T, M> = Result<T, Stop<<M as GuestMemory>::Error>>;

/// A write to memory that is put down.
#[derive(Clone, Copy)]
struct Store {
    target: Target,
    value: u64,
}

/// A change of a byte that has to be locked: the type of a descriptor.
#[derive(Clone, Copy)]
struct Mark {
    gpa: u64,
    old: u8,
    new: u8,
}

/// The most that an instruction pushes: a call gate's 31 parameters and two far pointers.
const MAX_STORES: usize = 36;
/// The most descriptors that one changes.
const MAX_MARKS: usize = 4;
/// The most general registers that one changes.
const MAX_GPRS: usize = 4;

const NO_STORE: Store = Store {
    target: Target {
        parts: [Part { gpa: 0, len: 0 }; 2],
    },
    value: 0,
};
const NO_MARK: Mark = Mark {
    gpa: 0,
    old: 0,
    new: 0,
};

/// A system instruction under way.
pub(super) struct System<'r, 'a, C, M> {
    run: &'r mut Run<'a, C, M>,
    /// The mode before the instruction.
    mode: CpuMode,
    /// The privilege level: the new one as soon as it is known.
    cpl: u8,
    /// Bit 0 of error codes: set while an event is delivered that the program has not asked for.
    ext: u32,
    rip: u64,
    flags: Rflags,
    segments: [Option<Segment>; 8],
    gprs: [(Gpr, u64); MAX_GPRS],
    gprs_len: usize,
    gdtr: Option<TableReg>,
    idtr: Option<TableReg>,
    stores: [Store; MAX_STORES],
    stores_len: usize,
    marks: [Mark; MAX_MARKS],
    marks_len: usize,
    shadow: Shadow,
    /// IRET: NMIs are taken again.
    unblocks_nmi: bool,
}

/// Carries out a system instruction. Says whether it has retired.
pub(super) fn execute<C: Cpu, M: GuestMemory>(
    run: &mut Run<'_, C, M>,
    insn: &Insn,
    op: SystemOp,
) -> Res<bool, M> {
    let mut system = System::new(run);
    system.rip = system.run.next_rip(insn);
    // An instruction that completes clears RF; some load it.
    system.flags = system.flags.without(Rflags::RF);
    system.operate(insn, op)?;
    system.commit()?;
    Ok(true)
}

/// Whether an instruction is INT n or one of its siblings.
pub(super) const fn is_interrupt(op: Op) -> bool {
    use SystemOp as O;
    matches!(
        op,
        Op::System(O::Interrupt | O::Breakpoint | O::Overflow | O::DebugTrap)
    )
}

/// The error code that names a selector.
const fn selector_error(selector: u16) -> u32 {
    (selector & 0xfffc) as u32
}

/// Whether a selector selects nothing.
const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl<'r, 'a, C: Cpu, M: GuestMemory> System<'r, 'a, C, M> {
    pub(super) fn new(run: &'r mut Run<'a, C, M>) -> Self {
        Self {
            mode: run.mode,
            cpl: run.cpl,
            ext: 0,
            rip: run.rip,
            flags: run.flags,
            segments: [None; 8],
            gprs: [(Gpr::Rax, 0); MAX_GPRS],
            gprs_len: 0,
            gdtr: None,
            idtr: None,
            stores: [NO_STORE; MAX_STORES],
            stores_len: 0,
            marks: [NO_MARK; MAX_MARKS],
            marks_len: 0,
            shadow: Shadow::None,
            unblocks_nmi: false,
            run,
        }
    }

    fn operate(&mut self, insn: &Insn, op: SystemOp) -> Res<(), M> {
        use SystemOp as O;
        match op {
            O::LoadSegment => self.mov_to_segment(insn),
            O::LoadFar(seg) => self.load_far(insn, seg),
            O::PopSegment(seg) => self.pop_segment(insn, seg),
            O::FarJump => self.far_jump(insn),
            O::FarCall => self.far_call(insn),
            O::FarReturn => self.far_return(insn),
            O::InterruptReturn => self.interrupt_return(insn),
            O::Interrupt | O::Breakpoint | O::Overflow | O::DebugTrap => {
                self.software_interrupt(insn, op)
            }
            O::StoreGdt => self.store_table(insn, false),
            O::StoreIdt => self.store_table(insn, true),
            O::LoadGdt => self.load_table(insn, false),
            O::LoadIdt => self.load_table(insn, true),
            O::StoreLdt => self.store_selector(insn, SegReg::Ldtr),
            O::StoreTask => self.store_selector(insn, SegReg::Tr),
            O::LoadLdt => self.load_ldt(insn),
            O::LoadTask => self.load_task(insn),
            O::AccessRights => self.access_rights(insn),
            O::SegmentLimit => self.segment_limit(insn),
            O::VerifyRead => self.verify(insn, AccessKind::Read),
            O::VerifyWrite => self.verify(insn, AccessKind::Write),
            O::AdjustRpl => self.adjust_rpl(insn),
            O::StoreMsw => self.store_msw(insn),
            O::InterruptsOff => self.set_interrupts(false),
            O::InterruptsOn => self.set_interrupts(true),
            O::SwapGs => self.swap_gs(),
            O::AccessCheckOn => self.set_access_check(true),
            O::AccessCheckOff => self.set_access_check(false),
            O::ReadXcr => self.read_xcr(insn),
            O::In | O::Out => self.port(insn, op),
            O::InString | O::OutString => self.port_string(insn, op),
            O::Syscall => self.syscall(),
            O::Sysret => self.sysret(insn),
            O::Sysenter => self.sysenter(),
            O::Sysexit => self.sysexit(insn),
            _ => self.control(insn, op),
        }
    }

    /// Whether segments are those of protected mode.
    fn protected(&self) -> bool {
        !self.mode.is_8086()
    }

    /// #UD in real and virtual-8086 mode.
    fn need_protected(&self) -> Res<(), M> {
        if self.protected() {
            Ok(())
        } else {
            Err(Fault::UD.into())
        }
    }

    /// #GP(0) unless at the highest privilege.
    fn need_cpl0(&self) -> Res<(), M> {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(Fault::gp(0).into())
        }
    }

    /// Has the caller do what is not for memory, RIP still at the instruction.
    fn ask(&self, insn: &Insn, service: Service) -> Res<(), M> {
        Err(Stop::Service {
            service,
            len: insn.len,
        })
    }

    /// A segment register, with the changes so far.
    fn segment(&mut self, reg: SegReg) -> Segment {
        match self.segments.get(reg as usize) {
            Some(Some(segment)) => *segment,
            _ => self.run.cpu.segment(reg),
        }
    }

    fn set_segment(&mut self, reg: SegReg, value: Segment) {
        if let Some(slot) = self.segments.get_mut(reg as usize) {
            *slot = Some(value);
        }
    }

    /// A general register, with the changes so far.
    fn gpr(&mut self, r: Gpr) -> u64 {
        let changed = self.gprs.iter().take(self.gprs_len).rev();
        match changed.into_iter().find(|(changed, _)| *changed == r) {
            Some((_, value)) => *value,
            None => self.run.cpu.gpr(r),
        }
    }

    /// Puts down a new value, all 64 bits of it.
    fn set_gpr(&mut self, r: Gpr, value: u64) -> Res<(), M> {
        let Some(slot) = self.gprs.get_mut(self.gprs_len) else {
            return Err(Stop::Unhandled);
        };
        *slot = (r, value);
        self.gprs_len = self.gprs_len.wrapping_add(1);
        Ok(())
    }

    /// Puts down a new value of this size: 32 bits clear the upper half, fewer leave the rest alone.
    fn set_gpr_part(&mut self, r: Gpr, size: Size, value: u64) -> Res<(), M> {
        let new = match size {
            Size::Dword | Size::Qword => value & size.mask(),
            Size::Byte | Size::Word => self.gpr(r) & !size.mask() | value & size.mask(),
        };
        self.set_gpr(r, new)
    }

    /// The parts of `len` bytes, 1 to 8, at a linear address. `mask` is what addresses are cut to.
    fn span(&mut self, linear: u64, len: u8, mask: u64, access: PageAccess) -> Res<Target, M> {
        let gpa = self.run.translate(linear, access)?;
        let room = PAGE_SIZE.wrapping_sub(linear & PAGE_OFFSET);
        if room >= u64::from(len) {
            return Ok(Target {
                parts: [Part { gpa, len }, Part::default()],
            });
        }
        let head = room as u8;
        let second = self
            .run
            .translate(linear.wrapping_add(room) & mask, access)?;
        Ok(Target {
            parts: [
                Part { gpa, len: head },
                Part {
                    gpa: second,
                    len: len.wrapping_sub(head),
                },
            ],
        })
    }

    /// The linear addresses that tables and system segments are in.
    fn system_mask(&self) -> u64 {
        if self.mode.is_long() {
            u64::MAX
        } else {
            0xffff_ffff
        }
    }

    /// Where the processor accesses a structure of its own.
    fn system_span(&mut self, linear: u64, len: u8, kind: AccessKind) -> Res<Target, M> {
        let mask = self.system_mask();
        let last = linear.wrapping_add(u64::from(len).wrapping_sub(1));
        let la57 = self.run.paging.la57();
        if self.mode.is_long() && !(is_canonical(linear, la57) && is_canonical(last, la57)) {
            return Err(Fault::gp(self.ext).into());
        }
        self.span(linear & mask, len, mask, PageAccess::implicit(kind))
    }

    /// Reads `len` bytes, 1 to 8, of such a structure.
    fn read_system(&mut self, linear: u64, len: u8) -> Res<u64, M> {
        let target = self.system_span(linear, len, AccessKind::Read)?;
        self.run.load(&target)
    }

    /// Puts down a write.
    fn store(&mut self, target: Target, value: u64) -> Res<(), M> {
        let Some(slot) = self.stores.get_mut(self.stores_len) else {
            return Err(Stop::Unhandled);
        };
        *slot = Store { target, value };
        self.stores_len = self.stores_len.wrapping_add(1);
        Ok(())
    }

    /// Puts down that the byte at a linear address of a system structure changes.
    fn mark(&mut self, linear: u64, old: u8, new: u8) -> Res<(), M> {
        let target = self.system_span(linear, 1, AccessKind::Write)?;
        let [Part { gpa, .. }, _] = target.parts;
        let Some(slot) = self.marks.get_mut(self.marks_len) else {
            return Err(Stop::Unhandled);
        };
        *slot = Mark { gpa, old, new };
        self.marks_len = self.marks_len.wrapping_add(1);
        Ok(())
    }

    /// Makes all the changes.
    fn commit(&mut self) -> Res<(), M> {
        self.write_memory()?;
        for (reg, value) in SegReg::ALL.into_iter().zip(self.segments) {
            if let Some(value) = value {
                self.run.cpu.set_segment(reg, &value);
            }
        }
        let gprs = self.gprs;
        for &(r, value) in gprs.iter().take(self.gprs_len) {
            self.run.cpu.set_gpr(r, value);
        }
        if let Some(table) = self.gdtr {
            self.run.cpu.set_gdtr(table);
        }
        if let Some(table) = self.idtr {
            self.run.cpu.set_idtr(table);
        }
        if self.unblocks_nmi {
            self.run.cpu.unblock_nmi();
        }
        self.run.cpu.set_rip(self.rip);
        if self.flags != self.run.cpu.rflags() {
            self.run.cpu.set_rflags(self.flags);
        }
        self.run.flags = self.flags;
        self.run.shadow = self.shadow;
        self.run.emulator.reads.clear();
        Ok(())
    }

    /// Makes the changes of memory: first those that may find that somebody else was quicker.
    fn write_memory(&mut self) -> Res<(), M> {
        let marks = self.marks;
        for mark in marks.iter().take(self.marks_len) {
            self.run.write_mark(mark.gpa, mark.old, mark.new)?;
        }
        let stores = self.stores;
        for store in stores.iter().take(self.stores_len) {
            self.run.write_target(&store.target, store.value)?;
        }
        self.marks_len = 0;
        self.stores_len = 0;
        Ok(())
    }

    /// The 16 bits of an operand that is a selector or the machine status word.
    fn word(&mut self, insn: &Insn, operand: Operand) -> Res<u16, M> {
        let value = match operand {
            Operand::Mem(mem) => {
                let offset = self.run.effective_address(insn, &mem, 0);
                self.run.read(mem.seg, offset, Size::Word)?
            }
            other => self.run.register(other, Size::Word)?,
        };
        Ok(value as u16)
    }

    /// Puts down that an operand gets a value: a register at the operand size, memory 16 bits.
    fn give(&mut self, insn: &Insn, operand: Operand, value: u64) -> Res<(), M> {
        match operand {
            Operand::Mem(mem) => {
                let offset = self.run.effective_address(insn, &mem, 0);
                let target = self
                    .run
                    .target(mem.seg, offset, Size::Word, AccessKind::Write)?;
                self.store(target, value)
            }
            Operand::Reg(r) => self.set_gpr_part(r, insn.size, value),
            _ => Err(Stop::Unhandled),
        }
    }

    fn cr0(&mut self) -> Cr0 {
        self.run.paging.cr0
    }
}
