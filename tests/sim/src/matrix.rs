//! The crash matrix: one run for each party, each fault and each step of each kind of task.
//!
//! Invariant: a cell is deterministic; it says how its task ended, and how much longer than without
//! the fault clients waited.

use rand::SeedableRng;
use slotmesh_task::State as TaskState;

use crate::{
    Trace, Variant, World,
    check::Violation,
    plan::{Point, Profile, Shape},
    sched::{MS, Micros, SEC},
};

/// Kinds of tasks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// From nothing to serving.
    Provision,
    /// The first replica becomes the primary.
    Switchover,
    /// The primary's process ends.
    Failover,
}

/// To whom something happens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Role {
    /// The controller that leads then.
    Leader,
    /// One that does not.
    Follower,
    /// The agent of the primary of before.
    OldAgent,
    /// The agent of the next one.
    NewAgent,
    /// The primary of before.
    OldPrimary,
    /// The next one.
    Target,
    /// A proxy.
    Proxy,
    /// The store.
    Store,
}

/// What happens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// kill -9; it is started again soon.
    Kill,
    /// It stands still for 5 s.
    Stall,
    /// Its next message, from it or to it, is lost.
    Lose,
    /// Its next message comes twice.
    Repeat,
    /// Its next message comes a second late.
    Delay,
}

/// Everybody.
pub const ROLES: [Role; 8] = [
    Role::Leader,
    Role::Follower,
    Role::OldAgent,
    Role::NewAgent,
    Role::OldPrimary,
    Role::Target,
    Role::Proxy,
    Role::Store,
];

/// Everything.
pub const FAULTS: [Fault; 5] = [
    Fault::Kill,
    Fault::Stall,
    Fault::Lose,
    Fault::Repeat,
    Fault::Delay,
];

/// How long a stall lasts, and how late a late message is.
pub const STALL: Micros = 5 * SEC;
/// See above.
pub const LATE: Micros = SEC;
/// How long a killed process is gone.
pub const GONE: Micros = 300 * MS;

/// Steps of a kind: an act of the protocol, and which time it is passed.
#[must_use]
pub fn steps(kind: Kind) -> &'static [(Point, u32)] {
    match kind {
        Kind::Provision => &[
            (Point::Leased, 1),
            (Point::Journaled, 1),
            (Point::Journaled, 3),
            (Point::RecordWritten, 1),
            (Point::RecordWritten, 2),
        ],
        Kind::Switchover => &[
            (Point::StepReceived, 1),
            (Point::StepAnswered, 1),
            (Point::Declared, 1),
            (Point::StepReceived, 2),
            (Point::Act, 1),
            (Point::Act, 2),
            (Point::Act, 3),
            (Point::Act, 4),
            (Point::TargetCaughtUp, 1),
            (Point::AskedToTakeOver, 1),
            (Point::Promoted, 1),
            (Point::CommitSent, 1),
            (Point::CommitTaken, 1),
            (Point::RecordWritten, 1),
            (Point::StepAnswered, 2),
            (Point::RecordWritten, 2),
        ],
        Kind::Failover => &[
            (Point::Proven, 1),
            (Point::Chosen, 1),
            (Point::StepReceived, 1),
            (Point::Confirmed, 1),
            (Point::Promoted, 1),
            (Point::StepAnswered, 1),
            (Point::RecordWritten, 1),
            (Point::RecordWritten, 2),
        ],
    }
}

/// One cell; without a fault it is what the others are compared with.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// Of task.
    pub kind: Kind,
    /// When.
    pub step: (Point, u32),
    /// To whom, what.
    pub fault: Option<(Role, Fault)>,
}

/// What came of a cell.
#[derive(Clone, Debug)]
pub struct End {
    /// The rule that was broken, if any.
    pub violation: Option<Violation>,
    /// The fault's step was reached.
    pub reached: bool,
    /// How the tasks of this kind ended.
    pub states: Vec<TaskState>,
    /// Longest wait of a client.
    pub longest: Micros,
}

/// Runs a cell.
#[must_use]
pub fn run(cell: Cell) -> End {
    World::staged(cell, Trace::default()).stage(cell).0
}

/// Runs a cell again, for its story.
#[must_use]
pub fn tell(cell: Cell) -> Vec<String> {
    World::staged(cell, Trace::new(true, true)).stage(cell).1
}

/// All cells.
pub fn cells() -> impl Iterator<Item = Cell> {
    let kinds = [Kind::Provision, Kind::Switchover, Kind::Failover];
    let steps = kinds
        .into_iter()
        .flat_map(|kind| steps(kind).iter().map(move |step| (kind, *step)));
    steps.flat_map(|(kind, step)| {
        ROLES.into_iter().flat_map(move |role| {
            FAULTS.into_iter().map(move |fault| Cell {
                kind,
                step,
                fault: Some((role, fault)),
            })
        })
    })
}

/// The world of every cell: one shard of three nodes.
pub(crate) fn shape() -> Shape {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
    Shape {
        shards: 1,
        nodes: 3,
        durability: 0,
        ..Shape::with(Profile::Unplanned, &mut rng)
    }
}

/// The variant of every cell.
pub(crate) const VARIANT: Variant = Variant::Real;
