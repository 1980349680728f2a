// SPDX-License-Identifier: GPL-2.0

//! Exceptions: their vectors, their error codes, and the fault that an emulated access ends with.

use super::bits::bit_flags;

/// The vector of an exception or interrupt. Any value can come from a VMM; only 0 to 31 are exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Vector(pub u8);

impl Vector {
    /// #DE, divide error.
    pub const DE: Self = Self(0);
    /// #DB, debug.
    pub const DB: Self = Self(1);
    /// The non-maskable interrupt: not an exception, but the vector is taken.
    pub const NMI: Self = Self(2);
    /// #BP, breakpoint (INT3).
    pub const BP: Self = Self(3);
    /// #OF, overflow (INTO).
    pub const OF: Self = Self(4);
    /// #BR, BOUND range exceeded.
    pub const BR: Self = Self(5);
    /// #UD, invalid opcode.
    pub const UD: Self = Self(6);
    /// #NM, device not available.
    pub const NM: Self = Self(7);
    /// #DF, double fault.
    pub const DF: Self = Self(8);
    /// Coprocessor segment overrun, of the 387 only.
    pub const CSO: Self = Self(9);
    /// #TS, invalid TSS.
    pub const TS: Self = Self(10);
    /// #NP, segment not present.
    pub const NP: Self = Self(11);
    /// #SS, stack-segment fault.
    pub const SS: Self = Self(12);
    /// #GP, general protection.
    pub const GP: Self = Self(13);
    /// #PF, page fault.
    pub const PF: Self = Self(14);
    /// #MF, x87 error.
    pub const MF: Self = Self(16);
    /// #AC, alignment check.
    pub const AC: Self = Self(17);
    /// #MC, machine check.
    pub const MC: Self = Self(18);
    /// #XM, SIMD floating-point error.
    pub const XM: Self = Self(19);
    /// #VE, virtualization exception.
    pub const VE: Self = Self(20);
    /// #CP, control protection.
    pub const CP: Self = Self(21);

    /// Whether an exception with this vector pushes an error code in protected mode (SDM vol. 3, 7.3).
    #[inline]
    #[must_use]
    pub const fn has_error_code(self) -> bool {
        matches!(self.0, 8 | 10..=14 | 17 | 21)
    }

    /// Whether this is the vector of an exception: below 32 and not the NMI's.
    #[inline]
    #[must_use]
    pub const fn is_exception(self) -> bool {
        self.0 < 32 && self.0 != Self::NMI.0
    }
}

bit_flags! {
    /// The error code of a page fault (SDM vol. 3, 5.7).
    pub struct PfError(u32) {
        /// The page was present: a protection violation.
        P = 1 << 0;
        /// The access was a write.
        W = 1 << 1;
        /// The access was one of user mode.
        U = 1 << 2;
        /// A reserved bit was set in a paging-structure entry.
        RSVD = 1 << 3;
        /// The access was an instruction fetch.
        I = 1 << 4;
        /// A protection key forbade it.
        PK = 1 << 5;
        /// The access was one to a shadow stack.
        SS = 1 << 6;
    }
}

/// An exception to be delivered to the guest instead of completing an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which exception.
    pub vector: Vector,
    /// The error code, for vectors that have one. In real mode no exception pushes one: whoever injects the fault drops
    /// it there.
    pub error: Option<u32>,
    /// The faulting linear address, for a page fault.
    pub cr2: Option<u64>,
}

impl Fault {
    /// #UD.
    pub const UD: Self = Self {
        vector: Vector::UD,
        error: None,
        cr2: None,
    };
    /// #DE.
    pub const DE: Self = Self {
        vector: Vector::DE,
        error: None,
        cr2: None,
    };

    /// #GP with an error code.
    #[inline]
    #[must_use]
    pub const fn gp(error: u32) -> Self {
        Self {
            vector: Vector::GP,
            error: Some(error),
            cr2: None,
        }
    }

    /// #TS with an error code.
    #[inline]
    #[must_use]
    pub const fn ts(error: u32) -> Self {
        Self {
            vector: Vector::TS,
            error: Some(error),
            cr2: None,
        }
    }

    /// #NP with an error code.
    #[inline]
    #[must_use]
    pub const fn np(error: u32) -> Self {
        Self {
            vector: Vector::NP,
            error: Some(error),
            cr2: None,
        }
    }

    /// #SS with an error code.
    #[inline]
    #[must_use]
    pub const fn ss(error: u32) -> Self {
        Self {
            vector: Vector::SS,
            error: Some(error),
            cr2: None,
        }
    }

    /// #AC, whose error code is always zero.
    #[inline]
    #[must_use]
    pub const fn ac() -> Self {
        Self {
            vector: Vector::AC,
            error: Some(0),
            cr2: None,
        }
    }

    /// #PF at a linear address.
    #[inline]
    #[must_use]
    pub const fn page(linear: u64, error: PfError) -> Self {
        Self {
            vector: Vector::PF,
            error: Some(error.bits()),
            cr2: Some(linear),
        }
    }
}
