// SPDX-License-Identifier: GPL-2.0

//! The part of a vCPU that follows its thread on and off the CPUs: the VMCS, the host's segments and
//! the MSRs that no VMCS field switches.
//!
//! There is one [`Loadable`] a vCPU. It is *loaded* on a CPU from `switched_in` to `switched_out`,
//! which the vCPU's ioctls call through a [`Following`] guard and the scheduler through the preempt
//! notifier. Within that, the guest's MSRs are in the hardware from [`Loadable::prepare`], before an
//! entry, until `switched_out`: they are not touched on an exit.
//!
//! kvm-intel may be running guests on the same CPU, and it remembers which VMCS it left current
//! there. So what was current before is made current again by `switched_out`.
//!
//! On a CPU that goes down VMX is off already when the scheduler moves the last threads away, which
//! takes a switch to each of them: nothing is loaded then, nor needed.
//!
//! [`Following`]: crate::linux::preempt::Following

use super::fields as f;
use super::vmcs::vmptrld;
use super::vmcs::vmptrst;
use super::vmcs::vmwrite;
use super::vmcs::Vmcs;
use crate::bindings;
use crate::linux::irq::PreemptOff;
use crate::linux::msr;
use crate::linux::preempt::FollowsThread;
use crate::x86::msr::Msr;
use core::cell::UnsafeCell;
use kernel::sync::Arc;

/// MSRs that hold the guest's values while it may run, saved and restored by hand.
#[derive(Clone, Copy, Default)]
pub(crate) struct SwitchedMsrs {
    /// IA32_STAR.
    pub(crate) star: u64,
    /// IA32_LSTAR.
    pub(crate) lstar: u64,
    /// IA32_FMASK.
    pub(crate) fmask: u64,
    /// IA32_TSC_AUX; not switched if the CPU has no RDTSCP.
    pub(crate) tsc_aux: u64,
    /// IA32_KERNEL_GS_BASE, which the guest writes without an exit.
    pub(crate) kernel_gs_base: u64,
}

impl SwitchedMsrs {
    /// The host's values, but for the two that differ between threads and CPUs.
    pub(crate) fn host() -> Self {
        // SAFETY: Every 64-bit processor has the three MSRs.
        unsafe {
            Self {
                star: msr::read(Msr::STAR.0),
                lstar: msr::read(Msr::LSTAR.0),
                fmask: msr::read(Msr::SYSCALL_MASK.0),
                ..Self::default()
            }
        }
    }

    /// Writes the values of `self` that differ from those of `current`.
    ///
    /// # Safety
    ///
    /// `current` is in the hardware, preemption is off, and the host's values come back before any
    /// other thread runs.
    unsafe fn switch_from(&self, current: &Self) {
        let pairs = [
            (Msr::STAR, self.star, current.star),
            (Msr::LSTAR, self.lstar, current.lstar),
            (Msr::SYSCALL_MASK, self.fmask, current.fmask),
            (Msr::TSC_AUX, self.tsc_aux, current.tsc_aux),
        ];
        for (msr, new, old) in pairs {
            if new != old {
                // SAFETY: The MSR exists (TSC_AUX never differs where it does not); the guest's
                // values were checked when they were set; system calls, which these are for, come
                // from user space only.
                unsafe { msr::write(msr.0, new) };
            }
        }
    }
}

/// What only the thread, or the notifier in its place, touches.
struct State {
    /// What was current when the VMCS was loaded, to be made current again.
    previous: Option<u64>,
    /// The guest's MSRs are in the hardware.
    guest_msrs_loaded: bool,
    guest: SwitchedMsrs,
    host: SwitchedMsrs,
    segments: bindings::rkvm_host_segments,
    /// Values last written to the VMCS's host-state fields.
    vmcs_fs_base: u64,
    vmcs_gs_base: u64,
    /// What the time-stamp counter said when the guest last left a CPU, once somebody wants to know.
    left_at: Option<u64>,
}

/// A VMCS and the state that goes on and off a CPU with it.
pub(crate) struct Loadable {
    vmcs: Arc<Vmcs>,
    has_rdtscp: bool,
    state: UnsafeCell<State>,
}

// SAFETY: `state` is accessed only with preemption off by the one thread that holds the vCPU's mutex
// or, when that thread is off its CPU, in its place.
unsafe impl Sync for Loadable {}
// SAFETY: Nothing in it belongs to a thread while it is not loaded.
unsafe impl Send for Loadable {}

impl Loadable {
    /// Wraps a VMCS. `host` is what [`SwitchedMsrs::host`] read.
    pub(crate) fn new(vmcs: Arc<Vmcs>, host: SwitchedMsrs, has_rdtscp: bool) -> Self {
        Self {
            vmcs,
            has_rdtscp,
            state: UnsafeCell::new(State {
                previous: None,
                guest_msrs_loaded: false,
                guest: SwitchedMsrs::default(),
                host,
                segments: bindings::rkvm_host_segments::default(),
                vmcs_fs_base: 0,
                vmcs_gs_base: 0,
                left_at: None,
            }),
        }
    }

    /// The VMCS.
    #[inline]
    pub(crate) fn vmcs(&self) -> &Vmcs {
        &self.vmcs
    }

    /// Runs `with` on the state, with preemption off.
    #[inline]
    fn with<R>(&self, _preempt: &PreemptOff, with: impl FnOnce(&mut State) -> R) -> R {
        // SAFETY: Preemption is off, so no notifier can come between, and only one thread at a time
        // has the vCPU. `with` does not call back into here.
        with(unsafe { &mut *self.state.get() })
    }

    /// Puts the guest's MSRs into the hardware, should they not be there, and the thread's segments
    /// into the VMCS. The VMCS is loaded; call it before each entry.
    #[inline]
    pub(crate) fn prepare(&self, preempt: &PreemptOff) {
        self.with(preempt, |s| {
            if !s.guest_msrs_loaded {
                self.load_guest(s);
            }
        });
    }

    #[cold]
    fn load_guest(&self, s: &mut State) {
        // SAFETY: Preemption is off, as `with` demands of the caller.
        unsafe { bindings::rkvm_host_segments_save(&mut s.segments) };
        if s.segments.fs_base != s.vmcs_fs_base {
            s.vmcs_fs_base = s.segments.fs_base;
            // SAFETY: The VMCS is loaded; the value is the thread's own base.
            unsafe { vmwrite(f::HOST_FS_BASE, s.vmcs_fs_base) };
        }
        if s.segments.gs_base != s.vmcs_gs_base {
            s.vmcs_gs_base = s.segments.gs_base;
            // SAFETY: The VMCS is loaded; the value is this CPU's own base.
            unsafe { vmwrite(f::HOST_GS_BASE, s.vmcs_gs_base) };
        }
        if self.has_rdtscp {
            // SAFETY: The MSR exists where RDTSCP does.
            s.host.tsc_aux = unsafe { msr::read(Msr::TSC_AUX.0) };
        } else {
            s.host.tsc_aux = s.guest.tsc_aux;
        }
        // SAFETY: The host's values are in the hardware, and `unload_guest` brings them back. The
        // base is canonical, as a processor or a check made it.
        unsafe {
            s.guest.switch_from(&s.host);
            msr::write(Msr::KERNEL_GS_BASE.0, s.guest.kernel_gs_base);
        }
        s.guest_msrs_loaded = true;
    }

    fn unload_guest(s: &mut State) {
        // SAFETY: `load_guest` put the guest's values there; this restores the thread's.
        unsafe {
            s.guest.kernel_gs_base = msr::read(Msr::KERNEL_GS_BASE.0);
            s.host.switch_from(&s.guest);
            bindings::rkvm_host_segments_restore(&s.segments);
        }
        s.guest_msrs_loaded = false;
        if let Some(left_at) = &mut s.left_at {
            *left_at = msr::rdtsc();
        }
    }

    /// What the time-stamp counter said when the guest last left a CPU. None the first time, from which on
    /// it is noted.
    pub(crate) fn left_at(&self) -> Option<u64> {
        self.with(&PreemptOff::new(), |s| match s.left_at {
            None => {
                s.left_at = Some(0);
                None
            }
            left_at => left_at.filter(|left_at| *left_at != 0),
        })
    }

    /// The guest's MSRs, as they are now.
    pub(crate) fn guest_msrs(&self) -> SwitchedMsrs {
        self.with(&PreemptOff::new(), |s| {
            if s.guest_msrs_loaded {
                // SAFETY: Every 64-bit processor has the MSR.
                s.guest.kernel_gs_base = unsafe { msr::read(Msr::KERNEL_GS_BASE.0) };
            }
            s.guest
        })
    }

    /// Changes the guest's MSRs. The bases are canonical.
    pub(crate) fn set_guest_msrs(&self, change: impl FnOnce(&mut SwitchedMsrs)) {
        self.with(&PreemptOff::new(), |s| {
            // The next entry loads them again.
            if s.guest_msrs_loaded {
                Self::unload_guest(s);
            }
            change(&mut s.guest);
        });
    }
}

impl FollowsThread for Loadable {
    fn switched_in(&self, preempt: &PreemptOff) {
        let cpu = preempt.cpu();
        // SAFETY: Preemption is off.
        if !unsafe { bindings::rkvm_vmx_held() } {
            return;
        }
        let moved = self.vmcs.cpu() != cpu;
        let other_ran = self.with(preempt, |s| {
            // SAFETY: VMX is on, and preemption off.
            let current = unsafe { vmptrst() };
            // SAFETY: Preemption is off.
            let ours = unsafe { bindings::rkvm_current_vmcs() };
            // What we left there ourselves is nobody's to want back.
            s.previous = (current != ours && current != u64::MAX).then_some(current);
            current != self.vmcs.phys()
        });
        self.vmcs.make_current(cpu);
        // SAFETY: Preemption is off.
        unsafe { bindings::rkvm_set_current_vmcs(self.vmcs.phys()) };
        if moved {
            // SAFETY: The VMCS has just been made current.
            unsafe { write_cpu_host_state() };
        }
        if other_ran {
            // SAFETY: Preemption is off.
            unsafe { bindings::rkvm_vcpu_switch_barrier() };
        }
    }

    fn switched_out(&self, preempt: &PreemptOff) {
        self.with(preempt, |s| {
            if s.guest_msrs_loaded {
                Self::unload_guest(s);
                // SAFETY: Preemption is off.
                unsafe { bindings::rkvm_mark_guest_ran() };
            }
            if let Some(previous) = s.previous.take() {
                // SAFETY: It was current on this CPU when ours was loaded. Should its owner have
                // cleared and freed it since, by an IPI, the page is loaded only if it still
                // begins with the revision identifier, and nothing is written to it.
                if unsafe { vmptrld(previous) }.is_ok() {
                    // SAFETY: Preemption is off.
                    unsafe { bindings::rkvm_set_current_vmcs(u64::MAX) };
                }
            }
        });
    }
}

/// Writes the host state that belongs to a CPU rather than to a thread.
///
/// # Safety
///
/// The VMCS is current, preemption is off.
unsafe fn write_cpu_host_state() {
    let mut tables = bindings::rkvm_host_tables::default();
    // SAFETY: The helper fills in the structure. The values are those that this CPU uses now, and
    // the VMCS is current by the caller.
    unsafe {
        bindings::rkvm_host_tables(&mut tables);
        vmwrite(f::HOST_TR_BASE, tables.tss);
        vmwrite(f::HOST_GDTR_BASE, tables.gdt);
        vmwrite(f::HOST_IDTR_BASE, tables.idt);
        vmwrite(f::HOST_SYSENTER_ESP, tables.sysenter_esp);
    }
}

/// Forgets that we left `phys` current on this CPU: it has been cleared.
pub(crate) fn forget_current(phys: u64) {
    // SAFETY: The caller cannot leave the CPU.
    unsafe {
        if bindings::rkvm_current_vmcs() == phys {
            bindings::rkvm_set_current_vmcs(u64::MAX);
        }
    }
}
