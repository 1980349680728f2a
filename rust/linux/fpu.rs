// SPDX-License-Identifier: GPL-2.0

//! A guest's FPU state, which the kernel switches like a task's own while the guest runs.

use super::irq::IrqsOff;
use crate::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::types::Opaque;

/// A guest's FPU image.
///
/// # Invariants
///
/// `raw` was filled in by `fpu_alloc_guest_fpstate` and is freed once.
#[pin_data(PinnedDrop)]
pub(crate) struct GuestFpu {
    #[pin]
    raw: Opaque<bindings::fpu_guest>,
}

// SAFETY: The image is owned; the kernel keeps no pointer to it outside of `Swapped`'s life.
unsafe impl Send for GuestFpu {}
// SAFETY: Shared references give no access that writes, but from the thread that swapped it in.
unsafe impl Sync for GuestFpu {}

impl GuestFpu {
    /// Allocates an image in the reset state: ENOMEM.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            raw <- Opaque::try_ffi_init(|slot: *mut bindings::fpu_guest| {
                // SAFETY: `slot` is valid for writes; zero is what the allocator expects to find.
                let ok = unsafe {
                    slot.write_bytes(0, 1);
                    bindings::fpu_alloc_guest_fpstate(slot)
                };
                // INVARIANT: It has been allocated if the function says so.
                if ok { Ok(()) } else { Err(ENOMEM) }
            }),
        })
    }

    /// Puts the guest's image in the place of the current thread's until the guard is dropped.
    /// Context switches save and restore the guest's registers meanwhile.
    pub(crate) fn swap_in(&self) -> Swapped<'_> {
        // SAFETY: By the invariant the image is valid; the guard swaps it out on this thread.
        unsafe { bindings::fpu_swap_kvm_fpstate(self.raw.get(), true) };
        Swapped {
            fpu: self,
            _not_send: Default::default(),
        }
    }

    /// Copies the state out in the format of XSAVE, all of `buf`.
    ///
    /// `xfeatures`: the components to give, `pkru`: the guest's PKRU (KVM API, KVM_GET_XSAVE).
    pub(crate) fn copy_to(&self, buf: &mut [u8], xfeatures: u64, pkru: u32) {
        // SAFETY: The image is valid and not loaded, as the vCPU's mutex is held and the thread is
        // not in KVM_RUN; the function writes `buf.len()` bytes at most.
        unsafe {
            bindings::fpu_copy_guest_fpstate_to_uabi(
                self.raw.get(),
                buf.as_mut_ptr().cast(),
                buf.len() as u32,
                xfeatures,
                pkru,
            )
        };
    }

    /// Takes the state from a buffer in the format of XSAVE: EINVAL if it asks for components
    /// outside of `xcr0` or has reserved bits. `buf` has at least [`Self::uabi_size`] bytes.
    pub(crate) fn copy_from(&self, buf: &[u8], xcr0: u64, pkru: &mut u32) -> Result {
        if buf.len() < self.uabi_size() {
            return Err(EINVAL);
        }
        // SAFETY: As in `copy_to`; the function reads no more than the image's size from `buf`.
        to_result(unsafe {
            bindings::fpu_copy_uabi_to_guest_fpstate(
                self.raw.get(),
                buf.as_ptr().cast(),
                xcr0,
                pkru,
            )
        })
    }

    /// Bytes that the state takes in user space's format.
    pub(crate) fn uabi_size(&self) -> usize {
        // SAFETY: The image is valid.
        unsafe { bindings::rkvm_fpu_uabi_size(self.raw.get()) as usize }
    }

    /// The 512 bytes of the FXSAVE area.
    pub(crate) fn fxsave(&self) -> [u8; 512] {
        // SAFETY: The image is valid, begins with an FXSAVE area and is not loaded.
        unsafe {
            bindings::rkvm_fpu_fxsave(self.raw.get())
                .cast::<[u8; 512]>()
                .read_unaligned()
        }
    }

    /// Replaces the FXSAVE area, but for MXCSR bits that this CPU has not.
    pub(crate) fn set_fxsave(&self, area: &[u8; 512]) {
        // SAFETY: As in `fxsave`; the vCPU's mutex makes this the only accessor.
        unsafe { bindings::rkvm_fpu_set_fxsave(self.raw.get(), area.as_ptr().cast()) };
    }
}

#[pinned_drop]
impl PinnedDrop for GuestFpu {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the invariant it was allocated, and this is the only time.
        unsafe { bindings::fpu_free_guest_fpstate(self.raw.get()) };
    }
}

/// The guest's image is the current thread's while this lives.
pub(crate) struct Swapped<'a> {
    fpu: &'a GuestFpu,
    _not_send: kernel::types::NotThreadSafe,
}

impl Swapped<'_> {
    /// Loads the guest's registers, should the kernel have used the FPU since. Interrupts are off
    /// and stay off until the guest is entered.
    #[inline]
    pub(crate) fn load(&self) {
        // SAFETY: Interrupts are off in every caller, as the function asserts in debug kernels.
        unsafe { bindings::rkvm_fpu_load() };
    }
}

/// One instruction per register, chosen by number: the assembler knows no registers by number.
macro_rules! by_number {
    ($n:expr, $before:literal, $register:literal, $after:literal, $at:expr, [$($number:literal)*]) => {
        match $n {
            $($number => core::arch::asm!(
                concat!($before, $register, $number, $after), in(reg) $at, options(nostack, preserves_flags)
            ),)*
            _ => {}
        }
    };
    (16, $n:expr, $before:literal, $register:literal, $after:literal, $at:expr) => {
        by_number!($n, $before, $register, $after, $at, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15])
    };
    (8, $n:expr, $before:literal, $register:literal, $after:literal, $at:expr) => {
        by_number!($n, $before, $register, $after, $at, [0 1 2 3 4 5 6 7])
    };
}

/// The guest's registers, for the emulator. A register that does not exist reads as zero and is not written.
impl Swapped<'_> {
    /// Calls `f` while the guest's registers are the processor's.
    fn with_registers<R>(&self, f: impl FnOnce() -> R) -> R {
        // No softirq uses the FPU in between.
        let _irqs = IrqsOff::new();
        self.load();
        f()
    }

    /// An XMM register, its lower half first.
    pub(crate) fn xmm(&self, n: u8) -> [u64; 2] {
        let mut value = [0u64; 2];
        // SAFETY: Writes the sixteen bytes of `value`.
        self.with_registers(|| unsafe {
            by_number!(16, n, "movdqu [{}], ", "xmm", "", value.as_mut_ptr())
        });
        value
    }

    /// Sets an XMM register. What is above it stays.
    pub(crate) fn set_xmm(&self, n: u8, value: [u64; 2]) {
        // SAFETY: Reads the sixteen bytes of `value`; the register is the guest's, as the kernel's code has none.
        self.with_registers(|| unsafe {
            by_number!(16, n, "movdqu ", "xmm", ", [{}]", value.as_ptr())
        });
    }

    /// A YMM register, its lowest part first. The guest has AVX in XCR0, which it can only if the host has.
    pub(crate) fn ymm(&self, n: u8) -> [u64; 4] {
        let mut value = [0u64; 4];
        // SAFETY: Writes the 32 bytes of `value`.
        self.with_registers(|| unsafe {
            by_number!(16, n, "vmovdqu [{}], ", "ymm", "", value.as_mut_ptr())
        });
        value
    }

    /// Sets a YMM register, and clears what is above it. The guest has AVX in XCR0.
    pub(crate) fn set_ymm(&self, n: u8, value: [u64; 4]) {
        // SAFETY: Reads the 32 bytes of `value`; the register is the guest's.
        self.with_registers(|| unsafe {
            by_number!(16, n, "vmovdqu ", "ymm", ", [{}]", value.as_ptr())
        });
    }

    /// An MMX register, after which the x87 is in MMX state. No x87 exception is pending.
    pub(crate) fn mmx(&self, n: u8) -> u64 {
        let mut value = 0u64;
        // SAFETY: Writes the eight bytes of `value`.
        self.with_registers(|| unsafe {
            by_number!(8, n, "movq [{}], ", "mm", "", &raw mut value)
        });
        value
    }

    /// Sets an MMX register, after which the x87 is in MMX state. No x87 exception is pending.
    pub(crate) fn set_mmx(&self, n: u8, value: u64) {
        // SAFETY: Reads the eight bytes of `value`; the register is the guest's.
        self.with_registers(|| unsafe {
            by_number!(8, n, "movq ", "mm", ", [{}]", &raw const value)
        });
    }

    /// MXCSR.
    pub(crate) fn mxcsr(&self) -> u32 {
        let mut value = 0u32;
        // SAFETY: Writes the four bytes of `value`.
        self.with_registers(|| unsafe {
            core::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags))
        });
        value
    }

    /// Sets MXCSR, of which no bit above the sixteenth is set.
    pub(crate) fn set_mxcsr(&self, value: u32) {
        let value = value & 0xffff;
        // SAFETY: Reads the four bytes of `value`, where all processors with VMX know all bits.
        self.with_registers(|| unsafe {
            core::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags))
        });
    }

    /// The x87's control word.
    pub(crate) fn control(&self) -> u16 {
        let mut value = 0u16;
        // SAFETY: Writes the two bytes of `value`, and waits for no exception.
        self.with_registers(|| unsafe {
            core::arch::asm!("fnstcw [{}]", in(reg) &raw mut value, options(nostack, preserves_flags))
        });
        value
    }

    /// Sets the x87's control word. No x87 exception is pending.
    pub(crate) fn set_control(&self, value: u16) {
        // SAFETY: Reads the two bytes of `value`. What this unmasks is raised by the next instruction of the x87, which is the guest's.
        self.with_registers(|| unsafe {
            core::arch::asm!("fldcw [{}]", in(reg) &raw const value, options(nostack, preserves_flags))
        });
    }

    /// The x87's status word.
    pub(crate) fn status(&self) -> u16 {
        let mut value = 0u16;
        // SAFETY: Writes the two bytes of `value`, and waits for no exception.
        self.with_registers(|| unsafe {
            core::arch::asm!("fnstsw [{}]", in(reg) &raw mut value, options(nostack, preserves_flags))
        });
        value
    }

    /// Resets the x87.
    pub(crate) fn init_x87(&self) {
        // SAFETY: The state is the guest's; no exception is waited for.
        self.with_registers(|| unsafe { core::arch::asm!("fninit", options(nomem, nostack)) });
    }
}

impl Drop for Swapped<'_> {
    fn drop(&mut self) {
        // SAFETY: Swapped in by this thread, which the guard cannot leave.
        unsafe { bindings::fpu_swap_kvm_fpstate(self.fpu.raw.get(), false) };
    }
}

/// The components that the kernel would let this process's guests have in XCR0.
pub(crate) fn permitted_xfeatures() -> u64 {
    // SAFETY: Reads the permissions of the current process.
    unsafe { bindings::rkvm_fpu_user_xfeatures() }
}

/// The greatest number of bytes that [`GuestFpu::uabi_size`] can be for this process.
pub(crate) fn uabi_max_size() -> usize {
    // SAFETY: Reads CPUID's leaf 0xd for the permitted components.
    unsafe { bindings::rkvm_fpu_uabi_max_size() as usize }
}
