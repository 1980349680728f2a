// SPDX-License-Identifier: GPL-2.0

//! Reads and writes of the registers, by the three ways that software has: the page of xAPIC mode, the MSRs of x2APIC mode, CR8.

use super::super::msr::Msr;
use super::super::msr::MsrError;
use super::base::ApicMode;
use super::message::IcrLow;
use super::message::Message;
use super::message::NotSent;
use super::message::Target;
use super::message::FIRST_VECTOR;
use super::page::ApicPage;
use super::regs::Access;
use super::regs::Esr;
use super::regs::Lvt;
use super::regs::LvtEntry;
use super::regs::Reg;
use super::regs::Svr;
use super::timer::Clock;
use super::timer::Divide;
use super::timer::TimerMode;
use super::Apic;
use super::Effect;
use super::EoiSuppression;

impl<P: ApicPage> Apic<P> {
    fn access(&self, reg: Reg) -> Access {
        reg.access(self.mode(), self.config.lvts)
    }

    /// Reads `len` bytes at an offset into the page of xAPIC mode; none if the APIC is not in that mode, and so not there.
    ///
    /// One, two or four bytes of one register can be read; anything else reads as 0 (SDM vol. 3, 12.4.1, leaves it undefined). A
    /// register that is reserved may raise the error interrupt: [`Apic::pending_interrupt`] has to be asked again.
    pub fn mmio_read(&mut self, offset: u16, len: usize, clock: &impl Clock) -> Option<u32> {
        if self.mode() != ApicMode::Xapic {
            return None;
        }
        let byte = usize::from(offset & 0xf);
        let mask = match len {
            1 if byte < 4 => 0xff,
            2 if byte < 3 => 0xffff,
            4 if byte == 0 => u32::MAX,
            _ => return Some(0),
        };
        Some(match self.mmio_register(offset) {
            Some(reg) if self.access(reg).can_read() => {
                (self.read_reg(reg, clock) >> ((byte & 3) << 3)) & mask
            }
            _ => 0,
        })
    }

    /// Writes `len` bytes at an offset into the page of xAPIC mode; none if the APIC is not in that mode.
    ///
    /// Only the four bytes of a register are written; anything else, and a register that is read-only, changes nothing.
    pub fn mmio_write(
        &mut self,
        offset: u16,
        len: usize,
        value: u32,
        clock: &impl Clock,
    ) -> Option<Effect> {
        if self.mode() != ApicMode::Xapic {
            return None;
        }
        if len != 4 || offset & 0xf != 0 {
            return Some(Effect::None);
        }
        let before = self.errors;
        let effect = match self.mmio_register(offset) {
            Some(reg) if self.access(reg).can_write() => self.write_reg(reg, value, clock),
            _ => Effect::None,
        };
        // A new error may have raised the error interrupt.
        Some(match effect {
            Effect::None if !before.has(self.errors) => Effect::Recheck,
            effect => effect,
        })
    }

    /// The register at an offset. To try one that is not there is an error.
    fn mmio_register(&mut self, offset: u16) -> Option<Reg> {
        let reg = Reg::at(offset & 0xfff).filter(|&reg| self.access(reg) != Access::None);
        if reg.is_none() {
            self.log_error(Esr::ILLEGAL_REGISTER);
        }
        reg
    }

    /// The register behind an MSR of x2APIC mode.
    fn x2apic_register(&self, msr: Msr) -> Result<Reg, MsrError> {
        let index = match msr.0.wrapping_sub(Msr::X2APIC_FIRST.0) {
            index @ 0..=0xff if self.mode() == ApicMode::X2apic => index as u16,
            _ => return Err(MsrError::Unknown),
        };
        Reg::at(index << 4)
            .filter(|&reg| self.access(reg) != Access::None)
            .ok_or(MsrError::Unknown)
    }

    /// RDMSR of 0x800 to 0x8ff.
    ///
    /// # Errors
    ///
    /// [`MsrError::Unknown`] outside of x2APIC mode and for a register that is not there, [`MsrError::Refused`] for one that is
    /// write-only.
    pub fn read_msr(&self, msr: Msr, clock: &impl Clock) -> Result<u64, MsrError> {
        match self.x2apic_register(msr)? {
            reg if !self.access(reg).can_read() => Err(MsrError::Refused),
            Reg::Icr => Ok(self.icr()),
            reg => Ok(self.read_reg(reg, clock).into()),
        }
    }

    /// WRMSR of 0x800 to 0x8ff.
    ///
    /// # Errors
    ///
    /// [`MsrError::Unknown`] outside of x2APIC mode and for a register that is not there, [`MsrError::Refused`] for one that is read-only
    /// and for reserved bits (SDM vol. 3, 12.12.1.3).
    pub fn write_msr(
        &mut self,
        msr: Msr,
        value: u64,
        clock: &impl Clock,
    ) -> Result<Effect, MsrError> {
        let reg = self.x2apic_register(msr)?;
        if !self.access(reg).can_write() {
            return Err(MsrError::Refused);
        }
        if reg == Reg::Icr {
            if value as u32 & IcrLow::X2APIC_RESERVED != 0 {
                return Err(MsrError::Refused);
            }
            return Ok(self.command(value));
        }
        let ignored = match reg {
            Reg::Lvt(entry) => entry.read_only(),
            _ => 0,
        };
        if value & !u64::from(self.writable(reg) | ignored) != 0 {
            return Err(MsrError::Refused);
        }
        Ok(self.write_reg(reg, value as u32, clock))
    }

    /// Acts on a register that the processor has written to the page itself, before it exited (SDM vol. 3, 31.4.3.3).
    pub fn written(&mut self, offset: u16, clock: &impl Clock) -> Effect {
        match Reg::at(offset & 0xfff) {
            Some(Reg::Icr) => self.command(self.icr()),
            Some(reg) if self.access(reg).can_write() => {
                let value = self.get(reg);
                self.write_reg(reg, value, clock)
            }
            _ => Effect::None,
        }
    }

    /// CR8: the class of the task priority (SDM vol. 3, 12.8.6).
    #[must_use]
    pub fn cr8(&self) -> u8 {
        (self.get(Reg::Tpr) as u8) >> 4
    }

    /// Writes CR8; bits above 3 are the caller's to refuse, and ignored here.
    pub fn set_cr8(&mut self, cr8: u8) -> Effect {
        self.set_tpr(u32::from(cr8 & 0xf) << 4)
    }

    /// RDMSR of IA32_TSC_DEADLINE.
    #[must_use]
    pub fn tsc_deadline(&self) -> u64 {
        match self.mode() {
            ApicMode::Disabled => 0,
            _ => self.timer.deadline(),
        }
    }

    /// WRMSR of IA32_TSC_DEADLINE. It is ignored unless the timer is in that mode (SDM vol. 3, 12.5.4.1).
    pub fn set_tsc_deadline(&mut self, tsc: u64) -> Effect {
        if self.mode() == ApicMode::Disabled || self.timer.mode() != TimerMode::TscDeadline {
            return Effect::None;
        }
        self.timer.set_deadline(tsc);
        Effect::Timer
    }

    /// The bits of a register that software can set in the mode that the APIC is in.
    pub(super) fn writable(&self, reg: Reg) -> u32 {
        match reg {
            Reg::Id | Reg::Ldr | Reg::IcrHigh => 0xff << 24,
            Reg::Tpr | Reg::SelfIpi => 0xff,
            Reg::Dfr => 0xf << 28,
            Reg::Svr => {
                let suppress = match self.config.eoi {
                    EoiSuppression::Absent => Svr::empty(),
                    EoiSuppression::Offered => Svr::SUPPRESS_EOI,
                };
                0xff | (Svr::ENABLED | Svr::FOCUS_OFF | suppress).bits()
            }
            // Reserved bits of the page are kept, as in KVM.
            Reg::Icr => !IcrLow::SEND_PENDING.bits(),
            Reg::Lvt(entry) => entry.writable(self.config.timer),
            Reg::InitialCount => u32::MAX,
            Reg::Divide => Divide::MASK,
            // What is written to the page's EOI and ESR does not matter; to an MSR, it has to be 0.
            Reg::Eoi | Reg::Esr => 0,
            Reg::Version | Reg::Apr | Reg::Ppr | Reg::Vectors(..) | Reg::CurrentCount => 0,
        }
    }

    /// The value of a register that can be read.
    pub(super) fn read_reg(&self, reg: Reg, clock: &impl Clock) -> u32 {
        match reg {
            Reg::Apr | Reg::Eoi | Reg::SelfIpi => 0,
            Reg::Ppr => self.ppr().into(),
            Reg::CurrentCount => self.timer.current_count(clock.ns()),
            _ => self.get(reg),
        }
    }

    /// Writes a register that can be written.
    fn write_reg(&mut self, reg: Reg, value: u32, clock: &impl Clock) -> Effect {
        let value = value & self.writable(reg);
        match reg {
            Reg::Id | Reg::Ldr => {
                self.put(reg, value);
                Effect::Identity
            }
            Reg::Dfr => {
                self.put(reg, value | 0x0fff_ffff);
                Effect::Identity
            }
            Reg::Tpr => self.set_tpr(value),
            Reg::Eoi => Effect::Eoi(self.eoi()),
            Reg::Svr => {
                self.put(reg, value);
                if !Svr::new(value).has(Svr::ENABLED) {
                    self.mask_lvts();
                }
                Effect::Identity
            }
            Reg::Esr => {
                let errors = core::mem::take(&mut self.errors);
                self.put(reg, errors.bits());
                Effect::None
            }
            Reg::Icr => {
                self.put(reg, value);
                self.command(self.icr())
            }
            Reg::IcrHigh => {
                self.put(reg, value);
                Effect::None
            }
            Reg::Lvt(entry) => {
                let masked = !self.svr().has(Svr::ENABLED);
                let lvt = Lvt::new(value);
                let lvt = lvt.with_if(Lvt::MASKED, masked || lvt.has(Lvt::MASKED));
                self.put(reg, lvt.bits());
                if entry != LvtEntry::Timer {
                    return Effect::None;
                }
                self.update_timer_mode();
                Effect::Timer
            }
            Reg::InitialCount => {
                self.timer.start(value, clock.ns());
                self.put(reg, self.timer.initial());
                Effect::Timer
            }
            Reg::Divide => {
                self.put(reg, value);
                self.update_timer_divide(clock);
                Effect::Timer
            }
            Reg::SelfIpi => self.send(Ok(Message::fixed(value as u8, Target::Itself))),
            Reg::Version | Reg::Apr | Reg::Ppr | Reg::Vectors(..) | Reg::CurrentCount => {
                Effect::None
            }
        }
    }

    fn set_tpr(&mut self, tpr: u32) -> Effect {
        self.put(Reg::Tpr, tpr);
        self.update_ppr();
        Effect::Recheck
    }

    /// Software has disabled the APIC: nothing local is delivered until it opens the entries again (SDM vol. 3, 12.4.7.2).
    fn mask_lvts(&mut self) {
        for entry in LvtEntry::ALL {
            if self.config.lvts.contains(entry) {
                let lvt = self.lvt(entry).with(Lvt::MASKED);
                self.put(Reg::Lvt(entry), lvt.bits());
            }
        }
    }

    /// Carries out a command, and keeps it.
    fn command(&mut self, icr: u64) -> Effect {
        let icr = icr & !u64::from(IcrLow::SEND_PENDING.bits());
        self.put_icr(icr);
        let high = (icr >> 32) as u32;
        let destination = match self.mode() {
            ApicMode::X2apic => high,
            _ => high >> 24,
        };
        self.send(IcrLow::new(icr as u32).decode(destination))
    }

    fn send(&mut self, message: Result<Message, NotSent>) -> Effect {
        match message {
            Ok(message) if !message.mode.has_vector() || message.vector >= FIRST_VECTOR => {
                Effect::Send(message)
            }
            Ok(_) | Err(NotSent::IllegalVector) => {
                self.log_error(Esr::SEND_ILLEGAL_VECTOR);
                Effect::Recheck
            }
            Err(NotSent::InitDeassert | NotSent::ReservedMode) => Effect::None,
        }
    }
}
