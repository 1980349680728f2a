// SPDX-License-Identifier: GPL-2.0

//! No panic can be reached: the layer, compiled as for the kernel, with overflow checks, calls none.
//!
//! The compiler leaves out a check that it can prove never fails, and with it the call of `core::panicking`. So an object file without such
//! a call is a proof for every input. When this fails, `objdump -dr` of the object file that it names shows the function.

use std::path::Path;
use std::process::Command;

#[test]
fn the_object_file_calls_no_panic() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = here.join("tests/no_panic/harness.rs");
    let object = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no_panic.o");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(&rustc)
        .args(["--edition=2021", "--crate-type=lib", "--emit=obj"])
        .args(["-Copt-level=2", "-Ccodegen-units=1", "-Cpanic=abort"])
        .args(["-Coverflow-checks=on", "-Cdebug-assertions=off"])
        .arg("-o")
        .arg(&object)
        .arg(&source)
        .status()
        .unwrap_or_else(|e| panic!("{}: {e}", rustc.to_string_lossy()));
    assert!(status.success());
    let contents = std::fs::read(&object).unwrap();
    let has = |name: &[u8]| contents.windows(name.len()).any(|w| w == name);
    // The harness is in there, and what it calls.
    for name in [
        "string_io",
        "compare_exchange",
        "switch_task",
        "apic_access",
        "apic_map",
        "io_apic",
        "pic_pair",
        "interval_timer",
    ] {
        assert!(has(name.as_bytes()), "{name}");
    }
    for name in [
        "panicking",
        "panic_fmt",
        "slice_index",
        "unwrap_failed",
        "expect_failed",
    ] {
        assert!(!has(name.as_bytes()), "{name} is in {}", object.display());
    }
}
