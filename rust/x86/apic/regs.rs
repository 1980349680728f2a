// SPDX-License-Identifier: GPL-2.0

//! The registers of the local APIC: where each is, in which mode it exists, and which bits it has (SDM vol. 3, 12.4.1 and 12.12.1).

use super::super::bits::bit_flags;
use super::base::ApicMode;

/// A register of 256 bits, one for each vector, in eight words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// In service: delivered to the processor, and not at its end.
    Isr,
    /// Trigger mode: set if the vector came by a level.
    Tmr,
    /// Requested: accepted, and not delivered to the processor.
    Irr,
}

impl Bank {
    /// Where a word of it is in the page; the first is word 0.
    #[inline]
    #[must_use]
    pub const fn offset(self, word: u8) -> u16 {
        let first = match self {
            Self::Isr => 0x100,
            Self::Tmr => 0x180,
            Self::Irr => 0x200,
        };
        first | (((word & 7) as u16) << 4)
    }
}

/// An entry of the local vector table (SDM vol. 3, 12.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LvtEntry {
    /// Corrected machine checks; only where MCG_CAP has CMCI_P.
    Cmci,
    /// The timer.
    Timer,
    /// The thermal sensor.
    Thermal,
    /// Overflow of a performance counter.
    Perfmon,
    /// The pin LINT0.
    Lint0,
    /// The pin LINT1.
    Lint1,
    /// An error of the APIC itself.
    Error,
}

/// Which entries there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LvtSet {
    /// All but [`LvtEntry::Cmci`].
    #[default]
    Basic,
    /// All.
    WithCmci,
}

impl LvtSet {
    /// Whether an entry exists.
    #[must_use]
    pub const fn contains(self, entry: LvtEntry) -> bool {
        matches!(self, Self::WithCmci) || !matches!(entry, LvtEntry::Cmci)
    }

    /// The number of entries less one, as the version register has it.
    #[must_use]
    pub const fn max_index(self) -> u32 {
        match self {
            Self::Basic => 5,
            Self::WithCmci => 6,
        }
    }
}

/// Which modes the timer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimerModes {
    /// One-shot and periodic.
    #[default]
    Counters,
    /// TSC-deadline as well: CPUID.1:ECX.TSC_DEADLINE.
    WithTscDeadline,
}

bit_flags! {
    /// A word of the local vector table. Its vector is in bits 7:0, its delivery mode in 10:8, and the timer's mode in 18:17.
    pub struct Lvt(u32) {
        /// The interrupt is on its way. Read-only; delivery takes no time here, so it is never set.
        SEND_PENDING = 1 << 12;
        /// The pin is active low.
        ACTIVE_LOW = 1 << 13;
        /// A level-triggered interrupt is being serviced. Read-only; pins are messages here, so it is never set.
        REMOTE_IRR = 1 << 14;
        /// The pin is level-triggered.
        LEVEL = 1 << 15;
        /// No interrupt is delivered.
        MASKED = 1 << 16;
    }
}

impl Lvt {
    /// The vector.
    #[must_use]
    pub const fn vector(self) -> u8 {
        self.bits() as u8
    }

    /// The bits that have a delivery mode (SDM vol. 3, figure 12-8).
    pub(super) const MODE: u32 = 0x700;

    /// The delivery mode: three bits.
    #[must_use]
    pub const fn mode_bits(self) -> u32 {
        (self.bits() & Self::MODE) >> 8
    }
}

impl LvtEntry {
    /// Every entry.
    pub const ALL: [Self; 7] = [
        Self::Cmci,
        Self::Timer,
        Self::Thermal,
        Self::Perfmon,
        Self::Lint0,
        Self::Lint1,
        Self::Error,
    ];

    /// The bits that software can write.
    #[must_use]
    pub const fn writable(self, timer: TimerModes) -> u32 {
        let common = 0xff | Lvt::MASKED.bits();
        match self {
            Self::Timer => match timer {
                TimerModes::Counters => common | (1 << 17),
                TimerModes::WithTscDeadline => common | (3 << 17),
            },
            Self::Error => common,
            Self::Cmci | Self::Thermal | Self::Perfmon => common | Lvt::MODE,
            Self::Lint0 | Self::Lint1 => {
                common | Lvt::MODE | Lvt::ACTIVE_LOW.bits() | Lvt::LEVEL.bits()
            }
        }
    }

    /// The bits that software reads, and whose writing is ignored rather than refused.
    #[must_use]
    pub const fn read_only(self) -> u32 {
        match self {
            Self::Lint0 | Self::Lint1 => Lvt::SEND_PENDING.bits() | Lvt::REMOTE_IRR.bits(),
            _ => Lvt::SEND_PENDING.bits(),
        }
    }
}

bit_flags! {
    /// The spurious-interrupt vector register (SDM vol. 3, 12.9). The vector is in bits 7:0.
    pub struct Svr(u32) {
        /// The APIC is enabled by software.
        ENABLED = 1 << 8;
        /// Focus-processor checking is off. Kept, without effect.
        FOCUS_OFF = 1 << 9;
        /// EOIs of level-triggered interrupts are not broadcast to the I/O APICs.
        SUPPRESS_EOI = 1 << 12;
    }
}

impl Svr {
    /// After reset: vector 255, disabled.
    pub const RESET: Self = Self::new(0xff);

    /// The vector that a spurious interrupt gets.
    #[must_use]
    pub const fn vector(self) -> u8 {
        self.bits() as u8
    }
}

bit_flags! {
    /// The error status register (SDM vol. 3, 12.5.3).
    pub struct Esr(u32) {
        /// A message with a vector from 0 to 15 was to be sent.
        SEND_ILLEGAL_VECTOR = 1 << 5;
        /// A message with a vector from 0 to 15 came in, from outside or from the local vector table.
        RECEIVE_ILLEGAL_VECTOR = 1 << 6;
        /// A reserved register was accessed, in xAPIC mode.
        ILLEGAL_REGISTER = 1 << 7;
    }
}

/// How xAPIC mode reads a logical destination (SDM vol. 3, 12.6.2.2): bits 31:28 of the destination format register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationFormat {
    /// Eight bits, one for each APIC.
    Flat,
    /// Four bits of cluster, and four for the APICs in it.
    Cluster,
    /// An encoding that is reserved: no logical destination is the APIC's.
    Reserved,
}

impl DestinationFormat {
    /// What the register says.
    #[must_use]
    pub const fn new(dfr: u32) -> Self {
        match dfr >> 28 {
            0xf => Self::Flat,
            0 => Self::Cluster,
            _ => Self::Reserved,
        }
    }
}

/// What software may do to a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: it does not exist.
    None,
    /// Read it.
    ReadOnly,
    /// Write it.
    WriteOnly,
    /// Both.
    ReadWrite,
}

impl Access {
    /// Whether it can be read.
    #[must_use]
    pub const fn can_read(self) -> bool {
        matches!(self, Self::ReadOnly | Self::ReadWrite)
    }

    /// Whether it can be written.
    #[must_use]
    pub const fn can_write(self) -> bool {
        matches!(self, Self::WriteOnly | Self::ReadWrite)
    }
}

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reg {
    /// The APIC's ID: in bits 31:24, or in all of them in x2APIC mode.
    Id,
    /// The version, and the number of LVT entries.
    Version,
    /// Task priority.
    Tpr,
    /// Arbitration priority: reads as 0.
    Apr,
    /// Processor priority.
    Ppr,
    /// End of interrupt.
    Eoi,
    /// Logical destination.
    Ldr,
    /// Destination format.
    Dfr,
    /// Spurious interrupt vector, and the software's enable bit.
    Svr,
    /// A word of ISR, TMR or IRR. The number counts to 7; more wrap around.
    Vectors(Bank, u8),
    /// Error status.
    Esr,
    /// Interrupt command: bits 31:0 in xAPIC mode, all of it in x2APIC mode.
    Icr,
    /// Interrupt command, bits 63:32.
    IcrHigh,
    /// An entry of the local vector table.
    Lvt(LvtEntry),
    /// The initial count of the timer.
    InitialCount,
    /// Its current count.
    CurrentCount,
    /// Its divide configuration.
    Divide,
    /// The vector of an interrupt to itself, in x2APIC mode.
    SelfIpi,
}

impl Reg {
    /// The register at an offset into the page, of which bits 11:4 count.
    #[must_use]
    pub const fn at(offset: u16) -> Option<Self> {
        let word = ((offset >> 4) & 7) as u8;
        Some(match offset & 0xff0 {
            0x020 => Self::Id,
            0x030 => Self::Version,
            0x080 => Self::Tpr,
            0x090 => Self::Apr,
            0x0a0 => Self::Ppr,
            0x0b0 => Self::Eoi,
            0x0d0 => Self::Ldr,
            0x0e0 => Self::Dfr,
            0x0f0 => Self::Svr,
            0x100..=0x170 => Self::Vectors(Bank::Isr, word),
            0x180..=0x1f0 => Self::Vectors(Bank::Tmr, word),
            0x200..=0x270 => Self::Vectors(Bank::Irr, word),
            0x280 => Self::Esr,
            0x2f0 => Self::Lvt(LvtEntry::Cmci),
            0x300 => Self::Icr,
            0x310 => Self::IcrHigh,
            0x320 => Self::Lvt(LvtEntry::Timer),
            0x330 => Self::Lvt(LvtEntry::Thermal),
            0x340 => Self::Lvt(LvtEntry::Perfmon),
            0x350 => Self::Lvt(LvtEntry::Lint0),
            0x360 => Self::Lvt(LvtEntry::Lint1),
            0x370 => Self::Lvt(LvtEntry::Error),
            0x380 => Self::InitialCount,
            0x390 => Self::CurrentCount,
            0x3e0 => Self::Divide,
            0x3f0 => Self::SelfIpi,
            _ => return None,
        })
    }

    /// Where it is in the page.
    #[inline]
    #[must_use]
    pub const fn offset(self) -> u16 {
        match self {
            Self::Id => 0x020,
            Self::Version => 0x030,
            Self::Tpr => 0x080,
            Self::Apr => 0x090,
            Self::Ppr => 0x0a0,
            Self::Eoi => 0x0b0,
            Self::Ldr => 0x0d0,
            Self::Dfr => 0x0e0,
            Self::Svr => 0x0f0,
            Self::Vectors(bank, word) => bank.offset(word),
            Self::Esr => 0x280,
            Self::Lvt(LvtEntry::Cmci) => 0x2f0,
            Self::Icr => 0x300,
            Self::IcrHigh => 0x310,
            Self::Lvt(LvtEntry::Timer) => 0x320,
            Self::Lvt(LvtEntry::Thermal) => 0x330,
            Self::Lvt(LvtEntry::Perfmon) => 0x340,
            Self::Lvt(LvtEntry::Lint0) => 0x350,
            Self::Lvt(LvtEntry::Lint1) => 0x360,
            Self::Lvt(LvtEntry::Error) => 0x370,
            Self::InitialCount => 0x380,
            Self::CurrentCount => 0x390,
            Self::Divide => 0x3e0,
            Self::SelfIpi => 0x3f0,
        }
    }

    /// What can be done to it in a mode (SDM vol. 3, tables 12-1 and 12-6).
    #[must_use]
    pub const fn access(self, mode: ApicMode, lvts: LvtSet) -> Access {
        let (xapic, x2apic) = match self {
            Self::Id | Self::Ldr => (Access::ReadWrite, Access::ReadOnly),
            Self::Version | Self::Ppr | Self::Vectors(..) | Self::CurrentCount => {
                (Access::ReadOnly, Access::ReadOnly)
            }
            Self::Apr => (Access::ReadOnly, Access::None),
            Self::Eoi => (Access::WriteOnly, Access::WriteOnly),
            Self::Dfr | Self::IcrHigh => (Access::ReadWrite, Access::None),
            Self::Lvt(entry) if !lvts.contains(entry) => (Access::None, Access::None),
            Self::Tpr
            | Self::Svr
            | Self::Esr
            | Self::Icr
            | Self::Lvt(_)
            | Self::InitialCount
            | Self::Divide => (Access::ReadWrite, Access::ReadWrite),
            Self::SelfIpi => (Access::None, Access::WriteOnly),
        };
        match mode {
            ApicMode::Disabled => Access::None,
            ApicMode::Xapic => xapic,
            ApicMode::X2apic => x2apic,
        }
    }
}
