// SPDX-License-Identifier: GPL-2.0

//! The reset lines beside the keyboard controller's: port 0x92 (PS/2 "fast" A20 and reset) and the
//! chipset's reset control register at 0xcf9.

use crate::outcome::Outcome;

/// Port 0x92: bit 0 pulses the processor's reset, bit 1 gates A20.
#[derive(Debug)]
pub struct SystemControlA {
    value: u8,
}

impl SystemControlA {
    /// Returns the register as after power-on: A20 is open, for there is no gate.
    pub fn new() -> Self {
        Self { value: 0x02 }
    }

    /// Reads the register.
    pub fn read(&self) -> u8 {
        self.value
    }

    /// Writes the register; setting bit 0 resets.
    pub fn write(&mut self, value: u8) -> Option<Outcome> {
        // The A20 bit is kept for who reads it back; address line 20 itself is always connected.
        self.value = value & !1;
        (value & 1 != 0).then_some(Outcome::Reset("port 0x92"))
    }
}

/// Port 0xcf9: a rising edge of bit 2 resets, bits 1 and 3 say how hard.
#[derive(Debug, Default)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// Reads the register.
    pub fn read(&self) -> u8 {
        self.value
    }

    /// Writes the register.
    pub fn write(&mut self, value: u8) -> Option<Outcome> {
        let rising = value & !self.value & 0x04 != 0;
        self.value = value & 0x0e;
        rising.then_some(Outcome::Reset("port 0xcf9"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_reset() {
        let mut port = SystemControlA::new();
        assert_eq!(port.write(0x00), None);
        assert_eq!(port.read(), 0x00);
        assert_eq!(port.write(0x03), Some(Outcome::Reset("port 0x92")));
        assert_eq!(port.read(), 0x02);
    }

    #[test]
    fn chipset_reset_wants_an_edge() {
        let mut port = ResetControl::default();
        assert_eq!(port.write(0x02), None);
        assert_eq!(port.read(), 0x02);
        assert_eq!(port.write(0x06), Some(Outcome::Reset("port 0xcf9")));
        assert_eq!(port.write(0x06), None);
    }
}
