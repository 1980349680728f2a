// SPDX-License-Identifier: GPL-2.0

//! A set of ranges, each with a memslot, that does not change: to add one or take one out makes a
//! new set, which shares with the old what is the same in both.
//!
//! It is a balanced (AVL) tree whose nodes are shared and know how far anything below them reaches.
//! With n ranges, to find one and to make a changed set is O(log n), and so is to find all that
//! overlap a given range, for each of them.

use super::slots::Slot;
use core::cmp::Ordering;
use core::ops::Range;
use kernel::prelude::*;
use kernel::sync::Arc;

/// No tree of as many ranges as there may be memslots is higher.
const MAX_HEIGHT: usize = 21;

// The smallest AVL tree that is one higher has 46367 nodes (the Fibonacci number 24, less one).
const _: () = assert!(MAX_HEIGHT == 21 && super::MAX_SLOTS < 46_367);

type Link = Option<Arc<Node>>;

/// A range, its memslot, and two subtrees.
///
/// # Invariants
///
/// All of `left` comes before, all of `right` after, by start and then by id; the subtrees' heights
/// differ by one at most. `height` and `reach` are true.
struct Node {
    range: Range<u64>,
    id: u32,
    /// 1 for a node without subtrees.
    height: u32,
    /// The greatest end of any range in this tree.
    reach: u64,
    left: Link,
    right: Link,
    slot: Arc<Slot>,
}

/// What is in a node but for its place in the tree.
#[derive(Clone)]
struct Item {
    range: Range<u64>,
    id: u32,
    slot: Arc<Slot>,
}

impl Item {
    fn order(&self, node: &Node) -> Ordering {
        (self.range.start, self.id).cmp(&(node.range.start, node.id))
    }
}

impl Node {
    fn item(&self) -> Item {
        Item {
            range: self.range.clone(),
            id: self.id,
            slot: self.slot.clone(),
        }
    }
}

fn height(link: &Link) -> u32 {
    link.as_ref().map_or(0, |node| node.height)
}

/// A node over two trees, whose heights differ by one at most: ENOMEM.
fn join(item: Item, left: Link, right: Link) -> Result<Link> {
    let reach = |link: &Link| link.as_ref().map_or(0, |node| node.reach);
    let height = height(&left).max(height(&right)).wrapping_add(1);
    let reach = item.range.end.max(reach(&left)).max(reach(&right));
    // INVARIANT: The order is the caller's, who took the parts from a tree.
    let node = Node {
        range: item.range,
        id: item.id,
        height,
        reach,
        left,
        right,
        slot: item.slot,
    };
    Ok(Some(Arc::new(node, GFP_KERNEL_ACCOUNT)?))
}

/// A node over two trees, whose heights differ by two at most: ENOMEM.
///
/// Not inlined, as that would make the frames of a recursion larger.
#[inline(never)]
fn balance(item: Item, left: Link, right: Link) -> Result<Link> {
    match (&left, &right) {
        (Some(l), _) if l.height > height(&right).wrapping_add(1) => match &l.right {
            Some(mid) if mid.height > height(&l.left) => join(
                mid.item(),
                join(l.item(), l.left.clone(), mid.left.clone())?,
                join(item, mid.right.clone(), right)?,
            ),
            mid => join(l.item(), l.left.clone(), join(item, mid.clone(), right)?),
        },
        (_, Some(r)) if r.height > height(&left).wrapping_add(1) => match &r.left {
            Some(mid) if mid.height > height(&r.right) => join(
                mid.item(),
                join(item, left, mid.left.clone())?,
                join(r.item(), mid.right.clone(), r.right.clone())?,
            ),
            mid => join(r.item(), join(item, left, mid.clone())?, r.right.clone()),
        },
        _ => join(item, left, right),
    }
}

/// The tree with `item`, which is not in it.
fn insert(link: &Link, item: Item) -> Result<Link> {
    let Some(node) = link else {
        return join(item, None, None);
    };
    match item.order(node) {
        Ordering::Less => balance(node.item(), insert(&node.left, item)?, node.right.clone()),
        _ => balance(node.item(), node.left.clone(), insert(&node.right, item)?),
    }
}

/// The tree without `item`, if it is there.
fn remove(link: &Link, item: &Item) -> Result<Link> {
    let Some(node) = link else {
        return Ok(None);
    };
    match item.order(node) {
        Ordering::Less => balance(node.item(), remove(&node.left, item)?, node.right.clone()),
        Ordering::Greater => balance(node.item(), node.left.clone(), remove(&node.right, item)?),
        Ordering::Equal => match (&node.left, &node.right) {
            (only, None) | (None, only) => Ok(only.clone()),
            (left, Some(right)) => {
                let next = first(right).item();
                let rest = remove(&node.right, &next)?;
                balance(next, left.clone(), rest)
            }
        },
    }
}

fn first(tree: &Node) -> &Node {
    let mut node = tree;
    while let Some(left) = &node.left {
        node = left;
    }
    node
}

/// The set.
pub(super) struct Tree(Link);

impl Tree {
    /// Without a range.
    pub(super) const fn empty() -> Self {
        Self(None)
    }

    /// The set, which shares all nodes with this one.
    pub(super) fn share(&self) -> Self {
        Self(self.0.clone())
    }

    /// The set with `range` for `slot`, which has none here: ENOMEM.
    pub(super) fn with(&self, range: Range<u64>, slot: &Arc<Slot>) -> Result<Self> {
        let (id, slot) = (slot.id, slot.clone());
        Ok(Self(insert(&self.0, Item { range, id, slot })?))
    }

    /// The set without `slot`, whose range here is `range`: ENOMEM.
    pub(super) fn without(&self, range: Range<u64>, slot: &Arc<Slot>) -> Result<Self> {
        let (id, slot) = (slot.id, slot.clone());
        Ok(Self(remove(&self.0, &Item { range, id, slot })?))
    }

    /// The slot whose range has `at`, where no two overlap.
    #[inline]
    pub(super) fn find(&self, at: u64) -> Option<&Arc<Slot>> {
        let mut link = &self.0;
        while let Some(node) = link {
            if at < node.range.start {
                link = &node.left;
            } else if at < node.range.end {
                return Some(&node.slot);
            } else {
                link = &node.right;
            }
        }
        None
    }

    /// Returns if any of the ranges overlaps `range`.
    #[inline]
    pub(super) fn any_overlaps(&self, range: &Range<u64>) -> bool {
        let mut link = &self.0;
        while let Some(node) = link {
            if node.range.start < range.end && range.start < node.range.end {
                return true;
            }
            // If what reaches that far on the left begins too late, all on the right does.
            link = match &node.left {
                Some(left) if left.reach > range.start => &node.left,
                _ => &node.right,
            };
        }
        false
    }

    /// The slots whose ranges overlap `range`, in no particular order.
    pub(super) fn overlapping(&self, range: Range<u64>) -> Overlapping<'_> {
        let mut found = Overlapping {
            range,
            todo: [const { None }; MAX_HEIGHT],
            len: 0,
        };
        found.push(&self.0);
        found
    }
}

/// Iterates over [`Tree::overlapping`].
pub(super) struct Overlapping<'a> {
    range: Range<u64>,
    /// Subtrees to be searched. At any moment they are right subtrees of nodes on one path, and
    /// what that path comes to: no more than the tree is high.
    todo: [Option<&'a Node>; MAX_HEIGHT],
    len: usize,
}

impl<'a> Overlapping<'a> {
    /// Searches `link` too, if it reaches that far.
    #[inline]
    fn push(&mut self, link: &'a Link) {
        let Some(node) = link else {
            return;
        };
        if node.reach > self.range.start {
            // There is room, by the height of the tree.
            if let Some(place) = self.todo.get_mut(self.len) {
                *place = Some(node);
                self.len = self.len.wrapping_add(1);
            }
        }
    }
}

impl<'a> Iterator for Overlapping<'a> {
    type Item = &'a Slot;

    fn next(&mut self) -> Option<&'a Slot> {
        while let Some(top) = self.len.checked_sub(1) {
            self.len = top;
            let node = self.todo.get_mut(top)?.take()?;
            if node.range.start < self.range.end {
                self.push(&node.right);
            }
            self.push(&node.left);
            if node.range.start < self.range.end && self.range.start < node.range.end {
                return Some(&node.slot);
            }
        }
        None
    }
}
