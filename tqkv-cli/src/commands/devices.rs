//! `tqkv devices`

use crate::output;
use anyhow::Result;
use std::process::ExitCode;
use tqkv::Device;

/// The devices of this machine, and why others cannot be used.
#[derive(clap::Args)]
pub struct Devices {}

impl Devices {
    pub fn run(self) -> Result<ExitCode> {
        for device in Device::list() {
            match device {
                Ok(info) => output::print(&format!("{info}\n"))?,
                Err(error) => output::print(&format!("{error}\n"))?,
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
