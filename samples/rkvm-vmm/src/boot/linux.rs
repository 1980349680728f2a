// SPDX-License-Identifier: GPL-2.0

//! Linux by its 64-bit or its 32-bit boot protocol (Documentation/arch/x86/boot.rst in the kernel's
//! tree).

use std::fs::File;
use std::io::Read;
use std::io::Seek;
use std::path::Path;

use anyhow::bail;
use anyhow::ensure;
use anyhow::Context;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::BootConfigurator;
use linux_loader::configurator::BootParams;
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::KernelLoader;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemory;
use vm_memory::GuestMemoryRegion;

use super::acpi;
use super::tables;
use super::Entry;
use super::Selector;
use crate::cli::Protocol;
use crate::memory::Memory;
use crate::memory::BOOT_PARAMS_ADDR;
use crate::memory::CMDLINE_ADDR;
use crate::memory::CMDLINE_MAX;
use crate::memory::HIGH_START;
use crate::memory::HOLE_START;
use crate::memory::LOW_END;

/// `HdrS`, where a bzImage has its setup header's magic.
const HEADER_MAGIC: [u8; 4] = *b"HdrS";
const HEADER_MAGIC_AT: usize = 0x202;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `xloadflags`: there is an entry point for 64-bit mode, 0x200 into the kernel.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// The first protocol with `xloadflags`.
const PROTOCOL_XLOADFLAGS: u16 = 0x020c;
/// Highest address of an initrd where the header does not say.
const INITRD_MAX: u64 = 0x7fff_ffff;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const PAGE: u64 = 0x1000;
const MIB: u64 = 1 << 20;

/// A kernel in guest memory.
struct Loaded {
    protocol: Protocol,
    entry: u64,
    header: setup_header,
    /// End of what the kernel needs until it manages memory itself.
    end: u64,
}

/// Loads a kernel, an initrd and a command line, and describes them, the memory and the machine, if
/// ACPI is to do that, to the kernel. It is started by `protocol`, or else in its own mode.
///
/// # Errors
/// Whatever is wrong with the files, or with the size of the memory.
pub fn load(
    memory: &Memory,
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    protocol: Option<Protocol>,
    machine: Option<&acpi::Machine>,
) -> anyhow::Result<Entry> {
    // Both are opened before either is read: the smaller error first.
    let (mut kernel_file, kernel_size) = super::open(kernel)?;
    let initrd = initrd.map(super::open).transpose()?;

    ensure!(
        ram_end(memory) > HIGH_START,
        "there is no memory above 1 MiB to load a kernel to; give more --memory"
    );
    let loaded = match kind(&mut kernel_file)? {
        Kind::BzImage => load_bzimage(memory, &mut kernel_file, kernel_size, protocol)?,
        Kind::Elf => {
            ensure!(
                protocol != Some(Protocol::Bits32),
                "a vmlinux has no 32-bit entry point; a bzImage has"
            );
            load_elf(memory, &mut kernel_file)?
        }
    };
    ensure!(
        loaded.end <= ram_end(memory),
        "guest memory is too small: the kernel needs it up to {} MiB to unpack itself",
        loaded.end.div_ceil(MIB)
    );
    let mut params = boot_params {
        hdr: loaded.header,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    put_cmdline(memory, cmdline, &mut params.hdr)?;
    if let Some((mut file, size)) = initrd {
        put_initrd(memory, &mut file, size, loaded.end, &mut params.hdr)?;
    }
    fill_e820(memory, &mut params)?;
    if let Some(machine) = machine {
        // Protocol 2.14 and later look here, all others where a BIOS has it, which is the same place.
        params.acpi_rsdp_addr = acpi::write(memory, machine)?;
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(BOOT_PARAMS_ADDR)),
        memory,
    )
    .context("cannot write the boot parameters")?;
    if loaded.protocol == Protocol::Bits32 {
        let code = Selector::BootCode32;
        tables::write_gdt(memory, code)?;
        return Ok(Entry::Protected {
            code,
            eip: u32::try_from(loaded.entry)?,
            esi: BOOT_PARAMS_ADDR as u32,
        });
    }
    tables::write_gdt(memory, Selector::Code64)?;
    tables::write_page_tables(memory)?;
    Ok(Entry::Long {
        rip: loaded.entry,
        rsi: BOOT_PARAMS_ADDR,
    })
}

enum Kind {
    BzImage,
    Elf,
}

/// Recognises the kinds of kernel image, and some things that are often taken for one.
fn kind(file: &mut File) -> anyhow::Result<Kind> {
    let mut head = Vec::new();
    file.by_ref().take(0x300).read_to_end(&mut head)?;
    file.rewind()?;
    if head.starts_with(b"\x7fELF") {
        return Ok(Kind::Elf);
    }
    if head.get(HEADER_MAGIC_AT..HEADER_MAGIC_AT + 4) == Some(&HEADER_MAGIC) {
        return Ok(Kind::BzImage);
    }
    let guess = if head.starts_with(b"\x1f\x8b") || head.starts_with(b"\x28\xb5\x2f\xfd") {
        "it is compressed; is it an initrd?"
    } else if head.starts_with(b"070701") {
        "it is a cpio archive; is it an initrd?"
    } else if head.get(0x38..0x3c) == Some(b"ARM\x64") {
        "it is a kernel for arm64"
    } else {
        "a bzImage has \"HdrS\" at byte 0x202, a vmlinux begins with \"\\x7fELF\""
    };
    bail!("it is not an x86 kernel: {guess}");
}

fn load_bzimage(
    memory: &Memory,
    file: &mut File,
    file_size: u64,
    protocol: Option<Protocol>,
) -> anyhow::Result<Loaded> {
    let needed = || "the bzImage is damaged, or there is not enough --memory for it";
    if file_size > ram_end(memory) - HIGH_START {
        bail!(
            "it does not fit into guest memory: it has {} MiB",
            file_size.div_ceil(MIB)
        );
    }
    let result =
        BzImage::load(memory, None, file, Some(GuestAddress(HIGH_START))).with_context(needed)?;
    let header = result.setup_header.with_context(needed)?;
    let (version, flags) = (header.version, header.xloadflags);
    // Every bzImage has an entry point for protected mode.
    let has_64 = version >= PROTOCOL_XLOADFLAGS && flags & XLF_KERNEL_64 != 0;
    let protocol = protocol.unwrap_or(if has_64 {
        Protocol::Bits64
    } else {
        Protocol::Bits32
    });
    ensure!(
        has_64 || protocol == Protocol::Bits32,
        "it has no 64-bit entry point (boot protocol {}.{:02}, xloadflags {flags:#x}): a 32-bit kernel?",
        version >> 8,
        version & 0xff
    );
    let start = result.kernel_load.0;
    // The kernel unpacks itself where it prefers to be, or where it is if that is higher, and needs
    // init_size bytes there.
    let end = start
        .max(header.pref_address)
        .saturating_add(header.init_size.into())
        .max(result.kernel_end);
    let offset = match protocol {
        Protocol::Bits64 => ENTRY_64_OFFSET,
        Protocol::Bits32 => 0,
    };
    Ok(Loaded {
        protocol,
        entry: start + offset,
        header,
        end,
    })
}

fn load_elf(memory: &Memory, file: &mut File) -> anyhow::Result<Loaded> {
    let mut ident = [0; 20];
    file.read_exact(&mut ident)
        .context("the ELF file is cut short")?;
    file.rewind()?;
    // e_ident[EI_CLASS] is ELFCLASS64, e_machine is EM_X86_64.
    ensure!(
        ident[4] == 2 && ident[18] == 62,
        "the ELF file is not for 64-bit x86"
    );
    let result = Elf::load(memory, None, file, Some(GuestAddress(HIGH_START))).context(
        "the ELF file is no vmlinux (segments below 1 MiB?), is damaged, or there is not enough \
         --memory for it",
    )?;
    // A vmlinux has no setup header; this is what its decompressor would have passed on.
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: u32::from_le_bytes(HEADER_MAGIC),
        version: PROTOCOL_XLOADFLAGS,
        kernel_alignment: 0x20_0000,
        cmdline_size: 2047,
        initrd_addr_max: INITRD_MAX as u32,
        ..Default::default()
    };
    Ok(Loaded {
        protocol: Protocol::Bits64,
        entry: result.kernel_load.0,
        header,
        end: result.kernel_end,
    })
}

fn put_cmdline(memory: &Memory, cmdline: &str, header: &mut setup_header) -> anyhow::Result<()> {
    let limit = (header.cmdline_size as usize).min(CMDLINE_MAX - 1);
    ensure!(
        cmdline.len() <= limit,
        "the command line has {} bytes, the kernel takes {limit}",
        cmdline.len()
    );
    ensure!(!cmdline.contains('\0'), "the command line has a NUL in it");
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE_ADDR))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE_ADDR + cmdline.len() as u64))?;
    header.cmd_line_ptr = CMDLINE_ADDR as u32;
    Ok(())
}

/// Puts the initrd as high as it may be: the kernel unpacks itself low.
fn put_initrd(
    memory: &Memory,
    file: &mut File,
    size: u64,
    kernel_end: u64,
    header: &mut setup_header,
) -> anyhow::Result<()> {
    let max = match header.initrd_addr_max {
        0 => INITRD_MAX,
        max => max.into(),
    };
    let top = ram_end(memory).min(max + 1);
    let start = top
        .checked_sub(size)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= kernel_end)
        .with_context(|| {
            format!(
                "guest memory is too small: the kernel needs it up to {} MiB, the initrd {} MiB more",
                kernel_end.div_ceil(MIB),
                size.div_ceil(MIB)
            )
        })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, size as usize)
        .context("cannot read the initrd into guest memory")?;
    header.ramdisk_image = u32::try_from(start)?;
    header.ramdisk_size = u32::try_from(size)?;
    Ok(())
}

/// Returns the end of RAM below the hole.
fn ram_end(memory: &Memory) -> u64 {
    memory
        .iter()
        .map(|region| region.start_addr().0 + region.len())
        .filter(|end| *end <= HOLE_START)
        .max()
        .unwrap_or(0)
}

/// Describes the memory as a BIOS would.
fn fill_e820(memory: &Memory, params: &mut boot_params) -> anyhow::Result<()> {
    let mut map = vec![(0, LOW_END, E820_RAM), (LOW_END, HIGH_START, E820_RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_START);
        let end = region.start_addr().0 + region.len();
        if end > start {
            map.push((start, end, E820_RAM));
        }
    }
    ensure!(
        map.len() <= params.e820_table.len(),
        "too many memory regions"
    );
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(&map) {
        entry.addr = *start;
        entry.size = end - start;
        entry.type_ = *kind;
    }
    params.e820_entries = map.len() as u8;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use std::path::PathBuf;

    /// A bzImage of one setup sector and 4 KiB of "kernel" that is all 0xcc.
    fn image(edit: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut image = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x1fe, &BOOT_FLAG.to_le_bytes());
        put(0x202, &HEADER_MAGIC);
        put(0x206, &0x020fu16.to_le_bytes());
        put(0x211, &[0x01]);
        put(0x214, &0x10_0000u32.to_le_bytes());
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x236, &XLF_KERNEL_64.to_le_bytes());
        put(0x238, &255u32.to_le_bytes());
        put(0x258, &0x100_0000u64.to_le_bytes());
        put(0x260, &0x20_0000u32.to_le_bytes());
        edit(&mut image);
        image.extend([0xcc; 4096]);
        image
    }

    struct Files(Vec<PathBuf>);

    impl Files {
        fn add(&mut self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = std::env::temp_dir().join(format!("rkvm-vmm-{}-{name}", std::process::id()));
            std::fs::write(&path, bytes).unwrap();
            self.0.push(path.clone());
            path
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            for path in &self.0 {
                let _ = std::fs::remove_file(path);
            }
        }
    }

    fn params(memory: &Memory) -> boot_params {
        let mut bytes = vec![0; size_of::<boot_params>()];
        memory
            .read_slice(&mut bytes, GuestAddress(BOOT_PARAMS_ADDR))
            .unwrap();
        // SAFETY: boot_params is plain data, and the buffer has its size.
        unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
    }

    #[test]
    fn bzimage_with_initrd_and_command_line() {
        let mut files = Files(vec![]);
        let kernel = files.add("ok", &image(|_| {}));
        let initrd = files.add("ok-initrd", &[0xaa; 5000]);
        let memory = memory::allocate(64 << 20).unwrap();
        let entry = load(&memory, &kernel, Some(&initrd), "quiet x=1", None, None).unwrap();
        assert_eq!(
            entry,
            Entry::Long {
                rip: 0x10_0200,
                rsi: BOOT_PARAMS_ADDR
            }
        );
        let byte: u8 = memory.read_obj(GuestAddress(0x10_0000)).unwrap();
        assert_eq!(byte, 0xcc);

        let params = params(&memory);
        let header = params.hdr;
        assert_eq!({ header.header }, 0x5372_6448);
        assert_eq!(header.type_of_loader, LOADER_UNDEFINED);
        let mut cmdline = [0xff; 10];
        memory
            .read_slice(&mut cmdline, GuestAddress({ header.cmd_line_ptr }.into()))
            .unwrap();
        assert_eq!(&cmdline, b"quiet x=1\0");

        assert_eq!({ header.ramdisk_size }, 5000);
        assert_eq!({ header.ramdisk_image }, (64 << 20) - 0x2000);
        let mut tail = [0; 2];
        memory
            .read_slice(&mut tail, GuestAddress((64 << 20) - 0x2000 + 4999))
            .unwrap();
        assert_eq!(tail, [0xaa, 0]);

        let map: Vec<_> = params.e820_table[..params.e820_entries.into()]
            .iter()
            .map(|entry| ({ entry.addr }, { entry.size }, { entry.type_ }))
            .collect();
        assert_eq!(
            map,
            [
                (0, LOW_END, E820_RAM),
                (LOW_END, HIGH_START - LOW_END, E820_RESERVED),
                (HIGH_START, (64 << 20) - HIGH_START, E820_RAM)
            ]
        );
    }

    #[test]
    fn bzimage_in_protected_mode() {
        let mut files = Files(vec![]);
        let by_32 = Entry::Protected {
            code: Selector::BootCode32,
            eip: 0x10_0000,
            esi: BOOT_PARAMS_ADDR as u32,
        };
        // A 32-bit kernel, an old one that could not say what it is, and one of 64 bits that is to be
        // started so.
        for (name, flags, version, protocol) in [
            ("i386", 0, 0x020f_u16, None),
            ("old", XLF_KERNEL_64, 0x0206, None),
            ("by-32", XLF_KERNEL_64, 0x020f, Some(Protocol::Bits32)),
        ] {
            let kernel = files.add(
                name,
                &image(|image| {
                    image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
                    image[0x236..0x238].copy_from_slice(&flags.to_le_bytes());
                }),
            );
            let memory = memory::allocate(64 << 20).unwrap();
            let entry = load(&memory, &kernel, None, "", protocol, None).unwrap();
            assert_eq!(entry, by_32, "{name}");
            let code: u64 = memory
                .read_obj(GuestAddress(memory::GDT_ADDR + 0x10))
                .unwrap();
            assert_eq!(code, 0x00cf_9b00_0000_ffff, "{name}");
        }
    }

    #[test]
    fn memory_around_the_hole_is_described() {
        let memory = memory::allocate(5 << 30).unwrap();
        let mut params = boot_params::default();
        fill_e820(&memory, &mut params).unwrap();
        assert_eq!(params.e820_entries, 4);
        let (low, high) = (params.e820_table[2], params.e820_table[3]);
        assert_eq!({ low.addr } + { low.size }, memory::HOLE_START);
        assert_eq!(({ high.addr }, { high.size }), (memory::HOLE_END, 2 << 30));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let mut files = Files(vec![]);
        let memory = memory::allocate(64 << 20).unwrap();
        let mut fails_by = |name: &str, bytes: &[u8], cmdline: &str, protocol| {
            let kernel = files.add(name, bytes);
            format!(
                "{:#}",
                load(&memory, &kernel, None, cmdline, protocol, None).unwrap_err()
            )
        };
        let old = image(|image| image[0x236] = 0);
        assert!(fails_by("32", &old, "", Some(Protocol::Bits64)).contains("no 64-bit entry"));
        let elf = b"\x7fELF\x02\x01";
        assert!(fails_by("elf", elf, "", Some(Protocol::Bits32)).contains("no 32-bit entry"));
        let mut fails =
            |name: &str, bytes: &[u8], cmdline: &str| fails_by(name, bytes, cmdline, None);
        assert!(fails("text", b"hello", "").contains("not an x86 kernel"));
        assert!(fails("gzip", b"\x1f\x8bxxx", "").contains("initrd"));
        assert!(fails("long", &image(|_| {}), &"x".repeat(256)).contains("takes 255"));
        let elf32 = [&b"\x7fELF\x01\x01"[..], &[0; 64]].concat();
        assert!(fails("elf32", &elf32, "").contains("not for 64-bit"));
    }

    #[test]
    fn too_little_memory_is_told() {
        let mut files = Files(vec![]);
        let kernel = files.add("small", &image(|_| {}));
        let initrd = files.add("small-initrd", &vec![0; 2 << 20]);
        let fails = |mib: u64| {
            let memory = memory::allocate(mib << 20).unwrap();
            format!(
                "{:#}",
                load(&memory, &kernel, Some(&initrd), "", None, None).unwrap_err()
            )
        };
        assert!(fails(1).contains("more --memory"));
        assert!(
            fails(17).contains("up to 18 MiB to unpack"),
            "{}",
            fails(17)
        );
        assert!(fails(19).contains("too small"), "{}", fails(19));
        let memory = memory::allocate(20 << 20).unwrap();
        assert!(load(&memory, &kernel, Some(&initrd), "", None, None).is_ok());
    }
}
