//! What a seed does to the mesh: requests of operators, and accidents at random times and at chosen
//! acts.
//!
//! Invariant: a plan is made once, from the seed alone, and ends; afterwards nothing goes wrong.

use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};

use crate::{
    ctx::Ctx,
    msg::Party,
    net::Weather,
    sched::{MS, Micros, SEC},
};

/// Acts at which something may be made to go wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Point {
    /// The record says Handover.
    Declared,
    /// A shard's record was written otherwise.
    RecordWritten,
    /// An agent wrote to its journal.
    Journaled,
    /// A step reached its agent.
    StepReceived,
    /// The old primary's agent begins an act of the critical section.
    Act,
    /// The target has every byte.
    TargetCaughtUp,
    /// The old primary asks the target to take over.
    AskedToTakeOver,
    /// The target is a primary; its answer is on the way.
    Promoted,
    /// A commit is on its way to a controller.
    CommitSent,
    /// A controller is about to write a commit.
    CommitTaken,
    /// A step's outcome is on its way to the leader.
    StepAnswered,
}

const POINTS: [Point; 11] = [
    Point::Declared,
    Point::RecordWritten,
    Point::Journaled,
    Point::StepReceived,
    Point::Act,
    Point::TargetCaughtUp,
    Point::AskedToTakeOver,
    Point::Promoted,
    Point::CommitSent,
    Point::CommitTaken,
    Point::StepAnswered,
];

/// What survives a node's process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kept {
    /// Everything: the process was killed.
    All,
    /// All but the last operations: the machine lost power.
    MostOf,
    /// Nothing: the disk is gone.
    Nothing,
}

/// One act of the plan.
#[derive(Clone, Debug)]
pub enum Script {
    /// An agent starts its node's process.
    Start(usize),
    /// A party dies; all but nodes come back after this time (their agent starts those).
    Crash(Party, Micros),
    /// A node's process dies.
    CrashNode(usize, Kept),
    /// A party begins again.
    Restart(Party),
    /// A party stands still: what comes waits.
    Stall(Party, Micros),
    /// Nothing passes from one to the other.
    Cut(Party, Party, Micros),
    /// It does again.
    Mend(Party, Party),
    /// An operator asks for a switchover, of all shards or of one.
    SwitchOver {
        /// Chooses shards and targets.
        choice: u64,
        /// The client's token.
        token: u64,
    },
    /// An operator asks to cancel what is under way.
    Cancel,
    /// The network changes.
    Weather(Weather),
    /// The accidents are over.
    Heal,
}

/// How much goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// Nothing: a planned change must be invisible.
    Calm,
    /// Controllers, the store and calls between them fail; agents, nodes and proxies do not.
    ControlPlane,
    /// Every control-plane process is gone for a while, with no change under way.
    Blackout,
    /// Everything fails, but no process loses data.
    Harsh,
    /// Everything fails, data too.
    Lossy,
}

/// Of one seed.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How much goes wrong.
    pub profile: Profile,
    /// Shards of the instance.
    pub shards: usize,
    /// Nodes of each.
    pub nodes: usize,
    /// Hosts.
    pub hosts: usize,
    /// Controllers.
    pub controllers: usize,
    /// Proxies.
    pub proxies: usize,
    /// Clients.
    pub clients: usize,
}

/// The time within which accidents begin.
pub const TROUBLE: Micros = 7 * SEC;

impl Shape {
    /// The world of a seed.
    pub fn of(rng: &mut SmallRng) -> Self {
        let profile = match rng.random_range(0..100) {
            0..12 => Profile::Calm,
            12..30 => Profile::ControlPlane,
            30..36 => Profile::Blackout,
            36..84 => Profile::Harsh,
            _ => Profile::Lossy,
        };
        Self {
            profile,
            shards: rng.random_range(1..=2),
            nodes: rng.random_range(2..=3),
            hosts: 3,
            controllers: 2,
            proxies: 2,
            clients: 3,
        }
    }
}

/// Puts a seed's plan into the queue; times count from now.
pub fn schedule(ctx: &mut Ctx, shape: Shape) {
    let now = ctx.now();
    let count = ctx.rng.random_range(2..=5);
    let gap = TROUBLE / count;
    let calm = matches!(shape.profile, Profile::Calm | Profile::Blackout);
    for n in 0..count {
        let jitter = if calm {
            0
        } else {
            ctx.rng.random_range(0..gap)
        };
        let (choice, token) = (ctx.rng.random(), ctx.call());
        let at = now + 100 * MS + n * gap + jitter;
        put(ctx, at, Script::SwitchOver { choice, token });
        // The caller has lost the answer and asks again.
        if ctx.chance(200) {
            put(ctx, at + 30 * MS, Script::SwitchOver { choice, token });
        }
        if !calm && ctx.chance(100) {
            let after = ctx.rng.random_range(0..60 * MS);
            put(ctx, at + after, Script::Cancel);
        }
    }
    let weather = match shape.profile {
        Profile::Calm | Profile::Blackout => Weather::calm(),
        Profile::ControlPlane => Weather {
            rpc_loss: *[0, 20, 100].choose(&mut ctx.rng).unwrap_or(&0),
            rpc_double: 100,
            spike: 10,
            spike_us: 20 * MS,
            ..Weather::calm()
        },
        Profile::Harsh | Profile::Lossy => Weather {
            delay_us: *[80, 80, 400, 2_000].choose(&mut ctx.rng).unwrap_or(&80),
            rpc_loss: *[0, 20, 100, 250].choose(&mut ctx.rng).unwrap_or(&0),
            rpc_double: 150,
            stream_break: *[0, 30, 300].choose(&mut ctx.rng).unwrap_or(&0),
            spike: *[0, 10, 60].choose(&mut ctx.rng).unwrap_or(&0),
            spike_us: *[5 * MS, 50 * MS, 300 * MS]
                .choose(&mut ctx.rng)
                .unwrap_or(&MS),
        },
    };
    put(ctx, now, Script::Weather(weather));
    match shape.profile {
        Profile::Calm => {}
        Profile::Blackout => {
            // Between two changes: the last one has ended, none begins.
            let from = now + TROUBLE + SEC;
            for n in 0..shape.controllers {
                put(ctx, from, Script::Crash(Party::Controller(n), 4 * SEC));
            }
            for n in 0..shape.hosts {
                let down = ctx.rng.random_range(SEC..4 * SEC);
                put(ctx, from, Script::Crash(Party::Agent(n), down));
            }
        }
        _ => accidents(ctx, shape, now),
    }
    let quiet = if shape.profile == Profile::Blackout {
        6 * SEC
    } else {
        3 * SEC
    };
    put(ctx, now + TROUBLE + quiet, Script::Heal);
}

fn accidents(ctx: &mut Ctx, shape: Shape, now: Micros) {
    for _ in 0..ctx.rng.random_range(1..=6) {
        let script = accident(ctx, shape);
        // Most at an act of the protocol, the others at any time.
        if ctx.chance(600) {
            let point = *POINTS.choose(&mut ctx.rng).unwrap_or(&Point::Act);
            let passes = match point {
                Point::Act => ctx.rng.random_range(1..=24),
                Point::Journaled => ctx.rng.random_range(1..=40),
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
    let controller = Party::Controller(rng.random_range(0..shape.controllers));
    let agent = Party::Agent(rng.random_range(0..shape.hosts));
    let node = rng.random_range(0..shape.shards * shape.nodes);
    let proxy = Party::Proxy(rng.random_range(0..shape.proxies));
    let down = rng.random_range(20 * MS..2_500 * MS);
    if shape.profile == Profile::ControlPlane {
        return match rng.random_range(0..4) {
            0 => Script::Crash(controller, down),
            1 => Script::Stall(controller, down),
            2 => Script::Stall(Party::Store, down),
            _ => Script::Cut(controller, Party::Store, down),
        };
    }
    let kept = match (shape.profile, rng.random_range(0..3)) {
        (Profile::Lossy, 0) => Kept::MostOf,
        (Profile::Lossy, 1) => Kept::Nothing,
        _ => Kept::All,
    };
    match rng.random_range(0..16) {
        0 | 1 => Script::Crash(controller, down),
        2..=4 => Script::Crash(agent, down),
        5..=7 => Script::CrashNode(node, kept),
        8 => Script::Crash(proxy, down),
        9 => Script::Stall(Party::Node(node), down),
        10 => Script::Stall(proxy, down),
        11 => Script::Stall(agent, down),
        12 => Script::Stall(
            *[controller, Party::Store]
                .choose(rng)
                .unwrap_or(&controller),
            down,
        ),
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
            let (from, to) = *pairs.choose(rng).unwrap_or(&pairs[0]);
            Script::Cut(from, to, down)
        }
    }
}

fn put(ctx: &mut Ctx, at: Micros, script: Script) {
    ctx.queue.at(at, crate::ctx::Event::Script(script));
}
