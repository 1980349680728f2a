// SPDX-License-Identifier: GPL-2.0

//! How random programs begin: entries of tables, pages, registers.

use super::layout::{self as at, indices, POOL, POOL_LEN, POOL_LOW, ROOTS, TABLES};
use super::memory::PAGE;
use super::model::{PCIDE, PGE, PKE, SMAP, SMEP};
use super::op::{Avoid, Features, Format, Setup};
use crate::host::Rng;
use crate::machine::cr;

/// Present.
pub(super) const P: u64 = 1;
/// Writable.
pub(super) const W: u64 = 2;
/// For user mode.
pub(super) const U: u64 = 4;
/// Accessed.
pub(super) const A: u64 = 0x20;
/// Dirty.
pub(super) const D: u64 = 0x40;
/// A large page.
pub(super) const PS: u64 = 0x80;
/// No execution.
pub(super) const NX: u64 = 1 << 63;
const G: u64 = 0x100;
const CR0: u64 = cr::PE | cr::MP | cr::ET | cr::NE;

/// Yes, in so many percent of cases.
pub(super) fn chance(rng: &mut Rng, percent: u64) -> bool {
    (rng.number() >> 33) & 0x7fff_ffff < percent * 0x7fff_ffff / 100
}

/// A number below `n`.
pub(super) fn below(rng: &mut Rng, n: usize) -> usize {
    ((rng.number() >> 20) % n as u64) as usize
}

/// One of these.
pub(super) fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[below(rng, from.len())]
}

/// The level of tables for which a page of the pool is meant, the lowest is 1; the roots have the highest. Data is 0.
pub(super) fn level_of(format: Format, page: usize) -> usize {
    match (format, page) {
        (_, 0..ROOTS) => format.levels(),
        (Format::Bits32, 3..TABLES) => 1,
        (Format::Long, 3) => 3,
        (_, 3..=5) => 2,
        (_, 6..TABLES) => 1,
        _ => 0,
    }
}

/// The tables of a level.
pub(super) fn tables_of(format: Format, level: usize) -> Vec<usize> {
    (0..TABLES)
        .filter(|p| level_of(format, *p) == level)
        .collect()
}

/// Pages that entries of this format can name.
pub(super) fn nameable(format: Format) -> usize {
    if format == Format::Bits32 {
        POOL_LOW
    } else {
        POOL_LEN
    }
}

/// An entry for a table of a level.
pub(super) fn entry(rng: &mut Rng, format: Format, level: usize, f: Features, nxe: bool) -> u64 {
    let mut e = 0;
    if format == Format::Pae && level == 3 {
        let table = if chance(rng, 85) {
            pick(rng, &tables_of(format, 2))
        } else {
            below(rng, TABLES)
        };
        e |= POOL[table];
        e |= if chance(rng, 92) { P } else { 0 };
        e |= if chance(rng, 10) { 0x200 } else { 0 };
        e |= if chance(rng, 2) { W } else { 0 };
        return e;
    }
    // Each access needs all levels, so the upper ones deny less.
    let odds = if level == 1 {
        [
            (P, 94),
            (W, 82),
            (U, 78),
            (A, 60),
            (D, 45),
            (0x200, 10),
            (0x800, 5),
        ]
    } else {
        [
            (P, 98),
            (W, 95),
            (U, 94),
            (A, 60),
            (D, 45),
            (0x200, 10),
            (0x800, 5),
        ]
    };
    for (bit, percent) in odds {
        e |= if chance(rng, percent) { bit } else { 0 };
    }
    let has_large = match (format, level) {
        (Format::Bits32, 2) => f.pse36,
        (_, 2) => true,
        (Format::Long, 3) => f.gbpages,
        _ => false,
    };
    let large = has_large && chance(rng, if level == 2 { 18 } else { 10 });
    if large {
        e |= PS;
        let high = if (rng.number() >> 40) & 1 == 1 {
            at::HIGH
        } else {
            0
        };
        e |= match (format, level) {
            (Format::Bits32, _) => high >> 19,
            (_, 2) => high | pick(rng, &[0, 0x20_0000]),
            _ => high,
        };
    } else if level == 1 {
        let page = if chance(rng, 75) {
            TABLES + below(rng, nameable(format) - TABLES)
        } else {
            below(rng, TABLES)
        };
        e |= POOL[page];
    } else {
        let page = match below(rng, 20) {
            0..=16 => pick(rng, &tables_of(format, level - 1)),
            17 | 18 => below(rng, TABLES),
            _ => below(rng, nameable(format)),
        };
        e |= POOL[page];
    }
    if large || level == 1 {
        e |= if chance(rng, 25) { G } else { 0 };
        if format == Format::Long && f.pku {
            e |= ((rng.number() >> 30) & 15) << 59;
        }
    }
    if format != Format::Bits32 {
        let nx = match (nxe, level) {
            (true, 1) => 10,
            (true, _) => 3,
            _ => 2,
        };
        e |= if chance(rng, nx) { NX } else { 0 };
        if chance(rng, 2) {
            e |= 1 << (u32::from(f.maxphyaddr) + below(rng, (52 - f.maxphyaddr).into()) as u32);
        }
        if format == Format::Pae && chance(rng, 1) {
            e |= 1 << (52 + below(rng, 11));
        }
    }
    if large && chance(rng, 4) {
        e |= 1 << (13 + below(rng, if format == Format::Bits32 { 9 } else { 8 }));
    }
    e
}

/// The indices that matter in a page that may be a table of any level.
pub(super) fn all_indices(format: Format) -> &'static [u64] {
    match format {
        Format::Bits32 => &[0, 1, 2, 1023],
        Format::Pae => &[0, 1, 3, 511],
        Format::Long => &[0, 1, 511],
    }
}

/// The state from which a program begins.
pub(super) fn setup(rng: &mut Rng, format: Format, f: Features, avoid: Avoid) -> Setup {
    let mut cr4 = 0;
    for (bit, there, percent) in [
        (PGE, true, 70),
        (SMEP, f.smep, 30),
        (SMAP, f.smap, 30),
        (PKE, f.pku && format == Format::Long, 50),
        (PCIDE, f.pcid && format == Format::Long, 50),
        (cr::PAE, format != Format::Bits32, 100),
        (cr::PSE, f.pse36 && format == Format::Bits32, 65),
    ] {
        if there && chance(rng, percent) {
            cr4 |= bit;
        }
    }
    let mut cr0 = CR0;
    if chance(rng, 75) || (avoid.smap_without_wp && cr4 & SMAP != 0) {
        cr0 |= cr::WP;
    }
    if format == Format::Long || chance(rng, 90) {
        cr0 |= cr::PG;
    }
    let nxe = f.nx && format != Format::Bits32 && chance(rng, 75);
    let efer = if nxe { cr::NXE } else { 0 }
        | if format == Format::Long {
            cr::LME | cr::LMA
        } else {
            0
        };
    let mut pool: Vec<Vec<u8>> = (0..POOL_LEN).map(|i| data_page(rng, i)).collect();
    let size = format.entry() as usize;
    for (page, bytes) in pool.iter_mut().enumerate().take(TABLES) {
        let level = level_of(format, page);
        bytes.fill(0);
        for i in indices(format)[level - 1] {
            let mut e = entry(rng, format, level, f, nxe);
            if format == Format::Pae && level == 3 {
                e &= !W;
            }
            let at = *i as usize * size;
            bytes[at..at + size].copy_from_slice(&e.to_le_bytes()[..size]);
        }
        if page < ROOTS {
            let own = super::code::root_entry(format).to_le_bytes();
            bytes[..size].copy_from_slice(&own[..size]);
        }
    }
    let pages = at::linear_pages(format);
    Setup {
        format,
        cr0,
        cr3: POOL[below(rng, ROOTS)],
        cr4,
        efer,
        ldt: pick(rng, &pages),
        pool,
        features: f,
        avoid,
    }
}

/// A page with code at its begin and end, descriptors, and its number everywhere else.
pub(super) fn data_page(rng: &mut Rng, id: usize) -> Vec<u8> {
    let id = id as u8 + 0x40;
    let mut page = vec![0; PAGE];
    for i in (0x10..PAGE).step_by(16) {
        page[i..i + 4].copy_from_slice(&[0, 0, id, id]);
        page[i + 8] = (i >> 4) as u8 & 0xfe;
    }
    for d in 0..16 {
        let i = 0x100 + 8 * d;
        rng.fill(&mut page[i..i + 8]);
        page[i + 5] |= 0x10;
    }
    page[..3].copy_from_slice(&[id, 0xcd, 0x80]);
    page[0xff0..0xff4].copy_from_slice(&[0xb0, id, 0xcd, 0x80]);
    page[0xfff] = 0xb0;
    page
}
