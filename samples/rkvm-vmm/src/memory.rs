// SPDX-License-Identifier: GPL-2.0

//! Guest physical memory: where RAM lies, where the boot structures lie in it, and the anonymous
//! mappings that back it.

use anyhow::Context;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Guest RAM, without dirty tracking.
pub type Memory = GuestMemoryMmap<()>;

/// Where the hole for memory-mapped devices (and KVM's own pages) begins: 3 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on after the hole: 4 GiB.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// GDT that a guest starts with in protected and long mode.
pub const GDT_ADDR: u64 = 0x500;
/// `struct boot_params`, the "zero page" of the Linux boot protocol.
pub const BOOT_PARAMS_ADDR: u64 = 0x7000;
/// Top of the stack that a guest starts with.
pub const STACK_TOP: u64 = 0x8ff0;
/// Page tables: PML4, PDPT, and four page directories that map 4 GiB one to one.
pub const PML4_ADDR: u64 = 0x9000;
/// First byte after the boot tables.
pub const TABLES_END: u64 = 0xf000;
/// Kernel command line.
pub const CMDLINE_ADDR: u64 = 0x20000;
/// Most bytes that the command line can have, its NUL included.
pub const CMDLINE_MAX: usize = 0x10000;
/// ACPI tables, where a PC's BIOS has them.
pub const ACPI_ADDR: u64 = 0xe_0000;
/// End of conventional memory: from here to 1 MiB a PC has its BIOS areas.
pub const LOW_END: u64 = 0x9fc00;
/// Start of RAM above the first MiB, where kernels are loaded.
pub const HIGH_START: u64 = 0x10_0000;

/// KVM's three pages for a TSS when the processor cannot run real mode itself (VMX only).
pub const TSS_ADDR: u64 = 0xfffb_d000;
/// KVM's page for an identity-mapping page table, same use.
pub const IDENTITY_MAP_ADDR: u64 = 0xfffb_c000;

/// Splits `size` bytes of RAM around the hole.
pub fn layout(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(HOLE_END), (size - low) as usize));
    }
    ranges
}

/// Maps `size` bytes of anonymous memory as guest RAM.
///
/// # Errors
/// The host has not that much memory or address space to give.
pub fn allocate(size: u64) -> anyhow::Result<Memory> {
    Memory::from_ranges(&layout(size)).with_context(|| {
        format!(
            "cannot map {} MiB for the guest; try a smaller --memory",
            size >> 20
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_range() {
        assert_eq!(layout(1 << 20), [(GuestAddress(0), 1 << 20)]);
        assert_eq!(layout(HOLE_START), [(GuestAddress(0), HOLE_START as usize)]);
    }

    #[test]
    fn large_memory_goes_around_the_hole() {
        assert_eq!(
            layout(HOLE_START + 4096),
            [
                (GuestAddress(0), HOLE_START as usize),
                (GuestAddress(HOLE_END), 4096)
            ]
        );
    }

    #[test]
    fn kvm_pages_lie_in_the_hole() {
        for page in [TSS_ADDR, TSS_ADDR + 0x2000, IDENTITY_MAP_ADDR] {
            assert!((HOLE_START..HOLE_END).contains(&page));
        }
    }
}
