//! Replicas whose engine is older than that of the primary that was lost: an old primary in a bake.

use slotmesh_topology::{Older, Shard};

use super::*;

/// A primary was lost while `b` followed it with an older engine, and has refused so many commands.
fn story(durability: u32, refused: Option<u64>) -> Story {
    let mut stage = Stage::new();
    stage.durability = durability;
    let older = Older {
        node: "b".into(),
        run_id: "run-b".into(),
        refused: 2,
    };
    stage.shard = stage.shard.is_older(older).unwrap();
    stage.node("b").unexpected_errors = refused;
    stage.end("a");
    Story::declared(stage, Some(FenceProof::Exited))
}

fn offsets(story: &mut Story, b: u64, c: u64) {
    story.detach("b", b);
    story.detach("c", c);
}

fn chosen(story: &mut Story) -> Result<String, String> {
    match story.decision() {
        Decision::Choose { node, .. } => Ok(node.to_string()),
        Decision::Wait { what, .. } => Err(what),
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_that_has_refused_nothing_is_chosen_as_any_other() {
    let mut story = story(0, Some(2));
    offsets(&mut story, 120, 100);
    assert_eq!(chosen(&mut story), Ok("b".into()));
}

#[test]
fn one_that_has_refused_a_command_is_not_chosen_though_it_has_read_further() {
    for refused in [Some(3), None] {
        let mut story = story(0, refused);
        offsets(&mut story, 120, 100);
        assert_eq!(chosen(&mut story), Ok("c".into()), "{refused:?}");
    }
}

#[test]
fn what_it_alone_may_have_acknowledged_is_not_given_up_without_a_word() {
    let mut story = story(1, Some(3));
    offsets(&mut story, 120, 100);
    let why = chosen(&mut story).unwrap_err();
    assert!(why.contains("b refused commands of a"), "{why}");
    offsets(&mut story, 120, 120);
    assert_eq!(chosen(&mut story), Ok("c".into()));
}

#[test]
fn with_nobody_else_an_operator_is_asked_and_his_word_counts() {
    let mut story = story(0, Some(3));
    story.stage.end("c");
    let why = chosen(&mut story).unwrap_err();
    assert!(why.contains("accept loss"), "{why}");
    story.stage.pass(CHOOSE_MS_MAX);
    assert!(matches!(
        story.decision(),
        Decision::Advance(FailoverPhase::Parked, _)
    ));
}

/// `b` follows with an older engine, and nothing has happened yet.
fn before_the_loss(refused: Option<u64>) -> Stage {
    let told = story(0, refused).stage;
    let mut stage = Stage::new();
    stage.shard.roster = told.shard.roster;
    stage.fleet = told.fleet;
    stage
}

/// The shard after `b` has replaced the primary that was lost.
fn b_takes_over(stage: Stage) -> Shard {
    let mut story = Story::declared(stage, Some(FenceProof::Exited));
    offsets(&mut story, 120, 100);
    assert_eq!(chosen(&mut story), Ok("b".into()));
    let decision = story.decision();
    let written = write(story.view(), &decision).unwrap().unwrap();
    (story.task, story.stage.shard) = (written.task, written.shard.unwrap());
    let commit = Decision::Commit {
        run_id: "run-b".into(),
        lineage: None,
    };
    let written = write(story.view(), &commit).unwrap().unwrap();
    written.shard.unwrap()
}

#[test]
fn a_primary_is_not_declared_lost_for_one_that_has_refused_commands() {
    let lost = |refused| {
        let mut stage = before_the_loss(refused);
        stage.end("c");
        stage.look();
        detect::decide(&stage.shard, stage.scene())
    };
    assert!(matches!(lost(Some(2)), detect::Verdict::Lost(_)));
    assert!(matches!(lost(Some(3)), detect::Verdict::Suspect { .. }));
}

#[test]
fn whose_engine_is_newer_than_the_new_primarys_is_not_taken_for_one_that_refuses() {
    let mut stage = before_the_loss(Some(2));
    for newer in ["a", "c"] {
        stage.member(newer).engine = "redis-8.2.3".into();
    }
    stage.end("a");
    assert!(b_takes_over(stage).roster.older.is_empty());
}

#[test]
fn who_has_another_engine_than_the_new_primary_is_watched_from_its_first_command_on() {
    let mut stage = Stage::new();
    // In the middle of an upgrade: b has the newer engine, c not yet.
    stage.member("b").engine = "redis-8.2.3".into();
    stage.node("c").unexpected_errors = Some(4);
    stage.end("a");
    let written = b_takes_over(stage);
    let older = written.older(&"c".into()).unwrap();
    assert_eq!((older.run_id.as_str(), older.refused), ("run-c", 4));
    let lost = written.older(&"a".into()).unwrap();
    assert!(
        !lost.is_sound("run-a", Some(0)),
        "nobody knows what it will refuse"
    );
    assert_eq!(written.older(&"b".into()), None);
}
