//! What the controller wrote down of a failover: the events of its task, from the fault on.
//!
//! Invariant: only tasks made since the fault are asked for, so that a round never shows another's.

use std::time::{Duration, SystemTime};

use slotmesh_ctl::{
    api::Api,
    failure::Failure,
    progress::{self, Watcher},
};
use slotmesh_proto::task::v1::{ListTasksRequest, Task, TaskEvent};
use tokio::time::timeout;

use crate::chaos::mesh::Mesh;

/// The shard is whole again when this is asked; what is left to write takes moments.
const WATCH_LIMIT: Duration = Duration::from_secs(20);

/// One entry of a failover's task.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    pub(super) shard: String,
    pub(super) step: String,
    /// Since the fault.
    pub(super) at_ms: f64,
    pub(super) message: String,
}

struct Collector<'a> {
    since: SystemTime,
    events: &'a mut Vec<Event>,
}

impl Watcher for Collector<'_> {
    fn event(&mut self, event: &TaskEvent, _: Option<&Task>) -> Result<(), Failure> {
        if let Some(at_ms) = since(&event.time, self.since) {
            self.events.push(Event {
                shard: event.shard_id.clone(),
                step: event.step.clone(),
                at_ms,
                message: event.message.clone(),
            });
        }
        Ok(())
    }
}

fn since(time: &str, start: SystemTime) -> Option<f64> {
    let time = humantime::parse_rfc3339_weak(time).ok()?;
    Some(match time.duration_since(start) {
        Ok(after) => after.as_secs_f64() * 1e3,
        Err(before) => -before.duration().as_secs_f64() * 1e3,
    })
}

/// The events of all failovers since then, in the order of time.
pub(super) async fn of(mesh: &Mesh, start: SystemTime) -> anyhow::Result<Vec<Event>> {
    let mut api: Api = mesh.api().await?;
    let request = ListTasksRequest {
        instance_id: mesh.instance.clone(),
        kinds: vec!["Failover".into()],
        created_after: humantime::format_rfc3339_millis(start).to_string(),
        ..ListTasksRequest::default()
    };
    let listed = api.tasks().list_tasks(request).await?.into_inner();
    let mut events = Vec::new();
    for task in listed.tasks {
        let mut collector = Collector {
            since: start,
            events: &mut events,
        };
        let watched = progress::watch(&mut api, &task.task_id, 1, &mut collector);
        // What is there until then is shown all the same.
        let _ = timeout(WATCH_LIMIT, watched).await;
    }
    events.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_count_from_the_fault_also_before_it() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(10);
        assert_eq!(since("1970-01-01T00:00:10.250Z", start), Some(250.0));
        assert_eq!(since("1970-01-01T00:00:09.750Z", start), Some(-250.0));
        assert_eq!(since("now", start), None);
    }
}
