// SPDX-License-Identifier: GPL-2.0

//! A guest that does a little of everything, while the host's processors come and go or the host
//! sleeps; and the files by which it is made to.

use crate::apic::{self, reg, Chip, Guest, PERIODIC};
use crate::check::{Outcome, Verdict};
use crate::eventfd::EventFd;
use crate::guest::usize_of;
use crate::host::{patient, sleep_ms};
use crate::irq::{irqfd, route, to_msi};
use crate::smp::{self, Threads};
use crate::{fail, guest_code, skip, Env};

/// Counts, and ends if the time-stamp counter goes backwards.
const SPINS: usize = 0;
/// Halts, and is woken by its timer.
const TICKS: usize = 1;
/// Halts, and is woken by an irqfd.
const WAITS: usize = 2;
const VECTOR: u8 = 0x51;
const GSI: u32 = 30;
/// In the vCPU's block: turns of its loop.
const TURNS: u64 = apic::block::OWN;

guest_code!(
    spins,
    ".code64",
    "2: rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, gs:[0x88]",
    "jb 3f",
    "mov gs:[0x88], rax",
    "inc qword ptr gs:[0x80]",
    "jmp 2b",
    "3: jmp r15"
);
guest_code!(
    halts,
    ".code64",
    "sti",
    "2: hlt",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, gs:[0x88]",
    "jb 3f",
    "mov gs:[0x88], rax",
    "inc qword ptr gs:[0x80]",
    "jmp 2b",
    "3: jmp r15"
);

/// A guest whose vCPUs run: one counts, one halts and is woken by its timer, one by an irqfd. Each ends,
/// which is a failure, when its time-stamp counter goes backwards.
#[derive(Debug)]
pub struct Busy<'a> {
    guest: &'a Guest,
    /// The vCPUs' threads.
    pub threads: &'a Threads,
    event: EventFd,
}

impl Busy<'_> {
    /// How many vCPUs it has.
    pub const VCPUS: usize = 3;

    /// Runs the guest while `host` does something.
    ///
    /// # Errors
    ///
    /// That of `host`; a skip where there are no APICs in the kernel.
    pub fn run(env: &Env, host: impl FnOnce(&Busy<'_>) -> Outcome) -> Outcome {
        let g = Guest::new(env, Chip::Full, Self::VCPUS)?;
        g.mem.write_bytes(usize_of(apic::OWN_CODE), spins());
        g.mem.write_bytes(usize_of(apic::OWN_CODE + 0x100), halts());
        for id in [SPINS, TICKS, WAITS] {
            g.cpu(id).enable()?;
        }
        let ticks = g.cpu(TICKS);
        ticks.write(reg::DIVIDE, 0xb)?;
        ticks.write(reg::LVT_TIMER, PERIODIC | u32::from(VECTOR))?;
        ticks.write(reg::INITIAL, 2_000_000 * patient(1) as u32)?;
        let event = EventFd::new()?;
        let address = apic::BASE | ((WAITS as u64) << 12);
        route(&g.vm, &[to_msi(GSI, address, u32::from(VECTOR))])?;
        irqfd(&g.vm, event.raw(), GSI, 0, None)?;
        g.cpu(SPINS).load_at(apic::OWN_CODE, 0, 0)?;
        g.cpu(TICKS).load_at(apic::OWN_CODE + 0x100, 0, 0)?;
        g.cpu(WAITS).load_at(apic::OWN_CODE + 0x100, 0, 0)?;
        smp::run(&g, &[SPINS, TICKS, WAITS], false, |threads| {
            host(&Busy {
                guest: &g,
                threads,
                event,
            })
        })
    }

    fn turns(&self, id: usize) -> u64 {
        self.guest.mem.read(usize_of(self.guest.block(id) + TURNS))
    }

    /// Waits until each vCPU has done something more.
    ///
    /// # Errors
    ///
    /// A failure that says which did not.
    pub fn goes_on(&self, when: &str) -> Outcome {
        let before: Vec<u64> = (0..Self::VCPUS).map(|id| self.turns(id)).collect();
        self.event.signal()?;
        let mut stuck = Vec::new();
        for _ in 0..patient(3000) {
            stuck = (0..Self::VCPUS)
                .filter(|&id| self.turns(id) == before[id])
                .collect();
            if let Some(id) = (0..Self::VCPUS).find(|&id| self.threads.done(id)) {
                fail!("{when}: the time-stamp counter of vCPU {id} went backwards");
            }
            if stuck.is_empty() {
                return Ok(());
            }
            if self.threads.failed() {
                // It says why itself.
                return Ok(());
            }
            sleep_ms(1);
        }
        fail!("{when}: vCPUs {stuck:?} do not go on (0 counts, 1 has a timer, 2 an irqfd)")
    }
}

/// How deep the machine sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Programs are frozen, no more.
    Freezer,
    /// Devices are suspended too, and nothing is done: suspend to idle, cut short.
    Idle,
    /// All but the last step to suspend to RAM: other processors are offline, the last one has saved its
    /// state.
    Core,
    /// Suspend to RAM: processors are reset.
    Ram,
}

impl Depth {
    /// What is to be written to `pm_test`, to `mem_sleep` and to `state`.
    const fn words(self) -> (&'static str, Option<&'static str>, &'static str) {
        match self {
            Self::Freezer => ("freezer", None, "freeze"),
            Self::Idle => ("devices", None, "freeze"),
            Self::Core => ("core", Some("deep"), "mem"),
            Self::Ram => ("none", Some("deep"), "mem"),
        }
    }
}

const DIR: &str = "/sys/power";
/// For how long a sleep lasts that is cut short, in seconds.
const DELAY: &str = "/sys/module/suspend/parameters/pm_test_delay";
/// When the clock wakes the machine up.
const ALARM: &str = "/sys/class/rtc/rtc0/wakealarm";

fn offers(file: &str, word: &str) -> Outcome {
    let path = format!("{DIR}/{file}");
    let Ok(text) = std::fs::read_to_string(&path) else {
        skip!("{path} cannot be read")
    };
    if !text.split(['[', ']', ' ', '\n']).any(|w| w == word) {
        skip!("{path} has no {word:?}, only {:?}", text.trim());
    }
    Ok(())
}

fn put(file: &str, word: &str) -> Outcome {
    let path = format!("{DIR}/{file}");
    match std::fs::write(&path, word) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => skip!("{path}: {e}"),
        Err(e) => fail!("{word:?} to {path}: {e}"),
    }
}

/// Skips the test where the machine cannot sleep so, or would not wake up.
///
/// # Errors
///
/// The skip.
pub fn can_sleep(depth: Depth) -> Outcome {
    let (test, mem, state) = depth.words();
    offers("state", state)?;
    offers("pm_test", test)?;
    if let Some(mem) = mem {
        offers("mem_sleep", mem)?;
    }
    if depth == Depth::Ram && !std::path::Path::new(ALARM).exists() {
        skip!("{ALARM} is not there, so nothing would wake this machine up");
    }
    Ok(())
}

/// Puts the machine to sleep, and returns when it is awake again.
///
/// # Errors
///
/// A failure that says what the kernel did not take.
pub fn sleep(depth: Depth) -> Outcome {
    let (test, mem, state) = depth.words();
    // A serial console that nobody has open forgets its speed.
    let consoles = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let _open: Vec<_> = consoles
        .split_whitespace()
        .filter_map(|name| std::fs::File::open(format!("/dev/{name}")).ok())
        .collect();
    put("pm_test", test)?;
    // Five seconds of a busy processor, by default.
    let _ = std::fs::write(DELAY, "0");
    if let Some(mem) = mem {
        put("mem_sleep", mem)?;
    }
    if depth == Depth::Ram {
        // The emulator wakes up by itself.
        let _ = std::fs::write(ALARM, "0");
        std::fs::write(ALARM, "+5")
            .map_err(|e| Verdict::Skip(format!("{ALARM}: {e}: nothing would wake the machine")))?;
    }
    let slept = put("state", state);
    put("pm_test", "none")?;
    if depth == Depth::Ram {
        let _ = std::fs::write(ALARM, "0");
    }
    slept
}
