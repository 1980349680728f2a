// SPDX-License-Identifier: GPL-2.0

//! What a test says: nothing (it passed), a failure, or why it cannot run here.

use crate::sys::{errno_name, Error};

/// Why a test did not pass.
#[derive(Debug)]
pub enum Verdict {
    /// The device did something else than the API demands.
    Fail(String),
    /// The test needs something that is not here.
    Skip(String),
}

/// The result of a test.
pub type Outcome = Result<(), Verdict>;

impl From<Error> for Verdict {
    fn from(e: Error) -> Self {
        Verdict::Fail(format!("{e}"))
    }
}

/// Checks that `result` is the error `errno`, and nothing else.
///
/// # Errors
///
/// A failure that names `what`, what came and what was expected.
pub fn expect_errno<T: std::fmt::Debug>(
    result: Result<T, Error>,
    errno: i32,
    what: &str,
) -> Outcome {
    match result {
        Err(e) if e.errno == errno => Ok(()),
        Err(e) => Err(Verdict::Fail(format!(
            "{what}: got {}, expected {}",
            errno_name(e.errno),
            errno_name(errno)
        ))),
        Ok(v) => Err(Verdict::Fail(format!(
            "{what}: succeeded with {v:?}, expected {}",
            errno_name(errno)
        ))),
    }
}

/// Fails the test with a formatted message.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => {
        return Err($crate::Verdict::Fail(format!($($arg)*)))
    };
}

/// Skips the test with a formatted reason.
#[macro_export]
macro_rules! skip {
    ($($arg:tt)*) => {
        return Err($crate::Verdict::Skip(format!($($arg)*)))
    };
}

/// Fails the test unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => {
        if !$cond {
            return Err($crate::Verdict::Fail(format!(
                "{} ({}:{})", format_args!($($arg)*), file!(), line!())));
        }
    };
}

/// Fails the test unless both values are equal; shows both, integers in hexadecimal.
#[macro_export]
macro_rules! ensure_eq {
    ($got:expr, $want:expr, $($arg:tt)*) => {{
        let (got, want) = (&$got, &$want);
        if got != want {
            return Err($crate::Verdict::Fail(format!(
                "{}: got {:#x?}, expected {:#x?} ({}:{})",
                format_args!($($arg)*), got, want, file!(), line!())));
        }
    }};
}
