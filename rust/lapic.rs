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
use crate::x86::apic::timer::Clock;
use crate::x86::apic::timer::Deadline;
use crate::x86::apic::timer::Expiry;
use crate::x86::apic::view::Delivered;
use crate::x86::apic::Apic;
use crate::x86::apic::Config;
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
    /// What the guest's time-stamp counter adds to the host's.
    pub(crate) tsc_offset: u64,
}

impl Clock for GuestClock {
    fn ns(&self) -> u64 {
        hrtimer::now()
    }

    #[inline]
    fn tsc(&self) -> u64 {
        host_msr::rdtsc().wrapping_add(self.tsc_offset)
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
    timer: HrTimer<WakeUp>,
    /// The timer of the host is armed.
    armed: bool,
    /// [`Model::pending_interrupt`] may be other than it was when it was last none.
    pub(crate) recheck: bool,
    /// The vectors whose ends the I/O APICs want to know of.
    pub(crate) eoi_vectors: [u64; 4],
    /// What the VMM's interrupt controller has left by KVM_INTERRUPT.
    pub(crate) extint: Option<u8>,
}

impl LocalApic {
    /// An APIC after power-up: ENOMEM.
    pub(crate) fn new(
        registers: Arc<Registers>,
        config: Config,
        shared: Arc<VcpuShared>,
    ) -> Result<Self> {
        Ok(Self {
            model: Apic::new(registers, config),
            timer: HrTimer::new(WakeUp(shared))?,
            armed: false,
            recheck: true,
            eoi_vectors: [0; 4],
            extint: None,
        })
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

    /// Whether the end of a vector is to be told to the I/O APICs.
    pub(crate) fn tells_eoi(&self, vector: u8) -> bool {
        self.eoi_vectors
            .get(usize::from(vector >> 6))
            .is_some_and(|word| word & (1 << (vector & 63)) != 0)
    }

    /// The timer's interrupt, if it is time for it. What is no vector is left to the caller.
    pub(crate) fn run_timer(&mut self, clock: &GuestClock) -> Delivered {
        let (expiry, delivered) = self.model.run_timer(clock);
        if let Expiry::Fired { .. } = expiry {
            self.recheck = true;
        }
        delivered
    }

    /// When the timer goes off next, in nanoseconds of CLOCK_MONOTONIC; none if it is not armed.
    fn expires_ns(&self, clock: &GuestClock, tsc_khz: u32) -> Option<u64> {
        match self.model.timer().next_expiry()? {
            Deadline::Ns(ns) => Some(ns),
            Deadline::Tsc(tsc) => {
                let ticks = tsc.saturating_sub(clock.tsc());
                let khz = u128::from(tsc_khz.max(1));
                let ns = u128::from(ticks).saturating_mul(1_000_000) / khz;
                Some(hrtimer::now().saturating_add(u64::try_from(ns).unwrap_or(u64::MAX)))
            }
        }
    }

    /// Arms the host's timer for the next expiry, or stops it.
    pub(crate) fn arm_timer(&mut self, clock: &GuestClock, tsc_khz: u32) {
        match self.expires_ns(clock, tsc_khz) {
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
