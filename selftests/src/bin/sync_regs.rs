// SPDX-License-Identifier: GPL-2.0

//! Registers that KVM_RUN takes from `struct kvm_run` and leaves there (KVM_CAP_SYNC_REGS).

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::machine::{Machine, Mode};
use selftests::{ensure_eq, guest_code, tests, Env, Outcome};
use std::process::ExitCode;

/// The registers in `kvm_run`.
fn synced(m: &Machine) -> kb::kvm_sync_regs {
    // SAFETY: Any bytes make one.
    unsafe { m.vcpu.kvm_run().s.regs }
}

/// Changes the registers in `kvm_run`.
fn patch_synced(m: &Machine, f: impl FnOnce(&mut kb::kvm_sync_regs)) {
    // SAFETY: Any bytes make one.
    f(unsafe { &mut m.vcpu.kvm_run_mut().s.regs });
}

/// KVM_RUN leaves in `kvm_run` the registers that are asked for, and takes those that were changed.
fn registers_in_run(env: &Env) -> Outcome {
    let all = kb::KVM_SYNC_X86_REGS | kb::KVM_SYNC_X86_SREGS | kb::KVM_SYNC_X86_EVENTS;
    ensure_eq!(
        env.open()?.capability(kb::KVM_CAP_SYNC_REGS),
        all as i32,
        "KVM_CAP_SYNC_REGS"
    );
    guest_code!(code, ".code32", "2: inc ebx", "hlt", "jmp 2b");
    let m = Machine::new(env, Mode::Protected, code())?;
    m.vcpu.kvm_run_mut().kvm_valid_regs = u64::from(all);
    m.patch_regs(|r| r.rbx = 5)?;
    m.expect_hlt()?;
    ensure_eq!(synced(&m).regs.rbx, 6, "RBX in kvm_run");
    ensure_eq!(synced(&m).regs, m.vcpu.regs()?, "registers");
    ensure_eq!(synced(&m).sregs, m.vcpu.sregs()?, "system registers");
    ensure_eq!(synced(&m).events, m.vcpu.events()?, "events");

    // What is not said to be dirty is not taken; what is, is struck off.
    patch_synced(&m, |s| s.regs.rbx = 100);
    m.expect_hlt()?;
    ensure_eq!(synced(&m).regs.rbx, 7, "RBX, not said to be dirty");
    patch_synced(&m, |s| {
        s.regs.rbx = 100;
        s.sregs.cr2 = 0x1234_5000;
    });
    m.vcpu.kvm_run_mut().kvm_dirty_regs = u64::from(kb::KVM_SYNC_X86_REGS | kb::KVM_SYNC_X86_SREGS);
    m.expect_hlt()?;
    ensure_eq!(
        (synced(&m).regs.rbx, m.vcpu.sregs()?.cr2),
        (101, 0x1234_5000),
        "RBX and CR2"
    );
    ensure_eq!(m.vcpu.kvm_run().kvm_dirty_regs, 0, "kvm_dirty_regs");

    // Nothing is left for those that are not asked for.
    m.vcpu.kvm_run_mut().kvm_valid_regs = u64::from(kb::KVM_SYNC_X86_SREGS);
    m.expect_hlt()?;
    ensure_eq!(synced(&m).regs.rbx, 101, "RBX, not asked for");

    let refused = |dirty: u64, valid: u64, what| {
        let run = m.vcpu.kvm_run_mut();
        (run.kvm_dirty_regs, run.kvm_valid_regs) = (dirty, valid);
        expect_errno(m.vcpu.run(), libc::EINVAL, what)
    };
    refused(8, 0, "an unknown set that is dirty")?;
    refused(0, 1 << 63, "an unknown set that is asked for")?;
    let (regs, sregs) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    patch_synced(&m, |s| {
        s.regs = kb::kvm_regs { rbx: 200, ..regs };
        s.sregs = kb::kvm_sregs {
            cr4: 1 << 63,
            ..sregs
        };
    });
    refused(3, 0, "registers that KVM_SET_SREGS refuses")?;
    ensure_eq!(m.vcpu.regs()?.rbx, 200, "RBX, taken before");
    ensure_eq!(m.vcpu.kvm_run().kvm_dirty_regs, 2, "what was not taken");
    let run = m.vcpu.kvm_run_mut();
    run.kvm_dirty_regs = 0;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rbx, 201, "RBX in the end");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main("sync_regs", tests![registers_in_run])
}
