// SPDX-License-Identifier: GPL-2.0

//! The feature words of CPUID, with their bits named (SDM vol. 2, CPUID).
//!
//! Only bits that something here decides on have names.

use super::super::bits::bit_flags;

bit_flags! {
    /// Leaf 1, ECX.
    pub struct Leaf1Ecx(u32) {
        /// SSE3.
        SSE3 = 1 << 0;
        /// PCLMULQDQ.
        PCLMULQDQ = 1 << 1;
        /// MONITOR and MWAIT.
        MONITOR = 1 << 3;
        /// VMX.
        VMX = 1 << 5;
        /// SSSE3.
        SSSE3 = 1 << 9;
        /// Fused multiply-add.
        FMA = 1 << 12;
        /// CMPXCHG16B.
        CX16 = 1 << 13;
        /// IA32_PERF_CAPABILITIES.
        PDCM = 1 << 15;
        /// Process-context identifiers.
        PCID = 1 << 17;
        /// SSE4.1.
        SSE4_1 = 1 << 19;
        /// SSE4.2.
        SSE4_2 = 1 << 20;
        /// x2APIC.
        X2APIC = 1 << 21;
        /// MOVBE.
        MOVBE = 1 << 22;
        /// POPCNT.
        POPCNT = 1 << 23;
        /// TSC-deadline mode of the APIC timer.
        TSC_DEADLINE = 1 << 24;
        /// AES instructions.
        AES = 1 << 25;
        /// XSAVE.
        XSAVE = 1 << 26;
        /// The OS has set CR4.OSXSAVE.
        OSXSAVE = 1 << 27;
        /// AVX.
        AVX = 1 << 28;
        /// Half-precision conversion.
        F16C = 1 << 29;
        /// RDRAND.
        RDRAND = 1 << 30;
        /// A hypervisor is there.
        HYPERVISOR = 1 << 31;
    }
}

bit_flags! {
    /// Leaf 1, EDX.
    pub struct Leaf1Edx(u32) {
        /// x87.
        FPU = 1 << 0;
        /// Virtual-8086 extensions.
        VME = 1 << 1;
        /// Debug extensions.
        DE = 1 << 2;
        /// 4 MiB pages.
        PSE = 1 << 3;
        /// Time-stamp counter.
        TSC = 1 << 4;
        /// RDMSR and WRMSR.
        MSR = 1 << 5;
        /// Physical-address extension.
        PAE = 1 << 6;
        /// Machine-check exception.
        MCE = 1 << 7;
        /// CMPXCHG8B.
        CX8 = 1 << 8;
        /// An enabled local APIC.
        APIC = 1 << 9;
        /// SYSENTER.
        SEP = 1 << 11;
        /// Memory-type range registers.
        MTRR = 1 << 12;
        /// Global pages.
        PGE = 1 << 13;
        /// Machine-check architecture.
        MCA = 1 << 14;
        /// CMOV.
        CMOV = 1 << 15;
        /// Page-attribute table.
        PAT = 1 << 16;
        /// 36-bit addresses in 4 MiB pages.
        PSE36 = 1 << 17;
        /// CLFLUSH.
        CLFSH = 1 << 19;
        /// MMX.
        MMX = 1 << 23;
        /// FXSAVE.
        FXSR = 1 << 24;
        /// SSE.
        SSE = 1 << 25;
        /// SSE2.
        SSE2 = 1 << 26;
        /// Self-snoop.
        SS = 1 << 27;
    }
}

bit_flags! {
    /// Leaf 7, EBX.
    pub struct Leaf7Ebx(u32) {
        /// RDFSBASE and its siblings.
        FSGSBASE = 1 << 0;
        /// IA32_TSC_ADJUST.
        TSC_ADJUST = 1 << 1;
        /// BMI1.
        BMI1 = 1 << 3;
        /// Hardware lock elision.
        HLE = 1 << 4;
        /// AVX2.
        AVX2 = 1 << 5;
        /// The x87 data pointer is updated only on exceptions.
        FDP_EXCPTN_ONLY = 1 << 6;
        /// Supervisor-mode execution prevention.
        SMEP = 1 << 7;
        /// BMI2.
        BMI2 = 1 << 8;
        /// Fast REP MOVSB.
        ERMS = 1 << 9;
        /// INVPCID.
        INVPCID = 1 << 10;
        /// Transactional memory.
        RTM = 1 << 11;
        /// x87 CS and DS are zero.
        ZERO_FCS_FDS = 1 << 13;
        /// AVX-512 foundation.
        AVX512F = 1 << 16;
        /// AVX-512 DQ.
        AVX512DQ = 1 << 17;
        /// RDSEED.
        RDSEED = 1 << 18;
        /// ADCX and ADOX.
        ADX = 1 << 19;
        /// Supervisor-mode access prevention.
        SMAP = 1 << 20;
        /// AVX-512 IFMA.
        AVX512IFMA = 1 << 21;
        /// CLFLUSHOPT.
        CLFLUSHOPT = 1 << 23;
        /// CLWB.
        CLWB = 1 << 24;
        /// AVX-512 PF.
        AVX512PF = 1 << 26;
        /// AVX-512 ER.
        AVX512ER = 1 << 27;
        /// AVX-512 CD.
        AVX512CD = 1 << 28;
        /// SHA instructions.
        SHA = 1 << 29;
        /// AVX-512 BW.
        AVX512BW = 1 << 30;
        /// AVX-512 VL.
        AVX512VL = 1 << 31;
    }
}

impl Leaf7Ebx {
    /// All of AVX-512 in this word.
    pub const AVX512: Self = Self::new(
        Self::AVX512F.bits()
            | Self::AVX512DQ.bits()
            | Self::AVX512IFMA.bits()
            | Self::AVX512PF.bits()
            | Self::AVX512ER.bits()
            | Self::AVX512CD.bits()
            | Self::AVX512BW.bits()
            | Self::AVX512VL.bits(),
    );
}

bit_flags! {
    /// Leaf 7, ECX.
    pub struct Leaf7Ecx(u32) {
        /// AVX-512 VBMI.
        AVX512_VBMI = 1 << 1;
        /// User-mode instruction prevention.
        UMIP = 1 << 2;
        /// Protection keys for user pages.
        PKU = 1 << 3;
        /// The OS has set CR4.PKE.
        OSPKE = 1 << 4;
        /// AVX-512 VBMI2.
        AVX512_VBMI2 = 1 << 6;
        /// Galois-field instructions.
        GFNI = 1 << 8;
        /// AES on vectors.
        VAES = 1 << 9;
        /// PCLMULQDQ on vectors.
        VPCLMULQDQ = 1 << 10;
        /// AVX-512 VNNI.
        AVX512_VNNI = 1 << 11;
        /// AVX-512 BITALG.
        AVX512_BITALG = 1 << 12;
        /// AVX-512 VPOPCNTDQ.
        AVX512_VPOPCNTDQ = 1 << 14;
        /// 57-bit linear addresses.
        LA57 = 1 << 16;
        /// RDPID.
        RDPID = 1 << 22;
        /// CLDEMOTE.
        CLDEMOTE = 1 << 25;
        /// MOVDIRI.
        MOVDIRI = 1 << 27;
        /// MOVDIR64B.
        MOVDIR64B = 1 << 28;
    }
}

impl Leaf7Ecx {
    /// All of AVX-512 in this word.
    pub const AVX512: Self = Self::new(
        Self::AVX512_VBMI.bits()
            | Self::AVX512_VBMI2.bits()
            | Self::AVX512_VNNI.bits()
            | Self::AVX512_BITALG.bits()
            | Self::AVX512_VPOPCNTDQ.bits(),
    );
}

bit_flags! {
    /// Leaf 7, EDX.
    pub struct Leaf7Edx(u32) {
        /// AVX-512 4VNNIW.
        AVX512_4VNNIW = 1 << 2;
        /// AVX-512 4FMAPS.
        AVX512_4FMAPS = 1 << 3;
        /// Fast short REP MOVSB.
        FSRM = 1 << 4;
        /// AVX-512 VP2INTERSECT.
        AVX512_VP2INTERSECT = 1 << 8;
        /// VERW clears buffers.
        MD_CLEAR = 1 << 10;
        /// SERIALIZE.
        SERIALIZE = 1 << 14;
        /// AVX-512 FP16.
        AVX512_FP16 = 1 << 23;
        /// IBRS and IBPB.
        SPEC_CTRL = 1 << 26;
        /// STIBP.
        STIBP = 1 << 27;
        /// IA32_FLUSH_CMD.
        FLUSH_L1D = 1 << 28;
        /// IA32_ARCH_CAPABILITIES.
        ARCH_CAPABILITIES = 1 << 29;
        /// SSBD.
        SSBD = 1 << 31;
    }
}

impl Leaf7Edx {
    /// All of AVX-512 in this word.
    pub const AVX512: Self = Self::new(
        Self::AVX512_4VNNIW.bits()
            | Self::AVX512_4FMAPS.bits()
            | Self::AVX512_VP2INTERSECT.bits()
            | Self::AVX512_FP16.bits(),
    );
    /// The features that live in IA32_SPEC_CTRL and IA32_PRED_CMD.
    pub const SPECULATION: Self =
        Self::new(Self::SPEC_CTRL.bits() | Self::STIBP.bits() | Self::SSBD.bits());
}

bit_flags! {
    /// Leaf 7, subleaf 1, EAX.
    pub struct Leaf7s1Eax(u32) {
        /// SHA512.
        SHA512 = 1 << 0;
        /// SM3.
        SM3 = 1 << 1;
        /// SM4.
        SM4 = 1 << 2;
        /// AVX VNNI.
        AVX_VNNI = 1 << 4;
        /// AVX-512 BF16.
        AVX512_BF16 = 1 << 5;
        /// CMPccXADD.
        CMPCCXADD = 1 << 7;
        /// Fast zero-length REP MOVSB.
        FZRM = 1 << 10;
        /// Fast short REP STOSB.
        FSRS = 1 << 11;
        /// Fast short REP CMPSB.
        FSRC = 1 << 12;
        /// AVX IFMA.
        AVX_IFMA = 1 << 23;
    }
}

impl Leaf7s1Eax {
    /// What needs AVX state.
    pub const AVX: Self = Self::new(
        Self::SHA512.bits()
            | Self::SM3.bits()
            | Self::SM4.bits()
            | Self::AVX_VNNI.bits()
            | Self::AVX_IFMA.bits(),
    );
}

bit_flags! {
    /// Leaf 7, subleaf 1, EDX.
    pub struct Leaf7s1Edx(u32) {
        /// AVX VNNI of bytes.
        AVX_VNNI_INT8 = 1 << 4;
        /// AVX conversions without exceptions.
        AVX_NE_CONVERT = 1 << 5;
        /// AVX VNNI of words.
        AVX_VNNI_INT16 = 1 << 10;
        /// Prefetch of code.
        PREFETCHITI = 1 << 14;
    }
}

impl Leaf7s1Edx {
    /// What needs AVX state.
    pub const AVX: Self = Self::new(
        Self::AVX_VNNI_INT8.bits() | Self::AVX_NE_CONVERT.bits() | Self::AVX_VNNI_INT16.bits(),
    );
}

bit_flags! {
    /// Leaf 0xd, subleaf 1, EAX.
    pub struct LeafDs1Eax(u32) {
        /// XSAVEOPT.
        XSAVEOPT = 1 << 0;
        /// XSAVEC.
        XSAVEC = 1 << 1;
        /// XGETBV of the components in use.
        XGETBV1 = 1 << 2;
        /// XSAVES, and IA32_XSS.
        XSAVES = 1 << 3;
    }
}

bit_flags! {
    /// Leaf 0x80000001, ECX.
    pub struct Ext1Ecx(u32) {
        /// LAHF in 64-bit mode.
        LAHF_LM = 1 << 0;
        /// AMD: SVM.
        SVM = 1 << 2;
        /// AMD: CR8 outside 64-bit mode.
        CR8_LEGACY = 1 << 4;
        /// LZCNT.
        LZCNT = 1 << 5;
        /// AMD: SSE4a.
        SSE4A = 1 << 6;
        /// AMD: SSE without alignment.
        MISALIGNSSE = 1 << 7;
        /// PREFETCHW.
        PREFETCHW = 1 << 8;
    }
}

bit_flags! {
    /// Leaf 0x80000001, EDX, but for what AMD repeats from leaf 1.
    pub struct Ext1Edx(u32) {
        /// SYSCALL.
        SYSCALL = 1 << 11;
        /// Execute-disable pages.
        NX = 1 << 20;
        /// AMD: MMX extensions.
        MMXEXT = 1 << 22;
        /// AMD: fast FXSAVE.
        FXSR_OPT = 1 << 25;
        /// 1 GiB pages.
        GBPAGES = 1 << 26;
        /// RDTSCP.
        RDTSCP = 1 << 27;
        /// Long mode.
        LM = 1 << 29;
    }
}

bit_flags! {
    /// Leaf 0x80000007, EDX.
    pub struct Ext7Edx(u32) {
        /// The TSC has a constant rate in all states.
        INVARIANT_TSC = 1 << 8;
    }
}

bit_flags! {
    /// Leaf 0x80000008, EBX: all of AMD, and some that Intel has taken over.
    pub struct Ext8Ebx(u32) {
        /// CLZERO.
        CLZERO = 1 << 0;
        /// XSAVE keeps error pointers.
        XSAVEERPTR = 1 << 2;
        /// WBNOINVD.
        WBNOINVD = 1 << 9;
        /// IBPB, in IA32_PRED_CMD.
        IBPB = 1 << 12;
        /// IBRS, in IA32_SPEC_CTRL.
        IBRS = 1 << 14;
        /// STIBP, in IA32_SPEC_CTRL.
        STIBP = 1 << 15;
        /// SSBD, in IA32_SPEC_CTRL.
        SSBD = 1 << 24;
    }
}

impl Ext8Ebx {
    /// What is reported if the host has it here.
    pub const OWN: Self =
        Self::new(Self::CLZERO.bits() | Self::XSAVEERPTR.bits() | Self::WBNOINVD.bits());
    /// The features that live in IA32_SPEC_CTRL and IA32_PRED_CMD.
    pub const SPECULATION: Self =
        Self::new(Self::IBPB.bits() | Self::IBRS.bits() | Self::STIBP.bits() | Self::SSBD.bits());

    /// AMD's names for what Intel's leaf 7 has, for guests that know those alone.
    #[must_use]
    pub const fn of_leaf7(edx: Leaf7Edx) -> Self {
        Self::empty()
            .with_if(
                Self::new(Self::IBPB.bits() | Self::IBRS.bits()),
                edx.has(Leaf7Edx::SPEC_CTRL),
            )
            .with_if(Self::STIBP, edx.has(Leaf7Edx::STIBP))
            .with_if(Self::SSBD, edx.has(Leaf7Edx::SSBD))
    }
}
