// SPDX-License-Identifier: GPL-2.0

//! Entries of the I/O APIC's redirection table, and the messages that they make (82093AA, 3.2.4).

use super::super::bits::bit_flags;
use super::super::line::Trigger;

bit_flags! {
    /// An entry. Bits without a name or a method below are reserved; they keep what was written, as in KVM.
    pub struct Entry(u64) {
        /// The destination is a logical one.
        LOGICAL = 1 << 11;
        /// Delivery status: a message waits for the bus. It never does here, but KVM_SET_IRQCHIP may set the bit. Read-only.
        SEND_PENDING = 1 << 12;
        /// Polarity: the pin is active low. It is kept and means nothing: who drives a pin says whether it is asserted.
        ACTIVE_LOW = 1 << 13;
        /// Remote IRR: a local APIC has taken a level-triggered message and not yet ended it. Read-only.
        REMOTE_IRR = 1 << 14;
        /// Trigger mode: level.
        LEVEL = 1 << 15;
        /// No message is sent.
        MASKED = 1 << 16;
    }
}

impl Entry {
    const READ_ONLY: Self = Self::SEND_PENDING.with(Self::REMOTE_IRR);
    const LOW_HALF: u64 = 0xffff_ffff;

    /// The vector.
    #[inline]
    #[must_use]
    pub const fn vector(self) -> u8 {
        self.bits() as u8
    }

    /// How the message is to be delivered.
    #[inline]
    #[must_use]
    pub const fn delivery_mode(self) -> DeliveryMode {
        DeliveryMode::from_bits((self.bits() >> 8) as u8)
    }

    /// How the destination is to be read.
    #[inline]
    #[must_use]
    pub const fn destination_mode(self) -> DestinationMode {
        if self.has(Self::LOGICAL) {
            DestinationMode::Logical
        } else {
            DestinationMode::Physical
        }
    }

    /// The destination.
    #[inline]
    #[must_use]
    pub const fn destination(self) -> u8 {
        (self.bits() >> 56) as u8
    }

    /// What makes the pin send.
    #[inline]
    #[must_use]
    pub const fn trigger(self) -> Trigger {
        if self.has(Self::LEVEL) {
            Trigger::Level
        } else {
            Trigger::Edge
        }
    }

    /// Whether a level-triggered message was taken and not yet ended.
    #[inline]
    #[must_use]
    pub const fn awaits_eoi(self) -> bool {
        self.has(Self::LEVEL.with(Self::REMOTE_IRR))
    }

    /// One of its two registers: bits 0 to 31, or 32 to 63.
    #[inline]
    #[must_use]
    pub const fn half(self, half: Half) -> u32 {
        match half {
            Half::Low => self.bits() as u32,
            Half::High => (self.bits() >> 32) as u32,
        }
    }

    /// The entry after a write of one of its two registers.
    #[must_use]
    pub const fn with_half(self, half: Half, value: u32) -> Self {
        let value = value as u64;
        let written = Self::new(match half {
            Half::Low => (self.bits() & !Self::LOW_HALF) | value,
            Half::High => (self.bits() & Self::LOW_HALF) | (value << 32),
        });
        let entry = written
            .without(Self::READ_ONLY)
            .with(self.and(Self::READ_ONLY));
        match entry.trigger() {
            // Linux and Xen end an interrupt so where there is no EOI register: to edge, and back to level.
            Trigger::Edge => entry.without(Self::REMOTE_IRR),
            Trigger::Level => entry,
        }
    }

    /// The message that the entry makes.
    #[must_use]
    pub const fn message(self) -> Message {
        Message {
            vector: self.vector(),
            delivery_mode: self.delivery_mode(),
            destination_mode: self.destination_mode(),
            destination: self.destination(),
            trigger: self.trigger(),
        }
    }
}

/// Which of the two registers of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

/// What the receiver of a message does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// An interrupt for every processor of the destination.
    Fixed,
    /// An interrupt for the one processor of the destination that has the lowest priority.
    LowestPriority,
    /// A system-management interrupt.
    Smi,
    /// An NMI.
    Nmi,
    /// INIT.
    Init,
    /// An interrupt whose vector an 8259A gives.
    ExtInt,
    /// One of the two encodings that mean nothing (3 and 6).
    Reserved,
}

impl DeliveryMode {
    /// From the low three bits of `bits`.
    const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }
}

/// How the destination of a message is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationMode {
    /// The ID of a local APIC; 255 is all of them.
    Physical,
    /// A set of local APICs, which each compares with its logical ID.
    Logical,
}

/// What the I/O APIC sends to the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The vector. Without meaning for SMI, NMI, INIT and ExtINT.
    pub vector: u8,
    /// What it does.
    pub delivery_mode: DeliveryMode,
    /// How `destination` is to be read.
    pub destination_mode: DestinationMode,
    /// For whom it is: eight bits, as in xAPIC mode.
    pub destination: u8,
    /// Whether the receiver is to tell its EOI to the I/O APIC: it does for [`Trigger::Level`].
    pub trigger: Trigger,
}
