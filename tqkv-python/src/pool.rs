//! Pools and batches.

use crate::array::Array;
use crate::device::{Device, one_codec};
use crate::error::{OrRaise, raise};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tqkv::Buffer;
use tqkv::format::RowFormat;
use tqkv::ops::{self, Bounds, DeviceTables, Lengths, NO_PAGE, Span, Strides};

/// Pages of compressed vectors: the K or the V of one layer. ``codec`` is one side's: ``tq4``, ``f16``, ``seed4``.
#[pyclass(frozen, module = "tqkv", name = "PagePool")]
pub struct PagePool {
    pub pool: ops::PagePool,
    pub device: Device,
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
        Ok(PagePool { pool, device: device.clone(), _owners: vec![] })
    }

    /// A pool in memory of someone else's, without a copy, which it keeps alive: ``codes`` is
    /// uint8 [pages, kv_heads, page_size, row_bytes] (or the floats themselves of a dense codec) and ``scales``
    /// [pages, kv_heads, page_size, scales] (float16, float32 for seed codecs). Both may be strided views (not on wgpu), also of one
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
        Ok(PagePool { pool, device: device.clone(), _owners: owners })
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
    /// Arrays on the device that it reads.
    _owners: Vec<Py<PyAny>>,
}

/// Page tables in the device's memory.
struct Tables {
    array: Array,
    entries: Buffer,
    width: usize,
    stride: usize,
    pages: usize,
}

impl Tables {
    fn new(device: &Device, tables: &Bound<'_, PyAny>, sequences: usize, pages: usize) -> PyResult<Self> {
        let array = Array::new("tables", tables)?;
        let fails =
            |expected: String| Err(raise(tqkv::Error::Shape { what: "tables", got: array.shape.clone(), expected }));
        let (&[rows, width], &[row, entry]) = (&array.shape[..], &array.strides[..]) else {
            return fails("[sequences, entries of a sequence]".to_owned());
        };
        if rows != sequences {
            return fails(format!("[{sequences}, entries of a sequence]"));
        }
        if width > 1 && entry != array.dtype.size() {
            return Err(PyValueError::new_err("tables have gaps within rows: expected a last axis without strides"));
        }
        // Of one row, the distance to the next says nothing.
        let stride = if rows > 1 { row / array.dtype.size() } else { width };
        Ok(Tables { entries: array.elements(device)?, width, stride, pages, array })
    }

    fn of(&self) -> DeviceTables<'_> {
        DeviceTables { entries: &self.entries, width: self.width, stride: self.stride, pages: self.pages }
    }
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
    fn of(batch: ops::Batch, device: &Device, owners: Vec<Py<PyAny>>) -> Self {
        Batch { batch: Mutex::new(batch), device: device.clone(), _owners: owners }
    }

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
        Ok(Batch::of(batch, device, vec![]))
    }

    /// One sequence in a pool of one page as long as the cache, in which positions wrap around.
    #[staticmethod]
    #[pyo3(signature = (device, capacity, len, new, first = 0))]
    fn contiguous(device: &Device, capacity: usize, len: usize, new: usize, first: usize) -> PyResult<Self> {
        let batch = ops::Batch::contiguous(device, capacity, first, len, new).or_raise()?;
        Ok(Batch::of(batch, device, vec![]))
    }

    /// Sequences whose page tables lie in the device's memory (CUDA), and are read there by every :func:`refresh`: ``tables`` is int32 or
    /// int64, [sequences, width], its rows at any distance; entries that no held position needs may be anything. Pools have ``pages``
    /// pages. ``lens`` and ``new`` are known to the host, as in a batch of its own.
    ///
    /// Such a batch attends; :func:`quantize_at` writes. An entry that is out of range is not followed: see ``out_of_range``.
    ///
    /// Raises :class:`UnsupportedError` on other devices, :class:`ShapeError`, :class:`DTypeError`, :class:`ZeroError`,
    /// :class:`PositionsError`, :class:`TooLargeError`, :class:`WrongDeviceError`.
    #[staticmethod]
    fn with_tables(
        py: Python<'_>,
        device: &Device,
        page_size: usize,
        tables: &Bound<'_, PyAny>,
        pages: usize,
        lens: &Bound<'_, PyAny>,
        new: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let (lens, new) = (integers("lens", lens)?, integers("new", new)?);
        if lens.len() != new.len() {
            let message =
                format!("lens and new are of {} and {} sequences: expected as many of each", lens.len(), new.len());
            return Err(PyValueError::new_err(message));
        }
        let counted = |(len, new): (&i64, &i64)| Ok((count("a length", *len)?, count("new", *new)?));
        let spans: Vec<(usize, usize)> = lens.iter().zip(&new).map(counted).collect::<PyResult<_>>()?;
        let tables = Tables::new(device, tables, spans.len(), pages)?;
        let owners = vec![tables.array.owner(py)];
        let batch = ops::Batch::on_device(device, page_size, tables.of(), Lengths::Host(&spans)).or_raise()?;
        Ok(Batch::of(batch, device, owners))
    }

    /// Sequences of which the host knows nothing: page tables as in :meth:`with_tables`, and ``lens`` and ``starts`` lie in the device's
    /// memory, int32 or int64, and are read by every :func:`refresh`, so that a graph that was captured once serves all further steps.
    ///
    /// ``lens`` is [sequences], the new positions counted in; a sequence of length 0 has no part. ``starts`` is [sequences + 1], where each
    /// sequence's new tokens start, and where the last ones end. ``tokens`` is how many queries and outputs have room for; those of no
    /// sequence are not written. ``most_new`` and ``most_len`` bound what a sequence has.
    ///
    /// An entry, a length or a start that is out of range is not followed: see ``out_of_range``.
    ///
    /// Raises what :meth:`with_tables` does.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    fn on_device(
        py: Python<'_>,
        device: &Device,
        page_size: usize,
        tables: &Bound<'_, PyAny>,
        pages: usize,
        lens: &Bound<'_, PyAny>,
        starts: &Bound<'_, PyAny>,
        tokens: usize,
        most_new: usize,
        most_len: usize,
    ) -> PyResult<Self> {
        let (lens, starts) = (Array::new("lens", lens)?, Array::new("starts", starts)?);
        for (what, array) in [("lens", &lens), ("starts", &starts)] {
            if array.shape.len() != 1 || !array.is_dense() {
                return Err(PyValueError::new_err(format!("{what} is no dense list: got {:?}", array.shape)));
            }
        }
        let most = Bounds { sequences: lens.shape[0], tokens, new: most_new, len: most_len };
        let tables = Tables::new(device, tables, most.sequences, pages)?;
        let owners = [&tables.array, &lens, &starts].map(|array| array.owner(py)).into();
        let (lens, starts) = (lens.elements(device)?, starts.elements(device)?);
        let lengths = Lengths::Device { lens: &lens, starts: &starts, most };
        let batch = ops::Batch::on_device(device, page_size, tables.of(), lengths).or_raise()?;
        Ok(Batch::of(batch, device, owners))
    }

    /// How many entries of tables, lengths and starts on the device were out of range so far. Waits for the device.
    #[getter]
    fn out_of_range(&self, py: Python<'_>) -> PyResult<usize> {
        let batch = self.now();
        self.device.run(py, || batch.out_of_range())
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
