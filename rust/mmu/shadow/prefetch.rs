// SPDX-License-Identifier: GPL-2.0

//! Neighbours of a translation that was wanted: a guest that touches a page most likely touches those
//! beside it. What of them is at hand, in the guest's table (or large page) and in the host's, is put in
//! as well, so that it need not fault.

use super::super::ept::Level;
use super::page::Handle;
use super::role::guest_entry;
use super::role::GuestLeaf;
use super::role::Source;
use super::spte::Leaf;
use super::spte::Spte;
use super::sync::Tracked;
use super::Around;
use super::Shadow;
use crate::linux::mm::HostFrame;

/// How many entries are looked at, with the one that was wanted. A power of two.
pub(super) const GROUP: usize = 8;

/// A guest's entry is there.
const PRESENT: u64 = 1;

/// A frame of the host's that is at hand.
pub(crate) struct AtHand {
    pub(crate) frame: HostFrame,
    /// The guest's writes to it are logged.
    pub(crate) logged: bool,
}

impl Shadow {
    /// Puts in what is at hand of the `count` entries that an entry of the lowest level is among: a power of two, at most
    /// [`GROUP`].
    pub(super) fn prefetch(&mut self, around: &Around<'_>, handle: Handle, count: usize) {
        let (number, index) = (handle.page(), handle.index());
        let Some(page) = self.pages.get(number) else {
            return;
        };
        let (role, gfn) = (page.role, page.gfn);
        if role.level != Level::Page4K {
            return;
        }
        let first = index & !count.wrapping_sub(1);
        if let Source::Direct { key } = role.source {
            for index in first..first.wrapping_add(count) {
                let leaf = GuestLeaf {
                    gfn: gfn.wrapping_add(index as u64),
                    rights: role.rights,
                    key,
                };
                self.put_if_absent(around, Handle::new(number, index), &leaf);
            }
            return;
        }
        let size = role.entry_size() as usize;
        let mut raw = [0; GROUP * 8];
        let len = count.wrapping_mul(size).min(raw.len());
        let Some(group) = raw.get_mut(..len) else {
            return;
        };
        if !(around.peek)((gfn << 12).wrapping_add(role.guest_offset(first)), group) {
            return;
        }
        for (index, bytes) in (first..).zip(group.chunks_exact(size)) {
            let entry = guest_entry(bytes);
            if entry & PRESENT == 0 {
                continue;
            }
            if let Some(leaf) = role.leaf(entry) {
                self.put_if_absent(around, Handle::new(number, index), &leaf);
            }
        }
    }

    /// Puts a leaf of the guest's in where none is, if its frame is at hand.
    fn put_if_absent(&mut self, around: &Around<'_>, handle: Handle, leaf: &GuestLeaf) {
        let entry = self.pages.entry(handle);
        if entry.is_none_or(|(page, index)| page.entry(index).is_present()) {
            return;
        }
        // A place in the directory is not made for it.
        if self.frames.get_mut(leaf.gfn).is_none() {
            return;
        }
        let Some(found) = (around.find)(leaf.gfn) else {
            return;
        };
        let writable = leaf.rights.write && found.frame.writable;
        let write = writable && !found.logged && self.tracked(leaf.gfn) == Tracked::No;
        let made = Leaf {
            pfn: found.frame.pfn,
            rights: leaf.rights,
            nx: !leaf.rights.exec,
            key: leaf.key,
            writable,
            write,
            mmio: found.frame.mmio,
            accessed: false,
        };
        self.set_leaf(handle, leaf.gfn, Spte::leaf(Level::Page4K, &made));
        self.counts.prefetched = self.counts.prefetched.wrapping_add(1);
        if let Some(page) = found.frame.page {
            page.put_used(write);
        }
    }
}
