// SPDX-License-Identifier: GPL-2.0

//! Guest paging: random programs of accesses, changes of tables, invalidations and control registers, whose
//! every observation a model foretells. See `selftests::paging`.
//!
//! `--seed` is the seed of the first program of each test; programs count up from it, and a failure tells
//! which it was. `--soak` makes more programs.

mod host;

use host::{backing, dirty_log};
use selftests::paging::exec::Rig;
use selftests::paging::generate::generate;
use selftests::paging::op::Format;
use selftests::paging::shrink::judge;
use selftests::{tests, Env, Outcome};
use std::process::ExitCode;

fn programs(env: &Env, format: Format, count: u64, len: usize) -> Outcome {
    let rig = Rig::of(env)?;
    println!("{:?}", rig.features());
    let count = env.fewer(count * u64::from(env.soak));
    for seed in env.seed..env.seed + count {
        let p = generate(seed, format, rig.features(), rig.avoid(), len);
        judge(&rig, &p)?;
    }
    Ok(())
}

fn long(env: &Env) -> Outcome {
    programs(env, Format::Long, 100, 60)
}

fn pae(env: &Env) -> Outcome {
    programs(env, Format::Pae, 70, 60)
}

fn bits32(env: &Env) -> Outcome {
    programs(env, Format::Bits32, 50, 60)
}

fn main() -> ExitCode {
    selftests::tap::main(
        "paging",
        tests![long => 60, pae => 60, bits32 => 60, backing => 60, dirty_log => 60],
    )
}
