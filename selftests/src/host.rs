// SPDX-License-Identifier: GPL-2.0

//! The host around a test: processors, time, random numbers, memory counts.

use crate::sys::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static SLOW: AtomicU32 = AtomicU32::new(1);

/// Tells how many times slower than usual everything is (`--slow`).
pub fn set_slow(factor: u32) {
    SLOW.store(factor.max(1), Ordering::SeqCst);
}

/// A time in milliseconds, made longer where everything is slow: for limits, and for how long a race
/// is tried.
#[must_use]
pub fn patient(ms: u64) -> u64 {
    ms * u64::from(SLOW.load(Ordering::SeqCst))
}

/// Reads the time stamp counter; in the emulated machine one tick is one instruction.
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: The instruction has no effect but its result.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The processors that this process may use.
#[must_use]
pub fn cpus() -> Vec<usize> {
    // SAFETY: A zeroed set is a valid one, and the call writes at most its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return vec![0];
        }
        (0..1024).filter(|&c| libc::CPU_ISSET(c, &set)).collect()
    }
}

/// Moves a thread (0: the caller) to one processor.
///
/// # Errors
///
/// The failure of `sched_setaffinity`.
pub fn pin(tid: i32, cpu: usize) -> Result<(), Error> {
    // SAFETY: A zeroed set is a valid one; it lives through the call.
    let r = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(tid, size_of::<libc::cpu_set_t>(), &set)
    };
    if r != 0 {
        return Err(Error::last("sched_setaffinity"));
    }
    Ok(())
}

/// The calling thread's id.
#[must_use]
pub fn gettid() -> i32 {
    // SAFETY: No arguments, no effects.
    unsafe { libc::gettid() }
}

/// Sleeps some milliseconds.
pub fn sleep_ms(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// A small generator (xorshift64*): the same seed gives the same numbers everywhere.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator for `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.number() % n
    }

    /// Fills `buffer`.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let bytes = self.number().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// A line of `/proc/meminfo` in KiB.
#[must_use]
pub fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|l| l.strip_prefix(key).is_some_and(|r| r.starts_with(':')))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The number of this process's open descriptors.
#[must_use]
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// The number of open files of the system (`/proc/sys/fs/file-nr`).
#[must_use]
pub fn system_files() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/sys/fs/file-nr").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

extern "C" fn ignore(_: i32) {}

/// Installs a handler that does nothing for `signal`, without restart: system calls get EINTR.
///
/// # Errors
///
/// The failure of `sigaction`.
pub fn interrupting_handler(signal: i32) -> Result<(), Error> {
    // SAFETY: A zeroed structure is a valid one, and the handler is a function that touches nothing.
    let r = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as extern "C" fn(i32) as usize;
        libc::sigaction(signal, &action, std::ptr::null_mut())
    };
    if r != 0 {
        return Err(Error::last("sigaction"));
    }
    Ok(())
}

/// Sends `signal` to a thread of this process.
pub fn kick(tid: i32, signal: i32) {
    // SAFETY: Sends a signal; a thread that is gone is an error that does not matter.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) };
}

/// Sends SIGALRM to this process every `ms` milliseconds (0: no more).
pub fn interval_alarm(ms: u64) {
    let tv = libc::timeval {
        tv_sec: libc::time_t::try_from(ms / 1000).unwrap_or(0),
        tv_usec: libc::suseconds_t::try_from(ms % 1000 * 1000).unwrap_or(0),
    };
    let timer = libc::itimerval {
        it_interval: tv,
        it_value: tv,
    };
    // SAFETY: `timer` lives through the call.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
}

/// Blocks or unblocks one signal in the calling thread.
pub fn block_signal(signal: i32, block: bool) {
    let how = if block {
        libc::SIG_BLOCK
    } else {
        libc::SIG_UNBLOCK
    };
    // SAFETY: The set is initialised before its use and lives through the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::pthread_sigmask(how, &set, std::ptr::null_mut());
    }
}

/// Whether a signal is pending for the calling thread.
#[must_use]
pub fn signal_pending(signal: i32) -> bool {
    // SAFETY: The set lives through the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&mut set);
        libc::sigismember(&set, signal) == 1
    }
}
