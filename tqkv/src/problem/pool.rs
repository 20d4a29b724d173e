//! Memory for the K or the V of one layer.

use super::ChannelMap;
use super::checks::{bound_twice, expect_apart, expect_shape};
use super::strides::{Rows, Strides};
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product, to_u32};
use crate::format::{DType, Packing, RowFormat};

/// Pages of compressed vectors: the K or the V of one layer.
///
/// `codes` is u8 \[pages, kv_heads, page_size, row_bytes\] and `scales` \[pages, kv_heads, page_size, scales_per_row\]
/// (f16 native, f32 seed, absent for dense floats), unless the pool was made with [`strided`](PagePool::strided). A contiguous
/// cache is a pool of one page as long as the cache; with the seed codec that is mlx-native's layout. A clone is a view of the
/// same memory.
///
/// ```
/// use tqkv::format::RowFormat;
/// use tqkv::{Codec, Device, ops::PagePool};
///
/// let device = Device::cpu();
/// // 4 bits, head_dim 128: 64 bytes of codes and an f16 scale a row. 8 KV heads, 10 pages of 16 positions.
/// let pool = PagePool::new(&device, RowFormat::new(Codec::tq(4), 128)?, 8, 16, 10)?;
/// assert_eq!(pool.codes().shape(), [10, 8, 16, 64]);
/// assert_eq!(pool.scales().map(|s| s.shape()), Some(&[10, 8, 16, 1][..]));
/// assert_eq!(pool.bytes(), 10 * 8 * 16 * 66);
/// // The same memory as another pool's.
/// let view = PagePool::from_buffers(*pool.row(), pool.codes(), pool.scales())?;
/// assert_eq!(view.pages(), 10);
/// # Ok::<(), tqkv::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PagePool {
    row: RowFormat,
    kv_heads: usize,
    page_size: usize,
    pages: usize,
    codes: Buffer,
    scales: Option<Buffer>,
    /// Of codes and of scales.
    strides: (Strides, Strides),
    channels: Option<ChannelMap>,
}

impl PagePool {
    /// A pool of zeros.
    ///
    /// # Errors
    /// [`Error::Zero`] for a count of 0, [`Error::SizeOverflow`] if a page or the number of rows exceeds 32 bits, and
    /// what [`Device::zeros`] says.
    pub fn new(device: &Device, row: RowFormat, kv_heads: usize, page_size: usize, pages: usize) -> Result<Self> {
        check_geometry(&row, kv_heads, page_size, pages)?;
        let codes = device.zeros(DType::U8, &[pages, kv_heads, page_size, row.row_bytes()])?;
        let scales = match row.scales_per_row() {
            0 => None,
            n => Some(device.zeros(row.scale_dtype(), &[pages, kv_heads, page_size, n])?),
        };
        Ok(PagePool::dense(row, codes, scales))
    }

    /// Of buffers that are checked, in the shapes above.
    fn dense(row: RowFormat, codes: Buffer, scales: Option<Buffer>) -> Self {
        let [pages, kv_heads, page_size] = std::array::from_fn(|i| codes.shape()[i]);
        let strides = dense(&row, kv_heads, page_size);
        PagePool { row, kv_heads, page_size, pages, codes, scales, strides, channels: None }
    }

    /// A pool over memory that is there already, in the shapes above.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], [`Error::Aliased`] if they overlap, [`Error::Mismatch`] if floats
    /// or scales are not aligned, and those of [`PagePool::new`].
    pub fn from_buffers(row: RowFormat, codes: &Buffer, scales: Option<&Buffer>) -> Result<Self> {
        let &[pages, kv_heads, page_size, row_bytes] = codes.shape() else {
            return Err(Error::shape("codes", codes.shape(), "[pages, kv_heads, page_size, row_bytes]"));
        };
        check_geometry(&row, kv_heads, page_size, pages)?;
        if row_bytes != row.row_bytes() {
            let expected = format!("[{pages}, {kv_heads}, {page_size}, {}]", row.row_bytes());
            return Err(Error::shape("codes", codes.shape(), expected));
        }
        if codes.dtype() != DType::U8 {
            return Err(Error::DType { what: "codes", got: codes.dtype().name(), expected: "u8" });
        }
        expect_aligned(&row, codes, scales)?;
        match (row.scales_per_row(), scales) {
            (0, None) => {}
            (0, Some(s)) => return Err(Error::shape("scales", s.shape(), "none: dense floats have no scales")),
            (n, None) => return Err(Error::shape("scales", &[], format!("[{pages}, {kv_heads}, {page_size}, {n}]"))),
            (n, Some(s)) => {
                expect_shape("scales", s, &[pages, kv_heads, page_size, n])?;
                if s.dtype() != row.scale_dtype() {
                    let expected = if row.scale_dtype() == DType::F16 { "f16" } else { "f32" };
                    return Err(Error::DType { what: "scales", got: s.dtype().name(), expected });
                }
                if s.device() != codes.device() {
                    return Err(Error::wrong_device("scales", s.device(), codes.device()));
                }
                expect_apart("scales", s, [codes])?;
            }
        }
        Ok(PagePool::dense(row, codes.clone(), scales.cloned()))
    }

    /// A pool over memory that is there already, with strides of the caller's: page 0's first row starts where `codes` starts, and
    /// its scales where `scales` starts. The buffers' types and shapes do not matter; both may be views of one memory (a row's
    /// scales after its codes, say), and K and V of a layer may lie between each other in one tensor.
    ///
    /// ```
    /// use tqkv::{Codec, DType, Device, format::RowFormat, ops::{PagePool, Strides}};
    /// // A tensor of bytes [pages, 2, kv_heads, page_size, bytes], K and V of a page side by side, scales after codes.
    /// let (device, row) = (Device::cpu(), RowFormat::new(Codec::tq(4), 128)?);
    /// let (pages, kv_heads, page_size, bytes) = (64, 8, 16, row.bytes());
    /// let tensor = device.zeros(DType::U8, &[pages * 2 * kv_heads * page_size * bytes])?;
    /// let half = kv_heads * page_size * bytes;
    /// let strides = Strides { page: 2 * half, ..Strides::dense(kv_heads, page_size, bytes) };
    /// let side = |from: usize| {
    ///     let (codes, scales) = (tensor.slice(from..tensor.len())?, tensor.slice(from + row.row_bytes()..tensor.len())?);
    ///     PagePool::strided(row, [pages, kv_heads, page_size], (&codes, strides), Some((&scales, strides)))
    /// };
    /// let (key, value) = (side(0)?, side(half)?);
    /// assert!(!key.overlaps(&value));
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a stride that is less than what it steps over (so no two rows overlap), or that leaves floats or
    /// scales unaligned; [`Error::TooSmall`] if the last row does not lie in its buffer; [`Error::Aliased`] if codes and scales
    /// overlap; [`Error::Unsupported`] for strides that leave gaps on wgpu; [`Error::Shape`] for scales that
    /// the format lacks or needs; [`Error::WrongDevice`], and those of [`PagePool::new`].
    pub fn strided(
        row: RowFormat,
        [pages, kv_heads, page_size]: [usize; 3],
        codes: (&Buffer, Strides),
        scales: Option<(&Buffer, Strides)>,
    ) -> Result<Self> {
        check_geometry(&row, kv_heads, page_size, pages)?;
        let shape = [pages, kv_heads, page_size];
        let code_rows = within("codes", "stride of codes", codes, shape, row.row_bytes())?;
        let mut pool = PagePool {
            row,
            kv_heads,
            page_size,
            pages,
            codes: codes.0.retyped(DType::U8, &[code_rows.extent()]),
            scales: None,
            strides: (codes.1, Strides::default()),
            channels: None,
        };
        match (row.scales_per_row(), scales) {
            (0, None) => {}
            (0, Some((s, _))) => return Err(Error::shape("scales", s.shape(), "none: dense floats have no scales")),
            (n, None) => return Err(Error::shape("scales", &[], format!("[{pages}, {kv_heads}, {page_size}, {n}]"))),
            (_, Some((s, strides))) => {
                let rows = within("scales", "stride of scales", (s, strides), shape, row.scale_bytes())?;
                if s.device() != codes.0.device() {
                    return Err(Error::wrong_device("scales", s.device(), codes.0.device()));
                }
                if meet((&pool.codes, &code_rows), (s, &rows)) || bound_twice(s, codes.0) {
                    return Err(Error::Aliased { what: "scales" });
                }
                let size = row.scale_dtype().size();
                pool.scales = Some(s.retyped(row.scale_dtype(), &[rows.extent() / size]));
                pool.strides.1 = strides;
            }
        }
        expect_aligned(&row, &pool.codes, pool.scales.as_ref())?;
        pool.expect_aligned_strides()?;
        pool.without_gaps()
    }

    /// As [`dense`](PagePool::dense) if there is no gap; else only for devices that take strides.
    fn without_gaps(mut self) -> Result<Self> {
        let normal = dense(&self.row, self.kv_heads, self.page_size);
        // An axis of one step has no stride.
        let strides = |given: Strides, normal: Strides| {
            let of = |steps, given, normal| if steps == 1 { normal } else { given };
            Strides {
                page: of(self.pages, given.page, normal.page),
                head: of(self.kv_heads, given.head, normal.head),
                row: of(self.page_size, given.row, normal.row),
            }
        };
        self.strides = (strides(self.strides.0, normal.0), strides(self.strides.1, normal.1));
        if self.strides == normal {
            let [pages, kv_heads, page_size] = [self.pages, self.kv_heads, self.page_size];
            let codes = self.codes.reshape(&[pages, kv_heads, page_size, self.row.row_bytes()])?;
            let per_row = self.row.scales_per_row();
            let scales = self.scales.map(|s| s.reshape(&[pages, kv_heads, page_size, per_row])).transpose()?;
            return Ok(PagePool::dense(self.row, codes, scales));
        }
        let device = self.codes.device();
        if !device.driver().takes_strides() {
            let what = format!("read a pool of {:?}, only one without gaps", self.strides);
            return Err(Error::Unsupported { device: device.to_string(), what });
        }
        Ok(self)
    }

    fn expect_aligned_strides(&self) -> Result<()> {
        let (codes, scales) = (unit(&self.row), self.row.scale_dtype().size());
        let own = [self.pages, self.kv_heads, self.page_size];
        for (what, strides, unit) in
            [("stride of codes", self.strides.0, codes), ("stride of scales", self.strides.1, scales)]
        {
            for (stride, steps) in [strides.page, strides.head, strides.row].into_iter().zip(own) {
                if steps > 1 && !stride.is_multiple_of(unit) {
                    let expected = format!("a multiple of {unit}, so that floats are aligned");
                    return Err(Error::Mismatch { what, got: stride, expected });
                }
            }
        }
        Ok(())
    }

    /// Whether a row of this pool has a byte in common with one of the other. Pools may lie between each other: it is rows that
    /// count, not the gaps between them.
    pub fn overlaps(&self, other: &PagePool) -> bool {
        let parts = |pool: &PagePool| {
            let codes = (pool.codes.clone(), pool.strides.0, pool.row.row_bytes());
            let scales = pool.scales.clone().map(|s| (s, pool.strides.1, pool.row.scale_bytes()));
            let shape = [pool.pages, pool.kv_heads, pool.page_size];
            let rows = |(buffer, strides, bytes)| Some((buffer, Rows::new("rows", shape, strides, bytes).ok()?));
            std::iter::once(codes).chain(scales).filter_map(rows).collect::<Vec<_>>()
        };
        let others = parts(other);
        parts(self).iter().any(|(a, x)| others.iter().any(|(b, y)| meet((a, x), (b, y)) || bound_twice(a, b)))
    }

    /// The same memory, whose rows hold keys through a map of their channels: what is written passes through it, and what is
    /// read in the model's own domain back.
    ///
    /// # Errors
    /// [`Error::Shape`] for a map of other heads or another head_dim, [`Error::WrongDevice`].
    pub fn with_channels(self, map: &ChannelMap) -> Result<Self> {
        map.expect_for(self.codes.device(), self.kv_heads, self.row.head_dim())?;
        Ok(PagePool { channels: Some(map.clone()), ..self })
    }

    /// The map of its rows' channels, if they have one.
    pub fn channels(&self) -> Option<&ChannelMap> {
        self.channels.as_ref()
    }

    /// How a vector is stored.
    pub fn row(&self) -> &RowFormat {
        &self.row
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Positions of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The codes, u8 \[pages, kv_heads, page_size, row_bytes\]; with strides that leave gaps, all bytes from the first row to the
    /// last.
    pub fn codes(&self) -> &Buffer {
        &self.codes
    }

    /// The scales, \[pages, kv_heads, page_size, scales_per_row\]; none for dense floats. With strides that leave gaps, all from the
    /// first row's to the last's.
    pub fn scales(&self) -> Option<&Buffer> {
        self.scales.as_ref()
    }

    /// Strides of codes and of scales, in bytes.
    pub fn strides(&self) -> (Strides, Strides) {
        self.strides
    }

    /// Whether rows lie one behind the other, and so do their scales.
    #[allow(dead_code)] // Not every backend asks.
    pub(crate) fn is_dense(&self) -> bool {
        self.strides == dense(&self.row, self.kv_heads, self.page_size)
    }

    /// Bytes of codes and scales, without what lies between them.
    pub fn bytes(&self) -> usize {
        self.pages * self.kv_heads * self.page_size * self.row.bytes()
    }

    /// Both buffers.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        std::iter::once(&self.codes).chain(&self.scales)
    }
}

fn dense(row: &RowFormat, kv_heads: usize, page_size: usize) -> (Strides, Strides) {
    (Strides::dense(kv_heads, page_size, row.row_bytes()), Strides::dense(kv_heads, page_size, row.scale_bytes()))
}

/// Rows of a buffer, which must hold them.
fn within(
    what: &'static str,
    stride: &'static str,
    (buffer, strides): (&Buffer, Strides),
    shape: [usize; 3],
    bytes: usize,
) -> Result<Rows> {
    let rows = Rows::new(stride, shape, strides, bytes)?;
    if rows.extent() > buffer.bytes() {
        return Err(Error::TooSmall { what, got: buffer.bytes(), expected: rows.extent() });
    }
    Ok(rows)
}

fn meet((a, x): (&Buffer, &Rows), (b, y): (&Buffer, &Rows)) -> bool {
    a.may_meet(b) && x.meet(y, b.address().wrapping_sub(a.address()) as isize)
}

/// What the codes' place must be a multiple of.
fn unit(row: &RowFormat) -> usize {
    match row.packing() {
        Packing::Float(dtype) => dtype.size(),
        _ => 1,
    }
}

/// Floats and scales must lie where their types can.
fn expect_aligned(row: &RowFormat, codes: &Buffer, scales: Option<&Buffer>) -> Result<()> {
    let scales = scales.map(|s| ("byte offset of scales", s, row.scale_dtype().size()));
    for (what, buffer, unit) in std::iter::once(("byte offset of codes", codes, unit(row))).chain(scales) {
        if !buffer.address().is_multiple_of(unit) {
            let expected = format!("a multiple of {unit}, so that floats are aligned");
            return Err(Error::Mismatch { what, got: buffer.offset(), expected });
        }
    }
    Ok(())
}

/// Fails unless a pool of this geometry can exist.
pub(crate) fn check_geometry(row: &RowFormat, kv_heads: usize, page_size: usize, pages: usize) -> Result<()> {
    for (what, n) in [("kv_heads", kv_heads), ("page_size", page_size), ("pages", pages)] {
        if n == 0 {
            return Err(Error::Zero { what });
        }
    }
    // Kernels count rows, and bytes within a page, in 32 bits.
    to_u32("rows of a pool", checked_product("rows of a pool", &[pages, kv_heads, page_size])?)?;
    to_u32("bytes of a page", checked_product("bytes of a page", &[kv_heads, page_size, row.row_bytes()])?)?;
    Ok(())
}
