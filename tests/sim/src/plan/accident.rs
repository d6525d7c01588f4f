//! What goes wrong, by how much may.
//!
//! Invariant: every accident ends by itself.

use rand::{Rng, seq::IndexedRandom};

use super::{Kept, POINTS, Point, Profile, Script, Shape, TROUBLE, put};
use crate::{
    ctx::Ctx,
    msg::Party,
    sched::{MS, Micros, SEC},
};

/// Puts a seed's accidents into the queue, or at acts of the protocol.
pub(super) fn schedule(ctx: &mut Ctx, shape: Shape, now: Micros) {
    let most = match shape.profile {
        Profile::Mass => 1,
        Profile::Unplanned => 4,
        _ => 6,
    };
    for _ in 0..ctx.rng.random_range(1..=most) {
        let script = accident(ctx, shape);
        // Most at an act of the protocol, the others at any time. What loses primaries is not bound
        // to acts: there may be none.
        let often = if matches!(shape.profile, Profile::Mass | Profile::Empty) {
            0
        } else if shape.profile == Profile::Unplanned {
            350
        } else {
            600
        };
        if ctx.chance(often) {
            let point = *POINTS.choose(&mut ctx.rng).unwrap_or(&Point::Act);
            let passes = match point {
                Point::Act => ctx.rng.random_range(1..=24),
                Point::Journaled | Point::Leased => ctx.rng.random_range(1..=40),
                Point::Lost | Point::Proven | Point::Chosen | Point::Confirmed => {
                    ctx.rng.random_range(1..=2)
                }
                _ => ctx.rng.random_range(1..=6),
            };
            ctx.points.push((point, passes, script));
        } else {
            let at = now + ctx.rng.random_range(0..TROUBLE);
            put(ctx, at, script);
        }
    }
}

fn accident(ctx: &mut Ctx, shape: Shape) -> Script {
    let rng = &mut ctx.rng;
    let down = rng.random_range(20 * MS..2_500 * MS);
    let index = rng.random_range(0..shape.controllers);
    let controller = Party::Controller(index);
    match shape.profile {
        Profile::ControlPlane => match rng.random_range(0..7) {
            0 => Script::Crash(controller, down),
            1 => Script::Stall(controller, down),
            2 => Script::Stall(Party::Store, down),
            3 => Script::Elect(down),
            4 => Script::Compact,
            5 => Script::Lag(index, down),
            _ => Script::Cut(vec![(controller, Party::Store)], down),
        },
        Profile::Agents => {
            let host = rng.random_range(0..shape.hosts);
            let agent = Party::Agent(host);
            match rng.random_range(0..4) {
                0 => Script::Crash(agent, down),
                1 => Script::Crash(agent, down * 3),
                2 => Script::Crash(Party::Fencer(host), down),
                _ => Script::Stall(agent, down),
            }
        }
        Profile::Mass => mass(ctx, shape),
        Profile::Empty => {
            let node = rng.random_range(0..shape.shards * shape.nodes);
            Script::CrashNode(node, Kept::Nothing)
        }
        Profile::Unplanned if rng.random_range(0..4) > 0 => lost(ctx, shape),
        _ => any(ctx, shape),
    }
}

/// Anything.
fn any(ctx: &mut Ctx, shape: Shape) -> Script {
    let rng = &mut ctx.rng;
    let down = rng.random_range(20 * MS..2_500 * MS);
    let index = rng.random_range(0..shape.controllers);
    let controller = Party::Controller(index);
    let agent = Party::Agent(rng.random_range(0..shape.hosts));
    let node = rng.random_range(0..shape.shards * shape.nodes);
    let proxy = Party::Proxy(rng.random_range(0..shape.proxies));
    let kept = match (shape.profile, rng.random_range(0..3)) {
        (Profile::Lossy, 0) => Kept::MostOf,
        (Profile::Lossy, 1) => Kept::Nothing,
        _ => Kept::All,
    };
    match rng.random_range(0..19) {
        0 | 1 => Script::Crash(controller, down),
        2..=4 => Script::Crash(agent, down),
        5..=7 => Script::CrashNode(node, kept),
        8 => Script::Crash(proxy, down),
        9 => Script::Stall(Party::Node(node), down),
        10 => Script::Stall(proxy, down),
        11 => Script::Stall(agent, down),
        12 => {
            let both = [controller, Party::Store];
            Script::Stall(*both.choose(rng).unwrap_or(&controller), down)
        }
        13 => Script::Elect(down),
        14 => Script::Compact,
        15 => Script::Lag(index, down),
        _ => {
            let other = Party::Node(rng.random_range(0..shape.shards * shape.nodes));
            let pairs = [
                (controller, Party::Store),
                (Party::Store, controller),
                (agent, controller),
                (controller, agent),
                (proxy, controller),
                (controller, proxy),
                (proxy, Party::Node(node)),
                (Party::Node(node), proxy),
                (Party::Node(node), other),
                (agent, Party::Node(node)),
            ];
            Script::Cut(vec![*pairs.choose(rng).unwrap_or(&pairs[0])], down)
        }
    }
}

/// What loses a primary, or looks like it.
pub(super) fn lost(ctx: &mut Ctx, shape: Shape) -> Script {
    let rng = &mut ctx.rng;
    let host = rng.random_range(0..shape.hosts);
    let node = rng.random_range(0..shape.shards * shape.nodes);
    let long = rng.random_range(SEC..8 * SEC);
    match rng.random_range(0..12) {
        0..=2 => Script::CrashNode(node, Kept::All),
        3 => Script::Stall(Party::Node(node), long),
        4 => Script::CrashHost(host, Kept::All, long),
        5 => Script::StallHost(host, long),
        6 => Script::Crash(Party::Agent(host), long),
        7 => Script::Elect(long),
        8 => Script::Cut(control(shape, host), long),
        9 => {
            let proxy = Party::Proxy(rng.random_range(0..shape.proxies));
            Script::Cut(both_ways(&[proxy], &controllers(shape)), long)
        }
        10 => Script::Cut(one_way(shape, host, rng.random_range(0..2) == 0), long),
        _ => {
            // With a proxy and its clients inside, or alone.
            let inside = (rng.random_range(0..2) == 0).then(|| rng.random_range(0..shape.proxies));
            Script::Cut(around(shape, host, inside), long)
        }
    }
}

/// Two hosts at once.
fn mass(ctx: &mut Ctx, shape: Shape) -> Script {
    let rng = &mut ctx.rng;
    let (spared, long) = (
        rng.random_range(0..shape.hosts),
        rng.random_range(2 * SEC..8 * SEC),
    );
    let hosts = (0..shape.hosts).filter(|h| *h != spared);
    let cuts = hosts.flat_map(|h| control(shape, h)).collect();
    Script::Cut(cuts, long)
}

pub(crate) fn controllers(shape: Shape) -> Vec<Party> {
    (0..shape.controllers).map(Party::Controller).collect()
}

fn inhabitants(shape: Shape, host: usize) -> Vec<Party> {
    let mut all = vec![Party::Agent(host)];
    all.extend(shape.nodes_of(host).map(Party::Node));
    all
}

fn others(shape: Shape, host: usize, inside: Option<usize>) -> Vec<Party> {
    let mut all = controllers(shape);
    let hosts = (0..shape.hosts).filter(|h| *h != host);
    all.extend(hosts.flat_map(|h| inhabitants(shape, h)));
    let proxies = (0..shape.proxies).filter(|p| Some(*p) != inside);
    all.extend(proxies.map(Party::Proxy));
    all
}

pub(crate) fn both_ways(these: &[Party], those: &[Party]) -> Vec<(Party, Party)> {
    let pairs = these.iter().flat_map(|a| those.iter().map(|b| (*a, *b)));
    pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect()
}

/// A host is cut off, with a proxy on its side or without.
#[must_use]
pub fn around(shape: Shape, host: usize, inside: Option<usize>) -> Vec<(Party, Party)> {
    let mut these = inhabitants(shape, host);
    these.extend(inside.map(Party::Proxy));
    both_ways(&these, &others(shape, host, inside))
}

/// Only the agent's way to the controllers is cut: proxies and replicas reach the host's nodes.
#[must_use]
pub fn control(shape: Shape, host: usize) -> Vec<(Party, Party)> {
    both_ways(&[Party::Agent(host)], &controllers(shape))
}

/// Nothing leaves a host, or nothing reaches it.
fn one_way(shape: Shape, host: usize, outward: bool) -> Vec<(Party, Party)> {
    let (these, those) = (inhabitants(shape, host), others(shape, host, None));
    let pairs = these.iter().flat_map(|a| those.iter().map(|b| (*a, *b)));
    pairs
        .map(|(a, b)| if outward { (a, b) } else { (b, a) })
        .collect()
}
