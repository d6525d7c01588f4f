//! The table of steps: every phase of every kind is in it, and what it says is what is done.

use slotmesh_proto::store::v1 as store;
use slotmesh_topology::Epoch;

use super::*;
use crate::{
    proxies::{Change, Changes, Counted, ProxyPhase},
    spec::{ShardFailover, ShardSwitch, State},
    upgrade::{Rollback, ShardUpgrade, Upgrade},
    wire,
};

fn task(spec: Spec) -> Task {
    Task {
        id: "t".into(),
        instance: "r".into(),
        spec,
        state: State::Running,
        message: String::new(),
        created_ms: 1,
        updated_ms: 1,
        deadline_ms: 2,
        event_count: 1,
        cancel_requested: false,
        not_before_ms: 0,
        in_window: false,
        choice: None,
        trace_id: String::new(),
        copied: crate::Copied::default(),
    }
}

fn switching(phase: Phase) -> ShardSwitch {
    ShardSwitch {
        shard: "0".into(),
        from: "a".into(),
        to: "b".into(),
        from_epoch: Epoch(4),
        phase,
        phase_since_ms: 1,
        message: String::new(),
        hold_us: 0,
        critical_us: 0,
    }
}

fn failing_over(phase: FailoverPhase) -> ShardFailover {
    ShardFailover {
        shard: "0".into(),
        from: "a".into(),
        from_run_id: "x".into(),
        from_epoch: Epoch(4),
        to: None,
        phase,
        phase_since_ms: 1,
        message: String::new(),
        cause: String::new(),
        proof: None,
        hold_us: 0,
    }
}

fn replacing(phase: ReplacePhase, turned_back: bool) -> NodeReplacement {
    NodeReplacement {
        shard: "0".into(),
        from: "a".into(),
        from_host: "h1".into(),
        to: "b".into(),
        to_host: "h2".into(),
        phase,
        phase_since_ms: 1,
        message: String::new(),
        cause: String::new(),
        by_operator: true,
        turned_back,
        on_request: false,
        epoch: Epoch(4),
        drain_offset: 0,
    }
}

/// One that can go back.
fn upgrading() -> Upgrade {
    let rollback = Rollback {
        open: true,
        why: String::new(),
        old: "a".into(),
        old_run_id: "x".into(),
        old_unexpected_errors: 0,
        new: "b".into(),
        new_run_id: "y".into(),
        new_sync_full: 0,
        diverged: false,
        doubt: String::new(),
        behind_since_ms: 0,
        faults_before: None,
        costs_before: Vec::new(),
        doubts: 0,
    };
    let part = ShardUpgrade {
        shard: "0".into(),
        phase: UpgradePhase::Stage,
        phase_since_ms: 1,
        message: String::new(),
        nodes: Vec::new(),
        switch: None,
        rollback: Some(rollback),
        why_back: None,
        on_request: false,
        hold_us: 0,
        tries: 0,
        finalize: false,
        parked_in: None,
        moved: false,
        drain: None,
        held_us: 0,
        retried: false,
        blameless: false,
        began_epoch: Default::default(),
    };
    Upgrade {
        engine: "redis-8.2.3".into(),
        from_engine: String::new(),
        bake_ms: 1,
        canary_shards: 1,
        parallel_shards: 1,
        finalize_by_operator: false,
        preserve_roles: false,
        in_window: false,
        paused: false,
        paused_why: String::new(),
        max_hold_ms: 1,
        automatic: false,
        allow_downtime: false,
        method: Default::default(),
        shards: vec![part],
    }
}

/// A task in every phase that a record can name: the numbers of the store's format, not our lists.
fn in_every_phase() -> Vec<Task> {
    let mut tasks = vec![task(Spec::Provision), task(Spec::Decommission)];
    let mut add = |spec: Spec, set: &dyn Fn(&mut store::TaskRecord, i32) -> bool| {
        let mut record = wire::task_to(&task(spec), 1);
        for number in 1.. {
            if !set(&mut record, number) {
                break;
            }
            tasks.push(wire::task_from(&record).unwrap());
        }
    };
    add(
        Spec::Switchover(vec![switching(Phase::Preflight)]),
        &|record, number| {
            if let Some(store::task_record::Spec::Switchover(s)) = &mut record.spec {
                s.shards[0].phase = number;
            }
            store::ShardSwitchPhase::try_from(number).is_ok()
        },
    );
    add(
        Spec::Failover(failing_over(FailoverPhase::Fence)),
        &|record, number| {
            if let Some(store::task_record::Spec::Failover(f)) = &mut record.spec {
                f.phase = number;
            }
            store::FailoverPhase::try_from(number).is_ok()
        },
    );
    add(
        Spec::Replace(replacing(ReplacePhase::Join, false)),
        &|record, number| {
            if let Some(store::task_record::Spec::Replace(r)) = &mut record.spec {
                r.phase = number;
            }
            store::ReplacePhase::try_from(number).is_ok()
        },
    );
    add(Spec::Upgrade(upgrading()), &|record, number| {
        if let Some(store::task_record::Spec::Upgrade(u)) = &mut record.spec {
            u.shards[0].phase = number;
        }
        store::UpgradePhase::try_from(number).is_ok()
    });
    add(Spec::Proxies(changing()), &|record, number| {
        if let Some(store::task_record::Spec::Proxies(p)) = &mut record.spec {
            p.proxies[0].phase = number;
            // Phases that only a rebuild has.
            let is_its = number >= i32::from(store::ProxyPhase::Build);
            p.rebuild = is_its.then(store::ProxyRebuild::default);
        }
        store::ProxyPhase::try_from(number).is_ok()
    });
    tasks
}

fn changing() -> Changes {
    let part = Change {
        proxy: "p".into(),
        host: "h".into(),
        phase: ProxyPhase::Ready,
        phase_since_ms: 1,
        message: String::new(),
        from_program: String::new(),
        from_generation: 0,
        from_workers: 0,
        from_version: String::new(),
        to_version: String::new(),
        generation: 0,
        why_back: None,
        on_request: false,
        before: Counted::default(),
        pid: 0,
        handover_us: 0,
        clients: 0,
        finalize: false,
        bake_since_ms: 0,
        successor: None,
    };
    Changes {
        program: "proxy-0.2.0".into(),
        restart: false,
        bake_ms: 1,
        in_window: false,
        rebuild: None,
        workers: 0,
        paused: false,
        proxies: vec![part],
    }
}

#[test]
fn every_phase_of_every_kind_is_in_the_table_once_and_says_all() {
    let tasks = in_every_phase();
    // One each of what has no phases; 8, 6, 6, 12 and 11 numbers of the store's format.
    assert_eq!(tasks.len(), 2 + 8 + 6 + 6 + 12 + 11);
    for task in tasks {
        let table = of(&task.spec);
        for row in current(&task.spec) {
            let here = table.iter().filter(|r| **r == row).count();
            assert_eq!(here, 1, "{} of {}", row.name, task.spec.kind());
            let is_over = row.cancel == OVER;
            let words = [row.precheck, row.act, row.verify];
            let is_said = words.iter().all(|text| !text.is_empty());
            assert!(is_said || (is_over && !row.verify.is_empty()), "{row:?}");
        }
    }
}

#[test]
fn a_cancel_is_answered_as_the_table_says() {
    for task in in_every_phase() {
        let row = current(&task.spec)[0];
        let expected = row.cancel == Cancel::Honoured;
        assert_eq!(task.is_cancellable(), expected, "{row:?}");
        if let Cancel::Refused(why) = cancel(&task) {
            assert!(!why.is_empty() && !expected);
        }
        let ended = Task {
            state: State::Done,
            ..task
        };
        assert!(!ended.is_cancellable(), "{row:?}");
        assert_eq!(cancel(&ended), OVER);
    }
    let back = task(Spec::Replace(replacing(ReplacePhase::CatchUp, true)));
    assert!(!back.is_cancellable(), "it turns back already");
}

#[test]
fn one_shard_past_its_point_of_no_return_is_the_tasks() {
    let shards = vec![switching(Phase::Preflight), switching(Phase::Hold)];
    let half = task(Spec::Switchover(shards));
    assert!(!half.is_cancellable());
    assert_eq!(cancel(&half), PAST);
}

#[test]
fn a_cancel_of_an_upgrade_is_for_the_shards_that_it_can_still_be_for() {
    let mut upgrade = upgrading();
    upgrade.shards[0].phase = UpgradePhase::Finalize;
    let closed = task(Spec::Upgrade(upgrade.clone()));
    assert!(matches!(cancel(&closed), Cancel::Refused(why) if why.contains("closed")));
    let mut second = upgrade.shards[0].clone();
    second.phase = UpgradePhase::Ready;
    upgrade.shards.push(second);
    assert!(task(Spec::Upgrade(upgrade.clone())).is_cancellable());
    // A bake that nothing leads back from is no different from what follows it.
    upgrade.shards[1].phase = UpgradePhase::Bake;
    assert!(task(Spec::Upgrade(upgrade.clone())).is_cancellable());
    for part in &mut upgrade.shards {
        part.rollback.as_mut().unwrap().open = false;
    }
    assert!(!task(Spec::Upgrade(upgrade)).is_cancellable());
}
