// SPDX-License-Identifier: GPL-2.0

//! What user space sees: the numbers and structures of the KVM API (Documentation/virt/kvm/api.rst).

pub(crate) mod cap;
pub(crate) mod ioctl;

use crate::linux::user;
use kernel::prelude::*;

pub(crate) use crate::bindings::kvm_clear_dirty_log;
pub(crate) use crate::bindings::kvm_clock_data;
pub(crate) use crate::bindings::kvm_coalesced_mmio;
pub(crate) use crate::bindings::kvm_coalesced_mmio_ring;
pub(crate) use crate::bindings::kvm_coalesced_mmio_zone;
pub(crate) use crate::bindings::kvm_cpuid2;
pub(crate) use crate::bindings::kvm_cpuid_entry2;
pub(crate) use crate::bindings::kvm_debugregs;
pub(crate) use crate::bindings::kvm_device_attr;
pub(crate) use crate::bindings::kvm_dirty_log;
pub(crate) use crate::bindings::kvm_dtable;
pub(crate) use crate::bindings::kvm_enable_cap;
pub(crate) use crate::bindings::kvm_fpu;
pub(crate) use crate::bindings::kvm_guest_debug;
pub(crate) use crate::bindings::kvm_interrupt;
pub(crate) use crate::bindings::kvm_ioeventfd;
pub(crate) use crate::bindings::kvm_irq_level;
pub(crate) use crate::bindings::kvm_irq_routing;
pub(crate) use crate::bindings::kvm_irqchip;
pub(crate) use crate::bindings::kvm_irqfd;
pub(crate) use crate::bindings::kvm_lapic_state;
pub(crate) use crate::bindings::kvm_mp_state;
pub(crate) use crate::bindings::kvm_msi;
pub(crate) use crate::bindings::kvm_msr_entry;
pub(crate) use crate::bindings::kvm_msr_filter;
pub(crate) use crate::bindings::kvm_msr_list;
pub(crate) use crate::bindings::kvm_msrs;
pub(crate) use crate::bindings::kvm_pit_config;
pub(crate) use crate::bindings::kvm_pit_state;
pub(crate) use crate::bindings::kvm_pit_state2;
pub(crate) use crate::bindings::kvm_pre_fault_memory;
pub(crate) use crate::bindings::kvm_regs;
pub(crate) use crate::bindings::kvm_reinject_control;
pub(crate) use crate::bindings::kvm_segment;
pub(crate) use crate::bindings::kvm_signal_mask;
pub(crate) use crate::bindings::kvm_sregs;
pub(crate) use crate::bindings::kvm_sregs2;
pub(crate) use crate::bindings::kvm_stats_desc;
pub(crate) use crate::bindings::kvm_stats_header;
pub(crate) use crate::bindings::kvm_tpr_access_ctl;
pub(crate) use crate::bindings::kvm_translation;
pub(crate) use crate::bindings::kvm_userspace_memory_region;
pub(crate) use crate::bindings::kvm_userspace_memory_region2;
pub(crate) use crate::bindings::kvm_vapic_addr;
pub(crate) use crate::bindings::kvm_vcpu_events;
pub(crate) use crate::bindings::kvm_x86_mce;
pub(crate) use crate::bindings::kvm_xcrs;

/// KVM_GET_API_VERSION: the only version there has been since 2007.
pub(crate) const API_VERSION: isize = 12;

/// The most vCPUs in a VM (KVM_CAP_MAX_VCPUS).
pub(crate) const MAX_VCPUS: usize = 1024;

/// One more than the greatest vCPU identifier (KVM_CAP_MAX_VCPU_ID). A topology of processors leaves
/// numbers out.
pub(crate) const MAX_VCPU_IDS: usize = 4 * MAX_VCPUS;

/// Pages of a vCPU's mapping: `struct kvm_run`, the data of port accesses, and the VM's ring of
/// coalesced writes.
pub(crate) const RUN_PAGES: usize = 3;

/// Where in a vCPU's mapping its dirty ring begins, in pages.
pub(crate) const DIRTY_RING_PAGE: usize = crate::bindings::KVM_DIRTY_LOG_PAGE_OFFSET as usize;

/// The most entries of KVM_GET_MSRS and KVM_SET_MSRS, as in KVM.
pub(crate) const MAX_MSR_ENTRIES: usize = 256;

/// The entries of KVM_GET_MSRS and KVM_SET_MSRS that user space gave at `arg`: EFAULT, and E2BIG if
/// they are too many.
pub(crate) fn read_msr_entries(arg: usize) -> Result<KVVec<kvm_msr_entry>> {
    let count = user::read::<kvm_msrs>(arg)?.nmsrs as usize;
    if count >= MAX_MSR_ENTRIES {
        return Err(E2BIG);
    }
    user::read_array(arg.wrapping_add(size_of::<kvm_msrs>()), count)
}

/// KVM_EXIT_*: why KVM_RUN returned (KVM API, 5).
pub(crate) mod exit {
    pub(crate) use crate::bindings::KVM_EXIT_DEBUG as DEBUG;
    pub(crate) use crate::bindings::KVM_EXIT_DIRTY_RING_FULL as DIRTY_RING_FULL;
    pub(crate) use crate::bindings::KVM_EXIT_EXCEPTION as EXCEPTION;
    pub(crate) use crate::bindings::KVM_EXIT_FAIL_ENTRY as FAIL_ENTRY;
    pub(crate) use crate::bindings::KVM_EXIT_HLT as HLT;
    pub(crate) use crate::bindings::KVM_EXIT_HYPERCALL as HYPERCALL;
    pub(crate) use crate::bindings::KVM_EXIT_INTERNAL_ERROR as INTERNAL_ERROR;
    pub(crate) use crate::bindings::KVM_EXIT_INTR as INTR;
    pub(crate) use crate::bindings::KVM_EXIT_IO as IO;
    pub(crate) use crate::bindings::KVM_EXIT_IOAPIC_EOI as IOAPIC_EOI;
    pub(crate) use crate::bindings::KVM_EXIT_IRQ_WINDOW_OPEN as IRQ_WINDOW_OPEN;
    pub(crate) use crate::bindings::KVM_EXIT_MEMORY_FAULT as MEMORY_FAULT;
    pub(crate) use crate::bindings::KVM_EXIT_MMIO as MMIO;
    pub(crate) use crate::bindings::KVM_EXIT_SET_TPR as SET_TPR;
    pub(crate) use crate::bindings::KVM_EXIT_SHUTDOWN as SHUTDOWN;
    pub(crate) use crate::bindings::KVM_EXIT_UNKNOWN as UNKNOWN;
    pub(crate) use crate::bindings::KVM_EXIT_X86_RDMSR as RDMSR;
    pub(crate) use crate::bindings::KVM_EXIT_X86_WRMSR as WRMSR;
}

/// KVM_INTERNAL_ERROR_*: what the kernel could not do for a guest.
pub(crate) mod internal {
    pub(crate) use crate::bindings::KVM_INTERNAL_ERROR_DELIVERY_EV as DELIVERY_EVENT;
    pub(crate) use crate::bindings::KVM_INTERNAL_ERROR_EMULATION as EMULATION;
    pub(crate) use crate::bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON as UNEXPECTED_EXIT;
}
