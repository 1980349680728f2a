// SPDX-License-Identifier: GPL-2.0

//! The module itself: it is not unloaded while anything of it is in use, and can be loaded and unloaded
//! again and again. Needs `--module 'FILE [PARAMETER=VALUE...]'` and to be root; the module is loaded when the tests end.

use selftests::guest::{at, usize_of};
use selftests::host::{meminfo, patient, sleep_ms};
use selftests::machine::{Machine, Mode};
use selftests::sys::{errno_name, Error};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::ffi::CString;
use std::path::Path;
use std::process::ExitCode;

guest_code!(count, ".code32", "2: inc dword ptr [{D}]", "hlt", "jmp 2b"; D = at::DATA);

/// The module file, its parameters behind it if there are any, and the module's name.
fn module(env: &Env) -> Result<(CString, CString), Verdict> {
    let Some(path) = &env.module else {
        skip!("no --module")
    };
    let (file, _) = path.split_once(' ').unwrap_or((path, ""));
    let name = Path::new(file)
        .file_stem()
        .and_then(|s| s.to_str())
        .unwrap_or("")
        .replace('-', "_");
    // Its device has its name; another's files do not hold it.
    if Path::new(&env.device).file_name().and_then(|n| n.to_str()) != Some(name.as_str()) {
        skip!("{} is not the device of {name}", env.device);
    }
    match (CString::new(path.as_str()), CString::new(name)) {
        (Ok(p), Ok(n)) => Ok((p, n)),
        _ => fail!("--module {path}"),
    }
}

fn loaded(name: &CString) -> bool {
    Path::new(&format!("/sys/module/{}", name.to_string_lossy())).exists()
}

fn load(path: &CString) -> Result<(), Error> {
    let words = path.to_string_lossy();
    let (file, parameters) = words.split_once(' ').unwrap_or((&words, ""));
    let string = |s: &str| CString::new(s).map_err(|_| Error::last("a NUL in --module"));
    let (file, parameters) = (string(file)?, string(parameters)?);
    // SAFETY: Strings with their terminators; the descriptor is our own.
    unsafe {
        let fd = libc::open(file.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(Error::last("open of the module's file"));
        }
        let r = libc::syscall(libc::SYS_finit_module, fd, parameters.as_ptr(), 0);
        let e = Error::last("finit_module");
        libc::close(fd);
        if r != 0 {
            return Err(e);
        }
    }
    Ok(())
}

fn unload(name: &CString) -> Result<(), Error> {
    // SAFETY: A string with its terminator.
    let r = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    if r != 0 {
        return Err(Error::last("delete_module"));
    }
    Ok(())
}

/// The last reference may be dropped a moment after the last close.
fn unload_soon(name: &CString) -> Outcome {
    let mut last = None;
    for _ in 0..100 {
        match unload(name) {
            Ok(()) => return Ok(()),
            Err(e) => last = Some(e),
        }
        sleep_ms(5);
    }
    fail!("the module, in use by no one, is not unloaded: {last:?}")
}

fn ensure_loaded(env: &Env) -> Result<(CString, CString), Verdict> {
    let (path, name) = module(env)?;
    if !loaded(&name) {
        load(&path)?;
    }
    for _ in 0..200 {
        if Path::new(&env.device).exists() {
            return Ok((path, name));
        }
        sleep_ms(5);
    }
    fail!(
        "no {} within a second of loading {}",
        env.device,
        path.to_string_lossy()
    )
}

fn refused(name: &CString, what: &str) -> Outcome {
    match unload(name) {
        Err(e) if e.errno == libc::EWOULDBLOCK || e.errno == libc::EBUSY => Ok(()),
        Err(e) => fail!(
            "rmmod with {what}: {}, expected EWOULDBLOCK",
            errno_name(e.errno)
        ),
        Ok(()) => fail!("the module was unloaded with {what}"),
    }
}

fn works(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, count())?;
    m.expect_hlt()?;
    ensure_eq!(m.mem.read::<u32>(usize_of(at::DATA)), 1, "count of a guest");
    Ok(())
}

/// Each kind of file holds the module, alone and after the others are closed; so does a mapping.
fn held_by_files(env: &Env) -> Outcome {
    let (_, name) = ensure_loaded(env)?;
    let kvm = env.open()?;
    refused(&name, "the device open")?;
    let vm = kvm.create_vm()?;
    drop(kvm);
    refused(&name, "a VM open")?;
    let vcpu = vm.create_vcpu(0)?;
    drop(vm);
    refused(&name, "a vCPU open")?;
    let size = vcpu.run_size();
    // SAFETY: A new mapping at an address that the kernel chooses disturbs nothing.
    let p = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(
            std::ptr::null_mut(),
            size,
            prot,
            libc::MAP_SHARED,
            vcpu.fd.0,
            0,
        )
    };
    ensure!(p != libc::MAP_FAILED, "mmap");
    vcpu.regs()?;
    drop(vcpu);
    refused(&name, "kvm_run mapped")?;
    // SAFETY: The mapping is our own.
    unsafe { libc::munmap(p, size) };
    works(env)?;
    unload_soon(&name)?;
    ensure!(
        !Path::new(&env.device).exists(),
        "{} is there without the module",
        env.device
    );
    ensure_loaded(env)?;
    works(env)
}

/// Unloading is tried all the time while guests run in another process, which is killed in the end.
fn refused_while_running(env: &Env) -> Outcome {
    let (_, name) = ensure_loaded(env)?;
    for _ in 0..5 {
        let shared = selftests::mem::Mapping::new(4096, true)?;
        // SAFETY: The child builds its own VM and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            if let Ok(m) = Machine::new(env, Mode::Protected, count()) {
                loop {
                    let _ = m.run();
                    shared.write(0, m.mem.read::<u32>(usize_of(at::DATA)));
                }
            }
            // SAFETY: Ends the child.
            unsafe { libc::_exit(1) };
        }
        let mut r = Ok(());
        let mut waited = 0;
        while shared.read::<u32>(0) < 50 && waited < patient(3000) {
            sleep_ms(1);
            waited += 1;
            if shared.read::<u32>(0) > 0 {
                r = refused(&name, "a guest running");
                if r.is_err() {
                    break;
                }
            }
        }
        // SAFETY: Our own child; `status` lives through the call.
        unsafe {
            let mut status = 0;
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, &mut status, 0);
        }
        r?;
        ensure!(waited < patient(3000), "the guest did not run");
        unload_soon(&name)?;
        ensure_loaded(env)?;
    }
    works(env)
}

/// Load, run a guest, unload, forty times: nothing is left behind.
fn cycles(env: &Env) -> Outcome {
    let (_, name) = ensure_loaded(env)?;
    let mut least = i64::MAX;
    let free = || {
        sleep_ms(60);
        i64::try_from(meminfo("MemFree").unwrap_or(0)).unwrap_or(0)
    };
    for batch in 0..5 {
        let before = free();
        for _ in 0..8 {
            works(env)?;
            unload_soon(&name)?;
            ensure!(
                !loaded(&name),
                "/sys/module has the module after its unloading"
            );
            ensure_loaded(env)?;
        }
        // The first batch warms up.
        if batch > 0 {
            least = least.min(before - free());
        }
    }
    println!("free memory shrank by {least} KiB at least in each 8 cycles");
    // A debug kernel (`--slow`) holds back what is freed, and looks for leaks by itself.
    ensure!(
        least < 64 || env.slow >= 5,
        "free memory shrank by {least} KiB or more in each 8 cycles"
    );
    works(env)
}

/// Loading it twice is refused, and harms no one.
fn loaded_twice(env: &Env) -> Outcome {
    let (path, _) = ensure_loaded(env)?;
    match load(&path) {
        Err(e) if e.errno == libc::EEXIST => {}
        r => fail!("loading the module twice: {r:?}, expected EEXIST"),
    }
    works(env)
}

/// The device may be opened by many at once, and by none but who may.
fn device_node(env: &Env) -> Outcome {
    ensure_loaded(env)?;
    let many: Result<Vec<_>, _> = (0..100).map(|_| env.open()).collect();
    ensure_eq!(many?.len(), 100, "devices open");
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let Ok(meta) = std::fs::metadata(&env.device) else {
        fail!("no {}", env.device)
    };
    ensure!(
        meta.file_type().is_char_device(),
        "{} is no character device",
        env.device
    );
    ensure_eq!(
        meta.permissions().mode() & 0o007,
        0,
        "permissions of others"
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "module",
        tests![device_node, loaded_twice, held_by_files, refused_while_running, cycles => 60],
    )
}
