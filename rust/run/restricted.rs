// SPDX-License-Identifier: GPL-2.0

//! What the kernel does for a guest where the hardware is not [unrestricted](crate::backend::Loaded::is_restricted): events in
//! real mode, exceptions that only exit because the hardware is in another mode, and all instructions while the guest is in a
//! state that the hardware cannot be in.

use super::apic::Controllers;
use super::memory::EmuCpu;
use super::memory::EmuMemory;
use super::Next;
use super::Run;
use crate::abi;
use crate::backend::Loaded;
use crate::bindings::KVM_MP_STATE_RUNNABLE as RUNNABLE;
use crate::events;
use crate::linux::task;
use crate::run::debug::STEP;
use crate::tlb::Request;
use crate::x86::emulate::Event;
use crate::x86::emulate::Outcome;
use crate::x86::event::Exception;
use crate::x86::event::Injection;
use crate::x86::event::InterruptSource;
use crate::x86::event::Shadow;
use crate::x86::event::Vectoring;
use crate::x86::exception::Vector;
use crate::x86::segment::SegReg;
use kernel::prelude::*;

/// How many instructions are emulated before all else is looked at.
const BATCH: u32 = 128;

impl<L: Loaded> Run<'_, L> {
    /// Whether there is something to do before an entry that the hardware cannot.
    #[inline(never)]
    pub(super) fn needs_software(&mut self) -> bool {
        self.hw.needs_emulation()
            || self.hw.imitates_real_mode() && self.arch.events.begun().is_some()
    }

    /// Does it: delivers an event, or emulates instructions.
    #[cold]
    #[inline(never)]
    pub(super) fn step_without_hardware(&mut self) -> Result<Next> {
        if self.arch.events.begun().is_none() {
            let _ = self.deliver_event();
        }
        match self.arch.events.begun() {
            Some(injection) => self.deliver_by_software(&injection),
            None => self.emulate_batch(),
        }
    }

    /// Delivers an event as the processor would.
    pub(super) fn deliver_by_software(&mut self, injection: &Injection) -> Result<Next> {
        let (vectoring, vector, error, insn_len) = match *injection {
            Injection::Exception(e) => (Vectoring::Exception(e), e.vector.0, e.error, e.insn_len),
            Injection::Nmi => (Vectoring::Nmi, Vector::NMI.0, None, 0),
            Injection::Interrupt(i) => (Vectoring::Interrupt(i), i.vector, None, i.insn_len),
        };
        let event = Event {
            vector,
            error,
            by_program: insn_len != 0 && vector != Vector::DB.0,
        };
        // What a program asks for returns behind the instruction.
        let rip = self.hw.rip();
        if insn_len != 0 {
            self.hw.set_rip(rip.wrapping_add(u64::from(insn_len)));
        }
        let task = self.hw.segment(SegReg::Tr);
        let mut cpu = EmuCpu::new(&mut self.hw, &self.fpu, self.arch);
        let arch = &mut *self.arch;
        let mut memory = EmuMemory::new(self.memory, self.shared, &arch.devices);
        let outcome = arch.emulator.deliver(&mut cpu, &mut memory, event);
        let arrived = matches!(outcome, Outcome::Done(done) if done.retired);
        let switched = task != self.hw.segment(SegReg::Tr);
        if !arrived && !switched && insn_len != 0 {
            self.hw.set_rip(rip);
        }
        match outcome {
            Outcome::Done(_) => {
                if arrived && switched {
                    self.arrive(Some(vectoring));
                } else if arrived {
                    self.arch.events.redeliver(None);
                    if vectoring == Vectoring::Nmi {
                        self.hw.set_nmi_blocked(true);
                    }
                    self.hw.set_shadow(Shadow::None);
                }
                // Else somebody else was quicker, and it is tried again.
                self.hw.end_halt();
                Ok(Next::Guest)
            }
            Outcome::Fault(fault) => {
                // An exception makes a double fault of it; anything else has been acknowledged and is lost.
                if !matches!(vectoring, Vectoring::Exception(_)) {
                    self.arch.events.redeliver(None);
                }
                self.raise(fault)
            }
            Outcome::Host(at) => Err(self.unbacked(at)),
            _ => {
                let raw = self.hw.raw_exit();
                let data = [u64::from(vector), raw.reason, raw.qualification];
                self.page
                    .set_internal_error(abi::internal::DELIVERY_EVENT, &data);
                Ok(Next::User)
            }
        }
    }

    /// Emulates instructions as long as it must be, and nothing else has to be looked at.
    fn emulate_batch(&mut self) -> Result<Next> {
        self.arch.has_run = true;
        // What an entry would look for.
        if self.shared.pending() {
            self.take_requests();
            self.update_structures();
            if self.shared.take(Request::MsrFilter) {
                self.fetch_msr_filter();
            }
        }
        for _ in 0..BATCH {
            // A load of SS holds the trap of its own step back for good.
            if self.hw.take_pending_step() && self.hw.shadow() != Shadow::MovSs {
                if self.is_for_debugger(Vector::DB) {
                    return Ok(self.leave_for_debugger(&STEP));
                }
                self.arch.events.raise(STEP);
                break;
            }
            if self.emulate_one()? == Next::User {
                return Ok(Next::User);
            }
            if self.has_other_work() || !self.hw.needs_emulation() {
                break;
            }
        }
        Ok(Next::Guest)
    }

    /// Emulates the instruction at RIP.
    pub(super) fn emulate_one(&mut self) -> Result<Next> {
        self.shared.stats.insn_emulation.bump();
        self.arch.emulator.abort();
        self.step_emulator()
    }

    /// Whether something has come up that the loop around looks for.
    fn has_other_work(&mut self) -> bool {
        let masked = self.hw.nmi_blocked();
        self.arch.events.set_nmi_masked(masked);
        let gate = events::gate(&mut self.hw);
        let open = gate.interrupts_enabled && gate.shadow == Shadow::None;
        let mut controllers = Controllers {
            apic: self.arch.apic.as_deref_mut(),
            irqs: self.irqs,
        };
        self.arch.mp_state != RUNNABLE
            || self.arch.events.has_deliverable(gate)
            || open && (controllers.waits() || self.page.request_interrupt_window())
            || self.shared.pending()
            || task::guest_entry_work_seen()
    }

    /// An exception has made a guest exit that is in real mode while the hardware is not.
    #[cold]
    #[inline(never)]
    pub(super) fn real_mode_exception(&mut self, exception: Exception) -> Result<Next> {
        match exception.vector {
            // The instruction is one that has no place in virtual-8086 mode; or it does fault, which the emulator will say.
            Vector::GP | Vector::SS | Vector::AC => self.emulate_one(),
            Vector::UD => self.undefined(exception),
            vector => {
                events::mark_restart(&mut self.hw, vector);
                self.arch.events.raise(Exception {
                    // There are none in real mode.
                    error: None,
                    ..exception
                });
                Ok(Next::Guest)
            }
        }
    }
}
