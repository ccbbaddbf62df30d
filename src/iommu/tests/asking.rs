//! [`AskingIommu`]: each miss is requested once, and no wake-up is lost.

use std::io;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use super::*;

/// A source that records the requests, and then calls a function that may answer them.
struct Recorded<F> {
    requests: Mutex<Vec<(u64, usize, Permissions)>>,
    reports: Mutex<Vec<(u64, usize, Permissions)>>,
    answer: F,
}

impl<F: Fn(usize, u64) -> io::Result<()> + Send + Sync> MappingSource for Recorded<F> {
    fn request_mapping(&self, range: &IovaRange, access: Permissions) -> io::Result<()> {
        let number = {
            let mut requests = self.requests.lock().unwrap();
            requests.push((range.base.0, range.length, access));
            requests.len()
        };
        (self.answer)(number, range.base.0)
    }

    fn report_refusal(&self, range: &IovaRange, access: Permissions) -> io::Result<()> {
        let report = (range.base.0, range.length, access);
        self.reports.lock().unwrap().push(report);
        Err(io::Error::other("hung up"))
    }
}

/// Returns an IOMMU whose source calls `answer` with the number of each request and its address.
fn asking<F: Fn(usize, u64) -> io::Result<()> + Send + Sync>(
    iotlb: &SharedIotlb,
    timeout: Duration,
    answer: F,
) -> AskingIommu<Recorded<F>> {
    let source = Recorded {
        requests: Mutex::default(),
        reports: Mutex::default(),
        answer,
    };
    AskingIommu::new(iotlb.clone(), timeout, source)
}

type Answer = Box<dyn Fn(usize, u64) -> io::Result<()> + Send + Sync>;

/// Returns an IOMMU whose source sends the address of each request to the receiver.
fn sending(iotlb: &SharedIotlb) -> (AskingIommu<Recorded<Answer>>, Receiver<u64>) {
    let (sender, receiver) = channel();
    let sender: Mutex<Sender<u64>> = Mutex::new(sender);
    let send: Answer =
        Box::new(move |_, iova| sender.lock().unwrap().send(iova).map_err(io::Error::other));
    (asking(iotlb, Duration::MAX, send), receiver)
}

/// Maps a page to another page, so that two pages are never contiguous.
fn map_page(iotlb: &SharedIotlb, iova: u64, permissions: Permissions) {
    let page = iova & !(PAGE - 1);
    let target = GuestAddress(page.wrapping_mul(3) & 0xff_ffff);
    iotlb
        .set_mapping(GuestAddress(page), target, 0x1000, permissions)
        .unwrap();
}

fn requests<F>(iommu: &AskingIommu<Recorded<F>>) -> Vec<(u64, usize, Permissions)>
where
    Recorded<F>: MappingSource,
{
    iommu.source().requests.lock().unwrap().clone()
}

fn reason(error: Error) -> String {
    match error {
        Error::CannotResolve { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn translate_of_range_with_holes_requests_each_part_once() {
    let iotlb = SharedIotlb::new();
    for page in [1, 2, 4] {
        map_page(&iotlb, page * PAGE, ReadWrite);
    }
    let iommu = asking(&iotlb, Duration::MAX, |_, iova| {
        // Only the first page of the part.
        map_page(&iotlb, iova, ReadWrite);
        Ok(())
    });
    let found = iommu.translate(GuestAddress(0x800), 0x6000, Write).unwrap();
    assert_eq!(found.map(|range| range.length).sum::<usize>(), 0x6000);
    let expected = [
        (0x800, 0x800, Write),
        (0x3000, 0x1000, Write),
        (0x5000, 0x1800, Write),
        // The rest of the last part.
        (0x6000, 0x800, Write),
    ];
    assert_eq!(requests(&iommu), expected);
    // A hit requests nothing.
    assert!(iommu.translate(GuestAddress(0x800), 0x6000, Read).is_ok());
    assert_eq!(requests(&iommu).len(), 4);
}

#[test]
#[cfg(target_os = "linux")]
fn translate_by_many_threads_shares_requests_of_a_page() {
    let iotlb = SharedIotlb::new();
    let (iommu, received) = sending(&iotlb);
    let (started, sleepers) = channel();
    thread::scope(|scope| {
        for number in 0..8u64 {
            let (iommu, started) = (iommu.clone(), started.clone());
            scope.spawn(move || {
                started.send(test_support::ThreadId::current()).unwrap();
                let iova = GuestAddress(0x5000 + number * 0x10);
                let found = iommu.translate(iova, 8, Write).unwrap();
                assert_eq!(found.count(), 1);
            });
        }
        assert_eq!(received.recv().unwrap() & !(PAGE - 1), 0x5000);
        for _ in 0..8 {
            sleepers.recv().unwrap().wait_until_asleep();
        }
        // These mappings answer no request. Each would wake a thread that asks again.
        for page in 0..1000 {
            map_page(&iotlb, 0x10_0000 + page * PAGE, ReadWrite);
        }
        let _ = iotlb.invalidate_mapping(GuestAddress(0x10_0000), 0x1000);
        map_page(&iotlb, 0x5000, ReadWrite);
    });
    assert_eq!(requests(&iommu).len(), 1);
}

#[test]
fn translate_for_other_access_makes_a_request_of_its_own() {
    let iotlb = SharedIotlb::new();
    let (iommu, received) = sending(&iotlb);
    thread::scope(|scope| {
        for access in [Read, Write] {
            let iommu = iommu.clone();
            scope.spawn(move || iommu.translate(GuestAddress(0), 8, access).unwrap().count());
        }
        // Two requests, and then the mapping.
        assert_eq!((received.recv(), received.recv()), (Ok(0), Ok(0)));
        map_page(&iotlb, 0, ReadWrite);
    });
}

#[test]
#[cfg(target_os = "linux")]
fn translate_for_writing_waits_past_reply_that_permits_reading() {
    let iotlb = SharedIotlb::new();
    let (iommu, received) = sending(&iotlb);
    thread::scope(|scope| {
        let reads = iommu.clone();
        let reads = scope.spawn(move || reads.translate(GuestAddress(0), 8, Read).is_ok());
        assert_eq!(received.recv(), Ok(0));
        let (started, sleeper) = channel();
        let writes = iommu.clone();
        let writes = scope.spawn(move || {
            started.send(test_support::ThreadId::current()).unwrap();
            writes.translate(GuestAddress(0), 8, Write).is_ok()
        });
        assert_eq!(received.recv(), Ok(0));
        let sleeper = sleeper.recv().unwrap();
        sleeper.wait_until_asleep();
        // The reply to the first request, and later that to the second.
        map_page(&iotlb, 0, Read);
        assert!(reads.join().unwrap());
        sleeper.wait_until_asleep();
        map_page(&iotlb, 0, ReadWrite);
        assert!(
            writes.join().unwrap(),
            "the reply for reading woke the writer"
        );
    });
    assert_eq!(requests(&iommu).len(), 2);

    // No reply permits writing.
    let iotlb = SharedIotlb::new();
    let iommu = asking(&iotlb, Duration::MAX, |_, iova| {
        map_page(&iotlb, iova, Read);
        Ok(())
    });
    assert!(iommu.translate(GuestAddress(0), 8, Write).is_err());
}

#[test]
fn translate_after_lost_reply_requests_again() {
    let iotlb = SharedIotlb::new();
    let iommu = asking(&iotlb, Duration::MAX, |number, iova| {
        map_page(&iotlb, iova, ReadWrite);
        if number < 3 {
            // The guest unmaps the page before the access finds it.
            let _ = iotlb.invalidate_mapping(GuestAddress(iova), 0x1000);
        }
        Ok(())
    });
    assert!(iommu.translate(GuestAddress(0x1000), 8, Read).is_ok());
    assert_eq!(requests(&iommu), [(0x1000, 8, Read); 3]);
}

#[test]
fn translate_without_reply_fails_at_the_timeout() {
    let iotlb = SharedIotlb::new();
    let iommu = asking(&iotlb, Duration::ZERO, |_, _| Ok(()));
    for count in 1..=3 {
        let error = iommu.translate(GuestAddress(0x1000), 8, Read).unwrap_err();
        let expected = "0x1000-0x1007 is not mapped, and no mapping arrived within 0ns";
        assert_eq!(reason(error), expected);
        // The request was taken back, so a later access makes it again.
        assert_eq!(requests(&iommu).len(), count);
    }
    // A wait.
    let iommu = asking(&iotlb, Duration::from_millis(1), |_, _| Ok(()));
    let error = iommu.translate(GuestAddress(0x1000), 8, Read).unwrap_err();
    assert!(reason(error).ends_with("no mapping arrived within 1ms"));
}

/// A guest that has the mapping removed before the access finds it cannot keep the access waiting.
#[test]
fn translate_whose_mapping_is_removed_at_once_fails_at_the_timeout() {
    let iotlb = SharedIotlb::new();
    for (timeout, name) in [(Duration::ZERO, "0ns"), (Duration::from_millis(1), "1ms")] {
        let iommu = asking(&iotlb, timeout, |number, iova| {
            map_page(&iotlb, iova, ReadWrite);
            let _ = iotlb.invalidate_mapping(GuestAddress(iova), 0x1000);
            match number {
                // Ends the test if the access does not.
                1_000_000 => Err(io::Error::other("not at the timeout")),
                _ => Ok(()),
            }
        });
        let error = iommu.translate(GuestAddress(0x1000), 8, Read).unwrap_err();
        let expected = format!("0x1000-0x1007 is not mapped, and no mapping arrived within {name}");
        assert_eq!(reason(error), expected);
        if timeout.is_zero() {
            assert_eq!(requests(&iommu).len(), 1);
        }
    }
}

#[test]
fn translate_after_the_timeout_continues_only_with_progress() {
    // Each request maps one page of the range.
    let iotlb = SharedIotlb::new();
    let iommu = asking(&iotlb, Duration::ZERO, |_, iova| {
        map_page(&iotlb, iova, ReadWrite);
        Ok(())
    });
    let found = iommu.translate(GuestAddress(0x1000), 0x4000, Read).unwrap();
    assert_eq!((found.count(), requests(&iommu).len()), (4, 4));

    // Each request maps one of two pages, and removes the other.
    let iotlb = SharedIotlb::new();
    let iommu = asking(&iotlb, Duration::ZERO, |number, iova| {
        map_page(&iotlb, iova, ReadWrite);
        let _ = iotlb.invalidate_mapping(GuestAddress((iova & !(PAGE - 1)) ^ 0x1000), 0x1000);
        match number {
            1000 => Err(io::Error::other("not at the timeout")),
            _ => Ok(()),
        }
    });
    let error = iommu
        .translate(GuestAddress(0x2000), 0x2000, Read)
        .unwrap_err();
    let expected = "0x2000-0x2fff is not mapped, and no mapping arrived within 0ns";
    assert_eq!(
        (reason(error).as_str(), requests(&iommu).len()),
        (expected, 2)
    );
}

#[test]
fn translate_whose_request_fails_fails_without_waiting() {
    let iotlb = SharedIotlb::new();
    let iommu = asking(&iotlb, Duration::MAX, |_, _| {
        Err(io::Error::other("no such page"))
    });
    let error = iommu.translate(GuestAddress(0x1000), 8, Read).unwrap_err();
    let expected = "0x1000-0x1007 is not mapped, and its request failed: no such page";
    assert_eq!(reason(error), expected);
}

#[test]
#[cfg(target_os = "linux")]
fn translate_that_gives_up_lets_another_thread_request() {
    let iotlb = SharedIotlb::new();
    let (go, proceed) = channel();
    let (begun, has_begun) = channel();
    let (begun, proceed) = (Mutex::new(begun), Mutex::new(proceed));
    let iommu = asking(&iotlb, Duration::MAX, |number, iova| {
        if number == 1 {
            begun.lock().unwrap().send(()).unwrap();
            proceed.lock().unwrap().recv().unwrap();
            return Err(io::Error::other("gave up"));
        }
        map_page(&iotlb, iova, ReadWrite);
        Ok(())
    });
    thread::scope(|scope| {
        let first = scope.spawn(|| iommu.translate(GuestAddress(0x1000), 8, Read).is_err());
        has_begun.recv().unwrap();
        let (started, sleeper) = channel();
        let iommu = &iommu;
        let second = scope.spawn(move || {
            started.send(test_support::ThreadId::current()).unwrap();
            iommu.translate(GuestAddress(0x1008), 8, Read).is_ok()
        });
        sleeper.recv().unwrap().wait_until_asleep();
        assert_eq!(requests(iommu).len(), 1);
        go.send(()).unwrap();
        assert!(first.join().unwrap() && second.join().unwrap());
    });
    assert_eq!(requests(&iommu), [(0x1000, 8, Read), (0x1008, 8, Read)]);
}

#[test]
fn close_ends_waits_and_removes_mappings() {
    let iotlb = SharedIotlb::new();
    map_page(&iotlb, 0, Read);
    let (iommu, received) = sending(&iotlb);
    thread::scope(|scope| {
        let waits = scope.spawn(|| iommu.translate(GuestAddress(0x1000), 8, Read).unwrap_err());
        assert_eq!(received.recv(), Ok(0x1000));
        assert!(iommu.close().is_done());
        assert!(reason(waits.join().unwrap()).ends_with("the source of mappings is closed"));
    });
    assert!(iommu.is_closed());
    assert!(iommu.translate(GuestAddress(0), 8, Read).is_err());
    assert_eq!(requests(&iommu).len(), 1);
}

#[test]
fn translate_without_permission_fails_and_is_reported_once() {
    let iotlb = SharedIotlb::new();
    map_page(&iotlb, PAGE, Read);
    let iommu = asking(&iotlb, Duration::MAX, |_, _| Ok(()));
    // The first page is missing, and is not requested.
    let error = iommu
        .translate(GuestAddress(0x800), 0x1000, Write)
        .unwrap_err();
    let expected = "0x1000-0x17ff does not permit write access, \
                    and the report of that failed: hung up";
    assert_eq!(reason(error), expected);
    assert_eq!(
        *iommu.source().reports.lock().unwrap(),
        [(0x1000, 0x800, Write)]
    );
    assert!(requests(&iommu).is_empty());

    // No mapping refuses an access past the end.
    assert!(iommu.translate(GuestAddress(u64::MAX), 2, Read).is_err());
    assert_eq!(iommu.source().reports.lock().unwrap().len(), 1);
}

#[test]
fn translate_with_bound_finds_or_refuses_each_range() {
    for (bound, is_found) in [(4, true), (3, false), (1, false)] {
        let iotlb = SharedIotlb::new();
        iotlb.set_bound(NonZeroUsize::new(bound));
        let iommu = asking(&iotlb, Duration::MAX, |_, iova| {
            map_page(&iotlb, iova, ReadWrite);
            Ok(())
        });
        let found = iommu.translate(GuestAddress(0x1000), 0x4000, Read);
        assert_eq!(found.is_ok(), is_found, "bound {bound}");
        if let Err(error) = found {
            let reason = reason(error);
            assert!(reason.contains("the bound of the IOTLB"), "{reason}");
        }
        assert!(requests(&iommu).len() < 200, "{:?}", requests(&iommu));
        assert_eq!(iommu.source().reports.lock().unwrap().len(), 0);
    }
}

#[test]
fn translate_by_threads_that_evict_each_other_ends() {
    let iotlb = SharedIotlb::new();
    iotlb.set_bound(NonZeroUsize::new(2));
    let iommu = asking(&iotlb, Duration::MAX, |_, iova| {
        map_page(&iotlb, iova, ReadWrite);
        Ok(())
    });
    thread::scope(|scope| {
        for thread in 0..4u64 {
            let iommu = &iommu;
            scope.spawn(move || {
                for number in 0..100 {
                    let iova = GuestAddress((thread * 100 + number % 7) * 4 * PAGE);
                    let found = iommu.translate(iova, 0x2000, Read).unwrap();
                    assert_eq!(found.map(|range| range.length).sum::<usize>(), 0x2000);
                }
            });
        }
    });
}

/// Device threads, a front end that replies on a thread of its own, and a guest that invalidates.
#[test]
fn translate_during_invalidations_loses_no_wake_up() {
    let iotlb = SharedIotlb::new();
    let (iommu, received) = sending(&iotlb);
    let rounds = if cfg!(miri) { 20 } else { 500 };
    thread::scope(|scope| {
        let devices: Vec<_> = (0..3u64)
            .map(|device| {
                let iommu = iommu.clone();
                scope.spawn(move || {
                    for round in 0..rounds {
                        let iova = GuestAddress((device + round) % 8 * PAGE + 0x800);
                        // Without a timeout: a lost wake-up would hang.
                        let found = iommu.translate(iova, 0x1000, Read).unwrap();
                        assert_eq!(found.map(|range| range.length).sum::<usize>(), 0x1000);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            for iova in received {
                map_page(&iotlb, iova, ReadWrite);
            }
        });
        let mut page = 0;
        while devices.iter().any(|device| !device.is_finished()) {
            page = (page + 5) % 9;
            let _ = iotlb.invalidate_mapping(GuestAddress(page * PAGE), 0x1000);
            thread::yield_now();
        }
        drop(iommu);
    });
}
