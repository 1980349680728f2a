// SPDX-License-Identifier: GPL-2.0

//! Page tables that several vCPUs use, and write, at the same time.
//!
//! All vCPUs have the same root. The page at [`V`] and those behind it are mapped by tables that they change; code, tables and
//! data are also at their identity addresses.

use selftests::apic::{Chip, Guest, Op};
use selftests::guest::{at, usize_of, PORT};
use selftests::host::{patient, sleep_ms};
use selftests::smp::{self, Threads};
use selftests::{ensure, ensure_eq, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// The first linear address behind the second entry of the root.
const V: u64 = 0x80_0000_0000;
/// The page table for [`V`].
const PT: u64 = 0x10_0000;
/// Another one.
const PT2: u64 = 0x10_1000;
/// The directory.
const PD: u64 = 0x10_2000;
/// The directory pointer table.
const PDPT: u64 = 0x10_3000;
/// What the vCPUs tell each other: a generation, and what each has seen of it.
const WORDS: u64 = 0x10_8000;
/// Pages of data, whose first word is their number.
const FRAMES: u64 = 0x11_0000;
/// Where the code of other vCPUs than the first lies.
const OTHERS: u64 = 0x12_0000;
/// The port on which a vCPU says that something is wrong.
const WRONG: u16 = 0x90;
/// Where in a vCPU's page its count of writes is.
const WRITES: u64 = 0x88;

const RWU: u64 = 7;

// RCX: rounds; RBX: the number of other vCPUs; R12: whether to send an interrupt to them.
// Maps V to the other of two frames, tells the others, waits for them; then nothing may write to the old frame.
guest_code!(
    unmaps,
    ".code64",
    "mov r8, {V}",
    "mov r9d, {PT}",
    "mov r10d, {WORDS}",
    "2: mov rax, [r10]",
    "inc rax",
    "mov edx, eax",
    "and edx, 1",
    "shl edx, 12",
    "add edx, {FRAMES} + 7",
    "mov [r9], rdx",
    "invlpg [r8]",
    "mov [r10], rax",
    "test r12d, r12d",
    "jz 3f",
    "mov edx, 0xfee00300",
    "mov dword ptr [rdx], 0xc4051",
    "3: mov rsi, rbx",
    "4: pause",
    "cmp [r10 + rsi * 8], rax",
    "jne 4b",
    "dec rsi",
    "jnz 4b",
    "not eax",
    "and eax, 1",
    "shl eax, 12",
    "add eax, {FRAMES}",
    "mov rdx, [rax + 8]",
    "mov esi, 2000",
    "5: dec esi",
    "jnz 5b",
    "cmp [rax + 8], rdx",
    "jne 6f",
    "dec rcx",
    "jnz 2b",
    "7: out {P}, al",
    "jmp 7b",
    "6: out {X}, al";
    V = V, PT = PT, WORDS = WORDS, FRAMES = FRAMES, P = PORT, X = WRONG,
);

// RBX: the number of the vCPU; RCX: rounds; R12: whether an interrupt invalidates for us; R13: whether to reload CR3
// instead of INVLPG. Writes to V all the time, and does what the first vCPU wants.
guest_code!(
    writes,
    ".code64",
    "mov r8, {V}",
    "mov r10d, {WORDS}",
    "xor r14d, r14d",
    "2: lock inc qword ptr [r8 + 8]",
    "inc r14",
    "cmp qword ptr [r8], 1",
    "ja 6f",
    "pause",
    "test r12d, r12d",
    "jnz 5f",
    "mov rax, [r10]",
    "cmp rax, [r10 + rbx * 8]",
    "je 5f",
    "test r13d, r13d",
    "jz 3f",
    "mov rdx, cr3",
    "mov cr3, rdx",
    "jmp 4f",
    "3: invlpg [r8]",
    "4: mov edx, eax",
    "and edx, 1",
    "cmp [r8], rdx",
    "jne 6f",
    "mov [r10 + rbx * 8], rax",
    "5: cmp [r10 + rbx * 8], rcx",
    "jb 2b",
    "mov gs:[{N}], r14",
    "7: out {P}, al",
    "jmp 7b",
    "6: out {X}, al";
    V = V, WORDS = WORDS, N = WRITES, P = PORT, X = WRONG,
);

// What the interrupt does: the number of the vCPU is in its page.
guest_code!(
    invalidates,
    ".code64",
    "mov ecx, {WORDS}",
    "mov rax, [rcx]",
    "mov rbx, {V}",
    "invlpg [rbx]",
    "mov edx, eax",
    "and edx, 1",
    "cmp [rbx], rdx",
    "je 2f",
    "out {X}, al",
    "2: mov rdx, gs:[0x80]",
    "mov [rcx + rdx * 8], rax",
    "ret";
    V = V, WORDS = WORDS, X = WRONG,
);

// RBX: the number of the vCPU; RCX: rounds. Gives 8 entries of the page table new frames in each round and looks through
// them; and adds to an entry that all vCPUs add to.
guest_code!(
    scribbles,
    ".code64",
    "mov r8, {V}",
    "mov r9d, {PT}",
    "mov rdx, rbx",
    "shl rdx, 3",
    "lea r9, [r9 + rdx * 8]",
    "shl rdx, 12",
    "add r8, rdx",
    "2: xor esi, esi",
    "3: lea rax, [rsi + rcx]",
    "and eax, 7",
    "shl eax, 12",
    "add eax, {FRAMES} + 7",
    "mov [r9 + rsi * 8], rax",
    "lock add qword ptr [{SHARED}], 2",
    "inc esi",
    "cmp esi, 8",
    "jb 3b",
    "xor esi, esi",
    "4: mov rdx, rsi",
    "shl rdx, 12",
    "add rdx, r8",
    "invlpg [rdx]",
    "lea rax, [rsi + rcx]",
    "and eax, 7",
    "cmp [rdx], rax",
    "jne 6f",
    "lock inc qword ptr [rdx + 8]",
    "mov rax, [r9 + rsi * 8]",
    "and eax, 0x60",
    "cmp eax, 0x60",
    "jne 6f",
    "inc esi",
    "cmp esi, 8",
    "jb 4b",
    "dec rcx",
    "jnz 2b",
    "7: out {P}, al",
    "jmp 7b",
    "6: out {X}, al";
    V = V, PT = PT, FRAMES = FRAMES, SHARED = PT + 0xff8, P = PORT, X = WRONG,
);

// RCX: rounds. Counts in the bits of an entry that are software's.
guest_code!(
    counts,
    ".code64",
    "mov rax, 1 << 52",
    "2: lock add qword ptr [{PT}], rax",
    "pause",
    "dec rcx",
    "jnz 2b",
    "7: out {P}, al",
    "jmp 7b";
    PT = PT, P = PORT,
);

// RCX: rounds. Clears accessed and dirty bits, and has the processor set them: first by a read, then by a write.
guest_code!(
    dirties,
    ".code64",
    "mov r8, {V}",
    "2: lock and qword ptr [{PT}], -0x61",
    "invlpg [r8]",
    "mov rax, [r8]",
    "test byte ptr [{PT}], 0x20",
    "jz 6f",
    "test byte ptr [{PT}], 0x40",
    "jnz 6f",
    "mov [r8 + 8], rcx",
    "test byte ptr [{PT}], 0x40",
    "jz 6f",
    "dec rcx",
    "jnz 2b",
    "7: out {P}, al",
    "jmp 7b",
    "6: out {X}, al";
    V = V, PT = PT, P = PORT, X = WRONG,
);

// RCX: rounds. Exchanges the page table and the entries in it.
guest_code!(
    rewrites,
    ".code64",
    "mov edx, {PT} + 7",
    "mov ebx, {PT2} + 7",
    "mov esi, {FRAMES} + 7",
    "mov edi, {FRAMES} + 0x1000 + 7",
    "2: mov [{PD}], rbx",
    "mov [{PT}], rdi",
    "mov [{PT2}], rsi",
    "xchg [{PD}], rdx",
    "mov edx, {PT} + 7",
    "mov [{PT}], rsi",
    "mov [{PT2}], rdi",
    "dec rcx",
    "jnz 2b",
    "mov qword ptr [{WORDS}], 1",
    "7: out {P}, al",
    "jmp 7b";
    PT = PT, PT2 = PT2, PD = PD, FRAMES = FRAMES, WORDS = WORDS, P = PORT,
);

// Looks until the first vCPU is done: what is at V is frame 0 or 1, and behind it 2 or 3.
guest_code!(
    looks,
    ".code64",
    "mov r8, {V}",
    "lea r9, [r8 + 0x1000]",
    "2: invlpg [r8]",
    "cmp qword ptr [r8], 1",
    "ja 6f",
    "invlpg [r9]",
    "mov rax, [r9]",
    "sub rax, 2",
    "cmp rax, 1",
    "ja 6f",
    "pause",
    "cmp qword ptr [{WORDS}], 0",
    "je 2b",
    "7: out {P}, al",
    "jmp 7b",
    "6: out {X}, al";
    V = V, WORDS = WORDS, P = PORT, X = WRONG,
);

/// A guest of `n` vCPUs with the tables.
fn guest(env: &Env, n: usize) -> Result<Guest, Verdict> {
    let g = Guest::new(env, Chip::Split, n)?;
    for (slot, value) in [
        (at::PML4 + 8, PDPT | RWU),
        (PDPT, PD | RWU),
        (PD, PT | RWU),
        (PT, FRAMES | RWU),
        (PT + 8, (FRAMES + 0x2000) | RWU),
        (PT2, (FRAMES + 0x1000) | RWU),
        (PT2 + 8, (FRAMES + 0x3000) | RWU),
    ] {
        g.mem.write(usize_of(slot), value);
    }
    for i in 0..8 {
        g.mem.write(usize_of(FRAMES + i * 0x1000), i);
    }
    Ok(g)
}

/// Sets a vCPU to code with its parameters.
fn place(g: &Guest, id: usize, code: &[u8], rounds: u64, rbx: u64, flags: [u64; 2]) -> Outcome {
    let at = if id == 0 { OTHERS + 0x1000 } else { OTHERS };
    g.mem.write_bytes(usize_of(at), code);
    let mut r = g.vcpus[id].regs()?;
    r.rip = at;
    (r.rcx, r.rbx, r.r12, r.r13) = (rounds, rbx, flags[0], flags[1]);
    g.vcpus[id].set_regs(&r)?;
    Ok(())
}

fn run(g: &Guest) -> Outcome {
    let all: Vec<usize> = (0..g.vcpus.len()).collect();
    smp::run(g, &all, false, |t: &Threads| {
        let mut left = patient(15_000);
        while !t.all_done() && !t.failed() {
            ensure!(left > 0, "the vCPUs do not come to an end");
            sleep_ms(2);
            left = left.saturating_sub(2);
        }
        Ok(())
    })
}

/// A page is mapped elsewhere, and all are told; then none has the old mapping.
fn shootdown(env: &Env, n: usize, interrupts: bool, reload: bool) -> Outcome {
    let g = guest(env, n)?;
    let rounds = env.fewer(150);
    for id in 0..n {
        if interrupts {
            g.cpu(id).enable()?;
            g.cpu(id).done(Op::Sti, 0, 0)?;
            g.hook(id, invalidates());
            g.mem.write(usize_of(g.block(id) + 0x80), id as u64);
        }
        let flags = [u64::from(interrupts), u64::from(reload)];
        if id == 0 {
            place(&g, id, unmaps(), rounds, n as u64 - 1, flags)?;
        } else {
            place(&g, id, writes(), rounds, id as u64, flags)?;
        }
    }
    run(&g)?;
    let written: u64 = (1..n)
        .map(|id| g.mem.read::<u64>(usize_of(g.block(id) + WRITES)))
        .sum();
    let counted: u64 = (0..2)
        .map(|i| g.mem.read::<u64>(usize_of(FRAMES + i * 0x1000 + 8)))
        .sum();
    ensure_eq!(counted, written, "increments in both frames");
    Ok(())
}

fn shootdown_by_flag(env: &Env) -> Outcome {
    shootdown(env, 2, false, false)?;
    shootdown(env, 3, false, false)
}

fn shootdown_by_cr3(env: &Env) -> Outcome {
    shootdown(env, 2, false, true)?;
    shootdown(env, 3, false, true)
}

fn shootdown_by_interrupt(env: &Env) -> Outcome {
    shootdown(env, 2, true, false)?;
    shootdown(env, 4, true, false)
}

/// vCPUs write to one page table at the same time: each finds its entries, and no addition is lost.
fn one_table(env: &Env) -> Outcome {
    for n in [2, 4] {
        let g = guest(env, n)?;
        let rounds = env.fewer(400);
        for id in 0..n {
            place(&g, id, scribbles(), rounds, id as u64, [0, 0])?;
        }
        run(&g)?;
        let sum: u64 = g.mem.read(usize_of(PT + 0xff8));
        ensure_eq!(sum, 2 * 8 * rounds * n as u64, "sum of all additions");
        let writes: u64 = (0..8)
            .map(|i| g.mem.read::<u64>(usize_of(FRAMES + i * 0x1000 + 8)))
            .sum();
        ensure_eq!(writes, 8 * rounds * n as u64, "writes to the frames");
    }
    Ok(())
}

/// One vCPU counts in an entry, in which the processor of another sets bits all the time.
fn bits_of_an_entry(env: &Env) -> Outcome {
    let g = guest(env, 2)?;
    let rounds = env.fewer(1900);
    place(&g, 0, counts(), rounds, 0, [0, 0])?;
    place(&g, 1, dirties(), rounds, 0, [0, 0])?;
    run(&g)?;
    let entry: u64 = g.mem.read(usize_of(PT));
    ensure_eq!(entry >> 52, rounds, "count in the entry {entry:#x}");
    ensure_eq!(
        entry & 0xf_ffff_ffff_ffff,
        FRAMES | RWU | 0x60,
        "the rest of the entry"
    );
    Ok(())
}

/// A vCPU walks tables that another rewrites all the time.
fn rewritten(env: &Env) -> Outcome {
    for n in [2, 4] {
        let g = guest(env, n)?;
        place(&g, 0, rewrites(), env.fewer(3000), 0, [0, 0])?;
        for id in 1..n {
            place(&g, id, looks(), 0, 0, [0, 0])?;
        }
        run(&g)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "paging_smp",
        tests![
            shootdown_by_flag => 40,
            shootdown_by_cr3 => 40,
            shootdown_by_interrupt => 40,
            one_table => 40,
            bits_of_an_entry => 20,
            rewritten => 40,
        ],
    )
}
