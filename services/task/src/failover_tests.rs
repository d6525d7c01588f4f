//! The failover's decisions, as short stories: what is seen, what is done next.

use slotmesh_topology::{Epoch, Mode, TaskId};

use super::*;
use crate::{
    detect::{
        Loss,
        tests::{NOW, Stage},
    },
    observe::{HoldLevel, ProcessState},
    spec::{ShardSwitch, State},
};

#[path = "failover_back_tests.rs"]
mod back;
#[path = "failover_older_tests.rs"]
mod older;
#[path = "failover_operator_tests.rs"]
mod operator;

/// A phase begins at least a millisecond after the one before.
const LATER: u64 = 10;

/// A failover on its way: what each decision writes is the next one's record.
struct Story {
    stage: Stage,
    task: Task,
    step: StepStatus,
    promoted: Option<NodeView>,
}

impl Story {
    /// Declared with this proof; every member that is alive has converged, the replicas at offsets
    /// 100.
    fn declared(mut stage: Stage, proof: Option<FenceProof>) -> Self {
        let loss = Loss {
            cause: "seen".into(),
            proof,
        };
        let (task, next) = declare("t".into(), &stage.shard, &loss, stage.now_ms).unwrap();
        stage.shard = next;
        let mut story = Self {
            stage,
            task,
            step: StepStatus::NotStarted,
            promoted: None,
        };
        for name in ["b", "c"] {
            story.detach(name, 100);
        }
        story
    }

    fn exited() -> Self {
        let mut stage = Stage::new();
        stage.end("a");
        Self::declared(stage, Some(FenceProof::Exited))
    }

    fn detach(&mut self, name: &str, offset: u64) {
        let seen = self.stage.node(name);
        (seen.detached, seen.offset, seen.link_up) = (true, offset, false);
        seen.assigned_epoch = Epoch(5);
    }

    fn spec(&self) -> &ShardFailover {
        match &self.task.spec {
            Spec::Failover(failover) => failover,
            other => panic!("{other:?}"),
        }
    }

    fn phase(&self) -> FailoverPhase {
        self.spec().phase
    }

    fn view(&self) -> View<'_> {
        View {
            task: &self.task,
            failover: self.spec(),
            shard: &self.stage.shard,
            scene: self.stage.scene(),
            step: &self.step,
            promoted: self.promoted.as_ref(),
        }
    }

    fn decision(&mut self) -> Decision {
        self.stage.look();
        decide(self.view())
    }

    /// Decides and writes, as the leader does; returns what was decided.
    fn act(&mut self) -> Decision {
        let decision = self.decision();
        if let Some(written) = write(self.view(), &decision).unwrap() {
            self.task = written.task;
            self.stage.shard = written.shard.unwrap_or_else(|| self.stage.shard.clone());
            (self.step, self.promoted) = (StepStatus::NotStarted, None);
        }
        decision
    }

    fn waits(&mut self) -> String {
        match self.act() {
            Decision::Wait { what, .. } => what,
            other => panic!("does not wait: {other:?}"),
        }
    }

    fn chooses(&mut self) -> String {
        match self.act() {
            Decision::Choose { node, .. } => node.to_string(),
            other => panic!("chooses nobody: {other:?}"),
        }
    }

    /// Acts until it is parked.
    fn parks(&mut self) -> String {
        for _ in 0..10 {
            if let Decision::Advance(FailoverPhase::Parked, why) = self.act() {
                assert_eq!(self.task.state, State::NeedsOperator);
                assert!(is_parked(&self.task));
                return why;
            }
            self.stage.pass(CHOOSE_MS_MAX);
        }
        panic!("never parked: {:?}", self.task)
    }

    fn answers(&mut self, name: &str) {
        self.step = StepStatus::Done { committed: false };
        let seen = self.stage.node(name);
        seen.role = Some(NodeRole::Primary);
        (seen.replid2, seen.second_offset) = ("f00".into(), 101);
        self.promoted = Some(seen.clone());
    }
}

#[test]
fn the_usual_failover_chooses_promotes_commits_and_settles() {
    let mut story = Story::exited();
    assert_eq!(story.phase(), FailoverPhase::Choose, "proven at once");
    assert_eq!(story.chooses(), "b");
    assert_eq!(story.act(), Decision::Promote);
    story.step = StepStatus::Running;
    story.waits();
    story.answers("b");
    assert!(matches!(story.act(), Decision::Commit { .. }));
    let shard = &story.stage.shard;
    assert_eq!((shard.epoch, &shard.mode), (Epoch(5), &Mode::Serving));
    assert_eq!(
        (shard.primary.as_str(), shard.closed_epoch),
        ("b", Epoch(4))
    );
    let lineage = shard.departures[0].from.clone().unwrap();
    assert_eq!((&*lineage.replid, lineage.offset), ("f00", 101));

    assert_eq!(story.phase(), FailoverPhase::Settle);
    assert!(story.waits().contains("grant"));
    story.stage.node("b").granted_epoch = Epoch(5);
    assert!(story.waits().contains("proxies"));
    for proxy in story.stage.fleet.proxies.values_mut() {
        let applied = (Epoch(5), HoldLevel::Applied, TaskId::from(""));
        proxy.shards.insert("0".into(), applied);
    }
    assert!(
        story.waits().contains("c to follow"),
        "not for the lost one"
    );
    story.stage.member("c").in_sync = true;
    assert!(matches!(story.act(), Decision::End(_)));
    assert_eq!(
        (story.task.state, story.phase()),
        (State::Done, FailoverPhase::Done)
    );
}

#[test]
fn settling_is_not_waited_for_longer_than_its_time() {
    let mut story = Story::exited();
    story.act();
    story.answers("b");
    story.act();
    story.stage.pass(SETTLE_MS_MAX + LATER);
    assert!(matches!(story.act(), Decision::End(why) if why.contains("not waited for")));
    assert_eq!(story.task.state, State::Done);
}

#[test]
fn a_later_epoch_ends_the_settling() {
    let mut story = Story::exited();
    story.act();
    story.answers("b");
    story.act();
    story.stage.shard = story.stage.shard.readmit("new").unwrap();
    assert!(matches!(story.act(), Decision::End(_)));
}

#[test]
fn nobody_is_chosen_before_the_lost_primary_is_fenced() {
    let mut story = Story::declared(Stage::new(), None);
    assert_eq!(story.phase(), FailoverPhase::Fence);
    assert!(story.waits().contains("to be fenced"));
    // Converged, but with a user left; then another process's word.
    story.stage.node("a").assigned_epoch = Epoch(5);
    story.stage.node("a").granted_epoch = Epoch(4);
    story.waits();
    story.stage.node("a").granted_epoch = Epoch(0);
    assert_eq!(story.decision(), Decision::Prove(FenceProof::Fenced));
    story.stage.node("a").assigned_epoch = Epoch(4);
    story.waits();
    story.stage.node("a").exited_run_id = "run-a".into();
    assert_eq!(story.act(), Decision::Prove(FenceProof::Exited));
    assert_eq!(story.phase(), FailoverPhase::Choose);
}

#[test]
fn a_lease_proves_only_after_the_guard() {
    let mut story = Story::declared(Stage::new(), None);
    story.stage.silence("a");
    story.stage.pass(0);
    story.waits();
    story.stage.pass(LEASE_GUARD_MS);
    assert_eq!(story.act(), Decision::Prove(FenceProof::Lease));
}

#[test]
fn a_fence_that_nothing_proves_is_left_to_an_operator() {
    let mut story = Story::declared(Stage::new(), None);
    story.stage.pass(FENCE_MS_MAX);
    assert!(matches!(
        story.act(),
        Decision::Advance(FailoverPhase::Parked, _)
    ));
    // It goes on by itself when the fence is proven after all.
    story.waits();
    story.stage.node("a").state = ProcessState::Stopped;
    assert!(matches!(
        story.act(),
        Decision::Advance(FailoverPhase::Fence, _)
    ));
    assert_eq!(story.task.state, State::Running);
    assert_eq!(story.act(), Decision::Prove(FenceProof::Exited));
}

#[test]
fn the_highest_offset_wins_then_the_zone_of_the_lost_primary_then_the_first_id() {
    let mut story = Story::exited();
    story.detach("c", 101);
    assert_eq!(story.chooses(), "c");

    let mut story = Story::exited();
    story.stage.fleet.zones = ["host-a", "host-c"]
        .map(|host| (host.into(), "z1".to_owned()))
        .into();
    assert_eq!(story.chooses(), "c");

    assert_eq!(Story::exited().chooses(), "b");
}

#[test]
fn who_is_alive_is_waited_for_until_detached_and_not_for_ever() {
    let mut story = Story::exited();
    story.stage.node("c").detached = false;
    story.stage.node("c").offset = 500;
    assert_eq!(story.waits(), "c to detach");
    // Detached of an earlier assignment is not detached now.
    story.stage.node("c").detached = true;
    story.stage.node("c").assigned_epoch = Epoch(4);
    assert_eq!(story.waits(), "c to detach");
    story.stage.pass(DETACH_MS_MAX);
    assert_eq!(story.chooses(), "b");
}

#[test]
fn who_is_dead_restarted_or_read_only_is_not_waited_for_and_not_chosen() {
    let unfit: [fn(&mut Stage); 5] = [
        |s| s.silence("c"),
        |s| s.node("c").state = ProcessState::Stopped,
        |s| s.node("c").run_id = "restarted".into(),
        |s| s.member("c").in_sync = false,
        |s| s.member("c").role = NodeRole::ReadOnly,
    ];
    for (case, unfit) in unfit.iter().enumerate() {
        let mut story = Story::exited();
        story.detach("c", 500);
        unfit(&mut story.stage);
        assert_eq!(story.chooses(), "b", "case {case}");
    }
}

#[test]
fn a_lost_primary_that_is_back_as_it_was_has_everything() {
    let mut stage = Stage::new();
    stage.silence("a");
    let mut story = Story::declared(stage, Some(FenceProof::Lease));
    let host = "host-a";
    story.stage.fleet.hosts.insert(host.into());
    story.stage.fleet.leases.insert(host.into());
    let back = story.stage.node("a");
    (back.offset, back.granted_epoch) = (105, Epoch(4));
    assert_eq!(story.waits(), "a to detach");
    story.stage.node("a").assigned_epoch = Epoch(5);
    story.stage.node("a").granted_epoch = Epoch(0);
    assert_eq!(story.chooses(), "a", "five bytes are only there");
    // With nothing more than the replicas, it is not preferred: it was lost for a reason.
    story.task = with_phase(&story.task, FailoverPhase::Choose, "", NOW);
    let target = story.stage.shard.failover().unwrap();
    let fresh = slotmesh_topology::Failover {
        target: None,
        ..target.clone()
    };
    story.stage.shard.mode = Mode::FailingOver(fresh);
    story.stage.node("a").offset = 100;
    assert_eq!(story.chooses(), "b");
}

#[test]
fn with_durability_k_enough_replicas_must_answer_to_have_every_acknowledged_write() {
    // Two replicas: of k = 1 both must answer, of k = 2 one is enough.
    for (durability, chosen) in [(1, None), (2, Some("b"))] {
        let mut stage = Stage::new();
        stage.durability = durability;
        stage.end("a");
        stage.silence("c");
        let mut story = Story::declared(stage, Some(FenceProof::Exited));
        match chosen {
            Some(chosen) => assert_eq!(story.chooses(), chosen),
            None => {
                let why = story.parks();
                assert!(why.contains("1 of 2 replicas answer"), "{why}");
            }
        }
    }
}

#[test]
fn with_durability_a_replica_with_less_is_never_the_second_choice() {
    let mut stage = Stage::new();
    stage.durability = 1;
    stage.end("a");
    let mut story = Story::declared(stage, Some(FenceProof::Exited));
    story.detach("c", 200);
    assert_eq!(story.chooses(), "c");
    story.step = StepStatus::NoEffect("its promise is alive".into());
    story.act();
    story.stage.pass(RETRY_MS + LATER);
    assert_eq!(story.chooses(), "c");
}

#[test]
fn with_durability_the_lost_process_itself_is_answer_enough() {
    let mut stage = Stage::new();
    stage.durability = 1;
    let mut story = Story::declared(stage, Some(FenceProof::Fenced));
    story.stage.silence("b");
    story.stage.silence("c");
    story.stage.node("a").assigned_epoch = Epoch(5);
    assert_eq!(story.chooses(), "a");
}

#[test]
fn when_the_chosen_one_can_not_be_promoted_the_next_one_is_at_the_same_epoch() {
    let failures = [
        StepStatus::NoEffect("refused".into()),
        StepStatus::Uncertain("its agent does not answer".into()),
    ];
    for failure in failures {
        let mut story = Story::exited();
        assert_eq!(story.chooses(), "b");
        story.step = failure;
        assert!(matches!(
            story.act(),
            Decision::Advance(FailoverPhase::Choose, _)
        ));
        assert_eq!(story.waits(), "another try to promote");
        story.stage.pass(RETRY_MS + LATER);
        assert_eq!(story.chooses(), "c");
        assert_eq!(story.stage.shard.epoch, Epoch(5));
        assert_eq!(story.act(), Decision::Promote, "asked anew");
    }
}

#[test]
fn when_the_chosen_one_dies_the_next_one_is_chosen() {
    let mut story = Story::exited();
    assert_eq!(story.chooses(), "b");
    story.step = StepStatus::Running;
    story.stage.node("b").state = ProcessState::Stopped;
    assert!(matches!(
        story.act(),
        Decision::Advance(FailoverPhase::Choose, _)
    ));
    story.stage.pass(RETRY_MS + LATER);
    assert_eq!(story.chooses(), "c");
}

#[test]
fn a_promotion_of_another_process_is_not_committed() {
    let mut story = Story::exited();
    story.act();
    story.answers("b");
    story.promoted.as_mut().unwrap().run_id = "another".into();
    assert!(matches!(
        story.act(),
        Decision::Advance(FailoverPhase::Choose, _)
    ));
}

#[test]
fn promotions_that_never_work_end_with_an_operator() {
    let mut story = Story::exited();
    for _ in 0..=TRY_MS_MAX / RETRY_MS {
        match story.act() {
            Decision::Promote => story.step = StepStatus::NoEffect("no".into()),
            Decision::Advance(FailoverPhase::Parked, why) => {
                assert!(why.contains("no promotion worked"), "{why}");
                story.stage.pass(1_000);
                story.waits();
                return;
            }
            _ => {}
        }
        story.stage.pass(RETRY_MS + LATER);
        if story.phase() == FailoverPhase::Promote {
            story.step = StepStatus::NoEffect("no".into());
        }
    }
    panic!("never parked: {:?}", story.task);
}

#[test]
fn a_parked_failover_keeps_its_shard_and_goes_on_when_a_replica_comes_back() {
    let mut story = Story::exited();
    story.stage.silence("b");
    story.stage.silence("c");
    assert!(story.parks().contains("no replica"));
    assert_eq!(menu(&story.task), [Choice::Retry, Choice::AcceptLoss]);
    assert!(story.stage.shard.failover().is_some());
    assert_eq!(story.waits(), "an operator's choice");
    story.stage.fleet.hosts.insert("host-c".into());
    story.stage.fleet.leases.insert("host-c".into());
    story.stage.pass(0);
    assert!(matches!(
        story.act(),
        Decision::Advance(FailoverPhase::Choose, _)
    ));
    assert_eq!(story.task.state, State::Running);
    assert!(menu(&story.task).is_empty());
    assert_eq!(story.chooses(), "c");
}

#[test]
fn an_operators_failover_replaces_a_primary_that_is_well_by_whom_the_operator_names() {
    for (wanted, chosen) in [(None, "b"), (Some("c"), "c")] {
        let mut story = Story::declared(Stage::new(), Some(FenceProof::Operator));
        if let Spec::Failover(failover) = &mut story.task.spec {
            failover.to = wanted.map(Into::into);
        }
        let old = story.stage.node("a");
        (old.assigned_epoch, old.offset) = (Epoch(5), 900);
        assert_eq!(story.chooses(), chosen);
    }
}

#[test]
fn when_everybody_was_restarted_nobody_has_more_than_the_old_primarys_disk() {
    let mut story = Story::exited();
    for name in ["a", "b", "c"] {
        let seen = story.stage.node(name);
        (seen.state, seen.run_id) = (ProcessState::Running, format!("new-{name}"));
        seen.assigned_epoch = Epoch(5);
    }
    assert_eq!(story.chooses(), "a");
    assert_eq!(story.act(), Decision::Promote);

    let mut story = Story::exited();
    for name in ["a", "b", "c"] {
        let seen = story.stage.node(name);
        (seen.state, seen.run_id) = (ProcessState::Running, format!("new-{name}"));
        seen.assigned_epoch = Epoch(5);
    }
    story.stage.node("a").keys = 0;
    assert_eq!(story.chooses(), "b", "an empty one is the last choice");
}

#[test]
fn a_restarted_old_primary_alone_does_not_come_before_replicas_that_may_return() {
    let mut story = Story::exited();
    let back = story.stage.node("a");
    (back.state, back.run_id) = (ProcessState::Running, "new-a".into());
    back.assigned_epoch = Epoch(5);
    story.stage.silence("b");
    story.stage.silence("c");
    story.parks();
}

#[test]
fn a_leader_that_was_deposed_stops() {
    let mut story = Story::exited();
    story.step = StepStatus::Fenced;
    assert_eq!(story.decision(), Decision::Stop);
}

#[test]
fn a_record_that_moved_on_ends_the_task() {
    let mut story = Story::exited();
    story.stage.shard.mode = Mode::Serving;
    assert!(matches!(story.act(), Decision::End(_)));
    assert_eq!(story.task.state, State::NeedsOperator);
    assert!(!is_parked(&story.task));
}

#[test]
fn only_what_can_be_given_up_gives_its_shard_to_a_failover() {
    let switch = |phase| ShardSwitch {
        shard: "0".into(),
        from: "a".into(),
        to: "b".into(),
        from_epoch: Epoch(4),
        phase,
        phase_since_ms: NOW,
        message: String::new(),
        hold_us: 0,
        critical_us: 0,
    };
    use crate::spec::Phase;
    let ends = [
        (Phase::Preflight, Phase::RolledBack),
        (Phase::Prewarm, Phase::RolledBack),
        (Phase::Resolve, Phase::RolledBack),
        (Phase::Settle, Phase::Done),
        (Phase::Done, Phase::Done),
    ];
    let mut owner = Story::exited().task;
    for (phase, end) in ends {
        owner.spec = Spec::Switchover(vec![switch(phase)]);
        let next = supersede(&owner, &"0".into(), &"f".into(), NOW).unwrap();
        assert!(
            matches!(&next.spec, Spec::Switchover(parts) if parts[0].phase == end),
            "{phase:?}"
        );
        assert_eq!(supersede(&owner, &"1".into(), &"f".into(), NOW), None);
    }
    let mut story = Story::exited();
    assert_eq!(supersede(&story.task, &"0".into(), &"f".into(), NOW), None);
    story.act();
    story.answers("b");
    story.act();
    let next = supersede(&story.task, &"0".into(), &"f".into(), NOW).unwrap();
    assert_eq!(next.state, State::Done, "its new primary was lost in turn");
}

#[test]
fn a_target_that_has_taken_over_already_is_chosen_among_equals() {
    let mut story = Story::exited();
    let seen = story.stage.node("c");
    // Promoted by the hand-over that was under way: it follows nobody.
    (seen.role, seen.detached) = (Some(NodeRole::Primary), false);
    assert_eq!(story.chooses(), "c");
}
