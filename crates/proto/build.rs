//! Compiles `proto/` with protox, so that no system `protoc` is needed for our own wire code.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // As cargo says now, not when this was compiled: a copy of the workspace may share the target
    // directory.
    let root = std::path::Path::new(&std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&root)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    files.sort();
    let set = protox::compile(&files, [&root])?;
    // Sorted maps make prost's encoding equal to Go's deterministic one (`llb.digest`).
    tonic_prost_build::configure()
        .btree_map(".")
        .bytes(".moby.buildkit.v1.BytesMessage")
        .bytes(".fsutil.types.Packet")
        .include_file("wire.rs")
        .compile_fds(set)?;
    Ok(())
}
