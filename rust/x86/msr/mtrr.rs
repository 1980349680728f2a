// SPDX-License-Identifier: GPL-2.0

//! Memory types: the MTRRs and the page-attribute table (SDM vol. 3, chapter 13).
//!
//! They are stored and checked. Under EPT the memory type of a mapping is the host's choice and the MTRRs have no effect; guests set
//! them up and read them back all the same.

use super::super::cpuid::features::GuestFeatures;
use super::Msr;
use super::MsrError;

/// How many variable ranges there are.
pub const VARIABLE_RANGES: usize = 8;
/// Twice as many registers.
const VARIABLE_REGISTERS: usize = 2 * VARIABLE_RANGES;
/// One of 64 KiB granules, two of 16 KiB, eight of 4 KiB.
const FIXED_REGISTERS: usize = 11;

/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write combining.
pub const CAPABILITIES: u64 = VARIABLE_RANGES as u64 | (1 << 8) | (1 << 10);

/// IA32_PAT after reset: WB, WT, UC-, UC, twice.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Whether a byte is a memory type of the MTRRs: UC, WC, WT, WP or WB.
const fn type_is_valid(type_: u8) -> bool {
    matches!(type_, 0 | 1 | 4 | 5 | 6)
}

/// Whether each entry of a page-attribute table is a memory type; besides those of the MTRRs there is UC-.
#[must_use]
pub fn pat_is_valid(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|&type_| type_is_valid(type_) || type_ == 7)
}

/// The MTRRs of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mtrrs {
    default_type: u64,
    fixed: [u64; FIXED_REGISTERS],
    variable: [u64; VARIABLE_REGISTERS],
}

enum Register {
    DefaultType,
    Fixed(usize),
    Variable(usize),
}

const fn register(msr: Msr) -> Option<Register> {
    match msr.0 {
        0x2ff => Some(Register::DefaultType),
        n @ 0x200..=0x20f => Some(Register::Variable((n & 0xf) as usize)),
        0x250 => Some(Register::Fixed(0)),
        n @ 0x258..=0x259 => Some(Register::Fixed(1 + (n & 1) as usize)),
        n @ 0x268..=0x26f => Some(Register::Fixed(3 + (n & 7) as usize)),
        _ => None,
    }
}

/// Whether it is one of them (MTRR_CAP is not: it is constant).
#[must_use]
pub const fn is_mtrr(msr: Msr) -> bool {
    register(msr).is_some()
}

impl Mtrrs {
    /// The state after reset: all zero, disabled.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            default_type: 0,
            fixed: [0; FIXED_REGISTERS],
            variable: [0; VARIABLE_REGISTERS],
        }
    }

    /// Reads a register.
    ///
    /// # Errors
    ///
    /// [`MsrError::Unknown`] if it is not one of them.
    pub fn read(&self, msr: Msr) -> Result<u64, MsrError> {
        match register(msr) {
            Some(Register::DefaultType) => Some(self.default_type),
            Some(Register::Fixed(i)) => self.fixed.get(i).copied(),
            Some(Register::Variable(i)) => self.variable.get(i).copied(),
            None => None,
        }
        .ok_or(MsrError::Unknown)
    }

    /// Writes a register.
    ///
    /// # Errors
    ///
    /// [`MsrError::Refused`] for a memory type that does not exist, a reserved bit, or an address too wide.
    pub fn write(
        &mut self,
        msr: Msr,
        value: u64,
        features: &GuestFeatures,
    ) -> Result<(), MsrError> {
        let (slot, valid) = match register(msr) {
            Some(Register::DefaultType) => {
                let valid = value & !0xcff == 0 && type_is_valid(value as u8);
                (Some(&mut self.default_type), valid)
            }
            Some(Register::Fixed(i)) => {
                let valid = value.to_le_bytes().iter().all(|&t| type_is_valid(t));
                (self.fixed.get_mut(i), valid)
            }
            Some(Register::Variable(i)) => {
                let reserved = features.reserved_gpa_bits();
                let valid = if i & 1 == 0 {
                    value & (reserved | 0xf00) == 0 && type_is_valid(value as u8)
                } else {
                    value & (reserved | 0x7ff) == 0
                };
                (self.variable.get_mut(i), valid)
            }
            None => (None, false),
        };
        let slot = slot.ok_or(MsrError::Unknown)?;
        if !valid {
            return Err(MsrError::Refused);
        }
        *slot = value;
        Ok(())
    }
}
