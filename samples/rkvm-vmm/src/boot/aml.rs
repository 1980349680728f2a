// SPDX-License-Identifier: GPL-2.0

//! Those few objects of the ACPI machine language that describe this machine's devices (ACPI
//! specification, chapters "ACPI Machine Language" and "Device Configuration").
//!
//! rust-vmm's `acpi_tables` has all of them, and wants a newer compiler than this program's.

/// Bytes of AML.
pub type Aml = Vec<u8>;

const ZERO: u8 = 0x00;
const NAME: u8 = 0x08;
const BYTE: u8 = 0x0a;
const DWORD: u8 = 0x0c;
const STRING: u8 = 0x0d;
const SCOPE: u8 = 0x10;
const BUFFER: u8 = 0x11;
const PACKAGE: u8 = 0x12;
const DEVICE: [u8; 2] = [0x5b, 0x82];

// Resource descriptors; the small ones have their length in the low three bits.
const IO_PORTS: u8 = 0x47;
const END: u8 = 0x79;
const MEMORY_FIXED: u8 = 0x86;
const INTERRUPT: u8 = 0x89;

/// A package's length as it stands before the package, itself included.
fn length(content: usize) -> Vec<u8> {
    // One byte holds 6 bits of it; more bytes 4 and then 8 each, their number being in the top bits.
    for extra in 0..4usize {
        let total = content + 1 + extra;
        let bits = if extra == 0 { 6 } else { 4 + 8 * extra };
        if total >> bits == 0 {
            return match extra {
                0 => vec![total as u8],
                _ => std::iter::once(((extra << 6) | total & 0xf) as u8)
                    .chain((0..extra).map(|byte| (total >> (4 + 8 * byte)) as u8))
                    .collect(),
            };
        }
    }
    unreachable!("AML of 256 MiB");
}

fn packaged(opcode: &[u8], content: &[u8]) -> Aml {
    [opcode, &length(content.len()), content].concat()
}

/// A number.
pub fn number(value: u32) -> Aml {
    match u8::try_from(value) {
        Ok(ZERO) => vec![ZERO],
        Ok(byte) => vec![BYTE, byte],
        Err(_) => std::iter::once(DWORD).chain(value.to_le_bytes()).collect(),
    }
}

/// A string of ASCII.
pub fn string(text: &str) -> Aml {
    [&[STRING], text.as_bytes(), &[0]].concat()
}

/// A PNP ID of three letters and four hexadecimal digits, packed into a number.
pub fn pnp_id(vendor: &[u8; 3], product: u16) -> Aml {
    let letters = vendor.iter().fold(0u16, |packed, letter| {
        (packed << 5) | u16::from(letter & 0x1f)
    });
    // Each half is big endian.
    let [a, b] = letters.to_be_bytes();
    let [c, d] = product.to_be_bytes();
    vec![DWORD, a, b, c, d]
}

/// `Name (name, value)`.
pub fn name(name: &[u8; 4], value: &[u8]) -> Aml {
    [&[NAME], &name[..], value].concat()
}

/// `Package () { ... }`.
pub fn package(elements: &[Aml]) -> Aml {
    packaged(
        &[PACKAGE],
        &[&[elements.len() as u8], &elements.concat()[..]].concat(),
    )
}

/// `Device (name) { ... }`.
pub fn device(name: &[u8; 4], content: &[Aml]) -> Aml {
    packaged(&DEVICE, &[&name[..], &content.concat()].concat())
}

/// `Scope (name) { ... }`.
pub fn scope(name: &[u8; 4], content: &[Aml]) -> Aml {
    packaged(&[SCOPE], &[&name[..], &content.concat()].concat())
}

/// `ResourceTemplate () { ... }`.
pub fn resources(descriptors: &[Aml]) -> Aml {
    // The end tag's checksum may be 0, "not checked".
    let bytes = [&descriptors.concat()[..], &[END, 0]].concat();
    packaged(
        &[BUFFER],
        &[&number(bytes.len() as u32)[..], &bytes].concat(),
    )
}

/// `IO (Decode16, base, base, 0, count)`.
pub fn io(base: u16, count: u8) -> Aml {
    let [low, high] = base.to_le_bytes();
    vec![IO_PORTS, 1, low, high, low, high, 0, count]
}

/// `Memory32Fixed (ReadWrite, base, size)`.
pub fn memory(base: u32, size: u32) -> Aml {
    [
        &[MEMORY_FIXED, 9, 0, 1][..],
        &base.to_le_bytes(),
        &size.to_le_bytes(),
    ]
    .concat()
}

/// `Interrupt (ResourceConsumer, Level or Edge, ActiveHigh, Exclusive) { gsi }`.
pub fn interrupt(gsi: u32, level: bool) -> Aml {
    let flags = if level { 1 } else { 3 };
    [&[INTERRUPT, 6, 0, flags, 1][..], &gsi.to_le_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        assert_eq!(length(0), [1]);
        assert_eq!(length(62), [63]);
        assert_eq!(length(63), [0x41, 0x04]);
        assert_eq!(length(0xffd), [0x4f, 0xff]);
        assert_eq!(length(0xffe), [0x81, 0x00, 0x01]);
    }

    #[test]
    fn as_an_assembler_has_it() {
        assert_eq!(pnp_id(b"PNP", 0x0501), [0x0c, 0x41, 0xd0, 0x05, 0x01]);
        assert_eq!(
            name(b"_S5_", &package(&[number(5), number(5), number(0)])),
            [0x08, b'_', b'S', b'5', b'_', 0x12, 7, 3, 0x0a, 5, 0x0a, 5, 0]
        );
        assert_eq!(
            resources(&[io(0x3f8, 8)]),
            [0x11, 13, 0x0a, 10, 0x47, 1, 0xf8, 3, 0xf8, 3, 0, 8, 0x79, 0]
        );
        assert_eq!(interrupt(16, false), [0x89, 6, 0, 3, 1, 16, 0, 0, 0]);
        assert_eq!(string("ab"), [0x0d, b'a', b'b', 0]);
        assert_eq!(number(0x100), [0x0c, 0, 1, 0, 0]);
    }
}
