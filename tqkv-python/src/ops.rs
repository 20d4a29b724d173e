//! The operations.

use crate::array::{Arg, empty_like};
use crate::device::{Device, one_codec, torch_uses_gpus};
use crate::error::{OrRaise, raise};
use crate::pool::{Batch, PagePool, integers};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ops::Range;
use tqkv::format::RowFormat;
use tqkv::ops::{self, AttentionParams, Direction, Domain, Positions, RowOrder};
use tqkv::{Buffer, CommandEncoder, DType};

/// Records and submits operations without the GIL; waits where results must be copied to the host.
pub fn run(
    py: Python<'_>,
    device: &Device,
    outputs: &[&Arg],
    record: impl FnOnce(&mut CommandEncoder) -> tqkv::Result<()> + Send,
) -> PyResult<()> {
    device.run(py, || {
        let mut encoder = device.encoder()?;
        record(&mut encoder)?;
        let submission = encoder.submit()?;
        if outputs.iter().any(|o| o.is_copied()) {
            submission.wait()?;
        }
        outputs.iter().try_for_each(|o| o.finish())
    })
}

/// Encodes the new positions of every sequence: each part is an array [tokens, kv_heads, head_dim], the sequences' tokens one
/// after the other, and the pool that takes it.
///
/// Raises :class:`ShapeError`, :class:`DTypeError`, :class:`PageError`, :class:`MismatchError`, :class:`AliasedError`.
#[pyfunction]
pub fn quantize(py: Python<'_>, batch: &Batch, parts: Vec<(Bound<'_, PyAny>, PyRef<'_, PagePool>)>) -> PyResult<()> {
    let xs = parts.iter().map(|(x, _)| Arg::input("x", x, &batch.device)).collect::<PyResult<Vec<_>>>()?;
    let pools: Vec<_> = parts.iter().map(|(_, pool)| pool.pool.clone()).collect();
    let pairs: Vec<(&Buffer, &ops::PagePool)> = xs.iter().map(|x| &x.buffer).zip(&pools).collect();
    let batch_of = &batch.now();
    run(py, &batch.device, &[], |encoder| ops::quantize(encoder, &pairs, batch_of))
}

/// Encodes vectors into slots: each part is an array [tokens, kv_heads, head_dim] and the pool that takes it, token i of every part
/// in slot ``slots[i]``, which is page * page_size + row, or nowhere if it is -1. ``slots`` is int32 or int64, [tokens], and stays in the
/// device's memory: the host reads nothing of it. A slot that no pool has is not written; ``out_of_range``, int32 [1], is
/// increased by one for each. No two tokens may name one slot.
///
/// Raises :class:`ZeroError` without parts, :class:`ShapeError`, :class:`DTypeError`, :class:`MismatchError`, :class:`AliasedError`,
/// :class:`UnsupportedError` on wgpu.
#[pyfunction]
#[pyo3(signature = (parts, slots, *, out_of_range = None))]
pub fn quantize_at(
    py: Python<'_>,
    parts: Vec<(Bound<'_, PyAny>, PyRef<'_, PagePool>)>,
    slots: &Bound<'_, PyAny>,
    out_of_range: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let Some((_, first)) = parts.first() else { return Err(raise(tqkv::Error::Zero { what: "parts" })) };
    let device = &first.device;
    let xs = parts.iter().map(|(x, _)| Arg::input("x", x, device)).collect::<PyResult<Vec<_>>>()?;
    let slots = Arg::input("slots", slots, device)?;
    let count = out_of_range.map(|c| Arg::changed("out_of_range", c, device)).transpose()?;
    let pools: Vec<_> = parts.iter().map(|(_, pool)| pool.pool.clone()).collect();
    let pairs: Vec<(&Buffer, &ops::PagePool)> = xs.iter().map(|x| &x.buffer).zip(&pools).collect();
    let outputs: Vec<&Arg> = count.iter().collect();
    run(py, device, &outputs, |encoder| {
        ops::quantize_at(encoder, &pairs, &slots.buffer, count.as_ref().map(|c| &c.buffer))
    })
}

/// Reads the page tables, and lengths, that a batch on the device stands for, and plans for them, on the device: once a step, before all
/// operations of all layers, in the same graph or before its replay. For other batches it does nothing.
#[pyfunction]
pub fn refresh(py: Python<'_>, batch: &Batch) -> PyResult<()> {
    let of = &batch.now();
    run(py, &batch.device, &[], |encoder| ops::refresh(encoder, of))
}

/// What every `attend` is asked for by keywords.
pub struct Asked<'py> {
    pub scale: Option<f32>,
    pub causal: bool,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    pub sink_logits: Option<Bound<'py, PyAny>>,
    pub domain: String,
    pub out: Option<Bound<'py, PyAny>>,
    pub lse: bool,
}

/// What attention is recorded with.
pub struct Attended<'a> {
    pub q: &'a Buffer,
    pub params: &'a AttentionParams,
    pub out: &'a Buffer,
    pub lse: Option<&'a Buffer>,
}

impl<'py> Asked<'py> {
    /// Runs what `record` records of these queries. Gives `out`, new or given, or a pair of it and the log-sum-exps.
    pub fn run(
        self,
        q: &Bound<'py, PyAny>,
        device: &Device,
        record: impl FnOnce(&mut CommandEncoder, Attended) -> tqkv::Result<()> + Send,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = q.py();
        let input = |what, x: &Bound<'py, PyAny>| Arg::input(what, x, device);
        let (queries, sinks) = (input("q", q)?, self.sink_logits.map(|s| input("sink_logits", &s)).transpose()?);
        let head_dim = queries.buffer.shape().last().map_or(1, |&n| n.max(1));
        let mut params = self.scale.map_or_else(|| AttentionParams::for_head_dim(head_dim), AttentionParams::new);
        (params.causal, params.window, params.softcap) = (self.causal, self.window, self.softcap);
        params.sink_logits = sinks.as_ref().map(|s| s.buffer.clone());
        params.domain = domain(&self.domain)?;

        let outputs = Outputs::new(q, queries.buffer.shape(), self.out, self.lse, device)?;
        run(py, device, &outputs.args(), |encoder| {
            let lse = outputs.lse_arg.as_ref().map(|l| &l.buffer);
            record(encoder, Attended { q: &queries.buffer, params: &params, out: &outputs.out_arg.buffer, lse })
        })?;
        outputs.into_python(py)
    }
}

/// The output of attention, new or given, and its log-sum-exps if they are asked for.
struct Outputs<'py> {
    out: Bound<'py, PyAny>,
    lse: Option<Bound<'py, PyAny>>,
    out_arg: Arg,
    lse_arg: Option<Arg>,
}

impl<'py> Outputs<'py> {
    fn new(
        q: &Bound<'py, PyAny>,
        shape: &[usize],
        out: Option<Bound<'py, PyAny>>,
        lse: bool,
        device: &Device,
    ) -> PyResult<Self> {
        let out = out.map_or_else(|| empty_like(q, shape, None), Ok)?;
        let rows = &shape[..shape.len().saturating_sub(1)];
        let lse = lse.then(|| empty_like(q, rows, Some(DType::F32))).transpose()?;
        let out_arg = Arg::output("out", &out, device)?;
        let lse_arg = lse.as_ref().map(|l| Arg::output("lse", l, device)).transpose()?;
        Ok(Outputs { out, lse, out_arg, lse_arg })
    }

    fn args(&self) -> Vec<&Arg> {
        std::iter::once(&self.out_arg).chain(&self.lse_arg).collect()
    }

    /// `out`, or `(out, lse)`.
    fn into_python(self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.lse {
            Some(lse) => Ok((self.out, lse).into_pyobject(py)?.into_any()),
            None => Ok(self.out),
        }
    }
}

pub fn domain(name: &str) -> PyResult<Domain> {
    match name {
        "original" => Ok(Domain::Original),
        "rotated" => Ok(Domain::Rotated),
        _ => Err(PyValueError::new_err(format!("domain is {name:?}: expected 'original' or 'rotated'"))),
    }
}

pub fn order(name: &str) -> PyResult<RowOrder> {
    match name {
        "token" => Ok(RowOrder::TokenMajor),
        "head" => Ok(RowOrder::HeadMajor),
        _ => Err(PyValueError::new_err(format!("order is {name:?}: expected 'token' or 'head'"))),
    }
}

/// Softmax(scale · q·Kᵀ)·V for the new positions of every sequence. ``q`` is [tokens, heads, head_dim], ``heads`` a multiple of
/// the pools' kv_heads; ``scale`` 1/√head_dim if not given. Gives an array like ``q``, or ``out``; with ``lse`` a pair of it and
/// float32 [tokens, heads], the logarithms of the softmax denominators, for :func:`merge`.
///
/// Raises :class:`ShapeError`, :class:`DTypeError`, :class:`MismatchError`, :class:`PageError`, :class:`ParameterError`,
/// :class:`ZeroError`, :class:`AliasedError`.
#[pyfunction]
#[pyo3(signature = (q, key, value, batch, *, scale = None, causal = true, window = None, softcap = None,
    sink_logits = None, domain = "original".to_owned(), out = None, lse = false))]
#[allow(clippy::too_many_arguments)] // Each is a thing of its own.
pub fn attend<'py>(
    q: Bound<'py, PyAny>,
    key: &PagePool,
    value: &PagePool,
    batch: &Batch,
    scale: Option<f32>,
    causal: bool,
    window: Option<usize>,
    softcap: Option<f32>,
    sink_logits: Option<Bound<'py, PyAny>>,
    domain: String,
    out: Option<Bound<'py, PyAny>>,
    lse: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let asked = Asked { scale, causal, window, softcap, sink_logits, domain, out, lse };
    let (key, value, of) = (&key.pool, &value.pool, &batch.now());
    asked.run(&q, &batch.device, |encoder, a| ops::attention(encoder, a.q, key, value, of, a.params, a.out, a.lse))
}

/// Which positions: all that are held, a range, or a list.
pub fn positions(object: Option<&Bound<'_, PyAny>>, held: Range<usize>) -> PyResult<Positions> {
    let Some(object) = object else { return Ok(Positions::Range(held)) };
    if object.get_type().name()? == "range" && object.getattr("step")?.extract::<i64>()? == 1 {
        return Ok(Positions::Range(object.getattr("start")?.extract()?..object.getattr("stop")?.extract()?));
    }
    let list = integers("positions", object)?;
    let list = list.into_iter().map(|p| u32::try_from(p).map_err(|_| PyValueError::new_err(format!("position {p}"))));
    Ok(Positions::List(list.collect::<PyResult<_>>()?))
}

/// A new or given array for decoded rows.
pub fn decoded<'py>(
    py: Python<'py>,
    device: &Device,
    given: Option<Bound<'py, PyAny>>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    if let Some(out) = given {
        return Ok(out);
    }
    let kwargs = PyDict::new(py);
    let library = match device.cuda() {
        Some(ordinal) if torch_uses_gpus(py)? => {
            kwargs.set_item("device", format!("cuda:{ordinal}"))?;
            py.import("torch")?
        }
        _ => py.import("numpy")?,
    };
    kwargs.set_item("dtype", library.getattr("float32")?)?;
    library.call_method("empty", (shape.to_vec(),), Some(&kwargs))
}

/// Decodes positions of one sequence of a batch: [positions, kv_heads, head_dim] float32, [kv_heads, positions, head_dim] by
/// ``order="head"``, or into ``out``, any float. It is numpy's; torch's on an NVIDIA GPU once torch uses one.
///
/// Raises :class:`PositionsError` for positions that are not held, :class:`MismatchError`, :class:`ShapeError`.
#[pyfunction]
#[pyo3(signature = (pool, batch, sequence, positions, *, domain = "original", order = "token", out = None))]
#[allow(clippy::too_many_arguments)] // Each is a thing of its own.
pub fn dequantize<'py>(
    py: Python<'py>,
    pool: &PagePool,
    batch: &Batch,
    sequence: usize,
    positions: &Bound<'py, PyAny>,
    domain: &str,
    order: &str,
    out: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (device, order) = (&batch.device, self::order(order)?);
    let (positions, domain) = (self::positions(Some(positions), 0..0)?, self::domain(domain)?);
    let row = pool.pool.row();
    let dim = if domain == Domain::Original { row.head_dim() } else { row.row_dim() };
    let (n, heads) = (positions.len(), pool.pool.kv_heads());
    let shape = if order == RowOrder::TokenMajor { [n, heads, dim] } else { [heads, n, dim] };
    let out = decoded(py, device, out, &shape)?;
    let arg = Arg::output("out", &out, device)?;
    let of = &batch.now();
    run(py, device, &[&arg], |e| ops::dequantize(e, &pool.pool, of, sequence, positions, domain, order, &arg.buffer))?;
    Ok(out)
}

/// Joins attention over disjoint sets of positions: parts are pairs (out, lse) of :func:`attend`.
///
/// Raises :class:`ZeroError` without parts, :class:`ShapeError`, :class:`DTypeError`.
#[pyfunction]
#[pyo3(signature = (parts, *, device = None, out = None, lse = false))]
pub fn merge<'py>(
    py: Python<'py>,
    parts: Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    device: Option<&Device>,
    out: Option<Bound<'py, PyAny>>,
    lse: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let device = device.cloned().unwrap_or_else(Device::of_the_host);
    let Some((first, _)) = parts.first() else { return Err(raise(tqkv::Error::Zero { what: "parts" })) };
    let arg = |(o, l): &(Bound<'py, PyAny>, Bound<'py, PyAny>)| {
        Ok((Arg::input("part", o, &device)?, Arg::input("lse of a part", l, &device)?))
    };
    let args = parts.iter().map(arg).collect::<PyResult<Vec<_>>>()?;
    let outputs = Outputs::new(first, args[0].0.buffer.shape(), out, lse, &device)?;
    run(py, &device, &outputs.args(), |encoder| {
        let parts: Vec<_> = args.iter().map(|(o, l)| (&o.buffer, &l.buffer)).collect();
        ops::merge(encoder, &parts, &outputs.out_arg.buffer, outputs.lse_arg.as_ref().map(|l| &l.buffer))
    })?;
    outputs.into_python(py)
}

/// Vectors [..., head_dim] into the domain in which a codec stores them, or back.
#[pyfunction]
#[pyo3(signature = (codec, head_dim, x, *, inverse = false, device = None))]
pub fn rotate<'py>(
    py: Python<'py>,
    codec: &str,
    head_dim: usize,
    x: Bound<'py, PyAny>,
    inverse: bool,
    device: Option<&Device>,
) -> PyResult<Bound<'py, PyAny>> {
    let device = device.cloned().unwrap_or_else(Device::of_the_host);
    let row = RowFormat::new(one_codec(codec)?, head_dim).or_raise()?;
    let arg = Arg::input("x", &x, &device)?;
    let mut shape = arg.buffer.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = if inverse { row.head_dim() } else { row.row_dim() };
    }
    let outputs = Outputs::new(&x, &shape, None, false, &device)?;
    let direction = if inverse { Direction::Inverse } else { Direction::Forward };
    run(py, &device, &outputs.args(), |encoder| {
        ops::rotate(encoder, &row, direction, &arg.buffer, &outputs.out_arg.buffer)
    })?;
    outputs.into_python(py)
}
