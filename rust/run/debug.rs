// SPDX-License-Identifier: GPL-2.0

//! The VMM's debugger in a running guest (KVM API, KVM_SET_GUEST_DEBUG): what it has asked for, and the
//! debug exceptions that are its own.
//!
//! A single step is RFLAGS.TF in the hardware. What the kernel completes for the guest leaves a step
//! pending then, as for a guest that steps itself ([`super::retire`]), and the next entry ends at once
//! with the exception: the fast exits need not know of it. Breakpoints are in the hardware's debug
//! registers, and the guest's own are kept here; MOV DR always exits.

use super::LinearRip;
use super::Next;
use super::Run;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::bindings as b;
use crate::tlb::Request;
use crate::x86::event::Exception;
use crate::x86::event::Shadow;
use crate::x86::exception::Vector;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use crate::x86::regs::Rflags;

/// DR0 to DR3, and DR7.
#[derive(Clone, Copy)]
pub(crate) struct Breakpoints {
    /// Linear addresses.
    pub(crate) addresses: [u64; 4],
    /// Which are enabled, and for what.
    pub(crate) control: Dr7,
}

impl Breakpoints {
    /// Those after reset: none.
    pub(crate) const RESET: Self = Self {
        addresses: [0; 4],
        control: Dr7::RESET,
    };
}

/// What a debugger has asked for.
#[derive(Default)]
pub(crate) struct Debugger {
    /// KVM_GUESTDBG_*; 0 if there is none.
    control: u32,
    /// The guest's own breakpoints, while the hardware has the debugger's.
    hidden: Option<Breakpoints>,
}

impl Debugger {
    /// Whether it steps through the guest: RFLAGS.TF is its own then.
    #[inline]
    pub(crate) const fn steps(&self) -> bool {
        self.control & b::KVM_GUESTDBG_SINGLESTEP != 0
    }

    /// Whether debug exceptions are for it.
    #[inline]
    pub(crate) const fn takes_traps(&self) -> bool {
        self.control & (b::KVM_GUESTDBG_SINGLESTEP | b::KVM_GUESTDBG_USE_HW_BP) != 0
    }

    /// Whether INT3 is for it.
    pub(crate) const fn takes_int3(&self) -> bool {
        self.control & b::KVM_GUESTDBG_USE_SW_BP != 0
    }

    /// Whether no interrupts are to come.
    pub(crate) const fn blocks_interrupts(&self) -> bool {
        self.control & b::KVM_GUESTDBG_BLOCKIRQ != 0
    }

    /// The guest's DR7, if the hardware has another one.
    pub(crate) fn hidden_control(&mut self) -> Option<&mut Dr7> {
        self.hidden.as_mut().map(|hidden| &mut hidden.control)
    }
}

/// The guest's own breakpoints.
pub(crate) fn breakpoints(hw: &mut impl Loaded, arch: &Arch) -> Breakpoints {
    arch.debugger.hidden.unwrap_or_else(|| Breakpoints {
        addresses: arch.dr,
        control: hw.dr7(),
    })
}

/// Sets the guest's own breakpoints.
pub(crate) fn set_breakpoints(hw: &mut impl Loaded, arch: &mut Arch, new: &Breakpoints) {
    match &mut arch.debugger.hidden {
        Some(hidden) => *hidden = *new,
        None => load_breakpoints(hw, arch, new),
    }
}

fn load_breakpoints(hw: &mut impl Loaded, arch: &mut Arch, new: &Breakpoints) {
    arch.dr = new.addresses;
    arch.breakpoints_armed = new.control.any_enabled();
    hw.set_dr7(new.control);
}

/// Has the guest run as a debugger wants it, by KVM_GUESTDBG_* and with its breakpoints.
pub(crate) fn attach(hw: &mut impl Loaded, arch: &mut Arch, control: u32, own: &Breakpoints) {
    let guests = breakpoints(hw, arch);
    let stepped = arch.debugger.steps();
    arch.debugger.control = control;
    if control & b::KVM_GUESTDBG_USE_HW_BP != 0 {
        arch.debugger.hidden = Some(guests);
        load_breakpoints(hw, arch, own);
    } else if arch.debugger.hidden.take().is_some() {
        load_breakpoints(hw, arch, &guests);
    }
    // As in KVM, a guest that steps itself does not any more afterwards.
    let steps = arch.debugger.steps();
    if steps || stepped {
        let flags = hw.rflags();
        hw.set_rflags(flags.with_if(Rflags::TF, steps));
    }
    hw.intercept_int3(arch.debugger.takes_int3());
    let blocks = arch.debugger.blocks_interrupts();
    arch.events.hold_interrupts(blocks);
    if let Some(apic) = arch.apic.as_deref_mut() {
        apic.inhibit(blocks);
        hw.inhibit_virtual_apic(blocks);
    }
}

/// What the guest's RFLAGS would be without a debugger.
pub(crate) fn shown_rflags(hw: &mut impl Loaded, arch: &Arch) -> Rflags {
    let flags = hw.rflags();
    if arch.debugger.steps() {
        flags.without(Rflags::TF)
    } else {
        flags
    }
}

/// With TF, and one of the shadows that a single instruction has, a step is pending: the processor has it
/// so, and refuses an entry without (SDM vol. 3, 27.3.1.5). For a VMM that sets either.
pub(crate) fn settle_step(hw: &mut impl Loaded, arch: &Arch) {
    if !arch.debugger.steps() && hw.shadow() != Shadow::None && hw.rflags().has(Rflags::TF) {
        hw.set_pending_step();
    }
}

impl<L: Loaded> Run<'_, L> {
    /// Whether an exception that has made the guest exit is for the debugger.
    pub(super) fn is_for_debugger(&self, vector: Vector) -> bool {
        match vector {
            Vector::DB => self.arch.debugger.takes_traps(),
            Vector::BP => self.arch.debugger.takes_int3(),
            _ => false,
        }
    }

    /// Leaves to the debugger, with an exception that is its own.
    pub(super) fn leave_for_debugger(&mut self, exception: &Exception) -> Next {
        if self.arch.debugger.steps() {
            // The step that was due is this one. A shadow that STI or MOV SS has left would want another
            // to be pending at the next entry: it goes, as in KVM.
            self.hw.take_pending_step();
            self.shared.request(Request::DebugStep);
        }
        let LinearRip(pc) = LinearRip::of(&mut self.hw);
        let vector = exception.vector.0.into();
        self.page.set_debug(vector, pc);
        if exception.vector == Vector::DB {
            let dr6 = exception.payload.unwrap_or(0) | Dr6::RESET.with(Dr6::RTM).bits();
            self.page.set_debug_registers(dr6, self.hw.dr7().bits());
        }
        Next::User
    }

    /// A halted vCPU has gone past the HLT: returns if that was the debugger's step, which must not wait
    /// for the interrupt.
    pub(super) fn step_ends_halted(&mut self) -> bool {
        if !self.arch.debugger.steps() || !self.hw.take_pending_step() {
            return false;
        }
        let _ = self.leave_for_debugger(&STEP);
        true
    }
}

/// The trap of a single step.
pub(crate) const STEP: Exception = Exception {
    vector: Vector::DB,
    error: None,
    payload: Some(Dr6::BS.bits()),
    insn_len: 0,
};
