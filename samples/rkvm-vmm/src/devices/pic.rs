// SPDX-License-Identifier: GPL-2.0

//! The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet, order number 231468).
//!
//! The slave's output is the master's input 2. A line is edge-triggered, or level-triggered if the
//! ELCR (ports 0x4d0, 0x4d1) says so. An edge is latched until it is acknowledged: a line that falls
//! again before that still interrupts, which the chip would turn into a spurious IRQ 7; no device
//! here depends on the difference.

/// Input of the master that the slave is wired to.
const CASCADE: u8 = 2;

/// Registers that a read of the command port can return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadBack {
    Request,
    Service,
}

/// Which initialisation word comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Init {
    /// None: the chip works.
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Debug)]
struct Chip {
    /// IRR: latched requests.
    request: u8,
    /// ISR: in service.
    service: u8,
    /// IMR.
    mask: u8,
    /// Levels of the input lines, to find edges.
    lines: u8,
    /// ELCR: lines that are level-triggered.
    level: u8,
    /// Vector of input 0; low three bits clear.
    base: u8,
    /// Input with the highest priority.
    top: u8,
    init: Init,
    needs_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_back: ReadBack,
    poll: bool,
}

impl Chip {
    fn new() -> Self {
        Self {
            request: 0,
            service: 0,
            // The chip has no defined state before ICW1; all masked is what keeps it silent.
            mask: 0xff,
            lines: 0,
            level: 0,
            base: 0,
            top: 0,
            init: Init::Done,
            needs_icw4: false,
            single: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            read_back: ReadBack::Request,
            poll: false,
        }
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        if high {
            if self.level & bit != 0 || self.lines & bit == 0 {
                self.request |= bit;
            }
            self.lines |= bit;
        } else {
            if self.level & bit != 0 {
                self.request &= !bit;
            }
            self.lines &= !bit;
        }
    }

    /// Returns the input of the highest priority among `inputs`.
    fn highest(&self, inputs: u8) -> Option<u8> {
        (0..8)
            .map(|rank| (self.top + rank) & 7)
            .find(|input| inputs & (1 << input) != 0)
    }

    /// Returns an input's rank, 0 the highest.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.top) & 7
    }

    /// Returns the input that asks for the processor now.
    fn pending(&self) -> Option<u8> {
        let input = self.highest(self.request & !self.mask)?;
        let mut service = self.service;
        if self.special_mask {
            service &= !self.mask;
        }
        if self.special_fully_nested {
            // A slave may interrupt its own handler: it has priorities inside.
            service &= !(1 << CASCADE);
        }
        match self.highest(service) {
            Some(serving) if self.rank(serving) <= self.rank(input) => None,
            _ => Some(input),
        }
    }

    /// Takes `input` into service, as the INTA cycle does.
    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level & bit == 0 {
            self.request &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.top = (input + 1) & 7;
            }
        } else {
            self.service |= bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1. Bit 3 (all lines level-triggered) has no effect where an ELCR exists.
            self.request = 0;
            self.service = 0;
            self.mask = 0;
            self.lines = 0;
            self.top = 0;
            self.auto_eoi = false;
            self.rotate_on_auto_eoi = false;
            self.special_mask = false;
            self.special_fully_nested = false;
            self.read_back = ReadBack::Request;
            self.poll = false;
            self.needs_icw4 = value & 0x01 != 0;
            self.single = value & 0x02 != 0;
            self.init = Init::Icw2;
        } else if value & 0x08 != 0 {
            // OCW3.
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            self.poll = value & 0x04 != 0;
            match value & 0x03 {
                2 => self.read_back = ReadBack::Request,
                3 => self.read_back = ReadBack::Service,
                _ => {}
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        if !eoi {
            match (rotate, specific) {
                (true, true) => self.top = (named + 1) & 7,
                (rotate, false) => self.rotate_on_auto_eoi = rotate,
                (false, true) => {}
            }
            return;
        }
        let ended = if specific {
            Some(named)
        } else {
            let mut service = self.service;
            if self.special_mask {
                service &= !self.mask;
            }
            self.highest(service)
        };
        if let Some(input) = ended {
            self.service &= !(1 << input);
            if rotate {
                self.top = (input + 1) & 7;
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.mask = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = match (self.single, self.needs_icw4) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Done,
                };
            }
            // The wiring of the cascade is fixed, whatever the guest says.
            Init::Icw3 => {
                self.init = if self.needs_icw4 {
                    Init::Icw4
                } else {
                    Init::Done
                }
            }
            Init::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.init = Init::Done;
            }
        }
    }

    fn read_command(&mut self) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match self.read_back {
            ReadBack::Request => self.request,
            ReadBack::Service => self.service,
        }
    }
}

/// A register of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// Port 0x20 (master) or 0xa0 (slave).
    Command(Which),
    /// Port 0x21 or 0xa1.
    Data(Which),
    /// Port 0x4d0 or 0x4d1.
    Elcr(Which),
}

/// Which of the two chips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// IRQ 0 to 7, and the output to the processor.
    Master,
    /// IRQ 8 to 15.
    Slave,
}

/// The pair.
#[derive(Debug)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Pic {
    /// Returns the pair as after power-on: everything masked.
    pub fn new() -> Self {
        Self {
            master: Chip::new(),
            slave: Chip::new(),
        }
    }

    /// Sets the level of an interrupt line, 0 to 15.
    pub fn set_irq(&mut self, irq: u8, high: bool) {
        if irq < 8 {
            self.master.set_line(irq, high);
        } else {
            self.slave.set_line(irq & 7, high);
            self.cascade();
        }
    }

    /// Raises and drops an interrupt line: one edge.
    pub fn pulse(&mut self, irq: u8) {
        self.set_irq(irq, true);
        self.set_irq(irq, false);
    }

    /// Tells whether the INTR line to the processor is high.
    pub fn intr(&self) -> bool {
        self.master.pending().is_some()
    }

    /// The processor's acknowledge cycle: takes the pending interrupt into service and returns its
    /// vector. If the request has gone meanwhile, input 7 answers and nothing is in service: the
    /// chip's spurious interrupt.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.pending() else {
            return self.master.base | 7;
        };
        self.master.acknowledge(input);
        if input != CASCADE {
            return self.master.base | input;
        }
        let vector = match self.slave.pending() {
            Some(input) => {
                self.slave.acknowledge(input);
                self.slave.base | input
            }
            None => self.slave.base | 7,
        };
        // The slave's output drops in the cycle, and rises again if there is more.
        self.master.set_line(CASCADE, false);
        self.cascade();
        vector
    }

    /// Reads a register.
    pub fn read(&mut self, register: Register) -> u8 {
        match register {
            Register::Command(which) => {
                let value = self.chip(which).read_command();
                self.cascade();
                value
            }
            Register::Data(which) => self.chip(which).mask,
            Register::Elcr(which) => self.chip(which).level,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, register: Register, value: u8) {
        match register {
            Register::Command(which) => self.chip(which).write_command(value),
            Register::Data(which) => self.chip(which).write_data(value),
            // IRQ 0, 1, 2, 8 and 13 of a PC cannot be level-triggered.
            Register::Elcr(Which::Master) => self.master.level = value & 0xf8,
            Register::Elcr(Which::Slave) => self.slave.level = value & 0xde,
        }
        self.cascade();
    }

    fn chip(&mut self, which: Which) -> &mut Chip {
        match which {
            Which::Master => &mut self.master,
            Which::Slave => &mut self.slave,
        }
    }

    /// Drives the master's cascade input from the slave's output.
    fn cascade(&mut self) {
        let high = self.slave.pending().is_some();
        self.master.set_line(CASCADE, high);
        if !high {
            // Not latched: the slave's output is a level by nature, it withdraws with its cause.
            self.master.request &= !(1 << CASCADE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Register::{Command, Data, Elcr};
    use Which::{Master, Slave};

    /// Initialised as Linux does: vectors 0x30 and 0x38, nothing masked.
    fn pic() -> Pic {
        let mut pic = Pic::new();
        for (which, base, wiring) in [(Master, 0x30, 0x04), (Slave, 0x38, 0x02)] {
            pic.write(Command(which), 0x11);
            pic.write(Data(which), base);
            pic.write(Data(which), wiring);
            pic.write(Data(which), 0x01);
            pic.write(Data(which), 0x00);
        }
        pic
    }

    fn eoi(pic: &mut Pic, which: Which) {
        pic.write(Command(which), 0x20);
    }

    #[test]
    fn silent_until_initialised() {
        let mut pic = Pic::new();
        pic.pulse(0);
        assert!(!pic.intr());
        assert_eq!(pic.read(Data(Master)), 0xff);
    }

    #[test]
    fn mask_reads_back() {
        // Linux looks for the chip this way.
        let mut pic = pic();
        pic.write(Data(Slave), 0xff);
        pic.write(Data(Master), 0xfb);
        assert_eq!(pic.read(Data(Master)), 0xfb);
    }

    #[test]
    fn edge_is_latched_once() {
        let mut pic = pic();
        pic.set_irq(4, true);
        assert!(pic.intr());
        assert_eq!(pic.acknowledge(), 0x34);
        eoi(&mut pic, Master);
        assert!(
            !pic.intr(),
            "the line is still high, but there was one edge"
        );
        pic.set_irq(4, false);
        pic.set_irq(4, true);
        assert!(pic.intr());
    }

    #[test]
    fn priorities_nest() {
        let mut pic = pic();
        pic.pulse(4);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.pulse(7);
        assert!(!pic.intr(), "lower priority waits");
        pic.pulse(0);
        assert!(pic.intr(), "higher priority interrupts");
        assert_eq!(pic.acknowledge(), 0x30);
        eoi(&mut pic, Master);
        assert!(!pic.intr());
        eoi(&mut pic, Master);
        assert_eq!(pic.acknowledge(), 0x37);
    }

    #[test]
    fn slave_through_the_cascade() {
        let mut pic = pic();
        pic.pulse(8);
        pic.pulse(12);
        assert_eq!(pic.acknowledge(), 0x38);
        eoi(&mut pic, Slave);
        assert!(!pic.intr(), "the master's input 2 is in service still");
        eoi(&mut pic, Master);
        assert!(pic.intr());
        assert_eq!(pic.acknowledge(), 0x3c);
        eoi(&mut pic, Slave);
        eoi(&mut pic, Master);
        assert!(!pic.intr());
    }

    #[test]
    fn masked_request_waits_and_withdraws_the_cascade() {
        let mut pic = pic();
        pic.write(Data(Slave), 0x01);
        pic.pulse(8);
        assert!(!pic.intr());
        pic.write(Data(Slave), 0x00);
        assert!(pic.intr());
        pic.write(Data(Slave), 0x01);
        assert!(!pic.intr());
        assert_eq!(pic.acknowledge(), 0x37, "spurious");
        pic.write(Command(Master), 0x0b);
        assert_eq!(pic.read(Command(Master)), 0, "spurious is not in service");
    }

    #[test]
    fn level_line_asks_until_it_falls() {
        let mut pic = pic();
        pic.write(Elcr(Master), 0xff);
        assert_eq!(pic.read(Elcr(Master)), 0xf8);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        assert!(!pic.intr());
        eoi(&mut pic, Master);
        assert!(pic.intr());
        pic.set_irq(5, false);
        assert!(!pic.intr());
    }

    #[test]
    fn specific_eoi_and_read_back() {
        let mut pic = pic();
        pic.pulse(3);
        pic.pulse(1);
        pic.write(Command(Master), 0x0a);
        assert_eq!(pic.read(Command(Master)), 0x0a);
        assert_eq!(pic.acknowledge(), 0x31);
        pic.write(Command(Master), 0x0b);
        assert_eq!(pic.read(Command(Master)), 0x02);
        pic.write(Command(Master), 0x61);
        assert_eq!(pic.read(Command(Master)), 0x00);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let mut pic = pic();
        pic.write(Command(Master), 0x11);
        pic.write(Data(Master), 0x30);
        pic.write(Data(Master), 0x04);
        pic.write(Data(Master), 0x03);
        pic.pulse(6);
        assert_eq!(pic.acknowledge(), 0x36);
        pic.write(Command(Master), 0x0b);
        assert_eq!(pic.read(Command(Master)), 0);
    }

    #[test]
    fn rotation_moves_the_top() {
        let mut pic = pic();
        pic.pulse(3);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(Command(Master), 0xa0);
        pic.pulse(3);
        pic.pulse(4);
        assert_eq!(
            pic.acknowledge(),
            0x34,
            "4 is the highest after 3 was served"
        );
    }

    #[test]
    fn special_mask_lets_lower_ones_in() {
        let mut pic = pic();
        pic.pulse(3);
        pic.acknowledge();
        pic.pulse(6);
        assert!(!pic.intr());
        pic.write(Data(Master), 0x08);
        pic.write(Command(Master), 0x68);
        assert_eq!(pic.acknowledge(), 0x36);
    }

    #[test]
    fn poll_acknowledges() {
        let mut pic = pic();
        pic.pulse(5);
        pic.write(Command(Master), 0x0c);
        assert_eq!(pic.read(Command(Master)), 0x85);
        assert!(!pic.intr());
        pic.write(Command(Master), 0x0c);
        assert_eq!(pic.read(Command(Master)), 0x00);
    }
}
