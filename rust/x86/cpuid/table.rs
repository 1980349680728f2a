// SPDX-License-Identifier: GPL-2.0

//! The CPUID of one vCPU: what KVM_SET_CPUID2 set, ready to be looked up.
//!
//! The entries are a VMM's and may be anything: unsorted, repeated, contradictory. The first that answers a question
//! counts, as in KVM.

use core::ops::DerefMut;

use super::super::regs::Cr4;
use super::super::regs::Xcr0;
use super::words::Leaf1Ecx;
use super::words::Leaf1Edx;
use super::words::Leaf7Ecx;
use super::words::LeafDs1Eax;
use super::CpuidEntry;
use super::CpuidRegs;
use super::XsaveLayout;
use super::MAX_ENTRIES;

const BUCKETS: usize = 64;
/// The end of a chain.
const END: u16 = u16::MAX;

/// State that shows through CPUID while the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuntimeState {
    /// CR4: OSXSAVE and PKE.
    pub cr4: Cr4,
    /// XCR0.
    pub xcr0: Xcr0,
    /// IA32_XSS.
    pub xss: u64,
    /// With a local APIC in the kernel, whether IA32_APIC_BASE enables it; else `None`, and the bit is the VMM's.
    pub apic_enabled: Option<bool>,
    /// Whether IA32_MISC_ENABLE has MONITOR and MWAIT, if CPUID is to follow it; else `None`, and the bit is the VMM's.
    pub mwait_enabled: Option<bool>,
}

/// Why KVM_SET_CPUID2 refuses entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableError {
    /// There are more than [`MAX_ENTRIES`]: E2BIG.
    TooMany,
    /// Leaf 0x80000008 gives linear addresses a width other than 48, 57 or 0: EINVAL.
    LinearWidth,
}

/// A table of entries with an index over them.
///
/// `S` is where the entries are: a vector, a box, a borrowed slice.
///
/// # Invariants
///
/// Every number in `heads` and `next` is the position of an entry or [`u16::MAX`], and a chain's positions only grow, so that
/// following one ends.
#[derive(Clone, Debug)]
pub struct CpuidTable<S> {
    entries: S,
    heads: [u16; BUCKETS],
    next: [u16; MAX_ENTRIES],
}

impl<S: DerefMut<Target = [CpuidEntry]>> CpuidTable<S> {
    /// Makes a table of the entries. An empty one answers every question with zeroes.
    ///
    /// # Errors
    ///
    /// See [`TableError`].
    pub fn new(entries: S) -> Result<Self, TableError> {
        if entries.len() > MAX_ENTRIES {
            return Err(TableError::TooMany);
        }
        let mut table = Self {
            entries,
            heads: [END; BUCKETS],
            next: [END; MAX_ENTRIES],
        };
        // From the last to the first, each at the front of its chain.
        // INVARIANT: what is behind a position in a chain is greater, as it was put there before.
        let mut i = table.entries.len();
        for entry in table.entries.iter().rev() {
            i = i.wrapping_sub(1);
            if let (Some(head), Some(next)) = (
                table.heads.get_mut(bucket(entry.function)),
                table.next.get_mut(i),
            ) {
                *next = *head;
                *head = i as u16;
            }
        }
        if let Some(entry) = table.find(0x8000_0008, 0) {
            if !matches!((entry.eax >> 8) & 0xff, 0 | 48 | 57) {
                return Err(TableError::LinearWidth);
            }
        }
        Ok(table)
    }

    /// The entries, in the order in which they were given.
    #[must_use]
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    fn position(&self, function: u32, index: u32) -> Option<usize> {
        let mut at = self.heads.get(bucket(function)).copied().unwrap_or(END);
        while let Some(entry) = self.entries.get(usize::from(at)) {
            if entry.answers(function, index) {
                return Some(usize::from(at));
            }
            at = self.next.get(usize::from(at)).copied().unwrap_or(END);
        }
        None
    }

    /// The entry for a leaf and subleaf, if there is one.
    #[must_use]
    pub fn find(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        self.entries.get(self.position(function, index)?)
    }

    /// The same, to be changed: which question it answers must stay.
    pub fn find_mut(&mut self, function: u32, index: u32) -> Option<&mut CpuidEntry> {
        let at = self.position(function, index)?;
        self.entries.get_mut(at)
    }

    /// What the CPUID instruction returns for EAX and ECX.
    #[must_use]
    pub fn lookup(&self, function: u32, index: u32) -> CpuidRegs {
        match self.find(function, index) {
            Some(entry) => entry.regs(),
            None => self.lookup_missing(function, index),
        }
    }

    #[cold]
    fn lookup_missing(&self, function: u32, index: u32) -> CpuidRegs {
        let mut function = function;
        if let Some(last) = self.redirection(function) {
            function = last;
            if let Some(entry) = self.find(function, index) {
                return entry.regs();
            }
        }
        // Where topology is described, a subleaf that is not still returns its number and the x2APIC ID (SDM vol. 2, CPUID,
        // leaf 0bh).
        if matches!(function, 0xb | 0x1f) {
            if let Some(entry) = self.find(function, 1) {
                return CpuidRegs {
                    ecx: index & 0xff,
                    edx: entry.edx,
                    ..CpuidRegs::default()
                };
            }
        }
        CpuidRegs::default()
    }

    /// The leaf that is returned instead, on Intel's processors: the highest basic one, for a leaf above the last of its class
    /// or of no class. AMD's return zeroes.
    fn redirection(&self, function: u32) -> Option<u32> {
        let basic = self.find(0, 0)?;
        if is_amd(basic) {
            return None;
        }
        let class = match function {
            // Each range of 256 hypervisor leaves is a class of its own.
            0x4000_0000..=0x4fff_ffff => function & 0xffff_ff00,
            0xc000_0000.. => 0xc000_0000,
            _ => function & 0x8000_0000,
        };
        match self.find(class, 0) {
            Some(root) if function <= root.eax => None,
            _ => Some(basic.eax),
        }
    }

    /// Makes the entries follow the state of the vCPU. To be called when a table is set, and when any field changes.
    pub fn update(&mut self, state: &RuntimeState, layout: &XsaveLayout) {
        if let Some(entry) = self.find_mut(1, 0) {
            let ecx = Leaf1Ecx::new(entry.ecx);
            let os = ecx.has(Leaf1Ecx::XSAVE) && state.cr4.has(Cr4::OSXSAVE);
            let ecx = ecx.with_if(Leaf1Ecx::OSXSAVE, os);
            let mwait = state.mwait_enabled.unwrap_or(ecx.has(Leaf1Ecx::MONITOR));
            entry.ecx = ecx.with_if(Leaf1Ecx::MONITOR, mwait).bits();
            if let Some(on) = state.apic_enabled {
                entry.edx = Leaf1Edx::new(entry.edx).with_if(Leaf1Edx::APIC, on).bits();
            }
        }
        if let Some(entry) = self.find_mut(7, 0) {
            let ecx = Leaf7Ecx::new(entry.ecx);
            let os = ecx.has(Leaf7Ecx::PKU) && state.cr4.has(Cr4::PKE);
            entry.ecx = ecx.with_if(Leaf7Ecx::OSPKE, os).bits();
        }
        if let Some(entry) = self.find_mut(0xd, 0) {
            entry.ebx = layout.size(state.xcr0, false);
        }
        if let Some(entry) = self.find_mut(0xd, 1) {
            if LeafDs1Eax::new(entry.eax).has_any(LeafDs1Eax::XSAVES | LeafDs1Eax::XSAVEC) {
                let components = state.xcr0 | Xcr0::new(state.xss);
                entry.ebx = layout.size(components, true);
            }
        }
    }
}

fn bucket(function: u32) -> usize {
    // Leaves are small numbers in a few classes; the class is told by the top bits.
    ((function ^ (function >> 26)) as usize) % BUCKETS
}

fn is_amd(basic: &CpuidEntry) -> bool {
    let name = [basic.ebx, basic.edx, basic.ecx].map(u32::to_le_bytes);
    name == [*b"Auth", *b"enti", *b"cAMD"] || name == [*b"Hygo", *b"nGen", *b"uine"]
}
