//! Tries an engine beside a node: with the node's configuration and a copy of its data, in a
//! directory of its own, reachable by a socket there and nowhere else.
//!
//! Asked level by level: the first call begins a trial, each further one says how far it is. It is not
//! in the journal; an agent that starts removes what trials of before have left. Invariant: a trial
//! writes to its own directory only, has a bound in time, memory and disk, and has ended with all of
//! its files before anybody is told its outcome.

mod copy;
mod run;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::Signal;
use slotmesh_proto::agent::v1::{
    ExecuteStepRequest, ExecuteStepResponse, StageEngine, Staged, StepOutcome,
};
use tokio::{sync::Semaphore, task::JoinHandle, time::timeout};

use crate::{executor::response, host::Host, node::files::NodeDir, process::Process};

/// Where nobody says: gigabytes are loaded in it.
const LIMIT_DEFAULT: Duration = Duration::from_secs(600);
/// However much is asked for: an operator waits for it.
const LIMIT_MAX: Duration = Duration::from_secs(4 * 3600);
/// Its configuration, as the engine is started with it.
const CONFIG: &str = "redis.conf";

/// The trials of one host.
#[derive(Debug)]
pub struct Trials {
    root: PathBuf,
    /// By node: those that exist, so it is bounded.
    trials: Mutex<BTreeMap<String, Trial>>,
    /// Each holds a copy of a node's data in memory: one at a time.
    turn: Arc<Semaphore>,
}

/// Which one: another attempt is another trial.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    task_id: String,
    step: String,
    attempt: u32,
    engine: String,
}

#[derive(Debug)]
struct Trial {
    key: Key,
    progress: Progress,
    task: JoinHandle<()>,
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How far a trial is, told by its task.
#[derive(Debug, Clone, Default)]
struct Progress(Arc<Mutex<Told>>);

#[derive(Debug, Clone, Default)]
struct Told {
    staged: Staged,
    outcome: Option<Result<(), String>>,
}

impl Progress {
    fn tell(&self, change: impl FnOnce(&mut Staged)) {
        change(&mut self.lock().staged);
    }

    fn phase(&self, phase: &str) {
        self.tell(|staged| phase.clone_into(&mut staged.phase));
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Trials {
    /// Over the directory beside those of the nodes; removes what a former life has left there.
    pub fn new(nodes_dir: &Path) -> Self {
        let root = nodes_dir.with_file_name("trials");
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            clear(&entry.path());
        }
        Self {
            root,
            trials: Mutex::default(),
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// Begins the trial that is asked for, or says how far it is.
    pub fn ask(
        &self,
        host: &Arc<Host>,
        request: &ExecuteStepRequest,
        order: &StageEngine,
    ) -> ExecuteStepResponse {
        if !NodeDir::locate(&host.nodes_dir, &order.node_id).exists() {
            return response(StepOutcome::NoEffect, "the node is not on this host");
        }
        let key = Key {
            task_id: request.task_id.clone(),
            step: request.step.clone(),
            attempt: request.attempt,
            engine: order.engine.clone(),
        };
        let mut trials = self.trials.lock().unwrap_or_else(PoisonError::into_inner);
        let found = trials.get(&order.node_id).filter(|t| t.key == key);
        let told = match found {
            Some(trial) => trial.progress.lock().clone(),
            None => {
                let trial = self.begin(host.clone(), key, order.clone());
                let told = trial.progress.lock().clone();
                // One that was asked for before ends here.
                trials.insert(order.node_id.clone(), trial);
                told
            }
        };
        answer(told)
    }

    fn begin(&self, host: Arc<Host>, key: Key, order: StageEngine) -> Trial {
        let progress = Progress::default();
        progress.tell(|staged| staged.under_way = true);
        let (turn, told) = (self.turn.clone(), progress.clone());
        let dir = self.root.join(&order.node_id);
        let limit = match order.limit_ms {
            0 => LIMIT_DEFAULT,
            ms => Duration::from_millis(ms.into()).min(LIMIT_MAX),
        };
        let task = tokio::spawn(async move {
            let work = run::run(&host, &order, &dir, &turn, &told);
            let outcome = timeout(limit, work).await.unwrap_or_else(|_| {
                let phase = told.lock().staged.phase.clone();
                Err(format!(
                    "not ready after {} s; it was at: {phase}",
                    limit.as_secs()
                ))
            });
            match &outcome {
                Ok(()) => {
                    tracing::info!(node = %order.node_id, engine = %order.engine, "engine tried, it is good");
                }
                Err(why) => {
                    tracing::warn!(node = %order.node_id, engine = %order.engine, why, "engine tried in vain");
                }
            }
            let mut told = told.lock();
            told.staged.under_way = false;
            told.outcome = Some(outcome);
        });
        Trial {
            key,
            progress,
            task,
        }
    }
}

fn answer(told: Told) -> ExecuteStepResponse {
    let mut answer = match &told.outcome {
        Some(Err(why)) => response(StepOutcome::NoEffect, why),
        Some(Ok(())) | None => response(StepOutcome::Done, ""),
    };
    answer.staged = Some(told.staged);
    answer
}

/// A trial's directory, gone with everything in it when this is dropped.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        clear(&self.0);
    }
}

/// Ends what runs in a trial's directory, and removes it.
fn clear(dir: &Path) {
    let marks = [dir.join(CONFIG).display().to_string()];
    if let Some(process) = Process::find_in(dir, &marks) {
        process.signal(Signal::KILL);
    }
    if let Ok(socket) = super::files::socket_path(dir) {
        let _ = fs::remove_file(socket);
    }
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(dir = %dir.display(), %error, "files of a trial not removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_former_life_has_left_is_removed() {
        let data = tempfile::tempdir().unwrap();
        let left = data.path().join("trials").join("n-1");
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join("dump.rdb"), "x").unwrap();
        let nodes = data.path().join("nodes");
        Trials::new(&nodes);
        assert!(!left.exists());
    }

    #[test]
    fn only_a_trial_that_failed_is_said_to_have_had_no_effect() {
        let told = |outcome| Told {
            outcome,
            ..Told::default()
        };
        assert_eq!(answer(told(None)).outcome(), StepOutcome::Done);
        assert_eq!(answer(told(Some(Ok(())))).outcome(), StepOutcome::Done);
        let failed = answer(told(Some(Err("why".into()))));
        assert_eq!(failed.outcome(), StepOutcome::NoEffect);
        assert_eq!(failed.message, "why");
    }
}
