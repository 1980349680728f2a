// SPDX-License-Identifier: GPL-2.0

//! Instructions on a device that is memory.
//!
//! The guest executes the same code twice: with RBX at memory, where the processor does it all, and with RBX at a device with the same
//! contents, where the module emulates it. Registers, vector registers, flags, contents, and an exception if there is one, have to be
//! the same. So nothing here says what an instruction does.
//!
//! Which instructions a module emulates is not part of the API. The in-tree KVM says of those it does not know that it does not
//! (KVM_INTERNAL_ERROR_EMULATION), and has faults with some others, which are marked.

use selftests::guest::{at, pte, usize_of, Record, PORT_EXCEPTION};
use selftests::machine::{cr, Exit, Machine, Mode};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const M: u64 = at::MMIO;
/// The device's contents when it is memory.
const RAM: u64 = 0x3_0000;
/// How much there is; RBX is in the middle.
const LEN: u64 = 0x2000;
const MIDDLE: u64 = LEN / 2;
/// In the way of RBX: what differs between memory and device is above.
const LOW: u64 = 0xffff;

/// A piece of guest code, which ends with HLT.
struct Case {
    mode: Mode,
    text: &'static str,
    code: &'static [u8],
    /// The in-tree KVM does something else, or does not end.
    elsewhere: bool,
}

macro_rules! case {
    (@ $mode:ident, $directive:literal, $elsewhere:literal, $($line:literal),+) => {{
        guest_code!(code, $directive, $($line,)+ "hlt");
        Case {
            mode: Mode::$mode,
            text: concat!($($line, "; "),+),
            code: code(),
            elsewhere: $elsewhere,
        }
    }};
    ($($line:literal),+) => { case!(@ Long, ".code64", false, $($line),+) };
    (elsewhere $($line:literal),+) => { case!(@ Long, ".code64", true, $($line),+) };
    (code32 $($line:literal),+) => { case!(@ Protected, ".code32", false, $($line),+) };
    (code32 elsewhere $($line:literal),+) => { case!(@ Protected, ".code32", true, $($line),+) };
}

/// What a run ends with.
#[derive(Debug, PartialEq)]
struct End {
    gprs: [u64; 15],
    rip: u64,
    rflags: u64,
    xmm: [[u8; 16]; 16],
    /// The upper halves of the YMM registers, if there are any.
    ymm: Vec<u32>,
    mxcsr: u32,
    control: u16,
    /// Vector, error code and RIP of an exception.
    exception: Option<(u64, u64, u64)>,
    contents: Vec<u8>,
}

/// The flags that every instruction here leaves defined, or that two of the same kind leave the same.
const FLAGS: u64 = 0x8d5 | 0x400;

/// Where the upper halves of the YMM registers are in KVM_GET_XSAVE's words, if the guest has AVX.
fn avx_offset(m: &Machine) -> Result<Option<usize>, Verdict> {
    let leaf = m.kvm.supported_cpuid()?.find(0xd, 2).copied();
    Ok(leaf.map(|leaf| leaf.ebx as usize / 4).filter(|&at| at != 0))
}

fn contents() -> Vec<u8> {
    let mut x = 0x1234_5678u32;
    (0..LEN)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .collect()
}

/// Runs a case with its operand at `base`: nothing if the module does not emulate it.
fn execute(env: &Env, case: &Case, base: u64) -> Result<Option<End>, Verdict> {
    let m = Machine::new(env, case.mode, case.code)?;
    let avx = avx_offset(&m)?;
    if avx.is_some() {
        let mut xcrs = m.vcpu.xcrs()?;
        xcrs.xcrs[0].value = 7;
        m.vcpu.set_xcrs(&xcrs)?;
    }
    let cr4 = cr::OSFXSR | if avx.is_some() { cr::OSXSAVE } else { 0 };
    m.patch_sregs(|s| s.cr4 |= cr4)?;
    let mut device = contents();
    // Where branches through memory lead: to the HLT, and there is always one.
    let hlt = at::CODE + case.code.len() as u64 - 1;
    device[usize_of(MIDDLE) + 0x80..][..8].copy_from_slice(&hlt.to_le_bytes());
    device[usize_of(MIDDLE) + 0x90..][..8].copy_from_slice(&3u64.to_le_bytes());
    device[usize_of(MIDDLE) + 0x98..][..8].fill(0);
    m.mem.write_bytes(usize_of(RAM), &device);
    m.patch_regs(|r| {
        (r.rax, r.rcx, r.rdx) = (0x1122_3344_5566_7788, 7, 0x99aa_bbcc_ddee_ff02);
        (r.rsi, r.rdi, r.rbp) = (at::DATA, at::DATA + 0x100, at::STACK - 0x100);
        (r.r8, r.r9, r.r10, r.r11) = (0x8877_6655_4433_2211, 2, 3, 4);
        (r.r12, r.r13, r.r14, r.r15) = (5, u64::MAX, 0xf0f0, 0x1_0000_0001);
        if case.mode != Mode::Long {
            (r.rax, r.rdx) = (0x5566_7788, 0xddee_ff02);
        }
        r.rbx = base + MIDDLE;
        r.rflags = 2 | 0x801;
    })?;
    let mut fpu = m.vcpu.fpu()?;
    for (i, b) in fpu.xmm.as_flattened_mut().iter_mut().enumerate() {
        *b = (i as u8).wrapping_mul(37);
    }
    for (i, b) in fpu.fpr.as_flattened_mut().iter_mut().enumerate() {
        *b = (i as u8).wrapping_mul(11);
    }
    fpu.mxcsr = 0x1f80;
    m.vcpu.set_fpu(&fpu)?;

    let mut exception = None;
    let mut accesses = 0;
    loop {
        match m.run()? {
            Exit::MmioRead { addr, len } => {
                let at = usize_of(addr - M);
                m.mmio_reply(&device[at..at + len as usize]);
            }
            Exit::MmioWrite { addr, data } => {
                let at = usize_of(addr - M);
                device[at..at + data.len()].copy_from_slice(&data);
            }
            Exit::Hlt => break,
            Exit::Out {
                port: PORT_EXCEPTION,
                ..
            } => {
                let Record {
                    vector, error, rip, ..
                } = m.record();
                exception = Some((vector, error, rip));
                break;
            }
            Exit::Internal { suberror: 1, .. } => return Ok(None),
            other => fail!("{}: exit {other:x?}\n{}", case.text, m.describe()),
        }
        accesses += 1;
        ensure!(
            accesses < 1000,
            "{}: it does not end\n{}",
            case.text,
            m.describe()
        );
    }
    let r = m.vcpu.regs()?;
    let fpu = m.vcpu.fpu()?;
    let ymm = match avx {
        Some(at) => m.vcpu.xsave()?.region[at..at + 64].to_vec(),
        None => Vec::new(),
    };
    if base == M {
        ensure!(
            accesses > 0 || exception.is_some(),
            "{}: the device was not accessed",
            case.text
        );
    } else {
        device = m.mem.read_bytes(usize_of(RAM), usize_of(LEN));
    }
    // An address in the operand's memory differs in its upper part.
    let plain = |value: u64| {
        if value.wrapping_sub(base) < LEN {
            value & LOW & (LEN - 1)
        } else {
            value
        }
    };
    let gprs = [
        r.rax, r.rcx, r.rdx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    Ok(Some(End {
        gprs: gprs.map(plain),
        rip: r.rip,
        rflags: r.rflags & FLAGS,
        xmm: fpu.xmm,
        ymm,
        mxcsr: fpu.mxcsr,
        control: fpu.fcw,
        exception,
        contents: device,
    }))
}

/// Runs the cases on memory and on the device. What the processor has not is left out.
fn compare(env: &Env, cases: &[Case]) -> Outcome {
    let in_tree = env.device == "/dev/kvm";
    let mut done = 0;
    for case in cases {
        let Some(mut want) = execute(env, case, RAM)? else {
            fail!("{}: on memory, it is emulated and is not known", case.text);
        };
        if want.exception.is_some_and(|(vector, ..)| vector == 6) {
            continue;
        }
        if in_tree && case.elsewhere {
            continue;
        }
        match execute(env, case, M)? {
            Some(mut got) => {
                if got.contents != want.contents {
                    let at = (0..usize_of(LEN)).find(|&i| got.contents[i] != want.contents[i]);
                    fail!("{}: contents at {at:x?}", case.text);
                }
                got.contents.clear();
                want.contents.clear();
                ensure_eq!(got, want, "{}", case.text);
                done += 1;
            }
            None => ensure!(in_tree, "{}: not emulated", case.text),
        }
    }
    if in_tree && done == 0 {
        skip!("none of {} cases is emulated", cases.len());
    }
    ensure!(done > 0, "none of {} cases was emulated", cases.len());
    Ok(())
}

fn arithmetic(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!(
                "add [rbx], rax",
                "adc rax, [rbx + 8]",
                "sbb dword ptr [rbx], 5"
            ),
            case!(
                "rcl qword ptr [rbx], 3",
                "rcr byte ptr [rbx + 9], cl",
                "cmp eax, eax"
            ),
            case!(
                "rol word ptr [rbx], cl",
                "sar qword ptr [rbx + 8], cl",
                "cmp eax, eax"
            ),
            case!(
                "shld [rbx], rax, 1",
                "shrd [rbx + 8], eax, 1",
                "cmp eax, eax"
            ),
            case!("imul rax, [rbx], 77", "imul ecx, [rbx], -3", "cmp eax, eax"),
            case!("mov rax, [rbx]", "mul qword ptr [rbx + 8]", "cmp eax, eax"),
            case!("imul dword ptr [rbx]", "cmp eax, eax"),
            case!("mul byte ptr [rbx + 1]", "cmp eax, eax"),
            case!("xor edx, edx", "div dword ptr [rbx + 0x90]", "cmp eax, eax"),
            case!("mov rdx, 1", "idiv qword ptr [rbx + 0x90]", "cmp eax, eax"),
            // #DE: by zero, and a quotient that is too large.
            case!("div qword ptr [rbx + 0x98]"),
            case!("idiv qword ptr [rbx + 0x90]"),
            case!("bsf rax, [rbx]", "bsr ecx, [rbx + 0x90]", "cmp eax, eax"),
            case!(elsewhere "tzcnt rax, [rbx]", "cmp eax, eax"),
            case!(elsewhere "lzcnt rax, [rbx]", "cmp eax, eax"),
            case!(elsewhere "popcnt rax, [rbx]"),
            case!(elsewhere "crc32 rax, qword ptr [rbx]", "crc32 ecx, byte ptr [rbx + 3]"),
            case!(elsewhere "adcx rax, [rbx]", "adox rcx, [rbx + 8]"),
            case!("movbe rax, [rbx]", "movbe [rbx + 8], ecx"),
            case!("movnti [rbx], rax"),
            case!(
                "bt [rbx], r9",
                "bts [rbx], r12",
                "btr dword ptr [rbx], 5",
                "cmp eax, eax"
            ),
            case!("mov r10, -300", "btc [rbx], r10", "cmp eax, eax"),
            case!("setc [rbx]", "cmovo rax, [rbx + 8]", "cmovz ecx, [rbx]"),
            case!("xlatb"),
            case!("neg qword ptr [rbx]", "not dword ptr [rbx + 8]"),
            case!("prefetchw [rbx]", "nop dword ptr [rbx]", "mov al, [rbx]"),
        ],
    )
}

fn bit_manipulation(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!(elsewhere "andn rax, rdx, [rbx]", "cmp eax, eax"),
            case!(elsewhere "bextr rax, [rbx], r14", "cmp eax, eax"),
            case!(elsewhere "blsr rax, [rbx]", "blsi rcx, [rbx]", "blsmsk edx, [rbx]", "cmp eax, eax"),
            case!(elsewhere "bzhi rax, [rbx], r9", "cmp eax, eax"),
            case!(elsewhere "pdep rax, rdx, [rbx]", "pext rcx, r8, [rbx]"),
            case!(elsewhere "mulx rax, rcx, [rbx]"),
            case!(elsewhere "rorx rax, [rbx], 13"),
            case!(elsewhere "shlx rax, [rbx], r9", "sarx ecx, [rbx], r10d"),
        ],
    )
}

fn exchanges(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!("xchg [rbx], rax", "lock xadd [rbx + 8], rcx"),
            case!("lock cmpxchg [rbx], rcx"),
            case!("mov rax, [rbx]", "lock cmpxchg [rbx], rcx"),
            case!("lock cmpxchg8b [rbx]", "cmp eax, eax"),
            case!(
                "mov rsi, rbx",
                "mov eax, [rbx]",
                "mov edx, [rbx + 4]",
                "mov ebx, 0x55",
                "cmpxchg8b [rsi]",
                "mov rbx, rsi"
            ),
            case!("lock cmpxchg16b [rbx]"),
            case!(
                "mov rsi, rbx",
                "mov rax, [rbx]",
                "mov rdx, [rbx + 8]",
                "mov ebx, 0x55",
                "lock cmpxchg16b [rsi]",
                "mov rbx, rsi"
            ),
            // #GP: not aligned.
            case!("cmpxchg16b [rbx + 8]"),
        ],
    )
}

fn stack(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!("push qword ptr [rbx]", "push word ptr [rbx + 8]"),
            case!("pop qword ptr [rbx]", "pop word ptr [rbx + 8]"),
            case!("lea rsp, [rbx + 0x100]", "push rax", "push 0x77", "pop rcx"),
            case!(
                "lea rsp, [rbx + 0x100]",
                "pushfq",
                "pushfw",
                "popfw",
                "popfq"
            ),
            case!("lea rsp, [rbx + 0x100]", "call 2f", "nop", "2: nop"),
            case!("lea rsp, [rbx + 0x80]", "ret 16", "ud2"),
            case!("lea rsp, [rbx + 0x100]", "enter 0x20, 0"),
            case!(
                "lea rsp, [rbx + 0x100]",
                "lea rbp, [rbx + 0x180]",
                "enter 0x20, 3",
                "mov qword ptr [rsp + 0x20], 0",
                "mov qword ptr [rsp + 0x38], 0"
            ),
            case!("lea rbp, [rbx + 0x100]", "leave"),
            case!("lea rsp, [rbx + 0x80]", "pop qword ptr [rsp + 0x40]"),
            case!(code32 elsewhere "lea esp, [ebx + 0x100]", "pushad", "mov dword ptr [esp + 12], 0", "mov dword ptr [esp + 16], 0", "pushaw"),
            case!(code32 elsewhere "lea esp, [ebx + 0x90]", "popaw"),
            case!(code32 elsewhere "mov eax, ebx", "lea esp, [ebx + 0x90]", "popad", "mov ebx, 0"),
            case!(code32 "bound eax, [ebx]"),
            case!(code32 "bound ecx, [ebx + 0x90]"),
            case!(code32 "arpl [ebx], cx"),
        ],
    )
}

fn branches(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!("call [rbx + 0x80]", "ud2"),
            case!("jmp [rbx + 0x80]", "ud2"),
            case!(code32 "call [ebx + 0x80]", "ud2"),
            // #GP: no address.
            case!("jmp [rbx]"),
        ],
    )
}

fn strings(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!("mov rdi, rbx", "rep movsb"),
            case!("mov rsi, rbx", "rep movsq"),
            case!("mov rsi, rbx", "lea rdi, [rbx + 0x100]", "rep movsd"),
            case!("std", "mov rdi, rbx", "rep stosw", "cld"),
            case!("mov rsi, rbx", "lodsq", "lodsb"),
            case!("mov rdi, rbx", "repne scasb"),
            case!("mov rsi, rbx", "mov rdi, rbx", "repe cmpsd"),
            case!(
                "lea rsi, [rbx + 0x103]",
                "lea rdi, [rbx - 0x1d]",
                "rep movsq"
            ),
        ],
    )
}

fn sse(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!("movups xmm1, [rbx + 3]", "movups [rbx + 0x21], xmm2"),
            case!("movaps xmm1, [rbx]", "movaps [rbx + 0x20], xmm2"),
            case!("movdqa xmm1, [rbx]", "movdqa [rbx + 0x20], xmm2"),
            case!("movdqu xmm9, [rbx + 1]", "movdqu [rbx + 0x21], xmm15"),
            case!("movapd xmm1, [rbx]", "movupd [rbx + 0x21], xmm2"),
            case!("movntps [rbx], xmm1", "movntdq [rbx + 0x10], xmm2"),
            case!(elsewhere "movntdqa xmm3, [rbx]", "lddqu xmm4, [rbx + 5]"),
            case!(elsewhere "movss xmm1, [rbx]", "movsd xmm2, [rbx + 8]"),
            case!(elsewhere "movss [rbx], xmm1", "movsd [rbx + 8], xmm2"),
            case!(elsewhere "movlps xmm1, [rbx]", "movhps xmm1, [rbx + 0x10]"),
            case!(elsewhere "movlpd [rbx], xmm1", "movhpd [rbx + 8], xmm2"),
            case!("movd xmm1, [rbx]", "movq xmm2, [rbx + 8]"),
            case!(elsewhere "movd [rbx], xmm1", "movq [rbx + 8], xmm2"),
            case!(elsewhere "pinsrb xmm1, [rbx], 5", "pinsrw xmm2, [rbx], 1"),
            case!(elsewhere "pinsrd xmm1, [rbx], 2", "pinsrq xmm2, [rbx], 1"),
            case!(elsewhere "pextrb [rbx], xmm1, 5", "pextrw [rbx + 8], xmm2, 1"),
            case!(elsewhere "pextrq [rbx], xmm1, 1", "extractps [rbx + 8], xmm2, 3"),
            case!(elsewhere "mov rdi, rbx", "maskmovdqu xmm1, xmm2"),
            case!(elsewhere "stmxcsr [rbx]", "mov dword ptr [rbx + 4], 0x1fa0", "ldmxcsr [rbx + 4]"),
            // Across two pages, and #GP where that is not aligned.
            case!("movups xmm1, [rbx - 7]", "movups [rbx - 9], xmm2"),
            case!("movaps xmm1, [rbx + 8]"),
            case!("clflush [rbx]", "mov al, [rbx]"),
        ],
    )
}

fn x87_and_mmx(env: &Env) -> Outcome {
    compare(
        env,
        &[
            case!("movq mm1, [rbx]", "movq [rbx + 8], mm1", "emms"),
            case!(elsewhere "movd mm2, [rbx]", "movd [rbx + 8], mm2", "emms"),
            case!(elsewhere "movq mm2, [rbx]", "movntq [rbx + 8], mm2", "emms"),
            case!("fninit", "fnstcw [rbx]", "fnstsw [rbx + 2]"),
            case!(elsewhere "fninit", "mov word ptr [rbx], 0x27f", "fldcw [rbx]", "fnstcw [rbx + 8]"),
        ],
    )
}

fn avx(env: &Env) -> Outcome {
    if avx_offset(&Machine::bare(env, at::SIZE)?)?.is_none() {
        skip!("no AVX");
    }
    compare(
        env,
        &[
            case!(elsewhere "vmovups ymm1, [rbx + 3]", "vmovups [rbx + 0x41], ymm1"),
            case!("vmovdqu ymm1, [rbx + 3]", "vmovdqu [rbx + 0x41], ymm1"),
            case!("vmovdqa ymm1, [rbx]", "vmovdqa [rbx + 0x40], ymm1"),
            case!(elsewhere "vmovaps ymm1, [rbx]", "vmovaps xmm1, [rbx + 0x40]"),
            case!(elsewhere "vmovaps ymm1, [rbx]", "vmovsd xmm1, [rbx + 0x40]"),
            case!(elsewhere "vmovntps [rbx], ymm3", "vmovntdqa ymm4, [rbx + 0x20]"),
            case!(elsewhere "vmovhps xmm1, xmm2, [rbx]", "vmovlpd [rbx + 8], xmm1"),
            case!(elsewhere "vbroadcastss ymm1, [rbx]", "vbroadcastf128 ymm2, [rbx]"),
            case!(elsewhere "vinsertf128 ymm1, ymm2, [rbx], 1", "vextractf128 [rbx], ymm1, 1"),
            case!(elsewhere "vpinsrd xmm1, xmm2, [rbx], 1", "vpextrb [rbx + 8], xmm1, 3"),
            case!(elsewhere "vmovq xmm1, [rbx]", "vmovd [rbx + 8], xmm1"),
            // #GP: not aligned. And over two pages.
            case!("vmovdqa ymm1, [rbx + 0x10]"),
            case!("vmovdqu ymm1, [rbx - 0xd]", "vmovdqu [rbx - 0xb], ymm1"),
        ],
    )
}

/// A string that begins in memory and ends in a device, and one the other way.
fn from_memory_into_a_device(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64", "mov esi, {D}", "mov edi, 0x400ff0", "mov ecx, 8", "rep movsd", "mov esi, 0x400ff8", "mov edi, {D} + 0x100", "mov ecx, 2", "rep movsq", "movups xmm3, [0x400ff8]", "movups xmm1, [{D} + 0x40]", "movups [0x400ff4], xmm1", "hlt";
        D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write(usize_of(at::PD) + 2 * 8, 0x3_8003u64);
    m.mem.write(0x3_8000, RAM | pte::P | pte::W);
    m.mem.write(0x3_8008, M | pte::P | pte::W);
    let source: Vec<u8> = (0..32).map(|i| 0x40 + i).collect();
    m.mem.write_bytes(usize_of(at::DATA), &source);
    m.mem
        .write_bytes(usize_of(at::DATA) + 0x40, b"sixteen bytes...");
    let mut device = [0u8; 0x20];
    for _ in 0..100 {
        match m.run()? {
            Exit::MmioRead { addr, len } => {
                let at = usize_of(addr - M);
                m.mmio_reply(&device[at..at + len as usize]);
            }
            Exit::MmioWrite { addr, data } => {
                let at = usize_of(addr - M);
                device[at..at + data.len()].copy_from_slice(&data);
            }
            Exit::Hlt => {
                let page = usize_of(RAM);
                ensure_eq!(m.mem.read_bytes(page + 0xff0, 4), source[..4], "in memory");
                ensure_eq!(device[..4], *b"s...", "in the device");
                ensure_eq!(device[4..16], source[20..], "behind that");
                ensure_eq!(
                    m.mem.read_bytes(usize_of(at::DATA) + 0x100, 16),
                    source[8..24],
                    "read back"
                );
                ensure_eq!(
                    m.mem.read_bytes(page + 0xff4, 12),
                    *b"sixteen byte",
                    "vector"
                );
                ensure_eq!(m.vcpu.fpu()?.xmm[3], source[8..24], "XMM3");
                return Ok(());
            }
            other => fail!("exit {other:x?}\n{}", m.describe()),
        }
    }
    fail!("100 exits and no end\n{}", m.describe())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "mmio_insns",
        tests![
            arithmetic,
            bit_manipulation,
            exchanges,
            stack,
            branches,
            strings,
            sse,
            x87_and_mmx,
            avx,
            from_memory_into_a_device,
        ],
    )
}
