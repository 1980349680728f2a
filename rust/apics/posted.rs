// SPDX-License-Identifier: GPL-2.0

//! The posted-interrupt descriptor (SDM vol. 3, 31.6): where interrupts are left for a processor that
//! may be running the guest, which takes them when it is notified.

use crate::linux::page::phys_of;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;

/// Outstanding notification.
const ON: u32 = 1 << 0;

/// A descriptor, as the processor has it.
#[repr(C, align(64))]
pub(crate) struct Posted {
    requests: [AtomicU32; 8],
    control: AtomicU32,
    reserved: [AtomicU32; 7],
}

impl Posted {
    /// Nothing is posted.
    pub(super) const fn new() -> Self {
        Self {
            requests: [const { AtomicU32::new(0) }; 8],
            control: AtomicU32::new(0),
            reserved: [const { AtomicU32::new(0) }; 7],
        }
    }

    /// The physical address.
    pub(crate) fn phys(&self) -> u64 {
        phys_of(self)
    }

    /// Posts vectors of a word of the request register; returns what was posted there.
    pub(super) fn post(&self, word: usize, bits: u32) -> u32 {
        match self.requests.get(word) {
            Some(requests) => requests.fetch_or(bits, Ordering::SeqCst),
            None => 0,
        }
    }

    /// Notes that the processor is to be told; returns if it was not to be already.
    pub(super) fn notify(&self) -> bool {
        self.control.fetch_or(ON, Ordering::SeqCst) & ON == 0
    }

    /// Whether there may be something that the processor has not taken.
    #[inline]
    pub(crate) fn is_notified(&self) -> bool {
        self.control.load(Ordering::SeqCst) & ON != 0
    }

    /// Takes what is posted: `f` gets each word that is not empty.
    pub(crate) fn take(&self, mut f: impl FnMut(u8, u32)) {
        // First this: what is posted from here on is notified anew.
        self.control.fetch_and(!ON, Ordering::SeqCst);
        for (word, requests) in (0..).zip(&self.requests) {
            if requests.load(Ordering::Relaxed) != 0 {
                f(word, requests.swap(0, Ordering::SeqCst));
            }
        }
    }
}

const _: () = assert!(size_of::<Posted>() == 64);
