//! A descriptor whose server never replies does not delay a build that requires seals. Nor does a
//! memfd that its sender has locked.
#![cfg(target_os = "linux")]
#![expect(
    clippy::disallowed_methods,
    reason = "no seccomp filter refuses getrlimit in these tests"
)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
use test_support::{in_own_process, returned, FuseServer, LockedFile, FUSE_FLUSH, MIB};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{
    describe, prefault, residency, Backing, BuildError, Description, DescriptionError, Descriptors,
    Lock, MemoryBuilder, Region,
};

#[test]
fn build_that_requires_seals_does_not_wait_for_server_of_file() {
    let Some(server) =
        FuseServer::mount("build_that_requires_seals_does_not_wait_for_server_of_file")
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
    let asked = server.unanswered();
    assert!(
        asked.iter().all(|opcode| *opcode == FUSE_FLUSH),
        "{asked:?}"
    );
}

#[test]
fn description_with_unused_descriptor_does_not_wait_for_its_server() {
    let Some(server) =
        FuseServer::mount("description_with_unused_descriptor_does_not_wait_for_its_server")
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
    let Some(server) = FuseServer::mount(test) else {
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
        FuseServer::mount("drop_of_received_descriptors_does_not_wait_for_server_of_file")
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
                let Some(server) = FuseServer::mount(&test) else {
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
                let Some(server) = FuseServer::mount(&test) else {
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
            let Some(server) = FuseServer::mount(test) else {
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
