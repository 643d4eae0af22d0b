/// Where a conversion reports how far it is. One stage follows another; the bytes of a stage add up to its total.
pub trait Progress: Sync {
    /// A stage of `total_bytes` begins; the one before it is done.
    fn stage(&self, name: &str, total_bytes: u64);
    /// `bytes` more of the current stage are done.
    fn advance(&self, bytes: u64);
}

/// Reports nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn stage(&self, _name: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
}
