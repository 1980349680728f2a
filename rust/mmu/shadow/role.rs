// SPDX-License-Identifier: GPL-2.0

//! What a shadow page stands for: its role, in which two pages for the same guest frame may differ.
//!
//! A guest's page table means something only together with the way that leads to it (which rights
//! the entries above leave) and the registers that say how it is read. So one table may need
//! several shadow pages. What is the same for two of them is not in the role.

use super::super::ept::Level;
use crate::x86::paging::Paging;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Efer;

/// An entry of the guest's is there.
pub(super) const PRESENT: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const NX: u64 = 1 << 63;
const KEY_SHIFT: u32 = 59;

/// What entries let a guest do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Rights {
    /// Writes.
    pub(super) write: bool,
    /// Accesses of user mode.
    pub(super) user: bool,
    /// Fetches.
    pub(super) exec: bool,
}

impl Rights {
    /// All.
    pub(super) const ALL: Self = Self {
        write: true,
        user: true,
        exec: true,
    };

    /// What is left below an entry of the guest's.
    #[inline]
    pub(super) const fn below(self, entry: u64, modes: Modes) -> Self {
        Self {
            write: self.write && entry & W != 0,
            user: self.user && entry & U != 0,
            exec: self.exec && (!modes.has(Modes::NXE) || entry & NX == 0),
        }
    }
}

/// The guest's registers, as far as a shadow page depends on them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Modes(u8);

impl Modes {
    /// CR0.WP: supervisor mode respects read-only pages.
    pub(super) const WP: u8 = 1 << 0;
    /// EFER.NXE: bit 63 of an entry forbids execution, and is not reserved.
    pub(super) const NXE: u8 = 1 << 1;
    /// Bits 62:52 are reserved: PAE paging.
    pub(super) const PAE: u8 = 1 << 2;
    /// CR4.PSE, where entries of the second level are four bytes.
    pub(super) const PSE: u8 = 1 << 3;
    /// CR4.SMEP without CR0.WP.
    pub(super) const SMEP_NOT_WP: u8 = 1 << 4;
    /// CR4.SMAP or CR4.PKE without CR0.WP: a user's page must stay one, see [`super::fault`].
    pub(super) const STRICT_NOT_WP: u8 = 1 << 5;
    /// CR4.PKE: bits 62:59 of an entry are its key.
    pub(super) const PKE: u8 = 1 << 6;

    /// None of these matters.
    pub(super) const NONE: Self = Self(0);

    /// Those of a vCPU whose paging is on.
    fn of(paging: &Paging) -> Self {
        let (cr0, cr4, efer) = (paging.cr0, paging.cr4, paging.efer);
        let wp = cr0.has(Cr0::WP);
        let long = efer.has(Efer::LMA);
        let pae = cr4.has(Cr4::PAE);
        let pke = long && cr4.has(Cr4::PKE);
        let bits = [
            (Self::WP, wp),
            (Self::NXE, pae && efer.has(Efer::NXE)),
            (Self::PAE, pae && !long),
            (Self::PSE, !pae && cr4.has(Cr4::PSE)),
            (Self::SMEP_NOT_WP, !wp && cr4.has(Cr4::SMEP)),
            (Self::STRICT_NOT_WP, !wp && (cr4.has(Cr4::SMAP) || pke)),
            (Self::PKE, pke),
        ];
        Self(
            bits.iter()
                .fold(0, |all, (bit, on)| if *on { all | bit } else { all }),
        )
    }

    /// Whether one of them is on.
    #[inline]
    pub(super) const fn has(self, mode: u8) -> bool {
        self.0 & mode != 0
    }
}

/// How the guest translates linear addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Not at all: paging is off.
    Off,
    /// Two levels of entries of four bytes.
    Bits32,
    /// Two levels of entries of eight bytes, below four that come with CR3.
    Pae,
    /// Four levels of entries of eight bytes.
    Long,
}

/// How a vCPU translates: what its roots depend on besides CR3.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Regime {
    pub(super) format: Format,
    pub(super) modes: Modes,
}

impl Regime {
    /// That of these registers.
    pub(super) fn of(paging: &Paging) -> Self {
        if !paging.cr0.has(Cr0::PG) {
            return Self {
                format: Format::Off,
                modes: Modes::NONE,
            };
        }
        Self {
            format: if paging.efer.has(Efer::LMA) {
                Format::Long
            } else if paging.cr4.has(Cr4::PAE) {
                Format::Pae
            } else {
                Format::Bits32
            },
            modes: Modes::of(paging),
        }
    }

    /// The level of the root, or of each of four.
    #[inline]
    pub(super) const fn root_level(self) -> Level {
        match self.format {
            Format::Long => Level::Four,
            _ => Level::Page2M,
        }
    }

    /// A table that `linear` is looked up in, reached with these rights.
    pub(super) const fn table(self, level: Level, rights: Rights, linear: u64) -> Role {
        let source = match self.format {
            Format::Off => Source::Direct { key: 0 },
            Format::Bits32 => Source::Bits32 {
                // A guest's table of 1024 entries takes two shadow pages at the lowest level, and
                // four above it, where an entry of the guest's is two of ours.
                quadrant: match level {
                    Level::Page4K => (linear >> 21) as u8 & 1,
                    _ => (linear >> 30) as u8 & 3,
                },
            },
            Format::Pae | Format::Long => Source::Bits64,
        };
        Role {
            level,
            source,
            rights,
            modes: self.modes,
        }
    }
}

/// What a shadow page's entries are made from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// No table of the guest's: it maps consecutive frames, as paging off does, or as a part of a large
    /// page, whose protection key is this.
    Direct { key: u8 },
    /// A part of a table of entries of four bytes.
    Bits32 { quadrant: u8 },
    /// A table of entries of eight bytes.
    Bits64,
}

/// A role.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Role {
    /// Of the shadow page.
    pub(super) level: Level,
    pub(super) source: Source,
    /// What the way to the page leaves; if it is direct, what its leaves allow.
    pub(super) rights: Rights,
    pub(super) modes: Modes,
}

/// A guest's entry that maps 4 KiB, as it can be used without a fault.
#[derive(Clone, Copy)]
pub(super) struct GuestLeaf {
    pub(super) gfn: u64,
    /// Without writes if the page is not marked dirty.
    pub(super) rights: Rights,
    pub(super) key: u8,
}

impl Role {
    /// A page of consecutive frames.
    pub(super) const fn direct(level: Level, rights: Rights, key: u8) -> Self {
        Self {
            level,
            source: Source::Direct { key },
            rights,
            modes: Modes::NONE,
        }
    }

    /// Whether the page stands for no table of the guest's.
    #[inline]
    pub(super) const fn is_direct(self) -> bool {
        matches!(self.source, Source::Direct { .. })
    }

    /// Bytes in an entry of the guest's.
    #[inline]
    pub(super) const fn entry_size(self) -> u64 {
        match self.source {
            Source::Bits32 { .. } => 4,
            _ => 8,
        }
    }

    /// Where in the guest's table the entry is that shadow entry `index` is made from, in bytes.
    #[inline]
    pub(super) const fn guest_offset(self, index: usize) -> u64 {
        let index = index as u64 & 511;
        match (self.source, self.level) {
            (Source::Bits32 { quadrant }, Level::Page4K) => {
                ((quadrant as u64 & 1) << 9 | index) << 2
            }
            (Source::Bits32 { quadrant }, _) => ((quadrant as u64 & 3) << 8 | index >> 1) << 2,
            _ => index << 3,
        }
    }

    /// The shadow entries that are made from the `len` bytes at `offset` in the guest's table.
    pub(super) fn shadow_entries(self, offset: u64, len: u64) -> core::ops::Range<usize> {
        let last = offset
            .saturating_add(len.max(1))
            .saturating_sub(1)
            .min(0xfff);
        let (first, last) = match self.source {
            Source::Direct { .. } => return 0..0,
            Source::Bits64 => (offset >> 3, last >> 3),
            Source::Bits32 { quadrant } => {
                let (first, last) = (offset >> 2, last >> 2);
                // How many entries of the guest's there are in a shadow page, and of ours for each.
                let (part, each) = match self.level {
                    Level::Page4K => (512, 1),
                    _ => (256, 2),
                };
                let start = u64::from(quadrant).wrapping_mul(part);
                let end = start.wrapping_add(part);
                if last < start || first >= end {
                    return 0..0;
                }
                let first = first.max(start).wrapping_sub(start).wrapping_mul(each);
                let last = last.min(end.wrapping_sub(1)).wrapping_sub(start);
                (
                    first,
                    last.wrapping_mul(each).wrapping_add(each).wrapping_sub(1),
                )
            }
        };
        (first.min(511) as usize)..(last.min(511) as usize).wrapping_add(1)
    }

    /// What an entry of the guest's maps that belongs to this page of the lowest level; none if an access
    /// through it would fault, or would mark it accessed first.
    pub(super) fn leaf(self, entry: u64) -> Option<GuestLeaf> {
        if entry & (PRESENT | A) != PRESENT | A {
            return None;
        }
        let mut reserved = 0;
        let gfn = match self.source {
            Source::Direct { .. } => return None,
            Source::Bits32 { .. } => (entry & 0xffff_f000) >> 12,
            Source::Bits64 => {
                if !self.modes.has(Modes::NXE) {
                    reserved |= NX;
                }
                if self.modes.has(Modes::PAE) {
                    reserved |= 0x7ff << 52;
                }
                (entry & 0x000f_ffff_ffff_f000) >> 12
            }
        };
        if entry & reserved != 0 {
            return None;
        }
        let mut rights = self.rights.below(entry, self.modes);
        rights.write &= entry & D != 0;
        Some(GuestLeaf {
            gfn,
            rights,
            key: self.key(entry),
        })
    }

    /// The protection key of an entry of the guest's.
    #[inline]
    pub(super) const fn key(self, entry: u64) -> u8 {
        if self.modes.has(Modes::PKE) {
            (entry >> KEY_SHIFT) as u8 & 15
        } else {
            0
        }
    }
}

/// An entry of the guest's, from the bytes of it: four, or eight.
#[inline]
pub(super) fn guest_entry(bytes: &[u8]) -> u64 {
    if let Ok(raw) = <[u8; 8]>::try_from(bytes) {
        u64::from_le_bytes(raw)
    } else if let Ok(raw) = <[u8; 4]>::try_from(bytes) {
        u32::from_le_bytes(raw).into()
    } else {
        0
    }
}
