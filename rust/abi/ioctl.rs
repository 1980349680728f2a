// SPDX-License-Identifier: GPL-2.0

//! The ioctls that rkvm implements; any other gets ENOTTY (EINVAL on a vCPU, as in KVM).

use super::*;
use crate::bindings as b;
use kernel::ioctl::_IO;
use kernel::ioctl::_IOR;
use kernel::ioctl::_IOW;
use kernel::ioctl::_IOWR;

const KVMIO: u32 = b::KVMIO;

// /dev/rkvm.
pub(crate) const GET_API_VERSION: u32 = _IO(KVMIO, 0x00);
pub(crate) const CREATE_VM: u32 = _IO(KVMIO, 0x01);
pub(crate) const GET_MSR_INDEX_LIST: u32 = _IOWR::<kvm_msr_list>(KVMIO, 0x02);
/// Of the device and of a VM.
pub(crate) const CHECK_EXTENSION: u32 = _IO(KVMIO, 0x03);
pub(crate) const GET_VCPU_MMAP_SIZE: u32 = _IO(KVMIO, 0x04);
pub(crate) const GET_SUPPORTED_CPUID: u32 = _IOWR::<kvm_cpuid2>(KVMIO, 0x05);
pub(crate) const GET_MSR_FEATURE_INDEX_LIST: u32 = _IOWR::<kvm_msr_list>(KVMIO, 0x0a);
pub(crate) const X86_GET_MCE_CAP_SUPPORTED: u32 = _IOR::<u64>(KVMIO, 0x9d);

// A VM.
/// Of a vCPU, too.
pub(crate) const ENABLE_CAP: u32 = _IOW::<kvm_enable_cap>(KVMIO, 0xa3);
pub(crate) const CREATE_VCPU: u32 = _IO(KVMIO, 0x41);
pub(crate) const GET_DIRTY_LOG: u32 = _IOW::<kvm_dirty_log>(KVMIO, 0x42);
pub(crate) const SET_NR_MMU_PAGES: u32 = _IO(KVMIO, 0x44);
pub(crate) const SET_USER_MEMORY_REGION: u32 = _IOW::<kvm_userspace_memory_region>(KVMIO, 0x46);
pub(crate) const SET_TSS_ADDR: u32 = _IO(KVMIO, 0x47);
pub(crate) const SET_IDENTITY_MAP_ADDR: u32 = _IOW::<u64>(KVMIO, 0x48);
pub(crate) const CLEAR_DIRTY_LOG: u32 = _IOWR::<kvm_clear_dirty_log>(KVMIO, 0xc0);
pub(crate) const SET_MSR_FILTER: u32 = _IOW::<kvm_msr_filter>(KVMIO, 0xc6);
pub(crate) const RESET_DIRTY_RINGS: u32 = _IO(KVMIO, 0xc7);
pub(crate) const SET_USER_MEMORY_REGION2: u32 = _IOW::<kvm_userspace_memory_region2>(KVMIO, 0x49);
pub(crate) const REGISTER_COALESCED_MMIO: u32 = _IOW::<kvm_coalesced_mmio_zone>(KVMIO, 0x67);
pub(crate) const UNREGISTER_COALESCED_MMIO: u32 = _IOW::<kvm_coalesced_mmio_zone>(KVMIO, 0x68);
pub(crate) const CREATE_IRQCHIP: u32 = _IO(KVMIO, 0x60);
pub(crate) const IRQ_LINE: u32 = _IOW::<kvm_irq_level>(KVMIO, 0x61);
pub(crate) const GET_IRQCHIP: u32 = _IOWR::<kvm_irqchip>(KVMIO, 0x62);
pub(crate) const SET_IRQCHIP: u32 = _IOR::<kvm_irqchip>(KVMIO, 0x63);
pub(crate) const CREATE_PIT: u32 = _IO(KVMIO, 0x64);
pub(crate) const GET_PIT: u32 = _IOWR::<kvm_pit_state>(KVMIO, 0x65);
pub(crate) const SET_PIT: u32 = _IOR::<kvm_pit_state>(KVMIO, 0x66);
pub(crate) const IRQ_LINE_STATUS: u32 = _IOWR::<kvm_irq_level>(KVMIO, 0x67);
pub(crate) const SET_GSI_ROUTING: u32 = _IOW::<kvm_irq_routing>(KVMIO, 0x6a);
pub(crate) const REINJECT_CONTROL: u32 = _IO(KVMIO, 0x71);
pub(crate) const IRQFD: u32 = _IOW::<kvm_irqfd>(KVMIO, 0x76);
pub(crate) const CREATE_PIT2: u32 = _IOW::<kvm_pit_config>(KVMIO, 0x77);
pub(crate) const SET_BOOT_CPU_ID: u32 = _IO(KVMIO, 0x78);
pub(crate) const IOEVENTFD: u32 = _IOW::<kvm_ioeventfd>(KVMIO, 0x79);
pub(crate) const SET_CLOCK: u32 = _IOW::<kvm_clock_data>(KVMIO, 0x7b);
pub(crate) const GET_CLOCK: u32 = _IOR::<kvm_clock_data>(KVMIO, 0x7c);
pub(crate) const GET_PIT2: u32 = _IOR::<kvm_pit_state2>(KVMIO, 0x9f);
pub(crate) const SET_PIT2: u32 = _IOW::<kvm_pit_state2>(KVMIO, 0xa0);
pub(crate) const SIGNAL_MSI: u32 = _IOW::<kvm_msi>(KVMIO, 0xa5);

// A vCPU.
pub(crate) const RUN: u32 = _IO(KVMIO, 0x80);
pub(crate) const GET_REGS: u32 = _IOR::<kvm_regs>(KVMIO, 0x81);
pub(crate) const SET_REGS: u32 = _IOW::<kvm_regs>(KVMIO, 0x82);
pub(crate) const GET_SREGS: u32 = _IOR::<kvm_sregs>(KVMIO, 0x83);
pub(crate) const SET_SREGS: u32 = _IOW::<kvm_sregs>(KVMIO, 0x84);
pub(crate) const TRANSLATE: u32 = _IOWR::<kvm_translation>(KVMIO, 0x85);
pub(crate) const INTERRUPT: u32 = _IOW::<kvm_interrupt>(KVMIO, 0x86);
/// Of the device, for feature MSRs, and of a vCPU.
pub(crate) const GET_MSRS: u32 = _IOWR::<kvm_msrs>(KVMIO, 0x88);
pub(crate) const SET_MSRS: u32 = _IOW::<kvm_msrs>(KVMIO, 0x89);
pub(crate) const SET_SIGNAL_MASK: u32 = _IOW::<b::kvm_signal_mask>(KVMIO, 0x8b);
pub(crate) const GET_FPU: u32 = _IOR::<kvm_fpu>(KVMIO, 0x8c);
pub(crate) const SET_FPU: u32 = _IOW::<kvm_fpu>(KVMIO, 0x8d);
pub(crate) const SET_GUEST_DEBUG: u32 = _IOW::<kvm_guest_debug>(KVMIO, 0x9b);
pub(crate) const SET_CPUID2: u32 = _IOW::<kvm_cpuid2>(KVMIO, 0x90);
pub(crate) const GET_CPUID2: u32 = _IOWR::<kvm_cpuid2>(KVMIO, 0x91);
pub(crate) const X86_SETUP_MCE: u32 = _IOW::<u64>(KVMIO, 0x9c);
pub(crate) const X86_SET_MCE: u32 = _IOW::<kvm_x86_mce>(KVMIO, 0x9e);
pub(crate) const GET_MP_STATE: u32 = _IOR::<kvm_mp_state>(KVMIO, 0x98);
pub(crate) const SET_MP_STATE: u32 = _IOW::<kvm_mp_state>(KVMIO, 0x99);
pub(crate) const NMI: u32 = _IO(KVMIO, 0x9a);
pub(crate) const GET_VCPU_EVENTS: u32 = _IOR::<kvm_vcpu_events>(KVMIO, 0x9f);
pub(crate) const SET_VCPU_EVENTS: u32 = _IOW::<kvm_vcpu_events>(KVMIO, 0xa0);
pub(crate) const GET_DEBUGREGS: u32 = _IOR::<kvm_debugregs>(KVMIO, 0xa1);
pub(crate) const SET_DEBUGREGS: u32 = _IOW::<kvm_debugregs>(KVMIO, 0xa2);
/// Of a VM and of a vCPU.
pub(crate) const SET_TSC_KHZ: u32 = _IO(KVMIO, 0xa2);
/// Of a VM and of a vCPU.
pub(crate) const GET_TSC_KHZ: u32 = _IO(KVMIO, 0xa3);
pub(crate) const KVMCLOCK_CTRL: u32 = _IO(KVMIO, 0xad);
pub(crate) const GET_LAPIC: u32 = _IOR::<kvm_lapic_state>(KVMIO, 0x8e);
pub(crate) const SET_LAPIC: u32 = _IOW::<kvm_lapic_state>(KVMIO, 0x8f);
pub(crate) const TPR_ACCESS_REPORTING: u32 = _IOWR::<kvm_tpr_access_ctl>(KVMIO, 0x92);
pub(crate) const SET_VAPIC_ADDR: u32 = _IOW::<kvm_vapic_addr>(KVMIO, 0x93);
pub(crate) const SET_DEVICE_ATTR: u32 = _IOW::<kvm_device_attr>(KVMIO, 0xe1);
pub(crate) const GET_DEVICE_ATTR: u32 = _IOW::<kvm_device_attr>(KVMIO, 0xe2);
pub(crate) const HAS_DEVICE_ATTR: u32 = _IOW::<kvm_device_attr>(KVMIO, 0xe3);
pub(crate) const GET_XSAVE: u32 = _IOR::<b::kvm_xsave>(KVMIO, 0xa4);
pub(crate) const SET_XSAVE: u32 = _IOW::<b::kvm_xsave>(KVMIO, 0xa5);
/// Of a VM and of a vCPU.
pub(crate) const GET_STATS_FD: u32 = _IO(KVMIO, 0xce);
pub(crate) const GET_XSAVE2: u32 = _IOR::<b::kvm_xsave>(KVMIO, 0xcf);
pub(crate) const GET_XCRS: u32 = _IOR::<kvm_xcrs>(KVMIO, 0xa6);
pub(crate) const SET_XCRS: u32 = _IOW::<kvm_xcrs>(KVMIO, 0xa7);
pub(crate) const GET_SREGS2: u32 = _IOR::<kvm_sregs2>(KVMIO, 0xcc);
pub(crate) const SET_SREGS2: u32 = _IOW::<kvm_sregs2>(KVMIO, 0xcd);
pub(crate) const PRE_FAULT_MEMORY: u32 = _IOWR::<kvm_pre_fault_memory>(KVMIO, 0xd5);
