//! A process that lives and does not answer: it is left alone for as long as it has a right to serve,
//! and killed when it has none and can't be told so.
//!
//! Invariant: a process is killed only if an assignment closes an epoch of which it may have users,
//! and only when it takes no commands by which these could be deleted.

use std::time::Duration;

use rustix::process::Signal;
use slotmesh_proto::agent::v1::ProcessState;
use tokio::time::Instant;

use super::Worker;
use crate::{
    node::Assigned,
    pulse::{self, Pulse},
};

/// Of a process that is unresponsive already: it may have been about to come back.
const MERCY: Duration = Duration::from_millis(300);
/// A process that answers only that it is busy, while a failover waits for its fence: as long as a
/// script may run before the engine says so.
const FENCE_OVERDUE: Duration = Duration::from_secs(5);

impl Worker {
    /// Has a pulse taken of the process that there is, and takes note of what it says.
    pub(super) fn feel_pulse(&mut self) {
        let watched = self.pulse.as_ref().map(Pulse::process);
        if watched != self.process {
            self.pulse = match (self.process, &self.dir) {
                (Some(process), Some(dir)) => {
                    Some(Pulse::start(process, dir.socket(), self.adopted))
                }
                _ => None,
            };
        }
        let silent_since = self.pulse.as_ref().and_then(Pulse::silent_since);
        if silent_since.is_some() != self.silent_since.is_some() {
            tracing::warn!(node = %self.node_id, unresponsive = silent_since.is_some(), "pulse of node");
        }
        self.silent_since = silent_since;
    }

    /// A probe that is given up as soon as the process is known not to answer.
    pub(super) async fn probe_if_responsive(&mut self) -> bool {
        let pulse = self.pulse.as_ref().map(Pulse::subscribe);
        let answered = match self.silent_since {
            Some(_) => false,
            None => tokio::select! {
                answered = self.probe() => answered,
                () = pulse::differs(pulse, None) => false,
            },
        };
        self.feel_pulse();
        if self.silent_since.is_some() {
            self.control = None;
            if self.report.state() == ProcessState::Running {
                self.report.error = "the process does not answer".to_owned();
            }
        }
        answered
    }

    /// The last resort: a process that could still serve an epoch that is over, and takes no fence.
    pub(super) fn fence_by_force(&mut self, assigned: Option<&Assigned>) {
        let Some(process) = self.process else { return };
        if !assigned.is_some_and(|assigned| self.owes_fence(assigned)) {
            self.run.fence_owed_since = None;
            return;
        }
        let now = Instant::now();
        let owed_since = *self.run.fence_owed_since.get_or_insert(now);
        let longer_than = |since: Instant, limit| now.duration_since(since) >= limit;
        let silent = self
            .silent_since
            .is_some_and(|since| longer_than(since, MERCY));
        if self.run.killed || !(silent || longer_than(owed_since, FENCE_OVERDUE)) {
            return;
        }
        self.run.killed = true;
        tracing::error!(node = %self.node_id, pid = process.pid, "its epoch is over and it takes no fence; killed");
        process.signal(Signal::KILL);
    }

    /// Whether the assignment closes an epoch of which the process has, or may have, a proxy's user.
    fn owes_fence(&self, assigned: &Assigned) -> bool {
        let spec = &assigned.spec;
        let granted = self.report.granted_epoch;
        // Of a process that this life of the agent has never heard, the record is all that is known;
        // but one that it started itself was born fenced.
        let unheard = self.adopted && self.run.run_id.is_empty();
        let lost = spec.detached && spec.primary_node_id == self.node_id;
        (granted > 0 && granted <= spec.closed_epoch) || (lost && unheard)
    }
}
