//! Where a model comes from.

/// A parsed `model.source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// `hf://ORG/NAME[@REVISION]`.
    HuggingFace(String),
    /// `oci://IMAGE`: the checkpoint is at the image's root.
    Image(String),
    /// `pvc://CLAIM[/FOLDER]`.
    Claim {
        /// A `PersistentVolumeClaim` of the same namespace.
        claim: String,
        /// Inside of it; empty: its root.
        folder: String,
    },
    /// `s3://BUCKET/KEY`.
    Bucket(String),
}

/// Why a source makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceError(pub String);

impl std::fmt::Display for SourceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SourceError {}

impl std::str::FromStr for ModelSource {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let wrong = || {
            SourceError(format!(
                "model.source {text:?} must be hf://ORG/NAME, oci://IMAGE, pvc://CLAIM[/FOLDER] or s3://BUCKET/KEY"
            ))
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        if rest.is_empty() || rest.starts_with('/') || rest.contains(char::is_whitespace) {
            return Err(wrong());
        }
        match scheme {
            "hf" => Ok(Self::HuggingFace(rest.to_owned())),
            "oci" => Ok(Self::Image(rest.to_owned())),
            "s3" => Ok(Self::Bucket(rest.to_owned())),
            "pvc" => {
                let (claim, folder) = rest.split_once('/').unwrap_or((rest, ""));
                let folder = folder.trim_matches('/');
                if folder.split('/').any(|part| part == "..") {
                    return Err(SourceError(format!(
                        "model.source {text:?}: the folder must not contain \"..\""
                    )));
                }
                Ok(Self::Claim { claim: claim.to_owned(), folder: folder.to_owned() })
            }
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<ModelSource, SourceError> {
        text.parse()
    }

    #[test]
    fn four_schemes_are_known() {
        assert_eq!(parsed("hf://a/b@c"), Ok(ModelSource::HuggingFace("a/b@c".into())));
        assert_eq!(parsed("oci://r:5000/m:1"), Ok(ModelSource::Image("r:5000/m:1".into())));
        assert_eq!(parsed("s3://b/k"), Ok(ModelSource::Bucket("b/k".into())));
        let claim = |claim: &str, folder: &str| {
            Ok(ModelSource::Claim { claim: claim.to_owned(), folder: folder.to_owned() })
        };
        assert_eq!(parsed("pvc://c"), claim("c", ""));
        assert_eq!(parsed("pvc://c/x/y/"), claim("c", "x/y"));
        for wrong in ["", "oci", "oci://", "pvc:///x", "file:///x", "OCI://x", "oci://a b", "pvc://c/../x"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
