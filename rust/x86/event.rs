// SPDX-License-Identifier: GPL-2.0

//! Events: exceptions, NMIs and interrupts on their way into the guest.
//!
//! One [`PendingEvents`] belongs to each vCPU. An event is pending until an entry to the guest takes it, and injected from then
//! until the processor has delivered it: an exit in the middle of delivery makes it injected again
//! ([`PendingEvents::redeliver`]). [`PendingEvents::select`] picks what the next entry takes.

use super::bits::bit_flags;
use super::exception::Fault;
use super::exception::Vector;

/// How an exception combines with one that comes while it is delivered (SDM vol. 3, table 7-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExceptionClass {
    /// Nothing comes of it: the second is delivered.
    Benign,
    /// Two of these make a double fault.
    Contributory,
    /// One of these and then one of its own or a contributory one make a double fault.
    PageFault,
    /// A contributory exception or a page fault on top of it shuts the processor down.
    DoubleFault,
}

impl ExceptionClass {
    /// The class of a vector.
    #[must_use]
    pub const fn of(vector: Vector) -> Self {
        match vector {
            Vector::DE | Vector::TS | Vector::NP | Vector::SS | Vector::GP | Vector::CP => {
                Self::Contributory
            }
            Vector::PF | Vector::VE => Self::PageFault,
            Vector::DF => Self::DoubleFault,
            _ => Self::Benign,
        }
    }
}

/// What two exceptions make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combination {
    /// The second is delivered; the first comes back when its instruction is run again.
    Second,
    /// A double fault.
    DoubleFault,
    /// A triple fault: shutdown.
    TripleFault,
}

/// What `second`, raised while `first` is delivered, makes of the two.
#[must_use]
pub const fn combine(first: Vector, second: Vector) -> Combination {
    use ExceptionClass as C;
    match (C::of(first), C::of(second)) {
        (C::DoubleFault, C::Contributory | C::PageFault | C::DoubleFault) => {
            Combination::TripleFault
        }
        (C::Contributory, C::Contributory) | (C::PageFault, C::Contributory | C::PageFault) => {
            Combination::DoubleFault
        }
        _ => Combination::Second,
    }
}

/// An exception with what goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which.
    pub vector: Vector,
    /// The error code, for vectors that have one.
    pub error: Option<u32>,
    /// What is to be put in CR2 (#PF) or DR6 (#DB, in the format of the pending debug exceptions of VMX) when it is delivered.
    pub payload: Option<u64>,
    /// For INT3, INTO and INT1: the length of the instruction, which the return address is past. Zero for the others.
    pub insn_len: u8,
}

impl From<Fault> for Exception {
    fn from(fault: Fault) -> Self {
        Self {
            vector: fault.vector,
            error: fault.error,
            payload: fault.cr2,
            insn_len: 0,
        }
    }
}

/// An interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// The vector, 0 to 255.
    pub vector: u8,
    /// For INT n: the length of the instruction. Zero for an external interrupt.
    pub insn_len: u8,
}

impl Interrupt {
    /// Whether it is one of software.
    #[inline]
    #[must_use]
    pub const fn is_soft(&self) -> bool {
        self.insn_len != 0
    }
}

/// What makes the processor hold events back after an instruction (the interruptibility state of VMX).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shadow {
    /// Nothing.
    #[default]
    None,
    /// STI: interrupts are held.
    Sti,
    /// MOV or POP to SS: interrupts and debug exceptions are held, and NMIs may be.
    MovSs,
}

/// What an entry to the guest takes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// An exception. Its payload is to be put in place.
    Exception(Exception),
    /// The NMI.
    Nmi,
    /// An interrupt.
    Interrupt(Interrupt),
}

/// Where external interrupts come from, if not from KVM_INTERRUPT: interrupt controllers.
pub trait InterruptSource {
    /// Whether one waits that the processor's priority lets through.
    fn waits(&mut self) -> bool;
    /// Takes the one that comes first, if one [waits](Self::waits): it is in service from now on.
    fn acknowledge(&mut self) -> Option<u8>;
}

/// No interrupt controller.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSource;

impl InterruptSource for NoSource {
    fn waits(&mut self) -> bool {
        false
    }

    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
}

/// What holds events back at an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// RFLAGS.IF.
    pub interrupts_enabled: bool,
    /// The interrupt shadow.
    pub shadow: Shadow,
}

/// What to do at an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// What to inject.
    pub inject: Option<Injection>,
    /// Another event waits that only the delivery of this one holds back: exit right after it.
    pub exit_at_once: bool,
    /// An NMI waits until NMIs are taken: open the NMI window.
    pub nmi_window: bool,
    /// An interrupt waits until interrupts are taken: open the interrupt window.
    pub interrupt_window: bool,
}

/// Classes of events that come between two instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// An event whose delivery began and was broken off by an exit: the processor would have gone on with it.
    Redelivery,
    /// A trap on the last instruction, or what an instruction that was emulated has raised.
    Exception,
    /// A non-maskable interrupt.
    Nmi,
    /// An interrupt, of a controller or the VMM.
    Interrupt,
}

bit_flags! {
    /// What can hold an event back.
    pub struct Holds(u32) {
        /// RFLAGS.IF is clear.
        INTERRUPTS_OFF = 1 << 0;
        /// The last instruction was STI, or loaded SS.
        SHADOW = 1 << 1;
        /// The handler of an NMI runs, until IRET.
        NMI_HANDLER = 1 << 2;
    }
}

/// A class, and what holds it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The class.
    pub class: Class,
    /// Any of these does.
    pub held_by: Holds,
}

/// Which event comes first (SDM vol. 3, table 7-2, for what reaches a virtual processor: INIT and SIPI reset it before it is entered, and
/// machine checks are the host's). An exception while another is delivered makes one of the two: [`combine`].
pub const PRIORITIES: [Row; 4] = [
    Row {
        class: Class::Redelivery,
        held_by: Holds::empty(),
    },
    Row {
        class: Class::Exception,
        held_by: Holds::empty(),
    },
    NMI,
    INTERRUPT,
];

const NMI: Row = Row {
    class: Class::Nmi,
    held_by: Holds::NMI_HANDLER.with(Holds::SHADOW),
};
const INTERRUPT: Row = Row {
    class: Class::Interrupt,
    held_by: Holds::INTERRUPTS_OFF.with(Holds::SHADOW),
};

/// What an exit says about an event that it broke the delivery of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectoring {
    /// An exception.
    Exception(Exception),
    /// An NMI.
    Nmi,
    /// An interrupt, external or of software.
    Interrupt(Interrupt),
}

impl Vectoring {
    /// Whether an instruction has asked for it.
    #[must_use]
    pub const fn is_soft(&self) -> bool {
        match self {
            Self::Exception(exception) => exception.insn_len != 0,
            Self::Nmi => false,
            Self::Interrupt(interrupt) => interrupt.is_soft(),
        }
    }
}

/// The state that KVM_SET_VCPU_EVENTS gives is none that there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// The events of one vCPU, as KVM_GET_VCPU_EVENTS shows and KVM_SET_VCPU_EVENTS sets them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventsState {
    /// An exception that waits for an entry.
    pub exception_pending: Option<Exception>,
    /// An exception whose delivery began.
    pub exception_injected: Option<Exception>,
    /// An interrupt whose delivery began.
    pub interrupt_injected: Option<Interrupt>,
    /// The delivery of an NMI began.
    pub nmi_injected: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// The handler of an NMI runs: NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// The vCPU is to be shut down.
    pub triple_fault: bool,
}

/// The events of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PendingEvents {
    exception_pending: Option<Exception>,
    exception_injected: Option<Exception>,
    interrupt_injected: Option<Interrupt>,
    /// What KVM_INTERRUPT queued and no entry has taken.
    interrupt_pending: Option<u8>,
    nmi_injected: bool,
    nmi_pending: u8,
    nmi_masked: bool,
    triple_fault: bool,
    /// A debugger wants no interrupts and NMIs to come.
    interrupts_held: bool,
}

impl PendingEvents {
    /// No events.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            exception_pending: None,
            exception_injected: None,
            interrupt_injected: None,
            interrupt_pending: None,
            nmi_injected: false,
            nmi_pending: 0,
            nmi_masked: false,
            triple_fault: false,
            interrupts_held: false,
        }
    }

    /// Has interrupts and NMIs wait, whatever the guest says, or not any more.
    pub fn hold_interrupts(&mut self, held: bool) {
        self.interrupts_held = held;
    }

    /// Raises an exception. If one is on its way already, the two combine.
    pub fn raise(&mut self, exception: Exception) {
        let _ = self.raise_over(exception);
    }

    /// The same, and returns what they make. The payload of an exception that makes a double fault is for the caller to put where it
    /// belongs.
    pub fn raise_over(&mut self, exception: Exception) -> Combination {
        let Some(first) = self.exception_pending.or(self.exception_injected) else {
            self.exception_pending = Some(exception);
            return Combination::Second;
        };
        self.exception_injected = None;
        let combination = combine(first.vector, exception.vector);
        self.exception_pending = match combination {
            Combination::Second => Some(exception),
            Combination::DoubleFault => Some(Exception {
                vector: Vector::DF,
                error: Some(0),
                payload: None,
                insn_len: 0,
            }),
            Combination::TripleFault => {
                self.triple_fault = true;
                None
            }
        };
        combination
    }

    /// Forgets an exception that no entry has taken: KVM_SET_REGS replaces the state that it was raised in.
    pub fn drop_pending_exception(&mut self) {
        self.exception_pending = None;
    }

    /// Shuts the vCPU down, as soon as it is looked at.
    pub fn raise_triple_fault(&mut self) {
        self.triple_fault = true;
    }

    /// Takes notice of a triple fault, if there was one.
    pub fn take_triple_fault(&mut self) -> bool {
        core::mem::take(&mut self.triple_fault)
    }

    /// Queues an external interrupt (KVM_INTERRUPT without an irqchip). One that waits already is replaced, as in KVM: the VMM
    /// knows from `ready_for_interrupt_injection` that it should not have done so.
    pub fn queue_interrupt(&mut self, vector: u8) {
        self.interrupt_pending = Some(vector);
    }

    /// Whether [`PendingEvents::queue_interrupt`] would take an interrupt that an entry would deliver at once: what KVM calls ready for
    /// interrupt injection.
    #[must_use]
    pub fn ready_for_interrupt(&self, gate: Gate) -> bool {
        self.interrupt_pending.is_none()
            && !self.delivery_begun()
            && self.exception_pending.is_none()
            && gate.interrupts_enabled
            && gate.shadow == Shadow::None
    }

    /// Queues an NMI. One can wait behind the one that is handled, and two behind none.
    pub fn queue_nmi(&mut self) {
        let limit = if self.nmi_masked || self.nmi_injected {
            1
        } else {
            2
        };
        self.nmi_pending = self.nmi_pending.saturating_add(1).min(limit);
    }

    /// Tells whether NMIs are blocked, as the processor says after an exit.
    pub fn set_nmi_masked(&mut self, masked: bool) {
        self.nmi_masked = masked;
    }

    /// Whether the handler of an NMI runs.
    #[must_use]
    pub const fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    /// Whether anything waits that an entry could deliver or that wakes a halted vCPU, given the gate.
    #[must_use]
    pub fn has_deliverable(&self, gate: Gate) -> bool {
        self.triple_fault
            || self.delivery_begun()
            || self.exception_pending.is_some()
            || (self.nmi_pending > 0 && self.nmi_allowed(gate))
            || (self.interrupt_pending.is_some() && self.interrupt_allowed(gate))
    }

    /// Whether there is nothing at all to select: the entry needs no injection and no window.
    #[inline]
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.exception_pending.is_none()
            && self.exception_injected.is_none()
            && self.interrupt_injected.is_none()
            && self.interrupt_pending.is_none()
            && !self.nmi_injected
            && self.nmi_pending == 0
            && !self.triple_fault
    }

    /// Whether nothing comes before the traps on the previous instruction: no exception, and no event whose
    /// delivery was broken off.
    #[must_use]
    pub const fn takes_traps(&self) -> bool {
        self.exception_pending.is_none() && !self.delivery_begun()
    }

    const fn delivery_begun(&self) -> bool {
        self.exception_injected.is_some() || self.interrupt_injected.is_some() || self.nmi_injected
    }

    fn nmi_allowed(&self, gate: Gate) -> bool {
        !self.held(gate).has_any(NMI.held_by)
    }

    fn interrupt_allowed(&self, gate: Gate) -> bool {
        !self.held(gate).has_any(INTERRUPT.held_by)
    }

    /// Picks what the next entry takes: the first row of [`PRIORITIES`] that has something and is not held. What is picked is injected
    /// from here on; the others are asked for again as soon as they can come.
    pub fn select(&mut self, gate: Gate, source: &mut impl InterruptSource) -> Selection {
        let mut selection = Selection::default();
        for row in &PRIORITIES {
            if self.interrupts_held && matches!(row.class, Class::Nmi | Class::Interrupt) {
                continue;
            }
            if selection.inject.is_none() && !self.held(gate).has_any(row.held_by) {
                selection.inject = self.take(row.class, source);
            }
            if !self.waits(row.class, source) {
                continue;
            }
            match row.class {
                // There is never more than one.
                Class::Redelivery => {}
                // It comes where the handler of what was injected begins.
                Class::Exception => selection.exit_at_once = true,
                // A handler can be interrupted by an NMI as it begins.
                Class::Nmi if self.held(gate).has_any(row.held_by) => selection.nmi_window = true,
                Class::Nmi => selection.exit_at_once = true,
                // And by an interrupt, if it lets them in.
                Class::Interrupt => selection.interrupt_window = true,
            }
        }
        selection
    }

    /// What holds events back now.
    fn held(&self, gate: Gate) -> Holds {
        Holds::empty()
            .with_if(Holds::INTERRUPTS_OFF, !gate.interrupts_enabled)
            .with_if(Holds::SHADOW, !matches!(gate.shadow, Shadow::None))
            .with_if(Holds::NMI_HANDLER, self.nmi_masked)
    }

    /// Whether there is an event of a class.
    fn waits(&self, class: Class, source: &mut impl InterruptSource) -> bool {
        match class {
            Class::Redelivery => false,
            Class::Exception => self.exception_pending.is_some(),
            Class::Nmi => self.nmi_pending > 0,
            Class::Interrupt => self.interrupt_pending.is_some() || source.waits(),
        }
    }

    /// Takes an event of a class, if there is one: its delivery begins with the next entry.
    fn take(&mut self, class: Class, source: &mut impl InterruptSource) -> Option<Injection> {
        match class {
            Class::Redelivery => self.begun(),
            Class::Exception => {
                let exception = self.exception_pending.take()?;
                // The payload goes in with the entry and is in place from then on.
                self.exception_injected = Some(Exception {
                    payload: None,
                    ..exception
                });
                Some(Injection::Exception(exception))
            }
            Class::Nmi => {
                self.nmi_pending = self.nmi_pending.checked_sub(1)?;
                self.nmi_injected = true;
                self.nmi_masked = true;
                Some(Injection::Nmi)
            }
            Class::Interrupt => {
                let queued = self.interrupt_pending.take();
                let vector = queued.or_else(|| source.acknowledge())?;
                let interrupt = Interrupt {
                    vector,
                    insn_len: 0,
                };
                self.interrupt_injected = Some(interrupt);
                Some(Injection::Interrupt(interrupt))
            }
        }
    }

    /// The event whose delivery has begun, or was broken off.
    #[must_use]
    pub fn begun(&self) -> Option<Injection> {
        if let Some(exception) = self.exception_injected {
            Some(Injection::Exception(exception))
        } else if self.nmi_injected {
            Some(Injection::Nmi)
        } else {
            self.interrupt_injected.map(Injection::Interrupt)
        }
    }

    /// Takes notice that the guest was entered and has exited: what was injected is delivered, unless the exit broke its
    /// delivery.
    pub fn redeliver(&mut self, vectoring: Option<Vectoring>) {
        self.exception_injected = None;
        self.interrupt_injected = None;
        self.nmi_injected = false;
        match vectoring {
            None => {}
            Some(Vectoring::Exception(exception)) => self.exception_injected = Some(exception),
            Some(Vectoring::Interrupt(interrupt)) => self.interrupt_injected = Some(interrupt),
            Some(Vectoring::Nmi) => {
                self.nmi_injected = true;
                // It is injected anew, which has to find NMIs unblocked; the entry blocks them.
                self.nmi_masked = true;
            }
        }
    }

    /// Makes the effects of a waiting exception's payload the caller's: for a VMM that does not know of payloads
    /// (KVM_CAP_EXCEPTION_PAYLOAD off), before it reads the state.
    pub fn take_payload(&mut self) -> Option<(Vector, u64)> {
        let exception = self.exception_pending.as_mut()?;
        let payload = exception.payload.take()?;
        Some((exception.vector, payload))
    }

    /// The state, for a VMM. `injected_interrupt` counts what KVM_INTERRUPT queued as well, so that it is not lost on the way to another
    /// machine: the two are one in the ABI.
    #[must_use]
    pub fn state(&self) -> EventsState {
        EventsState {
            exception_pending: self.exception_pending,
            exception_injected: self.exception_injected,
            interrupt_injected: self
                .interrupt_injected
                .or(self.interrupt_pending.map(|vector| Interrupt {
                    vector,
                    insn_len: 0,
                })),
            nmi_injected: self.nmi_injected,
            nmi_pending: self.nmi_pending > 0,
            nmi_masked: self.nmi_masked,
            triple_fault: self.triple_fault,
        }
    }

    /// Sets the state, for a VMM. An external interrupt waits again until it can be taken.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if an exception has a vector that is none, or two of them are on their way.
    pub fn set_state(&mut self, state: &EventsState) -> Result<(), Invalid> {
        let exceptions = [state.exception_pending, state.exception_injected];
        if exceptions.iter().all(Option::is_some)
            || exceptions
                .iter()
                .flatten()
                .any(|e| !e.vector.is_exception())
        {
            return Err(Invalid);
        }
        self.exception_pending = state.exception_pending;
        self.exception_injected = state.exception_injected;
        self.interrupt_injected = state.interrupt_injected.filter(Interrupt::is_soft);
        self.interrupt_pending = state
            .interrupt_injected
            .filter(|i| !i.is_soft())
            .map(|i| i.vector);
        self.nmi_injected = state.nmi_injected;
        self.nmi_pending = u8::from(state.nmi_pending);
        self.nmi_masked = state.nmi_masked;
        self.triple_fault = state.triple_fault;
        Ok(())
    }

    /// The external interrupt that waits or is being delivered: KVM_GET_SREGS shows it in its bitmap.
    #[must_use]
    pub const fn interrupt_in_bitmap(&self) -> Option<u8> {
        match self.interrupt_injected {
            Some(interrupt) if !interrupt.is_soft() => Some(interrupt.vector),
            _ => self.interrupt_pending,
        }
    }
}
