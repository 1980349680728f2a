// SPDX-License-Identifier: GPL-2.0

//! The kinds of memory that a host can give to a guest.

use crate::mem::{Mapping, HUGE, PAGE};
use crate::pressure::{number, set, Zram};
use crate::sys::Error;
use crate::{ensure, skip, Verdict};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// A kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anonymous, no huge pages.
    Small,
    /// Anonymous, huge pages where possible.
    Thp,
    /// Anonymous, shared.
    Shared,
    /// A memfd, shared.
    Memfd,
    /// A file in tmpfs, shared.
    TmpfsShared,
    /// A file in tmpfs, private.
    TmpfsPrivate,
    /// A file on a disk, shared.
    DiskShared,
    /// A file on a disk, private.
    DiskPrivate,
    /// The pool of 2 MiB pages, shared.
    Huge2M,
    /// The pool of 1 GiB pages, shared.
    Huge1G,
}

/// A file system on a disk, mounted.
#[derive(Debug)]
struct Disk {
    at: String,
    _zram: Zram,
}

impl Disk {
    fn new(bytes: u64) -> Result<Self, Verdict> {
        let zram = Zram::new(bytes)?;
        let node = zram.path();
        let made = std::process::Command::new("mke2fs")
            .args(["-b", "4096", &node])
            .stdout(std::process::Stdio::null())
            .status();
        ensure!(made.is_ok_and(|s| s.success()), "mke2fs {node}");
        let at = format!("/tmp/disk{}", std::process::id());
        let error = |e| Verdict::Fail(format!("mount of {node}: {e}"));
        std::fs::create_dir_all(&at).map_err(error)?;
        let (from, to) = (format!("{node}\0"), format!("{at}\0"));
        // SAFETY: Strings with their terminators.
        let r = unsafe {
            libc::mount(
                from.as_ptr().cast(),
                to.as_ptr().cast(),
                c"ext2".as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        if r != 0 {
            return Err(Error::last("mount").into());
        }
        Ok(Disk { at, _zram: zram })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let at = format!("{}\0", self.at);
        // SAFETY: A string with its terminator.
        unsafe { libc::umount2(at.as_ptr().cast(), 0) };
        let _ = std::fs::remove_dir(&self.at);
    }
}

/// Huge pages in their pool, that are given back when dropped.
#[derive(Debug)]
pub struct Pool {
    path: String,
    old: u64,
}

impl Pool {
    /// Has the pool of pages of `size` KiB hold `pages` more. A test is skipped if it cannot.
    ///
    /// # Errors
    ///
    /// A skip.
    pub fn new(size: usize, pages: u64) -> Result<Self, Verdict> {
        let pool = Self::up_to(size, pages)?;
        let (got, wanted) = (number(&pool.path).unwrap_or(0), pool.old + pages);
        if got < wanted {
            skip!("{got} pages of {size} KiB, wanted are {wanted}");
        }
        Ok(pool)
    }

    /// As [`Pool::new`], or with as many pages as can be had.
    ///
    /// # Errors
    ///
    /// A skip if there are no such pages at all.
    pub fn up_to(size: usize, pages: u64) -> Result<Self, Verdict> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{size}kB/nr_hugepages");
        let Some(old) = number(&path) else {
            skip!("the processor has no pages of {size} KiB");
        };
        let pool = Pool { path, old };
        set(&pool.path, &(old + pages).to_string())?;
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, self.old.to_string());
    }
}

/// Memory of a kind. The order of the fields is the order in which they are dropped.
#[derive(Debug)]
pub struct Backing {
    /// The memory.
    pub memory: Mapping,
    /// Its kind.
    pub kind: Kind,
    /// The file that it is of.
    pub file: Option<std::fs::File>,
    _disk: Option<Disk>,
    _pool: Option<Pool>,
}

impl Backing {
    /// Memory of `len` bytes. `contents` is called with the file, if it is to have any.
    ///
    /// # Errors
    ///
    /// A skip if that kind is not to be had, or the failure.
    pub fn new(
        kind: Kind,
        len: usize,
        contents: impl FnOnce(&std::fs::File) -> std::io::Result<()>,
    ) -> Result<Self, Verdict> {
        let disk = match kind {
            Kind::DiskShared | Kind::DiskPrivate => Some(Disk::new(2 * len as u64 + (4 << 20))?),
            _ => None,
        };
        let pool = match kind {
            Kind::Huge2M => Some(Pool::new(2048, (len / HUGE) as u64)?),
            Kind::Huge1G => Some(Pool::new(1 << 20, 1)?),
            _ => None,
        };
        let file = match kind {
            Kind::Small | Kind::Thp | Kind::Shared => None,
            Kind::Memfd => Some(memfd(0)?),
            Kind::Huge2M => Some(memfd(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)?),
            Kind::Huge1G => Some(memfd(libc::MFD_HUGETLB | libc::MFD_HUGE_1GB)?),
            Kind::TmpfsShared | Kind::TmpfsPrivate => Some(unlinked("/tmp")?),
            Kind::DiskShared | Kind::DiskPrivate => {
                Some(unlinked(disk.as_ref().map_or("", |d| &d.at))?)
            }
        };
        if let Some(file) = &file {
            file.set_len(len as u64)
                .and_then(|()| contents(file))
                .map_err(|e| Verdict::Fail(format!("a file of {len} bytes: {e}")))?;
        }
        let align = if kind == Kind::Huge1G { 1 << 30 } else { HUGE };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let memory = Mapping::with(len, align, kind.flags(), fd)?;
        match kind {
            Kind::Small => memory.advise(0, len, libc::MADV_NOHUGEPAGE)?,
            Kind::Thp => {
                if memory.advise(0, len, libc::MADV_HUGEPAGE).is_err() {
                    skip!("no transparent huge pages");
                }
            }
            _ => {}
        }
        Ok(Backing {
            memory,
            kind,
            file,
            _disk: disk,
            _pool: pool,
        })
    }

    /// Maps a part of the memory anew, as after `munmap`.
    ///
    /// # Errors
    ///
    /// The failure of `mmap`.
    pub fn map_again(&self, offset: usize, len: usize) -> Result<(), Error> {
        let fd = self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        self.memory.replace(offset, len, self.kind.flags(), fd)
    }

    /// Reads the file itself.
    ///
    /// # Errors
    ///
    /// The failure, or that there is none.
    pub fn read_file(&self, offset: usize) -> Result<u64, Verdict> {
        let mut data = [0; 8];
        match &self.file {
            Some(f) => f
                .read_exact_at(&mut data, offset as u64)
                .map_err(|e| Verdict::Fail(format!("read of the file: {e}")))?,
            None => return Err(Verdict::Fail("there is no file".into())),
        }
        Ok(u64::from_le_bytes(data))
    }
}

impl Kind {
    /// The flags for `mmap`.
    #[must_use]
    pub fn flags(self) -> i32 {
        let anonymous = libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        match self {
            Kind::Small | Kind::Thp => libc::MAP_PRIVATE | anonymous,
            Kind::Shared => libc::MAP_SHARED | anonymous,
            Kind::TmpfsPrivate | Kind::DiskPrivate => libc::MAP_PRIVATE,
            _ => libc::MAP_SHARED,
        }
    }

    /// Whether what one process writes is its own.
    #[must_use]
    pub fn is_private(self) -> bool {
        self.flags() & libc::MAP_PRIVATE != 0
    }

    /// Whether it has no file, and is private.
    #[must_use]
    pub fn is_anonymous(self) -> bool {
        matches!(self, Kind::Small | Kind::Thp)
    }

    /// The size of its pages as far as mappings can be cut.
    #[must_use]
    pub fn granule(self) -> usize {
        match self {
            Kind::Huge2M => HUGE,
            Kind::Huge1G => 1 << 30,
            _ => PAGE,
        }
    }
}

fn memfd(flags: libc::c_uint) -> Result<std::fs::File, Verdict> {
    // SAFETY: The name is a string with its terminator.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(Error::last("memfd_create").into());
    }
    // SAFETY: A new descriptor that is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

fn unlinked(directory: &str) -> Result<std::fs::File, Verdict> {
    let path = format!("{directory}/guest{}", std::process::id());
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .and_then(|f| std::fs::remove_file(&path).map(|()| f));
    file.map_err(|e| Verdict::Fail(format!("{path}: {e}")))
}
