// SPDX-License-Identifier: GPL-2.0

//! The event thread: waits for time, keys and signals, tells the board, and makes the vCPUs look.

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use crate::board::Shared;
use crate::board::VcpuState;
use crate::outcome;
use crate::outcome::Outcome;
use crate::signals::Incoming;
use crate::signals::Request;
use crate::terminal;
use crate::time;
use crate::time::Nanos;
use crate::time::SECOND;

/// How long KVM_RUN may take to notice a signal before we give up on it.
const KICK_GRACE: Duration = Duration::from_secs(10);

/// Ctrl-A: the next key is for us.
const ESCAPE: u8 = 0x01;

/// A timer on the monotonic clock, as a file to poll.
pub struct Timer(OwnedFd);

impl Timer {
    /// Makes a timer that is not set.
    ///
    /// # Errors
    /// The kernel has no timerfd.
    pub fn new() -> anyhow::Result<Self> {
        // SAFETY: takes numbers only.
        let fd = unsafe {
            libc::timerfd_create(
                libc::CLOCK_MONOTONIC,
                libc::TFD_CLOEXEC | libc::TFD_NONBLOCK,
            )
        };
        owned(fd).context("timerfd_create").map(Self)
    }

    /// Sets the timer to go off once at `at`, at once if that has passed.
    pub fn set(&self, at: Nanos) {
        // All zeros would stop it.
        let at = at.max(1);
        let spec = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: (at / SECOND) as libc::time_t,
                tv_nsec: (at % SECOND) as libc::c_long,
            },
        };
        // SAFETY: `spec` is valid; the old setting is not asked for.
        unsafe {
            libc::timerfd_settime(
                self.0.as_raw_fd(),
                libc::TFD_TIMER_ABSTIME,
                &spec,
                ptr::null_mut(),
            )
        };
    }
}

/// A bell, as a file to poll.
pub struct Ring(OwnedFd);

impl Ring {
    /// Makes a silent bell.
    ///
    /// # Errors
    /// The kernel has no eventfd.
    pub fn new() -> anyhow::Result<Self> {
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        owned(fd).context("eventfd").map(Self)
    }

    /// Returns another rope to the same bell.
    ///
    /// # Errors
    /// The process has too many files.
    pub fn try_clone(&self) -> anyhow::Result<Self> {
        self.0.try_clone().context("eventfd").map(Self)
    }

    /// Rings it.
    pub fn ring(&self) {
        let one = 1u64;
        // SAFETY: eight bytes are there to be read. It cannot fail before 2^64 - 2 rings.
        unsafe { libc::write(self.0.as_raw_fd(), ptr::from_ref(&one).cast(), 8) };
    }
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller just got the descriptor from the kernel and has given it to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Empties a timer's or bell's counter.
fn drain(fd: RawFd) {
    let mut count = 0u64;
    // SAFETY: eight bytes are there to be written; the descriptor does not block.
    unsafe { libc::read(fd, ptr::from_mut(&mut count).cast(), 8) };
}

/// What the keys ask of us, and what is left for the guest.
#[derive(Debug, Default)]
struct Keys {
    /// Keys that the guest has not taken yet.
    pending: Vec<u8>,
    /// The last key was the escape.
    escaped: bool,
    quit: bool,
    dump: bool,
}

impl Keys {
    /// Takes `input`, in which Ctrl-A is special if it comes from a terminal.
    fn push(&mut self, input: &[u8], terminal: bool) {
        for &key in input {
            if !std::mem::take(&mut self.escaped) {
                if terminal && key == ESCAPE {
                    self.escaped = true;
                } else {
                    self.pending.push(key);
                }
                continue;
            }
            match key {
                b'x' | b'X' => self.quit = true,
                b'd' | b'D' => self.dump = true,
                b'a' | b'A' | ESCAPE => self.pending.push(ESCAPE),
                // Not ours: as typed.
                _ => self.pending.extend([ESCAPE, key]),
            }
        }
    }
}

/// The thread's state.
pub struct Events {
    shared: Arc<Shared>,
    signals: Incoming,
    timeout_seconds: u64,
    terminal: bool,
    /// Standard input has ended or failed.
    input_closed: bool,
    keys: Keys,
}

impl Events {
    /// Prepares the thread; `timeout_seconds` is what to say when the board's timeout has come.
    pub fn new(shared: Arc<Shared>, signals: Incoming, timeout_seconds: u64) -> Self {
        Self {
            shared,
            signals,
            timeout_seconds,
            terminal: terminal::is_terminal(),
            input_closed: false,
            keys: Keys::default(),
        }
    }

    /// Runs until all vCPUs have stopped.
    pub fn run(mut self) {
        self.shared.lock().arm(&self.shared.timer);
        loop {
            let ending = {
                let board = self.shared.lock();
                if board.stopped() {
                    return;
                }
                board.outcome.is_some()
            };
            let ready = self.wait(ending);
            if ending && !ready.any() {
                self.give_up();
            }
            if ready.timer {
                drain(self.shared.timer.0.as_raw_fd());
            }
            if ready.ring {
                drain(self.shared.ring.0.as_raw_fd());
            }
            if ready.input {
                self.read_input();
            }
            self.update(ready.timer);
        }
    }

    /// Waits for something to happen; when the guest has ended already, no longer than the grace.
    fn wait(&self, ending: bool) -> Ready {
        let want_input = !self.input_closed && self.keys.pending.is_empty();
        let entry = |fd: RawFd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // poll skips negative descriptors.
        let mut fds = [
            entry(self.shared.timer.0.as_raw_fd()),
            entry(self.shared.ring.0.as_raw_fd()),
            entry(self.signals.as_raw_fd()),
            entry(if want_input { libc::STDIN_FILENO } else { -1 }),
        ];
        if ending {
            // Only the vCPUs' stops are of interest now, and each rings.
            fds[0].fd = -1;
            fds[2].fd = -1;
            fds[3].fd = -1;
        }
        let limit = if ending {
            KICK_GRACE.as_millis() as libc::c_int
        } else {
            -1
        };
        // SAFETY: the array is valid for its length.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit) };
        let [timer, ring, signal, input] = fds.map(|fd| fd.revents != 0);
        Ready {
            timer,
            ring,
            signal,
            input,
        }
    }

    fn read_input(&mut self) {
        let mut buffer = [0u8; 256];
        // SAFETY: the buffer is valid for its length.
        let got =
            unsafe { libc::read(libc::STDIN_FILENO, buffer.as_mut_ptr().cast(), buffer.len()) };
        match usize::try_from(got) {
            Ok(0) => self.input_closed = true,
            Ok(got) => self.keys.push(&buffer[..got], self.terminal),
            Err(_) => {
                let err = io::Error::last_os_error();
                // Anything but "try again" would come again at once.
                self.input_closed = !matches!(
                    err.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                );
            }
        }
    }

    /// Brings the board up to date and makes those vCPUs look at it that must.
    fn update(&mut self, timer_fired: bool) {
        let mut board = self.shared.lock();
        let now = time::now();
        if timer_fired {
            board.timer_fired(now);
        }
        board.advance(now);
        if board.timed_out(now) {
            board.finish(Outcome::Timeout(self.timeout_seconds));
        }
        while let Some(request) = self.signals.next() {
            match request {
                Request::End(signal) => board.finish(Outcome::Signal(signal)),
                Request::Dump => self.keys.dump = true,
            }
        }
        if self.keys.quit {
            board.finish(Outcome::Quit);
        }
        if std::mem::take(&mut self.keys.dump) {
            for vcpu in &mut board.vcpus {
                vcpu.dump_requested = true;
            }
        }
        if !self.keys.pending.is_empty() {
            let taken = board.receive(&self.keys.pending, now);
            self.keys.pending.drain(..taken);
        }
        board.input_blocked = !self.keys.pending.is_empty();
        board.arm(&self.shared.timer);
        for (id, vcpu) in board.vcpus.iter().enumerate() {
            if !board.wants_attention(id) {
                continue;
            }
            match (vcpu.state, &vcpu.kicker) {
                (VcpuState::Halted, _) => self.shared.wake.notify_one(),
                // SAFETY: a thread takes its kicker off the board, which is locked, before it ends.
                (_, Some(kicker)) => unsafe { kicker.kick() },
                // It looks by itself before it runs, or will not run.
                (_, None) => {}
            }
        }
    }

    /// A vCPU's thread does not come out of the kernel: say so, and end without it.
    fn give_up(&self) -> ! {
        terminal::restore();
        eprintln!(
            "rkvm-vmm: the guest is to end ({}), but KVM_RUN has not returned {} s after a signal: \
             the kernel module does not notice signals, or the host's CPU is stuck in the guest",
            self.shared
                .lock()
                .outcome
                .as_ref()
                .map_or_else(String::new, Outcome::to_string),
            KICK_GRACE.as_secs()
        );
        std::process::exit(outcome::STATUS_IOCTL.into());
    }
}

/// What has happened.
struct Ready {
    timer: bool,
    ring: bool,
    signal: bool,
    input: bool,
}

impl Ready {
    fn any(&self) -> bool {
        self.timer || self.ring || self.signal || self.input
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(input: &[u8], terminal: bool) -> Keys {
        let mut keys = Keys::default();
        // One by one, as they are typed.
        for key in input {
            keys.push(&[*key], terminal);
        }
        keys
    }

    #[test]
    fn keys_go_to_the_guest() {
        assert_eq!(keys(b"ls\r\x03", true).pending, b"ls\r\x03");
    }

    #[test]
    fn escape_is_ours_on_a_terminal() {
        let typed = keys(b"a\x01d\x01a\x01z", true);
        assert_eq!(typed.pending, b"a\x01\x01z");
        assert!(typed.dump && !typed.quit);
        assert!(keys(b"\x01x", true).quit);
    }

    #[test]
    fn a_pipe_has_no_escapes() {
        let piped = keys(b"\x01x", false);
        assert_eq!(piped.pending, b"\x01x");
        assert!(!piped.quit);
    }

    #[test]
    fn timer_goes_off() {
        let timer = Timer::new().unwrap();
        timer.set(1);
        let mut fd = libc::pollfd {
            fd: timer.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry.
        assert_eq!(unsafe { libc::poll(&mut fd, 1, 5000) }, 1);
    }
}
