//! tqkv for Python: `tqkv._native`, whose names `python/tqkv/__init__.py` gives on. Shapes, units and errors are documented in
//! `python/tqkv/_native.pyi`, once for both.

#![allow(missing_docs)] // Nobody links against a Python module.

mod array;
mod cache;
mod device;
mod error;
mod ops;
mod pool;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    error::add(m)?;
    m.add_class::<device::Device>()?;
    m.add_class::<device::PyCodec>()?;
    m.add_class::<pool::PagePool>()?;
    m.add_class::<pool::Batch>()?;
    m.add_class::<cache::PyKvCache>()?;
    m.add_class::<cache::PyStep>()?;
    m.add_class::<cache::PyCapturedStep>()?;
    m.add_function(wrap_pyfunction!(ops::quantize, m)?)?;
    m.add_function(wrap_pyfunction!(ops::quantize_at, m)?)?;
    m.add_function(wrap_pyfunction!(ops::refresh, m)?)?;
    m.add_function(wrap_pyfunction!(ops::attend, m)?)?;
    m.add_function(wrap_pyfunction!(ops::dequantize, m)?)?;
    m.add_function(wrap_pyfunction!(ops::merge, m)?)?;
    m.add_function(wrap_pyfunction!(ops::rotate, m)?)?;
    m.add_function(wrap_pyfunction!(xxh3_128, m)?)
}

/// XXH3-128 of parts, one after the other.
#[pyfunction(name = "_xxh3_128")]
fn xxh3_128(parts: Vec<PyBackedBytes>) -> u128 {
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.digest128()
}
