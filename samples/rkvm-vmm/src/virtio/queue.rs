// SPDX-License-Identifier: GPL-2.0

//! A queue in use: rust-vmm's, with the guest's memory and the files that say "look" to either side.

use virtio_queue::DescriptorChain;
use virtio_queue::Queue;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;

/// A chain of descriptors that the driver has made available.
pub type Chain<'a> = DescriptorChain<&'a Memory>;

/// A queue that the driver has set up.
pub struct Ring {
    queue: Queue,
    memory: Memory,
    /// The driver has made buffers available.
    pub notify: EventFd,
    /// Interrupts the guest.
    interrupt: EventFd,
}

impl Ring {
    /// Puts together what belongs to a queue.
    pub fn new(queue: Queue, memory: Memory, notify: EventFd, interrupt: EventFd) -> Self {
        Self {
            queue,
            memory,
            notify,
            interrupt,
        }
    }

    /// The queue's addresses and size, for someone else to serve it.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The file that interrupts the guest, for the same.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Gives every available chain to `serve`, which returns how many bytes it wrote to it, or `None`
    /// to leave it and all behind it for later. Returns whether chains were used, and interrupts the
    /// guest for them if the driver wants that.
    ///
    /// A driver whose queue makes no sense is not served, and hurts nobody else.
    pub fn serve(&mut self, mut serve: impl FnMut(Chain<'_>, &Memory) -> Option<u32>) -> bool {
        let memory = &self.memory;
        let mut used = false;
        loop {
            // The driver need not tell of what is found in any case.
            if self.queue.disable_notification(memory).is_err() {
                return used;
            }
            let mut left = false;
            while let Some(chain) = self.queue.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                let Some(written) = serve(chain, memory) else {
                    let next = self.queue.next_avail().wrapping_sub(1);
                    self.queue.set_next_avail(next);
                    left = true;
                    break;
                };
                if self.queue.add_used(memory, head, written).is_err() {
                    return used;
                }
                used = true;
                if self.queue.needs_notification(memory).unwrap_or(false) {
                    // The kernel's counter does not get full of what the kernel itself empties.
                    let _ = self.interrupt.write(1);
                }
            }
            match self.queue.enable_notification(memory) {
                Ok(true) if !left => {}
                _ => return used,
            }
        }
    }
}
