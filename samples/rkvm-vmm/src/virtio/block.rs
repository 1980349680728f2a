// SPDX-License-Identifier: GPL-2.0

//! A disk in a file (virtio 1.2, "Block Device").

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::ensure;
use anyhow::Context;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::ByteValued;

use super::queue::Chain;
use super::queue::Ring;
use super::worker::Job;
use super::worker::Worker;
use super::Device;
use crate::memory::Memory;

const SECTOR: u64 = 512;
/// Most buffers of a request.
const SEGMENTS: u32 = 126;
/// How much is copied between the file and the guest at a time.
const CHUNK: usize = 64 << 10;
/// What `VIRTIO_BLK_T_GET_ID` returns, filled up with zeros.
const ID: &[u8] = b"rkvm-vmm";

/// The disk.
pub struct Block {
    disk: Arc<Disk>,
    worker: Option<Worker>,
}

/// The file.
struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

/// What a request begins with.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

// SAFETY: numbers without padding between or behind them; any bytes are such.
unsafe impl ByteValued for Header {}

impl Block {
    /// Opens the disk in the file or block device `path`.
    ///
    /// # Errors
    /// It cannot be opened, or is no multiple of a sector long.
    pub fn open(path: &Path, read_only: bool) -> anyhow::Result<Self> {
        let describe = || format!("cannot use {} as a disk", path.display());
        let mut file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .with_context(describe)?;
        // Unlike the file's metadata this knows how long a block device is.
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0)).with_context(describe)?;
        ensure!(
            bytes > 0 && bytes % SECTOR == 0,
            "cannot use {} as a disk: its {bytes} bytes are no number of sectors of {SECTOR}",
            path.display()
        );
        Ok(Self {
            disk: Arc::new(Disk {
                file,
                sectors: bytes / SECTOR,
                read_only,
            }),
            worker: None,
        })
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features =
            super::FEATURES | (1 << VIRTIO_BLK_F_SEG_MAX) | (1 << VIRTIO_BLK_F_BLK_SIZE);
        features |= 1
            << if self.disk.read_only {
                VIRTIO_BLK_F_RO
            } else {
                VIRTIO_BLK_F_FLUSH
            };
        features
    }

    fn queues(&self) -> &'static [u16] {
        &[256]
    }

    fn config(&self) -> Vec<u8> {
        // Capacity, size_max, seg_max, geometry (4 bytes), blk_size, and nothing behind that.
        let mut config = vec![0; 60];
        config[0..8].copy_from_slice(&self.disk.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config
    }

    fn activate(&mut self, _features: u64, mut queues: Vec<Option<Ring>>) -> anyhow::Result<()> {
        if let Some(ring) = queues.pop().flatten() {
            let disk = self.disk.clone();
            self.worker = Some(Worker::start("virtio-blk", Requests { disk, ring })?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The thread's.
struct Requests {
    disk: Arc<Disk>,
    ring: Ring,
}

impl Job for Requests {
    fn files(&self) -> Vec<RawFd> {
        vec![self.ring.notify.as_raw_fd()]
    }

    fn ready(&mut self, _index: usize) {
        let _ = self.ring.notify.read();
        let disk = &self.disk;
        self.ring
            .serve(|chain, memory| Some(disk.request(chain, memory)));
    }
}

impl Disk {
    /// Does a request; returns how many bytes were written to its buffers.
    fn request(&self, chain: Chain<'_>, memory: &Memory) -> u32 {
        let (Ok(mut from), Ok(mut to)) = (chain.clone().reader(memory), chain.writer(memory))
        else {
            return 0;
        };
        // The last byte is for the status.
        let Some(room) = to.available_bytes().checked_sub(1) else {
            return 0;
        };
        let (Ok(header), Ok(mut status)) = (from.read_obj::<Header>(), to.split_at(room)) else {
            return 0;
        };
        let at = header.sector;
        let result = match header.kind {
            VIRTIO_BLK_T_IN => self.read(at, room, &mut to),
            VIRTIO_BLK_T_OUT => self.write(at, from.available_bytes(), &mut from),
            VIRTIO_BLK_T_FLUSH => self.file.sync_data(),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id[..ID.len()].copy_from_slice(ID);
                to.write_all(&id[..room.min(id.len())])
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        let code = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(err) if err.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        let told = status.write_obj(code as u8).is_ok();
        to.bytes_written() as u32 + u32::from(told)
    }

    /// Returns where `size` bytes at `sector` are in the file, if they are.
    fn offset(&self, sector: u64, size: usize) -> io::Result<u64> {
        let end = sector.checked_add((size as u64).div_ceil(SECTOR));
        if size as u64 % SECTOR != 0 || end.is_none_or(|end| end > self.sectors) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(sector * SECTOR)
    }

    fn read(&self, sector: u64, size: usize, to: &mut impl Write) -> io::Result<()> {
        let offset = self.offset(sector, size)?;
        let mut buffer = vec![0; size.min(CHUNK)];
        for done in (0..size).step_by(CHUNK) {
            let part = &mut buffer[..CHUNK.min(size - done)];
            self.file.read_exact_at(part, offset + done as u64)?;
            to.write_all(part)?;
        }
        Ok(())
    }

    fn write(&self, sector: u64, size: usize, from: &mut impl Read) -> io::Result<()> {
        let offset = self.offset(sector, size)?;
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut buffer = vec![0; size.min(CHUNK)];
        for done in (0..size).step_by(CHUNK) {
            let part = &mut buffer[..CHUNK.min(size - done)];
            from.read_exact(part)?;
            self.file.write_all_at(part, offset + done as u64)?;
        }
        Ok(())
    }
}
