//! Every step of every kind of task, side by side: what is looked at before it, what it does, how its
//! effect is known, what puts it back, for how long it waits, and whether a cancel is still honoured.
//!
//! The machines act; this is what they promise, for operators and for the answer to a cancel.
//!
//! Invariant: a task is cancellable exactly when every step that it is in is. There is no phase without
//! a row: each is one arm of a `match`.

mod proxies;
mod upgrade;

pub use proxies::of_proxy;
use proxies::{cancel_proxies, of_proxies};
use upgrade::cancel_upgrade;
pub use upgrade::of_upgrade;

use crate::{
    failover, provision, replace,
    spec::{FailoverPhase, NodeReplacement, Phase, ReplacePhase, Spec, Task},
    switchover,
    upgrade::UpgradePhase,
};

/// What becomes of what a step did, when the task does not go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Undo {
    /// It is put back, in this way.
    By(&'static str),
    /// It is not, for this reason.
    No(&'static str),
}

/// Whether a cancel is honoured in a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cancel {
    /// The task ends without effect.
    Honoured,
    /// Refused, in these words.
    Refused(&'static str),
}

/// One step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// The phase, as records and users name it.
    pub name: &'static str,
    /// What must be so before it.
    pub precheck: &'static str,
    /// What is done.
    pub act: &'static str,
    /// How it is known that it is done.
    pub verify: &'static str,
    /// What puts it back.
    pub undo: Undo,
    /// For how long it waits; `None`: for as long as it takes.
    pub deadline_ms: Option<u64>,
    /// Whether a cancel is honoured in it.
    pub cancel: Cancel,
}

const PAST: Cancel =
    Cancel::Refused("the task is past its point of no return and will finish or turn back itself");
const OVER: Cancel = Cancel::Refused("the task has ended");
const NOTHING: &str = "nothing was changed";

/// An ended part: nothing is done in it.
const fn ended(name: &'static str, verify: &'static str, undo: Undo) -> Row {
    Row {
        name,
        precheck: "",
        act: "",
        verify,
        undo,
        deadline_ms: None,
        cancel: OVER,
    }
}

/// Of a switchover.
#[must_use]
pub fn of_switchover(phase: Phase) -> Row {
    let name = phase.name();
    match phase {
        Phase::Preflight => Row {
            name,
            precheck: "both nodes run and report, the target is in sync and lags at most 1 MiB",
            act: "look",
            verify: "the shard is fit to switch",
            undo: Undo::By(NOTHING),
            deadline_ms: Some(switchover::PREFLIGHT_MS_MAX),
            cancel: Cancel::Honoured,
        },
        Phase::Prewarm => Row {
            name,
            precheck: "primary and epoch are those that were admitted",
            act: "make the next epoch's replication users on the target",
            verify: "its agent says so, and the shard is still fit",
            undo: Undo::By("the users have no effect before their epoch begins"),
            deadline_ms: None,
            cancel: Cancel::Honoured,
        },
        Phase::Hold => Row {
            name,
            precheck: "no other shard of the task is in its hold",
            act: "the record says so, proxies hold, the old primary's agent fences and fails over",
            verify: "the record has the next epoch",
            undo: Undo::By("the record and the rights are given back to the old primary"),
            deadline_ms: Some(switchover::HANDOVER_MS_MAX),
            cancel: PAST,
        },
        Phase::Resolve => Row {
            name,
            precheck: "the hand-over failed half way, or its outcome is not known",
            act: "observe both nodes, then commit or take back",
            verify: "one of them is the primary of the record, and serves",
            undo: Undo::By("the old primary takes its rights back"),
            deadline_ms: None,
            cancel: PAST,
        },
        Phase::Settle => Row {
            name,
            precheck: "the record has the next epoch",
            act: "grants, replicas and proxies follow the record",
            verify: "each of them reports the epoch",
            undo: Undo::No("the target has taken writes; another switchover goes back"),
            deadline_ms: Some(switchover::SETTLE_MS_MAX),
            cancel: PAST,
        },
        Phase::Done => ended(
            name,
            "the target is the primary, the old epoch is revoked",
            Undo::No("another switchover goes back"),
        ),
        Phase::RolledBack => ended(name, "the old primary serves on", Undo::By(NOTHING)),
    }
}

/// Of a failover.
#[must_use]
pub fn of_failover(phase: FailoverPhase) -> Row {
    const NO_PRIMARY: Cancel = Cancel::Refused(
        "a failover can't be cancelled: the lost primary's epoch is over, and the shard needs \
         another primary",
    );
    const NO_WAY_BACK: Undo = Undo::No("the lost primary's epoch is over");
    let row = |precheck, act, verify, deadline_ms| Row {
        name: phase.name(),
        precheck,
        act,
        verify,
        undo: NO_WAY_BACK,
        deadline_ms,
        cancel: NO_PRIMARY,
    };
    match phase {
        FailoverPhase::Fence => row(
            "the primary is declared lost",
            "take its credentials, or let its host's lease run out",
            "its process has ended, or has no user, or has no lease, or an operator says so",
            Some(failover::FENCE_MS_MAX),
        ),
        FailoverPhase::Choose => row(
            "the lost primary takes no more writes",
            "detach the replicas and choose the one with most of the data",
            "its offset is final, and it has every acknowledged write of durable mode",
            Some(failover::CHOOSE_MS_MAX),
        ),
        FailoverPhase::Promote => row(
            "the record names the target and its process",
            "its agent promotes it",
            "its agent says that it is a primary",
            Some(failover::TRY_MS_MAX),
        ),
        FailoverPhase::Settle => row(
            "the record has the target as the primary",
            "grants, replicas and proxies follow the record",
            "each of them reports the epoch",
            Some(failover::SETTLE_MS_MAX),
        ),
        FailoverPhase::Parked => row(
            "nobody can be promoted without loss",
            "wait for a node that can, or for an operator's word",
            "somebody can be promoted",
            None,
        ),
        FailoverPhase::Done => ended(phase.name(), "the target is the primary", NO_WAY_BACK),
    }
}

/// Writes the row of one phase; what differs between phases is all that is said of each.
fn rows(
    name: &'static str,
) -> impl Fn(&'static str, &'static str, &'static str, Undo, Option<u64>, Cancel) -> Row {
    move |precheck, act, verify, undo, deadline_ms, cancel| Row {
        name,
        precheck,
        act,
        verify,
        undo,
        deadline_ms,
        cancel,
    }
}

/// Of a replacement; `turned_back`: the new node leaves again.
#[must_use]
pub fn of_replace(phase: ReplacePhase, turned_back: bool) -> Row {
    const BACK: Undo = Undo::By("the new node leaves again, the old one stays");
    const GONE: Undo = Undo::No("who leaves has lost its right to follow");
    let honoured = match turned_back {
        true => Cancel::Refused("the task turns back already: the new node leaves again"),
        false => Cancel::Honoured,
    };
    let row = rows(phase.name());
    match phase {
        ReplacePhase::Join => row(
            "the node is of the shard and no primary, the new host has a live agent",
            "write the new node into the shard's record",
            "the record has it",
            BACK,
            None,
            honoured,
        ),
        ReplacePhase::CatchUp => row(
            "the record has the new node",
            "its agent starts it, and it copies the primary's data",
            "it is in sync",
            BACK,
            Some(replace::CATCH_UP_MS_MAX),
            honoured,
        ),
        ReplacePhase::Leave => row(
            "somebody in sync has the leaving node's place",
            "the record says who leaves; its right to follow is taken",
            "the primary's agent reports that it has none",
            GONE,
            Some(replace::LEAVE_MS_MAX),
            PAST,
        ),
        ReplacePhase::Drain => row(
            "the leaving node can't confirm anything more",
            "wait for those that stay to have what it may have confirmed",
            "as many as durability asks for are at that offset",
            GONE,
            Some(replace::LEAVE_MS_MAX),
            PAST,
        ),
        ReplacePhase::Parked => row(
            "it was not done in time",
            "wait for what is missing, or for an operator's word",
            "it is there",
            BACK,
            None,
            Cancel::Refused("the task waits for an operator: resolve it by retry or undo"),
        ),
        ReplacePhase::Done => ended(
            phase.name(),
            "the shard has one of both",
            Undo::No("another replacement goes back"),
        ),
    }
}

/// The phase that records of provisions do not name: there is one.
const PROVISION: Row = Row {
    name: "Provision",
    precheck: "hosts were chosen at admission, and have live agents",
    act: "agents start nodes and proxies; the first epoch of each shard begins",
    verify: "every replica is in sync, every proxy has the topology",
    undo: Undo::By("once it has given up, by removing the instance"),
    deadline_ms: Some(provision::PROVISION_MS_MAX),
    cancel: Cancel::Refused("an instance that is being created is ended by DeleteInstance"),
};

/// As [`PROVISION`].
const DECOMMISSION: Row = Row {
    name: "Decommission",
    precheck: "no other task works on the instance",
    act: "agents stop proxies and nodes and remove their data",
    verify: "each agent says so; then the records go",
    undo: Undo::No("data is removed"),
    deadline_ms: Some(provision::DECOMMISSION_MS_MAX),
    cancel: Cancel::Refused("processes and data are being removed already"),
};

/// The steps of a kind of task, in order.
#[must_use]
pub fn of(spec: &Spec) -> Vec<Row> {
    match spec {
        Spec::Provision => vec![PROVISION],
        Spec::Decommission => vec![DECOMMISSION],
        Spec::Switchover(_) => SWITCHOVER.map(of_switchover).into(),
        Spec::Failover(_) => FAILOVER.map(of_failover).into(),
        Spec::Replace(one) => REPLACE
            .map(|phase| of_replace(phase, one.turned_back))
            .into(),
        Spec::Upgrade(_) => UpgradePhase::ALL.map(of_upgrade).into(),
        Spec::Proxies(changes) => of_proxies(changes),
    }
}

/// The steps that a task is in, one for each of its shards.
#[must_use]
pub fn current(spec: &Spec) -> Vec<Row> {
    match spec {
        Spec::Provision | Spec::Decommission => of(spec),
        Spec::Switchover(shards) => shards.iter().map(|s| of_switchover(s.phase)).collect(),
        Spec::Failover(failover) => vec![of_failover(failover.phase)],
        Spec::Replace(NodeReplacement {
            phase, turned_back, ..
        }) => vec![of_replace(*phase, *turned_back)],
        Spec::Upgrade(upgrade) => upgrade.shards.iter().map(|s| of_upgrade(s.phase)).collect(),
        Spec::Proxies(changes) => changes.proxies.iter().map(|p| of_proxy(p.phase)).collect(),
    }
}

/// Whether a cancel is honoured now, and why not.
#[must_use]
pub fn cancel(task: &Task) -> Cancel {
    if task.state.is_ended() && !task.is_parked() {
        return OVER;
    }
    if let Spec::Upgrade(upgrade) = &task.spec {
        return cancel_upgrade(upgrade);
    }
    if let Spec::Proxies(changes) = &task.spec {
        return cancel_proxies(changes);
    }
    let refused = current(&task.spec)
        .into_iter()
        .map(|row| match row.cancel {
            // A shard that has moved already can't be cancelled with the rest.
            OVER => PAST,
            other => other,
        })
        .find(|cancel| *cancel != Cancel::Honoured);
    refused.unwrap_or(Cancel::Honoured)
}

const SWITCHOVER: [Phase; 7] = [
    Phase::Preflight,
    Phase::Prewarm,
    Phase::Hold,
    Phase::Resolve,
    Phase::Settle,
    Phase::Done,
    Phase::RolledBack,
];
const FAILOVER: [FailoverPhase; 6] = [
    FailoverPhase::Fence,
    FailoverPhase::Choose,
    FailoverPhase::Promote,
    FailoverPhase::Settle,
    FailoverPhase::Parked,
    FailoverPhase::Done,
];
const REPLACE: [ReplacePhase; 6] = [
    ReplacePhase::Join,
    ReplacePhase::CatchUp,
    ReplacePhase::Leave,
    ReplacePhase::Drain,
    ReplacePhase::Parked,
    ReplacePhase::Done,
];

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
