// SPDX-License-Identifier: GPL-2.0

//! Machine checks, and the filter of MSRs.

use proptest::prelude::*;
use rkvm_x86::mce::*;
use rkvm_x86::msr::filter;
use rkvm_x86::msr::filter::Access;
use rkvm_x86::msr::filter::Range;
use rkvm_x86::msr::Class;
use rkvm_x86::msr::Msr;
use rkvm_x86::msr::MsrError;

const CTL_P: u64 = 1 << 8;
const CMCI_P: u64 = 1 << 10;
const LMCE_P: u64 = 1 << 27;
const VALID: u64 = 1 << 63;
const OVERFLOW: u64 = 1 << 62;
const UNCORRECTED: u64 = 1 << 61;
const SIGNALED: u64 = 1 << 56;

const fn status(bank: u32) -> Msr {
    Msr(0x401 + 4 * bank)
}

fn set_up(cap: u64) -> MachineChecks {
    let mut m = MachineChecks::new();
    m.set_up(cap).unwrap();
    m
}

#[test]
fn what_a_vmm_may_set_up() {
    let mut m = MachineChecks::new();
    assert_eq!(m.read(Msr::MCG_CAP, false), Ok(32));
    for bad in [0, CTL_P, 33, 0xff, 10 | (1 << 9), 10 | (1 << 63)] {
        assert_eq!(m.set_up(bad), Err(Invalid), "{bad:x}");
    }
    assert_eq!(m, MachineChecks::new());
    assert_eq!(m.set_up(10 | SUPPORTED | 0x12_0000), Ok(()));
    assert_eq!(m.read(Msr(0x400), false), Ok(u64::MAX));
    assert_eq!(m.read(Msr::MCG_CTL, false), Ok(u64::MAX));
    assert_eq!(m.read(status(10), true), Err(MsrError::Refused));
    assert_eq!(m.read(status(9), false), Ok(0));
}

#[test]
fn what_a_guest_may_write() {
    let mut m = set_up(4);
    assert_eq!(m.write(Msr::MCG_STATUS, 4, false), Err(MsrError::Refused));
    assert_eq!(m.write(Msr::MCG_STATUS, 0, false), Ok(()));
    assert_eq!(m.write(Msr::MCG_STATUS, 4, true), Ok(()));
    assert_eq!(m.write(status(1), 1, false), Err(MsrError::Refused));
    assert_eq!(m.write(status(1), VALID, true), Ok(()));
    assert_eq!(m.write(status(1), 0, false), Ok(()));
    assert_eq!(m.write(Msr(0x400), 1, true), Err(MsrError::Refused));
    assert_eq!(m.write(Msr(0x400), !(1 << 10), false), Ok(()));
    assert_eq!(m.write(Msr::MCG_CAP, 5, true), Err(MsrError::Refused));
    // Without CTL_P and CMCI_P, their registers can only be restored as the zeroes that they were saved as.
    for msr in [Msr::MCG_CTL, Msr(0x280)] {
        assert_eq!(m.read(msr, false), Err(MsrError::Refused));
        assert_eq!(m.read(msr, true), Ok(0));
        assert_eq!(m.write(msr, 0, false), Err(MsrError::Refused));
        assert_eq!(m.write(msr, 0, true), Ok(()));
        assert_eq!(m.write(msr, 1, true), Err(MsrError::Refused));
    }
    let mut m = set_up(4 | CTL_P | CMCI_P);
    assert_eq!(m.write(Msr::MCG_CTL, 1, false), Err(MsrError::Refused));
    assert_eq!(m.write(Msr::MCG_CTL, 0, false), Ok(()));
    assert_eq!(m.write(Msr(0x283), (1 << 30) | 0x7fff, false), Ok(()));
    assert_eq!(m.write(Msr(0x283), 1 << 29, false), Err(MsrError::Refused));
    assert_eq!(m.write(Msr(0x284), 0, true), Err(MsrError::Refused));
}

#[test]
fn feature_control_is_locked_by_its_owner() {
    const LMCE: u64 = 1 << 20;
    let mut m = set_up(4);
    assert_eq!(m.read(Msr::FEAT_CTL, false), Ok(0));
    assert_eq!(m.write(Msr::FEAT_CTL, LMCE, false), Err(MsrError::Refused));
    assert_eq!(m.write(Msr::FEAT_CTL, 4, true), Err(MsrError::Refused));
    assert_eq!(m.write(Msr::FEAT_CTL, 1, false), Ok(()));
    assert_eq!(m.write(Msr::FEAT_CTL, 0, false), Err(MsrError::Refused));
    let mut m = set_up(4 | LMCE_P);
    assert_eq!(m.read(Msr::MCG_EXT_CTL, false), Err(MsrError::Refused));
    assert_eq!(m.write(Msr::MCG_EXT_CTL, 1, false), Err(MsrError::Refused));
    assert_eq!(m.write(Msr::FEAT_CTL, LMCE | 1, false), Ok(()));
    assert_eq!(m.write(Msr::MCG_EXT_CTL, 3, false), Err(MsrError::Refused));
    assert_eq!(m.write(Msr::MCG_EXT_CTL, 1, false), Ok(()));
    assert_eq!(m.read(Msr::MCG_EXT_CTL, false), Ok(1));
}

#[test]
fn errors_that_a_vmm_reports() {
    let mut m = set_up(4 | CTL_P | CMCI_P);
    let report = |status: u64, bank: u8| Report {
        status,
        addr: 0x1000,
        misc: 0x8c,
        mcg_status: 5,
        bank,
    };
    assert_eq!(m.report(&report(VALID, 4), true), Err(Invalid));
    assert_eq!(m.report(&report(0, 0), true), Err(Invalid));
    // A corrected one, another, and a worse one.
    assert_eq!(m.report(&report(VALID | 1, 0), true), Ok(Signal::None));
    assert_eq!(m.read(status(0), false), Ok(VALID | 1));
    assert_eq!(m.report(&report(VALID | 2, 0), true), Ok(Signal::None));
    assert_eq!(m.read(status(0), false), Ok(VALID | OVERFLOW | 2));
    let worse = report(VALID | UNCORRECTED | SIGNALED, 0);
    assert_eq!(m.report(&worse, true), Ok(Signal::Exception));
    assert_eq!(m.read(Msr::MCG_STATUS, false), Ok(5));
    assert_eq!(m.read(Msr(0x402), false), Ok(0x1000));
    // Which a corrected one does not hide.
    assert_eq!(m.report(&report(VALID | 3, 0), true), Ok(Signal::None));
    let kept = VALID | OVERFLOW | UNCORRECTED | SIGNALED;
    assert_eq!(m.read(status(0), false), Ok(kept));
    // One more, while the first is handled; and one for a guest that is not ready at all.
    assert_eq!(m.report(&worse, true), Ok(Signal::Shutdown));
    m.write(Msr::MCG_STATUS, 0, false).unwrap();
    assert_eq!(m.report(&worse, false), Ok(Signal::Shutdown));
    // Disabled, in the bank or altogether.
    m.write(Msr(0x400), 0, false).unwrap();
    assert_eq!(m.report(&worse, true), Ok(Signal::None));
    m.write(Msr(0x400), u64::MAX, false).unwrap();
    m.write(Msr::MCG_CTL, 0, false).unwrap();
    assert_eq!(m.report(&worse, true), Ok(Signal::None));
    // Nobody has to act: the interrupt, if the bank has it on.
    let quiet = Report {
        mcg_status: 0,
        ..report(VALID | UNCORRECTED, 1)
    };
    assert_eq!(m.report(&quiet, false), Ok(Signal::None));
    m.write(Msr(0x281), 1 << 30, false).unwrap();
    assert_eq!(m.report(&quiet, false), Ok(Signal::Interrupt));
}

#[test]
fn filters() {
    let bits = [0b10u64, 1];
    let both = Range::new(3, 0x100, 65, &bits[..]);
    let reads = Range::new(1, 0x100, 2, &bits[..1]);
    let ranges = [reads, both];
    let allows = |msr, access| filter::allows(&ranges, false, Msr(msr), access);
    assert!(!allows(0x100, Access::Read) && allows(0x101, Access::Read));
    assert!(allows(0x101, Access::Write) && !allows(0x102, Access::Write));
    assert!(allows(0x140, Access::Read));
    // Beyond all ranges, and x2APIC.
    assert!(!allows(0x141, Access::Read) && !allows(0xff, Access::Read));
    assert!(allows(0x800, Access::Write) && allows(0x8ff, Access::Read));
    assert!(!allows(0x900, Access::Write));
    // What goes beyond the last number is no range.
    let last = [Range::new(3, 0xffff_ffff, 1, &bits[..1])];
    assert!(filter::allows(&last, true, Msr(0xffff_ffff), Access::Read));
}

#[test]
fn sizes_of_ranges() {
    assert_eq!(filter::words(1, 1), Some(1));
    assert_eq!(filter::words(3, 64), Some(1));
    assert_eq!(filter::words(2, 65), Some(2));
    assert_eq!(filter::words(3, 0x3000), Some(0xc0));
    for (flags, count) in [(0, 1), (4, 1), (7, 1), (3, 0), (3, 0x3001), (3, u32::MAX)] {
        assert_eq!(filter::words(flags, count), None);
    }
}

proptest! {
    /// Nothing panics, and what cannot be read has no class.
    #[test]
    fn any_access(cap: u64, msr: u32, low in 0x170u32..0x600, value: u64, host: bool, bank: u8, on: bool) {
        let mut m = MachineChecks::new();
        let _ = m.set_up(cap & 0x0f00_ffff);
        for msr in [Msr(msr), Msr(low)] {
            let _ = m.write(msr, value, host);
            if msr.class() != Class::MachineCheck {
                prop_assert_eq!(m.read(msr, host), Err(MsrError::Unknown));
            }
        }
        let report = Report { status: value | VALID, addr: cap, misc: cap, mcg_status: value & 7, bank };
        let _ = m.report(&report, on);
    }

    #[test]
    fn any_filter(flags: u32, base: u32, count: u32, msr: u32, bits: Vec<u64>) {
        let ranges = [Range::new(flags, base, count, &bits[..])];
        let _ = filter::allows(&ranges, true, Msr(msr), Access::Read);
        let _ = filter::allows(&ranges, true, Msr(base), Access::Write);
    }
}
