// SPDX-License-Identifier: GPL-2.0

//! Hypercalls (Documentation/virt/kvm/x86/hypercalls.rst of the kernel): VMCALL, with a number in RAX and arguments in
//! RBX, RCX, RDX and RSI.

use super::memory::EmuCpu;
use super::memory::EmuMemory;
use super::LinearRip;
use super::Next;
use super::Pending;
use super::Run;
use crate::backend::Loaded;
use crate::bindings as b;
use crate::bindings::KVM_X86_QUIRK_FIX_HYPERCALL_INSN as FIX_INSN;
use crate::linux::task;
use crate::linux::task::Yielded;
use crate::tlb::Request;
use crate::x86::apic::message::IcrLow;
use crate::x86::emulate::Cpu;
use crate::x86::event::Exception;
use crate::x86::exception::Fault;
use crate::x86::paging::GuestMemory;
use crate::x86::paging::PageAccess;
use crate::x86::paging::WalkError;
use crate::x86::pv::PvFeatures;
use crate::x86::regs::Gpr;
use crate::x86::segment::AccessKind;
use kernel::prelude::*;

/// A hypercall that the VMM was asked to do.
#[derive(Clone, Copy)]
pub(crate) struct PendingHypercall {
    /// Length of the instruction in bytes.
    len: u8,
    /// Where it is.
    at: LinearRip,
}

/// What a hypercall came to.
type Answer = Result<u64, Refusal>;

/// Why a hypercall is refused: KVM_E*, which are not the host's numbers everywhere.
struct Refusal(u32);

const NOT_KNOWN: Refusal = Refusal(b::KVM_ENOSYS);
const NOT_ALLOWED: Refusal = Refusal(b::KVM_EPERM);
const NOT_VALID: Refusal = Refusal(b::KVM_EINVAL);

/// The hypercalls that a VMM can ask to do itself (KVM_CAP_EXIT_HYPERCALL), a bit each.
pub(crate) const FOR_VMM: u64 = 1 << b::KVM_HC_MAP_GPA_RANGE;

impl<L: Loaded> Run<'_, L> {
    /// VMCALL, an instruction of `len` bytes.
    pub(super) fn vmcall(&mut self, len: u8) -> Result<Next> {
        self.shared.stats.hypercalls.bump();
        let wide = crate::arch::in_64bit_mode(&mut self.hw);
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        let mut register = |r| self.hw.gpr(r) & mask;
        let number = register(Gpr::Rax);
        let args = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(&mut register);
        let answer = if crate::arch::cpl(&mut self.hw) != 0 {
            Err(NOT_ALLOWED)
        } else if number == u64::from(b::KVM_HC_MAP_GPA_RANGE) {
            match self.map_gpa_range(args, wide, len) {
                Ok(()) => return Ok(Next::User),
                Err(refusal) => Err(refusal),
            }
        } else {
            self.hypercall(number, args, wide)
        };
        let value = match answer {
            Ok(value) => value,
            Err(Refusal(error)) => u64::from(error).wrapping_neg(),
        };
        self.hw.set_gpr(Gpr::Rax, value & mask);
        super::skip(&mut self.hw, len);
        Ok(Next::Guest)
    }

    /// A hypercall of the kernel's own. `wide` is whether it comes from 64-bit code.
    fn hypercall(&mut self, number: u64, args: [u64; 4], wide: bool) -> Answer {
        let need = |feature| {
            if self.arch.pv.has(feature) {
                Ok(())
            } else {
                Err(NOT_KNOWN)
            }
        };
        match u32::try_from(number).unwrap_or(u32::MAX) {
            // The exit alone has looked for interrupts.
            b::KVM_HC_VAPIC_POLL_IRQ => Ok(0),
            b::KVM_HC_KICK_CPU => {
                need(PvFeatures::PV_UNHALT)?;
                if let Some(vcpu) = self.apics.by_id(args[1] as u32) {
                    vcpu.request_and_kick(Request::Unhalt);
                }
                self.yield_to(args[1] as u32);
                Ok(0)
            }
            b::KVM_HC_SEND_IPI => {
                need(PvFeatures::PV_SEND_IPI)?;
                self.send_ipi(args, wide)
            }
            b::KVM_HC_SCHED_YIELD => {
                need(PvFeatures::PV_SCHED_YIELD)?;
                self.yield_to(args[0] as u32);
                Ok(0)
            }
            _ => Err(NOT_KNOWN),
        }
    }

    /// KVM_HC_SEND_IPI: what the interrupt command in the last argument asks for, for the APICs that two words of bits
    /// name, from the ID in the third argument on. Returns how many took it.
    fn send_ipi(&mut self, args: [u64; 4], wide: bool) -> Answer {
        /// The shorthand.
        const SHORTHAND: u64 = 3 << 18;
        let [low, high, first, command] = args;
        let icr = IcrLow::new(command as u32);
        if icr.has(IcrLow::LOGICAL) || command & SHORTHAND != 0 {
            return Err(NOT_VALID);
        }
        let Ok(message) = icr.decode(0) else {
            return Ok(0);
        };
        let first = first as u32;
        let width = if wide { 64 } else { 32 };
        let mut taken = 0;
        for (word, first) in [(low, Some(first)), (high, first.checked_add(width))] {
            if let Some(first) = first {
                taken += u64::from(self.apics.send_to_set(&message, first, word));
            }
        }
        Ok(taken)
    }

    /// Gives up the CPU in favour of the vCPU with an APIC ID, if that is worth it.
    fn yield_to(&mut self, id: u32) {
        self.shared.stats.directed_yield_attempted.bump();
        let Some(other) = self.apics.by_id(id) else {
            return;
        };
        if core::ptr::eq(&*other, self.shared) || !other.wants_cpu() {
            return;
        }
        let Some(thread) = other.thread() else {
            return;
        };
        if let Yielded::Yes = task::yield_to(&thread) {
            self.shared.stats.directed_yield_successful.bump();
        }
    }

    /// KVM_HC_MAP_GPA_RANGE, of which only the VMM knows what to make.
    fn map_gpa_range(&mut self, args: [u64; 4], wide: bool, len: u8) -> Result<(), Refusal> {
        let [gpa, pages, attributes, _] = args;
        if !self.options.exits_by_hypercall(b::KVM_HC_MAP_GPA_RANGE) {
            return Err(NOT_KNOWN);
        }
        let end = (gpa >> 12).checked_add(pages);
        if gpa & 0xfff != 0 || pages == 0 || end.is_none() {
            return Err(NOT_VALID);
        }
        let args = [gpa, pages, attributes];
        self.page
            .set_hypercall(b::KVM_HC_MAP_GPA_RANGE.into(), args, wide);
        self.arch.pending = Pending::Hypercall(PendingHypercall {
            len,
            at: LinearRip::of(&mut self.hw),
        });
        Ok(())
    }

    /// The VMM has done it.
    pub(super) fn complete_hypercall(&mut self, pending: PendingHypercall) -> Next {
        if !pending.at.is_still(&mut self.hw) {
            return Next::Guest;
        }
        let value = self.page.hypercall_result();
        let wide = crate::arch::in_64bit_mode(&mut self.hw);
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        self.hw.set_gpr(Gpr::Rax, value & mask);
        super::skip(&mut self.hw, pending.len);
        Next::Guest
    }

    /// #UD in the guest, which is intercepted for the sake of guests that were made for AMD's processors.
    pub(super) fn undefined(&mut self, exception: Exception) -> Result<Next> {
        if !self.options.has_quirk(FIX_INSN) {
            self.hw.leave_undefined_to_guest();
        } else if let Some(result) = self.fix_vmmcall() {
            return match result {
                Ok(()) => Ok(Next::Guest),
                Err(fault) => self.raise(fault),
            };
        }
        crate::events::mark_restart(&mut self.hw, exception.vector);
        self.arch.events.raise(exception);
        Ok(Next::Guest)
    }

    /// Makes a VMCALL of the VMMCALL at RIP, which the guest then executes: none if it is not there, or not to be reached. A
    /// page that the guest may not write is a fault of its own.
    fn fix_vmmcall(&mut self) -> Option<Result<(), Fault>> {
        const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
        /// They differ in their last bytes: one write will do, and others may execute it meanwhile.
        const VMCALL_LAST: u8 = 0xc1;
        let at = LinearRip::of(&mut self.hw).0;
        let mut cpu = EmuCpu::new(&mut self.hw, &self.fpu, self.arch);
        let (paging, cpl, mask) = (cpu.paging(), cpu.cpl(), cpu.mode().linear_mask());
        let mut memory = EmuMemory::new(self.memory, self.shared, &self.arch.devices);
        let mut last = at;
        for (n, byte) in (0..).zip(VMMCALL) {
            last = at.wrapping_add(n) & mask;
            let access = PageAccess::explicit(AccessKind::Fetch, cpl);
            let gpa = paging.translate(&mut memory, last, access).ok()?.gpa;
            let mut found = [0];
            memory.read(gpa, &mut found).ok()?;
            if found != [byte] {
                return None;
            }
        }
        let access = PageAccess::explicit(AccessKind::Write, cpl);
        let mut gpa = 0;
        // The whole instruction is what is written, as far as faults go.
        for linear in [at & mask, last] {
            match paging.translate(&mut memory, linear, access) {
                Ok(found) => gpa = found.gpa,
                Err(WalkError::Fault(error)) => return Some(Err(Fault::page(linear, error))),
                // It is tried again.
                Err(WalkError::Contended) => return Some(Ok(())),
                Err(WalkError::Host(_)) => return None,
            }
        }
        memory.write(gpa, &[VMCALL_LAST]).ok().map(Ok)
    }
}
