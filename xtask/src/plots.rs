//! The plots of the README: drawn from what the docs and records say, so that they say the same.

use anyhow::{Context, Result, anyhow, ensure};
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;
use std::fs;
use std::path::Path;

/// SmolLM2's table of it.
const QUALITY: &str = "docs/choosing-bits.md";
/// What `tqkv bench --op step` and `benches/peers/torch_step.py` printed.
const STEPS: &str = "benches/results/2026-11-30-h200-release.txt";

const COLOURS: [RGBColor; 4] = [RGBColor(110, 110, 110), RGBColor(210, 120, 0), BLUE, RGBColor(0, 140, 90)];

/// A line of points, each with its name.
struct Series {
    name: &'static str,
    points: Vec<(f64, f64, String)>,
}

/// Draws the plots anew.
pub fn write(root: &Path) -> Result<String> {
    fs::create_dir_all(root.join("docs/plots"))?;
    plots(root)?.into_iter().map(|(path, svg)| Ok(fs::write(root.join(path), svg)?)).collect::<Result<Vec<_>>>()?;
    Ok("wrote the plots".to_owned())
}

/// Fails if a plot is not what would be drawn.
pub fn check(root: &Path) -> Result<String> {
    for (path, svg) in plots(root)? {
        let found = fs::read_to_string(root.join(path)).with_context(|| path)?;
        ensure!(found == svg, "{path} is not what is drawn from its data: run `cargo xtask plots`");
    }
    Ok("the plots show what the docs say".to_owned())
}

fn plots(root: &Path) -> Result<[(&'static str, String); 2]> {
    let read = |path| fs::read_to_string(root.join(path)).with_context(|| path);
    let quality = quality(&read(QUALITY)?)?;
    let steps = steps(&read(STEPS)?)?;
    Ok([
        ("docs/plots/quality.svg", draw_quality(&quality).map_err(|e| anyhow!("{e}"))?),
        ("docs/plots/step.svg", draw_steps(&steps).map_err(|e| anyhow!("{e}"))?),
    ])
}

/// KLD by bits at 2048 positions, of the first table with both.
fn quality(page: &str) -> Result<Vec<Series>> {
    let mut series = [
        Series { name: "formats of other projects", points: vec![] },
        Series { name: "kXvX", points: vec![] },
        Series { name: "kXvX+s1f16+r64k8v8, calibrated", points: vec![] },
    ];
    let rows =
        page.lines().skip_while(|line| !line.starts_with("| codec | bits, long run | bits at 2048 | KLD, prose"));
    for row in rows.skip(2).take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let &[_, name, _, bits, kld, ..] = cells.as_slice() else { continue };
        let kld = kld.split(' ').next().unwrap_or(kld).parse().with_context(|| format!("{QUALITY}: {row}"))?;
        let codec = name.split('`').nth(1).with_context(|| format!("{QUALITY}: {row}"))?;
        let (short, extents) = codec.split_once('+').unwrap_or((codec, ""));
        let calibrated = name.ends_with("calibrated");
        let which = match (short.starts_with('k'), calibrated, extents) {
            (false, ..) => 0,
            (true, false, "") => 1,
            (true, true, "s1f16+r64k8v8") => 2,
            _ => continue,
        };
        series[which].points.push((bits.parse()?, kld, short.to_owned()));
    }
    ensure!(series.iter().all(|s| s.points.len() > 1), "{QUALITY} lacks its table");
    series.iter_mut().skip(1).for_each(|s| s.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    Ok(series.into())
}

/// Milliseconds of a replayed step by all positions of its sequences.
fn steps(record: &str) -> Result<Vec<Series>> {
    let between = |line: &str, before: &str, after: &[char]| {
        Some(line.split_once(before)?.1.split(after).next()?.trim().to_owned())
    };
    let of = |name, marks: [&str; 2], before: &str| {
        let mut points = vec![];
        for line in record.lines().filter(|line| marks.iter().all(|mark| line.contains(mark))) {
            let Some(ms) = between(line, before, &[',', ')', '}']) else { continue };
            let shape =
                line.split([' ', '"']).find(|word| word.contains("32/8x128x")).context("a step without a shape")?;
            let (batch, context) = (shape.split('x').next(), shape.rsplit('x').next());
            let positions = batch.and_then(|b| b.parse::<f64>().ok()).zip(context.and_then(|c| c.parse::<f64>().ok()));
            let (batch, context) = positions.with_context(|| shape.to_owned())?;
            points.push((batch * context, ms.parse()?, format!("{batch} × {context}")));
        }
        ensure!(points.len() == 4, "{STEPS}: {} steps of {name}", points.len());
        Ok(Series { name, points })
    };
    Ok(vec![
        of("PyTorch f16, in a CUDA graph", ["step_torch", "ms_replay"], "\"ms_replay\":")?,
        of("tqkv f16", ["step  ", " f16  "], "replayed")?,
        of("tqkv k8v8", ["step  ", " k8v8  "], "replayed")?,
        of("tqkv k4v4", ["step  ", " k4v4  "], "replayed")?,
    ])
}

type Drawn = Result<String, Box<dyn std::error::Error>>;

fn draw_quality(series: &[Series]) -> Drawn {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (720, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("What bits cost: SmolLM2-135M, 2048 tokens of prose", ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(1.5..9.5, (1e-4..3.0).log_scale())?;
    let mut mesh = chart.configure_mesh();
    mesh.max_light_lines(0);
    mesh.x_desc("bits an element at 2048 positions, all counted").y_desc("KLD a token from an f32 cache, nats");
    mesh.x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| format!("{y:.0e}")).draw()?;
    draw_series(&mut chart, series, |i| i > 0, |_, _| true)?;
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).border_style(BLACK).draw()?;
    area.present()?;
    drop((chart, area));
    Ok(svg)
}

fn draw_steps(series: &[Series]) -> Drawn {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (720, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("A decoding step of 32 layers on an H200, 32 query and 8 KV heads of 128", ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..150_000.0, 0.0..8.0)?;
    let mut mesh = chart.configure_mesh();
    mesh.max_light_lines(0);
    mesh.x_desc("positions in the cache: sequences × context").y_desc("milliseconds, replayed");
    mesh.x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| format!("{y:.0}")).draw()?;
    draw_series(&mut chart, series, |_| true, |i, _| i == 0)?;
    chart.configure_series_labels().position(SeriesLabelPosition::UpperLeft).border_style(BLACK).draw()?;
    area.present()?;
    drop((chart, area));
    Ok(svg)
}

/// Points, those joined by lines that `joined` says, named where `named` says.
fn draw_series<X, Y>(
    chart: &mut ChartContext<SVGBackend, Cartesian2d<X, Y>>,
    series: &[Series],
    joined: impl Fn(usize) -> bool,
    named: impl Fn(usize, usize) -> bool,
) -> Result<(), Box<dyn std::error::Error>>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    for (i, Series { name, points }) in series.iter().enumerate() {
        let colour = COLOURS[i];
        let line = points.iter().map(|p| (p.0, p.1));
        let style = if joined(i) { colour.stroke_width(2) } else { colour.stroke_width(0) };
        chart
            .draw_series(LineSeries::new(line.filter(|_| joined(i)), style))?
            .label(*name)
            .legend(move |(x, y)| Circle::new((x + 9, y), 4, colour.filled()));
        chart.draw_series(points.iter().enumerate().map(|(j, p)| {
            let text = if named(i, j) { p.2.clone() } else { String::new() };
            // Beside the line on its free side; neighbours that are not joined have one name above the other.
            let at = if i == 1 { (-36, 2) } else { (7, if !joined(i) && j % 2 == 1 { -1 } else { -13 }) };
            EmptyElement::at((p.0, p.1))
                + Circle::new((0, 0), 4, colour.filled())
                + Text::new(text, at, ("sans-serif", 12))
        }))?;
    }
    Ok(())
}
