//! Where a model comes from.

/// A parsed `model.source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// `hf://ORG/NAME[@REVISION]`.
    HuggingFace(HubModel),
    /// `oci://IMAGE`: the checkpoint is at the image's root.
    Image(String),
    /// `pvc://CLAIM[/FOLDER]`.
    Claim {
        /// A `PersistentVolumeClaim` of the same namespace.
        claim: String,
        /// Inside of it; empty: its root.
        folder: String,
    },
    /// `s3://BUCKET[/PREFIX]`.
    Bucket(BucketModel),
}

/// A repository of the Hugging Face hub, or of another that speaks its protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// Who it belongs to.
    pub organisation: String,
    /// Its name there.
    pub name: String,
    /// A branch, a tag or a commit; `main` unless given.
    pub revision: Option<String>,
}

impl HubModel {
    /// `ORG/NAME`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.organisation, self.name)
    }

    /// What is asked for.
    pub fn wanted(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

/// Objects of a bucket whose names begin with a folder's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketModel {
    /// Its name.
    pub bucket: String,
    /// Without a slash at either end; empty: the bucket's root.
    pub prefix: String,
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
                "model.source {text:?} must be hf://ORG/NAME[@REVISION], oci://IMAGE, pvc://CLAIM[/FOLDER] or s3://BUCKET[/PREFIX]"
            ))
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        if rest.is_empty() || rest.starts_with('/') || rest.contains(char::is_whitespace) {
            return Err(wrong());
        }
        match scheme {
            "hf" => hub(rest).map(Self::HuggingFace).ok_or_else(wrong),
            "oci" => Ok(Self::Image(rest.to_owned())),
            "s3" => bucket(rest).map(Self::Bucket).ok_or_else(wrong),
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

impl ModelSource {
    /// Where files of it are in a cache of downloaded models, once `pin` says which they are; `None` where Kubernetes brings them.
    pub fn cache_folder(&self, pin: &str) -> Option<String> {
        match self {
            Self::HuggingFace(HubModel { organisation, name, revision: _ }) => {
                Some(format!("hf/{organisation}/{name}/{pin}"))
            }
            Self::Bucket(BucketModel { bucket, prefix: _ }) => Some(format!("s3/{bucket}/{pin}")),
            Self::Image(_) | Self::Claim { .. } => None,
        }
    }
}

/// Whether it can stand for the files of a source: in a path, an environment and a hash.
pub fn is_pin(text: &str) -> bool {
    (8..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn hub(rest: &str) -> Option<HubModel> {
    let (repository, revision) = match rest.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision)),
        None => (rest, None),
    };
    let (organisation, name) = repository.split_once('/')?;
    let is_revision = |revision: &&str| !revision.is_empty() && !revision.split('/').any(|part| part == "..");
    let is_well = is_name(organisation) && is_name(name) && revision.as_ref().is_none_or(is_revision);
    is_well.then(|| HubModel {
        organisation: organisation.to_owned(),
        name: name.to_owned(),
        revision: revision.map(str::to_owned),
    })
}

fn bucket(rest: &str) -> Option<BucketModel> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_matches('/');
    let is_part = |part: &str| !part.is_empty() && part != "." && part != "..";
    let is_well = is_name(bucket) && (prefix.is_empty() || prefix.split('/').all(is_part));
    is_well.then(|| BucketModel { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

/// A component of a path and of a URL as it is, and no hidden file.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<ModelSource, SourceError> {
        text.parse()
    }

    #[test]
    fn four_schemes_are_known() {
        let hub = |revision: Option<&str>| {
            let (organisation, name) = ("a".to_owned(), "b.1".to_owned());
            Ok(ModelSource::HuggingFace(HubModel {
                organisation,
                name,
                revision: revision.map(str::to_owned),
            }))
        };
        assert_eq!(parsed("hf://a/b.1@c"), hub(Some("c")));
        assert_eq!(parsed("hf://a/b.1@refs/pr/1"), hub(Some("refs/pr/1")));
        assert_eq!(parsed("hf://a/b.1"), hub(None));
        assert_eq!(parsed("oci://r:5000/m:1"), Ok(ModelSource::Image("r:5000/m:1".into())));
        let bucket = |prefix: &str| {
            Ok(ModelSource::Bucket(BucketModel { bucket: "b".to_owned(), prefix: prefix.to_owned() }))
        };
        assert_eq!(parsed("s3://b/k/l/"), bucket("k/l"));
        assert_eq!(parsed("s3://b"), bucket(""));
        let claim = |claim: &str, folder: &str| {
            Ok(ModelSource::Claim { claim: claim.to_owned(), folder: folder.to_owned() })
        };
        assert_eq!(parsed("pvc://c"), claim("c", ""));
        assert_eq!(parsed("pvc://c/x/y/"), claim("c", "x/y"));
        for wrong in [
            "",
            "oci",
            "oci://",
            "pvc:///x",
            "file:///x",
            "OCI://x",
            "oci://a b",
            "pvc://c/../x",
            "hf://a",
            "hf://a/b/c",
            "hf://../b",
            "hf://a/..",
            "hf://a/b@",
            "hf://a/b@../c",
            "hf://a/b?c",
            "s3://b/../c",
            "s3://b/c//d",
            "s3://../c",
            "s3://b%2f/c",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_downloaded_has_a_folder_of_its_own() {
        let folder = |text: &str| parsed(text).unwrap().cache_folder("0123abcd");
        assert_eq!(folder("hf://a/b@main").as_deref(), Some("hf/a/b/0123abcd"));
        assert_eq!(folder("s3://b/k").as_deref(), Some("s3/b/0123abcd"));
        assert_eq!((folder("oci://i"), folder("pvc://c/f")), (None, None));
        assert!(is_pin("0123abcd-4"));
        for wrong in ["", "short", "../../../etc", "a b c d e f", &"a".repeat(129)] {
            assert!(!is_pin(wrong), "{wrong}");
        }
    }
}
