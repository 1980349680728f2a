// SPDX-License-Identifier: GPL-2.0

//! The host's accesses to guest memory: through the user mappings, as the user's own would be, so
//! that every rule of the host's (copy-on-write, userfaultfd, write-back) holds for them.

use super::slots::Slot;
use super::GuestMemory;
use crate::linux::mm;
use crate::tlb::VcpuShared;
use kernel::prelude::*;

/// Why guest memory cannot be accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MemError {
    /// There is no memslot, or a read-only one is to be written: for the guest, it is MMIO.
    NoSlot,
    /// There is a memslot, and the user has nothing mapped there, or not so; or, for an exchange, it
    /// is misaligned.
    Fault,
}

impl GuestMemory {
    /// The memslot of `gpa`, its user address, and how many bytes the memslot has from there on.
    #[inline]
    fn with_hva<R>(
        &self,
        gpa: u64,
        write: bool,
        f: impl FnOnce(&Slot, u64, u64) -> Result<R, MemError>,
    ) -> Result<R, MemError> {
        // The section lasts until the access is over: a memslot that has been deleted is not used.
        let slots = self.inner.slots.read();
        let gfn = gpa >> 12;
        let slot = slots.find(gfn).ok_or(MemError::NoSlot)?;
        if slot.leaving || write && slot.read_only {
            return Err(MemError::NoSlot);
        }
        let offset = gpa & 0xfff;
        let hva = slot.hva_of(gfn) | offset;
        f(slot, hva, slot.hvas.end.wrapping_sub(hva))
    }

    /// Reads guest memory, across pages and memslots. What could not be read leaves `buf` undefined.
    /// 1, 2, 4 and 8 bytes, if aligned, are read at once. Sleeps.
    pub(crate) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemError> {
        let mut gpa = gpa;
        let mut rest = buf;
        while !rest.is_empty() {
            let done = self.with_hva(gpa, false, |_, hva, left| {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                let part = rest.get_mut(..n).ok_or(MemError::Fault)?;
                mm::read_user(hva, part).map_err(|_| MemError::Fault)?;
                Ok(n)
            })?;
            rest = rest.get_mut(done..).ok_or(MemError::Fault)?;
            gpa = gpa.wrapping_add(done as u64);
        }
        Ok(())
    }

    /// Writes guest memory for `vcpu`, across pages and memslots. If it fails, some of it may be
    /// written. 1, 2, 4 and 8 bytes, if aligned, are written at once. Sleeps.
    pub(crate) fn write(&self, gpa: u64, data: &[u8], vcpu: &VcpuShared) -> Result<(), MemError> {
        let mut gpa = gpa;
        let mut rest = data;
        while !rest.is_empty() {
            let done = self.with_hva(gpa, true, |slot, hva, left| {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                let part = rest.get(..n).ok_or(MemError::Fault)?;
                let _writing = self.shadow_writing();
                let result = mm::write_user(hva, part);
                // Some of it may have been written even so. `n` is not 0.
                let last = gpa.wrapping_add(n as u64).wrapping_sub(1);
                for gfn in gpa >> 12..=last >> 12 {
                    slot.mark_dirty(gfn, vcpu);
                }
                self.shadow_written(gpa, n as u64);
                result.map(|()| n).map_err(|_| MemError::Fault)
            })?;
            rest = rest.get(done..).ok_or(MemError::Fault)?;
            gpa = gpa.wrapping_add(done as u64);
        }
        Ok(())
    }

    /// Makes the `len` bytes (1, 2, 4 or 8) at `gpa` be `new` if they are `old`, atomically, for
    /// `vcpu`; returns if they were. Other lengths and misaligned addresses are a
    /// [`MemError::Fault`]. Sleeps.
    pub(crate) fn cmpxchg(
        &self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
        vcpu: &VcpuShared,
    ) -> Result<bool, MemError> {
        let _writing = self.shadow_writing();
        let done = self.mark_entry(gpa, len, old, new, vcpu)?;
        if done {
            self.shadow_written(gpa, len.into());
        }
        Ok(done)
    }

    /// The same for a walk of the guest's tables that marks an entry accessed or dirty: what was made from
    /// the entry before stays good.
    pub(crate) fn mark_entry(
        &self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
        vcpu: &VcpuShared,
    ) -> Result<bool, MemError> {
        let aligned = matches!(len, 1 | 2 | 4 | 8) && gpa & u64::from(len).wrapping_sub(1) == 0;
        self.with_hva(gpa, true, |slot, hva, _| {
            if !aligned {
                return Err(MemError::Fault);
            }
            let done = mm::cmpxchg_user(hva, len, old, new).map_err(|_| MemError::Fault)?;
            if done {
                slot.mark_dirty(gpa >> 12, vcpu);
            }
            Ok(done)
        })
    }
}
