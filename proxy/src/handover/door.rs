//! Where a process is asked to hand over: a unix socket in its data directory.
//!
//! Invariant: only processes of the same user are heard, and only so many at a time.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use slotmesh_runtime::socket::short_path;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::wire::Wire;
use super::{Office, giver};

/// Conversations at a time: one hand-over, and a few questions.
const CONVERSATIONS_MAX: usize = 8;
const PREFIX: &str = "handover-";

/// See the module. The socket's file goes with it.
#[derive(Debug)]
pub(crate) struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Opens a socket for this process, and removes those of processes that are gone.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub(crate) fn open(data: &Path) -> io::Result<Self> {
        let data = data.canonicalize()?;
        remove_dead(&data);
        // In tests one process has several.
        let name = format!(
            "{PREFIX}{}-{:08x}.sock",
            std::process::id(),
            rand::random::<u32>()
        );
        let path = data.join(name);
        let (_dir, short) = short_path(&path)?;
        let listener = UnixListener::bind(short)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Answers whoever asks, until told to stop.
    pub(crate) async fn run(self, office: Arc<Office>, stop: CancellationToken) {
        let room = Arc::new(Semaphore::new(CONVERSATIONS_MAX));
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the socket for hand-overs fails");
                    tokio::time::sleep(crate::listener::PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                tracing::warn!("too many processes ask for a hand-over; one was turned away");
                continue;
            };
            let office = Arc::clone(&office);
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let wire = stream.into_std().and_then(Wire::new);
                match wire {
                    Ok(wire) => giver::converse(&office, &wire),
                    Err(error) => tracing::warn!(%error, "a process was turned away"),
                }
            });
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes sockets whose processes are gone.
fn remove_dead(data: &Path) {
    let Ok(entries) = std::fs::read_dir(data) else {
        return;
    };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX)
            && entry.file_type().is_ok_and(|kind| kind.is_socket());
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if ours && connect(&entry.path()).is_err_and(refused) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Connects to another process's door.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let (_dir, short) = short_path(path)?;
    UnixStream::connect(short)
}
