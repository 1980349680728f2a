// SPDX-License-Identifier: GPL-2.0

//! What the processor does itself for a local APIC: the task priority (a TPR shadow), and with virtual
//! interrupt delivery and posted interrupts everything that a guest does often (SDM vol. 3, chapter
//! 31). And the VMX-preemption timer, for the APIC's.
//!
//! The registers are in the virtual-APIC page, which is the page of the model's. What is not in it is
//! in the guest interrupt status: the highest vector in service (SVI), and the highest requested (RVI).

use super::fields as f;
use super::fields::PinControls;
use super::fields::PrimaryControls;
use super::fields::SecondaryControls;
use super::vcpu::LoadedVcpu;
use crate::apics::ApicPages;
use crate::linux::msr as host_msr;
use crate::x86::apic::base::ApicMode;

/// The vector that tells a CPU of posted interrupts: the kernel's own, POSTED_INTR_VECTOR.
const NOTIFICATION_VECTOR: u16 = crate::bindings::RKVM_POSTED_INTR_VECTOR as u16;

/// A vCPU's APIC as its VMCS knows it.
pub(super) struct VmcsApic {
    pages: ApicPages,
    /// What the TPR threshold is.
    threshold: u8,
    /// Interrupts are delivered by the processor.
    virtualised: bool,
    /// But not for now.
    inhibited: bool,
}

impl VmcsApic {
    pub(super) fn new(pages: ApicPages, virtualised: bool) -> Self {
        Self {
            pages,
            threshold: 0,
            virtualised,
            inhibited: false,
        }
    }
}

impl LoadedVcpu<'_> {
    /// Tells the processor where the registers are.
    pub(super) fn initialise_apic(&mut self) {
        let caps = &self.vmx.caps;
        let Some(apic) = &self.v.apic else { return };
        if !caps.tpr_shadow {
            return;
        }
        let registers = &apic.pages.registers;
        let (page, posted) = (registers.phys(), registers.posted().phys());
        let access = apic.pages.access;
        let virtualised = apic.virtualised;
        self.v.primary = self
            .v
            .primary
            .with(PrimaryControls::TPR_SHADOW)
            .without(PrimaryControls::CR8_LOAD | PrimaryControls::CR8_STORE);
        self.write(f::PRIMARY_CONTROLS, self.v.primary.bits());
        self.write(f::VIRTUAL_APIC_ADDRESS, page);
        self.write(f::TPR_THRESHOLD, 0);
        if !virtualised {
            return;
        }
        // As after reset: by the page at the default address.
        self.v.secondary |= SecondaryControls::APIC_ACCESSES
            | SecondaryControls::APIC_REGISTERS
            | SecondaryControls::INTERRUPT_DELIVERY;
        self.write(f::SECONDARY_CONTROLS, self.v.secondary.bits());
        self.v.pin |= PinControls::POSTED_INTERRUPTS;
        self.write(f::PIN_CONTROLS, self.v.pin.bits());
        self.write(f::APIC_ACCESS_ADDRESS, access);
        self.write(f::GUEST_INTERRUPT_STATUS, 0);
        self.write(f::POSTED_NOTIFICATION_VECTOR, NOTIFICATION_VECTOR);
        self.write(f::POSTED_DESCRIPTOR_ADDRESS, posted);
        for field in f::EOI_EXIT_BITMAPS {
            self.write(field, 0);
        }
    }

    #[inline]
    pub(super) fn virtualises_apic(&self) -> bool {
        self.v.apic.as_ref().is_some_and(|apic| apic.virtualised)
    }

    /// Has the guest exit when its task priority sinks below a class; 0 for never.
    #[inline]
    pub(super) fn set_tpr_threshold(&mut self, class: u8) {
        let tpr_shadow = self.vmx.caps.tpr_shadow;
        let Some(apic) = &mut self.v.apic else { return };
        if apic.threshold != class && tpr_shadow {
            apic.threshold = class;
            self.write(f::TPR_THRESHOLD, class.into());
        }
    }

    /// How the guest accesses its APIC: by MSRs, by the page at the default address, or by neither.
    pub(super) fn set_apic_mode(&mut self, mode: ApicMode, at_default: bool) {
        if !self.virtualises_apic() {
            return;
        }
        let x2apic = matches!(mode, ApicMode::X2apic);
        let page = matches!(mode, ApicMode::Xapic) && at_default;
        let secondary = self
            .v
            .secondary
            .with_if(SecondaryControls::X2APIC, x2apic)
            .with_if(SecondaryControls::APIC_ACCESSES, page);
        if secondary == self.v.secondary {
            return;
        }
        self.v.secondary = secondary;
        self.write(f::SECONDARY_CONTROLS, secondary.bits());
        self.choose_msr_bitmap();
        // A translation that was cached meanwhile is one to plain memory (SDM vol. 3, 31.4.6.3).
        self.v.flush_memory = true;
    }

    /// Which MSRs the guest reaches without an exit.
    fn choose_msr_bitmap(&mut self) {
        let x2apic = self.v.secondary.has(SecondaryControls::X2APIC);
        let inhibited = self.v.apic.as_ref().is_some_and(|apic| apic.inhibited);
        self.v.msr_bitmap.pass_x2apic(x2apic && !inhibited);
    }

    /// Has the processor deliver no interrupts, and every access exit but those to the task priority.
    pub(super) fn inhibit_virtual_apic(&mut self, inhibited: bool) {
        let Some(apic) = self.v.apic.as_mut().filter(|apic| apic.virtualised) else {
            return;
        };
        if core::mem::replace(&mut apic.inhibited, inhibited) == inhibited {
            return;
        }
        let delivery = SecondaryControls::APIC_REGISTERS | SecondaryControls::INTERRUPT_DELIVERY;
        self.v.secondary = self.v.secondary.with_if(delivery, !inhibited);
        self.v.pin = self
            .v
            .pin
            .with_if(PinControls::POSTED_INTERRUPTS, !inhibited);
        // Whoever turns it on again brings the interrupt status up to date. Without, a threshold counts.
        self.set_tpr_threshold(0);
        self.write(f::SECONDARY_CONTROLS, self.v.secondary.bits());
        self.write(f::PIN_CONTROLS, self.v.pin.bits());
        self.choose_msr_bitmap();
    }

    /// The highest vectors in service and requested; 0 for none.
    pub(super) fn set_interrupt_status(&mut self, in_service: u8, requested: u8) {
        let status = u16::from(in_service) << 8 | u16::from(requested);
        self.write(f::GUEST_INTERRUPT_STATUS, status);
    }

    /// A vector has been requested beside those that the processor knows of.
    pub(super) fn raise_requested(&mut self, requested: u8) {
        let status = self.read(f::GUEST_INTERRUPT_STATUS);
        if u16::from(requested) > status & 0xff {
            let status = status & 0xff00 | u16::from(requested);
            self.write(f::GUEST_INTERRUPT_STATUS, status);
        }
    }

    /// The vectors whose end exits.
    pub(super) fn set_eoi_exits(&mut self, vectors: &[u64; 4]) {
        if self.virtualises_apic() {
            for (field, word) in f::EOI_EXIT_BITMAPS.into_iter().zip(vectors) {
                self.write(field, *word);
            }
        }
    }

    /// Has the guest exit at a value of the host's time-stamp counter, or not.
    #[inline]
    pub(super) fn set_timer(&mut self, deadline: Option<u64>) {
        self.v.deadline = deadline;
        let pin = self
            .v
            .pin
            .with_if(PinControls::PREEMPTION_TIMER, deadline.is_some());
        if pin != self.v.pin {
            self.v.pin = pin;
            self.write(f::PIN_CONTROLS, pin.bits());
        }
    }

    /// Sets the preemption timer for what is left until then. Before each entry.
    #[inline]
    pub(super) fn start_timer(&mut self) {
        if let Some(deadline) = self.v.deadline {
            let ticks = deadline.saturating_sub(host_msr::rdtsc());
            let value = ticks >> self.vmx.caps.timer_shift.unwrap_or(0);
            // An exit that comes early for a far deadline finds that out.
            self.write(
                f::PREEMPTION_TIMER_VALUE,
                u32::try_from(value).unwrap_or(u32::MAX),
            );
        }
    }
}
