// SPDX-License-Identifier: GPL-2.0

//! Between the model of a vCPU's events ([`crate::x86::event`]) and the hardware that delivers them.

use crate::backend::Loaded;
use crate::run::debug::Debugger;
use crate::run::debug::STEP;
use crate::stats::VcpuStats;
use crate::x86::event::Exception;
use crate::x86::event::Gate;
use crate::x86::event::Injection;
use crate::x86::event::InterruptSource;
use crate::x86::event::PendingEvents;
use crate::x86::exception::Vector;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use crate::x86::regs::Rflags;

/// What [`deliver`] did.
#[derive(Clone, Copy, Default)]
pub(crate) struct Delivery {
    /// The guest should exit as soon as the event is delivered.
    pub(crate) exit_at_once: bool,
    /// The hardware cannot deliver the event as the guest is: it is to be done by software, and no entry before.
    pub(crate) by_software: bool,
    /// RFLAGS.RF at the entry, if an event went with it.
    restart: Option<bool>,
}

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
/// that must wait. `dr6` is the vCPU's, and `debugger` the VMM's; `window_wanted` says that the VMM waits for the guest to be
/// able to take an interrupt, `source` is the interrupt controllers in the kernel.
#[inline]
pub(crate) fn deliver(
    hw: &mut impl Loaded,
    events: &mut PendingEvents,
    dr6: &mut u64,
    debugger: &mut Debugger,
    window_wanted: bool,
    source: &mut impl InterruptSource,
    stats: &VcpuStats,
) -> Delivery {
    if events.is_idle() && !source.waits() {
        hw.set_interrupt_window(window_wanted);
        hw.set_nmi_window(false);
        return Delivery::default();
    }
    events.set_nmi_masked(hw.nmi_blocked());
    // The processor forgets a step that is due if something is injected: the step comes first.
    if events.takes_traps() && hw.take_pending_step() {
        if debugger.takes_traps() {
            // With nothing injected the entry ends at once, for the debugger.
            hw.set_pending_step();
            hw.set_interrupt_window(false);
            hw.set_nmi_window(false);
            return Delivery::default();
        }
        events.raise(STEP);
    }
    let selection = events.select(gate(hw), source);
    hw.set_interrupt_window(selection.interrupt_window || window_wanted);
    hw.set_nmi_window(selection.nmi_window);
    if let Some(injection) = &selection.inject {
        match injection {
            Injection::Exception(exception) => apply_effects(hw, exception, dr6, debugger),
            Injection::Nmi => stats.nmi_injections.bump(),
            Injection::Interrupt(_) => stats.irq_injections.bump(),
        }
        if hw.needs_delivery() {
            return Delivery {
                by_software: true,
                ..Delivery::default()
            };
        }
        hw.inject(injection);
    }
    Delivery {
        by_software: false,
        exit_at_once: selection.exit_at_once,
        restart: selection.inject.map(|_| hw.rflags().has(Rflags::RF)),
    }
}

/// After an exit that followed a [`deliver`]: what was injected has arrived, or is to be injected
/// again.
#[inline]
pub(crate) fn conclude(hw: &mut impl Loaded, events: &mut PendingEvents, delivery: &Delivery) {
    let vectoring = hw.vectoring();
    events.redeliver(vectoring);
    // The delivery pushes RF as it was when it began. An exit in the middle of it should leave that
    // (SDM vol. 3, 28.3.3), but may leave it set, as for any other instruction that must restart.
    // An instruction that asks for an event (INT n) has none to push.
    let restart = match vectoring {
        None => None,
        Some(event) if event.is_soft() => Some(false),
        Some(_) => delivery.restart,
    };
    if let Some(restart) = restart {
        let flags = hw.rflags();
        if flags.has(Rflags::RF) != restart {
            hw.set_rflags(flags.with_if(Rflags::RF, restart));
        }
    }
}

/// What an exception leaves in the registers besides what its delivery pushes.
fn apply_effects(
    hw: &mut impl Loaded,
    exception: &Exception,
    dr6: &mut u64,
    debugger: &mut Debugger,
) {
    if let Some(payload) = exception.payload {
        apply_payload(hw, exception.vector, payload, dr6);
    }
    if exception.vector == Vector::DB {
        match debugger.hidden_control() {
            Some(dr7) => *dr7 = dr7.without(Dr7::GD),
            None => {
                let dr7 = hw.dr7();
                hw.set_dr7(dr7.without(Dr7::GD));
            }
        }
    }
}

/// Puts an exception's payload where the guest looks for it: CR2, or DR6.
pub(crate) fn apply_payload(hw: &mut impl Loaded, vector: Vector, payload: u64, dr6: &mut u64) {
    match vector {
        Vector::PF => hw.set_cr2(payload),
        Vector::DB => {
            // The payload has the bits as DR6 has them, but for the two that are active low there.
            let inverted = Dr6::RTM.with(Dr6::BLD).bits();
            let kept = Dr6::new(*dr6).without(Dr6::TRAPS).bits() | inverted;
            *dr6 = (kept | payload & !inverted) ^ (payload & inverted);
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
