// SPDX-License-Identifier: GPL-2.0

//! What a VM counts and what it costs: statistics (`KVM_GET_STATS_FD`), the memory of its page tables,
//! and how soon all of it is given back.

use kvm_bindings as kb;
use selftests::guest::{at, usize_of, PORT};
use selftests::host::{meminfo, patient, sleep_ms, Rng};
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::sys;
use selftests::vm::Fd;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::mem::size_of;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How many tables there are is a question of EPT: shadow tables come and go with the guest's own.
fn need_ept(env: &Env) -> Outcome {
    if env.open()?.capability(kb::KVM_CAP_PRE_FAULT_MEMORY) <= 0 {
        skip!("the guest's tables are shadowed");
    }
    Ok(())
}

/// The bytes of a statistics file from `from` on, as many as there are up to `len`.
fn pread(fd: &Fd, len: usize, from: usize) -> Result<Vec<u8>, Verdict> {
    let mut out = vec![0u8; len];
    let from = libc::off_t::try_from(from).unwrap_or(libc::off_t::MAX);
    // SAFETY: The buffer has that length.
    let n = unsafe { libc::pread(fd.0, out.as_mut_ptr().cast(), len, from) };
    let Ok(n) = usize::try_from(n) else {
        fail!("pread: {}", std::io::Error::last_os_error());
    };
    out.truncate(n);
    Ok(out)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_ne_bytes(word)
}

/// The string in `bytes`, which must end with a zero there.
fn string(bytes: &[u8]) -> Result<String, Verdict> {
    match std::ffi::CStr::from_bytes_until_nul(bytes) {
        Ok(s) => Ok(s.to_string_lossy().into_owned()),
        Err(_) => fail!("a name has no end"),
    }
}

/// A file of statistics, with its header and descriptors read.
struct Stats {
    fd: Fd,
    id: String,
    /// Where the values are in the file.
    data: usize,
    descriptions: Vec<Description>,
}

struct Description {
    name: String,
    flags: u32,
    exponent: i16,
    /// How many values.
    size: usize,
    /// Where they are in the data.
    offset: usize,
    bucket_size: u32,
}

/// The size of `struct kvm_stats_header`, and of `struct kvm_stats_desc` without its name.
const HEADER: usize = size_of::<kb::kvm_stats_header>();
const DESCRIPTION: usize = 16;

impl Stats {
    /// The statistics of the VM or vCPU behind `fd`.
    fn of(fd: &Fd) -> Result<Self, Verdict> {
        let fd = Fd(fd.ioctl(sys::unnamed(false, false, 0xce, 0), 0)?);
        let header = pread(&fd, HEADER, 0)?;
        ensure_eq!(header.len(), HEADER, "bytes of the header");
        let [flags, name_size, count, id, descriptions, data] =
            [0, 4, 8, 12, 16, 20].map(|at| u32_at(&header, at) as usize);
        ensure_eq!(flags, 0, "flags of the header");
        let step = DESCRIPTION + name_size;
        ensure!(
            id >= HEADER && descriptions >= HEADER && data >= HEADER,
            "parts of the file at {id}, {descriptions}, {data} overlap the header"
        );
        ensure!(
            data >= descriptions + count * step,
            "the data at {data} overlap the descriptors"
        );
        let id = string(&pread(&fd, name_size, id)?)?;
        let raw = pread(&fd, count * step, descriptions)?;
        ensure_eq!(raw.len(), count * step, "bytes of descriptors");
        let descriptions = raw
            .chunks(step)
            .map(|d| {
                Ok(Description {
                    name: string(&d[DESCRIPTION..])?,
                    flags: u32_at(d, 0),
                    exponent: i16::from_ne_bytes([d[4], d[5]]),
                    size: u16::from_ne_bytes([d[6], d[7]]).into(),
                    offset: u32_at(d, 8) as usize,
                    bucket_size: u32_at(d, 12),
                })
            })
            .collect::<Result<Vec<_>, Verdict>>()?;
        Ok(Stats {
            fd,
            id,
            data,
            descriptions,
        })
    }

    /// The value of a statistic, if there is one of that name.
    fn try_get(&self, name: &str) -> Result<Option<u64>, Verdict> {
        let Some(d) = self.descriptions.iter().find(|d| d.name == name) else {
            return Ok(None);
        };
        let raw = pread(&self.fd, 8, self.data + d.offset)?;
        ensure_eq!(raw.len(), 8, "bytes of {name}");
        let mut value = [0; 8];
        value.copy_from_slice(&raw);
        Ok(Some(u64::from_ne_bytes(value)))
    }

    /// The value of a statistic that both devices have.
    fn get(&self, name: &str) -> Result<u64, Verdict> {
        match self.try_get(name)? {
            Some(value) => Ok(value),
            None => fail!("{} has no {name}", self.id),
        }
    }

    /// What a reader of the format relies on.
    fn check(&self) -> Outcome {
        let mut end = 0;
        for d in &self.descriptions {
            let name = &d.name;
            let (kind, unit, base) = (d.flags & 0xf, d.flags & 0xf0, d.flags & 0xf00);
            ensure!(kind <= 4, "{name}: type {kind}");
            ensure!(unit <= 0x40, "{name}: unit {unit:#x}");
            ensure!(base <= 0x100, "{name}: base {base:#x}");
            let ok = match unit {
                0x20 => d.exponent <= 0,
                0x40 => d.exponent == 0,
                _ => d.exponent >= 0,
            };
            ensure!(ok, "{name}: exponent {} of unit {unit:#x}", d.exponent);
            ensure!(d.size > 0, "{name}: no values");
            ensure_eq!(d.bucket_size != 0, kind == 3, "{name}: has buckets");
            end = end.max(d.offset + d.size * 8);
        }
        ensure!(
            end >= self.descriptions.len() * 8,
            "{end} bytes of data for {} statistics",
            self.descriptions.len()
        );
        ensure_eq!(
            pread(&self.fd, end, self.data)?.len(),
            end,
            "bytes of data read"
        );
        Ok(())
    }
}

guest_code!(halt, ".code32", "2: hlt", "jmp 2b");

fn available(env: &Env) -> Outcome {
    if env.open()?.capability(kb::KVM_CAP_BINARY_STATS_FD) == 0 {
        skip!("no KVM_CAP_BINARY_STATS_FD");
    }
    Ok(())
}

fn stats_format(env: &Env) -> Outcome {
    available(env)?;
    let m = Machine::new(env, Mode::Protected, halt())?;
    let pid = std::process::id();
    let (vm, vcpu) = (Stats::of(&m.vm.fd)?, Stats::of(&m.vcpu.fd)?);
    ensure_eq!(vm.id, format!("kvm-{pid}"), "id of the VM");
    ensure_eq!(vcpu.id, format!("kvm-{pid}/vcpu-0"), "id of the vCPU");
    vm.check()?;
    vcpu.check()?;
    Stats::of(&m.vm.fd)?.check()?;
    for (fd, name) in [
        (&vm.fd, "anon_inode:kvm-vm-stats"),
        (&vcpu.fd, "anon_inode:kvm-vcpu-stats:0"),
    ] {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.0));
        let link = link.map(|p| p.to_string_lossy().into_owned());
        ensure_eq!(link.unwrap_or_default(), name, "name of the file");
        // SAFETY: Reads a flag of the descriptor.
        let flags = unsafe { libc::fcntl(fd.0, libc::F_GETFD) };
        ensure_eq!(flags, libc::FD_CLOEXEC, "flags of the descriptor");
    }
    Ok(())
}

/// The file is one sequence of bytes, whatever the pieces it is read in.
fn stats_any_position(env: &Env) -> Outcome {
    available(env)?;
    let m = Machine::new(env, Mode::Protected, halt())?;
    m.expect_hlt()?;
    let stats = Stats::of(&m.vcpu.fd)?;
    let whole = pread(&stats.fd, 1 << 20, 0)?;
    let end = whole.len();
    for step in [1, 7, 24, 4096] {
        let mut pieces = Vec::new();
        while pieces.len() < end {
            let piece = pread(&stats.fd, step, pieces.len())?;
            ensure!(!piece.is_empty(), "nothing at {} of {end}", pieces.len());
            pieces.extend(piece);
        }
        ensure!(pieces == whole, "in pieces of {step} the file is another");
    }
    for from in [end, end + 1, 1 << 40] {
        ensure_eq!(pread(&stats.fd, 8, from)?.len(), 0, "bytes at {from}");
    }
    ensure_eq!(pread(&stats.fd, 0, 0)?.len(), 0, "bytes of a read of 0");
    // SAFETY: The first address is no buffer, which is what is tested; the second is, of 8 bytes.
    let (fault, position, write) = unsafe {
        let mut word = [0u8; 8];
        let p = word.as_mut_ptr().cast::<libc::c_void>();
        (
            libc::pread(stats.fd.0, 8 as *mut _, 8, 0),
            [libc::read(stats.fd.0, p, 8), libc::read(stats.fd.0, p, 8)],
            libc::write(stats.fd.0, p, 8),
        )
    };
    ensure_eq!(fault, -1, "read to an address that is none");
    ensure_eq!(position, [8, 8], "bytes of two reads");
    ensure_eq!(write, -1, "write");
    Ok(())
}

/// The file keeps what it tells of.
fn stats_outlive_files(env: &Env) -> Outcome {
    available(env)?;
    let m = Machine::new(env, Mode::Protected, halt())?;
    m.expect_hlt()?;
    let (vm, vcpu) = (Stats::of(&m.vm.fd)?, Stats::of(&m.vcpu.fd)?);
    drop(m);
    vm.check()?;
    vcpu.check()?;
    ensure!(vcpu.get("exits")? > 0, "no exits");
    drop(vm);
    vcpu.check()
}

fn stats_exits(env: &Env) -> Outcome {
    available(env)?;
    guest_code!(
        code,
        ".code32",
        "mov esi, 10",
        "2: xor eax, eax",
        "cpuid",
        "dec esi",
        "jnz 2b",
        "out {P}, al",
        "in al, {P}",
        "mov edx, {M}",
        "mov [edx], eax",
        "mov eax, [edx]",
        "mov eax, 99",
        "vmcall",
        "hlt";
        P = PORT, M = at::MMIO
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let stats = Stats::of(&m.vcpu.fd)?;
    let expected = [
        ("io_exits", 2),
        ("mmio_exits", 2),
        ("insn_emulation", 2),
        ("halt_exits", 1),
        ("hypercalls", 1),
        ("signal_exits", 0),
    ];
    let mut before = Vec::new();
    for (name, _) in expected {
        before.push(stats.get(name)?);
    }
    let exits = stats.get("exits")?;
    while m.run()? != Exit::Hlt {}
    for ((name, n), before) in expected.iter().zip(before) {
        ensure_eq!(stats.get(name)? - before, *n, "{name}");
    }
    // Pages that were touched first, and interrupts of the host's, are exits as well.
    let exits = stats.get("exits")? - exits;
    ensure!((16..500).contains(&exits), "{exits} exits for 16 and a few");
    ensure!(stats.get("pf_taken")? > 0, "no page faults");
    ensure!(stats.get("pf_fixed")? > 0, "no page faults resolved");
    Ok(())
}

// Touches EBP pages from EDI on.
guest_code!(
    touch,
    ".code32",
    "2: inc dword ptr [edi]",
    "add edi, 4096",
    "dec ebp",
    "jnz 2b",
    "hlt"
);

/// What is mapped is counted, and what is not any more is not.
fn stats_mapped(env: &Env) -> Outcome {
    available(env)?;
    need_ept(env)?;
    const GPA: u64 = 0x100_0000;
    const N: usize = 700;
    let pages = Mapping::new(1024 * PAGE, false)?;
    pages.advise(0, pages.len(), libc::MADV_NOHUGEPAGE)?;
    let m = Machine::new(env, Mode::Protected, touch())?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    let stats = Stats::of(&m.vm.fd)?;
    let run = || -> Outcome {
        m.patch_regs(|r| {
            r.rip = at::CODE;
            r.rdi = GPA;
            r.rbp = N as u64;
        })?;
        m.expect_hlt()
    };
    // The guest's own pages are mapped after the first run.
    m.patch_regs(|r| {
        r.rdi = GPA;
        r.rbp = 1;
    })?;
    m.expect_hlt()?;
    pages.advise(0, pages.len(), libc::MADV_DONTNEED)?;
    let base = stats.get("pages_4k")?;
    let tables = stats.try_get("page_table_pages")?;
    run()?;
    let n = N as u64;
    ensure_eq!(stats.get("pages_4k")?, base + n, "pages, {N} more");
    pages.advise(0, 100 * PAGE, libc::MADV_DONTNEED)?;
    ensure_eq!(stats.get("pages_4k")?, base + n - 100, "pages, 100 less");
    run()?;
    ensure_eq!(stats.get("pages_4k")?, base + n, "pages, all again");
    pages.advise(0, pages.len(), libc::MADV_DONTNEED)?;
    ensure_eq!(stats.get("pages_4k")?, base, "pages, none of the slot");
    ensure_eq!(stats.try_get("page_table_pages")?, tables, "tables");
    run()?;
    ensure_eq!(stats.get("pages_4k")?, base + n, "pages, all again");
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    // kvm-intel drops all that is mapped when a slot goes.
    let left = stats.get("pages_4k")?;
    ensure!(left == base || left == 0, "{left} pages without the slot");
    ensure!(
        stats.get("remote_tlb_flush_requests")? > 0,
        "no flushes requested"
    );
    Ok(())
}

// Reads a word of each of EBP pages, whose addresses begin at ESI, to EDI and on.
guest_code!(
    gather,
    ".code32",
    "cld",
    "2: lodsd",
    "mov eax, [eax]",
    "stosd",
    "dec ebp",
    "jnz 2b",
    "hlt"
);

/// Where the list of addresses is, and where the words go.
const LIST: u64 = 0x800_0000;
const WORDS: u64 = LIST + 0x10000;

/// Many slots map parts of the same memory. Whatever the host does to a page, the guest sees it
/// through each of them, also when slots come and go.
fn slots_of_one_memory(env: &Env) -> Outcome {
    const SLOTS: u32 = 200;
    const HOST: u64 = 64;
    let mut rng = Rng::new(env.seed);
    let table = Mapping::new(0x20000, false)?;
    let shared = Mapping::new(usize_of(HOST) * PAGE, false)?;
    shared.advise(0, shared.len(), libc::MADV_NOHUGEPAGE)?;
    let m = Machine::new(env, Mode::Protected, gather())?;
    m.vm.set_memory(1000, 0, LIST, table.len() as u64, table.addr() as u64)?;
    // Of each slot: its first guest address, its first host page, and its pages; none if it is not
    // there. No two have the same place.
    let mut slots = [(0, 0, 0); SLOTS as usize];
    for round in 0..env.fewer(20) as u32 {
        for _ in 0..if round == 0 { 400 } else { 20 } {
            let i = rng.below(SLOTS.into()) as u32;
            let slot = &mut slots[i as usize];
            if slot.2 != 0 {
                m.vm.set_memory(i, 0, 0, 0, 0)?;
                *slot = (0, 0, 0);
                continue;
            }
            let pages = 1 + rng.below(12);
            let first = rng.below(HOST - pages);
            let gpa = 0x1000_0000 + u64::from(i) * 0x10_0000 + rng.below(200) * 0x1000;
            if i == 0 {
                // The machine's own memory.
                continue;
            }
            let hva = shared.addr() as u64 + first * 0x1000;
            m.vm.set_memory(i, 0, gpa, pages * 0x1000, hva)?;
            *slot = (gpa, first, pages);
        }
        for page in 0..HOST {
            match rng.below(3) {
                0 => shared.advise(usize_of(page) * PAGE, PAGE, libc::MADV_DONTNEED)?,
                1 => shared.write(usize_of(page) * PAGE, rng.number() as u32),
                _ => {}
            }
        }
        let mut hosts = Vec::new();
        for (gpa, first, pages) in slots {
            for page in 0..pages {
                table.write(hosts.len() * 4, (gpa + page * 0x1000) as u32);
                hosts.push(first + page);
            }
        }
        m.patch_regs(|r| {
            r.rip = at::CODE;
            r.rsi = LIST;
            r.rdi = WORDS;
            r.rbp = hosts.len() as u64;
        })?;
        m.expect_hlt()?;
        for (i, page) in hosts.iter().enumerate() {
            let got: u32 = table.read(usize_of(WORDS - LIST) + i * 4);
            let want: u32 = shared.read(usize_of(*page) * PAGE);
            ensure_eq!(got, want, "round {round}, word {i}, of host page {page}");
        }
    }
    Ok(())
}

/// Slots of one page, each under a table of its own: far more tables than memory.
fn sparse_slots(m: &Machine, page: &Mapping, slots: u64) -> Outcome {
    for i in 0..slots {
        let gpa = SPARSE + i * HUGE as u64;
        m.vm.set_memory(1 + i as u32, 0, gpa, 0x1000, page.addr() as u64)?;
    }
    Ok(())
}

const SPARSE: u64 = 0x1000_0000;

// Touches a page in each of EBP times 2 MiB from EDI on.
guest_code!(
    touch_sparse,
    ".code32",
    "2: mov eax, [edi]",
    "add edi, 0x200000",
    "dec ebp",
    "jnz 2b",
    "hlt"
);

fn run_sparse(m: &Machine, slots: u64) -> Outcome {
    m.patch_regs(|r| {
        r.rip = at::CODE;
        r.rdi = SPARSE;
        r.rbp = slots;
    })?;
    m.expect_hlt()
}

/// Tables go when nothing is left in them, however that came about.
fn empty_tables_go(env: &Env) -> Outcome {
    available(env)?;
    need_ept(env)?;
    const N: usize = 1024;
    // Not aligned to what a table spans: it is the middle one of three that is filled.
    const GPA: u64 = 0x1010_0000;
    let pages = Mapping::new(N * PAGE, false)?;
    pages.advise(0, pages.len(), libc::MADV_NOHUGEPAGE)?;
    let m = Machine::new(env, Mode::Protected, touch())?;
    let stats = Stats::of(&m.vm.fd)?;
    let run = |gpa: u64, n: usize| -> Outcome {
        m.patch_regs(|r| {
            r.rip = at::CODE;
            r.rdi = gpa;
            r.rbp = n as u64;
        })?;
        m.expect_hlt()
    };
    // Only rkvm counts its tables; what is checked of others is that they work.
    let tables = || {
        stats
            .try_get("page_table_pages")
            .map(Option::unwrap_or_default)
    };
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    run(GPA, 1)?;
    pages.advise(0, PAGE, libc::MADV_DONTNEED)?;
    let before = tables()?;

    let mut order: Vec<usize> = (0..N).collect();
    let mut rng = Rng::new(env.seed);
    for round in 0..3 {
        run(GPA, N)?;
        if before != 0 {
            ensure!(tables()? >= before + 3, "tables do not show");
        }
        for i in (1..N).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        for page in &order {
            pages.advise(page * PAGE, PAGE, libc::MADV_DONTNEED)?;
        }
        ensure_eq!(tables()?, before, "tables without a leaf, round {round}");
    }

    // A slot that moves leaves nothing behind either.
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    let mut most = 0;
    for i in 0..env.fewer(300) {
        let gpa = SPARSE + i * HUGE as u64 + 0x3000;
        m.vm.set_memory(1, 0, gpa, 0x2000, pages.addr() as u64)?;
        run(gpa, 2)?;
        most = most.max(tables()?);
    }
    ensure!(
        most <= before + 3,
        "{most} tables, {before} without the slot"
    );
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    ensure!(tables()? <= before, "tables that the slot left behind");
    Ok(())
}

/// The memory of a VM with many leaves is given back soon: 256 MiB, all of them small pages.
fn prompt_teardown(env: &Env) -> Outcome {
    const N: usize = 1024;
    const SLOTS: u64 = 64;
    let size = (N * PAGE) as u64;
    let before = meminfo("SecPageTables");
    let pages = Mapping::new(N * PAGE, false)?;
    pages.advise(0, pages.len(), libc::MADV_NOHUGEPAGE)?;
    let m = Machine::new(env, Mode::Protected, touch())?;
    let slots = env.fewer(SLOTS);
    for i in 0..slots {
        let addr = pages.addr() as u64;
        m.vm.set_memory(1 + i as u32, 0, SPARSE + i * size, size, addr)?;
    }
    let fill = || {
        m.patch_regs(|r| {
            r.rip = at::CODE;
            r.rdi = SPARSE;
            r.rbp = slots * N as u64;
        })?;
        m.expect_hlt()
    };
    let timed = |what: &str, f: &mut dyn FnMut() -> Outcome| -> Outcome {
        let start = Instant::now();
        f()?;
        let took = start.elapsed();
        println!("{what}: {took:?}");
        ensure!(
            took < Duration::from_millis(patient(1000)),
            "{what} took {took:?}"
        );
        Ok(())
    };
    fill()?;
    timed("MADV_DONTNEED", &mut || {
        Ok(pages.advise(0, pages.len(), libc::MADV_DONTNEED)?)
    })?;
    fill()?;
    timed("deletion of a slot", &mut || {
        Ok(m.vm.set_memory(1, 0, 0, 0, 0)?)
    })?;
    let mut m = Some(m);
    timed("close", &mut || {
        m = None;
        Ok(())
    })?;
    // kvm-intel frees its tables a while later.
    for _ in 0..patient(2000) {
        if meminfo("SecPageTables") <= before {
            return Ok(());
        }
        sleep_ms(1);
    }
    fail!(
        "SecPageTables: {:?} KiB, then {:?}",
        before,
        meminfo("SecPageTables")
    )
}

/// A control group of the memory controller, removed when dropped.
struct Group(String);

impl Group {
    const ROOT: &'static str = "/tmp/cgroup";

    fn new(name: &str) -> Result<Self, Verdict> {
        let root = Self::ROOT;
        let _ = std::fs::create_dir(root);
        let mount = || {
            // SAFETY: Strings with their terminators; no data.
            unsafe {
                libc::mount(
                    c"cgroup2".as_ptr(),
                    c"/tmp/cgroup".as_ptr(),
                    c"cgroup2".as_ptr(),
                    0,
                    std::ptr::null(),
                )
            }
        };
        if !std::path::Path::new(&format!("{root}/cgroup.procs")).exists() && mount() != 0 {
            skip!("no cgroup2: {}", std::io::Error::last_os_error());
        }
        if std::fs::write(format!("{root}/cgroup.subtree_control"), "+memory").is_err() {
            skip!("no memory controller");
        }
        let path = format!("{root}/{name}-{}", std::process::id());
        match std::fs::create_dir(&path) {
            Ok(()) => Ok(Group(path)),
            Err(e) => fail!("{path}: {e}"),
        }
    }

    fn read(&self, file: &str) -> Result<String, Verdict> {
        match std::fs::read_to_string(format!("{}/{file}", self.0)) {
            Ok(text) => Ok(text),
            Err(e) => fail!("{}/{file}: {e}", self.0),
        }
    }

    fn write(&self, file: &str, text: &str) -> Outcome {
        match std::fs::write(format!("{}/{file}", self.0), text) {
            Ok(()) => Ok(()),
            Err(e) => fail!("{text} to {}/{file}: {e}", self.0),
        }
    }

    /// A number from a file of `key value` lines.
    fn number(&self, file: &str, key: &str) -> Result<u64, Verdict> {
        let text = self.read(file)?;
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
        match line.and_then(|v| v.trim().parse().ok()) {
            Some(value) => Ok(value),
            None => fail!("{file} has no {key}"),
        }
    }

    /// The page tables of guests, in bytes.
    fn tables(&self) -> Result<u64, Verdict> {
        self.number("memory.stat", "sec_pagetables")
    }

    /// Moves the calling process into the group.
    fn enter(&self) -> Outcome {
        self.write("cgroup.procs", "0")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever is still in it goes back to the root.
        if let Ok(pids) = self.read("cgroup.procs") {
            for pid in pids.lines() {
                let _ = std::fs::write(format!("{}/cgroup.procs", Self::ROOT), pid);
            }
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// How many tables the tests of control groups make, or a fifth where everything is slow. The kernel
/// counts and charges them in batches of 64.
const TABLES: u64 = 1200;

/// The tables of a VM are charged to the control group of the process that runs it, and uncharged.
fn charged_to_cgroup(env: &Env) -> Outcome {
    need_ept(env)?;
    let tables = env.fewer(TABLES);
    let group = Group::new("charge")?;
    group.enter()?;
    let page = Mapping::new(PAGE, false)?;
    page.write(0, 1u32);
    let m = Machine::new(env, Mode::Protected, touch_sparse())?;
    sparse_slots(&m, &page, tables)?;
    let before = group.tables()?;
    let current = |group: &Group| -> Result<u64, Verdict> {
        Ok(group.read("memory.current")?.trim().parse().unwrap_or(0))
    };
    let used = current(&group)?;
    run_sparse(&m, tables)?;
    let during = group.tables()?;
    let more = current(&group)?.saturating_sub(used);
    println!("sec_pagetables {before}, then {during}; memory.current {more} more");
    let slack = 128 * PAGE as u64;
    let least = tables * PAGE as u64 - slack;
    ensure!(
        during - before >= least,
        "sec_pagetables grew from {before} to {during}"
    );
    ensure!(more >= least, "memory.current grew by {more}");
    drop(m);
    for _ in 0..patient(3000) {
        if group.tables()? <= slack && current(&group)? <= used + slack {
            return Ok(());
        }
        sleep_ms(1);
    }
    fail!(
        "without the VM sec_pagetables is {}, memory.current {}",
        group.tables()?,
        current(&group)?
    )
}

/// A control group that is full ends its own VMM, and nothing else.
fn full_cgroup(env: &Env) -> Outcome {
    need_ept(env)?;
    let tables = env.fewer(TABLES);
    let group = Group::new("full")?;
    let page = Mapping::new(PAGE, true)?;
    page.write(0, 1u32);
    // SAFETY: The child builds its own VM and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let run = || -> Outcome {
            group.enter()?;
            let m = Machine::new(env, Mode::Protected, touch_sparse())?;
            sparse_slots(&m, &page, tables)?;
            let used: u64 = group.read("memory.current")?.trim().parse().unwrap_or(0);
            let room = tables * PAGE as u64 / 4;
            group.write("memory.max", &format!("{}", used + room))?;
            run_sparse(&m, tables)
        };
        let outcome = run();
        println!("the VMM: {outcome:?}");
        let refused = matches!(&outcome, Err(Verdict::Fail(e)) if e.contains("ENOMEM"));
        // SAFETY: Ends the child.
        unsafe { libc::_exit(if refused { 17 } else { 1 }) };
    }
    let deadline = Instant::now() + Duration::from_millis(patient(10_000));
    let Some(status) = selftests::tap::wait_until(pid, deadline) else {
        // SAFETY: A signal to our own child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        fail!("the VMM did not end");
    };
    let kills = group.number("memory.events", "oom_kill")?;
    println!("wait status {status:#x}, {kills} killed");
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
    ensure!(
        killed && kills > 0 || status == 17 << 8,
        "wait status of the VMM {status:#x}, expected a kill for want of memory, or ENOMEM"
    );
    let m = Machine::new(env, Mode::Protected, halt())?;
    m.expect_hlt()
}

fn main() -> ExitCode {
    selftests::tap::main(
        "accounting",
        tests![
            stats_format,
            stats_any_position,
            stats_outlive_files,
            stats_exits,
            stats_mapped,
            slots_of_one_memory,
            empty_tables_go,
            prompt_teardown => 60,
            charged_to_cgroup,
            full_cgroup,
        ],
    )
}
