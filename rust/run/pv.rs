// SPDX-License-Identifier: GPL-2.0

//! KVM's own MSRs, and the structures in guest memory that come of them.

use super::apic::Around;
use super::Run;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::tlb::Request;
use crate::x86::msr::Msr;
use crate::x86::msr::MsrError;
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
        _ => return Err(MsrError::Unknown),
    }
    Ok(())
}

impl<L: Loaded> Run<'_, L> {
    /// Brings the structures up to date that the kernel keeps for the guest, if that was asked for. Sleeps.
    pub(super) fn update_structures(&mut self) {
        if self.shared.take(Request::Structures) {
            // Steal time.
        }
        self.update_clock();
    }
}
