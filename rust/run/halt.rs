// SPDX-License-Identifier: GPL-2.0

//! vCPUs that do not run: halted, or waiting to be started (KVM API, KVM_GET_MP_STATE). And what wakes
//! them: interrupts, INIT, SIPI (SDM vol. 3, 9.4 and 12.6.1).

use super::apic::apply;
use super::apic::clock;
use super::apic::Around;
use super::apic::Controllers;
use super::Next;
use super::Run;
use crate::abi;
use crate::arch;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::bindings::KVM_MP_STATE_AP_RESET_HOLD as AP_RESET_HOLD;
use crate::bindings::KVM_MP_STATE_HALTED as HALTED;
use crate::bindings::KVM_MP_STATE_INIT_RECEIVED as INIT_RECEIVED;
use crate::bindings::KVM_MP_STATE_RUNNABLE as RUNNABLE;
use crate::bindings::KVM_MP_STATE_UNINITIALIZED as UNINITIALIZED;
use crate::events;
use crate::linux::hrtimer;
use crate::linux::task;
use crate::tlb::Request;
use crate::x86::apic::base::Role;
use crate::x86::apic::events::ApicEvent;
use crate::x86::apic::events::ApicEvents;
use crate::x86::apic::events::Startup;
use crate::x86::apic::regs::Esr;
use crate::x86::apic::regs::LvtEntry;
use crate::x86::apic::view::Delivered;
use crate::x86::apic::Effect;
use crate::x86::apic::Reset;
use crate::x86::event::InterruptSource;
use crate::x86::event::Shadow;
use crate::x86::segment::SegReg;
use kernel::prelude::*;

impl<L: Loaded> Run<'_, L> {
    /// HLT, an instruction of `len` bytes.
    pub(super) fn halt(&mut self, len: u8) -> Result<Next> {
        self.shared.stats.halt_exits.bump();
        super::skip(&mut self.hw, len);
        if self.arch.apic.is_none() {
            // Only the VMM knows what may wake the vCPU.
            self.page.set_exit_reason(abi::exit::HLT);
            return Ok(Next::User);
        }
        self.arch.mp_state = HALTED;
        Ok(Next::Guest)
    }

    /// KVM_RUN of a vCPU that was never started: waits for something to come, and has the VMM call
    /// again (EAGAIN), as KVM does.
    pub(super) fn wait_for_startup(&mut self) -> Result {
        if self.page.immediate_exit() {
            return Err(EINTR);
        }
        self.sleep();
        self.take_apic_requests();
        self.update_structures();
        if task::signal_pending() {
            self.page.set_exit_reason(abi::exit::INTR);
            self.shared.stats.signal_exits.bump();
            return Err(EINTR);
        }
        Err(EAGAIN)
    }

    /// Waits for a request that wakes the vCPU, or a signal.
    pub(super) fn sleep(&mut self) {
        let clock = clock(&mut self.hw);
        let by_hardware = self.hw.has_timer();
        if let Some(apic) = self.arch.apic.as_deref_mut().filter(|_| by_hardware) {
            apic.arm_timer(&clock);
        }
        if self.arch.mp_state != HALTED || !self.poll() {
            let begin = hrtimer::now();
            self.shared.sleep();
            self.shared.stats.halt_wakeup.bump();
            let slept = hrtimer::now().saturating_sub(begin);
            self.arch.poll = self.arch.poll.after_sleep(slept);
        }
        if let Some(apic) = self.arch.apic.as_deref_mut().filter(|_| by_hardware) {
            apic.disarm_timer();
        }
    }

    /// Waits for a while without giving up the CPU: returns if something came.
    fn poll(&mut self) -> bool {
        let limit = self.arch.poll.ns();
        if limit == 0 || !self.arch.pv.host_polls {
            return false;
        }
        self.shared.stats.halt_attempted_poll.bump();
        let end = hrtimer::now().saturating_add(limit);
        loop {
            if self.shared.has_reason_to_wake() {
                self.shared.stats.halt_successful_poll.bump();
                return true;
            }
            if task::should_stop_polling() || hrtimer::now() >= end {
                return false;
            }
            core::hint::spin_loop();
        }
    }

    /// Looks what has come for the APIC, and returns if the vCPU runs.
    pub(super) fn attend(&mut self) -> bool {
        if self.shared.pending() {
            let between = self.watch.hold();
            self.take_apic_requests();
            self.update_structures();
            self.watch.set_between(between);
        }
        if matches!(self.arch.mp_state, HALTED | AP_RESET_HOLD) && self.has_reason_to_run() {
            self.arch.mp_state = RUNNABLE;
        }
        self.arch.mp_state == RUNNABLE
    }

    /// Whether something can be delivered that ends a HLT.
    fn has_reason_to_run(&mut self) -> bool {
        let masked = self.hw.nmi_blocked();
        self.arch.events.set_nmi_masked(masked);
        let gate = events::gate(&mut self.hw);
        if core::mem::take(&mut self.arch.pv.unhalted) {
            return true;
        }
        if self.arch.events.has_deliverable(gate) {
            return true;
        }
        if !gate.interrupts_enabled || gate.shadow != Shadow::None {
            return false;
        }
        if self.virtual_interrupt_waits() {
            return true;
        }
        let mut controllers = Controllers {
            apic: self.arch.apic.as_deref_mut(),
            irqs: self.irqs,
        };
        controllers.waits()
    }

    /// Whether there is an interrupt that the processor would deliver by itself.
    fn virtual_interrupt_waits(&mut self) -> bool {
        let Some(apic) = self
            .arch
            .apic
            .as_deref_mut()
            .filter(|apic| apic.can_virtualise())
        else {
            return false;
        };
        self.shared.order_after_exit();
        if let Some(shared) = self.shared.apic().filter(|shared| shared.has_posted()) {
            shared.take_posted();
            apic.recheck = true;
        }
        apic.model.pending_interrupt().is_some()
    }

    fn take_apic_requests(&mut self) {
        let shared = self.shared;
        if shared.take(Request::ApicEvents) {
            let around = self.around();
            accept_events(&mut self.hw, self.arch, &around);
        }
        if shared.take(Request::Timer) {
            self.run_timer();
        }
        if shared.take(Request::Unhalt) {
            self.arch.pv.unhalted = true;
        }
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return;
        };
        if shared.take(Request::Interrupts) {
            apic.recheck = true;
        }
        if shared.take(Request::Watchdog) {
            if let Delivered::Event(ApicEvent::Nmi) = apic.model.deliver_local(LvtEntry::Lint0) {
                self.arch.events.queue_nmi();
            }
        }
        if shared.take(Request::EoiVectors) {
            let identity = apic.model.view().identity();
            apic.eoi_vectors = self
                .irqs
                .eoi_vectors(&identity, &|vector| apic.model.holds(vector));
            self.hw.set_eoi_exits(&apic.eoi_vectors);
        }
    }
}

/// Takes what others have sent to the APIC besides vectors.
pub(crate) fn accept_events(hw: &mut impl Loaded, arch: &mut Arch, around: &Around<'_>) {
    let Some(shared) = around.shared.apic() else {
        return;
    };
    let mut events = shared.take_events();
    loop {
        let startup = if arch.mp_state == INIT_RECEIVED {
            Startup::WaitsForSipi
        } else {
            Startup::Started
        };
        let (rest, event) = events.take_startup(startup);
        events = rest;
        match event {
            Some(ApicEvent::Init) => init(hw, arch, around),
            Some(ApicEvent::Sipi { vector }) => start(hw, arch, vector),
            _ => break,
        }
    }
    if events.has(ApicEvents::NMI) {
        let masked = hw.nmi_blocked();
        arch.events.set_nmi_masked(masked);
        arch.events.queue_nmi();
    }
    if events.has(ApicEvents::ILLEGAL_VECTOR) {
        if let Some(apic) = arch.apic.as_deref_mut() {
            apic.model.log_error(Esr::RECEIVE_ILLEGAL_VECTOR);
            apic.recheck = true;
        }
    }
    // There is no system-management mode, and a message for the interrupt controller outside comes by
    // its own way.
}

/// INIT: the vCPU is reset, but for what survives that; it waits for a SIPI, unless it is the one that
/// starts the machine.
fn init(hw: &mut impl Loaded, arch: &mut Arch, around: &Around<'_>) {
    arch::init(hw, arch);
    around.shared.request(Request::Structures);
    let Some(apic) = arch.apic.as_deref_mut() else {
        return;
    };
    apic.take_posted();
    apic.model.reset(Reset::Init);
    apic.extint = None;
    arch.mp_state = match apic.model.config().role {
        Role::Bootstrap => RUNNABLE,
        Role::Application => INIT_RECEIVED,
    };
    apply(hw, arch, around, Effect::Identity);
}

/// A SIPI: the vCPU begins at the page that its vector names.
fn start(hw: &mut impl Loaded, arch: &mut Arch, vector: u8) {
    let mut cs = hw.segment(SegReg::Cs);
    cs.selector = u16::from(vector) << 8;
    cs.base = u64::from(vector) << 12;
    hw.set_segment(SegReg::Cs, &cs);
    hw.set_rip(0);
    arch.mp_state = RUNNABLE;
}

/// For how long a halted vCPU waits without giving up its CPU, in nanoseconds: longer if it was too
/// short for what came soon after, not at all if nothing comes soon.
#[derive(Clone, Copy, Default)]
pub(crate) struct Poll(u32);

impl Poll {
    const FIRST: u32 = 10_000;

    const fn ns(self) -> u64 {
        self.0 as u64
    }

    /// What it is after a sleep of so many nanoseconds.
    fn after_sleep(self, slept: u64) -> Self {
        let limit = crate::parameters::halt_poll_ns();
        Self(if slept > limit.into() {
            0
        } else {
            self.0.saturating_mul(2).max(Self::FIRST).min(limit)
        })
    }
}

/// Whether a vCPU of this state has not been started yet.
pub(super) fn is_uninitialised(mp_state: u32) -> bool {
    mp_state == UNINITIALIZED
}
