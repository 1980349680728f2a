// SPDX-License-Identifier: GPL-2.0

//! KVM_CAP_SYNC_REGS: registers that KVM_RUN takes from `struct kvm_run` and leaves there, so that a
//! VMM saves ioctls.

use super::Locked;
use crate::backend::Loaded;
use crate::bindings::KVM_SYNC_X86_EVENTS;
use crate::bindings::KVM_SYNC_X86_REGS;
use crate::bindings::KVM_SYNC_X86_SREGS;
use crate::run_page::RunPages;
use kernel::prelude::*;

/// The sets of registers that there are.
pub(crate) const FIELDS: u64 =
    (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as u64;

impl<L: Loaded> Locked<'_, L> {
    /// Takes the sets that `kvm_dirty_regs` names, and strikes each off: EINVAL if there is no such
    /// set, also in `kvm_valid_regs`, or if one is refused. Those before it are taken then.
    #[cold]
    pub(super) fn take_synced(&mut self, page: &RunPages) -> Result {
        let dirty = page.dirty_regs();
        if (dirty | page.valid_regs()) & !FIELDS != 0 {
            return Err(EINVAL);
        }
        if dirty & u64::from(KVM_SYNC_X86_REGS) != 0 {
            self.set_regs(&page.synced_regs());
            page.strike_dirty_regs(KVM_SYNC_X86_REGS);
        }
        if dirty & u64::from(KVM_SYNC_X86_SREGS) != 0 {
            self.set_sregs(&page.synced_sregs())?;
            page.strike_dirty_regs(KVM_SYNC_X86_SREGS);
        }
        if dirty & u64::from(KVM_SYNC_X86_EVENTS) != 0 {
            self.set_events(&page.synced_events())?;
            page.strike_dirty_regs(KVM_SYNC_X86_EVENTS);
        }
        Ok(())
    }

    /// Leaves the sets that `kvm_valid_regs` names.
    #[cold]
    pub(super) fn leave_synced(&mut self, page: &RunPages) {
        let valid = page.valid_regs();
        if valid & u64::from(KVM_SYNC_X86_REGS) != 0 {
            page.set_synced_regs(self.get_regs());
        }
        if valid & u64::from(KVM_SYNC_X86_SREGS) != 0 {
            page.set_synced_sregs(self.get_sregs());
        }
        if valid & u64::from(KVM_SYNC_X86_EVENTS) != 0 {
            page.set_synced_events(self.get_events());
        }
    }
}
