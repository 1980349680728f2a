// SPDX-License-Identifier: GPL-2.0

//! KVM's paravirtual interface, as a guest sees it: which features there are, and what the MSRs and the structures in guest
//! memory look like (Documentation/virt/kvm/x86/cpuid.rst, msr.rst and hypercalls.rst of the kernel).

use super::bits::bit_flags;
use super::cpuid::CpuidRegs;

/// The leaf of the signature, where a VMM has not put another hypervisor's.
pub const SIGNATURE_LEAF: u32 = 0x4000_0000;
/// The leaf of the features, next to it.
pub const FEATURES_LEAF: u32 = SIGNATURE_LEAF + 1;
/// EBX, ECX and EDX of the signature: "KVMKVMKVM".
pub const SIGNATURE: [u32; 3] = [
    u32::from_le_bytes(*b"KVMK"),
    u32::from_le_bytes(*b"VMKV"),
    u32::from_le_bytes(*b"M\0\0\0"),
];

bit_flags! {
    /// EAX of [`FEATURES_LEAF`].
    pub struct PvFeatures(u32) {
        /// kvmclock by its old MSRs.
        CLOCKSOURCE = 1 << 0;
        /// Port accesses need no delay.
        NOP_IO_DELAY = 1 << 1;
        /// kvmclock.
        CLOCKSOURCE2 = 1 << 3;
        /// Asynchronous page faults.
        ASYNC_PF = 1 << 4;
        /// Steal time.
        STEAL_TIME = 1 << 5;
        /// Ends of interrupts that need no exit.
        PV_EOI = 1 << 6;
        /// A vCPU can wake another from HLT.
        PV_UNHALT = 1 << 7;
        /// A vCPU that has no CPU flushes its TLB when it has one again.
        PV_TLB_FLUSH = 1 << 9;
        /// Asynchronous page faults that a hypervisor in the guest is told of by an exit.
        ASYNC_PF_VMEXIT = 1 << 10;
        /// Interrupts for many vCPUs by one hypercall.
        PV_SEND_IPI = 1 << 11;
        /// The guest decides whether the host polls when it halts.
        POLL_CONTROL = 1 << 12;
        /// A vCPU can give up its CPU in another's favour.
        PV_SCHED_YIELD = 1 << 13;
        /// Asynchronous page faults end with an interrupt.
        ASYNC_PF_INT = 1 << 14;
        /// Messages have room for 15 bits of an APIC ID; for the VMM to say.
        MSI_EXT_DEST_ID = 1 << 15;
        /// The guest tells which memory is encrypted; for the VMM to say.
        HC_MAP_GPA_RANGE = 1 << 16;
        /// The guest tells whether it can be migrated; for the VMM to say.
        MIGRATION_CONTROL = 1 << 17;
        /// The clocks of all vCPUs can be compared.
        CLOCKSOURCE_STABLE_BIT = 1 << 24;
    }
}

/// Where a guest that looks for KVM's leaves finds them in its CPUID: the leaf of the features. `find` answers for a leaf.
///
/// A VMM may put the leaves of another hypervisor before them: there is room for one every 256 leaves.
pub fn features_leaf(mut find: impl FnMut(u32) -> Option<CpuidRegs>) -> Option<u32> {
    let base = (SIGNATURE_LEAF..SIGNATURE_LEAF + 0x1_0000)
        .step_by(0x100)
        .find(|base| find(*base).is_some_and(|regs| [regs.ebx, regs.ecx, regs.edx] == SIGNATURE))?;
    Some(base | (FEATURES_LEAF - SIGNATURE_LEAF))
}

/// Bit 0 of MSRs that have the address of a structure: the structure is in use.
pub const ENABLED: u64 = 1;

/// MSR_KVM_STEAL_TIME, and `struct kvm_steal_time`, 64 bytes.
pub mod steal {
    /// Bits of the MSR that must be 0.
    pub const RESERVED: u64 = 0x3e;
    /// The structure's size and alignment.
    pub const SIZE: u64 = 64;
    /// Where the nanoseconds are, a `u64`.
    pub const STEAL: u64 = 0;
    /// Where the version is, a `u32`: odd while the rest changes.
    pub const VERSION: u64 = 8;
    /// Where it says that the vCPU has no CPU, a `u8`.
    pub const PREEMPTED: u64 = 16;
    /// In that: it has none.
    pub const IS_PREEMPTED: u8 = 1 << 0;
    /// In that, set by the guest: the vCPU's TLB is to be flushed before it goes on.
    pub const FLUSH_TLB: u8 = 1 << 1;
}
