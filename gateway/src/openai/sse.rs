//! Server-sent events. An error ends the stream without `[DONE]`, so that a client sees that something is missing.

use std::collections::VecDeque;

use axum::body::Body;
use bytes::Bytes;
use futures::stream::StreamExt;
use http::{HeaderValue, Response, header};

use super::answer::{Chunks, Method};
use crate::RequestError;
use crate::event::GenerationEvent;
use crate::generation::Events;

struct State {
    chunks: Chunks,
    events: Option<Events>,
    /// Frames to be sent before the next event is taken.
    frames: VecDeque<Bytes>,
}

/// An answer that goes on with `events`, `first` being taken from them already.
pub(crate) fn response<M: Method>(chunks: Chunks, first: GenerationEvent, events: Events) -> Response<Body> {
    let mut state = State { chunks, events: Some(events), frames: VecDeque::new() };
    state.take::<M>(Some(Ok(first)));
    let frames = futures::stream::unfold(state, |mut state| async move {
        loop {
            if let Some(frame) = state.frames.pop_front() {
                return Some((Ok::<_, std::convert::Infallible>(frame), state));
            }
            let next = state.events.as_mut()?.next().await;
            state.take::<M>(next);
        }
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl State {
    fn take<M: Method>(&mut self, next: Option<Result<GenerationEvent, RequestError>>) {
        match next {
            Some(Ok(event)) => self.frames.extend(self.chunks.encode::<M>(event).map(|body| frame(&body))),
            Some(Err(error)) => {
                self.events = None;
                self.frames.push_back(frame(&super::encode(&super::error::body(&error))));
            }
            None => {
                self.events = None;
                self.frames.extend(self.chunks.usage::<M>().map(|body| frame(&body)));
                self.frames.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
            }
        }
    }
}

/// JSON has no line break outside strings, and none unescaped inside.
fn frame(body: &[u8]) -> Bytes {
    [b"data: ", body, b"\n\n"].concat().into()
}
