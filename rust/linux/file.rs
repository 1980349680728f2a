// SPDX-License-Identifier: GPL-2.0

//! Files of our own: the character device, and the anonymous inodes of VMs, vCPUs and statistics.
//!
//! The kernel crate's `MiscDeviceRegistration` leaves `fops.owner` empty, so that an open device
//! would not hold the module. Here every `file_operations` names the module as its owner.

use crate::bindings;
use core::ffi::c_void;
use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::bindings as kb;
use kernel::error::from_err_ptr;
use kernel::error::to_result;
use kernel::fs::file::FileDescriptorReservation;
use kernel::fs::File;
use kernel::prelude::*;
use kernel::str::CStr;
use kernel::sync::aref::ARef;
use kernel::sync::Arc;
use kernel::sync::ArcBorrow;
use kernel::types::ForeignOwnable;
use kernel::types::Opaque;

/// An object behind a file descriptor.
pub(crate) trait FileObject: Send + Sync + Sized + 'static {
    /// An ioctl: the command and its argument as user space gave them.
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize>;

    /// [`read`](Self::read) is there.
    const READABLE: bool = false;

    /// Reads `len` bytes of the file, or as many as there are, from `from` on to the user's address
    /// `to`: how many were read; EFAULT.
    fn read(_this: ArcBorrow<'_, Self>, _to: usize, _len: usize, _from: u64) -> Result<usize> {
        Err(EINVAL)
    }

    /// Mapping the file: ENODEV unless the object has something to map.
    fn mmap(_this: ArcBorrow<'_, Self>, _vma: &NewVma) -> Result {
        Err(ENODEV)
    }

    /// The last reference to the file is gone. Others may still hold the object.
    fn release(_this: ArcBorrow<'_, Self>) {}
}

/// A mapping being made.
#[repr(transparent)]
pub(crate) struct NewVma(Opaque<kb::vm_area_struct>);

impl NewVma {
    /// Length in pages.
    pub(crate) fn pages(&self) -> usize {
        // SAFETY: Exists only in `mmap`, where the VMA is valid.
        unsafe { bindings::rkvm_vma_pages(self.0.get()) as usize }
    }

    /// The first page of the file that is mapped.
    pub(crate) fn first_page(&self) -> usize {
        // SAFETY: As above.
        unsafe { bindings::rkvm_vma_pgoff(self.0.get()) as usize }
    }

    /// Writes to it are seen by all who map the file.
    pub(crate) fn is_shared(&self) -> bool {
        // SAFETY: As above.
        unsafe { bindings::rkvm_vma_flags(self.0.get()) & kb::VM_SHARED as u64 != 0 }
    }

    /// Code in it may be executed.
    pub(crate) fn is_executable(&self) -> bool {
        // SAFETY: As above.
        unsafe { bindings::rkvm_vma_flags(self.0.get()) & kb::VM_EXEC as u64 != 0 }
    }

    /// Maps a page at the index-th page of the mapping. The mapping takes a reference to it.
    pub(crate) fn insert(&self, index: usize, page: &super::page::KernelPage) -> Result {
        // SAFETY: As above; the page is one of the kernel's allocator and lives during the call.
        to_result(unsafe {
            bindings::rkvm_vma_insert_page(
                self.0.get(),
                (index * super::page::PAGE_SIZE) as u64,
                page.as_ptr().cast(),
            )
        })
    }
}

/// The file operations of `T`.
struct Vtable<T: FileObject>(PhantomData<T>);

impl<T: FileObject> Vtable<T> {
    const OPS: kb::file_operations = kb::file_operations {
        owner: crate::THIS_MODULE.as_ptr(),
        release: Some(Self::release),
        unlocked_ioctl: Some(Self::ioctl),
        // The structures of the ABI are the same for 32-bit processes.
        #[cfg(CONFIG_COMPAT)]
        compat_ioctl: Some(kb::compat_ptr_ioctl),
        mmap: Some(Self::mmap),
        read: if T::READABLE { Some(Self::read) } else { None },
        llseek: Some(kb::noop_llseek),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `file` was made with `Self::OPS`; its private data is an `Arc<T>`.
    unsafe extern "C" fn ioctl(file: *mut kb::file, cmd: u32, arg: usize) -> isize {
        // SAFETY: By the above; the file, and so the reference, lives during the call.
        let this = unsafe { <Arc<T> as ForeignOwnable>::borrow((*file).private_data) };
        match T::ioctl(this, cmd, arg) {
            Ok(value) => value,
            Err(e) => e.to_errno() as isize,
        }
    }

    /// # Safety
    ///
    /// As [`Self::ioctl`]; `position` is valid for reads and writes, and nobody else's during the call:
    /// the kernel passes the address of a copy.
    unsafe extern "C" fn read(
        file: *mut kb::file,
        to: *mut u8,
        len: usize,
        position: *mut kb::loff_t,
    ) -> isize {
        // SAFETY: As in `ioctl`.
        let this = unsafe { <Arc<T> as ForeignOwnable>::borrow((*file).private_data) };
        // SAFETY: It is valid, and nobody else's, by the function's requirement.
        let position = unsafe { &mut *position };
        // Negative positions do not come this far.
        let from = u64::try_from(*position).unwrap_or(u64::MAX);
        match T::read(this, to as usize, len, from) {
            Ok(done) => {
                *position = position.wrapping_add(done as kb::loff_t);
                done as isize
            }
            Err(e) => e.to_errno() as isize,
        }
    }

    /// # Safety
    ///
    /// As [`Self::ioctl`]; `vma` is being set up.
    unsafe extern "C" fn mmap(file: *mut kb::file, vma: *mut kb::vm_area_struct) -> i32 {
        // SAFETY: As in `ioctl`.
        let this = unsafe { <Arc<T> as ForeignOwnable>::borrow((*file).private_data) };
        // SAFETY: `NewVma` is a transparent wrapper, and the VMA is valid during the call.
        let vma = unsafe { &*vma.cast::<NewVma>() };
        T::mmap(this, vma).map_or_else(|e| e.to_errno(), |()| 0)
    }

    /// # Safety
    ///
    /// As [`Self::ioctl`]; the file is used no more.
    unsafe extern "C" fn release(_inode: *mut kb::inode, file: *mut kb::file) -> i32 {
        // SAFETY: The file gives up its reference here.
        let this = unsafe { <Arc<T> as ForeignOwnable>::from_foreign((*file).private_data) };
        T::release(this.as_arc_borrow());
        0
    }
}

/// Holder of the operations, so that they have an address.
struct OpsOf<T: FileObject>(PhantomData<T>);

impl<T: FileObject> OpsOf<T> {
    const STATIC: &'static kb::file_operations = &Vtable::<T>::OPS;
}

/// Makes a file for `object` and returns its descriptor, close-on-exec: EMFILE, ENOMEM.
pub(crate) fn anon_fd<T: FileObject>(name: &CStr, object: Arc<T>) -> Result<isize> {
    let private = object.into_foreign();
    // SAFETY: The operations are static and take the private data for an `Arc<T>`, which it is.
    let fd = unsafe {
        bindings::anon_inode_getfd(
            name.as_char_ptr(),
            OpsOf::<T>::STATIC,
            private.cast(),
            (kb::O_RDWR | kb::O_CLOEXEC) as i32,
        )
    };
    if fd < 0 {
        // SAFETY: No file was made, so the reference is still ours.
        drop(unsafe { <Arc<T> as ForeignOwnable>::from_foreign(private) });
        return Err(Error::from_errno(fd));
    }
    Ok(fd as isize)
}

/// Makes a read-only file for `object`, to be read at any position, and returns its descriptor,
/// close-on-exec: EMFILE, ENOMEM.
pub(crate) fn readable_fd<T: FileObject>(name: &CStr, object: Arc<T>) -> Result<isize> {
    let fd = FileDescriptorReservation::get_unused_fd_flags(kb::O_CLOEXEC)?;
    let private = object.into_foreign();
    // SAFETY: The operations are static and take the private data for an `Arc<T>`, which it is.
    let file = from_err_ptr(unsafe {
        bindings::rkvm_readable_file(name.as_char_ptr(), OpsOf::<T>::STATIC, private.cast())
    });
    let file = file.and_then(|file| NonNull::new(file).ok_or(ENOMEM));
    match file {
        Ok(file) => {
            let number = fd.reserved_fd();
            // SAFETY: The file is new, so the one reference is ours, and nobody else uses its
            // position.
            fd.fd_install(unsafe { ARef::from_raw(file.cast::<File>()) });
            Ok(number as isize)
        }
        Err(e) => {
            // SAFETY: No file was made, so the reference is still ours.
            drop(unsafe { <Arc<T> as ForeignOwnable>::from_foreign(private) });
            Err(e)
        }
    }
}

/// A character device under `/dev`, of dynamic minor number, whose files are all `T`.
///
/// # Invariants
///
/// `misc` is registered.
#[pin_data(PinnedDrop)]
pub(crate) struct Chrdev<T: FileObject + Opened> {
    #[pin]
    misc: Opaque<kb::miscdevice>,
    _files: PhantomData<fn() -> T>,
}

// SAFETY: The registration may be ended by any thread.
unsafe impl<T: FileObject + Opened> Send for Chrdev<T> {}
// SAFETY: Nothing is reachable through a shared reference.
unsafe impl<T: FileObject + Opened> Sync for Chrdev<T> {}

/// What an open of the device makes.
pub(crate) trait Opened: Sized {
    /// A new object for a new file.
    fn open() -> Result<Arc<Self>>;
}

impl<T: FileObject + Opened> Chrdev<T> {
    const OPS: kb::file_operations = kb::file_operations {
        open: Some(Self::open),
        ..Vtable::<T>::OPS
    };
    const STATIC: &'static kb::file_operations = &Self::OPS;

    /// Registers the device, with the mode that `/dev/kvm` has by default.
    pub(crate) fn register(name: &'static CStr) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            misc <- Opaque::try_ffi_init(move |slot: *mut kb::miscdevice| {
                let mut misc: kb::miscdevice = pin_init::zeroed();
                misc.minor = kb::MISC_DYNAMIC_MINOR as i32;
                misc.name = name.as_char_ptr();
                misc.fops = Self::STATIC;
                // SAFETY: `slot` is valid for writes and pinned until the drop unregisters it.
                // INVARIANT: Registered if the function returns 0.
                unsafe {
                    slot.write(misc);
                    to_result(kb::misc_register(slot))
                }
            }),
            _files: PhantomData,
        })
    }

    /// # Safety
    ///
    /// `file` is being opened.
    unsafe extern "C" fn open(_inode: *mut kb::inode, file: *mut kb::file) -> i32 {
        match T::open() {
            Ok(object) => {
                // SAFETY: An open may set the private data.
                unsafe { (*file).private_data = object.into_foreign().cast::<c_void>() };
                0
            }
            Err(e) => e.to_errno(),
        }
    }
}

#[pinned_drop]
impl<T: FileObject + Opened> PinnedDrop for Chrdev<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the invariant it is registered.
        unsafe { kb::misc_deregister(self.misc.get()) };
    }
}
