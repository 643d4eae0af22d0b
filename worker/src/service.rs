//! The `Worker` service: checks who is meant, then hands on.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::worker_server::Worker;
use tonic::{Request, Response, Status};

use crate::gang::{self, Current, Gang};
use crate::metrics::{Call, Metrics};
use crate::stream::TaskStream;
use crate::{bundle, deadline, decode, prefill, watch};

/// The service of one gang.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    gang: Current,
    metrics: Arc<Metrics>,
}

impl Service {
    pub(crate) fn new(gang: Current, metrics: Arc<Metrics>) -> Self {
        Self { gang, metrics }
    }

    fn gang(&self) -> Result<Arc<Gang>, Status> {
        gang::current(&self.gang)
    }

    /// The gang that is meant.
    fn meant(&self, context: Option<&wire::Context>) -> Result<Arc<Gang>, Status> {
        let gang = self.gang()?;
        context.map_or(Ok(()), |context| gang.identity.check(context))?;
        Ok(gang)
    }

    fn lease_millis(lease: Duration) -> u32 {
        u32::try_from(lease.as_millis()).unwrap_or(u32::MAX)
    }
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Service {
    type WatchStream = Boxed<wire::WatchEvent>;
    type DecodeStream = TaskStream<wire::DecodeEvent>;
    type AttachStream = TaskStream<wire::DecodeEvent>;
    type PrefillStream = TaskStream<wire::PrefillEvent>;
    type GetBundleStream = Boxed<wire::BundleChunk>;

    async fn describe(
        &self,
        _: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeResponse>, Status> {
        let gang = self.gang()?;
        let Gang { identity, model, engine, role, .. } = &*gang;
        let limits = engine.limits();
        Ok(Response::new(wire::DescribeResponse {
            gang_id: identity.gang_id.clone(),
            epoch: identity.epoch,
            role: (*role.borrow()).into(),
            revision: identity.revision.clone(),
            model_digest: identity.model_digest.clone(),
            kv_fingerprint: model.kv_fingerprint.clone(),
            tensor: model.shards.tensor() as u32,
            context_length: limits.context_length as u32,
            vocab_size: engine.vocab_size() as u32,
            block_tokens: limits.block_tokens as u32,
            kv_blocks: limits.kv_blocks as u32,
            max_sequences: limits.max_sequences as u32,
            pipeline: model.shards.parallelism().pipeline as u32,
        }))
    }

    async fn set_role(
        &self,
        request: Request<wire::SetRoleRequest>,
    ) -> Result<Response<wire::SetRoleResponse>, Status> {
        let wire::SetRoleRequest { role } = request.into_inner();
        match wire::Role::try_from(role) {
            Ok(role @ (wire::Role::Unified | wire::Role::Prefill | wire::Role::Decode)) => {
                self.gang()?.role.send_replace(role);
                Ok(Response::new(wire::SetRoleResponse {}))
            }
            Ok(wire::Role::Unspecified) | Err(_) => {
                Err(Status::invalid_argument(format!("role: {role} is not UNIFIED, PREFILL or DECODE")))
            }
        }
    }

    async fn watch(&self, _: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(Box::pin(watch::events(&self.gang()?))))
    }

    async fn decode(
        &self,
        request: Request<wire::DecodeRequest>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let deadline = deadline::of(request.metadata());
        let decoding = async { decode::decode(&self.gang()?, request.into_inner(), deadline).await };
        let decoding = decoding.await.map_err(|status| self.metrics.refused(Call::Decode, status));
        decoding.map(Response::new)
    }

    async fn attach(&self, _: Request<wire::AttachRequest>) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented("running streams cannot be taken over yet"))
    }

    async fn prefill(
        &self,
        request: Request<wire::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let deadline = deadline::of(request.metadata());
        let prefilling = async { prefill::prefill(&self.gang()?, request.into_inner(), deadline).await };
        let prefilling = prefilling.await.map_err(|status| self.metrics.refused(Call::Prefill, status));
        prefilling.map(Response::new)
    }

    async fn reserve(
        &self,
        request: Request<wire::ReserveRequest>,
    ) -> Result<Response<wire::ReserveResponse>, Status> {
        let wire::ReserveRequest { context, transfer, prompt_tokens } = request.into_inner();
        let gang = self.meant(context.as_ref())?;
        let lease = gang.transfers.reserve(transfer, prompt_tokens as usize).await?;
        Ok(Response::new(wire::ReserveResponse {
            kv_endpoints: gang.kv_endpoints.clone(),
            lease_millis: Self::lease_millis(lease),
            tensor: gang.model.shards.tensor() as u32,
        }))
    }

    async fn renew(
        &self,
        request: Request<wire::RenewRequest>,
    ) -> Result<Response<wire::RenewResponse>, Status> {
        let wire::RenewRequest { context, transfer } = request.into_inner();
        let lease = self.meant(context.as_ref())?.transfers.renew(transfer).await?;
        Ok(Response::new(wire::RenewResponse { lease_millis: Self::lease_millis(lease) }))
    }

    async fn drain(
        &self,
        request: Request<wire::DrainRequest>,
    ) -> Result<Response<wire::DrainResponse>, Status> {
        let gang = self.gang()?;
        let deadline = match request.into_inner().deadline_millis {
            0 => gang.drain_deadline,
            millis => Duration::from_millis(millis.into()),
        };
        let aborted = gang.admission.drain(deadline).await as u32;
        Ok(Response::new(wire::DrainResponse { aborted }))
    }

    async fn get_bundle(
        &self,
        _: Request<wire::GetBundleRequest>,
    ) -> Result<Response<Self::GetBundleStream>, Status> {
        let gang = self.gang()?;
        let dir = gang.model.bundle.as_ref();
        let dir = dir.ok_or_else(|| Status::failed_precondition("this worker's model has no files"))?;
        Ok(Response::new(Box::pin(bundle::chunks(dir))))
    }
}
