//! The crash matrix: one run for each party, each fault and each step of each kind of task.
//!
//! A step is a message of the task's own: kill -9 and SIGSTOP come to a party at the moment at which
//! it is sent; lost, repeated and late is that very message.
//!
//! Invariant: a cell is deterministic; it says how its task ended, and how long clients waited.

mod derived;
mod steps;
mod tables;

use rand::SeedableRng;
use slotmesh_task::State as TaskState;

pub use self::steps::{Moment, Step, steps};
use crate::{
    Trace, Variant, World,
    ambush::{Call, Message, Tamper},
    check::Violation,
    plan::{Profile, Shape},
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
    /// From serving to nothing.
    Decommission,
    /// An operator moves the first replica to another host, where a write is on one replica before it
    /// is acknowledged.
    Replace,
    /// Every node gets another engine, where a write is on one replica before it is acknowledged; at
    /// the end nothing leads back.
    Upgrade,
    /// An operator takes that back once the primary runs it.
    TakeBack,
    /// The primary is taken off its host, and the host down.
    Drain,
}

/// Every kind.
pub const KINDS: [Kind; 8] = [
    Kind::Provision,
    Kind::Switchover,
    Kind::Failover,
    Kind::Decommission,
    Kind::Replace,
    Kind::Upgrade,
    Kind::TakeBack,
    Kind::Drain,
];

/// To whom something happens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Role {
    /// The controller that leads then.
    Leader,
    /// One that does not.
    Follower,
    /// The agent of the primary of before; of the node that leaves.
    OldAgent,
    /// The agent of the next one; of the node that joins.
    NewAgent,
    /// The primary of before, or all the time.
    OldPrimary,
    /// The next one, or the node that joins.
    Target,
    /// A proxy.
    Proxy,
    /// The store.
    Store,
    /// Where nodes are replaced: the agent of the primary.
    PrimaryAgent,
    /// And the node that leaves.
    Leaver,
    /// Where nodes get another engine: the agent of the second replica.
    OtherAgent,
    /// And that replica.
    Other,
}

/// What happens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// kill -9; it is started again soon.
    Kill,
    /// It stands still for 5 s.
    Stall,
    /// The step's message, from it or to it, is lost: a connection breaks, and its ends notice later.
    Lose,
    /// The step's message comes twice.
    Repeat,
    /// The step's message comes a second late.
    Delay,
}

impl Fault {
    /// What it is to the step's message, if it is.
    #[must_use]
    pub fn tamper(self) -> Option<Tamper> {
        match self {
            Self::Kill | Self::Stall => None,
            Self::Lose => Some(Tamper::Lose),
            Self::Repeat => Some(Tamper::Repeat),
            Self::Delay => Some(Tamper::Delay(LATE)),
        }
    }
}

/// Everybody but for upgrades; the last two only where nodes are replaced.
const ROLES: [Role; 10] = [
    Role::Leader,
    Role::Follower,
    Role::OldAgent,
    Role::NewAgent,
    Role::OldPrimary,
    Role::Target,
    Role::Proxy,
    Role::Store,
    Role::PrimaryAgent,
    Role::Leaver,
];

/// Everybody where nodes get another engine: both replicas do, and one of them becomes the primary.
const UPGRADED: [Role; 10] = [
    Role::Leader,
    Role::Follower,
    Role::OldAgent,
    Role::NewAgent,
    Role::OldPrimary,
    Role::Target,
    Role::Proxy,
    Role::Store,
    Role::OtherAgent,
    Role::Other,
];

/// Who has a part in tasks of a kind.
#[must_use]
pub fn roles(kind: Kind) -> &'static [Role] {
    match kind {
        Kind::Replace => &ROLES,
        Kind::Upgrade | Kind::TakeBack => &UPGRADED,
        _ => &ROLES[..8],
    }
}

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

/// What happens in a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Nothing.
    Calm,
    /// At this step, this, to this party.
    Fault(Step, Role, Fault),
    /// The same to this one message, by its name in the run.
    Message(Message, Tamper),
    /// Every question of every step comes twice.
    Twice,
}

/// One run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cell {
    /// Of task.
    pub kind: Kind,
    /// What happens in it.
    pub what: What,
}

/// Whether a party and a fault have to do with a step.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// There is something to run.
    Cell,
    /// The message is neither from this party nor to it.
    NotInvolved,
    /// The message goes over a connection, which delivers nothing twice.
    ComesOnce,
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
    /// One waited for an operator, and got his word.
    pub by_operator: bool,
    /// Longest wait of a client, by the proxy that it was connected to.
    pub longest: Vec<Micros>,
    /// The messages of the task.
    pub messages: Vec<Message>,
}

impl End {
    /// Longest wait of clients but those of this proxy.
    #[must_use]
    pub fn longest_but(&self, proxy: Option<usize>) -> Micros {
        let all = self.longest.iter().enumerate();
        let others = all.filter(|(index, _)| Some(*index) != proxy);
        others.map(|(_, time)| *time).max().unwrap_or(0)
    }
}

/// Runs a cell.
#[must_use]
pub fn run(cell: Cell) -> End {
    World::staged(cell.kind, Trace::default()).stage(cell).0
}

/// Runs a cell again, for its story.
#[must_use]
pub fn tell(cell: Cell) -> Vec<String> {
    World::staged(cell.kind, Trace::new(true, true))
        .stage(cell)
        .1
}

/// Whether this is a cell.
#[must_use]
pub fn place(step: &Step, role: Role, fault: Fault) -> Place {
    if fault.tamper().is_none() {
        return Place::Cell;
    }
    match step.moment {
        Moment::At(..) => Place::NotInvolved,
        Moment::Message { from, to, .. } if from != role && to != role => Place::NotInvolved,
        Moment::Message { call, .. } if fault == Fault::Repeat && call.comes_once() => {
            Place::ComesOnce
        }
        Moment::Message { .. } => Place::Cell,
    }
}

/// Every step, role and fault of a kind, and whether it is a cell. Where steps are all that passes, who
/// dies at a question is not killed once more at its answer, a moment later.
pub fn places(kind: Kind) -> impl Iterator<Item = (Step, Role, Fault, Place)> {
    let is_all = derived::is_of(kind);
    let all = steps(kind).into_iter().flat_map(move |step| {
        roles(kind).iter().flat_map(move |role| {
            FAULTS.map(move |fault| (step, *role, fault, place(&step, *role, fault)))
        })
    });
    all.filter(move |(step, _, fault, _)| {
        !is_all || fault.tamper().is_some() || !step.moment.is_answer()
    })
}

/// The world of every cell: one shard of three nodes, and a host to move one to.
pub(crate) fn shape(kind: Kind) -> Shape {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
    let shape = Shape {
        shards: 1,
        nodes: 3,
        durability: 0,
        ..Shape::with(Profile::Unplanned, &mut rng)
    };
    match kind {
        Kind::Replace => Shape {
            hosts: 4,
            durability: 1,
            spare: 1,
            // One on each proxy.
            clients: 2,
            ..shape
        },
        Kind::Upgrade | Kind::TakeBack => Shape {
            durability: 1,
            clients: 2,
            ..shape
        },
        _ => shape,
    }
}

/// The variant of every cell.
pub(crate) const VARIANT: Variant = Variant::Real;
