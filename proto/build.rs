//! Compiles the protos with protox, so that no `protoc` is needed.

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["herd/v1/inference.proto", "herd/internal/v1/worker.proto", "herd/internal/v1/rank.proto"];
    let set = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptor.bin"), set.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(set)?;
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    Ok(())
}
