// SPDX-License-Identifier: GPL-2.0

//! Structures in guest memory that the kernel reads and writes again and again, because the guest has asked it to:
//! their user addresses are looked up once, and again when there are other memslots.

use super::access::MemError;
use super::GuestMemory;
use crate::linux::mm;
use crate::tlb::VcpuShared;

/// The user address of something in guest memory, as long as the memslots have a version.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) hva: u64,
    pub(crate) version: u64,
}

impl Place {
    /// Nowhere: versions at which memslots can be relied on are even.
    pub(crate) const NONE: Self = Self { hva: 0, version: 1 };

    /// So many bytes further on, in the same page.
    pub(crate) const fn offset(self, offset: u64) -> Self {
        Self {
            hva: self.hva.wrapping_add(offset),
            ..self
        }
    }
}

/// A structure in guest memory. It can be anywhere, also where there is no memory.
pub(crate) struct GuestStruct {
    gpa: u64,
    len: u64,
    place: Place,
}

impl GuestStruct {
    /// The structure of `len` bytes, not 0, at a guest-physical address.
    pub(crate) const fn new(gpa: u64, len: u64) -> Self {
        Self {
            gpa,
            len,
            place: Place::NONE,
        }
    }

    /// Where the guest has it.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Where it is now, if it is in one page of a memslot that can be written.
    #[inline]
    pub(crate) fn place(&mut self, memory: &GuestMemory) -> Option<Place> {
        if self.place.version != memory.slots_version() {
            self.look_up(memory);
        }
        (self.place.version % 2 == 0).then_some(self.place)
    }

    #[cold]
    fn look_up(&mut self, memory: &GuestMemory) {
        self.place = Place::NONE;
        // The version comes first. If the memslots that are looked at are newer, it is never the current one again;
        // they are not older, as it is written after them.
        let version = memory.slots_version();
        let offset = self.gpa & 0xfff;
        if version % 2 != 0 || offset.saturating_add(self.len) > 0x1000 {
            return;
        }
        let gfn = self.gpa >> 12;
        if let Some(slot) = memory.inner.slots.read().find(gfn) {
            if !slot.leaving && !slot.read_only {
                let hva = slot.hva_of(gfn) | offset;
                self.place = Place { hva, version };
            }
        }
    }

    /// Whether there are memslots for all of it, which can be written.
    pub(crate) fn is_backed(&mut self, memory: &GuestMemory) -> bool {
        if self.place(memory).is_some() {
            return true;
        }
        let last = self.gpa.checked_add(self.len.saturating_sub(1));
        let slots = memory.inner.slots.read();
        last.is_some_and(|last| {
            (self.gpa >> 12..=last >> 12).all(|gfn| {
                slots
                    .find(gfn)
                    .is_some_and(|slot| !slot.leaving && !slot.read_only)
            })
        })
    }

    /// Reads from it, at an offset: 1, 2, 4 and 8 bytes, if aligned, are read at once. Sleeps.
    pub(crate) fn read(
        &mut self,
        memory: &GuestMemory,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), MemError> {
        if let Some(place) = self.place(memory) {
            let hva = place.hva.wrapping_add(offset);
            if let Some(done) = memory.at(place.version, || mm::read_user(hva, buf)) {
                return done.map_err(|_| MemError::Fault);
            }
        }
        memory.read(self.gpa.wrapping_add(offset), buf)
    }

    /// Writes to it for `vcpu`, at an offset: 1, 2, 4 and 8 bytes, if aligned, are written at once. Sleeps.
    pub(crate) fn write(
        &mut self,
        memory: &GuestMemory,
        offset: u64,
        data: &[u8],
        vcpu: &VcpuShared,
    ) -> Result<(), MemError> {
        if let Some(place) = self.place(memory) {
            let hva = place.hva.wrapping_add(offset);
            let _writing = memory.shadow_writing();
            let write = || {
                let result = mm::write_user(hva, data);
                memory.mark_dirty(self.gpa >> 12, vcpu);
                result
            };
            if let Some(done) = memory.at(place.version, write) {
                memory.shadow_written(self.gpa.wrapping_add(offset), data.len() as u64);
                return done.map_err(|_| MemError::Fault);
            }
        }
        memory.write(self.gpa.wrapping_add(offset), data, vcpu)
    }
}

impl GuestMemory {
    /// Runs `f` if the memslots have this version: until it returns, what is in them is theirs.
    #[inline]
    pub(crate) fn at<R>(&self, version: u64, f: impl FnOnce() -> R) -> Option<R> {
        // Who publishes others makes the version another, and then waits until this section is over.
        let _slots = self.inner.slots.read();
        (self.slots_version() == version).then(f)
    }

    /// Notes that `vcpu` has written to `gfn`, for the guest.
    pub(crate) fn mark_dirty(&self, gfn: u64, vcpu: &VcpuShared) {
        let slots = self.inner.slots.read();
        if slots.are_logged() {
            if let Some(slot) = slots.find(gfn) {
                slot.mark_dirty(gfn, vcpu);
            }
        }
    }
}
