// SPDX-License-Identifier: GPL-2.0

//! One instruction on the processor that the test runs on.
//!
//! A breakpoint raises a signal, whose handler replaces the context that it returns to: by the registers of the test, a code segment of
//! the wanted mode and RFLAGS.TF. So the kernel enters the instruction, and the next signal comes right after it, or because it
//! faulted. Its context is the result, and the handler puts back the one from before.

#![allow(unreachable_pub)]

use rkvm_x86::regs::Rflags;
use std::arch::asm;
use std::cell::UnsafeCell;
use std::ptr;

/// All that goes in and comes out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct State {
    /// By number.
    pub gprs: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub cs: u16,
    pub ss: u16,
    pub ymm: [[u64; 4]; 16],
    pub mmx: [u64; 8],
    pub mxcsr: u32,
    pub control: u16,
    pub status: u16,
    /// Why the processor stopped: the vector, 1 if after the instruction.
    pub vector: u8,
    pub error: u32,
    pub cr2: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Idle,
    Enter,
    Run,
}

struct Shared {
    phase: Phase,
    state: State,
    saved: [i64; 23],
}

struct Cell(UnsafeCell<Shared>);
// SAFETY: The tests that use it hold the lock below.
unsafe impl Sync for Cell {}

static SHARED: Cell = Cell(UnsafeCell::new(Shared {
    phase: Phase::Idle,
    state: State {
        gprs: [0; 16],
        rip: 0,
        rflags: 0,
        cs: 0,
        ss: 0,
        ymm: [[0; 4]; 16],
        mmx: [0; 8],
        mxcsr: 0,
        control: 0,
        status: 0,
        vector: 0,
        error: 0,
        cr2: 0,
    },
    saved: [0; 23],
}));

/// Where in a signal's context the registers are, by number.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Offsets in the FPU's part of the context, which has the format of XSAVE.
const CONTROL: usize = 0;
const STATUS: usize = 2;
const TAGS: usize = 4;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
const FEATURES: usize = 512;
const YMM_HIGH: usize = 576;

/// # Safety
///
/// `at` points to a `T` in the context, aligned or not.
unsafe fn get<T>(fpu: *const u8, at: usize) -> T {
    // SAFETY: As the caller says.
    unsafe { fpu.add(at).cast::<T>().read_unaligned() }
}

/// # Safety
///
/// As [`get`].
unsafe fn put<T>(fpu: *mut u8, at: usize, value: T) {
    // SAFETY: As the caller says.
    unsafe { fpu.add(at).cast::<T>().write_unaligned(value) }
}

/// # Safety
///
/// `context` is that of a signal, with an FPU part of the size that AVX needs.
unsafe fn enter(context: &mut libc::ucontext_t, s: &State) {
    let gregs = &mut context.uc_mcontext.gregs;
    for (at, value) in GREGS.into_iter().zip(s.gprs) {
        gregs[at as usize] = value as i64;
    }
    gregs[libc::REG_RIP as usize] = s.rip as i64;
    gregs[libc::REG_EFL as usize] = (s.rflags | 0x100) as i64;
    let selectors = gregs[libc::REG_CSGSFS as usize] as u64;
    let selectors = selectors & 0x0000_ffff_ffff_0000 | u64::from(s.cs) | u64::from(s.ss) << 48;
    gregs[libc::REG_CSGSFS as usize] = selectors as i64;
    let fpu = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: The offsets are inside, as the caller says.
    unsafe {
        let features: u64 = get(fpu, FEATURES);
        put(fpu, FEATURES, features | 7);
        put(fpu, CONTROL, s.control);
        put(fpu, STATUS, s.status);
        put(fpu, TAGS, 0xffu16);
        put(fpu, MXCSR, s.mxcsr);
        for (i, value) in s.mmx.into_iter().enumerate() {
            put(fpu, ST + 16 * i, value);
            put(fpu, ST + 16 * i + 8, 0xffffu64);
        }
        for (i, [a, b, c, d]) in s.ymm.into_iter().enumerate() {
            put(fpu, XMM + 16 * i, [a, b]);
            put(fpu, YMM_HIGH + 16 * i, [c, d]);
        }
    }
}

/// # Safety
///
/// As [`enter`].
unsafe fn leave(context: &mut libc::ucontext_t, s: &mut State, saved: &[i64; 23]) {
    let gregs = &mut context.uc_mcontext.gregs;
    for (at, value) in GREGS.into_iter().zip(&mut s.gprs) {
        *value = gregs[at as usize] as u64;
    }
    s.rip = gregs[libc::REG_RIP as usize] as u64;
    let selectors = gregs[libc::REG_CSGSFS as usize] as u64;
    (s.cs, s.ss) = (selectors as u16, (selectors >> 48) as u16);
    s.rflags = gregs[libc::REG_EFL as usize] as u64;
    s.vector = gregs[libc::REG_TRAPNO as usize] as u8;
    s.error = gregs[libc::REG_ERR as usize] as u32;
    s.cr2 = gregs[libc::REG_CR2 as usize] as u64;
    *gregs = *saved;
    let fpu = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: The offsets are inside, as the caller says.
    unsafe {
        let features: u64 = get(fpu, FEATURES);
        s.control = get(fpu, CONTROL);
        s.status = get(fpu, STATUS);
        s.mxcsr = get(fpu, MXCSR);
        for (i, value) in s.mmx.iter_mut().enumerate() {
            *value = get(fpu, ST + 16 * i);
        }
        for (i, value) in s.ymm.iter_mut().enumerate() {
            let [a, b]: [u64; 2] = get(fpu, XMM + 16 * i);
            let [c, d]: [u64; 2] = get(fpu, YMM_HIGH + 16 * i);
            *value = if features & 4 != 0 {
                [a, b, c, d]
            } else {
                [a, b, 0, 0]
            };
        }
        put(fpu, CONTROL, 0x37fu16);
        put(fpu, STATUS, 0u16);
        put(fpu, TAGS, 0u16);
        put(fpu, MXCSR, 0x1f80u32);
    }
}

extern "C" fn handle(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // The kernel leaves AC as it was.
    // SAFETY: Nothing here relies on alignment checks.
    unsafe { asm!("pushfq", "and qword ptr [rsp], {}", "popfq", const !0x4_0000i32) };
    // SAFETY: The handler runs on the thread that is in `run` and has nothing borrowed there. The context is the kernel's.
    unsafe {
        let shared = &mut *SHARED.0.get();
        let context = &mut *context.cast::<libc::ucontext_t>();
        match shared.phase {
            Phase::Enter => {
                shared.saved = context.uc_mcontext.gregs;
                shared.phase = Phase::Run;
                enter(context, &shared.state);
            }
            Phase::Run => {
                shared.phase = Phase::Idle;
                let saved = shared.saved;
                leave(context, &mut shared.state, &saved);
            }
            // The test itself: let it die of it.
            Phase::Idle => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

/// Takes the signals; they need a stack of their own, as RSP is the instruction's.
pub fn prepare() {
    let stack = vec![0u8; 1 << 17].leak();
    let stack = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: stack.len(),
    };
    // SAFETY: The stack lives for ever, and all zero is a valid sigaction.
    unsafe {
        libc::sigaltstack(&stack, ptr::null_mut());
        for signal in [
            libc::SIGTRAP,
            libc::SIGSEGV,
            libc::SIGILL,
            libc::SIGBUS,
            libc::SIGFPE,
        ] {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(_, _, _) = handle;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
}

/// Executes the instruction at `state.rip` from this state, with DS and ES as given.
///
/// # Safety
///
/// [`prepare`] was called on this thread. The instruction touches only memory that is the test's, or none that is mapped, and makes no
/// system call.
pub unsafe fn run(state: &mut State, data: u16) {
    // SAFETY: As the caller says. The handler gives all registers back; 64-bit code has no use for DS and ES.
    unsafe {
        let shared = SHARED.0.get();
        (*shared).state = *state;
        (*shared).phase = Phase::Enter;
        asm!(
            "mov ds, {0:x}",
            "mov es, {0:x}",
            "int3",
            "mov ds, {1:x}",
            "mov es, {1:x}",
            in(reg) data,
            in(reg) 0,
            clobber_abi("C"),
        );
        *state = (*shared).state;
    }
}

/// RFLAGS of the test.
pub fn flags() -> Rflags {
    let flags;
    // SAFETY: The stack is as it was.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
    Rflags::new(flags)
}

/// The layout that modify_ldt(2) takes.
#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// Makes a 16-bit segment; its selector, if the kernel allows such.
pub fn segment(entry: u16, base: u32, limit: u32, code: bool) -> Option<u16> {
    let contents = if code { 2 << 1 } else { 0 };
    let desc = UserDesc {
        entry: entry.into(),
        base,
        limit,
        flags: contents,
    };
    // SAFETY: The descriptor is valid for its size, and the segment is nobody's yet.
    let got = unsafe {
        libc::syscall(
            libc::SYS_modify_ldt,
            0x11,
            &desc,
            std::mem::size_of::<UserDesc>(),
        )
    };
    (got == 0).then_some(entry << 3 | 7)
}

/// Maps memory where the test wants it.
pub fn map(address: u64, len: usize, executable: bool) {
    let prot = libc::PROT_READ | libc::PROT_WRITE | if executable { libc::PROT_EXEC } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let wanted = address as *mut libc::c_void;
    // SAFETY: An anonymous mapping where there is none has no effect on anything else.
    let got = unsafe { libc::mmap(wanted, len, prot, flags, -1, 0) };
    assert_eq!(got, wanted, "{}", std::io::Error::last_os_error());
}
