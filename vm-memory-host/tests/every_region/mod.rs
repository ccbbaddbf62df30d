//! The regions that several test programs build: each backing, and the options that make system
//! calls.

use std::num::NonZeroU64;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use test_support::{temp_file_of_len, MIB};
use vm_memory::GuestAddress;
use vm_memory_host::{Backing, Lock, NumaPolicy, Region, TransparentHugePages, Unplugged};

/// The size of a block, and of a huge page.
pub(crate) const HUGE: u64 = 2 * MIB;

/// Returns regions of `size` bytes that can be written, of all kinds that this host can build.
pub(crate) fn writable_regions(
    start: GuestAddress,
    size: u64,
    has_huge_pages: bool,
) -> Vec<Region> {
    let region = |backing| Region::new(start, size).backing(backing);
    let anonymous = || region(Backing::Anonymous);
    let memfd = || region(Backing::Memfd);
    let shared_file = || region(Backing::shared_file(temp_file_of_len(size), 0));
    let private_file = || region(Backing::private_file(temp_file_of_len(size), 0));
    let received = || {
        let memfd = memfd_create("received", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&memfd, size).unwrap();
        region(Backing::shared_file(memfd, 0))
    };
    let options = |region: Region| {
        region
            .numa(NumaPolicy::Preferred(0))
            .core_dump(false)
            .forked(false)
            .transparent_huge_pages(TransparentHugePages::Off)
    };
    let blocks = NonZeroU64::new(HUGE).unwrap();
    let mut all = vec![
        anonymous(),
        anonymous().name("guest"),
        anonymous().transparent_huge_pages(TransparentHugePages::On),
        anonymous().reserve(true).mergeable(true),
        options(anonymous()).mergeable(true),
        anonymous().blocks(blocks, Unplugged::Protected),
        memfd(),
        options(memfd()).name("guest"),
        memfd().blocks(blocks, Unplugged::Mapped),
        memfd()
            .lock(Lock::OnFault)
            .blocks(blocks, Unplugged::Mapped),
        received(),
        received().lock(Lock::Now),
        shared_file(),
        shared_file().sparse(true),
        options(private_file()),
        private_file().lock(Lock::Now),
        private_file().lock(Lock::OnFault),
    ];
    if let Ok(file) = tempfile::tempfile_in("/dev/shm") {
        file.set_len(size).unwrap();
        all.push(region(Backing::shared_file(file, 0)).blocks(blocks, Unplugged::Mapped));
    }
    if has_huge_pages {
        let hugetlb = || region(Backing::Hugetlb { page_size: HUGE });
        all.push(hugetlb());
        all.push(hugetlb().release_huge_pages(true));
        all.push(hugetlb().blocks(blocks, Unplugged::Mapped));
    }
    all
}
