// SPDX-License-Identifier: GPL-2.0

//! MMU notifiers: being told when an address space's mappings change.

use core::ops::Deref;
use kernel::bindings;
use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::types::Opaque;

/// Host virtual addresses, in bytes.
pub(crate) type HvaRange = core::ops::Range<u64>;

/// What listens to an address space.
///
/// The methods may be called from several threads at once, with interrupts on and locks of `mm/`
/// held: those that say so under a page-table spinlock, so they must not sleep.
pub(crate) trait MmuNotifier: Send + Sync {
    /// The mappings of `range` are about to change. From here until the matching
    /// [`invalidate_end`](Self::invalidate_end), what is looked up in the range must not be used
    /// once this method has returned. May sleep only if `may_block`.
    fn invalidate_start(&self, range: HvaRange, may_block: bool);

    /// The mappings of `range` have changed.
    fn invalidate_end(&self, range: HvaRange);

    /// Clears the accessed marks of `range`, so that the next access sets one again even if the
    /// translation was cached, if `flush`. Returns if any was set. Must not sleep.
    fn clear_young(&self, range: HvaRange, flush: bool) -> bool;

    /// Returns if `range` is marked accessed. Must not sleep.
    fn test_young(&self, range: HvaRange) -> bool;

    /// The address space ends: its pages are freed after this.
    fn release(&self);
}

/// A `T` that listens to the address space of the task that made it.
///
/// Holds the `mm_struct` (`mmgrab`), not its mappings.
#[pin_data(PinnedDrop)]
pub(crate) struct Listening<T: MmuNotifier> {
    mm: ARef<Mm>,
    #[pin]
    inner: T,
    /// Registered with `mm` as long as `Self` is.
    #[pin]
    notifier: Opaque<bindings::mmu_notifier>,
}

// SAFETY: The notifier is a list node under mm/'s own locks; `mm` and `T` are `Send`.
unsafe impl<T: MmuNotifier> Send for Listening<T> {}
// SAFETY: Shared references only reach `mm` and `T`, which are `Sync`.
unsafe impl<T: MmuNotifier> Sync for Listening<T> {}

impl<T: MmuNotifier> Listening<T> {
    const OPS: bindings::mmu_notifier_ops = bindings::mmu_notifier_ops {
        release: Some(Self::release),
        clear_flush_young: Some(Self::clear_flush_young),
        clear_young: Some(Self::clear_young),
        test_young: Some(Self::test_young),
        invalidate_range_start: Some(Self::invalidate_range_start),
        invalidate_range_end: Some(Self::invalidate_range_end),
        arch_invalidate_secondary_tlbs: None,
        alloc_notifier: None,
        free_notifier: None,
    };

    /// Makes `inner` and has it listen to the current task's address space: ESRCH if there is none
    /// (a kernel thread), ENOMEM, EINTR if killed meanwhile.
    pub(crate) fn new(inner: impl PinInit<T, Error>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            mm: {
                let task = current!();
                let mm: &Mm = task.mm().ok_or(ESRCH)?;
                ARef::from(mm)
            },
            inner <- inner,
            // The last: callbacks come as soon as it is registered, and find `inner` finished.
            notifier <- Opaque::try_ffi_init(|slot: *mut bindings::mmu_notifier| {
                let notifier = bindings::mmu_notifier {
                    ops: &Self::OPS,
                    ..Default::default()
                };
                // SAFETY: The slot is memory for one.
                unsafe { slot.write(notifier) };
                // SAFETY: The current task's mm has users, the task itself; the notifier stays
                // where it is (`Self` is pinned) until it is unregistered on drop.
                kernel::error::to_result(unsafe {
                    bindings::mmu_notifier_register(slot, bindings_current_mm())
                })
            }),
        }? Error)
    }

    /// The address space, which may have ended.
    #[inline]
    pub(crate) fn mm(&self) -> &Mm {
        &self.mm
    }

    /// Returns if the current task runs in this address space. Then it has users, and its mappings
    /// are there, as long as the task does not go.
    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        core::ptr::eq(bindings_current_mm(), self.mm.as_raw())
    }

    /// # Safety
    ///
    /// `notifier` is that of a `Self` whose `inner` is finished, and registered during `'a`.
    unsafe fn from_notifier<'a>(notifier: *mut bindings::mmu_notifier) -> &'a T {
        let notifier = Opaque::cast_from(notifier);
        // SAFETY: By the function's requirement it lies in a `Self`.
        let this = unsafe { kernel::container_of!(notifier.cast_mut(), Self, notifier) };
        // SAFETY: `inner` was finished before the notifier was registered, and is dropped after it
        // is unregistered, which waits for the callbacks.
        unsafe { &(*this).inner }
    }

    /// # Safety
    ///
    /// For mm/ to call with a registered notifier that has these operations.
    unsafe extern "C" fn invalidate_range_start(
        notifier: *mut bindings::mmu_notifier,
        range: *const bindings::mmu_notifier_range,
    ) -> i32 {
        // SAFETY: mm/ calls with a registered notifier of these operations, and a range.
        let (inner, range) = unsafe { (Self::from_notifier(notifier), &*range) };
        let may_block = range.flags & bindings::MMU_NOTIFIER_RANGE_BLOCKABLE != 0;
        inner.invalidate_start(range.start as u64..range.end as u64, may_block);
        0
    }

    /// # Safety
    ///
    /// For mm/ to call with a registered notifier that has these operations.
    unsafe extern "C" fn invalidate_range_end(
        notifier: *mut bindings::mmu_notifier,
        range: *const bindings::mmu_notifier_range,
    ) {
        // SAFETY: mm/ calls with a registered notifier of these operations, and a range.
        let (inner, range) = unsafe { (Self::from_notifier(notifier), &*range) };
        inner.invalidate_end(range.start as u64..range.end as u64);
    }

    /// # Safety
    ///
    /// For mm/ to call with a registered notifier that has these operations.
    unsafe extern "C" fn clear_flush_young(
        notifier: *mut bindings::mmu_notifier,
        _mm: *mut bindings::mm_struct,
        start: usize,
        end: usize,
    ) -> bool {
        // SAFETY: mm/ calls with a registered notifier of these operations.
        let inner = unsafe { Self::from_notifier(notifier) };
        inner.clear_young(start as u64..end as u64, true)
    }

    /// # Safety
    ///
    /// For mm/ to call with a registered notifier that has these operations.
    unsafe extern "C" fn clear_young(
        notifier: *mut bindings::mmu_notifier,
        _mm: *mut bindings::mm_struct,
        start: usize,
        end: usize,
    ) -> bool {
        // SAFETY: mm/ calls with a registered notifier of these operations.
        let inner = unsafe { Self::from_notifier(notifier) };
        inner.clear_young(start as u64..end as u64, false)
    }

    /// # Safety
    ///
    /// For mm/ to call with a registered notifier that has these operations.
    unsafe extern "C" fn test_young(
        notifier: *mut bindings::mmu_notifier,
        _mm: *mut bindings::mm_struct,
        address: usize,
    ) -> bool {
        // SAFETY: mm/ calls with a registered notifier of these operations.
        let inner = unsafe { Self::from_notifier(notifier) };
        let address = address as u64;
        inner.test_young(address..address.saturating_add(1))
    }

    /// # Safety
    ///
    /// For mm/ to call with a registered notifier that has these operations.
    unsafe extern "C" fn release(
        notifier: *mut bindings::mmu_notifier,
        _mm: *mut bindings::mm_struct,
    ) {
        // SAFETY: mm/ calls with a registered notifier of these operations.
        let inner = unsafe { Self::from_notifier(notifier) };
        inner.release();
    }
}

/// `current->mm`; null in a kernel thread.
#[inline]
fn bindings_current_mm() -> *mut bindings::mm_struct {
    // SAFETY: `current` is always there, and no other task changes its `mm`.
    unsafe { crate::bindings::rkvm_current_mm() }
}

impl<T: MmuNotifier> Deref for Listening<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

#[pinned_drop]
impl<T: MmuNotifier> PinnedDrop for Listening<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered with this mm since `new`. Calls `release` if the mm has not ended, and
        // waits for callbacks that run.
        unsafe { bindings::mmu_notifier_unregister(self.notifier.get(), self.mm.as_raw()) };
    }
}
