//! `tqkv calibrate`

use crate::language::Language;
use crate::{interrupt, output};
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv_candle::{Calibration, Encoded, Origin, Search, Tried, Windows, fingerprint};

/// Measures a model's keys and queries over text, so that caches store the keys with fewer errors.
///
/// Take text like what the model will read, and pieces as long as the contexts will be: keys drift with their position. The file
/// is for `--calibration` of eval, generate and chat. Ctrl-C ends without a file.
#[derive(clap::Args)]
pub struct Calibrate {
    /// GGUF file, or Hugging Face directory
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Text to run over; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    text: Vec<PathBuf>,
    /// File to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens of the pieces that texts are cut into [default: the model's context, at most 2048]
    #[arg(long, value_name = "N")]
    length: Option<usize>,
    /// Also look for the bits of each layer, and for what to keep besides, that do best with so many bits an element, all
    /// counted; `--codec auto` with the file then means these. Takes two runs of the model for each layer, and a few more
    #[arg(long, value_name = "BITS")]
    budget: Option<f64>,
    /// Positions of the sequences that the budget is for [default: --length]
    #[arg(long, value_name = "N", requires = "budget")]
    context: Option<usize>,
    /// Print the result as JSON, one object for each thing that was tried
    #[arg(long)]
    json: bool,
}

/// Tokens at the end of each text that bits are looked for with, and that are not calibrated with, at most.
const HELD_OUT: usize = 1024;

/// Something that was tried for the budget.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    bits_per_element: f64,
    kld: f64,
    layers: Vec<String>,
}

impl Calibrate {
    pub fn run(self) -> Result<ExitCode> {
        // Before the work, which may take long.
        ensure!(self.length != Some(0), "--length is 0, expected at least 1");
        ensure!(self.context != Some(0), "--context is 0, expected at least 1");
        output::expect_replaceable(&self.out)?;
        let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let texts = self.text.iter().map(read).collect::<Result<Vec<_>>>()?;
        let names = self.text.iter().map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        let origin = Origin::new(fingerprint(&self.model)?, names.collect());
        interrupt::watch()?;
        let language = Language::load(&self.model, None)?;
        let mut texts = texts.iter().map(|text| language.vocabulary.encode(text)).collect::<Result<Vec<_>, _>>()?;
        let length = self.length(&language)?;
        let held_out = match self.budget {
            Some(_) => Some(hold_out(&mut texts, HELD_OUT.min(length), language.start())?),
            None => None,
        };
        let Some(mut calibration) = measure(&language, &pieces(&texts, length, language.start()), origin)? else {
            bail!("interrupted: {} is not written", self.out.display())
        };
        if let (Some([windows, probes]), Some(budget)) = (&held_out, self.budget) {
            let (model, context) = (&language.model, self.context.unwrap_or(length));
            let search = Search { model, calibration: &calibration, windows, probes, budget, context };
            let Some(tried) = run_search(&search)? else { bail!("interrupted: {} is not written", self.out.display()) };
            self.print_tried(&tried, context)?;
            let best = tried.into_iter().next().context("nothing keeps to the budget")?;
            calibration = calibration.with_plan(best.plan);
        }
        calibration.save(&self.out)?;
        if !self.json {
            let (layers, tokens, path) = (calibration.layers(), calibration.origin().tokens, self.out.display());
            output::print(&format!("{layers} layers calibrated over {tokens} tokens, written to {path}\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Tokens of a piece.
    fn length(&self, language: &Language) -> Result<usize> {
        let context = language.model.config().max_position_embeddings;
        let length = self.length.unwrap_or(context.min(2048));
        ensure!(length <= context, "--length is {length}, expected at most the model's context of {context}");
        Ok(length)
    }

    fn print_tried(&self, tried: &[Tried], context: usize) -> Result<()> {
        if self.json {
            return tried.iter().try_for_each(|Tried { name, plan, bits, kld }| {
                let layers = plan.layers.iter().map(ToString::to_string).collect();
                output::print_json(&Row { name, bits_per_element: *bits, kld: *kld, layers })
            });
        }
        let rows =
            tried.iter().map(|Tried { name, bits, kld, .. }| [name.clone(), format!("{bits:.3}"), format!("{kld:.6}")]);
        output::print(&output::table(["tried", &format!("bits/element at {context}"), "KLD/token"], rows))?;
        let Some(best) = tried.first() else { return Ok(()) };
        let layers: Vec<String> = best.plan.layers.iter().map(ToString::to_string).collect();
        output::print(&format!("best: {}, by layer {}\n", best.name, layers.join(" ")))
    }
}

/// The texts in pieces of `length` tokens, each after the start token where the model has one.
fn pieces(texts: &[Encoded], length: usize, start: Option<u32>) -> Vec<Vec<u32>> {
    let of_text = length.saturating_sub(start.iter().len()).max(1);
    let pieces = texts.iter().flat_map(|text| text.tokens.chunks(of_text));
    pieces.map(|tokens| start.iter().chain(tokens).copied().collect()).collect()
}

/// Takes the end of each text away, at most so many tokens, and makes windows of all of them, and of a quarter of each.
fn hold_out(texts: &mut [Encoded], most: usize, start: Option<u32>) -> Result<[Windows; 2]> {
    let shortest = texts.iter().map(|text| text.tokens.len()).min().unwrap_or(0);
    let length = most.min(shortest / 4);
    let parts = [length, length / 4];
    let mut held_out = parts.map(|_| Encoded { tokens: vec![], spans: vec![] });
    for text in &mut *texts {
        let rest = text.tokens.len() - length;
        for (part, held_out) in parts.into_iter().zip(&mut held_out) {
            held_out.tokens.extend(&text.tokens[rest..rest + part]);
            held_out.spans.extend_from_slice(&text.spans[rest..rest + part]);
        }
        text.tokens.truncate(rest);
        text.spans.truncate(rest);
    }
    let [whole, part] = &held_out;
    Ok([Windows::new(whole, texts.len(), length, start)?, Windows::new(part, texts.len(), length / 4, start)?])
}

fn go_on() -> ControlFlow<()> {
    if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// None if interrupted.
fn measure(language: &Language, pieces: &[Vec<u32>], origin: Origin) -> Result<Option<Calibration>> {
    let bar = output::progress("calibrating", pieces.iter().map(Vec::len).sum())?;
    let calibration = Calibration::measure(&language.model, pieces, origin, |done| {
        bar.set_position(done as u64);
        go_on()
    })?;
    bar.finish_and_clear();
    Ok(calibration)
}

/// None if interrupted.
fn run_search(search: &Search) -> Result<Option<Vec<Tried>>> {
    let bar = output::progress("looking for bits", 2 * search.calibration.layers())?;
    let tried = search.run(|done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        go_on()
    })?;
    bar.finish_and_clear();
    Ok(tried)
}
