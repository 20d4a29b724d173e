//! Memory for the K or the V of one layer.

use super::ChannelMap;
use super::checks::{expect_apart, expect_shape};
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product, to_u32};
use crate::format::{DType, Packing, RowFormat};

/// Pages of compressed vectors: the K or the V of one layer.
///
/// `codes` is u8 \[pages, kv_heads, page_size, row_bytes\] and `scales` \[pages, kv_heads, page_size, scales_per_row\]
/// (f16 native, f32 seed, absent for dense floats). A contiguous cache is a pool of one page as long as the cache; with
/// the seed codec that is mlx-native's layout. A clone is a view of the same memory.
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
        Ok(PagePool { row, kv_heads, page_size, pages, codes, scales, channels: None })
    }

    /// A pool over memory that is there already, in the shapes above.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], [`Error::Aliased`] if both are one memory, and those
    /// of [`PagePool::new`].
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
        let unit = match row.packing() {
            Packing::Float(dtype) => dtype.size(),
            _ => 1,
        };
        if !codes.offset().is_multiple_of(unit) {
            let expected = format!("a multiple of {unit}, so that floats are aligned");
            return Err(Error::Mismatch { what: "byte offset of codes", got: codes.offset(), expected });
        }
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
        Ok(PagePool { row, kv_heads, page_size, pages, codes: codes.clone(), scales: scales.cloned(), channels: None })
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

    /// The codes, u8 \[pages, kv_heads, page_size, row_bytes\].
    pub fn codes(&self) -> &Buffer {
        &self.codes
    }

    /// The scales, \[pages, kv_heads, page_size, scales_per_row\]; none for dense floats.
    pub fn scales(&self) -> Option<&Buffer> {
        self.scales.as_ref()
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.as_ref().map_or(0, Buffer::bytes)
    }

    /// Both buffers.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        std::iter::once(&self.codes).chain(&self.scales)
    }
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
