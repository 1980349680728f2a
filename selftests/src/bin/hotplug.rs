// SPDX-License-Identifier: GPL-2.0

//! Processors that go offline and come back while guests run: a guest on the one that goes moves to
//! another, and a processor that came back runs guests again. Needs two processors and root.

use selftests::guest::{at, usize_of};
use selftests::host::{cpus, gettid, interrupting_handler, kick, patient, pin, sleep_ms};
use selftests::irq::wait_for;
use selftests::machine::{decode, Machine, Mode};
use selftests::power::Busy;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

const SIG: i32 = libc::SIGUSR1;

guest_code!(count, ".code32", "2: inc dword ptr [{D}]", "cpuid", "jmp 2b"; D = at::DATA);
guest_code!(halt, ".code32", "2: inc dword ptr [{D}]", "hlt", "jmp 2b"; D = at::DATA);

/// A processor other than the first, and the file that switches it.
fn other_cpu() -> Result<(usize, String), Verdict> {
    let cpus = cpus();
    let Some(&cpu) = cpus.iter().find(|c| **c != 0) else {
        skip!("one processor only")
    };
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    if !std::path::Path::new(&path).exists() {
        skip!("{path} is not there: this kernel switches no processors");
    }
    Ok((cpu, path))
}

fn switch(path: &str, on: bool) -> Outcome {
    match std::fs::write(path, if on { "1" } else { "0" }) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => skip!("{path}: {e}"),
        Err(e) => fail!("{path}: {e}"),
    }
}

/// Switches the processor on again, however the test ends.
struct Online(String);

impl Drop for Online {
    fn drop(&mut self) {
        let _ = switch(&self.0, true);
    }
}

fn works(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, halt())?;
    for i in 1..=3u32 {
        m.expect_hlt()?;
        ensure_eq!(m.mem.read::<u32>(usize_of(at::DATA)), i, "count");
    }
    Ok(())
}

/// Off and on with no VM, with an idle VM that ran there, and again.
fn idle(env: &Env) -> Outcome {
    let (cpu, path) = other_cpu()?;
    let _online = Online(path.clone());
    for _ in 0..3 {
        pin(0, cpu)?;
        let m = Machine::new(env, Mode::Protected, halt())?;
        m.expect_hlt()?;
        let all: Vec<usize> = cpus();
        ensure_eq!(all, vec![cpu], "processors of this thread");
        pin(0, 0)?;
        switch(&path, false)?;
        // Its state lay on the processor that is gone.
        m.expect_hlt()?;
        works(env)?;
        switch(&path, true)?;
        pin(0, cpu)?;
        m.expect_hlt()?;
        ensure_eq!(m.mem.read::<u32>(usize_of(at::DATA)), 3, "count");
        works(env)?;
    }
    pin(0, 0)?;
    Ok(())
}

/// A guest runs all the time, and is moved by the kernel when its processor goes.
fn running(env: &Env) -> Outcome {
    let (cpu, path) = other_cpu()?;
    let _online = Online(path.clone());
    interrupting_handler(SIG)?;
    let m = Machine::new(env, Mode::Protected, count())?;
    let counted = || m.mem.read::<u32>(usize_of(at::DATA));
    let (done, tid) = (AtomicBool::new(false), AtomicI32::new(0));
    std::thread::scope(|scope| -> Outcome {
        let runner = scope.spawn(|| -> Outcome {
            // Its processor's absence overrides this, for good: it is done again each round.
            pin(0, cpu)?;
            tid.store(gettid(), Ordering::SeqCst);
            while !done.load(Ordering::SeqCst) {
                match m.vcpu.run() {
                    Err(e) if e.errno == libc::EINTR => {}
                    Err(e) => return Err(e.into()),
                    Ok(_) => fail!("exit {:x?}\n{}", decode(&m.vcpu), m.describe()),
                }
            }
            Ok(())
        });
        let progress = |what: &str| -> Outcome {
            let before = counted();
            for _ in 0..patient(2000) {
                if counted() != before {
                    return Ok(());
                }
                sleep_ms(1);
            }
            fail!("the guest does not go on {what}")
        };
        let body = || -> Outcome {
            pin(0, 0)?;
            for _ in 0..5 {
                progress("at first")?;
                switch(&path, false)?;
                progress("after its processor went")?;
                switch(&path, true)?;
                let _ = pin(tid.load(Ordering::SeqCst), cpu);
                progress("after its processor came back")?;
            }
            Ok(())
        };
        let r = body();
        done.store(true, Ordering::SeqCst);
        while !runner.is_finished() {
            kick(tid.load(Ordering::SeqCst), SIG);
            sleep_ms(1);
        }
        runner
            .join()
            .unwrap_or(Err(Verdict::Fail("a thread panicked".into())))?;
        r
    })?;
    works(env)
}

/// A VM is created while a processor is away, and used on it afterwards.
fn created_meanwhile(env: &Env) -> Outcome {
    let (cpu, path) = other_cpu()?;
    let _online = Online(path.clone());
    pin(0, 0)?;
    switch(&path, false)?;
    let m = Machine::new(env, Mode::Protected, halt())?;
    m.expect_hlt()?;
    switch(&path, true)?;
    pin(0, cpu)?;
    m.expect_hlt()?;
    ensure!(m.mem.read::<u32>(usize_of(at::DATA)) == 2, "count");
    pin(0, 0)?;
    Ok(())
}

/// A guest that computes, one that halts with its timer, one that an irqfd wakes, whose threads are all
/// on the processor that goes: they go on elsewhere.
fn busy(env: &Env) -> Outcome {
    let (cpu, path) = other_cpu()?;
    let _online = Online(path.clone());
    pin(0, 0)?;
    Busy::run(env, |guest| {
        guest.goes_on("at first")?;
        for _ in 0..env.fewer(10) {
            for id in 0..Busy::VCPUS {
                guest.threads.pin(id, cpu)?;
            }
            guest.goes_on("on the processor that is to go")?;
            switch(&path, false)?;
            guest.goes_on("after it went")?;
            switch(&path, true)?;
        }
        Ok(())
    })
}

/// More guests that compute than there are processors: when theirs goes, some wait for their turn there
/// and never get it.
fn crowd(env: &Env) -> Outcome {
    const GUESTS: usize = 6;
    let (cpu, path) = other_cpu()?;
    let _online = Online(path.clone());
    interrupting_handler(SIG)?;
    pin(0, 0)?;
    let machines: Vec<Machine> = (0..GUESTS)
        .map(|_| Ok(Machine::new(env, Mode::Protected, count())?))
        .collect::<Result<_, Verdict>>()?;
    let tids: Vec<AtomicI32> = (0..GUESTS).map(|_| AtomicI32::new(0)).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let runners: Vec<_> = machines
            .iter()
            .zip(&tids)
            .map(|(m, tid)| {
                let done = &done;
                scope.spawn(move || -> Outcome {
                    tid.store(gettid(), Ordering::SeqCst);
                    while !done.load(Ordering::SeqCst) {
                        match m.vcpu.run() {
                            Err(e) if e.errno == libc::EINTR => {}
                            Err(e) => return Err(e.into()),
                            Ok(_) => fail!("exit {:x?}\n{}", decode(&m.vcpu), m.describe()),
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let body = || -> Outcome {
            wait_for("all threads", || {
                tids.iter().all(|tid| tid.load(Ordering::SeqCst) != 0)
            })?;
            for _ in 0..env.fewer(10) {
                for tid in &tids {
                    let _ = pin(tid.load(Ordering::SeqCst), cpu);
                }
                sleep_ms(5);
                switch(&path, false)?;
                for (i, m) in machines.iter().enumerate() {
                    let before = m.mem.read::<u32>(usize_of(at::DATA));
                    wait_for(&format!("guest {i} after its processor went"), || {
                        m.mem.read::<u32>(usize_of(at::DATA)) != before
                    })?;
                }
                switch(&path, true)?;
            }
            Ok(())
        };
        let r = body();
        done.store(true, Ordering::SeqCst);
        let mut failed = r;
        for (runner, tid) in runners.into_iter().zip(&tids) {
            while !runner.is_finished() {
                kick(tid.load(Ordering::SeqCst), SIG);
                sleep_ms(1);
            }
            let ran = runner
                .join()
                .unwrap_or(Err(Verdict::Fail("a thread panicked".into())));
            failed = failed.and(ran);
        }
        failed
    })
}

fn main() -> ExitCode {
    selftests::tap::main(
        "hotplug",
        tests![idle, running, created_meanwhile, busy => 40, crowd => 40],
    )
}
