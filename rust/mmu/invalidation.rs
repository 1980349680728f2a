// SPDX-License-Identifier: GPL-2.0

//! The sequence count that orders faults against changes of the host's mappings.
//!
//! A fault looks a frame up and then maps it; in between, the host may take the frame away. It tells
//! us so: before (start) and after (end) it changes its mappings. A fault notes the count before it
//! looks up and asks, under the MMU lock, if what it found still holds:
//!
//! - a change of the address that has started and not ended: no;
//! - a change that has ended since the count was noted: no, the look-up may have been before it;
//! - a change that starts later waits for the MMU lock to zap, and then finds the new mapping.
//!
//! Changes are known by host virtual addresses, so a start and its end match whatever memslots come
//! or go between them. Those of addresses that no memslot maps are counted as active, which costs
//! a spinlock, but neither take the MMU lock nor move the sequence on.

use crate::linux::mmu_notifier::HvaRange;
use core::sync::atomic::fence;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::new_spinlock;
use kernel::sync::SpinLock;

/// The changes of an address space's mappings.
#[pin_data]
pub(crate) struct Invalidations {
    /// How many changes of mapped addresses have ended.
    sequence: AtomicU64,
    /// How many have started and not ended.
    active: AtomicU32,
    /// The smallest range that contains all changes since there was none active. More precise
    /// would cost more than it gives: several at once are rare.
    #[pin]
    range: SpinLock<HvaRange>,
}

/// The count at some moment.
#[derive(Clone, Copy)]
pub(crate) struct Sequence(u64);

fn overlap(a: &HvaRange, b: &HvaRange) -> bool {
    a.start < b.end && b.start < a.end
}

impl Invalidations {
    /// None so far.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            sequence: AtomicU64::new(0),
            active: AtomicU32::new(0),
            range <- new_spinlock!(0..0, "rkvm_invalidations"),
        })
    }

    /// The count now: to be noted before a look-up.
    #[inline]
    pub(crate) fn sequence(&self) -> Sequence {
        // Acquire: the look-up comes after.
        Sequence(self.sequence.load(Ordering::Acquire))
    }

    /// A change of `hvas` starts. What is zapped for it is zapped after this.
    pub(crate) fn start(&self, hvas: &HvaRange) {
        let mut range = self.range.lock();
        if self.active.fetch_add(1, Ordering::SeqCst) == 0 {
            *range = hvas.clone();
        } else {
            range.start = range.start.min(hvas.start);
            range.end = range.end.max(hvas.end);
        }
    }

    /// A change ends. `mapped`: a memslot maps some of its addresses.
    pub(crate) fn end(&self, mapped: bool) {
        // First the sequence: who sees the change no longer active must see that there was one.
        if mapped {
            self.sequence.fetch_add(1, Ordering::Release);
        }
        let _range = self.range.lock();
        self.active.fetch_sub(1, Ordering::Release);
    }

    /// Returns if a change of any of `hvas` is going on: no use in looking them up now.
    #[inline]
    pub(crate) fn in_progress(&self, hvas: &HvaRange) -> bool {
        // Acquire: pairs with the release in `end`.
        self.active.load(Ordering::Acquire) != 0 && overlap(&self.range.lock(), hvas)
    }

    /// Returns if what was looked up of `hvas` since `noted` still holds. Under the MMU lock, which
    /// keeps it so until the mapping is made.
    #[inline]
    pub(crate) fn unchanged(&self, noted: Sequence, hvas: &HvaRange) -> bool {
        if self.in_progress(hvas) {
            return false;
        }
        fence(Ordering::Acquire);
        self.sequence.load(Ordering::Relaxed) == noted.0
    }
}
