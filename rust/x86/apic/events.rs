// SPDX-License-Identifier: GPL-2.0

//! What reaches an APIC and is no vector in IRR: INIT, SIPI, NMI, SMI, ExtINT, and errors that others cause.
//!
//! It all fits into one word. Others post to it, the APIC's own vCPU takes from it; each is a pure function from word to word, for a
//! compare-and-exchange.

use super::super::bits::bit_flags;

/// Something for the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicEvent {
    /// Reset the processor, keeping what INIT keeps.
    Init,
    /// Begin at page `vector` of the first megabyte, if an INIT came before.
    Sipi {
        /// Bits 19:12 of the address.
        vector: u8,
    },
    /// A non-maskable interrupt.
    Nmi,
    /// A system-management interrupt.
    Smi,
    /// The interrupt controller outside has a vector.
    ExtInt,
    /// A message with a vector from 0 to 15 came: [`Apic::log_error`](super::Apic::log_error).
    IllegalVector,
}

/// Whether the vCPU waits for a SIPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Startup {
    /// It runs or is halted: a SIPI means nothing to it.
    Started,
    /// It had an INIT.
    WaitsForSipi,
}

bit_flags! {
    /// The events that wait for a vCPU. Bits 31:24 are the vector of the SIPI.
    pub struct ApicEvents(u32) {
        /// [`ApicEvent::Init`].
        INIT = 1 << 0;
        /// [`ApicEvent::Sipi`].
        SIPI = 1 << 1;
        /// [`ApicEvent::Nmi`].
        NMI = 1 << 2;
        /// [`ApicEvent::Smi`].
        SMI = 1 << 3;
        /// [`ApicEvent::ExtInt`].
        EXTINT = 1 << 4;
        /// [`ApicEvent::IllegalVector`].
        ILLEGAL_VECTOR = 1 << 5;
    }
}

/// Where the vector of the SIPI is.
const SIPI_VECTOR_SHIFT: u32 = 24;

impl ApicEvents {
    const SIPI_ALL: Self = Self::new(Self::SIPI.bits() | (0xff << SIPI_VECTOR_SHIFT));

    /// The word with one event more. An INIT forgets a SIPI that came before it, and a SIPI another that waits: the
    /// last one counts.
    #[must_use]
    pub const fn post(self, event: ApicEvent) -> Self {
        match event {
            ApicEvent::Init => self.without(Self::SIPI_ALL).with(Self::INIT),
            ApicEvent::Sipi { vector } => self
                .without(Self::SIPI_ALL)
                .with(Self::SIPI)
                .with(Self::new((vector as u32) << SIPI_VECTOR_SHIFT)),
            ApicEvent::Nmi => self.with(Self::NMI),
            ApicEvent::Smi => self.with(Self::SMI),
            ApicEvent::ExtInt => self.with(Self::EXTINT),
            ApicEvent::IllegalVector => self.with(Self::ILLEGAL_VECTOR),
        }
    }

    /// The word without the flags, and those of them that were set.
    #[must_use]
    pub const fn take(self, flags: Self) -> (Self, Self) {
        (self.without(flags), self.and(flags))
    }

    /// Takes INIT, or else a SIPI: the word that is left, and the event. Who gets an INIT resets the vCPU and asks again; a SIPI
    /// to a processor that does not wait for one is dropped.
    #[must_use]
    pub const fn take_startup(self, startup: Startup) -> (Self, Option<ApicEvent>) {
        if self.has(Self::INIT) {
            return (self.without(Self::INIT), Some(ApicEvent::Init));
        }
        let event = if self.has(Self::SIPI) && matches!(startup, Startup::WaitsForSipi) {
            Some(ApicEvent::Sipi {
                vector: (self.bits() >> SIPI_VECTOR_SHIFT) as u8,
            })
        } else {
            None
        };
        (self.without(Self::SIPI_ALL), event)
    }
}
