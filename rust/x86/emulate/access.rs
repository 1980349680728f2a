// SPDX-License-Identifier: GPL-2.0

//! One run of an instruction: its view of registers and memory, and the changes that it has in mind.
//!
//! Reads happen at once, or are answered from the list of device reads that came before. Changes of registers and memory
//! are put down and made by [`Run::commit`] when nothing can stop the instruction any more.

use super::super::decode::decode;
use super::super::event::Shadow;
use super::super::exception::Fault;
use super::super::insn::DecodeError;
use super::super::insn::Insn;
use super::super::insn::MemRef;
use super::super::insn::Operand;
use super::super::insn::Size;
use super::super::insn::MAX_INSN_LEN;
use super::super::paging::GuestMemory;
use super::super::paging::MemoryError;
use super::super::paging::PageAccess;
use super::super::paging::Paging;
use super::super::paging::WalkError;
use super::super::paging::PAGE_OFFSET;
use super::super::paging::PAGE_SIZE;
use super::super::regs::Cr0;
use super::super::regs::Cr4;
use super::super::regs::Gpr;
use super::super::regs::Rflags;
use super::super::segment::is_canonical;
use super::super::segment::linearize;
use super::super::segment::AccessKind;
use super::super::segment::CpuMode;
use super::super::segment::SegReg;
use super::super::segment::Segment;
use super::list::List;
use super::Cpu;
use super::Emulator;
use super::Mmio;
use super::Service;
use super::MAX_MMIO;
use super::PAGE_MASK;

/// Why a run did not reach its end.
pub(super) enum Stop<E> {
    /// The guest is owed an exception.
    Fault(Fault),
    /// A device has to be read first.
    Mmio {
        /// Where.
        gpa: u64,
        /// How many bytes, 1 to 8.
        len: u8,
    },
    /// The instruction is not one that is emulated.
    Unhandled,
    /// The rest is not for the emulator.
    Service {
        /// What it is.
        service: Service,
        /// How long the instruction is.
        len: u8,
    },
    /// Another processor interfered: run it again.
    Retry,
    /// The host could not reach guest memory.
    Host(E),
}

impl<E> From<Fault> for Stop<E> {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A part of a memory operand inside one page.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    pub(super) gpa: u64,
    pub(super) len: u8,
}

/// A translated memory operand of up to eight bytes: one part, or two if it crosses a page. The second is empty otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Target {
    pub(super) parts: [Part; 2],
}

impl Target {
    fn is_empty(&self) -> bool {
        let [first, _] = self.parts;
        first.len == 0
    }

    /// Whether the operand is one aligned piece, as atomic operations need.
    fn is_atomic(&self) -> bool {
        let [first, second] = self.parts;
        second.len == 0
            && first.len.is_power_of_two()
            && first.gpa & u64::from(first.len).wrapping_sub(1) == 0
    }
}

/// A translated memory operand of up to 32 bytes: pieces of eight, those at the end perhaps shorter or empty.
#[derive(Clone, Copy, Default)]
pub(super) struct WideTarget {
    pieces: [Target; 4],
}

/// A write to memory that is put down.
#[derive(Clone, Copy, Debug)]
struct Store {
    target: Target,
    value: u64,
    /// For a locked instruction, what memory must still hold.
    expected: Option<u64>,
}

/// The most registers that an instruction changes, but for the stack pointer: POPA.
const MAX_REGISTERS: usize = 8;

/// The most writes to memory of an instruction: PUSHA.
const MAX_STORES: usize = 8;

/// The changes of memory and registers that a run has put down.
#[derive(Clone, Debug)]
pub(super) struct Changes {
    stores: List<Store, MAX_STORES>,
    registers: List<(Operand, Size, u64), MAX_REGISTERS>,
}

impl Changes {
    /// None.
    pub(super) const fn new() -> Self {
        const NOWHERE: Part = Part { gpa: 0, len: 0 };
        Self {
            stores: List::new(Store {
                target: Target {
                    parts: [NOWHERE; 2],
                },
                value: 0,
                expected: None,
            }),
            registers: List::new((Operand::None, Size::Byte, 0)),
        }
    }

    fn clear(&mut self) {
        self.stores.clear();
        self.registers.clear();
    }
}

pub(super) struct Run<'a, C, M> {
    pub(super) cpu: &'a mut C,
    memory: &'a mut M,
    pub(super) emulator: &'a mut Emulator,
    pub(super) mode: CpuMode,
    pub(super) paging: Paging,
    pub(super) cpl: u8,
    pub(super) rip: u64,
    pub(super) flags: Rflags,
    /// What holds events back after the instruction.
    pub(super) shadow: Shadow,
    /// How many of the device reads that are known this run has used.
    reads_used: usize,
    /// The stack pointer, if pushes and pops have moved it.
    stack: Option<u64>,
    /// Where the instruction goes, if not to the next one.
    branch: Option<u64>,
}

impl<'a, C: Cpu, M: GuestMemory> Run<'a, C, M> {
    pub(super) fn new(cpu: &'a mut C, memory: &'a mut M, emulator: &'a mut Emulator) -> Self {
        let mode = cpu.mode();
        let paging = cpu.paging();
        emulator.changes.clear();
        Self {
            mode,
            paging,
            cpl: cpu.cpl(),
            rip: cpu.rip(),
            flags: paging.rflags,
            shadow: Shadow::None,
            cpu,
            memory,
            emulator,
            reads_used: 0,
            stack: None,
            branch: None,
        }
    }

    /// Whether a device was read or is to be written.
    pub(super) fn met_device(&self) -> bool {
        self.reads_used > 0 || !self.emulator.writes.is_empty()
    }

    /// Drops what is put down, for another iteration or another try.
    pub(super) fn rewind(&mut self) {
        self.reads_used = 0;
        self.emulator.changes.clear();
        self.stack = None;
        self.branch = None;
        self.flags = self.cpu.rflags();
    }

    /// RFLAGS, with the changes so far.
    pub(super) fn flags(&self) -> Rflags {
        self.flags
    }

    /// Puts down a change of RFLAGS.
    pub(super) fn set_flags(&mut self, flags: Rflags) {
        self.flags = flags;
    }

    /// A general register as it was before the instruction.
    pub(super) fn gpr(&mut self, r: Gpr) -> u64 {
        self.cpu.gpr(r)
    }

    /// The mode.
    pub(super) fn mode(&self) -> CpuMode {
        self.mode
    }

    /// The current privilege level.
    pub(super) fn cpl(&self) -> u8 {
        self.cpl
    }

    /// CR0.
    pub(super) fn cr0(&self) -> Cr0 {
        self.paging.cr0
    }

    /// CR4.
    pub(super) fn cr4(&self) -> Cr4 {
        self.paging.cr4
    }

    /// The processor, for what an instruction does outside of general registers and memory.
    pub(super) fn cpu(&mut self) -> &mut C {
        self.cpu
    }

    /// The size of the stack pointer.
    pub(super) fn stack_size(&mut self) -> Size {
        if self.mode.is_64bit() {
            Size::Qword
        } else if self.cpu.segment(SegReg::Ss).attr.db() {
            Size::Dword
        } else {
            Size::Word
        }
    }

    /// The stack pointer, with the changes so far.
    pub(super) fn stack(&mut self) -> u64 {
        let sp = match self.stack {
            Some(sp) => sp,
            None => self.cpu.gpr(Gpr::Rsp),
        };
        sp & self.stack_size().mask()
    }

    /// Puts down a change of the stack pointer, as wide as that is.
    pub(super) fn set_stack(&mut self, sp: u64) {
        self.stack = Some(sp);
    }

    /// Puts down that a value is pushed.
    pub(super) fn push_value(&mut self, size: Size, value: u64) -> Result<(), Stop<M::Error>> {
        let step = u64::from(size.bytes());
        let sp = self.stack().wrapping_sub(step) & self.stack_size().mask();
        let target = self.target(SegReg::Ss, sp, size, AccessKind::Write)?;
        self.set_stack(sp);
        self.store(target, value, None)
    }

    /// Reads the top of the stack, and puts down that it is popped.
    pub(super) fn pop_value(&mut self, size: Size) -> Result<u64, Stop<M::Error>> {
        let sp = self.stack();
        let value = self.read(SegReg::Ss, sp, size)?;
        self.set_stack(sp.wrapping_add(u64::from(size.bytes())));
        Ok(value)
    }

    /// Puts down that the instruction goes to an offset in the code segment, as a near branch does: #GP(0) if it cannot be
    /// there.
    pub(super) fn branch(&mut self, target: u64) -> Result<(), Stop<M::Error>> {
        let reachable = if self.mode.is_64bit() {
            is_canonical(target, self.paging.la57())
        } else {
            target <= u64::from(self.cpu.segment(SegReg::Cs).limit)
        };
        if !reachable {
            return Err(Fault::gp(0).into());
        }
        self.branch = Some(target);
        Ok(())
    }

    /// Fetches and decodes the instruction, unless an earlier run has.
    pub(super) fn fetch(&mut self) -> Result<(), Stop<M::Error>> {
        if self.emulator.fetched {
            return Ok(());
        }
        let cs = self.segment(SegReg::Cs);
        let access = PageAccess::explicit(AccessKind::Fetch, self.cpl);
        let mut bytes = [0; MAX_INSN_LEN];
        let mut have = 0usize;
        loop {
            // What is left of the page, as far as the segment reaches; more is fetched only if the instruction goes on.
            let offset = self.rip.wrapping_add(have as u64) & self.mode.linear_mask();
            let linear = self.linear_in(SegReg::Cs, &cs, offset, 1, AccessKind::Fetch)?;
            let mut room = PAGE_SIZE.wrapping_sub(linear & PAGE_OFFSET);
            if !self.mode.is_64bit() {
                room = room.min(u64::from(cs.limit).saturating_sub(offset).saturating_add(1));
            }
            let end = have.saturating_add(room as usize).min(MAX_INSN_LEN);
            let gpa = self.translate(linear, access)?;
            let Some(chunk) = bytes.get_mut(have..end) else {
                return Err(Stop::Unhandled);
            };
            match self.memory.read(gpa, chunk) {
                Ok(()) => {}
                // Code on a device: no instruction is emulated from there.
                Err(MemoryError::Mmio) => return Err(Stop::Unhandled),
                Err(MemoryError::Host(e)) => return Err(Stop::Host(e)),
            }
            have = end;
            let fetched = bytes.get(..have).unwrap_or(&[]);
            let known = self.emulator.is_last(&bytes, have, self.mode);
            self.emulator.bytes = bytes;
            self.emulator.bytes_len = have;
            if known {
                self.emulator.fetched = true;
                return Ok(());
            }
            self.emulator.decoded = None;
            match decode(fetched, self.mode) {
                Ok(insn) => {
                    self.emulator.decoded = Some((self.mode, insn));
                    self.emulator.fetched = true;
                    return Ok(());
                }
                Err(DecodeError::Truncated) if have < MAX_INSN_LEN => {}
                Err(DecodeError::Truncated | DecodeError::TooLong) => {
                    return Err(Fault::gp(0).into());
                }
                Err(DecodeError::Invalid) => return Err(Fault::UD.into()),
                Err(DecodeError::Unsupported) => return Err(Stop::Unhandled),
            }
        }
    }

    /// A segment register, as far as addresses depend on it: in 64-bit mode most do not, and it takes the hardware a while
    /// to say what is in one.
    fn segment(&mut self, seg: SegReg) -> Segment {
        if self.mode.is_64bit() && !matches!(seg, SegReg::Fs | SegReg::Gs) {
            return Segment::NULL;
        }
        self.cpu.segment(seg)
    }

    fn linear(
        &mut self,
        seg: SegReg,
        offset: u64,
        len: u8,
        kind: AccessKind,
    ) -> Result<u64, Stop<M::Error>> {
        let segment = self.segment(seg);
        self.linear_in(seg, &segment, offset, len, kind)
    }

    fn linear_in(
        &self,
        seg: SegReg,
        segment: &Segment,
        offset: u64,
        len: u8,
        kind: AccessKind,
    ) -> Result<u64, Stop<M::Error>> {
        let la57 = self.paging.la57();
        let len = u32::from(len);
        Ok(linearize(self.mode, la57, seg, segment, offset, len, kind)?)
    }

    pub(super) fn translate(
        &mut self,
        linear: u64,
        access: PageAccess,
    ) -> Result<u64, Stop<M::Error>> {
        if let Some(hint) = self.emulator.hint {
            let allowed = match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => hint.write,
                AccessKind::Fetch => false,
            };
            if allowed && (hint.linear ^ linear) & PAGE_MASK == 0 {
                return Ok(hint.gpa & PAGE_MASK | linear & PAGE_OFFSET);
            }
        }
        match self.paging.translate(self.memory, linear, access) {
            Ok(translation) => Ok(translation.gpa),
            Err(WalkError::Fault(error)) => Err(Fault::page(linear, error).into()),
            Err(WalkError::Contended) => Err(Stop::Retry),
            Err(WalkError::Host(e)) => Err(Stop::Host(e)),
        }
    }

    /// The offset in its segment of a memory operand. `stack_adjust` is added to RSP: POP computes its operand's address
    /// after it has moved the stack pointer.
    pub(super) fn effective_address(
        &mut self,
        insn: &Insn,
        mem: &MemRef,
        stack_adjust: u64,
    ) -> u64 {
        let mut address = mem.disp;
        if mem.rip_relative {
            address = address.wrapping_add(self.next_rip(insn));
        }
        if let Some(base) = mem.base {
            address = address.wrapping_add(self.cpu.gpr(base));
            if base == Gpr::Rsp {
                address = address.wrapping_add(stack_adjust);
            }
        }
        if let Some(index) = mem.index {
            let scaled = self.cpu.gpr(index) << (mem.scale & 3);
            address = address.wrapping_add(scaled);
        }
        address & address_mask(insn.address_size)
    }

    /// The address of the instruction that follows.
    pub(super) fn next_rip(&self, insn: &Insn) -> u64 {
        self.rip.wrapping_add(u64::from(insn.len)) & self.mode.linear_mask()
    }

    /// #AC for an access that is not aligned to its length, where that is checked.
    fn check_alignment(&self, linear: u64, len: u8) -> Result<(), Stop<M::Error>> {
        let misaligned = linear & u64::from(len).wrapping_sub(1) != 0;
        if misaligned && self.cpl == 3 && self.flags.has(Rflags::AC) && self.paging.cr0.has(Cr0::AM)
        {
            return Err(Fault::ac().into());
        }
        Ok(())
    }

    /// Checks and translates an access to `size` bytes at an offset of a segment.
    pub(super) fn target(
        &mut self,
        seg: SegReg,
        offset: u64,
        size: Size,
        kind: AccessKind,
    ) -> Result<Target, Stop<M::Error>> {
        let len = size.bytes();
        let linear = self.linear(seg, offset, len, kind)?;
        self.check_alignment(linear, len)?;
        let access = PageAccess::explicit(kind, self.cpl);
        let gpa = self.translate(linear, access)?;
        let room = PAGE_SIZE.wrapping_sub(linear & PAGE_OFFSET);
        if room >= u64::from(len) {
            let second = Part::default();
            return Ok(Target {
                parts: [Part { gpa, len }, second],
            });
        }
        let head = room as u8;
        let next = linear.wrapping_add(room) & self.mode.linear_mask();
        let second = self.translate(next, access)?;
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

    /// Reads a translated operand.
    pub(super) fn load(&mut self, target: &Target) -> Result<u64, Stop<M::Error>> {
        let [first, second] = target.parts;
        let low = self.load_part(first)?;
        if second.len == 0 {
            return Ok(low);
        }
        let high = self.load_part(second)?;
        Ok(low | shift_left_bytes(high, first.len))
    }

    fn load_part(&mut self, part: Part) -> Result<u64, Stop<M::Error>> {
        let mut raw = [0; 8];
        let Some(buf) = raw.get_mut(..usize::from(part.len)) else {
            return Err(Stop::Unhandled);
        };
        match self.memory.read(part.gpa, buf) {
            Ok(()) => Ok(u64::from_le_bytes(raw)),
            Err(MemoryError::Mmio) => self.load_device(part),
            Err(MemoryError::Host(e)) => Err(Stop::Host(e)),
        }
    }

    fn load_device(&mut self, part: Part) -> Result<u64, Stop<M::Error>> {
        let i = self.reads_used;
        if let Some(read) = self.emulator.reads.get(i) {
            if read.gpa == part.gpa && read.len == part.len {
                self.reads_used = i.wrapping_add(1);
                return Ok(read.data);
            }
            // The tables changed under the instruction: what was read from elsewhere is of no use.
            self.emulator.reads.truncate(i);
        }
        if i >= MAX_MMIO {
            // More than can be remembered: it would be asked for ever.
            return Err(Stop::Unhandled);
        }
        Err(Stop::Mmio {
            gpa: part.gpa,
            len: part.len,
        })
    }

    /// Reads `size` bytes at an offset of a segment.
    pub(super) fn read(
        &mut self,
        seg: SegReg,
        offset: u64,
        size: Size,
    ) -> Result<u64, Stop<M::Error>> {
        let target = self.target(seg, offset, size, AccessKind::Read)?;
        self.load(&target)
    }

    /// Puts down a write. With `expected`, it happens only if memory still holds that: then it has to be the only one. An
    /// operand that is not one aligned piece, or is a device's, is written without that certainty.
    pub(super) fn store(
        &mut self,
        target: Target,
        value: u64,
        expected: Option<u64>,
    ) -> Result<(), Stop<M::Error>> {
        let store = Store {
            target,
            value,
            expected,
        };
        if self.emulator.changes.stores.push(store) {
            Ok(())
        } else {
            Err(Stop::Unhandled)
        }
    }

    /// Checks and translates an access to `len` bytes, 1 to 32, as a whole. With `align`, #GP(0) if it is not aligned so.
    pub(super) fn wide_target(
        &mut self,
        seg: SegReg,
        offset: u64,
        len: u8,
        align: Option<u8>,
        kind: AccessKind,
    ) -> Result<WideTarget, Stop<M::Error>> {
        let linear = self.linear(seg, offset, len, kind)?;
        if align.is_some_and(|align| linear & u64::from(align).wrapping_sub(1) != 0) {
            return Err(Fault::gp(0).into());
        }
        self.check_alignment(linear, len)?;
        let mut wide = WideTarget::default();
        let mut done = 0;
        for slot in &mut wide.pieces {
            let left = len.saturating_sub(done);
            let size = match left {
                0 => break,
                1 => Size::Byte,
                2..=3 => Size::Word,
                4..=7 => Size::Dword,
                _ => Size::Qword,
            };
            *slot = self.target(seg, offset.wrapping_add(done.into()), size, kind)?;
            done = done.wrapping_add(size.bytes());
        }
        Ok(wide)
    }

    /// Reads a translated wide operand.
    pub(super) fn load_wide(&mut self, wide: &WideTarget) -> Result<[u64; 4], Stop<M::Error>> {
        let mut value = [0; 4];
        for (slot, piece) in value.iter_mut().zip(&wide.pieces) {
            if !piece.is_empty() {
                *slot = self.load(piece)?;
            }
        }
        Ok(value)
    }

    /// Puts down a write of a wide operand.
    pub(super) fn store_wide(
        &mut self,
        wide: &WideTarget,
        value: [u64; 4],
    ) -> Result<(), Stop<M::Error>> {
        for (value, piece) in value.into_iter().zip(wide.pieces) {
            if !piece.is_empty() {
                self.store(piece, value, None)?;
            }
        }
        Ok(())
    }

    /// The value of a register operand, or of a constant.
    pub(super) fn register(&mut self, operand: Operand, size: Size) -> Result<u64, Stop<M::Error>> {
        let value = match operand {
            Operand::Reg(r) => self.cpu.gpr(r),
            Operand::High(r) => self.cpu.gpr(r) >> 8,
            Operand::Imm(value) => value,
            Operand::Seg(seg) => u64::from(self.cpu.segment(seg).selector),
            Operand::None | Operand::Mem(_) | Operand::Xmm(_) | Operand::Mmx(_) => {
                return Err(Stop::Unhandled)
            }
        };
        Ok(value & size.mask())
    }

    /// Puts down a change of a register.
    pub(super) fn set_register(
        &mut self,
        operand: Operand,
        size: Size,
        value: u64,
    ) -> Result<(), Stop<M::Error>> {
        let change = (operand, size, value);
        if self.emulator.changes.registers.push(change) {
            Ok(())
        } else {
            Err(Stop::Unhandled)
        }
    }

    /// Makes the changes. RIP moves past the instruction if it has `retired`.
    pub(super) fn commit(&mut self, insn: &Insn, retired: bool) -> Result<(), Stop<M::Error>> {
        let mut i = 0usize;
        while let Some(store) = self.emulator.changes.stores.get(i) {
            self.commit_store(&store)?;
            i = i.wrapping_add(1);
        }
        if let Some(sp) = self.stack {
            let size = self.stack_size();
            self.commit_register(Operand::Reg(Gpr::Rsp), size, sp);
        }
        i = 0;
        while let Some((operand, size, value)) = self.emulator.changes.registers.get(i) {
            self.commit_register(operand, size, value);
            i = i.wrapping_add(1);
        }
        if retired {
            let next = match self.branch {
                Some(target) => target,
                None => self.next_rip(insn),
            };
            self.cpu.set_rip(next);
            // An instruction that completes clears RF.
            self.flags = self.flags.without(Rflags::RF);
        }
        if self.flags != self.cpu.rflags() {
            self.cpu.set_rflags(self.flags);
        }
        // The reads of this iteration have served.
        self.emulator.reads.clear();
        Ok(())
    }

    fn commit_store(&mut self, store: &Store) -> Result<(), Stop<M::Error>> {
        let [first, _] = store.target.parts;
        if let Some(old) = store.expected.filter(|_| store.target.is_atomic()) {
            match self
                .memory
                .compare_exchange(first.gpa, first.len, old, store.value)
            {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(Stop::Retry),
                // A device: the plain way below.
                Err(MemoryError::Mmio) => {}
                Err(MemoryError::Host(e)) => return Err(Stop::Host(e)),
            }
        }
        self.write_target(&store.target, store.value)
    }

    /// Writes a translated operand.
    pub(super) fn write_target(
        &mut self,
        target: &Target,
        value: u64,
    ) -> Result<(), Stop<M::Error>> {
        let [first, second] = target.parts;
        self.commit_part(first, value)?;
        if second.len > 0 {
            self.commit_part(second, shift_right_bytes(value, first.len))?;
        }
        Ok(())
    }

    /// Changes a byte, locked.
    pub(super) fn write_mark(&mut self, gpa: u64, old: u8, new: u8) -> Result<(), Stop<M::Error>> {
        let target = Target {
            parts: [Part { gpa, len: 1 }, Part::default()],
        };
        self.commit_store(&Store {
            target,
            value: new.into(),
            expected: Some(old.into()),
        })
    }

    fn commit_part(&mut self, part: Part, value: u64) -> Result<(), Stop<M::Error>> {
        let raw = value.to_le_bytes();
        let Some(data) = raw.get(..usize::from(part.len)) else {
            return Err(Stop::Unhandled);
        };
        match self.memory.write(part.gpa, data) {
            Ok(()) => Ok(()),
            Err(MemoryError::Mmio) => {
                let unused = shift_left_bytes(u64::MAX, part.len);
                let write = Mmio {
                    gpa: part.gpa,
                    len: part.len,
                    data: value & !unused,
                };
                if self.emulator.writes.push(write) {
                    Ok(())
                } else {
                    Err(Stop::Unhandled)
                }
            }
            Err(MemoryError::Host(e)) => Err(Stop::Host(e)),
        }
    }

    fn commit_register(&mut self, operand: Operand, size: Size, value: u64) {
        let (r, shift) = match operand {
            Operand::Reg(r) => (r, 0),
            Operand::High(r) => (r, 8),
            _ => return,
        };
        let new = match size {
            // Writes of 32 bits clear the upper half, smaller ones keep the rest.
            Size::Dword | Size::Qword => value & size.mask(),
            Size::Byte | Size::Word => {
                let mask = size.mask() << shift;
                self.cpu.gpr(r) & !mask | (value << shift) & mask
            }
        };
        self.cpu.set_gpr(r, new);
    }
}

/// The bits of an address of this size in bytes.
pub(super) const fn address_mask(address_size: u8) -> u64 {
    match address_size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The value shifted up by so many bytes; zero by eight or more.
fn shift_left_bytes(value: u64, bytes: u8) -> u64 {
    value
        .checked_shl(u32::from(bytes).wrapping_mul(8))
        .unwrap_or(0)
}

/// The value shifted down by so many bytes; zero by eight or more.
fn shift_right_bytes(value: u64, bytes: u8) -> u64 {
    value
        .checked_shr(u32::from(bytes).wrapping_mul(8))
        .unwrap_or(0)
}
