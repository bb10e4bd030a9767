//! Embeds the descriptors of the error details, from which their JSON form is made (row
//! `net.errjson`).

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // As cargo says now, not when this was compiled: a copy of the workspace may share the target
    // directory.
    let root = std::path::Path::new(&std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    for file in ["errdefs.proto", "ops.proto"] {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }
    let set = protox::compile([root.join("errdefs.proto")], [&root])?;
    let out = std::path::Path::new(&std::env::var("OUT_DIR")?).join("errdefs.bin");
    std::fs::write(out, set.encode_to_vec())?;
    Ok(())
}
