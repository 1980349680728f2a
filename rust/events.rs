// SPDX-License-Identifier: GPL-2.0

//! The events that wait to be delivered to a vCPU, and which of them goes next.
//!
//! An event is *pending* until an entry is asked to deliver it, *injected* from then until the
//! delivery is known to be complete. One that was injected and did not arrive, because its delivery
//! exited, goes before everything else with the next entry: for the guest it has begun already.

use crate::backend::Event;
use crate::backend::EventKind;
use crate::backend::Loaded;
use crate::x86::exception::Fault;
use crate::x86::exception::Vector;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use crate::x86::regs::Rflags;

/// A fault that waits for its first delivery.
#[derive(Clone, Copy)]
pub(crate) struct PendingFault {
    pub(crate) fault: Fault,
    /// New bits of DR6, for #DB: they are set when it is delivered.
    pub(crate) dr6: u64,
}

/// The events of a vCPU.
#[derive(Default)]
pub(crate) struct Events {
    /// Raised, and not handed to an entry yet.
    pub(crate) fault: Option<PendingFault>,
    /// Handed to an entry that could not deliver it.
    pub(crate) injected: Option<Event>,
    /// An interrupt that the VMM queued (KVM_INTERRUPT), by its vector.
    pub(crate) interrupt: Option<u8>,
    /// NMIs that wait: at most two, as one can be latched while another is handled.
    pub(crate) nmis: u8,
    /// The guest shut down.
    pub(crate) triple_fault: bool,
}

/// The classes of exceptions that decide what becomes of a second one (SDM vol. 3, table 6-5).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

fn class(vector: Vector) -> Class {
    match vector {
        Vector::PF => Class::PageFault,
        Vector::DE | Vector::TS | Vector::NP | Vector::SS | Vector::GP => Class::Contributory,
        _ => Class::Benign,
    }
}

impl Events {
    /// Whether anything might be delivered with the next entry.
    #[inline]
    pub(crate) fn any(&self) -> bool {
        self.fault.is_some()
            || self.injected.is_some()
            || self.interrupt.is_some()
            || self.nmis != 0
            || self.triple_fault
    }

    /// Raises an exception. One that strikes while another waits makes a double fault of it, or the
    /// end, as their classes have it (SDM vol. 3, 6.15, interrupt 8).
    pub(crate) fn raise(&mut self, fault: Fault, dr6: u64) {
        let first = match (self.fault, self.injected) {
            (Some(pending), _) => Some(pending.fault.vector),
            (None, Some(e)) if e.kind == EventKind::Exception => Some(Vector(e.vector)),
            _ => None,
        };
        let fault = match first {
            Some(Vector::DF) => {
                self.triple_fault = true;
                return;
            }
            Some(first) => match (class(first), class(fault.vector)) {
                (Class::Contributory, Class::Contributory)
                | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                    self.injected = None;
                    Fault {
                        vector: Vector::DF,
                        error: Some(0),
                        cr2: fault.cr2,
                    }
                }
                // The second is handled first; the first strikes again when its instruction does.
                _ => {
                    self.injected = None;
                    fault
                }
            },
            None => fault,
        };
        self.fault = Some(PendingFault { fault, dr6 });
    }

    /// Latches an NMI.
    pub(crate) fn add_nmi(&mut self, blocked: bool) {
        let limit = if blocked { 1 } else { 2 };
        self.nmis = self.nmis.saturating_add(1).min(limit);
    }

    /// After an exit: takes note of an event whose delivery was not completed.
    pub(crate) fn recover(&mut self, hw: &mut impl Loaded) {
        let Some(event) = hw.take_undelivered() else {
            return;
        };
        match event.kind {
            // It is still only a request: whether it can be taken is asked again.
            EventKind::Interrupt => self.interrupt = Some(event.vector),
            EventKind::Nmi => self.nmis = self.nmis.saturating_add(1).min(2),
            _ => self.injected = Some(event),
        }
    }

    /// Before an entry: hands the event that comes first to the hardware (SDM vol. 3, table 6-2),
    /// and asks for a window for what must wait. `dr6` is the vCPU's; `window_wanted` says that the
    /// VMM waits for the guest to be able to take an interrupt.
    pub(crate) fn deliver(&mut self, hw: &mut impl Loaded, dr6: &mut u64, window_wanted: bool) {
        let mut free = false;
        if let Some(event) = self.injected.take() {
            hw.inject(&event);
        } else if let Some(pending) = self.fault.take() {
            deliver_fault(hw, &pending, dr6);
        } else {
            free = true;
        }

        if self.nmis != 0 && free && !hw.nmi_blocked() && !in_shadow(hw) {
            self.nmis -= 1;
            free = false;
            hw.inject(&Event {
                kind: EventKind::Nmi,
                vector: Vector::NMI.0,
                error: None,
                instruction_len: 0,
            });
        }
        hw.set_nmi_window(self.nmis != 0);

        if let Some(vector) = self.interrupt {
            if free && can_interrupt(hw) {
                self.interrupt = None;
                hw.inject(&Event {
                    kind: EventKind::Interrupt,
                    vector,
                    error: None,
                    instruction_len: 0,
                });
            }
        }
        hw.set_interrupt_window(self.interrupt.is_some() || window_wanted);
    }

    /// Whether the VMM may queue an interrupt that would be delivered at once.
    pub(crate) fn ready_for_interrupt(&self, hw: &mut impl Loaded) -> bool {
        self.interrupt.is_none()
            && self.fault.is_none()
            && self.injected.is_none()
            && can_interrupt(hw)
    }
}

fn in_shadow(hw: &mut impl Loaded) -> bool {
    let (sti, mov_ss) = hw.shadow();
    sti || mov_ss
}

/// Whether the guest can take an external interrupt now.
pub(crate) fn can_interrupt(hw: &mut impl Loaded) -> bool {
    hw.rflags().has(Rflags::IF) && !in_shadow(hw)
}

fn deliver_fault(hw: &mut impl Loaded, pending: &PendingFault, dr6: &mut u64) {
    let fault = &pending.fault;
    if let Some(cr2) = fault.cr2 {
        hw.set_cr2(cr2);
    }
    if fault.vector == Vector::DB {
        // The exit's bits are those of DR6, but for the two that DR6 has the other way round.
        let inverted = Dr6::RTM.with(Dr6::BLD).bits();
        let kept = Dr6::new(*dr6).without(Dr6::TRAPS).bits() | inverted;
        *dr6 = (kept | pending.dr6 & !inverted) ^ pending.dr6 & inverted;
        let dr7 = hw.dr7();
        hw.set_dr7(dr7.without(Dr7::GD));
    }
    // Faults, unlike traps, push RF set, so that an instruction breakpoint does not strike twice.
    if !matches!(fault.vector, Vector::DB | Vector::BP | Vector::OF) {
        let flags = hw.rflags();
        hw.set_rflags(flags.with(Rflags::RF));
    }
    hw.inject(&Event::from(*fault));
}
