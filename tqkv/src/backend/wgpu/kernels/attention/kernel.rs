//! What the first pass is specialised on, and its parameters.

use super::teams::Teams;
use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::codec::key::Stored;
use crate::backend::wgpu::gpu::Gpu;
use crate::backend::wgpu::wgsl::builder::THREADS;
use crate::backend::wgpu::wgsl::params::params;
use crate::backend::wgpu::wgsl::tensor::Tensor;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionKernel {
    pub key: Stored,
    pub value: Stored,
    pub q: Tensor,
    /// Whether queries come in the model's domain and keys do not.
    pub rotate: bool,
    /// Query heads of a workgroup.
    pub heads: usize,
    /// Queries of a workgroup.
    pub queries: usize,
    /// Positions of a thread and tile: each query that is read from the workgroup's memory serves them all.
    pub positions: usize,
    pub causal: bool,
    pub window: bool,
    pub softcap: bool,
    /// Whether scores need what the shift of the keys' channels has taken from them.
    pub bias: bool,
    /// Whether positions may lie beyond the slots, which are a ring then.
    pub ring: bool,
    /// The logarithm of the page size, where that is a power of two.
    pub page_bits: Option<u32>,
    /// Whether no page ends within a tile, whose rows lie one after the other then.
    pub whole: bool,
    /// Threads of a workgroup.
    pub threads: usize,
}

params! {
    pub struct AttentionParams {
        q_off: u32,
        k_codes_off: u32,
        k_scales_off: u32,
        v_codes_off: u32,
        v_scales_off: u32,
        table_off: u32,
        tasks_off: u32,
        heads: u32,
        kv_heads: u32,
        /// Query heads of a KV head, and the workgroups that share them.
        group: u32,
        shares: u32,
        splits: u32,
        /// Tiles of the longest task.
        tiles: u32,
        page_size: u32,
        slots: u32,
        window: u32,
        /// The first token of the dispatch, and its rows of results.
        token_base: u32,
        rows: u32,
        scale: f32,
        softcap: f32,
        /// Where biases are behind the queries, and rows of queries.
        bias_off: u32,
        rows_of_q: u32,
    }
}

params! {
    /// Some queries of a sequence that a workgroup takes together.
    pub struct Task {
        /// Where the sequence's page table starts.
        table_base: u32,
        token0: u32,
        queries: u32,
        /// The position of the first query.
        first_pos: u32,
        /// What the sequence holds, and what the queries see together.
        first: u32,
        len: u32,
        start: u32,
        stop: u32,
    }
}

/// The most floats of queries that a workgroup holds, so that everything fits 32 KiB.
pub const QUERY_FLOATS: usize = 2048;

/// Bytes that a workgroup holds beside its weights, at most.
const REST: usize = 16 << 10;

/// The most positions of a thread: two are faster than one and than four on an H200, where registers get short.
pub fn most_positions(rows: usize, caps: &Caps) -> usize {
    (caps.query_rows / rows).clamp(1, 2)
}

impl AttentionKernel {
    /// Rows of queries of a workgroup.
    pub fn rows(&self) -> usize {
        self.heads * self.queries
    }

    /// Positions of all teams' tiles.
    pub fn tile(&self) -> usize {
        self.positions * self.threads
    }

    /// Vectors of four weights that a workgroup holds.
    pub fn weights(&self) -> usize {
        self.tile() * self.value.format().scales_per_row().max(1) * self.rows().div_ceil(4)
    }

    /// Whether a workgroup of so many threads works in teams, and its memory holds what they need.
    pub fn fits(&self, gpu: &Gpu) -> bool {
        let most = gpu.limits.max_compute_workgroup_storage_size as usize;
        self.teams(&gpu.caps).count() > 1 && 16 * self.weights() + REST <= most
    }

    /// Elements of a value that a thread sums up, for all rows.
    pub fn chunk(&self, caps: &Caps) -> usize {
        let most = match 2 * caps.query_rows / self.rows() {
            16.. => 16,
            8.. => 8,
            _ => 4,
        };
        // Every element needs a thread.
        most.max(self.key.format().row_dim().div_ceil(THREADS).next_power_of_two())
    }

    /// How threads share the work.
    pub fn teams(&self, caps: &Caps) -> Teams {
        let chunk = self.chunk(caps);
        let chunks = self.key.format().row_dim() / chunk;
        let team = if caps.team > 0 && caps.team.is_multiple_of(chunks) { caps.team } else { self.threads };
        let (lanes, tile) = (team / chunks, self.positions * team);
        let depth = caps.ahead.min(tile.div_ceil(lanes));
        Teams { threads: self.threads, team, tile, chunk, chunks, lanes, depth, fours: self.rows().div_ceil(4) }
    }
}
