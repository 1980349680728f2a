// SPDX-License-Identifier: GPL-2.0

//! An APIC as others see it: whom it takes itself for, and what they leave with it.

use super::super::line::Trigger;
use super::base::ApicMode;
use super::events::ApicEvent;
use super::map::Software;
use super::message::DeliveryMode;
use super::message::IdFormat;
use super::message::Identity;
use super::message::Level;
use super::message::Message;
use super::message::FIRST_VECTOR;
use super::page;
use super::page::ApicPage;
use super::regs::Bank;
use super::regs::DestinationFormat;
use super::regs::Reg;
use super::regs::Svr;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Delivered {
    /// Its vector is in IRR: wake the vCPU.
    Queued,
    /// Its vector was in IRR already, and is served once for both.
    Coalesced,
    /// It is no vector: to be put into the vCPU's [`ApicEvents`](super::events::ApicEvents).
    Event(ApicEvent),
    /// The APIC does not take it.
    Dropped,
}

/// An APIC, from any thread: its page, and what of the rest others need. The mode is what the caller last heard of; a message that is on its
/// way while the mode changes may meet either.
#[derive(Clone, Copy, Debug)]
pub struct ApicView<'a, P> {
    page: &'a P,
    mode: ApicMode,
    id: u32,
    ids: IdFormat,
}

impl<'a, P: ApicPage> ApicView<'a, P> {
    /// The APIC with this page, mode and initial ID, of a VM that has IDs of this format.
    #[must_use]
    pub const fn new(page: &'a P, mode: ApicMode, id: u32, ids: IdFormat) -> Self {
        Self {
            page,
            mode,
            id,
            ids,
        }
    }

    /// What it answers to now.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity {
            id: self.id,
            mode: self.mode,
            xapic_id: (page::get(self.page, Reg::Id) >> 24) as u8,
            ldr: page::get(self.page, Reg::Ldr),
            format: DestinationFormat::new(page::get(self.page, Reg::Dfr)),
            ids: self.ids,
        }
    }

    /// Whether software has enabled it (SDM vol. 3, 12.4.7.2).
    #[must_use]
    pub fn software(&self) -> Software {
        if Svr::new(page::get(self.page, Reg::Svr)).has(Svr::ENABLED) {
            Software::Enabled
        } else {
            Software::Disabled
        }
    }

    /// Takes a message that is for it (SDM vol. 3, 12.6.1 and 12.8). Whether it is, [`Identity::matches`] says.
    pub fn deliver(&self, message: &Message) -> Delivered {
        if matches!(self.mode, ApicMode::Disabled) {
            return Delivered::Dropped;
        }
        Delivered::Event(match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                return self.deliver_vector(message);
            }
            DeliveryMode::Smi => ApicEvent::Smi,
            DeliveryMode::Nmi => ApicEvent::Nmi,
            DeliveryMode::Init if message.is_init_deassert() => return Delivered::Dropped,
            DeliveryMode::Init => ApicEvent::Init,
            DeliveryMode::Startup => ApicEvent::Sipi {
                vector: message.vector,
            },
            DeliveryMode::ExtInt => ApicEvent::ExtInt,
        })
    }

    fn deliver_vector(&self, message: &Message) -> Delivered {
        let vector = message.vector;
        let ends = matches!(
            (message.trigger, message.level),
            (Trigger::Level, Level::Deassert)
        );
        if ends || matches!(self.software(), Software::Disabled) {
            return Delivered::Dropped;
        }
        if vector < FIRST_VECTOR {
            return Delivered::Event(ApicEvent::IllegalVector);
        }
        // First of all the trigger mode: the vCPU may serve the vector as soon as it is in IRR. Mostly, it has not changed.
        let level = matches!(message.trigger, Trigger::Level);
        if page::test(self.page, Bank::Tmr, vector) != level {
            if level {
                page::set(self.page, Bank::Tmr, vector);
            } else {
                page::clear(self.page, Bank::Tmr, vector);
            }
        }
        if page::set(self.page, Bank::Irr, vector) {
            Delivered::Coalesced
        } else {
            Delivered::Queued
        }
    }
}
