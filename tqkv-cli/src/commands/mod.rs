//! One command a file.

pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod demo;
pub mod devices;
pub mod eval;
pub mod generate;
pub mod snapshot;
pub mod verify;
