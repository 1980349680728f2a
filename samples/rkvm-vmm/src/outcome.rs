// SPDX-License-Identifier: GPL-2.0

//! How a guest ended, what is said about it, and which exit status tells it to the caller.

use std::fmt;

/// Greatest status that a guest can choose through the debug-exit port; above it are our own.
pub const STATUS_GUEST_MAX: u8 = 191;
/// Nothing was run: bad arguments, no device, no kernel, not enough memory.
pub const STATUS_SETUP: u8 = 192;
/// The vCPU shut down: a triple fault.
pub const STATUS_TRIPLE_FAULT: u8 = 193;
/// `KVM_EXIT_INTERNAL_ERROR`.
pub const STATUS_INTERNAL_ERROR: u8 = 194;
/// `KVM_EXIT_FAIL_ENTRY`: the processor refused to enter the guest.
pub const STATUS_FAIL_ENTRY: u8 = 195;
/// An exit reason that this program does not know or did not ask for.
pub const STATUS_UNKNOWN_EXIT: u8 = 196;
/// An ioctl on the vCPU failed while the guest ran, or its answer contradicts itself.
pub const STATUS_IOCTL: u8 = 197;
/// `--timeout` ran out.
pub const STATUS_TIMEOUT: u8 = 198;
/// The person at the terminal ended it.
pub const STATUS_QUIT: u8 = 199;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest asked for a reset through the port or device named.
    Reset(&'static str),
    /// The guest switched its machine off by the registers named.
    PowerOff(&'static str),
    /// The guest executed HLT with interrupts disabled: nothing can wake it.
    Halted,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u8),
    /// Triple fault; `true` if the caller said that this is how the guest resets.
    TripleFault {
        /// `--triple-fault reset` was given.
        expected: bool,
    },
    /// `KVM_EXIT_INTERNAL_ERROR` with its sub-error and data.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Sub-error specific words.
        data: Vec<u64>,
    },
    /// `KVM_EXIT_FAIL_ENTRY`: hardware's reason and the host CPU it happened on.
    FailEntry {
        /// Hardware's reason, as the backend defines it.
        reason: u64,
        /// Host CPU.
        cpu: u32,
    },
    /// `KVM_EXIT_UNKNOWN` with hardware's exit reason.
    UnknownExit(u64),
    /// A defined exit reason that cannot happen to this program.
    UnexpectedExit(String),
    /// An ioctl failed, or KVM contradicted itself.
    Ioctl(String),
    /// `--timeout` ran out after so many seconds.
    Timeout(u64),
    /// A signal asked us to end.
    Signal(i32),
    /// Ctrl-A x on the terminal.
    Quit,
}

impl Outcome {
    /// Returns the process' exit status.
    pub fn status(&self) -> u8 {
        match self {
            Outcome::Reset(_) | Outcome::PowerOff(_) | Outcome::Halted => 0,
            Outcome::DebugExit(value) => (*value).min(STATUS_GUEST_MAX),
            Outcome::TripleFault { expected: true } => 0,
            Outcome::TripleFault { expected: false } => STATUS_TRIPLE_FAULT,
            Outcome::InternalError { .. } => STATUS_INTERNAL_ERROR,
            Outcome::FailEntry { .. } => STATUS_FAIL_ENTRY,
            Outcome::UnknownExit(_) | Outcome::UnexpectedExit(_) => STATUS_UNKNOWN_EXIT,
            Outcome::Ioctl(_) => STATUS_IOCTL,
            Outcome::Timeout(_) => STATUS_TIMEOUT,
            Outcome::Quit => STATUS_QUIT,
            // Only reached if the signal did not kill us; the shell's convention then.
            Outcome::Signal(signal) => 128u8.wrapping_add(*signal as u8),
        }
    }

    /// Tells whether the registers at the end help to understand it.
    pub fn wants_dump(&self) -> bool {
        matches!(self.status(), STATUS_TRIPLE_FAULT..=STATUS_TIMEOUT)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Reset(how) => write!(f, "the guest reset its machine ({how})"),
            Outcome::PowerOff(how) => write!(f, "the guest switched its machine off ({how})"),
            Outcome::Halted => write!(f, "the guest halted with interrupts disabled"),
            Outcome::DebugExit(value) => {
                write!(f, "the guest wrote {value} to the debug-exit port")?;
                if *value > STATUS_GUEST_MAX {
                    write!(f, "; statuses above {STATUS_GUEST_MAX} are the VMM's own")?;
                }
                Ok(())
            }
            Outcome::TripleFault { expected: true } => {
                write!(f, "the guest reset its machine (triple fault)")
            }
            Outcome::TripleFault { expected: false } => write!(
                f,
                "KVM_EXIT_SHUTDOWN: the guest triple-faulted. Either it crashed with no usable IDT \
                 (look at RIP and CR2 above), or it resets that way on purpose (then say \
                 --triple-fault reset)"
            ),
            Outcome::InternalError { suberror, data } => {
                write!(
                    f,
                    "KVM_EXIT_INTERNAL_ERROR, suberror {suberror} ({}), data",
                    suberror_name(*suberror)
                )?;
                if data.is_empty() {
                    write!(f, " none")?;
                }
                for word in data {
                    write!(f, " {word:#x}")?;
                }
                write!(
                    f,
                    ". KVM could not go on: the fault is in the kernel module or in what the guest \
                     asked of it, see the kernel's log and the code bytes above"
                )
            }
            Outcome::FailEntry { reason, cpu } => write!(
                f,
                "KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x} on host CPU {cpu}. The processor \
                 refused the guest's state: compare the registers above with the checks on guest \
                 state (SDM volume 3, chapter VM Entries)"
            ),
            Outcome::UnknownExit(reason) => write!(
                f,
                "KVM_EXIT_UNKNOWN, hardware exit reason {reason:#x}: the kernel module does not \
                 handle this exit"
            ),
            Outcome::UnexpectedExit(what) => write!(
                f,
                "unexpected exit {what}: this VMM never enables what could cause it, so the kernel \
                 module reported it wrongly or speaks a newer API"
            ),
            Outcome::Ioctl(what) => f.write_str(what),
            Outcome::Timeout(seconds) => write!(
                f,
                "the guest did not end within {seconds} s (--timeout); the registers above say \
                 where it was"
            ),
            Outcome::Signal(signal) => write!(f, "ended by signal {signal}"),
            Outcome::Quit => write!(f, "ended from the terminal (Ctrl-A x)"),
        }
    }
}

/// Names `KVM_INTERNAL_ERROR_*`.
fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "emulation failure",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "unexpected simultaneous exceptions",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "exit during event delivery",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "unexpected hardware exit reason, first word of data"
        }
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_statuses_do_not_reach_into_ours() {
        assert_eq!(Outcome::DebugExit(0).status(), 0);
        assert_eq!(Outcome::DebugExit(7).status(), 7);
        assert_eq!(Outcome::DebugExit(255).status(), STATUS_GUEST_MAX);
        assert!(Outcome::DebugExit(255).to_string().contains("191"));
    }

    #[test]
    fn clean_ends_are_zero_and_failures_distinct() {
        assert_eq!(Outcome::Reset("x").status(), 0);
        assert_eq!(Outcome::PowerOff("x").status(), 0);
        assert_eq!(Outcome::Halted.status(), 0);
        assert_eq!(Outcome::TripleFault { expected: true }.status(), 0);
        let failures = [
            Outcome::TripleFault { expected: false },
            Outcome::InternalError {
                suberror: 1,
                data: vec![],
            },
            Outcome::FailEntry { reason: 0, cpu: 0 },
            Outcome::UnknownExit(9),
            Outcome::Ioctl(String::new()),
            Outcome::Timeout(1),
            Outcome::Quit,
        ];
        for (i, a) in failures.iter().enumerate() {
            assert!(a.status() > STATUS_SETUP);
            for b in &failures[..i] {
                assert_ne!(a.status(), b.status());
            }
        }
    }

    #[test]
    fn internal_error_shows_its_data() {
        let text = Outcome::InternalError {
            suberror: 4,
            data: vec![0x30, 2],
        }
        .to_string();
        assert!(
            text.contains("suberror 4") && text.contains("0x30 0x2"),
            "{text}"
        );
    }
}
