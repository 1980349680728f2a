// SPDX-License-Identifier: GPL-2.0

//! The devices of the guest's machine, one a file.
//!
//! A device knows its own registers and nothing else: not where it sits on the bus, not the clock
//! (it is told the time), not the other devices. [`crate::board`] does the wiring.

pub mod debug_exit;
pub mod i8042;
pub mod ioapic;
pub mod pic;
pub mod pit;
pub mod power;
pub mod reset;
pub mod rtc;
pub mod serial;
