// SPDX-License-Identifier: GPL-2.0

//! The interrupt of the PC's clock (RTC), whose ticks a VMM sends again if the guest was too slow for
//! them: KVM_IRQ_LINE_STATUS tells it that a tick is one with the one before until every APIC that
//! took that has ended it.

use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;

/// The clock's pin at the I/O APIC.
pub(super) const PIN: u8 = 8;

/// Who has yet to end it. Not who, but how many: an end of the same vector from somewhere else counts
/// too, and then a tick may be lost.
///
/// Every method is called inside the lock of the I/O APIC.
pub(super) struct Clock {
    /// The vector in the low byte, and how many above.
    state: AtomicU32,
}

impl Clock {
    /// Nobody.
    pub(super) const fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
        }
    }

    /// Whether there is anyone.
    pub(super) fn is_pending(&self) -> bool {
        self.state.load(Ordering::Relaxed) >> 8 != 0
    }

    /// It was sent; `status` is how many took it, if it is not negative.
    pub(super) fn sent(&self, vector: u8, status: isize) {
        // There are not so many vCPUs.
        let taken = status.clamp(0, 0xffff) as u32;
        self.state
            .store(taken << 8 | u32::from(vector), Ordering::Relaxed);
    }

    /// An APIC has ended the interrupt with a vector.
    pub(super) fn ended(&self, vector: u8) {
        let state = self.state.load(Ordering::Relaxed);
        if state as u8 == vector && state >> 8 != 0 {
            self.state
                .store(state.wrapping_sub(1 << 8), Ordering::Relaxed);
        }
    }

    /// Forgets who it was: whoever it is will not be heard of.
    pub(super) fn reset(&self) {
        self.state.store(0, Ordering::Relaxed);
    }
}
