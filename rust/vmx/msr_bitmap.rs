// SPDX-License-Identifier: GPL-2.0

//! The bitmap of the MSRs that a guest reads and writes without an exit (SDM vol. 3, 25.6.9). Each vCPU has its own: a VMM may
//! deny its guest some of them, and those of x2APIC mode are the guest's in that mode only.

use crate::linux::page::KernelPage;
use crate::x86::msr::filter::Access;
use crate::x86::msr::Msr;
use kernel::prelude::*;

/// Those that the guest reads and writes itself: they are in the VMCS, or switched whatever they are.
const BOTH: [Msr; 6] = [
    Msr::FS_BASE,
    Msr::GS_BASE,
    Msr::KERNEL_GS_BASE,
    Msr::SYSENTER_CS,
    Msr::SYSENTER_ESP,
    Msr::SYSENTER_EIP,
];
/// Those whose value is known to be the guest's, as its writes exit.
const READS: [Msr; 4] = [Msr::TSC, Msr::STAR, Msr::LSTAR, Msr::SYSCALL_MASK];

/// A bitmap. A bit that is set makes an access exit.
pub(super) struct MsrBitmap(KernelPage);

impl MsrBitmap {
    const HIGH: usize = 1024;
    const WRITE: usize = 2048;

    /// Every access exits: ENOMEM.
    pub(super) fn new() -> Result<Self> {
        let page = KernelPage::new()?;
        for offset in (0..4096).step_by(8) {
            page.write(offset, u64::MAX);
        }
        Ok(Self(page))
    }

    /// Lets the guest access what it can have and is allowed to, and nothing else of that. `spec_ctrl`: IA32_SPEC_CTRL is switched.
    pub(super) fn pass_allowed(&self, allowed: impl Fn(Msr, Access) -> bool, spec_ctrl: bool) {
        for msr in BOTH {
            self.pass(msr, Access::Read, allowed(msr, Access::Read));
            self.pass(msr, Access::Write, allowed(msr, Access::Write));
        }
        for access in [Access::Read, Access::Write] {
            let on = spec_ctrl && allowed(Msr::SPEC_CTRL, access);
            self.pass(Msr::SPEC_CTRL, access, on);
        }
        for msr in READS {
            self.pass(msr, Access::Read, allowed(msr, Access::Read));
        }
    }

    /// The registers of x2APIC mode, which the processor has: reads of all but the current count, and writes of those that change
    /// nothing outside.
    pub(super) fn pass_x2apic(&self, on: bool) {
        const READ: [core::ops::RangeInclusive<u32>; 8] = [
            0x802..=0x803,
            0x808..=0x808,
            0x80a..=0x80a,
            0x80d..=0x80d,
            0x80f..=0x828,
            0x830..=0x830,
            0x832..=0x838,
            0x83e..=0x83e,
        ];
        for msr in READ.into_iter().flatten() {
            self.pass(Msr(msr), Access::Read, on);
        }
        for msr in [Msr::X2APIC_TPR, Msr::X2APIC_EOI, Msr::X2APIC_SELF_IPI] {
            self.pass(msr, Access::Write, on);
        }
    }

    fn pass(&self, msr: Msr, access: Access, on: bool) {
        let Msr(msr) = msr;
        let mut byte = (msr & 0x1fff) as usize / 8;
        if msr >= 0x2000 {
            byte += Self::HIGH;
        }
        if access == Access::Write {
            byte += Self::WRITE;
        }
        let bit = 1u8 << (msr & 7);
        let old = self.0.read::<u8>(byte);
        self.0.write(byte, if on { old & !bit } else { old | bit });
    }

    pub(super) fn phys(&self) -> u64 {
        self.0.phys()
    }
}
