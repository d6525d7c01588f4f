//! The steps of an upgrade.

use super::{Cancel, OVER, Row, Undo, ended, rows};
use crate::{
    switchover,
    upgrade::{NODE_MS_MAX, ShardUpgrade, Upgrade, UpgradePhase},
};

const NODES: Undo =
    Undo::By("the replicas get the old engine back, one after the other; new nodes leave");
const NOTHING: Undo = Undo::By("nothing was changed");
const GONE: Undo = Undo::No("no node follows with the old engine any more: nothing leads back");
const BACK: Cancel = Cancel::Refused("the shard goes back already");
const FORWARD: Cancel =
    Cancel::Refused("the way back is closed: the shard will be finished with the new engine");

/// Of an upgrade.
#[must_use]
pub fn of_upgrade(phase: UpgradePhase) -> Row {
    let row = rows(phase.name());
    match phase {
        UpgradePhase::Stage => row(
            "the table of releases allows it",
            "hosts fetch the engine and try it on a copy of the node's data",
            "its sum and version are right, and it has loaded every key",
            NOTHING,
            None,
            Cancel::Honoured,
        ),
        UpgradePhase::Ready => row(
            "every host has tried the engine",
            "wait for the time, and for the shards that come first",
            "it is the shard's turn",
            NOTHING,
            None,
            Cancel::Honoured,
        ),
        UpgradePhase::Replicas => row(
            "as many other replicas as durability asks for are in sync",
            "one replica after the other gets a process of the new engine, or a new node joins with it",
            "it is in sync, has every key and has refused no command",
            NODES,
            Some(NODE_MS_MAX),
            Cancel::Honoured,
        ),
        UpgradePhase::Bake => row(
            "an upgraded node is the primary, the old one follows as it is",
            "wait, and watch whether one can go back",
            "the time is over, or an operator says so",
            Undo::By("a switchover to the old primary; then the replicas get the old engine back"),
            None,
            Cancel::Honoured,
        ),
        UpgradePhase::Finalize => row(
            "the way back is closed",
            "the old primary gets a process of the new engine, or leaves with all that new nodes replace",
            "it is in sync, or nobody feeds it",
            GONE,
            Some(NODE_MS_MAX),
            FORWARD,
        ),
        UpgradePhase::Switch | UpgradePhase::Preserve | UpgradePhase::SwitchBack => switch(phase),
        UpgradePhase::UndoNodes => row(
            "the primary runs the old engine",
            "one replica after the other gets a process of the old engine, or leaves if it is new",
            "it is in sync, or nobody feeds it",
            NODES,
            Some(NODE_MS_MAX),
            BACK,
        ),
        UpgradePhase::Parked => row(
            "it was not done in time, or the engine does not start",
            "wait for an operator's word",
            "it is given",
            NODES,
            None,
            Cancel::Refused("the task waits for an operator: resolve it by retry or undo"),
        ),
        UpgradePhase::Done => ended(phase.name(), "every node runs the engine", GONE),
        UpgradePhase::RolledBack => {
            ended(phase.name(), "every node runs what it ran before", NOTHING)
        }
    }
}

/// The phases with a switchover in them.
fn switch(phase: UpgradePhase) -> Row {
    let (precheck, act, undo, cancel) = match phase {
        UpgradePhase::Preserve => (
            "every node runs the engine",
            "a switchover to the old primary",
            GONE,
            FORWARD,
        ),
        UpgradePhase::SwitchBack => (
            "the way back is open",
            "a switchover to the old primary",
            NODES,
            BACK,
        ),
        _ => (
            "every replica runs the engine and is in sync",
            "a switchover to one of them",
            NODES,
            Cancel::Honoured,
        ),
    };
    Row {
        name: phase.name(),
        precheck,
        act,
        verify: "the record has the next epoch",
        undo,
        deadline_ms: Some(switchover::PREFLIGHT_MS_MAX),
        cancel,
    }
}

/// A cancel is for every shard that it can still be for; those that are done stay so.
pub(super) fn cancel_upgrade(upgrade: &Upgrade) -> Cancel {
    let is_closed = |s: &ShardUpgrade| {
        s.phase == UpgradePhase::Bake && s.rollback.as_ref().is_none_or(|r| !r.open)
    };
    let rows = upgrade.shards.iter().map(|s| match is_closed(s) {
        true => FORWARD,
        false => of_upgrade(s.phase).cancel,
    });
    let mut refused = OVER;
    for cancel in rows {
        match cancel {
            Cancel::Honoured => return cancel,
            OVER => {}
            Cancel::Refused(_) => refused = cancel,
        }
    }
    refused
}
