// SPDX-License-Identifier: GPL-2.0

//! A guest that knows what each page of its memory must hold, and looks, round after round.
//!
//! Page 0 of the memory is counters that all vCPUs increment with locked instructions. Each other
//! page belongs to one vCPU; they are dealt out in turn. The words of a page are computed from its
//! address and a stamp (the round in which it was written, and by whom), so that a page that is lost,
//! is an old version of itself, or is another page, is found out. For each page there is a state word
//! in memory of its own that nothing is done to: a kind and the stamp. The owner sets the kind to
//! `WRITING` first and to `STABLE` last, which makes it a sequence lock: a page whose state is the
//! same stable one before and after it was read has to have the words of that stamp, whoever reads it.
//!
//! In each round the owner verifies the page, writes it anew or, if asked to, releases it: then the
//! host may take it away, and says in the state what the guest is to find.

use crate::guest::{self, at, usize_of};
use crate::guest_code;
use crate::machine::{set_special_pages, start_vcpu, Mode};
use crate::mem::{Mapping, PAGE};
use crate::sys::Error;
use crate::vm::{Kvm, Vcpu, Vm};
use crate::{Env, Verdict};
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the verified memory lies in the guest.
pub const GPA: u64 = 0x4000_0000;
/// The slot of the first half of it; its second half is the next slot.
pub const SLOT: u32 = 1;
/// The port on which a vCPU says that it has stopped as asked to.
pub const PORT_STOPPED: u16 = 0x81;
/// The port on which a vCPU says that it found what must not be; [`Verifier::mismatch`] has it.
pub const PORT_MISMATCH: u16 = 0x82;
/// The most vCPUs.
pub const VCPUS: usize = 4;

/// Kinds of a page's state, in its lowest byte; above it is the stamp.
pub mod kind {
    /// The words are those of the stamp.
    pub const STABLE: u64 = 0;
    /// The owner is writing the page.
    pub const WRITING: u64 = 1;
    /// The owner does not care any more: the host's turn.
    pub const RELEASED: u64 = 2;
    /// The host is at it.
    pub const CLAIMED: u64 = 3;
    /// The owner finds zeros.
    pub const ZERO: u64 = 4;
    /// The owner finds zeros, or what was there.
    pub const MAYBE: u64 = 5;
    /// The bits of the kind.
    pub const MASK: u64 = 0xff;
}

const STAMP_SHIFT: u32 = 8;
/// Multipliers that spread addresses, stamps and positions over the words; odd.
const K_PAGE: u64 = 0x9e37_79b9_7f4a_7c15;
const K_WORD: u64 = 0x0101_0204_0810_2041;
const WORDS: u64 = (PAGE / 8) as u64;

/// Bytes of control for each vCPU, at [`at::DATA`].
const CONTROL: usize = 0x100;
/// Where the states of the pages are.
const STATES: usize = at::FREE as usize;
/// The most pages that there is room for the states of.
pub const PAGES_MAX: usize = (at::SIZE - STATES) / 8;

/// Offsets in a vCPU's control. The first ones are the host's to write.
mod ctl {
    pub const ID: usize = 0x00;
    pub const VCPUS: usize = 0x08;
    pub const PAGES: usize = 0x10;
    pub const RANDOM: usize = 0x18;
    pub const WRITE_MASK: usize = 0x20;
    pub const RELEASE_MASK: usize = 0x28;
    pub const WORD_MASK: usize = 0x30;
    pub const FRAME_MASK: usize = 0x38;
    pub const STRIDE: usize = 0x40;
    pub const STOP: usize = 0x48;
    pub const ROUNDS: usize = 0x50;
    pub const VISITS: usize = 0x58;
    pub const VERIFIED: usize = 0x60;
    pub const FOREIGN: usize = 0x68;
    pub const WRITTEN: usize = 0x70;
    pub const RELEASED: usize = 0x78;
    pub const COUNTED: usize = 0x80;
    pub const AT: usize = 0x88;
    pub const EXPECTED: usize = 0x90;
    pub const FOUND: usize = 0x98;
    pub const STATE: usize = 0xa0;
}

// RDI: the control. R12 control, R13 page, R14 states, R15 memory, RBX pages, RBP random.
guest_code!(verify, ".code64",
    "mov r12, rdi",
    "mov r14d, {states}",
    "mov r15d, {gpa}",
    "mov rbx, [r12 + {PAGES}]",
    "mov rbp, [r12 + {RANDOM}]",
    "jmp 32f",
    // BASE: RSI page, RDX state; gives RAX, the first word; uses R10.
    "31: mov rax, rsi",
    "shl rax, 12",
    "add rax, r15",
    "shr rax, 12",
    "and rax, [r12 + {FRAME_MASK}]",
    "mov r10, rdx",
    "shr r10, 8",
    "shl r10, 20",
    "xor rax, r10",
    "mov r10, {K_PAGE}",
    "imul rax, r10",
    "or rax, 1",
    "ret",
    // CHECK: RSI page, RDX state; gives ZF if all words are right, else RCX, R10 expected, R11 found.
    "2: mov rdi, rsi",
    "shl rdi, 12",
    "add rdi, r15",
    "cmp dl, {ZERO}",
    "je 3f",
    "cmp dl, {MAYBE}",
    "jne 4f",
    "mov rax, [rdi]",
    "test rax, rax",
    "jnz 4f",
    "3: xor eax, eax",
    "xor r9d, r9d",
    "jmp 5f",
    "4: call 31b",
    "mov r9, {K_WORD}",
    "5: mov r8, [r12 + {WORD_MASK}]",
    "xor ecx, ecx",
    "6: mov r10, rcx",
    "and r10, r8",
    "imul r10, r9",
    "add r10, rax",
    "mov r11, [rdi + rcx * 8]",
    "cmp r10, r11",
    "jne 7f",
    "add rcx, [r12 + {STRIDE}]",
    "cmp ecx, 512",
    "jb 6b",
    "xor eax, eax",
    "7: ret",
    // RANDOM: gives the next number in RBP; uses RAX.
    "8: mov rax, rbp",
    "shl rax, 13",
    "xor rbp, rax",
    "mov rax, rbp",
    "shr rax, 7",
    "xor rbp, rax",
    "mov rax, rbp",
    "shl rax, 17",
    "xor rbp, rax",
    "ret",
    // A round.
    "32: mov r13, [r12 + {ID}]",
    "inc r13",
    // Own page: is it what it was?
    "33: mov rdx, [r14 + r13 * 8]",
    "cmp dl, {RELEASED}",
    "je 19f",
    "cmp dl, {CLAIMED}",
    "je 19f",
    "mov rsi, r13",
    "call 2b",
    "jne 20f",
    "inc qword ptr [r12 + {VERIFIED}]",
    "mov rax, r13",
    "add rax, [r12 + {ROUNDS}]",
    "test rax, [r12 + {WRITE_MASK}]",
    "jnz 15f",
    // To be released, or to be written?
    "mov rcx, [r12 + {RELEASE_MASK}]",
    "test rcx, rcx",
    "jz 12f",
    "cmp dl, {STABLE}",
    "jne 12f",
    "call 8b",
    "mov rax, rbp",
    "shr rax, 32",
    "test rax, rcx",
    "jnz 12f",
    "mov dl, {RELEASED}",
    "mov [r14 + r13 * 8], rdx",
    "inc qword ptr [r12 + {RELEASES}]",
    "jmp 15f",
    "12: mov rdx, [r12 + {ROUNDS}]",
    "inc rdx",
    "shl rdx, 4",
    "add rdx, [r12 + {ID}]",
    "shl rdx, 8",
    "or rdx, {WRITING}",
    "mov [r14 + r13 * 8], rdx",
    "call 31b",
    "mov r9, {K_WORD}",
    "mov r8, [r12 + {WORD_MASK}]",
    "xor ecx, ecx",
    "13: mov r10, rcx",
    "and r10, r8",
    "imul r10, r9",
    "add r10, rax",
    "mov [rdi + rcx * 8], r10",
    "add rcx, [r12 + {STRIDE}]",
    "cmp ecx, 512",
    "jb 13b",
    "xor rdx, {WRITING}",
    "mov [r14 + r13 * 8], rdx",
    "inc qword ptr [r12 + {WRITTEN}]",
    // A counter of page 0.
    "15: mov eax, r13d",
    "and eax, 511",
    "lock inc qword ptr [r15 + rax * 8]",
    "inc qword ptr [r12 + {COUNTED}]",
    // Any page, if it is stable.
    "call 8b",
    "mov rax, rbp",
    "xor edx, edx",
    "lea rcx, [rbx - 1]",
    "div rcx",
    "lea rsi, [rdx + 1]",
    "mov rdx, [r14 + rsi * 8]",
    "cmp dl, {STABLE}",
    "jne 19f",
    "call 2b",
    "je 18f",
    "cmp rdx, [r14 + rsi * 8]",
    "jne 19f",
    "jmp 20f",
    "18: inc qword ptr [r12 + {FOREIGN}]",
    // The next one.
    "19: inc qword ptr [r12 + {VISITS}]",
    "cmp qword ptr [r12 + {STOP}], 0",
    "jne 22f",
    "21: add r13, [r12 + {VCPUS}]",
    "cmp r13, rbx",
    "jb 33b",
    "inc qword ptr [r12 + {ROUNDS}]",
    "jmp 32b",
    "20: lea rcx, [rdi + rcx * 8]",
    "mov [r12 + {AT}], rcx",
    "mov [r12 + {EXPECTED}], r10",
    "mov [r12 + {FOUND}], r11",
    "mov [r12 + {STATE}], rdx",
    "mov eax, {OUT_MISMATCH}",
    "mov edx, eax",
    "out dx, al",
    "hlt",
    "22: mov edx, {OUT_STOPPED}",
    "out dx, al",
    "jmp 21b";
    states = STATES, gpa = GPA, K_PAGE = K_PAGE, K_WORD = K_WORD,
    PAGES = ctl::PAGES, RANDOM = ctl::RANDOM, FRAME_MASK = ctl::FRAME_MASK,
    WORD_MASK = ctl::WORD_MASK, STRIDE = ctl::STRIDE, ID = ctl::ID, VERIFIED = ctl::VERIFIED,
    ROUNDS = ctl::ROUNDS, WRITE_MASK = ctl::WRITE_MASK, RELEASE_MASK = ctl::RELEASE_MASK,
    RELEASES = ctl::RELEASED, WRITTEN = ctl::WRITTEN, COUNTED = ctl::COUNTED,
    FOREIGN = ctl::FOREIGN, VISITS = ctl::VISITS, STOP = ctl::STOP, VCPUS = ctl::VCPUS,
    AT = ctl::AT, EXPECTED = ctl::EXPECTED, FOUND = ctl::FOUND, STATE = ctl::STATE,
    STABLE = kind::STABLE, WRITING = kind::WRITING, RELEASED = kind::RELEASED,
    CLAIMED = kind::CLAIMED, ZERO = kind::ZERO, MAYBE = kind::MAYBE,
    OUT_MISMATCH = PORT_MISMATCH, OUT_STOPPED = PORT_STOPPED,
);

/// What the guest does, and how much of it.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// vCPUs, up to [`VCPUS`].
    pub vcpus: usize,
    /// A page is written in one of `write_mask + 1` rounds. A power of two less one.
    pub write_mask: u64,
    /// One in `release_mask + 1` pages is released instead; 0: none. A power of two less one.
    pub release_mask: u64,
    /// What of a page's frame number its words depend on.
    pub frame_mask: u64,
    /// What of a word's position in the page it depends on.
    pub word_mask: u64,
    /// Every how manyeth word is written and verified. A power of two.
    pub stride: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Plan {
            vcpus: 1,
            write_mask: 3,
            release_mask: 0,
            frame_mask: u64::MAX,
            word_mask: u64::MAX,
            stride: 4,
        }
    }
}

/// What a vCPU has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rounds over all its pages.
    pub rounds: u64,
    /// Own pages that were looked at.
    pub visits: u64,
    /// Own pages found right.
    pub verified: u64,
    /// Pages of any owner found right.
    pub foreign: u64,
    /// Own pages written.
    pub written: u64,
    /// Own pages released.
    pub released: u64,
    counted: u64,
}

/// A VM whose vCPUs verify memory. The order of the fields is the order in which they are dropped.
#[derive(Debug)]
pub struct Verifier<'a> {
    /// The vCPUs; each is for one thread to run.
    pub vcpus: Vec<Vcpu>,
    /// The VM.
    pub vm: Vm,
    /// The device.
    pub kvm: Kvm,
    /// The guest's code, tables, control and states. Shared, so that it is the same after a fork.
    pub control: Mapping,
    /// What is verified.
    pub memory: &'a Mapping,
    plan: Plan,
}

impl<'a> Verifier<'a> {
    /// A VM over `memory`, which is all zeros, or has been filled by [`Self::prefill`] if `filled`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn new(env: &Env, plan: Plan, memory: &'a Mapping, filled: bool) -> Result<Self, Error> {
        assert!(plan.vcpus <= VCPUS && memory.len() / PAGE <= PAGES_MAX);
        let control = Mapping::new(at::SIZE, true)?;
        let kvm = env.open()?;
        let vm = kvm.create_vm()?;
        set_special_pages(&vm)?;
        vm.set_memory(0, 0, 0, control.len() as u64, control.addr() as u64)?;
        control.write_bytes(usize_of(at::CODE), verify());
        guest::write_gdt(&control);
        guest::write_idt(&control, true);
        guest::write_page_tables(&control);
        let mut v = Verifier {
            vcpus: Vec::new(),
            vm,
            kvm,
            control,
            memory,
            plan,
        };
        for half in 0..2 {
            v.set_half(half, 0, true)?;
        }
        let first = if filled { kind::STABLE } else { kind::ZERO };
        for page in 1..v.pages() {
            v.state(page).store(first, Ordering::SeqCst);
        }
        for id in 0..plan.vcpus {
            v.add_vcpu(env, id)?;
        }
        Ok(v)
    }

    fn add_vcpu(&mut self, env: &Env, id: usize) -> Result<(), Error> {
        let set =
            |offset: usize, value: u64| self.control.write(Self::control_of(id) + offset, value);
        set(ctl::ID, id as u64);
        set(ctl::VCPUS, self.plan.vcpus as u64);
        set(ctl::PAGES, self.pages() as u64);
        set(ctl::RANDOM, ((env.seed << 8) | id as u64) + 1);
        set(ctl::WRITE_MASK, self.plan.write_mask);
        set(ctl::RELEASE_MASK, self.plan.release_mask);
        set(ctl::WORD_MASK, self.plan.word_mask);
        set(ctl::FRAME_MASK, self.plan.frame_mask);
        set(ctl::STRIDE, self.plan.stride);
        let vcpu = self.vm.create_vcpu(id)?;
        vcpu.set_cpuid(&*self.kvm.supported_cpuid()?)?;
        start_vcpu(&vcpu, Mode::Long, at::CODE)?;
        let mut regs = vcpu.regs()?;
        regs.rdi = at::DATA + (id * CONTROL) as u64;
        regs.rsp = at::STACK - (id * 0x800) as u64;
        vcpu.set_regs(&regs)?;
        self.vcpus.push(vcpu);
        Ok(())
    }

    fn control_of(id: usize) -> usize {
        usize_of(at::DATA) + id * CONTROL
    }

    /// The offset, and the length, of a half of the memory: each has a slot.
    #[must_use]
    pub fn half(&self, half: usize) -> (usize, usize) {
        let len = self.memory.len() / 2;
        (half * len, len)
    }

    /// Makes or changes (`there`) or deletes the slot of a half.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn set_half(&self, half: usize, flags: u32, there: bool) -> Result<(), Error> {
        let (offset, len) = self.half(half);
        self.vm.set_memory(
            SLOT + half as u32,
            flags,
            GPA + offset as u64,
            if there { len as u64 } else { 0 },
            (self.memory.addr() + offset) as u64,
        )
    }

    /// The number of pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.memory.len() / PAGE
    }

    /// The state of a page.
    #[must_use]
    pub fn state(&self, page: usize) -> &AtomicU64 {
        assert!(page < self.pages());
        // SAFETY: Aligned and within the control's mapping, which lives as long as `self`; all that
        // access it do so atomically.
        unsafe { AtomicU64::from_ptr((self.control.addr() + STATES + page * 8) as *mut u64) }
    }

    /// Takes a released page from the guest: only one thread succeeds. Returns its old stamp as a
    /// stable state.
    #[must_use]
    pub fn claim(&self, page: usize) -> Option<u64> {
        let state = self.state(page);
        let old = state.load(Ordering::SeqCst);
        if old & kind::MASK != kind::RELEASED {
            return None;
        }
        let stable = old & !kind::MASK;
        state
            .compare_exchange(
                old,
                stable | kind::CLAIMED,
                Ordering::SeqCst,
                Ordering::SeqCst,
            )
            .ok()
            .map(|_| stable)
    }

    /// What vCPU `id` has done.
    #[must_use]
    pub fn progress(&self, id: usize) -> Progress {
        let get = |offset: usize| self.control.read::<u64>(Self::control_of(id) + offset);
        Progress {
            rounds: get(ctl::ROUNDS),
            visits: get(ctl::VISITS),
            verified: get(ctl::VERIFIED),
            foreign: get(ctl::FOREIGN),
            written: get(ctl::WRITTEN),
            released: get(ctl::RELEASED),
            counted: get(ctl::COUNTED),
        }
    }

    /// Asks all vCPUs to stop (each says so on [`PORT_STOPPED`]), or not to.
    pub fn set_stop(&self, stop: bool) {
        for id in 0..self.plan.vcpus {
            self.control
                .write(Self::control_of(id) + ctl::STOP, u64::from(stop));
        }
    }

    /// The word at `word` of `page` in `state`, which is stable.
    #[must_use]
    pub fn word(plan: &Plan, page: usize, state: u64, word: u64) -> u64 {
        let frame = ((GPA >> 12) + page as u64) & plan.frame_mask;
        let base = (frame ^ ((state >> STAMP_SHIFT) << 20)).wrapping_mul(K_PAGE) | 1;
        base.wrapping_add((word & plan.word_mask).wrapping_mul(K_WORD))
    }

    /// The bytes of `page` in `state`, which is stable.
    #[must_use]
    pub fn bytes(plan: &Plan, page: usize, state: u64) -> Vec<u8> {
        (0..WORDS)
            .flat_map(|w| Self::word(plan, page, state, w).to_le_bytes())
            .collect()
    }

    /// What the guest does.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What a vCPU found that must not be, after it said so.
    #[must_use]
    pub fn mismatch(&self, id: usize) -> String {
        let get = |offset: usize| self.control.read::<u64>(Self::control_of(id) + offset);
        let (gpa, state) = (get(ctl::AT), get(ctl::STATE));
        let page = usize_of(gpa.wrapping_sub(GPA)) / PAGE;
        let found = get(ctl::FOUND);
        let mut host = [0; 8];
        let host = match self.peek(usize_of(gpa.wrapping_sub(GPA)), &mut host) {
            Ok(()) => format!("{:#x}", u64::from_le_bytes(host)),
            Err(e) => format!("{e}"),
        };
        format!(
            "vCPU {id} at gpa {gpa:#x} (page {page}, state {state:#x}): expected {:#x}, found \
             {found:#x}; the host reads {host} there now, the state is {:#x}; {:?}",
            get(ctl::EXPECTED),
            self.state(page).load(Ordering::SeqCst),
            self.progress(id),
        )
    }

    /// Reads memory as the kernel does, whatever the mapping's protection is now.
    ///
    /// # Errors
    ///
    /// What the kernel answered: nothing is mapped there.
    pub fn peek(&self, offset: usize, data: &mut [u8]) -> Result<(), Error> {
        assert!(offset + data.len() <= self.memory.len());
        crate::mem::peek(self.memory.addr() + offset, data)
    }

    /// Writes memory as the kernel does, whatever the mapping's protection is now.
    ///
    /// # Errors
    ///
    /// What the kernel answered: nothing is mapped there.
    pub fn poke(&self, offset: usize, data: &[u8]) -> Result<(), Error> {
        assert!(offset + data.len() <= self.memory.len());
        crate::mem::poke(self.memory.addr() + offset, data)
    }

    /// Looks at a page from the host, all its words, through the mapping `memory` at `offset`.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn look(
        &self,
        page: usize,
        state: u64,
        memory: &Mapping,
        offset: usize,
    ) -> Result<(), String> {
        let zero = match state & kind::MASK {
            kind::STABLE => false,
            kind::ZERO => true,
            kind::MAYBE => memory.read::<u64>(offset) == 0,
            _ => return Ok(()),
        };
        for w in (0..WORDS).step_by(usize_of(self.plan.stride)) {
            let found: u64 = memory.read(offset + usize_of(w) * 8);
            let expected = if zero {
                0
            } else {
                Self::word(&self.plan, page, state, w)
            };
            if found != expected {
                return Err(format!(
                    "the host finds {found:#x} at word {w} of page {page}, expected {expected:#x}; \
                     state {state:#x}"
                ));
            }
        }
        Ok(())
    }

    /// The host's own look at all memory, after the vCPUs have stopped.
    ///
    /// # Errors
    ///
    /// What is wrong: pages that are not what their states say, counts that were lost.
    pub fn verify_all(&self) -> Result<(), Verdict> {
        for page in 1..self.pages() {
            let state = self.state(page).load(Ordering::SeqCst);
            self.look(page, state, self.memory, page * PAGE)
                .map_err(Verdict::Fail)?;
        }
        let counters: u64 = (0..PAGE / 8).map(|w| self.memory.read::<u64>(w * 8)).sum();
        let counted: u64 = (0..self.plan.vcpus)
            .map(|id| self.progress(id).counted)
            .sum();
        if counters != counted {
            return Err(Verdict::Fail(format!(
                "the counters of page 0 sum up to {counters}, the vCPUs counted {counted}"
            )));
        }
        Ok(())
    }
}
