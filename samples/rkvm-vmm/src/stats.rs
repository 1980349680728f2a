// SPDX-License-Identifier: GPL-2.0

//! Counting exits: by reason always (it costs an addition), by port and address if asked.

use std::collections::BTreeMap;
use std::fmt;

use crate::bus;
use crate::time::Nanos;
use crate::time::MILLISECOND;
use crate::time::SECOND;

/// Exit reasons that get a counter of their own.
const REASONS: usize = 64;

/// How many ports and addresses the report names.
const TOP: usize = 16;

/// The counts.
pub struct Stats {
    reasons: [u64; REASONS],
    signals: u64,
    vectors: BTreeMap<u8, u64>,
    detail: Option<Detail>,
    started: Nanos,
    halted: Nanos,
}

/// What is counted with `--stats` only.
#[derive(Default)]
struct Detail {
    ports: BTreeMap<(u16, bool), u64>,
    pages: BTreeMap<(u64, bool), u64>,
}

impl Stats {
    /// Returns counts of zero, starting now.
    pub fn new(detailed: bool, now: Nanos) -> Self {
        Self {
            reasons: [0; REASONS],
            signals: 0,
            vectors: BTreeMap::new(),
            detail: detailed.then(Detail::default),
            started: now,
            halted: 0,
        }
    }

    /// Counts an exit with this `KVM_EXIT_*`.
    pub fn exit(&mut self, reason: u32) {
        if let Some(count) = self.reasons.get_mut(reason as usize) {
            *count += 1;
        }
    }

    /// Counts a KVM_RUN that a signal ended.
    pub fn signal(&mut self) {
        self.signals += 1;
    }

    /// Counts an interrupt given to the guest.
    pub fn interrupt(&mut self, vector: u8) {
        *self.vectors.entry(vector).or_default() += 1;
    }

    /// Counts accesses to a port.
    pub fn port(&mut self, port: u16, write: bool, times: u64) {
        if let Some(detail) = &mut self.detail {
            *detail.ports.entry((port, write)).or_default() += times;
        }
    }

    /// Adds what `other` has counted, since the same time.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.reasons.iter_mut().zip(other.reasons) {
            *count += more;
        }
        self.signals += other.signals;
        self.halted += other.halted;
        merge(&mut self.vectors, &other.vectors);
        if let (Some(detail), Some(more)) = (&mut self.detail, &other.detail) {
            merge(&mut detail.ports, &more.ports);
            merge(&mut detail.pages, &more.pages);
        }
    }

    /// Counts an access to an address where there is no memory.
    pub fn mmio(&mut self, address: u64, write: bool) {
        if let Some(detail) = &mut self.detail {
            *detail.pages.entry((address & !0xfff, write)).or_default() += 1;
        }
    }

    /// Adds time for which the guest was halted.
    pub fn halted(&mut self, time: Nanos) {
        self.halted += time;
    }

    /// Returns the counts as text, as of `now`.
    pub fn report(&self, now: Nanos) -> Report<'_> {
        Report { stats: self, now }
    }
}

/// A report to be printed.
pub struct Report<'a> {
    stats: &'a Stats,
    now: Nanos,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stats {
            reasons,
            signals,
            vectors,
            detail,
            started,
            halted,
        } = self.stats;
        let total: u64 = reasons.iter().sum();
        writeln!(
            f,
            "{total} exits in {} s, of which halted {} s; {signals} times out by a signal",
            Seconds(self.now - started),
            Seconds(*halted)
        )?;
        for (reason, count) in reasons.iter().enumerate() {
            if *count != 0 {
                writeln!(f, "{count:>10}  {}", exit_name(reason as u32))?;
            }
        }
        for (vector, count) in vectors {
            writeln!(f, "{count:>10}  interrupts with vector {vector:#04x}")?;
        }
        let Some(detail) = detail else {
            return Ok(());
        };
        for ((port, write), count) in top(&detail.ports) {
            let direction = if *write { "out" } else { "in" };
            writeln!(
                f,
                "{count:>10}  {direction:<3} {port:#06x}  {}",
                bus::name(*port)
            )?;
        }
        for ((page, write), count) in top(&detail.pages) {
            let direction = if *write { "writes" } else { "reads" };
            writeln!(
                f,
                "{count:>10}  {direction} {} in page {page:#x}",
                bus::address_name(*page)
            )?;
        }
        Ok(())
    }
}

struct Seconds(Nanos);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{:03}",
            self.0 / SECOND,
            self.0 % SECOND / MILLISECOND
        )
    }
}

/// Adds counts to counts.
fn merge<K: Copy + Ord>(counts: &mut BTreeMap<K, u64>, more: &BTreeMap<K, u64>) {
    for (key, count) in more {
        *counts.entry(*key).or_default() += count;
    }
}

/// Returns the entries with the greatest counts.
fn top<K>(counts: &BTreeMap<K, u64>) -> Vec<(&K, &u64)> {
    let mut entries: Vec<_> = counts.iter().collect();
    entries.sort_by(|a, b| b.1.cmp(a.1));
    entries.truncate(TOP);
    entries
}

/// Names a `KVM_EXIT_*`.
pub fn exit_name(reason: u32) -> &'static str {
    match reason {
        kvm_bindings::KVM_EXIT_UNKNOWN => "KVM_EXIT_UNKNOWN",
        kvm_bindings::KVM_EXIT_EXCEPTION => "KVM_EXIT_EXCEPTION",
        kvm_bindings::KVM_EXIT_IO => "KVM_EXIT_IO",
        kvm_bindings::KVM_EXIT_HYPERCALL => "KVM_EXIT_HYPERCALL",
        kvm_bindings::KVM_EXIT_DEBUG => "KVM_EXIT_DEBUG",
        kvm_bindings::KVM_EXIT_HLT => "KVM_EXIT_HLT",
        kvm_bindings::KVM_EXIT_MMIO => "KVM_EXIT_MMIO",
        kvm_bindings::KVM_EXIT_IRQ_WINDOW_OPEN => "KVM_EXIT_IRQ_WINDOW_OPEN",
        kvm_bindings::KVM_EXIT_SHUTDOWN => "KVM_EXIT_SHUTDOWN",
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => "KVM_EXIT_FAIL_ENTRY",
        kvm_bindings::KVM_EXIT_INTR => "KVM_EXIT_INTR",
        kvm_bindings::KVM_EXIT_SET_TPR => "KVM_EXIT_SET_TPR",
        kvm_bindings::KVM_EXIT_TPR_ACCESS => "KVM_EXIT_TPR_ACCESS",
        kvm_bindings::KVM_EXIT_IOAPIC_EOI => "KVM_EXIT_IOAPIC_EOI",
        kvm_bindings::KVM_EXIT_NMI => "KVM_EXIT_NMI",
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => "KVM_EXIT_INTERNAL_ERROR",
        kvm_bindings::KVM_EXIT_SYSTEM_EVENT => "KVM_EXIT_SYSTEM_EVENT",
        kvm_bindings::KVM_EXIT_X86_RDMSR => "KVM_EXIT_X86_RDMSR",
        kvm_bindings::KVM_EXIT_X86_WRMSR => "KVM_EXIT_X86_WRMSR",
        kvm_bindings::KVM_EXIT_X86_BUS_LOCK => "KVM_EXIT_X86_BUS_LOCK",
        kvm_bindings::KVM_EXIT_MEMORY_FAULT => "KVM_EXIT_MEMORY_FAULT",
        _ => "another exit reason",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_names_what_was_counted() {
        let mut stats = Stats::new(true, SECOND);
        for _ in 0..3 {
            stats.exit(kvm_bindings::KVM_EXIT_IO);
        }
        stats.exit(1_000_000);
        stats.port(0x3f8, true, 3);
        stats.interrupt(0x30);
        stats.mmio(0xfee0_0020, false);
        let text = stats.report(3 * SECOND + 5 * MILLISECOND).to_string();
        for part in [
            "3 exits in 2.005 s",
            "3  KVM_EXIT_IO",
            "vector 0x30",
            "out 0x03f8  16550 serial",
            "reads without memory in page 0xfee00000",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn sums_of_several() {
        let mut sum = Stats::new(true, 0);
        for _ in 0..2 {
            let mut one = Stats::new(true, 0);
            one.exit(kvm_bindings::KVM_EXIT_MMIO);
            one.signal();
            one.mmio(0xd000_0050, true);
            sum.add(&one);
        }
        let text = sum.report(SECOND).to_string();
        for part in [
            "2 exits in 1.000 s",
            "2 times out by a signal",
            "2  writes virtio device in page 0xd0000000",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn details_only_when_asked() {
        let mut stats = Stats::new(false, 0);
        stats.port(0x3f8, true, 1);
        assert!(!stats.report(0).to_string().contains("0x03f8"));
    }
}
