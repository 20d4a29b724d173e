//! Two things at once: the disk and the device.

use crate::error::{Error, Result};
use std::sync::mpsc;
use std::thread;

/// Fills a buffer for each chunk on a thread of its own, while `take` works on the one before.
pub(super) fn one_ahead<T: Send>(
    chunks: impl Iterator<Item = T> + Send,
    mut fill: impl FnMut(&T, &mut Vec<u8>) -> Result<()> + Send,
    mut take: impl FnMut(T, &mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    let (filled, to_take) = mpsc::sync_channel(0);
    let (taken, to_fill) = mpsc::channel::<Vec<u8>>();
    thread::scope(|scope| {
        let work = move || {
            for chunk in chunks {
                let mut buffer = to_fill.try_recv().unwrap_or_default();
                let result = fill(&chunk, &mut buffer).map(|()| (chunk, buffer));
                // After an error on either side nobody waits for more.
                let last = result.is_err();
                if filled.send(result).is_err() || last {
                    return;
                }
            }
        };
        thread::Builder::new().spawn_scoped(scope, work).map_err(|e| Error::io("a thread for snapshots", &e))?;
        for result in to_take {
            let (chunk, mut buffer) = result?;
            take(chunk, &mut buffer)?;
            // Nobody fills it again after the last chunk.
            let _ = taken.send(buffer);
        }
        Ok(())
    })
}
