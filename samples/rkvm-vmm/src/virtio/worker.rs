// SPDX-License-Identifier: GPL-2.0

//! A device's thread: waits for its files and serves.

use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::thread;
use std::thread::JoinHandle;

use anyhow::Context;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

/// A thread that ends when this is dropped.
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// What a thread does.
pub trait Job: Send + 'static {
    /// The files to wait for; a negative number is waited for in vain.
    fn files(&self) -> Vec<RawFd>;
    /// The file of this index is ready.
    fn ready(&mut self, index: usize);
}

impl Worker {
    /// Starts the thread `name`.
    ///
    /// # Errors
    /// There can be no thread, or no file.
    pub fn start(name: &str, mut job: impl Job) -> anyhow::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK).context("eventfd")?;
        let stopped = stop.try_clone().context("eventfd")?;
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || while wait(&stopped, &mut job) {})
            .with_context(|| format!("cannot start the thread of {name}"))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // Had it panicked, its message was printed.
            let _ = thread.join();
        }
    }
}

/// Waits once and does what is to be done; returns whether to go on.
fn wait(stop: &EventFd, job: &mut impl Job) -> bool {
    let mut files: Vec<_> = std::iter::once(stop.as_raw_fd())
        .chain(job.files())
        .map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: the array is valid for its length.
    unsafe { libc::poll(files.as_mut_ptr(), files.len() as libc::nfds_t, -1) };
    if files[0].revents != 0 {
        return false;
    }
    for (index, file) in files[1..].iter().enumerate() {
        if file.revents != 0 {
            job.ready(index);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Echo(EventFd, mpsc::Sender<u64>);

    impl Job for Echo {
        fn files(&self) -> Vec<RawFd> {
            vec![-1, self.0.as_raw_fd()]
        }
        fn ready(&mut self, index: usize) {
            assert_eq!(index, 1);
            self.1.send(self.0.read().unwrap()).unwrap();
        }
    }

    #[test]
    fn works_until_dropped() {
        let file = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, receiver) = mpsc::channel();
        let worker = Worker::start("echo", Echo(file.try_clone().unwrap(), sender)).unwrap();
        file.write(3).unwrap();
        assert_eq!(receiver.recv(), Ok(3));
        drop(worker);
        assert!(receiver.recv().is_err(), "the thread has dropped its end");
    }
}
