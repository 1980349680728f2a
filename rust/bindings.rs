// SPDX-License-Identifier: GPL-2.0

//! What bindgen made of `bindings/bindings.h`. Only the layers that may hold `unsafe` call it;
//! the structures of the KVM ABI reach the others through [`crate::abi`].

#![allow(
    clippy::all,
    clippy::as_ptr_cast_mut,
    clippy::as_underscore,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unused_imports,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

use kernel::bindings::{
    cpumask,
    file,
    file_operations,
    folio,
    hrtimer,
    hrtimer_restart,
    inode,
    lock_class_key,
    mm_struct,
    module,
    mutex,
    page,
    raw_spinlock_t,
    rwlock_t,
    srcu_struct,
    task_struct,
    vm_area_struct,
    wait_queue_entry,
    wait_queue_entry_t,
    wait_queue_func_t,
    work_struct, //
};

type __kernel_ssize_t = isize;
type __kernel_size_t = usize;
type __kernel_ptrdiff_t = isize;

include!("bindings/bindings_generated.rs");

macro_rules! abi_types {
    ($($ty:ty),* $(,)?) => { $(
        // SAFETY: A structure of the KVM ABI: integers, user addresses and arrays of them, whose
        // padding is named.
        unsafe impl kernel::transmute::FromBytes for $ty {}
        // SAFETY: As above: every byte of it is initialised.
        unsafe impl kernel::transmute::AsBytes for $ty {}
    )* };
}

abi_types! {
    kvm_clear_dirty_log,
    kvm_clock_data,
    kvm_coalesced_mmio_zone,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_device_attr,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_fpu,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msr_entry,
    kvm_msi,
    kvm_msr_filter,
    kvm_msr_list,
    kvm_msrs,
    kvm_pit_config,
    kvm_pre_fault_memory,
    kvm_regs,
    kvm_reinject_control,
    kvm_signal_mask,
    kvm_sregs,
    kvm_sregs2,
    kvm_stats_desc,
    kvm_stats_header,
    kvm_tpr_access_ctl,
    kvm_translation,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
    kvm_vapic_addr,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
}

// What the models of the interrupt controllers and of the timer have is laid out so too.
abi_types! {
    crate::x86::ioapic::IoapicState,
    crate::x86::pic::PicState,
    crate::x86::pit::PitChannelState,
    crate::x86::pit::PitState2,
}

const _: () = {
    use crate::x86;
    assert!(size_of::<x86::ioapic::IoapicState>() == size_of::<kvm_ioapic_state>());
    assert!(size_of::<x86::pic::PicState>() == size_of::<kvm_pic_state>());
    assert!(size_of::<[x86::pit::PitChannelState; 3]>() == size_of::<kvm_pit_state>());
    assert!(size_of::<x86::pit::PitState2>() == size_of::<kvm_pit_state2>());
};

impl kvm_dirty_log {
    /// The user address of the bitmap.
    pub(crate) fn bitmap_address(&self) -> usize {
        // SAFETY: Any bytes make a `u64`, and both members are of its size.
        unsafe { self.__bindgen_anon_1.padding2 as usize }
    }
}

impl kvm_clear_dirty_log {
    /// The user address of the bitmap.
    pub(crate) fn bitmap_address(&self) -> usize {
        // SAFETY: Any bytes make a `u64`, and both members are of its size.
        unsafe { self.__bindgen_anon_1.padding2 as usize }
    }
}

impl kvm_coalesced_mmio_zone {
    /// Whether it is of ports: 1, or 0 if it is of memory.
    pub(crate) fn pio(&self) -> u32 {
        // SAFETY: The union is of one integer under two names.
        unsafe { self.__bindgen_anon_1.pio }
    }
}

impl kvm_irq_routing_entry {
    /// The interrupt controller and its input, if it is a route to one.
    pub(crate) fn irqchip(&self) -> (u32, u32) {
        // SAFETY: Any bytes make integers, and the union has no less than these.
        let irqchip = unsafe { self.u.irqchip };
        (irqchip.irqchip, irqchip.pin)
    }

    /// The message, if it is a route to the local APICs.
    pub(crate) fn msi(&self) -> kvm_irq_routing_msi {
        // SAFETY: Any bytes make integers, and the union has no less than these.
        unsafe { self.u.msi }
    }
}

impl kvm_irq_level {
    /// The GSI, before the call.
    pub(crate) fn irq(&self) -> u32 {
        // SAFETY: Both members are integers of the same size.
        unsafe { self.__bindgen_anon_1.irq }
    }

    /// Sets what became of it.
    pub(crate) fn set_status(&mut self, status: i32) {
        self.__bindgen_anon_1.status = status;
    }
}
