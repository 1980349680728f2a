// SPDX-License-Identifier: GPL-2.0

//! Signals and KVM_RUN: how a VMM gets its vCPU threads back.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, usize_of, PORT};
use selftests::host::{
    block_signal, gettid, interrupting_handler, interval_alarm, kick, patient, signal_pending,
    sleep_ms,
};
use selftests::machine::{Exit, Machine, Mode, MODES};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, sys, tests, Env, Outcome};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const SIG: i32 = libc::SIGUSR1;

// Counts in memory for ever.
guest_code!(count, ".code32", "2: inc dword ptr [{D}]", "jmp 2b"; D = at::DATA);

fn counted(m: &Machine) -> u32 {
    m.mem.read(usize_of(at::DATA))
}

/// KVM_RUN, which has to end by a signal.
fn expect_signal(m: &Machine) -> Outcome {
    expect_errno(m.vcpu.run(), libc::EINTR, "KVM_RUN with a signal")?;
    ensure_eq!(
        m.vcpu.kvm_run().exit_reason,
        kb::KVM_EXIT_INTR,
        "exit reason"
    );
    Ok(())
}

/// A guest that does nothing but spin is left, with interrupts enabled in it or not, in all modes.
fn leaves_spinning_guest(env: &Env) -> Outcome {
    interrupting_handler(libc::SIGALRM)?;
    for mode in MODES {
        for rflags in [0x2u64, 0x202] {
            guest_code!(code, ".code32", "2: jmp 2b");
            let m = Machine::new(env, mode, code())?;
            m.patch_regs(|r| r.rflags = rflags)?;
            interval_alarm(patient(5));
            let r = expect_signal(&m);
            interval_alarm(0);
            r?;
            ensure_eq!(m.vcpu.regs()?.rip, at::CODE, "RIP in mode {mode:?}");
        }
    }
    Ok(())
}

/// The guest goes on where it was.
fn goes_on(env: &Env) -> Outcome {
    interrupting_handler(libc::SIGALRM)?;
    let m = Machine::new(env, Mode::Protected, count())?;
    interval_alarm(patient(2));
    let mut last = 0;
    for round in 0..50 {
        expect_signal(&m)?;
        let now = counted(&m);
        ensure!(now > last, "round {round}: {now} after {last}");
        last = now;
    }
    interval_alarm(0);
    Ok(())
}

/// A signal that is blocked does not end KVM_RUN.
fn blocked_signal(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "mov ecx, 100000", "2: loop 2b", "hlt");
    interrupting_handler(SIG)?;
    block_signal(SIG, true);
    let m = Machine::new(env, Mode::Protected, code())?;
    kick(gettid(), SIG);
    ensure!(signal_pending(SIG), "the signal is pending");
    m.expect_hlt()?;
    ensure!(signal_pending(SIG), "the signal is still pending");
    Ok(())
}

/// KVM_SET_SIGNAL_MASK replaces the mask for the time of KVM_RUN.
fn signal_mask(env: &Env) -> Outcome {
    #[repr(C)]
    struct Mask {
        len: u32,
        set: [u8; 8],
    }
    interrupting_handler(SIG)?;
    let m = Machine::new(env, Mode::Protected, count())?;
    let r = m.vcpu.fd.ioctl_ref(
        sys::KVM_SET_SIGNAL_MASK,
        &Mask {
            len: 8,
            set: [0; 8],
        },
    );
    if let Err(e) = &r {
        if matches!(e.errno, libc::ENOTTY) {
            skip!("no KVM_SET_SIGNAL_MASK");
        }
    }
    r?;
    let r = m.vcpu.fd.ioctl_ref(
        sys::KVM_SET_SIGNAL_MASK,
        &Mask {
            len: 4,
            set: [0; 8],
        },
    );
    expect_errno(r, libc::EINVAL, "a mask of 4 bytes")?;
    block_signal(SIG, true);
    kick(gettid(), SIG);
    expect_signal(&m)?;
    ensure!(
        signal_pending(SIG),
        "the signal stays pending: its mask is in force again"
    );
    // Without a mask, the thread's own counts again: blocked.
    m.vcpu.fd.ioctl(sys::KVM_SET_SIGNAL_MASK, 0)?;
    guest_code!(halt, ".code32", "hlt");
    m.start(Mode::Protected, halt())?;
    m.expect_hlt()
}

/// With `immediate_exit` the guest does not run at all.
fn immediate_exit(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, count())?;
    m.vcpu.set_immediate_exit(1);
    for _ in 0..10 {
        expect_errno(m.vcpu.run(), libc::EINTR, "KVM_RUN with immediate_exit")?;
    }
    ensure_eq!(counted(&m), 0, "what the guest counted");
    ensure_eq!(
        m.vcpu.kvm_run().immediate_exit,
        1,
        "immediate_exit, which is the VMM's to clear"
    );
    Ok(())
}

static RUN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn set_immediate(_: i32) {
    let run = RUN.load(Ordering::SeqCst);
    if run != 0 {
        let offset = std::mem::offset_of!(kb::kvm_run, immediate_exit);
        // SAFETY: The test keeps the mapping while its address is in RUN.
        unsafe { ((run + offset) as *mut u8).write_volatile(1) };
    }
}

/// The pattern that has no race: the handler sets `immediate_exit`, so that a signal between the
/// check and KVM_RUN is not lost.
fn immediate_exit_from_handler(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, count())?;
    RUN.store(m.vcpu.run_addr(), Ordering::SeqCst);
    // SAFETY: The handler only writes a byte that the test keeps mapped.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = set_immediate as extern "C" fn(i32) as usize;
        libc::sigaction(SIG, &action, std::ptr::null_mut());
    }
    let tid = gettid();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let kicker = scope.spawn(|| {
            let mut kicks = 0u32;
            while !done.load(Ordering::SeqCst) {
                kick(tid, SIG);
                kicks += 1;
                std::thread::yield_now();
                if kicks % 16 == 0 {
                    sleep_ms(1);
                }
            }
        });
        let mut result = Ok(());
        for _ in 0..100 {
            result = expect_errno(m.vcpu.run(), libc::EINTR, "KVM_RUN");
            m.vcpu.set_immediate_exit(0);
            if result.is_err() {
                break;
            }
        }
        done.store(true, Ordering::SeqCst);
        let _ = kicker.join();
        result
    })?;
    RUN.store(0, Ordering::SeqCst);
    Ok(())
}

/// Kicks from another thread hit a guest that exits all the time: no exit is lost or repeated.
fn kicks_and_exits(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "2: inc eax",
        "out {P}, eax",
        "in eax, {P}",
        "jmp 2b";
        P = PORT,
    );
    interrupting_handler(SIG)?;
    let m = Machine::new(env, Mode::Protected, code())?;
    let tid = gettid();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let kicker = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                kick(tid, SIG);
                sleep_ms(1);
            }
        });
        let run = || -> Outcome {
            let (mut value, mut interrupted, mut steps) = (0u32, 0, 0);
            let mut expect_out = true;
            while steps < 4000 || interrupted < 3 {
                match m.vcpu.run() {
                    Err(e) if e.errno == libc::EINTR => {
                        interrupted += 1;
                        continue;
                    }
                    Err(e) => return Err(e.into()),
                    Ok(_) => {}
                }
                steps += 1;
                match selftests::machine::decode(&m.vcpu) {
                    Exit::Out { data, .. } if expect_out => {
                        let got = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                        ensure_eq!(got, value + 1, "value output in step {steps}");
                        value = got;
                    }
                    Exit::In { .. } if !expect_out => {
                        value = value.wrapping_add(7);
                        m.io_reply(&value.to_le_bytes());
                    }
                    other => fail!("exit {other:?} in step {steps}"),
                }
                expect_out = !expect_out;
            }
            Ok(())
        };
        let result = run();
        done.store(true, Ordering::SeqCst);
        let _ = kicker.join();
        result
    })
}

/// A vCPU thread that is stopped and continued by job control goes on.
fn stop_and_continue(env: &Env) -> Outcome {
    let shared = selftests::mem::Mapping::new(4096, true)?;
    // SAFETY: The child builds its own VM and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let run = || -> Outcome {
            let m = Machine::new(env, Mode::Protected, count())?;
            interval_alarm(patient(2));
            for _ in 0..1_000_000 {
                match m.vcpu.run() {
                    Err(e) if e.errno == libc::EINTR => shared.write(0, counted(&m)),
                    other => fail!("KVM_RUN: {other:?}"),
                }
            }
            Ok(())
        };
        interrupting_handler(libc::SIGALRM)?;
        let r = run();
        println!("{r:?}");
        // SAFETY: Ends the child.
        unsafe { libc::_exit(1) };
    }
    let mut last = 0;
    let outcome = (|| -> Outcome {
        for round in 0..5 {
            let mut waited = 0;
            while shared.read::<u32>(0) <= last {
                sleep_ms(1);
                waited += 1;
                ensure!(waited < patient(3000), "no progress in round {round}");
            }
            // SAFETY: Signals to our own child.
            unsafe { libc::kill(pid, libc::SIGSTOP) };
            sleep_ms(3);
            last = shared.read::<u32>(0);
            sleep_ms(5);
            ensure_eq!(shared.read::<u32>(0), last, "progress while stopped");
            // SAFETY: As above.
            unsafe { libc::kill(pid, libc::SIGCONT) };
        }
        Ok(())
    })();
    // SAFETY: Our own child; `status` lives through the call.
    unsafe {
        let mut status = 0;
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, &mut status, 0);
    }
    outcome
}

fn main() -> ExitCode {
    selftests::tap::main(
        "signals",
        tests![
            leaves_spinning_guest,
            goes_on,
            blocked_signal,
            signal_mask,
            immediate_exit,
            immediate_exit_from_handler,
            kicks_and_exits,
            stop_and_continue,
        ],
    )
}
