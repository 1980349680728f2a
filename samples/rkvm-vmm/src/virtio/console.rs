// SPDX-License-Identifier: GPL-2.0

//! A console without ports (virtio 1.2, "Console Device"), on standard input and output.

use std::collections::VecDeque;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;

use anyhow::Context;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::queue::Ring;
use super::worker::Job;
use super::worker::Worker;
use super::Device;
use crate::events;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// How many keys wait for the guest at most.
const ROOM: usize = 4096;
/// How much output is copied at a time.
const CHUNK: usize = 4096;

/// Keys on their way to the guest.
pub struct Input {
    keys: Mutex<VecDeque<u8>>,
    /// There are keys.
    ready: EventFd,
    /// Tells the event thread that there is room again.
    room: events::Ring,
}

impl Input {
    /// Returns a place for keys; `room` is rung when there is room that there was not.
    ///
    /// # Errors
    /// The kernel has no eventfd.
    pub fn new(room: events::Ring) -> anyhow::Result<Self> {
        Ok(Self {
            keys: Mutex::new(VecDeque::new()),
            ready: EventFd::new(EFD_NONBLOCK).context("eventfd")?,
            room,
        })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.keys
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes keys, as many as there is room for; returns how many.
    pub fn push(&self, keys: &[u8]) -> usize {
        let mut queue = self.lock();
        let taken = keys.len().min(ROOM - queue.len());
        queue.extend(&keys[..taken]);
        let _ = self.ready.write(1);
        taken
    }

    /// Gives keys to `to`, as many as fit; `None` if there are none.
    fn pop(&self, to: &mut impl Write, size: usize) -> Option<usize> {
        let mut queue = self.lock();
        if queue.is_empty() {
            return None;
        }
        let was_full = queue.len() == ROOM;
        let count = size.min(queue.len());
        let keys: Vec<u8> = queue.drain(..count).collect();
        if was_full {
            self.room.ring();
        }
        Some(to.write_all(&keys).map_or(0, |()| keys.len()))
    }
}

/// The device.
pub struct Console {
    input: Arc<Input>,
    worker: Option<Worker>,
}

impl Console {
    /// Returns the console that `input` is typed on.
    pub fn new(input: Arc<Input>) -> Self {
        Self {
            input,
            worker: None,
        }
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queues(&self) -> &'static [u16] {
        &[64, 64]
    }

    fn config(&self) -> Vec<u8> {
        // Columns, rows, number of ports, a register for early output: nothing of that is offered.
        vec![0; 12]
    }

    fn activate(&mut self, _features: u64, mut queues: Vec<Option<Ring>>) -> anyhow::Result<()> {
        let job = Lines {
            transmit: queues.remove(TRANSMIT),
            receive: queues.remove(RECEIVE),
            input: self.input.clone(),
            output: io::stdout(),
        };
        self.worker = Some(Worker::start("virtio-console", job)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The thread's.
struct Lines<W> {
    receive: Option<Ring>,
    transmit: Option<Ring>,
    input: Arc<Input>,
    output: W,
}

impl<W: Write + Send + 'static> Job for Lines<W> {
    fn files(&self) -> Vec<RawFd> {
        let file = |ring: &Option<Ring>| ring.as_ref().map_or(-1, |ring| ring.notify.as_raw_fd());
        vec![
            file(&self.receive),
            file(&self.transmit),
            self.input.ready.as_raw_fd(),
        ]
    }

    fn ready(&mut self, index: usize) {
        match (index, &mut self.receive, &mut self.transmit) {
            (TRANSMIT, _, Some(ring)) => {
                let _ = ring.notify.read();
                let output = &mut self.output;
                ring.serve(|chain, memory| {
                    if let Ok(mut from) = chain.reader(memory) {
                        let mut buffer = [0; CHUNK];
                        while let Ok(got @ 1..) = from.read(&mut buffer) {
                            // What cannot be shown is lost: a console does not keep the guest.
                            let _ = output.write_all(&buffer[..got]);
                        }
                    }
                    Some(0)
                });
                let _ = output.flush();
            }
            // Keys, or buffers for them.
            (_, Some(ring), _) => {
                let _ = ring.notify.read();
                let _ = self.input.ready.read();
                let input = &self.input;
                ring.serve(|chain, memory| {
                    let Ok(mut to) = chain.writer(memory) else {
                        return Some(0);
                    };
                    let size = to.available_bytes();
                    input.pop(&mut to, size).map(|written| written as u32)
                });
            }
            (_, None, _) => {
                let _ = self.input.ready.read();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_wait_within_bounds() {
        let input = Input::new(events::Ring::new().unwrap()).unwrap();
        assert_eq!(input.push(&[b'k'; ROOM + 5]), ROOM);
        assert_eq!(input.push(b"x"), 0);
        let mut taken = Vec::new();
        assert_eq!(input.pop(&mut taken, 3), Some(3));
        assert_eq!(taken, b"kkk");
        assert_eq!(input.push(b"xyz1"), 3);
        assert_eq!(input.pop(&mut taken, usize::MAX), Some(ROOM));
        assert_eq!(input.pop(&mut taken, 1), None);
    }
}
