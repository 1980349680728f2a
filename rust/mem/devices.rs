// SPDX-License-Identifier: GPL-2.0

//! What a vCPU remembers of guest frames that are a device's: who talks to a device does so again and
//! again, and need not look for a memslot each time.

use super::GuestMemory;
use core::sync::atomic::Ordering;

/// How many frames are remembered. A power of two.
const ENTRIES: usize = 8;

/// No guest frame has this number.
const NONE: u64 = u64::MAX;

/// Guest frames that no memslot has.
///
/// # Invariants
///
/// No memslot has any of `gfns` as long as the memslots' version is `version`.
pub(crate) struct DeviceFrames {
    version: u64,
    /// Each frame has one place, by its lowest bits.
    gfns: [u64; ENTRIES],
}

impl DeviceFrames {
    /// Nothing yet.
    pub(crate) const fn new() -> Self {
        Self {
            version: 0,
            gfns: [NONE; ENTRIES],
        }
    }

    /// Returns if it is known that no memslot of `memory` has `gpa`.
    #[inline]
    pub(crate) fn contain(&self, memory: &GuestMemory, gpa: u64) -> bool {
        let gfn = gpa >> 12;
        self.gfns[gfn as usize % ENTRIES] == gfn && self.version == memory.slots_version()
    }

    /// Remembers the frame of `gpa`, if no memslot of `memory` has it.
    pub(crate) fn note(&mut self, memory: &GuestMemory, gpa: u64) {
        let gfn = gpa >> 12;
        // The version comes first. If the memslots that are looked at are newer, it is never the
        // current one again; they are not older, as it is written after them.
        let version = memory.slots_version();
        if version % 2 != 0 || memory.inner.slots.read().find(gfn).is_some() {
            return;
        }
        if self.version != version {
            self.version = version;
            self.gfns = [NONE; ENTRIES];
        }
        // INVARIANT: It has just been looked for.
        self.gfns[gfn as usize % ENTRIES] = gfn;
    }
}

impl GuestMemory {
    /// Which memslots there are: odd while others are about to be published, and another number once
    /// they have been.
    #[inline]
    pub(super) fn slots_version(&self) -> u64 {
        self.inner.version.load(Ordering::Acquire)
    }
}
