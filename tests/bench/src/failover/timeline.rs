//! What the controller wrote down of a task: its events, such as a failover's from the fault on.
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
pub(crate) struct Event {
    pub(crate) shard: String,
    pub(crate) step: String,
    /// Since the start that was asked for.
    pub(crate) at_ms: f64,
    pub(crate) message: String,
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
    let mut events = Vec::new();
    for task in failovers(&api, &mesh.instance, start).await? {
        events.extend(of_task(&mut api, &task.task_id, start).await);
    }
    events.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    Ok(events)
}

/// The failovers of an instance since then.
///
/// # Errors
/// When no controller answers.
pub(crate) async fn failovers(
    api: &Api,
    instance: &str,
    start: SystemTime,
) -> anyhow::Result<Vec<Task>> {
    let request = ListTasksRequest {
        instance_id: instance.to_owned(),
        kinds: vec!["Failover".into()],
        created_after: humantime::format_rfc3339_millis(start).to_string(),
        ..ListTasksRequest::default()
    };
    Ok(api.tasks().list_tasks(request).await?.into_inner().tasks)
}

/// The events of a task that has ended, or is about to, in their order.
pub(crate) async fn of_task(api: &mut Api, task_id: &str, start: SystemTime) -> Vec<Event> {
    let mut events = Vec::new();
    let mut collector = Collector {
        since: start,
        events: &mut events,
    };
    let watched = progress::watch(api, task_id, 1, &mut collector);
    // What is there until then is shown all the same.
    let _ = timeout(WATCH_LIMIT, watched).await;
    events
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
