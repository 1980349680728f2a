// SPDX-License-Identifier: GPL-2.0

//! The pages that a processor without unrestricted guest needs in a VM's memory: a task-state segment for virtual-8086
//! mode, as which real mode runs, and a table that maps each address to itself, for guests without paging.
//! The user says where they are to be (KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR), or they are where KVM's documentation
//! has them.

use crate::backend::PrivatePages;
use crate::mem::private::Private;
use crate::mem::private::PrivateSlot;
use crate::mem::GuestMemory;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::Mutex;

const PAGE: u64 = 0x1000;

const DEFAULT_TSS: u64 = 0xfeff_d000;
const DEFAULT_IDENTITY_MAP: u64 = 0xfffb_c000;

/// The segment, its map of the software interrupts that go by the interrupt table, its map of the ports, and a byte
/// behind that.
const TSS_BASE: usize = 0x68;
const TSS_REDIRECTION: usize = 32;
const TSS_PORTS: usize = 8192;
/// Its limit, and where its last byte is.
pub(crate) const TSS_LIMIT: u32 = (TSS_BASE + TSS_REDIRECTION + TSS_PORTS) as u32;
const TSS_SIZE: u64 = 3 * PAGE;
/// Where the segment says where the map of the ports is.
const TSS_MAP_POINTER: u64 = 0x66;

/// No address.
const NOWHERE: u64 = u64::MAX;

/// These pages of one VM.
#[pin_data(PinnedDrop)]
pub(crate) struct SpecialPages {
    memory: Arc<GuestMemory>,
    needed: PrivatePages,
    #[pin]
    slots: Mutex<Made>,
    tss: AtomicU64,
    identity_map: AtomicU64,
}

/// Which of them have been made.
struct Made {
    tss: Option<PrivateSlot>,
    /// Where the user wanted it.
    tss_by_user: bool,
    identity_map: Option<PrivateSlot>,
}

impl SpecialPages {
    /// None so far.
    pub(super) fn new(memory: Arc<GuestMemory>, needed: PrivatePages) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            memory,
            needed,
            slots <- new_mutex!(Made {
                tss: None,
                tss_by_user: false,
                identity_map: None,
            }),
            tss: AtomicU64::new(NOWHERE),
            identity_map: AtomicU64::new(DEFAULT_IDENTITY_MAP),
        }? Error)
    }

    /// KVM_SET_TSS_ADDR, with an address that has been checked: EEXIST the second time, or if a memslot is there; ENOMEM;
    /// EFAULT if it cannot be written.
    pub(super) fn set_tss(&self, addr: u64) -> Result {
        if !self.needed.tss {
            return Ok(());
        }
        let mut made = self.slots.lock();
        if made.tss_by_user {
            return Err(EEXIST);
        }
        if let Some(old) = made.tss.take() {
            self.tss.store(NOWHERE, Ordering::Relaxed);
            self.memory.remove_private(old);
        }
        self.make_tss(&mut made, addr)?;
        made.tss_by_user = true;
        Ok(())
    }

    /// KVM_SET_IDENTITY_MAP_ADDR, before the first vCPU. 0 is for the default.
    pub(super) fn set_identity_map(&self, addr: u64) {
        let addr = if addr == 0 {
            DEFAULT_IDENTITY_MAP
        } else {
            addr
        };
        self.identity_map.store(addr, Ordering::Relaxed);
    }

    /// Before a vCPU is made: EEXIST if a memslot is where the table is to be, EINVAL if it cannot be there; ENOMEM;
    /// EFAULT if one of the pages cannot be written.
    pub(super) fn make(&self) -> Result {
        if !self.needed.tss && !self.needed.identity_map {
            return Ok(());
        }
        let mut made = self.slots.lock();
        if self.needed.identity_map && made.identity_map.is_none() {
            let addr = self.identity_map.load(Ordering::Relaxed);
            let slot = self.add(Private::IdentityMap, addr, PAGE, write_identity_map)?;
            made.identity_map = Some(slot);
        }
        if self.needed.tss && made.tss.is_none() {
            // A user who has memory there has to say where else it may be, or guests in real mode are emulated.
            match self.make_tss(&mut made, DEFAULT_TSS) {
                Err(e) if e == EEXIST => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn make_tss(&self, made: &mut Made, addr: u64) -> Result {
        made.tss = Some(self.add(Private::TaskState, addr, TSS_SIZE, write_tss)?);
        self.tss.store(addr, Ordering::Relaxed);
        Ok(())
    }

    /// A slot with what `write` writes to it. If that fails there is none: EEXIST, EINVAL, ENOMEM, EFAULT.
    fn add(
        &self,
        private: Private,
        addr: u64,
        size: u64,
        write: fn(&PrivateSlot) -> Result,
    ) -> Result<PrivateSlot> {
        let slot = self.memory.add_private(private, addr, size)?;
        match write(&slot) {
            Ok(()) => Ok(slot),
            Err(e) => {
                self.memory.remove_private(slot);
                Err(e)
            }
        }
    }

    /// Where the task-state segment is, if there is one.
    pub(crate) fn tss(&self) -> Option<u64> {
        Some(self.tss.load(Ordering::Relaxed)).filter(|addr| *addr != NOWHERE)
    }

    /// Where the table is.
    pub(crate) fn identity_map(&self) -> u64 {
        self.identity_map.load(Ordering::Relaxed)
    }
}

#[pinned_drop]
impl PinnedDrop for SpecialPages {
    fn drop(self: Pin<&mut Self>) {
        let mut made = self.slots.lock();
        let (tss, identity_map) = (made.tss.take(), made.identity_map.take());
        for slot in [tss, identity_map].into_iter().flatten() {
            self.memory.remove_private(slot);
        }
    }
}

/// All interrupts by software go by the table of real mode, and all ports are allowed: they exit.
fn write_tss(slot: &PrivateSlot) -> Result {
    let map = (TSS_BASE + TSS_REDIRECTION) as u16;
    slot.write(TSS_MAP_POINTER, &map.to_le_bytes())?;
    // The processor reads two bytes at once, and this one must be ones (SDM vol. 1, 19.5.2).
    slot.write(TSS_LIMIT.into(), &[0xff])
}

/// A page directory of 1024 pages of 4 MiB: present, writable, user, accessed, dirty, large.
fn write_identity_map(slot: &PrivateSlot) -> Result {
    const FLAGS: u32 = 0xe7;
    let mut entry = FLAGS;
    for n in 0..1024u64 {
        slot.write(n * 4, &entry.to_le_bytes())?;
        entry = entry.wrapping_add(1 << 22);
    }
    Ok(())
}
