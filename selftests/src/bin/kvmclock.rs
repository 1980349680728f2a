// SPDX-License-Identifier: GPL-2.0

//! kvmclock: the structures in guest memory, KVM_GET_CLOCK and KVM_SET_CLOCK, KVM_KVMCLOCK_CTRL, and that the time does
//! not go back.

use kvm_bindings as kb;
use selftests::apic::{Answer, Chip, Guest, Op, GP, OWN_CODE};
use selftests::check::expect_errno;
use selftests::guest::{at, usize_of};
use selftests::host::{cpus, patient, rdtsc, sleep_ms};
use selftests::mem::Mapping;
use selftests::{ensure, ensure_eq, guest_code, skip, smp, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

const WALL_CLOCK_OLD: u32 = 0x11;
const SYSTEM_TIME_OLD: u32 = 0x12;
const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const TSC: u32 = 0x10;

const TSC_STABLE: u8 = 1;
const GUEST_STOPPED: u8 = 2;
const SECOND: u64 = 1_000_000_000;

/// Where the guests have their structures: a page for each vCPU.
const AREAS: u64 = 0xc_0000;
/// The latest time that any vCPU has seen, by how much one was behind it, and how often.
const LATEST: u64 = at::DATA;

// Reads the time from the structure at RDI, RAX times, and compares it with what others have seen before.
guest_code!(
    read_time, ".code64",
    "mov r12, rax",
    "mov r9d, {L}",
    "2: mov r8, [r9]",
    "3: mov r10d, [rdi]",
    "test r10d, 1",
    "jnz 3b",
    "lfence",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, [rdi + 8]",
    "movsx ecx, byte ptr [rdi + 28]",
    "test ecx, ecx",
    "js 4f",
    "shl rax, cl",
    "jmp 5f",
    "4: neg ecx",
    "shr rax, cl",
    "5: mov edx, [rdi + 24]",
    "mul rdx",
    "shrd rax, rdx, 32",
    "add rax, [rdi + 16]",
    "cmp r10d, [rdi]",
    "jne 3b",
    "mov r11, rax",
    "cmp rax, r8",
    "jae 6f",
    "sub r8, rax",
    "mov [r9 + 8], r8",
    "inc qword ptr [r9 + 16]",
    "6: mov rax, [r9]",
    "7: cmp rax, r11",
    "jae 8f",
    "lock cmpxchg [r9], r11",
    "jne 7b",
    "8: dec r12",
    "jnz 2b",
    "mov rax, r11",
    "jmp r15";
    L = LATEST
);

/// The structure of vCPU `id`.
const fn area(id: usize) -> u64 {
    AREAS + id as u64 * 0x1000
}

/// `struct pvclock_vcpu_time_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Time {
    version: u32,
    tsc: u64,
    time: u64,
    multiplier: u32,
    flags: u8,
}

fn time(g: &Guest, gpa: u64) -> Time {
    let at = usize_of(gpa);
    Time {
        version: g.mem.read(at),
        tsc: g.mem.read(at + 8),
        time: g.mem.read(at + 16),
        multiplier: g.mem.read(at + 24),
        flags: g.mem.read(at + 29),
    }
}

fn get_clock(g: &Guest) -> Result<kb::kvm_clock_data, Verdict> {
    let mut data = kb::kvm_clock_data::default();
    g.vm.fd.ioctl_mut(sys::KVM_GET_CLOCK, &mut data)?;
    Ok(data)
}

fn set_clock(g: &Guest, clock: u64) -> Outcome {
    let data = kb::kvm_clock_data {
        clock,
        ..Default::default()
    };
    g.vm.fd.ioctl_ref(sys::KVM_SET_CLOCK, &data)?;
    Ok(())
}

/// Guests with `n` vCPUs, the device's kvmclock being there.
fn guest(env: &Env, n: usize) -> Result<Guest, Verdict> {
    let kvm = env.open()?;
    let cpuid = kvm.supported_cpuid()?;
    let features = cpuid.find(0x4000_0001, 0).map_or(0, |e| e.eax);
    if kvm.capability(kb::KVM_CAP_ADJUST_CLOCK) <= 0 || features & 8 == 0 {
        skip!("no kvmclock");
    }
    let g = Guest::new(env, Chip::Split, n)?;
    for id in 0..n {
        g.cpu(id).start()?;
    }
    g.mem.write_bytes(usize_of(OWN_CODE), read_time());
    Ok(g)
}

/// Has vCPU `id` tell the time by the structure at `gpa`.
fn read(g: &Guest, id: usize, gpa: u64) -> Result<u64, Verdict> {
    g.mem.fill(usize_of(LATEST), 24, 0);
    g.cpu(id).load_at(OWN_CODE, gpa, 1)?;
    match g.cpu(id).finish()? {
        Answer::Done(v) => Ok(v),
        fault => Err(Verdict::Fail(format!("{fault:x?}"))),
    }
}

/// Switches the clock of vCPU `id` on.
fn switch_on(g: &Guest, id: usize) -> Outcome {
    g.cpu(id).wrmsr(SYSTEM_TIME, area(id) | 1)
}

/// The guest's time lies between two looks of the VMM's.
fn agrees(g: &Guest, id: usize, what: &str) -> Result<u64, Verdict> {
    let before = get_clock(g)?.clock;
    let seen = read(g, id, area(id))?;
    let after = get_clock(g)?.clock;
    ensure!(
        before <= seen && seen <= after,
        "{what}: vCPU {id} sees {seen}, not from {before} to {after}; {:x?}",
        time(g, area(id))
    );
    Ok(seen)
}

/// The MSRs keep what is written; the new and the old are the same.
fn registers(env: &Env) -> Outcome {
    let g = guest(env, 2)?;
    let (c, d) = (g.cpu(0), g.cpu(1));
    for msr in [SYSTEM_TIME_OLD, SYSTEM_TIME, WALL_CLOCK_OLD, WALL_CLOCK] {
        ensure_eq!(c.rdmsr(msr)?, 0, "{msr:#x} at first");
    }
    for (msr, other) in [
        (SYSTEM_TIME, SYSTEM_TIME_OLD),
        (SYSTEM_TIME_OLD, SYSTEM_TIME),
    ] {
        for value in [area(0) | 1, area(0), 0, 1, u64::MAX, 0xdead_0000_0000_0001] {
            c.wrmsr(msr, value)?;
            for which in [msr, other] {
                ensure_eq!(c.rdmsr(which)?, value, "{which:#x}");
                ensure_eq!(c.vcpu().msr(which)?, Some(value), "{which:#x} for the VMM");
                ensure_eq!(d.rdmsr(which)?, 0, "{which:#x} of the other vCPU");
            }
        }
    }
    // The wall clock is the VM's.
    for (msr, other) in [(WALL_CLOCK, WALL_CLOCK_OLD), (WALL_CLOCK_OLD, WALL_CLOCK)] {
        for value in [area(2), 0, u64::MAX & !7] {
            c.wrmsr(msr, value)?;
            ensure_eq!(d.rdmsr(other)?, value, "{other:#x} of the other vCPU");
        }
    }
    // A VMM that restores them switches the clock on.
    ensure!(d.vcpu().set_msr(SYSTEM_TIME, area(1) | 1)?, "KVM_SET_MSRS");
    d.done(Op::Nop, 0, 0)?;
    ensure!(
        time(&g, area(1)).version != 0,
        "nothing was written for the VMM"
    );
    Ok(())
}

/// What is not promised is there all the same, unless the VMM wants it so.
fn enforced(env: &Env) -> Outcome {
    let g = guest(env, 1)?;
    let c = g.cpu(0);
    if g.kvm.capability(kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID) <= 0 {
        skip!("no KVM_CAP_ENFORCE_PV_FEATURE_CPUID");
    }
    let mut cpuid = c.vcpu().cpuid()?;
    for e in cpuid.list_mut() {
        if e.function == 0x4000_0001 {
            e.eax &= !9;
        }
    }
    let g = Guest::created(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.vcpu().set_cpuid(&cpuid)?;
    g.reset(0)?;
    c.start()?;
    for msr in [SYSTEM_TIME_OLD, SYSTEM_TIME, WALL_CLOCK_OLD, WALL_CLOCK] {
        c.wrmsr(msr, 0)?;
    }
    let cap = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    c.vcpu().fd.ioctl_ref(sys::KVM_ENABLE_CAP, &cap)?;
    for msr in [SYSTEM_TIME_OLD, SYSTEM_TIME, WALL_CLOCK_OLD, WALL_CLOCK] {
        ensure_eq!(c.call(Op::Wrmsr, msr.into(), 0)?, GP, "WRMSR of {msr:#x}");
        ensure_eq!(c.call(Op::Rdmsr, msr.into(), 0)?, GP, "RDMSR of {msr:#x}");
    }
    Ok(())
}

/// KVM_GET_CLOCK and KVM_SET_CLOCK.
fn ioctls(env: &Env) -> Outcome {
    let g = guest(env, 1)?;
    let known = kb::KVM_CLOCK_TSC_STABLE | kb::KVM_CLOCK_REALTIME | kb::KVM_CLOCK_HOST_TSC;
    ensure_eq!(
        g.kvm.capability(kb::KVM_CAP_ADJUST_CLOCK),
        known as i32,
        "KVM_CAP_ADJUST_CLOCK"
    );
    let mut last = 0;
    for _ in 0..100 {
        let real = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64);
        let before = rdtsc();
        let data = get_clock(&g)?;
        let after = rdtsc();
        ensure!(data.clock >= last, "{} after {last}", data.clock);
        last = data.clock;
        ensure!(data.clock < 3600 * SECOND, "a new VM's clock: {data:?}");
        ensure_eq!(data.flags & !known, 0, "flags");
        if data.flags & kb::KVM_CLOCK_HOST_TSC != 0 {
            ensure!(
                before <= data.host_tsc && data.host_tsc <= after,
                "TSC {before}, {data:?}, {after}"
            );
        }
        if data.flags & kb::KVM_CLOCK_REALTIME != 0 {
            ensure!(
                data.realtime.abs_diff(real) < 10 * SECOND,
                "{data:?} at {real}"
            );
        }
    }
    for clock in [0, 1, 180 * SECOND, 1 << 62] {
        set_clock(&g, clock)?;
        let now = get_clock(&g)?.clock;
        ensure!(
            now >= clock && now - clock < 60 * SECOND,
            "{now} after {clock}"
        );
    }
    // What has passed since by the wall clock is added; what is to come is not taken away.
    let mut data = get_clock(&g)?;
    if data.flags & kb::KVM_CLOCK_REALTIME != 0 {
        for (real, least) in [
            (data.realtime - 1000 * SECOND, 1000 * SECOND),
            (data.realtime + 1000 * SECOND, 0),
        ] {
            let set = kb::kvm_clock_data {
                clock: 5,
                flags: kb::KVM_CLOCK_REALTIME,
                realtime: real,
                ..data
            };
            g.vm.fd.ioctl_ref(sys::KVM_SET_CLOCK, &set)?;
            let now = get_clock(&g)?.clock;
            ensure!(
                now >= least && now - least < 60 * SECOND,
                "{now} after {least}"
            );
        }
    }
    // What was got can be set.
    data = get_clock(&g)?;
    g.vm.fd.ioctl_ref(sys::KVM_SET_CLOCK, &data)?;
    let now = get_clock(&g)?.clock;
    for bit in 0..32 {
        if known & (1 << bit) == 0 {
            let set = kb::kvm_clock_data {
                flags: 1 << bit,
                ..Default::default()
            };
            let r = g.vm.fd.ioctl_ref(sys::KVM_SET_CLOCK, &set);
            expect_errno(r, libc::EINVAL, &format!("flag {bit}"))?;
        }
    }
    for ioctl in [sys::KVM_GET_CLOCK, sys::KVM_SET_CLOCK] {
        let r = g.vm.fd.ioctl(ioctl, 8);
        expect_errno(r, libc::EFAULT, "no memory")?;
    }
    ensure!(get_clock(&g)?.clock >= now, "the clock went back");
    Ok(())
}

/// The guest sees the time that the VMM sees, whatever becomes of its counter.
fn one_time(env: &Env) -> Outcome {
    let g = guest(env, 2)?;
    for id in 0..2 {
        switch_on(&g, id)?;
        agrees(&g, id, "at first")?;
        let t = time(&g, area(id));
        ensure!(t.version != 0 && t.version % 2 == 0, "{t:x?}");
        ensure!(t.multiplier >> 31 == 1, "{t:x?}");
    }
    let stable = get_clock(&g)?.flags & kb::KVM_CLOCK_TSC_STABLE != 0;
    ensure_eq!(
        time(&g, area(0)).flags & TSC_STABLE != 0,
        stable,
        "PVCLOCK_TSC_STABLE_BIT"
    );
    for clock in [0, 180 * SECOND, 1 << 62] {
        set_clock(&g, clock)?;
        for id in 0..2 {
            agrees(&g, id, "after KVM_SET_CLOCK")?;
        }
    }
    for (id, value) in [(0, 1u64 << 40), (1, 1 << 40), (0, 0), (1, 1 << 50)] {
        ensure!(g.vcpus[id].set_msr(TSC, value)?, "write of IA32_TSC");
        for id in 0..2 {
            agrees(&g, id, "after the VMM has set the counter")?;
        }
    }
    g.cpu(1).wrmsr(0x3b, 1 << 33)?;
    agrees(&g, 1, "after IA32_TSC_ADJUST")?;
    g.cpu(0).wrmsr(SYSTEM_TIME_OLD, area(0) | 1)?;
    for id in 0..2 {
        agrees(&g, id, "after the old register")?;
    }
    Ok(())
}

/// The clock of a vCPU whose counter has another rate is right.
fn scaled(env: &Env) -> Outcome {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_VM_TSC_CONTROL) <= 0 {
        skip!("no KVM_CAP_VM_TSC_CONTROL");
    }
    let _ = guest(env, 1)?;
    for (numerator, denominator) in [(2, 1), (1, 2), (10, 9), (1, 7)] {
        let g = Guest::prepared(env, Chip::Split, 1, |vm| {
            let host = vm.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?;
            let khz = usize::try_from(host).unwrap_or(0) * numerator / denominator;
            vm.fd.ioctl(sys::KVM_SET_TSC_KHZ, khz)?;
            Ok(())
        })?;
        g.cpu(0).start()?;
        g.mem.write_bytes(usize_of(OWN_CODE), read_time());
        switch_on(&g, 0)?;
        // What is rounded in the one rate and in the other is not the same.
        for _ in 0..3 {
            let before = get_clock(&g)?.clock;
            let seen = read(&g, 0, area(0))?;
            let after = get_clock(&g)?.clock;
            ensure!(
                before <= seen + 1000 && seen <= after + 1000,
                "{numerator}/{denominator}: {seen}, not from {before} to {after}"
            );
            sleep_ms(20);
        }
    }
    Ok(())
}

/// When the clock began, by the host's calendar.
fn wall_clock(env: &Env) -> Outcome {
    let g = guest(env, 1)?;
    let c = g.cpu(0);
    let mut version = 0;
    for (msr, clock) in [
        (WALL_CLOCK, 0),
        (WALL_CLOCK_OLD, 1000 * SECOND),
        (WALL_CLOCK, 5),
    ] {
        set_clock(&g, clock)?;
        c.wrmsr(msr, area(0))?;
        let at = usize_of(area(0));
        let (v, sec, nsec): (u32, u32, u32) =
            (g.mem.read(at), g.mem.read(at + 4), g.mem.read(at + 8));
        ensure!(v % 2 == 0 && v > version, "version {v} after {version}");
        version = v;
        let real = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64);
        let now = u64::from(sec) * SECOND + u64::from(nsec) + get_clock(&g)?.clock;
        ensure!(nsec < SECOND as u32, "{nsec} nanoseconds");
        ensure!(
            now.abs_diff(real) < 10 * SECOND,
            "it would be {now}, and is {real}"
        );
    }
    // What was there may be anything.
    g.mem.write(usize_of(area(0)), u32::MAX);
    c.wrmsr(WALL_CLOCK, area(0))?;
    let v: u32 = g.mem.read(usize_of(area(0)));
    ensure!(v % 2 == 0, "version {v:#x}");
    Ok(())
}

/// KVM_KVMCLOCK_CTRL: the flag comes, and stays until the guest takes it back.
fn stopped(env: &Env) -> Outcome {
    let g = guest(env, 1)?;
    let c = g.cpu(0);
    ensure!(
        g.kvm.capability(kb::KVM_CAP_KVMCLOCK_CTRL) > 0,
        "no KVM_CAP_KVMCLOCK_CTRL"
    );
    let stop = || g.vcpus[0].fd.ioctl(sys::KVM_KVMCLOCK_CTRL, 0);
    expect_errno(stop(), libc::EINVAL, "without a clock")?;
    c.wrmsr(SYSTEM_TIME, area(0))?;
    expect_errno(stop(), libc::EINVAL, "with a clock that is off")?;
    switch_on(&g, 0)?;
    c.done(Op::Nop, 0, 0)?;
    let flags = || time(&g, area(0)).flags & GUEST_STOPPED;
    ensure_eq!(flags(), 0, "before");
    stop()?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(flags(), GUEST_STOPPED, "after");
    // It is the guest's.
    set_clock(&g, 7)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(flags(), GUEST_STOPPED, "after another update");
    g.mem.write(usize_of(area(0)) + 29, 0u8);
    set_clock(&g, 8)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(flags(), 0, "when the guest has taken it back");
    agrees(&g, 0, "then")?;
    c.wrmsr(SYSTEM_TIME, 0)?;
    expect_errno(stop(), libc::EINVAL, "with a clock that was switched off")?;
    Ok(())
}

/// Each update has a new version, and none comes when the clock is off.
fn versions(env: &Env) -> Outcome {
    let g = guest(env, 1)?;
    let c = g.cpu(0);
    // Junk.
    g.mem.fill(usize_of(area(0)), 64, 0xff);
    switch_on(&g, 0)?;
    c.done(Op::Nop, 0, 0)?;
    let mut version = time(&g, area(0)).version;
    ensure!(version % 2 == 0, "version {version:#x}");
    ensure_eq!(
        g.mem.read::<u64>(usize_of(area(0)) + 32),
        u64::MAX,
        "what is behind the structure"
    );
    for i in 0..5 {
        set_clock(&g, i * SECOND)?;
        c.done(Op::Nop, 0, 0)?;
        let now = time(&g, area(0)).version;
        ensure!(
            now % 2 == 0 && now.wrapping_sub(version) as i32 > 0,
            "version {now} after {version}"
        );
        version = now;
    }
    c.wrmsr(SYSTEM_TIME, area(0))?;
    let before = time(&g, area(0));
    set_clock(&g, 77)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(time(&g, area(0)), before, "what is written when it is off");
    Ok(())
}

/// Where there is no memory, or none to be written, nothing comes of it.
fn bad_addresses(env: &Env) -> Outcome {
    let g = guest(env, 1)?;
    let c = g.cpu(0);
    let page = Mapping::new(0x1000, false)?;
    g.vm.set_memory(
        1,
        kb::KVM_MEM_READONLY,
        0x4000_0000,
        0x1000,
        page.addr() as u64,
    )?;
    let hole = Mapping::new(0x1000, false)?;
    g.vm.set_memory(2, 0, 0x5000_0000, 0x1000, hole.addr() as u64)?;
    hole.unmap(0, 0x1000)?;
    let end = g.mem.len() as u64;
    for gpa in [
        0x4000_0000,
        0x5000_0000,
        end,
        end - 16,
        area(0) + 0xff0,
        1 << 45,
        1 << 52,
        u64::MAX & !0xfff,
        u64::MAX & !1,
    ] {
        for msr in [SYSTEM_TIME, SYSTEM_TIME_OLD] {
            c.wrmsr(msr, gpa | 1)?;
            c.done(Op::Nop, 0, 0)?;
            set_clock(&g, 1)?;
            c.done(Op::Nop, 0, 0)?;
        }
        for msr in [WALL_CLOCK, WALL_CLOCK_OLD] {
            c.wrmsr(msr, gpa)?;
        }
    }
    ensure_eq!(
        page.read::<u64>(0) | page.read::<u64>(16),
        0,
        "read-only memory"
    );
    // Memory that comes later is found.
    let late = Mapping::new(0x1000, false)?;
    c.wrmsr(SYSTEM_TIME, 0x6000_0001)?;
    c.done(Op::Nop, 0, 0)?;
    g.vm.set_memory(3, 0, 0x6000_0000, 0x1000, late.addr() as u64)?;
    set_clock(&g, 2)?;
    c.done(Op::Nop, 0, 0)?;
    ensure!(
        late.read::<u32>(0) != 0,
        "nothing is written to memory that came later"
    );
    // Misaligned, it is as good as anywhere.
    c.wrmsr(SYSTEM_TIME, (area(0) + 6) | 1)?;
    c.done(Op::Nop, 0, 0)?;
    ensure!(time(&g, area(0) + 6).version != 0, "a misaligned structure");
    Ok(())
}

/// What is written is in the dirty log.
fn dirty(env: &Env) -> Outcome {
    let g = guest(env, 1)?;
    let c = g.cpu(0);
    g.vm.set_memory(
        0,
        kb::KVM_MEM_LOG_DIRTY_PAGES,
        0,
        g.mem.len() as u64,
        g.mem.addr() as u64,
    )?;
    let mut bitmap = vec![0u64; g.mem.len() / 0x1000 / 64];
    let mut log = |gpa: u64| -> Result<bool, Verdict> {
        let arg = kb::kvm_dirty_log {
            slot: 0,
            __bindgen_anon_1: kb::kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bitmap.as_mut_ptr().cast(),
            },
            ..Default::default()
        };
        g.vm.fd.ioctl_ref(sys::KVM_GET_DIRTY_LOG, &arg)?;
        let page = usize_of(gpa >> 12);
        Ok(bitmap[page / 64] & (1 << (page % 64)) != 0)
    };
    switch_on(&g, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure!(log(area(0))?, "the first time");
    c.done(Op::Nop, 0, 0)?;
    log(area(0))?;
    set_clock(&g, 5)?;
    c.done(Op::Nop, 0, 0)?;
    ensure!(log(area(0))?, "an update");
    c.wrmsr(WALL_CLOCK, area(1))?;
    ensure!(log(area(1))?, "the wall clock");
    Ok(())
}

/// The state goes to another VM: the time goes on there.
fn moved(env: &Env) -> Outcome {
    let g = guest(env, 2)?;
    for id in 0..2 {
        switch_on(&g, id)?;
    }
    let seen = agrees(&g, 0, "here")?;
    let other = guest(env, 2)?;
    let areas = g.mem.read_bytes(usize_of(AREAS), 0x2000);
    other.mem.write_bytes(usize_of(AREAS), &areas);
    let clock = get_clock(&g)?;
    for id in 0..2 {
        for msr in [
            TSC,
            WALL_CLOCK_OLD,
            SYSTEM_TIME_OLD,
            WALL_CLOCK,
            SYSTEM_TIME,
        ] {
            let Some(value) = g.vcpus[id].msr(msr)? else {
                return Err(Verdict::Fail(format!("{msr:#x} cannot be read")));
            };
            ensure!(other.vcpus[id].set_msr(msr, value)?, "{msr:#x}");
        }
    }
    sleep_ms(10);
    other.vm.fd.ioctl_ref(sys::KVM_SET_CLOCK, &clock)?;
    for id in 0..2 {
        let there = agrees(&other, id, "there")?;
        ensure!(
            there >= clock.clock && clock.clock >= seen,
            "{seen}, {} here; {there} there",
            clock.clock
        );
        let flags = time(&other, area(id)).flags;
        ensure_eq!(
            flags & TSC_STABLE,
            time(&g, area(id)).flags & TSC_STABLE,
            "flags"
        );
    }
    Ok(())
}

/// vCPUs that are moved between the host's CPUs compare what they see.
fn compare(env: &Env, shared: bool) -> Outcome {
    let g = guest(env, 2)?;
    for id in 0..2 {
        switch_on(&g, id)?;
        g.cpu(id).done(Op::Nop, 0, 0)?;
    }
    let places = cpus();
    if (0..2).any(|id| time(&g, area(id)).flags & TSC_STABLE == 0) {
        skip!("the host's clock is not its counter");
    }
    g.mem.fill(usize_of(LATEST), 24, 0);
    for id in 0..2 {
        let which = if shared { 0 } else { id };
        g.cpu(id).load_at(OWN_CODE, area(which), u64::MAX)?;
    }
    smp::run(&g, &[0, 1], false, |t| {
        let start = Instant::now();
        let mut round = 0;
        while start.elapsed().as_millis() < u128::from(patient(500)) && !t.failed() {
            t.pin(round % 2, places[round / 2 % places.len()])?;
            t.kick(round % 2);
            sleep_ms(5);
            round += 1;
            if g.mem.read::<u64>(usize_of(LATEST) + 16) != 0 {
                break;
            }
        }
        Ok(())
    })?;
    let (latest, behind, times): (u64, u64, u64) = (
        g.mem.read(usize_of(LATEST)),
        g.mem.read(usize_of(LATEST) + 8),
        g.mem.read(usize_of(LATEST) + 16),
    );
    ensure!(latest > 100_000_000, "the guests came to {latest} only");
    ensure_eq!(times, 0, "{behind} ns back, of {latest}; times");
    Ok(())
}

/// Each by its own structure.
fn monotone(env: &Env) -> Outcome {
    compare(env, false)
}

/// Both by the structure of one, as Linux's vDSO does.
fn monotone_by_one(env: &Env) -> Outcome {
    compare(env, true)
}

fn main() -> ExitCode {
    selftests::tap::main(
        "kvmclock",
        tests![
            registers,
            enforced,
            ioctls,
            one_time,
            scaled,
            wall_clock,
            stopped,
            versions,
            bad_addresses,
            dirty,
            moved,
            monotone,
            monotone_by_one
        ],
    )
}
