// SPDX-License-Identifier: GPL-2.0

//! Memory-mapped I/O: accesses to guest memory that no slot backs.
//!
//! How an access that is wider than eight bytes or crosses a page is cut into exits is not part of
//! the API, so these tests gather bytes by address.

use selftests::check::expect_errno;
use selftests::guest::{at, pte, usize_of, PORT_EXCEPTION};
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::Mapping;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::collections::BTreeMap;
use std::process::ExitCode;

const M: u64 = at::MMIO;

/// A device: reads give `value(address)` byte by byte, writes are kept.
#[derive(Default)]
struct Device {
    written: BTreeMap<u64, u8>,
    reads: Vec<(u64, u32)>,
    writes: Vec<(u64, Vec<u8>)>,
}

fn value(address: u64) -> u8 {
    0x80 | (address as u8).wrapping_mul(3)
}

fn value_at(address: u64, n: u64) -> Vec<u8> {
    (address..address + n).map(value).collect()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |v, b| (v << 8) | u64::from(*b))
}

impl Device {
    /// Serves the guest to its HLT. `Ok(false)`: the module says that it does not emulate the
    /// instruction (KVM_INTERNAL_ERROR_EMULATION), which is an answer.
    fn serve(&mut self, m: &Machine) -> Result<bool, Verdict> {
        loop {
            match m.run()? {
                Exit::MmioRead { addr, len } => {
                    m.mmio_reply(&value_at(addr, len.into()));
                    self.reads.push((addr, len));
                }
                Exit::MmioWrite { addr, data } => {
                    for (i, b) in data.iter().enumerate() {
                        self.written.insert(addr + i as u64, *b);
                    }
                    self.writes.push((addr, data));
                }
                Exit::Hlt => return Ok(true),
                Exit::Internal { suberror: 1, .. } => return Ok(false),
                other => fail!("exit {other:x?}\n{}", m.describe()),
            }
            if self.reads.len() + self.writes.len() > 10_000 {
                fail!("10,000 exits and no end\n{}", m.describe());
            }
        }
    }

    /// As [`Device::serve`] for instructions that have to be emulated.
    fn serve_all(&mut self, m: &Machine) -> Outcome {
        ensure!(self.serve(m)?, "not emulated\n{}", m.describe());
        Ok(())
    }

    fn written(&self, address: u64, n: u64) -> Vec<u8> {
        (address..address + n)
            .map_while(|a| self.written.get(&a).copied())
            .collect()
    }
}

fn write_widths_64(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov ebx, {M}",
        "mov rax, 0x8877665544332211",
        "mov [rbx], al",
        "mov [rbx + 0x10], ax",
        "mov [rbx + 0x20], eax",
        "mov [rbx + 0x30], rax",
        "mov [rbx + 0x40], ah",
        "mov r9, rax",
        "mov r10, rbx",
        "mov [r10 + 0x50], r9b",
        "mov [r10 + 0x60], r9d",
        "mov rcx, 2",
        "mov [rbx + rcx * 8 + 0x70], r9",
        "mov byte ptr [rbx + 0x90], 0xaa",
        "mov word ptr [rbx + 0xa0], 0xbbcc",
        "mov dword ptr [rbx + 0xb0], 0x11223344",
        "mov qword ptr [rbx + 0xc0], -2",
        "mov sil, 0x66",
        "mov [rbx + 0xd0], sil",
        "hlt";
        M = M,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    let all = 0x8877_6655_4433_2211u64.to_le_bytes();
    let want: [(u64, &[u8]); 13] = [
        (0, &all[..1]),
        (0x10, &all[..2]),
        (0x20, &all[..4]),
        (0x30, &all),
        (0x40, &all[1..2]),
        (0x50, &all[..1]),
        (0x60, &all[..4]),
        (0x80, &all),
        (0x90, &[0xaa]),
        (0xa0, &[0xcc, 0xbb]),
        (0xb0, &[0x44, 0x33, 0x22, 0x11]),
        (0xc0, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        (0xd0, &[0x66]),
    ];
    let want: Vec<(u64, Vec<u8>)> = want.iter().map(|(a, b)| (M + a, b.to_vec())).collect();
    ensure_eq!(d.writes, want, "writes in order, one exit each");
    ensure_eq!(d.reads, vec![], "reads");
    Ok(())
}

fn read_widths_64(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov ebx, {M}",
        "mov rax, -1",
        "mov rcx, rax",
        "mov rdx, rax",
        "mov rsi, rax",
        "mov r8, rax",
        "mov r9, rax",
        "mov al, [rbx + 1]",
        "mov ah, [rbx + 2]",
        "mov cx, [rbx + 0x10]",
        "mov edx, [rbx + 0x20]",
        "mov rsi, [rbx + 0x30]",
        "mov r8b, [rbx + 0x40]",
        "mov r9d, [rbx + 0x50]",
        "hlt";
        M = M,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    let r = m.vcpu.regs()?;
    let v = |o: u64, n: u64| number(&value_at(M + o, n));
    let ones = u64::MAX;
    ensure_eq!(
        r.rax,
        (ones << 16) | (v(2, 1) << 8) | v(1, 1),
        "bytes change AL and AH alone"
    );
    ensure_eq!(r.rcx, (ones << 16) | v(0x10, 2), "a word changes CX alone");
    ensure_eq!(
        r.rdx,
        v(0x20, 4),
        "a double word clears the upper half of RDX"
    );
    ensure_eq!(r.rsi, v(0x30, 8), "a quad word");
    ensure_eq!(r.r8, (ones << 8) | v(0x40, 1), "a byte changes R8B alone");
    ensure_eq!(
        r.r9,
        v(0x50, 4),
        "a double word clears the upper half of R9"
    );
    let want: Vec<(u64, u32)> = [
        (1, 1),
        (2, 1),
        (0x10, 2),
        (0x20, 4),
        (0x30, 8),
        (0x40, 1),
        (0x50, 4),
    ]
    .iter()
    .map(|(a, n)| (M + a, *n))
    .collect();
    ensure_eq!(d.reads, want, "reads in order, one exit each");
    Ok(())
}

fn extensions(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov ebx, {M}",
        "mov rax, -1",
        "movzx ax, byte ptr [rbx]",
        "movzx ecx, byte ptr [rbx]",
        "movzx rdx, byte ptr [rbx]",
        "movzx esi, word ptr [rbx]",
        "movzx rdi, word ptr [rbx]",
        "xor r8d, r8d",
        "movsx r8w, byte ptr [rbx]",
        "movsx r9d, byte ptr [rbx]",
        "movsx r10, byte ptr [rbx]",
        "movsx r11d, word ptr [rbx]",
        "movsx r12, word ptr [rbx]",
        "movsxd r13, dword ptr [rbx]",
        "hlt";
        M = M,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    let r = m.vcpu.regs()?;
    let v = |n: u64| number(&value_at(M, n));
    // All values of the device have their top bit set.
    let (b, w, l) = (v(1), v(2), v(4));
    let (sb, sw) = (0xffff_ff00 | b, 0xffff_0000 | w);
    let high = 0xffff_ffff_0000_0000u64;
    ensure_eq!(r.rax, 0xffff_ffff_ffff_0000 | b, "MOVZX AX, byte");
    ensure_eq!((r.rcx, r.rdx), (b, b), "MOVZX ECX and RDX, byte");
    ensure_eq!((r.rsi, r.rdi), (w, w), "MOVZX ESI and RDI, word");
    ensure_eq!(r.r8, 0xff00 | b, "MOVSX R8W, byte");
    ensure_eq!((r.r9, r.r10), (sb, high | sb), "MOVSX R9D and R10, byte");
    ensure_eq!((r.r11, r.r12), (sw, high | sw), "MOVSX R11D and R12, word");
    ensure_eq!(r.r13, high | l, "MOVSXD R13, double word");
    ensure_eq!(d.reads.len(), 11, "exits");
    Ok(())
}

/// The forms with the address in the instruction, which exist for the accumulator alone.
fn absolute_addresses(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        ".byte 0xa0", ".long {M}",       // mov al, [M]
        "mov ebx, eax",
        ".byte 0xa1", ".long {M} + 4",   // mov eax, [M + 4]
        "mov ecx, eax",
        "mov eax, 0x04030201",
        ".byte 0xa2", ".long {M} + 8",   // mov [M + 8], al
        ".byte 0xa3", ".long {M} + 12",  // mov [M + 12], eax
        ".byte 0x66, 0xa3", ".long {M} + 16",
        "hlt";
        M = M,
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    let r = m.vcpu.regs()?;
    ensure_eq!((r.rbx & 0xff) as u8, value(M), "byte");
    ensure_eq!(r.rcx, number(&value_at(M + 4, 4)), "double word");
    let want = vec![
        (M + 8, vec![1]),
        (M + 12, vec![1, 2, 3, 4]),
        (M + 16, vec![1, 2]),
    ];
    ensure_eq!(d.writes, want, "writes");
    Ok(())
}

guest_code!(
    modes_code,
    ".code32",
    "mov [ebx], al",
    "mov [ebx + 4], eax",
    "mov ecx, [ebx + 8]",
    "movzx edx, byte ptr [ebx + 1]",
    "hlt",
);

fn other_modes(env: &Env) -> Outcome {
    for mode in [Mode::Protected, Mode::Paging32, Mode::Pae] {
        let m = Machine::new(env, mode, modes_code())?;
        m.patch_regs(|r| {
            r.rbx = M;
            r.rax = 0x1122_3344;
        })?;
        let mut d = Device::default();
        d.serve_all(&m)?;
        let want = vec![(M, vec![0x44]), (M + 4, vec![0x44, 0x33, 0x22, 0x11])];
        ensure_eq!(d.writes, want, "writes in {mode:?}");
        let r = m.vcpu.regs()?;
        let want = (number(&value_at(M + 8, 4)), u64::from(value(M + 1)));
        ensure_eq!((r.rcx, r.rdx), want, "reads in {mode:?}");
    }
    Ok(())
}

/// Real mode reaches device memory by a segment, as with a VGA frame buffer.
fn real_mode(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code16",
        "mov ax, 0x4000",
        "mov es, ax",
        "mov di, 0x100",
        "mov word ptr es:[di], 0x0741",
        "mov al, es:[di + 4]",
        "mov bx, es:[di + 6]",
        "hlt",
    );
    let m = Machine::with_memory(env, Mapping::new(0x30000, false)?)?;
    m.vcpu.set_cpuid(&*m.kvm.supported_cpuid()?)?;
    m.mem.write_bytes(usize_of(at::CODE), code());
    selftests::machine::start_vcpu(&m.vcpu, Mode::Real, at::CODE)?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    ensure_eq!(d.writes, vec![(0x40100, vec![0x41, 0x07])], "writes");
    let r = m.vcpu.regs()?;
    ensure_eq!((r.rax & 0xff) as u8, value(0x40104), "byte");
    ensure_eq!(r.rbx & 0xffff, number(&value_at(0x40106, 2)), "word");
    Ok(())
}

fn segment_base(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov eax, gs:[0x10]",
        "mov fs:[0x20], eax",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.patch_sregs(|s| {
        s.gs.base = M;
        s.fs.base = M + 0x1000;
    })?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    ensure_eq!(d.reads, vec![(M + 0x10, 4)], "read through GS");
    ensure_eq!(
        d.writes,
        vec![(M + 0x1020, value_at(M + 0x10, 4))],
        "write through FS"
    );
    Ok(())
}

fn rip_relative(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov eax, [rip + 0x100000]",
        "2: mov dword ptr [rip + 0x100000], 0x01020304",
        "3: hlt",
    );
    let m = Machine::with_memory(env, Mapping::new(0x80000, false)?)?;
    m.vcpu.set_cpuid(&*m.kvm.supported_cpuid()?)?;
    m.start(Mode::Long, code())?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    // MOV r32, [rip + disp32] has 6 bytes, MOV [rip + disp32], imm32 has 10.
    ensure_eq!(d.reads, vec![(at::CODE + 6 + 0x10_0000, 4)], "read");
    let want = vec![(at::CODE + 16 + 0x10_0000, vec![4, 3, 2, 1])];
    ensure_eq!(
        d.writes,
        want,
        "write, whose immediate follows the displacement"
    );
    Ok(())
}

fn page_crossing(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov ebx, {M}",
        "mov rax, 0x0807060504030201",
        "mov [rbx + 0xffd], rax",
        "mov ecx, [rbx + 0x1ffe]",
        "mov dx, [rbx + 0x2fff]",
        "hlt";
        M = M,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    ensure_eq!(
        d.written(M + 0xffd, 8),
        vec![1, 2, 3, 4, 5, 6, 7, 8],
        "write across pages"
    );
    ensure_eq!(d.written.len(), 8, "bytes written");
    let r = m.vcpu.regs()?;
    ensure_eq!(r.rcx, number(&value_at(M + 0x1ffe, 4)), "read across pages");
    ensure_eq!(
        r.rdx & 0xffff,
        number(&value_at(M + 0x2fff, 2)),
        "word across pages"
    );
    Ok(())
}

/// Neighbouring linear pages lead to unrelated physical ones: here device memory and other device
/// memory, far apart.
fn page_crossing_scattered(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x400000",
        "mov rax, 0x0807060504030201",
        "mov [rbx + 0xffc], rax",
        "mov rcx, [rbx + 0xffe]",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write(usize_of(at::PD) + 2 * 8, 0x30003u64);
    m.mem.write(0x30000, (M + 0x5000) | pte::P | pte::W);
    m.mem.write(0x30008, (M + 0x9000) | pte::P | pte::W);
    let mut d = Device::default();
    d.serve_all(&m)?;
    ensure_eq!(d.written(M + 0x5ffc, 4), vec![1, 2, 3, 4], "first part");
    ensure_eq!(d.written(M + 0x9000, 4), vec![5, 6, 7, 8], "second part");
    let mut want = value_at(M + 0x5ffe, 2);
    want.extend(value_at(M + 0x9000, 6));
    ensure_eq!(m.vcpu.regs()?.rcx, number(&want), "read");
    Ok(())
}

/// The first bytes are in memory, the rest is a device, and the other way round.
fn memory_and_device(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x200000", // the end of memory
        "mov rax, 0x0807060504030201",
        "mov [rbx - 3], rax",
        "mov rcx, [rbx - 2]",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mut d = Device::default();
    d.serve_all(&m)?;
    ensure_eq!(
        m.mem.read_bytes(at::SIZE - 3, 3),
        vec![1, 2, 3],
        "part in memory"
    );
    ensure_eq!(
        d.written(at::SIZE as u64, 5),
        vec![4, 5, 6, 7, 8],
        "part for the device"
    );
    let mut want = vec![2, 3];
    want.extend(value_at(at::SIZE as u64, 6));
    ensure_eq!(m.vcpu.regs()?.rcx, number(&want), "read");
    Ok(())
}

/// Instructions that read and write: RMW forms, exchange, test. What is not emulated has to say so.
fn read_modify_write(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov ebx, {M}",
        "or byte ptr [rbx], 1",
        "and dword ptr [rbx + 4], 0xff",
        "mov eax, 0x10",
        "add [rbx + 8], eax",
        "xchg [rbx + 12], eax",
        "test byte ptr [rbx + 16], 0x80",
        "setnz cl",
        "cmp dword ptr [rbx + 20], 0",
        "sets dl",
        "hlt";
        M = M,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mut d = Device::default();
    if !d.serve(&m)? {
        skip!("not emulated: the exit says so (KVM_INTERNAL_ERROR_EMULATION)");
    }
    let v = |o: u64| number(&value_at(M + o, 4)) as u32;
    ensure_eq!(d.written(M, 1), vec![value(M) | 1], "OR");
    ensure_eq!(number(&d.written(M + 4, 4)) as u32, v(4) & 0xff, "AND");
    ensure_eq!(
        number(&d.written(M + 8, 4)) as u32,
        v(8).wrapping_add(0x10),
        "ADD"
    );
    ensure_eq!(number(&d.written(M + 12, 4)), 0x10, "XCHG, to the device");
    let r = m.vcpu.regs()?;
    ensure_eq!(r.rax as u32, v(12), "XCHG, from the device");
    ensure_eq!((r.rcx & 1, r.rdx & 1), (1, 1), "flags of TEST and CMP");
    ensure!(!d.written.contains_key(&(M + 16)), "TEST wrote");
    Ok(())
}

/// String instructions between memory and a device, in both directions.
fn strings(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov esi, {D}",
        "mov edi, {M}",
        "mov ecx, 5",
        "rep movsd",
        "mov esi, {M} + 0x100",
        "mov edi, {D} + 0x100",
        "mov ecx, 7",
        "rep movsb",
        "mov edi, {M} + 0x200",
        "mov ecx, 3",
        "mov eax, 0x55667788",
        "rep stosd",
        "mov esi, {M} + 0x300",
        "lodsw",
        "mov rbx, rax",
        "mov esi, {D}",
        "mov ecx, 0",
        "mov edi, {M} + 0x400",
        "rep movsb",
        "hlt";
        M = M, D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    for i in 0..20 {
        m.mem.write(usize_of(at::DATA) + i, 0x40 + i as u8);
    }
    let mut d = Device::default();
    if !d.serve(&m)? {
        skip!("not emulated: the exit says so (KVM_INTERNAL_ERROR_EMULATION)");
    }
    ensure_eq!(
        d.written(M, 20),
        (0x40..0x54).collect::<Vec<u8>>(),
        "MOVSD to the device"
    );
    let got = m.mem.read_bytes(usize_of(at::DATA) + 0x100, 8);
    let mut want = value_at(M + 0x100, 7);
    want.push(0);
    ensure_eq!(got, want, "MOVSB from the device");
    ensure_eq!(
        d.written(M + 0x200, 13),
        [0x88, 0x77, 0x66, 0x55].repeat(3),
        "STOSD"
    );
    ensure_eq!(
        m.vcpu.regs()?.rbx & 0xffff,
        number(&value_at(M + 0x300, 2)),
        "LODSW"
    );
    ensure!(
        !d.written.contains_key(&(M + 0x400)),
        "a string of no elements wrote"
    );
    Ok(())
}

/// 16-byte moves, as compilers make of memcpy.
fn sse(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov ebx, {M}",
        "movups xmm1, [{D}]",
        "movups [rbx], xmm1",
        "movups xmm2, [rbx + 0x20]",
        "movups [{D} + 16], xmm2",
        "hlt";
        M = M, D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let source: [u8; 16] = *b"sixteen bytes...";
    m.mem.write(usize_of(at::DATA), source);
    let mut d = Device::default();
    if !d.serve(&m)? {
        skip!("not emulated: the exit says so (KVM_INTERNAL_ERROR_EMULATION)");
    }
    ensure_eq!(d.written(M, 16), source.to_vec(), "write");
    let got = m.mem.read_bytes(usize_of(at::DATA) + 16, 16);
    ensure_eq!(got, value_at(M + 0x20, 16), "read");
    Ok(())
}

/// The access faults in the guest's own tables before it can reach the device.
fn guest_page_fault_first(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x400000",
        "mov byte ptr [rbx], 0x12",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write(usize_of(at::PD) + 2 * 8, 0x30003u64);
    m.mem.write(0x30000, (M + 0x7000) | pte::P); // read-only
    let r = m.expect_exception(14)?;
    ensure_eq!((r.error, r.cr2), (3, 0x40_0000), "error code and CR2");
    m.mem.write(0x30000, (M + 0x7000) | pte::P | pte::W);
    m.expect(&Exit::MmioWrite {
        addr: M + 0x7000,
        data: vec![0x12],
    })?;
    m.expect_hlt()
}

/// The upper part of an access that crosses a page is absent: a page fault, and nothing is written.
fn crossing_faults(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x400ffe",
        "mov eax, 0x04030201",
        "mov [rbx], eax",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write(usize_of(at::PD) + 2 * 8, 0x30003u64);
    m.mem.write(0x30000, (M + 0x7000) | pte::P | pte::W);
    m.mem.write(0x30008, 0u64);
    match m.run()? {
        Exit::Out {
            port: PORT_EXCEPTION,
            ..
        } => {}
        other => fail!("exit {other:x?}, expected the page fault\n{}", m.describe()),
    }
    let r = m.record();
    ensure_eq!(
        (r.vector, r.error, r.cr2),
        (14, 2, 0x40_1000),
        "vector, error code, CR2"
    );
    m.mem.write(0x30008, (M + 0x8000) | pte::P | pte::W);
    let mut d = Device::default();
    d.serve_all(&m)?;
    ensure_eq!(d.written(M + 0x7ffe, 2), vec![1, 2], "first part");
    ensure_eq!(d.written(M + 0x8000, 2), vec![3, 4], "second part");
    Ok(())
}

/// KVM_RUN with `immediate_exit` finishes a pending read and runs nothing else.
fn completion_by_immediate_exit(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "mov eax, [ebx]", "mov ecx, 1", "hlt");
    let m = Machine::new(env, Mode::Protected, code())?;
    m.patch_regs(|r| r.rbx = M)?;
    m.expect(&Exit::MmioRead { addr: M, len: 4 })?;
    m.mmio_reply(&[0xef, 0xbe, 0xad, 0xde]);
    m.vcpu.set_immediate_exit(1);
    expect_errno(m.vcpu.run(), libc::EINTR, "KVM_RUN with immediate_exit")?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        (r.rax, r.rcx, r.rip),
        (0xdead_beef, 0, at::CODE + 2),
        "EAX, ECX, RIP"
    );
    m.vcpu.set_immediate_exit(0);
    m.expect_hlt()
}

/// A device page that becomes memory is memory at once, and the other way round.
fn slot_over_device(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "2: mov eax, [ebx]", "hlt", "jmp 2b");
    let m = Machine::new(env, Mode::Protected, code())?;
    m.patch_regs(|r| r.rbx = M)?;
    let ram = Mapping::new(0x1000, false)?;
    ram.write(0, 0x1357_9bdfu32);
    for round in 0..3 {
        m.expect(&Exit::MmioRead { addr: M, len: 4 })?;
        m.mmio_reply(&[1, 0, 0, 0]);
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, 1, "device, round {round}");
        m.vm.set_memory(1, 0, M, 0x1000, ram.addr() as u64)?;
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, 0x1357_9bdf, "memory, round {round}");
        m.vm.set_memory(1, 0, 0, 0, 0)?;
    }
    Ok(())
}

/// A thousand accesses in a loop all arrive, in order.
fn many(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ecx, 500",
        "2: mov [ebx], ecx",
        "mov eax, [ebx + 4]",
        "add edx, eax",
        "loop 2b",
        "hlt",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    m.patch_regs(|r| r.rbx = M)?;
    let mut sum = 0u32;
    for i in (1..=500u32).rev() {
        m.expect(&Exit::MmioWrite {
            addr: M,
            data: i.to_le_bytes().to_vec(),
        })?;
        m.expect(&Exit::MmioRead {
            addr: M + 4,
            len: 4,
        })?;
        let v = i.wrapping_mul(0x0123_4567);
        sum = sum.wrapping_add(v);
        m.mmio_reply(&v.to_le_bytes());
    }
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rdx, u64::from(sum), "sum of what was read");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "mmio",
        tests![
            write_widths_64,
            read_widths_64,
            extensions,
            absolute_addresses,
            other_modes,
            real_mode,
            segment_base,
            rip_relative,
            page_crossing,
            page_crossing_scattered,
            memory_and_device,
            read_modify_write,
            strings,
            sse,
            guest_page_fault_first,
            crossing_faults,
            completion_by_immediate_exit,
            slot_over_device,
            many,
        ],
    )
}
