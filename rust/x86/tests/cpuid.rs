// SPDX-License-Identifier: GPL-2.0

//! The CPUID policy, tables and derived features.

use proptest::prelude::*;
use rkvm_x86::cpuid::features::Features;
use rkvm_x86::cpuid::features::GuestFeatures;
use rkvm_x86::cpuid::policy::supported;
use rkvm_x86::cpuid::policy::Policy;
use rkvm_x86::cpuid::policy::TooSmall;
use rkvm_x86::cpuid::table::CpuidTable;
use rkvm_x86::cpuid::table::RuntimeState;
use rkvm_x86::cpuid::table::TableError;
use rkvm_x86::cpuid::words::*;
use rkvm_x86::cpuid::CpuidEntry;
use rkvm_x86::cpuid::CpuidRegs;
use rkvm_x86::cpuid::XsaveLayout;
use rkvm_x86::cpuid::FLAG_SIGNIFICANT_INDEX;
use rkvm_x86::cpuid::MAX_ENTRIES;
use rkvm_x86::pv::PvFeatures;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Efer;
use rkvm_x86::regs::Xcr0;

fn regs(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidRegs {
    CpuidRegs { eax, ebx, ecx, edx }
}

const ALL: u32 = u32::MAX;

/// A host that has everything there is and will be: every feature bit set.
fn generous(leaf: u32, index: u32) -> CpuidRegs {
    match (leaf, index) {
        (0, _) => regs(0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
        (1, _) => regs(0x906ea, 0x0310_0800, ALL, ALL),
        (4, 0..=3) => regs(0x121 | index, 1, 2, 3),
        (4, _) => regs(0, 0, 0, 0),
        (7, 0) => regs(2, ALL, ALL, ALL),
        (7, _) => regs(ALL, ALL, ALL, ALL),
        (0xd, 0) => regs(0x602e7, 0x2b00, 0x2b00, 0),
        (0xd, 1) => regs(0x1f, 0x1000, 0x1900, 0),
        (0xd, 2) => regs(256, 576, 0, 0),
        (0xd, 5) => regs(64, 1088, 0, 0),
        (0xd, 6) => regs(512, 1152, 0, 0),
        (0xd, 7) => regs(1024, 1664, 0, 0),
        (0xd, 9) => regs(8, 2688, 0, 0),
        (0xd, 17) => regs(64, 2752, 2, 0),
        (0xd, 18) => regs(8192, 2816, 6, 0),
        (0xd, _) => regs(0, 0, 0, 0),
        (0x8000_0000, _) => regs(0x8000_0008, 0, 0, 0),
        (0x8000_0008, _) => regs(0x3934, ALL, ALL, ALL),
        _ => regs(ALL, ALL, ALL, ALL),
    }
}

const FULL: Policy = Policy {
    xcr0: Xcr0::new(0x2e7),
    invpcid: true,
    rdtscp: true,
    xsaves: true,
    fast_strings: true,
    pku: true,
    umip: true,
    spec_ctrl: true,
    arch_capabilities: true,
    tsc_adjust: true,
    kernel_apic: true,
    paravirtual: PvFeatures::NOP_IO_DELAY,
    mappable_bits: 48,
};

fn make(policy: &Policy, host: impl FnMut(u32, u32) -> CpuidRegs) -> Vec<CpuidEntry> {
    let mut entries = vec![CpuidEntry::default(); MAX_ENTRIES];
    let n = supported(policy, host, &mut entries).unwrap();
    entries.truncate(n);
    entries
}

fn find(entries: &[CpuidEntry], leaf: u32, index: u32) -> Option<CpuidRegs> {
    entries
        .iter()
        .find(|e| e.answers(leaf, index))
        .map(CpuidEntry::regs)
}

#[test]
fn the_policy_reports_only_what_it_knows() {
    let all = make(&FULL, generous);
    let l1 = find(&all, 1, 0).unwrap();
    let ecx = Leaf1Ecx::new(l1.ecx);
    assert!(ecx.has(Leaf1Ecx::HYPERVISOR | Leaf1Ecx::X2APIC | Leaf1Ecx::TSC_DEADLINE));
    assert!(ecx.has(Leaf1Ecx::AVX | Leaf1Ecx::XSAVE | Leaf1Ecx::PCID | Leaf1Ecx::MOVBE));
    assert!(!ecx.has_any(Leaf1Ecx::VMX | Leaf1Ecx::MONITOR | Leaf1Ecx::OSXSAVE | Leaf1Ecx::PDCM));
    assert_eq!(l1.ecx & !Leaf1Ecx::NAMED.bits(), 0);
    assert_eq!(l1.edx, Leaf1Edx::NAMED.bits());
    // Who is the VMM's to say.
    assert_eq!(l1.ebx, 0x0800);

    let l7 = find(&all, 7, 0).unwrap();
    assert_eq!(l7.eax, 1);
    assert!(!Leaf7Ebx::new(l7.ebx).has_any(Leaf7Ebx::HLE | Leaf7Ebx::RTM));
    assert!(Leaf7Ebx::new(l7.ebx).has(Leaf7Ebx::SMEP | Leaf7Ebx::AVX512 | Leaf7Ebx::INVPCID));
    assert!(!Leaf7Ecx::new(l7.ecx).has_any(Leaf7Ecx::OSPKE));
    assert!(Leaf7Ecx::new(l7.ecx).has(Leaf7Ecx::LA57 | Leaf7Ecx::PKU | Leaf7Ecx::UMIP));
    assert_eq!(l7.ecx & !Leaf7Ecx::NAMED.bits(), 0);
    assert_eq!(l7.edx & !Leaf7Edx::NAMED.bits(), 0);
    assert!(find(&all, 7, 1).is_some() && find(&all, 7, 2).is_none());

    assert_eq!(find(&all, 6, 0), Some(regs(4, 0, 0, 0)));
    for leaf in [3, 5, 9, 0xa, 0xb, 0xf, 0x10, 0x12, 0x14, 0x15, 0x16, 0x1f] {
        assert_eq!(find(&all, leaf, 0), Some(CpuidRegs::default()), "{leaf:#x}");
    }
    assert_eq!(find(&all, 0, 0).unwrap().eax, 0x1f);
    assert_eq!(find(&all, 0x20, 0), None);
    // Caches: four and the end.
    assert_eq!(all.iter().filter(|e| e.function == 4).count(), 5);
    assert!(all.iter().all(|e| (e.flags == FLAG_SIGNIFICANT_INDEX)
        == matches!(
            e.function,
            4 | 7 | 0xb | 0xd | 0xf | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1d | 0x1e | 0x1f
        )));

    assert_eq!(
        find(&all, 0x4000_0000, 0),
        Some(regs(0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d))
    );
    assert_eq!(find(&all, 0x4000_0001, 0), Some(regs(2, 0, 0, 0)));
    assert_eq!(find(&all, 0x8000_0007, 0), Some(regs(0, 0, 0, 0x100)));
    // 52 bits there are, 48 can be mapped; linear addresses have 57.
    assert_eq!(find(&all, 0x8000_0008, 0).unwrap().eax, 0x30_3934);
    let e1 = find(&all, 0x8000_0001, 0).unwrap();
    assert!(!Ext1Ecx::new(e1.ecx).has_any(Ext1Ecx::SVM));
    assert!(
        Ext1Edx::new(e1.edx).has(Ext1Edx::LM | Ext1Edx::NX | Ext1Edx::GBPAGES | Ext1Edx::SYSCALL)
    );
}

#[test]
fn the_policy_follows_the_backend() {
    let none = make(&Policy::default(), generous);
    let ecx = Leaf1Ecx::new(find(&none, 1, 0).unwrap().ecx);
    assert!(!ecx.has_any(
        Leaf1Ecx::X2APIC | Leaf1Ecx::TSC_DEADLINE | Leaf1Ecx::XSAVE | Leaf1Ecx::AVX | Leaf1Ecx::FMA
    ));
    assert!(ecx.has(Leaf1Ecx::HYPERVISOR));
    let l7 = find(&none, 7, 0).unwrap();
    assert!(!Leaf7Ebx::new(l7.ebx)
        .has_any(Leaf7Ebx::INVPCID | Leaf7Ebx::AVX2 | Leaf7Ebx::AVX512 | Leaf7Ebx::TSC_ADJUST));
    assert!(!Leaf7Ecx::new(l7.ecx)
        .has_any(Leaf7Ecx::PKU | Leaf7Ecx::UMIP | Leaf7Ecx::RDPID | Leaf7Ecx::VAES));
    assert!(!Leaf7Edx::new(l7.edx).has_any(Leaf7Edx::SPECULATION | Leaf7Edx::ARCH_CAPABILITIES));
    assert!(!Ext1Edx::new(find(&none, 0x8000_0001, 0).unwrap().edx).has_any(Ext1Edx::RDTSCP));
    assert_eq!(find(&none, 0xd, 0), Some(CpuidRegs::default()));
    assert_eq!(find(&none, 0xd, 1), None);

    // What the host lacks is not invented, but for what is emulated.
    let poor = make(&FULL, |leaf, _| match leaf {
        0 => regs(7, 0, 0, 0),
        0x8000_0000 => regs(0x8000_0001, 0, 0, 0),
        _ => regs(0, 0, 0, 0),
    });
    let l1 = find(&poor, 1, 0).unwrap();
    assert_eq!(
        Leaf1Ecx::new(l1.ecx),
        Leaf1Ecx::HYPERVISOR | Leaf1Ecx::X2APIC | Leaf1Ecx::TSC_DEADLINE
    );
    assert_eq!(l1.edx, 0);
    assert_eq!(find(&poor, 7, 0), Some(regs(0, 2, 0, 0)));
    assert_eq!(find(&poor, 0xd, 0), None);
}

#[test]
fn extended_state() {
    let all = make(&FULL, generous);
    // AMX is left out, and PKRU is in.
    assert_eq!(find(&all, 0xd, 0), Some(regs(0x2e7, 2696, 2696, 0)));
    // Compacted, the hole of MPX goes: 576 + 256 + 64 + 512 + 1024 + 8.
    assert_eq!(find(&all, 0xd, 1), Some(regs(0xf, 2440, 0, 0)));
    let subleaves: Vec<u32> = all
        .iter()
        .filter(|e| e.function == 0xd)
        .map(|e| e.index)
        .collect();
    assert_eq!(subleaves, [0, 1, 2, 5, 6, 7, 9]);

    let layout = XsaveLayout::from_host(generous);
    assert_eq!(layout.size(Xcr0::X87, false), 576);
    assert_eq!(layout.size(Xcr0::X87 | Xcr0::SSE | Xcr0::AVX, false), 832);
    assert_eq!(layout.size(Xcr0::PKRU, false), 2696);
    assert_eq!(layout.size(Xcr0::PKRU, true), 584);
    // The tiles are aligned: after PKRU at 584 comes 640.
    assert_eq!(layout.size(Xcr0::PKRU | Xcr0::XTILECFG, true), 704);
}

#[test]
fn too_small_is_told() {
    let n = make(&FULL, generous).len();
    for len in 0..n {
        let mut entries = vec![CpuidEntry::default(); len];
        assert_eq!(supported(&FULL, generous, &mut entries), Err(TooSmall));
    }
    let mut entries = vec![CpuidEntry::default(); n];
    assert_eq!(supported(&FULL, generous, &mut entries), Ok(n));
}

fn entry(function: u32, index: u32, flags: u32, eax: u32) -> CpuidEntry {
    CpuidEntry {
        function,
        index,
        flags,
        eax,
        ..CpuidEntry::default()
    }
}

fn intel(last: u32) -> CpuidEntry {
    CpuidEntry {
        ebx: 0x756e_6547,
        ecx: 0x6c65_746e,
        edx: 0x4965_6e69,
        ..entry(0, 0, 0, last)
    }
}

#[test]
fn lookups() {
    let mut entries = vec![
        entry(0x8000_0001, 0, 0, 5),
        entry(4, 1, 1, 41),
        entry(4, 0, 1, 40),
        entry(4, 0, 1, 99),
        intel(0xd),
        entry(0xd, 0, 1, 130),
        entry(0xd, 7, 1, 137),
        entry(0x8000_0000, 0, 0, 0x8000_0001),
        entry(0x4000_0000, 0, 0, 0x4000_0001),
        entry(0x4000_0001, 0, 0, 6),
        entry(3, 17, 0, 30),
    ];
    let given = entries.clone();
    let table = CpuidTable::new(&mut entries[..]).unwrap();
    assert_eq!(table.entries(), given);
    for (function, index, eax) in [
        (4, 0, 40),
        (4, 1, 41),
        (4, 2, 0),
        (3, 0, 30),
        (3, 17, 30),
        (1, 0, 0),
        (0x8000_0001, 3, 5),
        (0x4000_0001, 0, 6),
        // Beyond the end of their classes, or of no class: the last basic leaf, with the subleaf asked for.
        (0xe, 0, 130),
        (0xe, 7, 137),
        (0x1234, 1, 0),
        (0x8000_0002, 0, 130),
        (0x4000_0002, 0, 130),
        (0x4000_0100, 7, 137),
        (0xc000_0000, 0, 130),
        (0xffff_ffff, 0, 130),
        (0x7fff_ffff, 0, 130),
    ] {
        assert_eq!(
            table.lookup(function, index).eax,
            eax,
            "{function:#x}.{index}"
        );
    }
}

#[test]
fn amd_has_no_redirection() {
    let mut amd = entry(0, 0, 0, 1);
    (amd.ebx, amd.edx, amd.ecx) = (0x6874_7541, 0x6974_6e65, 0x444d_4163);
    let mut entries = [amd, entry(1, 0, 0, 7)];
    let table = CpuidTable::new(&mut entries[..]).unwrap();
    assert_eq!(table.lookup(2, 0), CpuidRegs::default());
    assert_eq!(table.lookup(1, 0).eax, 7);
}

#[test]
fn topology_beyond_its_end() {
    let mut level = entry(0xb, 1, 1, 4);
    level.edx = 3;
    let mut entries = [intel(0xb), entry(0xb, 0, 1, 1), level];
    let table = CpuidTable::new(&mut entries[..]).unwrap();
    assert_eq!(table.lookup(0xb, 1).eax, 4);
    assert_eq!(table.lookup(0xb, 0x1_0205), regs(0, 0, 5, 3));
    // And when the leaf stands in for one out of range.
    assert_eq!(table.lookup(0x77, 2), regs(0, 0, 2, 3));
}

#[test]
fn tables_that_are_refused() {
    let mut entries = vec![CpuidEntry::default(); MAX_ENTRIES + 1];
    assert_eq!(
        CpuidTable::new(&mut entries[..]).err(),
        Some(TableError::TooMany)
    );
    for (width, ok) in [
        (0, true),
        (48, true),
        (57, true),
        (47, false),
        (64, false),
        (255, false),
    ] {
        let mut entries = [entry(0x8000_0008, 0, 0, width << 8)];
        assert_eq!(CpuidTable::new(&mut entries[..]).is_ok(), ok, "{width}");
    }
    let table = CpuidTable::new(Vec::<CpuidEntry>::new().leak()).unwrap();
    assert_eq!(table.lookup(0, 0), CpuidRegs::default());
}

#[test]
fn runtime_bits_follow() {
    let mut entries = make(&FULL, generous);
    let layout = XsaveLayout::from_host(generous);
    let mut table = CpuidTable::new(&mut entries[..]).unwrap();
    let os = |t: &CpuidTable<&mut [CpuidEntry]>| {
        (
            Leaf1Ecx::new(t.lookup(1, 0).ecx).has(Leaf1Ecx::OSXSAVE),
            Leaf7Ecx::new(t.lookup(7, 0).ecx).has(Leaf7Ecx::OSPKE),
            Leaf1Edx::new(t.lookup(1, 0).edx).has(Leaf1Edx::APIC),
        )
    };
    let mut state = RuntimeState {
        xcr0: Xcr0::X87,
        ..RuntimeState::default()
    };
    table.update(&state, &layout);
    assert_eq!(os(&table), (false, false, true));
    assert_eq!(table.lookup(0xd, 0).ebx, 576);
    state.cr4 = Cr4::OSXSAVE | Cr4::PKE;
    state.xcr0 = Xcr0::X87 | Xcr0::SSE | Xcr0::AVX;
    state.apic_enabled = Some(false);
    table.update(&state, &layout);
    assert_eq!(os(&table), (true, true, false));
    assert_eq!(
        (table.lookup(0xd, 0).ebx, table.lookup(0xd, 1).ebx),
        (832, 832)
    );
    // ECX, the size of everything, stays.
    assert_eq!(table.lookup(0xd, 0).ecx, 2696);
    state.cr4 = Cr4::empty();
    state.apic_enabled = Some(true);
    table.update(&state, &layout);
    assert_eq!(os(&table), (false, false, true));

    // A guest that has no XSAVE does not get the bit.
    let mut entries = [entry(1, 0, 0, 0)];
    let mut table = CpuidTable::new(&mut entries[..]).unwrap();
    state.cr4 = Cr4::OSXSAVE;
    table.update(&state, &layout);
    assert_eq!(table.lookup(1, 0).ecx, 0);

    // MONITOR is the VMM's, or follows the MSR.
    for (given, enabled, wanted) in [
        (true, None, true),
        (false, None, false),
        (true, Some(false), false),
        (false, Some(true), true),
    ] {
        let ecx = Leaf1Ecx::empty().with_if(Leaf1Ecx::MONITOR, given);
        let mut entries = [entry(1, 0, 0, 0)];
        entries[0].ecx = ecx.bits();
        let mut table = CpuidTable::new(&mut entries[..]).unwrap();
        state.mwait_enabled = enabled;
        table.update(&state, &layout);
        let ecx = Leaf1Ecx::new(table.lookup(1, 0).ecx);
        assert_eq!(ecx.has(Leaf1Ecx::MONITOR), wanted);
    }
}

#[test]
fn derived_features() {
    let host = make(&FULL, generous);
    let all = GuestFeatures::derive(|f, i| find(&host, f, i));
    assert_eq!(all.maxphyaddr, 52);
    assert_eq!(all.xcr0, Xcr0::new(0x2e7));
    assert!(
        all.has(Features::XSAVE | Features::SMEP | Features::LA57 | Features::PCID | Features::LM)
    );
    assert!(all
        .cr4_allowed()
        .has(Cr4::SMEP | Cr4::LA57 | Cr4::OSXSAVE | Cr4::PCIDE | Cr4::UMIP));
    assert!(!all.cr4_allowed().has_any(Cr4::VMXE | Cr4::SMXE | Cr4::CET));
    assert_eq!(
        all.efer_allowed(),
        Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE | Efer::FFXSR
    );

    let none = GuestFeatures::derive(|_, _| None);
    assert_eq!(none, GuestFeatures::default());
    assert_eq!(none.maxphyaddr, 36);
    assert_eq!(none.reserved_gpa_bits(), !0 << 36);
    assert!(!none
        .cr4_allowed()
        .has_any(Cr4::SMEP | Cr4::OSXSAVE | Cr4::PCIDE));
    assert!(none.cr4_allowed().has(Cr4::PAE | Cr4::PGE | Cr4::PSE));
    assert_eq!(none.efer_allowed(), Efer::empty());

    // A VMM that promises more than there is.
    assert_eq!(all.limited_to(&none).flags, Features::empty());
    assert_eq!(all.limited_to(&none).maxphyaddr, 52);
    // The width needs the leaf to be in range.
    for (last, eax, width) in [
        (0x8000_0008, 40, 40),
        (0x8000_0007, 40, 36),
        (0x8000_0008, 255, 52),
        (0x8000_0008, 0, 32),
    ] {
        let f = GuestFeatures::derive(|function, _| match function {
            0x8000_0000 => Some(regs(last, 0, 0, 0)),
            0x8000_0008 => Some(regs(eax, 0, 0, 0)),
            _ => None,
        });
        assert_eq!(f.maxphyaddr, width);
    }
}

/// The plain way: the first entry that answers.
fn slow(entries: &[CpuidEntry], function: u32, index: u32) -> Option<usize> {
    entries.iter().position(|e| e.answers(function, index))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// The index finds what a search from the first entry finds, in any table.
    #[test]
    fn any_table(
        raw in prop::collection::vec((0usize..12, 0u32..4, 0u32..2, any::<u32>(), any::<[u32; 3]>()), 0..=256),
        questions in prop::collection::vec((0usize..12, 0u32..5), 1..50),
        cr4: u64, xcr0: u64, xss: u64,
    ) {
        const LEAVES: [u32; 12] = [
            0, 1, 4, 7, 0xd, 0xb, 0x4000_0000, 0x8000_0000, 0x8000_0008, 0xc000_0000, 0x4d, u32::MAX,
        ];
        let mut entries: Vec<CpuidEntry> = raw
            .iter()
            .map(|&(f, index, flags, eax, [ebx, ecx, edx])| CpuidEntry {
                ebx, ecx, edx, ..entry(LEAVES[f], index, flags, eax)
            })
            .collect();
        let given = entries.clone();
        let Ok(mut table) = CpuidTable::new(&mut entries[..]) else {
            return Ok(());
        };
        for (f, index) in questions {
            let found = table.find(LEAVES[f], index);
            prop_assert_eq!(found, slow(&given, LEAVES[f], index).map(|i| &given[i]));
            if let Some(found) = found {
                prop_assert_eq!(table.lookup(LEAVES[f], index), found.regs());
            }
            let _ = table.lookup(LEAVES[f].wrapping_add(index), index);
        }
        let layout = XsaveLayout::from_host(|_, i| regs(!i, !i, !i, !i));
        let state = RuntimeState {
            cr4: Cr4::new(cr4), xcr0: Xcr0::new(xcr0), xss, apic_enabled: Some(cr4 & 1 != 0),
            mwait_enabled: Some(cr4 & 2 != 0),
        };
        table.update(&state, &layout);
        let f = GuestFeatures::derive(|f, i| table.find(f, i).map(CpuidEntry::regs));
        prop_assert!((32..=52).contains(&f.maxphyaddr));
        let _ = f.cr4_allowed();
        let _ = f.efer_allowed();
    }

    /// A host may say anything: what is supported ends, and stays within the names.
    #[test]
    fn any_host(seed: u64, xcr0: u64, mappable_bits: u8) {
        let policy = Policy { xcr0: Xcr0::new(xcr0), mappable_bits, ..FULL };
        let host = |leaf: u32, index: u32| {
            let x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ (u64::from(leaf) << 32) ^ u64::from(index));
            regs(x as u32, (x >> 16) as u32, (x >> 32) as u32, (x >> 8) as u32)
        };
        let mut entries = vec![CpuidEntry::default(); 256];
        if let Ok(n) = supported(&policy, host, &mut entries) {
            prop_assert!(n > 0 && n <= 256);
            if let Some(l1) = find(&entries[..n], 1, 0) {
                prop_assert!(!Leaf1Ecx::new(l1.ecx).has_any(Leaf1Ecx::VMX | Leaf1Ecx::MONITOR));
            }
        }
    }
}
