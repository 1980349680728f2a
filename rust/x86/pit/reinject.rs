// SPDX-License-Identifier: GPL-2.0

//! What becomes of timer interrupts that the guest is too slow for.
//!
//! A vCPU that the host does not run misses ticks. A guest that keeps time by counting them wants each: then one is only sent
//! when the one before was acknowledged, and what came meanwhile is sent after. Others lose them (KVM_REINJECT_CONTROL).

/// What to do with ticks that the guest has not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Send them later.
    Reinject,
    /// Lose them.
    Discard,
}

/// Whether to pulse the timer's interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Tick {
    /// Do.
    Pulse,
    /// Do not.
    Hold,
}

/// The ticks that are on their way.
///
/// # Invariants
///
/// Without [`Policy::Reinject`] none is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reinject {
    policy: Policy,
    /// Ticks that were not acknowledged, with the one that was sent.
    pending: u32,
    /// One was sent and not acknowledged.
    in_flight: bool,
}

impl Default for Reinject {
    fn default() -> Self {
        Self::new()
    }
}

impl Reinject {
    /// With [`Policy::Reinject`], as after KVM_CREATE_PIT2.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            policy: Policy::Reinject,
            pending: 0,
            in_flight: false,
        }
    }

    /// What is done with ticks that the guest has not taken. With [`Policy::Reinject`] its acknowledgements have to be
    /// reported, from the I/O APIC and the PIC.
    #[must_use]
    pub const fn policy(&self) -> Policy {
        self.policy
    }

    /// How many ticks the guest has yet to acknowledge.
    #[must_use]
    pub const fn pending(&self) -> u32 {
        self.pending
    }

    /// Changes the policy (KVM_REINJECT_CONTROL).
    pub fn set_policy(&mut self, policy: Policy) {
        if policy != self.policy {
            self.policy = policy;
            self.reset();
        }
    }

    /// Forgets every tick: the timer was programmed anew, or the guest has unmasked its input.
    pub fn reset(&mut self) {
        self.pending = 0;
        self.in_flight = false;
    }

    /// The timer expired, `times` times since this was last said.
    pub fn expired(&mut self, times: u64) -> Tick {
        match self.policy {
            _ if times == 0 => Tick::Hold,
            Policy::Discard => Tick::Pulse,
            Policy::Reinject => {
                let times = u32::try_from(times).unwrap_or(u32::MAX);
                self.pending = self.pending.saturating_add(times);
                self.send()
            }
        }
    }

    /// The guest acknowledged the interrupt: with an EOI, or in the PIC.
    pub fn acknowledged(&mut self) -> Tick {
        if self.policy == Policy::Discard {
            return Tick::Hold;
        }
        self.in_flight = false;
        self.pending = self.pending.saturating_sub(1);
        if self.pending == 0 {
            Tick::Hold
        } else {
            self.send()
        }
    }

    fn send(&mut self) -> Tick {
        if core::mem::replace(&mut self.in_flight, true) {
            Tick::Hold
        } else {
            Tick::Pulse
        }
    }
}
