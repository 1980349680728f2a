// SPDX-License-Identifier: GPL-2.0

//! Making entries and taking them away, with the lists that they are in.

use super::super::ept::Level;
use super::page::Handle;
use super::spte::Spte;
use super::Shadow;

impl Shadow {
    /// Puts an entry at the head of the list of its frame or child, whose first is `head`.
    fn put_first(&mut self, handle: Handle, key: u64, head: Handle) {
        if let Some(link) = self.pages.link_mut(handle) {
            link.key = key;
            link.next = head.raw();
            link.prev = 0;
        }
        if let Some(link) = self.pages.link_mut(head) {
            link.prev = handle.raw();
        }
    }

    /// Makes a leaf where nothing is. The frame has a place in the directory.
    pub(super) fn set_leaf(&mut self, handle: Handle, gfn: u64, spte: Spte) {
        let Some(frame) = self.frames.get_mut(gfn) else {
            return;
        };
        let head = Handle::from_raw(core::mem::replace(&mut frame.mapped_by, handle.raw()));
        self.put_first(handle, gfn, head);
        if let Some(page) = self.pages.get_mut(handle.page()) {
            let count = match page.role.level {
                Level::Page4K => &mut self.counts.small,
                _ => &mut self.counts.large,
            };
            *count = count.saturating_add(1);
            page.appear(handle.index(), spte);
        }
    }

    /// Makes an entry where nothing is that leads to a page.
    pub(super) fn set_child(&mut self, handle: Handle, child: u32) {
        let Some(page) = self.pages.get_mut(child) else {
            return;
        };
        let spte = Spte::table(page.table.phys());
        let unsync = page.unsync || page.has_unsync_below();
        let head = core::mem::replace(&mut page.parents, handle);
        self.put_first(handle, child.into(), head);
        if let Some(page) = self.pages.get_mut(handle.page()) {
            page.appear(handle.index(), spte);
        }
        if unsync {
            self.mark_above(handle);
        }
    }

    /// The page that an entry leads to, if it is there and no leaf.
    pub(super) fn child(&self, handle: Handle) -> Option<u32> {
        let (page, index) = self.pages.entry(handle)?;
        let spte = page.entry(index);
        if !spte.is_present() || spte.is_leaf(page.role.level) {
            return None;
        }
        Some(page.link(index).key as u32)
    }

    /// Takes an entry away; returns if there was one. Processors may still know it.
    pub(super) fn drop_entry(&mut self, handle: Handle) -> bool {
        let index = handle.index();
        let Some(page) = self.pages.get_mut(handle.page()) else {
            return false;
        };
        let spte = page.entry(index);
        if !spte.is_present() {
            return false;
        }
        let level = page.role.level;
        page.vanish(index);
        let link = page.link(index);
        let (next, prev) = (Handle::from_raw(link.next), Handle::from_raw(link.prev));
        if let Some(link) = self.pages.link_mut(next) {
            link.prev = prev.raw();
        }
        if let Some(link) = self.pages.link_mut(prev) {
            link.next = next.raw();
        }
        if spte.is_leaf(level) {
            let count = match level {
                Level::Page4K => &mut self.counts.small,
                _ => &mut self.counts.large,
            };
            *count = count.saturating_sub(1);
            if prev.is_none() {
                if let Some(frame) = self.frames.get_mut(link.key) {
                    frame.mapped_by = next.raw();
                }
            }
        } else if prev.is_none() {
            if let Some(child) = self.pages.get_mut(link.key as u32) {
                child.parents = next;
            }
        }
        self.owed = true;
        true
    }

    /// Calls `f` for each leaf that maps a frame, large ones included. It may drop the leaf that it is
    /// given, and no other.
    pub(super) fn for_leaves(&mut self, gfn: u64, f: &mut dyn FnMut(&mut Self, Handle, Level)) {
        let base = gfn & !Level::Page2M.mask();
        self.for_leaves_at(gfn, f);
        if base != gfn {
            // Those that begin before it and are large.
            self.for_leaves_at(base, &mut |this, handle, level| {
                if level == Level::Page2M {
                    f(this, handle, level);
                }
            });
        }
    }

    /// The same for those that begin with the frame.
    pub(super) fn for_leaves_at(&mut self, gfn: u64, f: &mut dyn FnMut(&mut Self, Handle, Level)) {
        let mut handle = Handle::from_raw(self.frames.get(gfn).mapped_by);
        while let Some((page, index)) = self.pages.entry(handle) {
            let (next, level) = (page.link(index).next, page.role.level);
            f(self, handle, level);
            handle = Handle::from_raw(next);
        }
    }

    /// Keeps the guest from writing to a frame; returns if it could have.
    pub(super) fn write_protect(&mut self, gfn: u64) -> bool {
        let mut changed = false;
        self.for_leaves(gfn, &mut |this, handle, level| {
            if level > Level::Page4K {
                changed |= this.drop_entry(handle);
                return;
            }
            if let Some((page, index)) = this.pages.entry(handle) {
                if page.entry(index).is_written() {
                    page.table.word(index).clear_bits(Spte::WRITES);
                    changed = true;
                }
            }
        });
        changed
    }

    /// Drops all leaves that map a frame; returns if there were any.
    pub(super) fn unmap(&mut self, gfn: u64) -> bool {
        let mut any = false;
        self.for_leaves_at(gfn, &mut |this, handle, _| any |= this.drop_entry(handle));
        any
    }

    /// Drops the large leaves that map a frame and begin before it; returns if there were any.
    pub(super) fn unmap_large(&mut self, gfn: u64) -> bool {
        let base = gfn & !Level::Page2M.mask();
        let mut any = false;
        self.for_leaves_at(base, &mut |this, handle, level| {
            if level > Level::Page4K {
                any |= this.drop_entry(handle);
            }
        });
        any
    }
}
