// SPDX-License-Identifier: GPL-2.0

//! Flat binaries: the file's bytes at one address, and a vCPU in the mode asked for.

use std::path::Path;

use anyhow::bail;
use anyhow::Context;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemory;

use super::tables;
use super::Entry;
use super::Selector;
use crate::cli::Mode;
use crate::memory::Memory;
use crate::memory::GDT_ADDR;
use crate::memory::TABLES_END;

/// Loads `path` at `load` and returns how to start it at `entry` in `mode`.
///
/// # Errors
/// The file cannot be read, does not fit, or would lie on the boot tables.
pub fn load(
    memory: &Memory,
    path: &Path,
    mode: Mode,
    load: u64,
    entry: u64,
) -> anyhow::Result<Entry> {
    let (mut file, size) = super::open(path)?;
    let size = usize::try_from(size)?;
    let end = load.saturating_add(size as u64);
    if !memory.check_range(GuestAddress(load), size) {
        bail!(
            "{load:#x} to {end:#x} is not guest memory; use another --load-addr or more --memory"
        );
    }
    if mode != Mode::Real {
        if load < TABLES_END && end > GDT_ADDR {
            bail!(
                "{load:#x} to {end:#x} overlaps the boot tables at {GDT_ADDR:#x} to {TABLES_END:#x}"
            );
        }
        tables::write_gdt(memory, Selector::Code32)?;
    }
    if mode == Mode::Long {
        tables::write_page_tables(memory)?;
    }
    memory
        .read_exact_volatile_from(GuestAddress(load), &mut file, size)
        .context("cannot read it into guest memory")?;
    Ok(match mode {
        Mode::Long => Entry::Long { rip: entry, rsi: 0 },
        Mode::Protected => Entry::Protected {
            code: Selector::Code32,
            eip: u32::try_from(entry)?,
            esi: 0,
        },
        Mode::Real => real_entry(entry),
    })
}

/// Splits an address below 1 MiB into CS and IP; CS is 0 where that is possible.
fn real_entry(entry: u64) -> Entry {
    let cs = if entry < 0x10000 {
        0
    } else {
        (entry >> 4) & 0xf000
    };
    Entry::Real {
        cs: cs as u16,
        ip: (entry - (cs << 4)) as u16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn file(name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("rkvm-vmm-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn real_addresses() {
        assert_eq!(real_entry(0x7c00), Entry::Real { cs: 0, ip: 0x7c00 });
        assert_eq!(
            real_entry(0x12345),
            Entry::Real {
                cs: 0x1000,
                ip: 0x2345
            }
        );
        assert_eq!(
            real_entry(0xfffff),
            Entry::Real {
                cs: 0xf000,
                ip: 0xffff
            }
        );
    }

    #[test]
    fn bytes_land_where_asked() {
        let memory = memory::allocate(1 << 20).unwrap();
        let path = file("flat", &[0xf4, 0x90]);
        let entry = load(&memory, &path, Mode::Long, 0x10000, 0x10001).unwrap();
        assert_eq!(
            entry,
            Entry::Long {
                rip: 0x10001,
                rsi: 0
            }
        );
        let code: [u8; 2] = memory.read_obj(GuestAddress(0x10000)).unwrap();
        assert_eq!(code, [0xf4, 0x90]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn bad_places_are_refused() {
        let memory = memory::allocate(1 << 20).unwrap();
        let path = file("bad", &[0; 0x100]);
        let fails = |mode, at| load(&memory, &path, mode, at, at).unwrap_err().to_string();
        assert!(fails(Mode::Long, 0x8000).contains("boot tables"));
        assert!(fails(Mode::Protected, 0x4ff).contains("boot tables"));
        assert!(fails(Mode::Real, 0xfffff).contains("not guest memory"));
        assert!(load(&memory, &path, Mode::Real, 0x8000, 0x8000).is_ok());
        std::fs::remove_file(path).unwrap();
    }
}
