// SPDX-License-Identifier: GPL-2.0

//! Port instructions: whether the program may use the port (SDM vol. 1, 19.5). The access itself is asked for.

use super::super::super::exception::Fault;
use super::super::super::insn::system::SystemOp;
use super::super::super::insn::Insn;
use super::super::super::insn::Operand;
use super::super::super::insn::Rep;
use super::super::super::insn::Size;
use super::super::super::io::StringIo;
use super::super::super::paging::GuestMemory;
use super::super::super::regs::Gpr;
use super::super::super::segment::CpuMode;
use super::super::super::segment::SegReg;
use super::super::access::Stop;
use super::super::Cpu;
use super::super::Service;
use super::Res;
use super::System;

/// Where a 32-bit or 64-bit TSS has the offset of the bitmap of I/O permissions.
const MAP_AT: u32 = 0x66;

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// #GP(0) unless the program may access these ports.
    fn permit(&mut self, port: u16, size: Size) -> Res<(), M> {
        let by_level = match self.mode {
            CpuMode::Real | CpuMode::Real32 => true,
            CpuMode::Vm86 => false,
            _ => self.cpl <= self.flags.iopl(),
        };
        if by_level {
            return Ok(());
        }
        let refused = Fault::gp(0);
        let tss = self.run.cpu.segment(SegReg::Tr);
        let wide = tss.attr.type_() & 8 != 0;
        if !wide || tss.limit < MAP_AT.wrapping_add(1) {
            return Err(refused.into());
        }
        let map = self.read_system(tss.base.wrapping_add(MAP_AT.into()), 2)? as u32;
        // Two bytes are read, so the last port needs one more after its own.
        let at = map.wrapping_add(u32::from(port) >> 3);
        if at.wrapping_add(1) > tss.limit {
            return Err(refused.into());
        }
        let bits = self.read_system(tss.base.wrapping_add(at.into()), 2)?;
        let wanted = (1u64 << (size.bytes() & 7)).wrapping_sub(1);
        if (bits >> (port & 7)) & wanted != 0 {
            return Err(refused.into());
        }
        Ok(())
    }

    /// IN and OUT.
    pub(super) fn port(&mut self, insn: &Insn, op: SystemOp) -> Res<(), M> {
        let port = match insn.src {
            Operand::Imm(port) => u16::from(port as u8),
            _ => self.run.cpu.gpr(Gpr::Rdx) as u16,
        };
        self.permit(port, insn.size)?;
        self.ask(
            insn,
            Service::Port {
                port,
                size: insn.size,
                input: op == SystemOp::In,
            },
        )
    }

    /// INS and OUTS.
    pub(super) fn port_string(&mut self, insn: &Insn, op: SystemOp) -> Res<(), M> {
        let port = self.run.cpu.gpr(Gpr::Rdx) as u16;
        if insn.size == Size::Qword {
            return Err(Stop::Unhandled);
        }
        self.permit(port, insn.size)?;
        let input = op == SystemOp::InString;
        let io = StringIo {
            input,
            size: insn.size,
            rep: insn.rep != Rep::None,
            address_size: insn.address_size,
            seg: if input { SegReg::Es } else { insn.string_seg },
        };
        self.ask(insn, Service::PortString { port, io })
    }
}
