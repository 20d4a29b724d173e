//! A device and its queue: memory, waiting, and what has gone wrong.

use super::caps::Caps;
use crate::compute::DeviceInfo;
use crate::error::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard};

pub(super) struct Gpu {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub limits: wgpu::Limits,
    pub info: DeviceInfo,
    pub caps: Caps,
    /// Held while a submission writes its data and is handed over, so that submissions can share memory, and while a buffer is
    /// mapped, which no submission may use then.
    pub turn: Mutex<()>,
    /// A buffer for copies to the host.
    pub staging: Mutex<Option<wgpu::Buffer>>,
    trouble: Arc<Mutex<Trouble>>,
}

/// What the device has reported outside of any call.
#[derive(Default)]
struct Trouble {
    lost: Option<String>,
    told: bool,
    errors: Vec<String>,
}

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Futures of native wgpu are ready as soon as the device has been polled.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::yield_now(),
        }
    }
}

impl Gpu {
    pub fn new(device: wgpu::Device, queue: wgpu::Queue, info: DeviceInfo, caps: Caps) -> Self {
        let trouble = Arc::new(Mutex::new(Trouble::default()));
        let seen = trouble.clone();
        device.set_device_lost_callback(move |reason, message| {
            lock(&seen).lost.get_or_insert_with(|| format!("{reason:?}: {message}"));
        });
        let seen = trouble.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| lock(&seen).errors.push(error.to_string())));
        let limits = device.limits();
        Gpu { device, queue, limits, info, caps, turn: Mutex::default(), staging: Mutex::default(), trouble }
    }

    pub fn failed(&self, reason: impl Into<String>) -> Error {
        Error::DeviceFailed { device: self.info.id.clone(), reason: reason.into() }
    }

    pub fn unsupported(&self, what: String) -> Error {
        Error::Unsupported { device: self.info.id.clone(), what }
    }

    /// What a call has reported that needed so much memory.
    pub fn reported(&self, error: wgpu::Error, requested: usize) -> Error {
        match error {
            wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory { device: self.info.id.clone(), requested },
            error => self.failed(error.to_string()),
        }
    }

    /// Fails if the device is lost or has reported an error since the last check.
    pub fn check(&self) -> Result<()> {
        let mut trouble = lock(&self.trouble);
        if let Some(reason) = trouble.lost.clone() {
            let again = std::mem::replace(&mut trouble.told, true);
            return Err(self.failed(format!("the device {} lost: {reason}", if again { "was" } else { "is" })));
        }
        match trouble.errors.is_empty() {
            true => Ok(()),
            false => Err(self.failed(std::mem::take(&mut trouble.errors).join("; "))),
        }
    }

    /// Runs calls on the device and turns what they report into a wgpu error.
    pub fn guarded<T>(&self, calls: impl FnOnce() -> T) -> Result<T, wgpu::Error> {
        let filters = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal];
        let mut scopes: Vec<_> = filters.map(|f| self.device.push_error_scope(f)).into();
        let value = calls();
        let mut error = None;
        while let Some(scope) = scopes.pop() {
            error = error.or(block_on(scope.pop()));
        }
        error.map_or(Ok(value), Err)
    }

    pub fn create_buffer(&self, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        let buffer = self.guarded(|| self.device.create_buffer(&descriptor));
        self.check()?;
        buffer.map_err(|e| self.reported(e, size as usize))
    }

    /// The size of a buffer that is to hold so many bytes, will not have to grow soon, and can be bound as a whole if they can.
    pub fn roomy(&self, size: u64) -> u64 {
        let most = self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size) & !15;
        size.next_power_of_two().min(most).max(size)
    }

    /// Waits for a submission, or for all of them.
    pub fn wait(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let polled = self.device.poll(wgpu::PollType::Wait { submission_index, timeout: None });
        self.check()?;
        polled.map(|_| ()).map_err(|e| self.failed(e.to_string()))
    }
}
