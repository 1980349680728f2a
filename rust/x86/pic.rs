// SPDX-License-Identifier: GPL-2.0

//! The pair of 8259A interrupt controllers of a PC.
//!
//! One [`Pic`] belongs to a VM with an interrupt controller in the kernel. The slave is on input 2 of the master, and the master's
//! INT goes to the processors. Every change says in an [`Effect`] what it is to others.
//!
//! It differs from KVM's where that leaves the data sheet: special mask mode masks, a poll acknowledges but does not end the
//! interrupt, and an initialization takes everything out of service.

mod chip;

pub use chip::PicState;
pub use chip::Role;

use super::line::Line;
use super::line::Outcome;
use super::line::Pins;
use super::line::Signal;
use super::line::Source;
use chip::Chip;
use chip::CASCADE;
use chip::SPURIOUS;

/// How many inputs the two have, with the one that joins them.
pub const PINS: u8 = 16;

/// The registers, by their ports. They have eight bits: a wider read is of zeros, and a wider write does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// ICW1, OCW2 and OCW3; IRR and ISR (A0 = 0).
    Command(Role),
    /// ICW2 to ICW4, OCW1, the masks (A0 = 1).
    Data(Role),
    /// The trigger modes of the inputs (ELCR1 and ELCR2 of the chipset, 82371AB).
    Elcr(Role),
}

impl Port {
    /// The register with this port.
    #[must_use]
    pub const fn new(port: u16) -> Option<Self> {
        Some(match port {
            0x20 => Self::Command(Role::Master),
            0x21 => Self::Data(Role::Master),
            0xa0 => Self::Command(Role::Slave),
            0xa1 => Self::Data(Role::Slave),
            0x4d0 => Self::Elcr(Role::Master),
            0x4d1 => Self::Elcr(Role::Slave),
            _ => return None,
        })
    }
}

/// What a change is to others. Inputs count from 0 to 15.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Effect {
    /// INT carries this now, and did not before.
    pub int: Option<Signal>,
    /// These were ended: who waits for that (resampling eventfds, the interval timer) is to be told.
    pub ended: Pins,
    /// The masks of these changed; [`Pic::masks`] has them.
    pub masks: Pins,
}

/// The pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pic {
    master: Chip,
    slave: Chip,
    lines: [Line; PINS as usize],
    int: Signal,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

/// Inputs of one chip as inputs of the pair.
const fn pins(role: Role, inputs: u8) -> Pins {
    Pins::new(match role {
        Role::Master => inputs as u32,
        Role::Slave => (inputs as u32) << 8,
    })
}

impl Pic {
    /// Two chips that nobody has initialized.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            master: Chip::new(Role::Master),
            slave: Chip::new(Role::Slave),
            lines: [Line::LOW; PINS as usize],
            int: Signal::Low,
        }
    }

    /// What INT carries: whether there is an interrupt to [`Pic::acknowledge`].
    #[inline]
    #[must_use]
    pub const fn int(&self) -> Signal {
        self.int
    }

    /// The inputs that are masked.
    #[must_use]
    pub const fn masks(&self) -> Pins {
        pins(Role::Master, self.master.imr()).with(pins(Role::Slave, self.slave.imr()))
    }

    fn chip(&self, role: Role) -> &Chip {
        match role {
            Role::Master => &self.master,
            Role::Slave => &self.slave,
        }
    }

    fn chip_mut(&mut self, role: Role) -> &mut Chip {
        match role {
            Role::Master => &mut self.master,
            Role::Slave => &mut self.slave,
        }
    }

    /// Finds out what INT carries.
    fn update(&mut self) -> Option<Signal> {
        if self.slave.wanted().is_some() {
            // The slave's INT falls with each acknowledgement, so that the next request is a new edge. One that is there already
            // is latched, and another changes nothing.
            self.master.pulse(CASCADE);
        }
        let int = Signal::new(self.master.wanted().is_some());
        let changed = int != self.int;
        self.int = int;
        changed.then_some(int)
    }

    fn effect(&mut self, ended: Pins, masks: Pins) -> Effect {
        Effect {
            int: self.update(),
            ended,
            masks,
        }
    }

    /// Has `source` drive an input, 0 to 15. Input 2 is the slave's and of no use to others, though KVM lets them have it.
    pub fn set_line(&mut self, pin: u8, source: Source, signal: Signal) -> (Outcome, Effect) {
        let Some(line) = self.lines.get_mut(usize::from(pin)) else {
            return (Outcome::Ignored, Effect::default());
        };
        let signal = line.drive(source, signal);
        let role = if pin < 8 { Role::Master } else { Role::Slave };
        let outcome = self.chip_mut(role).drive(pin & 7, signal);
        (outcome, self.effect(Pins::EMPTY, Pins::EMPTY))
    }

    /// The processor takes the interrupt (two INTA cycles): its vector. If the request is gone by now, it is that of input 7 of the
    /// chip that had it, which has nothing in service then.
    ///
    /// INT falls with that. It is in the effect as high if there is another interrupt, for then it has risen again.
    pub fn acknowledge(&mut self) -> (u8, Effect) {
        let mut ended = Pins::EMPTY;
        let vector = match self.master.wanted() {
            Some(CASCADE) => {
                ended = pins(Role::Master, self.master.acknowledge(CASCADE));
                match self.slave.wanted() {
                    Some(input) => {
                        let inputs = self.slave.acknowledge(input);
                        ended = ended.with(pins(Role::Slave, inputs));
                        self.slave.vector(input)
                    }
                    None => self.slave.vector(SPURIOUS),
                }
            }
            Some(input) => {
                ended = pins(Role::Master, self.master.acknowledge(input));
                self.master.vector(input)
            }
            None => self.master.vector(SPURIOUS),
        };
        let before = core::mem::replace(&mut self.int, Signal::Low);
        let mut effect = self.effect(ended, Pins::EMPTY);
        if effect.int.is_none() && before.is_high() {
            effect.int = Some(Signal::Low);
        }
        (vector, effect)
    }

    /// Writes a register.
    pub fn write(&mut self, port: Port, value: u8) -> Effect {
        let (mut ended, mut masks) = (Pins::EMPTY, Pins::EMPTY);
        match port {
            Port::Command(role) => {
                let before = self.chip(role).imr();
                ended = pins(role, self.chip_mut(role).write_command(value));
                // ICW1 clears the masks.
                masks = pins(role, before ^ self.chip(role).imr());
            }
            Port::Data(role) => masks = pins(role, self.chip_mut(role).write_data(value)),
            Port::Elcr(role) => self.chip_mut(role).set_elcr(value),
        }
        self.effect(ended, masks)
    }

    /// Reads a register. After a poll command it is an acknowledgement, through whichever port ("Poll command").
    pub fn read(&mut self, port: Port) -> (u8, Effect) {
        let value = match port {
            Port::Elcr(role) => self.chip(role).elcr(),
            Port::Command(role) | Port::Data(role) if self.chip_mut(role).take_poll() => {
                return self.poll(role);
            }
            Port::Command(role) => self.chip(role).status(),
            Port::Data(role) => self.chip(role).imr(),
        };
        (value, Effect::default())
    }

    /// The answer to a poll: bit 7 and the input, or 7 if there is none.
    fn poll(&mut self, role: Role) -> (u8, Effect) {
        let Some(input) = self.chip(role).wanted() else {
            return (SPURIOUS, self.effect(Pins::EMPTY, Pins::EMPTY));
        };
        let ended = pins(role, self.chip_mut(role).acknowledge(input));
        if role == Role::Slave {
            // Nothing is left of what the slave asked of the master, unless it asks again.
            self.master.forget(CASCADE);
        }
        (0x80 | input, self.effect(ended, Pins::EMPTY))
    }

    /// The state of one of them, for KVM_GET_IRQCHIP.
    #[must_use]
    pub fn state(&self, role: Role) -> PicState {
        self.chip(role).state()
    }

    /// Sets the state of one of them (KVM_SET_IRQCHIP). The lines stay as they are, and any state will do.
    pub fn set_state(&mut self, role: Role, state: &PicState) -> Effect {
        let before = self.chip(role).imr();
        self.chip_mut(role).set_state(state);
        let masks = pins(role, before ^ self.chip(role).imr());
        self.effect(Pins::EMPTY, masks)
    }
}
