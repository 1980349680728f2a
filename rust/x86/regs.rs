// SPDX-License-Identifier: GPL-2.0

//! Registers: the general ones, RFLAGS, control and debug registers, EFER, XCR0.
//!
//! The types hold whatever a guest or a VMM put into them. Whether a value may be loaded is decided in
//! [`cr`](super::cr).

use super::bits::bit_flags;

/// A general register, with the number that instructions encode it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Gpr {
    /// RAX, the accumulator.
    Rax = 0,
    /// RCX, the count.
    Rcx = 1,
    /// RDX, the data register (I/O port, high half of products).
    Rdx = 2,
    /// RBX, the base.
    Rbx = 3,
    /// RSP, the stack pointer.
    Rsp = 4,
    /// RBP, the frame pointer.
    Rbp = 5,
    /// RSI, the source of string instructions.
    Rsi = 6,
    /// RDI, the destination of string instructions.
    Rdi = 7,
    /// R8.
    R8 = 8,
    /// R9.
    R9 = 9,
    /// R10.
    R10 = 10,
    /// R11.
    R11 = 11,
    /// R12.
    R12 = 12,
    /// R13.
    R13 = 13,
    /// R14.
    R14 = 14,
    /// R15.
    R15 = 15,
}

impl Gpr {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The register with the number in the low four bits of `number`.
    #[inline]
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        Self::ALL[(number & 15) as usize]
    }

    /// The number of the register, 0 to 15.
    #[inline]
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// The sixteen general registers, in the order of their numbers.
///
/// The layout is that of `[u64; 16]`: entry code may store into it by [`Gpr::number`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Gprs([u64; 16]);

impl Gprs {
    /// All zero, as a processor has them after INIT (but for RDX).
    #[must_use]
    pub const fn new() -> Self {
        Self([0; 16])
    }

    /// The value of a register.
    #[inline]
    #[must_use]
    pub const fn get(&self, r: Gpr) -> u64 {
        self.0[(r as u8 & 15) as usize]
    }

    /// Sets a register.
    #[inline]
    pub fn set(&mut self, r: Gpr, value: u64) {
        self.0[(r as u8 & 15) as usize] = value;
    }

    /// All the registers, by number.
    #[inline]
    #[must_use]
    pub const fn as_array(&self) -> &[u64; 16] {
        &self.0
    }

    /// All the registers, by number, to be written.
    #[inline]
    pub fn as_mut_array(&mut self) -> &mut [u64; 16] {
        &mut self.0
    }
}

bit_flags! {
    /// RFLAGS (SDM vol. 1, 3.4.3).
    pub struct Rflags(u64) {
        /// Carry.
        CF = 1 << 0;
        /// Always one.
        FIXED = 1 << 1;
        /// Parity of the low byte of the result.
        PF = 1 << 2;
        /// Carry out of bit 3.
        AF = 1 << 4;
        /// Zero result.
        ZF = 1 << 6;
        /// Sign of the result.
        SF = 1 << 7;
        /// Single-step trap.
        TF = 1 << 8;
        /// Maskable interrupts enabled.
        IF = 1 << 9;
        /// Direction: string instructions go down.
        DF = 1 << 10;
        /// Signed overflow.
        OF = 1 << 11;
        /// I/O privilege level, both bits.
        IOPL = 3 << 12;
        /// Nested task.
        NT = 1 << 14;
        /// Resume: instruction breakpoints are ignored for one instruction.
        RF = 1 << 16;
        /// Virtual-8086 mode.
        VM = 1 << 17;
        /// Alignment check, and the override of SMAP.
        AC = 1 << 18;
        /// Virtual interrupt flag.
        VIF = 1 << 19;
        /// Virtual interrupt pending.
        VIP = 1 << 20;
        /// CPUID is available.
        ID = 1 << 21;
    }
}

impl Rflags {
    /// The six flags that arithmetic sets.
    pub const STATUS: Self =
        Self(Self::CF.0 | Self::PF.0 | Self::AF.0 | Self::ZF.0 | Self::SF.0 | Self::OF.0);

    /// The I/O privilege level, 0 to 3.
    #[inline]
    #[must_use]
    pub const fn iopl(self) -> u8 {
        ((self.0 >> 12) & 3) as u8
    }
}

bit_flags! {
    /// CR0 (SDM vol. 3, 2.5).
    pub struct Cr0(u64) {
        /// Protection enabled.
        PE = 1 << 0;
        /// Monitor coprocessor.
        MP = 1 << 1;
        /// No x87: its instructions trap.
        EM = 1 << 2;
        /// Task switched: x87 and SSE instructions trap.
        TS = 1 << 3;
        /// Extension type, always one.
        ET = 1 << 4;
        /// x87 errors are exceptions.
        NE = 1 << 5;
        /// Supervisor writes heed read-only pages.
        WP = 1 << 16;
        /// Alignment checks at CPL 3.
        AM = 1 << 18;
        /// Not write-through.
        NW = 1 << 29;
        /// Cache disable.
        CD = 1 << 30;
        /// Paging.
        PG = 1 << 31;
    }
}

bit_flags! {
    /// CR4 (SDM vol. 3, 2.5).
    pub struct Cr4(u64) {
        /// Virtual-8086 extensions.
        VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        PVI = 1 << 1;
        /// RDTSC at CPL 0 only.
        TSD = 1 << 2;
        /// Debug extensions: DR4 and DR5 do not exist.
        DE = 1 << 3;
        /// 4 MiB pages in 32-bit paging.
        PSE = 1 << 4;
        /// Physical-address extension.
        PAE = 1 << 5;
        /// Machine-check exceptions.
        MCE = 1 << 6;
        /// Global pages.
        PGE = 1 << 7;
        /// RDPMC at any CPL.
        PCE = 1 << 8;
        /// The OS uses FXSAVE.
        OSFXSR = 1 << 9;
        /// The OS handles SIMD exceptions.
        OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        UMIP = 1 << 11;
        /// 57-bit linear addresses.
        LA57 = 1 << 12;
        /// VMX enabled.
        VMXE = 1 << 13;
        /// SMX enabled.
        SMXE = 1 << 14;
        /// RDFSBASE and its siblings.
        FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        PCIDE = 1 << 17;
        /// The OS uses XSAVE.
        OSXSAVE = 1 << 18;
        /// Supervisor-mode execution prevention.
        SMEP = 1 << 20;
        /// Supervisor-mode access prevention.
        SMAP = 1 << 21;
        /// Protection keys for user pages.
        PKE = 1 << 22;
        /// Control-flow enforcement.
        CET = 1 << 23;
        /// Protection keys for supervisor pages.
        PKS = 1 << 24;
        /// User interrupts.
        UINTR = 1 << 25;
        /// Linear-address masking for supervisor pointers.
        LAM_SUP = 1 << 28;
    }
}

bit_flags! {
    /// IA32_EFER (SDM vol. 3, 2.2.1).
    pub struct Efer(u64) {
        /// SYSCALL and SYSRET.
        SCE = 1 << 0;
        /// Long mode enabled.
        LME = 1 << 8;
        /// Long mode active.
        LMA = 1 << 10;
        /// Execute-disable pages.
        NXE = 1 << 11;
        /// AMD: SVM enabled.
        SVME = 1 << 12;
        /// AMD: limits of long-mode segments.
        LMSLE = 1 << 13;
        /// AMD: fast FXSAVE.
        FFXSR = 1 << 14;
    }
}

bit_flags! {
    /// XCR0: the state components that XSAVE handles (SDM vol. 1, 13.3).
    pub struct Xcr0(u64) {
        /// x87, always enabled.
        X87 = 1 << 0;
        /// XMM registers and MXCSR.
        SSE = 1 << 1;
        /// Upper halves of the YMM registers.
        AVX = 1 << 2;
        /// MPX bound registers.
        BNDREGS = 1 << 3;
        /// MPX configuration.
        BNDCSR = 1 << 4;
        /// AVX-512 mask registers.
        OPMASK = 1 << 5;
        /// Upper halves of ZMM0 to ZMM15.
        ZMM_HI256 = 1 << 6;
        /// ZMM16 to ZMM31.
        HI16_ZMM = 1 << 7;
        /// PKRU.
        PKRU = 1 << 9;
        /// AMX tile configuration.
        XTILECFG = 1 << 17;
        /// AMX tiles.
        XTILEDATA = 1 << 18;
    }
}

impl Xcr0 {
    /// The three components of AVX-512, enabled together or not at all.
    pub const AVX512: Self = Self(Self::OPMASK.0 | Self::ZMM_HI256.0 | Self::HI16_ZMM.0);
    /// Both components of MPX.
    pub const MPX: Self = Self(Self::BNDREGS.0 | Self::BNDCSR.0);
    /// Both components of AMX.
    pub const AMX: Self = Self(Self::XTILECFG.0 | Self::XTILEDATA.0);
}

bit_flags! {
    /// DR6, the debug status (SDM vol. 3, 19.2.3).
    pub struct Dr6(u64) {
        /// Breakpoint 0 hit.
        B0 = 1 << 0;
        /// Breakpoint 1 hit.
        B1 = 1 << 1;
        /// Breakpoint 2 hit.
        B2 = 1 << 2;
        /// Breakpoint 3 hit.
        B3 = 1 << 3;
        /// Bus lock, active low.
        BLD = 1 << 11;
        /// A debug register was accessed while DR7.GD was set.
        BD = 1 << 13;
        /// Single step.
        BS = 1 << 14;
        /// Task switch.
        BT = 1 << 15;
        /// Restricted transactional memory, active low.
        RTM = 1 << 16;
    }
}

impl Dr6 {
    /// The value after reset: the bits that always read as one, and the active-low ones.
    pub const RESET: Self = Self(0xffff_0ff0);
    /// The four breakpoint bits.
    pub const TRAPS: Self = Self(15);
    /// Bits that a write can change on a processor without RTM and bus-lock detection.
    pub const WRITABLE: Self = Self(Self::TRAPS.0 | Self::BD.0 | Self::BS.0 | Self::BT.0);

    /// The value a processor keeps when this one is written: reserved bits take their fixed values.
    #[inline]
    #[must_use]
    pub const fn sanitized(self) -> Self {
        Self(self.0 & Self::WRITABLE.0 | Self::RESET.0)
    }
}

bit_flags! {
    /// DR7, the debug control (SDM vol. 3, 19.2.4).
    pub struct Dr7(u64) {
        /// The four local and four global breakpoint enables.
        ENABLES = 0xff;
        /// What a task switch clears: the local enables, and `LE`.
        LOCAL = 0x155;
        /// Exact local breakpoints.
        LE = 1 << 8;
        /// Exact global breakpoints.
        GE = 1 << 9;
        /// Always one.
        FIXED = 1 << 10;
        /// RTM debugging.
        RTM = 1 << 11;
        /// Accesses to debug registers trap.
        GD = 1 << 13;
    }
}

impl Dr7 {
    /// The value after reset.
    pub const RESET: Self = Self::FIXED;
    /// Bits that a write can change on a processor without RTM.
    pub const WRITABLE: Self = Self(0xffff_23ff);

    /// The value a processor keeps when this one is written.
    #[inline]
    #[must_use]
    pub const fn sanitized(self) -> Self {
        Self(self.0 & Self::WRITABLE.0 | Self::FIXED.0)
    }

    /// Whether any breakpoint is enabled.
    #[inline]
    #[must_use]
    pub const fn any_enabled(self) -> bool {
        self.0 & Self::ENABLES.0 != 0
    }
}

/// CR3: the root of the page tables, and the process-context identifier or cache bits below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Cr3(u64);

impl Cr3 {
    /// With CR4.PCIDE, bit 63 of the operand of MOV to CR3: keep the TLB entries of the identifier.
    pub const NOFLUSH: u64 = 1 << 63;

    /// The register with these raw bits.
    #[inline]
    #[must_use]
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// The raw bits.
    #[inline]
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The root table of 32-bit, 4-level and 5-level paging: a guest-physical address.
    #[inline]
    #[must_use]
    pub const fn root(self) -> u64 {
        self.0 & 0x000f_ffff_ffff_f000
    }

    /// The table of four entries of PAE paging: a guest-physical address, 32-byte aligned.
    #[inline]
    #[must_use]
    pub const fn pae_root(self) -> u64 {
        self.0 & 0xffff_ffe0
    }

    /// The process-context identifier, meaningful with CR4.PCIDE.
    #[inline]
    #[must_use]
    pub const fn pcid(self) -> u16 {
        (self.0 & 0xfff) as u16
    }
}
