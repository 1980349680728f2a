// SPDX-License-Identifier: GPL-2.0

//! What exits and faults cost, side by side: `bench --device /dev/kvm --device /dev/rkvm`.
//!
//! Each figure is in ticks of the time stamp counter. In the emulated machine a tick is an instruction,
//! so that with one CPU the figures repeat exactly; on real hardware they are cycles of the TSC. The
//! devices take turns, round by round, with the same guest code in the same process. Each round makes
//! a fresh VM. To add a row: write a function that returns ticks an operation and put it in `ROWS`. A row
//! of tables counts bytes.

mod apic;
mod exits;
mod memory;

use selftests::host::pin;
use selftests::{Env, Verdict};
use std::process::ExitCode;

/// What an operation costs, in ticks (or in what the row says).
type Ticks = Result<f64, Verdict>;

/// One line of the table.
struct Row {
    name: &'static str,
    what: &'static str,
    run: fn(&Env) -> Ticks,
    /// The most rounds: fewer for what takes long.
    most: usize,
}

/// No limit on a row's rounds.
const ANY: usize = usize::MAX;

const ROWS: &[Row] = &[
    Row {
        name: "cpuid",
        what: "CPUID exit, handled in the kernel",
        run: exits::cpuid,
        most: ANY,
    },
    Row {
        name: "rdmsr",
        what: "RDMSR of IA32_APIC_BASE",
        run: exits::rdmsr,
        most: ANY,
    },
    Row {
        name: "pio-out",
        what: "OUT to userspace and back",
        run: exits::pio_out,
        most: ANY,
    },
    Row {
        name: "pio-in",
        what: "IN from userspace",
        run: exits::pio_in,
        most: ANY,
    },
    Row {
        name: "mmio-write",
        what: "MMIO write to userspace and back",
        run: exits::mmio_write,
        most: ANY,
    },
    Row {
        name: "mmio-read",
        what: "MMIO read from userspace",
        run: exits::mmio_read,
        most: ANY,
    },
    Row {
        name: "hlt",
        what: "HLT to userspace and back",
        run: exits::hlt,
        most: ANY,
    },
    Row {
        name: "immediate",
        what: "KVM_RUN with immediate_exit",
        run: exits::immediate,
        most: ANY,
    },
    Row {
        name: "touch-host",
        what: "first touch, 4 KiB page, host page there",
        run: memory::touch_host,
        most: ANY,
    },
    Row {
        name: "touch-new",
        what: "first touch, 4 KiB page, no host page",
        run: memory::touch_new,
        most: ANY,
    },
    Row {
        name: "touch-read",
        what: "first read, 4 KiB page, host page there",
        run: memory::touch_read,
        most: ANY,
    },
    Row {
        name: "touch-large",
        what: "first touch, 2 MiB page, host page there",
        run: memory::touch_large,
        most: ANY,
    },
    Row {
        name: "touch-thp",
        what: "first touch, 2 MiB page, no host page",
        run: memory::touch_thp,
        most: ANY,
    },
    Row {
        name: "dirty-write",
        what: "first write after KVM_CLEAR_DIRTY_LOG",
        run: memory::dirty_write,
        most: ANY,
    },
    Row {
        name: "clear-dirty",
        what: "KVM_CLEAR_DIRTY_LOG of 65536 pages, per page",
        run: memory::clear_dirty,
        most: 2,
    },
    Row {
        name: "get-dirty",
        what: "KVM_GET_DIRTY_LOG that resets 65536, per page",
        run: memory::get_dirty,
        most: 2,
    },
    Row {
        name: "unmap-1g",
        what: "MADV_DONTNEED of 1 GiB, per page of 4 KiB",
        run: memory::unmap_1g,
        most: 1,
    },
    Row {
        name: "tables-4k",
        what: "bytes of tables for 1 GiB by pages of 4 KiB",
        run: memory::tables_4k,
        most: 1,
    },
    Row {
        name: "tables-2m",
        what: "bytes of tables for 1 GiB by pages of 2 MiB",
        run: memory::tables_2m,
        most: ANY,
    },
    Row {
        name: "interrupt",
        what: "KVM_INTERRUPT, handler, HLT",
        run: exits::interrupt,
        most: ANY,
    },
    Row {
        name: "self-ipi",
        what: "x2APIC self-IPI, handler, EOI",
        run: apic::self_ipi,
        most: ANY,
    },
    Row {
        name: "ipi-send",
        what: "x2APIC IPI to a vCPU that does not run",
        run: apic::ipi_send,
        most: ANY,
    },
    Row {
        name: "ipi-halted",
        what: "IPI to a halted vCPU and back",
        run: apic::ipi_halted,
        most: ANY,
    },
    Row {
        name: "ipi-running",
        what: "IPI to a running vCPU and back, two CPUs",
        run: apic::ipi_running,
        most: ANY,
    },
    Row {
        name: "eoi-mmio",
        what: "EOI by memory, nothing in service",
        run: apic::eoi_mmio,
        most: ANY,
    },
    Row {
        name: "eoi-msr",
        what: "EOI by MSR, nothing in service",
        run: apic::eoi_msr,
        most: ANY,
    },
    Row {
        name: "tpr-mmio",
        what: "write of TPR by memory",
        run: apic::tpr_mmio,
        most: ANY,
    },
    Row {
        name: "tpr-cr8",
        what: "write of CR8",
        run: apic::tpr_cr8,
        most: ANY,
    },
    Row {
        name: "deadline",
        what: "write of IA32_TSC_DEADLINE, masked",
        run: apic::deadline_write,
        most: ANY,
    },
    Row {
        name: "timer-run",
        what: "lateness of the timer's handler, guest runs",
        run: apic::timer_running,
        most: ANY,
    },
    Row {
        name: "timer-hlt",
        what: "lateness of the timer's handler, guest halts",
        run: apic::timer_halted,
        most: ANY,
    },
    Row {
        name: "kick-pio",
        what: "OUT to an ioeventfd",
        run: apic::kick_pio,
        most: ANY,
    },
    Row {
        name: "kick-mmio",
        what: "MMIO write to an ioeventfd",
        run: apic::kick_mmio,
        most: ANY,
    },
    Row {
        name: "irqfd",
        what: "eventfd written, KVM_RUN, handler, OUT",
        run: apic::irqfd,
        most: ANY,
    },
    Row {
        name: "vm-life",
        what: "VM and vCPU made, run to HLT, destroyed",
        run: exits::vm_life,
        most: ANY,
    },
];

const USAGE: &str = "\
Usage: bench [--device PATH]... [--rounds N] [--list] [ROW...]
  --device PATH   a device; give it more than once to compare (default /dev/kvm and /dev/rkvm)
  --rounds N      rounds of each row on each device (default 5; of long ones at most 2)
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
    Skipped(String),
}

fn measure(row: &Row, devices: &[Env], rounds: usize) -> Vec<Cell> {
    let mut samples: Vec<Result<Vec<f64>, Cell>> = devices.iter().map(|_| Ok(vec![])).collect();
    for _ in 0..rounds.min(row.most) {
        for (env, s) in devices.iter().zip(&mut samples) {
            let Ok(list) = s else { continue };
            match (row.run)(env) {
                Ok(t) => list.push(t),
                Err(Verdict::Fail(e)) => *s = Err(Cell::Failed(e)),
                Err(Verdict::Skip(e)) => *s = Err(Cell::Skipped(e)),
            }
        }
    }
    samples
        .into_iter()
        .map(|s| match s {
            Err(cell) => cell,
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

/// Both figures, with a decimal if they are small.
fn figures(min: f64, median: f64) -> String {
    let digits = usize::from(min < 100.0);
    format!("{min:.digits$} ({median:.digits$})")
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
            soak: 1,
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
        "# ticks of the TSC an operation, or bytes: minimum (median) of {} rounds",
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
                    print!(" {:>18}", figures(*min, *median));
                    minima.push(*min);
                }
                Cell::Failed(e) => {
                    print!(" {:>18}", "failed");
                    errors.push(format!("{} on {}: {e}", row.name, env.device));
                    failed = true;
                }
                Cell::Skipped(e) => {
                    print!(" {:>18}", "-");
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
            for line in e.lines() {
                println!("# {line}");
            }
        }
    }
    ExitCode::from(u8::from(failed))
}
