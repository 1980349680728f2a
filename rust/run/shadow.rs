// SPDX-License-Identifier: GPL-2.0

//! Exits of guests whose page tables are shadowed.

use super::Next;
use super::Run;
use crate::backend::Loaded;
use crate::x86::exception::Fault;
use crate::x86::exception::PfError;
use kernel::prelude::*;

impl<L: Loaded> Run<'_, L> {
    /// A page fault: of our tables, or of the guest's.
    pub(super) fn guest_page_fault(&mut self, linear: u64, error: PfError) -> Result<Next> {
        self.raise(Fault::page(linear, error))
    }

    /// INVPCID, whose descriptor has been checked.
    pub(super) fn invalidate_pcid(&mut self, _kind: u64, _identifier: u64, _linear: u64) {
        self.hw.flush_guest_tlb();
    }

    /// The guest has changed what is at a linear address, and says so.
    pub(super) fn invalidate_page(&mut self, _linear: u64) {
        self.hw.flush_guest_tlb();
    }
}
