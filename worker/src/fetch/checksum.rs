//! Checksums of what is downloaded, as it is written.

use std::fmt::Write as _;

use md5::{Digest as _, Md5};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::remote::Checksum;

/// Takes a file's bytes in their order.
pub(super) enum Hasher {
    Ring(Context),
    Md5(Md5),
    None,
}

impl Hasher {
    /// For a file of this size.
    pub(super) fn new(checksum: &Checksum, size: u64) -> Self {
        match checksum {
            Checksum::Sha256(_) => Self::Ring(Context::new(&SHA256)),
            Checksum::GitBlob(_) => {
                // Git hashes a file with its kind and size in front.
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {size}\0").as_bytes());
                Self::Ring(context)
            }
            Checksum::Md5(_) => Self::Md5(Md5::new()),
            Checksum::None => Self::None,
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Ring(context) => context.update(bytes),
            Self::Md5(md5) => md5.update(bytes),
            Self::None => {}
        }
    }

    /// In hex; empty where there is nothing to compare with.
    pub(super) fn finish(self) -> String {
        match self {
            Self::Ring(context) => hex(context.finish().as_ref()),
            Self::Md5(md5) => hex(&md5.finalize()),
            Self::None => String::new(),
        }
    }
}

/// What kind it is and what the source lists.
pub(super) fn listed(checksum: &Checksum) -> Option<(&'static str, &str)> {
    match checksum {
        Checksum::Sha256(listed) => Some(("SHA-256", listed)),
        Checksum::GitBlob(listed) => Some(("git object", listed)),
        Checksum::Md5(listed) => Some(("MD5", listed)),
        Checksum::None => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf abc | sha256sum`, `| git hash-object --stdin`, `| md5sum`.
    #[test]
    fn checksums_are_those_of_the_usual_tools() {
        let of = |checksum: Checksum| {
            let mut hasher = Hasher::new(&checksum, 3);
            hasher.update(b"a");
            hasher.update(b"bc");
            hasher.finish()
        };
        assert_eq!(
            of(Checksum::Sha256(String::new())),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(of(Checksum::GitBlob(String::new())), "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f");
        assert_eq!(of(Checksum::Md5(String::new())), "900150983cd24fb0d6963f7d28e17f72");
        assert_eq!(of(Checksum::None), "");
    }
}
