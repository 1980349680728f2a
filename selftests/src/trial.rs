// SPDX-License-Identifier: GPL-2.0

//! A [`Verifier`]'s vCPUs running, a thread each, while the host does things to its memory.

use crate::backing::Backing;
use crate::host::{gettid, interrupting_handler, kick, patient, sleep_ms};
use crate::machine::{decode, Exit};
use crate::mem::{Mapping, PAGE};
use crate::verifier::{Plan, Progress, Verifier, GPA, PORT_MISMATCH, PORT_STOPPED, VCPUS};
use crate::vm::Vcpu;
use crate::{fail, Env, Outcome, Verdict};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::RwLock;
use std::time::{Duration, Instant};

const SIG: i32 = libc::SIGUSR1;

/// What the body of a test works with.
#[derive(Debug)]
pub struct Trial<'a> {
    /// The VM.
    pub v: &'a Verifier<'a>,
    /// Its memory.
    pub backing: &'a Backing,
    /// Address space as large as the memory, for what is moved away.
    pub spare: Mapping,
    /// KVM_RUN may fail with EFAULT: the memory is away now and then. Then it is tried again.
    pub tolerate: AtomicBool,
    /// The memory may be device memory now and then. Then the vCPU's thread is the device.
    pub serve: AtomicBool,
    /// How often KVM_RUN failed with EFAULT.
    pub faults: AtomicU64,
    /// How often the thread was the device.
    pub served: AtomicU64,
    /// Held for writing while part of the memory is not mapped, or not writable.
    pub shape: RwLock<()>,
    soak: u64,
    over: AtomicBool,
    tids: [AtomicI32; VCPUS],
}

/// Memory of a kind for a plan, filled with what the plan finds in it at first if it has a file.
///
/// # Errors
///
/// A skip if the kind is not to be had, or the failure.
pub fn memory_for(kind: crate::backing::Kind, len: usize, plan: &Plan) -> Result<Backing, Verdict> {
    Backing::new(kind, len, |file| {
        if !kind.is_private() {
            return Ok(());
        }
        for page in 1..len / PAGE {
            file.write_all_at(&Verifier::bytes(plan, page, 0), (page * PAGE) as u64)?;
        }
        Ok(())
    })
}

/// Runs the plan's vCPUs over memory of [`memory_for`], and `body` beside them.
///
/// # Errors
///
/// What a vCPU, `body` or the final look at all memory found wrong.
pub fn run(
    env: &Env,
    plan: Plan,
    backing: &Backing,
    body: impl FnOnce(&Trial) -> Outcome,
) -> Outcome {
    interrupting_handler(SIG)?;
    let filled = backing.file.is_some() && backing.kind.is_private();
    let v = Verifier::new(env, plan, &backing.memory, filled)?;
    let hole = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let trial = Trial {
        v: &v,
        backing,
        spare: Mapping::with(backing.memory.len(), crate::mem::HUGE, hole, -1)?,
        tolerate: AtomicBool::new(false),
        serve: AtomicBool::new(false),
        faults: AtomicU64::new(0),
        served: AtomicU64::new(0),
        shape: RwLock::new(()),
        soak: u64::from(env.soak),
        over: AtomicBool::new(false),
        tids: Default::default(),
    };
    let t = &trial;
    std::thread::scope(|scope| -> Outcome {
        let threads: Vec<_> = v
            .vcpus
            .iter()
            .enumerate()
            .map(|(id, vcpu)| {
                scope.spawn(move || {
                    let r = t.run_vcpu(id, vcpu);
                    if r.is_err() {
                        t.over.store(true, Ordering::SeqCst);
                    }
                    r
                })
            })
            .collect();
        // A thread that starts maps memory, which must not lie where `body` makes holes.
        while t.tids[..threads.len()]
            .iter()
            .any(|tid| tid.load(Ordering::SeqCst) == 0)
        {
            sleep_ms(1);
        }
        let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(t)))
            .unwrap_or_else(|_| Err(Verdict::Fail("the test panicked".into())));
        v.set_stop(true);
        let limit = Instant::now() + Duration::from_millis(patient(5000));
        let mut verdicts = Vec::new();
        for (id, thread) in threads.into_iter().enumerate() {
            while !thread.is_finished() {
                let late = Instant::now() > limit;
                if late || t.is_over() {
                    if late && !t.over.swap(true, Ordering::SeqCst) {
                        let why = format!("vCPU {id} does not stop: {:?}", v.progress(id));
                        verdicts.push(Err(Verdict::Fail(why)));
                    }
                    kick(t.tids[id].load(Ordering::SeqCst), SIG);
                }
                sleep_ms(1);
            }
            verdicts.push(
                thread
                    .join()
                    .unwrap_or(Err(Verdict::Fail("a vCPU's thread panicked".into()))),
            );
        }
        // What a vCPU found says more than what its end made of the body.
        verdicts.into_iter().collect::<Outcome>()?;
        r
    })?;
    v.verify_all()
}

impl Trial<'_> {
    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Mapping {
        &self.backing.memory
    }

    /// Whether a vCPU has found something wrong, or the test is at its end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn run_vcpu(&self, id: usize, vcpu: &Vcpu) -> Outcome {
        self.tids[id].store(gettid(), Ordering::SeqCst);
        while !self.is_over() {
            match vcpu.run() {
                Ok(_) => match decode(vcpu) {
                    Exit::Out { port, .. } if port == PORT_STOPPED => return Ok(()),
                    Exit::Out { port, .. } if port == PORT_MISMATCH => {
                        fail!("{}", self.v.mismatch(id))
                    }
                    exit if self.serve.load(Ordering::SeqCst) => self.be_device(id, vcpu, &exit)?,
                    exit => fail!("vCPU {id}: exit {exit:x?}, {}", self.describe(id, vcpu)),
                },
                Err(e) if e.errno == libc::EINTR => {}
                Err(e) if e.errno == libc::EFAULT && self.tolerate.load(Ordering::SeqCst) => {
                    self.faults.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(50));
                }
                Err(e) => fail!("vCPU {id}: {e}, {}", self.describe(id, vcpu)),
            }
        }
        Ok(())
    }

    fn describe(&self, id: usize, vcpu: &Vcpu) -> String {
        format!("{:?}, {:x?}", self.v.progress(id), vcpu.regs())
    }

    /// Does to the memory what the guest did to a device there.
    fn be_device(&self, id: usize, vcpu: &Vcpu, exit: &Exit) -> Outcome {
        let (Exit::MmioRead { addr, .. } | Exit::MmioWrite { addr, .. }) = exit else {
            fail!("vCPU {id}: exit {exit:x?}, {}", self.describe(id, vcpu));
        };
        let offset = crate::guest::usize_of(addr.wrapping_sub(GPA));
        if offset >= self.memory().len() {
            fail!("vCPU {id}: exit {exit:x?}, {}", self.describe(id, vcpu));
        }
        self.served.fetch_add(1, Ordering::SeqCst);
        loop {
            let r = match exit {
                Exit::MmioWrite { data, .. } => self.v.poke(offset, data),
                Exit::MmioRead { len, .. } => {
                    let mut data = vec![0; *len as usize];
                    let r = self.v.peek(offset, &mut data);
                    // SAFETY: The exit was an MMIO read, so `mmio` is the valid member.
                    let mmio = unsafe { &mut vcpu.kvm_run_mut().__bindgen_anon_1.mmio };
                    mmio.data[..data.len()].copy_from_slice(&data);
                    r
                }
                _ => Ok(()),
            };
            match r {
                Ok(()) => return Ok(()),
                // It is unmapped for the moment.
                Err(e) if e.errno == libc::EIO && !self.is_over() => sleep_ms(1),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn all_progress(&self) -> Vec<Progress> {
        (0..self.v.vcpus.len())
            .map(|id| self.v.progress(id))
            .collect()
    }

    /// Calls `step` again and again for `ms` milliseconds, `least` times at least, and until each vCPU
    /// has been once over all its pages meanwhile. That it does not get there is a failure.
    ///
    /// # Errors
    ///
    /// What `step` said, or that a vCPU did not go on.
    pub fn during(&self, ms: u64, least: u64, mut step: impl FnMut(u64) -> Outcome) -> Outcome {
        let before = self.all_progress();
        let own = (self.v.pages() / self.v.vcpus.len()) as u64;
        let releases = self.v.plan().release_mask != 0;
        let start = Instant::now();
        let time = Duration::from_millis(patient(ms) * self.soak);
        let limit = time * 4 + Duration::from_millis(patient(8000));
        let mut steps = 0;
        loop {
            if self.is_over() {
                // The thread says why.
                return Ok(());
            }
            step(steps)?;
            steps += 1;
            sleep_ms(1);
            let now = self.all_progress();
            let gone_on = |(a, b): (&Progress, &Progress)| {
                a.visits + own < b.visits
                    && a.verified < b.verified
                    && a.written < b.written
                    && (a.released < b.released || !releases)
            };
            let all = before.iter().zip(&now).all(gone_on);
            if all && steps >= least && start.elapsed() >= time {
                let sum = |f: fn(&Progress) -> u64| -> u64 {
                    now.iter().map(f).sum::<u64>() - before.iter().map(f).sum::<u64>()
                };
                println!(
                    "{} vCPUs, {steps} steps: {} pages verified, {} of any, {} written, {} released; \
                     {} faults, {} times a device",
                    now.len(),
                    sum(|p| p.verified),
                    sum(|p| p.foreign),
                    sum(|p| p.written),
                    sum(|p| p.released),
                    self.faults.load(Ordering::SeqCst),
                    self.served.load(Ordering::SeqCst),
                );
                return Ok(());
            }
            if start.elapsed() > limit {
                fail!("no progress in {steps} steps: {before:?}, then {now:?}");
            }
        }
    }
}
