// SPDX-License-Identifier: GPL-2.0

//! What this processor's VMX can do (SDM vol. 3, appendix A), checked once when the module loads.

use super::fields::EntryControls;
use super::fields::ExitControls;
use super::fields::PinControls;
use super::fields::PrimaryControls;
use super::fields::SecondaryControls;
use crate::linux::msr;
use crate::linux::unsupported;
use crate::x86::regs::Cr0;
use kernel::prelude::*;

const MSR_FEATURE_CONTROL: u32 = 0x3a;
const MSR_VMX_BASIC: u32 = 0x480;
const MSR_VMX_PINBASED: u32 = 0x481;
const MSR_VMX_PROCBASED: u32 = 0x482;
const MSR_VMX_EXIT: u32 = 0x483;
const MSR_VMX_ENTRY: u32 = 0x484;
const MSR_VMX_MISC: u32 = 0x485;
const MSR_VMX_CR0_FIXED0: u32 = 0x486;
const MSR_VMX_CR4_FIXED1: u32 = 0x489;
const MSR_VMX_PROCBASED2: u32 = 0x48b;
const MSR_VMX_EPT_VPID: u32 = 0x48c;
const MSR_VMX_TRUE_PINBASED: u32 = 0x48d;
const MSR_VMX_TRUE_PROCBASED: u32 = 0x48e;
const MSR_VMX_TRUE_EXIT: u32 = 0x48f;
const MSR_VMX_TRUE_ENTRY: u32 = 0x490;

/// What APIC virtualisation consists of.
const APICV: SecondaryControls = SecondaryControls::APIC_ACCESSES
    .with(SecondaryControls::X2APIC)
    .with(SecondaryControls::APIC_REGISTERS)
    .with(SecondaryControls::INTERRUPT_DELIVERY);

/// The control words that every VMCS starts from, and the capabilities that decide at run time.
#[derive(Clone, Copy)]
pub(crate) struct VmxCaps {
    /// The revision identifier that a VMCS begins with.
    pub(crate) revision: u32,
    pub(crate) pin: PinControls,
    pub(crate) primary: PrimaryControls,
    pub(crate) secondary: SecondaryControls,
    pub(crate) exit: ExitControls,
    pub(crate) entry: EntryControls,
    /// Guest-physical addresses are translated by extended page tables. Else the guest's own tables are shadowed.
    pub(crate) ept: bool,
    /// Guests run without paging, and in real mode.
    pub(crate) unrestricted: bool,
    /// An entry and an exit load IA32_EFER.
    pub(crate) loads_efer: bool,
    /// An entry and an exit load IA32_PAT. With shadow tables they do not, so that the guest runs with the host's.
    pub(crate) loads_pat: bool,
    /// Bits of CR0 that must be set in VMX operation: not PE and PG, if the guest is unrestricted.
    pub(crate) cr0_required: u64,
    /// Bits of CR4 that may be set in VMX operation.
    pub(crate) cr4_allowed: u64,
    /// EPT leaves of 2 MiB.
    pub(crate) ept_2m: bool,
    /// EPT leaves of 1 GiB.
    pub(crate) ept_1g: bool,
    /// EPT keeps accessed and dirty bits.
    pub(crate) ept_ad: bool,
    /// The processor logs pages whose dirty bit it sets, and is to.
    pub(crate) pml: bool,
    /// Loops of PAUSE can exit.
    pub(crate) pause_loop: bool,
    /// A guest's time-stamp counter can run at a rate of its own.
    pub(crate) tsc_scaling: bool,
    /// There is a TPR shadow.
    pub(crate) tpr_shadow: bool,
    /// The processor can deliver the APIC's interrupts and take posted ones, and is to.
    pub(crate) apicv: bool,
    /// How many bits of the time-stamp counter the preemption timer leaves out, if there is one and it is
    /// to be used.
    pub(crate) timer_shift: Option<u8>,
    /// INVEPT of a single context exists; else all contexts are invalidated.
    pub(crate) invept_single: bool,
    /// INVVPID of a single context exists.
    pub(crate) invvpid_single: bool,
    /// Exits by INS and OUTS say which segment and address size (IA32_VMX_BASIC, bit 54).
    pub(crate) io_info: bool,
}

/// What a control word may be: the low half of the MSR is required, the high half allowed.
#[derive(Clone, Copy)]
struct Allowed {
    what: &'static str,
    required: u32,
    allowed: u32,
}

impl Allowed {
    fn read(what: &'static str, msr: u32) -> Result<Self> {
        let value = msr::read_safe(msr).map_err(|_| unsupported())?;
        Ok(Self {
            what,
            required: value as u32,
            allowed: (value >> 32) as u32,
        })
    }

    /// Chooses the bits that must be, those that we `need` and those that we `want` and may have.
    fn choose(self, need: u32, want: u32) -> Result<u32> {
        let missing = need & !self.allowed;
        if missing != 0 {
            pr_err!("this CPU's VMX lacks {} {:#x}\n", self.what, missing);
            return Err(unsupported());
        }
        Ok(self.required | need | want & self.allowed)
    }
}

impl VmxCaps {
    /// Reads the capability MSRs: EOPNOTSUPP, with a message, if something that rkvm needs is
    /// missing.
    pub(crate) fn probe() -> Result<Self> {
        let feature_control = msr::read_safe(MSR_FEATURE_CONTROL).unwrap_or(0);
        if feature_control & 5 == 1 {
            pr_err!("VMX is disabled by the firmware (IA32_FEATURE_CONTROL)\n");
            return Err(unsupported());
        }

        let basic = msr::read_safe(MSR_VMX_BASIC).map_err(|_| unsupported())?;
        // Since 2010: controls that the older MSRs claim to be fixed can be cleared.
        let true_msrs = basic & 1 << 55 != 0;
        let pick = |new: u32, old: u32| if true_msrs { new } else { old };

        let pin = Allowed::read(
            "pin-based controls",
            pick(MSR_VMX_TRUE_PINBASED, MSR_VMX_PINBASED),
        )?
        .choose(
            (PinControls::EXTERNAL_INTERRUPT | PinControls::NMI | PinControls::VIRTUAL_NMIS).bits(),
            (PinControls::PREEMPTION_TIMER | PinControls::POSTED_INTERRUPTS).bits(),
        )?;
        let pin = PinControls::new(pin);

        let primary = Allowed::read(
            "primary controls",
            pick(MSR_VMX_TRUE_PROCBASED, MSR_VMX_PROCBASED),
        )?;
        let secondary = if primary.allowed & PrimaryControls::SECONDARY.bits() != 0 {
            Allowed::read("secondary controls", MSR_VMX_PROCBASED2)?.choose(
                0,
                (SecondaryControls::EPT
                    | SecondaryControls::UNRESTRICTED_GUEST
                    | SecondaryControls::VPID
                    | SecondaryControls::WBINVD
                    | SecondaryControls::RDTSCP
                    | SecondaryControls::INVPCID
                    | SecondaryControls::ENCLS
                    | SecondaryControls::PML
                    | SecondaryControls::PAUSE_LOOP
                    | SecondaryControls::TSC_SCALING
                    | APICV)
                    .with_if(
                        // IA32_XSS is not switched: a guest that saved by it would see the host's state.
                        SecondaryControls::XSAVES,
                        msr::host_xss() == 0,
                    )
                    .bits(),
            )?
        } else {
            0
        };
        let mut secondary = SecondaryControls::new(secondary);

        // Only processors with either of the two have the MSR.
        let translation = SecondaryControls::EPT | SecondaryControls::VPID;
        let ept_vpid = if secondary.has_any(translation) {
            msr::read_safe(MSR_VMX_EPT_VPID).map_err(|_| unsupported())?
        } else {
            0
        };
        let has = |bit: u32| ept_vpid & 1 << bit != 0;
        // Four levels, write-back tables, and an INVEPT to flush with.
        let usable = has(6) && has(14) && has(20) && (has(25) || has(26));
        let ept = secondary.has(SecondaryControls::EPT) && usable && crate::parameters::ept();
        let unrestricted = ept
            && secondary.has(SecondaryControls::UNRESTRICTED_GUEST)
            && crate::parameters::unrestricted_guest();
        secondary = secondary
            .with_if(SecondaryControls::EPT, ept)
            .with_if(SecondaryControls::UNRESTRICTED_GUEST, unrestricted);
        if !(has(32) && (has(41) || has(42))) {
            secondary = secondary.without(SecondaryControls::VPID);
        }

        // With EPT, CR3 and INVLPG are the guest's own business, and only processors without the newer MSRs insist on their
        // exits. Otherwise, how the guest translates its addresses is for us to know.
        let translation =
            PrimaryControls::CR3_LOAD | PrimaryControls::CR3_STORE | PrimaryControls::INVLPG;
        let primary = primary.choose(
            (PrimaryControls::TSC_OFFSETTING
                | PrimaryControls::HLT
                | PrimaryControls::MWAIT
                | PrimaryControls::MONITOR
                | PrimaryControls::RDPMC
                | PrimaryControls::CR8_LOAD
                | PrimaryControls::CR8_STORE
                | PrimaryControls::MOV_DR
                | PrimaryControls::UNCONDITIONAL_IO
                | PrimaryControls::MSR_BITMAPS
                | PrimaryControls::INTERRUPT_WINDOW
                | PrimaryControls::NMI_WINDOW)
                .with_if(translation, !ept)
                .bits(),
            (PrimaryControls::TPR_SHADOW | PrimaryControls::PAUSE | PrimaryControls::SECONDARY)
                .bits(),
        )?;
        let tpr_shadow = primary & PrimaryControls::TPR_SHADOW.bits() != 0;
        // The windows are opened when there is something to inject.
        let primary = PrimaryControls::new(primary)
            .without(
                PrimaryControls::INTERRUPT_WINDOW
                    | PrimaryControls::NMI_WINDOW
                    | PrimaryControls::TPR_SHADOW
                    | PrimaryControls::PAUSE,
            )
            .with_if(translation, !ept);

        // Processors without EPT have no such loads either. They are not needed there: a guest's EFER differs from the
        // host's in LMA and LME, which every entry and exit loads, and in SCE.
        let exit = Allowed::read("exit controls", pick(MSR_VMX_TRUE_EXIT, MSR_VMX_EXIT))?.choose(
            (ExitControls::SAVE_DEBUG | ExitControls::HOST_64 | ExitControls::ACK_INTERRUPT)
                .with_if(ExitControls::LOAD_PAT | ExitControls::LOAD_EFER, ept)
                .bits(),
            ExitControls::LOAD_EFER.bits(),
        )?;
        let exit = ExitControls::new(exit);

        let entry = Allowed::read("entry controls", pick(MSR_VMX_TRUE_ENTRY, MSR_VMX_ENTRY))?
            .choose(
                (EntryControls::LOAD_DEBUG | EntryControls::IA32E)
                    .with_if(EntryControls::LOAD_PAT | EntryControls::LOAD_EFER, ept)
                    .bits(),
                EntryControls::LOAD_EFER.bits(),
            )?;
        let entry = EntryControls::new(entry).without(EntryControls::IA32E);
        let loads_efer = entry.has(EntryControls::LOAD_EFER) && exit.has(ExitControls::LOAD_EFER);
        let exit = exit.with_if(ExitControls::LOAD_EFER, loads_efer);
        let entry = entry.with_if(EntryControls::LOAD_EFER, loads_efer);

        // On only while a guest's writes are logged.
        let pml =
            ept && secondary.has(SecondaryControls::PML) && has(21) && crate::parameters::pml();
        let secondary = secondary.without(SecondaryControls::PML);

        // Of a vCPU that has an APIC in the kernel. The processor cannot deliver to a guest in an imitated real mode.
        let apicv = unrestricted
            && tpr_shadow
            && secondary.has(APICV)
            && pin.has(PinControls::POSTED_INTERRUPTS)
            && crate::parameters::apicv();
        let pause_loop = secondary.has(SecondaryControls::PAUSE_LOOP);
        let tsc_scaling =
            secondary.has(SecondaryControls::TSC_SCALING) && crate::parameters::tsc_scaling();
        let secondary = secondary
            .without(APICV | SecondaryControls::PAUSE_LOOP | SecondaryControls::TSC_SCALING);
        let misc = msr::read_safe(MSR_VMX_MISC).map_err(|_| unsupported())?;
        let timer_shift = (pin.has(PinControls::PREEMPTION_TIMER)
            && crate::parameters::preemption_timer())
        .then_some((misc & 0x1f) as u8);
        let pin = pin.without(PinControls::PREEMPTION_TIMER | PinControls::POSTED_INTERRUPTS);

        let fixed = Cr0::new(msr::read_safe(MSR_VMX_CR0_FIXED0).map_err(|_| unsupported())?);
        let cr0_required = fixed
            .with_if(Cr0::PE | Cr0::PG, !unrestricted)
            .with_if(Cr0::WP, !ept)
            .bits();

        Ok(Self {
            revision: basic as u32 & 0x7fff_ffff,
            pin,
            primary,
            secondary,
            exit,
            entry,
            ept,
            unrestricted,
            loads_efer,
            loads_pat: ept,
            cr0_required,
            cr4_allowed: msr::read_safe(MSR_VMX_CR4_FIXED1).map_err(|_| unsupported())?,
            ept_2m: has(16),
            ept_1g: has(17),
            ept_ad: has(21),
            pml,
            pause_loop,
            tsc_scaling,
            tpr_shadow,
            apicv,
            timer_shift,
            invept_single: has(25),
            invvpid_single: has(41),
            io_info: basic & 1 << 54 != 0,
        })
    }
}
