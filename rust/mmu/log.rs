// SPDX-License-Identifier: GPL-2.0

//! Watching the guest's writes for the dirty log.
//!
//! A small leaf is watched if the next write through it is noticed: by the processor's log, if it has
//! one, or as an EPT violation ([`LogBy`](super::ept::LogBy)). A large leaf cannot be, as all its pages
//! share one flag: it is split first.
//!
//! Nothing is taken from the host's mappings here, so the MMU lock is held for reading only, and the
//! flush comes later, once for all, before the log's reader is told. Until then a vCPU may write
//! unnoticed to what was mapped as writable, and that is the log which is being read. A change of the
//! host's mappings in between still finds the entries and does its own flush.

use super::ept::Level;
use super::shadow::Around;
use super::table::Table;
use super::Mmu;
use crate::linux::mm::cond_resched;
use crate::tlb::Request;
use core::ops::Range;
use kernel::prelude::*;

/// How many frames are watched with the lock held.
const BATCH: u64 = 1 << 15;

impl Mmu {
    /// Makes the next write to each of `gfns` be noticed, once the translations are flushed
    /// ([`flush`](Self::flush)); returns if that is necessary. Sleeps.
    pub(crate) fn watch_writes(&self, gfns: Range<u64>) -> bool {
        if let Some(shadow) = self.shadow() {
            return shadow.watch_writes(&Around::blind(&self.vcpus), gfns);
        }
        let mut changed = false;
        let mut at = gfns.start;
        while at < gfns.end {
            let end = at.saturating_add(BATCH).min(gfns.end);
            let watched = self.tables.read().watch_writes(at..end);
            changed |= watched.changed;
            at = match watched.large {
                None => end,
                Some(gfn) if self.split(gfn).is_ok() => gfn,
                // It is split by the fault of a write, which can say what is missing.
                Some(gfn) => {
                    let tables = self.tables.read();
                    changed |= tables.watch_large(gfn);
                    (gfn | Level::Page2M.mask()).saturating_add(1)
                }
            };
            cond_resched();
        }
        changed
    }

    /// Splits the large leaf that maps `gfn`, if there is one: ENOMEM. A leaf of 1 GiB becomes leaves
    /// of 2 MiB.
    pub(super) fn split(&self, gfn: u64) -> Result {
        let mut spare = Some(Table::new()?);
        self.tables.read().split(gfn, &mut spare);
        Ok(())
    }

    /// Lets the guest write to `gfn` if only the watch kept it from that; returns if it may, and calls
    /// `mapped` first, with the MMU lock held. Does not sleep.
    #[inline]
    pub(crate) fn write_again(&self, gfn: u64, mapped: impl Fn()) -> bool {
        if self.shadow.is_some() {
            return false;
        }
        let tables = self.tables.read();
        let may = tables.write_again(gfn);
        if may {
            mapped();
        }
        may
    }

    /// Removes the small leaves of the 2 MiB that each of `gfns` is in, so that large ones can come
    /// back. Sleeps.
    pub(crate) fn remove_small(&self, gfns: impl Iterator<Item = u64>) {
        if let Some(shadow) = self.shadow() {
            let first = gfns.map(|gfn| gfn & !Level::Page2M.mask());
            return shadow.remove_small(&Around::blind(&self.vcpus), first);
        }
        self.remove(true, |tables, detached| {
            for gfn in gfns {
                tables.remove_small(gfn, detached);
            }
        });
    }

    /// Waits until no fault is between having mapped a page and having said so (`mapped`). Does not
    /// sleep.
    pub(crate) fn wait_for_faults(&self) {
        if let Some(shadow) = self.shadow() {
            return shadow.wait_for_faults();
        }
        drop(self.tables.write());
    }

    /// Makes every vCPU drop its cached translations before it runs the guest on. Does not sleep.
    pub(crate) fn flush(&self) {
        if let Some(shadow) = self.shadow() {
            return shadow.flush(&Around::blind(&self.vcpus));
        }
        self.vcpus.request_all_and_wait(Request::TlbFlush);
    }
}
