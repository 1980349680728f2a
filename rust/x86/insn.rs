// SPDX-License-Identifier: GPL-2.0

//! What the decoder hands to the emulator: an instruction, taken apart.

pub mod system;

use self::system::SystemOp;
use super::regs::Gpr;
use super::segment::SegReg;

/// The longest an instruction can be, in bytes.
pub const MAX_INSN_LEN: usize = 15;

/// The size of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Size {
    /// One byte.
    Byte = 1,
    /// Two bytes.
    Word = 2,
    /// Four bytes.
    Dword = 4,
    /// Eight bytes.
    Qword = 8,
}

impl Size {
    /// In bytes.
    #[inline]
    #[must_use]
    pub const fn bytes(self) -> u8 {
        self as u8
    }

    /// In bits.
    #[inline]
    #[must_use]
    pub const fn bits(self) -> u32 {
        (self as u32).wrapping_mul(8)
    }

    /// The bits of a value of this size.
    #[inline]
    #[must_use]
    pub const fn mask(self) -> u64 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
            Self::Qword => u64::MAX,
        }
    }

    /// The top bit of a value of this size.
    #[inline]
    #[must_use]
    pub const fn sign_bit(self) -> u64 {
        match self {
            Self::Byte => 1 << 7,
            Self::Word => 1 << 15,
            Self::Dword => 1 << 31,
            Self::Qword => 1 << 63,
        }
    }

    /// The value, extended from this size to 64 bits as a signed number.
    #[inline]
    #[must_use]
    pub const fn sign_extend(self, value: u64) -> u64 {
        match self {
            Self::Byte => value as u8 as i8 as i64 as u64,
            Self::Word => value as u16 as i16 as i64 as u64,
            Self::Dword => value as u32 as i32 as i64 as u64,
            Self::Qword => value,
        }
    }
}

/// A memory operand: segment, and the parts of the effective address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemRef {
    /// The segment, after prefixes and defaults.
    pub seg: SegReg,
    /// The base register, if any.
    pub base: Option<Gpr>,
    /// The index register, if any.
    pub index: Option<Gpr>,
    /// The base-two logarithm of what the index is multiplied by, 0 to 3.
    pub scale: u8,
    /// The displacement, sign-extended; for an absolute address, the address.
    pub disp: u64,
    /// Whether the base is the address of the next instruction.
    pub rip_relative: bool,
}

/// A place that an instruction reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// There is none.
    None,
    /// A general register, its low part at sizes below eight.
    Reg(Gpr),
    /// AH, CH, DH or BH: the second byte of one of the first four registers.
    High(Gpr),
    /// Memory.
    Mem(MemRef),
    /// A constant, sign-extended as the instruction does.
    Imm(u64),
    /// A segment register.
    Seg(SegReg),
    /// An XMM or YMM register, by number.
    Xmm(u8),
    /// An MMX register, by number.
    Mmx(u8),
}

/// Which instruction set's rules hold for an instruction on vectors, and how many bytes one has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorSet {
    /// MMX: eight bytes, in the registers of the x87.
    Mmx,
    /// SSE: sixteen bytes, and what the register has above them stays.
    Sse,
    /// AVX with 128 bits: what the register has above them is cleared.
    Avx128,
    /// AVX with 256 bits.
    Avx256,
}

impl VectorSet {
    /// The bytes of a vector.
    #[inline]
    #[must_use]
    pub const fn bytes(self) -> u8 {
        match self {
            Self::Mmx => 8,
            Self::Sse | Self::Avx128 => 16,
            Self::Avx256 => 32,
        }
    }
}

/// The moves of vectors and their parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorOp {
    /// All of a vector.
    Move {
        /// Memory has to be aligned to its size.
        aligned: bool,
    },
    /// The lowest bytes, as many as the operand size; in a vector register, the others are cleared.
    Low,
    /// The same, and the others are those of `src2`, or stay.
    Merge,
    /// Eight bytes, the upper ones of the lower sixteen or the lower ones; the others are those of `src2`, or stay.
    Half {
        /// The upper ones.
        high: bool,
    },
    /// An operand of this many bytes, over and over.
    Broadcast(u8),
    /// An element is replaced, the others are those of `src2`, or stay.
    Insert,
    /// An element.
    Extract,
    /// Sixteen bytes are replaced, the others are those of `src2`.
    Insert128,
    /// Sixteen bytes.
    Extract128,
    /// The bytes of `dst` whose top bit is set in `src`, to memory at rDI.
    MaskStore,
}

/// What touches the x87's control and status, but none of its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum X87Op {
    /// FLDCW.
    LoadControl,
    /// FNSTCW.
    StoreControl,
    /// FNSTSW.
    StoreStatus,
    /// FNINIT.
    Init,
    /// FWAIT.
    Wait,
}

/// The repeat prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rep {
    /// None.
    None,
    /// F3: REP or REPE.
    Repe,
    /// F2: REPNE.
    Repne,
}

/// The two-operand arithmetic, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AluOp {
    /// Addition.
    Add,
    /// Bitwise or.
    Or,
    /// Addition with carry.
    Adc,
    /// Subtraction with borrow.
    Sbb,
    /// Bitwise and.
    And,
    /// Subtraction.
    Sub,
    /// Bitwise exclusive or.
    Xor,
    /// Subtraction for the flags alone.
    Cmp,
}

impl AluOp {
    /// From the three bits by which opcodes tell them apart.
    #[inline]
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        match number & 7 {
            0 => Self::Add,
            1 => Self::Or,
            2 => Self::Adc,
            3 => Self::Sbb,
            4 => Self::And,
            5 => Self::Sub,
            6 => Self::Xor,
            _ => Self::Cmp,
        }
    }
}

/// Shifts and rotations, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShiftOp {
    /// Rotate left.
    Rol,
    /// Rotate right.
    Ror,
    /// Rotate left through CF.
    Rcl,
    /// Rotate right through CF.
    Rcr,
    /// Shift left.
    Shl,
    /// Shift right, filling with zeroes.
    Shr,
    /// Shift right, filling with the sign.
    Sar,
}

/// What is done to the bit that BT and its siblings select.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitOp {
    /// It is only read.
    Test,
    /// It is set.
    Set,
    /// It is cleared.
    Reset,
    /// It is inverted.
    Complement,
}

/// The string instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StringOp {
    /// Memory to memory.
    Movs,
    /// Memory against memory.
    Cmps,
    /// The accumulator to memory.
    Stos,
    /// Memory to the accumulator.
    Lods,
    /// The accumulator against memory.
    Scas,
}

/// The flags that instructions of one byte change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagOp {
    /// CF is inverted.
    Cmc,
    /// CF is cleared.
    Clc,
    /// CF is set.
    Stc,
    /// DF is cleared.
    Cld,
    /// DF is set.
    Std,
}

/// The branches that count in RCX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopOp {
    /// Count down, and branch unless it is zero or ZF is set.
    Loopne,
    /// Count down, and branch unless it is zero or ZF is clear.
    Loope,
    /// Count down, and branch unless it is zero.
    Loop,
    /// Branch if the count is zero.
    Jcxz,
}

/// Arithmetic of decimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BcdOp {
    /// Adjust AL after an addition of packed digits.
    Daa,
    /// Adjust AL after a subtraction of packed digits.
    Das,
    /// Adjust AX after an addition of unpacked digits.
    Aaa,
    /// Adjust AX after a subtraction of unpacked digits.
    Aas,
    /// Divide AL by the constant: AH is the quotient, AL the remainder.
    Aam,
    /// `AL = AL + AH * constant`, AH is cleared.
    Aad,
}

/// What is searched or counted in the bits of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanOp {
    /// The lowest bit set.
    Bsf,
    /// The highest bit set.
    Bsr,
    /// The zeroes below.
    Tzcnt,
    /// The zeroes above.
    Lzcnt,
    /// The bits set.
    Popcnt,
}

/// The bit manipulation of BMI1 and BMI2: `dst` of `src` and `src2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BmiOp {
    /// `!src & src2`.
    Andn,
    /// The bits of `src` from where `src2` says, as many as it says.
    Bextr,
    /// `src` without the bits from that of number `src2`.
    Bzhi,
    /// The low bits of `src` at the places that `src2` has.
    Pdep,
    /// The bits of `src` that `src2` has, at the bottom.
    Pext,
    /// `src` rotated right.
    Rorx,
    /// `src` shifted right, filling with the sign.
    Sarx,
    /// `src` shifted left.
    Shlx,
    /// `src` shifted right, filling with zeroes.
    Shrx,
    /// `src` without its lowest bit.
    Blsr,
    /// The bits of `src` up to its lowest.
    Blsmsk,
    /// The lowest bit of `src`.
    Blsi,
}

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `dst = src`.
    Mov,
    /// `dst = src`, zero-extended from the given size.
    MovZx(Size),
    /// `dst = src`, sign-extended from the given size.
    MovSx(Size),
    /// `dst = src` with its bytes reversed.
    MovBe,
    /// `dst = address of src`.
    Lea,
    /// `dst <-> src`, always locked.
    Xchg,
    /// `dst = dst op src`.
    Alu(AluOp),
    /// Flags of `dst & src`.
    Test,
    /// `dst = !dst`.
    Not,
    /// `dst = -dst`.
    Neg,
    /// `dst = dst + 1`, leaving CF.
    Inc,
    /// `dst = dst - 1`, leaving CF.
    Dec,
    /// `dst = dst shifted by src`.
    Shift(ShiftOp),
    /// A bit of `dst`, selected by `src`, to CF, then changed.
    Bit(BitOp),
    /// If `dst` is the accumulator, `dst = src`; else the accumulator is `dst`.
    CmpXchg,
    /// CMPXCHG8B.
    CmpXchg8b,
    /// CMPXCHG16B.
    CmpXchg16b,
    /// `dst = dst + src`, and `src` becomes the old `dst`.
    Xadd,
    /// `dst = dst * src`, signed and cut; with a third operand, `dst = src * src2`.
    Imul,
    /// `rDX:rAX = rAX * src`.
    Mul {
        /// As signed numbers.
        signed: bool,
    },
    /// rAX and rDX are the quotient and the remainder of `rDX:rAX / src`.
    Div {
        /// As signed numbers.
        signed: bool,
    },
    /// `dst` shifted by `src2`, with the bits of `src` moving in.
    DoubleShift {
        /// Up, not down.
        left: bool,
    },
    /// `dst` with the order of its bytes reversed.
    ByteSwap,
    /// `dst` is a property of the bits of `src`.
    Scan(ScanOp),
    /// `dst` is the CRC-32C of itself and `src`, which has this size.
    Crc32(Size),
    /// `dst = dst + src + CF`, changing CF alone.
    Adcx,
    /// `dst = dst + src + OF`, changing OF alone.
    Adox,
    /// BMI1 and BMI2.
    Bmi(BmiOp),
    /// `dst:src = rDX * src2`, without flags.
    Mulx,
    /// rDX is the sign of rAX.
    SignToRdx,
    /// AL is a byte of the table at rBX.
    Xlat,
    /// AH to flags.
    Sahf,
    /// Flags to AH.
    Lahf,
    /// A flag changes.
    Flag(FlagOp),
    /// AL is the sign of CF.
    Salc,
    /// Decimal digits.
    Bcd(BcdOp),
    /// #BR unless `dst` is in the bounds at `src`.
    Bound,
    /// The privilege level of `dst` is raised to that of `src`.
    Arpl,
    /// `dst = src` if the condition of this number holds.
    Cmov(u8),
    /// `dst = 1` if the condition of this number holds, else 0.
    Set(u8),
    /// Push `src`.
    Push,
    /// Pop to `dst`.
    Pop,
    /// Push the general registers.
    PushAll,
    /// Pop the general registers, but for rSP.
    PopAll,
    /// Push RFLAGS.
    PushFlags,
    /// Pop RFLAGS.
    PopFlags,
    /// Make a stack frame of `src` bytes, at the nesting level `src2`.
    Enter,
    /// Drop the stack frame.
    Leave,
    /// Push RIP and branch: relative if `src` is a constant.
    Call,
    /// Branch: relative if `src` is a constant.
    Jump,
    /// Branch if the condition of this number holds.
    Branch(u8),
    /// Branch by RCX.
    Loop(LoopOp),
    /// Pop RIP, and drop `src` bytes.
    Return,
    /// A string instruction.
    String(StringOp),
    /// What works on segments, tables, privilege or the machine.
    System(SystemOp),
    /// Vectors.
    Vector(VectorOp, VectorSet),
    /// LDMXCSR.
    LoadMxcsr(VectorSet),
    /// STMXCSR.
    StoreMxcsr(VectorSet),
    /// The x87.
    X87(X87Op),
    /// Nothing: hints, fences and what is reserved for such.
    Nop,
    /// A cache-line flush or write-back: the address is checked, nothing else is done.
    Flush,
}

/// An instruction, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    /// What it does.
    pub op: Op,
    /// How long it is, 1 to 15 bytes.
    pub len: u8,
    /// The size of its operands.
    pub size: Size,
    /// The size of its addresses: 2, 4 or 8 bytes.
    pub address_size: u8,
    /// Whether it has a LOCK prefix, on an instruction that may have one.
    pub lock: bool,
    /// Its repeat prefix.
    pub rep: Rep,
    /// Whether it has a REX prefix: AH to BH are SPL to DIL then.
    pub rex: bool,
    /// The first operand.
    pub dst: Operand,
    /// The second operand.
    pub src: Operand,
    /// The third operand.
    pub src2: Operand,
    /// Which element, for instructions on vectors.
    pub element: u8,
    /// For string instructions, the segment of the source.
    pub string_seg: SegReg,
}

/// Why bytes could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// There are too few: the instruction goes on.
    Truncated,
    /// It is longer than 15 bytes: #GP(0).
    TooLong,
    /// It is no instruction in this mode, or has a LOCK prefix that it may not have: #UD.
    Invalid,
    /// It is, or may be, an instruction, but none that is emulated.
    Unsupported,
}
