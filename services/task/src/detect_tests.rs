//! When a primary is lost, as short stories: who saw what, and whether that is enough.

use slotmesh_topology::{Epoch, NodeId, slot::split_evenly};

use super::*;
use crate::observe::{Fleet, ProxyView};

pub(crate) const NOW: u64 = 1_000_000;

/// A shard of three nodes, each on a host of its own, with two proxies, all well.
pub(crate) struct Stage {
    pub(crate) shard: Shard,
    pub(crate) fleet: Fleet,
    pub(crate) sightings: Sightings,
    pub(crate) durability: u32,
    pub(crate) now_ms: u64,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let names = ["a", "b", "c"];
        let role = |name: &str| match name {
            "a" => NodeRole::Primary,
            _ => NodeRole::Replica,
        };
        let member = |name: &str| Member {
            node: name.into(),
            host: format!("host-{name}").into(),
            role: role(name),
            run_id: format!("run-{name}"),
            address: format!("{name}:1"),
            in_sync: true,
            priority: slotmesh_topology::PRIORITY,
            leaving: false,
            engine: String::new(),
            exchange: None,
        };
        let shard = Shard {
            instance: "r".into(),
            id: "0".into(),
            index: 0,
            slots: split_evenly(1),
            epoch: Epoch(4),
            primary: "a".into(),
            members: names.map(member).to_vec(),
            mode: Mode::Serving,
            closed_epoch: Epoch(3),
            departures: Vec::new(),
            roster: Default::default(),
        };
        let mut fleet = Fleet::default();
        for name in names {
            let seen = NodeView {
                state: ProcessState::Running,
                run_id: format!("run-{name}"),
                address: format!("{name}:1"),
                role: Some(role(name)),
                link_up: true,
                following: "a:1".into(),
                failover_idle: true,
                keys: 9,
                offset: 100,
                assigned_epoch: Epoch(4),
                seen_ms: NOW,
                ..NodeView::default()
            };
            fleet.nodes.insert(name.into(), seen);
            fleet.hosts.insert(format!("host-{name}").into());
            fleet.leases.insert(format!("host-{name}").into());
        }
        for name in ["p1", "p2"] {
            let proxy = ProxyView {
                instance: "r".into(),
                fresh: true,
                ..ProxyView::default()
            };
            fleet.proxies.insert(name.into(), proxy);
        }
        Self {
            shard,
            fleet,
            sightings: Sightings::default(),
            durability: 0,
            now_ms: NOW,
        }
    }

    pub(crate) fn node(&mut self, name: &str) -> &mut NodeView {
        self.fleet.nodes.get_mut(&NodeId::from(name)).unwrap()
    }

    pub(crate) fn member(&mut self, name: &str) -> &mut Member {
        let mut members = self.shard.members.iter_mut();
        members.find(|m| m.node.as_str() == name).unwrap()
    }

    /// Its process ends, and its agent sees that.
    pub(crate) fn end(&mut self, name: &str) {
        let seen = self.node(name);
        seen.exited_run_id = std::mem::take(&mut seen.run_id);
        seen.state = ProcessState::Stopped;
    }

    /// Its host is silent: no session, no lease.
    pub(crate) fn silence(&mut self, name: &str) {
        let host: HostId = format!("host-{name}").into();
        self.fleet.hosts.remove(&host);
        self.fleet.leases.remove(&host);
    }

    /// Its link to the primary breaks.
    pub(crate) fn cut(&mut self, name: &str) {
        self.node(name).link_up = false;
    }

    /// Time passes; everybody who has a session reports.
    pub(crate) fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        for member in &self.shard.members {
            if self.fleet.hosts.contains(&member.host)
                && let Some(seen) = self.fleet.nodes.get_mut(&member.node)
            {
                seen.seen_ms = self.now_ms;
            }
        }
        self.look();
    }

    pub(crate) fn look(&mut self) {
        let shards = [&self.shard];
        self.sightings.look(shards, &self.fleet, self.now_ms);
    }

    pub(crate) fn scene(&self) -> Scene<'_> {
        Scene {
            fleet: &self.fleet,
            sightings: &self.sightings,
            durability: self.durability,
            now_ms: self.now_ms,
        }
    }

    fn verdict(&mut self) -> Verdict {
        self.look();
        decide(&self.shard, self.scene())
    }

    fn is_lost(&mut self) -> Option<Option<FenceProof>> {
        match self.verdict() {
            Verdict::Lost(loss) => Some(loss.proof),
            Verdict::Fine | Verdict::Suspect { .. } => None,
        }
    }
}

const EXITED: Option<Option<FenceProof>> = Some(Some(FenceProof::Exited));
const LEASE: Option<Option<FenceProof>> = Some(Some(FenceProof::Lease));

#[test]
fn nothing_is_wrong_with_a_shard_that_is_well() {
    assert_eq!(Stage::new().verdict(), Verdict::Fine);
}

#[test]
fn one_who_saw_the_process_end_is_enough() {
    for state in [ProcessState::Stopped, ProcessState::Failed] {
        let mut stage = Stage::new();
        (stage.node("a").state, stage.node("a").run_id) = (state, String::new());
        assert_eq!(stage.is_lost(), EXITED, "{}", state.name());
    }
    let mut stage = Stage::new();
    stage.node("a").exited_run_id = "run-a".into();
    assert_eq!(stage.is_lost(), EXITED);
    let mut stage = Stage::new();
    stage.node("a").run_id = "another".into();
    assert_eq!(stage.is_lost(), EXITED);
}

#[test]
fn a_process_of_before_that_ended_says_nothing_of_this_one() {
    let mut stage = Stage::new();
    stage.node("a").exited_run_id = "of last week".into();
    assert_eq!(stage.verdict(), Verdict::Fine);
    // An agent that has just started has not looked yet.
    (stage.node("a").state, stage.node("a").run_id) = (ProcessState::Starting, String::new());
    assert_eq!(stage.verdict(), Verdict::Fine);
}

#[test]
fn no_failover_when_only_the_agent_is_dead() {
    let mut stage = Stage::new();
    stage.silence("a");
    for _ in 0..100 {
        stage.pass(100);
        assert!(matches!(stage.verdict(), Verdict::Suspect { .. }));
    }
}

#[test]
fn a_silent_host_is_believed_with_a_replica_that_misses_its_primary() {
    let mut stage = Stage::new();
    stage.silence("a");
    stage.cut("b");
    stage.look();
    let guarded = stage.verdict();
    let until_ms = NOW + LEASE_GUARD_MS;
    assert!(matches!(guarded, Verdict::Suspect { until_ms: at, .. } if at == until_ms));
    stage.pass(LEASE_GUARD_MS);
    // Cut off only now: a primary without agent may still be taking writes.
    let missed = stage.verdict();
    let until_ms = NOW + MISSED_MS_MIN;
    assert!(matches!(missed, Verdict::Suspect { until_ms: at, .. } if at == until_ms));
    stage.pass(MISSED_MS_MIN - LEASE_GUARD_MS);
    assert_eq!(stage.is_lost(), LEASE);
}

#[test]
fn a_replica_that_has_heard_nothing_for_long_is_a_witness() {
    let mut stage = Stage::new();
    stage.silence("a");
    stage.node("b").link_silent_s = LINK_SILENT_S_MIN - 1;
    stage.pass(0);
    stage.pass(LEASE_GUARD_MS);
    assert_eq!(stage.is_lost(), None);
    stage.node("b").link_silent_s = LINK_SILENT_S_MIN;
    assert_eq!(stage.is_lost(), LEASE);
}

#[test]
fn a_replica_that_is_silent_itself_or_never_was_in_sync_is_no_witness() {
    let mut stage = Stage::new();
    stage.silence("a");
    stage.cut("b");
    stage.member("b").in_sync = false;
    stage.cut("c");
    stage.node("c").run_id = "restarted".into();
    stage.pass(0);
    stage.pass(LEASE_GUARD_MS);
    assert_eq!(stage.is_lost(), None);
}

#[test]
fn a_replica_that_was_told_to_let_go_is_no_witness() {
    let mut stage = Stage::new();
    stage.silence("a");
    stage.cut("b");
    stage.member("b").leaving = true;
    stage.pass(0);
    stage.pass(LEASE_GUARD_MS);
    assert_eq!(stage.is_lost(), None);
}

#[test]
fn a_third_of_the_proxies_are_a_witness() {
    let mut stage = Stage::new();
    for name in ["p3", "p4"] {
        let proxy = stage.fleet.proxies.values().next().unwrap().clone();
        stage.fleet.proxies.insert(name.into(), proxy);
    }
    stage.silence("a");
    stage.pass(0);
    stage.pass(LEASE_GUARD_MS);
    for (proxy, lost) in [("p1", None), ("p2", LEASE)] {
        let view = stage.fleet.proxies.get_mut(&proxy.into()).unwrap();
        view.troubles.insert("0".into(), (Epoch(4), TROUBLE_MS_MIN));
        assert_eq!(stage.is_lost(), lost, "{proxy}");
    }
    for view in stage.fleet.proxies.values_mut() {
        view.troubles.insert("0".into(), (Epoch(3), TROUBLE_MS_MIN));
    }
    assert_eq!(stage.is_lost(), None, "troubles with an earlier primary");
    for view in stage.fleet.proxies.values_mut() {
        let moment = TROUBLE_MS_MIN - 1;
        view.troubles.insert("0".into(), (Epoch(4), moment));
    }
    assert_eq!(stage.is_lost(), None, "connections that broke just now");
}

#[test]
fn a_host_that_came_back_is_counted_anew() {
    let mut stage = Stage::new();
    stage.cut("b");
    stage.pass(0);
    stage.pass(MISSED_MS_MIN);
    stage.fleet.leases.remove(&"host-a".into());
    stage.pass(0);
    stage.pass(LEASE_GUARD_MS - 1);
    stage.fleet.leases.insert("host-a".into());
    stage.pass(1);
    stage.fleet.leases.remove(&"host-a".into());
    stage.pass(1);
    stage.pass(LEASE_GUARD_MS - 1);
    assert_eq!(stage.is_lost(), None);
    stage.pass(1);
    assert_eq!(stage.is_lost(), LEASE);
}

#[test]
fn without_any_lease_nothing_is_known_of_hosts() {
    let mut stage = Stage::new();
    stage.fleet.leases.clear();
    stage.cut("b");
    stage.pass(0);
    stage.pass(10_000);
    assert_eq!(stage.verdict(), Verdict::Fine);
}

#[test]
fn a_process_that_hangs_is_lost_and_not_yet_fenced() {
    let mut stage = Stage::new();
    stage.node("a").unresponsive = true;
    assert_eq!(stage.is_lost(), Some(None));
    stage.node("a").seen_ms = NOW - REPORT_AGE_MS_MAX - 1;
    assert_eq!(stage.is_lost(), None, "an old report");
}

#[test]
fn nobody_is_declared_lost_when_nobody_can_take_over() {
    let unfit: [fn(&mut Stage, &str); 6] = [
        |s, n| s.member(n).in_sync = false,
        |s, n| s.member(n).role = NodeRole::ReadOnly,
        |s, n| s.node(n).run_id = "restarted".into(),
        |s, n| s.node(n).state = ProcessState::Stopped,
        |s, n| s.node(n).loading = true,
        |s, n| s.silence(n),
    ];
    for (case, unfit) in unfit.iter().enumerate() {
        let mut stage = Stage::new();
        stage.node("a").exited_run_id = "run-a".into();
        unfit(&mut stage, "b");
        assert_eq!(stage.is_lost(), EXITED, "c can, case {case}");
        unfit(&mut stage, "c");
        assert!(matches!(stage.verdict(), Verdict::Suspect { .. }), "{case}");
    }
}

#[test]
fn where_replicas_acknowledge_writes_they_are_asked_even_if_none_answers_now() {
    let mut stage = Stage::new();
    stage.durability = 1;
    stage.node("a").exited_run_id = "run-a".into();
    stage.silence("b");
    stage.silence("c");
    assert_eq!(stage.is_lost(), EXITED);
}

#[test]
fn hosts_that_fall_silent_together_brake_what_rests_on_silence_only() {
    let mut stage = Stage::new();
    stage.silence("a");
    stage.silence("b");
    stage.cut("c");
    stage.pass(0);
    stage.pass(60_000);
    let Verdict::Suspect { what, .. } = stage.verdict() else {
        panic!("a failover")
    };
    assert!(what.contains("2 of 3 hosts"), "{what}");
    stage.node("a").exited_run_id = "run-a".into();
    assert_eq!(stage.is_lost(), EXITED, "who saw it end is believed");
}

#[test]
fn hosts_that_fall_silent_one_after_the_other_do_not_brake() {
    let mut stage = Stage::new();
    stage.silence("b");
    stage.pass(BRAKE_WINDOW_MS + 1);
    stage.silence("a");
    stage.cut("c");
    stage.pass(BRAKE_WINDOW_MS + 1);
    stage.pass(MISSED_MS_MIN);
    assert_eq!(stage.is_lost(), LEASE);
}

#[test]
fn two_of_many_hosts_brake_only_if_whole_zones_are_gone() {
    for (zone, lost) in [("z1", LEASE), ("z9", None)] {
        let mut stage = Stage::new();
        for n in 0..20 {
            let host: HostId = format!("other-{n}").into();
            stage.fleet.leases.insert(host.clone());
            stage.fleet.zones.insert(host, "z1".into());
        }
        stage.fleet.zones.insert("host-a".into(), "z0".into());
        stage.fleet.zones.insert("host-b".into(), zone.into());
        stage.fleet.zones.insert("host-c".into(), "z1".into());
        stage.silence("a");
        stage.silence("b");
        stage.cut("c");
        // They stay known by the record.
        stage.pass(0);
        stage.pass(MISSED_MS_MIN);
        assert_eq!(stage.is_lost(), lost, "{zone}");
    }
}

#[test]
fn the_last_to_come_back_of_those_that_fell_silent_together_is_given_a_moment() {
    let mut stage = Stage::new();
    stage.silence("a");
    stage.silence("b");
    stage.cut("c");
    stage.pass(0);
    stage.pass(60_000);
    stage.fleet.leases.insert("host-b".into());
    stage.pass(BRAKE_RELEASE_MS - 1);
    assert_eq!(stage.is_lost(), None, "it may be back in a moment, too");
    stage.pass(1);
    assert_eq!(stage.is_lost(), LEASE, "it is alone by now");
}

#[test]
fn a_jump_of_the_clock_makes_nobody_gone_for_longer() {
    let mut stage = Stage::new();
    stage.silence("a");
    stage.look();
    stage.pass(LEASE_GUARD_MS - 1);
    for by_ms in [600_000, -900_000] {
        stage.now_ms = stage.now_ms.saturating_add_signed(by_ms);
        stage.sightings.shift(by_ms);
        let since_ms = stage.sightings.lease_gone_since(&"host-a".into());
        assert_eq!(since_ms, Some(stage.now_ms + 1 - LEASE_GUARD_MS));
    }
}
