// SPDX-License-Identifier: GPL-2.0

//! The local APIC (SDM vol. 3, chapter 12).
//!
//! One [`Apic`] belongs to each vCPU and is the vCPU's own: reads and writes of its registers, priorities, the end of an
//! interrupt, the timer. Its registers are in a page ([`ApicPage`]) that others reach as well, through an [`ApicView`]: a device or
//! another vCPU leaves a vector in it, and what is no vector in a word of [`ApicEvents`](events::ApicEvents). Neither part has a lock, a
//! clock or a timer; what has to be done outside is an [`Effect`] or an [`Expiry`].
//!
//! | module | what it answers |
//! |---|---|
//! | [`page`] | where the registers are, and how they are shared |
//! | [`regs`] | which registers there are in which mode, and their bits |
//! | [`base`] | IA32_APIC_BASE: modes, and the ways between them |
//! | [`access`] | reads and writes: MMIO, MSRs, CR8 |
//! | [`message`] | the interrupt command register; for whom a message is |
//! | [`map`] | from a destination to vCPUs |
//! | [`view`], [`events`] | what others leave |
//! | [`timer`] | the counter and the TSC deadline |
//! | [`state`] | KVM_GET_LAPIC, KVM_SET_LAPIC |
//!
//! Where KVM and the manual differ, this is mostly the manual's: vectors from 0 to 15 are not delivered but logged in the error status
//! register, and WRMSR of a reserved bit in x2APIC mode is #GP.

pub mod access;
pub mod base;
pub mod events;
pub mod map;
pub mod message;
pub mod page;
pub mod regs;
pub mod state;
pub mod timer;
pub mod view;

use super::cpuid::features::GuestFeatures;
use super::line::Trigger;
use super::msr::MsrError;
use base::ApicBase;
use base::ApicMode;
use base::Role;
use events::ApicEvent;
use message::x2apic_ldr;
use message::DeliveryMode;
use message::IdFormat;
use message::Level;
use message::Message;
use message::Target;
use page::ApicPage;
use regs::Bank;
use regs::Esr;
use regs::Lvt;
use regs::LvtEntry;
use regs::LvtSet;
use regs::Reg;
use regs::Svr;
use regs::TimerModes;
use timer::BusPeriod;
use timer::Clock;
use timer::Divide;
use timer::Expiry;
use timer::Timer;
use timer::TimerMode;
use view::ApicView;
use view::Delivered;

/// Whether software can keep the ends of level-triggered interrupts from the I/O APICs (bit 24 of the version register). KVM does not offer
/// it with an I/O APIC of its own, which has no other way to hear of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EoiSuppression {
    /// It cannot.
    #[default]
    Absent,
    /// By bit 12 of the spurious-interrupt vector register.
    Offered,
}

/// What LINT0 of the bootstrap processor is after reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lint0Reset {
    /// Masked, as the manual says.
    #[default]
    Masked,
    /// The interrupt controller's, as firmware leaves it (KVM_X86_QUIRK_LINT0_REENABLED).
    ExtInt,
}

/// What software cannot change about an APIC, and a VMM only by [`Apic::reconfigure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The initial ID, and the ID in x2APIC mode.
    pub id: u32,
    /// Whether the vCPU is the one that starts the machine.
    pub role: Role,
    /// The IDs in the state that a VMM gets and sets.
    pub ids: IdFormat,
    /// The local vector table.
    pub lvts: LvtSet,
    /// The modes of the timer.
    pub timer: TimerModes,
    /// The suppression of EOI broadcasts.
    pub eoi: EoiSuppression,
    /// LINT0 after reset.
    pub lint0: Lint0Reset,
    /// The clock of the timer's counter.
    pub bus: BusPeriod,
}

impl Config {
    /// The APIC with this ID, without anything optional.
    #[must_use]
    pub const fn new(id: u32, role: Role) -> Self {
        Self {
            id,
            role,
            ids: IdFormat::Narrow,
            lvts: LvtSet::Basic,
            timer: TimerModes::Counters,
            eoi: EoiSuppression::Absent,
            lint0: Lint0Reset::Masked,
            bus: BusPeriod::DEFAULT,
        }
    }

    /// The version register (SDM vol. 3, figure 12-7).
    #[must_use]
    pub const fn version(&self) -> u32 {
        let eoi = match self.eoi {
            EoiSuppression::Absent => 0,
            EoiSuppression::Offered => 1 << 24,
        };
        0x14 | (self.lvts.max_index() << 16) | eoi
    }
}

/// Which reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Of the machine: the mode and the ID too.
    PowerUp,
    /// By an INIT: those stay.
    Init,
}

/// How an interrupt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eoi {
    /// None was in service.
    None,
    /// It came by an edge. I/O APICs are not told.
    Edge(u8),
    /// It came by a level. I/O APICs that sent this vector are to look at their pins again.
    Broadcast(u8),
    /// It came by a level, and software tells the I/O APIC itself.
    Suppressed(u8),
}

/// What is left to do after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// [`Apic::pending_interrupt`] may have changed.
    Recheck,
    /// An interrupt ended; the same, and I/O APICs may have to know.
    Eoi(Eoi),
    /// A message has to be delivered.
    Send(Message),
    /// [`Timer::next_expiry`] may have changed.
    Timer,
    /// What the APIC answers to, or whether it takes vectors, may have changed: maps have to be made anew.
    Identity,
}

/// The local APIC of one vCPU.
#[derive(Clone, Debug)]
pub struct Apic<P> {
    page: P,
    config: Config,
    base: ApicBase,
    timer: Timer,
    /// Errors since the error status register was written.
    errors: Esr,
}

impl<P: ApicPage> Apic<P> {
    /// An APIC after power-up.
    #[must_use]
    pub fn new(page: P, config: Config) -> Self {
        let mut apic = Self {
            page,
            config,
            base: ApicBase::reset(config.role),
            timer: Timer::new(config.bus),
            errors: Esr::empty(),
        };
        apic.reset(Reset::PowerUp);
        apic
    }

    /// What software cannot change.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The APIC as others see it.
    #[must_use]
    pub const fn view(&self) -> ApicView<'_, P> {
        ApicView::new(&self.page, self.mode(), self.config.id, self.config.ids)
    }

    /// The timer.
    #[must_use]
    pub const fn timer(&self) -> &Timer {
        &self.timer
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub const fn base(&self) -> ApicBase {
        self.base
    }

    /// The mode.
    #[must_use]
    pub const fn mode(&self) -> ApicMode {
        self.base.mode()
    }

    fn get(&self, reg: Reg) -> u32 {
        page::get(&self.page, reg)
    }

    fn put(&self, reg: Reg, value: u32) {
        page::put(&self.page, reg, value);
    }

    fn svr(&self) -> Svr {
        Svr::new(self.get(Reg::Svr))
    }

    fn lvt(&self, entry: LvtEntry) -> Lvt {
        Lvt::new(self.get(Reg::Lvt(entry)))
    }

    /// Resets it (SDM vol. 3, 12.4.7.1 and 12.4.7.3).
    pub fn reset(&mut self, reset: Reset) {
        if matches!(reset, Reset::PowerUp) {
            self.base = ApicBase::reset(self.config.role);
            self.put(Reg::Id, (self.config.id & 0xff) << 24);
        }
        if !matches!(self.mode(), ApicMode::X2apic) {
            self.put(Reg::Ldr, 0);
        }
        self.put(Reg::Version, self.config.version());
        self.put(Reg::Dfr, u32::MAX);
        self.put(Reg::Svr, Svr::RESET.bits());
        for reg in [Reg::Tpr, Reg::Ppr, Reg::Esr, Reg::InitialCount, Reg::Divide] {
            self.put(reg, 0);
        }
        self.put_icr(0);
        for bank in [Bank::Isr, Bank::Tmr, Bank::Irr] {
            for word in 0..8 {
                self.put(Reg::Vectors(bank, word), 0);
            }
        }
        for entry in LvtEntry::ALL {
            let masked = if self.config.lvts.contains(entry) {
                Lvt::MASKED.bits()
            } else {
                0
            };
            self.put(Reg::Lvt(entry), masked);
        }
        if let (Role::Bootstrap, Lint0Reset::ExtInt) = (self.config.role, self.config.lint0) {
            self.put(Reg::Lvt(LvtEntry::Lint0), 7 << 8);
        }
        self.timer = Timer::new(self.config.bus);
        self.errors = Esr::empty();
    }

    /// Takes what a VMM may change about a vCPU that exists, by a new CPUID or MCG_CAP or a capability of the VM: all but the ID, the role and
    /// the bus. An entry of the local vector table that is new is masked, and bits that are no more are cleared.
    pub fn reconfigure(&mut self, config: &Config) -> Effect {
        let old = self.config;
        self.config = Config {
            id: old.id,
            role: old.role,
            bus: old.bus,
            ..*config
        };
        self.put(Reg::Version, self.config.version());
        self.put(Reg::Svr, self.svr().bits() & self.writable(Reg::Svr));
        for entry in LvtEntry::ALL {
            let reg = Reg::Lvt(entry);
            let value = match (old.lvts.contains(entry), self.config.lvts.contains(entry)) {
                (_, false) => 0,
                (false, true) => Lvt::MASKED.bits(),
                (true, true) => self.get(reg) & self.writable(reg),
            };
            self.put(reg, value);
        }
        self.update_timer_mode();
        Effect::Timer
    }

    /// Writes IA32_APIC_BASE, for the guest or (`host`) for a VMM.
    ///
    /// # Errors
    ///
    /// As [`ApicBase::check_write`].
    pub fn set_base(
        &mut self,
        value: u64,
        features: &GuestFeatures,
        host: bool,
    ) -> Result<Effect, MsrError> {
        let new = self.base.check_write(value, features, host)?;
        let old = core::mem::replace(&mut self.base, new);
        if old == new {
            return Ok(Effect::None);
        }
        let (old_mode, new_mode) = (old.mode(), new.mode());
        if old_mode == new_mode {
            return Ok(Effect::Identity);
        }
        if matches!(old_mode, ApicMode::X2apic) {
            self.put(Reg::Ldr, 0);
        }
        match new_mode {
            ApicMode::Disabled | ApicMode::Xapic => {
                self.put(Reg::Id, (self.config.id & 0xff) << 24)
            }
            ApicMode::X2apic => {
                self.put(Reg::Id, self.config.id);
                self.put(Reg::Ldr, x2apic_ldr(self.config.id));
            }
        }
        // The upper half of the command register is at another place, and is not kept.
        self.put_icr(u64::from(self.get(Reg::Icr)));
        Ok(Effect::Identity)
    }

    /// Writes the interrupt command register, which x2APIC mode has in one piece and xAPIC mode in two.
    fn put_icr(&self, icr: u64) {
        let (low, high) = (icr as u32, (icr >> 32) as u32);
        let x2apic = matches!(self.mode(), ApicMode::X2apic);
        self.put(Reg::Icr, low);
        self.page
            .write(Self::ICR_UPPER, if x2apic { high } else { 0 });
        self.put(Reg::IcrHigh, if x2apic { 0 } else { high });
    }

    /// Where x2APIC mode has bits 63:32 of the interrupt command register.
    const ICR_UPPER: u16 = 0x304;

    /// The interrupt command register.
    fn icr(&self) -> u64 {
        let high = match self.mode() {
            ApicMode::X2apic => self.page.read(Self::ICR_UPPER),
            _ => self.get(Reg::IcrHigh),
        };
        (u64::from(high) << 32) | u64::from(self.get(Reg::Icr))
    }

    /// The processor priority: the task's, or the class of the interrupt in service if that is higher (SDM vol. 3, 12.8.3.1).
    #[must_use]
    pub fn ppr(&self) -> u8 {
        let tpr = self.get(Reg::Tpr) as u8;
        let isr = page::highest(&self.page, Bank::Isr).unwrap_or(0);
        if tpr & 0xf0 >= isr & 0xf0 {
            tpr
        } else {
            isr & 0xf0
        }
    }

    /// Works the processor priority out anew, also for the processor, which reads it from the page.
    fn update_ppr(&self) -> u8 {
        let ppr = self.ppr();
        self.put(Reg::Ppr, u32::from(ppr));
        ppr
    }

    /// The highest vector that is requested, whatever the priority.
    #[must_use]
    pub fn highest_requested(&self) -> Option<u8> {
        page::highest(&self.page, Bank::Irr)
    }

    /// The highest vector that is in service.
    #[must_use]
    pub fn highest_in_service(&self) -> Option<u8> {
        page::highest(&self.page, Bank::Isr)
    }

    /// Whether a vector is requested or in service.
    #[must_use]
    pub fn holds(&self, vector: u8) -> bool {
        page::test(&self.page, Bank::Irr, vector) || page::test(&self.page, Bank::Isr, vector)
    }

    /// The interrupt that the processor would get if it took one: the highest that is requested, if its class is above the processor
    /// priority.
    #[must_use]
    pub fn pending_interrupt(&self) -> Option<u8> {
        if matches!(self.mode(), ApicMode::Disabled) {
            return None;
        }
        let vector = self.highest_requested()?;
        (vector & 0xf0 > self.update_ppr() & 0xf0).then_some(vector)
    }

    /// The processor takes the pending interrupt: it is in service from now on. None is what hardware answers with
    /// [`Apic::spurious_vector`].
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending_interrupt()?;
        page::clear(&self.page, Bank::Irr, vector);
        page::set(&self.page, Bank::Isr, vector);
        // It is pending because its class is above the task's and those of all in service.
        self.put(Reg::Ppr, u32::from(vector & 0xf0));
        Some(vector)
    }

    /// The vector for an interrupt that is gone when the processor takes it (SDM vol. 3, 12.9). It is never in service.
    #[must_use]
    pub fn spurious_vector(&self) -> u8 {
        self.svr().vector()
    }

    /// Ends the interrupt with the highest priority in service (SDM vol. 3, 12.8.5).
    pub fn eoi(&mut self) -> Eoi {
        let Some(vector) = self.highest_in_service() else {
            return Eoi::None;
        };
        page::clear(&self.page, Bank::Isr, vector);
        self.update_ppr();
        self.ended(vector)
    }

    /// What the end of an interrupt means, where the processor has carried it out itself (an EOI-induced exit).
    #[must_use]
    pub fn ended(&self, vector: u8) -> Eoi {
        if !page::test(&self.page, Bank::Tmr, vector) {
            Eoi::Edge(vector)
        } else if self.svr().has(Svr::SUPPRESS_EOI) {
            Eoi::Suppressed(vector)
        } else {
            Eoi::Broadcast(vector)
        }
    }

    /// Whether the interrupt controller outside reaches the processor: through LINT0, or past an APIC that is disabled (SDM vol. 3,
    /// 12.5.1).
    #[must_use]
    pub fn accepts_extint(&self) -> bool {
        let lint0 = self.lvt(LvtEntry::Lint0);
        let open = !lint0.has(Lvt::MASKED)
            && DeliveryMode::new(lint0.mode_bits()) == Some(DeliveryMode::ExtInt);
        open || matches!(self.mode(), ApicMode::Disabled)
    }

    /// Delivers an interrupt of the local vector table. An event is left to the caller, an illegal vector is logged.
    pub fn deliver_local(&mut self, entry: LvtEntry) -> Delivered {
        let delivered = self.deliver_entry(entry);
        if let Delivered::Event(ApicEvent::IllegalVector) = delivered {
            self.log_error(Esr::RECEIVE_ILLEGAL_VECTOR);
            return Delivered::Dropped;
        }
        if entry == LvtEntry::Perfmon && !matches!(delivered, Delivered::Dropped) {
            // Its handler opens it again (SDM vol. 3, 12.5.1).
            self.put(Reg::Lvt(entry), self.lvt(entry).with(Lvt::MASKED).bits());
        }
        delivered
    }

    fn deliver_entry(&self, entry: LvtEntry) -> Delivered {
        let lvt = self.lvt(entry);
        if !self.config.lvts.contains(entry) || lvt.has(Lvt::MASKED) {
            return Delivered::Dropped;
        }
        // A SIPI cannot come from here, nor can anything arbitrate.
        let Some(
            mode @ (DeliveryMode::Fixed
            | DeliveryMode::Smi
            | DeliveryMode::Nmi
            | DeliveryMode::Init
            | DeliveryMode::ExtInt),
        ) = DeliveryMode::new(lvt.mode_bits())
        else {
            return Delivered::Dropped;
        };
        self.view().deliver(&Message {
            mode,
            vector: lvt.vector(),
            level: Level::Assert,
            trigger: if lvt.has(Lvt::LEVEL) {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            target: Target::Itself,
        })
    }

    /// Logs errors, and raises the error interrupt if one of them is new since the error status register was written.
    pub fn log_error(&mut self, errors: Esr) {
        if self.errors.has(errors) {
            return;
        }
        self.errors |= errors;
        if let Delivered::Event(ApicEvent::IllegalVector) = self.deliver_entry(LvtEntry::Error) {
            self.errors |= Esr::RECEIVE_ILLEGAL_VECTOR;
        }
    }

    /// Lets the timer go off if it is time to, and delivers its interrupt.
    pub fn run_timer(&mut self, clock: &impl Clock) -> (Expiry, Delivered) {
        let expiry = self.timer.expire(clock);
        let delivered = match expiry {
            Expiry::Fired { .. } => self.deliver_local(LvtEntry::Timer),
            Expiry::Stopped | Expiry::Pending(_) => Delivered::Dropped,
        };
        (expiry, delivered)
    }

    /// Makes the timer follow its LVT entry.
    fn update_timer_mode(&mut self) {
        let mode = TimerMode::new(self.lvt(LvtEntry::Timer), self.config.timer);
        self.timer.set_mode(mode);
        self.put(Reg::InitialCount, self.timer.initial());
    }

    /// Makes the timer follow its divide configuration.
    fn update_timer_divide(&mut self, clock: &impl Clock) {
        let divide = Divide::new(self.get(Reg::Divide));
        self.timer.set_divide(divide, clock.ns());
    }
}
