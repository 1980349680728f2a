// SPDX-License-Identifier: GPL-2.0

//! The I/O APIC (82093AA), as KVM has it: 24 pins, version 0x11, and so no EOI register.
//!
//! One [`Ioapic`] belongs to a VM with an interrupt controller in the kernel. It sends nothing itself: what changes it returns
//! the [`Message`], or the pins that have one, and the caller delivers. So it needs no local APIC, and its lock need not be
//! held while they are reached.
//!
//! A pin that is level-triggered goes round:
//!
//! ```text
//! set_line(High)     -> Fires(message)      remote IRR is set; refused() takes it back if no local APIC took the message
//! pins_of(vector)                           at the EOI: whose device has to be asked whether it still wants one (resampling);
//!                                           what it does to the line counts for the next step
//! eoi(pins)          -> pins                remote IRR is clear; these are still high
//! fire(pin)          -> message             for each: at once, or later if the guest does nothing but take this interrupt
//! ```
//!
//! What needs the local APICs is the caller's: to find the destination, to know for the RTC's pin who has yet to end its
//! interrupt, and to have EOIs reported at all.

pub mod entry;

use super::line::Line;
use super::line::Outcome;
use super::line::Pins;
use super::line::Signal;
use super::line::Source;
use super::line::Trigger;
use entry::Entry;
use entry::Half;
use entry::Message;

/// How many pins there are (KVM_IOAPIC_NUM_PINS).
pub const PINS: u8 = 24;

/// Where the registers are after a reset.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;

/// How many bytes of address space they take.
pub const SIZE: u64 = 0x100;

/// What IOAPICVER says of the version: without an EOI register, which came with 0x20.
const VERSION: u32 = 0x11;

/// The state that KVM_GET_IRQCHIP and KVM_SET_IRQCHIP carry, in the layout of `struct kvm_ioapic_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct IoapicState {
    /// Where the registers are.
    pub base_address: u64,
    /// The register that the window shows.
    pub ioregsel: u32,
    /// The ID, in the low four bits.
    pub id: u32,
    /// A bit for each pin that has a request which was not sent.
    pub irr: u32,
    /// Unused.
    pub pad: u32,
    /// The redirection table.
    pub redirtbl: [u64; PINS as usize],
}

/// The address belongs to somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere;

/// What came of a pin's being driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Raise {
    /// The pin is low now.
    Lowered,
    /// The message is to be delivered.
    Fires(Message),
    /// A pin that takes edges had been high already.
    Coalesced,
    /// The pin is masked, or waits for an EOI, or there is no such pin.
    Ignored,
}

impl Raise {
    /// The message, if there is one.
    #[must_use]
    pub const fn message(self) -> Option<Message> {
        match self {
            Self::Fires(message) => Some(message),
            _ => None,
        }
    }

    /// What KVM_IRQ_LINE_STATUS says. For a message, how many local APICs took it is the better answer.
    #[must_use]
    pub const fn outcome(self) -> Outcome {
        match self {
            Self::Lowered | Self::Fires(_) => Outcome::Delivered,
            Self::Coalesced => Outcome::Coalesced,
            Self::Ignored => Outcome::Ignored,
        }
    }
}

/// What became of the mask of a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskChange {
    /// It is as it was.
    None,
    /// The pin is masked now.
    Masked,
    /// The pin is no longer masked.
    Unmasked,
}

/// The guest wrote an entry: which EOIs are to be reported has to be found anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableWrite {
    /// The pin.
    pub pin: u8,
    /// The entry before.
    pub before: Entry,
    /// The entry now.
    pub after: Entry,
    /// The pin is level-triggered and has a request that nothing holds back. The line may have fallen since, if nobody looked
    /// while the pin was masked. Who can ask the device calls [`Ioapic::withdraw`] and asks; else it is for [`Ioapic::fire`].
    pub pending: bool,
}

impl TableWrite {
    /// What became of the mask.
    #[must_use]
    pub const fn mask(&self) -> MaskChange {
        match (
            self.before.has(Entry::MASKED),
            self.after.has(Entry::MASKED),
        ) {
            (false, true) => MaskChange::Masked,
            (true, false) => MaskChange::Unmasked,
            _ => MaskChange::None,
        }
    }
}

/// What the window shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Id,
    Version,
    Arbitration,
    Table(u8, Half),
    Unknown,
}

/// The I/O APIC of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ioapic {
    base: u64,
    select: u32,
    id: u32,
    /// The pins with a request: those that are high, but for what [`Ioapic::withdraw`] took and KVM_SET_IRQCHIP gave.
    irr: Pins,
    /// Of the pins in `irr` that take edges: those whose message is sent.
    sent: Pins,
    table: [Entry; PINS as usize],
    lines: [Line; PINS as usize],
}

impl Default for Ioapic {
    fn default() -> Self {
        Self::new()
    }
}

impl Ioapic {
    /// The chip after a reset: every pin is masked.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            base: DEFAULT_BASE,
            select: 0,
            id: 0,
            irr: Pins::EMPTY,
            sent: Pins::EMPTY,
            table: [Entry::MASKED; PINS as usize],
            lines: [Line::LOW; PINS as usize],
        }
    }

    /// Resets the chip. The lines are the devices'; they stay.
    pub fn reset(&mut self) {
        *self = Self {
            lines: self.lines,
            ..Self::new()
        };
    }

    /// The entry of a pin.
    #[must_use]
    pub fn entry(&self, pin: u8) -> Option<Entry> {
        self.table.get(usize::from(pin)).copied()
    }

    /// The pins with a request, whether or not they may send.
    #[must_use]
    pub const fn requests(&self) -> Pins {
        self.irr
    }

    /// Whether the chip answers at this guest-physical address.
    #[must_use]
    pub const fn contains(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.base) < SIZE
    }

    // IOREGSEL is at 0 and IOWIN at 0x10 (82093AA, 3.1); between and above there is nothing.
    const SELECT: u64 = 0;
    const WINDOW: u64 = 0x10;

    fn register(&self) -> Register {
        match self.select {
            0 => Register::Id,
            1 => Register::Version,
            2 => Register::Arbitration,
            other => {
                let half = if other & 1 == 0 {
                    Half::Low
                } else {
                    Half::High
                };
                match u8::try_from(other.wrapping_sub(0x10) >> 1) {
                    Ok(pin) if pin < PINS => Register::Table(pin, half),
                    _ => Register::Unknown,
                }
            }
        }
    }

    fn window(&self) -> u32 {
        match self.register() {
            // The arbitration ID is that of the last message on the bus of the APICs, which nobody has had for long.
            Register::Id | Register::Arbitration => (self.id & 0xf) << 24,
            Register::Version => (u32::from(PINS - 1) << 16) | VERSION,
            Register::Table(pin, half) => self.entry(pin).map_or(u32::MAX, |e| e.half(half)),
            Register::Unknown => u32::MAX,
        }
    }

    /// Reads `data.len()` bytes at a guest-physical address. A register has 32 bits: eight bytes have zeros above, and one or
    /// two are the lowest of it. Other widths leave `data` alone. Between registers there are zeros.
    ///
    /// # Errors
    ///
    /// [`Elsewhere`] if [`Ioapic::contains`] says no.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), Elsewhere> {
        if !self.contains(gpa) {
            return Err(Elsewhere);
        }
        let value = match gpa % SIZE {
            Self::SELECT => self.select,
            Self::WINDOW => self.window(),
            _ => 0,
        };
        if matches!(data.len(), 1 | 2 | 4 | 8) {
            let bytes = u64::from(value).to_le_bytes();
            for (to, from) in data.iter_mut().zip(bytes) {
                *to = from;
            }
        }
        Ok(())
    }

    /// Writes at a guest-physical address. One or two bytes are a register whose other bits are zero; of eight the upper four
    /// are lost; other widths, and what is between registers, do nothing. Says if an entry was written.
    ///
    /// # Errors
    ///
    /// [`Elsewhere`] if [`Ioapic::contains`] says no.
    pub fn write(&mut self, gpa: u64, data: &[u8]) -> Result<Option<TableWrite>, Elsewhere> {
        if !self.contains(gpa) {
            return Err(Elsewhere);
        }
        let value = match *data {
            [a] => a.into(),
            [a, b] => u16::from_le_bytes([a, b]).into(),
            [a, b, c, d] | [a, b, c, d, _, _, _, _] => u32::from_le_bytes([a, b, c, d]),
            _ => return Ok(None),
        };
        match gpa % SIZE {
            Self::SELECT => self.select = value & 0xff,
            Self::WINDOW => return Ok(self.write_window(value)),
            _ => {}
        }
        Ok(None)
    }

    fn write_window(&mut self, value: u32) -> Option<TableWrite> {
        match self.register() {
            Register::Id => {
                self.id = (value >> 24) & 0xf;
                None
            }
            Register::Table(pin, half) => {
                let entry = self.table.get_mut(usize::from(pin))?;
                let before = *entry;
                let after = before.with_half(half, value);
                *entry = after;
                Some(TableWrite {
                    pin,
                    before,
                    after,
                    pending: self.pending(pin, after),
                })
            }
            Register::Version | Register::Arbitration | Register::Unknown => None,
        }
    }

    /// Whether a level-triggered pin has a request that nothing holds back.
    const fn pending(&self, pin: u8, entry: Entry) -> bool {
        self.irr.has(pin)
            && entry.has(Entry::LEVEL)
            && !entry.has_any(Entry::MASKED.with(Entry::REMOTE_IRR))
    }

    /// Has `source` drive a pin.
    pub fn set_line(&mut self, pin: u8, source: Source, signal: Signal) -> Raise {
        let Some(line) = self.lines.get_mut(usize::from(pin)) else {
            return Raise::Ignored;
        };
        match line.drive(source, signal) {
            Signal::High => self.raise(pin),
            Signal::Low => {
                self.withdraw(pin);
                Raise::Lowered
            }
        }
    }

    /// Makes a request at a pin, as if its line had been driven high, which it need not be: for what [`Ioapic::set_state`] says.
    pub fn raise(&mut self, pin: u8) -> Raise {
        let Some(entry) = self.table.get_mut(usize::from(pin)) else {
            return Raise::Ignored;
        };
        let this = Pins::of(pin);
        let was_high = self.irr.has(pin);
        self.irr = self.irr.with(this);
        match entry.trigger() {
            Trigger::Edge => {
                // Even one that is lost to the guest here is shown to KVM_GET_IRQCHIP, as in KVM.
                self.sent = self.sent.without(this);
                if was_high {
                    return Raise::Coalesced;
                }
                if entry.has(Entry::MASKED) {
                    return Raise::Ignored;
                }
                self.sent = self.sent.with(this);
                Raise::Fires(entry.message())
            }
            Trigger::Level => {
                if entry.has_any(Entry::MASKED.with(Entry::REMOTE_IRR)) {
                    return Raise::Ignored;
                }
                *entry |= Entry::REMOTE_IRR;
                Raise::Fires(entry.message())
            }
        }
    }

    /// Takes back the request of a pin, whatever its line: [`TableWrite::pending`] says when.
    pub fn withdraw(&mut self, pin: u8) {
        self.irr = self.irr.without(Pins::of(pin));
    }

    /// Sends what waits at a level-triggered pin, if anything does. Edges never wait.
    #[must_use]
    pub fn fire(&mut self, pin: u8) -> Option<Message> {
        let entry = self.entry(pin)?;
        if !self.pending(pin, entry) {
            return None;
        }
        self.raise(pin).message()
    }

    /// The message of a pin was taken by no local APIC: there will be no EOI for it.
    pub fn refused(&mut self, pin: u8) {
        if let Some(entry) = self.table.get_mut(usize::from(pin)) {
            *entry = entry.without(Entry::REMOTE_IRR);
        }
    }

    /// The pins with this vector: an EOI for it is one for all of them. Who waits for that (resampling eventfds, the interval
    /// timer) is to be told before [`Ioapic::eoi`], for edges and levels alike.
    #[must_use]
    pub fn pins_of(&self, vector: u8) -> Pins {
        (0..PINS)
            .zip(&self.table)
            .filter(|(_, entry)| entry.vector() == vector)
            .fold(Pins::EMPTY, |pins, (pin, _)| pins.with(Pins::of(pin)))
    }

    /// A local APIC's EOI for what these pins sent: only for an interrupt that was level-triggered, and not if the guest
    /// suppresses the broadcast of EOIs. Says which of the pins have another one to [`Ioapic::fire`].
    ///
    /// On the chip some time passes before they do. A guest that never quiets the device gets on, slowly, only if that is so
    /// here too: KVM has every ten thousandth in a row wait for 10 ms.
    #[must_use]
    pub fn eoi(&mut self, pins: Pins) -> Pins {
        let mut again = Pins::EMPTY;
        for pin in pins {
            self.refused(pin);
            if self.entry(pin).is_some_and(|e| self.pending(pin, e)) {
                again = again.with(Pins::of(pin));
            }
        }
        again
    }

    /// The state, for KVM_GET_IRQCHIP. Requests of edges whose message is sent are none any more.
    #[must_use]
    pub fn state(&self) -> IoapicState {
        IoapicState {
            base_address: self.base,
            ioregsel: self.select,
            id: self.id,
            irr: self.irr.without(self.sent).bits(),
            pad: 0,
            redirtbl: self.table.map(Entry::bits),
        }
    }

    /// Sets the state (KVM_SET_IRQCHIP), but for the requests: these are returned, and each is for [`Ioapic::raise`]. The lines
    /// stay as they are. Any state will do.
    #[must_use]
    pub fn set_state(&mut self, state: &IoapicState) -> Pins {
        self.base = state.base_address;
        self.select = state.ioregsel;
        self.id = state.id;
        self.irr = Pins::EMPTY;
        self.sent = Pins::EMPTY;
        self.table = state.redirtbl.map(Entry::new);
        Pins::new(state.irr & ((1 << PINS) - 1))
    }
}
