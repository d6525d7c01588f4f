//! The agent's end: starts the fencer before there is something to guard, and keeps it informed.
//!
//! Invariant: it never waits; a message that can't be sent is sent again at the next look. A host whose nodes may become
//! primaries has a fencer before they do.

use std::{os::unix::net::UnixDatagram, path::PathBuf, time::Duration};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{FencerError, Message, Place};
use crate::{
    lease::Boot,
    process::{Output, Process},
};

/// Between messages that say the same with a later end.
const PET_EVERY: Duration = Duration::from_millis(200);
/// It ends at once, or guards on by itself.
const GOODBYE_WITHIN: Duration = Duration::from_millis(500);
/// Between two starts of a fencer that does not come up.
const START_EVERY: Duration = Duration::from_secs(1);
/// How long a primary waits for a fencer that does not come up; a shard that serves with one guard
/// less is better than one that does not serve.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(3);

/// A primary to guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    /// Of the node: its process, its socket and its secret are there.
    pub dir: PathBuf,
    /// Nodes that follow it when all is well.
    pub followers: usize,
    /// The end of its right; from then on the fencer looks.
    pub until: Boot,
}

/// News for the fencer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pet {
    pub nodes: Vec<Watched>,
    /// Directories of nodes that stay guarded as they were.
    pub keep: Vec<PathBuf>,
}

/// How an agent reaches its host's fencer.
#[derive(Debug)]
pub struct FencerClient {
    program: Option<PathBuf>,
    data: PathBuf,
    place: Place,
    socket: UnixDatagram,
    child: Option<Process>,
    start_at: Boot,
    pet_at: Boot,
    /// Since when no message could be sent.
    deaf_since: Option<Boot>,
    /// Without the ends of rights, which always change.
    told: Option<(Vec<PathBuf>, Vec<PathBuf>)>,
}

impl FencerClient {
    /// Without a program no fencer is started.
    pub fn new(program: Option<PathBuf>, data: PathBuf) -> Result<Self, FencerError> {
        let place = Place::in_data(&data)?;
        let open = || {
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let socket = open().map_err(|source| FencerError::Socket {
            path: place.socket.clone(),
            source,
        })?;
        Ok(Self {
            program,
            data,
            place,
            socket,
            child: None,
            start_at: Boot::default(),
            pet_at: Boot::default(),
            deaf_since: None,
            told: None,
        })
    }

    /// Tells the fencer what to guard, and starts one where there is none; on `standby` also with
    /// nothing to guard. `true`: it knows of all, or there is none and will be none.
    pub fn pet(&mut self, pet: &Pet, standby: bool) -> bool {
        if self.program.is_none() {
            return true;
        }
        let now = Boot::now();
        let names = pet.nodes.iter().map(|node| node.dir.clone()).collect();
        let told = Some((names, pet.keep.clone()));
        let nothing = pet.nodes.is_empty() && pet.keep.is_empty() && !standby;
        if told == self.told && (nothing || now < self.pet_at) {
            return true;
        }
        if self.send(&Message::Pet(pet.clone())) || nothing {
            (self.told, self.deaf_since) = (told, None);
            self.pet_at = now.plus(PET_EVERY);
            return true;
        }
        self.told = None;
        self.start(now);
        now >= self.deaf_since.get_or_insert(now).plus(GIVEN_UP_AFTER)
    }

    /// The agent ends as it was told to, and with it the fencer, whoever has started it.
    pub async fn goodbye(mut self) {
        let recorded = Process::load(&self.place.process_file());
        let heard = self.send(&Message::Goodbye);
        for fencer in recorded.into_iter().chain(self.child.take()) {
            if !heard {
                // It has just been started, and listens to nobody yet.
                fencer.signal(Signal::TERM);
            }
            if timeout(GOODBYE_WITHIN, fencer.ended()).await.is_err() {
                tracing::warn!(pid = fencer.pid, "the fencer goes on guarding");
            }
        }
    }

    fn send(&self, message: &Message) -> bool {
        let Ok(bytes) = serde_json::to_vec(message) else {
            return false;
        };
        self.socket.send_to(&bytes, &self.place.socket).is_ok()
    }

    fn start(&mut self, now: Boot) {
        self.reap();
        let Some(program) = &self.program else { return };
        if now < self.start_at {
            return;
        }
        self.start_at = now.plus(START_EVERY);
        let args = [
            "fencer".to_owned(),
            "--data".to_owned(),
            self.data.display().to_string(),
        ];
        let started = Process::spawn(
            program,
            &args,
            &self.place.dir,
            "fencer.log",
            Output::Append,
        );
        match started {
            Ok(process) => self.child = Some(process),
            Err(error) => tracing::error!(
                program = %program.display(), %error,
                "the fencer can't be started; if this agent dies, nobody ends a primary that has lost its right"
            ),
        }
    }

    /// Collects a fencer that has ended.
    fn reap(&mut self) {
        if self.child.is_some_and(|child| !child.is_alive()) {
            self.child = None;
        }
    }
}
