// SPDX-License-Identifier: GPL-2.0

//! Virtio devices (the OASIS specification, version 1.2), by their registers in memory.
//!
//! [`mmio`] is the transport, the same for all; a [`Device`] knows what it does with its queues. Most
//! do it in a thread of their own ([`worker`]): the guest's notifications reach that by files which the
//! kernel writes (ioeventfd), and its interrupts the guest by one which the kernel reads (irqfd), so
//! that no vCPU comes out of the kernel for either.

pub mod block;
pub mod console;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod worker;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use self::queue::Ring;

/// What every device here offers: the modern interface, indirect descriptors, event indices.
pub const FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_INDIRECT_DESC) | (1 << VIRTIO_RING_F_EVENT_IDX);

/// What is different about each kind of device.
pub trait Device: Send {
    /// `VIRTIO_ID_*`.
    fn id(&self) -> u32;

    /// What it offers, [`FEATURES`] included.
    fn features(&self) -> u64 {
        FEATURES
    }

    /// Sizes of its queues at most; as many as it has.
    fn queues(&self) -> &'static [u16];

    /// Its configuration, as the driver reads it.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Has no thread: its queues are served when the vCPU that notifies it comes out of the kernel,
    /// and its interrupt is a level, which the driver ends.
    fn is_plain(&self) -> bool {
        false
    }

    /// The driver is ready: starts to serve the queues. Those that the driver did not set up are not
    /// there.
    ///
    /// # Errors
    /// There can be no thread.
    fn activate(&mut self, features: u64, queues: Vec<Option<Ring>>) -> anyhow::Result<()>;

    /// The driver is gone: lets go of the queues.
    fn reset(&mut self);

    /// The driver has notified a queue of a plain device; returns whether it used buffers.
    fn notified(&mut self) -> bool {
        false
    }
}
