// SPDX-License-Identifier: GPL-2.0

//! The command line: what may be said, and what it amounts to.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Parser, ValueEnum};

use crate::boot::acpi;
use crate::bus;

const MIB: u64 = 1 << 20;

const ABOUT: &str = "Sample virtual machine monitor for the KVM API.\n\n\
Boots a Linux kernel, or runs a flat binary, on vCPUs of the KVM device given. The machine \
has a 16550 serial port on this terminal, an MC146818 clock, the i8042's reset line, a debug-exit \
port, and virtio devices as asked for. Its processors have local APICs, and a stock kernel finds \
everything by ACPI; with --irqchip none there is one processor without any of that, two 8259 PICs and \
an 8254 PIT. Either way nothing is needed for it on the kernel's command line.";

const AFTER: &str = "\
How a guest ends the run:
  power off         ACPI's S5; Linux's `poweroff -f`. Status 0
  reset             0xfe to port 0x64, bit 0 of port 0x92, bit 2 of port 0xcf9; Linux's `reboot -f`
                    comes here with no option. Status 0
  halt              with --irqchip none: HLT with interrupts disabled; Linux's `halt -f`, and
                    `poweroff -f` as there is no ACPI then. Status 0. Otherwise HLT is the kernel's
                    affair, and a guest that halts for good goes on until someone ends it
  debug exit        OUT of one byte to port 0xf4: the byte is the exit status, 0 to 191 (what is
                    more is taken for 191)
  triple fault      see --triple-fault

What a guest can have told: a byte written to port 0xf5 is a mark. The kernel's counts of that vCPU
(KVM_GET_STATS_FD) are written to stderr, with the byte's value.

Exit status:
  0          the guest reset, halted, or wrote 0 to the debug-exit port
  1 to 191   the value that the guest wrote to the debug-exit port
  192        nothing was run: bad argument, no such device, missing capability, bad kernel, ...
  193        triple fault (KVM_EXIT_SHUTDOWN)
  194        KVM_EXIT_INTERNAL_ERROR
  195        KVM_EXIT_FAIL_ENTRY
  196        KVM_EXIT_UNKNOWN, or an exit that should not happen
  197        an ioctl on the vCPU failed
  198        --timeout ran out
  199        Ctrl-A x on the terminal
  A signal that ends the VMM (INT, TERM, HUP, QUIT) is raised again after the terminal is restored.
  With 193 to 198 the guest's registers are written to stderr.

On a terminal the guest gets every key; Ctrl-A is the VMM's:
  Ctrl-A x   end the VMM          Ctrl-A d   registers and exit counts to stderr
  Ctrl-A a   send Ctrl-A          (SIGUSR1 does the same as Ctrl-A d)

Examples:
  rkvm-vmm --kernel bzImage --initrd initrd.gz --cmdline 'console=ttyS0 quiet'
  rkvm-vmm --device /dev/kvm --kernel vmlinuz --initrd initrd.gz --cpus 4 --memory 512 --timeout 60
  rkvm-vmm --flat boot.bin --mode real --stats";

/// Where the interrupt controllers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Irqchip {
    /// local APICs in the kernel, the I/O APIC in this program; no PIC, no PIT
    Split,
    /// all in the kernel: local APICs, I/O APIC, PICs and PIT
    Kernel,
    /// PICs and PIT in this program; no APICs, one processor
    None,
}

/// Most processors that a guest can have: as many as one byte of APIC ID and the ACPI tables were
/// made for.
const CPUS_MAX: i64 = 64;

/// Where execution of a flat binary begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// 16-bit real mode, IF=0; for an entry below 64 KiB all segments are 0, else CS holds it
    Real,
    /// 32-bit protected mode, flat 4 GiB segments, no paging
    Protected,
    /// 64-bit mode, the first 4 GiB mapped one to one with 2 MiB pages
    Long,
}

/// By which of its protocols a kernel is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// in protected mode, flat 4 GiB segments, no paging; a 64-bit bzImage goes on to 64-bit mode
    #[value(name = "32")]
    Bits32,
    /// in 64-bit mode, the first 4 GiB mapped one to one
    #[value(name = "64")]
    Bits64,
}

/// What a triple fault is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TripleFault {
    /// a crash: registers are shown, status 193
    Error,
    /// the guest's way to reset (Linux: reboot=t): status 0
    Reset,
}

/// The arguments as given.
#[derive(Debug, Parser)]
#[command(
    name = "rkvm-vmm",
    version,
    about = ABOUT,
    after_help = AFTER,
    max_term_width = 100,
    args_override_self = true
)]
pub struct Cli {
    /// KVM device node to use
    #[arg(long, value_name = "PATH", default_value = "/dev/rkvm")]
    pub device: PathBuf,

    /// Linux kernel: bzImage (as distributions package it), or 64-bit vmlinux (ELF)
    #[arg(long, value_name = "FILE", required_unless_present = "flat")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", conflicts_with = "flat")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line; nothing is added to it
    #[arg(
        long,
        value_name = "STRING",
        default_value = "console=ttyS0",
        conflicts_with = "flat"
    )]
    pub cmdline: String,

    /// Boot protocol to start the kernel by [default: 64 for a kernel that has an entry point for it]
    #[arg(long, value_enum, conflicts_with = "flat")]
    pub protocol: Option<Protocol>,

    /// Guest memory in MiB (a suffix M or G is taken too); what exceeds 3 GiB lies above 4 GiB
    #[arg(long, value_name = "MiB", default_value = "256", value_parser = parse_memory)]
    pub memory: u64,

    /// Number of processors, 1 to 64; what the device can make is the other limit
    #[arg(long, value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u8).range(1..=CPUS_MAX))]
    pub cpus: u8,

    /// Where the interrupt controllers are
    #[arg(long, value_enum, default_value = "split")]
    pub irqchip: Irqchip,

    /// The same as --irqchip none
    #[arg(long)]
    pub no_irqchip: bool,

    /// A virtio disk in a file: /dev/vda, /dev/vdb, ... Can be given several times
    #[arg(long, value_name = "FILE[,ro]", value_parser = parse_disk)]
    pub disk: Vec<Disk>,

    /// A virtio console, hvc0, on this terminal: it then gets the keys, and the serial port does not
    #[arg(long)]
    pub virtio_console: bool,

    /// A virtio network interface at this TAP device of the host's, its frames moved by this program
    /// or by the kernel's vhost-net
    #[arg(long, value_name = "NAME[,vhost]", value_parser = parse_tap)]
    pub tap: Option<Tap>,

    /// A virtio source of random numbers
    #[arg(long)]
    pub rng: bool,

    /// Flat binary to run instead of a kernel
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    pub flat: Option<PathBuf>,

    /// Processor mode that the flat binary starts in
    #[arg(long, value_enum, default_value = "real", conflicts_with = "kernel")]
    pub mode: Mode,

    /// Guest physical address of the flat binary's first byte [default: 0x7c00 for real mode, else
    /// 0x10000; the boot tables occupy 0x500 to 0xf000]
    #[arg(long, value_name = "ADDR", value_parser = parse_number, conflicts_with = "kernel")]
    pub load_addr: Option<u64>,

    /// Address of the flat binary's first instruction [default: the load address]
    #[arg(long, value_name = "ADDR", value_parser = parse_number, conflicts_with = "kernel")]
    pub entry: Option<u64>,

    /// What a triple fault of the guest means
    #[arg(long, value_enum, default_value = "error")]
    pub triple_fault: TripleFault,

    /// End the guest after so many seconds of wall time
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub timeout: Option<u64>,

    /// Count exits by reason, port and address; a table on stderr at the end
    #[arg(long)]
    pub stats: bool,

    /// Write a line to stderr for every exit (slow)
    #[arg(long)]
    pub trace_exits: bool,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The file that it is in.
    pub file: PathBuf,
    /// The guest cannot write it.
    pub read_only: bool,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Name of the host's side.
    pub name: String,
    /// vhost-net moves the frames.
    pub vhost: bool,
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Virtio {
    /// A disk.
    Disk(Disk),
    /// The console.
    Console,
    /// The network interface.
    Net(Tap),
    /// The source of random numbers.
    Rng,
}

/// What is to be put into guest memory.
#[derive(Debug, PartialEq, Eq)]
pub enum Image {
    /// A Linux kernel.
    Linux {
        /// bzImage or vmlinux.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        cmdline: String,
        /// Boot protocol; the kernel's own if there is none.
        protocol: Option<Protocol>,
    },
    /// A flat binary.
    Flat {
        /// The binary.
        file: PathBuf,
        /// Mode to start it in.
        mode: Mode,
        /// Guest physical load address.
        load: u64,
        /// Address of the first instruction.
        entry: u64,
    },
}

/// The machine to make, checked as far as that goes without looking at files.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of processors.
    pub cpus: u8,
    /// Where the interrupt controllers are.
    pub irqchip: Irqchip,
    /// Virtio devices, in the order of their addresses.
    pub virtio: Vec<Virtio>,
    /// What to load.
    pub image: Image,
}

impl Plan {
    /// Returns what ACPI tells the guest; nothing if there are no APICs to tell of.
    pub fn acpi(&self) -> Option<acpi::Machine> {
        (self.irqchip != Irqchip::None).then(|| acpi::Machine {
            cpus: self.cpus,
            hardware_reduced: self.irqchip == Irqchip::Split,
            virtio: self
                .virtio
                .iter()
                .enumerate()
                .map(|(i, device)| acpi::VirtioDevice {
                    base: (bus::VIRTIO_BASE + i as u64 * bus::VIRTIO_SIZE) as u32,
                    gsi: bus::VIRTIO_GSI + i as u32,
                    level: *device == Virtio::Rng,
                })
                .collect(),
        })
    }
}

impl Cli {
    /// Resolves defaults that depend on other arguments.
    ///
    /// # Errors
    /// An entry point that the mode cannot reach, a missing image, what needs a local APIC without one.
    pub fn plan(&self) -> anyhow::Result<Plan> {
        let image = match (&self.kernel, &self.flat) {
            (Some(kernel), None) => Image::Linux {
                kernel: kernel.clone(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone(),
                protocol: self.protocol,
            },
            (None, Some(file)) => {
                let load = self.load_addr.unwrap_or(match self.mode {
                    Mode::Real => 0x7c00,
                    Mode::Protected | Mode::Long => 0x10000,
                });
                let entry = self.entry.unwrap_or(load);
                let limit = match self.mode {
                    Mode::Real => MIB,
                    Mode::Protected | Mode::Long => 1 << 32,
                };
                if entry >= limit {
                    bail!(
                        "--entry {entry:#x} is out of reach: {:?} mode starts below {limit:#x}",
                        self.mode
                    );
                }
                Image::Flat {
                    file: file.clone(),
                    mode: self.mode,
                    load,
                    entry,
                }
            }
            _ => bail!("give either --kernel or --flat"),
        };
        let irqchip = if self.no_irqchip {
            Irqchip::None
        } else {
            self.irqchip
        };
        if irqchip == Irqchip::None && self.cpus > 1 {
            bail!(
                "--cpus {} needs local APICs: --irqchip split or kernel",
                self.cpus
            );
        }
        let virtio = self.virtio();
        if irqchip == Irqchip::None && !virtio.is_empty() {
            bail!("virtio devices need an I/O APIC: --irqchip split or kernel");
        }
        if virtio.len() > bus::VIRTIO_MAX {
            bail!(
                "{} virtio devices are more than there are interrupts for, {}",
                virtio.len(),
                bus::VIRTIO_MAX
            );
        }
        Ok(Plan {
            memory: self.memory,
            cpus: self.cpus,
            irqchip,
            virtio,
            image,
        })
    }

    /// Returns the virtio devices asked for.
    fn virtio(&self) -> Vec<Virtio> {
        let disks = self.disk.iter().cloned().map(Virtio::Disk);
        let console = self.virtio_console.then_some(Virtio::Console);
        let rng = self.rng.then_some(Virtio::Rng);
        let net = self.tap.clone().map(Virtio::Net);
        disks.chain(console).chain(net).chain(rng).collect()
    }
}

/// Parses a size in MiB, or with a suffix M or G, into bytes.
fn parse_memory(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'M' | b'm') => (&text[..text.len() - 1], MIB),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1024 * MIB),
        _ => (text, MIB),
    };
    let bytes = digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(|| format!("`{text}` is not a number of MiB"))?;
    // One MiB is what real-mode tests need; 256 GiB is more than any address in here was made for.
    if !(MIB..=256 * 1024 * MIB).contains(&bytes) {
        return Err("guest memory must be between 1 MiB and 256 GiB".into());
    }
    Ok(bytes)
}

/// Parses the name of a file, and whether it is to be written.
fn parse_disk(text: &str) -> Result<Disk, String> {
    let (file, read_only) = match text.strip_suffix(",ro") {
        Some(file) => (file, true),
        None => (text, false),
    };
    if file.is_empty() {
        return Err("a disk needs a file".into());
    }
    Ok(Disk {
        file: file.into(),
        read_only,
    })
}

/// Parses the name of a TAP device, and who is to serve it.
fn parse_tap(text: &str) -> Result<Tap, String> {
    let (name, vhost) = match text.split_once(',') {
        None => (text, false),
        Some((name, "vhost")) => (name, true),
        Some((_, other)) => return Err(format!("`{other}` is not `vhost`")),
    };
    if name.is_empty() {
        return Err("a TAP device has a name".into());
    }
    Ok(Tap {
        name: name.into(),
        vhost,
    })
}

/// Parses a decimal or 0x-prefixed number.
fn parse_number(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    }
    .map_err(|err| format!("`{text}`: {err}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"rkvm-vmm").chain(args))
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let cli = parse(&["--kernel", "k"]).unwrap();
        assert_eq!(cli.device, PathBuf::from("/dev/rkvm"));
        let plan = cli.plan().unwrap();
        assert_eq!(plan.memory, 256 * MIB);
        assert_eq!((plan.cpus, plan.irqchip), (1, Irqchip::Split));
        assert_eq!(
            plan.image,
            Image::Linux {
                kernel: "k".into(),
                initrd: None,
                cmdline: "console=ttyS0".into(),
                protocol: None
            }
        );
    }

    #[test]
    fn memory_sizes() {
        assert_eq!(parse_memory("128"), Ok(128 * MIB));
        assert_eq!(parse_memory("64M"), Ok(64 * MIB));
        assert_eq!(parse_memory("4G"), Ok(4096 * MIB));
        for bad in ["", "0", "M", "-1", "12k", "999999999999999999"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn flat_defaults_follow_the_mode() {
        let image = |args: &[&str]| parse(args).unwrap().plan().unwrap().image;
        assert!(matches!(
            image(&["--flat", "f"]),
            Image::Flat {
                mode: Mode::Real,
                load: 0x7c00,
                entry: 0x7c00,
                ..
            }
        ));
        assert!(matches!(
            image(&["--flat", "f", "--mode", "long", "--entry", "0x10010"]),
            Image::Flat {
                mode: Mode::Long,
                load: 0x10000,
                entry: 0x10010,
                ..
            }
        ));
    }

    #[test]
    fn processors_need_local_apics() {
        let plan = |args: &[&str]| parse(&[&["--kernel", "k"], args].concat()).unwrap().plan();
        assert_eq!(plan(&["--cpus", "64"]).unwrap().cpus, 64);
        assert_eq!(plan(&["--no-irqchip"]).unwrap().irqchip, Irqchip::None);
        assert!(plan(&["--irqchip", "none", "--cpus", "2"]).is_err());
        for bad in ["0", "65", "256", "-1"] {
            assert!(parse(&["--kernel", "k", "--cpus", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn virtio_devices() {
        let words = ["--kernel", "k", "--rng", "--disk", "a", "--disk", "b,ro"];
        let cli = parse(&words).unwrap();
        let plan = cli.plan().unwrap();
        let disk = |file: &str, read_only| {
            Virtio::Disk(Disk {
                file: file.into(),
                read_only,
            })
        };
        assert_eq!(
            plan.virtio,
            [disk("a", false), disk("b", true), Virtio::Rng]
        );
        let acpi = plan.acpi().unwrap().virtio;
        assert_eq!((acpi[2].base, acpi[2].gsi), (0xd000_2000, 18));
        assert_eq!((acpi[1].level, acpi[2].level), (false, true));
        let tap = |name: &str, vhost| Tap {
            name: name.into(),
            vhost,
        };
        assert_eq!(parse_tap("tap0"), Ok(tap("tap0", false)));
        assert_eq!(parse_tap("tap0,vhost"), Ok(tap("tap0", true)));
        assert!(parse_tap("tap0,fast").is_err() && parse_tap(",vhost").is_err());
        let none = parse(&[&words[..], &["--irqchip", "none"]].concat()).unwrap();
        assert!(none.plan().is_err());
        let many = parse(&[&words[..2], &["--disk", "a"].repeat(9)].concat()).unwrap();
        assert!(many.plan().is_err());
        assert!(parse(&["--kernel", "k", "--disk", ",ro"]).is_err());
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--kernel", "k", "--flat", "f"]).is_err());
        assert!(parse(&["--flat", "f", "--initrd", "i"]).is_err());
        assert!(parse(&["--flat", "f", "--protocol", "32"]).is_err());
        assert!(parse(&["--kernel", "k", "--protocol", "16"]).is_err());
        assert!(parse(&["--kernel", "k", "--timeout", "0"]).is_err());
        assert!(parse(&["--kernel", "k", "--load-addr", "0x1000"]).is_err());
        assert!(parse(&["--kernel", "k", "--mode", "long"]).is_err());
        let far = parse(&["--flat", "f", "--entry", "0x100000"]).unwrap();
        assert!(far.plan().is_err());
    }
}
