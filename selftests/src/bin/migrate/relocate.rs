// SPDX-License-Identifier: GPL-2.0

//! A guest that moves while it runs, by what the log says it has written.

use super::code::*;
use super::devices;
use super::journey::*;
use kvm_bindings as kb;
use selftests::dirty::{clear_log, get_log, Bitmap, Protect};
use selftests::ensure;
use selftests::guest::{at, usize_of};
use selftests::mem::PAGE;
use selftests::ring::{self, Ring};
use selftests::snapshot::{self, Chips, Order};
use selftests::vm::Kvm;
use selftests::{Env, Outcome, Verdict};
use std::time::{Duration, Instant};

/// How a move finds what was written meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Log {
    Bitmap(Protect),
    Rings,
}

/// Bytes of a ring.
const RING: usize = 16 << 10;

/// So many pages are to be written while the guest is copied: it may be slow to begin.
const WRITTEN: usize = 12;

/// Copies a guest's memory while it runs, then what it has written since, until little is left; stops it,
/// and lets it go on from the copy. Nothing is taken along but what the log says.
pub(crate) fn relocate(env: &Env, log: Log, both: bool) -> Outcome {
    let devices = devices(env, both)?;
    // The same conditions on both devices: kvm-intel in the emulator loses interrupts of a second vCPU, where
    // there are two processors and it has APIC virtualisation.
    let count = if both { 1 } else { 2 };
    let (kvm, target) = (env.open()?, Kvm::open(devices[devices.len() - 1])?);
    let cpuid = snapshot::common_cpuid(&kvm, &target)?;
    let here = Journey::new(Chips::Split, count, flag::X2APIC, 1 << 40, cpuid.clone())?;
    here.begin(&kvm)?;
    let (vm, vcpus) = here.machine_with(&kvm, |vm| match log {
        Log::Bitmap(protect) => protect.enable(&kvm, vm),
        Log::Rings => ring::enable(&kvm, vm, RING),
    })?;
    let mut rings = Vec::new();
    if log == Log::Rings {
        for vcpu in &vcpus {
            rings.push(Ring::new(vcpu, RING)?);
        }
    }
    let pages = at::SIZE / PAGE;
    let address = here.memory.addr() as u64;
    vm.set_memory(0, kb::KVM_MEM_LOG_DIRTY_PAGES, 0, at::SIZE as u64, address)?;
    let luggage = here.luggage();
    luggage
        .snapshot
        .put(&kvm, &vm, &vcpus, here.chips, Order::Vmm)?;

    let mut there = Journey::new(Chips::Split, count, flag::X2APIC, 0, cpuid)?;
    let (from, to) = (&here.memory, &there.memory);
    let copy = |set: &Bitmap| {
        for page in set.pages() {
            let bytes = from.read_bytes(page * PAGE, PAGE);
            to.write_bytes(page * PAGE, &bytes);
        }
    };
    let harvest = |rings: &mut Vec<Ring>| -> Result<Bitmap, Verdict> {
        let Log::Bitmap(protect) = log else {
            let mut set = Bitmap::new(pages);
            for ring in rings {
                while let Some(entry) = ring.take() {
                    ensure!(entry.slot == 0 && entry.offset < pages as u64, "{entry:x?}");
                    set.set(usize_of(entry.offset));
                }
            }
            ring::reset(&vm)?;
            return Ok(set);
        };
        let set = get_log(&vm, 0, pages)?;
        if protect != Protect::Get {
            clear_log(&vm, 0, pages, &set)?;
        }
        Ok(set)
    };
    copy(&Bitmap::full(pages));
    let (mut rounds, mut copied) = (0, 0);
    let (begun, patience) = (Instant::now(), Duration::from_secs(2) * env.slow);
    here.stay(&vm, &vcpus, Stop::Never, || {
        let set = harvest(&mut rings)?;
        copied += set.pages().count();
        copy(&set);
        rounds += 1;
        Ok(rounds >= 6 && copied >= WRITTEN || begun.elapsed() > patience)
    })?;
    let last = harvest(&mut rings)?;
    copy(&last);
    println!(
        "# {rounds} rounds, {copied} pages, {} at last",
        last.pages().count()
    );
    ensure!(
        copied >= WRITTEN,
        "hardly anything was written: {copied} pages"
    );
    for page in 0..pages {
        let (was, is) = (
            here.memory.read_bytes(page * PAGE, PAGE),
            there.memory.read_bytes(page * PAGE, PAGE),
        );
        ensure!(was == is, "page {page:#x} was written and not logged");
    }
    luggage.snapshot.take(&kvm, &vm, &vcpus, here.chips)?;
    drop((rings, vcpus, vm));
    *there.luggage() = *luggage;
    // It has done as much as there was time for; there it does a little more.
    there.turns = luggage.snapshot.vcpus[0].regs.r14 + 50;
    there.put(data::TURNS, there.turns);
    there.hop(devices[devices.len() - 1], Stop::Never, Order::Vmm)?;
    there.check()
}

pub(crate) fn relocate_by_bitmap(env: &Env) -> Outcome {
    relocate(env, Log::Bitmap(Protect::Get), false)
}

pub(crate) fn relocate_by_clearing(env: &Env) -> Outcome {
    relocate(env, Log::Bitmap(Protect::InitiallySet), false)
}

pub(crate) fn relocate_by_rings(env: &Env) -> Outcome {
    relocate(env, Log::Rings, false)
}

pub(crate) fn relocate_across(env: &Env) -> Outcome {
    relocate(env, Log::Bitmap(Protect::Clear), true)
}
