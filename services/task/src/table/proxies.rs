//! The steps of a change of proxies.

use super::{Cancel, OVER, Row, Undo, ended, rows};
use crate::proxies::{Changes, DRAIN_MS_MAX, HANDOVER_MS_MAX, ProxyPhase, UNFIT_MS_MAX};

const NOTHING: Undo = Undo::By("nothing was changed");
const BACK: Undo = Undo::By(
    "the placement says again what the proxy ran before: the process of before takes the clients \
     back while it is warm, else another one of its program takes over",
);
const AWAY: Undo = Undo::By("the new proxy is taken away; the old one was not touched");
const GOES_BACK: Cancel = Cancel::Refused("the proxy goes back already");

/// Of a change of proxies.
#[must_use]
pub fn of_proxy(phase: ProxyPhase) -> Row {
    let row = rows(phase.name());
    match phase {
        ProxyPhase::Ready => row(
            "the program is listed",
            "wait for the time, the window, and the proxies before it",
            "it is its turn",
            NOTHING,
            None,
            Cancel::Honoured,
        ),
        ProxyPhase::Check => row(
            "it is its turn",
            "look at it, the instance's other proxies and its shards",
            "its agent reports it, the others route every shard, every shard serves",
            NOTHING,
            Some(UNFIT_MS_MAX),
            Cancel::Honoured,
        ),
        ProxyPhase::HandOver => row(
            "the placement says what it should run",
            "its agent fetches the program, starts a process of it, and that one takes over",
            "its agent and its stream say that the new process serves every shard",
            BACK,
            Some(HANDOVER_MS_MAX),
            Cancel::Honoured,
        ),
        ProxyPhase::Bake => row(
            "the new process serves",
            "wait, and watch it",
            "it has not ended, reaches its nodes, and answers no more errors than the old one",
            BACK,
            None,
            Cancel::Honoured,
        ),
        ProxyPhase::Build => row(
            "a proxy is placed on another host",
            "its agent fetches the program and starts a process of it",
            "its agent and its stream say that it serves every shard",
            AWAY,
            Some(HANDOVER_MS_MAX),
            Cancel::Honoured,
        ),
        ProxyPhase::Drain => row(
            "the successor serves, and the placement says where clients are to go",
            "the old proxy takes no more clients, tells those that it has, and closes each at a boundary",
            "it has none left, or the time is over",
            Undo::By("when the successor is lost, a new process takes the old one's place"),
            Some(DRAIN_MS_MAX),
            Cancel::Refused("its clients are on their way to the proxy that serves in its place"),
        ),
        ProxyPhase::Back => row(
            "the new process is bad, or an operator wants it back",
            "its agent gives the clients to a process of the program of before",
            "its agent says that this one serves",
            Undo::By("it is what puts back"),
            Some(HANDOVER_MS_MAX),
            GOES_BACK,
        ),
        ProxyPhase::Parked => row(
            "it could not go back by itself; the new process serves",
            "wait for an operator's word",
            "it is given",
            BACK,
            None,
            Cancel::Refused("the task waits for an operator: resolve it by retry or finalize"),
        ),
        ProxyPhase::Done => ended(
            phase.name(),
            "it runs what was asked for",
            Undo::No("another upgrade, to the version of before, goes back"),
        ),
        ProxyPhase::RolledBack => ended(phase.name(), "it serves as before", NOTHING),
        ProxyPhase::Skipped => ended(phase.name(), "it was left alone", NOTHING),
    }
}

/// Of such a change of proxies.
pub(super) fn of_proxies(changes: &Changes) -> Vec<Row> {
    let other = match changes.rebuild {
        Some(_) => [ProxyPhase::HandOver].as_slice(),
        None => &[ProxyPhase::Build, ProxyPhase::Drain],
    };
    let phases = ProxyPhase::ALL.iter().filter(|p| !other.contains(p));
    phases.map(|phase| of_proxy(*phase)).collect()
}

/// A cancel is for every proxy that it can still be for; those that are done stay so.
pub(super) fn cancel_proxies(changes: &Changes) -> Cancel {
    let mut refused = OVER;
    for part in &changes.proxies {
        match of_proxy(part.phase).cancel {
            Cancel::Honoured => return Cancel::Honoured,
            OVER => {}
            cancel @ Cancel::Refused(_) => refused = cancel,
        }
    }
    refused
}
