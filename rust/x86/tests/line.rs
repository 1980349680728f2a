// SPDX-License-Identifier: GPL-2.0

//! Interrupt lines: several sources, outcomes, sets of inputs.

use proptest::prelude::*;
use rkvm_x86::line::*;

#[test]
fn a_line_is_high_while_anybody_holds_it() {
    let mut line = Line::LOW;
    assert_eq!(line.signal(), Signal::Low);
    assert_eq!(line.drive(Source::USER, Signal::High), Signal::High);
    assert_eq!(line.drive(Source::PIT, Signal::High), Signal::High);
    assert_eq!(line.drive(Source::USER, Signal::Low), Signal::High);
    assert_eq!(line.drive(Source::RESAMPLE, Signal::Low), Signal::High);
    assert_eq!(line.drive(Source::PIT, Signal::Low), Signal::Low);
    assert_eq!(line, Line::LOW);
    let last = Source::new(63).unwrap();
    assert_eq!(line.drive(last, Signal::High), Signal::High);
    assert_eq!(Source::new(64), None);
    assert_eq!(Source::new(0), Some(Source::USER));
}

#[test]
fn statuses_are_those_of_kvm_irq_line_status() {
    assert_eq!(Outcome::Ignored.status(), -1);
    assert_eq!(Outcome::Coalesced.status(), 0);
    assert_eq!(Outcome::Delivered.status(), 1);
}

#[test]
fn signals() {
    assert!(Signal::new(true).is_high() && !Signal::new(false).is_high());
    assert_eq!(Signal::default(), Signal::Low);
}

proptest! {
    #[test]
    fn sets_list_their_members(bits: u32, other: u32, pin: u8) {
        let pins = Pins::new(bits);
        let listed: Vec<u8> = pins.collect();
        let expected: Vec<u8> = (0..32).filter(|p| (bits >> p) & 1 != 0).collect();
        prop_assert_eq!(&listed, &expected);
        prop_assert_eq!(pins.has(pin), listed.contains(&pin));
        prop_assert_eq!(pins.is_empty(), listed.is_empty());
        prop_assert_eq!(pins.with(Pins::new(other)).bits(), bits | other);
        prop_assert_eq!(pins.without(Pins::new(other)).bits(), bits & !other);
        prop_assert_eq!(Pins::of(pin).is_empty(), pin > 31);
    }

    #[test]
    fn a_line_counts_sources_not_calls(calls in prop::collection::vec((0u8..64, any::<bool>()), 0..100)) {
        let mut line = Line::LOW;
        let mut held = [false; 64];
        for (source, high) in calls {
            held[usize::from(source)] = high;
            let signal = line.drive(Source::new(source).unwrap(), Signal::new(high));
            prop_assert_eq!(signal.is_high(), held.contains(&true));
        }
    }
}
