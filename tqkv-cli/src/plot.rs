//! Divergence against bits, as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::collections::BTreeMap;

/// One codec.
pub struct Point<'a> {
    pub name: &'a str,
    pub bits: f64,
    pub kld: f64,
}

/// Codecs that one line joins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    /// `kXvX`
    Even,
    /// `kXvY` with other bits for values than for keys.
    Uneven,
    Seed,
    Float,
}

impl Family {
    fn of(name: &str) -> Self {
        match name.as_bytes() {
            [b'k', k, b'v', v] if k == v => Self::Even,
            [b'k', ..] => Self::Uneven,
            [b's', ..] => Self::Seed,
            _ => Self::Float,
        }
    }

    fn look(self) -> (&'static str, RGBColor) {
        match self {
            Self::Even => ("native, as many bits for keys as for values", BLUE),
            Self::Uneven => ("native, others for values", RGBColor(0, 130, 130)),
            Self::Seed => ("seed", RED),
            Self::Float => ("floats", RGBColor(90, 90, 90)),
        }
    }
}

/// Draws the codecs, those of a family joined by a line. A divergence of 0 has no place on the logarithmic axis and is left
/// out.
pub fn draw(points: &[Point]) -> Result<String> {
    let mut families = BTreeMap::<Family, Vec<&Point>>::new();
    for point in points.iter().filter(|p| p.kld > 0.0) {
        families.entry(Family::of(point.name)).or_default().push(point);
    }
    let all = || families.values().flatten();
    if all().next().is_none() {
        return Err(anyhow!("nothing to plot: no codec diverges from f32"));
    }
    families.values_mut().for_each(|points| points.sort_by(|a, b| a.bits.total_cmp(&b.bits)));
    let mut svg = String::new();
    draw_families(&families, &mut svg).map_err(|e| anyhow!("cannot draw the plot: {e}"))?;
    Ok(svg)
}

fn draw_families(families: &BTreeMap<Family, Vec<&Point>>, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let all = || families.values().flatten();
    let (least, most) = all().fold((f64::INFINITY, 0.0f64), |(least, most), p| (least.min(p.kld), most.max(p.kld)));
    let widest = all().map(|p| p.bits).fold(0.0, f64::max);
    let area = SVGBackend::with_string(svg, (800, 500)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("KLD a token against bits an element", ("sans-serif", 18))
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..widest + 1.5, (least / 2.0..most * 2.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bits an element, scales counted")
        .y_desc("KLD a token, nats")
        .y_label_formatter(&|y| format!("{y:.0e}"))
        .draw()?;
    for (family, points) in families {
        let (name, colour) = family.look();
        chart
            .draw_series(LineSeries::new(points.iter().map(|p| (p.bits, p.kld)), colour))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        chart.draw_series(points.iter().map(|p| {
            EmptyElement::at((p.bits, p.kld))
                + Circle::new((0, 0), 4, colour.filled())
                + Text::new(p.name.to_owned(), (7, -12), ("sans-serif", 13))
        }))?;
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_line() {
        let point = |name, bits, kld| Point { name, bits, kld };
        let points =
            [point("k4v4", 4.1, 1e-2), point("k8v8", 8.1, 1e-4), point("k5v4", 4.6, 5e-3), point("seed4", 4.3, 2e-2)];
        let svg = draw(&points).unwrap();
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(
            ["as many bits", "others for values", ">\nseed\n<", "k5v4"].iter().all(|text| svg.contains(text)),
            "{svg}"
        );
        assert!(!svg.contains("floats"));
        assert!(draw(&[point("f32", 32.0, 0.0)]).is_err());
    }
}
