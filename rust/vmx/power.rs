// SPDX-License-Identifier: GPL-2.0

//! When VMX is on: from a CPU's coming up to its going down, but not while the machine sleeps.
//!
//! A CPU may keep a VMCS to itself until VMCLEAR, or beyond if VMX is turned off before. So who takes
//! VMX away from a CPU clears what is active there first. That is
//!
//! - CPU hotplug, in a thread of the CPU that goes;
//! - sleep, on the last CPU, with interrupts off. All threads of user space are frozen, outside of
//!   KVM_RUN, which a thread that is to be frozen leaves as for a signal (EINTR), halted or not;
//! - the end: the machine is halted, restarted, or starts another kernel. Threads are not stopped, and
//!   run on without VMX for the last moments. Their VMX instructions fault, and are passed over: see
//!   `vmx_asm!` and `entry.S`.
//!
//! In an emergency (panic, SysRq-b) the kernel turns VMX off by itself, on CPUs that execute nothing
//! else from there on. It has one callback for VMCLEAR before that, and a warning for a second; KVM's is
//! registered for as long as KVM may run guests, and nobody can ask if the slot is free. So rkvm leaves
//! it alone. What a crash dump lacks then is the state of those vCPUs that were active, where their CPU
//! had not written it back. Nothing else depends on it: a kernel that is started after a crash has
//! memory of its own, to which no VMCS of ours is ever written back.

use super::VMCSS;
use crate::bindings;
use crate::linux::cpu::PerCpuHold;
use kernel::error::to_result;
use kernel::prelude::*;

/// A reference to VMX on each CPU.
pub(super) struct VmxHold;

impl PerCpuHold for VmxHold {
    fn acquire() -> Result {
        // SAFETY: Called on the CPU that is to hold the reference, which is held from then on.
        unsafe {
            to_result(bindings::rkvm_vmx_get_ref())?;
            bindings::rkvm_set_vmx_held(true);
        }
        Ok(())
    }

    fn release() {
        // SAFETY: Interrupts are off. From here on nothing is loaded on this CPU.
        unsafe {
            if !bindings::rkvm_vmx_held() {
                return;
            }
            bindings::rkvm_set_vmx_held(false);
        }
        for vmcs in VMCSS.lock().iter().flatten() {
            vmcs.clear_here();
        }
        // SAFETY: `acquire` took a reference on this CPU, and nobody has given it back.
        unsafe { bindings::rkvm_vmx_put_ref() };
    }

    fn sleeps() {
        crate::time::suspending();
    }

    fn woke() {
        crate::time::resumed();
    }
}
