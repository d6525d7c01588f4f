//! Whether an upgrade that has ended may be tried again: what was judged when it was admitted may have
//! changed since.
//!
//! Invariant: an instance has one upgrade at a time, and none that its nodes' present versions do not
//! allow, however it came to be.

use slotmesh_task::{
    Spec, Task,
    admit::RefusalKind,
    upgrade::{self, Options, Upgrade, UpgradePhase},
};
use slotmesh_topology::{InstanceId, InstanceState, Shard, artifact::parse_name};
use tonic::Status;

use crate::{
    clock,
    grpc::{Context, artifact::listed, refuse, refused, store_failed},
};

/// That no task of such a kind is under way with the instance.
///
/// # Errors
/// With the one that is.
#[allow(clippy::result_large_err)]
pub(super) fn check_alone(
    context: &Context,
    instance: &InstanceId,
    is_such: fn(&Spec) -> bool,
) -> Result<(), Status> {
    let other = context.mirror.read(|s| {
        let is_open = |t: &&Task| {
            t.instance == *instance && is_such(&t.spec) && (!t.state.is_ended() || t.is_parked())
        };
        let mut tasks = s.tasks.values().map(|t| &t.value);
        let other = tasks.find(is_open)?;
        Some((other.id.clone(), other.spec.clone(), other.is_parked()))
    });
    let Some((task, spec, is_parked)) = other else {
        return Ok(());
    };
    let (reason, does, choices) = match spec {
        Spec::Proxies(_) => (
            "PROXIES_UNDER_WAY",
            "changes proxies of the instance",
            "retry or finalize",
        ),
        _ => (
            "UPGRADE_UNDER_WAY",
            "upgrades the instance",
            "retry or undo",
        ),
    };
    Err(refuse(
        RefusalKind::Conflict,
        reason,
        match is_parked {
            true => format!(
                "task {task} {does} already and waits for an operator: say first how it goes on \
                 (slotmesh task resolve {task} {choices})"
            ),
            false => format!("task {task} {does} already; wait for its end, or cancel it"),
        },
    ))
}

pub(super) fn is_upgrade(spec: &Spec) -> bool {
    matches!(spec, Spec::Upgrade(_))
}

pub(super) fn is_of_proxies(spec: &Spec) -> bool {
    matches!(spec, Spec::Proxies(_))
}

/// The upgrade of a task that is over: trying it again begins shards anew.
fn ended(task: &Task) -> Option<&Upgrade> {
    match &task.spec {
        Spec::Upgrade(upgrade) if task.state.is_ended() && !task.is_parked() => Some(upgrade),
        _ => None,
    }
}

/// That the program which an ended upgrade is to is still listed.
///
/// # Errors
/// When it is not, or the store does not answer.
pub(in crate::grpc) async fn check_listed(context: &Context, task: &Task) -> Result<(), Status> {
    let program = match (ended(task), &task.spec) {
        (Some(upgrade), _) => &upgrade.engine,
        (None, Spec::Proxies(changes)) if !changes.restart && !task.is_parked() => &changes.program,
        _ => return Ok(()),
    };
    let found = listed(&*context.store).await;
    let found = found.map_err(|e| store_failed(&e))?;
    if found.iter().any(|a| a.name() == *program) {
        return Ok(());
    }
    Err(refuse(
        RefusalKind::NotFound,
        "ARTIFACT_NOT_FOUND",
        format!(
            "{program} is not listed any more, so hosts can't fetch it; add it again (slotmesh artifact add)"
        ),
    ))
}

/// That an ended upgrade would be admitted today.
///
/// # Errors
/// As an admission would be refused.
#[allow(clippy::result_large_err)]
pub(in crate::grpc) fn check(context: &Context, task: &Task) -> Result<(), Status> {
    if is_of_proxies(&task.spec) && !task.is_parked() {
        return check_alone(context, &task.instance, is_of_proxies);
    }
    let Some(upgrade) = ended(task) else {
        return Ok(());
    };
    check_alone(context, &task.instance, is_upgrade)?;
    let found = context.mirror.read(|s| {
        let instance = s.instances.get(&task.instance).map(|i| i.value.clone());
        instance.zip(Some(s.shards_of(&task.instance)))
    });
    let Some((instance, shards)) = found.filter(|(i, _)| i.state == InstanceState::Running) else {
        return Err(refuse(
            RefusalKind::Precondition,
            "INSTANCE_NOT_RUNNING",
            "the task's instance is gone, or is not running",
        ));
    };
    let went_back = |shard: &Shard| {
        let part = upgrade.part(shard.id.as_str());
        part.is_some_and(|p| p.phase == UpgradePhase::RolledBack)
    };
    let shards = shards.into_iter().map(|s| s.value);
    let shards: Vec<Shard> = shards.filter(went_back).collect();
    let Some(options) = options(upgrade) else {
        return Err(Status::internal(
            "the task's engine has no name that can be read",
        ));
    };
    let planned = context
        .hub
        .read(|fleet| upgrade::plan(&instance, &shards, fleet, &options, clock::now_ms()));
    planned.map(drop).map_err(|r| refused(&r))
}

/// As it was asked for.
fn options(upgrade: &Upgrade) -> Option<Options> {
    Some(Options {
        to: parse_name(&upgrade.engine)?,
        bake_ms: upgrade.bake_ms,
        canary_shards: upgrade.canary_shards,
        parallel_shards: upgrade.parallel_shards,
        finalize_by_operator: upgrade.finalize_by_operator,
        preserve_roles: upgrade.preserve_roles,
        in_window: upgrade.in_window,
        allow_downtime: upgrade.allow_downtime,
        automatic: upgrade.automatic,
        method: upgrade.method,
        max_hold_ms: upgrade.max_hold_ms,
    })
}
