//! The threads that operations are spread over.

use crate::error::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, Mutex, PoisonError};

/// Threads of a device's own, or rayon's global ones. A forked process has none of its parent's, so there new ones are started.
pub(super) struct Threads {
    count: usize,
    /// The process that it was made in, whose global threads are used if it has none of its own.
    home: u32,
    own: Mutex<Option<Own>>,
}

/// Threads, and the process that they are in.
struct Own {
    process: u32,
    pool: Arc<ThreadPool>,
}

impl Threads {
    pub fn global() -> Self {
        Threads { count: rayon::current_num_threads(), home: std::process::id(), own: Mutex::default() }
    }

    pub fn new(count: usize) -> Result<Self> {
        let home = std::process::id();
        let own = Own { process: home, pool: start(count)? };
        Ok(Threads { count, home, own: Mutex::new(Some(own)) })
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Runs what is spread over these threads.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match self.pool()? {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    fn pool(&self) -> Result<Option<Arc<ThreadPool>>> {
        let here = std::process::id();
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        match &*own {
            Some(own) if own.process == here => return Ok(Some(own.pool.clone())),
            None if self.home == here => return Ok(None),
            _ => {}
        }
        let pool = start(self.count)?;
        let gone = own.replace(Own { process: here, pool: pool.clone() });
        // Threads that are not there cannot be told to end.
        std::mem::forget(gone);
        Ok(Some(pool))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let own = self.own.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // As in `pool`.
        if let Some(own) = own.filter(|own| own.process != std::process::id()) {
            std::mem::forget(own);
        }
    }
}

fn start(count: usize) -> Result<Arc<ThreadPool>> {
    let failed =
        |e: rayon::ThreadPoolBuildError| Error::DeviceUnavailable { device: "cpu".to_owned(), reason: e.to_string() };
    ThreadPoolBuilder::new().num_threads(count).build().map(Arc::new).map_err(failed)
}
