// SPDX-License-Identifier: GPL-2.0

//! The decoder against encodings that are known.

mod common;

use common::hex;
use proptest::prelude::*;
use rkvm_x86::decode::decode;
use rkvm_x86::insn::DecodeError;
use rkvm_x86::insn::Insn;
use rkvm_x86::insn::Operand;
use rkvm_x86::insn::Rep;
use rkvm_x86::segment::CpuMode;

fn reg(operand: Operand) -> String {
    match operand {
        Operand::None => "-".into(),
        Operand::Reg(r) => format!("{r:?}").to_lowercase(),
        Operand::High(r) => format!("{r:?}.h").to_lowercase(),
        Operand::Imm(v) => format!("{:#x}", v),
        Operand::Xmm(n) => format!("xmm{n}"),
        Operand::Mmx(n) => format!("mm{n}"),
        Operand::Seg(s) => format!("{s:?}").to_lowercase(),
        Operand::Mem(m) => {
            let mut text = format!("[{:?}:", m.seg).to_lowercase();
            let mut parts = Vec::new();
            if m.rip_relative {
                parts.push("rip".into());
            }
            if let Some(b) = m.base {
                parts.push(format!("{b:?}").to_lowercase());
            }
            if let Some(i) = m.index {
                parts.push(format!("{i:?}*{}", 1 << m.scale).to_lowercase());
            }
            let d = m.disp as i64;
            if d != 0 || parts.is_empty() {
                parts.push(if d < 0 {
                    format!("-{:x}", d.unsigned_abs())
                } else {
                    format!("{d:x}")
                });
            }
            text += &parts.join("+");
            text + "]"
        }
    }
}

/// `op/operand size/address size dst, src`, with LOCK and REP before.
fn show(insn: &Insn) -> String {
    let lock = if insn.lock { "lock " } else { "" };
    let rep = match insn.rep {
        Rep::None => "",
        Rep::Repe => "repe ",
        Rep::Repne => "repne ",
    };
    format!(
        "{lock}{rep}{:?}/{}/{} {}, {}",
        insn.op,
        insn.size.bytes(),
        insn.address_size,
        reg(insn.dst),
        reg(insn.src)
    )
}

#[track_caller]
fn check(mode: CpuMode, table: &[(&str, &str)]) {
    for &(encoding, expected) in table {
        let bytes = hex(encoding);
        let insn = decode(&bytes, mode).unwrap_or_else(|e| panic!("{encoding}: {e:?}"));
        assert_eq!(show(&insn), expected, "{encoding} in {mode:?}");
        assert_eq!(usize::from(insn.len), bytes.len(), "{encoding}: length");
        // What follows does not matter, and no byte can be missing.
        let mut longer = bytes.clone();
        longer.extend([0xcc; 16]);
        assert_eq!(decode(&longer, mode), Ok(insn), "{encoding}");
        for len in 0..bytes.len() {
            assert_eq!(
                decode(&bytes[..len], mode),
                Err(DecodeError::Truncated),
                "{encoding}, {len} bytes"
            );
        }
    }
}

#[track_caller]
fn refuse(mode: CpuMode, error: DecodeError, encodings: &[&str]) {
    for encoding in encodings {
        assert_eq!(decode(&hex(encoding), mode), Err(error), "{encoding}");
    }
}

use CpuMode::Long64;
use CpuMode::Protected32;
use CpuMode::Real;

#[test]
fn mov_long() {
    check(
        Long64,
        &[
            ("8807", "Mov/1/8 [ds:rdi], rax"),
            ("8827", "Mov/1/8 [ds:rdi], rax.h"),
            ("408827", "Mov/1/8 [ds:rdi], rsp"),
            ("448827", "Mov/1/8 [ds:rdi], r12"),
            ("668907", "Mov/2/8 [ds:rdi], rax"),
            ("8907", "Mov/4/8 [ds:rdi], rax"),
            ("488907", "Mov/8/8 [ds:rdi], rax"),
            ("66488907", "Mov/8/8 [ds:rdi], rax"),
            // A REX prefix that is not last does not count.
            ("48668907", "Mov/2/8 [ds:rdi], rax"),
            ("8a07", "Mov/1/8 rax, [ds:rdi]"),
            ("8b07", "Mov/4/8 rax, [ds:rdi]"),
            ("4d8b3f", "Mov/8/8 r15, [ds:r15]"),
            ("678b07", "Mov/4/4 rax, [ds:rdi]"),
            ("c60712", "Mov/1/8 [ds:rdi], 0x12"),
            ("66c7071234", "Mov/2/8 [ds:rdi], 0x3412"),
            ("c70778563412", "Mov/4/8 [ds:rdi], 0x12345678"),
            ("48c70700000080", "Mov/8/8 [ds:rdi], 0xffffffff80000000"),
            ("a00000e0fe00000000", "Mov/1/8 rax, [ds:fee00000]"),
            ("a18877665544332211", "Mov/4/8 rax, [ds:1122334455667788]"),
            ("48a38877665544332211", "Mov/8/8 [ds:1122334455667788], rax"),
            ("67a244332211", "Mov/1/4 [ds:11223344], rax"),
            ("b0ff", "Mov/1/8 rax, 0xff"),
            ("b4ff", "Mov/1/8 rax.h, 0xff"),
            ("40b4ff", "Mov/1/8 rsp, 0xff"),
            ("41bfefbeadde", "Mov/4/8 r15, 0xdeadbeef"),
            ("48b8efcdab9078563412", "Mov/8/8 rax, 0x1234567890abcdef"),
            ("0fc307", "Mov/4/8 [ds:rdi], rax"),
            ("480fc307", "Mov/8/8 [ds:rdi], rax"),
            ("8c18", "Mov/2/8 [ds:rax], ds"),
            ("8ce0", "Mov/4/8 rax, fs"),
        ],
    );
}

#[test]
fn addressing_long() {
    check(
        Long64,
        &[
            ("8b00", "Mov/4/8 rax, [ds:rax]"),
            ("8b0424", "Mov/4/8 rax, [ss:rsp]"),
            ("8b4500", "Mov/4/8 rax, [ss:rbp]"),
            ("418b4500", "Mov/4/8 rax, [ds:r13]"),
            ("418b0424", "Mov/4/8 rax, [ds:r12]"),
            ("8b40f0", "Mov/4/8 rax, [ds:rax+-10]"),
            ("8b8000010000", "Mov/4/8 rax, [ds:rax+100]"),
            ("8b80000000ff", "Mov/4/8 rax, [ds:rax+-1000000]"),
            ("8b0500000010", "Mov/4/8 rax, [ds:rip+10000000]"),
            ("678b0500000010", "Mov/4/4 rax, [ds:rip+10000000]"),
            ("8b042500000010", "Mov/4/8 rax, [ds:10000000]"),
            ("8b0425000000f0", "Mov/4/8 rax, [ds:-10000000]"),
            ("8b04c8", "Mov/4/8 rax, [ds:rax+rcx*8]"),
            ("428b0460", "Mov/4/8 rax, [ds:rax+r12*2]"),
            ("438b44af10", "Mov/4/8 rax, [ds:r15+r13*4+10]"),
            ("8b04cd00000010", "Mov/4/8 rax, [ds:rcx*8+10000000]"),
            ("8b440d00", "Mov/4/8 rax, [ss:rbp+rcx*1]"),
            ("8b442c08", "Mov/4/8 rax, [ss:rsp+rbp*1+8]"),
            ("648b07", "Mov/4/8 rax, [fs:rdi]"),
            ("658b042500000000", "Mov/4/8 rax, [gs:0]"),
            // The other segments do nothing in 64-bit mode.
            ("2e8b07", "Mov/4/8 rax, [ds:rdi]"),
            ("643e8b07", "Mov/4/8 rax, [fs:rdi]"),
            ("64658b07", "Mov/4/8 rax, [gs:rdi]"),
            ("65a18877665544332211", "Mov/4/8 rax, [gs:1122334455667788]"),
        ],
    );
}

#[test]
fn addressing_32() {
    check(
        Protected32,
        &[
            ("8b00", "Mov/4/4 rax, [ds:rax]"),
            ("8b4500", "Mov/4/4 rax, [ss:rbp]"),
            ("8b0424", "Mov/4/4 rax, [ss:rsp]"),
            ("8b0500000010", "Mov/4/4 rax, [ds:10000000]"),
            ("8b0d000000f0", "Mov/4/4 rcx, [ds:-10000000]"),
            ("2e8b07", "Mov/4/4 rax, [cs:rdi]"),
            ("368b07", "Mov/4/4 rax, [ss:rdi]"),
            ("3e8b4500", "Mov/4/4 rax, [ds:rbp]"),
            ("268b07", "Mov/4/4 rax, [es:rdi]"),
            ("678b07", "Mov/4/2 rax, [ds:rbx]"),
            ("66678b07", "Mov/2/2 rax, [ds:rbx]"),
            ("a10000e0fe", "Mov/4/4 rax, [ds:fee00000]"),
            ("67a13412", "Mov/4/2 rax, [ds:1234]"),
            ("40", "Inc/4/4 rax, -"),
            ("4f", "Dec/4/4 rdi, -"),
            ("6640", "Inc/2/4 rax, -"),
            ("82c001", "Alu(Add)/1/4 rax, 0x1"),
        ],
    );
}

#[test]
fn addressing_16() {
    check(
        Real,
        &[
            ("8b00", "Mov/2/2 rax, [ds:rbx+rsi*1]"),
            ("8b01", "Mov/2/2 rax, [ds:rbx+rdi*1]"),
            ("8b02", "Mov/2/2 rax, [ss:rbp+rsi*1]"),
            ("8b03", "Mov/2/2 rax, [ss:rbp+rdi*1]"),
            ("8b04", "Mov/2/2 rax, [ds:rsi]"),
            ("8b05", "Mov/2/2 rax, [ds:rdi]"),
            ("8b063412", "Mov/2/2 rax, [ds:1234]"),
            ("8b4610", "Mov/2/2 rax, [ss:rbp+10]"),
            ("8b07", "Mov/2/2 rax, [ds:rbx]"),
            ("8b4ff0", "Mov/2/2 rcx, [ds:rbx+-10]"),
            ("8b8f0080", "Mov/2/2 rcx, [ds:rbx+-8000]"),
            ("668b07", "Mov/4/2 rax, [ds:rbx]"),
            ("678b07", "Mov/2/4 rax, [ds:rdi]"),
            ("67668b0424", "Mov/4/4 rax, [ss:rsp]"),
            ("a13412", "Mov/2/2 rax, [ds:1234]"),
            ("26a23412", "Mov/1/2 [es:1234], rax"),
            ("c7070100", "Mov/2/2 [ds:rbx], 0x1"),
            ("66c70701000000", "Mov/4/2 [ds:rbx], 0x1"),
        ],
    );
}

#[test]
fn extensions() {
    check(
        Long64,
        &[
            ("0fb607", "MovZx(Byte)/4/8 rax, [ds:rdi]"),
            ("660fb607", "MovZx(Byte)/2/8 rax, [ds:rdi]"),
            ("480fb607", "MovZx(Byte)/8/8 rax, [ds:rdi]"),
            ("0fb707", "MovZx(Word)/4/8 rax, [ds:rdi]"),
            ("480fb707", "MovZx(Word)/8/8 rax, [ds:rdi]"),
            ("0fbe07", "MovSx(Byte)/4/8 rax, [ds:rdi]"),
            ("480fbe07", "MovSx(Byte)/8/8 rax, [ds:rdi]"),
            ("0fbf07", "MovSx(Word)/4/8 rax, [ds:rdi]"),
            ("486307", "MovSx(Dword)/8/8 rax, [ds:rdi]"),
            ("6307", "MovSx(Dword)/4/8 rax, [ds:rdi]"),
            ("666307", "MovSx(Word)/2/8 rax, [ds:rdi]"),
            ("0fb6c4", "MovZx(Byte)/4/8 rax, rax.h"),
            ("400fb6c4", "MovZx(Byte)/4/8 rax, rsp"),
            ("0f38f007", "MovBe/4/8 rax, [ds:rdi]"),
            ("660f38f107", "MovBe/2/8 [ds:rdi], rax"),
            ("490f38f107", "MovBe/8/8 [ds:r15], rax"),
            ("0f4407", "Cmov(4)/4/8 rax, [ds:rdi]"),
            ("480f4f07", "Cmov(15)/8/8 rax, [ds:rdi]"),
            ("0f9407", "Set(4)/1/8 [ds:rdi], -"),
            ("0f95c4", "Set(5)/1/8 rax.h, -"),
            ("488d0437", "Lea/8/8 rax, [ds:rdi+rsi*1]"),
            ("0faf07", "Imul/4/8 rax, [ds:rdi]"),
        ],
    );
    // BSWAP-like registers cannot be: MOVBE is for memory.
    refuse(
        Long64,
        DecodeError::Invalid,
        &["0f38f0c0", "8dc0", "0fc3c0"],
    );
}

#[test]
fn arithmetic() {
    const NAMES: [&str; 8] = ["Add", "Or", "Adc", "Sbb", "And", "Sub", "Xor", "Cmp"];
    for (i, name) in (0u8..).zip(NAMES) {
        let base = i << 3;
        let forms = [
            (vec![base, 0x07], "1/8 [ds:rdi], rax"),
            (vec![base | 1, 0x07], "4/8 [ds:rdi], rax"),
            (vec![base | 2, 0x07], "1/8 rax, [ds:rdi]"),
            (vec![base | 3, 0x07], "4/8 rax, [ds:rdi]"),
            (vec![base | 4, 0x80], "1/8 rax, 0xffffffffffffff80"),
            (vec![base | 5, 1, 0, 0, 0], "4/8 rax, 0x1"),
            (vec![0x48, base | 1, 0x07], "8/8 [ds:rdi], rax"),
            (vec![0x80, base | 7, 0x12], "1/8 [ds:rdi], 0x12"),
            (vec![0x81, base | 7, 0, 1, 0, 0], "4/8 [ds:rdi], 0x100"),
            (vec![0x66, 0x81, base | 7, 0, 1], "2/8 [ds:rdi], 0x100"),
            (
                vec![0x83, base | 7, 0xff],
                "4/8 [ds:rdi], 0xffffffffffffffff",
            ),
        ];
        for (bytes, rest) in forms {
            let insn = decode(&bytes, Long64).unwrap();
            assert_eq!(show(&insn), format!("Alu({name})/{rest}"));
            assert_eq!(usize::from(insn.len), bytes.len());
        }
        // Those that write memory can be locked, and no other.
        let lock = |bytes: &[u8]| decode(&[&[0xf0], bytes].concat(), Long64);
        for bytes in [&[base | 1, 0x07][..], &[0x83, base | 7, 1]] {
            match (name, lock(bytes)) {
                ("Cmp", r) => assert_eq!(r, Err(DecodeError::Invalid)),
                (_, r) => assert!(r.unwrap().lock),
            }
        }
        for bytes in [&[base | 3, 0x07][..], &[base | 1, 0xc0], &[base | 4, 1]] {
            assert_eq!(lock(bytes), Err(DecodeError::Invalid));
        }
    }
}

#[test]
fn groups() {
    check(
        Long64,
        &[
            ("8407", "Test/1/8 [ds:rdi], rax"),
            ("4885c0", "Test/8/8 rax, rax"),
            ("f60701", "Test/1/8 [ds:rdi], 0x1"),
            ("f74f0401000000", "Test/4/8 [ds:rdi+4], 0x1"),
            ("a801", "Test/1/8 rax, 0x1"),
            ("a901000000", "Test/4/8 rax, 0x1"),
            ("f617", "Not/1/8 [ds:rdi], -"),
            ("48f71f", "Neg/8/8 [ds:rdi], -"),
            ("fe07", "Inc/1/8 [ds:rdi], -"),
            ("66ff0f", "Dec/2/8 [ds:rdi], -"),
            ("f0ff07", "lock Inc/4/8 [ds:rdi], -"),
            ("8707", "Xchg/4/8 [ds:rdi], rax"),
            ("f04887 07", "lock Xchg/8/8 [ds:rdi], rax"),
            ("8627", "Xchg/1/8 [ds:rdi], rax.h"),
            ("f00fb10f", "lock CmpXchg/4/8 [ds:rdi], rcx"),
            ("0fb00f", "CmpXchg/1/8 [ds:rdi], rcx"),
            ("f00fc70f", "lock CmpXchg8b/8/8 [ds:rdi], -"),
            ("f0480fc10f", "lock Xadd/8/8 [ds:rdi], rcx"),
            ("0fa30f", "Bit(Test)/4/8 [ds:rdi], rcx"),
            ("f0480fab0f", "lock Bit(Set)/8/8 [ds:rdi], rcx"),
            ("0fb30f", "Bit(Reset)/4/8 [ds:rdi], rcx"),
            ("660fbb0f", "Bit(Complement)/2/8 [ds:rdi], rcx"),
            ("0fba2705", "Bit(Test)/4/8 [ds:rdi], 0x5"),
            ("f00fba6f0405", "lock Bit(Set)/4/8 [ds:rdi+4], 0x5"),
            ("0fba3705", "Bit(Reset)/4/8 [ds:rdi], 0x5"),
            ("480fba3f3f", "Bit(Complement)/8/8 [ds:rdi], 0x3f"),
            ("c02703", "Shift(Shl)/1/8 [ds:rdi], 0x3"),
            ("d12f", "Shift(Shr)/4/8 [ds:rdi], 0x1"),
            ("48d33f", "Shift(Sar)/8/8 [ds:rdi], rcx"),
            ("d207", "Shift(Rol)/1/8 [ds:rdi], rcx"),
            ("66c10f08", "Shift(Ror)/2/8 [ds:rdi], 0x8"),
            ("0fae3f", "Flush/1/8 -, [ds:rdi]"),
            ("660fae3f", "Flush/1/8 -, [ds:rdi]"),
            ("660fae37", "Flush/1/8 -, [ds:rdi]"),
        ],
    );
    refuse(
        Long64,
        DecodeError::Invalid,
        &[
            "f0f60701",
            "f08407",
            "f00fa30f",
            "f00fba2705",
            "f08b07",
            "fe3f",
            "ff38",
            "0f0b",
            "f0a5",
        ],
    );
}

#[test]
fn stack() {
    check(
        Long64,
        &[
            ("50", "Push/8/8 -, rax"),
            ("4157", "Push/8/8 -, r15"),
            ("6650", "Push/2/8 -, rax"),
            ("5f", "Pop/8/8 rdi, -"),
            ("6aff", "Push/8/8 -, 0xffffffffffffffff"),
            ("6800000080", "Push/8/8 -, 0xffffffff80000000"),
            ("ff37", "Push/8/8 -, [ds:rdi]"),
            ("66ff37", "Push/2/8 -, [ds:rdi]"),
            ("8f07", "Pop/8/8 [ds:rdi], -"),
        ],
    );
    check(
        Protected32,
        &[
            ("50", "Push/4/4 -, rax"),
            ("ff37", "Push/4/4 -, [ds:rdi]"),
            ("66ff37", "Push/2/4 -, [ds:rdi]"),
        ],
    );
    check(
        Real,
        &[
            ("50", "Push/2/2 -, rax"),
            ("66ff37", "Push/4/2 -, [ds:rbx]"),
        ],
    );
}

#[test]
fn strings() {
    check(
        Long64,
        &[
            ("a4", "String(Movs)/1/8 -, -"),
            ("f3a5", "repe String(Movs)/4/8 -, -"),
            ("f348a5", "repe String(Movs)/8/8 -, -"),
            ("66f3a5", "repe String(Movs)/2/8 -, -"),
            ("f367a4", "repe String(Movs)/1/4 -, -"),
            ("f3aa", "repe String(Stos)/1/8 -, -"),
            ("f348ab", "repe String(Stos)/8/8 -, -"),
            ("ac", "String(Lods)/1/8 -, -"),
            ("f3a6", "repe String(Cmps)/1/8 -, -"),
            ("f2ae", "repne String(Scas)/1/8 -, -"),
            ("f3f2ae", "repne String(Scas)/1/8 -, -"),
            ("f2f3ae", "repe String(Scas)/1/8 -, -"),
        ],
    );
    let insn = decode(&hex("65a4"), Long64).unwrap();
    assert_eq!(format!("{:?}", insn.string_seg), "Gs");
    let insn = decode(&hex("26a4"), Real).unwrap();
    assert_eq!(format!("{:?}", insn.string_seg), "Es");
}

#[test]
fn branches_and_frames() {
    check(
        Long64,
        &[
            ("e800010000", "Call/8/8 -, 0x100"),
            ("66e8000100ff", "Call/8/8 -, 0xffffffffff000100"),
            ("ff17", "Call/8/8 -, [ds:rdi]"),
            ("ebfe", "Jump/8/8 -, 0xfffffffffffffffe"),
            ("0f84fcffffff", "Branch(4)/8/8 -, 0xfffffffffffffffc"),
            ("67e210", "Loop(Loop)/8/4 -, 0x10"),
            ("c3", "Return/8/8 -, -"),
            ("c21000", "Return/8/8 -, 0x10"),
            ("c8100003", "Enter/8/8 -, 0x10"),
            ("66c9", "Leave/2/8 -, -"),
            ("9c", "PushFlags/8/8 -, -"),
        ],
    );
    check(
        Real,
        &[
            ("e80001", "Call/2/2 -, 0x100"),
            ("66e900010000", "Jump/4/2 -, 0x100"),
            ("60", "PushAll/2/2 -, -"),
            ("669d", "PopFlags/4/2 -, -"),
            ("1e", "Push/2/2 -, ds"),
            ("62 07", "Bound/2/2 rax, [ds:rbx]"),
        ],
    );
    refuse(
        Long64,
        DecodeError::Invalid,
        &["60", "61", "1e", "d40a", "d6"],
    );
    refuse(Real, DecodeError::Invalid, &["6307"]);
}

#[test]
fn vectors() {
    check(
        Long64,
        &[
            (
                "0f1007",
                "Vector(Move { aligned: false }, Sse)/4/8 xmm0, [ds:rdi]",
            ),
            (
                "440f2907",
                "Vector(Move { aligned: true }, Sse)/4/8 [ds:rdi], xmm8",
            ),
            ("f30f1007", "repe Vector(Low, Sse)/4/8 xmm0, [ds:rdi]"),
            ("f20f10c1", "repne Vector(Merge, Sse)/8/8 xmm0, xmm1"),
            (
                "0f1607",
                "Vector(Half { high: true }, Sse)/8/8 xmm0, [ds:rdi]",
            ),
            (
                "0f6f0f",
                "Vector(Move { aligned: false }, Mmx)/8/8 mm1, [ds:rdi]",
            ),
            ("66480f6ec8", "Vector(Low, Sse)/8/8 xmm1, rax"),
            (
                "c5fc1007",
                "Vector(Move { aligned: false }, Avx256)/4/8 xmm0, [ds:rdi]",
            ),
            (
                "c4417c1007",
                "Vector(Move { aligned: false }, Avx256)/4/8 xmm8, [ds:r15]",
            ),
            (
                "c5e81607",
                "Vector(Half { high: true }, Avx128)/8/8 xmm0, [ds:rdi]",
            ),
            ("c4e2e8f207", "Bmi(Andn)/8/8 rax, rdx"),
            ("0fae17", "LoadMxcsr(Sse)/4/8 -, [ds:rdi]"),
            ("d92f", "X87(LoadControl)/2/8 -, [ds:rdi]"),
            ("9b", "X87(Wait)/1/8 -, -"),
            ("66f20f38f107", "repne Crc32(Word)/4/8 rax, [ds:rdi]"),
            ("0faef0", "Nop/1/8 -, rax"),
            ("0f1f440000", "Nop/1/8 -, [ds:rax+rax*1]"),
        ],
    );
    refuse(
        Long64,
        DecodeError::Invalid,
        &[
            // Prefixes before VEX; a third register for none; MOVLPS with 256 bits; MOVNTPS of registers.
            "66c5fc1007",
            "40c5fc1007",
            "f0c5fc1007",
            "c5ec1007",
            "c5fc1307",
            "0f2bc0",
        ],
    );
    // LES and LDS.
    refuse(
        Protected32,
        DecodeError::Unsupported,
        &["0f5807", "c5fc58c0"],
    );
}

#[test]
fn refusals() {
    // Fifteen bytes are an instruction, sixteen are none.
    let prefixed = |n: usize| [vec![0x66; n], vec![0x8b, 0x07]].concat();
    assert_eq!(decode(&prefixed(13), Long64).unwrap().len, 15);
    assert_eq!(decode(&prefixed(14), Long64), Err(DecodeError::TooLong));
    assert_eq!(decode(&[0x66; 15], Long64), Err(DecodeError::TooLong));
    assert_eq!(decode(&[0x66; 14], Long64), Err(DecodeError::Truncated));
    assert_eq!(decode(&[], Long64), Err(DecodeError::Truncated));

    refuse(
        Long64,
        DecodeError::Unsupported,
        &[
            "62f17c4810 07",
            "0f5807",
            "c5fc5807",
            "0fae07",
            "0fc7f0",
            "8f20",
            "d907",
        ],
    );
    refuse(Long64, DecodeError::Invalid, &["06", "27", "37", "82c001"]);
    refuse(Protected32, DecodeError::Unsupported, &["d907"]);
    // MOV to CS, far branches to a register, and what 64-bit code has lost.
    refuse(Protected32, DecodeError::Invalid, &["8ec8", "ffd8", "ffe8"]);
    refuse(Long64, DecodeError::Invalid, &["07", "9a", "ea", "ce"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Any bytes in any mode: an instruction inside what was given, or an error, and the same with more bytes behind.
    #[test]
    fn any_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..20),
        mode in prop::sample::select(vec![
            CpuMode::Real, CpuMode::Real32, CpuMode::Vm86, CpuMode::Protected16, CpuMode::Protected32,
            CpuMode::Compat16, CpuMode::Compat32, CpuMode::Long64,
        ]),
    ) {
        match decode(&bytes, mode) {
            Ok(insn) => {
                let len = usize::from(insn.len);
                prop_assert!((1..=15).contains(&len) && len <= bytes.len());
                prop_assert_eq!(decode(&bytes[..len], mode), Ok(insn));
                prop_assert_eq!(decode(&bytes[..len - 1], mode), Err(DecodeError::Truncated));
            }
            Err(DecodeError::Truncated) => prop_assert!(bytes.len() < 15),
            Err(DecodeError::TooLong) => prop_assert!(bytes.len() >= 15),
            Err(_) => {}
        }
    }
}
