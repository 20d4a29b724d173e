//! Whether a cache has room for what is to come, found out before anything is appended.

use crate::cache::SequenceCache;
use crate::error::Result;
use std::collections::BTreeMap;
use tqkv::cache::{LayerKind, Side};

/// Positions that the layers without a window hold at most.
pub fn positions(cache: &SequenceCache) -> Result<usize> {
    let full = pages_by_kind(cache)?.remove(&LayerKind::Full);
    Ok(full.map_or(usize::MAX, |pages| pages.saturating_mul(cache.kv().config().positions_per_page())))
}

/// Fails unless `new` tokens, in chunks, have room after the first `held`.
pub fn expect(cache: &SequenceCache, held: usize, new: usize, chunk: usize) -> Result<()> {
    let page_size = cache.kv().config().positions_per_page();
    for (kind, pages) in pages_by_kind(cache)? {
        // Layers without a window give up nothing between chunks.
        let (mut start, chunk) = (held, if kind == LayerKind::Full { new } else { chunk });
        while start < held.saturating_add(new) {
            let end = start.saturating_add(chunk).min(held.saturating_add(new));
            // Before a chunk a window's pages that its first token does not see are given up.
            let first = match kind {
                LayerKind::Window(window) => (start + 1).saturating_sub(window) / page_size,
                _ => 0,
            };
            let needed = end.div_ceil(page_size) - first;
            if needed > pages {
                let used = start.div_ceil(page_size) - first;
                let (needed, free) = (needed - used, pages.saturating_sub(used));
                return Err(tqkv::Error::OutOfPages { needed, free, pages }.into());
            }
            start = end;
        }
    }
    Ok(())
}

/// Pages of each kind of layer; a [`SequenceCache`] gives all of them to its one sequence.
fn pages_by_kind(cache: &SequenceCache) -> Result<BTreeMap<LayerKind, usize>> {
    let (kv, mut pages) = (cache.kv(), BTreeMap::new());
    for layer in 0..kv.config().layers() {
        let kind = kv.config().layer_kind(layer);
        if !matches!(kind, LayerKind::Shared(_)) {
            pages.insert(kind, kv.pool(layer, Side::Key)?.pages());
        }
    }
    Ok(pages)
}
