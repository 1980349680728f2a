// SPDX-License-Identifier: GPL-2.0

//! Whether a processor without "unrestricted guest" can run a guest as its segments are (SDM vol. 3, 27.3.1.2).
//!
//! Such a processor enters guests in protected mode with paging, and runs real mode as virtual-8086 mode. What a VM
//! entry refuses of the segments, a processor on its own may well have: between MOV to CR0 and the loads of segment
//! registers that follow, with limits of protected mode in real mode, and after reset. There, the emulator has to go on
//! until it is over.
//!
//! Bases are not checked to be canonical. What a guest can execute, and what the emulator does, leave none that is not.

use super::regs::Cr0;
use super::regs::Efer;
use super::regs::Rflags;
use super::segment::SegReg;
use super::segment::Segment;

/// The registers that have to do with real and virtual-8086 mode.
const DATA: [SegReg; 4] = [SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs];

/// The attributes of all segments in virtual-8086 mode: present, writable, accessed, privilege level 3.
pub const VM86_ATTR: u32 = 0xf3;

/// The low two bits of a selector.
const RPL: u16 = 3;
/// The bit of a selector that names the LDT.
const TI: u16 = 4;

/// Whether the guest, which is in the mode that these registers say, has segments with which it cannot be entered.
///
/// In real mode: with which virtual-8086 mode would not do the same. There the segments are those that the guest believes
/// to have, not those that stand for them, and TR and LDTR are not asked for, as virtual-8086 mode needs others anyway. In the
/// other modes, TR and LDTR are asked for last.
///
/// `segment` is called at most once for each register.
#[must_use]
pub fn needs_emulation(
    cr0: Cr0,
    rflags: Rflags,
    efer: Efer,
    mut segment: impl FnMut(SegReg) -> Segment,
) -> bool {
    if !cr0.has(Cr0::PE) {
        return !(real_mode_code(&segment(SegReg::Cs))
            && real_mode_data(&segment(SegReg::Ss))
            && DATA.iter().all(|&reg| real_mode_data(&segment(reg))));
    }
    let long = efer.has(Efer::LMA);
    let vm86 = rflags.has(Rflags::VM);
    let cs = segment(SegReg::Cs);
    let ss = segment(SegReg::Ss);
    let valid = if vm86 {
        // No long mode has the flag set.
        let mut data = || DATA.iter().all(|&reg| vm86_segment(&segment(reg)));
        !long && vm86_segment(&cs) && vm86_segment(&ss) && data()
    } else {
        code(&cs, &ss, long) && stack(&cs, &ss) && DATA.iter().all(|&reg| data(reg, &segment(reg)))
    };
    !(valid && task(&segment(SegReg::Tr), long) && local_table(&segment(SegReg::Ldtr)))
}

/// Whether a segment is one of virtual-8086 mode.
fn vm86_segment(s: &Segment) -> bool {
    s.base == u64::from(s.selector) << 4 && s.limit == 0xffff && s.attr.to_vmx() == VM86_ATTR
}

/// Whether a data or stack segment of real mode is the same in virtual-8086 mode. There, a privilege level, the granularity
/// that a limit was given in, the software bit and the accessed bit mean nothing; another direction, size or limit that
/// protected mode left does.
fn real_mode_data(s: &Segment) -> bool {
    let a = s.attr;
    real_mode_place(s) && a.type_() & !1 == 2
}

/// Whether a code segment of real mode is the same in virtual-8086 mode: of whatever type it is, real mode lets code be
/// read and written.
fn real_mode_code(s: &Segment) -> bool {
    let a = s.attr;
    real_mode_place(s) && (a.is_code() || a.type_() & !1 == 2)
}

fn real_mode_place(s: &Segment) -> bool {
    let a = s.attr;
    s.base == u64::from(s.selector) << 4
        && s.limit == 0xffff
        && a.s()
        && a.p()
        && !a.unusable()
        && !a.db()
}

/// The granularity must be one that can have given the limit.
fn limit_fits(s: &Segment) -> bool {
    if s.attr.g() {
        s.limit & 0xfff == 0xfff
    } else {
        s.limit >> 20 == 0
    }
}

/// What holds for each of the six segments that is usable.
fn ordinary(s: &Segment) -> bool {
    s.attr.s() && s.attr.p() && limit_fits(s)
}

fn fits_32_bits(base: u64) -> bool {
    base >> 32 == 0
}

fn code(cs: &Segment, ss: &Segment, long: bool) -> bool {
    let a = cs.attr;
    // Code and accessed; conforming code may have less privilege than its caller.
    let privileged = match a.type_() {
        9 | 11 => a.dpl() == ss.attr.dpl(),
        13 | 15 => a.dpl() <= ss.attr.dpl(),
        _ => false,
    };
    privileged
        && !a.unusable()
        && ordinary(cs)
        && fits_32_bits(cs.base)
        && !(long && a.l() && a.db())
}

/// The privileges of SS count even if it is unusable.
fn stack(cs: &Segment, ss: &Segment) -> bool {
    let a = ss.attr;
    let rpl = ss.selector & RPL;
    let usable = || ordinary(ss) && fits_32_bits(ss.base) && (a.type_() == 3 || a.type_() == 7);
    rpl == cs.selector & RPL && rpl == u16::from(a.dpl()) && (a.unusable() || usable())
}

fn data(reg: SegReg, s: &Segment) -> bool {
    let a = s.attr;
    let type_ = a.type_();
    // Accessed; code only if it can be read.
    let readable = type_ & 1 != 0 && (type_ & 8 == 0 || type_ & 2 != 0);
    let conforming = type_ >= 12;
    a.unusable()
        || ordinary(s)
            && readable
            && (conforming || s.selector & RPL <= u16::from(a.dpl()))
            // FS and GS have 64 bits.
            && (matches!(reg, SegReg::Fs | SegReg::Gs) || fits_32_bits(s.base))
}

/// TR must always be there, and busy.
fn task(tr: &Segment, long: bool) -> bool {
    let a = tr.attr;
    let type_ = a.type_();
    (type_ == 11 || type_ == 3 && !long)
        && tr.selector & TI == 0
        && !a.s()
        && a.p()
        && !a.unusable()
        && limit_fits(tr)
}

fn local_table(ldtr: &Segment) -> bool {
    let a = ldtr.attr;
    a.unusable() || a.type_() == 2 && ldtr.selector & TI == 0 && !a.s() && a.p() && limit_fits(ldtr)
}
