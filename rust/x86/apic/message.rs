// SPDX-License-Identifier: GPL-2.0

//! Interrupt messages: what the interrupt command register asks for, and whom it means (SDM vol. 3, 12.6).

use super::super::bits::bit_flags;
use super::super::ioapic::entry;
use super::super::line::Trigger;
use super::base::ApicMode;
use super::regs::DestinationFormat;

/// What a message is (SDM vol. 3, 12.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// A vector, for all destinations.
    Fixed,
    /// A vector, for one of the destinations: [`arbitrate`](super::map::arbitrate).
    LowestPriority,
    /// A system-management interrupt.
    Smi,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// A SIPI; the vector is where the processor begins.
    Startup,
    /// The vector is that of the interrupt controller outside.
    ExtInt,
}

impl DeliveryMode {
    /// What three bits mean; 3 is reserved.
    #[must_use]
    pub const fn new(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => return None,
        })
    }

    /// Whether it puts a vector into IRR.
    #[must_use]
    pub const fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// Which way a level goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// It is no more.
    Deassert,
    /// It is.
    Assert,
}

/// Whom a message is for: the destination mode, the shorthand and the destination, of which only some combinations mean anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The APIC with an ID. 0xff is every APIC in xAPIC mode, and 0xffff_ffff every one.
    Physical(u32),
    /// Those that a logical destination names, and the same for all ones.
    Logical(u32),
    /// Who sends it.
    Itself,
    /// Every APIC.
    All,
    /// Every APIC but who sends it.
    Others,
}

/// A message to one or more APICs, from another one or from a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub mode: DeliveryMode,
    /// The vector, where the mode has one.
    pub vector: u8,
    /// Of the level, which way.
    pub level: Level,
    /// Edge or level.
    pub trigger: Trigger,
    /// For whom.
    pub target: Target,
}

/// Whom 0xff is in the message of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Broadcast {
    /// Every APIC: without interrupt remapping, there is no other way to name them all in x2APIC mode.
    #[default]
    Everyone,
    /// Those in xAPIC mode; in x2APIC mode it is an ID, or the first half of a cluster (KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK).
    ByMode,
}

/// Why a command sends nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotSent {
    /// It ends an INIT's level. Processors since the Pentium 4 ignore it.
    InitDeassert,
    /// Its delivery mode is reserved.
    ReservedMode,
    /// Its vector is one of 0 to 15: an error.
    IllegalVector,
}

/// The lowest vector that an APIC takes (SDM vol. 3, 12.5.2).
pub const FIRST_VECTOR: u8 = 16;

bit_flags! {
    /// The low half of the interrupt command register (SDM vol. 3, figures 12-12 and 12-28). The vector is in bits 7:0, the delivery
    /// mode in 10:8, the shorthand in 19:18.
    pub struct IcrLow(u32) {
        /// The destination is logical.
        LOGICAL = 1 << 11;
        /// The message is on its way. Read-only, and gone in x2APIC mode; delivery takes no time here.
        SEND_PENDING = 1 << 12;
        /// Assert.
        ASSERT = 1 << 14;
        /// Level-triggered.
        LEVEL = 1 << 15;
    }
}

impl IcrLow {
    /// The bits that are reserved in x2APIC mode.
    pub const X2APIC_RESERVED: u32 = 0xfff0_0000 | (3 << 16) | (1 << 13);

    /// The message that a command sends. `destination` is the APIC's as far as it is wide: the upper half of the register in x2APIC
    /// mode, its upper eight bits in xAPIC mode.
    ///
    /// # Errors
    ///
    /// [`NotSent`] if there is none.
    pub const fn decode(self, destination: u32) -> Result<Message, NotSent> {
        let mode = match DeliveryMode::new(self.bits() >> 8) {
            // There is no other controller's vector to send.
            None | Some(DeliveryMode::ExtInt) => return Err(NotSent::ReservedMode),
            Some(mode) => mode,
        };
        let message = Message {
            mode,
            vector: self.bits() as u8,
            level: if self.has(Self::ASSERT) {
                Level::Assert
            } else {
                Level::Deassert
            },
            trigger: if self.has(Self::LEVEL) {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            target: match (self.bits() >> 18) & 3 {
                1 => Target::Itself,
                2 => Target::All,
                3 => Target::Others,
                _ if self.has(Self::LOGICAL) => Target::Logical(destination),
                _ => Target::Physical(destination),
            },
        };
        if message.is_init_deassert() {
            Err(NotSent::InitDeassert)
        } else if mode.has_vector() && message.vector < FIRST_VECTOR {
            Err(NotSent::IllegalVector)
        } else {
            Ok(message)
        }
    }
}

impl Message {
    /// An edge with a vector.
    #[must_use]
    pub const fn fixed(vector: u8, target: Target) -> Self {
        Self {
            mode: DeliveryMode::Fixed,
            vector,
            level: Level::Assert,
            trigger: Trigger::Edge,
            target,
        }
    }

    /// The message of an I/O APIC, or of a device that writes like one: eight bits of destination. None if its delivery mode is reserved.
    ///
    /// There is no SIPI from there. A level is asserted: its end is no message.
    #[must_use]
    pub const fn from_io_apic(message: &entry::Message, broadcast: Broadcast) -> Option<Self> {
        let destination = message.destination as u32;
        Some(Self {
            mode: match message.delivery_mode {
                entry::DeliveryMode::Fixed => DeliveryMode::Fixed,
                entry::DeliveryMode::LowestPriority => DeliveryMode::LowestPriority,
                entry::DeliveryMode::Smi => DeliveryMode::Smi,
                entry::DeliveryMode::Nmi => DeliveryMode::Nmi,
                entry::DeliveryMode::Init => DeliveryMode::Init,
                entry::DeliveryMode::ExtInt => DeliveryMode::ExtInt,
                entry::DeliveryMode::Reserved => return None,
            },
            vector: message.vector,
            level: Level::Assert,
            trigger: message.trigger,
            target: match (destination, broadcast, message.destination_mode) {
                (XAPIC_BROADCAST, Broadcast::Everyone, _) => Target::All,
                (_, _, entry::DestinationMode::Physical) => Target::Physical(destination),
                (_, _, entry::DestinationMode::Logical) => Target::Logical(destination),
            },
        })
    }

    /// Whether it is the end of a level-triggered INIT.
    #[must_use]
    pub const fn is_init_deassert(&self) -> bool {
        matches!(
            (self.mode, self.trigger, self.level),
            (DeliveryMode::Init, Trigger::Level, Level::Deassert)
        )
    }
}

/// How wide the IDs are that a VMM uses (KVM_X2APIC_API_USE_32BIT_IDS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdFormat {
    /// Eight bits, at the top of the register's image, in x2APIC mode too.
    #[default]
    Narrow,
    /// All 32 bits in x2APIC mode.
    Wide,
}

/// What an APIC answers to, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its initial ID, which is its ID in x2APIC mode.
    pub id: u32,
    /// Its mode. If disabled, it answers to nothing.
    pub mode: ApicMode,
    /// Its ID in xAPIC mode, which software can change.
    pub xapic_id: u8,
    /// The logical destination register.
    pub ldr: u32,
    /// How it reads logical destinations in xAPIC mode.
    pub format: DestinationFormat,
    /// How the VMM names it.
    pub ids: IdFormat,
}

/// The logical ID in x2APIC mode: the cluster, and one bit of 16 (SDM vol. 3, 12.12.10.2).
#[must_use]
pub const fn x2apic_ldr(id: u32) -> u32 {
    ((id >> 4) << 16) | (1 << (id & 0xf))
}

/// The destination that means every APIC in xAPIC mode.
pub const XAPIC_BROADCAST: u32 = 0xff;
/// The destination that means every APIC.
pub const X2APIC_BROADCAST: u32 = 0xffff_ffff;

impl Identity {
    /// The logical ID of xAPIC mode.
    #[must_use]
    pub const fn xapic_logical(&self) -> u8 {
        (self.ldr >> 24) as u8
    }

    /// The physical IDs that it answers to.
    ///
    /// In xAPIC mode, an APIC whose initial ID is wider than eight bits could not be reached, or only together with the one whose ID its
    /// own ends in. As in KVM, it answers to its initial ID; and if the VMM uses wide IDs, not to the end of it.
    #[must_use]
    pub const fn physical_ids(&self) -> [Option<u32>; 2] {
        match self.mode {
            ApicMode::Disabled => [None, None],
            ApicMode::X2apic => [Some(self.id), None],
            ApicMode::Xapic => {
                let wide = self.id > 0xff;
                let cut = wide && self.xapic_id == self.id as u8;
                [
                    if cut && matches!(self.ids, IdFormat::Wide) {
                        None
                    } else {
                        Some(self.xapic_id as u32)
                    },
                    if wide { Some(self.id) } else { None },
                ]
            }
        }
    }

    fn matches_physical(&self, destination: u32) -> bool {
        self.physical_ids().contains(&Some(destination))
    }

    fn matches_logical(&self, destination: u32) -> bool {
        if matches!(self.mode, ApicMode::X2apic) {
            let ldr = self.ldr;
            return ldr >> 16 == destination >> 16 && ldr & destination & 0xffff != 0;
        }
        let logical = u32::from(self.xapic_logical());
        match self.format {
            DestinationFormat::Flat => logical & destination != 0,
            DestinationFormat::Cluster => {
                logical >> 4 == destination >> 4 && logical & destination & 0xf != 0
            }
            DestinationFormat::Reserved => false,
        }
    }

    /// Whether a message is for this APIC. `sender` is the initial ID of the APIC that sends it; a device has none.
    #[must_use]
    pub fn matches(&self, target: Target, sender: Option<u32>) -> bool {
        if matches!(self.mode, ApicMode::Disabled) {
            return false;
        }
        match target {
            Target::All
            | Target::Physical(X2APIC_BROADCAST)
            | Target::Logical(X2APIC_BROADCAST) => true,
            Target::Itself => sender == Some(self.id),
            Target::Others => sender != Some(self.id),
            Target::Physical(XAPIC_BROADCAST) | Target::Logical(XAPIC_BROADCAST)
                if matches!(self.mode, ApicMode::Xapic) =>
            {
                true
            }
            Target::Physical(destination) => self.matches_physical(destination),
            Target::Logical(destination) => self.matches_logical(destination),
        }
    }
}
