//! Makes an image of layers.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::{CONFIG, LAYER, Layer, Layout, MANIFEST, architecture};

/// What an image is made of.
#[derive(Debug, Clone)]
pub(crate) struct Recipe<'a> {
    pub(crate) layers: Vec<Layer<'a>>,
    /// The program it runs; none for an image that is data.
    pub(crate) entrypoint: Option<&'a str>,
    /// User and group numbers of the process.
    pub(crate) user: Option<&'a str>,
    pub(crate) annotations: Vec<(&'static str, String)>,
}

impl Recipe<'_> {
    /// Makes the image in a layout, under a name with a tag.
    pub(crate) fn make(&self, layout: &Layout, reference: &str) -> Result<()> {
        let Self { layers, entrypoint, user, annotations } = self;
        let error = || format!("image {reference}");
        let mut blobs = Vec::new();
        for layer in layers {
            blobs.push(layout.add(LAYER, |to| layer.write(to)).with_context(error)?);
        }
        let mut execution = Map::new();
        if let Some(user) = user {
            execution.insert("User".to_owned(), json!(user));
        }
        if let Some(entrypoint) = entrypoint {
            execution.insert("Entrypoint".to_owned(), json!([entrypoint]));
        }
        let diff_ids: Vec<&str> = blobs.iter().map(|blob| blob.digest.as_str()).collect();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": execution,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = layout.add_json(CONFIG, &config).with_context(error)?;
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(),
            "layers": blobs.iter().map(super::layout::Blob::descriptor).collect::<Vec<_>>(),
        });
        if !annotations.is_empty() {
            let pairs = annotations.iter().map(|(key, value)| ((*key).to_owned(), json!(value)));
            manifest["annotations"] = Value::Object(pairs.collect());
        }
        let manifest = layout.add_json(MANIFEST, &manifest).with_context(error)?;
        let platform = json!({"architecture": architecture(), "os": "linux"});
        layout.name(reference, &manifest, &platform).with_context(error)
    }
}
