// SPDX-License-Identifier: GPL-2.0

//! Interprocessor interrupts: whom a destination means, and that none gets lost.

use selftests::apic::{self, block, icr, msr, reg, Chip, Cpu, Guest, Op, State};
use selftests::guest::usize_of;
use selftests::host::cpus;
use selftests::{ensure, ensure_eq, guest_code, smp, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// The vector of tests that need one.
const V: u32 = 0x51;

/// A guest of `n` vCPUs, all with their APICs and interrupts enabled.
fn guest(env: &Env, chip: Chip, n: usize, x2apic: bool) -> Result<Guest, Verdict> {
    let g = Guest::new(env, chip, n)?;
    for id in 0..n {
        let c = g.cpu(id);
        if x2apic {
            c.enable_x2apic()?;
        } else {
            c.enable()?;
        }
        c.done(Op::Sti, 0, 0)?;
    }
    Ok(g)
}

/// Which vCPUs took `vector` since the last time, each at most once, and nothing else.
fn takers(g: &Guest, vector: u32) -> Result<Vec<usize>, Verdict> {
    let mut who = vec![];
    for id in 0..g.vcpus.len() {
        g.cpu(id).done(Op::Nop, 0, 0)?;
        let log = g.log(id);
        if !log.is_empty() {
            ensure_eq!(log, vec![vector as u8], "what vCPU {id} took");
            who.push(id);
        }
        g.forget(id);
    }
    Ok(who)
}

/// Sends from vCPU `from`; who takes it must be `want`.
fn check(g: &Guest, from: usize, command: u32, dest: u32, want: &[usize]) -> Outcome {
    send(&g.cpu(from), command, dest)?;
    let vector = if command & 0x700 == icr::NMI {
        2
    } else {
        command & 0xff
    };
    let got = takers(g, vector)?;
    ensure_eq!(got, want, "who takes {command:#x} to {dest:#x} from {from}");
    Ok(())
}

/// Sends in the mode in which the vCPU is.
fn send(c: &Cpu<'_>, command: u32, dest: u32) -> Outcome {
    if c.vcpu().kvm_run().apic_base & msr::EXTD != 0 {
        c.xipi(command, dest)
    } else {
        c.ipi(command, dest as u8)
    }
}

/// To one, by its ID, from each, to each.
fn physical(env: &Env) -> Outcome {
    for (chip, x2apic) in [
        (Chip::Split, false),
        (Chip::Split, true),
        (Chip::Full, false),
    ] {
        let g = guest(env, chip, 4, x2apic)?;
        for from in 0..4 {
            for to in 0..4u32 {
                check(&g, from, V, to, &[to as usize])?;
                check(&g, from, icr::ASSERT | V, to, &[to as usize])?;
                check(&g, from, icr::NMI, to, &[to as usize])?;
            }
            for nobody in [4u32, 7, 0x80, 0xfe] {
                check(&g, from, V, nobody, &[])?;
                check(&g, from, icr::NMI, nobody, &[])?;
            }
        }
        // ICR reads back what was sent, without the bit that says it is on its way.
        send(&g.cpu(0), icr::ASSERT | V, 3)?;
        let s = State::get(&g.vcpus[0])?;
        ensure_eq!(s.reg(reg::ICR), icr::ASSERT | V, "ICR");
        ensure_eq!(
            s.reg(reg::ICR2),
            if x2apic { 3 } else { 3 << 24 },
            "ICR, high half"
        );
    }
    Ok(())
}

/// All with the broadcast ID, which depends on the mode.
fn broadcast(env: &Env) -> Outcome {
    for x2apic in [false, true] {
        let g = guest(env, Chip::Split, 3, x2apic)?;
        let all: &[usize] = &[0, 1, 2];
        if x2apic {
            check(&g, 1, V, 0xffff_ffff, all)?;
            check(&g, 1, icr::LOGICAL | V, 0xffff_ffff, all)?;
            check(&g, 1, icr::NMI, 0xffff_ffff, all)?;
            // In this mode these are no broadcasts.
            check(&g, 1, V, 0xff, &[])?;
            check(&g, 1, V, 0xff00_0000, &[])?;
        } else {
            check(&g, 1, V, 0xff, all)?;
            check(&g, 1, icr::NMI, 0xff, all)?;
        }
    }
    Ok(())
}

/// The shorthands do not look at the destination.
fn shorthands(env: &Env) -> Outcome {
    for x2apic in [false, true] {
        let g = guest(env, Chip::Split, 4, x2apic)?;
        for from in 0..4usize {
            let others: Vec<usize> = (0..4).filter(|i| *i != from).collect();
            for dest in [0u32, 2, 0xff] {
                for mode in [0, icr::LOGICAL] {
                    check(&g, from, icr::SELF | mode | V, dest, &[from])?;
                    check(&g, from, icr::ALL | mode | V, dest, &[0, 1, 2, 3])?;
                    check(&g, from, icr::OTHERS | mode | V, dest, &others)?;
                }
            }
            check(&g, from, icr::OTHERS | icr::NMI, 0, &others)?;
        }
        // A vCPU whose APIC is disabled by software takes no interrupt, but NMIs.
        if x2apic {
            g.cpu(2).xwrite(reg::SVR, 0xff)?;
        } else {
            g.cpu(2).write(reg::SVR, 0xff)?;
        }
        check(&g, 0, icr::ALL | V, 0, &[0, 1, 3])?;
        check(&g, 0, V, 2, &[])?;
        check(&g, 0, icr::OTHERS | icr::NMI, 0, &[1, 2, 3])?;
        // One that is disabled altogether takes none at all.
        g.cpu(3).wrmsr(msr::APIC_BASE, apic::BASE)?;
        check(&g, 0, icr::ALL | V, 0, &[0, 1])?;
        check(&g, 0, V, 3, &[])?;
    }
    Ok(())
}

/// The flat model: a bit for each.
fn logical_flat(env: &Env) -> Outcome {
    let g = guest(env, Chip::Split, 4, false)?;
    // After a reset LDR is 0: no mask means anyone.
    check(&g, 0, icr::LOGICAL | V, 0x0f, &[])?;
    for id in 0..4u32 {
        g.cpu(id as usize).write(reg::LDR, 1 << (24 + id))?;
    }
    for mask in 1..16u32 {
        let want: Vec<usize> = (0..4).filter(|i| mask & (1 << i) != 0).collect();
        check(&g, (mask % 4) as usize, icr::LOGICAL | V, mask, &want)?;
    }
    check(&g, 0, icr::LOGICAL | icr::NMI, 6, &[1, 2])?;
    check(&g, 0, icr::LOGICAL | V, 0xff, &[0, 1, 2, 3])?;
    check(&g, 0, icr::LOGICAL | V, 0xf0, &[])?;
    // Two with the same bit, one with two.
    g.cpu(3).write(reg::LDR, 0x0600_0000)?;
    check(&g, 0, icr::LOGICAL | V, 2, &[1, 3])?;
    check(&g, 0, icr::LOGICAL | V, 4, &[2, 3])?;
    check(&g, 0, icr::LOGICAL | V, 8, &[])?;
    Ok(())
}

/// The cluster model: four bits of cluster, four of mask.
fn logical_cluster(env: &Env) -> Outcome {
    let g = guest(env, Chip::Split, 4, false)?;
    for (id, ldr) in [(0usize, 0x01u32), (1, 0x02), (2, 0x11), (3, 0x24)] {
        g.cpu(id).write(reg::DFR, 0x0fff_ffff)?;
        g.cpu(id).write(reg::LDR, ldr << 24)?;
    }
    for (dest, want) in [
        (0x01u32, &[0usize][..]),
        (0x03, &[0, 1]),
        (0x0f, &[0, 1]),
        (0x11, &[2]),
        (0x1f, &[2]),
        (0x24, &[3]),
        (0x21, &[]),
        (0x34, &[]),
        (0x10, &[]),
        (0xff, &[0, 1, 2, 3]),
    ] {
        check(&g, 1, icr::LOGICAL | V, dest, want)?;
    }
    Ok(())
}

/// x2APIC: the LDR follows from the ID, 16 to a cluster.
fn logical_x2apic(env: &Env) -> Outcome {
    let g = guest(env, Chip::Split, 20, true)?;
    for id in [0usize, 1, 15, 16, 19] {
        let ldr = (((id / 16) << 16) | (1 << (id % 16))) as u64;
        ensure_eq!(g.cpu(id).xread(reg::LDR)?, ldr, "LDR of vCPU {id}");
    }
    for (dest, want) in [
        (0x0_0001u32, &[0usize][..]),
        (0x0_8003, &[0, 1, 15]),
        (0x1_0001, &[16]),
        (0x1_000a, &[17, 19]),
        (0x1_8000, &[]),
        (0x2_0001, &[]),
        (0x1_0000, &[]),
    ] {
        check(&g, 18, icr::LOGICAL | V, dest, want)?;
    }
    Ok(())
}

/// Lowest priority: one of those that are meant, for each time it is sent.
fn lowest_priority(env: &Env) -> Outcome {
    for x2apic in [false, true] {
        let g = guest(env, Chip::Split, 4, x2apic)?;
        if !x2apic {
            for id in 0..4u32 {
                g.cpu(id as usize).write(reg::LDR, 1 << (24 + id))?;
            }
        }
        for mask in 1..16u32 {
            for vector in [0x60u32, 0x61, 0x62, 0x63, 0x64] {
                send(&g.cpu(0), icr::LOGICAL | icr::LOWEST | vector, mask)?;
                let got = takers(&g, vector)?;
                ensure_eq!(got.len(), 1, "takers of {vector:#x} to {mask:#x}");
                ensure!(
                    mask & (1 << got[0]) != 0,
                    "vCPU {} took what is for {mask:#x}",
                    got[0]
                );
            }
        }
        for to in 0..4u32 {
            check(&g, 1, icr::LOWEST | V, to, &[to as usize])?;
        }
        check(&g, 1, icr::LOWEST | icr::LOGICAL | V, 0x20, &[])?;
    }
    Ok(())
}

/// Destinations follow what the guest writes: IDs, LDRs, and a mode each.
fn renamed(env: &Env) -> Outcome {
    let g = guest(env, Chip::Split, 3, false)?;
    g.cpu(1).write(reg::ID, 9 << 24)?;
    check(&g, 0, V, 9, &[1])?;
    check(&g, 0, V, 1, &[])?;
    g.cpu(1).write(reg::ID, 1 << 24)?;
    check(&g, 0, V, 1, &[1])?;
    check(&g, 0, V, 9, &[])?;
    g.cpu(2).write(reg::LDR, 0x2000_0000)?;
    check(&g, 0, icr::LOGICAL | V, 0x20, &[2])?;
    g.cpu(2).write(reg::LDR, 0x4000_0000)?;
    check(&g, 0, icr::LOGICAL | V, 0x20, &[])?;
    check(&g, 0, icr::LOGICAL | V, 0x40, &[2])?;
    // One goes to x2APIC mode: physical destinations work both ways.
    g.cpu(2).enable_x2apic()?;
    check(&g, 0, V, 2, &[2])?;
    check(&g, 2, V, 1, &[1])?;
    check(&g, 2, icr::OTHERS | V, 0, &[0, 1])?;
    check(&g, 0, icr::ALL | V, 0, &[0, 1, 2])?;
    // The host changes IDs too.
    let mut s = State::get(&g.vcpus[1])?;
    s.put(reg::ID, 0x30 << 24);
    s.set(&g.vcpus[1])?;
    check(&g, 0, V, 0x30, &[1])?;
    check(&g, 0, V, 1, &[])?;
    Ok(())
}

/// As many vCPUs as the largest usual guests have, and each is reached.
fn sixty_four(env: &Env) -> Outcome {
    let n = apic::MAX_CPUS;
    let g = guest(env, Chip::Split, n, true)?;
    let others: Vec<usize> = (1..n).collect();
    check(&g, 0, icr::OTHERS | V, 0, &others)?;
    for to in [1u32, 15, 16, 31, 62, 63] {
        send(&g.cpu(0), V, to)?;
    }
    ensure_eq!(
        takers(&g, V)?,
        vec![1usize, 15, 16, 31, 62, 63],
        "takers by their IDs"
    );
    check(
        &g,
        63,
        icr::LOGICAL | V,
        0x2_ffff,
        &(32..48).collect::<Vec<_>>(),
    )?;
    check(
        &g,
        40,
        icr::NMI | icr::OTHERS,
        0,
        &(0..n).filter(|i| *i != 40).collect::<Vec<_>>(),
    )?;
    Ok(())
}

// Sends the interrupt of vector V from vCPU `id` (in RDI: the block; in RAX: rounds) to the next, and
// waits for the answer that the other's handler sends: vector V + 1. EBX is the ICR's destination, R8 how to
// wait: 0 spins, else HLT.
guest_code!(ping, ".code64",
    "mov r9, rax",
    "mov r10, gs:[0x690]", // the count of vector 0x52
    "2:",
    "inc r10",
    "mov ecx, 0x830",
    "mov edx, ebx",
    "mov eax, {V}",
    "wrmsr",
    "3:",
    "cli",
    "cmp gs:[0x690], r10",
    "jae 4f",
    "test r8, r8",
    "jz 5f",
    "sti",
    "hlt",
    "jmp 3b",
    "5:",
    "sti",
    "pause",
    "jmp 3b",
    "4:",
    "sti",
    "dec r9",
    "jnz 2b",
    "jmp r15";
    V = V,
);

// The handler's part: answers vector V with V + 1 to vCPU 0.
guest_code!(pong, ".code64",
    "cmp eax, {V}",
    "jne 2f",
    "mov ecx, 0x830",
    "xor edx, edx",
    "mov eax, {V} + 1",
    "wrmsr",
    "2: ret";
    V = V,
);

// Halts, or spins, for ever.
guest_code!(halts, ".code64", "2: sti", "hlt", "jmp 2b");
guest_code!(spins, ".code64", "sti", "2: pause", "jmp 2b");

/// All interrupts that vCPU `id` took, but spurious ones: the emulated machine delivers one now and then if
/// it virtualizes the APIC.
fn taken(g: &Guest, id: usize) -> u64 {
    g.total(id) - g.count(id, 0xff)
}

fn ping_pong(env: &Env, halt: bool, crowded: bool, rounds: u64) -> Outcome {
    let g = guest(env, Chip::Split, 2, true)?;
    g.mem.write_bytes(usize_of(apic::OWN_CODE), ping());
    g.mem.write_bytes(
        usize_of(apic::OWN_CODE) + 0x200,
        if halt { halts() } else { spins() },
    );
    g.hook(1, pong());
    g.cpu(0).load_at(apic::OWN_CODE, 0, rounds)?;
    let mut r = g.vcpus[0].regs()?;
    (r.rbx, r.r8) = (1, u64::from(halt));
    g.vcpus[0].set_regs(&r)?;
    g.cpu(1).load_at(apic::OWN_CODE + 0x200, 0, 0)?;
    smp::run(&g, &[0, 1], crowded, |t| {
        g.wait("all answers", || t.done(0) || t.failed())
    })?;
    ensure_eq!(g.count(1, V as u8), rounds, "interrupts of vCPU 1");
    ensure_eq!(g.count(0, V as u8 + 1), rounds, "answers");
    ensure_eq!(
        (taken(&g, 0), taken(&g, 1)),
        (rounds, rounds),
        "all interrupts"
    );
    Ok(())
}

/// Rounds for what spins: with one processor each needs two changes of threads, by the clock.
fn spinning(crowded: bool) -> u64 {
    if crowded || cpus().len() == 1 {
        20
    } else {
        1000
    }
}

/// Back and forth between two that spin, each at the other's answer: none is lost or doubled.
fn to_running(env: &Env) -> Outcome {
    ping_pong(env, false, false, spinning(false))
}

/// The same when both are on one processor: the one who is to answer is preempted.
fn to_preempted(env: &Env) -> Outcome {
    ping_pong(env, false, true, spinning(true))
}

/// Back and forth between two that halt: no wake-up is lost.
fn to_halted(env: &Env) -> Outcome {
    ping_pong(env, true, false, env.fewer(1000))?;
    ping_pong(env, true, true, env.fewer(300))
}

// RAX rounds: sends vector 0x40 + its ID to all others, and waits until they counted it. EBX is the vector.
guest_code!(
    storm,
    ".code64",
    "mov r9, rax",
    "xor r10d, r10d",
    "sti",
    "2:",
    "add r10, rdi", // as many more as there are others
    "mov ecx, 0x830",
    "xor edx, edx",
    "lea eax, [rbx + 0xc0000]",
    "wrmsr",
    "3: pause",
    "cmp gs:[0x80], r10",
    "jb 3b",
    "dec r9",
    "jnz 2b",
    "mov qword ptr gs:[0x88], 1",
    // Who is done goes on taking interrupts.
    "4: pause",
    "jmp 4b",
);

// Counts in the page of the sender, whose number is in the vector.
guest_code!(counts, ".code64",
    "sub eax, 0x40",
    "cmp eax, 64", // a spurious interrupt has no sender
    "jae 2f",
    "shl eax, 12",
    "lock inc qword ptr [rax + {B} + 0x80]",
    "2: ret";
    B = block::FIRST,
);

/// All to all at once; each sender waits until all have acknowledged. Exactly as many arrive as were sent.
fn storm_of(env: &Env, n: usize, crowded: bool) -> Outcome {
    let rounds = env.fewer(if crowded || cpus().len() == 1 {
        15
    } else {
        150
    });
    let g = guest(env, Chip::Split, n, true)?;
    g.mem.write_bytes(usize_of(apic::OWN_CODE), storm());
    for id in 0..n {
        g.hook(id, counts());
        g.cpu(id).load_at(apic::OWN_CODE, n as u64 - 1, rounds)?;
        let mut r = g.vcpus[id].regs()?;
        r.rbx = 0x40 + id as u64;
        g.vcpus[id].set_regs(&r)?;
    }
    let finished = |id: usize| g.mem.read::<u64>(usize_of(g.block(id)) + 0x88) == 1;
    let all: Vec<usize> = (0..n).collect();
    smp::run(&g, &all, crowded, |t| {
        g.wait("the end of the storm", || {
            all.iter().all(|i| finished(*i)) || t.failed()
        })
    })?;
    for to in 0..n {
        for from in 0..n {
            let want = if from == to { 0 } else { rounds };
            ensure_eq!(
                g.count(to, 0x40 + from as u8),
                want,
                "interrupts from {from} to {to}"
            );
        }
        ensure_eq!(
            taken(&g, to),
            rounds * (n as u64 - 1),
            "all interrupts of {to}"
        );
    }
    Ok(())
}

fn storm_two(env: &Env) -> Outcome {
    storm_of(env, 2, false)
}

fn storm_four(env: &Env) -> Outcome {
    storm_of(env, 4, false)
}

fn storm_crowded(env: &Env) -> Outcome {
    storm_of(env, 3, true)
}

/// NMIs to a vCPU that halts with interrupts disabled, and to one that spins.
fn nmis(env: &Env) -> Outcome {
    guest_code!(halts_deaf, ".code64", "cli", "2: hlt", "jmp 2b");
    for code in [halts_deaf(), spins()] {
        let g = guest(env, Chip::Split, 2, true)?;
        g.mem.write_bytes(usize_of(apic::OWN_CODE), code);
        g.cpu(1).load_at(apic::OWN_CODE, 0, 0)?;
        smp::run(&g, &[1], false, |t| {
            for k in 1..=100u64 {
                g.cpu(0).xipi(icr::NMI, 1)?;
                g.wait("an NMI", || g.count(1, 2) >= k || t.failed())?;
            }
            Ok(())
        })?;
        ensure_eq!(g.count(1, 2), 100, "NMIs");
        ensure_eq!(g.total(1), 100, "all events");
    }
    Ok(())
}

/// Signals to the receiver's thread all the time: what is on its way arrives.
fn with_signals(env: &Env) -> Outcome {
    for code in [halts(), spins()] {
        let g = guest(env, Chip::Split, 2, true)?;
        g.mem.write_bytes(usize_of(apic::OWN_CODE), code);
        g.cpu(1).load_at(apic::OWN_CODE, 0, 0)?;
        smp::run(&g, &[1], false, |t| {
            for k in 1..=200u64 {
                t.kick(0);
                g.cpu(0).xipi(V, 1)?;
                t.kick(0);
                g.wait("an interrupt", || g.count(1, V as u8) >= k || t.failed())?;
            }
            Ok(())
        })?;
        ensure_eq!(g.total(1), 200, "interrupts");
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "ipi",
        tests![
            physical,
            broadcast,
            shorthands,
            logical_flat,
            logical_cluster,
            logical_x2apic,
            lowest_priority,
            renamed,
            sixty_four,
            to_running,
            to_preempted,
            to_halted,
            storm_two,
            storm_four,
            storm_crowded,
            nmis,
            with_signals,
        ],
    )
}
