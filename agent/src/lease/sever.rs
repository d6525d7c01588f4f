//! Takes a node's rights over a connection of its own, so that it works while the worker is busy.
//!
//! Invariant: when it returns, either nobody has the rights, or the process has been killed. One that
//! has just been started and does not listen yet has given none: nodes are born without users.

use std::{io, path::Path, time::Duration};

use rustix::process::Signal;
use tokio::time::timeout;

use crate::{
    control::{Control, ControlError},
    fence::{self, ADMIN_USER, UserKind, parse_user},
    node::files::NodeDir,
    process::Process,
};

/// For one try: a node that is well answers in a millisecond.
const TRY_WITHIN: Duration = Duration::from_millis(200);
/// Tries before the process is killed. Both fit twice into the margin by which a right ends early.
const TRIES: usize = 2;
/// From its start until a node listens, on a machine that is short of everything; usually
/// milliseconds. It loads its data later than that.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);

/// How much is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Writes of proxies: connections stay.
    Soft,
    /// Every user of every epoch, with their connections, replicas' too.
    Hard,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severed {
    /// There was nothing to take.
    Already,
    Taken,
    /// It did not let itself be asked.
    Killed,
}

/// Severs the node in `nodes` of this name.
pub async fn sever(nodes: &Path, node_id: &str, depth: Depth) -> Severed {
    let path = NodeDir::locate(nodes, node_id);
    if !path.exists() {
        return Severed::Already;
    }
    let Ok(dir) = NodeDir::create(nodes, node_id) else {
        return Severed::Already;
    };
    let Some(process) = Process::load(&dir.process_file()) else {
        return Severed::Already;
    };
    for _ in 0..TRIES {
        match timeout(TRY_WITHIN, take(&dir, depth)).await {
            Ok(Ok(done)) => return done,
            Ok(Err(error)) if is_deaf(&error) && process.age() < LISTENS_WITHIN => {
                return Severed::Already;
            }
            Ok(Err(error)) => {
                let why = crate::handover::driver::chain(&error);
                tracing::warn!(node = node_id, %why, "the node does not let itself be fenced");
            }
            Err(_) => tracing::warn!(node = node_id, "the node does not answer its fence"),
        }
    }
    process.signal(Signal::KILL);
    Severed::Killed
}

/// Nobody listens at its socket.
fn is_deaf(error: &ControlError) -> bool {
    let kind = match error {
        ControlError::Connect { source } => source.kind(),
        _ => return false,
    };
    matches!(
        kind,
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

async fn take(dir: &NodeDir, depth: Depth) -> Result<Severed, ControlError> {
    let secret = dir
        .admin_secret()
        .map_err(|source| ControlError::Connect { source })?;
    let mut control = Control::unix(dir.socket(), ADMIN_USER, &secret).await?;
    let users = fence::known_users(&mut control).await?;
    let mut done = Severed::Already;
    for (name, user) in &users {
        let proxy = parse_user(name).is_some_and(|(kind, _)| kind == UserKind::Proxy);
        if proxy && user.full {
            fence::soft_fence(&mut control, name).await?;
            done = Severed::Taken;
        }
    }
    if depth == Depth::Hard && !users.is_empty() {
        let names: Vec<String> = users.into_keys().collect();
        fence::delete(&mut control, &names).await?;
        done = Severed::Taken;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Output;

    #[tokio::test]
    async fn a_process_that_does_not_listen_yet_has_no_rights_and_is_left_alone() {
        let nodes = tempfile::tempdir().unwrap();
        let dir = NodeDir::create(nodes.path(), "n").unwrap();
        dir.admin_secret().unwrap();
        let args = ["60".to_owned()];
        let sleep = Path::new("sleep");
        let process = Process::spawn(sleep, &args, dir.path(), "log", Output::Append).unwrap();
        process.save(&dir.process_file()).unwrap();
        assert!(process.age() < LISTENS_WITHIN);
        let severed = sever(nodes.path(), "n", Depth::Hard).await;
        assert_eq!(severed, Severed::Already);
        std::os::unix::net::UnixListener::bind(dir.socket())
            .map(drop)
            .unwrap();
        let severed = sever(nodes.path(), "n", Depth::Hard).await;
        assert_eq!(severed, Severed::Already, "a socket of the process before");
        assert!(process.is_alive());
        let listener = std::os::unix::net::UnixListener::bind(dir.socket().with_extension("x"));
        std::fs::rename(dir.socket().with_extension("x"), dir.socket()).unwrap();
        let severed = sever(nodes.path(), "n", Depth::Hard).await;
        assert_eq!(severed, Severed::Killed, "it listens, and says nothing");
        drop(listener);
        let ended = timeout(Duration::from_secs(20), process.ended()).await;
        assert!(ended.is_ok(), "waited for the killed process to end");
    }
}
