// SPDX-License-Identifier: GPL-2.0

//! What a local APIC in the kernel delivers, and when: priorities, TPR, EOI, interrupts of the PIC.

use kvm_bindings as kb;
use selftests::apic::{self, block, icr, reg, Answer, Chip, Guest, Op, State, BASE, GP, MASKED};
use selftests::check::expect_errno;
use selftests::guest::{at, PORT};
use selftests::machine::Exit;
use selftests::{ensure, ensure_eq, fail, guest_code, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// Disabled by software, an APIC takes no interrupt.
fn software_disabled(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.start()?;
    g.acknowledge(0, block::MMIO);
    // By its number: a processor that virtualizes the APIC does not look at SVR for the shorthand.
    c.ipi(0x45, 0)?;
    c.done(Op::Sti, 0, 0)?;
    ensure_eq!(g.total(0), 0, "interrupts while disabled");
    c.enable()?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.total(0), 0, "interrupts of that time");
    c.ipi(icr::SELF | 0x46, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.log(0), vec![0x46u8], "interrupts when enabled");
    // It still sends: an NMI needs no enabled receiver.
    c.write(reg::SVR, 0xff)?;
    c.ipi(icr::NMI, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.log(0), vec![0x46u8, 2], "an NMI to itself while disabled");
    Ok(())
}

/// TPR, CR8 and PPR are views of each other.
fn tpr_cr8_ppr(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    for level in 0..16u64 {
        c.done(Op::WriteCr8, 0, level)?;
        ensure_eq!(c.done(Op::ReadCr8, 0, 0)?, level, "CR8");
        ensure_eq!(
            u64::from(c.read(reg::TPR)?),
            level << 4,
            "TPR of CR8 {level}"
        );
        ensure_eq!(
            u64::from(c.read(reg::PPR)?),
            level << 4,
            "PPR of CR8 {level}"
        );
        ensure_eq!(
            u64::from(c.vcpu().kvm_run().cr8 as u8),
            level,
            "kvm_run.cr8"
        );
        ensure_eq!(c.vcpu().sregs()?.cr8, level, "KVM_GET_SREGS");
        ensure_eq!(
            u64::from(State::get(c.vcpu())?.reg(reg::TPR)),
            level << 4,
            "KVM_GET_LAPIC"
        );
    }
    c.write(reg::TPR, 0x5a)?;
    ensure_eq!(c.done(Op::ReadCr8, 0, 0)?, 5, "CR8 of TPR 0x5a");
    ensure_eq!(c.read(reg::PPR)?, 0x5a, "PPR of TPR 0x5a");
    for bad in [0x10u64, 1 << 32, u64::MAX] {
        ensure_eq!(c.call(Op::WriteCr8, 0, bad)?, GP, "MOV to CR8 of {bad:#x}");
    }
    ensure_eq!(c.read(reg::TPR)?, 0x5a, "TPR after that");
    // From the host, by KVM_SET_SREGS; kvm_run.cr8 is only for VMs without a local APIC.
    let mut s = c.vcpu().sregs()?;
    s.cr8 = 7;
    c.vcpu().set_sregs(&s)?;
    ensure_eq!(c.read(reg::TPR)?, 0x70, "TPR after KVM_SET_SREGS");
    c.vcpu().kvm_run_mut().cr8 = 3;
    ensure_eq!(c.read(reg::TPR)?, 0x70, "TPR after a write to kvm_run.cr8");
    Ok(())
}

/// Self-IPIs by each way, of all vectors; each comes once. (Those below 16 are no test's business: KVM
/// takes them, a processor does not.)
fn self_ipi(env: &Env) -> Outcome {
    for x2apic in [false, true] {
        let g = Guest::new(env, Chip::Split, 1)?;
        let c = g.cpu(0);
        if x2apic {
            c.enable_x2apic()?;
        } else {
            c.enable()?;
        }
        c.done(Op::Sti, 0, 0)?;
        for v in 32..=255u32 {
            match (x2apic, v % 2) {
                (false, _) => c.ipi(icr::SELF | v, 0)?,
                (true, 0) => c.xipi(icr::SELF | v, 0)?,
                (true, _) => c.xwrite(reg::SELF_IPI, v.into())?,
            }
        }
        c.done(Op::Nop, 0, 0)?;
        ensure_eq!(
            g.log(0),
            (32..=255).collect::<Vec<u8>>(),
            "vectors, x2APIC {x2apic}"
        );
        let s = State::get(c.vcpu())?;
        for r in [reg::IRR, reg::ISR] {
            for v in 0..=255 {
                ensure!(
                    !s.vector(r, v),
                    "vector {v:#x} is left in {r:#x}, x2APIC {x2apic}"
                );
            }
        }
    }
    Ok(())
}

/// What is pending comes by priority, not in the order in which it was sent; the same vector twice is
/// once.
fn order(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    for v in [0x31u32, 0xfe, 0x80, 0x31, 0x81, 0x20, 0xfe] {
        c.ipi(icr::SELF | v, 0)?;
    }
    ensure!(
        State::get(c.vcpu())?.vector(reg::IRR, 0x31),
        "pending with IF = 0"
    );
    ensure_eq!(g.log(0), Vec::<u8>::new(), "interrupts with IF = 0");
    c.done(Op::Sti, 0, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.log(0), vec![0xfeu8, 0x81, 0x80, 0x31, 0x20], "vectors");
    Ok(())
}

/// What is in service holds back its class and those below, until it is acknowledged; EOI acknowledges
/// the highest.
fn nested(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    g.acknowledge(0, block::NONE);
    c.done(Op::Sti, 0, 0)?;
    let send = |v: u32| c.ipi(icr::SELF | v, 0);
    send(0x51)?;
    send(0x5f)?; // the same class waits
    send(0x42)?; // below waits
    ensure_eq!(g.log(0), vec![0x51u8], "with 0x51 in service");
    ensure_eq!(c.read(reg::PPR)?, 0x50, "PPR");
    send(0x61)?; // above comes
    send(0xa3)?;
    ensure_eq!(g.log(0), vec![0x51u8, 0x61, 0xa3], "higher classes");
    ensure_eq!(c.read(reg::PPR)?, 0xa0, "PPR with 0xa3 in service");
    let isr = || -> Result<Vec<u8>, Verdict> {
        let s = State::get(c.vcpu())?;
        Ok((0..=255).filter(|v| s.vector(reg::ISR, *v)).collect())
    };
    ensure_eq!(isr()?, vec![0x51u8, 0x61, 0xa3], "in service");
    c.write(reg::EOI, 0)?;
    ensure_eq!(isr()?, vec![0x51u8, 0x61], "in service after an EOI");
    ensure_eq!(c.read(reg::PPR)?, 0x60, "PPR after an EOI");
    c.write(reg::EOI, 0)?;
    ensure_eq!(isr()?, vec![0x51u8], "in service after two EOIs");
    c.write(reg::EOI, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.log(0), vec![0x51u8, 0x61, 0xa3, 0x5f], "after three EOIs");
    ensure_eq!(isr()?, vec![0x5fu8], "in service after three EOIs");
    c.write(reg::EOI, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(
        g.log(0),
        vec![0x51u8, 0x61, 0xa3, 0x5f, 0x42],
        "after four EOIs"
    );
    c.write(reg::EOI, 0)?;
    // One more than there were is nothing.
    c.write(reg::EOI, 0)?;
    ensure_eq!(isr()?, Vec::<u8>::new(), "in service at the end");
    ensure_eq!(c.read(reg::PPR)?, 0, "PPR at the end");
    send(0x33)?;
    ensure_eq!(g.count(0, 0x33), 1, "one more");
    Ok(())
}

/// A vector that comes again while it is in service waits for the EOI, and is not lost.
fn again_in_service(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    g.acknowledge(0, block::NONE);
    c.done(Op::Sti, 0, 0)?;
    for round in 1..=20u64 {
        c.ipi(icr::SELF | 0x72, 0)?;
        c.done(Op::Nop, 0, 0)?;
        // From the second on, it waits for the EOI of the one before.
        ensure_eq!(g.count(0, 0x72), round, "interrupts in round {round}");
        c.ipi(icr::SELF | 0x72, 0)?;
        c.done(Op::Nop, 0, 0)?;
        ensure_eq!(g.count(0, 0x72), round, "the same again before EOI");
        let s = State::get(c.vcpu())?;
        let bits = (s.vector(reg::IRR, 0x72), s.vector(reg::ISR, 0x72));
        ensure_eq!(bits, (true, true), "pending, in service");
        c.write(reg::EOI, 0)?;
        c.done(Op::Nop, 0, 0)?;
        ensure_eq!(g.count(0, 0x72), round + 1, "after the EOI");
        c.write(reg::EOI, 0)?;
        g.forget(0);
        for _ in 0..round {
            c.ipi(icr::SELF | 0x72, 0)?;
            c.done(Op::Nop, 0, 0)?;
            c.write(reg::EOI, 0)?;
        }
    }
    Ok(())
}

/// TPR holds back what is not above its class, and lowering it lets that come at once, by CR8 as by
/// memory.
fn tpr_holds(env: &Env) -> Outcome {
    for by_cr8 in [false, true] {
        let g = Guest::new(env, Chip::Split, 1)?;
        let c = g.cpu(0);
        c.enable()?;
        c.done(Op::Sti, 0, 0)?;
        let set = |class: u32| -> Outcome {
            if by_cr8 {
                c.done(Op::WriteCr8, 0, class.into())?;
            } else {
                c.write(reg::TPR, class << 4)?;
            }
            Ok(())
        };
        set(15)?;
        for class in 2..16u32 {
            c.ipi(icr::SELF | (class << 4) | class, 0)?;
        }
        c.done(Op::Spin, 0, 1000)?;
        ensure_eq!(
            g.total(0),
            0,
            "interrupts with all held back, by CR8 {by_cr8}"
        );
        let mut want = vec![];
        for class in (2..16u32).rev() {
            set(class)?;
            ensure_eq!(g.log(0), want, "of class {class}, by CR8 {by_cr8}");
            set(class - 1)?;
            want.push(((class << 4) | class) as u8);
            ensure_eq!(g.log(0), want, "of class {} by CR8 {by_cr8}", class - 1);
        }
        // NMIs do not care.
        set(15)?;
        c.ipi(icr::NMI, 0)?;
        c.done(Op::Nop, 0, 0)?;
        ensure_eq!(g.count(0, 2), 1, "NMIs");
    }
    Ok(())
}

/// In one go in the guest: TPR goes down and up while something is pending; the interrupt comes at the
/// instruction after, not later.
fn tpr_at_once(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "xor ebx, ebx",
        "mov ecx, 2",
        "mov edx, 15",
        "mov r8d, 100",
        "2:",
        "mov dword ptr [rdi], 0x40055", // self-IPI, fixed, vector 0x55
        "mov rax, gs:[0x10]",
        "add rbx, rax",
        "mov cr8, rcx",
        "nop",
        "mov cr8, rdx",
        "neg rax",
        "add rax, gs:[0x10]",
        "cmp rax, 1",
        "jne 3f",
        "dec r8d",
        "jnz 2b",
        "xor eax, eax",
        "3:",
        "jmp r15",
    );
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    c.done(Op::WriteCr8, 0, 15)?;
    c.done(Op::Sti, 0, 0)?;
    g.mem
        .write_bytes(selftests::guest::usize_of(apic::OWN_CODE), code());
    c.load_at(apic::OWN_CODE, BASE + u64::from(reg::ICR), 0)?;
    let answer = c.finish()?;
    ensure_eq!(
        answer,
        Answer::Done(0),
        "interrupts in a round other than one"
    );
    ensure_eq!(g.count(0, 0x55), 100, "interrupts");
    Ok(())
}

/// KVM_INTERRUPT with controllers in the kernel: only for the PIC that userspace has beside local APICs,
/// and only one at a time.
fn extint(env: &Env) -> Outcome {
    let full = Guest::new(env, Chip::Full, 1)?;
    expect_errno(
        full.vcpus[0].interrupt(0x40),
        libc::ENXIO,
        "with a PIC in the kernel",
    )?;
    expect_errno(full.vcpus[0].interrupt(256), libc::EINVAL, "vector 256")?;
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    g.acknowledge(0, block::NONE);
    expect_errno(c.vcpu().interrupt(256), libc::EINVAL, "vector 256")?;
    c.vcpu().interrupt(0x40)?;
    expect_errno(c.vcpu().interrupt(0x41), libc::EEXIST, "a second one")?;
    c.done(Op::Sti, 0, 0)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.log(0), vec![0x40u8], "vectors");
    ensure!(
        !State::get(c.vcpu())?.vector(reg::ISR, 0x40),
        "an ExtINT is not in service"
    );
    // It is not for the APIC to rank: it comes whatever TPR says.
    c.done(Op::WriteCr8, 0, 15)?;
    c.vcpu().interrupt(0x21)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.log(0), vec![0x40u8, 0x21], "vectors with CR8 = 15");
    // With LINT0 masked it waits.
    c.write(reg::LVT_LINT0, MASKED | 0x700)?;
    c.vcpu().interrupt(0x22)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.count(0, 0x22), 0, "with LINT0 masked");
    c.write(reg::LVT_LINT0, 0x700)?;
    c.done(Op::Nop, 0, 0)?;
    ensure_eq!(g.count(0, 0x22), 1, "with LINT0 unmasked again");
    Ok(())
}

/// `request_interrupt_window` and what `kvm_run` says of readiness, with a local APIC in the kernel.
fn run_fields(env: &Env) -> Outcome {
    for chip in [Chip::Split, Chip::Full] {
        let g = Guest::new(env, chip, 1)?;
        let c = g.cpu(0);
        c.enable()?;
        c.done(Op::Sti, 0, 0)?;
        let run = c.vcpu().kvm_run();
        ensure_eq!(
            (run.if_flag, run.ready_for_interrupt_injection),
            (1, 1),
            "{chip:?}, IF = 1"
        );
        c.done(Op::Cli, 0, 0)?;
        let run = c.vcpu().kvm_run();
        // With the PIC in the kernel there is nothing that userspace could do too early.
        let ready = u8::from(chip == Chip::Full);
        ensure_eq!(
            (run.if_flag, run.ready_for_interrupt_injection),
            (0, ready),
            "{chip:?}, IF = 0"
        );
        // Asked for the window, a VM with a PIC in userspace gets the exit.
        c.vcpu().kvm_run_mut().request_interrupt_window = 1;
        c.load(Op::Sti, 0, 0)?;
        c.vcpu().run()?;
        let got = selftests::machine::decode(c.vcpu());
        if chip == Chip::Split {
            ensure_eq!(got, Exit::IrqWindow, "exit, {chip:?}");
            c.vcpu().kvm_run_mut().request_interrupt_window = 0;
            c.finish()?;
        } else if !matches!(got, Exit::Out { port: PORT, .. }) {
            fail!("exit {got:x?} with {chip:?}, expected the end of the operation");
        }
    }
    Ok(())
}

/// What is pending and in service moves with the state: the vector that waits behind the one in
/// service comes when that is acknowledged.
fn moves(env: &Env) -> Outcome {
    let a = Guest::new(env, Chip::Split, 1)?;
    a.cpu(0).enable()?;
    for v in [0x41u32, 0x52, 0x63] {
        a.cpu(0).ipi(icr::SELF | v, 0)?;
    }
    let b = Guest::new(env, Chip::Split, 1)?;
    b.cpu(0).start()?;
    b.acknowledge(0, block::MMIO);
    let mut s = State::get(&a.vcpus[0])?;
    for v in [0x41u8, 0x52, 0x63] {
        ensure!(s.vector(reg::IRR, v), "vector {v:#x} pending");
    }
    s.put_vector(reg::ISR, 0x55);
    s.set(&b.vcpus[0])?;
    b.cpu(0).done(Op::Sti, 0, 0)?;
    ensure_eq!(b.log(0), vec![0x63u8], "with 0x55 in service");
    b.cpu(0).write(reg::EOI, 0)?;
    ensure_eq!(
        b.log(0),
        vec![0x63u8, 0x52, 0x41],
        "when 0x55 was acknowledged"
    );
    Ok(())
}

/// KVM_TPR_ACCESS_REPORTING: an exit for each access to TPR by memory; CR8 is no such access.
fn tpr_access(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    let control = |enabled, flags| {
        let mut t = kb::kvm_tpr_access_ctl {
            enabled,
            flags,
            ..Default::default()
        };
        c.vcpu().fd.ioctl_mut(sys::KVM_TPR_ACCESS_REPORTING, &mut t)
    };
    expect_errno(control(1, 1), libc::EINVAL, "a flag")?;
    expect_errno(control(0, 0x8000_0000), libc::EINVAL, "a flag")?;
    c.write(reg::TPR, 0x10)?; // none of those enabled it
    control(0, 0)?;
    c.write(reg::TPR, 0x20)?;
    ensure_eq!(c.read(reg::TPR)?, 0x20, "TPR");
    Ok(())
}

/// KVM_SET_VAPIC_ADDR takes an address in a slot, and 0; the word there shows TPR and what is pending.
fn vapic(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    let set = |vapic_addr: u64| {
        let address = kb::kvm_vapic_addr { vapic_addr };
        c.vcpu().fd.ioctl_ref(sys::KVM_SET_VAPIC_ADDR, &address)
    };
    expect_errno(
        set(0x8000_0000_0000),
        libc::EINVAL,
        "an address without a slot",
    )?;
    expect_errno(
        set(at::SIZE as u64 - 2),
        libc::EINVAL,
        "half outside of the slot",
    )?;
    let word = 0x1f_0000u64;
    set(word)?;
    c.write(reg::TPR, 0x10)?;
    c.done(Op::Nop, 0, 0)?;
    set(0)?;
    c.write(reg::TPR, 0x30)?;
    ensure_eq!(c.read(reg::TPR)?, 0x30, "TPR when it is off again");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "lapic_order",
        tests![
            software_disabled,
            tpr_cr8_ppr,
            self_ipi,
            order,
            nested,
            again_in_service,
            tpr_holds,
            tpr_at_once,
            extint,
            run_fields,
            moves,
            tpr_access,
            vapic,
        ],
    )
}
