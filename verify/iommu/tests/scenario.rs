//! A device behind an IOMMU gets missing mappings from its front end, and loses invalidated ones.

mod common;

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use common::{end, payload, setup, user, Setup, HIGH, LOW, PAGE, REGION};
use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::iommu::Error as IommuError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice,
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
fn update_across_regions_maps_both() {
    let Setup {
        memory,
        physical,
        front_end,
        back_end,
    } = setup(SHORT);
    // Two pages that are adjacent in the front end, and far apart in the guest.
    let uaddr = user(LOW + REGION - PAGE);
    assert!(front_end
        .update(IOVA, 2 * PAGE, uaddr, Permissions::ReadWrite)
        .unwrap());
    memory
        .write_slice(&[7; 0x2000], GuestAddress(IOVA))
        .unwrap();
    for guest in [LOW + REGION - PAGE, HIGH] {
        let mut page = [0; 0x1000];
        physical.read_slice(&mut page, GuestAddress(guest)).unwrap();
        assert_eq!(page, [7; 0x1000]);
    }
    assert_eq!(
        physical.read_obj::<u8>(GuestAddress(HIGH + PAGE)).unwrap(),
        0
    );
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

#[test]
fn invalidate_of_part_of_mapping_is_a_miss() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(Duration::from_millis(20));
    assert!(front_end
        .update(IOVA, 2 * PAGE, user(0), Permissions::ReadWrite)
        .unwrap());
    memory.write_obj(1u64, GuestAddress(IOVA + PAGE)).unwrap();
    assert!(front_end.invalidate(IOVA + 0x100, 8).unwrap());
    assert_refused(
        memory.read_obj::<u8>(GuestAddress(IOVA + 0x107)),
        "no mapping arrived",
    );
    assert_refused(
        memory.write_slice(&[0; 0x101], GuestAddress(IOVA)),
        "no mapping arrived",
    );
    memory.read_obj::<u64>(GuestAddress(IOVA + 0xf8)).unwrap();
    memory.read_obj::<u64>(GuestAddress(IOVA + 0x108)).unwrap();
    end(&back_end);
}

#[test]
fn b02_invalidate_past_end_of_address_space_removes_rest() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(Duration::from_millis(20));
    let last_page = 0u64.wrapping_sub(PAGE);
    for size in [PAGE + 1, u64::MAX] {
        assert!(front_end
            .update(last_page, PAGE, user(HIGH), Permissions::Read)
            .unwrap());
        memory.read_obj::<u64>(GuestAddress(u64::MAX - 7)).unwrap();
        assert!(front_end.invalidate(last_page + 8, size).unwrap());
        assert_refused(
            memory.read_obj::<u64>(GuestAddress(u64::MAX - 7)),
            "no mapping arrived",
        );
        memory.read_obj::<u64>(GuestAddress(last_page)).unwrap();
    }
    end(&back_end);
}

#[test]
fn access_with_silent_front_end_fails_after_one_miss_message() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(SHORT);
    let mut buf = [0; 64];
    let mut accesses = 0;
    let mut ask = |what: &str, access: &mut dyn FnMut() -> Result<(), GuestMemoryError>| {
        let deadline = Instant::now() + SHORT;
        assert_refused(access(), "no mapping arrived");
        assert!(
            Instant::now() >= deadline,
            "{what} failed before the deadline"
        );
        let mut asked = Vec::new();
        while let Some(message) = front_end.next_request(Some(SHORT / 4)).unwrap() {
            let IotlbMessage::Miss { iova, .. } = message else {
                panic!("{message:?}");
            };
            asked.push(iova.0);
        }
        assert_eq!(asked, [IOVA], "{what} asks once");
        accesses += 1;
    };
    let iova = GuestAddress(IOVA);
    ask("read_obj", &mut || memory.read_obj::<u32>(iova).map(drop));
    ask("write_obj", &mut || memory.write_obj(1u32, iova));
    ask("read_slice", &mut || memory.read_slice(&mut buf, iova));
    ask("write", &mut || memory.write(&[0; 64], iova).map(drop));
    ask("load", &mut || {
        memory
            .load::<u32>(iova, std::sync::atomic::Ordering::Acquire)
            .map(drop)
    });
    ask("store", &mut || {
        memory.store(1u32, iova, std::sync::atomic::Ordering::Release)
    });
    ask("write_volatile_to", &mut || {
        memory
            .write_volatile_to(iova, &mut Vec::new(), 64)
            .map(drop)
    });
    ask("get_slices", &mut || {
        memory.get_slices(iova, 64, Permissions::Read).map(drop)
    });
    assert_eq!(accesses, 8);
    end(&back_end);
}

#[test]
fn hang_up_ends_waits_and_removes_mappings() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(LONG);
    assert!(front_end
        .update(IOVA, PAGE, user(0), Permissions::ReadWrite)
        .unwrap());
    memory.read_obj::<u8>(GuestAddress(IOVA)).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| memory.read_obj::<u8>(GuestAddress(IOVA + PAGE)));
        let expected = miss(IOVA + PAGE, 1, Permissions::Read);
        assert_eq!(front_end.next_request(Some(LONG)).unwrap(), Some(expected));
        front_end.hang_up().unwrap();
        // The reason is not the deadline.
        assert_refused(waiting.join().unwrap(), "closed");
    });
    // The mapping is removed, because no message could invalidate it after the front end hung up.
    assert_refused(memory.read_obj::<u8>(GuestAddress(IOVA)), "closed");
    assert!(memory.iommu().is_closed());
    end(&back_end);
}

#[test]
fn write_through_iommu_marks_iova_and_fails_if_untracked() {
    let Setup {
        memory,
        physical,
        front_end,
        back_end,
    } = setup(SHORT);
    let map = |iova, size, guest| {
        assert!(front_end
            .update(iova, size, user(guest), Permissions::ReadWrite)
            .unwrap());
    };
    let end_of_space = u64::try_from(common::IOVA_SPACE).unwrap();
    map(IOVA, 4 * PAGE, HIGH);
    map(end_of_space - PAGE, 2 * PAGE, HIGH + 8 * PAGE);

    memory.read_obj::<u64>(GuestAddress(IOVA)).unwrap();
    assert!(memory
        .bitmap()
        .get_and_reset()
        .iter()
        .all(|word| *word == 0));

    memory
        .write_slice(&[1; 16], GuestAddress(IOVA + 2 * PAGE - 8))
        .unwrap();
    memory
        .write_obj(1u8, GuestAddress(end_of_space - 1))
        .unwrap();
    let pages: Vec<u64> = (0..end_of_space / PAGE)
        .filter(|page| {
            memory
                .bitmap()
                .dirty_at(usize::try_from(page * PAGE).unwrap())
        })
        .collect();
    assert_eq!(
        pages,
        [IOVA / PAGE + 1, IOVA / PAGE + 2, end_of_space / PAGE - 1]
    );

    // B8: mapped and permitted, but not tracked.
    let refused = memory.write_obj(1u8, GuestAddress(end_of_space));
    assert!(
        matches!(
            refused,
            Err(GuestMemoryError::IommuError(
                IommuError::IommuMisconfigured { .. }
            ))
        ),
        "{refused:?}"
    );
    assert_eq!(
        physical
            .read_obj::<u8>(GuestAddress(HIGH + 9 * PAGE))
            .unwrap(),
        0
    );
    memory.read_obj::<u8>(GuestAddress(end_of_space)).unwrap();

    // The regions' bitmaps have no marks: the front end reads the bitmap by I/O virtual address.
    for region in physical.iter() {
        for page in 0..REGION / PAGE {
            assert!(!region
                .bitmap()
                .dirty_at(usize::try_from(page * PAGE).unwrap()));
        }
    }
    end(&back_end);
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

#[test]
fn b09_invalidate_with_slice_iterator_is_acknowledged_after_it() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(SHORT);
    assert!(front_end
        .update(IOVA, PAGE, user(HIGH), Permissions::ReadWrite)
        .unwrap());
    thread::scope(|scope| {
        let mut slices = memory
            .get_slices(GuestAddress(IOVA), 0x100, Permissions::Write)
            .unwrap();
        let slice = slices.next().unwrap().unwrap();
        let (acked, has_acked) = mpsc::channel();
        let front_end = &front_end;
        scope.spawn(move || acked.send(front_end.invalidate(IOVA, PAGE)).unwrap());
        let early = has_acked.recv_timeout(SHORT);
        slice.write_obj(1u8, 0).unwrap();
        assert_eq!(slices.by_ref().count(), 0);
        drop(slices);
        assert!(early.is_err(), "acknowledged during the access");
        assert!(has_acked.recv().unwrap().unwrap());
    });
    assert_refused(
        memory
            .get_slices(GuestAddress(IOVA), 1, Permissions::Read)
            .and_then(|slices| slices.stop_on_error().map(Iterator::count)),
        "no mapping arrived",
    );
    end(&back_end);
}

#[test]
fn send_of_back_end_message_types_is_refused() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(SHORT);
    for kind in [0, 1, 4, 5, 6, 0xff] {
        let message = payload(IOVA, PAGE, user(0), 3, kind);
        assert!(!front_end.send(&message).unwrap(), "type {kind}");
    }
    assert!(!memory.iommu().is_closed());
    end(&back_end);
}
