//! The text side of a model directory.

use std::path::Path;

use anyhow::Context as _;
use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, TextModel};

/// Reads tokenizer, chat template and what goes with them.
pub(crate) fn read(dir: &Path) -> anyhow::Result<TextModel> {
    let mut files = BundleFiles::default();
    for name in BUNDLE_FILE_NAMES {
        match std::fs::read(dir.join(name)) {
            Ok(bytes) => files.insert(name, bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| dir.join(name).display().to_string()),
        }
    }
    Ok(TextModel::from_files(&files)?)
}
