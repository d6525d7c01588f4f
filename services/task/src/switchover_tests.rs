//! The switchover's decisions, as short stories: what is seen, what is done next.

use slotmesh_topology::{Epoch, Handover, Member, Mode, NodeRole, Shard, slot::split_evenly};

use super::*;
use crate::observe::{HoldLevel, ProxyView};

const NOW: u64 = 1_000_000;

fn shard() -> Shard {
    let member = |node: &str, port, role| Member {
        node: node.into(),
        host: format!("host-{node}").into(),
        role,
        run_id: format!("run-{node}"),
        address: format!("127.0.0.1:{port}"),
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
            member("a", 1, NodeRole::Primary),
            member("b", 2, NodeRole::Replica),
        ],
        mode: Mode::Serving,
        closed_epoch: Epoch(3),
        departures: Vec::new(),
        roster: Default::default(),
    }
}

fn declared() -> Shard {
    let handover = Handover {
        task: "t".into(),
        target: "b".into(),
        token: "x".into(),
        deadline_unix_ms: NOW + HANDOVER_MS_MAX,
        max_hold_ms: HOLD_MS_MAX,
    };
    shard().declare(handover).unwrap()
}

fn fleet() -> Fleet {
    let node = |name: &str, port, role| NodeView {
        state: ProcessState::Running,
        run_id: format!("run-{name}"),
        address: format!("127.0.0.1:{port}"),
        role: Some(role),
        failover_idle: true,
        seen_ms: NOW,
        ..NodeView::default()
    };
    let mut fleet = Fleet::default();
    let old = NodeView {
        granted_epoch: Epoch(4),
        ..node("a", 1, NodeRole::Primary)
    };
    let new = NodeView {
        link_up: true,
        following: "127.0.0.1:1".into(),
        ..node("b", 2, NodeRole::Replica)
    };
    fleet.nodes.insert("a".into(), old);
    fleet.nodes.insert("b".into(), new);
    fleet.hosts.extend(["host-a".into(), "host-b".into()]);
    for name in ["p1", "p2"] {
        let proxy = ProxyView {
            instance: "r".into(),
            fresh: true,
            ..ProxyView::default()
        };
        fleet.proxies.insert(name.into(), proxy);
    }
    fleet
}

fn at(phase: Phase) -> ShardSwitch {
    ShardSwitch {
        shard: "0".into(),
        from: "a".into(),
        to: "b".into(),
        from_epoch: Epoch(4),
        phase,
        phase_since_ms: NOW - 10,
        message: String::new(),
        hold_us: 0,
        critical_us: 0,
    }
}

fn next(phase: Phase, shard: &Shard, fleet: &Fleet, step: StepStatus) -> Decision {
    next_at(phase, shard, fleet, step, NOW)
}

fn next_at(phase: Phase, shard: &Shard, fleet: &Fleet, step: StepStatus, now_ms: u64) -> Decision {
    decide(View {
        task: &"t".into(),
        switch: &at(phase),
        shard,
        fleet,
        step: &step,
        lost: None,
        cancel_requested: false,
        other_in_hold: false,
        now_ms,
    })
}

fn hold_all(fleet: &mut Fleet, level: HoldLevel, epoch: u64) {
    for proxy in fleet.proxies.values_mut() {
        proxy
            .shards
            .insert("0".into(), (Epoch(epoch), level, "t".into()));
    }
}

#[test]
fn the_happy_path_visits_every_step_in_order() {
    let (mut fleet, done) = (fleet(), StepStatus::Done { committed: true });
    let start = StepStatus::NotStarted;
    assert!(matches!(
        next(Phase::Preflight, &shard(), &fleet, start.clone()),
        Decision::Advance(Phase::Prewarm, _)
    ));
    assert_eq!(
        next(Phase::Prewarm, &shard(), &fleet, start.clone()),
        Decision::Run(Step::EnsureUsers)
    );
    assert_eq!(
        next(Phase::Prewarm, &shard(), &fleet, done.clone()),
        Decision::Declare
    );
    assert!(matches!(
        next(Phase::Hold, &declared(), &fleet, start.clone()),
        Decision::Wait { .. }
    ));
    hold_all(&mut fleet, HoldLevel::Held, 4);
    assert_eq!(
        next(Phase::Hold, &declared(), &fleet, start.clone()),
        Decision::Run(Step::HandOver)
    );
    let committed = declared().commit(Epoch(4), "x").unwrap();
    assert!(matches!(
        next(Phase::Hold, &committed, &fleet, done),
        Decision::Advance(Phase::Settle, _)
    ));
    assert!(matches!(
        next(Phase::Settle, &committed, &fleet, start.clone()),
        Decision::Wait { .. }
    ));
    fleet.nodes.get_mut(&"b".into()).unwrap().granted_epoch = Epoch(5);
    hold_all(&mut fleet, HoldLevel::Applied, 5);
    let mut settled = committed;
    settled.members[0].in_sync = true;
    assert_eq!(
        next(Phase::Settle, &settled, &fleet, start),
        Decision::Close(String::new())
    );
}

#[test]
fn a_shard_whose_primary_was_readmitted_while_it_waited_for_its_turn_is_never_declared() {
    let readmitted = shard().readmit("run-a2").unwrap();
    let mut fleet = fleet();
    let old = fleet.nodes.get_mut(&"a".into()).unwrap();
    (old.run_id, old.granted_epoch) = ("run-a2".into(), Epoch(5));
    for step in [
        StepStatus::NotStarted,
        StepStatus::Done { committed: false },
    ] {
        for phase in [Phase::Preflight, Phase::Prewarm] {
            match next(phase, &readmitted, &fleet, step.clone()) {
                Decision::Advance(Phase::RolledBack, why) => assert!(why.contains("epoch 5")),
                other => panic!("{phase:?} {step:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn laggard_proxies_are_not_waited_for_beyond_the_bound() {
    let late = NOW - 10 + HOLD_WAIT_MS;
    assert_eq!(
        next_at(
            Phase::Hold,
            &declared(),
            &fleet(),
            StepStatus::NotStarted,
            late
        ),
        Decision::Run(Step::HandOver)
    );
}

#[test]
fn preflight_refuses_what_is_not_fit_and_says_why() {
    type Spoil = fn(&mut Fleet);
    let cases: [(Spoil, &str); 6] = [
        (
            |f| f.nodes.get_mut(&"b".into()).unwrap().link_up = false,
            "caught up",
        ),
        (
            |f| {
                let old = f.nodes.get_mut(&"a".into()).unwrap();
                (old.lag_bytes, old.offset) = (LAG_BYTES_MAX + 1, LAG_BYTES_MAX + 1);
            },
            "lags",
        ),
        (
            |f| f.nodes.get_mut(&"b".into()).unwrap().run_id = "other".into(),
            "restarted",
        ),
        (
            |f| f.nodes.get_mut(&"a".into()).unwrap().failover_idle = false,
            "idle primary",
        ),
        (
            |f| f.nodes.get_mut(&"a".into()).unwrap().granted_epoch = Epoch(3),
            "epoch 4",
        ),
        (|f| assert!(f.hosts.remove(&"host-b".into())), "agent"),
    ];
    for (spoil, reason) in cases {
        let mut fleet = fleet();
        spoil(&mut fleet);
        let late = NOW - 10 + PREFLIGHT_MS_MAX;
        fleet.nodes.values_mut().for_each(|n| n.seen_ms = late);
        match next_at(
            Phase::Preflight,
            &shard(),
            &fleet,
            StepStatus::NotStarted,
            late,
        ) {
            Decision::Advance(Phase::RolledBack, why) => assert!(why.contains(reason), "{why}"),
            other => panic!("{reason}: {other:?}"),
        }
    }
}

#[test]
fn a_target_that_says_itself_what_it_has_is_not_waited_for_until_its_primary_hears_it() {
    let mut fleet = fleet();
    // As in the first second of a new primary: it was told nothing yet.
    let old = fleet.nodes.get_mut(&"a".into()).unwrap();
    (old.lag_bytes, old.offset) = (90_000_000, 90_000_000);
    fleet.nodes.get_mut(&"b".into()).unwrap().offset = 90_000_000 - LAG_BYTES_MAX;
    let next = next(Phase::Preflight, &shard(), &fleet, StepStatus::NotStarted);
    assert!(
        matches!(next, Decision::Advance(Phase::Prewarm, _)),
        "{next:?}"
    );
}

#[test]
fn a_failed_switch_is_given_back_only_on_the_agents_word() {
    let no_effect = StepStatus::NoEffect("timeout".into());
    assert_eq!(
        next(Phase::Hold, &declared(), &fleet(), no_effect),
        Decision::GiveBack("timeout".into())
    );
    let uncertain = StepStatus::Uncertain("lost".into());
    assert!(matches!(
        next(Phase::Hold, &declared(), &fleet(), uncertain),
        Decision::Advance(Phase::Resolve, _)
    ));
    assert_eq!(
        next(
            Phase::Resolve,
            &declared(),
            &fleet(),
            StepStatus::NotStarted
        ),
        Decision::Run(Step::TakeBack)
    );
    let taken = StepStatus::Done { committed: false };
    assert!(matches!(
        next(Phase::Resolve, &declared(), &fleet(), taken),
        Decision::GiveBack(_)
    ));
}

#[test]
fn a_switch_found_finished_is_committed_forward() {
    let mut fleet = fleet();
    let old = fleet.nodes.get_mut(&"a".into()).unwrap();
    (old.role, old.following) = (Some(NodeRole::Replica), "127.0.0.1:2".into());
    fleet.nodes.get_mut(&"b".into()).unwrap().role = Some(NodeRole::Primary);
    assert_eq!(
        next(Phase::Resolve, &declared(), &fleet, StepStatus::NotStarted),
        Decision::Commit
    );
}

#[test]
fn a_target_that_died_after_its_promotion_is_committed_so_that_the_shard_is_never_stuck() {
    let mut fleet = fleet();
    let old = fleet.nodes.get_mut(&"a".into()).unwrap();
    (old.role, old.following) = (Some(NodeRole::Replica), "127.0.0.1:2".into());
    let start = StepStatus::NotStarted;
    for (state, run_id, is_committed) in [
        (ProcessState::Running, "another", true),
        (ProcessState::Stopped, "", true),
        (ProcessState::Starting, "", false), // alive, perhaps, and just not answering
        (ProcessState::Running, "run-b", false),
    ] {
        let new = fleet.nodes.get_mut(&"b".into()).unwrap();
        (new.state, new.run_id) = (state, run_id.into());
        let decision = next(Phase::Resolve, &declared(), &fleet, start.clone());
        assert_eq!(
            decision == Decision::Commit,
            is_committed,
            "{state:?}: {decision:?}"
        );
    }
    // As long as the failover goes on the target may never have been asked.
    fleet.nodes.get_mut(&"a".into()).unwrap().failover_idle = false;
    let new = fleet.nodes.get_mut(&"b".into()).unwrap();
    (new.state, new.run_id) = (ProcessState::Stopped, String::new());
    assert!(matches!(
        next(Phase::Resolve, &declared(), &fleet, start),
        Decision::Wait { .. }
    ));
}

#[test]
fn reports_from_before_the_trouble_decide_nothing() {
    let mut fleet = fleet();
    fleet.nodes.values_mut().for_each(|n| n.seen_ms = NOW - 10);
    assert!(matches!(
        next(Phase::Resolve, &declared(), &fleet, StepStatus::NotStarted),
        Decision::Wait { .. }
    ));
}

#[test]
fn a_leader_that_never_heard_of_the_target_gives_the_old_primary_its_rights_back() {
    let mut fleet = fleet();
    fleet.nodes.retain(|id, _| *id == at(Phase::Resolve).from);
    fleet.nodes.values_mut().for_each(|n| n.seen_ms = NOW + 10);
    assert_eq!(
        next_at(
            Phase::Resolve,
            &declared(),
            &fleet,
            StepStatus::NotStarted,
            NOW + 20
        ),
        Decision::Run(Step::TakeBack)
    );
}

#[test]
fn a_new_leader_with_no_memory_of_the_step_asks_again_or_resolves() {
    let mut fleet = fleet();
    hold_all(&mut fleet, HoldLevel::Held, 4);
    assert_eq!(
        next(Phase::Hold, &declared(), &fleet, StepStatus::NotStarted),
        Decision::Run(Step::HandOver)
    );
    let late = NOW + HANDOVER_MS_MAX;
    assert!(matches!(
        next_at(
            Phase::Hold,
            &declared(),
            &fleet,
            StepStatus::NotStarted,
            late
        ),
        Decision::Advance(Phase::Resolve, _)
    ));
}

#[test]
fn a_deposed_leader_stops() {
    for phase in [Phase::Prewarm, Phase::Hold, Phase::Resolve] {
        assert_eq!(
            next(phase, &declared(), &fleet(), StepStatus::Fenced),
            Decision::Stop
        );
    }
}

#[test]
fn cancel_is_honoured_before_the_hold_only() {
    let decide_cancelled = |phase, shard: &Shard| {
        decide(View {
            task: &"t".into(),
            switch: &at(phase),
            shard,
            fleet: &fleet(),
            step: &StepStatus::NotStarted,
            lost: None,
            cancel_requested: true,
            other_in_hold: false,
            now_ms: NOW,
        })
    };
    for phase in [Phase::Preflight, Phase::Prewarm] {
        assert!(matches!(
            decide_cancelled(phase, &shard()),
            Decision::Advance(Phase::RolledBack, _)
        ));
    }
    assert!(!matches!(
        decide_cancelled(Phase::Hold, &declared()),
        Decision::Advance(Phase::RolledBack, _)
    ));
}

fn lost() -> crate::detect::Loss {
    crate::detect::Loss {
        cause: "a: its agent saw its process end".into(),
        proof: Some(slotmesh_topology::FenceProof::Exited),
    }
}

fn next_lost(phase: Phase, fleet: &Fleet, step: StepStatus) -> Decision {
    decide(View {
        task: &"t".into(),
        switch: &at(phase),
        shard: &declared(),
        fleet,
        step: &step,
        lost: Some(&lost()),
        cancel_requested: false,
        other_in_hold: false,
        now_ms: NOW,
    })
}

#[test]
fn a_primary_lost_in_the_hold_is_not_waited_for() {
    for step in [StepStatus::NotStarted, StepStatus::Running] {
        let next = next_lost(Phase::Hold, &fleet(), step);
        assert!(matches!(next, Decision::Advance(Phase::Resolve, _)));
    }
    // It has switched before it was lost: that is worth more.
    let switched = StepStatus::Done { committed: false };
    let next = next_lost(Phase::Hold, &fleet(), switched);
    assert_eq!(next, Decision::Commit);
}

#[test]
fn a_hand_over_whose_old_primary_is_lost_is_failed_over_even_if_its_target_has_taken_over() {
    for role in [NodeRole::Replica, NodeRole::Primary] {
        let mut fleet = fleet();
        let target = fleet.nodes.get_mut(&"b".into()).unwrap();
        target.role = Some(role);
        for step in [
            StepStatus::NotStarted,
            StepStatus::Running,
            StepStatus::NoEffect("no".into()),
            StepStatus::Uncertain("lost".into()),
        ] {
            let next = next_lost(Phase::Resolve, &fleet, step);
            assert_eq!(next, Decision::FailOver(lost()));
        }
    }
}

#[test]
fn a_cancel_is_honoured_exactly_where_the_table_of_steps_says() {
    use crate::{Spec, table};
    let any = Spec::Switchover(vec![at(Phase::Preflight)]);
    for row in table::of(&any) {
        let named = |phase: &Phase| phase.name() == row.name;
        let phases = [
            Phase::Preflight,
            Phase::Prewarm,
            Phase::Hold,
            Phase::Resolve,
        ];
        let after = [Phase::Settle, Phase::Done, Phase::RolledBack];
        let phase = phases.into_iter().chain(after).find(named).unwrap();
        let decision = decide(View {
            task: &"t".into(),
            switch: &at(phase),
            shard: &shard(),
            fleet: &fleet(),
            step: &StepStatus::NotStarted,
            lost: None,
            cancel_requested: true,
            other_in_hold: false,
            now_ms: NOW,
        });
        let ends = decision == Decision::Advance(Phase::RolledBack, "cancelled".into());
        let is_promised = row.cancel == table::Cancel::Honoured;
        assert_eq!(ends, is_promised, "{phase:?}: {decision:?}");
    }
}

#[test]
fn an_older_target_that_has_refused_a_command_is_not_switched_to() {
    let older = slotmesh_topology::Older {
        node: "b".into(),
        run_id: "run-b".into(),
        refused: 1,
    };
    let shard = shard().is_older(older).unwrap();
    let mut fleet = fleet();
    fleet.nodes.get_mut(&"b".into()).unwrap().unexpected_errors = Some(1);
    let fit = next(Phase::Preflight, &shard, &fleet, StepStatus::NotStarted);
    assert!(matches!(fit, Decision::Advance(Phase::Prewarm, _)));
    fleet.nodes.get_mut(&"b".into()).unwrap().unexpected_errors = Some(2);
    let unfit = next(Phase::Preflight, &shard, &fleet, StepStatus::NotStarted);
    assert!(matches!(unfit, Decision::Wait { what, .. } if what.contains("refused commands")));
}
