//! Metadata keys of sessions and of the calls made through them (rows `ses.hdr.*`, `cb.*`).

/// Id of a session (`ses.hdr.id`).
pub const SESSION_ID: &str = "x-docker-expose-session-uuid";
/// Name of a session (`ses.hdr.name`).
pub const SESSION_NAME: &str = "x-docker-expose-session-name";
/// Stable key of the directory that the client works in (`ses.hdr.key`).
pub const SESSION_SHARED_KEY: &str = "x-docker-expose-session-sharedkey";
/// A method that the client serves, `/service/Method`; repeated (`ses.hdr.methods`).
pub const SESSION_METHOD: &str = "x-docker-expose-session-grpc-method";
/// Milliseconds after which a missing health answer ends the session (`ses.hdr.health`).
pub const SESSION_HEALTH_TIMEOUT: &str = "x-buildkit-session-health-custom-timeout";
/// Which of the client's exporters a `FileSend` call is for (`cb.filesend.md`).
pub const EXPORTER_ID: &str = "buildkit-attachable-exporter-id";
/// Prefix of an exporter's metadata (`cb.filesend.md`).
pub const EXPORTER_METADATA: &str = "exporter-md-";
/// `1` where the sender may put every platform of a build in one transfer (`cb.filesend.md`).
pub const EXPORTER_MULTI_PLATFORM: &str = "buildkit-exporter-multi-platform";
/// Which of the client's content stores a call is for (`cb.content`).
pub const STORE_ID: &str = "buildkit-attachable-store-id";
/// Which SSH agent a call is for (`cb.ssh`).
pub const SSH_ID: &str = "buildkit.ssh.id";
/// Set on the failure of a build that ended with its daemon: it may be sent again to one that is
/// there.
pub const DAEMON_GONE: &str = "shipway-daemon-gone";
/// Path of an upload's URL (`cb.upload`).
pub const UPLOAD_PATH: &str = "urlpath";
/// Host of an upload's URL (`cb.upload`).
pub const UPLOAD_HOST: &str = "urlhost";
