//! Liveness, which a daemon asks for every few seconds (row `ses.health`).

use shipway_proto::grpc::health::v1::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};
use tonic::{Request, Response, Status};

pub(crate) struct Alive;

pub(crate) fn service() -> HealthServer<Alive> {
    HealthServer::new(Alive)
}

#[tonic::async_trait]
impl Health for Alive {
    type WatchStream = tokio_stream::Pending<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse { status: ServingStatus::Serving.into() }))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("watching the health of a session; call Check"))
    }
}
