// SPDX-License-Identifier: GPL-2.0

//! CPUID: what we can give a guest, and what a guest was given.
//!
//! - [`policy`] makes the answer to KVM_GET_SUPPORTED_CPUID from the host's CPUID.
//! - [`table`] holds what KVM_SET_CPUID2 set for a vCPU and answers the instruction.
//! - [`features`] derives from a table what the rest of the module needs to know.
//! - [`words`] names the bits.

pub mod features;
pub mod policy;
pub mod table;
pub mod words;

use super::regs::Xcr0;

/// The four registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidRegs {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// The entry depends on ECX (KVM_CPUID_FLAG_SIGNIFCANT_INDEX, spelt so).
pub const FLAG_SIGNIFICANT_INDEX: u32 = 1;

/// The most entries that a vCPU's table has (KVM_MAX_CPUID_ENTRIES).
pub const MAX_ENTRIES: usize = 256;

/// A leaf or subleaf, in the layout of `struct kvm_cpuid_entry2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CpuidEntry {
    /// EAX on the way in.
    pub function: u32,
    /// ECX on the way in, if it counts.
    pub index: u32,
    /// [`FLAG_SIGNIFICANT_INDEX`], or zero.
    pub flags: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
    /// Unused.
    pub padding: [u32; 3],
}

impl CpuidEntry {
    /// What the instruction returns.
    #[inline]
    #[must_use]
    pub const fn regs(&self) -> CpuidRegs {
        CpuidRegs {
            eax: self.eax,
            ebx: self.ebx,
            ecx: self.ecx,
            edx: self.edx,
        }
    }

    fn set_regs(&mut self, regs: CpuidRegs) {
        self.eax = regs.eax;
        self.ebx = regs.ebx;
        self.ecx = regs.ecx;
        self.edx = regs.edx;
    }

    /// Whether this entry answers the question.
    #[inline]
    #[must_use]
    pub const fn answers(&self, function: u32, index: u32) -> bool {
        self.function == function
            && (self.flags & FLAG_SIGNIFICANT_INDEX == 0 || self.index == index)
    }
}

/// Leaves with subleaves (SDM vol. 2, CPUID).
const fn is_indexed(function: u32) -> bool {
    matches!(
        function,
        4 | 7
            | 0xb
            | 0xd
            | 0xf
            | 0x10
            | 0x12
            | 0x14
            | 0x17
            | 0x18
            | 0x1d
            | 0x1e
            | 0x1f
            | 0x24
            | 0x8000_001d
    )
}

/// How many state components [`XsaveLayout`] knows.
const XSAVE_COMPONENTS: usize = 32;

#[derive(Clone, Copy, Debug, Default)]
struct XsaveComponent {
    size: u32,
    offset: u32,
    aligned: bool,
}

/// Where the processor puts the components of extended state, from leaf 0xd of the host.
///
/// It is the host's, not the guest's, as it is the host's XSAVE that the guest executes. Read once, at load.
#[derive(Clone, Debug)]
pub struct XsaveLayout {
    components: [XsaveComponent; XSAVE_COMPONENTS],
}

impl XsaveLayout {
    /// The legacy area and the header.
    const MINIMUM: u32 = 512 + 64;

    /// Asks the host.
    #[must_use]
    pub fn from_host(mut host: impl FnMut(u32, u32) -> CpuidRegs) -> Self {
        let mut components = [XsaveComponent::default(); XSAVE_COMPONENTS];
        if host(0, 0).eax >= 0xd {
            let mut index = 0u32;
            for component in &mut components {
                // The first two are the legacy area.
                if index >= 2 {
                    let regs = host(0xd, index);
                    *component = XsaveComponent {
                        size: regs.eax,
                        offset: regs.ebx,
                        aligned: regs.ecx & 2 != 0,
                    };
                }
                index = index.wrapping_add(1);
            }
        }
        Self { components }
    }

    /// The bytes that XSAVE needs for these components, or XSAVEC if `compacted`.
    #[must_use]
    pub fn size(&self, components: Xcr0, compacted: bool) -> u32 {
        let mut end = Self::MINIMUM;
        // The first two are the legacy area.
        let mut left = components.bits() & !3;
        for c in &self.components {
            let wanted = left & 1 != 0;
            left >>= 1;
            if !wanted {
                continue;
            }
            let start = match (compacted, c.aligned) {
                (false, _) => c.offset,
                (true, false) => end,
                (true, true) => end.wrapping_add(63) & !63,
            };
            end = end.max(start.saturating_add(c.size));
        }
        end
    }
}
