//! Records of upgrades, and how the API shows one.

use slotmesh_proto::{agent::v1 as agent, store::v1 as store, task::v1 as api};
use slotmesh_topology::Epoch;

use super::{switch_from, switch_to};
use crate::{
    observe::{CommandCost, ServedWindow},
    upgrade::{Drain, Gate, Method, NodeUpgrade, Rollback, ShardUpgrade, Upgrade, UpgradePhase},
};

pub(super) fn from(record: &store::UpgradeSpec) -> Option<Upgrade> {
    Some(Upgrade {
        engine: record.engine.clone(),
        from_engine: record.from_engine.clone(),
        bake_ms: record.bake_ms,
        canary_shards: record.canary_shards,
        parallel_shards: record.parallel_shards.max(1),
        finalize_by_operator: record.finalize_by_operator,
        preserve_roles: record.preserve_roles,
        in_window: record.in_window,
        paused: record.paused,
        automatic: record.automatic,
        allow_downtime: record.allow_downtime,
        max_hold_ms: record.max_hold_ms,
        paused_why: record.paused_why.clone(),
        method: match record.method() {
            store::UpgradeMethod::Unspecified => Method::Auto,
            store::UpgradeMethod::InPlace => Method::InPlace,
            store::UpgradeMethod::CrossHost => Method::CrossHost,
        },
        shards: record
            .shards
            .iter()
            .map(shard_from)
            .collect::<Option<_>>()?,
    })
}

pub(super) fn to(upgrade: &Upgrade) -> store::UpgradeSpec {
    store::UpgradeSpec {
        engine: upgrade.engine.clone(),
        from_engine: upgrade.from_engine.clone(),
        bake_ms: upgrade.bake_ms,
        canary_shards: upgrade.canary_shards,
        parallel_shards: upgrade.parallel_shards,
        finalize_by_operator: upgrade.finalize_by_operator,
        preserve_roles: upgrade.preserve_roles,
        in_window: upgrade.in_window,
        paused: upgrade.paused,
        automatic: upgrade.automatic,
        allow_downtime: upgrade.allow_downtime,
        max_hold_ms: upgrade.max_hold_ms,
        paused_why: upgrade.paused_why.clone(),
        method: match upgrade.method {
            Method::Auto => store::UpgradeMethod::Unspecified,
            Method::InPlace => store::UpgradeMethod::InPlace,
            Method::CrossHost => store::UpgradeMethod::CrossHost,
        }
        .into(),
        shards: upgrade.shards.iter().map(shard_to).collect(),
    }
}

fn shard_from(record: &store::ShardUpgrade) -> Option<ShardUpgrade> {
    let switch = match &record.switch {
        None => None,
        Some(switch) => Some(switch_from(switch)?),
    };
    Some(ShardUpgrade {
        shard: record.shard_id.as_str().into(),
        phase: phase_from(record.phase())?,
        phase_since_ms: record.phase_since_unix_ms,
        message: record.message.clone(),
        nodes: record.nodes.iter().map(node_from).collect(),
        switch,
        rollback: record.rollback.as_ref().map(rollback_from),
        why_back: Some(record.why_back.clone()).filter(|why| !why.is_empty()),
        on_request: record.on_request,
        hold_us: record.hold_us,
        held_us: record.held_us,
        tries: record.tries,
        finalize: record.finalize,
        parked_in: phase_from(record.parked_in()),
        moved: record.moved,
        drain: (record.drain_epoch > 0).then_some(Drain {
            epoch: Epoch(record.drain_epoch),
            offset: record.drain_offset,
        }),
        retried: record.retried,
        blameless: record.blameless,
        began_epoch: Epoch(record.began_epoch),
    })
}

fn shard_to(part: &ShardUpgrade) -> store::ShardUpgrade {
    store::ShardUpgrade {
        shard_id: part.shard.to_string(),
        phase: phase_to(part.phase).into(),
        phase_since_unix_ms: part.phase_since_ms,
        message: part.message.clone(),
        nodes: part.nodes.iter().map(node_to).collect(),
        switch: part.switch.as_ref().map(switch_to),
        rollback: part.rollback.as_ref().map(rollback_to),
        why_back: part.why_back.clone().unwrap_or_default(),
        on_request: part.on_request,
        hold_us: part.hold_us,
        held_us: part.held_us,
        tries: part.tries,
        finalize: part.finalize,
        parked_in: part
            .parked_in
            .map_or(store::UpgradePhase::Unspecified, phase_to)
            .into(),
        moved: part.moved,
        drain_epoch: part.drain.map_or(0, |d| d.epoch.0),
        drain_offset: part.drain.map_or(0, |d| d.offset),
        retried: part.retried,
        blameless: part.blameless,
        began_epoch: part.began_epoch.0,
    }
}

fn node_from(record: &store::NodeUpgrade) -> NodeUpgrade {
    NodeUpgrade {
        node: record.node_id.as_str().into(),
        from_engine: record.from_engine.clone(),
        from_version: record.from_version.clone(),
        staged: record.staged,
    }
}

fn node_to(node: &NodeUpgrade) -> store::NodeUpgrade {
    store::NodeUpgrade {
        node_id: node.node.to_string(),
        from_engine: node.from_engine.clone(),
        from_version: node.from_version.clone(),
        staged: node.staged,
    }
}

fn rollback_from(record: &store::RollbackRecord) -> Rollback {
    Rollback {
        open: record.open,
        why: record.why.clone(),
        old: record.old_node_id.as_str().into(),
        old_run_id: record.old_run_id.clone(),
        old_unexpected_errors: record.old_unexpected_errors,
        new: record.new_node_id.as_str().into(),
        new_run_id: record.new_run_id.clone(),
        new_sync_full: record.new_sync_full,
        diverged: record.diverged,
        doubt: record.doubt.clone(),
        doubts: record.doubts,
        behind_since_ms: record.behind_since_unix_ms,
        faults_before: record.faults_before,
        costs_before: record.costs_before.iter().map(cost_from).collect(),
    }
}

pub(super) fn window_from(window: &agent::ServedWindow) -> ServedWindow {
    ServedWindow {
        epoch: Epoch(window.epoch),
        number: window.number,
        commands: window.commands.iter().map(cost_from).collect(),
    }
}

fn cost_from(cost: &store::CommandCost) -> CommandCost {
    CommandCost {
        name: cost.name.clone(),
        calls: cost.calls,
        usec: cost.usec,
    }
}

fn cost_to(cost: &CommandCost) -> store::CommandCost {
    store::CommandCost {
        name: cost.name.clone(),
        calls: cost.calls,
        usec: cost.usec,
    }
}

fn rollback_to(rollback: &Rollback) -> store::RollbackRecord {
    store::RollbackRecord {
        open: rollback.open,
        why: rollback.why.clone(),
        old_node_id: rollback.old.to_string(),
        old_run_id: rollback.old_run_id.clone(),
        old_unexpected_errors: rollback.old_unexpected_errors,
        new_node_id: rollback.new.to_string(),
        new_run_id: rollback.new_run_id.clone(),
        new_sync_full: rollback.new_sync_full,
        diverged: rollback.diverged,
        doubt: rollback.doubt.clone(),
        doubts: rollback.doubts,
        behind_since_unix_ms: rollback.behind_since_ms,
        faults_before: rollback.faults_before,
        costs_before: rollback.costs_before.iter().map(cost_to).collect(),
    }
}

fn phase_from(phase: store::UpgradePhase) -> Option<UpgradePhase> {
    Some(match phase {
        store::UpgradePhase::Unspecified => return None,
        store::UpgradePhase::Stage => UpgradePhase::Stage,
        store::UpgradePhase::Ready => UpgradePhase::Ready,
        store::UpgradePhase::Replicas => UpgradePhase::Replicas,
        store::UpgradePhase::Switch => UpgradePhase::Switch,
        store::UpgradePhase::Bake => UpgradePhase::Bake,
        store::UpgradePhase::Finalize => UpgradePhase::Finalize,
        store::UpgradePhase::Preserve => UpgradePhase::Preserve,
        store::UpgradePhase::SwitchBack => UpgradePhase::SwitchBack,
        store::UpgradePhase::UndoNodes => UpgradePhase::UndoNodes,
        store::UpgradePhase::Done => UpgradePhase::Done,
        store::UpgradePhase::RolledBack => UpgradePhase::RolledBack,
        store::UpgradePhase::Parked => UpgradePhase::Parked,
    })
}

fn phase_to(phase: UpgradePhase) -> store::UpgradePhase {
    match phase {
        UpgradePhase::Stage => store::UpgradePhase::Stage,
        UpgradePhase::Ready => store::UpgradePhase::Ready,
        UpgradePhase::Replicas => store::UpgradePhase::Replicas,
        UpgradePhase::Switch => store::UpgradePhase::Switch,
        UpgradePhase::Bake => store::UpgradePhase::Bake,
        UpgradePhase::Finalize => store::UpgradePhase::Finalize,
        UpgradePhase::Preserve => store::UpgradePhase::Preserve,
        UpgradePhase::SwitchBack => store::UpgradePhase::SwitchBack,
        UpgradePhase::UndoNodes => store::UpgradePhase::UndoNodes,
        UpgradePhase::Done => store::UpgradePhase::Done,
        UpgradePhase::RolledBack => store::UpgradePhase::RolledBack,
        UpgradePhase::Parked => store::UpgradePhase::Parked,
    }
}

#[allow(clippy::cast_precision_loss)] // Milliseconds for people; 2^52 µs is 142 years.
pub(super) fn progress(part: &ShardUpgrade) -> api::ShardProgress {
    let (rollback, why) = part.rollback.as_ref().map_or(("", ""), Rollback::shown);
    let switch = part.switch.as_ref();
    api::ShardProgress {
        shard_id: part.shard.to_string(),
        from_node_id: switch.map(|s| s.from.to_string()).unwrap_or_default(),
        to_node_id: switch.map(|s| s.to.to_string()).unwrap_or_default(),
        phase: part.phase.name().to_owned(),
        message: part.message.clone(),
        hold_ms: part.hold_us as f64 / 1000.0,
        total_hold_ms: part.total_hold_us() as f64 / 1000.0,
        critical_ms: switch.map_or(0.0, |s| s.critical_us as f64 / 1000.0),
        rollback: rollback.to_owned(),
        rollback_why: why.to_owned(),
        staged_nodes: u32::try_from(part.nodes.iter().filter(|n| n.staged).count()).unwrap_or(0),
        nodes: u32::try_from(part.nodes.len()).unwrap_or(0),
        gates: Vec::new(),
    }
}

/// A gate as the API shows it.
#[must_use]
pub fn gate(gate: Gate) -> api::Gate {
    api::Gate {
        name: gate.name.to_owned(),
        before: gate.before,
        now: gate.now,
        limit: gate.limit,
        unit: gate.unit.to_owned(),
    }
}
