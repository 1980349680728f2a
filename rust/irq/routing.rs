// SPDX-License-Identifier: GPL-2.0

//! Where the interrupts of a VM go: from a GSI, which is how user space names one, to inputs of the
//! interrupt controllers or to a message (KVM API, KVM_SET_GSI_ROUTING).

use super::msi::Msi;
use crate::bindings::kvm_irq_routing_entry;
use crate::bindings::KVM_IRQCHIP_IOAPIC;
use crate::bindings::KVM_IRQCHIP_PIC_MASTER;
use crate::bindings::KVM_IRQCHIP_PIC_SLAVE;
use crate::bindings::KVM_IRQ_ROUTING_IRQCHIP;
use crate::bindings::KVM_IRQ_ROUTING_MSI;
use crate::bindings::KVM_MSI_VALID_DEVID;
use crate::x86::apic::message::IdFormat;
use crate::x86::ioapic;
use crate::x86::pic;
use kernel::prelude::*;

/// How many GSIs there are, and the most routes, as in KVM.
pub(crate) const MAX_ROUTES: usize = 4096;

/// An input of an interrupt controller in the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// Of the two 8259A, 0 to 15.
    Pic(u8),
    /// Of the I/O APIC, 0 to 23.
    Ioapic(u8),
}

impl Input {
    /// The number that KVM gives the controller.
    const fn chip(self) -> u32 {
        match self {
            Self::Pic(0..=7) => KVM_IRQCHIP_PIC_MASTER,
            Self::Pic(_) => KVM_IRQCHIP_PIC_SLAVE,
            Self::Ioapic(_) => KVM_IRQCHIP_IOAPIC,
        }
    }

    /// The input that a route names: EINVAL if there is none.
    fn new(chip: u32, pin: u32) -> Result<Self> {
        const HALF: u8 = pic::PINS / 2;
        let pin = u8::try_from(pin).map_err(|_| EINVAL)?;
        match chip {
            KVM_IRQCHIP_PIC_MASTER if pin < HALF => Ok(Self::Pic(pin)),
            KVM_IRQCHIP_PIC_SLAVE if pin < HALF => Ok(Self::Pic(pin + HALF)),
            KVM_IRQCHIP_IOAPIC if pin < ioapic::PINS => Ok(Self::Ioapic(pin)),
            _ => Err(EINVAL),
        }
    }
}

/// Where an interrupt goes.
#[derive(Clone, Copy)]
pub(crate) enum Route {
    /// To an input of an interrupt controller.
    Input(Input),
    /// To the local APICs.
    Msi(Msi),
}

impl Route {
    /// The route that the user describes: EINVAL. `inputs`: there are interrupt controllers in the
    /// kernel.
    fn new(entry: &kvm_irq_routing_entry, ids: IdFormat, inputs: bool) -> Result<Self> {
        match entry.type_ {
            KVM_IRQ_ROUTING_IRQCHIP if entry.flags == 0 && inputs => {
                let (chip, pin) = entry.irqchip();
                Ok(Self::Input(Input::new(chip, pin)?))
            }
            KVM_IRQ_ROUTING_MSI if entry.flags & !KVM_MSI_VALID_DEVID == 0 => {
                let msi = Msi::of_route(&entry.msi());
                if !msi.is_valid(ids) {
                    return Err(EINVAL);
                }
                Ok(Self::Msi(msi))
            }
            _ => Err(EINVAL),
        }
    }

    /// Whether a GSI can have both.
    fn goes_with(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Input(a), Self::Input(b)) => a.chip() != b.chip(),
            _ => false,
        }
    }
}

/// Marks an input without a GSI.
const NO_GSI: u16 = u16::MAX;

/// All routes of a VM at some moment.
///
/// # Invariants
///
/// `routes` is sorted by GSI.
pub(crate) struct Table {
    routes: KVVec<(u16, Route)>,
    /// Where in `routes` those of each GSI begin, and one more for where the last one's end.
    begins: KVVec<u16>,
    /// The GSIs of the inputs, of which each has the last that was routed to it.
    pic: [u16; pic::PINS as usize],
    ioapic: [u16; ioapic::PINS as usize],
}

impl Table {
    /// No route.
    fn new() -> Self {
        Self {
            routes: KVVec::new(),
            begins: KVVec::new(),
            pic: [NO_GSI; pic::PINS as usize],
            ioapic: [NO_GSI; ioapic::PINS as usize],
        }
    }

    /// No route: ENOMEM.
    pub(super) fn empty() -> Result<KBox<Self>> {
        Ok(KBox::new(Self::new(), GFP_KERNEL_ACCOUNT)?)
    }

    /// Every input of the I/O APIC has the GSI of its number, and those of the 8259As too: ENOMEM.
    pub(super) fn default_routes() -> Result<KBox<Self>> {
        let mut table = Self::new();
        for pin in 0..ioapic::PINS {
            table.push(pin.into(), Route::Input(Input::Ioapic(pin)))?;
            if pin < pic::PINS {
                table.push(pin.into(), Route::Input(Input::Pic(pin)))?;
            }
        }
        table.finish()
    }

    /// What the user describes, with what [`Route::new`] has to know: EINVAL for a route that does not
    /// do, or two that do not go together; ENOMEM. The caller has bounded how many there are.
    pub(super) fn from_user(
        entries: &[kvm_irq_routing_entry],
        ids: IdFormat,
        inputs: bool,
    ) -> Result<KBox<Self>> {
        let mut table = Self::new();
        for entry in entries {
            if entry.gsi as usize >= MAX_ROUTES {
                return Err(EINVAL);
            }
            table.push(entry.gsi as u16, Route::new(entry, ids, inputs)?)?;
        }
        table.routes.sort_unstable_by_key(|(gsi, _)| *gsi);
        table.finish()
    }

    fn push(&mut self, gsi: u16, route: Route) -> Result {
        let last = match route {
            Route::Input(Input::Pic(pin)) => self.pic.get_mut(usize::from(pin)),
            Route::Input(Input::Ioapic(pin)) => self.ioapic.get_mut(usize::from(pin)),
            Route::Msi(_) => None,
        };
        if let Some(last) = last {
            *last = gsi;
        }
        Ok(self.routes.push((gsi, route), GFP_KERNEL_ACCOUNT)?)
    }

    /// Of sorted routes: looks if they go together, and makes the index.
    fn finish(mut self) -> Result<KBox<Self>> {
        let gsis = self
            .routes
            .last()
            .map_or(0, |(gsi, _)| usize::from(*gsi) + 1);
        let mut begins = KVVec::with_capacity(gsis + 1, GFP_KERNEL_ACCOUNT)?;
        let mut at = 0;
        for gsi in 0..=gsis {
            let rest = self.routes.get(at..).unwrap_or(&[]);
            begins.push(at as u16, GFP_KERNEL_ACCOUNT)?;
            let same = rest
                .iter()
                .take_while(|(other, _)| usize::from(*other) == gsi);
            for (n, (_, route)) in same.enumerate() {
                if !rest.iter().take(n).all(|(_, other)| route.goes_with(other)) {
                    return Err(EINVAL);
                }
                at += 1;
            }
        }
        self.begins = begins;
        Ok(KBox::new(self, GFP_KERNEL_ACCOUNT)?)
    }

    /// The routes of a GSI, three at most.
    #[inline]
    pub(super) fn routes(&self, gsi: u32) -> impl Iterator<Item = &Route> + '_ {
        let gsi = gsi as usize;
        let begin = self.begins.get(gsi).copied().unwrap_or(0);
        let end = self.begins.get(gsi.wrapping_add(1)).copied().unwrap_or(0);
        self.routes
            .get(usize::from(begin)..usize::from(end))
            .unwrap_or(&[])
            .iter()
            .map(|(_, route)| route)
    }

    /// The messages of the GSIs below `gsi`.
    pub(super) fn messages_below(&self, gsi: u32) -> impl Iterator<Item = &Msi> + '_ {
        self.routes
            .iter()
            .take_while(move |(this, _)| u32::from(*this) < gsi)
            .filter_map(|(_, route)| match route {
                Route::Msi(msi) => Some(msi),
                Route::Input(_) => None,
            })
    }

    /// The GSI of an input.
    pub(super) fn gsi(&self, input: Input) -> Option<u32> {
        let gsi = match input {
            Input::Pic(pin) => self.pic.get(usize::from(pin)),
            Input::Ioapic(pin) => self.ioapic.get(usize::from(pin)),
        };
        gsi.filter(|gsi| **gsi != NO_GSI).map(|gsi| (*gsi).into())
    }
}
