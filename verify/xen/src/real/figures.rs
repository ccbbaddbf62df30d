//! The times of accesses. Under emulation, only ratios mean something.

use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRange, MmapRegion};
use vm_memory::{FileOffset, MmapXenFlags};

use super::gntdev::{read_by_copying, Mapped};
use super::Real;
use crate::outcome::Outcome;
use crate::world::{Access, World, PAGE};

/// The rounds, of which the fastest counts, and the accesses in a round.
const ROUNDS: usize = 9;
const ACCESSES: u32 = 40;
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
pub fn figures(world: &mut Real) -> Outcome<Vec<String>> {
    for (page, reference) in (0..GRANTS).zip(FIRST..) {
        world.grant(reference, page, Access::ReadWrite);
    }
    let device = world.gntdev()?;
    let domain = world.domain();
    let id = u16::try_from(domain).expect("a domain has 16 bits");
    let base = GuestAddress(1 << 63 | u64::from(FIRST) << 12);
    let memory = |flags: MmapXenFlags| -> Outcome<GuestMemoryMmap> {
        let file = FileOffset::new(device.try_clone()?, 0);
        let range = MmapRange::new(GRANTS * PAGE, Some(file), base, flags.bits(), domain);
        let region = GuestRegionMmap::new(MmapRegion::from_range(range)?, base)
            .expect("the region does not pass the last address");
        Ok(GuestMemoryMmap::from_regions(vec![region])?)
    };
    let lazily = MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP;
    let mapped = memory(MmapXenFlags::GRANT)?;
    let lazy = memory(lazily)?;
    let mut buffers = [[0; GRANTS * PAGE]; 2];
    let [one, two] = &mut buffers;
    let page = u16::try_from(PAGE).expect("a page has 4096 bytes");
    let mut small = [0; 4];
    let mut accesses: [Measured<'_>; 7] = [
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
            "4 bytes, GRANT_COPY by hand",
            Box::new(|| Ok(read_by_copying(&device, id, FIRST, 4, &mut small)?)),
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
        ("nothing", Box::new(|| Ok(()))),
    ];
    let mut best = [f64::INFINITY; 7];
    // The measurements take turns, so that a slow moment does not fall on one of them alone.
    for _ in 0..ROUNDS {
        for ((_, access), best) in accesses.iter_mut().zip(&mut best) {
            let started = Instant::now();
            for _ in 0..ACCESSES {
                access()?;
            }
            let each = started.elapsed().as_secs_f64() * 1e6 / f64::from(ACCESSES);
            *best = best.min(each);
        }
    }
    let by_hand = best[0];
    let lines = accesses.iter().zip(best).map(|((name, _), time)| {
        format!(
            "{name}: {time:.2} us, {:.3} of the four calls",
            time / by_hand
        )
    });
    Ok(lines.collect())
}
