// SPDX-License-Identifier: GPL-2.0

//! Guest memory whose faults another thread of the VMM resolves: userfaultfd.

use selftests::backing::Kind;
use selftests::host::{gettid, interrupting_handler, kick, patient, sleep_ms, Rng};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::probe::{Access, Probe};
use selftests::uffd::{self, Uffd};
use selftests::verifier::{kind, Plan};
use selftests::{ensure, ensure_eq, fail, ops, tests, trial, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

const SIG: i32 = libc::SIGUSR1;
const OLD: u64 = 0x1111_2222_3333_4444;

/// Runs `resolve` on each fault until `body` has ended.
fn resolving(
    u: &Uffd,
    resolve: impl Fn(uffd::Fault) -> Result<(), Verdict> + Sync,
    body: impl FnOnce() -> Outcome,
) -> Outcome {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| -> Outcome {
            while !done.load(Ordering::SeqCst) {
                if let Some(fault) = u.wait(5)? {
                    resolve(fault)?;
                }
            }
            Ok(())
        });
        let r = body();
        done.store(true, Ordering::SeqCst);
        handler
            .join()
            .unwrap_or(Err(Verdict::Fail("the handler panicked".into())))
            .and(r)
    })
}

fn missing(env: &Env) -> Outcome {
    let memory = Mapping::new(64 * PAGE, false)?;
    let u = Uffd::new(memory.addr(), memory.len(), uffd::MISSING)?;
    let p = Probe::new(env, &memory, 0)?;
    let faults = AtomicU32::new(0);
    let resolve = |fault: uffd::Fault| {
        faults.fetch_add(1, Ordering::SeqCst);
        let page = (fault.page - memory.addr()) / PAGE;
        Ok(u.copy(fault.page, OLD + page as u64)?)
    };
    resolving(&u, resolve, || {
        for page in 0..64 {
            if page % 3 == 0 {
                p.writes(page * PAGE + 8, 1, "a missing page")?;
            }
            p.reads(
                page * PAGE,
                OLD + page as u64,
                "the page that was put there",
            )?;
            if page % 4 == 0 {
                memory.advise(page * PAGE, PAGE, libc::MADV_DONTNEED)?;
                p.reads(page * PAGE, OLD + page as u64, "a page missing again")?;
            }
        }
        Ok(())
    })?;
    ensure_eq!(faults.load(Ordering::SeqCst), 64 + 16, "faults");
    Ok(())
}

fn protected(env: &Env) -> Outcome {
    let memory = Mapping::new(16 * PAGE, false)?;
    memory.fill(0, memory.len(), 0x11);
    let u = Uffd::new(memory.addr(), memory.len(), uffd::PROTECTED)?;
    let p = Probe::new(env, &memory, 0)?;
    let faults = AtomicU32::new(0);
    let resolve = |fault: uffd::Fault| {
        ensure!(
            fault.write && fault.protected,
            "{fault:x?}, expected is a write"
        );
        let old: u64 = memory.read(fault.page - memory.addr());
        ensure!(old != OLD, "the page was written before the fault");
        faults.fetch_add(1, Ordering::SeqCst);
        Ok(u.protect(fault.page, PAGE, false)?)
    };
    resolving(&u, resolve, || {
        for round in 1..=5 {
            for page in 0..16 {
                p.writes(page * PAGE, round, "a page that is not protected")?;
            }
            ensure_eq!(
                faults.load(Ordering::SeqCst),
                (round as u32 - 1) * 16,
                "faults of pages that are not protected"
            );
            u.protect(memory.addr(), memory.len(), true)?;
            for page in 0..16 {
                p.reads(page * PAGE, round, "a protected page")?;
                p.writes(page * PAGE, OLD, "a protected page")?;
                ensure_eq!(memory.read::<u64>(page * PAGE), OLD, "the host's view");
            }
            ensure_eq!(faults.load(Ordering::SeqCst), round as u32 * 16, "faults");
        }
        Ok(())
    })
}

/// A vCPU that waits for a page can be interrupted; and goes on when the page is there.
fn interrupted(env: &Env) -> Outcome {
    interrupting_handler(SIG)?;
    let memory = Mapping::new(4 * PAGE, false)?;
    let u = Uffd::new(memory.addr(), memory.len(), uffd::MISSING)?;
    let p = Probe::new(env, &memory, 0)?;
    let (tid, tries) = (AtomicI32::new(0), AtomicU32::new(0));
    for write in [false, true] {
        let at = usize::from(write) * PAGE;
        tries.store(0, Ordering::SeqCst);
        std::thread::scope(|scope| -> Outcome {
            let vcpu = scope.spawn(|| -> Outcome {
                tid.store(gettid(), Ordering::SeqCst);
                loop {
                    match p.access(at, write, OLD)? {
                        Access::Failed(libc::EINTR) => tries.fetch_add(1, Ordering::SeqCst),
                        Access::Done(OLD) => return Ok(()),
                        other => fail!("{other:x?}, expected is EINTR or the access's end"),
                    };
                }
            });
            let body = || -> Outcome {
                for n in 1..=5 {
                    let mut waits = false;
                    for _ in 0..patient(1000) {
                        waits = waits || u.wait(1)?.is_some();
                        if waits {
                            break;
                        }
                    }
                    ensure!(waits, "no fault");
                    sleep_ms(2);
                    ensure_eq!(tries.load(Ordering::SeqCst), n - 1, "KVM_RUNs that ended");
                    kick(tid.load(Ordering::SeqCst), SIG);
                    for _ in 0..patient(1000) {
                        if tries.load(Ordering::SeqCst) == n {
                            break;
                        }
                        sleep_ms(1);
                    }
                    ensure_eq!(
                        tries.load(Ordering::SeqCst),
                        n,
                        "KVM_RUNs that a signal ended"
                    );
                }
                Ok(())
            };
            let r = body();
            u.copy(memory.addr() + at, OLD)?;
            vcpu.join()
                .unwrap_or(Err(Verdict::Fail("the vCPU's thread panicked".into())))
                .and(r)
        })?;
        ensure_eq!(memory.read::<u64>(at), OLD, "the page");
    }
    Ok(())
}

/// Several vCPUs verify memory all of whose faults another thread resolves, and which is protected
/// and taken away again and again.
fn under_load(env: &Env) -> Outcome {
    let numbers: &[usize] = if env.slow < 5 { &[1, 4] } else { &[2] };
    for &vcpus in numbers {
        let plan = Plan {
            vcpus,
            write_mask: 1,
            release_mask: 1,
            ..Plan::default()
        };
        let backing = trial::memory_for(Kind::Small, 2 * HUGE, &plan)?;
        let m = &backing.memory;
        let u = Uffd::new(m.addr(), m.len(), uffd::MISSING | uffd::PROTECTED)?;
        let (missing, protected) = (AtomicU64::new(0), AtomicU64::new(0));
        let resolve = |fault: uffd::Fault| {
            let r = if fault.protected {
                protected.fetch_add(1, Ordering::SeqCst);
                u.protect(fault.page, PAGE, false)
            } else {
                missing.fetch_add(1, Ordering::SeqCst);
                u.copy(fault.page, 0)
            };
            match r {
                // Another vCPU's fault of the same page came first; or it is gone again.
                Err(e) if [libc::EEXIST, libc::ENOENT, libc::EAGAIN].contains(&e.errno) => Ok(()),
                r => Ok(r?),
            }
        };
        let mut rng = Rng::new(env.seed);
        resolving(&u, resolve, || {
            trial::run(env, plan, &backing, |t| {
                let mut step = |_| -> Outcome {
                    for page in 1..t.v.pages() {
                        if t.v.claim(page).is_some() {
                            m.advise(page * PAGE, PAGE, libc::MADV_DONTNEED)?;
                            t.v.state(page).store(kind::ZERO, Ordering::SeqCst);
                        }
                    }
                    let first = usize::try_from(rng.below(1000)).unwrap_or(0);
                    match u.protect(m.addr() + first * PAGE, 16 * PAGE, true) {
                        Err(e) if e.errno == libc::EAGAIN => {}
                        r => r?,
                    }
                    ops::age(t, &mut rng)
                };
                t.during(400, 10, &mut step)?;
                // Until pages that were there are missing.
                let again = || missing.load(Ordering::SeqCst) > t.v.pages() as u64;
                for i in 0..patient(2000) {
                    if again() || t.is_over() {
                        break;
                    }
                    step(i)?;
                    sleep_ms(1);
                }
                Ok(())
            })
        })?;
        let (missing, protected) = (missing.into_inner(), protected.into_inner());
        println!("{missing} faults of missing pages, {protected} of protected ones");
        ensure!(
            missing > (m.len() / PAGE) as u64 && protected > 0,
            "too few faults"
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "userfault",
        tests![missing, protected, interrupted, under_load],
    )
}
