//! Detects lost primaries and replaces them, as the real driver does: the real detection and the
//! real machine decide, here their decisions become writes and steps.
//!
//! Invariant: a declaration takes the shard's lock, ends whatever had it, and begins the next epoch,
//! all in one transaction.

use slotmesh_task::{
    FailoverPhase, NodeView, ShardFailover, Task,
    detect::{self, Loss, Scene, Verdict},
    failover::{self, Decision, View, Write},
    step,
    switchover::StepStatus,
};
use slotmesh_topology::{FenceProof, HostId, Mode, Shard, TaskId};

use super::{ANSWER_MARGIN, Driver, StepKey, ask};
use crate::{
    controller::{
        Versioned,
        write::{Next, Writer, Wrote},
    },
    fiber::Fiber,
    msg::Party,
    sched::{MS, Micros},
    store::{Compare, Key, Value},
    variant::Variant,
};

impl Driver {
    /// Notes what is seen now; before each round of decisions.
    pub(super) fn look(&mut self) {
        let shards: Vec<Shard> = self.shards().into_iter().map(|s| s.value).collect();
        let fleet = self.desk.fleet.borrow();
        let now_ms = self.desk.now_ms();
        self.sightings.look(&shards, &fleet, now_ms);
    }

    fn shards(&self) -> Vec<Versioned<Shard>> {
        let mirror = self.desk.mirror.borrow();
        mirror.shards.values().cloned().collect()
    }

    /// Declares every primary lost that is; returns when to look again at the latest.
    pub(super) async fn detect(&mut self) -> Result<u64, Wrote> {
        let mut wake_ms = u64::MAX;
        if self.desk.mirror.borrow().is_deleting {
            return Ok(wake_ms);
        }
        for shard in self.shards() {
            let verdict = {
                let fleet = self.desk.fleet.borrow();
                detect::decide(&shard.value, self.scene(&fleet))
            };
            match verdict {
                Verdict::Fine => {}
                Verdict::Suspect { until_ms, .. } => wake_ms = wake_ms.min(until_ms),
                Verdict::Lost(loss) => {
                    let _ = self.declare(&shard, &loss).await?;
                    wake_ms = self.desk.now_ms();
                }
            }
        }
        Ok(wake_ms)
    }

    pub(super) fn scene<'a>(&'a self, fleet: &'a slotmesh_task::Fleet) -> Scene<'a> {
        Scene {
            fleet,
            sightings: &self.sightings,
            durability: self.desk.instance.durability,
            now_ms: self.desk.now_ms(),
        }
    }

    /// Why the primary of a shard whose switchover is under way is lost, if it is.
    pub(super) fn lost(&self, shard: &Shard) -> Option<Loss> {
        shard.handover()?;
        let fleet = self.desk.fleet.borrow();
        match detect::judge(shard, self.scene(&fleet)) {
            Verdict::Lost(loss) => Some(loss),
            _ => None,
        }
    }

    /// The lost epoch is over, and a task sees to the next one's primary.
    pub(super) async fn declare(
        &self,
        shard: &Versioned<Shard>,
        loss: &Loss,
    ) -> Result<Next, Wrote> {
        let index = shard.value.index as usize;
        let now_ms = self.desk.now_ms();
        let number = self.desk.world.borrow_mut().call();
        let id = TaskId::from(format!("f{number}").as_str());
        let owner = self.desk.mirror.borrow().owners.get(&index).cloned();
        let Some(primary) = shard.value.primary_member().cloned() else {
            return Ok(Next::At(u64::MAX));
        };
        let Ok((task, next)) = failover::declare(id.clone(), &shard.value, loss, now_ms) else {
            return Ok(Next::At(u64::MAX));
        };
        let mut txn = Writer::with_shard(self.write.leader_txn(), shard, &next);
        let lock = Key::Lock(index);
        match owner {
            None => txn.compares.push(Compare::Absent(lock.clone())),
            Some((owner, revision)) => {
                txn.compares
                    .push(Compare::Unchanged(lock.clone(), revision));
                let old = self.desk.mirror.borrow().tasks.get(&owner).cloned();
                let Some(old) = old else {
                    return Ok(Next::At(now_ms + 100));
                };
                let ended = failover::supersede(&old.value, &next.id, &id, now_ms);
                let Some(ended) = ended else {
                    return Ok(Next::At(u64::MAX));
                };
                txn = self.write.with_task(txn, &old, ended);
            }
        }
        if loss.proof == Some(FenceProof::Lease) && !self.is(Variant::LeaseNotCompared) {
            txn.compares.push(Compare::Absent(host_key(&primary.host)));
        }
        txn.puts.push((lock, Value::Lock(id.to_string())));
        txn.puts.push((
            Key::Audit(index, next.epoch.0),
            Value::Audit(loss.cause.clone()),
        ));
        self.write.new_task(&mut txn, &task);
        self.desk
            .world
            .borrow_mut()
            .say(|| format!("{:?}: shard {index} is lost: {}", self.desk.me, loss.cause));
        self.write.commit(txn).await
    }

    fn is(&self, variant: Variant) -> bool {
        self.desk.world.borrow().variant == variant
    }

    /// The next act of a failover.
    pub(super) async fn act_on_failover(
        &mut self,
        task: &Versioned<Task>,
        lost: &ShardFailover,
    ) -> Result<Next, Wrote> {
        let index = lost.shard.as_str().parse().unwrap_or(0);
        let Some(shard) = self.desk.mirror.borrow().shards.get(&index).cloned() else {
            return Ok(Next::At(u64::MAX));
        };
        let key: StepKey = (task.value.id.to_string(), index, lost.phase_since_ms);
        let (step, _) = self.steps.borrow().get(&key).cloned().unwrap_or_default();
        let promoted = self.promoted.borrow().get(&key).cloned();
        let (decision, write) = {
            let fleet = self.desk.fleet.borrow();
            let view = View {
                task: &task.value,
                failover: lost,
                shard: &shard.value,
                scene: self.scene(&fleet),
                step: &step,
                promoted: promoted.as_ref(),
            };
            let decision = self.broken(failover::decide(view), lost, &shard.value, &fleet);
            let write = failover::write(view, &decision);
            (decision, write)
        };
        if !matches!(decision, Decision::Wait { .. }) {
            let mut ctx = self.desk.world.borrow_mut();
            ctx.say(|| {
                let phase = lost.phase.name();
                format!("{:?}: shard {index} {phase}: {decision:?}", self.desk.me)
            });
        }
        match (decision, write) {
            (Decision::Wait { until_ms, .. }, _) => Ok(Next::At(until_ms)),
            (Decision::Stop, _) => Err(Wrote::Deposed),
            (Decision::Promote, _) => {
                self.start_promotion(key, task, lost, &shard.value);
                Ok(Next::At(u64::MAX))
            }
            (Decision::End(_), Ok(Some(write))) => {
                self.write.end_failover(task, write.task, &shard).await
            }
            (decision, Ok(Some(write))) => {
                self.write_failover(&decision, task, write, &shard).await
            }
            (_, Ok(None) | Err(_)) => Ok(Next::At(u64::MAX)),
        }
    }

    async fn write_failover(
        &self,
        decision: &Decision,
        task: &Versioned<Task>,
        write: Write,
        shard: &Versioned<Shard>,
    ) -> Result<Next, Wrote> {
        let mut txn = (self.write).with_task(self.write.leader_txn(), task, write.task);
        let by_lease = *decision == Decision::Prove(FenceProof::Lease);
        if by_lease
            && !self.is(Variant::LeaseNotCompared)
            && let Some(primary) = shard.value.primary_member()
        {
            txn.compares.push(Compare::Absent(host_key(&primary.host)));
        }
        if let Some(next) = &write.shard {
            txn = Writer::with_shard(txn, shard, next);
        }
        self.write.commit(txn).await
    }

    fn start_promotion(
        &mut self,
        key: StepKey,
        task: &Versioned<Task>,
        lost: &ShardFailover,
        shard: &Shard,
    ) {
        let Some((node, request)) = step::promotion(&task.value, lost, shard, self.term) else {
            return;
        };
        let running = (StepStatus::Running, 0);
        self.steps.borrow_mut().insert(key.clone(), running);
        let host = shard.member(&node).and_then(|m| host_index(&m.host));
        let known = host.filter(|h| self.desk.agents.borrow().contains_key(h));
        let (desk, steps, term) = (self.desk.clone(), self.steps.clone(), self.term);
        let (promoted, limit) = (
            self.promoted.clone(),
            Micros::from(request.timeout_ms) * MS + ANSWER_MARGIN,
        );
        let mut call = Fiber::new(async move {
            let answer = match known {
                Some(host) => ask(&desk, Party::Agent(host), request, limit).await,
                None => None,
            };
            let status = match &answer {
                Some(answer) => step::status_of(answer, term),
                None => StepStatus::Uncertain("no answer".into()),
            };
            if let Some(node) = answer.and_then(|a| a.node) {
                let view: NodeView = slotmesh_task::wire::node_view(&node, desk.now_ms());
                promoted.borrow_mut().insert(key.clone(), view);
            }
            steps.borrow_mut().insert(key, (status, 0));
        });
        if !call.poll() {
            self.calls.push(call);
        }
    }

    /// What a deliberately broken machine would decide instead.
    fn broken(
        &self,
        decision: Decision,
        lost: &ShardFailover,
        shard: &Shard,
        fleet: &slotmesh_task::Fleet,
    ) -> Decision {
        match (decision, self.desk.world.borrow().variant) {
            (Decision::Wait { .. }, Variant::NoProof) if lost.phase == FailoverPhase::Fence => {
                Decision::Prove(FenceProof::Exited)
            }
            (Decision::Choose { node, why, .. }, Variant::NotHighest) => {
                let mut others = shard.members.iter().filter(|m| m.node != lost.from);
                let behind = others.find(|m| m.node != node && !m.run_id.is_empty());
                let member = behind.or_else(|| shard.member(&node));
                let (node, run_id) = member
                    .map(|m| (m.node.clone(), m.run_id.clone()))
                    .unwrap_or_default();
                Decision::Choose { node, run_id, why }
            }
            (decision, Variant::AnyProcess) if is_choice(&decision, lost) => {
                let others = shard.members.iter().filter(|m| m.node != lost.from);
                let mut restarted = others.filter_map(|m| {
                    let seen = fleet.node(&m.node)?;
                    let other = !seen.run_id.is_empty() && seen.run_id != m.run_id;
                    other.then(|| (m.node.clone(), seen.run_id.clone()))
                });
                // Where nobody was started again it is as good as the real one.
                restarted.next().map_or(decision, |(node, run_id)| {
                    let why = String::new();
                    Decision::Choose { node, run_id, why }
                })
            }
            (decision, _) => decision,
        }
    }
}

/// Whether it is the moment at which somebody is chosen.
fn is_choice(decision: &Decision, lost: &ShardFailover) -> bool {
    lost.phase == FailoverPhase::Choose
        && matches!(decision, Decision::Wait { .. } | Decision::Choose { .. })
}

pub(super) fn host_index(host: &HostId) -> Option<usize> {
    host.as_str().strip_prefix('h')?.parse().ok()
}

fn host_key(host: &HostId) -> Key {
    Key::Host(host_index(host).unwrap_or(usize::MAX))
}

/// Broken on purpose: whoever has no link is behind, also when its primary is dead.
pub(super) fn forgetting(shard: &Shard, fleet: &slotmesh_task::Fleet) -> Option<Shard> {
    let mut next = shard.clone();
    for member in next.members.iter_mut().filter(|m| m.node != shard.primary) {
        member.in_sync &= fleet.node(&member.node).is_none_or(|seen| seen.link_up);
    }
    (shard.mode == Mode::Serving && next != *shard).then_some(next)
}
