//! The steps of each kind of task, by the message that each is.
//!
//! Invariant: each is passed in a run without accidents; the matrix fails where one is not.

use super::{Call, Kind, Role};
use crate::plan::Point;

/// When a step is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// This message is sent.
    Message {
        /// Of this call.
        call: Call,
        /// Who sends it.
        from: Role,
        /// To whom.
        to: Role,
        /// Of the calls of this kind between the two, since the task began; the first is 1.
        nth: u32,
        /// It is the answer; then `from` is who was asked.
        is_answer: bool,
    },
    /// This act, which is no message, for this time.
    At(Point, u32),
}

/// A step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// For readers.
    pub name: &'static str,
    /// When it is taken.
    pub moment: Moment,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let answer = match self.moment {
            Moment::Message {
                is_answer: true, ..
            } => " (answer)",
            _ => "",
        };
        write!(f, "{}{answer}", self.name)
    }
}

pub(super) const fn asks(name: &'static str, call: Call, from: Role, to: Role, nth: u32) -> Step {
    let is_answer = false;
    Step {
        name,
        moment: Moment::Message {
            call,
            from,
            to,
            nth,
            is_answer,
        },
    }
}

pub(super) const fn answers(
    name: &'static str,
    call: Call,
    from: Role,
    to: Role,
    nth: u32,
) -> Step {
    let is_answer = true;
    Step {
        name,
        moment: Moment::Message {
            call,
            from,
            to,
            nth,
            is_answer,
        },
    }
}

const fn at(name: &'static str, point: Point, times: u32) -> Step {
    Step {
        name,
        moment: Moment::At(point, times),
    }
}

/// Steps of a kind, in order.
#[must_use]
pub fn steps(kind: Kind) -> &'static [Step] {
    match kind {
        Kind::Provision => &PROVISION,
        Kind::Switchover => &SWITCHOVER,
        Kind::Failover => &FAILOVER,
        Kind::Decommission => &DECOMMISSION,
        Kind::Replace => &super::moves::REPLACE,
    }
}

use Call::{
    Act, Assign, Commit, Confirm, Detached, Exit, Level, Login, Removed, Route, TakeOver, Txn, Up,
    Watch,
};
use Role::{Follower, Leader, NewAgent, OldAgent, OldPrimary, Proxy, Store, Target};

/// The old agent and the proxy talk to the leader here, the new agent to the follower.
const PROVISION: [Step; 25] = [
    asks(
        "the primary's agent is told to start it",
        Assign,
        Leader,
        OldAgent,
        1,
    ),
    asks(
        "a replica's agent is told to start it",
        Assign,
        Follower,
        NewAgent,
        1,
    ),
    asks("the primary runs", Up, OldAgent, Leader, 2),
    asks("a replica runs", Up, NewAgent, Follower, 2),
    asks("begin the first epoch", Txn, Leader, Store, 1),
    answers("begin the first epoch", Txn, Store, Leader, 1),
    asks("the epoch is seen", Watch, Store, Follower, 1),
    asks(
        "the primary's agent learns the epoch",
        Assign,
        Leader,
        OldAgent,
        3,
    ),
    asks(
        "a replica's agent learns the epoch",
        Assign,
        Follower,
        NewAgent,
        2,
    ),
    asks("a proxy learns the epoch", Route, Leader, Proxy, 1),
    asks("a proxy has applied the epoch", Level, Proxy, Leader, 1),
    asks("log in to the primary", Act, NewAgent, Target, 1),
    answers("log in to the primary", Act, Target, NewAgent, 1),
    asks("follow the primary", Act, NewAgent, Target, 2),
    answers("follow the primary", Act, Target, NewAgent, 2),
    asks("the first grant", Act, OldAgent, OldPrimary, 1),
    answers("the first grant", Act, OldPrimary, OldAgent, 1),
    asks("the last grant", Act, OldAgent, OldPrimary, 4),
    answers("the last grant", Act, OldPrimary, OldAgent, 4),
    asks("a replica is in sync", Txn, Leader, Store, 2),
    answers("a replica is in sync", Txn, Store, Leader, 2),
    asks("the next replica is in sync", Txn, Leader, Store, 3),
    answers("the next replica is in sync", Txn, Store, Leader, 3),
    asks("serve", Txn, Leader, Store, 4),
    answers("serve", Txn, Store, Leader, 4),
];

const SWITCHOVER: [Step; 55] = [
    asks("admit", Txn, Leader, Store, 1),
    answers("admit", Txn, Store, Leader, 1),
    asks("start", Txn, Leader, Store, 2),
    answers("start", Txn, Store, Leader, 2),
    asks("preflight is over", Txn, Leader, Store, 3),
    answers("preflight is over", Txn, Store, Leader, 3),
    asks("ensure users", Call::Step, Leader, NewAgent, 1),
    asks("make a user", Act, NewAgent, Target, 1),
    answers("make a user", Act, Target, NewAgent, 1),
    answers("ensure users", Call::Step, NewAgent, Leader, 1),
    asks("declare", Txn, Leader, Store, 4),
    answers("declare", Txn, Store, Leader, 4),
    asks("the declaration is seen", Watch, Store, Follower, 1),
    asks("the old agent learns of it", Assign, Leader, OldAgent, 1),
    asks("the new agent learns of it", Assign, Follower, NewAgent, 1),
    asks("hold", Route, Leader, Proxy, 1),
    asks("held", Level, Proxy, Leader, 1),
    asks("hand over", Call::Step, Leader, OldAgent, 1),
    at("the hand-over is journaled", Point::Journaled, 4),
    asks("reach the target", Login, OldAgent, Target, 1),
    answers("reach the target", Login, Target, OldAgent, 1),
    asks("fence", Act, OldAgent, OldPrimary, 1),
    answers("fence", Act, OldPrimary, OldAgent, 1),
    asks("set the login", Act, OldAgent, OldPrimary, 2),
    answers("set the login", Act, OldPrimary, OldAgent, 2),
    asks("fail over", Act, OldAgent, OldPrimary, 3),
    answers("fail over", Act, OldPrimary, OldAgent, 3),
    at("the target has every byte", Point::TargetCaughtUp, 1),
    asks("take over", TakeOver, OldPrimary, Target, 1),
    answers("take over", TakeOver, Target, OldPrimary, 1),
    asks("commit", Commit, OldAgent, Leader, 1),
    asks("write the commit", Txn, Leader, Store, 5),
    answers("write the commit", Txn, Store, Leader, 5),
    answers("commit", Commit, Leader, OldAgent, 1),
    asks("the leader sees the epoch", Watch, Store, Leader, 2),
    asks("the follower sees the epoch", Watch, Store, Follower, 2),
    asks(
        "the old agent learns the epoch",
        Assign,
        Leader,
        OldAgent,
        2,
    ),
    asks(
        "the new agent learns the epoch",
        Assign,
        Follower,
        NewAgent,
        2,
    ),
    asks("apply", Route, Leader, Proxy, 2),
    asks("applied", Level, Proxy, Leader, 2),
    answers("hand over", Call::Step, OldAgent, Leader, 1),
    asks("settle", Txn, Leader, Store, 6),
    answers("settle", Txn, Store, Leader, 6),
    asks("grant", Act, NewAgent, Target, 3),
    answers("grant", Act, Target, NewAgent, 3),
    asks("a replica is in sync", Txn, Leader, Store, 7),
    answers("a replica is in sync", Txn, Store, Leader, 7),
    asks("close", Txn, Leader, Store, 9),
    answers("close", Txn, Store, Leader, 9),
    asks(
        "the new agent learns the end",
        Assign,
        Follower,
        NewAgent,
        3,
    ),
    asks("end", Txn, Leader, Store, 10),
    answers("end", Txn, Store, Leader, 10),
    asks("the old agent learns the end", Assign, Leader, OldAgent, 3),
    asks("revoke", Act, OldAgent, OldPrimary, 5),
    answers("revoke", Act, OldPrimary, OldAgent, 5),
];

const FAILOVER: [Step; 41] = [
    asks("the process has ended", Exit, OldAgent, Leader, 1),
    asks("declare", Txn, Leader, Store, 1),
    answers("declare", Txn, Store, Leader, 1),
    asks("the declaration is seen", Watch, Store, Follower, 1),
    asks("the old agent learns of it", Assign, Leader, OldAgent, 1),
    asks("the new agent learns of it", Assign, Follower, NewAgent, 1),
    asks("a proxy learns of it", Route, Leader, Proxy, 1),
    asks("leave the primary", Act, NewAgent, Target, 1),
    answers("leave the primary", Act, Target, NewAgent, 1),
    asks("forget the login", Act, NewAgent, Target, 2),
    answers("forget the login", Act, Target, NewAgent, 2),
    asks("detached", Detached, NewAgent, Follower, 1),
    asks("choose", Txn, Leader, Store, 2),
    answers("choose", Txn, Store, Leader, 2),
    asks("the choice is seen", Watch, Store, Follower, 2),
    asks("promote", Call::Step, Leader, NewAgent, 1),
    asks("confirm", Confirm, NewAgent, Follower, 1),
    answers("confirm", Confirm, Follower, NewAgent, 1),
    asks("become the primary", Act, NewAgent, Target, 3),
    answers("become the primary", Act, Target, NewAgent, 3),
    answers("promote", Call::Step, NewAgent, Leader, 1),
    asks("commit", Txn, Leader, Store, 3),
    answers("commit", Txn, Store, Leader, 3),
    asks("the leader sees the epoch", Watch, Store, Leader, 3),
    asks("the follower sees the epoch", Watch, Store, Follower, 3),
    asks(
        "the old agent learns the epoch",
        Assign,
        Leader,
        OldAgent,
        2,
    ),
    asks(
        "the new agent learns the epoch",
        Assign,
        Follower,
        NewAgent,
        2,
    ),
    asks("apply", Route, Leader, Proxy, 3),
    asks("applied", Level, Proxy, Leader, 2),
    asks("the first grant", Act, NewAgent, Target, 4),
    answers("the first grant", Act, Target, NewAgent, 4),
    asks("the last grant", Act, NewAgent, Target, 7),
    answers("the last grant", Act, Target, NewAgent, 7),
    asks("settle", Txn, Leader, Store, 4),
    answers("settle", Txn, Store, Leader, 4),
    asks("the lost one joins", Act, OldAgent, OldPrimary, 2),
    answers("the lost one joins", Act, OldPrimary, OldAgent, 2),
    asks("a replica is in sync", Txn, Leader, Store, 5),
    answers("a replica is in sync", Txn, Store, Leader, 5),
    asks("end", Txn, Leader, Store, 7),
    answers("end", Txn, Store, Leader, 7),
];

const DECOMMISSION: [Step; 12] = [
    asks("admit", Txn, Leader, Store, 1),
    answers("admit", Txn, Store, Leader, 1),
    asks("start", Txn, Leader, Store, 2),
    answers("start", Txn, Store, Leader, 2),
    asks(
        "the primary's agent is told to remove it",
        Assign,
        Leader,
        OldAgent,
        1,
    ),
    asks(
        "a replica's agent is told to remove it",
        Assign,
        Follower,
        NewAgent,
        1,
    ),
    asks("the primary is removed", Removed, OldAgent, Leader, 1),
    asks("a replica is removed", Removed, NewAgent, Follower, 1),
    asks("forget", Txn, Leader, Store, 3),
    answers("forget", Txn, Store, Leader, 3),
    asks("the leader sees the end", Watch, Store, Leader, 1),
    asks("the follower sees the end", Watch, Store, Follower, 1),
];
