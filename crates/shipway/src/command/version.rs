//! Versions, as each persona prints them.

use shipway_fault::Result;

use crate::{Persona, output};

/// The version of BuildKit's API that we speak, the same as the daemon's.
const API: &str = "v0.31.0";

pub(crate) fn run(persona: Persona) -> Result<()> {
    let own = env!("CARGO_PKG_VERSION");
    output::print(&match persona {
        Persona::Shipway => format!("shipway {own} (BuildKit API {API})\n"),
        // Four words: programs split this line and look at the first and third.
        Persona::Buildctl => format!("buildctl shipway {API} shipway-{own}\n"),
    })
}
