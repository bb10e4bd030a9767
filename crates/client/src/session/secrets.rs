//! Secrets of a build (rows `cb.secrets*`).

use std::{collections::BTreeMap, path::PathBuf};

use shipway_fault::{Fault, Result};
use shipway_grpc::status_of;
use shipway_proto::moby::buildkit::secrets::v1::{
    GetSecretRequest, GetSecretResponse,
    secrets_server::{Secrets as Service, SecretsServer},
};
use tonic::{Request, Response, Status};

/// Largest secret, in bytes.
pub const MAX_SECRET: u64 = 500 << 10;

/// Where a secret comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// A file, read when the build asks.
    File(PathBuf),
    /// A variable of our environment.
    Env(String),
}

/// Secrets by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Secrets(BTreeMap<String, SecretSource>);

impl Secrets {
    /// Offers `source` as `id`; fails if it is a file that cannot be used. Without a source, the
    /// variable called `id` is it, or else the file.
    pub fn add(&mut self, id: &str, source: Option<SecretSource>) -> Result<()> {
        if id.is_empty() {
            return Err(Fault::invalid("secret missing ID").hint("give it as id=<name>"));
        }
        let source = source.unwrap_or_else(|| match std::env::var_os(id) {
            Some(_) => SecretSource::Env(id.to_owned()),
            None => SecretSource::File(id.into()),
        });
        if let SecretSource::File(path) = &source {
            let found = std::fs::metadata(path)
                .map_err(|e| Fault::io(format!("failed to stat {}", path.display()), e))?;
            if found.len() > MAX_SECRET {
                return Err(Fault::invalid(format!("secret {id} too big. max size 500KB")));
            }
        }
        self.0.insert(id.to_owned(), source);
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn service(self) -> SecretsServer<Self> {
        SecretsServer::new(self)
    }

    async fn read(&self, id: &str) -> Result<Vec<u8>> {
        let data = match self.0.get(id).ok_or_else(|| Fault::not_found("not found"))? {
            SecretSource::Env(name) => {
                use std::os::unix::ffi::OsStringExt;
                std::env::var_os(name).unwrap_or_default().into_vec()
            }
            SecretSource::File(path) => {
                use tokio::io::AsyncReadExt;
                let failed =
                    |e| Fault::io(format!("read the secret {id} from {}", path.display()), e);
                let mut data = Vec::new();
                let file = tokio::fs::File::open(path).await.map_err(failed)?;
                file.take(MAX_SECRET + 1).read_to_end(&mut data).await.map_err(failed)?;
                data
            }
        };
        if data.len() as u64 > MAX_SECRET {
            return Err(Fault::invalid(format!("secret {id} too big. max size 500KB")));
        }
        Ok(data)
    }
}

#[tonic::async_trait]
impl Service for Secrets {
    async fn get_secret(
        &self,
        request: Request<GetSecretRequest>,
    ) -> Result<Response<GetSecretResponse>, Status> {
        let data = self.read(&request.into_inner().id).await.map_err(|fault| status_of(&fault))?;
        Ok(Response::new(GetSecretResponse { data }))
    }
}
