//! Batches whose content lies in the device's memory.

use crate::compute::CommandEncoder;
use crate::error::Result;
use crate::problem::Batch;
use crate::problem::op::Op;

/// Reads the page tables, and lengths, that a batch [on the device](Batch::on_device) stands for, and plans for them, on the device: once a
/// step, before all operations of all layers, in one launch (and one more for each further kind of attention: another window, number of heads or
/// codec). It may be captured in a graph with them, or go before each launch of one. After operations of a new kind were recorded with
/// the batch, record it anew.
///
/// A batch that the host made is as it is: nothing is recorded.
///
/// # Errors
/// [`Error::WrongDevice`](crate::Error::WrongDevice), and [`Error::OutOfMemory`](crate::Error::OutOfMemory) the first time.
pub fn refresh(encoder: &mut CommandEncoder, batch: &Batch) -> Result<()> {
    encoder.expect_device("batch", batch.device())?;
    if batch.source().is_none() { Ok(()) } else { Op::Refresh(batch.clone()).record(encoder) }
}
