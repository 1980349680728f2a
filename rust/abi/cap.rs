// SPDX-License-Identifier: GPL-2.0

//! KVM_CHECK_EXTENSION: what is there, truthfully, and 0 for everything else.

use super::MAX_VCPUS;
use crate::bindings as b;
use crate::linux::fpu;
use crate::linux::task;

/// How long a cycle of the local APICs' bus takes, if user space does not say.
const APIC_BUS_CYCLE_NS: isize = 1;

/// The answer for a capability (KVM API, 4.4): 0 if it is not there, 1 or more if it is.
pub(crate) fn check(cap: usize) -> isize {
    let Ok(cap) = u32::try_from(cap) else {
        return 0;
    };
    match cap {
        b::KVM_CAP_USER_MEMORY
        | b::KVM_CAP_USER_MEMORY2
        | b::KVM_CAP_MMU_SHADOW_CACHE_CONTROL
        | b::KVM_CAP_SET_TSS_ADDR
        | b::KVM_CAP_EXT_CPUID
        | b::KVM_CAP_NOP_IO_DELAY
        | b::KVM_CAP_MP_STATE
        | b::KVM_CAP_SYNC_MMU
        | b::KVM_CAP_DESTROY_MEMORY_REGION_WORKS
        | b::KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
        | b::KVM_CAP_USER_NMI
        | b::KVM_CAP_SET_IDENTITY_MAP_ADDR
        | b::KVM_CAP_VCPU_EVENTS
        | b::KVM_CAP_DEBUGREGS
        | b::KVM_CAP_SET_GUEST_DEBUG
        | b::KVM_CAP_X86_ROBUST_SINGLESTEP
        | b::KVM_CAP_SREGS2
        | b::KVM_CAP_EXCEPTION_PAYLOAD
        | b::KVM_CAP_X86_TRIPLE_FAULT_EVENT
        | b::KVM_CAP_SYS_ATTRIBUTES
        | b::KVM_CAP_READONLY_MEM
        | b::KVM_CAP_GET_TSC_KHZ
        | b::KVM_CAP_KVMCLOCK_CTRL
        | b::KVM_CAP_IMMEDIATE_EXIT
        | b::KVM_CAP_INTERNAL_ERROR_DATA
        | b::KVM_CAP_GET_MSR_FEATURES
        | b::KVM_CAP_BINARY_STATS_FD
        | b::KVM_CAP_COALESCED_PIO
        | b::KVM_CAP_MEMORY_FAULT_INFO
        | b::KVM_CAP_CHECK_EXTENSION_VM
        | b::KVM_CAP_ENABLE_CAP_VM
        | b::KVM_CAP_IRQCHIP
        | b::KVM_CAP_SPLIT_IRQCHIP
        | b::KVM_CAP_IRQ_INJECT_STATUS
        | b::KVM_CAP_IOAPIC_POLARITY_IGNORED
        | b::KVM_CAP_SIGNAL_MSI
        | b::KVM_CAP_IRQFD
        | b::KVM_CAP_IRQFD_RESAMPLE
        | b::KVM_CAP_IOEVENTFD
        | b::KVM_CAP_IOEVENTFD_NO_LENGTH
        | b::KVM_CAP_IOEVENTFD_ANY_LENGTH
        | b::KVM_CAP_PIT
        | b::KVM_CAP_PIT2
        | b::KVM_CAP_PIT_STATE2
        | b::KVM_CAP_REINJECT_CONTROL
        | b::KVM_CAP_SET_BOOT_CPU_ID
        | b::KVM_CAP_DISABLE_QUIRKS
        | b::KVM_CAP_VCPU_ATTRIBUTES
        | b::KVM_CAP_EXIT_ON_EMULATION_FAILURE
        | b::KVM_CAP_ENFORCE_PV_FEATURE_CPUID
        | b::KVM_CAP_X86_USER_SPACE_MSR
        | b::KVM_CAP_X86_MSR_FILTER
        | b::KVM_CAP_MSR_PLATFORM_INFO
        | b::KVM_CAP_TSC_DEADLINE_TIMER => 1,
        b::KVM_CAP_ADJUST_CLOCK => crate::vm::CLOCK_FLAGS as isize,
        b::KVM_CAP_MCE => crate::x86::mce::MAX_BANKS as isize,
        b::KVM_CAP_DISABLE_QUIRKS2 => crate::options::QUIRKS as isize,
        b::KVM_CAP_EXIT_HYPERCALL => crate::run::hypercall::FOR_VMM as isize,
        b::KVM_CAP_IRQ_ROUTING => crate::irq::MAX_ROUTES as isize,
        b::KVM_CAP_X2APIC_API => crate::apics::X2APIC_API as isize,
        b::KVM_CAP_X86_APIC_BUS_CYCLES_NS => APIC_BUS_CYCLE_NS,
        b::KVM_CAP_X86_DISABLE_EXITS => crate::vm::disableable_exits() as isize,
        b::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => crate::mem::log::MANUAL_CAPS as isize,
        b::KVM_CAP_DIRTY_LOG_RING | b::KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
            crate::mem::ring::MAX_BYTES as isize
        }
        b::KVM_CAP_SET_GUEST_DEBUG2 => crate::vcpu::debug::CONTROLS as isize,
        b::KVM_CAP_SYNC_REGS => crate::vcpu::sync::FIELDS as isize,
        // Only if the host switches such state.
        b::KVM_CAP_XSAVE | b::KVM_CAP_XCRS => isize::from(crate::linux::msr::host_xcr0() != 0),
        b::KVM_CAP_XSAVE2 => fpu::uabi_max_size() as isize,
        // Where the ring is in a vCPU's mapping, in pages.
        b::KVM_CAP_COALESCED_MMIO => b::KVM_COALESCED_MMIO_PAGE_OFFSET as isize,
        b::KVM_CAP_NR_VCPUS => task::online_cpus().min(MAX_VCPUS as u32) as isize,
        b::KVM_CAP_MAX_VCPUS => MAX_VCPUS as isize,
        b::KVM_CAP_MAX_VCPU_ID => super::MAX_VCPU_IDS as isize,
        // The number of address spaces: there is no SMM, which would have another.
        b::KVM_CAP_MULTI_ADDRESS_SPACE => 1,
        b::KVM_CAP_NR_MEMSLOTS => crate::mem::MAX_SLOTS as isize,
        _ => 0,
    }
}
