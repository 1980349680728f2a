// SPDX-License-Identifier: GPL-2.0

//! Every entry point of the layer, made concrete, to be compiled as the kernel compiles it. See `tests/no_panic.rs`.
#![no_std]

#[path = "../../mod.rs"]
pub mod x86;

use x86::apic::events::ApicEvents;
use x86::apic::events::Startup;
use x86::apic::map::ApicMap;
use x86::apic::map::Entry;
use x86::apic::map::Lookup;
use x86::apic::map::Software;
use x86::apic::message::Broadcast;
use x86::apic::message::Identity;
use x86::apic::message::Message;
use x86::apic::message::Target;
use x86::apic::page::ApicPage;
use x86::apic::regs::LvtEntry;
use x86::apic::state::Image;
use x86::apic::timer::Clock;
use x86::apic::view::ApicView;
use x86::apic::view::Delivered;
use x86::apic::Apic;
use x86::apic::Config;
use x86::apic::Effect;
use x86::apic::Reset;
use x86::cpuid::features::GuestFeatures;
use x86::cpuid::policy::supported;
use x86::cpuid::policy::Policy;
use x86::cpuid::table::CpuidTable;
use x86::cpuid::table::RuntimeState;
use x86::cpuid::CpuidEntry;
use x86::cpuid::CpuidRegs;
use x86::cpuid::XsaveLayout;
use x86::emulate::Cpu;
use x86::emulate::Emulator;
use x86::emulate::Event;
use x86::emulate::Fpu;
use x86::emulate::Outcome;
use x86::emulate::TableReg;
use x86::emulate::TaskSwitch;
use x86::io::StringIo;
use x86::ioapic::Ioapic;
use x86::ioapic::IoapicState;
use x86::line::Signal;
use x86::line::Source;
use x86::msr::Msr;
use x86::paging::GuestMemory;
use x86::paging::MemoryError;
use x86::paging::PageAccess;
use x86::paging::Paging;
use x86::paging::Translation;
use x86::paging::WalkError;
use x86::pic;
use x86::pic::Pic;
use x86::pic::PicState;
use x86::pit;
use x86::pit::reinject::Policy as TickPolicy;
use x86::pit::reinject::Reinject;
use x86::pit::Pit;
use x86::pit::PitState2;
use x86::regs::Cr0;
use x86::regs::Cr3;
use x86::regs::Cr4;
use x86::regs::Efer;
use x86::regs::Gpr;
use x86::regs::Rflags;
use x86::segment::SegReg;
use x86::segment::Segment;

/// Where registers come from: nothing is known of their values.
#[allow(clippy::missing_safety_doc)]
pub trait Outside {
    fn get(&mut self, which: u32) -> u64;
    fn set(&mut self, which: u32, value: u64);
    fn segment(&mut self, which: u32) -> Segment;
    fn memory(&mut self, gpa: u64, data: &mut [u8]) -> u32;
    fn exchange(&mut self, gpa: u64, len: u8, old: u64, new: u64) -> u32;
}

pub struct Guest<'a>(&'a mut dyn Outside);

impl Fpu for Guest<'_> {
    fn xcr0(&mut self) -> u64 {
        self.0.get(25)
    }
    fn xmm(&mut self, n: u8) -> [u64; 2] {
        [self.0.get(64 ^ u32::from(n)), self.0.get(80 ^ u32::from(n))]
    }
    fn set_xmm(&mut self, n: u8, value: [u64; 2]) {
        self.0.set(64 ^ u32::from(n), value[0] ^ value[1])
    }
    fn ymm(&mut self, n: u8) -> [u64; 4] {
        [self.0.get(64 ^ u32::from(n)); 4]
    }
    fn set_ymm(&mut self, n: u8, value: [u64; 4]) {
        self.0.set(64 ^ u32::from(n), value[0] ^ value[3])
    }
    fn mmx(&mut self, n: u8) -> u64 {
        self.0.get(32 ^ u32::from(n))
    }
    fn set_mmx(&mut self, n: u8, value: u64) {
        self.0.set(32 ^ u32::from(n), value)
    }
    fn mxcsr(&mut self) -> u32 {
        self.0.get(26) as u32
    }
    fn set_mxcsr(&mut self, value: u32) {
        self.0.set(26, value.into())
    }
    fn fpu_control(&mut self) -> u16 {
        self.0.get(27) as u16
    }
    fn set_fpu_control(&mut self, value: u16) {
        self.0.set(27, value.into())
    }
    fn fpu_status(&mut self) -> u16 {
        self.0.get(28) as u16
    }
    fn fpu_init(&mut self) {
        self.0.set(28, 0)
    }
}

impl Cpu for Guest<'_> {
    fn gpr(&mut self, r: Gpr) -> u64 {
        self.0.get(r as u32)
    }
    fn set_gpr(&mut self, r: Gpr, value: u64) {
        self.0.set(r as u32, value)
    }
    fn rip(&mut self) -> u64 {
        self.0.get(16)
    }
    fn set_rip(&mut self, value: u64) {
        self.0.set(16, value)
    }
    fn rflags(&mut self) -> Rflags {
        Rflags::new(self.0.get(17))
    }
    fn set_rflags(&mut self, value: Rflags) {
        self.0.set(17, value.bits())
    }
    fn segment(&mut self, reg: SegReg) -> Segment {
        self.0.segment(reg as u32)
    }
    fn cr0(&mut self) -> Cr0 {
        Cr0::new(self.0.get(18))
    }
    fn cr3(&mut self) -> Cr3 {
        Cr3::new(self.0.get(19))
    }
    fn cr4(&mut self) -> Cr4 {
        Cr4::new(self.0.get(20))
    }
    fn efer(&mut self) -> Efer {
        Efer::new(self.0.get(21))
    }
    fn cpl(&mut self) -> u8 {
        self.0.get(22) as u8
    }
    fn set_segment(&mut self, reg: SegReg, value: &Segment) {
        self.0.set(32 | reg as u32, value.base);
    }
    fn set_cr3(&mut self, value: Cr3) {
        self.0.set(40, value.bits());
    }
    fn task_switched(&mut self) {}
    fn gdtr(&mut self) -> TableReg {
        TableReg {
            base: self.0.get(41),
            limit: self.0.get(42) as u16,
        }
    }
    fn set_gdtr(&mut self, value: TableReg) {
        self.0.set(41, value.base);
    }
    fn idtr(&mut self) -> TableReg {
        TableReg {
            base: self.0.get(43),
            limit: self.0.get(44) as u16,
        }
    }
    fn set_idtr(&mut self, value: TableReg) {
        self.0.set(43, value.base);
    }
    fn msr(&mut self, msr: Msr) -> Option<u64> {
        Some(self.0.get(msr.0))
    }
    fn set_msr(&mut self, msr: Msr, value: u64) {
        self.0.set(msr.0, value);
    }
    fn unblock_nmi(&mut self) {}
    fn maxphyaddr(&mut self) -> u8 {
        self.0.get(23) as u8
    }
    fn gbpages(&mut self) -> bool {
        self.0.get(24) != 0
    }
}

fn answer(code: u32) -> Result<(), MemoryError<u32>> {
    match code {
        0 => Ok(()),
        1 => Err(MemoryError::Mmio),
        code => Err(MemoryError::Host(code)),
    }
}

impl GuestMemory for Guest<'_> {
    type Error = u32;

    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError<u32>> {
        answer(self.0.memory(gpa, buf))
    }
    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), MemoryError<u32>> {
        answer(self.0.memory(gpa ^ data.len() as u64, &mut []))
    }
    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError<u32>> {
        match self.0.exchange(gpa, len, old, new) {
            2 => Ok(false),
            code => answer(code).map(|()| true),
        }
    }
}

#[inline(never)]
pub fn step(emulator: &mut Emulator, cpu: &mut Guest<'_>, memory: &mut Guest<'_>) -> Outcome<u32> {
    emulator.step(cpu, memory)
}

#[inline(never)]
pub fn switch_task(
    emulator: &mut Emulator,
    cpu: &mut Guest<'_>,
    memory: &mut Guest<'_>,
    switch: &TaskSwitch,
) -> Outcome<u32> {
    emulator.switch_task(cpu, memory, switch)
}

#[inline(never)]
pub fn deliver(
    emulator: &mut Emulator,
    cpu: &mut Guest<'_>,
    memory: &mut Guest<'_>,
    event: Event,
) -> Outcome<u32> {
    emulator.deliver(cpu, memory, event)
}

#[inline(never)]
pub fn translate(
    paging: &Paging,
    memory: &mut Guest<'_>,
    linear: u64,
    access: PageAccess,
) -> Result<Translation, WalkError<u32>> {
    paging.translate(memory, linear, access)
}

#[inline(never)]
pub fn string_io(
    io: &StringIo,
    cpu: &mut Guest<'_>,
    memory: &mut Guest<'_>,
    data: &mut [u8],
    max: u32,
) -> bool {
    let Ok(Some(transfer)) = io.prepare(cpu, memory, max) else {
        return false;
    };
    let gathered = transfer.gather(memory, data).is_ok();
    let scattered = transfer.scatter(memory, data).is_ok();
    transfer.finish(cpu) && gathered && scattered
}

#[inline(never)]
pub fn cpuid(
    entries: &mut [CpuidEntry],
    state: &RuntimeState,
    layout: &XsaveLayout,
    function: u32,
    index: u32,
) -> Option<(CpuidRegs, GuestFeatures)> {
    let mut table = CpuidTable::new(entries).ok()?;
    table.update(state, layout);
    let features = GuestFeatures::derive(|f, i| table.find(f, i).map(CpuidEntry::regs));
    Some((table.lookup(function, index), features))
}

#[inline(never)]
pub fn policy(
    policy: &Policy,
    entries: &mut [CpuidEntry],
    host: fn(u32, u32) -> CpuidRegs,
) -> usize {
    supported(policy, host, entries).unwrap_or(0)
}

/// Where the registers of an APIC and its clocks come from.
pub trait Board {
    fn page(&self, which: u32, offset: u16, value: u32) -> u32;
    fn clock(&self, which: u32) -> u64;
}

#[derive(Clone, Copy)]
pub struct Local<'a>(&'a dyn Board);

impl ApicPage for Local<'_> {
    fn read(&self, offset: u16) -> u32 {
        self.0.page(0, offset, 0)
    }
    fn write(&self, offset: u16, value: u32) {
        self.0.page(1, offset, value);
    }
    fn fetch_or(&self, offset: u16, bits: u32) -> u32 {
        self.0.page(2, offset, bits)
    }
    fn fetch_and(&self, offset: u16, bits: u32) -> u32 {
        self.0.page(3, offset, bits)
    }
}

impl Clock for Local<'_> {
    fn ns(&self) -> u64 {
        self.0.clock(0)
    }
    fn tsc(&self) -> u64 {
        self.0.clock(1)
    }
}

#[inline(never)]
pub fn apic_new(page: Local<'static>, config: Config) -> Apic<Local<'static>> {
    Apic::new(page, config)
}

#[inline(never)]
pub fn apic_access(
    apic: &mut Apic<Local<'_>>,
    clock: Local<'_>,
    way: u32,
    which: u32,
    value: u64,
    features: &GuestFeatures,
) -> Effect {
    let effect = match way {
        0 => apic.mmio_write(which as u16, value as usize, value as u32, &clock),
        1 => apic.write_msr(Msr(which), value, &clock).ok(),
        2 => apic.set_base(value, features, which != 0).ok(),
        3 => Some(apic.set_cr8(value as u8)),
        4 => Some(apic.set_tsc_deadline(value)),
        5 => Some(apic.written(which as u16, &clock)),
        6 => {
            apic.reset(Reset::Init);
            None
        }
        7 => {
            let config = Config::new(which, apic.config().role);
            Some(apic.reconfigure(&config))
        }
        _ => None,
    };
    effect.unwrap_or(Effect::None)
}

#[inline(never)]
pub fn apic_read(apic: &mut Apic<Local<'_>>, clock: Local<'_>, which: u32, len: usize) -> u64 {
    match apic.read_msr(Msr(which), &clock) {
        Ok(value) => value ^ apic.tsc_deadline() ^ u64::from(apic.cr8()),
        Err(_) => u64::from(apic.mmio_read(which as u16, len, &clock).unwrap_or(0)),
    }
}

#[inline(never)]
pub fn apic_interrupt(apic: &mut Apic<Local<'_>>, clock: Local<'_>, entry: LvtEntry) -> bool {
    let vector = apic.acknowledge().unwrap_or_else(|| apic.spurious_vector());
    let (_, timer) = apic.run_timer(&clock);
    let local = apic.deliver_local(entry);
    timer == local && apic.eoi() == apic.ended(vector) && apic.accepts_extint()
}

#[inline(never)]
pub fn apic_state(apic: &mut Apic<Local<'_>>, clock: Local<'_>, image: &mut Image) -> bool {
    let restored = apic.restore(image, &clock).is_ok();
    apic.save(image, &clock);
    restored
}

#[inline(never)]
pub fn apic_deliver(
    view: &ApicView<'_, Local<'_>>,
    message: &Message,
    sender: Option<u32>,
    events: ApicEvents,
    startup: Startup,
    pin: x86::ioapic::entry::Entry,
) -> ApicEvents {
    let from_pin = Message::from_io_apic(&pin.message(), Broadcast::ByMode);
    let message = from_pin.as_ref().unwrap_or(message);
    if !view.identity().matches(message.target, sender) {
        return events;
    }
    match view.deliver(message) {
        Delivered::Event(event) => events.post(event).take_startup(startup).0,
        _ => events,
    }
}

#[inline(never)]
pub fn apic_map(
    entries: &mut [Entry],
    apics: &[(u16, Identity, Software)],
    target: Target,
    vector: u8,
) -> Option<(u16, usize)> {
    let mut map = ApicMap::new(entries);
    for (vcpu, identity, software) in apics {
        map.add(*vcpu, identity, *software);
    }
    match map.lookup(target) {
        Lookup::Found(targets) => Some((targets.lowest_priority(vector)?, targets.count())),
        Lookup::Scan => None,
    }
}

#[inline(never)]
pub fn io_apic(
    chip: &mut Ioapic,
    state: &mut IoapicState,
    gpa: u64,
    data: &mut [u8],
    source: u8,
) -> Option<u32> {
    let requests = chip.set_state(state);
    let mut messages = 0usize;
    for pin in requests {
        messages ^= usize::from(chip.raise(pin).message()?.vector);
    }
    let read = chip.read(gpa, data).is_ok();
    let write = chip.write(gpa, data).ok()?;
    let pin = write.map_or(source, |w| w.pin);
    let pending = write.is_some_and(|w| w.pending && w.mask() != x86::ioapic::MaskChange::None);
    for signal in [Signal::High, Signal::Low] {
        let raise = chip.set_line(pin, Source::new(source)?, signal);
        messages = messages.wrapping_add(raise.outcome().status() as usize);
    }
    let pins = chip.pins_of(source);
    for pin in chip.eoi(pins) {
        messages ^= usize::from(chip.fire(pin)?.destination);
    }
    chip.refused(pin);
    chip.withdraw(pin);
    *state = chip.state();
    let entry = chip.entry(pin)?.half(x86::ioapic::entry::Half::High);
    Some(entry ^ u32::from(read) ^ u32::from(pending) ^ messages as u32 ^ chip.requests().bits())
}

#[inline(never)]
pub fn pic_pair(
    pics: &mut Pic,
    states: &mut [PicState; 2],
    port: u16,
    value: u8,
    pin: u8,
) -> Option<u32> {
    let [master, slave] = states;
    let mut sum = 0;
    let mut add = |effect: pic::Effect| {
        let int = effect.int.is_some_and(Signal::is_high);
        sum ^= effect.ended.bits() ^ effect.masks.bits() ^ u32::from(int);
    };
    add(pics.set_state(pic::Role::Master, master));
    add(pics.set_state(pic::Role::Slave, slave));
    add(pics.set_line(pin, Source::new(value)?, Signal::High).1);
    let (vector, effect) = pics.acknowledge();
    add(effect);
    let port = pic::Port::new(port)?;
    add(pics.write(port, value));
    let (read, effect) = pics.read(port);
    add(effect);
    *master = pics.state(pic::Role::Master);
    *slave = pics.state(pic::Role::Slave);
    Some(sum ^ u32::from(vector) ^ u32::from(read) ^ u32::from(pics.int().is_high()))
}

#[inline(never)]
pub fn interval_timer(
    pit: &mut Pit,
    ticks: &mut Reinject,
    state: &mut PitState2,
    port: u16,
    value: u8,
    now: [u64; 3],
) -> Option<u64> {
    let [before, now, after] = now;
    let mut changed = pit.set_state(state, before) == pit::Timer::Changed;
    changed ^= pit.set_channels(&state.channels, before) == pit::Timer::Changed;
    let port = pit::Port::new(port)?;
    changed ^= pit.write(port, value, now) == pit::Timer::Changed;
    pit.write_speaker(value, now);
    let read = pit.read(port, after) ^ pit.read_speaker(after);
    let out = pit.out(pit::Counter::Irq, after).is_high();
    ticks.set_policy(if changed {
        TickPolicy::Discard
    } else {
        TickPolicy::Reinject
    });
    let sent = ticks.expired(pit.expiries(now, after));
    let again = ticks.acknowledged();
    *state = pit.state();
    let expiry = pit.next_expiry(after)?;
    let sum = expiry.at ^ expiry.period? ^ u64::from(read) ^ u64::from(out);
    Some(sum ^ u64::from(sent == again) ^ u64::from(ticks.pending()))
}
