//! The OpenAI door's error body and status codes.

use axum::body::Body;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::RequestError;

/// `{"error": {"message", "type", "param", "code"}}`.
pub(crate) fn body(error: &RequestError) -> Value {
    let (kind, code) = match error {
        RequestError::Invalid { .. } => ("invalid_request_error", None),
        RequestError::UnknownModel { .. } => ("invalid_request_error", Some("model_not_found")),
        RequestError::TooLarge { .. } => ("invalid_request_error", Some("request_too_large")),
        RequestError::BodyTimeout(_) => ("invalid_request_error", Some("request_timeout")),
        RequestError::Busy { .. } => ("rate_limit_error", Some("busy")),
        RequestError::Unavailable(_) => ("service_unavailable_error", Some("unavailable")),
        RequestError::Deadline => ("timeout_error", Some("deadline_exceeded")),
        RequestError::SlowClient => ("timeout_error", Some("slow_client")),
        RequestError::Failed(_) => ("server_error", Some("internal_error")),
    };
    let param = match error {
        RequestError::Invalid { field, .. } if !field.is_empty() => Some(field.as_str()),
        RequestError::UnknownModel { .. } => Some("model"),
        _ => None,
    };
    json!({"error": {"message": error.to_string(), "type": kind, "param": param, "code": code}})
}

fn status(error: &RequestError) -> StatusCode {
    match error {
        RequestError::Invalid { .. } => StatusCode::BAD_REQUEST,
        RequestError::UnknownModel { .. } => StatusCode::NOT_FOUND,
        RequestError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        RequestError::BodyTimeout(_) | RequestError::SlowClient => StatusCode::REQUEST_TIMEOUT,
        RequestError::Busy { .. } => StatusCode::TOO_MANY_REQUESTS,
        RequestError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        RequestError::Deadline => StatusCode::GATEWAY_TIMEOUT,
        RequestError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The whole answer to a request that failed before its first byte.
pub(crate) fn response(error: &RequestError) -> Response<Body> {
    let mut response = super::json(status(error), &body(error));
    if let RequestError::Busy { retry_after, .. } = error {
        // Whole seconds are all the header can say.
        let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    response
}
