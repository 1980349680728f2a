// SPDX-License-Identifier: GPL-2.0

//! The guest's page tables: how a linear address becomes a guest-physical one.
//!
//! [`Paging`] is the state that decides the translation; [`Paging::translate`] walks the tables in guest memory, checks
//! the rights of the access, and sets accessed and dirty bits as the processor would (SDM vol. 3, chapter 5). Memory is
//! reached through [`GuestMemory`], so this serves the instruction emulator whether the processor or we ourselves do
//! the translating while the guest runs.

use super::exception::PfError;
use super::regs::Cr0;
use super::regs::Cr3;
use super::regs::Cr4;
use super::regs::Efer;
use super::regs::Rflags;
use super::segment::AccessKind;

/// The size of the smallest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// The bits of an address inside the smallest page.
pub const PAGE_OFFSET: u64 = PAGE_SIZE - 1;

/// Why guest memory could not be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryError<E> {
    /// There is no memory at the address (or it is read-only and this was a write): the access belongs to a device.
    Mmio,
    /// There is memory, but the host could not reach it.
    Host(E),
}

/// Guest-physical memory.
///
/// Callers never cross a 4 KiB boundary in one call. An aligned access of 2, 4 or 8 bytes is to be made in one piece, as
/// other processors may be writing: page-table entries are read so.
pub trait GuestMemory {
    /// What the host reports when it cannot reach memory that the guest has: an errno, say.
    type Error;

    /// Reads `buf.len()` bytes at `gpa`.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mmio`] if there is no memory at `gpa`.
    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError<Self::Error>>;

    /// Writes `data` at `gpa`.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mmio`] if there is no memory at `gpa` or it is read-only; nothing is written then.
    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), MemoryError<Self::Error>>;

    /// Replaces the `len` bytes at `gpa` by `new` if they equal `old`, atomically. Says whether it did.
    ///
    /// `len` is 1, 2, 4 or 8, and `gpa` is a multiple of it. The values are little-endian, in the low bytes.
    ///
    /// # Errors
    ///
    /// As [`GuestMemory::write`].
    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError<Self::Error>>;
}

/// The state that decides how addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR0: PG and WP count.
    pub cr0: Cr0,
    /// CR3.
    pub cr3: Cr3,
    /// CR4: PSE, PAE, LA57, SMEP, SMAP and PKE count.
    pub cr4: Cr4,
    /// EFER: LMA and NXE count.
    pub efer: Efer,
    /// RFLAGS: AC counts.
    pub rflags: Rflags,
    /// The rights of protection keys for user pages; counts with CR4.PKE.
    pub pkru: u32,
    /// The width of guest-physical addresses, in bits. Values outside 32 to 52 are taken as the nearest.
    pub maxphyaddr: u8,
    /// Whether the guest's processor has 1 GiB pages.
    pub gbpages: bool,
    /// The four entries of PAE paging as the processor loaded them with CR3; none: they are taken from memory.
    pub pdptes: Option<[u64; 4]>,
}

/// Who accesses, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAccess {
    /// What is done.
    pub kind: AccessKind,
    /// Whether it is done by code at CPL 3. Implicit accesses to system structures are not, whatever the CPL.
    pub user: bool,
    /// Whether it is an implicit access (to a descriptor table, a TSS): RFLAGS.AC does not permit it under SMAP.
    pub implicit: bool,
    /// Whether it is only asked where the address leads: no rights are checked, no bit is set.
    pub probe: bool,
}

impl PageAccess {
    /// An ordinary access of an instruction at this privilege level.
    #[inline]
    #[must_use]
    pub const fn explicit(kind: AccessKind, cpl: u8) -> Self {
        Self {
            kind,
            user: cpl == 3,
            implicit: false,
            probe: false,
        }
    }

    /// An access by the processor to a structure of its own.
    #[inline]
    #[must_use]
    pub const fn implicit(kind: AccessKind) -> Self {
        Self {
            kind,
            user: false,
            implicit: true,
            probe: false,
        }
    }

    /// A question, without effects: for a debugger.
    pub const PROBE: Self = Self {
        kind: AccessKind::Read,
        user: false,
        implicit: true,
        probe: true,
    };
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address.
    pub gpa: u64,
    /// The base-two logarithm of the size of the page: 12, 21, 22 or 30. With paging off, 12.
    pub page_shift: u8,
    /// Whether the page is one of user mode.
    pub user: bool,
    /// Whether the tables permit writes at all.
    pub writable: bool,
}

/// An entry that a walk passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Where it is.
    pub gpa: u64,
    /// What it was when the walk was over, with the bits that the walk has set.
    pub value: u64,
}

/// A walk that has led somewhere: [`Paging::walk`].
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Where it led.
    pub translation: Translation,
    /// The page is not executable.
    pub nx: bool,
    /// The page's protection key; means nothing for pages of supervisor mode.
    pub key: u8,
    /// The page is marked dirty.
    pub dirty: bool,
    path: Path,
}

impl Walk {
    /// The size of the entries, in bytes.
    #[inline]
    #[must_use]
    pub const fn entry_size(&self) -> u8 {
        self.path.entry_size
    }

    /// The entry of a level: 1 for the entries that map 4 KiB. None if the walk did not come there, and for the table of four
    /// of PAE paging.
    #[inline]
    #[must_use]
    pub fn step(&self, level: u8) -> Option<Step> {
        let above = self.path.top.checked_sub(level)?;
        let steps = self.path.entries.get(..self.path.depth)?;
        steps.get(usize::from(above)).copied()
    }
}

/// Why a translation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError<E> {
    /// The guest is owed a page fault, with this error code and the linear address in CR2.
    Fault(PfError),
    /// Another processor kept changing the tables: let the guest try the instruction again.
    Contended,
    /// The host could not reach a table.
    Host(E),
}

/// The formats of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// Two levels of 1024 entries of 4 bytes.
    Bits32,
    /// A table of four, then two levels of 512 entries of 8 bytes.
    Pae,
    /// Four levels.
    Level4,
    /// Five levels.
    Level5,
}

const PTE_P: u64 = 1 << 0;
const PTE_W: u64 = 1 << 1;
const PTE_U: u64 = 1 << 2;
const PTE_A: u64 = 1 << 5;
const PTE_D: u64 = 1 << 6;
const PTE_PS: u64 = 1 << 7;
const PTE_NX: u64 = 1 << 63;

/// The most levels a walk has.
const MAX_LEVELS: usize = 5;
/// How often a walk is begun again because another processor changed an entry under it.
const MAX_RESTARTS: usize = 32;

/// The bits `low` to `high`, inclusive; none if `low` is above `high`.
const fn bit_range(low: u32, high: u32) -> u64 {
    if low > high || high > 63 {
        return 0;
    }
    (u64::MAX << low) & (u64::MAX >> (63 - high))
}

/// The entries of a walk that have an accessed bit, from the top.
#[derive(Clone, Copy, Debug, Default)]
struct Path {
    entries: [Step; MAX_LEVELS],
    depth: usize,
    /// The level of the first.
    top: u8,
    entry_size: u8,
}

/// The end of a walk, before the rights are judged.
struct Leaf {
    translation: Translation,
    nx: bool,
    key: u32,
    /// All of the path is marked accessed.
    accessed: bool,
    /// The page is marked dirty.
    dirty: bool,
}

impl Paging {
    fn format(&self) -> Format {
        if !self.cr4.has(Cr4::PAE) {
            Format::Bits32
        } else if !self.efer.has(Efer::LMA) {
            Format::Pae
        } else if self.cr4.has(Cr4::LA57) {
            Format::Level5
        } else {
            Format::Level4
        }
    }

    /// Whether 57-bit linear addresses are in force.
    #[inline]
    #[must_use]
    pub fn la57(&self) -> bool {
        self.cr4.has(Cr4::LA57)
    }

    fn phys_bits(&self) -> u32 {
        u32::from(self.maxphyaddr).clamp(32, 52)
    }

    /// The bits of the error code that the access alone decides.
    fn access_error(&self, access: PageAccess) -> PfError {
        let fetch_reported =
            self.cr4.has(Cr4::SMEP) || (self.cr4.has(Cr4::PAE) && self.efer.has(Efer::NXE));
        PfError::empty()
            .with_if(PfError::W, access.kind == AccessKind::Write)
            .with_if(PfError::U, access.user)
            .with_if(
                PfError::I,
                access.kind == AccessKind::Fetch && fetch_reported,
            )
    }

    /// Translates a linear address for an access that stays inside one page of 4 KiB.
    ///
    /// Outside 64-bit mode the caller has cut the address to 32 bits; in it the address is canonical.
    ///
    /// A table outside memory is taken as one whose entries are not present. One in read-only memory works, but keeps no
    /// accessed and dirty bits, as a page table in ROM does.
    ///
    /// # Errors
    ///
    /// See [`WalkError`].
    pub fn translate<M: GuestMemory>(
        &self,
        memory: &mut M,
        linear: u64,
        access: PageAccess,
    ) -> Result<Translation, WalkError<M::Error>> {
        if !self.cr0.has(Cr0::PG) {
            return Ok(Self::unpaged(linear));
        }
        let mut path = Path::default();
        let leaf = self.resolve(memory, linear, access, &mut path)?;
        Ok(leaf.translation)
    }

    /// Where an address leads with paging off.
    const fn unpaged(linear: u64) -> Translation {
        Translation {
            gpa: linear & 0xffff_ffff,
            page_shift: 12,
            user: true,
            writable: true,
        }
    }

    /// The same as [`Self::translate`], and says which entries led there.
    ///
    /// # Errors
    ///
    /// See [`WalkError`].
    pub fn walk<M: GuestMemory>(
        &self,
        memory: &mut M,
        linear: u64,
        access: PageAccess,
    ) -> Result<Walk, WalkError<M::Error>> {
        let mut path = Path::default();
        if !self.cr0.has(Cr0::PG) {
            return Ok(Walk {
                translation: Self::unpaged(linear),
                nx: false,
                key: 0,
                dirty: true,
                path,
            });
        }
        let leaf = self.resolve(memory, linear, access, &mut path)?;
        Ok(Walk {
            translation: leaf.translation,
            nx: leaf.nx,
            key: leaf.key as u8,
            dirty: leaf.dirty || access.kind == AccessKind::Write,
            path,
        })
    }

    /// Walks, judges and marks.
    fn resolve<M: GuestMemory>(
        &self,
        memory: &mut M,
        linear: u64,
        access: PageAccess,
        path: &mut Path,
    ) -> Result<Leaf, WalkError<M::Error>> {
        let error = self.access_error(access);
        for _ in 0..MAX_RESTARTS {
            path.depth = 0;
            let leaf = self.descend(memory, linear, error, path)?;
            if access.probe {
                return Ok(leaf);
            }
            if let Some(extra) = self.violation(&leaf, access) {
                return Err(WalkError::Fault(error | PfError::P | extra));
            }
            let write = access.kind == AccessKind::Write;
            let marked = leaf.accessed && (leaf.dirty || !write);
            if marked || Self::mark(memory, path, write)? {
                return Ok(leaf);
            }
        }
        Err(WalkError::Contended)
    }

    /// Goes down the tables; says where they lead and what they permit.
    fn descend<M: GuestMemory>(
        &self,
        memory: &mut M,
        linear: u64,
        error: PfError,
        path: &mut Path,
    ) -> Result<Leaf, WalkError<M::Error>> {
        let format = self.format();
        let (mut table, levels, index_bits, entry_size) = match format {
            Format::Bits32 => (self.cr3.root() & 0xffff_ffff, 2u32, 10u32, 4u8),
            Format::Pae => (self.cr3.pae_root(), 3, 9, 8),
            Format::Level4 => (self.cr3.root(), 4, 9, 8),
            Format::Level5 => (self.cr3.root(), 5, 9, 8),
        };
        // With PAE the topmost index has the two bits that 32-bit addresses leave; the mask of nine is as good.
        let index_mask = (1u64 << index_bits) - 1;
        let reserved = self.reserved(format);
        path.entry_size = entry_size;
        path.top = if format == Format::Pae {
            2
        } else {
            levels as u8
        };
        // The flags that all entries have, and those that any has.
        let (mut all, mut any) = (u64::MAX, 0);

        let mut level = levels;
        while level > 0 {
            let shift = index_bits
                .wrapping_mul(level.wrapping_sub(1))
                .wrapping_add(12);
            let index = (linear >> (shift & 63)) & index_mask;
            let gpa = table.wrapping_add(index.wrapping_mul(u64::from(entry_size)));
            let pdpte = format == Format::Pae && level == 3;
            let loaded = self.pdptes.filter(|_| pdpte);
            let entry = match loaded {
                Some(pdptes) => pdptes.get(index as usize & 3).copied().unwrap_or(0),
                None => match Self::read_entry(memory, gpa, entry_size) {
                    Ok(entry) => entry,
                    Err(MemoryError::Mmio) => 0,
                    Err(MemoryError::Host(e)) => return Err(WalkError::Host(e)),
                },
            };
            if entry & PTE_P == 0 {
                return Err(WalkError::Fault(error));
            }
            let large = !pdpte && self.is_large(format, level, entry);
            if entry & (reserved | self.reserved_at(format, level, large)) != 0 {
                return Err(WalkError::Fault(error | PfError::P | PfError::RSVD));
            }
            if !pdpte {
                // The entries of the table of four carry no rights and no accessed bit.
                all &= entry;
                any |= entry;
                if let Some(slot) = path.entries.get_mut(path.depth) {
                    *slot = Step { gpa, value: entry };
                    path.depth = path.depth.wrapping_add(1);
                }
            }
            if level == 1 || large {
                return Ok(Leaf {
                    translation: Translation {
                        gpa: self.frame(format, entry, large, shift)
                            | (linear & bit_range(0, shift.wrapping_sub(1))),
                        page_shift: shift as u8,
                        user: all & PTE_U != 0,
                        writable: all & PTE_W != 0,
                    },
                    // Entries of four bytes have no such bit.
                    nx: any & PTE_NX != 0 && self.efer.has(Efer::NXE),
                    key: ((entry >> 59) & 15) as u32,
                    accessed: all & PTE_A != 0,
                    dirty: entry & PTE_D != 0,
                });
            }
            table = match format {
                Format::Bits32 => entry & 0xffff_f000,
                _ => entry & bit_range(12, 51),
            };
            level = level.wrapping_sub(1);
        }
        // Level 1 always returns.
        Err(WalkError::Fault(error))
    }

    fn read_entry<M: GuestMemory>(
        memory: &mut M,
        gpa: u64,
        size: u8,
    ) -> Result<u64, MemoryError<M::Error>> {
        let mut raw = [0; 8];
        if let Some(buf) = raw.get_mut(..usize::from(size)) {
            memory.read(gpa, buf)?;
        }
        Ok(u64::from_le_bytes(raw))
    }

    /// Whether an entry above the last level maps a page itself. Where that does not exist, the bit is ignored (32-bit
    /// paging without PSE) or reserved (see [`Self::reserved`]).
    fn is_large(&self, format: Format, level: u32, entry: u64) -> bool {
        if entry & PTE_PS == 0 {
            return false;
        }
        match (format, level) {
            (Format::Bits32, 2) => self.cr4.has(Cr4::PSE),
            (Format::Bits32, _) => false,
            (_, 2) => true,
            (Format::Level4 | Format::Level5, 3) => self.gbpages,
            _ => false,
        }
    }

    /// The bits that must be clear in any present entry (SDM vol. 3, tables 5-4 to 5-20).
    fn reserved(&self, format: Format) -> u64 {
        if format == Format::Bits32 {
            return 0;
        }
        let mut reserved = bit_range(self.phys_bits(), 51);
        if !self.efer.has(Efer::NXE) {
            reserved |= PTE_NX;
        }
        if format == Format::Pae {
            reserved |= bit_range(52, 62);
        }
        reserved
    }

    /// The same for those of a level.
    fn reserved_at(&self, format: Format, level: u32, large: bool) -> u64 {
        match (format, level) {
            // PSE-36: bits 13 to 20 hold address bits 32 to 39, as far as addresses go.
            (Format::Bits32, _) if large => {
                bit_range(self.phys_bits().min(40).wrapping_sub(19), 21)
            }
            (Format::Bits32, _) => 0,
            (Format::Pae, 3) => PTE_NX | bit_range(1, 2) | bit_range(5, 8),
            (_, 1) => 0,
            (_, 2) if large => bit_range(13, 20),
            (_, 3) if large => bit_range(13, 29),
            (_, 2) => 0,
            _ => PTE_PS,
        }
    }

    /// The frame that a leaf entry maps.
    fn frame(&self, format: Format, entry: u64, large: bool, shift: u32) -> u64 {
        if format == Format::Bits32 {
            if large {
                return (entry & 0xffc0_0000) | ((entry & bit_range(13, 20)) << 19);
            }
            return entry & 0xffff_f000;
        }
        entry & bit_range(shift, 51)
    }

    /// Judges the rights of an access (SDM vol. 3, 5.6). `Some` is a violation, with the bits that the error code gets
    /// besides P and those of the access.
    fn violation(&self, leaf: &Leaf, access: PageAccess) -> Option<PfError> {
        let page = &leaf.translation;
        let write = access.kind == AccessKind::Write;
        let guarded = access.user || self.cr0.has(Cr0::WP);
        let key = self.denied_by_key(leaf, access, write && guarded);
        let none = PfError::empty();
        // What the key denies is told whatever else denies the access.
        let denied = none.with_if(PfError::PK, key);
        if access.user && !page.user {
            return Some(denied);
        }
        if access.kind == AccessKind::Fetch {
            let smep = !access.user && page.user && self.cr4.has(Cr4::SMEP);
            return (leaf.nx || smep).then_some(none);
        }
        if !access.user && page.user && self.cr4.has(Cr4::SMAP) {
            let permitted = !access.implicit && self.rflags.has(Rflags::AC);
            if !permitted {
                return Some(denied);
            }
        }
        if write && !page.writable && guarded {
            return Some(denied);
        }
        key.then_some(denied)
    }

    /// Whether the protection key of a user page denies a data access; `write` is one that the right to write is for.
    fn denied_by_key(&self, leaf: &Leaf, access: PageAccess, write: bool) -> bool {
        if access.kind == AccessKind::Fetch
            || !leaf.translation.user
            || !self.cr4.has(Cr4::PKE)
            || !self.efer.has(Efer::LMA)
        {
            return false;
        }
        let rights = self.pkru >> (leaf.key & 15).wrapping_mul(2);
        rights & 1 != 0 || (write && rights & 2 != 0)
    }

    /// Sets the accessed bits on the way and the dirty bit at its end. Says false if an entry is no longer what it was.
    fn mark<M: GuestMemory>(
        memory: &mut M,
        path: &mut Path,
        write: bool,
    ) -> Result<bool, WalkError<M::Error>> {
        let (mut left, size) = (path.depth, path.entry_size);
        for step in path.entries.iter_mut().take(path.depth) {
            left = left.wrapping_sub(1);
            let last = left == 0;
            let mut wanted = step.value | PTE_A;
            if last && write {
                wanted |= PTE_D;
            }
            if wanted == step.value {
                continue;
            }
            match memory.compare_exchange(step.gpa, size, step.value, wanted) {
                Ok(true) => step.value = wanted,
                Err(MemoryError::Mmio) => {}
                Ok(false) => return Ok(false),
                Err(MemoryError::Host(e)) => return Err(WalkError::Host(e)),
            }
        }
        Ok(true)
    }
}
