// SPDX-License-Identifier: GPL-2.0

//! From a destination to vCPUs, without asking each.
//!
//! The map is made anew when what an APIC answers to has changed ([`Effect::Identity`](super::Effect::Identity)). It has room for each
//! physical ID and each bit of a logical ID of xAPIC mode; x2APIC's logical IDs are physical ones written otherwise. Where a table
//! cannot say it (two APICs of one ID, two meanings of logical destinations, a broadcast), the answer is [`Lookup::Scan`]:
//! ask [`Identity::matches`] of all.

use super::base::ApicMode;
use super::message::Identity;
use super::message::Target;
use super::message::X2APIC_BROADCAST;
use super::message::XAPIC_BROADCAST;
use super::regs::DestinationFormat;
use core::ops::DerefMut;

/// Whether software has enabled an APIC: one that it has not takes no vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Software {
    /// It is enabled.
    Enabled,
    /// It is not.
    Disabled,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Vacant,
    Xapic,
    X2apic,
}

/// A place in the map: empty, or a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    vcpu: u16,
    kind: Kind,
    takes_vectors: bool,
}

impl Entry {
    /// The empty place.
    pub const VACANT: Self = Self {
        vcpu: 0,
        kind: Kind::Vacant,
        takes_vectors: false,
    };

    /// Puts an entry here, if the place is empty.
    fn fill(&mut self, entry: Self) -> Result<(), ()> {
        if !matches!(self.kind, Kind::Vacant) {
            return Err(());
        }
        *self = entry;
        Ok(())
    }
}

/// What logical destinations mean to the APICs that have a logical ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Logical {
    /// No one has an ID.
    None,
    X2apic,
    Flat,
    Cluster,
    /// More than one of these, or IDs that are not one bit or not one APIC's.
    Mixed,
}

/// The number of logical IDs that are one bit: 16 clusters of 4, of which flat destinations use 8.
const LOGICAL_ENTRIES: usize = 64;

/// The map. `S` is storage for the physical IDs, of one entry for each from 0 up to the highest, for instance `&mut [Entry]` or a vector.
#[derive(Clone, Debug)]
pub struct ApicMap<S> {
    physical: S,
    /// Whether each physical ID is one APIC's, and there is a place for it.
    unique: bool,
    /// Whether any APIC is in xAPIC mode, where 0xff is a broadcast.
    has_xapic: bool,
    logical: Logical,
    xapic_logical: [Entry; LOGICAL_ENTRIES],
}

/// The answer of [`ApicMap::lookup`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// These.
    Found(Targets<'a>),
    /// The map does not know: ask each APIC.
    Scan,
}

impl<S: DerefMut<Target = [Entry]>> ApicMap<S> {
    /// An empty map.
    #[must_use]
    pub fn new(mut physical: S) -> Self {
        physical.fill(Entry::VACANT);
        Self {
            physical,
            unique: true,
            has_xapic: false,
            logical: Logical::None,
            xapic_logical: [Entry::VACANT; LOGICAL_ENTRIES],
        }
    }

    /// Adds the APIC of the vCPU with index `vcpu`.
    pub fn add(&mut self, vcpu: u16, identity: &Identity, software: Software) {
        let kind = match identity.mode {
            ApicMode::Disabled => return,
            ApicMode::Xapic => Kind::Xapic,
            ApicMode::X2apic => Kind::X2apic,
        };
        let entry = Entry {
            vcpu,
            kind,
            takes_vectors: matches!(software, Software::Enabled),
        };
        self.has_xapic |= matches!(kind, Kind::Xapic);
        for id in identity.physical_ids().into_iter().flatten() {
            let place = self.physical.get_mut(id as usize).ok_or(());
            self.unique &= place.and_then(|place| place.fill(entry)).is_ok();
        }
        if matches!(kind, Kind::X2apic) {
            self.agree_on(Logical::X2apic);
        } else {
            self.add_xapic_logical(identity, entry);
        }
    }

    fn agree_on(&mut self, logical: Logical) {
        self.logical = match self.logical {
            Logical::None => logical,
            same if same == logical => same,
            _ => Logical::Mixed,
        };
    }

    fn add_xapic_logical(&mut self, identity: &Identity, entry: Entry) {
        let logical = identity.xapic_logical();
        let (format, cluster, bits) = match identity.format {
            DestinationFormat::Flat => (Logical::Flat, 0, logical),
            DestinationFormat::Cluster => (Logical::Cluster, logical >> 4, logical & 0xf),
            DestinationFormat::Reserved => return,
        };
        if bits == 0 {
            // It answers to no logical destination, whatever the others do.
            return;
        }
        self.agree_on(format);
        let index = usize::from(cluster << 2) | bits.trailing_zeros() as usize;
        let place = self.xapic_logical.get_mut(index).ok_or(());
        if !bits.is_power_of_two() || place.and_then(|place| place.fill(entry)).is_err() {
            self.logical = Logical::Mixed;
        }
    }

    /// Whom a message is for. ([`Target::Itself`] is known to who sends it.)
    #[must_use]
    pub fn lookup(&self, target: Target) -> Lookup<'_> {
        let some = |entries, mask, only| {
            Lookup::Found(Targets {
                entries,
                mask,
                only,
            })
        };
        let range = |table: &'_ [Entry], first: usize, n: usize| -> (usize, usize) {
            let first = first.min(table.len());
            (first, first.saturating_add(n).min(table.len()))
        };
        match target {
            Target::Itself | Target::All | Target::Others => Lookup::Scan,
            Target::Physical(X2APIC_BROADCAST) | Target::Logical(X2APIC_BROADCAST) => Lookup::Scan,
            Target::Physical(XAPIC_BROADCAST) | Target::Logical(XAPIC_BROADCAST)
                if self.has_xapic =>
            {
                Lookup::Scan
            }
            Target::Physical(_) if !self.unique => Lookup::Scan,
            Target::Physical(id) => {
                let (first, end) = range(&self.physical, id as usize, 1);
                some(self.physical.get(first..end).unwrap_or(&[]), 1, None)
            }
            Target::Logical(destination) => match self.logical {
                Logical::Mixed => Lookup::Scan,
                Logical::None => some(&[], 0, None),
                Logical::X2apic if !self.unique => Lookup::Scan,
                Logical::X2apic => {
                    let cluster = (destination >> 16) as usize;
                    let (first, end) = range(&self.physical, cluster << 4, 16);
                    let entries = self.physical.get(first..end).unwrap_or(&[]);
                    // An APIC in xAPIC mode has a place by its physical ID, and none here.
                    some(entries, destination as u16, Some(Kind::X2apic))
                }
                Logical::Flat => some(
                    self.xapic_logical.get(..8).unwrap_or(&[]),
                    destination as u16 & 0xff,
                    None,
                ),
                Logical::Cluster => {
                    let cluster = (destination >> 4) as usize;
                    let (first, end) = range(&self.xapic_logical, cluster << 2, 4);
                    let entries = self.xapic_logical.get(first..end).unwrap_or(&[]);
                    some(entries, destination as u16 & 0xf, None)
                }
            },
        }
    }
}

/// The vCPUs that a destination means, by their indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets<'a> {
    entries: &'a [Entry],
    /// Those of the first 16 entries that are left.
    mask: u16,
    only: Option<Kind>,
}

impl Targets<'_> {
    fn next_entry(&mut self) -> Option<Entry> {
        while self.mask != 0 {
            let index = self.mask.trailing_zeros() as usize;
            self.mask &= self.mask.wrapping_sub(1);
            let Some(&entry) = self.entries.get(index) else {
                continue;
            };
            match (entry.kind, self.only) {
                (Kind::Vacant, _) => {}
                (kind, Some(only)) if kind != only => {}
                _ => return Some(entry),
            }
        }
        None
    }

    /// The one that gets a message of lowest priority, by [`arbitrate`] among those that take vectors.
    #[must_use]
    pub fn lowest_priority(&self, vector: u8) -> Option<u16> {
        let candidates = || {
            let mut targets = self.clone();
            core::iter::from_fn(move || targets.next_entry()).filter(|entry| entry.takes_vectors)
        };
        let chosen = arbitrate(vector, count(candidates()))?;
        candidates().nth(chosen).map(|entry| entry.vcpu)
    }
}

/// The number of items, of which there are no more than 16: without the check for overflow that `Iterator::count` has.
fn count(items: impl Iterator) -> usize {
    items.fold(0, |n: usize, _| n.wrapping_add(1))
}

impl Iterator for Targets<'_> {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        self.next_entry().map(|entry| entry.vcpu)
    }

    fn count(self) -> usize {
        count(self)
    }
}

/// Which of so many APICs takes a message of lowest priority: chosen by the vector, as in KVM, so that one device's interrupts
/// stay with one vCPU, and several devices' spread. None of none.
#[must_use]
pub fn arbitrate(vector: u8, candidates: usize) -> Option<usize> {
    usize::from(vector).checked_rem(candidates)
}
