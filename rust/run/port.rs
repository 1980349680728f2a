// SPDX-License-Identifier: GPL-2.0

//! Port I/O: IN, OUT, INS and OUTS leave to user space (KVM API, KVM_EXIT_IO), but for what a device in
//! the kernel takes or answers.
//!
//! An instruction stays where it is until the VMM comes back: RIP, and the registers of a string
//! instruction, move when KVM_RUN completes it.

use super::memory::EmuCpu;
use super::memory::EmuMemory;
use super::memory::Unbacked;
use super::LinearRip;
use super::Next;
use super::Pending;
use super::Run;
use crate::backend::Loaded;
use crate::backend::PortAccess;
use crate::bus::Space;
use crate::x86::event::Shadow;
use crate::x86::insn::Size;
use crate::x86::io::IoError;
use crate::x86::io::StringIo;
use crate::x86::io::Transfer;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::segment::SegReg;
use kernel::prelude::*;

/// The most bytes of a string instruction that go to user space at once.
const CHUNK: usize = 1024;

/// A port access that the VMM was asked for.
#[derive(Clone, Copy)]
pub(crate) struct PendingPort {
    access: PortAccess,
    /// Length of the instruction in bytes.
    len: u8,
    /// Where it is.
    at: LinearRip,
    /// The memory of a string instruction's elements.
    transfer: Option<Transfer>,
}

impl<L: Loaded> Run<'_, L> {
    /// The guest executed an I/O instruction of `len` bytes. For a string instruction, `known` is what the hardware does not
    /// have to be asked for.
    pub(super) fn port_access(
        &mut self,
        access: PortAccess,
        len: u8,
        known: Option<StringIo>,
    ) -> Result<Next> {
        if access.string {
            let io = known.unwrap_or_else(|| self.string_io(&access));
            return self.string_access(access, len, &io);
        }
        if !access.input {
            let value = (self.hw.gpr(Gpr::Rax) as u32).to_le_bytes();
            let size = usize::from(access.size).min(4);
            let data = value.get(..size).unwrap_or(&value);
            if self.bus.write(Space::Ports, access.port.into(), data) {
                super::skip(&mut self.hw, len);
                return Ok(Next::Guest);
            }
            self.page.set_port_data(data);
        } else {
            let mut data = [0; 4];
            if self.port_device_read(&access, &mut data) {
                self.finish_input(&access, data, len);
                return Ok(Next::Guest);
            }
        }
        let at = LinearRip::of(&mut self.hw);
        let pending = PendingPort {
            access,
            len,
            at,
            transfer: None,
        };
        self.leave_for_port(pending, 1)
    }

    /// Offers a read of one element to the devices in the kernel; returns if one answered.
    fn port_device_read(&self, access: &PortAccess, data: &mut [u8]) -> bool {
        data.get_mut(..usize::from(access.size))
            .is_some_and(|data| self.bus.read(Space::Ports, access.port.into(), data))
    }

    /// Completes an IN of `len` bytes.
    fn finish_input(&mut self, access: &PortAccess, data: [u8; 4], len: u8) {
        let value = u64::from(u32::from_le_bytes(data));
        let old = self.hw.gpr(Gpr::Rax);
        // A 32-bit destination clears the upper half; narrower ones leave the rest alone.
        let kept = match access.size {
            1 => old & !0xff,
            2 => old & !0xffff,
            _ => 0,
        };
        self.hw.set_gpr(Gpr::Rax, kept | value);
        super::skip(&mut self.hw, len);
    }

    fn leave_for_port(&mut self, pending: PendingPort, count: u32) -> Result<Next> {
        let a = &pending.access;
        self.page.set_io(a.input, a.size, a.port, count);
        self.arch.pending = Pending::Port(pending);
        Ok(Next::User)
    }

    /// What the hardware says of a string instruction.
    fn string_io(&mut self, access: &PortAccess) -> StringIo {
        let (seg, address_size) = match self.hw.string_io_info() {
            Some(info) => info,
            // The few processors that do not tell: no override is the rule.
            None => (SegReg::Ds, crate::arch::mode(&mut self.hw).address_size()),
        };
        StringIo {
            input: access.input,
            size: match access.size {
                1 => Size::Byte,
                2 => Size::Word,
                _ => Size::Dword,
            },
            rep: access.rep,
            address_size,
            seg,
        }
    }

    fn string_access(&mut self, access: PortAccess, len: u8, io: &StringIo) -> Result<Next> {
        let mut buf = [0; CHUNK];
        // A step ends after each iteration.
        let room = match self.hw.rflags().has(Rflags::TF) {
            true => access.size.into(),
            false => CHUNK as u32,
        };
        let mut memory = EmuMemory::new(self.memory, self.shared, &self.arch.devices);
        let mut cpu = EmuCpu::new(&mut self.hw, &self.fpu, self.arch);
        let begun = io
            .prepare(&mut cpu, &mut memory, room)
            .and_then(|transfer| {
                if let (Some(t), false) = (&transfer, access.input) {
                    t.gather(&mut memory, &mut buf)?;
                }
                Ok(transfer)
            });
        let transfer = match begun {
            Ok(Some(transfer)) => transfer,
            Ok(None) => {
                // REP with a count of zero does nothing.
                super::skip(&mut self.hw, len);
                return Ok(Next::Guest);
            }
            Err(error) => return self.string_error(error),
        };
        if !access.input {
            let data = buf.get(..transfer.bytes()).unwrap_or(&buf);
            let taken = data
                .chunks_exact(usize::from(access.size).max(1))
                .take_while(|element| self.bus.write(Space::Ports, access.port.into(), element))
                .count();
            if let Some(done) = transfer.first(taken) {
                self.finish_string(&done, len);
                return Ok(Next::Guest);
            }
            self.page.set_port_data(data);
        }
        if access.input {
            // One at a time: what is read is written before the next.
            let mut data = [0; 4];
            if let (Some(first), true) =
                (transfer.first(1), self.port_device_read(&access, &mut data))
            {
                let mut memory = EmuMemory::new(self.memory, self.shared, &self.arch.devices);
                if let Err(error) = first.scatter(&mut memory, &data) {
                    return self.string_error(error);
                }
                self.finish_string(&first, len);
                return Ok(Next::Guest);
            }
        }
        let count = transfer.count();
        let at = LinearRip::of(&mut self.hw);
        let pending = PendingPort {
            access,
            len,
            at,
            transfer: Some(transfer),
        };
        self.leave_for_port(pending, count)
    }

    fn string_error(&mut self, error: IoError<Unbacked>) -> Result<Next> {
        match error {
            IoError::Fault(fault) => self.raise(fault),
            IoError::Contended => Ok(Next::Guest),
            // Between a port and a device: nobody does that.
            IoError::Mmio => {
                let raw = self.hw.raw_exit();
                self.page.set_emulation_error(&[], &raw);
                Ok(Next::User)
            }
            IoError::Host(at) => Err(self.unbacked(at)),
        }
    }

    /// The VMM has done what it was asked for.
    pub(super) fn complete_port(&mut self, pending: PendingPort) -> Result<Next> {
        let access = &pending.access;
        if !pending.at.is_still(&mut self.hw) {
            return Ok(Next::Guest);
        }
        let Some(transfer) = pending.transfer else {
            if access.input {
                let mut data = [0; 4];
                let size = usize::from(access.size).min(4);
                self.page
                    .port_data(data.get_mut(..size).unwrap_or(&mut [0; 0]));
                self.finish_input(access, data, pending.len);
            } else {
                super::skip(&mut self.hw, pending.len);
            }
            return Ok(Next::Guest);
        };

        // The VMM may have lowered RCX meanwhile: elements that the guest does not ask for any more
        // must not be written, nor counted below zero.
        let Some(transfer) = transfer.limited(&mut EmuCpu::new(&mut self.hw, &self.fpu, self.arch))
        else {
            super::skip(&mut self.hw, pending.len);
            return Ok(Next::Guest);
        };
        if access.input {
            let mut buf = [0; CHUNK];
            let data = buf.get_mut(..transfer.bytes()).unwrap_or(&mut [0; 0]);
            self.page.port_data(data);
            let mut memory = EmuMemory::new(self.memory, self.shared, &self.arch.devices);
            if let Err(error) = transfer.scatter(&mut memory, data) {
                if matches!(error, IoError::Host(_)) {
                    // If the VMM mends it, the port is not to be read a second time.
                    self.arch.pending = Pending::Port(pending);
                }
                return self.string_error(error);
            }
        }
        self.finish_string(&transfer, pending.len);
        Ok(Next::Guest)
    }

    /// Goes past the elements of a string instruction of `len` bytes, and past it if there are no
    /// more. Else the guest executes it again, for the rest.
    fn finish_string(&mut self, transfer: &Transfer, len: u8) {
        if transfer.finish(&mut EmuCpu::new(&mut self.hw, &self.fpu, self.arch)) {
            super::skip(&mut self.hw, len);
        } else {
            let step = self.hw.rflags().has(Rflags::TF);
            super::retire_emulated(&mut self.hw, step, Shadow::None);
        }
    }
}
