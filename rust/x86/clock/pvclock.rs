// SPDX-License-Identifier: GPL-2.0

//! The structures of kvmclock (Documentation/virt/kvm/x86/msr.rst): what a guest computes the time by.
//!
//! A guest multiplies what its counter has gone on by since `tsc_timestamp`, and adds `system_time`. The version is odd
//! while the rest is being written.

/// The guest may compare times that vCPUs have computed: `PVCLOCK_TSC_STABLE_BIT`.
pub const TSC_STABLE: u8 = 1 << 0;
/// The guest was stopped, and its watchdogs should not mind: `PVCLOCK_GUEST_STOPPED`.
pub const GUEST_STOPPED: u8 = 1 << 1;

const NS_PER_SEC: u64 = 1_000_000_000;

/// From ticks to nanoseconds: a shift, and a multiplier with 32 fractional bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NsScale {
    multiplier: u32,
    shift: i8,
}

impl NsScale {
    /// That of a counter of `khz`. 0 is taken for 1.
    #[must_use]
    pub fn new(khz: u32) -> Self {
        let mut hz = u64::from(khz.max(1)).wrapping_mul(1000);
        let mut shift = 0i8;
        // As precise as it can be: the multiplier's first bit is set.
        while hz > 2 * NS_PER_SEC {
            hz >>= 1;
            shift = shift.wrapping_sub(1);
        }
        while hz <= NS_PER_SEC {
            hz <<= 1;
            shift = shift.wrapping_add(1);
        }
        Self {
            multiplier: ((NS_PER_SEC << 32) / hz) as u32,
            shift,
        }
    }

    /// The nanoseconds of so many ticks, as the guest computes them.
    #[must_use]
    pub const fn ns(self, ticks: u64) -> u64 {
        let shift = self.shift.unsigned_abs() as u32;
        let ticks = if self.shift < 0 {
            ticks.wrapping_shr(shift)
        } else {
            ticks.wrapping_shl(shift)
        };
        ((ticks as u128).wrapping_mul(self.multiplier as u128) >> 32) as u64
    }
}

/// A vCPU's time: `struct pvclock_vcpu_time_info`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuTime {
    /// The guest's counter.
    pub tsc_timestamp: u64,
    /// The clock at that moment.
    pub system_time: u64,
    /// From one to the other.
    pub scale: NsScale,
    /// [`TSC_STABLE`], [`GUEST_STOPPED`].
    pub flags: u8,
}

impl VcpuTime {
    /// Bytes of the structure.
    pub const SIZE: usize = 32;
    /// Where in it the flags are.
    pub const FLAGS: usize = 29;

    /// The structure, with this version.
    #[must_use]
    pub fn bytes(&self, version: u32) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        out[..4].copy_from_slice(&version.to_le_bytes());
        out[8..16].copy_from_slice(&self.tsc_timestamp.to_le_bytes());
        out[16..24].copy_from_slice(&self.system_time.to_le_bytes());
        out[24..28].copy_from_slice(&self.scale.multiplier.to_le_bytes());
        out[28] = self.scale.shift as u8;
        out[29] = self.flags;
        out
    }

    /// The clock when the guest's counter says `tsc`.
    #[must_use]
    pub const fn at(&self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.tsc_timestamp);
        self.system_time.wrapping_add(self.scale.ns(ticks))
    }
}

/// When the guest's clock began: `struct pvclock_wall_clock`, in nanoseconds since 1970.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WallClock(pub u64);

impl WallClock {
    /// The structure, with this version. Its seconds end in 2106.
    #[must_use]
    pub fn bytes(self, version: u32) -> [u8; 12] {
        let mut out = [0; 12];
        out[..4].copy_from_slice(&version.to_le_bytes());
        out[4..8].copy_from_slice(&((self.0 / NS_PER_SEC) as u32).to_le_bytes());
        out[8..].copy_from_slice(&((self.0 % NS_PER_SEC) as u32).to_le_bytes());
        out
    }
}

/// The versions to write before and after the rest of a structure: odd, and even. `old` is what is there; the first
/// time, that is anything.
#[must_use]
pub const fn versions(old: u32) -> (u32, u32) {
    let odd = old.wrapping_add(1) | 1;
    (odd, odd.wrapping_add(1))
}
