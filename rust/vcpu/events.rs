// SPDX-License-Identifier: GPL-2.0

//! KVM_INTERRUPT, KVM_NMI, KVM_GET/SET_VCPU_EVENTS.

use super::Locked;
use crate::abi::kvm_vcpu_events;
use crate::apics::SharedApic;
use crate::backend::Loaded;
use crate::bindings as b;
use crate::events::apply_payload;
use crate::irq::Mode;
use crate::run::debug;
use crate::x86::event::EventsState;
use crate::x86::event::Exception;
use crate::x86::event::Interrupt;
use crate::x86::event::Shadow;
use crate::x86::exception::Vector;
use kernel::prelude::*;

impl<L: Loaded> Locked<'_, L> {
    /// KVM_INTERRUPT: EINVAL for a vector that is none. With the local APIC in the kernel it is what the
    /// VMM's interrupt controller has behind it: EEXIST if there is one already, and ENXIO if that
    /// controller is in the kernel as well.
    pub(super) fn interrupt(&mut self, irq: u32) -> Result {
        let vector = u8::try_from(irq).map_err(|_| EINVAL)?;
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            self.arch.events.queue_interrupt(vector);
            return Ok(());
        };
        if self.around.irqs.mode() == Mode::Kernel {
            return Err(ENXIO);
        }
        if apic.extint.is_some() {
            return Err(EEXIST);
        }
        apic.extint = Some(vector);
        Ok(())
    }

    /// KVM_NMI.
    pub(super) fn nmi(&mut self) {
        let masked = self.hw.nmi_blocked();
        self.arch.events.set_nmi_masked(masked);
        self.arch.events.queue_nmi();
    }

    /// KVM_GET_VCPU_EVENTS.
    pub(super) fn get_events(&mut self) -> kvm_vcpu_events {
        let masked = self.hw.nmi_blocked();
        self.arch.events.set_nmi_masked(masked);
        self.show_step();
        let with_payload = self.shows(b::KVM_VCPUEVENT_VALID_PAYLOAD);
        // Else the ABI has no place for what goes into CR2 and DR6, so it goes there at once.
        if !with_payload {
            if let Some((vector, payload)) = self.arch.events.take_payload() {
                apply_payload(self.hw, vector, payload, &mut self.arch.dr6);
            }
        }
        let state = self.arch.events.state();
        let mut events = kvm_vcpu_events::default();

        // INT3 and INTO are not shown: the guest executes them again.
        let hard = |e: &Exception| e.insn_len == 0;
        let pending = state.exception_pending.filter(hard);
        if let Some(e) = pending.or(state.exception_injected.filter(hard)) {
            let waits = pending.is_some();
            // A VMM that does not know of the difference has it injected again.
            events.exception.injected = u8::from(!waits || !with_payload);
            events.exception.pending = u8::from(waits);
            events.exception.nr = e.vector.0;
            events.exception.has_error_code = u8::from(e.error.is_some());
            events.exception.error_code = e.error.unwrap_or(0);
            events.exception_has_payload = u8::from(e.payload.is_some());
            events.exception_payload = e.payload.unwrap_or(0);
        }
        if let Some(i) = state.interrupt_injected.filter(|i| !i.is_soft()) {
            events.interrupt.injected = 1;
            events.interrupt.nr = i.vector;
        }
        events.interrupt.shadow = match self.hw.shadow() {
            Shadow::None => 0,
            Shadow::MovSs => b::KVM_X86_SHADOW_INT_MOV_SS as u8,
            Shadow::Sti => b::KVM_X86_SHADOW_INT_STI as u8,
        };
        events.nmi.injected = u8::from(state.nmi_injected);
        events.nmi.pending = u8::from(state.nmi_pending);
        events.nmi.masked = u8::from(state.nmi_masked);
        let init = self.around.shared.apic().is_some_and(SharedApic::has_init);
        events.smi.latched_init = u8::from(init);
        events.flags = b::KVM_VCPUEVENT_VALID_NMI_PENDING
            | b::KVM_VCPUEVENT_VALID_SHADOW
            | b::KVM_VCPUEVENT_VALID_SMM;
        if with_payload {
            events.flags |= b::KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if self.shows(b::KVM_VCPUEVENT_VALID_TRIPLE_FAULT) {
            events.triple_fault.pending = u8::from(state.triple_fault);
            events.flags |= b::KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        events
    }

    /// Whether the VMM knows of a field.
    fn shows(&self, field: u32) -> bool {
        self.around.options.shows_event_field(field)
    }

    /// A step that is due is an exception that waits. Where it is a part of the shadow behind STI or MOV
    /// SS, it comes back with that ([`debug::settle_step`]).
    fn show_step(&mut self) {
        let due = self.arch.events.takes_traps()
            && !self.arch.debugger.takes_traps()
            && self.hw.shadow() == Shadow::None
            && self.hw.take_pending_step();
        if due {
            self.arch.events.raise(debug::STEP);
        }
    }

    /// KVM_SET_VCPU_EVENTS: EINVAL for flags of capabilities that are absent, and for exceptions that
    /// are none.
    pub(super) fn set_events(&mut self, events: &kvm_vcpu_events) -> Result {
        const ALWAYS: u32 = b::KVM_VCPUEVENT_VALID_NMI_PENDING
            | b::KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | b::KVM_VCPUEVENT_VALID_SHADOW
            | b::KVM_VCPUEVENT_VALID_SMM;
        let enabled = [
            b::KVM_VCPUEVENT_VALID_PAYLOAD,
            b::KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
        ]
        .into_iter()
        .filter(|field| self.shows(*field))
        .fold(ALWAYS, |known, field| known | field);
        if events.flags & !enabled != 0 {
            return Err(EINVAL);
        }
        // There is no system-management mode to be in.
        let smm = events.smi.smm | events.smi.pending | events.smi.smm_inside_nmi;
        if events.flags & b::KVM_VCPUEVENT_VALID_SMM != 0 && smm != 0 {
            return Err(EINVAL);
        }
        let waits =
            events.flags & b::KVM_VCPUEVENT_VALID_PAYLOAD != 0 && events.exception.pending != 0;
        let exception = (waits || events.exception.injected != 0).then(|| Exception {
            vector: Vector(events.exception.nr),
            error: (events.exception.has_error_code != 0).then_some(events.exception.error_code),
            payload: (waits && events.exception_has_payload != 0)
                .then_some(events.exception_payload),
            insn_len: 0,
        });
        if exception.is_some_and(|e| e.vector.0 > 31 || e.vector == Vector::NMI) {
            return Err(EINVAL);
        }

        let old = self.arch.events.state();
        let nmi_pending = if events.flags & b::KVM_VCPUEVENT_VALID_NMI_PENDING != 0 {
            events.nmi.pending != 0
        } else {
            old.nmi_pending
        };
        let state = EventsState {
            exception_pending: exception.filter(|_| waits),
            exception_injected: exception.filter(|_| !waits),
            interrupt_injected: (events.interrupt.injected != 0).then_some(Interrupt {
                vector: events.interrupt.nr,
                // INT n is two bytes long, but for prefixes that nobody writes.
                insn_len: if events.interrupt.soft != 0 { 2 } else { 0 },
            }),
            nmi_injected: events.nmi.injected != 0,
            nmi_pending,
            nmi_masked: events.nmi.masked != 0,
            triple_fault: if events.flags & b::KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 {
                events.triple_fault.pending != 0
            } else {
                old.triple_fault
            },
        };
        self.arch.events.set_state(&state).map_err(|_| EINVAL)?;
        self.hw.set_nmi_blocked(state.nmi_masked);
        if events.flags & b::KVM_VCPUEVENT_VALID_SMM != 0 {
            self.set_latched_init(events.smi.latched_init != 0);
        }
        if events.flags & b::KVM_VCPUEVENT_VALID_SIPI_VECTOR != 0 {
            self.arch.sipi_vector = events.sipi_vector as u8;
        }
        if events.flags & b::KVM_VCPUEVENT_VALID_SHADOW != 0 {
            let shadow = u32::from(events.interrupt.shadow);
            // As in KVM, the greater one if both are asked for.
            self.hw
                .set_shadow(if shadow & b::KVM_X86_SHADOW_INT_MOV_SS != 0 {
                    Shadow::MovSs
                } else if shadow & b::KVM_X86_SHADOW_INT_STI != 0 {
                    Shadow::Sti
                } else {
                    Shadow::None
                });
            debug::settle_step(self.hw, self.arch);
        }
        Ok(())
    }
}
