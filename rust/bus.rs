// SPDX-License-Identifier: GPL-2.0

//! Devices in the kernel, which a guest's accesses are offered to before they go to user space.

use crate::coalesced::Coalesced;
use crate::ioeventfd::IoEventFds;
use crate::irq::pit::Pit;
use crate::irq::Irqs;
use crate::irq::Mode;
use crate::x86::ioapic;
use crate::x86::pic;
use crate::x86::pit;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::SetOnce;

/// An address space that devices are in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Space {
    /// Guest-physical addresses that no memslot backs, or not for writes.
    Memory,
    /// I/O ports.
    Ports,
}

/// The devices of one VM.
#[pin_data]
pub(crate) struct Bus {
    irqs: Arc<Irqs>,
    pit: SetOnce<Arc<Pit>>,
    /// The writes that signal an eventfd.
    #[pin]
    pub(crate) eventfds: IoEventFds,
    /// The writes that wait for user space to have a look.
    #[pin]
    pub(crate) coalesced: Coalesced,
}

/// Where registers are, as in KVM: an access that is not all in one of these ranges is user space's.
enum Register {
    Pic(pic::Port),
    Pit(pit::Port),
    Speaker,
}

impl Bus {
    /// A bus without devices: ENOMEM.
    pub(crate) fn new(irqs: Arc<Irqs>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            irqs,
            pit: SetOnce::new(),
            eventfds <- IoEventFds::new(),
            coalesced <- Coalesced::new(),
        }? Error)
    }

    /// KVM_CREATE_PIT2. EEXIST if there is one; ENOENT without an 8259A; ENOMEM.
    pub(crate) fn create_pit(&self, speaker: bool) -> Result {
        if self.pit.as_ref().is_some() {
            return Err(EEXIST);
        }
        if self.irqs.mode() != Mode::Kernel {
            return Err(ENOENT);
        }
        let pit = Pit::new(self.irqs.clone(), speaker)?;
        if self.pit.populate(pit) {
            Ok(())
        } else {
            Err(EEXIST)
        }
    }

    /// The interval timer: ENXIO if there is none.
    pub(crate) fn pit(&self) -> Result<&Pit> {
        self.pit.as_ref().map(|pit| &**pit).ok_or(ENXIO)
    }

    /// Offers a read of the guest's, 1 to 8 bytes at `addr`; returns if a device answered. If not, it
    /// is user space's.
    #[inline]
    pub(crate) fn read(&self, space: Space, addr: u64, data: &mut [u8]) -> bool {
        // Split or none: no device there is answers reads.
        self.irqs.mode() == Mode::Kernel && self.read_chip(space, addr, data)
    }

    fn read_chip(&self, space: Space, addr: u64, data: &mut [u8]) -> bool {
        if space == Space::Memory {
            return is_ioapic(addr, data) && self.irqs.ioapic_read(addr, data);
        }
        let Some(register) = self.register(addr, data.len()) else {
            return false;
        };
        data.fill(0);
        // They have eight bits: wider reads have zeros above, or, from an 8259A, instead.
        let value = match register {
            Register::Pic(_) if data.len() != 1 => 0,
            Register::Pic(port) => self.irqs.pic_read(port),
            Register::Pit(port) => self.pit().map_or(0, |pit| pit.read(port)),
            Register::Speaker => self.pit().map_or(0, Pit::read_speaker),
        };
        if let Some(low) = data.first_mut() {
            *low = value;
        }
        true
    }

    /// Offers a write of the guest's, 1 to 8 bytes at `addr`; returns if a device took it. If not, it
    /// is user space's. May sleep.
    #[inline]
    pub(crate) fn write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        self.irqs.mode() == Mode::Kernel && self.write_chip(space, addr, data)
            || self.eventfds.write(space, addr, data)
            || self.coalesced.write(space, addr, data)
    }

    fn write_chip(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        if space == Space::Memory {
            return is_ioapic(addr, data) && self.irqs.ioapic_write(addr, data);
        }
        let (Some(register), Some(&value)) = (self.register(addr, data.len()), data.first()) else {
            return false;
        };
        match (register, self.pit()) {
            (Register::Pic(port), _) if data.len() == 1 => self.irqs.pic_write(port, value),
            (Register::Pit(port), Ok(pit)) => pit.write(port, value),
            (Register::Speaker, Ok(pit)) => pit.write_speaker(value),
            // Too wide for an 8259A: lost.
            _ => {}
        }
        true
    }

    /// Whether [`Self::write_any`] may find a device.
    #[inline]
    pub(crate) fn takes_any_write(&self) -> bool {
        self.eventfds.takes_any_write()
    }

    /// Offers a write to memory of which nothing but the address is known; returns if a device took
    /// it, whatever is written.
    #[inline]
    pub(crate) fn write_any(&self, gpa: u64) -> bool {
        self.eventfds.write_any(gpa)
    }

    /// The register that an access to a port is for.
    fn register(&self, port: u64, len: usize) -> Option<Register> {
        let port = u16::try_from(port).ok()?;
        // The first port of the range, and how many it has.
        let (first, ports) = match port {
            0x20 | 0x21 => (0x20, 2),
            0xa0 | 0xa1 => (0xa0, 2),
            0x4d0 | 0x4d1 => (0x4d0, 2),
            0x40..=0x43 => (0x40, 4),
            pit::SPEAKER_PORT => (port, 4),
            _ => return None,
        };
        if usize::from(port - first).saturating_add(len) > ports {
            return None;
        }
        if let Some(port) = pic::Port::new(port) {
            return Some(Register::Pic(port));
        }
        let pit = self.pit().ok()?;
        match pit::Port::new(port) {
            Some(port) => Some(Register::Pit(port)),
            None => pit.has_speaker().then_some(Register::Speaker),
        }
    }
}

/// Whether all of an access is where the I/O APIC was made. KVM_SET_IRQCHIP may move it away from there, and
/// then it is nowhere, as in KVM.
#[inline]
fn is_ioapic(gpa: u64, data: &[u8]) -> bool {
    let at = gpa.wrapping_sub(ioapic::DEFAULT_BASE);
    at < ioapic::SIZE && data.len() as u64 <= ioapic::SIZE - at
}
