// SPDX-License-Identifier: GPL-2.0

//! The time-stamp counter: KVM_SET_TSC_KHZ, and the vCPU's attributes, which are all about it. And
//! KVM_KVMCLOCK_CTRL.

use super::Locked;
use crate::abi::kvm_device_attr;
use crate::backend::Loaded;
use crate::bindings::KVM_VCPU_TSC_CTRL;
use crate::bindings::KVM_VCPU_TSC_OFFSET;
use crate::linux::user;
use crate::tlb::Request;
use crate::vm::tsc_khz;
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
    /// The vCPU has just been made.
    pub(super) fn begin_tsc(&mut self) {
        self.arch.clock.begin(self.hw, self.host.tsc_scaling);
    }

    /// The host's counter may have begun anew since the vCPU was last loaded.
    #[inline]
    pub(super) fn follow_host_tsc(&mut self) {
        if self.arch.clock.is_behind_host() {
            self.arch.clock.follow_host(self.hw);
            self.tsc_moved();
        }
    }

    /// What goes by the counter has to be looked at.
    #[cold]
    fn tsc_moved(&mut self) {
        self.around.shared.request(Request::Clock);
        // A deadline is one of the guest's counter: it comes earlier or later now.
        self.apply(Effect::Timer);
    }

    /// KVM_GET_DEVICE_ATTR: what the guest's counter has more than the host's. ENXIO, EFAULT.
    pub(super) fn get_attr(&mut self, attr: &kvm_device_attr) -> Result {
        has_attr(attr)?;
        user::write(attr.addr as usize, &self.hw.tsc().offset)
    }

    /// KVM_SET_DEVICE_ATTR: as [`Locked::get_attr`]. IA32_TSC_ADJUST stays what it is.
    pub(super) fn set_attr(&mut self, attr: &kvm_device_attr) -> Result {
        has_attr(attr)?;
        let offset = user::read(attr.addr as usize)?;
        self.arch.clock.set_offset(self.hw, offset);
        self.tsc_moved();
        Ok(())
    }

    /// KVM_SET_TSC_KHZ: 0 stands for the host's frequency; EINVAL for one that cannot be. A difference
    /// of up to 250 ppm is none, as in KVM.
    pub(super) fn set_tsc_khz(&mut self, arg: usize) -> Result {
        let khz = tsc_khz(arg, self.host.tsc_scaling)?;
        self.arch
            .clock
            .set_khz(self.hw, khz, self.host.tsc_scaling)?;
        self.tsc_moved();
        Ok(())
    }

    /// KVM_KVMCLOCK_CTRL: EINVAL if the guest has no clock.
    pub(super) fn set_stopped(&mut self) -> Result {
        self.arch.clock.set_stopped()?;
        self.around.shared.request(Request::Clock);
        Ok(())
    }
}
