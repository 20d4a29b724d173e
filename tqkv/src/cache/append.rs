//! New positions of one layer.

use super::plan::Write;
use super::reserve::Change;
use super::state::{KvCache, Pools, SequenceId};
use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::ops::{check_quantize, record_quantize};

impl KvCache {
    /// Encodes new tokens at the end of sequences, in one layer. A [`Step`](super::Step) does so for all layers as one thing;
    /// here each layer has a length of its own until the others follow.
    ///
    /// `tokens` names each sequence once with its number of new tokens; `k` and `v` are \[tokens, kv_heads, head_dim\]
    /// (f32, f16 or bf16) with the sequences' tokens one after the other.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::SharedLayer`], [`Error::UnknownSequence`], [`Error::RepeatedSequence`],
    /// [`Error::OutOfPages`], and those of [`ops::quantize`](crate::ops::quantize). Nothing is appended then.
    pub fn append(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        tokens: &[(SequenceId, usize)],
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        let (extents, shape) = self.own_layer(layer)?;
        let spans = self.spans(layer, tokens, true)?;
        let (groups, mut changes) = (self.shapes[shape].clone(), vec![]);
        let recorded = self.reserve(groups, &spans, &mut changes).and_then(|()| {
            let writes = self.writes(shape, &spans)?;
            let copies = changes.iter().filter_map(Change::copy);
            let copies = copies.flat_map(|(g, from, to)| self.group_pools(g).map(move |pools| (pools, from, to)));
            record(encoder, &extents, &writes, k, v, copies)
        });
        match recorded {
            Ok(()) => self.settle(changes, &[layer], &spans),
            Err(_) => self.undo(changes, false),
        }
        recorded
    }

    /// The extents and the shape of a layer that is not shared.
    pub(super) fn own_layer(&self, layer: usize) -> Result<(std::sync::Arc<[Pools]>, usize)> {
        let found = self.layer(layer)?;
        if found.source != layer {
            return Err(Error::SharedLayer { layer, source_layer: found.source });
        }
        Ok((found.extents.clone(), found.shape))
    }
}

/// Records the copies of shared pages, then the writes into a layer's extents. Nothing is recorded before all is checked: what
/// is recorded cannot be undone.
pub(super) fn record<'a>(
    encoder: &mut CommandEncoder,
    extents: &[Pools],
    writes: &[Write],
    k: &Buffer,
    v: &Buffer,
    copies: impl Iterator<Item = (&'a Pools, u32, u32)>,
) -> Result<()> {
    let mut rows = Vec::with_capacity(writes.len());
    for Write { extent, tokens, batch } in writes {
        // The first write is of all tokens, whose number it checks.
        let part = |x: &Buffer| if *extent == 0 { Ok(x.clone()) } else { x.slice(tokens.clone()) };
        let (k, v, pools) = (part(k)?, part(v)?, &extents[*extent]);
        check_quantize(encoder, &[(&k, &pools.key), (&v, &pools.value)], batch)?;
        rows.push((k, v, pools, batch));
    }
    for (pools, from, to) in copies {
        pools.copy_page(encoder, from, to)?;
    }
    let writes: Vec<_> =
        rows.iter().map(|(k, v, pools, batch)| (vec![(k, &pools.key), (v, &pools.value)], *batch)).collect();
    record_quantize(encoder, &writes)
}
