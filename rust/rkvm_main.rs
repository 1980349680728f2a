// SPDX-License-Identifier: GPL-2.0

//! rkvm: the KVM core.

#![crate_name = "rkvm"]

use kernel::prelude::*;

mod bindings;
mod linux;
mod mem;
mod mmu;
mod tlb;

module! {
    type: RkvmModule,
    name: "rkvm",
    authors: ["The rkvm developers"],
    description: "Kernel-based virtual machines, in Rust",
    license: "GPL v2",
}

struct RkvmModule {}

impl kernel::Module for RkvmModule {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Self {})
    }
}
