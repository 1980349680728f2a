// SPDX-License-Identifier: GPL-2.0

//! The calls for lines, controllers, routes and messages.

use crate::sys::{self, Error};
use crate::vm::Vm;
use kvm_bindings as kb;

/// `KVM_IRQ_LINE`.
///
/// # Errors
///
/// What the kernel answered.
pub fn line(vm: &Vm, gsi: u32, level: u32) -> Result<(), Error> {
    let l = kb::kvm_irq_level {
        __bindgen_anon_1: kb::kvm_irq_level__bindgen_ty_1 { irq: gsi },
        level,
    };
    vm.fd.ioctl_ref(sys::KVM_IRQ_LINE, &l)?;
    Ok(())
}

/// `KVM_IRQ_LINE_STATUS`: how many APICs and PICs took it, 0 if it was coalesced, -1 if ignored.
///
/// # Errors
///
/// What the kernel answered.
pub fn line_status(vm: &Vm, gsi: u32, level: u32) -> Result<i32, Error> {
    let mut l = kb::kvm_irq_level {
        __bindgen_anon_1: kb::kvm_irq_level__bindgen_ty_1 { irq: gsi },
        level,
    };
    vm.fd.ioctl_mut(sys::KVM_IRQ_LINE_STATUS, &mut l)?;
    // SAFETY: Both members of the union are integers of one size.
    Ok(unsafe { l.__bindgen_anon_1.status })
}

/// `KVM_GET_IRQCHIP` of chip 0, 1 or 2.
///
/// # Errors
///
/// What the kernel answered.
pub fn chip(vm: &Vm, id: u32) -> Result<kb::kvm_irqchip, Error> {
    let mut c = kb::kvm_irqchip {
        chip_id: id,
        ..Default::default()
    };
    vm.fd.ioctl_mut(sys::KVM_GET_IRQCHIP, &mut c)?;
    Ok(c)
}

/// The state of the I/O APIC.
///
/// # Errors
///
/// What the kernel answered.
pub fn ioapic(vm: &Vm) -> Result<kb::kvm_ioapic_state, Error> {
    // SAFETY: The kernel wrote this member, of plain integers.
    Ok(unsafe { chip(vm, kb::KVM_IRQCHIP_IOAPIC)?.chip.ioapic })
}

/// Sets the state of the I/O APIC.
///
/// # Errors
///
/// What the kernel answered.
pub fn set_ioapic(vm: &Vm, state: kb::kvm_ioapic_state) -> Result<(), Error> {
    let mut c = kb::kvm_irqchip {
        chip_id: kb::KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    c.chip.ioapic = state;
    vm.fd.ioctl_ref(sys::KVM_SET_IRQCHIP, &c)?;
    Ok(())
}

/// A redirection entry of the I/O APIC.
///
/// # Errors
///
/// What the kernel answered.
pub fn entry(vm: &Vm, pin: usize) -> Result<u64, Error> {
    // SAFETY: Each entry is 64 bits.
    Ok(unsafe { ioapic(vm)?.redirtbl[pin].bits })
}

/// Sets a redirection entry of the I/O APIC.
///
/// # Errors
///
/// What the kernel answered.
pub fn set_entry(vm: &Vm, pin: usize, bits: u64) -> Result<(), Error> {
    let mut state = ioapic(vm)?;
    state.redirtbl[pin].bits = bits;
    set_ioapic(vm, state)
}

/// Bits of a redirection entry of the I/O APIC, and of an MSI's data as far as they agree.
pub mod redirect {
    /// To a set of processors, not to one APIC.
    pub const LOGICAL: u64 = 1 << 11;
    /// Active low.
    pub const LOW: u64 = 1 << 13;
    /// Sent, and no EOI yet.
    pub const REMOTE_IRR: u64 = 1 << 14;
    /// Level-triggered.
    pub const LEVEL: u64 = 1 << 15;
    /// Masked.
    pub const MASKED: u64 = 1 << 16;
    /// Delivery mode: the one with the lowest priority.
    pub const LOWEST: u64 = 1 << 8;
    /// Delivery mode: NMI.
    pub const NMI: u64 = 4 << 8;
    /// Delivery mode: ExtINT.
    pub const EXTINT: u64 = 7 << 8;

    /// The destination.
    #[must_use]
    pub const fn to(id: u8) -> u64 {
        (id as u64) << 56
    }
}

/// The state of a PIC.
///
/// # Errors
///
/// What the kernel answered.
pub fn pic(vm: &Vm, id: u32) -> Result<kb::kvm_pic_state, Error> {
    // SAFETY: The kernel wrote this member, of plain integers.
    Ok(unsafe { chip(vm, id)?.chip.pic })
}

/// Sets the state of a PIC.
///
/// # Errors
///
/// What the kernel answered.
pub fn set_pic(vm: &Vm, id: u32, state: kb::kvm_pic_state) -> Result<(), Error> {
    let mut c = kb::kvm_irqchip {
        chip_id: id,
        ..Default::default()
    };
    c.chip.pic = state;
    vm.fd.ioctl_ref(sys::KVM_SET_IRQCHIP, &c)?;
    Ok(())
}

/// `KVM_SIGNAL_MSI`: how many vCPUs took it.
///
/// # Errors
///
/// What the kernel answered.
pub fn msi(vm: &Vm, address: u64, data: u32) -> Result<i32, Error> {
    let m = kb::kvm_msi {
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        ..Default::default()
    };
    vm.fd.ioctl_ref(sys::KVM_SIGNAL_MSI, &m)
}

/// A route of `gsi` to a pin of a chip.
#[must_use]
pub fn to_pin(gsi: u32, irqchip: u32, pin: u32) -> kb::kvm_irq_routing_entry {
    let mut e = kb::kvm_irq_routing_entry {
        gsi,
        type_: kb::KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    e.u.irqchip = kb::kvm_irq_routing_irqchip { irqchip, pin };
    e
}

/// A route of `gsi` to a message.
#[must_use]
pub fn to_msi(gsi: u32, address: u64, data: u32) -> kb::kvm_irq_routing_entry {
    let mut e = kb::kvm_irq_routing_entry {
        gsi,
        type_: kb::KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    e.u.msi = kb::kvm_irq_routing_msi {
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        ..Default::default()
    };
    e
}

/// `KVM_SET_GSI_ROUTING`.
///
/// # Errors
///
/// What the kernel answered.
pub fn route(vm: &Vm, entries: &[kb::kvm_irq_routing_entry]) -> Result<(), Error> {
    let nr = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    route_raw(vm, nr, 0, entries)
}

/// `KVM_SET_GSI_ROUTING` with a header that may be wrong.
///
/// # Errors
///
/// What the kernel answered.
pub fn route_raw(
    vm: &Vm,
    nr: u32,
    flags: u32,
    entries: &[kb::kvm_irq_routing_entry],
) -> Result<(), Error> {
    const ENTRY: usize = size_of::<kb::kvm_irq_routing_entry>();
    let mut buffer = vec![0u64; 1 + entries.len() * ENTRY / 8];
    buffer[0] = u64::from(nr) | (u64::from(flags) << 32);
    // SAFETY: The buffer has room for the header and for all entries, which are plain integers and
    // no more aligned than its elements.
    unsafe {
        let to: *mut kb::kvm_irq_routing_entry = buffer.as_mut_ptr().add(1).cast();
        std::ptr::copy_nonoverlapping(entries.as_ptr(), to, entries.len());
    }
    vm.fd
        .ioctl(sys::KVM_SET_GSI_ROUTING, buffer.as_ptr() as usize)?;
    Ok(())
}

/// `KVM_IRQFD`; `resample` is the eventfd of a level-triggered one.
///
/// # Errors
///
/// What the kernel answered.
pub fn irqfd(vm: &Vm, fd: i32, gsi: u32, flags: u32, resample: Option<i32>) -> Result<(), Error> {
    let i = kb::kvm_irqfd {
        fd: fd as u32,
        gsi,
        flags: flags
            | if resample.is_some() {
                kb::KVM_IRQFD_FLAG_RESAMPLE
            } else {
                0
            },
        resamplefd: resample.unwrap_or(0) as u32,
        ..Default::default()
    };
    vm.fd.ioctl_ref(sys::KVM_IRQFD, &i)?;
    Ok(())
}
