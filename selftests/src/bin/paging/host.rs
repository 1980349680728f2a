// SPDX-License-Identifier: GPL-2.0

//! Programs under which the host changes what backs the guest's memory: its data, its tables and the dispatcher.
//!
//! The guest leaves now and then, and the host does one thing, so that a failure comes again.

use selftests::host::Rng;
use selftests::mem::{Mapping, PAGE};
use selftests::paging::exec::{Guest, Rig};
use selftests::paging::generate::{generate, with_leaves};
use selftests::paging::layout::{HIGH, LOW, OWN_END, POOL};
use selftests::paging::op::{Format, Program};
use selftests::paging::shrink::judge_with;
use selftests::{dirty, pressure, Env, Outcome, Verdict};

/// See `<linux/kvm.h>`.
const LOG_DIRTY: u32 = 1;
/// Not in `libc`: see `<linux/mman.h>`.
const MADV_COLLAPSE: i32 = 25;
/// All formats of tables.
pub const FORMATS: [Format; 3] = [Format::Long, Format::Pae, Format::Bits32];

fn slots(rig: &Rig) -> [(u32, u64, &Mapping); 2] {
    [(0, 0, &rig.low), (1, HIGH, &rig.high)]
}

/// Gives a page other memory, with the same content.
fn replace(mem: &Mapping, offset: usize) -> Outcome {
    let bytes = mem.read_bytes(offset, PAGE);
    mem.advise(offset, PAGE, libc::MADV_DONTNEED)?;
    mem.write_bytes(offset, &bytes);
    Ok(())
}

/// Takes all of a slot's rights away and gives them back.
fn protect(mem: &Mapping, prot: i32) -> Outcome {
    mem.protect(0, LOW, prot)?;
    mem.protect(0, LOW, libc::PROT_READ | libc::PROT_WRITE)?;
    Ok(())
}

fn set_slots(rig: &Rig, guest: &Guest, flags: u32, remove: bool) -> Outcome {
    for (slot, gpa, mem) in slots(rig) {
        if remove {
            guest.vm.set_memory(slot, 0, gpa, 0, 0)?;
        }
        guest
            .vm
            .set_memory(slot, flags, gpa, LOW as u64, mem.addr() as u64)?;
    }
    Ok(())
}

/// Does one thing to the memory.
fn disturb(rig: &Rig, guest: &Guest, rng: &mut Rng) -> Outcome {
    let (_, _, mem) = slots(rig)[((rng.number() >> 40) & 1) as usize];
    match (rng.number() >> 24) % 11 {
        0 | 1 => {
            for page in 0..POOL.len() {
                if (rng.number() >> 50) & 3 == 0 {
                    let (mem, offset) = rig.place(page);
                    replace(mem, offset)?;
                }
            }
        }
        2 => {
            // The dispatcher's code, tables and descriptors.
            for offset in (0x1_0000..OWN_END as usize).step_by(PAGE) {
                if (rng.number() >> 50) & 3 == 0 {
                    replace(&rig.low, offset)?;
                }
            }
        }
        3 => mem.advise(0, LOW, libc::MADV_PAGEOUT)?,
        4 => protect(mem, libc::PROT_READ)?,
        5 => protect(mem, libc::PROT_NONE)?,
        6 => set_slots(rig, guest, 0, true)?,
        7 => {
            // Large pages, where the kernel has some to spare.
            let _ = mem.advise(0, LOW, MADV_COLLAPSE);
        }
        9 => {
            // Pages move together, where the kernel can.
            let _ = pressure::set("/proc/sys/vm/compact_memory", "1");
        }
        8 => mem.advise(0x30_0000, 0x8_0000, libc::MADV_DONTNEED)?,
        _ => pressure::set("/proc/self/clear_refs", "1")?,
    }
    Ok(())
}

fn programs(
    env: &Env,
    count: u64,
    leaves: usize,
    mut run: impl FnMut(&Rig, &Program) -> Result<selftests::paging::exec::Ran, Verdict>,
) -> Outcome {
    let rig = Rig::of(env)?;
    let count = env.fewer(count * u64::from(env.soak));
    for seed in env.seed..env.seed + count {
        let format = FORMATS[(seed % 3) as usize];
        let p = generate(seed, format, rig.features(), rig.avoid(), 60);
        let p = with_leaves(p, leaves);
        judge_with(&rig.path, &p, &mut |p| run(&rig, p))?;
    }
    Ok(())
}

/// The guest finds what it wrote, and its tables do what they did.
pub fn backing(env: &Env) -> Outcome {
    programs(env, 60, 8, |rig, p| {
        let mut rng = Rng::new(p.seed);
        rig.run_with(p, |guest| {
            disturb(rig, guest, &mut rng)?;
            Ok(None)
        })
    })
}

/// What a page of the pool holds now.
fn now(rig: &Rig, page: usize) -> Vec<u64> {
    let (mem, offset) = rig.place(page);
    (0..PAGE / 8).map(|i| mem.read(offset + 8 * i)).collect()
}

/// Every page of the pool that changed since is in the log: data, tables that the guest wrote, tables in which the
/// processor set bits.
pub fn dirty_log(env: &Env) -> Outcome {
    programs(env, 60, 8, |rig, p| {
        let mut rng = Rng::new(p.seed);
        let mut before: Vec<Vec<u64>> = Vec::new();
        rig.run_with(p, |guest| {
            if before.is_empty() {
                set_slots(rig, guest, LOG_DIRTY, false)?;
                before = (0..POOL.len()).map(|i| now(rig, i)).collect();
                return Ok(None);
            }
            let mut complaint = None;
            let logs = [
                dirty::get_log(&guest.vm, 0, LOW / PAGE)?,
                dirty::get_log(&guest.vm, 1, LOW / PAGE)?,
            ];
            for (i, gpa) in POOL.iter().enumerate() {
                let after = now(rig, i);
                let (log, base) = if *gpa < HIGH { (&logs[0], 0) } else { (&logs[1], HIGH) };
                if after != before[i] && !log.has(((gpa - base) / PAGE as u64) as usize) {
                    let word = (0..PAGE / 8).find(|w| after[*w] != before[i][*w]).unwrap_or(0);
                    complaint = Some(format!(
                        "page {i} at {gpa:#x} changed, and is not in the dirty log: offset {:#x} was {:#x}, is {:#x}",
                        word * 8, before[i][word], after[word]
                    ));
                }
                before[i] = after;
            }
            // Off and on again: the log starts anew, from memory as it is.
            if (rng.number() >> 50) & 3 == 0 {
                set_slots(rig, guest, 0, false)?;
                set_slots(rig, guest, LOG_DIRTY, false)?;
            }
            Ok(complaint)
        })
    })
}
