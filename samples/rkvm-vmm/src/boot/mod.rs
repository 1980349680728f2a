// SPDX-License-Identifier: GPL-2.0

//! What is in guest memory when the guest starts, and where it starts.

pub mod acpi;
mod aml;
mod flat;
mod linux;
mod tables;

use std::fs::File;
use std::path::Path;

use anyhow::Context;

use crate::cli::Image;
use crate::memory::Memory;

pub use tables::Selector;
pub use tables::GDT_SIZE;

/// How the vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode on the boot GDT and page tables.
    Long {
        /// First instruction.
        rip: u64,
        /// Linux wants the address of its `boot_params` here.
        rsi: u64,
    },
    /// In 32-bit protected mode on the boot GDT, no paging.
    Protected {
        /// Code segment.
        code: Selector,
        /// First instruction.
        eip: u32,
        /// Linux wants the address of its `boot_params` here.
        esi: u32,
    },
    /// In real mode.
    Real {
        /// CS; its base is 16 times that. The other segments are 0.
        cs: u16,
        /// First instruction in CS.
        ip: u16,
    },
}

/// Loads `image` into guest memory, and ACPI tables if there is something for them to tell.
///
/// # Errors
/// Whatever is wrong with the files, or with the size of the memory.
pub fn load(
    image: &Image,
    memory: &Memory,
    machine: Option<&acpi::Machine>,
) -> anyhow::Result<Entry> {
    match image {
        Image::Linux {
            kernel,
            initrd,
            cmdline,
            protocol,
        } => {
            let initrd = initrd.as_deref();
            linux::load(memory, kernel, initrd, cmdline, *protocol, machine)
                .with_context(|| format!("cannot boot {}", kernel.display()))
        }
        Image::Flat {
            file,
            mode,
            load,
            entry,
        } => flat::load(memory, file, *mode, *load, *entry)
            .with_context(|| format!("cannot run {}", file.display())),
    }
}

/// Opens a file and returns its size too.
fn open(path: &Path) -> anyhow::Result<(File, u64)> {
    let describe = || format!("cannot open {}", path.display());
    let file = File::open(path).with_context(describe)?;
    let metadata = file.metadata().with_context(describe)?;
    anyhow::ensure!(metadata.is_file(), "{} is not a file", path.display());
    Ok((file, metadata.len()))
}
