// SPDX-License-Identifier: GPL-2.0

//! What the emulator leaves to its caller: asked for in each mode where the program may, refused with the right fault where not.

mod common;

use common::exec;
use common::hex;
use common::rd;
use common::system::*;
use common::Lost;
use common::TestCpu;
use common::TestMemory;
use common::CODE;
use common::DEVICE;
use rkvm_x86::decode::decode;
use rkvm_x86::emulate::Cpu;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::emulate::Service;
use rkvm_x86::event::Shadow;
use rkvm_x86::exception::Fault;
use rkvm_x86::exception::Vector;
use rkvm_x86::insn::DecodeError;
use rkvm_x86::insn::Size;
use rkvm_x86::io::StringIo;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;

/// A machine in virtual-8086 mode, at level 3 with IOPL 0 and no port permitted.
fn vm86() -> Machine {
    let mut m = Machine::new(3).with_flags(Rflags::VM);
    for reg in [
        SegReg::Cs,
        SegReg::Ss,
        SegReg::Ds,
        SegReg::Es,
        SegReg::Fs,
        SegReg::Gs,
    ] {
        let real = Segment::real_mode(0);
        *m.cpu.seg(reg) = Segment {
            attr: real.attr.with_dpl(3),
            ..real
        };
    }
    m
}

fn real() -> Machine {
    Machine {
        cpu: TestCpu::real(),
        memory: TestMemory::default(),
    }
}

fn asked(service: Service, code: &str) -> Outcome<Lost> {
    Outcome::Service {
        service,
        len: hex(code).len() as u8,
    }
}

/// The instruction in a state: this service is asked for, and nothing has changed.
fn asks(m: &Machine, code: &str, service: Service) {
    let mut now = m.clone();
    assert_eq!(now.run(code), asked(service, code), "{code}");
    let mut before = m.clone();
    before.cpu.rip = CODE;
    before.memory.put(CODE, &hex(code));
    assert_eq!(now.cpu, before.cpu, "{code}");
    assert!(now.memory.ram == before.memory.ram, "{code}");
}

const PRIVILEGED: &[(&str, Service)] = &[
    (
        "0f20c3",
        Service::ReadControl {
            number: 0,
            to: Gpr::Rbx,
        },
    ),
    (
        "0f22e1",
        Service::WriteControl {
            number: 4,
            from: Gpr::Rcx,
        },
    ),
    (
        "0f22d8",
        Service::WriteControl {
            number: 3,
            from: Gpr::Rax,
        },
    ),
    // The mode bits of the ModRM byte mean nothing.
    (
        "0f2003",
        Service::ReadControl {
            number: 0,
            to: Gpr::Rbx,
        },
    ),
    (
        "0f21fa",
        Service::ReadDebug {
            number: 7,
            to: Gpr::Rdx,
        },
    ),
    (
        "0f23c6",
        Service::WriteDebug {
            number: 0,
            from: Gpr::Rsi,
        },
    ),
    ("0f06", Service::ClearTaskSwitched),
    ("0f01f0", Service::LoadMsw(0)),
    ("f4", Service::Halt),
    ("0f08", Service::InvalidateCaches),
    ("0f09", Service::WriteBackCaches),
    ("0f32", Service::ReadMsr),
    ("0f30", Service::WriteMsr),
];

#[test]
fn privileged_ones_need_level_0() {
    for &(code, service) in PRIVILEGED {
        // Those without an operand size are the same everywhere.
        for m in [real(), Machine::new(0), Machine::long(0)] {
            asks(&m, code, service);
        }
        for m in [vm86(), Machine::new(3), Machine::long(3)] {
            m.faults(code, Fault::gp(0));
        }
    }
}

#[test]
fn what_anybody_may() {
    for m in [real(), vm86(), Machine::new(3), Machine::long(3)] {
        asks(&m, "0fa2", Service::Identify);
        asks(&m, "0f31", Service::ReadTsc);
        asks(&m, "0f01f9", Service::ReadTscAux);
        asks(&m, "0f01c1", Service::Hypercall);
        let mut restricted = m.clone();
        restricted.cpu.cr4 |= Cr4::TSD;
        if restricted.cpu.mode().is_real() {
            asks(&restricted, "0f31", Service::ReadTsc);
        } else {
            restricted.faults("0f31", Fault::gp(0));
            restricted.faults("0f01f9", Fault::gp(0));
        }
    }
}

#[test]
fn registers_that_are_not_there() {
    for m in [real(), Machine::new(0), Machine::new(3), Machine::long(0)] {
        for code in ["0f20c8", "0f22e8", "0f22f8"] {
            m.faults(code, Fault::UD);
        }
        let mut m = m;
        m.cpu.cr4 |= Cr4::DE;
        m.faults("0f21e0", Fault::UD);
        m.faults("0f23e8", Fault::UD);
    }
    // CR8 is 64-bit code's.
    asks(
        &Machine::long(0),
        "440f22c1",
        Service::WriteControl {
            number: 8,
            from: Gpr::Rcx,
        },
    );
}

#[test]
fn invlpg_forms_an_address_and_no_more() {
    // Beyond the limit of the segment, and where nothing is.
    let mut m = real().with(Gpr::Rbx, 0xfff0);
    *m.cpu.seg(SegReg::Ds) = Segment::real_mode(0x2000);
    asks(&m, "0f013f", Service::InvalidatePage(0x2_fff0));
    let m = Machine::new(0).with(Gpr::Rbx, 0xffff_f123);
    asks(&m, "0f013b", Service::InvalidatePage(0xffff_f123));
    vm86().faults("0f013f", Fault::gp(0));
}

/// INVPCID with the descriptor at RBX, in 16-, 32- and 64-bit code.
const INVPCID16: &str = "660f388207";
const INVPCID: &str = "660f388203";

#[test]
fn invpcid_reads_its_descriptor() {
    let service = Service::InvalidatePcid {
        kind: 0x8000_0002,
        descriptor: [0x1234_5678_9abc_d00f, 0xffff_8000_0123_4567],
    };
    for (m, code) in [
        (real(), INVPCID16),
        (Machine::new(0), INVPCID),
        (Machine::long(0), INVPCID),
    ] {
        let mut m = m.with(Gpr::Rbx, 0x7ff9).with(Gpr::Rax, 0x8000_0002);
        m.memory.put64(0x7ff9, 0x1234_5678_9abc_d00f);
        m.memory.put64(0x8001, 0xffff_8000_0123_4567);
        asks(&m, code, service);
        // From a register, or with LOCK or another prefix, it is none.
        for none in ["660f3882c3", "f0660f388203", "0f388203"] {
            let bytes = [hex(none), vec![0; 8]].concat();
            let refused = decode(&bytes, m.cpu.mode());
            assert_eq!(refused, Err(DecodeError::Invalid), "{none}");
        }
    }
    // All 64 bits of the type count in 64-bit code, 32 elsewhere.
    let long = Machine::long(0)
        .with(Gpr::Rbx, 0x7000)
        .with(Gpr::Rax, 1 << 32);
    let none = [0; 2];
    asks(
        &long,
        INVPCID,
        Service::InvalidatePcid {
            kind: 1 << 32,
            descriptor: none,
        },
    );
    let short = Machine::new(0)
        .with(Gpr::Rbx, 0x7000)
        .with(Gpr::Rax, 1 << 32);
    asks(
        &short,
        INVPCID,
        Service::InvalidatePcid {
            kind: 0,
            descriptor: none,
        },
    );
}

#[test]
fn invpcid_faults() {
    for m in [Machine::new(3), Machine::long(3)] {
        m.with(Gpr::Rbx, u64::MAX).faults(INVPCID, Fault::gp(0));
    }
    vm86().faults(INVPCID16, Fault::gp(0));
    // The descriptor passes the limit, or has no address.
    let mut m = Machine::new(0).with(Gpr::Rbx, 0x7000);
    m.cpu.seg(SegReg::Ds).limit = 0x700e;
    m.faults(INVPCID, Fault::gp(0));
    real()
        .with(Gpr::Rbx, 0xfff1)
        .faults(INVPCID16, Fault::gp(0));
    Machine::long(0)
        .with(Gpr::Rbx, 1 << 60)
        .faults(INVPCID, Fault::gp(0));
    // Through the stack, it is #SS.
    let mut m = real();
    m.cpu.seg(SegReg::Ss).limit = 0xf;
    m.with(Gpr::Rbp, 1).faults("660f388202", Fault::ss(0));
}

#[test]
fn invpcid_page_fault() {
    let mut m = Machine::new(0).with(Gpr::Rbx, 0x40_0000);
    m.cpu.cr0 |= Cr0::PG;
    m.cpu.cr4 |= Cr4::PSE;
    m.cpu.cr3 = rkvm_x86::regs::Cr3::new(0xa000);
    m.memory.put32(0xa000, 0x83);
    let outcome = m.run(INVPCID);
    let Outcome::Fault(fault) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!((fault.vector, fault.error), (Vector::PF, Some(0)));
    assert_eq!(fault.cr2, Some(0x40_0000));
}

#[test]
fn invpcid_on_a_device() {
    let mut m = Machine::new(0).with(Gpr::Rbx, DEVICE);
    let (outcome, bus) = exec(&mut m.cpu, &mut m.memory, INVPCID, &[7, 0x1000]);
    assert_eq!(bus, [rd(DEVICE, 8), rd(DEVICE + 8, 8)]);
    let service = Service::InvalidatePcid {
        kind: 0,
        descriptor: [7, 0x1000],
    };
    assert_eq!(outcome, asked(service, INVPCID));
}

#[test]
fn extended_control_registers() {
    let mut m = Machine::new(3).with(Gpr::Rcx, 0);
    m.faults("0f01d0", Fault::UD);
    m.cpu.cr4 |= Cr4::OSXSAVE;
    m.done("0f01d0");
    assert_eq!((m.cpu.get(Gpr::Rax), m.cpu.get(Gpr::Rdx)), (7, 0));
    asks(&m.with(Gpr::Rcx, 1), "0f01d0", Service::ReadXcr);
    let mut m = Machine::new(0);
    m.faults("0f01d1", Fault::UD);
    m.cpu.cr4 |= Cr4::OSXSAVE;
    asks(&m, "0f01d1", Service::WriteXcr);
}

#[test]
fn access_checks() {
    for mut m in [Machine::new(0), Machine::long(0), real()] {
        m.done("0f01cb");
        assert!(m.cpu.rflags.has(Rflags::AC));
        m.done("0f01ca");
        assert!(!m.cpu.rflags.has(Rflags::AC));
    }
    for m in [Machine::new(3), vm86()] {
        m.faults("0f01ca", Fault::UD);
        m.faults("0f01cb", Fault::UD);
    }
}

#[test]
fn ports() {
    let port = |port, size, input| Service::Port { port, size, input };
    let m = real().with(Gpr::Rdx, 0x1234);
    asks(&m, "e460", port(0x60, Size::Byte, true));
    asks(&m, "e780", port(0x80, Size::Word, false));
    asks(&m, "66ed", port(0x1234, Size::Dword, true));
    asks(&m, "ee", port(0x1234, Size::Byte, false));
    let string = |input, seg| Service::PortString {
        port: 0x1234,
        io: StringIo {
            input,
            size: Size::Word,
            rep: true,
            address_size: 2,
            seg,
        },
    };
    asks(&m, "f36d", string(true, SegReg::Es));
    asks(&m, "f326 6f", string(false, SegReg::Es));
    // By the I/O privilege level, and the bitmap of the TSS.
    for m in [vm86(), Machine::new(3)] {
        m.faults("e460", Fault::gp(0));
        m.faults("6c", Fault::gp(0));
    }
    asks(
        &Machine::new(3).with_flags(Rflags::IOPL),
        "e460",
        port(0x60, Size::Byte, true),
    );
    vm86().with_flags(Rflags::IOPL).faults("e460", Fault::gp(0));
    let mut open = vm86();
    open.cpu.seg(SegReg::Tr).limit = 0x2068;
    asks(&open, "e460", port(0x60, Size::Byte, true));
}

#[test]
fn the_interrupt_flag_and_virtual_8086_mode() {
    // CLI, STI, PUSHF, POPF, IRET, INT: out of reach with IOPL below 3.
    for code in ["fa", "fb", "9c", "9d", "669c", "669d", "cf", "cd20"] {
        let m = vm86().with(Gpr::Rsp, 0x8000);
        m.faults(code, Fault::gp(0));
    }
    let mut m = vm86().with_flags(Rflags::IOPL);
    let outcome = m.run("fb");
    assert!(
        matches!(outcome, Outcome::Done(done) if done.shadow == Shadow::Sti),
        "{outcome:?}"
    );
    assert!(m.cpu.rflags.has(Rflags::IF));
    m.done("9c");
    assert_eq!(m.memory.get32(STACK - 2) & 0xffff, 0x3202);
    // POPF does not change the level that allows it.
    m.memory.put(STACK - 2, &[0, 0]);
    m.done("9d");
    assert!(!m.cpu.rflags.has(Rflags::IF));
    assert!(m.cpu.rflags.has(Rflags::IOPL | Rflags::VM));
    // In real mode there is nothing that a program may not.
    let mut m = real().with(Gpr::Rsp, STACK);
    m.memory.put(STACK, &0x7fd7u16.to_le_bytes());
    m.done("9d");
    assert_eq!(m.cpu.rflags.bits(), 0x7fd7);
}

#[test]
fn code_of_32_bits_in_real_mode() {
    // What a code segment of protected mode leaves, when PE is cleared before a jump.
    let mut m = real();
    let attr = m.cpu.seg(SegReg::Cs).attr;
    m.cpu.seg(SegReg::Cs).attr = attr.with_db(true);
    assert_eq!(m.cpu.mode(), CpuMode::Real32);
    m.done("b878563412");
    assert_eq!(m.cpu.get(Gpr::Rax), 0x1234_5678);
    assert_eq!(m.cpu.rip, CODE + 5);
    // A far jump has an offset of 32 bits, and the segment stays what it is.
    m.done("ea 10000000 0002");
    assert_eq!(m.cpu.rip, 0x10);
    assert_eq!(m.cpu.seg(SegReg::Cs).base, 0x2000);
    assert_eq!(m.cpu.mode(), CpuMode::Real32);
    // An interrupt pushes words all the same.
    *m.cpu.seg(SegReg::Cs) = Segment {
        attr: attr.with_db(true),
        ..Segment::real_mode(0)
    };
    m.memory.put32(0x80, 0x0123_4567);
    let mut m = m.with(Gpr::Rsp, 0x8000);
    m.done("cd20");
    assert_eq!(m.cpu.get(Gpr::Rsp), 0x7ffa);
    assert_eq!(m.cpu.rip, 0x4567);
}

#[test]
fn a_null_segment_of_protected_mode_is_loaded_in_real_mode() {
    let mut m = real().with(Gpr::Rax, 0x1234);
    *m.cpu.seg(SegReg::Fs) = Segment::NULL;
    m.done("8ee0");
    assert_eq!(*m.cpu.seg(SegReg::Fs), Segment::real_mode(0x1234));
    // Another keeps what protected mode has left.
    let big = Segment {
        limit: u32::MAX,
        attr: Segment::real_mode(0).attr.with_g(true),
        ..Segment::real_mode(8)
    };
    *m.cpu.seg(SegReg::Gs) = big;
    m.done("8ee8");
    let expected = Segment {
        selector: 0x1234,
        base: 0x12340,
        ..big
    };
    assert_eq!(*m.cpu.seg(SegReg::Gs), expected);
}

#[test]
fn what_no_guest_has() {
    for m in [real(), Machine::new(0), Machine::long(3)] {
        // VMLAUNCH, VMRESUME, VMXOFF, GETSEC, RSM, and holes of the map.
        for code in [
            "660f388007",
            "0f01c2",
            "0f01c3",
            "0f01c4",
            "0f37",
            "0faa",
            "0f04",
            "0f24c0",
            "0fa6",
        ] {
            m.faults(code, Fault::UD);
        }
    }
    // VEX and EVEX are nothing in real and virtual-8086 mode.
    for m in [real(), vm86()] {
        for code in ["c5f877", "c4e17858c0", "62f17c4858c0"] {
            m.faults(code, Fault::UD);
        }
    }
}

#[test]
fn single_steps() {
    let steps = |code: &str| {
        let mut m = real().with(Gpr::Rsp, STACK).with_flags(Rflags::TF);
        let outcome = m.run(code);
        let Outcome::Done(done) = outcome else {
            panic!("{code}: {outcome:?}");
        };
        done.single_step
    };
    // NOP, STI, POPF that clears TF, INTO that does nothing.
    for code in ["90", "fb", "9d", "ce"] {
        assert!(steps(code), "{code}");
    }
    // INT n, INT3 and INT1 drop the trap, a load of SS too.
    for code in ["cd20", "cc", "f1", "8ed0", "17"] {
        assert!(!steps(code), "{code}");
    }
}
