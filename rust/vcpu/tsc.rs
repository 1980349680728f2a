// SPDX-License-Identifier: GPL-2.0

//! The time-stamp counter: KVM_SET_TSC_KHZ, and the vCPU's attributes, which are all about it.

use super::Locked;
use crate::abi::kvm_device_attr;
use crate::backend::Loaded;
use crate::bindings::KVM_VCPU_TSC_CTRL;
use crate::bindings::KVM_VCPU_TSC_OFFSET;
use crate::linux::user;
use crate::x86::apic::Effect;
use kernel::prelude::*;

/// KVM_HAS_DEVICE_ATTR: there is one, the offset; ENXIO for another.
pub(super) fn has_attr(attr: &kvm_device_attr) -> Result {
    if attr.group != KVM_VCPU_TSC_CTRL || attr.attr != u64::from(KVM_VCPU_TSC_OFFSET) {
        return Err(ENXIO);
    }
    Ok(())
}

impl<L: Loaded> Locked<'_, L> {
    /// KVM_GET_DEVICE_ATTR: what the guest's counter has more than the host's. ENXIO, EFAULT.
    pub(super) fn get_attr(&mut self, attr: &kvm_device_attr) -> Result {
        has_attr(attr)?;
        user::write(attr.addr as usize, &self.hw.tsc_offset())
    }

    /// KVM_SET_DEVICE_ATTR: as [`Locked::get_attr`]. IA32_TSC_ADJUST stays what it is.
    pub(super) fn set_attr(&mut self, attr: &kvm_device_attr) -> Result {
        has_attr(attr)?;
        let offset = user::read(attr.addr as usize)?;
        self.hw.set_tsc_offset(offset);
        // A deadline is one of the guest's counter.
        self.apply(Effect::Timer);
        // A deadline comes earlier or later now.
        self.apply(Effect::Timer);
        Ok(())
    }

    /// KVM_SET_TSC_KHZ: 0 stands for the host's frequency; EINVAL for another, as nothing scales.
    /// A difference of up to 250 ppm is none, as in KVM.
    pub(super) fn set_tsc_khz(&mut self, khz: usize) -> Result {
        let host = crate::linux::msr::tsc_khz();
        let khz = match khz as u32 {
            0 => host,
            khz => khz,
        };
        let tolerance = u64::from(host) * 250 / 1_000_000;
        if u64::from(khz.abs_diff(host)) > tolerance {
            return Err(EINVAL);
        }
        self.arch.tsc_khz = khz;
        Ok(())
    }
}
