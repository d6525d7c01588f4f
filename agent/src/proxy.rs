//! The owner of one proxy: starts or adopts its process, restarts it at the same endpoint, exchanges
//! it for another one without a client's notice, stops it.
//!
//! Invariants: processes outlive the agent, and the port, once chosen, is the proxy's for ever. A
//! process that serves is ended only when the proxy is stopped or removed, or was told to take no more
//! clients: one that is to run another program is relieved by a process of that, which takes its clients
//! over, or it goes on.

mod change;
mod door;
mod report;
mod runs;
mod start;

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustix::process::Signal;
use slotmesh_proto::agent::v1::{Desired, ProcessState, ProxySpec};
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::{
    change::Changing,
    runs::{Attempt, Ended, Failure, Key, Runs, Seen},
    start::{Bound, Kept, ProxyDir},
};
use crate::{
    host::Host,
    node::worker::Farewell,
    process::{Process, Restarts, last_line},
    supervisor::ids_in,
};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A proxy lets requests that are under way finish when it is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// A process that was relieved serves again milliseconds after the one that relieved it has ended.
const SPARE_LIMIT: Duration = Duration::from_secs(3);
/// Starts of a program that end before the process serves, while another one is known that has.
const MISSES_MAX: u32 = 3;
/// Processes of a proxy that nobody knows: those of agents that died as they started them.
const STRAYS_MAX: usize = 8;

/// The rest of the agent's end of a worker.
#[derive(Debug)]
pub struct ProxyHandle {
    spec: watch::Sender<Option<ProxySpec>>,
    /// A handle that is dropped ends its worker too.
    stop: DropGuard,
    farewell: watch::Sender<Farewell>,
    task: JoinHandle<()>,
}

impl ProxyHandle {
    pub fn start(host: Arc<Host>, proxy_id: String) -> Self {
        let spec = watch::Sender::new(None);
        let stop = CancellationToken::new();
        let farewell = watch::Sender::new(Farewell::LeaveRunning);
        let worker = Worker::new(host, proxy_id, spec.subscribe());
        let task = tokio::spawn(worker.run(stop.clone(), farewell.subscribe()));
        Self {
            spec,
            stop: stop.drop_guard(),
            farewell,
            task,
        }
    }

    pub fn assign(&self, new: ProxySpec) {
        self.spec.send_if_modified(|current| {
            let news = current.as_ref() != Some(&new);
            *current = Some(new);
            news
        });
    }

    /// Its removal is complete and the worker has ended.
    pub fn is_removed(&self) -> bool {
        self.task.is_finished()
    }

    pub async fn stop(self, farewell: Farewell) {
        self.farewell.send_replace(farewell);
        drop(self.stop);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "worker of a proxy failed");
        }
    }
}

/// Names of the programs that proxies in this directory run, or may be started from again.
pub fn programs_in(proxies_dir: &Path) -> BTreeSet<String> {
    let dirs = ids_in(proxies_dir).into_iter();
    let dirs = dirs.map(|id| ProxyDir::new(proxies_dir, &id));
    let of = |dir: ProxyDir| {
        let kept = dir.kept().map(|kept| kept.key().program);
        let runs = Runs::load(dir.path()).unwrap_or_default();
        runs.programs().into_iter().chain(kept)
    };
    dirs.flat_map(of).collect()
}

#[derive(Debug)]
struct Worker {
    host: Arc<Host>,
    proxy_id: String,
    spec: watch::Receiver<Option<ProxySpec>>,
    dir: ProxyDir,
    kept: Option<Kept>,
    runs: Runs,
    /// As they are on the disk.
    saved: Option<Runs>,
    bound: Option<Bound>,
    changing: Changing,
    /// Since when nobody serves and somebody could.
    alone: Option<Instant>,
    restarts: Restarts,
    /// Starts in a row whose process did not come to serve.
    misses: u32,
    /// What is reported while no process serves.
    state: (ProcessState, String),
}

impl Worker {
    fn new(host: Arc<Host>, proxy_id: String, spec: watch::Receiver<Option<ProxySpec>>) -> Self {
        let dir = ProxyDir::new(&host.proxies_dir, &proxy_id);
        let worker = Self {
            kept: dir.kept(),
            host,
            proxy_id,
            spec,
            dir,
            runs: Runs::default(),
            saved: None,
            bound: None,
            changing: Changing::default(),
            alone: None,
            restarts: Restarts::default(),
            misses: 0,
            state: (ProcessState::Starting, String::new()),
        };
        worker.tell();
        worker
    }

    async fn run(mut self, stop: CancellationToken, farewell: watch::Receiver<Farewell>) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.adopt();
        loop {
            let serving = self.runs.serving.as_ref().map(|run| run.process);
            let attempt = self.runs.attempt.as_ref().and_then(|a| a.process);
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = self.spec.changed() => {}
                () = ended(serving) => {}
                () = ended(attempt) => {}
                _ = tick.tick() => {}
            }
            let spec = self.spec.borrow_and_update().clone();
            if spec
                .as_ref()
                .is_some_and(|spec| spec.desired() == Desired::Removed)
            {
                if self.remove().await {
                    return;
                }
                continue;
            }
            self.turn(spec).await;
            self.tell();
        }
        if *farewell.borrow() == Farewell::Stop {
            self.shut_down().await;
        }
    }

    /// What an agent of before has left running.
    fn adopt(&mut self) {
        let known = Runs::load(self.dir.path());
        self.saved.clone_from(&known);
        self.runs = known.unwrap_or_default();
        let dir = self.dir.clone();
        self.runs.adopt(|attempt, known| dir.find(attempt, known));
        self.look();
        if self.runs.processes().is_empty()
            && let (Some(process), Some(kept)) = (self.dir.recorded(), &self.kept)
        {
            // An agent of before this file has started it, and it does not serve yet.
            self.runs.attempt = Some(Attempt {
                origin: self.own(kept.key()),
                workers: kept.workers,
                giver: None,
                process: Some(process),
                since_unix_ms: now_ms(),
            });
        }
        for process in self.runs.processes() {
            tracing::info!(proxy = %self.proxy_id, pid = process.pid, "proxy adopted");
            self.host.metrics.proxy_adoptions.add(1);
        }
    }

    /// The spare that says at its door that it serves, whatever proxy.json says.
    async fn serving_spare(&self) -> Option<Process> {
        let instance_id = self.kept.as_ref().map(|kept| &kept.instance_id)?;
        for spare in self.runs.spares.iter().rev() {
            let pid = door::who_serves(&spare.run.door, &self.proxy_id, instance_id).await;
            if pid == Some(spare.run.process.pid) {
                return Some(spare.run.process);
            }
        }
        None
    }

    async fn turn(&mut self, spec: Option<ProxySpec>) {
        let wanted = self.wanted(spec);
        self.look();
        self.end_overdue();
        if let Some(wanted) = &wanted {
            self.settle(wanted).await;
        }
        let attempt = self.runs.attempt.as_ref().map(|a| a.giver.is_some());
        match (self.runs.serving.is_some(), attempt, wanted) {
            (true, Some(_), _) | (false, Some(false), _) => self.watch_attempt().await,
            (true, None, Some(wanted)) => self.converge(&wanted),
            (true, None, None) => {}
            (false, _, wanted) if !self.other_serves_soon().await => match wanted {
                Some(wanted) => self.restart(&wanted),
                None => {
                    let why = "no assignment says how to start it";
                    self.state = (ProcessState::Stopped, why.to_owned());
                }
            },
            (false, ..) => {}
        }
        self.save();
    }

    /// What is to run; kept, so that it is known without a controller.
    fn wanted(&mut self, spec: Option<ProxySpec>) -> Option<Kept> {
        let Some(spec) = spec else {
            return self.kept.clone();
        };
        if spec.desired() != Desired::Running {
            return None;
        }
        let address = self.kept.as_ref().map(|kept| kept.address.clone());
        let wanted = Kept::assigned(spec, address.unwrap_or_default());
        self.keep(wanted.clone());
        Some(wanted)
    }

    fn keep(&mut self, kept: Kept) {
        if self.kept.as_ref() == Some(&kept) {
            return;
        }
        match self.dir.keep(&kept) {
            Ok(()) => self.kept = Some(kept),
            Err(error) => {
                tracing::warn!(proxy = %self.proxy_id, %error, "what a proxy is was not recorded");
            }
        }
    }

    /// Follows what the processes have done by themselves.
    fn look(&mut self) {
        self.bound = self.dir.bound();
        let named = self.bound.as_ref().and_then(|b| b.named(self.dir.path()));
        let assumed = self.kept.as_ref().map(|kept| (kept.key(), kept.workers));
        let assumed = assumed.unwrap_or_default();
        let seen = self.runs.see(named, assumed, Process::is_alive, now_ms());
        self.note(seen);
        let ended = self.runs.reap(Process::is_alive);
        self.note_ended(ended);
        if let (Some(bound), Some(kept)) = (&self.bound, &self.kept)
            && self.runs.serving.is_some()
            && kept.address.is_empty()
        {
            let (mut kept, address) = (kept.clone(), bound.address.clone());
            kept.address = address;
            self.keep(kept);
        }
    }

    fn note(&mut self, seen: Seen) {
        let Some(run) = self.runs.serving.clone().filter(|_| seen != Seen::Nothing) else {
            return;
        };
        let (proxy, pid) = (&self.proxy_id, run.process.pid);
        // Late, but it serves.
        self.runs.failure.take_if(|f| f.key == run.origin.key);
        self.count(&seen);
        let Key {
            program,
            generation,
        } = &run.origin.key;
        match seen {
            Seen::Nothing => {}
            Seen::Started { relieved } => {
                tracing::info!(%proxy, pid, program, generation, relieved, "proxy serves");
            }
            Seen::TakenBack => {
                tracing::info!(%proxy, pid, program, generation, "proxy serves again")
            }
            Seen::Stranger => tracing::info!(%proxy, pid, "a proxy serves that was not recorded"),
            Seen::Reinstated { ended } => {
                let said = last_line(&self.dir.log());
                let why = format!(
                    "its process ended after it had taken over, and the one of before serves again; \
                     {} ends with: {said}",
                    self.dir.log().display()
                );
                self.fail(ended.origin.key, why);
            }
        }
        (self.alone, self.misses) = (None, 0);
        self.changing.settled();
        if let Err(error) = self.dir.record(run.process) {
            tracing::warn!(proxy = %self.proxy_id, %error, "process of proxy not recorded");
        }
    }

    fn count(&self, seen: &Seen) {
        let metrics = &self.host.metrics;
        match seen {
            Seen::Started { relieved: true } => {
                metrics.proxy_hand_overs.add(1);
                let took_ms = self.runs.done.as_ref().map_or(0, |done| done.took_ms);
                metrics.proxy_hand_over_ms.add(took_ms);
            }
            Seen::TakenBack => metrics.proxy_taken_back.add(1),
            _ => {} // a failure is counted where it is found
        }
    }

    fn note_ended(&mut self, ended: Ended) {
        let said = |worker: &Self| last_line(&worker.dir.log());
        if let Some(process) = ended.serving {
            let said = said(self);
            tracing::warn!(proxy = %self.proxy_id, pid = process.pid, last = %said, "proxy ended");
            let why = format!("the process ended; it said: {said}");
            self.state = (ProcessState::Stopped, why);
        }
        let Some(attempt) = ended.attempt else { return };
        let key = attempt.origin.key.clone();
        if attempt.giver.is_some() {
            // Without a process to take over from, it was not its fault.
            if self.runs.serving.is_some() {
                self.note_refused(&attempt);
            }
            return;
        }
        let said = said(self);
        tracing::warn!(proxy = %self.proxy_id, last = %said, "proxy ended before it served");
        self.misses += 1;
        if self.misses >= MISSES_MAX && self.runs.before(&key).is_some() {
            self.fail(
                key,
                format!("it ended {MISSES_MAX} times before it served: {said}"),
            );
        }
        let why = format!("the process ended; it said: {said}");
        self.state = (ProcessState::Stopped, why);
    }

    /// A process that was to take over has ended.
    fn note_refused(&mut self, attempt: &Attempt) {
        let told = attempt.process.and_then(|p| self.dir.take_over(p));
        let told = told.unwrap_or_default();
        if told.is_refused() && self.changing.tries_again() {
            let (proxy, why) = (&self.proxy_id, &told.reason);
            tracing::info!(%proxy, why, "a hand-over was refused and is asked for again");
            return;
        }
        let mut kept = self.kept.iter();
        let may_end = kept.any(|kept| kept.cold && kept.key() == attempt.origin.key);
        if told.is_refused() && may_end {
            return self.end_serving();
        }
        let mut why = told.reason;
        if why.is_empty() {
            why = last_line(&self.dir.log());
        }
        if self.changing.late {
            why = format!("it did not serve in time, and was ended: {why}");
        }
        self.fail(attempt.origin.key.clone(), why);
    }

    /// It is not tried again for this key, and reported until another one is assigned.
    fn fail(&mut self, key: Key, why: String) {
        let Key {
            program,
            generation,
        } = &key;
        tracing::error!(
            proxy = %self.proxy_id, program, generation, %why,
            "the proxy was not exchanged"
        );
        self.changing.settled();
        self.host.metrics.proxy_hand_overs_failed.add(1);
        self.runs.failure = Some(Failure { key, why });
    }

    /// Somebody who was relieved has the port still and accepts clients again; or somebody who takes
    /// over has it by now.
    async fn other_serves_soon(&mut self) -> bool {
        let others = self.runs.processes();
        if others.is_empty() {
            self.alone = None;
            return false;
        }
        let since = *self.alone.get_or_insert_with(Instant::now);
        if since.elapsed() < SPARE_LIMIT {
            return true;
        }
        self.alone = None;
        let has_clients = |other: &&Process| {
            let told = self.dir.take_over(**other);
            told.is_some_and(|told| told.has_clients())
        };
        let heir = others.iter().find(has_clients).copied();
        let heir = match heir {
            Some(heir) => Some(heir),
            // take-over.json is of the one that had relieved it.
            None => self.serving_spare().await,
        };
        if let Some(heir) = heir {
            let pid = heir.pid;
            tracing::error!(
                proxy = %self.proxy_id,
                pid,
                "a process has clients, and its proxy.json does not say so: is the disk full?"
            );
            return true;
        }
        for other in others {
            tracing::warn!(proxy = %self.proxy_id, pid = other.pid, "a spare proxy did not serve");
            other.signal(Signal::KILL);
        }
        self.runs.spares.clear();
        self.runs.attempt = None;
        false
    }

    fn end_overdue(&mut self) {
        let overdue: Vec<Process> = self.runs.overdue(now_ms()).collect();
        for process in overdue {
            let proxy = &self.proxy_id;
            if self.changing.ends(process) {
                tracing::warn!(%proxy, pid = process.pid, "a spare proxy did not end; told to");
                tokio::spawn(async move { process.stop(Some(Signal::TERM), STOP_GRACE).await });
            }
        }
    }

    fn save(&mut self) {
        if self.saved.clone().unwrap_or_default() == self.runs {
            return;
        }
        match self.runs.save(self.dir.path()) {
            Ok(()) => self.saved = Some(self.runs.clone()),
            Err(error) => {
                tracing::warn!(proxy = %self.proxy_id, %error, "processes of proxy not recorded");
            }
        }
    }

    async fn shut_down(&mut self) {
        self.changing = Changing::default();
        let serving = self.runs.serving.take().map(|run| run.process);
        // First those that would serve in its place.
        let mut ending = JoinSet::new();
        for other in self.runs.processes() {
            ending.spawn(async move { other.stop(Some(Signal::TERM), STOP_GRACE).await });
        }
        ending.join_all().await;
        let recorded = self.dir.recorded().filter(|p| Some(*p) != serving);
        for process in serving.into_iter().chain(recorded) {
            process.stop(Some(Signal::TERM), STOP_GRACE).await;
            tracing::info!(proxy = %self.proxy_id, pid = process.pid, "proxy stopped");
        }
        for _ in 0..STRAYS_MAX {
            let Some(stray) = self.dir.stray(&[]) else {
                break;
            };
            stray.stop(Some(Signal::TERM), STOP_GRACE).await;
        }
        self.runs.forget_processes();
        self.save();
        self.dir.forget();
    }

    /// `true` when nothing of it is left.
    async fn remove(&mut self) -> bool {
        self.shut_down().await;
        let removed = fs::remove_dir_all(self.dir.path());
        if let Err(error) = removed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            let why = format!("remove {}: {error}", self.dir.path().display());
            self.state = (ProcessState::Stopped, why);
            self.tell();
            return false;
        }
        self.runs = Runs::default();
        self.state = (ProcessState::Removed, String::new());
        self.tell();
        true
    }
}

async fn ended(process: Option<Process>) {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
