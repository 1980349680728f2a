// SPDX-License-Identifier: GPL-2.0

//! What the host has to move, share and take away memory: its knobs and counts, swap on compressed
//! memory, the merging of equal pages. What a guard switched on is off again when it is dropped.

use crate::sys::Error;
use crate::{skip, Verdict};
use std::fs;

/// An event count of `/proc/vmstat`; 0 if there is none of that name.
#[must_use]
pub fn vmstat(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text
        .lines()
        .find(|l| l.strip_prefix(key).is_some_and(|r| r.starts_with(' ')));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// Writes to a file of `/proc` or `/sys`.
///
/// # Errors
///
/// The failure, with the file's name.
pub fn set(path: &str, value: &str) -> Result<(), Verdict> {
    fs::write(path, value).map_err(|e| Verdict::Fail(format!("write of {value:?} to {path}: {e}")))
}

/// Reads a number from a file of `/proc` or `/sys`.
#[must_use]
pub fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A file that is set to a value, and back when dropped.
#[derive(Debug)]
pub struct Knob {
    path: String,
    old: String,
}

impl Knob {
    /// Sets the file; a test that needs one that is not there is skipped.
    ///
    /// # Errors
    ///
    /// A skip if there is no such file, the failure if it takes no such value.
    pub fn set(path: &str, value: &str) -> Result<Self, Verdict> {
        let Ok(old) = fs::read_to_string(path) else {
            skip!("the kernel has no {path}");
        };
        set(path, value)?;
        // A choice is shown as all that there are, with the one taken in brackets.
        let chosen = old.split_once('[').and_then(|(_, r)| r.split_once(']'));
        let old = chosen.map_or(old.trim(), |(c, _)| c).to_string();
        Ok(Knob {
            path: path.into(),
            old,
        })
    }
}

impl Drop for Knob {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.old);
    }
}

/// A device of compressed memory, of the module `zram`.
#[derive(Debug)]
pub struct Zram {
    number: u64,
}

impl Zram {
    /// Adds a device of `bytes`. A test is skipped where the module is not loaded.
    ///
    /// # Errors
    ///
    /// A skip, or the failure.
    pub fn new(bytes: u64) -> Result<Self, Verdict> {
        let Some(number) = number("/sys/class/zram-control/hot_add") else {
            skip!("the module zram is not loaded");
        };
        let zram = Zram { number };
        set(
            &format!("/sys/block/zram{number}/disksize"),
            &bytes.to_string(),
        )?;
        Ok(zram)
    }

    /// The device's node.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/dev/zram{}", self.number)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let number = self.number.to_string();
        let _ = fs::write(format!("/sys/block/zram{number}/reset"), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", number);
    }
}

/// Swap on compressed memory.
#[derive(Debug)]
pub struct Swap {
    zram: Zram,
}

impl Swap {
    /// Switches swap on.
    ///
    /// # Errors
    ///
    /// A skip if the module `zram` is not loaded, or the failure.
    pub fn new(bytes: u64) -> Result<Self, Verdict> {
        let zram = Zram::new(bytes)?;
        // What mkswap writes: version 1, the last page, no bad pages; the signature ends the page.
        let mut header = vec![0u8; 4096];
        header[1024..1028].copy_from_slice(&1u32.to_le_bytes());
        let last = u32::try_from(bytes / 4096 - 1).unwrap_or(u32::MAX);
        header[1028..1032].copy_from_slice(&last.to_le_bytes());
        header[4086..].copy_from_slice(b"SWAPSPACE2");
        let path = zram.path();
        fs::write(&path, header).map_err(|e| Verdict::Fail(format!("write of {path}: {e}")))?;
        let swap = Swap { zram };
        swap.on()?;
        Ok(swap)
    }

    fn node(&self) -> std::ffi::CString {
        std::ffi::CString::new(self.zram.path()).unwrap_or_default()
    }

    /// Switches it on again.
    ///
    /// # Errors
    ///
    /// The failure of `swapon`.
    pub fn on(&self) -> Result<(), Error> {
        // SAFETY: The path is a string with its terminator.
        if unsafe { libc::swapon(self.node().as_ptr(), 0) } != 0 {
            return Err(Error::last("swapon"));
        }
        Ok(())
    }

    /// Switches it off: all that is swapped out comes back.
    ///
    /// # Errors
    ///
    /// The failure of `swapoff`.
    pub fn off(&self) -> Result<(), Error> {
        // SAFETY: The path is a string with its terminator.
        if unsafe { libc::swapoff(self.node().as_ptr()) } != 0 {
            return Err(Error::last("swapoff"));
        }
        Ok(())
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = self.off();
    }
}

const KSM: &str = "/sys/kernel/mm/ksm/";

/// The kernel's thread that merges equal pages, going fast.
#[derive(Debug)]
pub struct Ksm {
    _knobs: Vec<Knob>,
}

impl Ksm {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// A skip if the kernel has none.
    pub fn new() -> Result<Self, Verdict> {
        let mut knobs = Vec::new();
        for (name, value) in [
            ("sleep_millisecs", "1"),
            ("pages_to_scan", "2000"),
            ("smart_scan", "0"),
            ("run", "1"),
        ] {
            knobs.push(Knob::set(&format!("{KSM}{name}"), value)?);
        }
        Ok(Ksm { _knobs: knobs })
    }

    /// Stops it; what is merged stays so.
    ///
    /// # Errors
    ///
    /// The failure of the write.
    pub fn pause(&self) -> Result<(), Verdict> {
        set(&format!("{KSM}run"), "0")
    }

    /// Has it go on.
    ///
    /// # Errors
    ///
    /// The failure of the write.
    pub fn go_on(&self) -> Result<(), Verdict> {
        set(&format!("{KSM}run"), "1")
    }

    /// Makes all merged pages single again, and goes on.
    ///
    /// # Errors
    ///
    /// The failure of the write.
    pub fn break_all(&self) -> Result<(), Verdict> {
        set(&format!("{KSM}run"), "2")?;
        set(&format!("{KSM}run"), "1")
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        // Nothing of a test's is to stay merged; the knobs follow.
        let _ = fs::write(format!("{KSM}run"), "2");
    }
}

/// How many of this process's pages are merged with others.
#[must_use]
pub fn merged_pages() -> u64 {
    number("/proc/self/ksm_merging_pages").unwrap_or(0)
}

/// A group of processes with this one in it, to put what memory they have under pressure.
#[derive(Debug)]
pub struct Group {
    at: String,
}

impl Group {
    /// Makes the group and moves this process to it: what it allocates from now on is the group's.
    ///
    /// # Errors
    ///
    /// A skip if the kernel has no such groups.
    pub fn new() -> Result<Self, Verdict> {
        let root = "/tmp/cgroup";
        let _ = fs::create_dir_all(root);
        let path = c"/tmp/cgroup".as_ptr();
        // SAFETY: Strings with their terminators.
        let r = unsafe {
            libc::mount(
                c"none".as_ptr(),
                path,
                c"cgroup2".as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        if r != 0 && Error::last("mount").errno != libc::EBUSY {
            skip!("no cgroup2");
        }
        set(&format!("{root}/cgroup.subtree_control"), "+memory")?;
        let at = format!("{root}/test{}", std::process::id());
        fs::create_dir(&at).map_err(|e| Verdict::Fail(format!("{at}: {e}")))?;
        set(&format!("{at}/cgroup.procs"), "0")?;
        Ok(Group { at })
    }

    /// Takes about `bytes` of the group's memory away, as pressure would.
    pub fn reclaim(&self, bytes: u64) {
        // EAGAIN says that it was less.
        let _ = fs::write(format!("{}/memory.reclaim", self.at), bytes.to_string());
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write("/tmp/cgroup/cgroup.procs", "0");
        let _ = fs::remove_dir(&self.at);
    }
}

/// The nodes of memory.
#[must_use]
pub fn nodes() -> i32 {
    (0..64)
        .take_while(|n| fs::exists(format!("/sys/devices/system/node/node{n}")).unwrap_or(false))
        .last()
        .map_or(1, |n| n + 1)
}

/// The entries of `/proc/self/pagemap` for `pages` pages from `addr` on.
///
/// # Errors
///
/// The failure.
pub fn pagemap(addr: usize, pages: usize) -> Result<Vec<u64>, Verdict> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0u8; pages * 8];
    fs::File::open("/proc/self/pagemap")
        .and_then(|f| f.read_exact_at(&mut bytes, (addr / 4096 * 8) as u64))
        .map_err(|e| Verdict::Fail(format!("/proc/self/pagemap: {e}")))?;
    Ok(bytes
        .chunks_exact(8)
        .map(|b| b.iter().rev().fold(0, |v, b| (v << 8) | u64::from(*b)))
        .collect())
}

/// The frame's number in an entry of `pagemap`, if the page is present.
#[must_use]
pub fn frame(entry: u64) -> Option<u64> {
    (entry >> 63 == 1).then_some(entry & ((1 << 55) - 1))
}
