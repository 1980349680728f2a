// SPDX-License-Identifier: GPL-2.0

//! Segments, modes and linear addresses.

use proptest::prelude::*;
use rkvm_x86::exception::Fault;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Efer;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::canonicalize;
use rkvm_x86::segment::is_canonical;
use rkvm_x86::segment::linearize;
use rkvm_x86::segment::AccessKind;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegAttr;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;

const DATA: SegAttr = SegAttr::REAL_MODE;

fn segment(base: u64, limit: u32, attr: SegAttr) -> Segment {
    Segment {
        selector: 0x10,
        base,
        limit,
        attr,
    }
}

#[test]
fn attributes_take_their_places() {
    // The bytes of a flat 64-bit code descriptor: type b, S, P, AVL, L, G.
    let a = SegAttr::from_vmx(0xb09b);
    assert_eq!(a.type_(), 0xb);
    assert!(a.s() && a.p() && a.avl() && a.l() && !a.db() && a.g() && !a.unusable() && a.is_code());
    assert_eq!(a.dpl(), 0);
    assert_eq!(SegAttr::from_vmx(0x60).dpl(), 3);
    assert_eq!(SegAttr::from_descriptor_high(0x00cf_f300).to_vmx(), 0xc0f3);
    // What the format reserves does not get through.
    assert_eq!(SegAttr::from_vmx(u32::MAX).to_vmx(), 0x1_f0ff);
    let built = SegAttr::from_vmx(0)
        .with_type(0xff)
        .with_s(true)
        .with_dpl(7)
        .with_p(true)
        .with_avl(true)
        .with_l(true)
        .with_db(true)
        .with_g(true)
        .with_unusable(true);
    assert_eq!(built.to_vmx(), 0x1_f0ff);
    assert_eq!(
        built.with_type(0).with_dpl(0).with_s(false).to_vmx(),
        0x1_f080
    );
    assert_eq!(SegAttr::REAL_MODE.to_vmx(), 0x93);
    assert_eq!(SegAttr::RESET_CODE.to_vmx(), 0x9b);
    assert_eq!(SegAttr::RESET_LDT.to_vmx(), 0x82);
    assert_eq!(SegAttr::RESET_TSS.to_vmx(), 0x8b);
}

#[test]
fn reset() {
    let cs = Segment::reset(SegReg::Cs);
    assert_eq!(
        (cs.selector, cs.base, cs.limit),
        (0xf000, 0xffff_0000, 0xffff)
    );
    for (i, reg) in SegReg::ALL.into_iter().enumerate() {
        assert_eq!(usize::from(reg.number()), i);
        assert!(Segment::reset(reg).attr.p());
    }
}

#[test]
fn modes() {
    let code16 = SegAttr::RESET_CODE;
    let code32 = code16.with_db(true);
    let code64 = code16.with_l(true);
    let (real, pe) = (Cr0::ET, Cr0::PE | Cr0::ET);
    let lma = Efer::LMA | Efer::LME;
    let none = Efer::empty();
    let vm = Rflags::VM;
    let f = Rflags::FIXED;
    for (cr0, flags, efer, cs, mode, operand, address) in [
        (real, f, none, code16, CpuMode::Real, 2, 2),
        (real, f, none, code32, CpuMode::Real32, 4, 4),
        (pe, f, none, code16, CpuMode::Protected16, 2, 2),
        (pe, f, none, code32, CpuMode::Protected32, 4, 4),
        (pe, vm, none, code16, CpuMode::Vm86, 2, 2),
        (pe, f, lma, code16, CpuMode::Compat16, 2, 2),
        (pe, f, lma, code32, CpuMode::Compat32, 4, 4),
        (pe, f, lma, code64, CpuMode::Long64, 4, 8),
        // L without long mode is nothing.
        (pe, f, none, code64, CpuMode::Protected16, 2, 2),
        // LME alone is not long mode.
        (pe, f, Efer::LME, code32, CpuMode::Protected32, 4, 4),
    ] {
        assert_eq!(CpuMode::of(cr0, flags, efer, cs), mode);
        assert_eq!(
            (mode.operand_size(), mode.address_size()),
            (operand, address)
        );
    }
}

#[test]
fn canonical() {
    for (address, four, five) in [
        (0, true, true),
        (0x7fff_ffff_ffff, true, true),
        (0x8000_0000_0000, false, true),
        (0xffff_8000_0000_0000, true, true),
        (0xffff_7fff_ffff_ffff, false, true),
        (0x00ff_ffff_ffff_ffff, false, true),
        (0x0100_0000_0000_0000, false, false),
        (0xff00_0000_0000_0000, false, true),
        (0xfeff_ffff_ffff_ffff, false, false),
        (u64::MAX, true, true),
    ] {
        assert_eq!(is_canonical(address, false), four, "{address:#x}");
        assert_eq!(is_canonical(address, true), five, "{address:#x}");
    }
    assert_eq!(canonicalize(0x8000_0000_0000, false), 0xffff_8000_0000_0000);
}

#[test]
fn limits_by_access() {
    let at = |s: &Segment, offset, len| {
        linearize(
            CpuMode::Protected32,
            false,
            SegReg::Ds,
            s,
            offset,
            len,
            AccessKind::Read,
        )
    };
    let s = segment(0x1000, 0x1fff, DATA);
    for (offset, len, ok) in [
        (0, 1, true),
        (0x1fff, 1, true),
        (0x1ffc, 4, true),
        (0x1ffd, 4, false),
        (0x2000, 1, false),
        (0xffff_ffff, 4, false),
        (0x1_0000_0000, 1, false),
    ] {
        let expected = if ok {
            Ok(0x1000 + offset)
        } else {
            Err(Fault::gp(0))
        };
        assert_eq!(at(&s, offset, len), expected, "{offset:#x} {len}");
    }
    // Expand-down: what is valid is above the limit.
    let small = segment(0, 0x1fff, DATA.with_type(7));
    let big = segment(0, 0x1fff, DATA.with_type(7).with_db(true));
    for (offset, len, in_small, in_big) in [
        (0x1fff, 1, false, false),
        (0x2000, 1, true, true),
        (0xfffc, 4, true, true),
        (0xfffd, 4, false, true),
        (0x1_0000, 4, false, true),
        (0xffff_fffc, 4, false, true),
        (0xffff_fffd, 4, false, false),
    ] {
        assert_eq!(at(&small, offset, len).is_ok(), in_small, "{offset:#x}");
        assert_eq!(at(&big, offset, len).is_ok(), in_big, "{offset:#x}");
    }
    // Linear addresses wrap at four gigabytes.
    let s = segment(0xffff_f000, u32::MAX, DATA);
    assert_eq!(at(&s, 0x1010, 4), Ok(0x10));
}

#[test]
fn rights_by_type() {
    let flat = |type_| segment(0, u32::MAX, DATA.with_type(type_));
    let ok = |type_, kind| {
        linearize(
            CpuMode::Protected32,
            false,
            SegReg::Ds,
            &flat(type_),
            0,
            4,
            kind,
        )
        .is_ok()
    };
    for (type_, read, write) in [
        (0x1, true, false),
        (0x3, true, true),
        (0x9, false, false),
        (0xb, true, false),
        (0xd, false, false),
        (0xf, true, false),
    ] {
        assert_eq!(ok(type_, AccessKind::Read), read, "{type_:#x}");
        assert_eq!(ok(type_, AccessKind::Write), write, "{type_:#x}");
        assert!(ok(type_, AccessKind::Fetch));
    }
    // In real mode types do not count: code is written through CS.
    let cs = segment(0x100, 0xffff, SegAttr::RESET_CODE);
    assert_eq!(
        linearize(
            CpuMode::Real,
            false,
            SegReg::Cs,
            &cs,
            4,
            2,
            AccessKind::Write
        ),
        Ok(0x104)
    );
    assert_eq!(
        linearize(
            CpuMode::Real,
            false,
            SegReg::Cs,
            &cs,
            0xffff,
            2,
            AccessKind::Write
        ),
        Err(Fault::gp(0))
    );
}

#[test]
fn long_mode_segments() {
    let at = |reg, base, offset, len| {
        // No limit, no type, not even usable.
        let s = segment(base, 0, SegAttr::NULL);
        linearize(
            CpuMode::Long64,
            false,
            reg,
            &s,
            offset,
            len,
            AccessKind::Write,
        )
    };
    assert_eq!(at(SegReg::Ds, 0x1000, 0x20, 8), Ok(0x20));
    assert_eq!(at(SegReg::Fs, 0x1000, 0x20, 8), Ok(0x1020));
    assert_eq!(
        at(SegReg::Gs, 0xffff_8000_0000_0000, u64::MAX, 1),
        Err(Fault::gp(0))
    );
    assert_eq!(at(SegReg::Gs, 0x1000, u64::MAX, 1), Ok(0xfff));
    assert_eq!(at(SegReg::Ss, 0, 1 << 47, 1), Err(Fault::ss(0)));
    assert_eq!(at(SegReg::Ds, 0, (1 << 47) - 8, 8), Ok((1 << 47) - 8));
    assert_eq!(at(SegReg::Ds, 0, (1 << 47) - 7, 8), Err(Fault::gp(0)));
}

proptest! {
    /// Whatever the segment says, a linear address outside 64-bit mode has 32 bits, inside it is canonical, and #SS is SS's.
    #[test]
    fn any_segment(
        base: u64, limit: u32, raw: u32, offset: u64, len in 0u32..5000, la57: bool,
        reg in prop::sample::select(SegReg::ALL.to_vec()),
        mode in prop::sample::select(vec![
            CpuMode::Real, CpuMode::Real32, CpuMode::Vm86, CpuMode::Protected16, CpuMode::Protected32,
            CpuMode::Compat16, CpuMode::Compat32, CpuMode::Long64,
        ]),
        kind in prop::sample::select(vec![AccessKind::Read, AccessKind::Write, AccessKind::Fetch]),
    ) {
        let s = segment(base, limit, SegAttr::from_vmx(raw));
        match linearize(mode, la57, reg, &s, offset, len, kind) {
            Ok(linear) if mode.is_64bit() => prop_assert!(is_canonical(linear, la57)),
            Ok(linear) => prop_assert!(linear >> 32 == 0 && !s.attr.unusable()),
            Err(f) => prop_assert_eq!(f, if reg == SegReg::Ss { Fault::ss(0) } else { Fault::gp(0) }),
        }
    }
}
