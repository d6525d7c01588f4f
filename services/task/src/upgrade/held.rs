//! What proxies hold back for an upgrade: what not every engine that serves, or may have to, knows.
//!
//! Invariant: from before the first process is exchanged until all nodes run the same for good, it is
//! the oldest of theirs. So no client can use on one shard what another one does not know, nor write
//! what would close the way back.

use slotmesh_topology::{
    artifact::{parse_name, parse_reported},
    compatibility::{Engine, knows_more},
};

use super::{ShardUpgrade, Upgrade, UpgradePhase};

/// The engine of which proxies are to let through only what it knows; `None`: every node runs the same
/// release, and none may have to run another one again. `now` is held back at the moment: it stays while
/// a shard that is tried again has not said what its nodes run.
#[must_use]
pub fn held_back(upgrade: &Upgrade, now: Option<Engine>) -> Option<Engine> {
    let next = parse_name(&upgrade.engine)?;
    let shards = upgrade.shards.iter();
    let is_unknown = |part: &ShardUpgrade| engines(part, next).is_empty();
    let kept = now.filter(|_| shards.clone().any(is_unknown));
    let engines = shards.flat_map(|part| engines(part, next)).chain(kept);
    let engines: Vec<Engine> = engines.collect();
    // Redis may become Valkey, never the other way round: it is the older one.
    let oldest = *engines.iter().min()?;
    let is_mixed = engines.iter().any(|engine| knows_more(oldest, *engine));
    is_mixed.then_some(oldest)
}

/// What the shard's nodes run, or may have to run again.
fn engines(part: &ShardUpgrade, next: Engine) -> Vec<Engine> {
    let before = part.nodes.iter();
    let before = before.filter_map(|node| parse_reported(&node.from_version));
    match part.phase {
        UpgradePhase::Done => vec![next],
        phase if phase.is_before() || phase.is_ended() => before.collect(),
        _ => before.chain([next]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upgrade::story::{BAKE_MS, Story, options};
    use slotmesh_topology::compatibility;

    fn held(story: &Story) -> Option<String> {
        held_back(story.upgrade(), None).map(compatibility::name)
    }

    #[test]
    fn what_the_old_engine_does_not_know_is_held_back_until_no_node_has_it() {
        let mut story = Story::new(&options());
        assert_eq!(held(&story), None, "nothing has begun");
        for phase in [
            UpgradePhase::Replicas,
            UpgradePhase::Switch,
            UpgradePhase::Bake,
        ] {
            story.run_to(phase);
            assert_eq!(held(&story).as_deref(), Some("redis-7.0.15"), "{phase:?}");
        }
        story.stage.pass(BAKE_MS);
        story.run_to(UpgradePhase::Finalize);
        assert!(held(&story).is_some(), "the old primary follows still");
        story.run_to(UpgradePhase::Done);
        assert_eq!(held(&story), None);
    }

    #[test]
    fn it_is_held_back_on_the_way_back_too() {
        let mut story = Story::new(&options());
        story.run_to(UpgradePhase::Bake);
        story.keep();
        story.task.cancel_requested = true;
        for phase in [UpgradePhase::SwitchBack, UpgradePhase::UndoNodes] {
            story.run_to(phase);
            assert!(held(&story).is_some(), "{phase:?}");
        }
        story.run_to(UpgradePhase::RolledBack);
        assert_eq!(held(&story), None);
    }

    #[test]
    fn the_shards_of_an_instance_are_looked_at_together() {
        let story = Story::new(&options());
        let mut upgrade = story.upgrade().clone();
        let mut other = upgrade.shards[0].clone();
        other.shard = "1".into();
        upgrade.shards.push(other);
        let held = |a, b| {
            let mut upgrade = upgrade.clone();
            (upgrade.shards[0].phase, upgrade.shards[1].phase) = (a, b);
            held_back(&upgrade, None).is_some()
        };
        use UpgradePhase::{Bake, Done, Ready, RolledBack};
        assert!(held(Bake, Ready) && held(Done, Ready), "between two shards");
        assert!(held(Done, RolledBack), "until somebody mends it");
        assert!(!held(Done, Done) && !held(RolledBack, RolledBack));
        assert!(!held(Ready, Ready) && !held(RolledBack, Ready));
    }

    #[test]
    fn a_shard_that_is_tried_again_lets_nothing_through_before_it_says_what_it_runs() {
        let mut upgrade = Story::new(&options()).upgrade().clone();
        let now = parse_reported("7.0.15");
        let mut other = upgrade.shards[0].clone();
        (other.shard, other.phase) = ("1".into(), UpgradePhase::Done);
        upgrade.shards.push(other);
        // As a retry leaves it; and when its hosts can't try the engine.
        upgrade.shards[0].nodes.clear();
        for phase in [UpgradePhase::Stage, UpgradePhase::RolledBack] {
            upgrade.shards[0].phase = phase;
            assert_eq!(held_back(&upgrade, now), now, "{phase:?}");
            assert_eq!(held_back(&upgrade, None), None, "{phase:?}");
        }
    }

    #[test]
    fn a_patch_holds_nothing_back_and_another_product_does() {
        let mut upgrade = Story::new(&options()).upgrade().clone();
        upgrade.shards[0].phase = UpgradePhase::Bake;
        for (to, held) in [
            ("redis-7.0.16", None),
            ("redis-7.0.1", None),
            ("valkey-8.0.1", Some("redis-7.0.15")),
            ("redis-7.2.1", Some("redis-7.0.15")),
        ] {
            upgrade.engine = to.into();
            let name = held_back(&upgrade, None).map(compatibility::name);
            assert_eq!(name.as_deref(), held, "{to}");
        }
    }
}
