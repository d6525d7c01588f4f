//! Where task records become tasks, reports become views, and back.

mod proxies;
mod replacement;
mod upgrade;

use slotmesh_proto::{agent::v1 as agent, store::v1 as store, task::v1 as api};
use slotmesh_topology::{
    Epoch,
    wire::{SCHEMA, WireError, fence_proof_from, fence_proof_to, node_role_from},
};

use crate::{
    observe::{EngineTrouble, NodeView, ProcessState},
    schedule,
    spec::{Choice, Copied, FailoverPhase, Phase, ShardFailover, ShardSwitch, Spec, State, Task},
    table::{self, Cancel, Row, Undo},
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
        store::task_record::Spec::Failover(f) => {
            Spec::Failover(failover_from(f).ok_or_else(|| field("spec.phase"))?)
        }
        store::task_record::Spec::Replace(r) => {
            Spec::Replace(replacement::from(r).ok_or_else(|| field("spec.phase"))?)
        }
        store::task_record::Spec::Upgrade(u) => {
            Spec::Upgrade(upgrade::from(u).ok_or_else(|| field("spec.shards.phase"))?)
        }
        store::task_record::Spec::Proxies(p) => {
            Spec::Proxies(proxies::from(p).ok_or_else(|| field("spec.proxies.phase"))?)
        }
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
        not_before_ms: record.not_before_unix_ms,
        in_window: record.in_window,
        choice: choice_from(record.choice()),
        trace_id: record.trace_id.clone(),
        copied: Copied {
            done: record.bytes_done,
            total: record.bytes_total,
            lag: record.lag_bytes,
        },
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
        Spec::Failover(failover) => store::task_record::Spec::Failover(failover_to(failover)),
        Spec::Replace(r) => store::task_record::Spec::Replace(replacement::to(r)),
        Spec::Upgrade(u) => store::task_record::Spec::Upgrade(upgrade::to(u)),
        Spec::Proxies(p) => store::task_record::Spec::Proxies(proxies::to(p)),
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
        trace_id: task.trace_id.clone(),
        bytes_done: task.copied.done,
        bytes_total: task.copied.total,
        lag_bytes: task.copied.lag,
        term,
        not_before_unix_ms: task.not_before_ms,
        in_window: task.in_window,
        choice: task
            .choice
            .map_or(store::OperatorChoice::Unspecified, choice_to)
            .into(),
        parked_because: match task.is_parked() {
            true => task.message.clone(),
            false => String::new(),
        },
    }
}

fn failover_from(record: &store::FailoverSpec) -> Option<ShardFailover> {
    Some(ShardFailover {
        shard: record.shard_id.as_str().into(),
        from: record.from_node_id.as_str().into(),
        from_run_id: record.from_run_id.clone(),
        from_epoch: Epoch(record.from_epoch),
        to: Some(record.to_node_id.as_str())
            .filter(|to| !to.is_empty())
            .map(Into::into),
        phase: match record.phase() {
            store::FailoverPhase::Unspecified => return None,
            store::FailoverPhase::Fence => FailoverPhase::Fence,
            store::FailoverPhase::Choose => FailoverPhase::Choose,
            store::FailoverPhase::Promote => FailoverPhase::Promote,
            store::FailoverPhase::Settle => FailoverPhase::Settle,
            store::FailoverPhase::Done => FailoverPhase::Done,
            store::FailoverPhase::Parked => FailoverPhase::Parked,
        },
        phase_since_ms: record.phase_since_unix_ms,
        message: record.message.clone(),
        cause: record.cause.clone(),
        proof: fence_proof_from(record.proof()),
        hold_us: record.hold_us,
    })
}

fn failover_to(failover: &ShardFailover) -> store::FailoverSpec {
    let phase = match failover.phase {
        FailoverPhase::Fence => store::FailoverPhase::Fence,
        FailoverPhase::Choose => store::FailoverPhase::Choose,
        FailoverPhase::Promote => store::FailoverPhase::Promote,
        FailoverPhase::Settle => store::FailoverPhase::Settle,
        FailoverPhase::Done => store::FailoverPhase::Done,
        FailoverPhase::Parked => store::FailoverPhase::Parked,
    };
    store::FailoverSpec {
        shard_id: failover.shard.to_string(),
        from_node_id: failover.from.to_string(),
        from_run_id: failover.from_run_id.clone(),
        from_epoch: failover.from_epoch.0,
        to_node_id: failover
            .to
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        phase: phase.into(),
        phase_since_unix_ms: failover.phase_since_ms,
        message: failover.message.clone(),
        cause: failover.cause.clone(),
        proof: failover
            .proof
            .map_or(store::FenceProof::Unspecified, fence_proof_to)
            .into(),
        hold_us: failover.hold_us,
    }
}

/// `None` when unspecified.
#[must_use]
pub fn choice_from(choice: store::OperatorChoice) -> Option<Choice> {
    match choice {
        store::OperatorChoice::Unspecified => None,
        store::OperatorChoice::Retry => Some(Choice::Retry),
        store::OperatorChoice::Undo => Some(Choice::Undo),
        store::OperatorChoice::AcceptLoss => Some(Choice::AcceptLoss),
        store::OperatorChoice::Pause => Some(Choice::Pause),
        store::OperatorChoice::Resume => Some(Choice::Resume),
        store::OperatorChoice::Finalize => Some(Choice::Finalize),
    }
}

/// An operator's choice, for records and the API.
#[must_use]
pub fn choice_to(choice: Choice) -> store::OperatorChoice {
    match choice {
        Choice::Retry => store::OperatorChoice::Retry,
        Choice::Undo => store::OperatorChoice::Undo,
        Choice::AcceptLoss => store::OperatorChoice::AcceptLoss,
        Choice::Pause => store::OperatorChoice::Pause,
        Choice::Resume => store::OperatorChoice::Resume,
        Choice::Finalize => store::OperatorChoice::Finalize,
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
        // The second one is only shown.
        store::TaskState::Unspecified | store::TaskState::Scheduled => None,
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
        Spec::Provision | Spec::Decommission | Spec::Proxies(_) => Vec::new(),
        Spec::Switchover(shards) => shards.iter().map(progress_api).collect(),
        Spec::Failover(failover) => vec![failover_api(failover)],
        Spec::Replace(r) => vec![replacement::progress(r)],
        Spec::Upgrade(u) => u.shards.iter().map(upgrade::progress).collect(),
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
        not_before: String::new(),
        choices: schedule::menu(task)
            .iter()
            .map(|choice| choice_to(*choice).into())
            .collect(),
        predicted_hold_ms: 0.0,
        trace_id: task.trace_id.clone(),
        bytes_done: task.copied.done,
        bytes_total: task.copied.total,
        // What was noted last; nothing lags any more once it has ended.
        lag_bytes: match task.state.is_ended() {
            true => 0,
            false => task.copied.lag,
        },
        steps: steps_api(task),
        proxies: match &task.spec {
            Spec::Proxies(changes) => proxies::progress(changes),
            _ => Vec::new(),
        },
    }
}

fn steps_api(task: &Task) -> Vec<api::TaskStep> {
    let current = table::current(&task.spec);
    let is_current = |row: &Row| !task.state.is_ended() && current.contains(row);
    let step = |row: Row| api::TaskStep {
        name: row.name.to_owned(),
        precheck: row.precheck.to_owned(),
        act: row.act.to_owned(),
        verify: row.verify.to_owned(),
        undo: match row.undo {
            Undo::By(how) => how.to_owned(),
            Undo::No(_) => String::new(),
        },
        deadline_ms: row
            .deadline_ms
            .map_or(0, |ms| u32::try_from(ms).unwrap_or(u32::MAX)),
        cancellable: row.cancel == Cancel::Honoured,
        current: is_current(&row),
    };
    table::of(&task.spec).into_iter().map(step).collect()
}

#[allow(clippy::cast_precision_loss)] // As below.
fn failover_api(failover: &ShardFailover) -> api::ShardProgress {
    api::ShardProgress {
        shard_id: failover.shard.to_string(),
        from_node_id: failover.from.to_string(),
        to_node_id: failover
            .to
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        phase: failover.phase.name().to_owned(),
        message: failover.message.clone(),
        hold_ms: failover.hold_us as f64 / 1000.0,
        total_hold_ms: failover.hold_us as f64 / 1000.0,
        ..api::ShardProgress::default()
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
        total_hold_ms: switch.hold_us as f64 / 1000.0,
        critical_ms: switch.critical_us as f64 / 1000.0,
        ..api::ShardProgress::default()
    }
}

pub use proxies::process as proxy_process;
pub use upgrade::gate as gate_api;

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
        assigned_membership: report.assigned_membership,
        lag_bytes: report.replica_lag_bytes,
        exited_run_id: report.exited_run_id.clone(),
        continues_run_id: report.continues_run_id.clone(),
        detached: report.detached,
        unresponsive: report.unresponsive,
        replid: report.replid.clone(),
        replid2: report.replid2.clone(),
        second_offset: report.second_offset,
        link_silent_s: report.link_silent_s,
        copied_bytes: report.copied_bytes,
        copy_total_bytes: report.copy_total_bytes,
        replication_users: report.replication_users.clone(),
        engine: report.engine.clone(),
        trouble: report.engine_trouble.as_ref().map(|t| EngineTrouble {
            engine: t.engine.clone(),
            starts: t.starts,
            why: t.why.clone(),
        }),
        settling: report.settling,
        unexpected_errors: report.unexpected_errors,
        sync_full: report.sync_full,
        served: report.served.iter().map(upgrade::window_from).collect(),
        seen_ms,
    }
}
