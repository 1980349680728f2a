// SPDX-License-Identifier: GPL-2.0

//! Addresses whose writes signal an eventfd, and go no further (KVM API, KVM_IOEVENTFD).

use crate::abi::kvm_ioeventfd;
use crate::bindings as b;
use crate::bus::Space;
use crate::linux::eventfd::EventFd;
use crate::linux::no_space;
use crate::linux::srcu::SrcuCell;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::new_mutex;
use kernel::sync::Arc;
use kernel::sync::Mutex;

const DATAMATCH: u32 = 1 << b::kvm_ioeventfd_flag_nr_datamatch;
const PIO: u32 = 1 << b::kvm_ioeventfd_flag_nr_pio;
const DEASSIGN: u32 = 1 << b::kvm_ioeventfd_flag_nr_deassign;
const VIRTIO_CCW: u32 = 1 << b::kvm_ioeventfd_flag_nr_virtio_ccw_notify;
const KNOWN: u32 = (1 << b::kvm_ioeventfd_flag_nr_max) - 1;

/// The most of a VM. KVM has no limit, but a copy of the list is made with each change.
const MAX_EVENTFDS: usize = 65536;

/// Which writes are meant. The order is that of [`List`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Match {
    space: Space,
    addr: u64,
    /// How many bytes the write has; 0 for any number.
    len: u32,
    /// The value that is written, if only that is meant. Never with a length of 0.
    value: Option<u64>,
}

impl Match {
    fn new(args: &kvm_ioeventfd) -> Self {
        Self {
            space: if args.flags & PIO != 0 {
                Space::Ports
            } else {
                Space::Memory
            },
            addr: args.addr,
            len: args.len,
            value: (args.flags & DATAMATCH != 0).then_some(args.datamatch),
        }
    }

    /// The first that there can be at an address.
    const fn any(space: Space, addr: u64) -> Self {
        Self {
            space,
            addr,
            len: 0,
            value: None,
        }
    }

    fn is_at(&self, space: Space, addr: u64) -> bool {
        self.space == space && self.addr == addr
    }

    /// Whether a write can be meant by both.
    fn collides(&self, other: &Self) -> bool {
        let same_value = match (self.value, other.value) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        self.is_at(other.space, other.addr)
            && (self.len == 0 || other.len == 0 || self.len == other.len && same_value)
    }
}

/// All of a VM at some moment.
///
/// # Invariants
///
/// Sorted. No two collide: at an address, there is one of length 0 and nothing else; or of each
/// length, one without a value, or any number with values.
struct List(KVVec<(Match, Arc<EventFd>)>);

impl List {
    fn with_room(len: usize) -> Result<KVVec<(Match, Arc<EventFd>)>> {
        Ok(KVVec::with_capacity(len, GFP_KERNEL_ACCOUNT)?)
    }

    /// Where one is, or would be.
    fn position(&self, key: &Match) -> usize {
        self.0.partition_point(|(this, _)| this < key)
    }

    fn at(&self, key: &Match) -> Option<&(Match, Arc<EventFd>)> {
        self.0.get(self.position(key))
    }

    /// The one for any write to an address.
    #[inline]
    fn find_any(&self, space: Space, addr: u64) -> Option<&EventFd> {
        let key = Match::any(space, addr);
        self.at(&key)
            .filter(|(this, _)| *this == key)
            .map(|(_, eventfd)| &**eventfd)
    }

    /// The one for a write.
    #[inline]
    fn find(&self, space: Space, addr: u64, len: u32, value: u64) -> Option<&EventFd> {
        // The first at the address says if there is anything, and is the one for any length.
        let (first, eventfd) = self.at(&Match::any(space, addr))?;
        if !first.is_at(space, addr) {
            return None;
        }
        if first.len == 0 || first.len == len && first.value.is_none() {
            return Some(eventfd);
        }
        let any_value = Match {
            space,
            addr,
            len,
            value: None,
        };
        let exact = Match {
            value: Some(value),
            ..any_value
        };
        let found = |key: &Match| {
            self.at(key)
                .filter(|(this, _)| this == key)
                .map(|(_, eventfd)| &**eventfd)
        };
        found(&exact).or_else(|| found(&any_value))
    }

    /// A copy with another one: EEXIST if it collides, ENOSPC, ENOMEM.
    fn with(&self, key: Match, eventfd: Arc<EventFd>) -> Result<KBox<Self>> {
        let first = self.position(&Match::any(key.space, key.addr));
        let mut here = self.0.get(first..).unwrap_or(&[]).iter();
        if here
            .by_ref()
            .take_while(|(this, _)| this.is_at(key.space, key.addr))
            .any(|(this, _)| this.collides(&key))
        {
            return Err(EEXIST);
        }
        if self.0.len() >= MAX_EVENTFDS {
            return Err(no_space());
        }
        let at = self.position(&key);
        let mut next = Self::with_room(self.0.len().saturating_add(1))?;
        for entry in self.0.iter().cloned() {
            next.push(entry, GFP_KERNEL_ACCOUNT)?;
        }
        next.insert_within_capacity(at, (key, eventfd))
            .map_err(|_| ENOMEM)?;
        // INVARIANT: Put where it belongs, and it collides with none.
        Ok(KBox::new(Self(next), GFP_KERNEL_ACCOUNT)?)
    }

    /// A copy without one: ENOENT if it is not there, with this eventfd; ENOMEM.
    fn without(&self, key: &Match, eventfd: &EventFd) -> Result<KBox<Self>> {
        let at = self.position(key);
        match self.0.get(at) {
            Some((this, old)) if this == key && **old == *eventfd => {}
            _ => return Err(ENOENT),
        }
        let mut next = Self::with_room(self.0.len())?;
        for (n, entry) in self.0.iter().enumerate() {
            if n != at {
                next.push(entry.clone(), GFP_KERNEL_ACCOUNT)?;
            }
        }
        Ok(KBox::new(Self(next), GFP_KERNEL_ACCOUNT)?)
    }

    /// What [`IoEventFds::present`] says.
    fn present(&self) -> u32 {
        self.0.iter().fold(0, |bits, (this, _)| {
            let fast = this.space == Space::Memory && this.len == 0;
            bits | bit(this.space) | if fast { FAST } else { 0 }
        })
    }
}

const fn bit(space: Space) -> u32 {
    1 << space as u32
}

/// There is one of memory, and of any length.
const FAST: u32 = 1 << 31;

/// The eventfds of one VM.
#[pin_data]
pub(crate) struct IoEventFds {
    /// Held to change `list`.
    #[pin]
    update: Mutex<()>,
    #[pin]
    list: SrcuCell<List>,
    /// A bit for each space that has one, and [`FAST`]: most guests' accesses shall not pay for a look.
    present: AtomicU32,
}

impl IoEventFds {
    /// None: ENOMEM.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            update <- new_mutex!((), "rkvm_ioeventfds"),
            list <- SrcuCell::new(KBox::new(List(KVVec::new()), GFP_KERNEL_ACCOUNT)?),
            present: AtomicU32::new(0),
        }? Error)
    }

    /// KVM_IOEVENTFD. EINVAL: a length that no write has, a range that wraps, a flag that is not known,
    /// a value without a length; something that is no eventfd. EBADF. EEXIST if a write could be meant
    /// twice, ENOSPC if there are too many; ENOENT if there is none such to remove. ENOMEM.
    ///
    /// Once one has been removed, it is signalled no more.
    pub(crate) fn change(&self, args: &kvm_ioeventfd) -> Result {
        if args.flags & DEASSIGN == 0 {
            let flags = args.flags;
            if !matches!(args.len, 0 | 1 | 2 | 4 | 8)
                || args.addr.checked_add(args.len.into()).is_none()
                || flags & !KNOWN != 0
                || args.len == 0 && flags & DATAMATCH != 0
            {
                return Err(EINVAL);
            }
        }
        let eventfd = EventFd::from_fd(args.fd)?;
        // The bus of another architecture, on which no guest of ours writes.
        if args.flags & (VIRTIO_CCW | PIO) == VIRTIO_CCW {
            return Err(EINVAL);
        }
        let key = Match::new(args);
        let _update = self.update.lock();
        let next = if args.flags & DEASSIGN == 0 {
            let eventfd = Arc::new(eventfd, GFP_KERNEL_ACCOUNT)?;
            self.list.read().with(key, eventfd)?
        } else {
            self.list.read().without(&key, &eventfd)?
        };
        let present = next.present();
        drop(self.list.replace(next));
        // Relaxed: a guest that runs because this call has returned sees it by whatever told it.
        self.present.store(present, Ordering::Relaxed);
        Ok(())
    }

    /// Signals the eventfd for a write, 1 to 8 bytes; returns if there was one.
    #[inline]
    pub(crate) fn write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        self.present.load(Ordering::Relaxed) & bit(space) != 0 && self.try_write(space, addr, data)
    }

    fn try_write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        let mut bytes = [0; 8];
        match bytes.get_mut(..data.len()) {
            Some(part) => part.copy_from_slice(data),
            None => return false,
        }
        let value = u64::from_le_bytes(bytes);
        // The section lasts until it is signalled: one that has been removed is not.
        let list = self.list.read();
        signal(list.find(space, addr, data.len() as u32, value))
    }

    /// Whether there is one for any write to an address of memory.
    #[inline]
    pub(crate) fn takes_any_write(&self) -> bool {
        self.present.load(Ordering::Relaxed) & FAST != 0
    }

    /// As [`Self::write`], for a write to memory of which only the address is known.
    pub(crate) fn write_any(&self, gpa: u64) -> bool {
        signal(self.list.read().find_any(Space::Memory, gpa))
    }
}

fn signal(eventfd: Option<&EventFd>) -> bool {
    if let Some(eventfd) = eventfd {
        eventfd.signal();
    }
    eventfd.is_some()
}
