//! The leader's writes: each compares what it was decided from, and the leader's term.
//!
//! Invariant: an answer that did not come is treated as "it may have happened".

use std::rc::Rc;

use slotmesh_task::{
    Choice, ShardSwitch, Spec, State as TaskState, Task, admit, provision::DECOMMISSION_MS_MAX,
    replace, schedule, wire,
};
use slotmesh_topology::{NodeRole, Shard, TaskId};

use super::{Ask, Desk, Versioned, change};
/// An operator's patience with a switchover.
const SWITCHOVER_MS_MAX: u64 = 60_000;

use crate::{
    store::{Compare, Key, StoreReply, StoreRequest, Txn, Value},
    variant::Variant,
};

/// What follows an act.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Look at the same task again at once.
    Again,
    /// Nothing more now.
    At(u64),
}

/// Why nothing follows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wrote {
    /// Another controller leads.
    Deposed,
    /// The store did not answer, or the mirror does not show it.
    Unavailable,
}

pub(super) struct Writer {
    pub(super) desk: Rc<Desk>,
    pub(super) term: u64,
}

impl Writer {
    pub(super) fn leader_txn(&self) -> Txn {
        let compares = match self.desk.world.borrow().variant {
            Variant::DeposedLeaderWrites => Vec::new(),
            _ => vec![Compare::Term(self.term)],
        };
        Txn {
            compares,
            leader: Some(self.term),
            ..Txn::default()
        }
    }

    pub(super) fn with_task(&self, mut txn: Txn, old: &Versioned<Task>, mut next: Task) -> Txn {
        next.updated_ms = self.desk.now_ms();
        next.event_count += 1;
        let key = Key::Task(next.id.to_string());
        txn.compares
            .push(Compare::Unchanged(key.clone(), old.mod_revision));
        txn.puts
            .push((key, Value::Task(wire::task_to(&next, self.term))));
        txn
    }

    pub(super) fn with_shard(mut txn: Txn, old: &Versioned<Shard>, next: &Shard) -> Txn {
        let key = Key::Shard(next.index as usize);
        txn.compares
            .push(Compare::Unchanged(key.clone(), old.mod_revision));
        txn.puts
            .push((key, Value::Shard(slotmesh_topology::wire::shard_to(next))));
        txn
    }

    /// A task that there was none of.
    pub(super) fn new_task(&self, txn: &mut Txn, task: &Task) {
        let key = Key::Task(task.id.to_string());
        let record = wire::task_to(task, self.term);
        txn.puts.push((key, Value::Task(record)));
    }

    /// Ends a failover and frees its shard; what the lost epoch had is revoked already.
    pub(super) async fn end_failover(
        &self,
        task: &Versioned<Task>,
        next: Task,
        shard: &Versioned<Shard>,
    ) -> Result<Next, Wrote> {
        let mut txn = self.with_task(self.leader_txn(), task, next);
        self.unlock(&mut txn, shard.value.index as usize, task);
        self.commit(txn).await
    }

    /// Ends a removal: no record is left but the task's.
    pub(super) async fn end_decommission(
        &self,
        task: &Versioned<Task>,
        shards: &[Versioned<Shard>],
    ) -> Result<Next, Wrote> {
        let next = Task {
            state: TaskState::Done,
            ..task.value.clone()
        };
        let mut txn = self.with_task(self.leader_txn(), task, next);
        txn.deletes.push(Key::Instance);
        let keys = shards.iter().map(|s| Key::Shard(s.value.index as usize));
        txn.deletes.extend(keys);
        self.commit(txn).await
    }

    /// Frees a shard if this task has it.
    pub(super) fn unlock(&self, txn: &mut Txn, index: usize, task: &Versioned<Task>) {
        let owner = self.desk.mirror.borrow().owners.get(&index).cloned();
        if let Some((owner, revision)) = owner
            && owner == task.value.id.as_str()
        {
            let lock = Key::Lock(index);
            txn.compares
                .push(Compare::Unchanged(lock.clone(), revision));
            txn.deletes.push(lock);
        }
    }

    pub(super) async fn commit(&self, txn: Txn) -> Result<Next, Wrote> {
        match self.desk.store(StoreRequest::Txn(txn)).await {
            Some(StoreReply::Committed(revision)) => {
                if self.desk.shows(revision).await {
                    Ok(Next::Again)
                } else {
                    Err(Wrote::Unavailable)
                }
            }
            Some(StoreReply::Conflict) => {
                match self.desk.store(StoreRequest::Get(Key::Leader)).await {
                    Some(StoreReply::Got(leader)) => {
                        if leader.is_some_and(|l| l.create_revision == self.term) {
                            Ok(Next::At(self.desk.now_ms() + 5))
                        } else {
                            Err(Wrote::Deposed)
                        }
                    }
                    _ => Err(Wrote::Unavailable),
                }
            }
            _ => Err(Wrote::Unavailable),
        }
    }

    pub(super) async fn task(&self, old: &Versioned<Task>, next: Task) -> Result<Next, Wrote> {
        self.commit(self.with_task(self.leader_txn(), old, next))
            .await
    }

    pub(super) async fn shard(&self, old: &Versioned<Shard>, next: &Shard) -> Result<Next, Wrote> {
        self.commit(Self::with_shard(self.leader_txn(), old, next))
            .await
    }

    pub(super) async fn both(
        &self,
        task: &Versioned<Task>,
        next_task: Task,
        shard: &Versioned<Shard>,
        next: &Shard,
    ) -> Result<Next, Wrote> {
        let txn = self.with_task(self.leader_txn(), task, next_task);
        self.commit(Self::with_shard(txn, shard, next)).await
    }

    /// Ends a switchover and frees its shards.
    pub(super) async fn end(
        &self,
        task: &Versioned<Task>,
        switches: &[ShardSwitch],
    ) -> Result<Next, Wrote> {
        let moved = switches
            .iter()
            .filter(|s| s.phase == slotmesh_task::Phase::Done)
            .count();
        let state = if moved == switches.len() {
            TaskState::Done
        } else if moved > 0 {
            TaskState::NeedsOperator
        } else if task.value.cancel_requested {
            TaskState::Cancelled
        } else {
            TaskState::RolledBack
        };
        let next = Task {
            state,
            ..task.value.clone()
        };
        let mut txn = self.with_task(self.leader_txn(), task, next);
        let index = |s: &ShardSwitch| s.shard.as_str().parse().unwrap_or(0);
        for switch in switches {
            self.unlock(&mut txn, index(switch), task);
        }
        self.commit(txn).await
    }
}

/// What an operator asks, at whatever controller thinks that it leads.
pub(super) async fn admit(desk: Rc<Desk>, ask: Ask) {
    let Some(term) = *desk.term.borrow() else {
        return;
    };
    let writer = Writer {
        desk: Rc::clone(&desk),
        term,
    };
    match ask {
        Ask::SwitchOver { choice, token } => switch_over(&writer, choice, token).await,
        Ask::Move { choice, token } => move_node(&writer, choice, token).await,
        Ask::Upgrade { choice, token } => change::upgrade(&writer, choice, token).await,
        Ask::Drain { host, token } => change::drain(&writer, host, token).await,
        Ask::Decommission => decommission(&writer).await,
        Ask::Cancel => cancel(&writer).await,
        Ask::Choose(choice) => choose(&writer, choice).await,
    }
}

async fn switch_over(writer: &Writer, choice: u64, token: u64) {
    let names = {
        let mirror = writer.desk.mirror.borrow();
        let plain: Vec<Shard> = mirror.shards.values().map(|s| s.value.clone()).collect();
        targets(&plain, choice)
    };
    switch_to(writer, names, token).await;
}

/// These are to be primaries.
pub(super) async fn switch_to(writer: &Writer, names: Vec<String>, token: u64) {
    let desk = &writer.desk;
    let idem = Key::Idem(token.to_string());
    if !matches!(
        desk.store(StoreRequest::Get(idem.clone())).await,
        Some(StoreReply::Got(None))
    ) {
        return;
    }
    let shards: Vec<Versioned<Shard>> = desk.mirror.borrow().shards.values().cloned().collect();
    let plain: Vec<Shard> = shards.iter().map(|s| s.value.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let now_ms = desk.now_ms();
    let switches = match admit::switchover(&plain, &names, now_ms) {
        Ok(switches) => switches,
        Err(why) => return desk.world.borrow_mut().say(|| format!("refused: {why}")),
    };
    let id = format!("t{token}");
    desk.world
        .borrow_mut()
        .say(|| format!("task {id}: {names:?} are to be primaries"));
    let mut txn = writer.leader_txn();
    txn.compares.push(Compare::Absent(idem.clone()));
    txn.puts.push((idem, Value::Idem(id.clone())));
    for switch in &switches {
        let lock = Key::Lock(switch.shard.as_str().parse().unwrap_or(0));
        txn.compares.push(Compare::Absent(lock.clone()));
        txn.puts.push((lock, Value::Lock(id.clone())));
    }
    let task = new_task(&id, Spec::Switchover(switches), desk, SWITCHOVER_MS_MAX);
    writer.new_task(&mut txn, &task);
    // Whoever asked asks again when there is no answer.
    let _ = writer.commit(txn).await;
}

/// A replica of a shard goes to another host, if there is one and nobody else has the shard.
async fn move_node(writer: &Writer, choice: u64, token: u64) {
    let desk = &writer.desk;
    let idem = Key::Idem(token.to_string());
    let known = desk.store(StoreRequest::Get(idem.clone())).await;
    if !matches!(known, Some(StoreReply::Got(None))) {
        return;
    }
    let planned = {
        let mirror = desk.mirror.borrow();
        let picked = usize::try_from(choice / 7).unwrap_or(0);
        let shard = mirror.shards.get(&(picked % mirror.shards.len().max(1)));
        let Some(shard) = shard.filter(|_| !mirror.is_deleting).cloned() else {
            return;
        };
        let others = shard.value.members.iter();
        let others: Vec<_> = others.filter(|m| m.node != shard.value.primary).collect();
        let nth = usize::try_from(choice).unwrap_or(0) % others.len().max(1);
        let node = others.get(nth).map(|m| m.node.clone());
        drop(mirror);
        let host = super::driver::replace::place(desk, &shard.value);
        let (Some(node), Some(host)) = (node, host) else {
            return;
        };
        let id = TaskId::from(format!("m{token}").as_str());
        let (why, now_ms) = (("an operator".to_owned(), true), desk.now_ms());
        let task = replace::plan(id, &shard.value, &node, &host, why, now_ms);
        task.map(|task| (shard, task))
    };
    let (shard, task) = match planned {
        Ok(planned) => planned,
        Err(why) => return desk.world.borrow_mut().say(|| format!("refused: {why}")),
    };
    {
        let mut ctx = desk.world.borrow_mut();
        ctx.say(|| format!("task {}: a node is to move: {:?}", task.id, task.spec));
        ctx.checks.replacements += 1;
    }
    let mut txn = writer.leader_txn();
    txn.compares.push(Compare::Absent(idem.clone()));
    txn.compares.push(Compare::Absent(Key::Instance));
    txn.puts.push((idem, Value::Idem(task.id.to_string())));
    // Whoever asked asks again when there is no answer.
    let txn = writer.put_replacement(txn, &shard, &task);
    let _ = writer.commit(txn).await;
}

async fn decommission(writer: &Writer) {
    let desk = &writer.desk;
    let idem = Key::Idem("decommission".into());
    let (busy, shards) = {
        let mirror = desk.mirror.borrow();
        let busy = mirror.tasks.values().any(|t| !t.value.state.is_ended());
        let shards: Vec<_> = mirror.shards.values().cloned().collect();
        (busy || mirror.is_deleting, shards)
    };
    if busy {
        return;
    }
    let mut txn = writer.leader_txn();
    txn.compares.push(Compare::Absent(idem.clone()));
    txn.compares.push(Compare::Absent(Key::Instance));
    for shard in &shards {
        let index = shard.value.index as usize;
        txn.compares.push(Compare::Absent(Key::Lock(index)));
    }
    let task = new_task("d0", Spec::Decommission, desk, DECOMMISSION_MS_MAX);
    txn.puts.push((idem, Value::Idem(task.id.to_string())));
    txn.puts.push((Key::Instance, Value::Removal));
    writer.new_task(&mut txn, &task);
    // Whoever asked asks again when there is no answer.
    let _ = writer.commit(txn).await;
}

pub(super) fn new_task(id: &str, spec: Spec, desk: &Desk, time_ms: u64) -> Task {
    let now_ms = desk.now_ms();
    Task {
        id: TaskId::from(id),
        instance: desk.instance.id.clone(),
        spec,
        state: TaskState::Pending,
        message: String::new(),
        created_ms: now_ms,
        updated_ms: now_ms,
        deadline_ms: now_ms + time_ms,
        event_count: 1,
        cancel_requested: false,
        not_before_ms: 0,
        in_window: false,
        choice: None,
        trace_id: String::new(),
        copied: slotmesh_task::Copied::default(),
    }
}

/// A replica of each chosen shard.
fn targets(shards: &[Shard], choice: u64) -> Vec<String> {
    let all = choice.is_multiple_of(3);
    let one = usize::try_from(choice / 3).unwrap_or(0) % shards.len().max(1);
    let chosen = shards.iter().enumerate().filter(|(i, _)| all || *i == one);
    chosen
        .filter_map(|(_, shard)| {
            let replicas: Vec<_> = shard
                .members
                .iter()
                .filter(|m| m.role == NodeRole::Replica)
                .collect();
            let pick = usize::try_from(choice / 7).unwrap_or(0) % replicas.len().max(1);
            replicas.get(pick).map(|m| m.node.to_string())
        })
        .collect()
}

/// Tells every task that waits for an operator, and has that on its menu, what to do.
async fn choose(writer: &Writer, choice: Choice) {
    let tasks: Vec<Versioned<Task>> = {
        let mirror = writer.desk.mirror.borrow();
        mirror.tasks.values().cloned().collect()
    };
    for task in tasks {
        let now_ms = writer.desk.now_ms();
        let next = match change::told(&task.value, choice, now_ms) {
            Some(next) => next,
            None if is_asked(&task.value, choice) => Task {
                choice: Some(choice),
                ..task.value.clone()
            },
            None => continue,
        };
        let _ = writer.task(&task, next).await;
    }
}

fn is_asked(task: &Task, choice: Choice) -> bool {
    let waits = matches!(task.spec, Spec::Failover(_) | Spec::Replace(_)) && task.is_parked();
    waits && schedule::menu(task).contains(&choice)
}

async fn cancel(writer: &Writer) {
    let open = writer
        .desk
        .mirror
        .borrow()
        .tasks
        .values()
        .find(|t| t.value.is_cancellable())
        .cloned();
    if let Some(task) = open {
        let next = Task {
            cancel_requested: true,
            ..task.value.clone()
        };
        let _ = writer.task(&task, next).await;
    }
}
