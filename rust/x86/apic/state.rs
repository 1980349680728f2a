// SPDX-License-Identifier: GPL-2.0

//! The state as KVM_GET_LAPIC and KVM_SET_LAPIC have it: the first 1024 bytes of an APIC's page, in the layout of xAPIC mode.
//!
//! x2APIC mode differs in two registers: its ID, which [`IdFormat`] says how to write, and the interrupt command register, whose halves
//! are put apart. The TSC deadline is not in it, but an MSR of its own.

use super::base::ApicMode;
use super::message::x2apic_ldr;
use super::message::IdFormat;
use super::page::ApicPage;
use super::regs::Bank;
use super::regs::Esr;
use super::regs::Reg;
use super::timer::Clock;
use super::Apic;
use super::Effect;

/// The bytes of `struct kvm_lapic_state`.
pub const IMAGE_LEN: usize = 1024;

/// The state of an APIC, in the ABI's bytes.
pub type Image = [u8; IMAGE_LEN];

/// The state is that of another APIC: in x2APIC mode, the ID is not this one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inconsistent;

/// Vectors 0 to 15 are never in service.
const LEGAL_VECTORS: u32 = 0xffff_0000;

fn word(image: &Image, reg: Reg) -> u32 {
    let bytes = image
        .get(usize::from(reg.offset())..)
        .and_then(<[u8]>::first_chunk);
    u32::from_le_bytes(bytes.copied().unwrap_or_default())
}

fn set_word(image: &mut Image, reg: Reg, value: u32) {
    let bytes = image
        .get_mut(usize::from(reg.offset())..)
        .and_then(<[u8]>::first_chunk_mut);
    if let Some(bytes) = bytes {
        *bytes = value.to_le_bytes();
    }
}

/// Every register, by its place.
fn registers() -> impl Iterator<Item = Reg> {
    (0..=0x3f).filter_map(|index| Reg::at(index << 4))
}

impl<P: ApicPage> Apic<P> {
    /// Writes the state to an image, bytes without a register as 0.
    pub fn save(&self, image: &mut Image, clock: &impl Clock) {
        image.fill(0);
        for reg in registers() {
            set_word(image, reg, self.read_reg(reg, clock));
        }
        let icr = self.icr();
        set_word(image, Reg::Icr, icr as u32);
        set_word(image, Reg::IcrHigh, (icr >> 32) as u32);
        if (self.mode(), self.config.ids) == (ApicMode::X2apic, IdFormat::Narrow) {
            set_word(image, Reg::Id, self.config.id << 24);
        }
    }

    /// Takes the state from an image. What follows from something else is not taken: the version, priorities, an ID that is fixed. Bits that
    /// no register has are dropped, and nothing that was counted or pending beside the registers is left. The timer goes on from its
    /// current count; a TSC deadline stays, if the timer's mode does.
    ///
    /// # Errors
    ///
    /// [`Inconsistent`] if the ID is not this APIC's, in x2APIC mode and with [`IdFormat::Wide`]; nothing has changed then.
    pub fn restore(&mut self, image: &Image, clock: &impl Clock) -> Result<Effect, Inconsistent> {
        let x2apic = self.mode() == ApicMode::X2apic;
        if x2apic && self.config.ids == IdFormat::Wide && word(image, Reg::Id) != self.config.id {
            return Err(Inconsistent);
        }
        for reg in registers() {
            let value = word(image, reg);
            match reg {
                Reg::Id if x2apic => self.put(reg, self.config.id),
                Reg::Ldr if x2apic => self.put(reg, x2apic_ldr(self.config.id)),
                Reg::Dfr => self.put(reg, value | 0x0fff_ffff),
                // Requests of them may stay: their class is never above the processor's.
                Reg::Vectors(Bank::Isr, 0) => self.put(reg, value & LEGAL_VECTORS),
                Reg::Vectors(..) => self.put(reg, value),
                Reg::Esr => {
                    let errors = Esr::new(value).and(Esr::NAMED);
                    self.put(reg, errors.bits());
                }
                Reg::Lvt(entry) if !self.config.lvts.contains(entry) => {}
                Reg::Id | Reg::Ldr | Reg::Tpr | Reg::Svr | Reg::Lvt(_) | Reg::Divide => {
                    self.put(reg, value & self.writable(reg));
                }
                Reg::Icr => {
                    let low = value & self.writable(reg);
                    let high = word(image, Reg::IcrHigh);
                    let high = if x2apic {
                        high
                    } else {
                        high & self.writable(Reg::IcrHigh)
                    };
                    self.put_icr((u64::from(high) << 32) | u64::from(low));
                }
                // The version is the configuration's; the others have no state, or follow.
                Reg::Version
                | Reg::Apr
                | Reg::Ppr
                | Reg::Eoi
                | Reg::IcrHigh
                | Reg::InitialCount
                | Reg::CurrentCount
                | Reg::SelfIpi => {}
            }
        }
        self.errors = Esr::empty();
        self.update_ppr();
        self.update_timer_mode();
        self.update_timer_divide(clock);
        self.timer.restore(
            word(image, Reg::InitialCount),
            word(image, Reg::CurrentCount),
            clock.ns(),
        );
        self.put(Reg::InitialCount, self.timer.initial());
        Ok(Effect::Identity)
    }
}
