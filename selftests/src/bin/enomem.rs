// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail, each in turn: a call that could not be made says ENOMEM and has changed nothing, so that
//! the same call succeeds when there is memory.
//!
//! The kernel's fault injection fails the nth allocation that the thread makes (Documentation/fault-injection in the
//! kernel's tree, `fail-nth`). Kernels without it have nothing to test here.

use kvm_bindings as kb;
use selftests::eventfd::EventFd;
use selftests::guest::{at, pte, usize_of};
use selftests::irq::{create, Chips};
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::Mapping;
use selftests::sys::{self, errno_name, Error};
use selftests::vm::{Fd, Kvm, Vm};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

/// No call makes as many allocations.
const MOST: u32 = 1000;
/// Settings of the injection, and what they are to be: all allocations of the thread count.
const SETTINGS: [(&str, &str); 6] = [
    ("failslab/ignore-gfp-wait", "N"),
    ("failslab/verbose", "0"),
    ("fail_page_alloc/ignore-gfp-wait", "N"),
    ("fail_page_alloc/ignore-gfp-highmem", "N"),
    ("fail_page_alloc/min-order", "0"),
    ("fail_page_alloc/verbose", "0"),
];

/// What makes an allocation of this thread fail.
struct Injection {
    file: File,
}

impl Injection {
    fn new() -> Result<Self, Verdict> {
        for (name, value) in SETTINGS {
            if std::fs::write(format!("/sys/kernel/debug/{name}"), value).is_err() {
                skip!("no fault injection: {name}");
            }
        }
        let options = OpenOptions::new().read(true).write(true).to_owned();
        match options.open("/proc/thread-self/fail-nth") {
            Ok(file) => Ok(Self { file }),
            Err(e) => skip!("no fault injection: {e}"),
        }
    }

    fn set(&self, n: u32) -> Outcome {
        match self.file.write_at(n.to_string().as_bytes(), 0) {
            Ok(_) => Ok(()),
            Err(e) => fail!("fail-nth: {e}"),
        }
    }

    /// No allocation is to fail any more; returns if one has.
    fn end(&self) -> Result<bool, Verdict> {
        let mut left = [0; 16];
        let n = match self.file.read_at(&mut left, 0) {
            Ok(n) => n,
            Err(e) => fail!("fail-nth: {e}"),
        };
        self.set(0)?;
        Ok(left[..n].trim_ascii() == b"0")
    }
}

/// Makes a call in a new state each time, with the first, the second, ... allocation failing, until none is left to fail.
/// A call that fails is made again. `check` says if all is as it must be after that.
fn each<S, T>(
    setup: impl Fn() -> Result<S, Verdict>,
    call: impl Fn(&S) -> Result<T, Error>,
    check: impl Fn(&S) -> Outcome,
) -> Outcome {
    each_but(&[], setup, call, check)
}

/// The same, with other errors that the call may have.
fn each_but<S, T>(
    others: &[i32],
    setup: impl Fn() -> Result<S, Verdict>,
    call: impl Fn(&S) -> Result<T, Error>,
    check: impl Fn(&S) -> Outcome,
) -> Outcome {
    let injection = Injection::new()?;
    let mut refused = 0;
    for n in 1..MOST {
        let state = setup()?;
        injection.set(n)?;
        let result = call(&state);
        let injected = injection.end()?;
        match result {
            Ok(_) => {}
            Err(e) if injected && (e.errno == libc::ENOMEM || others.contains(&e.errno)) => {
                refused += 1;
                if let Err(e) = call(&state) {
                    fail!("allocation {n}: called again, {e}");
                }
            }
            Err(e) => fail!("allocation {n}: {}: {e}", errno_name(e.errno)),
        }
        if let Err(Verdict::Fail(why)) = check(&state) {
            fail!("allocation {n}: {why}");
        }
        if !injected {
            // Some have another way out: what is not found in a slab may be in pages of its own.
            println!(
                "{} allocations, without {refused} of them the call fails",
                n - 1
            );
            ensure!(n > 1, "no allocation of the call's was seen");
            return Ok(());
        }
    }
    fail!("more than {MOST} allocations");
}

fn nothing<S>(_: &S) -> Outcome {
    Ok(())
}

fn vm(env: &Env) -> Result<(Kvm, Vm), Verdict> {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    Ok((kvm, vm))
}

fn vms(env: &Env) -> Outcome {
    each(|| Ok(env.open()?), Kvm::create_vm, nothing)
}

fn vcpu_of((_, vm): &(Kvm, Vm)) -> Result<Fd, Error> {
    vm.fd.ioctl(sys::KVM_CREATE_VCPU, 7).map(Fd)
}

/// A page that the kernel writes to for a guest in real mode may be EFAULT, as in KVM.
fn vcpus(env: &Env) -> Outcome {
    each_but(&[libc::EFAULT], || vm(env), vcpu_of, nothing)
}

/// Those with a local APIC in the kernel.
fn vcpus_with_apic(env: &Env) -> Outcome {
    let setup = || {
        let made = vm(env)?;
        create(&made.1, Chips::Split(24))?;
        Ok(made)
    };
    each_but(&[libc::EFAULT], setup, vcpu_of, nothing)
}

fn chips(env: &Env) -> Outcome {
    each(
        || vm(env),
        |(_, vm)| vm.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0),
        nothing,
    )?;
    let setup = || {
        let made = vm(env)?;
        made.1.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0)?;
        Ok(made)
    };
    let config = kb::kvm_pit_config::default();
    each(
        setup,
        |(_, vm)| vm.fd.ioctl_ref(sys::KVM_CREATE_PIT2, &config),
        nothing,
    )
}

/// A VM with a slot of 1 MiB at 1 MiB.
fn vm_with_slot(env: &Env) -> Result<(Mapping, (Kvm, Vm)), Verdict> {
    let made = vm(env)?;
    let mem = Mapping::new(1 << 20, false)?;
    slot(&mem, &made.1, 0, 1 << 20)?;
    Ok((mem, made))
}

fn slot(mem: &Mapping, vm: &Vm, flags: u32, gpa: u64) -> Result<(), Error> {
    vm.set_memory(1, flags, gpa, mem.len() as u64, mem.addr() as u64)
}

fn slots(env: &Env) -> Outcome {
    let setup = || Ok((Mapping::new(1 << 20, false)?, vm(env)?));
    each(setup, |(mem, (_, vm))| slot(mem, vm, 0, 1 << 20), nothing)?;
    let setup = || vm_with_slot(env);
    each(setup, |(mem, (_, vm))| slot(mem, vm, 0, 4 << 20), nothing)?;
    let log = kb::KVM_MEM_LOG_DIRTY_PAGES;
    each(setup, |(mem, (_, vm))| slot(mem, vm, log, 1 << 20), nothing)?;
    each(setup, |(_, (_, vm))| vm.set_memory(1, 0, 0, 0, 0), nothing)
}

fn eventfds(env: &Env) -> Outcome {
    let setup = || {
        let made = vm(env)?;
        create(&made.1, Chips::Split(24))?;
        Ok((EventFd::new()?, made))
    };
    let assign = |(fd, (_, vm)): &(EventFd, (Kvm, Vm))| {
        let i = kb::kvm_irqfd {
            fd: fd.raw() as u32,
            gsi: 5,
            ..Default::default()
        };
        vm.fd.ioctl_ref(sys::KVM_IRQFD, &i)
    };
    each(setup, assign, nothing)?;
    let assign = |(fd, (_, vm)): &(EventFd, (Kvm, Vm))| {
        let i = kb::kvm_ioeventfd {
            addr: 0x123,
            len: 1,
            fd: fd.raw(),
            flags: 1 << kb::kvm_ioeventfd_flag_nr_pio,
            ..Default::default()
        };
        vm.fd.ioctl_ref(sys::KVM_IOEVENTFD, &i)
    };
    each(setup, assign, nothing)
}

fn cpuid(env: &Env) -> Outcome {
    let setup = || Ok(Machine::bare(env, at::SIZE)?);
    let list = env.open()?.supported_cpuid()?;
    each(setup, |m| m.vcpu.set_cpuid(&list), nothing)
}

/// The first page that the guest counts in, and how many.
const FIRST: u64 = at::FREE;
const PAGES: u64 = 40;

guest_code!(
    touch,
    ".code32",
    "mov edx, {FIRST}",
    "mov ecx, {PAGES}",
    "2: inc dword ptr [edx]",
    "add edx, 0x1000",
    "loop 2b",
    "hlt";
    FIRST = FIRST, PAGES = PAGES,
);

/// The tables of the address spaces that the guest goes around, twice: more than a vCPU keeps.
const ROOTS: u64 = 0x10_0000;
const SPACES: u64 = 6;
/// Bytes from one to the next: four pages of tables, and the page that the guest counts in.
const STEP: u64 = 0x5000;
/// Where each space has its page.
const DATA: u64 = 0x80_0000_0000;

guest_code!(
    around,
    ".code64",
    "mov rbp, {DATA}",
    "mov ecx, 2",
    "2: mov rsi, {ROOTS}",
    "mov edi, {SPACES}",
    "3: mov cr3, rsi",
    "inc dword ptr [rbp]",
    "add rsi, {STEP}",
    "dec edi",
    "jnz 3b",
    "loop 2b",
    "hlt";
    DATA = DATA, ROOTS = ROOTS, SPACES = SPACES, STEP = STEP,
);

/// A guest on small pages that are there.
fn guest(env: &Env, mode: Mode, code: &[u8]) -> Result<Machine, Verdict> {
    let mem = Mapping::new(at::SIZE, false)?;
    mem.advise(0, mem.len(), libc::MADV_NOHUGEPAGE)?;
    mem.fill(0, mem.len(), 0);
    let m = Machine::with_memory(env, mem)?;
    m.vcpu.set_cpuid(&*m.kvm.supported_cpuid()?)?;
    m.start(mode, code)?;
    for root in (0..SPACES).map(|space| ROOTS + space * STEP) {
        let flags = pte::P | pte::W | pte::U;
        m.mem.write(usize_of(root), at::PDPT | flags);
        // The second entry of the root, and the first of the other tables.
        let slots = [root + 8, root + 0x1000, root + 0x2000, root + 0x3000];
        for (i, slot) in (1u64..).zip(slots) {
            m.mem.write(usize_of(slot), (root + 0x1000 * i) | flags);
        }
    }
    Ok(m)
}

/// KVM_RUN to the guest's HLT, after which it has counted to `count` in each of `places`. A page that the host cannot bring
/// may be EFAULT, as in KVM.
fn run(env: &Env, mode: Mode, code: &[u8], places: &[u64], count: u32) -> Outcome {
    let check = |m: &Machine| {
        let exit = selftests::machine::decode(&m.vcpu);
        ensure!(matches!(exit, Exit::Hlt), "exit {exit:x?}");
        for place in places {
            let found: u32 = m.mem.read(usize_of(*place));
            ensure_eq!(found, count, "what the guest counted to at {place:#x}");
        }
        Ok(())
    };
    each_but(
        &[libc::EFAULT],
        || guest(env, mode, code),
        |m| m.vcpu.run(),
        check,
    )
}

fn pages(env: &Env) -> Outcome {
    let places: Vec<u64> = (0..PAGES).map(|page| FIRST + page * 0x1000).collect();
    run(env, Mode::Protected, touch(), &places, 1)
}

/// The guest is nowhere but in the address space that it has loaded.
fn roots(env: &Env) -> Outcome {
    let places: Vec<u64> = (0..SPACES)
        .map(|space| ROOTS + space * STEP + 0x4000)
        .collect();
    run(env, Mode::Long, around(), &places, 2)
}

fn main() -> ExitCode {
    selftests::tap::main(
        "enomem",
        tests![
            vms => 60,
            vcpus => 60,
            vcpus_with_apic => 60,
            chips => 60,
            slots => 60,
            eventfds => 60,
            cpuid => 60,
            pages => 60,
            roots => 60,
        ],
    )
}
