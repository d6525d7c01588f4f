//! Brings a program's file to this host.
//!
//! Invariant: what is written has at most [`BYTES_MAX`] bytes, is never executed before its sum is
//! known to be right, and is gone again when anything was wrong with it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use slotmesh_topology::artifact::SHA256_LENGTH;

/// Largest file: engines with their modules have some tens of MiB.
pub(super) const BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Until a server has answered.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Of a whole download; at 1 MiB/s it suffices for the largest file.
const FETCH_TIMEOUT: Duration = Duration::from_secs(600);
const CHUNK_BYTES: usize = 64 * 1024;
/// Whoever may start processes of this agent may execute it; nobody may change it.
const PROGRAM_MODE: u32 = 0o500;

#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("fetch {source_url}: {why}")]
    Source { source_url: String, why: String },
    #[error("write {path}")]
    Write { path: String, source: io::Error },
    #[error(
        "what {source_url} gives has the SHA-256 {found}, and the artifact says {wanted}: correct \
         the file, or remove the artifact and add it with the right sum"
    )]
    Sum {
        source_url: String,
        found: String,
        wanted: String,
    },
}

/// Writes the file that `source` names to `to`, executable. Blocks.
pub(super) fn fetch(
    source: &str,
    wanted: &[u8; SHA256_LENGTH],
    to: &Path,
) -> Result<(), FetchError> {
    let fetched = copy(source, wanted, to);
    if fetched.is_err() {
        let _ = fs::remove_file(to);
    }
    fetched
}

fn copy(source: &str, wanted: &[u8; SHA256_LENGTH], to: &Path) -> Result<(), FetchError> {
    let failed = |why: String| FetchError::Source {
        source_url: source.to_owned(),
        why,
    };
    let write = |error: io::Error| FetchError::Write {
        path: to.display().to_string(),
        source: error,
    };
    let mut reader = open(source).map_err(failed)?;
    let mut file = create(to).map_err(write)?;
    let (mut sum, mut length) = (Sha256::new(), 0);
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = match reader.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error.to_string())),
        };
        length += count as u64;
        if length > BYTES_MAX {
            return Err(failed(format!("it has more than {BYTES_MAX} bytes")));
        }
        sum.update(&chunk[..count]);
        file.write_all(&chunk[..count]).map_err(write)?;
    }
    file.sync_all().map_err(write)?;
    let found = sum.finalize();
    if found[..] == wanted[..] {
        return Ok(());
    }
    Err(FetchError::Sum {
        source_url: source.to_owned(),
        found: hex::encode(found),
        wanted: hex::encode(wanted),
    })
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(PROGRAM_MODE)
        .open(path)
}

fn open(source: &str) -> Result<Box<dyn Read>, String> {
    if let Some(path) = source.strip_prefix("file://") {
        let file = File::open(path).map_err(|e| format!("{e} (on this host)"))?;
        let is_file = file.metadata().is_ok_and(|m| m.is_file());
        return match is_file {
            true => Ok(Box::new(file)),
            false => Err("it is not a regular file (on this host)".to_owned()),
        };
    }
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_global(Some(FETCH_TIMEOUT))
        .tls_config(
            ureq::tls::TlsConfig::builder()
                // What the host trusts, an organisation's own authority too.
                .root_certs(ureq::tls::RootCerts::PlatformVerifier)
                .build(),
        )
        .build()
        .into();
    let answer = agent.get(source).call().map_err(|e| e.to_string())?;
    Ok(Box::new(answer.into_body().into_reader()))
}

#[cfg(test)]
mod tests {
    use std::{
        net::TcpListener,
        thread::{self, JoinHandle},
    };

    use super::*;

    /// Answers one request with these bytes.
    fn serve(answer: &'static str) -> (String, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/program", listener.local_addr().unwrap());
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 2048];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        (url, served)
    }

    fn sum(bytes: &[u8]) -> [u8; SHA256_LENGTH] {
        Sha256::digest(bytes).into()
    }

    #[test]
    fn a_file_of_a_web_server_or_of_the_host_arrives_whole_and_executable() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (url, served) = serve("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello");
        let to = dir.path().join("a");
        fetch(&url, &sum(b"hello"), &to).unwrap();
        served.join().unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"hello");
        let mode = to.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, PROGRAM_MODE);
        let again = dir.path().join("b");
        fetch(&format!("file://{}", to.display()), &sum(b"hello"), &again).unwrap();
        assert_eq!(fs::read(&again).unwrap(), b"hello");
    }

    #[test]
    fn what_is_not_what_was_wanted_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("a");
        let (wrong, served) = serve("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhullo");
        let error = fetch(&wrong, &sum(b"hello"), &to).unwrap_err();
        served.join().unwrap();
        assert!(matches!(error, FetchError::Sum { .. }), "{error}");
        let (short, served) = serve("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello");
        assert!(fetch(&short, &sum(b"hello"), &to).is_err());
        served.join().unwrap();
        let (none, served) = serve("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
        let error = fetch(&none, &sum(b""), &to).unwrap_err().to_string();
        served.join().unwrap();
        assert!(error.contains("404"), "{error}");
        let error = fetch("file:///nowhere/redis", &sum(b""), &to).unwrap_err();
        assert!(error.to_string().contains("on this host"), "{error}");
        assert!(!to.exists());
    }
}
