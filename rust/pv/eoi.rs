// SPDX-License-Identifier: GPL-2.0

//! Ends of interrupts that need no exit: where the kernel delivers the guest's interrupts, it sets a bit in guest memory
//! if it need not know of the end at once; a guest that finds the bit set clears it and leaves it at that.

use crate::mem::cached::GuestStruct;
use crate::x86::pv::ENABLED;

/// MSR_KVM_PV_EOI_EN and whether the bit is set.
pub(crate) struct PvEoi {
    msr: u64,
    word: Option<GuestStruct>,
    /// The bit was set when the guest was last entered: it has not been looked at since.
    pub(crate) offered: bool,
}

impl PvEoi {
    /// The bytes of which bit 0 counts.
    const SIZE: u64 = 1;

    pub(super) const fn new() -> Self {
        Self {
            msr: 0,
            word: None,
            offered: false,
        }
    }

    /// The MSR.
    pub(crate) fn msr(&self) -> u64 {
        self.msr
    }

    /// The structure that a value of the MSR is about, if it is about one.
    pub(crate) fn structure(msr: u64) -> Option<GuestStruct> {
        (msr & ENABLED != 0).then(|| GuestStruct::new(msr & !ENABLED, Self::SIZE))
    }

    /// Sets the MSR, with what [`structure`](Self::structure) made of it.
    pub(crate) fn set(&mut self, msr: u64, word: Option<GuestStruct>) {
        self.msr = msr;
        self.word = word;
    }

    /// Where the bit is, if the guest wants it.
    #[inline]
    pub(crate) fn word(&mut self) -> Option<&mut GuestStruct> {
        self.word.as_mut()
    }
}
