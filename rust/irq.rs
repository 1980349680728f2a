// SPDX-License-Identifier: GPL-2.0

//! The interrupts of a VM: from a line or a message of a device to the local APICs.
//!
//! ```text
//! KVM_IRQ_LINE, irqfds, the PIT --> a GSI --> routes --+--> 8259A --> INT --> who takes ExtINT
//! KVM_SIGNAL_MSI ------------------------+             +--> I/O APIC ---+
//!                                        |             +--> message ----+--> local APICs
//!                                        +------------------------------+
//! ```
//!
//! All of that works in any context, hard interrupts included: routes are read under SRCU, the
//! controllers have locks that turn interrupts off. No lock is held when an eventfd is signalled.
//!
//! The way back is the end of an interrupt: a vCPU tells [`Irqs::eoi`] of the vectors that
//! [`Irqs::eoi_vectors`] named, and a device that holds a line until then is told by an eventfd.

mod chips;
mod clock;
pub(crate) mod irqfd;
mod msi;
pub(crate) mod pit;
mod resample;
mod routing;

use crate::apics::Apics;
use crate::bindings::kvm_irq_routing;
use crate::bindings::kvm_irq_routing_entry;
use crate::bindings::kvm_msi;
use crate::bindings::KVM_MSI_VALID_DEVID;
use crate::linux::spinlock::IrqSpinLock;
use crate::linux::srcu::SrcuCell;
use crate::linux::user;
use crate::x86::apic::message::DeliveryMode;
use crate::x86::apic::message::Identity;
use crate::x86::apic::message::Message;
use crate::x86::ioapic::Ioapic;
use crate::x86::line::Signal;
use crate::x86::line::Source;
use crate::x86::line::Trigger;
use crate::x86::pic::Pic;
use clock::Clock;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::static_lock_class;
use kernel::sync::Arc;
use kernel::sync::Mutex;
use msi::Msi;
use pit::PitState;
use resample::Resamplers;
use routing::Input;
use routing::Route;
use routing::Table;

pub(crate) use routing::MAX_ROUTES;

/// Which interrupt controllers are in the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// None.
    None,
    /// The local APICs (KVM_CAP_SPLIT_IRQCHIP).
    Split,
    /// All of a PC's (KVM_CREATE_IRQCHIP).
    Kernel,
}

/// Who drives a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Caller {
    /// User space that goes by what became of the interrupt before ([`clock`]).
    Counts,
    /// Anyone else.
    Other,
}

/// The interrupts of a VM.
#[pin_data]
pub(crate) struct Irqs {
    apics: Arc<Apics>,
    /// The [`Mode`]: in the low two bits, and above how many GSIs are inputs of an I/O APIC in user
    /// space. Set once, before there is a vCPU.
    mode: AtomicU32,
    /// Held to change `routes` and `resamplers`.
    #[pin]
    update: Mutex<()>,
    #[pin]
    routes: SrcuCell<Table>,
    #[pin]
    resamplers: SrcuCell<Resamplers>,
    #[pin]
    ioapic: IrqSpinLock<Ioapic>,
    /// Of the clock's interrupt: who has yet to end it. Written inside the lock of `ioapic`.
    clock: Clock,
    #[pin]
    pic: IrqSpinLock<Pic>,
    /// What the INT of `pic` carries. Written inside its lock.
    int: AtomicBool,
    #[pin]
    pit: IrqSpinLock<PitState>,
    /// The PIT waits for the ends of its interrupts.
    pit_waits: AtomicBool,
}

const MODE_NONE: u32 = 0;
const MODE_SPLIT: u32 = 1;
const MODE_KERNEL: u32 = 2;

impl Irqs {
    /// Without controllers and routes: ENOMEM.
    pub(crate) fn new(apics: &Arc<Apics>) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                apics: apics.clone(),
                mode: AtomicU32::new(MODE_NONE),
                update <- new_mutex!((), "rkvm_routes"),
                routes <- SrcuCell::new(Table::empty()?),
                resamplers <- SrcuCell::new(Resamplers::none()?),
                ioapic <- IrqSpinLock::new(Ioapic::new(), c"rkvm_ioapic", static_lock_class!()),
                clock: Clock::new(),
                pic <- IrqSpinLock::new(Pic::new(), c"rkvm_pic", static_lock_class!()),
                int: AtomicBool::new(false),
                pit <- IrqSpinLock::new(PitState::new(), c"rkvm_pit", static_lock_class!()),
                pit_waits: AtomicBool::new(false),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Which controllers are in the kernel. Does not change any more when there are vCPUs.
    #[inline]
    pub(crate) fn mode(&self) -> Mode {
        // Acquire: with the mode, the routes are seen that it began with.
        match self.mode.load(Ordering::Acquire) & 3 {
            MODE_NONE => Mode::None,
            MODE_SPLIT => Mode::Split,
            _ => Mode::Kernel,
        }
    }

    /// Whether there are local APICs in the kernel.
    #[inline]
    pub(crate) fn in_kernel(&self) -> bool {
        self.mode() != Mode::None
    }

    /// KVM_CREATE_IRQCHIP, when there are neither controllers nor vCPUs, and the caller sees to it
    /// that there will be none meanwhile: ENOMEM.
    pub(crate) fn create_kernel(&self) -> Result {
        let _update = self.update.lock();
        drop(self.routes.replace(Table::default_routes()?));
        self.mode.store(MODE_KERNEL, Ordering::Release);
        Ok(())
    }

    /// KVM_CAP_SPLIT_IRQCHIP, as [`Self::create_kernel`]: the first `pins` GSIs are inputs of an I/O
    /// APIC in user space. EINVAL if there are not so many.
    pub(crate) fn check_pins(pins: u64) -> Result<u32> {
        match u32::try_from(pins) {
            Ok(pins) if pins as usize <= MAX_ROUTES => Ok(pins),
            _ => Err(EINVAL),
        }
    }

    /// Goes on from [`Self::check_pins`].
    pub(crate) fn create_split(&self, pins: u32) {
        self.mode.store(pins << 2 | MODE_SPLIT, Ordering::Release);
    }

    /// KVM_SET_GSI_ROUTING, `arg` being the user's address: EINVAL without controllers, for too many
    /// routes, or for one that does not do; EFAULT; ENOMEM.
    pub(crate) fn set_routes(&self, arg: usize) -> Result {
        let head = user::read::<kvm_irq_routing>(arg)?;
        if !self.in_kernel() || head.nr as usize > MAX_ROUTES || head.flags != 0 {
            return Err(EINVAL);
        }
        let entries = user::read_array::<kvm_irq_routing_entry>(
            arg.wrapping_add(size_of::<kvm_irq_routing>()),
            head.nr as usize,
        )?;
        let inputs = self.mode() == Mode::Kernel;
        let next = Table::from_user(&entries, self.apics.ids(), inputs)?;
        let _update = self.update.lock();
        drop(self.routes.replace(next));
        self.apics.rescan();
        Ok(())
    }

    /// KVM_SIGNAL_MSI: how many local APICs took it. EINVAL without them, for flags, or for an address
    /// that does not do.
    pub(crate) fn signal_msi(&self, msi: &kvm_msi) -> Result<isize> {
        if !self.in_kernel() || msi.flags & !KVM_MSI_VALID_DEVID != 0 {
            return Err(EINVAL);
        }
        let msi = Msi::of_user(msi);
        if !msi.is_valid(self.apics.ids()) {
            return Err(EINVAL);
        }
        Ok(self.send_msi(&msi))
    }

    /// Sends a message: KVM's value for how it fared.
    fn send_msi(&self, msi: &Msi) -> isize {
        let (ids, broadcast) = self.apics.addressing();
        if !msi.is_valid(ids) {
            return -1;
        }
        match msi.message(ids, broadcast) {
            Some(message) => self.deliver(&message),
            None => 0,
        }
    }

    /// Delivers a device's message: KVM's value for how it fared.
    fn deliver(&self, message: &Message) -> isize {
        match message.mode {
            // Who takes ExtINT asks the 8259A without being told to.
            DeliveryMode::ExtInt => 0,
            _ => self.apics.deliver(message).abi(),
        }
    }

    /// Has `source` drive the line with a GSI. What became of it is KVM's `status`: -1 if it was
    /// ignored, 0 if it is one with the request before, else how many took it. In any context.
    pub(crate) fn set_line(&self, gsi: u32, source: Source, signal: Signal) -> isize {
        self.drive(&self.routes.read(), gsi, source, signal, Caller::Other)
    }

    /// KVM_IRQ_LINE_STATUS: as [`Self::set_line`], by user space that counts on the status.
    pub(crate) fn set_line_status(&self, gsi: u32, signal: Signal) -> isize {
        self.drive(
            &self.routes.read(),
            gsi,
            Source::USER,
            signal,
            Caller::Counts,
        )
    }

    fn drive(
        &self,
        table: &Table,
        gsi: u32,
        source: Source,
        signal: Signal,
        caller: Caller,
    ) -> isize {
        let mut status = -1;
        for route in table.routes(gsi) {
            let this = match route {
                Route::Input(input) => self.set_input(*input, source, signal, caller),
                Route::Msi(msi) if signal.is_high() => self.send_msi(msi),
                // The end of a level is no message.
                Route::Msi(_) => -1,
            };
            if this >= 0 {
                status = this.saturating_add(status.max(0));
            }
        }
        status
    }

    // Not inlined: what it saves and sets up is not for messages, which have the shorter way.
    #[inline(never)]
    fn set_input(&self, input: Input, source: Source, signal: Signal, caller: Caller) -> isize {
        match input {
            Input::Pic(pin) => self.set_pic_line(pin, source, signal),
            Input::Ioapic(pin) => self.set_ioapic_line(pin, source, signal, caller),
        }
    }

    /// Has `source` drive the line high and low again. In any context.
    pub(crate) fn pulse(&self, gsi: u32, source: Source) {
        let table = self.routes.read();
        for signal in [Signal::High, Signal::Low] {
            self.drive(&table, gsi, source, signal, Caller::Other);
        }
    }

    /// The vectors whose ends on an APIC are to be told: to [`Self::eoi`], or to user space if the I/O
    /// APIC is there. A bit each. `pending`: a vector that was requested there and has not ended.
    ///
    /// They are those that the APIC may get from now on, and those that it got before the I/O APIC was
    /// told to send elsewhere.
    pub(crate) fn eoi_vectors(&self, who: &Identity, pending: &dyn Fn(u8) -> bool) -> [u64; 4] {
        let mut vectors = [0; 4];
        let mut add = |message: &Message| {
            if who.matches(message.target, None) || pending(message.vector) {
                if let Some(word) = vectors.get_mut(usize::from(message.vector >> 6)) {
                    *word |= 1 << (message.vector & 63);
                }
            }
        };
        match self.mode() {
            Mode::None => {}
            Mode::Split => {
                let pins = self.mode.load(Ordering::Relaxed) >> 2;
                let (ids, broadcast) = self.apics.addressing();
                for msi in self.routes.read().messages_below(pins) {
                    match msi.message(ids, broadcast) {
                        Some(message) if message.trigger == Trigger::Level => add(&message),
                        _ => {}
                    }
                }
            }
            Mode::Kernel => self.for_each_reported(&mut add),
        }
        vectors
    }

    /// An APIC has ended an interrupt. `level`: it was level-triggered, and the I/O APIC is to be told;
    /// others may want to know in any case. In a thread, without locks.
    pub(crate) fn eoi(&self, vector: u8, level: bool) {
        if self.mode() == Mode::Kernel {
            self.ioapic_eoi(vector, level);
        }
    }

    /// The GSI of an input.
    fn gsi(&self, input: Input) -> Option<u32> {
        self.routes.read().gsi(input)
    }

    /// An interrupt that came by this input has ended, or was acknowledged with no end to come.
    fn ended(&self, input: Input) {
        let Some(gsi) = self.gsi(input) else {
            return;
        };
        self.resample(gsi);
        if gsi == pit::GSI && self.pit_waits.load(Ordering::Relaxed) {
            self.pit_acknowledged();
        }
    }

    /// This input was masked, and is no more.
    fn unmasked(&self, input: Input) {
        if self.gsi(input) == Some(pit::GSI) {
            self.pit_unmasked();
        }
    }

    /// Whether somebody waits for the ends of what comes by this input.
    fn is_awaited(&self, input: Input) -> bool {
        self.gsi(input).is_some_and(|gsi| {
            gsi == pit::GSI && self.pit_waits.load(Ordering::Relaxed)
                || self.resamplers.read().wait_for(gsi)
        })
    }
}
