//! Registry credentials from the client (rows `cb.auth.*`).

use std::{fmt, sync::OnceLock, time::Duration};

use ring::signature::{ED25519, UnparsedPublicKey};
use shipway_fault::{Code, Fault, Result};
use shipway_host::random_bytes;
use shipway_proto::moby::filesync::v1::{
    CredentialsRequest, FetchTokenRequest, GetTokenAuthorityRequest, VerifyTokenAuthorityRequest,
    auth_client::AuthClient,
};

use crate::{
    Session,
    call::{client, optional},
};

/// Answers may wait for a helper program, or for the registry's server of tokens, and a build that
/// gets none fails within a minute.
const LIMIT: Duration = Duration::from_secs(45);

/// A name and a secret for a registry. An empty name makes the secret an identity token.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Name of the user.
    pub username: String,
    /// Password or token.
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// A bearer token to be fetched by the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRequest {
    /// How we call ourselves.
    pub client_id: String,
    /// The registry.
    pub host: String,
    /// The token server.
    pub realm: String,
    /// The service to name to it.
    pub service: String,
    /// The access to ask for.
    pub scopes: Vec<String>,
}

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The token.
    pub token: String,
    /// Seconds it is good for; 0 if unknown.
    pub expires_in: i64,
    /// When it was issued, in seconds since 1970; 0 if unknown.
    pub issued_at: i64,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("expires_in", &self.expires_in).finish_non_exhaustive()
    }
}

/// Length of the signature before what is signed, as NaCl has it.
const SIGNATURE: usize = 64;

/// Goes into the keys that clients make for us, so that they are of no use to another daemon or
/// after a restart.
fn salt() -> Result<[u8; 32]> {
    static SALT: OnceLock<[u8; 32]> = OnceLock::new();
    match SALT.get() {
        Some(salt) => Ok(*salt),
        None => Ok(*SALT.get_or_init({
            let made = random_bytes()?;
            move || made
        })),
    }
}

impl Session {
    /// The client's credentials for `host`, if it has any.
    pub async fn credentials(&self, host: &str) -> Result<Option<Credentials>> {
        let mut client = client!(AuthClient, self);
        let what = format!("ask the client for its credentials for {host}");
        let call = client.credentials(CredentialsRequest { host: host.to_owned() });
        let answer = optional(LIMIT, &what, &[Code::Unimplemented], call).await?;
        Ok(answer
            .map(|a| Credentials { username: a.username, secret: a.secret })
            .filter(|c| !c.username.is_empty() || !c.secret.is_empty()))
    }

    /// A token that the client fetches with credentials we never see; `None` if it cannot.
    pub async fn fetch_token(&self, request: TokenRequest) -> Result<Option<Token>> {
        let mut client = client!(AuthClient, self);
        let what = format!("ask the client for a token for {}", request.host);
        let TokenRequest { client_id, host, realm, service, scopes } = request;
        let call =
            client.fetch_token(FetchTokenRequest { client_id, host, realm, service, scopes });
        let answer =
            optional(LIMIT, &what, &[Code::Unimplemented, Code::Unavailable], call).await?;
        Ok(answer.map(|a| Token {
            token: a.token,
            expires_in: a.expires_in,
            issued_at: a.issued_at,
        }))
    }

    /// The public key that stands for the client's credentials for `host`, after the client has
    /// proved to have its other half; `None` if it does not do that. Clients of equal credentials
    /// have equal keys as long as we live, and may share tokens.
    pub async fn proven_authority(&self, host: &str) -> Result<Option<[u8; 32]>> {
        let salt = salt()?;
        let Some(key) = self.token_authority(host, &salt).await? else { return Ok(None) };
        let payload = random_bytes::<32>()?;
        let signed = self.verify_token_authority(host, &salt, &payload).await?.unwrap_or_default();
        let proven = signed.split_at_checked(SIGNATURE).is_some_and(|(signature, said)| {
            said == payload
                && UnparsedPublicKey::new(&ED25519, key).verify(&payload, signature).is_ok()
        });
        if !proven {
            tracing::warn!(
                session = self.id().as_str(),
                host,
                "the client does not prove its token authority"
            );
        }
        Ok(proven.then_some(key))
    }

    /// The public key by which the client proves, with [`Session::verify_token_authority`], that it
    /// holds credentials for `host`; `None` if it does not do that.
    pub async fn token_authority(&self, host: &str, salt: &[u8]) -> Result<Option<[u8; 32]>> {
        let mut client = client!(AuthClient, self);
        let what = format!("ask the client for its token authority for {host}");
        let call = client.get_token_authority(GetTokenAuthorityRequest {
            host: host.to_owned(),
            salt: salt.to_vec(),
        });
        let Some(answer) =
            optional(LIMIT, &what, &[Code::Unimplemented, Code::Unavailable], call).await?
        else {
            return Ok(None);
        };
        let length = answer.public_key.len();
        let key = answer
            .public_key
            .try_into()
            .map_err(|_| Fault::invalid(format!("{what}: invalid pubkey length {length}")))?;
        Ok(Some(key))
    }

    /// `payload` signed by the client with the key of [`Session::token_authority`]; `None` if it
    /// does not do that.
    pub async fn verify_token_authority(
        &self,
        host: &str,
        salt: &[u8],
        payload: &[u8],
    ) -> Result<Option<Vec<u8>>> {
        let mut client = client!(AuthClient, self);
        let what = format!("verify the client's token authority for {host}");
        let request = VerifyTokenAuthorityRequest {
            host: host.to_owned(),
            payload: payload.to_vec(),
            salt: salt.to_vec(),
        };
        let answer =
            optional(LIMIT, &what, &[Code::Unimplemented], client.verify_token_authority(request))
                .await?;
        Ok(answer.map(|a| a.signed))
    }
}
