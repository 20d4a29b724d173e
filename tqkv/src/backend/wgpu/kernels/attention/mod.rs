//! Attention over compressed rows: a pass that is split over the context, and one that joins the splits.
//!
//! A workgroup takes the query heads of one KV head (for several queries, some of them) and a run of positions. For each
//! tile of positions: a thread decodes the keys of some positions and scores them against all its queries; a softmax step
//! with a running maximum; then each thread decodes its elements of the values. So each row is decoded once for all queries.
//! Tiles are a subgroup's own where its size is known, and no thread waits for another subgroup before the end.
//!
//! Codes, scales and page tables are loaded a step before they are used, across tiles too. What lies past the workgroup's
//! positions is loaded from its last row or page, and weighs nothing.
//!
//! Scores are sums of two floats (Knuth's two-sum): in the hundreds, one f32 steps by 3e-5, and what is subtracted before
//! exp must be finer. Where a query's and a key's norm make it possible that a score is huge, its products are kept as two
//! floats too; and where one is so large that f32 steps by whole numbers, so is the running maximum: the second float of a
//! score would overflow exp otherwise.
//!
//! What a query does not see, and what has no positions, may be anything. It is never multiplied by a weight of zero: NaN would
//! come of it.
//!
//! ```text
//! record, plan                  what is launched: runs of queries, splits
//! kernel, teams                 what a kernel is specialised on, how its threads share the work
//! source                        its text, by phase: rows, queries, scores (exact), softmax, values, sums
//! join                          the second pass
//! ```

mod exact;
pub mod join;
pub mod kernel;
mod plan;
mod queries;
pub mod record;
mod rows;
mod scores;
mod softmax;
mod source;
mod sums;
mod teams;
mod values;
