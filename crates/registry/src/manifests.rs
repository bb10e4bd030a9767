//! What a repository says of its images: names resolved, manifests and small blobs fetched, tags
//! and referrers listed.

use crate::{
    Error, Repository,
    endpoint::{Capability, Endpoint},
    error::Kind,
    request::ApiRequest,
};
use bytes::Bytes;
use http::{Method, header};
use serde::Deserialize;
use shipway_http::{Response, join};
use shipway_oci::{Descriptor, Digest, Index, media};

/// Largest manifest or index that is accepted, as in containerd.
const MAX_MANIFEST: u64 = 4 << 20;
/// Most bytes of one page of tags, and most pages.
const MAX_TAG_PAGE: u64 = 4 << 20;
const MAX_TAG_PAGES: usize = 100;

/// Media types that resolving accepts, and anything else rather than nothing.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, */*";

impl Repository {
    /// The descriptor that `reference` (a tag, or a digest) names. Asks with HEAD, which registries
    /// do not count as a pull, and with GET where the answer to HEAD does not say enough.
    pub async fn resolve(&self, reference: &str) -> Result<Descriptor, Error> {
        self.resolve_with(reference, true).await
    }

    /// The same without trying again what may pass, for callers with a fallback.
    pub async fn resolve_once(&self, reference: &str) -> Result<Descriptor, Error> {
        self.resolve_with(reference, false).await
    }

    async fn resolve_with(&self, reference: &str, retry: bool) -> Result<Descriptor, Error> {
        let pinned = reference.parse::<Digest>().ok();
        let need = if pinned.is_some() { Capability::Pull } else { Capability::Resolve };
        let request = |method| {
            let request =
                ApiRequest::new(method, format!("manifests/{reference}"), need, "resolve")
                    .header(header::ACCEPT, ACCEPT);
            ApiRequest { retry, ..request }
        };
        match self.request(&request(Method::HEAD)).await {
            Ok(reply) => {
                if let Some(found) = described(&reply.response, pinned) {
                    return self.validate(found, pinned, &reply.endpoint);
                }
            }
            // These answers to HEAD may hide what GET would say: words on why not, or a registry
            // that knows no HEAD.
            Err(e)
                if matches!(
                    e.kind(),
                    Kind::Forbidden { .. } | Kind::Status { status: 400 | 405 | 406 | 501, .. }
                ) => {}
            Err(e) => return Err(e),
        }
        let reply = self.request(&request(Method::GET)).await?;
        let media_type = media_type_of(&reply.response);
        let fail = |kind| Error::new(self.name(), &reply.endpoint.authority, "resolve", kind);
        let bytes = reply.response.body.collect(MAX_MANIFEST).await.map_err(|f| fail(f.into()))?;
        let media_type = media_type.or_else(|| declared(&bytes)).unwrap_or_default();
        self.validate(Descriptor::of(media_type, &bytes), pinned, &reply.endpoint)
    }

    fn validate(
        &self,
        found: Descriptor,
        pinned: Option<Digest>,
        endpoint: &Endpoint,
    ) -> Result<Descriptor, Error> {
        let fail = |kind| Err(Error::new(self.name(), &endpoint.authority, "resolve", kind));
        if let Some(expected) = pinned
            && expected != found.digest
        {
            return fail(Kind::Digest { expected, got: found.digest });
        }
        if found.size > MAX_MANIFEST {
            return fail(Kind::TooLarge { what: "the manifest", limit: MAX_MANIFEST });
        }
        if found.media_type.starts_with("application/vnd.docker.distribution.manifest.v1")
            || found.media_type == "text/plain"
        {
            return fail(Kind::Protocol(format!(
                "media type {:?} (schema 1) is no longer supported; rebuild the image as {:?}",
                found.media_type,
                media::OCI_MANIFEST
            )));
        }
        Ok(found)
    }

    /// The bytes of a manifest, index, or another small document that lives with the manifests;
    /// checked.
    pub async fn fetch_manifest(&self, descriptor: &Descriptor) -> Result<Bytes, Error> {
        let action = format!("fetch manifest {}", descriptor.digest);
        let accept = if descriptor.media_type.is_empty() {
            ACCEPT.to_owned()
        } else {
            format!("{}, */*", descriptor.media_type)
        };
        let request = ApiRequest::new(
            Method::GET,
            format!("manifests/{}", descriptor.digest),
            Capability::Pull,
            &action,
        )
        .header(header::ACCEPT, &accept);
        let reply = self.request(&request).await?;
        self.read_verified(reply.response, &reply.endpoint, descriptor, &action).await
    }

    /// The bytes of a small blob such as an image's config; checked.
    pub async fn fetch_small_blob(&self, descriptor: &Descriptor) -> Result<Bytes, Error> {
        let action = format!("fetch blob {}", descriptor.digest);
        let reply = self
            .request(&ApiRequest::new(
                Method::GET,
                format!("blobs/{}", descriptor.digest),
                Capability::Pull,
                &action,
            ))
            .await?;
        self.read_verified(reply.response, &reply.endpoint, descriptor, &action).await
    }

    async fn read_verified(
        &self,
        response: Response,
        endpoint: &Endpoint,
        descriptor: &Descriptor,
        action: &str,
    ) -> Result<Bytes, Error> {
        let fail = |kind| Error::new(self.name(), &endpoint.authority, action, kind);
        if descriptor.size > MAX_MANIFEST {
            return Err(fail(Kind::TooLarge { what: "the document", limit: MAX_MANIFEST }));
        }
        let bytes = response.body.collect(MAX_MANIFEST).await.map_err(|f| fail(f.into()))?;
        let got = Digest::of(&bytes);
        if got != descriptor.digest {
            return Err(fail(Kind::Digest { expected: descriptor.digest, got }));
        }
        // Some indexes name a size of zero for what they only mention; the digest has spoken
        // already.
        if descriptor.size != 0 && bytes.len() as u64 != descriptor.size {
            return Err(fail(Kind::Size { expected: descriptor.size, got: bytes.len() as u64 }));
        }
        Ok(bytes)
    }

    /// What refers to the manifest `subject`, such as signatures: by the registry's own list, or,
    /// where it keeps none, by the index whose tag is the digest with a dash (OCI distribution-spec
    /// 1.1, "Listing Referrers").
    pub async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>, Error> {
        let action = format!("list what refers to {subject}");
        let request =
            ApiRequest::new(Method::GET, format!("referrers/{subject}"), Capability::Pull, &action)
                .header(header::ACCEPT, media::OCI_INDEX);
        let (bytes, authority) = match self.request(&request).await {
            Ok(reply) => {
                let fail = |kind| Error::new(self.name(), &reply.endpoint.authority, &action, kind);
                (
                    reply.response.body.collect(MAX_MANIFEST).await.map_err(|f| fail(f.into()))?,
                    reply.endpoint.authority.clone(),
                )
            }
            Err(e) if e.is_not_found() => {
                match self.resolve(&format!("sha256-{}", subject.hex())).await {
                    Ok(index) => {
                        (self.fetch_manifest(&index).await?, self.name().registry().to_owned())
                    }
                    Err(e) if e.is_not_found() => return Ok(Vec::new()),
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        };
        let bad = |e| {
            Error::new(
                self.name(),
                &authority,
                &action,
                Kind::Protocol(format!("the list of referrers is not a valid index: {e}")),
            )
        };
        serde_json::from_slice::<Index>(&bytes).map(|i| i.manifests).map_err(bad)
    }

    /// The repository's tags, in the registry's order.
    pub async fn tags(&self) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let mut all = Vec::new();
        let mut request =
            ApiRequest::new(Method::GET, "tags/list", Capability::Resolve, "list the tags");
        for _ in 0..MAX_TAG_PAGES {
            let reply = self.request(&request).await?;
            let next = next_page(&reply.response);
            let fail =
                |kind| Error::new(self.name(), &reply.endpoint.authority, "list the tags", kind);
            let bytes =
                reply.response.body.collect(MAX_TAG_PAGE).await.map_err(|f| fail(f.into()))?;
            let page: Page = serde_json::from_slice(&bytes).map_err(|e| {
                fail(Kind::Protocol(format!("the list of tags is not valid JSON: {e}")))
            })?;
            all.extend(page.tags.unwrap_or_default());
            match next {
                Some(query) if query != request.query => request.query = query,
                _ => break,
            }
        }
        Ok(all)
    }
}

/// The query of the next page, from `Link: <…>; rel="next"`.
fn next_page(response: &Response) -> Option<String> {
    let link = response.head.headers.get(header::LINK)?.to_str().ok()?;
    let target = link
        .split(',')
        .find(|l| l.contains("next"))?
        .trim()
        .strip_prefix('<')?
        .split('>')
        .next()?;
    join(&response.uri, target).ok()?.query().map(str::to_owned)
}

/// What the headers of a manifest say of it, if they say everything.
fn described(response: &Response, pinned: Option<Digest>) -> Option<Descriptor> {
    let header = |name: &str| response.head.headers.get(name)?.to_str().ok();
    let digest = header("docker-content-digest").and_then(|d| d.parse().ok()).or(pinned)?;
    let size = header("content-length")?.parse().ok()?;
    Some(Descriptor::new(media_type_of(response)?, digest, size))
}

fn media_type_of(response: &Response) -> Option<String> {
    let text = response.head.headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let kind = text.split(';').next().unwrap_or_default().trim();
    // Some file servers say so of everything.
    (!kind.is_empty() && kind != "application/octet-stream" && kind != "application/json")
        .then(|| kind.to_owned())
}

/// The media type that a manifest gives itself, or that its shape gives away.
fn declared(bytes: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    if let Some(t) = json.get("mediaType").and_then(|t| t.as_str()) {
        return Some(t.to_owned());
    }
    match json.get("manifests").is_some() {
        true => Some(media::OCI_INDEX.into()),
        false => json.get("layers").map(|_| media::OCI_MANIFEST.into()),
    }
}
