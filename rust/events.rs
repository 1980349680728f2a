// SPDX-License-Identifier: GPL-2.0

//! Between the model of a vCPU's events ([`crate::x86::event`]) and the hardware that delivers them.

use crate::backend::Loaded;
use crate::x86::event::Exception;
use crate::x86::event::Gate;
use crate::x86::event::Injection;
use crate::x86::event::PendingEvents;
use crate::x86::exception::Vector;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use crate::x86::regs::Rflags;

/// What holds events back now.
#[inline]
pub(crate) fn gate(hw: &mut impl Loaded) -> Gate {
    Gate {
        interrupts_enabled: hw.rflags().has(Rflags::IF),
        shadow: hw.shadow(),
    }
}

/// Whether an interrupt that the VMM queued now would be delivered at once.
pub(crate) fn ready_for_interrupt(hw: &mut impl Loaded, events: &PendingEvents) -> bool {
    events.ready_for_interrupt(gate(hw))
}

/// Before an entry: hands the event that comes first to the hardware, and opens windows for those
/// that must wait. `dr6` is the vCPU's; `window_wanted` says that the VMM waits for the guest to be
/// able to take an interrupt. Returns if the guest should exit as soon as the event is delivered.
#[inline]
pub(crate) fn deliver(
    hw: &mut impl Loaded,
    events: &mut PendingEvents,
    dr6: &mut u64,
    window_wanted: bool,
) -> bool {
    if events.is_idle() {
        hw.set_interrupt_window(window_wanted);
        hw.set_nmi_window(false);
        return false;
    }
    events.set_nmi_masked(hw.nmi_blocked());
    let selection = events.select(gate(hw));
    hw.set_interrupt_window(selection.interrupt_window || window_wanted);
    hw.set_nmi_window(selection.nmi_window);
    if let Some(injection) = &selection.inject {
        if let Injection::Exception(exception) = injection {
            apply_effects(hw, exception, dr6);
        }
        hw.inject(injection);
    }
    selection.exit_at_once
}

/// What an exception leaves in the registers besides what its delivery pushes.
fn apply_effects(hw: &mut impl Loaded, exception: &Exception, dr6: &mut u64) {
    let Some(payload) = exception.payload else {
        return;
    };
    match exception.vector {
        Vector::PF => hw.set_cr2(payload),
        Vector::DB => {
            // The payload has the bits as DR6 has them, but for the two that are active low there.
            let inverted = Dr6::RTM.with(Dr6::BLD).bits();
            let kept = Dr6::new(*dr6).without(Dr6::TRAPS).bits() | inverted;
            *dr6 = (kept | payload & !inverted) ^ (payload & inverted);
            let dr7 = hw.dr7();
            hw.set_dr7(dr7.without(Dr7::GD));
        }
        _ => {}
    }
}

/// The exception to raise for a fault: faults, unlike traps, push RFLAGS with RF set, so that an
/// instruction breakpoint does not strike again when the instruction is restarted.
pub(crate) fn mark_restart(hw: &mut impl Loaded, vector: Vector) {
    if !matches!(vector, Vector::DB | Vector::BP | Vector::OF) {
        let flags = hw.rflags();
        hw.set_rflags(flags.with(Rflags::RF));
    }
}
