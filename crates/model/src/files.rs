//! Which files of a checkpoint a rank needs.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::Deserialize;

use crate::shard::stage_layers;

/// Says what the model is.
pub const CONFIG_FILE: &str = "config.json";
/// The single weight file of a small checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Says which file holds which tensor of a large one.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Weight files from this size on are known by their headers, to the model digest and to ranks that need none of their weights.
pub const LARGE_FILE_BYTES: u64 = 16 << 20;
/// Beside the weights, what a model is made of: part of its digest where present.
pub const SIDE_FILES: [&str; 6] = [
    "chat_template.jinja",
    CONFIG_FILE,
    "generation_config.json",
    INDEX_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Consecutive layers, of a model that is split into such stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Those of the stage.
    pub layers: Range<usize>,
    /// How many the model has.
    pub of: usize,
}

impl Stage {
    /// One of `stages`, counted from 0.
    pub fn new(stage: usize, stages: usize, layers: usize) -> Option<Self> {
        (stage < stages && stages <= layers)
            .then(|| Self { layers: stage_layers(layers, stage, stages), of: layers })
    }

    /// Whether it computes with this tensor. One that no rule knows is held by all.
    fn holds(&self, tensor: &str) -> bool {
        let (is_first, is_last) = (self.layers.start == 0, self.layers.end == self.of);
        if let Some(rest) = tensor.strip_prefix("model.layers.") {
            let layer = rest.split('.').next().and_then(|layer| layer.parse().ok());
            return layer.is_none_or(|layer: usize| self.layers.contains(&layer));
        }
        if tensor.starts_with("model.embed_tokens.") {
            // The last stage too: the output head may be the embedding.
            return is_first || is_last;
        }
        if tensor.starts_with("model.norm.") || tensor.starts_with("lm_head.") {
            return is_last;
        }
        true
    }
}

/// Files that make no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// Without it nothing can be loaded.
    #[error("there is no {0} among the files")]
    Missing(String),
    /// Neither form of weights.
    #[error("there is no {SINGLE_FILE} and no {INDEX_FILE} among the files")]
    NoWeights,
    /// Not what an index is.
    #[error("{INDEX_FILE}: {0}")]
    Index(#[from] serde_json::Error),
    /// Somewhere else than beside the index.
    #[error("{INDEX_FILE} places tensor {tensor} in {file:?}; that is no safetensors file of this folder")]
    Place {
        /// The tensor.
        tensor: String,
        /// As written.
        file: String,
    },
}

/// Whether files of this name hold weights, beside which nothing else is needed.
pub fn is_weights(name: &str) -> bool {
    name.strip_suffix(".safetensors").is_some_and(|stem| !stem.is_empty() && !name.contains(['/', '\\']))
}

/// Of the files `listed`, those that ranks need: all of the checkpoint, or of one stage. `index` is what [`INDEX_FILE`] holds,
/// where it is listed and [`SINGLE_FILE`] is not. Every tensor rank needs a part of every tensor of its stage, and so every file
/// that holds one; other formats of the same weights and whatever else is there are left out.
pub fn needed_files(
    listed: &BTreeSet<&str>,
    index: Option<&[u8]>,
    stage: Option<&Stage>,
) -> Result<BTreeSet<String>, FilesError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    if !listed.contains(CONFIG_FILE) {
        return Err(FilesError::Missing(CONFIG_FILE.to_owned()));
    }
    let side = SIDE_FILES.iter().filter(|name| listed.contains(**name));
    let mut needed: BTreeSet<String> = side.map(|name| (*name).to_owned()).collect();
    if listed.contains(SINGLE_FILE) {
        needed.insert(SINGLE_FILE.to_owned());
        return Ok(needed);
    }
    let Index { weight_map } = serde_json::from_slice(index.ok_or(FilesError::NoWeights)?)?;
    for (tensor, file) in weight_map {
        if !is_weights(&file) {
            return Err(FilesError::Place { tensor, file });
        }
        if !listed.contains(file.as_str()) {
            return Err(FilesError::Missing(file));
        }
        if stage.is_none_or(|stage| stage.holds(&tensor)) {
            needed.insert(file);
        }
    }
    Ok(needed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needed(listed: &[&str], index: Option<&str>, stage: Option<&Stage>) -> Result<Vec<String>, String> {
        let listed = listed.iter().copied().collect();
        let files = needed_files(&listed, index.map(str::as_bytes), stage);
        files.map(|files| files.into_iter().collect()).map_err(|error| error.to_string())
    }

    /// Four layers over three files, with what many repositories have beside.
    const LISTED: [&str; 8] = [
        "config.json",
        "tokenizer.json",
        "README.md",
        "original/consolidated.00.pth",
        "1.safetensors",
        "2.safetensors",
        "3.safetensors",
        INDEX_FILE,
    ];
    const INDEX: &str = r#"{"weight_map": {
        "model.embed_tokens.weight": "1.safetensors", "model.layers.0.x": "1.safetensors",
        "model.layers.1.x": "1.safetensors", "model.layers.2.x": "2.safetensors",
        "model.layers.3.x": "3.safetensors", "model.norm.weight": "3.safetensors",
        "lm_head.weight": "3.safetensors"}}"#;

    #[test]
    fn weights_of_one_format_are_enough() {
        let side = ["config.json", INDEX_FILE, "tokenizer.json"];
        let all = ["1.safetensors", "2.safetensors", "3.safetensors"];
        let expected: BTreeSet<&str> = side.into_iter().chain(all).collect();
        assert_eq!(needed(&LISTED, Some(INDEX), None).unwrap(), expected.into_iter().collect::<Vec<_>>());
        let single = ["config.json", "model.safetensors", "2.safetensors", "pytorch_model.bin"];
        assert_eq!(needed(&single, None, None).unwrap(), ["config.json", "model.safetensors"]);
    }

    #[test]
    fn a_stage_needs_the_files_of_its_layers() {
        let weights = |stage, stages| {
            let stage = Stage::new(stage, stages, 4).unwrap();
            let files = needed(&LISTED, Some(INDEX), Some(&stage)).unwrap();
            files.into_iter().filter(|file| is_weights(file)).collect::<Vec<_>>()
        };
        assert_eq!(weights(0, 2), ["1.safetensors"]);
        assert_eq!(weights(1, 2), ["1.safetensors", "2.safetensors", "3.safetensors"]);
        assert_eq!(weights(2, 4), ["2.safetensors"]);
        assert_eq!(weights(0, 1).len(), 3);
        for (stages, layers) in [(1, 4), (3, 4), (4, 4), (3, 126)] {
            let parts: Vec<_> =
                (0..stages).map(|one| Stage::new(one, stages, layers).unwrap().layers).collect();
            assert!(parts.windows(2).all(|two| two[0].end == two[1].start), "{parts:?}");
            assert_eq!((parts[0].start, parts[stages - 1].end), (0, layers));
        }
        assert_eq!((Stage::new(4, 4, 4), Stage::new(0, 5, 4)), (None, None));
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(needed(&["x"], None, None).unwrap_err(), "there is no config.json among the files");
        assert!(needed(&["config.json"], None, None).unwrap_err().contains("no model.safetensors"));
        let without: Vec<&str> = LISTED.into_iter().filter(|name| *name != "2.safetensors").collect();
        assert!(needed(&without, Some(INDEX), None).unwrap_err().contains("no 2.safetensors"));
        let outside = INDEX.replace("2.safetensors", "../2.safetensors");
        assert!(needed(&LISTED, Some(&outside), None).unwrap_err().contains("model.layers.2.x"));
        assert!(needed(&LISTED, Some("{}"), None).unwrap_err().contains("weight_map"));
    }
}
