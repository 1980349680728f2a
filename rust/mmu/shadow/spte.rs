// SPDX-License-Identifier: GPL-2.0

//! Entries of shadow pages: those of the processor's own paging, in a form that is right for PAE and
//! for 4-level paging (SDM volume 3, chapter 5). PAE paging reserves the bits above the address, so
//! what we note of an entry is in bits 9 to 11, which the processor ignores in both.

use super::super::ept::Level;
use super::role::Rights;

/// An entry. Zero is "not present", and nothing else is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Spte(u64);

impl Spte {
    const PRESENT: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    /// Write-through and not cached: with PAT's reset value and with Linux's that is uncacheable.
    const UNCACHED: u64 = 3 << 3;
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const LARGE: u64 = 1 << 7;
    /// The guest may write, and so may the user: if the entry is read-only all the same, then for the
    /// dirty log or because the frame is a table of the guest's.
    const WRITABLE: u64 = 1 << 9;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    const KEY_SHIFT: u32 = 59;
    const NX: u64 = 1 << 63;

    /// Not present.
    pub(super) const NONE: Self = Self(0);

    /// The entry that this word is.
    #[inline]
    pub(super) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The word.
    #[inline]
    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    /// An entry for the table at `phys`: the leaves alone say what is allowed.
    #[inline]
    pub(super) const fn table(phys: u64) -> Self {
        Self(phys & Self::ADDRESS | Self::PRESENT | Self::WRITE | Self::USER | Self::ACCESSED)
    }

    /// A leaf.
    #[inline]
    pub(super) fn leaf(level: Level, leaf: &Leaf) -> Self {
        let mut bits = (leaf.pfn << 12) & Self::ADDRESS | Self::PRESENT | Self::DIRTY;
        let flags = [
            (Self::WRITE, leaf.write && leaf.writable),
            (Self::WRITABLE, leaf.writable),
            (Self::USER, leaf.rights.user),
            (Self::NX, leaf.nx),
            (Self::LARGE, level > Level::Page4K),
            (Self::UNCACHED, leaf.mmio),
            (Self::ACCESSED, leaf.accessed),
        ];
        for (flag, on) in flags {
            bits |= if on { flag } else { 0 };
        }
        if leaf.rights.user {
            bits |= u64::from(leaf.key) << Self::KEY_SHIFT;
        }
        Self(bits)
    }

    #[inline]
    pub(super) const fn is_present(self) -> bool {
        self.0 != 0
    }

    /// It is present, and a leaf in a page of `level`.
    #[inline]
    pub(super) const fn is_leaf(self, level: Level) -> bool {
        self.0 != 0 && (matches!(level, Level::Page4K) || self.0 & Self::LARGE != 0)
    }

    /// The physical address of the table, or of the leaf's first byte.
    #[inline]
    pub(super) const fn phys(self) -> u64 {
        self.0 & Self::ADDRESS
    }

    /// The guest can write through it.
    #[inline]
    pub(super) const fn is_written(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    /// It could be made so, as far as the guest's and the user's rights go.
    #[inline]
    pub(super) const fn is_writable(self) -> bool {
        self.0 & Self::WRITABLE != 0
    }

    #[inline]
    pub(super) const fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }

    #[inline]
    pub(super) const fn is_exec(self) -> bool {
        self.0 & Self::NX == 0
    }

    #[inline]
    pub(super) const fn key(self) -> u8 {
        (self.0 >> Self::KEY_SHIFT) as u8 & 15
    }

    #[inline]
    pub(super) const fn is_young(self) -> bool {
        self.0 & Self::ACCESSED != 0
    }

    /// What the processor may have cached of this leaf allows something that `new` does not, or leads
    /// elsewhere.
    #[inline]
    pub(super) fn is_less_in(self, new: Self) -> bool {
        let (old, new) = (self.0, new.0);
        let allows = |bits: u64| bits & (Self::WRITE | Self::USER) | !bits & Self::NX;
        (old ^ new) & (Self::ADDRESS | Self::LARGE | Self::UNCACHED) != 0
            || (old ^ new) & (15 << Self::KEY_SHIFT) != 0
            || allows(old) & !allows(new) != 0
            // A page of the supervisor's and one of the user's are not more and less of the same.
            || (old ^ new) & Self::USER != 0
    }

    /// The bits that let the guest write, and those that say that it could be let.
    pub(super) const WRITES: u64 = Self::WRITE;
    pub(super) const ALL_WRITES: u64 = Self::WRITE | Self::WRITABLE;
    /// The mark of an access.
    pub(super) const YOUNG: u64 = Self::ACCESSED;
}

/// What a leaf is made of.
pub(super) struct Leaf {
    /// The host page frame, aligned to the leaf's size.
    pub(super) pfn: u64,
    pub(super) rights: Rights,
    /// Execution is forbidden, by the guest or by us.
    pub(super) nx: bool,
    pub(super) key: u8,
    /// The guest and the user let the frame be written.
    pub(super) writable: bool,
    /// And it may be now.
    pub(super) write: bool,
    /// It is a device's memory.
    pub(super) mmio: bool,
    /// It is made for an access.
    pub(super) accessed: bool,
}
