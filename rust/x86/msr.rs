// SPDX-License-Identifier: GPL-2.0

//! Model-specific registers: their numbers, who answers for each, and which values they take.
//!
//! [`Msr::class`] says where an MSR lives. Those of [`Class::Emulated`] live in [`state::MsrState`]; the backend keeps the others, in
//! its control structure or in the processor, and asks [`check_value`] before it takes a value for one.

pub mod filter;
pub mod mtrr;
pub mod state;

use super::cpuid::features::Features;
use super::cpuid::features::GuestFeatures;
use super::mce;
use super::regs::Cr4;
use super::segment::is_canonical;

/// The number of an MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Msr(pub u32);

macro_rules! msrs {
    ($( $(#[$doc:meta])* $name:ident = $number:expr; )*) => {
        impl Msr {
            $( $(#[$doc])* pub const $name: Self = Self($number); )*
        }
    };
}

msrs! {
    /// Machine-check address of the Pentium.
    P5_MC_ADDR = 0x0;
    /// Machine-check type of the Pentium.
    P5_MC_TYPE = 0x1;
    /// The time-stamp counter.
    TSC = 0x10;
    /// KVM: where the guest wants the time of day, by its old number.
    KVM_WALL_CLOCK_OLD = 0x11;
    /// KVM: where the vCPU's clock is, by its old number.
    KVM_SYSTEM_TIME_OLD = 0x12;
    /// Platform ID, for choosing microcode.
    PLATFORM_ID = 0x17;
    /// The base of the local APIC, and its mode.
    APIC_BASE = 0x1b;
    /// Power-on configuration.
    EBL_CR_POWERON = 0x2a;
    /// How many system-management interrupts there were.
    SMI_COUNT = 0x34;
    /// Feature control: VMX, SGX.
    FEAT_CTL = 0x3a;
    /// What was added to the TSC.
    TSC_ADJUST = 0x3b;
    /// Speculation control.
    SPEC_CTRL = 0x48;
    /// Prediction command, write-only.
    PRED_CMD = 0x49;
    /// Loads microcode, write-only.
    UCODE_WRITE = 0x79;
    /// The revision of the microcode, in the upper half.
    UCODE_REV = 0x8b;
    /// The base of system-management RAM.
    SMBASE = 0x9e;
    /// The speed of the front-side bus.
    FSB_FREQ = 0xcd;
    /// Ratios of the platform, and whether CPUID can be made to fault.
    PLATFORM_INFO = 0xce;
    /// What the MTRRs can do.
    MTRR_CAP = 0xfe;
    /// Processor vulnerabilities and capabilities.
    ARCH_CAPABILITIES = 0x10a;
    /// Flushes the L1 cache, write-only.
    FLUSH_CMD = 0x10b;
    /// Cache control of the Pentium II.
    BBL_CR_CTL3 = 0x11e;
    /// Controls TSX.
    TSX_CTRL = 0x122;
    /// Lets CPUID fault.
    MISC_FEATURES_ENABLES = 0x140;
    /// The code segment of SYSENTER.
    SYSENTER_CS = 0x174;
    /// The stack pointer of SYSENTER.
    SYSENTER_ESP = 0x175;
    /// The entry point of SYSENTER.
    SYSENTER_EIP = 0x176;
    /// How many machine-check banks there are, and of what kind.
    MCG_CAP = 0x179;
    /// The status of a machine check.
    MCG_STATUS = 0x17a;
    /// Enables machine-check banks.
    MCG_CTL = 0x17b;
    /// Controls local machine checks.
    MCG_EXT_CTL = 0x4d0;
    /// Performance status: the current ratio.
    PERF_STATUS = 0x198;
    /// Performance control: the wanted ratio.
    PERF_CTL = 0x199;
    /// Miscellaneous processor features.
    MISC_ENABLE = 0x1a0;
    /// Debug control: branch records, single step on branches.
    DEBUGCTL = 0x1d9;
    /// Last branch: from.
    LAST_BRANCH_FROM = 0x1db;
    /// Last branch: to.
    LAST_BRANCH_TO = 0x1dc;
    /// Last interrupt: from.
    LAST_INT_FROM = 0x1dd;
    /// Last interrupt: to.
    LAST_INT_TO = 0x1de;
    /// Power control.
    POWER_CTL = 0x1fc;
    /// The first variable MTRR; bases are even, masks odd.
    MTRR_PHYS_BASE0 = 0x200;
    /// The fixed MTRR of the first 512 KiB.
    MTRR_FIX64K_00000 = 0x250;
    /// The fixed MTRR from 512 KiB.
    MTRR_FIX16K_80000 = 0x258;
    /// The fixed MTRR from 640 KiB.
    MTRR_FIX16K_A0000 = 0x259;
    /// The fixed MTRR from 768 KiB; seven more follow.
    MTRR_FIX4K_C0000 = 0x268;
    /// The last fixed MTRR.
    MTRR_FIX4K_F8000 = 0x26f;
    /// The page-attribute table.
    PAT = 0x277;
    /// The default memory type, and whether MTRRs are enabled.
    MTRR_DEF_TYPE = 0x2ff;
    /// Units of the energy counters.
    RAPL_POWER_UNIT = 0x606;
    /// Energy of the package.
    PKG_ENERGY_STATUS = 0x611;
    /// Energy of memory.
    DRAM_ENERGY_STATUS = 0x619;
    /// Energy of the cores.
    PP0_ENERGY_STATUS = 0x639;
    /// Energy of the graphics.
    PP1_ENERGY_STATUS = 0x641;
    /// The deadline of the APIC timer.
    TSC_DEADLINE = 0x6e0;
    /// The first x2APIC register.
    X2APIC_FIRST = 0x800;
    /// The task priority, in x2APIC mode.
    X2APIC_TPR = 0x808;
    /// The end of an interrupt, in x2APIC mode.
    X2APIC_EOI = 0x80b;
    /// The interrupt command register, in x2APIC mode.
    X2APIC_ICR = 0x830;
    /// The vector of an interrupt to itself, in x2APIC mode.
    X2APIC_SELF_IPI = 0x83f;
    /// The last x2APIC register.
    X2APIC_LAST = 0x8ff;
    /// State components that XSAVES handles beyond XCR0.
    XSS = 0xda0;
    /// KVM: where the guest wants the time of day.
    KVM_WALL_CLOCK = 0x4b56_4d00;
    /// KVM: where the vCPU's clock is.
    KVM_SYSTEM_TIME = 0x4b56_4d01;
    /// KVM: where and how asynchronous page faults are told of.
    KVM_ASYNC_PF_EN = 0x4b56_4d02;
    /// KVM: where the time is counted in which the vCPU would have run.
    KVM_STEAL_TIME = 0x4b56_4d03;
    /// KVM: where ends of interrupts can be left.
    KVM_PV_EOI_EN = 0x4b56_4d04;
    /// KVM: whether the host waits for a while before it puts a halted vCPU to sleep.
    KVM_POLL_CONTROL = 0x4b56_4d05;
    /// KVM: the vector of pages that have come.
    KVM_ASYNC_PF_INT = 0x4b56_4d06;
    /// KVM: the guest has taken notice of a page that has come, write-only.
    KVM_ASYNC_PF_ACK = 0x4b56_4d07;
    /// KVM: whether the guest can be migrated.
    KVM_MIGRATION_CONTROL = 0x4b56_4d08;
    /// Extended features.
    EFER = 0xc000_0080;
    /// Segments of SYSCALL and SYSRET.
    STAR = 0xc000_0081;
    /// The entry point of SYSCALL in 64-bit mode.
    LSTAR = 0xc000_0082;
    /// The entry point of SYSCALL in compatibility mode, on AMD's processors.
    CSTAR = 0xc000_0083;
    /// The flags that SYSCALL clears.
    SYSCALL_MASK = 0xc000_0084;
    /// The base of FS.
    FS_BASE = 0xc000_0100;
    /// The base of GS.
    GS_BASE = 0xc000_0101;
    /// What SWAPGS exchanges the base of GS with.
    KERNEL_GS_BASE = 0xc000_0102;
    /// What RDTSCP and RDPID return.
    TSC_AUX = 0xc000_0103;
    /// AMD: hardware configuration.
    K7_HWCR = 0xc001_0015;
}

/// Where an MSR lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// In [`state::MsrState`], which reads and writes it entirely.
    Emulated,
    /// In a field of the control structure: bases of FS and GS, SYSENTER, DEBUGCTL, EFER, PAT.
    ControlStructure,
    /// In the processor: the guest's value has to be put there before it runs, and the host's after.
    Switched,
    /// Made from the time-stamp counter and an offset.
    Time,
    /// In the local APIC.
    LocalApic,
    /// One of KVM's own, by which a guest that knows it tells what it wants.
    Paravirtual,
    /// In [`super::mce::MachineChecks`], which reads and writes it entirely.
    MachineCheck,
    /// A command to the processor, with no value.
    Command,
    /// There is no such MSR: #GP.
    Unknown,
}

/// Why an access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrError {
    /// The MSR does not exist for this vCPU. #GP(0) for the guest.
    Unknown,
    /// It exists, and does not take this value or this kind of access. #GP(0) for the guest.
    Refused,
    /// The VMM has denied it to the guest. #GP(0) for the guest, unless the VMM wants to answer itself.
    Filtered,
}

impl Msr {
    /// Where it lives.
    #[must_use]
    pub const fn class(self) -> Class {
        match self {
            Self::FS_BASE
            | Self::GS_BASE
            | Self::SYSENTER_CS
            | Self::SYSENTER_ESP
            | Self::SYSENTER_EIP
            | Self::DEBUGCTL
            | Self::EFER
            | Self::PAT => Class::ControlStructure,
            Self::STAR
            | Self::LSTAR
            | Self::CSTAR
            | Self::SYSCALL_MASK
            | Self::KERNEL_GS_BASE
            | Self::TSC_AUX
            | Self::SPEC_CTRL
            | Self::XSS => Class::Switched,
            Self::TSC | Self::TSC_ADJUST => Class::Time,
            Self::TSC_DEADLINE => Class::LocalApic,
            Self(0x800..=0x8ff) => Class::LocalApic,
            Self::KVM_WALL_CLOCK_OLD | Self::KVM_SYSTEM_TIME_OLD => Class::Paravirtual,
            Self(0x4b56_4d00..=0x4b56_4d08) => Class::Paravirtual,
            Self::PRED_CMD | Self::FLUSH_CMD => Class::Command,
            _ if state::is_emulated(self) => Class::Emulated,
            _ if mce::is_machine_check(self) => Class::MachineCheck,
            _ => Class::Unknown,
        }
    }

    /// Whether the guest can be given the MSR itself, without an exit: the processor checks what the guest writes, and the
    /// value is the guest's own while it runs. (Those that are switched only while the vCPU is loaded as well.)
    #[must_use]
    pub const fn can_pass_through(self) -> bool {
        matches!(
            self,
            Self::FS_BASE
                | Self::GS_BASE
                | Self::KERNEL_GS_BASE
                | Self::SYSENTER_CS
                | Self::SYSENTER_ESP
                | Self::SYSENTER_EIP
                | Self::STAR
                | Self::LSTAR
                | Self::CSTAR
                | Self::SYSCALL_MASK
        )
    }

    /// Whether KVM_GET_MSR_INDEX_LIST names it on a host that supports `supported`.
    #[must_use]
    pub const fn is_listed(self, supported: &GuestFeatures) -> bool {
        match self {
            Self::STAR | Self::LSTAR | Self::CSTAR | Self::SYSCALL_MASK | Self::KERNEL_GS_BASE => {
                supported.has(Features::LM)
            }
            Self::TSC_AUX => supported
                .flags
                .has_any(Features::RDTSCP.with(Features::RDPID)),
            Self::TSC_ADJUST => supported.has(Features::TSC_ADJUST),
            Self::TSC_DEADLINE => supported.has(Features::TSC_DEADLINE),
            Self::ARCH_CAPABILITIES => supported.has(Features::ARCH_CAPABILITIES),
            Self::SPEC_CTRL => supported.has(Features::SPEC_CTRL),
            Self::XSS => supported.has(Features::XSAVES),
            _ => true,
        }
    }
}

/// The MSRs that make up the state of a vCPU and that a VMM saves and restores, before [`Msr::is_listed`]. APIC_BASE and EFER are in
/// `struct kvm_sregs`; they and the MTRRs can be read and written by number as well, and are not listed, as in KVM.
pub const SAVED: &[Msr] = &[
    Msr::KVM_WALL_CLOCK_OLD,
    Msr::KVM_SYSTEM_TIME_OLD,
    Msr::KVM_WALL_CLOCK,
    Msr::KVM_SYSTEM_TIME,
    Msr::SYSENTER_CS,
    Msr::SYSENTER_ESP,
    Msr::SYSENTER_EIP,
    Msr::STAR,
    Msr::CSTAR,
    Msr::KERNEL_GS_BASE,
    Msr::SYSCALL_MASK,
    Msr::LSTAR,
    Msr::TSC,
    Msr::PAT,
    Msr::TSC_AUX,
    Msr::SPEC_CTRL,
    Msr::XSS,
    Msr::DEBUGCTL,
    Msr::LAST_BRANCH_FROM,
    Msr::LAST_BRANCH_TO,
    Msr::LAST_INT_FROM,
    Msr::LAST_INT_TO,
    Msr::FEAT_CTL,
    Msr::TSC_ADJUST,
    Msr::TSC_DEADLINE,
    Msr::ARCH_CAPABILITIES,
    Msr::MISC_ENABLE,
    Msr::MCG_STATUS,
    Msr::MCG_CTL,
    Msr::MCG_EXT_CTL,
    Msr::PLATFORM_INFO,
    Msr::MISC_FEATURES_ENABLES,
    Msr::POWER_CTL,
    Msr::SMI_COUNT,
    Msr::UCODE_REV,
    Msr::KVM_STEAL_TIME,
    Msr::KVM_PV_EOI_EN,
    Msr::KVM_POLL_CONTROL,
];

/// Checks a value for an MSR of class [`Class::ControlStructure`], [`Class::Switched`] or [`Class::Command`] before it is taken, as
/// WRMSR does (SDM vol. 4, and vol. 2, WRMSR). EFER is checked by [`cr::check_efer_write`](super::cr::check_efer_write), as it
/// depends on CR0. `host` is whether a VMM asks: it may set what the guest's CPUID does not promise. Returns the value to keep.
///
/// # Errors
///
/// See [`MsrError`].
pub fn check_value(
    msr: Msr,
    value: u64,
    features: &GuestFeatures,
    cr4: Cr4,
    host: bool,
) -> Result<u64, MsrError> {
    let need = |feature: Features| {
        if host || features.flags.has_any(feature) {
            Ok(())
        } else {
            Err(MsrError::Unknown)
        }
    };
    let only = |mask: u64| {
        if value & !mask == 0 {
            Ok(value)
        } else {
            Err(MsrError::Refused)
        }
    };
    match msr {
        Msr::FS_BASE
        | Msr::GS_BASE
        | Msr::KERNEL_GS_BASE
        | Msr::LSTAR
        | Msr::CSTAR
        | Msr::SYSENTER_ESP
        | Msr::SYSENTER_EIP => {
            // WRMSR checks against the width that the processor has, whether or not CR4 uses it; a VMM restoring a state
            // may set CR4 later.
            let la57 = features.has(Features::LA57) || cr4.has(Cr4::LA57);
            if is_canonical(value, la57) {
                Ok(value)
            } else {
                Err(MsrError::Refused)
            }
        }
        // The upper half is kept by some processors and not by others.
        Msr::SYSENTER_CS => Ok(value & 0xffff_ffff),
        Msr::STAR => Ok(value),
        Msr::SYSCALL_MASK => only(0xffff_ffff),
        Msr::TSC_AUX => {
            need(Features::RDTSCP | Features::RDPID)?;
            only(0xffff_ffff)
        }
        Msr::SPEC_CTRL => {
            need(Features::SPEC_CTRL)?;
            only(features.spec_ctrl_allowed())
        }
        Msr::PRED_CMD => {
            need(Features::IBRS)?;
            // IBPB.
            only(1)
        }
        Msr::FLUSH_CMD => {
            need(Features::FLUSH_L1D)?;
            // The L1 data cache.
            only(1)
        }
        Msr::XSS => {
            need(Features::XSAVES)?;
            // No supervisor state is supported.
            only(0)
        }
        Msr::PAT => {
            if mtrr::pat_is_valid(value) {
                Ok(value)
            } else {
                Err(MsrError::Refused)
            }
        }
        // Neither branch records nor BTF reach the guest: their bits are taken and dropped, reserved ones refused.
        Msr::DEBUGCTL => only(DEBUGCTL_IGNORED).map(|_| 0),
        _ => Err(MsrError::Unknown),
    }
}

/// LBR and BTF.
const DEBUGCTL_IGNORED: u64 = 3;
