// SPDX-License-Identifier: GPL-2.0

//! An I/O APIC (82093AA, with the EOI register of later ones) for local APICs that are in the kernel.
//!
//! It turns edges and levels on its pins into messages ([`Message`]) for a local APIC. A pin may be
//! pulsed here, or by a file of which the kernel knows the pin's number: for that, whoever takes the
//! messages ([`Messages`]) is told what each pin would send now, whenever that changes.

/// Number of pins.
pub const PINS: usize = 24;

/// The page that its registers are in.
pub const BASE: u64 = 0xfec0_0000;

/// Offset of the index register.
const SELECT: u64 = 0x00;
/// Offset of the window to the register that the index names.
const WINDOW: u64 = 0x10;
/// Offset of the register that takes a vector as ended.
const EOI: u64 = 0x40;

const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const TABLE: u8 = 0x10;
/// The first version with an EOI register.
const VERSION_WITH_EOI: u32 = 0x20;

// Bits of a redirection entry.
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0x700;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// What software can write: delivery status and remote IRR it cannot.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Where writes are messages to local APICs.
const MESSAGE_BASE: u32 = 0xfee0_0000;
const MESSAGE_DESTINATION_SHIFT: u32 = 12;
const MESSAGE_LOGICAL: u32 = 1 << 2;
const MESSAGE_ASSERT: u32 = 1 << 14;
const MESSAGE_LEVEL: u32 = 1 << 15;

/// An interrupt as a message: the address and the data of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Says who gets it.
    pub address: u32,
    /// Says what it is.
    pub data: u32,
}

/// What each pin sends; `None` if it sends nothing.
pub type Routes = [Option<Message>; PINS];

/// Takes what the I/O APIC sends.
pub trait Messages {
    /// Takes one interrupt.
    fn send(&mut self, message: Message);
    /// Learns what the pins send from now on.
    fn route(&mut self, routes: &Routes);
}

/// The controller.
pub struct IoApic<M: Messages> {
    messages: M,
    select: u8,
    id: u32,
    table: [u64; PINS],
    /// Pins that are high: a bit each.
    high: u32,
    routes: Routes,
}

impl<M: Messages> IoApic<M> {
    /// Returns the controller as after reset: every pin is masked.
    pub fn new(messages: M) -> Self {
        Self {
            messages,
            select: 0,
            id: 0,
            table: [MASKED; PINS],
            high: 0,
            routes: [None; PINS],
        }
    }

    /// Reads the register at `offset` in its page.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            SELECT => self.select.into(),
            WINDOW => match self.select {
                ID | ARBITRATION => self.id,
                VERSION => VERSION_WITH_EOI | ((PINS as u32 - 1) << 16),
                _ => match self.entry() {
                    Some((pin, high)) => (self.table[pin] >> if high { 32 } else { 0 }) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes the register at `offset` in its page.
    pub fn write(&mut self, offset: u64, value: u32) {
        match offset {
            SELECT => self.select = value as u8,
            WINDOW if self.select == ID => self.id = value & 0x0f00_0000,
            WINDOW => {
                if let Some((pin, high)) = self.entry() {
                    self.write_entry(pin, high, value);
                }
            }
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    /// The pin, and the half of its entry, that the index register names.
    fn entry(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(TABLE)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index % 2 != 0))
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32) {
        let old = self.table[pin];
        let written = if high {
            old & 0xffff_ffff | (u64::from(value) << 32)
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        let mut new = written & WRITABLE | old & REMOTE_IRR;
        if new & LEVEL == 0 {
            // Linux ends a level interrupt so where there is no EOI register.
            new &= !REMOTE_IRR;
        }
        self.table[pin] = new;
        self.update_routes();
        self.send_level(pin);
    }

    /// An edge on `pin`.
    pub fn pulse(&mut self, pin: u8) {
        let Some(&entry) = self.table.get(usize::from(pin)) else {
            return;
        };
        // A pin that is masked forgets its edges.
        if entry & (MASKED | LEVEL) == 0 {
            self.messages.send(message(entry));
        }
    }

    /// Sets the level of `pin`.
    pub fn set_level(&mut self, pin: u8, high: bool) {
        let bit = 1u32.checked_shl(pin.into()).unwrap_or(0);
        if !high {
            self.high &= !bit;
        } else if self.high & bit == 0 {
            self.high |= bit;
            self.pulse(pin);
            self.send_level(pin.into());
        }
    }

    /// Sends the interrupt of a level-triggered pin that is high, unless one is on its way.
    fn send_level(&mut self, pin: usize) {
        let Some(entry) = self.table.get_mut(pin) else {
            return;
        };
        if *entry & (MASKED | LEVEL | REMOTE_IRR) == LEVEL && self.high & (1 << pin) != 0 {
            *entry |= REMOTE_IRR;
            let message = message(*entry);
            self.messages.send(message);
        }
    }

    /// A local APIC has ended an interrupt with `vector`.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut self.table[pin];
            if *entry & LEVEL != 0 && *entry & VECTOR == u64::from(vector) {
                *entry &= !REMOTE_IRR;
                self.send_level(pin);
            }
        }
        self.update_routes();
    }

    fn update_routes(&mut self) {
        // A pin that was masked while its interrupt is in service must still hear of the end of it,
        // and the kernel tells only of vectors that have a route.
        let routes = self
            .table
            .map(|entry| (entry & MASKED == 0 || entry & REMOTE_IRR != 0).then(|| message(entry)));
        if routes != self.routes {
            self.routes = routes;
            self.messages.route(&routes);
        }
    }
}

/// The message that a redirection entry makes.
fn message(entry: u64) -> Message {
    let destination = (entry >> DESTINATION_SHIFT) as u32;
    let mut address = MESSAGE_BASE | (destination << MESSAGE_DESTINATION_SHIFT);
    if entry & LOGICAL != 0 {
        address |= MESSAGE_LOGICAL;
    }
    let mut data = (entry & (VECTOR | DELIVERY_MODE)) as u32 | MESSAGE_ASSERT;
    if entry & LEVEL != 0 {
        data |= MESSAGE_LEVEL;
    }
    Message { address, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log {
        sent: Vec<Message>,
        routes: Vec<Routes>,
    }

    impl Messages for Log {
        fn send(&mut self, message: Message) {
            self.sent.push(message);
        }
        fn route(&mut self, routes: &Routes) {
            self.routes.push(*routes);
        }
    }

    fn set(ioapic: &mut IoApic<Log>, pin: u8, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            ioapic.write(SELECT, u32::from(TABLE + 2 * pin + half));
            ioapic.write(WINDOW, value);
        }
    }

    fn low(ioapic: &mut IoApic<Log>, pin: u8) -> u64 {
        ioapic.write(SELECT, u32::from(TABLE + 2 * pin));
        ioapic.read(WINDOW).into()
    }

    #[test]
    fn registers() {
        let mut ioapic = IoApic::new(Log::default());
        ioapic.write(SELECT, VERSION.into());
        assert_eq!(ioapic.read(WINDOW), 0x0017_0020);
        assert_eq!(low(&mut ioapic, 23), MASKED);
        ioapic.write(WINDOW, 0xffff_ffff);
        assert_eq!(low(&mut ioapic, 23), 0x1_afff);
        // Behind the table there is nothing.
        ioapic.write(SELECT, 0x40);
        ioapic.write(WINDOW, 1);
        assert_eq!(ioapic.read(WINDOW), 0);
        ioapic.write(SELECT, ID.into());
        ioapic.write(WINDOW, 0xffff_ffff);
        assert_eq!(ioapic.read(WINDOW), 0x0f00_0000);
    }

    #[test]
    fn edges() {
        let mut ioapic = IoApic::new(Log::default());
        ioapic.pulse(4);
        assert!(ioapic.messages.sent.is_empty(), "masked");
        set(&mut ioapic, 4, 0x0300_0000_0000_0931);
        ioapic.pulse(4);
        ioapic.pulse(4);
        let expected = Message {
            address: 0xfee0_3004,
            data: 0x4131,
        };
        assert_eq!(ioapic.messages.sent, [expected; 2]);
        let routes = ioapic.messages.routes.last().unwrap();
        assert_eq!(routes[4], Some(expected));
        assert_eq!(routes.iter().flatten().count(), 1);
        set(&mut ioapic, 4, MASKED | 0x31);
        assert_eq!(ioapic.messages.routes.last().unwrap()[4], None);
        ioapic.pulse(200);
    }

    #[test]
    fn levels() {
        let mut ioapic = IoApic::new(Log::default());
        set(&mut ioapic, 9, LEVEL | 0x40);
        ioapic.set_level(9, true);
        ioapic.set_level(9, true);
        assert_eq!(ioapic.messages.sent.len(), 1);
        assert_eq!(ioapic.messages.sent[0].data, 0xc040);
        assert_ne!(low(&mut ioapic, 9) & REMOTE_IRR, 0);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(ioapic.messages.sent.len(), 1);
        // Still high: again.
        ioapic.end_of_interrupt(0x40);
        assert_eq!(ioapic.messages.sent.len(), 2);
        ioapic.set_level(9, false);
        ioapic.write(EOI, 0x40);
        assert_eq!(ioapic.messages.sent.len(), 2);
        assert_eq!(low(&mut ioapic, 9) & REMOTE_IRR, 0);
    }

    #[test]
    fn masked_level_comes_when_unmasked() {
        let mut ioapic = IoApic::new(Log::default());
        set(&mut ioapic, 9, MASKED | LEVEL | 0x40);
        ioapic.set_level(9, true);
        assert!(ioapic.messages.sent.is_empty());
        set(&mut ioapic, 9, LEVEL | 0x40);
        assert_eq!(ioapic.messages.sent.len(), 1);
        // In service and masked: the end of it must be heard.
        set(&mut ioapic, 9, MASKED | LEVEL | 0x40);
        assert!(ioapic.messages.routes.last().unwrap()[9].is_some());
        ioapic.end_of_interrupt(0x40);
        assert!(ioapic.messages.routes.last().unwrap()[9].is_none());
        assert_eq!(ioapic.messages.sent.len(), 1);
    }

    #[test]
    fn trigger_mode_clears_remote_irr() {
        let mut ioapic = IoApic::new(Log::default());
        set(&mut ioapic, 9, LEVEL | 0x40);
        ioapic.set_level(9, true);
        set(&mut ioapic, 9, MASKED | 0x40);
        assert_eq!(low(&mut ioapic, 9) & REMOTE_IRR, 0);
    }
}
