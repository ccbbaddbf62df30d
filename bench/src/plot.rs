//! A plot of curves over a logarithmic axis, as SVG.

use std::path::Path;

use anyhow::{anyhow, Context, Result};
use plotters::prelude::*;

pub const GREY: RGBColor = RGBColor(120, 120, 120);
pub const ORANGE: RGBColor = RGBColor(214, 96, 28);
pub const BLUE: RGBColor = RGBColor(0, 96, 172);

/// One curve.
pub struct Curve {
    pub name: &'static str,
    pub color: RGBColor,
    pub points: Vec<(f64, f64)>,
}

/// A plot from the lowest to the highest x of its curves, and from 0 upwards.
pub struct Plot {
    pub caption: String,
    pub x: &'static str,
    pub y: &'static str,
    /// The number of labels of the x axis, and their text.
    pub x_labels: usize,
    pub x_label: fn(f64) -> String,
    /// The base of the logarithmic x axis.
    pub base: f64,
    pub curves: Vec<Curve>,
}

impl Plot {
    pub fn draw(&self, path: &Path) -> Result<()> {
        self.draw_at(path)
            .with_context(|| format!("cannot draw {}", path.display()))
    }

    fn draw_at(&self, path: &Path) -> Result<()> {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let highest = points().map(|point| point.1).fold(1.0, f64::max);
        let first = points().map(|point| point.0).fold(f64::MAX, f64::min);
        let last = points().map(|point| point.0).fold(0.0, f64::max);

        // The errors of plotters borrow the drawing.
        let failed = |error: &dyn std::fmt::Display| anyhow!("{error}");
        let area = SVGBackend::new(path, (960, 540)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.caption, ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(
                (first..last).log_scale().base(self.base),
                0.0..highest * 1.05,
            )
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .x_labels(self.x_labels)
            .x_label_formatter(&|x| (self.x_label)(*x))
            .light_line_style(WHITE)
            .draw()
            .map_err(|error| failed(&error))?;
        for curve in &self.curves {
            let style = curve.color.stroke_width(2);
            chart
                .draw_series(LineSeries::new(curve.points.iter().copied(), style))
                .map_err(|error| failed(&error))?
                .label(curve.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK)
            .background_style(WHITE)
            .draw()
            .map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))
    }
}
