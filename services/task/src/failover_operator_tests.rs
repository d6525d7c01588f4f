//! What an operator may tell a failover that can't go on, and what becomes of it.

use super::*;

#[test]
fn retry_waits_once_more_and_undo_is_refused() {
    let mut story = Story::exited();
    story.stage.silence("b");
    story.stage.silence("c");
    story.parks();
    story.task.choice = Some(Choice::Undo);
    assert!(matches!(
        story.act(),
        Decision::Advance(FailoverPhase::Parked, why) if why.contains("can't be undone")
    ));
    story.task.choice = Some(Choice::Retry);
    story.act();
    assert_eq!(
        (story.phase(), story.task.choice),
        (FailoverPhase::Choose, None)
    );
    assert!(story.waits().contains("no replica"));
    story.parks();
}

#[test]
fn accepted_loss_takes_whoever_has_data() {
    let mut story = Story::exited();
    story.stage.silence("b");
    story.stage.node("c").run_id = "restarted".into();
    story.parks();
    story.task.choice = Some(Choice::AcceptLoss);
    assert_eq!(story.act(), Decision::Prove(FenceProof::Operator));
    assert_eq!(story.task.choice, None, "spent");
    assert_eq!(story.chooses(), "c");
    let member = story.stage.shard.member(&"c".into()).unwrap();
    assert_eq!((&*member.run_id, member.in_sync), ("restarted", false));
}

#[test]
fn accepted_loss_is_proof_enough_without_a_fence() {
    let mut story = Story::declared(Stage::new(), None);
    story.task.choice = Some(Choice::AcceptLoss);
    assert_eq!(story.act(), Decision::Prove(FenceProof::Operator));
    assert_eq!(story.phase(), FailoverPhase::Choose);
}

#[test]
fn accepted_loss_takes_no_empty_process_while_one_with_data_is_slow_to_let_go() {
    let mut story = Story::exited();
    // Back without its data, while the replicas have not answered the declaration yet.
    let lost = story.stage.node("a");
    lost.run_id = "restarted".into();
    (lost.keys, lost.granted_epoch) = (0, Epoch(0));
    for replica in ["b", "c"] {
        let seen = story.stage.node(replica);
        (seen.keys, seen.detached, seen.assigned_epoch) = (7, false, Epoch(4));
    }
    story.parks();
    story.task.choice = Some(Choice::AcceptLoss);
    assert_eq!(story.act(), Decision::Prove(FenceProof::Operator));
    story.waits();
    story.stage.pass(1_000);
    let waits = story.waits();
    assert!(waits.contains("has not let go yet"), "{waits}");
    let slow = story.stage.node("b");
    (slow.detached, slow.assigned_epoch) = (true, Epoch(5));
    assert_eq!(story.chooses(), "b");
}
