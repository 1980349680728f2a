// SPDX-License-Identifier: GPL-2.0

//! The I/O APIC: registers, edges and levels, EOIs, the state that goes to user space.

use proptest::prelude::*;
use rkvm_x86::ioapic::entry::*;
use rkvm_x86::ioapic::*;
use rkvm_x86::line::*;
use std::mem::offset_of;
use std::mem::size_of;

const BASE: u64 = DEFAULT_BASE;
const USER: Source = Source::USER;
const HIGH: Signal = Signal::High;
const LOW: Signal = Signal::Low;

/// Bits 12 and 14: delivery status and remote IRR.
const READ_ONLY: u32 = 0x5000;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;

fn write32(chip: &mut Ioapic, offset: u64, value: u32) -> Option<TableWrite> {
    chip.write(BASE + offset, &value.to_le_bytes()).unwrap()
}

fn read32(chip: &Ioapic, offset: u64) -> u32 {
    let mut data = [0xaa; 4];
    chip.read(BASE + offset, &mut data).unwrap();
    u32::from_le_bytes(data)
}

fn set(chip: &mut Ioapic, register: u8, value: u32) -> Option<TableWrite> {
    assert_eq!(write32(chip, 0, register.into()), None);
    write32(chip, 0x10, value)
}

fn get(chip: &mut Ioapic, register: u8) -> u32 {
    assert_eq!(write32(chip, 0, register.into()), None);
    read32(chip, 0x10)
}

fn low(chip: &mut Ioapic, pin: u8, value: u32) -> TableWrite {
    set(chip, 0x10 + 2 * pin, value).unwrap()
}

fn message(vector: u8, trigger: Trigger) -> Message {
    Message {
        vector,
        delivery_mode: DeliveryMode::Fixed,
        destination_mode: DestinationMode::Physical,
        destination: 0,
        trigger,
    }
}

fn remote_irr(chip: &Ioapic, pin: u8) -> bool {
    chip.entry(pin).unwrap().has(Entry::REMOTE_IRR)
}

/// What the module does with an EOI when nobody resamples.
fn eoi(chip: &mut Ioapic, vector: u8) -> Vec<(u8, Message)> {
    let pins = chip.pins_of(vector);
    let again = chip.eoi(pins);
    assert!(again.without(pins).is_empty());
    again.map(|p| (p, chip.fire(p).unwrap())).collect()
}

#[test]
fn identification() {
    let mut chip = Ioapic::new();
    assert_eq!(get(&mut chip, 1), 0x0017_0011);
    assert_eq!(set(&mut chip, 1, u32::MAX), None);
    assert_eq!(get(&mut chip, 1), 0x0017_0011, "read-only");
    assert_eq!((get(&mut chip, 0), get(&mut chip, 2)), (0, 0));
    assert_eq!(set(&mut chip, 0, u32::MAX), None);
    assert_eq!(get(&mut chip, 0), 0x0f00_0000, "four bits");
    assert_eq!(get(&mut chip, 2), 0x0f00_0000, "the arbitration ID follows");
    assert_eq!(set(&mut chip, 2, 0), None);
    assert_eq!(get(&mut chip, 0), 0x0f00_0000);
}

#[test]
fn after_a_reset_every_pin_is_masked() {
    let mut chip = Ioapic::new();
    for pin in 0..PINS {
        assert_eq!(get(&mut chip, 0x10 + 2 * pin), MASKED);
        assert_eq!(get(&mut chip, 0x11 + 2 * pin), 0);
        assert_eq!(chip.set_line(pin, USER, HIGH), Raise::Ignored);
    }
    low(&mut chip, 3, 0x31);
    chip.reset();
    // The devices still hold their lines: a second one adds nothing, and no reset lets go.
    let mut other = Ioapic::new();
    assert_ne!(chip, other);
    for pin in 0..PINS {
        assert_eq!(chip.set_line(pin, USER, LOW), Raise::Lowered);
        assert_eq!(other.set_line(pin, USER, LOW), Raise::Lowered);
    }
    assert_eq!(chip, other);
}

#[test]
fn registers_that_are_not_there() {
    let mut chip = Ioapic::new();
    for register in (3..0x10).chain(0x40..=0xff) {
        assert_eq!(get(&mut chip, register), u32::MAX);
        let before = chip.clone();
        assert_eq!(set(&mut chip, register, 0), None);
        assert_eq!(chip, before);
    }
    let before = chip.clone();
    for offset in (0..0x100).filter(|o| !matches!(o, 0 | 0x10)) {
        assert_eq!(read32(&chip, offset), 0);
        assert_eq!(write32(&mut chip, offset, 0x1234), None);
    }
    // The EOI register came with version 20h.
    assert_eq!(write32(&mut chip, 0x40, 0x31), None);
    assert_eq!(chip, before);
    for gpa in [BASE - 1, BASE + 0x100, 0, u64::MAX] {
        assert!(!chip.contains(gpa));
        assert_eq!(chip.read(gpa, &mut [0; 4]), Err(Elsewhere));
        assert_eq!(chip.write(gpa, &[0; 4]), Err(Elsewhere));
    }
}

#[test]
fn widths() {
    let mut chip = Ioapic::new();
    // IOREGSEL has eight bits.
    write32(&mut chip, 0, 0xffff_ff10);
    assert_eq!(read32(&chip, 0), 0x10);
    low(&mut chip, 0, 0x0001_a5c3);
    let mut one = [0; 1];
    chip.read(BASE + 0x10, &mut one).unwrap();
    assert_eq!(one, [0xc3]);
    let mut two = [0; 2];
    chip.read(BASE + 0x10, &mut two).unwrap();
    assert_eq!(u16::from_le_bytes(two), 0xa5c3 & !READ_ONLY as u16);
    let mut eight = [0xff; 8];
    chip.read(BASE + 0x10, &mut eight).unwrap();
    assert_eq!(
        u64::from_le_bytes(eight),
        0x0001_a5c3 & !u64::from(READ_ONLY)
    );
    for len in [0, 3, 5, 6, 7, 9, 16] {
        let mut data = vec![0xee; len];
        chip.read(BASE + 0x10, &mut data).unwrap();
        assert!(data.iter().all(|&b| b == 0xee), "{len}");
        let before = chip.clone();
        assert_eq!(chip.write(BASE + 0x10, &data), Ok(None));
        assert_eq!(chip, before, "{len}");
    }
    // Narrow writes clear what they do not have, wide ones lose what is too much.
    for (data, expected) in [
        (&[0x42][..], 0x42),
        (&[0x42, 0x80], 0x8042),
        (&[0x42, 0, 1, 0], 0x1_0042),
        (&[0x42, 0, 1, 0, 9, 9, 9, 9], 0x1_0042),
    ] {
        assert!(chip.write(BASE + 0x10, data).unwrap().is_some());
        assert_eq!(read32(&chip, 0x10), expected);
    }
    assert_eq!(get(&mut chip, 0x11), 0);
}

#[test]
fn every_bit_of_an_entry() {
    let mut chip = Ioapic::new();
    let write = low(&mut chip, 5, u32::MAX);
    assert_eq!(get(&mut chip, 0x1a), !READ_ONLY);
    assert_eq!((write.pin, write.mask()), (5, MaskChange::None));
    set(&mut chip, 0x1b, 0xab12_3456);
    assert_eq!(get(&mut chip, 0x1b), 0xab12_3456);
    assert_eq!(get(&mut chip, 0x1a), !READ_ONLY);
    let entry = chip.entry(5).unwrap();
    assert_eq!(entry.vector(), 0xff);
    assert_eq!(entry.destination(), 0xab);
    assert_eq!(entry.destination_mode(), DestinationMode::Logical);
    assert_eq!(entry.delivery_mode(), DeliveryMode::ExtInt);
    assert_eq!(entry.trigger(), Trigger::Level);
    assert!(entry.has(Entry::ACTIVE_LOW | Entry::MASKED) && !entry.awaits_eoi());
    assert_eq!(chip.entry(24), None);
    use DeliveryMode::*;
    let modes = [
        Fixed,
        LowestPriority,
        Smi,
        Reserved,
        Nmi,
        Init,
        Reserved,
        ExtInt,
    ];
    for (bits, mode) in (0..).zip(modes) {
        low(&mut chip, 5, (bits << 8) | 0x77);
        let expected = Message {
            vector: 0x77,
            delivery_mode: mode,
            destination_mode: DestinationMode::Physical,
            destination: 0xab,
            trigger: Trigger::Edge,
        };
        assert_eq!(chip.set_line(5, USER, HIGH), Raise::Fires(expected));
        assert_eq!(chip.set_line(5, USER, LOW), Raise::Lowered);
    }
}

#[test]
fn mask_changes_are_reported() {
    let mut chip = Ioapic::new();
    assert_eq!(low(&mut chip, 0, 0x30).mask(), MaskChange::Unmasked);
    assert_eq!(low(&mut chip, 0, 0x31).mask(), MaskChange::None);
    let write = low(&mut chip, 0, MASKED | 0x31);
    assert_eq!(write.mask(), MaskChange::Masked);
    assert_eq!(write.before.bits(), 0x31);
    assert_eq!(write.after.bits(), 0x1_0031);
    assert!(!write.pending);
    assert_eq!(
        set(&mut chip, 0x11, 1 << 24).unwrap().mask(),
        MaskChange::None
    );
}

#[test]
fn edges() {
    let mut chip = Ioapic::new();
    low(&mut chip, 4, 0x34);
    let fires = Raise::Fires(message(0x34, Trigger::Edge));
    assert_eq!(chip.set_line(4, USER, HIGH), fires);
    assert!(!remote_irr(&chip, 4));
    assert_eq!(chip.set_line(4, USER, HIGH), Raise::Coalesced);
    assert_eq!(
        chip.set_line(4, Source::PIT, HIGH),
        Raise::Coalesced,
        "no edge"
    );
    assert_eq!(chip.set_line(4, USER, LOW).outcome(), Outcome::Coalesced);
    assert_eq!(chip.set_line(4, Source::PIT, LOW), Raise::Lowered);
    assert_eq!(chip.set_line(4, USER, HIGH), fires);
    // An EOI makes nothing of an edge.
    assert_eq!(eoi(&mut chip, 0x34), []);
    assert_eq!(chip.fire(4), None);
    // Nor does it wait while masked.
    let _ = chip.set_line(4, USER, LOW);
    low(&mut chip, 4, MASKED | 0x34);
    assert_eq!(chip.set_line(4, USER, HIGH), Raise::Ignored);
    assert!(!low(&mut chip, 4, 0x34).pending);
    assert_eq!(chip.fire(4), None);
    assert_eq!(chip.set_line(4, USER, HIGH), Raise::Coalesced);
}

#[test]
fn levels() {
    let mut chip = Ioapic::new();
    low(&mut chip, 9, LEVEL | 0x39);
    let fires = message(0x39, Trigger::Level);
    assert_eq!(chip.set_line(9, USER, HIGH), Raise::Fires(fires));
    assert!(remote_irr(&chip, 9) && chip.entry(9).unwrap().awaits_eoi());
    assert_eq!(chip.set_line(9, USER, HIGH).outcome(), Outcome::Ignored);
    assert_eq!(chip.fire(9), None, "it waits for the EOI");
    // Still high at the EOI: again.
    assert_eq!(eoi(&mut chip, 0x39), [(9, fires)]);
    assert!(remote_irr(&chip, 9));
    // Low at the EOI: that was all.
    assert_eq!(chip.set_line(9, USER, LOW), Raise::Lowered);
    assert!(remote_irr(&chip, 9));
    assert_eq!(eoi(&mut chip, 0x39), []);
    assert!(!remote_irr(&chip, 9));
    // Another vector's EOI is nothing to it.
    assert_eq!(chip.set_line(9, USER, HIGH), Raise::Fires(fires));
    assert_eq!(eoi(&mut chip, 0x38), []);
    assert!(remote_irr(&chip, 9));
    // Two sources: one lets go.
    assert_eq!(
        chip.set_line(9, Source::RESAMPLE, HIGH).outcome(),
        Outcome::Ignored
    );
    assert_eq!(chip.set_line(9, USER, LOW).outcome(), Outcome::Ignored);
    assert_eq!(eoi(&mut chip, 0x39), [(9, fires)]);
    // Resampling: the device lets go before the EOI is through.
    let pins = chip.pins_of(0x39);
    assert_eq!(pins, Pins::of(9));
    assert_eq!(chip.set_line(9, Source::RESAMPLE, LOW), Raise::Lowered);
    assert!(chip.eoi(pins).is_empty());
    // The message was refused: nobody will end it.
    assert_eq!(chip.set_line(9, USER, HIGH), Raise::Fires(fires));
    chip.refused(9);
    assert_eq!(chip.fire(9), Some(fires));
    assert_eq!(chip.fire(24), None);
    chip.refused(200);
}

#[test]
fn a_pin_that_is_unmasked_with_its_line_high() {
    let mut chip = Ioapic::new();
    low(&mut chip, 10, MASKED | LEVEL | 0x3a);
    assert_eq!(chip.set_line(10, USER, HIGH), Raise::Ignored);
    assert!(chip.requests().has(10));
    let write = low(&mut chip, 10, LEVEL | 0x3a);
    assert!(write.pending && write.mask() == MaskChange::Unmasked);
    // A device that can be asked: the request goes, and comes again if it has to.
    let mut asked = chip.clone();
    asked.withdraw(10);
    assert_eq!(asked.fire(10), None);
    assert!(asked.set_line(10, USER, HIGH).message().is_some());
    // One that cannot.
    let fires = message(0x3a, Trigger::Level);
    assert_eq!(chip.fire(10), Some(fires));
    // Masked after it was sent, ended, and unmasked: as Linux does with threaded handlers.
    low(&mut chip, 10, MASKED | LEVEL | 0x3a);
    assert_eq!(eoi(&mut chip, 0x3a), []);
    assert!(low(&mut chip, 10, LEVEL | 0x3a).pending);
    assert_eq!(chip.fire(10), Some(fires));
    // Unmasked before the EOI: it waits for that.
    low(&mut chip, 10, MASKED | LEVEL | 0x3a);
    assert!(!low(&mut chip, 10, LEVEL | 0x3a).pending);
    assert_eq!(eoi(&mut chip, 0x3a), [(10, fires)]);
}

#[test]
fn to_edge_and_back_is_an_eoi() {
    let mut chip = Ioapic::new();
    low(&mut chip, 11, LEVEL | 0x3b);
    assert!(chip.set_line(11, USER, HIGH).message().is_some());
    assert!(!low(&mut chip, 11, MASKED | 0x3b).pending);
    assert!(!remote_irr(&chip, 11));
    assert!(low(&mut chip, 11, LEVEL | 0x3b).pending);
    assert!(chip.fire(11).is_some());
    // The upper half of an entry that is level leaves it.
    set(&mut chip, 0x10 + 2 * 11 + 1, 0x0500_0000);
    assert!(remote_irr(&chip, 11));
    assert_eq!(chip.entry(11).unwrap().message().destination, 5);
}

#[test]
fn pins_that_share_a_vector_end_together() {
    let mut chip = Ioapic::new();
    for pin in [1, 20, 23] {
        low(&mut chip, pin, LEVEL | 0x50);
        assert!(chip.set_line(pin, USER, HIGH).message().is_some());
    }
    low(&mut chip, 2, 0x50);
    assert!(chip.set_line(2, USER, HIGH).message().is_some());
    assert_eq!(chip.pins_of(0x50), Pins::new(0x0090_0006));
    let _ = chip.set_line(20, USER, LOW);
    let fires = message(0x50, Trigger::Level);
    // The edge is told of the end, and is no level.
    assert_eq!(eoi(&mut chip, 0x50), [(1, fires), (23, fires)]);
    assert!(chip.eoi(Pins::EMPTY).is_empty());
    assert!(chip.eoi(Pins::new(0xff00_0000)).is_empty(), "no such pins");
}

#[test]
fn the_layout_is_that_of_the_abi() {
    assert_eq!(size_of::<IoapicState>(), 216);
    assert_eq!(offset_of!(IoapicState, base_address), 0);
    assert_eq!(offset_of!(IoapicState, ioregsel), 8);
    assert_eq!(offset_of!(IoapicState, id), 12);
    assert_eq!(offset_of!(IoapicState, irr), 16);
    assert_eq!(offset_of!(IoapicState, redirtbl), 24);
}

#[test]
fn state_goes_out_and_in() {
    let mut chip = Ioapic::new();
    set(&mut chip, 0, 3 << 24);
    low(&mut chip, 1, 0x31); // An edge that is sent.
    low(&mut chip, 2, MASKED | 0x32); // One that is lost.
    low(&mut chip, 3, LEVEL | 0x33); // A level that is sent.
    low(&mut chip, 4, MASKED | LEVEL | 0x34); // One that waits.
    low(&mut chip, 5, LEVEL | 0x35); // One that is low again.
    for pin in 1..=5 {
        let _ = chip.set_line(pin, USER, HIGH);
    }
    let _ = chip.set_line(5, USER, LOW);
    let state = chip.state();
    assert_eq!(state.base_address, DEFAULT_BASE);
    assert_eq!((state.id, state.ioregsel, state.pad), (3, 0x1a, 0));
    assert_eq!(state.irr, 0x1c);
    assert_eq!(state.redirtbl[3], 0xc033);
    assert_eq!(state.redirtbl[5], 0xc035);

    let mut copy = Ioapic::new();
    let requests = copy.set_state(&state);
    assert_eq!(requests.bits(), state.irr);
    // All of them are masked or wait for their EOI.
    for pin in requests {
        assert_eq!(copy.raise(pin), Raise::Ignored);
    }
    assert_eq!(copy.state(), state);
    // The line is high, without a source that this one knows of.
    let fires = message(0x33, Trigger::Level);
    assert_eq!(eoi(&mut copy, 0x33), [(3, fires)]);
    assert_eq!(copy.set_line(3, USER, LOW), Raise::Lowered);
    assert_eq!(eoi(&mut copy, 0x33), []);

    // An edge that was requested and not sent is sent.
    let mut state = state;
    state.irr = u32::MAX;
    let requests = copy.set_state(&state);
    assert_eq!(requests.bits(), 0xff_ffff);
    let edge = message(0x31, Trigger::Edge);
    assert_eq!(copy.raise(1), Raise::Fires(edge));
    assert_eq!(copy.state().irr, 0);
    assert_eq!(copy.raise(30), Raise::Ignored);
    // One that was coalesced is a request again, for there.
    assert_eq!(copy.raise(1), Raise::Coalesced);
    assert_eq!(copy.state().irr, 1 << 1);
}

#[test]
fn a_state_may_be_anything() {
    let mut chip = Ioapic::new();
    let state = IoapicState {
        base_address: u64::MAX - 0x7f,
        ioregsel: u32::MAX,
        id: u32::MAX,
        irr: 0,
        pad: 1,
        redirtbl: [u64::MAX; 24],
    };
    assert!(chip.set_state(&state).is_empty());
    assert!(!chip.contains(DEFAULT_BASE) && chip.contains(u64::MAX));
    let mut data = [0; 4];
    chip.read(u64::MAX, &mut data).unwrap();
    chip.read(u64::MAX - 0xf, &mut data).unwrap();
    let state = IoapicState { pad: 0, ..state };
    assert_eq!(chip.state(), state);
    // The window shows a register that is not there.
    let state = IoapicState {
        base_address: DEFAULT_BASE,
        ..state
    };
    assert!(chip.set_state(&state).is_empty());
    assert_eq!(read32(&chip, 0), u32::MAX);
    assert_eq!(read32(&chip, 0x10), u32::MAX);
    assert_eq!(get(&mut chip, 0), 0x0f00_0000);
}

#[derive(Clone, Debug)]
enum Action {
    Line { pin: u8, source: u8, high: bool },
    Write { offset: u64, data: Vec<u8> },
    Table { register: u8, value: u32 },
    Eoi(u8),
    Fire(u8),
    Withdraw(u8),
    Refused(u8),
    Migrate,
}

fn action() -> impl Strategy<Value = Action> {
    let value = (
        0u32..8,
        prop_oneof![Just(0), Just(LEVEL), Just(MASKED), any::<u32>()],
    )
        .prop_map(|(vector, rest)| rest & !0xff | 0x30 | vector);
    prop_oneof![
        4 => (0u8..26, 0u8..3, any::<bool>())
            .prop_map(|(pin, source, high)| Action::Line { pin, source, high }),
        1 => (0u64..0x100, prop::collection::vec(any::<u8>(), 0..10))
            .prop_map(|(offset, data)| Action::Write { offset, data }),
        4 => (0x10u8..0x40, value).prop_map(|(register, value)| Action::Table { register, value }),
        2 => (0x30u8..0x38).prop_map(Action::Eoi),
        1 => any::<u8>().prop_map(Action::Fire),
        1 => (0u8..26).prop_map(Action::Withdraw),
        1 => (0u8..26).prop_map(Action::Refused),
        1 => Just(Action::Migrate),
    ]
}

proptest! {
    /// Whatever happens: no message leaves a masked pin or one that waits for an EOI, what is said to be pending fires, and once.
    #[test]
    fn invariants(actions in prop::collection::vec(action(), 0..200)) {
        let mut chip = Ioapic::new();
        for action in actions {
            let before = chip.clone();
            let sends = |pin: u8, message: Message| {
                let entry = before.entry(pin).unwrap();
                assert!(!entry.has(Entry::MASKED) && !entry.awaits_eoi());
                assert_eq!(message, entry.message());
            };
            match action {
                Action::Line { pin, source, high } => {
                    let raise = chip.set_line(pin, Source::new(source).unwrap(), Signal::new(high));
                    if let Raise::Fires(m) = raise {
                        sends(pin, m);
                        prop_assert!(chip.requests().has(pin));
                        let level = m.trigger == Trigger::Level;
                        prop_assert_eq!(chip.entry(pin).unwrap().awaits_eoi(), level);
                    }
                    if raise == Raise::Lowered {
                        prop_assert!(!chip.requests().has(pin));
                    }
                    prop_assert!(pin < PINS || raise == Raise::Ignored);
                }
                Action::Write { offset, data } => {
                    if let Some(w) = chip.write(BASE + offset, &data).unwrap() {
                        prop_assert_eq!(Some(w.before), before.entry(w.pin));
                        prop_assert_eq!(Some(w.after), chip.entry(w.pin));
                    }
                }
                Action::Table { register, value } => {
                    let w = set(&mut chip, register, value).unwrap();
                    let wait = w.after.has_any(Entry::MASKED | Entry::REMOTE_IRR);
                    let level = w.after.trigger() == Trigger::Level;
                    prop_assert_eq!(w.pending, chip.requests().has(w.pin) && level && !wait);
                    prop_assert!(level || !w.after.has(Entry::REMOTE_IRR));
                    if w.pending {
                        prop_assert!(chip.fire(w.pin).is_some());
                    }
                }
                Action::Eoi(vector) => {
                    let pins = chip.pins_of(vector);
                    for pin in chip.eoi(pins) {
                        let m = chip.fire(pin);
                        prop_assert_eq!(m, Some(message_of(&before, pin)));
                        prop_assert_eq!(chip.fire(pin), None);
                    }
                }
                Action::Fire(pin) => {
                    if let Some(m) = chip.fire(pin) {
                        sends(pin, m);
                        prop_assert_eq!(m.trigger, Trigger::Level);
                    }
                }
                Action::Withdraw(pin) => chip.withdraw(pin),
                Action::Refused(pin) => chip.refused(pin),
                Action::Migrate => {
                    let state = chip.state();
                    let mut copy = Ioapic::new();
                    let requests = copy.set_state(&state);
                    prop_assert_eq!(requests.bits(), state.irr);
                    for pin in requests {
                        let entry = copy.entry(pin).unwrap();
                        let fires = copy.raise(pin).message().is_some();
                        prop_assert_eq!(fires, !entry.has(Entry::MASKED) && !entry.awaits_eoi());
                    }
                }
            }
            prop_assert_eq!(chip.requests().bits() >> PINS, 0);
        }
    }
}

fn message_of(chip: &Ioapic, pin: u8) -> Message {
    chip.entry(pin).unwrap().message()
}
