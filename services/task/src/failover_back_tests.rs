//! A lost primary that is back as another process, with everything that it had when it ended in order.

use super::*;

#[test]
fn with_durability_a_primary_that_ended_in_order_and_is_back_has_everything() {
    // Every process was ended and started again: nobody's offset says anything.
    let mut stage = Stage::new();
    stage.durability = 1;
    stage.end("a");
    let mut story = Story::declared(stage, Some(FenceProof::Exited));
    for name in ["b", "c"] {
        let node = story.stage.node(name);
        (node.run_id, node.offset) = (format!("{name}-again"), 0);
    }
    let back = story.stage.node("a");
    back.state = ProcessState::Running;
    (back.run_id, back.offset) = ("a-again".into(), 0);
    (back.role, back.granted_epoch) = (Some(NodeRole::Primary), Epoch(0));
    back.assigned_epoch = Epoch(5);
    let why = story.parks();
    assert!(why.contains("0 of 2 replicas answer"), "{why}");
    story.stage.node("a").continues_run_id = "an earlier one".into();
    story.waits();
    story.stage.node("a").continues_run_id = "run-a".into();
    assert!(matches!(
        story.act(),
        Decision::Advance(FailoverPhase::Choose, _)
    ));
    story.stage.node("a").keys = 0;
    story.stage.node("b").keys = 7;
    story.waits();
    story.stage.node("a").keys = 7;
    assert_eq!(story.chooses(), "a");
}

#[test]
fn replicas_that_have_everything_go_before_a_primary_that_is_back() {
    let mut stage = Stage::new();
    stage.durability = 1;
    stage.end("a");
    let mut story = Story::declared(stage, Some(FenceProof::Exited));
    let back = story.stage.node("a");
    (back.state, back.run_id) = (ProcessState::Running, "a-again".into());
    (back.role, back.keys, back.offset) = (Some(NodeRole::Primary), 7, 0);
    (back.granted_epoch, back.assigned_epoch) = (Epoch(0), Epoch(5));
    back.continues_run_id = "run-a".into();
    assert_eq!(story.chooses(), "b", "nobody needs a full copy");
}
