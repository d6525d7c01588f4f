//! Watches: each is told what it has not been told yet, in order, as soon as the member that it asks
//! knows it.
//!
//! Invariant: what a watch tells has no gap; one that would have one is ended, and its owner knows.

use std::collections::BTreeMap;

use super::history::History;
use crate::{
    ctx::Ctx,
    msg::{ConnId, Party, Stream},
    sched::Micros,
};

#[derive(Debug)]
struct Watch {
    conn: ConnId,
    party: Party,
    /// The first revision that it has not been told.
    next: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watches {
    all: Vec<Watch>,
    lagging: BTreeMap<Party, Micros>,
}

impl Watches {
    pub(super) fn add(&mut self, ctx: &Ctx, conn: ConnId, next: u64) {
        let link = ctx.net.conns.get(&conn);
        if let Some(party) = link.map(|link| link.peer(Party::Store)) {
            self.all.push(Watch { conn, party, next });
        }
    }

    pub(super) fn remove(&mut self, conn: ConnId) {
        self.all.retain(|w| w.conn != conn);
    }

    /// Ends all.
    pub(super) fn close(&mut self, ctx: &mut Ctx) {
        for watch in std::mem::take(&mut self.all) {
            ctx.close(Party::Store, watch.conn);
        }
    }

    pub(super) fn lag(&mut self, party: Party, until: Micros) {
        self.lagging.insert(party, until);
    }

    /// Everybody what is news for them. Whoever has missed what is compacted gets to know that.
    pub(super) fn tell(&mut self, ctx: &mut Ctx, history: &History) {
        let now = ctx.now();
        self.lagging.retain(|_, until| now < *until);
        let lagging = &self.lagging;
        self.all.retain_mut(|watch| {
            if lagging.contains_key(&watch.party) {
                return true;
            }
            let Some(changes) = history.since(watch.next) else {
                ctx.checks.compacted += 1;
                ctx.send(Party::Store, watch.conn, Stream::Compacted);
                return false;
            };
            if let Some(last) = changes.last() {
                watch.next = last.revision + 1;
                ctx.send(Party::Store, watch.conn, Stream::Watched(changes));
            }
            true
        });
    }
}
