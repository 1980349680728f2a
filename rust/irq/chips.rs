// SPDX-License-Identifier: GPL-2.0

//! The I/O APIC and the pair of 8259A, as lines, the guest and user space reach them.
//!
//! The models are pure; here are their locks, and what follows from a change. Messages of the I/O APIC
//! are delivered inside its lock, so that the local APICs get them in its order. Everything else comes
//! after the lock: eventfds are signalled and other inputs driven without one.

use super::clock;
use super::routing::Input;
use super::Caller;
use super::Irqs;
use super::Mode;
use crate::abi::kvm_irqchip;
use crate::bindings::KVM_IRQCHIP_IOAPIC;
use crate::bindings::KVM_IRQCHIP_PIC_MASTER;
use crate::bindings::KVM_IRQCHIP_PIC_SLAVE;
use crate::linux::user;
use crate::x86::apic::message::Message;
use crate::x86::ioapic;
use crate::x86::ioapic::entry;
use crate::x86::ioapic::entry::Entry;
use crate::x86::ioapic::Ioapic;
use crate::x86::ioapic::MaskChange;
use crate::x86::line::Outcome;
use crate::x86::line::Pins;
use crate::x86::line::Signal;
use crate::x86::line::Source;
use crate::x86::line::Trigger;
use crate::x86::pic;
use crate::x86::pic::Pic;
use crate::x86::pic::PicState;
use crate::x86::pic::Role;
use core::mem::offset_of;
use core::sync::atomic::Ordering;
use kernel::prelude::*;

impl Irqs {
    /// Delivers what a pin of the I/O APIC sends, whose lock is held: KVM's value for how it fared.
    fn send(&self, chip: &mut Ioapic, pin: u8, message: &entry::Message) -> isize {
        let broadcast = self.apics.broadcast();
        let status = match Message::from_io_apic(message, broadcast) {
            Some(message) => self.deliver(&message),
            None => 0,
        };
        if message.trigger == Trigger::Level && status <= 0 {
            chip.refused(pin);
        }
        status
    }

    /// Sends what waits at a pin.
    fn fire(&self, chip: &mut Ioapic, pin: u8) {
        if let Some(message) = chip.fire(pin) {
            self.send(chip, pin, &message);
        }
    }

    /// Has `source` drive a pin of the I/O APIC.
    pub(super) fn set_ioapic_line(
        &self,
        pin: u8,
        source: Source,
        signal: Signal,
        caller: Caller,
    ) -> isize {
        let mut chip = self.ioapic.lock();
        let clock = pin == clock::PIN && signal.is_high() && caller == Caller::Counts;
        if clock && self.clock.is_pending() {
            return Outcome::Coalesced.status() as isize;
        }
        let raise = chip.set_line(pin, source, signal);
        match raise.message() {
            Some(message) => {
                let status = self.send(&mut chip, pin, &message);
                if clock {
                    self.clock.sent(message.vector, status);
                }
                status
            }
            None => raise.outcome().status() as isize,
        }
    }

    /// The guest reads from the I/O APIC; returns if it is there.
    pub(crate) fn ioapic_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.ioapic.lock().read(gpa, data).is_ok()
    }

    /// The guest writes to the I/O APIC; returns if it is there. In a thread, without locks.
    pub(crate) fn ioapic_write(&self, gpa: u64, data: &[u8]) -> bool {
        /// What the vCPUs need not know.
        const LOCAL: Entry = Entry::MASKED
            .with(Entry::REMOTE_IRR)
            .with(Entry::SEND_PENDING)
            .with(Entry::ACTIVE_LOW);
        let write = {
            let mut chip = self.ioapic.lock();
            let write = match chip.write(gpa, data) {
                Ok(Some(write)) => write,
                other => return other.is_ok(),
            };
            if write.before.without(LOCAL) != write.after.without(LOCAL) {
                // Inside the lock: whoever gets the new vector has been told before.
                self.apics.rescan();
                if write.pin == clock::PIN {
                    self.clock.reset();
                }
            }
            write
        };
        let input = Input::Ioapic(write.pin);
        if write.mask() == MaskChange::Unmasked {
            self.unmasked(input);
        }
        if write.pending {
            self.fire_or_ask(input, write.pin);
        }
        true
    }

    /// A pin has a request, and may send, after some time when it might not: its line may have fallen
    /// since, which nobody has seen if an eventfd drives it.
    fn fire_or_ask(&self, input: Input, pin: u8) {
        let waits = |gsi: &u32| self.resamplers.read().wait_for(*gsi);
        match self.gsi(input).filter(waits) {
            Some(gsi) => {
                self.ioapic.lock().withdraw(pin);
                self.ask_resamplers(gsi);
            }
            None => self.fire(&mut self.ioapic.lock(), pin),
        }
    }

    /// An APIC has ended the interrupt with a vector.
    pub(super) fn ioapic_eoi(&self, vector: u8, level: bool) {
        let pins = {
            let chip = self.ioapic.lock();
            self.clock.ended(vector);
            chip.pins_of(vector)
        };
        for pin in pins {
            self.ended(Input::Ioapic(pin));
        }
        if level && !pins.is_empty() {
            let mut chip = self.ioapic.lock();
            for pin in chip.eoi(pins) {
                self.fire(&mut chip, pin);
            }
        }
    }

    /// Calls `f` with each message of the I/O APIC whose end is to be told.
    pub(super) fn for_each_reported(&self, f: &mut dyn FnMut(&Message)) {
        let broadcast = self.apics.broadcast();
        let table = self.ioapic.lock().state().redirtbl.map(Entry::new);
        for (pin, entry) in (0..).zip(table) {
            if entry.trigger() == Trigger::Level
                || pin == clock::PIN
                || self.is_awaited(Input::Ioapic(pin))
            {
                if let Some(message) = Message::from_io_apic(&entry.message(), broadcast) {
                    f(&message);
                }
            }
        }
    }

    /// Changes the 8259As by `f`, and does what follows.
    fn pic<R>(&self, f: impl FnOnce(&mut Pic) -> (R, pic::Effect)) -> R {
        let (result, effect, masks) = {
            let mut chips = self.pic.lock();
            let (result, effect) = f(&mut chips);
            if let Some(signal) = effect.int {
                // Release: who finds it high finds the chips as they are now.
                self.int.store(signal.is_high(), Ordering::Release);
            }
            (result, effect, chips.masks())
        };
        if effect.int == Some(Signal::High) {
            self.apics.extint_changed();
        }
        for pin in effect.ended {
            self.ended(Input::Pic(pin));
        }
        for pin in effect.masks.without(masks) {
            self.unmasked(Input::Pic(pin));
        }
        result
    }

    /// Has `source` drive an input of the 8259As.
    pub(super) fn set_pic_line(&self, pin: u8, source: Source, signal: Signal) -> isize {
        let outcome = self.pic(|chips| chips.set_line(pin, source, signal));
        outcome.status() as isize
    }

    /// Whether the 8259As have an interrupt for who takes ExtINT.
    #[inline]
    pub(crate) fn pic_pending(&self) -> bool {
        self.int.load(Ordering::Acquire)
    }

    /// The processor takes the interrupt of the 8259As: its vector.
    pub(crate) fn pic_acknowledge(&self) -> u8 {
        self.pic(Pic::acknowledge)
    }

    /// The guest reads a register of the 8259As.
    pub(crate) fn pic_read(&self, port: pic::Port) -> u8 {
        self.pic(|chips| chips.read(port))
    }

    /// The guest writes a register of the 8259As.
    pub(crate) fn pic_write(&self, port: pic::Port, value: u8) {
        self.pic(|chips| ((), chips.write(port, value)));
    }

    /// KVM_GET_IRQCHIP, `arg` being the user's address: EFAULT; ENXIO without controllers; EINVAL if
    /// there is none such.
    pub(crate) fn get_chip(&self, arg: usize) -> Result {
        let chip = user::read::<kvm_irqchip>(arg)?;
        let to = arg.wrapping_add(offset_of!(kvm_irqchip, chip));
        if self.mode() != Mode::Kernel {
            return Err(ENXIO);
        }
        match chip.chip_id {
            KVM_IRQCHIP_PIC_MASTER => user::write(to, &self.pic_state(Role::Master)),
            KVM_IRQCHIP_PIC_SLAVE => user::write(to, &self.pic_state(Role::Slave)),
            KVM_IRQCHIP_IOAPIC => {
                let state = self.ioapic.lock().state();
                user::write(to, &state)
            }
            _ => Err(EINVAL),
        }
    }

    fn pic_state(&self, role: Role) -> PicState {
        self.pic.lock().state(role)
    }

    /// KVM_SET_IRQCHIP, as [`Self::get_chip`].
    pub(crate) fn set_chip(&self, arg: usize) -> Result {
        let chip = user::read::<kvm_irqchip>(arg)?;
        let from = arg.wrapping_add(offset_of!(kvm_irqchip, chip));
        if self.mode() != Mode::Kernel {
            return Err(ENXIO);
        }
        let role = match chip.chip_id {
            KVM_IRQCHIP_PIC_MASTER => Role::Master,
            KVM_IRQCHIP_PIC_SLAVE => Role::Slave,
            KVM_IRQCHIP_IOAPIC => {
                self.set_ioapic(&user::read(from)?);
                return Ok(());
            }
            _ => return Err(EINVAL),
        };
        let state = user::read(from)?;
        self.pic(|chips| ((), chips.set_state(role, &state)));
        Ok(())
    }

    fn set_ioapic(&self, state: &ioapic::IoapicState) {
        let mut chip = self.ioapic.lock();
        let requests: Pins = chip.set_state(state);
        self.clock.reset();
        // Before there are messages of the new table.
        self.apics.rescan();
        for pin in requests {
            if let Some(message) = chip.raise(pin).message() {
                self.send(&mut chip, pin, &message);
            }
        }
    }
}
