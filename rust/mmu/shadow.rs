// SPDX-License-Identifier: GPL-2.0

//! Shadow page tables: what the processor is given where it cannot translate guest-physical addresses
//! by tables of its own.
//!
//! The guest's tables translate linear to guest-physical addresses, the memslots and the host's
//! tables those to host-physical ones. The processor walks one set of tables only, so it gets tables
//! that do both at once. They are filled on page faults, as a TLB is, and that is what they are: a
//! cache of translations, with the rules of a TLB as to when they must follow the guest's.
//! Documentation/shadow.rst explains them.
//!
//! There is one [`ShadowMmu`] for each VM, and one [`VcpuShadow`] for each vCPU, which says which
//! tables it runs on.
//!
//! | file | what |
//! |---|---|
//! | [`role`] | what a shadow page stands for |
//! | [`spte`] | its entries |
//! | [`page`] | the page, and all pages by number |
//! | [`dir`] | guest frames, with what maps them and what stands for them |
//! | [`lists`] | entries come and go, with the lists that they are in |
//! | [`pages`] | the cache: found, made, recycled |
//! | [`sync`] | tables that the guest writes to unnoticed |
//! | [`fault`] | a translation is put in |
//! | [`prefetch`] | and its neighbours |
//! | [`audit`] | the oracle |
//! | [`host`] | the host changes, ages or watches what is mapped |
//! | [`roots`] | a vCPU's roots: CR3 loads, INVLPG |
//!
//! # One lock
//!
//! All of it is under one spinlock, the place of which is that of the MMU lock (see [`super`]). Nobody
//! sleeps inside; guest memory is read inside only as far as it is at hand ([`Around::peek`]).
//!
//! # Flushes
//!
//! Processors cache what they find in the tables. Who takes an entry away for the host must flush
//! before the lock is released, as everywhere in the MMU. Who does so for the guest need not: the
//! guest invalidates by itself what it must not use any more. But then the host does not find the
//! entry later. So such flushes are *owed*, and paid with the next one that cannot wait: the next time
//! the host takes something away, or a table of the guest's is write-protected. Pages that were taken
//! out can be used again, or freed, then as well.

mod audit;
mod dir;
mod fault;
mod host;
mod lists;
mod page;
mod pages;
mod prefetch;
mod role;
mod roots;
mod spte;
mod sync;

pub(crate) use fault::ShadowMapped;
pub(crate) use fault::ShadowWant;
pub(crate) use prefetch::AtHand;
pub(crate) use roots::TableWrite;
pub(crate) use roots::VcpuShadow;

use super::caps::ShadowCaps;
use crate::tlb::Request;
use crate::tlb::VcpuSet;
use core::ops::Range;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use dir::Directory;
use dir::Nodes;
use kernel::prelude::*;
use kernel::sync::new_spinlock;
use kernel::sync::SpinLock;
use page::Arena;
use page::Dead;
use page::Place;
use page::ShadowPage;

/// What operations on shadow pages need of the VM.
pub(crate) struct Around<'a> {
    /// Whose processors may have cached translations.
    pub(crate) vcpus: &'a VcpuSet,
    /// Reads guest memory that is at hand, or says false. Does not sleep.
    pub(crate) peek: &'a dyn Fn(u64, &mut [u8]) -> bool,
    /// Finds what backs consecutive guest frames, as far as that is at hand. Does not sleep.
    pub(crate) find: &'a dyn Fn(Range<u64>) -> Option<AtHand>,
}

impl<'a> Around<'a> {
    /// For operations that read nothing.
    pub(crate) fn blind(vcpus: &'a VcpuSet) -> Self {
        Self {
            vcpus,
            peek: &|_, _| false,
            find: &|_| None,
        }
    }
}

/// What is there, and what has happened. The numbers of events wrap.
#[derive(Clone, Copy, Default)]
pub(crate) struct ShadowCounts {
    /// Leaves of 4 KiB.
    pub(crate) small: u64,
    /// Leaves of 2 MiB.
    pub(crate) large: u64,
    /// Pages that stand for a table of the guest's, or for none.
    pub(crate) pages: u64,
    /// Pages that are kept to be used again.
    pub(crate) idle: u64,
    /// Pages that were not in the cache, and were made.
    pub(crate) made: u64,
    /// Pages that went, for whatever reason.
    pub(crate) zapped: u64,
    /// Those of them that made room for others.
    pub(crate) recycled: u64,
    /// And those that the guest wrote to as if they were no tables any more.
    pub(crate) flooded: u64,
    /// Writes to tables of the guest's that were noticed.
    pub(crate) writes: u64,
    /// Tables that became writable.
    pub(crate) unsynced: u64,
    /// Tables that were brought into accord with the guest's.
    pub(crate) synced: u64,
    /// Leaves that were put in beside those that were wanted.
    pub(crate) prefetched: u64,
}

/// All that the lock guards.
struct Shadow {
    pages: Arena,
    frames: Directory,
    /// How many pages there may be, but for roots.
    limit: usize,
    /// How many pages are roots of vCPUs.
    held: usize,
    /// How many roots have become invalid while vCPUs had them: who sees no more than before need not look at its own.
    roots_lost: u64,
    /// Where recycling went on last.
    hand: u32,
    /// Processors may still know entries that have gone.
    owed: bool,
    /// Pages that processors may still know.
    dead: Dead,
    /// Pages that no processor knows any more. They say nothing: some are kept to be used again, the rest is freed when the
    /// lock has been released.
    idle: Dead,
    counts: ShadowCounts,
    /// Large leaves are not executable.
    nx_huge: bool,
}

/// So many pages wait for a flush that somebody else needs, at most.
const MAX_DEAD: usize = 64;

/// So many pages are kept to be used again, at most: what one flush sets free. They are clear, and need not be allocated.
const MAX_IDLE: usize = MAX_DEAD;

impl Shadow {
    /// Has all vCPUs forget what they know of the tables, before they enter the guest again.
    fn flush(&mut self, around: &Around<'_>) {
        around.vcpus.request_all_and_wait(Request::TlbFlush);
        self.owed = false;
        while let Some(page) = self.dead.pop() {
            self.idle.push(page);
        }
    }

    /// Flushes if that is owed.
    fn pay(&mut self, around: &Around<'_>) {
        if self.owed {
            self.flush(around);
        }
    }
}

/// What an operation needs and can only have where one may sleep.
#[derive(Clone, Copy)]
enum Lack {
    Page,
    Nodes,
    /// For so many pages.
    Room(usize),
    /// Others have to get the lock before it goes on.
    Time,
}

/// What was allocated for it.
struct Spare {
    page: Option<KBox<ShadowPage>>,
    nodes: Nodes,
    room: KVVec<Place>,
}

impl Spare {
    /// The most pages that a fault makes.
    const MOST: usize = 4;

    const fn new() -> Self {
        Self {
            page: None,
            nodes: Nodes::new(),
            room: KVVec::new(),
        }
    }

    /// Allocates what is lacking, or waits: ENOMEM. Sleeps.
    fn provide(&mut self, lack: Lack) -> Result {
        match lack {
            Lack::Page => self.page = Some(ShadowPage::new()?),
            Lack::Nodes => self.nodes.fill()?,
            Lack::Room(0) => return Err(ENOMEM),
            Lack::Time => crate::linux::mm::cond_resched(),
            Lack::Room(count) => self.room = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?,
        }
        Ok(())
    }
}

/// The shadow page tables of a VM.
#[pin_data]
pub(crate) struct ShadowMmu {
    #[pin]
    state: SpinLock<Shadow>,
    /// For the oracle: how many write to guest memory for the guest, and have not said so yet ([`ShadowMmu::written`]).
    /// What the tables hold may differ from the guest's for as long.
    writing: AtomicU32,
}

/// A write to guest memory that the tables are told of before this is dropped.
pub(crate) struct Writing<'a>(&'a AtomicU32);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl ShadowMmu {
    /// Tables that map nothing: ENOMEM.
    pub(crate) fn new(caps: ShadowCaps) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let state = Shadow {
                pages: Arena::new(),
                frames: Directory::new()?,
                limit: MIN_PAGES,
                held: 0,
                roots_lost: 0,
                hand: 0,
                owed: false,
                dead: Dead::new(),
                idle: Dead::new(),
                counts: ShadowCounts::default(),
                nx_huge: caps.nx_huge,
            };
            Ok(try_pin_init!(Self {
                state <- new_spinlock!(state, "rkvm_shadow"),
                writing: AtomicU32::new(0),
            }? Error))
        })
    }

    /// To be held from before a write to guest memory until [`ShadowMmu::written`] has been told of it.
    pub(crate) fn writing(&self) -> Writing<'_> {
        self.writing.fetch_add(1, Ordering::SeqCst);
        Writing(&self.writing)
    }

    /// Runs `f` with the lock held, and frees what can be freed after that.
    fn with<R>(&self, around: &Around<'_>, f: impl FnOnce(&mut Shadow) -> R) -> R {
        let mut state = self.state.lock();
        let result = f(&mut state);
        if state.dead.count > MAX_DEAD {
            state.flush(around);
        }
        let surplus = state.take_surplus();
        drop(state);
        drop(surplus);
        result
    }

    /// The counts.
    pub(crate) fn counts(&self) -> ShadowCounts {
        let state = self.state.lock();
        ShadowCounts {
            pages: state.pages.used() as u64,
            idle: state.idle.count as u64,
            ..state.counts
        }
    }

    /// Sets how many pages there may be, but for those that vCPUs run on, and sees to it. As KVM, no VM has
    /// to do with fewer than [`MIN_PAGES`].
    pub(crate) fn set_limit(&self, around: &Around<'_>, pages: usize) {
        let limit = pages.max(MIN_PAGES);
        loop {
            let more = self.with(around, |state| {
                state.limit = limit;
                let goal = limit.max(state.pages.used().saturating_sub(BATCH));
                state.zap_some(goal) != 0 && state.pages.used() > limit
            });
            if !more {
                return;
            }
            crate::linux::mm::cond_resched();
        }
    }
}

impl ShadowMmu {
    /// Frees the pages that are kept to be used again, and so many others, or as many as there are but for roots; returns how
    /// many.
    pub(crate) fn shrink(&self, around: &Around<'_>, pages: usize) -> u64 {
        let mut left = pages;
        let mut zapped = 0u64;
        while left != 0 {
            let here = left.min(BATCH);
            let (gone, idle) = self.with(around, |state| {
                let goal = state.pages.used().saturating_sub(here);
                let gone = state.zap_some(goal);
                state.pay(around);
                (gone, state.idle.take())
            });
            // Those that went are among them.
            zapped = zapped.wrapping_add(gone.max(idle.count as u64));
            if gone == 0 {
                break;
            }
            left = left.saturating_sub(here);
        }
        zapped
    }
}

/// Pages that go at once.
const BATCH: usize = 64;

/// The fewest pages that a VM's limit may be.
pub(crate) const MIN_PAGES: usize = 64;
