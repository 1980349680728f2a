// SPDX-License-Identifier: GPL-2.0

//! CPUID: what the device supports, less what this machine does not have.
//!
//! The device reports for any VMM; this machine has one processor and no local APIC. Whatever
//! interrupts through a local APIC goes with it: x2APIC, the TSC deadline timer, the performance
//! counters, and those of KVM's paravirtual features that send interrupts or hypercalls about them.
//! VMX and SVM go too: there is no firmware to enable them, and nesting is not this program's subject.

use kvm_bindings::kvm_cpuid_entry2;

// Leaf 1, ECX.
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
// Leaf 1, EDX.
const EDX_APIC: u32 = 1 << 9;
const EDX_MTRR: u32 = 1 << 12;
const EDX_HTT: u32 = 1 << 28;
// Leaf 0x80000001: EDX repeats the APIC bit, ECX has AMD's extensions of it.
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
const AMD_ECX_SVM: u32 = 1 << 2;
const AMD_ECX_EXT_APIC_SPACE: u32 = 1 << 3;

/// KVM's feature leaf (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
/// The features that need no local APIC: kvmclock (0, 3, 24) and no I/O delay (1).
const KVM_FEATURES_KEPT: u32 = (1 << 0) | (1 << 1) | (1 << 3) | (1 << 24);

/// TSC frequency as a ratio to a crystal, and the crystal's frequency in Hz.
const TSC_LEAF: u32 = 0x15;
/// Processor frequencies in MHz.
const FREQUENCY_LEAF: u32 = 0x16;
/// The crystal and the divisor that make the ratio the TSC's frequency in kHz.
const CRYSTAL_HZ: u32 = 1_000_000;
const CRYSTAL_DIVISOR: u32 = 1000;

/// Adds the frequency of the guest's TSC, which KVM knows, to what the device reports.
///
/// A guest that is not told measures it against the PIT, and here each access to the PIT is an exit:
/// the slower those are, the worse the measurement, until Linux gives up and goes without TSC.
pub fn add_tsc_frequency(entries: &mut Vec<kvm_cpuid_entry2>, tsc_khz: u32) {
    for function in [TSC_LEAF, FREQUENCY_LEAF] {
        entries.retain(|entry| entry.function != function);
    }
    let mhz = tsc_khz / 1000;
    entries.push(kvm_cpuid_entry2 {
        function: TSC_LEAF,
        eax: CRYSTAL_DIVISOR,
        ebx: tsc_khz,
        ecx: CRYSTAL_HZ,
        ..Default::default()
    });
    entries.push(kvm_cpuid_entry2 {
        function: FREQUENCY_LEAF,
        eax: mhz & 0xffff,
        ebx: mhz & 0xffff,
        ..Default::default()
    });
    for entry in entries {
        if entry.function == 0 {
            entry.eax = entry.eax.max(FREQUENCY_LEAF);
        }
    }
}

/// Edits the device's answer to describe this machine.
pub fn describe_machine(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries {
        match entry.function {
            1 => {
                // Initial APIC ID 0, one logical processor; CLFLUSH size and brand index stay.
                entry.ebx = entry.ebx & 0xffff | (1 << 16);
                entry.ecx &= !(ECX_VMX | ECX_PDCM | ECX_X2APIC | ECX_TSC_DEADLINE);
                entry.ecx |= ECX_HYPERVISOR;
                entry.edx &= !(EDX_APIC | EDX_HTT);
            }
            // Deterministic caches: nobody shares them, one core a package.
            4 => entry.eax &= 0x3fff,
            // Performance counters.
            0xa => clear(entry),
            0xb | 0x1f => describe_topology(entry),
            KVM_FEATURES_LEAF => entry.eax &= KVM_FEATURES_KEPT,
            0x8000_0001 => {
                entry.edx &= !EDX_APIC;
                entry.ecx &= !(AMD_ECX_CMP_LEGACY | AMD_ECX_SVM | AMD_ECX_EXT_APIC_SPACE);
            }
            // Number of cores and width of the core number.
            0x8000_0008 => entry.ecx &= !0xf0ff,
            0x8000_001d => entry.eax &= 0x3fff,
            // Extended APIC ID, core and node.
            0x8000_001e => {
                entry.eax = 0;
                entry.ebx = 0;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

/// Extended topology: level 0 are threads, level 1 cores, each has one processor; then no more.
fn describe_topology(entry: &mut kvm_cpuid_entry2) {
    let kind = match entry.index {
        0 => 1,
        1 => 2,
        _ => 0,
    };
    entry.eax = 0;
    entry.ebx = u32::from(kind != 0);
    entry.ecx = (kind << 8) | entry.index & 0xff;
    entry.edx = 0;
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    entry.eax = 0;
    entry.ebx = 0;
    entry.ecx = 0;
    entry.edx = 0;
}

/// Tells whether the guest sees memory type range registers.
pub fn has_mtrr(entries: &[kvm_cpuid_entry2]) -> bool {
    entries
        .iter()
        .any(|entry| entry.function == 1 && entry.edx & EDX_MTRR != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        }
    }

    fn described(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut entries = [entry(function, index)];
        describe_machine(&mut entries);
        entries[0]
    }

    #[test]
    fn no_local_apic() {
        let leaf = described(1, 0);
        assert_eq!(leaf.edx & EDX_APIC, 0);
        assert_eq!(leaf.ecx & (ECX_X2APIC | ECX_TSC_DEADLINE | ECX_VMX), 0);
        assert_eq!(leaf.ecx & ECX_HYPERVISOR, ECX_HYPERVISOR);
        assert_eq!(leaf.edx & 1, 1, "the rest is the device's");
        assert_eq!(described(0x8000_0001, 0).edx & EDX_APIC, 0);
        assert_eq!(described(0xa, 0).eax, 0);
    }

    #[test]
    fn one_processor() {
        assert_eq!(described(1, 0).ebx >> 16, 1);
        assert_eq!(described(4, 2).eax >> 14, 0);
        let (threads, cores, end) = (described(0xb, 0), described(0xb, 1), described(0xb, 2));
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (0, 1, 0x201));
        assert_eq!((end.ebx, end.ecx, end.edx), (0, 2, 0));
    }

    #[test]
    fn tsc_frequency_is_told() {
        let mut entries = vec![entry(0, 0), entry(TSC_LEAF, 0)];
        entries[0].eax = 0xd;
        add_tsc_frequency(&mut entries, 2_893_204);
        assert_eq!(entries[0].eax, 0x16);
        let leaf: Vec<_> = entries.iter().filter(|e| e.function == 0x15).collect();
        assert_eq!(leaf.len(), 1);
        // As Linux computes it.
        let khz = u64::from(leaf[0].ecx) / 1000 * u64::from(leaf[0].ebx) / u64::from(leaf[0].eax);
        assert_eq!(khz, 2_893_204);
    }

    #[test]
    fn paravirtual_clock_only() {
        assert_eq!(described(KVM_FEATURES_LEAF, 0).eax, 0x0100_000b);
    }
}
