// SPDX-License-Identifier: GPL-2.0

//! Signals: the one that gets a vCPU out of KVM_RUN, and those from outside.
//!
//! A kick must not be lost when it comes just before KVM_RUN: the handler, which runs in the vCPU's
//! own thread, sets `kvm_run.immediate_exit`, and KVM_RUN then returns EINTR at once (KVM API, 5.
//! "The kvm_run structure").

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::ptr;

use anyhow::Context;

/// Signals that end the VMM in order.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, for the handler. It is there from the
    /// thread's start and needs no destructor, so that a signal handler may use it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable::new` demands that the pointer stay valid, and the handler runs only in
        // the thread that the signal is sent to, which is the one that uses the structure.
        unsafe { flag.write_volatile(1) };
    }
}

/// This thread, while it can be got out of KVM_RUN; kicks do nothing after.
pub struct Kickable {
    /// It is about the thread that made it.
    not_send: PhantomData<*mut u8>,
}

impl Kickable {
    /// Prepares the calling thread to be kicked.
    ///
    /// # Errors
    /// The handler cannot be installed.
    ///
    /// # Safety
    /// `immediate_exit` must be valid until this is dropped, and only this thread may run the vCPU.
    pub unsafe fn new(immediate_exit: *mut u8) -> anyhow::Result<Self> {
        IMMEDIATE_EXIT.set(immediate_exit);
        // SAFETY: an all-zero sigaction is valid: no flags, in particular no SA_RESTART.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        // SAFETY: `action` is complete, and the handler does only what is async-signal-safe.
        let rc = unsafe { libc::sigaction(kick_signal(), &action, ptr::null_mut()) };
        if rc != 0 {
            return Err(io::Error::last_os_error())
                .context("cannot install the kick signal's handler");
        }
        Ok(Self {
            not_send: PhantomData,
        })
    }

    /// Returns what others kick this thread by.
    pub fn kicker(&self) -> Kicker {
        Kicker {
            // SAFETY: has no preconditions.
            thread: unsafe { libc::pthread_self() },
        }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Gets a vCPU's thread out of KVM_RUN.
#[derive(Clone, Copy)]
pub struct Kicker {
    thread: libc::pthread_t,
}

impl Kicker {
    /// Kicks.
    ///
    /// # Safety
    /// The thread must not have ended.
    pub unsafe fn kick(&self) {
        // SAFETY: the caller knows that the thread is there.
        unsafe { libc::pthread_kill(self.thread, kick_signal()) };
    }
}

/// Signals from outside, as a file to poll.
pub struct Incoming {
    fd: OwnedFd,
}

/// What a signal from outside asks for.
pub enum Request {
    /// End, and say so by this signal.
    End(i32),
    /// Show registers and statistics.
    Dump,
}

impl Incoming {
    /// Blocks the signals in this thread, and so in those it will start, and opens the file.
    ///
    /// # Errors
    /// The kernel has no signalfd.
    pub fn new() -> anyhow::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set, the others work on it; all numbers are signals.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING.into_iter().chain([libc::SIGUSR1]) {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("signalfd");
        }
        Ok(Self {
            // SAFETY: signalfd returned this descriptor, and nobody else has it.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    /// Returns the next request, if there is one.
    pub fn next(&self) -> Option<Request> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for `size` bytes.
        let got = unsafe { libc::read(self.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if got != size as isize {
            return None;
        }
        // SAFETY: the kernel has written the whole structure.
        let signal = unsafe { info.assume_init() }.ssi_signo as i32;
        Some(if signal == libc::SIGUSR1 {
            Request::Dump
        } else {
            Request::End(signal)
        })
    }
}

impl AsRawFd for Incoming {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// Ends this process by `signal`, as if it had never been caught.
pub fn die_by(signal: i32) {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set before the others use it; SIG_DFL is a valid action.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut());
        libc::raise(signal);
    }
}
