//! How long clients may wait in a cell beyond what they wait without a fault.
//!
//! Invariant: who waits for longer than a second does so for a reason that is written here.

use slotmesh_sim::matrix::{Fault, Kind, Role};

/// Longest extra wait of clients, but for the exceptions.
pub(crate) const EXTRA_US: u64 = 1_000_000;

/// Cells of which clients wait for longer, and why nobody can help it.
#[derive(Debug)]
pub(crate) struct Exception {
    pub(crate) kind: Kind,
    pub(crate) role: Role,
    pub(crate) fault: Fault,
    pub(crate) bound_ms: u64,
    pub(crate) reason: &'static str,
}

const fn except(
    kind: Kind,
    role: Role,
    fault: Fault,
    bound_ms: u64,
    reason: &'static str,
) -> Exception {
    Exception {
        kind,
        role,
        fault,
        bound_ms,
        reason,
    }
}

const STOPPED: &str = "the primary itself stands still: its agent fences and replaces it once it has not answered for 800 ms";
const STREAM: &str = "agents and proxies of a controller that stands still leave it when it has been silent for 650 ms (who holds), 1.2 s (agents: the lease's margin) or 3 s (a proxy that knows of no trouble yet)";
const BROKEN: &str = "the connection is dead, and its ends notice up to 1.5 s later";
const LATE: &str = "what was a second late is what clients wait for";
const RESUMES: &str = "the old primary is fenced, and its agent asks for the record and for its right to serve before it goes back";
const FENCED: &str = "only the old primary's agent knows whether it is fenced: who else goes on needs the end of its host's lease";
const GRANTS: &str = "only the next primary's agent can let clients in; who else goes on needs the end of its host's lease";
const HALFWAY: &str = "a node ends in the middle of taking over: the engine's own limit of 500 ms, then a failover, or the old one goes back";
const NEWEST: &str =
    "the next primary itself stands still, and no replica is known to have caught up with it yet";
const COPIES: &str = "the primary's agent stands still for longer than its lease, and the fencer counts a node that still copies, or that left less than a look ago, as a follower that misses the primary: it is ended, and failed over";
const STORE: &str = "the roles have changed, and nothing but the store may say so";
const LEADS: &str = "a failover needs a leader: the next one comes at the end of the lease (2 s here) and listens for a second";
const ASKED: &str = "the leader waits out the time of the step and asks again: a call that a broken connection would end at once does not end in this model";

pub(crate) const EXCEPTIONS: &[Exception] = &[
    except(
        Kind::Provision,
        Role::OldPrimary,
        Fault::Stall,
        2100,
        STOPPED,
    ),
    except(Kind::Switchover, Role::Leader, Fault::Lose, 2000, BROKEN),
    except(Kind::Switchover, Role::Follower, Fault::Stall, 3300, STREAM),
    except(Kind::Switchover, Role::Follower, Fault::Lose, 2000, BROKEN),
    except(Kind::Switchover, Role::Follower, Fault::Delay, 1200, LATE),
    except(Kind::Switchover, Role::OldAgent, Fault::Kill, 3000, RESUMES),
    except(Kind::Switchover, Role::OldAgent, Fault::Stall, 5100, FENCED),
    except(Kind::Switchover, Role::OldAgent, Fault::Delay, 1200, LATE),
    except(Kind::Switchover, Role::NewAgent, Fault::Stall, 5100, GRANTS),
    except(Kind::Switchover, Role::NewAgent, Fault::Lose, 2000, BROKEN),
    except(Kind::Switchover, Role::NewAgent, Fault::Delay, 1200, LATE),
    except(Kind::Switchover, Role::Proxy, Fault::Lose, 1500, BROKEN),
    except(
        Kind::Switchover,
        Role::OldPrimary,
        Fault::Kill,
        2300,
        HALFWAY,
    ),
    except(
        Kind::Switchover,
        Role::OldPrimary,
        Fault::Stall,
        3300,
        STOPPED,
    ),
    except(
        Kind::Switchover,
        Role::OldPrimary,
        Fault::Lose,
        2600,
        BROKEN,
    ),
    except(Kind::Switchover, Role::OldPrimary, Fault::Delay, 1200, LATE),
    except(Kind::Switchover, Role::Target, Fault::Kill, 2600, HALFWAY),
    except(Kind::Switchover, Role::Target, Fault::Stall, 5100, NEWEST),
    except(Kind::Switchover, Role::Target, Fault::Lose, 2600, BROKEN),
    except(Kind::Switchover, Role::Target, Fault::Delay, 1200, LATE),
    except(Kind::Switchover, Role::Store, Fault::Stall, 5100, STORE),
    except(Kind::Switchover, Role::Store, Fault::Lose, 2000, BROKEN),
    except(Kind::Switchover, Role::Store, Fault::Delay, 1200, LATE),
    except(Kind::Failover, Role::Leader, Fault::Kill, 3600, LEADS),
    except(Kind::Failover, Role::Leader, Fault::Stall, 3600, LEADS),
    except(Kind::Failover, Role::Leader, Fault::Lose, 2100, ASKED),
    except(Kind::Failover, Role::Leader, Fault::Delay, 1200, LATE),
    except(Kind::Failover, Role::Follower, Fault::Stall, 3300, STREAM),
    except(Kind::Failover, Role::OldAgent, Fault::Lose, 1600, BROKEN),
    except(Kind::Failover, Role::OldAgent, Fault::Delay, 1200, LATE),
    except(Kind::Failover, Role::Follower, Fault::Lose, 1800, BROKEN),
    except(Kind::Failover, Role::Follower, Fault::Delay, 1200, LATE),
    except(Kind::Failover, Role::NewAgent, Fault::Kill, 2100, ASKED),
    except(Kind::Failover, Role::NewAgent, Fault::Stall, 5100, GRANTS),
    except(Kind::Failover, Role::NewAgent, Fault::Lose, 2100, ASKED),
    except(Kind::Failover, Role::NewAgent, Fault::Delay, 1600, LATE),
    except(Kind::Failover, Role::Target, Fault::Stall, 5100, NEWEST),
    except(Kind::Failover, Role::Target, Fault::Delay, 1600, LATE),
    except(Kind::Failover, Role::Proxy, Fault::Lose, 1200, BROKEN),
    except(Kind::Failover, Role::Store, Fault::Kill, 1200, STORE),
    except(Kind::Failover, Role::Store, Fault::Stall, 5100, STORE),
    except(Kind::Failover, Role::Store, Fault::Lose, 1800, BROKEN),
    except(Kind::Failover, Role::Store, Fault::Delay, 1200, LATE),
    except(Kind::Replace, Role::OldPrimary, Fault::Stall, 2100, STOPPED),
    except(
        Kind::Replace,
        Role::PrimaryAgent,
        Fault::Stall,
        2500,
        COPIES,
    ),
    // The second replica becomes the primary, and the one of before again when that is taken back.
    except(Kind::Upgrade, Role::Leader, Fault::Stall, 1500, STREAM),
    except(Kind::Upgrade, Role::Follower, Fault::Stall, 3300, STREAM),
    except(Kind::Upgrade, Role::OldAgent, Fault::Kill, 3000, RESUMES),
    except(Kind::Upgrade, Role::OldAgent, Fault::Stall, 5500, FENCED),
    except(Kind::Upgrade, Role::OldPrimary, Fault::Kill, 2300, HALFWAY),
    except(Kind::Upgrade, Role::OldPrimary, Fault::Stall, 3900, STOPPED),
    except(Kind::Upgrade, Role::OldPrimary, Fault::Lose, 1500, BROKEN),
    except(Kind::Upgrade, Role::Store, Fault::Stall, 5100, STORE),
    except(Kind::Upgrade, Role::OtherAgent, Fault::Stall, 5100, GRANTS),
    except(Kind::Upgrade, Role::OtherAgent, Fault::Delay, 1200, LATE),
    except(Kind::Upgrade, Role::Other, Fault::Kill, 2300, HALFWAY),
    except(Kind::Upgrade, Role::Other, Fault::Stall, 5100, NEWEST),
    except(Kind::Upgrade, Role::Other, Fault::Lose, 1500, BROKEN),
    except(Kind::Upgrade, Role::Other, Fault::Delay, 1200, LATE),
    except(Kind::TakeBack, Role::Leader, Fault::Stall, 2000, STREAM),
    except(Kind::TakeBack, Role::Follower, Fault::Stall, 3300, STREAM),
    except(Kind::TakeBack, Role::OldAgent, Fault::Stall, 5100, GRANTS),
    except(Kind::TakeBack, Role::OldPrimary, Fault::Kill, 2300, HALFWAY),
    except(Kind::TakeBack, Role::OldPrimary, Fault::Stall, 5500, NEWEST),
    except(Kind::TakeBack, Role::OldPrimary, Fault::Lose, 1500, BROKEN),
    except(Kind::TakeBack, Role::Store, Fault::Stall, 5100, STORE),
    except(Kind::TakeBack, Role::OtherAgent, Fault::Kill, 3000, RESUMES),
    except(Kind::TakeBack, Role::OtherAgent, Fault::Stall, 5500, FENCED),
    except(Kind::TakeBack, Role::Other, Fault::Kill, 2300, HALFWAY),
    except(Kind::TakeBack, Role::Other, Fault::Stall, 3300, STOPPED),
    except(Kind::TakeBack, Role::Other, Fault::Lose, 1500, BROKEN),
];
