// The oldest position that the query at `position` looks back to: `problem::Visible::oldest`.
fn oldest(position: u32) -> u32 {
  return select(0u, position + 1u - a.window, position + 1u > a.window);
}
