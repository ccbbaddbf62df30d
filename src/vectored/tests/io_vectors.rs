use super::*;

#[test]
fn io_vectors_cover_exactly_the_range() {
    let memory = regions(3);
    let range = io_vectors(&memory, GuestAddress(0xff0), 0x1020, Permissions::Write).unwrap();
    assert_eq!(range.len(), 0x1020);
    let named: Vec<_> = range
        .vectors()
        .iter()
        .map(|vector| (vector.iov_base.cast(), vector.iov_len))
        .collect();
    let host = |address| memory.get_host_address(GuestAddress(address)).unwrap();
    assert_eq!(
        named,
        [
            (host(0xff0), 0x10),
            (host(0x1000), 0x1000),
            (host(0x2000), 0x10)
        ]
    );
    range.mark_dirty(0x10, 0x1001);
    assert_eq!(dirty(&memory), [0x1000, 0x2000]);
    range.mark_dirty(0, 0);
    range.mark_dirty(0x1020, 5);
    assert_eq!(dirty(&memory), [0u64; 0]);
    assert!(io_vectors(&memory, GuestAddress(0x2ff0), 0x11, Permissions::Read).is_err());
    assert!(io_vectors(&memory, GuestAddress(5), 0, Permissions::Read)
        .unwrap()
        .is_empty());
}
