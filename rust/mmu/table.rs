// SPDX-License-Identifier: GPL-2.0

//! A page of 512 entries, and how one finds the next: the only place that makes references out of
//! physical addresses.

use super::counts::Tally;
use super::ept::Entry;
use super::ept::Level;
use super::ept::LogBy;
use crate::bindings;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::prelude::*;

/// The words of a table. The processor reads them, and sets accessed and dirty flags, at any time.
pub(super) struct Words([AtomicU64; 512]);

impl Words {
    /// The word for `gfn` in a table of `level`.
    #[inline]
    pub(super) fn at(&self, level: Level, gfn: u64) -> Word<'_> {
        // The index is below 512 and the compiler knows it: there is no check left.
        Word(&self.0[level.index(gfn) & 511])
    }

    /// The word with a number, of which the lowest nine bits count.
    #[inline]
    pub(super) fn word(&self, index: usize) -> Word<'_> {
        Word(&self.0[index & 511])
    }

    /// How many entries are not present, from that for `gfn` on in a table of `level`, and round to
    /// it again: 512 if the table is empty.
    pub(super) fn absent_from(&self, level: Level, gfn: u64) -> usize {
        let start = level.index(gfn);
        let present = |n: &usize| self.0[start.wrapping_add(*n) & 511].load(Ordering::Relaxed) != 0;
        (0..self.0.len()).find(present).unwrap_or(self.0.len())
    }

    /// How many words there are.
    pub(super) const fn len(&self) -> usize {
        self.0.len()
    }

    /// All words.
    pub(super) fn iter(&self) -> impl Iterator<Item = Word<'_>> {
        self.0.iter().map(Word)
    }
}

/// One entry's word.
#[derive(Clone, Copy)]
pub(super) struct Word<'a>(&'a AtomicU64);

impl<'a> Word<'a> {
    /// The entry at this moment; a table that it points to is seen as it was linked.
    #[inline]
    pub(super) fn get(self) -> Entry {
        Entry::from_bits(self.0.load(Ordering::Acquire))
    }

    /// Makes it `new` if it is `old`; otherwise, what it is.
    #[inline]
    pub(super) fn change(self, old: Entry, new: Entry) -> Result<(), Entry> {
        self.0
            .compare_exchange(old.bits(), new.bits(), Ordering::SeqCst, Ordering::Acquire)
            .map(|_| ())
            .map_err(Entry::from_bits)
    }

    /// Makes it not present and returns what it was, flags included that came in last.
    #[inline]
    pub(super) fn clear(self) -> Entry {
        Entry::from_bits(self.0.swap(Entry::NONE.bits(), Ordering::SeqCst))
    }

    /// Clears the accessed flag and returns the entry before.
    #[inline]
    pub(super) fn age(self) -> Entry {
        Entry::from_bits(self.0.fetch_and(Entry::OLD, Ordering::SeqCst))
    }
}

impl Word<'_> {
    /// The bits, of an entry of any format.
    #[inline]
    pub(super) fn bits(self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets them. What was written before is seen by who finds them.
    #[inline]
    pub(super) fn put(self, bits: u64) {
        self.0.store(bits, Ordering::Release);
    }

    /// Clears some of them; returns what they all were.
    #[inline]
    pub(super) fn clear_bits(self, bits: u64) -> u64 {
        self.0.fetch_and(!bits, Ordering::SeqCst)
    }

    /// Makes the next write through a leaf be noticed; returns if it would not have been. It is only
    /// sure to be once the vCPUs' translations have been flushed.
    #[inline]
    pub(super) fn watch_writes(self, by: LogBy) -> bool {
        let mark = Entry::write_mark(by);
        // Most are watched already when the same pages are collected again and again.
        self.get().bits() & mark != 0 && self.0.fetch_and(!mark, Ordering::SeqCst) & mark != 0
    }
}

/// A table that is owned: not linked anywhere, or a root.
///
/// Dropping it frees this one page. The tables that its entries point to are not its business:
/// [`Table::free_tree`] frees those too.
///
/// # Invariants
///
/// `va` is a page from `rkvm_table_alloc` that nobody else frees.
pub(super) struct Table {
    va: NonNull<Words>,
}

// SAFETY: The page belongs to nobody's thread.
unsafe impl Send for Table {}
// SAFETY: Shared references give access to atomics only.
unsafe impl Sync for Table {}

impl Table {
    /// Allocates an empty table: ENOMEM. Sleeps.
    pub(super) fn new() -> Result<Self> {
        // SAFETY: The caller may sleep.
        let va = unsafe { bindings::rkvm_table_alloc() };
        // INVARIANT: Allocated just now.
        Ok(Self {
            va: NonNull::new(va.cast()).ok_or(ENOMEM)?,
        })
    }

    /// Its physical address.
    #[inline]
    pub(super) fn phys(&self) -> u64 {
        // SAFETY: By the invariant it is a page of the direct map.
        unsafe { bindings::rkvm_table_phys(self.va.as_ptr().cast()) }
    }

    /// Gives up the ownership: the page now belongs to whoever has the entry.
    #[inline]
    pub(super) fn into_entry(self) -> Entry {
        let entry = Entry::table(self.phys());
        core::mem::forget(self);
        entry
    }

    /// Takes the ownership back.
    ///
    /// # Safety
    ///
    /// `entry` is from [`into_entry`](Self::into_entry), is linked nowhere any more, and is taken
    /// back this once.
    pub(super) unsafe fn from_entry(entry: Entry) -> Self {
        // SAFETY: The entry holds the address of a page of the direct map.
        let va = unsafe { bindings::rkvm_table_virt(entry.phys()) };
        // INVARIANT: The page was given up to the entry, and the caller has that.
        Self {
            // SAFETY: An address in the direct map is not null.
            va: unsafe { NonNull::new_unchecked(va.cast()) },
        }
    }

    /// The table that an entry points to.
    ///
    /// # Safety
    ///
    /// `entry` is from [`into_entry`](Self::into_entry), and the page is not freed during `'a`.
    #[inline]
    pub(super) unsafe fn peek<'a>(entry: Entry) -> &'a Words {
        // SAFETY: The entry holds the address of a page of the direct map, which is a table and
        // stays one during `'a`, by the function's requirement.
        unsafe { &*bindings::rkvm_table_virt(entry.phys()).cast::<Words>() }
    }

    /// Frees this table of `level` and all that it leads to, and adds it to `gone`.
    ///
    /// # Safety
    ///
    /// No walk, of software or of a processor, can be in these tables or come into them.
    pub(super) unsafe fn free_tree(self, level: Level, may_sleep: bool, gone: &mut Tally) {
        let mut leaves = 0u64;
        for word in self.iter() {
            let entry = word.get();
            if let (Some(below), false) = (level.below(), entry.is_leaf(level)) {
                if entry.is_present() {
                    // SAFETY: The entry is a table's, and goes with `self`.
                    let child = unsafe { Self::from_entry(entry) };
                    // SAFETY: As for `self`. The recursion ends: each level is one lower.
                    unsafe { child.free_tree(below, may_sleep, gone) };
                }
            } else {
                leaves = leaves.wrapping_add(entry.is_present().into());
            }
        }
        gone.add_leaves(level, leaves);
        gone.add_table();
        drop(self);
        if may_sleep {
            crate::linux::mm::cond_resched();
        }
    }

    /// Fills the table, which is of `level`, with leaves that map what `leaf` of the level above maps.
    pub(super) fn fill_with_parts(&mut self, leaf: Entry, level: Level) {
        for (index, word) in (0..).zip(&self.0) {
            // Linking publishes them.
            word.store(leaf.part(level, index).bits(), Ordering::Relaxed);
        }
    }

    /// A word of the page's owner, beside its contents: see [`super::tables::Detached`].
    pub(super) fn link(&self) -> u64 {
        // SAFETY: By the invariant it is a page of ours.
        unsafe { bindings::rkvm_table_link(self.va.as_ptr().cast()) }
    }

    /// Sets the owner's word.
    pub(super) fn set_link(&mut self, link: u64) {
        // SAFETY: By the invariant it is a page of ours.
        unsafe { bindings::rkvm_table_set_link(self.va.as_ptr().cast(), link) };
    }
}

impl Deref for Table {
    type Target = Words;

    #[inline]
    fn deref(&self) -> &Words {
        // SAFETY: By the invariant it is a page of 512 words, which were zeroed when allocated.
        unsafe { self.va.as_ref() }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: By the invariant it is ours to free.
        unsafe { bindings::rkvm_table_free(self.va.as_ptr().cast()) };
    }
}
