// SPDX-License-Identifier: GPL-2.0

//! Unmodified QEMU on the device: boots on each machine with each kind of interrupt controllers,
//! snapshots, migration to another QEMU on this device and on the other, GDB.
//!
//! The guest is Debian's stock kernel, or a boot sector of ours; what it says on its console, shows on
//! its screen and leaves on its disks is what is judged. `scripts/lib/test.py` puts QEMU and the
//! guest's files where they are looked for.

use selftests::gdb::{Gdb, Point, Register};
use selftests::qemu::{failed, image, scratch, Config, Qemu};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::{Command, ExitCode};

/// Lines of numbers, cut at `size` bytes.
fn numbers(size: usize) -> Vec<u8> {
    let mut text = String::new();
    for i in 0.. {
        if text.len() >= size {
            break;
        }
        text += &format!("{i}\n");
    }
    text.truncate(size);
    text.into_bytes()
}

fn write(path: &str, bytes: &[u8]) -> Outcome {
    std::fs::write(path, bytes).map_err(|e| failed(path, &e))
}

/// Two disks, the first read-only, and a network whose host has a file to fetch.
struct Devices {
    directory: String,
    /// What virtio devices are called on this machine's bus.
    bus: &'static str,
}

/// Sizes of the disks and of the file.
const DISK: usize = 256 << 10;
const FILE: usize = 64 << 10;

impl Devices {
    fn new(machine: &str) -> Result<Devices, Verdict> {
        let directory = scratch()?;
        write(&format!("{directory}/vda"), &numbers(DISK))?;
        write(&format!("{directory}/vdb"), &vec![0; DISK])?;
        write(&format!("{directory}/file"), &numbers(FILE))?;
        Ok(Devices {
            directory,
            bus: if machine.starts_with("microvm") {
                "device"
            } else {
                "pci"
            },
        })
    }

    fn plug(&self, config: Config) -> Config {
        let (dir, bus) = (&self.directory, self.bus);
        let rom = if bus == "pci" { ",romfile=" } else { "" };
        config
            .with(&format!(
                "-drive if=none,id=a,format=raw,file={dir}/vda,read-only=on"
            ))
            .with(&format!("-drive if=none,id=b,format=raw,file={dir}/vdb"))
            .with(&format!(
                "-device virtio-blk-{bus},drive=a -device virtio-blk-{bus},drive=b"
            ))
            .with(&format!("-netdev user,id=n,restrict=on,tftp={dir}"))
            .with(&format!("-device virtio-net-{bus},netdev=n{rom}"))
    }

    /// The guest reads one disk, writes the other, and fetches the file.
    fn use_all(&self, qemu: &mut Qemu) -> Outcome {
        let sum = |name: &str| -> Result<String, Verdict> {
            let out = Command::new("md5sum")
                .arg(format!("{}/{name}", self.directory))
                .output()
                .map_err(|e| failed("md5sum", &e))?;
            Ok(String::from_utf8_lossy(&out.stdout)
                .chars()
                .take(32)
                .collect())
        };
        // The kernel names the disks in the order in which it finds them.
        qemu.shell("for d in a b; do [ $(cat /sys/block/vd$d/ro) = 0 ] || ro=$d; done")?;
        qemu.shell("[ $ro = a ] && rw=b || rw=a")?;
        let read = qemu.shell("md5sum </dev/vd$ro")?;
        ensure!(read.starts_with(&sum("vda")?), "the guest reads {read}");
        qemu.shell(&format!(
            "seq 0 99999 | head -c {DISK} | dd of=/dev/vd$rw bs=16k iflag=fullblock conv=fsync 2>/dev/null"
        ))?;
        let path = format!("{}/vdb", self.directory);
        let written = std::fs::read(&path).map_err(|e| failed(&path, &e))?;
        ensure!(
            written == numbers(DISK),
            "the disk has not what the guest wrote"
        );
        let fetched =
            qemu.shell("tftp -g -b 1400 -r file -l /tmp/file 10.0.2.2 && md5sum </tmp/file")?;
        ensure!(
            fetched.contains(&sum("file")?),
            "the guest fetches {fetched}"
        );
        Ok(())
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Linux boots to a shell, finds its processors, uses its devices, and powers off.
fn boots(config: Config) -> Outcome {
    let devices = Devices::new(config.machine)?;
    let vga = config.more.iter().any(|a| a == "-vga");
    let cpus = config.cpus;
    let mut qemu = devices.plug(config.linux()).start()?;
    let about = qemu.boot()?;
    println!("{}", about.trim());
    ensure!(
        about.contains(&format!(" {cpus} processor")),
        "the guest has {about}"
    );
    ensure_eq!(qemu.shell("echo $((6 * 7))")?, "42", "an answer");
    for cpu in 0..cpus {
        qemu.shell(&format!(
            "taskset -c {cpu} sleep 0.03 && taskset -c {cpu} seq 1000 >/dev/null"
        ))?;
    }
    devices.use_all(&mut qemu)?;
    if vga {
        qemu.shell("echo \"seen $((6 * 7))\" >/dev/tty0")?;
        let screen = qemu.screen()?;
        ensure!(screen.contains("seen 42"), "the screen shows:\n{screen}");
    }
    qemu.power_off()
}

/// Defines tests that boot Linux: name, machine, processors, CPU model, more arguments.
macro_rules! boots {
    ($($name:ident: $machine:literal, $cpus:literal, $cpu:literal, $more:literal;)*) => {
        $(fn $name(env: &Env) -> Outcome {
            let mut config = Config::new(env, $machine);
            config.cpus = $cpus;
            config.cpu = $cpu;
            boots(if $more.is_empty() { config } else { config.with($more) })
        })*
    };
}

boots! {
    microvm_kernel_1: "microvm,rtc=on,ioapic2=off,kernel-irqchip=on", 1, "host", "";
    microvm_kernel_4: "microvm,rtc=on,ioapic2=off,kernel-irqchip=on", 4, "host", "";
    microvm_split_1: "microvm,rtc=on,kernel-irqchip=split", 1, "host", "";
    microvm_split_4: "microvm,rtc=on,kernel-irqchip=split", 4, "host", "";
    pc_kernel_1: "pc,kernel-irqchip=on", 1, "host", "-vga std";
    pc_kernel_4: "pc,kernel-irqchip=on", 4, "host", "-vga std";
    pc_split_1: "pc,kernel-irqchip=split", 1, "host", "-vga std";
    pc_split_4: "pc,kernel-irqchip=split", 4, "host", "-vga std";
    // QEMU has no local APIC of its own for KVM, which without one refuses an MSR that QEMU sets.
    pc_off_1: "pc,kernel-irqchip=off", 1, "host,-apic,kvm-asyncpf-int=off", "-vga std";
    q35_kernel_1: "q35,kernel-irqchip=on", 1, "host", "-vga std";
    q35_kernel_4: "q35,kernel-irqchip=on", 4, "host", "-vga std";
    q35_split_1: "q35,kernel-irqchip=split", 1, "host", "-vga std";
    q35_split_4: "q35,kernel-irqchip=split", 4, "host", "-vga std";
    q35_off_1: "q35,kernel-irqchip=off", 1, "host,-apic,kvm-asyncpf-int=off", "-vga std";
}

fn named_model(env: &Env) -> Outcome {
    let mut config = Config::new(env, "microvm,rtc=on");
    config.cpu = "Haswell-noTSX";
    let mut qemu = config.linux().start()?;
    qemu.boot()?;
    let name = qemu.shell("grep 'model name' /proc/cpuinfo")?;
    ensure!(name.contains("Haswell, no TSX"), "the guest has {name}");
    qemu.power_off()
}

/// The port of QEMU's device that ends it, and with what.
const EXIT_PORT: u16 = 0xf4;
const EXIT_VALUE: u8 = 0x10;
const SERIAL: u16 = 0x3f8;
const SECTOR: usize = 512;

// Reads the second sector by the BIOS, and prints the text there on the screen, by the BIOS, and on
// the serial line; then waits for a byte on that, and ends QEMU.
guest_code!(boot_sector, ".code16",
    "xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov sp, 0x7c00",
    "mov ax, 0x0201",
    "mov bx, 0x7e00",
    "mov cx, 2",
    "mov dh, 0",
    "int 0x13",
    "jc 3f",
    "cld",
    "mov si, 0x7e00",
    "2: lodsb",
    "test al, al",
    "jz 3f",
    "mov ah, 0x0e",
    "mov bx, 7",
    "int 0x10",
    "mov dx, {S}",
    "out dx, al",
    "jmp 2b",
    "3: mov dx, {S} + 5",
    "in al, dx",
    "test al, 1",
    "jz 3b",
    "mov al, {V}",
    "out {P}, al",
    "jmp 3b";
    S = SERIAL, V = EXIT_VALUE, P = EXIT_PORT,
);

/// A disk image of a boot sector and the sector after it. It has some cylinders of 1008 sectors: the BIOS
/// reads nothing, by their numbers, from a disk that has not even one.
fn bootable(directory: &str, code: &[u8], second: &[u8]) -> Result<String, Verdict> {
    let mut disk = vec![0; 4096 * SECTOR];
    disk[..code.len()].copy_from_slice(code);
    disk[SECTOR - 2..SECTOR].copy_from_slice(&[0x55, 0xaa]);
    disk[SECTOR..SECTOR + second.len()].copy_from_slice(second);
    let path = format!("{directory}/disk");
    write(&path, &disk)?;
    Ok(path)
}

/// SeaBIOS boots a disk, once by IDE and once by AHCI; a reset does that again.
fn boots_disk(env: &Env, machine: &'static str) -> Outcome {
    let directory = scratch()?;
    let disk = bootable(&directory, boot_sector(), b"read by the BIOS\r\n\0")?;
    let mut qemu = Config::new(env, machine)
        .with("-vga std")
        .with(&format!(
            "-device isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"
        ))
        .with(&format!("-drive format=raw,file={disk}"))
        .start()?;
    let result = (|| {
        qemu.says("read by the BIOS\n")?;
        let screen = qemu.screen()?;
        ensure!(screen.contains("SeaBIOS"), "the screen shows:\n{screen}");
        ensure!(
            screen.contains("read by the BIOS"),
            "the screen shows:\n{screen}"
        );
        qemu.human("system_reset")?;
        qemu.says("read by the BIOS\n")?;
        qemu.type_line("")?;
        qemu.ends((i32::from(EXIT_VALUE) << 1) | 1)
    })();
    let _ = std::fs::remove_dir_all(directory);
    result
}

fn disk_pc(env: &Env) -> Outcome {
    boots_disk(env, "pc")
}

fn disk_q35(env: &Env) -> Outcome {
    boots_disk(env, "q35,kernel-irqchip=split")
}

/// A program in the guest that writes and verifies memory while other things happen to the guest.
fn churn_start(qemu: &mut Qemu) -> Outcome {
    qemu.shell("churn 16 >/tmp/churn & pid=$!; until grep -q round /tmp/churn; do sleep 0.1; done")
        .map(drop)
}

/// It goes on, ends when told to, and never saw anything wrong.
fn churn_end(qemu: &mut Qemu) -> Outcome {
    let progress = "n=$(wc -l </tmp/churn); until [ $(wc -l </tmp/churn) -ge $((n + 2)) ]; \
                    do kill -0 $pid || break; sleep 0.1; done";
    qemu.shell(progress)?;
    let said = qemu.shell("kill $pid; wait $pid; tail -n 1 /tmp/churn")?;
    println!("{said}");
    ensure!(said.contains("all right"), "in the guest: {said}");
    Ok(())
}

fn savevm(env: &Env) -> Outcome {
    let directory = scratch()?;
    let disk = format!("{directory}/disk");
    image(&format!("create -q -f qcow2 {disk} 64M"))?;
    let mut config = Config::new(env, "q35").with("-vga std");
    config.cpus = 2;
    let mut qemu = config
        .linux()
        .with(&format!("-drive if=none,id=a,format=qcow2,file={disk}"))
        .with("-device virtio-blk-pci,drive=a")
        .start()?;
    let result = (|| {
        qemu.boot()?;
        qemu.shell("echo before >/tmp/state; dd if=/tmp/state of=/dev/vda conv=fsync 2>/dev/null")?;
        churn_start(&mut qemu)?;
        ensure_eq!(qemu.human("savevm one")?, "", "savevm's output");
        qemu.shell("echo after >/tmp/state; dd if=/tmp/state of=/dev/vda conv=fsync 2>/dev/null")?;
        qemu.shell("kill $pid")?;
        ensure_eq!(qemu.human("loadvm one")?, "", "loadvm's output");
        qemu.human_until("info status", "running")?;
        ensure_eq!(qemu.shell("cat /tmp/state")?, "before", "in memory");
        let disk = qemu.shell("echo 3 >/proc/sys/vm/drop_caches; head -n 1 /dev/vda")?;
        ensure_eq!(disk, "before", "on the disk");
        churn_end(&mut qemu)?;
        qemu.power_off()?;
        image(&format!(
            "check -q {disk}",
            disk = format_args!("{directory}/disk")
        ))?;
        Ok(())
    })();
    let _ = std::fs::remove_dir_all(directory);
    result
}

/// Linux moves from one QEMU to another while it writes memory.
fn migrates(
    env: &Env,
    to: &str,
    machine: &'static str,
    cpu: &'static str,
    accel: &'static str,
) -> Outcome {
    if !std::path::Path::new(to).exists() {
        skip!("there is no {to}");
    }
    let devices = Devices::new(machine)?;
    let mut config = Config::new(env, machine);
    config.cpus = 2;
    config.cpu = cpu;
    config.accel = accel;
    let config = devices.plug(config.with("-vga std").linux());
    let mut source = config.start()?;
    source.boot()?;
    churn_start(&mut source)?;
    let uri = format!("unix:{}/migration", devices.directory);
    let mut there = config.clone().with(&format!("-incoming {uri}"));
    there.device = to.into();
    let mut target = there.start()?;
    source.execute("migrate", &format!("\"uri\": \"{uri}\""))?;
    // Some rounds by the dirty log; then the rest at once, however much it is.
    let mut rounds = 0;
    loop {
        let state = source.execute("query-migrate", "")?;
        if state.contains("\"completed\"") {
            break;
        }
        if state.contains("failed") {
            fail!("the migration: {state}");
        }
        rounds = number(&state, "\"dirty-sync-count\": ").unwrap_or(rounds);
        if rounds >= 3 {
            source.execute("migrate-set-parameters", "\"downtime-limit\": 60000")?;
        }
        selftests::host::sleep_ms(200);
    }
    println!("{}", source.execute("query-migrate", "")?);
    target.human_until("info status", "running")?;
    source.execute("quit", "")?;
    source.ends(0)?;
    target.goes_on(&source);
    churn_end(&mut target)?;
    devices.use_all(&mut target)?;
    target.power_off()
}

fn number(text: &str, before: &str) -> Option<u64> {
    let at = text.find(before)? + before.len();
    let digits: String = text[at..]
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().ok()
}

fn migrate_here(env: &Env) -> Outcome {
    migrates(env, &env.device, "q35", "host", "")
}

fn migrate_ring(env: &Env) -> Outcome {
    migrates(
        env,
        &env.device,
        "q35,kernel-irqchip=split",
        "host",
        ",dirty-ring-size=4096",
    )
}

/// To the other of kvm and rkvm, as a processor that both can be. kvm-intel has VMX for its guests, which
/// SeaBIOS enables in IA32_FEATURE_CONTROL; without VMX such a value is refused.
fn migrate_across(env: &Env) -> Outcome {
    let other = if env.device == "/dev/kvm" {
        "/dev/rkvm"
    } else {
        "/dev/kvm"
    };
    migrates(env, other, "q35", "host,-vmx", "")
}

// At 0x7c00: three bytes to begin with, then a loop of one, three and two bytes.
guest_code!(counting, ".code16",
    "xor eax, eax",
    "2: inc ax",
    "mov [{C}], ax",
    "jmp 2b";
    C = COUNTER,
);
const BOOT: u64 = 0x7c00;
const COUNTER: u16 = 0x600;

/// GDB's stub and a boot sector: each kind of break, single steps.
fn gdb_boot_sector(env: &Env) -> Outcome {
    let directory = scratch()?;
    let disk = bootable(&directory, counting(), b"")?;
    let socket = format!("{directory}/gdb");
    let qemu = Config::new(env, "pc")
        .with(&format!("-drive format=raw,file={disk} -S"))
        .with(&format!("-gdb unix:{socket},server=on,wait=off"))
        .start()?;
    let result = (|| {
        let mut gdb = Gdb::attach(Qemu::connect(&socket)?)?;
        gdb.set(Point::Hardware, BOOT, 1)?;
        gdb.go()?;
        gdb.stopped()?;
        ensure_eq!(
            gdb.register(Register::Rip)?,
            BOOT,
            "RIP at the hardware breakpoint"
        );
        gdb.clear(Point::Hardware, BOOT, 1)?;
        for round in 0..20 {
            for (offset, count) in [(3, round), (4, round + 1), (7, round + 1)] {
                gdb.step()?;
                ensure_eq!(
                    gdb.register(Register::Rip)?,
                    BOOT + offset,
                    "RIP after a step"
                );
                ensure_eq!(gdb.register(Register::Rax)?, count, "RAX after a step");
            }
        }
        gdb.set(Point::Software, BOOT + 3, 1)?;
        for count in 20..25 {
            gdb.go()?;
            gdb.stopped()?;
            ensure_eq!(
                gdb.register(Register::Rip)?,
                BOOT + 3,
                "RIP at the software breakpoint"
            );
            ensure_eq!(gdb.register(Register::Rax)?, count, "RAX there");
            // It is the client that steps over it.
            gdb.clear(Point::Software, BOOT + 3, 1)?;
            gdb.step()?;
            gdb.set(Point::Software, BOOT + 3, 1)?;
        }
        gdb.clear(Point::Software, BOOT + 3, 1)?;
        ensure_eq!(gdb.memory(BOOT, 9)?, counting(), "the code");
        gdb.set(Point::Write, COUNTER.into(), 2)?;
        gdb.go()?;
        let why = gdb.stopped()?;
        ensure!(why.contains("watch:"), "the stub says '{why}'");
        ensure_eq!(
            gdb.register(Register::Rip)?,
            BOOT + 7,
            "RIP after the write"
        );
        gdb.clear(Point::Write, COUNTER.into(), 2)?;
        gdb.detach()
    })();
    drop(qemu);
    let _ = std::fs::remove_dir_all(directory);
    result
}

/// GDB's stub and Linux: breakpoints in its kernel.
fn gdb_linux(env: &Env) -> Outcome {
    let directory = scratch()?;
    let socket = format!("{directory}/gdb");
    let mut qemu = Config::new(env, "q35")
        .with(&format!("-gdb unix:{socket},server=on,wait=off"))
        .linux()
        .start()?;
    let result = (|| {
        qemu.boot()?;
        let symbol = qemu.shell("grep ' T __x64_sys_sethostname$' /proc/kallsyms")?;
        let Some(address) = symbol
            .split(' ')
            .next()
            .and_then(|a| u64::from_str_radix(a, 16).ok())
        else {
            fail!("the guest's kernel has {symbol}");
        };
        let mut gdb = Gdb::attach(Qemu::connect(&socket)?)?;
        for (point, name) in [(Point::Hardware, "hard"), (Point::Software, "soft")] {
            gdb.set(point, address, 1)?;
            gdb.go()?;
            qemu.shell_start(&format!("hostname {name}"))?;
            gdb.stopped()?;
            ensure_eq!(
                gdb.register(Register::Rip)?,
                address,
                "RIP at the breakpoint"
            );
            gdb.clear(point, address, 1)?;
            let mut last = address;
            for _ in 0..50 {
                gdb.step()?;
                let rip = gdb.register(Register::Rip)?;
                let code = gdb.memory(last, 4)?;
                // A step is one round of an instruction that repeats itself.
                let repeats = matches!(code[..], [0xf2 | 0xf3, ..]);
                ensure!(
                    rip != last || repeats,
                    "a step over {code:02x?} at {rip:#x} leads nowhere"
                );
                last = rip;
            }
            gdb.go()?;
            qemu.shell_end()?;
            ensure_eq!(qemu.shell("hostname")?, name, "the name");
            gdb.interrupt()?;
        }
        gdb.detach()?;
        qemu.power_off()
    })();
    let _ = std::fs::remove_dir_all(directory);
    result
}

fn main() -> ExitCode {
    selftests::tap::main(
        "qemu",
        tests![
            microvm_split_1 => 180, microvm_split_4 => 240, microvm_kernel_1 => 180,
            microvm_kernel_4 => 240, pc_kernel_1 => 180, pc_kernel_4 => 240, pc_split_1 => 180,
            pc_split_4 => 240, pc_off_1 => 180, q35_kernel_1 => 180, q35_kernel_4 => 240,
            q35_split_1 => 180, q35_split_4 => 240, q35_off_1 => 180, named_model => 180,
            disk_pc => 120, disk_q35 => 120, savevm => 300, migrate_here => 400, migrate_ring => 400,
            migrate_across => 400, gdb_boot_sector => 180, gdb_linux => 240,
        ],
    )
}
