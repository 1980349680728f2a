// SPDX-License-Identifier: GPL-2.0

//! RDMSR and WRMSR, by the guest and by the VMM.

use super::apic::Around;
use super::LinearRip;
use super::Next;
use super::Pending;
use super::Run;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::linux::msr as host_msr;
use crate::msr_filter;
use crate::system::Host;
use crate::tlb::Request;
use crate::x86::apic::Effect;
use crate::x86::cpuid::features::Features;
use crate::x86::cr;
use crate::x86::exception::Fault;
use crate::x86::msr;
use crate::x86::msr::filter::Access;
use crate::x86::msr::Class;
use crate::x86::msr::Msr;
use crate::x86::msr::MsrError;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use kernel::prelude::*;

/// An access to an MSR that the VMM was asked for.
pub(crate) struct PendingMsr {
    read: bool,
    /// Length of the instruction in bytes.
    len: u8,
    /// Where it is.
    at: LinearRip,
}

impl<L: Loaded> Run<'_, L> {
    /// RDMSR, unless it is refused: nothing has changed then.
    #[inline]
    pub(super) fn rdmsr_at_once(&mut self) -> bool {
        let msr = Msr(self.hw.gpr(Gpr::Rcx) as u32);
        match self.guest_read(msr) {
            Ok(value) => {
                self.finish_rdmsr(value);
                self.skip();
                true
            }
            Err(_) => false,
        }
    }

    /// RDMSR, an instruction of `len` bytes.
    pub(super) fn rdmsr(&mut self, len: u8) -> Result<Next> {
        let msr = Msr(self.hw.gpr(Gpr::Rcx) as u32);
        match self.guest_read(msr) {
            Ok(value) => {
                self.finish_rdmsr(value);
                super::skip(&mut self.hw, len);
                Ok(Next::Guest)
            }
            Err(error) => self.msr_failed(msr, None, error, len),
        }
    }

    /// WRMSR, the same.
    pub(super) fn wrmsr(&mut self, len: u8) -> Result<Next> {
        let msr = Msr(self.hw.gpr(Gpr::Rcx) as u32);
        let value = self.hw.gpr(Gpr::Rdx) << 32 | self.hw.gpr(Gpr::Rax) & 0xffff_ffff;
        match self.guest_write(msr, value) {
            Ok(effect) => {
                self.apply(effect);
                super::skip(&mut self.hw, len);
                Ok(Next::Guest)
            }
            Err(error) => self.msr_failed(msr, Some(value), error, len),
        }
    }

    /// The guest reads an MSR, if the VMM lets it.
    #[inline]
    pub(super) fn guest_read(&mut self, msr: Msr) -> Result<u64, MsrError> {
        if is_denied(self.arch, msr, Access::Read) {
            return Err(MsrError::Filtered);
        }
        if msr == Msr::PLATFORM_INFO && !self.msrs.shows_platform_info() {
            return Err(MsrError::Refused);
        }
        read(&mut self.hw, self.arch, msr, false)
    }

    /// The guest writes an MSR, if the VMM lets it. What is left to do is for [`Run::apply`].
    pub(super) fn guest_write(&mut self, msr: Msr, value: u64) -> Result<Effect, MsrError> {
        if is_denied(self.arch, msr, Access::Write) {
            return Err(MsrError::Filtered);
        }
        let around = self.around();
        write(&mut self.hw, self.arch, &around, msr, value, false)
    }

    /// An access failed: #GP, unless the VMM wants to be asked. `value` is what was to be written.
    pub(super) fn msr_failed(
        &mut self,
        msr: Msr,
        value: Option<u64>,
        error: MsrError,
        len: u8,
    ) -> Result<Next> {
        if !self.msrs.asks_vmm(error) {
            return self.raise(Fault::gp(0));
        }
        self.page.set_msr(msr, value, msr_filter::reason(error));
        self.arch.pending = Pending::Msr(PendingMsr {
            read: value.is_none(),
            len,
            at: LinearRip::of(&mut self.hw),
        });
        Ok(Next::User)
    }

    /// The VMM has answered.
    pub(super) fn complete_msr(&mut self, pending: &PendingMsr) -> Result<Next> {
        if !pending.at.is_still(&mut self.hw) {
            return Ok(Next::Guest);
        }
        if self.page.msr_refused() {
            return self.raise(Fault::gp(0));
        }
        if pending.read {
            let value = self.page.msr_data();
            self.finish_rdmsr(value);
        }
        super::skip(&mut self.hw, pending.len);
        Ok(Next::Guest)
    }

    /// Puts what was read where RDMSR does.
    #[inline]
    fn finish_rdmsr(&mut self, value: u64) {
        self.hw.set_gpr(Gpr::Rax, value & 0xffff_ffff);
        self.hw.set_gpr(Gpr::Rdx, value >> 32);
    }

    /// The VMM has set another filter: from now on it is this vCPU's, and what the hardware lets through.
    pub(super) fn fetch_msr_filter(&mut self) {
        let filter = self.msrs.filter();
        self.hw.pass_msrs(|msr, access| {
            filter
                .as_ref()
                .is_none_or(|filter| filter.allows(msr, access))
        });
        self.arch.msr_filter = filter;
    }
}

/// Whether the VMM has denied an MSR to the guest.
#[inline]
fn is_denied(arch: &Arch, msr: Msr, access: Access) -> bool {
    match &arch.msr_filter {
        None => false,
        Some(filter) => !filter.allows(msr, access),
    }
}

/// Reads an MSR. `by_host` is whether the VMM asks.
pub(crate) fn read(
    hw: &mut impl Loaded,
    arch: &Arch,
    msr: Msr,
    by_host: bool,
) -> Result<u64, MsrError> {
    let features = &arch.features;
    match msr.class() {
        Class::Paravirtual => super::pv::read_msr(arch, msr),
        Class::Emulated if msr == Msr::APIC_BASE => Ok(arch.apic_base()),
        Class::Emulated => arch.msrs.read(msr, features, by_host),
        Class::MachineCheck => arch.mce.read(msr, by_host),
        Class::ControlStructure if msr == Msr::EFER => Ok(hw.efer().bits()),
        Class::Switched if msr == Msr::TSC_AUX && !by_host && !has_tsc_aux(arch) => {
            Err(MsrError::Unknown)
        }
        Class::Switched if msr == Msr::XSS => {
            if by_host || features.has(Features::XSAVES) {
                Ok(0)
            } else {
                Err(MsrError::Unknown)
            }
        }
        Class::Switched
            if msr == Msr::SPEC_CTRL && !by_host && !features.has(Features::SPEC_CTRL) =>
        {
            Err(MsrError::Unknown)
        }
        Class::Time if msr == Msr::TSC_ADJUST => {
            if by_host || features.has(Features::TSC_ADJUST) {
                Ok(arch.tsc_adjust)
            } else {
                Err(MsrError::Unknown)
            }
        }
        Class::ControlStructure | Class::Switched | Class::Time => {
            hw.read_msr(msr).ok_or(MsrError::Unknown)
        }
        Class::LocalApic => {
            let apic = match &arch.apic {
                Some(apic) => apic,
                // As in KVM, so that a VMM can save what the list names.
                None if msr == Msr::TSC_DEADLINE && by_host => return Ok(0),
                None => return Err(MsrError::Unknown),
            };
            match msr {
                Msr::TSC_DEADLINE if !by_host && !features.has(Features::TSC_DEADLINE) => {
                    Err(MsrError::Unknown)
                }
                Msr::TSC_DEADLINE => Ok(apic.model.tsc_deadline()),
                // Not before the guest's EOIs have been looked for, after the exit.
                _ if arch.pv.eoi.offered => Err(MsrError::Refused),
                _ => apic.model.read_msr(msr, &super::apic::clock(hw)),
            }
        }
        Class::Command | Class::Unknown => Err(MsrError::Unknown),
    }
}

fn has_tsc_aux(arch: &Arch) -> bool {
    arch.features
        .flags
        .has_any(Features::RDTSCP.with(Features::RDPID))
}

/// Writes an MSR. `by_host` is whether the VMM asks: it may set what the guest may not. What is left to
/// do is for [`apply`](super::apic::apply).
pub(crate) fn write(
    hw: &mut impl Loaded,
    arch: &mut Arch,
    around: &Around<'_>,
    msr: Msr,
    value: u64,
    by_host: bool,
) -> Result<Effect, MsrError> {
    let host = around.host;
    match msr.class() {
        Class::Paravirtual => super::pv::write_msr(arch, around, msr, value, by_host)?,
        Class::Emulated if msr == Msr::APIC_BASE => return write_apic_base(arch, value, by_host),
        Class::Emulated if msr == Msr::MISC_ENABLE => {
            write_misc_enable(hw, arch, around, value, by_host)?;
        }
        Class::Emulated => {
            let features = arch.features;
            arch.msrs.write(msr, value, &features, by_host)?;
        }
        Class::MachineCheck => arch.mce.write(msr, value, by_host)?,
        Class::ControlStructure if msr == Msr::EFER => write_efer(hw, arch, host, value, by_host)?,
        Class::Time => {
            write_time(hw, arch, msr, value, by_host);
            around.shared.request(Request::Clock);
            // A deadline is one of the guest's counter, which may have moved.
            return Ok(Effect::Timer);
        }
        Class::ControlStructure | Class::Switched => {
            // What the processor has not got would be a fault of its own, whoever asks.
            let features = if msr == Msr::SPEC_CTRL && by_host {
                &host.supported
            } else {
                &arch.features
            };
            let cr4 = hw.cr4();
            let value = msr::check_value(msr, value, features, cr4, by_host)?;
            if msr != Msr::XSS && !hw.write_msr(msr, value) {
                return Err(MsrError::Unknown);
            }
            if msr == Msr::SPEC_CTRL {
                // Who has written it once does so again.
                let arch = &*arch;
                hw.pass_msrs(|msr, access| !is_denied(arch, msr, access));
            }
        }
        Class::LocalApic => return write_apic(hw, arch, msr, value, by_host),
        Class::Command => {
            let features = if by_host {
                &host.supported
            } else {
                &arch.features
            };
            let cr4 = hw.cr4();
            if msr::check_value(msr, value, features, cr4, false)? != 0 {
                hw.command(msr);
            }
        }
        Class::Unknown => return Err(MsrError::Unknown),
    }
    Ok(Effect::None)
}

/// IA32_MISC_ENABLE, which CPUID may have to follow.
fn write_misc_enable(
    hw: &mut impl Loaded,
    arch: &mut Arch,
    around: &Around<'_>,
    value: u64,
    by_host: bool,
) -> Result<(), MsrError> {
    let (had_mwait, features) = (arch.msrs.has_mwait(), arch.features);
    arch.msrs
        .write(Msr::MISC_ENABLE, value, &features, by_host)?;
    if arch.msrs.has_mwait() != had_mwait {
        let cr4 = hw.cr4();
        arch.refresh_cpuid(around.host, around.options, cr4);
    }
    Ok(())
}

/// IA32_APIC_BASE, of the local APIC in the kernel or of the VMM's.
pub(crate) fn write_apic_base(
    arch: &mut Arch,
    value: u64,
    by_host: bool,
) -> Result<Effect, MsrError> {
    let features = arch.features;
    match arch.apic.as_deref_mut() {
        Some(apic) => apic.model.set_base(value, &features, by_host),
        None => {
            arch.msrs.write(Msr::APIC_BASE, value, &features, by_host)?;
            Ok(Effect::None)
        }
    }
}

/// The registers of x2APIC mode, and the deadline of the timer.
fn write_apic(
    hw: &mut impl Loaded,
    arch: &mut Arch,
    msr: Msr,
    value: u64,
    by_host: bool,
) -> Result<Effect, MsrError> {
    let clock = super::apic::clock(hw);
    let has_deadline = by_host || arch.features.has(Features::TSC_DEADLINE);
    let apic = match arch.apic.as_deref_mut() {
        Some(apic) => apic,
        None if msr == Msr::TSC_DEADLINE && by_host => return Ok(Effect::None),
        None => return Err(MsrError::Unknown),
    };
    if msr != Msr::TSC_DEADLINE {
        apic.model.write_msr(msr, value, &clock)
    } else if has_deadline {
        Ok(apic.model.set_tsc_deadline(value))
    } else {
        Err(MsrError::Unknown)
    }
}

fn write_efer(
    hw: &mut impl Loaded,
    arch: &Arch,
    host: &Host,
    value: u64,
    by_host: bool,
) -> Result<(), MsrError> {
    let features = if by_host {
        &host.supported
    } else {
        &arch.features
    };
    let (old, cr0) = (hw.efer(), hw.cr0());
    let mut new = Efer::new(value);
    if by_host {
        // The bit follows from others, and a VMM writes back what it read.
        new = new.with_if(Efer::LMA, old.has(Efer::LMA));
    }
    let efer = cr::check_efer_write(old, new, cr0, features).map_err(|_| MsrError::Refused)?;
    hw.set_efer(efer);
    Ok(())
}

/// A guest that sets its counter moves IA32_TSC_ADJUST along, and the other way round (SDM vol. 3,
/// 18.17.3). A VMM that restores either leaves the other alone.
fn write_time(hw: &mut impl Loaded, arch: &mut Arch, msr: Msr, value: u64, by_host: bool) {
    if msr == Msr::TSC_ADJUST {
        if !by_host {
            let moved = value.wrapping_sub(arch.tsc_adjust);
            let tsc = hw.tsc().moved(moved);
            hw.set_tsc(tsc);
        }
        arch.tsc_adjust = value;
        return;
    }
    if by_host {
        arch.clock.write(hw, value);
        return;
    }
    let old = hw.tsc();
    let new = old.saying(value, host_msr::rdtsc());
    hw.set_tsc(new);
    let moved = new.offset.wrapping_sub(old.offset);
    arch.tsc_adjust = arch.tsc_adjust.wrapping_add(moved);
}
