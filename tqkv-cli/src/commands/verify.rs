//! `tqkv verify`

use crate::output;
use anyhow::{Context, Result, anyhow, bail};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tqkv::compute::DeviceKind;
use tqkv::format::RowFormat;
use tqkv::ops::{
    AttentionParams, Batch, Direction, Domain, PagePool, RowOrder, attention, dequantize, quantize, rotate,
};
use tqkv::{Buffer, Codec, CommandEncoder, Device};

/// Checks a device against golden vectors: one line a case with its largest error.
///
/// Decoded values must be bit-exact, codes equal unless the element is within 1e-5 of a decision boundary, everything
/// else close relative to the vector's norm. The exit status is 1 if a case fails.
#[derive(clap::Args)]
pub struct Verify {
    /// Directory of golden files: tables.safetensors and d{D}_b{bits}.safetensors
    #[arg(long, value_name = "DIR")]
    golden: PathBuf,
    /// Device: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    device: String,
    /// Print one JSON object a case
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Case {
    file: String,
    case: String,
    max_error: f64,
    ok: bool,
}

impl Verify {
    pub fn run(self) -> Result<ExitCode> {
        let device = Device::open(&self.device)?;
        let entries =
            std::fs::read_dir(&self.golden).with_context(|| format!("cannot read {}", self.golden.display()))?;
        let mut paths = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
        paths.sort();
        if paths.is_empty() {
            bail!("{} holds no golden files: expected *.safetensors", self.golden.display());
        }
        let (mut failed, mut total) = (0, 0);
        for path in &paths {
            for (case, max_error, ok) in check(path, &device).with_context(|| path.display().to_string())? {
                let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                total += 1;
                failed += usize::from(!ok);
                let case = Case { file, case, max_error, ok };
                if self.json {
                    output::print_json(&case)?;
                } else {
                    let verdict = if case.ok { "ok  " } else { "FAIL" };
                    output::print(&format!("{verdict} {} {}: {:.1e}\n", case.file, case.case, case.max_error))?;
                }
            }
        }
        if !self.json {
            output::print(&format!("{total} cases on {device}, {failed} failed\n"))?;
        }
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// A case's name, its largest error, and whether that is within the tolerance.
type Checked = (String, f64, bool);

fn check(path: &Path, device: &Device) -> Result<Vec<Checked>> {
    let bytes = std::fs::read(path)?;
    let golden = Golden(SafeTensors::deserialize(&bytes)?);
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    if name == "tables" {
        return check_tables(&golden);
    }
    let bits = name
        .strip_prefix('d')
        .and_then(|n| n.split_once("_b"))
        .and_then(|(d, bits)| Some((d.parse::<usize>().ok()?, bits.parse().ok()?)));
    let Some((head_dim, bits)) = bits else {
        bail!("the name is {name:?}, expected \"tables\" or d{{D}}_b{{bits}}");
    };
    let row = RowFormat::new(Codec::seed(bits), head_dim)?;
    let mut checked = Vec::new();
    for side in ["k", "v"] {
        check_side(&golden, device, row, side, &mut checked)?;
    }
    check_attention(&golden, device, row, &mut checked)?;
    Ok(checked)
}

/// The constants of the seed codec.
fn check_tables(golden: &Golden) -> Result<Vec<Checked>> {
    let mut checked = Vec::new();
    for bits in [2, 3, 4, 5, 6, 8] {
        let name = format!("codebook.{bits}");
        let expected = golden.f32(&name, &[1 << bits])?;
        let row = RowFormat::new(Codec::seed(bits), 128)?;
        let got = row.codebook().map_or(&[][..], |book| &book.levels);
        checked.push(exact(name, got, &expected));
    }
    for head_dim in [256, 512] {
        let name = format!("signs.{head_dim}");
        let expected = golden.u8(&name, &[head_dim / 8])?;
        let words = RowFormat::new(Codec::seed(4), head_dim)?.signs();
        let differ = expected.iter().zip(words.iter().flat_map(|w| w.to_le_bytes())).filter(|(e, g)| *e != g).count();
        checked.push((name, differ as f64, differ == 0));
    }
    Ok(checked)
}

/// Rotation, encoding and decoding of K or V.
fn check_side(golden: &Golden, device: &Device, row: RowFormat, side: &str, checked: &mut Vec<Checked>) -> Result<()> {
    let head_dim = row.head_dim();
    let name = |what: &str| format!("{side}.{what}");
    let (kv_heads, positions) = golden.geometry(&name("input"), head_dim)?;
    let shape = [kv_heads, positions, head_dim];
    let vectors = |what: &str| golden.f32(&name(what), &shape);
    let input = vectors("input")?;

    let x = device.upload(&input, &shape)?;
    let out = poisoned(device, &shape)?;
    run(device, |encoder| rotate(encoder, &row, Direction::Forward, &x, &out))?;
    checked.push(relative(name("rotated"), &out.read()?, &vectors("rotated")?, head_dim, 1e-6));

    // Encoding takes [positions, kv_heads, D].
    let mut tokens = Vec::with_capacity(input.len());
    for i in 0..positions * kv_heads {
        let (position, head) = (i / kv_heads, i % kv_heads);
        tokens.extend_from_slice(&input[(head * positions + position) * head_dim..][..head_dim]);
    }
    let tokens = device.upload(&tokens, &[positions, kv_heads, head_dim])?;
    let pool = PagePool::new(device, row, kv_heads, positions, 1)?;
    let batch = Batch::contiguous(device, positions, 0, positions, positions)?;
    run(device, |encoder| quantize(encoder, &[(&tokens, &pool)], &batch))?;
    let (codes, margins) = (golden.u8(&name("codes"), &shape)?, vectors("margin")?);
    let packed = pool.codes().read::<u8>()?;
    let got = packed.chunks_exact(row.row_bytes()).flat_map(|r| (0..head_dim).map(move |i| row.get_code(r, i)));
    let wrong = got
        .zip(&codes)
        .zip(&margins)
        .filter(|((got, expected), _)| *got != u16::from(**expected))
        .map(|(_, margin)| *margin);
    // How far from a boundary a code was wrong.
    let margin = f64::from(wrong.fold(0.0, f32::max));
    checked.push((name("codes"), margin, margin < 1e-5));
    let norms_shape = [kv_heads, positions, row.scales_per_row()];
    let norms = golden.f32(&name("norms"), &norms_shape)?;
    let got = pool.scales().ok_or_else(|| anyhow!("the seed codec has no scales"))?.read::<f32>()?;
    checked.push(relative(name("norms"), &got, &norms, 1, 1e-6));

    // Decoding starts from the golden codes, so that it is judged by itself.
    let pool = golden.pool(device, row, side, kv_heads, positions)?;
    let batch = Batch::contiguous(device, positions, 0, positions, 0)?;
    let decode = |domain| {
        let out = poisoned(device, &shape)?;
        run(device, |e| dequantize(e, &pool, &batch, 0, 0..positions, domain, RowOrder::HeadMajor, &out))?;
        Ok::<_, anyhow::Error>(out.read::<f32>()?)
    };
    checked.push(exact(name("dequantized"), &decode(Domain::Rotated)?, &vectors("dequantized")?));
    // A transform of D terms rounds log2(D) ≤ 9 times by half a step of 2^-24, the golden one too.
    checked.push(relative(name("restored"), &decode(Domain::Original)?, &vectors("restored")?, head_dim, 1e-6));
    Ok(())
}

fn check_attention(golden: &Golden, device: &Device, row: RowFormat, checked: &mut Vec<Checked>) -> Result<()> {
    // GPUs sum in f32; the scores of the golden vectors' huge key are computed with more bits everywhere.
    let tolerance = if device.info().kind == DeviceKind::Cpu { 1e-5 } else { 2e-5 };
    let head_dim = row.head_dim();
    let (kv_heads, positions) = golden.geometry("k.input", head_dim)?;
    let (key, value) =
        (golden.pool(device, row, "k", kv_heads, positions)?, golden.pool(device, row, "v", kv_heads, positions)?);
    let heads = golden.shape("q.rotated")?.first().copied().unwrap_or(0);
    let q = device.upload(&golden.f32("q.rotated", &[heads, head_dim])?, &[1, heads, head_dim])?;
    let sinks = device.upload(&golden.f32("attn.sinks.logits", &[heads])?, &[heads])?;
    let mut plain = AttentionParams::new(golden.f32("attn.scale", &[1])?[0]);
    plain.domain = Domain::Rotated;
    let batch = |first, len| Batch::contiguous(device, positions, first, len, 1);
    let full = batch(0, positions)?;
    let cases = [
        ("full", full.clone(), plain.clone()),
        ("len9", batch(0, 9)?, plain.clone()),
        ("window5", full.clone(), AttentionParams { window: Some(5), ..plain.clone() }),
        ("softcap20", full.clone(), AttentionParams { softcap: Some(20.0), ..plain.clone() }),
        ("sinks", full.clone(), AttentionParams { sink_logits: Some(sinks), ..plain.clone() }),
        // A full ring whose oldest position is in slot 4.
        ("ring4_window7", batch(4, positions + 4)?, AttentionParams { window: Some(7), ..plain.clone() }),
    ];
    for (case, batch, params) in cases {
        let out = poisoned(device, &[1, heads, head_dim])?;
        let lse = poisoned(device, &[1, heads])?;
        run(device, |encoder| attention(encoder, &q, &key, &value, &batch, &params, &out, Some(&lse)))?;
        let expected = golden.f32(&format!("attn.{case}.out"), &[heads, head_dim])?;
        checked.push(relative(format!("attn.{case}.out"), &out.read()?, &expected, head_dim, tolerance));
        let expected = golden.f32(&format!("attn.{case}.lse"), &[heads])?;
        // A logarithm: absolute where it is small.
        let errors = lse.read::<f32>()?.into_iter().zip(expected);
        let error = largest(errors.map(|(got, e)| f64::from((got - e).abs() / e.abs().max(1.0))));
        checked.push((format!("attn.{case}.lse"), error, error <= tolerance));
    }
    Ok(())
}

/// The tensors of a golden file.
struct Golden<'a>(SafeTensors<'a>);

impl Golden<'_> {
    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.0.tensor(name)?.shape().to_vec())
    }

    /// KV heads and positions of a tensor of vectors.
    fn geometry(&self, name: &str, head_dim: usize) -> Result<(usize, usize)> {
        match self.shape(name)?[..] {
            [kv_heads, positions, d] if d == head_dim && kv_heads > 0 && positions >= 9 => Ok((kv_heads, positions)),
            ref got => bail!("{name} has shape {got:?}, expected [kv_heads, at least 9, {head_dim}]"),
        }
    }

    fn data(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Vec<u8>> {
        let tensor = self.0.tensor(name)?;
        if tensor.dtype() != dtype || tensor.shape() != shape {
            bail!("{name} is {:?} {:?}, expected {dtype:?} {shape:?}", tensor.dtype(), tensor.shape());
        }
        Ok(tensor.data().to_vec())
    }

    fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let data = self.data(name, Dtype::F32, shape)?;
        Ok(data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }

    fn u8(&self, name: &str, shape: &[usize]) -> Result<Vec<u8>> {
        self.data(name, Dtype::U8, shape)
    }

    /// A contiguous cache with the golden codes and norms.
    fn pool(&self, device: &Device, row: RowFormat, side: &str, kv_heads: usize, positions: usize) -> Result<PagePool> {
        let row_bytes = row.row_bytes();
        let name = if row_bytes == row.head_dim() { "codes" } else { "nibbles" };
        let codes = self.u8(&format!("{side}.{name}"), &[kv_heads, positions, row_bytes])?;
        let norms = self.f32(&format!("{side}.norms"), &[kv_heads, positions, row.scales_per_row()])?;
        let codes = device.upload(&codes, &[1, kv_heads, positions, row_bytes])?;
        let norms = device.upload(&norms, &[1, kv_heads, positions, row.scales_per_row()])?;
        Ok(PagePool::from_buffers(row, &codes, Some(&norms))?)
    }
}

/// A buffer of NaN, so that what is not written fails.
fn poisoned(device: &Device, shape: &[usize]) -> Result<Buffer> {
    Ok(device.upload(&vec![f32::NAN; shape.iter().product()], shape)?)
}

fn run(device: &Device, record: impl FnOnce(&mut CommandEncoder) -> tqkv::Result<()>) -> Result<()> {
    let mut encoder = device.encoder()?;
    record(&mut encoder)?;
    Ok(encoder.submit_and_wait()?)
}

/// The largest of some errors; NaN if one is.
fn largest(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |max, e| if e > max || e.is_nan() { e } else { max })
}

fn exact(case: String, got: &[f32], expected: &[f32]) -> Checked {
    let same = got.len() == expected.len() && got.iter().zip(expected).all(|(g, e)| g.to_bits() == e.to_bits());
    (case, largest(got.iter().zip(expected).map(|(g, e)| f64::from((g - e).abs()))), same)
}

/// Errors relative to the norm of each vector of `size` elements.
fn relative(case: String, got: &[f32], expected: &[f32], size: usize, tolerance: f64) -> Checked {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let errors = got.chunks(size).zip(expected.chunks(size)).map(|(got, expected)| {
        let error = norm(&mut got.iter().zip(expected).map(|(&g, &e)| f64::from(g) - f64::from(e)));
        // A vector may be zero: then so must the result be.
        if error <= 1e-30 { 0.0 } else { error / norm(&mut expected.iter().map(|&e| e.into())) }
    });
    let error = largest(errors);
    (case, error, error <= tolerance)
}
