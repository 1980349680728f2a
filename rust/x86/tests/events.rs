// SPDX-License-Identifier: GPL-2.0

//! Events: how exceptions combine, what an entry takes, what a VMM sees.

use rkvm_x86::event::*;
use rkvm_x86::exception::Fault;
use rkvm_x86::exception::PfError;
use rkvm_x86::exception::Vector;

const OPEN: Gate = Gate {
    interrupts_enabled: true,
    shadow: Shadow::None,
};
const SHUT: Gate = Gate {
    interrupts_enabled: false,
    shadow: Shadow::None,
};
const STI: Gate = Gate {
    interrupts_enabled: true,
    shadow: Shadow::Sti,
};

fn gp() -> Exception {
    Fault::gp(8).into()
}

fn pf() -> Exception {
    Fault::page(0x1234, PfError::W).into()
}

fn int(vector: u8) -> Interrupt {
    Interrupt {
        vector,
        insn_len: 0,
    }
}

#[test]
fn error_codes() {
    let with: Vec<u8> = (0..=255).filter(|&v| Vector(v).has_error_code()).collect();
    assert_eq!(with, [8, 10, 11, 12, 13, 14, 17, 21]);
    assert!(!Vector::NMI.is_exception() && !Vector(32).is_exception() && Vector(31).is_exception());
}

#[test]
fn combinations() {
    use Combination::*;
    let contributory = [
        Vector::DE,
        Vector::TS,
        Vector::NP,
        Vector::SS,
        Vector::GP,
        Vector::CP,
    ];
    let faults = [Vector::PF, Vector::VE];
    let benign = [
        Vector::DB,
        Vector::BP,
        Vector::UD,
        Vector::NM,
        Vector::MF,
        Vector::AC,
        Vector(31),
    ];
    for b in benign {
        for any in contributory
            .into_iter()
            .chain(faults)
            .chain(benign)
            .chain([Vector::DF])
        {
            assert_eq!(combine(b, any), Second);
            assert_eq!(combine(any, b), Second);
        }
    }
    for c in contributory {
        for d in contributory {
            assert_eq!(combine(c, d), DoubleFault);
        }
        for p in faults {
            assert_eq!(combine(c, p), Second);
            assert_eq!(combine(p, c), DoubleFault);
        }
        assert_eq!(combine(Vector::DF, c), TripleFault);
    }
    assert_eq!(combine(Vector::PF, Vector::PF), DoubleFault);
    assert_eq!(combine(Vector::DF, Vector::PF), TripleFault);
    assert_eq!(combine(Vector::DF, Vector::DF), TripleFault);
}

#[test]
fn an_exception_is_taken_with_its_payload() {
    let mut e = PendingEvents::new();
    assert!(e.is_idle() && !e.has_deliverable(OPEN));
    e.raise(pf());
    assert!(!e.is_idle() && e.has_deliverable(SHUT));
    let s = e.select(SHUT, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Exception(pf())));
    assert!(!s.exit_at_once && !s.interrupt_window && !s.nmi_window);
    // The entry was not made after all: it is taken again, and CR2 is in place.
    let again = Exception {
        payload: None,
        ..pf()
    };
    assert_eq!(
        e.select(SHUT, &mut NoSource).inject,
        Some(Injection::Exception(again))
    );
    // It was delivered.
    e.redeliver(None);
    assert!(e.is_idle());
    // It was not.
    e.redeliver(Some(Vectoring::Exception(gp())));
    assert_eq!(
        e.select(OPEN, &mut NoSource).inject,
        Some(Injection::Exception(gp()))
    );
}

#[test]
fn exceptions_pile_up_to_a_shutdown() {
    let mut e = PendingEvents::new();
    e.raise(pf());
    e.raise(gp());
    let df = Exception {
        vector: Vector::DF,
        error: Some(0),
        payload: None,
        insn_len: 0,
    };
    assert_eq!(
        e.select(OPEN, &mut NoSource).inject,
        Some(Injection::Exception(df))
    );
    assert!(!e.take_triple_fault());
    e.raise(gp());
    assert!(e.take_triple_fault());
    assert!(!e.take_triple_fault() && e.is_idle());
    // One that broke the delivery of another counts the same.
    e.redeliver(Some(Vectoring::Exception(gp())));
    e.raise(gp());
    assert_eq!(
        e.select(OPEN, &mut NoSource).inject,
        Some(Injection::Exception(df))
    );
    // A benign one takes the place.
    let mut e = PendingEvents::new();
    e.raise(gp());
    e.raise(Fault::UD.into());
    assert_eq!(
        e.select(OPEN, &mut NoSource).inject,
        Some(Injection::Exception(Fault::UD.into()))
    );
    e.redeliver(None);
    assert!(e.is_idle());
    e.raise_triple_fault();
    assert!(e.has_deliverable(SHUT) && e.take_triple_fault());
}

#[test]
fn interrupts_wait_for_the_gate() {
    let mut e = PendingEvents::new();
    assert!(e.ready_for_interrupt(OPEN));
    assert!(!e.ready_for_interrupt(SHUT) && !e.ready_for_interrupt(STI));
    e.queue_interrupt(0x1f);
    assert_eq!(e.interrupt_in_bitmap(), Some(0x1f));
    e.queue_interrupt(0x20);
    assert_eq!(e.interrupt_in_bitmap(), Some(0x20), "the last one counts");
    assert!(!e.ready_for_interrupt(OPEN));
    for gate in [SHUT, STI] {
        assert!(!e.has_deliverable(gate));
        let s = e.select(gate, &mut NoSource);
        assert!(s.inject.is_none() && s.interrupt_window && !s.exit_at_once);
    }
    assert!(e.has_deliverable(OPEN));
    let s = e.select(OPEN, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Interrupt(int(0x20))));
    assert!(!s.interrupt_window);
    assert_eq!(e.interrupt_in_bitmap(), Some(0x20));
    // Until it is delivered the next one waits, and the entry does not take two.
    e.queue_interrupt(0x21);
    let s = e.select(OPEN, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Interrupt(int(0x20))));
    assert!(s.interrupt_window);
    e.redeliver(None);
    assert_eq!(
        e.select(OPEN, &mut NoSource).inject,
        Some(Injection::Interrupt(int(0x21)))
    );
}

#[test]
fn redelivered_interrupts_need_no_gate() {
    let mut e = PendingEvents::new();
    let soft = Interrupt {
        vector: 0x80,
        insn_len: 2,
    };
    for i in [int(0x30), soft] {
        e.redeliver(Some(Vectoring::Interrupt(i)));
        assert_eq!(
            e.select(SHUT, &mut NoSource).inject,
            Some(Injection::Interrupt(i))
        );
        assert_eq!(e.interrupt_in_bitmap(), (!i.is_soft()).then_some(i.vector));
    }
}

#[test]
fn priorities() {
    // An exception before an NMI before an interrupt.
    let mut e = PendingEvents::new();
    e.queue_interrupt(0x20);
    e.queue_nmi();
    e.raise(gp());
    let s = e.select(OPEN, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Exception(gp())));
    assert!(s.exit_at_once && s.interrupt_window);
    e.redeliver(None);
    let s = e.select(OPEN, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Nmi));
    assert!(s.interrupt_window && !s.nmi_window);
    e.redeliver(None);
    assert!(e.nmi_masked());
    assert_eq!(
        e.select(OPEN, &mut NoSource).inject,
        Some(Injection::Interrupt(int(0x20)))
    );
    // What began is finished first; a new exception comes right after.
    e.redeliver(Some(Vectoring::Interrupt(int(0x20))));
    e.raise(gp());
    let s = e.select(SHUT, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Interrupt(int(0x20))));
    assert!(s.exit_at_once);
    e.redeliver(None);
    assert_eq!(
        e.select(SHUT, &mut NoSource).inject,
        Some(Injection::Exception(gp()))
    );
}

#[test]
fn nmis_are_two_at_most() {
    let mut e = PendingEvents::new();
    for _ in 0..5 {
        e.queue_nmi();
    }
    // Interrupts being off is nothing to an NMI; a shadow is.
    assert!(e.select(STI, &mut NoSource).nmi_window);
    let s = e.select(SHUT, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Nmi));
    assert!(s.nmi_window, "another waits");
    e.redeliver(None);
    assert!(e.nmi_masked() && !e.has_deliverable(OPEN));
    e.queue_nmi();
    let s = e.select(OPEN, &mut NoSource);
    assert!(s.inject.is_none() && s.nmi_window);
    e.set_nmi_masked(false);
    let s = e.select(OPEN, &mut NoSource);
    assert_eq!(s.inject, Some(Injection::Nmi));
    assert!(!s.nmi_window, "that was all");
    // Its delivery was broken off.
    e.redeliver(Some(Vectoring::Nmi));
    assert_eq!(e.select(OPEN, &mut NoSource).inject, Some(Injection::Nmi));
}

#[test]
fn state_goes_out_and_in() {
    let mut e = PendingEvents::new();
    e.raise(pf());
    e.queue_nmi();
    e.set_nmi_masked(true);
    let state = e.state();
    assert_eq!(state.exception_pending, Some(pf()));
    assert!(state.nmi_pending && state.nmi_masked && !state.nmi_injected);
    let mut copy = PendingEvents::new();
    copy.set_state(&state).unwrap();
    assert_eq!(copy.state(), state);
    assert_eq!(
        copy.select(OPEN, &mut NoSource),
        e.select(OPEN, &mut NoSource)
    );
    let state = e.state();
    assert_eq!(state.exception_injected.unwrap().vector, Vector::PF);
    copy.set_state(&state).unwrap();
    assert_eq!(copy.state(), state);

    // For a VMM without payloads CR2 is in place before it looks.
    let mut e = PendingEvents::new();
    e.raise(pf());
    assert_eq!(e.take_payload(), Some((Vector::PF, 0x1234)));
    assert_eq!(e.take_payload(), None);
    assert_eq!(
        e.state().exception_pending,
        Some(Exception {
            payload: None,
            ..pf()
        })
    );

    // States that cannot be leave everything as it was.
    let before = e.clone();
    let with = |vector| Exception { vector, ..gp() };
    for bad in [
        EventsState {
            exception_pending: Some(gp()),
            exception_injected: Some(gp()),
            ..EventsState::default()
        },
        EventsState {
            exception_pending: Some(with(Vector::NMI)),
            ..EventsState::default()
        },
        EventsState {
            exception_injected: Some(with(Vector(32))),
            nmi_masked: true,
            ..EventsState::default()
        },
    ] {
        assert_eq!(e.set_state(&bad), Err(Invalid));
        assert_eq!(e, before);
    }
    // An external interrupt, waiting or being delivered, goes over as one and waits at the other end.
    let mut e = PendingEvents::new();
    e.queue_interrupt(0x31);
    let waiting = e.state();
    assert_eq!(waiting.interrupt_injected, Some(int(0x31)));
    e.select(OPEN, &mut NoSource);
    assert_eq!(e.state(), waiting);
    let mut copy = PendingEvents::new();
    copy.set_state(&waiting).unwrap();
    assert!(copy.select(SHUT, &mut NoSource).interrupt_window);
    assert_eq!(
        copy.select(OPEN, &mut NoSource).inject,
        Some(Injection::Interrupt(int(0x31)))
    );
    // One of software is not asked for again: its delivery goes on.
    let soft = Interrupt {
        vector: 0x80,
        insn_len: 2,
    };
    copy.set_state(&EventsState {
        interrupt_injected: Some(soft),
        ..EventsState::default()
    })
    .unwrap();
    assert_eq!(
        copy.select(SHUT, &mut NoSource).inject,
        Some(Injection::Interrupt(soft))
    );
    assert_eq!(copy.interrupt_in_bitmap(), None);

    let mut e = PendingEvents::new();
    e.raise(gp());
    e.drop_pending_exception();
    assert!(e.is_idle());
}

/// A controller with one interrupt.
struct One(Option<u8>);

impl InterruptSource for One {
    fn waits(&mut self) -> bool {
        self.0.is_some()
    }

    fn acknowledge(&mut self) -> Option<u8> {
        self.0.take()
    }
}

fn with_all(classes: &[Class]) -> (PendingEvents, One) {
    let mut e = PendingEvents::new();
    let mut source = One(None);
    for class in classes {
        match class {
            Class::Redelivery => e.redeliver(Some(Vectoring::Interrupt(Interrupt {
                vector: 0x21,
                insn_len: 0,
            }))),
            Class::Exception => e.raise(gp()),
            Class::Nmi => e.queue_nmi(),
            Class::Interrupt => source.0 = Some(0x41),
        }
    }
    (e, source)
}

fn class_of(injection: Option<Injection>) -> Option<Class> {
    Some(match injection? {
        Injection::Interrupt(Interrupt { vector: 0x21, .. }) => Class::Redelivery,
        Injection::Exception(_) => Class::Exception,
        Injection::Nmi => Class::Nmi,
        Injection::Interrupt(_) => Class::Interrupt,
    })
}

/// Each row comes before those below it, and lets them have their turn.
#[test]
fn each_row_comes_before_those_below() {
    for (n, row) in PRIORITIES.iter().enumerate() {
        let classes: Vec<_> = PRIORITIES[n..].iter().map(|row| row.class).collect();
        let (mut e, mut source) = with_all(&classes);
        let s = e.select(OPEN, &mut source);
        assert_eq!(class_of(s.inject), Some(row.class));
        let below = &classes[1..];
        assert_eq!(
            s.exit_at_once,
            below.contains(&Class::Exception)
                || below.contains(&Class::Nmi) && row.class != Class::Nmi,
            "{row:?}"
        );
        assert_eq!(s.interrupt_window, below.contains(&Class::Interrupt));
        assert!(!s.nmi_window);
    }
}

/// Each row is held back by what it says, and by nothing else.
#[test]
fn each_row_is_held_back_by_what_it_says() {
    for row in &PRIORITIES {
        for hold in [Holds::INTERRUPTS_OFF, Holds::SHADOW, Holds::NMI_HANDLER] {
            let (mut e, mut source) = with_all(&[row.class]);
            e.set_nmi_masked(hold == Holds::NMI_HANDLER);
            let gate = Gate {
                interrupts_enabled: hold != Holds::INTERRUPTS_OFF,
                shadow: if hold == Holds::SHADOW {
                    Shadow::Sti
                } else {
                    Shadow::None
                },
            };
            let s = e.select(gate, &mut source);
            let held = row.held_by.has(hold);
            let expected = (!held).then_some(row.class);
            assert_eq!(class_of(s.inject), expected, "{row:?} by {hold:?}");
            assert_eq!(s.nmi_window, held && row.class == Class::Nmi);
            assert_eq!(s.interrupt_window, held && row.class == Class::Interrupt);
            assert!(!s.exit_at_once);
        }
    }
}

/// What is held back lets the rows below it by.
#[test]
fn a_held_row_lets_others_by() {
    let (mut e, mut source) = with_all(&[Class::Nmi, Class::Interrupt]);
    e.set_nmi_masked(true);
    let s = e.select(OPEN, &mut source);
    assert_eq!(class_of(s.inject), Some(Class::Interrupt));
    assert!(s.nmi_window);
}
