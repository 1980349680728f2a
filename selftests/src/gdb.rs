// SPDX-License-Identifier: GPL-2.0

//! A client of the GDB remote protocol, as far as QEMU's stub needs one.

use crate::check::Verdict;
use crate::{ensure, fail, Outcome};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// How a place is watched: the number in the packets `Z` and `z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// INT3 in memory.
    Software = 0,
    /// A debug register, on execution.
    Hardware = 1,
    /// A debug register, on writing.
    Write = 2,
    /// A debug register, on reading or writing.
    Access = 4,
}

/// Registers in the order of the packet `g`, as far as they have eight bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// RAX.
    Rax = 0,
    /// RCX.
    Rcx = 2,
    /// The instruction pointer.
    Rip = 16,
}

/// A connection to the stub. While there is one, the guest only runs when told to.
pub struct Gdb {
    stream: UnixStream,
}

impl Gdb {
    /// Takes hold of the guest: it stops.
    ///
    /// # Errors
    ///
    /// That the stub does not answer.
    pub fn attach(stream: UnixStream) -> Result<Gdb, Verdict> {
        let mut gdb = Gdb { stream };
        gdb.ask("qSupported")?;
        let why = gdb.ask("?")?;
        ensure!(why.starts_with('T'), "the stub says '{why}'");
        Ok(gdb)
    }

    fn byte(&mut self) -> Result<u8, Verdict> {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(1) => Ok(byte[0]),
            Ok(_) => fail!("the stub has gone"),
            Err(e) => fail!("the stub does not answer: {e}"),
        }
    }

    fn send(&mut self, packet: &str) -> Outcome {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        let text = format!("${packet}#{sum:02x}");
        self.stream
            .write_all(text.as_bytes())
            .map_err(|e| crate::qemu::failed("gdb", &e))
    }

    /// The next packet from the stub.
    fn packet(&mut self) -> Result<String, Verdict> {
        while self.byte()? != b'$' {}
        let mut text = String::new();
        loop {
            match self.byte()? {
                b'#' => break,
                b => text.push(char::from(b)),
            }
        }
        let (_, _) = (self.byte()?, self.byte()?);
        self.stream
            .write_all(b"+")
            .map_err(|e| crate::qemu::failed("gdb", &e))?;
        Ok(text)
    }

    fn ask(&mut self, packet: &str) -> Result<String, Verdict> {
        self.send(packet)?;
        self.packet()
    }

    fn order(&mut self, packet: &str) -> Outcome {
        let answer = self.ask(packet)?;
        ensure!(answer == "OK", "the stub says '{answer}' to {packet}");
        Ok(())
    }

    /// Sets a break- or watchpoint.
    ///
    /// # Errors
    ///
    /// The stub's.
    pub fn set(&mut self, point: Point, address: u64, length: u64) -> Outcome {
        self.order(&format!("Z{},{address:x},{length:x}", point as u8))
    }

    /// Takes it away.
    ///
    /// # Errors
    ///
    /// The stub's.
    pub fn clear(&mut self, point: Point, address: u64, length: u64) -> Outcome {
        self.order(&format!("z{},{address:x},{length:x}", point as u8))
    }

    /// Lets the guest run; it is not waited for.
    ///
    /// # Errors
    ///
    /// That the stub cannot be told.
    pub fn go(&mut self) -> Outcome {
        self.send("c")
    }

    /// Waits until the guest stops; the stub's reason.
    ///
    /// # Errors
    ///
    /// That it does not stop because of a trap.
    pub fn stopped(&mut self) -> Result<String, Verdict> {
        let why = self.packet()?;
        ensure!(why.starts_with("T05"), "the guest stops with '{why}'");
        Ok(why)
    }

    /// Stops the guest, as Ctrl-C does in GDB.
    ///
    /// # Errors
    ///
    /// That it does not stop.
    pub fn interrupt(&mut self) -> Outcome {
        self.stream
            .write_all(&[3])
            .map_err(|e| crate::qemu::failed("gdb", &e))?;
        let why = self.packet()?;
        ensure!(why.starts_with("T02"), "the guest stops with '{why}'");
        Ok(())
    }

    /// Executes one instruction.
    ///
    /// # Errors
    ///
    /// That the guest does not stop after it.
    pub fn step(&mut self) -> Outcome {
        self.send("s")?;
        self.stopped().map(drop)
    }

    /// A register's value.
    ///
    /// # Errors
    ///
    /// The stub's.
    pub fn register(&mut self, register: Register) -> Result<u64, Verdict> {
        let all = self.ask("g")?;
        let at = register as usize * 16;
        let bytes = all.get(at..at + 16).and_then(unhex);
        match bytes.and_then(|b| <[u8; 8]>::try_from(b).ok()) {
            Some(b) => Ok(u64::from_le_bytes(b)),
            None => fail!("the stub's registers are '{all}'"),
        }
    }

    /// Memory at a linear address.
    ///
    /// # Errors
    ///
    /// The stub's.
    pub fn memory(&mut self, address: u64, length: u64) -> Result<Vec<u8>, Verdict> {
        let answer = self.ask(&format!("m{address:x},{length:x}"))?;
        match unhex(&answer) {
            Some(bytes) => Ok(bytes),
            None => fail!("the stub says '{answer}' of the memory at {address:#x}"),
        }
    }

    /// Lets the guest go for good.
    ///
    /// # Errors
    ///
    /// The stub's.
    pub fn detach(mut self) -> Outcome {
        self.order("D")
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok())
        .collect()
}
