// SPDX-License-Identifier: GPL-2.0

//! Guest paging: random programs of accesses, changes of tables, invalidations and control registers, whose
//! every observation a model foretells. See `selftests::paging`.
//!
//! `--seed` is the seed of the first program of each test; programs count up from it, and a failure tells
//! which it was. `--soak` makes more programs.

mod host;

use host::{backing, dirty_log, FORMATS};
use selftests::paging::exec::Rig;
use selftests::paging::generate::generate;
use selftests::paging::op::Format;
use selftests::paging::shrink::judge;
use selftests::{ensure, ensure_eq, skip, tests, Env, Outcome};
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

/// The same programs on both devices, with what both have: whatever is written down is the same.
fn across(env: &Env) -> Outcome {
    let here = Rig::of(env)?;
    let other = if env.device == "/dev/kvm" {
        "/dev/rkvm"
    } else {
        "/dev/kvm"
    };
    let Ok(there) = Rig::new(other) else {
        skip!("there is no other device");
    };
    let features = here.features().common(there.features());
    let avoid = here.avoid().either(there.avoid());
    let count = env.fewer(45 * u64::from(env.soak));
    for seed in env.seed..env.seed + count {
        let format = FORMATS[(seed % 3) as usize];
        let p = generate(seed ^ 0xac_0555, format, features, avoid, 60);
        judge(&here, &p)?;
        judge(&there, &p)?;
        let (a, b) = (here.run(&p)?, there.run(&p)?);
        for (i, (a, b)) in a.records.iter().zip(&b.records).enumerate() {
            ensure_eq!(a, b, "operation {i}, {}, of seed {}", p.ops[i], p.seed);
        }
        ensure!(a.pool == b.pool, "the memory after seed {}", p.seed);
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "paging",
        tests![long => 60, pae => 60, bits32 => 60, backing => 60, dirty_log => 60, across => 60],
    )
}
