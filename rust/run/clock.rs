// SPDX-License-Identifier: GPL-2.0

//! The guest's time while it runs: what requests and a change of CPU ask for.

use super::Run;
use crate::backend::Loaded;
use crate::linux::clock;
use crate::tlb::Request;
use crate::x86::apic::Effect;

impl<L: Loaded> Run<'_, L> {
    /// The vCPU has come to another CPU. With preemption off.
    #[cold]
    #[inline(never)]
    pub(super) fn moved(&mut self) {
        if !clock::tsc_is_stable() {
            self.arch.clock.cross_cpus(&mut self.hw);
            // A deadline was one of the other CPU's counter.
            if self.arch.apic.is_some() {
                self.shared.request(Request::Timer);
            }
        }
        if self.arch.clock.moved() {
            self.shared.request(Request::Clock);
        }
    }

    /// Tells the guest the time, if that was asked for. Sleeps.
    pub(super) fn update_clock(&mut self) {
        if !self.shared.take(Request::Clock) {
            return;
        }
        if self.arch.clock.catch_up(&mut self.hw) {
            self.apply(Effect::Timer);
        }
        let tsc = self.hw.tsc();
        self.arch.clock.tell(tsc, self.memory, self.shared);
    }
}
