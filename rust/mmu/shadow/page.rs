// SPDX-License-Identifier: GPL-2.0

//! Shadow pages, and the arena in which they are found by number.
//!
//! Every present entry of a shadow page is in one list: a leaf in that of the leaves that map its
//! guest frame (KVM's reverse map), any other in that of the entries that lead to its page (its
//! parents). The lists go through the links that each page has beside its entries, so that nothing
//! need be allocated to make an entry and nothing searched to take one away.

use super::super::table::Table;
use super::role::Role;
use super::role::Source;
use super::spte::Spte;
use kernel::prelude::*;
use pin_init::Zeroable;

/// Entries in a page.
pub(super) const ENTRIES: usize = 512;

/// An entry of a page, by their numbers. Pages count from 1, so that zero is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Handle(u32);

impl Handle {
    pub(super) const NONE: Self = Self(0);

    #[inline]
    pub(super) const fn new(page: u32, index: usize) -> Self {
        Self(page << 9 | index as u32 & 511)
    }

    #[inline]
    pub(super) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    #[inline]
    pub(super) const fn raw(self) -> u32 {
        self.0
    }

    #[inline]
    pub(super) const fn is_none(self) -> bool {
        self.0 == 0
    }

    #[inline]
    pub(super) const fn page(self) -> u32 {
        self.0 >> 9
    }

    #[inline]
    pub(super) const fn index(self) -> usize {
        self.0 as usize & 511
    }
}

/// An entry's place in its list.
#[derive(Clone, Copy, Default, Zeroable)]
pub(super) struct Link {
    /// Whose list: a leaf's guest frame, or the page that the entry leads to.
    pub(super) key: u64,
    pub(super) next: u32,
    /// Zero for the first.
    pub(super) prev: u32,
}

/// A shadow page.
pub(super) struct ShadowPage {
    /// What the processor sees.
    pub(super) table: Table,
    links: KBox<[Link; ENTRIES]>,
    pub(super) role: Role,
    /// The guest's table, or the first frame that it maps if it is direct.
    pub(super) gfn: u64,
    /// The next page that stands for the same frame.
    pub(super) next_same: u32,
    /// The first entry that leads here.
    pub(super) parents: Handle,
    /// How many entries are present.
    pub(super) present: u16,
    /// How many vCPUs have it as a root.
    pub(super) roots: u32,
    /// It can be found by its frame. If not, it is only there for those whose root it is.
    pub(super) valid: bool,
    /// The guest writes to its table without our noticing, and what it wrote counts from when it
    /// invalidates on.
    pub(super) unsync: bool,
    /// Entries below which such pages may be.
    pub(super) unsync_below: [u64; ENTRIES / 64],
    /// How often the guest has written to its table since it was last used.
    pub(super) writes: u8,
    /// In a list of pages that nobody can find.
    next_dead: Option<KBox<ShadowPage>>,
}

impl ShadowPage {
    /// A page that says nothing: ENOMEM. Sleeps.
    pub(super) fn new() -> Result<KBox<Self>> {
        let page = Self {
            table: Table::new()?,
            links: KBox::zeroed(GFP_KERNEL_ACCOUNT)?,
            role: Role::direct(
                super::super::ept::Level::Page4K,
                super::role::Rights::ALL,
                0,
            ),
            gfn: 0,
            next_same: 0,
            parents: Handle::NONE,
            present: 0,
            roots: 0,
            valid: false,
            unsync: false,
            unsync_below: [0; ENTRIES / 64],
            writes: 0,
            next_dead: None,
        };
        Ok(KBox::new(page, GFP_KERNEL_ACCOUNT)?)
    }

    #[inline]
    pub(super) fn entry(&self, index: usize) -> Spte {
        Spte::from_bits(self.table.word(index).bits())
    }

    /// Makes an entry where none is.
    #[inline]
    pub(super) fn appear(&mut self, index: usize, spte: Spte) {
        self.table.word(index).put(spte.bits());
        self.present = self.present.saturating_add(1);
    }

    /// Takes a present entry away.
    #[inline]
    pub(super) fn vanish(&mut self, index: usize) {
        self.table.word(index).put(Spte::NONE.bits());
        self.present = self.present.saturating_sub(1);
    }

    #[inline]
    pub(super) fn link(&self, index: usize) -> Link {
        self.links[index & 511]
    }

    #[inline]
    pub(super) fn link_mut(&mut self, index: usize) -> &mut Link {
        &mut self.links[index & 511]
    }

    /// The first present entry from one on.
    pub(super) fn first_present(&self, from: usize) -> Option<usize> {
        if self.present == 0 {
            return None;
        }
        (from..ENTRIES).find(|index| self.entry(*index).is_present())
    }

    /// It stands for no table of the guest's.
    #[inline]
    pub(super) const fn is_direct(&self) -> bool {
        matches!(self.role.source, Source::Direct { .. })
    }

    /// Pages whose tables have been taken out may be below.
    #[inline]
    pub(super) fn has_unsync_below(&self) -> bool {
        self.unsync_below.iter().any(|word| *word != 0)
    }

    /// Notes that they may be below an entry; returns if that is news for the whole page.
    pub(super) fn mark_below(&mut self, index: usize) -> bool {
        let news = !self.has_unsync_below();
        self.unsync_below[(index & 511) / 64] |= 1 << (index & 63);
        news
    }

    /// Notes that none are.
    pub(super) fn clear_below(&mut self, index: usize) {
        self.unsync_below[(index & 511) / 64] &= !(1 << (index & 63));
    }
}

/// Pages that nobody can find: they have no entries, and no entry leads to them. Processors may still know them.
pub(super) struct Dead {
    head: Option<KBox<ShadowPage>>,
    pub(super) count: usize,
}

impl Dead {
    pub(super) const fn new() -> Self {
        Self {
            head: None,
            count: 0,
        }
    }

    pub(super) fn push(&mut self, mut page: KBox<ShadowPage>) {
        page.next_dead = self.head.take();
        self.head = Some(page);
        self.count = self.count.saturating_add(1);
    }

    pub(super) fn pop(&mut self) -> Option<KBox<ShadowPage>> {
        let mut page = self.head.take()?;
        self.head = page.next_dead.take();
        self.count = self.count.saturating_sub(1);
        Some(page)
    }

    /// All of them, as another list.
    pub(super) fn take(&mut self) -> Self {
        core::mem::replace(self, Self::new())
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        // One by one: a list that drops its rest would take stack for each.
        while self.pop().is_some() {}
    }
}

/// A place for a page.
pub(super) enum Place {
    /// Free; the next free one.
    Free(u32),
    Used(KBox<ShadowPage>),
}

/// All pages of a VM.
pub(super) struct Arena {
    places: KVVec<Place>,
    /// The first free place; zero if there is none.
    free: u32,
    used: usize,
}

/// Handles have room for so many pages.
const MAX_PAGES: usize = 1 << 22;

impl Arena {
    /// None yet.
    pub(super) const fn new() -> Self {
        Self {
            places: KVVec::new(),
            free: 0,
            used: 0,
        }
    }

    /// How many there are.
    #[inline]
    pub(super) const fn used(&self) -> usize {
        self.used
    }

    /// Numbers are below this.
    #[inline]
    pub(super) fn end(&self) -> u32 {
        self.places.len() as u32
    }

    #[inline]
    pub(super) fn get(&self, page: u32) -> Option<&ShadowPage> {
        match self.places.get(page as usize) {
            Some(Place::Used(page)) => Some(page),
            _ => None,
        }
    }

    #[inline]
    pub(super) fn get_mut(&mut self, page: u32) -> Option<&mut ShadowPage> {
        match self.places.get_mut(page as usize) {
            Some(Place::Used(page)) => Some(page),
            _ => None,
        }
    }

    /// The entry that a handle names.
    #[inline]
    pub(super) fn entry(&self, handle: Handle) -> Option<(&ShadowPage, usize)> {
        Some((self.get(handle.page())?, handle.index()))
    }

    #[inline]
    pub(super) fn link_mut(&mut self, handle: Handle) -> Option<&mut Link> {
        Some(self.get_mut(handle.page())?.link_mut(handle.index()))
    }

    /// So much room is needed for another page; none if there is a place.
    pub(super) fn lacks_room(&self) -> Option<usize> {
        let len = self.places.len();
        if self.free != 0 || len < self.places.capacity() && len != 0 {
            return None;
        }
        Some(len.saturating_mul(2).clamp(64, MAX_PAGES))
    }

    /// Takes more room, if it is more; what it was in is for the caller to drop.
    pub(super) fn give_room(&mut self, room: &mut KVVec<Place>) {
        if room.capacity() <= self.places.len() {
            return;
        }
        for place in self.places.drain_all() {
            // There is room.
            let _ = room.push_within_capacity(place);
        }
        core::mem::swap(&mut self.places, room);
        if self.places.is_empty() {
            // Number zero is nobody's.
            let _ = self.places.push_within_capacity(Place::Free(0));
        }
    }

    /// Puts a page in; its number, or the page if there is no room.
    pub(super) fn insert(&mut self, page: KBox<ShadowPage>) -> Result<u32, KBox<ShadowPage>> {
        let number = self.free;
        if number != 0 {
            if let Some(place) = self.places.get_mut(number as usize) {
                if let Place::Free(next) = *place {
                    self.free = next;
                    *place = Place::Used(page);
                    self.used = self.used.saturating_add(1);
                    return Ok(number);
                }
            }
            return Err(page);
        }
        let len = self.places.len();
        if len == 0 || len >= self.places.capacity() || len >= MAX_PAGES {
            return Err(page);
        }
        // There is room.
        let _ = self.places.push_within_capacity(Place::Used(page));
        self.used = self.used.saturating_add(1);
        Ok(len as u32)
    }

    /// Takes a page out.
    pub(super) fn remove(&mut self, number: u32) -> Option<KBox<ShadowPage>> {
        let place = self.places.get_mut(number as usize)?;
        if let Place::Free(_) = place {
            return None;
        }
        match core::mem::replace(place, Place::Free(self.free)) {
            Place::Used(page) => {
                self.free = number;
                self.used = self.used.saturating_sub(1);
                Some(page)
            }
            Place::Free(_) => None,
        }
    }
}
