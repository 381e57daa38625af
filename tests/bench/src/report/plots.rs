//! SVG plots: bars with intervals, and curves.
//!
//! In: names and numbers. Out: files. The axes of curves are logarithmic.

use std::{collections::BTreeSet, ops::Range, path::Path};

use anyhow::Result;
use plotters::prelude::*;

use weir_tests::subject::Plane;

use crate::{statistics::Estimate, subject::Subject};

/// Colours that differ in print too.
fn colour(subject: Subject) -> RGBColor {
    match subject {
        Subject::WeirEbpf => RGBColor(0, 114, 178),
        Subject::WeirNftables => RGBColor(86, 180, 233),
        Subject::KubeProxyNftables => RGBColor(213, 94, 0),
        Subject::OtherKubeProxy(_) => RGBColor(120, 60, 0),
        Subject::KubeProxyIptables => RGBColor(230, 159, 0),
        Subject::KubeProxyIpvs => RGBColor(204, 121, 167),
        Subject::OtherWeir(Plane::Ebpf, _) => RGBColor(0, 158, 115),
        Subject::OtherWeir(Plane::Nftables, _) => RGBColor(240, 228, 66),
    }
}

/// Bars of one case, each with its subject.
pub(super) struct Group {
    pub(super) name: String,
    pub(super) bars: Vec<(Subject, Estimate)>,
}

/// The width of a plot, in pixels.
const WIDTH: u32 = 900;
/// Room for the names of groups, in units of the axis.
const NAMES: f64 = 0.75;
/// Room for title and legend, in pixels.
const HEAD: u32 = 75;
/// The height of a bar, in pixels.
const BAR: u32 = 14;

/// Ratios as horizontal bars with their intervals.
pub(super) fn bars(path: &Path, title: &str, groups: &[Group]) -> Result<()> {
    let rows: usize = groups.iter().map(|group| group.bars.len() + 1).sum();
    let height = 160 + BAR * u32::try_from(rows)?;
    let highest = groups.iter().flat_map(|group| &group.bars).map(|(_, bar)| bar.high).fold(1.1, f64::max);
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let subjects = groups.iter().flat_map(|group| group.bars.iter().map(|(subject, _)| *subject));
    let body = headed(&root, title, subjects)?;
    let mut chart = ChartBuilder::on(&body)
        .margin(10)
        .x_label_area_size(35)
        .build_cartesian_2d(-NAMES..highest.min(2.0), 0.0..rows as f64 + 1.0)?;
    let label = |value: &f64| if *value < 0.0 { String::new() } else { format!("{value:.1}") };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .max_light_lines(1)
        .x_labels(20)
        .x_label_formatter(&label)
        .x_desc("part of straight, no proxy (95 % intervals)")
        .y_labels(0)
        .draw()?;
    let top = rows as f64 + 1.0;
    chart.draw_series(LineSeries::new([(1.0, 0.0), (1.0, top)], BLACK.mix(0.6)))?;
    let mut y = top - 0.5;
    for group in groups {
        let middle = y - 0.3 - group.bars.len() as f64 / 2.0;
        chart.draw_series([Text::new(
            group.name.clone(),
            (0.02 - NAMES, middle + 0.4),
            ("sans-serif", 13),
        )])?;
        for (subject, bar) in &group.bars {
            y -= 1.0;
            let colour = colour(*subject);
            chart.draw_series([Rectangle::new([(0.0, y - 0.4), (bar.point, y + 0.4)], colour.filled())])?;
            chart.draw_series([ErrorBar::new_horizontal(
                y,
                bar.low,
                bar.point,
                bar.high,
                BLACK.stroke_width(1),
                6,
            )])?;
        }
        y -= 1.0;
    }
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Writes title and legend, and leaves what is below them.
fn headed<'a>(root: &Area<'a>, title: &str, subjects: impl Iterator<Item = Subject>) -> Result<Area<'a>> {
    let (head, body) = root.split_vertically(HEAD);
    head.draw(&Text::new(title, (12, 8), ("sans-serif", 18)))?;
    let all: BTreeSet<Subject> = subjects.collect();
    let (mut x, mut y) = (12, 36);
    for subject in all {
        let width = 40 + 7 * i32::try_from(subject.name().len())?;
        if x + width > i32::try_from(WIDTH)? {
            (x, y) = (12, y + 18);
        }
        head.draw(&Rectangle::new([(x, y), (x + 12, y + 10)], colour(subject).filled()))?;
        head.draw(&Text::new(subject.name(), (x + 17, y), ("sans-serif", 13)))?;
        x += width;
    }
    Ok(body)
}

/// An axis that counts by powers of ten.
#[derive(Clone, Copy)]
pub(super) struct Axis {
    pub(super) name: &'static str,
    /// A number as it is written.
    pub(super) text: fn(f64) -> String,
}

impl Axis {
    fn place(value: f64) -> f64 {
        value.max(1e-9).log10()
    }

    /// Whole powers of ten around all values.
    fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
        let (low, high) = values
            .map(Self::place)
            .fold((f64::MAX, f64::MIN), |(low, high), place| (low.min(place), high.max(place)));
        low.floor()..high.ceil().max(low.floor() + 1.0)
    }

    fn label(self, place: f64) -> String {
        (self.text)(10_f64.powf(place))
    }
}

/// The points of one subject.
pub(super) struct Curve {
    pub(super) subject: Subject,
    pub(super) points: Vec<(f64, f64)>,
}

/// Curves with their points.
pub(super) fn curves(path: &Path, title: &str, x: Axis, y: Axis, curves: &[Curve]) -> Result<()> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (across, up) =
        (Axis::range(points().map(|point| point.0)), Axis::range(points().map(|point| point.1)));
    let labels = |range: &Range<f64>| (range.end - range.start) as usize + 1;
    let (x_labels, y_labels) = (labels(&across), labels(&up));
    let root = SVGBackend::new(path, (WIDTH, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let body = headed(&root, title, curves.iter().map(|curve| curve.subject))?;
    let mut chart = ChartBuilder::on(&body)
        .margin(10)
        .margin_right(30)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(across, up)?;
    chart
        .configure_mesh()
        .max_light_lines(1)
        .x_labels(x_labels)
        .y_labels(y_labels)
        .x_label_formatter(&|place| x.label(*place))
        .y_label_formatter(&|place| y.label(*place))
        .x_desc(x.name)
        .y_desc(y.name)
        .draw()?;
    for curve in curves {
        let colour = colour(curve.subject);
        let places: Vec<_> =
            curve.points.iter().map(|(one, other)| (Axis::place(*one), Axis::place(*other))).collect();
        chart.draw_series(LineSeries::new(places.iter().copied(), colour.stroke_width(2)))?;
        chart.draw_series(places.into_iter().map(|place| Circle::new(place, 3, colour.filled())))?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::time;

    #[test]
    fn plots_have_their_titles_and_legends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("plot.svg");
        let bar = Estimate { point: 0.9, low: 0.8, high: 0.95 };
        let group = Group { name: "a route".to_owned(), bars: vec![(Subject::WeirEbpf, bar)] };
        bars(&path, "Ratios", &[group]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(["a route", "weir eBPF", "Ratios"].iter().all(|word| text.contains(word)), "{text}");

        let axis = |name| Axis { name, text: time };
        let curve = Curve { subject: Subject::WeirNftables, points: vec![(100.0, 0.01), (1000.0, 0.02)] };
        curves(&path, "Costs", axis("across"), axis("up"), &[curve]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(["across", "weir nftables", "Costs"].iter().all(|word| text.contains(word)), "{text}");
    }
}
