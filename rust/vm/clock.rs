// SPDX-License-Identifier: GPL-2.0

//! KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_SET_TSC_KHZ.

use super::Vm;
use crate::abi::kvm_clock_data;
use crate::backend::Backend;
use crate::bindings::KVM_CLOCK_HOST_TSC as HOST_TSC;
use crate::bindings::KVM_CLOCK_REALTIME as REALTIME;
use crate::bindings::KVM_CLOCK_TSC_STABLE as TSC_STABLE;
use crate::linux::msr as host_msr;
use crate::x86::clock::tsc::max_khz;
use kernel::prelude::*;

/// The flags that there are (KVM_CAP_ADJUST_CLOCK).
pub(crate) const CLOCK_FLAGS: u32 = TSC_STABLE | REALTIME | HOST_TSC;

/// The rate of a counter that a VMM asks for, 0 being the host's, in kHz: EINVAL for one that no processor can make.
pub(crate) fn tsc_khz(arg: usize, can_scale: bool) -> Result<u32> {
    let host = host_msr::tsc_khz();
    match arg as u32 {
        0 => Ok(host),
        khz if can_scale && khz >= max_khz(host) => Err(EINVAL),
        khz => Ok(khz),
    }
}

impl<B: Backend> Vm<B> {
    /// KVM_GET_CLOCK.
    pub(super) fn get_clock(&self) -> kvm_clock_data {
        let (clock, now, by_counter) = self.time.read();
        let mut data = kvm_clock_data {
            clock,
            ..Default::default()
        };
        if by_counter {
            data.flags = TSC_STABLE;
            data.host_tsc = now.tsc;
            if now.by_tsc {
                data.flags |= REALTIME | HOST_TSC;
                data.realtime = now.real;
            }
        }
        data
    }

    /// KVM_SET_CLOCK: EINVAL for flags that are not known.
    pub(super) fn set_clock(&self, data: &kvm_clock_data) -> Result {
        if data.flags & !CLOCK_FLAGS != 0 {
            return Err(EINVAL);
        }
        let real = (data.flags & REALTIME != 0).then_some(data.realtime);
        self.time.set(data.clock, real);
        Ok(())
    }

    /// KVM_SET_TSC_KHZ: the rate of vCPUs to come. EINVAL if there are any, or for a rate that cannot be.
    pub(super) fn set_tsc_khz(&self, arg: usize) -> Result {
        let khz = tsc_khz(arg, self.machine.host.tsc_scaling)?;
        let vcpus = self.vcpus.lock();
        if !vcpus.is_empty() {
            return Err(EINVAL);
        }
        self.time.set_khz(khz);
        Ok(())
    }
}
