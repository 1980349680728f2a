// SPDX-License-Identifier: GPL-2.0

//! The dirty log: which pages of a memslot the guest has written to (KVM API, KVM_GET_DIRTY_LOG,
//! KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS).
//!
//! A page is marked *after* the guest has been given the means to write to it, or has written. A
//! reader takes the marks and *then* watches the pages again. So a write that happens while the log
//! is read is in it, or in the next one; in either case the page's contents are what the reader
//! copies after the call.
//!
//! What a processor logs by itself waits in the vCPU's buffer until the vCPU leaves the guest. A
//! reader makes all vCPUs leave and waits until they have; each empties its buffer first. A fault
//! marks with the MMU lock held, and the reader takes that lock once. So what was written before a log
//! is asked for is in it.

use super::slots::Slot;
use super::slots::Slots;
use super::slots::MAX_SLOTS;
use super::GuestMemory;
use super::Inner;
use crate::abi::kvm_clear_dirty_log;
use crate::abi::kvm_dirty_log;
use crate::bindings::KVM_DIRTY_LOG_INITIALLY_SET;
use crate::bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
use crate::bindings::KVM_MEM_LOG_DIRTY_PAGES;
use crate::linux::mm;
use crate::linux::srcu::SrcuGuard;
use crate::linux::user;
use crate::mmu::ept::Level;
use crate::tlb::Request;
use crate::tlb::VcpuShared;
use core::ops::Range;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::Arc;

/// What KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 offers.
pub(crate) const MANUAL_CAPS: u32 =
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

/// Pages in a word of a bitmap.
const WORD: u64 = u64::BITS as u64;
/// Words that are copied at once.
const CHUNK: usize = 64;

/// Where writes to a memslot are logged.
#[derive(Clone)]
pub(crate) enum DirtyLog {
    /// In a bitmap of the slot.
    Bitmap(Arc<DirtyBitmap>),
    /// In the ring of the vCPU that writes.
    Rings,
}

/// A bit for each page of a memslot.
pub(crate) struct DirtyBitmap {
    words: KVVec<AtomicU64>,
}

impl DirtyBitmap {
    /// A bitmap of as many pages, with all bits clear, or all set: ENOMEM.
    fn new(pages: u64, set: bool) -> Result<Arc<Self>> {
        let count = usize::try_from(pages.div_ceil(WORD))?;
        let mut words = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
        let mut left = pages;
        while left != 0 {
            let here = left.min(WORD);
            let bits = if set { run(here) } else { 0 };
            words
                .push_within_capacity(AtomicU64::new(bits))
                .map_err(|_| ENOMEM)?;
            left -= here;
        }
        Ok(Arc::new(Self { words }, GFP_KERNEL_ACCOUNT)?)
    }

    #[inline]
    fn set(&self, page: u64) {
        let bit = 1 << (page % WORD);
        if let Some(word) = self.words.get((page / WORD) as usize) {
            // A page that many vCPUs write to is marked already.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }
}

/// The lowest `n` bits, of at most 64.
const fn run(n: u64) -> u64 {
    if n >= WORD {
        u64::MAX
    } else {
        (1 << n) - 1
    }
}

/// How a VM logs.
pub(super) struct LogMode {
    /// KVM_DIRTY_LOG_*.
    manual: AtomicU32,
    /// The VM has dirty rings; its slots have no bitmaps then.
    rings: AtomicBool,
    /// A slot is logged: vCPUs run with the processor's log, if it has one.
    active: AtomicBool,
}

impl LogMode {
    pub(super) const fn new() -> Self {
        Self {
            manual: AtomicU32::new(0),
            rings: AtomicBool::new(false),
            active: AtomicBool::new(false),
        }
    }

    fn has(&self, flag: u32) -> bool {
        self.manual.load(Ordering::Relaxed) & flag != 0
    }
}

impl Slot {
    /// Notes that the guest, or `vcpu` for it, has written to `gfn`, which is in the slot.
    #[inline]
    pub(super) fn mark_dirty(&self, gfn: u64, vcpu: &VcpuShared) {
        let Some(log) = &self.log else { return };
        let page = gfn.wrapping_sub(self.gfns.start);
        match (log, vcpu.ring()) {
            (_, Some(ring)) => ring.push(self.id, page),
            (DirtyLog::Bitmap(bitmap), None) => bitmap.set(page),
            (DirtyLog::Rings, None) => {}
        }
    }
}

/// The memslots, for marking what a vCPU has written.
pub(crate) struct Marker<'a> {
    slots: SrcuGuard<'a, Slots>,
    vcpu: &'a VcpuShared,
}

impl Marker<'_> {
    /// Notes that the guest has written to `gfn`.
    pub(crate) fn mark(&self, gfn: u64) {
        if let Some(slot) = self.slots.find(gfn) {
            slot.mark_dirty(gfn, self.vcpu);
        }
    }
}

/// Adjacent frames, collected so that they can be watched together.
struct Runs<'a> {
    inner: &'a Inner,
    run: Range<u64>,
    changed: bool,
}

impl<'a> Runs<'a> {
    fn new(inner: &'a Inner) -> Self {
        Self {
            inner,
            run: 0..0,
            changed: false,
        }
    }

    /// Adds the frames `first + i` of the bits `i` that are set in `mask`.
    fn add(&mut self, first: u64, mask: u64) {
        let mut at = first;
        let mut rest = mask;
        while rest != 0 {
            let skip = rest.trailing_zeros();
            rest >>= skip;
            let len = rest.trailing_ones();
            rest = rest.checked_shr(len).unwrap_or(0);
            let start = at.wrapping_add(skip.into());
            at = start.wrapping_add(len.into());
            if start != self.run.end {
                self.watch();
                self.run.start = start;
            }
            self.run.end = at;
        }
    }

    fn watch(&mut self) {
        if !self.run.is_empty() {
            self.changed |= self.inner.mmu.watch_writes(self.run.clone());
        }
    }

    /// Watches what is left; when it returns, no vCPU writes unnoticed to any of the frames.
    fn finish(mut self) {
        self.watch();
        if self.changed {
            self.inner.mmu.flush();
        }
    }
}

impl GuestMemory {
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: EINVAL.
    pub(crate) fn set_manual_log(&self, flags: u64) -> Result {
        let enable = flags & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0;
        if flags & !u64::from(MANUAL_CAPS) != 0 || flags != 0 && !enable {
            return Err(EINVAL);
        }
        self.inner.log.manual.store(flags as u32, Ordering::Relaxed);
        Ok(())
    }

    /// From now on writes are logged in the vCPUs' rings. Before there is a vCPU.
    pub(crate) fn use_rings(&self) {
        self.inner.log.rings.store(true, Ordering::Relaxed);
    }

    /// Returns if a slot's writes are logged: the processor is to log, if it can.
    #[inline]
    pub(crate) fn is_logging(&self) -> bool {
        self.inner.log.active.load(Ordering::SeqCst)
    }

    /// For marking what `vcpu` has written.
    pub(crate) fn marker<'a>(&'a self, vcpu: &'a VcpuShared) -> Marker<'a> {
        Marker {
            slots: self.inner.slots.read(),
            vcpu,
        }
    }

    /// The logged slot of that number and its bitmap: ENXIO with rings, EINVAL for a number that
    /// no slot can have, ENOENT.
    fn logged_slot(&self, id: u32) -> Result<(Range<u64>, Arc<DirtyBitmap>)> {
        if id >= MAX_SLOTS {
            return Err(EINVAL);
        }
        let slots = self.inner.slots.read();
        let slot = slots.by_id(id).ok_or(ENOENT)?;
        match &slot.log {
            Some(DirtyLog::Bitmap(bitmap)) => Ok((slot.gfns.clone(), bitmap.clone())),
            _ => Err(ENOENT),
        }
    }

    fn check_bitmaps(&self) -> Result {
        if self.inner.log.rings.load(Ordering::Relaxed) {
            return Err(ENXIO);
        }
        Ok(())
    }

    /// KVM_GET_DIRTY_LOG: ENXIO, EINVAL, ENOENT, EFAULT. What could not be written to user space is
    /// in the next log.
    pub(crate) fn get_dirty_log(&self, log: &kvm_dirty_log) -> Result {
        self.check_bitmaps()?;
        let inner = &*self.inner;
        let _update = inner.update.lock();
        let (gfns, bitmap) = self.logged_slot(log.slot)?;
        inner.collect();

        let keep = inner.log.has(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        let mut runs = Runs::new(inner);
        let mut to = log.bitmap_address();
        let mut gfn = gfns.start;
        let mut result = Ok(());
        for words in bitmap.words.chunks(CHUNK) {
            let mut bits = [0u64; CHUNK];
            for (bits, word) in bits.iter_mut().zip(words) {
                *bits = word.load(Ordering::Relaxed);
                if *bits != 0 && !keep {
                    *bits = word.swap(0, Ordering::SeqCst);
                    runs.add(gfn, *bits);
                }
                gfn = gfn.wrapping_add(WORD);
            }
            let data = bits.get(..words.len()).unwrap_or(&bits);
            result = user::write_words(to, data);
            if result.is_err() {
                if !keep {
                    for (bits, word) in bits.iter().zip(words) {
                        word.fetch_or(*bits, Ordering::SeqCst);
                    }
                }
                break;
            }
            to = to.wrapping_add(size_of_val(data));
            mm::cond_resched();
        }
        runs.finish();
        result
    }

    /// KVM_CLEAR_DIRTY_LOG: ENXIO, EINVAL, ENOENT, EFAULT.
    pub(crate) fn clear_dirty_log(&self, log: &kvm_clear_dirty_log) -> Result {
        self.check_bitmaps()?;
        let inner = &*self.inner;
        let _update = inner.update.lock();
        if log.slot >= MAX_SLOTS || log.first_page % WORD != 0 {
            return Err(EINVAL);
        }
        let (gfns, bitmap) = self.logged_slot(log.slot)?;
        let pages = gfns.end.wrapping_sub(gfns.start);
        let first = log.first_page;
        let count = u64::from(log.num_pages);
        let after = pages.checked_sub(first).ok_or(EINVAL)?;
        if count > after || count < after && count % WORD != 0 {
            return Err(EINVAL);
        }
        inner.collect();

        let from = log.bitmap_address();
        let start = (first / WORD) as usize;
        let words = bitmap
            .words
            .get(start..)
            .and_then(|words| words.get(..count.div_ceil(WORD) as usize))
            .unwrap_or(&[]);
        // An address that is wrong is found before anything has changed.
        for_chunks(words, from, |_, _| {})?;
        let mut runs = Runs::new(inner);
        let mut gfn = gfns.start.wrapping_add(first);
        let result = for_chunks(words, from, |word, mask| {
            if mask != 0 {
                let cleared = word.fetch_and(!mask, Ordering::SeqCst) & mask;
                runs.add(gfn, cleared);
            }
            gfn = gfn.wrapping_add(WORD);
        });
        runs.finish();
        result
    }

    /// Publishes `next`, in which `new` only differs from what it replaces by its logging. With
    /// `update` held.
    pub(super) fn change_logging(&self, new: &Slot, next: KBox<Slots>) {
        // When it returns, every fault knows of the change.
        self.inner.publish(next);
        match &new.log {
            // All pages count as written to, so their next write need not be noticed until they are
            // cleared one by one.
            Some(DirtyLog::Bitmap(_)) if self.inner.log.has(KVM_DIRTY_LOG_INITIALLY_SET) => {}
            Some(_) => {
                if self.inner.mmu.watch_writes(new.gfns.clone()) {
                    self.inner.mmu.flush();
                }
            }
            None => self.restore_large(new),
        }
    }

    /// Removes small leaves where large ones could be. The pages' next accesses bring those.
    fn restore_large(&self, slot: &Slot) {
        if self.inner.mmu.format().max_leaf < Level::Page2M {
            return;
        }
        let step = Level::Page2M.pages();
        if (slot.gfns.start ^ slot.hvas.start >> 12) & Level::Page2M.mask() != 0 {
            return;
        }
        let mut gfn = slot.gfns.start.next_multiple_of(step);
        while slot.gfns.end.saturating_sub(gfn) >= step {
            // A batch, so that others get the lock.
            let mut batch = [0u64; 64];
            let mut len = 0;
            while slot.gfns.end.saturating_sub(gfn) >= step {
                let Some(place) = batch.get_mut(len) else {
                    break;
                };
                if mm::host_mapping_level(self.inner.mm(), slot.hva_of(gfn)) > 1 {
                    *place = gfn;
                    len += 1;
                }
                gfn = gfn.wrapping_add(step);
            }
            self.inner.mmu.remove_small(batch.iter().take(len).copied());
            mm::cond_resched();
        }
    }

    /// KVM_RESET_DIRTY_RINGS: how many entries were taken back. EINVAL without rings.
    pub(crate) fn reset_dirty_rings(&self) -> Result<isize> {
        let inner = &*self.inner;
        if !inner.log.rings.load(Ordering::Relaxed) {
            return Err(EINVAL);
        }
        let _update = inner.update.lock();
        let mut runs = Runs::new(inner);
        let mut count = 0isize;
        let mut index = 0;
        while let Some(vcpu) = inner.mmu.vcpus().get(index) {
            if let Some(ring) = vcpu.ring() {
                let taken = ring.take_reset(|id, page| {
                    // What user space left there: any slot, any page.
                    let slots = inner.slots.read();
                    let Some(slot) = slots.by_id(id) else { return };
                    if page < slot.gfns.end.wrapping_sub(slot.gfns.start) {
                        runs.add(slot.gfns.start.wrapping_add(page), 1);
                    }
                });
                count = count.saturating_add(taken as isize);
            }
            index += 1;
        }
        runs.finish();
        Ok(count)
    }
}

/// Calls `f` for each of `words` with the word of user space that belongs to it: EFAULT.
fn for_chunks(words: &[AtomicU64], from: usize, mut f: impl FnMut(&AtomicU64, u64)) -> Result {
    let mut from = from;
    for words in words.chunks(CHUNK) {
        let mut masks = [0u64; CHUNK];
        let data = masks.get_mut(..words.len()).ok_or(EINVAL)?;
        user::read_words(from, data)?;
        from = from.wrapping_add(size_of_val(data));
        for (word, mask) in words.iter().zip(masks) {
            f(word, mask);
        }
        mm::cond_resched();
    }
    Ok(())
}

impl Inner {
    /// The log that a slot is to have, which replaces `old` if there is one: ENOMEM.
    pub(super) fn log_of(&self, new: &Slot, old: Option<&Slot>) -> Result<Option<DirtyLog>> {
        if new.flags & KVM_MEM_LOG_DIRTY_PAGES == 0 {
            return Ok(None);
        }
        if let Some(log) = old.and_then(|old| old.log.clone()) {
            return Ok(Some(log));
        }
        if self.log.rings.load(Ordering::Relaxed) {
            return Ok(Some(DirtyLog::Rings));
        }
        let pages = new.gfns.end.wrapping_sub(new.gfns.start);
        let all = self.log.has(KVM_DIRTY_LOG_INITIALLY_SET);
        Ok(Some(DirtyLog::Bitmap(DirtyBitmap::new(pages, all)?)))
    }

    /// Makes the vCPUs log, or no longer.
    pub(super) fn set_logging(&self, on: bool) {
        if self.log.active.swap(on, Ordering::SeqCst) != on {
            self.collect();
        }
    }

    /// Makes every vCPU leave the guest, which empties what its processor has logged, and waits for
    /// that, and for the marks of faults that have let the guest write.
    fn collect(&self) {
        let vcpus = self.mmu.vcpus();
        vcpus.request_all_and_wait(Request::WriteLogging);
        self.mmu.wait_for_faults();
    }
}
