//! Runs of queries that workgroups take together.

use super::kernel::Task;
use crate::error::Result;
use crate::problem::{Batch, Visible};
use std::sync::Arc;

/// The tasks of a batch.
pub struct Plan {
    key: Key,
    pub tasks: Vec<Task>,
    /// The most and the fewest positions that a task's queries see together.
    pub longest: usize,
    pub shortest: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    queries: usize,
    visible: Visible,
    step: usize,
}

impl Plan {
    /// Runs of at most `queries` queries of one sequence. What they see together begins at a multiple of `step`, so up to `step` - 1
    /// positions earlier, which none sees. Worked out once a batch.
    pub fn of(batch: &Batch, queries: usize, visible: Visible, step: usize) -> Result<Arc<Self>> {
        let key = Key { queries, visible, step };
        batch.plans().get(|plan: &Plan| plan.key == key, || Ok(Plan::new(batch, key)))
    }

    fn new(batch: &Batch, key: Key) -> Self {
        let mut tasks = vec![];
        for (s, span) in batch.spans().iter().enumerate() {
            let held = span.first as usize..span.len as usize;
            for first_query in (0..span.new as usize).step_by(key.queries) {
                let count = key.queries.min(span.new as usize - first_query);
                let position = (span.len - span.new) as usize + first_query;
                let seen = key.visible.range(position..position + count, held.clone());
                tasks.push(Task {
                    table_base: (s * batch.width()) as u32,
                    token0: span.start + first_query as u32,
                    queries: count as u32,
                    first_pos: position as u32,
                    first: span.first,
                    len: span.len,
                    start: (seen.start / key.step * key.step) as u32,
                    stop: seen.end as u32,
                });
            }
        }
        let seen = || tasks.iter().map(Task::seen);
        let (longest, shortest) = (seen().max().unwrap_or(0), seen().min().unwrap_or(0));
        Plan { key, longest, shortest, tasks }
    }
}

impl crate::problem::Plan for Plan {}

impl Task {
    /// Positions that its queries see together, and those before them.
    pub fn seen(&self) -> usize {
        (self.stop - self.start) as usize
    }
}
