// SPDX-License-Identifier: GPL-2.0

//! The local APIC in the guest's hands: what its accesses bring about.

use super::Run;
use crate::apics::Apics;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::bindings::KVM_X86_QUIRK_LAPIC_MMIO_HOLE as HOLE;
use crate::irq::Irqs;
use crate::irq::Mode;
use crate::lapic::GuestClock;
use crate::lapic::LocalApic;
use crate::linux::msr as host_msr;
use crate::mem::GuestMemory;
use crate::options::VmOptions;
use crate::system::Host;
use crate::tlb::Request;
use crate::tlb::VcpuShared;
use crate::x86::apic::base::ApicMode;
use crate::x86::apic::base::DEFAULT_ADDRESS;
use crate::x86::apic::events::ApicEvent;
use crate::x86::apic::message::X2APIC_BROADCAST;
use crate::x86::apic::view::Delivered;
use crate::x86::apic::Effect;
use crate::x86::apic::Eoi;
use crate::x86::clock::tsc::GuestTsc;
use crate::x86::cpuid::features::Features;
use crate::x86::event::InterruptSource;
use crate::x86::msr::Msr;
use crate::x86::regs::Gpr;

/// What a vCPU's local APIC reaches.
#[derive(Clone, Copy)]
pub(crate) struct Around<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) shared: &'a VcpuShared,
    pub(crate) apics: &'a Apics,
    pub(crate) irqs: &'a Irqs,
    pub(crate) options: &'a VmOptions,
    pub(crate) host: &'a Host,
}

/// The clocks of the vCPU's timer.
#[inline]
pub(crate) fn clock(hw: &mut impl Loaded) -> GuestClock {
    GuestClock { tsc: hw.tsc() }
}

/// The interrupt controllers as an entry sees them.
pub(super) struct Controllers<'a> {
    pub(super) apic: Option<&'a mut LocalApic>,
    pub(super) irqs: &'a Irqs,
}

impl Controllers<'_> {
    /// Whether a controller outside has an interrupt that the APIC lets through.
    #[inline]
    fn outside_waits(apic: &LocalApic, irqs: &Irqs) -> bool {
        (apic.extint.is_some() || irqs.pic_pending()) && apic.model.accepts_extint()
    }
}

impl InterruptSource for Controllers<'_> {
    #[inline]
    fn waits(&mut self) -> bool {
        match &mut self.apic {
            Some(apic) => {
                Self::outside_waits(apic, self.irqs)
                    || (!apic.virtualised && apic.pending_interrupt().is_some())
            }
            None => false,
        }
    }

    fn acknowledge(&mut self) -> Option<u8> {
        let apic = self.apic.as_deref_mut()?;
        if !Self::outside_waits(apic, self.irqs) {
            apic.recheck = true;
            return apic.model.acknowledge();
        }
        let left_by_vmm = apic.extint.take();
        Some(left_by_vmm.unwrap_or_else(|| self.irqs.pic_acknowledge()))
    }
}

/// Carries out what an access to the APIC has left to do. May sleep.
pub(crate) fn apply(hw: &mut impl Loaded, arch: &mut Arch, around: &Around<'_>, effect: Effect) {
    let clock = clock(hw);
    let Some(apic) = arch.apic.as_deref_mut() else {
        return;
    };
    match effect {
        Effect::None => {}
        Effect::Recheck => apic.recheck = true,
        Effect::Eoi(eoi) => ended(apic, around, eoi),
        Effect::Send(message) => {
            let sender = apic.model.config().id;
            around.apics.send(&message, Some(sender));
        }
        Effect::Timer => set_timer(hw, apic, &clock),
        Effect::Identity => {
            apic.recheck = true;
            let base = apic.model.base();
            hw.set_apic_mode(base.mode(), base.address() == DEFAULT_ADDRESS);
            set_timer(hw, apic, &clock);
            if apic.identity_changed(around.apics.ids()) {
                if let Some(shared) = around.shared.apic() {
                    shared.set_mode(apic.model.mode());
                }
                around.apics.rebuild();
                around.shared.request(Request::EoiVectors);
                let cr4 = hw.cr4();
                arch.refresh_cpuid(around.host, around.options, cr4);
            }
        }
    }
}

/// The timer may go off at another moment than before.
fn set_timer(hw: &mut impl Loaded, apic: &mut LocalApic, clock: &GuestClock) {
    if hw.has_timer() {
        // The host's own timer is for when the vCPU sleeps.
        hw.set_timer(apic.expires_tsc(clock));
    } else {
        apic.arm_timer(clock);
    }
}

/// An interrupt ended: the next one may be let through, and an I/O APIC may want to know.
fn ended(apic: &mut LocalApic, around: &Around<'_>, eoi: Eoi) {
    apic.recheck = true;
    let (vector, level) = match eoi {
        Eoi::None | Eoi::Suppressed(_) => return,
        Eoi::Edge(vector) => (vector, false),
        Eoi::Broadcast(vector) => (vector, true),
    };
    if !apic.tells_eoi(vector) {
        return;
    }
    match around.irqs.mode() {
        Mode::Kernel => around.irqs.eoi(vector, level),
        Mode::Split => apic.ioapic_eoi = Some(vector),
        Mode::None => {}
    }
}

impl<'a, L: Loaded> Run<'a, L> {
    /// What the vCPU's registers reach.
    pub(super) fn around(&self) -> Around<'a> {
        Around {
            memory: self.memory,
            shared: self.shared,
            apics: self.apics,
            irqs: self.irqs,
            options: self.options,
            host: self.host,
        }
    }
}

impl<L: Loaded> Run<'_, L> {
    pub(super) fn apply(&mut self, effect: Effect) {
        let around = self.around();
        apply(&mut self.hw, self.arch, &around, effect);
    }

    /// A device access of the emulator's to the page of the APIC: none if it is not there.
    fn own_page(&self, gpa: u64) -> Option<u16> {
        let base = self.arch.apic.as_deref()?.model.base();
        (gpa & !0xfff == base.address()).then_some((gpa & 0xfff) as u16)
    }

    /// Reads from the APIC's page; none if it is not there.
    pub(super) fn apic_read(&mut self, gpa: u64, len: u8) -> Option<[u8; 8]> {
        let offset = self.own_page(gpa)?;
        let clock = clock(&mut self.hw);
        let apic = self.arch.apic.as_deref_mut()?;
        if apic.model.mode() != ApicMode::Xapic {
            return self.options.has_quirk(HOLE).then_some([0xff; 8]);
        }
        let value = apic.model.mmio_read(offset, usize::from(len), &clock)?;
        // A register that is not there may have raised the error interrupt.
        apic.recheck = true;
        Some(u64::from(value).to_le_bytes())
    }

    /// Writes to the APIC's page; returns if it is there.
    pub(super) fn apic_write(&mut self, gpa: u64, data: &[u8; 8], len: u8) -> bool {
        let Some(offset) = self.own_page(gpa) else {
            return false;
        };
        let clock = clock(&mut self.hw);
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return false;
        };
        let value = u64::from_le_bytes(*data) as u32;
        let effect = apic
            .model
            .mmio_write(offset, usize::from(len), value, &clock);
        match effect {
            Some(effect) => {
                self.apply(effect);
                true
            }
            None => self.options.has_quirk(HOLE),
        }
    }

    /// WRMSR of those registers that a guest writes all the time, with interrupts off: returns if it is
    /// done and there is nothing that an entry has to prepare for. If not, nothing has happened.
    #[inline]
    pub(super) fn wrmsr_at_once(&mut self) -> bool {
        let msr = Msr(self.hw.gpr(Gpr::Rcx) as u32);
        if self.arch.apic.is_none() {
            return false;
        }
        let value = self.hw.gpr(Gpr::Rdx) << 32 | self.hw.gpr(Gpr::Rax) & 0xffff_ffff;
        let done = match msr {
            Msr::X2APIC_EOI => self.eoi_at_once(value),
            Msr::X2APIC_ICR => self.command_at_once(msr, value),
            Msr::TSC_DEADLINE if self.arch.msr_filter.is_none() => self.deadline_at_once(value),
            _ => false,
        };
        if done {
            self.skip();
        }
        done
    }

    /// The end of an interrupt that is nobody else's affair.
    fn eoi_at_once(&mut self, value: u64) -> bool {
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return false;
        };
        if value != 0 || apic.model.mode() != ApicMode::X2apic {
            return false;
        }
        let vector = apic.model.highest_in_service();
        if vector.is_some_and(|vector| apic.tells_eoi(vector)) {
            return false;
        }
        // Nobody wants to know what has ended.
        let _ = apic.model.eoi();
        if apic.model.highest_requested().is_some() {
            // The loop stops for it.
            apic.recheck = true;
            self.shared.request(Request::Interrupts);
        }
        true
    }

    /// A deadline that is still to come.
    fn deadline_at_once(&mut self, value: u64) -> bool {
        if !self.arch.features.has(Features::TSC_DEADLINE) || !self.hw.has_timer() {
            return false;
        }
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return false;
        };
        let (tsc, now) = (self.hw.tsc(), host_msr::rdtsc());
        let ticks = value.saturating_sub(tsc.at(now));
        if value != 0 && ticks == 0 {
            return false;
        }
        if apic.model.set_tsc_deadline(value) == Effect::Timer {
            // In this mode, and with nothing but this to wait for.
            let expiry = now.saturating_add(tsc.scale.host_ticks(ticks));
            self.hw.set_timer((value != 0).then_some(expiry));
        }
        true
    }

    /// The timer may have gone off.
    pub(super) fn run_timer(&mut self) {
        let clock = clock(&mut self.hw);
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return;
        };
        if let Delivered::Event(ApicEvent::Nmi) = apic.run_timer(&clock) {
            self.arch.events.queue_nmi();
        }
        set_timer(&mut self.hw, apic, &clock);
    }

    /// The same, with interrupts off: returns if the processor delivers what has come of it, and there is
    /// nothing else for an entry to.
    #[inline(never)]
    pub(super) fn timer_at_once(&mut self) -> bool {
        self.run_timer();
        let apic = self.arch.apic.as_deref();
        let by_itself = apic.is_some_and(|apic| apic.virtualised) && self.arch.events.is_idle();
        if by_itself {
            self.prepare_apic();
        }
        by_itself
    }

    /// Before an entry, interrupts off: what has been posted, and what the processor has to know of a
    /// virtual APIC that was changed behind its back.
    #[inline]
    pub(super) fn prepare_apic(&mut self) {
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return;
        };
        if !apic.virtualised {
            self.hw.set_priority_threshold(apic.priority_threshold());
            self.offer_eoi();
            return;
        }
        let posted = self.shared.apic().filter(|shared| shared.has_posted());
        if let Some(shared) = posted {
            shared.take_posted();
        }
        if apic.recheck {
            apic.recheck = false;
            let in_service = apic.model.highest_in_service().unwrap_or(0);
            let requested = apic.model.highest_requested().unwrap_or(0);
            self.hw.set_interrupt_status(in_service, requested);
        } else if posted.is_some() {
            let requested = apic.model.highest_requested().unwrap_or(0);
            self.hw.raise_requested(requested);
        }
    }

    /// The processor has ended an interrupt of the guest's by itself.
    pub(super) fn interrupt_end(&mut self, vector: u8) {
        if let Some(apic) = self.arch.apic.as_deref() {
            let effect = Effect::Eoi(apic.model.ended(vector));
            self.apply(effect);
        }
    }

    /// The guest has written to a register in the virtual APIC's page that does more than keep a value.
    pub(super) fn register_written(&mut self, offset: u16) {
        let clock = clock(&mut self.hw);
        if let Some(apic) = self.arch.apic.as_deref_mut() {
            let effect = apic.model.written(offset, &clock);
            self.apply(effect);
        }
    }

    /// The interrupt controllers, for the events model.
    pub(super) fn recheck_interrupts(&mut self) {
        if let Some(apic) = self.arch.apic.as_deref_mut() {
            apic.recheck = true;
        }
    }

    /// A vector for some vCPUs.
    fn command_at_once(&mut self, msr: Msr, value: u64) -> bool {
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return false;
        };
        // Fixed, edge, by no shorthand and not for all: what else there is can take its time, and should
        // not with interrupts off where there are many vCPUs.
        if value & 0xc_8700 != 0 || (value >> 32) as u32 == X2APIC_BROADCAST {
            return false;
        }
        let clock = GuestClock {
            tsc: GuestTsc::host(1),
        };
        match apic.model.write_msr(msr, value, &clock) {
            Ok(Effect::Send(message)) => {
                let sender = apic.model.config().id;
                self.apics.send(&message, Some(sender));
                true
            }
            Ok(_) => {
                apic.recheck = true;
                self.shared.request(Request::Interrupts);
                true
            }
            Err(_) => false,
        }
    }
}
