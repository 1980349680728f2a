// SPDX-License-Identifier: GPL-2.0

//! The local APICs of a VM, as devices and other vCPUs reach them: from a message to the vCPUs that it
//! is for, and to their attention.
//!
//! A vCPU's own side of its APIC is [`crate::lapic`]. What others write is in [`SharedApic`]: a vector
//! is a bit of the request register, anything else a bit of an event word; then the vCPU gets a
//! [`Request`] and is woken, or made to leave the guest.
//!
//! Whom a destination means is looked up in a map that is made anew when an APIC changes what it
//! answers to, and read under SRCU: a message is delivered from any context, hard interrupts included,
//! and without a lock.

mod posted;

use crate::linux::page::KernelPage;
use crate::linux::srcu::SrcuCell;
use crate::tlb::Request;
use crate::tlb::VcpuShared;
use crate::x86::apic::base::ApicMode;
use crate::x86::apic::events::ApicEvent;
use crate::x86::apic::events::ApicEvents;
use crate::x86::apic::map::arbitrate;
use crate::x86::apic::map::ApicMap;
use crate::x86::apic::map::Entry;
use crate::x86::apic::map::Lookup;
use crate::x86::apic::map::Software;
use crate::x86::apic::message::Broadcast;
use crate::x86::apic::message::DeliveryMode;
use crate::x86::apic::message::IdFormat;
use crate::x86::apic::message::Message;
use crate::x86::apic::message::Target;
use crate::x86::apic::page::ApicPage;
use crate::x86::apic::regs::Lvt;
use crate::x86::apic::timer::BusPeriod;
use crate::x86::apic::view::ApicView;
use crate::x86::apic::view::Delivered;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU8;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::new_mutex;
use kernel::sync::Arc;
use kernel::sync::Mutex;
use kernel::sync::SetOnce;
use posted::Posted;

/// The page of an APIC's registers. Whoever delivers an interrupt writes to it, and with APIC
/// virtualisation the processor does too.
pub(crate) struct Registers {
    page: KernelPage,
    posted: Posted,
}

impl Registers {
    /// Zeroed registers: ENOMEM.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let registers = Self {
            page: KernelPage::new()?,
            posted: Posted::new(),
        };
        Ok(Arc::new(registers, GFP_KERNEL_ACCOUNT)?)
    }

    /// The page's physical address.
    pub(crate) fn phys(&self) -> u64 {
        self.page.phys()
    }

    /// What has been posted for the processor.
    pub(crate) fn posted(&self) -> &Posted {
        &self.posted
    }

    /// Moves what has been posted to the request register.
    pub(crate) fn take_posted(&self) {
        self.posted.take(|word, vectors| {
            if let Some(requests) = self.word(IRR + (u16::from(word) << 4)) {
                requests.fetch_or(vectors, Ordering::SeqCst);
            }
        });
    }

    #[inline]
    fn word(&self, offset: u16) -> Option<&AtomicU32> {
        // The mask keeps the compiler from looking any further whether it is in the page.
        self.page.atomic(usize::from(offset & 0xffc))
    }
}

impl ApicPage for Arc<Registers> {
    #[inline]
    fn read(&self, offset: u16) -> u32 {
        self.word(offset)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    #[inline]
    fn write(&self, offset: u16, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Relaxed);
        }
    }

    #[inline]
    fn fetch_or(&self, offset: u16, bits: u32) -> u32 {
        self.word(offset)
            .map_or(0, |word| word.fetch_or(bits, Ordering::SeqCst))
    }

    #[inline]
    fn fetch_and(&self, offset: u16, bits: u32) -> u32 {
        self.word(offset)
            .map_or(0, |word| word.fetch_and(bits, Ordering::SeqCst))
    }
}

/// Where the local vector table has LINT0.
const LINT0: u16 = 0x350;
/// The pages by which a processor stands in for an APIC.
pub(crate) struct ApicPages {
    /// Those of the registers.
    pub(crate) registers: Arc<Registers>,
    /// The physical address of [`Apics::access_page`].
    pub(crate) access: u64,
}

/// Where the request register is.
const IRR: u16 = 0x200;

/// The registers as those see them who deliver: where a processor may be delivering interrupts from
/// the page itself, requests are posted.
struct Inbox {
    registers: Arc<Registers>,
    posts: bool,
}

impl Inbox {
    /// The word of the posted requests that stands for a word of the page.
    fn posted_word(&self, offset: u16) -> Option<usize> {
        let word = offset.wrapping_sub(IRR) >> 4;
        (self.posts && word < 8).then_some(usize::from(word))
    }
}

impl ApicPage for Inbox {
    #[inline]
    fn read(&self, offset: u16) -> u32 {
        self.registers.read(offset)
    }

    #[inline]
    fn write(&self, offset: u16, value: u32) {
        self.registers.write(offset, value);
    }

    #[inline]
    fn fetch_or(&self, offset: u16, bits: u32) -> u32 {
        match self.posted_word(offset) {
            Some(word) => self.registers.posted.post(word, bits),
            None => self.registers.fetch_or(offset, bits),
        }
    }

    #[inline]
    fn fetch_and(&self, offset: u16, bits: u32) -> u32 {
        self.registers.fetch_and(offset, bits)
    }
}

/// What others reach of a vCPU's APIC.
pub(crate) struct SharedApic {
    inbox: Inbox,
    id: u32,
    /// The [`ApicMode`], as [`mode_code`] has it. Written by the vCPU.
    mode: AtomicU8,
    /// [`ApicEvents`].
    events: AtomicU32,
}

const fn mode_code(mode: ApicMode) -> u8 {
    match mode {
        ApicMode::Disabled => 0,
        ApicMode::Xapic => 1,
        ApicMode::X2apic => 2,
    }
}

impl SharedApic {
    /// The APIC with these registers and this ID, in xAPIC mode. `posts` is whether the processor delivers
    /// its interrupts.
    pub(crate) fn new(registers: Arc<Registers>, id: u32, posts: bool) -> Self {
        Self {
            inbox: Inbox { registers, posts },
            id,
            mode: AtomicU8::new(mode_code(ApicMode::Xapic)),
            events: AtomicU32::new(0),
        }
    }

    /// Whether what comes by LINT0 is an NMI.
    fn is_watched(&self) -> bool {
        /// The delivery mode: an NMI.
        const NMI: u32 = 4;
        let lint0 = Lvt::new(ApicPage::read(&self.inbox, LINT0));
        lint0.mode_bits() == NMI && !lint0.has(Lvt::MASKED)
    }

    /// Whether what the controller outside has comes in here: by LINT0, or because the APIC is off.
    fn takes_extint(&self) -> bool {
        /// The delivery mode: ExtINT.
        const EXTINT: u32 = 7;
        let lint0 = Lvt::new(ApicPage::read(&self.inbox, LINT0));
        lint0.mode_bits() == EXTINT && !lint0.has(Lvt::MASKED)
            || self.mode.load(Ordering::Relaxed) == mode_code(ApicMode::Disabled)
    }

    /// Records the mode. By the vCPU, which then calls [`Apics::rebuild`].
    pub(crate) fn set_mode(&self, mode: ApicMode) {
        self.mode.store(mode_code(mode), Ordering::Relaxed);
    }

    fn view(&self, ids: IdFormat) -> ApicView<'_, Inbox> {
        let mode = match self.mode.load(Ordering::Relaxed) {
            0 => ApicMode::Disabled,
            1 => ApicMode::Xapic,
            _ => ApicMode::X2apic,
        };
        ApicView::new(&self.inbox, mode, self.id, ids)
    }

    fn change(&self, mut f: impl FnMut(ApicEvents) -> ApicEvents) -> ApicEvents {
        let mut old = self.events.load(Ordering::Relaxed);
        loop {
            let new = f(ApicEvents::new(old)).bits();
            match self
                .events
                .compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed)
            {
                Ok(_) => return ApicEvents::new(old),
                Err(now) => old = now,
            }
        }
    }

    /// Adds an event.
    pub(crate) fn post(&self, event: ApicEvent) {
        self.change(|events| events.post(event));
    }

    /// Whether an INIT waits.
    pub(crate) fn has_init(&self) -> bool {
        ApicEvents::new(self.events.load(Ordering::Relaxed)).has(ApicEvents::INIT)
    }

    /// Takes back an INIT that waits.
    pub(crate) fn cancel_init(&self) {
        self.change(|events| events.without(ApicEvents::INIT));
    }

    /// Takes all events.
    pub(crate) fn take_events(&self) -> ApicEvents {
        self.change(|_| ApicEvents::empty())
    }

    /// Whether interrupts may have been posted that the processor has not taken.
    #[inline]
    pub(crate) fn has_posted(&self) -> bool {
        self.inbox.posts && self.inbox.registers.posted.is_notified()
    }

    /// Moves them to the request register.
    pub(crate) fn take_posted(&self) {
        self.inbox.registers.take_posted();
    }
}

/// How a message fared.
#[derive(Clone, Copy, Default)]
pub(crate) struct Delivery {
    /// How many APICs it was for.
    addressed: u32,
    /// How many of them took it.
    taken: u32,
}

impl Delivery {
    /// As KVM has it: -1 if it was for nobody, else how many took it. (A vector that was requested
    /// already counts.)
    pub(crate) fn abi(self) -> isize {
        if self.addressed == 0 {
            -1
        } else {
            self.taken as isize
        }
    }

    fn add(&mut self, taken: bool) {
        self.addressed = self.addressed.wrapping_add(1);
        self.taken = self.taken.wrapping_add(u32::from(taken));
    }
}

/// The vCPUs with APICs, and the map of whom a destination means.
struct Table {
    members: KVVec<Arc<VcpuShared>>,
    map: ApicMap<KVVec<Entry>>,
    ids: IdFormat,
    broadcast: Broadcast,
    /// What [`Apics::changes`] was before the map was made: if it is another now, the map is out of date.
    changes: u32,
}

impl Table {
    /// Makes the map from what the APICs answer to now: ENOMEM.
    fn new(
        members: KVVec<Arc<VcpuShared>>,
        settings: &Settings,
        changes: u32,
    ) -> Result<KBox<Self>> {
        let ids = settings.ids;
        let apics = || members.iter().filter_map(|vcpu| vcpu.apic());
        let len = apics().map(|apic| apic.id as usize).max().unwrap_or(0) + 1;
        // IDs in xAPIC mode have eight bits, which software may change.
        let entries = KVVec::from_elem(Entry::VACANT, len.max(0x100), GFP_KERNEL_ACCOUNT)?;
        let mut map = ApicMap::new(entries);
        for (index, apic) in (0..).zip(apics()) {
            let view = apic.view(ids);
            map.add(index, &view.identity(), view.software());
        }
        let broadcast = settings.broadcast;
        let table = Self {
            members,
            map,
            ids,
            broadcast,
            changes,
        };
        Ok(KBox::new(table, GFP_KERNEL_ACCOUNT)?)
    }

    fn post(&self, index: usize, message: &Message, delivery: &mut Delivery) {
        if let Some(vcpu) = self.members.get(index) {
            delivery.add(vcpu.deliver(message, self.ids));
        }
    }

    /// The vCPU whose APIC answers to a physical ID.
    fn index_of(&self, id: u32) -> Option<usize> {
        self.members.iter().position(|vcpu| {
            vcpu.apic().is_some_and(|apic| {
                let identity = apic.view(self.ids).identity();
                identity.physical_ids().contains(&Some(id))
            })
        })
    }

    /// Delivers a message by asking each APIC.
    fn scan(&self, message: &Message, sender: Option<u32>) -> Delivery {
        let matching = || {
            (0..)
                .zip(self.members.iter())
                .filter(|(_, vcpu)| {
                    vcpu.apic().is_some_and(|apic| {
                        let view = apic.view(self.ids);
                        view.identity().matches(message.target, sender)
                    })
                })
                .map(|(index, _)| index)
        };
        let mut delivery = Delivery::default();
        if message.mode == DeliveryMode::LowestPriority {
            let candidates = || {
                matching().filter(|&index: &usize| {
                    self.members
                        .get(index)
                        .and_then(|vcpu| vcpu.apic())
                        .is_some_and(|apic| apic.view(self.ids).software() == Software::Enabled)
                })
            };
            let chosen = arbitrate(message.vector, candidates().count());
            if let Some(index) = chosen.and_then(|n| candidates().nth(n)) {
                self.post(index, message, &mut delivery);
            }
        } else {
            for index in matching() {
                self.post(index, message, &mut delivery);
            }
        }
        delivery
    }
}

impl VcpuShared {
    /// Delivers a message that is for this vCPU; returns if its APIC takes it.
    fn deliver(&self, message: &Message, ids: IdFormat) -> bool {
        let Some(apic) = self.apic() else {
            return false;
        };
        match apic.view(ids).deliver(message) {
            Delivered::Queued if apic.inbox.posts => {
                if apic.inbox.registers.posted.notify() {
                    self.notify_posted();
                }
            }
            Delivered::Queued => self.request_and_kick(Request::Interrupts),
            // Who requested it first has told the vCPU.
            Delivered::Coalesced => {}
            // There is no system-management mode, and the controllers outside have a way of their own.
            Delivered::Event(ApicEvent::Smi | ApicEvent::ExtInt) | Delivered::Dropped => {
                return false
            }
            Delivered::Event(event) => {
                apic.post(event);
                self.request_and_kick(Request::ApicEvents);
            }
        }
        true
    }
}

/// What holds for all APICs of a VM.
#[derive(Default)]
struct Settings {
    ids: IdFormat,
    broadcast: Broadcast,
    bus: BusPeriod,
}

/// The local APICs of a VM.
#[pin_data]
pub(crate) struct Apics {
    /// Held to change `table`.
    #[pin]
    settings: Mutex<Settings>,
    #[pin]
    table: SrcuCell<Table>,
    /// How often an APIC has changed what it answers to.
    changes: AtomicU32,
    /// What guests find at the default address of their APICs where the processor stands in for these.
    access_page: SetOnce<KernelPage>,
}

/// The flags of KVM_CAP_X2APIC_API that are known.
pub(crate) const X2APIC_API: u64 = WIDE | BY_MODE;
/// KVM_X2APIC_API_USE_32BIT_IDS.
const WIDE: u64 = 1 << 0;
/// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
const BY_MODE: u64 = 1 << 1;

impl Apics {
    /// No APIC: ENOMEM.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                settings <- new_mutex!(Settings::default(), "rkvm_apics"),
                table <- SrcuCell::new(Table::new(KVVec::new(), &Settings::default(), 0)?),
                changes: AtomicU32::new(0),
                access_page: SetOnce::new(),
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Adds a vCPU, which has an APIC: ENOMEM.
    pub(crate) fn add(&self, vcpu: Arc<VcpuShared>) -> Result {
        self.change(|members| Ok(members.push(vcpu, GFP_KERNEL_ACCOUNT)?))
    }

    /// The page that an access of the guest's must reach for the processor to take it for one of its APIC:
    /// ENOMEM. One a VM: an APIC in another mode lets the guest see it.
    pub(crate) fn access_page(&self) -> Result<&KernelPage> {
        if self.access_page.as_ref().is_none() {
            // Somebody else's does as well.
            let _ = self.access_page.populate(KernelPage::new()?);
        }
        self.access_page.as_ref().ok_or(ENOMEM)
    }

    /// Takes a vCPU out.
    pub(crate) fn remove(&self, vcpu: &Arc<VcpuShared>) {
        let gone = self.change(|members| {
            members.retain(|other| !Arc::ptr_eq(other, vcpu));
            Ok(())
        });
        // Without memory for another table it stays in this one, and takes what nobody will see.
        let _ = gone;
    }

    /// An APIC has changed what it answers to. Sleeps.
    pub(crate) fn rebuild(&self) {
        // From now on, and for ever if there is no memory for another map, each APIC is asked.
        self.changes.fetch_add(1, Ordering::SeqCst);
        if self.change(|_| Ok(())).is_err() {
            kernel::pr_warn_once!(
                "no memory for a map of local APICs: interrupts are delivered slowly\n"
            );
        }
    }

    fn change(&self, f: impl FnOnce(&mut KVVec<Arc<VcpuShared>>) -> Result) -> Result {
        let settings = self.settings.lock();
        let mut members = KVVec::new();
        for vcpu in self.table.read().members.iter() {
            members.push(vcpu.clone(), GFP_KERNEL_ACCOUNT)?;
        }
        f(&mut members)?;
        let changes = self.changes.load(Ordering::SeqCst);
        drop(self.table.replace(Table::new(members, &settings, changes)?));
        Ok(())
    }

    /// Delivers the message of a device. In any context.
    pub(crate) fn deliver(&self, message: &Message) -> Delivery {
        self.send(message, None)
    }

    /// Delivers a message; `sender` is the ID of the APIC that sends it. In any context.
    pub(crate) fn send(&self, message: &Message, sender: Option<u32>) -> Delivery {
        let table = self.table.read();
        let mut targets = match table.map.lookup(message.target) {
            Lookup::Found(targets) if table.changes == self.changes.load(Ordering::SeqCst) => {
                targets
            }
            _ => return table.scan(message, sender),
        };
        let mut delivery = Delivery::default();
        if message.mode == DeliveryMode::LowestPriority {
            if let Some(index) = targets.lowest_priority(message.vector) {
                table.post(usize::from(index), message, &mut delivery);
            }
        } else {
            for index in &mut targets {
                table.post(usize::from(index), message, &mut delivery);
            }
        }
        delivery
    }

    /// Delivers a message to those whose physical IDs are the set bits of `word`, from `first` on; returns how many
    /// took it. (The message's own target is nobody's.) No ID is a broadcast.
    pub(crate) fn send_to_set(&self, message: &Message, first: u32, word: u64) -> u32 {
        let table = self.table.read();
        let current = table.changes == self.changes.load(Ordering::SeqCst);
        let mut delivery = Delivery::default();
        let mut left = word;
        while left != 0 {
            let bit = left.trailing_zeros();
            left &= left.wrapping_sub(1);
            let Some(id) = first.checked_add(bit) else {
                break;
            };
            match table.map.lookup(Target::Physical(id)) {
                Lookup::Found(targets) if current => {
                    for index in targets {
                        table.post(usize::from(index), message, &mut delivery);
                    }
                }
                _ => {
                    if let Some(index) = table.index_of(id) {
                        table.post(index, message, &mut delivery);
                    }
                }
            }
        }
        delivery.taken
    }

    /// The vCPU whose APIC answers to a physical ID.
    pub(crate) fn by_id(&self, id: u32) -> Option<Arc<VcpuShared>> {
        let table = self.table.read();
        let current = table.changes == self.changes.load(Ordering::SeqCst);
        let index = match table.map.lookup(Target::Physical(id)) {
            Lookup::Found(mut targets) if current => usize::from(targets.next()?),
            _ => table.index_of(id)?,
        };
        table.members.get(index).cloned()
    }

    /// The interrupt controller outside has a vector, for who takes it through LINT0. In any context.
    ///
    /// The others, and there may be many, are not disturbed. One of them may be about to take such vectors:
    /// it finds the request before it enters, or is found to take them.
    pub(crate) fn extint_changed(&self) {
        for vcpu in self.table.read().members.iter() {
            vcpu.request(Request::Interrupts);
            if vcpu.apic().is_none_or(SharedApic::takes_extint) {
                vcpu.request_and_kick(Request::Interrupts);
            }
        }
    }

    /// The PIT has ticked: an NMI for those whose LINT0 is one (the watchdog of old kernels). In any
    /// context.
    pub(crate) fn watchdog(&self) {
        let table = self.table.read();
        let watched = |vcpu: &&Arc<VcpuShared>| vcpu.apic().is_some_and(SharedApic::is_watched);
        for vcpu in table.members.iter().filter(watched) {
            vcpu.request_and_kick(Request::Watchdog);
        }
    }

    /// The vectors whose ends the I/O APICs want to know of are others than before. In any context.
    pub(crate) fn rescan(&self) {
        for vcpu in self.table.read().members.iter() {
            vcpu.request_and_kick(Request::EoiVectors);
        }
    }

    /// KVM_CAP_X2APIC_API: EINVAL for flags that are not known.
    pub(crate) fn set_x2apic_api(&self, flags: u64) -> Result {
        if flags & !X2APIC_API != 0 {
            return Err(EINVAL);
        }
        {
            let mut settings = self.settings.lock();
            if flags & WIDE != 0 {
                settings.ids = IdFormat::Wide;
            }
            if flags & BY_MODE != 0 {
                settings.broadcast = Broadcast::ByMode;
            }
        }
        self.rebuild();
        Ok(())
    }

    /// Whom 0xff means in the message of a device. In any context.
    pub(crate) fn broadcast(&self) -> Broadcast {
        self.table.read().broadcast
    }

    /// How wide the IDs in a message are, and whom 0xff means. In any context.
    pub(crate) fn addressing(&self) -> (IdFormat, Broadcast) {
        let table = self.table.read();
        (table.ids, table.broadcast)
    }

    /// How wide IDs are.
    pub(crate) fn ids(&self) -> IdFormat {
        self.table.read().ids
    }

    /// KVM_CAP_X86_APIC_BUS_CYCLES_NS: EINVAL for 0, for what is too long, and if there are vCPUs.
    pub(crate) fn set_bus_cycle(&self, ns: u64) -> Result {
        let mut settings = self.settings.lock();
        if !self.table.read().members.is_empty() {
            return Err(EINVAL);
        }
        settings.bus = BusPeriod::new(ns).ok_or(EINVAL)?;
        Ok(())
    }

    /// How long a cycle of the bus takes.
    pub(crate) fn bus(&self) -> BusPeriod {
        self.settings.lock().bus
    }
}
