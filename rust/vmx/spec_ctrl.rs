// SPDX-License-Identifier: GPL-2.0

//! IA32_SPEC_CTRL of a guest that wants one of its own.
//!
//! Until it first writes anything to it, a guest runs with the host's, and entries and exits do not know of the MSR. From then on the
//! processor switches it, by the areas of MSRs that it loads on an entry, and stores and loads on an exit (SDM vol. 3, 25.7.2 and
//! 25.8.2): so no instruction of the host's is ever executed, or speculated on, with the guest's value, and the guest writes the MSR
//! without an exit.

use super::fields as f;
use super::vcpu::LoadedVcpu;
use crate::bindings;
use crate::linux::irq::PreemptOff;
use crate::linux::page::KernelPage;
use crate::x86::msr::Msr;
use kernel::prelude::*;

/// Where in an entry of an area the value is; the number of the MSR is at its beginning.
const VALUE: usize = 8;
/// Where in the page the guest's entry is, loaded on entries and stored on exits, and the host's, loaded on exits.
const GUEST: usize = 0;
const HOST: usize = 16;

/// A guest's IA32_SPEC_CTRL.
pub(super) struct SpecCtrl {
    /// The areas, if it is switched. If not, it is zero.
    areas: Option<KernelPage>,
}

impl SpecCtrl {
    /// That of a guest which has not written it.
    pub(super) const fn new() -> Self {
        Self { areas: None }
    }

    /// Whether the guest has one of its own.
    pub(super) fn is_switched(&self) -> bool {
        self.areas.is_some()
    }

    /// The value.
    pub(super) fn value(&self) -> u64 {
        self.areas
            .as_ref()
            .map_or(0, |areas| areas.read(GUEST + VALUE))
    }
}

impl LoadedVcpu<'_> {
    /// Sets it: ENOMEM. The value is one that the processor takes.
    pub(super) fn set_spec_ctrl(&mut self, value: u64) -> Result {
        if let Some(areas) = &self.v.spec_ctrl.areas {
            areas.write(GUEST + VALUE, value);
            return Ok(());
        }
        if value == 0 {
            return Ok(());
        }
        let areas = KernelPage::new()?;
        areas.write(GUEST, Msr::SPEC_CTRL.0);
        areas.write(GUEST + VALUE, value);
        areas.write(HOST, Msr::SPEC_CTRL.0);
        let (guest, host) = (areas.phys() + GUEST as u64, areas.phys() + HOST as u64);
        self.write(f::ENTRY_MSR_LOAD_ADDRESS, guest);
        self.write(f::EXIT_MSR_STORE_ADDRESS, guest);
        self.write(f::EXIT_MSR_LOAD_ADDRESS, host);
        self.write(f::ENTRY_MSR_LOAD_COUNT, 1);
        self.write(f::EXIT_MSR_STORE_COUNT, 1);
        self.write(f::EXIT_MSR_LOAD_COUNT, 1);
        self.v.spec_ctrl.areas = Some(areas);
        Ok(())
    }

    /// The host's is whatever it is for this thread. Before entries, as it changes with the thread only.
    #[inline]
    pub(super) fn refresh_spec_ctrl(&mut self, _preempt: &PreemptOff) {
        if let Some(areas) = &self.v.spec_ctrl.areas {
            // SAFETY: Preemption is off.
            areas.write(HOST + VALUE, unsafe { bindings::rkvm_host_spec_ctrl() });
        }
    }
}
