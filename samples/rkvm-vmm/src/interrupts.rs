// SPDX-License-Identifier: GPL-2.0

//! From a device's interrupt line to the processors, by whichever controllers the machine has.

use std::sync::Arc;

use kvm_bindings::kvm_irq_routing_entry;
use kvm_bindings::kvm_irq_routing_msi;
use kvm_bindings::kvm_msi;
use kvm_bindings::KvmIrqRouting;
use kvm_bindings::KVM_IRQ_ROUTING_MSI;
use kvm_ioctls::VmFd;

use crate::bus;
use crate::bus::Target;
use crate::devices::ioapic::IoApic;
use crate::devices::ioapic::Message;
use crate::devices::ioapic::Messages;
use crate::devices::ioapic::Routes;
use crate::devices::pic::Pic;
use crate::devices::pit::Pit;
use crate::time::Nanos;

/// The machine's interrupt controllers, as far as they are this program's.
pub enum Interrupts {
    /// All of them: two 8259s, and an 8254 for the time. The vCPU's loop asks for vectors.
    Pics(Box<Pics>),
    /// The I/O APIC; the local APICs are in the kernel and have timers.
    Split(Box<IoApic<Kernel>>),
    /// None; the kernel has local APICs, I/O APIC, 8259s and 8254.
    Kernel(Kernel),
}

/// The controllers of a PC without APICs.
pub struct Pics {
    /// Interrupt controllers.
    pub pic: Pic,
    /// Interval timer.
    pub pit: Pit,
}

impl Pics {
    /// Reads a port of one of them.
    pub fn read(&mut self, port: u16, now: Nanos) -> u8 {
        match bus::decode(port) {
            Target::Pic(register) => self.pic.read(register),
            Target::Pit(offset) => self.pit.read(offset, now),
            Target::PortB => self.pit.read_port_b(now),
            _ => 0xff,
        }
    }

    /// Writes a port of one of them.
    pub fn write(&mut self, port: u16, value: u8, now: Nanos) {
        match bus::decode(port) {
            Target::Pic(register) => self.pic.write(register, value),
            Target::Pit(offset) => self.pit.write(offset, value, now),
            Target::PortB => self.pit.write_port_b(value, now),
            _ => {}
        }
    }
}

impl Interrupts {
    /// Returns controllers as after reset, all in this program.
    pub fn pics() -> Self {
        Self::Pics(Box::new(Pics {
            pic: Pic::new(),
            pit: Pit::new(),
        }))
    }

    /// Returns an I/O APIC that speaks to the local APICs of `vm`.
    pub fn split(vm: Arc<VmFd>) -> Self {
        Self::Split(Box::new(IoApic::new(Kernel(vm))))
    }

    /// Returns wires to the controllers of `vm`.
    pub fn kernel(vm: Arc<VmFd>) -> Self {
        Self::Kernel(Kernel(vm))
    }

    /// The controllers of a PC without APICs, if that is what there is.
    pub fn as_pics(&mut self) -> Option<&mut Pics> {
        match self {
            Self::Pics(pics) => Some(pics),
            _ => None,
        }
    }

    /// The I/O APIC, if it is here.
    pub fn as_ioapic(&mut self) -> Option<&mut IoApic<Kernel>> {
        match self {
            Self::Split(ioapic) => Some(ioapic),
            _ => None,
        }
    }

    /// An edge on line `irq`.
    pub fn pulse(&mut self, irq: u8) {
        match self {
            Self::Pics(pics) => pics.pic.pulse(irq),
            Self::Split(ioapic) => ioapic.pulse(irq),
            Self::Kernel(kernel) => {
                kernel.set_line(irq, true);
                kernel.set_line(irq, false);
            }
        }
    }

    /// Sets the level of an interrupt that only an I/O APIC has.
    pub fn set_level(&mut self, gsi: u8, high: bool) {
        match self {
            Self::Pics(_) => {}
            Self::Split(ioapic) => ioapic.set_level(gsi, high),
            Self::Kernel(kernel) => kernel.set_line(gsi, high),
        }
    }

    /// Passes on the edge of the timer that is due at `now`, if one is.
    pub fn tick(&mut self, now: Nanos) {
        if let Self::Pics(pics) = self {
            if pics.pit.take_edge(now) {
                pics.pic.pulse(bus::IRQ_PIT);
            }
        }
    }

    /// Returns when [`Interrupts::tick`] will have something to do.
    pub fn deadline(&self) -> Option<Nanos> {
        match self {
            Self::Pics(pics) => pics.pit.deadline(),
            _ => None,
        }
    }

    /// Tells whether a vector waits for the processor, here and not in the kernel.
    pub fn intr(&self) -> bool {
        matches!(self, Self::Pics(pics) if pics.pic.intr())
    }
}

/// The part of the controllers that is in the kernel.
pub struct Kernel(Arc<VmFd>);

impl Kernel {
    /// Sets the level of a line of the controllers in the kernel.
    fn set_line(&self, irq: u8, active: bool) {
        if let Err(err) = self.0.set_irq_line(irq.into(), active) {
            complain("KVM_IRQ_LINE", err);
        }
    }
}

impl Messages for Kernel {
    fn send(&mut self, message: Message) {
        let msi = kvm_msi {
            address_lo: message.address,
            data: message.data,
            ..Default::default()
        };
        // That nobody took it (0) is the guest's affair.
        if let Err(err) = self.0.signal_msi(msi) {
            complain("KVM_SIGNAL_MSI", err);
        }
    }

    fn route(&mut self, routes: &Routes) {
        let entries: Vec<_> = routes
            .iter()
            .enumerate()
            .filter_map(|(gsi, message)| message.map(|message| (gsi, message)))
            .map(|(gsi, message)| {
                let mut entry = kvm_irq_routing_entry {
                    gsi: gsi as u32,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi = kvm_irq_routing_msi {
                    address_lo: message.address,
                    data: message.data,
                    ..Default::default()
                };
                entry
            })
            .collect();
        let Ok(routing) = KvmIrqRouting::from_entries(&entries) else {
            // Only for very many more than there are pins.
            return;
        };
        if let Err(err) = self.0.set_gsi_routing(&routing) {
            complain("KVM_SET_GSI_ROUTING", err);
        }
    }
}

/// Says that an interrupt is lost, and why; the guest goes on.
fn complain(ioctl: &str, err: kvm_ioctls::Error) {
    eprintln!("rkvm-vmm: an interrupt does not reach the guest: {ioctl} failed: {err}");
}
