//! How a workgroup's threads share its work.

/// A team has tiles for itself: of their values a thread adds up `chunk` elements of every lanes-th position.
pub struct Teams {
    /// Threads of a workgroup.
    pub threads: usize,
    /// Threads of a team: a subgroup's, or all.
    pub team: usize,
    /// Positions of a team's tile.
    pub tile: usize,
    pub chunk: usize,
    pub chunks: usize,
    pub lanes: usize,
    /// Positions whose values a thread loads before it uses the first.
    pub depth: usize,
    /// Vectors of four rows.
    pub fours: usize,
}

impl Teams {
    /// Whether all lanes have values all the time.
    pub fn even(&self) -> bool {
        self.lanes * self.chunks == self.team && self.tile.is_multiple_of(self.lanes * self.depth)
    }

    pub fn count(&self) -> usize {
        self.threads / self.team
    }

    /// Waits for the team.
    pub fn barrier(&self) -> &'static str {
        if self.count() > 1 { "subgroupBarrier();" } else { "workgroupBarrier();" }
    }
}
