// SPDX-License-Identifier: GPL-2.0

//! ACPI's registers for sleep, in both forms that it knows: those of hardware-reduced ACPI (sleep
//! control and status), and the PM1 blocks. There is one sleep state, S5: off. Nothing here ever
//! interrupts or wakes, so no status bit is ever set.

use crate::outcome::Outcome;

/// `SLP_TYP` of S5.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// PM1a event block, two bytes of status and two of enable bits.
pub const PM1_EVENT_PORT: u16 = 0x600;
/// PM1a control block, two bytes.
pub const PM1_CONTROL_PORT: u16 = 0x604;
/// Sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x606;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x607;
/// Number of ports.
pub const PORTS: u16 = 8;

// Offsets from the first port.
const ENABLE: u8 = 2;
const ENABLE_HIGH: u8 = 3;
const CONTROL: u8 = 4;
const CONTROL_HIGH: u8 = 5;
const SLEEP: u8 = 6;

/// Bit 0 of PM1 control: ACPI, not a BIOS, gets the events; always so here.
const SCI_EN: u8 = 1;

/// The registers.
#[derive(Debug, Default)]
pub struct Power {
    enable: [u8; 2],
}

impl Power {
    /// Reads the register at `offset` from the first port.
    pub fn read(&self, offset: u8) -> u8 {
        match offset {
            ENABLE => self.enable[0],
            ENABLE_HIGH => self.enable[1],
            CONTROL => SCI_EN,
            _ => 0,
        }
    }

    /// Writes the register at `offset` from the first port.
    pub fn write(&mut self, offset: u8, value: u8) -> Option<Outcome> {
        // Both forms have the type in three bits below the one that starts it.
        let (shift, what) = match offset {
            ENABLE | ENABLE_HIGH => {
                self.enable[usize::from(offset - ENABLE)] = value;
                return None;
            }
            CONTROL_HIGH => (2, "ACPI, PM1 control"),
            SLEEP => (2, "ACPI, sleep control"),
            _ => return None,
        };
        let start = value & (1 << (shift + 3)) != 0;
        (start && (value >> shift) & 7 == SLEEP_TYPE_OFF).then_some(Outcome::PowerOff(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_is_off() {
        let mut power = Power::default();
        let at = |port: u16| (port - PM1_EVENT_PORT) as u8;
        assert_eq!(power.write(at(SLEEP_CONTROL_PORT), 5 << 2), None);
        assert_eq!(
            power.write(at(SLEEP_CONTROL_PORT), (1 << 5) | (3 << 2)),
            None
        );
        assert!(power
            .write(at(SLEEP_CONTROL_PORT), (1 << 5) | (5 << 2))
            .is_some());
        // SLP_EN is bit 13 of PM1 control, SLP_TYP bits 10 to 12.
        assert!(power
            .write(at(PM1_CONTROL_PORT) + 1, 0x20 | (5 << 2))
            .is_some());
        assert_eq!(power.read(at(PM1_CONTROL_PORT)), 1);
        assert_eq!(power.read(at(SLEEP_STATUS_PORT)), 0);
    }
}
