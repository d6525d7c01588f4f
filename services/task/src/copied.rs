//! How much data a task has moved: from what nodes say of the data sets that they load, and of how far
//! they are behind.
//!
//! Invariant: what was counted as copied is not taken back when the node that copied it is done.

use slotmesh_topology::{NodeRole, Shard};

use crate::{
    observe::Fleet,
    spec::{Copied, Phase, Spec, Task},
};

/// Between two notes of one task.
pub const NOTE_MS_MIN: u64 = 2_000;
/// A note is worth this part of the whole.
const PART: u64 = 64;
/// A lag below this is gone before anybody reads of it.
const LAG_MIN: u64 = 64 * 1024;

/// What the task has moved, as is seen now.
#[must_use]
pub fn of(task: &Task, shards: &[Shard], fleet: &Fleet) -> Copied {
    let (mut done, mut total) = (0, 0);
    for shard in shards {
        for member in &shard.members {
            let is_ours = match &task.spec {
                Spec::Provision => member.role != NodeRole::Primary,
                Spec::Replace(replacement) => member.node == replacement.to,
                Spec::Upgrade(_) => {
                    member.exchange.is_some() || shard.roster.newcomers.contains(&member.node)
                }
                _ => false,
            };
            let seen = fleet.node(&member.node).filter(|_| is_ours);
            if let Some(seen) = seen.filter(|_| !member.in_sync) {
                done += seen.copied_bytes;
                total += seen.copy_total_bytes;
            }
        }
    }
    let old = task.copied;
    let lag = lag(task, shards, fleet);
    if total == 0 {
        // Whoever copied is done, or was not heard for a moment.
        let done = match is_in_sync(task, shards) {
            true => old.total,
            false => old.done,
        };
        return Copied {
            done,
            total: old.total,
            lag,
        };
    }
    Copied { done, total, lag }
}

fn is_in_sync(task: &Task, shards: &[Shard]) -> bool {
    let mut members = shards.iter().flat_map(|s| &s.members);
    members.all(|member| {
        let is_ours = match &task.spec {
            Spec::Replace(replacement) => member.node == replacement.to,
            _ => member.role != NodeRole::Primary,
        };
        !is_ours || member.in_sync
    })
}

/// Of all shards whose switch is not committed yet.
fn lag(task: &Task, shards: &[Shard], fleet: &Fleet) -> u64 {
    let Spec::Switchover(switches) = &task.spec else {
        return 0;
    };
    let open = switches.iter().filter(|s| s.phase < Phase::Settle);
    open.filter_map(|switch| {
        let shard = shards.iter().find(|s| s.id == switch.shard)?;
        let (old, new) = (fleet.node(&shard.primary)?, fleet.node(&switch.to)?);
        Some(old.offset.saturating_sub(new.offset))
    })
    .sum()
}

/// Whether so much has changed that it is written down.
#[must_use]
pub fn is_worth_an_event(task: &Task, now: Copied, now_ms: u64) -> bool {
    let old = task.copied;
    if now_ms < task.updated_ms + NOTE_MS_MIN {
        return false;
    }
    let is_new = now.total != old.total && old.total == 0;
    let is_all = now.done == now.total && old.done != now.done;
    let is_part = now.done.abs_diff(old.done) > now.total / PART;
    is_new || is_all || is_part || now.lag.abs_diff(old.lag) >= LAG_MIN
}

#[cfg(test)]
mod tests {
    use slotmesh_topology::{Epoch, Member, Mode};

    use super::*;
    use crate::{
        NodeView,
        spec::{ShardSwitch, State},
    };

    const MIB: u64 = 1 << 20;

    fn task(spec: Spec) -> Task {
        Task {
            id: "t".into(),
            instance: "r".into(),
            spec,
            state: State::Running,
            message: String::new(),
            created_ms: 0,
            updated_ms: 0,
            deadline_ms: 0,
            event_count: 0,
            cancel_requested: false,
            not_before_ms: 0,
            in_window: false,
            choice: None,
            trace_id: String::new(),
            copied: Copied::default(),
        }
    }

    fn shard() -> Shard {
        let member = |node: &str, role| Member {
            node: node.into(),
            host: "h".into(),
            role,
            run_id: String::new(),
            address: String::new(),
            in_sync: false,
            priority: slotmesh_topology::PRIORITY,
            leaving: false,
            engine: String::new(),
            exchange: None,
        };
        Shard {
            instance: "r".into(),
            id: "0".into(),
            index: 0,
            slots: slotmesh_topology::slot::split_evenly(1),
            epoch: Epoch(1),
            primary: "a".into(),
            members: vec![
                member("a", NodeRole::Primary),
                member("b", NodeRole::Replica),
            ],
            mode: Mode::Serving,
            closed_epoch: Epoch(0),
            departures: Vec::new(),
            roster: Default::default(),
        }
    }

    fn fleet(copied: u64, total: u64) -> Fleet {
        let mut fleet = Fleet::default();
        let primary = NodeView {
            offset: 10 * MIB,
            ..NodeView::default()
        };
        let replica = NodeView {
            offset: 9 * MIB,
            copied_bytes: copied,
            copy_total_bytes: total,
            ..NodeView::default()
        };
        fleet.nodes.insert("a".into(), primary);
        fleet.nodes.insert("b".into(), replica);
        fleet
    }

    #[test]
    fn a_copy_is_counted_while_it_lasts_and_stays_whole_when_it_is_done() {
        let mut task = task(Spec::Provision);
        let mut shard = shard();
        let half = of(&task, &[shard.clone()], &fleet(50 * MIB, 100 * MIB));
        assert_eq!((half.done, half.total, half.lag), (50 * MIB, 100 * MIB, 0));
        task.copied = half;
        let unheard = of(&task, &[shard.clone()], &fleet(0, 0));
        assert_eq!(unheard, half, "the file is in, and is being loaded");
        shard.members[1].in_sync = true;
        let whole = of(&task, &[shard], &fleet(0, 0));
        assert_eq!((whole.done, whole.total), (100 * MIB, 100 * MIB));
    }

    #[test]
    fn a_switchovers_lag_is_what_its_target_has_not_applied_until_it_is_committed() {
        let switch = |phase| ShardSwitch {
            shard: "0".into(),
            from: "a".into(),
            to: "b".into(),
            from_epoch: Epoch(1),
            phase,
            phase_since_ms: 0,
            message: String::new(),
            hold_us: 0,
            critical_us: 0,
        };
        let lag = |phase| {
            let task = task(Spec::Switchover(vec![switch(phase)]));
            of(&task, &[shard()], &fleet(0, 0)).lag
        };
        assert_eq!((lag(Phase::Preflight), lag(Phase::Settle)), (MIB, 0));
    }

    #[test]
    fn a_copy_of_any_length_leaves_a_bounded_number_of_events() {
        let mut task = task(Spec::Provision);
        let total = 1_000 * MIB;
        let mut noted = 0;
        for step in 0..=1_000 {
            let done = step * MIB;
            let now = Copied {
                done,
                total,
                lag: 0,
            };
            let now_ms = step * NOTE_MS_MIN + NOTE_MS_MIN;
            if is_worth_an_event(&task, now, now_ms) {
                (task.copied, task.updated_ms) = (now, now_ms);
                noted += 1;
            }
        }
        assert!((32..=66).contains(&noted), "{noted}");
        assert_eq!(task.copied.done, total, "the end is noted");
    }
}
