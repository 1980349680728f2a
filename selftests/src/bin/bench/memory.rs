// SPDX-License-Identifier: GPL-2.0

//! Rows about memory: faults, dirty logging, what is taken away, and what tables take.

use super::Ticks;
use selftests::dirty::{clear_log, get_log, Bitmap, Memory, Protect, GPA, SLOT};
use selftests::guest::{at, usize_of};
use selftests::host::{meminfo, rdtsc};
use selftests::machine::{Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::vm::PreFault;
use selftests::{ensure, ensure_eq, guest_code, Env, Verdict};

/// Pages a round for touches.
const PAGES: usize = 256;
/// Pages of a log.
const LOGGED: usize = 1 << 16;
const GIB: usize = 1 << 30;

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

/// A machine whose guest touches `n` pages of `mem`, which it has not done yet.
fn machine(env: &Env, code: &[u8], mem: &Mapping, n: usize) -> Result<Machine, Verdict> {
    let m = Machine::new(env, Mode::Protected, code)?;
    m.vm.set_memory(SLOT, 0, GPA, mem.len() as u64, mem.addr() as u64)?;
    again(&m, n)?;
    Ok(m)
}

/// Puts the guest back to where it began.
fn again(m: &Machine, n: usize) -> Result<(), Verdict> {
    m.patch_regs(|r| {
        r.rip = at::CODE;
        r.rdi = GPA;
        r.rbp = n as u64;
    })?;
    Ok(())
}

/// Runs both passes of the guest: what a page costs in the first, more than in the second.
fn passes(m: &Machine, n: usize) -> Ticks {
    m.expect_hlt()?;
    let t: [u32; 4] = m.mem.read(usize_of(at::DATA));
    let first = f64::from(t[1].wrapping_sub(t[0]));
    let second = f64::from(t[3].wrapping_sub(t[2]));
    Ok((first - second) / n as f64)
}

/// Ticks a page of `size` bytes; large pages if they are of that size.
fn touch(env: &Env, code: &[u8], size: usize, n: usize, populate: bool) -> Ticks {
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
    // The machine's VM has to go before the memory: it is dropped first.
    let m = machine(env, code, &pages, n)?;
    passes(&m, n)
}

pub(super) fn touch_host(env: &Env) -> Ticks {
    touch(env, touch_write_code(), PAGE, PAGES, true)
}

pub(super) fn touch_new(env: &Env) -> Ticks {
    touch(env, touch_write_code(), PAGE, PAGES, false)
}

pub(super) fn touch_read(env: &Env) -> Ticks {
    touch(env, touch_read_code(), PAGE, PAGES, true)
}

pub(super) fn touch_large(env: &Env) -> Ticks {
    touch(env, touch_large_code(), HUGE, 24, true)
}

pub(super) fn touch_thp(env: &Env) -> Ticks {
    touch(env, touch_large_code(), HUGE, 24, false)
}

/// A machine whose slot of `n` small pages is logged, reset by KVM_CLEAR_DIRTY_LOG or by
/// KVM_GET_DIRTY_LOG; the guest has made all of them dirty.
fn logged(env: &Env, mem: &Mapping, n: usize, protect: Protect) -> Result<Machine, Verdict> {
    let m = machine(env, touch_write_code(), mem, n)?;
    protect.enable(&m.kvm, &m.vm)?;
    let flag = kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
    m.vm.set_memory(SLOT, flag, GPA, mem.len() as u64, mem.addr() as u64)?;
    m.expect_hlt()?;
    Ok(m)
}

/// The log of all pages, which have to be dirty.
fn full_log(m: &Machine, n: usize) -> Result<Bitmap, Verdict> {
    let log = get_log(&m.vm, SLOT, n)?;
    ensure_eq!(log.pages().count(), n, "dirty pages");
    Ok(log)
}

pub(super) fn dirty_write(env: &Env) -> Ticks {
    // Enough to fill several of a processor's page modification logs, where it has them.
    const N: usize = 2048;
    let mem = Memory::Small.map(N * PAGE)?;
    let m = logged(env, &mem, N, Protect::Clear)?;
    let log = full_log(&m, N)?;
    clear_log(&m.vm, SLOT, N, &log)?;
    again(&m, N)?;
    let ticks = passes(&m, N)?;
    full_log(&m, N)?;
    Ok(ticks)
}

pub(super) fn clear_dirty(env: &Env) -> Ticks {
    let mem = Memory::Huge.map(LOGGED * PAGE)?;
    let m = logged(env, &mem, LOGGED, Protect::Clear)?;
    let log = full_log(&m, LOGGED)?;
    let start = rdtsc();
    clear_log(&m.vm, SLOT, LOGGED, &log)?;
    let ticks = rdtsc() - start;
    Ok(ticks as f64 / LOGGED as f64)
}

pub(super) fn get_dirty(env: &Env) -> Ticks {
    let mem = Memory::Huge.map(LOGGED * PAGE)?;
    let m = logged(env, &mem, LOGGED, Protect::Get)?;
    let start = rdtsc();
    let log = get_log(&m.vm, SLOT, LOGGED)?;
    let ticks = rdtsc() - start;
    ensure_eq!(log.pages().count(), LOGGED, "dirty pages");
    Ok(ticks as f64 / LOGGED as f64)
}

/// A machine with a GiB that no one has touched.
fn untouched(env: &Env, size: usize) -> Result<(Machine, Mapping), Verdict> {
    let mem = Mapping::new(GIB, false)?;
    let advice = if size == PAGE {
        libc::MADV_NOHUGEPAGE
    } else {
        libc::MADV_HUGEPAGE
    };
    mem.advise(0, GIB, advice)?;
    let m = machine(env, touch_read_code(), &mem, GIB / PAGE)?;
    Ok((m, mem))
}

/// Maps all of it as the guest's reads do: it is the host's page of zeros again and again, which takes
/// no memory but tables.
fn map_zeros(m: &Machine) -> Result<(), Verdict> {
    let mut range = PreFault {
        gpa: GPA,
        size: GIB as u64,
        ..Default::default()
    };
    while range.size > 0 {
        m.vcpu.pre_fault(&mut range)?;
    }
    Ok(())
}

pub(super) fn unmap_1g(env: &Env) -> Ticks {
    let (m, mem) = untouched(env, PAGE)?;
    map_zeros(&m)?;
    let start = rdtsc();
    mem.advise(0, GIB, libc::MADV_DONTNEED)?;
    let ticks = rdtsc() - start;
    Ok(ticks as f64 / (GIB / PAGE) as f64)
}

/// Bytes of the kernel's secondary page tables: those of all VMs.
fn table_bytes() -> Result<f64, Verdict> {
    // Makes the sums exact, which each processor keeps a part of.
    let _ = std::fs::read("/proc/sys/vm/stat_refresh");
    let kib = meminfo("SecPageTables");
    ensure!(kib.is_some(), "no SecPageTables in /proc/meminfo");
    Ok(kib.unwrap_or(0) as f64 * 1024.0)
}

fn tables(env: &Env, size: usize) -> Ticks {
    let (m, _mem) = untouched(env, size)?;
    let before = table_bytes()?;
    map_zeros(&m)?;
    let bytes = table_bytes()? - before;
    // Fewer than any layout needs: then they are not counted.
    ensure!(
        bytes >= (GIB / size * 8) as f64,
        "{bytes} bytes of tables for a GiB"
    );
    Ok(bytes)
}

pub(super) fn tables_4k(env: &Env) -> Ticks {
    tables(env, PAGE)
}

pub(super) fn tables_2m(env: &Env) -> Ticks {
    tables(env, HUGE)
}
