// SPDX-License-Identifier: GPL-2.0

//! The directory of guest frames: for each, the shadow entries that map it and the shadow pages
//! that stand for it. A tree of pages, like page tables, for those frames that have either.

use kernel::prelude::*;
use pin_init::Zeroable;

/// What is known of a guest frame. All zero: nothing.
#[derive(Clone, Copy, Default, PartialEq, Eq, Zeroable)]
pub(super) struct Frame {
    /// The first of the leaves that map it, by its handle.
    pub(super) mapped_by: u32,
    /// The first of the pages that stand for it, by its index.
    pub(super) shadowed_by: u32,
}

const BITS: u32 = 9;
const COUNT: usize = 1 << BITS;

#[derive(Zeroable)]
struct Leaf([Frame; COUNT]);
#[derive(Zeroable)]
struct Lower {
    leaves: [Option<KBox<Leaf>>; COUNT],
    /// For each of them, how many shadow pages stand for tables in its frames.
    tables: [u32; COUNT],
}
#[derive(Zeroable)]
struct Upper([Option<KBox<Lower>>; COUNT]);
#[derive(Zeroable)]
struct Top([Option<KBox<Upper>>; COUNT]);

/// The directory.
pub(super) struct Directory {
    top: KBox<Top>,
}

/// Nodes to grow with, allocated where one may sleep.
pub(super) struct Nodes {
    upper: Option<KBox<Upper>>,
    lower: Option<KBox<Lower>>,
    leaf: Option<KBox<Leaf>>,
}

impl Nodes {
    /// None yet.
    pub(super) const fn new() -> Self {
        Self {
            upper: None,
            lower: None,
            leaf: None,
        }
    }

    /// Enough for one more frame, wherever it is: ENOMEM. Sleeps.
    pub(super) fn fill(&mut self) -> Result {
        if self.upper.is_none() {
            self.upper = Some(KBox::zeroed(GFP_KERNEL_ACCOUNT)?);
        }
        if self.lower.is_none() {
            self.lower = Some(KBox::zeroed(GFP_KERNEL_ACCOUNT)?);
        }
        if self.leaf.is_none() {
            self.leaf = Some(KBox::zeroed(GFP_KERNEL_ACCOUNT)?);
        }
        Ok(())
    }
}

#[inline]
const fn index(gfn: u64, level: u32) -> usize {
    (gfn >> (BITS * level)) as usize & (COUNT - 1)
}

/// The first frame after all that a node at `level` spans with `gfn`.
const fn next(gfn: u64, level: u32) -> u64 {
    (gfn | ((1 << (BITS * level)) - 1)).saturating_add(1)
}

impl Directory {
    /// Frames have numbers below this.
    pub(super) const LIMIT: u64 = 1 << (BITS * 4);

    /// An empty one: ENOMEM.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            top: KBox::zeroed(GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// What is known of a frame.
    #[inline]
    pub(super) fn get(&self, gfn: u64) -> Frame {
        let found = || {
            let upper = self.top.0[index(gfn, 3)].as_ref()?;
            let lower = upper.0[index(gfn, 2)].as_ref()?;
            let leaf = lower.leaves[index(gfn, 1)].as_ref()?;
            Some(leaf.0[index(gfn, 0)])
        };
        if gfn >= Self::LIMIT {
            return Frame::default();
        }
        found().unwrap_or_default()
    }

    /// The place of a frame, if there is one.
    #[inline]
    pub(super) fn get_mut(&mut self, gfn: u64) -> Option<&mut Frame> {
        if gfn >= Self::LIMIT {
            return None;
        }
        let upper = self.top.0[index(gfn, 3)].as_mut()?;
        let lower = upper.0[index(gfn, 2)].as_mut()?;
        let leaf = lower.leaves[index(gfn, 1)].as_mut()?;
        Some(&mut leaf.0[index(gfn, 0)])
    }

    /// Makes a place for a frame; returns if there is one now. If not, `nodes` must be filled, or the
    /// frame is out of bounds.
    #[inline]
    pub(super) fn make(&mut self, gfn: u64, nodes: &mut Nodes) -> bool {
        self.get_mut(gfn).is_some() || self.grow(gfn, nodes)
    }

    #[cold]
    fn grow(&mut self, gfn: u64, nodes: &mut Nodes) -> bool {
        if gfn >= Self::LIMIT {
            return false;
        }
        let upper = &mut self.top.0[index(gfn, 3)];
        if upper.is_none() {
            *upper = nodes.upper.take();
        }
        let Some(upper) = upper else { return false };
        let lower = &mut upper.0[index(gfn, 2)];
        if lower.is_none() {
            *lower = nodes.lower.take();
        }
        let Some(lower) = lower else { return false };
        let leaf = &mut lower.leaves[index(gfn, 1)];
        if leaf.is_none() {
            *leaf = nodes.leaf.take();
        }
        leaf.is_some()
    }

    /// How many shadow pages stand for tables in the 2 MiB that a frame is in, if the frame has a place.
    #[inline]
    pub(super) fn tables_near(&self, gfn: u64) -> u32 {
        let found = || {
            let upper = self.top.0[index(gfn, 3)].as_ref()?;
            let lower = upper.0[index(gfn, 2)].as_ref()?;
            Some(lower.tables[index(gfn, 1)])
        };
        if gfn >= Self::LIMIT {
            return 0;
        }
        found().unwrap_or_default()
    }

    /// A shadow page for a table in this frame, which has a place, has come, or has gone.
    pub(super) fn count_table(&mut self, gfn: u64, come: bool) {
        let upper = self.top.0[index(gfn, 3)].as_mut();
        if let Some(lower) = upper.and_then(|upper| upper.0[index(gfn, 2)].as_mut()) {
            let count = &mut lower.tables[index(gfn, 1)];
            *count = if come {
                count.saturating_add(1)
            } else {
                count.saturating_sub(1)
            };
        }
    }

    /// The first frame from `gfn` on, and before `end`, of which anything is known.
    pub(super) fn first_from(&self, gfn: u64, end: u64) -> Option<(u64, Frame)> {
        let end = end.min(Self::LIMIT);
        let mut gfn = gfn;
        while gfn < end {
            let Some(upper) = self.top.0[index(gfn, 3)].as_ref() else {
                gfn = next(gfn, 3);
                continue;
            };
            let Some(lower) = upper.0[index(gfn, 2)].as_ref() else {
                gfn = next(gfn, 2);
                continue;
            };
            let Some(leaf) = lower.leaves[index(gfn, 1)].as_ref() else {
                gfn = next(gfn, 1);
                continue;
            };
            let stop = next(gfn, 1).min(end);
            while gfn < stop {
                let frame = leaf.0[index(gfn, 0)];
                if frame != Frame::default() {
                    return Some((gfn, frame));
                }
                gfn = gfn.wrapping_add(1);
            }
        }
        None
    }

    /// Frees the nodes that have nothing but frames of `gfns` of which nothing is known.
    pub(super) fn prune(&mut self, gfns: core::ops::Range<u64>) {
        let mut gfn = gfns.start;
        while gfn < gfns.end.min(Self::LIMIT) {
            let after = next(gfn, 1);
            let whole = gfn & (COUNT as u64 - 1) == 0 && after <= gfns.end;
            let slot = self.top.0[index(gfn, 3)]
                .as_mut()
                .and_then(|upper| upper.0[index(gfn, 2)].as_mut())
                .map(|lower| &mut lower.leaves[index(gfn, 1)]);
            match slot {
                None => {
                    // Nothing here at all.
                    let level = if self.top.0[index(gfn, 3)].is_none() {
                        3
                    } else {
                        2
                    };
                    gfn = next(gfn, level);
                    continue;
                }
                Some(slot) => {
                    let empty = slot
                        .as_ref()
                        .is_some_and(|leaf| leaf.0.iter().all(|f| *f == Frame::default()));
                    if whole && empty {
                        *slot = None;
                    }
                }
            }
            gfn = after;
        }
    }
}
