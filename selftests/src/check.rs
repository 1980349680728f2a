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

/// The lines in which the debug representations of two values differ: for structures that are too
/// large to read whole. Empty if they are equal.
#[must_use]
pub fn difference<T: std::fmt::Debug>(got: &T, want: &T) -> String {
    let (got, want) = (format!("{got:#x?}"), format!("{want:#x?}"));
    let mut path: Vec<&str> = Vec::new();
    let mut out = String::new();
    for (g, w) in got.lines().zip(want.lines()) {
        let field = w.trim();
        if field.ends_with(['{', '[', '(']) {
            path.push(field.split([':', ' ']).next().unwrap_or(""));
        } else if field.starts_with(['}', ']', ')']) {
            path.pop();
        }
        if g != w {
            out += &format!("{} {}, expected {field}; ", path.join("."), g.trim());
        }
    }
    out
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
                "{}: got {:x?}, expected {:x?} ({}:{})",
                format_args!($($arg)*), got, want, file!(), line!())));
        }
    }};
}
