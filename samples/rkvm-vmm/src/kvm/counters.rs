// SPDX-License-Identifier: GPL-2.0

//! What the kernel has counted of a vCPU, as text: a statistics file (KVM_GET_STATS_FD) names its own
//! contents.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

// kvm-ioctls does not wrap it.
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Bytes of a file's head, and of a descriptor before its name.
const HEAD: usize = 24;
const DESCRIPTOR: usize = 16;
/// More than any kernel has, so that a file which makes no sense ends somewhere.
const NAME_MAX: usize = 256;
const DESCRIPTORS_MAX: usize = 4096;

/// Returns `name=value` for each number that the kernel counts of this vCPU. Histograms are left out.
///
/// # Errors
/// The device has no such files, or this one cannot be read.
pub fn read(vcpu: &VcpuFd) -> io::Result<Vec<String>> {
    // SAFETY: the descriptor is a vCPU's; the ioctl takes no argument.
    let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
    if fd < 0 {
        return Err(errno::Error::last().into());
    }
    // SAFETY: the kernel has just made the descriptor, and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, 0)?;
    let head = Head::new(&head);
    let mut descriptors = vec![0; head.descriptors * (DESCRIPTOR + head.name_size)];
    file.read_exact_at(&mut descriptors, head.descriptors_at)?;
    let mut out = Vec::new();
    for descriptor in descriptors.chunks_exact(DESCRIPTOR + head.name_size) {
        if let Some((name, offset)) = number(descriptor) {
            let mut value = [0; 8];
            file.read_exact_at(&mut value, head.data_at + offset)?;
            out.push(format!("{name}={}", u64::from_le_bytes(value)));
        }
    }
    Ok(out)
}

/// What the head of a file says: `struct kvm_stats_header`.
struct Head {
    name_size: usize,
    descriptors: usize,
    descriptors_at: u64,
    data_at: u64,
}

impl Head {
    fn new(bytes: &[u8; HEAD]) -> Self {
        let field = |at| u32_at(bytes, at);
        Self {
            name_size: (field(4) as usize).min(NAME_MAX),
            descriptors: (field(8) as usize).min(DESCRIPTORS_MAX),
            descriptors_at: field(16).into(),
            data_at: field(20).into(),
        }
    }
}

/// The name of what a `struct kvm_stats_desc` describes, and where in the data it is, if it is one
/// number.
fn number(descriptor: &[u8]) -> Option<(String, u64)> {
    let size = u16::from_le_bytes([descriptor[6], descriptor[7]]);
    let name = &descriptor[DESCRIPTOR..];
    let end = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(name.len());
    let name = String::from_utf8_lossy(&name[..end]).into_owned();
    (size == 1).then(|| (name, u32_at(descriptor, 8).into()))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_understood() {
        let mut bytes = vec![0; DESCRIPTOR + 8];
        bytes[6] = 1;
        bytes[8..12].copy_from_slice(&0x128_u32.to_le_bytes());
        bytes[16..21].copy_from_slice(b"exits");
        assert_eq!(number(&bytes), Some(("exits".into(), 0x128)));
        // A histogram.
        bytes[6] = 32;
        assert_eq!(number(&bytes), None);
    }

    #[test]
    fn a_head_is_understood() {
        let mut bytes = [0; HEAD];
        for (at, value) in [(4, 48u32), (8, 50), (16, 72), (20, 3272)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let head = Head::new(&bytes);
        assert_eq!((head.name_size, head.descriptors), (48, 50));
        assert_eq!((head.descriptors_at, head.data_at), (72, 3272));
        assert_eq!(Head::new(&[0xff; HEAD]).descriptors, DESCRIPTORS_MAX);
    }
}
