// SPDX-License-Identifier: GPL-2.0

//! QEMU, unmodified, on the device under test: its process, its monitor, and the guest's console.
//!
//! The console is a shell on the guest's first serial line (`scripts/lib/qemu-init`); the monitor is QMP,
//! of which no more is understood than whether a command succeeded, and the text that it returned.

use crate::check::Verdict;
use crate::{ensure, fail, Env, Outcome};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where the machine has QEMU, and what it boots; relative to the directory where tests run.
const PROGRAM: &str = "opt/qemu/qemu-system-x86_64";
const IMAGES: &str = "opt/qemu/qemu-img";
const KERNEL: &str = "guest/vmlinuz";
const INITRAMFS: &str = "guest/initramfs";

/// How long the guest or QEMU may be silent when something is expected of it.
const PATIENCE: Duration = Duration::from_secs(90);

/// What the guest's init says when it is up.
const UP: &str = "guest: Linux ";
const PROMPT: &str = "guest# ";

/// A virtual machine that is to be started.
#[derive(Debug, Clone)]
pub struct Config {
    /// The KVM device.
    pub device: String,
    /// `-machine`, with its options.
    pub machine: &'static str,
    /// `-cpu`.
    pub cpu: &'static str,
    /// Number of virtual processors.
    pub cpus: u32,
    /// More options of `-accel kvm`, each with a comma before it.
    pub accel: &'static str,
    /// All other arguments.
    pub more: Vec<String>,
}

impl Config {
    /// A machine with one processor, like the host's, on the device under test.
    #[must_use]
    pub fn new(env: &Env, machine: &'static str) -> Self {
        Config {
            device: env.device.clone(),
            machine,
            cpu: "host",
            cpus: 1,
            accel: "",
            more: Vec::new(),
        }
    }

    /// With these arguments too, separated by spaces.
    #[must_use]
    pub fn with(mut self, arguments: &str) -> Self {
        self.more.extend(arguments.split(' ').map(String::from));
        self
    }

    /// With Linux, loaded by QEMU.
    #[must_use]
    pub fn linux(self) -> Self {
        let mut c = self.with(&format!("-kernel {KERNEL} -initrd {INITRAMFS} -append"));
        c.more
            .push("console=tty0 console=ttyS0 quiet panic=-1".into());
        c
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// A skipped test if there is no QEMU here.
    pub fn start(&self) -> Result<Qemu, Verdict> {
        Qemu::start(self)
    }
}

/// A stream to QEMU, and what came from it.
struct Line {
    stream: UnixStream,
    text: String,
    /// How much of the text was taken.
    taken: usize,
}

impl Line {
    /// A pair of connected ends: ours, and the one that QEMU inherits.
    fn pair() -> Result<(Line, UnixStream), Verdict> {
        let (ours, theirs) = UnixStream::pair().map_err(|e| failed("socketpair", &e))?;
        // SAFETY: Changes a flag of a descriptor that is ours.
        unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFD, 0) };
        Ok((Line::new(ours), theirs))
    }

    fn new(stream: UnixStream) -> Line {
        Line {
            stream,
            text: String::new(),
            taken: 0,
        }
    }

    fn send(&mut self, text: &str) -> Outcome {
        self.stream
            .write_all(text.as_bytes())
            .map_err(|e| failed("write to QEMU", &e))
    }

    /// Reads what comes until `deadline`; false if nothing more will.
    fn read(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || self.stream.set_read_timeout(Some(left)).is_err() {
            return false;
        }
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                let text = String::from_utf8_lossy(&buffer[..n]);
                self.text.push_str(&text.replace('\r', ""));
                true
            }
        }
    }

    /// Takes the text up to and with `mark`, which must come.
    fn until(&mut self, mark: &str) -> Result<String, Verdict> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text[self.taken..].find(mark) {
                let end = self.taken + at + mark.len();
                let text = self.text[self.taken..end].to_string();
                self.taken = end;
                return Ok(text);
            }
            if !self.read(deadline) {
                fail!("'{}' does not come", mark.trim());
            }
        }
    }

    /// Takes the next line.
    fn next(&mut self) -> Result<String, Verdict> {
        self.until("\n")
    }
}

/// A running QEMU. Dropped, it is killed; what its guest said goes to the test's output.
pub struct Qemu {
    child: Child,
    console: Line,
    monitor: Line,
    /// Number of the shell command, which makes its end known.
    commands: u32,
    /// A directory of its own in `/tmp`.
    pub directory: String,
    name: String,
}

/// A failure of the system's.
#[must_use]
pub fn failed(what: &str, e: &std::io::Error) -> Verdict {
    Verdict::Fail(format!("{what}: {e}"))
}

/// A new directory in `/tmp`.
///
/// # Errors
///
/// That it cannot be made.
pub fn scratch() -> Result<String, Verdict> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = format!("/tmp/qemu-{}-{number}", std::process::id());
    std::fs::create_dir(&path).map_err(|e| failed(&path, &e))?;
    Ok(path)
}

/// Runs `qemu-img` with arguments that are separated by spaces; its output.
///
/// # Errors
///
/// That it failed, with what it said.
pub fn image(arguments: &str) -> Result<String, Verdict> {
    let out = Command::new(IMAGES)
        .args(arguments.split(' '))
        .output()
        .map_err(|e| failed(IMAGES, &e))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(
        out.status.success(),
        "qemu-img {arguments}: {}{text}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(text)
}

impl Qemu {
    fn start(config: &Config) -> Result<Qemu, Verdict> {
        if !std::path::Path::new(PROGRAM).exists() {
            crate::skip!("there is no {PROGRAM}");
        }
        let begin = Instant::now();
        let directory = scratch()?;
        let (console, serial) = Line::pair()?;
        let (monitor, qmp) = Line::pair()?;
        let errors = format!("{directory}/stderr");
        let sink = File::create(&errors).map_err(|e| failed(&errors, &e))?;
        let (device, accel) = (&config.device, config.accel);
        let child = Command::new(PROGRAM)
            .args(["-accel", &format!("kvm,device={device}{accel}")])
            .args(["-machine", config.machine, "-cpu", config.cpu])
            .args(["-smp", &config.cpus.to_string(), "-m", "256"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args([
                "-chardev",
                &format!("socket,id=s,fd={}", serial.as_raw_fd()),
            ])
            .args(["-chardev", &format!("socket,id=q,fd={}", qmp.as_raw_fd())])
            .args(["-serial", "chardev:s", "-mon", "chardev=q,mode=control"])
            .args(&config.more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(sink)
            .spawn()
            .map_err(|e| failed(PROGRAM, &e))?;
        let mut qemu = Qemu {
            child,
            console,
            monitor,
            commands: 0,
            directory,
            name: format!("{device} {}", config.machine),
        };
        drop((serial, qmp));
        qemu.monitor.until("{\"QMP\"")?;
        qemu.monitor.next()?;
        qemu.execute("qmp_capabilities", "")?;
        println!("QEMU runs after {:?}", begin.elapsed());
        Ok(qemu)
    }

    /// A QMP command with `arguments`, the inside of a JSON object; what follows `"return": ` in its
    /// answer. Events that come meanwhile are passed over.
    ///
    /// # Errors
    ///
    /// QEMU's, or that it does not answer.
    pub fn execute(&mut self, command: &str, arguments: &str) -> Result<String, Verdict> {
        let line = format!("{{\"execute\": \"{command}\", \"arguments\": {{{arguments}}}}}\n");
        self.monitor.send(&line)?;
        loop {
            let answer = self.monitor.next()?;
            if let Some(value) = answer.strip_prefix("{\"return\": ") {
                return Ok(value.trim_end().trim_end_matches('}').to_string());
            }
            if answer.starts_with("{\"error\"") {
                fail!("{command} {arguments}: {}", answer.trim());
            }
        }
    }

    /// A command of the monitor for people; its output.
    ///
    /// # Errors
    ///
    /// That QEMU does not answer.
    pub fn human(&mut self, command: &str) -> Result<String, Verdict> {
        let quoted = command.replace('\\', "\\\\").replace('"', "\\\"");
        let text = self.execute(
            "human-monitor-command",
            &format!("\"command-line\": \"{quoted}\""),
        )?;
        let text = text.trim_matches('"');
        Ok(text
            .replace("\\r", "")
            .replace("\\n", "\n")
            .replace("\\\"", "\""))
    }

    /// Waits until the guest's monitor says that what `command` prints has `text`.
    ///
    /// # Errors
    ///
    /// That it does not come to that.
    pub fn human_until(&mut self, command: &str, text: &str) -> Result<String, Verdict> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.human(command)?;
            if said.contains(text) {
                return Ok(said);
            }
            ensure!(
                Instant::now() < deadline,
                "{command} says '{said}', never '{text}'"
            );
            crate::host::sleep_ms(100);
        }
    }

    /// Waits until the guest has a shell on its console; what its init says about it.
    ///
    /// # Errors
    ///
    /// That it does not come up.
    pub fn boot(&mut self) -> Result<String, Verdict> {
        let begin = Instant::now();
        self.console.until(UP)?;
        let about = self.console.next()?;
        self.console.until(PROMPT)?;
        println!("up after {:?}", begin.elapsed());
        self.shell("stty -echo; PS1=")?;
        Ok(about)
    }

    /// Runs a shell command in the guest; its output.
    ///
    /// # Errors
    ///
    /// That it fails, or does not end.
    pub fn shell(&mut self, command: &str) -> Result<String, Verdict> {
        self.shell_start(command)?;
        self.shell_end()
    }

    /// Has the guest begin with a command; [`Self::shell_end`] waits for its end.
    ///
    /// # Errors
    ///
    /// That nothing can be sent.
    pub fn shell_start(&mut self, command: &str) -> Outcome {
        self.commands += 1;
        let number = self.commands;
        self.console
            .send(&format!("{command}; echo \"end-{number}=$?.\"\n"))
    }

    /// The output of the command that was begun.
    ///
    /// # Errors
    ///
    /// That it fails, or does not end.
    pub fn shell_end(&mut self) -> Result<String, Verdict> {
        let mark = format!("end-{}=", self.commands);
        let mut text = String::new();
        loop {
            text += &self.console.until(&mark)?;
            let status = self.console.until(".")?;
            match status.trim_end_matches('.').parse::<u32>() {
                Ok(0) => return Ok(text.trim_end_matches(&mark).trim().to_string()),
                Ok(n) => fail!("the guest's command ends with {n}: {text}"),
                // The command itself, echoed.
                Err(_) => text.clear(),
            }
        }
    }

    /// Types a line that ends the shell.
    ///
    /// # Errors
    ///
    /// That nothing can be sent.
    pub fn type_line(&mut self, line: &str) -> Outcome {
        self.console.send(&format!("{line}\n"))
    }

    /// Goes on with the guest's shell where `source`, from which it migrated, left off.
    pub fn goes_on(&mut self, source: &Qemu) {
        self.commands = source.commands;
    }

    /// Waits for a text on the console.
    ///
    /// # Errors
    ///
    /// That it does not come.
    pub fn says(&mut self, text: &str) -> Outcome {
        self.console.until(text).map(drop)
    }

    /// Has the guest power off; QEMU must end well.
    ///
    /// # Errors
    ///
    /// That it does not.
    pub fn power_off(&mut self) -> Outcome {
        self.type_line("exit")?;
        self.ends(0)
    }

    /// Waits for the end of QEMU, which must be with `status`.
    ///
    /// # Errors
    ///
    /// Another status, or none.
    pub fn ends(&mut self, status: i32) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(Some(s)) = self.child.try_wait() {
                ensure!(
                    s.code() == Some(status),
                    "QEMU ended: {s}, expected {status}"
                );
                return Ok(());
            }
            // So that it is not held up.
            if !self
                .console
                .read(Instant::now() + Duration::from_millis(50))
            {
                crate::host::sleep_ms(20);
            }
            ensure!(Instant::now() < deadline, "QEMU does not end");
        }
    }

    /// The text that the guest's VGA adapter shows.
    ///
    /// # Errors
    ///
    /// That QEMU does not tell.
    pub fn screen(&mut self) -> Result<String, Verdict> {
        let path = format!("{}/screen", self.directory);
        self.human(&format!("pmemsave 0xb8000 4000 \"{path}\""))?;
        let bytes = std::fs::read(&path).map_err(|e| failed(&path, &e))?;
        let text: Vec<u8> = bytes.chunks(2).map(|cell| cell[0]).collect();
        let rows = text.chunks(80).map(|row| {
            let row: String = row
                .iter()
                .map(|&b| {
                    if b.is_ascii_graphic() {
                        char::from(b)
                    } else {
                        ' '
                    }
                })
                .collect();
            row.trim_end().to_string()
        });
        Ok(rows.collect::<Vec<_>>().join("\n"))
    }

    /// A stream to a socket of QEMU's at `path`.
    ///
    /// # Errors
    ///
    /// That there is none.
    pub fn connect(path: &str) -> Result<UnixStream, Verdict> {
        let stream = UnixStream::connect(path).map_err(|e| failed(path, &e))?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .map_err(|e| failed(path, &e))?;
        Ok(stream)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        while self
            .console
            .read(Instant::now() + Duration::from_millis(50))
        {}
        let errors = std::fs::read_to_string(format!("{}/stderr", self.directory));
        for line in self
            .console
            .text
            .lines()
            .chain(errors.unwrap_or_default().lines())
        {
            println!("{}: {}", self.name, line.replace('\x1b', "^["));
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
