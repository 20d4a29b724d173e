//! What a compressed cache does to a model's predictions.

mod bootstrap;
mod fidelity;
mod free_running;
mod needle;
mod peers;
mod prediction;
mod windows;

pub use fidelity::{Fidelity, evaluate};
pub use free_running::{first_difference, run_freely};
pub use needle::{Found, Haystack, find_needles};
pub use peers::Peer;
pub use windows::Windows;
