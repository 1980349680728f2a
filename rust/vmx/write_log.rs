// SPDX-License-Identifier: GPL-2.0

//! Page-modification logging: the processor writes the guest-physical address of each page whose EPT
//! dirty flag it sets to a page of the vCPU's, and exits when that is full (SDM vol. 3, 30.3.6).

use super::fields as f;
use super::fields::SecondaryControls;
use super::vcpu::LoadedVcpu;
use crate::linux::page::KernelPage;
use kernel::prelude::*;

/// Entries of the log.
const ENTRIES: u16 = 512;
/// The index where the processor starts; it counts down, and past 0 when the log is full.
const EMPTY: u16 = ENTRIES - 1;

/// A vCPU's log.
pub(super) struct WriteLog {
    page: KernelPage,
    on: bool,
}

impl WriteLog {
    /// An empty log, off: ENOMEM.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            page: KernelPage::new()?,
            on: false,
        })
    }
}

impl LoadedVcpu<'_> {
    /// Tells the processor where the log is.
    pub(super) fn initialise_write_log(&mut self) {
        if let Some(log) = &self.v.write_log {
            let address = log.page.phys();
            self.write(f::PML_ADDRESS, address);
            self.write(f::PML_INDEX, EMPTY);
        }
    }

    /// Turns the log on or off, if there is one. It is empty.
    pub(super) fn set_write_logging(&mut self, on: bool) {
        let Some(log) = &mut self.v.write_log else {
            return;
        };
        if log.on == on {
            return;
        }
        log.on = on;
        let secondary = self.v.secondary.without(SecondaryControls::PML);
        self.v.secondary = secondary.with_if(SecondaryControls::PML, on);
        self.write(f::SECONDARY_CONTROLS, self.v.secondary.bits());
    }

    /// Returns if there is something in the log.
    #[inline]
    pub(super) fn has_logged_writes(&self) -> bool {
        match &self.v.write_log {
            Some(log) => log.on && self.read(f::PML_INDEX) != EMPTY,
            None => false,
        }
    }

    /// Empties the log.
    pub(super) fn take_logged_writes(&mut self, mut f: impl FnMut(u64)) {
        let Some(log) = &self.v.write_log else { return };
        // The next one to be written; 0xffff, past 0, if the log is full.
        let index = self.read(f::PML_INDEX);
        for entry in index.wrapping_add(1)..ENTRIES {
            f(log.page.read(usize::from(entry) * size_of::<u64>()));
        }
        self.write(f::PML_INDEX, EMPTY);
    }
}
