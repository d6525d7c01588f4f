//! From the process that serves to the one that is assigned: staged, started to take over, watched;
//! or taken back by the one of before.
//!
//! Invariants: nothing is touched before the program has run here and said what it is; the process
//! that serves is told to go only where the assignment says that it may take no more clients, and it
//! refuses to be relieved; what fails is not tried again until something else is assigned.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    STOP_GRACE, Worker, door, now_ms,
    runs::{Attempt, Key, Origin},
    start::Kept,
};
use crate::{
    artifact::{ArtifactError, Engine, proxy_process_version},
    handover::driver::chain,
    process::{Process, last_line},
};
use slotmesh_proto::agent::v1::ProcessState;

/// To fetch a program, behind others of this host.
const STAGE_LIMIT: Duration = Duration::from_secs(900);
/// A program that no controller can say anything about is asked for again, so often and so far apart:
/// controllers elect a leader in seconds.
const STAGE_TRIES: u32 = 20;
const STAGE_PAUSE: Duration = Duration::from_secs(2);
/// From the start of a process until it serves: it waits 10 s for a topology and asks every shard. The
/// clients come after that.
const SERVE_LIMIT: Duration = Duration::from_secs(30);
/// Until an attempt that could not be recorded is made again: a full disk.
const RECORD_PAUSE: Duration = Duration::from_secs(1);
/// Releases may be too busy with another hand-over, or see a topology a moment before the new
/// process: a refusal is believed when it comes so often.
const REFUSALS_MAX: u32 = 3;
const REFUSAL_PAUSE: Duration = Duration::from_secs(1);

/// What is done in the background, one at a time.
#[derive(Debug)]
pub(super) enum Job {
    Stage {
        key: Key,
        task: AbortOnDropHandle<Result<Engine, Refused>>,
    },
    /// The spare was asked to take its clients back.
    Back {
        key: Key,
        spare: Process,
        task: AbortOnDropHandle<Result<(), String>>,
    },
}

impl Job {
    pub(super) fn key(&self) -> &Key {
        match self {
            Self::Stage { key, .. } | Self::Back { key, .. } => key,
        }
    }

    fn is_finished(&self) -> bool {
        match self {
            Self::Stage { task, .. } => task.is_finished(),
            Self::Back { task, .. } => task.is_finished(),
        }
    }
}

/// Why a program can't be had, and whether it may be had later.
#[derive(Debug)]
pub(super) struct Refused {
    why: String,
    transient: bool,
}

impl Refused {
    fn for_now(why: impl ToString) -> Self {
        Self {
            why: why.to_string(),
            transient: true,
        }
    }
}

impl From<ArtifactError> for Refused {
    fn from(error: ArtifactError) -> Self {
        Self {
            why: chain(&error),
            transient: matches!(error, ArtifactError::Unreachable { .. }),
        }
    }
}

/// What a change has come to. None of it needs to survive the agent.
#[derive(Debug, Default)]
pub(super) struct Changing {
    pub(super) job: Option<Job>,
    staged: Option<Origin>,
    tries: u32,
    refusals: u32,
    not_before: Option<Instant>,
    deadline: Option<Instant>,
    /// The attempt was ended because its time was over.
    pub(super) late: bool,
    /// Spares that were told to end.
    told: Vec<Process>,
    /// Who is asked for its version.
    asked: Option<Asked>,
}

#[derive(Debug)]
struct Asked {
    process: Process,
    answer: Option<AbortOnDropHandle<String>>,
}

impl Changing {
    /// Somebody serves who did not before, or nobody will.
    pub(super) fn settled(&mut self) {
        *self = Self {
            told: std::mem::take(&mut self.told),
            asked: self.asked.take(),
            ..Self::default()
        };
    }

    /// Whether a spare is to be told to end now; true once.
    pub(super) fn ends(&mut self, spare: Process) -> bool {
        self.told.retain(Process::is_alive);
        let first = !self.told.contains(&spare);
        if first {
            self.told.push(spare);
        }
        first
    }

    /// Whether a refusal by the other process is worth another try, a moment later.
    pub(super) fn tries_again(&mut self) -> bool {
        self.refusals += 1;
        self.not_before = Some(Instant::now() + REFUSAL_PAUSE);
        self.deadline = None;
        self.refusals < REFUSALS_MAX
    }

    fn is_told(&self, process: Process) -> bool {
        self.told.contains(&process)
    }

    fn is_due(&self) -> bool {
        self.not_before.is_none_or(|at| at <= Instant::now())
    }
}

impl Worker {
    /// Drops what is no longer wanted, and takes the outcome of what was done in the background.
    pub(super) async fn settle(&mut self, wanted: &Kept) {
        let key = wanted.key();
        self.runs.failure.take_if(|failure| failure.key != key);
        self.changing.staged.take_if(|origin| origin.key != key);
        let is_old = |job: &mut Job| matches!(job, Job::Stage { key: k, .. } if *k != key);
        if self.changing.job.take_if(is_old).is_some() {
            (self.changing.tries, self.changing.not_before) = (0, None);
        }
        match self.changing.job.take_if(|job| job.is_finished()) {
            None => {}
            Some(Job::Stage { key, task }) => {
                let staged = task.await;
                self.staged(key, staged.unwrap_or_else(|e| Err(Refused::for_now(e))));
            }
            Some(Job::Back { spare, task, .. }) => {
                let told = task.await;
                if let Err(why) = told.unwrap_or_else(|error| Err(error.to_string())) {
                    self.not_taken_back(spare, &why);
                }
            }
        }
        self.learn_version().await;
    }

    fn staged(&mut self, key: Key, staged: Result<Engine, Refused>) {
        match staged {
            Ok(engine) => {
                self.changing.tries = 0;
                self.changing.staged = Some(Origin {
                    key,
                    path: engine.path,
                    version: engine.version.to_string(),
                });
            }
            Err(refused) => {
                self.changing.tries += 1;
                self.changing.not_before = Some(Instant::now() + STAGE_PAUSE);
                let again = refused.transient && self.changing.tries < STAGE_TRIES;
                let other = self.runs.serving.is_some() || self.runs.before(&key).is_some();
                if again || !other {
                    // Without another one, a proxy that can't be started is tried for ever.
                    let why = format!("{} can't be had: {}", key.program, refused.why);
                    tracing::warn!(proxy = %self.proxy_id, why, "program of a proxy not staged");
                    self.state = (ProcessState::Failed, why);
                } else {
                    self.fail(key, refused.why);
                }
            }
        }
    }

    fn not_taken_back(&mut self, spare: Process, why: &str) {
        tracing::warn!(proxy = %self.proxy_id, why, "clients were not taken back");
        let mut spares = self.runs.spares.iter_mut();
        if let Some(spare) = spares.find(|s| s.run.process == spare) {
            spare.refused = true;
        }
    }

    /// What serves and did not come through a check is asked once what it is.
    async fn learn_version(&mut self) {
        let Some(run) = &mut self.runs.serving else {
            return;
        };
        if !run.origin.version.is_empty() {
            return;
        }
        let process = run.process;
        match &mut self.changing.asked {
            Some(asked) if asked.process == process => {
                if let Some(answer) = asked.answer.take_if(|answer| answer.is_finished()) {
                    run.origin.version = answer.await.unwrap_or_default();
                }
            }
            asked => {
                let answer = tokio::spawn(async move {
                    let version = proxy_process_version(process.pid).await;
                    version
                        .map(|version| version.to_string())
                        .unwrap_or_default()
                });
                let answer = Some(AbortOnDropHandle::new(answer));
                *asked = Some(Asked { process, answer });
            }
        }
    }

    /// One step from the process that serves to the assigned one.
    pub(super) fn converge(&mut self, wanted: &Kept) {
        let key = wanted.key();
        let Some(serving) = &self.runs.serving else {
            return;
        };
        let is_there = serving.origin.key == key || self.runs.has_failed(&key);
        let is_going = self.changing.is_told(serving.process);
        if is_there || is_going || self.changing.job.is_some() || !self.changing.is_due() {
            return;
        }
        let is_wanted = |spare: &&super::runs::Spare| {
            (&spare.run.origin.key, spare.run.workers) == (&key, wanted.workers)
        };
        if let Some(spare) = self.runs.warm().filter(is_wanted) {
            let (process, door) = (spare.run.process, spare.run.door.clone());
            tracing::info!(proxy = %self.proxy_id, pid = process.pid, "the process of before takes back");
            let task = tokio::spawn(async move { door::take_back(&door).await });
            self.changing.job = Some(Job::Back {
                key,
                spare: process,
                task: AbortOnDropHandle::new(task),
            });
            return;
        }
        let door = serving.door.clone();
        if door.as_os_str().is_empty() {
            if wanted.cold {
                return self.end_serving();
            }
            let why = format!(
                "process {} is of a release that hands nothing over: end it at a quiet time, and \
                 the assigned one is started in its place",
                serving.process.pid
            );
            return self.fail(key, why);
        }
        match self.changing.staged.clone() {
            Some(origin) => self.begin(origin, Some(door), wanted),
            None => self.stage(key),
        }
    }

    /// It serves nobody who comes, and hands nobody over: another one is started in its place.
    pub(super) fn end_serving(&mut self) {
        let Some(process) = self.runs.serving.as_ref().map(|run| run.process) else {
            return;
        };
        if self.changing.ends(process) {
            let proxy = &self.proxy_id;
            tracing::info!(%proxy, pid = process.pid, "it takes no more clients: another one is started");
            tokio::spawn(async move { process.stop(Some(Signal::TERM), STOP_GRACE).await });
        }
    }

    fn stage(&mut self, key: Key) {
        if self.changing.job.is_some() || !self.changing.is_due() {
            return;
        }
        let (host, name) = (self.host.clone(), key.program.clone());
        let task = tokio::spawn(async move {
            let resolve = host.engines.resolve_proxy(&name, &host.proxy_binary);
            match timeout(STAGE_LIMIT, resolve).await {
                Ok(resolved) => Ok(resolved?),
                Err(late) => Err(Refused::for_now(late)),
            }
        });
        let task = AbortOnDropHandle::new(task);
        self.changing.job = Some(Job::Stage { key, task });
    }

    /// Starts a process: of the assigned program, or of the one before when that has failed.
    pub(super) fn restart(&mut self, wanted: &Kept) {
        let key = wanted.key();
        if !self.restarts.due(Instant::now()) {
            return;
        }
        let before = self
            .runs
            .before(&key)
            .filter(|_| self.runs.has_failed(&key));
        let before = before.and_then(|before| self.found_before(&before.key));
        let staged = self.changing.staged.clone();
        match before.or(staged).or_else(|| self.found_before(&key)) {
            Some(origin) => {
                self.restarts.started(Instant::now());
                self.begin(origin, None, wanted);
            }
            None => self.stage(key),
        }
    }

    /// A program that needs no staging: this agent's own, or one that was staged before.
    fn found_before(&self, key: &Key) -> Option<Origin> {
        if key.program.is_empty() {
            return Some(self.own(key.clone()));
        }
        let known = self.runs.known(&key.program)?.clone();
        Some(Origin {
            key: key.clone(),
            ..known
        })
    }

    /// The agent's own program.
    pub(super) fn own(&self, key: Key) -> Origin {
        Origin {
            key,
            path: self.host.proxy_binary.clone(),
            version: String::new(),
        }
    }

    /// Starts a process, to take over from the one with this door if there is one.
    fn begin(&mut self, origin: Origin, giver: Option<std::path::PathBuf>, kept: &Kept) {
        let key = origin.key.clone();
        let attempt = Attempt {
            origin,
            workers: kept.workers,
            giver,
            process: None,
            since_unix_ms: now_ms(),
        };
        let (relieves, program) = (attempt.giver.is_some(), attempt.origin.path.clone());
        self.runs.attempt = Some(attempt.clone());
        if let Err(error) = self.record_attempt(kept) {
            tracing::warn!(proxy = %self.proxy_id, %error, "a start was not recorded, so not made");
            self.runs.attempt = None;
            self.changing.not_before = Some(Instant::now() + RECORD_PAUSE);
            self.state = (ProcessState::Failed, format!("record its start: {error}"));
            return;
        }
        match self.dir.spawn(&self.host, &self.proxy_id, kept, &attempt) {
            Ok(process) => {
                let proxy = &self.proxy_id;
                tracing::info!(%proxy, pid = process.pid, relieves, "proxy started");
                self.host.metrics.proxy_starts.add(1);
                self.changing.deadline = Some(Instant::now() + SERVE_LIMIT);
                self.changing.late = false;
                self.runs.attempt = Some(Attempt {
                    process: Some(process),
                    ..attempt
                });
            }
            Err(error) => {
                self.runs.attempt = None;
                let program = program.display();
                tracing::error!(proxy = %self.proxy_id, %program, %error, "proxy can't be started");
                let why = match key.program.as_str() {
                    "" => format!("start {program}: {error}; see --proxy-binary of the agent"),
                    // It may have ended before anybody could look at it, with a word.
                    _ => {
                        let log = self.dir.log();
                        let said = last_line(&log);
                        format!(
                            "start {program}: {error}; {} ends with: {said}",
                            log.display()
                        )
                    }
                };
                if relieves {
                    self.fail(key, why);
                } else {
                    self.state = (ProcessState::Failed, why);
                }
            }
        }
    }

    /// Nothing is started that could not be found again.
    fn record_attempt(&mut self, kept: &Kept) -> std::io::Result<()> {
        self.dir.keep(kept)?;
        self.runs.save(self.dir.path())?;
        self.saved = Some(self.runs.clone());
        Ok(())
    }

    /// A process that does not come to serve in time is ended, unless it has clients.
    pub(super) async fn watch_attempt(&mut self) {
        let limit = Instant::now() + SERVE_LIMIT;
        let deadline = *self.changing.deadline.get_or_insert(limit);
        let attempt = self.runs.attempt.as_ref().and_then(|a| a.process);
        if let Some(process) = attempt.filter(|_| deadline <= Instant::now()) {
            let told = self.dir.take_over(process);
            if told.is_some_and(|told| told.has_clients()) {
                let (proxy, pid) = (&self.proxy_id, process.pid);
                tracing::error!(
                    proxy,
                    pid,
                    "a process has taken over, and its proxy.json does not say so: is the disk full?"
                );
                self.changing.deadline = Some(limit);
                return;
            }
            self.changing.late = true;
            process.stop(Some(Signal::TERM), STOP_GRACE).await;
            self.look();
        }
    }
}
