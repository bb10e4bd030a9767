//! Platforms on the wire.

use shipway_oci::Platform;
use shipway_proto::pb;

/// As a message.
pub fn platform_to_wire(p: &Platform) -> pb::Platform {
    let p = p.clone();
    pb::Platform {
        architecture: p.architecture,
        os: p.os,
        variant: p.variant,
        os_version: p.os_version,
        os_features: p.os_features,
    }
}

/// Out of a message, as it stands there: not normalized.
pub fn platform_of(p: pb::Platform) -> Platform {
    Platform {
        architecture: p.architecture,
        os: p.os,
        variant: p.variant,
        os_version: p.os_version,
        os_features: p.os_features,
    }
}
