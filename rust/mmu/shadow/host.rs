// SPDX-License-Identifier: GPL-2.0

//! What the host does to memory that shadow pages map: takes it away, ages it, watches it for the
//! dirty log. Leaves are found by the guest frames that they map.

use super::super::ept::Level;
use super::spte::Spte;
use super::Around;
use super::Shadow;
use super::ShadowMmu;
use crate::linux::mm::cond_resched;
use core::ops::Range;

/// How many frames are looked at with the lock held.
const BATCH: usize = 512;

/// The directory is looked through by 1 GiB, at most, with the lock held.
const SPAN: u64 = 1 << 18;

/// The first frame that is not in the same span.
const fn span_end(gfn: u64) -> u64 {
    (gfn | SPAN.wrapping_sub(1)).saturating_add(1)
}

impl Shadow {
    /// Calls `f` for the frames of `gfns` that anything is known of, up to a number of them; where to go on,
    /// if not all are done.
    fn some_frames(&mut self, gfns: &Range<u64>, f: &mut dyn FnMut(&mut Self, u64)) -> Option<u64> {
        let mut at = gfns.start;
        let end = span_end(at).min(gfns.end);
        for _ in 0..BATCH {
            let Some((gfn, frame)) = self.frames.first_from(at, end) else {
                return (end < gfns.end).then_some(end);
            };
            if frame.mapped_by != 0 {
                f(self, gfn);
            }
            at = gfn.wrapping_add(1);
        }
        Some(at)
    }
}

impl ShadowMmu {
    /// Calls `f` for the frames of `gfns` that may be mapped, and `large` for the first one if large leaves may
    /// begin before it; `after` before the lock is released, each time.
    fn sweep(
        &self,
        around: &Around<'_>,
        gfns: Range<u64>,
        may_sleep: bool,
        f: &mut dyn FnMut(&mut Shadow, u64),
        large: &mut dyn FnMut(&mut Shadow, u64),
        after: &mut dyn FnMut(&mut Shadow),
    ) {
        let mut next = Some(gfns.start);
        while let Some(start) = next {
            next = self.with(around, |state| {
                if start == gfns.start && start & Level::Page2M.mask() != 0 {
                    large(state, start);
                }
                let next = state.some_frames(&(start..gfns.end), f);
                after(state);
                next
            });
            if may_sleep && next.is_some() {
                cond_resched();
            }
        }
    }

    /// Unmaps guest frames; returns if any were mapped. May sleep, if `may_sleep`, when it has let the lock
    /// go. When it returns, no vCPU uses what was mapped.
    pub(crate) fn zap(
        &self,
        around: &Around<'_>,
        gfns: impl Iterator<Item = Range<u64>>,
        may_sleep: bool,
    ) -> bool {
        let removed = core::cell::Cell::new(false);
        for range in gfns {
            self.sweep(
                around,
                range,
                may_sleep,
                &mut |state, gfn| removed.set(state.unmap(gfn) | removed.get()),
                &mut |state, gfn| removed.set(state.unmap_large(gfn) | removed.get()),
                &mut |state| state.pay(around),
            );
        }
        removed.get()
    }

    /// Unmaps the frames of a memslot that goes, and forgets the tables that the guest had there. Sleeps.
    pub(crate) fn zap_slot(&self, around: &Around<'_>, gfns: Range<u64>) {
        self.zap(around, core::iter::once(gfns.clone()), true);
        let mut at = gfns.start;
        while at < gfns.end {
            let end = span_end(at).min(gfns.end);
            let left = self.with(around, |state| {
                let left = state.zap_pages_in(at..end);
                if left.is_none() {
                    let start = end.wrapping_sub(1) & !SPAN.wrapping_sub(1);
                    state.frames.prune(start.max(gfns.start)..end);
                }
                state.pay(around);
                left
            });
            at = left.unwrap_or(end);
            cond_resched();
        }
    }

    /// Removes the small leaves of the 2 MiB that each of `gfns` is the first frame of, as far as the guest does not
    /// want them small itself, so that large ones can come back. Sleeps.
    pub(crate) fn remove_small(&self, around: &Around<'_>, gfns: impl Iterator<Item = u64>) {
        for gfn in gfns {
            self.with(around, |state| state.zap_direct(gfn));
            cond_resched();
        }
    }

    /// Forgets everything.
    pub(crate) fn zap_all(&self, around: &Around<'_>, may_sleep: bool) {
        loop {
            let more = self.with(around, |state| {
                let goal = state.pages.used().saturating_sub(BATCH);
                let zapped = state.zap_some(goal);
                if zapped == 0 {
                    // The rest are roots.
                    for number in 1..state.pages.end() {
                        state.zap_page(number);
                    }
                }
                state.pay(around);
                zapped != 0
            });
            if !more {
                return;
            }
            if may_sleep {
                cond_resched();
            }
        }
    }

    /// Waits until no fault is between having put a translation in and having said so.
    pub(crate) fn wait_for_faults(&self) {
        drop(self.state.lock());
    }

    /// Has every vCPU drop what it knows of the tables before it runs the guest on. Does not sleep.
    pub(crate) fn flush(&self, around: &Around<'_>) {
        self.with(around, |state| state.flush(around));
    }

    /// `len` bytes were written at `gpa`, all in one page, by somebody else than the guest's processors: what
    /// was made from them goes.
    #[inline]
    pub(crate) fn written(&self, around: &Around<'_>, gpa: u64, len: u64) {
        self.with(around, |state| state.written(gpa >> 12, gpa & 0xfff, len));
    }

    /// Forgets the tables that a frame was for the guest, so that it can write to it.
    pub(crate) fn unprotect(&self, around: &Around<'_>, gfn: u64) {
        self.with(around, |state| {
            state.zap_pages_of(gfn);
        });
    }

    /// Clears accessed marks; returns if any was set. With `flush`, cached translations go too. Does
    /// not sleep.
    pub(crate) fn clear_young(
        &self,
        around: &Around<'_>,
        gfns: impl Iterator<Item = Range<u64>>,
        flush: bool,
    ) -> bool {
        let young = core::cell::Cell::new(false);
        let age = |state: &mut Shadow, gfn: u64| {
            state.for_leaves(gfn, &mut |state, handle, _| {
                if let Some((page, index)) = state.pages.entry(handle) {
                    let old = page.table.word(index).clear_bits(Spte::YOUNG);
                    young.set(young.get() | Spte::from_bits(old).is_young());
                }
            });
        };
        for range in gfns {
            self.sweep(
                around,
                range,
                false,
                &mut |state, gfn| age(state, gfn),
                &mut |state, gfn| age(state, gfn),
                &mut |_| {},
            );
        }
        if young.get() && flush {
            self.with(around, |state| state.flush(around));
        }
        young.get()
    }

    /// Returns if any accessed mark is set. Does not sleep.
    pub(crate) fn test_young(
        &self,
        around: &Around<'_>,
        gfns: impl Iterator<Item = Range<u64>>,
    ) -> bool {
        let young = core::cell::Cell::new(false);
        let test = |state: &mut Shadow, gfn: u64| {
            state.for_leaves(gfn, &mut |state, handle, _| {
                if let Some((page, index)) = state.pages.entry(handle) {
                    young.set(young.get() | page.entry(index).is_young());
                }
            });
        };
        for range in gfns {
            self.sweep(
                around,
                range,
                false,
                &mut |state, gfn| test(state, gfn),
                &mut |state, gfn| test(state, gfn),
                &mut |_| {},
            );
        }
        young.get()
    }

    /// Makes the next write to each of `gfns` be noticed, once the translations are flushed; returns if that
    /// is necessary. Large leaves go: they come back small. Sleeps.
    pub(crate) fn watch_writes(&self, around: &Around<'_>, gfns: Range<u64>) -> bool {
        let changed = core::cell::Cell::new(false);
        self.sweep(
            around,
            gfns,
            true,
            &mut |state, gfn| changed.set(state.write_protect(gfn) | changed.get()),
            &mut |state, gfn| changed.set(state.unmap_large(gfn) | changed.get()),
            // What a processor knows of an entry that has gone may let it write as well.
            &mut |state| changed.set(state.owed | changed.get()),
        );
        changed.get()
    }
}
