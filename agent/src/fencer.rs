//! The fencer: a small process beside the agent that kills a primary when nobody looks after its
//! right to serve any more, and nothing shows that it is still followed.
//!
//! Invariant: an agent's death alone stops no node. A primary that every replica still follows has
//! been replaced by none of them, because a replica is detached before it is promoted; so the
//! fencer, once a right has run out without news, kills only what has lost a follower, or does not
//! answer.

pub mod client;
pub mod watch;

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::net::UnixDatagram as StdDatagram,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::mm::{MlockAllFlags, mlockall};
use serde::{Deserialize, Serialize};
use tokio::{net::UnixDatagram, time::timeout};

use self::watch::Watch;
use crate::{
    lease::Boot,
    node::files::{make_private_dir, socket_path},
    process::Process,
};

/// Between looks once a right has run out.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// With nothing to guard and no news the fencer ends; the next agent starts another.
const IDLE_MAX: Duration = Duration::from_secs(2);
/// The niceness of those that go first.
const URGENT: i32 = -20;
/// Of hundreds of primaries.
const MESSAGE_BYTES_MAX: usize = 128 << 10;

/// What an agent says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The whole list: these, and of what was there before, those in `keep`.
    Pet(client::Pet),
    /// The agent ends as it was told to; what it leaves running is meant to run.
    Goodbye,
}

#[derive(Debug, thiserror::Error)]
pub enum FencerError {
    #[error("fencer's directory {path}")]
    Dir { path: PathBuf, source: io::Error },
    #[error("fencer's socket {path}")]
    Socket { path: PathBuf, source: io::Error },
}

/// Where a host's fencer lives.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    pub(crate) socket: PathBuf,
}

impl Place {
    pub(crate) fn process_file(&self) -> PathBuf {
        self.dir.join("process")
    }

    /// Below the agent's data directory; made if it is missing.
    pub(crate) fn in_data(data: &Path) -> Result<Self, FencerError> {
        let dir = data.join("fencer");
        let make = || {
            make_private_dir(&dir)?;
            let dir = dir.canonicalize()?;
            let socket = socket_path(&dir)?;
            Ok(Self { dir, socket })
        };
        make().map_err(|source| FencerError::Dir {
            path: dir.clone(),
            source,
        })
    }
}

/// Guards until there is nothing left to guard.
pub async fn run(data: &Path) -> Result<(), FencerError> {
    let place = Place::in_data(data)?;
    let dir = |source| FencerError::Dir {
        path: place.dir.clone(),
        source,
    };
    // A lock lasts as long as this does.
    let lock = File::create(place.dir.join("lock")).map_err(dir)?;
    match lock.try_lock() {
        Ok(()) => {}
        // One is enough.
        Err(TryLockError::WouldBlock) => return Ok(()),
        Err(TryLockError::Error(source)) => return Err(dir(source)),
    }
    let socket = bind(&place)?;
    if let Some(process) = Process::find(std::process::id()) {
        process.save(&place.process_file()).map_err(dir)?;
    }
    // Swapped out it would wake too late. Without the privilege it still guards.
    if let Err(error) = mlockall(MlockAllFlags::CURRENT) {
        tracing::info!(%error, "the fencer's memory is not locked; raise LimitMEMLOCK to have it so");
    }
    // On a machine that is short of CPU or memory it must be the last to wait, and the last to go.
    let urgent = rustix::process::setpriority_process(None, URGENT);
    let spared = fs::write("/proc/self/oom_score_adj", "-1000");
    if urgent.is_err() || spared.is_err() {
        tracing::info!(
            urgent = urgent.is_ok(),
            spared = spared.is_ok(),
            "the fencer has no precedence over others; CAP_SYS_NICE and CAP_SYS_RESOURCE give it"
        );
    }
    tracing::info!(pid = std::process::id(), "fencer guards");
    guard(&socket).await;
    let _ = fs::remove_file(&place.socket);
    tracing::info!("fencer ends");
    Ok(())
}

fn bind(place: &Place) -> Result<UnixDatagram, FencerError> {
    let open = || {
        // Left by one that was killed: the lock is ours.
        let _ = fs::remove_file(&place.socket);
        let socket = StdDatagram::bind(&place.socket)?;
        socket.set_nonblocking(true)?;
        UnixDatagram::from_std(socket)
    };
    open().map_err(|source| FencerError::Socket {
        path: place.socket.clone(),
        source,
    })
}

async fn guard(socket: &UnixDatagram) {
    let mut watch = Watch::default();
    let mut heard = Boot::now();
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        if let Ok(Ok(length)) = timeout(LOOK_EVERY, socket.recv(&mut buffer)).await {
            match serde_json::from_slice(&buffer[..length]) {
                Ok(Message::Pet(pet)) => {
                    heard = Boot::now();
                    watch.petted(pet);
                }
                Ok(Message::Goodbye) => return,
                Err(error) => tracing::warn!(%error, "message not understood"),
            }
            if !watch.is_due(Boot::now()) {
                continue;
            }
        }
        let now = Boot::now();
        watch.forget_the_ended();
        watch.look(now).await;
        if watch.is_empty() && now > heard.plus(IDLE_MAX) {
            return;
        }
    }
}
