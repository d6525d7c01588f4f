//! `slotmesh host drain`: asks for switchovers until a host has no primary.
//!
//! Invariant: it ends at its limit, or as soon as what is left can't be moved; then it fails and says
//! for each primary why it stays.

use std::{collections::BTreeSet, time::Duration};

use serde::Serialize;
use slotmesh_proto::fleet::v1::{DrainHostRequest, StayingPrimary};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::{
    api::Api,
    failure::Failure,
    render::{Output, Text, show, table},
};

/// A switchover takes some tens of milliseconds.
const TURN: Duration = Duration::from_millis(300);

/// What became of it.
#[derive(Debug, Clone, Serialize)]
struct DrainView {
    host: String,
    primaries_left: u32,
    task_ids: BTreeSet<String>,
    stays: Vec<StayView>,
}

#[derive(Debug, Clone, Serialize)]
struct StayView {
    instance: String,
    shard: String,
    node: String,
    reason: String,
}

/// Drains it.
///
/// # Errors
/// As the controller answered; [`Failure::Local`] when primaries are left.
pub(crate) async fn on_drain(
    api: &mut Api,
    host: String,
    within_s: u32,
    output: Output,
) -> Result<(), Failure> {
    let until = Instant::now() + Duration::from_secs(within_s.into());
    let mut turns = interval(TURN);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut task_ids = BTreeSet::new();
    let (left, stays) = loop {
        turns.tick().await;
        let request = DrainHostRequest {
            host_id: host.clone(),
        };
        let answer = api
            .call(|api| {
                let request = request.clone();
                async move { api.fleet().drain_host(request).await }
            })
            .await?;
        task_ids.extend(answer.task_ids);
        if answer.settled || Instant::now() >= until {
            break (answer.primaries, answer.stays);
        }
    };
    let view = DrainView {
        host: host.clone(),
        primaries_left: left,
        task_ids,
        stays: stays.into_iter().map(StayView::from).collect(),
    };
    show(output, &view)?;
    match left {
        0 => Ok(()),
        left => Err(Failure::Local(anyhow::anyhow!(
            "{left} primaries are still on host {host}"
        ))),
    }
}

impl From<StayingPrimary> for StayView {
    fn from(from: StayingPrimary) -> Self {
        Self {
            instance: from.instance_id,
            shard: from.shard_id,
            node: from.node_id,
            reason: from.reason,
        }
    }
}

impl Text for DrainView {
    fn text(&self) -> String {
        let tasks = self.task_ids.len();
        let done = format!(
            "{}: {} primaries left, {tasks} switchovers begun",
            self.host, self.primaries_left
        );
        if self.stays.is_empty() {
            return done;
        }
        let rows = self.stays.iter().map(|s| {
            [
                s.instance.clone(),
                s.shard.clone(),
                s.node.clone(),
                s.reason.clone(),
            ]
        });
        let header = ["INSTANCE", "SHARD", "PRIMARY", "STAYS BECAUSE"];
        format!("{done}\n{}", table(header, rows))
    }
}
