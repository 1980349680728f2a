// SPDX-License-Identifier: GPL-2.0

//! The walk of the guest's page tables, in every format.

mod common;

use common::TestMemory;
use common::RAM;
use proptest::prelude::*;
use rkvm_x86::exception::PfError;
use rkvm_x86::paging::GuestMemory;
use rkvm_x86::paging::MemoryError;
use rkvm_x86::paging::PageAccess;
use rkvm_x86::paging::Paging;
use rkvm_x86::paging::WalkError;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr3;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Efer;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::AccessKind;
use AccessKind::Fetch;
use AccessKind::Read;
use AccessKind::Write;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const NX: u64 = 1 << 63;
const PWU: u64 = P | W | U;

const ROOT: u64 = 0x10000;
const TABLE: [u64; 5] = [0x10000, 0x11000, 0x12000, 0x13000, 0x14000];

fn paging(cr4: Cr4, efer: Efer) -> Paging {
    Paging {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP,
        cr3: Cr3::new(ROOT),
        cr4,
        efer,
        rflags: Rflags::FIXED,
        pkru: 0,
        maxphyaddr: 46,
        gbpages: true,
        pdptes: None,
    }
}

fn long() -> Paging {
    paging(Cr4::PAE, Efer::LME | Efer::LMA | Efer::NXE)
}

fn pae() -> Paging {
    paging(Cr4::PAE, Efer::NXE)
}

fn bits32() -> Paging {
    paging(Cr4::PSE, Efer::empty())
}

fn access(kind: AccessKind, user: bool) -> PageAccess {
    PageAccess::explicit(kind, if user { 3 } else { 0 })
}

/// Tables of 8-byte entries from the root down, one entry each for this address, with the leaf last.
fn map(memory: &mut TestMemory, linear: u64, leaf: u64, levels: usize, top: usize) -> Vec<u64> {
    let mut slots = Vec::new();
    for i in 0..levels {
        let shift = 12 + 9 * (top - 1 - i);
        let slot = TABLE[i] + 8 * ((linear >> shift) & 511);
        let entry = if i == levels - 1 {
            leaf
        } else {
            TABLE[i + 1] | PWU
        };
        memory.put64(slot, entry);
        slots.push(slot);
    }
    slots
}

fn fault(r: Result<rkvm_x86::paging::Translation, WalkError<common::Lost>>) -> PfError {
    match r {
        Err(WalkError::Fault(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn off() {
    let mut memory = TestMemory::default();
    let mut p = long();
    p.cr0 = Cr0::PE;
    let t = p
        .translate(&mut memory, 0x1234, access(Write, true))
        .unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x1234, 12));
    assert_eq!(memory.writes, 0);
}

#[test]
fn four_levels_and_five() {
    let linear = 0xffff_8123_4567_8abc & !(1 << 40);
    for (top, cr4) in [(4, Cr4::PAE), (5, Cr4::PAE | Cr4::LA57)] {
        for (levels, shift, flags) in [(top, 12, 0), (top - 1, 21, PS), (top - 2, 30, PS)] {
            let mut memory = TestMemory::default();
            let mut p = long();
            p.cr4 = cr4;
            let frame = 0x2a_c000_0000u64 & !((1 << shift) - 1);
            let slots = map(&mut memory, linear, frame | PWU | flags, levels, top);
            let t = p
                .translate(&mut memory, linear, access(Read, true))
                .unwrap();
            assert_eq!(t.gpa, frame | linear & ((1 << shift) - 1));
            assert_eq!(t.page_shift, shift);
            assert!(t.user && t.writable);
            // Every entry is accessed, none dirty; then the last is.
            for &slot in &slots {
                assert_eq!(memory.get64(slot) & (A | D), A);
            }
            p.translate(&mut memory, linear, access(Write, true))
                .unwrap();
            for &slot in &slots {
                let dirty = slot == *slots.last().unwrap();
                assert_eq!(memory.get64(slot) & (A | D), if dirty { A | D } else { A });
            }
            // What is set is not set again.
            let writes = memory.writes;
            p.translate(&mut memory, linear, access(Write, true))
                .unwrap();
            assert_eq!(memory.writes, writes);
        }
    }
}

#[test]
fn pae_walk() {
    let linear = 0xc345_6789;
    let mut memory = TestMemory::default();
    let mut p = pae();
    // The table of four is 32-byte aligned, not page-aligned.
    p.cr3 = Cr3::new(ROOT + 0x60);
    memory.put64(ROOT + 0x60 + 8 * 3, TABLE[1] | P);
    memory.put64(TABLE[1] + 8 * ((linear >> 21) & 511), TABLE[2] | PWU);
    memory.put64(TABLE[2] + 8 * ((linear >> 12) & 511), 0x3f_ffff_f000 | PWU);
    let t = p
        .translate(&mut memory, linear, access(Write, true))
        .unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x3f_ffff_f789, 12));
    // Its entries have no accessed bit.
    assert_eq!(memory.get64(ROOT + 0x60 + 24), TABLE[1] | P);
    memory.put64(
        TABLE[1] + 8 * ((linear >> 21) & 511),
        0x4000_0000 | PWU | PS,
    );
    let t = p
        .translate(&mut memory, linear, access(Write, true))
        .unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x4005_6789, 21));
    for reserved in [W, U, A, D, PS, 1 << 8, 1 << 46, NX] {
        memory.put64(ROOT + 0x60 + 24, TABLE[1] | P | reserved);
        let e = fault(p.translate(&mut memory, linear, access(Read, false)));
        assert_eq!(e, PfError::P | PfError::RSVD, "{reserved:#x}");
    }
}

#[test]
fn thirty_two_bits() {
    let linear = 0xc345_6789u64;
    let mut memory = TestMemory::default();
    let mut p = bits32();
    let pde = ROOT + 4 * (linear >> 22);
    let pte = TABLE[1] + 4 * ((linear >> 12) & 1023);
    memory.put32(pde, (TABLE[1] | PWU) as u32);
    memory.put32(pte, 0xfedc_b007);
    let t = p
        .translate(&mut memory, linear, access(Write, true))
        .unwrap();
    assert_eq!((t.gpa, t.page_shift), (0xfedc_b789, 12));
    assert_eq!(memory.get32(pde), (TABLE[1] | PWU | A) as u32);
    assert_eq!(memory.get32(pte), 0xfedc_b067);
    // 4 MiB, with address bits 32 to 39 in bits 13 to 20.
    memory.put32(pde, 0x4000_0000 | (PWU | PS) as u32 | (0x5 << 13));
    let t = p
        .translate(&mut memory, linear, access(Write, true))
        .unwrap();
    assert_eq!(
        (t.gpa, t.page_shift),
        (0x5_4005_6789 | (linear & 0x3f_0000), 22)
    );
    // Bit 21 is reserved, and those that address no memory.
    memory.put32(pde, 0x4020_0000 | (PWU | PS) as u32);
    let rsvd = PfError::P | PfError::RSVD;
    assert_eq!(
        fault(p.translate(&mut memory, linear, access(Read, false))),
        rsvd
    );
    p.maxphyaddr = 36;
    memory.put32(pde, 0x4000_0000 | (PWU | PS) as u32 | (1 << 17));
    assert_eq!(
        fault(p.translate(&mut memory, linear, access(Read, false))),
        rsvd
    );
    memory.put32(pde, 0x4000_0000 | (PWU | PS) as u32 | (1 << 16));
    assert_eq!(
        p.translate(&mut memory, linear, access(Read, false))
            .unwrap()
            .gpa
            >> 32,
        8
    );
    // Without PSE the bit means nothing.
    p.cr4 = Cr4::empty();
    memory.put32(pde, (TABLE[1] | PWU | PS) as u32);
    let t = p
        .translate(&mut memory, linear, access(Read, false))
        .unwrap();
    assert_eq!(t.page_shift, 12);
}

/// One page with these bits at each level: the error code, or none.
fn judge(p: &Paging, upper: u64, leaf: u64, a: PageAccess) -> Option<PfError> {
    let mut memory = TestMemory::default();
    let slots = map(&mut memory, 0x5000, 0x8000 | leaf, 4, 4);
    for slot in &slots[..3] {
        let entry = memory.get64(*slot) & !(PWU | NX) | upper;
        memory.put64(*slot, entry);
    }
    let before = memory.ram.clone();
    match p.translate(&mut memory, 0x5000, a) {
        Ok(t) => {
            assert_eq!(t.gpa, 0x8000);
            None
        }
        Err(WalkError::Fault(error)) => {
            assert_eq!(memory.ram, before, "a fault sets no bit");
            Some(error)
        }
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn rights() {
    let (ew, eu, ep, ei) = (PfError::W, PfError::U, PfError::P, PfError::I);
    let p = long();
    for (upper, leaf, kind, user, error) in [
        (PWU, PWU, Read, true, None),
        (PWU, PWU, Write, true, None),
        (PWU, PWU, Fetch, true, None),
        (PWU, P | U, Write, true, Some(ep | ew | eu)),
        (P | U, PWU, Write, true, Some(ep | ew | eu)),
        (PWU, P | W, Read, true, Some(ep | eu)),
        (P | W, PWU, Read, true, Some(ep | eu)),
        (P | W, PWU, Read, false, None),
        (PWU, P | U, Write, false, Some(ep | ew)),
        (PWU, P | U, Read, false, None),
        (PWU, PWU | NX, Read, true, None),
        (PWU, PWU | NX, Fetch, true, Some(ep | eu | ei)),
        (PWU | NX, PWU, Fetch, false, Some(ep | ei)),
        (PWU, 0, Read, false, Some(PfError::empty())),
        (0, PWU, Write, true, Some(ew | eu)),
        (PWU, 0, Fetch, true, Some(eu | ei)),
    ] {
        assert_eq!(
            judge(&p, upper, leaf, access(kind, user)),
            error,
            "{upper:x} {leaf:x} {kind:?} {user}"
        );
    }

    // Without WP the supervisor writes where it likes; the user does not.
    let mut q = p;
    q.cr0 = Cr0::PE | Cr0::PG;
    assert_eq!(judge(&q, PWU, P | U, access(Write, false)), None);
    assert_eq!(
        judge(&q, PWU, P | U, access(Write, true)),
        Some(ep | ew | eu)
    );

    // Without NXE bit 63 is reserved, and fetches are not told.
    let mut q = p;
    q.efer = Efer::LME | Efer::LMA;
    assert_eq!(
        judge(&q, PWU, PWU | NX, access(Read, false)),
        Some(ep | PfError::RSVD)
    );
    assert_eq!(judge(&q, PWU, P | W, access(Fetch, true)), Some(ep | eu));
}

#[test]
fn smep_and_smap() {
    let (ew, ep, ei) = (PfError::W, PfError::P, PfError::I);
    let mut p = long();
    p.cr4 |= Cr4::SMEP | Cr4::SMAP;
    let implicit = PageAccess::implicit(Read);
    assert_eq!(judge(&p, PWU, PWU, access(Fetch, false)), Some(ep | ei));
    assert_eq!(judge(&p, PWU, P | W, access(Fetch, false)), None);
    assert_eq!(judge(&p, PWU, PWU, access(Fetch, true)), None);
    assert_eq!(judge(&p, PWU, PWU, access(Read, false)), Some(ep));
    assert_eq!(judge(&p, PWU, PWU, access(Write, false)), Some(ep | ew));
    assert_eq!(judge(&p, PWU, P | W, access(Read, false)), None);
    assert_eq!(judge(&p, PWU, PWU, implicit), Some(ep));
    // STAC permits explicit accesses only.
    p.rflags |= Rflags::AC;
    assert_eq!(judge(&p, PWU, PWU, access(Read, false)), None);
    assert_eq!(judge(&p, PWU, PWU, implicit), Some(ep));
    assert_eq!(judge(&p, PWU, PWU, access(Fetch, false)), Some(ep | ei));
    // SMEP makes fetches tell, with or without NX.
    p.efer = Efer::LME | Efer::LMA;
    assert_eq!(
        judge(&p, PWU, P, access(Fetch, true)),
        Some(ep | ei | PfError::U)
    );
}

#[test]
fn protection_keys() {
    let mut p = long();
    p.cr4 |= Cr4::PKE;
    let key = 5u64 << 59;
    let (ep, ew, eu, epk) = (PfError::P, PfError::W, PfError::U, PfError::PK);
    // Access disabled.
    p.pkru = 1 << 10;
    assert_eq!(
        judge(&p, PWU, PWU | key, access(Read, true)),
        Some(ep | eu | epk)
    );
    assert_eq!(
        judge(&p, PWU, PWU | key, access(Read, false)),
        Some(ep | epk)
    );
    assert_eq!(judge(&p, PWU, PWU | key, access(Fetch, true)), None);
    assert_eq!(
        judge(&p, PWU, P | W | key, access(Read, false)),
        None,
        "a supervisor page"
    );
    assert_eq!(judge(&p, PWU, PWU, access(Read, true)), None, "another key");
    // Write disabled.
    p.pkru = 2 << 10;
    assert_eq!(judge(&p, PWU, PWU | key, access(Read, true)), None);
    assert_eq!(
        judge(&p, PWU, PWU | key, access(Write, true)),
        Some(ep | ew | eu | epk)
    );
    assert_eq!(
        judge(&p, PWU, P | U | key, access(Write, true)),
        Some(ep | ew | eu | epk),
        "not writable either"
    );
    p.cr0 = Cr0::PE | Cr0::PG;
    assert_eq!(
        judge(&p, PWU, PWU | key, access(Write, false)),
        None,
        "no WP"
    );
    p.cr4 = Cr4::PAE;
    assert_eq!(
        judge(&p, PWU, PWU | key, access(Write, true)),
        None,
        "no PKE"
    );
}

#[test]
fn reserved_bits() {
    let rsvd = Some(PfError::P | PfError::RSVD);
    let p = long();
    for bit in [46, 51] {
        assert_eq!(
            judge(&p, PWU, PWU | (1 << bit), access(Read, false)),
            rsvd,
            "{bit}"
        );
        assert_eq!(
            judge(&p, PWU | (1 << bit), PWU, access(Read, false)),
            rsvd,
            "{bit}"
        );
    }
    for bit in [9, 10, 11, 52, 58] {
        assert_eq!(
            judge(&p, PWU, PWU | (1 << bit), access(Read, false)),
            None,
            "{bit}"
        );
    }
    // Large pages: the bits below the frame, but for PAT.
    for (levels, low, high) in [(3, 13, 20), (2, 13, 29)] {
        for bit in 12..=high + 1 {
            let mut memory = TestMemory::default();
            map(&mut memory, 0x5000, PWU | PS | (1 << bit), levels, 4);
            let r = p.translate(&mut memory, 0x5000, access(Read, false));
            assert_eq!(r.is_err(), (low..=high).contains(&bit), "{levels} {bit}");
        }
    }
    // No processor has larger pages, some not even these.
    let mut memory = TestMemory::default();
    map(&mut memory, 0x5000, PWU | PS, 1, 4);
    assert_eq!(
        Some(fault(p.translate(&mut memory, 0x5000, access(Read, false)))),
        rsvd
    );
    let mut q = p;
    q.gbpages = false;
    map(&mut memory, 0x5000, PWU | PS, 2, 4);
    assert_eq!(
        Some(fault(q.translate(&mut memory, 0x5000, access(Read, false)))),
        rsvd
    );
}

#[test]
fn probes_have_no_effects() {
    let mut memory = TestMemory::default();
    map(&mut memory, 0x5000, 0x8000 | P, 4, 4);
    let before = memory.clone();
    let t = long()
        .translate(&mut memory, 0x5123, PageAccess::PROBE)
        .unwrap();
    assert_eq!((t.gpa, t.user, t.writable), (0x8123, false, false));
    assert_eq!(memory, before);
}

#[test]
fn tables_that_are_no_plain_memory() {
    let mut memory = TestMemory::default();
    let slots = map(&mut memory, 0x5000, 0x8000 | PWU, 4, 4);
    let p = long();
    // Outside memory: not present.
    memory.put64(slots[1], RAM | PWU);
    assert_eq!(
        fault(p.translate(&mut memory, 0x5000, access(Write, true))),
        PfError::W | PfError::U
    );
    // In ROM: works, and keeps no bits.
    memory.put64(slots[1], TABLE[2] | PWU);
    memory.rom_page = Some(TABLE[2] >> 12);
    assert!(p
        .translate(&mut memory, 0x5000, access(Write, true))
        .is_ok());
    assert_eq!(memory.get64(slots[2]) & A, 0);
    assert_eq!(memory.get64(slots[3]) & (A | D), A | D);
    // Lost by the host.
    memory.lost_page = Some(TABLE[3] >> 12);
    assert_eq!(
        p.translate(&mut memory, 0x5000, access(Write, true)),
        Err(WalkError::Host(common::Lost))
    );
}

/// Memory in which another processor changes the leaf just before it is marked.
struct Racing {
    inner: TestMemory,
    slot: u64,
    change: Option<u64>,
}

impl GuestMemory for Racing {
    type Error = common::Lost;
    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError<common::Lost>> {
        self.inner.read(gpa, buf)
    }
    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), MemoryError<common::Lost>> {
        self.inner.write(gpa, data)
    }
    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError<common::Lost>> {
        if gpa == self.slot {
            if let Some(value) = self.change.take() {
                self.inner.put64(gpa, value);
            }
        }
        self.inner.compare_exchange(gpa, len, old, new)
    }
}

#[test]
fn races_begin_the_walk_again() {
    let mut inner = TestMemory::default();
    let slots = map(&mut inner, 0x5000, 0x8000 | PWU, 4, 4);
    let mut memory = Racing {
        inner,
        slot: slots[3],
        change: Some(0x9000 | PWU),
    };
    let t = long()
        .translate(&mut memory, 0x5000, access(Write, true))
        .unwrap();
    assert_eq!(t.gpa, 0x9000, "what is there now");
    assert_eq!(memory.inner.get64(slots[3]), 0x9000 | PWU | A | D);
    // It is gone: a fault, and no stale bit set.
    memory.inner.put64(slots[3], 0x8000 | PWU);
    memory.change = Some(0);
    let r = long().translate(&mut memory, 0x5000, access(Write, true));
    assert_eq!(r, Err(WalkError::Fault(PfError::W | PfError::U)));
    assert_eq!(memory.inner.get64(slots[3]), 0);
    // For ever.
    memory.inner.put64(slots[3], 0x8000 | PWU);
    memory.inner.contention = u32::MAX;
    let r = long().translate(&mut memory, 0x5000, access(Write, true));
    assert_eq!(r, Err(WalkError::Contended));
}

#[test]
fn a_walk_says_what_it_passed() {
    let linear = 0x1234_5678;
    let mut memory = TestMemory::default();
    let slots = map(&mut memory, linear, 0x7000 | PWU, 4, 4);
    let walk = long()
        .walk(&mut memory, linear, access(Write, false))
        .unwrap();
    assert_eq!(walk.translation.gpa, 0x7678);
    assert!(walk.dirty && !walk.nx);
    assert_eq!(walk.entry_size(), 8);
    assert_eq!((walk.step(5), walk.step(0)), (None, None));
    for (level, slot) in (1..=4).rev().zip(slots) {
        let step = walk.step(level).unwrap();
        assert_eq!((step.gpa, step.value), (slot, memory.get64(slot)));
        assert_eq!(step.value & (A | D), if level == 1 { A | D } else { A });
    }
    // A large page ends it early, and the table of four is no step.
    let mut memory = TestMemory::default();
    let slots = map(&mut memory, linear, 0x20_0000 | PWU | PS, 2, 3);
    memory.put64(slots[0], TABLE[1] | 1);
    let walk = pae()
        .walk(&mut memory, linear, access(Read, false))
        .unwrap();
    assert!(!walk.dirty);
    assert_eq!(walk.step(3), None);
    assert_eq!(walk.step(2).map(|step| step.gpa), Some(slots[1]));
    assert_eq!(walk.step(1), None);
    // The processor's own copy of that table counts, whatever memory has.
    let mut p = pae();
    p.pdptes = Some([0; 4]);
    let walked = p.walk(&mut memory, linear, access(Read, false));
    assert!(matches!(walked, Err(WalkError::Fault(_))));
    p.pdptes = Some([memory.get64(slots[0]), 0, 0, 0]);
    memory.put64(slots[0], 0);
    assert!(p.walk(&mut memory, linear, access(Read, false)).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Tables of noise: a walk ends, its address fits, and it stays the same the second time.
    #[test]
    fn any_tables(
        seed in prop::collection::vec(any::<u64>(), 64),
        cr3: u64, cr4: u64, efer: u64, cr0: u64, rflags: u64, pkru: u32, maxphyaddr: u8, gbpages: bool,
        linear: u64, user: bool,
        kind in prop::sample::select(vec![Read, Write, Fetch]),
    ) {
        let mut memory = TestMemory::default();
        // Addresses inside memory, often present.
        for (i, chunk) in memory.ram.chunks_exact_mut(8).enumerate() {
            let v = seed[i % 64].rotate_left(i as u32 / 64);
            chunk.copy_from_slice(&(v & 0x8000_0000_000f_ffff | v & 1).to_le_bytes());
        }
        let p = Paging {
            cr0: Cr0::new(cr0) | Cr0::PG,
            cr3: Cr3::new(cr3 & 0xf_ffff),
            cr4: Cr4::new(cr4),
            efer: Efer::new(efer),
            rflags: Rflags::new(rflags),
            pkru, maxphyaddr, gbpages, pdptes: None,
        };
        let first = p.translate(&mut memory, linear, access(kind, user));
        if let Ok(t) = first {
            prop_assert!(t.gpa >> 52 == 0);
            prop_assert!(matches!(t.page_shift, 12 | 21 | 22 | 30));
            prop_assert_eq!(t.gpa & 0xfff, linear & 0xfff);
        }
        // Tables may point at themselves, so that marking one entry changes another: only a walk that set nothing repeats.
        let writes = memory.writes;
        let second = p.translate(&mut memory, linear, access(kind, user));
        if memory.writes == writes && writes == 0 {
            prop_assert_eq!(first, second);
        }
    }
}
