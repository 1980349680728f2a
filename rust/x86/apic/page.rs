// SPDX-License-Identifier: GPL-2.0

//! The page that holds an APIC's registers, and the three vectors of 256 bits in it.

use super::regs::Bank;
use super::regs::Reg;

/// The registers of one local APIC, laid out as in the virtual-APIC page (SDM vol. 3, 31.1.1): 32-bit words, most of them at
/// multiples of 16.
///
/// Others set bits of IRR and TMR while the APIC's own vCPU works on the page, so every access is one of a single word and the
/// two modifying ones are atomic. They must be ordered too: who sees a bit that [`fetch_or`](Self::fetch_or) set in IRR sees what its
/// setter wrote to TMR before.
///
/// `offset` is a multiple of 4 and less than 0x400 in every call that this layer makes.
pub trait ApicPage {
    /// Reads the word at an offset.
    fn read(&self, offset: u16) -> u32;
    /// Writes the word at an offset.
    fn write(&self, offset: u16, value: u32);
    /// Sets bits of the word at an offset, and returns what it was.
    fn fetch_or(&self, offset: u16, bits: u32) -> u32;
    /// Keeps no other than these bits of the word at an offset, and returns what it was.
    fn fetch_and(&self, offset: u16, bits: u32) -> u32;
}

impl<P: ApicPage + ?Sized> ApicPage for &P {
    fn read(&self, offset: u16) -> u32 {
        (**self).read(offset)
    }

    fn write(&self, offset: u16, value: u32) {
        (**self).write(offset, value);
    }

    fn fetch_or(&self, offset: u16, bits: u32) -> u32 {
        (**self).fetch_or(offset, bits)
    }

    fn fetch_and(&self, offset: u16, bits: u32) -> u32 {
        (**self).fetch_and(offset, bits)
    }
}

/// Reads a register.
#[inline]
pub(super) fn get<P: ApicPage>(page: &P, reg: Reg) -> u32 {
    page.read(reg.offset())
}

/// Writes a register.
#[inline]
pub(super) fn put<P: ApicPage>(page: &P, reg: Reg, value: u32) {
    page.write(reg.offset(), value);
}

/// The word of a bank that a vector's bit is in, and the bit.
#[inline]
const fn locate(bank: Bank, vector: u8) -> (u16, u32) {
    (bank.offset(vector >> 5), 1 << (vector & 0x1f))
}

/// Whether a vector's bit is set.
#[inline]
pub(super) fn test<P: ApicPage>(page: &P, bank: Bank, vector: u8) -> bool {
    let (offset, bit) = locate(bank, vector);
    page.read(offset) & bit != 0
}

/// Sets a vector's bit; whether it was set.
#[inline]
pub(super) fn set<P: ApicPage>(page: &P, bank: Bank, vector: u8) -> bool {
    let (offset, bit) = locate(bank, vector);
    page.fetch_or(offset, bit) & bit != 0
}

/// Clears a vector's bit.
#[inline]
pub(super) fn clear<P: ApicPage>(page: &P, bank: Bank, vector: u8) {
    let (offset, bit) = locate(bank, vector);
    page.fetch_and(offset, !bit);
}

/// The highest vector whose bit is set.
#[inline]
pub(super) fn highest<P: ApicPage>(page: &P, bank: Bank) -> Option<u8> {
    (0..8u8).rev().find_map(|word| {
        let bits = page.read(bank.offset(word));
        bits.checked_ilog2().map(|bit| (word << 5) | bit as u8)
    })
}
