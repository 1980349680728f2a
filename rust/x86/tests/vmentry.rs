// SPDX-License-Identifier: GPL-2.0

//! Which segments a processor without "unrestricted guest" enters a guest with.

use proptest::prelude::*;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Efer;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegAttr;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;
use rkvm_x86::vmentry::needs_emulation;
use rkvm_x86::vmentry::VM86_ATTR;

const SIX: [SegReg; 6] = [
    SegReg::Es,
    SegReg::Cs,
    SegReg::Ss,
    SegReg::Ds,
    SegReg::Fs,
    SegReg::Gs,
];

/// A guest: its mode and segments, in the order of their numbers.
#[derive(Clone, Copy)]
struct Guest {
    pe: bool,
    vm: bool,
    lma: bool,
    segments: [Segment; 8],
}

fn segment(selector: u16, base: u64, limit: u32, attr: u32) -> Segment {
    Segment {
        selector,
        base,
        limit,
        attr: SegAttr::from_vmx(attr),
    }
}

impl Guest {
    fn needs_emulation(&self) -> bool {
        let bit = |on: bool, bits: u64| if on { bits } else { 0 };
        needs_emulation(
            Cr0::new(bit(self.pe, Cr0::PE.bits())),
            Rflags::new(2 | bit(self.vm, Rflags::VM.bits())),
            Efer::new(bit(self.lma, Efer::LMA.bits())),
            |reg| self.segments[usize::from(reg.number())],
        )
    }

    /// With one segment changed.
    fn with(mut self, reg: SegReg, change: impl FnOnce(&mut Segment)) -> Self {
        change(&mut self.segments[usize::from(reg.number())]);
        self
    }

    fn with_attr(self, reg: SegReg, attr: u32) -> Self {
        self.with(reg, |s| s.attr = SegAttr::from_vmx(attr))
    }

    fn with_selector(self, reg: SegReg, selector: u16) -> Self {
        self.with(reg, |s| s.selector = selector)
    }

    fn with_limit(self, reg: SegReg, limit: u32) -> Self {
        self.with(reg, |s| s.limit = limit)
    }

    fn with_base(self, reg: SegReg, base: u64) -> Self {
        self.with(reg, |s| s.base = base)
    }
}

/// Flat 32-bit segments of privilege level 0.
fn protected() -> Guest {
    let data = segment(0x10, 0, u32::MAX, 0xc093);
    let mut segments = [data; 8];
    segments[1] = segment(0x08, 0, u32::MAX, 0xc09b);
    segments[6] = Segment::NULL;
    segments[7] = segment(0x20, 0x1000, 0x67, 0x8b);
    Guest {
        pe: true,
        vm: false,
        lma: false,
        segments,
    }
}

/// As Linux has them in user mode.
fn user64() -> Guest {
    let mut segments = [Segment::NULL; 8];
    segments[1] = segment(0x33, 0, u32::MAX, 0xa0fb);
    segments[2] = segment(0x2b, 0, u32::MAX, 0xc0f3);
    segments[4].base = 0x7fff_1234_5678;
    segments[7] = segment(0x40, 0xffff_fe00_0000_3000, 0x4087, 0x8b);
    Guest {
        pe: true,
        vm: false,
        lma: true,
        segments,
    }
}

fn vm86() -> Guest {
    let mut guest = protected();
    guest.vm = true;
    for reg in SIX {
        let selector = 0x1000 + u16::from(reg.number());
        guest.segments[usize::from(reg.number())] =
            segment(selector, u64::from(selector) << 4, 0xffff, VM86_ATTR);
    }
    guest
}

fn real() -> Guest {
    let mut guest = vm86();
    guest.pe = false;
    guest.vm = false;
    for reg in SIX {
        guest = guest.with_attr(reg, 0x93);
    }
    guest
}

#[test]
fn usual_guests_are_entered() {
    for guest in [protected(), user64(), vm86(), real()] {
        assert!(!guest.needs_emulation());
    }
    // A user of 32-bit protected mode, and SS of 64-bit kernels: null.
    let mut user = protected();
    for reg in SIX {
        user = user
            .with(reg, |s| s.selector += 3)
            .with(reg, |s| s.attr = s.attr.with_dpl(3));
    }
    assert!(!user.needs_emulation());
    let mut kernel = user64();
    kernel.segments[1] = segment(0x10, 0, u32::MAX, 0xa09b);
    kernel.segments[2] = Segment::NULL;
    assert!(!kernel.needs_emulation());
}

#[test]
fn reset_is_not_a_state_to_enter() {
    let mut guest = real();
    for reg in SegReg::ALL {
        guest.segments[usize::from(reg.number())] = Segment::reset(reg);
    }
    assert!(guest.needs_emulation());
    // Until the BIOS has made its first far jump; TR and LDTR are as protected mode would have them.
    guest.segments[1] = segment(0xf000, 0xf_0000, 0xffff, 0x9b);
    assert!(!guest.needs_emulation());
    // With PE set it could even go on, in 16-bit protected mode, as no selector has privileges.
    guest.pe = true;
    assert!(!guest.needs_emulation());
}

#[test]
fn real_mode_has_segments_of_the_8086() {
    for reg in SIX {
        let good = real();
        assert!(good.with_base(reg, 0).needs_emulation());
        assert!(good.with_limit(reg, u32::MAX).needs_emulation());
        assert!(good.with_limit(reg, 0xfffe).needs_emulation());
        // 32 bits, not present, of the system, unusable.
        for attr in [0x4093, 0x13, 0x83, 0x1_0093] {
            assert!(good.with_attr(reg, attr).needs_emulation());
        }
        // Not writable, and the other direction.
        for attr in [0x91, 0x97] {
            assert!(good.with_attr(reg, attr).needs_emulation());
        }
        // Unused bits: accessed, privilege, software, granularity.
        for attr in [0x92, 0xf3, 0x1093, 0x8093] {
            assert!(!good.with_attr(reg, attr).needs_emulation());
        }
        // What was a code segment may be one.
        for attr in [0x99, 0x9b, 0x9f] {
            let expected = reg != SegReg::Cs;
            assert_eq!(good.with_attr(reg, attr).needs_emulation(), expected);
        }
    }
}

#[test]
fn real_mode_does_not_ask_for_task_and_table() {
    let mut guest = real();
    guest.segments[6] = segment(4, 0, 0, 0);
    guest.segments[7] = segment(4, 0, 0, 0);
    assert!(!guest.needs_emulation());
    guest.pe = true;
    assert!(guest.needs_emulation());
}

#[test]
fn virtual_8086_mode_has_one_kind_of_segment() {
    for reg in SIX {
        let good = vm86();
        assert!(good.with_selector(reg, 0).needs_emulation());
        assert!(good.with_limit(reg, 0xffffe).needs_emulation());
        for attr in [0x93, 0xf2, 0xfb, 0x40f3, 0x10f3, 0x1_00f3] {
            assert!(good.with_attr(reg, attr).needs_emulation());
        }
    }
    assert!(vm86().with_attr(SegReg::Tr, 0x89).needs_emulation());
    assert!(vm86().with_attr(SegReg::Ldtr, 0x83).needs_emulation());
    let mut long = vm86();
    long.lma = true;
    assert!(long.needs_emulation());
}

#[test]
fn after_pe_is_set_segments_of_real_mode_are_left() {
    // CS is what the processor makes of it, SS comes from anywhere.
    let guest = Guest { pe: true, ..real() };
    assert!(guest.needs_emulation());
    // A loader at 07C0, with a stack of its own: levels differ.
    let mut loader = Guest { pe: true, ..real() };
    for reg in SIX {
        loader.segments[usize::from(reg.number())] = Segment::real_mode(0x07c0);
    }
    loader = loader.with_attr(SegReg::Cs, 0x9b);
    assert!(!loader.needs_emulation());
    assert!(loader.with_selector(SegReg::Ds, 0x1001).needs_emulation());
    assert!(loader.with_selector(SegReg::Ss, 0x1002).needs_emulation());
    assert!(loader.with_attr(SegReg::Cs, 0x93).needs_emulation());
}

#[test]
fn code_segment() {
    let cs = SegReg::Cs;
    let good = protected();
    // Not accessed, data, not present, unusable, of the system.
    for attr in [0xc09a, 0xc098, 0xc093, 0xc01b, 0x1_c09b, 0xc08b] {
        assert!(good.with_attr(cs, attr).needs_emulation());
    }
    // The level is that of SS; a conforming one's may be higher in privilege.
    assert!(good.with_attr(cs, 0xc0fb).needs_emulation());
    assert!(good.with_attr(cs, 0xc0ff).needs_emulation());
    assert!(!good.with_attr(cs, 0xc09f).needs_emulation());
    assert!(!user64().with_attr(cs, 0xa09f).needs_emulation());
    assert!(user64().with_attr(cs, 0xa09b).needs_emulation());
    // L and D exclude each other in long mode.
    assert!(user64().with_attr(cs, 0xe0fb).needs_emulation());
    assert!(!good.with_attr(cs, 0xe09b).needs_emulation());
    assert!(good.with_base(cs, 1 << 32).needs_emulation());
    assert!(good.with_selector(cs, 0x0b).needs_emulation());
}

#[test]
fn stack_segment() {
    let ss = SegReg::Ss;
    let good = protected();
    for attr in [0xc092, 0xc091, 0xc09b, 0xc013, 0xc083, 0xc0f3] {
        assert!(good.with_attr(ss, attr).needs_emulation());
    }
    assert!(!good.with_attr(ss, 0xc097).needs_emulation());
    assert!(good.with_selector(ss, 0x11).needs_emulation());
    assert!(good.with_base(ss, 1 << 32).needs_emulation());
    // Unusable, its levels count still.
    let null = good.with(ss, |s| *s = Segment::NULL);
    assert!(!null.needs_emulation());
    assert!(null.with_selector(ss, 3).needs_emulation());
    assert!(null.with_attr(ss, 0x1_0060).needs_emulation());
}

#[test]
fn data_segments() {
    for reg in [SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs] {
        let good = protected();
        // Not accessed, code that cannot be read, not present, of the system.
        for attr in [0xc092, 0xc099, 0xc09d, 0xc013, 0xc083] {
            assert!(good.with_attr(reg, attr).needs_emulation());
            assert!(!good.with_attr(reg, attr | 0x1_0000).needs_emulation());
        }
        for attr in [0xc091, 0xc095, 0xc097, 0xc09b, 0xc09f, 0xc0f3] {
            assert!(!good.with_attr(reg, attr).needs_emulation());
        }
        // Of less privilege than asked for, unless the segment conforms.
        let asked = good.with_selector(reg, 0x13);
        assert!(asked.needs_emulation());
        assert!(asked.with_attr(reg, 0xc09b).needs_emulation());
        assert!(!asked.with_attr(reg, 0xc09f).needs_emulation());
        assert!(!asked.with_attr(reg, 0xc0f3).needs_emulation());
        let wide = matches!(reg, SegReg::Fs | SegReg::Gs);
        assert_eq!(good.with_base(reg, 1 << 40).needs_emulation(), !wide);
    }
}

#[test]
fn limits_and_their_granularity() {
    for reg in SegReg::ALL {
        let mut good = protected();
        good.segments[6] = segment(0x28, 0x2000, 0x67, 0x82);
        let attr = good.segments[usize::from(reg.number())].attr;
        let bytes = good.with(reg, |s| s.attr = attr.with_g(false));
        let pages = good.with(reg, |s| s.attr = attr.with_g(true));
        assert!(!bytes.with_limit(reg, 0xf_ffff).needs_emulation());
        assert!(!bytes.with_limit(reg, 0).needs_emulation());
        assert!(bytes.with_limit(reg, 0x10_0000).needs_emulation());
        assert!(!pages.with_limit(reg, 0xfff).needs_emulation());
        assert!(!pages.with_limit(reg, 0xffff_ffff).needs_emulation());
        assert!(pages.with_limit(reg, 0xffff_fffe).needs_emulation());
        assert!(pages.with_limit(reg, 0).needs_emulation());
    }
}

#[test]
fn task_register() {
    let tr = SegReg::Tr;
    let good = protected();
    // Of 16 bits only outside of long mode.
    assert!(!good.with_attr(tr, 0x83).needs_emulation());
    assert!(user64().with_attr(tr, 0x83).needs_emulation());
    for attr in [0x89, 0x81, 0x82, 0x0b, 0x9b, 0x1_008b] {
        assert!(good.with_attr(tr, attr).needs_emulation());
    }
    assert!(good.with_selector(tr, 0x24).needs_emulation());
}

#[test]
fn local_descriptor_table() {
    let ldtr = SegReg::Ldtr;
    let good = protected().with(ldtr, |s| *s = segment(0x28, 0x2000, 0xf, 0x82));
    assert!(!good.needs_emulation());
    for attr in [0x8b, 0x02, 0x92] {
        assert!(good.with_attr(ldtr, attr).needs_emulation());
        assert!(!good.with_attr(ldtr, attr | 0x1_0000).needs_emulation());
    }
    assert!(good.with_selector(ldtr, 0x2c).needs_emulation());
}

proptest! {
    /// Whatever the segments are, there is an answer, and each is asked for at most once.
    #[test]
    fn each_segment_is_asked_for_once(
        mode in 0u8..8,
        raw in proptest::array::uniform8((any::<u16>(), any::<u32>(), any::<u32>())),
    ) {
        let mut asked = [0; 8];
        let bit = |n: u8, bits: u64| if mode & n != 0 { bits } else { 0 };
        let _ = needs_emulation(
            Cr0::new(bit(1, Cr0::PE.bits())),
            Rflags::new(bit(2, Rflags::VM.bits())),
            Efer::new(bit(4, Efer::LMA.bits())),
            |reg| {
                let n = usize::from(reg.number());
                asked[n] += 1;
                let (selector, limit, attr) = raw[n];
                segment(selector, u64::from(selector) << 4, limit, attr)
            },
        );
        prop_assert!(asked.iter().all(|&n| n <= 1));
    }
}
