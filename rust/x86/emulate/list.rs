// SPDX-License-Identifier: GPL-2.0

//! Short lists whose room is always there. Emptying one touches none of its items: an instruction, which uses the first of
//! one list or two, does not pay for the room that another needs.

/// A list of at most `N` items.
#[derive(Clone, Debug)]
pub(super) struct List<T, const N: usize> {
    items: [T; N],
    len: usize,
}

impl<T: Copy, const N: usize> List<T, N> {
    /// An empty list; `filler` is what is kept where no item is.
    pub(super) const fn new(filler: T) -> Self {
        Self {
            items: [filler; N],
            len: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A copy of an item.
    pub(super) fn get(&self, i: usize) -> Option<T> {
        self.items.get(i).filter(|_| i < self.len).copied()
    }

    /// Says false if the list is full.
    #[must_use]
    pub(super) fn push(&mut self, item: T) -> bool {
        let Some(slot) = self.items.get_mut(self.len) else {
            return false;
        };
        *slot = item;
        self.len = self.len.wrapping_add(1);
        true
    }

    /// Drops what comes after the first `len` items.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }
}
