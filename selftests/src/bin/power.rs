// SPDX-License-Identifier: GPL-2.0

//! The host sleeps, as deep as it can, under guests that run, that wait, and that nobody runs just then.
//! Needs root, a kernel with `CONFIG_PM_DEBUG`, and for suspend to RAM a clock that wakes the machine up.

use selftests::guest::{at, usize_of};
use selftests::host::{cpus, gettid, interrupting_handler, pin};
use selftests::machine::{Machine, Mode};
use selftests::power::{can_sleep, sleep, Busy, Depth};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};

guest_code!(halt, ".code32", "2: inc dword ptr [{D}]", "hlt", "jmp 2b"; D = at::DATA);
guest_code!(count, ".code32", "2: inc dword ptr [{D}]", "jmp 2b"; D = at::DATA);

/// A guest with three vCPUs, one that computes and two that are halted, goes on after a sleep, and its
/// counters do not go backwards. Twice, as the second sleep finds what the first has left.
fn busy(env: &Env, depth: Depth) -> Outcome {
    can_sleep(depth)?;
    Busy::run(env, |guest| {
        guest.goes_on("at first")?;
        for when in ["after a sleep", "after another sleep"] {
            sleep(depth)?;
            guest.goes_on(when)?;
        }
        Ok(())
    })
}

fn busy_freezer(env: &Env) -> Outcome {
    busy(env, Depth::Freezer)
}

fn busy_idle(env: &Env) -> Outcome {
    busy(env, Depth::Idle)
}

fn busy_core(env: &Env) -> Outcome {
    busy(env, Depth::Core)
}

fn busy_ram(env: &Env) -> Outcome {
    busy(env, Depth::Ram)
}

/// Machines that ran on each processor, and whose state lies there when it goes: none of it is lost.
fn resting(env: &Env, depth: Depth) -> Outcome {
    can_sleep(depth)?;
    let all = cpus();
    let mut machines = Vec::new();
    for &cpu in &all {
        for _ in 0..2 {
            pin(0, cpu)?;
            let m = Machine::new(env, Mode::Protected, halt())?;
            m.expect_hlt()?;
            m.patch_regs(|r| r.rbx = 0x1234_5678 + cpu as u64)?;
            machines.push((cpu, m));
        }
    }
    for turn in 2..=4u32 {
        sleep(depth)?;
        // Each where it was; those that come after a new one find it there.
        for (cpu, m) in &machines {
            pin(0, *cpu)?;
            let other = Machine::new(env, Mode::Protected, halt())?;
            other.expect_hlt()?;
            m.expect_hlt()?;
            ensure_eq!(m.mem.read::<u32>(usize_of(at::DATA)), turn, "count");
            ensure_eq!(m.vcpu.regs()?.rbx, 0x1234_5678 + *cpu as u64, "RBX");
        }
    }
    Ok(())
}

fn resting_core(env: &Env) -> Outcome {
    resting(env, Depth::Core)
}

fn resting_ram(env: &Env) -> Outcome {
    resting(env, Depth::Ram)
}

/// The same under both modules at once: each gives up its part of the processor, and finds it again.
fn beside(env: &Env, depth: Depth) -> Outcome {
    const OTHER: &str = "/dev/kvm";
    can_sleep(depth)?;
    if env.device == OTHER || !std::path::Path::new(OTHER).exists() {
        skip!("no other device than {}", env.device);
    }
    let other = Env {
        device: OTHER.into(),
        ..env.clone()
    };
    let rests = [
        Machine::new(env, Mode::Protected, halt())?,
        Machine::new(&other, Mode::Protected, halt())?,
    ];
    let all_rest = |turn: u32| -> Outcome {
        for m in &rests {
            m.expect_hlt()?;
            ensure_eq!(m.mem.read::<u32>(usize_of(at::DATA)), turn, "count");
        }
        Ok(())
    };
    all_rest(1)?;
    Busy::run(&other, |theirs| {
        Busy::run(env, |ours| {
            ours.goes_on("at first")?;
            for turn in 2..=3 {
                sleep(depth)?;
                ours.goes_on("after a sleep")?;
                theirs.goes_on("on the other device")?;
                all_rest(turn)?;
            }
            Ok(())
        })
    })
}

fn beside_core(env: &Env) -> Outcome {
    beside(env, Depth::Core)
}

fn beside_ram(env: &Env) -> Outcome {
    beside(env, Depth::Ram)
}

/// To be frozen, a thread leaves KVM_RUN as for a signal; no signal comes of it.
fn frozen(env: &Env) -> Outcome {
    can_sleep(Depth::Freezer)?;
    interrupting_handler(libc::SIGUSR1)?;
    let m = Machine::new(env, Mode::Protected, count())?;
    let tid = AtomicI32::new(0);
    std::thread::scope(|scope| -> Outcome {
        let runner = scope.spawn(|| {
            tid.store(gettid(), Ordering::SeqCst);
            m.vcpu.run()
        });
        let counted = || m.mem.read::<u32>(usize_of(at::DATA));
        let body = || -> Outcome {
            selftests::irq::wait_for("the guest", || counted() != 0)?;
            ensure!(!runner.is_finished(), "KVM_RUN returned before the sleep");
            sleep(Depth::Freezer)?;
            selftests::irq::wait_for("KVM_RUN", || runner.is_finished())
        };
        let r = body();
        while !runner.is_finished() {
            selftests::host::kick(tid.load(Ordering::SeqCst), libc::SIGUSR1);
            selftests::host::sleep_ms(1);
        }
        let ran = runner
            .join()
            .map_err(|_| Verdict::Fail("a thread panicked".into()))?;
        r?;
        match ran {
            Err(e) if e.errno == libc::EINTR => Ok(()),
            other => fail!("KVM_RUN said {other:?}, expected EINTR"),
        }
    })
}

fn main() -> ExitCode {
    selftests::tap::main(
        "power",
        tests![
            frozen => 60,
            busy_freezer => 60,
            busy_idle => 60,
            busy_core => 60,
            busy_ram => 60,
            resting_core => 60,
            resting_ram => 60,
            beside_core => 60,
            beside_ram => 60,
        ],
    )
}
