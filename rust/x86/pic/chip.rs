// SPDX-License-Identifier: GPL-2.0

//! One 8259A, as a PC wires it: in MCS-86 mode, cascaded, with a trigger mode for each input instead of one for all (ELCR).
//!
//! References are to the headings of the 8259A data sheet.

use super::super::bits::bit_flags;
use super::super::line::Outcome;
use super::super::line::Signal;
use super::super::line::Trigger;

/// The input of the master that the slave is on.
pub(super) const CASCADE: u8 = 2;

/// The level that a request which is gone is given: "default IR level 7".
pub(super) const SPURIOUS: u8 = 7;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one that the processor sees, for IRQ 0 to 7.
    Master,
    /// The one behind it, for IRQ 8 to 15.
    Slave,
}

impl Role {
    /// The inputs that may be made level-triggered: not those of the timer, the keyboard, the cascade, the clock, the coprocessor.
    const fn elcr_mask(self) -> u8 {
        match self {
            Self::Master => 0xf8,
            Self::Slave => 0xde,
        }
    }
}

/// The state that KVM_GET_IRQCHIP and KVM_SET_IRQCHIP carry, in the layout of `struct kvm_pic_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PicState {
    /// What the lines carried, for finding edges.
    pub last_irr: u8,
    /// Requests.
    pub irr: u8,
    /// Masks.
    pub imr: u8,
    /// Requests in service.
    pub isr: u8,
    /// The input of the highest priority.
    pub priority_add: u8,
    /// The vector of the first input.
    pub irq_base: u8,
    /// One if a read gives the ISR, zero if the IRR.
    pub read_reg_select: u8,
    /// One if the next read is a poll.
    pub poll: u8,
    /// One in special mask mode.
    pub special_mask: u8,
    /// Which word of the initialization the data port takes next: 0 for none, 1 to 3 for ICW2 to ICW4.
    pub init_state: u8,
    /// One if an interrupt ends when it is acknowledged.
    pub auto_eoi: u8,
    /// One if that makes its input the lowest.
    pub rotate_on_auto_eoi: u8,
    /// One in special fully nested mode.
    pub special_fully_nested_mode: u8,
    /// One if the initialization has an ICW4.
    pub init4: u8,
    /// The inputs that are level-triggered.
    pub elcr: u8,
    /// Those that may be.
    pub elcr_mask: u8,
}

bit_flags! {
    /// The modes of a chip.
    struct Modes(u8) {
        /// OCW3: reads give the ISR.
        READ_ISR = 1 << 0;
        /// OCW3: the next read is a poll.
        POLL = 1 << 1;
        /// OCW3: special mask mode.
        SPECIAL_MASK = 1 << 2;
        /// ICW4: automatic end of interrupt.
        AUTO_EOI = 1 << 3;
        /// OCW2: which rotates.
        ROTATE = 1 << 4;
        /// ICW4: special fully nested mode.
        FULLY_NESTED = 1 << 5;
        /// ICW1: there will be an ICW4.
        WITH_ICW4 = 1 << 6;
    }
}

/// Which word the data port takes next ("Initialization sequence").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// OCW1, the masks.
    Ocw1,
    /// ICW2, the vectors.
    Icw2,
    /// ICW3, the cascade.
    Icw3,
    /// ICW4, the modes.
    Icw4,
}

/// A chip. What it asks of the pair that it is half of, it returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chip {
    role: Role,
    last: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    /// The input of the highest priority, 0 to 7; the next lower one follows.
    first: u8,
    /// The vector of input 0, a multiple of eight.
    base: u8,
    modes: Modes,
    expect: Expect,
    elcr: u8,
}

const fn bit(input: u8) -> u8 {
    1 << (input & 7)
}

impl Chip {
    /// A chip that nobody has initialized.
    pub(super) const fn new(role: Role) -> Self {
        Self {
            role,
            last: 0,
            irr: 0,
            imr: 0,
            isr: 0,
            first: 0,
            base: 0,
            modes: Modes::empty(),
            expect: Expect::Ocw1,
            elcr: 0,
        }
    }

    pub(super) const fn imr(&self) -> u8 {
        self.imr
    }

    pub(super) const fn elcr(&self) -> u8 {
        self.elcr
    }

    pub(super) fn set_elcr(&mut self, value: u8) {
        self.elcr = value & self.role.elcr_mask();
    }

    /// The vector of an input.
    pub(super) const fn vector(&self, input: u8) -> u8 {
        self.base | (input & 7)
    }

    const fn trigger(&self, input: u8) -> Trigger {
        if self.elcr & bit(input) != 0 {
            Trigger::Level
        } else {
            Trigger::Edge
        }
    }

    /// Has a line carry a signal. A request by an edge stays until it is acknowledged, even if the line falls before.
    pub(super) fn drive(&mut self, input: u8, signal: Signal) -> Outcome {
        let bit = bit(input);
        let rises = self.last & bit == 0;
        let mut outcome = Outcome::Delivered;
        match signal {
            Signal::High => {
                if rises || self.trigger(input) == Trigger::Level {
                    if self.irr & bit != 0 {
                        outcome = Outcome::Coalesced;
                    }
                    self.irr |= bit;
                }
                self.last |= bit;
            }
            Signal::Low => {
                if self.trigger(input) == Trigger::Level {
                    self.irr &= !bit;
                }
                self.last &= !bit;
            }
        }
        if self.imr & bit == 0 {
            outcome
        } else {
            Outcome::Ignored
        }
    }

    /// Has a line that takes edges rise and fall, whatever it carried.
    pub(super) fn pulse(&mut self, input: u8) {
        self.irr |= bit(input);
        self.last &= !bit(input);
    }

    /// How far the foremost input of `set` is from the highest priority.
    fn rank(&self, set: u8) -> Option<u8> {
        let rotated = set.rotate_right(self.first.into());
        // Of eight bits, 0 to 7 when there is one.
        (rotated != 0).then_some(rotated.trailing_zeros() as u8)
    }

    /// The input that is `rank` from the highest priority.
    const fn at(&self, rank: u8) -> u8 {
        self.first.wrapping_add(rank) & 7
    }

    /// What is in service and counts: "special mask mode" leaves out what is masked.
    const fn in_service(&self) -> u8 {
        if self.modes.has(Modes::SPECIAL_MASK) {
            self.isr & !self.imr
        } else {
            self.isr
        }
    }

    /// The input that INT is for, if the chip raises it: a request that is not masked, above all that is in service.
    pub(super) fn wanted(&self) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr)?;
        let mut above = self.in_service();
        // "Special fully nested mode": more may come from the slave that is in service.
        if self.role == Role::Master && self.modes.has(Modes::FULLY_NESTED) {
            above &= !bit(CASCADE);
        }
        match self.rank(above) {
            Some(limit) if limit <= rank => None,
            _ => Some(self.at(rank)),
        }
    }

    /// Acknowledges an input that is [`Chip::wanted`] ("Interrupt sequence"). Says what ends at once.
    pub(super) fn acknowledge(&mut self, input: u8) -> u8 {
        if self.trigger(input) == Trigger::Edge {
            self.irr &= !bit(input);
        }
        if !self.modes.has(Modes::AUTO_EOI) {
            self.isr |= bit(input);
            return 0;
        }
        if self.modes.has(Modes::ROTATE) {
            self.set_lowest(input);
        }
        bit(input)
    }

    /// Forgets a request that came by an edge.
    pub(super) fn forget(&mut self, input: u8) {
        self.irr &= !bit(input);
    }

    fn set_lowest(&mut self, input: u8) {
        self.first = input.wrapping_add(1) & 7;
    }

    /// Ends an input; says that it did.
    fn end(&mut self, input: u8) -> u8 {
        self.isr &= !bit(input);
        bit(input)
    }

    /// What a "nonspecific EOI" ends: the foremost input in service.
    fn foremost(&self) -> Option<u8> {
        let rank = self.rank(self.in_service())?;
        Some(self.at(rank))
    }

    /// A write of the port with A0 = 0: ICW1, OCW2 or OCW3. Says what ends.
    pub(super) fn write_command(&mut self, value: u8) -> u8 {
        if value & 0x10 != 0 {
            self.initialize(value);
            0
        } else if value & 8 != 0 {
            self.write_ocw3(value);
            0
        } else {
            self.write_ocw2(value)
        }
    }

    /// ICW1. Whether there is a slave (SNGL) and how all inputs are triggered (LTIM) is fixed on a PC.
    ///
    /// The data sheet does not list the ISR among what is reset. It is here: what stayed in service would block a guest that
    /// begins anew and never ends what its predecessor took. KVM keeps it.
    fn initialize(&mut self, value: u8) {
        self.last = 0;
        self.irr &= self.elcr;
        self.imr = 0;
        self.isr = 0;
        self.first = 0;
        self.modes = self
            .modes
            .without(Modes::READ_ISR | Modes::POLL | Modes::SPECIAL_MASK)
            .with_if(Modes::WITH_ICW4, value & 1 != 0);
        if !self.modes.has(Modes::WITH_ICW4) {
            self.modes = self.modes.without(Modes::AUTO_EOI | Modes::FULLY_NESTED);
        }
        self.expect = Expect::Icw2;
    }

    fn write_ocw2(&mut self, value: u8) -> u8 {
        let level = value & 7;
        match value >> 5 {
            0 => self.modes = self.modes.without(Modes::ROTATE),
            4 => self.modes |= Modes::ROTATE,
            1 => {
                if let Some(input) = self.foremost() {
                    return self.end(input);
                }
            }
            5 => {
                if let Some(input) = self.foremost() {
                    self.set_lowest(input);
                    return self.end(input);
                }
            }
            3 => return self.end(level),
            6 => self.set_lowest(level),
            7 => {
                self.set_lowest(level);
                return self.end(level);
            }
            // 2: no operation.
            _ => {}
        }
        0
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 4 != 0 {
            self.modes |= Modes::POLL;
        }
        if value & 2 != 0 {
            self.modes = self.modes.with_if(Modes::READ_ISR, value & 1 != 0);
        }
        if value & 0x40 != 0 {
            self.modes = self.modes.with_if(Modes::SPECIAL_MASK, value & 0x20 != 0);
        }
    }

    /// A write of the port with A0 = 1: ICW2 to ICW4 after an ICW1, and else OCW1. Says which masks change.
    pub(super) fn write_data(&mut self, value: u8) -> u8 {
        match self.expect {
            Expect::Ocw1 => {
                let changed = self.imr ^ value;
                self.imr = value;
                return changed;
            }
            Expect::Icw2 => {
                self.base = value & 0xf8;
                self.expect = Expect::Icw3;
            }
            Expect::Icw3 => {
                self.expect = if self.modes.has(Modes::WITH_ICW4) {
                    Expect::Icw4
                } else {
                    Expect::Ocw1
                };
            }
            Expect::Icw4 => {
                self.modes = self
                    .modes
                    .with_if(Modes::AUTO_EOI, value & 2 != 0)
                    .with_if(Modes::FULLY_NESTED, value & 0x10 != 0);
                self.expect = Expect::Ocw1;
            }
        }
        0
    }

    /// Whether the next read is a poll, which this ends.
    pub(super) fn take_poll(&mut self) -> bool {
        let poll = self.modes.has(Modes::POLL);
        self.modes = self.modes.without(Modes::POLL);
        poll
    }

    /// A read of the port with A0 = 0.
    pub(super) const fn status(&self) -> u8 {
        if self.modes.has(Modes::READ_ISR) {
            self.isr
        } else {
            self.irr
        }
    }

    pub(super) fn state(&self) -> PicState {
        let mode = |m| u8::from(self.modes.has(m));
        PicState {
            last_irr: self.last,
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            priority_add: self.first,
            irq_base: self.base,
            read_reg_select: mode(Modes::READ_ISR),
            poll: mode(Modes::POLL),
            special_mask: mode(Modes::SPECIAL_MASK),
            init_state: match self.expect {
                Expect::Ocw1 => 0,
                Expect::Icw2 => 1,
                Expect::Icw3 => 2,
                Expect::Icw4 => 3,
            },
            auto_eoi: mode(Modes::AUTO_EOI),
            rotate_on_auto_eoi: mode(Modes::ROTATE),
            special_fully_nested_mode: mode(Modes::FULLY_NESTED),
            init4: mode(Modes::WITH_ICW4),
            elcr: self.elcr,
            elcr_mask: self.role.elcr_mask(),
        }
    }

    /// Takes a state. What no chip has (bits above a priority or below a vector, an unknown word to expect, inputs that cannot
    /// be level-triggered) is left out.
    pub(super) fn set_state(&mut self, state: &PicState) {
        *self = Self {
            role: self.role,
            last: state.last_irr,
            irr: state.irr,
            imr: state.imr,
            isr: state.isr,
            first: state.priority_add & 7,
            base: state.irq_base & 0xf8,
            modes: Modes::empty()
                .with_if(Modes::READ_ISR, state.read_reg_select != 0)
                .with_if(Modes::POLL, state.poll != 0)
                .with_if(Modes::SPECIAL_MASK, state.special_mask != 0)
                .with_if(Modes::AUTO_EOI, state.auto_eoi != 0)
                .with_if(Modes::ROTATE, state.rotate_on_auto_eoi != 0)
                .with_if(Modes::FULLY_NESTED, state.special_fully_nested_mode != 0)
                .with_if(Modes::WITH_ICW4, state.init4 != 0),
            expect: match state.init_state {
                1 => Expect::Icw2,
                2 => Expect::Icw3,
                3 => Expect::Icw4,
                _ => Expect::Ocw1,
            },
            elcr: state.elcr & self.role.elcr_mask(),
        };
    }
}
