//! gRPC health (row `net.health`): everything is serving while we answer.

use shipway_proto::grpc::health::v1 as wire;
use tonic::{Request, Response, Status};

/// The service.
pub struct HealthService;

fn serving() -> wire::HealthCheckResponse {
    wire::HealthCheckResponse { status: wire::health_check_response::ServingStatus::Serving as i32 }
}

#[tonic::async_trait]
impl wire::health_server::Health for HealthService {
    async fn check(
        &self,
        _: Request<wire::HealthCheckRequest>,
    ) -> Result<Response<wire::HealthCheckResponse>, Status> {
        Ok(Response::new(serving()))
    }

    type WatchStream = futures::stream::Chain<
        tokio_stream::Once<Result<wire::HealthCheckResponse, Status>>,
        futures::stream::Pending<Result<wire::HealthCheckResponse, Status>>,
    >;

    async fn watch(
        &self,
        _: Request<wire::HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        // The status never changes while we live, and a watch must not end.
        Ok(Response::new(futures::StreamExt::chain(
            tokio_stream::once(Ok(serving())),
            futures::stream::pending(),
        )))
    }
}
