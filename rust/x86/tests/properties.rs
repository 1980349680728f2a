// SPDX-License-Identifier: GPL-2.0

//! What holds for the emulator whatever the instruction and the state.

mod common;

use common::generate::*;
use common::run_with;
use common::Lost;
use common::TestCpu;
use common::TestMemory;
use common::DONE;
use common::MORE;
use common::RAM;
use proptest::prelude::*;
use rkvm_x86::decode::decode;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::insn::Op;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr3;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Efer;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegAttr;
use rkvm_x86::segment::Segment;

/// Runs an instruction to its end, being the device: its reads come from `memory.ram` and its writes go there.
fn serve(cpu: &mut TestCpu, memory: &mut TestMemory) -> (u32, Outcome<Lost>) {
    let mut emulator = Emulator::new();
    let mut accesses = 0;
    for _ in 0..10_000 {
        match emulator.step(cpu, memory) {
            Outcome::MmioRead { gpa, len } => {
                let mut data = [0xaa; 8];
                let from = &memory.ram[gpa as usize..][..len.into()];
                data[..len.into()].copy_from_slice(from);
                emulator.complete_read(data);
                accesses += 1;
            }
            Outcome::MmioWrite { gpa, data, len } => {
                memory.put(gpa, &data[..len.into()]);
                accesses += 1;
            }
            DONE => return (accesses, DONE),
            MORE => {}
            Outcome::Fault(fault) => return (accesses, Outcome::Fault(fault)),
            other => panic!("{other:?}"),
        }
    }
    panic!("it does not end");
}

/// An instruction does the same to devices as to memory, and to operands that lie in both.
#[test]
fn devices_are_like_memory() {
    let mut random = Random(5);
    let mut memory = TestMemory::default();
    for chunk in memory.ram[DATA as usize..][..DATA_LEN].chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
    let mut device = memory.clone();
    let (mut compared, mut accesses) = (0, 0);
    while compared < 20_000 {
        let mut code = bytes(&mut random, CpuMode::Long64);
        let Ok(insn) = decode(&code, CpuMode::Long64) else {
            continue;
        };
        let mut cpu = TestCpu::long();
        cpu.rip = CODE;
        patch(&mut random, &mut code, &insn, &mut cpu);
        if !aim(&mut random, &insn, &mut cpu) || insn.op == Op::Enter {
            continue;
        }
        let status = Rflags::STATUS | Rflags::DF;
        cpu.rflags = Rflags::new(random.next()) & status | Rflags::FIXED;
        if matches!(insn.op, Op::CmpXchg | Op::CmpXchg8b | Op::CmpXchg16b) && random.one_in(2) {
            make_equal(&insn, &mut cpu, &memory);
        }
        memory.put(CODE, &code);

        let pages = random.below(15) + 1;
        let mut other = cpu.clone();
        device.put(CODE, &code);
        device.device_pages = (0..4)
            .filter(|i| pages & (1 << i) != 0)
            .map(|i| (DATA >> 12) + i)
            .collect();
        let (none, outcome) = serve(&mut cpu, &mut memory);
        assert_eq!(none, 0);
        let (some, same) = serve(&mut other, &mut device);
        assert_eq!(outcome, same);
        accesses += some;
        assert_eq!(cpu, other, "{:02x?} {insn:?}", &code[..insn.len.into()]);
        assert!(
            memory.ram == device.ram,
            "{:02x?}",
            &code[..insn.len.into()]
        );
        compared += 1;
    }
    assert!(accesses > compared / 8, "{accesses} accesses");
}

fn any_segment() -> impl Strategy<Value = Segment> {
    let base = prop_oneof![Just(0), any::<u32>().prop_map(u64::from), any::<u64>()];
    let limit = prop_oneof![Just(u32::MAX), Just(0xffff), any::<u32>()];
    (any::<u16>(), base, limit, any::<u32>()).prop_map(|(selector, base, limit, attr)| Segment {
        selector,
        base,
        limit,
        // Mostly usable.
        attr: SegAttr::from_vmx(attr).with_unusable(attr >> 16 == 1),
    })
}

prop_compose! {
    fn any_cpu()(
        gprs in any::<[u64; 16]>(),
        shifts in any::<[u8; 16]>(),
        segments in prop::array::uniform8(any_segment()),
        rip in prop_oneof![0u64..0x10_0000, any::<u64>()],
        rflags: u64, cr0: u64, cr3 in 0u64..0x10_0000, cr4: u64, efer: u64, cpl in 0u8..4, maxphyaddr: u8,
        gbpages: bool, pkru: u32, mode in 0u8..4,
    ) -> TestCpu {
        let mut cpu = TestCpu::real();
        for (i, r) in Gpr::ALL.into_iter().enumerate() {
            cpu.gprs.set(r, gprs[i] >> (shifts[i] % 64));
        }
        cpu.segments = segments;
        cpu.rip = rip;
        cpu.rflags = Rflags::new(rflags) | Rflags::FIXED;
        cpu.cr0 = Cr0::new(cr0);
        cpu.cr3 = Cr3::new(cr3);
        cpu.cr4 = Cr4::new(cr4);
        cpu.efer = Efer::new(efer);
        // A good part in modes that exist, without paging.
        if mode != 0 {
            cpu.cr0 = Cr0::new(u64::from(mode > 1));
            cpu.efer = if mode == 3 { Efer::LMA } else { Efer::empty() };
            cpu.segments[1] = Segment { base: 0, limit: u32::MAX, ..cpu.segments[1] };
            cpu.segments[1].attr = SegAttr::RESET_CODE.with_l(mode == 3);
            cpu.rip &= 0xf_ffff;
        }
        (cpu.cpl, cpu.maxphyaddr, cpu.gbpages, cpu.pkru) = (cpl, maxphyaddr, gbpages, pkru);
        cpu
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Any bytes in any state: a step ends, asks only for what can be asked, and an instruction that faults has changed nothing but, before
    /// it, whole iterations.
    #[test]
    fn any_state(
        mut cpu in any_cpu(),
        seed in prop::collection::vec(any::<u8>(), 64),
        code in prop::collection::vec(any::<u8>(), 15),
        answers in any::<[u64; 4]>(),
        contention in prop_oneof![Just(0u32), Just(1), Just(u32::MAX)],
    ) {
        let mut memory = TestMemory { contention, ..TestMemory::default() };
        for (i, b) in memory.ram.iter_mut().enumerate() {
            *b = seed[(i ^ (i >> 7)) % 64];
        }
        if cpu.rip < RAM - 16 {
            memory.put(cpu.rip, &code);
        }
        let before = cpu.clone();
        let ram = memory.ram.clone();
        let mut emulator = Emulator::new();
        // `run_with` checks each request.
        let (outcome, bus) = run_with(&mut emulator, &mut cpu, &mut memory, &answers);
        // Both lists are full.
        prop_assert!(bus.len() <= 18, "{:?}", bus);
        prop_assert!(emulator.insn_bytes().len() <= 15);
        match outcome {
            Outcome::Done(c) => {
                prop_assert!(c.retired || cpu.rip == before.rip);
            }
            // The fault is one of another task.
            _ if cpu.segments[7] != before.segments[7] => {}
            _ => {
                prop_assert_eq!(cpu.rip, before.rip);
                // Only string instructions have iterations, and they count in RCX.
                if cpu.get(Gpr::Rcx) == before.get(Gpr::Rcx) && before.cr0.has(Cr0::PG) {
                    prop_assert_eq!(cpu.gprs, before.gprs);
                } else if cpu.get(Gpr::Rcx) == before.get(Gpr::Rcx) {
                    prop_assert_eq!(&cpu, &before);
                    prop_assert!(memory.ram == ram);
                }
            }
        }
    }
}
