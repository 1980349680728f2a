// SPDX-License-Identifier: GPL-2.0

//! One test of each outcome, for the harness's own test (`tests/harness.rs`). No device is needed.

use selftests::{ensure, ensure_eq, skip, tests, Env, Outcome};
use std::process::ExitCode;

fn passes(_: &Env) -> Outcome {
    Ok(())
}

fn speaks(_: &Env) -> Outcome {
    println!("first line");
    eprintln!("second line");
    print!("no newline");
    Ok(())
}

fn fails(_: &Env) -> Outcome {
    ensure_eq!(2 + 2, 5, "sum");
    Ok(())
}

fn skips(_: &Env) -> Outcome {
    skip!("nothing to test");
}

fn panics(_: &Env) -> Outcome {
    let list: Vec<u32> = Vec::new();
    ensure!(list[0] == 1, "not reached");
    Ok(())
}

fn hangs(_: &Env) -> Outcome {
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

fn crashes(_: &Env) -> Outcome {
    // SAFETY: Ends the process by a signal.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    Ok(())
}

/// A test that ends its process did not say that it passed.
fn leaves_early(_: &Env) -> Outcome {
    std::process::exit(0);
}

/// A child of the test that lives on, with the test's output open, is ended and holds up no one.
fn leaves_a_child(_: &Env) -> Outcome {
    // SAFETY: The child only sleeps.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    }
    println!("child {pid}");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "outcomes",
        tests![
            passes,
            speaks,
            fails,
            skips,
            panics,
            hangs => 1,
            crashes,
            leaves_early,
            leaves_a_child,
        ],
    )
}
