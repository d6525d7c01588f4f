//! Waits that may be long, with the shard free: for a window.

use super::{
    story::{NEW, Story, options},
    *,
};
use crate::spec::State;

#[test]
fn a_hiccup_after_hours_of_waiting_for_the_window_is_no_reason_to_go_back() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    story.opens_ms = Some(u64::MAX - 1);
    story.settle(50);
    assert_eq!(story.engines(), ["", NEW, NEW]);
    assert_eq!(story.owner, Owner::Free, "others may have the shard");
    let events = story.events.len();
    story.settle(50);
    assert_eq!(story.events.len(), events, "it is said once");
    story.stage.pass(3 * NODE_MS_MAX);
    story.stage.member("b").in_sync = false;
    assert!(story.act());
    assert_eq!(story.part().phase, UpgradePhase::Replicas);
    assert_eq!(story.owner, Owner::Own, "it is looked after");
    assert!(matches!(story.decide(), Decision::Wait { .. }));
    story.settle(5);
    assert_eq!(story.owner, Owner::Free);
    // An operator is heard at once, as ever.
    story.task.cancel_requested = true;
    assert!(story.act() && story.act());
    assert_eq!(story.part().phase, UpgradePhase::UndoNodes);
    story.task.cancel_requested = false;
    story.run_to(UpgradePhase::RolledBack);
}

#[test]
fn what_waited_for_the_window_goes_on_when_it_opens() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    story.opens_ms = Some(u64::MAX - 1);
    story.settle(50);
    story.stage.pass(3 * NODE_MS_MAX);
    story.opens_ms = None;
    story.run_to(UpgradePhase::Done);
    assert_eq!(story.ended().0, State::Done);
}
