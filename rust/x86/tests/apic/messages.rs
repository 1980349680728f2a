// SPDX-License-Identifier: GPL-2.0

//! Messages: the command register, destinations, the map, events.

use crate::board::*;
use rkvm_x86::apic::base::ApicMode;
use rkvm_x86::apic::events::*;
use rkvm_x86::apic::map::*;
use rkvm_x86::apic::message::*;
use rkvm_x86::apic::regs::DestinationFormat;
use rkvm_x86::apic::view::Delivered;
use rkvm_x86::ioapic::entry;
use rkvm_x86::line::Trigger;

fn decode(low: u32) -> Result<Message, NotSent> {
    IcrLow::new(low).decode(0x21)
}

#[test]
fn fields_of_the_command() {
    for (bits, mode) in [
        (0, DeliveryMode::Fixed),
        (1, DeliveryMode::LowestPriority),
        (2, DeliveryMode::Smi),
        (4, DeliveryMode::Nmi),
        (5, DeliveryMode::Init),
        (6, DeliveryMode::Startup),
    ] {
        let message = decode((bits << 8) | 0x4099).unwrap();
        assert_eq!((message.mode, message.vector), (mode, 0x99));
        assert_eq!(message.level, Level::Assert);
        assert_eq!(message.trigger, Trigger::Edge);
        assert_eq!(message.target, Target::Physical(0x21));
        // Only where the vector is one can it be illegal.
        assert_eq!(decode((bits << 8) | 0x400f).is_err(), bits < 2);
        assert!(decode((bits << 8) | 0x4010).is_ok());
    }
    assert_eq!(decode(0x0005), Err(NotSent::IllegalVector));
    assert_eq!(decode(0x4399), Err(NotSent::ReservedMode));
    assert_eq!(decode(0x4799), Err(NotSent::ReservedMode));
    for (low, target) in [
        (0x0_0099, Target::Physical(0x21)),
        (0x0_0899, Target::Logical(0x21)),
        (0x4_0099, Target::Itself),
        (0x8_0899, Target::All),
        (0xc_0099, Target::Others),
    ] {
        assert_eq!(decode(low).unwrap().target, target);
    }
    // INIT: the end of its level is nothing; an edge is one whatever the level.
    assert_eq!(decode(0x8500), Err(NotSent::InitDeassert));
    for low in [0x0500, 0x4500, 0xc500] {
        assert_eq!(decode(low).unwrap().mode, DeliveryMode::Init, "{low:#x}");
    }
    assert_eq!(decode(0x8099).unwrap().trigger, Trigger::Level);
    assert_eq!(decode(0x8099).unwrap().level, Level::Deassert);
}

#[test]
fn messages_of_an_io_apic() {
    use Broadcast::*;
    let convert =
        |bits: u64, broadcast| Message::from_io_apic(&entry::Entry::new(bits).message(), broadcast);
    for (bits, mode) in [
        (0, Some(DeliveryMode::Fixed)),
        (1, Some(DeliveryMode::LowestPriority)),
        (2, Some(DeliveryMode::Smi)),
        (3, None),
        (4, Some(DeliveryMode::Nmi)),
        (5, Some(DeliveryMode::Init)),
        (6, None),
        (7, Some(DeliveryMode::ExtInt)),
    ] {
        let message = convert(0x3500_0000_0000_0041 | (bits << 8), Everyone);
        assert_eq!(message.map(|m| m.mode), mode);
    }
    let level = convert(0x3500_0000_0000_8041, ByMode).unwrap();
    let expected = Message {
        trigger: Trigger::Level,
        ..Message::fixed(0x41, Target::Physical(0x35))
    };
    assert_eq!(level, expected);
    for (bits, everyone, by_mode) in [
        (
            0x3500_0000_0000_0841,
            Target::Logical(0x35),
            Target::Logical(0x35),
        ),
        (0xff00_0000_0000_0041, Target::All, Target::Physical(0xff)),
        (0xff00_0000_0000_0841, Target::All, Target::Logical(0xff)),
    ] {
        assert_eq!(convert(bits, Everyone).unwrap().target, everyone);
        assert_eq!(convert(bits, ByMode).unwrap().target, by_mode);
    }
}

#[test]
fn each_mode_is_delivered() {
    let page = Page::default();
    let apic = xapic(&page, 0);
    for (mode, delivered) in [
        (DeliveryMode::Fixed, Delivered::Queued),
        (DeliveryMode::LowestPriority, Delivered::Coalesced),
        (DeliveryMode::Smi, Delivered::Event(ApicEvent::Smi)),
        (DeliveryMode::Nmi, Delivered::Event(ApicEvent::Nmi)),
        (DeliveryMode::Init, Delivered::Event(ApicEvent::Init)),
        (
            DeliveryMode::Startup,
            Delivered::Event(ApicEvent::Sipi { vector: 0x99 }),
        ),
        (DeliveryMode::ExtInt, Delivered::Event(ApicEvent::ExtInt)),
    ] {
        assert_eq!(apic.view().deliver(&message(mode, 0x99)), delivered);
    }
    let end = Message {
        level: Level::Deassert,
        trigger: Trigger::Level,
        ..message(DeliveryMode::Init, 0)
    };
    assert_eq!(apic.view().deliver(&end), Delivered::Dropped);
}

#[test]
fn events_in_a_word() {
    let sipi = |vector| ApicEvent::Sipi { vector };
    let waits = Startup::WaitsForSipi;
    let none = ApicEvents::empty();
    let word = none.post(ApicEvent::Init).post(sipi(9)).post(sipi(0x9a));
    let (word, first) = word.take_startup(waits);
    assert_eq!(first, Some(ApicEvent::Init));
    assert_eq!(word.take_startup(waits), (none, Some(sipi(0x9a))));
    assert_eq!(word.take_startup(Startup::Started), (none, None));
    // An INIT forgets the SIPI before it.
    let word = none.post(sipi(1)).post(ApicEvent::Init);
    assert_eq!(word, ApicEvents::INIT);
    // The others keep to themselves.
    let others = none
        .post(ApicEvent::Nmi)
        .post(ApicEvent::Smi)
        .post(ApicEvent::ExtInt)
        .post(ApicEvent::IllegalVector);
    let word = others.post(sipi(0xff)).post(ApicEvent::Init);
    assert_eq!(word, others.with(ApicEvents::INIT));
    let (word, _) = word.take_startup(waits);
    assert_eq!(word.take_startup(waits), (others, None));
    let (left, taken) = others.take(ApicEvents::NMI | ApicEvents::INIT);
    assert_eq!(taken, ApicEvents::NMI);
    assert_eq!(left, others.without(ApicEvents::NMI));
}

const FLAT: DestinationFormat = DestinationFormat::Flat;
const CLUSTER: DestinationFormat = DestinationFormat::Cluster;

fn x(id: u8, ldr: u8, format: DestinationFormat) -> Identity {
    Identity {
        id: id.into(),
        mode: ApicMode::Xapic,
        xapic_id: id,
        ldr: u32::from(ldr) << 24,
        format,
        ids: IdFormat::Wide,
    }
}

fn x2(id: u32) -> Identity {
    Identity {
        id,
        mode: ApicMode::X2apic,
        xapic_id: 0xcc,
        ldr: x2apic_ldr(id),
        format: FLAT,
        ids: IdFormat::Wide,
    }
}

#[test]
fn shorthands() {
    let apic = x(3, 0, FLAT);
    let to = |target, sender| apic.matches(target, sender);
    assert!(to(Target::Itself, Some(3)) && !to(Target::Itself, Some(4)));
    assert!(!to(Target::Itself, None) && to(Target::Others, None));
    assert!(!to(Target::Others, Some(3)) && to(Target::Others, Some(4)));
    assert!(to(Target::All, Some(3)) && to(Target::All, None));
    let off = Identity {
        mode: ApicMode::Disabled,
        ..apic
    };
    for target in [
        Target::Itself,
        Target::All,
        Target::Others,
        Target::Physical(3),
        Target::Physical(u32::MAX),
        Target::Logical(0xff),
    ] {
        assert!(!off.matches(target, Some(3)));
    }
}

#[test]
fn physical_destinations() {
    let to = |apic: Identity, id| apic.matches(Target::Physical(id), None);
    let apic = x(3, 0, FLAT);
    assert!(to(apic, 3) && !to(apic, 4) && !to(apic, 0x103));
    assert!(to(apic, 0xff) && to(apic, u32::MAX));
    let moved = Identity { id: 9, ..apic };
    assert!(to(moved, 3) && !to(moved, 9), "the ID can be changed");
    let apic = x2(3);
    assert!(to(apic, 3) && !to(apic, 0xff) && to(apic, u32::MAX));
    assert!(to(x2(0xff), 0xff) && to(x2(0x103), 0x103) && !to(x2(0x103), 3));
    // Too wide for its mode.
    let wide = Identity {
        id: 0x103,
        ..x(3, 0, FLAT)
    };
    assert!(to(wide, 0x103) && !to(wide, 3));
    let narrow = Identity {
        ids: IdFormat::Narrow,
        ..wide
    };
    assert!(to(narrow, 0x103) && to(narrow, 3));
    let moved = Identity {
        xapic_id: 5,
        ..wide
    };
    assert!(to(moved, 5));
}

#[test]
fn logical_destinations() {
    let to = |apic: Identity, id| apic.matches(Target::Logical(id), None);
    let apic = x(0, 0b0110, FLAT);
    for d in 0..0x100 {
        assert_eq!(to(apic, d), d & 6 != 0 || d == 0xff, "{d:#x}");
        let cluster = x(0, 0x26, CLUSTER);
        let own = d >> 4 == 2 && d & 6 != 0;
        assert_eq!(to(cluster, d), own || d == 0xff, "{d:#x}");
        let reserved = x(0, 0x26, DestinationFormat::new(0x5fff_ffff));
        assert_eq!(to(reserved, d), d == 0xff);
        let x2 = x2(0x2f);
        assert!(!to(x2, d));
        assert_eq!(to(x2, (2 << 16) | (d << 8)), d & 0x80 != 0);
        assert!(!to(x2, (3 << 16) | (d << 8)));
    }
    assert!(to(x(0, 0, FLAT), 0xff) && to(x2(1), u32::MAX) && to(x2(1), 0xff));
    assert_eq!(x2apic_ldr(0), 1);
    assert_eq!(x2apic_ldr(0x12f), 0x0012_8000);
}

#[test]
fn the_page_says_who_it_is() {
    let page = Page::default();
    let mut apic = xapic(&page, 0x21);
    let _ = write(&mut apic, 0x20, 0x7700_0000);
    let _ = write(&mut apic, 0xd0, 0x1200_0000);
    let _ = write(&mut apic, 0xe0, 0x0fff_ffff);
    let identity = apic.view().identity();
    assert_eq!((identity.id, identity.xapic_id), (0x21, 0x77));
    assert_eq!(identity.format, CLUSTER);
    assert!(identity.matches(Target::Logical(0x13), None));
    assert_eq!(apic.view().software(), Software::Enabled);
    let _ = write(&mut apic, 0xf0, 0xff);
    assert_eq!(apic.view().software(), Software::Disabled);
    enter_x2apic(&mut apic);
    let identity = apic.view().identity();
    assert!(identity.matches(Target::Logical(0x0002_0002), None));
}

fn map_of(apics: &[Identity]) -> ApicMap<Vec<Entry>> {
    let mut map = ApicMap::new(vec![Entry::default(); 0x110]);
    for (vcpu, apic) in (0..).zip(apics) {
        map.add(vcpu, apic, Software::Enabled);
    }
    map
}

fn found(map: &ApicMap<Vec<Entry>>, target: Target) -> Option<Vec<u16>> {
    match map.lookup(target) {
        Lookup::Found(targets) => {
            assert_eq!(
                targets.clone().count(),
                targets.clone().collect::<Vec<_>>().len()
            );
            Some(targets.collect())
        }
        Lookup::Scan => None,
    }
}

#[test]
fn maps_of_one_mode() {
    let physical = |map: &_, id| found(map, Target::Physical(id));
    let logical = |map: &_, id| found(map, Target::Logical(id));

    let map = map_of(&[x2(0), x2(1), x2(0x1f), x2(0xff), x2(0x101)]);
    assert_eq!(physical(&map, 0x1f), Some(vec![2]));
    assert_eq!(physical(&map, 0xff), Some(vec![3]));
    assert_eq!(physical(&map, 0x101), Some(vec![4]));
    assert_eq!(physical(&map, 0x5000), Some(vec![]));
    assert_eq!(physical(&map, u32::MAX), None);
    assert_eq!(logical(&map, 0xffff), Some(vec![0, 1]));
    assert_eq!(logical(&map, 0x0001_8000), Some(vec![2]));
    assert_eq!(logical(&map, 0x0010_0003), Some(vec![4]));
    assert_eq!(logical(&map, 0xfffe_ffff), Some(vec![]));
    assert_eq!(found(&map, Target::All), None);

    let map = map_of(&[
        x(0, 1, FLAT),
        x(1, 2, FLAT),
        x(5, 0x80, FLAT),
        x(6, 0, FLAT),
    ]);
    assert_eq!(physical(&map, 5), Some(vec![2]));
    assert_eq!(physical(&map, 0xff), None);
    assert_eq!(logical(&map, 0x83), Some(vec![0, 1, 2]));
    assert_eq!(logical(&map, 0x04), Some(vec![]));
    assert_eq!(logical(&map, 0xff), None);

    let map = map_of(&[
        x(0, 0x11, CLUSTER),
        x(1, 0x12, CLUSTER),
        x(2, 0x28, CLUSTER),
    ]);
    assert_eq!(logical(&map, 0x1f), Some(vec![0, 1]));
    assert_eq!(logical(&map, 0x2f), Some(vec![2]));
    assert_eq!(logical(&map, 0x3f), Some(vec![]));
    assert_eq!(logical(&map, 0x1_11), Some(vec![]));
}

#[test]
fn maps_that_cannot_say() {
    let scan = |apics: &[Identity], target| found(&map_of(apics), target).is_none();
    let l = Target::Logical(1);
    let p = Target::Physical(1);
    assert!(scan(&[x(1, 1, FLAT), x(1, 2, FLAT)], p), "one ID twice");
    assert!(!scan(&[x(1, 1, FLAT), x(1, 2, FLAT)], l));
    assert!(scan(&[x(1, 1, FLAT), x(2, 1, FLAT)], l));
    assert!(!scan(&[x(1, 1, FLAT), x(2, 1, FLAT)], p));
    assert!(scan(&[x(1, 3, FLAT)], l), "not one bit");
    assert!(scan(&[x(1, 1, FLAT), x(2, 0x21, CLUSTER)], l));
    assert!(scan(&[x(1, 1, FLAT), x2(2)], l), "two modes");
    assert!(!scan(&[x(1, 0, FLAT), x2(2)], l), "who has no logical ID");
    assert!(scan(&[x2(1), x2(0x110)], p), "no room");
    assert!(scan(&[x2(1), x2(0x110)], l));
    // Not yet in x2APIC mode: it has a physical ID, and none of a cluster.
    let waiting = map_of(&[x2(0), x(1, 0, FLAT)]);
    assert_eq!(found(&waiting, Target::Logical(3)), Some(vec![0]));
    assert_eq!(found(&waiting, Target::Physical(1)), Some(vec![1]));
    // A new map of old storage forgets.
    let mut storage = [Entry::VACANT; 4];
    ApicMap::new(&mut storage[..]).add(0, &x2(1), Software::Enabled);
    let map = ApicMap::new(&mut storage[..]);
    assert!(matches!(map.lookup(p), Lookup::Found(t) if t.clone().count() == 0));
}

#[test]
fn the_lowest_priority_goes_by_the_vector() {
    let mut map = map_of(&[x2(0), x2(1), x2(3)]);
    map.add(3, &x2(7), Software::Disabled);
    let choose = |target, vector| match map.lookup(target) {
        Lookup::Found(targets) => targets.lowest_priority(vector),
        Lookup::Scan => panic!(),
    };
    for vector in 0..=255u8 {
        let expected = Some(u16::from(vector % 3));
        assert_eq!(choose(Target::Logical(0xffff), vector), expected);
        let expected = Some(1 + u16::from(vector % 2));
        assert_eq!(choose(Target::Logical(0xa), vector), expected);
        assert_eq!(choose(Target::Physical(3), vector), Some(2));
        assert_eq!(choose(Target::Physical(7), vector), None);
        assert_eq!(choose(Target::Logical(0x10), vector), None);
    }
    assert_eq!((arbitrate(9, 0), arbitrate(9, 4)), (None, Some(1)));
}
