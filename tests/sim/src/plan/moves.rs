//! Nodes that get another host: because theirs is lost for too long, or because an operator says so;
//! and what happens to those who take part.
//!
//! Invariant: at most one host is lost for good, so that there is room for what it had.

use rand::{Rng, seq::IndexedRandom};

use super::{
    Kept, Point, Script, Shape, TROUBLE,
    accident::{around, control, lost},
    put,
    story::Story,
};
use crate::{
    ctx::Ctx,
    msg::Party,
    sched::{MS, Micros, SEC},
};

/// Longer than any run.
const FOR_GOOD: Micros = 600 * SEC;

const POINTS: [Point; 4] = [
    Point::Joined,
    Point::Expelled,
    Point::Joined,
    Point::RecordWritten,
];

const STORIES: [Story; 6] = [
    Story::JoinerDies,
    Story::JoinerLost,
    Story::LeaverDies,
    Story::LeaverLost,
    Story::PrimaryDies,
    Story::PrimaryUntold,
];

/// Puts a seed's moves into the queue, and what happens to them.
pub(super) fn schedule(ctx: &mut Ctx, shape: Shape, now: Micros) {
    if ctx.chance(600) {
        let at = now + ctx.rng.random_range(200 * MS..TROUBLE / 2);
        let script = gone(ctx, shape);
        put(ctx, at, script);
    }
    for _ in 0..ctx.rng.random_range(1..=3) {
        let (choice, token) = (ctx.rng.random(), ctx.call());
        let at = now + ctx.rng.random_range(50 * MS..TROUBLE);
        put(ctx, at, Script::Move { choice, token });
        if ctx.chance(200) {
            put(ctx, at + 30 * MS, Script::Move { choice, token });
        }
        if ctx.chance(150) {
            let after = ctx.rng.random_range(0..400 * MS);
            put(ctx, at + after, Script::Cancel);
        }
    }
    for _ in 0..ctx.rng.random_range(0..=2) {
        let shard = ctx.rng.random_range(0..shape.shards);
        let story = *STORIES.choose(&mut ctx.rng).unwrap_or(&Story::JoinerDies);
        let tell = Script::Tell(story, shard, ctx.rng.random());
        let point = *POINTS.choose(&mut ctx.rng).unwrap_or(&Point::Joined);
        let passes = ctx.rng.random_range(1..=4);
        ctx.points.push((point, passes, tell));
    }
    if ctx.chance(500) {
        let at = now + ctx.rng.random_range(0..TROUBLE);
        let script = other(ctx, shape);
        put(ctx, at, script);
    }
}

/// A host for longer than is waited for it, or for ever.
fn gone(ctx: &mut Ctx, shape: Shape) -> Script {
    let host = ctx.rng.random_range(0..shape.hosts);
    let long = ctx.rng.random_range(5 * SEC..14 * SEC);
    match ctx.rng.random_range(0..5) {
        0 => Script::CrashHost(host, Kept::All, FOR_GOOD),
        1 => Script::CrashHost(host, Kept::All, long),
        2 => Script::StallHost(host, long),
        3 => Script::Cut(around(shape, host, None), long),
        // Its nodes go on, and are followed and fed.
        _ => Script::Cut(control(shape, host), long),
    }
}

/// Something that has nothing to do with it.
pub(super) fn other(ctx: &mut Ctx, shape: Shape) -> Script {
    let down = ctx.rng.random_range(20 * MS..2_500 * MS);
    let controller = ctx.rng.random_range(0..shape.controllers);
    match ctx.rng.random_range(0..6) {
        0 => Script::Crash(Party::Controller(controller), down),
        1 => Script::Stall(Party::Controller(controller), down),
        2 => Script::Elect(down),
        3 => Script::Lag(controller, down),
        _ => lost(ctx, shape),
    }
}
