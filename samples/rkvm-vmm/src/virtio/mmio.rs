// SPDX-License-Identifier: GPL-2.0

//! The transport: a page of registers for each device (virtio 1.2, "Virtio Over MMIO").
//!
//! What reads would return is kept in a page of memory, written anew whenever a write to a register
//! changes it. The kernel can so map the page into the guest, read-only, and answer reads itself;
//! writes to it are exits, but for those that it gives to files.
//!
//! For a device with a thread, "a buffer was used" is always set in the interrupt status, and the
//! acknowledgement is a write to a file that nobody reads: its interrupts are edges, one for each time
//! that there is something to look at, so that there is nothing to be learnt from either register. So
//! neither takes a vCPU out of the kernel.

use std::io;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use virtio_queue::QueueT;
use vm_memory::Bytes;
use vm_memory::MmapRegion;
use vm_memory::VolatileMemory;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::queue::Ring;
use super::Device;
use crate::memory::Memory;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"RKVM");
const PAGE: usize = 0x1000;
/// Registers by which shared memory is found; a length of all ones says that there is none.
const SHARED_MEMORY: std::ops::RangeInclusive<u32> =
    VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH;

/// A device behind its registers.
pub struct Mmio {
    device: Box<dyn Device>,
    memory: Memory,
    page: MmapRegion,
    notify: Vec<EventFd>,
    interrupt: EventFd,
    acknowledge: EventFd,
    device_features_high: bool,
    driver_features_high: bool,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
    status: u32,
    /// `VIRTIO_MMIO_INT_*` of a plain device.
    interrupt_status: u32,
}

impl Mmio {
    /// Returns `device` as after reset.
    ///
    /// # Errors
    /// There is no memory or no file to be had.
    pub fn new(device: Box<dyn Device>, memory: Memory) -> io::Result<Self> {
        let file = || EventFd::new(EFD_NONBLOCK);
        let mut mmio = Self {
            notify: device
                .queues()
                .iter()
                .map(|_| file())
                .collect::<Result<_, _>>()?,
            queues: Vec::new(),
            page: MmapRegion::new(PAGE).map_err(io::Error::other)?,
            interrupt: file()?,
            acknowledge: file()?,
            device,
            memory,
            device_features_high: false,
            driver_features_high: false,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
        };
        mmio.reset();
        mmio.render();
        Ok(mmio)
    }

    /// Files that notify the queues, if the kernel may do that.
    pub fn notify_files(&self) -> Option<&[EventFd]> {
        (!self.device.is_plain()).then_some(&self.notify)
    }

    /// The file that interrupts the guest, if the kernel may do that.
    pub fn interrupt_file(&self) -> Option<&EventFd> {
        (!self.device.is_plain()).then_some(&self.interrupt)
    }

    /// The file that takes acknowledgements, if the kernel may do that.
    pub fn acknowledge_file(&self) -> Option<&EventFd> {
        (!self.device.is_plain()).then_some(&self.acknowledge)
    }

    /// The page that reads are from.
    pub fn page(&self) -> &MmapRegion {
        &self.page
    }

    /// The level of the interrupt line; `None` if the device's interrupts are edges.
    pub fn level(&self) -> Option<bool> {
        self.device.is_plain().then_some(self.interrupt_status != 0)
    }

    /// Reads `data.len()` bytes at `offset` in the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let page = self.page.as_volatile_slice();
        if page.read_slice(data, offset as usize).is_err() {
            data.fill(0xff);
        }
    }

    /// Writes to the register at `offset`. All are of four bytes, and no device here has
    /// configuration to be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        self.write_register(offset, u32::from_le_bytes(data));
        self.render();
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_high = value != 0,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_high = value != 0,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                    let shift = if self.driver_features_high { 32 } else { 0 };
                    self.driver_features &= !(0xffff_ffff << shift);
                    self.driver_features |= u64::from(value) << shift;
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notified(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt_status &= !value,
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue(register, value),
        }
    }

    fn write_queue(&mut self, register: u32, value: u32) {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            // The queues are in use.
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        match register {
            // A size that is no size is ignored by the queue.
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// A notification that came here and not to a file.
    fn notified(&mut self, queue: u32) {
        if self.device.is_plain() {
            if self.device.notified() {
                self.interrupt_status |= VIRTIO_MMIO_INT_VRING;
            }
        } else if let Some(file) = self.notify.get(queue as usize) {
            let _ = file.write(1);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = value & 0xff;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && self.driver_features & !self.device.features() != 0
        {
            // It wants what it was not offered: the bit does not stay, as it will find.
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let starts = new & !self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        self.status = new;
        if starts {
            if let Err(err) = self.activate() {
                eprintln!("rkvm-vmm: a virtio device does not start: {err:#}");
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            }
        }
    }

    fn activate(&mut self) -> anyhow::Result<()> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = self.queues.drain(..).zip(&self.notify);
        let rings = queues
            .map(|(mut queue, notify)| {
                // A queue that lies outside of memory is one that is not there.
                if !queue.is_valid(&self.memory) {
                    return Ok(None);
                }
                queue.set_event_idx(event_idx);
                Ok(Some(Ring::new(
                    queue,
                    self.memory.clone(),
                    notify.try_clone()?,
                    self.interrupt.try_clone()?,
                )))
            })
            .collect::<io::Result<_>>()?;
        self.device.activate(self.driver_features, rings)
    }

    fn reset(&mut self) {
        self.device.reset();
        self.driver_features = 0;
        self.status = 0;
        self.interrupt_status = 0;
        self.queues = self
            .device
            .queues()
            .iter()
            // A power of two, as the devices' sizes are, cannot fail.
            .filter_map(|size| Queue::new(*size).ok())
            .collect();
    }

    /// Writes what registers read as to the page.
    fn render(&self) {
        let shift = if self.device_features_high { 32 } else { 0 };
        let sizes = self.device.queues();
        let queue = self.queues.get(self.queue_select as usize);
        let interrupt_status = if self.device.is_plain() {
            self.interrupt_status
        } else {
            VIRTIO_MMIO_INT_VRING
        };
        let registers = [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, VERSION),
            (VIRTIO_MMIO_DEVICE_ID, self.device.id()),
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (
                VIRTIO_MMIO_DEVICE_FEATURES,
                (self.device.features() >> shift) as u32,
            ),
            (
                VIRTIO_MMIO_QUEUE_NUM_MAX,
                sizes
                    .get(self.queue_select as usize)
                    .copied()
                    .unwrap_or(0)
                    .into(),
            ),
            (
                VIRTIO_MMIO_QUEUE_READY,
                queue.is_some_and(|queue| queue.ready()).into(),
            ),
            (VIRTIO_MMIO_INTERRUPT_STATUS, interrupt_status),
            (VIRTIO_MMIO_STATUS, self.status),
        ];
        let page = self.page.as_volatile_slice();
        let put = |offset: u32, value: u32| {
            // Every register is in the page, and at a multiple of its size.
            let _ = page.store(value, offset as usize, std::sync::atomic::Ordering::Relaxed);
        };
        for (offset, value) in registers {
            put(offset, value);
        }
        for offset in SHARED_MEMORY.step_by(4) {
            put(offset, u32::MAX);
        }
        let _ = page.write_slice(&self.device.config(), VIRTIO_MMIO_CONFIG as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use std::sync::Arc;
    use std::sync::Mutex;

    /// What a test's device has been told.
    #[derive(Default)]
    struct Told {
        active: Option<(u64, Vec<bool>)>,
        notified: usize,
    }

    struct Probe {
        told: Arc<Mutex<Told>>,
        plain: bool,
    }

    impl Device for Probe {
        fn id(&self) -> u32 {
            42
        }
        fn queues(&self) -> &'static [u16] {
            &[16, 8]
        }
        fn config(&self) -> Vec<u8> {
            vec![1, 2, 3]
        }
        fn is_plain(&self) -> bool {
            self.plain
        }
        fn activate(&mut self, features: u64, queues: Vec<Option<Ring>>) -> anyhow::Result<()> {
            let there = queues.iter().map(Option::is_some).collect();
            self.told.lock().unwrap().active = Some((features, there));
            Ok(())
        }
        fn reset(&mut self) {
            self.told.lock().unwrap().active = None;
        }
        fn notified(&mut self) -> bool {
            self.told.lock().unwrap().notified += 1;
            true
        }
    }

    fn probe(plain: bool) -> (Mmio, Arc<Mutex<Told>>) {
        let told = Arc::new(Mutex::new(Told::default()));
        let device = Box::new(Probe {
            told: told.clone(),
            plain,
        });
        let memory = memory::allocate(1 << 20).unwrap();
        (Mmio::new(device, memory).unwrap(), told)
    }

    fn read(mmio: &Mmio, register: u32) -> u32 {
        let mut data = [0; 4];
        mmio.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(mmio: &mut Mmio, register: u32, value: u32) {
        mmio.write(register.into(), &value.to_le_bytes());
    }

    /// As a driver does it, with queue 0 only.
    fn start(mmio: &mut Mmio) {
        for (register, value) in [
            (VIRTIO_MMIO_STATUS, 0),
            (VIRTIO_MMIO_STATUS, 3),
            (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
            (VIRTIO_MMIO_DRIVER_FEATURES, 1),
            (VIRTIO_MMIO_STATUS, 11),
            (VIRTIO_MMIO_QUEUE_SEL, 0),
            (VIRTIO_MMIO_QUEUE_NUM, 8),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000),
            (VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000),
            (VIRTIO_MMIO_QUEUE_READY, 1),
            (VIRTIO_MMIO_STATUS, 15),
        ] {
            write(mmio, register, value);
        }
    }

    #[test]
    fn is_found() {
        let (mut mmio, _) = probe(false);
        assert_eq!(read(&mmio, VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
        assert_eq!(read(&mmio, VIRTIO_MMIO_DEVICE_ID), 42);
        assert_eq!(read(&mmio, VIRTIO_MMIO_QUEUE_NUM_MAX), 16);
        write(&mut mmio, VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!(read(&mmio, VIRTIO_MMIO_QUEUE_NUM_MAX), 8);
        write(&mut mmio, VIRTIO_MMIO_QUEUE_SEL, 2);
        assert_eq!(read(&mmio, VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        write(&mut mmio, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(read(&mmio, VIRTIO_MMIO_DEVICE_FEATURES), 1);
        let mut config = [0; 2];
        mmio.read(0x101, &mut config);
        assert_eq!(config, [2, 3]);
        mmio.read(0xfff, &mut config);
        assert_eq!(config, [0xff; 2]);
    }

    #[test]
    fn starts_and_resets() {
        let (mut mmio, told) = probe(false);
        start(&mut mmio);
        assert_eq!(read(&mmio, VIRTIO_MMIO_STATUS), 15);
        assert_eq!(
            told.lock().unwrap().active,
            Some((1 << 32, vec![true, false]))
        );
        // Too late.
        write(&mut mmio, VIRTIO_MMIO_QUEUE_NUM, 4);
        write(&mut mmio, VIRTIO_MMIO_STATUS, 0);
        assert_eq!(told.lock().unwrap().active, None);
        assert_eq!(read(&mmio, VIRTIO_MMIO_STATUS), 0);
        start(&mut mmio);
        assert!(told.lock().unwrap().active.is_some());
    }

    #[test]
    fn features_that_were_not_offered() {
        let (mut mmio, _) = probe(false);
        write(&mut mmio, VIRTIO_MMIO_DRIVER_FEATURES, 1);
        write(&mut mmio, VIRTIO_MMIO_STATUS, 11);
        assert_eq!(read(&mmio, VIRTIO_MMIO_STATUS), 3);
    }

    #[test]
    fn queue_outside_of_memory() {
        let (mut mmio, told) = probe(false);
        write(&mut mmio, VIRTIO_MMIO_QUEUE_DESC_HIGH, 0xffff_ffff);
        write(&mut mmio, VIRTIO_MMIO_QUEUE_READY, 1);
        write(&mut mmio, VIRTIO_MMIO_STATUS, 15);
        assert_eq!(told.lock().unwrap().active, Some((0, vec![false, false])));
    }

    #[test]
    fn edges_need_no_register() {
        let (mut mmio, _) = probe(false);
        start(&mut mmio);
        assert_eq!(mmio.level(), None);
        write(&mut mmio, VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(read(&mmio, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        write(&mut mmio, VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        assert_eq!(mmio.notify_files().unwrap()[1].read().unwrap(), 1);
        write(&mut mmio, VIRTIO_MMIO_QUEUE_NOTIFY, 2);
    }

    #[test]
    fn level_of_a_plain_device() {
        let (mut mmio, told) = probe(true);
        start(&mut mmio);
        assert_eq!(mmio.level(), Some(false));
        write(&mut mmio, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert_eq!(told.lock().unwrap().notified, 1);
        assert_eq!(mmio.level(), Some(true));
        assert_eq!(read(&mmio, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        write(&mut mmio, VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(mmio.level(), Some(false));
        assert!(mmio.notify_files().is_none());
    }
}
