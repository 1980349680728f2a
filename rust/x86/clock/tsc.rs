// SPDX-License-Identifier: GPL-2.0

//! The guest's time-stamp counter: the host's, multiplied and with an offset (SDM vol. 3, 26.6.5 and 26.3).

/// Fractional bits of the multiplier.
const FRACTION: u32 = 48;

/// Parts per million by which a rate may differ from the host's without being another.
const TOLERANCE: u64 = 250;

const NS_PER_MS: u64 = 1_000_000;

/// `value * numerator / denominator`, rounded down; `u64::MAX` if it is more. A denominator of 0 is taken for 1.
#[must_use]
pub fn mul_div(value: u64, numerator: u32, denominator: u32) -> u64 {
    let (numerator, denominator) = (u64::from(numerator), u64::from(denominator.max(1)));
    // In two parts, of which the second stays below 2^64.
    let (whole, rest) = (value / denominator, value % denominator);
    whole
        .saturating_mul(numerator)
        .saturating_add(rest.wrapping_mul(numerator) / denominator)
}

/// How fast the guest's counter runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scale {
    multiplier: u64,
    guest_khz: u32,
    host_khz: u32,
}

impl Scale {
    /// As fast as the host's.
    #[must_use]
    pub const fn unity(host_khz: u32) -> Self {
        Self {
            multiplier: 1 << FRACTION,
            guest_khz: host_khz,
            host_khz,
        }
    }

    /// At another rate; none if no multiplier makes it.
    #[must_use]
    pub fn new(guest_khz: u32, host_khz: u32) -> Option<Self> {
        if guest_khz == 0 || host_khz == 0 {
            return None;
        }
        let (guest, host) = (u64::from(guest_khz), u64::from(host_khz));
        // A division of 80 bits, in two steps.
        let (high, rest) = ((guest << 32) / host, (guest << 32) % host);
        if high >> (64 - 16) != 0 {
            return None;
        }
        let multiplier = (high << 16) | ((rest << 16) / host);
        (multiplier != 0 && multiplier != u64::MAX).then_some(Self {
            multiplier,
            guest_khz,
            host_khz,
        })
    }

    /// What the processor multiplies by, with 48 fractional bits.
    #[inline]
    #[must_use]
    pub const fn multiplier(self) -> u64 {
        self.multiplier
    }

    /// Whether it multiplies at all.
    #[inline]
    #[must_use]
    pub const fn is_unity(self) -> bool {
        self.multiplier == 1 << FRACTION
    }

    /// The guest's rate, in kHz.
    #[inline]
    #[must_use]
    pub const fn guest_khz(self) -> u32 {
        self.guest_khz
    }

    /// What so many ticks of the host's are in the guest's, as the processor computes it.
    #[inline]
    #[must_use]
    pub const fn guest_ticks(self, host: u64) -> u64 {
        if self.is_unity() {
            return host;
        }
        self.multiply(host)
    }

    // Out of the way of those that do not.
    #[cold]
    #[inline(never)]
    const fn multiply(self, host: u64) -> u64 {
        ((host as u128).wrapping_mul(self.multiplier as u128) >> FRACTION) as u64
    }

    /// After how many ticks of the host's the guest's counter has gone on by so many: not too few by more than one in
    /// 2^30, and `u64::MAX` if there are not so many.
    #[inline]
    #[must_use]
    pub fn host_ticks(self, guest: u64) -> u64 {
        if self.is_unity() {
            return guest;
        }
        self.divide(guest)
    }

    #[cold]
    #[inline(never)]
    fn divide(self, guest: u64) -> u64 {
        mul_div(guest, self.host_khz, self.guest_khz).saturating_add(1)
    }

    /// How many nanoseconds so many ticks of the guest's take.
    #[inline(never)]
    #[must_use]
    pub fn guest_ticks_to_ns(self, ticks: u64) -> u64 {
        mul_div(ticks, NS_PER_MS as u32, self.guest_khz)
    }

    /// How many ticks of the host's so many nanoseconds take.
    #[inline(never)]
    #[must_use]
    pub fn ns_to_host_ticks(self, ns: u64) -> u64 {
        mul_div(ns, self.host_khz, NS_PER_MS as u32)
    }
}

/// How many ticks a counter of `khz` makes in so many nanoseconds.
#[must_use]
pub fn ns_to_ticks(ns: u64, khz: u32) -> u64 {
    mul_div(ns, khz, NS_PER_MS as u32)
}

/// How a guest gets the rate that it is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// The processor does it.
    Scaled(Scale),
    /// It cannot: the counter is set forward again and again, to where it should be.
    CatchUp,
}

impl Pace {
    /// The rate `khz` on a host of `host_khz`, which `can_scale` or not: none if that cannot be.
    #[must_use]
    pub fn new(khz: u32, host_khz: u32, can_scale: bool) -> Option<Self> {
        let (rate, host) = (u64::from(khz), u64::from(host_khz));
        let low = host.wrapping_mul(1_000_000 - TOLERANCE) / 1_000_000;
        let high = host.wrapping_mul(1_000_000 + TOLERANCE) / 1_000_000;
        if khz == 0 {
            None
        } else if (low..=high).contains(&rate) {
            Some(Self::Scaled(Scale::unity(host_khz)))
        } else if can_scale {
            Scale::new(khz, host_khz).map(Self::Scaled)
        } else {
            (rate > host).then_some(Self::CatchUp)
        }
    }
}

/// One more than the greatest rate that a VMM can ask of a processor that scales: what fits in a signed integer, and
/// what there is a multiplier for.
#[must_use]
pub fn max_khz(host_khz: u32) -> u32 {
    let greatest = u128::from(u64::MAX).wrapping_mul(u128::from(host_khz)) >> FRACTION;
    greatest.min(0x7fff_ffff) as u32
}

/// The guest's counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestTsc {
    /// What it has more than the host's, multiplied.
    pub offset: u64,
    /// How fast it runs.
    pub scale: Scale,
}

impl GuestTsc {
    /// The host's own, at its rate in kHz.
    #[must_use]
    pub const fn host(khz: u32) -> Self {
        Self {
            offset: 0,
            scale: Scale::unity(khz),
        }
    }

    /// What it says when the host's says `host`.
    #[inline]
    #[must_use]
    pub const fn at(self, host: u64) -> u64 {
        self.scale.guest_ticks(host).wrapping_add(self.offset)
    }

    /// The same counter, but that it says `guest` when the host's says `host`.
    #[must_use]
    pub const fn saying(self, guest: u64, host: u64) -> Self {
        Self {
            offset: guest.wrapping_sub(self.scale.guest_ticks(host)),
            ..self
        }
    }

    /// The same counter, so many ticks further.
    #[must_use]
    pub const fn moved(self, ticks: u64) -> Self {
        Self {
            offset: self.offset.wrapping_add(ticks),
            ..self
        }
    }
}
