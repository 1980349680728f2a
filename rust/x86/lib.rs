// SPDX-License-Identifier: GPL-2.0

//! The architecture layer of rkvm, built as an ordinary crate.
//!
//! The kernel module includes `mod.rs` as `mod x86`; this crate root does the same, so that the tests run on the host.

#![no_std]

#[path = "mod.rs"]
pub mod x86;

pub use x86::*;
