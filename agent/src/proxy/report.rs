//! What the controllers are told of a proxy: who serves, how far an exchange is, what can be gone back to.
//!
//! Invariant: it says what is, not what is wanted; a failure stands in it until something else is
//! assigned, so that no controller misses it.

use slotmesh_proto::agent::v1::{HandoverState, ProcessState, ProxyHandover, ProxyReport};

use super::{Worker, change::Job, runs::Key};

impl Worker {
    pub(super) fn tell(&self) {
        let mut report = ProxyReport {
            proxy_id: self.proxy_id.clone(),
            handover: self.handover(),
            ..ProxyReport::default()
        };
        match (&self.runs.serving, &self.runs.attempt) {
            (Some(run), _) => {
                let bound = self.bound.as_ref().filter(|b| b.is_of(run.process));
                report.state = ProcessState::Running.into();
                report.pid = run.process.pid;
                report.address = bound.map(|b| b.address.clone()).unwrap_or_default();
                report.admin_address = bound.map(|b| b.admin_address.clone()).unwrap_or_default();
                report.program = Some(run.origin.key.program.clone());
                report.generation = run.origin.key.generation;
                report.version.clone_from(&run.origin.version);
            }
            (None, Some(attempt)) => {
                report.state = ProcessState::Starting.into();
                report.pid = attempt.process.map_or(0, |process| process.pid);
            }
            (None, None) => {
                report.state = self.state.0.into();
                report.error.clone_from(&self.state.1);
            }
        }
        if let Some(spare) = self.runs.warm() {
            report.spare_warm = true;
            report.spare_program = spare.run.origin.key.program.clone();
            report.spare_generation = spare.run.origin.key.generation;
        }
        self.host.reports.proxy(report);
    }

    /// How far the last exchange is.
    fn handover(&self) -> Option<ProxyHandover> {
        let of = |key: &Key, state: HandoverState| ProxyHandover {
            program: key.program.clone(),
            generation: key.generation,
            state: state.into(),
            ..ProxyHandover::default()
        };
        if let Some(job) = &self.changing.job {
            let state = match job {
                Job::Stage { .. } => HandoverState::Staging,
                Job::Back { .. } => HandoverState::HandingOver,
            };
            return Some(of(job.key(), state));
        }
        let taken = |process| self.dir.take_over(process).map_or(0, |told| told.taken);
        if let Some(attempt) = self.runs.attempt.as_ref().filter(|a| a.giver.is_some()) {
            return Some(ProxyHandover {
                clients: attempt.process.map_or(0, taken),
                ..of(&attempt.origin.key, HandoverState::HandingOver)
            });
        }
        if let Some(failure) = &self.runs.failure {
            return Some(ProxyHandover {
                why: failure.why.clone(),
                ..of(&failure.key, HandoverState::Failed)
            });
        }
        let done = self.runs.done.as_ref()?;
        let serving = self.runs.serving.as_ref().map(|run| run.process);
        Some(ProxyHandover {
            clients: serving.map_or(0, taken),
            took_us: done.took_ms.saturating_mul(1000),
            ..of(&done.key, HandoverState::Done)
        })
    }
}
