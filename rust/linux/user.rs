// SPDX-License-Identifier: GPL-2.0

//! The memory of the process that made an ioctl, by address.

use kernel::prelude::*;
use kernel::transmute::AsBytes;
use kernel::transmute::FromBytes;
use kernel::uaccess::UserPtr;
use kernel::uaccess::UserSlice;

/// Reads a value: EFAULT.
pub(crate) fn read<T: FromBytes>(addr: usize) -> Result<T> {
    UserSlice::new(UserPtr::from_addr(addr), size_of::<T>())
        .reader()
        .read()
}

/// Writes a value: EFAULT.
pub(crate) fn write<T: AsBytes>(addr: usize, value: &T) -> Result {
    UserSlice::new(UserPtr::from_addr(addr), size_of::<T>())
        .writer()
        .write(value)
}

/// Reads bytes: EFAULT.
pub(crate) fn read_bytes(addr: usize, out: &mut [u8]) -> Result {
    UserSlice::new(UserPtr::from_addr(addr), out.len())
        .reader()
        .read_slice(out)
}

/// Writes bytes: EFAULT.
pub(crate) fn write_bytes(addr: usize, data: &[u8]) -> Result {
    UserSlice::new(UserPtr::from_addr(addr), data.len())
        .writer()
        .write_slice(data)
}

/// Reads `count` values that follow each other. The caller has bounded `count`.
pub(crate) fn read_array<T: FromBytes>(addr: usize, count: usize) -> Result<KVVec<T>> {
    let mut out = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
    let bytes = count.checked_mul(size_of::<T>()).ok_or(E2BIG)?;
    let mut reader = UserSlice::new(UserPtr::from_addr(addr), bytes).reader();
    for _ in 0..count {
        out.push(reader.read()?, GFP_KERNEL_ACCOUNT)?;
    }
    Ok(out)
}

/// Writes values one after the other: EFAULT.
pub(crate) fn write_array<T: AsBytes>(addr: usize, values: &[T]) -> Result {
    let mut writer = UserSlice::new(UserPtr::from_addr(addr), size_of_val(values)).writer();
    for value in values {
        writer.write(value)?;
    }
    Ok(())
}

/// Reads words: EFAULT.
pub(crate) fn read_words(addr: usize, out: &mut [u64]) -> Result {
    read_bytes(addr, AsBytes::as_bytes_mut(out))
}

/// Writes words: EFAULT.
pub(crate) fn write_words(addr: usize, data: &[u64]) -> Result {
    write_bytes(addr, AsBytes::as_bytes(data))
}
