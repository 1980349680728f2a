// SPDX-License-Identifier: GPL-2.0

//! What the rest of the module asks of a CPUID: a set of features, and a few widths.

use super::super::bits::bit_flags;
use super::super::regs::Cr4;
use super::super::regs::Efer;
use super::super::regs::Xcr0;
use super::words::Ext1Ecx;
use super::words::Ext1Edx;
use super::words::Ext8Ebx;
use super::words::Leaf1Ecx;
use super::words::Leaf1Edx;
use super::words::Leaf7Ebx;
use super::words::Leaf7Ecx;
use super::words::Leaf7Edx;
use super::words::LeafDs1Eax;
use super::CpuidRegs;

bit_flags! {
    /// The features that decide what a guest may set in a control register or an MSR.
    pub struct Features(u64) {
        /// XSAVE, so CR4.OSXSAVE and XCR0.
        XSAVE = 1 << 0;
        /// CR4.SMEP.
        SMEP = 1 << 1;
        /// CR4.SMAP.
        SMAP = 1 << 2;
        /// CR4.FSGSBASE.
        FSGSBASE = 1 << 3;
        /// CR4.PKE.
        PKU = 1 << 4;
        /// CR4.LA57.
        LA57 = 1 << 5;
        /// CR4.UMIP.
        UMIP = 1 << 6;
        /// CR4.VMXE.
        VMX = 1 << 7;
        /// CR4.PCIDE.
        PCID = 1 << 8;
        /// INVPCID.
        INVPCID = 1 << 9;
        /// RDTSCP, so TSC_AUX.
        RDTSCP = 1 << 10;
        /// RDPID, so TSC_AUX.
        RDPID = 1 << 11;
        /// Long mode.
        LM = 1 << 12;
        /// EFER.NXE.
        NX = 1 << 13;
        /// EFER.SCE.
        SYSCALL = 1 << 14;
        /// 1 GiB pages.
        GBPAGES = 1 << 15;
        /// A local APIC.
        APIC = 1 << 16;
        /// x2APIC.
        X2APIC = 1 << 17;
        /// The TSC-deadline timer.
        TSC_DEADLINE = 1 << 18;
        /// IA32_TSC_ADJUST.
        TSC_ADJUST = 1 << 19;
        /// XSAVES, so IA32_XSS.
        XSAVES = 1 << 20;
        /// IA32_ARCH_CAPABILITIES.
        ARCH_CAPABILITIES = 1 << 21;
        /// IA32_SPEC_CTRL.
        SPEC_CTRL = 1 << 22;
        /// IA32_PERF_CAPABILITIES.
        PDCM = 1 << 23;
        /// MTRRs.
        MTRR = 1 << 24;
        /// The page-attribute table.
        PAT = 1 << 25;
        /// Machine-check banks.
        MCA = 1 << 26;
        /// SYSENTER.
        SEP = 1 << 27;
        /// MONITOR.
        MONITOR = 1 << 28;
        /// AMD: EFER.SVME.
        SVM = 1 << 29;
        /// AMD: EFER.FFXSR.
        FXSR_OPT = 1 << 30;
        /// STIBP, in IA32_SPEC_CTRL.
        STIBP = 1 << 31;
        /// SSBD, in IA32_SPEC_CTRL.
        SSBD = 1 << 32;
        /// IA32_FLUSH_CMD.
        FLUSH_L1D = 1 << 33;
        /// IBRS and IBPB, in IA32_SPEC_CTRL and IA32_PRED_CMD.
        IBRS = 1 << 34;
    }
}

/// What a CPUID amounts to: the guest's, or the supported one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFeatures {
    /// Yes or no.
    pub flags: Features,
    /// The width of physical addresses, in bits: 36 where CPUID does not tell, and never above 52.
    pub maxphyaddr: u8,
    /// The bits of XCR0 that the guest may set; none without XSAVE.
    pub xcr0: Xcr0,
}

impl Default for GuestFeatures {
    /// A processor without any of it.
    fn default() -> Self {
        Self {
            flags: Features::empty(),
            maxphyaddr: 36,
            xcr0: Xcr0::empty(),
        }
    }
}

impl GuestFeatures {
    /// From a function that answers for a leaf and subleaf: [`CpuidTable::find`](super::table::CpuidTable::find), or a search of the
    /// supported entries. `None` is a leaf that is not there.
    #[must_use]
    pub fn derive(mut find: impl FnMut(u32, u32) -> Option<CpuidRegs>) -> Self {
        let mut leaf = |function, index| find(function, index).unwrap_or_default();
        let l1 = leaf(1, 0);
        let (l1c, l1d) = (Leaf1Ecx::new(l1.ecx), Leaf1Edx::new(l1.edx));
        let l7 = leaf(7, 0);
        let (l7b, l7c) = (Leaf7Ebx::new(l7.ebx), Leaf7Ecx::new(l7.ecx));
        let l7d = Leaf7Edx::new(l7.edx);
        let e1 = leaf(0x8000_0001, 0);
        let (e1c, e1d) = (Ext1Ecx::new(e1.ecx), Ext1Edx::new(e1.edx));
        let e8b = Ext8Ebx::new(leaf(0x8000_0008, 0).ebx);
        let d0 = leaf(0xd, 0);
        let d1 = LeafDs1Eax::new(leaf(0xd, 1).eax);

        let flags = Features::empty()
            .with_if(Features::XSAVE, l1c.has(Leaf1Ecx::XSAVE))
            .with_if(Features::VMX, l1c.has(Leaf1Ecx::VMX))
            .with_if(Features::PCID, l1c.has(Leaf1Ecx::PCID))
            .with_if(Features::X2APIC, l1c.has(Leaf1Ecx::X2APIC))
            .with_if(Features::TSC_DEADLINE, l1c.has(Leaf1Ecx::TSC_DEADLINE))
            .with_if(Features::PDCM, l1c.has(Leaf1Ecx::PDCM))
            .with_if(Features::MONITOR, l1c.has(Leaf1Ecx::MONITOR))
            .with_if(Features::APIC, l1d.has(Leaf1Edx::APIC))
            .with_if(Features::MTRR, l1d.has(Leaf1Edx::MTRR))
            .with_if(Features::PAT, l1d.has(Leaf1Edx::PAT))
            .with_if(Features::MCA, l1d.has(Leaf1Edx::MCA))
            .with_if(Features::SEP, l1d.has(Leaf1Edx::SEP))
            .with_if(Features::SMEP, l7b.has(Leaf7Ebx::SMEP))
            .with_if(Features::SMAP, l7b.has(Leaf7Ebx::SMAP))
            .with_if(Features::FSGSBASE, l7b.has(Leaf7Ebx::FSGSBASE))
            .with_if(Features::INVPCID, l7b.has(Leaf7Ebx::INVPCID))
            .with_if(Features::TSC_ADJUST, l7b.has(Leaf7Ebx::TSC_ADJUST))
            .with_if(Features::PKU, l7c.has(Leaf7Ecx::PKU))
            .with_if(Features::LA57, l7c.has(Leaf7Ecx::LA57))
            .with_if(Features::UMIP, l7c.has(Leaf7Ecx::UMIP))
            .with_if(Features::RDPID, l7c.has(Leaf7Ecx::RDPID))
            .with_if(
                Features::SPEC_CTRL,
                l7d.has_any(Leaf7Edx::SPECULATION) || e8b.has_any(Ext8Ebx::SPECULATION),
            )
            .with_if(
                Features::IBRS,
                l7d.has(Leaf7Edx::SPEC_CTRL) || e8b.has_any(Ext8Ebx::IBRS | Ext8Ebx::IBPB),
            )
            .with_if(
                Features::STIBP,
                l7d.has(Leaf7Edx::STIBP) || e8b.has(Ext8Ebx::STIBP),
            )
            .with_if(
                Features::SSBD,
                l7d.has(Leaf7Edx::SSBD) || e8b.has(Ext8Ebx::SSBD),
            )
            .with_if(Features::FLUSH_L1D, l7d.has(Leaf7Edx::FLUSH_L1D))
            .with_if(
                Features::ARCH_CAPABILITIES,
                l7d.has(Leaf7Edx::ARCH_CAPABILITIES),
            )
            .with_if(Features::XSAVES, d1.has(LeafDs1Eax::XSAVES))
            .with_if(Features::SVM, e1c.has(Ext1Ecx::SVM))
            .with_if(Features::SYSCALL, e1d.has(Ext1Edx::SYSCALL))
            .with_if(Features::NX, e1d.has(Ext1Edx::NX))
            .with_if(Features::FXSR_OPT, e1d.has(Ext1Edx::FXSR_OPT))
            .with_if(Features::GBPAGES, e1d.has(Ext1Edx::GBPAGES))
            .with_if(Features::RDTSCP, e1d.has(Ext1Edx::RDTSCP))
            .with_if(Features::LM, e1d.has(Ext1Edx::LM));

        let xcr0 = if flags.has(Features::XSAVE) {
            Xcr0::new(u64::from(d0.eax) | (u64::from(d0.edx) << 32))
        } else {
            Xcr0::empty()
        };
        let told = leaf(0x8000_0000, 0).eax >= 0x8000_0008;
        let maxphyaddr = match find(0x8000_0008, 0) {
            // A VMM may write anything here; nothing works below 32 bits, and entries have room for 52.
            Some(regs) if told => (regs.eax & 0xff).clamp(32, 52) as u8,
            _ => 36,
        };
        Self {
            flags,
            maxphyaddr,
            xcr0,
        }
    }

    /// What a guest gets of its CPUID on a host that supports `supported`: a VMM may promise more than there is.
    #[must_use]
    pub const fn limited_to(&self, supported: &Self) -> Self {
        Self {
            flags: self.flags.and(supported.flags),
            maxphyaddr: self.maxphyaddr,
            xcr0: self.xcr0.and(supported.xcr0),
        }
    }

    /// Whether all of these are there.
    #[inline]
    #[must_use]
    pub const fn has(&self, features: Features) -> bool {
        self.flags.has(features)
    }

    /// The bits of CR4 that the guest may set. Those of processors too old to matter are always there.
    #[must_use]
    pub const fn cr4_allowed(&self) -> Cr4 {
        Cr4::empty()
            .with(Cr4::VME)
            .with(Cr4::PVI)
            .with(Cr4::TSD)
            .with(Cr4::DE)
            .with(Cr4::PSE)
            .with(Cr4::PAE)
            .with(Cr4::MCE)
            .with(Cr4::PGE)
            .with(Cr4::PCE)
            .with(Cr4::OSFXSR)
            .with(Cr4::OSXMMEXCPT)
            .with_if(Cr4::OSXSAVE, self.has(Features::XSAVE))
            .with_if(Cr4::SMEP, self.has(Features::SMEP))
            .with_if(Cr4::SMAP, self.has(Features::SMAP))
            .with_if(Cr4::FSGSBASE, self.has(Features::FSGSBASE))
            .with_if(Cr4::PKE, self.has(Features::PKU))
            .with_if(Cr4::LA57, self.has(Features::LA57))
            .with_if(Cr4::UMIP, self.has(Features::UMIP))
            .with_if(Cr4::VMXE, self.has(Features::VMX))
            .with_if(Cr4::PCIDE, self.has(Features::PCID))
    }

    /// The bits of IA32_SPEC_CTRL that there are. Where there is IBRS, STIBP may be set, whatever it does.
    #[must_use]
    pub const fn spec_ctrl_allowed(&self) -> u64 {
        let mut allowed = 0;
        if self.has(Features::IBRS) {
            allowed |= (1 << 0) | (1 << 1);
        }
        if self.has(Features::STIBP) {
            allowed |= 1 << 1;
        }
        if self.has(Features::SSBD) {
            allowed |= 1 << 2;
        }
        allowed
    }

    /// The bits of EFER that the guest may set, and LMA.
    #[must_use]
    pub const fn efer_allowed(&self) -> Efer {
        // Some guests are told of long mode, which has SYSCALL on every processor, and nothing of SYSCALL: Intel shows the bit
        // in 64-bit mode only.
        Efer::empty()
            .with_if(
                Efer::SCE,
                self.flags.has_any(Features::SYSCALL.with(Features::LM)),
            )
            .with_if(Efer::LME.with(Efer::LMA), self.has(Features::LM))
            .with_if(Efer::NXE, self.has(Features::NX))
            .with_if(Efer::SVME, self.has(Features::SVM))
            .with_if(Efer::FFXSR, self.has(Features::FXSR_OPT))
    }

    /// The bits that no guest-physical address has.
    #[inline]
    #[must_use]
    pub const fn reserved_gpa_bits(&self) -> u64 {
        let bits = if self.maxphyaddr > 52 {
            52
        } else {
            self.maxphyaddr
        };
        u64::MAX << bits
    }
}
