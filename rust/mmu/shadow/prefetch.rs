// SPDX-License-Identifier: GPL-2.0

//! Neighbours of a translation that was wanted: a guest that touches a page most likely touches those
//! beside it. What of them is at hand, in the guest's table and in the host's, is put in as well, so
//! that it need not fault.

use super::super::ept::Level;
use super::page::Handle;
use super::role::GuestLeaf;
use super::roots::VcpuShadow;
use super::spte::Leaf;
use super::spte::Spte;
use super::sync::Tracked;
use super::Around;
use super::Shadow;
use super::ShadowMmu;
use crate::linux::mm::HostFrame;

/// How many entries are looked at, with the one that was wanted. A power of two.
const GROUP: usize = 8;

/// A frame of the host's that is at hand.
pub(crate) struct AtHand {
    pub(crate) frame: HostFrame,
    /// The guest's writes to it are logged.
    pub(crate) logged: bool,
}

impl ShadowMmu {
    /// Puts in what is at hand around an address that has just been put in. `find` finds what backs a guest frame, and
    /// does not sleep.
    pub(crate) fn prefetch(
        &self,
        around: &Around<'_>,
        vcpu: &VcpuShadow,
        linear: u64,
        find: &dyn Fn(u64) -> Option<AtHand>,
    ) {
        if let Some(root) = vcpu.root() {
            let number = root.page(linear);
            self.with(around, |state| state.prefetch(around, number, linear, find));
        }
    }
}

impl Shadow {
    fn prefetch(
        &mut self,
        around: &Around<'_>,
        root: u32,
        linear: u64,
        find: &dyn Fn(u64) -> Option<AtHand>,
    ) {
        let mut number = root;
        let (role, gfn) = loop {
            let Some(page) = self.pages.get(number) else {
                return;
            };
            if page.role.level == Level::Page4K {
                break (page.role, page.gfn);
            }
            let handle = Handle::new(number, page.role.level.index(linear >> 12));
            match self.child(handle) {
                Some(child) => number = child,
                None => return,
            }
        };
        if role.is_direct() {
            return;
        }
        let first = Level::Page4K.index(linear >> 12) & !(GROUP - 1);
        let size = role.entry_size() as usize;
        let mut raw = [0; GROUP * 8];
        let len = GROUP.wrapping_mul(size).min(raw.len());
        let Some(group) = raw.get_mut(..len) else {
            return;
        };
        if !(around.peek)((gfn << 12).wrapping_add(role.guest_offset(first)), group) {
            return;
        }
        for (index, bytes) in (first..).zip(group.chunks_exact(size)) {
            let mut word = [0; 8];
            if let Some(part) = word.get_mut(..bytes.len()) {
                part.copy_from_slice(bytes);
            }
            let handle = Handle::new(number, index);
            let absent = self
                .pages
                .entry(handle)
                .is_some_and(|(page, index)| !page.entry(index).is_present());
            if let Some(leaf) = role.leaf(u64::from_le_bytes(word)).filter(|_| absent) {
                self.put_at_hand(handle, &leaf, find);
            }
        }
    }

    /// Puts a leaf of the guest's in, if its frame is at hand.
    fn put_at_hand(
        &mut self,
        handle: Handle,
        leaf: &GuestLeaf,
        find: &dyn Fn(u64) -> Option<AtHand>,
    ) {
        // A place in the directory is not made for it.
        if self.frames.get_mut(leaf.gfn).is_none() {
            return;
        }
        let Some(found) = find(leaf.gfn) else {
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
