//! Devices and codecs.

use crate::error::{OrRaise, raise};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use tqkv::cache::CacheCodec;
use tqkv::compute::DeviceKind;
use tqkv::format::RowFormat;
use tqkv::{Codec, CodecPair};

/// A place that holds memory and runs operations: ``cpu``, ``wgpu``, ``wgpu:N``, ``cuda`` or ``cuda:N``.
///
/// An NVIDIA GPU works on torch's current stream, the calling thread's, once torch uses a GPU: tensors on it are used where they lie, in
/// the order of that stream; nothing waits for the host, and calls can be captured in a graph. Where the current stream is another than
/// at the last call, its work comes behind all that the device was given before. So threads may share a device, one call behind the
/// other; for work side by side give each a device of its own.
///
/// Raises :class:`UnknownDeviceError`, :class:`DeviceUnavailableError`. A CPU works in forked processes too.
#[pyclass(frozen, module = "tqkv", name = "Device")]
#[derive(Clone)]
pub struct Device {
    device: tqkv::Device,
    kind: DeviceKind,
    /// Its number among NVIDIA's.
    cuda: Option<usize>,
    /// Held by who uses it, if it follows torch's current stream.
    lane: Option<Arc<Mutex<()>>>,
}

impl Deref for Device {
    type Target = tqkv::Device;

    fn deref(&self) -> &tqkv::Device {
        &self.device
    }
}

impl Device {
    fn new(device: tqkv::Device, follows: bool) -> Self {
        let info = device.info();
        let cuda = info.id.strip_prefix("cuda:").and_then(|n| n.parse().ok());
        let lane = (follows && cuda.is_some()).then(Arc::default);
        Device { device, kind: info.kind, cuda, lane }
    }

    /// The process's CPU.
    pub fn of_the_host() -> Self {
        Device::new(tqkv::Device::cpu(), false)
    }

    pub fn is_cpu(&self) -> bool {
        self.kind == DeviceKind::Cpu
    }

    /// Its number among NVIDIA's GPUs.
    pub fn cuda(&self) -> Option<usize> {
        self.cuda
    }

    /// Does without the GIL what uses the device: on torch's current stream, if the device follows that.
    pub fn run<T: Send>(&self, py: Python<'_>, work: impl FnOnce() -> tqkv::Result<T> + Send) -> PyResult<T> {
        let (Some(lane), Some(ordinal)) = (&self.lane, self.cuda) else { return py.detach(work).or_raise() };
        let stream = torch_stream(py, ordinal)?;
        py.detach(|| {
            let _lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
            stream.map_or(Ok(()), |stream| move_to(&self.device, stream))?;
            work()
        })
        .or_raise()
    }
}

/// torch's current stream on a GPU, this thread's; none where torch uses no GPU.
fn torch_stream(py: Python<'_>, ordinal: usize) -> PyResult<Option<usize>> {
    static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let current = match CURRENT.get(py) {
        Some(current) => current,
        None => {
            let modules = py.import("sys")?.getattr("modules")?;
            let torch = modules.call_method1("get", ("torch",))?;
            if torch.is_none() || !torch.getattr("cuda")?.call_method0("is_initialized")?.is_truthy()? {
                return Ok(None);
            }
            let current = torch.getattr("_C")?.getattr("_cuda_getCurrentRawStream")?;
            CURRENT.get_or_init(py, || current.unbind())
        }
    };
    current.bind(py).call1((ordinal,))?.extract().map(Some)
}

/// Whether torch uses GPUs in this process.
pub fn torch_uses_gpus(py: Python<'_>) -> PyResult<bool> {
    Ok(torch_stream(py, 0)?.is_some())
}

#[cfg(feature = "cuda")]
fn move_to(device: &tqkv::Device, stream: usize) -> tqkv::Result<()> {
    // SAFETY: torch's streams last as long as the process, and the lane keeps other threads off.
    unsafe { device.move_to_cuda_stream(stream as *mut std::ffi::c_void) }
}

#[cfg(not(feature = "cuda"))]
fn move_to(_: &tqkv::Device, _: usize) -> tqkv::Result<()> {
    Ok(())
}

#[pymethods]
impl Device {
    #[new]
    #[pyo3(signature = (name = "cpu"))]
    fn open(py: Python<'_>, name: &str) -> PyResult<Self> {
        Ok(Device::new(py.detach(|| tqkv::Device::open(name)).or_raise()?, true))
    }

    /// The host's processor: the process's device, or one with so many threads of its own.
    #[staticmethod]
    #[pyo3(signature = (threads = None))]
    fn cpu(threads: Option<usize>) -> PyResult<Self> {
        let device = threads.map_or(Ok(tqkv::Device::cpu()), tqkv::Device::cpu_with_threads).or_raise()?;
        Ok(Device::new(device, false))
    }

    /// An NVIDIA GPU whose work all goes to one stream, a ``cudaStream_t``, which must outlive the device; the order of what other
    /// streams do with its tensors is the caller's.
    #[staticmethod]
    #[pyo3(signature = (ordinal = 0, stream = 0))]
    fn cuda_on_stream(py: Python<'_>, ordinal: usize, stream: usize) -> PyResult<Self> {
        Ok(Device::new(py.detach(|| on_stream(ordinal, stream)).or_raise()?, false))
    }

    /// CUDA, then a GPU through wgpu, else the CPU.
    #[staticmethod]
    fn best(py: Python<'_>) -> Self {
        Device::new(py.detach(tqkv::Device::best), true)
    }

    /// Names and descriptions; ``None`` and the reason for what cannot be used.
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
        match self.kind {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Wgpu => "wgpu",
            DeviceKind::Cuda => "cuda",
            _ => "other",
        }
    }

    #[getter]
    fn name(&self) -> String {
        self.info().name
    }

    #[getter]
    fn details(&self) -> BTreeMap<&'static str, String> {
        self.info().details.into_iter().collect()
    }

    fn __str__(&self) -> String {
        self.device.to_string()
    }

    fn __repr__(&self) -> String {
        format!("tqkv.Device({:?})", self.device.to_string())
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.device == other.device
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

/// The codecs of keys and of values: ``k5v4`` (2 to 8 bits a side), ``f16``, ``f32``, ``seed4``, or one for each side,
/// ``tq8/f16``; and of positions that are kept a second time, ``k4v4+s1f16+r64k8v8``: the first in f16, the newest 64 in 8 bits.
///
/// Raises :class:`UnknownCodecError`, :class:`UnknownExtentError`, :class:`RepeatedExtentError`.
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

    /// How many first positions are kept a second time.
    #[getter]
    fn sinks(&self) -> usize {
        self.0.sinks.map_or(0, |sinks| sinks.positions)
    }

    /// How many newest positions are.
    #[getter]
    fn recent(&self) -> usize {
        self.0.recent.map_or(0, |recent| recent.positions)
    }

    /// Of K and V together, scales counted.
    fn bits_per_element(&self, head_dim: usize) -> PyResult<f64> {
        self.0.all.bits_per_element(head_dim).or_raise()
    }

    /// Bytes of codes and of scales of a key, and of a value. Raises :class:`HeadDimError`, :class:`BitsError`.
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
