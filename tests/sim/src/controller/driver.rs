//! The leader's loop, as the real driver has it: records and reports in, the real machines decide,
//! one act at a time.
//!
//! Invariant: it holds nothing that a successor would need.

mod failover;
pub(super) mod replace;
mod upgrade;

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use slotmesh_proto::agent::v1::{self as pb, execute_step_request::Act};
use slotmesh_task::{
    NodeView, Phase, ShardSwitch, Spec, State as TaskState, Task, detect,
    failover::is_parked,
    provision, step,
    switchover::{self, Decision, HANDOVER_MS_MAX, HOLD_MS_MAX, Step, StepStatus, View},
    upkeep,
};
use slotmesh_topology::{
    Handover, Instance, InstanceState, Shard,
    credential::{self, Credential},
};

use super::{
    Desk, Versioned,
    write::{Next, Writer, Wrote},
};
use crate::{
    fiber::{Fiber, sleep, wait_until},
    msg::{Party, Rpc},
    sched::{MS, Micros, SEC},
    variant::Variant,
};

const TICK: Micros = 250 * MS;
/// A new leader gives agents and proxies this long to report.
const GRACE: Micros = SEC;
const ACTS_MAX: usize = 16;
const STORE_PAUSE: Micros = 200 * MS;
const ANSWER_MARGIN: Micros = 500 * MS;
const RETRY_PAUSE: Micros = 300 * MS;

/// Which step an answer belongs to.
type StepKey = (String, usize, u64);

struct Driver {
    desk: Rc<Desk>,
    write: Writer,
    term: u64,
    steps: Rc<RefCell<BTreeMap<StepKey, (StepStatus, u64)>>>,
    calls: Vec<Fiber>,
    /// What this leader has seen vanish, and when.
    sightings: detect::Sightings,
    /// For how long it has seen what upgrades say of time.
    watches: BTreeMap<(String, usize), slotmesh_task::upgrade::Watch>,
    /// Nodes as their agents saw them after they were promoted.
    promoted: Rc<RefCell<BTreeMap<StepKey, NodeView>>>,
}

/// Acts until deposed.
pub(super) async fn run(desk: Rc<Desk>, term: u64) {
    let write = Writer {
        desk: Rc::clone(&desk),
        term,
    };
    let mut driver = Driver {
        desk: Rc::clone(&desk),
        write,
        term,
        steps: Rc::default(),
        calls: Vec::new(),
        sightings: detect::Sightings::default(),
        watches: BTreeMap::new(),
        promoted: Rc::default(),
    };
    let begun = desk.world.borrow().now();
    loop {
        let now = desk.world.borrow().now();
        let news = *desk.news.borrow();
        let wake_ms = match driver.turn(now >= begun + GRACE).await {
            Ok(wake_ms) => wake_ms,
            Err(Wrote::Deposed) => return,
            Err(_) => desk.now_ms() + STORE_PAUSE / MS,
        };
        let pause = wake_ms
            .saturating_sub(desk.now_ms())
            .saturating_mul(MS)
            .min(TICK);
        let mut calls = std::mem::take(&mut driver.calls);
        // Steps run beside the loop; their answers wake it.
        let calls_cell = RefCell::new(&mut calls);
        wait_until(&desk.world, desk.me, pause.max(MS), || {
            let mut ended = false;
            calls_cell.borrow_mut().retain_mut(|call| {
                let done = call.poll();
                ended |= done;
                !done
            });
            ended || *desk.news.borrow() != news
        })
        .await;
        driver.calls.append(&mut calls);
    }
}

impl Driver {
    async fn turn(&mut self, reports_are_in: bool) -> Result<u64, Wrote> {
        let mut wake_ms = u64::MAX;
        if reports_are_in {
            self.look();
            wake_ms = self.detect().await?;
        }
        let open: Vec<String> = (self.desk.mirror.borrow().tasks.iter())
            .filter(|(_, t)| is_open(&t.value))
            .map(|(id, _)| id.clone())
            .collect();
        for id in open {
            for _ in 0..ACTS_MAX {
                let Some(task) = self.desk.mirror.borrow().tasks.get(&id).cloned() else {
                    break;
                };
                if !is_open(&task.value) {
                    break;
                }
                match self.act(&task, reports_are_in).await? {
                    Next::Again => {}
                    Next::At(at_ms) => {
                        wake_ms = wake_ms.min(at_ms);
                        break;
                    }
                }
            }
        }
        if reports_are_in {
            self.keep_records_true().await?;
            self.replace_lost().await?;
        }
        Ok(wake_ms)
    }

    async fn act(&mut self, task: &Versioned<Task>, reports_are_in: bool) -> Result<Next, Wrote> {
        if task.value.state == TaskState::Pending {
            let next = Task {
                state: TaskState::Running,
                ..task.value.clone()
            };
            return self.write.task(task, next).await;
        }
        match &task.value.spec {
            Spec::Provision => self.provision(task).await,
            Spec::Decommission => self.decommission(task).await,
            Spec::Switchover(_) if !reports_are_in => Ok(Next::At(self.desk.now_ms() + 50)),
            Spec::Switchover(switches) => self.act_on_switches(task, switches).await,
            Spec::Failover(_) if !reports_are_in => Ok(Next::At(self.desk.now_ms() + 50)),
            Spec::Failover(lost) => self.act_on_failover(task, lost).await,
            Spec::Replace(_) if !reports_are_in => Ok(Next::At(self.desk.now_ms() + 50)),
            Spec::Replace(spec) => self.act_on_replacement(task, spec).await,
            Spec::Upgrade(_) if !reports_are_in => Ok(Next::At(self.desk.now_ms() + 50)),
            Spec::Upgrade(spec) => self.act_on_upgrade(task, spec).await,
            // Nobody asks for one here.
            Spec::Proxies(_) => Ok(Next::At(u64::MAX)),
        }
    }

    async fn provision(&mut self, task: &Versioned<Task>) -> Result<Next, Wrote> {
        let shards: Vec<_> = self.desk.mirror.borrow().shards.values().cloned().collect();
        let plain: Vec<Shard> = shards.iter().map(|s| s.value.clone()).collect();
        let decision = provision::provision(
            &self.desk.instance,
            &plain,
            &self.desk.fleet.borrow(),
            task.value.deadline_ms,
            self.desk.now_ms(),
        );
        match decision {
            provision::Decision::Begin(shard) => {
                let old = shards.iter().find(|s| s.value.id == shard.id);
                match old {
                    Some(old) => self.write.shard(old, &shard).await,
                    None => Ok(Next::Again),
                }
            }
            provision::Decision::Serve => {
                let next = Task {
                    state: TaskState::Done,
                    ..task.value.clone()
                };
                self.write.task(task, next).await
            }
            provision::Decision::Wait(_)
            | provision::Decision::Forget
            | provision::Decision::GiveUp(_) => Ok(Next::At(task.value.deadline_ms)),
        }
    }

    async fn decommission(&mut self, task: &Versioned<Task>) -> Result<Next, Wrote> {
        let shards: Vec<_> = self.desk.mirror.borrow().shards.values().cloned().collect();
        let plain: Vec<Shard> = shards.iter().map(|s| s.value.clone()).collect();
        let instance = Instance {
            state: InstanceState::Deleting,
            ..(*self.desk.instance).clone()
        };
        let decision = provision::decommission(
            &instance,
            &plain,
            &self.desk.fleet.borrow(),
            task.value.deadline_ms,
            self.desk.now_ms(),
        );
        match decision {
            provision::Decision::Forget => self.write.end_decommission(task, &shards).await,
            provision::Decision::GiveUp(what) => {
                let next = Task {
                    state: TaskState::NeedsOperator,
                    message: what,
                    ..task.value.clone()
                };
                self.write.task(task, next).await
            }
            provision::Decision::Wait(_)
            | provision::Decision::Begin(_)
            | provision::Decision::Serve => Ok(Next::At(task.value.deadline_ms)),
        }
    }

    fn upkeep(&self, shard: &Shard) -> Option<(Shard, String)> {
        let fleet = self.desk.fleet.borrow();
        let forgets = self.desk.world.borrow().variant == Variant::ForgetsReplicas;
        if forgets && let Some(next) = failover::forgetting(shard, &fleet) {
            return Some((next, "forgotten".into()));
        }
        upkeep::decide(shard, self.scene(&fleet))
    }

    async fn keep_records_true(&mut self) -> Result<(), Wrote> {
        if self.desk.mirror.borrow().is_deleting {
            return Ok(());
        }
        let shards: Vec<_> = self.desk.mirror.borrow().shards.values().cloned().collect();
        for shard in shards {
            let change = self.upkeep(&shard.value);
            if let Some((next, reason)) = change {
                self.desk
                    .world
                    .borrow_mut()
                    .say(|| format!("upkeep: {reason}"));
                self.write.shard(&shard, &next).await?;
            }
        }
        Ok(())
    }

    async fn act_on_switches(
        &mut self,
        task: &Versioned<Task>,
        switches: &[ShardSwitch],
    ) -> Result<Next, Wrote> {
        let mut wake_ms = u64::MAX;
        for (index, switch) in switches.iter().enumerate() {
            if switch.phase.is_ended() {
                continue;
            }
            let other_in_hold = switches.iter().any(|other| {
                other.shard != switch.shard && matches!(other.phase, Phase::Hold | Phase::Resolve)
            });
            let other_before = switches[..index].iter().any(|o| o.phase == Phase::Prewarm);
            match self
                .act_on_switch(task, switch, other_in_hold || other_before)
                .await?
            {
                Next::Again => return Ok(Next::Again),
                Next::At(at_ms) => wake_ms = wake_ms.min(at_ms),
            }
        }
        if switches.iter().all(|s| s.phase.is_ended()) {
            return self.write.end(task, switches).await;
        }
        Ok(Next::At(wake_ms))
    }

    async fn act_on_switch(
        &mut self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        other_in_hold: bool,
    ) -> Result<Next, Wrote> {
        let index = switch.shard.as_str().parse().unwrap_or(0);
        let Some(shard) = self.desk.mirror.borrow().shards.get(&index).cloned() else {
            return Ok(Next::At(u64::MAX));
        };
        let key = step_key(task, index, switch);
        let (step, critical_us) = self.steps.borrow().get(&key).cloned().unwrap_or_default();
        let lost = self.lost(&shard.value);
        let decision = switchover::decide(View {
            task: &task.value.id,
            switch,
            shard: &shard.value,
            fleet: &self.desk.fleet.borrow(),
            step: &step,
            lost: lost.as_ref(),
            cancel_requested: upgrade::is_cancelled(&task.value, switch),
            other_in_hold,
            now_ms: self.desk.now_ms(),
        });
        if !matches!(decision, Decision::Wait { .. }) {
            let mut ctx = self.desk.world.borrow_mut();
            ctx.say(|| {
                format!(
                    "{:?}: shard {index} {}: {decision:?}",
                    self.desk.me,
                    switch.phase.name()
                )
            });
        }
        if let Decision::Run(step) = decision {
            self.start_step(key, task, switch, &shard.value, step);
            return Ok(Next::At(u64::MAX));
        }
        self.carry_out(decision, task, switch, &shard, critical_us)
            .await
    }

    /// Turns a decision into a write.
    async fn carry_out(
        &self,
        decision: Decision,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        shard: &Versioned<Shard>,
        critical_us: u64,
    ) -> Result<Next, Wrote> {
        let phase = |phase, why: &str| self.with_phase(task, switch, phase, why, critical_us);
        match decision {
            Decision::Wait { until_ms, .. } => Ok(Next::At(until_ms)),
            Decision::Stop => Err(Wrote::Deposed),
            Decision::Run(_) => Ok(Next::Again),
            Decision::Advance(next, why) => self.write.task(task, phase(next, &why)).await,
            Decision::Declare => match shard.value.declare(self.handover(task, switch)) {
                Ok(next) => {
                    self.write
                        .both(task, phase(Phase::Hold, ""), shard, &next)
                        .await
                }
                Err(why) => {
                    self.write
                        .task(task, phase(Phase::RolledBack, &why.to_string()))
                        .await
                }
            },
            Decision::Commit => {
                let token = shard
                    .value
                    .handover()
                    .map(|h| h.token.clone())
                    .unwrap_or_default();
                match shard.value.commit(switch.from_epoch, &token) {
                    Ok(next) => {
                        self.write
                            .both(task, phase(Phase::Settle, ""), shard, &next)
                            .await
                    }
                    Err(why) => {
                        self.write
                            .task(task, phase(Phase::Resolve, &why.to_string()))
                            .await
                    }
                }
            }
            Decision::GiveBack(why) => match shard.value.cancel(&task.value.id) {
                Ok(next) => {
                    self.write
                        .both(task, phase(Phase::RolledBack, &why), shard, &next)
                        .await
                }
                Err(why) => {
                    self.write
                        .task(task, phase(Phase::RolledBack, &why.to_string()))
                        .await
                }
            },
            Decision::FailOver(loss) => self.declare(shard, &loss).await,
            Decision::Close(note) => {
                let next = shard.value.close();
                self.write
                    .both(task, phase(Phase::Done, &note), shard, &next)
                    .await
            }
        }
    }

    fn handover(&self, task: &Versioned<Task>, switch: &ShardSwitch) -> Handover {
        let number = self.desk.world.borrow_mut().call();
        Handover {
            task: task.value.id.clone(),
            target: switch.to.clone(),
            token: format!("token{number}"),
            deadline_unix_ms: self.desk.now_ms() + HANDOVER_MS_MAX,
            max_hold_ms: HOLD_MS_MAX,
        }
    }

    fn with_phase(
        &self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        phase: Phase,
        message: &str,
        critical_us: u64,
    ) -> Task {
        let now_ms = self.desk.now_ms();
        let mut next = task.value.with_phase(&switch.shard, phase, message, now_ms);
        next.edit_switch(&switch.shard, |s| {
            s.critical_us = s.critical_us.max(critical_us)
        });
        next
    }

    fn start_step(
        &mut self,
        key: StepKey,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        shard: &Shard,
        step: Step,
    ) {
        let instance = &self.desk.instance;
        let now_ms = self.desk.now_ms();
        let mut request = step::request(
            &task.value,
            switch,
            instance,
            shard,
            step,
            self.term,
            now_ms,
        );
        if self.desk.world.borrow().variant == Variant::GrantBeforeCommit
            && let Some(act) = &mut request.act
        {
            grant_too_early(act, instance, shard, switch);
        }
        let (node, timeout_ms) = (step.node(switch), request.timeout_ms);
        self.steps
            .borrow_mut()
            .insert(key.clone(), (StepStatus::Running, 0));
        let host = shard
            .member(node)
            .and_then(|m| m.host.as_str()[1..].parse::<usize>().ok());
        let known = host.filter(|h| self.desk.agents.borrow().contains_key(h));
        let (desk, steps, term) = (Rc::clone(&self.desk), Rc::clone(&self.steps), self.term);
        let limit = Micros::from(timeout_ms) * MS + ANSWER_MARGIN;
        let mut call = Fiber::new(async move {
            let answer = match known {
                Some(host) => ask(&desk, Party::Agent(host), request, limit).await,
                None => None,
            };
            let status = match &answer {
                Some(answer) => step::status_of(answer, term),
                None => StepStatus::Uncertain("no answer".into()),
            };
            if step == Step::TakeBack && !matches!(status, StepStatus::Done { .. }) {
                sleep(&desk.world, desk.me, RETRY_PAUSE).await;
            }
            let critical_us = answer.map_or(0, |a| a.critical_us);
            steps.borrow_mut().insert(key, (status, critical_us));
        });
        if !call.poll() {
            self.calls.push(call);
        }
    }
}

/// A task that the loop has something to do for: one that waits for an operator may be told.
fn is_open(task: &Task) -> bool {
    let waits = matches!(task.spec, Spec::Replace(_) | Spec::Upgrade(_)) && task.is_parked();
    !task.state.is_ended() || is_parked(task) || waits
}

async fn ask(
    desk: &Desk,
    agent: Party,
    request: pb::ExecuteStepRequest,
    limit: Micros,
) -> Option<pb::ExecuteStepResponse> {
    let call = {
        let mut ctx = desk.world.borrow_mut();
        let call = ctx.call();
        ctx.rpc(
            desk.me,
            agent,
            Rpc::Step {
                call,
                request: Box::new(request),
            },
        );
        call
    };
    desk.steps.get(&desk.world, desk.me, call, limit).await
}

fn step_key(task: &Versioned<Task>, index: usize, switch: &ShardSwitch) -> StepKey {
    (task.value.id.to_string(), index, switch.phase_since_ms)
}

fn grant_too_early(act: &mut Act, instance: &Instance, shard: &Shard, switch: &ShardSwitch) {
    if let Act::EnsureUsers(ensure) = act {
        let epoch = switch.from_epoch.next();
        let Credential { user, password } = credential::proxy(&instance.secret, &shard.id, epoch);
        let epoch = epoch.0;
        ensure.users.push(pb::EpochUser {
            name: user,
            password,
            epoch,
            replication: false,
        });
    }
}
