// SPDX-License-Identifier: GPL-2.0

//! Where KVM's leaves are in a CPUID that a VMM made.

use rkvm_x86::cpuid::CpuidRegs;
use rkvm_x86::msr::Class;
use rkvm_x86::msr::Msr;
use rkvm_x86::pv;
use rkvm_x86::pv::PvFeatures;

fn signature(at: u32) -> CpuidRegs {
    let [ebx, ecx, edx] = pv::SIGNATURE;
    CpuidRegs {
        eax: at + 1,
        ebx,
        ecx,
        edx,
    }
}

#[test]
fn leaves_are_found_by_their_signature() {
    for base in [0x4000_0000, 0x4000_0100, 0x4000_ff00] {
        let found = pv::features_leaf(|leaf| (leaf == base).then(|| signature(base)));
        assert_eq!(found, Some(base + 1));
    }
}

#[test]
fn the_first_signature_counts() {
    let bases = [0x4000_0300, 0x4000_0200];
    let found = pv::features_leaf(|leaf| bases.contains(&leaf).then(|| signature(leaf)));
    assert_eq!(found, Some(0x4000_0201));
}

#[test]
fn another_hypervisor_is_not_kvm() {
    assert_eq!(pv::features_leaf(|_| None), None);
    for part in 0..3 {
        let mut other = signature(pv::SIGNATURE_LEAF);
        match part {
            0 => other.ebx ^= 1,
            1 => other.ecx ^= 1,
            _ => other.edx ^= 1,
        }
        assert_eq!(pv::features_leaf(|_| Some(other)), None);
    }
    // Not between the places, and not beyond the last.
    for at in [
        0x4000_0001,
        0x4000_0080,
        0x4001_0000,
        0x3fff_ff00,
        0x8000_0000,
    ] {
        assert_eq!(
            pv::features_leaf(|leaf| (leaf == at).then(|| signature(at))),
            None
        );
    }
}

#[test]
fn the_msrs_are_kvms() {
    for number in (0x11..=0x12).chain(0x4b56_4d00..=0x4b56_4d08) {
        assert_eq!(Msr(number).class(), Class::Paravirtual, "{number:#x}");
    }
    for number in [0x10, 0x13, 0x4b56_4cff, 0x4b56_4d09] {
        assert_ne!(Msr(number).class(), Class::Paravirtual, "{number:#x}");
    }
}

#[test]
fn features_are_where_the_abi_has_them() {
    assert_eq!(PvFeatures::STEAL_TIME.bits(), 1 << 5);
    assert_eq!(PvFeatures::CLOCKSOURCE_STABLE_BIT.bits(), 1 << 24);
}
