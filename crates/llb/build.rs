//! Embeds the descriptors of the operations, from which their JSON form is made (row
//! `dfs.convert`).

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // As cargo says now, not when this was compiled: a copy of the workspace may share the target
    // directory.
    let root = std::path::Path::new(&std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.join("ops.proto").display());
    let set = protox::compile([root.join("ops.proto")], [&root])?;
    let out = std::path::Path::new(&std::env::var("OUT_DIR")?).join("ops.bin");
    std::fs::write(out, set.encode_to_vec())?;
    Ok(())
}
