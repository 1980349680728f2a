// SPDX-License-Identifier: GPL-2.0

//! Basic exit reasons (SDM vol. 3, appendix C).

pub(super) const EXCEPTION_NMI: u32 = 0;
pub(super) const EXTERNAL_INTERRUPT: u32 = 1;
pub(super) const TRIPLE_FAULT: u32 = 2;
pub(super) const INTERRUPT_WINDOW: u32 = 7;
pub(super) const NMI_WINDOW: u32 = 8;
pub(super) const TASK_SWITCH: u32 = 9;
pub(super) const CPUID: u32 = 10;
pub(super) const GETSEC: u32 = 11;
pub(super) const HLT: u32 = 12;
pub(super) const INVD: u32 = 13;
pub(super) const INVLPG: u32 = 14;
pub(super) const RDPMC: u32 = 15;
pub(super) const RSM: u32 = 17;
pub(super) const VMCALL: u32 = 18;
pub(super) const VMXON: u32 = 27;
pub(super) const CR_ACCESS: u32 = 28;
pub(super) const DR_ACCESS: u32 = 29;
pub(super) const IO: u32 = 30;
pub(super) const RDMSR: u32 = 31;
pub(super) const WRMSR: u32 = 32;
pub(super) const MACHINE_CHECK_AT_ENTRY: u32 = 41;
pub(super) const TPR_BELOW_THRESHOLD: u32 = 43;
pub(super) const APIC_ACCESS: u32 = 44;
pub(super) const VIRTUALISED_EOI: u32 = 45;
pub(super) const PREEMPTION_TIMER: u32 = 52;
pub(super) const APIC_WRITE: u32 = 56;
pub(super) const MWAIT: u32 = 36;
pub(super) const MONITOR: u32 = 39;
pub(super) const PAUSE: u32 = 40;
pub(super) const EPT_VIOLATION: u32 = 48;
pub(super) const EPT_MISCONFIG: u32 = 49;
pub(super) const INVEPT: u32 = 50;
pub(super) const INVVPID: u32 = 53;
pub(super) const WBINVD: u32 = 54;
pub(super) const XSETBV: u32 = 55;
pub(super) const INVPCID: u32 = 58;
pub(super) const ENCLS: u32 = 60;
pub(super) const PML_FULL: u32 = 62;
/// The entry failed after the host state was loaded.
pub(super) const FAILED: u32 = 1 << 31;
