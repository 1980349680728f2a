// SPDX-License-Identifier: GPL-2.0

//! Interrupt controllers in the kernel: how a VM gets them, what goes with them and what is refused,
//! and what is different when userspace has the I/O APIC. `ioapic` and `pic` have the controllers.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::host::{interrupting_handler, interval_alarm, Rng};
use selftests::irq::{self, chip, line, line_status, to_msi, vm_with, Chips, Guest, APIC, IOAPIC};
use selftests::machine::Exit;
use selftests::sys::{self, Error};
use selftests::vm::Vm;
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};

fn create_full(vm: &Vm) -> Result<(), Error> {
    irq::create(vm, Chips::Full)
}

fn create_split(vm: &Vm, pins: u64) -> Result<(), Error> {
    irq::create(vm, Chips::Split(pins))
}

/// There is one set of controllers, made before the vCPUs.
fn creation(env: &Env) -> Outcome {
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    expect_errno(create_full(&vm), libc::EEXIST, "a second time")?;
    expect_errno(create_split(&vm, 24), libc::EEXIST, "split behind full")?;
    expect_errno(create_split(&vm, 4097), libc::EINVAL, "4097 pins")?;
    let _vcpu = vm.create_vcpu(0)?;
    // That they exist is found before that it is too late.
    expect_errno(create_full(&vm), libc::EEXIST, "with vCPUs, again")?;

    let (_kvm, vm, _mem) = vm_with(env, Chips::None)?;
    let vcpu = vm.create_vcpu(0)?;
    expect_errno(create_full(&vm), libc::EINVAL, "behind a vCPU")?;
    drop(vcpu);
    expect_errno(
        create_full(&vm),
        libc::EINVAL,
        "behind a vCPU that was closed",
    )?;
    Ok(())
}

/// The same for those that leave userspace the I/O APIC and the PICs.
fn creation_split(env: &Env) -> Outcome {
    let (kvm, vm, _mem) = vm_with(env, Chips::Split(24))?;
    expect_errno(create_split(&vm, 24), libc::EEXIST, "a second time")?;
    expect_errno(create_full(&vm), libc::EEXIST, "full behind split")?;
    for (pins, errno) in [
        (0, 0),
        (1, 0),
        (4096, 0),
        (4097, libc::EINVAL),
        (1 << 32, libc::EINVAL),
        (u64::MAX, libc::EINVAL),
    ] {
        let vm = kvm.create_vm()?;
        match create_split(&vm, pins) {
            Ok(()) => ensure_eq!(errno, 0, "errno for {pins:#x} pins"),
            r => {
                expect_errno(r, errno, &format!("{pins:#x} pins"))?;
                // Nothing was created.
                create_split(&vm, 24)?;
            }
        }
    }
    let vm = kvm.create_vm()?;
    let flags = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_SPLIT_IRQCHIP,
        flags: 1,
        ..Default::default()
    };
    let r = vm.fd.ioctl_ref(sys::KVM_ENABLE_CAP, &flags);
    expect_errno(r, libc::EINVAL, "flags")?;
    let _vcpu = vm.create_vcpu(0)?;
    // Not EINVAL, as KVM_CREATE_IRQCHIP says then.
    expect_errno(create_split(&vm, 24), libc::EEXIST, "behind a vCPU")?;
    expect_errno(create_split(&vm, 4097), libc::EINVAL, "4097 pins, too late")?;
    Ok(())
}

/// What is announced beside the controllers.
fn capabilities(env: &Env) -> Outcome {
    let (kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    for (cap, name, want) in [
        (kb::KVM_CAP_IRQCHIP, "IRQCHIP", 1),
        (kb::KVM_CAP_SPLIT_IRQCHIP, "SPLIT_IRQCHIP", 1),
        (kb::KVM_CAP_IRQ_INJECT_STATUS, "IRQ_INJECT_STATUS", 1),
        (
            kb::KVM_CAP_IOAPIC_POLARITY_IGNORED,
            "IOAPIC_POLARITY_IGNORED",
            1,
        ),
        (kb::KVM_CAP_IRQ_ROUTING, "IRQ_ROUTING", 4096),
        (kb::KVM_CAP_SIGNAL_MSI, "SIGNAL_MSI", 1),
        (kb::KVM_CAP_IRQFD, "IRQFD", 1),
        (kb::KVM_CAP_IRQFD_RESAMPLE, "IRQFD_RESAMPLE", 1),
        (kb::KVM_CAP_MP_STATE, "MP_STATE", 1),
    ] {
        ensure_eq!(kvm.capability(cap), want, "KVM_CAP_{name}");
        let of_vm = vm.fd.ioctl(sys::KVM_CHECK_EXTENSION, cap as usize)?;
        ensure_eq!(of_vm, want, "KVM_CAP_{name} of a VM");
    }
    Ok(())
}

/// The calls without controllers, with those of a split irqchip, with a wrong chip or address.
fn refusals(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let (_k, full, _m) = vm_with(env, Chips::Full)?;
    let split = kvm.create_vm()?;
    create_split(&split, 24)?;
    let none = kvm.create_vm()?;
    for (vm, errno, what) in [
        (&none, libc::ENXIO, "no irqchip"),
        (&split, libc::ENXIO, "split"),
    ] {
        for id in 0..4 {
            expect_errno(chip(vm, id).map(|_| ()), errno, what)?;
            let c = kb::kvm_irqchip {
                chip_id: id,
                ..Default::default()
            };
            expect_errno(vm.fd.ioctl_ref(sys::KVM_SET_IRQCHIP, &c), errno, what)?;
        }
    }
    expect_errno(line(&none, 4, 1), libc::ENXIO, "line, no irqchip")?;
    expect_errno(line_status(&none, 4, 1), libc::ENXIO, "line, no irqchip")?;
    for gsi in [0, 4, 23, 24, 4095, 4096, u32::MAX] {
        line(&split, gsi, 1)?;
        ensure_eq!(line_status(&split, gsi, 1)?, -1, "a line without a route");
    }
    for id in [3, 4, 0x100, u32::MAX] {
        expect_errno(chip(&full, id).map(|_| ()), libc::EINVAL, "no such chip")?;
        let mut c = chip(&full, 0)?;
        c.chip_id = id;
        let r = full.fd.ioctl_ref(sys::KVM_SET_IRQCHIP, &c);
        expect_errno(r, libc::EINVAL, "no such chip to set")?;
    }
    for call in [
        sys::KVM_GET_IRQCHIP,
        sys::KVM_SET_IRQCHIP,
        sys::KVM_IRQ_LINE,
        sys::KVM_IRQ_LINE_STATUS,
    ] {
        for vm in [&full, &split, &none] {
            expect_errno(vm.fd.ioctl(call, 8), libc::EFAULT, call.name)?;
        }
    }
    // The call for one chip changes nothing but what it returns.
    let mut c = kb::kvm_irqchip {
        chip_id: 2,
        pad: 0x1234,
        ..Default::default()
    };
    full.fd.ioctl_mut(sys::KVM_GET_IRQCHIP, &mut c)?;
    ensure_eq!((c.chip_id, c.pad), (2, 0x1234), "chip and padding");
    Ok(())
}

/// KVM_INTERRUPT is for those who have no PIC in the kernel.
fn interrupt(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    expect_errno(g.vcpus[0].interrupt(0x40), libc::ENXIO, "full")?;
    expect_errno(g.vcpus[0].interrupt(256), libc::EINVAL, "vector 256, full")?;
    g.window(0)?;
    ensure_eq!(g.seen(0), 0, "interrupts");

    let g = Guest::new(env, Chips::Split(24), 1)?;
    g.set_how(0, 0);
    expect_errno(g.vcpus[0].interrupt(256), libc::EINVAL, "vector 256, split")?;
    g.vcpus[0].interrupt(0x40)?;
    expect_errno(g.vcpus[0].interrupt(0x41), libc::EEXIST, "a second one")?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x40], "vectors");
    // It is an ExtINT, which LINT0 lets pass or not, and the APIC knows nothing of it.
    g.write(0, APIC + 0x350, 0x1_0700)?;
    g.vcpus[0].interrupt(0x42)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x40], "vectors with LINT0 masked");
    g.write(0, APIC + 0x350, 0x700)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x40, 0x42], "vectors, LINT0 unmasked");
    g.vcpus[0].interrupt(0x43)?;
    g.halt(0)?;
    ensure_eq!(g.log(0), [0x40, 0x42, 0x43], "vectors, halted");
    Ok(())
}

/// The windows in which userspace may inject are those of the ExtINT.
fn interrupt_window(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "sti", "nop", "nop", "cli", "ret");
    let g = Guest::new(env, Chips::Split(24), 1)?;
    g.set_how(0, 0);
    g.begin(0, code(), |_| {})?;
    g.vcpus[0].kvm_run_mut().request_interrupt_window = 1;
    ensure_eq!(g.run(0)?, Exit::IrqWindow, "exit");
    let run = g.vcpus[0].kvm_run();
    ensure_eq!(run.ready_for_interrupt_injection, 1, "ready");
    g.vcpus[0].kvm_run_mut().request_interrupt_window = 0;
    g.vcpus[0].interrupt(0x40)?;
    g.finish(0, &mut |_| Ok(()))?;
    ensure_eq!(g.log(0), [0x40], "vectors");
    Ok(())
}

/// With PICs in the kernel, there is no window that userspace could ask for.
fn no_window(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "sti", "nop", "nop", "cli", "ret");
    let g = Guest::new(env, Chips::Full, 1)?;
    g.vcpus[0].kvm_run_mut().request_interrupt_window = 1;
    for _ in 0..3 {
        g.exec(0, code(), |_| {})?;
        let run = g.vcpus[0].kvm_run();
        let got = (run.ready_for_interrupt_injection, run.if_flag);
        ensure_eq!(got, (1, 0), "ready, IF");
    }
    Ok(())
}

/// A vCPU that is created while the controllers are: it has a local APIC, or they came too late.
fn creation_race(env: &Env) -> Outcome {
    let kvm = env.open()?;
    drop(vm_with(env, Chips::Full)?);
    let mut counts = [0, 0];
    for round in 0..env.fewer(150) {
        let vm = kvm.create_vm()?;
        let chips = if round % 2 == 0 {
            Chips::Full
        } else {
            Chips::Split(24)
        };
        let ready = AtomicU32::new(0);
        // Each of them is a little later than the other, now and then.
        let meet = |delay: u64| {
            ready.fetch_add(1, Ordering::SeqCst);
            while ready.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            (0..delay).for_each(|_| std::hint::spin_loop());
        };
        let (late, early) = (round % 5 * 400, round % 3 * 400);
        let (vcpu, made) = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                meet(late);
                vm.create_vcpu(0)
            });
            meet(early);
            let made = irq::create(&vm, chips);
            (other.join(), made)
        });
        let Ok(vcpu) = vcpu else { fail!("panic") };
        let mut lapic = kb::kvm_lapic_state::default();
        let r = vcpu?.fd.ioctl_mut(sys::KVM_GET_LAPIC, &mut lapic);
        counts[usize::from(made.is_ok())] += 1;
        match made {
            Ok(()) => {
                r?;
                expect_errno(irq::create(&vm, chips), libc::EEXIST, "again")?;
            }
            Err(e) => {
                let late = [libc::EINVAL, libc::EEXIST];
                ensure!(late.contains(&e.errno), "controllers: {e}");
                expect_errno(r, libc::EINVAL, "the local APIC")?;
            }
        }
    }
    println!("too late {}, in time {}", counts[0], counts[1]);
    Ok(())
}

/// Nonsense from the guest and the host: what registers and lines take, in any order.
fn nonsense(env: &Env) -> Outcome {
    println!("seed {}", env.seed);
    interrupting_handler(libc::SIGALRM)?;
    let mut rng = Rng::new(env.seed);
    let ports = [
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61,
    ];
    guest_code!(
        outs,
        ".code64",
        "mov [rdi], eax",
        "mov ecx, [rdi]",
        "out dx, al",
        "in al, dx",
        "ret"
    );
    guest_code!(look, ".code64", "sti", "nop", "nop", "cli", "ret");
    let mut finished = 0;
    for _ in 0..env.fewer(15) {
        let g = Guest::new(env, Chips::Full, 1)?;
        if g.kvm.capability(kb::KVM_CAP_PIT2) > 0 {
            g.vm.fd.ioctl(sys::KVM_CREATE_PIT, 0)?;
        }
        g.set_how(0, rng.below(8));
        interval_alarm(5 * u64::from(env.slow));
        for _ in 0..60 {
            let gsi = rng.below(26) as u32;
            line(&g.vm, gsi, rng.below(2) as u32)?;
            line_status(&g.vm, gsi, rng.below(2) as u32)?;
            match rng.below(12) {
                0 => {
                    let mut c = chip(&g.vm, rng.below(3) as u32)?;
                    // SAFETY: The array is as large as the union, whose bytes may have any value.
                    let bytes = unsafe { &mut c.chip.dummy };
                    // Not where the I/O APIC is.
                    for b in &mut bytes[8..] {
                        *b = rng.number() as i8;
                    }
                    g.vm.fd.ioctl_ref(sys::KVM_SET_IRQCHIP, &c)?;
                }
                1 => {
                    let entries: Vec<_> = (0..rng.below(30) as u32)
                        .map(|i| match rng.below(2) {
                            0 => to_msi(i, APIC | rng.below(1 << 20), rng.number() as u32 & !0x700),
                            _ => irq::to_pin(i, rng.below(3) as u32, rng.below(24) as u32),
                        })
                        .collect();
                    let _ = irq::route(&g.vm, &entries);
                }
                _ => {}
            }
            let code = if rng.below(3) == 0 { look() } else { outs() };
            g.begin(0, code, |r| {
                r.rdi = IOAPIC + 0x10 * rng.below(2);
                // No INIT, SIPI or SMI from the I/O APIC: then the guest would be another's.
                r.rax = rng.number() & !0x700;
                r.rdx = ports[rng.below(11) as usize];
            })?;
            // A line that nobody lowers may keep it busy.
            let end = (0..200).find_map(|_| match g.run(0) {
                Ok(Exit::Out { port: 0x80, .. }) => Some(true),
                Ok(Exit::Out { .. } | Exit::In { .. }) => None,
                _ => Some(false),
            });
            match end {
                Some(true) => finished += 1,
                _ => break,
            }
        }
        interval_alarm(0);
    }
    println!("{finished} rounds came to their end");
    ensure!(
        finished > 20 / u64::from(env.slow),
        "only {finished} rounds came to their end"
    );
    // The next VM knows nothing of that.
    let g = Guest::new(env, Chips::Full, 1)?;
    irq::set_entry(&g.vm, 20, 0x60)?;
    line(&g.vm, 20, 1)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x60], "vectors of the next VM");
    Ok(())
}

/// With userspace's I/O APIC, the EOI of a level of one of its pins is an exit.
fn eoi_exits(env: &Env) -> Outcome {
    guest_code!(read, ".code64", "mov al, [rdi]", "ret");
    let g = Guest::new(env, Chips::Split(8), 1)?;
    let level = 1 << 15;
    irq::route(
        &g.vm,
        &[
            to_msi(4, APIC, 0x51 | level),
            to_msi(5, APIC, 0x52),
            to_msi(7, APIC, 0x54 | level),
            to_msi(8, APIC, 0x53 | level),
        ],
    )?;
    for (gsi, vector, exits) in [
        (4, 0x51, true),
        (5, 0x52, false),
        (8, 0x53, false),
        (7, 0x54, true),
    ] {
        for _ in 0..3 {
            ensure_eq!(line_status(&g.vm, gsi, 1)?, 1, "GSI {gsi}: status");
            g.begin(0, &[0xfb, 0x90, 0x90, 0xfa, 0xc3], |_| {})?; // sti; nop; nop; cli; ret
            let before = g.count(0, vector);
            let exit = g.run(0)?;
            if exits {
                ensure_eq!(exit, Exit::Other(kb::KVM_EXIT_IOAPIC_EOI), "GSI {gsi}");
                // SAFETY: This exit's member, a plain integer.
                let v = unsafe { g.vcpus[0].kvm_run().__bindgen_anon_1.eoi.vector };
                ensure_eq!(v, vector, "GSI {gsi}: vector");
                g.finish(0, &mut |_| Ok(()))?;
            } else {
                ensure!(
                    matches!(exit, Exit::Out { .. }),
                    "GSI {gsi}: exit {exit:x?}"
                );
            }
            ensure_eq!(g.count(0, vector), before + 1, "GSI {gsi}: interrupts");
        }
    }
    // Its registers are userspace's to emulate, and those of the PICs.
    g.begin(0, read(), |r| r.rdi = IOAPIC)?;
    let want = Exit::MmioRead {
        addr: IOAPIC,
        len: 1,
    };
    ensure_eq!(g.run(0)?, want, "exit at the I/O APIC");
    Ok(())
}

/// A level that is in service when its route goes to another vCPU: its end is an exit where it is.
fn eoi_of_the_old_route(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Split(8), 2)?;
    let to = |id: u64| irq::route(&g.vm, &[to_msi(4, APIC | (id << 12), 0x51 | (1 << 15))]);
    guest_code!(eoi, ".code64", "mov dword ptr [rdi], 0", "ret");
    (0..2).for_each(|id| g.set_how(id, 0));
    to(0)?;
    line(&g.vm, 4, 1)?;
    g.window(0)?;
    ensure_eq!(g.log(0), [0x51], "vectors of vCPU 0");
    to(1)?;
    line(&g.vm, 4, 1)?;
    g.window(1)?;
    ensure_eq!(g.log(1), [0x51], "vectors of vCPU 1");
    for id in 0..2 {
        g.begin(id, eoi(), |r| r.rdi = APIC + 0xb0)?;
        let exit = g.run(id)?;
        ensure_eq!(
            exit,
            Exit::Other(kb::KVM_EXIT_IOAPIC_EOI),
            "exit of vCPU {id}"
        );
        g.finish(id, &mut |_| Ok(()))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "irqchip",
        tests![
            creation,
            creation_split,
            capabilities,
            refusals,
            interrupt,
            interrupt_window,
            no_window,
            creation_race,
            nonsense,
            eoi_exits,
            eoi_of_the_old_route,
        ],
    )
}
