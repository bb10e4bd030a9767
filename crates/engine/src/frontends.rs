//! Frontends of a build: the bridge that they ask, and those that are images.

mod bridge;
mod container;
mod image;

pub(crate) use bridge::EngineBridge;
