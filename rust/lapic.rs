// SPDX-License-Identifier: GPL-2.0

//! The local APIC of a vCPU, as the vCPU has it: the model ([`crate::x86::apic`]) with a clock and
//! something to be woken by.
//!
//! It is guarded by the vCPU's mutex. What others reach is in [`crate::apics`].

use crate::apics::Registers;
use crate::linux::hrtimer;
use crate::linux::hrtimer::HrTimer;
use crate::linux::hrtimer::OnExpiry;
use crate::linux::msr as host_msr;
use crate::tlb::Request;
use crate::tlb::VcpuShared;
use crate::x86::apic::base::ApicMode;
use crate::x86::apic::base::DEFAULT_ADDRESS;
use crate::x86::apic::map::Software;
use crate::x86::apic::message::IdFormat;
use crate::x86::apic::message::Identity;
use crate::x86::apic::timer::Clock;
use crate::x86::apic::timer::Deadline;
use crate::x86::apic::timer::Expiry;
use crate::x86::apic::timer::TimerMode;
use crate::x86::apic::view::Delivered;
use crate::x86::apic::Apic;
use crate::x86::apic::Config;
use crate::x86::clock::tsc::GuestTsc;
use kernel::prelude::*;
use kernel::sync::Arc;

/// The model, on registers that others share.
pub(crate) type Model = Apic<Arc<Registers>>;

/// The least period of a timer that goes on by itself, in nanoseconds: a guest shall not keep the host
/// busy with it.
const MIN_PERIOD: u64 = 200_000;

/// The clocks of an APIC's timer, read when they are asked.
#[derive(Clone, Copy)]
pub(crate) struct GuestClock {
    /// The guest's time-stamp counter.
    pub(crate) tsc: GuestTsc,
}

impl Clock for GuestClock {
    fn ns(&self) -> u64 {
        hrtimer::now()
    }

    #[inline]
    fn tsc(&self) -> u64 {
        self.tsc.at(host_msr::rdtsc())
    }
}

/// Tells a vCPU that its timer has expired.
struct WakeUp(Arc<VcpuShared>);

impl OnExpiry for WakeUp {
    fn expired(&self, _now_ns: u64) -> Option<u64> {
        self.0.request_and_kick(Request::Timer);
        None
    }
}

/// The local APIC of a vCPU.
pub(crate) struct LocalApic {
    pub(crate) model: Model,
    registers: Arc<Registers>,
    timer: HrTimer<WakeUp>,
    /// The timer of the host is armed.
    armed: bool,
    /// When the timer that goes on by itself last went off, in nanoseconds of CLOCK_MONOTONIC.
    last_expiry: u64,
    /// The processor delivers interrupts by itself.
    pub(crate) virtualised: bool,
    /// It would, if nobody had asked it not to: what comes is posted for it.
    posted: bool,
    /// [`Model::pending_interrupt`] may be other than it was when it was last none.
    pub(crate) recheck: bool,
    /// The vectors whose ends the I/O APICs want to know of.
    pub(crate) eoi_vectors: [u64; 4],
    /// What the VMM's interrupt controller has left by KVM_INTERRUPT.
    pub(crate) extint: Option<u8>,
    /// A vector whose end the VMM's I/O APIC is to be told of.
    pub(crate) ioapic_eoi: Option<u8>,
    /// What the map of all APICs was last made with.
    known: Option<(Identity, Software)>,
}

impl LocalApic {
    /// An APIC after power-up: ENOMEM.
    pub(crate) fn new(
        registers: Arc<Registers>,
        config: Config,
        shared: Arc<VcpuShared>,
        virtualised: bool,
    ) -> Result<Self> {
        Ok(Self {
            model: Apic::new(registers.clone(), config),
            registers,
            timer: HrTimer::new(WakeUp(shared))?,
            armed: false,
            last_expiry: 0,
            virtualised,
            posted: virtualised,
            recheck: true,
            eoi_vectors: [0; 4],
            extint: None,
            ioapic_eoi: None,
            known: None,
        })
    }

    /// Whether the guest reaches it by the page at the default address, and the processor answers there.
    pub(crate) fn shows_page(&self) -> bool {
        let base = self.model.base();
        self.virtualised && base.mode() == ApicMode::Xapic && base.address() == DEFAULT_ADDRESS
    }

    /// Whether interrupts are posted for the processor, which delivers them unless that is inhibited.
    pub(crate) fn can_virtualise(&self) -> bool {
        self.posted
    }

    /// Has the processor deliver none of the interrupts for a while, or again.
    pub(crate) fn inhibit(&mut self, inhibited: bool) {
        self.take_posted();
        self.virtualised = self.posted && !inhibited;
        self.recheck = true;
    }

    /// Moves what has been posted for the processor to the request register.
    pub(crate) fn take_posted(&mut self) {
        if self.posted {
            self.registers.take_posted();
            self.recheck = true;
        }
    }

    /// The interrupt that the processor would take, if there is one that its priority lets through.
    #[inline]
    pub(crate) fn pending_interrupt(&mut self) -> Option<u8> {
        if !self.recheck {
            return None;
        }
        let pending = self.model.pending_interrupt();
        // Until something changes, it stays so.
        self.recheck = pending.is_some();
        pending
    }

    /// The class that the task priority has to sink below for an interrupt to be let through; 0 if there is
    /// none that it holds back.
    pub(crate) fn priority_threshold(&self) -> u8 {
        let class = self.model.highest_requested().unwrap_or(0) >> 4;
        if class <= self.model.cr8() {
            class
        } else {
            0
        }
    }

    /// Whether what it answers to is other than it was when this was last asked.
    pub(crate) fn identity_changed(&mut self, ids: IdFormat) -> bool {
        let view = self.model.view();
        let identity = Identity {
            ids,
            ..view.identity()
        };
        let now = Some((identity, view.software()));
        core::mem::replace(&mut self.known, now) != now
    }

    /// Whether the end of a vector is to be told to the I/O APICs.
    pub(crate) fn tells_eoi(&self, vector: u8) -> bool {
        self.eoi_vectors
            .get(usize::from(vector >> 6))
            .is_some_and(|word| word & (1 << (vector & 63)) != 0)
    }

    /// The timer's interrupt, if it is time for it. What is no vector is left to the caller.
    pub(crate) fn run_timer(&mut self, clock: &GuestClock) -> Delivered {
        let (expiry, delivered) = self.model.run_timer(clock);
        if let Expiry::Fired { next } = expiry {
            if next.is_some() {
                self.last_expiry = hrtimer::now();
            }
            self.recheck = true;
        }
        delivered
    }

    /// When the timer goes off next, by the host's time-stamp counter; none if it is not armed.
    pub(crate) fn expires_tsc(&self, clock: &GuestClock) -> Option<u64> {
        match self.model.timer().next_expiry()? {
            Deadline::Tsc(tsc) => {
                // A deadline that has passed must not be taken for one at the counter's other end.
                let ticks = tsc.saturating_sub(clock.tsc());
                let ticks = clock.tsc.scale.host_ticks(ticks);
                Some(host_msr::rdtsc().saturating_add(ticks))
            }
            Deadline::Ns(_) => {
                let left = self.expires_ns(clock)?.saturating_sub(hrtimer::now());
                Some(host_msr::rdtsc().saturating_add(clock.tsc.scale.ns_to_host_ticks(left)))
            }
        }
    }

    /// When the timer goes off next, in nanoseconds of CLOCK_MONOTONIC; none if it is not armed.
    fn expires_ns(&self, clock: &GuestClock) -> Option<u64> {
        match self.model.timer().next_expiry()? {
            Deadline::Ns(ns) if self.model.timer().mode() == TimerMode::Periodic => {
                Some(ns.max(self.last_expiry.saturating_add(MIN_PERIOD)))
            }
            Deadline::Ns(ns) => Some(ns),
            Deadline::Tsc(tsc) => {
                let ticks = tsc.saturating_sub(clock.tsc());
                let ns = clock.tsc.scale.guest_ticks_to_ns(ticks);
                Some(hrtimer::now().saturating_add(ns))
            }
        }
    }

    /// Arms the host's timer for the next expiry, or stops it.
    pub(crate) fn arm_timer(&mut self, clock: &GuestClock) {
        match self.expires_ns(clock) {
            Some(ns) => {
                self.timer.arm(ns);
                self.armed = true;
            }
            None => self.disarm_timer(),
        }
    }

    /// Stops the host's timer.
    pub(crate) fn disarm_timer(&mut self) {
        if self.armed {
            self.timer.cancel();
            self.armed = false;
        }
    }
}
