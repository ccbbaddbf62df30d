//! [`LogWords`], compared with a model that lists the bytes of each dirty page.

use super::*;

proptest! {
    #[test]
    fn ranges_in_region_equal_bytes_of_dirty_pages(
        base in prop_oneof![Just(0), Just(1u64 << 40), Just(u64::MAX - 20_000)],
        start in 0u64..4000,
        len in 0usize..4000,
        log_start in 0u64..4000,
        words in words(),
        log_page in 1usize..60,
    ) {
        let log = LogWords::new(GuestAddress(base + log_start), &words, page_size(log_page));
        let start = base + start;
        let ranges = log.ranges_in(GuestAddress(start), len);
        let ranges = ranges.map(|range| (GuestAddress(start + range.start as u64), range.len()));
        let mut expected = bytes_of_log(&log);
        expected.retain(|byte| (start..start + len as u64).contains(byte));
        prop_assert_eq!(bytes_of(ranges), expected);
    }
}

#[test]
fn ranges_in_region_far_from_log_are_empty() {
    let ranges = |log_start, start| {
        let log = LogWords::new(GuestAddress(log_start), &[u64::MAX; 4], page_size(0x1000));
        log.ranges_in(GuestAddress(start), usize::MAX).count()
    };
    assert_eq!(ranges(0, 0), 1);
    assert_eq!(ranges(0, 255 * 0x1000), 1);
    assert_eq!(ranges(0, 256 * 0x1000), 0);
    assert_eq!(ranges(0, u64::MAX), 0);
}

#[test]
fn kvm_log_has_pages_of_host() {
    let log = LogWords::kvm(GuestAddress(0x10_0000), &[0b1010]);
    let page = crate::page_size::host_page_size().get();
    let ranges: Vec<_> = log.ranges_in(GuestAddress(0x10_0000), 4 * page).collect();
    assert_eq!(ranges, [page..2 * page, 3 * page..4 * page]);
}
