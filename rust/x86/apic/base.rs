// SPDX-License-Identifier: GPL-2.0

//! IA32_APIC_BASE: the modes of the local APIC and the ways between them (SDM vol. 3, 12.4.3, 12.4.4 and 12.12.5).

use super::super::bits::bit_flags;
use super::super::cpuid::features::Features;
use super::super::cpuid::features::GuestFeatures;
use super::super::msr::MsrError;

/// Where an APIC's registers are after reset.
pub const DEFAULT_ADDRESS: u64 = 0xfee0_0000;

/// How software reaches the local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Not at all: the processor is as if it had none.
    Disabled,
    /// By the page at [`ApicBase::address`].
    Xapic,
    /// By MSRs.
    X2apic,
}

/// Which processor of the machine this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one that starts the machine.
    Bootstrap,
    /// One that waits for a SIPI.
    Application,
}

bit_flags! {
    /// IA32_APIC_BASE. From bit 12 on, it has the address of the page.
    pub struct ApicBase(u64) {
        /// The processor is the bootstrap one.
        BSP = 1 << 8;
        /// x2APIC mode.
        X2APIC = 1 << 10;
        /// The APIC is enabled.
        ENABLED = 1 << 11;
    }
}

impl ApicBase {
    /// The value after reset: xAPIC mode, at [`DEFAULT_ADDRESS`].
    #[must_use]
    pub const fn reset(role: Role) -> Self {
        let base = Self::new(DEFAULT_ADDRESS).with(Self::ENABLED);
        base.with_if(Self::BSP, matches!(role, Role::Bootstrap))
    }

    /// The mode. x2APIC mode without the enable bit is none; [`ApicBase::check_write`] refuses it.
    #[must_use]
    pub const fn mode(self) -> ApicMode {
        if !self.has(Self::ENABLED) {
            ApicMode::Disabled
        } else if self.has(Self::X2APIC) {
            ApicMode::X2apic
        } else {
            ApicMode::Xapic
        }
    }

    /// The guest-physical address of the page. It may be moved; the BSP bit may be changed as well.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.bits() & !0xfff
    }

    /// What writing `value` makes of the register. `host` is whether a VMM asks: it restores a state, so it may go from any mode to
    /// any other.
    ///
    /// # Errors
    ///
    /// [`MsrError::Refused`] for a reserved bit, for a mode that does not exist, and for a way that does not: x2APIC mode is entered from
    /// xAPIC mode and left for none.
    pub const fn check_write(
        self,
        value: u64,
        features: &GuestFeatures,
        host: bool,
    ) -> Result<Self, MsrError> {
        let new = Self::new(value);
        let mut reserved = features.reserved_gpa_bits() | 0x2ff;
        if !features.has(Features::X2APIC) {
            reserved |= Self::X2APIC.bits();
        }
        let exists = new.has(Self::ENABLED) || !new.has(Self::X2APIC);
        let reachable = !matches!(
            (self.mode(), new.mode()),
            (ApicMode::Disabled, ApicMode::X2apic) | (ApicMode::X2apic, ApicMode::Xapic)
        );
        if value & reserved != 0 || !exists || !(host || reachable) {
            return Err(MsrError::Refused);
        }
        Ok(new)
    }
}
