//! Where task records become tasks, reports become views, and back.

use slotmesh_proto::{agent::v1 as agent, store::v1 as store, task::v1 as api};
use slotmesh_topology::{
    Epoch,
    wire::{SCHEMA, WireError, node_role_from},
};

use crate::{
    observe::{NodeView, ProcessState},
    spec::{Phase, ShardSwitch, Spec, State, Task},
};

/// Reads a task's record.
///
/// # Errors
/// When it is of a newer schema or incomplete.
pub fn task_from(record: &store::TaskRecord) -> Result<Task, WireError> {
    if record.schema == 0 || record.schema > SCHEMA {
        return Err(WireError::Schema {
            record: "task",
            found: record.schema,
        });
    }
    let field = |field| WireError::Field {
        record: "task",
        field,
    };
    let spec = match record.spec.as_ref().ok_or_else(|| field("spec"))? {
        store::task_record::Spec::Provision(_) => Spec::Provision,
        store::task_record::Spec::Decommission(_) => Spec::Decommission,
        store::task_record::Spec::Switchover(s) => Spec::Switchover(
            s.shards
                .iter()
                .map(switch_from)
                .collect::<Option<_>>()
                .ok_or_else(|| field("spec.shards.phase"))?,
        ),
    };
    Ok(Task {
        id: record.task_id.as_str().into(),
        instance: record.instance_id.as_str().into(),
        spec,
        state: state_from(record.state()).ok_or_else(|| field("state"))?,
        message: record.message.clone(),
        created_ms: record.created_unix_ms,
        updated_ms: record.updated_unix_ms,
        deadline_ms: record.deadline_unix_ms,
        event_count: record.event_count,
        cancel_requested: record.cancel_requested,
    })
}

/// Writes a task's record.
#[must_use]
pub fn task_to(task: &Task, term: u64) -> store::TaskRecord {
    let spec = match &task.spec {
        Spec::Provision => store::task_record::Spec::Provision(store::ProvisionSpec {}),
        Spec::Decommission => store::task_record::Spec::Decommission(store::DecommissionSpec {}),
        Spec::Switchover(shards) => store::task_record::Spec::Switchover(store::SwitchoverSpec {
            shards: shards.iter().map(switch_to).collect(),
        }),
    };
    store::TaskRecord {
        schema: SCHEMA,
        task_id: task.id.to_string(),
        instance_id: task.instance.to_string(),
        spec: Some(spec),
        state: state_to(task.state).into(),
        message: task.message.clone(),
        created_unix_ms: task.created_ms,
        updated_unix_ms: task.updated_ms,
        deadline_unix_ms: task.deadline_ms,
        event_count: task.event_count,
        cancel_requested: task.cancel_requested,
        attempt: 1,
        trace_id: String::new(),
        term,
    }
}

fn switch_from(record: &store::ShardSwitch) -> Option<ShardSwitch> {
    Some(ShardSwitch {
        shard: record.shard_id.as_str().into(),
        from: record.from_node_id.as_str().into(),
        to: record.to_node_id.as_str().into(),
        from_epoch: Epoch(record.from_epoch),
        phase: match record.phase() {
            store::ShardSwitchPhase::Unspecified => return None,
            store::ShardSwitchPhase::Preflight => Phase::Preflight,
            store::ShardSwitchPhase::Prewarm => Phase::Prewarm,
            store::ShardSwitchPhase::Hold | store::ShardSwitchPhase::Critical => Phase::Hold,
            store::ShardSwitchPhase::Settle => Phase::Settle,
            store::ShardSwitchPhase::Undo => Phase::Resolve,
            store::ShardSwitchPhase::Done => Phase::Done,
            store::ShardSwitchPhase::RolledBack => Phase::RolledBack,
        },
        phase_since_ms: record.phase_since_unix_ms,
        message: record.message.clone(),
        hold_us: record.hold_us,
        critical_us: record.critical_us,
    })
}

fn switch_to(switch: &ShardSwitch) -> store::ShardSwitch {
    let phase = match switch.phase {
        Phase::Preflight => store::ShardSwitchPhase::Preflight,
        Phase::Prewarm => store::ShardSwitchPhase::Prewarm,
        Phase::Hold => store::ShardSwitchPhase::Hold,
        Phase::Resolve => store::ShardSwitchPhase::Undo,
        Phase::Settle => store::ShardSwitchPhase::Settle,
        Phase::Done => store::ShardSwitchPhase::Done,
        Phase::RolledBack => store::ShardSwitchPhase::RolledBack,
    };
    store::ShardSwitch {
        shard_id: switch.shard.to_string(),
        from_node_id: switch.from.to_string(),
        to_node_id: switch.to.to_string(),
        from_epoch: switch.from_epoch.0,
        phase: phase.into(),
        message: switch.message.clone(),
        hold_us: switch.hold_us,
        critical_us: switch.critical_us,
        phase_since_unix_ms: switch.phase_since_ms,
    }
}

/// `None` when unspecified.
#[must_use]
pub fn state_from(state: store::TaskState) -> Option<State> {
    match state {
        store::TaskState::Unspecified => None,
        store::TaskState::Pending => Some(State::Pending),
        store::TaskState::Running => Some(State::Running),
        store::TaskState::Done => Some(State::Done),
        store::TaskState::RolledBack => Some(State::RolledBack),
        store::TaskState::Cancelled => Some(State::Cancelled),
        store::TaskState::NeedsOperator => Some(State::NeedsOperator),
    }
}

/// State, for records and the API.
#[must_use]
pub fn state_to(state: State) -> store::TaskState {
    match state {
        State::Pending => store::TaskState::Pending,
        State::Running => store::TaskState::Running,
        State::Done => store::TaskState::Done,
        State::RolledBack => store::TaskState::RolledBack,
        State::Cancelled => store::TaskState::Cancelled,
        State::NeedsOperator => store::TaskState::NeedsOperator,
    }
}

/// A task as the API shows it. Times are given by the caller, which has a calendar.
#[must_use]
pub fn task_api(task: &Task, created_at: String, updated_at: String) -> api::Task {
    let (steps_done, steps_total) = task.progress();
    let shards = match &task.spec {
        Spec::Provision | Spec::Decommission => Vec::new(),
        Spec::Switchover(shards) => shards.iter().map(progress_api).collect(),
    };
    api::Task {
        task_id: task.id.to_string(),
        instance_id: task.instance.to_string(),
        kind: task.spec.kind().to_owned(),
        state: state_to(task.state).into(),
        message: task.message.clone(),
        created_at,
        updated_at,
        event_count: task.event_count,
        steps_done,
        steps_total,
        cancellable: task.is_cancellable(),
        shards,
    }
}

#[allow(clippy::cast_precision_loss)] // Milliseconds for people; 2^52 µs is 142 years.
fn progress_api(switch: &ShardSwitch) -> api::ShardProgress {
    api::ShardProgress {
        shard_id: switch.shard.to_string(),
        from_node_id: switch.from.to_string(),
        to_node_id: switch.to.to_string(),
        phase: switch.phase.name().to_owned(),
        message: switch.message.clone(),
        hold_ms: switch.hold_us as f64 / 1000.0,
        critical_ms: switch.critical_us as f64 / 1000.0,
    }
}

/// State of a process as an agent reports it.
#[must_use]
pub fn process_state(state: agent::ProcessState) -> ProcessState {
    match state {
        agent::ProcessState::Unspecified => ProcessState::Unknown,
        agent::ProcessState::Starting => ProcessState::Starting,
        agent::ProcessState::Running => ProcessState::Running,
        agent::ProcessState::Stopped => ProcessState::Stopped,
        agent::ProcessState::Failed => ProcessState::Failed,
        agent::ProcessState::Removed => ProcessState::Removed,
    }
}

/// A node as an agent reports it.
#[must_use]
pub fn node_view(report: &agent::NodeReport, seen_ms: u64) -> NodeView {
    NodeView {
        state: process_state(report.state()),
        error: report.error.clone(),
        pid: report.pid,
        address: report.address.clone(),
        run_id: report.run_id.clone(),
        version: report.engine_version.clone(),
        role: node_role_from(report.observed_role()),
        offset: report.offset,
        link_up: report.link_up,
        following: report.following.clone(),
        loading: report.loading,
        failover_idle: matches!(report.failover_state.as_str(), "" | "no-failover"),
        used_memory: report.used_memory,
        max_memory: report.max_memory,
        keys: report.keys,
        granted_epoch: Epoch(report.granted_epoch),
        assigned_epoch: Epoch(report.assigned_epoch),
        lag_bytes: report.replica_lag_bytes,
        seen_ms,
    }
}
