//! The owner of one node: starts or adopts its process, probes it, converges it, and does what a
//! leader asks of it, one thing at a time.
//!
//! Invariant: a node has one worker and a worker does one thing, so no convergence runs between the
//! commands of a step, and a second process is never started beside a live one.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use slotmesh_proto::agent::v1::{
    Desired, ExecuteStepRequest, ExecuteStepResponse, NodeReport, NodeSpec, ProcessState,
    SetParametersRequest, SetParametersResponse,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Assigned, Login, files::NodeDir};
use crate::{
    artifact::Version,
    control::Control,
    fence::{ADMIN_USER, Dialect, KnownUsers},
    host::Host,
    journal::record::{Begun, Fact},
    process::{Process, Restarts},
    pulse::{self, Pulse},
};

use parameters::Ahead;

mod append;
mod backlog;
mod capture;
mod converge;
mod damage;
mod exchange;
mod feed;
mod force;
mod lifecycle;
mod parameters;
mod promote;
mod served;
mod steps;

pub use exchange::is_free;

/// How old what is known of a node may get.
const PROBE_EVERY: Duration = Duration::from_millis(100);
/// Calls for one node that wait for their turn; a leader sends one of a kind at a time.
const CALLS_WAITING_MAX: usize = 16;

/// A step on its way to the worker.
#[derive(Debug)]
pub struct StepCall {
    pub request: ExecuteStepRequest,
    pub answer: oneshot::Sender<ExecuteStepResponse>,
}

/// Parameters on their way to the worker.
#[derive(Debug)]
pub struct ParametersCall {
    pub request: SetParametersRequest,
    pub answer: oneshot::Sender<SetParametersResponse>,
}

/// What a leader asks of a node.
#[derive(Debug)]
pub enum NodeCall {
    Step(Box<StepCall>),
    SetParameters(ParametersCall),
}

/// What the agent does with its processes when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    LeaveRunning,
    Stop,
}

/// The rest of the agent's end of a worker.
#[derive(Debug)]
pub struct NodeHandle {
    pub assigned: watch::Sender<Option<Assigned>>,
    pub calls: mpsc::Sender<NodeCall>,
    /// A handle that is dropped ends its worker too.
    stop: DropGuard,
    farewell: watch::Sender<Farewell>,
    task: JoinHandle<()>,
}

impl NodeHandle {
    /// Starts the worker of a node.
    pub fn start(host: Arc<Host>, node_id: String) -> Self {
        let assigned = watch::Sender::new(None);
        let (calls, waiting) = mpsc::channel(CALLS_WAITING_MAX);
        let stop = CancellationToken::new();
        let farewell = watch::Sender::new(Farewell::LeaveRunning);
        let worker = Worker::new(host, node_id, assigned.subscribe());
        let task = tokio::spawn(worker.run(waiting, stop.clone(), farewell.subscribe()));
        Self {
            assigned,
            calls,
            stop: stop.drop_guard(),
            farewell,
            task,
        }
    }

    /// Hands on a new assignment; wakes the worker only when it says something new.
    pub fn assign(&self, new: Assigned) {
        self.assigned.send_if_modified(|current| {
            let news = current.as_ref().map(|c| &c.spec) != Some(&new.spec);
            *current = Some(new);
            news
        });
    }

    /// Ends the worker after what it is doing, and its process if so told.
    pub async fn stop(self, farewell: Farewell) {
        self.farewell.send_replace(farewell);
        drop(self.stop);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "worker of a node failed");
        }
    }
}

#[derive(Debug)]
struct Worker {
    host: Arc<Host>,
    node_id: String,
    assigned: watch::Receiver<Option<Assigned>>,
    dir: Option<NodeDir>,
    process: Option<Process>,
    control: Option<Control>,
    restarts: Restarts,
    damage: damage::Damage,
    /// What is known of the process that answers; empty when its run id changes.
    run: Run,
    report: NodeReport,
    /// A hand-over that a former life of this agent left unfinished.
    resume: Option<Begun>,
    /// What follows from the step that is ending; journaled with its outcome.
    concluded: Vec<Fact>,
    removed: bool,
    /// Why the last start failed; shown until the node answers.
    trouble: Option<Trouble>,
    /// Of the process, while there is one.
    pulse: Option<Pulse>,
    /// As the worker last looked: since when the process is unresponsive.
    silent_since: Option<Instant>,
    /// The process was started by an agent of before, so it may have users.
    adopted: bool,
    /// Of the last process that was seen to end.
    exited_run_id: String,
    exchange: exchange::Exchange,
}

#[derive(Debug, Clone)]
struct Trouble {
    state: ProcessState,
    why: String,
}

#[derive(Debug, Default)]
struct Run {
    run_id: String,
    version: Option<Version>,
    users: KnownUsers,
    login: Option<Login>,
    /// As this life of the agent has set it, so that a newer release's rights reach old processes.
    observer: Option<Login>,
    /// As set, by their names in lower case.
    parameters: BTreeMap<String, String>,
    ahead: Option<Ahead>,
    /// Of a replica.
    feed: feed::Feed,
    append: append::Append,
    served: served::Served,
    backlog: backlog::Backlog,
    /// Since when what only it has can't be kept.
    capture_fails_since: Option<Instant>,
    /// Since when an assignment wants rights taken from it that it still has.
    fence_owed_since: Option<Instant>,
    /// As a last resort, because no fence could be placed.
    killed: bool,
}

impl Run {
    /// Which ACL rules the engine understands.
    fn dialect(&self) -> Dialect {
        Dialect::of(self.version)
    }
}

impl Worker {
    fn new(host: Arc<Host>, node_id: String, assigned: watch::Receiver<Option<Assigned>>) -> Self {
        let resume = host
            .journal
            .read(|memory| steps::unfinished(memory, &node_id));
        let report = NodeReport {
            node_id: node_id.clone(),
            state: ProcessState::Starting.into(),
            ..NodeReport::default()
        };
        // Told before the first probe, so that no report leaves out a node that is here.
        host.reports.node(report.clone());
        Self {
            host,
            node_id,
            assigned,
            dir: None,
            process: None,
            control: None,
            restarts: Restarts::default(),
            damage: damage::Damage::default(),
            run: Run::default(),
            report,
            resume,
            concluded: Vec::new(),
            removed: false,
            trouble: None,
            pulse: None,
            silent_since: None,
            adopted: false,
            exited_run_id: String::new(),
            exchange: exchange::Exchange::default(),
        }
    }

    async fn run(
        mut self,
        mut calls: mpsc::Receiver<NodeCall>,
        stop: CancellationToken,
        farewell: watch::Receiver<Farewell>,
    ) {
        let mut tick = interval(PROBE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let process = self.process;
            let pulse = self.pulse.as_ref().map(Pulse::subscribe);
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(call) = calls.recv() => Box::pin(self.answer(call)).await,
                Ok(()) = self.assigned.changed() => {}
                () = ended(process) => {}
                () = pulse::differs(pulse, self.silent_since) => {}
                _ = tick.tick() => {}
            }
            Box::pin(self.turn()).await;
        }
        if *farewell.borrow() == Farewell::Stop {
            self.shut_down(lifecycle::SaveData::Yes).await;
        }
    }

    async fn answer(&mut self, call: NodeCall) {
        match call {
            NodeCall::Step(call) => {
                let response = self.execute(call.request).await;
                // The caller may have given up; the outcome is in the journal.
                let _ = call.answer.send(response);
            }
            NodeCall::SetParameters(call) => {
                // Nobody waits any more, so nobody would store what is set.
                if !call.answer.is_closed() {
                    let response = self.set_ahead(&call.request).await;
                    let _ = call.answer.send(response);
                }
            }
        }
    }

    /// One look, and what follows from it.
    async fn turn(&mut self) {
        let assigned = self.assigned.borrow_and_update().clone();
        let desired = self
            .spec(assigned.as_ref())
            .map_or(Desired::Unspecified, |s| s.desired());
        if desired == Desired::Removed {
            if let Some(assigned) = &assigned
                && let Err(why) = self.keep_before_removal(assigned).await
            {
                tracing::warn!(node = %self.node_id, %why, "node not removed yet");
                self.report.error = why;
                self.publish();
                return;
            }
            self.remove().await;
            return;
        }
        self.removed = false;
        self.ensure_process(assigned.as_ref()).await;
        self.feel_pulse();
        self.fence_by_force(assigned.as_ref());
        if let Some(assigned) = &assigned {
            self.remember_freeze(assigned).await;
        }
        if self.process.is_some() && self.probe_if_responsive().await {
            Box::pin(self.resume_hand_over(assigned.as_ref())).await;
            if let Some(assigned) = &assigned
                && !self.make_way(assigned, true).await
            {
                self.converge(assigned).await;
            }
        } else if let Some(assigned) = &assigned {
            self.make_way(assigned, false).await;
        }
        self.publish();
    }

    /// What to run: as assigned, or else as last time.
    fn spec(&self, assigned: Option<&Assigned>) -> Option<NodeSpec> {
        assigned
            .map(|a| a.spec.clone())
            .or_else(|| NodeDir::peek_spec(&self.host.nodes_dir, &self.node_id))
    }

    fn publish(&mut self) {
        self.report.pid = self.process.map_or(0, |p| p.pid);
        self.report.exited_run_id.clone_from(&self.exited_run_id);
        self.report.unresponsive = self.silent_since.is_some();
        self.report_engine();
        self.host.reports.node(self.report.clone());
    }

    /// A connection to the admin's socket, made when there is none.
    async fn admin(&mut self) -> Option<&mut Control> {
        if self.control.as_ref().is_none_or(Control::is_closed) {
            let dir = self.dir.as_ref()?;
            let secret = dir.admin_secret().ok()?;
            self.control = Control::unix(dir.socket(), ADMIN_USER, &secret).await.ok();
        }
        self.control.as_mut()
    }
}

async fn ended(process: Option<Process>) {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}

/// When a step's time is over.
fn deadline_of(request: &ExecuteStepRequest) -> Instant {
    const DEFAULT: Duration = Duration::from_secs(5);
    const MAX: Duration = Duration::from_secs(60);
    let asked = Duration::from_millis(request.timeout_ms.into());
    Instant::now()
        + if asked.is_zero() {
            DEFAULT
        } else {
            asked.min(MAX)
        }
}
