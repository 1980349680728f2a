// SPDX-License-Identifier: GPL-2.0

//! An APIC in memory, and short ways to its registers.

#![allow(unreachable_pub)]

use rkvm_x86::apic::base::Role;
use rkvm_x86::apic::message::DeliveryMode;
use rkvm_x86::apic::message::IdFormat;
use rkvm_x86::apic::message::Level;
use rkvm_x86::apic::message::Message;
use rkvm_x86::apic::message::Target;
use rkvm_x86::apic::page::ApicPage;
use rkvm_x86::apic::regs::LvtSet;
use rkvm_x86::apic::regs::TimerModes;
use rkvm_x86::apic::timer::BusPeriod;
use rkvm_x86::apic::timer::Now;
use rkvm_x86::apic::Apic;
use rkvm_x86::apic::Config;
use rkvm_x86::apic::Effect;
use rkvm_x86::apic::EoiSuppression;
use rkvm_x86::apic::Lint0Reset;
use rkvm_x86::cpuid::features::Features;
use rkvm_x86::cpuid::features::GuestFeatures;
use rkvm_x86::line::Trigger;
use rkvm_x86::msr::Msr;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

/// The page. It refuses offsets that the layer promises not to use.
pub struct Page([AtomicU32; 256]);

impl Default for Page {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU32::new(0)))
    }
}

impl Page {
    fn word(&self, offset: u16) -> &AtomicU32 {
        assert!(offset % 4 == 0 && offset < 0x400, "{offset:#x}");
        &self.0[usize::from(offset / 4)]
    }
}

impl ApicPage for Page {
    fn read(&self, offset: u16) -> u32 {
        self.word(offset).load(SeqCst)
    }
    fn write(&self, offset: u16, value: u32) {
        self.word(offset).store(value, SeqCst);
    }
    fn fetch_or(&self, offset: u16, bits: u32) -> u32 {
        self.word(offset).fetch_or(bits, SeqCst)
    }
    fn fetch_and(&self, offset: u16, bits: u32) -> u32 {
        self.word(offset).fetch_and(bits, SeqCst)
    }
}

pub type TestApic<'a> = Apic<&'a Page>;

pub const T0: Now = Now {
    ns: 1_000_000,
    tsc: 5_000_000,
};

/// `T0`, and so many nanoseconds.
pub const fn after(ns: u64) -> Now {
    Now {
        ns: T0.ns + ns,
        tsc: T0.tsc,
    }
}

/// Everything that is optional.
pub const fn full(id: u32) -> Config {
    Config {
        id,
        role: Role::Bootstrap,
        ids: IdFormat::Wide,
        lvts: LvtSet::WithCmci,
        timer: TimerModes::WithTscDeadline,
        eoi: EoiSuppression::Offered,
        lint0: Lint0Reset::Masked,
        bus: BusPeriod::DEFAULT,
    }
}

pub fn features() -> GuestFeatures {
    GuestFeatures {
        flags: Features::X2APIC,
        maxphyaddr: 40,
        ..GuestFeatures::default()
    }
}

/// An APIC in xAPIC mode, enabled by software.
pub fn xapic(page: &Page, id: u32) -> TestApic<'_> {
    let mut apic = Apic::new(page, full(id));
    let _ = write(&mut apic, 0xf0, 0x1ff);
    apic
}

/// An APIC in x2APIC mode, enabled by software.
pub fn x2apic(page: &Page, id: u32) -> TestApic<'_> {
    let mut apic = xapic(page, id);
    enter_x2apic(&mut apic);
    apic
}

pub fn enter_x2apic(apic: &mut TestApic<'_>) {
    let base = apic.base().bits() | 0xc00;
    assert_eq!(
        apic.set_base(base, &features(), false),
        Ok(Effect::Identity)
    );
}

pub fn read(apic: &mut TestApic<'_>, offset: u16) -> u32 {
    apic.mmio_read(offset, 4, &T0).unwrap()
}

pub fn write(apic: &mut TestApic<'_>, offset: u16, value: u32) -> Effect {
    apic.mmio_write(offset, 4, value, &T0).unwrap()
}

pub const fn msr(offset: u16) -> Msr {
    Msr(0x800 + (offset >> 4) as u32)
}

pub fn message(mode: DeliveryMode, vector: u8) -> Message {
    Message {
        mode,
        ..Message::fixed(vector, Target::All)
    }
}

pub fn level(vector: u8) -> Message {
    Message {
        trigger: Trigger::Level,
        level: Level::Assert,
        ..Message::fixed(vector, Target::All)
    }
}

pub fn edge(vector: u8) -> Message {
    Message::fixed(vector, Target::All)
}

/// The vectors in one of the three banks, which begins at an offset.
pub fn vectors(page: &Page, bank: u16) -> Vec<u8> {
    (0..=255u8)
        .filter(|&v| page.read(bank + u16::from(v / 32) * 16) & (1 << (v % 32)) != 0)
        .collect()
}

pub const ISR: u16 = 0x100;
pub const TMR: u16 = 0x180;
pub const IRR: u16 = 0x200;
