//! Which replicas must answer while one joins.

use slotmesh_topology::Epoch;

use crate::{
    detect::tests::{NOW, Stage},
    failover::{Decision, View, decide, declare},
    spec::Spec,
    switchover::StepStatus,
};
use slotmesh_topology::{FenceProof, Member, NodeRole};

/// The primary has ended; b and c were in sync, have let go, and have its history; d joins.
fn joining(change: impl FnOnce(&mut Stage)) -> Decision {
    let mut stage = Stage::new();
    stage.durability = 1;
    let joiner = stage.shard.member(&"c".into()).unwrap().clone();
    stage.shard.members.push(Member {
        node: "d".into(),
        host: "host-d".into(),
        in_sync: false,
        run_id: "run-d".into(),
        ..joiner
    });
    stage.shard.roster.newcomers = vec!["d".into()];
    stage.fleet.hosts.insert("host-d".into());
    stage.fleet.leases.insert("host-d".into());
    let mut seen = stage.node("c").clone();
    (seen.run_id, seen.replid, seen.offset) = ("run-d".into(), "own".into(), 0);
    stage.fleet.nodes.insert("d".into(), seen);
    for name in ["b", "c", "d"] {
        let seen = stage.node(name);
        (seen.detached, seen.link_up, seen.assigned_epoch) = (true, false, Epoch(5));
        seen.role = Some(NodeRole::Replica);
        if name != "d" {
            (seen.replid, seen.offset) = ("the lost one's".into(), 100);
        }
    }
    stage.end("a");
    let loss = crate::detect::Loss {
        cause: "seen".into(),
        proof: Some(FenceProof::Exited),
    };
    let (task, next) = declare("t".into(), &stage.shard, &loss, NOW).unwrap();
    stage.shard = next;
    change(&mut stage);
    stage.look();
    let Spec::Failover(failover) = &task.spec else {
        panic!("{:?}", task.spec)
    };
    decide(View {
        task: &task,
        failover,
        shard: &stage.shard,
        scene: stage.scene(),
        step: &StepStatus::NotStarted,
        promoted: None,
    })
}

fn chooses(decision: &Decision) -> bool {
    matches!(decision, Decision::Choose { .. })
}

#[test]
fn a_member_that_has_no_copy_yet_is_not_waited_for() {
    assert!(
        chooses(&joining(|_| {})),
        "it has let go, with a history of its own"
    );
    let unnamed = |stage: &mut Stage| {
        stage.member("d").run_id.clear();
        stage.silence("d");
    };
    assert!(chooses(&joining(unnamed)), "it has never followed anybody");
}

#[test]
fn a_member_that_may_have_confirmed_a_write_is_waited_for() {
    let cases: [fn(&mut Stage); 6] = [
        |s| s.node("d").replid = "the lost one's".into(),
        |s| s.node("d").replid.clear(),
        |s| s.node("d").detached = false,
        |s| s.silence("d"),
        |s| s.node("d").run_id = "another".into(),
        |s| s.shard.roster.newcomers.clear(),
    ];
    for (case, change) in cases.into_iter().enumerate() {
        let decision = joining(change);
        assert!(
            matches!(decision, Decision::Wait { .. }),
            "case {case}: {decision:?}"
        );
    }
    let unknown = |s: &mut Stage| {
        for name in ["b", "c"] {
            s.node(name).replid.clear();
        }
    };
    assert!(
        !chooses(&joining(unknown)),
        "nobody knows the lost one's history"
    );
}
