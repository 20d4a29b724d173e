//! Attention as dispatches.

use super::join::{JoinKernel, JoinParams, MOST_SPLITS};
use super::kernel::{AttentionKernel, AttentionParams, QUERY_FLOATS, Task, most_positions};
use super::plan::Plan;
use crate::backend::wgpu::codec::key::{Align, Stored};
use crate::backend::wgpu::codec::rows::PoolSlots;
use crate::backend::wgpu::commands::{BatchList, Commands, List};
use crate::backend::wgpu::gpu::Gpu;
use crate::backend::wgpu::kernels::channels::{Mapped, Pass, Way};
use crate::backend::wgpu::slot::Slot;
use crate::backend::wgpu::wgsl::builder::THREADS;
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::error::Result;
use crate::problem::op::Attention;
use crate::problem::{Domain, Visible};
use std::sync::Arc;

/// What a turn of tasks is launched with.
struct Launch<'a> {
    op: &'a Attention,
    kernel: AttentionKernel,
    join: JoinKernel,
    q: Slot<'a>,
    /// Words to what the shift of the keys' channels takes from each row's scores.
    bias_off: u32,
    out: Slot<'a>,
    key: PoolSlots<'a>,
    value: PoolSlots<'a>,
    sink_logits: Option<Slot<'a>>,
    lse: Option<Slot<'a>>,
    batch: BatchList,
    /// Workgroups that share a KV head's queries.
    shares: usize,
    /// Rows of results that there is room for.
    room: usize,
}

pub fn record(commands: &mut Commands, op: &Attention) -> Result<()> {
    let context = commands.context.clone();
    let gpu = &context.gpu;
    let d = op.key.row().row_dim();
    let mapped = match op.key.channels() {
        Some(map) => {
            let mapped = Mapped::room(commands, &[(op.batch.tokens() * op.heads, d)])?.pop();
            let per = op.heads / op.key.kv_heads();
            let pass = Pass { map, way: Way::Query, per, scale: op.params.scale };
            mapped.iter().try_for_each(|to| pass.map_to(commands, &op.q, to))?;
            mapped
        }
        None => None,
    };
    let (q, q_tensor) = match &mapped {
        Some(mapped) => (mapped.slot(), mapped.tensor()),
        None => Slot::tensor(gpu, "q", &op.q, d)?,
    };
    let bias_off = mapped.as_ref().map_or(0, Mapped::numbers);
    let (out, out_tensor) = Slot::tensor(gpu, "out", &op.out, d)?;
    let key = PoolSlots::new(&context, "the keys", &op.key)?;
    let value = PoolSlots::new(&context, "the values", &op.value)?;
    let sink_logits = op.params.sink_logits.as_ref().map(|s| Slot::new(gpu, "sinks", s)).transpose()?;
    let lse = op.lse.as_ref().map(|l| Slot::new(gpu, "lse", l)).transpose()?;
    let (kernel, shares, plan) = choose(gpu, op, q_tensor, &key, &value)?;
    let join = JoinKernel {
        value: Stored::of(op.value.row(), Align::Word),
        out: out_tensor,
        restore: op.params.domain == Domain::Original && op.value.row().is_rotated(),
        sink_logits: sink_logits.is_some(),
        lse: lse.is_some(),
        // A softcap has needed it already.
        bias: mapped.is_some() && op.params.softcap.is_none() && (lse.is_some() || sink_logits.is_some()),
    };
    let batch = commands.batch(&op.batch)?;
    // A split's results take memory for every query, so that very many queries go in turns.
    let room = gpu.limits.max_storage_buffer_binding_size.min(256 << 20) as usize / row_bytes(d) / op.heads;
    let launch = Launch { op, kernel, join, q, bias_off, out, key, value, sink_logits, lse, batch, shares, room };
    let tokens: usize = plan.tasks.iter().map(|t| t.queries as usize).sum();
    if tokens <= room {
        let list = commands.shared_list("tasks", &plan, |plan| bytemuck::cast_slice(&plan.tasks))?;
        return turn(commands, &launch, &plan.tasks, &list);
    }
    let mut tasks = &plan.tasks[..];
    while !tasks.is_empty() {
        let mut tokens = 0;
        let fits = |task: &&Task| {
            tokens += task.queries as usize;
            tokens <= room
        };
        let (now, rest) = tasks.split_at(tasks.iter().take_while(fits).count().max(1));
        let list = commands.list("tasks", bytemuck::cast_slice(now))?;
        turn(commands, &launch, now, &list)?;
        tasks = rest;
    }
    Ok(())
}

/// Bytes of a split's results for a row of queries.
fn row_bytes(d: usize) -> usize {
    (d + 4) * 4
}

/// The kernel, the workgroups that share a KV head's queries, and the tasks.
fn choose(
    gpu: &Gpu,
    op: &Attention,
    q: Tensor,
    key: &PoolSlots,
    value: &PoolSlots,
) -> Result<(AttentionKernel, usize, Arc<Plan>)> {
    let caps = &gpu.caps;
    let (d, kv_heads, page_size) = (op.key.row().row_dim(), op.key.kv_heads(), op.key.page_size());
    let (group, spans) = (op.heads / kv_heads, op.batch.spans());
    let most = caps.query_rows.min(QUERY_FLOATS / d);
    let shares = group.div_ceil(most);
    let heads = group.div_ceil(shares);
    let longest = spans.iter().map(|s| s.new as usize).max().unwrap_or(1);
    let queries = (most / heads).clamp(1, longest.max(1));
    let visible = Visible { causal: op.params.causal, window: op.params.window };
    let plan = Plan::of(&op.batch, queries, visible, 1)?;
    let blocks = plan.tasks.len() * kv_heads * shares;
    // Fewer positions a thread where the device would not be busy.
    let mut positions = most_positions(heads * queries, caps);
    while positions > 1 && blocks * (plan.longest / (positions * THREADS)) < caps.busy / 8 {
        positions /= 2;
    }
    let mut kernel = AttentionKernel {
        key: key.stored.in_lanes(caps),
        value: value.stored.in_lanes(caps),
        q,
        rotate: op.params.domain == Domain::Original && op.key.row().is_rotated(),
        heads,
        queries,
        positions,
        causal: visible.causal,
        window: visible.window.is_some(),
        softcap: op.params.softcap.is_some(),
        bias: op.params.softcap.is_some() && op.key.channels().is_some(),
        ring: spans.iter().any(|s| s.len as usize > op.batch.width() * page_size),
        page_bits: page_size.is_power_of_two().then(|| page_size.ilog2()),
        whole: false,
        threads: THREADS,
    };
    kernel.value = kernel.value.fetched_by(kernel.chunk(caps));
    // Large workgroups of codes where they keep the device busy: a driver must find registers for all their threads at once.
    let wide = AttentionKernel { threads: caps.threads, ..kernel };
    let threads_at_work = blocks * (plan.shortest / wide.tile()) * wide.threads;
    let rotated = op.key.row().is_rotated() && op.value.row().is_rotated();
    if threads_at_work >= caps.busy * THREADS && rotated && wide.fits(gpu) {
        kernel = wide;
    }
    let tile = kernel.teams(caps).tile;
    kernel.whole = page_size.is_multiple_of(tile);
    let plan = if kernel.whole { Plan::of(&op.batch, queries, visible, tile)? } else { plan };
    Ok((kernel, shares, plan))
}

/// Both passes for some tasks.
fn turn(commands: &mut Commands, launch: &Launch, tasks: &[Task], list: &List) -> Result<()> {
    let context = commands.context.clone();
    let (gpu, Launch { op, kernel, key, value, batch, .. }) = (&context.gpu, launch);
    let (kv_heads, page_size) = (op.key.kv_heads(), op.key.page_size());
    let tokens: usize = tasks.iter().map(|t| t.queries as usize).sum();
    let blocks = tasks.len() * kv_heads * launch.shares;
    let seen = tasks.iter().map(Task::seen).max().unwrap_or(0);
    let most = seen.div_ceil(kernel.tile()).clamp(1, MOST_SPLITS).min((launch.room / tokens).max(1));
    let splits = (gpu.caps.busy * THREADS / kernel.threads / blocks).clamp(1, most);
    let rows = tokens * op.heads;
    let params = AttentionParams {
        q_off: launch.q.words(),
        k_codes_off: key.codes_off,
        k_scales_off: key.scales_off,
        v_codes_off: value.codes_off,
        v_scales_off: value.scales_off,
        table_off: batch.table,
        tasks_off: list.first,
        heads: op.heads as u32,
        kv_heads: kv_heads as u32,
        group: (op.heads / kv_heads) as u32,
        shares: launch.shares as u32,
        splits: splits as u32,
        tiles: seen.div_ceil(kernel.teams(&gpu.caps).tile) as u32,
        page_size: page_size as u32,
        slots: (op.batch.width() * page_size) as u32,
        window: op.params.window.map_or(0, |w| w.min(u32::MAX as usize) as u32),
        token_base: tasks[0].token0,
        rows: rows as u32,
        scale: op.params.scale,
        softcap: op.params.softcap.unwrap_or(1.0),
        bias_off: launch.bias_off,
        rows_of_q: (op.batch.tokens() * op.heads) as u32,
    };
    let bytes = (rows * splits * row_bytes(op.key.row().row_dim())) as u64;
    let partial = commands.scratch(0, bytes)?;
    let partial = Slot::whole(&partial);
    let mut slots = Vec::with_capacity(10);
    slots.push(launch.q);
    slots.extend(key.slots().chain(value.slots()));
    slots.extend([batch.slot(), list.slot(), partial]);
    slots.extend(key.tables().into_iter().chain(value.tables()));
    commands.dispatch(kernel, &slots, blocks * splits, &params)?;

    let params = JoinParams {
        splits: splits as u32,
        out_off: launch.out.words(),
        sinks_off: launch.sink_logits.as_ref().map_or(0, Slot::words),
        lse_off: launch.lse.as_ref().map_or(0, Slot::words),
        heads: op.heads as u32,
        row_base: tasks[0].token0 * op.heads as u32,
        neg_inf: f32::NEG_INFINITY.to_bits(),
        bias_off: launch.bias_off,
    };
    slots.clear();
    slots.extend([partial, launch.out].into_iter().chain(launch.sink_logits).chain(launch.lse));
    slots.extend(launch.join.bias.then_some(launch.q));
    slots.extend(value.tables().filter(|_| launch.join.restore));
    commands.dispatch(&launch.join, &slots, rows, &params)
}
