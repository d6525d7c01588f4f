//! What closes the way back, and what failovers in the middle of an upgrade lead to.

use super::{
    story::{BAKE_MS, NEW, Story, fail_over, options},
    *,
};
use crate::{
    spec::State,
    table::{self, Cancel},
};

#[test]
fn the_way_back_closes_for_good_at_whatever_could_have_made_a_difference() {
    type Event = fn(&mut Story);
    let events: [(&str, Event); 7] = [
        ("refused a command", |s| {
            s.stage.node("a").unexpected_errors = Some(1)
        }),
        ("refused a command", |s| {
            s.stage.node("a").unexpected_errors = None
        }),
        ("copy in full", |s| {
            let new = s.stage.shard.primary.to_string();
            s.stage.node(&new).sync_full += 1;
        }),
        ("a was restarted", |s| {
            s.stage.node("a").run_id = "other".into()
        }),
        ("does not follow", |s| {
            s.stage.cut("a");
        }),
        ("was restarted", |s| {
            let new = s.stage.shard.primary.clone();
            s.stage.shard = s.stage.shard.readmit("other").unwrap();
            s.stage.node(new.as_str()).run_id = "other".into();
        }),
        ("a has left", |s| {
            let gone = s.stage.shard.expel(&"a".into()).unwrap();
            s.stage.shard = gone.leave(&"a".into()).unwrap();
        }),
    ];
    for (words, event) in events {
        let mut story = Story::new(&options());
        story.run_to(UpgradePhase::Bake);
        story.keep();
        let begun_ms = story.stage.now_ms;
        event(&mut story);
        for _ in 0..20 {
            story.keep();
        }
        story.run_to(UpgradePhase::Finalize);
        assert!(
            story.stage.now_ms < begun_ms + BAKE_MS,
            "{words}: before the bake's end"
        );
        let rollback = story.part().rollback.clone().unwrap();
        assert!(
            !rollback.open && rollback.why.contains(words),
            "{words}: {rollback:?}"
        );
        assert!(
            matches!(table::cancel(&story.task), Cancel::Refused(_)),
            "{words}"
        );
        // What is asked for now comes too late.
        story.task.cancel_requested = true;
        if words.starts_with("does not") {
            story.stage.node("a").link_up = true;
        }
        story.run_to(UpgradePhase::Done);
        assert!(story.engines().iter().skip(1).all(|e| e == NEW));
    }
}

fn shown(story: &Story) -> (String, String) {
    let (state, why) = story.part().rollback.as_ref().unwrap().shown();
    (state.to_owned(), why.to_owned())
}

fn settle(story: &mut Story) {
    for _ in 0..10 {
        while story.act() {}
        story.keep();
    }
}

#[test]
fn a_link_that_breaks_and_goes_on_in_the_stream_leaves_the_way_back_open() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    settle(&mut story);
    assert_eq!(shown(&story).0, "Open");
    for _ in 0..3 {
        story.stage.cut("a");
        // Longer than a replica is given before it is blamed.
        (0..30).for_each(|_| story.keep());
        settle(&mut story);
        let (state, why) = shown(&story);
        assert_eq!(state, "Unknown", "one can't go back now");
        assert!(why.contains("does not follow"), "{why}");
        story.stage.node("a").link_up = true;
        settle(&mut story);
        assert_eq!(shown(&story), ("Open".into(), String::new()));
    }
    assert_eq!(story.part().phase, UpgradePhase::Bake);
}

#[test]
fn a_way_back_whose_nodes_are_silent_is_not_called_open() {
    for silent in ["a", "new"] {
        let mut story = Story::new(&options());
        story.run_to(UpgradePhase::Bake);
        settle(&mut story);
        let new = story.stage.shard.primary.to_string();
        let silent = if silent == "a" { "a" } else { new.as_str() };
        let host = format!("host-{silent}");
        story.stage.fleet.hosts.remove(&host.as_str().into());
        (0..30).for_each(|_| story.keep());
        settle(&mut story);
        let (state, why) = shown(&story);
        assert_eq!(state, "Unknown");
        assert!(why.contains(silent), "{why}");
        story.stage.fleet.hosts.insert(host.as_str().into());
        settle(&mut story);
        assert_eq!(shown(&story).0, "Open", "what it counts has not changed");
    }
}

#[test]
fn the_record_says_who_is_older_from_before_the_switch_until_nobody_is() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    let older = story.stage.shard.older(&"a".into()).unwrap();
    assert_eq!((older.run_id.as_str(), older.refused), ("run-a", 0));
    story.run_to(UpgradePhase::Done);
    assert!(story.stage.shard.roster.older.is_empty());
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Switch);
    assert!(story.act(), "planned");
    assert_eq!(story.stage.shard.roster.foreseen.len(), 1);
    story.switches = Phase::RolledBack;
    story.run_to(UpgradePhase::UndoNodes);
    let given_up = story.stage.shard.older(&"a".into());
    assert_eq!(given_up, None, "it has followed nobody");
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.stage.shard, story.stage.shard.none_older());
}

#[test]
fn an_ended_upgrade_that_is_tried_again_notes_anew_what_the_nodes_run() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::RolledBack);
    for node in story.stage.fleet.nodes.values_mut() {
        node.version = "7.0.16".into();
    }
    story.task.state = State::NeedsOperator;
    story.task = retried(story.task.clone(), story.stage.now_ms);
    story.run_to(UpgradePhase::Ready);
    let versions = story.part().nodes.iter().map(|n| n.from_version.as_str());
    assert_eq!(versions.collect::<Vec<_>>(), ["7.0.16"; 3]);
}

#[test]
fn an_old_primary_that_has_diverged_copies_anew_and_is_not_counted_on_meanwhile() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.stage.node("a").unexpected_errors = Some(3);
    story.run_to(UpgradePhase::Finalize);
    let old = story.stage.member("a").clone();
    assert_eq!(
        (old.exchange, old.in_sync),
        (Some(Exchange::Discard), false)
    );
    story.run_to(UpgradePhase::Done);
}

#[test]
fn an_old_primary_that_was_lost_is_not_emptied_before_it_has_come_back_to_follow() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Switch);
    assert!(story.act(), "the switch is planned");
    fail_over(&mut story, "b");
    let old = story.stage.node("a");
    (old.role, old.following) = (Some(NodeRole::Primary), String::new());
    for _ in 0..300 {
        story.step();
        assert_eq!(story.stage.member("a").exchange, None);
    }
    story.follow(&"b".into());
    story.run_to(UpgradePhase::Done);
    assert_eq!(story.engines(), [NEW, NEW, NEW]);
}

#[test]
fn a_failover_to_an_upgraded_node_is_a_switch_without_a_way_back() {
    for phase in [UpgradePhase::Replicas, UpgradePhase::Switch] {
        let mut story = Story::new(&options());
        story.run_to(phase);
        if phase == UpgradePhase::Replicas {
            while story.engines()[1] != NEW || !story.stage.member("b").in_sync {
                story.step();
            }
        } else {
            assert!(story.act(), "the switch is planned");
        }
        fail_over(&mut story, "b");
        story.run_to(UpgradePhase::Done);
        assert_eq!(story.engines(), [NEW, NEW, NEW], "{phase:?}");
        assert_eq!(story.stage.shard.primary.as_str(), "b");
    }
}

#[test]
fn a_failover_to_the_old_primary_in_the_bake_takes_the_rest_back() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    fail_over(&mut story, "a");
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
    let (state, why) = story.ended();
    assert_eq!(state, State::RolledBack);
    assert!(why.contains("a is the primary again"), "{why}");
}

#[test]
fn a_failover_to_an_old_node_before_the_switch_is_gone_on_from() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    fail_over(&mut story, "c");
    story.run_to(UpgradePhase::Done);
    assert_eq!(story.engines(), [NEW, NEW, NEW]);
}

#[test]
fn an_old_primary_that_refuses_a_command_after_its_bake_is_not_kept_either() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Finalize);
    assert!(story.act(), "the shard is taken again");
    story.stage.node("a").unexpected_errors = Some(1);
    let Decision::Exchange { node, data, .. } = story.decide() else {
        panic!("{:?}", story.decide());
    };
    assert_eq!((node.as_str(), data), ("a", Exchange::Discard));
    // Also when it has been told to make way, and has not ended yet.
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Finalize);
    assert!(story.act() && story.act());
    assert_eq!(story.stage.member("a").exchange, Some(Exchange::Keep));
    story.stage.node("a").unexpected_errors = Some(1);
    assert!(story.act());
    assert_eq!(story.stage.member("a").exchange, Some(Exchange::Discard));
    story.run_to(UpgradePhase::Done);
}

#[test]
fn what_an_old_primary_refuses_while_the_task_waits_for_an_operator_is_not_kept() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Finalize);
    assert!(story.act() && story.act());
    assert_eq!(story.stage.member("a").exchange, Some(Exchange::Keep));
    story.stage.node("a").trouble = Some(crate::observe::EngineTrouble {
        engine: NEW.into(),
        starts: STARTS_MAX,
        why: "not enough disk".into(),
    });
    story.run_to(UpgradePhase::Parked);
    let told = story.stage.member("a");
    assert_eq!(told.exchange, Some(Exchange::Discard));
}

#[test]
fn a_replica_that_is_still_old_behind_a_new_primary_is_kept_only_if_its_refusals_are_counted() {
    let old_behind_new = |counted: bool| {
        let mut story = Story::new(&options());
        story.run_to(UpgradePhase::Replicas);
        while story.stage.member("b").engine != NEW || !story.stage.member("b").in_sync {
            story.act();
            story.agents();
            assert!(
                story.stage.member("c").engine.is_empty(),
                "its turn is later"
            );
        }
        let upgraded = story.stage.shard.members.iter();
        let upgraded = upgraded.filter(|m| m.engine == NEW).count();
        assert_eq!(upgraded, 1, "{:?}", story.stage.shard.members);
        fail_over(&mut story, "b");
        if counted {
            let older = slotmesh_topology::Older {
                node: "c".into(),
                run_id: "run-c".into(),
                refused: 0,
            };
            story.stage.shard = story.stage.shard.is_older(older).unwrap();
        }
        for _ in 0..50 {
            if story.stage.member("c").exchange.is_some() {
                break;
            }
            story.step();
        }
        story.stage.member("c").exchange
    };
    assert_eq!(old_behind_new(true), Some(Exchange::Keep));
    assert_eq!(old_behind_new(false), Some(Exchange::Discard));
}

#[test]
fn a_link_that_comes_and_goes_all_the_time_leaves_a_bounded_number_of_events_and_one_can_go_back() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    settle(&mut story);
    for turn in 0..2 * bake::DOUBTS_MAX {
        story.stage.member("a").in_sync = turn % 2 == 1;
        while story.act() {}
    }
    let said = story.events.iter().filter(|e| *e == "Rollback").count();
    assert_eq!(said, bake::DOUBTS_MAX as usize);
    assert_eq!(shown(&story).0, "Unknown");
    story.keep();
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
}
