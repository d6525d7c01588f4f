//! Proxies that come and go while they are changed, and what can be done with one afterwards that takes no
//! more clients.

use super::{
    story::{NEW, Story, options},
    *,
};
use crate::{
    Spec,
    spec::{Choice, State},
};

use ProxyPhase::{Back, Bake, Done, Drain, Parked, RolledBack};

const SUCCESSOR: &str = "r-proxy-0";

fn rebuild(bake_ms: u64) -> Options {
    Options {
        program: None,
        proxies: vec!["pa".into()],
        bake_ms,
        rebuild: Some(Rebuild {
            host: None,
            drain_ms: DRAIN_MS,
        }),
        ..options()
    }
}

fn restart() -> Options {
    Options {
        program: None,
        proxies: vec!["pa".into()],
        ..options()
    }
}

/// A task of its own, after another one.
fn ask(story: &mut Story, options: &Options) {
    let planned = story.plan(options).unwrap();
    story.task.spec = Spec::Proxies(planned.changes);
    story.task.state = State::Running;
    story.settle();
}

fn begun(options: &Options, alone: bool) -> Story {
    let mut story = Story::before();
    story.stage.fleet.hosts.insert("host-x".into());
    if alone {
        story.leave_alone();
    }
    story.stays = true;
    ask(&mut story, options);
    assert_eq!(story.phases(), [Bake]);
    story
}

fn draining(alone: bool) -> Story {
    let mut story = begun(&rebuild(BAKE_MS), alone);
    story.pass(BAKE_MS);
    assert_eq!(story.phases(), [Drain]);
    story
}

/// An operator has left it as it is, after its process did not hear that it may stay, and none could be
/// started in its place.
fn left_as_it_is() -> Story {
    let mut story = draining(false);
    story.deaf = true;
    story.lose("host-x");
    story.fails.insert(("pa", ""));
    story.settle();
    story.pass(AWAY_MS_MAX);
    assert_eq!(story.phases(), [Parked], "{:?}", story.events);
    story.task = resolved(&story.task, Choice::Finalize, story.stage.now_ms);
    story.settle();
    assert_eq!(story.phases(), [RolledBack]);
    assert!(story.task.state.is_ended() && !story.task.is_parked());
    story.fails.clear();
    story
}

#[test]
fn one_that_takes_no_more_clients_and_was_left_so_is_restarted_or_upgraded_later() {
    let upgrade = Options {
        proxies: vec!["pa".into()],
        ..options()
    };
    for (options, program) in [(restart(), ""), (upgrade, NEW)] {
        let mut story = left_as_it_is();
        ask(&mut story, &options);
        assert_eq!(story.phases(), [Bake], "{:?}", story.events);
        story.pass(BAKE_MS);
        assert_eq!(story.phases(), [Done]);
        assert!(story.process("pa").serves(program, 2));
        let pid = story.process("pa").pid;
        assert!(!story.left.contains(&pid), "it takes clients");
        // The next one hands over.
        ask(&mut story, &restart());
        let placement = story.placement("pa");
        assert_eq!((placement.generation, placement.cold), (3, false));
    }
}

#[test]
fn one_that_could_not_be_restarted_either_can_go_back_and_be_tried_again() {
    let mut story = left_as_it_is();
    let upgrade = Options {
        proxies: vec!["pa".into()],
        ..options()
    };
    story.fails.insert(("pa", NEW));
    ask(&mut story, &upgrade);
    assert_eq!(story.phases(), [RolledBack], "{:?}", story.events);
    let pid = story.process("pa").pid;
    assert!(story.process("pa").serves("", 1) && !story.left.contains(&pid));
    // Nor could that.
    let mut story = left_as_it_is();
    story.fails.extend([("pa", NEW), ("pa", "")]);
    ask(&mut story, &upgrade);
    assert_eq!(story.phases(), [Parked], "{:?}", story.events);
    story.fails.clear();
    story.task = resolved(&story.task, Choice::Retry, story.stage.now_ms);
    story.settle();
    assert_eq!(story.phases(), [RolledBack]);
    let pid = story.process("pa").pid;
    assert!(!story.left.contains(&pid));
}

/// Up and down, for so long at a time; how long until its phase is another one.
fn flaps(story: &mut Story, name: &str, down_ms: u64, up_ms: u64) -> u64 {
    let began_ms = story.stage.now_ms;
    for _ in 0..1_000 {
        for (fresh, ms) in [(false, down_ms), (true, up_ms)] {
            story.heard(name).fresh = fresh;
            story.settle();
            story.pass(ms);
            if story.phases()[0] != Bake {
                return story.stage.now_ms - began_ms;
            }
        }
    }
    panic!("it flaps for ever: {:?}", story.phases());
}

#[test]
fn a_successor_that_comes_and_goes_has_to_be_well_for_a_whole_bake_and_in_time() {
    let most_ms = OTHERS_MS_MAX + 2 * BAKE_MS;
    let mut story = begun(&rebuild(BAKE_MS), false);
    let took_ms = flaps(&mut story, SUCCESSOR, BAKE_MS + 1, BAKE_MS - 1);
    assert_eq!(story.phases(), [RolledBack], "{:?}", story.events);
    assert!(took_ms <= most_ms + 2 * BAKE_MS, "{took_ms}");
    assert!(took_ms >= OTHERS_MS_MAX, "{took_ms}: one long wait fits");
    let mut placed = story.instance.proxies.iter();
    assert!(placed.all(|p| p.proxy.as_str() != SUCCESSOR && p.leaving.is_none()));
    let message = &story.part("pa").message;
    assert!(message.contains("not well for a whole bake"), "{message}");

    // Once is nothing.
    let mut story = begun(&rebuild(BAKE_MS), false);
    story.heard(SUCCESSOR).fresh = false;
    story.pass(BAKE_MS);
    story.heard(SUCCESSOR).fresh = true;
    story.pass(BAKE_MS - 1);
    assert_eq!(story.phases(), [Bake], "it is watched anew");
    story.pass(BAKE_MS);
    assert_eq!(story.phases(), [Drain]);
}

#[test]
fn others_that_come_and_go_hold_a_successors_bake_up_for_no_longer() {
    let mut story = begun(&rebuild(6 * BAKE_MS), false);
    let mut flaps = 0;
    while story.phases()[0] == Bake {
        flaps += 1;
        assert!(flaps < 100, "for ever: {:?}", story.events);
        story.heard("pb").fresh = false;
        story.settle();
        story.pass(BAKE_MS);
        story.heard("pb").fresh = true;
        if story.phases()[0] == Bake {
            story.heard(SUCCESSOR).fresh = false;
            story.pass(BAKE_MS);
        }
        if story.phases()[0] == Bake {
            story.heard(SUCCESSOR).fresh = true;
        }
    }
    assert_eq!(story.phases(), [RolledBack]);
}

#[test]
fn an_upgraded_one_that_comes_and_goes_ends_its_bake_in_time() {
    for (down_ms, up_ms) in [(BAKE_MS - 1, 1), (100, 100), (SETTLE_MS_MAX, 1)] {
        let mut story = Story::before();
        ask(&mut story, &restart());
        assert_eq!(story.phases(), [Bake]);
        let took_ms = flaps(&mut story, "pa", down_ms, up_ms);
        assert!(matches!(story.phases()[0], Done | Back | RolledBack));
        assert!(took_ms <= BAKE_MS + SETTLE_MS_MAX, "{took_ms}");
    }
}

#[test]
fn the_only_proxy_takes_clients_again_at_once_when_its_successor_is_lost() {
    let mut story = draining(true);
    let until_ms = |s: &Story| s.placement("pa").leaving.as_ref().map(|l| l.until_unix_ms);
    let was_ms = until_ms(&story);
    story.lose("host-x");
    story.settle();
    assert_eq!(story.phases(), [Drain]);
    assert!(story.placement("pa").sends_away().is_none(), "it stays");
    assert!(story.left.is_empty());
    // The successor comes back: those who are left go in the time that they had.
    story.away.clear();
    story.stage.fleet.hosts.insert("host-x".into());
    story.start(SUCCESSOR, "", 1);
    story.settle();
    assert_eq!(story.phases(), [Drain]);
    assert!(story.placement("pa").sends_away().is_some());
    assert_eq!(until_ms(&story), was_ms);
    // And is lost for good.
    story.lose("host-x");
    story.settle();
    story.pass(AWAY_MS_MAX - 1);
    assert_eq!(story.phases(), [Drain]);
    story.pass(1);
    assert_eq!(story.phases(), [RolledBack], "{:?}", story.events);
    let pa = story.placement("pa");
    assert_eq!((pa.generation, &pa.leaving), (1, &None));
    assert_eq!(story.instance.proxies.len(), 1);
}

#[test]
fn one_with_others_or_whose_successor_is_only_not_heard_sends_its_clients_on() {
    let mut story = draining(false);
    story.lose("host-x");
    story.settle();
    assert!(
        story.placement("pa").sends_away().is_some(),
        "it has others"
    );
    let mut story = draining(true);
    story.heard(SUCCESSOR).fresh = false;
    story.settle();
    story.pass(SILENT_MS_MAX);
    assert!(story.placement("pa").sends_away().is_some(), "it runs");
    // A leader that has just begun has heard nobody yet.
    let mut story = draining(true);
    story.idle.extend(["pa", SUCCESSOR]);
    let fleet = std::mem::take(&mut story.stage.fleet);
    story.since_ms = story.stage.now_ms;
    story.settle();
    story.pass(SETTLE_MS_MAX - 1);
    assert!(story.placement("pa").sends_away().is_some());
    story.stage.fleet = fleet;
    story.idle.clear();
    story.stays = false;
    assert_eq!(story.finish(), State::Done);
}
