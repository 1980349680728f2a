// SPDX-License-Identifier: GPL-2.0

//! A network interface at a TAP device of the host's (virtio 1.2, "Network Device"). The frames are
//! moved by a thread here, or by the kernel's vhost-net, which takes the notifications and gives the
//! interrupts itself: then not even the VMM is woken.

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use anyhow::ensure;
use anyhow::Context;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as VhostNetFile;
use vhost::VhostBackend;
use vhost::VhostUserMemoryRegionInfo;
use vhost::VringConfigData;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_queue::QueueT;
use vm_memory::GuestMemory;
use vm_memory::GuestMemoryRegion;

use super::queue::Ring;
use super::worker::Job;
use super::worker::Worker;
use super::Device;
use crate::memory::Memory;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUES: [u16; 2] = [256, 256];

/// What virtio has before each frame; the TAP device is told to have the same.
const HEADER: libc::c_int = 12;
/// The longest frame without segmentation offload, of which none is offered, with its header.
const FRAME: usize = 65536;

/// Locally administered.
const MAC: [u8; 6] = [0x02, b'r', b'k', b'v', b'm', 0];

/// A network interface.
pub struct Net {
    tap: Arc<File>,
    memory: Memory,
    vhost: Option<VhostNetFile<Arc<Memory>>>,
    /// With vhost: it has the queues.
    running: bool,
    worker: Option<Worker>,
}

/// `struct ifreq`, as far as TUNSETIFF looks at it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

impl Net {
    /// Attaches to the TAP device `name`, which is made if it is not there.
    ///
    /// # Errors
    /// The device cannot be attached to, or vhost-net is asked for and is not there.
    pub fn open(name: &str, vhost: bool, memory: &Memory) -> anyhow::Result<Self> {
        let tap = open_tap(name).with_context(|| format!("cannot use the TAP device {name}"))?;
        let vhost = vhost
            .then(|| {
                let vhost = VhostNetFile::new(Arc::new(memory.clone()))?;
                vhost.set_owner()?;
                Ok::<_, vhost::Error>(vhost)
            })
            .transpose()
            .context("cannot use /dev/vhost-net; is the module vhost_net loaded?")?;
        Ok(Self {
            tap: Arc::new(tap),
            memory: memory.clone(),
            vhost,
            running: false,
            worker: None,
        })
    }

    /// Gives the queues to vhost-net.
    fn start_vhost(&self, features: u64, queues: &[Option<Ring>]) -> vhost::Result<()> {
        let Some(vhost) = &self.vhost else {
            return Ok(());
        };
        // What is between driver and device is not vhost's affair.
        vhost.set_features(features & vhost.get_features()?)?;
        let regions: Vec<_> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..Default::default()
            })
            .collect();
        vhost.set_mem_table(&regions)?;
        for (index, ring) in queues.iter().enumerate() {
            let Some(ring) = ring else {
                continue;
            };
            let queue = ring.queue();
            vhost.set_vring_num(index, queue.size())?;
            vhost.set_vring_base(index, 0)?;
            vhost.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: queue.max_size(),
                    queue_size: queue.size(),
                    desc_table_addr: queue.desc_table(),
                    avail_ring_addr: queue.avail_ring(),
                    used_ring_addr: queue.used_ring(),
                    ..Default::default()
                },
            )?;
            vhost.set_vring_call(index, ring.interrupt())?;
            vhost.set_vring_kick(index, &ring.notify)?;
            vhost.set_backend(index, Some(&self.tap))?;
        }
        Ok(())
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        super::FEATURES | (1 << VIRTIO_NET_F_MAC)
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        MAC.to_vec()
    }

    fn activate(&mut self, features: u64, mut queues: Vec<Option<Ring>>) -> anyhow::Result<()> {
        if self.vhost.is_some() {
            self.running = true;
            return self
                .start_vhost(features, &queues)
                .context("vhost-net does not take the queues");
        }
        let job = Frames {
            transmit: queues.remove(TRANSMIT),
            receive: queues.remove(RECEIVE),
            tap: self.tap.clone(),
            starved: false,
        };
        self.worker = Some(Worker::start("virtio-net", job)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        if let (Some(vhost), true) = (&self.vhost, std::mem::take(&mut self.running)) {
            for index in 0..QUEUES.len() {
                // Of a queue that it was not given it has nothing to let go.
                let _ = vhost.set_backend(index, None);
            }
        }
    }
}

fn open_tap(name: &str) -> anyhow::Result<File> {
    ensure!(
        !name.is_empty() && name.len() < libc::IFNAMSIZ,
        "the name of an interface has 1 to {} bytes",
        libc::IFNAMSIZ - 1
    );
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun; is the module tun loaded?")?;
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the structure is as long as the kernel's, and complete.
    let attached = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &request) };
    ensure!(
        attached == 0,
        "TUNSETIFF failed: {}",
        io::Error::last_os_error()
    );
    // SAFETY: takes a pointer to a number.
    let sized = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &HEADER) };
    ensure!(
        sized == 0,
        "TUNSETVNETHDRSZ failed: {}",
        io::Error::last_os_error()
    );
    Ok(file)
}

/// The thread's.
struct Frames {
    receive: Option<Ring>,
    transmit: Option<Ring>,
    tap: Arc<File>,
    /// There may be frames for which the driver has no buffers: not to be waited for.
    starved: bool,
}

impl Job for Frames {
    fn files(&self) -> Vec<RawFd> {
        let file = |ring: &Option<Ring>| ring.as_ref().map_or(-1, |ring| ring.notify.as_raw_fd());
        let tap = if self.starved || self.receive.is_none() {
            -1
        } else {
            self.tap.as_raw_fd()
        };
        vec![file(&self.receive), file(&self.transmit), tap]
    }

    fn ready(&mut self, index: usize) {
        let mut tap = &*self.tap;
        let mut frame = vec![0; FRAME];
        match (index, &mut self.receive, &mut self.transmit) {
            (TRANSMIT, _, Some(ring)) => {
                let _ = ring.notify.read();
                ring.serve(|chain, memory| {
                    if let Ok(mut from) = chain.reader(memory) {
                        let size = from.available_bytes().min(FRAME);
                        if from.read_exact(&mut frame[..size]).is_ok() {
                            // What the host does not take is lost, as on any network.
                            let _ = tap.write(&frame[..size]);
                        }
                    }
                    Some(0)
                });
            }
            // Frames, or buffers for them.
            (_, Some(ring), _) => {
                let _ = ring.notify.read();
                // Until there is nothing more to read; else the driver has run out of buffers.
                let mut dry = false;
                ring.serve(|chain, memory| {
                    let got = match tap.read(&mut frame) {
                        Ok(got) => got,
                        Err(_) => {
                            dry = true;
                            return None;
                        }
                    };
                    if let Some(buffers) = frame.get_mut(10..12) {
                        // So many chains for this frame: without mergeable buffers it is one.
                        buffers.copy_from_slice(&1u16.to_le_bytes());
                    }
                    let written = chain
                        .writer(memory)
                        .ok()
                        .and_then(|mut to| to.write_all(&frame[..got]).ok());
                    Some(written.map_or(0, |()| got as u32))
                });
                self.starved = !dry;
            }
            _ => {}
        }
    }
}
