// SPDX-License-Identifier: GPL-2.0

//! String port I/O: INS and OUTS, as many elements at a time as one exit to userspace can carry.
//!
//! [`StringIo::prepare`] says which guest memory the next elements are in. For OUTS the caller gathers the data, for INS it scatters
//! what userspace returned; then [`Transfer::finish`] moves the registers.

use super::emulate::Cpu;
use super::exception::Fault;
use super::insn::Size;
use super::paging::GuestMemory;
use super::paging::MemoryError;
use super::paging::PageAccess;
use super::paging::WalkError;
use super::paging::PAGE_OFFSET;
use super::paging::PAGE_SIZE;
use super::regs::Gpr;
use super::regs::Rflags;
use super::segment::linearize;
use super::segment::AccessKind;
use super::segment::SegReg;

/// An INS or OUTS instruction, as an exit describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StringIo {
    /// INS, from the port to ES:RDI; else OUTS, from a segment at RSI to the port.
    pub input: bool,
    /// The size of an element: 1, 2 or 4 bytes.
    pub size: Size,
    /// Whether RCX counts the elements.
    pub rep: bool,
    /// The size of addresses: 2, 4 or 8 bytes.
    pub address_size: u8,
    /// The segment of the source of OUTS; INS has ES always.
    pub seg: SegReg,
}

/// Why a transfer cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError<E> {
    /// The instruction faults.
    Fault(Fault),
    /// The memory operand is a device's.
    Mmio,
    /// The page tables keep changing: try the instruction again.
    Contended,
    /// The host could not reach guest memory.
    Host(E),
}

/// Guest memory for the next elements of a string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    io: StringIo,
    /// How many elements: at least one.
    count: u32,
    /// The guest-physical address of the first byte, and how many bytes are in its page.
    gpa: u64,
    head: u32,
    /// That of the rest, if an element crosses a page.
    gpa_tail: u64,
}

impl StringIo {
    fn register(&self) -> Gpr {
        if self.input {
            Gpr::Rdi
        } else {
            Gpr::Rsi
        }
    }

    fn mask(&self) -> u64 {
        match self.address_size {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }

    /// Finds the memory of the next elements: as many as are left, fit `max_bytes` and lie in one page. `None` if none are left: the
    /// instruction is over.
    ///
    /// With the direction flag set it is one element at a time, so that the data is always in the order of the elements.
    ///
    /// # Errors
    ///
    /// See [`IoError`]. A fault is that of the first element.
    pub fn prepare<C: Cpu, M: GuestMemory>(
        &self,
        cpu: &mut C,
        memory: &mut M,
        max_bytes: u32,
    ) -> Result<Option<Transfer>, IoError<M::Error>> {
        let mask = self.mask();
        let left = if self.rep {
            cpu.gpr(Gpr::Rcx) & mask
        } else {
            1
        };
        if left == 0 {
            return Ok(None);
        }
        let (seg, kind) = if self.input {
            (SegReg::Es, AccessKind::Write)
        } else {
            (self.seg, AccessKind::Read)
        };
        let offset = cpu.gpr(self.register()) & mask;
        let size = u64::from(self.size.bytes());
        let segment = cpu.segment(seg);
        let mode = cpu.mode();
        let paging = cpu.paging();
        let address = |bytes: u64| {
            linearize(
                mode,
                paging.la57(),
                seg,
                &segment,
                offset,
                bytes as u32,
                kind,
            )
        };
        let linear = address(size).map_err(IoError::Fault)?;

        let room = PAGE_SIZE.wrapping_sub(linear & PAGE_OFFSET);
        let mut count = 1;
        if self.rep && !cpu.rflags().has(Rflags::DF) {
            // Up to the end of the page, of what the caller can hold, and of the addresses there are.
            let bytes = room.min(u64::from(max_bytes));
            let before_wrap = mask.wrapping_sub(offset).saturating_add(1);
            let log2 = size.trailing_zeros() & 3;
            count = left.min(bytes.min(before_wrap) >> log2).max(1);
            // If the segment ends sooner, go on singly: the element that passes the limit shall be the one that faults.
            if address(count << log2).is_err() {
                count = 1;
            }
        }

        let access = PageAccess::explicit(kind, cpu.cpl());
        let mut translate = |at: u64| match paging.translate(memory, at, access) {
            Ok(translation) => Ok(translation.gpa),
            Err(WalkError::Fault(error)) => Err(IoError::Fault(Fault::page(at, error))),
            Err(WalkError::Contended) => Err(IoError::Contended),
            Err(WalkError::Host(e)) => Err(IoError::Host(e)),
        };
        let gpa = translate(linear)?;
        // Only a single element can cross.
        let (head, gpa_tail) = if room < size {
            let next = linear.wrapping_add(room) & mode.linear_mask();
            (room as u32, translate(next)?)
        } else {
            (u32::MAX, 0)
        };
        Ok(Some(Transfer {
            io: *self,
            count: count as u32,
            gpa,
            head,
            gpa_tail,
        }))
    }
}

impl Transfer {
    /// How many elements.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// How many bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        (self.count as usize).saturating_mul(self.io.size.bytes() as usize)
    }

    /// As many elements from the first on, if that is at least one and no more than there are.
    #[must_use]
    pub fn first(&self, count: usize) -> Option<Self> {
        let count = u32::try_from(count).ok()?;
        (1..=self.count)
            .contains(&count)
            .then_some(Self { count, ..*self })
    }

    /// Where the bytes before the `head`-th and those after are.
    fn split(&self, len: usize) -> usize {
        len.min(self.head as usize)
    }

    /// Reads the data of OUTS into `data`, as much as both hold.
    ///
    /// # Errors
    ///
    /// [`IoError::Mmio`] or [`IoError::Host`].
    pub fn gather<M: GuestMemory>(
        &self,
        memory: &mut M,
        data: &mut [u8],
    ) -> Result<(), IoError<M::Error>> {
        let len = data.len().min(self.bytes());
        let Some(data) = data.get_mut(..len) else {
            return Ok(());
        };
        let Some((head, tail)) = data.split_at_mut_checked(self.split(len)) else {
            return Ok(());
        };
        if !head.is_empty() {
            memory.read(self.gpa, head).map_err(io_error)?;
        }
        if !tail.is_empty() {
            memory.read(self.gpa_tail, tail).map_err(io_error)?;
        }
        Ok(())
    }

    /// The elements that RCX still counts, for whoever had the data on its way may have lowered it: `None` if there are none.
    #[must_use]
    pub fn limited<C: Cpu>(&self, cpu: &mut C) -> Option<Self> {
        if !self.io.rep {
            return Some(*self);
        }
        let left = cpu.gpr(Gpr::Rcx) & self.io.mask();
        self.first(left.min(u64::from(self.count)) as usize)
    }

    /// Writes the data of INS, as much as both hold.
    ///
    /// # Errors
    ///
    /// [`IoError::Mmio`] or [`IoError::Host`].
    pub fn scatter<M: GuestMemory>(
        &self,
        memory: &mut M,
        data: &[u8],
    ) -> Result<(), IoError<M::Error>> {
        let len = data.len().min(self.bytes());
        let Some(data) = data.get(..len) else {
            return Ok(());
        };
        let Some((head, tail)) = data.split_at_checked(self.split(len)) else {
            return Ok(());
        };
        if !head.is_empty() {
            memory.write(self.gpa, head).map_err(io_error)?;
        }
        if !tail.is_empty() {
            memory.write(self.gpa_tail, tail).map_err(io_error)?;
        }
        Ok(())
    }

    /// Moves RSI or RDI, and RCX, past the elements. Says whether the instruction is over: RIP is to move then.
    pub fn finish<C: Cpu>(&self, cpu: &mut C) -> bool {
        let mask = self.io.mask();
        let bytes = self.bytes() as u64;
        let step = if cpu.rflags().has(Rflags::DF) {
            bytes.wrapping_neg()
        } else {
            bytes
        };
        let merge = |old: u64, new: u64| match self.io.address_size {
            // Sixteen bits keep the rest, thirty-two clear it.
            2 => old & !mask | new & mask,
            _ => new & mask,
        };
        let r = self.io.register();
        let pointer = cpu.gpr(r);
        cpu.set_gpr(r, merge(pointer, pointer.wrapping_add(step)));
        if !self.io.rep {
            return true;
        }
        let rcx = cpu.gpr(Gpr::Rcx);
        let left = (rcx & mask).wrapping_sub(u64::from(self.count));
        cpu.set_gpr(Gpr::Rcx, merge(rcx, left));
        left & mask == 0
    }
}

fn io_error<E>(error: MemoryError<E>) -> IoError<E> {
    match error {
        MemoryError::Mmio => IoError::Mmio,
        MemoryError::Host(e) => IoError::Host(e),
    }
}
