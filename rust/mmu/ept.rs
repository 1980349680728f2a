// SPDX-License-Identifier: GPL-2.0

//! The format of EPT page tables: SDM volume 3, "The extended page-table mechanism (EPT)".

/// What the processor's EPT can do, and what the host knows about it.
#[derive(Clone, Copy)]
pub(crate) struct EptCaps {
    /// Accessed and dirty flags (IA32_VMX_EPT_VPID_CAP bit 21).
    pub(crate) ad_bits: bool,
    /// Leaves of 2 MiB (bit 16).
    pub(crate) page_2m: bool,
    /// Leaves of 1 GiB (bit 17).
    pub(crate) page_1g: bool,
    /// Tables of five levels (bit 7).
    pub(crate) five_level: bool,
    /// Table walks may be cached write-back (bit 14).
    pub(crate) walk_wb: bool,
    /// The host's physical-address width (CPUID 0x8000_0008 EAX bits 7:0): the guest's addresses end
    /// there too.
    pub(crate) phys_bits: u8,
    /// Pages whose dirty flag the processor sets are logged (page-modification logging).
    pub(crate) pml: bool,
    /// Large pages must not be executable (the iTLB-multihit erratum).
    pub(crate) nx_huge: bool,
}

impl EptCaps {
    /// What is common to all tables, for shadow tables.
    pub(crate) const fn of_shadow(caps: &super::caps::ShadowCaps) -> Self {
        Self {
            ad_bits: true,
            page_2m: true,
            page_1g: false,
            five_level: false,
            walk_wb: true,
            phys_bits: caps.phys_bits,
            pml: false,
            nx_huge: caps.nx_huge,
        }
    }
}

/// How a guest touches memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Access {
    /// A data read.
    pub(crate) read: bool,
    /// A data write, or a read-modify-write; also the walk's own, if the guest's tables are written.
    pub(crate) write: bool,
    /// An instruction fetch.
    pub(crate) exec: bool,
}

impl Access {
    /// A page for reads and writes.
    pub(crate) const READ_WRITE: Self = Self {
        read: true,
        write: true,
        exec: false,
    };
    /// None yet: a page is mapped ahead of its use, as for a read.
    pub(crate) const NONE: Self = Self {
        read: false,
        write: false,
        exec: false,
    };
}

/// How the next write to a page is noticed while its slot's writes are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LogBy {
    /// The leaf is clean; the processor logs the page when it sets the dirty flag.
    DirtyFlag,
    /// The leaf is read-only; the write is an EPT violation.
    Protection,
}

/// A level of the tables: 1 has leaves of 4 KiB, and each next level's entries span 512 times as
/// much.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub(crate) enum Level {
    /// Leaves of 4 KiB.
    Page4K = 1,
    /// Leaves of 2 MiB.
    Page2M = 2,
    /// Leaves of 1 GiB.
    Page1G = 3,
    /// Tables only; the root of four levels.
    Four = 4,
    /// Tables only; the root of five levels.
    Five = 5,
}

impl Level {
    /// How many bits of a gfn are below those that choose the entry.
    #[inline]
    const fn shift(self) -> u32 {
        match self {
            Self::Page4K => 0,
            Self::Page2M => 9,
            Self::Page1G => 18,
            Self::Four => 27,
            Self::Five => 36,
        }
    }

    /// How many 4 KiB pages an entry of this level spans. A power of two.
    #[inline]
    pub(crate) const fn pages(self) -> u64 {
        1 << self.shift()
    }

    /// The bits of a gfn that say where in an entry's span it is.
    #[inline]
    pub(crate) const fn mask(self) -> u64 {
        self.pages().wrapping_sub(1)
    }

    /// The index of the entry for `gfn` in a table of this level: below 512.
    #[inline]
    pub(crate) const fn index(self, gfn: u64) -> usize {
        (gfn >> self.shift()) as usize & 511
    }

    /// How many entries it takes to span `gfns`, which is not empty.
    pub(crate) const fn entries(self, gfns: &core::ops::Range<u64>) -> u64 {
        let last = gfns.end.wrapping_sub(1) >> self.shift();
        last.wrapping_sub(gfns.start >> self.shift())
            .wrapping_add(1)
    }

    /// The level that a table entry of this level points to. The lowest has none.
    #[inline]
    pub(crate) const fn below(self) -> Option<Self> {
        match self {
            Self::Page4K => None,
            Self::Page2M => Some(Self::Page4K),
            Self::Page1G => Some(Self::Page2M),
            Self::Four => Some(Self::Page1G),
            Self::Five => Some(Self::Four),
        }
    }

    /// Its number: 1 for 4 KiB.
    #[inline]
    pub(crate) const fn number(self) -> u8 {
        self as u8
    }

    /// The level of that number, or the nearest.
    #[inline]
    pub(crate) const fn from_number(n: u8) -> Self {
        match n {
            0 | 1 => Self::Page4K,
            2 => Self::Page2M,
            3 => Self::Page1G,
            4 => Self::Four,
            _ => Self::Five,
        }
    }
}

/// How the entries of one VM are made.
#[derive(Clone, Copy)]
pub(crate) struct Format {
    /// The root table's level.
    pub(crate) top: Level,
    /// The largest leaf.
    pub(crate) max_leaf: Level,
    /// The processor marks leaves accessed and dirty.
    pub(crate) ad: bool,
    /// Large leaves are not executable.
    pub(crate) nx_huge: bool,
    /// How writes are noticed for the dirty log.
    pub(crate) log_by: LogBy,
    /// EPTP without the root's address.
    eptp_flags: u64,
    /// The number of guest frames: gfns are below.
    pub(crate) gfn_limit: u64,
}

impl Format {
    /// The best that the processor can do.
    pub(crate) fn new(caps: &EptCaps) -> Self {
        let top = if caps.five_level && caps.phys_bits > 48 {
            Level::Five
        } else {
            Level::Four
        };
        let max_leaf = match (caps.page_1g, caps.page_2m) {
            (true, true) => Level::Page1G,
            (false, true) => Level::Page2M,
            _ => Level::Page4K,
        };
        let reach = if top == Level::Five { 57 } else { 48 };
        let bits = caps.phys_bits.clamp(32, 52).min(reach);
        // Bits 2:0: memory type of the walk; 5:3: levels less one; 6: accessed and dirty flags.
        let walk_type = if caps.walk_wb { 6 } else { 0 };
        let eptp_flags =
            walk_type | u64::from(top.number() - 1) << 3 | u64::from(caps.ad_bits) << 6;
        Self {
            top,
            max_leaf,
            ad: caps.ad_bits,
            nx_huge: caps.nx_huge,
            log_by: if caps.pml && caps.ad_bits {
                LogBy::DirtyFlag
            } else {
                LogBy::Protection
            },
            eptp_flags,
            gfn_limit: 1 << (bits - 12),
        }
    }

    /// The EPTP for a root at `phys`.
    pub(crate) const fn eptp(&self, phys: u64) -> u64 {
        phys | self.eptp_flags
    }

    /// A leaf, made for `access`.
    pub(crate) fn leaf(&self, level: Level, frame: &Frame, access: Access) -> Entry {
        let large = level > Level::Page4K;
        let mut bits = (frame.pfn << 12) & Entry::ADDRESS | Entry::READ;
        // A write that is to be logged, and is not the one that this is made for, must be noticed.
        let silent = !frame.logged || access.write;
        if frame.writable {
            bits |= Entry::HOST_WRITABLE;
            if silent || self.log_by == LogBy::DirtyFlag {
                bits |= Entry::WRITE;
            }
        }
        if !(large && self.nx_huge) {
            bits |= Entry::EXECUTE;
        }
        if large {
            bits |= Entry::LARGE;
        }
        // A device's memory is uncacheable whatever the guest thinks. RAM is write-back, and the
        // guest's PAT is ignored: no device writes it behind the caches' back.
        bits |= if frame.mmio {
            Entry::TYPE_UC
        } else {
            Entry::TYPE_WB | Entry::IGNORE_PAT
        };
        // The access that it is made for follows at once: spare the processor the update, and, where
        // nobody wants to know of writes, the log.
        if self.ad {
            if access != Access::NONE {
                bits |= Entry::ACCESSED;
            }
            if silent && frame.writable {
                bits |= Entry::DIRTY;
            }
        }
        Entry(bits)
    }
}

/// What a leaf shall map.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    /// The host page frame number, aligned to the leaf's size.
    pub(crate) pfn: u64,
    /// The guest may write.
    pub(crate) writable: bool,
    /// It is a device's memory.
    pub(crate) mmio: bool,
    /// The guest's writes are logged.
    pub(crate) logged: bool,
}

/// An entry of a table of any level. Zero is "not present", and nothing else is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(u64);

impl Entry {
    /// Not present.
    pub(crate) const NONE: Self = Self(0);

    const READ: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const EXECUTE: u64 = 1 << 2;
    const TYPE_UC: u64 = 0 << 3;
    const TYPE_WB: u64 = 6 << 3;
    const IGNORE_PAT: u64 = 1 << 6;
    const LARGE: u64 = 1 << 7;
    const ACCESSED: u64 = 1 << 8;
    const DIRTY: u64 = 1 << 9;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Ignored by the processor. The host lets the frame be written: a leaf that has it and is
    /// read-only is so for the dirty log's sake alone.
    const HOST_WRITABLE: u64 = 1 << 52;
    /// What may be added to a leaf without anybody's noticing that the old one was there.
    const GROWABLE: u64 = Self::READ
        | Self::WRITE
        | Self::EXECUTE
        | Self::ACCESSED
        | Self::DIRTY
        | Self::HOST_WRITABLE;

    /// The entry that this word is.
    #[inline]
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The word.
    #[inline]
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// An entry for the table at `phys`; the leaves alone say what is allowed.
    #[inline]
    pub(crate) const fn table(phys: u64) -> Self {
        Self(phys & Self::ADDRESS | Self::READ | Self::WRITE | Self::EXECUTE)
    }

    /// It is a leaf or a table.
    #[inline]
    pub(crate) const fn is_present(self) -> bool {
        self.0 != 0
    }

    /// It is present, and a leaf in a table of `level`.
    #[inline]
    pub(crate) const fn is_leaf(self, level: Level) -> bool {
        self.0 != 0 && (matches!(level, Level::Page4K) || self.0 & Self::LARGE != 0)
    }

    /// The physical address of the table, or of the leaf's first byte.
    #[inline]
    pub(crate) const fn phys(self) -> u64 {
        self.0 & Self::ADDRESS
    }

    /// The leaf lets the guest do that.
    #[inline]
    pub(crate) const fn allows(self, access: Access) -> bool {
        (!access.read || self.0 & Self::READ != 0)
            && (!access.write || self.0 & Self::WRITE != 0)
            && (!access.exec || self.0 & Self::EXECUTE != 0)
    }

    /// The leaf that allows what either does, if the two differ in nothing else.
    #[inline]
    pub(crate) const fn grown_by(self, new: Self) -> Option<Self> {
        if (self.0 ^ new.0) & !Self::GROWABLE == 0 {
            Some(Self(self.0 | new.0))
        } else {
            None
        }
    }

    /// The leaf with what a write needs, if only the dirty log kept that away.
    #[inline]
    pub(crate) const fn written(self, ad: bool) -> Option<Self> {
        if self.0 & Self::HOST_WRITABLE == 0 {
            return None;
        }
        let flags = if ad { Self::ACCESSED | Self::DIRTY } else { 0 };
        Some(Self(self.0 | Self::WRITE | flags))
    }

    /// The leaf of `level` that maps the `index`-th part of what this leaf of the level above maps.
    pub(crate) const fn part(self, level: Level, index: u64) -> Self {
        let mut bits = self.0;
        if matches!(level, Level::Page4K) {
            bits &= !Self::LARGE;
        }
        // The address is aligned to the large leaf's size.
        Self(bits | index << (12 + level.shift()))
    }

    /// The leaf has been used since the mark was cleared. Without accessed flags: it may have been.
    #[inline]
    pub(crate) const fn is_young(self, ad: bool) -> bool {
        !ad || self.0 & Self::ACCESSED != 0
    }

    /// The bits to keep so that the leaf is not young.
    pub(crate) const OLD: u64 = !Self::ACCESSED;

    /// The bit whose absence makes the next write be noticed.
    #[inline]
    pub(crate) const fn write_mark(by: LogBy) -> u64 {
        match by {
            LogBy::DirtyFlag => Self::DIRTY,
            LogBy::Protection => Self::WRITE,
        }
    }
}
