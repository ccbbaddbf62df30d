//! The times of accesses. Under emulation, compare ratios only.

use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRange, MmapRegion};
use vm_memory::{FileOffset, MmapXenFlags};

use super::gntdev::{read_by_copying, Mapped};
use super::Real;
use crate::environment::{Access, Environment, PAGE};
use crate::outcome::Outcome;

/// The number of measurements of each access.
const ROUNDS: usize = 301;
/// The number of accesses.
const ROWS: usize = 8;
/// The first reference and the number of grants.
const FIRST: u32 = 64;
const GRANTS: usize = 8;

/// One measurement.
type Measured<'a> = (&'static str, Box<dyn FnMut() -> Outcome + 'a>);

/// Measures accesses by the library and by hand, and returns a line for each.
///
/// # Errors
///
/// Returns an error if an access fails.
pub fn figures(env: &mut Real) -> Outcome<Vec<String>> {
    for (page, reference) in (0..GRANTS).zip(FIRST..) {
        env.grant(reference, page, Access::ReadWrite);
    }
    let device = env.gntdev()?;
    let domain = env.domain();
    let id = u16::try_from(domain).expect("a domain has 16 bits");
    let base = GuestAddress(1 << 63 | u64::from(FIRST) << 12);
    let memory = |flags: MmapXenFlags, copy: bool| -> Outcome<GuestMemoryMmap> {
        let file = FileOffset::new(device.try_clone()?, 0);
        let mut range = MmapRange::new(GRANTS * PAGE, Some(file), base, flags.bits(), domain);
        range.set_grant_copy(copy);
        let region = GuestRegionMmap::new(MmapRegion::from_range(range)?, base)
            .expect("the region does not pass the last address");
        Ok(GuestMemoryMmap::from_regions(vec![region])?)
    };
    let lazily = MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP;
    let mapped = memory(MmapXenFlags::GRANT, false)?;
    let lazy = memory(lazily, false)?;
    let copied = memory(lazily, true)?;
    let mut buffers = [[0; GRANTS * PAGE]; 3];
    let [one, two, three] = &mut buffers;
    let page = u16::try_from(PAGE).expect("a page has 4096 bytes");
    let mut small = [0; 64];
    let mut accesses: [Measured<'_>; ROWS] = [
        (
            "4 bytes, four system calls by hand",
            Box::new(|| {
                let mapped = Mapped::new(&device, domain, FIRST)?;
                std::hint::black_box(mapped.read());
                Ok(())
            }),
        ),
        (
            "4 bytes, read_obj, mapped at each access",
            Box::new(|| {
                std::hint::black_box(lazy.read_obj::<u32>(base)?);
                Ok(())
            }),
        ),
        (
            "64 bytes, GRANT_COPY by hand",
            Box::new(|| Ok(read_by_copying(&device, id, FIRST, 64, &mut small)?)),
        ),
        (
            "64 bytes, read_slice, with grant copy",
            Box::new(|| Ok(copied.read_slice(&mut [0; 64], base)?)),
        ),
        (
            "4 bytes, read_obj, mapped in advance",
            Box::new(|| {
                std::hint::black_box(mapped.read_obj::<u32>(base)?);
                Ok(())
            }),
        ),
        (
            "32 KiB, GRANT_COPY by hand",
            Box::new(|| Ok(read_by_copying(&device, id, FIRST, page, one)?)),
        ),
        (
            "32 KiB, read_slice, mapped at each access",
            Box::new(|| Ok(lazy.read_slice(two, base)?)),
        ),
        (
            "32 KiB, read_slice, with grant copy",
            Box::new(|| Ok(copied.read_slice(three, base)?)),
        ),
    ];
    let mut times = [const { Vec::new() }; ROWS];
    // The accesses take turns, so that a slow period affects all of them.
    for _ in 0..ROUNDS {
        // Otherwise the first access would find the caches as the last one left them.
        (accesses[0].1)()?;
        for ((_, access), times) in accesses.iter_mut().zip(&mut times) {
            let started = Instant::now();
            access()?;
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
    }
    let by_hand = times[0].clone();
    let lines = accesses.iter().zip(times).map(|((name, _), times)| {
        let ratios = times
            .iter()
            .zip(&by_hand)
            .map(|(time, by_hand)| time / by_hand);
        let ratio = median(ratios.collect());
        format!(
            "{name}: {:.1} us, {ratio:.3} of the four calls",
            median(times)
        )
    });
    Ok(lines.collect())
}

/// Returns the median of numbers.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
