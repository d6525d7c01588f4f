//! The steps of a replacement, by the message that each is.
//!
//! Invariant: as in [`super::steps`].

use super::{
    Call::{Act, Assign, Linked, Removed, Revoked, Txn},
    Role::{Follower, Leader, Leaver, NewAgent, OldAgent, OldPrimary, PrimaryAgent, Store, Target},
    steps::{Step, answers, asks},
};

/// The primary's agent talks to the leader here, those of the two others to the follower. Writes that
/// say only what is waited for are no steps.
pub(super) const REPLACE: [Step; 21] = [
    asks("admit", Txn, Leader, Store, 1),
    asks("join", Txn, Leader, Store, 2),
    asks(
        "its agent is told to start it",
        Assign,
        Follower,
        NewAgent,
        1,
    ),
    asks(
        "the primary's agent learns of it",
        Assign,
        Leader,
        PrimaryAgent,
        1,
    ),
    asks("let it follow", Act, PrimaryAgent, OldPrimary, 1),
    asks("its process is known", Txn, Leader, Store, 5),
    asks("follow the primary", Act, NewAgent, Target, 2),
    asks("it follows", Linked, NewAgent, Follower, 1),
    asks("it is in sync", Txn, Leader, Store, 6),
    asks("the other one leaves", Txn, Leader, Store, 7),
    answers("the other one leaves", Txn, Store, Leader, 7),
    asks(
        "the leaver's agent learns that",
        Assign,
        Follower,
        OldAgent,
        1,
    ),
    asks(
        "the primary's agent learns that",
        Assign,
        Leader,
        PrimaryAgent,
        2,
    ),
    asks("let go of the primary", Act, OldAgent, Leaver, 1),
    asks("let go of the leaver", Act, PrimaryAgent, OldPrimary, 2),
    asks(
        "the leaver is fed no more",
        Revoked,
        PrimaryAgent,
        Leader,
        1,
    ),
    asks("drain", Txn, Leader, Store, 9),
    asks("it has left", Txn, Leader, Store, 10),
    answers("it has left", Txn, Store, Leader, 10),
    asks("it is removed", Removed, OldAgent, Follower, 1),
    asks("forget it", Txn, Leader, Store, 11),
];
