//! The steps of tasks that take many: all that is written, asked and done in a run without accidents.
//!
//! Invariant: what such a task shares with another one, message by message from the beginning, is that
//! one's to try.

use super::{Call, Cell, Kind, Moment, Role, Step, What, roles, run};
use crate::{Trace, World, ambush::Message, msg::Party};

/// The kind of task of which it is a continuation.
fn begins_as(kind: Kind) -> Option<Kind> {
    match kind {
        Kind::TakeBack => Some(Kind::Upgrade),
        Kind::Drain => Some(Kind::Switchover),
        _ => None,
    }
}

/// For readers: which calls are steps, and of which the answers are.
fn name(message: &Message) -> Option<&'static str> {
    Some(match (message.leg.call, message.is_answer) {
        (Call::Txn, _) => "write",
        (Call::Step, false) => "ask an agent",
        (Call::Act, false) => "change a node",
        (Call::Exit, false) => "a process has ended",
        (Call::Login, false) => "reach the target",
        (Call::TakeOver, false) => "ask the target to take over",
        (Call::Commit, _) => "commit",
        _ => return None,
    })
}

/// Whether the kind has no table.
pub(super) fn is_of(kind: Kind) -> bool {
    matches!(kind, Kind::Upgrade | Kind::TakeBack | Kind::Drain)
}

/// Steps of a kind, in order.
pub(super) fn steps(kind: Kind) -> Vec<Step> {
    let calm = |kind| {
        let what = What::Calm;
        run(Cell { kind, what }).messages
    };
    let (all, before) = (calm(kind), begins_as(kind).map(calm).unwrap_or_default());
    let shared = all.iter().zip(&before).take_while(|(a, b)| a == b).count();
    let world = World::staged(kind, Trace::default());
    let role = |party: Party| {
        let is_it = |role: &&Role| world.party(kind, **role) == party;
        roles(kind).iter().find(is_it).copied()
    };
    let step = |message: &Message| {
        let (from, to) = match message.is_answer {
            true => (message.leg.to, message.leg.from),
            false => (message.leg.from, message.leg.to),
        };
        let moment = Moment::Message {
            call: message.leg.call,
            from: role(from)?,
            to: role(to)?,
            nth: message.leg.nth,
            is_answer: message.is_answer,
        };
        let name = name(message)?;
        Some(Step { name, moment })
    };
    all[shared..].iter().filter_map(step).collect()
}
