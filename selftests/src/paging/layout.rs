// SPDX-License-Identifier: GPL-2.0

//! Where everything of a paging program lies, in guest-physical and in linear memory.
//!
//! The first 2 MiB (4 MiB with 4-byte entries) of linear memory are the dispatcher's: the tables that map them belong to
//! no program, but hang below the first entry of each of its roots. They show each page of the [`POOL`] at
//! [`alias`], where supervisor code can always write it.
//!
//! The pool is what programs use, as tables, as data or as both. Six of its pages lie at the corners of 4 MiB, so
//! that pages of every size with frame 0 show them at the places where the linear pages of programs are.

use super::op::Format;

/// Bytes of the first slot, at 0.
pub const LOW: usize = 0x40_0000;
/// Where the second slot begins, of as many bytes: above 4 GiB.
pub const HIGH: u64 = 0x1_0000_0000;

/// The dispatcher, and the code of operations for supervisor mode; 16 KiB.
pub const CODE: u64 = 0x1_0000;
/// The code of operations for user mode; 8 KiB.
pub const CODE_USER: u64 = 0x1_4000;
/// The global descriptor table.
pub const GDT: u64 = 0x1_8000;
/// The interrupt descriptor table.
pub const IDT: u64 = 0x1_9000;
/// The task state segment.
pub const TSS: u64 = 0x1_a000;
/// The dispatcher's variables.
pub const STATE: u64 = 0x1_b000;
/// The first address above the dispatcher's stack.
pub const STACK: u64 = 0x1_d000;
/// A stub of 16 bytes for each vector that is used.
pub const STUBS: u64 = 0x1_e000;
/// Long mode's directory pointer table for the dispatcher's memory.
pub const OWN_PDPT: u64 = 0x2_0000;
/// The directory for the dispatcher's memory, of 8-byte entries.
pub const OWN_PD: u64 = 0x2_1000;
/// The page table for the dispatcher's memory, of 8-byte entries.
pub const OWN_PT: u64 = 0x2_2000;
/// The same, of 4-byte entries.
pub const OWN_PT32: u64 = 0x2_3000;
/// The compiled operations.
pub const OPS: u64 = 0x3_0000;
/// Bytes of an operation.
pub const OP_SIZE: u64 = 128;
/// What the operations saw.
pub const LOG: u64 = 0x4_0000;
/// Bytes of what one operation saw.
pub const LOG_SIZE: u64 = 64;
/// The most operations of a program, with the one that ends it.
pub const MAX_OPS: usize = 512;
/// Operands of INVPCID, 16 bytes for each operation.
pub const OPERANDS: u64 = 0x4_8000;
/// The end of what the dispatcher uses.
pub const OWN_END: u64 = 0x5_0000;
/// Pages of the pool are shown from here on, in linear memory.
pub const ALIASES: u64 = 0x18_0000;

/// Selectors.
pub mod sel {
    #![allow(missing_docs)]
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE: u16 = 0x18 | 3;
    pub const USER_DATA: u16 = 0x20 | 3;
    pub const TSS: u16 = 0x28;
    pub const LDT: u16 = 0x38;
}

const fn corners(base: u64) -> [u64; 6] {
    [
        base,
        base + 0x1000,
        base + 0x1f_f000,
        base + 0x20_0000,
        base + 0x20_1000,
        base + 0x3f_f000,
    ]
}

const LOW_CORNERS: [u64; 6] = corners(0);
const HIGH_CORNERS: [u64; 6] = corners(HIGH);

/// The number of pages of the pool.
pub const POOL_LEN: usize = 26;

/// The pages that programs use: the first [`ROOTS`] are roots of tables.
pub const POOL: [u64; POOL_LEN] = {
    let mut p = [0; POOL_LEN];
    let mut i = 0;
    while i < 14 {
        p[i] = 0x10_0000 + 0x1000 * i as u64;
        i += 1;
    }
    i = 0;
    while i < 6 {
        p[14 + i] = LOW_CORNERS[i];
        p[20 + i] = HIGH_CORNERS[i];
        i += 1;
    }
    p
};

/// How many pages of the pool are roots.
pub const ROOTS: usize = 3;
/// The pages of the pool that begin as tables: those and the roots.
pub const TABLES: usize = 9;
/// The pages of the pool below 4 GiB.
pub const POOL_LOW: usize = 20;

/// Where a page of the pool is always shown to supervisor mode.
#[must_use]
pub fn alias(page: usize) -> u64 {
    ALIASES + 0x1000 * page as u64
}

/// The page of the pool at a guest-physical address.
#[must_use]
pub fn pool_index(gpa: u64) -> Option<usize> {
    let page = gpa & !0xfff;
    if (0x10_0000..0x10_e000).contains(&page) {
        return usize::try_from((page - 0x10_0000) >> 12).ok();
    }
    let (base, corner) = if page < LOW as u64 {
        (14, page)
    } else if page >= HIGH {
        (20, page - HIGH)
    } else {
        return None;
    };
    LOW_CORNERS
        .iter()
        .position(|&c| c == corner)
        .map(|i| base + i)
}

/// The indices that the linear pages of programs use, by level, the lowest first.
#[must_use]
pub fn indices(format: Format) -> &'static [&'static [u64]] {
    match format {
        Format::Bits32 => &[&[0, 1, 1023], &[1, 2, 1023]],
        Format::Pae => &[&[0, 1, 511], &[0, 1], &[1, 3]],
        Format::Long => &[&[0, 1, 511], &[0, 1], &[0, 1], &[1, 511]],
    }
}

/// The linear pages that programs use.
#[must_use]
pub fn linear_pages(format: Format) -> Vec<u64> {
    let bits = format.index_bits();
    let mut pages = vec![0u64];
    for (level, all) in indices(format).iter().enumerate().rev() {
        let shift = 12 + bits * level as u32;
        pages = pages
            .iter()
            .flat_map(|p| all.iter().map(move |i| p | (i << shift)))
            .collect();
    }
    if format == Format::Long {
        for p in &mut pages {
            if *p >> 47 != 0 {
                *p |= 0xffff_0000_0000_0000;
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_found() {
        for (i, gpa) in POOL.iter().enumerate() {
            assert_eq!(pool_index(*gpa), Some(i), "{gpa:#x}");
            assert_eq!(pool_index(*gpa + 0xfff), Some(i));
        }
        for gpa in [CODE, OWN_PT, LOG, 0x10_e000, 0x4000_0000, HIGH + 0x2000] {
            assert_eq!(pool_index(gpa), None);
        }
    }

    #[test]
    fn linear_pages_are_canonical() {
        assert_eq!(linear_pages(Format::Bits32).len(), 9);
        assert_eq!(linear_pages(Format::Pae).len(), 12);
        let long = linear_pages(Format::Long);
        assert_eq!(long.len(), 24);
        assert!(long.iter().all(|p| ((*p as i64) << 16) >> 16 == *p as i64));
    }
}
