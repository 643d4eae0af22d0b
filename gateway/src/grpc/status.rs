//! The gRPC door's codes, and the retry hint that travels in `grpc-status-details-bin`.

use std::time::Duration;

use prost::Message as _;
use tonic::{Code, Status};

use crate::RequestError;

/// `google.rpc.Status`, as far as it is used here.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// `google.rpc.RetryInfo`.
#[derive(Clone, PartialEq, prost::Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<prost_types::Duration>,
}

const RETRY_INFO: &str = "type.googleapis.com/google.rpc.RetryInfo";

/// Metadata of a gang's refusal.
const RETRY_AFTER_MILLIS: &str = "retry-after-ms";

/// The status of a request that was not answered.
pub(crate) fn status(error: &RequestError) -> Status {
    let message = error.to_string();
    match error {
        RequestError::Invalid { field, .. } if message.contains(field.as_str()) => {
            Status::invalid_argument(message)
        }
        RequestError::Invalid { field, .. } => Status::invalid_argument(format!("{field}: {message}")),
        RequestError::UnknownModel { .. } => Status::not_found(message),
        RequestError::Busy { retry_after, .. } => with_retry(message, *retry_after),
        RequestError::Unavailable(_) => Status::unavailable(message),
        RequestError::Deadline | RequestError::BodyTimeout(_) => Status::deadline_exceeded(message),
        RequestError::TooLarge { .. } => Status::out_of_range(message),
        RequestError::SlowClient => Status::cancelled(message),
        RequestError::Failed(_) => Status::internal(message),
    }
}

fn with_retry(message: String, after: Duration) -> Status {
    let retry_delay =
        Some(prost_types::Duration { seconds: after.as_secs() as i64, nanos: after.subsec_nanos() as i32 });
    let info = prost_types::Any {
        type_url: RETRY_INFO.to_owned(),
        value: RetryInfo { retry_delay }.encode_to_vec(),
    };
    let code = Code::ResourceExhausted;
    let details = RpcStatus { code: code as i32, message: message.clone(), details: vec![info] };
    Status::with_details(code, message, details.encode_to_vec().into())
}

/// When a status says to come back: in a gang's metadata, or as a `RetryInfo`.
pub(crate) fn retry_after(status: &Status) -> Option<Duration> {
    if let Some(millis) = status.metadata().get(RETRY_AFTER_MILLIS) {
        return millis.to_str().ok()?.parse().ok().map(Duration::from_millis);
    }
    let details = RpcStatus::decode(status.details()).ok()?.details;
    let info = details.into_iter().find(|detail| detail.type_url == RETRY_INFO)?;
    let delay = RetryInfo::decode(info.value.as_slice()).ok()?.retry_delay?;
    Some(Duration::new(u64::try_from(delay.seconds).ok()?, u32::try_from(delay.nanos).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_hint_comes_back_as_it_was_sent() {
        let after = Duration::from_millis(2500);
        let status = status(&RequestError::Busy { message: "full".to_owned(), retry_after: after });
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(retry_after(&status), Some(after));
        assert_eq!(retry_after(&Status::unavailable("full")), None);
        let mut of_a_gang = Status::resource_exhausted("full");
        of_a_gang.metadata_mut().insert("retry-after-ms", "1500".parse().unwrap());
        assert_eq!(retry_after(&of_a_gang), Some(Duration::from_millis(1500)));
    }

    #[test]
    fn no_capacity_and_full_are_two_codes() {
        assert_eq!(status(&RequestError::Unavailable("none".to_owned())).code(), Code::Unavailable);
    }
}
