// SPDX-License-Identifier: GPL-2.0

//! What bindgen made of `bindings/bindings.h`. Only the layers that may hold `unsafe` call it;
//! the structures of the KVM ABI reach the others through [`crate::abi`].

#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unused_imports,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

use kernel::bindings::{
    cpumask,
    file_operations,
    file,
    folio,
    inode,
    lock_class_key,
    mm_struct,
    module,
    mutex,
    page,
    rwlock_t,
    srcu_struct,
    task_struct,
    vm_area_struct, //
};

type __kernel_ssize_t = isize;
type __kernel_size_t = usize;
type __kernel_ptrdiff_t = isize;

include!("bindings/bindings_generated.rs");
