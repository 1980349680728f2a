// SPDX-License-Identifier: GPL-2.0

//! Exits by control and debug registers, and XSETBV. The checks are [`crate::x86::cr`]'s.

use super::debug;
use super::Next;
use super::Run;
use crate::abi;
use crate::backend::CrAccess;
use crate::backend::Loaded;
use crate::x86::cr;
use crate::x86::cr::DebugReg;
use crate::x86::event::Exception;
use crate::x86::exception::Fault;
use crate::x86::exception::Vector;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr3;
use crate::x86::regs::Cr4;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use crate::x86::segment::SegReg;
use kernel::prelude::*;

impl<L: Loaded> Run<'_, L> {
    /// MOV to and from CR0, CR3, CR4 and CR8, CLTS, LMSW: an instruction of `len` bytes.
    pub(super) fn cr_access(&mut self, access: CrAccess, len: u8) -> Result<Next> {
        let done = match access {
            CrAccess::Write { cr, gpr } => {
                let value = self.operand(gpr);
                match cr {
                    0 => self.write_cr0(Cr0::new(value)),
                    2 => {
                        self.hw.set_cr2(value);
                        Ok(())
                    }
                    3 => self.write_cr3(value),
                    4 => self.write_cr4(Cr4::new(value)),
                    8 => return self.write_cr8(value, len),
                    _ => Err(Fault::UD),
                }
            }
            CrAccess::Read { cr, gpr } => {
                let value = match cr {
                    0 => self.hw.cr0().bits(),
                    2 => self.hw.cr2(),
                    4 => self.hw.cr4().bits(),
                    3 => self.hw.cr3(),
                    8 => self.arch.cr8(),
                    _ => return self.raise(Fault::UD),
                };
                self.hw.set_gpr(gpr, value);
                Ok(())
            }
            CrAccess::Clts => {
                let cr0 = cr::clts(self.hw.cr0());
                self.write_cr0(cr0)
            }
            CrAccess::Lmsw(source) => {
                let cr0 = cr::lmsw(self.hw.cr0(), source);
                self.write_cr0(cr0)
            }
        };
        match done {
            Ok(()) => {
                super::skip(&mut self.hw, len);
                Ok(Next::Guest)
            }
            Err(fault) => self.raise(fault),
        }
    }

    /// The value of a register operand: 32 bits out of 64-bit mode.
    fn operand(&mut self, gpr: Gpr) -> u64 {
        let value = self.hw.gpr(gpr);
        if crate::arch::in_64bit_mode(&mut self.hw) {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    fn write_cr0(&mut self, new: Cr0) -> Result<(), Fault> {
        let (old, cr4, efer) = (self.hw.cr0(), self.hw.cr4(), self.hw.efer());
        let cs = self.hw.segment_attr(SegReg::Cs);
        let change = cr::check_cr0(old, new, cr4, efer, cs)?;
        if change.consequences.load_pdptes {
            let cr3 = self.hw.cr3();
            self.load_pdptes(cr3)?;
        }
        self.hw.set_cr0(change.cr0);
        if change.consequences.flush_tlb {
            super::shadow::flush_guest(&mut self.hw, self.arch);
            self.shared.stats.tlb_flush.bump();
        }
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Result<(), Fault> {
        let (cr4, efer) = (self.hw.cr4(), self.hw.efer());
        let (cr3, flush) = cr::check_cr3(value, cr4, efer, &self.arch.features)?;
        if self.hw.cr0().has(Cr0::PG) && cr4.has(Cr4::PAE) && !efer.has(Efer::LMA) {
            self.load_pdptes(cr3.bits())?;
        }
        self.hw.set_cr3(cr3.bits());
        self.loaded_cr3(!flush);
        Ok(())
    }

    fn write_cr4(&mut self, new: Cr4) -> Result<(), Fault> {
        let (old, cr0, efer) = (self.hw.cr4(), self.hw.cr0(), self.hw.efer());
        let cr3 = self.hw.cr3();
        let then = cr::check_cr4(old, new, cr0, Cr3::new(cr3), efer, &self.arch.features)?;
        if then.load_pdptes {
            self.load_pdptes(cr3)?;
        }
        self.hw.set_cr4(new);
        if then.flush_tlb {
            super::shadow::flush_guest(&mut self.hw, self.arch);
            self.shared.stats.tlb_flush.bump();
        }
        if then.update_cpuid {
            self.arch.refresh_cpuid(self.host, self.options, new);
        }
        Ok(())
    }

    /// Without a local APIC in the kernel, the VMM's wants to know when the task priority sinks: it may hold an interrupt back.
    fn write_cr8(&mut self, value: u64, len: u8) -> Result<Next> {
        let new = match cr::check_cr8(value) {
            Ok(new) => new,
            Err(fault) => return self.raise(fault),
        };
        super::skip(&mut self.hw, len);
        if let Some(apic) = self.arch.apic.as_deref_mut() {
            let effect = apic.model.set_cr8(new);
            self.apply(effect);
            return Ok(Next::Guest);
        }
        let old = self.arch.cr8();
        self.arch.set_vmm_cr8(new.into());
        let new = u64::from(new);
        if new >= old {
            return Ok(Next::Guest);
        }
        self.page.set_exit_reason(abi::exit::SET_TPR);
        Ok(Next::User)
    }

    /// Reads the four entries of PAE paging at `cr3` and hands them to the hardware.
    fn load_pdptes(&mut self, cr3: u64) -> Result<(), Fault> {
        load_pdptes(&mut self.hw, self.memory, cr3, &self.arch.features)
    }

    /// MOV to and from a debug register: an instruction of `len` bytes.
    pub(super) fn dr_access(&mut self, dr: u8, gpr: Gpr, write: bool, len: u8) -> Result<Next> {
        let cr4 = self.hw.cr4();
        let register = match cr::debug_register(dr, cr4) {
            Ok(register) => register,
            Err(fault) => return self.raise(fault),
        };
        // The privilege level is not checked before the exit.
        if crate::arch::cpl(&mut self.hw) != 0 {
            return self.raise(Fault::gp(0));
        }
        if self.hw.dr7().has(Dr7::GD) {
            let detected = Exception {
                vector: Vector::DB,
                error: None,
                payload: Some(Dr6::BD.bits()),
                insn_len: 0,
            };
            if self.is_for_debugger(Vector::DB) {
                return Ok(self.leave_for_debugger(&detected));
            }
            self.arch.events.raise(detected);
            return Ok(Next::Guest);
        }
        let mut guests = debug::breakpoints(&mut self.hw, self.arch);
        if write {
            let value = self.operand(gpr);
            let value = match cr::check_debug_write(register, value) {
                Ok(value) => value,
                Err(fault) => return self.raise(fault),
            };
            match register {
                DebugReg::Address(n) => {
                    if let Some(place) = guests.addresses.get_mut(usize::from(n)) {
                        *place = value;
                    }
                }
                DebugReg::Status => self.arch.dr6 = value,
                DebugReg::Control => guests.control = Dr7::new(value),
            }
            debug::set_breakpoints(&mut self.hw, self.arch, &guests);
        } else {
            let value = match register {
                DebugReg::Address(n) => {
                    let address = guests.addresses.get(usize::from(n));
                    address.copied().unwrap_or(0)
                }
                DebugReg::Status => self.arch.dr6,
                DebugReg::Control => guests.control.bits(),
            };
            self.hw.set_gpr(gpr, value);
        }
        super::skip(&mut self.hw, len);
        Ok(Next::Guest)
    }

    /// XSETBV, an instruction of `len` bytes. The hardware has checked the privilege level.
    pub(super) fn xsetbv(&mut self, len: u8) -> Result<Next> {
        let index = self.hw.gpr(Gpr::Rcx) as u32;
        let value = self.hw.gpr(Gpr::Rdx) << 32 | self.hw.gpr(Gpr::Rax) & 0xffff_ffff;
        let features = self.arch.features.limited_to(&self.host.supported);
        match cr::check_xsetbv(index, value, &features) {
            Ok(xcr0) => {
                self.arch.xcr0 = xcr0.bits();
                let cr4 = self.hw.cr4();
                self.arch.refresh_cpuid(self.host, self.options, cr4);
                super::skip(&mut self.hw, len);
                Ok(Next::Guest)
            }
            Err(fault) => self.raise(fault),
        }
    }
}

/// Reads the four entries of PAE paging at `cr3` and hands them to the hardware: #GP(0) if one has a
/// reserved bit, or if there is no memory.
pub(crate) fn load_pdptes(
    hw: &mut impl Loaded,
    memory: &crate::mem::GuestMemory,
    cr3: u64,
    features: &crate::x86::cpuid::features::GuestFeatures,
) -> Result<(), Fault> {
    let mut bytes = [0; 32];
    if memory.read(Cr3::new(cr3).pae_root(), &mut bytes).is_err() {
        return Err(Fault::gp(0));
    }
    let mut entries = [0; 4];
    for (entry, chunk) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        *entry = u64::from_le_bytes(word);
    }
    if !cr::pdptes_are_valid(&entries, features) {
        return Err(Fault::gp(0));
    }
    hw.set_pdptes(&entries);
    Ok(())
}
