// SPDX-License-Identifier: GPL-2.0

//! Tables that the guest writes to without an exit, and what its invalidations bring.
//!
//! A table of the lowest level that is written to more than once is *unsync*: it is writable, and
//! what the shadow says of it may be old. The processor's own rules are the licence: a change of
//! a table counts once the guest has invalidated what was there before. When it loads CR3, all
//! unsync tables below the new root are brought into accord with the guest's (and are
//! write-protected again); at INVLPG, the one entry is.
//!
//! Tables above the lowest level are never unsync: their entries say which pages are below.

use super::super::ept::Level;
use super::page::Handle;
use super::role::guest_entry;
use super::role::PRESENT;
use super::spte::Spte;
use super::Around;
use super::Shadow;

/// Entries of the guest's that are read at once, in bytes.
const CHUNK: usize = 512;

/// How many tables are brought into accord with the lock held.
pub(super) const BATCH: usize = 16;

/// Unsync tables below a root.
pub(super) struct Found {
    pages: [u32; BATCH],
    len: usize,
}

impl Found {
    pub(super) const fn new() -> Self {
        Self {
            pages: [0; BATCH],
            len: 0,
        }
    }

    pub(super) fn pages(&self) -> &[u32] {
        self.pages.get(..self.len).unwrap_or(&[])
    }

    fn push(&mut self, page: u32) {
        if let Some(place) = self.pages.get_mut(self.len) {
            *place = page;
            self.len = self.len.wrapping_add(1);
        }
    }

    pub(super) const fn is_full(&self) -> bool {
        self.len == BATCH
    }
}

/// How a frame stands to the guest's tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tracked {
    /// It is none, or may be written all the same.
    No,
    /// It is one of the lowest level, and can become unsync.
    Lowest,
    /// It must stay write-protected.
    Upper,
}

impl Shadow {
    /// Whether writes to a frame must be noticed.
    pub(super) fn tracked(&self, gfn: u64) -> Tracked {
        let mut tracked = Tracked::No;
        self.any_page(gfn, |_, page| {
            if page.is_direct() || page.unsync {
                return false;
            }
            tracked = match page.role.level {
                Level::Page4K => Tracked::Lowest,
                _ => Tracked::Upper,
            };
            tracked == Tracked::Upper
        });
        tracked
    }

    /// Whether a frame of the 2 MiB that `gfn` is in is a table of the guest's. Unsync ones count too: they must be
    /// able to be write-protected by the small page.
    pub(super) fn any_tracked(&self, gfn: u64) -> bool {
        self.frames.tables_near(gfn) != 0
    }

    /// Lets the guest write to a table of the lowest level.
    pub(super) fn unsync(&mut self, gfn: u64) {
        let mut number = self.frames.get(gfn).shadowed_by;
        while let Some(page) = self.pages.get_mut(number) {
            let (next, parents) = (page.next_same, page.parents);
            if !page.is_direct() && !page.unsync {
                page.unsync = true;
                self.counts.unsynced = self.counts.unsynced.wrapping_add(1);
                self.mark_all_above(parents);
            }
            number = next;
        }
    }

    /// There is an unsync table below an entry: its page, and those above, are to know.
    pub(super) fn mark_above(&mut self, handle: Handle) {
        if let Some(page) = self.pages.get_mut(handle.page()) {
            // The tables have four levels, so this ends.
            if page.mark_below(handle.index()) {
                let parents = page.parents;
                self.mark_all_above(parents);
            }
        }
    }

    fn mark_all_above(&mut self, first: Handle) {
        let mut handle = first;
        while let Some((page, index)) = self.pages.entry(handle) {
            let next = Handle::from_raw(page.link(index).next);
            self.mark_above(handle);
            handle = next;
        }
    }

    /// Collects unsync tables below a page, until there are enough.
    pub(super) fn find_unsync(&mut self, number: u32, found: &mut Found) {
        let Some(page) = self.pages.get(number) else {
            return;
        };
        if !page.has_unsync_below() {
            return;
        }
        for (word, first) in page.unsync_below.into_iter().zip((0usize..).step_by(64)) {
            let mut bits = word;
            while bits != 0 {
                let index = first.wrapping_add(bits.trailing_zeros() as usize);
                bits &= bits.wrapping_sub(1);
                if found.is_full() {
                    return;
                }
                if !self.find_unsync_at(Handle::new(number, index), found) {
                    if let Some(page) = self.pages.get_mut(number) {
                        page.clear_below(index);
                    }
                }
            }
        }
    }

    /// The same below an entry; returns if there may be any.
    fn find_unsync_at(&mut self, handle: Handle, found: &mut Found) -> bool {
        let Some(child) = self.child(handle) else {
            return false;
        };
        let Some(page) = self.pages.get(child) else {
            return false;
        };
        if page.unsync {
            found.push(child);
            return true;
        }
        self.find_unsync(child, found);
        self.pages
            .get(child)
            .is_some_and(|page| page.unsync || page.has_unsync_below())
    }

    /// Brings tables below these pages into accord with the guest's; returns if there may be more, for which the lock
    /// is to be released first.
    pub(super) fn sync_some(&mut self, around: &Around<'_>, pages: &[u32]) -> bool {
        let mut found = Found::new();
        for number in pages {
            self.find_unsync(*number, &mut found);
        }
        if !found.pages().is_empty() {
            self.sync(around, found.pages());
        }
        found.is_full()
    }

    /// Brings tables into accord with the guest's, and has further writes to them noticed.
    pub(super) fn sync(&mut self, around: &Around<'_>, pages: &[u32]) {
        let mut changed = self.owed;
        for number in pages {
            if let Some(gfn) = self.pages.get(*number).map(|page| page.gfn) {
                changed |= self.write_protect(gfn);
            }
        }
        // From here on nobody writes to them unnoticed.
        if changed {
            self.flush(around);
        }
        for number in pages {
            if let Some(page) = self.pages.get_mut(*number) {
                page.unsync = false;
                self.counts.synced = self.counts.synced.wrapping_add(1);
                self.refresh(around, *number);
            }
        }
    }

    /// Drops what of a table of the lowest level is not as the guest's has it.
    fn refresh(&mut self, around: &Around<'_>, number: u32) {
        let Some(page) = self.pages.get(number) else {
            return;
        };
        let (gfn, role) = (page.gfn, page.role);
        let size = role.entry_size();
        let per_chunk = CHUNK.wrapping_div(size as usize).max(1);
        let mut left = usize::from(page.present);
        let mut first = 0usize;
        while left != 0 && first < super::page::ENTRIES {
            let here = first..first.wrapping_add(per_chunk);
            first = here.end;
            let Some(page) = self.pages.get(number) else {
                return;
            };
            let is_present = |index: &usize| page.entry(*index).is_present();
            let present = here.clone().filter(is_present).count();
            if present == 0 {
                continue;
            }
            left = left.saturating_sub(present);
            let mut raw = [0; CHUNK];
            let gpa = (gfn << 12).wrapping_add(role.guest_offset(here.start));
            if !(around.peek)(gpa, &mut raw) {
                // The host has it elsewhere: it will be walked again.
                self.zap_page(number);
                return;
            }
            for (index, bytes) in here.zip(raw.chunks_exact(size as usize)) {
                self.refresh_entry(Handle::new(number, index), guest_entry(bytes));
            }
        }
    }

    /// Drops a leaf if it is not what this entry of the guest's says, or takes rights from it. Returns if nothing more is to
    /// be done for the guest to have what the entry says.
    fn refresh_entry(&mut self, handle: Handle, entry: u64) -> bool {
        let Some((page, index)) = self.pages.entry(handle) else {
            return true;
        };
        let spte = page.entry(index);
        if !spte.is_present() {
            return true;
        }
        let stays = page.role.leaf(entry).filter(|leaf| {
            leaf.gfn == page.link(index).key
                && leaf.rights.user == spte.is_user()
                && leaf.rights.exec == spte.is_exec()
                && (leaf.key == spte.key() || !spte.is_user())
        });
        match stays {
            None => {
                self.drop_entry(handle);
                entry & PRESENT == 0
            }
            Some(leaf) if !leaf.rights.write && spte.is_writable() => {
                page.table.word(index).clear_bits(Spte::ALL_WRITES);
                self.owed = true;
                true
            }
            Some(leaf) => !leaf.rights.write || spte.is_written(),
        }
    }

    /// Makes a leaf what the guest's entry says now, which may be more than it was.
    fn renew_entry(&mut self, around: &Around<'_>, handle: Handle) {
        let Some((page, index)) = self.pages.entry(handle) else {
            return;
        };
        if !page.entry(index).is_present() {
            return;
        }
        let gpa = (page.gfn << 12).wrapping_add(page.role.guest_offset(index));
        let mut raw = [0; 8];
        let entry = raw.get_mut(..page.role.entry_size() as usize);
        let peeked = entry.is_some_and(|raw| (around.peek)(gpa, raw));
        if peeked && self.refresh_entry(handle, u64::from_le_bytes(raw)) {
            return;
        }
        self.drop_entry(handle);
        // What was wanted once will be again.
        self.prefetch::<1>(around, handle);
    }

    /// The guest invalidates an address, below a root: what is below an unsync table may be old, and is made anew.
    pub(super) fn invalidate(&mut self, around: &Around<'_>, root: u32, linear: u64) {
        let mut number = root;
        while let Some(page) = self.pages.get(number) {
            let handle = Handle::new(number, page.role.level.index(linear >> 12));
            match self.child(handle) {
                Some(child) => number = child,
                None => {
                    if page.unsync {
                        self.renew_entry(around, handle);
                    }
                    return;
                }
            }
        }
    }
}
