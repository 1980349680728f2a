// SPDX-License-Identifier: GPL-2.0

//! What the processor translates guest-physical addresses with: EPT tables, filled on faults, and
//! emptied when the host or the user takes the memory away.
//!
//! There is one [`Mmu`] for each VM, owned by its guest memory ([`crate::mem`]), which says what is
//! to be mapped; this says how. No entry outlives the host mapping that it was made from: see
//! [`invalidation`].
//!
//! # Locks, in the order in which they are taken
//!
//! 1. a vCPU's mutex, the VM's own locks;
//! 2. the memslots' update mutex (`mem.rs`), held to change memslots. It is held over grace periods
//!    of 3, so nobody takes it inside 3;
//! 3. the memslots' SRCU section (`mem.rs`), held to use a memslot: over faults, guest memory
//!    accesses and notifier callbacks;
//! 4. the host's: `mmap_lock`, and what mm/ holds when it calls the notifier (`i_mmap_rwsem`,
//!    `anon_vma`, page-table locks). Faults and accesses take them inside 3, notifier callbacks
//!    enter 3 inside them: no deadlock, as entering 3 never waits, and 2 is not taken inside 4;
//! 5. the MMU lock (`Mmu::tables`), a rwlock: read to make entries, let them grow and age, watch them
//!    for writes and split them; write to take them away. Nothing is allocated and nobody sleeps
//!    inside;
//! 6. the invalidations' spinlock (`Invalidations::range`), and the vCPU set's (`VcpuSet::inner`),
//!    which is held until the interrupted CPUs answer. Neither inside the other.
//!
//! None is taken in interrupts, and all are taken with interrupts on: a CPU that spins for one still
//! answers the IPI that its holder waits for.
//!
//! # Flush before free, flush before unlock
//!
//! What is taken away is flushed before the MMU lock is released, even though the pages are needed
//! only later: a second change of the same address would find nothing to zap, not flush, and let the
//! page go while the first one's flush is on its way. Tables are freed after the flush, outside the
//! lock: no walk of software can be in them, as those hold the lock, nor one of hardware.
//!
//! The dirty log's watch on writes is an exception: see [`log`].
//!
//! Many ranges are taken away in several goes, each of which flushes before it releases the lock. The
//! work under the lock does not depend on how much is mapped: tables that go as a whole are unlinked,
//! and what is in them is looked at when they are freed.

pub(crate) mod caps;
pub(crate) mod counts;
pub(crate) mod ept;
pub(crate) mod invalidation;
mod log;
pub(crate) mod shadow;
mod table;
mod tables;

use crate::linux::mm::cond_resched;
use crate::linux::mm::HostFrame;
use crate::linux::mmu_notifier::HvaRange;
use crate::linux::rwlock::RwLock;
use crate::tlb::Request;
use crate::tlb::VcpuSet;
use caps::PagingCaps;
use core::ops::Range;
use counts::Counts;
use ept::Access;
use ept::EptCaps;
use ept::Format;
use ept::Frame;
use ept::Level;
use invalidation::Invalidations;
use invalidation::Sequence;
use kernel::prelude::*;
use shadow::Around;
use shadow::ShadowMmu;
use table::Table;
use tables::Detached;
use tables::Outcome;
use tables::Tables;
use tables::Want;

/// The second stage of address translation of one VM.
#[pin_data]
pub(crate) struct Mmu {
    #[pin]
    tables: RwLock<Tables>,
    #[pin]
    changes: Invalidations,
    #[pin]
    vcpus: VcpuSet,
    format: Format,
    eptp: u64,
    /// In the place of `tables`, where there is no second stage.
    shadow: Option<Pin<KBox<ShadowMmu>>>,
}

/// A frame that was looked up for a guest frame, and what must still hold when it is mapped.
pub(crate) struct Mapping {
    /// The guest frame that is wanted.
    pub(crate) gfn: u64,
    /// What backs that frame.
    pub(crate) frame: HostFrame,
    /// How large a leaf may be: the memslot and the host map all of it alike.
    pub(crate) level: Level,
    /// The host virtual address of the frame.
    pub(crate) hva: u64,
    /// Noted before the look-up.
    pub(crate) noted: Sequence,
    /// What the guest wants.
    pub(crate) access: Access,
    /// The memslot's writes are logged: `level` is the lowest then.
    pub(crate) logged: bool,
}

/// How an attempt to map ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// The guest may go on. The leaf is at least of this level.
    Done(Level),
    /// The host has changed something: look up again.
    Stale,
}

impl Mmu {
    /// An MMU that maps nothing: ENOMEM.
    pub(crate) fn new(caps: PagingCaps) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let (caps, shadow) = match caps {
                PagingCaps::Ept(caps) => (caps, None),
                PagingCaps::Shadow(caps) => {
                    let shadow = KBox::pin_init(ShadowMmu::new(caps), GFP_KERNEL_ACCOUNT)?;
                    (EptCaps::of_shadow(&caps), Some(shadow))
                }
            };
            let format = Format::new(&caps);
            let tables = Tables::new(format)?;
            let eptp = tables.eptp();
            Ok(try_pin_init!(Self {
                tables <- RwLock::new(tables),
                changes <- Invalidations::new(),
                vcpus <- VcpuSet::new(),
                format,
                eptp,
                shadow,
            }? Error))
        })
    }

    /// The EPT pointer for the VMCS, if there is EPT. Does not change.
    #[inline]
    pub(crate) fn eptp(&self) -> Option<u64> {
        self.shadow.is_none().then_some(self.eptp)
    }

    /// The shadow page tables, if there is no EPT.
    #[inline]
    pub(crate) fn shadow(&self) -> Option<&ShadowMmu> {
        self.shadow.as_deref()
    }

    /// The physical address of a table that stays empty, where there is no EPT.
    pub(crate) fn nothing(&self) -> u64 {
        self.eptp & !0xfff
    }

    /// How entries are made.
    #[inline]
    pub(crate) fn format(&self) -> &Format {
        &self.format
    }

    /// The vCPUs that run on these tables.
    #[inline]
    pub(crate) fn vcpus(&self) -> &VcpuSet {
        &self.vcpus
    }

    /// The changes of the host's mappings.
    #[inline]
    pub(crate) fn changes(&self) -> &Invalidations {
        &self.changes
    }

    /// Calls `f` with the counts of tables and leaves.
    pub(crate) fn with_counts<R>(&self, f: impl FnOnce(&Counts) -> R) -> R {
        f(self.tables.read().counts())
    }

    /// Maps a frame, if it still is what it was: ENOMEM. `mapped` is called once it is, with the MMU
    /// lock held.
    pub(crate) fn map(&self, mapping: Mapping, mapped: impl Fn()) -> Result<Mapped> {
        let Mapping { mut level, .. } = mapping;
        let mut page = mapping.frame.page;
        let mut spare: Option<Table> = None;
        loop {
            let mask = level.mask();
            let frame = Frame {
                pfn: mapping.frame.pfn & !mask,
                writable: mapping.frame.writable,
                mmio: mapping.frame.mmio,
                logged: mapping.logged,
            };
            let want = Want {
                gfn: mapping.gfn,
                level,
                entry: self.format.leaf(level, &frame, mapping.access),
                access: mapping.access,
            };
            let first = mapping.hva & !(mask << 12 | 0xfff);
            let hvas = first..first.saturating_add(level.pages() << 12);
            let outcome = {
                let tables = self.tables.read();
                if !self.changes.unchanged(mapping.noted, &hvas) {
                    return Ok(Mapped::Stale);
                }
                let outcome = tables.install(&want, &mut spare);
                if outcome == Outcome::Mapped {
                    mapped();
                    // Inside the lock: once the host has been told that the page may be dirty, and
                    // not before, may it be told to forget it.
                    if let Some(page) = page.take() {
                        page.put_used(mapping.frame.writable);
                    }
                }
                outcome
            };
            match outcome {
                Outcome::Mapped => return Ok(Mapped::Done(level)),
                Outcome::NeedTable => spare = Some(Table::new()?),
                // Once some of a large page had to be executable, all of it stays small.
                Outcome::TableInTheWay if self.format.nx_huge => {
                    level = level.below().unwrap_or(Level::Page4K);
                }
                // What is mapped beside the frame need not go for it.
                Outcome::LargeLeafInTheWay => self.split(mapping.gfn)?,
                Outcome::TableInTheWay | Outcome::LeafInTheWay => {
                    self.remove(true, |tables, detached| tables.make_way(&want, detached));
                }
            }
        }
    }

    /// Unmaps guest frames; returns if any were mapped. May sleep, if `may_sleep`, when it has let all
    /// locks go.
    ///
    /// The lock is released between ranges when there are many: nothing says that all of them must go
    /// at once, and nobody maps them again meanwhile, as whoever calls this has made sure of that.
    pub(crate) fn zap(&self, gfns: impl Iterator<Item = Range<u64>>, may_sleep: bool) -> bool {
        if let Some(shadow) = self.shadow() {
            return shadow.zap(&Around::blind(&self.vcpus), gfns, may_sleep);
        }
        let mut gfns = gfns.peekable();
        let mut removed = false;
        while gfns.peek().is_some() {
            removed |= self.remove(may_sleep, |tables, detached| {
                while let Some(range) = gfns.next_if(|_| !detached.is_long()) {
                    tables.zap(range, detached);
                }
            });
            if may_sleep {
                cond_resched();
            }
        }
        removed
    }

    /// Unmaps the frames of a memslot that goes, which nobody maps any more. Sleeps.
    pub(crate) fn zap_slot(&self, gfns: Range<u64>) {
        if let Some(shadow) = self.shadow() {
            return shadow.zap_slot(&Around::blind(&self.vcpus), gfns);
        }
        self.remove(true, |tables, detached| {
            detached.be_thorough();
            tables.zap(gfns, detached);
        });
    }

    /// Unmaps everything.
    pub(crate) fn zap_all(&self, may_sleep: bool) {
        if let Some(shadow) = self.shadow() {
            return shadow.zap_all(&Around::blind(&self.vcpus), may_sleep);
        }
        self.zap(core::iter::once(0..self.format.gfn_limit), may_sleep);
    }

    /// Takes entries away, and all that this needs: see the head of this file. Returns if there were
    /// any.
    fn remove(&self, may_sleep: bool, f: impl FnOnce(&mut Tables, &mut Detached)) -> bool {
        let mut detached = Detached::new();
        {
            let mut tables = self.tables.write();
            f(&mut tables, &mut detached);
            if detached.must_flush() {
                self.vcpus.request_all_and_wait(Request::TlbFlush);
            }
        }
        if !detached.must_flush() {
            return false;
        }
        // SAFETY: Flushed above.
        let gone = unsafe { detached.free(may_sleep) };
        self.tables.read().counts().gone(&gone);
        true
    }

    /// Clears accessed marks; returns if any was set. With `flush`, cached translations go too, so
    /// that the next access is seen. Does not sleep.
    pub(crate) fn clear_young(&self, gfns: impl Iterator<Item = Range<u64>>, flush: bool) -> bool {
        if let Some(shadow) = self.shadow() {
            return shadow.clear_young(&Around::blind(&self.vcpus), gfns, flush);
        }
        if !self.format.ad {
            // The processor keeps no marks: what was mapped may have been used, and its next use
            // shows as a fault.
            return self.zap(gfns, false);
        }
        let tables = self.tables.read();
        let mut young = false;
        for range in gfns {
            young |= tables.clear_young(range);
        }
        if young && flush {
            self.vcpus.request_all_and_wait(Request::TlbFlush);
        }
        young
    }

    /// Returns if any accessed mark is set. Does not sleep.
    pub(crate) fn test_young(&self, mut gfns: impl Iterator<Item = Range<u64>>) -> bool {
        if let Some(shadow) = self.shadow() {
            return shadow.test_young(&Around::blind(&self.vcpus), gfns);
        }
        let tables = self.tables.read();
        gfns.any(|range| tables.test_young(range))
    }
}

/// The host addresses of one page.
#[inline]
pub(crate) fn page_of(hva: u64) -> HvaRange {
    let start = hva & !0xfff;
    start..start.saturating_add(0x1000)
}
