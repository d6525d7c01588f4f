//! For how long a change of proxies waits for what, and for whom it is no reason to go back.

use super::{
    story::{NAMES, Story, options},
    *,
};
use crate::spec::State;

use ProxyPhase::{Back, Bake, HandOver, RolledBack};

#[test]
fn a_proxy_that_falters_after_others_were_waited_for_has_its_own_minute() {
    let mut story = Story::new(&options());
    story.heard("pc").fresh = false;
    story.settle();
    story.pass(2 * UNFIT_MS_MAX);
    story.heard("pc").fresh = true;
    story.heard("pa").fresh = false;
    story.settle();
    story.pass(UNFIT_MS_MAX - 1);
    assert_eq!(story.phases()[0], ProxyPhase::Check);
    story.heard("pa").fresh = true;
    story.settle();
    assert_eq!(story.phases()[0], Bake);
}

#[test]
fn a_successor_that_begins_long_after_waits_until_it_could_have_heard() {
    for idle in [false, true] {
        let mut story = Story::new(&options());
        if idle {
            story.idle.insert("pa");
        }
        story.settle();
        let phase = story.phases()[0];
        assert_eq!(phase, if idle { HandOver } else { Bake });
        let fleet = std::mem::take(&mut story.stage.fleet);
        story.stage.now_ms += 10 * HANDOVER_MS_MAX;
        story.since_ms = story.stage.now_ms;
        assert!(!story.act());
        story.stage.now_ms += SETTLE_MS_MAX - 1;
        assert!(!story.act(), "{:?}", story.events);
        story.stage.fleet = fleet;
        story.idle.clear();
        story.settle();
        assert_ne!(story.phases()[0], Back);
        assert_eq!(story.finish(), State::Done);
    }
}

#[test]
fn a_primary_that_is_away_for_all_proxies_takes_none_back_and_skips_none() {
    let trouble = |story: &mut Story| {
        let epoch = story.stage.shard.epoch;
        for name in NAMES {
            let trouble = ("0".into(), (epoch, TROUBLE_MS_MAX));
            story.heard(name).troubles.extend([trouble]);
        }
    };
    let mut story = Story::new(&options());
    trouble(&mut story);
    story.settle();
    story.pass(UNFIT_MS_MAX + 1);
    assert_eq!(story.phases()[0], ProxyPhase::Check, "it is not its fault");
    for name in NAMES {
        story.heard(name).troubles.clear();
    }
    story.settle();
    trouble(&mut story);
    story.pass(BAKE_MS + 2 * SETTLE_MS_MAX);
    assert_eq!(story.phases()[0], Bake);
    for name in ["pb", "pc"] {
        story.heard(name).troubles.clear();
        story.heard(name).commands = 9;
    }
    story.act();
    assert_eq!(story.phases()[0], Back, "now it is");
}

#[test]
fn one_that_its_agent_says_is_back_is_back_though_a_shard_is_not() {
    let mut story = Story::new(&options());
    story.settle();
    story.task.cancel_requested = true;
    story.idle.insert("pa");
    story.settle();
    story.start("pa", "", 0);
    story.heard("pa").shards.clear();
    story.settle();
    assert_eq!(story.phases()[0], Back);
    story.pass(HANDOVER_MS_MAX);
    assert_eq!(story.phases()[0], RolledBack);
}
