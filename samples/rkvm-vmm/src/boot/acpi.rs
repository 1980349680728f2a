// SPDX-License-Identifier: GPL-2.0

//! ACPI tables: where the processors, the I/O APIC, the serial port and the virtio devices are, and
//! how the machine is switched off and reset.
//!
//! With an I/O APIC in userspace there is neither PIC nor PIT, and ACPI is of the hardware-reduced
//! kind, which tells Linux not to look for them. With all controllers in the kernel it is a PC's.

use anyhow::ensure;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use super::aml;
use crate::bus;
use crate::devices::ioapic;
use crate::devices::power;
use crate::memory::Memory;
use crate::memory::ACPI_ADDR;
use crate::memory::HIGH_START;

const OEM: [u8; 6] = *b"RKVM  ";
const OEM_TABLE: [u8; 8] = *b"RKVM-VMM";
const CREATOR: [u8; 4] = *b"RKVM";

/// Length of the head that every table but the RSDP has.
const HEAD: usize = 36;

/// FADT of ACPI 6.5: its length, and where its fields are.
mod fadt {
    pub const REVISION: u8 = 6;
    pub const LENGTH: usize = 276;
    pub const SCI_INTERRUPT: usize = 46;
    pub const PM1A_EVENT_BLOCK: usize = 56;
    pub const PM1A_CONTROL_BLOCK: usize = 64;
    pub const PM1_EVENT_LENGTH: usize = 88;
    pub const PM1_CONTROL_LENGTH: usize = 89;
    pub const C2_LATENCY: usize = 96;
    pub const C3_LATENCY: usize = 98;
    pub const BOOT_ARCHITECTURE: usize = 109;
    pub const FLAGS: usize = 112;
    pub const RESET_REGISTER: usize = 116;
    pub const RESET_VALUE: usize = 128;
    pub const MINOR_REVISION: usize = 131;
    pub const X_DSDT: usize = 140;
    pub const X_PM1A_EVENT_BLOCK: usize = 148;
    pub const X_PM1A_CONTROL_BLOCK: usize = 172;
    pub const SLEEP_CONTROL: usize = 244;
    pub const SLEEP_STATUS: usize = 256;
}
// Flags of the FADT.
const WBINVD: u32 = 1 << 0;
const C1: u32 = 1 << 2;
/// No such button among the fixed registers, nor an alarm.
const NO_POWER_BUTTON: u32 = 1 << 4;
const NO_SLEEP_BUTTON: u32 = 1 << 5;
const NO_FIXED_RTC: u32 = 1 << 6;
const RESET_REGISTER: u32 = 1 << 10;
const HARDWARE_REDUCED: u32 = 1 << 20;
/// More microseconds than C2 and C3 may take: there is neither.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// Address space of a register: I/O ports.
const SYSTEM_IO: u8 = 1;

/// Where the local APICs are.
const LOCAL_APIC: u32 = 0xfee0_0000;

// FADT, IA-PC boot architecture: there are devices on ports, there is no VGA. No i8042 that anyone
// need look for either (bit 1), but it takes the reset command.
const LEGACY_DEVICES: u16 = 1 << 0;
const NO_VGA: u16 = 1 << 2;
/// Interrupt of ACPI's own events, of which there are none.
const SCI: u16 = 9;
/// Written to the reset register: bit 2 resets.
const RESET_VALUE: u8 = 0x06;

/// A virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioDevice {
    /// Its page.
    pub base: u32,
    /// Its interrupt, a pin of the I/O APIC.
    pub gsi: u32,
    /// Level-triggered, else edge-triggered.
    pub level: bool,
}

/// What the tables say.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Number of processors; APIC IDs count from 0.
    pub cpus: u8,
    /// Neither PIC nor PIT nor the event registers of a PC.
    pub hardware_reduced: bool,
    /// Devices that are not found otherwise.
    pub virtio: Vec<VirtioDevice>,
}

/// Writes the tables; returns the address of the first, the RSDP, which is where a BIOS has it too.
///
/// # Errors
/// They do not fit, or guest memory does not reach that far.
pub fn write(memory: &Memory, machine: &Machine) -> anyhow::Result<u64> {
    let mut at = ACPI_ADDR + 64;
    let mut put = |table: &[u8]| -> anyhow::Result<u64> {
        let here = at;
        at = (at + table.len() as u64).next_multiple_of(16);
        ensure!(at <= HIGH_START, "the ACPI tables do not fit below 1 MiB");
        memory.write_slice(table, GuestAddress(here))?;
        Ok(here)
    };
    let dsdt = put(&table(b"DSDT", 2, &dsdt(machine)))?;
    let fadt = put(&fadt_table(dsdt, machine.hardware_reduced))?;
    let madt = put(&table(b"APIC", 5, &madt(machine.cpus)))?;
    let entries = [fadt.to_le_bytes(), madt.to_le_bytes()].concat();
    let xsdt = put(&table(b"XSDT", 1, &entries))?;
    memory.write_slice(&rsdp(xsdt), GuestAddress(ACPI_ADDR))?;
    Ok(ACPI_ADDR)
}

/// Makes the bytes' sum 0 by the one at `at`.
fn set_checksum(bytes: &mut [u8], at: usize) {
    bytes[at] = 0;
    bytes[at] = bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg();
}

fn put(table: &mut [u8], at: usize, bytes: &[u8]) {
    table[at..at + bytes.len()].copy_from_slice(bytes);
}

fn rsdp(xsdt: u64) -> [u8; 36] {
    let mut rsdp = [0; 36];
    put(&mut rsdp, 0, b"RSD PTR ");
    put(&mut rsdp, 9, &OEM);
    // ACPI 2.0 and later: length, XSDT, and a second checksum, of all.
    rsdp[15] = 2;
    put(&mut rsdp, 20, &36u32.to_le_bytes());
    put(&mut rsdp, 24, &xsdt.to_le_bytes());
    set_checksum(&mut rsdp[..20], 8);
    set_checksum(&mut rsdp, 32);
    rsdp
}

/// A table with its head.
fn table(signature: &[u8; 4], revision: u8, content: &[u8]) -> Vec<u8> {
    let mut table = Vec::with_capacity(HEAD + content.len());
    table.extend(signature);
    table.extend(((HEAD + content.len()) as u32).to_le_bytes());
    table.extend([revision, 0]);
    table.extend(OEM);
    table.extend(OEM_TABLE);
    table.extend(1u32.to_le_bytes());
    table.extend(CREATOR);
    table.extend(1u32.to_le_bytes());
    table.extend(content);
    set_checksum(&mut table, 9);
    table
}

/// A register of `bytes` bytes at an I/O port, as the FADT describes it.
fn register(port: u16, bytes: u8) -> [u8; 12] {
    let mut register = [0; 12];
    register[0] = SYSTEM_IO;
    register[1] = 8 * bytes;
    // 1 is an access by bytes, 2 by words, of which a longer block has several.
    register[3] = bytes.min(2);
    put(&mut register, 4, &u64::from(port).to_le_bytes());
    register
}

fn fadt_table(dsdt: u64, hardware_reduced: bool) -> Vec<u8> {
    let mut fadt = table(b"FACP", fadt::REVISION, &[0; fadt::LENGTH - HEAD]);
    let mut flags = WBINVD | RESET_REGISTER | NO_POWER_BUTTON | NO_SLEEP_BUTTON;
    let mut set = |at: usize, bytes: &[u8]| put(&mut fadt, at, bytes);
    set(fadt::MINOR_REVISION, &[5]);
    set(fadt::X_DSDT, &dsdt.to_le_bytes());
    set(
        fadt::BOOT_ARCHITECTURE,
        &(LEGACY_DEVICES | NO_VGA).to_le_bytes(),
    );
    set(fadt::RESET_REGISTER, &register(bus::RESET_CONTROL_PORT, 1));
    set(fadt::RESET_VALUE, &[RESET_VALUE]);
    if hardware_reduced {
        flags |= HARDWARE_REDUCED;
        set(fadt::SLEEP_CONTROL, &register(power::SLEEP_CONTROL_PORT, 1));
        set(fadt::SLEEP_STATUS, &register(power::SLEEP_STATUS_PORT, 1));
    } else {
        flags |= C1 | NO_FIXED_RTC;
        set(fadt::SCI_INTERRUPT, &SCI.to_le_bytes());
        for (port, length, old, length_at, new) in [
            (
                power::PM1_EVENT_PORT,
                4,
                fadt::PM1A_EVENT_BLOCK,
                fadt::PM1_EVENT_LENGTH,
                fadt::X_PM1A_EVENT_BLOCK,
            ),
            (
                power::PM1_CONTROL_PORT,
                2,
                fadt::PM1A_CONTROL_BLOCK,
                fadt::PM1_CONTROL_LENGTH,
                fadt::X_PM1A_CONTROL_BLOCK,
            ),
        ] {
            set(old, &u32::from(port).to_le_bytes());
            set(length_at, &[length]);
            set(new, &register(port, length));
        }
        set(fadt::C2_LATENCY, &NO_C2.to_le_bytes());
        set(fadt::C3_LATENCY, &NO_C3.to_le_bytes());
    }
    set(fadt::FLAGS, &flags.to_le_bytes());
    set_checksum(&mut fadt, 9);
    fadt
}

/// The APICs.
fn madt(cpus: u8) -> Vec<u8> {
    let mut madt = LOCAL_APIC.to_le_bytes().to_vec();
    // No flags: whether there are PICs too, the guest finds out.
    madt.extend([0; 4]);
    for id in 0..cpus {
        // Type 0, 8 bytes: a processor, its local APIC, enabled.
        madt.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    // Type 1, 12 bytes: an I/O APIC, ID 0, its address, its first interrupt.
    madt.extend([1, 12, 0, 0]);
    madt.extend((ioapic::BASE as u32).to_le_bytes());
    madt.extend(0u32.to_le_bytes());
    madt
}

fn dsdt(machine: &Machine) -> Vec<u8> {
    let off = aml::number(power::SLEEP_TYPE_OFF.into());
    let zero = aml::number(0);
    let s5 = aml::name(
        b"_S5_",
        &aml::package(&[off.clone(), off, zero.clone(), zero]),
    );
    let serial = aml::device(
        b"COM1",
        &[
            aml::name(b"_HID", &aml::pnp_id(b"PNP", 0x0501)),
            aml::name(b"_UID", &aml::number(0)),
            aml::name(
                b"_CRS",
                &aml::resources(&[
                    aml::io(bus::SERIAL_PORT, 8),
                    aml::interrupt(bus::IRQ_SERIAL.into(), false),
                ]),
            ),
        ],
    );
    let virtio = machine.virtio.iter().zip(0u8..).map(|(device, i)| {
        aml::device(
            &[b'V', b'I', b'0' + i / 10, b'0' + i % 10],
            &[
                aml::name(b"_HID", &aml::string("LNRO0005")),
                aml::name(b"_UID", &aml::number(i.into())),
                // It sees what is in the processors' caches.
                aml::name(b"_CCA", &aml::number(1)),
                aml::name(
                    b"_CRS",
                    &aml::resources(&[
                        aml::memory(device.base, bus::VIRTIO_SIZE as u32),
                        aml::interrupt(device.gsi, device.level),
                    ]),
                ),
            ],
        )
    });
    let devices: Vec<_> = std::iter::once(serial).chain(virtio).collect();
    [s5, aml::scope(b"_SB_", &devices)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn written(machine: &Machine) -> Vec<u8> {
        let memory = memory::allocate(1 << 20).unwrap();
        let at = write(&memory, machine).unwrap();
        assert_eq!(at, ACPI_ADDR);
        let mut bytes = vec![0; (HIGH_START - ACPI_ADDR) as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(ACPI_ADDR))
            .unwrap();
        bytes
    }

    fn machine(hardware_reduced: bool) -> Machine {
        Machine {
            cpus: 3,
            hardware_reduced,
            virtio: vec![VirtioDevice {
                base: 0xd000_0000,
                gsi: 16,
                level: false,
            }],
        }
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Follows the tables from the RSDP; returns them by their signatures.
    fn tables(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let table = |at: u64| {
            let at = (at - ACPI_ADDR) as usize;
            let size = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
            let table = bytes[at..at + size].to_vec();
            let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "checksum");
            (String::from_utf8(table[..4].to_vec()).unwrap(), table)
        };
        let mut found = vec![table(long(bytes, 24))];
        let entries: Vec<u64> = found[0].1[36..]
            .chunks(8)
            .map(|entry| long(entry, 0))
            .collect();
        found.extend(entries.into_iter().map(table));
        let dsdt = long(&found[1].1, 140);
        found.push(table(dsdt));
        found
    }

    #[test]
    fn tables_are_found_and_whole() {
        for reduced in [false, true] {
            let tables = tables(&written(&machine(reduced)));
            let names: Vec<_> = tables.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, ["XSDT", "FACP", "APIC", "DSDT"]);
            let flags = u32::from_le_bytes(tables[1].1[112..116].try_into().unwrap());
            assert_eq!(flags & (1 << 20) != 0, reduced);
            // Three local APICs of 8 bytes, an I/O APIC of 12.
            assert_eq!(tables[2].1.len(), 44 + 3 * 8 + 12);
            let dsdt = &tables[3].1;
            assert!(dsdt.windows(8).any(|window| window == b"LNRO0005"));
        }
    }

    #[test]
    fn as_many_processors_as_there_can_be() {
        let tables = tables(&written(&Machine {
            cpus: 64,
            ..machine(true)
        }));
        assert_eq!(tables[2].1.len(), 44 + 64 * 8 + 12);
    }
}
