// SPDX-License-Identifier: GPL-2.0

//! Rows about exits, and a VM's life.

use super::Ticks;
use kvm_bindings as kb;
use selftests::guest::{at, usize_of, PORT};
use selftests::host::rdtsc;
use selftests::machine::{Machine, Mode};
use selftests::sys::{self, Error};
use selftests::{fail, guest_code, Env, Verdict};

/// Operations a round.
const LOOPS: u32 = 400;

// A loop of EBP turns around one operation, timed in the guest: the low halves of the counter before
// and after go to DATA. EDI is the address or port of the operation. The loop itself is the same code
// with the operation replaced by `nop`s of the same number of instructions, so it cancels out.
macro_rules! timed_loop {
    ($name:ident, $($op:literal),+) => {
        guest_code!($name, ".code32",
            "2:",
            "mov ebp, [{D} + 8]",
            "rdtsc",
            "mov [{D}], eax",
            "3:",
            $($op,)+
            "dec ebp",
            "jnz 3b",
            "rdtsc",
            "mov [{D} + 4], eax",
            "hlt",
            "jmp 2b";
            D = at::DATA,
        );
    };
}

timed_loop!(loop_empty, "mov ecx, edi", "mov eax, esi", "nop");
timed_loop!(loop_cpuid, "mov ecx, edi", "mov eax, esi", "cpuid");
timed_loop!(loop_rdmsr, "mov ecx, edi", "mov eax, esi", "rdmsr");

fn guest_ticks(env: &Env, code: &[u8], edi: u32, esi: u32) -> Ticks {
    let m = Machine::new(env, Mode::Protected, code)?;
    m.mem.write(usize_of(at::DATA) + 8, LOOPS);
    m.patch_regs(|r| {
        r.rdi = edi.into();
        r.rsi = esi.into();
    })?;
    // The first pass warms caches and tables up.
    m.expect_hlt()?;
    m.expect_hlt()?;
    let (a, b): (u32, u32) = (
        m.mem.read(usize_of(at::DATA)),
        m.mem.read(usize_of(at::DATA) + 4),
    );
    Ok(f64::from(b.wrapping_sub(a)))
}

fn in_guest(env: &Env, code: &[u8], edi: u32, esi: u32) -> Ticks {
    let with = guest_ticks(env, code, edi, esi)?;
    let without = guest_ticks(env, loop_empty(), edi, esi)?;
    Ok((with - without) / f64::from(LOOPS))
}

pub(super) fn cpuid(env: &Env) -> Ticks {
    in_guest(env, loop_cpuid(), 0, 0)
}

pub(super) fn rdmsr(env: &Env) -> Ticks {
    in_guest(env, loop_rdmsr(), 0x1b, 0)
}

/// Times `LOOPS` calls of KVM_RUN from the host, each of which must end with `reason`.
fn in_host(m: &Machine, reason: u32) -> Ticks {
    for _ in 0..8 {
        m.run()?;
    }
    let start = rdtsc();
    let mut bad = None;
    for _ in 0..LOOPS {
        let r = m.vcpu.run()?;
        if r != reason {
            bad = Some(r);
        }
    }
    let ticks = rdtsc() - start;
    if let Some(r) = bad {
        fail!("exit reason {r}, expected {reason}");
    }
    Ok(ticks as f64 / f64::from(LOOPS))
}

pub(super) fn pio_out(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: out {P}, al", "jmp 2b"; P = PORT);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_IO,
    )
}

pub(super) fn pio_in(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: in al, {P}", "jmp 2b"; P = PORT);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_IO,
    )
}

pub(super) fn mmio_write(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "mov edx, {M}", "2: mov [edx], eax", "jmp 2b"; M = at::MMIO);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_MMIO,
    )
}

pub(super) fn mmio_read(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "mov edx, {M}", "2: mov eax, [edx]", "jmp 2b"; M = at::MMIO);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_MMIO,
    )
}

pub(super) fn hlt(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: hlt", "jmp 2b");
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_HLT,
    )
}

pub(super) fn immediate(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: hlt", "jmp 2b");
    let m = Machine::new(env, Mode::Protected, code())?;
    m.expect_hlt()?;
    m.vcpu.set_immediate_exit(1);
    let start = rdtsc();
    let mut bad = None;
    for _ in 0..LOOPS {
        let r = m.vcpu.fd.ioctl(sys::KVM_RUN, 0);
        if !matches!(
            &r,
            Err(Error {
                errno: libc::EINTR,
                ..
            })
        ) {
            bad = Some(r);
        }
    }
    let ticks = rdtsc() - start;
    if let Some(r) = bad {
        fail!("KVM_RUN with immediate_exit: {r:?}, expected EINTR");
    }
    Ok(ticks as f64 / f64::from(LOOPS))
}

pub(super) fn interrupt(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: sti", "hlt", "jmp 2b");
    guest_code!(handler, ".code32", "iretd");
    let m = Machine::new(env, Mode::Protected, code())?;
    m.mem.write_bytes(usize_of(at::STUBS) + 0x400, handler());
    m.expect_hlt()?;
    let start = rdtsc();
    for _ in 0..LOOPS {
        m.vcpu.interrupt(0x40)?;
        let r = m.vcpu.run()?;
        if r != kb::KVM_EXIT_HLT {
            fail!("exit reason {r}, expected HLT");
        }
    }
    Ok((rdtsc() - start) as f64 / f64::from(LOOPS))
}

/// All of a small VM's life. What it costs to make and fill its memory is the host's, and the same
/// for all devices.
pub(super) fn vm_life(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "hlt");
    let once = || -> Result<(), Verdict> {
        let m = Machine::bare(env, 0x30000)?;
        m.start(Mode::Protected, code())?;
        m.expect_hlt()
    };
    once()?;
    let start = rdtsc();
    for _ in 0..10 {
        once()?;
    }
    Ok((rdtsc() - start) as f64 / 10.0)
}
