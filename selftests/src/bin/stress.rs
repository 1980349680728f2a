// SPDX-License-Identifier: GPL-2.0

//! Guests verify their memory round after round, while the host does to it all that a host may: with
//! one, two and four vCPUs, each thing alone, and all at once.
//!
//! Needs the module `zram` for swap and disks, and two nodes of memory (`numa=fake=2`) for some.

use selftests::backing::{Kind, Pool};
use selftests::host::{meminfo, patient, sleep_ms, Rng};
use selftests::mem::{HUGE, PAGE};
use selftests::ops::{self, Op};
use selftests::pressure::{merged_pages, nodes, set, vmstat, Group, Knob, Ksm, Swap};
use selftests::trial::{self, memory_for, Trial};
use selftests::verifier::{kind, Plan};
use selftests::{ensure, ensure_eq, fail, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Barrier;

const SIZE: usize = 2 * HUGE;
const MIB: u64 = 1 << 20;

/// The numbers of vCPUs to try: on slow kernels only one of them.
fn vcpus(env: &Env) -> &'static [usize] {
    if env.slow < 5 {
        &[1, 2, 4]
    } else {
        &[2]
    }
}

/// Repeats `op` beside guests with each number of vCPUs, `ms` milliseconds each.
fn each(env: &Env, kind: Kind, plan: Plan, ms: u64, op: Op) -> Outcome {
    for &vcpus in vcpus(env) {
        alone(env, kind, Plan { vcpus, ..plan }, ms, op)?;
    }
    Ok(())
}

/// Repeats `op` beside a guest for `ms` milliseconds.
fn alone(env: &Env, kind: Kind, plan: Plan, ms: u64, op: Op) -> Outcome {
    let backing = memory_for(kind, SIZE, &plan)?;
    let mut rng = Rng::new(env.seed + plan.vcpus as u64);
    trial::run(env, plan, &backing, |t| {
        t.during(ms, 4, |_| op(t, &mut rng))
    })
}

/// Runs `run`; the kernel has to count some of the events `key` meanwhile.
fn counted(key: &str, run: impl FnOnce() -> Outcome) -> Outcome {
    let before = vmstat(key);
    run()?;
    let n = vmstat(key) - before;
    println!("{key}: {n}");
    ensure!(n > 0, "no {key}: the kernel did not do it");
    Ok(())
}

fn undisturbed(env: &Env) -> Outcome {
    each(env, Kind::Small, Plan::default(), 150, |_, _| Ok(()))
}

fn swap_out(env: &Env) -> Outcome {
    let swap = Swap::new(64 * MIB)?;
    counted("pswpin", || {
        each(env, Kind::Small, Plan::default(), 250, ops::page_out)
    })?;
    drop(swap);
    Ok(())
}

/// All that is swapped out comes back while the guest runs.
fn swap_off(env: &Env) -> Outcome {
    let swap = Swap::new(64 * MIB)?;
    let plan = Plan {
        vcpus: 2,
        ..Plan::default()
    };
    let backing = memory_for(Kind::Small, SIZE, &plan)?;
    trial::run(env, plan, &backing, |t| {
        t.during(200, 4, |_| {
            t.memory().advise(0, SIZE, libc::MADV_PAGEOUT)?;
            swap.off()?;
            Ok(swap.on()?)
        })
    })
}

fn cold(env: &Env) -> Outcome {
    each(env, Kind::Small, Plan::default(), 120, ops::cold)
}

fn age(env: &Env) -> Outcome {
    each(env, Kind::Small, Plan::default(), 120, ops::age)
}

/// Pages that are rarely written, and of which there are few kinds.
const ALIKE: Plan = Plan {
    vcpus: 1,
    write_mask: 63,
    release_mask: 0,
    frame_mask: 1,
    word_mask: u64::MAX,
    stride: 8,
};

fn merge(env: &Env) -> Outcome {
    let ksm = Ksm::new()?;
    for &vcpus in vcpus(env) {
        let plan = Plan { vcpus, ..ALIKE };
        let backing = memory_for(Kind::Small, SIZE, &plan)?;
        let mut rng = Rng::new(env.seed);
        let (copied, mut most) = (vmstat("cow_ksm"), 0);
        trial::run(env, plan, &backing, |t| {
            t.memory().advise(0, SIZE, libc::MADV_MERGEABLE)?;
            let mut step = |i: u64| {
                if i % 64 == 63 {
                    ksm.break_all()?;
                }
                most = most.max(merged_pages());
                ops::mergeable(t, &mut rng)
            };
            t.during(300, 20, &mut step)?;
            // Until the guest has written to pages that were merged.
            for i in 0..patient(4000) {
                if vmstat("cow_ksm") > copied || t.is_over() {
                    break;
                }
                step(i % 64)?;
                sleep_ms(1);
            }
            Ok(())
        })?;
        let copied = vmstat("cow_ksm") - copied;
        println!("merged pages: up to {most}; written when merged: {copied}");
        ensure!(most > 0 && copied > 0, "nothing was merged and written");
    }
    Ok(())
}

fn compact(env: &Env) -> Outcome {
    counted("compact_migrate_scanned", || {
        each(env, Kind::Small, Plan::default(), 200, ops::compact)
    })
}

fn migrate(env: &Env) -> Outcome {
    if nodes() < 2 {
        skip!("there is one node of memory");
    }
    for kind in [Kind::Small, Kind::Thp, Kind::Memfd] {
        counted("pgmigrate_success", || {
            each(env, kind, Plan::default(), 150, ops::migrate)
        })?;
    }
    Ok(())
}

fn balance(env: &Env) -> Outcome {
    if nodes() < 2 {
        skip!("there is one node of memory");
    }
    let _on = Knob::set("/proc/sys/kernel/numa_balancing", "1")?;
    let base = "/sys/kernel/debug/sched/numa_balancing/";
    let _knobs = [
        Knob::set(&format!("{base}scan_delay_ms"), "1")?,
        Knob::set(&format!("{base}scan_period_min_ms"), "10")?,
        Knob::set(&format!("{base}scan_period_max_ms"), "20")?,
    ];
    counted("numa_hint_faults", || {
        each(env, Kind::Small, Plan::default(), 400, ops::migrate)
    })
}

fn huge_pages(env: &Env) -> Outcome {
    let base = "/sys/kernel/mm/transparent_hugepage/khugepaged/";
    let _knobs = [
        Knob::set(&format!("{base}scan_sleep_millisecs"), "1")?,
        Knob::set(&format!("{base}alloc_sleep_millisecs"), "1")?,
    ];
    let both: Op = |t, rng| {
        if rng.below(3) == 0 {
            ops::collapse(t, rng)
        } else {
            ops::split(t, rng)
        }
    };
    counted("thp_split_pmd", || {
        counted("thp_collapse_alloc", || {
            each(env, Kind::Thp, Plan::default(), 250, both)
        })
    })
}

fn protect(env: &Env) -> Outcome {
    each(env, Kind::Small, Plan::default(), 200, ops::protect)?;
    each(env, Kind::Thp, Plan::default(), 150, ops::protect)
}

fn remap(env: &Env) -> Outcome {
    each(env, Kind::Small, Plan::default(), 200, ops::remap)?;
    each(env, Kind::Thp, Plan::default(), 150, ops::remap)
}

fn fork(env: &Env) -> Outcome {
    each(env, Kind::Small, Plan::default(), 250, ops::fork)?;
    each(env, Kind::Thp, Plan::default(), 150, ops::fork)
}

/// Some pages are released.
const RELEASING: Plan = Plan {
    vcpus: 1,
    write_mask: 1,
    release_mask: 1,
    frame_mask: u64::MAX,
    word_mask: u64::MAX,
    stride: 4,
};

fn release(env: &Env) -> Outcome {
    let swap = Swap::new(64 * MIB)?;
    each(env, Kind::Small, RELEASING, 300, ops::release)?;
    each(env, Kind::Thp, RELEASING, 200, ops::release)?;
    drop(swap);
    Ok(())
}

/// Whether memslots may come back under several vCPUs without a WARNING from the kernel. kvm-intel has
/// one when a vCPU that met no slot comes to the tables after another has already met the new one.
fn slots_race(env: &Env) -> bool {
    !env.device.ends_with("/kvm")
}

fn slots(env: &Env) -> Outcome {
    let plan = Plan::default();
    if !slots_race(env) {
        return alone(env, Kind::Small, plan, 250, ops::slots);
    }
    each(env, Kind::Small, plan, 250, ops::slots)
}

fn dirty_log(env: &Env) -> Outcome {
    each(env, Kind::Small, Plan::default(), 250, ops::dirty_log)?;
    each(env, Kind::Thp, Plan::default(), 200, ops::dirty_log)
}

/// Memory of a kind, and in turn all that can be done to it.
fn kind_of_memory(env: &Env, kind: Kind, size: usize) -> Outcome {
    let swap = Swap::new(64 * MIB)?;
    let mut list: Vec<Op> = vec![
        ops::page_out,
        ops::cold,
        ops::protect,
        ops::remap,
        ops::migrate,
    ];
    let small = kind.granule() == PAGE;
    if small {
        list.extend([ops::release as Op, ops::compact]);
    }
    if kind.is_private() {
        list.push(ops::fork);
    }
    let plan = Plan {
        vcpus: 2,
        ..if small { RELEASING } else { Plan::default() }
    };
    let backing = memory_for(kind, size, &plan)?;
    let mut rng = Rng::new(env.seed);
    trial::run(env, plan, &backing, |t| {
        let n = list.len() as u64;
        t.during(600, 2 * n, |i| {
            let chosen = usize::try_from(i % n).unwrap_or(0);
            list[chosen](t, &mut rng)
        })
    })?;
    drop(swap);
    Ok(())
}

fn memfd(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Memfd, SIZE)
}

fn shared_anonymous(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Shared, SIZE)
}

fn tmpfs_shared(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::TmpfsShared, SIZE)
}

fn tmpfs_private(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::TmpfsPrivate, SIZE)
}

fn disk_shared(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::DiskShared, SIZE)
}

fn disk_private(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::DiskPrivate, SIZE)
}

fn hugetlb(env: &Env) -> Outcome {
    kind_of_memory(env, Kind::Huge2M, 2 * SIZE)
}

/// All of it, from several threads.
fn everything(env: &Env) -> Outcome {
    let swap = Swap::new(64 * MIB)?;
    let ksm = Ksm::new()?;
    let _aging = Knob::set("/sys/kernel/mm/lru_gen/enabled", "7").ok();
    for &vcpus in vcpus(env) {
        let plan = Plan {
            vcpus,
            frame_mask: 7,
            ..RELEASING
        };
        let backing = memory_for(Kind::Thp, SIZE, &plan)?;
        trial::run(env, plan, &backing, |t| {
            t.serve.store(true, Ordering::SeqCst);
            let slots: &[Op] = if slots_race(env) || vcpus == 1 {
                &[ops::slots, ops::dirty_log]
            } else {
                &[ops::dirty_log]
            };
            let groups: [&[Op]; 5] = [
                &[ops::page_out, ops::cold, ops::age],
                &[ops::mergeable, ops::compact, ops::migrate],
                &[ops::collapse, ops::split, ops::protect],
                &[ops::release, ops::fork, ops::remap],
                slots,
            ];
            let ended = AtomicBool::new(false);
            // No thread starts, and maps its stack, while another makes holes.
            let started = Barrier::new(groups.len());
            std::thread::scope(|scope| {
                let threads: Vec<_> = groups
                    .iter()
                    .enumerate()
                    .map(|(i, group)| {
                        let (ended, started) = (&ended, &started);
                        let mut rng = Rng::new(env.seed + i as u64);
                        scope.spawn(move || -> Outcome {
                            started.wait();
                            while !ended.load(Ordering::SeqCst) && !t.is_over() {
                                for op in *group {
                                    op(t, &mut rng)?;
                                }
                                sleep_ms(1);
                            }
                            Ok(())
                        })
                    })
                    .collect();
                let r = t.during(1200, 5, |i| {
                    if i % 16 == 15 {
                        ksm.break_all()?;
                        swap.off()?;
                        swap.on()?;
                    }
                    sleep_ms(10);
                    Ok(())
                });
                ended.store(true, Ordering::SeqCst);
                let panicked = || Err(Verdict::Fail("a thread panicked".into()));
                threads
                    .into_iter()
                    .try_for_each(|t| t.join().unwrap_or_else(|_| panicked()))
                    .and(r)
            })
        })?;
    }
    Ok(())
}

/// A guest that is larger than the free memory, for swap to make up for.
fn overcommit(env: &Env) -> Outcome {
    let free = || meminfo("MemFree").unwrap_or(0) * 1024;
    if env.slow >= 5 {
        skip!("it would take minutes");
    }
    let swap = Swap::new(256 * MIB)?;
    // The programs' own pages are to stay.
    let _anonymous_first = Knob::set("/proc/sys/vm/swappiness", "200")?;
    set("/proc/sys/vm/drop_caches", "3")?;
    // All but some of the memory becomes huge pages that no one uses.
    let _rest = Pool::up_to(2048, free().saturating_sub(56 * MIB) / (2 * MIB))?;
    let free = free();
    if free > 160 * MIB {
        skip!("{} MiB are free still", free / MIB);
    }
    let size = usize::try_from(free * 13 / 10).unwrap_or(0) / SIZE * SIZE;
    println!("{} MiB free, a guest of {} MiB", free / MIB, size >> 20);
    let plan = Plan {
        vcpus: 2,
        write_mask: 1,
        word_mask: 7,
        stride: 16,
        ..Plan::default()
    };
    let backing = memory_for(Kind::Small, size, &plan)?;
    counted("pswpout", || {
        counted("pswpin", || {
            trial::run(env, plan, &backing, |t| t.during(1500, 1, |_| Ok(())))
        })
    })?;
    drop(backing);
    drop(swap);
    Ok(())
}

/// The kernel chooses what to take, by what it knows of the guest's accesses.
fn reclaim(env: &Env) -> Outcome {
    let swap = Swap::new(64 * MIB)?;
    let group = Group::new()?;
    for generations in ["0", "7"] {
        let _lru = Knob::set("/sys/kernel/mm/lru_gen/enabled", generations).ok();
        let plan = Plan {
            vcpus: 2,
            write_mask: 0,
            ..Plan::default()
        };
        let backing = memory_for(Kind::Small, SIZE, &plan)?;
        counted("pswpin", || {
            trial::run(env, plan, &backing, |t| {
                t.during(250, 1, |_| {
                    group.reclaim(SIZE as u64 / 32);
                    Ok(())
                })
            })
        })?;
    }
    drop(swap);
    Ok(())
}

/// The vCPU's or the host's complaint that corruption must bring about.
fn noticed(env: &Env, what: &str, words: &str, harm: impl Fn(&Trial) -> Outcome) -> Outcome {
    for &vcpus in vcpus(env) {
        let plan = Plan {
            vcpus,
            write_mask: 1023,
            stride: 1,
            ..Plan::default()
        };
        let backing = memory_for(Kind::Small, SIZE, &plan)?;
        let r = trial::run(env, plan, &backing, |t| {
            t.during(1, 1, |_| Ok(()))?;
            harm(t)?;
            for _ in 0..patient(2000) {
                if t.is_over() {
                    break;
                }
                sleep_ms(1);
            }
            Ok(())
        });
        match r {
            Err(Verdict::Fail(why)) if why.contains(words) => println!("{what}: {why}"),
            other => fail!("{what} with {vcpus} vCPUs: {other:?}, expected is {words:?}"),
        }
    }
    Ok(())
}

/// A page that is stable, and long so.
fn victim(t: &Trial) -> Result<usize, Verdict> {
    (1..t.v.pages())
        .rev()
        .find(|p| {
            let state = t.v.state(*p).load(Ordering::SeqCst);
            state & kind::MASK == kind::STABLE && state != 0
        })
        .ok_or_else(|| Verdict::Fail("the guest has written no page".into()))
}

/// The verifier itself: what is wrong does not get past it.
fn notices_a_changed_word(env: &Env) -> Outcome {
    noticed(env, "a bit that flipped", "at gpa", |t| {
        let at = victim(t)? * PAGE + 8 * 77;
        t.memory().write(at, t.memory().read::<u64>(at) ^ (1 << 40));
        Ok(())
    })
}

fn notices_a_lost_page(env: &Env) -> Outcome {
    noticed(env, "a page that was dropped", "at gpa", |t| {
        Ok(t.memory()
            .advise(victim(t)? * PAGE, PAGE, libc::MADV_DONTNEED)?)
    })
}

fn notices_another_page(env: &Env) -> Outcome {
    noticed(env, "a page in another's place", "at gpa", |t| {
        let page = victim(t)?;
        let other = t.memory().read_bytes((page - 1) * PAGE, PAGE);
        t.memory().write_bytes(page * PAGE, &other);
        Ok(())
    })
}

fn notices_a_lost_count(env: &Env) -> Outcome {
    noticed(env, "counts that were lost", "counters of page 0", |t| {
        Ok(t.memory().advise(0, PAGE, libc::MADV_DONTNEED)?)
    })
}

/// What the guest does not look at any more, the host does at the end.
fn notices_at_the_end(env: &Env) -> Outcome {
    let plan = Plan::default();
    let backing = memory_for(Kind::Small, SIZE, &plan)?;
    let v = selftests::verifier::Verifier::new(env, plan, &backing.memory, false)?;
    v.verify_all()?;
    backing.memory.write(SIZE - PAGE, 1u64);
    match v.verify_all() {
        Err(Verdict::Fail(why)) if why.contains("the host finds") => {}
        other => fail!("a page that is not zero: {other:?}"),
    }
    ensure_eq!(v.progress(0).visits, 0, "visits of a vCPU that never ran");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "stress",
        tests![
            notices_a_changed_word,
            notices_a_lost_page,
            notices_another_page,
            notices_a_lost_count,
            notices_at_the_end,
            undisturbed,
            swap_out,
            swap_off,
            cold,
            age,
            merge,
            compact,
            migrate,
            balance,
            huge_pages,
            protect,
            remap,
            fork,
            release,
            slots,
            dirty_log,
            shared_anonymous,
            memfd,
            tmpfs_shared,
            tmpfs_private,
            disk_shared,
            disk_private,
            hugetlb,
            everything => 60,
            reclaim,
            overcommit => 120,
        ],
    )
}
