//! Replacements as short stories: what is seen, what is done next, and what the record says then.

use slotmesh_topology::{Epoch, FenceProof, HostId, NodeId, NodeRole, TaskId, credential};

use super::*;
use crate::{
    detect::{
        self, Loss,
        tests::{NOW, Stage},
    },
    failover,
    spec::Spec,
};

const NEW: &str = "r-0-3";
const AFTER_S: u32 = 600;
const AFTER_MS: u64 = 600_000;

/// A replacement on its way: what each decision writes is the next one's record.
struct Story {
    stage: Stage,
    task: Task,
}

impl Story {
    /// Host `host-c` has been gone for long enough; `host-d` is free.
    fn lost() -> Self {
        let mut stage = stage();
        stage.silence("c");
        stage.look();
        stage.now_ms += AFTER_MS;
        all_report(&mut stage);
        stage.look();
        let lost = due(&stage.shard, stage.scene(), AFTER_S, |_, _| false).unwrap();
        assert_eq!(lost.node.as_str(), "c");
        Self::planned(stage, &lost.cause, false)
    }

    fn asked() -> Self {
        Self::planned(stage(), "an operator", true)
    }

    fn planned(stage: Stage, cause: &str, by_operator: bool) -> Self {
        let why = (cause.to_owned(), by_operator);
        let host: HostId = "host-d".into();
        let task = plan(
            "t".into(),
            &stage.shard,
            &"c".into(),
            &host,
            why,
            stage.now_ms,
        );
        Self {
            task: task.unwrap(),
            stage,
        }
    }

    fn spec(&self) -> &NodeReplacement {
        match &self.task.spec {
            Spec::Replace(replacement) => replacement,
            other => panic!("{other:?}"),
        }
    }

    fn view(&self) -> View<'_> {
        View {
            task: &self.task,
            replacement: self.spec(),
            shard: &self.stage.shard,
            scene: self.stage.scene(),
        }
    }

    /// Decides and writes, as the leader does; returns what was decided.
    fn act(&mut self) -> Decision {
        self.stage.look();
        let decision = decide(self.view());
        if let Some(written) = write(self.view(), &decision).unwrap() {
            self.task = written.task;
            self.stage.shard = written.shard.unwrap_or_else(|| self.stage.shard.clone());
            // The next report of everybody is a later one.
            self.stage.now_ms += 10;
            all_report(&mut self.stage);
        }
        decision
    }

    fn waits(&mut self) -> String {
        match self.act() {
            Decision::Wait { what, .. } => what,
            other => panic!("does not wait: {other:?}"),
        }
    }

    /// As the record has it: the primary's agent makes and deletes users.
    fn converge(&mut self) {
        let shard = self.stage.shard.clone();
        let fed = shard
            .members
            .iter()
            .filter(|m| m.node != shard.primary && !m.leaving);
        let users = fed
            .map(|m| credential::replica_name(shard.epoch, &m.node))
            .collect();
        let seen = self.stage.node(shard.primary.as_str());
        seen.replication_users = users;
        seen.assigned_membership = shard.roster.membership;
    }

    fn joined(mut self) -> Self {
        assert_eq!(self.act(), Decision::Join);
        self.converge();
        self
    }

    /// The new node runs, follows and is recorded so.
    fn caught_up(mut self) -> Self {
        let mut seen = self.stage.fleet.nodes[&"b".into()].clone();
        (seen.run_id, seen.address) = (format!("run-{NEW}"), format!("{NEW}:1"));
        self.stage.fleet.nodes.insert(NEW.into(), seen);
        let member = self.stage.member(NEW);
        (member.run_id, member.address) = (format!("run-{NEW}"), format!("{NEW}:1"));
        member.in_sync = true;
        self
    }

    fn gone(&self) -> Vec<&str> {
        self.stage
            .shard
            .roster
            .gone
            .iter()
            .map(|g| g.node.as_str())
            .collect()
    }
}

fn stage() -> Stage {
    let mut stage = Stage::new();
    stage.fleet.hosts.insert("host-d".into());
    stage.fleet.leases.insert("host-d".into());
    stage
}

fn all_report(stage: &mut Stage) {
    let now_ms = stage.now_ms;
    stage
        .fleet
        .nodes
        .values_mut()
        .for_each(|n| n.seen_ms = now_ms);
}

#[test]
fn a_node_is_due_only_after_its_time_and_never_the_primary() {
    let mut stage = stage();
    stage.silence("c");
    stage.look();
    let is_due = |stage: &Stage, after| due(&stage.shard, stage.scene(), after, |_, _| false);
    stage.now_ms += AFTER_MS - 1;
    all_report(&mut stage);
    assert_eq!(is_due(&stage, AFTER_S), None);
    stage.now_ms += 1;
    assert!(is_due(&stage, AFTER_S).is_some());
    assert_eq!(is_due(&stage, 0), None, "never");
    let spared = due(&stage.shard, stage.scene(), AFTER_S, |node, since| {
        node.as_str() == "c" && since == NOW
    });
    assert_eq!(spared, None, "an operator ended it");
    let task: TaskId = "f".into();
    stage.shard = stage.shard.fail_over(&task, 0).unwrap();
    assert_eq!(is_due(&stage, AFTER_S), None, "a failover is under way");

    let mut stage = self::stage();
    stage.silence("a");
    stage.look();
    stage.now_ms += AFTER_MS;
    all_report(&mut stage);
    assert_eq!(is_due(&stage, AFTER_S), None, "the primary");
}

#[test]
fn many_lost_hosts_at_once_are_not_replaced() {
    let mut stage = stage();
    stage.silence("b");
    stage.silence("c");
    stage.look();
    stage.now_ms += AFTER_MS;
    all_report(&mut stage);
    stage.look();
    assert!(stage.sightings.brake().is_some());
    assert_eq!(
        due(&stage.shard, stage.scene(), AFTER_S, |_, _| false),
        None
    );
}

#[test]
fn nobody_has_left_while_the_primarys_agent_has_an_older_record() {
    let mut story = Story::lost().joined().caught_up();
    assert_eq!(story.act(), Decision::Expel);
    story.stage.pass(1);
    story.converge();
    // Its users are those of the record already, by one of before that it may go on from.
    story.stage.node("a").assigned_membership -= 1;
    assert!(story.waits().contains("a to let go of c"));
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
}

#[test]
fn the_new_node_has_the_place_before_the_old_one_leaves() {
    let mut story = Story::lost().joined();
    assert_eq!(story.stage.shard.members.len(), 4);
    assert!(story.waits().contains("to be started on host-d"));
    let mut story = story.caught_up();
    assert_eq!(story.act(), Decision::Expel);
    assert!(story.stage.member("c").leaving);
    assert!(
        story.waits().contains("a to let go of c"),
        "it is still fed"
    );
    assert_eq!(story.stage.shard.members.len(), 4);
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
    assert_eq!(story.task.state, State::Done);
    assert_eq!(story.gone(), ["c"]);
    assert!(story.stage.shard.member(&NEW.into()).unwrap().in_sync);
    assert_eq!(
        story.stage.shard.epoch,
        Epoch(4),
        "the primary served all the time"
    );
}

#[test]
fn a_report_from_before_the_word_is_no_proof_that_it_was_followed() {
    let mut story = Story::lost().joined().caught_up();
    assert_eq!(story.act(), Decision::Expel);
    story.converge();
    let since = story.spec().phase_since_ms;
    story.stage.node("a").seen_ms = since;
    story.waits();
    story.stage.node("a").seen_ms = since + 1;
    assert_eq!(story.act(), Decision::Leave);
}

#[test]
fn with_durability_others_first_get_what_the_leaving_one_may_have_confirmed() {
    let mut story = Story::asked();
    story.stage.durability = 2;
    let mut story = story.joined().caught_up();
    assert_eq!(story.act(), Decision::Expel);
    story.converge();
    story.stage.node("a").offset = 150;
    assert_eq!(story.act(), Decision::Drain(150));
    story.stage.node("b").offset = 150;
    assert!(
        story
            .waits()
            .contains("2 replicas to have what c has confirmed")
    );
    story.stage.node(NEW).offset = 151;
    assert_eq!(story.act(), Decision::Leave);
}

#[test]
fn an_epoch_that_begins_meanwhile_begins_the_proof_anew() {
    let mut story = Story::asked();
    story.stage.durability = 1;
    let mut story = story.joined().caught_up();
    assert_eq!(story.act(), Decision::Expel);
    story.converge();
    assert!(matches!(story.act(), Decision::Drain(_)));
    story.stage.shard.epoch = Epoch(5);
    assert!(matches!(
        story.act(),
        Decision::Advance(ReplacePhase::Leave, _)
    ));
    assert!(
        story.waits().contains("to let go"),
        "users of the old epoch"
    );
}

#[test]
fn a_host_that_is_back_before_the_new_node_has_caught_up_keeps_its_node() {
    let mut story = Story::lost().joined();
    story.stage.fleet.hosts.insert("host-c".into());
    story.stage.fleet.leases.insert("host-c".into());
    assert!(matches!(
        story.act(),
        Decision::TurnBack {
            on_request: false,
            ..
        }
    ));
    assert!(story.stage.member(NEW).leaving && !story.stage.member("c").leaving);
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
    assert_eq!(story.task.state, State::RolledBack);
    assert_eq!(story.gone(), [NEW]);
}

#[test]
fn a_host_that_is_back_after_that_loses_its_node() {
    let mut story = Story::lost().joined().caught_up();
    story.stage.fleet.hosts.insert("host-c".into());
    story.stage.fleet.leases.insert("host-c".into());
    assert_eq!(story.act(), Decision::Expel);
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
    assert_eq!(story.gone(), ["c"]);
}

#[test]
fn what_changed_before_the_join_ends_it_without_effect() {
    let mut story = Story::lost();
    story.stage.fleet.leases.insert("host-c".into());
    assert!(matches!(story.act(), Decision::End(State::RolledBack, _)));
    assert_eq!(story.stage.shard.members.len(), 3);
    let mut story = Story::asked();
    story.stage.fleet.hosts.remove(&"host-d".into());
    assert!(matches!(story.act(), Decision::End(State::RolledBack, _)));
}

#[test]
fn a_new_host_that_is_lost_too_is_given_up() {
    let mut story = Story::asked().joined();
    story.stage.silence("d");
    story.waits();
    story.stage.now_ms += NEW_HOST_GONE_MS;
    all_report(&mut story.stage);
    assert!(matches!(story.act(), Decision::TurnBack { .. }));
}

#[test]
fn a_cancel_is_honoured_until_the_old_node_leaves() {
    let mut story = Story::asked().joined();
    assert!(story.task.is_cancellable());
    story.task.cancel_requested = true;
    assert!(matches!(
        story.act(),
        Decision::TurnBack {
            on_request: true,
            ..
        }
    ));
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
    assert_eq!(story.task.state, State::Cancelled);

    let mut story = Story::asked().joined().caught_up();
    story.act();
    assert!(!story.task.is_cancellable());
}

#[test]
fn one_that_does_not_catch_up_in_time_is_the_operators() {
    let parked = || {
        let mut story = Story::asked().joined();
        story.stage.now_ms += CATCH_UP_MS_MAX;
        all_report(&mut story.stage);
        assert!(matches!(
            story.act(),
            Decision::Advance(ReplacePhase::Parked, _)
        ));
        assert!(story.task.is_parked());
        assert_eq!(menu(&story.task), [Choice::Retry, Choice::Undo]);
        story
    };
    let mut story = parked();
    assert_eq!(story.waits(), "an operator's choice");
    story.task.choice = Some(Choice::Retry);
    assert!(matches!(
        story.act(),
        Decision::Advance(ReplacePhase::CatchUp, _)
    ));
    assert_eq!(story.task.state, State::Running);
    assert!(story.task.deadline_ms > story.stage.now_ms);

    let mut story = parked();
    story.task.choice = Some(Choice::Undo);
    assert!(matches!(story.act(), Decision::TurnBack { .. }));
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
    assert_eq!(story.task.state, State::Cancelled);

    let mut story = parked().caught_up();
    assert!(matches!(
        story.act(),
        Decision::Advance(ReplacePhase::CatchUp, _)
    ));
    assert_eq!(story.act(), Decision::Expel);
}

#[test]
fn a_failover_goes_first_and_the_replacement_goes_on_with_what_it_left() {
    let mut story = Story::lost().joined().caught_up();
    assert_eq!(story.act(), Decision::Expel);
    let loss = Loss {
        cause: "seen".into(),
        proof: Some(FenceProof::Exited),
    };
    let (by, declared) = failover::declare("f".into(), &story.stage.shard, &loss, NOW).unwrap();
    let paused = failover::supersede(&story.task, &declared.id, &by.id, NOW).unwrap();
    assert_eq!(
        (&paused.spec, paused.state),
        (&story.task.spec, State::Running)
    );
    story.task = paused;
    story.stage.shard = declared;
    assert_eq!(story.waits(), "the shard to serve");

    let new: NodeId = NEW.into();
    let chosen = story
        .stage
        .shard
        .choose(&"f".into(), &new, &format!("run-{NEW}"));
    let next = chosen
        .unwrap()
        .promoted(&"f".into(), &format!("run-{NEW}"), None);
    story.stage.shard = next.unwrap();
    story.stage.member("b").in_sync = true;
    let seen = story.stage.node(NEW);
    (seen.role, seen.assigned_epoch) = (Some(NodeRole::Primary), Epoch(5));
    assert!(story.waits().contains("to let go of c"));
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
    assert_eq!(story.gone(), ["c"]);
}

#[test]
fn a_failover_to_the_leaving_node_turns_the_replacement_back() {
    let mut story = Story::asked().joined().caught_up();
    assert_eq!(story.act(), Decision::Expel);
    let (task, c): (TaskId, NodeId) = ("f".into(), "c".into());
    let lost = story.stage.shard.fail_over(&task, NOW).unwrap();
    let fenced = lost.prove(&task, FenceProof::Exited).unwrap();
    let chosen = fenced.choose(&task, &c, "run-c").unwrap();
    story.stage.shard = chosen.promoted(&task, "run-c", None).unwrap();
    story.stage.node("c").role = Some(NodeRole::Primary);
    assert!(!story.stage.member("c").leaving);
    story.stage.member("b").in_sync = true;
    assert!(matches!(story.act(), Decision::TurnBack { .. }));
    story.stage.node("c").assigned_epoch = Epoch(5);
    story.converge();
    assert_eq!(story.act(), Decision::Leave);
    assert_eq!(
        (story.task.state, story.gone()),
        (State::RolledBack, vec![NEW])
    );
}

#[test]
fn a_priority_decides_between_equals_and_zero_never_promotes() {
    let mut stage = Stage::new();
    stage.end("a");
    for name in ["b", "c"] {
        let seen = stage.node(name);
        (seen.detached, seen.link_up, seen.assigned_epoch) = (true, false, Epoch(5));
    }
    let chosen = |stage: &Stage| {
        let loss = Loss {
            cause: "seen".into(),
            proof: Some(FenceProof::Exited),
        };
        let (task, shard) =
            failover::declare("f".into(), &stage.shard, &loss, stage.now_ms).unwrap();
        let Spec::Failover(spec) = &task.spec else {
            panic!("{task:?}")
        };
        let step = crate::switchover::StepStatus::NotStarted;
        let decision = failover::decide(failover::View {
            task: &task,
            failover: spec,
            shard: &shard,
            scene: stage.scene(),
            step: &step,
            promoted: None,
        });
        match decision {
            failover::Decision::Choose { node, .. } => node.to_string(),
            other => format!("{other:?}"),
        }
    };
    stage.look();
    assert_eq!(chosen(&stage), "b", "the first of equals");
    stage.member("c").priority = 200;
    assert_eq!(chosen(&stage), "c", "the preferred of equals");
    stage.node("b").offset = 101;
    assert_eq!(chosen(&stage), "b", "data counts more");
    stage.member("b").priority = 0;
    assert_eq!(chosen(&stage), "c", "never");
    stage.member("c").priority = 0;
    assert!(chosen(&stage).contains("Wait"), "nobody may");
    assert!(!detect::can_fail_over(&stage.shard, stage.scene()));
}
