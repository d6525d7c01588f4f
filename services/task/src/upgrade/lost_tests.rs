//! What closes the way back, and what failovers in the middle of an upgrade lead to.

use super::{
    story::{NEW, Story, fail_over, options},
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
            s.stage.pass(FOLLOW_MS_MAX);
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
        event(&mut story);
        for _ in 0..20 {
            story.keep();
        }
        assert!(story.act(), "{words}");
        assert_eq!(story.part().phase, UpgradePhase::Finalize, "{words}");
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
        if !story.act() {
            story.agents();
        }
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
                if !story.act() {
                    story.agents();
                }
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
