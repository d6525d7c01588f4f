//! Moves the primaries of this host to others before the agent ends, when its operator wants that.
//!
//! Invariant: it only asks controllers for switchovers, so clients wait for milliseconds; it ends at its
//! limit, or as soon as nothing more can be moved, and says what stays. What stays serves on without
//! its agent, as it does when an agent just ends.

use std::time::Duration;

use slotmesh_proto::fleet::v1::{
    DrainHostRequest, DrainHostResponse, fleet_service_client::FleetServiceClient,
};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::controllers::Controllers;

/// Switchovers take some tens of milliseconds, and those of many shards run at once.
const TURN: Duration = Duration::from_millis(300);
/// A change waits up to 6 s for a leader to be elected.
const ASK_TIMEOUT: Duration = Duration::from_secs(7);

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// The host has no primary, and no task needs its nodes.
    All,
    /// So many primaries stay.
    Stay(u32),
    /// No controller has answered.
    Unknown,
}

/// Moves what can be moved within `limit`.
pub async fn drain(host_id: &str, controllers: &Controllers, limit: Duration) -> Drained {
    let until = Instant::now() + limit;
    let mut turns = interval(TURN);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    loop {
        turns.tick().await;
        let left = until.saturating_duration_since(Instant::now());
        let answer = ask(host_id, controllers, left).await;
        let over = left.is_zero();
        match answer.or(if over { last.take() } else { None }) {
            Some(answer) => {
                if answer.primaries == 0 && (answer.busy == 0 || over) {
                    tracing::info!("this host has no primary");
                    return Drained::All;
                }
                if answer.settled || over {
                    return stays(&answer);
                }
                last = Some(answer);
            }
            None if over => {
                tracing::warn!("no controller has answered: this host's primaries were not moved");
                return Drained::Unknown;
            }
            None => {}
        }
    }
}

fn stays(answer: &DrainHostResponse) -> Drained {
    for stay in &answer.stays {
        tracing::warn!(
            instance = stay.instance_id,
            shard = stay.shard_id,
            node = stay.node_id,
            reason = stay.reason,
            "a primary stays on this host"
        );
    }
    Drained::Stay(answer.primaries)
}

/// Whichever controller answers first; it forwards the call to the leader.
async fn ask(
    host_id: &str,
    controllers: &Controllers,
    left: Duration,
) -> Option<DrainHostResponse> {
    for address in controllers.addresses() {
        let Ok(channel) = controllers.channel(&address) else {
            continue;
        };
        let request = DrainHostRequest {
            host_id: host_id.to_owned(),
        };
        let mut client = FleetServiceClient::new(channel);
        match timeout(ASK_TIMEOUT.min(left), client.drain_host(request)).await {
            Ok(Ok(answer)) => return Some(answer.into_inner()),
            Ok(Err(status)) => {
                tracing::warn!(address, error = status.message(), "not drained yet");
            }
            Err(_) => tracing::warn!(address, "not drained yet: no answer"),
        }
    }
    None
}
