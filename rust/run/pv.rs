// SPDX-License-Identifier: GPL-2.0

//! KVM's own MSRs, and the structures in guest memory that come of them.

use super::apic::Around;
use super::Run;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::linux::mm;
use crate::linux::task;
use crate::mem::access::MemError;
use crate::mem::cached::GuestStruct;
use crate::mem::GuestMemory;
use crate::pv::eoi::PvEoi;
use crate::tlb::Request;
use crate::tlb::VcpuShared;
use crate::x86::apic::Effect;
use crate::x86::msr::Msr;
use crate::x86::msr::MsrError;
use crate::x86::pv::steal;
use crate::x86::pv::PvFeatures;

/// Which feature an MSR belongs to.
fn feature_of(msr: Msr) -> PvFeatures {
    match msr {
        Msr::KVM_WALL_CLOCK_OLD | Msr::KVM_SYSTEM_TIME_OLD => PvFeatures::CLOCKSOURCE,
        Msr::KVM_WALL_CLOCK | Msr::KVM_SYSTEM_TIME => PvFeatures::CLOCKSOURCE2,
        Msr::KVM_ASYNC_PF_EN => PvFeatures::ASYNC_PF,
        Msr::KVM_ASYNC_PF_INT | Msr::KVM_ASYNC_PF_ACK => PvFeatures::ASYNC_PF_INT,
        Msr::KVM_STEAL_TIME => PvFeatures::STEAL_TIME,
        Msr::KVM_PV_EOI_EN => PvFeatures::PV_EOI,
        Msr::KVM_POLL_CONTROL => PvFeatures::POLL_CONTROL,
        _ => PvFeatures::MIGRATION_CONTROL,
    }
}

/// Reads one of KVM's own MSRs, for the guest or the VMM.
pub(super) fn read_msr(arch: &Arch, msr: Msr) -> Result<u64, MsrError> {
    if !arch.pv.has(feature_of(msr)) {
        return Err(MsrError::Unknown);
    }
    match msr {
        Msr::KVM_WALL_CLOCK | Msr::KVM_WALL_CLOCK_OLD => Ok(arch.clock.wall_clock()),
        Msr::KVM_SYSTEM_TIME | Msr::KVM_SYSTEM_TIME_OLD => Ok(arch.clock.system_time()),
        Msr::KVM_STEAL_TIME => Ok(arch.pv.steal.msr()),
        Msr::KVM_PV_EOI_EN => Ok(arch.pv.eoi.msr()),
        Msr::KVM_POLL_CONTROL => Ok(arch.pv.host_polls.into()),
        _ => Err(MsrError::Unknown),
    }
}

/// Writes one of KVM's own MSRs, for the guest or the VMM. May sleep.
pub(super) fn write_msr(
    arch: &mut Arch,
    around: &Around<'_>,
    msr: Msr,
    value: u64,
    by_host: bool,
) -> Result<(), MsrError> {
    if !arch.pv.has(feature_of(msr)) {
        return Err(MsrError::Unknown);
    }
    match msr {
        Msr::KVM_WALL_CLOCK | Msr::KVM_WALL_CLOCK_OLD => {
            arch.clock
                .set_wall_clock(value, around.memory, around.shared);
        }
        Msr::KVM_SYSTEM_TIME | Msr::KVM_SYSTEM_TIME_OLD => {
            let old = msr == Msr::KVM_SYSTEM_TIME_OLD;
            arch.clock.set_system_time(value, old, by_host);
        }
        Msr::KVM_STEAL_TIME => {
            if !task::delays_are_counted() || value & steal::RESERVED != 0 {
                return Err(MsrError::Refused);
            }
            arch.pv.steal.set(value);
            around.shared.request(Request::Structures);
        }
        Msr::KVM_PV_EOI_EN => {
            let mut word = PvEoi::structure(value);
            let unbacked = word
                .as_mut()
                .is_some_and(|word| !word.is_backed(around.memory));
            if value & 2 != 0 || unbacked {
                return Err(MsrError::Refused);
            }
            arch.pv.eoi.set(value, word);
        }
        Msr::KVM_POLL_CONTROL => {
            if value > 1 {
                return Err(MsrError::Refused);
            }
            arch.pv.host_polls = value != 0;
        }
        _ => return Err(MsrError::Unknown),
    }
    Ok(())
}

impl<L: Loaded> Run<'_, L> {
    /// Brings the structures up to date that the kernel keeps for the guest, if that was asked for. Sleeps.
    pub(super) fn update_structures(&mut self) {
        if self.shared.take(Request::Structures) {
            self.update_steal_time();
        }
        self.update_clock();
    }

    /// The vCPU has a CPU: the guest learns of it, and of how long it had none. Does what the guest could not wait for
    /// meanwhile.
    fn update_steal_time(&mut self) {
        let flushes = self.arch.pv.has(PvFeatures::PV_TLB_FLUSH);
        let waited = self.arch.pv.steal.waited();
        let Some(structure) = self.arch.pv.steal.structure() else {
            self.watch.stop();
            return;
        };
        self.watch.start();
        // KVM's rule: there it is kept only where memory is.
        let place = structure.place(self.memory);
        let taken = place.and_then(|place| {
            let was = take_byte(structure, self.memory, steal::PREEMPTED, self.shared);
            Some((place.offset(steal::PREEMPTED), was.ok()?))
        });
        let Some((byte, was)) = taken else {
            self.watch.forget_place();
            return;
        };
        self.watch.set_running(byte);
        if flushes && was & steal::FLUSH_TLB != 0 {
            self.hw.flush_guest_tlb();
            if let Some(shadow) = &mut self.arch.shadow {
                shadow.flush_all();
            }
            self.shared.stats.tlb_flush.bump();
        }
        // Memory that has gone away gets nothing; the guest does not see a difference.
        let _ = add_steal_time(structure, self.memory, waited, self.shared);
    }

    /// KVM_RUN begins: the guest may want to know when the thread has a CPU.
    #[inline]
    pub(super) fn begin_watch(&mut self) {
        if self.arch.pv.steal.structure().is_some() {
            self.watch.start();
        }
    }

    /// KVM_RUN ends. What was written with interrupts off is noted now; the VMM does not look before.
    #[inline]
    pub(super) fn end_watch(&mut self) {
        if self.watch.has_told() {
            if let Some(structure) = self.arch.pv.steal.structure() {
                self.memory.mark_dirty(structure.gpa() >> 12, self.shared);
            }
        }
    }

    /// Before an entry, interrupts off: lets the guest end what it serves without an exit, if nobody waits for that.
    #[inline]
    pub(super) fn offer_eoi(&mut self) {
        let Some(word) = self.arch.pv.eoi.word() else {
            return;
        };
        let Some(apic) = self.arch.apic.as_deref() else {
            return;
        };
        if apic.model.highest_requested().is_some() {
            return;
        }
        let served = apic.model.highest_in_service();
        if served.is_none_or(|vector| apic.tells_eoi(vector)) {
            return;
        }
        // If the page is not at hand, the guest ends it as any other would.
        let Some(place) = word.place(self.memory) else {
            return;
        };
        let write = || mm::write_user_atomically(place.hva, &[OFFERED]);
        if let Some(Ok(())) = self.memory.at(place.version, write) {
            self.arch.pv.eoi.offered = true;
        }
    }

    /// After an exit: takes back the offer that was made before the entry, or does what the guest has left to do.
    #[cold]
    pub(super) fn take_back_offer(&mut self) {
        self.arch.pv.eoi.offered = false;
        let Some(word) = self.arch.pv.eoi.word() else {
            return;
        };
        match take_byte(word, self.memory, 0, self.shared) {
            Ok(was) if was & OFFERED != 0 => return,
            Ok(_) => {}
            // Whether the interrupt has ended cannot be known. Those that have not could be delivered twice, those
            // that have never again: the former is for the guest to bear that took its memory away.
            Err(_) => {}
        }
        if let Some(apic) = self.arch.apic.as_deref_mut() {
            let effect = Effect::Eoi(apic.model.eoi());
            self.apply(effect);
        }
    }
}

/// In the guest's word: it need not tell that the interrupt has ended.
const OFFERED: u8 = 1;

/// Makes a byte of a structure 0, and returns what it was.
fn take_byte(
    structure: &mut GuestStruct,
    memory: &GuestMemory,
    offset: u64,
    vcpu: &VcpuShared,
) -> Result<u8, MemError> {
    /// Who changes it that often takes no part in the protocol.
    const TRIES: usize = 8;
    let gpa = structure.gpa().wrapping_add(offset);
    let mut was = [0];
    for _ in 0..TRIES {
        structure.read(memory, offset, &mut was)?;
        if memory.cmpxchg(gpa, 1, was[0].into(), 0, vcpu)? {
            return Ok(was[0]);
        }
    }
    structure.write(memory, offset, &[0], vcpu)?;
    // Anything may have been asked for between.
    Ok(u8::MAX)
}

/// Adds to the guest's count, so that the guest can tell if it reads it meanwhile.
fn add_steal_time(
    structure: &mut GuestStruct,
    memory: &GuestMemory,
    ns: u64,
    vcpu: &VcpuShared,
) -> Result<(), MemError> {
    let mut version = [0; 4];
    let mut count = [0; 8];
    structure.read(memory, steal::VERSION, &mut version)?;
    // Odd until the count is written; what a guest leaves there to begin with may be anything.
    let changing = u32::from_le_bytes(version) | 1;
    structure.write(memory, steal::VERSION, &changing.to_le_bytes(), vcpu)?;
    structure.read(memory, steal::STEAL, &mut count)?;
    let sum = u64::from_le_bytes(count).wrapping_add(ns);
    structure.write(memory, steal::STEAL, &sum.to_le_bytes(), vcpu)?;
    let done = changing.wrapping_add(1);
    structure.write(memory, steal::VERSION, &done.to_le_bytes(), vcpu)
}
