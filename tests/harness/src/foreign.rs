//! Programs that others wrote: the clients of `make clients`, and openssl, which makes certificates.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

/// A file of the foreign clients, such as `bin/python`: where `make clients` puts them.
///
/// # Errors
/// When it is not there.
pub fn installed(what: &str) -> anyhow::Result<PathBuf> {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/clients");
    let dir = env::var_os("SLOTMESH_CLIENTS").map_or(place, PathBuf::from);
    let path = dir.join(what);
    ensure!(
        path.exists(),
        "{} is missing: run make clients",
        path.display()
    );
    Ok(path)
}

/// Runs openssl in a directory, with arguments that have no spaces in them.
///
/// # Errors
/// When it can't be run, or fails.
pub fn openssl(dir: &Path, arguments: &str) -> anyhow::Result<()> {
    let mut openssl = Command::new("openssl");
    let output = openssl.args(arguments.split(' ')).current_dir(dir).output();
    let output = output.context("openssl (package openssl)")?;
    ensure!(
        output.status.success(),
        "openssl {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Makes a certificate in a directory that has signed itself, and its key: the paths of both.
///
/// # Errors
/// As [`openssl`].
pub fn certificate(dir: &Path) -> anyhow::Result<[String; 2]> {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -out cert.pem -keyout key.pem";
    let name = "-subj /CN=slotmesh-test -addext basicConstraints=critical,CA:FALSE";
    openssl(dir, &format!("req -x509 {key} -days 2 {name}"))?;
    Ok(["cert.pem", "key.pem"].map(|name| dir.join(name).display().to_string()))
}
