//! Who this gang is, and calls that were meant for another one.

use std::time::{SystemTime, UNIX_EPOCH};

use herd_proto::internal::v1::Context;
use tonic::Status;
use uuid::Uuid;

/// Constant as long as the processes of a gang live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) gang_id: String,
    pub(crate) epoch: u64,
    pub(crate) revision: String,
    pub(crate) model_digest: String,
}

impl Identity {
    /// Refuses a call that was meant for another revision, model or epoch. Empty fields are not checked.
    pub(crate) fn check(&self, context: &Context) -> Result<(), Status> {
        let Self { gang_id: _, epoch, revision, model_digest } = self;
        let differs = |field: &str, asked: &str, ours: &str| {
            Err(Status::failed_precondition(format!("context.{field} is {asked}, this gang's is {ours}")))
        };
        if context.gang_epoch != 0 && context.gang_epoch != *epoch {
            return differs("gang_epoch", &context.gang_epoch.to_string(), &epoch.to_string());
        }
        if !context.revision.is_empty() && context.revision != *revision {
            return differs("revision", &context.revision, revision);
        }
        if !context.model_digest.is_empty() && context.model_digest != *model_digest {
            return differs("model_digest", &context.model_digest, model_digest);
        }
        Ok(())
    }
}

/// A random gang id.
pub(crate) fn new_gang_id() -> String {
    Uuid::new_v4().simple().to_string()[..12].to_owned()
}

/// Milliseconds since 1970 above 20 random bits: later starts have higher epochs as long as the clock does not go back, and
/// if it does, or two start in one millisecond, the random bits keep them apart. Never 0.
pub(crate) fn new_epoch() -> u64 {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_millis() as u64);
    millis << 20 | (Uuid::new_v4().as_u128() as u64 & 0xF_FFFF)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn what_is_set_is_checked() {
        let identity = Identity {
            gang_id: "a".to_owned(),
            epoch: 7,
            revision: "r1".to_owned(),
            model_digest: "sha256:1".to_owned(),
        };
        let ours = Context {
            gang_epoch: 7,
            revision: "r1".to_owned(),
            model_digest: "sha256:1".to_owned(),
            ..Context::default()
        };
        assert!(identity.check(&Context::default()).is_ok());
        assert!(identity.check(&ours).is_ok());
        for (field, theirs) in [
            ("gang_epoch", Context { gang_epoch: 8, ..ours.clone() }),
            ("revision", Context { revision: "r2".to_owned(), ..ours.clone() }),
            ("model_digest", Context { model_digest: "sha256:2".to_owned(), ..ours }),
        ] {
            let status = identity.check(&theirs).unwrap_err();
            assert_eq!(status.code(), Code::FailedPrecondition);
            assert!(status.message().contains(field), "{status:?}");
        }
    }

    #[test]
    fn epochs_and_gang_ids_differ() {
        let epochs: std::collections::HashSet<_> = (0..100).map(|_| new_epoch()).collect();
        assert!(epochs.len() > 98 && !epochs.contains(&0));
        assert_ne!(new_gang_id(), new_gang_id());
    }
}
