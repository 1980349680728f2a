// SPDX-License-Identifier: GPL-2.0

//! KVM_SET_GUEST_DEBUG, and KVM_GET/SET_DEBUGREGS.

use super::Locked;
use crate::abi::kvm_debugregs;
use crate::abi::kvm_guest_debug;
use crate::backend::Loaded;
use crate::bindings as b;
use crate::run::debug;
use crate::run::debug::Breakpoints;
use crate::tlb::Request;
use crate::x86::cr;
use crate::x86::cr::DebugReg;
use crate::x86::event::Exception;
use crate::x86::exception::Vector;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use kernel::prelude::*;

/// The bits of `control` that mean something (KVM_CAP_SET_GUEST_DEBUG2).
pub(crate) const CONTROLS: u32 = b::KVM_GUESTDBG_ENABLE
    | b::KVM_GUESTDBG_SINGLESTEP
    | b::KVM_GUESTDBG_USE_SW_BP
    | b::KVM_GUESTDBG_USE_HW_BP
    | b::KVM_GUESTDBG_INJECT_DB
    | b::KVM_GUESTDBG_INJECT_BP
    | b::KVM_GUESTDBG_BLOCKIRQ;

impl<L: Loaded> Locked<'_, L> {
    /// KVM_SET_GUEST_DEBUG: EBUSY if an exception is to be injected and there is one already. As in KVM,
    /// bits that are none are ignored.
    pub(super) fn set_guest_debug(&mut self, given: &kvm_guest_debug) -> Result {
        let inject = if given.control & b::KVM_GUESTDBG_INJECT_DB != 0 {
            Some((Vector::DB, 0))
        } else if given.control & b::KVM_GUESTDBG_INJECT_BP != 0 {
            Some((Vector::BP, 1))
        } else {
            None
        };
        if let Some((vector, insn_len)) = inject {
            let state = self.arch.events.state();
            let first = state.exception_pending.or(state.exception_injected);
            if first.is_some() {
                return Err(EBUSY);
            }
            // DR6 is the VMM's affair.
            self.arch.events.raise(Exception {
                vector,
                error: None,
                payload: None,
                insn_len,
            });
        }

        let control = if given.control & b::KVM_GUESTDBG_ENABLE != 0 {
            given.control & CONTROLS
        } else {
            0
        };
        let [a0, a1, a2, a3, _, _, _, dr7] = given.arch.debugreg;
        let own = Breakpoints {
            addresses: [a0, a1, a2, a3],
            // The upper half would be refused at the entry.
            control: Dr7::new(dr7 & 0xffff_ffff),
        };
        debug::attach(self.hw, self.arch, control, &own);
        if self.arch.debugger.steps() {
            self.around.shared.request(Request::DebugStep);
        }
        if self.arch.apic.is_some() {
            // The processor may deliver again what it did not know of.
            self.around.shared.request(Request::Interrupts);
        }
        Ok(())
    }

    /// KVM_GET_DEBUGREGS.
    pub(super) fn get_debugregs(&mut self) -> kvm_debugregs {
        let guests = debug::breakpoints(self.hw, self.arch);
        kvm_debugregs {
            db: guests.addresses,
            dr6: self.arch.dr6,
            dr7: guests.control.bits(),
            flags: 0,
            reserved: [0; 9],
        }
    }

    /// KVM_SET_DEBUGREGS: EINVAL for flags, and for upper halves that are not zero.
    pub(super) fn set_debugregs(&mut self, regs: &kvm_debugregs) -> Result {
        if regs.flags != 0 {
            return Err(EINVAL);
        }
        let dr6 = cr::check_debug_write(DebugReg::Status, regs.dr6).map_err(|_| EINVAL)?;
        let dr7 = cr::check_debug_write(DebugReg::Control, regs.dr7).map_err(|_| EINVAL)?;
        self.arch.dr6 = dr6;
        let guests = Breakpoints {
            addresses: regs.db,
            control: Dr7::new(dr7),
        };
        debug::set_breakpoints(self.hw, self.arch, &guests);
        Ok(())
    }
}

const _: () = assert!(Dr6::RESET.bits() == 0xffff_0ff0);
