// SPDX-License-Identifier: GPL-2.0

//! What KVM_GET_SUPPORTED_CPUID reports: the host's CPUID, less what the module does not virtualize.
//!
//! A bit is reported only if it is named in one of the masks below: a feature that is not known here may need state that is not
//! switched or an MSR that is not there. What depends on the backend and the host kernel comes in through [`Policy`].

use super::super::pv;
use super::super::pv::PvFeatures;
use super::super::regs::Xcr0;
use super::is_indexed;
use super::words::Ext1Ecx;
use super::words::Ext1Edx;
use super::words::Ext7Edx;
use super::words::Ext8Ebx;
use super::words::Leaf1Ecx;
use super::words::Leaf1Edx;
use super::words::Leaf7Ebx;
use super::words::Leaf7Ecx;
use super::words::Leaf7Edx;
use super::words::Leaf7s1Eax;
use super::words::Leaf7s1Edx;
use super::words::LeafDs1Eax;
use super::CpuidEntry;
use super::CpuidRegs;
use super::XsaveLayout;
use super::FLAG_SIGNIFICANT_INDEX;

/// What the backend and the host kernel can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The state components that the host kernel switches for guests; empty if it does not use XSAVE.
    pub xcr0: Xcr0,
    /// INVPCID can be enabled in the guest.
    pub invpcid: bool,
    /// RDTSCP (and RDPID) can be enabled in the guest, and TSC_AUX is switched.
    pub rdtscp: bool,
    /// XSAVES can be enabled in the guest, with an empty IA32_XSS.
    pub xsaves: bool,
    /// String instructions are fast: IA32_MISC_ENABLE says so, whatever CPUID does.
    pub fast_strings: bool,
    /// PKRU is switched.
    pub pku: bool,
    /// UMIP works in the guest.
    pub umip: bool,
    /// IA32_SPEC_CTRL, IA32_PRED_CMD and IA32_FLUSH_CMD are virtualized.
    pub spec_ctrl: bool,
    /// IA32_ARCH_CAPABILITIES is reported to guests.
    pub arch_capabilities: bool,
    /// IA32_TSC_ADJUST is virtualized.
    pub tsc_adjust: bool,
    /// The module has a local APIC of its own. Without one, x2APIC and the TSC-deadline timer would be a promise that no
    /// VMM could keep: their MSRs do not leave the kernel. (KVM reports both whatever the irqchip and asks VMMs without its APIC to
    /// mask them; a VMM that forgets then has a guest without a timer.)
    pub kernel_apic: bool,
    /// The paravirtual features that guests are told of.
    pub paravirtual: PvFeatures,
    /// The widest guest-physical address that the second-level tables can map: 48 with four levels, 57 with five; 0 if there are
    /// none.
    pub mappable_bits: u8,
}

/// The slice is too short for the entries there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall;

/// The highest basic leaf reported: the topology of dies. What is above describes AMX, AVX10 and the like.
const MAX_BASIC: u32 = 0x1f;
/// The highest extended leaf reported on a host that has AMD's.
const MAX_EXTENDED: u32 = 0x8000_001d;
/// The highest extended leaf of Intel's processors.
const MAX_EXTENDED_INTEL: u32 = 0x8000_0008;
/// More caches than any processor has.
const MAX_CACHE_SUBLEAVES: u32 = 32;

impl Policy {
    fn leaf1_ecx(&self) -> Leaf1Ecx {
        // No MONITOR: MWAIT would let a guest idle a host CPU. No VMX: no nesting. No PDCM: no PMU. OSXSAVE follows CR4
        // at run time.
        let mut mask = Leaf1Ecx::SSE3
            | Leaf1Ecx::PCLMULQDQ
            | Leaf1Ecx::SSSE3
            | Leaf1Ecx::CX16
            | Leaf1Ecx::PCID
            | Leaf1Ecx::SSE4_1
            | Leaf1Ecx::SSE4_2
            | Leaf1Ecx::MOVBE
            | Leaf1Ecx::POPCNT
            | Leaf1Ecx::AES
            | Leaf1Ecx::RDRAND;
        if !self.xcr0.is_empty() {
            mask |= Leaf1Ecx::XSAVE;
        }
        if self.xcr0.has(Xcr0::AVX) {
            mask |= Leaf1Ecx::AVX | Leaf1Ecx::F16C | Leaf1Ecx::FMA;
        }
        mask
    }

    /// Bits that are there whatever the host has.
    fn leaf1_ecx_always(&self) -> Leaf1Ecx {
        Leaf1Ecx::HYPERVISOR.with_if(Leaf1Ecx::X2APIC | Leaf1Ecx::TSC_DEADLINE, self.kernel_apic)
    }

    fn leaf7_ebx(&self) -> Leaf7Ebx {
        // No HLE and RTM: IA32_TSX_CTRL is not virtualized. No MPX, SGX, PT, RDT.
        let mut mask = Leaf7Ebx::FSGSBASE
            | Leaf7Ebx::BMI1
            | Leaf7Ebx::FDP_EXCPTN_ONLY
            | Leaf7Ebx::SMEP
            | Leaf7Ebx::BMI2
            | Leaf7Ebx::ZERO_FCS_FDS
            | Leaf7Ebx::RDSEED
            | Leaf7Ebx::ADX
            | Leaf7Ebx::SMAP
            | Leaf7Ebx::CLFLUSHOPT
            | Leaf7Ebx::CLWB
            | Leaf7Ebx::SHA;
        if self.xcr0.has(Xcr0::AVX) {
            mask |= Leaf7Ebx::AVX2;
        }
        if self.xcr0.has(Xcr0::AVX512) {
            mask |= Leaf7Ebx::AVX512;
        }
        mask.with_if(Leaf7Ebx::INVPCID, self.invpcid)
            .with_if(Leaf7Ebx::ERMS, self.fast_strings)
    }

    fn leaf7_ecx(&self) -> Leaf7Ecx {
        let mut mask = Leaf7Ecx::GFNI
            | Leaf7Ecx::LA57
            | Leaf7Ecx::CLDEMOTE
            | Leaf7Ecx::MOVDIRI
            | Leaf7Ecx::MOVDIR64B;
        if self.xcr0.has(Xcr0::AVX) {
            mask |= Leaf7Ecx::VAES | Leaf7Ecx::VPCLMULQDQ;
        }
        if self.xcr0.has(Xcr0::AVX512) {
            mask |= Leaf7Ecx::AVX512;
        }
        mask.with_if(Leaf7Ecx::PKU, self.pku && self.xcr0.has(Xcr0::PKRU))
            .with_if(Leaf7Ecx::UMIP, self.umip)
            .with_if(Leaf7Ecx::RDPID, self.rdtscp)
    }

    fn leaf7_edx(&self) -> Leaf7Edx {
        // No AMX, CET and PCONFIG. RTM_ALWAYS_ABORT and TSX_FORCE_ABORT are about TSX, which there is not.
        (Leaf7Edx::FSRM | Leaf7Edx::MD_CLEAR | Leaf7Edx::SERIALIZE)
            .with_if(Leaf7Edx::AVX512, self.xcr0.has(Xcr0::AVX512))
            .with_if(Leaf7Edx::SPECULATION | Leaf7Edx::FLUSH_L1D, self.spec_ctrl)
            .with_if(Leaf7Edx::ARCH_CAPABILITIES, self.arch_capabilities)
    }

    fn leaf7s1_eax(&self) -> Leaf7s1Eax {
        (Leaf7s1Eax::CMPCCXADD | Leaf7s1Eax::FZRM | Leaf7s1Eax::FSRS | Leaf7s1Eax::FSRC)
            .with_if(Leaf7s1Eax::AVX, self.xcr0.has(Xcr0::AVX))
            .with_if(Leaf7s1Eax::AVX512_BF16, self.xcr0.has(Xcr0::AVX512))
    }

    fn leaf7s1_edx(&self) -> Leaf7s1Edx {
        Leaf7s1Edx::PREFETCHITI.with_if(Leaf7s1Edx::AVX, self.xcr0.has(Xcr0::AVX))
    }

    fn ext1_edx(&self) -> u32 {
        let own = Ext1Edx::SYSCALL
            | Ext1Edx::NX
            | Ext1Edx::MMXEXT
            | Ext1Edx::FXSR_OPT
            | Ext1Edx::GBPAGES
            | Ext1Edx::LM;
        // AMD repeats these bits of leaf 1 here.
        let repeated = LEAF1_EDX.bits() & 0x0183_f3ff;
        own.with_if(Ext1Edx::RDTSCP, self.rdtscp).bits() | repeated
    }
}

/// Leaf 1, EDX. No DS, no ACPI, no TM: thermal and debug-store MSRs are not virtualized. HTT is for the VMM.
const LEAF1_EDX: Leaf1Edx = Leaf1Edx::NAMED;

const EXT1_ECX: u32 = Ext1Ecx::LAHF_LM.bits()
    | Ext1Ecx::CR8_LEGACY.bits()
    | Ext1Ecx::LZCNT.bits()
    | Ext1Ecx::SSE4A.bits()
    | Ext1Ecx::MISALIGNSSE.bits()
    | Ext1Ecx::PREFETCHW.bits();

/// The entries written so far.
struct Output<'a> {
    entries: &'a mut [CpuidEntry],
    len: usize,
}

impl Output<'_> {
    fn push(&mut self, function: u32, index: u32, regs: CpuidRegs) -> Result<(), TooSmall> {
        let slot = self.entries.get_mut(self.len).ok_or(TooSmall)?;
        *slot = CpuidEntry {
            function,
            index,
            flags: if is_indexed(function) {
                FLAG_SIGNIFICANT_INDEX
            } else {
                0
            },
            ..CpuidEntry::default()
        };
        slot.set_regs(regs);
        self.len = self.len.wrapping_add(1);
        Ok(())
    }
}

/// Writes the supported CPUID into `entries`, from what `host` says for a leaf and subleaf on one processor. Returns how many
/// entries there are.
///
/// # Errors
///
/// [`TooSmall`] if they do not fit; the slice then holds those that did.
pub fn supported(
    policy: &Policy,
    mut host: impl FnMut(u32, u32) -> CpuidRegs,
    entries: &mut [CpuidEntry],
) -> Result<usize, TooSmall> {
    let layout = XsaveLayout::from_host(&mut host);
    let mut out = Output { entries, len: 0 };

    let vendor = host(0, 0);
    let last = vendor.eax.min(MAX_BASIC);
    out.push(
        0,
        0,
        CpuidRegs {
            eax: last,
            ..vendor
        },
    )?;
    for leaf in 1..=last {
        basic(policy, &mut host, &layout, leaf, &mut out)?;
    }

    let root = host(0x8000_0000, 0);
    if root.eax >= 0x8000_0000 {
        let limit = if root.eax >= MAX_EXTENDED {
            MAX_EXTENDED
        } else {
            MAX_EXTENDED_INTEL
        };
        let last = root.eax.min(limit);
        out.push(0x8000_0000, 0, CpuidRegs { eax: last, ..root })?;
        for leaf in 0x8000_0001..=last {
            extended(policy, &mut host, leaf, &mut out)?;
        }
    }

    hypervisor(policy, &mut out)?;
    Ok(out.len)
}

fn basic(
    policy: &Policy,
    host: &mut impl FnMut(u32, u32) -> CpuidRegs,
    layout: &XsaveLayout,
    leaf: u32,
    out: &mut Output<'_>,
) -> Result<(), TooSmall> {
    match leaf {
        1 => {
            let raw = host(1, 0);
            let regs = CpuidRegs {
                eax: raw.eax,
                // The brand and the size of a cache line; the APIC ID and the number of siblings are for the VMM.
                ebx: raw.ebx & 0xffff,
                ecx: raw.ecx & policy.leaf1_ecx().bits() | policy.leaf1_ecx_always().bits(),
                edx: raw.edx & LEAF1_EDX.bits(),
            };
            out.push(1, 0, regs)
        }
        2 => out.push(2, 0, host(2, 0)),
        4 => caches(host, 4, out),
        6 => {
            // The APIC timer does not stop. No APERF and MPERF.
            let regs = CpuidRegs {
                eax: 1 << 2,
                ..CpuidRegs::default()
            };
            out.push(6, 0, regs)
        }
        7 => structured(policy, host, out),
        0xd => xsave(policy, host, layout, out),
        // Serial number, MONITOR, DCA, PMU, RDT, SGX, PT, TSC frequency and the rest: nothing. Topology (0xb and 0x1f) is for
        // the VMM to describe.
        _ => out.push(leaf, 0, CpuidRegs::default()),
    }
}

/// A subleaf for each cache, and one that says there are no more.
fn caches(
    host: &mut impl FnMut(u32, u32) -> CpuidRegs,
    leaf: u32,
    out: &mut Output<'_>,
) -> Result<(), TooSmall> {
    for index in 0..MAX_CACHE_SUBLEAVES {
        let regs = host(leaf, index);
        out.push(leaf, index, regs)?;
        if regs.eax & 0x1f == 0 {
            break;
        }
    }
    Ok(())
}

fn structured(
    policy: &Policy,
    host: &mut impl FnMut(u32, u32) -> CpuidRegs,
    out: &mut Output<'_>,
) -> Result<(), TooSmall> {
    let raw = host(7, 0);
    let last = raw.eax.min(1);
    let adjust = Leaf7Ebx::empty().with_if(Leaf7Ebx::TSC_ADJUST, policy.tsc_adjust);
    let regs = CpuidRegs {
        eax: last,
        ebx: raw.ebx & policy.leaf7_ebx().bits() | adjust.bits(),
        ecx: raw.ecx & policy.leaf7_ecx().bits(),
        edx: raw.edx & policy.leaf7_edx().bits(),
    };
    out.push(7, 0, regs)?;
    if last >= 1 {
        let raw = host(7, 1);
        let regs = CpuidRegs {
            eax: raw.eax & policy.leaf7s1_eax().bits(),
            edx: raw.edx & policy.leaf7s1_edx().bits(),
            ..CpuidRegs::default()
        };
        out.push(7, 1, regs)?;
    }
    Ok(())
}

fn xsave(
    policy: &Policy,
    host: &mut impl FnMut(u32, u32) -> CpuidRegs,
    layout: &XsaveLayout,
    out: &mut Output<'_>,
) -> Result<(), TooSmall> {
    let raw = host(0xd, 0);
    let there = Xcr0::new(u64::from(raw.eax) | (u64::from(raw.edx) << 32));
    // What the host switches and we know; AMX would need XFD as well.
    let known = Xcr0::X87
        | Xcr0::SSE
        | Xcr0::AVX
        | Xcr0::AVX512
        | Xcr0::empty().with_if(Xcr0::PKRU, policy.pku);
    let xcr0 = there & policy.xcr0 & known;
    if xcr0.is_empty() {
        return out.push(0xd, 0, CpuidRegs::default());
    }
    let size = layout.size(xcr0, false);
    let regs = CpuidRegs {
        eax: xcr0.bits() as u32,
        ebx: size,
        ecx: size,
        edx: (xcr0.bits() >> 32) as u32,
    };
    out.push(0xd, 0, regs)?;

    let mask = (LeafDs1Eax::XSAVEOPT | LeafDs1Eax::XSAVEC | LeafDs1Eax::XGETBV1)
        .with_if(LeafDs1Eax::XSAVES, policy.xsaves);
    let features = LeafDs1Eax::new(host(0xd, 1).eax & mask.bits());
    let compact = features.has_any(LeafDs1Eax::XSAVEC | LeafDs1Eax::XSAVES);
    let regs = CpuidRegs {
        eax: features.bits(),
        ebx: if compact { layout.size(xcr0, true) } else { 0 },
        ..CpuidRegs::default()
    };
    out.push(0xd, 1, regs)?;

    for index in 2..64u32 {
        if xcr0.bits() & (1u64 << index) == 0 {
            continue;
        }
        let raw = host(0xd, index);
        let regs = CpuidRegs {
            eax: raw.eax,
            ebx: raw.ebx,
            // Whether it is aligned in the compacted form; no XFD, no supervisor state.
            ecx: raw.ecx & 2,
            edx: 0,
        };
        out.push(0xd, index, regs)?;
    }
    Ok(())
}

fn extended(
    policy: &Policy,
    host: &mut impl FnMut(u32, u32) -> CpuidRegs,
    leaf: u32,
    out: &mut Output<'_>,
) -> Result<(), TooSmall> {
    let regs = match leaf {
        0x8000_0001 => {
            let raw = host(leaf, 0);
            CpuidRegs {
                eax: raw.eax,
                ebx: 0,
                ecx: raw.ecx & EXT1_ECX,
                edx: raw.edx & policy.ext1_edx(),
            }
        }
        // The brand string, and caches and TLBs.
        0x8000_0002..=0x8000_0006 => host(leaf, 0),
        0x8000_0007 => CpuidRegs {
            edx: host(leaf, 0).edx & Ext7Edx::INVARIANT_TSC.bits(),
            ..CpuidRegs::default()
        },
        0x8000_0008 => {
            let raw = host(leaf, 0);
            let physical = raw.eax & 0xff;
            let linear = ((raw.eax >> 8) & 0xff).max(48);
            let speculation = Leaf7Edx::new(host(7, 0).edx & policy.leaf7_edx().bits());
            // Not AMD's SSB_NO: IA32_ARCH_CAPABILITIES says that here.
            let speculation = Ext8Ebx::of_leaf7(speculation);
            // How many of the physical bits can be mapped; zero says all.
            let mappable = if policy.mappable_bits == 0 {
                0
            } else {
                physical.min(u32::from(policy.mappable_bits))
            };
            CpuidRegs {
                eax: physical | (linear << 8) | (mappable << 16),
                ebx: raw.ebx & Ext8Ebx::OWN.bits() | speculation.bits(),
                ecx: 0,
                edx: 0,
            }
        }
        0x8000_0019 => {
            let raw = host(leaf, 0);
            CpuidRegs {
                ecx: 0,
                edx: 0,
                ..raw
            }
        }
        0x8000_001d => return caches(host, leaf, out),
        _ => CpuidRegs::default(),
    };
    out.push(leaf, 0, regs)
}

/// The signature by which guests know KVM, and the paravirtual features.
fn hypervisor(policy: &Policy, out: &mut Output<'_>) -> Result<(), TooSmall> {
    let [ebx, ecx, edx] = pv::SIGNATURE;
    let regs = CpuidRegs {
        eax: pv::FEATURES_LEAF,
        ebx,
        ecx,
        edx,
    };
    out.push(pv::SIGNATURE_LEAF, 0, regs)?;
    let regs = CpuidRegs {
        eax: policy.paravirtual.bits(),
        ..CpuidRegs::default()
    };
    out.push(pv::FEATURES_LEAF, 0, regs)
}
