// SPDX-License-Identifier: GPL-2.0

//! The fields of a VMCS and the words that they hold (SDM vol. 3, chapter 25 and appendix B).

use crate::x86::bits::bit_flags;
use core::marker::PhantomData;

/// A width that a field can have.
pub(crate) trait Width: Copy {
    /// To the operand of VMWRITE.
    fn to_raw(self) -> u64;
    /// From the operand of VMREAD: the upper bits are zero for the narrower fields.
    fn from_raw(raw: u64) -> Self;
}

macro_rules! widths {
    ($($ty:ty),*) => { $(
        impl Width for $ty {
            #[inline]
            // `u64` is one of the types, and to it `From` would be a useless conversion.
            #[allow(clippy::cast_lossless)]
            fn to_raw(self) -> u64 {
                self as u64
            }

            #[inline]
            fn from_raw(raw: u64) -> Self {
                raw as $ty
            }
        }
    )* };
}
widths!(u16, u32, u64);

/// A VMCS field: its encoding, with the width as a type.
#[derive(Clone, Copy)]
pub(crate) struct Field<T: Width>(u32, PhantomData<T>);

impl<T: Width> Field<T> {
    const fn new(encoding: u32) -> Self {
        Self(encoding, PhantomData)
    }

    /// The encoding, as VMREAD and VMWRITE take it.
    #[inline]
    pub(crate) const fn encoding(self) -> u64 {
        self.0 as u64
    }
}

macro_rules! fields {
    ($($name:ident: $ty:ty = $encoding:expr;)*) => {
        $( pub(crate) const $name: Field<$ty> = Field::new($encoding); )*
    };
}

// Natural-width fields are u64 here: the host is always in 64-bit mode.
fields! {
    VPID: u16 = 0x0000;
    POSTED_NOTIFICATION_VECTOR: u16 = 0x0002;
    GUEST_INTERRUPT_STATUS: u16 = 0x0810;
    PML_INDEX: u16 = 0x0812;
    HOST_ES: u16 = 0x0c00;
    HOST_CS: u16 = 0x0c02;
    HOST_SS: u16 = 0x0c04;
    HOST_DS: u16 = 0x0c06;
    HOST_FS: u16 = 0x0c08;
    HOST_GS: u16 = 0x0c0a;
    HOST_TR: u16 = 0x0c0c;

    MSR_BITMAP: u64 = 0x2004;
    EXIT_MSR_STORE_ADDRESS: u64 = 0x2006;
    EXIT_MSR_LOAD_ADDRESS: u64 = 0x2008;
    ENTRY_MSR_LOAD_ADDRESS: u64 = 0x200a;
    PML_ADDRESS: u64 = 0x200e;
    TSC_OFFSET: u64 = 0x2010;
    VIRTUAL_APIC_ADDRESS: u64 = 0x2012;
    APIC_ACCESS_ADDRESS: u64 = 0x2014;
    POSTED_DESCRIPTOR_ADDRESS: u64 = 0x2016;
    EPT_POINTER: u64 = 0x201a;
    XSS_EXITING_BITMAP: u64 = 0x202c;
    ENCLS_EXITING_BITMAP: u64 = 0x202e;
    TSC_MULTIPLIER: u64 = 0x2032;
    GUEST_PHYSICAL_ADDRESS: u64 = 0x2400;
    VMCS_LINK_POINTER: u64 = 0x2800;
    GUEST_DEBUGCTL: u64 = 0x2802;
    GUEST_PAT: u64 = 0x2804;
    GUEST_EFER: u64 = 0x2806;
    GUEST_PDPTE0: u64 = 0x280a;
    GUEST_PDPTE1: u64 = 0x280c;
    GUEST_PDPTE2: u64 = 0x280e;
    GUEST_PDPTE3: u64 = 0x2810;
    HOST_PAT: u64 = 0x2c00;
    HOST_EFER: u64 = 0x2c02;

    PIN_CONTROLS: u32 = 0x4000;
    PRIMARY_CONTROLS: u32 = 0x4002;
    EXCEPTION_BITMAP: u32 = 0x4004;
    PAGE_FAULT_ERROR_MASK: u32 = 0x4006;
    PAGE_FAULT_ERROR_MATCH: u32 = 0x4008;
    CR3_TARGET_COUNT: u32 = 0x400a;
    EXIT_CONTROLS: u32 = 0x400c;
    EXIT_MSR_STORE_COUNT: u32 = 0x400e;
    EXIT_MSR_LOAD_COUNT: u32 = 0x4010;
    ENTRY_CONTROLS: u32 = 0x4012;
    ENTRY_MSR_LOAD_COUNT: u32 = 0x4014;
    ENTRY_INTR_INFO: u32 = 0x4016;
    ENTRY_ERROR_CODE: u32 = 0x4018;
    ENTRY_INSTRUCTION_LENGTH: u32 = 0x401a;
    TPR_THRESHOLD: u32 = 0x401c;
    SECONDARY_CONTROLS: u32 = 0x401e;
    PLE_GAP: u32 = 0x4020;
    PLE_WINDOW: u32 = 0x4022;
    INSTRUCTION_ERROR: u32 = 0x4400;
    EXIT_INTR_INFO: u32 = 0x4404;
    EXIT_ERROR_CODE: u32 = 0x4406;
    IDT_VECTORING_INFO: u32 = 0x4408;
    IDT_VECTORING_ERROR_CODE: u32 = 0x440a;
    EXIT_INSTRUCTION_LENGTH: u32 = 0x440c;
    EXIT_INSTRUCTION_INFO: u32 = 0x440e;
    GUEST_GDTR_LIMIT: u32 = 0x4810;
    GUEST_IDTR_LIMIT: u32 = 0x4812;
    GUEST_INTERRUPTIBILITY: u32 = 0x4824;
    GUEST_ACTIVITY: u32 = 0x4826;
    GUEST_SYSENTER_CS: u32 = 0x482a;
    PREEMPTION_TIMER_VALUE: u32 = 0x482e;
    HOST_SYSENTER_CS: u32 = 0x4c00;

    CR0_MASK: u64 = 0x6000;
    CR4_MASK: u64 = 0x6002;
    CR0_SHADOW: u64 = 0x6004;
    CR4_SHADOW: u64 = 0x6006;
    EXIT_QUALIFICATION: u64 = 0x6400;
    GUEST_LINEAR_ADDRESS: u64 = 0x640a;
    GUEST_CR0: u64 = 0x6800;
    GUEST_CR3: u64 = 0x6802;
    GUEST_CR4: u64 = 0x6804;
    GUEST_GDTR_BASE: u64 = 0x6816;
    GUEST_IDTR_BASE: u64 = 0x6818;
    GUEST_DR7: u64 = 0x681a;
    GUEST_RSP: u64 = 0x681c;
    GUEST_RIP: u64 = 0x681e;
    GUEST_RFLAGS: u64 = 0x6820;
    GUEST_PENDING_DEBUG: u64 = 0x6822;
    GUEST_SYSENTER_ESP: u64 = 0x6824;
    GUEST_SYSENTER_EIP: u64 = 0x6826;
    HOST_CR0: u64 = 0x6c00;
    HOST_CR3: u64 = 0x6c02;
    HOST_CR4: u64 = 0x6c04;
    HOST_FS_BASE: u64 = 0x6c06;
    HOST_GS_BASE: u64 = 0x6c08;
    HOST_TR_BASE: u64 = 0x6c0a;
    HOST_GDTR_BASE: u64 = 0x6c0c;
    HOST_IDTR_BASE: u64 = 0x6c0e;
    HOST_SYSENTER_ESP: u64 = 0x6c10;
    HOST_SYSENTER_EIP: u64 = 0x6c12;
    HOST_RIP: u64 = 0x6c16;
}

/// The vectors whose end exits, 64 in each.
pub(crate) const EOI_EXIT_BITMAPS: [Field<u64>; 4] = [
    Field::new(0x201c),
    Field::new(0x201e),
    Field::new(0x2020),
    Field::new(0x2022),
];

/// The four fields of a guest's segment register, in the order of [`crate::x86::segment::SegReg`].
#[derive(Clone, Copy)]
pub(crate) struct SegmentFields {
    /// Selector.
    pub(crate) selector: Field<u16>,
    /// Base.
    pub(crate) base: Field<u64>,
    /// Limit in bytes.
    pub(crate) limit: Field<u32>,
    /// Access rights.
    pub(crate) attr: Field<u32>,
}

impl SegmentFields {
    /// The fields of the segment register with the given number (ES, CS, SS, DS, FS, GS, LDTR, TR).
    #[inline]
    pub(crate) const fn of(seg: crate::x86::segment::SegReg) -> Self {
        let n = seg.number() as u32 * 2;
        Self {
            selector: Field::new(0x0800 + n),
            base: Field::new(0x6806 + n),
            limit: Field::new(0x4800 + n),
            attr: Field::new(0x4814 + n),
        }
    }
}

bit_flags! {
    /// Pin-based controls (SDM vol. 3, 25.6.1).
    pub(crate) struct PinControls(u32) {
        /// External interrupts exit.
        EXTERNAL_INTERRUPT = 1 << 0;
        /// NMIs exit.
        NMI = 1 << 3;
        /// The guest's own NMI blocking is tracked.
        VIRTUAL_NMIS = 1 << 5;
        /// The preemption timer counts.
        PREEMPTION_TIMER = 1 << 6;
        /// Posted interrupts are taken while the guest runs.
        POSTED_INTERRUPTS = 1 << 7;
    }
}

bit_flags! {
    /// Primary processor-based controls (SDM vol. 3, 25.6.2).
    pub(crate) struct PrimaryControls(u32) {
        /// Exit as soon as an interrupt could be taken.
        INTERRUPT_WINDOW = 1 << 2;
        /// RDTSC adds the TSC offset.
        TSC_OFFSETTING = 1 << 3;
        /// HLT exits.
        HLT = 1 << 7;
        /// INVLPG exits.
        INVLPG = 1 << 9;
        /// MWAIT exits.
        MWAIT = 1 << 10;
        /// RDPMC exits.
        RDPMC = 1 << 11;
        /// RDTSC exits.
        RDTSC = 1 << 12;
        /// MOV to CR3 exits.
        CR3_LOAD = 1 << 15;
        /// MOV from CR3 exits.
        CR3_STORE = 1 << 16;
        /// MOV to CR8 exits.
        CR8_LOAD = 1 << 19;
        /// MOV from CR8 exits.
        CR8_STORE = 1 << 20;
        /// CR8 is the priority in the virtual-APIC page.
        TPR_SHADOW = 1 << 21;
        /// Exit as soon as an NMI could be taken.
        NMI_WINDOW = 1 << 22;
        /// MOV to and from debug registers exits.
        MOV_DR = 1 << 23;
        /// Every I/O instruction exits.
        UNCONDITIONAL_IO = 1 << 24;
        /// The MSR bitmap says which accesses exit.
        MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        MONITOR = 1 << 29;
        /// PAUSE exits.
        PAUSE = 1 << 30;
        /// The secondary controls count.
        SECONDARY = 1 << 31;
    }
}

bit_flags! {
    /// Secondary processor-based controls (SDM vol. 3, 25.6.2).
    pub(crate) struct SecondaryControls(u32) {
        /// Accesses to the APIC-access page are taken for ones of the virtual APIC.
        APIC_ACCESSES = 1 << 0;
        /// Extended page tables.
        EPT = 1 << 1;
        /// RDTSCP does not fault.
        RDTSCP = 1 << 3;
        /// RDMSR and WRMSR of x2APIC registers go to the virtual-APIC page.
        X2APIC = 1 << 4;
        /// TLB entries carry the VPID.
        VPID = 1 << 5;
        /// WBINVD exits.
        WBINVD = 1 << 6;
        /// The guest may run unpaged and in real mode.
        UNRESTRICTED_GUEST = 1 << 7;
        /// Reads of the APIC are answered from the virtual-APIC page.
        APIC_REGISTERS = 1 << 8;
        /// The processor delivers the virtual APIC's interrupts.
        INTERRUPT_DELIVERY = 1 << 9;
        /// PAUSE exits if it is executed in a loop.
        PAUSE_LOOP = 1 << 10;
        /// RDRAND exits.
        RDRAND = 1 << 11;
        /// INVPCID does not fault.
        INVPCID = 1 << 12;
        /// ENCLS exits by a bitmap.
        ENCLS = 1 << 15;
        /// RDSEED exits.
        RDSEED = 1 << 16;
        /// Pages whose EPT dirty flag is set are logged.
        PML = 1 << 17;
        /// XSAVES and XRSTORS do not fault.
        XSAVES = 1 << 20;
        /// RDTSC multiplies the counter, before it adds the TSC offset.
        TSC_SCALING = 1 << 25;
        /// TPAUSE, UMONITOR and UMWAIT do not fault.
        USER_WAIT = 1 << 26;
    }
}

bit_flags! {
    /// VM-exit controls (SDM vol. 3, 25.7.1).
    pub(crate) struct ExitControls(u32) {
        /// DR7 and DEBUGCTL are saved.
        SAVE_DEBUG = 1 << 2;
        /// The host is in 64-bit mode.
        HOST_64 = 1 << 9;
        /// An external interrupt is acknowledged by the exit.
        ACK_INTERRUPT = 1 << 15;
        /// PAT is loaded.
        LOAD_PAT = 1 << 19;
        /// EFER is saved.
        SAVE_EFER = 1 << 20;
        /// EFER is loaded.
        LOAD_EFER = 1 << 21;
    }
}

bit_flags! {
    /// VM-entry controls (SDM vol. 3, 25.8.1).
    pub(crate) struct EntryControls(u32) {
        /// DR7 and DEBUGCTL are loaded.
        LOAD_DEBUG = 1 << 2;
        /// The guest is in IA-32e mode.
        IA32E = 1 << 9;
        /// PAT is loaded.
        LOAD_PAT = 1 << 14;
        /// EFER is loaded.
        LOAD_EFER = 1 << 15;
    }
}

bit_flags! {
    /// Interruptibility state of the guest (SDM vol. 3, table 25-3).
    pub(crate) struct Interruptibility(u32) {
        /// The instruction after STI.
        STI = 1 << 0;
        /// The instruction after a load of SS.
        MOV_SS = 1 << 1;
        /// In system-management mode.
        SMI = 1 << 2;
        /// NMIs are blocked.
        NMI = 1 << 3;
    }
}

/// Interruption information: the same format for entry, exit and IDT vectoring (SDM vol. 3, 25.8.3,
/// 25.9.2 and 25.9.3).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct IntrInfo(u32);

impl IntrInfo {
    const ERROR_CODE: u32 = 1 << 11;
    const NMI_UNBLOCKED: u32 = 1 << 12;
    const VALID: u32 = 1 << 31;

    /// As read from a field.
    #[inline]
    pub(crate) const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// For the entry field: a valid event.
    #[inline]
    pub(crate) const fn event(kind: IntrKind, vector: u8, error_code: bool) -> Self {
        let error = if error_code { Self::ERROR_CODE } else { 0 };
        Self(Self::VALID | error | (kind as u32) << 8 | vector as u32)
    }

    /// The raw word.
    #[inline]
    pub(crate) const fn bits(self) -> u32 {
        self.0
    }

    /// Whether there is an event.
    #[inline]
    pub(crate) const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// The vector.
    #[inline]
    pub(crate) const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// What kind of event; a reserved code reads as an external interrupt never would.
    #[inline]
    pub(crate) const fn kind(self) -> IntrKind {
        match (self.0 >> 8) & 7 {
            0 => IntrKind::External,
            2 => IntrKind::Nmi,
            3 => IntrKind::HardException,
            4 => IntrKind::SoftInterrupt,
            5 => IntrKind::PrivilegedSoftException,
            6 => IntrKind::SoftException,
            _ => IntrKind::Other,
        }
    }

    /// Whether there is an error code.
    #[inline]
    pub(crate) const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    /// On exit: the fault was of an IRET that had already unblocked NMIs.
    #[inline]
    pub(crate) const fn nmi_unblocked(self) -> bool {
        self.0 & Self::NMI_UNBLOCKED != 0
    }
}

/// The kinds of event.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum IntrKind {
    /// External interrupt.
    External = 0,
    /// NMI.
    Nmi = 2,
    /// Hardware exception.
    HardException = 3,
    /// INT n.
    SoftInterrupt = 4,
    /// INT1.
    PrivilegedSoftException = 5,
    /// INT3, INTO.
    SoftException = 6,
    /// An event that is none.
    Other = 7,
}
