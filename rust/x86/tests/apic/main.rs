// SPDX-License-Identifier: GPL-2.0

//! The local APIC.

mod board;
mod messages;
mod modes;
mod priorities;
mod properties;
mod registers;
mod state;
mod timer;
