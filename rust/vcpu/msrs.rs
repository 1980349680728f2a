// SPDX-License-Identifier: GPL-2.0

//! KVM_GET_MSRS and KVM_SET_MSRS.

use super::Locked;
use crate::abi::kvm_msrs;
use crate::abi::read_msr_entries;
use crate::backend::Loaded;
use crate::linux::user;
use crate::run::msr;
use crate::x86::msr::Msr;
use kernel::prelude::*;

impl<L: Loaded> Locked<'_, L> {
    /// Reads MSRs until one is refused; returns how many there were.
    pub(super) fn get_msrs(&mut self, arg: usize) -> Result<isize> {
        let mut entries = read_msr_entries(arg)?;
        let mut done = 0;
        for entry in &mut entries {
            match msr::read(self.hw, self.arch, Msr(entry.index), true) {
                Ok(value) => entry.data = value,
                Err(_) => break,
            }
            done += 1;
        }
        user::write_array(arg.wrapping_add(size_of::<kvm_msrs>()), &entries)?;
        Ok(done)
    }

    /// Writes MSRs until one is refused; returns how many there were.
    pub(super) fn set_msrs(&mut self, arg: usize) -> Result<isize> {
        let entries = read_msr_entries(arg)?;
        let mut done = 0;
        for entry in &entries {
            let msr = Msr(entry.index);
            match msr::write(self.hw, self.arch, &self.around, msr, entry.data, true) {
                Ok(effect) => self.apply(effect),
                Err(_) => break,
            }
            done += 1;
        }
        Ok(done)
    }
}
