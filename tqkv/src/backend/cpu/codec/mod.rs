//! Codecs: how rows are rotated, encoded, decoded, and read by attention. Each packing is a file; `choose` alone knows them all.

mod bytes;
mod choose;
mod coder;
mod dense;
mod encode;
mod float;
mod interface;
mod levels;
mod planes;
mod rotate;
mod tables;

pub(super) use choose::Way;
pub(super) use coder::RowCoder;
pub(super) use interface::{Read, Visit};
pub(super) use tables::RowTables;
