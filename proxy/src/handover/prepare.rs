//! What a process does before it asks for anything: it looks whether there is somebody to take over
//! from, makes room for the clients, and shows that it can serve.
//!
//! Invariant: whatever takes time is done here, while nobody waits: connections to all nodes, and the
//! table of descriptors, which the kernel lets grow only when no thread is looking at it (some
//! milliseconds each time). Nothing here changes the process that serves.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use super::taker::{TakeError, first_look};
use super::wire::{Wire, WireError};
use super::{Office, ask};
use crate::worker::Pass;

/// How long a topology may take to come, from the disk or a controller.
const TOPOLOGY_LIMIT: Duration = Duration::from_secs(10);
/// Between looks whether it has come, and whether the other process lives.
const LOOK: Duration = Duration::from_millis(5);
/// Descriptors beside those of clients: connections to nodes and controllers, sockets that listen,
/// files. With fewer it would not do.
const OTHERS_LEAST: u64 = 64;
/// And with clients that come meanwhile.
const OTHERS: u64 = 512;
/// A client in so many has a connection of its own to a node (WATCH, BLPOP), which travels with it.
const PINNED_ONE_IN: u64 = 4;

/// See the module. Returns once this process could serve.
///
/// # Errors
/// What is wrong with this process, or with the other one.
pub(super) fn get_ready(office: &Office, path: &Path) -> Result<(), TakeError> {
    // Of no revision: it is waited for below.
    let ask = ask(&office.proxy_id, &office.instance, &office.door, 0);
    let (offer, giver) = first_look(path, ask)?;
    make_room(office, u64::from(offer.clients))?;
    try_out(office, &giver)
}

/// Makes the table of descriptors as large as it will be.
fn make_room(office: &Office, clients: u64) -> Result<(), TakeError> {
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let least = clients + OTHERS_LEAST;
    if allowed < least {
        return Err(TakeError::Unfit(format!(
            "it may open {allowed} files and sockets, and {clients} clients are to come: start it \
             with a limit (ulimit -n) of {least} or more"
        )));
    }
    let wanted = (clients + clients / PINNED_ONE_IN + OTHERS).min(allowed) - 1;
    let grown = std::fs::File::open(&office.data).and_then(|any| {
        let number = i32::try_from(wanted).unwrap_or(i32::MAX);
        Ok(rustix::io::fcntl_dupfd_cloexec(any, number)?)
    });
    if let Err(error) = grown {
        tracing::debug!(%error, wanted, "the table of descriptors grows as clients come");
    }
    Ok(())
}

/// Waits for a topology, and asks every worker to serve a client of its own.
fn try_out(office: &Office, giver: &Wire) -> Result<(), TakeError> {
    let until = Instant::now() + TOPOLOGY_LIMIT;
    while !office.routing.load().is_complete() {
        look_around(office, giver, LOOK)?;
        if Instant::now() >= until {
            let text = "no topology that serves every slot came from the disk or a controller";
            return Err(TakeError::Unfit(text.to_owned()));
        }
    }
    let ask = |worker| {
        let (answer, answered) = sync_channel(1);
        office.pass(worker, Pass::Trial(answer));
        answered
    };
    let asked: Vec<_> = (0..office.workers.len()).map(ask).collect();
    for answered in asked {
        // A worker answers in time, or has ended.
        let verdict = loop {
            match answered.recv_timeout(LOOK) {
                Ok(verdict) => break verdict,
                Err(RecvTimeoutError::Timeout) => look_around(office, giver, Duration::ZERO)?,
                Err(RecvTimeoutError::Disconnected) => {
                    look_around(office, giver, Duration::ZERO)?;
                    break Err("a worker has ended".to_owned());
                }
            }
        };
        verdict.map_err(TakeError::Unfit)?;
    }
    Ok(())
}

/// Waits so long, unless there is no sense in it any more: with nobody to take over from, whoever has
/// started this process has to start one that opens the port itself, and the sooner it hears of it the
/// better.
fn look_around(office: &Office, giver: &Wire, time: Duration) -> Result<(), TakeError> {
    if office.stop.is_cancelled() {
        return Err(TakeError::Stopped);
    }
    match giver.peer_ends(time) {
        true => Err(WireError::Gone.into()),
        false => Ok(()),
    }
}
