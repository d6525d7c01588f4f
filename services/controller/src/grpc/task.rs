//! `TaskService`: shows tasks, streams their events, and asks a task to end without effect.

mod audit;
mod change;
mod lost;

use std::collections::HashSet;

use slotmesh_proto::{
    store::v1 as records,
    task::v1::{self as api, task_service_server::TaskService},
};
use slotmesh_task::{
    Spec, Task,
    admit::RefusalKind,
    schedule,
    upgrade::{self, Heard, Upgrade},
    wire,
};
use slotmesh_topology::TaskId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Context, MessageStream, refuse, store_failed};
use crate::{
    clock,
    mirror::{State, Versioned},
    store::keys::{self, Key},
};

/// Most tasks in a page.
const PAGE_SIZE_MAX: u32 = 1_000;
/// Tasks in a page when the caller does not say.
const PAGE_SIZE_DEFAULT: u32 = 100;
/// Events buffered for a watcher that reads slowly; then it is waited for.
const EVENTS_BUFFERED: usize = 16;

/// The service.
#[derive(Clone, Debug)]
pub struct Tasks {
    context: Context,
}

impl Tasks {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    fn show(&self, task: &Task) -> api::Task {
        let sight = self.sight();
        let mut shown = self.context.mirror.read(|state| sight.show(task, state));
        if let Spec::Upgrade(upgrade) = &task.spec {
            self.show_gates(upgrade, task, &mut shown);
        }
        shown
    }

    /// What an upgrade's gates are judged by. Only the leader hears everybody.
    fn show_gates(&self, upgrade: &Upgrade, task: &Task, shown: &mut api::Task) {
        let leads = self.context.leading().is_ok();
        let shards = self.context.mirror.read(|s| s.shards_of(&task.instance));
        let now_ms = clock::now_ms();
        self.context.hub.read(|fleet| {
            for (part, progress) in upgrade.shards.iter().zip(&mut shown.shards) {
                let shard = shards.iter().find(|s| leads && s.value.id == part.shard);
                let heard = shard.map(|shard| Heard {
                    fleet,
                    shard: &shard.value,
                    now_ms,
                });
                let gates = upgrade::gates(upgrade, part, heard);
                progress.gates = gates.into_iter().map(wire::gate_api).collect();
            }
        });
    }

    fn sight(&self) -> Sight {
        Sight {
            now_ms: clock::now_ms(),
            rests_ms: self.context.jumps.look(),
        }
    }

    #[allow(clippy::result_large_err)]
    fn task(&self, id: &str) -> Result<Versioned<Task>, Status> {
        let key = TaskId::from(id);
        self.context
            .mirror
            .read(|s| s.tasks.get(&key).cloned())
            .ok_or_else(|| {
                refuse(
                    RefusalKind::NotFound,
                    "TASK_NOT_FOUND",
                    format!("there is no task {id}; ListTasks lists them"),
                )
            })
    }
}

#[tonic::async_trait]
impl TaskService for Tasks {
    async fn get_task(
        &self,
        request: Request<api::GetTaskRequest>,
    ) -> Result<Response<api::GetTaskResponse>, Status> {
        let task = self.task(&request.into_inner().task_id)?;
        Ok(Response::new(api::GetTaskResponse {
            task: Some(self.show(&task.value)),
        }))
    }

    async fn list_tasks(
        &self,
        request: Request<api::ListTasksRequest>,
    ) -> Result<Response<api::ListTasksResponse>, Status> {
        let request = request.into_inner();
        let size = match request.page_size {
            0 => PAGE_SIZE_DEFAULT,
            size if size <= PAGE_SIZE_MAX => size,
            _ => {
                return Err(refuse(
                    RefusalKind::Invalid,
                    "PAGE_SIZE_INVALID",
                    format!("page_size is 1 to {PAGE_SIZE_MAX}"),
                ));
            }
        };
        let states: HashSet<_> = request.states().collect();
        let (after_ms, before_ms) = created_between(&request)?;
        let sight = self.sight();
        let mut tasks: Vec<_> = self.context.mirror.read(|state| {
            state
                .tasks
                .values()
                .rev()
                .map(|t| &t.value)
                .filter(|t| request.page_token.is_empty() || t.id.as_str() < &*request.page_token)
                .filter(|t| {
                    request.instance_id.is_empty() || t.instance.as_str() == request.instance_id
                })
                .filter(|t| states.is_empty() || states.contains(&sight.state_of(t, state)))
                .filter(|t| {
                    request.kinds.is_empty() || request.kinds.iter().any(|k| k == t.spec.kind())
                })
                .filter(|t| (after_ms..before_ms).contains(&t.created_ms))
                .filter(|t| request.shard_id.is_empty() || t.spec.touches(&request.shard_id))
                .take(size as usize + 1)
                .map(|task| sight.show(task, state))
                .collect()
        });
        let has_more = tasks.len() > size as usize;
        tasks.truncate(size as usize);
        let last = tasks.last().map(|t| t.task_id.clone()).unwrap_or_default();
        let next_page_token = if has_more { last } else { String::new() };
        Ok(Response::new(api::ListTasksResponse {
            tasks,
            next_page_token,
        }))
    }

    async fn reschedule_task(
        &self,
        request: Request<api::RescheduleTaskRequest>,
    ) -> Result<Response<api::RescheduleTaskResponse>, Status> {
        let task = self.reschedule(request.into_inner()).await?;
        let task = Some(self.show(&task));
        Ok(Response::new(api::RescheduleTaskResponse { task }))
    }

    async fn resolve_task(
        &self,
        request: Request<api::ResolveTaskRequest>,
    ) -> Result<Response<api::ResolveTaskResponse>, Status> {
        let task = self.resolve(request.into_inner()).await?;
        let task = Some(self.show(&task));
        Ok(Response::new(api::ResolveTaskResponse { task }))
    }

    async fn list_epochs(
        &self,
        request: Request<api::ListEpochsRequest>,
    ) -> Result<Response<api::ListEpochsResponse>, Status> {
        let epochs = self.epochs(request.into_inner()).await?;
        Ok(Response::new(api::ListEpochsResponse { epochs }))
    }

    async fn list_lost_writes(
        &self,
        request: Request<api::ListLostWritesRequest>,
    ) -> Result<Response<api::ListLostWritesResponse>, Status> {
        let lost_writes = self.lost_writes(request.into_inner()).await?;
        Ok(Response::new(api::ListLostWritesResponse { lost_writes }))
    }

    type WatchTaskStream = MessageStream<api::WatchTaskResponse>;

    async fn watch_task(
        &self,
        request: Request<api::WatchTaskRequest>,
    ) -> Result<Response<Self::WatchTaskStream>, Status> {
        let request = request.into_inner();
        self.task(&request.task_id)?;
        let (sender, receiver) = mpsc::channel(EVENTS_BUFFERED);
        let (service, id) = (self.clone(), request.task_id);
        let from = request.from_event.max(1);
        tokio::spawn(async move {
            if let Err(status) = service.send_events(&id, from, &sender).await {
                // A watcher that left needs no answer.
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_task(
        &self,
        request: Request<api::CancelTaskRequest>,
    ) -> Result<Response<api::CancelTaskResponse>, Status> {
        let task = self.cancel(request.into_inner()).await?;
        let task = Some(self.show(&task));
        Ok(Response::new(api::CancelTaskResponse { task }))
    }
}

impl Tasks {
    /// Sends events from `next` on, until the one with which the task ends.
    async fn send_events(
        &self,
        id: &str,
        mut next: u64,
        sender: &mpsc::Sender<Result<api::WatchTaskResponse, Status>>,
    ) -> Result<(), Status> {
        let key = TaskId::from(id);
        let mut state = self.context.mirror.subscribe();
        loop {
            let waited = {
                let ready = state.wait_for(|s| {
                    s.tasks
                        .get(&key)
                        .is_none_or(|t| t.value.event_count >= next || t.value.state.is_ended())
                });
                tokio::select! {
                    ready = ready => ready.map(|s| s.tasks.get(&key).map(|t| t.value.clone())),
                    () = sender.closed() => return Ok(()),
                    () = self.context.stopping.cancelled() => return Err(stopping()),
                }
            };
            let Ok(Some(task)) = waited else {
                return Err(Status::unavailable(
                    "the controller is stopping; watch again",
                ));
            };
            while next <= task.event_count {
                let event_key = Key::TaskEvent {
                    task: id,
                    number: next,
                }
                .to_string();
                let item = self
                    .context
                    .store
                    .get(&event_key)
                    .await
                    .map_err(|e| store_failed(&e))?;
                if let Some(item) = item {
                    let record: records::TaskEventRecord =
                        keys::decode(&item).map_err(|e| store_failed(&e))?;
                    let event = api::WatchTaskResponse {
                        event: Some(show_event(record)),
                        task: Some(self.show(&task)),
                    };
                    if sender.send(Ok(event)).await.is_err() {
                        return Ok(());
                    }
                }
                next += 1;
            }
            if task.state.is_ended() {
                return Ok(());
            }
        }
    }
}

/// The times between which tasks were created, the second one excluded.
#[allow(clippy::result_large_err)]
fn created_between(request: &api::ListTasksRequest) -> Result<(u64, u64), Status> {
    let read = |text: &str, otherwise| match text {
        "" => Ok(otherwise),
        text => clock::from_rfc3339(text).ok_or_else(|| {
            refuse(
                RefusalKind::Invalid,
                "TIME_INVALID",
                format!("{text:?} is no time such as 2026-11-22T03:00:00Z"),
            )
        }),
    };
    Ok((
        read(&request.created_after, 0)?,
        read(&request.created_before, u64::MAX)?,
    ))
}

fn stopping() -> Status {
    Status::unavailable("the controller is stopping; watch again from the next event")
}

/// What is shown of a task besides its record.
#[derive(Clone, Copy)]
struct Sight {
    now_ms: u64,
    /// For how long windows do not count; see [`slotmesh_task::steady`].
    rests_ms: u64,
}

impl Sight {
    /// When it begins, of one that waits for that.
    fn planned_ms(self, task: &Task, state: &State) -> Option<u64> {
        let instance = state.instances.get(&task.instance);
        let window = instance.map_or("", |i| &i.value.maintenance_window);
        schedule::planned_ms(task, window, self.now_ms, self.rests_ms)
    }

    fn state_of(self, task: &Task, state: &State) -> records::TaskState {
        match self.planned_ms(task, state) {
            Some(_) => records::TaskState::Scheduled,
            None => wire::state_to(task.state),
        }
    }

    /// A task as the API shows it, in the light of the others.
    fn show(self, task: &Task, state: &State) -> api::Task {
        let shown = wire::task_api(
            task,
            clock::rfc3339(task.created_ms),
            clock::rfc3339(task.updated_ms),
        );
        let others = state.tasks.values().rev().map(|t| &t.value);
        let planned_ms = self.planned_ms(task, state);
        api::Task {
            state: self.state_of(task, state).into(),
            not_before: clock::rfc3339(planned_ms.unwrap_or(task.not_before_ms)),
            predicted_hold_ms: schedule::predicted_hold_ms(task, others),
            ..shown
        }
    }
}

fn show_event(record: records::TaskEventRecord) -> api::TaskEvent {
    api::TaskEvent {
        number: record.number,
        time: clock::rfc3339(record.unix_ms),
        state: record.state,
        shard_id: record.shard_id,
        step: record.step,
        message: record.message,
        trace_id: record.trace_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upgrade_that_waits_for_its_time_is_shown_as_scheduled_whatever_its_record_says() {
        let ready = records::ShardUpgrade {
            shard_id: "0".into(),
            phase: records::UpgradePhase::Ready.into(),
            ..Default::default()
        };
        let record = records::TaskRecord {
            schema: 1,
            task_id: "t".into(),
            instance_id: "r".into(),
            state: records::TaskState::Running.into(),
            not_before_unix_ms: 2_000,
            spec: Some(records::task_record::Spec::Upgrade(records::UpgradeSpec {
                shards: vec![ready],
                ..Default::default()
            })),
            ..Default::default()
        };
        let task = wire::task_from(&record).unwrap();
        let shown = |now_ms| {
            let sight = Sight {
                now_ms,
                rests_ms: 0,
            };
            sight.show(&task, &State::default())
        };
        let waits = shown(1_000);
        assert_eq!(waits.state(), records::TaskState::Scheduled);
        assert_eq!(waits.not_before, "1970-01-01T00:00:02.000Z");
        assert_eq!(shown(2_000).state(), records::TaskState::Running);
    }
}
