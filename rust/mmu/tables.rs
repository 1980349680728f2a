// SPDX-License-Identifier: GPL-2.0

//! The tables of a VM as one structure.
//!
//! Who may do what is in the types: with `&Tables` (the MMU lock held for reading) entries appear,
//! grow, age and are watched for writes, atomically and in parallel, and large leaves are split into
//! small ones that map the same; with `&mut Tables` (held for writing) they go. A table that is linked
//! therefore stays as long as anybody has a `&Tables`.

use super::counts::Counts;
use super::counts::Tally;
use super::ept::Access;
use super::ept::Entry;
use super::ept::Format;
use super::ept::Level;
use super::ept::LogBy;
use super::table::Table;
use super::table::Word;
use super::table::Words;
use core::ops::Range;
use kernel::prelude::*;

/// A leaf that shall be there.
pub(super) struct Want {
    /// Any guest frame in it.
    pub(super) gfn: u64,
    /// Its level.
    pub(super) level: Level,
    /// The leaf.
    pub(super) entry: Entry,
    /// What it is for.
    pub(super) access: Access,
}

/// How an attempt to install a leaf ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The guest can do what it wants to.
    Mapped,
    /// A table is missing, and there was none to spare.
    NeedTable,
    /// There is a table where the leaf should go.
    TableInTheWay,
    /// There is another leaf, which does not allow the access.
    LeafInTheWay,
    /// There is a larger leaf, which does not allow the access.
    LargeLeafInTheWay,
}

/// What [`Tables::watch_writes`] came to.
pub(super) struct Watched {
    /// A leaf has changed: the vCPUs' translations must be flushed before anybody relies on it.
    pub(super) changed: bool,
    /// The first frame that is not done, if there is one: a large leaf maps it, and is to be split.
    pub(super) large: Option<u64>,
}

/// Where a frame's small leaf is.
enum Small<'a> {
    /// In this table.
    Table(&'a Words),
    /// A large leaf maps the frame.
    Large,
    /// Nothing of what an entry of this level spans is mapped.
    Absent(Level),
}

/// The tables under one root.
pub(super) struct Tables {
    root: Table,
    format: Format,
    counts: Counts,
}

impl Tables {
    /// Empty tables: ENOMEM.
    pub(super) fn new(format: Format) -> Result<Self> {
        Ok(Self {
            root: Table::new()?,
            format,
            counts: Counts::new(),
        })
    }

    /// The EPTP for them.
    pub(super) fn eptp(&self) -> u64 {
        self.format.eptp(self.root.phys())
    }

    /// How many there are.
    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Installs a leaf, if that takes nothing away: where there is nothing yet, or a leaf of which
    /// the new one is a more permissive version. A table that is needed comes out of `spare`.
    pub(super) fn install(&self, want: &Want, spare: &mut Option<Table>) -> Outcome {
        let mut level = self.format.top;
        let mut words: &Words = &self.root;
        loop {
            let word = words.at(level, want.gfn);
            let mut entry = word.get();
            if level == want.level {
                return self.install_leaf(word, entry, want);
            }
            if entry.is_leaf(level) {
                return if entry.allows(want.access) {
                    Outcome::Mapped
                } else {
                    Outcome::LargeLeafInTheWay
                };
            }
            if !entry.is_present() {
                let Some(table) = spare.take() else {
                    return Outcome::NeedTable;
                };
                let new = table.into_entry();
                if word.change(entry, new).is_err() {
                    // Someone was faster: take what is there now.
                    // SAFETY: `new` has just been made and was not linked.
                    *spare = Some(unsafe { Table::from_entry(new) });
                    continue;
                }
                self.counts.table_linked();
                entry = new;
            }
            let Some(below) = level.below() else {
                // `want.level` is at least the lowest, so the loop ended before.
                return Outcome::LeafInTheWay;
            };
            // SAFETY: A table's entry, linked when it was read; it is not freed while `self` is
            // borrowed.
            words = unsafe { Table::peek(entry) };
            level = below;
        }
    }

    fn install_leaf(&self, word: Word<'_>, mut old: Entry, want: &Want) -> Outcome {
        loop {
            let new = if !old.is_present() {
                want.entry
            } else if !old.is_leaf(want.level) {
                return Outcome::TableInTheWay;
            } else {
                match old.grown_by(want.entry) {
                    // Another vCPU's fault was for the same.
                    Some(grown) if grown == old => return Outcome::Mapped,
                    Some(grown) => grown,
                    None => return Outcome::LeafInTheWay,
                }
            };
            match word.change(old, new) {
                Ok(()) => {
                    if !old.is_present() {
                        self.counts.leaf_made(want.level);
                    }
                    return Outcome::Mapped;
                }
                Err(now) => old = now,
            }
        }
    }

    /// Removes what keeps `want` from being installed.
    pub(super) fn make_way(&mut self, want: &Want, detached: &mut Detached) {
        let mut level = self.format.top;
        let mut words: &Words = &self.root;
        loop {
            let word = words.at(level, want.gfn);
            let entry = word.get();
            if !entry.is_present() {
                return;
            }
            let here = level == want.level || entry.is_leaf(level);
            match level.below() {
                Some(below) if !here => {
                    // SAFETY: A table's entry, linked; nobody else frees it during `&mut self`.
                    words = unsafe { Table::peek(entry) };
                    level = below;
                }
                _ => {
                    Self::remove(word, level, detached);
                    return;
                }
            }
        }
    }

    /// Removes all leaves that map any of the frames `gfns`, and tables that are empty then.
    ///
    /// It looks at 7000 words at most, however large the range: only at its ends are tables
    /// looked into.
    pub(super) fn zap(&mut self, gfns: Range<u64>, detached: &mut Detached) {
        let end = gfns.end.min(self.format.gfn_limit);
        Self::zap_in(&self.root, self.format.top, gfns.start..end, detached);
    }

    fn zap_in(words: &Words, level: Level, gfns: Range<u64>, detached: &mut Detached) {
        let entries = level.entries(&gfns);
        detached.looked_at = detached.looked_at.saturating_add(entries);
        let Some(below) = level.below() else {
            for gfn in gfns {
                // By name, so that the compiler knows the level: most of the work is here.
                let word = words.at(Level::Page4K, gfn);
                if word.get().is_present() {
                    Self::remove(word, Level::Page4K, detached);
                }
            }
            return;
        };
        for_entries(words, level, gfns, &mut |word, entry, part: Range<u64>| {
            let whole = part.end.wrapping_sub(part.start) == level.pages();
            if !whole && !entry.is_leaf(level) {
                // SAFETY: A table's entry, linked; the caller has `&mut Tables`, so nobody frees
                // it meanwhile, and this does so only when it is done with it.
                let table = unsafe { Table::peek(entry) };
                let (end, removed) = (part.end, detached.removed);
                Self::zap_in(table, below, part, detached);
                if detached.removed == removed && !detached.thorough {
                    return;
                }
                // Neighbours come and go together: if there is anything left, it is most likely
                // what follows, or what is first in the table.
                let absent = table.absent_from(below, end);
                detached.looked_at = detached.looked_at.saturating_add(absent as u64);
                if absent < table.len() {
                    return;
                }
            }
            Self::remove(word, level, detached);
        });
    }

    /// Takes an entry of a table of `level` away, with all below it.
    #[inline(always)]
    fn remove(word: Word<'_>, level: Level, detached: &mut Detached) {
        let entry = word.clear();
        detached.removed = detached.removed.wrapping_add(1);
        if let (Some(below), false) = (level.below(), entry.is_leaf(level)) {
            // SAFETY: A table's entry that was linked until now, and here alone.
            detached.push(unsafe { Table::from_entry(entry) }, below);
        } else {
            detached.gone.add_leaves(level, 1);
        }
    }

    fn small(&self, gfn: u64) -> Small<'_> {
        let mut level = self.format.top;
        let mut words: &Words = &self.root;
        while let Some(below) = level.below() {
            let entry = words.at(level, gfn).get();
            if !entry.is_present() {
                return Small::Absent(level);
            }
            if entry.is_leaf(level) {
                return Small::Large;
            }
            // SAFETY: A table's entry, linked when it was read; it is not freed while `self` is
            // borrowed.
            words = unsafe { Table::peek(entry) };
            level = below;
        }
        Small::Table(words)
    }

    /// Makes the next write to each of `gfns` be noticed, up to the first large leaf.
    pub(super) fn watch_writes(&self, gfns: Range<u64>) -> Watched {
        let mut gfn = gfns.start;
        let mut changed = false;
        while gfn < gfns.end {
            match self.small(gfn) {
                Small::Large => {
                    let large = Some(gfn);
                    return Watched { changed, large };
                }
                Small::Absent(level) => gfn = (gfn | level.mask()).saturating_add(1),
                Small::Table(words) => {
                    let next = (gfn | Level::Page2M.mask()).saturating_add(1).min(gfns.end);
                    for gfn in gfn..next {
                        changed |= words
                            .at(Level::Page4K, gfn)
                            .watch_writes(self.format.log_by);
                    }
                    gfn = next;
                }
            }
        }
        Watched {
            changed,
            large: None,
        }
    }

    /// Makes the next write to anything that a large leaf maps, which `gfn` is in, be noticed, where
    /// there is no memory to split it. Returns if anything changed.
    pub(super) fn watch_large(&self, gfn: u64) -> bool {
        let mut changed = false;
        self.for_leaves(gfn..gfn.saturating_add(1), &mut |word, _| {
            // The processor's log has room for one page of a leaf only.
            changed |= word.watch_writes(LogBy::Protection);
        });
        changed
    }

    /// Replaces the large leaf that maps `gfn`, if there is one, by a table of leaves that map the
    /// same and allow as much. `spare` becomes the table, and is still there if there was nothing to
    /// split.
    ///
    /// Translations that processors have of the large leaf remain good until one of the new leaves
    /// changes for the worse; the flush that this needs takes them along.
    pub(super) fn split(&self, gfn: u64, spare: &mut Option<Table>) {
        let mut level = self.format.top;
        let mut words: &Words = &self.root;
        while let Some(below) = level.below() {
            let word = words.at(level, gfn);
            let entry = word.get();
            if !entry.is_present() {
                return;
            }
            if !entry.is_leaf(level) {
                // SAFETY: A table's entry, linked when it was read; it is not freed while `self` is
                // borrowed.
                words = unsafe { Table::peek(entry) };
                level = below;
                continue;
            }
            let Some(mut table) = spare.take() else {
                return;
            };
            table.fill_with_parts(entry, below);
            let new = table.into_entry();
            if word.change(entry, new).is_ok() {
                self.counts.leaf_split(level, below);
                return;
            }
            // The processor has set a flag meanwhile, or someone was faster.
            // SAFETY: `new` has just been made and was not linked.
            *spare = Some(unsafe { Table::from_entry(new) });
        }
    }

    /// Lets the guest write to `gfn` if only the dirty log kept it from that; returns if it may.
    pub(super) fn write_again(&self, gfn: u64) -> bool {
        let Small::Table(words) = self.small(gfn) else {
            return false;
        };
        let word = words.at(Level::Page4K, gfn);
        let mut entry = word.get();
        while let Some(written) = entry.written(self.format.ad) {
            match word.change(entry, written) {
                Ok(()) => return true,
                Err(now) => entry = now,
            }
        }
        false
    }

    /// Removes the table of small leaves that maps `gfn`'s 2 MiB, if there is one.
    pub(super) fn remove_small(&mut self, gfn: u64, detached: &mut Detached) {
        let mut level = self.format.top;
        let mut words: &Words = &self.root;
        while let Some(below) = level.below() {
            let word = words.at(level, gfn);
            let entry = word.get();
            if !entry.is_present() || entry.is_leaf(level) {
                return;
            }
            if level == Level::Page2M {
                Self::remove(word, level, detached);
                return;
            }
            // SAFETY: A table's entry, linked; nobody else frees it during `&mut self`.
            words = unsafe { Table::peek(entry) };
            level = below;
        }
    }

    /// Clears the accessed flags of the leaves that map any of `gfns`; returns if any was set.
    pub(super) fn clear_young(&self, gfns: Range<u64>) -> bool {
        let mut young = false;
        self.for_leaves(gfns, &mut |word, entry| {
            if entry.is_young(self.format.ad) {
                young |= word.age().is_young(self.format.ad);
            }
        });
        young
    }

    /// Returns if the accessed flag of a leaf that maps any of `gfns` is set.
    pub(super) fn test_young(&self, gfns: Range<u64>) -> bool {
        let mut young = false;
        self.for_leaves(gfns, &mut |_, entry| {
            young |= entry.is_young(self.format.ad)
        });
        young
    }

    fn for_leaves(&self, gfns: Range<u64>, f: &mut dyn FnMut(Word<'_>, Entry)) {
        let end = gfns.end.min(self.format.gfn_limit);
        Self::for_leaves_in(&self.root, self.format.top, gfns.start..end, f);
    }

    fn for_leaves_in(
        words: &Words,
        level: Level,
        gfns: Range<u64>,
        f: &mut dyn FnMut(Word<'_>, Entry),
    ) {
        for_entries(words, level, gfns, &mut |word, entry, part| {
            match level.below() {
                // SAFETY: A table's entry; the caller has `&Tables`, so it stays.
                Some(below) if !entry.is_leaf(level) => unsafe {
                    Self::for_leaves_in(Table::peek(entry), below, part, f);
                },
                _ => f(word, entry),
            }
        });
    }
}

/// Calls `f` for each present entry of a table of `level` that spans any of `gfns`, with the part of
/// `gfns` that it spans.
fn for_entries(
    words: &Words,
    level: Level,
    gfns: Range<u64>,
    f: &mut dyn FnMut(Word<'_>, Entry, Range<u64>),
) {
    let mut gfn = gfns.start;
    while gfn < gfns.end {
        let next = (gfn | level.mask()).saturating_add(1).min(gfns.end);
        let word = words.at(level, gfn);
        let entry = word.get();
        if entry.is_present() {
            f(word, entry, gfn..next);
        }
        gfn = next;
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        let Some(below) = self.format.top.below() else {
            return;
        };
        let mut gone = Tally::new();
        for word in self.root.iter() {
            let entry = word.clear();
            if entry.is_present() && !entry.is_leaf(self.format.top) {
                // SAFETY: A table's entry, that was linked here alone.
                let table = unsafe { Table::from_entry(entry) };
                // SAFETY: The VM goes: it has no vCPU that could walk them, and a CPU that cached
                // something of it flushes before it runs a vCPU under this root again (see tlb.rs).
                unsafe { table.free_tree(below, true, &mut gone) };
            }
        }
    }
}

/// Tables that have been taken out, to be freed once no processor can have them cached.
///
/// A list through the pages' own words, as there is nothing to allocate from where this happens.
#[must_use = "the tables would leak"]
pub(super) struct Detached {
    /// The first table's entry, with its level in bits 8:6; 0 if there is none.
    head: u64,
    /// How many entries were taken out: if any, translations must be flushed.
    removed: u64,
    /// Look for empty tables even where nothing was taken out.
    thorough: bool,
    /// How many words were looked at.
    looked_at: u64,
    /// Leaves that were taken out one by one; those of tables are counted when those are freed.
    gone: Tally,
}

/// After so many words the lock is to be released, so that it is not held for long.
const BATCH: u64 = 1024;

/// Where the level is in [`Detached`]'s links: entries of tables have nothing there.
const LEVEL_SHIFT: u32 = 6;
const LEVEL_MASK: u64 = 7 << LEVEL_SHIFT;

impl Detached {
    /// Nothing yet.
    pub(super) const fn new() -> Self {
        Self {
            head: 0,
            removed: 0,
            thorough: false,
            looked_at: 0,
            gone: Tally::new(),
        }
    }

    /// Returns if anything was taken out, so that there is something to flush.
    pub(super) const fn must_flush(&self) -> bool {
        self.removed != 0
    }

    /// From now on look for empty tables even where nothing is taken out: a fault that came too late
    /// may have left some.
    pub(super) fn be_thorough(&mut self) {
        self.thorough = true;
    }

    /// Returns if so much was done that the lock should be released.
    pub(super) const fn is_long(&self) -> bool {
        self.looked_at >= BATCH
    }

    fn push(&mut self, mut table: Table, level: Level) {
        table.set_link(self.head);
        self.head = table.into_entry().bits() | u64::from(level.number()) << LEVEL_SHIFT;
    }

    /// Frees the tables; returns all that is gone.
    ///
    /// # Safety
    ///
    /// If [`must_flush`](Self::must_flush), the vCPUs' translations were flushed since.
    pub(super) unsafe fn free(mut self, may_sleep: bool) -> Tally {
        let mut head = self.head;
        while head != 0 {
            let level = Level::from_number((head >> LEVEL_SHIFT & 7) as u8);
            // SAFETY: What `push` made of a table's entry, taken off the list.
            let table = unsafe { Table::from_entry(Entry::from_bits(head & !LEVEL_MASK)) };
            head = table.link();
            // SAFETY: No software walk comes here since the table was taken out under `&mut
            // Tables`, and no processor's since the flush.
            unsafe { table.free_tree(level, may_sleep, &mut self.gone) };
        }
        self.gone
    }
}
