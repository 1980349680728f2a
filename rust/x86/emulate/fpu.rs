// SPDX-License-Identifier: GPL-2.0

//! The state of the x87, of MMX, SSE and AVX, as far as instructions that move data touch it.

/// The vector registers of a processor, and what controls them.
///
/// Nothing is asked for that the guest's CR0, CR4 and XCR0 have not enabled.
pub trait Fpu {
    /// XCR0.
    fn xcr0(&mut self) -> u64;
    /// An XMM register, of 0 to 15: the lower half first.
    fn xmm(&mut self, n: u8) -> [u64; 2];
    /// Sets an XMM register. What is above it stays.
    fn set_xmm(&mut self, n: u8, value: [u64; 2]);
    /// A YMM register, of 0 to 15: the lowest part first.
    fn ymm(&mut self, n: u8) -> [u64; 4];
    /// Sets a YMM register. What is above it is cleared.
    fn set_ymm(&mut self, n: u8, value: [u64; 4]);
    /// An MMX register, of 0 to 7. The x87 is in MMX state after it.
    fn mmx(&mut self, n: u8) -> u64;
    /// Sets an MMX register. The x87 is in MMX state after it.
    fn set_mmx(&mut self, n: u8, value: u64);
    /// MXCSR.
    fn mxcsr(&mut self) -> u32;
    /// Sets MXCSR, of which no reserved bit is set.
    fn set_mxcsr(&mut self, value: u32);
    /// The x87's control word.
    fn fpu_control(&mut self) -> u16;
    /// Sets the x87's control word.
    fn set_fpu_control(&mut self, value: u16);
    /// The x87's status word.
    fn fpu_status(&mut self) -> u16;
    /// Resets the x87, as FNINIT does.
    fn fpu_init(&mut self);
}
