// SPDX-License-Identifier: GPL-2.0

//! Random numbers of the host's (virtio 1.2, "Entropy Device"): the plain device. Nobody waits for
//! it, so its interrupt may be a level and its notifications exits, as those of devices before virtio
//! were.

use std::fs::File;
use std::io::Read;
use std::io::Write;

use anyhow::Context;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::queue::Ring;
use super::Device;

/// Most bytes for one request: who wants more asks again.
const LIMIT: usize = 4096;

/// The device.
pub struct Rng {
    source: File,
    ring: Option<Ring>,
}

impl Rng {
    /// Opens the host's source of random numbers.
    ///
    /// # Errors
    /// There is none.
    pub fn open() -> anyhow::Result<Self> {
        let source = File::open("/dev/urandom").context("cannot open /dev/urandom")?;
        Ok(Self { source, ring: None })
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queues(&self) -> &'static [u16] {
        &[16]
    }

    fn is_plain(&self) -> bool {
        true
    }

    fn activate(&mut self, _features: u64, mut queues: Vec<Option<Ring>>) -> anyhow::Result<()> {
        self.ring = queues.pop().flatten();
        Ok(())
    }

    fn reset(&mut self) {
        self.ring = None;
    }

    fn notified(&mut self) -> bool {
        let Some(ring) = &mut self.ring else {
            return false;
        };
        let mut source = &self.source;
        ring.serve(|chain, memory| {
            let Ok(mut to) = chain.writer(memory) else {
                return Some(0);
            };
            let mut bytes = [0; LIMIT];
            let bytes = &mut bytes[..to.available_bytes().min(LIMIT)];
            let done = source.read_exact(bytes).and_then(|()| to.write_all(bytes));
            Some(done.map_or(0, |()| bytes.len() as u32))
        })
    }
}
