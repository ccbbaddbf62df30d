//! A device behind an IOMMU whose mappings the front end has: what it may rely on, step by step.

mod common;

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use common::{end, setup, user, Setup, HIGH, LOW, PAGE, REGION};
use compat_iommu::IotlbMessage;
use vhost::{VhostAccess, VhostIotlbType};
use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::iommu::Error as IommuError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice,
};

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(200);
const IOVA: u64 = 0x8000;

const MISS: u8 = VhostIotlbType::Miss as u8;
const ACCESS_FAIL: u8 = VhostIotlbType::AccessFail as u8;

/// The error is the IOMMU's, with a reason that has `what` in it.
fn assert_refused<T: std::fmt::Debug>(answer: Result<T, GuestMemoryError>, what: &str) {
    match answer {
        Err(GuestMemoryError::IommuError(IommuError::CannotResolve { reason, .. }))
            if reason.contains(what) => {}
        other => panic!("not refused with “{what}”: {other:?}"),
    }
}

#[test]
fn misses_are_asked_for_and_resolve() {
    let Setup {
        memory,
        physical,
        front_end,
    } = setup(LONG);
    thread::scope(|scope| {
        let answers = scope.spawn(|| {
            // The first page goes to the end of a region, the next ones to the other region.
            let mut misses = Vec::new();
            while misses.len() < 2 {
                let miss = front_end.next_request(Some(LONG)).unwrap().unwrap();
                misses.push(miss);
                let (guest, size) = match miss.iova & !(PAGE - 1) {
                    IOVA => (LOW + REGION - PAGE, PAGE),
                    _ => (HIGH + 3 * PAGE, 2 * PAGE),
                };
                let iova = miss.iova & !(PAGE - 1);
                assert!(front_end
                    .update(iova, size, user(guest), VhostAccess::ReadWrite)
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

        let misses = answers.join().unwrap();
        let asked: Vec<_> = misses
            .iter()
            .map(|m| (m.iova, m.size, m.perm, m.kind))
            .collect();
        // All of it at first; then what the answer left open.
        assert_eq!(
            asked,
            [
                (IOVA + 0x400, 0x2800, 2, MISS),
                (IOVA + PAGE, 0x1c00, 2, MISS)
            ]
        );
        let mut there = vec![0; 0xc00];
        physical
            .read_slice(&mut there, GuestAddress(LOW + REGION - PAGE + 0x400))
            .unwrap();
        assert_eq!(there, data[..0xc00]);
        assert_eq!(front_end.next_request(Some(SHORT)).unwrap(), None);
    });
    end(&memory);
}

#[test]
fn an_update_may_scatter_over_regions() {
    let Setup {
        memory,
        physical,
        front_end,
    } = setup(SHORT);
    // Two pages that are neighbours in the front end, and far apart in the guest.
    let uaddr = user(LOW + REGION - PAGE);
    assert!(front_end
        .update(IOVA, 2 * PAGE, uaddr, VhostAccess::ReadWrite)
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
    end(&memory);
}

#[test]
fn permissions_hold_and_their_breach_is_reported_once() {
    let Setup {
        memory,
        physical,
        front_end,
    } = setup(LONG);
    physical.write_obj(0x55u8, GuestAddress(0x10)).unwrap();
    physical.write_obj(0x66u8, GuestAddress(PAGE)).unwrap();
    let update = |iova, guest, access| front_end.update(iova, PAGE, user(guest), access).unwrap();
    assert!(update(IOVA, 0, VhostAccess::ReadOnly));
    assert!(update(IOVA + PAGE, PAGE, VhostAccess::WriteOnly));
    assert!(update(IOVA + 2 * PAGE, 2 * PAGE, VhostAccess::No));

    let at = GuestAddress;
    assert_eq!(memory.read_obj::<u8>(at(IOVA + 0x10)).unwrap(), 0x55);
    assert_refused(memory.write_obj(1u8, at(IOVA + 0x10)), "not permitted");
    assert_refused(memory.read_obj::<u8>(at(IOVA + PAGE)), "not permitted");
    assert_refused(memory.read_obj::<u8>(at(IOVA + 2 * PAGE)), "not permitted");
    // Half of it would be permitted: none of it happens.
    assert_refused(
        memory.write_slice(&[1; 32], at(IOVA + PAGE - 16)),
        "not permitted",
    );
    memory.write_obj(0x77u8, at(IOVA + PAGE + 1)).unwrap();

    let mut two_pages = vec![0; 0x2000];
    physical.read_slice(&mut two_pages, at(0)).unwrap();
    let mut expected = vec![0; 0x2000];
    (expected[0x10], expected[0x1000], expected[0x1001]) = (0x55, 0x66, 0x77);
    assert_eq!(two_pages, expected);

    end(&memory);
    let mut reports = Vec::new();
    while let Some(message) = front_end.next_request(Some(SHORT)).unwrap() {
        reports.push((message.kind, message.iova, message.perm));
        if reports.len() == 100 {
            break;
        }
    }
    let expected = [
        (ACCESS_FAIL, IOVA + 0x10, 2),
        (ACCESS_FAIL, IOVA + PAGE, 1),
        (ACCESS_FAIL, IOVA + 2 * PAGE, 1),
        (ACCESS_FAIL, IOVA + PAGE - 16, 2),
    ];
    let mut once = reports.clone();
    once.dedup();
    assert_eq!(once, expected);
    // One access is one report.
    assert_eq!(reports, expected);
}

#[test]
fn an_invalidated_mapping_is_a_miss_again() {
    let Setup {
        memory, front_end, ..
    } = setup(Duration::from_millis(20));
    assert!(front_end
        .update(IOVA, 2 * PAGE, user(0), VhostAccess::ReadWrite)
        .unwrap());
    memory.write_obj(1u64, GuestAddress(IOVA + PAGE)).unwrap();
    // Eight bytes of it, in the middle.
    assert!(front_end.invalidate(IOVA + 0x100, 8).unwrap());
    assert_refused(
        memory.read_obj::<u8>(GuestAddress(IOVA + 0x107)),
        "did not answer",
    );
    assert_refused(
        memory.write_slice(&[0; 0x101], GuestAddress(IOVA)),
        "did not answer",
    );
    memory.read_obj::<u64>(GuestAddress(IOVA + 0xf8)).unwrap();
    memory.read_obj::<u64>(GuestAddress(IOVA + 0x108)).unwrap();
    end(&memory);
}

/// B2: what it names is gone, however far past the end it reaches.
#[test]
fn b2_an_invalidation_that_overflows_is_cut_at_the_top() {
    let Setup {
        memory, front_end, ..
    } = setup(Duration::from_millis(20));
    let last_page = 0u64.wrapping_sub(PAGE);
    for size in [PAGE + 1, u64::MAX] {
        assert!(front_end
            .update(last_page, PAGE, user(HIGH), VhostAccess::ReadOnly)
            .unwrap());
        memory.read_obj::<u64>(GuestAddress(u64::MAX - 7)).unwrap();
        assert!(front_end.invalidate(last_page + 8, size).unwrap());
        assert_refused(
            memory.read_obj::<u64>(GuestAddress(u64::MAX - 7)),
            "did not answer",
        );
        memory.read_obj::<u64>(GuestAddress(last_page)).unwrap();
    }
    end(&memory);
}

#[test]
fn a_silent_front_end_costs_one_deadline_and_one_question() {
    let Setup {
        memory, front_end, ..
    } = setup(SHORT);
    let mut buf = [0; 64];
    let mut questions = 0;
    let mut ask = |what: &str, access: &mut dyn FnMut() -> Result<(), GuestMemoryError>| {
        let begin = Instant::now();
        let answer = access();
        let took = begin.elapsed();
        assert_refused(answer, "did not answer");
        assert!(took >= SHORT, "{what}: gave up after {took:?}");
        let mut asked = Vec::new();
        while let Some(message) = front_end.next_request(Some(SHORT / 4)).unwrap() {
            asked.push((message.kind, message.iova));
        }
        assert_eq!(asked, [(MISS, IOVA)], "{what} asks once");
        assert!(took < 2 * SHORT, "{what}: took {took:?}");
        questions += 1;
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
    assert_eq!(questions, 8);
    end(&memory);
}

#[test]
fn a_front_end_that_hangs_up_ends_every_wait_and_every_mapping() {
    let Setup {
        memory, front_end, ..
    } = setup(LONG);
    assert!(front_end
        .update(IOVA, PAGE, user(0), VhostAccess::ReadWrite)
        .unwrap());
    memory.read_obj::<u8>(GuestAddress(IOVA)).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| memory.read_obj::<u8>(GuestAddress(IOVA + PAGE)));
        assert_eq!(
            front_end.next_request(Some(LONG)).unwrap().map(|m| m.kind),
            Some(MISS)
        );
        let begin = Instant::now();
        front_end.hang_up().unwrap();
        assert_refused(waiting.join().unwrap(), "gone");
        assert!(begin.elapsed() < LONG / 2);
    });
    // Nobody could take it back any more.
    assert_refused(memory.read_obj::<u8>(GuestAddress(IOVA)), "gone");
    assert!(!memory.iommu().is_connected());
    end(&memory);
}

#[test]
fn writes_are_marked_by_iova_and_refused_where_marks_have_no_place() {
    let Setup {
        memory,
        physical,
        front_end,
    } = setup(SHORT);
    let map = |iova, size, guest| {
        assert!(front_end
            .update(iova, size, user(guest), VhostAccess::ReadWrite)
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

    // B8: mapped and permitted, but its mark would be lost.
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

    // Nothing in the bitmaps of the regions: with the IOMMU on, addresses there mean nothing to the front end.
    for region in physical.iter() {
        for page in 0..REGION / PAGE {
            assert!(!region
                .bitmap()
                .dirty_at(usize::try_from(page * PAGE).unwrap()));
        }
    }
    end(&memory);
}

/// A source that says when a read has begun, and waits until it may end.
struct Gate {
    begun: Sender<()>,
    go_on: Receiver<()>,
}

impl ReadVolatile for Gate {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.begun.send(()).map_err(other)?;
        self.go_on.recv().map_err(other)?;
        buf.write(&vec![0xaa; buf.len()], 0)
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> VolatileMemoryError {
    VolatileMemoryError::IOError(io::Error::other(error))
}

/// B9: the guard that an IOMMU hands out lives as long as bytes move through what it translated. A front end that has the
/// acknowledgement may give the page to somebody else.
#[test]
fn b9_an_invalidation_is_not_acknowledged_while_bytes_move() {
    for pages in [1, 2] {
        let Setup {
            memory,
            physical,
            front_end,
        } = setup(SHORT);
        for page in 0..pages {
            // Not neighbours: two pages are two slices.
            assert!(front_end
                .update(
                    IOVA + page * PAGE,
                    PAGE,
                    user(HIGH + 2 * page * PAGE),
                    VhostAccess::ReadWrite
                )
                .unwrap());
        }
        thread::scope(|scope| {
            let (begun, has_begun) = mpsc::channel();
            let (let_go, go_on) = mpsc::channel();
            let memory = &memory;
            let device = scope.spawn(move || {
                let count = usize::try_from(pages * PAGE).unwrap();
                memory.read_volatile_from(GuestAddress(IOVA), &mut Gate { begun, go_on }, count)
            });
            has_begun.recv().unwrap();
            if pages == 2 {
                // The first slice may pass: the second is of the same translation.
                let_go.send(()).unwrap();
                has_begun.recv().unwrap();
            }
            let (acked, has_acked) = mpsc::channel();
            let front_end = &front_end;
            let invalidation = scope.spawn(move || {
                let answer = front_end.invalidate(IOVA, pages * PAGE);
                acked.send(()).unwrap();
                answer
            });
            let early = has_acked.recv_timeout(SHORT).is_ok();
            let_go.send(()).unwrap();
            let moved = device.join().unwrap();
            assert!(invalidation.join().unwrap().unwrap());
            assert!(
                !early,
                "{pages} pages: acknowledged, and bytes move to the page after it"
            );
            assert_eq!(moved.unwrap() as u64, pages * PAGE);
            assert_eq!(physical.read_obj::<u8>(GuestAddress(HIGH)).unwrap(), 0xaa);
        });
        assert!(memory
            .get_slices(GuestAddress(IOVA), 1, Permissions::Read)
            .is_err());
        end(&memory);
    }
}

/// The same for whoever takes the slices themselves.
#[test]
fn b9_an_iterator_over_slices_holds_an_invalidation_off() {
    let Setup {
        memory, front_end, ..
    } = setup(SHORT);
    assert!(front_end
        .update(IOVA, PAGE, user(HIGH), VhostAccess::ReadWrite)
        .unwrap());
    thread::scope(|scope| {
        let mut slices = memory
            .get_slices(GuestAddress(IOVA), 0x100, Permissions::Write)
            .unwrap();
        let slice = slices.next().unwrap().unwrap();
        let invalidation = scope.spawn(|| (front_end.invalidate(IOVA, PAGE), Instant::now()));
        thread::sleep(SHORT);
        slice.write_obj(1u8, 0).unwrap();
        let still_there = Instant::now();
        assert_eq!(slices.by_ref().count(), 0);
        drop(slices);
        let (answer, acknowledged) = invalidation.join().unwrap();
        assert!(answer.unwrap());
        assert!(acknowledged >= still_there);
    });
    assert_refused(
        memory
            .get_slices(GuestAddress(IOVA), 1, Permissions::Read)
            .and_then(|slices| slices.stop_on_error().map(Iterator::count)),
        "did not answer",
    );
    end(&memory);
}

#[test]
fn only_updates_and_invalidations_are_for_the_back_end() {
    let Setup {
        memory, front_end, ..
    } = setup(SHORT);
    for kind in [0, MISS, ACCESS_FAIL, 5, 6, 0xff] {
        let message = IotlbMessage {
            iova: IOVA,
            size: PAGE,
            uaddr: user(0),
            perm: 3,
            kind,
        };
        assert!(!front_end.send(message).unwrap(), "type {kind}");
    }
    assert!(memory.iommu().is_connected());
    end(&memory);
}
