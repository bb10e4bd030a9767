//! gRPC health (row `net.health`): everything is serving until the server begins to end.

use futures::StreamExt as _;
use shipway_proto::grpc::health::v1 as wire;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use wire::health_check_response::ServingStatus::{self, NotServing, Serving};

type Watched = Result<wire::HealthCheckResponse, Status>;

/// The service; by default of a server that serves as long as it answers.
#[derive(Clone, Debug, Default)]
pub struct HealthService(CancellationToken);

impl HealthService {
    /// Of a server that serves until `ending` is cancelled, and may answer for longer.
    pub fn until(ending: CancellationToken) -> Self {
        Self(ending)
    }

    fn now(&self) -> wire::HealthCheckResponse {
        answer(if self.0.is_cancelled() { NotServing } else { Serving })
    }
}

fn answer(status: ServingStatus) -> wire::HealthCheckResponse {
    wire::HealthCheckResponse { status: status as i32 }
}

#[tonic::async_trait]
impl wire::health_server::Health for HealthService {
    async fn check(
        &self,
        _: Request<wire::HealthCheckRequest>,
    ) -> Result<Response<wire::HealthCheckResponse>, Status> {
        Ok(Response::new(self.now()))
    }

    type WatchStream = futures::stream::BoxStream<'static, Watched>;

    async fn watch(
        &self,
        _: Request<wire::HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (now, ending) = (self.now(), self.0.clone());
        let changes = now.status == Serving as i32;
        let end = async move {
            ending.cancelled_owned().await;
            Ok(answer(NotServing))
        };
        // The status changes once at most, and a watch must not end.
        let first = futures::stream::iter([Ok(now)]);
        let then = futures::stream::iter(changes.then_some(end)).then(|end| end);
        Ok(Response::new(first.chain(then).chain(futures::stream::pending()).boxed()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use wire::health_server::Health as _;

    #[tokio::test]
    async fn a_server_that_ends_says_so_to_those_who_ask_and_those_who_watch() {
        let ending = CancellationToken::new();
        let service = HealthService::until(ending.clone());
        let ask = || async {
            service.check(Request::new(Default::default())).await.unwrap().into_inner().status
        };
        let mut watch = service.watch(Request::new(Default::default())).await.unwrap().into_inner();
        assert_eq!(watch.next().await.unwrap().unwrap().status, Serving as i32);
        assert_eq!(ask().await, Serving as i32);
        assert!(futures::poll!(watch.next()).is_pending());
        ending.cancel();
        assert_eq!(watch.next().await.unwrap().unwrap().status, NotServing as i32);
        assert_eq!(ask().await, NotServing as i32);
        assert!(futures::poll!(watch.next()).is_pending());
    }
}
