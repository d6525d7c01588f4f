//! A host's right to serve, as the real keeper has it: a leased key, kept by whichever controller has
//! the session of the host's agent, for as long as that reports.
//!
//! Invariant: the agent is told only of a renewal after which the key was seen, and of which of its
//! reports came before it; a key that is there keeps its lease.

use std::rc::Rc;

use super::Desk;
use crate::{
    msg::{ConnId, Stream},
    sched::{MS, Micros},
    store::{Compare, HOST_TTL, Key, LeaseId, StoreReply, StoreRequest, Txn, Value},
};

/// Between renewals.
const KEEP_SPACING: Micros = 400 * MS;
const TRIES: usize = 4;

/// The key as this session wrote it.
#[derive(Clone, Copy, Debug)]
struct Wrote {
    lease: LeaseId,
    /// When the lease began.
    created: u64,
    /// When this session wrote the key.
    written: u64,
}

/// One session's hold on its host's lease.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Held {
    wrote: Option<Wrote>,
    /// Of the newest report.
    number: u64,
    asking: bool,
    asked: Micros,
}

/// Notes a report; true when it is time to renew.
pub(super) fn is_due(desk: &Desk, conn: ConnId, number: u64) -> bool {
    let now = desk.world.borrow().now();
    let mut leases = desk.leases.borrow_mut();
    let held = leases.entry(conn).or_default();
    held.number = number;
    let due = !held.asking && (held.wrote.is_none() || now >= held.asked + KEEP_SPACING);
    if due {
        held.asking = true;
        held.asked = now;
    }
    due
}

/// Renews the lease, or puts a new one, and tells the agent.
pub(super) async fn keep(desk: Rc<Desk>, conn: ConnId, host: usize) {
    let held = desk.leases.borrow().get(&conn).copied().unwrap_or_default();
    let (wrote, kept) = renew(&desk, host, held.wrote).await;
    let mut leases = desk.leases.borrow_mut();
    let Some(entry) = leases.get_mut(&conn) else {
        return;
    };
    entry.asking = false;
    entry.wrote = wrote;
    if let Some(revision) = kept {
        let kept = Stream::LeaseKept {
            number: held.number,
            ttl_ms: u32::try_from(HOST_TTL / MS).unwrap_or(u32::MAX),
            revision,
        };
        desk.world.borrow_mut().send(desk.me, conn, kept);
    }
}

/// What this session has now, and since when the lease lasts if it was renewed.
async fn renew(desk: &Desk, host: usize, mut held: Option<Wrote>) -> (Option<Wrote>, Option<u64>) {
    for _ in 0..TRIES {
        let Some(wrote) = held else {
            match take(desk, host).await {
                Some(taken) => held = taken,
                None => return (None, None),
            }
            continue;
        };
        match desk.store(StoreRequest::Keep(wrote.lease)).await {
            Some(StoreReply::Kept(true)) => {}
            Some(StoreReply::Kept(false)) => {
                held = None;
                continue;
            }
            _ => return (held, None),
        }
        match desk.store(StoreRequest::Get(Key::Host(host))).await {
            Some(StoreReply::Got(Some(item))) if item.mod_revision == wrote.written => {
                return (held, Some(wrote.created));
            }
            Some(StoreReply::Got(_)) => held = None,
            _ => return (held, None),
        }
    }
    (held, None)
}

/// Writes the key under the lease that it has, or under a new one. `Some(None)`: look again; `None`:
/// the store does not answer.
async fn take(desk: &Desk, host: usize) -> Option<Option<Wrote>> {
    let key = Key::Host(host);
    let (compare, lease, created) = match desk.store(StoreRequest::Get(key.clone())).await? {
        StoreReply::Got(Some(item)) => {
            let lease = item.lease?;
            match desk.store(StoreRequest::Keep(lease)).await? {
                StoreReply::Kept(true) => {}
                _ => return Some(None),
            }
            let unchanged = Compare::Unchanged(key.clone(), item.mod_revision);
            (unchanged, lease, Some(item.create_revision))
        }
        _ => match desk.store(StoreRequest::Grant(HOST_TTL)).await? {
            StoreReply::Granted(lease) => (Compare::Absent(key.clone()), lease, None),
            _ => return None,
        },
    };
    let txn = Txn {
        compares: vec![compare],
        puts: vec![(key, Value::Host)],
        lease: Some(lease),
        ..Txn::default()
    };
    match desk.store(StoreRequest::Txn(txn)).await? {
        StoreReply::Committed(written) => Some(Some(Wrote {
            lease,
            created: created.unwrap_or(written),
            written,
        })),
        _ => Some(None),
    }
}
