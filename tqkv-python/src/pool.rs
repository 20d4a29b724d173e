//! Pools and batches.

use crate::array::Array;
use crate::device::{Device, one_codec};
use crate::error::{OrRaise, raise};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tqkv::format::RowFormat;
use tqkv::ops::{self, NO_PAGE, Span, Strides};

/// Pages of compressed vectors: the K or the V of one layer. ``codec`` is one side's: ``tq4``, ``f16``, ``seed4``.
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
        py: Python<'_>,
        device: &Device,
        codec: &str,
        head_dim: usize,
        kv_heads: usize,
        page_size: usize,
        pages: usize,
    ) -> PyResult<Self> {
        let row = RowFormat::new(one_codec(codec)?, head_dim).or_raise()?;
        let pool = device.run(py, || ops::PagePool::new(device, row, kv_heads, page_size, pages))?;
        Ok(PagePool { pool, _owners: vec![] })
    }

    /// A pool in memory of someone else's, without a copy, which it keeps alive: ``codes`` is
    /// uint8 [pages, kv_heads, page_size, row_bytes] (or the floats themselves of a dense codec) and ``scales``
    /// [pages, kv_heads, page_size, scales] (float16, float32 for seed codecs). Both may be strided views (on a CPU), also of one
    /// tensor: pages of [page_size, kv_heads, bytes] are ``.transpose(1, 2)`` of a view.
    ///
    /// ``channels`` shifts and scales keys before they are stored, (shift, scale), both [kv_heads, head_dim].
    ///
    /// Raises :class:`ShapeError`, :class:`MismatchError` for rows that overlap, :class:`AliasedError`, :class:`UnsupportedError`,
    /// :class:`ParameterError`.
    #[staticmethod]
    #[pyo3(signature = (device, codec, head_dim, codes, scales = None, channels = None))]
    fn from_arrays(
        py: Python<'_>,
        device: &Device,
        codec: &str,
        head_dim: usize,
        codes: &Bound<'_, PyAny>,
        scales: Option<&Bound<'_, PyAny>>,
        channels: Option<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    ) -> PyResult<Self> {
        let row = RowFormat::new(one_codec(codec)?, head_dim).or_raise()?;
        let (codes, owner) = (Array::new("codes", codes)?, codes.clone().unbind());
        let (shape, code_strides) = rows_of("codes", &codes, row.row_bytes())?;
        let code_bytes = codes.span(device)?;
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
                Some((scales.span(device)?, strides))
            }
        };
        let scales = scales.as_ref().map(|(buffer, strides)| (buffer, *strides));
        let mut pool = ops::PagePool::strided(row, shape, (&code_bytes, code_strides), scales).or_raise()?;
        if let Some((shift, scale)) = channels {
            let (shift, scale) = (floats(&shift)?, floats(&scale)?);
            let heads = shape[1];
            let map = device.run(py, || ops::ChannelMap::new(device, heads, row.head_dim(), &shift, &scale))?;
            pool = pool.with_channels(&map).or_raise()?;
        }
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

    /// Whether rows of both have a byte in common.
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

/// Some sequences, validated: the plan that every layer of a model step shares.
///
/// Position p of a sequence lies in slot ``p % (len(pages) * page_size)``: page ``pages[slot // page_size]``, row
/// ``slot % page_size``. ``lens`` counts the new positions in; ``first`` is the oldest position held (what lies before is neither
/// read nor seen: padding on the left, say). ``pages`` has a row of page numbers for each sequence, a list or an array; entries
/// that no held position needs may be anything.
///
/// Raises :class:`ZeroError`, :class:`TooLargeError`, :class:`PositionsError`, :class:`PageError`.
#[pyclass(frozen, module = "tqkv", name = "Batch")]
pub struct Batch {
    batch: Mutex<ops::Batch>,
    pub device: Device,
}

/// The numbers of an array, row after row.
pub fn floats(array: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    let flat = array.call_method1("reshape", (-1,))?;
    flat.call_method0("tolist")?.extract()
}

/// Integers of a list or an array.
pub fn integers(what: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    let list = if object.hasattr("tolist")? { object.call_method0("tolist")? } else { object.clone() };
    list.extract().map_err(|_| PyTypeError::new_err(format!("{what} is no list of integers")))
}

fn count(what: &str, n: i64) -> PyResult<usize> {
    usize::try_from(n).map_err(|_| PyValueError::new_err(format!("{what} is {n}: expected no negative number")))
}

/// Sequences as Python names them.
struct Sequences {
    /// First position held, length and new positions.
    counts: Vec<[usize; 3]>,
    tables: Vec<Vec<u32>>,
}

impl Sequences {
    fn new(
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
        let tables = tables.iter().map(|t| t.iter().map(|&p| u32::try_from(p).unwrap_or(NO_PAGE)).collect()).collect();
        let counted = |i: usize| Ok([count("first", first[i])?, count("a length", lens[i])?, count("new", new[i])?]);
        Ok(Sequences { counts: (0..lens.len()).map(counted).collect::<PyResult<_>>()?, tables })
    }

    fn spans(&self) -> Vec<Span<'_>> {
        let each = self.counts.iter().zip(&self.tables);
        each.map(|(&[first, len, new], pages)| Span { first, len, new, pages }).collect()
    }
}

impl Batch {
    fn lock(&self) -> MutexGuard<'_, ops::Batch> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it says now.
    pub fn now(&self) -> ops::Batch {
        self.lock().clone()
    }
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
        let sequences = Sequences::new(lens, new, pages, first)?;
        let batch = ops::Batch::new(device, page_size, &sequences.spans()).or_raise()?;
        Ok(Batch { batch: Mutex::new(batch), device: device.clone() })
    }

    /// One sequence in a pool of one page as long as the cache, in which positions wrap around.
    #[staticmethod]
    #[pyo3(signature = (device, capacity, len, new, first = 0))]
    fn contiguous(device: &Device, capacity: usize, len: usize, new: usize, first: usize) -> PyResult<Self> {
        let batch = ops::Batch::contiguous(device, capacity, first, len, new).or_raise()?;
        Ok(Batch { batch: Mutex::new(batch), device: device.clone() })
    }

    /// Other lengths and pages for as many sequences, with as many new positions each; tables may be as long as the longest was. On an
    /// NVIDIA GPU a graph that was captured with this batch goes on with them.
    ///
    /// Raises :class:`MismatchError` for other numbers of sequences or new positions or longer tables, :class:`PageError` and
    /// :class:`AliasedError` for pages that a captured operation could not take, :class:`UnsupportedError` during a capture. Nothing has
    /// changed then.
    #[pyo3(signature = (lens, new, pages, first = None))]
    fn update(
        &self,
        py: Python<'_>,
        lens: &Bound<'_, PyAny>,
        new: &Bound<'_, PyAny>,
        pages: &Bound<'_, PyAny>,
        first: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let sequences = Sequences::new(lens, new, pages, first)?;
        self.device.run(py, || self.lock().update(&sequences.spans()))
    }

    #[getter]
    fn sequences(&self) -> usize {
        self.lock().sequences()
    }

    #[getter]
    fn tokens(&self) -> usize {
        self.lock().tokens()
    }

    #[getter]
    fn page_size(&self) -> usize {
        self.lock().page_size()
    }
}
