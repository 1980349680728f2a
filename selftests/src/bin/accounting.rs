// SPDX-License-Identifier: GPL-2.0

//! What a VM counts and what it costs: statistics (`KVM_GET_STATS_FD`), the memory of its page tables,
//! and how soon all of it is given back.

use kvm_bindings as kb;
use selftests::guest::{at, PORT};
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::{Mapping, PAGE};
use selftests::sys;
use selftests::vm::Fd;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::mem::size_of;
use std::process::ExitCode;

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

fn main() -> ExitCode {
    selftests::tap::main(
        "accounting",
        tests![
            stats_format,
            stats_any_position,
            stats_outlive_files,
            stats_exits,
            stats_mapped,
        ],
    )
}
