//! Why a request is not answered, in one enum for both front doors. Each door maps it to its own codes in one place.

use std::time::Duration;

use herd_routing::Refusal;

/// A request that ends without (the rest of) its answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The client has to change the request.
    #[error("{message}")]
    Invalid {
        /// The field at fault, as this front door calls it.
        field: String,
        /// What is wrong with it and what would be right.
        message: String,
    },
    /// No model is served under this name.
    #[error("model {model:?} does not exist; this gateway serves {served}")]
    UnknownModel {
        /// Asked for.
        model: String,
        /// What there is, for the reader.
        served: String,
    },
    /// The body is larger than this gateway reads.
    #[error("the request body has more than {limit} bytes")]
    TooLarge {
        /// Bytes.
        limit: usize,
    },
    /// The body did not arrive in time.
    #[error("the request body did not arrive within {0:?}")]
    BodyTimeout(Duration),
    /// Everything that could take it is full: come back later.
    #[error("{message}")]
    Busy {
        /// What is full.
        message: String,
        /// When to come back.
        retry_after: Duration,
    },
    /// There is no capacity at all now.
    #[error("{0}")]
    Unavailable(String),
    /// The request's deadline is over.
    #[error("the deadline of the request is over")]
    Deadline,
    /// The client took nothing for too long.
    #[error("the client did not read the answer")]
    SlowClient,
    /// Not the client's fault.
    #[error("{0}")]
    Failed(String),
}

impl RequestError {
    /// An [`RequestError::Invalid`].
    pub(crate) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), message: message.into() }
    }

    /// An [`RequestError::UnknownModel`]; the reader is told of some of the models there are.
    pub(crate) fn unknown_model<'a>(model: &str, served: impl Iterator<Item = &'a str>) -> Self {
        let mut served = served.peekable();
        let some: Vec<&str> = served.by_ref().take(MAX_TOLD).collect();
        let served = match (some.is_empty(), served.peek()) {
            (true, _) => "no model".to_owned(),
            (false, None) => some.join(", "),
            (false, Some(_)) => format!("{} and more", some.join(", ")),
        };
        Self::UnknownModel { model: model.to_owned(), served }
    }

    /// What a gateway that ends says to requests it does not take or cannot wait for.
    pub(crate) fn shutting_down() -> Self {
        Self::Unavailable("the gateway is shutting down".to_owned())
    }

    /// What routing said about `model`.
    pub(crate) fn refused(model: &str, refusal: Refusal) -> Self {
        let message = format!("model {model:?}: {refusal}");
        match refusal {
            Refusal::Full => Self::Busy { message, retry_after: RETRY_AFTER },
            Refusal::NoGang | Refusal::Draining | Refusal::NoPrefill | Refusal::NoDecode => {
                Self::Unavailable(message)
            }
        }
    }

    /// A bounded label for metrics.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::UnknownModel { .. } => "unknown_model",
            Self::TooLarge { .. } => "too_large",
            Self::BodyTimeout(_) => "body_timeout",
            Self::Busy { .. } => "busy",
            Self::Unavailable(_) => "unavailable",
            Self::Deadline => "deadline",
            Self::SlowClient => "slow_client",
            Self::Failed(_) => "failed",
        }
    }
}

/// Models a message names: it has to fit the trailers of a gRPC answer.
const MAX_TOLD: usize = 16;

/// The hint to a client where the gang that refused gave none.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);
