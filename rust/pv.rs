// SPDX-License-Identifier: GPL-2.0

//! What a guest that knows KVM has asked its vCPU for: the state behind KVM's own MSRs. What an MSR does is in
//! [`crate::run::pv`], how CPUID tells of it in [`crate::x86::pv`].

pub(crate) mod eoi;
pub(crate) mod steal;

use crate::arch::Cpuid;
use crate::linux::task;
use crate::x86::cpuid::CpuidEntry;
use crate::x86::pv;
use crate::x86::pv::PvFeatures;
use eoi::PvEoi;
use steal::StealTime;

/// What guests are told of, by KVM_GET_SUPPORTED_CPUID.
pub(crate) fn supported() -> PvFeatures {
    (PvFeatures::NOP_IO_DELAY
        | PvFeatures::CLOCKSOURCE
        | PvFeatures::CLOCKSOURCE2
        | PvFeatures::CLOCKSOURCE_STABLE_BIT
        | PvFeatures::PV_EOI
        | PvFeatures::PV_UNHALT
        | PvFeatures::PV_TLB_FLUSH
        | PvFeatures::PV_SEND_IPI
        | PvFeatures::POLL_CONTROL
        | PvFeatures::PV_SCHED_YIELD)
        .with_if(PvFeatures::STEAL_TIME, task::delays_are_counted())
}

/// The paravirtual state of a vCPU.
pub(crate) struct PvState {
    /// What CPUID tells the guest.
    features: PvFeatures,
    /// What it does not tell, the guest has not got (KVM_CAP_ENFORCE_PV_FEATURE_CPUID).
    enforced: bool,
    /// HLT does not exit, so nobody can be woken from it.
    pub(crate) halts_freely: bool,
    /// Another vCPU has woken this one from its next HLT, or the one that it is in.
    pub(crate) unhalted: bool,
    /// MSR_KVM_POLL_CONTROL: whether the host may poll when the vCPU halts.
    pub(crate) host_polls: bool,
    pub(crate) steal: StealTime,
    pub(crate) eoi: PvEoi,
}

impl PvState {
    /// The state after power-up.
    pub(crate) fn new() -> Self {
        Self {
            features: PvFeatures::empty(),
            enforced: false,
            halts_freely: false,
            unhalted: false,
            host_polls: true,
            steal: StealTime::new(),
            eoi: PvEoi::new(),
        }
    }

    /// INIT: who comes next in the guest has asked for nothing.
    pub(crate) fn reset(&mut self) {
        self.unhalted = false;
        self.steal.set(0);
        self.eoi = PvEoi::new();
    }

    /// Whether the guest can have a feature: unless the VMM wants it so, whatever CPUID says.
    #[inline]
    pub(crate) fn has(&self, feature: PvFeatures) -> bool {
        !self.enforced || self.features.has(feature)
    }

    /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    pub(crate) fn enforce(&mut self, on: bool) {
        self.enforced = on;
    }

    /// Takes out of a new CPUID what cannot be, and returns which features that leaves.
    pub(crate) fn adapt(&self, cpuid: &mut Cpuid) -> PvFeatures {
        let leaf = pv::features_leaf(|leaf| cpuid.find(leaf, 0).map(CpuidEntry::regs));
        let Some(entry) = leaf.and_then(|leaf| cpuid.find_mut(leaf, 0)) else {
            return PvFeatures::empty();
        };
        let mut features = PvFeatures::new(entry.eax);
        if self.halts_freely {
            features = features.without(PvFeatures::PV_UNHALT);
        }
        entry.eax = features.bits();
        features
    }

    /// The guest has a new CPUID.
    pub(crate) fn set_features(&mut self, features: PvFeatures) {
        self.features = features;
    }
}
