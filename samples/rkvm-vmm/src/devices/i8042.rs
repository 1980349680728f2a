// SPDX-License-Identifier: GPL-2.0

//! The keyboard controller's reset line, on vm-superio's `I8042Device`.
//!
//! There is no keyboard and no mouse. Status and data read as 0: "input buffer empty, output buffer
//! empty", which lets a guest send its reset command at once. A driver that asks the controller for
//! data waits for it in vain (Linux: half a second) and concludes that there is none.

use std::cell::Cell;
use std::convert::Infallible;

use vm_superio::I8042Device;
use vm_superio::Trigger;

use crate::outcome::Outcome;

/// Offset of the status and command register from the data register (ports 0x64 and 0x60).
const COMMAND_OFFSET: u8 = 4;

/// The wire that the controller pulls to reset the processor.
#[derive(Debug, Default)]
struct ResetLine(Cell<bool>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// The controller.
pub struct I8042 {
    device: I8042Device<ResetLine>,
}

impl I8042 {
    /// Returns a controller that nothing is plugged into.
    pub fn new() -> Self {
        Self {
            device: I8042Device::new(ResetLine::default()),
        }
    }

    /// Reads the data (`command` false) or the status register.
    pub fn read(&mut self, command: bool) -> u8 {
        self.device.read(if command { COMMAND_OFFSET } else { 0 })
    }

    /// Writes the data (`command` false) or the command register.
    pub fn write(&mut self, command: bool, value: u8) -> Option<Outcome> {
        let offset = if command { COMMAND_OFFSET } else { 0 };
        let Ok(()) = self.device.write(offset, value);
        self.device
            .reset_evt()
            .0
            .take()
            .then_some(Outcome::Reset("keyboard controller, port 0x64"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let mut i8042 = I8042::new();
        assert_eq!(i8042.read(true) & 0x03, 0, "ready for a command, no data");
        assert_eq!(i8042.write(true, 0xaa), None);
        assert_eq!(i8042.write(false, 0xfe), None);
        assert!(matches!(i8042.write(true, 0xfe), Some(Outcome::Reset(_))));
        assert_eq!(i8042.write(true, 0x20), None, "the line is a pulse");
    }
}
