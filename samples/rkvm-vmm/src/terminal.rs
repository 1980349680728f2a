// SPDX-License-Identifier: GPL-2.0

//! The terminal in raw mode: every key goes to the guest, and the terminal is given back as it was
//! on every way out that a process can take part in (return, panic, `exit`, signals; not SIGKILL).

use std::mem::MaybeUninit;
use std::sync::Mutex;

/// The terminal's settings before [`RawMode::enter`], while they are to be restored.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Tells whether standard input is a terminal.
pub fn is_terminal() -> bool {
    // SAFETY: isatty takes any number.
    unsafe { libc::isatty(libc::STDIN_FILENO) == 1 }
}

/// Standard input in raw mode, for as long as this lives.
pub struct RawMode(());

impl RawMode {
    /// Makes standard input raw if it is a terminal.
    pub fn enter() -> Self {
        if is_terminal() {
            let mut termios = MaybeUninit::uninit();
            // SAFETY: `termios` has room for what tcgetattr writes.
            if unsafe { libc::tcgetattr(libc::STDIN_FILENO, termios.as_mut_ptr()) } == 0 {
                // SAFETY: tcgetattr succeeded, so it has written the whole structure.
                let saved = unsafe { termios.assume_init() };
                let mut raw = saved;
                raw.c_iflag &= !(libc::BRKINT
                    | libc::ICRNL
                    | libc::INLCR
                    | libc::IGNCR
                    | libc::ISTRIP
                    | libc::IXON);
                // Output processing stays on: our own messages are lines as everybody's.
                raw.c_lflag &= !(libc::ECHO | libc::ICANON | libc::ISIG | libc::IEXTEN);
                raw.c_cc[libc::VMIN] = 1;
                raw.c_cc[libc::VTIME] = 0;
                *lock() = Some(saved);
                set(&raw);
            }
        }
        RawMode(())
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back; does nothing the second time.
pub fn restore() {
    if let Some(saved) = lock().take() {
        set(&saved);
    }
}

/// Gives the terminal back before a panic's message is printed (a release build then aborts).
pub fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        print(info);
    }));
}

fn lock() -> std::sync::MutexGuard<'static, Option<libc::termios>> {
    SAVED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn set(termios: &libc::termios) {
    // SAFETY: `termios` is a complete structure that tcgetattr once filled.
    unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, termios) };
}
