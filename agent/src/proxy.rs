//! The owner of one proxy process: starts or adopts it, restarts it at the same endpoint, stops it.
//!
//! Invariant: the proxy is a separate process that outlives the agent, and its port, once chosen, is
//! its port for ever.

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use slotmesh_proto::agent::v1::{Desired, ProcessState, ProxyReport, ProxySpec};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    host::Host,
    node::{
        files::{free_port, make_private_dir},
        worker::Farewell,
    },
    process::{Output, Process, Restarts, last_line, write_atomic},
};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A proxy lets requests that are under way finish when it is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// A process that was relieved serves again milliseconds after the one that relieved it has ended.
const SPARE_LIMIT: Duration = Duration::from_secs(3);
const LOG: &str = "proxy.log";

/// What the proxy writes once its sockets are bound.
#[derive(Debug, Deserialize)]
struct Bound {
    pid: u32,
    address: String,
    #[serde(default)]
    admin_address: String,
}

/// What is kept to start it again with no controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    instance_id: String,
    workers: u32,
    /// Empty until it was bound for the first time.
    address: String,
}

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

#[derive(Debug)]
struct Worker {
    host: Arc<Host>,
    proxy_id: String,
    spec: watch::Receiver<Option<ProxySpec>>,
    dir: PathBuf,
    process: Option<Process>,
    /// The one that was relieved by it, and will end by itself; and since when it alone is left.
    spare: Option<Process>,
    spare_alone: Option<Instant>,
    restarts: Restarts,
    report: ProxyReport,
}

impl Worker {
    fn new(host: Arc<Host>, proxy_id: String, spec: watch::Receiver<Option<ProxySpec>>) -> Self {
        let dir = host.proxies_dir.join(&proxy_id);
        let report = ProxyReport {
            proxy_id: proxy_id.clone(),
            state: ProcessState::Starting.into(),
            ..ProxyReport::default()
        };
        host.reports.proxy(report.clone());
        Self {
            host,
            proxy_id,
            spec,
            dir,
            process: None,
            spare: None,
            spare_alone: None,
            restarts: Restarts::default(),
            report,
        }
    }

    async fn run(mut self, stop: CancellationToken, farewell: watch::Receiver<Farewell>) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let process = self.process;
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = self.spec.changed() => {}
                () = ended(process) => {}
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
            self.host.reports.proxy(self.report.clone());
        }
        if *farewell.borrow() == Farewell::Stop {
            self.shut_down().await;
        }
    }

    async fn turn(&mut self, spec: Option<ProxySpec>) {
        if let Some(process) = self.process
            && !process.is_alive()
        {
            let why = last_line(&self.dir.join(LOG));
            tracing::warn!(proxy = %self.proxy_id, pid = process.pid, last = %why, "proxy ended");
            self.process = None;
            self.say(
                ProcessState::Stopped,
                format!("the process ended; it said: {why}"),
            );
        }
        if self.process.is_none() {
            let recorded = Process::load(&self.dir.join("process"));
            self.process = recorded.or_else(|| self.unrecorded());
            if let Some(process) = self.process {
                tracing::info!(proxy = %self.proxy_id, pid = process.pid, "proxy adopted");
                self.host.metrics.proxy_adoptions.add(1);
            }
        }
        self.spare = self.spare.filter(Process::is_alive);
        if self.process.is_none() && !self.spare_serves_soon() {
            self.restart(spec);
        }
        if let Some(process) = self.process {
            self.look(process);
        }
    }

    /// A proxy that was relieved has the port still, and accepts clients again.
    fn spare_serves_soon(&mut self) -> bool {
        let Some(spare) = self.spare else {
            self.spare_alone = None;
            return false;
        };
        let since = *self.spare_alone.get_or_insert_with(Instant::now);
        let soon = since.elapsed() < SPARE_LIMIT;
        if !soon {
            tracing::warn!(proxy = %self.proxy_id, pid = spare.pid, "a spare proxy did not serve");
            spare.signal(Signal::KILL);
            self.spare = None;
            self.spare_alone = None;
        }
        soon
    }

    /// Another process has taken over from the one that is known: it says so in proxy.json.
    fn relieved(&mut self, process: Process) -> Process {
        let bound = self.bound().filter(|bound| bound.pid != process.pid);
        let other = bound.and_then(|bound| Process::find(bound.pid));
        let Some(other) = other.filter(|other| other.is_alive() && other.runs_in(&self.dir)) else {
            return process;
        };
        if let Err(error) = other.save(&self.dir.join("process")) {
            tracing::warn!(proxy = %self.proxy_id, %error, "process of proxy not recorded");
        }
        tracing::info!(proxy = %self.proxy_id, pid = other.pid, was = process.pid, "proxy relieved");
        self.spare = Some(process);
        self.spare_alone = None;
        self.process = Some(other);
        other
    }

    fn restart(&mut self, spec: Option<ProxySpec>) {
        let kept = self.kept();
        let wanted = match (spec, kept) {
            (Some(spec), kept) if spec.desired() == Desired::Running => Some(Kept {
                instance_id: spec.instance_id,
                workers: spec.workers,
                address: kept.map(|k| k.address).unwrap_or_default(),
            }),
            (Some(_), _) => None,
            (None, kept) => kept,
        };
        let Some(wanted) = wanted else {
            self.say(
                ProcessState::Stopped,
                "no assignment says how to start it".to_owned(),
            );
            return;
        };
        if !self.restarts.due(Instant::now()) {
            return;
        }
        self.restarts.started(Instant::now());
        match self.spawn(&wanted) {
            Ok(process) => {
                tracing::info!(proxy = %self.proxy_id, pid = process.pid, "proxy started");
                self.host.metrics.proxy_starts.add(1);
                self.process = Some(process);
                self.report.state = ProcessState::Starting.into();
            }
            Err(error) => {
                let binary = self.host.proxy_binary.display();
                tracing::error!(proxy = %self.proxy_id, %binary, %error, "proxy can't be started");
                let why = format!("start {binary}: {error}; see --proxy-binary of the agent");
                self.say(ProcessState::Failed, why);
            }
        }
    }

    fn spawn(&self, wanted: &Kept) -> std::io::Result<Process> {
        make_private_dir(&self.dir)?;
        self.keep(wanted)?;
        let _ = fs::remove_file(self.dir.join("proxy.json"));
        let ip = self.host.advertise_ip;
        let listen = match wanted.address.as_str() {
            "" => SocketAddr::new(ip, free_port(ip)?).to_string(),
            address => address.to_owned(),
        };
        let dir = self.dir.canonicalize()?;
        let args = [
            "--proxy-id".to_owned(),
            self.proxy_id.clone(),
            "--instance".to_owned(),
            wanted.instance_id.clone(),
            "--listen".to_owned(),
            listen,
            "--admin-listen".to_owned(),
            SocketAddr::new(ip, 0).to_string(),
            "--workers".to_owned(),
            wanted.workers.max(1).to_string(),
            "--controller".to_owned(),
            self.host.controllers.addresses().join(","),
            "--data".to_owned(),
            dir.display().to_string(),
            "--host-id".to_owned(),
            self.host.host_id.clone(),
        ];
        let process = Process::spawn(&self.host.proxy_binary, &args, &dir, LOG, Output::Append)?;
        if let Err(error) = process.save(&self.dir.join("process")) {
            // Not recorded, it could not be found again.
            process.signal(Signal::KILL);
            return Err(error);
        }
        Ok(process)
    }

    fn bound(&self) -> Option<Bound> {
        serde_json::from_slice(&fs::read(self.dir.join("proxy.json")).ok()?).ok()
    }

    /// A proxy that was started by an agent that died before it recorded it.
    fn unrecorded(&self) -> Option<Process> {
        let process = Process::find(self.bound()?.pid)?;
        if !process.runs_in(&self.dir) {
            return None;
        }
        if let Err(error) = process.save(&self.dir.join("process")) {
            tracing::warn!(proxy = %self.proxy_id, %error, "process of proxy not recorded");
        }
        Some(process)
    }

    /// Reads where it listens.
    fn look(&mut self, process: Process) {
        let process = self.relieved(process);
        self.report.pid = process.pid;
        let Some(bound) = self.bound().filter(|bound| bound.pid == process.pid) else {
            self.report.state = ProcessState::Starting.into();
            return;
        };
        if let Some(mut kept) = self.kept()
            && kept.address.is_empty()
        {
            kept.address.clone_from(&bound.address);
            if let Err(error) = self.keep(&kept) {
                tracing::warn!(proxy = %self.proxy_id, %error, "endpoint of proxy not recorded");
            }
        }
        self.report = ProxyReport {
            proxy_id: self.proxy_id.clone(),
            state: ProcessState::Running.into(),
            error: String::new(),
            pid: process.pid,
            address: bound.address,
            admin_address: bound.admin_address,
        };
    }

    fn kept(&self) -> Option<Kept> {
        serde_json::from_slice(&fs::read(self.dir.join("spec.json")).ok()?).ok()
    }

    fn keep(&self, kept: &Kept) -> std::io::Result<()> {
        if self.kept().as_ref() == Some(kept) {
            return Ok(());
        }
        let text = serde_json::to_vec(kept).map_err(std::io::Error::other)?;
        write_atomic(&self.dir.join("spec.json"), &text, 0o600)
    }

    fn say(&mut self, state: ProcessState, error: String) {
        self.report.state = state.into();
        self.report.error = error;
        self.report.pid = 0;
    }

    async fn shut_down(&mut self) {
        if let Some(spare) = self.spare.take() {
            spare.stop(Some(Signal::TERM), STOP_GRACE).await;
        }
        let process = self
            .process
            .take()
            .or_else(|| Process::load(&self.dir.join("process")));
        let Some(process) = process else { return };
        process.stop(Some(Signal::TERM), STOP_GRACE).await;
        let _ = fs::remove_file(self.dir.join("process"));
        tracing::info!(proxy = %self.proxy_id, pid = process.pid, "proxy stopped");
    }

    /// `true` when nothing of it is left.
    async fn remove(&mut self) -> bool {
        self.shut_down().await;
        let removed = fs::remove_dir_all(&self.dir);
        if let Err(error) = removed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            let why = format!("remove {}: {error}", self.dir.display());
            self.say(ProcessState::Stopped, why);
            self.host.reports.proxy(self.report.clone());
            return false;
        }
        self.say(ProcessState::Removed, String::new());
        self.host.reports.proxy(self.report.clone());
        true
    }
}

async fn ended(process: Option<Process>) {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}
