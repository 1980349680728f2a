// SPDX-License-Identifier: GPL-2.0

//! The rest of arithmetic: wide products and quotients, decimal digits, bit counts, BMI (SDM vol. 2).
//!
//! As in [`alu`](super::alu), values are in the low bits of a `u64`, and zero above the size on the way out.

use super::super::insn::BcdOp;
use super::super::insn::BmiOp;
use super::super::insn::ScanOp;
use super::super::insn::Size;
use super::super::regs::Rflags;
use super::alu::replace;
use super::alu::szp;

/// The value shifted up; zero by all its bits or more.
fn left(value: u64, count: u32) -> u64 {
    value.checked_shl(count).unwrap_or(0)
}

/// The value shifted down; zero by all its bits or more.
fn right(value: u64, count: u32) -> u64 {
    value.checked_shr(count).unwrap_or(0)
}

/// The lowest bits, so many.
fn low_bits(count: u32) -> u64 {
    left(1, count).wrapping_sub(1)
}

/// The bits of `count` that a shift of this size takes.
fn shift_count(size: Size, count: u64) -> u32 {
    (count & if size == Size::Qword { 63 } else { 31 }) as u32
}

/// `a * b`: the low and the high half.
pub(super) fn multiply(signed: bool, size: Size, a: u64, b: u64) -> (u64, u64) {
    let product = if signed {
        let (a, b) = (size.sign_extend(a) as i64, size.sign_extend(b) as i64);
        i128::from(a).wrapping_mul(i128::from(b)) as u128
    } else {
        let (a, b) = (a & size.mask(), b & size.mask());
        u128::from(a).wrapping_mul(u128::from(b))
    };
    let high = product >> (size.bits() & 127);
    (product as u64 & size.mask(), high as u64 & size.mask())
}

/// The flags after a product with these halves.
pub(super) fn multiply_flags(
    signed: bool,
    size: Size,
    low: u64,
    high: u64,
    flags: Rflags,
) -> Rflags {
    let fill = if signed && low & size.sign_bit() != 0 {
        size.mask()
    } else {
        0
    };
    flags.with_if(Rflags::CF | Rflags::OF, high != fill)
}

/// Quotient and remainder of `high:low / divisor`, or nothing if there is none or it is too large.
pub(super) fn divide(
    signed: bool,
    size: Size,
    high: u64,
    low: u64,
    divisor: u64,
) -> Option<(u64, u64)> {
    let mask = size.mask();
    if !signed {
        return divide_unsigned(size, high & mask, low & mask, divisor & mask);
    }
    // Divide the magnitudes.
    let minus = high & size.sign_bit() != 0;
    let (high, low) = if minus {
        let negated = (low & mask).wrapping_neg() & mask;
        let borrow = u64::from(low & mask != 0);
        ((high & mask).wrapping_add(borrow).wrapping_neg(), negated)
    } else {
        (high, low)
    };
    let divisor_minus = divisor & size.sign_bit() != 0;
    let divisor = (size.sign_extend(divisor) as i64).unsigned_abs();
    let (quotient, remainder) = divide_unsigned(size, high & mask, low & mask, divisor)?;
    let quotient = if minus != divisor_minus {
        if quotient > size.sign_bit() {
            return None;
        }
        quotient.wrapping_neg()
    } else {
        if quotient >= size.sign_bit() {
            return None;
        }
        quotient
    };
    let remainder = if minus {
        remainder.wrapping_neg()
    } else {
        remainder
    };
    Some((quotient & mask, remainder & mask))
}

/// As [`divide`], without signs. The kernel has no division of 128 bits.
fn divide_unsigned(size: Size, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    if high >= divisor {
        return None;
    }
    if size != Size::Qword {
        let dividend = left(high, size.bits()) | low;
        return Some((
            dividend.checked_div(divisor)?,
            dividend.checked_rem(divisor)?,
        ));
    }
    let (mut remainder, mut quotient) = (high, low);
    for _ in 0..64 {
        let overflow = remainder >> 63 != 0;
        remainder = (remainder << 1) | (quotient >> 63);
        quotient <<= 1;
        if overflow || remainder >= divisor {
            remainder = remainder.wrapping_sub(divisor);
            quotient |= 1;
        }
    }
    Some((quotient, remainder))
}

/// SHLD and SHRD. A count beyond the operand's size, possible for words only, goes on with the bits of `a` again.
pub(super) fn double_shift(
    up: bool,
    size: Size,
    a: u64,
    b: u64,
    count: u64,
    flags: Rflags,
) -> (u64, Rflags) {
    let bits = size.bits();
    let (a, b) = (a & size.mask(), b & size.mask());
    let count = shift_count(size, count);
    if count == 0 {
        return (a, flags);
    }
    let rest = bits.wrapping_sub(count);
    let beyond = count.wrapping_sub(bits);
    let (r, lost) = if count > bits {
        let twice = bits.wrapping_mul(2).wrapping_sub(count);
        if up {
            (left(b, beyond) | right(a, twice), right(b, twice))
        } else {
            let lost = right(b, beyond.wrapping_sub(1));
            (right(b, beyond) | left(a, twice), lost)
        }
    } else if up {
        (left(a, count) | right(b, rest), right(a, rest))
    } else {
        let lost = right(a, count.wrapping_sub(1));
        (right(a, count) | left(b, rest), lost)
    };
    let r = r & size.mask();
    let new = szp(size, r)
        .with_if(Rflags::CF, lost & 1 != 0)
        .with_if(Rflags::OF, (a ^ r) & size.sign_bit() != 0);
    (r, replace(flags, Rflags::STATUS, new))
}

/// A property of the bits of a value. Nothing for the position of a bit in zero, where the destination stays as it is.
pub(super) fn scan(op: ScanOp, size: Size, value: u64, flags: Rflags) -> (Option<u64>, Rflags) {
    let value = value & size.mask();
    let unused = 64u32.wrapping_sub(size.bits());
    let zeroes_above = value.leading_zeros().wrapping_sub(unused);
    let zeroes_below = value.trailing_zeros().min(size.bits());
    let (r, new) = match op {
        ScanOp::Bsf | ScanOp::Bsr => {
            let flags = flags.with_if(Rflags::ZF, value == 0);
            let position = if op == ScanOp::Bsf {
                zeroes_below
            } else {
                63u32.wrapping_sub(value.leading_zeros())
            };
            return ((value != 0).then_some(u64::from(position)), flags);
        }
        ScanOp::Tzcnt | ScanOp::Lzcnt => {
            let count = if op == ScanOp::Tzcnt {
                zeroes_below
            } else {
                zeroes_above
            };
            let flags = flags
                .with_if(Rflags::CF, value == 0)
                .with_if(Rflags::ZF, count == 0);
            return (Some(u64::from(count)), flags);
        }
        ScanOp::Popcnt => (
            value.count_ones(),
            Rflags::empty().with_if(Rflags::ZF, value == 0),
        ),
    };
    (Some(u64::from(r)), replace(flags, Rflags::STATUS, new))
}

/// The CRC-32C of `crc` and a value after it: the polynomial of iSCSI, lowest bit first.
pub(super) fn crc32c(crc: u64, size: Size, value: u64) -> u64 {
    let mut crc = crc as u32;
    for byte in value.to_le_bytes().into_iter().take(size.bytes().into()) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            let lost = crc & 1;
            crc >>= 1;
            if lost != 0 {
                crc ^= 0x82f6_3b78;
            }
        }
    }
    u64::from(crc)
}

/// BMI1 and BMI2: the result, and RFLAGS after it.
pub(super) fn bmi(op: BmiOp, size: Size, a: u64, b: u64, flags: Rflags) -> (u64, Rflags) {
    let bits = size.bits();
    let a = a & size.mask();
    let count = shift_count(size, b);
    let set = |r: u64, cf: bool| {
        let new = szp(size, r).with_if(Rflags::CF, cf);
        (r & size.mask(), replace(flags, Rflags::STATUS, new))
    };
    match op {
        BmiOp::Andn => set(!a & b & size.mask(), false),
        BmiOp::Bextr => {
            let (start, len) = (b as u8, (b >> 8) as u8);
            set(right(a, start.into()) & low_bits(len.into()), false)
        }
        BmiOp::Bzhi => {
            let n = u32::from(b as u8);
            set(a & low_bits(n.min(bits)), n >= bits)
        }
        BmiOp::Pdep => (deposit(a, b & size.mask()), flags),
        BmiOp::Pext => (extract(a, b & size.mask()), flags),
        BmiOp::Rorx => {
            let r = right(a, count) | left(a, bits.wrapping_sub(count));
            (r & size.mask(), flags)
        }
        BmiOp::Sarx => {
            let r = (size.sign_extend(a) as i64) >> (count & 63);
            (r as u64 & size.mask(), flags)
        }
        BmiOp::Shlx => (left(a, count) & size.mask(), flags),
        BmiOp::Shrx => (right(a, count), flags),
        BmiOp::Blsr => set(a & a.wrapping_sub(1), a == 0),
        BmiOp::Blsmsk => set((a ^ a.wrapping_sub(1)) & size.mask(), a == 0),
        BmiOp::Blsi => set(a & a.wrapping_neg(), a != 0),
    }
}

/// The low bits of `value` at the places that `mask` has.
fn deposit(mut value: u64, mut mask: u64) -> u64 {
    let mut r = 0;
    while mask != 0 {
        let place = mask & mask.wrapping_neg();
        if value & 1 != 0 {
            r |= place;
        }
        value >>= 1;
        mask ^= place;
    }
    r
}

/// The bits of `value` that `mask` has, at the bottom.
fn extract(value: u64, mut mask: u64) -> u64 {
    let (mut r, mut place) = (0, 1u64);
    while mask != 0 {
        let bit = mask & mask.wrapping_neg();
        if value & bit != 0 {
            r |= place;
        }
        place <<= 1;
        mask ^= bit;
    }
    r
}

/// AX and RFLAGS after an instruction on decimal digits; nothing for a division by zero.
pub(super) fn bcd(op: BcdOp, ax: u16, base: u8, flags: Rflags) -> Option<(u16, Rflags)> {
    let [al, ah] = ax.to_le_bytes();
    let low_carry = al & 15 > 9 || flags.has(Rflags::AF);
    let carried = |on: bool| Rflags::empty().with_if(Rflags::CF, on);
    let (ax, new) = match op {
        BcdOp::Daa | BcdOp::Das => {
            let high_carry = al > 0x99 || flags.has(Rflags::CF);
            let adjust = if low_carry { 6 } else { 0 } | if high_carry { 0x60 } else { 0 };
            let (al_after, cf) = if op == BcdOp::Daa {
                (al.wrapping_add(adjust), high_carry)
            } else {
                // The borrow out of the low digit counts too.
                (al.wrapping_sub(adjust), high_carry || low_carry && al < 6)
            };
            let new = szp(Size::Byte, al_after.into()) | carried(cf).with_if(Rflags::AF, low_carry);
            (u16::from_le_bytes([al_after, ah]), new)
        }
        BcdOp::Aaa | BcdOp::Aas => {
            let after = match (low_carry, op) {
                (false, _) => ax,
                (true, BcdOp::Aaa) => ax.wrapping_add(0x106),
                (true, _) => ax.wrapping_sub(0x106),
            };
            let after = after & 0xff0f;
            let new = szp(Size::Byte, u64::from(after as u8))
                | carried(low_carry).with_if(Rflags::AF, low_carry);
            (after, new)
        }
        BcdOp::Aam => {
            let (q, r) = (al.checked_div(base)?, al.checked_rem(base)?);
            (u16::from_le_bytes([r, q]), szp(Size::Byte, r.into()))
        }
        BcdOp::Aad => {
            let r = al.wrapping_add(ah.wrapping_mul(base));
            (r.into(), szp(Size::Byte, r.into()))
        }
    };
    Some((ax, replace(flags, Rflags::STATUS, new)))
}
