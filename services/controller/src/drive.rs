//! The leader's loop: looks at records and reports, lets the pure machines decide, and acts.
//!
//! One loop owns all acting, so no two acts of one leader race. It holds nothing that a successor
//! would need: what a phase has begun is in the records, what the world looks like is reported
//! anew. Steps run beside the loop; their answers wake it.

mod begin;
mod copied;
#[cfg(test)]
mod desk;
pub(crate) mod failover;
mod held_back;
mod housekeeping;
mod instance;
mod lost;
mod proxies;
pub(crate) mod replace;
mod switchover;
mod timing;
mod upgrade;
mod upgrade_auto;
pub(crate) mod write;

use std::{collections::HashMap, sync::Arc, time::Duration};

use slotmesh_task::{
    NodeView, Spec, State as TaskState, Task, detect::Sightings, schedule, switchover::StepStatus,
    upkeep,
};
use slotmesh_topology::{InstanceId, InstanceState, NodeId, ShardId, TaskId};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, error, info, info_span, warn};

use crate::{
    agents::Agents,
    clock,
    hub::Hub,
    jumps::Jumps,
    leader::Term,
    mirror::{Mirror, Versioned},
    store::{Store, StoreError},
};

/// The loop looks again after this time even when nothing changed.
const TICK: Duration = Duration::from_millis(250);
/// A new leader gives agents and proxies this long to report before it decides from reports.
const GRACE: Duration = Duration::from_secs(1);
/// Acts on one task in a row before the others get their turn.
const ACTS_MAX: usize = 16;
/// Answers of steps waiting for the loop; there are never more steps than shards in tasks.
const ANSWERS_MAX: usize = 1_024;
/// A leader that begins after a task's deadline gives its hosts this long to come back, so that a
/// machine that was off does not end its tasks by its clock alone.
const RETURN_MS: u64 = 15_000;
/// Between two looks before reports are in.
const GRACE_LOOK_MS: u64 = 50;
/// Between two tries when the store does not answer.
const STORE_PAUSE: Duration = Duration::from_millis(200);

/// Why the leader's loop ended or paused.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// Another controller leads.
    #[error("deposed")]
    Deposed,
    /// The store refused or did not answer; the act is tried again.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Which step an answer belongs to: the phase's, in this try of the phase.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct StepKey {
    task: TaskId,
    shard: ShardId,
    phase_since_ms: u64,
}

#[derive(Debug)]
struct Answer {
    key: StepKey,
    status: StepStatus,
    critical_us: u64,
    /// Of a hand-over: the agent's words about its parts.
    said: String,
    /// Of a promotion: the node after it.
    promoted: Option<NodeView>,
}

/// What one leader knows beyond the records; gone with its term.
#[derive(Debug)]
pub struct Driver {
    store: Arc<dyn Store>,
    mirror: Mirror,
    hub: Hub,
    agents: Agents,
    term: Term,
    /// This controller, for the records of epochs.
    who: String,
    steps: HashMap<StepKey, StepStatus>,
    /// Of switches under way, for the task's record.
    timings: HashMap<(TaskId, ShardId), timing::Timing>,
    /// From the fence to the change of roles, as the old primary's agent said.
    critical_us: HashMap<(TaskId, ShardId), u64>,
    /// Nodes as they were after their promotion.
    promoted: HashMap<StepKey, NodeView>,
    /// Since when something is seen gone.
    sightings: Sightings,
    /// For how long what upgrades say of time has been seen.
    watches: HashMap<(TaskId, ShardId), slotmesh_task::upgrade::Watch>,
    recorded: lost::Recorded,
    /// Shards for whose lost node there is no host, so that it is said once.
    unreplaced: std::collections::BTreeSet<(InstanceId, ShardId)>,
    answers: (mpsc::Sender<Answer>, mpsc::Receiver<Answer>),
    since_ms: u64,
    forget_at_ms: u64,
    jumps: Jumps,
    /// For so long windows do not count: the wall clock has jumped.
    rests_ms: u64,
    /// By so much it has jumped since the process began, as far as what is remembered takes it into account.
    jumped_ms: i64,
    by_themselves: upgrade_auto::Rounds,
}

impl Driver {
    /// A driver for one term.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        mirror: Mirror,
        hub: Hub,
        agents: Agents,
        term: Term,
        who: String,
    ) -> Self {
        let answers = mpsc::channel(ANSWERS_MAX);
        Self {
            store,
            mirror,
            hub,
            agents,
            term,
            who,
            steps: HashMap::new(),
            timings: HashMap::new(),
            critical_us: HashMap::new(),
            promoted: HashMap::new(),
            sightings: Sightings::default(),
            watches: HashMap::new(),
            recorded: lost::Recorded::default(),
            unreplaced: std::collections::BTreeSet::new(),
            answers,
            since_ms: clock::now_ms(),
            forget_at_ms: clock::now_ms() + housekeeping::INTERVAL_MS,
            jumps: Jumps::default(),
            rests_ms: 0,
            jumped_ms: 0,
            by_themselves: upgrade_auto::Rounds::default(),
        }
    }

    /// As many instances as that are given patches by themselves at a time; 0: none.
    #[must_use]
    pub fn upgrading_at_a_time(mut self, instances: usize) -> Self {
        self.by_themselves.at_a_time = instances;
        self
    }

    /// With what the process knows of its clock from before the term.
    #[must_use]
    pub fn watching(mut self, jumps: Jumps) -> Self {
        self.jumped_ms = jumps.jumped_ms();
        self.jumps = jumps;
        self
    }

    /// Acts until `stop` or until deposed.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut state = self.mirror.subscribe();
        let mut fleet = self.hub.subscribe();
        let grace_over = Instant::now() + GRACE;
        info!(term = %self.term, "acting as leader");
        self.compare_clock_with_records();
        loop {
            let wake_ms = tokio::select! {
                () = stop.cancelled() => return,
                turn = self.turn(Instant::now() >= grace_over) => match turn {
                    Ok(wake_ms) => wake_ms,
                    Err(DriveError::Deposed) => {
                        warn!(term = %self.term, "deposed: another controller leads");
                        return;
                    }
                    Err(DriveError::Store(error)) => {
                        warn!(%error, "the store holds the leader up");
                        clock::now_ms() + u64::try_from(STORE_PAUSE.as_millis()).unwrap_or(0)
                    }
                },
            };
            let pause = Duration::from_millis(wake_ms.saturating_sub(clock::now_ms())).min(TICK);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(answer) = self.answers.1.recv() => {
                    self.answered(answer);
                }
                changed = state.changed() => if changed.is_err() { return },
                changed = fleet.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
            while let Ok(answer) = self.answers.1.try_recv() {
                self.answered(answer);
            }
            state.mark_unchanged();
            fleet.mark_unchanged();
            self.hub.age();
        }
    }

    /// Lets every task and shard have its act; returns when to look again at the latest.
    async fn turn(&mut self, reports_are_in: bool) -> Result<u64, DriveError> {
        let mut wake_ms = u64::MAX;
        self.look_at_the_clock();
        if reports_are_in {
            wake_ms = self.detect().await?;
        }
        let open: Vec<TaskId> = self.mirror.read(|state| {
            state
                .tasks
                .values()
                .filter(|t| is_open(&t.value))
                .map(|t| t.value.id.clone())
                .collect()
        });
        for id in open {
            for _ in 0..ACTS_MAX {
                let Some(task) = self.mirror.read(|s| s.tasks.get(&id).cloned()) else {
                    break;
                };
                if !is_open(&task.value) {
                    break;
                }
                let span = info_span!("task", trace_id = task.value.trace_id);
                match self.act(&task, reports_are_in).instrument(span).await {
                    Ok(Next::Again) => {}
                    Ok(Next::At(at_ms)) => {
                        wake_ms = wake_ms.min(at_ms);
                        self.note_copied(&task).await?;
                        break;
                    }
                    // This write can't succeed; it must not keep others from theirs.
                    Err(DriveError::Store(
                        error @ (StoreError::TooLarge { .. } | StoreError::Invalid { .. }),
                    )) => {
                        error!(task = %id, %error, "the store refuses the task's next record");
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let is_open = |task: &TaskId| {
            self.mirror
                .read(|s| s.tasks.get(task).is_some_and(|t| is_open(&t.value)))
        };
        self.steps.retain(|key, _| is_open(&key.task));
        self.promoted.retain(|key, _| is_open(&key.task));
        self.timings.retain(|(task, _), _| is_open(task));
        self.watches.retain(|(task, _), _| is_open(task));
        self.critical_us.retain(|(task, _), _| is_open(task));
        if reports_are_in {
            self.keep_records_true().await?;
            self.let_go().await?;
            self.forget_gone_proxies().await?;
            self.replace_lost().await?;
            self.record_lost_writes().await?;
            self.upgrade_by_themselves().await?;
        }
        if clock::now_ms() >= self.forget_at_ms {
            // Before it is tried: what fails is not tried again at every turn.
            self.forget_at_ms = clock::now_ms() + housekeeping::INTERVAL_MS;
            self.forget_the_old().await?;
            self.forget_lost_writes().await?;
        }
        Ok(wake_ms)
    }

    fn answered(&mut self, answer: Answer) {
        if answer.critical_us > 0 {
            let shard = (answer.key.task.clone(), answer.key.shard.clone());
            // Another term's leader may have declared it: then that is all that is known.
            if let Some(timing) = self.timings.get_mut(&shard) {
                timing.answered(answer.said);
            }
            self.critical_us.insert(shard, answer.critical_us);
        }
        if let Some(promoted) = answer.promoted {
            self.promoted.insert(answer.key.clone(), promoted);
        }
        self.steps.insert(answer.key, answer.status);
    }

    async fn act(
        &mut self,
        task: &Versioned<Task>,
        reports_are_in: bool,
    ) -> Result<Next, DriveError> {
        if schedule::is_scheduled(&task.value)
            && let Spec::Switchover(switches) = &task.value.spec
        {
            return self.act_on_scheduled(task, switches).await;
        }
        if task.value.state == TaskState::Pending {
            let mut next = task.value.clone();
            next.state = TaskState::Running;
            return self
                .write_task(task, next, "", "Started", "the leader has taken it up")
                .await;
        }
        match &task.value.spec {
            Spec::Provision | Spec::Decommission => self.act_on_instance(task).await,
            Spec::Switchover(_) if !reports_are_in => Ok(Next::At(clock::now_ms() + GRACE_LOOK_MS)),
            Spec::Switchover(switches) => self.act_on_switches(task, switches).await,
            Spec::Failover(_) if !reports_are_in => Ok(Next::At(clock::now_ms() + GRACE_LOOK_MS)),
            Spec::Failover(spec) => self.act_on_failover(task, spec).await,
            Spec::Replace(_) if !reports_are_in => Ok(Next::At(clock::now_ms() + GRACE_LOOK_MS)),
            Spec::Replace(spec) => self.act_on_replacement(task, spec).await,
            Spec::Upgrade(_) if !reports_are_in => Ok(Next::At(clock::now_ms() + GRACE_LOOK_MS)),
            Spec::Upgrade(upgrade) => self.act_on_upgrade(task, upgrade).await,
            Spec::Proxies(_) if !reports_are_in => Ok(Next::At(clock::now_ms() + GRACE_LOOK_MS)),
            Spec::Proxies(changes) => self.act_on_proxies(task, changes).await,
        }
    }

    /// Run ids, addresses and who is in sync, for shards that serve.
    async fn keep_records_true(&mut self) -> Result<(), DriveError> {
        let serving = self.mirror.read(|state| {
            state
                .shards
                .values()
                .filter_map(|s| {
                    let instance = &state.instances.get(&s.value.instance)?.value;
                    let is_kept = instance.state != InstanceState::Deleting;
                    is_kept.then(|| (s.clone(), instance.durability))
                })
                .collect::<Vec<_>>()
        });
        for (shard, durability) in serving {
            let now_ms = clock::now_ms();
            let change = self
                .hub
                .read(|fleet| upkeep::decide(&shard.value, self.scene(fleet, durability, now_ms)));
            let Some((next, reason)) = change else {
                continue;
            };
            info!(instance = %next.instance, shard = %next.id, epoch = %next.epoch, %reason, "record follows");
            self.write_upkeep(&shard, &next).await?;
        }
        Ok(())
    }

    fn address_of(&self, shard: &slotmesh_topology::Shard, node: &NodeId) -> Option<String> {
        shard
            .member(node)
            .and_then(|m| self.hub.agent_address(&m.host))
    }
}

/// A task that the loop has something to do for: one that waits for an operator may be told.
fn is_open(task: &Task) -> bool {
    !task.state.is_ended() || task.is_parked()
}

/// What follows an act.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Look at the same task again at once.
    Again,
    /// Nothing more now; look again at this time at the latest.
    At(u64),
}
