//! [`SilentServer`]: a FUSE file system whose server stops replying.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::time::Duration;

use rustix::mount::{mount, unmount, MountFlags, UnmountFlags};

use crate::{skipped, MIB};

/// Opcodes of Linux `include/uapi/linux/fuse.h`.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;

/// The FUSE request of close(2), which the kernel sends for each descriptor.
pub const FUSE_FLUSH: u32 = 25;

/// A mounted FUSE file system of one file, whose server is a thread of this program.
///
/// The server lets the test open the file, and then reads requests without replying. The drop
/// unmounts the file system: the kernel then ends all requests.
#[derive(Debug)]
pub struct SilentServer {
    directory: tempfile::TempDir,
    is_silent: Arc<AtomicBool>,
    /// The opcodes that arrived after the server stopped replying.
    unanswered: Arc<Mutex<Vec<u32>>>,
}

impl SilentServer {
    /// Mounts the file system. Reports `test` as [skipped] and returns `None` if the system refuses
    /// that.
    pub fn mount(test: &str) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|error| skipped(test, format!("/dev/fuse: {error}")));
        let device = device.ok()?;
        let directory = tempfile::tempdir().unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0\0",
            device.as_raw_fd()
        );
        let options = CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        let flags = MountFlags::empty();
        // Not mount(8): exec(2) closes descriptors, and would wait for this server.
        if let Err(error) = mount("vm-memory-test", directory.path(), "fuse", flags, options) {
            skipped(test, format!("cannot mount a FUSE file system: {error}"));
            return None;
        }
        let (is_silent, unanswered) = (Arc::default(), Arc::default());
        let (silent, log) = (Arc::clone(&is_silent), Arc::clone(&unanswered));
        std::thread::spawn(move || serve(device, &silent, &log));
        Some(Self {
            directory,
            is_silent,
            unanswered,
        })
    }

    /// Opens the file, whose length is 1 MiB. The server then stops replying.
    pub fn open(&self) -> File {
        let path = self.directory.path().join("file");
        let file = File::options().read(true).write(true).open(path).unwrap();
        self.is_silent.store(true, Ordering::SeqCst);
        file
    }

    /// Returns the opcodes of the requests since then, such as [`FUSE_FLUSH`].
    pub fn unanswered(&self) -> Vec<u32> {
        self.unanswered.lock().unwrap().clone()
    }
}

impl Drop for SilentServer {
    fn drop(&mut self) {
        let flags = UnmountFlags::FORCE | UnmountFlags::DETACH;
        let _ = unmount(self.directory.path(), flags);
    }
}

/// Serves requests until the file system is unmounted.
fn serve(mut device: File, is_silent: &AtomicBool, unanswered: &Mutex<Vec<u32>>) {
    let mut request = vec![0; 1 << 18];
    while device.read(&mut request).is_ok() {
        let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
        if is_silent.load(Ordering::SeqCst) {
            unanswered.lock().unwrap().push(opcode);
            continue;
        }
        let number = |n: u32| n.to_ne_bytes().to_vec();
        let attributes = |inode: u64, mode: u32| {
            let mut all: Vec<u8> = [inode, MIB, 8, 0, 0, 0]
                .iter()
                .flat_map(|n| n.to_ne_bytes())
                .collect();
            all.extend(
                [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]
                    .iter()
                    .flat_map(|n: &u32| n.to_ne_bytes()),
            );
            all
        };
        let reply = match opcode {
            // Version 7.31, and zeroes for the rest of `fuse_init_out`.
            INIT => [number(7), number(31), vec![0; 56]].concat(),
            LOOKUP => {
                let mut entry = vec![0; 40];
                entry[0] = 2;
                [entry, attributes(2, 0o100_666)].concat()
            }
            GETATTR => [vec![0; 16], attributes(1, 0o40_755)].concat(),
            OPEN => vec![0; 16],
            _ => Vec::new(),
        };
        let unknown = if reply.is_empty() { -libc::ENOSYS } else { 0 };
        let head = [
            number(16 + reply.len() as u32),
            unknown.to_ne_bytes().to_vec(),
        ]
        .concat();
        let _ = device.write(&[&head, &request[8..16], &reply].concat());
    }
}

/// Returns the result of `work`, which runs in a separate thread.
///
/// # Panics
///
/// Panics if the work takes a minute, or panics.
pub fn returned<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    let result = receiver.recv_timeout(Duration::from_secs(60));
    result.expect("the call waits for the server")
}
