// SPDX-License-Identifier: GPL-2.0

//! KVM_X86_SETUP_MCE and KVM_X86_SET_MCE: machine checks, as a VMM has them for its guest.

use super::Locked;
use crate::abi::kvm_x86_mce;
use crate::backend::Loaded;
use crate::x86::apic::events::ApicEvent;
use crate::x86::apic::regs::LvtEntry;
use crate::x86::apic::view::Delivered;
use crate::x86::event::Exception;
use crate::x86::exception::Vector;
use crate::x86::mce::Report;
use crate::x86::mce::Signal;
use crate::x86::regs::Cr4;
use kernel::prelude::*;

impl<L: Loaded> Locked<'_, L> {
    /// KVM_X86_SETUP_MCE: EINVAL for what IA32_MCG_CAP cannot be.
    pub(super) fn setup_mce(&mut self, cap: u64) -> Result {
        self.arch.mce.set_up(cap).map_err(|_| EINVAL)?;
        self.configure_apic();
        Ok(())
    }

    /// KVM_X86_SET_MCE: EINVAL for what is no error, or in no bank.
    pub(super) fn set_mce(&mut self, given: &kvm_x86_mce) -> Result {
        let report = Report {
            status: given.status,
            addr: given.addr,
            misc: given.misc,
            mcg_status: given.mcg_status,
            bank: given.bank,
        };
        let enabled = self.hw.cr4().has(Cr4::MCE);
        match self.arch.mce.report(&report, enabled).map_err(|_| EINVAL)? {
            Signal::None => {}
            Signal::Interrupt => self.deliver_corrected(),
            Signal::Exception => self.arch.events.raise(Exception {
                vector: Vector::MC,
                error: None,
                payload: None,
                insn_len: 0,
            }),
            Signal::Shutdown => self.arch.events.raise_triple_fault(),
        }
        Ok(())
    }

    /// The interrupt for corrected errors, by a local APIC in the kernel: the VMM's own is the VMM's to raise.
    fn deliver_corrected(&mut self) {
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return;
        };
        let delivered = apic.model.deliver_local(LvtEntry::Cmci);
        apic.recheck = true;
        if let Delivered::Event(ApicEvent::Nmi) = delivered {
            self.arch.events.queue_nmi();
        }
    }
}
