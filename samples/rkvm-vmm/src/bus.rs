// SPDX-License-Identifier: GPL-2.0

//! The maps of the machine: which port, and which page without memory, belongs to what.

use crate::devices::ioapic;
use crate::devices::pic::Register;
use crate::devices::pic::Which;
use crate::devices::power;

/// What answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Interrupt controllers.
    Pic(Register),
    /// Interval timer, register number.
    Pit(u8),
    /// System control port B (0x61): timer gate, speaker.
    PortB,
    /// Keyboard controller; `true` is the command and status port.
    I8042(bool),
    /// Clock: register number.
    RtcIndex,
    /// Clock: register contents.
    RtcData,
    /// System control port A (0x92): fast reset.
    PortA,
    /// First serial port, register number.
    Serial(u8),
    /// Debug exit.
    DebugExit,
    /// Marks: the vCPU's thread takes them.
    Mark,
    /// ACPI's registers for sleep, number from the first.
    Power(u8),
    /// Reset control register (0xcf9).
    ResetControl,
    /// Ports that software writes for the delay or for a display of progress; reads as nothing.
    Post,
    /// Nothing: reads all ones, writes go nowhere. So do PCI's configuration ports: no PCI here.
    Empty,
}

/// Interrupt of the interval timer.
pub const IRQ_PIT: u8 = 0;
/// Interrupt of the first serial port.
pub const IRQ_SERIAL: u8 = 4;

/// First port of the first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Reset control register.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// First of the virtio devices' pages.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Size of a virtio device's page.
pub const VIRTIO_SIZE: u64 = 0x1000;
/// Interrupt of the first virtio device: the first that no ISA device has.
pub const VIRTIO_GSI: u32 = 16;
/// How many virtio devices there can be: as many as the I/O APIC has pins for.
pub const VIRTIO_MAX: usize = ioapic::PINS - VIRTIO_GSI as usize;

/// Port that ends the VMM.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Port whose writes are marks in the kernel's counts.
pub const MARK_PORT: u16 = 0xf5;

/// Returns what answers at `port`.
pub fn decode(port: u16) -> Target {
    match port {
        0x20 => Target::Pic(Register::Command(Which::Master)),
        0x21 => Target::Pic(Register::Data(Which::Master)),
        0x40..=0x43 => Target::Pit((port - 0x40) as u8),
        0x60 => Target::I8042(false),
        0x61 => Target::PortB,
        0x64 => Target::I8042(true),
        0x70 => Target::RtcIndex,
        0x71 => Target::RtcData,
        0x80 | 0xed => Target::Post,
        0x92 => Target::PortA,
        0xa0 => Target::Pic(Register::Command(Which::Slave)),
        0xa1 => Target::Pic(Register::Data(Which::Slave)),
        DEBUG_EXIT_PORT => Target::DebugExit,
        MARK_PORT => Target::Mark,
        SERIAL_PORT..=0x3ff => Target::Serial((port - SERIAL_PORT) as u8),
        0x4d0 => Target::Pic(Register::Elcr(Which::Master)),
        0x4d1 => Target::Pic(Register::Elcr(Which::Slave)),
        power::PM1_EVENT_PORT.. if port - power::PM1_EVENT_PORT < power::PORTS => {
            Target::Power((port - power::PM1_EVENT_PORT) as u8)
        }
        RESET_CONTROL_PORT => Target::ResetControl,
        _ => Target::Empty,
    }
}

/// Tells whether an access of `size` bytes at `port` is one to PCI's configuration address or data
/// register, and not to the byte-wide registers that share those ports.
pub fn is_pci_config(port: u16, size: usize) -> bool {
    size > 1 && (0xcf8..=0xcff).contains(&port)
}

/// Names a port for the statistics.
pub fn name(port: u16) -> &'static str {
    match decode(port) {
        Target::Pic(_) => "8259 PIC",
        Target::Pit(_) => "8254 PIT",
        Target::PortB => "system control B",
        Target::I8042(_) => "i8042",
        Target::RtcIndex | Target::RtcData => "RTC/CMOS",
        Target::PortA => "system control A",
        Target::Serial(_) => "16550 serial",
        Target::DebugExit => "debug exit",
        Target::Mark => "mark",
        Target::Power(_) => "ACPI sleep",
        Target::ResetControl => "reset control",
        Target::Post => "POST/delay",
        Target::Empty if (0xcf8..=0xcff).contains(&port) => "PCI configuration (empty)",
        Target::Empty => "empty",
    }
}

/// What answers at an address where there is no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// I/O APIC, offset in its page.
    IoApic(u64),
    /// Virtio device, number and offset in its page.
    Virtio(usize, u64),
    /// Nothing.
    Empty,
}

/// Returns what answers at `address`.
pub fn decode_address(address: u64) -> Page {
    let virtio_end = VIRTIO_BASE + VIRTIO_MAX as u64 * VIRTIO_SIZE;
    match address {
        VIRTIO_BASE.. if address < virtio_end => {
            let offset = address - VIRTIO_BASE;
            Page::Virtio((offset / VIRTIO_SIZE) as usize, offset % VIRTIO_SIZE)
        }
        ioapic::BASE.. if address - ioapic::BASE < 0x1000 => Page::IoApic(address - ioapic::BASE),
        _ => Page::Empty,
    }
}

/// Names an address for the statistics.
pub fn address_name(address: u64) -> &'static str {
    match decode_address(address) {
        Page::IoApic(_) => "I/O APIC",
        Page::Virtio(..) => "virtio device",
        Page::Empty => "without memory",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_where_a_pc_has_them() {
        assert_eq!(decode(0x3fd), Target::Serial(5));
        assert_eq!(decode(0x43), Target::Pit(3));
        assert_eq!(decode(0x64), Target::I8042(true));
        assert_eq!(decode(0x62), Target::Empty);
        assert_eq!(decode(0xcf8), Target::Empty);
        assert_eq!(decode(0xcf9), Target::ResetControl);
        assert_eq!(decode(0x607), Target::Power(7));
        assert_eq!(decode(0x608), Target::Empty);
    }

    #[test]
    fn pages_have_their_places() {
        assert_eq!(decode_address(0xfec0_0010), Page::IoApic(0x10));
        assert_eq!(decode_address(0xd000_1050), Page::Virtio(1, 0x50));
        assert_eq!(decode_address(0xd000_8000), Page::Empty);
        assert_eq!(decode_address(0xfee0_0000), Page::Empty);
    }

    #[test]
    fn wide_accesses_are_pci_s() {
        assert!(is_pci_config(0xcf8, 4));
        assert!(is_pci_config(0xcfe, 2));
        assert!(!is_pci_config(0xcf9, 1));
        assert!(!is_pci_config(0x3f8, 4));
    }
}
