// SPDX-License-Identifier: GPL-2.0

//! Port input and output: all widths, strings, both directions.

use selftests::check::expect_errno;
use selftests::guest::{at, PORT};
use selftests::machine::{Exit, Machine, Mode, MODES};
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const D: usize = at::DATA as usize;

fn out_widths(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "mov eax, 0x44332211",
        "out {P}, al",
        "out {P}, ax",
        "out {P}, eax",
        "mov dx, 0xfffe",
        "out dx, al",
        "out dx, ax",
        "mov dx, 0xcf8",
        "out dx, eax",
        "hlt";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    for (port, size) in [
        (PORT, 1u8),
        (PORT, 2),
        (PORT, 4),
        (0xfffe, 1),
        (0xfffe, 2),
        (0xcf8, 4),
    ] {
        let data = vec![0x11, 0x22, 0x33, 0x44][..size.into()].to_vec();
        m.expect(&Exit::Out { port, size, data })?;
    }
    m.expect_hlt()
}

fn in_widths(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov rax, 0x7777777777777777",
        "in al, {P}",
        "mov rbx, rax",
        "in ax, {P}",
        "mov rcx, rax",
        "mov dx, 0x1f7",
        "in eax, dx",
        "mov rsi, rax",
        "hlt";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.expect(&Exit::In {
        port: PORT,
        size: 1,
        count: 1,
    })?;
    m.io_reply(&[0x81]);
    m.expect(&Exit::In {
        port: PORT,
        size: 2,
        count: 1,
    })?;
    m.io_reply(&[0x92, 0x93]);
    m.expect(&Exit::In {
        port: 0x1f7,
        size: 4,
        count: 1,
    })?;
    m.io_reply(&[0xa4, 0xa5, 0xa6, 0xa7]);
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        r.rbx,
        0x7777_7777_7777_7781,
        "IN of a byte changes AL alone"
    );
    ensure_eq!(
        r.rcx,
        0x7777_7777_7777_9392,
        "IN of a word changes AX alone"
    );
    ensure_eq!(
        r.rsi,
        0xa7a6_a5a4,
        "IN of a double word clears the upper half"
    );
    Ok(())
}

fn every_mode(env: &Env) -> Outcome {
    guest_code!(code16, ".code16", "mov al, 0x5a", "out {P}, al", "in al, {P}", "out {P}, al",
        "hlt"; P = PORT);
    for mode in MODES {
        // These instructions are encoded alike in all modes.
        let m = Machine::new(env, mode, code16())?;
        m.expect(&Exit::Out {
            port: PORT,
            size: 1,
            data: vec![0x5a],
        })?;
        m.expect(&Exit::In {
            port: PORT,
            size: 1,
            count: 1,
        })?;
        m.io_reply(&[0xa5]);
        m.expect(&Exit::Out {
            port: PORT,
            size: 1,
            data: vec![0xa5],
        })?;
        m.expect_hlt()?;
    }
    Ok(())
}

/// All ports are the guest's: none is handled behind its VMM's back.
fn all_ports(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "xor edx, edx",
        "2: out dx, al",
        "add edx, 0x101",
        "cmp edx, 0x10000",
        "jb 2b",
        "hlt",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let mut port = 0u32;
    while port < 0x10000 {
        m.expect(&Exit::Out {
            port: port as u16,
            size: 1,
            data: vec![0],
        })?;
        port += 0x101;
    }
    m.expect_hlt()
}

/// Runs to HLT and gathers what is output to PORT, however many exits that takes.
fn gather(m: &Machine, width: u8) -> Result<Vec<u8>, Verdict> {
    let mut all = Vec::new();
    loop {
        match m.run()? {
            Exit::Out {
                port: PORT,
                size,
                data,
            } if size == width => all.extend(data),
            Exit::Hlt => return Ok(all),
            other => fail!("exit {other:x?}\n{}", m.describe()),
        }
        if all.len() > 1 << 20 {
            fail!("a megabyte was output");
        }
    }
}

/// Runs to HLT and feeds `source` to inputs from PORT; how much of it was taken.
fn feed(m: &Machine, width: u8, source: &[u8]) -> Result<usize, Verdict> {
    let mut taken = 0;
    loop {
        match m.run()? {
            Exit::In {
                port: PORT,
                size,
                count,
            } if size == width => {
                let n = usize::from(size) * count as usize;
                ensure!(
                    taken + n <= source.len(),
                    "{taken} + {n} of {} bytes",
                    source.len()
                );
                m.io_reply(&source[taken..taken + n]);
                taken += n;
            }
            Exit::Hlt => return Ok(taken),
            other => fail!("exit {other:x?}\n{}", m.describe()),
        }
    }
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

guest_code!(rep_outsb, ".code32", "mov dx, {P}", "rep outsb", "hlt"; P = PORT);
guest_code!(rep_outsw, ".code32", "mov dx, {P}", "rep outsw", "hlt"; P = PORT);
guest_code!(rep_outsd, ".code32", "mov dx, {P}", "rep outsd", "hlt"; P = PORT);
guest_code!(rep_insb, ".code32", "mov dx, {P}", "rep insb", "hlt"; P = PORT);
guest_code!(rep_insw, ".code32", "mov dx, {P}", "rep insw", "hlt"; P = PORT);
guest_code!(rep_insd, ".code32", "mov dx, {P}", "rep insd", "hlt"; P = PORT);

const WIDTHS: [u8; 3] = [1, 2, 4];

fn out_strings(env: &Env) -> Outcome {
    for (width, code) in WIDTHS.iter().zip([rep_outsb(), rep_outsw(), rep_outsd()]) {
        // Short, across a page, and more than the page of a vCPU's mapping holds.
        for (start, n) in [(D, 5usize), (0x2fff0, 100), (0x30001, 1500), (0x31000, 0)] {
            let m = Machine::new(env, Mode::Protected, code)?;
            let data = pattern(n * usize::from(*width));
            m.mem.write_bytes(start, &data);
            m.patch_regs(|r| {
                r.rsi = start as u64;
                r.rcx = n as u64;
            })?;
            let got = gather(&m, *width)?;
            ensure_eq!(got.len(), data.len(), "bytes output, {n} of width {width}");
            ensure!(
                got == data,
                "bytes output differ, {n} of width {width} at {start:#x}"
            );
            let r = m.vcpu.regs()?;
            ensure_eq!(
                (r.rcx, r.rsi),
                (0, (start + data.len()) as u64),
                "RCX and RSI"
            );
        }
    }
    Ok(())
}

fn in_strings(env: &Env) -> Outcome {
    for (width, code) in WIDTHS.iter().zip([rep_insb(), rep_insw(), rep_insd()]) {
        for (start, n) in [(D, 5usize), (0x2fff0, 100), (0x30001, 1500), (0x31000, 0)] {
            let m = Machine::new(env, Mode::Protected, code)?;
            let data = pattern(n * usize::from(*width));
            m.mem.fill(start - 8, data.len() + 16, 0xcc);
            m.patch_regs(|r| {
                r.rdi = start as u64;
                r.rcx = n as u64;
            })?;
            let taken = feed(&m, *width, &data)?;
            ensure_eq!(taken, data.len(), "bytes asked for, {n} of width {width}");
            let got = m.mem.read_bytes(start, data.len());
            ensure!(
                got == data,
                "bytes in memory differ, {n} of width {width} at {start:#x}"
            );
            let around = (
                m.mem.read::<u8>(start - 1),
                m.mem.read::<u8>(start + data.len()),
            );
            ensure_eq!(around, (0xcc, 0xcc), "bytes before and after");
            let r = m.vcpu.regs()?;
            ensure_eq!(
                (r.rcx, r.rdi),
                (0, (start + data.len()) as u64),
                "RCX and RDI"
            );
        }
    }
    Ok(())
}

/// A VMM that lowers RCX while the data is on its way gets no more than that written.
fn count_lowered_meanwhile(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, rep_insb())?;
    m.mem.fill(D, 16, 0xcc);
    m.patch_regs(|r| {
        r.rdi = D as u64;
        r.rcx = 3;
    })?;
    m.expect(&Exit::In {
        port: PORT,
        size: 1,
        count: 3,
    })?;
    m.io_reply(&[1, 2, 3]);
    m.patch_regs(|r| r.rcx = 2)?;
    m.expect_hlt()?;
    ensure_eq!(m.mem.read_bytes(D, 4), [1, 2, 0xcc, 0xcc], "memory");
    let r = m.vcpu.regs()?;
    ensure_eq!((r.rcx, r.rdi), (0, D as u64 + 2), "RCX and RDI");
    Ok(())
}

/// With the direction flag set, strings go down.
fn strings_down(env: &Env) -> Outcome {
    guest_code!(out_code, ".code32", "std", "mov dx, {P}", "rep outsw", "hlt"; P = PORT);
    guest_code!(in_code, ".code32", "std", "mov dx, {P}", "rep insw", "hlt"; P = PORT);
    let n = 12;
    let top = 0x30008;
    let m = Machine::new(env, Mode::Protected, out_code())?;
    for i in 0..n {
        m.mem.write(top - 2 * i, 0x4100u16 + i as u16);
    }
    m.patch_regs(|r| {
        r.rsi = top as u64;
        r.rcx = n as u64;
    })?;
    let got = gather(&m, 2)?;
    let want: Vec<u8> = (0..n)
        .flat_map(|i| (0x4100u16 + i as u16).to_le_bytes())
        .collect();
    ensure_eq!(got, want, "words output downwards");
    ensure_eq!(m.vcpu.regs()?.rsi, (top - 2 * n) as u64, "RSI");
    let m = Machine::new(env, Mode::Protected, in_code())?;
    m.patch_regs(|r| {
        r.rdi = top as u64;
        r.rcx = n as u64;
    })?;
    feed(&m, 2, &want)?;
    for i in 0..n {
        ensure_eq!(
            m.mem.read::<u16>(top - 2 * i),
            0x4100 + i as u16,
            "word {i} input downwards"
        );
    }
    ensure_eq!(m.vcpu.regs()?.rdi, (top - 2 * n) as u64, "RDI");
    Ok(())
}

/// Without REP, a string instruction does one element and leaves RCX alone.
fn strings_single(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov dx, {P}",
        "mov rcx, 99",
        "mov rsi, {D}",
        "lea rdi, [rsi + 16]",
        "outsd",
        "insd",
        "hlt";
        P = PORT, D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write(D, 0x1357_9bdfu32);
    m.expect(&Exit::Out {
        port: PORT,
        size: 4,
        data: vec![0xdf, 0x9b, 0x57, 0x13],
    })?;
    m.expect(&Exit::In {
        port: PORT,
        size: 4,
        count: 1,
    })?;
    m.io_reply(&[1, 2, 3, 4]);
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        (r.rcx, r.rsi, r.rdi),
        (99, at::DATA + 4, at::DATA + 20),
        "RCX, RSI, RDI"
    );
    ensure_eq!(m.mem.read::<u32>(D + 16), 0x0403_0201, "what was input");
    Ok(())
}

/// OUTS obeys a segment override and real mode's addresses; its index is 16 bits there.
fn strings_real_mode(env: &Env) -> Outcome {
    guest_code!(code, ".code16",
        "mov ax, 0x3000",
        "mov fs, ax",
        "mov si, 0x10",
        "mov cx, 3",
        "mov dx, {P}",
        ".byte 0x64, 0xf3, 0x6e", // rep outsb fs:[si]
        "mov ax, 0x2000",
        "mov es, ax",
        "mov di, 0xfffe",
        "mov cx, 4",
        "rep insb",
        "hlt";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Real, code())?;
    m.mem.write_bytes(0x30010, b"xyz");
    let mut out = Vec::new();
    let mut source = b"1234".iter();
    loop {
        match m.run()? {
            Exit::Out { data, .. } => out.extend(data),
            Exit::In { size: 1, count, .. } => {
                let data: Vec<u8> = source.by_ref().take(count as usize).copied().collect();
                ensure_eq!(data.len(), count as usize, "bytes left to input");
                m.io_reply(&data);
            }
            Exit::Hlt => break,
            other => fail!("exit {other:x?}\n{}", m.describe()),
        }
    }
    ensure_eq!(out, b"xyz", "bytes output through FS");
    let got = (m.mem.read_bytes(0x2fffe, 2), m.mem.read_bytes(0x20000, 2));
    ensure_eq!(
        got,
        (b"12".to_vec(), b"34".to_vec()),
        "input that wraps at the segment's end"
    );
    ensure_eq!(m.vcpu.regs()?.rdi & 0xffff, 2, "DI");
    Ok(())
}

/// A page in the middle of the string that the guest has not mapped: what was done before stays
/// done, RCX and RSI say so, and it goes on when the page is there.
fn string_page_fault(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "mov dx, {P}", "rep outsb", "hlt"; P = PORT);
    let m = Machine::new(env, Mode::Long, code())?;
    // The two pages at 0x400000 by small pages, the second absent.
    m.mem.write(at::PD as usize + 2 * 8, 0x30003u64);
    m.mem.write(0x30000, 0x31003u64);
    m.mem.write(0x30008, 0u64);
    let data = pattern(32);
    m.mem.write_bytes(0x32000 - 16, &data[..16]);
    m.mem.write_bytes(0x40000, &data[16..]);
    m.patch_regs(|r| {
        r.rsi = 0x40_0ff0;
        r.rcx = 32;
    })?;
    let mut got = Vec::new();
    loop {
        match m.run()? {
            Exit::Out {
                port: PORT, data, ..
            } => got.extend(data),
            Exit::Out {
                port: selftests::guest::PORT_EXCEPTION,
                ..
            } => {
                let r = m.record();
                ensure_eq!((r.vector, r.cr2), (14, 0x40_1000), "vector and CR2");
                ensure_eq!(got.len(), 16, "bytes before the fault");
                let regs = m.vcpu.regs()?;
                ensure_eq!(
                    (regs.rcx, regs.rsi),
                    (16, 0x40_1000),
                    "RCX and RSI at the fault"
                );
                m.mem.write(0x30008, 0x40003u64);
            }
            Exit::Hlt => break,
            other => fail!("exit {other:x?}\n{}", m.describe()),
        }
    }
    ensure_eq!(got, data, "bytes output");
    Ok(())
}

/// KVM_RUN with `immediate_exit` finishes the pending input and runs nothing else.
fn completion_by_immediate_exit(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "in al, {P}", "mov ebx, 1", "hlt"; P = PORT);
    let m = Machine::new(env, Mode::Protected, code())?;
    m.expect(&Exit::In {
        port: PORT,
        size: 1,
        count: 1,
    })?;
    m.io_reply(&[0x3c]);
    m.vcpu.set_immediate_exit(1);
    expect_errno(m.vcpu.run(), libc::EINTR, "KVM_RUN with immediate_exit")?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        (r.rax & 0xff, r.rbx, r.rip),
        (0x3c, 0, at::CODE + 2),
        "AL, EBX, RIP"
    );
    m.vcpu.set_immediate_exit(0);
    m.expect_hlt()
}

fn main() -> ExitCode {
    selftests::tap::main(
        "pio",
        tests![
            out_widths,
            in_widths,
            every_mode,
            all_ports,
            out_strings,
            in_strings,
            count_lowered_meanwhile,
            strings_down,
            strings_single,
            strings_real_mode,
            string_page_fault,
            completion_by_immediate_exit,
        ],
    )
}
