// SPDX-License-Identifier: GPL-2.0

//! From a message in IRR to its end: priorities, the trigger mode, EOI.

use crate::board::*;
use rkvm_x86::apic::base::ApicMode;
use rkvm_x86::apic::message::*;
use rkvm_x86::apic::view::ApicView;
use rkvm_x86::apic::view::Delivered;
use rkvm_x86::apic::*;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

#[test]
fn a_vector_is_requested_served_and_ended() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    assert_eq!((apic.pending_interrupt(), apic.acknowledge()), (None, None));
    assert_eq!(apic.view().deliver(&edge(0x41)), Delivered::Queued);
    assert_eq!(apic.view().deliver(&edge(0x41)), Delivered::Coalesced);
    assert_eq!(apic.pending_interrupt(), Some(0x41));
    assert_eq!(vectors(&page, IRR), [0x41], "asking changes nothing");
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(vectors(&page, IRR), []);
    assert_eq!(vectors(&page, ISR), [0x41]);
    assert_eq!(read(&mut apic, 0xa0), 0x40);
    // Once more while it is served, and another of its class: they wait.
    assert_eq!(apic.view().deliver(&edge(0x41)), Delivered::Queued);
    assert_eq!(apic.view().deliver(&edge(0x4f)), Delivered::Queued);
    assert_eq!(apic.pending_interrupt(), None);
    // One of a higher class does not.
    let _ = apic.view().deliver(&edge(0x50));
    assert_eq!(apic.acknowledge(), Some(0x50));
    assert_eq!(vectors(&page, ISR), [0x41, 0x50]);
    assert_eq!(write(&mut apic, 0xb0, 7), Effect::Eoi(Eoi::Edge(0x50)));
    assert_eq!(apic.pending_interrupt(), None);
    assert_eq!(apic.eoi(), Eoi::Edge(0x41));
    assert_eq!(apic.acknowledge(), Some(0x4f));
    assert_eq!(apic.eoi(), Eoi::Edge(0x4f));
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(apic.eoi(), Eoi::Edge(0x41));
    assert_eq!((apic.eoi(), apic.ppr()), (Eoi::None, 0));
}

/// SDM vol. 3, 12.8.3.1, for every class of both.
#[test]
fn processor_priority() {
    for tpr in 0..=0xffu32 {
        for class in 1..=0xfu8 {
            let page = Page::default();
            let mut apic = xapic(&page, 0);
            let _ = apic.view().deliver(&edge((class << 4) | 5));
            assert_eq!(apic.acknowledge(), Some((class << 4) | 5));
            let _ = write(&mut apic, 0x80, tpr);
            let expected = if (tpr >> 4) >= class.into() {
                tpr
            } else {
                u32::from(class) << 4
            };
            assert_eq!(read(&mut apic, 0xa0), expected);
            for next in [0x10, 0x1f, 0x65, 0xf0, 0xff] {
                let page = Page::default();
                let mut apic = xapic(&page, 0);
                let _ = write(&mut apic, 0x80, tpr);
                let _ = apic.view().deliver(&edge(next));
                let pending = (u32::from(next >> 4) > tpr >> 4).then_some(next);
                assert_eq!(apic.pending_interrupt(), pending);
            }
        }
    }
}

#[test]
fn cr8_is_the_class_of_the_task_priority() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let _ = apic.view().deliver(&edge(0x95));
    for cr8 in 0..16 {
        assert_eq!(apic.set_cr8(cr8), Effect::Recheck);
        assert_eq!(apic.cr8(), cr8);
        assert_eq!(read(&mut apic, 0x80), u32::from(cr8) << 4);
        assert_eq!(apic.pending_interrupt().is_some(), cr8 < 9);
    }
    let _ = apic.set_cr8(0xf3);
    assert_eq!(apic.cr8(), 3);
    let _ = write(&mut apic, 0x80, 0x5a);
    assert_eq!(apic.cr8(), 5);
}

#[test]
fn levels_are_broadcast_at_their_end() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    assert_eq!(apic.view().deliver(&level(0x61)), Delivered::Queued);
    assert_eq!(vectors(&page, TMR), [0x61]);
    assert_eq!(apic.acknowledge(), Some(0x61));
    assert_eq!(apic.eoi(), Eoi::Broadcast(0x61));
    assert_eq!(vectors(&page, TMR), [0x61], "until it comes otherwise");

    let _ = write(&mut apic, 0xf0, 0x11ff);
    let _ = apic.view().deliver(&level(0x61));
    assert_eq!(apic.acknowledge(), Some(0x61));
    assert_eq!(apic.ended(0x61), Eoi::Suppressed(0x61));
    assert_eq!(apic.eoi(), Eoi::Suppressed(0x61));

    let _ = apic.view().deliver(&edge(0x61));
    assert_eq!(vectors(&page, TMR), []);
    assert_eq!(apic.acknowledge(), Some(0x61));
    assert_eq!(apic.eoi(), Eoi::Edge(0x61));

    let gone = Message {
        level: Level::Deassert,
        ..level(0x62)
    };
    assert_eq!(apic.view().deliver(&gone), Delivered::Dropped);
    assert_eq!((vectors(&page, TMR), vectors(&page, IRR)), (vec![], vec![]));
}

#[test]
fn who_takes_no_vectors() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let _ = apic.view().deliver(&edge(0x61));
    let _ = apic.set_base(0xfee0_0000, &features(), false).unwrap();
    assert_eq!(apic.pending_interrupt(), None);
    for mode in [DeliveryMode::Fixed, DeliveryMode::Nmi, DeliveryMode::Init] {
        let dropped = apic.view().deliver(&message(mode, 0x71));
        assert_eq!(dropped, Delivered::Dropped);
    }
    let _ = apic.set_base(0xfee0_0800, &features(), false).unwrap();
    assert_eq!(apic.pending_interrupt(), Some(0x61));
    // Disabled by software, it keeps what it has.
    let _ = write(&mut apic, 0xf0, 0x0ef);
    assert_eq!(apic.view().deliver(&edge(0x71)), Delivered::Dropped);
    assert_eq!(apic.acknowledge(), Some(0x61));
    assert_eq!((apic.acknowledge(), apic.spurious_vector()), (None, 0xef));
    assert_eq!(vectors(&page, ISR), [0x61]);
}

/// Others deliver while the vCPU takes: each request is served, and served once.
#[test]
fn deliveries_from_other_threads() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let view = ApicView::new(&page, ApicMode::Xapic, 0, IdFormat::Wide);
    let queued = AtomicU32::new(0);
    let sending = AtomicU32::new(3);
    let mut served = 0;
    std::thread::scope(|scope| {
        for sender in 0..3u32 {
            let (view, queued, sending) = (&view, &queued, &sending);
            scope.spawn(move || {
                for n in 0..20_000u32 {
                    let vector = 0x20 + (n.wrapping_mul(7 + sender) % 0xe0) as u8;
                    if view.deliver(&edge(vector)) == Delivered::Queued {
                        queued.fetch_add(1, SeqCst);
                    }
                }
                sending.fetch_sub(1, SeqCst);
            });
        }
        loop {
            let last = sending.load(SeqCst) == 0;
            while let Some(vector) = apic.acknowledge() {
                assert_eq!(apic.eoi(), Eoi::Edge(vector));
                served += 1;
            }
            if last {
                break;
            }
        }
    });
    assert_eq!(served, queued.load(SeqCst));
    assert_eq!(vectors(&page, IRR), []);
}

#[test]
fn every_legal_vector() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    for vector in 0..=255u8 {
        let expected = if vector < 16 {
            Delivered::Event(events::ApicEvent::IllegalVector)
        } else {
            Delivered::Queued
        };
        assert_eq!(apic.view().deliver(&edge(vector)), expected);
    }
    // By class from above: the first of a class bars the others until it is done.
    for vector in (16..=255u8).rev() {
        assert_eq!(apic.acknowledge(), Some(vector));
        assert_eq!(apic.acknowledge(), None);
        assert_eq!(apic.eoi(), Eoi::Edge(vector));
    }
}
