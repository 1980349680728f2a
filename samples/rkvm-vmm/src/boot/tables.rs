// SPDX-License-Identifier: GPL-2.0

//! The GDT and the page tables that a guest starts on when it does not start in real mode.

use kvm_bindings::kvm_segment;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use crate::memory::Memory;
use crate::memory::GDT_ADDR;
use crate::memory::PML4_ADDR;

/// Entries of the boot GDT. The Linux boot protocols fix 0x10 and 0x18 (`__BOOT_CS`, `__BOOT_DS`), of
/// which the first is as wide as the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selector {
    /// 32-bit code.
    Code32,
    /// 32-bit code where a 32-bit Linux has it.
    BootCode32,
    /// 64-bit code.
    Code64,
    /// Data.
    Data,
}

/// Descriptor fields of a flat segment (SDM volume 3, "Segment Descriptors").
struct Flat {
    /// Type and accessed bit.
    kind: u8,
    long: bool,
    default_32: bool,
}

impl Selector {
    /// Returns the selector's value: where in the GDT the descriptor stands.
    fn value(self) -> u16 {
        match self {
            Selector::Code32 => 0x08,
            Selector::BootCode32 | Selector::Code64 => 0x10,
            Selector::Data => 0x18,
        }
    }

    fn flat(self) -> Flat {
        // Execute/read or read/write, accessed already: the processor need not write to the GDT.
        match self {
            Selector::Code32 | Selector::BootCode32 => Flat {
                kind: 0xb,
                long: false,
                default_32: true,
            },
            Selector::Code64 => Flat {
                kind: 0xb,
                long: true,
                default_32: false,
            },
            Selector::Data => Flat {
                kind: 0x3,
                long: false,
                default_32: true,
            },
        }
    }

    /// Returns the segment register's contents after a load of this selector.
    pub fn segment(self) -> kvm_segment {
        let flat = self.flat();
        kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: self.value(),
            type_: flat.kind,
            present: 1,
            dpl: 0,
            db: flat.default_32.into(),
            s: 1,
            l: flat.long.into(),
            g: 1,
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    }

    /// Returns the descriptor as it stands in the GDT.
    fn descriptor(self) -> u64 {
        let flat = self.flat();
        // Limit 0xfffff in pages, base 0, present, DPL 0, code or data.
        let access = 0x90 | u64::from(flat.kind);
        let flags = 0x8 | (u64::from(flat.default_32) << 2) | (u64::from(flat.long) << 1);
        0xffff | (access << 40) | (0xf << 48) | (flags << 52)
    }
}

/// Size of the boot GDT in bytes.
pub const GDT_SIZE: u16 = 4 * 8;

/// Page-table entry: present and writable.
const PTE_TABLE: u64 = 0x3;
/// Page-directory entry that maps 2 MiB: and a page.
const PDE_LARGE: u64 = 0x83;
const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 0x20_0000;
/// Page directories; each maps 1 GiB.
const DIRECTORIES: u64 = 4;

/// Writes the boot GDT, in which `code` has the place of `__BOOT_CS` if that is its place, and 64-bit
/// code otherwise.
///
/// # Errors
/// Guest memory does not reach that far.
pub fn write_gdt(memory: &Memory, code: Selector) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_obj(0u64, GuestAddress(GDT_ADDR))?;
    // The last that is written to a place stays.
    for selector in [Selector::Code32, Selector::Data, Selector::Code64, code] {
        memory.write_obj(
            selector.descriptor(),
            GuestAddress(GDT_ADDR + u64::from(selector.value())),
        )?;
    }
    Ok(())
}

/// Writes page tables that map the first 4 GiB one to one.
///
/// # Errors
/// Guest memory does not reach that far.
pub fn write_page_tables(memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
    let pdpt = PML4_ADDR + PAGE;
    let directories = pdpt + PAGE;
    memory.write_obj(pdpt | PTE_TABLE, GuestAddress(PML4_ADDR))?;
    for i in 0..DIRECTORIES {
        let directory = directories + i * PAGE;
        memory.write_obj(directory | PTE_TABLE, GuestAddress(pdpt + 8 * i))?;
        for j in 0..512 {
            let frame = (i * 512 + j) * LARGE_PAGE;
            memory.write_obj(frame | PDE_LARGE, GuestAddress(directory + 8 * j))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(Selector::Code32.descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(Selector::Code64.descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(Selector::Data.descriptor(), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn boot_code_is_as_wide_as_the_protocol() {
        let memory = memory::allocate(1 << 20).unwrap();
        let entry = |selector| {
            memory
                .read_obj::<u64>(GuestAddress(GDT_ADDR + selector))
                .unwrap()
        };
        for (code, expected) in [
            (Selector::Code32, Selector::Code64),
            (Selector::Code64, Selector::Code64),
            (Selector::BootCode32, Selector::Code32),
        ] {
            write_gdt(&memory, code).unwrap();
            assert_eq!(entry(0), 0);
            assert_eq!(entry(0x08), Selector::Code32.descriptor());
            assert_eq!(entry(0x10), expected.descriptor());
            assert_eq!(entry(0x18), Selector::Data.descriptor());
        }
        let segment = Selector::BootCode32.segment();
        assert_eq!((segment.selector, segment.db, segment.l), (0x10, 1, 0));
    }

    #[test]
    fn tables_map_one_to_one_and_stay_in_place() {
        let memory = memory::allocate(1 << 20).unwrap();
        write_page_tables(&memory).unwrap();
        let entry = |table: u64, index: u64| {
            memory
                .read_obj::<u64>(GuestAddress(table + 8 * index))
                .unwrap()
        };
        for address in [0, 0x20_0000, 0x1234_5678, 0xc000_0000, 0xffff_ffff_u64] {
            let pdpt = entry(PML4_ADDR, address >> 39) & !0xfff;
            let directory = entry(pdpt, (address >> 30) & 511) & !0xfff;
            let leaf = entry(directory, (address >> 21) & 511);
            assert_eq!(leaf & 0xfff, PDE_LARGE);
            assert_eq!(leaf & !0xfff, address & !(LARGE_PAGE - 1));
        }
        assert_eq!(PML4_ADDR + (2 + DIRECTORIES) * PAGE, memory::TABLES_END);
    }
}
