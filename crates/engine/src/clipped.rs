//! Rows of activations that the upper bound before FP8 linears clips.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts them for one rank. All ranks of a gang quantize the same rows, so one tells of all.
#[derive(Clone, Debug, Default)]
pub struct RowsClipped(Arc<AtomicU64>);

impl RowsClipped {
    /// Since the rank was loaded.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, rows: usize) {
        // Almost always none.
        if rows > 0 {
            self.0.fetch_add(rows as u64, Ordering::Relaxed);
        }
    }
}
