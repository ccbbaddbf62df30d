//! A descriptor whose server never replies does not delay a build that requires seals. Nor does a
//! memfd that its sender has locked.
//!
//! The server is a FUSE file system of this program: it lets the test open a file, and then reads
//! requests without replying.
#![cfg(target_os = "linux")]
#![expect(
    clippy::disallowed_methods,
    reason = "no seccomp filter refuses getrlimit in these tests"
)]

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::time::Duration;

use rustix::mount::{mount, unmount, MountFlags, UnmountFlags};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
use test_support::{in_own_process, skipped, LockedFile, MIB};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{
    describe, prefault, residency, Backing, BuildError, Description, DescriptionError, Descriptors,
    Lock, MemoryBuilder, Region,
};

/// Opcodes of Linux `include/uapi/linux/fuse.h`.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const FLUSH: u32 = 25;
const INIT: u32 = 26;

/// A mounted FUSE file system. It has one file, `file`.
struct Server {
    directory: tempfile::TempDir,
    is_silent: Arc<AtomicBool>,
    /// The opcodes that arrived after the server stopped replying.
    unanswered: Arc<Mutex<Vec<u32>>>,
}

impl Server {
    fn mount(test: &str) -> Option<Self> {
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

    /// Opens the file and stops replying.
    fn open(&self) -> File {
        let path = self.directory.path().join("file");
        let file = File::options().read(true).write(true).open(path).unwrap();
        self.is_silent.store(true, Ordering::SeqCst);
        file
    }
}

impl Drop for Server {
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

/// Returns the result of `work`, which runs in a separate thread. Fails if it takes too long.
fn returned<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    let result = receiver.recv_timeout(Duration::from_secs(60));
    result.expect("the call waits for the server")
}

#[test]
fn build_that_requires_seals_does_not_wait_for_server_of_file() {
    let Some(server) = Server::mount("build_that_requires_seals_does_not_wait_for_server_of_file")
    else {
        return;
    };
    let file = server.open();
    // The second descriptor is checked before the first one is used.
    let first = Region::new(GuestAddress(0), MIB)
        .backing(Backing::shared_file(file.try_clone().unwrap(), 0));
    let second = Region::new(GuestAddress(MIB), MIB).backing(Backing::shared_file(file, 0));
    let error = returned(|| {
        let builder = MemoryBuilder::new().region(first.sealed(true));
        builder.region(second.sealed(true)).build::<()>().map(drop)
    });
    assert!(
        matches!(error, Err(BuildError::NotSealed { .. })),
        "{error:?}"
    );
    let asked = server.unanswered.lock().unwrap().clone();
    assert!(asked.iter().all(|opcode| *opcode == FLUSH), "{asked:?}");
}

#[test]
fn description_with_unused_descriptor_does_not_wait_for_its_server() {
    let Some(server) =
        Server::mount("description_with_unused_descriptor_does_not_wait_for_its_server")
    else {
        return;
    };
    let region = Region::new(GuestAddress(0), MIB).backing(Backing::Memfd);
    let memory = MemoryBuilder::new().region(region).build::<()>().unwrap();
    let (description, files) = describe(&memory).unwrap();
    let file = server.open();
    let (unused, wrong) = (file.try_clone().unwrap(), file);
    let built = returned(move || {
        let received = vec![
            files.get(0).unwrap().try_clone().unwrap().into(),
            unused.into(),
        ];
        description
            .builder(received.into())
            .unwrap()
            .build::<()>()
            .map(drop)
    });
    assert!(built.is_ok(), "{built:?}");
    let mut newer = Description::new(Vec::new());
    newer.version += 1;
    let error = returned(move || newer.builder(vec![wrong.into()].into()).map(drop));
    assert!(matches!(error, Err(DescriptionError::Version { .. })));
}

#[test]
fn drop_of_builder_that_requires_seals_does_not_wait_for_server_of_file() {
    let test = "drop_of_builder_that_requires_seals_does_not_wait_for_server_of_file";
    let Some(server) = Server::mount(test) else {
        return;
    };
    let region = Region::new(GuestAddress(0), MIB).backing(Backing::Memfd);
    let memory = MemoryBuilder::new().region(region).build::<()>().unwrap();
    let (mut description, _) = describe(&memory).unwrap();
    description.regions[0].options.sealed = true;
    let file = server.open();
    returned(move || drop(description.builder(vec![file.into()].into()).unwrap()));
}

/// A receiver that refuses a description drops the descriptors that came with it.
#[test]
fn drop_of_received_descriptors_does_not_wait_for_server_of_file() {
    let Some(server) =
        Server::mount("drop_of_received_descriptors_does_not_wait_for_server_of_file")
    else {
        return;
    };
    let file = server.open();
    returned(move || {
        let received = Descriptors::from(vec![file.into()]);
        let clone = received.clone();
        drop(received);
        assert_eq!(clone.len(), 1);
    });
}

#[test]
fn build_of_memfd_that_its_sender_has_locked_does_not_wait() {
    let region = Region::new(GuestAddress(0), MIB).backing(Backing::Memfd);
    let memory = MemoryBuilder::new().region(region).build::<()>().unwrap();
    let (description, files) = describe(&memory).unwrap();
    let test = "build_of_memfd_that_its_sender_has_locked_does_not_wait";
    let Some(_locked) = LockedFile::lock(files.get(0).unwrap(), test) else {
        return;
    };
    for (lock, populates) in [
        (Lock::No, false),
        (Lock::No, true),
        (Lock::Now, false),
        (Lock::OnFault, true),
    ] {
        let (mut description, file) = (
            description.clone(),
            files.get(0).unwrap().try_clone().unwrap(),
        );
        description.regions[0].options.lock = lock;
        returned(move || {
            let continued = |_| ControlFlow::Continue(());
            let mut builder = description.builder(vec![file.into()].into()).unwrap();
            if populates {
                builder = builder.prefault(NonZeroUsize::MIN, continued);
            }
            let memory: GuestMemoryMmap = builder.build().unwrap();
            memory.write_obj(1u8, GuestAddress(0x3000)).unwrap();
            prefault(&memory, NonZeroUsize::MIN, continued).unwrap();
            assert_eq!(residency(&memory).unwrap()[0].1.resident, MIB);
            describe(&memory).unwrap();
        });
    }
}

/// Returns the number of threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Drops a received descriptor.
fn receive(file: File) {
    let mut newer = Description::new(Vec::new());
    newer.version += 1;
    newer.builder(vec![file.into()].into()).unwrap_err();
}

#[test]
fn descriptors_of_silent_servers_take_at_most_64_threads() {
    // The threads that wait for a server count for the whole process.
    in_own_process(
        "descriptors_of_silent_servers_take_at_most_64_threads",
        |test| {
            let test = test.to_owned();
            returned(move || {
                let Some(server) = Server::mount(&test) else {
                    return;
                };
                let (file, before) = (server.open(), threads());
                for _ in 0..100 {
                    receive(file.try_clone().unwrap());
                }
                let after = threads();
                // The system ends all requests, and with them the threads and the server.
                drop(server);
                drop(file);
                assert_eq!(after, before + 64);
                while threads() >= before {
                    std::thread::yield_now();
                }
                let Some(server) = Server::mount(&test) else {
                    return;
                };
                receive(server.open());
                assert_eq!(threads(), before + 1);
            });
        },
    );
}

/// No server delays the threads, but they are slower than the caller.
#[test]
fn many_received_descriptors_are_all_closed() {
    in_own_process("many_received_descriptors_are_all_closed", |_| {
        let file = File::open("/dev/null").unwrap();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        for _ in 0..400 {
            // The threads may be late, and a process has a limit of descriptors.
            test_support::wait_until(|| open() < before + 500);
            for _ in 0..10 {
                receive(file.try_clone().unwrap());
            }
        }
        test_support::wait_until(|| open() == before);
    });
}

#[test]
fn descriptor_without_thread_to_close_it_does_not_delay_caller() {
    in_own_process(
        "descriptor_without_thread_to_close_it_does_not_delay_caller",
        |test| {
            let Some(server) = Server::mount(test) else {
                return;
            };
            let (received, before) = (server.open(), threads());
            returned(move || {
                // No room for a stack.
                let now = getrlimit(Resource::As);
                let none = Rlimit {
                    current: Some(MIB),
                    maximum: now.maximum,
                };
                setrlimit(Resource::As, none).unwrap();
                receive(received);
                setrlimit(Resource::As, now).unwrap();
                // This thread is the only new one.
                assert_eq!(threads(), before + 1);
            });
        },
    );
}
