// SPDX-License-Identifier: GPL-2.0

//! What exits cost, side by side: `bench --device /dev/kvm --device /dev/rkvm`.
//!
//! Each figure is in ticks of the time stamp counter. In the emulated machine a tick is an instruction,
//! so that with one CPU the figures repeat exactly; on real hardware they are cycles of the TSC. The
//! devices take turns, round by round, with the same guest code in the same process. Each round makes
//! a fresh VM. To add a row: write a function that returns ticks an operation and put it in `ROWS`.

use kvm_bindings as kb;
use selftests::guest::{at, usize_of, PORT};
use selftests::host::{pin, rdtsc};
use selftests::machine::{Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::sys::{self, Error};
use selftests::{fail, guest_code, Env, Verdict};
use std::process::ExitCode;

type Ticks = Result<f64, Verdict>;

/// One line of the table.
struct Row {
    name: &'static str,
    what: &'static str,
    run: fn(&Env) -> Ticks,
}

const ROWS: &[Row] = &[
    Row {
        name: "cpuid",
        what: "CPUID exit, handled in the kernel",
        run: cpuid,
    },
    Row {
        name: "rdmsr",
        what: "RDMSR of IA32_APIC_BASE",
        run: rdmsr,
    },
    Row {
        name: "pio-out",
        what: "OUT to userspace and back",
        run: pio_out,
    },
    Row {
        name: "pio-in",
        what: "IN from userspace",
        run: pio_in,
    },
    Row {
        name: "mmio-write",
        what: "MMIO write to userspace and back",
        run: mmio_write,
    },
    Row {
        name: "mmio-read",
        what: "MMIO read from userspace",
        run: mmio_read,
    },
    Row {
        name: "hlt",
        what: "HLT to userspace and back",
        run: hlt,
    },
    Row {
        name: "immediate",
        what: "KVM_RUN with immediate_exit",
        run: immediate,
    },
    Row {
        name: "touch-host",
        what: "first touch, 4 KiB page, host page there",
        run: touch_host,
    },
    Row {
        name: "touch-new",
        what: "first touch, 4 KiB page, no host page",
        run: touch_new,
    },
    Row {
        name: "touch-read",
        what: "first read, 4 KiB page, host page there",
        run: touch_read,
    },
    Row {
        name: "touch-large",
        what: "first touch, 2 MiB page, host page there",
        run: touch_large,
    },
    Row {
        name: "interrupt",
        what: "KVM_INTERRUPT, handler, HLT",
        run: interrupt,
    },
    Row {
        name: "vm-life",
        what: "VM and vCPU made, run to HLT, destroyed",
        run: vm_life,
    },
];

/// Operations a round for exits, pages a round for touches.
const LOOPS: u32 = 400;
const PAGES: usize = 256;

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

fn cpuid(env: &Env) -> Ticks {
    in_guest(env, loop_cpuid(), 0, 0)
}

fn rdmsr(env: &Env) -> Ticks {
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

fn pio_out(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: out {P}, al", "jmp 2b"; P = PORT);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_IO,
    )
}

fn pio_in(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: in al, {P}", "jmp 2b"; P = PORT);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_IO,
    )
}

fn mmio_write(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "mov edx, {M}", "2: mov [edx], eax", "jmp 2b"; M = at::MMIO);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_MMIO,
    )
}

fn mmio_read(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "mov edx, {M}", "2: mov eax, [edx]", "jmp 2b"; M = at::MMIO);
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_MMIO,
    )
}

fn hlt(env: &Env) -> Ticks {
    guest_code!(code, ".code32", "2: hlt", "jmp 2b");
    in_host(
        &Machine::new(env, Mode::Protected, code())?,
        kb::KVM_EXIT_HLT,
    )
}

fn immediate(env: &Env) -> Ticks {
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

// EDI: address of the first page; EBP pages. Two passes, each timed: the second finds all pages
// mapped, and is what the loop itself costs.
macro_rules! touch {
    ($name:ident, $op:literal, $stride:expr) => {
        guest_code!($name, ".code32",
            "mov esi, 2",
            "mov ebx, {D}",
            "2:",
            "mov ecx, ebp",
            "mov edx, edi",
            "push edx",
            "rdtsc",
            "mov [ebx], eax",
            "pop edx",
            "3:",
            $op,
            "add edx, {S}",
            "dec ecx",
            "jnz 3b",
            "rdtsc",
            "mov [ebx + 4], eax",
            "add ebx, 8",
            "dec esi",
            "jnz 2b",
            "hlt";
            D = at::DATA, S = $stride,
        );
    };
}

touch!(touch_write_code, "inc dword ptr [edx]", PAGE as u32);
touch!(touch_read_code, "mov eax, [edx]", PAGE as u32);
touch!(touch_large_code, "inc dword ptr [edx]", HUGE as u32);

/// Ticks a page of `size` bytes; large pages if they are of that size.
fn touch(env: &Env, code: &[u8], size: usize, n: usize, populate: bool) -> Ticks {
    const GPA: u64 = 0x100_0000;
    let pages = Mapping::new(n * size, false)?;
    let advice = if size == PAGE {
        libc::MADV_NOHUGEPAGE
    } else {
        libc::MADV_HUGEPAGE
    };
    pages.advise(0, pages.len(), advice)?;
    if populate {
        pages.fill(0, pages.len(), 0x5a);
    }
    let m = Machine::new(env, Mode::Protected, code)?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    m.patch_regs(|r| {
        r.rdi = GPA;
        r.rbp = n as u64;
    })?;
    m.expect_hlt()?;
    let t: [u32; 4] = m.mem.read(usize_of(at::DATA));
    let first = f64::from(t[1].wrapping_sub(t[0]));
    let second = f64::from(t[3].wrapping_sub(t[2]));
    // The machine's VM has to go before the memory: `m` is dropped first.
    Ok((first - second) / n as f64)
}

fn touch_host(env: &Env) -> Ticks {
    touch(env, touch_write_code(), PAGE, PAGES, true)
}

fn touch_new(env: &Env) -> Ticks {
    touch(env, touch_write_code(), PAGE, PAGES, false)
}

fn touch_read(env: &Env) -> Ticks {
    touch(env, touch_read_code(), PAGE, PAGES, true)
}

fn touch_large(env: &Env) -> Ticks {
    touch(env, touch_large_code(), HUGE, 24, true)
}

fn interrupt(env: &Env) -> Ticks {
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
fn vm_life(env: &Env) -> Ticks {
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

const USAGE: &str = "\
Usage: bench [--device PATH]... [--rounds N] [--list] [ROW...]
  --device PATH   a device; give it more than once to compare (default /dev/kvm and /dev/rkvm)
  --rounds N      rounds of each row on each device (default 5)
  ROW             only rows whose name contains one of these
";

struct Args {
    devices: Vec<String>,
    rounds: usize,
    filter: Vec<String>,
    list: bool,
}

fn parse() -> Result<Args, String> {
    let mut a = Args {
        devices: vec![],
        rounds: 5,
        filter: vec![],
        list: false,
    };
    let mut it = std::env::args().skip(1);
    while let Some(arg) = it.next() {
        match arg.as_str() {
            "--device" => a.devices.push(it.next().ok_or("--device needs a value")?),
            "--rounds" => {
                let n = it.next().ok_or("--rounds needs a value")?;
                a.rounds = n.parse().map_err(|e| format!("{n}: {e}"))?;
            }
            "--list" => a.list = true,
            "--help" | "-h" => return Err(String::new()),
            s if s.starts_with('-') => return Err(format!("unknown option {s}")),
            s => a.filter.push(s.into()),
        }
    }
    if a.devices.is_empty() {
        a.devices = vec!["/dev/kvm".into(), "/dev/rkvm".into()];
    }
    a.rounds = a.rounds.max(1);
    Ok(a)
}

/// Minimum and median of the rounds of one row on one device, or why there are none.
enum Cell {
    Figures { min: f64, median: f64 },
    Failed(String),
}

fn measure(row: &Row, devices: &[Env], rounds: usize) -> Vec<Cell> {
    let mut samples: Vec<Result<Vec<f64>, String>> = devices.iter().map(|_| Ok(vec![])).collect();
    for _ in 0..rounds {
        for (env, s) in devices.iter().zip(&mut samples) {
            let Ok(list) = s else { continue };
            match (row.run)(env) {
                Ok(t) => list.push(t),
                Err(Verdict::Fail(e) | Verdict::Skip(e)) => *s = Err(e),
            }
        }
    }
    samples
        .into_iter()
        .map(|s| match s {
            Err(e) => Cell::Failed(e),
            Ok(mut list) => {
                list.sort_by(f64::total_cmp);
                Cell::Figures {
                    min: list[0],
                    median: list[list.len() / 2],
                }
            }
        })
        .collect()
}

fn main() -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(e) if e.is_empty() => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            eprint!("{e}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|r| args.filter.is_empty() || args.filter.iter().any(|f| r.name.contains(f)))
        .collect();
    if args.list {
        for r in &rows {
            println!("{:<12} {}", r.name, r.what);
        }
        return ExitCode::SUCCESS;
    }
    let mut devices = Vec::new();
    for d in &args.devices {
        let env = Env {
            device: d.clone(),
            module: None,
            seed: 1,
            slow: 1,
        };
        match env.open() {
            Ok(_) => devices.push(env),
            Err(e) => println!("# {d} is left out: {e}"),
        }
    }
    if devices.is_empty() {
        println!("# no device to measure");
        return ExitCode::from(4);
    }
    // One processor for all, or migrations would be measured.
    if let Some(&cpu) = selftests::host::cpus().first() {
        if let Err(e) = pin(0, cpu) {
            println!("# not pinned to a processor: {e}");
        }
    }
    println!(
        "# ticks of the TSC an operation: minimum (median) of {} rounds",
        args.rounds
    );
    print!("{:<12}", "# row");
    for env in &devices {
        print!(" {:>18}", env.device);
    }
    println!(
        " {:>7}  what",
        if devices.len() == 2 { "ratio" } else { "" }
    );
    let mut failed = false;
    for row in rows {
        let cells = measure(row, &devices, args.rounds);
        print!("{:<12}", row.name);
        let mut minima = Vec::new();
        let mut errors = Vec::new();
        for (env, c) in devices.iter().zip(&cells) {
            match c {
                Cell::Figures { min, median } => {
                    print!(" {:>18}", format!("{min:.0} ({median:.0})"));
                    minima.push(*min);
                }
                Cell::Failed(e) => {
                    print!(" {:>18}", "failed");
                    errors.push(format!("{} on {}: {e}", row.name, env.device));
                }
            }
        }
        match minima[..] {
            [a, b] if devices.len() == 2 && a > 0.0 => print!(" {:>7.3}", b / a),
            _ => print!(" {:>7}", ""),
        }
        println!("  {}", row.what);
        for e in errors {
            failed = true;
            for line in e.lines() {
                println!("# {line}");
            }
        }
    }
    ExitCode::from(u8::from(failed))
}
