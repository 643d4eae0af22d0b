//! Names of what must be equal: of a model's bytes, and of KV that may move between gangs.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use crate::{BLOCK_TOKENS, Dtype};

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDigest {
    /// Relative to the model's folder, with `/` between components.
    pub path: String,
    /// Bytes of the file.
    pub size: u64,
    /// SHA-256 of the file, or of its safetensors header where the file is 16 MiB or more.
    pub sha256: [u8; 32],
}

/// `sha256:...` over the files, whatever their order. The same for every source of a model.
pub fn model_digest(entries: &[FileDigest]) -> String {
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort_by(|a, b| a.path.cmp(&b.path));
    let mut hasher = Sha256::new();
    for FileDigest { path, size, sha256 } in sorted {
        // Lengths first, so that no two lists run together to the same bytes.
        hasher.update((path.len() as u64).to_le_bytes());
        hasher.update(path.as_bytes());
        hasher.update(size.to_le_bytes());
        hasher.update(sha256);
    }
    format!("sha256:{}", hex(&hasher.finalize()))
}

/// What must be equal for KV to move between two gangs: the model, the dtype of the cache, the block size and the
/// numerics (on CPU the instruction set). Tensor degrees may differ.
pub fn kv_fingerprint(digest: &str, dtype: Dtype, numerics: &str) -> String {
    let mut hasher = Sha256::new();
    for part in [digest, &dtype.to_string(), &BLOCK_TOKENS.to_string(), numerics] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    format!("kv1:{}", hex(&hasher.finalize()[..16]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size: u64, byte: u8) -> FileDigest {
        FileDigest { path: path.to_owned(), size, sha256: [byte; 32] }
    }

    #[test]
    fn digest_ignores_order_and_sees_every_field() {
        let (a, b) = (file("a.json", 1, 2), file("b.safetensors", 3, 4));
        let digest = model_digest(&[a.clone(), b.clone()]);
        assert_eq!(digest, model_digest(&[b.clone(), a.clone()]));
        assert_eq!(digest.len(), "sha256:".len() + 64);
        for other in [
            vec![a.clone()],
            vec![a.clone(), file("c.safetensors", 3, 4)],
            vec![a.clone(), file("b.safetensors", 4, 4)],
            vec![a, file("b.safetensors", 3, 5)],
        ] {
            assert_ne!(digest, model_digest(&other), "{other:?}");
        }
    }

    #[test]
    fn fingerprint_sees_every_part() {
        let fingerprint = kv_fingerprint("sha256:aa", Dtype::F32, "cpu-avx2");
        assert_eq!(fingerprint, kv_fingerprint("sha256:aa", Dtype::F32, "cpu-avx2"));
        assert_ne!(fingerprint, kv_fingerprint("sha256:ab", Dtype::F32, "cpu-avx2"));
        assert_ne!(fingerprint, kv_fingerprint("sha256:aa", Dtype::Bf16, "cpu-avx2"));
        assert_ne!(fingerprint, kv_fingerprint("sha256:aa", Dtype::F32, "cpu-portable"));
    }
}
