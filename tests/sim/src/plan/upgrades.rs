//! Nodes that get another engine while clients go on: operators who ask for it, change their minds and
//! drain hosts, and what happens to those who take part.
//!
//! Invariant: no host is lost for good, so that every upgrade can end.

use rand::{Rng, seq::IndexedRandom};
use slotmesh_task::Choice;

use super::{Point, Script, Shape, TROUBLE, moves, put, story::Story};
use crate::{
    ctx::Ctx,
    sched::{MS, Micros, SEC},
};

/// An operator who drains a host looks so often.
const DRAIN_LOOKS: u32 = 20;

const POINTS: [Point; 8] = [
    Point::Exchanged,
    Point::MakesWay,
    Point::Exchanged,
    Point::MakesWay,
    Point::UpgradeWritten,
    Point::RecordWritten,
    Point::Declared,
    Point::Journaled,
];

const STORIES: [Story; 7] = [
    Story::ExchangedDies,
    Story::ExchangedLost,
    Story::PrimaryDies,
    Story::PrimaryLost,
    Story::PrimaryUntold,
    Story::ReplicaUntold,
    Story::ReplicaUntold,
];

/// Puts a seed's upgrades into the queue, and what happens to them.
pub(super) fn schedule(ctx: &mut Ctx, shape: Shape, now: Micros) {
    let at = now + ctx.rng.random_range(50 * MS..SEC);
    let (choice, token) = (ctx.rng.random(), ctx.call());
    put(ctx, at, Script::Upgrade { choice, token });
    if ctx.chance(200) {
        put(ctx, at + 30 * MS, Script::Upgrade { choice, token });
    }
    said(ctx, now);
    for _ in 0..ctx.rng.random_range(0..=2) {
        let at = now + ctx.rng.random_range(SEC..TROUBLE + 4 * SEC);
        let shard = ctx.rng.random_range(0..shape.shards);
        put(ctx, at, Script::Newer(shard));
    }
    if ctx.chance(150) {
        let at = now + ctx.rng.random_range(0..4 * SEC);
        let host = ctx.rng.random_range(0..shape.hosts);
        put(ctx, at, Script::Spoil(host));
    }
    if ctx.chance(200) {
        let at = now + ctx.rng.random_range(0..TROUBLE);
        let host = ctx.rng.random_range(0..shape.hosts);
        put(ctx, at, Script::Drain(host, DRAIN_LOOKS));
    }
    if ctx.chance(250) {
        let at = now + ctx.rng.random_range(SEC..TROUBLE + 2 * SEC);
        let (choice, token) = (ctx.rng.random(), ctx.call());
        put(ctx, at, Script::SwitchOver { choice, token });
    }
    struck(ctx, shape, now);
}

/// What an operator says meanwhile.
fn said(ctx: &mut Ctx, now: Micros) {
    let any = |ctx: &mut Ctx| now + ctx.rng.random_range(300 * MS..TROUBLE + 2 * SEC);
    if ctx.chance(350) {
        let at = any(ctx);
        put(ctx, at, Script::Cancel);
    }
    if ctx.chance(150) {
        let at = any(ctx);
        put(ctx, at, Script::Say(Choice::Pause));
        put(ctx, at + SEC, Script::Say(Choice::Resume));
    }
    if ctx.chance(150) {
        let at = any(ctx);
        put(ctx, at, Script::Say(Choice::Finalize));
    }
    if ctx.chance(100) {
        let at = any(ctx);
        put(ctx, at, Script::Say(Choice::Undo));
    }
}

/// What happens to those who take part.
fn struck(ctx: &mut Ctx, shape: Shape, now: Micros) {
    for _ in 0..ctx.rng.random_range(0..=2) {
        let shard = ctx.rng.random_range(0..shape.shards);
        let story = *STORIES.choose(&mut ctx.rng).unwrap_or(&Story::PrimaryDies);
        let tell = Script::Tell(story, shard, ctx.rng.random());
        let point = *POINTS.choose(&mut ctx.rng).unwrap_or(&Point::Exchanged);
        let passes = match point {
            Point::Exchanged | Point::MakesWay => ctx.rng.random_range(1..=4),
            Point::Declared => ctx.rng.random_range(1..=2),
            _ => ctx.rng.random_range(1..=30),
        };
        ctx.points.push((point, passes, tell));
    }
    for _ in 0..ctx.rng.random_range(0..=1) {
        let at = now + ctx.rng.random_range(0..TROUBLE + 2 * SEC);
        let script = moves::other(ctx, shape);
        put(ctx, at, script);
    }
}
