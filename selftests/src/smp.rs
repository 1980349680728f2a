// SPDX-License-Identifier: GPL-2.0

//! vCPUs that run in threads of their own, while the test looks on.

use crate::apic::Guest;
use crate::check::Outcome;
use crate::guest::PORT;
use crate::host::{gettid, interrupting_handler, kick, pin, sleep_ms};
use crate::machine::{decode, Exit};
use crate::sys::Error;
use crate::{Verdict, Verdict::Fail};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// The signal that ends a vCPU thread.
const SIG: i32 = libc::SIGUSR1;

/// What the test sees of its vCPU threads.
#[derive(Debug)]
pub struct Threads {
    tids: Vec<AtomicI32>,
    done: Vec<AtomicBool>,
    stop: AtomicBool,
    failed: AtomicBool,
    /// How often KVM_RUN said EAGAIN.
    pub again: AtomicUsize,
}

impl Threads {
    /// Whether all threads came to an output on [`PORT`].
    #[must_use]
    pub fn all_done(&self) -> bool {
        self.done.iter().all(|d| d.load(Ordering::SeqCst))
    }

    /// Whether the `i`th thread came to an output on [`PORT`].
    #[must_use]
    pub fn done(&self, i: usize) -> bool {
        self.done[i].load(Ordering::SeqCst)
    }

    /// Whether a thread failed: then there is nothing to wait for.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Moves the `i`th thread to a processor.
    ///
    /// # Errors
    ///
    /// The failure of `sched_setaffinity`.
    pub fn pin(&self, i: usize, cpu: usize) -> Result<(), Error> {
        while self.tids[i].load(Ordering::SeqCst) == 0 && !self.failed() {
            sleep_ms(1);
        }
        pin(self.tids[i].load(Ordering::SeqCst), cpu)
    }

    /// Sends a signal to the `i`th thread, which has it leave and enter the guest.
    pub fn kick(&self, i: usize) {
        let tid = self.tids[i].load(Ordering::SeqCst);
        if tid != 0 {
            kick(tid, SIG);
        }
    }
}

/// Runs the vCPUs `which`, each in a thread, until it outputs to [`PORT`] or until `host`, which runs
/// meanwhile, returns. All threads share one processor if `crowded`.
///
/// # Errors
///
/// The failure of `host`, or what a vCPU did instead of an output to [`PORT`].
pub fn run(
    g: &Guest,
    which: &[usize],
    crowded: bool,
    host: impl FnOnce(&Threads) -> Outcome,
) -> Outcome {
    interrupting_handler(SIG)?;
    let t = Threads {
        tids: which.iter().map(|_| AtomicI32::new(0)).collect(),
        done: which.iter().map(|_| AtomicBool::new(false)).collect(),
        stop: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        again: AtomicUsize::new(0),
    };
    let t = &t;
    std::thread::scope(|scope| {
        let threads: Vec<_> = which
            .iter()
            .enumerate()
            .map(|(i, &id)| {
                scope.spawn(move || {
                    t.tids[i].store(gettid(), Ordering::SeqCst);
                    if crowded {
                        if let Some(&cpu) = crate::host::cpus().first() {
                            let _ = pin(0, cpu);
                        }
                    }
                    let r = one(g, id, t);
                    match &r {
                        Ok(true) => t.done[i].store(true, Ordering::SeqCst),
                        Ok(false) => {}
                        Err(_) => t.failed.store(true, Ordering::SeqCst),
                    }
                    t.tids[i].store(0, Ordering::SeqCst);
                    r
                })
            })
            .collect();
        let result = host(t);
        t.stop.store(true, Ordering::SeqCst);
        let mut failure = None;
        for (i, (thread, &id)) in threads.into_iter().zip(which).enumerate() {
            // A signal may come just before KVM_RUN; so `immediate_exit`, and again.
            g.vcpus[id].set_immediate_exit(1);
            while !thread.is_finished() {
                t.kick(i);
                sleep_ms(1);
            }
            g.vcpus[id].set_immediate_exit(0);
            match thread.join() {
                Ok(Ok(_)) => {}
                Ok(Err(e)) => failure = failure.or(Some(e)),
                Err(_) => failure = failure.or(Some(Fail(format!("thread of vCPU {id} panicked")))),
            }
        }
        // What a vCPU did is the cause, and a wait in vain the consequence.
        match (failure, result) {
            (Some(Fail(a)), Err(Fail(b))) => Err(Fail(format!("{a}\n{b}"))),
            (Some(e), _) => Err(e),
            (None, r) => r,
        }
    })
}

/// Runs one vCPU; whether it came to its output.
fn one(g: &Guest, id: usize, t: &Threads) -> Result<bool, Verdict> {
    loop {
        if t.stop.load(Ordering::SeqCst) {
            return Ok(false);
        }
        match g.vcpus[id].run() {
            Ok(_) => match decode(&g.vcpus[id]) {
                Exit::Out { port: PORT, .. } => return Ok(true),
                other => {
                    let r = g.vcpus[id].regs()?;
                    return Err(Fail(format!(
                        "exit {other:x?} of vCPU {id} at {:x}, rsi {:x} rdi {:x}",
                        r.rip, r.rsi, r.rdi
                    )));
                }
            },
            Err(e) if e.errno == libc::EINTR => {}
            Err(e) if e.errno == libc::EAGAIN => {
                t.again.fetch_add(1, Ordering::SeqCst);
            }
            Err(e) => return Err(e.into()),
        }
    }
}
