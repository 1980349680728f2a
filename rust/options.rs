// SPDX-License-Identifier: GPL-2.0

//! What a VMM has changed of a VM by KVM_ENABLE_CAP, where that is a bit to be looked at: quirks, hypercalls
//! that are its own, fields of structures. Set by any thread, and looked at by vCPUs without a lock.

use crate::bindings::KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
use crate::bindings::KVM_X86_QUIRK_LAPIC_MMIO_HOLE;
use crate::bindings::KVM_X86_QUIRK_LINT0_REENABLED;
use crate::bindings::KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT;
use crate::bindings::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;
use crate::bindings::KVM_X86_QUIRK_SLOT_ZAP_ALL;
use crate::bindings::KVM_X86_QUIRK_STUFF_FEATURE_MSRS;
use crate::run::hypercall::FOR_VMM;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use kernel::prelude::*;

/// The quirks of KVM's that a VMM may do without: LINT0 is open after reset; where the APIC's page is
/// not there is a hole that reads as ones; MONITOR and MWAIT are there whatever CPUID says, and CPUID does
/// not follow IA32_MISC_ENABLE in it; a VMMCALL, which is AMD's, becomes a VMCALL; the MSRs that say what the
/// processor can do say so before the VMM has; a memslot that goes takes the mappings of all others along, which is
/// never so here.
pub(crate) const QUIRKS: u32 = KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_STUFF_FEATURE_MSRS
    | KVM_X86_QUIRK_SLOT_ZAP_ALL;

/// The options of a VM.
pub(crate) struct VmOptions {
    /// KVM_X86_QUIRK_* that the VMM does without.
    disabled_quirks: AtomicU32,
    /// The hypercalls that the VMM does itself, a bit each.
    hypercall_exits: AtomicU32,
    /// Fields of KVM_GET/SET_VCPU_EVENTS that the VMM knows of besides the old ones.
    event_fields: AtomicU32,
}

impl VmOptions {
    /// As a VM has them whose VMM has said nothing.
    pub(crate) const fn new() -> Self {
        Self {
            disabled_quirks: AtomicU32::new(0),
            hypercall_exits: AtomicU32::new(0),
            event_fields: AtomicU32::new(0),
        }
    }

    /// KVM_CAP_DISABLE_QUIRKS and its successor: what of these is no quirk here is ignored.
    pub(crate) fn disable_quirks(&self, quirks: u64) {
        self.disabled_quirks
            .fetch_or(quirks as u32 & QUIRKS, Ordering::Relaxed);
    }

    /// Whether one of [`QUIRKS`] is the VMM's wish, as it is if it says nothing.
    pub(crate) fn has_quirk(&self, quirk: u32) -> bool {
        self.disabled_quirks.load(Ordering::Relaxed) & quirk == 0
    }

    /// Has the vCPUs' events show a field, by its KVM_VCPUEVENT_VALID_*, or not.
    pub(crate) fn show_event_field(&self, field: u32, shown: bool) {
        if shown {
            self.event_fields.fetch_or(field, Ordering::Relaxed);
        } else {
            self.event_fields.fetch_and(!field, Ordering::Relaxed);
        }
    }

    /// Whether the vCPUs' events show a field.
    pub(crate) fn shows_event_field(&self, field: u32) -> bool {
        self.event_fields.load(Ordering::Relaxed) & field != 0
    }

    /// KVM_CAP_EXIT_HYPERCALL: EINVAL for what is always the kernel's.
    pub(crate) fn set_hypercall_exits(&self, calls: u64) -> Result {
        if calls & !FOR_VMM != 0 {
            return Err(EINVAL);
        }
        self.hypercall_exits.store(calls as u32, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the VMM does a hypercall itself.
    pub(crate) fn exits_by_hypercall(&self, number: u32) -> bool {
        let calls = self.hypercall_exits.load(Ordering::Relaxed);
        calls.checked_shr(number).is_some_and(|bits| bits & 1 != 0)
    }
}
