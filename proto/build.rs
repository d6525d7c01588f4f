//! Compiles every .proto below `slotmesh/` and keeps the descriptor set for gRPC reflection.

use std::{env, error::Error, fs, io, path::Path, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let mut files = Vec::new();
    collect(Path::new("slotmesh"), &mut files)?;
    files.sort();
    println!("cargo:rerun-if-changed=slotmesh");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("slotmesh.bin"))
        // Rarely set, and kept in every journaled step otherwise.
        .boxed(".slotmesh.agent.v1.HandOver.check")
        // What holds keys is not shown.
        .skip_debug([".slotmesh.handover.v1.Tls"])
        .compile_protos(&files, &[PathBuf::from(".")])?;
    Ok(())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
