// SPDX-License-Identifier: GPL-2.0

//! A vCPU's roots: what CR3 of the processor is while the guest has loaded something else there.
//!
//! A root belongs to what the guest's CR3 names and to how the guest translates. A vCPU keeps a few,
//! so that a guest that switches between processes finds the last ones. With PAE paging, which is what
//! the processor is in while the guest has two levels or no paging at all, a root is a table of
//! four entries, in memory below 4 GiB, that lead to pages of the second level.
//!
//! Where the guest's CR3 leads outside of memory there is no table, and the root is empty: every access
//! is a fault, and the guest's.

use super::role::Format;
use super::role::Regime;
use super::role::Rights;
use super::Around;
use super::Lack;
use super::Shadow;
use super::ShadowMmu;
use super::Spare;
use crate::linux::mm::cond_resched;
use crate::linux::page::KernelPage;
use crate::x86::paging::Paging;
use kernel::prelude::*;

/// How many roots a vCPU keeps.
const ROOTS: usize = 4;
/// Bytes in a table of four entries.
const FOUR: usize = 32;

/// What a root is for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    regime: Regime,
    /// The guest's tables at the top, by their addresses: one, or four, as far as they are there.
    tables: [Option<u64>; 4],
}

impl Key {
    fn of(paging: &Paging) -> Self {
        let regime = Regime::of(paging);
        let tables = match regime.format {
            Format::Off => [Some(0), Some(1 << 30), Some(2 << 30), Some(3 << 30)],
            Format::Bits32 => [Some(paging.cr3.root() & 0xffff_f000); 4],
            Format::Pae => paging
                .pdptes
                .unwrap_or_default()
                .map(|entry| (entry & 1 != 0).then_some(entry & 0x000f_ffff_ffff_f000)),
            Format::Long => [Some(paging.cr3.root()), None, None, None],
        };
        Self { regime, tables }
    }
}

/// A root that a vCPU can run on.
#[derive(Clone, Copy)]
pub(super) struct Root {
    key: Key,
    /// Shadow pages, held as roots; zero for none.
    pages: [u32; 4],
    /// Tables below it may be old, whatever the guest says of its next CR3.
    stale: bool,
}

impl Root {
    #[inline]
    pub(super) const fn regime(&self) -> Regime {
        self.key.regime
    }

    /// The page that an address is looked up in.
    #[inline]
    pub(super) const fn page(&self, linear: u64) -> u32 {
        match self.key.regime.format {
            Format::Long => self.pages[0],
            _ => self.pages[(linear >> 30) as usize & 3],
        }
    }
}

/// What a vCPU knows of its shadow pages.
///
/// Whoever drops it has [`ShadowMmu::put_roots`] called before.
pub(crate) struct VcpuShadow {
    roots: [Option<Root>; ROOTS],
    /// Which of them it runs on.
    current: usize,
    /// How many loads there have been, and how many there had been with the last of each.
    loads: u64,
    loaded: [u64; ROOTS],
    /// Each one's table of four entries.
    fours: KernelPage,
    /// What the guest's next CR3 brings.
    next: Next,
    /// The guest has loaded CR3, or had its translations go: the root is to be loaded before the next entry.
    reload: bool,
    /// The write to a table of the guest's that is being emulated, if the table can be let go instead.
    pub(crate) table: Option<TableWrite>,
    /// The last write for which a table was let go, so that it could be executed, and RIP. Should the frame be a table
    /// again when the same comes back, the instruction needs it as one.
    pub(crate) let_go: Option<(TableWrite, u64)>,
    /// How many roots had become invalid when it last looked at its own.
    roots_lost: u64,
    /// How many faults there were, for the oracle.
    pub(crate) faults: u32,
}

/// What becomes of old translations when the guest loads CR3.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Next {
    /// They go.
    #[default]
    Flush,
    /// They stay: bit 63 of the value said so.
    Keep,
}

/// A write to a table of the guest's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct TableWrite {
    /// The table's frame.
    pub(crate) gfn: u64,
    /// Where the guest writes.
    pub(crate) linear: u64,
}

impl VcpuShadow {
    /// A vCPU that has not run: ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            roots: [None; ROOTS],
            current: 0,
            loads: 0,
            loaded: [0; ROOTS],
            fours: KernelPage::new_low()?,
            next: Next::Flush,
            reload: true,
            table: None,
            let_go: None,
            roots_lost: 0,
            faults: 0,
        })
    }

    /// The root that it runs on.
    pub(super) fn root(&self) -> Option<&Root> {
        self.roots.get(self.current)?.as_ref()
    }

    /// The next load of a root is none of CR3.
    pub(crate) fn keep_translations(&mut self) {
        self.next = Next::Keep;
    }

    /// The guest loads CR3; `keep`: and wants what it knows of the new one's translations to stay.
    pub(crate) fn loads_cr3(&mut self, keep: bool) {
        self.let_go = None;
        self.next = if keep { Next::Keep } else { Next::Flush };
        self.reload = true;
    }

    /// Whether a root is to be loaded before the next entry.
    #[inline]
    pub(crate) fn wants_load(&self) -> bool {
        self.reload
    }

    /// The guest has all its translations go: those of other roots when they are loaded next.
    pub(crate) fn flush_all(&mut self) {
        for root in self.roots.iter_mut().flatten() {
            root.stale = true;
        }
        self.reload = true;
    }
}

impl ShadowMmu {
    /// Finds or makes the root for what the guest has loaded, which is in accord with the guest's tables then as
    /// far as it must be; what is to be loaded into CR3 of the processor: ENOMEM. `backed` says if there is memory at
    /// a guest frame, and `nothing` is the address of an empty table. Sleeps.
    pub(crate) fn load(
        &self,
        around: &Around<'_>,
        vcpu: &mut VcpuShadow,
        paging: &Paging,
        backed: impl Fn(u64) -> bool,
        nothing: u64,
    ) -> Result<u64> {
        let mut key = Key::of(paging);
        if key.regime.format != Format::Off {
            for table in &mut key.tables {
                *table = table.filter(|gpa| backed(gpa >> 12));
            }
        }
        let keep = core::mem::take(&mut vcpu.next) == Next::Keep;
        // Should there be no memory for it, the guest is not entered before it is there: the processor's CR3 is still
        // the old one, of a root that may go now.
        vcpu.reload = true;
        self.drop_invalid(around, vcpu);
        let same = |root: &Option<Root>| root.as_ref().is_some_and(|root| root.key == key);
        let place = match vcpu.roots.iter().position(same) {
            Some(place) => place,
            None => self.make(around, vcpu, key)?,
        };
        vcpu.current = place;
        vcpu.loads = vcpu.loads.wrapping_add(1);
        if let Some(loaded) = vcpu.loaded.get_mut(place) {
            *loaded = vcpu.loads;
        }
        let Some(Some(root)) = vcpu.roots.get_mut(place) else {
            return Err(EINVAL);
        };
        let sync = !keep || root.stale;
        root.stale = false;
        loop {
            let loaded = self.with(around, |state| {
                if sync && state.sync_some(around, &root.pages) {
                    return None;
                }
                Some(state.hardware_root(root, &vcpu.fours, place, nothing))
            });
            if let Some(cr3) = loaded {
                vcpu.reload = false;
                return Ok(cr3);
            }
            cond_resched();
        }
    }

    /// Makes a root in the place of the one that was used least lately, and says where: ENOMEM.
    fn make(&self, around: &Around<'_>, vcpu: &mut VcpuShadow, key: Key) -> Result<usize> {
        let age = |(_, (root, loaded)): &(usize, (&mut Option<Root>, &u64))| {
            root.as_ref().map_or(0, |_| **loaded)
        };
        let places = vcpu.roots.iter_mut().zip(&vcpu.loaded).enumerate();
        let Some((place, (kept, _))) = places.min_by_key(age) else {
            return Err(EINVAL);
        };
        if let Some(old) = kept.take() {
            self.put(around, &old.pages);
        }
        let mut root = Root {
            key,
            pages: [0; 4],
            // It may be one that was kept before, and has missed what was invalidated since.
            stale: true,
        };
        for (index, table) in key.tables.into_iter().enumerate() {
            let Some(gpa) = table else { continue };
            match self.hold(around, key.regime, gpa, index) {
                Ok(number) => root.pages[index & 3] = number,
                Err(e) => {
                    self.put(around, &root.pages);
                    return Err(e);
                }
            }
        }
        *kept = Some(root);
        Ok(place)
    }

    /// Holds the page for one of the guest's tables at the top as a root: ENOMEM.
    fn hold(&self, around: &Around<'_>, regime: Regime, gpa: u64, index: usize) -> Result<u32> {
        let level = regime.root_level();
        let linear = (index as u64) << 30;
        let role = match regime.format {
            Format::Off => super::role::Role::direct(level, Rights::ALL, 0),
            _ => regime.table(level, Rights::ALL, linear),
        };
        let mut spare = Spare::new();
        loop {
            let held = self.with(around, |state| {
                state.recycle();
                let number = state.get_page(around, gpa >> 12, role, &mut spare)?;
                if let Some(page) = state.pages.get_mut(number) {
                    state.held = state.held.saturating_add((page.roots == 0).into());
                    page.roots = page.roots.saturating_add(1);
                    state.roots_lost = state.roots_lost.wrapping_add((!page.valid).into());
                }
                Ok::<_, Lack>(number)
            });
            match held {
                Ok(number) => return Ok(number),
                Err(lack) => spare.provide(lack)?,
            }
        }
    }

    /// Gives pages back that were held as roots.
    fn put(&self, around: &Around<'_>, pages: &[u32; 4]) {
        self.with(around, |state| {
            for number in pages {
                if let Some(page) = state.pages.get_mut(*number) {
                    state.held = state.held.saturating_sub((page.roots == 1).into());
                    page.roots = page.roots.saturating_sub(1);
                    state.bury(*number);
                }
            }
        });
    }

    /// Gives back roots that nobody can find any more: they map nothing.
    fn drop_invalid(&self, around: &Around<'_>, vcpu: &mut VcpuShadow) {
        let mut gone = [None; ROOTS];
        {
            let state = self.state.lock();
            if state.roots_lost == vcpu.roots_lost {
                return;
            }
            vcpu.roots_lost = state.roots_lost;
            let valid = |n: u32| n == 0 || state.pages.get(n).is_some_and(|page| page.valid);
            for (place, gone) in vcpu.roots.iter_mut().zip(&mut gone) {
                if place.is_some_and(|root| !root.pages.into_iter().all(valid)) {
                    *gone = place.take();
                }
            }
        }
        for root in gone.into_iter().flatten() {
            self.put(around, &root.pages);
        }
    }

    /// Gives all roots of a vCPU back.
    pub(crate) fn put_roots(&self, around: &Around<'_>, vcpu: &mut VcpuShadow) {
        for place in &mut vcpu.roots {
            if let Some(root) = place.take() {
                self.put(around, &root.pages);
            }
        }
    }

    /// The guest invalidates an address, in any of its roots.
    pub(crate) fn invalidate(&self, around: &Around<'_>, vcpu: &VcpuShadow, linear: u64) {
        self.with(around, |state| {
            for root in vcpu.roots.iter().flatten() {
                state.invalidate(around, root.page(linear), linear);
            }
        });
    }
}

impl Shadow {
    /// What is to be in CR3 for the root in a place.
    fn hardware_root(&self, root: &Root, fours: &KernelPage, place: usize, nothing: u64) -> u64 {
        let phys = |number: u32| self.pages.get(number).map(|page| page.table.phys());
        if root.key.regime.format == Format::Long {
            return phys(root.pages[0]).unwrap_or(nothing);
        }
        let offset = place % ROOTS * FOUR;
        for (number, at) in root.pages.into_iter().zip((offset..).step_by(8)) {
            // Present, and no other bit: the others are reserved, or say how it is cached.
            fours.write(at, phys(number).map_or(0, |phys| phys | 1));
        }
        fours.phys() | offset as u64
    }
}
