// SPDX-License-Identifier: GPL-2.0

//! The MSRs that exist only here: values that a guest stores and reads back, and constants.
//!
//! They are those that Linux and firmware touch on a processor of Intel's. The rest are unknown, and #GP: kernels probe
//! with RDMSR and expect it.

use super::super::apic::base::ApicBase;
use super::super::apic::base::Role;
use super::super::cpuid::features::Features;
use super::super::cpuid::features::GuestFeatures;
use super::mtrr;
use super::mtrr::Mtrrs;
use super::Msr;
use super::MsrError;

/// MISC_ENABLE: performance monitoring is there; what guests write to it is ignored.
const MISC_ENABLE_EMON: u64 = 1 << 7;
/// MISC_ENABLE: branch traces are not there; a guest that clears it gets a #GP.
const MISC_ENABLE_BTS_UNAVAILABLE: u64 = 1 << 11;
/// MISC_ENABLE: precise events are not there, as above.
const MISC_ENABLE_PEBS_UNAVAILABLE: u64 = 1 << 12;
/// MISC_ENABLE: MONITOR and MWAIT are there.
const MISC_ENABLE_MWAIT: u64 = 1 << 18;

/// PLATFORM_INFO: CPUID can be made to fault.
const PLATFORM_INFO_CPUID_FAULT: u64 = 1 << 31;
/// MISC_FEATURES_ENABLES: CPUID faults outside CPL 0.
const CPUID_FAULT_ENABLE: u64 = 1 << 0;

/// HWCR, AMD's: what guests write and nobody needs (TLB cache, flush filter, IGNNE).
const HWCR_IGNORED: u64 = (1 << 3) | (1 << 6) | (1 << 8);
/// HWCR: what can be read back: McStatusWrEn, and TscFreqSel, which guests want to see.
const HWCR_STORED: u64 = (1 << 18) | (1 << 24);

/// The revision of microcode that guests see: Linux takes zero for a processor without any.
const UCODE_RESET: u64 = 1 << 32;

/// What a write has changed that others depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The base or the mode of the local APIC.
    ApicBase,
    /// Whether CPUID faults.
    CpuidFault,
}

/// The emulated MSRs of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrState {
    /// The MTRRs.
    pub mtrrs: Mtrrs,
    apic_base: ApicBase,
    misc_enable: u64,
    ucode_rev: u64,
    arch_capabilities: u64,
    platform_info: u64,
    misc_features_enables: u64,
    power_ctl: u64,
    smi_count: u64,
    hwcr: u64,
}

/// Whether an MSR is one that [`MsrState`] answers for.
pub(super) const fn is_emulated(msr: Msr) -> bool {
    constant(msr).is_some()
        || mtrr::is_mtrr(msr)
        || matches!(
            msr,
            Msr::APIC_BASE
                | Msr::MISC_ENABLE
                | Msr::UCODE_REV
                | Msr::UCODE_WRITE
                | Msr::ARCH_CAPABILITIES
                | Msr::PLATFORM_INFO
                | Msr::MISC_FEATURES_ENABLES
                | Msr::POWER_CTL
                | Msr::SMI_COUNT
                | Msr::PERF_CTL
                | Msr::BBL_CR_CTL3
                | Msr::K7_HWCR
        )
}

/// MSRs that always read the same and take no write.
const fn constant(msr: Msr) -> Option<u64> {
    match msr {
        Msr::P5_MC_ADDR
        | Msr::P5_MC_TYPE
        | Msr::PLATFORM_ID
        | Msr::EBL_CR_POWERON
        | Msr::LAST_BRANCH_FROM
        | Msr::LAST_BRANCH_TO
        | Msr::LAST_INT_FROM
        | Msr::LAST_INT_TO
        | Msr::RAPL_POWER_UNIT
        | Msr::PKG_ENERGY_STATUS
        | Msr::DRAM_ENERGY_STATUS
        | Msr::PP0_ENERGY_STATUS
        | Msr::PP1_ENERGY_STATUS => Some(0),
        Msr::MTRR_CAP => Some(mtrr::CAPABILITIES),
        // 200 MHz, and a ratio of four.
        Msr::FSB_FREQ => Some(3),
        Msr::PERF_STATUS => Some(1000 | (4 << 40)),
        _ => None,
    }
}

impl MsrState {
    /// The state after reset. One processor of a machine is the bootstrap one.
    #[must_use]
    pub const fn new(bootstrap: bool) -> Self {
        Self {
            mtrrs: Mtrrs::new(),
            apic_base: ApicBase::reset(if bootstrap {
                Role::Bootstrap
            } else {
                Role::Application
            }),
            // As KVM has it; a VMM that is a processor's equal adds fast strings.
            misc_enable: MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE,
            ucode_rev: UCODE_RESET,
            arch_capabilities: 0,
            platform_info: PLATFORM_INFO_CPUID_FAULT,
            misc_features_enables: 0,
            power_ctl: 0,
            smi_count: 0,
            hwcr: 0,
        }
    }

    /// IA32_APIC_BASE.
    #[inline]
    #[must_use]
    pub const fn apic_base(&self) -> u64 {
        self.apic_base.bits()
    }

    /// Whether IA32_APIC_BASE enables the local APIC.
    #[inline]
    #[must_use]
    pub const fn apic_enabled(&self) -> bool {
        self.apic_base.has(ApicBase::ENABLED)
    }

    /// Whether CPUID is to fault with #GP at any privilege level.
    #[inline]
    #[must_use]
    pub const fn cpuid_faulting(&self) -> bool {
        self.misc_features_enables & CPUID_FAULT_ENABLE != 0
    }

    /// Whether CPUID is to fault with #GP at this privilege level.
    #[inline]
    #[must_use]
    pub const fn cpuid_faults(&self, cpl: u8) -> bool {
        self.cpuid_faulting() && cpl > 0
    }

    /// Whether IA32_MISC_ENABLE has MONITOR and MWAIT.
    #[must_use]
    pub const fn has_mwait(&self) -> bool {
        self.misc_enable & MISC_ENABLE_MWAIT != 0
    }

    /// Takes back what was set of a VMM's own accord: the MSRs that say what the processor can do are all zero then.
    pub fn clear_feature_msrs(&mut self) {
        self.ucode_rev = 0;
        self.arch_capabilities = 0;
        self.platform_info = 0;
    }

    /// Sets what IA32_ARCH_CAPABILITIES tells guests that have it.
    pub fn set_arch_capabilities(&mut self, value: u64) {
        self.arch_capabilities = value;
    }

    /// Reads an MSR of [`Class::Emulated`](super::Class::Emulated). `host` is whether a VMM asks.
    ///
    /// # Errors
    ///
    /// [`MsrError::Unknown`] if there is none.
    pub fn read(&self, msr: Msr, features: &GuestFeatures, host: bool) -> Result<u64, MsrError> {
        if let Some(value) = constant(msr) {
            return Ok(value);
        }
        match msr {
            Msr::APIC_BASE => Ok(self.apic_base.bits()),
            Msr::MISC_ENABLE => Ok(self.misc_enable),
            Msr::UCODE_REV => Ok(self.ucode_rev),
            Msr::ARCH_CAPABILITIES if host || features.has(Features::ARCH_CAPABILITIES) => {
                Ok(self.arch_capabilities)
            }
            Msr::PLATFORM_INFO => Ok(self.platform_info),
            Msr::MISC_FEATURES_ENABLES => Ok(self.misc_features_enables),
            Msr::POWER_CTL => Ok(self.power_ctl),
            Msr::SMI_COUNT => Ok(self.smi_count),
            Msr::PERF_CTL => Ok(0),
            Msr::K7_HWCR => Ok(self.hwcr),
            // L2 enabled and configured; nobody documents the rest.
            Msr::BBL_CR_CTL3 => Ok(0xbe70_2111),
            _ => self.mtrrs.read(msr),
        }
    }

    /// Writes an MSR of [`Class::Emulated`](super::Class::Emulated). `host` is whether a VMM asks.
    ///
    /// # Errors
    ///
    /// [`MsrError::Unknown`] if there is none, [`MsrError::Refused`] if it is read-only or does not take the value.
    pub fn write(
        &mut self,
        msr: Msr,
        value: u64,
        features: &GuestFeatures,
        host: bool,
    ) -> Result<Effect, MsrError> {
        if let Some(constant) = constant(msr) {
            // A VMM may restore what it saved.
            return if host && value == constant {
                Ok(Effect::None)
            } else {
                Err(MsrError::Refused)
            };
        }
        match msr {
            Msr::APIC_BASE => {
                self.apic_base = self.apic_base.check_write(value, features, host)?;
                return Ok(Effect::ApicBase);
            }
            Msr::MISC_ENABLE => {
                const FIXED: u64 = MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE;
                let changed = value ^ self.misc_enable;
                self.misc_enable = if host {
                    value
                } else if changed & FIXED != 0 {
                    return Err(MsrError::Refused);
                } else {
                    value ^ changed & MISC_ENABLE_EMON
                };
            }
            // Guests write zero before they ask CPUID for the revision.
            Msr::UCODE_REV => {
                if host {
                    self.ucode_rev = value;
                }
            }
            // Microcode is not for guests to load; nothing is told.
            Msr::UCODE_WRITE => {}
            Msr::ARCH_CAPABILITIES => {
                if !host {
                    return Err(MsrError::Unknown);
                }
                self.arch_capabilities = value;
            }
            Msr::PLATFORM_INFO => {
                if !host {
                    return Err(MsrError::Refused);
                }
                self.platform_info = value;
            }
            Msr::MISC_FEATURES_ENABLES => {
                let offered = self.platform_info & PLATFORM_INFO_CPUID_FAULT != 0;
                let allowed = if offered { CPUID_FAULT_ENABLE } else { 0 };
                if value & !allowed != 0 {
                    return Err(MsrError::Refused);
                }
                self.misc_features_enables = value;
                return Ok(Effect::CpuidFault);
            }
            Msr::POWER_CTL => self.power_ctl = value,
            Msr::SMI_COUNT => {
                if !host {
                    return Err(MsrError::Refused);
                }
                self.smi_count = value;
            }
            Msr::PERF_CTL | Msr::BBL_CR_CTL3 => {}
            Msr::K7_HWCR => {
                let value = value & !HWCR_IGNORED;
                if value & !HWCR_STORED != 0 {
                    return Err(MsrError::Refused);
                }
                self.hwcr = value;
            }
            _ => self.mtrrs.write(msr, value, features)?,
        }
        Ok(Effect::None)
    }
}
