//! Registry credentials for the daemon (rows `cb.auth.*`). Tokens are not fetched here: the daemon falls back to credentials.

use shipway_proto::moby::filesync::v1::{
    CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest, GetTokenAuthorityResponse,
    VerifyTokenAuthorityRequest, VerifyTokenAuthorityResponse,
    auth_server::{Auth, AuthServer},
};
use tonic::{Request, Response, Status};

use super::DockerConfig;

pub(crate) fn service(config: DockerConfig) -> AuthServer<DockerConfig> {
    AuthServer::new(config)
}

#[tonic::async_trait]
impl Auth for DockerConfig {
    async fn credentials(&self, request: Request<CredentialsRequest>) -> Result<Response<CredentialsResponse>, Status> {
        let host = request.into_inner().host;
        let found = self.lookup(&host).await.unwrap_or_else(|fault| {
            // A public image must not be lost to a broken helper; the registry's own answer says what a private one lacks.
            tracing::warn!(error = %fault, host, "no credentials");
            None
        });
        let (username, secret) = found.unwrap_or_default();
        Ok(Response::new(CredentialsResponse { username, secret }))
    }

    async fn fetch_token(&self, _: Request<FetchTokenRequest>) -> Result<Response<FetchTokenResponse>, Status> {
        Err(Status::unimplemented("fetching registry tokens in the client"))
    }

    async fn get_token_authority(&self, _: Request<GetTokenAuthorityRequest>) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("fetching registry tokens in the client"))
    }

    async fn verify_token_authority(
        &self,
        _: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("fetching registry tokens in the client"))
    }
}
