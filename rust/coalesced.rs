// SPDX-License-Identifier: GPL-2.0

//! Coalesced writes: those to zones that the VMM has named are put into a ring, for it to read when
//! it next has a reason to, and the guest goes on (KVM API, KVM_REGISTER_COALESCED_MMIO).
//!
//! The ring is a page that all vCPUs' files map. The VMM may write there at any moment: what is read
//! is read once, and checked. What it can do is confuse itself.

use crate::abi::kvm_coalesced_mmio;
use crate::abi::kvm_coalesced_mmio_ring;
use crate::abi::kvm_coalesced_mmio_zone;
use crate::bus::Space;
use crate::linux::no_space;
use crate::linux::page::KernelPage;
use crate::linux::page::PAGE_SIZE;
use crate::linux::srcu::SrcuCell;
use core::mem::offset_of;
use core::sync::atomic::fence;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::new_mutex;
use kernel::sync::new_spinlock;
use kernel::sync::Mutex;
use kernel::sync::SpinLock;

/// The most zones in each space, as in KVM.
const MAX_ZONES: usize = 1000;

/// Addresses whose writes are coalesced.
///
/// # Invariants
///
/// `start` is not above `end`.
#[derive(Clone, Copy)]
struct Zone {
    space: Space,
    start: u64,
    /// The first address behind it.
    end: u64,
}

impl Zone {
    /// The zone that the user describes: EINVAL if it is neither of memory nor of ports. One that
    /// would go beyond the last address ends there; no guest has an address so high.
    fn new(zone: &kvm_coalesced_mmio_zone) -> Result<Self> {
        let space = match zone.pio() {
            0 => Space::Memory,
            1 => Space::Ports,
            _ => return Err(EINVAL),
        };
        // INVARIANT: A sum that saturates is not below its parts.
        Ok(Self {
            space,
            start: zone.addr,
            end: zone.addr.saturating_add(u64::from(zone.size)),
        })
    }

    /// Returns if all of `other` is in it.
    fn contains(&self, other: &Self) -> bool {
        self.space == other.space && self.start <= other.start && other.end <= self.end
    }
}

/// All zones of a VM at some moment.
///
/// # Invariants
///
/// `list` is sorted by space and start; the number with a zone is the largest end of it and of those
/// before it in its space.
struct Zones {
    list: KVVec<(Zone, u64)>,
}

impl Zones {
    /// No zone, and room for `len`: ENOMEM.
    fn with_room(len: usize) -> Result<KBox<Self>> {
        let list = KVVec::with_capacity(len, GFP_KERNEL_ACCOUNT)?;
        Ok(KBox::new(Self { list }, GFP_KERNEL_ACCOUNT)?)
    }

    /// Appends a zone that comes after all others: ENOMEM if there is no room left.
    fn push(&mut self, zone: Zone) -> Result {
        let reach = match self.list.last() {
            Some((before, reach)) if before.space == zone.space => zone.end.max(*reach),
            _ => zone.end,
        };
        // INVARIANT: Sorted, as the caller says; `reach` had been taken over those before.
        self.list
            .push_within_capacity((zone, reach))
            .map_err(|_| ENOMEM)
    }

    fn iter(&self) -> impl Iterator<Item = Zone> + '_ {
        self.list.iter().map(|(zone, _)| *zone)
    }

    /// The position of the first zone that begins after an address.
    fn after(&self, space: Space, addr: u64) -> usize {
        self.list
            .partition_point(|(zone, _)| (zone.space, zone.start) <= (space, addr))
    }

    /// Returns if all of a range is in one zone. Zones may overlap: one of those that begin no later
    /// has to reach its end.
    fn any_contains(&self, space: Space, start: u64, end: u64) -> bool {
        let before = self.after(space, start).checked_sub(1);
        match before.and_then(|i| self.list.get(i)) {
            Some((zone, reach)) => zone.space == space && end <= *reach,
            None => false,
        }
    }

    /// A copy with one more zone: ENOSPC, ENOMEM.
    fn with(&self, zone: Zone) -> Result<KBox<Self>> {
        if self.iter().filter(|old| old.space == zone.space).count() >= MAX_ZONES {
            return Err(no_space());
        }
        let mut new = Self::with_room(self.list.len().saturating_add(1))?;
        let at = self.after(zone.space, zone.start);
        for old in self.iter().take(at) {
            new.push(old)?;
        }
        new.push(zone)?;
        for old in self.iter().skip(at) {
            new.push(old)?;
        }
        Ok(new)
    }

    /// A copy without the zones that contain `range`: ENOMEM.
    fn without(&self, range: &Zone) -> Result<KBox<Self>> {
        let mut new = Self::with_room(self.list.len())?;
        for zone in self.iter().filter(|zone| !zone.contains(range)) {
            new.push(zone)?;
        }
        Ok(new)
    }

    /// A bit for each space that has a zone.
    fn spaces(&self) -> u32 {
        self.iter().fold(0, |bits, zone| bits | bit(zone.space))
    }
}

const fn bit(space: Space) -> u32 {
    1 << space as u32
}

/// The zones of one VM, and its ring.
#[pin_data]
pub(crate) struct Coalesced {
    /// Held to change `zones`.
    #[pin]
    update: Mutex<()>,
    #[pin]
    zones: SrcuCell<Zones>,
    /// What [`Zones::spaces`] says: most guests have no zone, and their writes shall not pay for it.
    spaces: AtomicU32,
    ring: KernelPage,
    /// Held to put something into the ring.
    #[pin]
    producer: SpinLock<()>,
}

/// Where entries begin in the ring's page, and how many there are.
const HEAD: usize = size_of::<kvm_coalesced_mmio_ring>();
const ENTRIES: usize = (PAGE_SIZE - HEAD) / size_of::<kvm_coalesced_mmio>();

impl Coalesced {
    /// No zone, and an empty ring: ENOMEM.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            update <- new_mutex!((), "rkvm_zones"),
            zones <- SrcuCell::new(Zones::with_room(0)?),
            spaces: AtomicU32::new(0),
            ring: KernelPage::new()?,
            producer <- new_spinlock!((), "rkvm_coalesced"),
        }? Error)
    }

    /// The ring's page, to be mapped.
    pub(crate) fn ring(&self) -> &KernelPage {
        &self.ring
    }

    /// KVM_REGISTER_COALESCED_MMIO: EINVAL if it is neither of memory nor of ports, ENOSPC, ENOMEM.
    pub(crate) fn register(&self, zone: &kvm_coalesced_mmio_zone) -> Result {
        let zone = Zone::new(zone)?;
        self.change(|zones| zones.with(zone))
    }

    /// KVM_UNREGISTER_COALESCED_MMIO: removes all zones that contain this range, of which there need
    /// be none. When it returns, nothing more comes by them. EINVAL, ENOMEM.
    pub(crate) fn unregister(&self, range: &kvm_coalesced_mmio_zone) -> Result {
        let range = Zone::new(range)?;
        self.change(|zones| zones.without(&range))
    }

    fn change(&self, f: impl FnOnce(&Zones) -> Result<KBox<Zones>>) -> Result {
        let _update = self.update.lock();
        let next = f(&self.zones.read())?;
        let spaces = next.spaces();
        drop(self.zones.replace(next));
        // Relaxed: a guest that runs because this call has returned sees it by whatever told it.
        self.spaces.store(spaces, Ordering::Relaxed);
        Ok(())
    }

    /// Puts a write, 1 to 8 bytes, into the ring if it lies in a zone and there is room; returns if
    /// so.
    #[inline]
    pub(crate) fn write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        self.spaces.load(Ordering::Relaxed) & bit(space) != 0 && self.try_write(space, addr, data)
    }

    fn try_write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        let Some(end) = addr.checked_add(data.len() as u64) else {
            return false;
        };
        // The section lasts until the entry is made: a zone that has been removed makes no more.
        let zones = self.zones.read();
        zones.any_contains(space, addr, end) && self.push(space, addr, data)
    }

    /// Puts an entry into the ring, if there is room.
    fn push(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        const FIRST: usize = offset_of!(kvm_coalesced_mmio_ring, first);
        const LAST: usize = offset_of!(kvm_coalesced_mmio_ring, last);
        let mut bytes = [0; 8];
        match bytes.get_mut(..data.len()) {
            Some(part) => part.copy_from_slice(data),
            None => return false,
        }

        let _producer = self.producer.lock();
        let ring = &self.ring;
        let last = ring.read::<u32>(LAST) as usize;
        let next = last.wrapping_add(1);
        let next = if next == ENTRIES { 0 } else { next };
        // One entry stays free, so that full and empty are not the same.
        if last >= ENTRIES || next == ring.read::<u32>(FIRST) as usize {
            return false;
        }
        let at = HEAD + last * size_of::<kvm_coalesced_mmio>();
        ring.write(at + offset_of!(kvm_coalesced_mmio, phys_addr), addr);
        ring.write(at + offset_of!(kvm_coalesced_mmio, len), data.len() as u32);
        ring.write(
            at + offset_of!(kvm_coalesced_mmio, __bindgen_anon_1.pio),
            u32::from(space == Space::Ports),
        );
        ring.write_bytes(at + offset_of!(kvm_coalesced_mmio, data), &bytes);
        // The entry is there before the index says so.
        fence(Ordering::Release);
        ring.write(LAST, next as u32);
        true
    }
}
