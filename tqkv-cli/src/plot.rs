//! Divergence against bits, as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// One codec.
pub struct Point<'a> {
    pub name: &'a str,
    pub bits: f64,
    pub kld: f64,
}

/// Draws the codecs; the native ones with as many bits for keys as for values are joined by a line. A divergence of 0
/// has no place on the logarithmic axis and is left out.
pub fn draw(points: &[Point]) -> Result<String> {
    let points: Vec<&Point> = points.iter().filter(|p| p.kld > 0.0).collect();
    let kld = || points.iter().map(|p| p.kld);
    let (least, most) = (kld().fold(f64::INFINITY, f64::min), kld().fold(0.0, f64::max));
    if points.is_empty() {
        return Err(anyhow!("nothing to plot: no codec diverges from f32"));
    }
    let widest = points.iter().map(|p| p.bits).fold(0.0, f64::max);
    let mut native: Vec<(f64, f64)> = points.iter().filter(|p| is_native(p.name)).map(|p| (p.bits, p.kld)).collect();
    native.sort_by(|a, b| a.0.total_cmp(&b.0));

    let mut svg = String::new();
    let drawn = || -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(&mut svg, (800, 500)).into_drawing_area();
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
        chart.draw_series(LineSeries::new(native, BLUE))?;
        chart.draw_series(points.iter().map(|p| {
            let colour = if p.name.starts_with('k') { BLUE } else { RED };
            EmptyElement::at((p.bits, p.kld))
                + Circle::new((0, 0), 4, colour.filled())
                + Text::new(p.name.to_owned(), (7, -12), ("sans-serif", 13))
        }))?;
        area.present()?;
        Ok(())
    };
    drawn().map_err(|e| anyhow!("cannot draw the plot: {e}"))?;
    Ok(svg)
}

/// Whether it is `kXvX`.
fn is_native(name: &str) -> bool {
    matches!(name.as_bytes(), [b'k', k, b'v', v] if k == v)
}
