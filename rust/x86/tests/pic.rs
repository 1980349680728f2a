// SPDX-License-Identifier: GPL-2.0

//! The pair of 8259A controllers: initialization, priorities, every command, the cascade, the state that goes to user space.

use proptest::prelude::*;
use rkvm_x86::line::*;
use rkvm_x86::pic::*;
use std::mem::offset_of;
use std::mem::size_of;

const USER: Source = Source::USER;
const HIGH: Signal = Signal::High;
const LOW: Signal = Signal::Low;

const MASTER: Role = Role::Master;
const SLAVE: Role = Role::Slave;

const EOI: u8 = 0x20;
const READ_IRR: u8 = 0x0a;
const READ_ISR: u8 = 0x0b;
const POLL: u8 = 0x0c;

fn out(pic: &mut Pic, port: u16, value: u8) -> Effect {
    pic.write(Port::new(port).unwrap(), value)
}

fn outs(pic: &mut Pic, writes: &[(u16, u8)]) {
    for &(port, value) in writes {
        let _ = out(pic, port, value);
    }
}

fn inb(pic: &mut Pic, port: u16) -> u8 {
    pic.read(Port::new(port).unwrap()).0
}

fn irr(pic: &Pic) -> u16 {
    (u16::from(pic.state(SLAVE).irr) << 8) | u16::from(pic.state(MASTER).irr)
}

fn isr(pic: &Pic) -> u16 {
    (u16::from(pic.state(SLAVE).isr) << 8) | u16::from(pic.state(MASTER).isr)
}

fn line(pic: &mut Pic, pin: u8, signal: Signal) -> Outcome {
    pic.set_line(pin, USER, signal).0
}

fn pulse(pic: &mut Pic, pin: u8) -> Outcome {
    let outcome = line(pic, pin, HIGH);
    line(pic, pin, LOW);
    outcome
}

/// Vectors 20h and 28h, with these in ICW4.
fn with_icw4(master: u8, slave: u8) -> Pic {
    let mut pic = Pic::new();
    outs(
        &mut pic,
        &[
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, master),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, slave),
        ],
    );
    pic
}

fn initialized() -> Pic {
    with_icw4(1, 1)
}

fn ack(pic: &mut Pic) -> u8 {
    pic.acknowledge().0
}

#[test]
fn ports() {
    let known: Vec<u16> = (0..=0xffff).filter(|&p| Port::new(p).is_some()).collect();
    assert_eq!(known, [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1]);
    assert_eq!(Port::new(0x4d1), Some(Port::Elcr(SLAVE)));
}

#[test]
fn initialization_takes_its_words_in_turn() {
    let mut pic = Pic::new();
    for (command, base, role) in [(0x20, 0x20, MASTER), (0xa0, 0x78, SLAVE)] {
        outs(&mut pic, &[(command, 0x11)]);
        assert_eq!(pic.state(role).init_state, 1);
        // The low bits of a vector are the input's.
        outs(&mut pic, &[(command + 1, base | 7)]);
        let state = pic.state(role);
        assert_eq!((state.irq_base, state.init_state), (base, 2));
        outs(&mut pic, &[(command + 1, 4)]);
        assert_eq!(pic.state(role).init_state, 3);
        outs(&mut pic, &[(command + 1, 0x13)]);
        let state = pic.state(role);
        assert_eq!((state.init_state, state.init4), (0, 1));
        assert_eq!((state.auto_eoi, state.special_fully_nested_mode), (1, 1));
        // What follows is OCW1.
        outs(&mut pic, &[(command + 1, 0xa5)]);
        assert_eq!(inb(&mut pic, command + 1), 0xa5);
        // Without an ICW4 its modes are off.
        outs(&mut pic, &[(command, 0x10), (command + 1, 0x40)]);
        let state = pic.state(role);
        assert_eq!((state.auto_eoi, state.special_fully_nested_mode), (0, 0));
        outs(&mut pic, &[(command + 1, 4)]);
        assert_eq!(pic.state(role).init_state, 0);
    }
}

#[test]
fn initialization_resets() {
    let mut pic = initialized();
    outs(&mut pic, &[(0x4d0, 0x20)]);
    line(&mut pic, 5, HIGH);
    assert_eq!(ack(&mut pic), 0x25);
    line(&mut pic, 1, HIGH);
    outs(
        &mut pic,
        &[(0x21, 0xf0), (0x20, 0xc3), (0x20, 0x68), (0x20, READ_ISR)],
    );
    let state = pic.state(MASTER);
    assert_eq!((state.priority_add, state.special_mask), (4, 1));
    assert_eq!((state.isr, state.irr, state.last_irr), (0x20, 0x22, 0x22));
    outs(&mut pic, &[(0x20, POLL)]);
    let effect = out(&mut pic, 0x20, 0x11);
    assert_eq!(effect.masks.bits(), 0xf0);
    let state = pic.state(MASTER);
    assert_eq!((state.imr, state.isr, state.last_irr), (0, 0, 0));
    assert_eq!(state.irr, 0x20, "a level stays");
    assert_eq!((state.priority_add, state.special_mask), (0, 0));
    assert_eq!((state.read_reg_select, state.poll), (0, 0));
    // The edge detector begins anew.
    outs(&mut pic, &[(0x21, 0x20), (0x21, 4), (0x21, 1)]);
    assert_eq!(line(&mut pic, 1, HIGH), Outcome::Delivered);
    assert_eq!(ack(&mut pic), 0x21);
}

#[test]
fn an_interrupt_from_its_edge_to_its_end() {
    let mut pic = initialized();
    assert_eq!(pic.int(), LOW);
    let (outcome, effect) = pic.set_line(4, USER, HIGH);
    assert_eq!((outcome, effect.int), (Outcome::Delivered, Some(HIGH)));
    assert_eq!(pic.int(), HIGH);
    assert_eq!(pic.set_line(4, USER, HIGH).1, Effect::default());
    // The request stays though the line falls.
    let (outcome, effect) = pic.set_line(4, USER, LOW);
    assert_eq!((outcome, effect.int), (Outcome::Delivered, None));
    assert_eq!(inb(&mut pic, 0x20), 0x10, "IRR is what is read at first");
    assert_eq!(line(&mut pic, 4, HIGH), Outcome::Coalesced);
    let (vector, effect) = pic.acknowledge();
    assert_eq!((vector, effect.int), (0x24, Some(LOW)));
    assert!(effect.ended.is_empty() && pic.int() == LOW);
    assert_eq!(inb(&mut pic, 0x20), 0);
    outs(&mut pic, &[(0x20, READ_ISR)]);
    assert_eq!(inb(&mut pic, 0x20), 0x10);
    outs(&mut pic, &[(0x20, READ_IRR)]);
    assert_eq!(inb(&mut pic, 0x20), 0);
    // No second one while the first is in service.
    line(&mut pic, 4, LOW);
    assert_eq!(pulse(&mut pic, 4), Outcome::Delivered);
    assert_eq!(pic.int(), LOW);
    let effect = out(&mut pic, 0x20, EOI);
    assert_eq!((effect.int, effect.ended), (Some(HIGH), Pins::of(4)));
    assert_eq!(ack(&mut pic), 0x24);
}

#[test]
fn priorities_nest() {
    let mut pic = initialized();
    for pin in [7, 3, 5] {
        pulse(&mut pic, pin);
    }
    assert_eq!(ack(&mut pic), 0x23);
    assert_eq!(pic.int(), LOW, "5 and 7 are below");
    pulse(&mut pic, 0);
    assert_eq!(ack(&mut pic), 0x20);
    assert_eq!(isr(&pic), 0x09);
    // Nonspecific: the foremost one.
    assert_eq!(out(&mut pic, 0x20, EOI).ended, Pins::of(0));
    let effect = out(&mut pic, 0x20, EOI);
    assert_eq!((effect.ended, effect.int), (Pins::of(3), Some(HIGH)));
    let (vector, effect) = pic.acknowledge();
    assert_eq!((vector, effect.int), (0x25, Some(LOW)));
    // Specific: any.
    assert_eq!(out(&mut pic, 0x20, 0x65).ended, Pins::of(5));
    assert_eq!(ack(&mut pic), 0x27);
    assert_eq!(out(&mut pic, 0x20, 0x60).ended, Pins::of(0));
    assert_eq!(isr(&pic), 0x80);
    assert_eq!(out(&mut pic, 0x20, EOI).ended, Pins::of(7));
    assert_eq!(
        out(&mut pic, 0x20, EOI),
        Effect::default(),
        "nothing to end"
    );
}

#[test]
fn int_rises_again_for_the_next_one() {
    let mut pic = with_icw4(3, 1);
    pulse(&mut pic, 1);
    pulse(&mut pic, 6);
    let (vector, effect) = pic.acknowledge();
    assert_eq!((vector, effect.int), (0x21, Some(HIGH)));
    let (vector, effect) = pic.acknowledge();
    assert_eq!((vector, effect.int), (0x26, Some(LOW)));
}

#[test]
fn masks() {
    let mut pic = initialized();
    let effect = out(&mut pic, 0x21, 0x12);
    assert_eq!(effect.masks.bits(), 0x12);
    assert_eq!(out(&mut pic, 0xa1, 0x80).masks.bits(), 0x8000);
    assert_eq!(pic.masks().bits(), 0x8012);
    assert_eq!(pulse(&mut pic, 1), Outcome::Ignored);
    assert_eq!(pulse(&mut pic, 15), Outcome::Ignored);
    assert_eq!((pic.int(), irr(&pic)), (LOW, 0x8002));
    // What was requested meanwhile comes when the mask goes.
    let effect = out(&mut pic, 0x21, 0);
    assert_eq!((effect.masks.bits(), effect.int), (0x12, Some(HIGH)));
    // And a mask takes back what is not acknowledged.
    assert_eq!(out(&mut pic, 0x21, 2).int, Some(LOW));
    // The cascade has one too.
    outs(&mut pic, &[(0x21, 4), (0xa1, 0)]);
    outs(&mut pic, &[(0x21, 6)]);
    assert_eq!(pic.int(), LOW);
    outs(&mut pic, &[(0x21, 2)]);
    assert_eq!(ack(&mut pic), 0x2f);
}

#[test]
fn spurious_interrupts() {
    let mut pic = initialized();
    assert_eq!(ack(&mut pic), 0x27);
    assert_eq!(isr(&pic), 0, "nothing is in service");
    outs(&mut pic, &[(0x4d0, 0x20), (0x4d1, 0x02)]);
    line(&mut pic, 5, HIGH);
    assert_eq!(line(&mut pic, 5, LOW), Outcome::Delivered);
    assert_eq!(pic.int(), LOW);
    assert_eq!(ack(&mut pic), 0x27);
    // The slave had asked when its request went: the master has its input in service.
    line(&mut pic, 9, HIGH);
    line(&mut pic, 9, LOW);
    assert_eq!(pic.int(), HIGH);
    assert_eq!(ack(&mut pic), 0x2f);
    assert_eq!(isr(&pic), 4);
    outs(&mut pic, &[(0x20, EOI)]);
    assert_eq!(isr(&pic), 0);
}

#[test]
fn levels() {
    let mut pic = initialized();
    outs(&mut pic, &[(0x4d1, 0x08)]);
    assert_eq!(line(&mut pic, 11, HIGH), Outcome::Delivered);
    assert_eq!(line(&mut pic, 11, HIGH), Outcome::Coalesced);
    assert_eq!(ack(&mut pic), 0x2b);
    assert_eq!(irr(&pic), 0x800, "it is high");
    outs(&mut pic, &[(0xa0, EOI), (0x20, EOI)]);
    assert_eq!(ack(&mut pic), 0x2b, "and comes again");
    line(&mut pic, 11, LOW);
    outs(&mut pic, &[(0xa0, EOI), (0x20, EOI)]);
    assert_eq!((irr(&pic), isr(&pic), pic.int()), (0, 0, LOW));
    // Two devices on it.
    line(&mut pic, 11, HIGH);
    let _ = pic.set_line(11, Source::RESAMPLE, HIGH);
    line(&mut pic, 11, LOW);
    assert_eq!(irr(&pic) & !4, 0x800);
    let _ = pic.set_line(11, Source::RESAMPLE, LOW);
    // The master's input takes edges: it has asked.
    assert_eq!(irr(&pic), 4);
    assert_eq!(ack(&mut pic), 0x2f);
}

#[test]
fn trigger_modes() {
    let mut pic = initialized();
    outs(&mut pic, &[(0x4d0, 0xff), (0x4d1, 0xff)]);
    // Not for the timer, the keyboard, the cascade; the clock and the coprocessor.
    assert_eq!((inb(&mut pic, 0x4d0), inb(&mut pic, 0x4d1)), (0xf8, 0xde));
    assert_eq!(pic.state(MASTER).elcr, 0xf8);
    outs(&mut pic, &[(0x4d0, 0)]);
    assert_eq!((inb(&mut pic, 0x4d0), inb(&mut pic, 0x4d1)), (0, 0xde));
    // An initialization leaves them.
    outs(
        &mut pic,
        &[(0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1)],
    );
    assert_eq!(inb(&mut pic, 0x4d1), 0xde);
}

#[test]
fn the_slave() {
    let mut pic = initialized();
    for pin in 8..16 {
        assert_eq!(pulse(&mut pic, pin), Outcome::Delivered);
    }
    assert_eq!(irr(&pic), 0xff04);
    for pin in 8..16 {
        assert_eq!(ack(&mut pic), 0x20 + pin);
        assert_eq!(isr(&pic), 4 | (1 << pin));
        assert_eq!(pic.int(), LOW);
        assert_eq!(out(&mut pic, 0xa0, EOI).ended, Pins::of(pin));
        let effect = out(&mut pic, 0x20, EOI);
        assert_eq!(effect.ended, Pins::of(2));
        assert_eq!(effect.int, (pin < 15).then_some(HIGH));
    }
    assert_eq!((irr(&pic), isr(&pic)), (0, 0));
    // It is where input 2 is: below 1, above 3.
    pulse(&mut pic, 8);
    pulse(&mut pic, 3);
    pulse(&mut pic, 1);
    assert_eq!(ack(&mut pic), 0x21);
    outs(&mut pic, &[(0x20, EOI)]);
    assert_eq!(ack(&mut pic), 0x28);
    outs(&mut pic, &[(0xa0, EOI), (0x20, EOI)]);
    assert_eq!(ack(&mut pic), 0x23);
}

#[test]
fn special_fully_nested_mode() {
    for (icw4, expected) in [(0x01, LOW), (0x11, HIGH)] {
        let mut pic = with_icw4(icw4, 1);
        pulse(&mut pic, 12);
        assert_eq!(ack(&mut pic), 0x2c);
        // More important ones of the slave's own come through; others do not.
        pulse(&mut pic, 14);
        assert_eq!(pic.int(), LOW);
        pulse(&mut pic, 9);
        assert_eq!(pic.int(), expected);
        if expected == HIGH {
            assert_eq!(ack(&mut pic), 0x29);
            assert_eq!(isr(&pic), 0x1204);
        }
    }
}

#[test]
fn special_mask_mode() {
    let mut pic = initialized();
    pulse(&mut pic, 3);
    assert_eq!(ack(&mut pic), 0x23);
    pulse(&mut pic, 6);
    assert_eq!(pic.int(), LOW);
    // Who masks what it is in, in this mode, lets the lower ones through.
    outs(&mut pic, &[(0x21, 0x08)]);
    assert_eq!(pic.int(), LOW);
    assert_eq!(out(&mut pic, 0x20, 0x68).int, Some(HIGH));
    assert_eq!(pic.state(MASTER).special_mask, 1);
    // OCW3 without ESMM changes nothing of it.
    outs(&mut pic, &[(0x20, 0x28), (0x20, READ_ISR)]);
    assert_eq!(ack(&mut pic), 0x26);
    assert_eq!(inb(&mut pic, 0x20), 0x48);
    // A nonspecific EOI does not see what is masked.
    assert_eq!(out(&mut pic, 0x20, EOI).ended, Pins::of(6));
    assert_eq!(out(&mut pic, 0x20, EOI).ended, Pins::EMPTY);
    assert_eq!(out(&mut pic, 0x20, 0x63).ended, Pins::of(3));
    outs(&mut pic, &[(0x20, 0x48)]);
    assert_eq!(pic.state(MASTER).special_mask, 0);
}

#[test]
fn rotation() {
    let mut pic = initialized();
    // Set priority: 4 is the lowest, 5 the highest.
    outs(&mut pic, &[(0x20, 0xc4)]);
    assert_eq!(pic.state(MASTER).priority_add, 5);
    for pin in [4, 0, 5] {
        pulse(&mut pic, pin);
    }
    assert_eq!(ack(&mut pic), 0x25);
    // Rotate on nonspecific EOI: now 5 is the lowest.
    assert_eq!(out(&mut pic, 0x20, 0xa0).ended, Pins::of(5));
    assert_eq!(pic.state(MASTER).priority_add, 6);
    assert_eq!(ack(&mut pic), 0x20);
    // Rotate on specific EOI.
    assert_eq!(out(&mut pic, 0x20, 0xe0).ended, Pins::of(0));
    assert_eq!(pic.state(MASTER).priority_add, 1);
    pulse(&mut pic, 0);
    assert_eq!(ack(&mut pic), 0x24, "0 is the lowest");
    outs(&mut pic, &[(0x20, 0x64)]);
    assert_eq!(ack(&mut pic), 0x20);
    outs(&mut pic, &[(0x20, EOI)]);
    // Nothing in service: no rotation. And no operation.
    for command in [0xa0, 0x40] {
        assert_eq!(out(&mut pic, 0x20, command), Effect::default());
        assert_eq!(pic.state(MASTER).priority_add, 1);
    }
    outs(&mut pic, &[(0x20, 0xc7)]);
    assert_eq!(pic.state(MASTER).priority_add, 0);
}

#[test]
fn automatic_eoi() {
    let mut pic = with_icw4(3, 3);
    pulse(&mut pic, 1);
    let (vector, effect) = pic.acknowledge();
    assert_eq!((vector, effect.ended), (0x21, Pins::of(1)));
    assert_eq!((isr(&pic), pic.state(MASTER).priority_add), (0, 0));
    // Of both of them.
    pulse(&mut pic, 10);
    let (vector, effect) = pic.acknowledge();
    assert_eq!((vector, effect.ended.bits()), (0x2a, (1 << 2) | (1 << 10)));
    // With rotation.
    outs(&mut pic, &[(0x20, 0x80)]);
    assert_eq!(pic.state(MASTER).rotate_on_auto_eoi, 1);
    pulse(&mut pic, 1);
    assert_eq!(ack(&mut pic), 0x21);
    assert_eq!(pic.state(MASTER).priority_add, 2);
    pulse(&mut pic, 1);
    pulse(&mut pic, 7);
    assert_eq!(ack(&mut pic), 0x27);
    assert_eq!(ack(&mut pic), 0x21);
    outs(&mut pic, &[(0x20, 0)]);
    assert_eq!(pic.state(MASTER).rotate_on_auto_eoi, 0);
}

#[test]
fn polling() {
    let mut pic = initialized();
    outs(&mut pic, &[(0x20, POLL)]);
    assert_eq!(inb(&mut pic, 0x20), 7, "nothing");
    assert_eq!(inb(&mut pic, 0x20), 0, "one read only");
    pulse(&mut pic, 3);
    pulse(&mut pic, 5);
    outs(&mut pic, &[(0x20, POLL)]);
    assert_eq!(pic.state(MASTER).poll, 1);
    let (value, effect) = pic.read(Port::Command(MASTER));
    assert_eq!((value, effect.int), (0x83, Some(LOW)));
    assert_eq!((irr(&pic), isr(&pic)), (0x20, 0x08));
    outs(&mut pic, &[(0x20, EOI), (0x20, POLL)]);
    assert_eq!(inb(&mut pic, 0x21), 0x85, "through either port");
    assert_eq!(inb(&mut pic, 0x21), 0);
    outs(&mut pic, &[(0x20, EOI)]);
    // Both, one after the other.
    pulse(&mut pic, 13);
    outs(&mut pic, &[(0x20, POLL), (0xa0, POLL)]);
    assert_eq!(inb(&mut pic, 0x20), 0x82);
    assert_eq!(inb(&mut pic, 0xa0), 0x85);
    assert_eq!(isr(&pic), 0x2004);
    outs(&mut pic, &[(0xa0, EOI), (0x20, EOI)]);
    // The slave alone: the master has nothing left of it, or what is next.
    pulse(&mut pic, 13);
    outs(&mut pic, &[(0xa0, POLL)]);
    let (value, effect) = pic.read(Port::Data(SLAVE));
    assert_eq!((value, effect.int), (0x85, Some(LOW)));
    assert_eq!((irr(&pic), isr(&pic)), (0, 0x2000));
    pulse(&mut pic, 8);
    assert_eq!(ack(&mut pic), 0x28);
    // With automatic EOI a poll ends it.
    let mut pic = with_icw4(3, 1);
    pulse(&mut pic, 6);
    outs(&mut pic, &[(0x20, POLL)]);
    let (value, effect) = pic.read(Port::Command(MASTER));
    assert_eq!((value, effect.ended), (0x86, Pins::of(6)));
    assert_eq!(isr(&pic), 0);
}

#[test]
fn inputs_that_are_not_there() {
    let mut pic = initialized();
    let before = pic.clone();
    for pin in 16..=255 {
        let (outcome, effect) = pic.set_line(pin, USER, HIGH);
        assert_eq!((outcome, effect), (Outcome::Ignored, Effect::default()));
    }
    assert_eq!(pic, before);
}

#[test]
fn the_layout_is_that_of_the_abi() {
    assert_eq!(size_of::<PicState>(), 16);
    let offsets = [
        offset_of!(PicState, last_irr),
        offset_of!(PicState, irr),
        offset_of!(PicState, imr),
        offset_of!(PicState, isr),
        offset_of!(PicState, priority_add),
        offset_of!(PicState, irq_base),
        offset_of!(PicState, read_reg_select),
        offset_of!(PicState, poll),
        offset_of!(PicState, special_mask),
        offset_of!(PicState, init_state),
        offset_of!(PicState, auto_eoi),
        offset_of!(PicState, rotate_on_auto_eoi),
        offset_of!(PicState, special_fully_nested_mode),
        offset_of!(PicState, init4),
        offset_of!(PicState, elcr),
        offset_of!(PicState, elcr_mask),
    ];
    assert!(offsets.into_iter().eq(0..16));
}

#[test]
fn states_of_a_new_pair() {
    let pic = Pic::new();
    let blank = |elcr_mask| PicState {
        elcr_mask,
        ..PicState::default()
    };
    assert_eq!(pic.state(MASTER), blank(0xf8));
    assert_eq!(pic.state(SLAVE), blank(0xde));
}

#[test]
fn a_state_with_a_request_interrupts() {
    let mut pic = initialized();
    pulse(&mut pic, 12);
    let (master, slave) = (pic.state(MASTER), pic.state(SLAVE));
    assert_eq!((master.irr, slave.irr), (4, 0x10));
    let mut copy = Pic::new();
    // In either order, and even without what the master had of it.
    assert_eq!(copy.set_state(SLAVE, &slave).int, Some(HIGH));
    let _ = copy.set_state(MASTER, &PicState { irr: 0, ..master });
    assert_eq!(copy.int(), HIGH);
    assert_eq!(copy.state(MASTER), master);
    assert_eq!(ack(&mut copy), 0x2c);
    let masked = PicState { imr: 4, ..master };
    let effect = copy.set_state(MASTER, &masked);
    assert_eq!((effect.int, effect.masks), (None, Pins::of(2)));
}

/// What no chip can have is left out.
fn possible(state: &PicState, elcr_mask: u8) -> PicState {
    let bool = |b: u8| u8::from(b != 0);
    PicState {
        priority_add: state.priority_add & 7,
        irq_base: state.irq_base & 0xf8,
        read_reg_select: bool(state.read_reg_select),
        poll: bool(state.poll),
        special_mask: bool(state.special_mask),
        init_state: if state.init_state < 4 {
            state.init_state
        } else {
            0
        },
        auto_eoi: bool(state.auto_eoi),
        rotate_on_auto_eoi: bool(state.rotate_on_auto_eoi),
        special_fully_nested_mode: bool(state.special_fully_nested_mode),
        init4: bool(state.init4),
        elcr: state.elcr & elcr_mask,
        elcr_mask,
        ..*state
    }
}

prop_compose! {
    fn any_state()(b in any::<[u8; 16]>()) -> PicState {
        PicState {
            last_irr: b[0], irr: b[1], imr: b[2], isr: b[3], priority_add: b[4], irq_base: b[5],
            read_reg_select: b[6] & 1, poll: b[7] & 3, special_mask: b[8] & 1, init_state: b[9] & 7,
            auto_eoi: b[10] & 1, rotate_on_auto_eoi: b[11] & 1, special_fully_nested_mode: b[12] & 1,
            init4: b[13], elcr: b[14], elcr_mask: b[15],
        }
    }
}

#[derive(Clone, Debug)]
enum Action {
    Line { pin: u8, source: u8, high: bool },
    Write(u16, u8),
    Read(u16),
    Acknowledge,
    Migrate,
}

fn action() -> impl Strategy<Value = Action> {
    let port = prop::sample::select(&[0x20u16, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][..]);
    let value = prop_oneof![Just(EOI), Just(POLL), Just(0), any::<u8>()];
    prop_oneof![
        4 => (0u8..17, 0u8..3, any::<bool>())
            .prop_map(|(pin, source, high)| Action::Line { pin, source, high }),
        3 => (port.clone(), value).prop_map(|(port, value)| Action::Write(port, value)),
        1 => port.prop_map(Action::Read),
        3 => Just(Action::Acknowledge),
        1 => Just(Action::Migrate),
    ]
}

proptest! {
    #[test]
    fn any_state_goes_in_and_a_possible_one_comes_out(master in any_state(), slave in any_state()) {
        let mut pic = Pic::new();
        let _ = pic.set_state(MASTER, &master);
        let _ = pic.set_state(SLAVE, &slave);
        prop_assert_eq!(pic.state(SLAVE), possible(&slave, 0xde));
        // The slave may have asked the master meanwhile.
        let mut expected = possible(&master, 0xf8);
        let got = pic.state(MASTER);
        prop_assert_eq!(got.irr & !4, expected.irr & !4);
        prop_assert!(got.irr & 4 >= expected.irr & 4);
        (expected.irr, expected.last_irr) = (got.irr, got.last_irr);
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn invariants(
        master in any_state(), slave in any_state(), fresh: bool,
        actions in prop::collection::vec(action(), 0..200),
    ) {
        let mut pic = initialized();
        if !fresh {
            let _ = pic.set_state(MASTER, &master);
            let _ = pic.set_state(SLAVE, &slave);
        }
        for action in actions {
            let before = pic.clone();
            let (int, requests) = (pic.int(), irr(&pic) & !(pic.masks().bits() as u16));
            let mut acknowledged = false;
            let effect = match action {
                Action::Line { pin, source, high } => {
                    let (outcome, effect) =
                        pic.set_line(pin, Source::new(source).unwrap(), Signal::new(high));
                    let blind = pin >= PINS || pic.masks().has(pin);
                    prop_assert_eq!(outcome == Outcome::Ignored, blind);
                    effect
                }
                Action::Write(port, value) => out(&mut pic, port, value),
                Action::Read(port) => {
                    let (value, effect) = pic.read(Port::new(port).unwrap());
                    if port & 1 != 0 && port < 0x100 {
                        let role = if port == 0x21 { MASTER } else { SLAVE };
                        let state = before.state(role);
                        prop_assert!(state.poll != 0 || value == state.imr);
                    }
                    effect
                }
                Action::Acknowledge => {
                    acknowledged = true;
                    let (vector, effect) = pic.acknowledge();
                    let role = [MASTER, SLAVE]
                        .into_iter()
                        .filter(|&r| pic.state(r).irq_base == vector & 0xf8)
                        .count();
                    prop_assert!(role > 0);
                    if int == LOW {
                        prop_assert_eq!(vector, pic.state(MASTER).irq_base | 7);
                        prop_assert_eq!(isr(&pic), isr(&before));
                    } else {
                        prop_assert!(requests != 0);
                    }
                    effect
                }
                Action::Migrate => {
                    let mut copy = Pic::new();
                    let _ = copy.set_state(MASTER, &pic.state(MASTER));
                    let _ = copy.set_state(SLAVE, &pic.state(SLAVE));
                    prop_assert_eq!(copy.state(MASTER), pic.state(MASTER));
                    prop_assert_eq!(copy.state(SLAVE), pic.state(SLAVE));
                    prop_assert_eq!(copy.int(), pic.int());
                    Effect::default()
                }
            };
            // The effect tells the truth.
            match effect.int {
                Some(signal) => prop_assert_eq!(signal, pic.int()),
                None => prop_assert_eq!(int, pic.int()),
            }
            prop_assert!(acknowledged || effect.int != Some(int));
            prop_assert_eq!(effect.masks.bits(), pic.masks().bits() ^ before.masks().bits());
            prop_assert_eq!(effect.ended.bits() >> PINS, 0);
            // INT is high only for a request that nobody masks.
            let open = irr(&pic) & !(pic.masks().bits() as u16);
            prop_assert!(pic.int() == LOW || open & 0xff != 0);
            prop_assert_eq!(pic.state(MASTER).elcr & !0xf8, 0);
            prop_assert_eq!(pic.state(SLAVE).elcr & !0xde, 0);
        }
    }
}
