// SPDX-License-Identifier: GPL-2.0

//! Control registers, debug registers and MSRs: what may be set.

use proptest::prelude::*;
use rkvm_x86::cpuid::features::Features;
use rkvm_x86::cpuid::features::GuestFeatures;
use rkvm_x86::cr::*;
use rkvm_x86::exception::Fault;
use rkvm_x86::msr::check_value;
use rkvm_x86::msr::mtrr::pat_is_valid;
use rkvm_x86::msr::mtrr::PAT_RESET;
use rkvm_x86::msr::state::Effect;
use rkvm_x86::msr::state::MsrState;
use rkvm_x86::msr::Class;
use rkvm_x86::msr::Msr;
use rkvm_x86::msr::MsrError;
use rkvm_x86::msr::SAVED;
use rkvm_x86::regs::*;
use rkvm_x86::segment::SegAttr;

const GP: Fault = Fault::gp(0);

fn features() -> GuestFeatures {
    GuestFeatures {
        flags: Features::NAMED.without(Features::VMX | Features::SVM),
        maxphyaddr: 40,
        xcr0: Xcr0::X87 | Xcr0::SSE | Xcr0::AVX | Xcr0::AVX512 | Xcr0::MPX | Xcr0::AMX,
    }
}

fn bare() -> GuestFeatures {
    GuestFeatures::default()
}

const CODE32: SegAttr = SegAttr::RESET_CODE.with_db(true);
const CODE64: SegAttr = SegAttr::RESET_CODE.with_l(true);

#[test]
fn invpcid_operands() {
    let (off, on) = (Cr4::PAE, Cr4::PAE | Cr4::PCIDE);
    let high = 1 << 47;
    // Bits 63:12 of the first half are reserved for every type.
    for kind in 0..4 {
        assert!(invpcid_is_valid(kind, 0, 0, off), "{kind}");
        assert!(invpcid_is_valid(kind, 0xfff, 0, on), "{kind}");
        assert!(!invpcid_is_valid(kind, 0x1000, 0, on), "{kind}");
        assert!(!invpcid_is_valid(kind, 1 << 63, 0, on), "{kind}");
    }
    // Without PCIDs there is none but 0, where it counts.
    assert!(!invpcid_is_valid(0, 1, 0, off));
    assert!(!invpcid_is_valid(1, 1, 0, off));
    assert!(invpcid_is_valid(2, 1, 0, off));
    assert!(invpcid_is_valid(3, 1, 0, off));
    // Only the first type has an address.
    assert!(!invpcid_is_valid(0, 0, high, on));
    assert!(invpcid_is_valid(0, 0, high, on | Cr4::LA57));
    assert!(invpcid_is_valid(0, 0, high.wrapping_neg(), on));
    assert!(invpcid_is_valid(1, 0, high, on));
    for kind in [4, 5, 1 << 32, u64::MAX] {
        assert!(!invpcid_is_valid(kind, 0, 0, on), "{kind:#x}");
    }
}

#[test]
fn cr0_bits_that_go_together() {
    let check = |bits: u64| check_cr0(Cr0::ET, Cr0::new(bits), Cr4::empty(), Efer::empty(), CODE32);
    for bits in [
        1 << 31, // PG without PE
        1 << 29, // NW without CD
        1 << 32,
        1 << 63,
    ] {
        assert_eq!(check(bits), Err(GP), "{bits:#x}");
    }
    for bits in [0, 1, 0x8000_0001, 0x6000_0010, 0x4000_0000] {
        let change = check(bits).unwrap();
        assert_eq!(change.cr0.bits(), bits | 0x10, "{bits:#x}");
    }
    // Reserved bits of the low half are dropped.
    assert_eq!(check(0x1fff_ffc0 | 1).unwrap().cr0.bits() & !0x5_0000, 0x11);
    // CET needs WP.
    let cet = check_cr0(Cr0::WP, Cr0::PE, Cr4::CET, Efer::empty(), CODE32);
    assert_eq!(cet, Err(GP));
}

#[test]
fn into_long_mode_and_out() {
    let pe = Cr0::PE | Cr0::ET;
    let on = pe | Cr0::PG;
    let lme = Efer::LME;
    let c = check_cr0(pe, on, Cr4::PAE, lme, CODE32).unwrap();
    assert_eq!(c.efer, Efer::LME | Efer::LMA);
    assert!(c.consequences.flush_tlb && !c.consequences.load_pdptes);
    assert_eq!(
        check_cr0(pe, on, Cr4::empty(), lme, CODE32),
        Err(GP),
        "no PAE"
    );
    assert_eq!(check_cr0(pe, on, Cr4::PAE, lme, CODE64), Err(GP), "CS.L");
    let lma = Efer::LME | Efer::LMA;
    let c = check_cr0(on, pe, Cr4::PAE, lma, CODE32).unwrap();
    assert_eq!(c.efer, Efer::LME);
    assert_eq!(
        check_cr0(on, pe, Cr4::PAE, lma, CODE64),
        Err(GP),
        "from 64-bit code"
    );
    assert_eq!(
        check_cr0(on, pe, Cr4::PAE | Cr4::PCIDE, lma, CODE32),
        Err(GP),
        "PCIDE"
    );
    // PAE without long mode loads the four entries.
    let c = check_cr0(pe, on, Cr4::PAE, Efer::empty(), CODE32).unwrap();
    assert!(c.consequences.load_pdptes && c.efer.is_empty());
    // Nothing changes, nothing follows.
    let c = check_cr0(on, on, Cr4::PAE, lma, CODE64).unwrap();
    assert_eq!(c.consequences, Consequences::default());
}

#[test]
fn machine_status_word() {
    let cr0 = Cr0::PG | Cr0::PE | Cr0::TS | Cr0::ET | Cr0::NE;
    assert_eq!(
        lmsw(cr0, 0),
        Cr0::PG | Cr0::PE | Cr0::ET | Cr0::NE,
        "PE stays"
    );
    assert_eq!(
        lmsw(Cr0::ET, 0xffff),
        Cr0::ET | Cr0::PE | Cr0::MP | Cr0::EM | Cr0::TS
    );
    assert_eq!(clts(cr0), cr0.without(Cr0::TS));
}

#[test]
fn cr3() {
    let f = features();
    let long = Efer::LME | Efer::LMA;
    let check = |value, cr4, efer| check_cr3(value, cr4, efer, &f);
    assert_eq!(
        check(0x12345, Cr4::PAE, long),
        Ok((Cr3::new(0x12345), true))
    );
    assert_eq!(check(1 << 40, Cr4::PAE, long), Err(GP));
    assert_eq!(check(1 << 63, Cr4::PAE, long), Err(GP));
    let pcide = Cr4::PAE | Cr4::PCIDE;
    assert_eq!(
        check((1 << 63) | 0x5007, pcide, long),
        Ok((Cr3::new(0x5007), false))
    );
    assert_eq!(check(0x5007, pcide, long), Ok((Cr3::new(0x5007), true)));
    assert_eq!(check(1 << 62, pcide, long), Err(GP));
    let c = Cr3::new(0x5fe7);
    assert_eq!((c.root(), c.pae_root(), c.pcid()), (0x5000, 0x5fe0, 0xfe7));

    assert!(pdptes_are_valid(
        &[0, 0x1001, u64::MAX - 1, 0xf_0000_0019],
        &f
    ));
    for bit in [1, 2, 5, 6, 7, 8, 40, 63] {
        assert!(!pdptes_are_valid(&[0, 0, 0, 1 | (1 << bit)], &f), "{bit}");
    }
}

#[test]
fn cr4() {
    let f = features();
    let long = Efer::LME | Efer::LMA;
    let pg = Cr0::PE | Cr0::PG | Cr0::WP;
    let check = |old, new, efer| check_cr4(old, new, pg, Cr3::new(0x1000), efer, &f);
    let pae = Cr4::PAE;
    assert!(check(pae, pae | Cr4::PGE, long).unwrap().flush_tlb);
    assert_eq!(check(pae, Cr4::empty(), long), Err(GP), "PAE in long mode");
    assert_eq!(
        check(pae, pae | Cr4::LA57, long),
        Err(GP),
        "LA57 in long mode"
    );
    assert!(check(pae, pae | Cr4::PCIDE, long).is_ok());
    assert_eq!(check(pae, pae | Cr4::PCIDE, Efer::empty()), Err(GP));
    let r = check_cr4(pae, pae | Cr4::PCIDE, pg, Cr3::new(0x1001), long, &f);
    assert_eq!(r, Err(GP), "an identifier is in CR3");
    // Leaving it flushes, entering does not.
    assert!(check(pae | Cr4::PCIDE, pae, long).unwrap().flush_tlb);
    assert!(!check(pae, pae | Cr4::PCIDE, long).unwrap().flush_tlb);
    for bit in [
        Cr4::VMXE,
        Cr4::SMXE,
        Cr4::CET,
        Cr4::PKS,
        Cr4::new(1 << 15),
        Cr4::new(1 << 63),
    ] {
        assert_eq!(check(pae, pae | bit, long), Err(GP), "{bit:?}");
    }
    for bit in [
        Cr4::SMEP,
        Cr4::SMAP,
        Cr4::OSXSAVE,
        Cr4::PKE,
        Cr4::UMIP,
        Cr4::FSGSBASE,
    ] {
        let r = check(pae, pae | bit, long).unwrap();
        assert_eq!(r.update_cpuid, bit == Cr4::OSXSAVE || bit == Cr4::PKE);
        let r = check_cr4(pae, pae | bit, pg, Cr3::new(0), long, &bare());
        assert_eq!(r, Err(GP), "{bit:?} without the feature");
    }
    assert!(check(Cr4::empty(), pae, Efer::empty()).unwrap().load_pdptes);
    assert!(
        !check(pae, pae | Cr4::TSD, Efer::empty())
            .unwrap()
            .load_pdptes
    );
    // What the guest owns needs no check that it could fail.
    let owned = cr4_guest_owned(&f);
    assert!(owned.without(f.cr4_allowed()).is_empty());
    assert!(!cr4_guest_owned(&bare()).has(Cr4::FSGSBASE));
}

#[test]
fn cr8_and_efer() {
    assert_eq!(check_cr8(15), Ok(15));
    assert_eq!(check_cr8(16), Err(GP));
    assert_eq!(check_cr8(1 << 63), Err(GP));

    let f = features();
    let off = Cr0::PE;
    let on = Cr0::PE | Cr0::PG;
    let check = |old, new, cr0| check_efer_write(old, new, cr0, &f);
    let none = Efer::empty();
    assert_eq!(
        check(none, Efer::LME | Efer::NXE | Efer::SCE, off),
        Ok(Efer::LME | Efer::NXE | Efer::SCE)
    );
    assert_eq!(check(none, Efer::LME, on), Err(GP));
    let lma = Efer::LME | Efer::LMA;
    assert_eq!(
        check(lma, Efer::LME | Efer::NXE, on),
        Ok(lma | Efer::NXE),
        "LMA stays"
    );
    assert_eq!(
        check(Efer::LME, lma, off),
        Ok(Efer::LME),
        "LMA is not to be set"
    );
    assert_eq!(check(none, Efer::SVME, off), Err(GP));
    assert_eq!(check(none, Efer::new(1 << 1), off), Err(GP));
    assert_eq!(check_efer_write(none, Efer::NXE, off, &bare()), Err(GP));
}

#[test]
fn xcr0() {
    let f = features();
    let ok = |bits| check_xsetbv(0, bits, &f) == Ok(Xcr0::new(bits));
    for (bits, expected) in [
        (1, true),
        (0, false),
        (2, false),
        (3, true),
        (5, false),
        (7, true),
        (0xe7, true),
        (0x67, false),
        (0x27, false),
        (0xe3, false),
        (0x1f, true),
        (0xf, false),
        (0x6_0003, true),
        (0x2_0003, false),
        (0x201, false), // no PKRU here
        ((1 << 63) | 1, false),
    ] {
        assert_eq!(ok(bits), expected, "{bits:#x}");
    }
    assert_eq!(check_xsetbv(1, 1, &f), Err(GP));
    assert!(xcr0_is_valid(Xcr0::X87, &bare()));
    assert!(!xcr0_is_valid(Xcr0::X87 | Xcr0::SSE, &bare()));
}

#[test]
fn debug_registers() {
    let none = Cr4::empty();
    assert_eq!(debug_register(3, none), Ok(DebugReg::Address(3)));
    assert_eq!(debug_register(4, none), Ok(DebugReg::Status));
    assert_eq!(debug_register(5, none), Ok(DebugReg::Control));
    assert_eq!(debug_register(6, Cr4::DE), Ok(DebugReg::Status));
    assert_eq!(debug_register(7, Cr4::DE), Ok(DebugReg::Control));
    assert_eq!(debug_register(4, Cr4::DE), Err(Fault::UD));
    assert_eq!(debug_register(5, Cr4::DE), Err(Fault::UD));
    assert_eq!(debug_register(8, none), Err(Fault::UD));
    assert_eq!(
        check_debug_write(DebugReg::Address(0), u64::MAX),
        Ok(u64::MAX)
    );
    assert_eq!(check_debug_write(DebugReg::Status, 0), Ok(0xffff_0ff0));
    assert_eq!(
        check_debug_write(DebugReg::Status, 0xffff_ffff),
        Ok(0xffff_efff)
    );
    assert_eq!(check_debug_write(DebugReg::Control, 0), Ok(0x400));
    assert_eq!(
        check_debug_write(DebugReg::Control, 0xffff_ffff),
        Ok(0xffff_27ff)
    );
    assert_eq!(check_debug_write(DebugReg::Status, 1 << 32), Err(GP));
    assert_eq!(check_debug_write(DebugReg::Control, 1 << 32), Err(GP));
}

#[test]
fn special_registers_together() {
    let f = features();
    let ok = |cr0, cr3, cr4, efer, cs| sregs_are_valid(cr0, cr3, cr4, efer, cs, &f);
    let none = (Cr4::empty(), Efer::empty());
    let pg = Cr0::PE | Cr0::PG;
    let lma = Efer::LME | Efer::LMA;
    assert!(ok(Cr0::ET, 0, none.0, none.1, SegAttr::RESET_CODE));
    assert!(ok(pg, 0x1000, Cr4::PAE, lma, CODE64));
    assert!(ok(pg, 0x1000, Cr4::PAE, Efer::empty(), CODE32));
    assert!(ok(Cr0::PE, 0, Cr4::PAE, Efer::LME, CODE32));
    assert!(!ok(pg, 0x1000, none.0, lma, CODE64), "no PAE");
    assert!(!ok(pg, 0x1000, Cr4::PAE, Efer::LME, CODE64), "no LMA");
    assert!(!ok(pg, 1 << 40, Cr4::PAE, lma, CODE64), "CR3 too wide");
    assert!(!ok(Cr0::PE, 0, Cr4::PAE, lma, CODE32), "LMA without paging");
    assert!(!ok(pg, 0, Cr4::PAE, none.1, CODE64), "L without long mode");
    assert!(!ok(Cr0::PG, 0, none.0, none.1, CODE32));
    assert!(!ok(Cr0::NW, 0, none.0, none.1, CODE32));
    assert!(!ok(Cr0::new(1 << 32), 0, none.0, none.1, CODE32));
    assert!(!ok(Cr0::PE, 0, Cr4::VMXE, none.1, CODE32));
    assert!(!ok(Cr0::PE, 0, Cr4::PCIDE, none.1, CODE32));
    assert!(!ok(Cr0::PE, 0, none.0, Efer::SVME, CODE32));
}

#[test]
fn msr_classes() {
    for (msr, class) in [
        (Msr::FS_BASE, Class::ControlStructure),
        (Msr::EFER, Class::ControlStructure),
        (Msr::PAT, Class::ControlStructure),
        (Msr::LSTAR, Class::Switched),
        (Msr::TSC, Class::Time),
        (Msr::TSC_DEADLINE, Class::LocalApic),
        (Msr(0x80b), Class::LocalApic),
        (Msr::PRED_CMD, Class::Command),
        (Msr::APIC_BASE, Class::Emulated),
        (Msr::MTRR_CAP, Class::Emulated),
        (Msr(0x20f), Class::Emulated),
        (Msr(0x210), Class::Unknown),
        (Msr(0x26f), Class::Emulated),
        (Msr(0x251), Class::Unknown),
        (Msr(0x900), Class::Unknown),
        (Msr(0x4b56_4d00), Class::Paravirtual),
        (Msr(0x4b56_4d09), Class::Unknown),
        (Msr(0x480), Class::Unknown),
        (Msr(u32::MAX), Class::Unknown),
    ] {
        assert_eq!(msr.class(), class, "{msr:x?}");
    }
    // Whatever is listed exists; the list has nothing twice.
    for (i, msr) in SAVED.iter().enumerate() {
        assert_ne!(msr.class(), Class::Unknown, "{msr:x?}");
        assert!(!SAVED[..i].contains(msr), "{msr:x?}");
        assert!(msr.is_listed(&features()));
    }
    assert!(!Msr::LSTAR.is_listed(&bare()) && Msr::SYSENTER_CS.is_listed(&bare()));
    // What passes through is nobody's invention.
    for n in 0..=u32::from(u16::MAX) {
        for msr in [Msr(n), Msr(0xc000_0000 | n)] {
            if msr.can_pass_through() {
                assert!(matches!(
                    msr.class(),
                    Class::ControlStructure | Class::Switched
                ));
            }
        }
    }
}

#[test]
fn msr_values() {
    let check = |msr, value, f: &GuestFeatures| check_value(msr, value, f, Cr4::empty(), false);
    let plain = GuestFeatures {
        flags: features().flags.without(Features::LA57),
        ..features()
    };
    for msr in [
        Msr::FS_BASE,
        Msr::GS_BASE,
        Msr::KERNEL_GS_BASE,
        Msr::LSTAR,
        Msr::CSTAR,
        Msr::SYSENTER_ESP,
        Msr::SYSENTER_EIP,
    ] {
        assert_eq!(
            check(msr, 0xffff_8000_0000_0000, &plain),
            Ok(0xffff_8000_0000_0000)
        );
        assert_eq!(check(msr, 1 << 47, &plain), Err(MsrError::Refused));
        assert_eq!(check(msr, 1 << 47, &features()), Ok(1 << 47), "57 bits");
        assert_eq!(check(msr, 1 << 57, &features()), Err(MsrError::Refused));
    }
    assert_eq!(check(Msr::STAR, u64::MAX, &plain), Ok(u64::MAX));
    assert_eq!(check(Msr::SYSENTER_CS, u64::MAX, &plain), Ok(0xffff_ffff));
    assert_eq!(
        check(Msr::SYSCALL_MASK, 1 << 32, &plain),
        Err(MsrError::Refused)
    );
    assert_eq!(check(Msr::TSC_AUX, 7, &plain), Ok(7));
    assert_eq!(check(Msr::TSC_AUX, 1 << 32, &plain), Err(MsrError::Refused));
    assert_eq!(check(Msr::TSC_AUX, 7, &bare()), Err(MsrError::Unknown));
    assert_eq!(
        check_value(Msr::TSC_AUX, 7, &bare(), Cr4::empty(), true),
        Ok(7)
    );
    assert_eq!(check(Msr::SPEC_CTRL, 7, &plain), Ok(7));
    assert_eq!(check(Msr::SPEC_CTRL, 8, &plain), Err(MsrError::Refused));
    assert_eq!(check(Msr::FLUSH_CMD, 1, &plain), Ok(1));
    assert_eq!(check(Msr::FLUSH_CMD, 3, &plain), Err(MsrError::Refused));
    assert_eq!(check(Msr::PRED_CMD, 1, &plain), Ok(1));
    assert_eq!(check(Msr::PRED_CMD, 2, &plain), Err(MsrError::Refused));
    assert_eq!(check(Msr::XSS, 0, &plain), Ok(0));
    assert_eq!(check(Msr::XSS, 1, &plain), Err(MsrError::Refused));
    assert_eq!(check(Msr::DEBUGCTL, 3, &plain), Ok(0));
    assert_eq!(check(Msr::DEBUGCTL, 1 << 6, &plain), Err(MsrError::Refused));
    assert_eq!(check(Msr::PAT, PAT_RESET, &plain), Ok(PAT_RESET));
    assert_eq!(check(Msr::PAT, 2, &plain), Err(MsrError::Refused));
    assert_eq!(check(Msr(0x1234), 0, &plain), Err(MsrError::Unknown));
    assert!(pat_is_valid(0x0706_0504_0100_0607));
    for bad in [2, 3, 8, 0x80] {
        assert!(!pat_is_valid(bad << 56), "{bad}");
    }
}

#[test]
fn memory_type_registers() {
    let f = features();
    let mut s = MsrState::new(true);
    assert_eq!(s.read(Msr::MTRR_CAP, &f, false), Ok(0x508));
    assert_eq!(
        s.write(Msr::MTRR_CAP, 0x508, &f, false),
        Err(MsrError::Refused)
    );
    assert_eq!(s.write(Msr::MTRR_CAP, 0x508, &f, true), Ok(Effect::None));
    let mut set = |n: u32, value: u64| s.write(Msr(n), value, &f, false).is_ok();
    for (n, value, ok) in [
        (0x2ff, 0xc06, true),
        (0x2ff, 0xc02, false),
        (0x2ff, 0x1000, false),
        (0x250, 0x0606_0606_0606_0606, true),
        (0x250, 0x0606_0606_0606_0602, false),
        (0x258, 0x0105_0400_0606_0606, true),
        (0x26f, 0x0700_0000_0000_0000, false),
        (0x200, 0xff_ffff_f006, true),
        (0x200, 0x100_0000_0006, false),
        (0x200, 0x106, false),
        (0x200, 3, false),
        (0x201, 0xff_ffff_f800, true),
        (0x201, 0xff_ffff_f400, false),
        (0x20e, 1, true),
        (0x20f, 0x800, true),
    ] {
        assert_eq!(set(n, value), ok, "{n:#x} = {value:#x}");
    }
    // What was refused changed nothing; each register is its own.
    for (n, value) in [
        (0x2ff, 0xc06),
        (0x250, 0x0606_0606_0606_0606),
        (0x258, 0x0105_0400_0606_0606),
        (0x259, 0),
        (0x268, 0),
        (0x26f, 0),
        (0x200, 0xff_ffff_f006),
        (0x201, 0xff_ffff_f800),
        (0x20e, 1),
        (0x20f, 0x800),
    ] {
        assert_eq!(s.read(Msr(n), &f, false), Ok(value), "{n:#x}");
    }
    let mut s = MsrState::new(true);
    let numbers = (0x200..0x210)
        .chain([0x250, 0x258, 0x259])
        .chain(0x268..0x270);
    for (i, n) in numbers.clone().enumerate() {
        // A value that every one of them takes and that tells them apart.
        let i = i as u64;
        let value = if n >= 0x250 {
            (i << 63 >> 63) | (((i >> 1) & 1) << 8)
        } else {
            i << 12
        };
        assert!(s.write(Msr(n), value, &f, false).is_ok(), "{n:#x}");
    }
    for (i, n) in numbers.enumerate() {
        let i = i as u64;
        let value = if n >= 0x250 {
            (i << 63 >> 63) | (((i >> 1) & 1) << 8)
        } else {
            i << 12
        };
        assert_eq!(s.read(Msr(n), &f, false), Ok(value), "{n:#x}");
    }
}

#[test]
fn the_base_of_the_local_apic() {
    let f = features();
    let no_x2apic = GuestFeatures {
        flags: f.flags.without(Features::X2APIC),
        ..f
    };
    let mut s = MsrState::new(true);
    assert_eq!(s.apic_base(), 0xfee0_0900);
    assert_eq!(MsrState::new(false).apic_base(), 0xfee0_0800);
    let mut set =
        |value: u64, f: &GuestFeatures, host| s.write(Msr::APIC_BASE, value, f, host).is_ok();
    for (value, ok) in [
        (0xfee0_0900 | (1 << 40), false),
        (0xfee0_0901, false),
        (0xfee0_0d00, true),  // x2APIC
        (0xfee0_0900, false), // not back to xAPIC
        (0xfee0_0500, false), // no such mode
        (0xfee0_0100, true),  // off
        (0xfee0_0d00, false), // not from off to x2APIC
        (0xfee0_0900, true),
        (0xfec0_0900, true),
    ] {
        assert_eq!(set(value, &f, false), ok, "{value:#x}");
    }
    assert!(!set(0xfee0_0d00, &no_x2apic, false));
    // A VMM goes where it likes, but not where nobody can be.
    assert!(!set(0xfee0_0d00, &no_x2apic, true));
    assert!(set(0xfee0_0900, &no_x2apic, true));
    assert!(!set(0xfee0_0500, &no_x2apic, true));
    assert!(s.apic_enabled());
}

#[test]
fn emulated_registers() {
    let f = features();
    let mut s = MsrState::new(true);
    // Read-only bits of MISC_ENABLE stay.
    assert_eq!(s.read(Msr::MISC_ENABLE, &f, false), Ok(0x1800));
    s.write(Msr::MISC_ENABLE, 0x1800 | (1 << 18) | (1 << 7), &f, false)
        .unwrap();
    assert_eq!(s.read(Msr::MISC_ENABLE, &f, false), Ok(0x1800 | (1 << 18)));
    assert!(s.has_mwait());
    for value in [0, 0x800, 0x1000] {
        let r = s.write(Msr::MISC_ENABLE, value, &f, false);
        assert_eq!(r, Err(MsrError::Refused));
    }
    s.write(Msr::MISC_ENABLE, 0x81, &f, true).unwrap();
    assert_eq!(s.read(Msr::MISC_ENABLE, &f, false), Ok(0x81));
    s.write(Msr::MISC_ENABLE, 0, &f, false).unwrap();
    assert_eq!(s.read(Msr::MISC_ENABLE, &f, false), Ok(0x80));
    s.write(Msr::MISC_ENABLE, 0x1801, &f, true).unwrap();
    // AMD's HWCR takes some bits, forgets some of those, and refuses the rest.
    s.write(Msr::K7_HWCR, (1 << 24) | (1 << 6), &f, false)
        .unwrap();
    assert_eq!(s.read(Msr::K7_HWCR, &f, false), Ok(1 << 24));
    assert!(s.write(Msr::K7_HWCR, 1 << 0, &f, true).is_err());
    assert_eq!(s.read(Msr::K7_HWCR, &f, false), Ok(1 << 24));
    // The dance of the microcode driver.
    s.write(Msr::UCODE_REV, 0, &f, false).unwrap();
    assert_eq!(s.read(Msr::UCODE_REV, &f, false), Ok(1 << 32));
    s.write(Msr::UCODE_REV, 5 << 32, &f, true).unwrap();
    assert_eq!(s.read(Msr::UCODE_REV, &f, false), Ok(5 << 32));
    // Faulting CPUID.
    assert!(!s.cpuid_faults(3));
    assert_eq!(
        s.write(Msr::MISC_FEATURES_ENABLES, 1, &f, false),
        Ok(Effect::CpuidFault)
    );
    assert!(s.cpuid_faults(3) && s.cpuid_faults(1) && !s.cpuid_faults(0));
    assert_eq!(
        s.write(Msr::MISC_FEATURES_ENABLES, 2, &f, false),
        Err(MsrError::Refused)
    );
    s.write(Msr::PLATFORM_INFO, 0, &f, true).unwrap();
    assert_eq!(
        s.write(Msr::MISC_FEATURES_ENABLES, 1, &f, false),
        Err(MsrError::Refused)
    );
    assert_eq!(
        s.write(Msr::PLATFORM_INFO, 0, &f, false),
        Err(MsrError::Refused)
    );
    // Only a VMM says what the processor is not vulnerable to.
    s.set_arch_capabilities(0x21);
    assert_eq!(s.read(Msr::ARCH_CAPABILITIES, &f, false), Ok(0x21));
    assert_eq!(
        s.read(Msr::ARCH_CAPABILITIES, &bare(), false),
        Err(MsrError::Unknown)
    );
    assert!(s.write(Msr::ARCH_CAPABILITIES, 0, &f, false).is_err());
    assert!(s.write(Msr::ARCH_CAPABILITIES, 0, &f, true).is_ok());
    assert_eq!(s.read(Msr(0x480), &f, true), Err(MsrError::Unknown));
    assert_eq!(s.write(Msr(0x480), 0, &f, true), Err(MsrError::Unknown));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    /// Every MSR of the emulated class can be read; no other number is answered here. Nothing panics.
    #[test]
    fn any_msr(number: u32, window in 0u32..3, value: u64, host: bool, cr4: u64) {
        let msr = Msr(match window { 0 => number & 0xfff, 1 => 0xc000_0000 | number & 0x1ff, _ => number });
        let mut s = MsrState::new(false);
        let readable = s.read(msr, &features(), true).is_ok();
        prop_assert_eq!(readable || msr == Msr::UCODE_WRITE, msr.class() == Class::Emulated, "{:x?}", msr);
        if s.write(msr, value, &features(), host).is_ok() {
            prop_assert_eq!(msr.class(), Class::Emulated);
        }
        let _ = check_value(msr, value, &features(), Cr4::new(cr4), host);
    }

    /// A state that CR0 and CR4 were let into is one that a VMM could restore.
    #[test]
    fn any_control_registers(old0: u64, new0: u64, old4: u64, new4: u64, efer: u64, cs: u32, flags: u64) {
        let f = GuestFeatures { flags: Features::new(flags), ..features() };
        let (old0, new0, old4, new4) = (Cr0::new(old0), Cr0::new(new0), Cr4::new(old4), Cr4::new(new4));
        let cs = SegAttr::from_vmx(cs);
        let efer = Efer::new(efer) & f.efer_allowed();
        if let Ok(c) = check_cr0(old0, new0, new4, efer, cs) {
            prop_assert!(!c.cr0.has(Cr0::PG) || c.cr0.has(Cr0::PE));
            prop_assert_eq!(c.cr0.bits() >> 32, 0);
        }
        if check_cr4(old4, new4, new0, Cr3::new(0), efer, &f).is_ok() {
            prop_assert!(new4.without(f.cr4_allowed()).is_empty());
        }
    }
}
