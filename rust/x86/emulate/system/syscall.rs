// SPDX-License-Identifier: GPL-2.0

//! SYSCALL, SYSENTER and their ways back: transfers to flat segments that no descriptor is read for (SDM vol. 2, under their names).

use super::super::super::exception::Fault;
use super::super::super::insn::Insn;
use super::super::super::insn::Size;
use super::super::super::msr::Msr;
use super::super::super::paging::GuestMemory;
use super::super::super::regs::Efer;
use super::super::super::regs::Gpr;
use super::super::super::regs::Rflags;
use super::super::super::segment::is_canonical;
use super::super::super::segment::SegAttr;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::access::Stop;
use super::super::Cpu;
use super::Res;
use super::System;

/// A segment over all of the address space.
fn flat(selector: u16, code: bool, long: bool, dpl: u8) -> Segment {
    let type_ = if code { 0xb } else { 3 };
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attr: SegAttr::REAL_MODE
            .with_type(type_)
            .with_dpl(dpl)
            .with_g(true)
            .with_l(code && long)
            .with_db(!(code && long)),
    }
}

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    fn msr(&mut self, msr: Msr) -> Res<u64, M> {
        self.run.cpu.msr(msr).ok_or(Stop::Unhandled)
    }

    /// Puts down the two segments, and the privilege level that goes with them.
    fn go_flat(&mut self, cs: u16, ss: u16, long: bool, cpl: u8) {
        self.set_segment(SegReg::Cs, flat(cs, true, long, cpl));
        self.set_segment(SegReg::Ss, flat(ss, false, long, cpl));
        self.cpl = cpl;
    }

    /// SYSCALL.
    pub(super) fn syscall(&mut self) -> Res<(), M> {
        // On Intel's processors it is one of 64-bit mode alone.
        if !self.mode.is_64bit() || !self.run.paging.efer.has(Efer::SCE) {
            return Err(Fault::UD.into());
        }
        let star = self.msr(Msr::STAR)?;
        let cs = (star >> 32) as u16 & !3;
        let mask = Rflags::new(self.msr(Msr::SYSCALL_MASK)?);
        self.set_gpr(Gpr::Rcx, self.rip)?;
        // RF is kept, in what is saved.
        self.set_gpr(Gpr::R11, self.run.flags.bits())?;
        self.rip = self.msr(Msr::LSTAR)?;
        self.go_flat(cs, cs.wrapping_add(8), true, 0);
        self.flags = self.flags.without(mask).with(Rflags::FIXED);
        Ok(())
    }

    /// SYSRET.
    pub(super) fn sysret(&mut self, insn: &Insn) -> Res<(), M> {
        if !self.mode.is_64bit() || !self.run.paging.efer.has(Efer::SCE) {
            return Err(Fault::UD.into());
        }
        self.need_cpl0()?;
        let long = insn.size == Size::Qword;
        let target = self.run.cpu.gpr(Gpr::Rcx);
        if long && !is_canonical(target, self.run.paging.la57()) {
            return Err(Fault::gp(0).into());
        }
        let base = (self.msr(Msr::STAR)? >> 48) as u16;
        let cs = base.wrapping_add(if long { 16 } else { 0 }) | 3;
        self.rip = if long { target } else { target & 0xffff_ffff };
        self.go_flat(cs, base.wrapping_add(8) | 3, long, 3);
        let loaded = Rflags::NAMED.without(Rflags::RF | Rflags::VM);
        let flags = Rflags::new(self.run.cpu.gpr(Gpr::R11));
        self.flags = flags.and(loaded).with(Rflags::FIXED);
        Ok(())
    }

    /// SYSENTER.
    pub(super) fn sysenter(&mut self) -> Res<(), M> {
        let cs = self.msr(Msr::SYSENTER_CS)? as u16 & !3;
        if self.mode.is_real() || cs == 0 {
            return Err(Fault::gp(0).into());
        }
        let long = self.mode.is_long();
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.rip = self.msr(Msr::SYSENTER_EIP)? & mask;
        let pointer = self.msr(Msr::SYSENTER_ESP)? & mask;
        self.set_gpr(Gpr::Rsp, pointer)?;
        self.go_flat(cs, cs.wrapping_add(8), long, 0);
        self.flags = self.flags.without(Rflags::VM | Rflags::IF);
        Ok(())
    }

    /// SYSEXIT.
    pub(super) fn sysexit(&mut self, insn: &Insn) -> Res<(), M> {
        let cs = self.msr(Msr::SYSENTER_CS)? as u16 & !3;
        if self.mode.is_real() || cs == 0 || self.cpl != 0 {
            return Err(Fault::gp(0).into());
        }
        let long = insn.size == Size::Qword;
        let (rip, pointer) = (self.run.cpu.gpr(Gpr::Rdx), self.run.cpu.gpr(Gpr::Rcx));
        let la57 = self.run.paging.la57();
        if long && !(is_canonical(rip, la57) && is_canonical(pointer, la57)) {
            return Err(Fault::gp(0).into());
        }
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        let base = cs.wrapping_add(if long { 32 } else { 16 }) | 3;
        self.rip = rip & mask;
        self.set_gpr(Gpr::Rsp, pointer & mask)?;
        self.go_flat(base, base.wrapping_add(8), long, 3);
        Ok(())
    }
}
