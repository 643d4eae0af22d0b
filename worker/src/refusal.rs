//! Requests that are not taken, as gRPC statuses.

use std::time::Duration;

use herd_engine::SubmitError;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::grammars::refused;

/// Metadata of a refusal: milliseconds after which trying again makes sense.
pub const RETRY_AFTER: &str = "retry-after-ms";

/// A queue that is full now moves within the time a few requests take; what those take is known to the gateway, not here.
const RETRY_AFTER_MILLIS: u32 = 1000;

/// The status of a request that the engine does not take.
pub(crate) fn refuse(error: &SubmitError) -> Status {
    match error {
        SubmitError::Full { .. } => full(error.to_string()),
        SubmitError::TooLong(_) | SubmitError::Empty | SubmitError::BadToken { .. } => {
            Status::invalid_argument(format!("prompt: {error}"))
        }
        SubmitError::BadSampling { .. } => Status::invalid_argument(format!("sampling.{error}")),
        SubmitError::Constraint(error) => refused(error),
        SubmitError::Stopped(_) => Status::unavailable(error.to_string()),
    }
}

/// `RESOURCE_EXHAUSTED` with a hint when to come back.
pub(crate) fn full(message: String) -> Status {
    let mut status = Status::resource_exhausted(message);
    status.metadata_mut().insert(RETRY_AFTER, MetadataValue::from(RETRY_AFTER_MILLIS));
    status
}

/// How a refusal for want of KV blocks begins. The words are part of the protocol: they mean that no prefill gang is at fault.
const NO_KV_BLOCKS: &str = "no kv blocks";

/// A prompt that another gang computes, and no blocks of the decode gang `at` to put its KV into for as long as `waited`.
pub(crate) fn no_kv_blocks(at: &str, waited: Duration) -> Status {
    full(format!("{NO_KV_BLOCKS} {at} within {waited:?}"))
}

/// A gang that takes nothing new. The words are part of the protocol: they mean "retry elsewhere, nothing was done".
pub(crate) fn draining() -> Status {
    Status::unavailable(DRAINING)
}

const DRAINING: &str = "draining, not started";

/// A gang that does not serve yet, or starts anew.
pub(crate) fn not_whole() -> Status {
    Status::unavailable(NOT_WHOLE)
}

const NOT_WHOLE: &str = "this gang is not whole, not started";

/// How a status begins that is about the prefill gang. The words are part of the protocol.
const AT_PREFILL: &str = "prefill at ";

/// Why a call was refused, for metrics.
pub(crate) const REASONS: [&str; 7] =
    ["draining", "full", "not_whole", "stale", "invalid", "prefill", "other"];

/// One of [`REASONS`].
pub(crate) fn reason(status: &Status) -> &'static str {
    let [draining, full, not_whole, stale, invalid, prefill, other] = REASONS;
    match status.code() {
        _ if status.message().starts_with(AT_PREFILL) => prefill,
        Code::Unavailable if status.message() == DRAINING => draining,
        Code::Unavailable if status.message() == NOT_WHOLE => not_whole,
        Code::ResourceExhausted => full,
        Code::FailedPrecondition => stale,
        Code::InvalidArgument => invalid,
        _ => other,
    }
}

/// What a prefill gang's refusal or failure means to whoever called `Decode`: a full queue and a bad argument are passed on,
/// a want of blocks on this side without blame, anything else is a gang that cannot be used now.
pub(crate) fn prefill_failed(peer: &str, status: &Status) -> Status {
    let message = format!("{AT_PREFILL}{peer}: {}", status.message());
    match status.code() {
        Code::ResourceExhausted if status.message().starts_with(NO_KV_BLOCKS) => {
            full(status.message().to_owned())
        }
        Code::ResourceExhausted => full(message),
        Code::InvalidArgument => Status::invalid_argument(message),
        code => Status::unavailable(format!("{message} ({code:?})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_comes_with_a_hint() {
        let status = refuse(&SubmitError::Full { waiting: 3 });
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.metadata().get(RETRY_AFTER).unwrap(), "1000");
        let passed_on = prefill_failed("p:1", &status);
        assert_eq!(passed_on.code(), Code::ResourceExhausted);
        assert!(passed_on.metadata().contains_key(RETRY_AFTER));
    }

    #[test]
    fn a_want_of_blocks_is_not_the_prefill_gangs_fault() {
        let passed_on = prefill_failed("p:1", &no_kv_blocks("at d:1", Duration::from_mins(10)));
        assert_eq!(passed_on.code(), Code::ResourceExhausted);
        assert_eq!(passed_on.message(), "no kv blocks at d:1 within 600s");
        assert!(passed_on.metadata().contains_key(RETRY_AFTER));
    }

    #[test]
    fn every_refusal_has_its_reason() {
        for (status, expected) in [
            (draining(), "draining"),
            (not_whole(), "not_whole"),
            (refuse(&SubmitError::Full { waiting: 3 }), "full"),
            (refuse(&SubmitError::Empty), "invalid"),
            (refuse(&SubmitError::Stopped(String::new())), "other"),
            (Status::failed_precondition("context.gang_epoch is 1"), "stale"),
            (prefill_failed("p:1", &full("queue".to_owned())), "prefill"),
            (prefill_failed("p:1", &draining()), "prefill"),
        ] {
            assert_eq!(reason(&status), expected, "{status:?}");
        }
    }

    #[test]
    fn another_gangs_trouble_is_no_fault_of_the_request() {
        for status in [Status::failed_precondition("x"), Status::internal("x"), Status::not_found("x")] {
            assert_eq!(prefill_failed("p:1", &status).code(), Code::Unavailable);
        }
    }
}
