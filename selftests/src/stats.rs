// SPDX-License-Identifier: GPL-2.0

//! The files of `KVM_GET_STATS_FD`: header, id, descriptors, data.

use crate::sys::{self, Error};
use crate::vm::Fd;
use crate::{ensure, skip, Verdict};
use kvm_bindings as kb;

/// Bytes of a header.
pub const HEADER: usize = 24;
/// Bytes of a descriptor before its name.
pub const DESCRIPTOR: usize = 16;

/// The header: what is where in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Header {
    /// None are defined.
    pub flags: u32,
    /// Bytes of each name and of the id.
    pub name_size: u32,
    /// The number of descriptors.
    pub num_desc: u32,
    /// Where the id is.
    pub id_offset: u32,
    /// Where the descriptors are.
    pub desc_offset: u32,
    /// Where the data are.
    pub data_offset: u32,
}

/// A descriptor with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desc {
    /// Type, unit and base.
    pub flags: u32,
    /// Of the base, for the unit.
    pub exponent: i16,
    /// The number of values.
    pub size: u16,
    /// Where they are among the data.
    pub offset: u32,
    /// Of a linear histogram.
    pub bucket_size: u32,
    /// The name.
    pub name: String,
}

/// A file of statistics, its descriptors read.
#[derive(Debug)]
pub struct Stats {
    /// The file.
    pub fd: Fd,
    /// Its header.
    pub header: Header,
    /// The id.
    pub id: String,
    /// The descriptors.
    pub list: Vec<Desc>,
}

/// `pread` of `len` bytes at most.
///
/// # Errors
///
/// What the kernel answered.
pub fn pread(fd: &Fd, len: usize, offset: u64) -> Result<Vec<u8>, Error> {
    let mut buffer = vec![0; len];
    let at = libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX);
    // SAFETY: The buffer has the length that is passed.
    let n = unsafe { libc::pread(fd.0, buffer.as_mut_ptr().cast(), len, at) };
    let Ok(n) = usize::try_from(n) else {
        return Err(Error::last("pread"));
    };
    buffer.truncate(n);
    Ok(buffer)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The text up to its terminator; none if it has none.
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|b| *b == 0)?;
    String::from_utf8(bytes[..end].to_vec()).ok()
}

impl Stats {
    /// Opens the statistics of the VM or vCPU whose file `of` is.
    ///
    /// # Errors
    ///
    /// What the kernel answered, or what is wrong in the file; skips if the device has none.
    pub fn open(kvm: &crate::vm::Kvm, of: &Fd) -> Result<Self, Verdict> {
        if kvm.capability(kb::KVM_CAP_BINARY_STATS_FD) <= 0 {
            skip!("no KVM_CAP_BINARY_STATS_FD");
        }
        let fd = Fd(of.ioctl(sys::KVM_GET_STATS_FD, 0)?);
        let h = pread(&fd, HEADER, 0)?;
        ensure!(h.len() == HEADER, "a header of {} bytes", h.len());
        let header = Header {
            flags: u32_at(&h, 0),
            name_size: u32_at(&h, 4),
            num_desc: u32_at(&h, 8),
            id_offset: u32_at(&h, 12),
            desc_offset: u32_at(&h, 16),
            data_offset: u32_at(&h, 20),
        };
        let name = header.name_size as usize;
        let id = pread(&fd, name, header.id_offset.into())?;
        let one = DESCRIPTOR + name;
        let bytes = pread(
            &fd,
            one * header.num_desc as usize,
            header.desc_offset.into(),
        )?;
        ensure!(
            bytes.len() == one * header.num_desc as usize,
            "{} bytes of descriptors, {header:?}",
            bytes.len()
        );
        let mut list = Vec::new();
        for d in bytes.chunks(one) {
            let Some(name) = text(&d[DESCRIPTOR..]) else {
                return Err(Verdict::Fail(format!("the name in {d:x?}")));
            };
            list.push(Desc {
                flags: u32_at(d, 0),
                exponent: i16::from_le_bytes([d[4], d[5]]),
                size: u16::from_le_bytes([d[6], d[7]]),
                offset: u32_at(d, 8),
                bucket_size: u32_at(d, 12),
                name,
            });
        }
        Ok(Stats {
            fd,
            header,
            id: text(&id).unwrap_or_default(),
            list,
        })
    }

    /// The values of a descriptor, as they are now.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn values(&self, d: &Desc) -> Result<Vec<u64>, Verdict> {
        let at = u64::from(self.header.data_offset) + u64::from(d.offset);
        let bytes = pread(&self.fd, usize::from(d.size) * 8, at)?;
        ensure!(
            bytes.len() == usize::from(d.size) * 8,
            "the data of {} are cut off",
            d.name
        );
        Ok(bytes
            .chunks(8)
            .map(|c| u64::from(u32_at(c, 0)) | (u64::from(u32_at(c, 4)) << 32))
            .collect())
    }

    /// The first value of the statistic `name`, if there is one of that name.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn get(&self, name: &str) -> Result<Option<u64>, Verdict> {
        match self.list.iter().find(|d| d.name == name) {
            Some(d) => Ok(self.values(d)?.first().copied()),
            None => Ok(None),
        }
    }

    /// As [`Stats::get`], of a statistic that has to be there.
    ///
    /// # Errors
    ///
    /// That it is not there; what the kernel answered.
    pub fn need(&self, name: &str) -> Result<u64, Verdict> {
        self.get(name)?
            .ok_or_else(|| Verdict::Fail(format!("there is no statistic {name}")))
    }
}
