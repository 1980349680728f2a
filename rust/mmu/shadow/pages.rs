// SPDX-License-Identifier: GPL-2.0

//! The cache of shadow pages: found by guest frame and role, made, recycled.

use super::super::ept::Level;
use super::page::Dead;
use super::page::Handle;
use super::page::ShadowPage;
use super::page::ENTRIES;
use super::role::Role;
use super::Around;
use super::Lack;
use super::Shadow;
use super::Spare;
use super::MAX_IDLE;
use core::ops::Range;

/// So many pages go at once when there are too many.
const RECYCLED: usize = 25;

/// So many pages go with the lock held for a memslot that goes.
const ZAPPED: u64 = 64;

/// A table above the lowest level that the guest writes to so often without using it is none any more.
pub(super) const FLOOD: u8 = 3;

impl Shadow {
    /// The pages that stand for a frame: calls `f` with each one's number until it says that it is done.
    pub(super) fn any_page(&self, gfn: u64, mut f: impl FnMut(u32, &ShadowPage) -> bool) -> bool {
        let mut number = self.frames.get(gfn).shadowed_by;
        while let Some(page) = self.pages.get(number) {
            if f(number, page) {
                return true;
            }
            number = page.next_same;
        }
        false
    }

    /// The page that stands for a frame in this role, in accord with the guest's table. It is made out of an idle one or of
    /// `spare` if there is none, and then the guest does not write to the table any more.
    pub(super) fn get_page(
        &mut self,
        around: &Around<'_>,
        gfn: u64,
        role: Role,
        spare: &mut Spare,
    ) -> Result<u32, Lack> {
        let mut found = None;
        self.any_page(gfn, |number, page| {
            let same = page.role == role;
            if same {
                found = Some((number, page.unsync));
            }
            same
        });
        if let Some((number, unsync)) = found {
            // It is about to be reached by addresses that the guest has never used, and need not invalidate.
            if unsync {
                self.sync(around, &[number]);
            } else if self.sync_some(around, &[number]) {
                return Err(Lack::Time);
            }
            if let Some(page) = self.pages.get_mut(number) {
                page.writes = 0;
            }
            return Ok(number);
        }
        self.make_page(around, gfn, role, spare)
    }

    #[cold]
    fn make_page(
        &mut self,
        around: &Around<'_>,
        gfn: u64,
        role: Role,
        spare: &mut Spare,
    ) -> Result<u32, Lack> {
        self.pages.give_room(&mut spare.room);
        if let Some(room) = self.pages.lacks_room() {
            return Err(Lack::Room(room));
        }
        if !self.frames.make(gfn, &mut spare.nodes) {
            return Err(Lack::Nodes);
        }
        let Some(mut page) = spare.page.take().or_else(|| self.idle.pop()) else {
            return Err(Lack::Page);
        };
        page.role = role;
        page.gfn = gfn;
        page.valid = true;
        page.writes = 0;
        let first = self.frames.get(gfn).shadowed_by;
        page.next_same = first;
        let number = match self.pages.insert(page) {
            Ok(number) => number,
            Err(page) => {
                spare.page = Some(page);
                return Err(Lack::Room(0));
            }
        };
        if let Some(frame) = self.frames.get_mut(gfn) {
            frame.shadowed_by = number;
        }
        self.counts.made = self.counts.made.wrapping_add(1);
        if !role.is_direct() {
            self.frames.count_table(gfn, true);
            if role.level > Level::Page4K {
                self.zap_unsync(gfn);
            }
            // What a processor still knows of entries that have gone may let it write, too.
            if self.write_protect(gfn) || self.owed {
                self.flush(around);
            }
        }
        Ok(number)
    }

    /// A table above the lowest level is always write-protected: pages that say otherwise go.
    fn zap_unsync(&mut self, gfn: u64) {
        loop {
            let mut found = 0;
            self.any_page(gfn, |number, page| {
                if page.unsync {
                    found = number;
                }
                page.unsync
            });
            if found == 0 {
                return;
            }
            self.zap_page(found);
        }
    }

    /// Takes a page out, with all its entries and all that lead to it.
    pub(super) fn zap_page(&mut self, number: u32) {
        let Some(page) = self.pages.get_mut(number) else {
            return;
        };
        if !page.valid {
            return;
        }
        page.valid = false;
        self.roots_lost = self.roots_lost.wrapping_add((page.roots != 0).into());
        page.unsync = false;
        page.unsync_below = [0; ENTRIES / 64];
        let (gfn, next, direct) = (page.gfn, page.next_same, page.is_direct());
        page.next_same = 0;
        let mut from = 0;
        while let Some(index) = self
            .pages
            .get(number)
            .and_then(|page| page.first_present(from))
        {
            self.drop_entry(Handle::new(number, index));
            from = index.wrapping_add(1);
        }
        while let Some(page) = self.pages.get(number) {
            if !self.drop_entry(page.parents) {
                break;
            }
        }
        self.forget(gfn, number, next);
        if !direct {
            self.frames.count_table(gfn, false);
        }
        self.counts.zapped = self.counts.zapped.wrapping_add(1);
        self.bury(number);
    }

    /// Takes a page out of the list of its frame.
    fn forget(&mut self, gfn: u64, number: u32, next: u32) {
        let mut at = self.frames.get(gfn).shadowed_by;
        if at == number {
            if let Some(frame) = self.frames.get_mut(gfn) {
                frame.shadowed_by = next;
            }
            return;
        }
        while let Some(page) = self.pages.get_mut(at) {
            at = page.next_same;
            if at == number {
                page.next_same = next;
                return;
            }
        }
    }

    /// Lets a page go that nobody can find, unless it is somebody's root.
    pub(super) fn bury(&mut self, number: u32) {
        let unused = |page: &ShadowPage| !page.valid && page.roots == 0;
        if self.pages.get(number).is_some_and(unused) {
            if let Some(page) = self.pages.remove(number) {
                // Processors cache entries of tables as well.
                self.owed = true;
                self.dead.push(page);
            }
        }
    }

    /// Zaps all pages that stand for a frame; returns if there were any.
    pub(super) fn zap_pages_of(&mut self, gfn: u64) -> bool {
        let mut any = false;
        loop {
            let number = self.frames.get(gfn).shadowed_by;
            if number == 0 {
                return any;
            }
            any = true;
            self.zap_page(number);
        }
    }

    /// Zaps the pages of small leaves, for frames from `gfn` on, that stand for no table of the guest's.
    pub(super) fn zap_direct(&mut self, gfn: u64) {
        loop {
            let mut found = 0;
            self.any_page(gfn, |number, page| {
                let small = page.role.is_direct() && page.role.level == Level::Page4K;
                if small {
                    found = number;
                }
                small
            });
            if found == 0 {
                return;
            }
            self.zap_page(found);
        }
    }

    /// Zaps pages whose frames are among these, until there have been some; where to go on, if not all are done.
    pub(super) fn zap_pages_in(&mut self, gfns: Range<u64>) -> Option<u64> {
        let mut at = gfns.start;
        let began = self.counts.zapped;
        while self.counts.zapped.wrapping_sub(began) < ZAPPED {
            let (gfn, frame) = self.frames.first_from(at, gfns.end)?;
            if frame.shadowed_by != 0 {
                self.zap_pages_of(gfn);
            }
            at = gfn.wrapping_add(1);
        }
        Some(at)
    }

    /// Zaps some pages if there are as many as there may be. Roots stay, and do not count: were they as many, a
    /// fault would find no room for its own pages but that of the last one's.
    pub(super) fn recycle(&mut self) {
        let limit = self.limit.saturating_add(self.held);
        if self.pages.used().saturating_add(Spare::MOST) <= limit {
            return;
        }
        let goal = limit.saturating_sub(Spare::MOST.max(RECYCLED.min(self.limit / 4)));
        let zapped = self.zap_some(goal);
        self.counts.recycled = self.counts.recycled.wrapping_add(zapped);
    }

    /// Zaps pages, in turns, until there are no more than so many; returns how many went.
    pub(super) fn zap_some(&mut self, goal: usize) -> u64 {
        let end = self.pages.end();
        let mut zapped = 0u64;
        for _ in 0..end {
            if self.pages.used() <= goal {
                break;
            }
            self.hand = self.hand.wrapping_add(1);
            if self.hand >= end {
                self.hand = 1;
            }
            let spared = |page: &ShadowPage| !page.valid || page.roots != 0;
            if !self.pages.get(self.hand).is_none_or(spared) {
                self.zap_page(self.hand);
                zapped = zapped.wrapping_add(1);
            }
        }
        zapped
    }

    /// The guest, or somebody for it, has written `len` bytes to a frame at an offset.
    pub(super) fn written(&mut self, gfn: u64, offset: u64, len: u64) {
        let mut number = self.frames.get(gfn).shadowed_by;
        if number == 0 {
            return;
        }
        self.counts.writes = self.counts.writes.wrapping_add(1);
        while let Some(page) = self.pages.get_mut(number) {
            let (next, role) = (page.next_same, page.role);
            let upper = role.level > Level::Page4K && !role.is_direct();
            page.writes = page.writes.saturating_add(upper.into());
            if page.writes >= FLOOD {
                self.counts.flooded = self.counts.flooded.wrapping_add(1);
                self.zap_page(number);
            } else {
                for index in role.shadow_entries(offset, len) {
                    self.drop_entry(Handle::new(number, index));
                }
            }
            number = next;
        }
    }

    /// What can be freed, as there are enough to be used again.
    pub(super) fn take_surplus(&mut self) -> Dead {
        let mut surplus = Dead::new();
        while self.idle.count > MAX_IDLE {
            match self.idle.pop() {
                Some(page) => surplus.push(page),
                None => break,
            }
        }
        surplus
    }
}
