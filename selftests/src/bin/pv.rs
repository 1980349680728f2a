// SPDX-License-Identifier: GPL-2.0

//! KVM's paravirtual features but for its clock: CPUID and the MSRs, steal time, ends of interrupts without an exit.

use kvm_bindings as kb;
use selftests::apic::{self, block, reg, Answer, Chip, Guest, Op, State, GP, OWN_CODE};
use selftests::dirty;
use selftests::guest::{at, pte, usize_of};
use selftests::host::{cpus, patient, sleep_ms};
use selftests::mem::Mapping;
use selftests::{
    ensure, ensure_eq, fail, guest_code, skip, smp, sys, tests, Env, Outcome, Verdict,
};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const SIGNATURE_LEAF: u32 = 0x4000_0000;
const FEATURES_LEAF: u32 = 0x4000_0001;

const STEAL_TIME: u32 = 5;
const PV_EOI: u32 = 6;
const PV_TLB_FLUSH: u32 = 9;
const POLL_CONTROL: u32 = 12;

const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
const MSR_PV_EOI: u32 = 0x4b56_4d04;
const MSR_POLL_CONTROL: u32 = 0x4b56_4d05;

/// The MSRs that are tested here, with their features, a value that each takes, and values that it does not.
const MSRS: [(u32, u32, u64, &[u64]); 3] = [
    (MSR_STEAL_TIME, STEAL_TIME, AT | 1, &[AT | 3, AT | 0x21, 2]),
    (MSR_PV_EOI, PV_EOI, AT | 5, &[AT | 3, 2, NOWHERE | 1]),
    (MSR_POLL_CONTROL, POLL_CONTROL, 0, &[2, 3, 1 << 63]),
];

/// A structure of the guest's.
const AT: u64 = at::DATA;
/// No memory is here.
const NOWHERE: u64 = 0x1000_0000;

/// Whether the device announces a feature.
fn has(g: &Guest, bit: u32) -> Result<bool, Verdict> {
    let cpuid = g.kvm.supported_cpuid()?;
    Ok(cpuid
        .find(FEATURES_LEAF, 0)
        .is_some_and(|e| (e.eax >> bit) & 1 != 0))
}

fn need(g: &Guest, bit: u32) -> Outcome {
    if !has(g, bit)? {
        skip!("the feature is not announced");
    }
    Ok(())
}

/// A guest of one vCPU.
fn one(env: &Env) -> Result<Guest, Verdict> {
    Guest::new(env, Chip::Split, 1)
}

fn enforce(g: &Guest) -> Outcome {
    let cap = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    g.vcpus[0].fd.ioctl_ref(sys::KVM_ENABLE_CAP, &cap)?;
    Ok(())
}

/// What is announced is there, takes what it should and nothing else, and is listed to be saved.
fn msrs(env: &Env) -> Outcome {
    let g = one(env)?;
    let mut list = [0u32; 1025];
    list[0] = 1024;
    g.kvm.fd.ioctl_mut(sys::KVM_GET_MSR_INDEX_LIST, &mut list)?;
    let listed = &list[1..=list[0] as usize];
    for (msr, bit, good, bad) in MSRS {
        if !has(&g, bit)? {
            continue;
        }
        ensure!(listed.contains(&msr), "MSR {msr:#x} is not listed");
        let begin = u64::from(msr == MSR_POLL_CONTROL);
        ensure_eq!(g.vcpus[0].msr(msr)?, Some(begin), "{msr:#x} to begin with");
        g.cpu(0).wrmsr(msr, good)?;
        ensure_eq!(g.cpu(0).rdmsr(msr)?, good, "{msr:#x} by the guest");
        ensure_eq!(g.vcpus[0].msr(msr)?, Some(good), "{msr:#x} by the VMM");
        for value in bad {
            ensure_eq!(
                g.cpu(0).call(Op::Wrmsr, msr.into(), *value)?,
                GP,
                "{value:#x} to {msr:#x}"
            );
            ensure!(
                !g.vcpus[0].set_msr(msr, *value)?,
                "the VMM's {value:#x} to {msr:#x}"
            );
            ensure_eq!(g.cpu(0).rdmsr(msr)?, good, "{msr:#x} after {value:#x}");
        }
        g.cpu(0).wrmsr(msr, 0)?;
        ensure_eq!(g.cpu(0).rdmsr(msr)?, 0, "{msr:#x} cleared");
        ensure!(g.vcpus[0].set_msr(msr, good)?, "the VMM's {good:#x}");
        ensure_eq!(g.cpu(0).rdmsr(msr)?, good, "{msr:#x} of the VMM");
    }
    Ok(())
}

/// With the features enforced, CPUID decides, wherever KVM's leaves are in it.
fn enforced(env: &Env) -> Outcome {
    if env.open()?.capability(kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID) != 1 {
        skip!("no KVM_CAP_ENFORCE_PV_FEATURE_CPUID");
    }
    for (base, signed) in [(0u32, true), (0x100, true), (0xff00, true), (0x100, false)] {
        for (msr, bit, good, _) in MSRS {
            for announced in [true, false] {
                let g = one(env)?;
                let mut cpuid = g.kvm.supported_cpuid()?;
                apic::set_apic_id(&mut cpuid, 0);
                for e in cpuid.list_mut() {
                    match e.function {
                        SIGNATURE_LEAF => {
                            e.function += base;
                            e.eax += base;
                            e.ebx ^= u32::from(!signed);
                        }
                        FEATURES_LEAF => {
                            e.function += base;
                            e.eax = if announced {
                                e.eax | (1 << bit)
                            } else {
                                !(1 << bit)
                            };
                        }
                        _ => {}
                    }
                }
                g.vcpus[0].set_cpuid(&cpuid)?;
                enforce(&g)?;
                let want = |value| {
                    if announced && signed {
                        Answer::Done(value)
                    } else {
                        GP
                    }
                };
                let c = g.cpu(0);
                let what = format!("{msr:#x} with leaves at {base:#x}, {announced}, {signed}");
                let wrote = c.call(Op::Wrmsr, msr.into(), good)?;
                ensure_eq!(
                    matches!(wrote, Answer::Done(_)),
                    want(0) != GP,
                    "write of {what}"
                );
                ensure_eq!(
                    c.call(Op::Rdmsr, msr.into(), 0)?,
                    want(good),
                    "read of {what}"
                );
            }
        }
    }
    Ok(())
}

/// `struct kvm_steal_time`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Steal {
    steal: u64,
    version: u32,
    flags: u32,
    preempted: u8,
    pad: [u8; 3],
}

fn steal(g: &Guest) -> Steal {
    g.mem.read(usize_of(AT))
}

/// The byte that says that the vCPU has no CPU.
fn preempted(g: &Guest) -> &AtomicU8 {
    let byte = g.mem.addr() + usize_of(AT) + 16;
    // SAFETY: The guest's memory is mapped as long as the guest is borrowed; others change it atomically.
    unsafe { &*(byte as *const AtomicU8) }
}

/// Steal time is kept with each KVM_RUN, in a way in which it can be read.
fn steal_time(env: &Env) -> Outcome {
    let g = one(env)?;
    need(&g, STEAL_TIME)?;
    let c = g.cpu(0);
    for junk in [0u32, 7, u32::MAX] {
        g.mem.write(usize_of(AT) + 8, junk);
        g.mem.write(usize_of(AT) + 16, 0xffu8);
        c.wrmsr(MSR_STEAL_TIME, AT | 1)?;
        c.done(Op::Nop, 0, 0)?;
        let mut last = steal(&g);
        ensure_eq!(last.version % 2, 0, "version after {junk}");
        ensure_eq!(last.preempted, 0, "preempted");
        for _ in 0..5 {
            c.done(Op::Nop, 0, 0)?;
            let now = steal(&g);
            ensure!(
                now.version != last.version && now.version % 2 == 0,
                "version {} after {}",
                now.version,
                last.version
            );
            ensure!(
                now.steal >= last.steal,
                "{} after {}",
                now.steal,
                last.steal
            );
            ensure_eq!((now.flags, now.preempted), (0, 0), "the rest");
            last = now;
        }
    }
    // Not any more.
    c.wrmsr(MSR_STEAL_TIME, AT)?;
    c.done(Op::Nop, 0, 0)?;
    let last = steal(&g);
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(steal(&g), last, "after it was disabled");
    Ok(())
}

/// A vCPU that shares its CPU with another thread has that time stolen, and says when it has no CPU.
fn shared_cpu(env: &Env) -> Outcome {
    let g = one(env)?;
    need(&g, STEAL_TIME)?;
    g.cpu(0).wrmsr(MSR_STEAL_TIME, AT | 1)?;
    g.cpu(0).done(Op::Nop, 0, 0)?;
    let before = steal(&g);
    let stop = AtomicBool::new(false);
    // Until the u64 there is 1.
    let end = AT + 0x200;
    g.cpu(0).load(Op::Until, end, 1)?;
    let seen = std::thread::scope(|scope| {
        let spinner = scope.spawn(|| {
            if let Some(&cpu) = cpus().first() {
                let _ = selftests::host::pin(0, cpu);
            }
            let mut seen = 0u32;
            while !stop.load(Ordering::SeqCst) {
                // Only who runs in its place can see it.
                seen += u32::from(preempted(&g).load(Ordering::SeqCst) & 1);
            }
            seen
        });
        let result = smp::run(&g, &[0], true, |t| {
            let mut waited = 0;
            while steal(&g).steal < before.steal + 30_000_000 && !t.failed() {
                ensure!(
                    waited < patient(5000),
                    "nothing was stolen: {:?}",
                    steal(&g)
                );
                sleep_ms(1);
                waited += 1;
            }
            g.mem.write(usize_of(end), 1u64);
            g.wait("the guest", || t.all_done())
        });
        stop.store(true, Ordering::SeqCst);
        let seen = spinner.join().unwrap_or(0);
        result.map(|()| seen)
    })?;
    ensure!(seen > 0, "the vCPU never said that it had no CPU");
    ensure_eq!(steal(&g).preempted, 0, "at the end");
    Ok(())
}

/// Where the guest looks while the tables change.
const WINDOW: u64 = 0x40_0000;

guest_code!(watcher, ".code64",
    // Reads through the window until it leads elsewhere.
    "2: mov rax, [{W} + {O}]", "cmp rax, rdi", "jne 2b", "jmp r15";
    W = WINDOW, O = 0x18_0000u64
);

/// A vCPU that has no CPU can be asked to flush its TLB, and has done so when it goes on.
fn flush(env: &Env) -> Outcome {
    let g = one(env)?;
    need(&g, STEAL_TIME)?;
    need(&g, PV_TLB_FLUSH)?;
    // It is the VMM that writes to the guest's tables here. Where these are shadowed, nobody sees that.
    if g.kvm.capability(kb::KVM_CAP_PRE_FAULT_MEMORY) <= 0 {
        skip!("the guest's tables are shadowed");
    }
    // The window leads to the guest's memory, or to other memory far away.
    let far = Mapping::new(0x20_0000, false)?;
    g.vm.set_memory(1, 0, 0x800_0000, far.len() as u64, far.addr() as u64)?;
    let entry = usize_of(at::PD + (WINDOW >> 21) * 8);
    let near = pte::P | pte::W | pte::PS;
    g.mem.write(usize_of(0x18_0000), 0u64);
    g.cpu(0).start()?;
    g.mem.write_bytes(usize_of(OWN_CODE), watcher());
    g.cpu(0).wrmsr(MSR_STEAL_TIME, AT | 1)?;
    let stop = AtomicBool::new(false);
    for round in 1..=20u64 {
        g.mem.write(entry, near);
        far.write(usize_of(0x18_0000), round);
        // A write of CR3 by the VMM flushes what the last round has left.
        let s = g.vcpus[0].sregs()?;
        g.vcpus[0].set_sregs(&s)?;
        g.cpu(0).load_at(OWN_CODE, round, 0)?;
        stop.store(false, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let asker = scope.spawn(|| {
                if let Some(&cpu) = cpus().first() {
                    let _ = selftests::host::pin(0, cpu);
                }
                while !stop.load(Ordering::SeqCst) {
                    let byte = preempted(&g);
                    if byte.load(Ordering::SeqCst) == 1 {
                        g.mem.write(entry, 0x800_0000 | near);
                        // As a guest does; an interrupt would have to do otherwise.
                        if byte
                            .compare_exchange(1, 3, Ordering::SeqCst, Ordering::SeqCst)
                            .is_ok()
                        {
                            return true;
                        }
                    }
                }
                false
            });
            let result = smp::run(&g, &[0], true, |t| {
                g.wait("the flush", || t.all_done() || t.failed())
            });
            stop.store(true, Ordering::SeqCst);
            let asked = asker.join().unwrap_or(false);
            result?;
            ensure!(asked, "the vCPU saw what nobody has told it");
            ensure_eq!(steal(&g).preempted, 0, "preempted");
            Ok(())
        })?;
    }
    Ok(())
}

/// What is not there is not written to, and does not end the guest's run; what comes later is.
fn bad_addresses(env: &Env) -> Outcome {
    let g = one(env)?;
    need(&g, STEAL_TIME)?;
    let c = g.cpu(0);
    let version = |m: &Mapping| m.read::<u32>(8);
    for gpa in [NOWHERE, 0xf_ffff_ffff_ffc0, u64::MAX << 6] {
        c.wrmsr(MSR_STEAL_TIME, gpa | 1)?;
        c.done(Op::Nop, 0, 0)?;
    }
    c.wrmsr(MSR_STEAL_TIME, NOWHERE | 1)?;
    let m = Mapping::new(0x1000, false)?;
    let set = |flags, size| g.vm.set_memory(1, flags, NOWHERE, size, m.addr() as u64);
    c.done(Op::Nop, 0, 0)?;
    // Now there is memory.
    set(0, 0x1000)?;
    c.done(Op::Nop, 0, 0)?;
    ensure!(version(&m) != 0, "not written to new memory");
    // And none.
    set(0, 0)?;
    let last = version(&m);
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(version(&m), last, "of memory that has gone");
    // Read-only.
    set(kb::KVM_MEM_READONLY, 0x1000)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(version(&m), last, "of read-only memory");
    set(0, 0)?;
    // Not the VMM's any more.
    set(0, 0x1000)?;
    c.done(Op::Nop, 0, 0)?;
    ensure!(version(&m) != last, "of new memory");
    m.unmap(0, 0x1000)?;
    for _ in 0..3 {
        c.done(Op::Nop, 0, 0)?;
    }
    m.replace(0, 0x1000, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    c.done(Op::Nop, 0, 0)?;
    ensure!(version(&m) != 0, "of memory that is back");
    Ok(())
}

/// What the kernel writes is dirty.
fn dirty_log(env: &Env) -> Outcome {
    let g = one(env)?;
    need(&g, STEAL_TIME)?;
    let m = Mapping::new(0x4000, false)?;
    let flags = kb::KVM_MEM_LOG_DIRTY_PAGES;
    g.vm.set_memory(1, flags, NOWHERE, 0x4000, m.addr() as u64)?;
    let c = g.cpu(0);
    c.wrmsr(MSR_STEAL_TIME, NOWHERE | 0x1000 | 1)?;
    for _ in 0..3 {
        c.done(Op::Nop, 0, 0)?;
        let log = dirty::get_log(&g.vm, 1, 4)?;
        ensure_eq!(log.pages().collect::<Vec<_>>(), [1], "dirty pages");
    }
    Ok(())
}

/// Memslots come and go under a vCPU that has its steal time kept in one.
fn races(env: &Env) -> Outcome {
    let g = one(env)?;
    need(&g, STEAL_TIME)?;
    let m = Mapping::new(0x1000, false)?;
    g.cpu(0).wrmsr(MSR_STEAL_TIME, NOWHERE | 1)?;
    let end = AT + 0x200;
    g.mem.write(usize_of(end), 0u64);
    g.cpu(0).load(Op::Until, end, 1)?;
    smp::run(&g, &[0], false, |t| {
        let all = cpus();
        for round in 0..env.fewer(200) as usize {
            g.vm.set_memory(1, 0, NOWHERE, 0x1000, m.addr() as u64)?;
            t.kick(0);
            if round % 8 == 0 {
                t.pin(0, all[round / 8 % all.len()])?;
            }
            if round % 2 == 0 {
                sleep_ms(1);
            }
            g.vm.set_memory(1, 0, NOWHERE, 0, m.addr() as u64)?;
            let gone = m.read::<u32>(8);
            t.kick(0);
            sleep_ms(1);
            ensure_eq!(m.read::<u32>(8), gone, "written to after it was deleted");
        }
        g.mem.write(usize_of(end), 1u64);
        g.wait("the guest", || t.all_done())
    })
}

// Ends the interrupt as a guest does that knows of the bit; counts what needed an exit.
guest_code!(end, ".code64",
    "btr dword ptr gs:[{F}], 0",
    "jc 2f",
    "inc dword ptr gs:[{F} + 8]",
    "mov ecx, 0x80b", "xor eax, eax", "xor edx, edx", "wrmsr",
    "2: ret";
    F = block::OWN
);

/// Interrupts end, with and without an exit, and each makes way for the next.
fn eoi(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    need(&g, PV_EOI)?;
    let c = g.cpu(0);
    c.enable_x2apic()?;
    g.acknowledge(0, block::NONE);
    g.hook(0, end());
    c.wrmsr(MSR_PV_EOI, (g.block(0) + block::OWN) | 1)?;
    c.done(Op::Sti, 0, 0)?;
    let mut sent = 0;
    // One at a time, the same and others, and some at once that nest.
    for vector in [0x51u32, 0x51, 0x61, 0x41, 0xf1] {
        c.xipi(apic::icr::SELF | vector, 0)?;
        sent += 1;
        ensure_eq!(g.total(0), sent, "interrupts so far");
    }
    for _ in 0..20 {
        c.done(Op::Cli, 0, 0)?;
        for vector in [0x41u32, 0x51, 0x61] {
            c.xipi(apic::icr::SELF | vector, 0)?;
            sent += 1;
        }
        c.done(Op::Sti, 0, 0)?;
        ensure_eq!(g.total(0), sent, "interrupts so far");
    }
    let s = State::get(&g.vcpus[0])?;
    for word in 0..8 {
        ensure_eq!(s.reg(reg::ISR + word * 16), 0, "ISR {word}");
        ensure_eq!(s.reg(reg::IRR + word * 16), 0, "IRR {word}");
    }
    let flag = g.mem.read::<u32>(usize_of(g.block(0) + block::OWN));
    ensure_eq!(flag, 0, "the bit outside the guest");
    Ok(())
}

/// The bit does not outlive what it was for: state that is saved has the interrupt in service, or not.
fn eoi_saved(env: &Env) -> Outcome {
    guest_code!(hook, ".code64", "out {P}, al", "ret"; P = 0x81u16);
    let g = Guest::new(env, Chip::Split, 1)?;
    need(&g, PV_EOI)?;
    let c = g.cpu(0);
    c.enable_x2apic()?;
    g.acknowledge(0, block::NONE);
    g.hook(0, hook());
    let word = g.block(0) + block::OWN;
    c.wrmsr(MSR_PV_EOI, word | 1)?;
    c.done(Op::Sti, 0, 0)?;
    // It leaves for the VMM in the middle of the interrupt.
    c.load(
        Op::Wrmsr,
        u64::from(apic::msr::X2APIC + (reg::ICR >> 4)),
        u64::from(apic::icr::SELF | 0x51),
    )?;
    match c.finish() {
        Err(Verdict::Fail(_)) => {}
        r => fail!("{r:?}, expected an output"),
    }
    ensure_eq!(g.mem.read::<u32>(usize_of(word)) & 1, 0, "the bit");
    let s = State::get(&g.vcpus[0])?;
    ensure!(s.vector(reg::ISR, 0x51), "not in service");
    // There is no word any more: it ends by a write.
    c.finish()?;
    g.hook(0, end());
    c.xwrite(reg::EOI, 0)?;
    let s = State::get(&g.vcpus[0])?;
    ensure!(!s.vector(reg::ISR, 0x51), "still in service");
    Ok(())
}

/// Two vCPUs that interrupt each other, and end it as they can.
fn eoi_storm(env: &Env) -> Outcome {
    guest_code!(sender, ".code64",
        // So many, each when the one before has come.
        "mov ebp, {N}", "sti",
        "2: mov ecx, 0x830", "mov eax, 0x51", "mov rdx, rdi", "wrmsr",
        "3: pause", "cmp dword ptr gs:[0x10], ebx", "je 3b",
        "mov ebx, gs:[0x10]",
        "dec ebp", "jnz 2b",
        "cli", "jmp r15";
        N = 200
    );
    for crowded in [true, false] {
        let g = Guest::new(env, Chip::Split, 2)?;
        need(&g, PV_EOI)?;
        g.mem.write_bytes(usize_of(OWN_CODE), sender());
        for id in 0..2 {
            let c = g.cpu(id);
            c.enable_x2apic()?;
            g.acknowledge(id, block::NONE);
            g.hook(id, end());
            c.wrmsr(MSR_PV_EOI, (g.block(id) + block::OWN) | 1)?;
            let mut r = g.vcpus[id].regs()?;
            (r.rsi, r.rdi, r.rbx) = (OWN_CODE, 1 - id as u64, 0);
            g.vcpus[id].set_regs(&r)?;
        }
        smp::run(&g, &[0, 1], crowded, |t| {
            // The last one may have come with nobody left to answer it.
            g.wait("interrupts", || t.done(0) || t.done(1))
        })?;
        for id in 0..2 {
            ensure!(g.total(id) >= 199, "{} interrupts of {id}", g.total(id));
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "pv",
        tests![
            msrs,
            enforced,
            steal_time,
            shared_cpu,
            flush,
            bad_addresses,
            dirty_log,
            races,
            eoi,
            eoi_saved,
            eoi_storm,
        ],
    )
}
