// SPDX-License-Identifier: GPL-2.0

//! The local APIC's timer: one-shot, periodic, by TSC deadline.
//!
//! What must not be early is measured by the guest's TSC, with a tolerance for the two clocks. That it is
//! not late can only be said within what a busy machine takes: seconds.

use kvm_bindings as kb;
use selftests::apic::{
    self, msr, reg, Chip, Cpu, Guest, Op, State, BASE, DEADLINE, MASKED, PERIODIC,
};
use selftests::check::expect_errno;
use selftests::guest::usize_of;
use selftests::host::{patient, sleep_ms};
use selftests::{ensure, ensure_eq, guest_code, skip, smp, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const V: u32 = 0x51;
/// Divides by 1.
const BY_1: u32 = 0xb;
/// A millisecond in counts of the timer, which counts at 1 GHz.
const MS: u32 = 1_000_000;

fn ready(env: &Env) -> Result<Guest, Verdict> {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    c.write(reg::DIVIDE, BY_1)?;
    c.done(Op::Sti, 0, 0)?;
    Ok(g)
}

/// Ticks of the guest's TSC in a millisecond.
fn khz(c: &Cpu<'_>) -> Result<u64, Verdict> {
    let r = c.vcpu().fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?;
    Ok(u64::try_from(r).unwrap_or(1))
}

fn now(c: &Cpu<'_>) -> Result<u64, Verdict> {
    c.done(Op::Rdtsc, 0, 0)
}

/// Has the guest spin until it took `n` interrupts in all.
fn until(c: &Cpu<'_>, n: u64) -> Outcome {
    c.done(Op::Until, c.guest.block(c.id) + apic::block::TOTAL, n)?;
    Ok(())
}

/// Has the guest spin for some milliseconds.
fn spin(c: &Cpu<'_>, ms: u64) -> Outcome {
    let end = now(c)? + ms * khz(c)?;
    while now(c)? < end {
        c.done(Op::Spin, 0, 1000)?;
    }
    Ok(())
}

/// `ticks` must be at least `ms` milliseconds, but for 5 % between the clocks.
fn not_early(c: &Cpu<'_>, ticks: u64, ms: u64, what: &str) -> Outcome {
    let want = ms * khz(c)?;
    ensure!(
        ticks * 100 >= want * 95,
        "{what}: {ticks} ticks, too early for {want}"
    );
    Ok(())
}

/// One interrupt, not early, and no other.
fn one_shot(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    c.write(reg::LVT_TIMER, V)?;
    for round in 1..=5u64 {
        let start = now(&c)?;
        c.write(reg::INITIAL, 2 * MS)?;
        ensure_eq!(c.read(reg::INITIAL)?, 2 * MS, "initial count");
        until(&c, round)?;
        not_early(&c, now(&c)? - start, 2, "one shot")?;
        ensure_eq!(c.read(reg::CURRENT)?, 0, "current count after it");
        ensure_eq!(c.read(reg::INITIAL)?, 2 * MS, "initial count after it");
        spin(&c, 3)?;
        ensure_eq!(g.count(0, V as u8), round, "interrupts");
    }
    // A new count replaces the one that runs; 0 stops it.
    c.write(reg::INITIAL, 2 * MS)?;
    c.write(reg::INITIAL, 1000 * MS)?;
    spin(&c, 4)?;
    ensure_eq!(g.total(0), 5, "interrupts of a count that was replaced");
    c.write(reg::INITIAL, 2 * MS)?;
    c.write(reg::INITIAL, 0)?;
    ensure_eq!(c.read(reg::CURRENT)?, 0, "current count when stopped");
    spin(&c, 4)?;
    ensure_eq!(g.total(0), 5, "interrupts of a timer that was stopped");
    Ok(())
}

/// One interrupt a period, as long as the count is not 0.
fn periodic(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    // Long enough for the guest to do something besides its interrupts.
    let period = patient(1);
    let count = MS * period as u32;
    c.write(reg::LVT_TIMER, PERIODIC | V)?;
    let start = now(&c)?;
    c.write(reg::INITIAL, count)?;
    until(&c, 10)?;
    not_early(&c, now(&c)? - start, 10 * period, "ten periods")?;
    ensure_eq!(c.read(reg::INITIAL)?, count, "initial count");
    let current = c.read(reg::CURRENT)?;
    ensure!(current <= count, "current count {current}");
    // Masked, the timer runs and does not interrupt.
    c.write(reg::LVT_TIMER, MASKED | PERIODIC | V)?;
    c.done(Op::Nop, 0, 0)?;
    let n = g.total(0);
    spin(&c, 4 * period)?;
    ensure_eq!(g.total(0), n, "interrupts when masked");
    c.write(reg::LVT_TIMER, PERIODIC | V)?;
    until(&c, n + 3)?;
    // Another period.
    c.write(reg::INITIAL, 3 * count)?;
    c.done(Op::Nop, 0, 0)?;
    let (n, start) = (g.total(0), now(&c)?);
    until(&c, n + 3)?;
    not_early(&c, now(&c)? - start, 8 * period, "three longer periods")?;
    c.write(reg::INITIAL, 0)?;
    c.done(Op::Nop, 0, 0)?;
    let n = g.total(0);
    spin(&c, 4 * period)?;
    ensure_eq!(g.total(0), n, "interrupts when stopped");
    Ok(())
}

/// A period that is too short to live with: the guest goes on, and the timer can be stopped.
fn short_period(env: &Env) -> Outcome {
    if env.slow >= 5 {
        skip!("an interrupt may take longer here than the shortest period");
    }
    let g = ready(env)?;
    let c = g.cpu(0);
    c.write(reg::LVT_TIMER, PERIODIC | V)?;
    for count in [1u32, 100] {
        let n = g.total(0);
        c.write(reg::INITIAL, count)?;
        until(&c, n + 20)?;
        c.done(Op::Spin, 0, 1000)?;
        c.write(reg::INITIAL, 0)?;
        c.done(Op::Nop, 0, 0)?;
        let n = g.total(0);
        spin(&c, 2)?;
        ensure_eq!(g.total(0), n, "interrupts when stopped");
    }
    Ok(())
}

// Reads the counter at RDI twice, with RAX spins between, and the TSC before and after each: six values in OWN.
guest_code!(
    rate,
    ".code64",
    "mov rbx, rax",
    "rdtsc",
    "mov gs:[0x80], eax",
    "mov r9d, [rdi]",
    "rdtsc",
    "mov gs:[0x84], eax",
    "2: dec rbx",
    "jnz 2b",
    "rdtsc",
    "mov gs:[0x88], eax",
    "mov r10d, [rdi]",
    "rdtsc",
    "mov gs:[0x8c], eax",
    "mov gs:[0x90], r9d",
    "mov gs:[0x94], r10d",
    "jmp r15",
);

/// The current count goes down at 1 GHz / (`divide` * `ns`), within what the TSC read beside it allows.
fn check_rate(g: &Guest, divide: u64, ns: u64) -> Outcome {
    let c = g.cpu(0);
    g.mem.write_bytes(usize_of(apic::OWN_CODE), rate());
    c.load_at(apic::OWN_CODE, BASE + u64::from(reg::CURRENT), 50_000)?;
    c.finish()?;
    let v: [u32; 6] = g.mem.read(usize_of(g.block(0)) + 0x80);
    ensure!(v[5] < v[4] && v[5] > 0, "counts {} and {}", v[4], v[5]);
    let counted = u64::from(v[4] - v[5]) * divide * ns;
    let to_ns =
        |ticks: u32| -> Result<u64, Verdict> { Ok(u64::from(ticks) * 1_000_000 / khz(&c)?) };
    let least = to_ns(v[2].wrapping_sub(v[1]))?;
    let most = to_ns(v[3].wrapping_sub(v[0]))?;
    let loose = 2 * divide * ns + 1000;
    ensure!(
        counted + loose >= least * 95 / 100 && counted <= most * 105 / 100 + loose,
        "{counted} ns by the timer, {least} to {most} by the TSC (divide {divide}, {ns} ns)"
    );
    Ok(())
}

/// The divide configuration, and the current count on its way.
fn divide(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    c.write(reg::LVT_TIMER, MASKED | V)?;
    for (bits, by) in [
        (0u32, 2u64),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ] {
        c.write(reg::DIVIDE, bits)?;
        ensure_eq!(c.read(reg::DIVIDE)?, bits, "divide configuration");
        c.write(reg::INITIAL, 4_000_000_000)?;
        check_rate(&g, by, 1)?;
    }
    // Changed in the middle of a count, the rest goes at the new rate.
    c.write(reg::INITIAL, 4_000_000_000)?;
    c.write(reg::DIVIDE, 3)?;
    check_rate(&g, 16, 1)
}

/// KVM_CAP_X86_APIC_BUS_CYCLES_NS: another clock.
fn bus_cycles(env: &Env) -> Outcome {
    let kvm = env.open()?;
    apic::need(&kvm, Chip::Split)?;
    if kvm.capability(kb::KVM_CAP_X86_APIC_BUS_CYCLES_NS) <= 0 {
        skip!("no KVM_CAP_X86_APIC_BUS_CYCLES_NS");
    }
    let cap = kb::KVM_CAP_X86_APIC_BUS_CYCLES_NS;
    let vm = kvm.create_vm()?;
    expect_errno(vm.enable_cap(cap, 10), libc::ENXIO, "without local APICs")?;
    expect_errno(vm.enable_cap(cap, 0), libc::EINVAL, "0 without local APICs")?;
    for ns in [10u64, 25] {
        let g = Guest::prepared(env, Chip::Split, 1, |vm| {
            expect_errno(vm.enable_cap(cap, 0), libc::EINVAL, "0")?;
            let most = u64::MAX / (u64::from(u32::MAX) * 128);
            expect_errno(vm.enable_cap(cap, most + 1), libc::EINVAL, "an overflow")?;
            expect_errno(vm.enable_cap(cap, u64::MAX), libc::EINVAL, "an overflow")?;
            Ok(vm.enable_cap(cap, ns)?)
        })?;
        expect_errno(
            g.vm.enable_cap(cap, ns),
            libc::EINVAL,
            "when there is a vCPU",
        )?;
        let c = g.cpu(0);
        c.enable()?;
        c.write(reg::DIVIDE, BY_1)?;
        c.write(reg::LVT_TIMER, V)?;
        c.write(reg::INITIAL, 1_000_000_000)?;
        check_rate(&g, 1, ns)?;
        c.done(Op::Sti, 0, 0)?;
        let start = now(&c)?;
        c.write(reg::INITIAL, 2 * MS / ns as u32)?;
        until(&c, 1)?;
        not_early(&c, now(&c)? - start, 2, "one shot")?;
    }
    Ok(())
}

/// By TSC deadline: not early; at once if it is past; 0 disarms; the MSR reads 0 when it is over.
fn deadline(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    c.write(reg::LVT_TIMER, DEADLINE | V)?;
    let ms = khz(&c)?;
    ensure_eq!(c.rdmsr(msr::TSC_DEADLINE)?, 0, "at first");
    for round in 1..=5u64 {
        let when = now(&c)? + 2 * ms;
        c.wrmsr(msr::TSC_DEADLINE, when)?;
        until(&c, round)?;
        let late = now(&c)?;
        ensure!(late >= when, "{} ticks early", when - late);
        ensure_eq!(c.rdmsr(msr::TSC_DEADLINE)?, 0, "after it");
    }
    // Past, just now, and the very first tick.
    for (round, when) in (6u64..).zip([now(&c)? - ms, now(&c)?, 1]) {
        c.wrmsr(msr::TSC_DEADLINE, when)?;
        until(&c, round)?;
        ensure_eq!(c.rdmsr(msr::TSC_DEADLINE)?, 0, "after one that was past");
    }
    let n = g.total(0);
    // Disarmed; replaced; never.
    // Far enough for the next operation to come in time, and not so far that the spinning ends before.
    let soon = u64::from(env.slow) * 2;
    c.wrmsr(msr::TSC_DEADLINE, now(&c)? + soon * ms)?;
    c.wrmsr(msr::TSC_DEADLINE, 0)?;
    ensure_eq!(c.rdmsr(msr::TSC_DEADLINE)?, 0, "when disarmed");
    spin(&c, 2 * soon)?;
    ensure_eq!(g.total(0), n, "interrupts when disarmed");
    for far in [now(&c)? + 1_000_000 * ms, 1 << 62, u64::MAX] {
        c.wrmsr(msr::TSC_DEADLINE, now(&c)? + soon * ms)?;
        c.wrmsr(msr::TSC_DEADLINE, far)?;
        ensure_eq!(c.rdmsr(msr::TSC_DEADLINE)?, far, "a far one");
        ensure_eq!(c.vcpu().msr(msr::TSC_DEADLINE)?, Some(far), "KVM_GET_MSRS");
        spin(&c, 2 * soon)?;
        ensure_eq!(g.total(0), n, "interrupts of {far:#x}");
    }
    // The counts are of no use in this mode.
    c.write(reg::INITIAL, MS)?;
    ensure_eq!(c.read(reg::CURRENT)?, 0, "current count");
    spin(&c, 3)?;
    ensure_eq!(g.total(0), n, "interrupts of an initial count");
    // The host's MSR is the same one.
    ensure!(
        c.vcpu().set_msr(msr::TSC_DEADLINE, now(&c)? + ms)?,
        "KVM_SET_MSRS"
    );
    until(&c, n + 1)?;
    ensure!(c.vcpu().set_msr(msr::TSC_DEADLINE, 1)?, "KVM_SET_MSRS");
    until(&c, n + 2)?;
    Ok(())
}

/// By deadlines of a counter that runs at another rate than the host's: not early, and not much later.
fn deadline_scaled(env: &Env) -> Outcome {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_VM_TSC_CONTROL) <= 0 {
        skip!("no KVM_CAP_VM_TSC_CONTROL");
    }
    for (numerator, denominator) in [(3, 1), (1, 3)] {
        let mut host = 0;
        let g = Guest::prepared(env, Chip::Split, 1, |vm| {
            host = u64::try_from(vm.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?).unwrap_or(1);
            let rate = usize_of(host * numerator / denominator);
            vm.fd.ioctl(sys::KVM_SET_TSC_KHZ, rate)?;
            Ok(())
        })?;
        let c = g.cpu(0);
        c.enable()?;
        c.done(Op::Sti, 0, 0)?;
        c.write(reg::LVT_TIMER, DEADLINE | V)?;
        let ms = khz(&c)?;
        for round in 1..=5u64 {
            let begin = selftests::host::rdtsc();
            let when = now(&c)? + 5 * ms;
            c.wrmsr(msr::TSC_DEADLINE, when)?;
            until(&c, round)?;
            let late = now(&c)?;
            ensure!(late >= when, "{} ticks early", when - late);
            let passed = selftests::host::rdtsc() - begin;
            ensure!(
                passed >= 5 * host * 99 / 100 && passed < patient(5) * host * 10,
                "{numerator}/{denominator}: {passed} ticks of the host's for 5 ms at {host} kHz"
            );
        }
        // Asleep, the host's own timer is what wakes it.
        for round in 6..=8u64 {
            let when = now(&c)? + 20 * ms;
            c.wrmsr(msr::TSC_DEADLINE, when)?;
            c.done(Op::Halt, 0, 0)?;
            c.done(Op::Sti, 0, 0)?;
            until(&c, round)?;
            let late = now(&c)?;
            ensure!(late >= when, "{} ticks early after HLT", when - late);
        }
    }
    Ok(())
}

/// Changing the mode to and from TSC deadline disarms; in the other modes the MSR is nothing.
fn mode_changes(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    let ms = khz(&c)?;
    for mode in [0, PERIODIC] {
        c.write(reg::LVT_TIMER, mode | V)?;
        c.wrmsr(msr::TSC_DEADLINE, now(&c)? + ms)?;
        ensure_eq!(c.rdmsr(msr::TSC_DEADLINE)?, 0, "the MSR in mode {mode:#x}");
        ensure!(c.vcpu().set_msr(msr::TSC_DEADLINE, 1)?, "KVM_SET_MSRS");
        spin(&c, 3)?;
        ensure_eq!(g.total(0), 0, "interrupts of a deadline in mode {mode:#x}");
        c.write(reg::INITIAL, 50 * MS)?;
        c.write(reg::LVT_TIMER, DEADLINE | V)?;
        ensure_eq!(c.read(reg::CURRENT)?, 0, "current count in deadline mode");
        c.wrmsr(msr::TSC_DEADLINE, now(&c)? + 50 * ms)?;
        c.write(reg::LVT_TIMER, mode | V)?;
        ensure_eq!(
            c.rdmsr(msr::TSC_DEADLINE)?,
            0,
            "the MSR back in mode {mode:#x}"
        );
        spin(&c, 60)?;
        ensure_eq!(g.total(0), 0, "interrupts of what changes of mode disarmed");
    }
    // From one-shot to periodic and back, the count goes on.
    c.write(reg::LVT_TIMER, V)?;
    c.write(reg::INITIAL, 4 * MS)?;
    c.write(reg::LVT_TIMER, PERIODIC | V)?;
    until(&c, 3)?;
    c.write(reg::LVT_TIMER, V)?;
    c.done(Op::Nop, 0, 0)?;
    let n = g.total(0);
    spin(&c, 12)?;
    ensure!(
        g.total(0) <= n + 1,
        "{} interrupts of one shot",
        g.total(0) - n
    );
    Ok(())
}

/// A timer that is masked runs down and interrupts no one.
fn masked(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    c.write(reg::LVT_TIMER, MASKED | V)?;
    c.write(reg::INITIAL, MS)?;
    spin(&c, 3)?;
    ensure_eq!(c.read(reg::CURRENT)?, 0, "current count");
    ensure!(!State::get(c.vcpu())?.vector(reg::IRR, V as u8), "pending");
    c.write(reg::LVT_TIMER, MASKED | DEADLINE | V)?;
    c.wrmsr(msr::TSC_DEADLINE, now(&c)? + khz(&c)?)?;
    spin(&c, 3)?;
    ensure_eq!(g.total(0), 0, "interrupts");
    Ok(())
}

/// With interrupts off, or TPR in the way, the interrupt waits; of a periodic timer's only one.
fn held_back(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    c.write(reg::LVT_TIMER, PERIODIC | V)?;
    c.done(Op::Cli, 0, 0)?;
    c.write(reg::INITIAL, MS)?;
    spin(&c, 5)?;
    ensure_eq!(g.total(0), 0, "interrupts with IF = 0");
    ensure!(
        State::get(c.vcpu())?.vector(reg::IRR, V as u8),
        "not pending"
    );
    c.write(reg::INITIAL, 0)?;
    c.done(Op::Sti, 0, 0)?;
    spin(&c, 2)?;
    let n = g.total(0);
    ensure!(
        (1..=2).contains(&n),
        "{n} interrupts of many periods with IF = 0"
    );
    c.done(Op::WriteCr8, 0, 15)?;
    c.write(reg::LVT_TIMER, V)?;
    c.write(reg::INITIAL, MS)?;
    spin(&c, 3)?;
    ensure_eq!(g.total(0), n, "interrupts with CR8 = 15");
    c.done(Op::WriteCr8, 0, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.total(0), n + 1, "interrupts with CR8 = 0");
    Ok(())
}

/// The timer wakes a vCPU from HLT, in each mode, again and again.
fn wakes(env: &Env) -> Outcome {
    let g = ready(env)?;
    let c = g.cpu(0);
    c.done(Op::Cli, 0, 0)?;
    let rounds = env.fewer(30);
    c.write(reg::LVT_TIMER, V)?;
    for k in 1..=rounds {
        c.write(reg::INITIAL, MS / 2)?;
        c.done(Op::Halt, 0, 0)?;
        ensure_eq!(g.total(0), k, "interrupts of one-shot counts");
    }
    c.write(reg::LVT_TIMER, DEADLINE | V)?;
    for k in 1..=rounds {
        let when = now(&c)? + khz(&c)? / 2;
        c.wrmsr(msr::TSC_DEADLINE, when)?;
        c.done(Op::Halt, 0, 0)?;
        ensure!(now(&c)? >= when, "early");
        ensure_eq!(g.total(0), rounds + k, "interrupts of deadlines");
    }
    c.write(reg::LVT_TIMER, PERIODIC | V)?;
    c.write(reg::INITIAL, MS)?;
    for _ in 0..rounds {
        c.done(Op::Halt, 0, 0)?;
    }
    ensure!(g.total(0) >= 3 * rounds, "interrupts of a periodic timer");
    c.write(reg::INITIAL, 0)?;
    // It expires while the vCPU is not in KVM_RUN: then it is there at once.
    c.done(Op::Sti, 0, 0)?;
    let n = g.total(0);
    c.write(reg::LVT_TIMER, V)?;
    c.write(reg::INITIAL, 2 * MS)?;
    sleep_ms(6);
    c.done(Op::Nop, 0, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.total(0), n + 1, "interrupts of a time without KVM_RUN");
    Ok(())
}

// Arms the timer (its register in RDI, the count in RBX), and waits for the handler to have armed it RAX times.
guest_code!(
    arms,
    ".code64",
    "mov gs:[0x88], rdi",
    "mov gs:[0x90], rbx",
    "mov gs:[0x98], rax",
    "sti",
    "mov [rdi], ebx",
    "2: pause",
    "cmp gs:[0x10], rax",
    "jb 2b",
    "jmp r15",
);

guest_code!(
    rearms,
    ".code64",
    "mov rcx, gs:[0x10]",
    "cmp rcx, gs:[0x98]",
    "jae 2f",
    "mov rcx, gs:[0x88]",
    "mov rbx, gs:[0x90]",
    "mov [rcx], ebx",
    "2: ret",
);

/// A timer each for more vCPUs than processors, re-armed by its handler: none gets stuck.
fn crowd(env: &Env) -> Outcome {
    let n = 4;
    let rounds = env.fewer(40);
    let g = Guest::new(env, Chip::Split, n)?;
    g.mem.write_bytes(usize_of(apic::OWN_CODE), arms());
    for id in 0..n {
        let c = g.cpu(id);
        c.enable()?;
        c.write(reg::DIVIDE, BY_1)?;
        c.write(reg::LVT_TIMER, V)?;
        g.hook(id, rearms());
        c.load_at(apic::OWN_CODE, BASE + u64::from(reg::INITIAL), rounds)?;
        let mut r = c.vcpu().regs()?;
        r.rbx = u64::from(MS / 2) + id as u64 * 1000;
        c.vcpu().set_regs(&r)?;
    }
    let all: Vec<usize> = (0..n).collect();
    smp::run(&g, &all, false, |t| {
        g.wait("all timers", || t.all_done() || t.failed())
    })?;
    for id in 0..n {
        let got = g.count(id, V as u8);
        ensure_eq!(got, rounds, "interrupts of vCPU {id}");
    }
    Ok(())
}

/// In the middle of a count, the state goes to another VM, and the timer goes on there.
fn migrates(env: &Env) -> Outcome {
    let a = ready(env)?;
    a.cpu(0).write(reg::LVT_TIMER, V)?;
    a.cpu(0).write(reg::INITIAL, 40 * MS)?;
    spin(&a.cpu(0), 5)?;
    let s = State::get(&a.vcpus[0])?;
    let left = s.reg(reg::CURRENT);
    ensure!(
        left > 0 && left < 36 * MS,
        "{left} counts left of 40 ms after 5 ms"
    );
    ensure_eq!(s.reg(reg::INITIAL), 40 * MS, "initial count");
    let b = ready(env)?;
    let c = b.cpu(0);
    let start = now(&c)?;
    s.set(c.vcpu())?;
    let at_once = c.read(reg::CURRENT)?;
    ensure!(
        at_once <= left && at_once > 0,
        "{at_once} counts left, {left} before"
    );
    until(&c, 1)?;
    let ms = u64::from(left / MS);
    not_early(&c, now(&c)? - start, ms, "the rest of the count")?;
    ensure_eq!(c.read(reg::CURRENT)?, 0, "current count after it");
    // Of a periodic timer the next period is a whole one.
    a.cpu(0).write(reg::LVT_TIMER, PERIODIC | V)?;
    a.cpu(0).write(reg::INITIAL, 4 * MS)?;
    State::get(&a.vcpus[0])?.set(c.vcpu())?;
    let n = b.total(0);
    until(&c, n + 1)?;
    let start = now(&c)?;
    until(&c, n + 4)?;
    not_early(&c, now(&c)? - start, 8, "three periods less a late start")?;
    // KVM_SET_LAPIC of a state whose timer does not run stops it.
    let idle = ready(env)?;
    State::get(&idle.vcpus[0])?.set(c.vcpu())?;
    let n = b.total(0);
    spin(&c, 6)?;
    ensure!(
        b.total(0) <= n + 1,
        "{} interrupts of a timer that was stopped",
        b.total(0) - n
    );
    Ok(())
}

/// The same registers by MSR.
fn x2apic(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable_x2apic()?;
    c.done(Op::Sti, 0, 0)?;
    c.xwrite(reg::DIVIDE, BY_1.into())?;
    c.xwrite(reg::LVT_TIMER, V.into())?;
    c.xwrite(reg::INITIAL, (2 * MS).into())?;
    let (a, b) = (c.xread(reg::CURRENT)?, c.xread(reg::CURRENT)?);
    ensure!(b < a && a <= (2 * MS).into(), "current counts {a} and {b}");
    until(&c, 1)?;
    c.xwrite(reg::LVT_TIMER, u64::from(DEADLINE | V))?;
    c.wrmsr(msr::TSC_DEADLINE, now(&c)? + khz(&c)?)?;
    until(&c, 2)?;
    ensure_eq!(g.log(0), vec![V as u8, V as u8], "interrupts");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "apic_timer",
        tests![
            one_shot,
            periodic,
            short_period,
            divide,
            bus_cycles,
            deadline,
            deadline_scaled,
            mode_changes,
            masked,
            held_back,
            wakes,
            crowd,
            migrates,
            x2apic,
        ],
    )
}
