// SPDX-License-Identifier: GPL-2.0

//! Message-signalled interrupts: what a write to the address space of the local APICs means (SDM
//! vol. 3, 12.11).

use crate::bindings::kvm_irq_routing_msi;
use crate::bindings::kvm_msi;
use crate::x86::apic::message::Broadcast;
use crate::x86::apic::message::DeliveryMode;
use crate::x86::apic::message::IdFormat;
use crate::x86::apic::message::Level;
use crate::x86::apic::message::Message;
use crate::x86::apic::message::Target;
use crate::x86::apic::message::XAPIC_BROADCAST;
use crate::x86::line::Trigger;

/// A message's address and data. That the address is one of the local APICs is not looked at.
#[derive(Clone, Copy)]
pub(crate) struct Msi {
    address_lo: u32,
    address_hi: u32,
    data: u32,
}

impl Msi {
    /// What a route says.
    pub(super) const fn of_route(msi: &kvm_irq_routing_msi) -> Self {
        Self {
            address_lo: msi.address_lo,
            address_hi: msi.address_hi,
            data: msi.data,
        }
    }

    /// What the user says.
    pub(super) const fn of_user(msi: &kvm_msi) -> Self {
        Self {
            address_lo: msi.address_lo,
            address_hi: msi.address_hi,
            data: msi.data,
        }
    }

    /// Whether the address has bits that would be lost: with 32-bit IDs, the upper half has those of
    /// the destination above bit 7, and nothing else.
    pub(super) const fn is_valid(&self, ids: IdFormat) -> bool {
        match ids {
            IdFormat::Narrow => true,
            IdFormat::Wide => self.address_hi & 0xff == 0,
        }
    }

    /// The local APICs' message. None if its delivery mode means nothing to them.
    pub(super) fn message(&self, ids: IdFormat, broadcast: Broadcast) -> Option<Message> {
        const LOGICAL: u32 = 1 << 2;
        const REDIRECTION: u32 = 1 << 3;
        const LEVEL: u32 = 1 << 15;
        let low = (self.address_lo >> 12) & 0xff;
        let destination = match ids {
            IdFormat::Narrow => low,
            IdFormat::Wide => low | self.address_hi & !0xff,
        };
        let mode = match DeliveryMode::new(self.data >> 8)? {
            // There is no SIPI from a device.
            DeliveryMode::Startup => return None,
            // As in KVM, the hint is taken: one of the destinations will do.
            DeliveryMode::Fixed if self.address_lo & REDIRECTION != 0 => {
                DeliveryMode::LowestPriority
            }
            mode => mode,
        };
        Some(Message {
            mode,
            vector: self.data as u8,
            level: Level::Assert,
            trigger: if self.data & LEVEL != 0 {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            target: match (destination, broadcast) {
                (XAPIC_BROADCAST, Broadcast::Everyone) => Target::All,
                _ if self.address_lo & LOGICAL != 0 => Target::Logical(destination),
                _ => Target::Physical(destination),
            },
        })
    }
}
