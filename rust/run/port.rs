// SPDX-License-Identifier: GPL-2.0

//! Port I/O: IN, OUT, INS and OUTS all leave to user space (KVM API, KVM_EXIT_IO).
//!
//! An instruction stays where it is until the VMM comes back: RIP, and the registers of a string
//! instruction, move when KVM_RUN completes it.

use super::memory::EmuCpu;
use super::memory::EmuMemory;
use super::Next;
use super::Pending;
use super::Run;
use crate::backend::Loaded;
use crate::backend::PortAccess;
use crate::x86::io::StringIo;
use crate::x86::io::StringStop;
use crate::x86::regs::Gpr;
use kernel::prelude::*;

/// The most bytes of a string instruction that go to user space at once.
const CHUNK: usize = 1024;

/// A port access that the VMM was asked for.
#[derive(Clone, Copy)]
pub(crate) struct PendingPort {
    access: PortAccess,
    /// Length of the instruction in bytes.
    len: u8,
    /// What a string instruction was about to do.
    string: Option<StringIo>,
}

impl<L: Loaded> Run<'_, L> {
    /// The guest executed an I/O instruction.
    pub(super) fn port_access(&mut self, access: PortAccess) -> Result<Next> {
        let len = self.hw.instruction_len();
        if access.string {
            return self.string_access(access, len);
        }
        if !access.input {
            let value = (self.hw.gpr(Gpr::Rax) as u32).to_le_bytes();
            let size = usize::from(access.size).min(4);
            self.page.set_port_data(value.get(..size).unwrap_or(&value));
        }
        self.leave_for_port(
            PendingPort {
                access,
                len,
                string: None,
            },
            1,
        )
    }

    fn leave_for_port(&mut self, pending: PendingPort, count: u32) -> Result<Next> {
        let a = &pending.access;
        self.page.set_io(a.input, a.size, a.port, count);
        self.arch.pending = Pending::Port(pending);
        Ok(Next::User)
    }

    fn string_access(&mut self, access: PortAccess, len: u8) -> Result<Next> {
        let info = self.hw.string_io_info();
        let mut cpu = EmuCpu::new(&mut self.hw, self.arch);
        let mut memory = EmuMemory(self.memory);
        let mut buf = [0; CHUNK];
        let started = StringIo::begin(
            &mut cpu,
            &mut memory,
            access.size,
            access.input,
            access.rep,
            info,
            &mut buf,
        );
        match started {
            Ok(string) => {
                let count = string.count();
                if count == 0 {
                    // REP with a count of zero does nothing.
                    super::skip(&mut self.hw, len);
                    return Ok(Next::Guest);
                }
                let bytes = count as usize * usize::from(access.size);
                if !access.input {
                    self.page.set_port_data(buf.get(..bytes).unwrap_or(&buf));
                }
                self.leave_for_port(
                    PendingPort {
                        access,
                        len,
                        string: Some(string),
                    },
                    count,
                )
            }
            Err(stop) => self.string_stop(stop),
        }
    }

    fn string_stop(&mut self, stop: StringStop<()>) -> Result<Next> {
        match stop {
            StringStop::Fault(fault) => self.raise(fault),
            StringStop::Retry => Ok(Next::Guest),
            // Between a port and a device, or where the host has nothing: nobody does that.
            StringStop::Mmio => {
                let raw = self.hw.raw_exit();
                self.page.set_emulation_error(&[], &raw);
                Ok(Next::User)
            }
            StringStop::Host(()) => Err(EFAULT),
        }
    }

    /// The VMM has done what it was asked for.
    pub(super) fn complete_port(&mut self, pending: PendingPort) -> Result<Next> {
        let access = &pending.access;
        let Some(string) = pending.string else {
            if access.input {
                let mut data = [0; 4];
                let size = usize::from(access.size).min(4);
                self.page
                    .port_data(data.get_mut(..size).unwrap_or(&mut [0; 0]));
                let value = u64::from(u32::from_le_bytes(data));
                let old = self.hw.gpr(Gpr::Rax);
                // A 32-bit destination clears the upper half; narrower ones leave the rest alone.
                let kept = match size {
                    1 => old & !0xff,
                    2 => old & !0xffff,
                    _ => 0,
                };
                self.hw.set_gpr(Gpr::Rax, kept | value);
            }
            super::skip(&mut self.hw, pending.len);
            return Ok(Next::Guest);
        };

        let mut buf = [0; CHUNK];
        let bytes = string.count() as usize * usize::from(access.size);
        let data = buf.get_mut(..bytes).unwrap_or(&mut [0; 0]);
        if access.input {
            self.page.port_data(data);
        }
        let mut cpu = EmuCpu::new(&mut self.hw, self.arch);
        let mut memory = EmuMemory(self.memory);
        match string.complete(&mut cpu, &mut memory, data) {
            Ok(true) => {
                super::skip(&mut self.hw, pending.len);
                Ok(Next::Guest)
            }
            // More to do: the guest executes the instruction again.
            Ok(false) => Ok(Next::Guest),
            Err(stop) => self.string_stop(stop),
        }
    }
}
