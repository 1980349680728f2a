// SPDX-License-Identifier: GPL-2.0

//! The VMM's devices, whose answers are known beforehand.

use super::code::*;
use kvm_bindings as kb;
use selftests::guest::{at, PORT_EXCEPTION};
use selftests::host::Rng;
use selftests::machine::{decode, Exit};
use selftests::snapshot::Chips;
use selftests::vm::{Vcpu, Vm};
use selftests::Outcome;
use selftests::{ensure, ensure_eq, fail, sys};
use std::time::Duration;

/// What a device answers to the `n`th access of a kind.
pub(crate) fn answer(kind: u64, n: u64) -> u64 {
    let mut rng = Rng::new((kind << 48) | n);
    rng.number();
    rng.number()
}

pub(crate) fn bytes(kind: u64, from: u64, count: u64) -> Vec<u8> {
    (from..from + count)
        .map(|n| answer(kind, n).to_le_bytes()[3])
        .collect()
}

pub(crate) fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}

/// The devices of the VMM: how often each was accessed.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Devices {
    pub(crate) outs: u64,
    pub(crate) ins: u64,
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) stores: u64,
    pub(crate) loaded: u64,
    pub(crate) string_outs: u64,
    pub(crate) string_ins: u64,
    pub(crate) requests: u64,
    pub(crate) acks: u64,
    pub(crate) halts: u64,
    /// An interrupt is to be queued.
    pub(crate) wanted: bool,
    pub(crate) done: bool,
}

impl Devices {
    /// Does what the vCPU has left for.
    pub(crate) fn handle(&mut self, vm: &Vm, vcpu: &Vcpu, chips: Chips) -> Outcome {
        match decode(vcpu) {
            Exit::Out {
                port: PORT, data, ..
            } => {
                // Twice each turn.
                let turn = self.outs / 2;
                let second = self.outs % 2 == 1;
                ensure!(
                    second || word(&data) == turn,
                    "OUT {data:x?} in turn {turn:#x}"
                );
                self.outs += 1;
            }
            Exit::Out {
                port: STRING_PORT,
                data,
                ..
            } => {
                for byte in data {
                    let n = self.string_outs;
                    let want = bytes(3, n / 8 * 9 + n % 8, 1)[0];
                    ensure_eq!(byte, want, "byte {n} of OUTSB");
                    self.string_outs += 1;
                }
            }
            Exit::Out {
                port: REQUEST_PORT, ..
            } => {
                self.requests += 1;
                if chips == Chips::Full {
                    line(vm, 1)?;
                } else {
                    self.wanted = true;
                }
            }
            Exit::Out { port: ACK_PORT, .. } => {
                self.acks += 1;
                if chips == Chips::Full {
                    line(vm, 0)?;
                }
            }
            Exit::Out {
                port: DONE_PORT, ..
            } => self.done = true,
            Exit::In { port: PORT, .. } => {
                vcpu.set_io_data(&answer(1, self.ins).to_le_bytes()[..4]);
                self.ins += 1;
            }
            Exit::In {
                port: STRING_PORT,
                count,
                ..
            } => {
                vcpu.set_io_data(&bytes(4, self.string_ins, count.into()));
                self.string_ins += u64::from(count);
            }
            Exit::MmioWrite {
                addr: at::MMIO,
                data,
            } => {
                ensure_eq!(word(&data), self.writes, "a write");
                self.writes += 1;
            }
            Exit::MmioWrite { addr, data } => {
                let (turn, n) = (self.stores / 5, self.stores % 5);
                ensure_eq!(
                    (addr - at::MMIO, word(&data)),
                    (0x100 + 4 * n, turn),
                    "store {n} of turn {turn:#x}"
                );
                self.stores += 1;
            }
            Exit::MmioRead { addr, len } if addr == at::MMIO + 8 => {
                ensure_eq!(len, 8, "bytes of a read");
                reply(vcpu, &answer(2, self.reads).to_le_bytes());
                self.reads += 1;
            }
            Exit::MmioRead { addr, len } => {
                let n = self.loaded % 9;
                ensure_eq!(addr - at::MMIO, 0x200 + n, "address of MOVSB");
                reply(vcpu, &bytes(3, self.loaded, len.into()));
                self.loaded += u64::from(len);
            }
            Exit::Hlt => self.halts += 1,
            // Whoever watches harvests it.
            Exit::Other(kb::KVM_EXIT_DIRTY_RING_FULL) => {
                std::thread::sleep(Duration::from_micros(100));
            }
            Exit::IrqWindow => {
                vcpu.interrupt(LINE.into())?;
                self.wanted = false;
            }
            Exit::Out { port, .. } if port == PORT_EXCEPTION => {
                fail!("an exception that none expects\n{:x?}", vcpu.regs()?)
            }
            exit => fail!("exit {exit:x?}\n{:x?}", vcpu.regs()?),
        }
        Ok(())
    }
}

pub(crate) fn reply(vcpu: &Vcpu, data: &[u8]) {
    // SAFETY: The last exit was a read of device memory, so `mmio` is the valid member.
    let mmio = unsafe { &mut vcpu.kvm_run_mut().__bindgen_anon_1.mmio };
    mmio.data[..data.len()].copy_from_slice(data);
}

pub(crate) fn line(vm: &Vm, level: u32) -> Result<(), sys::Error> {
    let mut irq = kb::kvm_irq_level {
        level,
        ..Default::default()
    };
    irq.__bindgen_anon_1.irq = GSI;
    vm.fd.ioctl_ref(sys::KVM_IRQ_LINE, &irq)?;
    Ok(())
}
