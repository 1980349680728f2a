// SPDX-License-Identifier: GPL-2.0

//! Neighbours of a translation that was wanted: a guest that touches a page most likely touches those
//! beside it. What of them is at hand, in the guest's table (or large page) and in the host's, is put in
//! as well, so that it need not fault.

use super::super::ept::Level;
use super::page::Handle;
use super::page::ShadowPage;
use super::role::guest_entry;
use super::role::GuestLeaf;
use super::role::Source;
use super::role::PRESENT;
use super::spte::Leaf;
use super::spte::Spte;
use super::sync::Tracked;
use super::Around;
use super::Shadow;
use crate::linux::mm::HostPages;

/// How many entries are looked at, with the one that was wanted. A power of two.
pub(super) const GROUP: usize = 8;

/// Pages of the host's that are at hand, behind consecutive frames of the guest's.
pub(crate) struct AtHand {
    pub(crate) pages: HostPages<GROUP>,
    /// The guest's writes to them are logged.
    pub(crate) logged: bool,
}

impl Shadow {
    /// Puts in what is at hand of the `N` entries that an entry of the lowest level is among: a power of two, at most
    /// [`GROUP`].
    pub(super) fn prefetch<const N: usize>(&mut self, around: &Around<'_>, handle: Handle) {
        let number = handle.page();
        let Some(page) = self.pages.get(number) else {
            return;
        };
        let first = handle.index() & !N.wrapping_sub(1);
        let mut leaves = [None; N];
        find_leaves(page, around, first, &mut leaves);
        let mut rest = leaves.as_slice();
        while let Some((leaf, others)) = rest.split_first() {
            let Some(leaf) = leaf else {
                rest = others;
                continue;
            };
            let follows = |(n, next): &(usize, &Option<GuestLeaf>)| {
                next.is_some_and(|next| next.gfn.wrapping_sub(leaf.gfn) == *n as u64)
            };
            let run = rest.iter().enumerate().take_while(follows).count();
            let at = first.wrapping_add(N.wrapping_sub(rest.len()));
            let Some((run, after)) = rest.split_at_checked(run) else {
                return;
            };
            self.put_run(around, Handle::new(number, at), run);
            rest = after;
        }
    }

    /// Puts leaves in from an entry on where nothing is, which map consecutive frames: those whose pages are at hand.
    fn put_run(&mut self, around: &Around<'_>, handle: Handle, run: &[Option<GuestLeaf>]) {
        let Some(Some(first)) = run.first() else {
            return;
        };
        let gfns = first.gfn..first.gfn.saturating_add(run.len() as u64);
        let Some(found) = (around.find)(gfns) else {
            return;
        };
        let leaves = run.iter().flatten();
        for ((leaf, page), index) in leaves.zip(found.pages).zip(handle.index()..) {
            // A place in the directory is not made for it.
            if self.frames.get_mut(leaf.gfn).is_none() {
                continue;
            }
            let writable = leaf.rights.write;
            let write = writable && !found.logged && self.tracked(leaf.gfn) == Tracked::No;
            let made = Leaf {
                pfn: page.pfn(),
                rights: leaf.rights,
                nx: !leaf.rights.exec,
                key: leaf.key,
                writable,
                write,
                mmio: false,
                accessed: false,
            };
            let handle = Handle::new(handle.page(), index);
            self.set_leaf(handle, leaf.gfn, Spte::leaf(Level::Page4K, &made));
            self.counts.prefetched = self.counts.prefetched.wrapping_add(1);
            page.put_used(write);
        }
    }
}

/// Finds the leaves that entries from `first` on, as many as `leaves`, could be, of those that are not there.
fn find_leaves(
    page: &ShadowPage,
    around: &Around<'_>,
    first: usize,
    leaves: &mut [Option<GuestLeaf>],
) {
    let (role, gfn) = (page.role, page.gfn);
    let is_absent = |index: usize| !page.entry(index).is_present();
    let indices = first..first.wrapping_add(leaves.len());
    if role.level != Level::Page4K || !indices.clone().any(is_absent) {
        return;
    }
    if let Source::Direct { key } = role.source {
        for (leaf, index) in leaves.iter_mut().zip(indices) {
            *leaf = is_absent(index).then(|| GuestLeaf {
                gfn: gfn.wrapping_add(index as u64),
                rights: role.rights,
                key,
            });
        }
        return;
    }
    let size = role.entry_size() as usize;
    let mut raw = [0; GROUP * 8];
    let Some(group) = raw.get_mut(..leaves.len().wrapping_mul(size)) else {
        return;
    };
    if !(around.peek)((gfn << 12).wrapping_add(role.guest_offset(first)), group) {
        return;
    }
    let entries = group.chunks_exact(size).map(guest_entry);
    for ((leaf, entry), index) in leaves.iter_mut().zip(entries).zip(indices) {
        if entry & PRESENT != 0 && is_absent(index) {
            *leaf = role.leaf(entry);
        }
    }
}
