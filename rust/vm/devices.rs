// SPDX-License-Identifier: GPL-2.0

//! The VM's ioctls and capabilities that are about interrupts and devices in the kernel.

use super::Vm;
use crate::abi::ioctl;
use crate::abi::kvm_enable_cap;
use crate::abi::kvm_irq_level;
use crate::abi::kvm_pit_config;
use crate::abi::kvm_reinject_control;
use crate::abi::MAX_VCPU_IDS;
use crate::backend::Backend;
use crate::backend::FreeInstructions;
use crate::bindings::KVM_CAP_DISABLE_QUIRKS;
use crate::bindings::KVM_CAP_DISABLE_QUIRKS2;
use crate::bindings::KVM_CAP_EXCEPTION_PAYLOAD;
use crate::bindings::KVM_CAP_EXIT_HYPERCALL;
use crate::bindings::KVM_CAP_EXIT_ON_EMULATION_FAILURE;
use crate::bindings::KVM_CAP_MSR_PLATFORM_INFO;
use crate::bindings::KVM_CAP_SPLIT_IRQCHIP;
use crate::bindings::KVM_CAP_X2APIC_API;
use crate::bindings::KVM_CAP_X86_APIC_BUS_CYCLES_NS;
use crate::bindings::KVM_CAP_X86_DISABLE_EXITS;
use crate::bindings::KVM_CAP_X86_TRIPLE_FAULT_EVENT;
use crate::bindings::KVM_CAP_X86_USER_SPACE_MSR;
use crate::bindings::KVM_PIT_SPEAKER_DUMMY;
use crate::bindings::KVM_VCPUEVENT_VALID_PAYLOAD;
use crate::bindings::KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
use crate::bindings::KVM_X86_DISABLE_EXITS_HLT;
use crate::bindings::KVM_X86_DISABLE_EXITS_MWAIT;
use crate::bindings::KVM_X86_DISABLE_EXITS_PAUSE;
use crate::irq::Irqs;
use crate::linux::cpu;
use crate::linux::user;
use crate::options::QUIRKS;
use crate::x86::apic::timer::BusPeriod;
use crate::x86::line::Signal;
use crate::x86::line::Source;
use crate::x86::pit::PitChannelState;
use core::sync::atomic::Ordering;
use kernel::prelude::*;

/// What KVM_CAP_X86_DISABLE_EXITS can let a guest do without an exit.
pub(crate) fn disableable_exits() -> u32 {
    let mwait = if cpu::guest_may_mwait() {
        KVM_X86_DISABLE_EXITS_MWAIT
    } else {
        0
    };
    KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE | mwait
}

impl<B: Backend> Vm<B> {
    /// An ioctl of the VM's: ENOTTY if it is none.
    pub(super) fn device_ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            ioctl::CREATE_IRQCHIP => self.create_irqchip()?,
            ioctl::IRQ_LINE => {
                let (_, gsi, signal) = self.irq_line(arg)?;
                self.irqs.set_line(gsi, Source::USER, signal);
            }
            ioctl::IRQ_LINE_STATUS => {
                let (mut level, gsi, signal) = self.irq_line(arg)?;
                level.set_status(self.irqs.set_line_status(gsi, signal) as i32);
                user::write(arg, &level)?;
            }
            ioctl::GET_IRQCHIP => self.irqs.get_chip(arg)?,
            ioctl::SET_IRQCHIP => self.irqs.set_chip(arg)?,
            ioctl::SET_GSI_ROUTING => self.irqs.set_routes(arg)?,
            ioctl::SIGNAL_MSI => return self.irqs.signal_msi(&user::read(arg)?),
            ioctl::IRQFD => self.irqfds.change(&user::read(arg)?)?,
            ioctl::IOEVENTFD => self.bus.eventfds.change(&user::read(arg)?)?,
            ioctl::CREATE_PIT => self.create_pit(KVM_PIT_SPEAKER_DUMMY)?,
            ioctl::CREATE_PIT2 => self.create_pit(user::read::<kvm_pit_config>(arg)?.flags)?,
            ioctl::GET_PIT => {
                user::read::<[PitChannelState; 3]>(arg)?;
                user::write(arg, &self.bus.pit()?.state().channels)?;
            }
            ioctl::SET_PIT => {
                let channels = user::read(arg)?;
                self.bus.pit()?.set_channels(&channels);
            }
            ioctl::GET_PIT2 => user::write(arg, &self.bus.pit()?.state())?,
            ioctl::SET_PIT2 => {
                let state = user::read(arg)?;
                self.bus.pit()?.set_state(&state);
            }
            ioctl::REINJECT_CONTROL => {
                let control = user::read::<kvm_reinject_control>(arg)?;
                self.bus.pit()?.set_reinject(control.pit_reinject != 0);
            }
            ioctl::SET_BOOT_CPU_ID => self.set_boot_cpu_id(arg)?,
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }

    /// KVM_CREATE_IRQCHIP: EEXIST if there are interrupt controllers in the kernel, EINVAL if there are
    /// vCPUs; ENOMEM.
    fn create_irqchip(&self) -> Result {
        let vcpus = self.vcpus.lock();
        if self.irqs.in_kernel() {
            return Err(EEXIST);
        }
        if !vcpus.is_empty() {
            return Err(EINVAL);
        }
        self.irqs.create_kernel()
    }

    /// KVM_CAP_SPLIT_IRQCHIP: EINVAL for more GSIs than there are; EEXIST if there are interrupt
    /// controllers in the kernel, or vCPUs.
    fn create_split_irqchip(&self, pins: u64) -> Result {
        let pins = Irqs::check_pins(pins)?;
        let vcpus = self.vcpus.lock();
        if self.irqs.in_kernel() || !vcpus.is_empty() {
            return Err(EEXIST);
        }
        self.irqs.create_split(pins);
        Ok(())
    }

    /// What KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS ask for: EFAULT; ENXIO without interrupt controllers.
    fn irq_line(&self, arg: usize) -> Result<(kvm_irq_level, u32, Signal)> {
        let level = user::read::<kvm_irq_level>(arg)?;
        if !self.irqs.in_kernel() {
            return Err(ENXIO);
        }
        Ok((level, level.irq(), Signal::new(level.level != 0)))
    }

    /// KVM_CREATE_PIT2: EEXIST, ENOENT without an 8259A, ENOMEM.
    fn create_pit(&self, flags: u32) -> Result {
        let _vcpus = self.vcpus.lock();
        self.bus.create_pit(flags & KVM_PIT_SPEAKER_DUMMY != 0)
    }

    /// KVM_SET_BOOT_CPU_ID: EBUSY if there are vCPUs, EINVAL for an identifier that none can have. One
    /// more is taken, as in KVM.
    fn set_boot_cpu_id(&self, id: usize) -> Result {
        let vcpus = self.vcpus.lock();
        if !vcpus.is_empty() {
            return Err(EBUSY);
        }
        if id > MAX_VCPU_IDS || id > vcpus.limit() {
            return Err(EINVAL);
        }
        self.boot_cpu_id.store(id as u32, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_ENABLE_CAP: EINVAL for what cannot be enabled, or not so.
    pub(super) fn enable_device_cap(&self, cap: &kvm_enable_cap) -> Result {
        if cap.flags != 0 {
            return Err(EINVAL);
        }
        match cap.cap {
            KVM_CAP_SPLIT_IRQCHIP => self.create_split_irqchip(cap.args[0]),
            KVM_CAP_X2APIC_API => self.apics.set_x2apic_api(cap.args[0]),
            KVM_CAP_X86_APIC_BUS_CYCLES_NS => {
                BusPeriod::new(cap.args[0]).ok_or(EINVAL)?;
                if !self.irqs.in_kernel() {
                    return Err(ENXIO);
                }
                self.apics.set_bus_cycle(cap.args[0])
            }
            KVM_CAP_EXIT_HYPERCALL => self.options.set_hypercall_exits(cap.args[0]),
            KVM_CAP_X86_USER_SPACE_MSR => self.msrs.set_exits(cap.args[0]),
            KVM_CAP_MSR_PLATFORM_INFO => {
                self.msrs.show_platform_info(cap.args[0] != 0);
                Ok(())
            }
            KVM_CAP_X86_DISABLE_EXITS => self.disable_exits(cap.args[0]),
            KVM_CAP_EXCEPTION_PAYLOAD => {
                let shown = cap.args[0] & 1 != 0;
                self.options
                    .show_event_field(KVM_VCPUEVENT_VALID_PAYLOAD, shown);
                Ok(())
            }
            KVM_CAP_X86_TRIPLE_FAULT_EVENT => {
                let shown = cap.args[0] & 1 != 0;
                self.options
                    .show_event_field(KVM_VCPUEVENT_VALID_TRIPLE_FAULT, shown);
                Ok(())
            }
            // It is never otherwise.
            KVM_CAP_EXIT_ON_EMULATION_FAILURE if cap.args[0] <= 1 => Ok(()),
            KVM_CAP_DISABLE_QUIRKS2 if cap.args[0] & !u64::from(QUIRKS) != 0 => Err(EINVAL),
            KVM_CAP_DISABLE_QUIRKS | KVM_CAP_DISABLE_QUIRKS2 => {
                self.options.disable_quirks(cap.args[0]);
                Ok(())
            }
            _ => Err(EINVAL),
        }
    }

    /// What KVM_CAP_X86_DISABLE_EXITS has set.
    pub(crate) fn free_instructions(&self) -> FreeInstructions {
        let exits = self.disabled_exits.load(Ordering::Relaxed);
        FreeInstructions {
            hlt: exits & KVM_X86_DISABLE_EXITS_HLT != 0,
            mwait: exits & KVM_X86_DISABLE_EXITS_MWAIT != 0,
            pause: exits & KVM_X86_DISABLE_EXITS_PAUSE != 0,
        }
    }

    /// KVM_CAP_X86_DISABLE_EXITS: EINVAL for what must not be, or if there are vCPUs.
    fn disable_exits(&self, exits: u64) -> Result {
        if exits & !u64::from(disableable_exits()) != 0 {
            return Err(EINVAL);
        }
        let vcpus = self.vcpus.lock();
        if !vcpus.is_empty() {
            return Err(EINVAL);
        }
        self.disabled_exits
            .fetch_or(exits as u32, Ordering::Relaxed);
        Ok(())
    }
}
