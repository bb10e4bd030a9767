//! Attached clients, and typed callers into them (rows `ses.*`, `cb.*`).
//!
//! A client opens `Control.Session` and serves gRPC inside that stream, so that the daemon can ask
//! it for files, secrets, credentials and agents. [`SessionHub`] knows who is attached, [`Session`]
//! is one of them with a method per thing that can be asked for, and [`SessionGroup`] stands for
//! all the clients that wait for one piece of work, any of which may answer.
//!
//! Nothing here knows what a build is, or what is done with what a client gives.

mod call;
mod credentials;
mod exporters;
mod files;
mod group;
mod health;
mod hub;
mod policy;
mod secrets;
mod store;

pub use call::StoreChannel;
pub use credentials::{Credentials, Token, TokenRequest};
pub use files::{Delivered, FileSink};
pub use group::SessionGroup;
pub use hub::{Session, SessionHub, SessionId};
pub use policy::{PolicyAnswer, PolicyQuestion, PolicySubject, denied};
pub use secrets::{SshStream, Upload};
pub use store::{ClientBlob, ClientStore};
