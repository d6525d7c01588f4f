//! What the ctl shows of the API's messages: the JSON that scripts read.
//!
//! Field names are a contract, kept apart from the messages so that a change of one is seen to
//! change the other. Enum values are lower snake case, without the prefix of their type.

use std::collections::BTreeMap;

use serde::Serialize;
use slotmesh_proto::{
    fleet::v1 as fleet,
    instance::v1 as instance,
    store::v1::{InstanceState, NodeRole, OperatorChoice, TaskState},
    task::v1 as task,
    topology::v1::{Account, Architecture},
};

use crate::proxies::ProxyProgressView;

#[derive(Debug, Clone, Serialize)]
pub struct InstanceView {
    pub instance_id: String,
    pub name: String,
    pub architecture: String,
    pub state: String,
    pub shard_count: u32,
    pub replicas_per_shard: u32,
    pub durability: u32,
    pub replace_after_s: u32,
    pub engine: String,
    pub password_required: bool,
    pub created_at: String,
    pub proxies: Vec<EndpointView>,
}

#[derive(Debug, Clone, Serialize)]
pub struct EndpointView {
    pub proxy_id: String,
    pub host_id: String,
    pub address: String,
    pub pid: u32,
}

/// `instance describe`: the instance with its shards.
#[derive(Debug, Clone, Serialize)]
pub struct InstanceDetailView {
    #[serde(flatten)]
    pub instance: InstanceView,
    pub shards: Vec<ShardView>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ShardView {
    pub shard_id: String,
    pub index: u32,
    pub slots: Vec<SlotRangeView>,
    pub epoch: u64,
    pub mode: String,
    /// Why its primary, which looks lost, is not replaced; empty: it does not.
    pub message: String,
    pub nodes: Vec<NodeView>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct SlotRangeView {
    pub first: u32,
    pub last: u32,
}

#[derive(Debug, Clone, Serialize)]
pub struct NodeView {
    pub node_id: String,
    pub host_id: String,
    pub role: String,
    pub address: String,
    pub run_id: String,
    pub in_sync: bool,
    pub pid: u32,
    pub engine_version: String,
    pub state: String,
    pub replication_offset: u64,
    pub priority: u32,
    pub leaving: bool,
}

#[derive(Debug, Clone, Serialize)]
pub struct TaskView {
    pub task_id: String,
    pub instance_id: String,
    pub kind: String,
    pub state: String,
    pub message: String,
    pub created_at: String,
    pub updated_at: String,
    pub event_count: u64,
    pub steps_done: u32,
    pub steps_total: u32,
    pub cancellable: bool,
    /// Empty: at once.
    pub not_before: String,
    /// Of each shard, from the instance's last switchovers; 0: unknown.
    pub predicted_hold_ms: f64,
    /// What `task resolve` would accept now.
    pub choices: Vec<String>,
    /// Of the call that made it.
    pub trace_id: String,
    /// Copied so far of what replicas load in full; 0 of 0: nothing is.
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// That the next primaries have not applied yet.
    pub lag_bytes: u64,
    pub shards: Vec<ShardProgressView>,
    /// Of a change of proxies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub proxies: Vec<ProxyProgressView>,
    /// With `task show --steps`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepView>,
}

impl TaskView {
    /// When it begins, of one that waits for that; controllers of a release before call some of them pending.
    #[must_use]
    pub fn begins(&self) -> Option<&str> {
        let waits = matches!(self.state.as_str(), "scheduled" | "pending");
        (waits && !self.not_before.is_empty()).then_some(self.not_before.as_str())
    }
}

/// One step of a kind of task.
#[derive(Debug, Clone, Serialize)]
pub struct StepView {
    pub name: String,
    pub current: bool,
    pub precheck: String,
    pub act: String,
    pub verify: String,
    /// Empty: what was done is not put back.
    pub undo: String,
    /// 0: it waits for as long as the task may take.
    pub deadline_ms: u32,
    pub cancellable: bool,
}

/// `epochs`: one primary of a shard.
#[derive(Debug, Clone, Serialize)]
pub struct EpochView {
    pub shard_id: String,
    pub epoch: u64,
    pub primary_node_id: String,
    pub before_node_id: String,
    pub cause: String,
    pub task_id: String,
    pub who: String,
    pub term: u64,
    pub trace_id: String,
    pub time: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct ShardProgressView {
    pub shard_id: String,
    pub from_node_id: String,
    pub to_node_id: String,
    pub phase: String,
    pub message: String,
    /// The longest one.
    pub hold_ms: f64,
    /// Of all its switches together.
    pub total_hold_ms: f64,
    pub critical_ms: f64,
    /// Of an upgrade after its switch: Open or Closed.
    pub rollback: String,
    pub rollback_why: String,
    /// Of an upgrade under way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateView>,
}

/// What an upgrade must not cost, before it does; what is not there is not known, or there is none.
#[derive(Debug, Clone, Serialize)]
pub struct GateView {
    pub name: String,
    pub before: Option<f64>,
    pub now: Option<f64>,
    pub limit: Option<f64>,
    pub unit: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct TaskEventView {
    pub number: u64,
    pub time: String,
    pub shard_id: String,
    pub step: String,
    pub message: String,
    pub state: String,
    pub trace_id: String,
}

/// `task watch`: an event, and how far the task was then.
#[derive(Debug, Clone, Serialize)]
pub struct WatchedView {
    #[serde(flatten)]
    pub event: TaskEventView,
    pub steps_done: u32,
    pub steps_total: u32,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub lag_bytes: u64,
}

impl WatchedView {
    /// Of what the stream says.
    pub fn new(event: task::TaskEvent, task: Option<&task::Task>) -> Self {
        let task = task.cloned().unwrap_or_default();
        Self {
            event: event.into(),
            steps_done: task.steps_done,
            steps_total: task.steps_total,
            bytes_done: task.bytes_done,
            bytes_total: task.bytes_total,
            lag_bytes: task.lag_bytes,
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct HostView {
    pub host_id: String,
    pub agent_address: String,
    pub advertise_ip: String,
    pub agent_version: String,
    pub agent_pid: u32,
    pub engines: Vec<String>,
    pub zone: String,
    pub node_count: u32,
}

/// Rules hold hashes of passwords, never passwords.
#[derive(Debug, Clone, Serialize)]
pub struct AccountView {
    pub name: String,
    pub rules: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ParametersView {
    pub engine: BTreeMap<String, String>,
    pub proxy: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ProxyView {
    pub proxy_id: String,
    pub instance_id: String,
    pub host_id: String,
    pub address: String,
    pub admin_address: String,
    pub version: String,
    pub pid: u32,
    pub clients: u32,
    pub commands: u64,
    pub errors: u64,
    pub held_requests: u64,
    pub held_max_ms: f64,
}

/// What a request that starts a task answers: ids at once, the task with `--wait`.
#[derive(Debug, Clone, Serialize)]
pub struct StartedView {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    pub task_id: String,
    /// Of this command's calls.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub trace_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskView>,
}

impl From<instance::Instance> for InstanceView {
    fn from(from: instance::Instance) -> Self {
        Self {
            architecture: value_name(from.architecture().as_str_name(), "ARCHITECTURE_"),
            state: instance_state_name(from.state()),
            proxies: from.proxies.into_iter().map(EndpointView::from).collect(),
            instance_id: from.instance_id,
            name: from.name,
            shard_count: from.shard_count,
            replicas_per_shard: from.replicas_per_shard,
            durability: from.durability,
            replace_after_s: from.replace_after_s,
            engine: from.engine,
            password_required: from.password_required,
            created_at: from.created_at,
        }
    }
}

impl From<Account> for AccountView {
    fn from(from: Account) -> Self {
        Self {
            name: from.name,
            rules: from.rules,
        }
    }
}

impl From<instance::Instance> for ParametersView {
    fn from(from: instance::Instance) -> Self {
        Self {
            engine: from.engine_parameters.into_iter().collect(),
            proxy: from.proxy_parameters.into_iter().collect(),
        }
    }
}

impl From<instance::ProxyEndpoint> for EndpointView {
    fn from(from: instance::ProxyEndpoint) -> Self {
        Self {
            proxy_id: from.proxy_id,
            host_id: from.host_id,
            address: from.address,
            pid: from.pid,
        }
    }
}

impl From<instance::Shard> for ShardView {
    fn from(from: instance::Shard) -> Self {
        let slots = from.slots.iter().map(|s| SlotRangeView {
            first: s.first,
            last: s.last,
        });
        Self {
            slots: slots.collect(),
            shard_id: from.shard_id,
            index: from.index,
            epoch: from.epoch,
            mode: from.mode,
            message: from.message,
            nodes: from.nodes.into_iter().map(NodeView::from).collect(),
        }
    }
}

impl From<instance::Node> for NodeView {
    fn from(from: instance::Node) -> Self {
        Self {
            role: role_name(from.current_role()),
            node_id: from.node_id,
            host_id: from.host_id,
            address: from.address,
            run_id: from.run_id,
            in_sync: from.in_sync,
            pid: from.pid,
            engine_version: from.engine_version,
            state: from.state,
            replication_offset: from.replication_offset,
            priority: from.priority,
            leaving: from.leaving,
        }
    }
}

impl From<task::Task> for TaskView {
    fn from(from: task::Task) -> Self {
        let choices = from.choices().map(choice_name).collect();
        Self {
            state: task_state_name(from.state()),
            shards: from
                .shards
                .into_iter()
                .map(ShardProgressView::from)
                .collect(),
            proxies: from
                .proxies
                .into_iter()
                .map(ProxyProgressView::from)
                .collect(),
            task_id: from.task_id,
            instance_id: from.instance_id,
            kind: from.kind,
            message: from.message,
            created_at: from.created_at,
            updated_at: from.updated_at,
            event_count: from.event_count,
            steps_done: from.steps_done,
            steps_total: from.steps_total,
            cancellable: from.cancellable,
            not_before: from.not_before,
            predicted_hold_ms: from.predicted_hold_ms,
            choices,
            trace_id: from.trace_id,
            bytes_done: from.bytes_done,
            bytes_total: from.bytes_total,
            lag_bytes: from.lag_bytes,
            steps: Vec::new(),
        }
    }
}

impl From<task::TaskStep> for StepView {
    fn from(from: task::TaskStep) -> Self {
        Self {
            name: from.name,
            current: from.current,
            precheck: from.precheck,
            act: from.act,
            verify: from.verify,
            undo: from.undo,
            deadline_ms: from.deadline_ms,
            cancellable: from.cancellable,
        }
    }
}

impl From<task::EpochChange> for EpochView {
    fn from(from: task::EpochChange) -> Self {
        Self {
            shard_id: from.shard_id,
            epoch: from.epoch,
            primary_node_id: from.primary_node_id,
            before_node_id: from.before_node_id,
            cause: from.cause,
            task_id: from.task_id,
            who: from.who,
            term: from.term,
            trace_id: from.trace_id,
            time: from.time,
        }
    }
}

impl From<task::ShardProgress> for ShardProgressView {
    fn from(from: task::ShardProgress) -> Self {
        Self {
            shard_id: from.shard_id,
            from_node_id: from.from_node_id,
            to_node_id: from.to_node_id,
            phase: from.phase,
            message: from.message,
            hold_ms: from.hold_ms,
            // A controller of an older release does not say.
            total_hold_ms: from.total_hold_ms.max(from.hold_ms),
            critical_ms: from.critical_ms,
            rollback: from.rollback,
            rollback_why: from.rollback_why,
            gates: from.gates.into_iter().map(GateView::from).collect(),
        }
    }
}

impl From<task::Gate> for GateView {
    fn from(from: task::Gate) -> Self {
        Self {
            name: from.name,
            before: from.before,
            now: from.now,
            limit: from.limit,
            unit: from.unit,
        }
    }
}

impl From<task::TaskEvent> for TaskEventView {
    fn from(from: task::TaskEvent) -> Self {
        Self {
            state: task_state_name(from.state()),
            number: from.number,
            time: from.time,
            shard_id: from.shard_id,
            step: from.step,
            message: from.message,
            trace_id: from.trace_id,
        }
    }
}

impl From<fleet::Host> for HostView {
    fn from(from: fleet::Host) -> Self {
        Self {
            host_id: from.host_id,
            agent_address: from.agent_address,
            advertise_ip: from.advertise_ip,
            agent_version: from.agent_version,
            agent_pid: from.agent_pid,
            engines: from.engines,
            zone: from.zone,
            node_count: from.node_count,
        }
    }
}

impl From<fleet::Proxy> for ProxyView {
    fn from(from: fleet::Proxy) -> Self {
        Self {
            proxy_id: from.proxy_id,
            instance_id: from.instance_id,
            host_id: from.host_id,
            address: from.address,
            admin_address: from.admin_address,
            version: from.version,
            pid: from.pid,
            clients: from.clients,
            commands: from.commands,
            errors: from.errors,
            held_requests: from.held_requests,
            held_max_ms: from.held_max_ms,
        }
    }
}

/// `primary`, `replica`, `read_only` or `unspecified`.
pub fn role_name(role: NodeRole) -> String {
    value_name(role.as_str_name(), "NODE_ROLE_")
}

/// `creating`, `running`, `deleting` or `unspecified`.
pub fn instance_state_name(state: InstanceState) -> String {
    value_name(state.as_str_name(), "INSTANCE_STATE_")
}

/// `scheduled`, `pending`, `running`, `done`, `rolled_back`, `cancelled`, `needs_operator` or `unspecified`.
pub fn task_state_name(state: TaskState) -> String {
    value_name(state.as_str_name(), "TASK_STATE_")
}

/// `retry`, `undo`, `accept-loss`, as `task resolve` takes them, or `unspecified`.
pub fn choice_name(choice: OperatorChoice) -> String {
    value_name(choice.as_str_name(), "OPERATOR_CHOICE_").replace('_', "-")
}

/// Reads what [`architecture`](InstanceView::architecture) shows.
pub fn architecture_value(name: &str) -> Option<Architecture> {
    Architecture::from_str_name(&format!("ARCHITECTURE_{}", name.to_ascii_uppercase()))
}

fn value_name(value: &str, prefix: &str) -> String {
    value
        .strip_prefix(prefix)
        .unwrap_or(value)
        .to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enum_values_are_short_lower_case_names() {
        assert_eq!(role_name(NodeRole::ReadOnly), "read_only");
        assert_eq!(task_state_name(TaskState::RolledBack), "rolled_back");
        assert_eq!(instance_state_name(InstanceState::Running), "running");
        assert_eq!(architecture_value("cluster"), Some(Architecture::Cluster));
        assert_eq!(architecture_value("sharded"), None);
    }
}
