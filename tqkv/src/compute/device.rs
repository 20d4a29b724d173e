//! Devices: found, named, opened.

use super::driver::Driver;
use super::{DeviceInfo, KernelRegistry};
use std::fmt;
use std::sync::Arc;

/// A place that holds buffers and runs operations. Cheap to clone; clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    driver: Box<dyn Driver>,
    kernels: KernelRegistry,
}

impl Device {
    pub(crate) fn from_driver(driver: Box<dyn Driver>) -> Self {
        Device(Arc::new(Inner { driver, kernels: KernelRegistry::default() }))
    }

    /// What is known of it.
    pub fn info(&self) -> DeviceInfo {
        self.0.driver.info()
    }

    /// Bytes that the device keeps beside buffers, for partial results of operations. They grow when a recorded operation needs
    /// more than any before: record what is largest once to know them, and to have nothing allocated later. A CPU keeps none.
    pub fn workspace_bytes(&self) -> usize {
        self.0.driver.workspace_bytes()
    }

    /// Kernels of the caller's own, which run between tqkv's operations.
    pub fn kernels(&self) -> &KernelRegistry {
        &self.0.kernels
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.0.driver
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.info().id)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}
