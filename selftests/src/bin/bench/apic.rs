// SPDX-License-Identifier: GPL-2.0

//! Rows about interrupts with the local APIC in the kernel.

use super::Ticks;
use kvm_bindings as kb;
use selftests::apic::{self, icr, msr, reg, Answer, Chip, Cpu, Guest, Op, BASE, DEADLINE, MASKED};
use selftests::eventfd::EventFd;
use selftests::guest::{at, usize_of, PORT};
use selftests::host::rdtsc;
use selftests::{fail, guest_code, irq, skip, smp, sys, Env, Verdict};

/// Operations a round.
const LOOPS: u64 = 400;
/// The vector of interrupts.
const V: u32 = 0x51;
/// A port that is an eventfd.
const KICK_PORT: u16 = 0x3c0;

// RAX turns around one operation, to which R9 to R11 are passed in ECX, EAX and EDX, and R12 as it is. What
// they take goes to RAX. The loop without its operation is measured too, and cancels out.
macro_rules! timed_loop {
    ($name:ident, $($op:literal),+) => {
        guest_code!($name, ".code64",
            "mov rbp, rax",
            "rdtsc",
            "mov r8d, eax",
            "2:",
            "mov ecx, r9d",
            "mov eax, r10d",
            "mov edx, r11d",
            $($op,)+
            "dec rbp",
            "jnz 2b",
            "rdtsc",
            "sub eax, r8d",
            "jmp r15",
        );
    };
}

timed_loop!(loop_empty, "nop");
timed_loop!(loop_store, "mov [r12], eax");
timed_loop!(loop_wrmsr, "wrmsr");
timed_loop!(loop_cr8, "mov cr8, rax");
timed_loop!(loop_out, "mov edx, 0x3c0", "out dx, al");

fn ready(env: &Env, n: usize, x2apic: bool) -> Result<Guest, Verdict> {
    let g = Guest::new(env, Chip::Split, n)?;
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

/// Runs `code` with these registers; RAX.
fn call(c: &Cpu<'_>, code: &[u8], turns: u64, regs: [u64; 4]) -> Result<u64, Verdict> {
    c.guest.mem.write_bytes(usize_of(apic::OWN_CODE), code);
    c.load_at(apic::OWN_CODE, 0, turns)?;
    let mut r = c.vcpu().regs()?;
    [r.r9, r.r10, r.r11, r.r12] = regs;
    c.vcpu().set_regs(&r)?;
    match c.finish()? {
        Answer::Done(v) => Ok(v),
        other => fail!("{other:x?} in a measurement"),
    }
}

fn timed(c: &Cpu<'_>, code: &[u8], regs: [u64; 4]) -> Ticks {
    // The first pass warms caches and tables up.
    call(c, code, 20, regs)?;
    let with = call(c, code, LOOPS, regs)? as f64;
    let without = call(c, loop_empty(), LOOPS, regs)? as f64;
    // What costs nothing may seem to cost less than that: the loops do not lie alike.
    Ok((with - without).max(0.0) / LOOPS as f64)
}

fn store(env: &Env, register: u32, value: u64) -> Ticks {
    let g = ready(env, 1, false)?;
    timed(
        &g.cpu(0),
        loop_store(),
        [0, value, 0, BASE + u64::from(register)],
    )
}

fn wrmsr(env: &Env, register: u32, value: u64) -> Ticks {
    let g = ready(env, 1, true)?;
    let index = u64::from(msr::X2APIC + (register >> 4));
    timed(
        &g.cpu(0),
        loop_wrmsr(),
        [index, value & 0xffff_ffff, value >> 32, 0],
    )
}

pub(super) fn eoi_mmio(env: &Env) -> Ticks {
    store(env, reg::EOI, 0)
}

pub(super) fn eoi_msr(env: &Env) -> Ticks {
    wrmsr(env, reg::EOI, 0)
}

pub(super) fn tpr_mmio(env: &Env) -> Ticks {
    store(env, reg::TPR, 0x20)
}

pub(super) fn tpr_cr8(env: &Env) -> Ticks {
    let g = ready(env, 1, false)?;
    timed(&g.cpu(0), loop_cr8(), [0, 2, 0, 0])
}

/// An interrupt to itself, its handler, and its EOI.
pub(super) fn self_ipi(env: &Env) -> Ticks {
    wrmsr(env, reg::SELF_IPI, V.into())
}

pub(super) fn deadline_write(env: &Env) -> Ticks {
    let g = ready(env, 1, true)?;
    let c = g.cpu(0);
    c.xwrite(reg::LVT_TIMER, u64::from(DEADLINE | MASKED | V))?;
    // Beyond what the row takes, and within what the hardware's timer can count to.
    let when = c.done(Op::Rdtsc, 0, 0)? + 10_000_000;
    timed(
        &c,
        loop_wrmsr(),
        [msr::TSC_DEADLINE.into(), when & 0xffff_ffff, when >> 32, 0],
    )
}

// RAX deadlines, R9 ticks in the future; waits for each by spinning, or by HLT if R10 is not 0. The handler
// adds how late it is to OWN.
guest_code!(
    deadlines,
    ".code64",
    "mov rbp, rax",
    "2:",
    "mov r11, gs:[0x10]",
    "cli",
    "mov ecx, 0x6e0",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "add rax, r9",
    "mov gs:[0x88], rax",
    "mov rdx, rax",
    "shr rdx, 32",
    "wrmsr",
    "test r10, r10",
    "jz 4f",
    "sti",
    "hlt",
    "4: sti",
    "3: cmp gs:[0x10], r11",
    "je 3b",
    "dec rbp",
    "jnz 2b",
    "jmp r15",
);

guest_code!(
    lateness,
    ".code64",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, gs:[0x88]",
    "add gs:[0x80], rax",
    "ret",
);

fn late(env: &Env, halt: u64) -> Ticks {
    let g = ready(env, 1, true)?;
    let c = g.cpu(0);
    c.xwrite(reg::LVT_TIMER, u64::from(DEADLINE | V))?;
    g.hook(0, lateness());
    let sum = usize_of(g.block(0)) + 0x80;
    let turns = 50;
    for n in [5, turns] {
        g.mem.write(sum, 0u64);
        call(&c, deadlines(), n, [100_000, halt, 0, 0])?;
    }
    Ok(g.mem.read::<u64>(sum) as f64 / turns as f64)
}

pub(super) fn timer_running(env: &Env) -> Ticks {
    late(env, 0)
}

pub(super) fn timer_halted(env: &Env) -> Ticks {
    late(env, 1)
}

// RAX turns: an interrupt to vCPU 1, and on with its answer, for which R10 says how to wait. RAX: ticks.
guest_code!(ping, ".code64",
    "mov rbp, rax",
    "rdtsc",
    "mov r8d, eax",
    "2:",
    "mov r11, gs:[0x10]",
    "mov ecx, 0x830",
    "mov edx, 1",
    "mov eax, {V}",
    "wrmsr",
    "3:",
    "cli",
    "cmp gs:[0x10], r11",
    "jne 4f",
    "test r10, r10",
    "jz 5f",
    "sti",
    "hlt",
    "jmp 3b",
    "5: sti",
    "pause",
    "jmp 3b",
    "4: sti",
    "dec rbp",
    "jnz 2b",
    "rdtsc",
    "sub eax, r8d",
    "jmp r15";
    V = V,
);

guest_code!(pong, ".code64",
    "mov ecx, 0x830",
    "xor edx, edx",
    "mov eax, {V}",
    "wrmsr",
    "ret";
    V = V,
);

fn round_trip(env: &Env, halt: bool) -> Ticks {
    guest_code!(halts, ".code64", "2: sti", "hlt", "jmp 2b");
    guest_code!(spins, ".code64", "sti", "2: pause", "jmp 2b");
    let g = ready(env, 2, true)?;
    g.hook(1, pong());
    let other = apic::OWN_CODE + 0x800;
    g.mem
        .write_bytes(usize_of(other), if halt { halts() } else { spins() });
    g.cpu(1).load_at(other, 0, 0)?;
    let mut ticks = 0;
    let turns = 200;
    smp::run(&g, &[1], false, |t| {
        if !halt {
            t.pin(0, 1)?;
        }
        for n in [10, turns] {
            ticks = call(&g.cpu(0), ping(), n, [0, halt.into(), 0, 0])?;
        }
        Ok(())
    })?;
    Ok(ticks as f64 / turns as f64)
}

pub(super) fn ipi_halted(env: &Env) -> Ticks {
    round_trip(env, true)
}

/// Both must run at the same time, which takes two processors.
pub(super) fn ipi_running(env: &Env) -> Ticks {
    // SAFETY: Takes a number only.
    if unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } < 2 {
        skip!("needs two processors");
    }
    round_trip(env, false)
}

fn kick(env: &Env, pio: bool) -> Ticks {
    let g = ready(env, 1, false)?;
    let e = EventFd::new()?;
    let mut i = kb::kvm_ioeventfd {
        addr: if pio { KICK_PORT.into() } else { at::MMIO },
        len: if pio { 1 } else { 4 },
        fd: e.raw(),
        ..Default::default()
    };
    if pio {
        i.flags = 1 << kb::kvm_ioeventfd_flag_nr_pio;
    }
    g.vm.fd.ioctl_ref(sys::KVM_IOEVENTFD, &i)?;
    let code = if pio { loop_out() } else { loop_store() };
    let ticks = timed(&g.cpu(0), code, [0, 1, 0, at::MMIO])?;
    if e.take()? != LOOPS + 20 {
        fail!("not all writes came to the eventfd");
    }
    Ok(ticks)
}

pub(super) fn kick_pio(env: &Env) -> Ticks {
    kick(env, true)
}

pub(super) fn kick_mmio(env: &Env) -> Ticks {
    kick(env, false)
}

/// From the host's write to the handler's output, which is an exit to userspace.
pub(super) fn irqfd(env: &Env) -> Ticks {
    guest_code!(reports, ".code64", "out {P}, al", "ret"; P = PORT);
    guest_code!(spins, ".code64", "sti", "2: jmp 2b");
    let g = ready(env, 1, false)?;
    let e = EventFd::new()?;
    irq::route(&g.vm, &[irq::to_msi(5, BASE, V)])?;
    irq::irqfd(&g.vm, e.raw(), 5, 0, None)?;
    g.hook(0, reports());
    g.mem.write_bytes(usize_of(apic::OWN_CODE), spins());
    g.cpu(0).load_at(apic::OWN_CODE, 0, 0)?;
    let mut start = 0;
    for i in 0..LOOPS + 10 {
        if i == 10 {
            start = rdtsc();
        }
        e.signal()?;
        g.vcpus[0].run()?;
    }
    let ticks = rdtsc() - start;
    // The last one is at its output, and counted.
    if g.count(0, V as u8) != LOOPS + 10 {
        fail!("{} interrupts", g.count(0, V as u8));
    }
    Ok(ticks as f64 / LOOPS as f64)
}

/// An interrupt by the shorthand for all others, sent and not waited for.
pub(super) fn ipi_send(env: &Env) -> Ticks {
    let g = ready(env, 2, true)?;
    timed(
        &g.cpu(0),
        loop_wrmsr(),
        [0x830, (icr::OTHERS | V).into(), 0, 0],
    )
}
