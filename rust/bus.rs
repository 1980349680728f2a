// SPDX-License-Identifier: GPL-2.0

//! Devices in the kernel, which a guest's writes are offered to before they go to user space.

use crate::coalesced::Coalesced;
use kernel::prelude::*;

/// An address space that devices are in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Space {
    /// Guest-physical addresses that no memslot backs, or not for writes.
    Memory,
    /// I/O ports.
    Ports,
}

/// The devices of one VM.
#[pin_data]
pub(crate) struct Bus {
    /// The writes that wait for user space to have a look.
    #[pin]
    pub(crate) coalesced: Coalesced,
}

impl Bus {
    /// A bus without devices: ENOMEM.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            coalesced <- Coalesced::new(),
        }? Error)
    }

    /// Offers a write of the guest's, 1 to 8 bytes at `addr`; returns if a device took it. If not, it
    /// is user space's. May sleep.
    #[inline]
    pub(crate) fn write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        self.coalesced.write(space, addr, data)
    }
}
