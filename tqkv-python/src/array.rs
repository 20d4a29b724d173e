//! Arrays of Python's libraries as tqkv's buffers: where they lie, without copies wherever the device can reach them.

use crate::device::Device;
use crate::error::{OrRaise, raise};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use tqkv::{Buffer, DType};

/// A dense or strided array of someone else's.
pub struct Array {
    address: usize,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// In bytes; never negative.
    pub strides: Vec<usize>,
    /// The ordinal of its NVIDIA GPU; `None` on the host.
    cuda: Option<usize>,
    writable: bool,
    owner: Py<PyAny>,
}

/// What keeps an array's memory alive.
struct Owner(#[allow(dead_code)] Py<PyAny>);

impl Array {
    /// A numpy array, a torch tensor, or anything that numpy takes by DLPack.
    pub fn new(what: &str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        if object.hasattr("data_ptr")? && object.hasattr("stride")? {
            return Array::from_torch(what, object);
        }
        if object.hasattr("__array_interface__")? {
            return Array::from_numpy(what, object);
        }
        if object.hasattr("__dlpack__")? {
            let array = object.py().import("numpy")?.call_method1("from_dlpack", (object,))?;
            return Array::from_numpy(what, &array);
        }
        let class = object.get_type().name()?;
        Err(PyTypeError::new_err(format!(
            "{what} is a {class}: expected a numpy array, a torch tensor, or an array with __dlpack__"
        )))
    }

    fn from_torch(what: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let name = tensor.getattr("dtype")?.str()?.to_string();
        let dtype = dtype_of(what, name.trim_start_matches("torch."))?;
        let device = tensor.getattr("device")?;
        let cuda = match device.getattr("type")?.extract::<String>()?.as_str() {
            "cpu" => None,
            "cuda" => Some(device.getattr("index")?.extract::<Option<usize>>()?.unwrap_or(0)),
            other => return Err(PyValueError::new_err(format!("{what} is on {other}: expected cpu or cuda"))),
        };
        let strides: Vec<usize> = tensor.call_method0("stride")?.extract()?;
        Ok(Array {
            address: tensor.call_method0("data_ptr")?.extract()?,
            dtype,
            shape: tensor.getattr("shape")?.extract()?,
            strides: strides.into_iter().map(|s| s * dtype.size()).collect(),
            cuda,
            writable: true,
            owner: tensor.clone().unbind(),
        })
    }

    fn from_numpy(what: &str, array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let interface = array.getattr("__array_interface__")?;
        let name = match array.getattr_opt("dtype")? {
            Some(dtype) => dtype.getattr("name")?.extract::<String>()?,
            None => interface.get_item("typestr")?.extract()?,
        };
        let dtype = dtype_of(what, &name)?;
        let shape: Vec<usize> = interface.get_item("shape")?.extract()?;
        let (address, read_only): (usize, bool) = interface.get_item("data")?.extract()?;
        let strides = match interface.get_item("strides")? {
            none if none.is_none() => dense(&shape, dtype),
            strides => strides
                .extract::<Vec<isize>>()?
                .into_iter()
                .map(usize::try_from)
                .collect::<Result<_, _>>()
                .map_err(|_| {
                    PyValueError::new_err(format!("{what} has a negative stride: expected an array that runs forwards"))
                })?,
        };
        Ok(Array { address, dtype, shape, strides, cuda: None, writable: !read_only, owner: array.clone().unbind() })
    }

    /// Whether elements lie one after the other.
    pub fn is_dense(&self) -> bool {
        let dense = dense(&self.shape, self.dtype);
        self.shape.iter().zip(self.strides.iter().zip(dense)).all(|(n, (s, d))| *n <= 1 || *s == d)
    }

    /// Bytes from the first element's start to the last one's end.
    fn extent(&self) -> usize {
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape.iter().zip(&self.strides).map(|(n, s)| (n - 1) * s).sum::<usize>() + self.dtype.size()
    }

    /// The memory of its elements and what lies between them, as bytes.
    pub fn span(&self, device: &Device) -> PyResult<Buffer> {
        self.borrow(device, DType::U8, &[self.extent()])
    }

    /// Where it lies, without a copy, as elements one after the other, those between its own counted in.
    pub fn elements(&self, device: &Device) -> PyResult<Buffer> {
        self.borrow(device, self.dtype, &[self.extent() / self.dtype.size()])
    }

    /// What keeps its memory.
    pub fn owner(&self, py: Python<'_>) -> Py<PyAny> {
        self.owner.clone_ref(py)
    }

    fn borrow(&self, device: &Device, dtype: DType, shape: &[usize]) -> PyResult<Buffer> {
        if shape.contains(&0) {
            return Python::attach(|py| device.run(py, || device.zeros(dtype, shape)));
        }
        match self.cuda {
            None if device.is_cpu() => {
                let owner = Python::attach(|py| Owner(self.owner.clone_ref(py)));
                let start = self.address as *mut u8;
                // SAFETY: memory of the array, which its owner keeps; who writes to it meanwhile is told not to (`docs`).
                unsafe { Buffer::from_host_ptr(device, start, dtype, shape, Box::new(owner)) }.or_raise()
            }
            #[cfg(feature = "cuda")]
            Some(ordinal) if device.cuda() == Some(ordinal) => {
                // SAFETY: the array outlives the call (or a pool in it, which keeps it), and what becomes of its memory then comes behind
                // the call's work, on torch's current stream.
                unsafe { Buffer::from_cuda_ptr(device, self.address as u64, dtype, shape) }.or_raise()
            }
            place => {
                let got = place.map_or("the host".to_owned(), |n| format!("cuda:{n}"));
                Err(raise(tqkv::Error::WrongDevice { what: "array", got, expected: device.to_string() }))
            }
        }
    }

    /// Copies a dense array of the host's to a buffer, or back.
    fn transfer(&self, buffer: &Buffer, to_host: bool) -> tqkv::Result<()> {
        let (start, n) = (self.address as *mut u8, self.extent());
        match (n, to_host) {
            (0, _) => Ok(()),
            // SAFETY: memory of the array, which its owner keeps, and which nobody else uses while the call runs.
            (_, true) => buffer.read_bytes(unsafe { std::slice::from_raw_parts_mut(start, n) }),
            // SAFETY: as above.
            (_, false) => buffer.write_bytes(unsafe { std::slice::from_raw_parts(start, n) }),
        }
    }
}

/// An argument of an operation.
pub struct Arg {
    pub buffer: Buffer,
    /// What it must be copied back to, where the device has memory of its own.
    host: Option<Array>,
    /// Keeps memory on a GPU alive.
    _owner: Py<PyAny>,
}

impl Arg {
    /// An array that is read; one that is strided is copied.
    pub fn input(what: &str, object: &Bound<'_, PyAny>, device: &Device) -> PyResult<Self> {
        let mut array = Array::new(what, object)?;
        if !array.is_dense() {
            array = match object.hasattr("contiguous")? {
                true => Array::new(what, &object.call_method0("contiguous")?)?,
                false => Array::new(what, &object.py().import("numpy")?.call_method1("ascontiguousarray", (object,))?)?,
            };
        }
        let owner = array.owner.clone_ref(object.py());
        if array.cuda.is_some() || device.is_cpu() {
            let buffer = array.borrow(device, array.dtype, &array.shape)?;
            return Ok(Arg { buffer, host: None, _owner: owner });
        }
        let buffer = device.run(object.py(), || {
            let buffer = device.zeros(array.dtype, &array.shape)?;
            array.transfer(&buffer, false).map(|()| buffer)
        })?;
        Ok(Arg { buffer, host: None, _owner: owner })
    }

    /// A dense array that is written.
    pub fn output(what: &str, object: &Bound<'_, PyAny>, device: &Device) -> PyResult<Self> {
        Arg::written(what, object, device, false)
    }

    /// A dense array that is read and written.
    pub fn changed(what: &str, object: &Bound<'_, PyAny>, device: &Device) -> PyResult<Self> {
        Arg::written(what, object, device, true)
    }

    fn written(what: &str, object: &Bound<'_, PyAny>, device: &Device, read: bool) -> PyResult<Self> {
        let array = Array::new(what, object)?;
        if !array.is_dense() {
            return Err(PyValueError::new_err(format!("{what} is strided: expected a contiguous array to write to")));
        }
        if !array.writable {
            return Err(PyValueError::new_err(format!("{what} is read-only: expected an array to write to")));
        }
        let owner = array.owner.clone_ref(object.py());
        if array.cuda.is_some() || device.is_cpu() {
            let buffer = array.borrow(device, array.dtype, &array.shape)?;
            return Ok(Arg { buffer, host: None, _owner: owner });
        }
        let buffer = device.run(object.py(), || {
            let buffer = device.zeros(array.dtype, &array.shape)?;
            if read { array.transfer(&buffer, false).map(|()| buffer) } else { Ok(buffer) }
        })?;
        Ok(Arg { buffer, host: Some(array), _owner: owner })
    }

    /// Copies what was written to where the caller wants it.
    pub fn finish(&self) -> tqkv::Result<()> {
        match &self.host {
            Some(array) => array.transfer(&self.buffer, true),
            None => Ok(()),
        }
    }

    /// Whether the device's results are elsewhere than the caller's array until [`finish`](Arg::finish).
    pub fn is_copied(&self) -> bool {
        self.host.is_some()
    }
}

/// A new array of the same library, device and type as another.
pub fn empty_like<'py>(like: &Bound<'py, PyAny>, shape: &[usize], dtype: Option<DType>) -> PyResult<Bound<'py, PyAny>> {
    let py = like.py();
    let shape = PyTuple::new(py, shape)?;
    let name = |dtype: DType| match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::U8 => "uint8",
        DType::U32 => "uint32",
        DType::I64 => "int64",
        _ => "float32",
    };
    if like.hasattr("data_ptr")? {
        let torch = py.import("torch")?;
        let kwargs = pyo3::types::PyDict::new(py);
        kwargs.set_item("device", like.getattr("device")?)?;
        let dtype = dtype.map_or_else(|| like.getattr("dtype"), |d| torch.getattr(name(d)))?;
        kwargs.set_item("dtype", dtype)?;
        return torch.call_method("empty", (shape,), Some(&kwargs));
    }
    let numpy = py.import("numpy")?;
    let dtype = match dtype {
        Some(d) => name(d).into_pyobject(py)?.into_any(),
        None => like.getattr_opt("dtype")?.unwrap_or("float32".into_pyobject(py)?.into_any()),
    };
    numpy.call_method1("empty", (shape, dtype))
}

fn dense(shape: &[usize], dtype: DType) -> Vec<usize> {
    let mut strides = vec![dtype.size(); shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

fn dtype_of(what: &str, name: &str) -> PyResult<DType> {
    match name {
        "float32" | "<f4" => Ok(DType::F32),
        "float16" | "<f2" => Ok(DType::F16),
        "bfloat16" => Ok(DType::BF16),
        "uint8" | "|u1" => Ok(DType::U8),
        "uint32" | "int32" | "<u4" | "<i4" => Ok(DType::U32),
        "int64" | "<i8" => Ok(DType::I64),
        _ => Err(crate::error::DTypeError::new_err(format!(
            "{what} holds {name}: expected float32, float16 or bfloat16"
        ))),
    }
}
