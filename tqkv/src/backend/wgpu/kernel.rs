//! What a kernel is to those that compile and run it.

use super::caps::Caps;
use super::wgsl::builder::Source;
use super::wgsl::params::Params;
use std::hash::Hash;

/// A kernel: what its text is specialised on, which is its key, the text, and its parameters.
pub(super) trait Kernel: Copy + Eq + Hash + Send + 'static {
    type Params: Params;
    const NAME: &'static str;
    fn source(&self, caps: &Caps) -> Source;
}
