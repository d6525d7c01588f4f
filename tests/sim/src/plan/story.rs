//! Things that go wrong together: what only one layer of the protocol stands against, at the moment
//! at which the others have nothing to say.
//!
//! Invariant: whom it happens to is decided when it happens, from the records; when, from the seed.

use rand::{Rng, seq::IndexedRandom};

use super::{Script, Shape, TROUBLE, accident, put};
use crate::{
    ctx::Ctx,
    sched::{MS, Micros, SEC},
};

/// What happens to a shard's primary and around it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Story {
    /// Its agent reaches no controller, so the replicas' agents promise; somebody else misses it, and
    /// once it is declared lost, its agent reaches the others neither.
    Promised,
    /// It stands still for a moment, and when it is declared lost for that, its agent is not told.
    Hangs,
    /// Its host is cut off for a little longer than a lease, and comes back through a controller
    /// that does not know yet what happened.
    StaleReturn,
    /// Its host dies, and is gone for good.
    HostDies,
    /// Its process dies while its agent stands still: its replicas miss it before anybody knows why.
    DiesUnseen,
    /// Its host is cut off, comes back, and is cut off again.
    CutTwice,
    /// The store is out, so that everybody promises; when it is back the host is cut off, and the
    /// leader that has declared its primary lost stands still.
    StoreOut,
    /// The process of the node that joins, or joined last, dies.
    JoinerDies,
    /// Its host is lost.
    JoinerLost,
    /// The process of the node that leaves dies.
    LeaverDies,
    /// Its host is lost.
    LeaverLost,
    /// The primary's process dies while nodes come and go.
    PrimaryDies,
    /// The primary's agent is gone for a while, and hears what it was not told from a controller that
    /// is behind.
    PrimaryUntold,
    /// The primary's host is lost for a while.
    PrimaryLost,
    /// The process of the node dies that gets another engine.
    ExchangedDies,
    /// Its host is lost for a while.
    ExchangedLost,
    /// As [`Story::PrimaryUntold`], of a replica: the one that gets another engine, if one does.
    ReplicaUntold,
}

const STORIES: [Story; 8] = [
    Story::Promised,
    Story::Hangs,
    Story::StaleReturn,
    // It needs the cut's end in the right moment.
    Story::StaleReturn,
    Story::HostDies,
    Story::DiesUnseen,
    Story::CutTwice,
    Story::StoreOut,
];

impl Story {
    /// Ends with a replaced primary, whatever else happens: nothing else does.
    #[must_use]
    pub fn ends_replaced(self) -> bool {
        matches!(self, Self::HostDies | Self::DiesUnseen)
    }
}

/// Puts a seed's story into the queue, and sometimes something else.
pub(super) fn schedule(ctx: &mut Ctx, shape: Shape, now: Micros) {
    let story = *STORIES.choose(&mut ctx.rng).unwrap_or(&Story::Promised);
    let shard = ctx.rng.random_range(0..shape.shards);
    let at = now + ctx.rng.random_range(500 * MS..1_500 * MS);
    let number = ctx.rng.random();
    put(ctx, at, Script::Tell(story, shard, number));
    if !story.ends_replaced() && ctx.chance(300) {
        let script = accident::lost(ctx, shape);
        let at = now + ctx.rng.random_range(SEC..TROUBLE);
        put(ctx, at, script);
    }
}
