//! The cache of a model, and its steps.

use crate::array::Arg;
use crate::device::{Device, codec};
use crate::error::{OrRaise, raise};
use crate::ops::{Asked, decoded, domain, order, positions, run};
use crate::pool::floats;
use ouroboros::self_referencing;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyBytes, PyDict};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tqkv::cache::{CapturedStep, LayerKind, Side, Step};
use tqkv::ops::{Domain, RowOrder};
use tqkv::{CacheConfig, Error, KvCache, SequenceId};

/// The compressed K and V of all layers, for sequences of different lengths that share one pool of pages. Sequences are
/// numbers, never used twice.
///
/// ``capacity`` counts the positions of all sequences together, in pages of ``page_size``. By layer: ``windows`` says how many
/// newest positions are kept, ``shared`` which earlier layer's positions are read, ``codec_at`` other codecs, and ``channels`` how
/// keys are shifted and scaled before they are stored, (shift, scale), both [kv_heads, head_dim] (``tqkv calibrate`` measures them).
///
/// Raises :class:`ZeroError`, :class:`HeadDimError`, :class:`MismatchError`, :class:`LayerError`, :class:`OutOfMemoryError`.
#[pyclass(frozen, module = "tqkv", name = "KvCache")]
pub struct PyKvCache {
    device: Device,
    state: Mutex<State>,
}

struct State {
    /// Away while a step is open.
    cache: Option<Box<KvCache>>,
    /// Sequences by the numbers that Python knows them by, which outlive [`grow`](PyKvCache::grow).
    sequences: BTreeMap<u64, SequenceId>,
    next: u64,
}

impl State {
    fn cache(&mut self) -> PyResult<&mut KvCache> {
        let open = || PyRuntimeError::new_err("a step of this cache is open: commit it or leave its block first");
        self.cache.as_deref_mut().ok_or_else(open)
    }

    fn id(&self, number: u64) -> PyResult<SequenceId> {
        self.sequences.get(&number).copied().ok_or_else(|| raise(Error::UnknownSequence { got: number }))
    }

    fn name(&mut self, id: SequenceId) -> u64 {
        self.next += 1;
        self.sequences.insert(self.next - 1, id);
        self.next - 1
    }

    /// Sequences with how many tokens, of a dict or of pairs.
    fn tokens(&self, object: &Bound<'_, PyAny>) -> PyResult<Vec<(SequenceId, usize)>> {
        let pairs: Vec<(u64, usize)> = match object.cast::<PyDict>() {
            Ok(dict) => dict.items().extract()?,
            Err(_) => object.extract()?,
        };
        pairs.into_iter().map(|(number, n)| Ok((self.id(number)?, n))).collect()
    }
}

impl PyKvCache {
    /// Without the GIL while it waits: who has the lock may be waiting for that.
    fn lock(&self, py: Python<'_>) -> MutexGuard<'_, State> {
        self.state.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Settings by layer, of a dict.
fn by_layer<'py, T>(
    dict: Option<&Bound<'py, PyDict>>,
    value: impl Fn(&Bound<'py, PyAny>) -> PyResult<T>,
) -> PyResult<Vec<(usize, T)>> {
    let items = dict.into_iter().flat_map(|d| d.iter());
    items.map(|(layer, x)| Ok((layer.extract()?, value(&x)?))).collect()
}

fn side(name: &str) -> PyResult<Side> {
    match name {
        "key" => Ok(Side::Key),
        "value" => Ok(Side::Value),
        _ => Err(PyValueError::new_err(format!("side is {name:?}: expected 'key' or 'value'"))),
    }
}

#[pymethods]
impl PyKvCache {
    #[new]
    #[pyo3(signature = (device, layers, kv_heads, head_dim, codec = None, *, page_size = 64, capacity = 4096,
        window_capacity = None, windows = None, shared = None, codec_at = None, channels = None))]
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    fn new(
        py: Python<'_>,
        device: &Device,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        codec: Option<&Bound<'_, PyAny>>,
        page_size: usize,
        capacity: usize,
        window_capacity: Option<usize>,
        windows: Option<&Bound<'_, PyDict>>,
        shared: Option<&Bound<'_, PyDict>>,
        codec_at: Option<&Bound<'_, PyDict>>,
        channels: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let mut config = CacheConfig::new(layers, kv_heads, head_dim).page_size(page_size).capacity(capacity);
        if let Some(codec) = codec {
            config = config.cache_codec(self::codec(codec)?);
        }
        if let Some(positions) = window_capacity {
            config = config.window_capacity(positions);
        }
        for (layer, window) in by_layer(windows, |w| w.extract())? {
            config = config.kind_at(layer, LayerKind::Window(window));
        }
        for (layer, source) in by_layer(shared, |s| s.extract())? {
            config = config.kind_at(layer, LayerKind::Shared(source));
        }
        for (layer, codec) in by_layer(codec_at, self::codec)? {
            if codec != codec.all.into() {
                let message = format!("codec_at[{layer}] is {codec}: expected the codecs of all positions alone");
                return Err(PyValueError::new_err(message));
            }
            config = config.codec_at(layer, codec.all);
        }
        for (layer, (shift, scale)) in by_layer(channels, |c| c.extract::<(Bound<PyAny>, Bound<PyAny>)>())? {
            config = config.channels_at(layer, floats(&shift)?, floats(&scale)?);
        }
        let cache = device.run(py, || KvCache::new(device, config))?;
        let state = State { cache: Some(Box::new(cache)), sequences: BTreeMap::new(), next: 0 };
        Ok(PyKvCache { device: device.clone(), state: Mutex::new(state) })
    }

    #[getter]
    fn device(&self) -> Device {
        self.device.clone()
    }

    #[getter]
    fn sequences(&self, py: Python<'_>) -> Vec<u64> {
        self.lock(py).sequences.keys().copied().collect()
    }

    fn add_sequence(&self, py: Python<'_>) -> PyResult<u64> {
        let mut state = self.lock(py);
        let id = state.cache()?.add_sequence();
        Ok(state.name(id))
    }

    /// A sequence with the same content, which shares all pages until either writes.
    fn fork(&self, py: Python<'_>, sequence: u64) -> PyResult<u64> {
        let mut state = self.lock(py);
        let id = state.id(sequence)?;
        let twin = state.cache()?.fork(id).or_raise()?;
        Ok(state.name(twin))
    }

    /// Drops all positions from ``len`` on. Raises :class:`PositionsError` if a window has dropped what would be seen.
    fn truncate(&self, py: Python<'_>, sequence: u64, len: usize) -> PyResult<()> {
        let mut state = self.lock(py);
        let id = state.id(sequence)?;
        state.cache()?.truncate(id, len).or_raise()
    }

    fn free(&self, py: Python<'_>, sequence: u64) -> PyResult<()> {
        let mut state = self.lock(py);
        let id = state.id(sequence)?;
        state.cache()?.free_sequence(id).or_raise()?;
        state.sequences.remove(&sequence);
        Ok(())
    }

    /// Positions, the same in every layer. Raises :class:`UnevenLayersError` between the layers' appends.
    fn len(&self, py: Python<'_>, sequence: u64) -> PyResult<usize> {
        let mut state = self.lock(py);
        let id = state.id(sequence)?;
        state.cache()?.len(id).or_raise()
    }

    /// Bytes of all pages.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.lock(py).cache()?.bytes())
    }

    /// In the kind of layers that has fewest.
    #[getter]
    fn free_pages(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.lock(py).cache()?.free_pages())
    }

    /// ``capacity``, ``used`` and ``free`` in bytes, ``fragmentation`` as a share.
    fn usage(&self, py: Python<'_>) -> PyResult<BTreeMap<&'static str, f64>> {
        let usage = self.lock(py).cache()?.usage();
        let bytes = [("capacity", usage.capacity), ("used", usage.used), ("free", usage.free)];
        let bytes = bytes.into_iter().map(|(name, n)| (name, n as f64));
        Ok(bytes.chain([("fragmentation", usage.fragmentation)]).collect())
    }

    /// Encodes new tokens at the end of sequences, in one layer: [tokens, kv_heads, head_dim], the sequences' tokens one after
    /// the other. Raises :class:`OutOfPagesError`, :class:`ShapeError`, :class:`SharedLayerError`; nothing is appended then.
    fn append(
        &self,
        py: Python<'_>,
        layer: usize,
        tokens: &Bound<'_, PyAny>,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (k, v) = (Arg::input("k", k, &self.device)?, Arg::input("v", v, &self.device)?);
        let mut state = self.lock(py);
        let tokens = state.tokens(tokens)?;
        let cache = state.cache()?;
        run(py, &self.device, &[], |e| cache.append(e, layer, &tokens, &k.buffer, &v.buffer))
    }

    /// Attention of the newest positions of sequences in one layer, as :func:`attend`; a layer's window applies on top.
    #[pyo3(signature = (layer, queries, q, *, scale = None, causal = true, window = None, softcap = None,
        sink_logits = None, domain = "original".to_owned(), out = None, lse = false))]
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    fn attend<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        queries: &Bound<'py, PyAny>,
        q: Bound<'py, PyAny>,
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
        let mut state = self.lock(py);
        let queries = state.tokens(queries)?;
        let cache = state.cache()?;
        asked.run(&q, &self.device, |e, a| cache.attend(e, layer, &queries, a.q, a.out, a.lse, a.params))
    }

    /// Decodes positions, all if none are named; as :func:`dequantize`.
    #[pyo3(signature = (layer, side, sequence, positions = None, *, domain = "original", order = "token", out = None))]
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    fn dequantize<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        side: &str,
        sequence: u64,
        positions: Option<&Bound<'py, PyAny>>,
        domain: &str,
        order: &str,
        out: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut state = self.lock(py);
        let id = state.id(sequence)?;
        let cache = state.cache()?;
        let (domain, order, side) = (self::domain(domain)?, self::order(order)?, self::side(side)?);
        let held = 0..if positions.is_none() { cache.len(id).or_raise()? } else { 0 };
        let positions = self::positions(positions, held)?;
        let pool = cache.pool(layer, side).or_raise()?;
        let dim = if domain == Domain::Original { pool.row().head_dim() } else { pool.row().row_dim() };
        let (n, heads) = (positions.len(), pool.kv_heads());
        let shape = if order == RowOrder::TokenMajor { [n, heads, dim] } else { [heads, n, dim] };
        let out = decoded(py, &self.device, out, &shape)?;
        let arg = Arg::output("out", &out, &self.device)?;
        run(py, &self.device, &[&arg], |e| {
            cache.dequantize(e, layer, side, id, positions, domain, order, &arg.buffer)
        })?;
        Ok(out)
    }

    /// Whether there are pages for so many new tokens.
    fn fits(&self, py: Python<'_>, tokens: &Bound<'_, PyAny>) -> PyResult<bool> {
        let mut state = self.lock(py);
        let tokens = state.tokens(tokens)?;
        match state.cache()?.step(&tokens) {
            Ok(_) => Ok(true),
            Err(Error::OutOfPages { .. }) => Ok(false),
            Err(error) => Err(raise(error)),
        }
    }

    /// Starts a step: the new tokens of some sequences through all layers, as one thing. Until it is over, the cache takes no
    /// other call. Raises :class:`OutOfPagesError`, :class:`UnknownSequenceError`, :class:`RepeatedSequenceError`.
    fn step(slf: Bound<'_, Self>, tokens: &Bound<'_, PyAny>) -> PyResult<PyStep> {
        let mut state = slf.get().lock(slf.py());
        let tokens = state.tokens(tokens)?;
        state.cache()?;
        let Some(cache) = state.cache.take() else { unreachable!("it was there") };
        match OpenStep::try_new_or_recover(cache, |cache| cache.step(&tokens).map(Some)) {
            Ok(open) => Ok(PyStep { cache: slf.clone().unbind(), open: Mutex::new(Some(open)) }),
            Err((error, heads)) => {
                state.cache = Some(heads.cache);
                Err(raise(error))
            }
        }
    }

    /// Writes sequences to a file, whole or not at all, and gives them in the order in which :meth:`load` will.
    /// ``fingerprint`` says which model they belong to. Raises :class:`IoError`.
    #[pyo3(signature = (path, sequences = None, fingerprint = None))]
    fn save(
        &self,
        py: Python<'_>,
        path: PathBuf,
        sequences: Option<Vec<u64>>,
        fingerprint: Option<&[u8]>,
    ) -> PyResult<Vec<u64>> {
        let mut state = self.lock(py);
        let (names, ids) = state.saved(sequences)?;
        let cache = state.cache()?;
        self.device.run(py, || cache.save(&ids, path, fingerprint.unwrap_or(b"")))?;
        Ok(names)
    }

    /// Adds the sequences of a file. Raises :class:`FingerprintError`, :class:`GeometryError`, :class:`ChecksumError`,
    /// :class:`NotASnapshotError`, :class:`TruncatedError`, :class:`OutOfPagesError`, :class:`IoError`.
    #[pyo3(signature = (path, fingerprint = None))]
    fn load(&self, py: Python<'_>, path: PathBuf, fingerprint: Option<&[u8]>) -> PyResult<Vec<u64>> {
        let mut state = self.lock(py);
        let cache = state.cache()?;
        let ids = self.device.run(py, || cache.load(path, fingerprint.unwrap_or(b"")))?;
        Ok(ids.into_iter().map(|id| state.name(id)).collect())
    }

    /// As :meth:`save`, to bytes.
    #[pyo3(signature = (sequences = None, fingerprint = None))]
    fn dumps<'py>(
        &self,
        py: Python<'py>,
        sequences: Option<Vec<u64>>,
        fingerprint: Option<&[u8]>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let mut state = self.lock(py);
        let (_, ids) = state.saved(sequences)?;
        let cache = state.cache()?;
        let bytes = self.device.run(py, || snapshot(cache, &ids, fingerprint.unwrap_or(b"")))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// As :meth:`load`, from bytes.
    #[pyo3(signature = (bytes, fingerprint = None))]
    fn loads(&self, py: Python<'_>, bytes: &[u8], fingerprint: Option<&[u8]>) -> PyResult<Vec<u64>> {
        let mut state = self.lock(py);
        let cache = state.cache()?;
        let ids = self.device.run(py, || cache.read_snapshot(bytes, fingerprint.unwrap_or(b"")))?;
        Ok(ids.into_iter().map(|id| state.name(id)).collect())
    }

    /// Moves everything to a cache of this capacity. Sequences keep their numbers.
    #[pyo3(signature = (capacity, window_capacity = None))]
    fn grow(&self, py: Python<'_>, capacity: usize, window_capacity: Option<usize>) -> PyResult<()> {
        let mut state = self.lock(py);
        let (names, ids) = state.saved(None)?;
        let cache = state.cache()?;
        let mut config = cache.config().clone().capacity(capacity);
        if let Some(positions) = window_capacity {
            config = config.window_capacity(positions);
        }
        let device = &self.device;
        let (larger, ids) = device.run(py, || {
            let mut larger = Box::new(KvCache::new(device, config)?);
            let bytes = snapshot(cache, &ids, b"")?;
            let ids = larger.read_snapshot(&bytes[..], b"")?;
            Ok((larger, ids))
        })?;
        state.cache = Some(larger);
        state.sequences = names.into_iter().zip(ids).collect();
        Ok(())
    }

    /// Sequences.
    fn __len__(&self, py: Python<'_>) -> usize {
        self.lock(py).sequences.len()
    }
}

impl State {
    /// Sequences to save, all if none are named.
    fn saved(&self, names: Option<Vec<u64>>) -> PyResult<(Vec<u64>, Vec<SequenceId>)> {
        let names = names.unwrap_or_else(|| self.sequences.keys().copied().collect());
        let ids = names.iter().map(|&n| self.id(n)).collect::<PyResult<_>>()?;
        Ok((names, ids))
    }
}

fn snapshot(cache: &KvCache, ids: &[SequenceId], fingerprint: &[u8]) -> tqkv::Result<Vec<u8>> {
    let whole = ids.iter().map(|&id| Ok((id, cache.len(id)?))).collect::<tqkv::Result<Vec<_>>>()?;
    let mut bytes = vec![];
    cache.write_snapshot(&whole, &mut bytes, fingerprint)?;
    Ok(bytes)
}

/// A cache that is lent to a step.
#[self_referencing]
struct OpenStep {
    cache: Box<KvCache>,
    #[borrows(mut cache)]
    #[not_covariant]
    step: Option<Step<'this>>,
}

/// What a captured step reads on the device. Made by :meth:`Step.captured`.
#[pyclass(frozen, module = "tqkv", name = "CapturedStep")]
pub struct PyCapturedStep {
    captured: CapturedStep,
    _cache: Py<PyKvCache>,
}

/// New tokens of some sequences on their way through the layers. As a context manager it is committed at the end of its block,
/// and abandoned if the block raises: the sequences are then as before.
#[pyclass(frozen, module = "tqkv", name = "Step")]
pub struct PyStep {
    cache: Py<PyKvCache>,
    open: Mutex<Option<OpenStep>>,
}

impl PyStep {
    fn lock(&self, py: Python<'_>) -> MutexGuard<'_, Option<OpenStep>> {
        self.open.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, py: Python<'_>, f: impl FnOnce(&mut Step) -> PyResult<T>) -> PyResult<T> {
        let over = || PyRuntimeError::new_err("this step is over");
        let mut open = self.lock(py);
        let open = open.as_mut().ok_or_else(over)?;
        open.with_step_mut(|step| f(step.as_mut().ok_or_else(over)?))
    }

    /// Gives the cache back; what was not committed is undone.
    fn close(&self, py: Python<'_>, commit: bool) -> PyResult<()> {
        let Some(mut open) = self.lock(py).take() else {
            return Err(PyRuntimeError::new_err("this step is over"));
        };
        let committed = open.with_step_mut(|step| match step.take() {
            Some(step) if commit => step.commit(),
            _ => Ok(()),
        });
        self.cache.get().lock(py).cache = Some(open.into_heads().cache);
        committed.or_raise()
    }
}

impl Drop for PyStep {
    fn drop(&mut self) {
        let _ = Python::attach(|py| self.close(py, false));
    }
}

#[pymethods]
impl PyStep {
    #[getter]
    fn tokens(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |step| Ok(step.tokens()))
    }

    /// The tokens' keys and values in one layer, [tokens, kv_heads, head_dim].
    fn append(&self, py: Python<'_>, layer: usize, k: &Bound<'_, PyAny>, v: &Bound<'_, PyAny>) -> PyResult<()> {
        let device = &self.cache.get().device;
        let (k, v) = (Arg::input("k", k, device)?, Arg::input("v", v, device)?);
        self.with(py, |step| run(py, device, &[], |e| step.append(e, layer, &k.buffer, &v.buffer)))
    }

    /// Attention of the new tokens in one layer, after their keys and values; [tokens, heads, head_dim].
    #[pyo3(signature = (layer, q, *, scale = None, causal = true, window = None, softcap = None, sink_logits = None,
        domain = "original".to_owned(), out = None, lse = false))]
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    fn attend<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        q: Bound<'py, PyAny>,
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
        let device = &self.cache.get().device;
        self.with(py, |step| asked.run(&q, device, |e, a| step.attend(e, layer, a.q, a.out, a.lse, a.params)))
    }

    /// What the step's operations read on an NVIDIA GPU, for a graph that they were captured in: :meth:`resume` says how it goes on.
    /// Run the operations once outside of the graph before. Keep it as long as the graph.
    ///
    /// Raises :class:`UnevenLayersError` if a layer was not appended, :class:`UnsupportedError` on other devices.
    fn captured(&self, py: Python<'_>) -> PyResult<PyCapturedStep> {
        let captured = self.with(py, |step| step.captured().or_raise())?;
        Ok(PyCapturedStep { captured, _cache: self.cache.clone_ref(py) })
    }

    /// Brings what a captured step reads up to date with this step's tokens, in place of the step's operations: replay the graph next,
    /// on the same stream, and commit. Nothing is waited for.
    ///
    /// False where that does not do: for other numbers of new tokens, in a cache that has grown, when a page table has outgrown its
    /// room (which then doubles), or when other kernels suit the lengths better. Run the step's operations then, and capture them anew;
    /// the old graph must not be replayed.
    fn resume(&self, py: Python<'_>, captured: &PyCapturedStep) -> PyResult<bool> {
        let device = &self.cache.get().device;
        self.with(py, |step| device.run(py, || step.resume(&captured.captured)))
    }

    /// The tokens count from now on. Raises :class:`UnevenLayersError` if a layer was not appended.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        self.close(py, true)
    }

    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        self.close(py, false)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (kind, _value, _traceback))]
    fn __exit__(
        &self,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        // Over already if its block has committed or abandoned it.
        let py = kind.py();
        if self.lock(py).is_some() {
            self.close(py, kind.is_none())?;
        }
        Ok(false)
    }
}
