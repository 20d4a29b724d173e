//! Devices, codecs, pools, batches, and the operations on them.

use crate::array::{Arg, Array, empty_like};
use crate::error::{OrRaise, raise};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use tqkv::cache::CacheCodec;
use tqkv::compute::DeviceKind;
use tqkv::format::RowFormat;
use tqkv::ops::{self, AttentionParams, Direction, Domain, NO_PAGE, Positions, RowOrder, Span, Strides};
use tqkv::{Buffer, Codec, CodecPair, CommandEncoder, DType};

/// A place that holds memory and runs operations.
#[pyclass(frozen, module = "tqkv", name = "Device")]
pub struct Device(pub tqkv::Device);

#[pymethods]
impl Device {
    #[new]
    #[pyo3(signature = (name = "cpu"))]
    fn new(py: Python<'_>, name: &str) -> PyResult<Self> {
        py.detach(|| tqkv::Device::open(name)).or_raise().map(Device)
    }

    #[staticmethod]
    #[pyo3(signature = (threads = None))]
    fn cpu(threads: Option<usize>) -> PyResult<Self> {
        Ok(Device(match threads {
            Some(n) => tqkv::Device::cpu_with_threads(n).or_raise()?,
            None => tqkv::Device::cpu(),
        }))
    }

    #[staticmethod]
    #[pyo3(signature = (ordinal = 0, stream = 0))]
    fn cuda_on_stream(py: Python<'_>, ordinal: usize, stream: usize) -> PyResult<Self> {
        py.detach(|| on_stream(ordinal, stream)).or_raise().map(Device)
    }

    #[staticmethod]
    fn best(py: Python<'_>) -> Self {
        Device(py.detach(tqkv::Device::best))
    }

    #[staticmethod]
    fn list(py: Python<'_>) -> Vec<(Option<String>, String)> {
        let described = |d: tqkv::Result<tqkv::compute::DeviceInfo>| match d {
            Ok(info) => (Some(info.id), info.name),
            Err(reason) => (None, reason.to_string()),
        };
        py.detach(|| tqkv::Device::list().into_iter().map(described).collect())
    }

    #[getter]
    fn kind(&self) -> &'static str {
        match self.0.info().kind {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Wgpu => "wgpu",
            DeviceKind::Cuda => "cuda",
            _ => "other",
        }
    }

    #[getter]
    fn name(&self) -> String {
        self.0.info().name
    }

    #[getter]
    fn details(&self) -> BTreeMap<&'static str, String> {
        self.0.info().details.into_iter().collect()
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("tqkv.Device({:?})", self.0.to_string())
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

#[cfg(feature = "cuda")]
fn on_stream(ordinal: usize, stream: usize) -> tqkv::Result<tqkv::Device> {
    // SAFETY: the stub asks for a stream that outlives the device.
    unsafe { tqkv::Device::cuda_on_stream(ordinal, stream as *mut std::ffi::c_void) }
}

#[cfg(not(feature = "cuda"))]
fn on_stream(ordinal: usize, _stream: usize) -> tqkv::Result<tqkv::Device> {
    let (device, reason) = (format!("cuda:{ordinal}"), "this build has no such backend".to_owned());
    Err(tqkv::Error::DeviceUnavailable { device, reason })
}

/// The codecs of keys and of values, and of what is kept a second time.
#[pyclass(frozen, eq, module = "tqkv", name = "Codec")]
#[derive(Clone, PartialEq)]
pub struct PyCodec(pub CacheCodec);

/// The codec of one side: `tq2` to `tq8`, `seed4`, `f16`, `f32`.
pub fn one_codec(name: &str) -> PyResult<Codec> {
    let bits = |prefix: &str| name.strip_prefix(prefix).and_then(|b| b.parse::<u8>().ok());
    match (name, bits("tq"), bits("seed")) {
        ("f32", ..) => Ok(Codec::F32),
        ("f16", ..) => Ok(Codec::F16),
        (_, Some(bits), _) => Ok(Codec::tq(bits)),
        (_, _, Some(bits)) => Ok(Codec::seed(bits)),
        _ => Err(raise(tqkv::Error::UnknownCodec { got: name.to_owned() })),
    }
}

/// Of a `Codec` or a name: `k5v4`, `f16`, `k4v4+s1f16+r64k8v8`, or one for each side, `tq5/f16`.
pub fn codec(object: &Bound<'_, PyAny>) -> PyResult<CacheCodec> {
    if let Ok(codec) = object.cast::<PyCodec>() {
        return Ok(codec.get().0);
    }
    let name: String = object.extract()?;
    match name.split_once('/') {
        Some((key, value)) => Ok(CodecPair { key: one_codec(key)?, value: one_codec(value)? }.into()),
        None => name.parse().or_raise(),
    }
}

#[pymethods]
impl PyCodec {
    #[new]
    fn new(name: &Bound<'_, PyAny>) -> PyResult<Self> {
        codec(name).map(PyCodec)
    }

    #[getter]
    fn key(&self) -> String {
        self.0.all.key.to_string()
    }

    #[getter]
    fn value(&self) -> String {
        self.0.all.value.to_string()
    }

    #[getter]
    fn sinks(&self) -> usize {
        self.0.sinks.map_or(0, |sinks| sinks.positions)
    }

    #[getter]
    fn recent(&self) -> usize {
        self.0.recent.map_or(0, |recent| recent.positions)
    }

    fn bits_per_element(&self, head_dim: usize) -> PyResult<f64> {
        self.0.all.bits_per_element(head_dim).or_raise()
    }

    fn row_bytes(&self, head_dim: usize) -> PyResult<[(usize, usize); 2]> {
        let row = |codec| RowFormat::new(codec, head_dim).or_raise().map(|r| (r.row_bytes(), r.scale_bytes()));
        Ok([row(self.0.all.key)?, row(self.0.all.value)?])
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.to_string().hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self) -> String {
        format!("tqkv.Codec({:?})", self.0.to_string())
    }
}

/// Pages of compressed vectors.
#[pyclass(frozen, module = "tqkv", name = "PagePool")]
pub struct PagePool {
    pub pool: ops::PagePool,
    /// Arrays on a GPU that it lies in.
    _owners: Vec<Py<PyAny>>,
}

#[pymethods]
impl PagePool {
    #[new]
    fn new(
        device: &Device,
        codec: &str,
        head_dim: usize,
        kv_heads: usize,
        page_size: usize,
        pages: usize,
    ) -> PyResult<Self> {
        let row = RowFormat::new(one_codec(codec)?, head_dim).or_raise()?;
        let pool = ops::PagePool::new(&device.0, row, kv_heads, page_size, pages).or_raise()?;
        Ok(PagePool { pool, _owners: vec![] })
    }

    #[staticmethod]
    #[pyo3(signature = (device, codec, head_dim, codes, scales = None))]
    fn from_arrays(
        device: &Device,
        codec: &str,
        head_dim: usize,
        codes: &Bound<'_, PyAny>,
        scales: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let row = RowFormat::new(one_codec(codec)?, head_dim).or_raise()?;
        let (codes, owner) = (Array::new("codes", codes)?, codes.clone().unbind());
        let (shape, code_strides) = rows_of("codes", &codes, row.row_bytes())?;
        let code_bytes = codes.span(&device.0)?;
        let mut owners = vec![owner];
        let scales = match scales {
            None => None,
            Some(object) => {
                owners.push(object.clone().unbind());
                let scales = Array::new("scales", object)?;
                let (own, strides) = rows_of("scales", &scales, row.scale_bytes())?;
                if own != shape {
                    let (got, expected) = (scales.shape.clone(), format!("{shape:?} and a row's scales"));
                    return Err(raise(tqkv::Error::Shape { what: "scales", got, expected }));
                }
                Some((scales.span(&device.0)?, strides))
            }
        };
        let scales = scales.as_ref().map(|(buffer, strides)| (buffer, *strides));
        let pool = ops::PagePool::strided(row, shape, (&code_bytes, code_strides), scales).or_raise()?;
        Ok(PagePool { pool, _owners: owners })
    }

    #[getter]
    fn codec(&self) -> String {
        self.pool.row().codec().to_string()
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.pool.row().head_dim()
    }

    #[getter]
    fn kv_heads(&self) -> usize {
        self.pool.kv_heads()
    }

    #[getter]
    fn page_size(&self) -> usize {
        self.pool.page_size()
    }

    #[getter]
    fn pages(&self) -> usize {
        self.pool.pages()
    }

    #[getter]
    fn row_bytes(&self) -> usize {
        self.pool.row().row_bytes()
    }

    #[getter]
    fn scale_bytes(&self) -> usize {
        self.pool.row().scale_bytes()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.pool.bytes()
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.pool.overlaps(&other.pool)
    }
}

/// Pages, heads and positions of an array of rows, and its strides.
fn rows_of(what: &'static str, array: &Array, row_bytes: usize) -> PyResult<([usize; 3], Strides)> {
    let fails = |expected: String| raise(tqkv::Error::Shape { what, got: array.shape.clone(), expected });
    let (&[pages, heads, slots, n], &[page, head, row, step]) = (&array.shape[..], &array.strides[..]) else {
        return Err(fails("[pages, kv_heads, page_size, elements of a row]".to_owned()));
    };
    if n * array.dtype.size() != row_bytes {
        return Err(fails(format!("[.., .., .., {}]", row_bytes / array.dtype.size())));
    }
    if n > 1 && step != array.dtype.size() {
        return Err(PyValueError::new_err(format!(
            "{what} has gaps within rows: expected a last axis without strides"
        )));
    }
    Ok(([pages, heads, slots], Strides { page, head, row }))
}

/// Some sequences, validated: the plan that every layer of a step shares.
#[pyclass(frozen, module = "tqkv", name = "Batch")]
pub struct Batch {
    pub batch: ops::Batch,
    device: tqkv::Device,
}

/// Integers of a list or an array.
fn integers(what: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    let list = if object.hasattr("tolist")? { object.call_method0("tolist")? } else { object.clone() };
    list.extract().map_err(|_| PyTypeError::new_err(format!("{what} is no list of integers")))
}

fn count(what: &str, n: i64) -> PyResult<usize> {
    usize::try_from(n).map_err(|_| PyValueError::new_err(format!("{what} is {n}: expected no negative number")))
}

#[pymethods]
impl Batch {
    #[new]
    #[pyo3(signature = (device, page_size, lens, new, pages, first = None))]
    fn new(
        device: &Device,
        page_size: usize,
        lens: &Bound<'_, PyAny>,
        new: &Bound<'_, PyAny>,
        pages: &Bound<'_, PyAny>,
        first: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (lens, new) = (integers("lens", lens)?, integers("new", new)?);
        let first = first.map(|f| integers("first", f)).transpose()?.unwrap_or_else(|| vec![0; lens.len()]);
        let tables = if pages.hasattr("tolist")? { pages.call_method0("tolist")? } else { pages.clone() };
        let tables: Vec<Vec<i64>> =
            tables.extract().map_err(|_| PyTypeError::new_err("pages is no list of lists of integers"))?;
        if [new.len(), first.len(), tables.len()].iter().any(|n| *n != lens.len()) {
            let message = format!(
                "lens, new, first and pages are of {}, {}, {} and {} sequences: expected as many of each",
                lens.len(),
                new.len(),
                first.len(),
                tables.len()
            );
            return Err(PyValueError::new_err(message));
        }
        let tables: Vec<Vec<u32>> =
            tables.iter().map(|t| t.iter().map(|&p| u32::try_from(p).unwrap_or(NO_PAGE)).collect()).collect();
        let mut spans = Vec::with_capacity(lens.len());
        for (i, pages) in tables.iter().enumerate() {
            let (first, len, new) = (count("first", first[i])?, count("a length", lens[i])?, count("new", new[i])?);
            spans.push(Span { first, len, new, pages });
        }
        let batch = ops::Batch::new(&device.0, page_size, &spans).or_raise()?;
        Ok(Batch { batch, device: device.0.clone() })
    }

    #[staticmethod]
    #[pyo3(signature = (device, capacity, len, new, first = 0))]
    fn contiguous(device: &Device, capacity: usize, len: usize, new: usize, first: usize) -> PyResult<Self> {
        let batch = ops::Batch::contiguous(&device.0, capacity, first, len, new).or_raise()?;
        Ok(Batch { batch, device: device.0.clone() })
    }

    #[getter]
    fn sequences(&self) -> usize {
        self.batch.sequences()
    }

    #[getter]
    fn tokens(&self) -> usize {
        self.batch.tokens()
    }

    #[getter]
    fn page_size(&self) -> usize {
        self.batch.page_size()
    }
}

/// Records and submits operations without the GIL; waits where results must be copied to the host.
pub fn run(
    py: Python<'_>,
    device: &tqkv::Device,
    outputs: &[&Arg],
    record: impl FnOnce(&mut CommandEncoder) -> tqkv::Result<()> + Send,
) -> PyResult<()> {
    py.detach(|| {
        let mut encoder = device.encoder()?;
        record(&mut encoder)?;
        let submission = encoder.submit()?;
        if outputs.iter().any(|o| o.is_copied()) {
            submission.wait()?;
        }
        outputs.iter().try_for_each(|o| o.finish())
    })
    .or_raise()
}

/// Encodes new positions of a batch into pools.
#[pyfunction]
pub fn quantize(py: Python<'_>, batch: &Batch, parts: Vec<(Bound<'_, PyAny>, PyRef<'_, PagePool>)>) -> PyResult<()> {
    let xs = parts.iter().map(|(x, _)| Arg::input("x", x, &batch.device)).collect::<PyResult<Vec<_>>>()?;
    let pools: Vec<_> = parts.iter().map(|(_, pool)| pool.pool.clone()).collect();
    let pairs: Vec<(&Buffer, &ops::PagePool)> = xs.iter().map(|x| &x.buffer).zip(&pools).collect();
    let batch_of = &batch.batch;
    run(py, &batch.device, &[], |encoder| ops::quantize(encoder, &pairs, batch_of))
}

/// How attention is asked for.
pub struct Asked<'py> {
    pub scale: Option<f32>,
    pub causal: bool,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    pub sink_logits: Option<Bound<'py, PyAny>>,
    pub domain: String,
}

impl Asked<'_> {
    /// The parameters, and what keeps the sinks alive.
    pub fn params(&self, device: &tqkv::Device, head_dim: usize) -> PyResult<(AttentionParams, Option<Arg>)> {
        let sinks = self.sink_logits.as_ref().map(|s| Arg::input("sink_logits", s, device)).transpose()?;
        let mut params = match self.scale {
            Some(scale) => AttentionParams::new(scale),
            None => AttentionParams::for_head_dim(head_dim),
        };
        (params.causal, params.window, params.softcap) = (self.causal, self.window, self.softcap);
        params.sink_logits = sinks.as_ref().map(|s| s.buffer.clone());
        params.domain = domain(&self.domain)?;
        Ok((params, sinks))
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

/// The output of attention, new or given, and its log-sum-exps if they are asked for.
pub struct Outputs<'py> {
    out: Bound<'py, PyAny>,
    lse: Option<Bound<'py, PyAny>>,
    pub out_arg: Arg,
    pub lse_arg: Option<Arg>,
}

impl<'py> Outputs<'py> {
    pub fn new(
        q: &Bound<'py, PyAny>,
        shape: &[usize],
        out: Option<Bound<'py, PyAny>>,
        lse: bool,
        device: &tqkv::Device,
    ) -> PyResult<Self> {
        let out = out.map_or_else(|| empty_like(q, shape, None), Ok)?;
        let rows = &shape[..shape.len().saturating_sub(1)];
        let lse = lse.then(|| empty_like(q, rows, Some(DType::F32))).transpose()?;
        let out_arg = Arg::output("out", &out, device)?;
        let lse_arg = lse.as_ref().map(|l| Arg::output("lse", l, device)).transpose()?;
        Ok(Outputs { out, lse, out_arg, lse_arg })
    }

    pub fn args(&self) -> Vec<&Arg> {
        std::iter::once(&self.out_arg).chain(&self.lse_arg).collect()
    }

    /// `out`, or `(out, lse)`.
    pub fn into_python(self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.lse {
            Some(lse) => Ok((self.out, lse).into_pyobject(py)?.into_any()),
            None => Ok(self.out),
        }
    }
}

/// Attention over pools.
#[pyfunction]
#[pyo3(signature = (q, key, value, batch, *, scale = None, causal = true, window = None, softcap = None,
    sink_logits = None, domain = "original".to_owned(), out = None, lse = false))]
#[allow(clippy::too_many_arguments)] // Each is a thing of its own.
pub fn attend<'py>(
    py: Python<'py>,
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
    let device = &batch.device;
    let asked = Asked { scale, causal, window, softcap, sink_logits, domain };
    let (params, _sinks) = asked.params(device, key.pool.row().head_dim())?;
    let arg = Arg::input("q", &q, device)?;
    let outputs = Outputs::new(&q, arg.buffer.shape(), out, lse, device)?;
    let (key, value, of) = (&key.pool, &value.pool, &batch.batch);
    run(py, device, &outputs.args(), |encoder| {
        let lse = outputs.lse_arg.as_ref().map(|l| &l.buffer);
        ops::attention(encoder, &arg.buffer, key, value, of, &params, &outputs.out_arg.buffer, lse)
    })?;
    outputs.into_python(py)
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
pub fn decoded<'py>(py: Python<'py>, like: Option<Bound<'py, PyAny>>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
    match like {
        Some(out) => Ok(out),
        None => {
            let kwargs = PyDict::new(py);
            kwargs.set_item("dtype", "float32")?;
            py.import("numpy")?.call_method("empty", (shape.to_vec(),), Some(&kwargs))
        }
    }
}

/// Decodes positions of a sequence of a batch.
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
    let out = decoded(py, out, &shape)?;
    let arg = Arg::output("out", &out, device)?;
    run(py, device, &[&arg], |e| {
        ops::dequantize(e, &pool.pool, &batch.batch, sequence, positions, domain, order, &arg.buffer)
    })?;
    Ok(out)
}

/// Joins attention over disjoint sets of positions.
#[pyfunction]
#[pyo3(signature = (parts, *, device = None, out = None, lse = false))]
pub fn merge<'py>(
    py: Python<'py>,
    parts: Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    device: Option<&Device>,
    out: Option<Bound<'py, PyAny>>,
    lse: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let device = device.map_or_else(tqkv::Device::cpu, |d| d.0.clone());
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

/// Rotates vectors as a codec does before it stores them, or undoes that.
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
    let device = device.map_or_else(tqkv::Device::cpu, |d| d.0.clone());
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
