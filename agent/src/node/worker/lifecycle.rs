//! A node's process from its first start to its removal.
//!
//! Invariant: before a start every trace of a live process is followed: our record, the engine's own
//! pid file, and whatever works in the node's directory.

use std::{path::PathBuf, time::Duration};

use rustix::process::Signal;
use slotmesh_proto::{
    agent::v1::{Desired, NodeReport, NodeSpec, ProcessState},
    store::v1::NodeRole,
};
use tokio::time::Instant;

use super::{
    Run, Trouble, Worker,
    feed::{self, Feed},
};
use crate::{
    control::Control,
    fence,
    handover::{Link, driver::chain},
    node::{
        Assigned,
        files::{KEPT_SINCE_START, NodeDir},
    },
    probe::{Info, granted_epoch, replication_users},
    process::{Output, Process, last_line},
};

/// Flushing the append-only file of a big node to a slow disk.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
pub(super) const OUTPUT: &str = "redis.out";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SaveData {
    Yes,
    No,
}

impl Worker {
    /// Afterwards `self.process` is a live process, or the report says why there is none.
    pub(super) async fn ensure_process(&mut self, assigned: Option<&Assigned>) {
        if let Some(process) = self.process {
            if process.is_alive() {
                return;
            }
            self.note_end(process);
            // Out before a successor is started: a failover begins with this word.
            self.publish();
        }
        if self.adopt().await {
            return;
        }
        let Some(spec) = self.spec(assigned) else {
            self.set_state(ProcessState::Stopped, "no assignment says how to start it");
            return;
        };
        if spec.desired() != Desired::Running || !self.restarts.due(Instant::now()) {
            self.show_trouble();
            return;
        }
        self.restarts.started(Instant::now());
        self.mend_before_start(assigned).await;
        match self.start(&spec).await {
            Ok(process) => {
                tracing::info!(node = %self.node_id, pid = process.pid, "node started");
                self.host.metrics.node_starts.add(1);
                self.process = Some(process);
                self.adopted = false;
                self.note_engine(true);
                let trouble = self
                    .trouble
                    .as_ref()
                    .map_or("", |t| t.why.as_str())
                    .to_owned();
                self.set_state(ProcessState::Starting, &trouble);
            }
            Err(why) => {
                tracing::error!(node = %self.node_id, %why, "node can't be started");
                self.engine_failed(&spec.engine, why.clone());
                self.trouble = Some(Trouble {
                    state: ProcessState::Failed,
                    why,
                });
                self.show_trouble();
            }
        }
    }

    /// Takes over a process that a former life of this agent started.
    pub(super) async fn adopt(&mut self) -> bool {
        if !NodeDir::locate(&self.host.nodes_dir, &self.node_id).exists() {
            return false;
        }
        if self.open_dir().is_err() {
            return false;
        }
        let Some(dir) = &self.dir else { return false };
        let recorded = Process::load(&dir.process_file());
        let unrecorded = dir
            .engine_pid()
            .and_then(Process::find)
            .filter(|p| p.runs_in(dir.path()));
        // As it was started, or as it names itself once it runs.
        let mut marks = vec![dir.config().display().to_string()];
        marks.extend(dir.port().map(|port| format!(":{port}")));
        let unmarked = || Process::find_in(dir.path(), &marks);
        let Some(process) = recorded.or(unrecorded).or_else(unmarked) else {
            return false;
        };
        if let Err(error) = process.save(&dir.process_file()) {
            tracing::warn!(node = %self.node_id, %error, "process of node not recorded");
        }
        tracing::info!(node = %self.node_id, pid = process.pid, "node adopted");
        self.host.metrics.node_adoptions.add(1);
        self.process = Some(process);
        self.adopted = true;
        self.note_engine(false);
        self.set_state(ProcessState::Starting, "");
        true
    }

    fn open_dir(&mut self) -> std::io::Result<&NodeDir> {
        if self.dir.is_none() {
            self.dir = Some(NodeDir::create(&self.host.nodes_dir, &self.node_id)?);
        }
        self.dir
            .as_ref()
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    async fn start(&mut self, spec: &NodeSpec) -> Result<Process, String> {
        let engine = self
            .host
            .engines
            .resolve(&spec.engine)
            .await
            .map_err(|error| chain(&error))?;
        let ip = self.host.advertise_ip;
        let dir = self
            .open_dir()
            .map_err(|e| format!("make the node's directory: {e}"))?;
        let dir = dir.clone();
        let prepare = || -> std::io::Result<()> {
            self.prepare_data(&dir, spec)?;
            dir.note_rest()?;
            dir.save_spec(spec)?;
            let port = dir.ensure_port(ip)?;
            dir.write_config(ip, port, spec, &engine)?;
            let _ = std::fs::remove_file(dir.socket());
            Ok(())
        };
        prepare().map_err(|e| format!("write the node's files: {e}"))?;
        let args = [dir.config().display().to_string()];
        let process = Process::spawn(&engine.path, &args, dir.path(), OUTPUT, Output::StartAnew)
            .map_err(|e| {
                let printed = last_line(&dir.path().join(OUTPUT));
                format!("start {}: {e}; it said: {printed}", engine.path.display())
            })?;
        process.save(&dir.process_file()).map_err(|e| {
            // Not recorded, it could not be found again.
            process.signal(Signal::KILL);
            format!("record the node's process: {e}")
        })?;
        Ok(process)
    }

    /// The process has ended by itself.
    fn note_end(&mut self, process: Process) {
        let why = self.dir.as_ref().map(|dir| {
            let output = last_line(&dir.path().join(OUTPUT));
            if output.is_empty() {
                last_line(&dir.log())
            } else {
                output
            }
        });
        let why = why.unwrap_or_default();
        tracing::warn!(node = %self.node_id, pid = process.pid, last = %why, "node ended");
        self.note_engine_end();
        self.note_refusal();
        self.forget_process();
        let mut state = ProcessState::Stopped;
        if let Some(dir) = &self.dir
            && !dir.has_served()
        {
            state = ProcessState::Failed;
            // Nobody has been told this port yet, so the next start takes another one.
            if dir.port_was_taken() {
                let _ = dir.forget_port();
            }
        }
        let why = format!("the process ended; it said: {why}");
        self.trouble = Some(Trouble { state, why });
        self.show_trouble();
    }

    /// The process has ended, and whoever needs to know which one it was is told for good.
    fn forget_process(&mut self) {
        if !self.run.run_id.is_empty() {
            self.exited_run_id.clone_from(&self.run.run_id);
        }
        self.process = None;
        self.control = None;
        self.pulse = None;
        self.silent_since = None;
        self.run = Run::default();
    }

    fn show_trouble(&mut self) {
        if let Some(Trouble { state, why }) = self.trouble.clone() {
            self.set_state(state, &why);
        } else {
            self.set_state(ProcessState::Stopped, "");
        }
    }

    fn set_state(&mut self, state: ProcessState, error: &str) {
        let address = self.address();
        self.report = NodeReport {
            node_id: self.node_id.clone(),
            state: state.into(),
            error: error.to_owned(),
            address,
            ..NodeReport::default()
        };
    }

    fn address(&self) -> String {
        let port = self.dir.as_ref().and_then(NodeDir::port);
        port.map_or_else(String::new, |port| {
            std::net::SocketAddr::new(self.host.advertise_ip, port).to_string()
        })
    }

    /// Asks the process for everything; `false` when it does not answer.
    pub(super) async fn probe(&mut self) -> bool {
        let answered = match self.admin().await {
            Some(control) => ask(control).await,
            None => None,
        };
        let Some((info, users, feeding)) = answered else {
            // Busy with a long script, loading, or just starting: the process lives, so it is
            // neither ended nor replaced.
            if self.report.state() == ProcessState::Running {
                self.report.busy = true;
                self.report.error = "the process does not answer".to_owned();
            }
            return false;
        };
        if info.run_id() != self.run.run_id {
            self.run = Run {
                run_id: info.run_id().to_owned(),
                feed: Feed::of(self.adopted),
                ..Run::default()
            };
            self.report.assigned_epoch = 0;
            self.report.assigned_membership = 0;
            self.report.detached = false;
            self.set_engine().await;
            if let Some(dir) = &self.dir
                && let Err(error) = dir.mark_served()
            {
                tracing::warn!(node = %self.node_id, %error, "first service of node not recorded");
            }
            self.report.continues_run_id = self
                .dir
                .as_ref()
                .map(NodeDir::continues)
                .unwrap_or_default();
        }
        info.fill(&mut self.report);
        self.report.detached &=
            self.report.observed_role() == NodeRole::Replica && !self.report.link_up;
        self.look_at_feed(&info, feeding).await;
        self.renew_append_file(&info).await;
        self.settle(&info).await;
        self.run.version = info.version();
        self.report.granted_epoch = granted_epoch(&users);
        self.report.replication_users = replication_users(&users);
        self.run.users = users;
        self.measure().await;
        self.fit_backlog(&info).await;
        self.report.state = ProcessState::Running.into();
        self.report.error.clear();
        self.report.address = self.address();
        self.trouble = None;
        true
    }

    /// What the boot configuration says too, for a process that an older agent started.
    async fn set_engine(&mut self) {
        if let Some(control) = self.admin().await {
            for (name, value) in KEPT_SINCE_START {
                // Refused while it loads; then its configuration is as new as this agent.
                let _ = control.call(&["CONFIG", "SET", name, value]).await;
            }
        }
    }

    /// Stops the process, if there is one, and waits for its end.
    pub(super) async fn shut_down(&mut self, save: SaveData) {
        if self.process.is_none() {
            self.adopt().await;
        }
        let Some(process) = self.process.take() else {
            return;
        };
        let asked = match self.admin().await {
            Some(control) => {
                // Both flush the append-only file; a snapshot is never wanted. The connection closes
                // instead of an answer.
                let args: &[&str] = match save {
                    SaveData::Yes => &["SHUTDOWN"],
                    SaveData::No => &["SHUTDOWN", "NOSAVE"],
                };
                let _ = control.call_within(args, SHUTDOWN_GRACE).await;
                true
            }
            None => false,
        };
        // A second signal while it shuts down would make Redis exit at once, unflushed.
        process
            .stop((!asked).then_some(Signal::TERM), SHUTDOWN_GRACE)
            .await;
        self.forget_process();
        if let Some(dir) = &self.dir {
            let _ = std::fs::remove_file(dir.process_file());
        }
        tracing::info!(node = %self.node_id, pid = process.pid, "node stopped");
    }

    /// The assignment wants the node gone.
    pub(super) async fn remove(&mut self) {
        if !self.removed {
            self.shut_down(SaveData::No).await;
            let path: PathBuf = NodeDir::locate(&self.host.nodes_dir, &self.node_id);
            if path.exists() {
                let removed = self.open_dir().and_then(NodeDir::remove);
                if let Err(error) = removed {
                    tracing::error!(node = %self.node_id, %error, "node's directory not removed");
                    let why = format!("remove {}: {error}", path.display());
                    self.set_state(ProcessState::Stopped, &why);
                    self.publish();
                    return;
                }
            }
            let gone = crate::journal::record::Fact::Unfenced(self.node_id.clone());
            if let Err(error) = self.host.journal.append([gone]).await {
                tracing::error!(%error, "removal not journaled");
            }
            self.dir = None;
            self.run = Run::default();
            self.trouble = None;
            self.removed = true;
        }
        self.set_state(ProcessState::Removed, "");
        self.publish();
    }
}

/// The last is the connection that feeds a replica.
async fn ask(control: &mut Control) -> Option<(Info, fence::KnownUsers, u64)> {
    let info = Info::read(control, "default").await.ok()?;
    info.role()?;
    // While it loads its data a node answers little else.
    let users = match info.text("loading") {
        "1" => fence::KnownUsers::new(),
        _ => fence::known_users(control).await.ok()?,
    };
    let feeding = match info.link() {
        Link::Up => feed::feeding_connection(control).await.ok()?,
        Link::Syncing | Link::Down => 0,
    };
    Some((info, users, feeding))
}
