// SPDX-License-Identifier: GPL-2.0

//! A whole BIOS, from reset to the search for something to boot, executed by the emulator alone.
//!
//! The build root has SeaBIOS and the BIOS of Bochs; without them there is nothing to run.

mod common;

use common::board::Board;
use common::board::End;
use common::board::Ports;
use rkvm_x86::insn::Size;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;
use std::collections::VecDeque;
use std::path::Path;

const RAM: usize = 256 << 20;

/// A PC's board: CMOS, the interrupt controllers' and timer's registers as plain cells, a PCI host bridge, and debug ports.
#[derive(Default)]
struct Pc {
    log: String,
    cmos_at: u8,
    pci_at: u32,
    pci: Vec<u8>,
    cells: Vec<u8>,
    /// Ticks of the timer are counted by reads of it.
    reads: u32,
    timer: bool,
    /// What the keyboard controller has to say, and the command whose data it waits for.
    keyboard: VecDeque<u8>,
    command: u8,
}

impl Pc {
    fn new() -> Self {
        let mut pci = vec![0; 256];
        pci[..4].copy_from_slice(&0x1237_8086u32.to_le_bytes());
        pci[0xa] = 0;
        pci[0xb] = 6;
        pci[0x2c..0x30].copy_from_slice(&0x1100_1af4u32.to_le_bytes());
        Self {
            pci,
            cells: vec![0xff; 0x10000],
            ..Self::default()
        }
    }

    fn byte_in(&mut self, port: u16) -> u8 {
        self.reads = self.reads.wrapping_add(1);
        match port {
            0x71 => match self.cmos_at & 0x7f {
                // The clock: an update now and then; binary, 24 hours; the battery is good.
                0xa => (self.reads >> 4) as u8 & 0x80 | 0x26,
                0xb | 0x14 => 2,
                0xd | 0x15 => 0x80,
                // Memory: 640 KiB, and the rest in KiB and in units of 64 KiB.
                0x16 => 2,
                0x18 | 0x31 => 0x3c,
                0x35 => 0x0f,
                _ => 0,
            },
            0x402 | 0xe9 => 0xe9,
            0x3fd => 0x60,
            0x3f8..=0x3fc => 0,
            // Refresh and the speaker's timer go on and off.
            0x61 => self.reads as u8 & 0x30,
            0x60 => self.keyboard.pop_front().unwrap_or(0),
            0x64 => u8::from(!self.keyboard.is_empty()),
            0x40 => (self.reads.wrapping_mul(0xffff_fffd)) as u8,
            0x20 | 0xa0 => 0,
            0x21 | 0xa1 | 0x92 => self.cells[usize::from(port)],
            0xcfc..=0xcff => {
                let at = (self.pci_at & 0xfc) + u32::from(port & 3);
                if self.pci_at & 0x00ff_ff00 == 0 && self.pci_at >> 31 == 1 {
                    self.pci[at as usize]
                } else {
                    0xff
                }
            }
            0xcf8..=0xcfb => (self.pci_at >> (8 * (port & 3))) as u8,
            _ => 0xff,
        }
    }

    fn byte_out(&mut self, port: u16, value: u8) {
        self.cells[usize::from(port)] = value;
        match port {
            0x70 => self.cmos_at = value,
            0x402 | 0x403 | 0xe9 | 0x3f8 => self.log.push(value.into()),
            0xcf8..=0xcfb => {
                let shift = 8 * u32::from(port & 3);
                self.pci_at = self.pci_at & !(0xff << shift) | (u32::from(value) << shift);
            }
            0xcfc..=0xcff if self.pci_at & 0x80ff_ff00 == 0x8000_0000 => {
                let at = (self.pci_at & 0xfc) + u32::from(port & 3);
                if at >= 0x40 {
                    self.pci[at as usize] = value;
                }
            }
            0x64 => {
                self.command = value;
                match value {
                    0x20 => self.keyboard.push_back(0x61),
                    0xaa => self.keyboard.push_back(0x55),
                    0xab => self.keyboard.push_back(0),
                    _ => {}
                }
            }
            0x60 => match std::mem::take(&mut self.command) {
                0x60 | 0xd1 | 0xd4 => {}
                _ => {
                    self.keyboard.push_back(0xfa);
                    match value {
                        0xff => self.keyboard.push_back(0xaa),
                        0xf2 => self.keyboard.extend([0xab, 0x41]),
                        _ => {}
                    }
                }
            },
            // Counter 0 was given a count.
            0x40 => self.timer = true,
            _ => {}
        }
    }
}

impl Ports for Pc {
    fn input(&mut self, port: u16, size: Size) -> u32 {
        (0..u16::from(size.bytes())).fold(0, |all, i| {
            all | (u32::from(self.byte_in(port.wrapping_add(i))) << (8 * i))
        })
    }

    fn output(&mut self, port: u16, size: Size, value: u32) {
        for i in 0..u16::from(size.bytes()) {
            self.byte_out(port.wrapping_add(i), (value >> (8 * i)) as u8);
        }
    }

    fn interrupt(&mut self, steps: u64) -> Option<u8> {
        // As the 8259A has it with the timer's input open.
        let open = self.timer && self.cells[0x21] & 1 == 0;
        (open && steps % 20_000 < 8).then_some(8)
    }
}

/// At the reset vector of a BIOS.
fn board(rom: Vec<u8>) -> Board<Pc> {
    let mut board = Board::new(RAM, Pc::new());
    let low = rom.len().min(0x2_0000);
    board
        .memory
        .put(0x10_0000 - low as u64, &rom[rom.len() - low..]);
    board.memory.rom_at = (1 << 32) - rom.len() as u64;
    board.memory.rom = rom;
    board.cpu.cr0 = Cr0::ET.with(Cr0::CD).with(Cr0::NW);
    for reg in SegReg::ALL {
        *board.cpu.seg(reg) = Segment::reset(reg);
    }
    board.cpu.rip = 0xfff0;
    board
}

/// A file of the build root's. BIOS_DIR in the environment is another place for them.
fn file(name: &str) -> Option<Vec<u8>> {
    let dir = std::env::var("BIOS_DIR").unwrap_or("/usr/share".to_string());
    let path = Path::new(&dir).join(name);
    let bytes = std::fs::read(&path).ok();
    if bytes.is_none() {
        println!("no {}", path.display());
    }
    bytes
}

/// Runs until the BIOS has said all of this.
fn boot(board: &mut Board<Pc>, steps: u64, words: &[&str]) {
    let mut end = End::Steps;
    while board.steps < steps && end == End::Steps {
        end = board.run(100_000);
        if words.iter().all(|word| board.ports.log.contains(word)) {
            println!("{} steps, {:?}", board.steps, board.modes);
            return;
        }
    }
    panic!(
        "{end:?} after {} steps, {:?}\n{}\nlog:\n{}",
        board.steps,
        board.modes,
        board.place(),
        board.ports.log
    );
}

/// SeaBIOS runs in big real mode, 16-bit and 32-bit protected mode.
fn seabios() -> Option<Board<Pc>> {
    let mut board = board(file("seabios/bios-256k.bin")?);
    boot(
        &mut board,
        40_000_000,
        &[
            "SeaBIOS (version",
            "0000000000100000 - 0000000010000000 = 1 RAM",
            "No bootable device",
        ],
    );
    Some(board)
}

#[test]
fn seabios_looks_for_something_to_boot() {
    let Some(board) = seabios() else {
        return;
    };
    let [_, emulated] = board.modes["Real"];
    assert!(emulated > 1000, "{:?}", board.modes);
    assert!(board.modes["Protected16"][0] > 10, "{:?}", board.modes);
    assert!(board.modes["Protected32"][0] > 1000, "{:?}", board.modes);
    assert!(board.faults.is_empty(), "{}", board.place());
}

#[test]
fn the_bios_of_bochs_looks_for_something_to_boot() {
    let Some(rom) = file("bochs/BIOS-bochs-latest") else {
        return;
    };
    let words = ["BIOS BUILD DATE", "ram_end=256MB", "No bootable device"];
    boot(&mut board(rom), 10_000_000, &words);
}

#[test]
fn the_legacy_bios_of_bochs_looks_for_something_to_boot() {
    let (Some(rom), Some(vga)) = (
        file("bochs/BIOS-bochs-legacy"),
        file("seabios/vgabios-isavga.bin"),
    ) else {
        return;
    };
    let mut board = board(rom);
    board.memory.put(0xc_0000, &vga);
    boot(
        &mut board,
        10_000_000,
        &["BIOS BUILD DATE", "No bootable device"],
    );
    assert_eq!(board.modes.keys().collect::<Vec<_>>(), ["Real"]);
}

/// The kernel of the testbed's guests.
fn kernel() -> Option<Vec<u8>> {
    let cache = std::env::var("RKVM_CACHE").ok()?;
    let mut entries = std::fs::read_dir(cache).ok()?.flatten();
    let guest = entries.find(|e| e.file_name().to_string_lossy().starts_with("guest-"))?;
    std::fs::read(guest.path().join("vmlinuz")).ok()
}

/// Linux from the start of its 16-bit code, which asks the BIOS for this and that, to 64-bit code.
#[test]
fn linux_comes_to_long_mode() {
    let Some(image) = kernel() else {
        println!("no kernel: RKVM_CACHE says where the testbed's is");
        return;
    };
    let Some(mut board) = seabios() else {
        return;
    };
    // As a boot loader does: Documentation/arch/x86/boot.rst.
    let setup = (usize::from(image[0x1f1]) + 1) * 512;
    let mut head = image[..setup].to_vec();
    head[0x210] = 0xff;
    head[0x211] |= 0x80;
    head[0x224..0x226].copy_from_slice(&0xde00u16.to_le_bytes());
    head[0x228..0x22c].copy_from_slice(&0x9_e000u32.to_le_bytes());
    board.memory.put(0x9_0000, &head);
    board.memory.put(0x9_e000, b"console=ttyS0\0");
    board.memory.put(0x10_0000, &image[setup..]);
    for reg in [SegReg::Ss, SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs] {
        *board.cpu.seg(reg) = Segment::real_mode(0x9000);
    }
    *board.cpu.seg(SegReg::Cs) = Segment::real_mode(0x9020);
    board.cpu.rip = 0;
    board.cpu.gprs.set(Gpr::Rsp, 0xe000);
    board.cpu.rflags = Rflags::FIXED;
    board.modes.clear();
    for _ in 0..2_000_000 {
        assert_eq!(board.run(1), End::Steps, "{}", board.place());
        if board.mode() == CpuMode::Long64 {
            break;
        }
    }
    assert_eq!(board.mode(), CpuMode::Long64, "{}", board.place());
    println!("{:?}", board.modes);
    // RSI leads to the parameters: the header is there, and a map of memory from the BIOS.
    let parameters = board.cpu.get(Gpr::Rsi);
    assert_eq!(board.memory.get(parameters + 0x202, 4), b"HdrS");
    assert!(board.memory.get(parameters + 0x1e8, 1)[0] >= 3);
    // The decompressor runs.
    assert_eq!(board.run(1_000_000), End::Steps, "{}", board.place());
    assert!(board.modes["Long64"][0] >= 1_000_000, "{:?}", board.modes);
}
