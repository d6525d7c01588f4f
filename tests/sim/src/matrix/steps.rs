//! What a step of a task is, and the rows of which the tables of steps are made.
//!
//! Invariant: a row names who asks and who is asked; its answer goes the other way.

use super::{Call, Kind, Role, derived, tables};
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

impl Moment {
    pub(super) fn is_answer(self) -> bool {
        matches!(
            self,
            Self::Message {
                is_answer: true,
                ..
            }
        )
    }
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
        match self.moment {
            Moment::Message { nth, is_answer, .. } => {
                let answer = if is_answer { ", answer" } else { "" };
                write!(f, "{} ({nth}{answer})", self.name)
            }
            Moment::At(..) => write!(f, "{}", self.name),
        }
    }
}

/// A row of a table: a call, and which of its messages are steps; or an act.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    name: &'static str,
    /// The call's question.
    asked: Moment,
    /// The question is a step, and the answer is.
    legs: (bool, bool),
}

const fn row(
    name: &'static str,
    (call, from, to): (Call, Role, Role),
    nth: u32,
    legs: (bool, bool),
) -> Row {
    let asked = Moment::Message {
        call,
        from,
        to,
        nth,
        is_answer: false,
    };
    Row { name, asked, legs }
}

/// That this is asked.
pub(super) const fn asks(name: &'static str, call: Call, from: Role, to: Role, nth: u32) -> Row {
    row(name, (call, from, to), nth, (true, false))
}

/// That it is answered; `from` is who asked.
pub(super) const fn answers(name: &'static str, call: Call, from: Role, to: Role, nth: u32) -> Row {
    row(name, (call, from, to), nth, (false, true))
}

/// That it is asked, and that it is answered.
pub(super) const fn both(name: &'static str, call: Call, from: Role, to: Role, nth: u32) -> Row {
    row(name, (call, from, to), nth, (true, true))
}

/// An act that is no message.
pub(super) const fn at(name: &'static str, point: Point, times: u32) -> Row {
    Row {
        name,
        asked: Moment::At(point, times),
        legs: (true, false),
    }
}

impl Row {
    fn steps(self) -> impl Iterator<Item = Step> {
        let Self { name, asked, legs } = self;
        let answered = match asked {
            Moment::Message {
                call,
                from,
                to,
                nth,
                ..
            } => Moment::Message {
                call,
                from: to,
                to: from,
                nth,
                is_answer: true,
            },
            act => act,
        };
        let steps = [(legs.0, asked), (legs.1, answered)];
        let steps = steps.into_iter().filter(|(is_one, _)| *is_one);
        steps.map(move |(_, moment)| Step { name, moment })
    }
}

/// Steps of a kind, in order.
#[must_use]
pub fn steps(kind: Kind) -> Vec<Step> {
    let rows = match kind {
        Kind::Provision => tables::PROVISION,
        Kind::Switchover => tables::SWITCHOVER,
        Kind::Failover => tables::FAILOVER,
        Kind::Decommission => tables::DECOMMISSION,
        Kind::Replace => tables::REPLACE,
        Kind::Upgrade | Kind::TakeBack | Kind::Drain => return derived::steps(kind),
    };
    rows.iter().copied().flat_map(Row::steps).collect()
}
