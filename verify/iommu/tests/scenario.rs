//! A device behind an IOMMU gets missing mappings from its front end, and loses invalidated ones.

mod common;

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use common::{end, setup, user, Setup, HIGH, LOW, PAGE, REGION};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::iommu::Error as IommuError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions, ReadVolatile,
    VolatileMemoryError, VolatileSlice,
};
use vm_memory_vhost::IotlbMessage;

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(200);
const IOVA: u64 = 0x8000;

/// Returns the miss that a device sends.
fn miss(iova: u64, size: u64, access: Permissions) -> IotlbMessage {
    let iova = GuestAddress(iova);
    IotlbMessage::Miss { iova, size, access }
}

/// Checks that the IOMMU refused an access, with a reason that contains `what`.
fn assert_refused<T: std::fmt::Debug>(result: Result<T, GuestMemoryError>, what: &str) {
    match result {
        Err(GuestMemoryError::IommuError(IommuError::CannotResolve { reason, .. }))
            if reason.contains(what) => {}
        other => panic!("not refused with {what:?}: {other:?}"),
    }
}

#[test]
fn access_to_missing_mappings_asks_and_succeeds() {
    let Setup {
        memory,
        physical,
        front_end,
        back_end,
    } = setup(LONG);
    thread::scope(|scope| {
        let front = scope.spawn(|| {
            // Maps the first page to the end of a region, and the next ones to the other region.
            let mut misses = Vec::new();
            while misses.len() < 2 {
                let request = front_end.next_request(Some(LONG)).unwrap().unwrap();
                misses.push(request);
                let IotlbMessage::Miss { iova, .. } = request else {
                    panic!("{request:?}");
                };
                let iova = iova.0 & !(PAGE - 1);
                let (guest, size) = match iova {
                    IOVA => (LOW + REGION - PAGE, PAGE),
                    _ => (HIGH + 3 * PAGE, 2 * PAGE),
                };
                assert!(front_end
                    .update(iova, size, user(guest), Permissions::ReadWrite)
                    .unwrap());
            }
            misses
        });

        let data: Vec<u8> = (0..0x2800u32).map(|i| (i * 7 + i / 256) as u8).collect();
        memory
            .write_slice(&data, GuestAddress(IOVA + 0x400))
            .unwrap();
        let mut back = vec![0; data.len()];
        memory
            .read_slice(&mut back, GuestAddress(IOVA + 0x400))
            .unwrap();
        assert_eq!(back, data);

        let misses = front.join().unwrap();
        // The whole range, and then the part that the first update did not map.
        let expected = [
            miss(IOVA + 0x400, 0x2800, Permissions::Write),
            miss(IOVA + PAGE, 0x1c00, Permissions::Write),
        ];
        assert_eq!(misses, expected);
        let mut there = vec![0; 0xc00];
        physical
            .read_slice(&mut there, GuestAddress(LOW + REGION - PAGE + 0x400))
            .unwrap();
        assert_eq!(there, data[..0xc00]);
        assert_eq!(front_end.next_request(Some(SHORT)).unwrap(), None);
    });
    end(&back_end);
}

#[test]
fn access_without_permission_fails_and_is_reported_once() {
    let Setup {
        memory,
        physical,
        front_end,
        back_end,
    } = setup(LONG);
    physical.write_obj(0x55u8, GuestAddress(0x10)).unwrap();
    physical.write_obj(0x66u8, GuestAddress(PAGE)).unwrap();
    let update = |iova, guest, access| front_end.update(iova, PAGE, user(guest), access).unwrap();
    assert!(update(IOVA, 0, Permissions::Read));
    assert!(update(IOVA + PAGE, PAGE, Permissions::Write));
    assert!(update(IOVA + 2 * PAGE, 2 * PAGE, Permissions::No));

    let at = GuestAddress;
    assert_eq!(memory.read_obj::<u8>(at(IOVA + 0x10)).unwrap(), 0x55);
    assert_refused(memory.write_obj(1u8, at(IOVA + 0x10)), "does not permit");
    assert_refused(memory.read_obj::<u8>(at(IOVA + PAGE)), "does not permit");
    assert_refused(
        memory.read_obj::<u8>(at(IOVA + 2 * PAGE)),
        "does not permit",
    );
    // A write that is half permitted does not happen at all.
    assert_refused(
        memory.write_slice(&[1; 32], at(IOVA + PAGE - 16)),
        "does not permit",
    );
    memory.write_obj(0x77u8, at(IOVA + PAGE + 1)).unwrap();

    let mut two_pages = vec![0; 0x2000];
    physical.read_slice(&mut two_pages, at(0)).unwrap();
    let mut expected = vec![0; 0x2000];
    (expected[0x10], expected[0x1000], expected[0x1001]) = (0x55, 0x66, 0x77);
    assert_eq!(two_pages, expected);

    end(&back_end);
    let mut reports = Vec::new();
    while let Some(message) = front_end.next_request(Some(SHORT)).unwrap() {
        reports.push(message);
        if reports.len() == 100 {
            break;
        }
    }
    let fail = |iova, size, access| {
        let iova = GuestAddress(iova);
        IotlbMessage::AccessFail { iova, size, access }
    };
    let expected = [
        fail(IOVA + 0x10, 1, Permissions::Write),
        fail(IOVA + PAGE, 1, Permissions::Read),
        fail(IOVA + 2 * PAGE, 1, Permissions::Read),
        fail(IOVA + PAGE - 16, 16, Permissions::Write),
    ];
    let mut once = reports.clone();
    once.dedup();
    assert_eq!(once, expected);
    assert_eq!(reports, expected);
}

/// A source that signals the start of a read, and waits before it completes the read.
struct Gate {
    begun: Sender<()>,
    proceed: Receiver<()>,
}

impl ReadVolatile for Gate {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.begun.send(()).map_err(other)?;
        self.proceed.recv().map_err(other)?;
        buf.write(&vec![0xaa; buf.len()], 0)
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> VolatileMemoryError {
    VolatileMemoryError::IOError(io::Error::other(error))
}

/// A front end that has received the acknowledgement may reuse the page.
#[test]
fn b09_invalidate_during_access_is_acknowledged_after_it() {
    for pages in [1, 2] {
        let Setup {
            memory,
            physical,
            front_end,
            back_end,
        } = setup(SHORT);
        for page in 0..pages {
            // Not adjacent, so that two pages are two slices.
            assert!(front_end
                .update(
                    IOVA + page * PAGE,
                    PAGE,
                    user(HIGH + 2 * page * PAGE),
                    Permissions::ReadWrite
                )
                .unwrap());
        }
        thread::scope(|scope| {
            let (begun, has_begun) = mpsc::channel();
            let (let_go, proceed) = mpsc::channel();
            let memory = &memory;
            let device = scope.spawn(move || {
                let count = usize::try_from(pages * PAGE).unwrap();
                memory.read_volatile_from(GuestAddress(IOVA), &mut Gate { begun, proceed }, count)
            });
            has_begun.recv().unwrap();
            if pages == 2 {
                // Lets the first slice pass. The second one has the same translation.
                let_go.send(()).unwrap();
                has_begun.recv().unwrap();
            }
            let (acked, has_acked) = mpsc::channel();
            let front_end = &front_end;
            let invalidation = scope.spawn(move || {
                let result = front_end.invalidate(IOVA, pages * PAGE);
                acked.send(()).unwrap();
                result
            });
            let early = has_acked.recv_timeout(SHORT).is_ok();
            let_go.send(()).unwrap();
            let moved = device.join().unwrap();
            assert!(invalidation.join().unwrap().unwrap());
            assert!(!early, "{pages} pages: acknowledged during the access");
            assert_eq!(moved.unwrap() as u64, pages * PAGE);
            assert_eq!(physical.read_obj::<u8>(GuestAddress(HIGH)).unwrap(), 0xaa);
        });
        assert!(memory
            .get_slices(GuestAddress(IOVA), 1, Permissions::Read)
            .is_err());
        end(&back_end);
    }
}
