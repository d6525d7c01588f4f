//! What an admission would write: decided from the mirror, committed by the caller.

use rand::RngCore;
use slotmesh_proto::{instance::v1 as api, store::v1 as records};
use slotmesh_task::{
    FailoverPhase, Spec, State, Task,
    admit::{self, RefusalKind},
    failover, place,
};
use slotmesh_topology::{
    Epoch, Instance, InstanceId, InstanceState, Member, Mode, NodeId, NodeRole, Placement, Shard,
    instance::{DATABASES, proxy_id},
    parameter, slot,
};
use tonic::Status;

use super::{Instances, new_task};
use crate::{
    clock,
    drive::{
        self,
        write::{put_instance, put_task},
    },
    grpc::{refuse, refused},
    leader::{LeaderTxn, Term},
    mirror::Versioned,
    store::keys::{self, Key},
};

/// How long a switchover may take for each shard before the task would be stuck.
const SWITCHOVER_MS_MAX: u64 = 60_000;

impl Instances {
    #[allow(clippy::result_large_err)]
    pub(super) fn plan_create(
        &self,
        request: &api::CreateInstanceRequest,
    ) -> Result<(Instance, Vec<Shard>), Status> {
        let new = admit::create(request).map_err(|r| refused(&r))?;
        super::durability::check(request.durability, new.replicas)?;
        super::node::check_replace_after(request.replace_after_s)?;
        let candidates = self.candidates();
        let no_host =
            |e: place::NoHost| refuse(RefusalKind::Precondition, "NO_HOST", e.to_string());
        let nodes = 1 + new.replicas as usize;
        let placed = place::nodes(&candidates, new.shards as usize, nodes).map_err(no_host)?;
        let proxy_hosts = place::proxies(&candidates, new.proxies as usize).map_err(no_host)?;
        let mut secret = vec![0; 32];
        rand::rng().fill_bytes(&mut secret);
        let id = new_instance_id();
        let ranges = u16::try_from(new.shards)
            .map(slot::split_evenly)
            .unwrap_or_default();
        let shards = placed
            .into_iter()
            .zip(ranges)
            .zip(0u32..)
            .map(|((hosts, range), index)| {
                let members: Vec<_> = hosts
                    .into_iter()
                    .enumerate()
                    .map(|(n, host)| Member {
                        node: NodeId::from(format!("{id}-{index}-{n}")),
                        host,
                        role: if n == 0 {
                            NodeRole::Primary
                        } else {
                            NodeRole::Replica
                        },
                        run_id: String::new(),
                        address: String::new(),
                        in_sync: false,
                        priority: slotmesh_topology::PRIORITY,
                        leaving: false,
                        engine: String::new(),
                        exchange: None,
                    })
                    .collect();
                Shard {
                    instance: id.clone(),
                    id: index.to_string().into(),
                    index,
                    slots: vec![range],
                    epoch: Epoch(0),
                    primary: members[0].node.clone(),
                    members,
                    mode: Mode::Provisioning,
                    closed_epoch: Epoch(0),
                    departures: Vec::new(),
                    roster: Default::default(),
                }
            });
        let instance = Instance {
            name: if request.name.is_empty() {
                id.to_string()
            } else {
                request.name.clone()
            },
            architecture: new.architecture,
            shard_count: new.shards,
            replicas_per_shard: new.replicas,
            databases: DATABASES,
            engine: request.engine.clone(),
            secret,
            password_sha256: new.password_sha256,
            state: InstanceState::Creating,
            proxies: proxy_hosts
                .into_iter()
                .zip(0..)
                .map(|(host, n)| Placement::new(proxy_id(&id, n), host))
                .collect(),
            gone_proxies: Vec::new(),
            workers_per_proxy: new.workers,
            created_unix_ms: clock::now_ms(),
            durability: request.durability,
            maintenance_window: String::new(),
            auto_upgrade: None,
            held_back: None,
            replace_after_s: request
                .replace_after_s
                .unwrap_or(slotmesh_topology::instance::REPLACE_AFTER_S),
            parameters: request
                .parameters
                .iter()
                .map(|(name, value)| (parameter::engine_name(name), value.clone()))
                .collect(),
            parameters_version: 0,
            proxy_parameters: std::collections::BTreeMap::new(),
            accounts: Vec::new(),
            id: id.clone(),
        };
        Ok((instance, shards.collect()))
    }

    /// Hosts with a session and what they run already.
    pub(super) fn candidates(&self) -> Vec<place::Candidate> {
        self.context.hub.read(|fleet| {
            let mirror = &self.context.mirror;
            mirror.read(|state| drive::replace::candidates(state, fleet))
        })
    }

    #[allow(clippy::result_large_err)]
    pub(super) fn switchover_txn(
        &self,
        term: Term,
        (instance, revision): (&Instance, u64),
        targets: &[&str],
        not_before_ms: u64,
    ) -> Result<(LeaderTxn, Task), Status> {
        let (shards, locks) = self
            .context
            .mirror
            .read(|s| (s.shards_of(&instance.id), s.locks.clone()));
        let plain: Vec<_> = shards.iter().map(|s| s.value.clone()).collect();
        // A busy shard is a conflict, whatever its mode: one operation a shard.
        let now = not_before_ms == 0;
        for shard in plain
            .iter()
            .filter(|s| now && s.members.iter().any(|m| targets.contains(&m.node.as_str())))
        {
            if let Some(owner) = locks.get(&(instance.id.clone(), shard.id.clone())) {
                return Err(refuse(
                    RefusalKind::Conflict,
                    "SHARD_BUSY",
                    format!(
                        "shard {} belongs to task {owner}; wait for it to end",
                        shard.id
                    ),
                ));
            }
        }
        let now_ms = clock::now_ms();
        let switches = admit::switchover(&plain, targets, now_ms).map_err(|r| refused(&r))?;
        if instance.state == InstanceState::Deleting {
            return Err(refuse(
                RefusalKind::Precondition,
                "INSTANCE_DELETING",
                format!("instance {} is being deleted", instance.id),
            ));
        }
        let limit_ms = SWITCHOVER_MS_MAX * u64::try_from(switches.len()).unwrap_or(1);
        let mut task = new_task(&instance.id, Spec::Switchover(switches.clone()), limit_ms);
        task.not_before_ms = not_before_ms;
        task.deadline_ms += not_before_ms.saturating_sub(now_ms);
        // A deletion that is admitted at the same time must not miss this task.
        let key = Key::Instance {
            instance: instance.id.as_str(),
        };
        let mut txn = term.txn().unchanged(key, revision);
        // One that is scheduled gets its shards when it begins.
        for switch in switches.iter().filter(|_| now) {
            let revision = shards
                .iter()
                .find(|s| s.value.id == switch.shard)
                .map_or(0, |s| s.mod_revision);
            let shard = switch.shard.as_str();
            let lock = Key::Lock {
                instance: instance.id.as_str(),
                shard,
            }
            .to_string();
            let record = records::LockRecord {
                schema: 0,
                task_id: task.id.to_string(),
            };
            txn = txn
                .unchanged(
                    Key::Shard {
                        instance: instance.id.as_str(),
                        shard,
                    },
                    revision,
                )
                .absent(lock.clone())
                .put(lock, keys::encode(record));
        }
        Ok((txn, task))
    }

    #[allow(clippy::result_large_err)]
    pub(super) fn delete_txn(
        &self,
        term: Term,
        instance: &Instance,
        revision: u64,
    ) -> Result<LeaderTxn, Status> {
        let (shards, busy_with, parked) = self.context.mirror.read(|s| {
            let open = s
                .tasks
                .values()
                .find(|t| t.value.instance == instance.id && is_open(&t.value));
            // A failover that waits for an operator has its answer: nobody needs the shard. And
            // nobody needs another node of it.
            let tasks = s.tasks.values().filter(|t| t.value.instance == instance.id);
            let parked: Vec<_> = tasks
                .filter(|t| t.value.is_parked() || is_replacement(&t.value))
                .cloned()
                .collect();
            let open = open.map(|t| t.value.id.clone());
            (s.shards_of(&instance.id), open, parked)
        });
        if let Some(task) = busy_with {
            return Err(refuse(
                RefusalKind::Conflict,
                "INSTANCE_BUSY",
                format!("task {task} works on the instance; wait for it to end"),
            ));
        }
        let deleting = Instance {
            state: InstanceState::Deleting,
            ..instance.clone()
        };
        let txn = put_instance(term.txn(), revision, &deleting);
        let txn = parked.iter().fold(txn, end_parked);
        Ok(shards.iter().fold(txn, |txn, shard| {
            let lock = Key::Lock {
                instance: instance.id.as_str(),
                shard: shard.value.id.as_str(),
            };
            let id = (instance.id.clone(), shard.value.id.clone());
            let owner = self.context.mirror.read(|s| s.locks.get(&id).cloned());
            let is_ended = owner.is_some_and(|owner| parked.iter().any(|t| t.value.id == owner));
            match is_ended {
                true => txn.delete(lock),
                false => txn.absent(lock),
            }
        }))
    }
}

/// A replacement under way; it ends with the instance.
fn is_replacement(task: &Task) -> bool {
    matches!(task.spec, Spec::Replace(_)) && !task.state.is_ended()
}

fn is_open(task: &Task) -> bool {
    !task.state.is_ended() && !is_replacement(task)
}

fn end_parked(txn: LeaderTxn, task: &Versioned<Task>) -> LeaderTxn {
    let why = "the instance is deleted";
    let ended = failover::with_phase(&task.value, FailoverPhase::Done, why, clock::now_ms());
    let ended = Task {
        state: State::Cancelled,
        ..ended
    };
    let key = Key::Task {
        task: task.value.id.as_str(),
    };
    let txn = txn.unchanged(key, task.mod_revision);
    put_task(txn, ended, "", "Ended", why)
}

fn new_instance_id() -> InstanceId {
    format!("r-{:010x}", rand::rng().next_u64() >> 24).into()
}
