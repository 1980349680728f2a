// SPDX-License-Identifier: GPL-2.0

//! KVM_SET_NR_MMU_PAGES: a limit on shadow page tables takes nothing from the guest.
//!
//! The guest goes around many address spaces, each with tables of its own: far more than the limit lets be shadowed at
//! once. With two-dimensional paging the limit has nothing to limit, and the guest still runs.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, pte, usize_of, PORT};
use selftests::machine::{Machine, Mode};
use selftests::stats::Stats;
use selftests::sys::{self, Ioctl};
use selftests::{ensure, ensure_eq, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// The number of address spaces.
const SPACES: u64 = 120;
/// Where the first one's tables are: four pages of tables and one of data.
const FIRST: u64 = 0x20_0000;
/// Bytes of an address space.
const STEP: u64 = 0x5000;
/// The linear address of each one's page of data.
const DATA: u64 = 0x80_0000_0000;
/// Bytes of memory.
const SIZE: usize = 0x50_0000;
/// The call that once read the limit back.
const KVM_GET_NR_MMU_PAGES: Ioctl = Ioctl {
    nr: 0xae45,
    name: "KVM_GET_NR_MMU_PAGES",
};
/// The least limit.
const LEAST: usize = 64;

// RCX: rounds. Each visit of an address space counts in its page, where its number must be, and moves the
// entry of its page table to another page of that table and back, as far as the guest sees.
guest_code!(
    around,
    ".code64",
    "mov rbp, {DATA}",
    "2: mov rsi, {FIRST}",
    "xor edi, edi",
    "3: mov cr3, rsi",
    "cmp [rbp], rdi",
    "jne 5f",
    "inc qword ptr [rbp + 8]",
    "mov rax, [rsi + 0x3000]",
    "mov [rsi + 0x3008], rax",
    "mov rdx, [rbp + 0x1008]",
    "cmp [rbp + 8], rdx",
    "jne 5f",
    "mov qword ptr [rsi + 0x3008], 0",
    "lea rdx, [rbp + 0x1000]",
    "invlpg [rdx]",
    "add rsi, {STEP}",
    "inc rdi",
    "cmp rdi, {SPACES}",
    "jb 3b",
    "dec rcx",
    "jnz 2b",
    "xor eax, eax",
    "4: out {P}, al",
    "5: mov eax, 1",
    "jmp 4b";
    DATA = DATA, FIRST = FIRST, STEP = STEP, SPACES = SPACES, P = PORT,
);

/// A guest with its address spaces.
fn machine(env: &Env) -> Result<Machine, Verdict> {
    let m = Machine::bare(env, SIZE)?;
    m.vcpu.set_cpuid(&*m.kvm.supported_cpuid()?)?;
    m.start(Mode::Long, around())?;
    let flags = pte::P | pte::W | pte::U;
    for space in 0..SPACES {
        let root = FIRST + space * STEP;
        // The second entry of the root, and the first of the other tables.
        let slots = [(root + 8), root + 0x1000, root + 0x2000, root + 0x3000];
        for (i, slot) in (1u64..).zip(slots) {
            m.mem.write(usize_of(slot), (root + 0x1000 * i) | flags);
        }
        m.mem.write(usize_of(root), at::PDPT | flags);
        m.mem.write(usize_of(root + 0x4000), space);
    }
    Ok(m)
}

fn rounds(m: &Machine, n: u64, so_far: &mut u64) -> Outcome {
    m.patch_regs(|r| {
        r.rip = at::CODE;
        r.rcx = n;
    })?;
    let failed = m.expect_out(PORT)?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        failed,
        0,
        "the guest found something wrong in space {} with {} rounds left",
        r.rdi,
        r.rcx
    );
    *so_far += n;
    for space in 0..SPACES {
        let count: u64 = m.mem.read(usize_of(FIRST + space * STEP + 0x4008));
        ensure_eq!(count, *so_far, "visits of space {space}");
    }
    Ok(())
}

/// A statistic of the VM, if there is such a one.
fn statistic(m: &Machine, name: &str) -> Option<u64> {
    Stats::open(&m.kvm, &m.vm.fd).ok()?.get(name).ok()?
}

fn limit(m: &Machine, pages: usize) -> Outcome {
    m.vm.fd.ioctl(sys::KVM_SET_NR_MMU_PAGES, pages)?;
    Ok(())
}

/// How many pages shadow the guest's tables, if that is told: no more than the limit.
fn within(m: &Machine, pages: u64) -> Outcome {
    if let Some(n) = statistic(m, "mmu_shadow_pages") {
        println!("{n} shadow pages with a limit of {pages}");
        ensure!(n <= pages, "{n} shadow pages with a limit of {pages}");
    }
    Ok(())
}

/// The least number; less is refused, and changes nothing.
fn least(env: &Env) -> Outcome {
    let m = machine(env)?;
    for bad in [0, 1, LEAST - 1] {
        let r = m.vm.fd.ioctl(sys::KVM_SET_NR_MMU_PAGES, bad);
        expect_errno(r, libc::EINVAL, "too few pages")?;
    }
    for good in [LEAST, LEAST + 1, 1 << 20, usize::MAX >> 1, usize::MAX] {
        limit(&m, good)?;
    }
    rounds(&m, 1, &mut 0)
}

/// With a limit from the start.
fn from_start(env: &Env) -> Outcome {
    let m = machine(env)?;
    limit(&m, LEAST)?;
    let mut so_far = 0;
    for _ in 0..3 {
        rounds(&m, env.fewer(5), &mut so_far)?;
        within(&m, LEAST as u64)?;
    }
    Ok(())
}

/// With a limit that comes when there are more pages already, goes up again, and down.
fn changes(env: &Env) -> Outcome {
    let m = machine(env)?;
    let mut so_far = 0;
    rounds(&m, 2, &mut so_far)?;
    for pages in [LEAST, 5000, 100, 1000, LEAST] {
        limit(&m, pages)?;
        rounds(&m, 2, &mut so_far)?;
        within(&m, pages as u64)?;
    }
    Ok(())
}

/// The limit that nobody set follows the memory; slots come and go under it.
fn slots(env: &Env) -> Outcome {
    let m = machine(env)?;
    let mut so_far = 0;
    for turn in 0..4 {
        m.vm.set_memory(0, 0, 0, 0, 0)?;
        m.vm.set_memory(0, 0, 0, SIZE as u64, m.mem.addr() as u64)?;
        if turn == 2 {
            limit(&m, LEAST)?;
        }
        rounds(&m, 2, &mut so_far)?;
    }
    within(&m, LEAST as u64)
}

/// There is no call that reads the limit back.
fn no_getter(env: &Env) -> Outcome {
    let m = machine(env)?;
    let r = m.vm.fd.ioctl(KVM_GET_NR_MMU_PAGES, 0);
    ensure!(r.is_err(), "KVM_GET_NR_MMU_PAGES gave {r:?}");
    ensure!(
        m.kvm.capability(kb::KVM_CAP_MMU_SHADOW_CACHE_CONTROL) > 0,
        "KVM_CAP_MMU_SHADOW_CACHE_CONTROL"
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "nr_mmu_pages",
        tests![least, from_start, changes, slots, no_getter],
    )
}
