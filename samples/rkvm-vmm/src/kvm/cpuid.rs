// SPDX-License-Identifier: GPL-2.0

//! CPUID: what the device supports, less what this machine does not have.
//!
//! The device reports for any VMM; how many processors there are and which of them one is, the VMM
//! has to say: one package, a core for each processor, APIC IDs that count from 0. Without a local
//! APIC, whatever interrupts through one goes too: x2APIC, the TSC deadline timer, and those of KVM's
//! paravirtual features that send interrupts or hypercalls about them. Performance counters, VMX and
//! SVM are never there: nesting and profiling are not this program's subject.

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

/// What kind of local APIC the processors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalApic {
    /// None.
    None,
    /// The kernel's.
    Kernel {
        /// Its timer has the TSC deadline mode.
        tsc_deadline: bool,
    },
}

/// A processor of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// Its number, which is its APIC ID.
    pub id: u32,
    /// How many there are.
    pub of: u32,
    /// How it is interrupted.
    pub apic: LocalApic,
}

impl Processor {
    /// Number of bits of an APIC ID that tell cores from each other.
    fn core_bits(&self) -> u32 {
        self.of.next_power_of_two().trailing_zeros()
    }
}

/// Edits the device's answer to describe a processor of this machine.
pub fn describe_machine(entries: &mut [kvm_cpuid_entry2], processor: &Processor) {
    for entry in entries {
        match entry.function {
            1 => describe_features(entry, processor),
            4 => describe_cache(entry, processor, 0xfc00_0000),
            // Performance counters.
            0xa => clear(entry),
            0xb | 0x1f => describe_topology(entry, processor),
            KVM_FEATURES_LEAF if processor.apic == LocalApic::None => {
                entry.eax &= KVM_FEATURES_KEPT;
            }
            0x8000_0001 => {
                if processor.apic == LocalApic::None {
                    entry.edx &= !EDX_APIC;
                }
                entry.ecx &= !(AMD_ECX_CMP_LEGACY | AMD_ECX_SVM | AMD_ECX_EXT_APIC_SPACE);
                if processor.of > 1 {
                    // HTT counts cores, not threads.
                    entry.ecx |= AMD_ECX_CMP_LEGACY;
                }
            }
            // Number of cores and width of the core number.
            0x8000_0008 => {
                entry.ecx =
                    entry.ecx & !0xf0ff | (processor.core_bits() << 12) | (processor.of - 1);
            }
            0x8000_001d => describe_cache(entry, processor, 0),
            // Extended APIC ID, core and node.
            0x8000_001e => {
                entry.eax = processor.id;
                entry.ebx = processor.id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

fn describe_features(entry: &mut kvm_cpuid_entry2, processor: &Processor) {
    // Initial APIC ID, number of logical processors; CLFLUSH size and brand index stay.
    let count = processor.of.next_power_of_two();
    entry.ebx = entry.ebx & 0xffff | (count << 16) | (processor.id << 24);
    entry.ecx &= !(ECX_VMX | ECX_PDCM);
    entry.ecx |= ECX_HYPERVISOR;
    entry.edx &= !EDX_HTT;
    if processor.of > 1 {
        entry.edx |= EDX_HTT;
    }
    match processor.apic {
        LocalApic::None => {
            entry.ecx &= !(ECX_X2APIC | ECX_TSC_DEADLINE);
            entry.edx &= !EDX_APIC;
        }
        LocalApic::Kernel { tsc_deadline } => {
            entry.edx |= EDX_APIC;
            entry.ecx &= !ECX_TSC_DEADLINE;
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
        }
    }
}

/// A deterministic cache: the processors share those of the third level, and no other. `cores` are
/// the bits, if any, that have the number of cores.
fn describe_cache(entry: &mut kvm_cpuid_entry2, processor: &Processor, cores: u32) {
    let kind = entry.eax & 0x1f;
    entry.eax &= 0x3fff;
    if kind == 0 {
        return;
    }
    let others = (1 << processor.core_bits()) - 1;
    if (entry.eax >> 5) & 7 == 3 {
        entry.eax |= others << 14;
    }
    entry.eax |= (others << 26) & cores;
}

/// Extended topology: level 0 are threads, one a core; level 1 cores; then no more.
fn describe_topology(entry: &mut kvm_cpuid_entry2, processor: &Processor) {
    let (kind, bits, count) = match entry.index {
        0 => (1, 0, 1),
        1 => (2, processor.core_bits(), processor.of),
        _ => (0, 0, 0),
    };
    entry.eax = bits;
    entry.ebx = count;
    entry.ecx = (kind << 8) | entry.index & 0xff;
    entry.edx = processor.id;
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

    const ALONE: Processor = Processor {
        id: 0,
        of: 1,
        apic: LocalApic::None,
    };

    fn described_for(processor: &Processor, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut entries = [entry(function, index)];
        describe_machine(&mut entries, processor);
        entries[0]
    }

    fn described(function: u32, index: u32) -> kvm_cpuid_entry2 {
        described_for(&ALONE, function, index)
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
    fn one_of_several() {
        let processor = Processor {
            id: 2,
            of: 3,
            apic: LocalApic::Kernel { tsc_deadline: true },
        };
        let leaf = described_for(&processor, 1, 0);
        assert_eq!(leaf.ebx >> 16, 0x0204);
        assert_ne!(leaf.edx & EDX_APIC, 0);
        assert_ne!(leaf.edx & EDX_HTT, 0);
        assert_ne!(leaf.ecx & ECX_TSC_DEADLINE, 0);
        let (threads, cores) = (
            described_for(&processor, 0xb, 0),
            described_for(&processor, 0xb, 1),
        );
        assert_eq!((threads.eax, threads.ebx, threads.edx), (0, 1, 2));
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, 2));
        // All-ones is a cache of level 7, which nobody shares; four IDs for cores.
        assert_eq!(described_for(&processor, 4, 0).eax >> 14, 3 << 12);
        assert_eq!(
            described_for(&processor, 0x8000_0008, 0).ecx & 0xf0ff,
            0x2002
        );
        assert_eq!(described_for(&processor, KVM_FEATURES_LEAF, 0).eax, !0);
        let without = Processor {
            apic: LocalApic::Kernel {
                tsc_deadline: false,
            },
            ..processor
        };
        assert_eq!(described_for(&without, 1, 0).ecx & ECX_TSC_DEADLINE, 0);
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
