// SPDX-License-Identifier: GPL-2.0

//! Guest memory whose host pages change under a running guest: it sees the new ones, and never again
//! the old ones. And much memory.

use selftests::guest::{at, usize_of};
use selftests::host::{gettid, interrupting_handler, kick, patient, sleep_ms};
use selftests::machine::{decode, Exit, Machine, Mode};
use selftests::mem::{Mapping, HUGE, PAGE};
use selftests::sys::Error;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

const GPA: u64 = 0x100_0000;
const PAGES: usize = 16;
const SIG: i32 = libc::SIGUSR1;
/// Where the guest writes what it read of each page.
const SEEN: usize = at::DATA as usize;
/// Where the guest counts in each page.
const COUNT: usize = 8;

// For ever: copies the first word of each page to SEEN, and counts in the page.
guest_code!(mirror, ".code32",
    "2: mov ecx, 16",
    "mov esi, {G}",
    "mov edi, {S}",
    "3: mov eax, [esi]",
    "mov [edi], eax",
    "inc dword ptr [esi + 8]",
    "add esi, 4096",
    "add edi, 4",
    "loop 3b",
    "jmp 2b";
    G = GPA, S = at::DATA,
);

/// A guest that mirrors pages, in a thread of its own.
struct Mirror<'a> {
    m: &'a Machine,
    pages: &'a Mapping,
    stride: usize,
    faults: AtomicU32,
    stop: AtomicBool,
    tid: AtomicI32,
}

impl Mirror<'_> {
    /// The vCPU's thread. EFAULT is what a page that is not there gives; it tries again.
    fn run(&self) -> Outcome {
        self.tid.store(gettid(), Ordering::SeqCst);
        while !self.stop.load(Ordering::SeqCst) {
            match self.m.vcpu.run() {
                Err(e) if e.errno == libc::EINTR => {}
                Err(e) if e.errno == libc::EFAULT => {
                    self.faults.fetch_add(1, Ordering::SeqCst);
                    std::thread::yield_now();
                }
                Err(e) => return Err(e.into()),
                Ok(_) => fail!("exit {:x?}\n{}", decode(&self.m.vcpu), self.m.describe()),
            }
        }
        Ok(())
    }

    fn at(&self, page: usize) -> usize {
        page * self.stride
    }

    fn addr(&self, page: usize) -> *mut libc::c_void {
        (self.pages.addr() + self.at(page)) as *mut _
    }

    fn seen(&self, page: usize) -> u32 {
        self.m.mem.read(SEEN + page * 4)
    }

    fn wait(&self, what: &str, condition: impl Fn() -> bool) -> Outcome {
        for _ in 0..patient(3000) {
            if condition() {
                return Ok(());
            }
            if self.stop.load(Ordering::SeqCst) {
                break;
            }
            sleep_ms(1);
        }
        Err(Verdict::Fail(format!("not so within 3 s: {what}")))
    }

    /// The guest reads `value` in `page`, and what it counts there can be seen.
    fn sees(&self, page: usize, value: u32, what: &str) -> Outcome {
        self.wait(
            &format!("{what}: the guest reads {value:#x} in page {page}"),
            || self.seen(page) == value,
        )?;
        let before: u32 = self.pages.read(self.at(page) + COUNT);
        self.wait(
            &format!("{what}: the guest's count in page {page} goes on"),
            || self.pages.read::<u32>(self.at(page) + COUNT) != before,
        )
    }

    /// The host writes `value`; the guest sees it.
    fn change(&self, page: usize, value: u32, what: &str) -> Outcome {
        self.pages.write(self.at(page), value);
        self.sees(page, value, what)
    }
}

/// Runs `body` beside a mirroring guest over `pages`.
fn mirrored(env: &Env, pages: &Mapping, body: impl FnOnce(&Mirror) -> Outcome) -> Outcome {
    interrupting_handler(SIG)?;
    let m = Machine::new(env, Mode::Protected, mirror())?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    let mirror = Mirror {
        m: &m,
        pages,
        stride: PAGE,
        faults: AtomicU32::new(0),
        stop: AtomicBool::new(false),
        tid: AtomicI32::new(0),
    };
    std::thread::scope(|scope| -> Outcome {
        let vcpu = scope.spawn(|| {
            let r = mirror.run();
            mirror.stop.store(true, Ordering::SeqCst);
            r
        });
        let r = body(&mirror);
        mirror.stop.store(true, Ordering::SeqCst);
        while !vcpu.is_finished() {
            kick(mirror.tid.load(Ordering::SeqCst), SIG);
            sleep_ms(1);
        }
        vcpu.join()
            .unwrap_or(Err(Verdict::Fail("the vCPU's thread panicked".into())))?;
        r
    })
}

fn small_pages() -> Result<Mapping, Error> {
    let pages = Mapping::new(PAGES * PAGE, false)?;
    pages.advise(0, pages.len(), libc::MADV_NOHUGEPAGE)?;
    Ok(pages)
}

fn dontneed(env: &Env) -> Outcome {
    let pages = small_pages()?;
    mirrored(env, &pages, |g| {
        for round in 1..=120u32 {
            let page = round as usize % PAGES;
            g.change(page, round, "before")?;
            pages.advise(g.at(page), PAGE, libc::MADV_DONTNEED)?;
            // All that was there is gone; the guest reads 0 until the host writes again.
            g.sees(page, 0, "after MADV_DONTNEED")?;
            g.change(page, round << 8, "after a write to the new page")?;
        }
        Ok(())
    })
}

fn dontneed_all(env: &Env) -> Outcome {
    let pages = small_pages()?;
    mirrored(env, &pages, |g| {
        for round in 1..=30u32 {
            pages.advise(0, pages.len(), libc::MADV_DONTNEED)?;
            for page in 0..PAGES {
                pages.write(g.at(page), round * 100 + page as u32);
            }
            for page in 0..PAGES {
                g.sees(
                    page,
                    round * 100 + page as u32,
                    "after MADV_DONTNEED of all",
                )?;
            }
        }
        Ok(())
    })
}

/// While the host may only read a page, the guest cannot write it.
fn mprotect_readonly(env: &Env) -> Outcome {
    let pages = small_pages()?;
    mirrored(env, &pages, |g| {
        for round in 1..=40u32 {
            let page = (round * 5) as usize % PAGES;
            g.change(page, round, "before mprotect")?;
            let faults = g.faults.load(Ordering::SeqCst);
            pages.protect(g.at(page), PAGE, libc::PROT_READ)?;
            let before: u32 = pages.read(g.at(page) + COUNT);
            g.wait("KVM_RUN fails with EFAULT", || {
                g.faults.load(Ordering::SeqCst) > faults
            })?;
            let after: u32 = pages.read(g.at(page) + COUNT);
            ensure_eq!(after, before, "count in a page that is read-only");
            pages.protect(g.at(page), PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
            g.sees(page, round, "after the page became writable again")?;
        }
        Ok(())
    })
}

fn mprotect_none(env: &Env) -> Outcome {
    let pages = small_pages()?;
    mirrored(env, &pages, |g| {
        for round in 1..=40u32 {
            let page = (round * 3) as usize % PAGES;
            g.change(page, round, "before mprotect")?;
            let faults = g.faults.load(Ordering::SeqCst);
            pages.protect(g.at(page), PAGE, libc::PROT_NONE)?;
            g.wait("KVM_RUN fails with EFAULT", || {
                g.faults.load(Ordering::SeqCst) > faults
            })?;
            pages.protect(g.at(page), PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
            g.change(page, round + 1000, "after the page came back")?;
        }
        Ok(())
    })
}

fn mmap_over(address: *mut libc::c_void) -> Outcome {
    // SAFETY: Replaces a page of a mapping that tests access only by volatile reads and writes.
    let p = unsafe {
        libc::mmap(
            address,
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    ensure!(p == address, "mmap with MAP_FIXED");
    Ok(())
}

/// Another mapping takes a page's place, at once or after a while without any.
fn unmapped_and_mapped(env: &Env) -> Outcome {
    let pages = small_pages()?;
    mirrored(env, &pages, |g| {
        for round in 1..=60u32 {
            let page = (round * 7) as usize % PAGES;
            g.change(page, round, "before")?;
            if round % 2 == 0 {
                let faults = g.faults.load(Ordering::SeqCst);
                // SAFETY: A page of a mapping that is accessed again only after it is back.
                let r = unsafe { libc::munmap(g.addr(page), PAGE) };
                ensure_eq!(r, 0, "munmap");
                g.wait("KVM_RUN fails with EFAULT", || {
                    g.faults.load(Ordering::SeqCst) > faults
                })?;
            }
            mmap_over(g.addr(page))?;
            g.sees(page, 0, "a new mapping")?;
            g.change(page, round + 2000, "in the new mapping")?;
        }
        Ok(())
    })
}

/// A page is moved in from elsewhere, with its contents.
fn mremapped(env: &Env) -> Outcome {
    let pages = small_pages()?;
    mirrored(env, &pages, |g| {
        for round in 1..=60u32 {
            let page = (round * 11) as usize % PAGES;
            g.change(page, round, "before")?;
            // SAFETY: A fresh page is made, filled and moved over one that tests access by volatile
            // reads and writes alone.
            unsafe {
                let p = libc::mmap(
                    std::ptr::null_mut(),
                    PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                ensure!(p != libc::MAP_FAILED, "mmap");
                p.cast::<u32>().write(round + 3000);
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let q = libc::mremap(p, PAGE, PAGE, flags, g.addr(page));
                ensure!(q == g.addr(page), "mremap");
            }
            g.sees(page, round + 3000, "the page that was moved in")?;
        }
        Ok(())
    })
}

/// A fork makes all pages copy-on-write: what the VMM and the guest write stays one and the same, and
/// the child keeps what was.
fn copy_on_write(env: &Env) -> Outcome {
    let pages = small_pages()?;
    mirrored(env, &pages, |g| {
        for round in 1..=15u32 {
            let page = round as usize % PAGES;
            g.change(page, round, "before the fork")?;
            // SAFETY: The child only reads memory, sleeps and ends.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                // SAFETY: As above; no allocation, no locks.
                unsafe {
                    let p = g.addr(page) as *const u32;
                    let count = p.add(2).read_volatile();
                    let ts = libc::timespec {
                        tv_sec: 0,
                        tv_nsec: 4_000_000,
                    };
                    libc::nanosleep(&ts, std::ptr::null_mut());
                    let same = p.read_volatile() == round && p.add(2).read_volatile() == count;
                    libc::_exit(i32::from(!same));
                }
            }
            let r = g.change(page, round + 4000, "after the fork");
            let mut status = 0;
            // SAFETY: `status` lives through the call.
            unsafe { libc::waitpid(pid, &mut status, 0) };
            r?;
            ensure_eq!(status, 0, "status of the child, 0x100: its page changed");
            g.change(page, round + 5000, "after the child ended")?;
        }
        Ok(())
    })
}

/// A page that no one wrote is the kernel's page of zeros, until someone does.
fn zero_page(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "2: mov eax, [0x1000000]", "hlt", "jmp 2b");
    let m = Machine::new(env, Mode::Protected, code())?;
    let pages = small_pages()?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    for round in 1..=20u32 {
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, 0, "before the write, round {round}");
        pages.write(0, round);
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, u64::from(round), "after the write");
        pages.advise(0, PAGE, libc::MADV_DONTNEED)?;
    }
    Ok(())
}

/// The guest reads a page of zeros first and writes it then: the write is the host's to see.
fn read_then_write(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "2: mov eax, [0x1000000]",
        "inc dword ptr [0x1000000]",
        "mov ebx, [0x1000000]",
        "hlt",
        "jmp 2b",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let pages = small_pages()?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    for _ in 0..10 {
        m.expect_hlt()?;
        let r = m.vcpu.regs()?;
        ensure_eq!((r.rax, r.rbx), (0, 1), "values in the guest");
        ensure_eq!(pages.read::<u32>(0), 1, "value in the host");
        pages.advise(0, PAGE, libc::MADV_DONTNEED)?;
    }
    Ok(())
}

/// Code is memory too: instructions that the host replaces are not executed again.
fn code_replaced(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "2: mov eax, {G}", "call eax", "hlt", "jmp 2b"; G = GPA);
    let m = Machine::new(env, Mode::Protected, code())?;
    let pages = small_pages()?;
    m.vm.set_memory(1, 0, GPA, pages.len() as u64, pages.addr() as u64)?;
    for round in 0..40u32 {
        if round % 2 == 0 {
            pages.advise(0, PAGE, libc::MADV_DONTNEED)?;
        }
        let mut function = vec![0xbb]; // mov ebx, imm32; ret
        function.extend(round.to_le_bytes());
        function.push(0xc3);
        pages.write_bytes(0, &function);
        m.expect_hlt()?;
        ensure_eq!(
            m.vcpu.regs()?.rbx,
            u64::from(round),
            "value that the function gives"
        );
    }
    Ok(())
}

/// A part of a large page goes; the rest of it stays what it was.
fn large_page_split(env: &Env) -> Outcome {
    let pages = Mapping::new(2 * HUGE, false)?;
    if pages.advise(0, pages.len(), libc::MADV_HUGEPAGE).is_err() {
        skip!("no transparent huge pages");
    }
    pages.fill(0, pages.len(), 0);
    println!("{} KiB in huge pages", huge_kib(&pages));
    mirrored(env, &pages, |g| {
        for page in 0..PAGES {
            g.change(page, 7000 + page as u32, "at first")?;
        }
        for round in 1..=20u32 {
            let page = round as usize % PAGES;
            let neighbour = (page + 1) % PAGES;
            let kept: u32 = pages.read(g.at(neighbour));
            pages.advise(g.at(page), PAGE, libc::MADV_DONTNEED)?;
            g.sees(page, 0, "the part that went")?;
            g.sees(neighbour, kept, "its neighbour")?;
            g.change(page, 8000 + round, "the part that came new")?;
        }
        // MADV_COLLAPSE (25) makes a large page of it again, with all contents.
        let kept: Vec<u32> = (0..PAGES).map(|p| pages.read(g.at(p))).collect();
        let collapsed = pages.advise(0, HUGE, 25).is_ok();
        for (page, value) in kept.iter().enumerate() {
            g.sees(page, *value, "after MADV_COLLAPSE")?;
        }
        println!(
            "MADV_COLLAPSE: {collapsed}, {} KiB in huge pages",
            huge_kib(&pages)
        );
        // All at once.
        pages.advise(0, pages.len(), libc::MADV_DONTNEED)?;
        for page in 0..PAGES {
            g.sees(page, 0, "after MADV_DONTNEED of all")?;
        }
        Ok(())
    })
}

/// KiB of the mapping that are in large pages.
fn huge_kib(m: &Mapping) -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/smaps") else {
        return 0;
    };
    let mut inside = false;
    let mut sum = 0;
    for line in text.lines() {
        if let Some((range, _)) = line.split_once(' ') {
            if let Some((a, b)) = range.split_once('-') {
                if let (Ok(a), Ok(b)) = (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16))
                {
                    inside = a < m.addr() + m.len() && m.addr() < b;
                    continue;
                }
            }
            if inside && range == "AnonHugePages:" {
                let n = line
                    .split_whitespace()
                    .nth(1)
                    .and_then(|n| n.parse::<u64>().ok());
                sum += n.unwrap_or(0);
            }
        }
    }
    sum
}

/// A shared file as memory: what is punched out of it is gone for the guest; what is written to the
/// file, the guest reads; past its end there is nothing.
fn shared_file(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "2: mov eax, [0x1000000]",
        "inc dword ptr [0x1001000]",
        "hlt",
        "jmp 2b",
    );
    // SAFETY: Creates a descriptor, which ends with the test's process.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(fd >= 0, "memfd_create");
    // SAFETY: The file is our own; the mapping is new and ends with the process.
    let address = unsafe {
        ensure_eq!(libc::ftruncate(fd, 0x4000), 0, "ftruncate");
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), 0x4000, prot, libc::MAP_SHARED, fd, 0)
    };
    ensure!(address != libc::MAP_FAILED, "mmap");
    let m = Machine::new(env, Mode::Protected, code())?;
    m.vm.set_memory(1, 0, GPA, 0x4000, address as u64)?;
    let put = |value: u32| {
        // SAFETY: Four bytes that live through the call.
        unsafe { libc::pwrite(fd, value.to_le_bytes().as_ptr().cast(), 4, 0) }
    };
    for round in 1..=10u32 {
        ensure_eq!(put(round), 4, "pwrite");
        m.expect_hlt()?;
        ensure_eq!(
            m.vcpu.regs()?.rax,
            u64::from(round),
            "what was written to the file"
        );
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: The file is our own.
        let r = unsafe { libc::fallocate(fd, mode, 0, 0x1000) };
        ensure_eq!(r, 0, "punch a hole");
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, 0, "where the hole is");
        let mut count = [0u8; 4];
        // SAFETY: `count` has the length that is passed.
        unsafe { libc::pread(fd, count.as_mut_ptr().cast(), 4, 0x1000) };
        ensure_eq!(
            u32::from_le_bytes(count),
            round * 2,
            "what the guest counted in the file"
        );
    }
    // SAFETY: The file is our own.
    ensure_eq!(unsafe { libc::ftruncate(fd, 0) }, 0, "ftruncate");
    match m.vcpu.run() {
        Err(e) if e.errno == libc::EFAULT => {}
        r => fail!("KVM_RUN on a page behind the end of its file: {r:?}, expected EFAULT"),
    }
    // SAFETY: The file is our own.
    ensure_eq!(unsafe { libc::ftruncate(fd, 0x4000) }, 0, "ftruncate");
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 0, "after the file grew again");
    Ok(())
}

// Writes each page's number to each page, then sums them up. EDI first page, EBP pages.
guest_code!(
    touch_all,
    ".code32",
    "xor eax, eax",
    "mov edx, edi",
    "2: mov [edx + 16], eax",
    "add edx, 4096",
    "inc eax",
    "cmp eax, ebp",
    "jb 2b",
    "xor eax, eax",
    "xor ebx, ebx",
    "mov edx, edi",
    "3: add ebx, [edx + 16]",
    "add edx, 4096",
    "inc eax",
    "cmp eax, ebp",
    "jb 3b",
    "hlt",
);

fn touch(env: &Env, bytes: usize, advice: i32) -> Outcome {
    let memory = Mapping::new(bytes, false)?;
    memory.advise(0, bytes, advice)?;
    let n = u32::try_from(bytes / PAGE).unwrap_or(0);
    {
        let m = Machine::new(env, Mode::Protected, touch_all())?;
        m.vm.set_memory(1, 0, GPA, bytes as u64, memory.addr() as u64)?;
        m.patch_regs(|r| {
            r.rdi = GPA;
            r.rbp = n.into();
        })?;
        m.expect_hlt()?;
        let sum = (0..n).fold(0u32, u32::wrapping_add);
        ensure_eq!(
            m.vcpu.regs()?.rbx,
            u64::from(sum),
            "sum of the pages' numbers"
        );
        println!(
            "{} KiB of {} in huge pages",
            huge_kib(&memory),
            bytes / 1024
        );
        for page in 0..n {
            let got: u32 = memory.read(page as usize * PAGE + 16);
            ensure_eq!(got, page, "number in page {page}");
        }
    }
    Ok(())
}

fn much_memory_small_pages(env: &Env) -> Outcome {
    touch(env, (env.fewer(96) as usize) << 20, libc::MADV_NOHUGEPAGE)
}

fn much_memory_large_pages(env: &Env) -> Outcome {
    touch(env, (env.fewer(256) as usize) << 20, libc::MADV_HUGEPAGE)
}

/// Guest memory that is unmapped before the VM goes, and a VM that goes before its memory.
fn order_of_release(env: &Env) -> Outcome {
    let code = touch_all();
    for round in 0..20 {
        let memory = Mapping::new(4 << 20, false)?;
        let m = Machine::new(env, Mode::Protected, code)?;
        m.vm.set_memory(1, 0, GPA, 4 << 20, memory.addr() as u64)?;
        m.patch_regs(|r| {
            r.rdi = GPA;
            r.rbp = 256;
        })?;
        m.expect_hlt()?;
        if round % 2 == 0 {
            drop(memory);
            drop(m);
        } else {
            drop(m);
            drop(memory);
        }
    }
    // A guest whose memory went: EFAULT, and then nothing bad.
    let m = Machine::new(env, Mode::Protected, code)?;
    let memory = Mapping::new(4 << 20, false)?;
    m.vm.set_memory(1, 0, GPA, 4 << 20, memory.addr() as u64)?;
    m.patch_regs(|r| {
        r.rdi = GPA;
        r.rbp = 256;
    })?;
    drop(memory);
    match m.vcpu.run() {
        Err(e) if e.errno == libc::EFAULT => Ok(()),
        r => fail!(
            "KVM_RUN on memory that was unmapped: {r:?}, {:?}",
            decode(&m.vcpu)
        ),
    }
}

/// The guest's page tables themselves lie in pages that change.
fn page_tables_move(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "2: inc dword ptr [0xa000]",
        "mov rax, cr3",
        "mov cr3, rax",
        "hlt",
        "jmp 2b"
    );
    let m = Machine::new(env, Mode::Long, code())?;
    for round in 1..=20u32 {
        m.expect_hlt()?;
        ensure_eq!(m.mem.read::<u32>(usize_of(at::DATA)), round, "count");
        for page in [at::PML4, at::PDPT, at::PD, at::CODE, at::GDT] {
            let copy = m.mem.read_bytes(usize_of(page), PAGE);
            m.mem.advise(usize_of(page), PAGE, libc::MADV_DONTNEED)?;
            m.mem.write_bytes(usize_of(page), &copy);
        }
    }
    m.mem.advise(usize_of(at::IDT), PAGE, libc::MADV_DONTNEED)?;
    m.mem
        .advise(usize_of(at::PML4), PAGE, libc::MADV_DONTNEED)?;
    // No tables, and no way to say so: the processor shuts down.
    m.expect(&Exit::Shutdown)
}

fn main() -> ExitCode {
    selftests::tap::main(
        "memory",
        tests![
            dontneed,
            dontneed_all,
            mprotect_readonly,
            mprotect_none,
            unmapped_and_mapped,
            mremapped,
            copy_on_write,
            zero_page,
            read_then_write,
            code_replaced,
            large_page_split,
            shared_file,
            page_tables_move,
            order_of_release,
            much_memory_small_pages => 60,
            much_memory_large_pages => 60,
        ],
    )
}
