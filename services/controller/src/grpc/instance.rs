//! `InstanceService`: admits what users ask for, all or nothing, in one transaction each.

pub(super) mod again;
mod auto_upgrade;
mod change;
mod describe;
mod disks;
mod durability;
mod failover;
mod node;
mod plan;
mod proxies;
pub(super) mod schedule;
mod upgrade;
mod version;

use prost::Message;
use slotmesh_proto::instance::v1::{self as api, instance_service_server::InstanceService};
use slotmesh_task::{
    Spec, State as TaskState, Task,
    admit::{self, RefusalKind},
    provision,
};
use slotmesh_topology::{Instance, InstanceId, InstanceState, TaskId, wire};
use tonic::{Request, Response, Status};
use tracing::{Instrument as _, info, warn};

use super::{Context, refuse, refused, store_failed, token::Token};
use crate::{
    clock,
    drive::write::{encode_instance, encode_shard, put_task, shard_key},
    leader::{LeaderOutcome, LeaderTxn},
    mirror::State,
    store::keys::Key,
    trace,
};

/// Tries of an admission that loses a race against another write.
const ADMIT_TRIES: usize = 5;

/// The service.
#[derive(Clone, Debug)]
pub struct Instances {
    context: Context,
    turns: change::Turns,
}

/// What an admission leads to.
struct Admitted {
    task: TaskId,
    resource: String,
}

impl Instances {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self {
            context,
            turns: change::Turns::default(),
        }
    }

    /// The outcome of an earlier request with this token, if there was one.
    #[allow(clippy::result_large_err)]
    async fn earlier(&self, token: &Token) -> Result<Option<Admitted>, Status> {
        let Some(record) = token.earlier(&self.context).await? else {
            return Ok(None);
        };
        Ok(Some(Admitted {
            task: record.task_id.into(),
            resource: record.resource_id,
        }))
    }

    /// Commits an admission; `None` when it lost a race and must be decided anew.
    async fn admit(
        &self,
        txn: LeaderTxn,
        task: &Task,
        token: &Token,
        resource: &str,
    ) -> Result<Option<Admitted>, Status> {
        let mut txn = txn.absent(Key::Task {
            task: task.id.as_str(),
        });
        txn = token.put(txn, task.id.as_str(), resource);
        let kind = task.spec.kind();
        let txn = put_task(txn, task.clone(), "", "Admitted", kind);
        match txn
            .commit(&*self.context.store)
            .await
            .map_err(|e| store_failed(&e))?
        {
            LeaderOutcome::Committed { revision } => {
                // So that the caller's next read, here, sees what was admitted.
                self.context.mirror.shows(revision).await;
                info!(task = %task.id, instance = %task.instance, kind, "admitted");
                Ok(Some(Admitted {
                    task: task.id.clone(),
                    resource: resource.to_owned(),
                }))
            }
            LeaderOutcome::Conflict => Ok(None),
            LeaderOutcome::Deposed => self.context.leading().map(|_| None),
        }
    }

    #[allow(clippy::result_large_err)]
    fn instance(&self, id: &str) -> Result<(Instance, u64), Status> {
        let key = InstanceId::from(id);
        self.context
            .mirror
            .read(|s| {
                s.instances
                    .get(&key)
                    .map(|i| (i.value.clone(), i.mod_revision))
            })
            .ok_or_else(|| {
                refuse(
                    RefusalKind::NotFound,
                    "INSTANCE_NOT_FOUND",
                    format!("there is no instance {id}; DescribeInstances lists them"),
                )
            })
    }
}

#[tonic::async_trait]
impl InstanceService for Instances {
    async fn fail_over(
        &self,
        request: Request<api::FailOverRequest>,
    ) -> Result<Response<api::FailOverResponse>, Status> {
        let task_id = self.admit_failover(request.into_inner()).await?.to_string();
        Ok(Response::new(api::FailOverResponse { task_id }))
    }

    async fn set_durability(
        &self,
        request: Request<api::SetDurabilityRequest>,
    ) -> Result<Response<api::SetDurabilityResponse>, Status> {
        let revision = self.change_durability(request.into_inner()).await?;
        Ok(Response::new(api::SetDurabilityResponse { revision }))
    }

    async fn modify_instance_replace_after(
        &self,
        request: Request<api::ModifyInstanceReplaceAfterRequest>,
    ) -> Result<Response<api::ModifyInstanceReplaceAfterResponse>, Status> {
        let revision = self.change_replace_after(request.into_inner()).await?;
        let answer = api::ModifyInstanceReplaceAfterResponse { revision };
        Ok(Response::new(answer))
    }

    async fn replace_node(
        &self,
        request: Request<api::ReplaceNodeRequest>,
    ) -> Result<Response<api::ReplaceNodeResponse>, Status> {
        let answer = self.admit_replacement(request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn set_node_priority(
        &self,
        request: Request<api::SetNodePriorityRequest>,
    ) -> Result<Response<api::SetNodePriorityResponse>, Status> {
        let revision = self.change_priority(request.into_inner()).await?;
        Ok(Response::new(api::SetNodePriorityResponse { revision }))
    }

    async fn modify_instance_minor_version(
        &self,
        request: Request<api::ModifyInstanceMinorVersionRequest>,
    ) -> Result<Response<api::ModifyInstanceMinorVersionResponse>, Status> {
        Ok(Response::new(
            self.admit_upgrade(request.into_inner()).await?,
        ))
    }

    async fn upgrade_proxy(
        &self,
        request: Request<api::UpgradeProxyRequest>,
    ) -> Result<Response<api::UpgradeProxyResponse>, Status> {
        let (task_id, plan) = self.admit_proxy_upgrade(request.into_inner()).await?;
        Ok(Response::new(api::UpgradeProxyResponse { task_id, plan }))
    }

    async fn restart_proxy(
        &self,
        request: Request<api::RestartProxyRequest>,
    ) -> Result<Response<api::RestartProxyResponse>, Status> {
        let (task_id, plan) = self.admit_proxy_restart(request.into_inner()).await?;
        Ok(Response::new(api::RestartProxyResponse { task_id, plan }))
    }

    async fn modify_instance_auto_upgrade(
        &self,
        request: Request<api::ModifyInstanceAutoUpgradeRequest>,
    ) -> Result<Response<api::ModifyInstanceAutoUpgradeResponse>, Status> {
        let revision = self.change_auto_upgrade(request.into_inner()).await?;
        let answer = api::ModifyInstanceAutoUpgradeResponse { revision };
        Ok(Response::new(answer))
    }

    async fn create_instance(
        &self,
        request: Request<api::CreateInstanceRequest>,
    ) -> Result<Response<api::CreateInstanceResponse>, Status> {
        let request = request.into_inner();
        // Without the token, so that the same body is the same request; maps are ordered first.
        let body = create_body(&request);
        let token = Token::of(&request.client_token, "CreateInstance", &body)?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = self.earlier(&token).await? {
                return Ok(Response::new(api::CreateInstanceResponse {
                    instance_id: earlier.resource,
                    task_id: earlier.task.to_string(),
                }));
            }
            let (instance, shards) = self.plan_create(&request)?;
            let key = Key::Instance {
                instance: instance.id.as_str(),
            }
            .to_string();
            let txn = term
                .txn()
                .absent(key.clone())
                .put(key, encode_instance(&instance));
            let txn = shards
                .iter()
                .fold(txn, |t, s| t.put(shard_key(s), encode_shard(s)));
            let task = new_task(&instance.id, Spec::Provision, provision::PROVISION_MS_MAX);
            let resource = instance.id.as_str();
            if let Some(done) = self.admit(txn, &task, &token, resource).await? {
                return Ok(Response::new(api::CreateInstanceResponse {
                    instance_id: done.resource,
                    task_id: done.task.to_string(),
                }));
            }
        }
        Err(busy())
    }

    async fn delete_instance(
        &self,
        request: Request<api::DeleteInstanceRequest>,
    ) -> Result<Response<api::DeleteInstanceResponse>, Status> {
        let request = request.into_inner();
        let body = api::DeleteInstanceRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let body = body.encode_to_vec();
        let token = Token::of(&request.client_token, "DeleteInstance", &body)?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = self.earlier(&token).await? {
                let task_id = earlier.task.to_string();
                return Ok(Response::new(api::DeleteInstanceResponse { task_id }));
            }
            let (instance, revision) = self.instance(&request.instance_id)?;
            // A removal that has ended with something left is begun again.
            let is_open = |t: &Task| t.instance == instance.id && !t.state.is_ended();
            let tasks_open = |s: &State| s.tasks.values().any(|t| is_open(&t.value));
            if instance.state == InstanceState::Deleting && self.context.mirror.read(tasks_open) {
                return Err(refuse(
                    RefusalKind::Conflict,
                    "INSTANCE_DELETING",
                    format!("instance {} is being deleted already", instance.id),
                ));
            }
            let txn = self.delete_txn(term, &instance, revision)?;
            let task = new_task(
                &instance.id,
                Spec::Decommission,
                provision::DECOMMISSION_MS_MAX,
            );
            let admitted = self.admit(txn, &task, &token, instance.id.as_str()).await?;
            if let Some(done) = admitted {
                let task_id = done.task.to_string();
                return Ok(Response::new(api::DeleteInstanceResponse { task_id }));
            }
        }
        Err(busy())
    }

    async fn describe_instances(
        &self,
        request: Request<api::DescribeInstancesRequest>,
    ) -> Result<Response<api::DescribeInstancesResponse>, Status> {
        let wanted = request.into_inner().instance_ids;
        for id in &wanted {
            self.instance(id)?;
        }
        let found: Vec<Instance> = self.context.mirror.read(|state| {
            let is_wanted =
                |i: &Instance| wanted.is_empty() || wanted.iter().any(|w| w == i.id.as_str());
            let instances = state.instances.values().map(|i| &i.value);
            instances.filter(|i| is_wanted(i)).cloned().collect()
        });
        let proxies = self.context.hub.proxies();
        let instances = found
            .iter()
            .map(|i| describe::instance(i, &proxies))
            .collect();
        Ok(Response::new(api::DescribeInstancesResponse { instances }))
    }

    async fn describe_instance_shards(
        &self,
        request: Request<api::DescribeInstanceShardsRequest>,
    ) -> Result<Response<api::DescribeInstanceShardsResponse>, Status> {
        let id = request.into_inner().instance_id;
        let (instance, _) = self.instance(&id)?;
        let shards = self.context.mirror.read(|s| s.shards_of(&instance.id));
        let shards = self.context.hub.read(|fleet| {
            shards
                .iter()
                .map(|s| {
                    let id = (s.value.instance.clone(), s.value.id.clone());
                    describe::shard(&s.value, fleet, &self.context.hub.doubts().of(&id))
                })
                .collect()
        });
        Ok(Response::new(api::DescribeInstanceShardsResponse {
            shards,
        }))
    }

    async fn describe_engine_version(
        &self,
        request: Request<api::DescribeEngineVersionRequest>,
    ) -> Result<Response<api::DescribeEngineVersionResponse>, Status> {
        let id = request.into_inner().instance_id;
        Ok(Response::new(self.versions(&id).await?))
    }

    async fn update_parameters(
        &self,
        request: Request<api::UpdateParametersRequest>,
    ) -> Result<Response<api::UpdateParametersResponse>, Status> {
        self.context.leading()?;
        // A caller that hangs up must not leave nodes with values that nobody stores.
        let change = self.clone().change_parameters(request.into_inner());
        let change = trace::scope(trace::current(), change).in_current_span();
        let revision = tokio::spawn(change).await.map_err(|error| {
            warn!(%error, "change of parameters died");
            Status::internal("the change of parameters failed")
        })??;
        Ok(Response::new(api::UpdateParametersResponse { revision }))
    }

    async fn update_accounts(
        &self,
        request: Request<api::UpdateAccountsRequest>,
    ) -> Result<Response<api::UpdateAccountsResponse>, Status> {
        let revision = self.change_accounts(request.into_inner()).await?;
        Ok(Response::new(api::UpdateAccountsResponse { revision }))
    }

    async fn modify_instance_maintain_time(
        &self,
        request: Request<api::ModifyInstanceMaintainTimeRequest>,
    ) -> Result<Response<api::ModifyInstanceMaintainTimeResponse>, Status> {
        let revision = self.change_window(request.into_inner()).await?;
        let answer = api::ModifyInstanceMaintainTimeResponse { revision };
        Ok(Response::new(answer))
    }

    async fn describe_accounts(
        &self,
        request: Request<api::DescribeAccountsRequest>,
    ) -> Result<Response<api::DescribeAccountsResponse>, Status> {
        let (instance, _) = self.instance(&request.into_inner().instance_id)?;
        let accounts = instance.accounts.iter().map(wire::account_to).collect();
        Ok(Response::new(api::DescribeAccountsResponse { accounts }))
    }

    async fn switch_over(
        &self,
        request: Request<api::SwitchOverRequest>,
    ) -> Result<Response<api::SwitchOverResponse>, Status> {
        let request = request.into_inner();
        let targets = admit::switchover_targets(&request).map_err(|r| refused(&r))?;
        let body = api::SwitchOverRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let body = body.encode_to_vec();
        let token = Token::of(&request.client_token, "SwitchOver", &body)?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = self.earlier(&token).await? {
                let task_id = earlier.task.to_string();
                return Ok(Response::new(api::SwitchOverResponse { task_id }));
            }
            let (instance, revision) = self.instance(&request.instance_id)?;
            let not_before_ms = schedule::not_before(request.schedule.as_ref(), &instance)?;
            let (txn, task) =
                self.switchover_txn(term, (&instance, revision), &targets, not_before_ms)?;
            let task = Task {
                in_window: schedule::is_window(request.schedule.as_ref()),
                ..task
            };
            if let Some(done) = self.admit(txn, &task, &token, "").await? {
                let task_id = done.task.to_string();
                return Ok(Response::new(api::SwitchOverResponse { task_id }));
            }
        }
        Err(busy())
    }
}

fn busy() -> Status {
    refuse(
        RefusalKind::Conflict,
        "CONFLICT",
        "the records changed with every try; try again in a moment",
    )
}

fn create_body(request: &api::CreateInstanceRequest) -> Vec<u8> {
    let plain = api::CreateInstanceRequest {
        client_token: String::new(),
        parameters: std::collections::HashMap::new(),
        ..request.clone()
    };
    let mut body = plain.encode_to_vec();
    let ordered: std::collections::BTreeMap<_, _> = request.parameters.iter().collect();
    for (key, value) in ordered {
        body.extend_from_slice(key.as_bytes());
        body.push(0);
        body.extend_from_slice(value.as_bytes());
        body.push(0);
    }
    body
}

fn new_task(instance: &InstanceId, spec: Spec, limit_ms: u64) -> Task {
    let now_ms = clock::now_ms();
    Task {
        // Sorts by time, so that a listing's end is the newest.
        id: format!("t-{}", uuid::Uuid::now_v7().simple()).into(),
        instance: instance.clone(),
        spec,
        state: TaskState::Pending,
        message: String::new(),
        created_ms: now_ms,
        updated_ms: now_ms,
        deadline_ms: now_ms + limit_ms,
        event_count: 0,
        cancel_requested: false,
        not_before_ms: 0,
        in_window: false,
        choice: None,
        trace_id: trace::current(),
        copied: slotmesh_task::Copied::default(),
    }
}

/// An artifact of a test's catalogue, by its name.
#[cfg(test)]
fn listed(name: &str) -> slotmesh_topology::artifact::Artifact {
    use slotmesh_topology::artifact::{Artifact, Level, SHA256_LENGTH, parse_name};

    let (product, version) = parse_name(name).unwrap();
    Artifact {
        product,
        version,
        level: Level::Low,
        release_note: String::new(),
        sha256: [0; SHA256_LENGTH],
        source: "file:///opt/program".into(),
        created_unix_ms: 1,
    }
}
