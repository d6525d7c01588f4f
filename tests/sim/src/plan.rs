//! What a seed does to the mesh: requests of operators, and accidents at random times and at chosen
//! acts.
//!
//! Invariant: a plan is made once, from the seed alone, and ends; afterwards nothing goes wrong.

pub mod accident;
mod moves;
pub mod story;
mod upgrades;

use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};

use crate::{
    ctx::Ctx,
    msg::Party,
    net::Weather,
    node::Ending,
    sched::{MS, Micros, SEC},
};

/// Acts at which something may be made to go wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
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
    /// The record says FailingOver: its epoch is nobody's yet.
    Lost,
    /// It says why the lost primary takes no more writes.
    Proven,
    /// It names who is to be promoted.
    Chosen,
    /// The target's agent has asked a controller whether it should still promote.
    Confirmed,
    /// A host's lease was put or kept.
    Leased,
    /// An agent was promised that nobody is promoted for a while.
    Promised,
    /// A record was written that names a new member without a process.
    Joined,
    /// One was written that says who leaves.
    Expelled,
    /// One was written that says whose process makes way for another engine.
    Exchanged,
    /// A process is on its way to its end for that.
    MakesWay,
    /// A task's record was written that is an upgrade's.
    UpgradeWritten,
}

const POINTS: [Point; 17] = [
    Point::Lost,
    Point::Proven,
    Point::Chosen,
    Point::Confirmed,
    Point::Leased,
    Point::Promised,
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
    /// An agent starts its node's process, of this engine.
    Start(usize, String),
    /// An agent ends this process of its node in order.
    End(usize, u64, Ending),
    /// Its data is removed.
    Discard(usize),
    /// Of a host's programs all but the default engine are damaged.
    Spoil(usize),
    /// A client of the shard uses what only newer engines have.
    Newer(usize),
    /// An operator takes a host's primaries away and then the host down; he looks so often.
    Drain(usize, u32),
    /// A party dies; all but nodes come back after this time (their agent starts those).
    Crash(Party, Micros),
    /// A node's process dies.
    CrashNode(usize, Kept),
    /// Its agent or fencer kills this process of a node.
    Kill(usize, u64),
    /// A node that was not needed before has a name from now on: its agent was told to make it.
    Name(usize, String),
    /// Its agent ends a node that has left, and removes its data.
    Remove(usize),
    /// A party begins again.
    Restart(Party),
    /// A party stands still: what comes waits.
    Stall(Party, Micros),
    /// Nothing passes from the first to the second of each pair.
    Cut(Vec<(Party, Party)>, Micros),
    /// It does again.
    Mend(Vec<(Party, Party)>),
    /// A host's machine ends: its agent, its fencer, its nodes. All but the machine's disk.
    CrashHost(usize, Kept, Micros),
    /// A host's machine stands still.
    StallHost(usize, Micros),
    /// The store elects a leader of its own, and answers nobody meanwhile.
    Elect(Micros),
    /// The store forgets its past.
    Compact,
    /// The store's member that a controller watches is behind the others for a while.
    Lag(usize, Micros),
    /// Several things go wrong together, around the shard's present primary; decided by a number.
    Tell(story::Story, usize, u64),
    /// An operator asks for a switchover, of all shards or of one.
    SwitchOver {
        /// Chooses shards and targets.
        choice: u64,
        /// The client's token.
        token: u64,
    },
    /// An operator wants a node on another host.
    Move {
        /// Chooses shard and node.
        choice: u64,
        /// The client's token.
        token: u64,
    },
    /// An operator wants another engine.
    Upgrade {
        /// Chooses which, and how.
        choice: u64,
        /// The client's token.
        token: u64,
    },
    /// An operator says this to whatever has it on its menu.
    Say(slotmesh_task::Choice),
    /// An operator asks to cancel what is under way.
    Cancel,
    /// An operator answers what waits for one: go on, although data may be lost.
    AcceptLoss,
    /// The fault of a cell of the matrix.
    Befall(
        crate::matrix::Kind,
        crate::matrix::Role,
        crate::matrix::Fault,
    ),
    /// The network changes.
    Weather(Weather),
    /// The accidents are over.
    Heal,
}

/// How much goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
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
    /// Primaries are lost: their processes, their hosts, the ways to them; no data is.
    Unplanned,
    /// Agents and fencers die, and what they look after does not.
    Agents,
    /// Several hosts are lost at once.
    Mass,
    /// A primary comes back without its data, again and again.
    Empty,
    /// What one layer stands for alone goes wrong together with what shows that.
    Double,
    /// Nodes are replaced: hosts are lost for longer than is waited for, or operators move nodes; and
    /// who takes part dies meanwhile.
    Moves,
    /// Nodes get another engine, and hosts are drained; and who takes part dies meanwhile.
    Upgrades,
    /// As that, and new nodes on other hosts take the places of the old ones. Only where it is asked for.
    Recruits,
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
    /// On how many replicas a write is before it is acknowledged.
    pub durability: u32,
    /// Nodes that a host may be given of each shard later on.
    pub spare: usize,
    /// A node whose host is lost for so long is replaced; 0: never.
    pub replace_after_s: u32,
}

/// More moves of one shard to one host do not happen in the time of a run.
const SPARE: usize = 6;

/// The time within which accidents begin.
pub const TROUBLE: Micros = 7 * SEC;

impl Shape {
    /// The world of a seed.
    pub fn of(rng: &mut SmallRng) -> Self {
        let profile = match rng.random_range(0..100) {
            0..8 => Profile::Calm,
            8..18 => Profile::ControlPlane,
            18..22 => Profile::Blackout,
            22..37 => Profile::Harsh,
            37..43 => Profile::Lossy,
            43..60 => Profile::Unplanned,
            60..64 => Profile::Upgrades,
            64..78 => Profile::Double,
            78..83 => Profile::Agents,
            83..87 => Profile::Mass,
            87..91 => Profile::Empty,
            _ => Profile::Moves,
        };
        Self::with(profile, rng)
    }

    /// The world of a seed, with this much going wrong.
    pub fn with(profile: Profile, rng: &mut SmallRng) -> Self {
        Self {
            profile,
            shards: rng.random_range(1..=2),
            nodes: rng.random_range(2..=3),
            hosts: 3,
            controllers: 2,
            proxies: 2,
            clients: 3,
            durability: u32::from(rng.random_range(0..3) == 0),
            spare: 0,
            replace_after_s: slotmesh_topology::instance::REPLACE_AFTER_S,
        }
        .with_room(rng)
    }

    /// Where nodes are moved there has to be a host to move them to.
    fn with_room(self, rng: &mut SmallRng) -> Self {
        if self.profile == Profile::Upgrades {
            return Self {
                durability: u32::from(rng.random_range(0..2) == 0),
                ..self
            };
        }
        if self.profile == Profile::Recruits {
            let nodes = rng.random_range(1..=3);
            return Self {
                nodes,
                hosts: 3 + nodes,
                durability: u32::from(nodes > 1 && rng.random_range(0..2) == 0),
                spare: SPARE,
                ..self
            };
        }
        if self.profile != Profile::Moves {
            return self;
        }
        Self {
            nodes: 3,
            hosts: rng.random_range(4..=5),
            durability: u32::from(rng.random_range(0..2) == 0),
            spare: SPARE,
            replace_after_s: rng.random_range(1..=4),
            ..self
        }
    }

    /// Nodes of a host, also those that it may be given.
    pub fn nodes_of(&self, host: usize) -> impl Iterator<Item = usize> + use<> {
        let Self { nodes, hosts, .. } = *self;
        let first = 0..self.shards * nodes;
        let first = first.filter(move |n| (n / nodes + n % nodes) % hosts == host);
        let spare = 0..self.shards;
        let shape = *self;
        first.chain(spare.flat_map(move |shard| shape.spare_of(host, shard)))
    }

    /// Nodes of a shard that a host may be given.
    #[must_use]
    pub fn spare_of(&self, host: usize, shard: usize) -> std::ops::Range<usize> {
        let before = self.shards * self.nodes + (host * self.shards + shard) * self.spare;
        before..before + self.spare
    }

    /// What may never happen here: no primary is lost, so none may be replaced.
    #[must_use]
    pub fn loses_primaries(&self) -> bool {
        !matches!(
            self.profile,
            Profile::Calm | Profile::ControlPlane | Profile::Blackout | Profile::Agents
        )
    }

    /// What dies keeps its data.
    #[must_use]
    pub fn keeps_data(&self) -> bool {
        !matches!(self.profile, Profile::Lossy | Profile::Empty)
    }
}

/// Puts a seed's plan into the queue; times count from now.
pub fn schedule(ctx: &mut Ctx, shape: Shape) {
    let now = ctx.now();
    let most = if shape.profile == Profile::Double {
        2
    } else {
        5
    };
    let count = ctx.rng.random_range(most / 2..=most);
    let gap = TROUBLE / count;
    let calm = matches!(shape.profile, Profile::Calm | Profile::Blackout);
    // An agent that dies in a hand-over leaves it half done, which is another story. An upgrade that
    // others cut short is one, too.
    let count = match shape.profile {
        Profile::Agents | Profile::Upgrades | Profile::Recruits => 0,
        _ => count,
    };
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
    let weather = weather(ctx, shape.profile);
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
        Profile::Double => story::schedule(ctx, shape, now),
        Profile::Moves => moves::schedule(ctx, shape, now),
        Profile::Upgrades | Profile::Recruits => upgrades::schedule(ctx, shape, now),
        _ => accident::schedule(ctx, shape, now),
    }
    let quiet = match shape.profile {
        Profile::Blackout => 6 * SEC,
        // Who is cut off is replaced meanwhile.
        Profile::Moves | Profile::Upgrades | Profile::Recruits => 8 * SEC,
        _ => 3 * SEC,
    };
    put(ctx, now + TROUBLE + quiet, Script::Heal);
}

/// How well messages go their ways.
fn weather(ctx: &mut Ctx, profile: Profile) -> Weather {
    match profile {
        Profile::Calm | Profile::Blackout => Weather::calm(),
        Profile::ControlPlane => Weather {
            rpc_loss: *[0, 20, 100].choose(&mut ctx.rng).unwrap_or(&0),
            rpc_double: 100,
            spike: 10,
            spike_us: 20 * MS,
            ..Weather::calm()
        },
        Profile::Agents | Profile::Mass | Profile::Empty => Weather {
            rpc_double: 100,
            ..Weather::calm()
        },
        Profile::Double => Weather {
            delay_us: *[80, 400, 2_000].choose(&mut ctx.rng).unwrap_or(&80),
            rpc_double: 150,
            ..Weather::calm()
        },
        Profile::Moves | Profile::Upgrades | Profile::Recruits => Weather {
            delay_us: *[80, 80, 400].choose(&mut ctx.rng).unwrap_or(&80),
            rpc_loss: *[0, 0, 20].choose(&mut ctx.rng).unwrap_or(&0),
            rpc_double: 150,
            ..Weather::calm()
        },
        Profile::Harsh | Profile::Lossy | Profile::Unplanned => Weather {
            delay_us: *[80, 80, 400, 2_000].choose(&mut ctx.rng).unwrap_or(&80),
            rpc_loss: *[0, 20, 100, 250].choose(&mut ctx.rng).unwrap_or(&0),
            rpc_double: 150,
            stream_break: *[0, 30, 300].choose(&mut ctx.rng).unwrap_or(&0),
            spike: *[0, 10, 60].choose(&mut ctx.rng).unwrap_or(&0),
            spike_us: *[5 * MS, 50 * MS, 300 * MS]
                .choose(&mut ctx.rng)
                .unwrap_or(&MS),
        },
    }
}

fn put(ctx: &mut Ctx, at: Micros, script: Script) {
    ctx.queue.at(at, crate::ctx::Event::Script(script));
}
