// SPDX-License-Identifier: GPL-2.0

//! How many tables and leaves a VM has: for its statistics.

use super::ept::Level;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;

/// What is linked under a root, and what was taken out of there and is not freed yet.
pub(crate) struct Counts {
    /// By the level's number.
    leaves: [AtomicU64; 4],
    tables: AtomicU64,
}

/// The place of a level that has leaves.
#[inline]
fn index(level: Level) -> usize {
    usize::from(level.number()) & 3
}

impl Counts {
    /// A root alone.
    pub(super) const fn new() -> Self {
        Self {
            leaves: [const { AtomicU64::new(0) }; 4],
            tables: AtomicU64::new(1),
        }
    }

    /// A leaf was put where nothing was.
    #[inline]
    pub(super) fn leaf_made(&self, level: Level) {
        self.leaves[index(level)].fetch_add(1, Ordering::Relaxed);
    }

    /// A table was linked.
    #[inline]
    pub(super) fn table_linked(&self) {
        self.tables.fetch_add(1, Ordering::Relaxed);
    }

    /// A leaf became a table of leaves of the level below.
    pub(super) fn leaf_split(&self, level: Level, below: Level) {
        self.leaves[index(level)].fetch_sub(1, Ordering::Relaxed);
        self.leaves[index(below)].fetch_add(512, Ordering::Relaxed);
        self.table_linked();
    }

    /// All this is gone.
    pub(super) fn gone(&self, tally: &Tally) {
        for (count, gone) in self.leaves.iter().zip(tally.leaves) {
            if gone != 0 {
                count.fetch_sub(gone, Ordering::Relaxed);
            }
        }
        if tally.tables != 0 {
            self.tables.fetch_sub(tally.tables, Ordering::Relaxed);
        }
    }

    /// How many leaves of a level there are.
    pub(crate) fn leaves(&self, level: Level) -> u64 {
        self.leaves[index(level)].load(Ordering::Relaxed)
    }

    /// How many tables there are, the root included.
    pub(crate) fn tables(&self) -> u64 {
        self.tables.load(Ordering::Relaxed)
    }
}

/// What was taken out.
pub(super) struct Tally {
    leaves: [u64; 4],
    tables: u64,
}

impl Tally {
    /// Nothing.
    pub(super) const fn new() -> Self {
        Self {
            leaves: [0; 4],
            tables: 0,
        }
    }

    /// And so many leaves.
    #[inline]
    pub(super) fn add_leaves(&mut self, level: Level, n: u64) {
        let count = &mut self.leaves[index(level)];
        *count = count.wrapping_add(n);
    }

    /// And a table.
    pub(super) fn add_table(&mut self) {
        self.tables = self.tables.wrapping_add(1);
    }
}
