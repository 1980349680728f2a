// SPDX-License-Identifier: GPL-2.0

//! What the dirty log takes for a write: every kind of write, and nothing else.

use kvm_bindings as kb;
use selftests::dirty::{
    clear_log, get_log, need_logging, Bitmap, Memory, Protect, GPA, PROTECT, SLOT,
};
use selftests::guest::{at, pte, usize_of, PORT};
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const LOG: u32 = kb::KVM_MEM_LOG_DIRTY_PAGES;

/// Reading a page that is mapped does not make it dirty, whatever it is mapped with.
fn reads(env: &Env) -> Outcome {
    need_logging(env)?;
    guest_code!(code, ".code32",
        "2: mov edx, {G}",
        "mov ecx, ebp",
        "3: add eax, [edx]",
        "or [edx + 8], ebx",
        "add edx, 4096",
        "loop 3b",
        "hlt",
        "4: mov edx, {G}",
        "mov ecx, ebp",
        "5: add eax, [edx]",
        "cmp [edx + 16], eax",
        "test [edx + 24], eax",
        "add edx, 4096",
        "loop 5b",
        "hlt",
        "jmp 4b";
        G = GPA,
    );
    for memory in [Memory::Small, Memory::Huge, Memory::Memfd] {
        for protect in PROTECT {
            let m = Machine::new(env, Mode::Protected, code())?;
            protect.enable(&m.kvm, &m.vm)?;
            let mem = memory.map(HUGE)?;
            let pages = HUGE / PAGE;
            m.vm.set_memory(SLOT, LOG, GPA, HUGE as u64, mem.addr() as u64)?;
            m.patch_regs(|r| r.rbp = pages as u64)?;
            m.expect_hlt()?;
            let log = get_log(&m.vm, SLOT, pages)?;
            log.expect(&Bitmap::full(pages), "the log after writes")?;
            if protect != Protect::Get {
                clear_log(&m.vm, SLOT, pages, &log)?;
            }
            for _ in 0..2 {
                m.expect_hlt()?;
                let log = get_log(&m.vm, SLOT, pages)?;
                let what = format!("{memory:?}, {protect:?}: the log after reads");
                log.expect(&Bitmap::new(pages), &what)?;
            }
            drop(m);
        }
    }
    Ok(())
}

/// A machine with a logged slot of `pages` pages, all of them mapped and clean.
fn clean(env: &Env, mode: Mode, code: &[u8], pages: usize) -> Result<(Machine, Mapping), Verdict> {
    need_logging(env)?;
    let m = Machine::new(env, mode, code)?;
    let mem = Memory::Small.map(pages * PAGE)?;
    m.vm.set_memory(SLOT, LOG, GPA, mem.len() as u64, mem.addr() as u64)?;
    Ok((m, mem))
}

fn expect_pages(m: &Machine, pages: usize, want: &[usize], what: &str) -> Outcome {
    let mut set = Bitmap::new(pages);
    want.iter().for_each(|p| set.set(*p));
    get_log(&m.vm, SLOT, pages)?.expect(&set, what)
}

/// Each way to write: to one page, or across the border of two.
fn kinds_of_write(env: &Env) -> Outcome {
    macro_rules! kinds {
        ($($name:ident: $($line:literal),+;)*) => { [$({
            guest_code!($name, ".code64", "mov edi, ebx", $($line,)+ "hlt");
            (stringify!($name), $name as fn() -> &'static [u8])
        }),*] };
    }
    let kinds = kinds! {
        mov8: "mov [rbx], rax";
        mov4: "mov dword ptr [rbx], 7";
        increment: "inc qword ptr [rbx]";
        exchange: "xchg [rbx], rax";
        locked_add: "lock add qword ptr [rbx], 5";
        locked_xadd: "lock xadd [rbx], rcx";
        cmpxchg: "xor eax, eax", "lock cmpxchg [rbx], rcx";
        bit_set: "bts qword ptr [rbx], 9";
        string: "mov ecx, 8", "rep stosb";
        moved: "mov esi, 0xa000", "movsq";
        pushed: "lea rsp, [rbx + 8]", "push rax";
        stored: "movnti [rbx], rax";
        vector: "movups [rbx], xmm0";
        float: "fnstenv [rbx]";
        called: "lea rsp, [rbx + 8]", "call 2f", "2:";
    };
    for (name, code) in kinds {
        for (offset, want) in [(0x10, &[5][..]), (0xffe, &[5, 6][..])] {
            let (m, mem) = clean(env, Mode::Long, code(), 64)?;
            for round in 0..3 {
                m.patch_regs(|r| {
                    r.rip = at::CODE;
                    r.rsp = at::STACK;
                    r.rbx = GPA + 5 * PAGE as u64 + offset;
                    r.rax = 0x1122_3344_5566_7788;
                })?;
                mem.fill(5 * PAGE, 2 * PAGE, 0);
                m.expect_hlt()?;
                let what = format!("{name} at {offset:#x}, time {round}");
                expect_pages(&m, 64, want, &what)?;
            }
        }
    }
    Ok(())
}

/// Memory that the kernel writes in the guest's name: the target of a string input, the target of a
/// copy from a device.
fn emulated_writes(env: &Env) -> Outcome {
    guest_code!(insb, ".code64", "mov dx, {P}", "insb", "hlt"; P = PORT);
    guest_code!(insd, ".code64", "mov dx, {P}", "insd", "hlt"; P = PORT);
    guest_code!(rep_insb, ".code64", "mov dx, {P}", "rep insb", "hlt"; P = PORT);
    guest_code!(movsb, ".code64", "mov esi, {M}", "movsb", "hlt"; M = at::MMIO);
    guest_code!(movsq, ".code64", "mov esi, {M}", "movsq", "hlt"; M = at::MMIO);
    guest_code!(rep_movsd, ".code64", "mov esi, {M}", "rep movsd", "hlt"; M = at::MMIO);
    let base = GPA + 7 * PAGE as u64;
    let border = base + 0xffe;
    for (name, code, target, count, bytes) in [
        ("insb", insb as fn() -> &'static [u8], base, 1, 1),
        ("insd", insd, base + 8, 1, 4),
        ("insd across pages", insd, border, 1, 4),
        ("rep insb", rep_insb, base + 0x100, 300, 300),
        ("rep insb across pages", rep_insb, base + 0xf00, 5000, 5000),
        ("movsb", movsb, base, 1, 1),
        ("movsq", movsq, base + 16, 1, 8),
        ("movsq across pages", movsq, border, 1, 8),
        ("rep movsd", rep_movsd, base + 0xff0, 16, 64),
    ] {
        let (m, mem) = clean(env, Mode::Long, code(), 64)?;
        for round in 0..2u8 {
            m.patch_regs(|r| {
                r.rip = at::CODE;
                r.rdi = target;
                r.rcx = count;
            })?;
            let value = round + 0x31;
            loop {
                match m.run()? {
                    Exit::In { size, count, .. } => {
                        m.io_reply(&vec![value; usize::from(size) * count as usize]);
                    }
                    Exit::MmioRead { len, .. } => m.mmio_reply(&vec![value; len as usize]),
                    Exit::Hlt => break,
                    other => fail!("{name}: exit {other:x?}\n{}", m.describe()),
                }
            }
            let offset = usize_of(target - GPA);
            let got = mem.read_bytes(offset, bytes);
            ensure!(got.iter().all(|b| *b == value), "{name}: bytes in memory");
            let want: Vec<usize> = (offset / PAGE..=(offset + bytes - 1) / PAGE).collect();
            expect_pages(&m, 64, &want, &format!("{name}, time {round}"))?;
        }
    }
    Ok(())
}

/// The processor writes accessed and dirty flags to the guest's page tables, and pushes to its stack
/// what an exception leaves: all of that is in the log.
fn written_by_the_processor(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "2: mov cr3, rbx",
        "mov edx, 0x40000000",
        "mov ecx, 64",
        "3: mov eax, [rdx]",
        "add rdx, 4096",
        "loop 3b",
        "mov ecx, 32",
        "4: mov [rdx], ecx",
        "add rdx, 4096",
        "loop 4b",
        "ud2",
        "5: hlt",
        "jmp 2b",
    );
    need_logging(env)?;
    for protect in PROTECT {
        let m = Machine::new(env, Mode::Long, code())?;
        protect.enable(&m.kvm, &m.vm)?;
        let mem = Memory::Small.map(64 * PAGE)?;
        m.vm.set_memory(SLOT, LOG, GPA, mem.len() as u64, mem.addr() as u64)?;
        // The tables are in pages 0 to 4 of the logged slot, and the stack is in page 5: all as before, and
        // small pages from 1 GiB onwards, which show the guest's free memory.
        let table = |page: u64| GPA + page * PAGE as u64;
        let flags = pte::P | pte::W | pte::U;
        let fill = || {
            let low: Vec<u64> = (0..4)
                .map(|i| m.mem.read(usize_of(at::PDPT) + i * 8))
                .collect();
            mem.write(0, table(1) | flags);
            for (i, e) in low.iter().enumerate() {
                mem.write(PAGE + i * 8, *e);
            }
            mem.write(PAGE + 8, table(2) | flags);
            mem.write(2 * PAGE, table(3) | flags);
            for i in 0..96u64 {
                mem.write(3 * PAGE + usize_of(i) * 8, (at::FREE + i * 4096) | flags);
            }
        };
        let resume = at::CODE + code().len() as u64 - 3;
        m.resume_at(resume);
        m.patch_regs(|r| {
            r.rbx = table(0);
            r.rsp = table(6);
        })?;
        fill();
        for round in 0..4 {
            let before: Vec<Vec<u8>> = (0..6).map(|p| mem.read_bytes(p * PAGE, PAGE)).collect();
            m.expect_exception(6)?;
            m.expect_hlt()?;
            let log = get_log(&m.vm, SLOT, 64)?;
            if protect != Protect::Get {
                clear_log(&m.vm, SLOT, 64, &log)?;
            }
            for (p, old) in before.iter().enumerate() {
                ensure!(
                    log.has(p) || mem.read_bytes(p * PAGE, PAGE) == *old,
                    "{protect:?}, round {round}: page {p} changed, and is not in the log"
                );
            }
            for i in 0..96 {
                let e: u64 = mem.read(3 * PAGE + i * 8);
                let want = if i < 64 { 0x20 } else { 0x60 };
                ensure_eq!(e & 0x60, want, "accessed and dirty in entry {i}");
            }
            ensure!(
                log.has(3),
                "round {round}: the page table is not in the log"
            );
            ensure!(round > 0 || log.has(5), "the stack is not in the log");
            // In the next round they are all to be written once more.
            fill();
            mem.fill(5 * PAGE, PAGE, 0x77);
            // Where the guest's tables are shadowed, nobody sees a VMM write to them that does not say so.
            m.patch_sregs(|_| {})?;
        }
    }
    Ok(())
}

/// A large slot of which little is used: its log costs its size, and not more.
fn large_slot(env: &Env) -> Outcome {
    need_logging(env)?;
    let m = Machine::new(env, Mode::Protected, {
        guest_code!(code, ".code32", "2: inc dword ptr [{G}]", "inc dword ptr [{G} + 0x40000000]", "hlt", "jmp 2b"; G = GPA);
        code()
    })?;
    // 2 GiB, of which two pages are touched.
    let mem = Mapping::new(2 << 30, false)?;
    m.vm.set_memory(SLOT, LOG, GPA, 2 << 30, mem.addr() as u64)?;
    let pages = (2 << 30) / PAGE;
    for _ in 0..2 {
        m.expect_hlt()?;
        expect_pages(&m, pages, &[0, pages / 2], "the log of 2 GiB")?;
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "dirty_writes",
        tests![
            reads,
            kinds_of_write,
            emulated_writes,
            written_by_the_processor,
            large_slot,
        ],
    )
}
