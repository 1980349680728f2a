// SPDX-License-Identifier: GPL-2.0

//! Guest time: rates and offsets, which counters agree, nanoseconds from ticks, the clock of a VM.

use proptest::prelude::*;
use rkvm_x86::clock::matching::*;
use rkvm_x86::clock::pvclock::*;
use rkvm_x86::clock::tsc::*;
use rkvm_x86::clock::vm::*;
use rkvm_x86::clock::HostTime;

const HOST: u32 = 2_000_000;
const SECOND: u64 = 1_000_000_000;

fn at(ns: u64, host_tsc: u64) -> Moment {
    Moment {
        ns,
        host_tsc,
        stable: true,
    }
}

/// What the host says `ns` after it began, with a counter of `HOST`.
fn time(ns: u64) -> HostTime {
    HostTime {
        ns,
        real: 1_700_000_000 * SECOND + ns,
        tsc: ns * 2,
        by_tsc: true,
    }
}

#[test]
fn rates() {
    assert!(Scale::unity(HOST).is_unity());
    assert_eq!(Scale::new(HOST, HOST), Some(Scale::unity(HOST)));
    assert_eq!(Scale::new(0, HOST), None);
    assert_eq!(Scale::new(HOST, 0), None);
    let half = Scale::new(HOST / 2, HOST).unwrap();
    assert_eq!(half.multiplier(), 1 << 47);
    assert_eq!(half.guest_ticks(1001), 500);
    assert_eq!(half.guest_ticks(u64::MAX), u64::MAX >> 1);
    assert_eq!(half.guest_ticks_to_ns(1_000_000), 1_000_000);
    assert_eq!(half.ns_to_host_ticks(1_000_000), 2_000_000);
    // 16 integral bits.
    assert!(Scale::new(65_535, 1).is_some());
    assert_eq!(Scale::new(65_536, 1), None);
    assert_eq!(Scale::new(u32::MAX, 1), None);
    // As KVM has it.
    let odd = Scale::new(2_345_678, 100_000).unwrap();
    assert_eq!(
        u128::from(odd.multiplier()),
        (1u128 << 48) * 2_345_678 / 100_000
    );
}

#[test]
fn paces() {
    let unity = Some(Pace::Scaled(Scale::unity(HOST)));
    for can_scale in [false, true] {
        for khz in [HOST - 500, HOST, HOST + 500] {
            assert_eq!(Pace::new(khz, HOST, can_scale), unity, "{khz}");
        }
        assert_eq!(Pace::new(0, HOST, can_scale), None);
    }
    for khz in [HOST - 501, HOST + 501, HOST / 3, HOST * 3] {
        let scaled = Scale::new(khz, HOST).map(Pace::Scaled);
        assert_eq!(Pace::new(khz, HOST, true), scaled);
        assert_eq!(
            Pace::new(khz, HOST, false),
            (khz > HOST).then_some(Pace::CatchUp)
        );
    }
    assert_eq!(max_khz(HOST), 0x7fff_ffff);
    assert_eq!(max_khz(1000), 65_535_999);
    assert_eq!(max_khz(u32::MAX), 0x7fff_ffff);
}

#[test]
fn a_generation() {
    let (mut counters, host) = (Counters::new(), GuestTsc::host(HOST));
    assert!(!counters.agree());
    let (mut a, tsc_a) = counters.join(HOST, host, at(0, 5000));
    assert_eq!((tsc_a.at(5000), counters.agree()), (0, true));
    // One that comes later goes on where the first is.
    let (mut b, tsc_b) = counters.join(HOST, host, at(3 * SECOND, 6_000_005_000));
    assert_eq!((tsc_b, counters.agree()), (tsc_a, true));
    let first = counters.generation();
    // The first value that the VMM writes is meant, and begins another.
    let tsc_a = counters.write(
        &mut a,
        HOST,
        tsc_a,
        1_000_000,
        at(4 * SECOND, 8_000_000_000),
    );
    assert_eq!(tsc_a.at(8_000_000_000), 1_000_000);
    assert!(!counters.agree() && counters.generation() != first);
    // One for the other that is close is meant to be the same.
    let tsc_b = counters.write(
        &mut b,
        HOST,
        tsc_b,
        1_000_000,
        at(4 * SECOND + 100, 8_000_000_200),
    );
    assert_eq!((tsc_b, counters.agree()), (tsc_a, true));
    // Again, and it is still the same.
    let tsc_b = counters.write(
        &mut b,
        HOST,
        tsc_b,
        2_000_000,
        at(4 * SECOND + 200, 8_000_000_400),
    );
    assert_eq!((tsc_b, counters.agree()), (tsc_a, true));
    // More than a second away is meant.
    let far = 3 * u64::from(HOST) * 1000;
    let tsc_b = counters.write(
        &mut b,
        HOST,
        tsc_b,
        far,
        at(4 * SECOND + 300, 8_000_000_600),
    );
    assert_eq!((tsc_b.at(8_000_000_600), counters.agree()), (far, false));
    // 0 stands for what there is.
    let tsc_a = counters.write(&mut a, HOST, tsc_a, 0, at(5 * SECOND, 10_000_000_000));
    assert_eq!((tsc_a, counters.agree()), (tsc_b, true));
}

#[test]
fn offsets() {
    let (mut counters, host) = (Counters::new(), GuestTsc::host(HOST));
    let (mut a, tsc_a) = counters.join(HOST, host, at(0, 5000));
    let (mut b, tsc_b) = counters.join(HOST, host, at(1, 5002));
    let tsc_a = counters.set_offset(&mut a, HOST, tsc_a, 77, at(2, 5004));
    assert_eq!((tsc_a.offset, counters.agree()), (77, false));
    let tsc_b = counters.set_offset(&mut b, HOST, tsc_b, 77, at(3, 5006));
    assert_eq!((tsc_b, counters.agree()), (tsc_a, true));
    let _ = counters.set_offset(&mut b, HOST / 2, tsc_b, 77, at(4, 5008));
    assert!(!counters.agree(), "another rate");
    // After that, the host's counter begins anew.
    counters.host_restarted(1000);
    let tsc = counters.write(&mut a, HOST / 2, tsc_a, 0, at(5, 10));
    assert_eq!(tsc.offset, 1077);
}

#[test]
fn counters_of_an_unstable_host() {
    let (mut counters, host) = (Counters::new(), GuestTsc::host(HOST));
    let (a, tsc_a) = counters.join(HOST, host, at(0, 5000));
    let other = Moment {
        stable: false,
        ..at(SECOND, 99)
    };
    // By the time, as the counters do not agree.
    let (b, tsc_b) = counters.join(HOST, host, other);
    assert_eq!(tsc_a.at(5000), 0);
    assert_eq!(tsc_b.at(99), u64::from(HOST) * 1000);
    for member in [a, b] {
        assert_eq!(member.ideal(2 * SECOND, HOST), 2 * u64::from(HOST) * 1000);
    }
}

#[test]
fn structures() {
    let time = VcpuTime {
        tsc_timestamp: 0x0102_0304_0506_0708,
        system_time: 0x1112_1314_1516_1718,
        scale: NsScale::new(2_000_000),
        flags: TSC_STABLE | GUEST_STOPPED,
    };
    let bytes = time.bytes(7);
    assert_eq!(bytes[..8], [7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[8..16], 0x0102_0304_0506_0708u64.to_le_bytes());
    assert_eq!(bytes[16..24], 0x1112_1314_1516_1718u64.to_le_bytes());
    // Half a nanosecond a tick.
    assert_eq!(bytes[24..], [0, 0, 0, 0x80, 0, 3, 0, 0]);
    assert_eq!(bytes[VcpuTime::FLAGS], 3);
    let bytes = WallClock(3 * SECOND + 5).bytes(9);
    assert_eq!(bytes, [9, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0]);
    assert_eq!(versions(0), (1, 2));
    assert_eq!(versions(2), (3, 4));
    assert_eq!(versions(3), (5, 6));
    assert_eq!(versions(u32::MAX), (1, 2));
}

#[test]
fn a_clock() {
    let mut clock = VmClock::new(HOST, &time(SECOND));
    assert_eq!(
        (clock.read(&time(3 * SECOND)), clock.has_master()),
        (2 * SECOND, false)
    );
    clock.renew(&time(3 * SECOND), true);
    assert!(clock.has_master());
    assert_eq!(clock.read(&time(4 * SECOND)), 3 * SECOND);
    let tsc = GuestTsc::host(HOST).saying(1000, time(0).tsc);
    let told = clock.vcpu_time(tsc, &time(9 * SECOND));
    // As of the master copy, whenever that was.
    assert_eq!(told.tsc_timestamp, tsc.at(time(3 * SECOND).tsc));
    assert_eq!((told.system_time, told.flags), (2 * SECOND, TSC_STABLE));
    assert_eq!(told.at(tsc.at(time(9 * SECOND).tsc)), 8 * SECOND);
    assert_eq!(clock.epoch(&time(9 * SECOND)), 1_700_000_001 * SECOND);
    // It is set.
    clock.renew(&time(10 * SECOND), true);
    clock.set(77, &time(10 * SECOND));
    assert_eq!(clock.read(&time(10 * SECOND + 3)), 80);
    // The host does not tell the time by its counter any more.
    let now = HostTime {
        by_tsc: false,
        ..time(11 * SECOND)
    };
    clock.renew(&now, true);
    assert!(!clock.has_master());
    assert_eq!(clock.read(&now), SECOND + 77);
    assert_eq!(clock.vcpu_time(tsc, &now).flags, 0);
}

#[test]
fn a_clock_does_not_go_back() {
    let mut clock = VmClock::new(HOST, &time(0));
    clock.renew(&time(SECOND), true);
    // The counter says that more has passed than the clock does.
    let now = HostTime {
        ns: 2 * SECOND - 100,
        ..time(2 * SECOND)
    };
    let before = clock.read(&now);
    for may_be in [true, false] {
        let mut clock = clock;
        clock.renew(&now, may_be);
        assert_eq!((clock.has_master(), clock.read(&now)), (may_be, before));
    }
    // The host's counter begins anew: the clock goes by the time.
    clock.host_restarted();
    let now = HostTime {
        tsc: 5,
        ..time(3 * SECOND)
    };
    clock.renew(&now, true);
    assert_eq!(clock.read(&now), 3 * SECOND);
}

proptest! {
    #[test]
    fn scaling_is_monotone_and_has_an_inverse(
        guest in 1u32..0x7fff_ffff,
        host in 1000u32..8_000_000,
        ticks in 0u64..1 << 44,
        more in 0u64..1 << 44,
    ) {
        if let Some(scale) = Scale::new(guest, host) {
            let now = scale.guest_ticks(ticks);
            prop_assert!(scale.guest_ticks(ticks + more) >= now);
            // By the time that the host's has gone on so far, the guest's has nearly, too; and not much earlier.
            let back = scale.host_ticks(now);
            let slack = ticks / (1 << 24) + 2 + u64::from(host / guest);
            prop_assert!(back <= ticks + slack && back + slack >= ticks, "{ticks} {now} {back}");
            let _ = (scale.guest_ticks_to_ns(u64::MAX), scale.ns_to_host_ticks(u64::MAX), scale.host_ticks(u64::MAX));
        }
    }

    #[test]
    fn mul_div_is_exact(value: u64, numerator: u32, denominator: u32) {
        let exact = u128::from(value) * u128::from(numerator) / u128::from(denominator.max(1));
        prop_assert_eq!(u128::from(mul_div(value, numerator, denominator)), exact.min(u64::MAX.into()));
    }

    #[test]
    fn a_counter_says_what_it_is_told(guest: u64, host: u64, value: u64, khz in 1u32..0x7fff_ffff, ticks: u64) {
        if let Some(scale) = Scale::new(khz, HOST) {
            let tsc = GuestTsc { offset: guest, scale }.saying(value, host);
            prop_assert_eq!(tsc.at(host), value);
            prop_assert_eq!(tsc.moved(ticks).at(host), value.wrapping_add(ticks));
        }
    }

    #[test]
    fn nanoseconds(khz: u32, ticks in 0u64..1 << 48, more in 0u64..1 << 48) {
        let scale = NsScale::new(khz);
        let _ = scale.ns(u64::MAX);
        // What does not fit is no time that passes.
        let exact = u128::from(ticks) * 1_000_000 / u128::from(khz.max(1));
        prop_assume!(khz >= 1_000 && exact < 1 << 60);
        let ns = scale.ns(ticks);
        prop_assert!(scale.ns(ticks + more) >= ns);
        let error = u128::from(ns).abs_diff(exact);
        prop_assert!(error <= exact / (1 << 29) + 4, "{ns} {exact}");
    }

    #[test]
    fn a_renewed_clock_is_monotone(
        steps in proptest::collection::vec((0u64..1 << 36, 0u64..2000, any::<bool>(), any::<bool>()), 1..40),
    ) {
        let mut clock = VmClock::new(HOST, &time(0));
        let (mut tsc, mut ns, mut last) = (0, 0, 0);
        for (ticks, drift, may_be, by_tsc) in steps {
            // The host's time and its counter do not go quite together.
            tsc += ticks;
            ns += (ticks / 2).saturating_sub(drift);
            let now = HostTime { ns, real: ns, tsc, by_tsc };
            let before = clock.read(&now);
            prop_assert!(before >= last);
            clock.renew(&now, may_be);
            last = clock.read(&now);
            prop_assert!(last >= before, "{last} {before}");
            // Who has a counter has the same.
            let guest = GuestTsc::host(HOST).moved(12345);
            prop_assert_eq!(clock.vcpu_time(guest, &now).at(guest.at(tsc)), last);
        }
    }

    #[test]
    fn nothing_that_a_vmm_writes_is_too_much(
        writes in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u32>(), any::<bool>()), 1..40),
    ) {
        let (mut counters, host) = (Counters::new(), GuestTsc::host(HOST));
        let (mut member, mut tsc) = counters.join(HOST, host, at(0, 0));
        for (value, ns, host_tsc, khz, stable) in writes {
            let now = Moment { ns, host_tsc, stable };
            tsc = if value & 1 == 0 {
                counters.write(&mut member, khz, tsc, value, now)
            } else {
                counters.set_offset(&mut member, khz, tsc, value, now)
            };
            let _ = (member.ideal(value, khz), tsc.at(host_tsc));
            prop_assert!(counters.agree());
        }
    }
}
