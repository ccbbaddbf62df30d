//! The thread that truncates files does not change them during a certain moment.

use e2e::plan::CHUNK_SECTORS;
use e2e::storm::{with_region, Moment, Truncation, CHUNKS};
use microvm::block::SECTOR;
use microvm::disk::Image;
use microvm::memory::{build, Backing, PAGE};
use test_support::skipped;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

#[test]
fn certain_moment_keeps_the_lengths_of_both_files() {
    let ram = with_region(&build(16 << 20, &Backing::Anonymous).unwrap()).unwrap();
    let image = Image::temporary(2048 + CHUNKS * CHUNK_SECTORS).unwrap();
    let truncation = match Truncation::new(&ram, &image, 7) {
        Ok(truncation) => truncation,
        Err(e) => return skipped("certain_moment_keeps_the_lengths_of_both_files", e),
    };
    let mut running = truncation.start().unwrap();
    let storm = truncation.storm();
    let region = ram.find_region(GuestAddress(storm.buffers)).unwrap();
    let region = region.file_offset().unwrap().file();
    let steady = storm.sector * SECTOR;
    let lengths = || {
        let [disk, region] = [&*image.file, region].map(|file| file.metadata().unwrap().len());
        [disk - steady, region]
    };
    let full = CHUNKS * PAGE;
    let mut moments = [0; 2];
    for nth in 0..400 {
        let Moment::Certain { whole, held } = truncation.moment(nth).unwrap() else {
            assert_ne!(nth % 4, 0);
            continue;
        };
        moments[usize::from(whole)] += 1;
        let before = lengths();
        assert_eq!(whole, before == [full, full]);
        assert!(whole || before == [0, full] || before == [full, 0]);
        std::thread::yield_now();
        assert_eq!(lengths(), before);
        drop(held);
    }
    assert_eq!(moments, [50, 50]);
    running.stop().unwrap();
    assert!(truncation.count() > 50);
    assert_eq!(lengths(), [full, full]);
}
