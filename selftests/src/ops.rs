// SPDX-License-Identifier: GPL-2.0

//! What a host does to a guest's memory under it. Each is one step, to be repeated, at a place that
//! the random numbers choose; none changes what the guest finds, but of pages that it released.

use crate::backing::Kind;
use crate::host::Rng;
use crate::mem::{can_force, poke, HUGE, PAGE};
use crate::pressure::{nodes, set};
use crate::sys::{self, Error};
use crate::trial::Trial;
use crate::verifier::{kind, Verifier};
use crate::{ensure_eq, fail, Outcome, Verdict};
use kvm_bindings as kb;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// One step.
pub type Op = fn(&Trial, &mut Rng) -> Outcome;

/// Not in `libc`: see `<linux/mman.h>`.
const MADV_COLLAPSE: i32 = 25;

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(0)
}

/// A part of the memory: offset and length, of whole granules.
fn part(t: &Trial, rng: &mut Rng, granule: usize, most: usize) -> (usize, usize) {
    let granules = t.memory().len() / granule;
    let n = 1 + index(rng.below(most.min(granules) as u64));
    let first = index(rng.below((granules - n + 1) as u64));
    (first * granule, n * granule)
}

fn pages(t: &Trial, rng: &mut Rng) -> (usize, usize) {
    let granule = t.backing.kind.granule();
    part(t, rng, granule, (64 * PAGE / granule).max(1))
}

/// What the kernel may answer when others are at the same memory, or when there is none to spare.
fn lenient(r: Result<(), Error>) -> Outcome {
    match r {
        Err(e) if [libc::EAGAIN, libc::EBUSY, libc::ENOMEM, libc::EINVAL].contains(&e.errno) => {
            Ok(())
        }
        r => Ok(r?),
    }
}

fn advise(t: &Trial, rng: &mut Rng, advice: i32) -> Outcome {
    let (offset, len) = if rng.below(8) == 0 {
        (0, t.memory().len())
    } else {
        pages(t, rng)
    };
    let _shape = t.shape.read();
    lenient(t.memory().advise(offset, len, advice))
}

/// Pages go to swap, or back to their file; at times the guest's code and tables too.
pub fn page_out(t: &Trial, rng: &mut Rng) -> Outcome {
    if rng.below(8) == 0 {
        let control = &t.v.control;
        lenient(control.advise(0, control.len(), libc::MADV_PAGEOUT))?;
    }
    advise(t, rng, libc::MADV_PAGEOUT)
}

/// Pages become the first to go: their accessed bits are cleared.
pub fn cold(t: &Trial, rng: &mut Rng) -> Outcome {
    advise(t, rng, libc::MADV_COLD)
}

/// The accessed bits of all the process's pages are cleared.
pub fn age(_: &Trial, _: &mut Rng) -> Outcome {
    set("/proc/self/clear_refs", "1")
}

/// Equal pages may be merged, or must not any more.
pub fn mergeable(t: &Trial, rng: &mut Rng) -> Outcome {
    let advice = if rng.below(8) == 0 {
        libc::MADV_UNMERGEABLE
    } else {
        libc::MADV_MERGEABLE
    };
    advise(t, rng, advice)
}

/// The kernel moves pages together.
pub fn compact(_: &Trial, _: &mut Rng) -> Outcome {
    set("/proc/sys/vm/compact_memory", "1")
}

/// Pages go to another node of memory.
pub fn migrate(t: &Trial, rng: &mut Rng) -> Outcome {
    let (offset, len) = pages(t, rng);
    let granule = t.backing.kind.granule();
    let addresses: Vec<usize> = (0..len / granule)
        .map(|i| t.memory().addr() + offset + i * granule)
        .collect();
    let node = i32::try_from(rng.below(nodes().unsigned_abs().into())).unwrap_or(0);
    let to = vec![node; addresses.len()];
    let mut status = vec![0i32; addresses.len()];
    let _shape = t.shape.read();
    // SAFETY: The three arrays have the length that is passed, and live through the call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addresses.len(),
            addresses.as_ptr(),
            to.as_ptr(),
            status.as_mut_ptr(),
            2, // MPOL_MF_MOVE
        )
    };
    if r < 0 {
        return lenient(Err(Error::last("move_pages")));
    }
    Ok(())
}

/// 2 MiB become one page.
pub fn collapse(t: &Trial, rng: &mut Rng) -> Outcome {
    let (offset, len) = part(t, rng, HUGE, 1);
    let _shape = t.shape.read();
    lenient(t.memory().advise(offset, len, MADV_COLLAPSE))
}

/// A huge page comes apart: its mapping, by a protection that only a part of it has for a moment; or
/// the page itself.
pub fn split(t: &Trial, rng: &mut Rng) -> Outcome {
    let (offset, len) = part(t, rng, PAGE, 16);
    let m = t.memory();
    if rng.below(3) == 0 {
        let start = m.addr() + offset / HUGE * HUGE;
        let what = format!("{},{start:#x},{:#x}", std::process::id(), start + HUGE);
        return set("/sys/kernel/debug/split_huge_pages", &what);
    }
    let _shape = t.shape.write();
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    m.protect(offset, len, rw | libc::PROT_EXEC)?;
    m.protect(offset, len, rw)?;
    Ok(())
}

/// How long memory is away: long enough for guests to come by.
fn while_away(rng: &mut Rng) {
    std::thread::sleep(Duration::from_micros(100 + rng.below(1500)));
}

/// Pages are read-only, or not accessible at all, for a while.
pub fn protect(t: &Trial, rng: &mut Rng) -> Outcome {
    let (offset, len) = pages(t, rng);
    t.tolerate.store(true, Ordering::SeqCst);
    let _shape = t.shape.write();
    let prot = if rng.below(2) == 0 {
        libc::PROT_READ
    } else {
        libc::PROT_NONE
    };
    t.memory().protect(offset, len, prot)?;
    while_away(rng);
    t.memory()
        .protect(offset, len, libc::PROT_READ | libc::PROT_WRITE)?;
    Ok(())
}

/// Pages are elsewhere in the address space for a while.
pub fn remap(t: &Trial, rng: &mut Rng) -> Outcome {
    let (offset, len) = pages(t, rng);
    t.tolerate.store(true, Ordering::SeqCst);
    let _shape = t.shape.write();
    t.memory().remap(offset, len, &t.spare, offset, false)?;
    while_away(rng);
    t.spare.remap(offset, len, t.memory(), offset, false)?;
    Ok(())
}

/// Pages that the guest has released are taken away, in one way or another.
pub fn release(t: &Trial, rng: &mut Rng) -> Outcome {
    let n = t.v.pages();
    let start = index(rng.below(n as u64));
    let mut taken = 0;
    for i in 0..n {
        let page = (start + i) % n;
        if page == 0 {
            continue;
        }
        if let Some(stable) = t.v.claim(page) {
            let next = take_away(t, rng, page, stable)?;
            t.v.state(page).store(next, Ordering::SeqCst);
            taken += 1;
            if taken == 32 {
                break;
            }
        }
    }
    Ok(())
}

/// What is found in a page of that kind that has gone, and is not written in its file.
fn gone(kind_of: Kind, stable: u64) -> u64 {
    match kind_of {
        Kind::Small | Kind::Thp => kind::ZERO,
        Kind::TmpfsPrivate | Kind::DiskPrivate => kind::STABLE,
        _ => stable,
    }
}

/// Takes a page that has been claimed; returns its new state.
fn take_away(t: &Trial, rng: &mut Rng, page: usize, stable: u64) -> Result<u64, Verdict> {
    let (m, offset, kind_of) = (t.memory(), page * PAGE, t.backing.kind);
    // A device cannot do what the guest does to a page that may be gone; it has the second half.
    let device = t.serve.load(Ordering::SeqCst) && offset >= m.len() / 2;
    match rng.below(6) {
        0 => {
            let _shape = t.shape.read();
            m.advise(offset, PAGE, libc::MADV_DONTNEED)?;
        }
        1 if kind_of.is_anonymous() && !device => {
            let _shape = t.shape.read();
            m.advise(offset, PAGE, libc::MADV_FREE)?;
            if rng.below(2) == 0 {
                lenient(m.advise(offset, PAGE, libc::MADV_PAGEOUT))?;
            }
            return Ok(kind::MAYBE | stable);
        }
        2 if !kind_of.is_private() => {
            let _shape = t.shape.read();
            m.advise(offset, PAGE, libc::MADV_REMOVE)?;
            return Ok(kind::ZERO);
        }
        3 => {
            t.tolerate.store(true, Ordering::SeqCst);
            let _shape = t.shape.write();
            m.unmap(offset, PAGE)?;
            while_away(rng);
            t.backing.map_again(offset, PAGE)?;
            if kind_of == Kind::Shared {
                // It is another memory's page now.
                return Ok(kind::ZERO);
            }
        }
        4 if kind_of.is_anonymous() => {
            // What the guest wrote last is in the page that was moved; what it left is empty.
            t.tolerate.store(true, Ordering::SeqCst);
            let _shape = t.shape.write();
            m.remap(offset, PAGE, &t.spare, offset, true)?;
            let moved = t.v.look(page, stable, &t.spare, offset);
            t.spare
                .replace(offset, PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
            moved.map_err(|e| Verdict::Fail(format!("in a page that was moved: {e}")))?;
        }
        _ => return written_by_host(t, page),
    }
    Ok(gone(kind_of, stable))
}

/// The host writes a page through the kernel, at times while it is read-only for its programs.
fn written_by_host(t: &Trial, page: usize) -> Result<u64, Verdict> {
    /// Above the stamps of any round.
    static STAMP: AtomicU64 = AtomicU64::new(1 << 40);
    let (m, offset) = (t.memory(), page * PAGE);
    let stamp = STAMP.fetch_add(1, Ordering::SeqCst);
    let state = (stamp << 8) | kind::STABLE;
    let _shape = t.shape.write();
    let forced = t.backing.kind.is_private() && can_force();
    if forced {
        t.tolerate.store(true, Ordering::SeqCst);
        m.protect(offset, PAGE, libc::PROT_READ)?;
    }
    poke(m.addr() + offset, &Verifier::bytes(t.v.plan(), page, state))?;
    if forced {
        m.protect(offset, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    }
    Ok(state)
}

/// A child has a copy of all memory: it finds what was there, keeps what it writes, and ends.
pub fn fork(t: &Trial, rng: &mut Rng) -> Outcome {
    let _shape = t.shape.read();
    let n = t.v.pages();
    let chosen: Vec<(usize, u64)> = (0..48)
        .map(|_| 1 + index(rng.below(n as u64 - 1)))
        .map(|page| (page, t.v.state(page).load(Ordering::SeqCst)))
        .collect();
    // SAFETY: The child reads and writes memory that is its own, sleeps and ends.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(Error::last("fork").into());
    }
    if pid == 0 {
        let status = in_child(t, &chosen);
        // SAFETY: Only ends the process.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: `status` lives through the call.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    ensure_eq!(
        status,
        0,
        "status of the child (0x100: a page was not what it had been; 0x200: one did not stay)"
    );
    Ok(())
}

fn in_child(t: &Trial, chosen: &[(usize, u64)]) -> i32 {
    const OURS: u64 = 0xc41d_c41d_c41d_c41d;
    let m = t.memory();
    for (page, state) in chosen {
        let stable = state & kind::MASK == kind::STABLE;
        // The states are shared: not changed now, it was not when the memory was copied.
        if stable && t.v.state(*page).load(Ordering::SeqCst) == *state {
            if let Err(e) = t.v.look(*page, *state, m, page * PAGE) {
                println!("in the child: {e}");
                return 1;
            }
        }
    }
    let everywhere = || {
        chosen
            .iter()
            .flat_map(|(p, _)| (0..PAGE / 8).map(move |w| p * PAGE + w * 8))
    };
    for at in everywhere() {
        m.write(at, OURS);
    }
    std::thread::sleep(Duration::from_millis(2));
    if everywhere().any(|at| m.read::<u64>(at) != OURS) {
        return 2;
    }
    0
}

/// The second half's memslot goes, comes back, comes back read-only or elsewhere.
pub fn slots(t: &Trial, rng: &mut Rng) -> Outcome {
    t.serve.store(true, Ordering::SeqCst);
    let (offset, len) = t.v.half(1);
    match rng.below(3) {
        0 => {
            t.v.set_half(1, 0, false)?;
            while_away(rng);
        }
        1 => {
            t.v.set_half(1, 0, false)?;
            t.v.set_half(1, kb::KVM_MEM_READONLY, true)?;
            while_away(rng);
            t.v.set_half(1, 0, false)?;
        }
        _ => {
            let elsewhere = crate::verifier::GPA + 0x2000_0000 + offset as u64;
            let hva = (t.memory().addr() + offset) as u64;
            let slot = crate::verifier::SLOT + 1;
            t.v.vm.set_memory(slot, 0, elsewhere, len as u64, hva)?;
            while_away(rng);
        }
    }
    Ok(t.v.set_half(1, 0, true)?)
}

/// Writes to the second half are logged for a while: all are in the log. A processor may keep what it
/// logged until its vCPU is on its way back into the guest; so what is not in one log has to be in one
/// that is read after the page's owner went on.
pub fn dirty_log(t: &Trial, rng: &mut Rng) -> Outcome {
    let (offset, len) = t.v.half(1);
    let first = offset / PAGE;
    let n = len / PAGE;
    let states = || -> Vec<u64> {
        (first..first + n)
            .map(|p| t.v.state(p).load(Ordering::SeqCst))
            .collect()
    };
    let visits = |state: u64| t.v.progress(index((state >> 8) & 0xf)).visits;
    let mut log = vec![0u64; n.div_ceil(64)];
    // Pages that were written, the new state, and how far the owner was when the log was read.
    let mut missing: Vec<(usize, u64, u64)> = Vec::new();
    t.v.set_half(1, kb::KVM_MEM_LOG_DIRTY_PAGES, true)?;
    let rounds = 1 + rng.below(4);
    let mut round = 0;
    while !t.is_over() && (round < rounds || !missing.is_empty()) {
        let before = states();
        while_away(rng);
        let after = states();
        let gone_on: Vec<bool> = missing
            .iter()
            .map(|(_, state, then)| visits(*state) > *then)
            .collect();
        let request = [
            u64::from(crate::verifier::SLOT + 1),
            log.as_mut_ptr() as u64,
        ];
        t.v.vm.fd.ioctl_ref(sys::KVM_GET_DIRTY_LOG, &request)?;
        let logged = |i: usize| (log[i / 64] >> (i % 64)) & 1 != 0;
        for ((i, state, _), gone_on) in missing.iter().zip(gone_on) {
            if gone_on && !logged(*i) {
                fail!(
                    "page {} went to state {state:#x}, and is in no log",
                    first + i
                );
            }
        }
        missing.retain(|(i, _, _)| !logged(*i));
        for (i, (a, b)) in before.iter().zip(&after).enumerate() {
            let stable = |s: u64| s & kind::MASK == kind::STABLE;
            // Written meanwhile, wholly, and by the guest.
            let written = stable(*a) && stable(*b) && a != b && b >> 48 == 0;
            if round < rounds && written && !logged(i) {
                missing.push((i, *b, visits(*b)));
            }
        }
        round += 1;
    }
    Ok(t.v.set_half(1, 0, true)?)
}
