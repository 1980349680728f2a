// SPDX-License-Identifier: GPL-2.0

//! Programs that come out wrong, made as short as they can be.

use super::exec::{Ran, Rig};
use super::generate::{simulate, Outcome};
use super::op::Program;
use super::report::{compare, explain, Difference};
use crate::{fail, Outcome as Result_, Verdict};

/// How often a program is run for this.
const BUDGET: usize = 400;

/// A program that came out wrong.
#[derive(Debug, Clone)]
struct Failure {
    program: Program,
    want: Outcome,
    got: Ran,
    difference: Difference,
}

/// Runs a program.
pub type Run<'a> = dyn FnMut(&Program) -> Result<Ran, Verdict> + 'a;

fn failure(run: &mut Run<'_>, program: &Program) -> Result<Option<Failure>, Verdict> {
    let Ok(want) = simulate(program) else {
        return Ok(None);
    };
    let got = run(program)?;
    Ok(compare(&want, &got).map(|difference| Failure {
        program: program.clone(),
        want,
        got,
        difference,
    }))
}

/// Leaves out operations for as long as the rest comes out wrong too.
fn shrink(run: &mut Run<'_>, mut f: Failure) -> Result<Failure, Verdict> {
    let mut budget = BUDGET;
    let mut attempt = |f: &mut Failure, program: Program| -> Result<bool, Verdict> {
        if budget == 0 {
            return Ok(false);
        }
        budget -= 1;
        match failure(run, &program)? {
            Some(shorter) => {
                if shorter.got.exit.is_none() {
                    // It took seconds.
                    budget = budget.saturating_sub(40);
                }
                *f = shorter;
                Ok(true)
            }
            None => Ok(false),
        }
    };
    // The shortest beginning first.
    let (mut good, mut bad) = (0, f.program.ops.len());
    while good + 1 < bad {
        let middle = good.midpoint(bad);
        let mut p = f.program.clone();
        p.ops.truncate(middle);
        if attempt(&mut f, p)? {
            bad = middle;
        } else {
            good = middle;
        }
    }
    let mut chunk = f.program.ops.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        while at < f.program.ops.len() {
            let mut p = f.program.clone();
            let end = (at + chunk).min(p.ops.len());
            p.ops.drain(at..end);
            if !attempt(&mut f, p)? {
                at += chunk;
            }
        }
        chunk /= 2;
    }
    Ok(f)
}

/// Runs a program; if it comes out wrong, the failure tells the shortest one that does.
///
/// # Errors
///
/// The failure, or what the kernel answered.
pub fn judge(rig: &Rig, program: &Program) -> Result_ {
    judge_with(&rig.path, program, &mut |p| rig.run(p))
}

/// As [`judge`], with another way to run programs.
///
/// # Errors
///
/// As [`judge`].
pub fn judge_with(who: &str, program: &Program, run: &mut Run<'_>) -> Result_ {
    let Some(f) = failure(run, program)? else {
        return Ok(());
    };
    let first = f.difference.clone();
    let n = f.program.ops.len();
    let f = shrink(run, f)?;
    let again = if failure(run, &f.program)?.is_some() {
        "it fails each time"
    } else {
        "it does not fail each time"
    };
    fail!(
        "{who}: the program of seed {} with {n} operations comes out wrong ({first:x?}); {again}. Shortened:\n{}",
        program.seed,
        explain(&f.program, &f.want, &f.got, &f.difference)
    )
}
