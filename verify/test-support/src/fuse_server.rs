//! [`FuseServer`]: a FUSE file system whose server stops replying, or fails a part of a read.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{mpsc, Arc, Mutex};
use std::time::Duration;

use rustix::mount::{mount, unmount, MountFlags, UnmountFlags};

use crate::{skipped, MIB};

/// Opcodes of Linux `include/uapi/linux/fuse.h`.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;

/// Flags of its `fuse_init_out`: the kernel sends the parts of a direct read at once.
const ASYNC_READ: u32 = 1;
const ASYNC_DIO: u32 = 1 << 15;

/// The FUSE request of close(2), which the kernel sends for each descriptor.
pub const FUSE_FLUSH: u32 = 25;

/// A mounted FUSE file system of one file, whose server is a thread of this program.
///
/// The length of the file is 1 MiB. The drop unmounts the file system: the kernel then ends all
/// requests.
#[derive(Debug)]
pub struct FuseServer {
    directory: tempfile::TempDir,
    state: Arc<Mutex<State>>,
}

/// The replies of the server.
#[derive(Debug, Default)]
struct State {
    is_silent: bool,
    /// The opcodes that arrived after the server stopped replying.
    unanswered: Vec<u32>,
    /// The error of a read at offset 0. It is 0 for a reply without bytes.
    first_error: i32,
}

impl FuseServer {
    /// Mounts the file system. Reports `test` as [skipped] and returns `None` if the system refuses
    /// that.
    pub fn mount(test: &str) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|error| skipped(test, format!("/dev/fuse: {error}")));
        let device = device.ok()?;
        let directory = tempfile::tempdir().unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,max_read=4096\0",
            device.as_raw_fd()
        );
        let options = CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        let flags = MountFlags::empty();
        // Not mount(8): exec(2) closes descriptors, and would wait for this server.
        if let Err(error) = mount("vm-memory-test", directory.path(), "fuse", flags, options) {
            skipped(test, format!("cannot mount a FUSE file system: {error}"));
            return None;
        }
        let state = Arc::default();
        let shared = Arc::clone(&state);
        std::thread::spawn(move || serve(device, &shared));
        Some(Self { directory, state })
    }

    /// Opens the file. The server then reads requests without replying.
    pub fn open(&self) -> File {
        let path = self.directory.path().join("file");
        let file = File::options().read(true).write(true).open(path).unwrap();
        self.state.lock().unwrap().is_silent = true;
        file
    }

    /// Opens the file with `O_DIRECT`. The kernel reads it in parts of 4 KiB, all at once.
    ///
    /// The server replies to the part at offset 0 with `first_error`, or with 0 bytes if that is 0.
    /// It replies to the others with bytes 0xaa.
    pub fn open_direct(&self, first_error: i32) -> File {
        self.state.lock().unwrap().first_error = first_error;
        let path = self.directory.path().join("file");
        let mut options = File::options();
        let options = options.read(true).custom_flags(libc::O_DIRECT);
        options.open(path).unwrap()
    }

    /// Returns the opcodes of the requests since the server stopped replying, such as
    /// [`FUSE_FLUSH`].
    pub fn unanswered(&self) -> Vec<u32> {
        self.state.lock().unwrap().unanswered.clone()
    }
}

impl Drop for FuseServer {
    fn drop(&mut self) {
        let flags = UnmountFlags::FORCE | UnmountFlags::DETACH;
        let _ = unmount(self.directory.path(), flags);
    }
}

/// Serves requests until the file system is unmounted.
fn serve(mut device: File, state: &Mutex<State>) {
    let mut request = vec![0; 1 << 18];
    while device.read(&mut request).is_ok() {
        let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
        let mut state = state.lock().unwrap();
        if state.is_silent {
            state.unanswered.push(opcode);
            continue;
        }
        let mut error = 0;
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
            // Version 7.31, no bytes ahead, the flags, 64 requests at once, 4 KiB for each write,
            // and zeroes for the rest of `fuse_init_out`.
            INIT => {
                let numbers = [7, 31, 0, ASYNC_READ | ASYNC_DIO, 64 << 16 | 64, 4096].map(number);
                [numbers.concat(), vec![0; 40]].concat()
            }
            LOOKUP => {
                let mut entry = vec![0; 40];
                entry[0] = 2;
                [entry, attributes(2, 0o100_666)].concat()
            }
            GETATTR if request[16] == 2 => [vec![0; 16], attributes(2, 0o100_666)].concat(),
            GETATTR => [vec![0; 16], attributes(1, 0o40_755)].concat(),
            OPEN => vec![0; 16],
            READ if request[48..56] == [0; 8] => {
                error = -state.first_error;
                Vec::new()
            }
            READ => vec![0xaa; 4096],
            _ => {
                error = -libc::ENOSYS;
                Vec::new()
            }
        };
        let head = [
            number(16 + reply.len() as u32),
            error.to_ne_bytes().to_vec(),
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
