//! Devices and codecs.

use crate::error::{OrRaise, raise};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use tqkv::cache::CacheCodec;
use tqkv::compute::DeviceKind;
use tqkv::format::RowFormat;
use tqkv::{Codec, CodecPair};

/// A place that holds memory and runs operations: ``cpu``, ``wgpu``, ``wgpu:N``, ``cuda`` or ``cuda:N``.
///
/// Raises :class:`UnknownDeviceError`, :class:`DeviceUnavailableError`. A CPU works in forked processes too.
#[pyclass(frozen, module = "tqkv", name = "Device")]
pub struct Device(pub tqkv::Device);

#[pymethods]
impl Device {
    #[new]
    #[pyo3(signature = (name = "cpu"))]
    fn new(py: Python<'_>, name: &str) -> PyResult<Self> {
        py.detach(|| tqkv::Device::open(name)).or_raise().map(Device)
    }

    /// The host's processor: the process's device, or one with so many threads of its own.
    #[staticmethod]
    #[pyo3(signature = (threads = None))]
    fn cpu(threads: Option<usize>) -> PyResult<Self> {
        Ok(Device(match threads {
            Some(n) => tqkv::Device::cpu_with_threads(n).or_raise()?,
            None => tqkv::Device::cpu(),
        }))
    }

    /// An NVIDIA GPU whose work all goes to a stream, a ``cudaStream_t`` (``torch.cuda.current_stream().cuda_stream``), which
    /// must outlive the device. Tensors on that GPU are used where they lie.
    #[staticmethod]
    #[pyo3(signature = (ordinal = 0, stream = 0))]
    fn cuda_on_stream(py: Python<'_>, ordinal: usize, stream: usize) -> PyResult<Self> {
        py.detach(|| on_stream(ordinal, stream)).or_raise().map(Device)
    }

    /// CUDA, then a GPU through wgpu, else the CPU.
    #[staticmethod]
    fn best(py: Python<'_>) -> Self {
        Device(py.detach(tqkv::Device::best))
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
