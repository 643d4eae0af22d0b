//! The page at `/`, for people: read-only, from this binary alone, and cheap however many look.

mod recent;
mod report;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderValue, Response, header};
use tokio::sync::watch;
use tokio::time::Instant;

pub use recent::Quantiles;
pub use report::{FleetReport, GangReport, LastScale, ModelReport};

use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::task::OwnedTask;
use recent::Recent;

/// A report serves everyone who asks within this time.
const FRESH: Duration = Duration::from_secs(1);

/// Nothing but what comes from here, and nobody frames it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The autoscaler's last decisions, by served name.
pub(crate) type Decisions = watch::Receiver<BTreeMap<String, LastScale>>;

/// What the page is made of.
pub(crate) struct Page {
    fleet: Arc<Fleet>,
    metrics: Arc<Metrics>,
    recent: Arc<Recent>,
    decisions: Option<Decisions>,
    report: Cached,
    _following: OwnedTask,
}

impl Page {
    pub(crate) fn new(fleet: &Arc<Fleet>, metrics: &Arc<Metrics>, decisions: Option<Decisions>) -> Self {
        let recent = Arc::<Recent>::default();
        let following = OwnedTask::spawn(Arc::clone(&recent).follow(Arc::clone(metrics)));
        Self {
            fleet: Arc::clone(fleet),
            metrics: Arc::clone(metrics),
            recent,
            decisions,
            report: Cached::default(),
            _following: following,
        }
    }

    /// `/fleet.json`.
    pub(crate) fn report(&self) -> Response<Body> {
        answer("application/json", Body::from(self.fresh()))
    }

    fn fresh(&self) -> Bytes {
        self.report.get(Instant::now(), || {
            let none = BTreeMap::new();
            let decisions = self.decisions.as_ref().map(watch::Receiver::borrow);
            let decisions = decisions.as_deref().unwrap_or(&none);
            let fleet = FleetReport::new(&self.fleet, &self.metrics, &self.recent, decisions);
            // All of its keys are strings, which is all that can fail.
            Bytes::from(serde_json::to_vec(&fleet).unwrap_or_default())
        })
    }
}

/// What was made last, and when.
#[derive(Debug, Default)]
struct Cached(Mutex<Option<(Instant, Bytes)>>);

impl Cached {
    /// Makes it where there is none that is fresh; who comes meanwhile waits for it.
    fn get(&self, now: Instant, make: impl FnOnce() -> Bytes) -> Bytes {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cached {
            Some((made, bytes)) if now.duration_since(*made) < FRESH => bytes.clone(),
            _ => {
                let bytes = make();
                *cached = Some((now, bytes.clone()));
                bytes
            }
        }
    }
}

/// `/`.
pub(crate) async fn html() -> Response<Body> {
    let mut response = answer("text/html; charset=utf-8", Body::from(include_str!("page.html")));
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// `/page.css`.
pub(crate) async fn style() -> Response<Body> {
    answer("text/css; charset=utf-8", Body::from(include_str!("page.css")))
}

/// `/page.js`.
pub(crate) async fn script() -> Response<Body> {
    answer("text/javascript; charset=utf-8", Body::from(include_str!("page.js")))
}

fn answer(kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_viewers_costs_one_report() {
        let (cached, mut made) = (Cached::default(), 0);
        let mut get = |now| {
            cached.get(now, || {
                made += 1;
                Bytes::from(made.to_string())
            })
        };
        let first = Instant::now();
        for _ in 0..100 {
            assert_eq!(get(first), "1");
        }
        assert_eq!(get(first + FRESH - Duration::from_millis(1)), "1");
        assert_eq!(get(first + FRESH), "2");
    }
}
