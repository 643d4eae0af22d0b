//! One candidate's requests. Each carries the version it is based on, so that of two that saw the same record one wins.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Error};
use tokio::time::{Instant, timeout};

use super::election::{Election, Verdict, released};
use super::error::LeaseError;

/// Times a lease is given back before somebody who keeps changing it has his way.
const RELEASE_ATTEMPTS: u32 = 3;

/// How an attempt to hold the lease ended.
#[derive(Debug)]
pub(super) enum Attempt {
    /// It is ours by a request that was sent then.
    Leads { sent: Instant },
    /// It is another's, at least until then.
    Waits { holder: String, until: Instant },
}

/// A candidate and what it knows of the lease.
#[derive(Debug)]
pub(super) struct Candidate {
    api: Api<Lease>,
    name: String,
    election: Election,
    /// As last written by us; to be renewed without being read.
    written: Option<Lease>,
}

impl Candidate {
    pub(super) fn new(api: Api<Lease>, name: String, election: Election) -> Self {
        Self { api, name, election, written: None }
    }

    /// Takes or renews the lease if that may be.
    pub(super) async fn attempt(&mut self) -> Result<Attempt, LeaseError> {
        if let Some(held) = self.written.take() {
            match self.write(Some(held)).await {
                // Somebody changed or deleted it: what it is now decides.
                Err(LeaseError::Conflict { .. }) => {}
                attempt => return attempt,
            }
        }
        let found = self.request("get", self.api.get_opt(&self.name)).await?;
        let unset = LeaseSpec::default();
        let spec = found.as_ref().map(|lease| lease.spec.as_ref().unwrap_or(&unset));
        self.election.observe(spec, Instant::now());
        match self.election.verdict(Instant::now()) {
            Verdict::Wait { until } => {
                let holder = self.election.holder().unwrap_or_default().to_owned();
                Ok(Attempt::Waits { holder, until })
            }
            Verdict::Hold | Verdict::Acquire => self.write(found).await,
        }
    }

    /// Writes our claim over what was seen.
    async fn write(&mut self, seen: Option<Lease>) -> Result<Attempt, LeaseError> {
        let spec = Some(self.election.claim(Timestamp::now()));
        let sent = Instant::now();
        let written = if let Some(lease) = seen {
            self.replace(&Lease { spec, ..lease }).await?
        } else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec };
            self.request("create", self.api.create(&PostParams::default(), &lease)).await?
        };
        self.election.observe(written.spec.as_ref(), Instant::now());
        self.written = Some(written);
        Ok(Attempt::Leads { sent })
    }

    /// Writes that nobody holds the lease; `false` if it is another's already.
    pub(super) async fn release(self) -> Result<bool, LeaseError> {
        let mut attempts = 1;
        loop {
            // Read anew: the last renewal may have been cut off between the request and its answer.
            let found = self.request("get", self.api.get_opt(&self.name)).await?;
            let Some(Lease { metadata, spec: Some(spec) }) = found else { return Ok(false) };
            if spec.holder_identity.as_deref() != Some(self.election.identity()) {
                return Ok(false);
            }
            let lease = Lease { metadata, spec: Some(released(&spec, Timestamp::now())) };
            match self.replace(&lease).await {
                Ok(_) => return Ok(true),
                Err(LeaseError::Conflict { .. }) if attempts < RELEASE_ATTEMPTS => attempts += 1,
                Err(error) => return Err(error),
            }
        }
    }

    async fn replace(&self, lease: &Lease) -> Result<Lease, LeaseError> {
        match self.request("update", self.api.replace(&self.name, &PostParams::default(), lease)).await {
            // Deleted meanwhile.
            Err(LeaseError::Api { source, .. }) if has_code(&source, 404) => {
                Err(LeaseError::Conflict { name: self.name.clone() })
            }
            answer => answer,
        }
    }

    async fn request<T>(
        &self,
        action: &'static str,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, LeaseError> {
        let name = || self.name.clone();
        let within = self.request_timeout();
        match timeout(within, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) if has_code(&source, 409) => Err(LeaseError::Conflict { name: name() }),
            Ok(Err(source)) => Err(LeaseError::Api { action, name: name(), source: Box::new(source) }),
            Err(_) => Err(LeaseError::Timeout { action, name: name(), within }),
        }
    }

    /// So that a request without an answer leaves time for another one before the renew deadline.
    fn request_timeout(&self) -> Duration {
        self.election.timing().renew_deadline / 2
    }
}

fn has_code(error: &Error, code: u16) -> bool {
    matches!(error, Error::Api(status) if status.code == code)
}
