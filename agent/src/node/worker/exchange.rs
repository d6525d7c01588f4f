//! A replica's process makes way for one of another engine.
//!
//! Only where the assignment says that nobody counts on the node: it is ended with a snapshot, the
//! assigned engine starts from that as a replica of nobody, follows its primary once the record names
//! it, and goes on where its predecessor stopped. Meanwhile it writes its append-only file anew.
//!
//! What runs is known from what was started here: the file that a start leaves, read again by the next
//! life of the agent. Invariant: no process is ended that is, or says that it is, a primary, or that
//! the assignment does not give free; and none before its successor's program was found.

use std::time::Duration;

use rustix::process::Signal;
use slotmesh_proto::{
    agent::v1::{EngineTrouble, NodeSpec},
    store::v1::NodeRole,
};
use tokio::time::Instant;

use super::{Worker, lifecycle::OUTPUT};
use crate::{
    control::ControlError,
    handover::driver::chain,
    node::{Assigned, files::NodeDir, is_behind},
    probe::Info,
    process::{Process, last_lines},
};

/// An engine writes its snapshot at 100 megabytes a second or more; what takes longer than this is a
/// disk that stands still. The next process then copies from its primary.
const SAVE_MAX: Duration = Duration::from_secs(600);
/// An engine that saves answers nobody, and one that waits for its replicas does so for 2 s: one that
/// answers for longer than this has given up ending.
const ENDING_MAX: Duration = Duration::from_secs(10);
/// A process that was just started and does not even say that it loads.
const SILENT_MAX: Duration = Duration::from_secs(30);
/// For the engine to refuse; saving takes longer, and then there is no answer but the end.
const REFUSAL_TIME: Duration = Duration::from_millis(300);
/// Between two requests that the engine refuses, because it writes its first append-only file.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// After so many starts in vain the snapshot is blamed, and the append-only file is tried. Far more
/// than a controller needs to see that the engine is at fault, and to assign the one of before.
const RESUMED_STARTS_MAX: u32 = 10;
/// Of a log, in a report.
const LOG_LINES: usize = 4;

/// What is known of the node's engines.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    /// Since when the process is on its way to its end.
    ending: Option<Instant>,
    asked: Option<Instant>,
    /// The process has answered, and has its data.
    answered: bool,
    started: Option<Instant>,
    trouble: Option<EngineTrouble>,
    /// Of a process that lives: by which name it was started.
    pub(super) engine: Option<String>,
    /// Its append-only file is not whole yet.
    settling: bool,
}

/// Whether the assignment gives a node's process free.
#[must_use]
pub fn is_free(assigned: &Assigned, journaled_epoch: u64) -> bool {
    let spec = &assigned.spec;
    spec.may_exchange
        && spec.role() == NodeRole::Replica
        && !spec.frozen
        && !spec.detached
        && spec.epoch > 0
        && spec.epoch >= journaled_epoch
}

impl Worker {
    /// Ends the process if it has to make way; tells whether it is on its way.
    pub(super) async fn make_way(&mut self, assigned: &Assigned, answers: bool) -> bool {
        let Some(process) = self.process else {
            return false;
        };
        if let Some(since) = self.exchange.ending {
            if answers && since.elapsed() > ENDING_MAX {
                tracing::warn!(node = %self.node_id, pid = process.pid, "it was asked to end and goes on; its log says why");
                self.exchange.ending = None;
                return false;
            }
            if since.elapsed() > SAVE_MAX {
                tracing::error!(node = %self.node_id, pid = process.pid, "no snapshot in time; killed");
                process.signal(Signal::KILL);
            }
            return true;
        }
        let spec = &assigned.spec;
        let is_other = self.exchange.engine.as_deref() != Some(&spec.engine);
        let run_id = &self.run.run_id;
        let (epoch, is_behind) = self.host.journal.read(|memory| {
            let standing = memory.standing(&self.node_id);
            (
                memory.epoch(&spec.instance_id, &spec.shard_id),
                is_behind(spec, run_id, standing),
            )
        });
        // From a controller that is behind: the node may be in sync since.
        let is_free = is_free(assigned, epoch) && !is_behind;
        if !is_other || !is_free || !self.may_ask() {
            return false;
        }
        if !answers {
            // One that has hung since it was started is nobody's primary.
            return self.end_silent(process, spec);
        }
        if self.report.loading || !self.is_nobodys_primary(spec) {
            return false;
        }
        self.exchange.asked = Some(Instant::now());
        let engine = match self.host.engines.resolve(&spec.engine).await {
            Ok(engine) => engine,
            Err(error) => {
                self.engine_failed(&spec.engine, chain(&error));
                return false;
            }
        };
        tracing::info!(node = %self.node_id, from = self.exchange.engine.as_deref().unwrap_or_default(), to = %spec.engine, version = %engine.version, "process makes way for another engine");
        self.end_for(spec).await
    }

    /// A replica, or a process that was never named and that no proxy can reach: one that was started
    /// again in the middle of an exchange is its own primary until the record names it.
    fn is_nobodys_primary(&self, spec: &NodeSpec) -> bool {
        let run_id = &self.run.run_id;
        let has_stood = self.host.journal.read(|memory| {
            let standing = memory.standing(&self.node_id);
            standing.is_some_and(|s| s.run_id == *run_id)
        });
        let is_unnamed = spec.run_id != *run_id && !has_stood && self.report.granted_epoch == 0;
        self.report.observed_role() == NodeRole::Replica || is_unnamed
    }

    fn may_ask(&self) -> bool {
        self.exchange
            .asked
            .is_none_or(|asked| asked.elapsed() >= ASK_AGAIN)
    }

    fn end_silent(&mut self, process: Process, spec: &NodeSpec) -> bool {
        let has_hung = self
            .exchange
            .started
            .is_some_and(|since| since.elapsed() > SILENT_MAX);
        if !has_hung || self.exchange.answered || !self.run.run_id.is_empty() {
            return false;
        }
        tracing::warn!(node = %self.node_id, pid = process.pid, to = %spec.engine, "process never answered; killed");
        process.signal(Signal::KILL);
        self.exchange.ending = Some(Instant::now());
        true
    }

    /// Asks the process to end, with a snapshot if its data is wanted.
    async fn end_for(&mut self, spec: &NodeSpec) -> bool {
        let Some(dir) = self.dir.clone() else {
            return false;
        };
        let how = if spec.discard_data { "NOSAVE" } else { "SAVE" };
        if !spec.discard_data
            && let Err(error) = dir.mark_resume()
        {
            self.report.error = format!("mark the node's snapshot: {error}");
            return false;
        }
        let Some(control) = self.admin().await else {
            return false;
        };
        let asked = control.call_within(&["SHUTDOWN", how], REFUSAL_TIME).await;
        match asked {
            Err(ControlError::Refused(words)) => {
                tracing::info!(node = %self.node_id, %words, "not ended yet");
                self.report.error = format!("it does not end yet: {words}");
                false
            }
            Err(ControlError::Connect { .. }) => false,
            // No answer is what a process gives that ends.
            Ok(_) | Err(ControlError::Unanswered { .. }) => {
                self.exchange.ending = Some(Instant::now());
                self.restarts = Default::default();
                true
            }
        }
    }

    /// Before a process is started: its data is as the assignment wants it.
    pub(super) fn prepare_data(&self, dir: &NodeDir, spec: &NodeSpec) -> std::io::Result<()> {
        let last = dir.load_spec().map(|last| last.engine);
        let starts = self.exchange.trouble.as_ref().map_or(0, |t| t.starts);
        // While its shard fails over an assignment does not say what is to become of the data, so the
        // engine may have been started with files that it can't load.
        let fails = (self.exchange.trouble.as_ref()).is_some_and(|t| t.engine == spec.engine);
        let is_other = last.as_ref() != Some(&spec.engine);
        if spec.may_exchange && spec.discard_data && (is_other || fails) {
            tracing::info!(node = %self.node_id, to = %spec.engine, "data discarded: it is copied from the primary");
            return dir.discard_data();
        }
        if dir.resumes() && starts >= RESUMED_STARTS_MAX {
            tracing::warn!(node = %self.node_id, "snapshot given up after so many starts");
            return dir.forget_resume();
        }
        Ok(())
    }

    /// A process runs that was started, by this life of the agent or one before.
    pub(super) fn note_engine(&mut self, is_new: bool) {
        let spec = self.dir.as_ref().and_then(NodeDir::load_spec);
        self.exchange.engine = spec.map(|spec| spec.engine);
        self.exchange.answered = false;
        self.exchange.started = is_new.then(Instant::now);
        self.exchange.ending = None;
    }

    /// The process has ended; what it said last is told if it has never been of use.
    pub(super) fn note_engine_end(&mut self) {
        let engine = self.exchange.engine.take().unwrap_or_default();
        let was_asked = self.exchange.ending.take().is_some();
        if !self.exchange.answered && !was_asked && self.exchange.started.is_some() {
            let last = self.dir.as_ref().map(last_words).unwrap_or_default();
            self.engine_failed(&engine, last);
        }
        self.exchange.answered = false;
    }

    /// A start that came to nothing.
    pub(super) fn engine_failed(&mut self, engine: &str, why: String) {
        let before = self.exchange.trouble.take();
        let before = before
            .filter(|t| t.engine == engine)
            .map_or(0, |t| t.starts);
        let starts = before.saturating_add(1);
        tracing::warn!(node = %self.node_id, engine, starts, why, "engine can't be started");
        self.exchange.trouble = Some(EngineTrouble {
            engine: engine.to_owned(),
            starts,
            why,
        });
    }

    /// At each answer: goes on with an append-only file that is not whole.
    pub(super) async fn settle(&mut self, info: &Info) {
        let marked = self.dir.clone().filter(NodeDir::resumes);
        self.exchange.settling = marked.is_some();
        if info.text("loading") == "1" || info.text("async_loading") == "1" {
            return;
        }
        if !self.exchange.answered {
            self.exchange.answered = true;
            self.exchange.trouble = None;
        }
        let Some(dir) = marked.filter(|_| self.exchange.ending.is_none()) else {
            return;
        };
        match info.appending() {
            Some(file) if file.writes && !file.rewrites && file.rewritten => {
                match dir.forget_resume() {
                    Ok(()) => self.exchange.settling = false,
                    Err(error) => {
                        tracing::warn!(node = %self.node_id, %error, "mark not removed");
                    }
                }
            }
            Some(_) => {}
            // A copy from its primary stops the file, and starts it again by itself.
            None if info.text("master_sync_in_progress") == "1" => {}
            None => {
                if let Some(control) = self.admin().await
                    && let Err(error) = control.call(&["CONFIG", "SET", "appendonly", "yes"]).await
                {
                    let why = chain(&error);
                    tracing::warn!(node = %self.node_id, %why, "append-only file not begun");
                }
            }
        }
    }

    /// The report's part of it.
    pub(super) fn report_engine(&mut self) {
        let lives = self.process.is_some();
        self.report.engine = self.exchange.engine.clone().filter(|_| lives);
        self.report
            .engine_trouble
            .clone_from(&self.exchange.trouble);
        self.report.settling = lives && self.exchange.settling;
        if self.exchange.ending.is_some() {
            self.report.error = "its process ends to make way for another engine".to_owned();
        }
    }
}

/// What the last process said before its end: what it printed, or else its log.
fn last_words(dir: &NodeDir) -> String {
    let printed = last_lines(&dir.path().join(OUTPUT));
    let text = match printed.trim().is_empty() {
        true => last_lines(&dir.log()),
        false => printed,
    };
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(change: impl Fn(&mut NodeSpec)) -> Assigned {
        let mut spec = NodeSpec {
            epoch: 4,
            may_exchange: true,
            ..NodeSpec::default()
        };
        spec.set_role(NodeRole::Replica);
        change(&mut spec);
        Assigned {
            spec,
            ..Assigned::default()
        }
    }

    #[test]
    fn only_a_replica_that_is_given_free_is_ended() {
        assert!(is_free(&assigned(|_| ()), 4));
        let kept: [fn(&mut NodeSpec); 5] = [
            |s| s.may_exchange = false,
            |s| s.set_role(NodeRole::Primary),
            |s| s.frozen = true,
            |s| s.detached = true,
            |s| s.epoch = 0,
        ];
        for change in kept {
            assert!(!is_free(&assigned(change), 0), "{:?}", assigned(change));
        }
        assert!(!is_free(&assigned(|_| ()), 5), "from before a failover");
    }
}
