// SPDX-License-Identifier: GPL-2.0

//! The harness: arguments, one process a test, a deadline for each, TAP on stdout.
//!
//! A test runs in a forked child, in a process group of its own. Its output becomes TAP comments. A
//! child that does not end by its deadline is killed and the test fails by name; a hang is never
//! silence. A child that cannot even be killed is stuck in the kernel: that is said, and the rest runs.

use crate::check::{Outcome, Verdict};
use crate::sys::Error;
use crate::vm::Kvm;
use std::io::Write;
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// One test.
pub struct Test {
    /// The name that TAP, `--list` and the filter use.
    pub name: &'static str,
    /// The body.
    pub run: fn(&Env) -> Outcome,
    /// Seconds until it counts as hung.
    pub seconds: u32,
}

/// Seconds that a test may take unless it says otherwise.
pub const SECONDS: u32 = 20;

/// Builds the table of tests of a binary: `tests![name, name => seconds, ...]`.
#[macro_export]
macro_rules! tests {
    (@s) => { $crate::tap::SECONDS };
    (@s $s:expr) => { $s };
    ($($name:ident $(=> $seconds:expr)?),* $(,)?) => {
        &[$($crate::Test {
            name: stringify!($name),
            run: $name,
            seconds: $crate::tests!(@s $($seconds)?),
        }),*]
    };
}

/// What the command line said.
#[derive(Debug, Clone)]
pub struct Env {
    /// The device under test.
    pub device: String,
    /// The module file that `module` loads and unloads.
    pub module: Option<String>,
    /// The seed of the random tests.
    pub seed: u64,
    /// Factor on each deadline, for slow (debug) kernels.
    pub slow: u32,
    /// Factor on the time that stress tests take, and on each deadline.
    pub soak: u32,
}

impl Env {
    /// Opens the device under test.
    ///
    /// # Errors
    ///
    /// The failure of `open`.
    pub fn open(&self) -> Result<Kvm, Error> {
        Kvm::open(&self.device)
    }

    /// How often to do what a test does `rounds` times: less often where everything is slow.
    #[must_use]
    pub fn fewer(&self, rounds: u64) -> u64 {
        if self.slow < 5 {
            rounds
        } else {
            (rounds / 5).max(1)
        }
    }
}

struct Args {
    env: Env,
    list: bool,
    filter: Vec<String>,
}

const USAGE: &str = "\
Usage: TEST [--device PATH] [--list] [--seed N] [--slow FACTOR] [--soak FACTOR]
            [--module KO] [NAME...]
  --device PATH   the device to test (default /dev/rkvm)
  --list          list the tests and exit
  --seed N        seed of random tests (default 1)
  --slow FACTOR   multiply each deadline, for a debug kernel
  --soak FACTOR   multiply the time that stress tests take (default 1)
  --module KO     the module file, for tests that load and unload it; 'KO NAME=VALUE'
                  loads it with a parameter
  NAME            run only tests whose name contains one of the NAMEs
";

fn parse() -> Result<Args, String> {
    let mut args = Args {
        env: Env {
            device: "/dev/rkvm".into(),
            module: None,
            seed: 1,
            slow: 1,
            soak: 1,
        },
        list: false,
        filter: Vec::new(),
    };
    let mut it = std::env::args().skip(1);
    while let Some(arg) = it.next() {
        let mut value = |name: &str| it.next().ok_or(format!("{name} needs a value"));
        match arg.as_str() {
            "--device" => args.env.device = value("--device")?,
            "--module" => args.env.module = Some(value("--module")?),
            "--seed" => args.env.seed = number(&value("--seed")?)?,
            "--slow" => args.env.slow = factor(&value("--slow")?)?,
            "--soak" => args.env.soak = factor(&value("--soak")?)?,
            "--list" => args.list = true,
            "--help" | "-h" => return Err(String::new()),
            a if a.starts_with('-') => return Err(format!("unknown option {a}")),
            a => args.filter.push(a.into()),
        }
    }
    Ok(args)
}

fn factor(s: &str) -> Result<u32, String> {
    u32::try_from(number(s)?.clamp(1, 1000)).map_err(|e| e.to_string())
}

fn number(s: &str) -> Result<u64, String> {
    let r = match s.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => s.parse(),
    };
    r.map_err(|e| format!("{s}: {e}"))
}

/// Runs the tests of `subject` as the command line asks: the `main` of each binary.
///
/// Exit status: 0 if all passed, 1 if one failed, 4 if all were skipped (kselftest's numbers), 2 for
/// a wrong command line.
#[must_use]
pub fn main(subject: &str, tests: &[Test]) -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(e) => {
            if e.is_empty() {
                print!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            eprint!("{e}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if args.list {
        for t in tests {
            println!("{}", t.name);
        }
        return ExitCode::SUCCESS;
    }
    let selected: Vec<&Test> = tests
        .iter()
        .filter(|t| args.filter.is_empty() || args.filter.iter().any(|f| t.name.contains(f)))
        .collect();
    crate::host::set_slow(args.env.slow);
    println!("TAP version 13");
    if selected.is_empty() {
        println!("1..0 # SKIP no test of that name");
        return ExitCode::from(4);
    }
    println!("1..{}", selected.len());
    println!("# {subject} on {}", args.env.device);
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (i, t) in selected.iter().enumerate() {
        let n = i + 1;
        let name = format!("{subject}.{}", t.name);
        match run_one(t, &args.env) {
            Ok(()) => {
                passed += 1;
                println!("ok {n} {name}");
            }
            Err(Verdict::Skip(why)) => {
                skipped += 1;
                println!("ok {n} {name} # SKIP {why}");
            }
            Err(Verdict::Fail(why)) => {
                failed += 1;
                for line in why.lines() {
                    println!("# {name}: {line}");
                }
                println!("not ok {n} {name}");
            }
        }
    }
    println!("# Totals: pass:{passed} fail:{failed} xfail:0 xpass:0 skip:{skipped} error:0");
    if failed > 0 {
        ExitCode::from(1)
    } else if passed == 0 {
        ExitCode::from(4)
    } else {
        ExitCode::SUCCESS
    }
}

/// The exit status of a child whose test passed: not 0, which any process that ends early has.
const PASSED: i32 = 42;

/// Marks the line on which a child hands over why it failed or was skipped.
const MARK: char = '\u{1}';

fn child(t: &Test, env: &Env, output: RawFd) -> ! {
    // SAFETY: Plain system calls in a process that has one thread.
    unsafe {
        libc::setpgid(0, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::dup2(output, 1);
        libc::dup2(output, 2);
        libc::close(output);
    }
    let outcome = std::panic::catch_unwind(|| (t.run)(env));
    let (status, why) = match outcome {
        Ok(Ok(())) => (PASSED, None),
        Ok(Err(Verdict::Fail(why))) => (1, Some(why)),
        Ok(Err(Verdict::Skip(why))) => (4, Some(why)),
        Err(_) => (1, Some("the test panicked".to_string())),
    };
    if let Some(why) = why {
        for line in why.lines() {
            println!("{MARK}{line}");
        }
    }
    let _ = std::io::stdout().flush();
    // Nothing of the parent's is to be torn down here.
    // SAFETY: `_exit` only ends the process.
    unsafe { libc::_exit(status) }
}

fn run_one(t: &Test, env: &Env) -> Outcome {
    let _ = std::io::stdout().flush();
    let mut pipe = [0; 2];
    // SAFETY: `pipe` has room for the two descriptors.
    if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(Error::last("pipe2").into());
    }
    // SAFETY: The process has one thread, so the child may do anything.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(Error::last("fork").into());
    }
    if pid == 0 {
        // SAFETY: The read end is the parent's.
        unsafe { libc::close(pipe[0]) };
        child(t, env, pipe[1]);
    }
    // SAFETY: The write end is the child's.
    unsafe { libc::close(pipe[1]) };
    let seconds = u64::from(t.seconds) * u64::from(env.slow) * u64::from(env.soak);
    let mut why = String::new();
    let ended = follow(pipe[0], pid, Duration::from_secs(seconds), &mut why);
    // SAFETY: Closes our own descriptor.
    unsafe { libc::close(pipe[0]) };
    // Whatever the test left behind in its process group ends with it.
    // SAFETY: The group is the child's, made by it; an empty group is an error that does not matter.
    unsafe { libc::kill(-pid, libc::SIGKILL) };
    let Some(status) = ended else {
        let killed = wait_until(
            pid,
            Instant::now() + Duration::from_millis(crate::host::patient(5000)),
        );
        let tail = if killed.is_some() {
            ""
        } else {
            "; SIGKILL does not end it"
        };
        return Err(Verdict::Fail(format!(
            "{why}no end after {seconds} s{tail}"
        )));
    };
    if libc::WIFSIGNALED(status) {
        return Err(Verdict::Fail(format!(
            "{why}killed by signal {}",
            libc::WTERMSIG(status)
        )));
    }
    match libc::WEXITSTATUS(status) {
        PASSED => Ok(()),
        4 => Err(Verdict::Skip(why.trim_end().replace('\n', " "))),
        1 => Err(Verdict::Fail(why)),
        other => Err(Verdict::Fail(format!("{why}exit status {other}"))),
    }
}

/// Copies the child's output until it ends; `None` if the deadline came first.
fn follow(fd: RawFd, pid: i32, limit: Duration, why: &mut String) -> Option<i32> {
    let deadline = Instant::now() + limit;
    let mut pending = Vec::new();
    let mut line_out = |line: &str| match line.strip_prefix(MARK) {
        Some(reason) => {
            why.push_str(reason);
            why.push('\n');
        }
        None => println!("# {line}"),
    };
    let status = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break None;
        }
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // The child's descendants may hold the pipe open after it ended: look for both.
        let wait = i32::try_from(left.as_millis().min(500)).unwrap_or(500);
        // SAFETY: One pollfd, which lives through the call.
        let ready = unsafe { libc::poll(&mut poll, 1, wait) };
        if ready > 0 {
            let mut buffer = [0u8; 4096];
            // SAFETY: `buffer` has the length that is passed.
            let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
            if n > 0 {
                pending.extend_from_slice(&buffer[..n.unsigned_abs()]);
                while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    line_out(String::from_utf8_lossy(&line[..end]).as_ref());
                }
                continue;
            }
            // End of file: the child has closed its output, so it is about to end.
            break wait_until(pid, deadline);
        }
        if let Some(status) = wait_until(pid, Instant::now()) {
            break Some(status);
        }
    };
    if !pending.is_empty() {
        line_out(String::from_utf8_lossy(&pending).as_ref());
    }
    status
}

/// Waits for the child until `deadline`; its wait status if it ended.
#[must_use]
pub fn wait_until(pid: i32, deadline: Instant) -> Option<i32> {
    loop {
        let mut status = 0;
        // SAFETY: `status` lives through the call.
        let r = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
        if r == pid {
            return Some(status);
        }
        if r < 0 || Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
