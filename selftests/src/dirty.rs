// SPDX-License-Identifier: GPL-2.0

//! Guests that write to pseudo-random pages and keep a trace of it, and the log that must know.
//!
//! The trace of a vCPU is a ring in memory that is not logged: the guest writes to a page, notes the
//! page's number, and then counts up. It halts where the host's limit says.

use crate::check::{Outcome, Verdict};
use crate::guest::{at, usize_of};
use crate::host::{gettid, interrupting_handler, kick, patient, sleep_ms};
use crate::machine::{decode, set_special_pages, start_vcpu, Exit, Mode};
use crate::mem::{Mapping, HUGE, PAGE};
use crate::sys::{self, Error};
use crate::vm::{Kvm, Vcpu, Vm};
use crate::{ensure, ensure_eq, fail, guest_code, skip, Env};
use kvm_bindings as kb;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

/// Where the logged slot begins.
pub const GPA: u64 = 0x100_0000;
/// The number of the logged slot.
pub const SLOT: u32 = 3;
/// Entries of a vCPU's trace.
pub const TRACE: u32 = 4096;
/// Bytes of a vCPU's block: count, limit, seed; its trace is a page further.
const BLOCK: u64 = 0x10000;
const SIG: i32 = libc::SIGUSR1;

// EBX: the vCPU's block; EDI: the first page; ESI: the number of pages less 1; EBP: where in a page
// to write. The value that it writes is the count.
guest_code!(
    scatter,
    ".code32",
    "2: mov eax, [ebx]",
    "cmp eax, [ebx + 4]",
    "jae 3f",
    "mov edx, [ebx + 8]",
    "imul edx, edx, 1103515245",
    "add edx, 12345",
    "mov [ebx + 8], edx",
    "shr edx, 12",
    "and edx, esi",
    "mov ecx, eax",
    "and ecx, {T} - 1",
    "mov [ebx + ecx * 4 + 0x1000], edx",
    "shl edx, 12",
    "add edx, edi",
    "inc eax",
    "mov [edx + ebp], eax",
    "mov [ebx], eax",
    "jmp 2b",
    "3: hlt",
    "jmp 2b";
    T = TRACE,
);

/// A set of pages, in the layout of the API's bitmaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// 64 pages a word, the lowest bit first.
    pub words: Vec<u64>,
}

impl Bitmap {
    /// An empty set of `pages` pages.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        Bitmap {
            words: vec![0; pages.div_ceil(64)],
        }
    }

    /// The set of all `pages` pages.
    #[must_use]
    pub fn full(pages: usize) -> Self {
        let mut b = Bitmap::new(pages);
        (0..pages).for_each(|p| b.set(p));
        b
    }

    /// Adds a page.
    pub fn set(&mut self, page: usize) {
        self.words[page / 64] |= 1 << (page % 64);
    }

    /// Whether the set has a page.
    #[must_use]
    pub fn has(&self, page: usize) -> bool {
        (self.words[page / 64] >> (page % 64)) & 1 == 1
    }

    /// Adds all pages of another set.
    pub fn add(&mut self, other: &Bitmap) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }

    /// The pages, in ascending order.
    pub fn pages(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.words.len() * 64).filter(|p| self.has(*p))
    }

    /// Fails unless the sets are equal; says what is missing and what is too many.
    ///
    /// # Errors
    ///
    /// The difference.
    pub fn expect(&self, want: &Bitmap, what: &str) -> Outcome {
        if self == want {
            return Ok(());
        }
        let missing: Vec<_> = want.pages().filter(|p| !self.has(*p)).collect();
        let extra: Vec<_> = self.pages().filter(|p| !want.has(*p)).collect();
        Err(Verdict::Fail(format!(
            "{what}: {} pages, expected {}; {} missing: {:x?}; {} too many: {:x?}",
            self.pages().count(),
            want.pages().count(),
            missing.len(),
            &missing[..missing.len().min(8)],
            extra.len(),
            &extra[..extra.len().min(8)]
        )))
    }
}

/// `KVM_GET_DIRTY_LOG` into a buffer at `address`.
///
/// # Errors
///
/// What the kernel answered.
pub fn get_log_at(vm: &Vm, slot: u32, address: usize) -> Result<(), Error> {
    let mut log = kb::kvm_dirty_log {
        slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.padding2 = address as u64;
    vm.fd.ioctl_mut(sys::KVM_GET_DIRTY_LOG, &mut log)?;
    Ok(())
}

/// `KVM_GET_DIRTY_LOG` of a slot of `pages` pages.
///
/// # Errors
///
/// What the kernel answered.
pub fn get_log(vm: &Vm, slot: u32, pages: usize) -> Result<Bitmap, Error> {
    let mut b = Bitmap::new(pages);
    get_log_at(vm, slot, b.words.as_mut_ptr() as usize)?;
    Ok(b)
}

/// `KVM_CLEAR_DIRTY_LOG` with a bitmap at `address`.
///
/// # Errors
///
/// What the kernel answered.
pub fn clear_log_at(
    vm: &Vm,
    slot: u32,
    first: u64,
    pages: u32,
    address: usize,
) -> Result<(), Error> {
    let mut log = kb::kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        ..Default::default()
    };
    log.__bindgen_anon_1.padding2 = address as u64;
    vm.fd.ioctl_mut(sys::KVM_CLEAR_DIRTY_LOG, &mut log)?;
    Ok(())
}

/// `KVM_CLEAR_DIRTY_LOG` of the pages of `b`, which is of all `pages` pages of the slot.
///
/// # Errors
///
/// What the kernel answered.
pub fn clear_log(vm: &Vm, slot: u32, pages: usize, b: &Bitmap) -> Result<(), Error> {
    let n = u32::try_from(pages).unwrap_or(u32::MAX);
    clear_log_at(vm, slot, 0, n, b.words.as_ptr() as usize)
}

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Anonymous, 4 KiB pages only.
    Small,
    /// Anonymous, transparent huge pages.
    Huge,
    /// hugetlb, 2 MiB pages.
    Hugetlb,
    /// A shared file.
    Memfd,
}

impl Memory {
    /// Maps `len` bytes of this kind; they are there already, all zero.
    ///
    /// # Errors
    ///
    /// The failure of a call; skips if there are no huge pages to reserve.
    pub fn map(self, len: usize) -> Result<Mapping, Verdict> {
        let m = match self {
            Memory::Small => {
                let m = Mapping::new(len, false)?;
                m.advise(0, len, libc::MADV_NOHUGEPAGE)?;
                m
            }
            Memory::Huge => {
                let m = Mapping::new(len, false)?;
                if m.advise(0, len, libc::MADV_HUGEPAGE).is_err() {
                    skip!("no transparent huge pages");
                }
                m
            }
            Memory::Hugetlb => return hugetlb(len),
            Memory::Memfd => {
                // SAFETY: Creates a descriptor, which ends with the test's process.
                let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
                ensure!(fd >= 0, "memfd_create");
                let size = libc::off_t::try_from(len).unwrap_or(0);
                // SAFETY: The file is our own.
                ensure_eq!(unsafe { libc::ftruncate(fd, size) }, 0, "ftruncate");
                Mapping::with_flags(len, libc::MAP_SHARED, fd)?
            }
        };
        m.fill(0, len, 0);
        Ok(m)
    }
}

/// Reserves huge pages for as long as the mapping is there: with the old number written back, those
/// in use are surplus, which the kernel frees when they are no longer used.
fn hugetlb(len: usize) -> Result<Mapping, Verdict> {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";
    let Some(old) = std::fs::read_to_string(FILE)
        .ok()
        .and_then(|s| s.trim().parse::<usize>().ok())
    else {
        skip!("no huge pages");
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let _ = std::fs::write(FILE, (old + len / HUGE).to_string());
    let m = Mapping::with_flags(len, flags, -1);
    if let Ok(m) = &m {
        m.fill(0, len, 0);
    }
    let _ = std::fs::write(FILE, old.to_string());
    match m {
        Ok(m) => Ok(m),
        Err(_) => skip!("no huge pages to reserve"),
    }
}

/// How the log is read and reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protect {
    /// `KVM_GET_DIRTY_LOG` does both.
    Get,
    /// `KVM_CLEAR_DIRTY_LOG` resets.
    Clear,
    /// The same, and all pages are dirty at first.
    InitiallySet,
}

/// All of them.
pub const PROTECT: [Protect; 3] = [Protect::Get, Protect::Clear, Protect::InitiallySet];

impl Protect {
    /// Enables it on a VM.
    ///
    /// # Errors
    ///
    /// What the kernel answered; skips if it is not there.
    pub fn enable(self, kvm: &Kvm, vm: &Vm) -> Outcome {
        let bits = match self {
            Protect::Get => return Ok(()),
            Protect::Clear => kb::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            Protect::InitiallySet => {
                kb::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | kb::KVM_DIRTY_LOG_INITIALLY_SET
            }
        };
        let cap = kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let there = u32::try_from(kvm.capability(cap)).unwrap_or(0);
        if there & bits != bits {
            skip!("no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with {bits:#x}");
        }
        Ok(vm.enable_cap(cap, bits.into())?)
    }
}

/// Skips unless the device logs: that has no capability of its own.
///
/// # Errors
///
/// What the kernel answered; skips if it refuses the flag.
pub fn need_logging(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    let mem = Mapping::new(PAGE, false)?;
    let flag = kb::KVM_MEM_LOG_DIRTY_PAGES;
    match vm.set_memory(0, flag, 0, PAGE as u64, mem.addr() as u64) {
        Err(e) if e.errno == libc::EINVAL => skip!("no dirty logging"),
        r => Ok(r?),
    }
}

/// A guest whose vCPUs scatter writes over the pages of one slot.
///
/// The order of the fields is the order in which they are dropped.
#[derive(Debug)]
pub struct Guest {
    /// The vCPUs.
    pub vcpus: Vec<Vcpu>,
    /// The VM.
    pub vm: Vm,
    /// The device.
    pub kvm: Kvm,
    /// Guest-physical 0 onwards: code and traces, never logged.
    pub low: Mapping,
    /// The memory of slot [`SLOT`], at [`GPA`].
    pub mem: Mapping,
    /// Its pages: a power of two.
    pub pages: usize,
    /// How far each vCPU's trace was read.
    read: Vec<u32>,
}

impl Guest {
    /// A guest with `n` vCPUs. `setup` is called before there are vCPUs and slots.
    ///
    /// # Errors
    ///
    /// What the kernel answered, and what `setup` says.
    pub fn new(
        env: &Env,
        n: usize,
        mem: Mapping,
        setup: impl FnOnce(&Kvm, &Vm) -> Outcome,
    ) -> Result<Self, Verdict> {
        let kvm = env.open()?;
        let vm = kvm.create_vm()?;
        set_special_pages(&vm)?;
        setup(&kvm, &vm)?;
        let low = Mapping::new(at::SIZE, false)?;
        let size = low.len() as u64;
        vm.set_memory(0, 0, 0, size, low.addr() as u64)?;
        vm.set_memory(SLOT, 0, GPA, mem.len() as u64, mem.addr() as u64)?;
        low.write_bytes(usize_of(at::CODE), scatter());
        crate::guest::write_gdt(&low);
        let pages = mem.len() / PAGE;
        ensure!(pages.is_power_of_two(), "{pages} pages");
        let mut vcpus = Vec::new();
        for i in 0..n {
            let v = vm.create_vcpu(i)?;
            v.set_cpuid(&*kvm.supported_cpuid()?)?;
            start_vcpu(&v, Mode::Protected, at::CODE)?;
            let mut r = v.regs()?;
            r.rbx = block(i);
            r.rdi = GPA;
            r.rsi = pages as u64 - 1;
            r.rbp = i as u64 * 8;
            v.set_regs(&r)?;
            let seed = env.seed.wrapping_mul(77) + i as u64 * 1_234_567;
            low.write(usize_of(block(i)) + 8, seed as u32);
            vcpus.push(v);
        }
        Ok(Guest {
            vcpus,
            vm,
            kvm,
            low,
            mem,
            pages,
            read: vec![0; n],
        })
    }

    /// Turns logging of the slot on or off.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn log(&self, on: bool) -> Result<(), Error> {
        let flags = if on { kb::KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let (size, address) = (self.mem.len() as u64, self.mem.addr() as u64);
        self.vm.set_memory(SLOT, flags, GPA, size, address)
    }

    /// Reads the log and resets it.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn harvest(&self, protect: Protect) -> Result<Bitmap, Error> {
        let b = get_log(&self.vm, SLOT, self.pages)?;
        if protect != Protect::Get {
            clear_log(&self.vm, SLOT, self.pages, &b)?;
        }
        Ok(b)
    }

    fn count(&self, vcpu: usize) -> u32 {
        self.low.read(usize_of(block(vcpu)))
    }

    /// Lets a vCPU write `n` pages more than the host has read of its trace.
    pub fn allow(&self, vcpu: usize, n: u32) {
        let limit = self.read[vcpu] + n.min(TRACE);
        self.low.write(usize_of(block(vcpu)) + 4, limit);
    }

    /// The pages that a vCPU wrote to since the last call.
    pub fn trace(&mut self, vcpu: usize) -> Vec<usize> {
        let count = self.count(vcpu);
        let from = usize_of(block(vcpu)) + PAGE;
        let out = (self.read[vcpu]..count)
            .map(|i| self.low.read::<u32>(from + (i % TRACE) as usize * 4) as usize)
            .collect();
        self.read[vcpu] = count;
        out
    }

    /// Each vCPU writes to `n` pages, all at once; the set of them.
    ///
    /// # Errors
    ///
    /// An exit other than HLT at the limit.
    pub fn burst(&mut self, n: u32) -> Result<Bitmap, Verdict> {
        (0..self.vcpus.len()).for_each(|i| self.allow(i, n));
        let run = |v: &Vcpu| -> Outcome {
            v.run()?;
            match decode(v) {
                Exit::Hlt => Ok(()),
                other => fail!("exit {other:x?}"),
            }
        };
        if let [one] = &self.vcpus[..] {
            run(one)?;
        } else {
            std::thread::scope(|scope| {
                let threads: Vec<_> = self
                    .vcpus
                    .iter()
                    .map(|v| scope.spawn(move || run(v)))
                    .collect();
                threads
                    .into_iter()
                    .try_for_each(|t| t.join().unwrap_or(Err(panicked())))
            })?;
        }
        let mut written = Bitmap::new(self.pages);
        for i in 0..self.vcpus.len() {
            let trace = self.trace(i);
            ensure_eq!(trace.len(), n as usize, "writes of vCPU {i}");
            trace.into_iter().for_each(|p| written.set(p));
        }
        Ok(written)
    }

    /// The words that the vCPUs write in a page.
    fn words(&self, page: usize) -> [u64; 4] {
        self.mem.read(page * PAGE)
    }
}

fn block(vcpu: usize) -> u64 {
    at::FREE + vcpu as u64 * BLOCK
}

fn panicked() -> Verdict {
    Verdict::Fail("a thread panicked".into())
}

/// A vCPU's thread while [`chase`] runs.
#[derive(Debug, Default)]
struct Runner {
    tid: AtomicI32,
    stop: AtomicBool,
    /// How often the vCPU was found halted.
    halts: AtomicU32,
}

impl Runner {
    fn run(&self, v: &Vcpu, exit: impl Fn(&Vcpu) -> bool) -> Outcome {
        self.tid.store(gettid(), Ordering::SeqCst);
        let r = self.loops(v, exit);
        self.stop.store(true, Ordering::SeqCst);
        r
    }

    fn loops(&self, v: &Vcpu, exit: impl Fn(&Vcpu) -> bool) -> Outcome {
        while !self.stop.load(Ordering::SeqCst) {
            match v.run() {
                Err(e) if e.errno == libc::EINTR => continue,
                // Memory that the host made inaccessible for a while.
                Err(e) if e.errno == libc::EFAULT => std::thread::yield_now(),
                Err(e) => return Err(e.into()),
                Ok(_) if decode(v) == Exit::Hlt => {
                    self.halts.fetch_add(1, Ordering::SeqCst);
                    sleep_ms(1);
                }
                // Without room in a ring, for one.
                Ok(_) if exit(v) => sleep_ms(1),
                Ok(_) => fail!("exit {:x?}", decode(v)),
            }
        }
        Ok(())
    }
}

/// Copies memory by the log while the vCPUs write: the way of live migration.
///
/// In each phase the vCPUs write some pages, and the log is read time and again. Not every log must
/// have all that was written before it was read: a vCPU that was preempted on its way out of the guest
/// may owe it some (kvm-intel's does, with page modification logging). But when all vCPUs have halted,
/// and the log was read once more, the copy is the memory.
///
/// `exit` tells which exits beside HLT are right, `harvest` is the log of one round, and `disturb` is
/// called in each.
///
/// # Errors
///
/// A page that differs, an exit that is not right, what `harvest` and `disturb` say.
pub fn chase(
    g: &mut Guest,
    phases: u64,
    exit: impl Fn(&Vcpu) -> bool + Sync,
    mut harvest: impl FnMut(&Guest) -> Result<Bitmap, Verdict>,
    mut disturb: impl FnMut(&Guest, u64) -> Outcome,
) -> Outcome {
    interrupting_handler(SIG)?;
    let vcpus = std::mem::take(&mut g.vcpus);
    let runners: Vec<_> = vcpus.iter().map(|_| Runner::default()).collect();
    let outcome = std::thread::scope(|scope| -> Outcome {
        let exit = &exit;
        let threads: Vec<_> = vcpus
            .iter()
            .zip(&runners)
            .map(|(v, r)| scope.spawn(move || r.run(v, exit)))
            .collect();
        let mut copy: Vec<_> = (0..g.pages).map(|p| g.words(p)).collect();
        let mut rounds = 0;
        let mut body = || -> Outcome {
            for phase in 0..phases {
                rounds += phase_of(g, &runners, &mut copy, &mut harvest, &mut disturb)?;
                for (page, words) in copy.iter().enumerate() {
                    let want = g.words(page);
                    ensure_eq!(
                        *words,
                        want,
                        "the copy of page {page:#x} after phase {phase}"
                    );
                }
            }
            println!("{phases} phases, {rounds} logs");
            Ok(())
        };
        let r = body();
        for (t, r) in threads.iter().zip(&runners) {
            r.stop.store(true, Ordering::SeqCst);
            while !t.is_finished() {
                kick(r.tid.load(Ordering::SeqCst), SIG);
                sleep_ms(1);
            }
        }
        for t in threads {
            t.join().unwrap_or(Err(panicked()))?;
        }
        r
    });
    g.vcpus = vcpus;
    outcome
}

/// One phase; how often the log was read in it.
fn phase_of(
    g: &mut Guest,
    runners: &[Runner],
    copy: &mut [[u64; 4]],
    harvest: &mut impl FnMut(&Guest) -> Result<Bitmap, Verdict>,
    disturb: &mut impl FnMut(&Guest, u64) -> Outcome,
) -> Result<u64, Verdict> {
    const WRITES: u32 = 200;
    let mut take = |g: &Guest| -> Outcome {
        let log = harvest(g)?;
        // A write that came after the log, and that the next need not have, is copied all the same.
        log.pages().for_each(|p| copy[p] = g.words(p));
        Ok(())
    };
    (0..runners.len()).for_each(|i| g.allow(i, WRITES));
    let mut halted = vec![None; runners.len()];
    for round in 0..patient(3000) {
        take(g)?;
        disturb(g, round)?;
        if runners.iter().any(|r| r.stop.load(Ordering::SeqCst)) {
            // The thread's own outcome tells why.
            return Ok(round);
        }
        // A vCPU that was seen to have written all, and then to halt once more, owes nothing.
        for (i, (since, r)) in halted.iter_mut().zip(runners).enumerate() {
            if since.is_none() && g.count(i) == g.read[i] + WRITES {
                *since = Some(r.halts.load(Ordering::SeqCst));
            }
        }
        let owes_nothing = |(since, r): (&Option<u32>, &Runner)| {
            since.is_some_and(|n| r.halts.load(Ordering::SeqCst) != n)
        };
        if halted.iter().zip(runners).all(owes_nothing) {
            take(g)?;
            (0..runners.len()).for_each(|i| drop(g.trace(i)));
            return Ok(round + 2);
        }
        sleep_ms(1);
    }
    fail!("the vCPUs did not write {WRITES} pages each")
}
