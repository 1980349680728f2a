// SPDX-License-Identifier: GPL-2.0

//! MSRs that a VMM denies to its guest, and those of which it wants to be asked.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::host::{sleep_ms, Rng};
use selftests::machine::{decode, Exit};
use selftests::msr::{Access, Filter, MsrGuest};
use selftests::{ensure, ensure_eq, fail, guest_code, sys, tests, Env, Outcome};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

const READ: u32 = kb::KVM_MSR_FILTER_READ;
const WRITE: u32 = kb::KVM_MSR_FILTER_WRITE;
const BOTH: u32 = READ | WRITE;
const INVALID: u32 = kb::KVM_MSR_EXIT_REASON_INVAL;
const UNKNOWN: u32 = kb::KVM_MSR_EXIT_REASON_UNKNOWN;
const FILTERED: u32 = kb::KVM_MSR_EXIT_REASON_FILTER;

const TSC: u32 = 0x10;
const PLATFORM_INFO: u32 = 0xce;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const PAT: u32 = 0x277;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SYSCALL_MASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Nobody has this one.
const NOBODY: u32 = 0x4b4f_4f4b;

fn ask(g: &MsrGuest, reasons: u32) -> Outcome {
    g.m.vm
        .enable_cap(kb::KVM_CAP_X86_USER_SPACE_MSR, reasons.into())?;
    Ok(())
}

fn filter_errors(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    let ok = Filter::allow().without(BOTH, TSC);
    ok.set(&vm)?;
    Filter::allow().set(&vm)?;
    expect_errno(
        Filter::deny().set(&vm),
        libc::EINVAL,
        "a filter that denies everything",
    )?;
    for (flags, count, what) in [
        (0, 1, "a range without flags"),
        (4, 1, "a range with an unknown flag"),
        (!0, 1, "a range with all flags"),
        (BOTH, 0x3001, "a range that is too large"),
        (BOTH, u32::MAX, "a range of all MSRs"),
    ] {
        let bits = [0; 0xc1];
        let f = Filter::allow().range(flags, 0, count, &bits);
        expect_errno(f.set(&vm), libc::EINVAL, what)?;
    }
    // A range of none is no range, whatever else it says.
    Filter::allow().range(!0, 0, 0, &[]).set(&vm)?;
    Filter::allow()
        .range(BOTH, 0, 0x3000, &[!0; 0xc0])
        .set(&vm)?;
    let mut raw = kb::kvm_msr_filter::default();
    for bit in 0..32 {
        raw.flags = 1 << bit;
        raw.ranges[0].nmsrs = 0;
        expect_errno(
            vm.fd.ioctl_ref(sys::KVM_X86_SET_MSR_FILTER, &raw),
            libc::EINVAL,
            "flags of a filter without ranges",
        )?;
    }
    raw.flags = 0;
    raw.ranges[3].flags = BOTH;
    raw.ranges[3].nmsrs = 1;
    raw.ranges[3].bitmap = 16 as *mut u8;
    expect_errno(
        vm.fd.ioctl_ref(sys::KVM_X86_SET_MSR_FILTER, &raw),
        libc::EFAULT,
        "bits at no address",
    )?;
    expect_errno(
        vm.fd.ioctl(sys::KVM_X86_SET_MSR_FILTER, 16),
        libc::EFAULT,
        "a filter at no address",
    )?;
    for bit in 3..64 {
        expect_errno(
            vm.enable_cap(kb::KVM_CAP_X86_USER_SPACE_MSR, 1 << bit),
            libc::EINVAL,
            "a reason that there is not",
        )?;
    }
    vm.enable_cap(kb::KVM_CAP_X86_USER_SPACE_MSR, 7)?;
    vm.enable_cap(kb::KVM_CAP_X86_USER_SPACE_MSR, 0)?;
    Ok(())
}

/// What is denied is #GP, or a question; whoever answers it has the last word.
fn denied(env: &Env) -> Outcome {
    let g = MsrGuest::new(env)?;
    Filter::allow().without(BOTH, PAT).set(&g.m.vm)?;
    ensure_eq!(g.read(PAT)?, Access::Refused, "RDMSR");
    ensure_eq!(g.write(PAT, 0x0606)?, Access::Refused, "WRMSR");
    ensure!(g.m.vcpu.msr(PAT)?.is_some(), "it is the VMM's to read");
    ask(&g, UNKNOWN | INVALID)?;
    ensure_eq!(g.read(PAT)?, Access::Refused, "RDMSR, asked of others");
    ask(&g, FILTERED)?;
    ensure_eq!(g.read(PAT)?, Access::Asked(FILTERED), "RDMSR");
    let exit = g.exit();
    ensure_eq!((exit.index, exit.data), (PAT, 0), "the question");
    ensure_eq!(exit.error, 0, "the answer to begin with");
    g.answer(Ok(0x1122_3344_5566_7788));
    ensure_eq!(
        g.go_on(0)?,
        Access::Done(0x1122_3344_5566_7788),
        "what was answered"
    );
    ensure_eq!(g.read(PAT)?, Access::Asked(FILTERED), "RDMSR");
    g.answer(Err(1));
    ensure_eq!(g.go_on(0)?, Access::Refused, "an error");
    let host = g.m.vcpu.msr(PAT)?;
    ensure_eq!(g.write(PAT, !5)?, Access::Asked(FILTERED), "WRMSR");
    ensure_eq!((g.exit().index, g.exit().data), (PAT, !5), "the question");
    ensure!(matches!(g.go_on(0)?, Access::Done(_)), "it was taken");
    ensure_eq!(g.write(PAT, 0)?, Access::Asked(FILTERED), "WRMSR");
    g.answer(Err(255));
    ensure_eq!(g.go_on(0)?, Access::Refused, "an error");
    ensure_eq!(g.m.vcpu.msr(PAT)?, host, "nothing was written");
    Filter::allow().set(&g.m.vm)?;
    ensure_eq!(g.read(PAT)?, Access::Done(host.unwrap_or(0)), "allowed");
    Ok(())
}

/// MSRs that are not there, and values that they do not take.
fn failed(env: &Env) -> Outcome {
    let g = MsrGuest::new(env)?;
    ensure_eq!(g.read(NOBODY)?, Access::Refused, "an unknown MSR");
    ask(&g, UNKNOWN)?;
    ensure_eq!(g.read(NOBODY)?, Access::Asked(UNKNOWN), "an unknown MSR");
    g.answer(Ok(7));
    ensure_eq!(g.go_on(0)?, Access::Done(7), "what was answered");
    ensure_eq!(
        g.write(NOBODY, 9)?,
        Access::Asked(UNKNOWN),
        "an unknown MSR"
    );
    ensure_eq!(g.exit().data, 9, "the question");
    ensure!(matches!(g.go_on(0)?, Access::Done(_)), "it was taken");
    ensure_eq!(g.write(PAT, 2)?, Access::Refused, "no memory type");
    ask(&g, INVALID)?;
    ensure_eq!(g.write(PAT, 2)?, Access::Asked(INVALID), "no memory type");
    ensure!(matches!(g.go_on(0)?, Access::Done(_)), "it was taken");
    ensure_eq!(g.read(NOBODY)?, Access::Refused, "an unknown MSR");
    // It is also completed if nothing is run afterwards.
    ensure_eq!(g.write(PAT, 2)?, Access::Asked(INVALID), "no memory type");
    let rip = g.m.vcpu.regs()?.rip;
    g.m.vcpu.set_immediate_exit(1);
    expect_errno(g.m.vcpu.run(), libc::EINTR, "KVM_RUN")?;
    g.m.vcpu.set_immediate_exit(0);
    ensure_eq!(g.m.vcpu.regs()?.rip, rip + 2, "RIP");
    Ok(())
}

/// Those that the guest has without an exit are denied as well, and given back.
fn passed_through(env: &Env) -> Outcome {
    let g = MsrGuest::new(env)?;
    ask(&g, FILTERED)?;
    let asked = Access::Asked(FILTERED);
    let all = [
        FS_BASE,
        GS_BASE,
        KERNEL_GS_BASE,
        SYSENTER_ESP,
        SYSENTER_EIP,
        STAR,
        LSTAR,
        SYSCALL_MASK,
    ];
    for msr in all {
        let own = Access::Done(0x10_0000);
        ensure_eq!(g.write(msr, 0x10_0000)?, own, "WRMSR {msr:#x}");
        ensure_eq!(g.read(msr)?, own, "RDMSR {msr:#x}");
        for flags in [READ, WRITE, BOTH] {
            Filter::allow().without(flags, msr).set(&g.m.vm)?;
            let (r, w) = (flags & READ != 0, flags & WRITE != 0);
            let got = g.read(msr)?;
            ensure_eq!(got, if r { asked } else { own }, "RDMSR {msr:#x}");
            let got = g.write(msr, 0x10_0000)?;
            ensure_eq!(got, if w { asked } else { own }, "WRMSR {msr:#x}");
            ensure_eq!(g.m.vcpu.msr(msr)?, Some(0x10_0000), "MSR {msr:#x}");
        }
        Filter::allow().set(&g.m.vm)?;
        ensure_eq!(g.read(msr)?, own, "RDMSR {msr:#x} in the end");
        ensure_eq!(g.write(msr, 0x10_0000)?, own, "WRMSR {msr:#x} in the end");
    }
    Filter::allow().without(READ, TSC).set(&g.m.vm)?;
    ensure_eq!(g.read(TSC)?, asked, "RDMSR of the TSC");
    Ok(())
}

/// The first range that has an MSR decides.
fn ranges(env: &Env) -> Outcome {
    let g = MsrGuest::new(env)?;
    ask(&g, FILTERED)?;
    let allowed = |r: Access| !matches!(r, Access::Asked(_));
    let mut low = vec![!0u64; 0xc0];
    low[(MISC_ENABLE / 64) as usize] &= !(1 << (MISC_ENABLE % 64));
    Filter::deny()
        .range(READ, EFER, 1, &[0])
        .range(BOTH, 0xc000_0000, 0x200, &[!0; 8])
        .range(BOTH, 0, 0x3000, &low)
        .set(&g.m.vm)?;
    ensure!(!allowed(g.read(EFER)?), "RDMSR of EFER");
    ensure!(allowed(g.read(LSTAR)?), "RDMSR of LSTAR");
    ensure!(allowed(g.write(LSTAR, 0)?), "WRMSR of LSTAR");
    ensure!(!allowed(g.read(MISC_ENABLE)?), "RDMSR of MISC_ENABLE");
    ensure!(allowed(g.read(PAT)?), "RDMSR of PAT");
    ensure!(!allowed(g.read(NOBODY)?), "RDMSR beyond all ranges");
    // Beyond the last number: in no range.
    Filter::allow()
        .range(BOTH, u32::MAX, 8, &[0])
        .set(&g.m.vm)?;
    ensure_eq!(g.read(u32::MAX)?, Access::Refused, "the last MSR");
    Ok(())
}

/// The registers of x2APIC mode are never denied.
fn x2apic(env: &Env) -> Outcome {
    let g = MsrGuest::prepared(env, |vm| {
        vm.enable_cap(kb::KVM_CAP_SPLIT_IRQCHIP, 24)?;
        Filter::deny()
            .range(READ, TSC, 1, &[1])
            .range(BOTH, 0x800, 0x100, &[0; 4])
            .set(vm)
    })?;
    ask(&g, FILTERED | UNKNOWN | INVALID)?;
    // The VMM switches the mode on.
    let mut s = g.m.vcpu.sregs()?;
    s.apic_base |= 0xc00;
    g.m.vcpu.set_sregs(&s)?;
    g.m.vcpu.set_mp_state(&kb::kvm_mp_state {
        mp_state: kb::KVM_MP_STATE_RUNNABLE,
    })?;
    guest_code!(
        code,
        ".code64",
        "mov ecx, 0x808",
        "mov eax, 0x20",
        "xor edx, edx",
        "wrmsr",
        "rdmsr",
        "mov r8, rax",
        "mov ecx, 0x80f",
        "mov eax, 0x1ff",
        "wrmsr",
        "rdmsr",
        "mov r9, rax",
        "mov ecx, 0x10",
        "rdmsr",
        "out 0x80, al",
    );
    g.m.mem.write_bytes(
        selftests::guest::usize_of(selftests::guest::at::CODE),
        code(),
    );
    g.m.expect_out(0x80)?;
    let r = g.m.vcpu.regs()?;
    ensure_eq!((r.r8, r.r9), (0x20, 0x1ff), "TPR and SVR");
    Ok(())
}

/// KVM_CAP_MSR_PLATFORM_INFO.
fn platform_info(env: &Env) -> Outcome {
    let g = MsrGuest::new(env)?;
    let there = g.m.vcpu.msr(PLATFORM_INFO)?;
    ensure_eq!(
        g.read(PLATFORM_INFO)?,
        Access::Done(there.unwrap_or(0)),
        "RDMSR"
    );
    g.m.vm.enable_cap(kb::KVM_CAP_MSR_PLATFORM_INFO, 0)?;
    ensure_eq!(g.read(PLATFORM_INFO)?, Access::Refused, "RDMSR, hidden");
    ask(&g, INVALID)?;
    ensure_eq!(
        g.read(PLATFORM_INFO)?,
        Access::Asked(INVALID),
        "RDMSR, hidden"
    );
    ensure_eq!(g.m.vcpu.msr(PLATFORM_INFO)?, there, "for the VMM");
    g.m.vm.enable_cap(kb::KVM_CAP_MSR_PLATFORM_INFO, 1)?;
    ensure_eq!(
        g.read(PLATFORM_INFO)?,
        Access::Done(there.unwrap_or(0)),
        "RDMSR"
    );
    Ok(())
}

/// A filter that changes while the guest runs is there when the ioctl returns, for what it does without exits too.
fn changed_while_running(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "2: mov ecx, 0xc0000102",
        "rdmsr",
        "mov ecx, 0x1a0",
        "rdmsr",
        "inc qword ptr [{D}]",
        "jmp 2b";
        D = selftests::guest::at::DATA,
    );
    let g = MsrGuest::new(env)?;
    ask(&g, FILTERED)?;
    g.m.start(selftests::machine::Mode::Long, code())?;
    let over = AtomicBool::new(false);
    let counter = || -> u64 {
        g.m.mem
            .read(selftests::guest::usize_of(selftests::guest::at::DATA))
    };
    std::thread::scope(|s| {
        let (vm, over) = (&g.m.vm, &over);
        let thread = s.spawn(move || -> Outcome {
            for round in 0u32.. {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                let msr = [KERNEL_GS_BASE, MISC_ENABLE][(round % 2) as usize];
                Filter::allow().without(READ, msr).set(vm)?;
                sleep_ms(1);
                Filter::allow().set(vm)?;
                sleep_ms(1);
            }
            // So that the guest ends.
            Filter::deny().range(READ, 0, 1, &[1]).set(vm)?;
            Ok(())
        });
        let mut seen = [0u32; 2];
        let mut outcome = Ok(());
        while seen.iter().any(|n| *n < 20) {
            match g.m.vcpu.run() {
                Ok(_) => {}
                Err(e) => {
                    outcome = Err(e.into());
                    break;
                }
            }
            match decode(&g.m.vcpu) {
                Exit::Other(kb::KVM_EXIT_X86_RDMSR) => match g.exit().index {
                    KERNEL_GS_BASE => seen[0] += 1,
                    MISC_ENABLE => seen[1] += 1,
                    _ => {}
                },
                other => {
                    outcome = Err(selftests::Verdict::Fail(format!("exit {other:x?}")));
                    break;
                }
            }
        }
        over.store(true, Ordering::SeqCst);
        outcome?;
        match thread.join() {
            Ok(r) => r,
            Err(_) => fail!("the thread panicked"),
        }
    })?;
    println!("{} rounds of the guest", counter());
    Ok(())
}

/// Any MSR, any value, from the guest and the host, with filters and without.
fn random_accesses(env: &Env) -> Outcome {
    let g = MsrGuest::new(env)?;
    let mut rng = Rng::new(env.seed);
    let mut ends = [0u32; 3];
    for round in 0..3000u32 {
        if round % 500 == 0 {
            let words: Vec<u64> = (0..0xc0).map(|_| rng.number()).collect();
            let base = [0, 0xc000_0000][rng.below(2) as usize];
            Filter::allow()
                .range(1 + rng.below(3) as u32, base, 0x3000, &words)
                .set(&g.m.vm)?;
            ask(&g, rng.below(8) as u32)?;
        }
        let msr = match rng.below(6) {
            0 => rng.number() as u32,
            1 => 0xc000_0000 + rng.below(0x300) as u32,
            2 => 0xc001_0000 + rng.below(0x200) as u32,
            3 => 0x800 + rng.below(0x100) as u32,
            _ => rng.below(0x1000) as u32,
        };
        // These would change where the guest is, or when the host is interrupted.
        if matches!(msr, EFER | 0x1b | FS_BASE | GS_BASE) {
            continue;
        }
        let value = rng.number() >> rng.below(64);
        if rng.below(4) == 0 {
            g.m.vcpu.set_msr(msr, value)?;
            g.m.vcpu.msr(msr)?;
        }
        for access in [g.read(msr)?, g.write(msr, value)?] {
            ends[match access {
                Access::Done(_) => 0,
                Access::Refused => 1,
                Access::Asked(_) => 2,
            }] += 1;
        }
    }
    println!("done, refused, asked: {ends:?}");
    ensure!(ends.iter().all(|n| *n > 20), "hardly anything of one kind");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "msr_filter",
        tests![
            filter_errors,
            denied,
            failed,
            passed_through,
            ranges,
            x2apic,
            platform_info,
            changed_while_running,
            random_accesses => 60,
        ],
    )
}
