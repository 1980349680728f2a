// SPDX-License-Identifier: GPL-2.0

//! What holds whatever software, devices and a VMM do.

use crate::board::*;
use proptest::prelude::*;
use rkvm_x86::apic::base::ApicMode;
use rkvm_x86::apic::base::Role;
use rkvm_x86::apic::map::*;
use rkvm_x86::apic::message::*;
use rkvm_x86::apic::page::ApicPage;
use rkvm_x86::apic::regs::*;
use rkvm_x86::apic::state::*;
use rkvm_x86::apic::timer::*;
use rkvm_x86::apic::*;
use rkvm_x86::line::Trigger;
use rkvm_x86::msr::Msr;

#[derive(Clone, Debug)]
enum Step {
    Mmio(u16, usize, u32),
    Read(u16, usize),
    Msr(u32, u64),
    Base(u64, bool),
    Cr8(u8),
    Deadline(u64),
    Deliver(u32, u8, bool, bool),
    Local(u8),
    Acknowledge,
    Eoi,
    Time(u64, u64),
    Written(u16),
    Poke(u16, u32),
    Reset(bool),
    Reconfigure(bool, bool),
    Restore(u8, u32),
    SaveRestore,
}

fn word() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        0u32..0x200,
        (0u32..32).prop_map(|bit| 1 << bit),
        Just(0x1ff),
    ]
}

fn register() -> impl Strategy<Value = u16> {
    (0u16..0x40).prop_map(|index| index << 4)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (register(), word()).prop_map(|(o, v)| Step::Mmio(o, 4, v)),
        1 => (any::<u16>(), 0usize..9, word()).prop_map(|(o, l, v)| Step::Mmio(o, l, v)),
        2 => (any::<u16>(), 0usize..9).prop_map(|(o, l)| Step::Read(o, l)),
        8 => (register(), word())
            .prop_map(|(o, v)| Step::Msr(0x800 + u32::from(o >> 4), v.into())),
        1 => (any::<u32>(), any::<u64>()).prop_map(|(n, v)| Step::Msr(n, v)),
        2 => (0u64..4, any::<bool>())
            .prop_map(|(m, host)| Step::Base(0xfee0_0000 | (m << 10), host)),
        1 => (any::<u64>(), any::<bool>()).prop_map(|(v, host)| Step::Base(v, host)),
        2 => any::<u8>().prop_map(Step::Cr8),
        2 => any::<u64>().prop_map(Step::Deadline),
        12 => (0u32..8, any::<u8>(), any::<bool>(), any::<bool>())
            .prop_map(|(m, v, t, l)| Step::Deliver(m, v, t, l)),
        4 => (0u8..7).prop_map(Step::Local),
        10 => Just(Step::Acknowledge),
        6 => Just(Step::Eoi),
        4 => (any::<u64>(), any::<u64>()).prop_map(|(ns, tsc)| Step::Time(ns >> (tsc & 63), tsc)),
        2 => any::<u16>().prop_map(Step::Written),
        1 => (register(), word()).prop_map(|(o, v)| Step::Poke(o, v)),
        1 => any::<bool>().prop_map(Step::Reset),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(b, w)| Step::Reconfigure(b, w)),
        1 => (any::<u8>(), any::<u32>()).prop_map(|(b, v)| Step::Restore(b, v)),
        2 => Just(Step::SaveRestore),
    ]
}

/// SDM vol. 3, 12.8.3.1, from the vectors themselves.
fn expected_ppr(page: &Page) -> u8 {
    let tpr = page.read(0x80) as u8;
    let isr = vectors(page, ISR).last().map_or(0, |v| v >> 4);
    if tpr >> 4 >= isr {
        tpr
    } else {
        isr << 4
    }
}

fn config(id: u32, bare: bool, wide: bool) -> Config {
    let config = if bare {
        Config::new(id, Role::Application)
    } else {
        full(id)
    };
    let ids = if wide {
        IdFormat::Wide
    } else {
        IdFormat::Narrow
    };
    Config { ids, ..config }
}

fn run(apic: &mut TestApic<'_>, page: &Page, step: &Step, now: &mut Now) {
    match *step {
        Step::Mmio(offset, len, value) => {
            let xapic = apic.mode() == ApicMode::Xapic;
            assert_eq!(apic.mmio_write(offset, len, value, now).is_some(), xapic);
        }
        Step::Read(offset, len) => {
            let _ = apic.mmio_read(offset, len, now);
        }
        Step::Msr(n, value) => {
            let x2apic = apic.mode() == ApicMode::X2apic;
            let read = apic.read_msr(Msr(n), now);
            assert!(x2apic || read.is_err());
            let written = apic.write_msr(Msr(n), value, now);
            assert!(x2apic || written.is_err());
            if written.is_err() {
                assert_eq!(apic.read_msr(Msr(n), now), read);
            }
        }
        Step::Base(value, host) => {
            let before = apic.base();
            if apic.set_base(value, &features(), host).is_err() {
                assert_eq!(apic.base(), before);
            }
        }
        Step::Cr8(value) => {
            let _ = apic.set_cr8(value);
            assert_eq!(apic.cr8(), value & 15);
        }
        Step::Deadline(tsc) => {
            let _ = apic.set_tsc_deadline(tsc);
        }
        Step::Deliver(mode, vector, level, assert) => {
            if let Some(mode) = DeliveryMode::new(mode) {
                let (trigger, level) = (
                    if level { Trigger::Level } else { Trigger::Edge },
                    if assert {
                        Level::Assert
                    } else {
                        Level::Deassert
                    },
                );
                let _ = apic.view().deliver(&Message {
                    trigger,
                    level,
                    ..message(mode, vector)
                });
            }
        }
        Step::Local(entry) => {
            let _ = apic.deliver_local(LvtEntry::ALL[usize::from(entry)]);
        }
        Step::Acknowledge => {
            let (isr, ppr) = (vectors(page, ISR), expected_ppr(page));
            let pending = apic.pending_interrupt();
            assert_eq!(apic.acknowledge(), pending);
            let mut expected = isr;
            if let Some(vector) = pending {
                assert!(vector >> 4 > ppr >> 4);
                assert_ne!(apic.mode(), ApicMode::Disabled);
                // On top of all that is in service: one more level.
                expected.push(vector);
            }
            assert_eq!(vectors(page, ISR), expected);
        }
        Step::Eoi => {
            let mut isr = vectors(page, ISR);
            let top = isr.pop();
            let ended = match apic.eoi() {
                Eoi::None => None,
                Eoi::Edge(v) | Eoi::Broadcast(v) | Eoi::Suppressed(v) => Some(v),
            };
            assert_eq!(ended, top);
            assert_eq!(vectors(page, ISR), isr);
        }
        Step::Time(ns, tsc) => {
            now.ns = now.ns.saturating_add(ns);
            now.tsc = tsc;
            let (expiry, _) = apic.run_timer(now);
            assert!(apic.timer().current_count(now.ns) <= apic.timer().initial());
            match expiry {
                Expiry::Fired { next } => assert_eq!(apic.timer().next_expiry(), next),
                Expiry::Pending(deadline) => {
                    assert_eq!(apic.timer().next_expiry(), Some(deadline));
                }
                Expiry::Stopped => assert_eq!(apic.timer().next_expiry(), None),
            }
        }
        Step::Written(offset) => {
            let _ = apic.written(offset, now);
        }
        // As the processor does, before it exits: only registers that software can write so.
        Step::Poke(offset, value) => {
            let reg = Reg::at(offset);
            let access = reg.map(|reg| reg.access(apic.mode(), apic.config().lvts));
            if access == Some(Access::ReadWrite) {
                page.write(offset, value);
                let _ = apic.written(offset, now);
            }
        }
        Step::Reset(init) => apic.reset(if init { Reset::Init } else { Reset::PowerUp }),
        Step::Reconfigure(bare, wide) => {
            let _ = apic.reconfigure(&config(77, bare, wide));
        }
        Step::Restore(byte, value) => {
            let mut image = [byte; IMAGE_LEN];
            for word in image.chunks_exact_mut(64) {
                word[..4].copy_from_slice(&value.to_le_bytes());
            }
            let wrong = apic.mode() == ApicMode::X2apic && apic.config().ids == IdFormat::Wide;
            assert!(apic.restore(&image, now).is_ok() || wrong);
        }
        Step::SaveRestore => {
            let (mut image, mut again) = ([0; IMAGE_LEN], [1; IMAGE_LEN]);
            let stands = apic.timer().next_expiry().is_none();
            apic.save(&mut image, now);
            assert!(apic.restore(&image, now).is_ok());
            apic.save(&mut again, now);
            if stands {
                // That a counter has gone off is not in the state.
                again[0x390..0x394].fill(0);
            }
            assert!(image == again);
        }
    }
}

fn check(apic: &mut TestApic<'_>, page: &Page) {
    assert!(vectors(page, ISR).first().is_none_or(|&v| v >= 16));
    assert_eq!(apic.ppr(), expected_ppr(page));
    let pending = apic.pending_interrupt();
    if apic.mode() != ApicMode::Disabled {
        let ppr = expected_ppr(page) >> 4;
        let top = vectors(page, IRR).last().copied();
        assert_eq!(pending, top.filter(|v| v >> 4 > ppr));
    }
    assert_eq!(page.read(0x30), apic.config().version());
    assert_eq!(page.read(0x80) & !0xff, 0);
    let svr = match apic.config().eoi {
        EoiSuppression::Absent => 0x3ff,
        EoiSuppression::Offered => 0x13ff,
    };
    assert_eq!(page.read(0xf0) & !svr, 0);
    assert_eq!(page.read(0x300) & 0x1000, 0, "nothing is on its way");
    assert_eq!(page.read(0x380), apic.timer().initial());
    if apic.mode() == ApicMode::X2apic {
        let id = apic.config().id;
        assert_eq!(page.read(0x20), id);
        assert_eq!(page.read(0xd0), x2apic_ldr(id));
    }
    let entries = LvtEntry::ALL.map(|entry| (entry, page.read(Reg::Lvt(entry).offset())));
    for (entry, lvt) in entries {
        assert_eq!(lvt & !entry.writable(apic.config().timer), 0, "{entry:?}");
    }
}

fn identity() -> impl Strategy<Value = (Identity, Software)> {
    let id = prop_oneof![8 => 0u32..0x28, 1 => 0xf0u32..0x140];
    let mode = prop_oneof![
        3 => Just(ApicMode::Xapic),
        3 => Just(ApicMode::X2apic),
        1 => Just(ApicMode::Disabled)
    ];
    let ldr = prop_oneof![
        2 => (0u8..8).prop_map(|bit| 1 << bit),
        2 => (0u8..16, 0u8..4).prop_map(|(c, bit)| (c << 4) | (1 << bit)),
        1 => any::<u8>(),
        2 => Just(0)
    ];
    let dfr = prop_oneof![4 => Just(0xfu32), 4 => Just(0), 1 => 0u32..16];
    (id, mode, ldr, dfr, any::<bool>(), any::<bool>()).prop_map(
        |(id, mode, ldr, dfr, enabled, moved)| {
            let identity = Identity {
                id,
                mode,
                xapic_id: (id as u8) ^ u8::from(moved && id % 8 == 0),
                ldr: match mode {
                    ApicMode::X2apic => x2apic_ldr(id),
                    _ => u32::from(ldr) << 24,
                },
                format: DestinationFormat::new(dfr << 28),
                ids: IdFormat::Wide,
            };
            let software = if enabled {
                Software::Enabled
            } else {
                Software::Disabled
            };
            (identity, software)
        },
    )
}

fn target() -> impl Strategy<Value = Target> {
    let number = || {
        prop_oneof![
            4 => 0u32..0x28,
            2 => 0u32..0x140,
            4 => (0u32..4, any::<u16>()).prop_map(|(c, bits)| (c << 16) | u32::from(bits)),
            1 => any::<u32>(),
            1 => Just(0xff),
            1 => Just(u32::MAX),
        ]
    };
    prop_oneof![
        4 => prop_oneof![4 => 0u32..0x28, 1 => number()].prop_map(Target::Physical),
        8 => prop_oneof![1 => 0u32..0x100, 1 => number()].prop_map(Target::Logical),
        1 => Just(Target::All),
        1 => Just(Target::Others),
    ]
}

/// Mostly, software gives each APIC an ID of its own, and a logical one of the same format; and one mode.
fn arrange(
    mut apics: Vec<(Identity, Software)>,
    order: u8,
    modes: u8,
) -> Vec<(Identity, Software)> {
    apics.retain(|(apic, _)| match modes {
        0 => apic.mode != ApicMode::X2apic,
        1 => apic.mode != ApicMode::Xapic,
        _ => true,
    });
    if order == 0 {
        return apics;
    }
    apics.sort_by_key(|(apic, _)| apic.id);
    apics.dedup_by_key(|(apic, _)| apic.id);
    for (n, (apic, _)) in (0u32..).zip(&mut apics) {
        if apic.mode == ApicMode::Xapic {
            apic.xapic_id = apic.id as u8;
            (apic.format, apic.ldr) = match order % 3 {
                0 => (DestinationFormat::Flat, 1 << (24 + n % 8)),
                1 => (
                    DestinationFormat::Cluster,
                    ((n / 4) << 28) | (1 << (24 + n % 4)),
                ),
                // Not set up yet.
                _ => (DestinationFormat::Flat, 0),
            };
        }
    }
    apics
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn invariants_hold(
        steps in prop::collection::vec(step(), 1..120),
        bare: bool,
        wide: bool,
        id in prop_oneof![0u32..16, any::<u32>()],
    ) {
        let page = Page::default();
        let mut apic = Apic::new(&page, config(id, bare, wide));
        let mut now = T0;
        let _ = apic.mmio_write(0xf0, 4, 0x1ff, &now);
        for step in &steps {
            run(&mut apic, &page, step, &mut now);
            check(&mut apic, &page);
        }
    }

    /// Where the map answers, it says what asking each APIC says.
    #[test]
    fn the_map_agrees(
        apics in prop::collection::vec(identity(), 0..12),
        targets in prop::collection::vec(target(), 1..20),
        order in 0u8..8,
        modes in 0u8..3,
        vector: u8,
    ) {
        let apics = arrange(apics, order, modes);
        let mut map = ApicMap::new(vec![Entry::VACANT; 0x140]);
        for (vcpu, (apic, software)) in (0..).zip(&apics) {
            map.add(vcpu, apic, *software);
        }
        for target in targets {
            let Lookup::Found(found) = map.lookup(target) else {
                continue;
            };
            let lowest = found.lowest_priority(vector);
            let mut found: Vec<u16> = found.collect();
            found.sort_unstable();
            let matching: Vec<u16> = (0..)
                .zip(&apics)
                .filter(|(_, (apic, _))| apic.matches(target, None))
                .map(|(vcpu, _)| vcpu)
                .collect();
            prop_assert_eq!(&found, &matching, "{:?}", target);
            let takes = |v: &&u16| apics[usize::from(**v)].1 == Software::Enabled;
            prop_assert_eq!(lowest.is_some(), found.iter().any(|v| takes(&v)));
            if let Some(lowest) = lowest {
                prop_assert!(found.contains(&lowest) && takes(&&lowest));
            }
        }
    }

    /// A timer that is looked at when it says so goes off once a period, and its count never grows between.
    #[test]
    fn periods_are_regular(
        bus in 1u64..1_000_000,
        divide in 0u32..16,
        count in 1u32..,
        start in 0u64..1 << 40,
    ) {
        let mut timer = Timer::new(BusPeriod::new(bus).unwrap());
        timer.set_mode(TimerMode::Periodic);
        timer.set_divide(Divide::new(divide), start);
        timer.start(count, start);
        let period = u64::from(count) * bus * u64::from(Divide::new(divide).divisor());
        for n in 1..=4 {
            let end = start.saturating_add(period.saturating_mul(n));
            if end == u64::MAX {
                break;
            }
            prop_assert_eq!(timer.next_expiry(), Some(Deadline::Ns(end)));
            prop_assert_eq!(timer.current_count(end - period), count);
            let half = timer.current_count(end - period / 2);
            prop_assert!(half <= count && half >= count / 2);
            let fired = timer.expire(&Now { ns: end, tsc: 0 });
            let went_off = matches!(fired, Expiry::Fired { .. });
            prop_assert!(went_off);
        }
    }
}
