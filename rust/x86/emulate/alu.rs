// SPDX-License-Identifier: GPL-2.0

//! Arithmetic with flags (SDM vol. 1, 3.4.3 and the instructions' pages in vol. 2).
//!
//! Values are in the low bits of a `u64`; what is above the size is ignored on the way in and zero on the way out. Flags
//! that the SDM leaves undefined get what processors are seen to give.

use super::super::insn::AluOp;
use super::super::insn::ShiftOp;
use super::super::insn::Size;
use super::super::regs::Rflags;

/// Sign, zero and parity of a result.
pub(super) fn szp(size: Size, result: u64) -> Rflags {
    Rflags::empty()
        .with_if(Rflags::SF, result & size.sign_bit() != 0)
        .with_if(Rflags::ZF, result & size.mask() == 0)
        .with_if(Rflags::PF, (result as u8).count_ones() % 2 == 0)
}

/// Replaces the bits of `which` in `flags` by those of `new`.
pub(super) fn replace(flags: Rflags, which: Rflags, new: Rflags) -> Rflags {
    flags.without(which).with(new.and(which))
}

fn add(size: Size, a: u64, b: u64, carry: u64) -> (u64, Rflags) {
    let r = a.wrapping_add(b).wrapping_add(carry) & size.mask();
    let carries = (a & b) | ((a | b) & !r);
    let flags = szp(size, r)
        .with_if(Rflags::CF, carries & size.sign_bit() != 0)
        .with_if(Rflags::AF, (a ^ b ^ r) & 0x10 != 0)
        .with_if(Rflags::OF, (a ^ r) & (b ^ r) & size.sign_bit() != 0);
    (r, flags)
}

fn sub(size: Size, a: u64, b: u64, borrow: u64) -> (u64, Rflags) {
    let r = a.wrapping_sub(b).wrapping_sub(borrow) & size.mask();
    let borrows = (!a & b) | ((!a | b) & r);
    let flags = szp(size, r)
        .with_if(Rflags::CF, borrows & size.sign_bit() != 0)
        .with_if(Rflags::AF, (a ^ b ^ r) & 0x10 != 0)
        .with_if(Rflags::OF, (a ^ b) & (a ^ r) & size.sign_bit() != 0);
    (r, flags)
}

/// `a op b`, and RFLAGS after it. For CMP the result is the difference, to be dropped.
pub(super) fn alu(op: AluOp, size: Size, a: u64, b: u64, flags: Rflags) -> (u64, Rflags) {
    let carry = u64::from(flags.has(Rflags::CF));
    let (a, b) = (a & size.mask(), b & size.mask());
    let logic = |r: u64| (r, szp(size, r));
    let (r, new) = match op {
        AluOp::Add => add(size, a, b, 0),
        AluOp::Adc => add(size, a, b, carry),
        AluOp::Sub | AluOp::Cmp => sub(size, a, b, 0),
        AluOp::Sbb => sub(size, a, b, carry),
        AluOp::And => logic(a & b),
        AluOp::Or => logic(a | b),
        AluOp::Xor => logic(a ^ b),
    };
    (r, replace(flags, Rflags::STATUS, new))
}

/// `a + 1` or `a - 1`, with CF kept.
pub(super) fn inc_dec(down: bool, size: Size, a: u64, flags: Rflags) -> (u64, Rflags) {
    let a = a & size.mask();
    let (r, new) = if down {
        sub(size, a, 1, 0)
    } else {
        add(size, a, 1, 0)
    };
    (r, replace(flags, Rflags::STATUS.without(Rflags::CF), new))
}

/// `-a`.
pub(super) fn neg(size: Size, a: u64, flags: Rflags) -> (u64, Rflags) {
    let (r, new) = sub(size, 0, a & size.mask(), 0);
    (r, replace(flags, Rflags::STATUS, new))
}

/// `a` shifted or rotated by `count`, of which the processor takes five bits, or six for quadwords.
pub(super) fn shift(op: ShiftOp, size: Size, a: u64, count: u64, flags: Rflags) -> (u64, Rflags) {
    let a = a & size.mask();
    let bits = size.bits();
    let count = (count & if size == Size::Qword { 63 } else { 31 }) as u32;
    if count == 0 {
        return (a, flags);
    }
    let top = |v: u64| v & size.sign_bit() != 0;
    // A shift by 64 or more would be undefined in the host: those bits are all gone.
    let left = |v: u64, n: u32| v.checked_shl(n).unwrap_or(0);
    let right = |v: u64, n: u32| v.checked_shr(n).unwrap_or(0);
    match op {
        ShiftOp::Rol | ShiftOp::Ror => {
            let turn = count % bits;
            let back = bits.wrapping_sub(turn);
            let r = if op == ShiftOp::Rol {
                left(a, turn) | right(a, back)
            } else {
                right(a, turn) | left(a, back)
            } & size.mask();
            let (cf, of) = if op == ShiftOp::Rol {
                let cf = r & 1 != 0;
                (cf, top(r) != cf)
            } else {
                (top(r), top(r) != top(r << 1))
            };
            let new = Rflags::empty()
                .with_if(Rflags::CF, cf)
                .with_if(Rflags::OF, of);
            (r, replace(flags, Rflags::CF | Rflags::OF, new))
        }
        ShiftOp::Rcl | ShiftOp::Rcr => {
            let (mut r, mut cf) = (a, flags.has(Rflags::CF));
            // CF is one bit more to go round.
            for _ in 0..count % bits.wrapping_add(1) {
                let out = if op == ShiftOp::Rcl {
                    top(r)
                } else {
                    r & 1 != 0
                };
                r = if op == ShiftOp::Rcl {
                    (r << 1) & size.mask() | u64::from(cf)
                } else {
                    (r >> 1) | if cf { size.sign_bit() } else { 0 }
                };
                cf = out;
            }
            let of = if op == ShiftOp::Rcl {
                top(r) != cf
            } else {
                top(r) != top(r << 1)
            };
            let new = Rflags::empty()
                .with_if(Rflags::CF, cf)
                .with_if(Rflags::OF, of);
            (r, replace(flags, Rflags::CF | Rflags::OF, new))
        }
        ShiftOp::Shl => {
            let r = left(a, count) & size.mask();
            let cf = count <= bits && right(a, bits.wrapping_sub(count)) & 1 != 0;
            let new = szp(size, r)
                .with_if(Rflags::CF, cf)
                .with_if(Rflags::OF, top(r) != cf);
            (r, replace(flags, Rflags::STATUS, new))
        }
        ShiftOp::Shr => {
            let r = right(a, count);
            let cf = right(a, count.wrapping_sub(1)) & 1 != 0;
            // Defined for a count of one: the sign that was lost.
            let of = top(r << 1) != top(r);
            let new = szp(size, r).with_if(Rflags::CF, cf).with_if(Rflags::OF, of);
            (r, replace(flags, Rflags::STATUS, new))
        }
        ShiftOp::Sar => {
            let wide = size.sign_extend(a) as i64;
            let r = (wide >> count.min(63)) as u64 & size.mask();
            let cf = (wide >> count.wrapping_sub(1).min(63)) & 1 != 0;
            let new = szp(size, r).with_if(Rflags::CF, cf);
            (r, replace(flags, Rflags::STATUS, new))
        }
    }
}

/// `a * b` as signed numbers, cut to the size; CF and OF say that something was lost.
pub(super) fn imul(size: Size, a: u64, b: u64, flags: Rflags) -> (u64, Rflags) {
    let (a, b) = (size.sign_extend(a) as i64, size.sign_extend(b) as i64);
    let (product, overflow) = a.overflowing_mul(b);
    let r = product as u64 & size.mask();
    let lost = overflow || size.sign_extend(r) != product as u64;
    let new = szp(size, r)
        .with_if(Rflags::CF, lost)
        .with_if(Rflags::OF, lost);
    (
        r,
        replace(
            flags,
            Rflags::CF | Rflags::OF | Rflags::SF | Rflags::PF,
            new,
        ),
    )
}

/// Whether the condition of this number, 0 to 15, holds (SDM vol. 1, appendix B).
pub(super) fn condition(number: u8, flags: Rflags) -> bool {
    let sf_of = flags.has(Rflags::SF) != flags.has(Rflags::OF);
    let holds = match (number >> 1) & 7 {
        0 => flags.has(Rflags::OF),
        1 => flags.has(Rflags::CF),
        2 => flags.has(Rflags::ZF),
        3 => flags.has_any(Rflags::CF | Rflags::ZF),
        4 => flags.has(Rflags::SF),
        5 => flags.has(Rflags::PF),
        6 => sf_of,
        _ => sf_of || flags.has(Rflags::ZF),
    };
    holds != (number & 1 != 0)
}
