// SPDX-License-Identifier: GPL-2.0

//! Segments, the mode a processor is in, and how an offset in a segment becomes a linear address.

use super::exception::Fault;
use super::regs::Cr0;
use super::regs::Efer;
use super::regs::Rflags;

/// A segment register. The numbers are those of instruction encodings, and the order is that of the VMCS fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SegReg {
    /// ES.
    Es = 0,
    /// CS, the code segment.
    Cs = 1,
    /// SS, the stack segment.
    Ss = 2,
    /// DS, the data segment.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
    /// The local descriptor table.
    Ldtr = 6,
    /// The task register.
    Tr = 7,
}

impl SegReg {
    /// All eight, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Es,
        Self::Cs,
        Self::Ss,
        Self::Ds,
        Self::Fs,
        Self::Gs,
        Self::Ldtr,
        Self::Tr,
    ];

    /// The number, 0 to 7.
    #[inline]
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// The attributes of a segment, in the format of the access-rights fields of a VMCS (SDM vol. 3, 26.4.1).
///
/// # Invariants
///
/// Bits that the format reserves are clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct SegAttr(u32);

impl SegAttr {
    /// The bits of the format that mean something.
    const DEFINED: u32 = 0x1_f0ff;
    const S: u32 = 1 << 4;
    const P: u32 = 1 << 7;
    const AVL: u32 = 1 << 12;
    const L: u32 = 1 << 13;
    const DB: u32 = 1 << 14;
    const G: u32 = 1 << 15;
    const UNUSABLE: u32 = 1 << 16;

    /// A segment into which a null selector was loaded.
    pub const NULL: Self = Self(Self::UNUSABLE);
    /// The data and code segments of real mode: present, writable, accessed.
    pub const REAL_MODE: Self = Self(Self::P | Self::S | 3);
    /// The code segment after reset: present, readable, accessed.
    pub const RESET_CODE: Self = Self(Self::P | Self::S | 0xb);
    /// LDTR after reset.
    pub const RESET_LDT: Self = Self(Self::P | 2);
    /// TR after reset: a busy TSS.
    pub const RESET_TSS: Self = Self(Self::P | 0xb);

    /// From a VMCS field: reserved bits are dropped.
    #[inline]
    #[must_use]
    pub const fn from_vmx(access_rights: u32) -> Self {
        // INVARIANT: the mask clears what the format reserves.
        Self(access_rights & Self::DEFINED)
    }

    /// For a VMCS field.
    #[inline]
    #[must_use]
    pub const fn to_vmx(self) -> u32 {
        self.0
    }

    /// From the upper half of a descriptor in memory.
    #[inline]
    #[must_use]
    pub const fn from_descriptor_high(high: u32) -> Self {
        Self::from_vmx((high >> 8) & 0xf0ff)
    }

    /// The type field: for code and data bit 3 is code, bit 2 expand-down or conforming, bit 1 writable or readable,
    /// bit 0 accessed.
    #[inline]
    #[must_use]
    pub const fn type_(self) -> u8 {
        (self.0 & 15) as u8
    }

    /// Whether it is a code or data segment, not a system one.
    #[inline]
    #[must_use]
    pub const fn s(self) -> bool {
        self.0 & Self::S != 0
    }

    /// The privilege level.
    #[inline]
    #[must_use]
    pub const fn dpl(self) -> u8 {
        ((self.0 >> 5) & 3) as u8
    }

    /// Whether it is present.
    #[inline]
    #[must_use]
    pub const fn p(self) -> bool {
        self.0 & Self::P != 0
    }

    /// The bit left to software.
    #[inline]
    #[must_use]
    pub const fn avl(self) -> bool {
        self.0 & Self::AVL != 0
    }

    /// Whether it is a 64-bit code segment.
    #[inline]
    #[must_use]
    pub const fn l(self) -> bool {
        self.0 & Self::L != 0
    }

    /// Whether the default size is 32 bits.
    #[inline]
    #[must_use]
    pub const fn db(self) -> bool {
        self.0 & Self::DB != 0
    }

    /// Whether the limit was given in pages.
    #[inline]
    #[must_use]
    pub const fn g(self) -> bool {
        self.0 & Self::G != 0
    }

    /// Whether the segment cannot be used.
    #[inline]
    #[must_use]
    pub const fn unusable(self) -> bool {
        self.0 & Self::UNUSABLE != 0
    }

    /// Whether it is a code segment.
    #[inline]
    #[must_use]
    pub const fn is_code(self) -> bool {
        self.s() && self.type_() & 8 != 0
    }

    const fn set(self, bit: u32, on: bool) -> Self {
        if on {
            Self(self.0 | bit)
        } else {
            Self(self.0 & !bit)
        }
    }

    /// With this type field (the low four bits count).
    #[inline]
    #[must_use]
    pub const fn with_type(self, type_: u8) -> Self {
        Self(self.0 & !15 | (type_ & 15) as u32)
    }

    /// With the S bit so.
    #[inline]
    #[must_use]
    pub const fn with_s(self, on: bool) -> Self {
        self.set(Self::S, on)
    }

    /// With this privilege level (the low two bits count).
    #[inline]
    #[must_use]
    pub const fn with_dpl(self, dpl: u8) -> Self {
        Self(self.0 & !(3 << 5) | (((dpl & 3) as u32) << 5))
    }

    /// With the present bit so.
    #[inline]
    #[must_use]
    pub const fn with_p(self, on: bool) -> Self {
        self.set(Self::P, on)
    }

    /// With the software bit so.
    #[inline]
    #[must_use]
    pub const fn with_avl(self, on: bool) -> Self {
        self.set(Self::AVL, on)
    }

    /// With the 64-bit code bit so.
    #[inline]
    #[must_use]
    pub const fn with_l(self, on: bool) -> Self {
        self.set(Self::L, on)
    }

    /// With the default-size bit so.
    #[inline]
    #[must_use]
    pub const fn with_db(self, on: bool) -> Self {
        self.set(Self::DB, on)
    }

    /// With the granularity bit so.
    #[inline]
    #[must_use]
    pub const fn with_g(self, on: bool) -> Self {
        self.set(Self::G, on)
    }

    /// With the unusable bit so.
    #[inline]
    #[must_use]
    pub const fn with_unusable(self, on: bool) -> Self {
        self.set(Self::UNUSABLE, on)
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// The base: 32 bits, or 64 for FS, GS, TR and LDTR in long mode.
    pub base: u64,
    /// The limit in bytes, as scaled by the granularity.
    pub limit: u32,
    /// Everything else.
    pub attr: SegAttr,
}

impl Segment {
    /// An unusable segment.
    pub const NULL: Self = Self {
        selector: 0,
        base: 0,
        limit: 0,
        attr: SegAttr::NULL,
    };

    /// A segment of real or virtual-8086 mode: the base is sixteen times the selector, the limit 64 KiB.
    #[must_use]
    pub const fn real_mode(selector: u16) -> Self {
        Self {
            selector,
            base: (selector as u64) << 4,
            limit: 0xffff,
            attr: SegAttr::REAL_MODE,
        }
    }

    /// What a register holds after reset or INIT (SDM vol. 3, table 11-1).
    #[must_use]
    pub const fn reset(reg: SegReg) -> Self {
        let attr = match reg {
            SegReg::Cs => SegAttr::RESET_CODE,
            SegReg::Ldtr => SegAttr::RESET_LDT,
            SegReg::Tr => SegAttr::RESET_TSS,
            _ => SegAttr::REAL_MODE,
        };
        let (selector, base) = match reg {
            SegReg::Cs => (0xf000, 0xffff_0000),
            _ => (0, 0),
        };
        Self {
            selector,
            base,
            limit: 0xffff,
            attr,
        }
    }

    /// Whether the `len` bytes at `offset` are inside the limit.
    fn covers(&self, offset: u32, len: u32) -> bool {
        let Some(last) = offset.checked_add(len.saturating_sub(1)) else {
            return false;
        };
        let expand_down = !self.attr.is_code() && self.attr.s() && self.attr.type_() & 4 != 0;
        if expand_down {
            // Valid offsets are those above the limit, up to 64 KiB or 4 GiB.
            let top = if self.attr.db() { u32::MAX } else { 0xffff };
            offset > self.limit && last <= top
        } else {
            last <= self.limit
        }
    }
}

/// The mode of a processor, as far as it decides how instructions are read and addresses are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMode {
    /// CR0.PE is clear.
    Real,
    /// The same, with a code segment of 32 bits that protected mode has left.
    Real32,
    /// Virtual-8086 mode.
    Vm86,
    /// Protected mode, 16-bit code.
    Protected16,
    /// Protected mode, 32-bit code.
    Protected32,
    /// Long mode, 16-bit code.
    Compat16,
    /// Long mode, 32-bit code.
    Compat32,
    /// Long mode, 64-bit code.
    Long64,
}

impl CpuMode {
    /// The mode that these registers put a processor into; `cs` is the attributes of the code segment.
    #[must_use]
    pub const fn of(cr0: Cr0, rflags: Rflags, efer: Efer, cs: SegAttr) -> Self {
        if !cr0.has(Cr0::PE) {
            // The D bit of CS counts here too. Protected mode can leave it set, and no transfer in real mode clears it.
            return if cs.db() { Self::Real32 } else { Self::Real };
        }
        if efer.has(Efer::LMA) {
            return if cs.l() {
                Self::Long64
            } else if cs.db() {
                Self::Compat32
            } else {
                Self::Compat16
            };
        }
        if rflags.has(Rflags::VM) {
            Self::Vm86
        } else if cs.db() {
            Self::Protected32
        } else {
            Self::Protected16
        }
    }

    /// Whether the code is 64-bit.
    #[inline]
    #[must_use]
    pub const fn is_64bit(self) -> bool {
        matches!(self, Self::Long64)
    }

    /// Whether long mode is active, whatever the code.
    #[inline]
    #[must_use]
    pub const fn is_long(self) -> bool {
        matches!(self, Self::Long64 | Self::Compat32 | Self::Compat16)
    }

    /// Whether CR0.PE is clear.
    #[inline]
    #[must_use]
    pub const fn is_real(self) -> bool {
        matches!(self, Self::Real | Self::Real32)
    }

    /// Whether segments are those of the 8086, with no types and privileges.
    #[inline]
    #[must_use]
    pub const fn is_8086(self) -> bool {
        matches!(self, Self::Real | Self::Real32 | Self::Vm86)
    }

    /// The default size of operands: 2 or 4 bytes.
    #[inline]
    #[must_use]
    pub const fn operand_size(self) -> u8 {
        match self {
            Self::Real | Self::Vm86 | Self::Protected16 | Self::Compat16 => 2,
            Self::Real32 | Self::Protected32 | Self::Compat32 | Self::Long64 => 4,
        }
    }

    /// The default size of addresses: 2, 4 or 8 bytes.
    #[inline]
    #[must_use]
    pub const fn address_size(self) -> u8 {
        match self {
            Self::Real | Self::Vm86 | Self::Protected16 | Self::Compat16 => 2,
            Self::Real32 | Self::Protected32 | Self::Compat32 => 4,
            Self::Long64 => 8,
        }
    }

    /// The linear addresses of the mode: all 64 bits, or the low 32.
    #[inline]
    #[must_use]
    pub const fn linear_mask(self) -> u64 {
        if self.is_64bit() {
            u64::MAX
        } else {
            0xffff_ffff
        }
    }
}

/// What is done at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write, or a read that a write follows.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Whether a linear address is canonical with 48- or 57-bit addresses.
#[inline]
#[must_use]
pub const fn is_canonical(address: u64, la57: bool) -> bool {
    canonicalize(address, la57) == address
}

/// The address with the bits above the top one made copies of it.
#[inline]
#[must_use]
pub const fn canonicalize(address: u64, la57: bool) -> u64 {
    let shift = if la57 { 7 } else { 16 };
    (((address << shift) as i64) >> shift) as u64
}

/// Forms the linear address of an access of `len` bytes at `offset` in a segment, with the checks of SDM vol. 3, 6.3 and 6.5.
///
/// `offset` is an effective address already cut to the address size. `len` is at most 4096; zero is taken as one byte. The
/// bytes follow each other modulo [`CpuMode::linear_mask`].
///
/// # Errors
///
/// #SS(0) for an access through SS, #GP(0) for any other, if the segment is unusable or of the wrong type, the access
/// passes the limit, or an address is not canonical.
pub fn linearize(
    mode: CpuMode,
    la57: bool,
    reg: SegReg,
    segment: &Segment,
    offset: u64,
    len: u32,
    kind: AccessKind,
) -> Result<u64, Fault> {
    let fault = if matches!(reg, SegReg::Ss) {
        Fault::ss(0)
    } else {
        Fault::gp(0)
    };

    if mode.is_64bit() {
        // Only FS and GS have a base; no segment has a limit or a type.
        let base = match reg {
            SegReg::Fs | SegReg::Gs => segment.base,
            _ => 0,
        };
        let first = base.wrapping_add(offset);
        let last = first.wrapping_add(u64::from(len.saturating_sub(1)));
        // An access around the top of the address space starts and ends in canonical halves; hardware lets it wrap.
        if is_canonical(first, la57) && is_canonical(last, la57) {
            return Ok(first);
        }
        return Err(fault);
    }

    if segment.attr.unusable() {
        return Err(fault);
    }
    if !mode.is_8086() {
        let type_ = segment.attr.type_();
        let allowed = match kind {
            AccessKind::Fetch => true,
            AccessKind::Read => type_ & 8 == 0 || type_ & 2 != 0,
            AccessKind::Write => type_ & 8 == 0 && type_ & 2 != 0,
        };
        if !allowed {
            return Err(fault);
        }
    }
    // Offsets are at most 32 bits wide in these modes.
    let Ok(offset) = u32::try_from(offset) else {
        return Err(fault);
    };
    if !segment.covers(offset, len) {
        return Err(fault);
    }
    Ok(segment.base.wrapping_add(u64::from(offset)) & mode.linear_mask())
}
