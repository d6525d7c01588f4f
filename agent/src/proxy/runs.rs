//! Which processes a proxy has, and what each was started from and for: a small journal, `runs.json`
//! in the proxy's directory.
//!
//! Invariant: an attempt is on the disk before its process is started. What a proxy is at any moment
//! follows from this, from proxy.json, and from who is alive, so that an agent that died at any moment
//! goes on where the one before stood.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::process::{Process, write_atomic};

/// Processes that have been relieved and still have clients. Each takes memory, and a proxy that is
/// changed more often than its last clients leave is a mistake of somebody.
const SPARES_MAX: usize = 4;
/// A spare ends by itself after a minute, or after ten with clients that can't travel. One that is
/// still there a minute later does not do what it should.
const SPARE_LIMIT_MS: u64 = 660_000;
/// The program that serves, and the one before it: what is gone back to.
const SERVED_MAX: usize = 2;
const FILE: &str = "runs.json";

/// What a process is started for: the assignment's program (empty: the agent's own) and generation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) program: String,
    pub(super) generation: u64,
}

/// A program that has said what it is, and what it is started for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    pub(super) key: Key,
    pub(super) path: PathBuf,
    /// Empty: not known.
    pub(super) version: String,
}

/// A process that has served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) origin: Origin,
    pub(super) workers: u32,
    pub(super) process: Process,
    /// The socket at which it is asked for its clients, or to take them back. Empty: it has none.
    pub(super) door: PathBuf,
}

/// A process that was relieved and goes by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Spare {
    pub(super) run: Run,
    /// The process that has its clients.
    pub(super) by: Process,
    pub(super) since_unix_ms: u64,
    /// It was left by going back to the one before it.
    pub(super) left: bool,
    /// It did not take its clients back when it was asked to.
    pub(super) refused: bool,
}

/// A process that is to serve and does not yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attempt {
    pub(super) origin: Origin,
    pub(super) workers: u32,
    /// Whom it relieves; none: it opens the port itself.
    pub(super) giver: Option<PathBuf>,
    /// None: it is about to be started, or the agent died then.
    pub(super) process: Option<Process>,
    pub(super) since_unix_ms: u64,
}

/// Why a process of this key does not serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) key: Key,
    pub(super) why: String,
}

/// The last hand-over that was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Done {
    pub(super) key: Key,
    pub(super) took_ms: u64,
}

/// The process that proxy.json names, when it lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) process: Process,
    pub(super) door: PathBuf,
}

/// What has changed about who serves.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Nothing,
    /// The process that was started serves; whether it has relieved another one.
    Started {
        relieved: bool,
    },
    /// A spare has taken its clients back.
    TakenBack,
    /// A spare serves again because this one, its successor, has ended.
    Reinstated {
        ended: Run,
    },
    /// A process that the agent has not started, or not recorded.
    Stranger,
}

/// Who has ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Ended {
    /// The one that served.
    pub(super) serving: Option<Process>,
    pub(super) attempt: Option<Attempt>,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Runs {
    pub(super) serving: Option<Run>,
    /// The one that served and has ended, until another one serves.
    pub(super) ended: Option<Run>,
    /// The newest last.
    pub(super) spares: Vec<Spare>,
    pub(super) attempt: Option<Attempt>,
    pub(super) failure: Option<Failure>,
    pub(super) done: Option<Done>,
    /// The newest first.
    served: Vec<Origin>,
}

impl Runs {
    /// `None`: there is no such file, or nobody can read it.
    pub(super) fn load(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(FILE)).ok()?).ok()
    }

    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self).map_err(io::Error::other)?;
        write_atomic(&dir.join(FILE), &text, 0o600)
    }

    /// An agent that died as it started a process may not have recorded it; `find` looks for it among
    /// those that are not known for something else.
    pub(super) fn adopt(&mut self, find: impl FnOnce(&Attempt, &[Process]) -> Option<Process>) {
        let known = self.processes();
        if let Some(attempt) = self.attempt.as_mut().filter(|a| a.process.is_none()) {
            attempt.process = find(attempt, &known);
        }
        self.attempt.take_if(|attempt| attempt.process.is_none());
    }

    /// Follows proxy.json: who is named there serves. `assumed` are the key and the workers of a process
    /// that nothing is known of.
    pub(super) fn see(
        &mut self,
        named: Option<Named>,
        assumed: (Key, u32),
        is_alive: impl Fn(&Process) -> bool,
        now_ms: u64,
    ) -> Seen {
        let Some(named) = named else {
            return Seen::Nothing;
        };
        if let Some(run) = &mut self.serving
            && run.process == named.process
        {
            run.door = named.door;
            return Seen::Nothing;
        }
        let old = self.serving.take().or(self.ended.take());
        let lives = old.as_ref().is_some_and(|old| is_alive(&old.process));
        let at = |spare: &Spare| spare.run.process == named.process;
        let is_attempt = |attempt: &mut Attempt| attempt.process == Some(named.process);
        let (run, seen) = if let Some(attempt) = self.attempt.take_if(is_attempt) {
            let relieved = attempt.giver.is_some();
            if relieved {
                self.done = Some(Done {
                    key: attempt.origin.key.clone(),
                    took_ms: now_ms.saturating_sub(attempt.since_unix_ms),
                });
            }
            (attempt.into_run(&named), Seen::Started { relieved })
        } else if let Some(at) = self.spares.iter().position(at) {
            let spare = self.spares.remove(at);
            let seen = match &old {
                Some(old) if !lives && !spare.left => Seen::Reinstated { ended: old.clone() },
                _ => Seen::TakenBack,
            };
            (spare.run, seen)
        } else {
            (stranger(&named, old.as_ref(), assumed), Seen::Stranger)
        };
        if let Some(old) = old.filter(|_| lives) {
            self.spares.push(Spare {
                run: old,
                by: run.process,
                since_unix_ms: now_ms,
                left: seen == Seen::TakenBack,
                refused: false,
            });
        }
        self.served.retain(|origin| origin.key != run.origin.key);
        self.served.insert(0, run.origin.clone());
        self.served.truncate(SERVED_MAX);
        self.serving = Some(run);
        seen
    }

    /// Forgets who has ended.
    pub(super) fn reap(&mut self, is_alive: impl Fn(&Process) -> bool) -> Ended {
        self.spares.retain(|spare| is_alive(&spare.run.process));
        let mut ended = Ended::default();
        if let Some(run) = self.serving.take_if(|run| !is_alive(&run.process)) {
            ended.serving = Some(run.process);
            self.ended = Some(run);
        }
        let is_over = |a: &mut Attempt| a.process.is_some_and(|process| !is_alive(&process));
        ended.attempt = self.attempt.take_if(is_over);
        ended
    }

    /// Spares that have been there for too long, or are too many.
    pub(super) fn overdue(&self, now_ms: u64) -> impl Iterator<Item = Process> {
        let too_many = self.spares.len().saturating_sub(SPARES_MAX);
        self.spares.iter().enumerate().filter_map(move |(at, s)| {
            let age = now_ms.saturating_sub(s.since_unix_ms);
            (at < too_many || age > SPARE_LIMIT_MS).then_some(s.run.process)
        })
    }

    /// The process that can take back at once what the one that serves has from it.
    pub(super) fn warm(&self) -> Option<&Spare> {
        let serving = self.serving.as_ref()?;
        let can = |s: &&Spare| {
            s.by == serving.process && !s.refused && !s.run.door.as_os_str().is_empty()
        };
        self.spares.iter().rev().find(can)
    }

    /// Where the program of this name was found before; a copy that is there still.
    pub(super) fn known(&self, program: &str) -> Option<&Origin> {
        let attempt = self.attempt.iter().map(|attempt| &attempt.origin);
        let mut all = attempt.chain(&self.served);
        all.find(|origin| origin.key.program == program && origin.path.exists())
    }

    /// What served last, of another key.
    pub(super) fn before(&self, key: &Key) -> Option<&Origin> {
        self.served.iter().find(|origin| origin.key != *key)
    }

    pub(super) fn has_failed(&self, key: &Key) -> bool {
        self.failure.as_ref().is_some_and(|f| f.key == *key)
    }

    /// Every process that lives or may live.
    pub(super) fn processes(&self) -> Vec<Process> {
        let attempt = self.attempt.as_ref().and_then(|attempt| attempt.process);
        let spares = self.spares.iter().map(|spare| spare.run.process);
        let serving = self.serving.as_ref().map(|run| run.process);
        attempt.into_iter().chain(spares).chain(serving).collect()
    }

    /// They were told to end, all of them.
    pub(super) fn forget_processes(&mut self) {
        (self.serving, self.ended, self.attempt) = (None, None, None);
        self.spares.clear();
    }

    /// Names of the programs that its processes were started from, or may be started from again.
    pub(super) fn programs(self) -> BTreeSet<String> {
        let spares = self.spares.into_iter().map(|spare| spare.run.origin);
        let attempt = self.attempt.into_iter().map(|attempt| attempt.origin);
        let all = self.served.into_iter().chain(spares).chain(attempt);
        all.map(|origin| origin.key.program).collect()
    }
}

impl Attempt {
    fn into_run(self, named: &Named) -> Run {
        Run {
            origin: self.origin,
            workers: self.workers,
            process: named.process,
            door: named.door.clone(),
        }
    }
}

/// Whoever was started by hand stands for what was to run: the agent does not fight an operator.
fn stranger(named: &Named, old: Option<&Run>, (key, workers): (Key, u32)) -> Run {
    let assumed = Origin {
        key,
        path: PathBuf::new(),
        version: String::new(),
    };
    Run {
        origin: old.map_or(assumed, |old| Origin {
            version: String::new(),
            ..old.origin.clone()
        }),
        workers: old.map_or(workers, |old| old.workers),
        process: named.process,
        door: named.door.clone(),
    }
}

#[cfg(test)]
#[path = "runs_tests.rs"]
mod tests;
