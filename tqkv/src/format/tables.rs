//! What is derived from a row format, made once a process. Backends put it on their devices in the form that their kernels take.

use super::scalar::cells::Cells;
use super::{Codebook, Codec, RowFormat, SignWords};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

/// Signs, levels and look-ups of a codec at a row_dim.
#[derive(Debug)]
pub(crate) struct Tables {
    /// Which elements are negated before the transform.
    pub signs: SignWords,
    /// Levels and boundaries; none for dense floats.
    pub book: Option<&'static Codebook>,
    /// Codes without a search; none for dense floats.
    pub cells: Option<Cells>,
}

type Made = HashMap<(Codec, usize), Arc<Tables>>;

/// The tables of a row.
pub(crate) fn tables(row: &RowFormat) -> Arc<Tables> {
    static MADE: LazyLock<RwLock<Made>> = LazyLock::new(RwLock::default);
    let key = (row.codec(), row.row_dim());
    if let Some(found) = MADE.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return found.clone();
    }
    let book = row.codebook();
    let new = Tables { signs: row.signs(), book, cells: book.map(|book| Cells::new(&book.boundaries)) };
    MADE.write().unwrap_or_else(PoisonError::into_inner).entry(key).or_insert_with(|| Arc::new(new)).clone()
}
