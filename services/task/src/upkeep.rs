//! Keeping a shard's record true while it serves: run ids of restarted processes, addresses, and
//! who is in sync.
//!
//! **Invariant:** the process of the primary is exchanged only together with the epoch, and never
//! for an empty one while a replica holds data, or may hold some.

use slotmesh_topology::{Mode, NodeId, NodeRole, Shard};

use crate::{
    detect::{self, Scene, Verdict},
    observe::{NodeView, ProcessState},
};

/// How long a primary must be seen well after a replica has lost it before the replica is not in sync
/// any more: longer than an agent takes to notice that its process has ended, and to say so.
pub const BLAME_MS: u64 = 1_000;

/// The record that should be written instead of `shard`, and why; `None` when it is true as it is.
#[must_use]
pub fn decide(shard: &Shard, scene: Scene<'_>) -> Option<(Shard, String)> {
    // A fenced shard is looked at again: an operator may have restored the primary's data.
    if !matches!(shard.mode, Mode::Serving | Mode::Fenced(_)) {
        return None;
    }
    let fleet = scene.fleet;
    if let Some(change) = restarted_primary(shard, scene) {
        return Some(change);
    }
    if shard.mode != Mode::Serving {
        return None;
    }
    let primary_address = shard.primary_member()?.address.clone();
    let mut next = shard.clone();
    let mut reasons = Vec::new();
    let mut settled = Vec::new();
    for member in &mut next.members {
        // One that leaves follows nobody any more, as it is told.
        if member.node == shard.primary || member.leaving {
            continue;
        }
        let Some(seen) = fleet.node(&member.node) else {
            continue;
        };
        if seen.state != ProcessState::Running || seen.run_id.is_empty() {
            if member.in_sync && seen.state != ProcessState::Unknown {
                member.in_sync = false;
                reasons.push(format!("{} is {}", member.node, seen.state.name()));
            }
            continue;
        }
        if seen.run_id != member.run_id || seen.address != member.address {
            if !member.run_id.is_empty() {
                settled.push(member.node.clone());
            }
            seen.run_id.clone_into(&mut member.run_id);
            seen.address.clone_into(&mut member.address);
            member.in_sync = false;
            reasons.push(format!("{} has a new process", member.node));
            continue;
        }
        let in_sync = seen.follows(&primary_address) && member.exchange.is_none() && !seen.settling;
        if member.in_sync && !in_sync && !is_its_own_fault(shard, &member.node, scene) {
            continue;
        }
        if in_sync != member.in_sync {
            member.in_sync = in_sync;
            settled.push(member.node.clone());
            let word = if in_sync {
                "is in sync"
            } else {
                "is not in sync"
            };
            reasons.push(format!("{} {word}", member.node));
        }
    }
    for node in settled {
        next = next.settle(&node);
    }
    for gone in &shard.roster.gone {
        let seen = fleet.node(&gone.node);
        if seen.is_some_and(|n| n.state == ProcessState::Removed) {
            next = next.forget(&gone.node);
            reasons.push(format!("{} is removed from {}", gone.node, gone.host));
        }
    }
    (!reasons.is_empty()).then(|| (next, reasons.join("; ")))
}

/// Whether a replica that does not follow is to blame, rather than its primary: the primary was seen
/// well for a while after the replica lost it. A primary that dies must not take the right to be
/// promoted from its replicas with it, whichever report comes first.
fn is_its_own_fault(shard: &Shard, replica: &NodeId, scene: Scene<'_>) -> bool {
    let primary = shard.primary_member();
    let Some(primary) = primary.and_then(|m| detect::alive(m, scene)) else {
        return false;
    };
    if detect::judge(shard, scene) != Verdict::Fine {
        return false;
    }
    match scene.sightings.link_down_since(replica) {
        Some(since) => primary.seen_ms >= since + BLAME_MS,
        // Its link is up: it is loading, or follows another node. A link that has gone down since the
        // last look is nobody's fault yet.
        None => scene.fleet.node(replica).is_some_and(|seen| seen.link_up),
    }
}

/// The primary's process is another one than the record names: admit it as a new epoch, or, when
/// it has come up empty while a replica holds data, fence the shard for an operator to decide.
/// As long as it is not known whether a replica holds data, an empty process is not admitted:
/// following it would empty the replica. One that never was in sync is not waited for: nobody counts on
/// what it has, and it may never start.
fn restarted_primary(shard: &Shard, scene: Scene<'_>) -> Option<(Shard, String)> {
    let fleet = scene.fleet;
    let member = shard.primary_member()?;
    let seen = fleet.node(&shard.primary)?;
    let is_ready = seen.state == ProcessState::Running
        && !seen.loading
        && !seen.run_id.is_empty()
        && seen.role == Some(NodeRole::Primary);
    if !is_ready || seen.run_id == member.run_id {
        return None;
    }
    // A replica that has what the lost process had takes its place.
    if detect::can_fail_over(shard, scene) {
        return None;
    }
    if seen.keys == 0 && others(shard).any(|m| fleet.node(m).is_some_and(|n| n.keys > 0)) {
        if shard.mode != Mode::Serving {
            return None;
        }
        let reason = format!(
            "{} was restarted without its data while a replica has some: copy the replica's data \
             into the node's directory and restart its process; the shard serves when it has keys",
            shard.primary
        );
        return Some((
            Shard {
                mode: Mode::Fenced(reason.clone()),
                ..shard.clone()
            },
            reason,
        ));
    }
    let mut settled = others(shard).filter(|m| !shard.roster.newcomers.contains(m));
    if seen.keys == 0 && !settled.all(|m| fleet.node(m).is_some_and(has_loaded)) {
        return None;
    }
    let mut next = shard.readmit(&seen.run_id).ok()?;
    for member in &mut next.members {
        if member.node == shard.primary {
            seen.address.clone_into(&mut member.address);
        }
    }
    Some((
        next,
        format!("{} was restarted with its data", shard.primary),
    ))
}

fn others(shard: &Shard) -> impl Iterator<Item = &NodeId> {
    let nodes = shard.members.iter().map(|m| &m.node);
    nodes.filter(|node| **node != shard.primary)
}

/// Its number of keys is that of its data: a process that is starting or loading shows fewer.
fn has_loaded(seen: &NodeView) -> bool {
    seen.state == ProcessState::Running && !seen.loading && !seen.run_id.is_empty()
}

#[cfg(test)]
mod tests {
    use slotmesh_topology::{Epoch, Member, slot::split_evenly};

    use super::*;
    use crate::{detect::Sightings, observe::Fleet};

    const NOW: u64 = 1_000_000;

    /// What is written when nothing was seen before.
    fn kept(shard: &Shard, fleet: &Fleet) -> Option<(Shard, String)> {
        kept_at(shard, fleet, &mut Sightings::default(), NOW)
    }

    fn kept_at(
        shard: &Shard,
        fleet: &Fleet,
        sightings: &mut Sightings,
        now_ms: u64,
    ) -> Option<(Shard, String)> {
        sightings.look([shard], fleet, now_ms);
        let scene = Scene {
            fleet,
            sightings,
            durability: 0,
            now_ms,
        };
        decide(shard, scene)
    }

    /// Nobody could take over from the primary.
    fn alone() -> Shard {
        let mut shard = shard();
        shard.members[1].in_sync = false;
        shard
    }

    fn shard() -> Shard {
        let member = |node: &str, role| Member {
            node: node.into(),
            host: "h".into(),
            role,
            run_id: format!("run-{node}"),
            address: format!("{node}:1"),
            in_sync: true,
            priority: slotmesh_topology::PRIORITY,
            leaving: false,
            engine: String::new(),
            exchange: None,
        };
        Shard {
            instance: "r".into(),
            id: "0".into(),
            index: 0,
            slots: split_evenly(1),
            epoch: Epoch(4),
            primary: "a".into(),
            members: vec![
                member("a", NodeRole::Primary),
                member("b", NodeRole::Replica),
            ],
            mode: Mode::Serving,
            closed_epoch: Epoch(3),
            departures: Vec::new(),
            roster: Default::default(),
        }
    }

    fn fleet(keys: u64) -> Fleet {
        let node = |name: &str, role| NodeView {
            state: ProcessState::Running,
            run_id: format!("run-{name}"),
            address: format!("{name}:1"),
            role: Some(role),
            link_up: true,
            following: "a:1".into(),
            keys,
            seen_ms: NOW,
            ..NodeView::default()
        };
        let mut fleet = Fleet::default();
        fleet.hosts.insert("h".into());
        fleet.nodes.insert("a".into(), node("a", NodeRole::Primary));
        fleet.nodes.insert("b".into(), node("b", NodeRole::Replica));
        fleet
    }

    #[test]
    fn a_true_record_is_left_alone() {
        assert_eq!(kept(&shard(), &fleet(1)), None);
    }

    #[test]
    fn a_restarted_replica_is_named_and_must_catch_up_again() {
        let mut fleet = fleet(1);
        fleet.nodes.get_mut(&"b".into()).unwrap().run_id = "new".into();
        let (named, _) = kept(&shard(), &fleet).unwrap();
        assert_eq!((named.epoch, &*named.members[1].run_id), (Epoch(4), "new"));
        assert!(!named.members[1].in_sync);
        let (synced, _) = kept(&named, &fleet).unwrap();
        assert!(synced.members[1].in_sync);
    }

    #[test]
    fn a_restarted_primary_is_a_new_epoch() {
        let mut fleet = fleet(1);
        fleet.nodes.get_mut(&"a".into()).unwrap().run_id = "new".into();
        let (next, _) = kept(&alone(), &fleet).unwrap();
        assert_eq!((next.epoch, &*next.members[0].run_id), (Epoch(5), "new"));
    }

    #[test]
    fn an_empty_restarted_primary_never_feeds_replicas_with_data() {
        let mut fleet = fleet(1);
        let primary = fleet.nodes.get_mut(&"a".into()).unwrap();
        (primary.run_id, primary.keys) = ("new".into(), 0);
        let (next, _) = kept(&alone(), &fleet).unwrap();
        assert!(matches!(next.mode, Mode::Fenced(_)));
        assert_eq!(next.epoch, Epoch(4));
    }

    #[test]
    fn an_empty_restarted_primary_waits_until_every_replica_has_shown_its_data() {
        let mut fleet = fleet(0);
        fleet.nodes.get_mut(&"a".into()).unwrap().run_id = "new".into();
        let replica = fleet.nodes.remove(&"b".into()).unwrap();
        assert_eq!(kept(&alone(), &fleet), None, "not reported yet");
        for unknown in [
            NodeView {
                state: ProcessState::Starting,
                ..replica.clone()
            },
            NodeView {
                loading: true,
                ..replica.clone()
            },
        ] {
            fleet.nodes.insert("b".into(), unknown);
            let record = kept(&alone(), &fleet).map_or(alone(), |(next, _)| next);
            assert_eq!(
                (record.epoch, &*record.members[0].run_id),
                (Epoch(4), "run-a")
            );
        }
        fleet.nodes.insert("b".into(), replica);
        let (next, _) = kept(&alone(), &fleet).unwrap();
        assert_eq!((next.epoch, next.mode), (Epoch(5), Mode::Serving));
    }

    #[test]
    fn an_only_node_that_restarts_empty_does_not_wait_for_a_newcomer_that_shows_nothing() {
        let mut fleet = fleet(0);
        fleet.nodes.get_mut(&"a".into()).unwrap().run_id = "new".into();
        let newcomer = fleet.nodes.remove(&"b".into()).unwrap();
        let mut shard = alone();
        shard.roster.newcomers.push("b".into());
        let (next, _) = kept(&shard, &fleet).unwrap();
        assert_eq!((next.epoch, next.mode), (Epoch(5), Mode::Serving));
        let full = NodeView {
            keys: 1,
            ..newcomer
        };
        fleet.nodes.insert("b".into(), full);
        let (next, _) = kept(&shard, &fleet).unwrap();
        assert!(matches!(next.mode, Mode::Fenced(_)), "it has shown data");
    }

    #[test]
    fn a_fenced_shard_serves_again_once_its_primary_has_data() {
        let mut fleet = fleet(1);
        let primary = fleet.nodes.get_mut(&"a".into()).unwrap();
        (primary.run_id, primary.keys) = ("new".into(), 0);
        let (fenced, _) = kept(&alone(), &fleet).unwrap();
        assert_eq!(kept(&fenced, &fleet), None, "written once");
        let primary = fleet.nodes.get_mut(&"a".into()).unwrap();
        (primary.run_id, primary.keys) = ("restored".into(), 7);
        let (next, _) = kept(&fenced, &fleet).unwrap();
        assert_eq!((next.epoch, &next.mode), (Epoch(5), &Mode::Serving));
        assert_eq!(next.members[0].run_id, "restored");
    }

    #[test]
    fn nothing_is_touched_during_a_handover() {
        let mut fleet = fleet(1);
        fleet.nodes.get_mut(&"b".into()).unwrap().link_up = false;
        let handover = slotmesh_topology::Handover {
            task: "t".into(),
            target: "b".into(),
            token: "x".into(),
            deadline_unix_ms: 0,
            max_hold_ms: 0,
        };
        assert_eq!(kept(&shard().declare(handover).unwrap(), &fleet), None);
    }

    #[test]
    fn a_restarted_primary_is_not_taken_back_while_a_replica_can_take_over() {
        let mut fleet = fleet(1);
        fleet.nodes.get_mut(&"a".into()).unwrap().run_id = "new".into();
        assert_eq!(kept(&shard(), &fleet), None);
        fleet.nodes.get_mut(&"b".into()).unwrap().state = ProcessState::Stopped;
        let (next, _) = kept(&shard(), &fleet).unwrap();
        assert_eq!(next.epoch, Epoch(5), "there is nobody else");
    }

    #[test]
    fn a_dying_primary_leaves_its_replicas_in_sync_whichever_report_comes_first() {
        let mut fleet = fleet(1);
        let mut sightings = Sightings::default();
        let lost = fleet.nodes.get_mut(&"b".into()).unwrap();
        lost.link_up = false;
        assert_eq!(kept_at(&shard(), &fleet, &mut sightings, NOW), None);
        // Seen well once more, from before it died.
        fleet.nodes.get_mut(&"a".into()).unwrap().seen_ms = NOW + 100;
        assert_eq!(kept_at(&shard(), &fleet, &mut sightings, NOW + 100), None);
        let primary = fleet.nodes.get_mut(&"a".into()).unwrap();
        (primary.state, primary.seen_ms) = (ProcessState::Stopped, NOW + 200);
        assert_eq!(kept_at(&shard(), &fleet, &mut sightings, NOW + 5_000), None);
    }

    #[test]
    fn a_link_that_went_down_since_the_last_look_is_nobodys_fault_yet() {
        let mut fleet = fleet(1);
        let mut sightings = Sightings::default();
        sightings.look([&shard()], &fleet, NOW);
        // Reported after the look, before the decision.
        fleet.nodes.get_mut(&"b".into()).unwrap().link_up = false;
        let scene = Scene {
            fleet: &fleet,
            sightings: &sightings,
            durability: 0,
            now_ms: NOW,
        };
        assert_eq!(decide(&shard(), scene), None);
    }

    #[test]
    fn a_silent_primary_leaves_its_replicas_in_sync() {
        let mut fleet = fleet(1);
        let mut sightings = Sightings::default();
        for (node, seen) in &mut fleet.nodes {
            seen.link_up = false;
            if node.as_str() == "b" {
                seen.seen_ms = NOW + 60_000;
            }
        }
        kept_at(&shard(), &fleet, &mut sightings, NOW);
        assert_eq!(
            kept_at(&shard(), &fleet, &mut sightings, NOW + 60_000),
            None
        );
    }

    #[test]
    fn a_replica_that_loses_a_primary_that_is_well_is_not_in_sync() {
        let mut fleet = fleet(1);
        let mut sightings = Sightings::default();
        fleet.nodes.get_mut(&"b".into()).unwrap().link_up = false;
        kept_at(&shard(), &fleet, &mut sightings, NOW);
        for seen in fleet.nodes.values_mut() {
            seen.seen_ms = NOW + BLAME_MS;
        }
        let (next, why) = kept_at(&shard(), &fleet, &mut sightings, NOW + BLAME_MS).unwrap();
        assert!(!next.members[1].in_sync, "{why}");
    }
}
