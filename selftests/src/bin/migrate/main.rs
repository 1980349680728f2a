// SPDX-License-Identifier: GPL-2.0

//! Machines that are saved in the middle of anything, and go on elsewhere: in another process, in another
//! VM, on the other device.
//!
//! A guest computes, and uses everything that can be half done: ports, device memory, strings on both,
//! exceptions, single steps, interrupts of timers, of another vCPU and of devices. It hops from process to
//! process at random moments until it is done. What it has read, written, counted and computed is known
//! beforehand, so that anything that is lost or comes twice shows; a lost wake-up stops it.

mod code;
mod journey;
mod relocate;
mod vmm;

use code::*;
use journey::*;
use relocate::*;
use selftests::host::Rng;
use selftests::snapshot::{self, Chips};
use selftests::vm::Kvm;
use selftests::{skip, tests};
use selftests::{Env, Outcome, Verdict};
use std::process::ExitCode;

/// Both devices, this one first; or this one only.
fn devices(env: &Env, both: bool) -> Result<Vec<&str>, Verdict> {
    let mut devices = vec![env.device.as_str()];
    if both {
        let other = if env.device == "/dev/kvm" {
            "/dev/rkvm"
        } else {
            "/dev/kvm"
        };
        if Kvm::open(other).is_err() {
            skip!("there is no other device");
        }
        devices.push(other);
    }
    Ok(devices)
}

fn travel(env: &Env, chips: Chips, vcpus: usize, flags: u64, both: bool) -> Outcome {
    let devices = devices(env, both)?;
    let kvm = env.open()?;
    let cpuid = snapshot::common_cpuid(&kvm, &Kvm::open(devices[devices.len() - 1])?)?;
    let has_avx = cpuid.find(1, 0).is_some_and(|e| e.ecx & (1 << 28) != 0)
        && cpuid.find(0xd, 0).is_some_and(|e| e.eax & 7 == 7);
    let flags = flags | if has_avx { flag::AVX } else { 0 };
    let turns = env.fewer(20);
    let journey = Journey::new(chips, vcpus, flags, turns, cpuid)?;
    let mut rng = Rng::new(env.seed ^ flags ^ ((vcpus as u64) << 8));
    journey.travel(&devices, &mut rng)
}

fn no_chips(env: &Env) -> Outcome {
    travel(env, Chips::None, 1, 0, false)
}

fn split_chips(env: &Env) -> Outcome {
    travel(env, Chips::Split, 1, flag::X2APIC, false)
}

fn split_chips_smp(env: &Env) -> Outcome {
    travel(env, Chips::Split, 2, 0, false)
}

fn all_chips(env: &Env) -> Outcome {
    travel(env, Chips::Full, 1, 0, false)
}

fn all_chips_smp(env: &Env) -> Outcome {
    travel(env, Chips::Full, 2, flag::X2APIC, false)
}

fn across_no_chips(env: &Env) -> Outcome {
    travel(env, Chips::None, 1, 0, true)
}

fn across_split(env: &Env) -> Outcome {
    travel(env, Chips::Split, 2, flag::X2APIC, true)
}

fn across_all(env: &Env) -> Outcome {
    travel(env, Chips::Full, 2, 0, true)
}

fn main() -> ExitCode {
    selftests::tap::main(
        "migrate",
        tests![
            no_chips,
            split_chips,
            split_chips_smp,
            all_chips,
            all_chips_smp,
            across_no_chips,
            across_split,
            across_all,
            relocate_by_bitmap,
            relocate_by_clearing,
            relocate_by_rings,
            relocate_across,
        ],
    )
}
