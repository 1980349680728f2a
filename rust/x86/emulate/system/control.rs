// SPDX-License-Identifier: GPL-2.0

//! Control and debug registers, MSRs, HLT and the like: the privilege is checked here, the rest is asked for.

use super::super::super::event::Shadow;
use super::super::super::exception::Fault;
use super::super::super::insn::system::SystemOp;
use super::super::super::insn::Insn;
use super::super::super::insn::Operand;
use super::super::super::insn::Size;
use super::super::super::msr::Msr;
use super::super::super::paging::GuestMemory;
use super::super::super::regs::Cr4;
use super::super::super::regs::Gpr;
use super::super::super::regs::Rflags;
use super::super::super::segment::AccessKind;
use super::super::super::segment::CpuMode;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::access::Stop;
use super::super::Cpu;
use super::super::Service;
use super::Res;
use super::System;

/// The number of a control or debug register, and the general register.
fn numbered(number: Operand, register: Operand) -> Option<(u8, Gpr)> {
    match (number, register) {
        (Operand::Imm(number), Operand::Reg(gpr)) => Some((number as u8, gpr)),
        _ => None,
    }
}

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// What only the caller can do.
    pub(super) fn control(&mut self, insn: &Insn, op: SystemOp) -> Res<(), M> {
        use SystemOp as O;
        let service = match op {
            O::Identify => Service::Identify,
            O::Hypercall => Service::Hypercall,
            O::ReadTsc | O::ReadTscAux => {
                let restricted = self.run.paging.cr4.has(Cr4::TSD);
                if restricted && self.cpl != 0 && self.protected_mode_enabled() {
                    return Err(Fault::gp(0).into());
                }
                if op == O::ReadTsc {
                    Service::ReadTsc
                } else {
                    Service::ReadTscAux
                }
            }
            O::ReadCounter => Service::ReadCounter,
            _ => {
                self.need_register(insn, op)?;
                self.need_cpl0()?;
                self.privileged(insn, op)?
            }
        };
        self.ask(insn, service)
    }

    /// #UD for a control or debug register that does not exist: whatever the privilege.
    fn need_register(&self, insn: &Insn, op: SystemOp) -> Res<(), M> {
        use SystemOp as O;
        let number = match (op, insn.dst, insn.src) {
            (O::WriteControl | O::WriteDebug, Operand::Imm(number), _) => number,
            (O::ReadControl | O::ReadDebug, _, Operand::Imm(number)) => number,
            _ => return Ok(()),
        };
        let exists = match op {
            O::WriteControl | O::ReadControl => {
                matches!(number, 0 | 2 | 3 | 4) || number == 8 && self.mode.is_64bit()
            }
            _ => number < 8 && !(matches!(number, 4 | 5) && self.run.paging.cr4.has(Cr4::DE)),
        };
        if exists {
            Ok(())
        } else {
            Err(Fault::UD.into())
        }
    }

    fn protected_mode_enabled(&self) -> bool {
        !self.mode.is_real()
    }

    fn privileged(&mut self, insn: &Insn, op: SystemOp) -> Res<Service, M> {
        use SystemOp as O;
        let to_register = || numbered(insn.dst, insn.src).ok_or(Stop::Unhandled);
        let from_register = || numbered(insn.src, insn.dst).ok_or(Stop::Unhandled);
        Ok(match op {
            O::WriteControl => {
                let (number, from) = to_register()?;
                Service::WriteControl { number, from }
            }
            O::ReadControl => {
                let (number, to) = from_register()?;
                Service::ReadControl { number, to }
            }
            O::WriteDebug => {
                let (number, from) = to_register()?;
                Service::WriteDebug { number, from }
            }
            O::ReadDebug => {
                let (number, to) = from_register()?;
                Service::ReadDebug { number, to }
            }
            O::ClearTaskSwitched => Service::ClearTaskSwitched,
            O::LoadMsw => Service::LoadMsw(self.word(insn, insn.src)?),
            O::InvalidatePage => {
                let Operand::Mem(mem) = insn.src else {
                    return Err(Stop::Unhandled);
                };
                let offset = self.run.effective_address(insn, &mem, 0);
                let base = match (self.mode.is_64bit(), mem.seg) {
                    (true, SegReg::Fs | SegReg::Gs) | (false, _) => {
                        self.run.cpu.segment(mem.seg).base
                    }
                    _ => 0,
                };
                Service::InvalidatePage(base.wrapping_add(offset) & self.mode.linear_mask())
            }
            O::InvalidatePcid => self.invalidate_pcid(insn)?,
            O::Halt => Service::Halt,
            O::InvalidateCaches => Service::InvalidateCaches,
            O::WriteBackCaches => Service::WriteBackCaches,
            O::ReadMsr => Service::ReadMsr,
            O::WriteMsr => Service::WriteMsr,
            O::WriteXcr if !self.run.paging.cr4.has(Cr4::OSXSAVE) => {
                return Err(Fault::UD.into());
            }
            O::WriteXcr => Service::WriteXcr,
            _ => return Err(Stop::Unhandled),
        })
    }

    /// INVPCID: the type and the descriptor.
    fn invalidate_pcid(&mut self, insn: &Insn) -> Res<Service, M> {
        let Operand::Mem(mem) = insn.src else {
            return Err(Stop::Unhandled);
        };
        let kind = self.run.register(insn.dst, insn.size)?;
        let offset = self.run.effective_address(insn, &mem, 0);
        let wide = self
            .run
            .wide_target(mem.seg, offset, 16, None, AccessKind::Read)?;
        let [identifier, linear, ..] = self.run.load_wide(&wide)?;
        Ok(Service::InvalidatePcid {
            kind,
            descriptor: [identifier, linear],
        })
    }

    /// CLAC and STAC: supervisor code may not, or may, access pages of user mode under SMAP.
    pub(super) fn set_access_check(&mut self, on: bool) -> Res<(), M> {
        if self.cpl != 0 {
            return Err(Fault::UD.into());
        }
        self.flags = self.flags.with_if(Rflags::AC, !on);
        Ok(())
    }

    /// XGETBV.
    pub(super) fn read_xcr(&mut self, insn: &Insn) -> Res<(), M> {
        if !self.run.paging.cr4.has(Cr4::OSXSAVE) {
            return Err(Fault::UD.into());
        }
        if self.run.cpu.gpr(Gpr::Rcx) & Size::Dword.mask() != 0 {
            return self.ask(insn, Service::ReadXcr);
        }
        let value = self.run.cpu.xcr0();
        self.set_gpr_part(Gpr::Rax, Size::Dword, value)?;
        self.set_gpr_part(Gpr::Rdx, Size::Dword, value >> 32)
    }

    /// SMSW: a register gets as much of CR0 as it holds.
    pub(super) fn store_msw(&mut self, insn: &Insn) -> Res<(), M> {
        self.need_umip()?;
        let value = self.cr0().bits();
        self.give(insn, insn.dst, value & insn.size.mask() & memory_mask(insn))
    }

    /// CLI and STI.
    pub(super) fn set_interrupts(&mut self, on: bool) -> Res<(), M> {
        let flags = self.flags;
        let allowed = self.mode.is_real() || self.cpl <= flags.iopl();
        if allowed && self.mode != CpuMode::Vm86 || flags.iopl() == 3 {
            if on && !flags.has(Rflags::IF) {
                self.shadow = Shadow::Sti;
            }
            self.flags = flags.with_if(Rflags::IF, on);
            return Ok(());
        }
        // With a virtual flag, user mode need not have the real one.
        let cr4 = self.run.paging.cr4;
        let virtualised = match self.mode {
            CpuMode::Vm86 => cr4.has(Cr4::VME),
            _ => cr4.has(Cr4::PVI) && self.cpl == 3,
        };
        if !virtualised || on && flags.has(Rflags::VIP) {
            return Err(Fault::gp(0).into());
        }
        self.flags = flags.with_if(Rflags::VIF, on);
        Ok(())
    }

    /// SWAPGS.
    pub(super) fn swap_gs(&mut self) -> Res<(), M> {
        if !self.mode.is_64bit() {
            return Err(Fault::UD.into());
        }
        self.need_cpl0()?;
        let gs = self.segment(SegReg::Gs);
        let other = self
            .run
            .cpu
            .msr(Msr::KERNEL_GS_BASE)
            .ok_or(Stop::Unhandled)?;
        self.run.cpu.set_msr(Msr::KERNEL_GS_BASE, gs.base);
        self.set_segment(SegReg::Gs, Segment { base: other, ..gs });
        Ok(())
    }
}

/// Memory takes 16 bits, whatever the operand size.
fn memory_mask(insn: &Insn) -> u64 {
    match insn.dst {
        Operand::Mem(_) => Size::Word.mask(),
        _ => u64::MAX,
    }
}
