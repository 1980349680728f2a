// SPDX-License-Identifier: GPL-2.0

//! The harness judged: each outcome of a test is reported as what it is. In the library, as cargo builds all
//! programs of a package for tests that are beside it.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Runs the example `outcomes` that lies beside this test's directory.
fn outcomes(args: &[&str]) -> (String, i32) {
    let mut path: PathBuf = std::env::current_exe().expect("path of this test");
    path.pop();
    path.pop();
    path.push("examples/outcomes");
    let out: Output = Command::new(&path)
        .args(args)
        .output()
        .expect("the example runs");
    let text = String::from_utf8(out.stdout).expect("UTF-8");
    (text, out.status.code().expect("exit status"))
}

#[test]
fn all_outcomes() {
    let start = Instant::now();
    let (text, status) = outcomes(&[]);
    assert!(text.starts_with("TAP version 13\n1..9\n"), "{text}");
    for line in [
        "ok 1 outcomes.passes",
        "ok 2 outcomes.speaks",
        "not ok 3 outcomes.fails",
        "ok 4 outcomes.skips # SKIP nothing to test",
        "not ok 5 outcomes.panics",
        "not ok 6 outcomes.hangs",
        "not ok 7 outcomes.crashes",
        "not ok 8 outcomes.leaves_early",
        "ok 9 outcomes.leaves_a_child",
        "# Totals: pass:3 fail:5 xfail:0 xpass:0 skip:1 error:0",
        "# first line",
        "# second line",
        "# no newline",
        "# outcomes.hangs: no end after 1 s",
        "# outcomes.crashes: killed by signal 9",
        "# outcomes.leaves_early: exit status 0",
        "# outcomes.panics: the test panicked",
    ] {
        assert!(
            text.lines().any(|l| l == line),
            "no line {line:?} in:\n{text}"
        );
    }
    assert!(
        text.contains("# outcomes.fails: sum: got 4, expected 5"),
        "{text}"
    );
    assert_eq!(status, 1);
    assert!(
        start.elapsed() < Duration::from_secs(15),
        "took {:?}",
        start.elapsed()
    );
}

#[test]
fn child_is_ended() {
    let (text, status) = outcomes(&["leaves_a_child"]);
    assert_eq!(status, 0, "{text}");
    let pid: i32 = text
        .lines()
        .find_map(|l| l.strip_prefix("# child "))
        .expect("the child's number")
        .parse()
        .expect("a number");
    for _ in 0..100 {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if state.is_empty() || state.contains(") Z ") {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the child of a test lives on");
}

#[test]
fn exit_status() {
    assert_eq!(outcomes(&["passes"]).1, 0);
    assert_eq!(outcomes(&["fails"]).1, 1);
    assert_eq!(outcomes(&["skips"]).1, 4);
    assert_eq!(outcomes(&["no_such_test"]).1, 4);
    assert_eq!(outcomes(&["--no-such-option"]).1, 2);
    assert_eq!(outcomes(&["--device"]).1, 2);
}

#[test]
fn filter_and_list() {
    let (text, _) = outcomes(&["passes", "speaks"]);
    assert!(text.contains("1..2\n"), "{text}");
    let (text, status) = outcomes(&["--list"]);
    assert_eq!(text.lines().count(), 9, "{text}");
    assert_eq!(status, 0);
}

#[test]
fn slow_moves_the_deadline() {
    let start = Instant::now();
    let (text, _) = outcomes(&["--slow", "3", "hangs"]);
    assert!(text.contains("no end after 3 s"), "{text}");
    assert!(
        start.elapsed() >= Duration::from_secs(3),
        "ended after {:?}",
        start.elapsed()
    );
}
