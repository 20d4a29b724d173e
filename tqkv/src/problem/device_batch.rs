//! Batches whose page tables, and lengths, lie in the device's memory: another engine's.

use super::Batch;
use super::batch::{Bounds, Inner, MOST_POSITIONS, Source, SpanInfo};
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product, to_u32};
use crate::format::DType;
use std::sync::Arc;

/// Page tables in the device's memory. Entries are integers of 32 or 64 bits ([`DType::U32`], which stands for signed ones too, or
/// [`DType::I64`]): entry j of sequence i is element i · stride + j of `entries`. Position p lies in the page of entry p / page_size. Entries
/// that no position needs may be anything.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTables<'a> {
    /// The entries, in any shape.
    pub entries: &'a Buffer,
    /// Entries of a sequence.
    pub width: usize,
    /// Elements from one sequence's first entry to the next one's.
    pub stride: usize,
    /// Pages that the pools have: an entry is less.
    pub pages: usize,
}

/// How long the sequences of a batch with [`DeviceTables`] are.
#[derive(Clone, Copy, Debug)]
pub enum Lengths<'a> {
    /// As the host knows: positions held, and how many of them are new, of each sequence.
    Host(&'a [(usize, usize)]),
    /// As the device's memory says, whatever it holds by the time: integers of 32 or 64 bits.
    Device {
        /// Positions that each sequence holds, the new ones included: at least as many elements as sequences. One of length 0 has no part.
        lens: &'a Buffer,
        /// Where each sequence's new tokens start among those of the batch, and at last where they end: at least one element more. A sequence may
        /// have none.
        starts: &'a Buffer,
        /// What they are at most. Kernels are chosen for it, and results do not depend on it but for their rounding.
        most: Bounds,
    },
}

impl Batch {
    /// Sequences whose page tables lie in the device's memory. [`refresh`](crate::ops::refresh) reads them, once before the operations of a
    /// step; operations then attend as with any batch, and [`quantize_at`](crate::ops::quantize_at) writes. With [`Lengths::Device`] nothing of
    /// a step is known to the host, so that a graph that was captured once serves all further steps.
    ///
    /// An entry, a length or a start that is out of range is not followed: it counts as 0, or as what is the most, and
    /// [`out_of_range`](Batch::out_of_range) says how many there were.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on devices other than CUDA; [`Error::Zero`] for a page_size, width or number of pages or sequences of 0;
    /// [`Error::DType`] for other than 32- or 64-bit integers; [`Error::TooSmall`] if the buffers have fewer elements than that;
    /// [`Error::Mismatch`] for a stride below the width; [`Error::Positions`] for a length of more positions than the table has;
    /// [`Error::TooLarge`] for more new positions than held, or a length past 2^31 - 2^16; [`Error::WrongDevice`], [`Error::SizeOverflow`].
    pub fn on_device(device: &Device, page_size: usize, tables: DeviceTables, lengths: Lengths) -> Result<Self> {
        if !device.driver().reads_tables() {
            let what = "read page tables that lie in the device's memory".to_owned();
            return Err(Error::Unsupported { device: device.to_string(), what });
        }
        let DeviceTables { entries, width, stride, pages } = tables;
        let known: Vec<(usize, usize)>;
        let (spans, tokens, lengths) = match lengths {
            Lengths::Host(spans) => (spans, None, None),
            Lengths::Device { lens, starts, most } => {
                check_integers(device, "lengths", lens, most.sequences)?;
                check_integers(device, "query starts", starts, most.sequences.saturating_add(1))?;
                if lens.dtype() != starts.dtype() {
                    let expected = "as lengths are";
                    return Err(Error::DType { what: "query starts", got: starts.dtype().name(), expected });
                }
                known = vec![(most.len, most.new); most.sequences];
                (&known[..], Some(most.tokens), Some((lens.clone(), starts.clone(), most)))
            }
        };
        for (what, n) in
            [("page_size", page_size), ("width", width), ("pages", pages), ("sequences of a batch", spans.len())]
        {
            if n == 0 {
                return Err(Error::Zero { what });
            }
        }
        if stride < width {
            let expected = format!("at least {width}");
            return Err(Error::Mismatch { what: "stride of page tables", got: stride, expected });
        }
        let last = checked_product("page table", &[spans.len() - 1, stride])?;
        let needed = last.checked_add(width).ok_or(Error::SizeOverflow { what: "page table", limit: "usize" })?;
        check_integers(device, "page tables", entries, needed)?;
        checked_product("page table", &[spans.len(), width])?;
        let slots = checked_product("slots of a sequence", &[width, page_size])?;
        to_u32("slots of a sequence", slots)?;
        to_u32("pages", pages)?;
        let (mut infos, mut start) = (Vec::with_capacity(spans.len()), 0usize);
        for &(len, new) in spans {
            for (what, got, expected) in
                [("new positions of a sequence", new, len), ("length of a sequence", len, MOST_POSITIONS)]
            {
                if got > expected {
                    return Err(Error::TooLarge { what, got, expected });
                }
            }
            if len > slots {
                return Err(Error::Positions { start: 0, end: len, first: 0, len: slots });
            }
            infos.push(SpanInfo {
                first: 0,
                len: len as u32,
                start: to_u32("tokens of a batch", start)?,
                new: new as u32,
            });
            start = start.checked_add(new).ok_or(Error::SizeOverflow { what: "tokens of a batch", limit: "u32" })?;
        }
        let tokens = tokens.unwrap_or(start);
        to_u32("tokens of a batch", tokens.max(start))?;
        let inner = Inner {
            page_size,
            width,
            spans: infos,
            table: vec![],
            tokens,
            pages,
            writes_apart: false,
            source: Some(Source { entries: entries.clone(), stride, lengths }),
            device: device.clone(),
            generation: 0,
            kept: Arc::default(),
        };
        Ok(Batch(Arc::new(inner)))
    }

    /// How many entries, lengths and starts [`refresh`](crate::ops::refresh) found out of range so far, after all work submitted before: 0 for
    /// a batch that the host made. Waits for the device.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub fn out_of_range(&self) -> Result<usize> {
        if self.0.source.is_none() {
            return Ok(0);
        }
        let words = self.device_words()?;
        let last = words.len() - 1;
        Ok(words.slice(last..last + 1)?.read::<u32>()?.first().map_or(0, |&n| n as usize))
    }

    /// Where page tables, and lengths, are if the device's memory alone has them.
    pub(crate) fn source(&self) -> Option<&Source> {
        self.0.source.as_ref()
    }

    /// What lengths on the device are at most, if they are there.
    #[allow(dead_code)] // Not every backend asks.
    pub(crate) fn bounds(&self) -> Option<&Bounds> {
        self.source()?.lengths.as_ref().map(|(.., most)| most)
    }

    /// One past the largest page.
    #[allow(dead_code)] // Not every backend asks.
    pub(crate) fn pages(&self) -> usize {
        self.0.pages
    }
}

/// Fails unless a buffer has so many integers of 32 or 64 bits.
pub(crate) fn check_integers(device: &Device, what: &'static str, buffer: &Buffer, needed: usize) -> Result<()> {
    if buffer.device() != device {
        return Err(Error::wrong_device(what, buffer.device(), device));
    }
    if !matches!(buffer.dtype(), DType::U32 | DType::I64) {
        return Err(Error::DType { what, got: buffer.dtype().name(), expected: "u32 or i64" });
    }
    let expected = checked_product(what, &[needed, buffer.dtype().size()])?;
    if buffer.bytes() < expected {
        return Err(Error::TooSmall { what, got: buffer.bytes(), expected });
    }
    Ok(())
}
