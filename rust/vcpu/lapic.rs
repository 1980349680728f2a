// SPDX-License-Identifier: GPL-2.0

//! KVM_GET/SET_LAPIC and what else a VMM does with the local APIC in the kernel: KVM_GET/SET_MP_STATE,
//! IA32_APIC_BASE, KVM_TPR_ACCESS_REPORTING, KVM_SET_VAPIC_ADDR.

use super::Locked;
use crate::abi::kvm_lapic_state;
use crate::abi::kvm_tpr_access_ctl;
use crate::apics::Apics;
use crate::backend::Loaded;
use crate::bindings as b;
use crate::irq::Mode;
use crate::options::VmOptions;
use crate::run::apic;
use crate::run::halt;
use crate::run::msr;
use crate::tlb::Request;
use crate::x86::apic::base::Role;
use crate::x86::apic::events::ApicEvent;
use crate::x86::apic::regs::LvtSet;
use crate::x86::apic::regs::TimerModes;
use crate::x86::apic::state::Image;
use crate::x86::apic::Config;
use crate::x86::apic::Effect;
use crate::x86::apic::EoiSuppression;
use crate::x86::apic::Lint0Reset;
use crate::x86::cpuid::features::Features;
use kernel::prelude::*;

/// The APIC of the vCPU `id`, before anybody has said what its CPUID is.
pub(super) fn config(id: u32, boots: bool, apics: &Apics, options: &VmOptions) -> Config {
    let role = if boots {
        Role::Bootstrap
    } else {
        Role::Application
    };
    Config {
        ids: apics.ids(),
        bus: apics.bus(),
        // Firmware leaves it open, and guests without an MP table want it so.
        lint0: if options.has_quirk(b::KVM_X86_QUIRK_LINT0_REENABLED) {
            Lint0Reset::ExtInt
        } else {
            Lint0Reset::Masked
        },
        ..Config::new(id, role)
    }
}

impl<L: Loaded> Locked<'_, L> {
    /// Carries out what a change of the APIC has left to do.
    pub(super) fn apply(&mut self, effect: Effect) {
        apic::apply(self.hw, self.arch, &self.around, effect);
    }

    /// Has the APIC follow CPUID and the VM's settings.
    pub(super) fn configure_apic(&mut self) {
        let features = self.arch.features;
        let corrected = self.arch.mce.has_interrupt();
        let split = self.around.irqs.mode() == Mode::Split;
        let ids = self.around.apics.ids();
        let Some(apic) = self.arch.apic.as_deref_mut() else {
            return;
        };
        let config = Config {
            ids,
            lvts: if corrected {
                LvtSet::WithCmci
            } else {
                LvtSet::Basic
            },
            timer: if features.has(Features::TSC_DEADLINE) {
                TimerModes::WithTscDeadline
            } else {
                TimerModes::Counters
            },
            // An I/O APIC in the kernel has no register that software could tell it the end by.
            eoi: if split && features.has(Features::X2APIC) {
                EoiSuppression::Offered
            } else {
                EoiSuppression::Absent
            },
            ..*apic.model.config()
        };
        if config != *apic.model.config() {
            let effect = apic.model.reconfigure(&config);
            self.apply(effect);
        }
    }

    /// IA32_APIC_BASE, which the VMM may set as it likes: EINVAL for reserved bits.
    pub(super) fn set_apic_base(&mut self, value: u64) -> Result {
        let effect = msr::write_apic_base(self.arch, value, true).map_err(|_| EINVAL)?;
        self.apply(effect);
        Ok(())
    }

    /// CR8, which is at most 15.
    pub(super) fn set_cr8(&mut self, cr8: u64) {
        match self.arch.apic.as_deref_mut() {
            Some(apic) => {
                let effect = apic.model.set_cr8((cr8 & 15) as u8);
                self.apply(effect);
            }
            None => self.arch.set_vmm_cr8(cr8),
        }
    }

    /// KVM_GET_LAPIC: EINVAL if the APIC is not in the kernel.
    pub(super) fn get_lapic(&mut self, state: &mut kvm_lapic_state) -> Result {
        self.configure_apic();
        let clock = apic::clock(self.hw);
        let apic = self.arch.apic.as_deref_mut().ok_or(EINVAL)?;
        apic.take_posted();
        let mut image: Image = [0; 1024];
        apic.model.save(&mut image, &clock);
        for (to, from) in state.regs.iter_mut().zip(image) {
            *to = from;
        }
        Ok(())
    }

    /// KVM_SET_LAPIC: EINVAL if the APIC is not in the kernel, or the state is another one's.
    pub(super) fn set_lapic(&mut self, state: &kvm_lapic_state) -> Result {
        self.configure_apic();
        let clock = apic::clock(self.hw);
        let apic = self.arch.apic.as_deref_mut().ok_or(EINVAL)?;
        let mut image: Image = [0; 1024];
        for (to, from) in image.iter_mut().zip(state.regs) {
            *to = from;
        }
        apic.take_posted();
        let effect = apic.model.restore(&image, &clock).map_err(|_| EINVAL)?;
        self.apply(effect);
        self.around.shared.request(Request::EoiVectors);
        Ok(())
    }

    /// KVM_TPR_ACCESS_REPORTING: a VMM that patches guests' accesses to the task priority would be told
    /// of them where they are slow (KVM_CAP_VAPIC); here they never are. EINVAL for flags.
    pub(super) fn report_tpr_accesses(&mut self, control: &kvm_tpr_access_ctl) -> Result {
        if control.flags != 0 {
            return Err(EINVAL);
        }
        Ok(())
    }

    /// KVM_SET_VAPIC_ADDR: where a guest that was patched so keeps its task priority. The address is
    /// checked and forgotten: without reports nothing is patched. EINVAL if there is no memory, or if the
    /// APIC is not in the kernel.
    pub(super) fn set_vapic_addr(&mut self, addr: u64) -> Result {
        if self.arch.apic.is_none() {
            return Err(EINVAL);
        }
        if addr != 0 {
            self.vm.read(addr, &mut [0; 4]).map_err(|_| EINVAL)?;
        }
        Ok(())
    }

    /// KVM_GET_MP_STATE.
    pub(super) fn get_mp_state(&mut self) -> u32 {
        // A SIPI that has come counts, though the vCPU has not run since.
        halt::accept_events(self.hw, self.arch, &self.around);
        let woken = self.take_unhalt();
        match self.arch.mp_state {
            b::KVM_MP_STATE_HALTED | b::KVM_MP_STATE_AP_RESET_HOLD if woken => {
                b::KVM_MP_STATE_RUNNABLE
            }
            state => state,
        }
    }

    /// Whether another vCPU has woken this one, which has not run since.
    fn take_unhalt(&mut self) -> bool {
        if self.around.shared.take(Request::Unhalt) {
            self.arch.pv.unhalted = true;
        }
        self.arch.pv.unhalted
    }

    /// KVM_SET_MP_STATE: EINVAL for what is none, and without a local APIC in the kernel for all but
    /// RUNNABLE.
    pub(super) fn set_mp_state(&mut self, mp_state: u32) -> Result {
        match mp_state {
            b::KVM_MP_STATE_RUNNABLE => {
                self.take_unhalt();
                self.arch.pv.unhalted = false;
                self.arch.mp_state = mp_state;
            }
            b::KVM_MP_STATE_UNINITIALIZED
            | b::KVM_MP_STATE_HALTED
            | b::KVM_MP_STATE_AP_RESET_HOLD
            | b::KVM_MP_STATE_INIT_RECEIVED
                if self.arch.apic.is_some() =>
            {
                self.arch.mp_state = mp_state;
            }
            b::KVM_MP_STATE_SIPI_RECEIVED if self.arch.apic.is_some() => {
                // The SIPI's vector is in the vCPU's events.
                self.arch.mp_state = b::KVM_MP_STATE_INIT_RECEIVED;
                let vector = self.arch.sipi_vector;
                self.post(ApicEvent::Sipi { vector });
            }
            _ => return Err(EINVAL),
        }
        Ok(())
    }

    /// Has an INIT wait for the vCPU, or none.
    pub(super) fn set_latched_init(&mut self, waits: bool) {
        if waits {
            self.post(ApicEvent::Init);
        } else if let Some(shared) = self.around.shared.apic() {
            shared.cancel_init();
        }
    }

    /// Leaves an event for the APIC, to be taken when the vCPU runs.
    fn post(&mut self, event: ApicEvent) {
        if let Some(shared) = self.around.shared.apic() {
            shared.post(event);
            self.around.shared.request(Request::ApicEvents);
        }
    }
}
