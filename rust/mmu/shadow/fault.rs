// SPDX-License-Identifier: GPL-2.0

//! A page fault of the guest's that is not the guest's: the translation that it wanted is put into the
//! shadow pages.
//!
//! The guest's tables were walked before, without a lock, and the frame was looked up. Under the lock
//! it is seen that both still hold: the frame by the sequence count of the host's changes, as with EPT;
//! the guest's entries by another look at those from which an entry is made now. The look comes
//! after writes to the table are noticed (or, of an unsync table, count only once the guest
//! invalidates), so that what changes later takes the entry away again.
//!
//! # CR0.WP
//!
//! The processor runs with CR0.WP set, whatever the guest's is. Without it, supervisor mode may write to
//! read-only pages. A leaf that lets it do so must keep user mode from writing: it is made one of the
//! supervisor's, read and written by it alone, until user mode asks for the page and it is made again.
//! With SMEP such a page is not executed by the supervisor. With SMAP, or protection keys, it could be
//! accessed where a user's page cannot be: such a write is emulated.

use super::super::ept::Level;
use super::super::Mapping;
use super::page::Handle;
use super::prefetch::GROUP;
use super::role::Format;
use super::role::Modes;
use super::role::Regime;
use super::role::Rights;
use super::role::Role;
use super::roots::VcpuShadow;
use super::spte::Leaf;
use super::spte::Spte;
use super::sync::Tracked;
use super::Around;
use super::Lack;
use super::Shadow;
use super::ShadowMmu;
use super::Spare;
use crate::mmu::ept::Access;
use crate::x86::paging::Step;
use crate::x86::paging::Walk;
use kernel::prelude::*;

/// A translation that the guest wants.
pub(crate) struct ShadowWant<'a> {
    pub(crate) linear: u64,
    /// The guest's own translation.
    pub(crate) walk: &'a Walk,
    /// It is a write.
    pub(crate) write: bool,
    /// It is made by user mode.
    pub(crate) user: bool,
}

impl ShadowWant<'_> {
    /// The largest leaf that it can have: a small page of the guest's is in a table of small ones.
    pub(crate) fn largest_leaf(&self) -> Level {
        let paged = self.walk.entry_size() != 0;
        if paged && self.walk.translation.page_shift == 12 {
            Level::Page4K
        } else {
            Level::Page2M
        }
    }
}

/// How an attempt to put it in ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShadowMapped {
    /// The guest may go on. The leaf is of this level.
    Done(Level),
    /// Something has changed: walk, look up again.
    Stale,
    /// The access has to be emulated: it writes to a table of the guest's.
    Table,
    /// The same, for another reason.
    Emulate,
}

/// The same, with the lock held.
enum Outcome {
    /// By this entry.
    Mapped(Level, Handle),
    Stale,
    Table,
    /// A leaf of this level cannot be.
    TooLarge,
}

/// What is the same at each step on the way down.
struct Way<'a> {
    want: &'a ShadowWant<'a>,
    regime: Regime,
    /// The level of the guest's entry that maps the page; above all with paging off.
    guest: u8,
    /// What the leaf allows.
    rights: Rights,
    key: u8,
}

impl Way<'_> {
    /// The guest's entry that an entry of ours at `level` is made from.
    fn step(&self, level: Level) -> Option<Step> {
        if level.number() < self.guest {
            return None;
        }
        self.want.walk.step(level.number())
    }

    /// What belongs below an entry of `level`: which page, and the rights that are left.
    fn below(&self, level: Level, below: Level, rights: Rights) -> Option<(u64, Role, Rights)> {
        match self.step(level) {
            Some(step) if level.number() > self.guest => {
                let rights = rights.below(step.value, self.regime.modes);
                let gfn = self.want.walk.step(below.number())?.gpa >> 12;
                let role = self.regime.table(below, rights, self.want.linear);
                Some((gfn, role, rights))
            }
            _ => {
                let gfn = (self.want.walk.translation.gpa >> 12) & !level.mask();
                Some((gfn, Role::direct(below, self.rights, self.key), rights))
            }
        }
    }
}

impl ShadowMmu {
    /// Puts a translation in, if all still is what it was, and its neighbours: ENOMEM. `mapped` is called once it is,
    /// with the lock held. Sleeps.
    pub(crate) fn map(
        &self,
        around: &Around<'_>,
        changes: &super::super::invalidation::Invalidations,
        vcpu: &VcpuShadow,
        mapping: Mapping,
        want: &ShadowWant<'_>,
        mapped: impl Fn(),
    ) -> Result<ShadowMapped> {
        let Some(root) = vcpu.root() else {
            return Ok(ShadowMapped::Stale);
        };
        let regime = root.regime();
        let Some(way) = way(want, regime) else {
            return Ok(ShadowMapped::Emulate);
        };
        let mut mapping = mapping;
        let mut level = mapping.level.min(Level::Page2M);
        if level.number() > way.guest {
            level = Level::Page4K;
        }
        let mut page = mapping.frame.page.take();
        let mut spare = Spare::new();
        loop {
            let first = mapping.hva & !(level.mask() << 12 | 0xfff);
            let hvas = first..first.saturating_add(level.pages() << 12);
            let outcome = self.with(around, |state| {
                if !changes.unchanged(mapping.noted, &hvas) {
                    return Ok(Outcome::Stale);
                }
                state.recycle();
                let number = root.page(want.linear);
                let outcome = state.put(around, number, &way, &mapping, level, &mut spare)?;
                if let Outcome::Mapped(level, handle) = outcome {
                    mapped();
                    // Inside the lock: once the host has been told that the page may be dirty, and
                    // not before, may it be told to forget it.
                    if let Some(page) = page.take() {
                        page.put_used(mapping.frame.writable);
                    }
                    if level == Level::Page4K {
                        state.prefetch::<GROUP>(around, handle);
                    }
                }
                Ok(outcome)
            });
            match outcome {
                Ok(Outcome::Mapped(level, _)) => return Ok(ShadowMapped::Done(level)),
                Ok(Outcome::Stale) => return Ok(ShadowMapped::Stale),
                Ok(Outcome::Table) => return Ok(ShadowMapped::Table),
                Ok(Outcome::TooLarge) => level = Level::Page4K,
                // Should there be no end to it, as others write to those tables, the caller can give up.
                Err(Lack::Time) => return Ok(ShadowMapped::Stale),
                Err(lack) => spare.provide(lack)?,
            }
        }
    }
}

/// The way to what is wanted; none if the access must be emulated.
fn way<'a>(want: &'a ShadowWant<'a>, regime: Regime) -> Option<Way<'a>> {
    let walk = want.walk;
    let modes = regime.modes;
    let mut rights = Rights {
        write: walk.translation.writable,
        user: walk.translation.user,
        exec: !walk.nx,
    };
    let mut key = 0;
    if regime.format == Format::Off {
        rights = Rights::ALL;
    } else {
        if want.write && !rights.write {
            // Supervisor mode writes to a read-only page: see the head of this file.
            if want.user || modes.has(Modes::WP) {
                return None;
            }
            if rights.user && modes.has(Modes::STRICT_NOT_WP) {
                return None;
            }
            rights.exec &= !(rights.user && modes.has(Modes::SMEP_NOT_WP));
            rights.write = true;
            rights.user = false;
        }
        // Without the mark, the next write is to be noticed, so that it is set.
        rights.write &= walk.dirty;
        if rights.user && modes.has(Modes::PKE) {
            key = walk.key;
        }
    }
    let guest = match (regime.format, walk.translation.page_shift) {
        (Format::Off, _) => u8::MAX,
        (_, 0..=12) => 1,
        (_, 13..=22) => 2,
        _ => 3,
    };
    Some(Way {
        want,
        regime,
        guest,
        rights,
        key,
    })
}

impl Shadow {
    /// Goes down from a root and puts a leaf of `target` in.
    fn put(
        &mut self,
        around: &Around<'_>,
        root: u32,
        way: &Way<'_>,
        mapping: &Mapping,
        target: Level,
        spare: &mut Spare,
    ) -> Result<Outcome, Lack> {
        let mut number = root;
        let mut level = way.regime.root_level();
        let mut rights = Rights::ALL;
        let mut target = target;
        match self.pages.get(number) {
            Some(page) if page.valid => {
                // The guest's tables may have been walked from another CR3 than this root is for.
                let table = way.step(level).map(|step| step.gpa >> 12);
                if table.is_some_and(|gfn| gfn != page.gfn) {
                    return Ok(Outcome::Stale);
                }
            }
            _ => return Ok(Outcome::Stale),
        }
        loop {
            let handle = Handle::new(number, level.index(way.want.linear >> 12));
            let child = self.child(handle);
            if level == target && target > Level::Page4K && child.is_some() && self.nx_huge {
                // Once some of a large page had to be executable, all of it stays small.
                target = Level::Page4K;
            }
            if level == target {
                return self.put_leaf(around, handle, way, mapping, level, spare);
            }
            let Some(below) = level.below() else {
                return Ok(Outcome::Stale);
            };
            let Some((gfn, role, left)) = way.below(level, below, rights) else {
                return Ok(Outcome::Stale);
            };
            let same = child.filter(|child| {
                self.pages
                    .get(*child)
                    .is_some_and(|page| page.gfn == gfn && page.role == role && page.valid)
            });
            number = match same {
                Some(child) => {
                    if let Some(page) = self.pages.get_mut(child) {
                        page.writes = 0;
                    }
                    child
                }
                None => {
                    self.drop_entry(handle);
                    let child = self.get_page(around, gfn, role, spare)?;
                    let valid = self.pages.get(child).is_some_and(|page| page.valid);
                    if !valid || !still(around, way, level) {
                        return Ok(Outcome::Stale);
                    }
                    self.set_child(handle, child);
                    child
                }
            };
            rights = left;
            level = below;
        }
    }

    /// Puts a leaf in.
    fn put_leaf(
        &mut self,
        around: &Around<'_>,
        handle: Handle,
        way: &Way<'_>,
        mapping: &Mapping,
        level: Level,
        spare: &mut Spare,
    ) -> Result<Outcome, Lack> {
        let base = mapping.gfn & !level.mask();
        if !self.frames.make(base, &mut spare.nodes) {
            return Err(Lack::Nodes);
        }
        if !still(around, way, level) {
            return Ok(Outcome::Stale);
        }
        let want = way.want;
        let writable = way.rights.write && mapping.frame.writable;
        let mut write = writable && (!mapping.logged || want.write);
        if level > Level::Page4K {
            if self.any_tracked(base) {
                return Ok(Outcome::TooLarge);
            }
        } else if write {
            match self.tracked(base) {
                Tracked::No => {}
                Tracked::Lowest if want.write => self.unsync(base),
                _ if want.write => return Ok(Outcome::Table),
                _ => write = false,
            }
        }
        let leaf = Leaf {
            pfn: mapping.frame.pfn & !level.mask(),
            rights: way.rights,
            nx: !way.rights.exec || level > Level::Page4K && self.nx_huge,
            key: way.key,
            writable,
            write,
            mmio: mapping.frame.mmio,
            accessed: mapping.access != Access::NONE,
        };
        let new = Spte::leaf(level, &leaf);
        if let Some((page, index)) = self.pages.entry(handle) {
            let old = page.entry(index);
            if old.is_leaf(level) && page.link(index).key == base && !old.is_less_in(new) {
                page.table.word(index).put(new.bits());
                return Ok(Outcome::Mapped(level, handle));
            }
        }
        self.drop_entry(handle);
        self.set_leaf(handle, base, new);
        Ok(Outcome::Mapped(level, handle))
    }
}

/// Whether the guest's entry that an entry of `level` is made from still is what it was.
fn still(around: &Around<'_>, way: &Way<'_>, level: Level) -> bool {
    let Some(step) = way.step(level) else {
        return true;
    };
    let mut raw = [0; 8];
    let size = usize::from(way.want.walk.entry_size()).min(8);
    let Some(buf) = raw.get_mut(..size) else {
        return false;
    };
    (around.peek)(step.gpa, buf) && u64::from_le_bytes(raw) == step.value
}
