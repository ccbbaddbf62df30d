//! The cost of lookups and changes of an IOTLB by its number of mappings, as a table.

use anyhow::{Context, Result};

use crate::comparison::{Comparison, Effort};
use crate::report::{digits, Build};
use crate::workload_shapes::Mappings;
use crate::{new_abilities, ours_side, reference_side};

/// The numbers of mappings.
const COUNTS: [u64; 7] = [1, 10, 100, 1000, 10_000, 100_000, 1_000_000];

/// Measures the IOTLBs and prints the table.
pub fn run(effort: Effort, build: Build) -> Result<()> {
    println!(
        "Build `{}`, an IOTLB of n fragmented pages, ns, medians of {} interleaved rounds.\n",
        build.name(),
        effort.rounds
    );
    println!(
        "| mappings | lookup, 0.18.0 | lookup, this crate | remap, 0.18.0 | remap, this crate | \
         remap, this crate, shared |\n|---|---|---|---|---|---|"
    );
    for count in COUNTS {
        let mappings = Mappings::fragmented(count);
        let lookup = Comparison {
            reference: reference_side::iommu::hit(mappings)?,
            ours: ours_side::iommu::hit(mappings)?,
            limit: None,
        };
        let remap = Comparison {
            reference: reference_side::iommu::remap(mappings)?,
            ours: ours_side::iommu::remap(mappings)?,
            limit: Some(new_abilities::remap_shared(mappings)?),
        };
        let (lookup, remap) = (lookup.run(effort)?, remap.run(effort)?);
        let shared = remap.limit.context("not measured")?;
        println!(
            "| {count} | {} | {} | {} | {} | {} |",
            digits(lookup.reference),
            digits(lookup.ours),
            digits(remap.reference),
            digits(remap.ours),
            digits(shared)
        );
    }
    Ok(())
}
