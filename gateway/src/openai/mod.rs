//! The OpenAI door: chat and text completions, models; health and metrics beside them.

mod answer;
mod chat;
mod completions;
mod error;
mod fields;
mod models;
mod prompt;
mod request;
mod sse;
mod structured;
mod usage;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::stream::StreamExt;
use herd_listen::Bounded;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::answer::{About, Chunks, Method, Whole};
use self::request::Parsed;
use crate::gateway::{Parts, Submitted};
use crate::http1;
use crate::observe::{Admitted, Api};
use crate::task::OwnedTask;
use crate::{RequestError, page, request_id};

/// What every handler needs.
#[derive(Clone)]
struct Door {
    parts: Arc<Parts>,
    closing: watch::Receiver<bool>,
    /// Unix time the door opened: `created` of the models.
    opened: u64,
}

/// Serves on `listener` until `closing` says otherwise, then until the last request has ended.
pub(crate) fn open(
    listener: TcpListener,
    parts: Arc<Parts>,
    closing: watch::Receiver<bool>,
    cut: CancellationToken,
) -> OwnedTask {
    let listener = Bounded::new(listener, parts.limits.connections, cut);
    let header_timeout = parts.limits.header_timeout;
    let door = Door { parts, closing: closing.clone(), opened: unix_now() };
    let router = Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*name}", get(one_model))
        .route("/health", get(health))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/", get(page::html))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/fleet.json", get(fleet))
        .fallback(async || not_found())
        .method_not_allowed_fallback(async || wrong_method())
        .with_state(door);
    OwnedTask::spawn(http1::serve(listener, router, header_timeout, closing))
}

async fn chat_completions(State(door): State<Door>, request: Request<Body>) -> Response<Body> {
    complete::<chat::Chat>(&door, Api::Chat, chat::read, request).await
}

async fn text_completions(State(door): State<Door>, request: Request<Body>) -> Response<Body> {
    complete::<completions::Completions>(&door, Api::Completions, completions::read, request).await
}

type Reader = fn(&[u8], String, Instant) -> Result<Parsed, RequestError>;

async fn complete<M: Method>(door: &Door, api: Api, read: Reader, request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let given = head.headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let request_id = request_id::choose([given]);
    let mut response = match answer::<M>(door, api, read, &request_id, body).await {
        Ok(response) => response,
        Err(error) => error::response(&error),
    };
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

async fn answer<M: Method>(
    door: &Door,
    api: Api,
    read: Reader,
    request_id: &str,
    body: Body,
) -> Result<Response<Body>, RequestError> {
    let parts = &door.parts;
    let mut admitted = parts.admit(api)?;
    let deadline = Instant::now() + parts.limits.request_deadline;
    let parsed = async { read(&collect(door, body).await?, request_id.to_owned(), deadline) };
    let parsed = parsed.await.inspect_err(|error| admitted.ended(Some(error)))?;
    let ignored = parsed.ignored.join(", ");
    let mut response = run::<M>(parts, parsed, admitted).await?;
    if let Ok(value) = HeaderValue::from_str(&ignored)
        && !ignored.is_empty()
    {
        response.headers_mut().insert("x-herd-ignored-fields", value);
    }
    Ok(response)
}

/// For a body to arrive once the gateway drains.
const BODY_ONCE_CLOSING: Duration = Duration::from_secs(1);

/// The whole body, within its bounds of size and time.
async fn collect(door: &Door, body: Body) -> Result<Bytes, RequestError> {
    let limit = door.parts.limits.body_bytes;
    let patience = door.parts.limits.body_timeout;
    let mut closing = door.closing.clone();
    let closed = async {
        let _ = closing.wait_for(|closing| *closing).await;
        tokio::time::sleep(BODY_ONCE_CLOSING).await;
    };
    let collected = tokio::select! {
        collected = timeout(patience, Limited::new(body, limit).collect()) => collected,
        () = closed => return Err(RequestError::shutting_down()),
    };
    match collected {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => {
            Err(RequestError::TooLarge { limit })
        }
        Ok(Err(error)) => Err(RequestError::invalid("", format!("failed to read the request body: {error}"))),
        Err(_) => Err(RequestError::BodyTimeout(patience)),
    }
}

/// Starts the generation and answers once its first event is there: what is refused until then has a status of its own.
async fn run<M: Method>(
    parts: &Arc<Parts>,
    parsed: Parsed,
    admitted: Admitted,
) -> Result<Response<Body>, RequestError> {
    let Parsed { request, delivery, ignored: _ } = parsed;
    let (n, logprobs) = (request.n, request.sampling.logprobs);
    let Submitted { mut events, model, seed: _, prompts } =
        parts.submit(request, admitted, SystemTime::now()).await?;
    let about = About {
        id: format!("{}{}", M::PREFIX, request_id::fresh()),
        created: unix_now(),
        model: model.name,
        n,
        prompts,
        logprobs,
        text: model.text,
        prompt_details: Vec::new(),
        delivery,
    };
    if delivery.stream {
        return match events.next().await {
            Some(first) => Ok(sse::response::<M>(Chunks::new(about), first?, events)),
            None => Err(RequestError::Failed("the generation ended without an event".to_owned())),
        };
    }
    let mut whole = Whole::new(about);
    while let Some(event) = events.next().await {
        whole.take(event?);
    }
    Ok(json_bytes(StatusCode::OK, whole.body::<M>()?))
}

async fn list_models(State(door): State<Door>) -> Response<Body> {
    json(StatusCode::OK, &models::list(door.parts.fleet.models(), door.opened))
}

async fn one_model(State(door): State<Door>, name: Result<Path<String>, PathRejection>) -> Response<Body> {
    let Ok(Path(name)) = name else {
        return error::response(&RequestError::invalid("model", "the model in the path is not UTF-8"));
    };
    let models = door.parts.fleet.models();
    if let Some(model) = models.iter().find(|model| model.name == name) {
        return json(StatusCode::OK, &models::one(model.clone(), door.opened));
    }
    let served = models.iter().map(|model| model.name.as_str());
    error::response(&RequestError::unknown_model(&name, served))
}

/// Whether this process serves; whether a model does is in the list of models.
async fn health(State(door): State<Door>) -> Response<Body> {
    if *door.closing.borrow() {
        return json(StatusCode::SERVICE_UNAVAILABLE, &serde_json::json!({"status": "draining"}));
    }
    json(StatusCode::OK, &serde_json::json!({"status": "ok"}))
}

/// Whether clients should be sent here.
async fn readyz(State(door): State<Door>) -> (StatusCode, &'static str) {
    if *door.closing.borrow() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else if door.parts.fleet.discovered() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the fleet is not known yet\n")
    }
}

async fn metrics(State(door): State<Door>) -> Response<Body> {
    match door.parts.metrics.render(&door.parts.fleet) {
        Ok(text) => {
            let mut response = Response::new(Body::from(text));
            let kind = HeaderValue::from_static("text/plain; version=0.0.4");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        Err(error) => error::response(&RequestError::Failed(error.to_string())),
    }
}

async fn fleet(State(door): State<Door>) -> Response<Body> {
    door.parts.page.report()
}

fn not_found() -> Response<Body> {
    let message = "no such path; there are /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics, and / for people";
    plain_error(StatusCode::NOT_FOUND, message)
}

fn wrong_method() -> Response<Body> {
    plain_error(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
}

fn plain_error(status: StatusCode, message: &str) -> Response<Body> {
    let body = serde_json::json!({
        "error": {"message": message, "type": "invalid_request_error", "param": null, "code": null}
    });
    json(status, &body)
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Body> {
    json_bytes(status, encode(body))
}

fn json_bytes(status: StatusCode, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// None of our bodies has a key that is not a string, which is all that can fail.
fn encode(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).unwrap_or_default()
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
