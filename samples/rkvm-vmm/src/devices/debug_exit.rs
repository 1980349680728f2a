// SPDX-License-Identifier: GPL-2.0

//! The debug-exit port: a guest ends the VMM, with a status, by one OUT instruction.
//!
//! The idea is that of QEMU's `isa-debug-exit`, the value is not: the byte written is the exit status
//! itself, so that 0 can mean success. Statuses above [`crate::outcome::STATUS_GUEST_MAX`] belong to the VMM.

use crate::outcome::Outcome;

/// Returns how the guest ends that wrote `value` to the port.
pub fn write(value: u8) -> Outcome {
    Outcome::DebugExit(value)
}

/// Reading tells a guest that the port is there: an empty port reads 0xff.
pub fn read() -> u8 {
    0
}
