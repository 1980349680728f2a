// SPDX-License-Identifier: GPL-2.0

//! KVM_SET_CPUID2 and KVM_GET_CPUID2, and KVM_ENABLE_CAP for what goes by CPUID.

use super::Locked;
use crate::abi::kvm_cpuid2;
use crate::abi::kvm_cpuid_entry2;
use crate::abi::kvm_enable_cap;
use crate::arch::Cpuid;
use crate::backend::Loaded;
use crate::bindings::KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
use crate::linux::user;
use crate::system::as_abi;
use crate::x86::cpuid::features::GuestFeatures;
use crate::x86::cpuid::CpuidEntry;
use crate::x86::cpuid::MAX_ENTRIES;
use kernel::prelude::*;

impl<L: Loaded> Locked<'_, L> {
    /// KVM_SET_CPUID2: E2BIG for too many entries; EINVAL for a change after the guest has run.
    pub(super) fn set_cpuid(&mut self, arg: usize) -> Result {
        let count = user::read::<kvm_cpuid2>(arg)?.nent as usize;
        if count > MAX_ENTRIES {
            return Err(E2BIG);
        }
        let given: KVVec<kvm_cpuid_entry2> =
            user::read_array(arg.wrapping_add(size_of::<kvm_cpuid2>()), count)?;
        let mut entries = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
        for e in &given {
            let entry = CpuidEntry {
                function: e.function,
                index: e.index,
                flags: e.flags,
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
                padding: [0; 3],
            };
            entries.push(entry, GFP_KERNEL_ACCOUNT)?;
        }
        let mut cpuid = KBox::new(Cpuid::new(entries).map_err(|_| EINVAL)?, GFP_KERNEL_ACCOUNT)?;
        let features = GuestFeatures::derive(|function, index| {
            cpuid.find(function, index).map(CpuidEntry::regs)
        });

        let pv_features = self.arch.pv.adapt(&mut cpuid);
        let cr4 = self.hw.cr4();
        core::mem::swap(&mut self.arch.cpuid, &mut cpuid);
        self.arch.refresh_cpuid(self.host, self.around.options, cr4);
        if self.arch.has_run && self.arch.cpuid.entries() != cpuid.entries() {
            core::mem::swap(&mut self.arch.cpuid, &mut cpuid);
            return Err(EINVAL);
        }
        // What the VMM promises and the host has not got stays out of the registers.
        self.arch.features = features.limited_to(&self.host.supported);
        self.arch.pv.set_features(pv_features);
        self.configure_apic();
        Ok(())
    }

    /// KVM_ENABLE_CAP of a vCPU: EINVAL for what cannot be enabled, or not so.
    pub(super) fn enable_cap(&mut self, cap: &kvm_enable_cap) -> Result {
        match cap.cap {
            KVM_CAP_ENFORCE_PV_FEATURE_CPUID if cap.flags == 0 => {
                self.arch.pv.enforce(cap.args[0] != 0);
                Ok(())
            }
            _ => Err(EINVAL),
        }
    }

    /// KVM_GET_CPUID2: E2BIG if there is no room; the count is then left alone.
    pub(super) fn get_cpuid(&mut self, arg: usize) -> Result {
        let room = user::read::<kvm_cpuid2>(arg)?.nent as usize;
        let entries = as_abi(self.arch.cpuid.entries())?;
        if room < entries.len() {
            return Err(E2BIG);
        }
        user::write_array(arg.wrapping_add(size_of::<kvm_cpuid2>()), &entries)?;
        user::write(arg, &(entries.len() as u32))
    }
}
