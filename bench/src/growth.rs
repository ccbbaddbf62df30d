//! The cost of lookups and changes of an IOTLB by its number of mappings, as a table and a plot.

use std::path::Path;

use anyhow::{Context, Result};

use crate::comparison::{Comparison, Effort};
use crate::plot::{Curve, Plot, BLUE, GREY, ORANGE};
use crate::report::{digits, Build};
use crate::workload_shapes::Mappings;
use crate::{new_abilities, ours_side, reference_side};

/// The numbers of mappings.
const COUNTS: [u64; 7] = [1, 10, 100, 1000, 10_000, 100_000, 1_000_000];

/// Measures the IOTLBs, prints the table and draws the plot.
pub fn run(effort: Effort, build: Build, path: &Path) -> Result<()> {
    println!(
        "Build `{}`, an IOTLB of n fragmented pages, ns, medians of {} interleaved rounds.\n",
        build.name(),
        effort.rounds
    );
    println!(
        "{:>9} {:>12} {:>12} {:>14} {:>14} {:>14}",
        "mappings", "lookup, ref.", "lookup, ours", "remap, ref.", "remap, ours", "remap, shared"
    );
    let mut curves = [
        ("vm-memory 0.18.0: lookup", ORANGE),
        ("this crate: lookup", BLUE),
        ("this crate: remap a page, shared", GREY),
    ]
    .map(|(name, color)| Curve {
        name,
        color,
        points: Vec::new(),
    });
    let mut last = (0.0, 0.0);
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
            "{count:>9} {:>12} {:>12} {:>14} {:>14} {:>14}",
            digits(lookup.reference),
            digits(lookup.ours),
            digits(remap.reference),
            digits(remap.ours),
            digits(shared)
        );
        for (curve, y) in curves
            .iter_mut()
            .zip([lookup.reference, lookup.ours, shared])
        {
            curve.points.push((count as f64, y));
        }
        last = (lookup.reference, lookup.ours);
    }
    let plot = Plot {
        caption: format!("An IOTLB as it grows, build `{}`", build.name()),
        x: "mappings of a page each",
        y: "ns",
        x_labels: 7,
        x_label: |count| format!("{count:.0}"),
        base: 10.0,
        curves: curves.into(),
    };
    plot.draw(path)?;
    println!(
        "\nlookup in an IOTLB of a million mappings: {} ns, 0.18.0 {} ns",
        digits(last.1),
        digits(last.0)
    );
    Ok(())
}
